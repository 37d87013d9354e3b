"""Run each command of a section of docs/results-in-detail.md once and save its output."""

from __future__ import annotations

import contextlib
import io
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cpseg.files import write_text

REPOSITORY = Path(__file__).parent.parent.parent
DATA = ("--root", ".", "--probs", "probs")
MAPS = ("--class-map", "map.json", "--mask-map", "map.json")
KINDS = {"eleven": ("none", ()), "objects": ("0", MAPS)}  # background and maps
Lines = list[tuple[str, ...]]


class StoppedError(Exception):
    """There is no time left for another command."""


class Runner:
    """Runs the commands of a section in the folder of the data and saves their outputs.

    Attributes:
        place: folder of the section's files, relative to the folder of the data.
        jobs: number of trainings at a time.
    """

    def __init__(self, section: str, deadline: float, jobs: int) -> None:
        self.place, self.deadline, self.jobs = Path("results") / section, deadline, jobs

    def cpseg(self, name: str, *words: object) -> str:
        """The output of ``cpseg ...``; it may be that nothing can be certified."""
        return self.kept(name, ["cpseg", *map(str, words)], _cpseg)

    def script(self, name: str, path: str, *words: object) -> str:
        """The output of a script of the repository."""
        return self.kept(name, ["python", path, *map(str, words)], _script)

    def kept(
        self, name: str, words: list[str], call: Callable[[list[str]], tuple[int, str]]
    ) -> str:
        """The output of a call, or the saved output of the same call."""
        path, title = self.place / f"{name}.txt", f"$ {shlex.join(words)}\n"
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            if text.startswith(title):
                return text.removeprefix(title)
        if time.monotonic() > self.deadline:
            raise StoppedError
        print(title, end="", file=sys.stderr, flush=True)
        self.place.mkdir(parents=True, exist_ok=True)
        code, said = call(words)
        if code not in (0, 1) or (code == 1 and "cpseg: not certified:" not in said):
            last = (said.strip().splitlines() or ["nothing"])[-1]
            raise ValueError(f"{shlex.join(words)}: {last}")
        write_text(path, title + said)
        return said


def _cpseg(words: list[str]) -> tuple[int, str]:
    """Run ``python -m cpseg``, but in this process, which has loaded torch already."""
    said, argv = io.StringIO(), sys.argv
    sys.argv = list(words)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module("cpseg", run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    finally:
        sys.argv = argv
    return 0, said.getvalue()


def _script(words: list[str]) -> tuple[int, str]:
    command = [sys.executable, str(REPOSITORY / words[1]), *words[2:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def table(lines: Lines) -> str:
    """Lines of cells as a Markdown table with aligned columns; the first line is the header."""
    rule = ("---", *["---:"] * (len(lines[0]) - 1))
    lines = [lines[0], rule, *lines[1:]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = []
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        rows.append(f"| {' | '.join([first.ljust(widths[0]), *cells])} |")
    return "\n".join(rows)
