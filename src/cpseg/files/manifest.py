"""What every file in the folder of a run was made from, so that a stale one is made again.

A line per file in ``manifest.jsonl``. While a run goes on, every rank appends to a log of its own,
one line for each finished file; the first rank merges the logs at the end, or when the next run
opens the folder. A run that is killed loses no line but the one it was writing, and its file is
made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cpseg._internal.safe_files import write_text

_NAME = "manifest.jsonl"
_LOGS = ".manifest-*.log"


class Stamp(NamedTuple):
    """By what a file is known again.

    Attributes:
        size: in bytes.
        modified: time of the last change of the content, in nanoseconds.
        changed: time of the last change of the file in any way. ``rsync -a``, ``cp -p`` and
            ``tar``, which restore ``modified``, cannot set it; on Windows it is the time of
            creation.
        sha256: of the content, or None where it was not computed.
    """

    size: int
    modified: int
    changed: int
    sha256: str | None = None


def stamp(path: Path, *, content: bool = False) -> Stamp:
    """The stamp of a file, with the digest of its content if wanted."""
    status = path.stat()
    digest = sha256_of(path) if content else None
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, digest)


def sha256_of(path: Path) -> str:
    """The digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Entry(NamedTuple):
    """What is recorded of a file that a run wrote.

    Attributes:
        size: in bytes.
        sha256: of the content, or None where it was not computed.
        sources: the stamps of the files it was made from.
        facts: what else a later run wants to know of it without reading its sources, or None.
    """

    size: int
    sha256: str | None
    sources: tuple[Stamp, ...]
    facts: Mapping[str, float] | None = None


class Manifest:
    """The recorded files of a folder, by their paths in it.

    Args:
        out: the folder.
        rank: this process among those that write the folder.
    """

    def __init__(self, out: Path, rank: int) -> None:
        self._out = out
        self._log = out / _LOGS.replace("*", str(rank))
        self._entries = _read(out / _NAME)

    def find(self, made: Path) -> Entry | None:
        """What is recorded of a file, or None."""
        return self._entries.get(self._key(made))

    def read_logs(self) -> None:
        """Take in what the other ranks have recorded."""
        for log in sorted(self._out.glob(_LOGS)):
            self._entries.update(_read(log))

    def add(self, made: Path, entry: Entry) -> None:
        """Record a file that is complete. The line survives the end of this process."""
        self._entries[self._key(made)] = entry
        line = _line(self._key(made), entry).encode()
        handle = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            while line:
                line = line[os.write(handle, line) :]
        finally:
            os.close(handle)

    def _key(self, made: Path) -> str:
        return made.relative_to(self._out).as_posix()


def merge_logs(out: Path) -> None:
    """Bring the logs of all ranks into the manifest. Nobody else may write the folder meanwhile."""
    logs = sorted(out.glob(_LOGS))
    if not logs:
        return
    entries = _read(out / _NAME)
    for log in logs:
        entries.update(_read(log))
    write_text(out / _NAME, "".join(_line(key, entries[key]) for key in sorted(entries)))
    for log in logs:
        log.unlink()


def _line(key: str, entry: Entry) -> str:
    content = {"file": key, **entry._asdict()}
    if entry.facts is None:
        del content["facts"]
    return _json({**content, "crc32": _checksum(content)}) + "\n"


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":"))


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(_json(content).encode())


def _read(path: Path) -> dict[str, Entry]:
    """The entries of a manifest or a log. A line that is torn or damaged records nothing.

    Lines of older versions have no checksum.
    """
    if not path.exists():
        return {}
    entries = {}
    for line in path.read_bytes().splitlines():
        try:
            key, entry = _parse(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        entries[key] = entry
    return entries


def _parse(content: dict[str, Any]) -> tuple[str, Entry]:
    checksum = content.pop("crc32", None)
    if checksum is not None and checksum != _checksum(content):
        raise ValueError("damaged")
    sources: Sequence[Any] = content["sources"]
    stamps = tuple(Stamp(*values) for values in sources)
    facts = content.get("facts")
    facts = None if facts is None else {str(name): float(facts[name]) for name in facts}
    return str(content["file"]), Entry(content["size"], content["sha256"], stamps, facts)
