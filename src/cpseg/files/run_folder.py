"""The folder that a run writes: opened once, resumed by fingerprint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cpseg._internal.checks import message
from cpseg._internal.distributed import barrier, rank
from cpseg._internal.safe_files import write_text
from cpseg._version import __version__
from cpseg.files.id_lists import Pair


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


def open_run_folder(out: Path, fingerprint: str) -> None:
    """Open a folder for a new run or to resume it; remove unfinished files of a killed run.

    Raises:
        ValueError: the folder holds the files of another run, or other files.
    """
    if rank() == 0:
        path = out / "run.json"
        if not path.exists() and out.is_dir():
            strangers = [entry.name for entry in out.iterdir() if entry.suffix != ".part"]
            if strangers:
                expected, got = "a new or empty folder", f"one with '{min(strangers)}' in it"
                raise ValueError(message(str(out), expected, got, "choose another with -o"))
        if path.exists():
            try:
                recorded = json.loads(path.read_text(encoding="utf-8")).get("fingerprint")
            except (ValueError, AttributeError):
                recorded = None
            if recorded != fingerprint:
                expected, got = "a new folder, or one of the same run", "another run's"
                raise ValueError(message(str(out), expected, got, "choose another with -o"))
        else:
            written = json.dumps({"cpseg": __version__, "fingerprint": fingerprint}, indent=2)
            write_text(path, written + "\n")
        for part in out.rglob(".*.part"):
            part.unlink()
    barrier()
