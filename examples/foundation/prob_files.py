"""Write mask logits of prompts as score files for cpseg; needs only NumPy and Python 3.8 or newer.

For scripts in the environment of another project, which may be too old for cpseg.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

BACKGROUNDS = ("prompt", "complement", "none")


def read_ids(path: str | Path) -> list[str]:
    """The images of an id list with lines ``image`` or ``image mask``."""
    images = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), start=1):
        parts = line.split(" ")
        if not 1 <= len(parts) <= 2 or "" in parts:
            raise ValueError(f"{path}, line {number}: expected 'image' or 'image mask'")
        images.append(parts[0])
    return images


def read_classes(path: str | Path) -> dict[str, list[str]]:
    """Prompts of every class, from lines ``name`` or ``name: prompt, prompt``."""
    classes: dict[str, list[str]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), start=1):
        name, colon, rest = (part.strip() for part in line.partition(":"))
        prompts = [text.strip() for text in rest.split(",")] if colon else [name]
        if not name or not all(prompts) or name in classes:
            raise ValueError(f"{path}, line {number}: expected a new 'name' or 'name: prompts'")
        classes[name] = prompts
    return classes


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """The sigmoid in float64, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(logits, dtype=np.float64)))


def class_scores(maps: Sequence[np.ndarray], counts: Sequence[int], background: str) -> np.ndarray:
    """Class probabilities ``[K, H, W]``.

    Args:
        maps: one per prompt, class by class, in [0, 1], ``[H, W]``.
        counts: number of prompts of each class; their maps are averaged.
        background: ``"complement"`` adds 1 - max of the classes as class 0; otherwise nothing is
            added.
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


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Write a file completely or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write(path: str | Path, scores: np.ndarray) -> None:
    """Write probabilities as uint8 ``.npz``, completely or not at all."""
    with atomic(path) as file:
        np.savez_compressed(file, probs=np.rint(scores * 255).astype(np.uint8))


def identity(path: str | Path) -> str:
    """Name and SHA-256 of a file, which identify it in ``run.json``."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return f"{Path(path).name} {digest.hexdigest()}"


def begin(out: str | Path, made: Mapping[str, Any]) -> None:
    """Open a folder for a run, or continue the same run.

    Args:
        out: the folder; ``made`` is saved in its ``run.json``.
        made: everything on which the probabilities depend, in JSON's types.

    Raises:
        ValueError: the folder holds files of another run, or other files.
    """
    record = Path(out) / "run.json"
    text = json.dumps(made, indent=2)
    if record.exists():
        wanted, found = json.loads(text), _read_record(record)
        others = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
        if others:
            what = ", ".join(others)
            raise ValueError(
                f"{out}: expected a new folder or a run with the same {what}, got another {what}; "
                "choose another --out, or delete this one"
            )
        return
    names = [entry.name for entry in Path(out).iterdir()] if Path(out).is_dir() else []
    strangers = [name for name in names if not name.endswith(".part")]
    if strangers:
        raise ValueError(
            f"{out}: expected a new or empty folder, or one with a run.json, got one with "
            f"'{min(strangers)}' in it; choose another --out"
        )
    with atomic(record) as file:
        file.write(f"{text}\n".encode())


def _read_record(path: Path) -> dict[str, Any]:
    """The content of a ``run.json``; empty if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def places(out: str | Path, images: Sequence[str]) -> dict[str, Path]:
    """The score file of every image.

    Raises:
        ValueError: two images would share a file, or an image lies outside the root.
    """
    owner: dict[Path, str] = {}
    for image in images:
        path = Path(image).with_suffix(".npz")
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"id list: expected image paths below the root, got {image}; "
                "pass the folder that holds all images as --root"
            )
        other = owner.setdefault(path, image)
        if other != image:
            raise ValueError(
                f"id list: expected image names that differ before the suffix, got {other} and "
                f"{image}; rename one: their scores would be the same file"
            )
    return {image: Path(out) / path for path, image in owner.items()}


def write_all(
    ask: Callable[[Path, list[str]], Sequence[np.ndarray]],
    *,
    root: str | Path,
    ids: str | Path,
    classes: str | Path,
    background: str,
    out: str | Path,
    made: Mapping[str, Any],
) -> int:
    """Write the score files of a list's images, unless they exist; returns the number written.

    Like ``cpseg predict``, it also writes ``classes.txt``, the names of the channels, and
    ``run.json``.

    Args:
        ask: a function from an image path and all prompts to one map in [0, 1] per prompt, at the
            size of the image.
        root: the folder to which the image paths are relative.
        ids: the list of images.
        classes: the file of classes.
        background: one of ``BACKGROUNDS``.
        out: the output folder, with the same layout as the images.
        made: everything else on which the probabilities depend, in JSON's types; a folder with
            other values is refused.

    Raises:
        ValueError: a list is invalid, images would share a file, or the folder holds another run.
    """
    files, asked, written = places(out, read_ids(ids)), read_classes(classes), 0
    names = [*asked]
    if background == "complement":
        if "background" in names:
            raise ValueError(
                f"{classes}: expected classes without 'background' for its complement, got one of "
                "that name; pass --background-from prompt, or drop it"
            )
        names = ["background", *names]
    channels = [[name, texts] for name, texts in asked.items()]
    where = str(Path(root).resolve())
    begin(out, {"classes": channels, "background": background, "root": where, **made})
    with atomic(Path(out) / "classes.txt") as file:
        file.write("".join(f"{name}\n" for name in names).encode())
    prompts = [text for texts in asked.values() for text in texts]
    counts = [len(texts) for texts in asked.values()]
    for image, path in files.items():
        if path.exists():
            continue
        maps = ask(Path(root) / image, prompts)
        write(path, class_scores(maps, counts, background))
        written += 1
    return written
