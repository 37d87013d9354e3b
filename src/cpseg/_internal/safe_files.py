"""Files written whole or not at all, locked files, and safetensors with JSON metadata."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from torch import Tensor

from cpseg._internal.checks import (
    message,
)

T = TypeVar("T")
_METADATA = "cpseg"  # the one key of our safetensors metadata: a JSON text


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that appears under its name only once it is complete.

    Raises:
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name[:64]}."  # well below the longest name a file may have
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # name the file, not its stand-in
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[bool]:
    """Hold a file locked, and remove it afterwards. A process that is killed lets go of its lock.

    Yields:
        Whether it is locked: some network file systems have no locks, and there nothing is held.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            holds = _lock(handle)
        except BaseException:
            os.close(handle)
            raise
        if not holds or _is_at(handle, path):
            break
        os.close(handle)  # whoever held it has removed the file since we opened it
    try:
        yield holds
    finally:
        if sys.platform == "win32":  # where open files cannot be removed
            os.close(handle)
            handle = -1
        with contextlib.suppress(OSError):
            path.unlink()
        if handle >= 0:
            os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file until it is closed; False where its file system has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise BlockingIOError(error.errno, "locked by another process") from error
        return False
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, as UTF-8.

    Raises:
        ValueError: a character that UTF-8 lacks, as in names read where the locale is ASCII.
    """
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        got = ascii(text[max(0, error.start - 40) : error.end + 20])
        fix = "rename the file, or set PYTHONUTF8=1"
        raise ValueError(message(ascii(str(path))[1:-1], "text in UTF-8", got, fix)) from error
    with atomic(path) as file:
        file.write(encoded)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file atomically, with ``metadata`` as JSON."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(metadata, sort_keys=True)
    with atomic(path) as file:
        file.write(save(contiguous, metadata={_METADATA: text}))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON metadata of a safetensors file; metadata of other programs reads as {}.

    Raises:
        ValueError: the file is truncated or not a safetensors file.
        FileNotFoundError: there is no such file.
    """
    return _read(path, lambda file, name: file.get_tensor(name))


def read_tensor_shapes(path: str | Path) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """As :func:`read_tensors`, with the shapes in place of the tensors: reads the header alone."""
    return _read(path, lambda file, name: file.get_slice(name).get_shape())


def _read(path: str | Path, take: Callable[[Any, str], T]) -> tuple[dict[str, T], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            contents = {name: take(file, name) for name in file.keys()}  # noqa: SIM118
            metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
    except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise damaged(path, "a safetensors file", error) from error
    if not isinstance(metadata, dict):
        got, fix = f"a JSON {type(metadata).__name__}", "write it anew"
        raise ValueError(message(str(path), "an object as its metadata", got, fix))
    return contents, metadata


def damaged(path: str | Path, expected: str, error: Exception) -> ValueError:
    """The error where a file cannot be read."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(
        message(str(path), expected, f"an unreadable one ({reason})", "write it anew")
    )
