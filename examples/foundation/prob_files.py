"""Mask logits of prompts to the score files that cpseg reads; NumPy alone, any Python from 3.8.

For scripts that run inside another project's environment, which may be too old for cpseg.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

BACKGROUNDS = ("prompt", "complement", "none")


def read_ids(path: str | Path) -> list[str]:
    """The images of an id list, ``image`` or ``image mask`` a line."""
    images = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        parts = line.split(" ")
        if not 1 <= len(parts) <= 2 or "" in parts:
            raise ValueError(f"{path}, line {number}: expected 'image' or 'image mask'")
        images.append(parts[0])
    return images


def read_classes(path: str | Path) -> dict[str, list[str]]:
    """Prompts of every class, from lines ``name`` or ``name: prompt, prompt``."""
    classes: dict[str, list[str]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        name, colon, rest = (part.strip() for part in line.partition(":"))
        prompts = [text.strip() for text in rest.split(",")] if colon else [name]
        if not name or not all(prompts) or name in classes:
            raise ValueError(f"{path}, line {number}: expected a new 'name' or 'name: prompts'")
        classes[name] = prompts
    return classes


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """In float64, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(logits, dtype=np.float64)))


def class_scores(maps: Sequence[np.ndarray], counts: Sequence[int], background: str) -> np.ndarray:
    """Class scores ``[K, H, W]`` in [0, 1].

    Args:
        maps: one a prompt, class by class, in [0, 1], ``[H, W]``.
        counts: how many prompts each class has; their scores are averaged.
        background: ``"complement"`` puts 1 - max of the classes first; else they stay as they are.
    """
    if background not in BACKGROUNDS:
        raise ValueError(f"background: expected one of {BACKGROUNDS}, got {background!r}")
    if len(maps) != sum(counts):
        raise ValueError(f"class_scores: expected {sum(counts)} maps, got {len(maps)}")
    ends = np.cumsum(counts)
    parts = [maps[end - count : end] for end, count in zip(ends, counts)]  # noqa: B905
    scores = np.stack([np.mean(part, axis=0) for part in parts])
    if not (scores.min() >= 0 and scores.max() <= 1):
        raise ValueError("class_scores: expected scores in [0, 1]; take the sigmoid of logits")
    if background == "complement":
        scores = np.concatenate([1 - scores.max(axis=0, keepdims=True), scores])
    return scores


def write(path: str | Path, scores: np.ndarray) -> None:
    """Scores in [0, 1] as uint8 ``.npz``, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, probs=np.rint(scores * 255).astype(np.uint8))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_all(
    ask: Callable[[Path, list[str]], Sequence[np.ndarray]],
    *,
    root: str | Path,
    ids: str | Path,
    classes: str | Path,
    background: str,
    out: str | Path,
) -> int:
    """Score files of every image of a list, but for those that are there; how many were written.

    ``ask`` gets an image and all prompts, and returns a map in [0, 1] for each at the image's size.
    """
    images, asked, written = read_ids(ids), read_classes(classes), 0
    prompts = [text for texts in asked.values() for text in texts]
    counts = [len(texts) for texts in asked.values()]
    for image in images:
        path = Path(out) / Path(image).with_suffix(".npz")
        if path.exists():
            continue
        maps = ask(Path(root) / image, prompts)
        write(path, class_scores(maps, counts, background))
        written += 1
    return written
