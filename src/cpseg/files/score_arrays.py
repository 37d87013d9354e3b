"""Arrays in score files of every form: those of one image, or one file with those of all images."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cpseg._internal.checks import message
from cpseg._internal.safe_files import damaged
from cpseg.files.image_folders import places_of

T = TypeVar("T")
TORCH = (".pt", ".pth")
_PARSER_TRIES = 50
OF_ALL_IMAGES = (".npz", ".safetensors", *TORCH)  # forms of a file with the scores of all images


def from_numpy(path: Path, name: str, entry: str | None = None, *, mapped: bool = False) -> Tensor:
    """An array of a ``.npy`` or ``.npz`` file: ``entry``, or ``name``, or the only one.

    With ``mapped`` the values of a ``.npy`` file stay on the disk until they are used. Nothing may
    write into the file then while the tensor lives; to replace the file is safe.
    """

    def load() -> Any:
        if mapped and path.suffix == ".npy":
            # An empty or damaged file: what is wrong with it is said below.
            with contextlib.suppress(ValueError, OverflowError), np.errstate(over="ignore"):
                return np.load(path, mmap_mode="c", allow_pickle=False)
        return np.load(path, allow_pickle=False)

    def read() -> Tensor:
        loaded = load()
        if isinstance(loaded, np.ndarray):
            return torch.from_numpy(loaded)
        with loaded:
            if entry is not None:
                return torch.from_numpy(loaded[entry])
            arrays = {each: torch.from_numpy(loaded[each]) for each in loaded.files}
            return only(path, arrays, name)

    try:
        return _parsed(read)
    except FileNotFoundError:
        raise
    except Exception as error:  # from zip, zlib, NumPy's header parser: anything may come
        kind = "probabilities" if name == "probs" else name
        raise damaged(path, f"a {path.suffix} file of {kind}", error) from error


def _parsed(read: Callable[[], T]) -> T:
    """``read()``, again where a header could not be parsed because another thread parsed one.

    NumPy's headers are Python literals. Before Python 3.12 the parser counts its depth for all
    threads together, and raises SystemError where two of them meet.
    """
    for _ in range(_PARSER_TRIES):
        try:
            return read()
        except SystemError as error:
            if "recursion depth" not in str(error):
                raise
    return read()


def from_bytes(stored: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Probabilities that are stored as uint8, p = u/255, as float32.

    On the CPU by NumPy, which asks Linux for large pages: 22 MB in pages of 4 kB take longer to get
    than to compute, above all in several threads.
    """
    if torch.device(device).type != "cpu":
        return stored.to(device).to(torch.float32).div_(255)
    return torch.from_numpy(np.true_divide(stored.numpy(), np.float32(255), dtype=np.float32))


def shape_from_numpy(path: Path, entry: str | None = None) -> Sequence[int]:
    """The shape of an array of a ``.npy`` or ``.npz`` file, from its header."""
    header = np.lib.format

    def read() -> Sequence[int]:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix == ".npy" else None)
        if isinstance(loaded, np.ndarray):
            return tuple(loaded.shape)
        with loaded:
            name = entry or only(path, {name: name for name in loaded.files})
            with loaded.zip.open(f"{name}.npy") as file:
                old = header.read_magic(file) == (1, 0)
                parse = header.read_array_header_1_0 if old else header.read_array_header_2_0
                size: tuple[int, ...] = parse(file)[0]
                return size

    try:
        return _parsed(read)
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, FileNotFoundError) or str(error).startswith(f"{path}:"):
            raise
        raise damaged(path, f"a {path.suffix} file of probabilities", error) from error
    except Exception as error:  # from zip, zlib, NumPy's header parser: anything may come
        raise damaged(path, f"a {path.suffix} file of probabilities", error) from error


def from_torch(path: Path, name: str, entry: str | None = None) -> Tensor:
    """A tensor of a file that ``torch.save`` wrote: itself, or one of a dictionary of tensors.

    Only tensors are loaded, and no code is run; values stay on the disk until they are used.
    """
    if entry is not None:
        return _torch_of_all(path, *_version(path))[entry].clone()
    loaded = _load_torch(path)
    return loaded if isinstance(loaded, Tensor) else only(path, _tensors(path, loaded), name)


def _load_torch(path: Path) -> Any:
    try:
        try:
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(str(path), map_location="cpu", weights_only=True)  # the old format
    except FileNotFoundError:
        raise
    except Exception as error:  # from pickle and zip: anything may come
        kind = f"a {path.suffix} file of tensors"
        got = "an unreadable one (damaged, or with other objects than tensors)"
        fix = "write it anew with torch.save(probs, path)"
        raise ValueError(message(str(path), kind, got, fix)) from error


def _tensors(path: Path, loaded: Any) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        expected, fix = "a tensor or a dictionary of tensors", "save the tensor itself"
        raise ValueError(message(str(path), expected, type(loaded).__name__, fix))
    return {str(name): each for name, each in loaded.items() if isinstance(each, Tensor)}


@lru_cache(maxsize=4)
def _torch_of_all(path: Path, modified: int, size: int) -> dict[str, Tensor]:
    return _tensors(path, _load_torch(path))


def only(path: Path, arrays: Mapping[str, T], name: str = "probs") -> T:
    """The array of this name among those of a file, or its only one.

    Raises:
        ValueError: there are several others, or none.
    """
    if name in arrays:
        return arrays[name]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    names = ", ".join(sorted(arrays)) or "none"
    shown = names if len(names) < 200 else f"{names[:200]} ..."
    raise ValueError(message(str(path), f"an array {name!r}", f"arrays {shown}", _fix(name)))


def _fix(name: str) -> str:
    return f"name the array {name!r}"


def _version(path: Path) -> tuple[int, int]:
    """What changes with the contents of a file."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def entry_of(path: Path, image: str) -> str:
    """The name of an image's array in a file with those of all images.

    It is the image's id or that without suffix, or the same without leading folders.

    Raises:
        ValueError: there are two.
        FileNotFoundError: there is none, or no such file.
    """
    names = _entries(path, *_version(path))
    name = posixpath.normpath(Path(image).as_posix())
    suffix = PurePosixPath(name).suffix
    whole, *shorter = places_of(image)
    for places in ([whole], shorter):
        found = [each for place in places for each in (place + suffix, place) if each in names]
        if len(set(found)) > 1:
            expected, got = f"one array of {image}", " and ".join(map(repr, found))
            raise ValueError(message(str(path), expected, got, "remove all but one"))
        if found:
            return found[0]
    expected = f"an array named {whole + suffix!r}, or like it without suffix or leading folders"
    fix = "write the scores of every listed image, named by the id list"
    raise FileNotFoundError(message(str(path), expected, f"{len(names)} others", fix))


@lru_cache(maxsize=8)
def _entries(path: Path, modified: int, size: int) -> frozenset[str]:
    """The names of all arrays in a file."""
    if path.suffix in TORCH:
        return frozenset(_torch_of_all(path, modified, size))
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as loaded:
                return frozenset(loaded.files)
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            return frozenset(file.keys())
    except Exception as error:  # from zip, NumPy, safetensors: anything may come
        raise damaged(path, f"a {path.suffix} file of probabilities", error) from error


def from_safetensors(path: Path, entry: str, *, shape_alone: bool = False) -> Any:
    """One tensor of a safetensors file with those of all images, or its shape."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return file.get_slice(entry).get_shape() if shape_alone else file.get_tensor(entry)
    except SafetensorError as error:
        raise damaged(path, "a safetensors file", error) from error
