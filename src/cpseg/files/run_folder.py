"""The folder that a run writes: locked, resumed by fingerprint, stale files made again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpseg._internal.checks import message
from cpseg._internal.distributed import barrier, broadcast_from_rank0, rank
from cpseg._internal.safe_files import locked, write_text
from cpseg._version import __version__
from cpseg.files.id_lists import Pair
from cpseg.files.manifest import Entry, Manifest, Stamp, merge_logs, sha256_of, stamp

_RUN = "run.json"
_LOCK = "run.lock"


def is_up_to_date(made: Path, *inputs: Path) -> bool:
    """Whether a file exists and is no older than the files it was made from."""
    if not made.exists():
        return False
    when = made.stat().st_mtime_ns
    return all(path.stat().st_mtime_ns <= when for path in inputs)


def output_path(out: Path, image: str, suffix: str) -> Path:
    """The path of an image's file in the folder of a run.

    Raises:
        ValueError: the image does not lie below the root.
    """
    relative = Path(image).with_suffix(suffix)
    if relative.is_absolute() or ".." in relative.parts:
        fix = "pass the folder that holds all images as --root"
        raise ValueError(message("id list", "image paths below the root", image, fix))
    return out / relative


def output_paths(
    where: str, out: Path, pairs: Sequence[Pair], suffix: str, *, kind: str
) -> dict[Pair, Path]:
    """The output file of every image; ``kind`` says what the files are.

    Raises:
        ValueError: two images would share one, or an image does not lie below the root.
    """
    paths: dict[Pair, Path] = {}
    owner: dict[Path, str] = {}
    for pair in pairs:
        path = output_path(out, pair.image, suffix)
        if path in owner:
            expected = "image names that differ before the suffix"
            got, fix = f"{owner[path]} and {pair.image}", f"rename one: their {kind} share a file"
            raise ValueError(message(where, expected, got, fix))
        owner[path] = pair.image
        paths[pair] = path
    return paths


class RunFolder:
    """A folder that is open for a run; see :func:`open_run_folder`.

    A file counts as made if its inputs are what they were: the same sizes and times. Where only
    times differ the content decides, if a digest of it was recorded. So an input that was replaced
    is noticed whatever its new times are; what is missed is a change within one tick of the file
    system's clock that keeps the size, and on Windows one that keeps size and time of
    modification.

    Attributes:
        out: the folder.
        old: whether a version without a manifest wrote it: a file that is not recorded then counts
            as made if it is no older than its inputs.
        digest_inputs: record a digest of every input, which costs one more read of it.
        digest_files: record a digest of every file made, by which it is known again; without one
            it is known by its size.
    """

    def __init__(
        self, out: Path, *, old: bool, digest_inputs: bool = False, digest_files: bool = False
    ) -> None:
        self.out = out
        self.old = old
        self.digest_inputs = digest_inputs
        self.digest_files = digest_files
        self._manifest = Manifest(out, rank())

    def stamps(self, *inputs: Path) -> list[Stamp]:
        """What :meth:`record` needs to know of the inputs; take it before they are read."""
        return [stamp(path, content=self.digest_inputs) for path in inputs]

    def record(
        self,
        made: Path,
        inputs: Sequence[Path],
        stamps: Sequence[Stamp],
        facts: Mapping[str, float] | None = None,
    ) -> None:
        """Note that a file is complete.

        If an input has changed since its stamp was taken nothing is noted, so that the next run
        makes the file again.
        """
        now = [stamp(path) for path in inputs]
        if now == [each._replace(sha256=None) for each in stamps]:
            digest = sha256_of(made) if self.digest_files else None
            self._manifest.add(made, Entry(made.stat().st_size, digest, tuple(stamps), facts))

    def facts(self, made: Sequence[Path]) -> list[Mapping[str, float] | None]:
        """The facts that any rank recorded of files, after a barrier; None where there are none."""
        self._manifest.read_logs()
        entries = map(self._manifest.find, made)
        return [None if entry is None else entry.facts for entry in entries]

    def is_up_to_date(
        self, made: Path, *inputs: Path, sound: Callable[[], bool] = lambda: True
    ) -> bool:
        """Whether a file is there as it was recorded, and its inputs are as they were.

        Args:
            made: the file, in the folder.
            inputs: what it is made from.
            sound: asked where an old folder has no record of the file: whether it may be kept.
        """
        if not made.exists() or not all(path.exists() for path in inputs):
            return False
        entry = self._manifest.find(made)
        if entry is None:
            empty = made.stat().st_size == 0
            if not self.old or empty or not is_up_to_date(made, *inputs) or not sound():
                return False
            self.record(made, inputs, self.stamps(*inputs))
            return True
        if made.stat().st_size != entry.size or len(inputs) != len(entry.sources):
            return False
        if entry.sha256 is not None and sha256_of(made) != entry.sha256:
            return False
        sources = []
        for path, was in zip(inputs, entry.sources, strict=True):
            now = _unless_changed(path, was)
            if now is None:
                return False
            sources.append(now)
        if tuple(sources) != entry.sources:
            self._manifest.add(made, entry._replace(sources=tuple(sources)))
        return True


def _unless_changed(path: Path, was: Stamp) -> Stamp | None:
    """The stamp of a file with the content that it had; None where it changed or may have."""
    now = stamp(path)._replace(sha256=was.sha256)
    if now == was:
        return now
    if was.sha256 is None or now.size != was.size or sha256_of(path) != was.sha256:
        return None
    return now


@contextlib.contextmanager
def open_run_folder(
    out: Path,
    fingerprint: str,
    *,
    facts: Mapping[str, Any] | None = None,
    digest_inputs: bool = False,
    digest_files: bool = False,
) -> Iterator[RunFolder]:
    """Open a folder for a new run or to resume it, and keep other runs out of it meanwhile.

    The first rank holds a lock for all of them, which ends with its process however that ends.
    Files that a killed run did not finish are removed. On a file system without locks nothing
    keeps a second run out, and unfinished files stay, since they may be another run's.

    Args:
        out: the folder.
        fingerprint: a digest of all that the files depend on besides their inputs.
        facts: further entries of ``run.json``.
        digest_inputs: see :class:`RunFolder`.
        digest_files: see :class:`RunFolder`.

    Raises:
        ValueError: the folder holds the files of another run, or other files, or a run is writing
            it at this moment.
    """
    wanted = {"cpseg": __version__, "fingerprint": fingerprint, "manifest": 1, **(facts or {})}
    with contextlib.ExitStack() as stack:
        old = False
        if rank() == 0:
            _check(out, fingerprint)  # before anything is written into what may be another's
            holds = _lock(out, stack)
            _check(out, fingerprint)
            if not (out / _RUN).exists():
                write_text(out / _RUN, json.dumps(wanted, indent=2) + "\n")
            merge_logs(out)
            for part in out.rglob(".*.part") if holds else ():
                part.unlink()
            old = "manifest" not in _recorded(out)
        (old,) = broadcast_from_rank0([old])  # the other ranks wait for it
        yield RunFolder(out, old=old, digest_inputs=digest_inputs, digest_files=digest_files)
        barrier()
        if rank() == 0:
            merge_logs(out)
            if old:
                write_text(out / _RUN, json.dumps(wanted, indent=2) + "\n")


def _lock(out: Path, stack: contextlib.ExitStack) -> bool:
    try:
        return stack.enter_context(locked(out / _LOCK))
    except BlockingIOError as error:
        expected, got = "a folder that no other run is writing", "one in use"
        fix = "wait for that run to end, or choose another with -o"
        raise ValueError(message(str(out), expected, got, fix)) from error


def _check(out: Path, fingerprint: str) -> None:
    """The folder is new, or of this run."""
    if (out / _RUN).exists():
        if _recorded(out).get("fingerprint") != fingerprint:
            expected, got = "a new folder, or one of the same run", "another run's"
            raise ValueError(message(str(out), expected, got, "choose another with -o"))
    elif out.is_dir():
        names = [entry.name for entry in out.iterdir() if entry.suffix != ".part"]
        strangers = [name for name in names if name != _LOCK]
        if strangers:
            expected, got = "a new or empty folder", f"one with '{min(strangers)}' in it"
            raise ValueError(message(str(out), expected, got, "choose another with -o"))


def _recorded(out: Path) -> dict[str, Any]:
    """The content of ``run.json``; nothing where it is damaged."""
    try:
        content = json.loads((out / _RUN).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
