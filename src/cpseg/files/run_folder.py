"""The folder that a run writes: opened once, resumed by fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

from cpseg._internal.checks import message
from cpseg._internal.distributed import barrier, rank
from cpseg._internal.safe_files import write_text
from cpseg._version import __version__


def is_up_to_date(made: Path, *inputs: Path) -> bool:
    """Whether a file is there and no older than what it was made of."""
    if not made.exists():
        return False
    when = made.stat().st_mtime_ns
    return all(path.stat().st_mtime_ns <= when for path in inputs)


def output_path(out: Path, image: str, suffix: str) -> Path:
    """Where in a run's folder a file about an image lies.

    Raises:
        ValueError: the image does not lie below the root.
    """
    relative = Path(image).with_suffix(suffix)
    if relative.is_absolute() or ".." in relative.parts:
        fix = "pass the folder that holds all images as --root"
        raise ValueError(message("id list", "image paths below the root", image, fix))
    return out / relative


def open_run_folder(out: Path, fingerprint: str) -> None:
    """Open a folder for a run, or go on with the same one; remove what a killed one left open.

    Raises:
        ValueError: the folder holds another run's files, or somebody's.
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
