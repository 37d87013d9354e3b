"""A tiny data set on disk, the command called in this process, and what its errors look like."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from cpseg.cli.command import main

VOID = 255


@dataclass(frozen=True, repr=False)
class DataSet:
    """Images, masks, scores and ``ids.txt`` under a root; arrays by the image's listed name."""

    root: Path
    scores: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]

    @property
    def images(self) -> list[str]:
        return list(self.scores)

    @property
    def ids(self) -> Path:
        return self.root / "ids.txt"

    @property
    def probs(self) -> Path:
        return self.root / "probs"

    def score_file(self, image: str) -> Path:
        return self.probs / Path(image).with_suffix(".npy")

    def mask_file(self, image: str) -> Path:
        return self.root / image.replace("images/", "masks/", 1)

    def options(self, **changed: object) -> list[str]:
        """``--root``, ``--ids`` and ``--probs``; keywords replace values or add options."""
        return options(**{"root": self.root, "ids": self.ids, "probs": self.probs, **changed})

    def list_ids(self, name: str, images: Sequence[str], *, masks: bool = True) -> Path:
        path = self.root / name
        lines = [f"{image} {image.replace('images/', 'masks/', 1)}" for image in images]
        path.write_text("".join(f"{x if masks else x.split(' ')[0]}\n" for x in lines))
        return path


def options(**values: object) -> list[str]:
    """``per_class=True`` is ``--per-class``, ``alpha=0.1`` is ``--alpha 0.1``; None leaves out."""
    words: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return words


def make(
    root: Path,
    *,
    count: int = 6,
    sizes: Sequence[tuple[int, int]] = ((12, 16),),
    num_classes: int = 4,
    seed: int = 0,
) -> DataSet:
    """Write ``count`` images whose sizes go round ``sizes``; the scores lean to the truth."""
    rng = np.random.default_rng(seed)
    data = DataSet(root, {}, {})
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        image = f"images/{number:02d}.png"
        coarse = rng.integers(0, num_classes, (height // 3 + 1, width // 3 + 1))
        truth = np.kron(coarse, np.ones((3, 3), int))[:height, :width].astype(np.uint8)
        logits = rng.normal(size=(num_classes, height, width))
        np.put_along_axis(logits, truth[None], np.take_along_axis(logits, truth[None], 0) + 1.5, 0)
        odds = np.exp(logits)
        scores = (odds / odds.sum(0)).astype(np.float32)
        truth[rng.random((height, width)) < 0.05] = VOID
        data.scores[image], data.labels[image] = scores, truth
        for path in (root / image, data.mask_file(image), data.score_file(image)):
            path.parent.mkdir(parents=True, exist_ok=True)
        colours = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(colours).save(root / image)
        Image.fromarray(truth).save(data.mask_file(image))
        np.save(data.score_file(image), scores)
    data.list_ids("ids.txt", data.images)
    return data


class Result(NamedTuple):
    code: int
    out: str
    err: str


def command(capsys: pytest.CaptureFixture[str], *words: object) -> Result:
    """Call the command in this process."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return Result(code, out, err)


def done(result: Result) -> Result:
    """The command succeeded and complained about nothing.

    Most tests have one small data set and measure on the calibration images: that warning is
    allowed.
    """
    assert result.code == 0, result.err
    used = "images were used for the calibration"
    warned = [line for line in result.err.splitlines() if used not in line]
    assert warned == []
    return result


def refused(result: Result, *parts: str) -> None:
    """Exit 2 with nothing but one line on stderr, which says all of ``parts``."""
    assert result.code == 2, result
    assert result.out == "", result.out
    assert result.err.startswith("cpseg: error: "), result.err
    assert result.err.endswith("\n"), result.err
    assert len(result.err.splitlines()) == 1, result.err
    for part in parts:
        assert part in result.err, f"{part!r} is not in {result.err!r}"


def complains(error: BaseException, where: object, *parts: str) -> None:
    """``where: expected ..., got ...; fix`` in one line."""
    text = str(error)
    assert len(text.splitlines()) == 1, text
    assert text.startswith(f"{where}: expected "), text
    expected, _, rest = text.partition(", got ")
    assert expected, text
    assert rest.partition("; ")[2], text
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"


def newer(path: Path) -> None:
    """As if the file had been written a minute from now."""
    when = path.stat().st_mtime_ns + 60 * 10**9
    os.utime(path, ns=(when, when))


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(*words: object, code: str | None = None, **kwargs: Any) -> subprocess.Popen[str]:
    """The command (or ``code`` with ``words`` as its arguments) as a process of its own."""
    head = ["-m", "cpseg"] if code is None else ["-c", code]
    return subprocess.Popen(
        [sys.executable, *head, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def finish(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


def select(probs: np.ndarray, threshold: np.ndarray | float, background: int | None) -> np.ndarray:
    """Eq. 4, literally: ``probs`` [K, H, W], ``threshold`` a number or [H, W]; uint8 [H, W]."""
    inside = (np.float32(1) - probs.astype(np.float32)) <= np.float32(threshold)
    chosen = np.full(probs.shape[1:], VOID, np.uint8)
    for cell in np.ndindex(*probs.shape[1:]):
        members = [k for k in range(len(probs)) if inside[(k, *cell)]]
        others = [k for k in members if k != background] or members
        if others:
            chosen[cell] = max(others, key=lambda k, cell=cell: (probs[(k, *cell)], -k))
    return chosen


def nearest(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map ``[..., H, W]`` at another size: pixel (i, j) takes cell (i H // h, j W // w)."""
    height, width = grid.shape[-2:]
    rows = [i * height // size[0] for i in range(size[0])]
    columns = [j * width // size[1] for j in range(size[1])]
    return grid[..., rows, :][..., columns]
