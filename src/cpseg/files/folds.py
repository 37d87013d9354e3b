"""Folds for cross-fitting: which images a student is trained on, and which ones it scores.

A model's scores on the images that it was trained on say nothing of new images. With folds every
labelled image is scored by a student that did not see it. The folds depend on the names and the
seed alone, so that a training script and the command deal the same ones from any order of the list.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from cpseg._internal.checks import is_whole, message, short
from cpseg._internal.safe_files import damaged, write_text
from cpseg.files.id_lists import Pair, check_ids, read_ids, write_ids
from cpseg.files.splits import check_folds

Image = TypeVar("Image", bound="str | os.PathLike[str] | tuple[str, str | None]")

_FILE = "folds.json"
_FORMAT = 1
_AGAIN = "deal anew with cpseg folds into another folder, and train on its lists"


@dataclass(frozen=True, repr=False)
class Folds(Generic[Image]):
    """Images dealt into folds; see :func:`cross_fit`.

    Attributes:
        images: as they were given.
        fold: the fold number of every image, 0 to ``count - 1``.
        seed: of the deal.
    """

    images: tuple[Image, ...]
    fold: tuple[int, ...]
    seed: int

    @property
    def count(self) -> int:
        """Number of folds."""
        return max(self.fold) + 1

    def train(self, k: int) -> list[Image]:
        """The images to train the student of fold ``k`` on: all but its own, in the given order.

        Raises:
            ValueError: there is no such fold.
        """
        self._check("Folds.train", k)
        return [image for image, own in zip(self.images, self.fold, strict=True) if own != k]

    def held(self, k: int) -> list[Image]:
        """The images of fold ``k``, which its student scores, in the given order.

        Raises:
            ValueError: there is no such fold.
        """
        self._check("Folds.held", k)
        return [image for image, own in zip(self.images, self.fold, strict=True) if own == k]

    def _check(self, where: str, k: object) -> None:
        if not is_whole(k, 0) or int(k) >= self.count:  # type: ignore[call-overload]
            expected = f"a fold in 0..{self.count - 1}"
            raise ValueError(message(where, expected, short(k), "pass one of them"))

    def __repr__(self) -> str:
        return f"Folds({len(self.images)} images in {self.count} folds, seed {self.seed})"


def cross_fit(images: Iterable[Image], folds: int = 4, seed: int = 0) -> Folds[Image]:
    """Deal labelled images into folds by their names: the same folds for any order of the list.

    Images are sorted by a hash of seed and name and dealt out one after the other, so sizes differ
    by at most one. Train a student per fold on ``train(k)``, let it score ``held(k)``, and train
    one on all images for the scores of all others; :func:`cpseg.jobs.join_folds` or ``cpseg folds
    --join`` puts the score files together. Frames of one video are alike: a student that saw one
    has nearly seen the next, so deal one image of each video.

    Args:
        images: names as in the id list (strings or paths), or lines of it (``cpseg.files.Pair``).
        folds: how many, 2 to the number of images.
        seed: another one gives other folds.

    Returns:
        The folds; its lists hold the images as they were given, in the given order.

    Raises:
        ValueError: a single image, more folds than images, an image twice, or a bad seed.
        TypeError: images that have no names.

    Guarantee:
        None in finite samples for thresholds on these same images: their scores come from other
        models than those of new images. Calibrate on images that no student saw to keep promises.

    Example:
        >>> folds = cross_fit(["a.png", "b.png", "c.png", "d.png", "e.png"], folds=2)
        >>> folds.fold
        (1, 1, 0, 0, 0)
        >>> folds.train(0), folds.held(0)
        (['a.png', 'b.png'], ['c.png', 'd.png', 'e.png'])
    """
    where = "cross_fit"
    if isinstance(images, (str, bytes)) or not isinstance(images, Iterable):
        got, fix = short(images), "pass their names, or the lines of read_ids"
        raise TypeError(message(where, "a list of images", got, fix))
    given = tuple(images)
    names = [_name(where, image) for image in given]
    if not is_whole(seed, 0):
        raise ValueError(message(where, "a seed >= 0", short(seed), "pass a whole number"))
    if not is_whole(folds, 0):
        raise ValueError(message(where, "a number of folds", short(folds), "pass a whole number"))
    check_folds(where, len(given), folds, option="number of folds")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(message(where, "every image once", f"{name} twice", "list it once"))
        seen.add(name)

    def hashed(place: int) -> bytes:
        text = f"cross_fit\0{seed}\0{names[place]}"
        return hashlib.sha256(text.encode(errors="surrogatepass")).digest()

    fold = [0] * len(given)
    for number, place in enumerate(sorted(range(len(given)), key=hashed)):
        fold[place] = number % folds
    return Folds(given, tuple(fold), seed)


def _name(where: str, image: object) -> str:
    """The image's name as in an id list: ``./a.png`` is ``a.png``."""
    if isinstance(image, tuple) and image:
        image = image[0]
    if isinstance(image, Path):
        image = image.as_posix()
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    if not isinstance(image, str) or not image:
        got, fix = short(image), "pass names as in the id list"
        raise TypeError(message(where, "the name of every image", got, fix))
    return posixpath.normpath(image)


def fold_lists(folder: str | Path, k: int) -> tuple[Path, Path]:
    """The id lists of a fold: to train its student on, and to score with it."""
    inside = Path(folder) / f"fold_{k}"
    return inside / "train.txt", inside / "score.txt"


def write_folds(out: str | Path, folds: Folds[Pair]) -> None:
    """Write the lists of every fold, and ``folds.json``, which says what was dealt.

    Raises:
        ValueError: the folder holds other folds or other files, or a path has white space.
        OSError: a file that cannot be written.
    """
    out = Path(out)
    lines = [(pair.image, str(pair.mask)) for pair in folds.images]
    check_ids(out, lines)
    content = {
        "format": _FORMAT,
        "seed": folds.seed,
        "folds": folds.count,
        "images": {pair.image: k for pair, k in zip(folds.images, folds.fold, strict=True)},
    }
    if (out / _FILE).exists():
        if _read_json(out / _FILE) != content:
            expected, got = "a new folder, or one with the same folds", "one with other folds"
            raise ValueError(message(str(out), expected, got, "choose another with -o"))
    elif out.is_dir() and (names := sorted(path.name for path in out.iterdir())):
        expected, got = "a new or empty folder", f"one with '{names[0]}' in it"
        raise ValueError(message(str(out), expected, got, "choose another with -o"))
    write_text(out / _FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    for k in range(folds.count):
        train, score = fold_lists(out, k)
        write_ids(train, [(pair.image, str(pair.mask)) for pair in folds.train(k)])
        write_ids(score, [(pair.image, str(pair.mask)) for pair in folds.held(k)])


def read_folds(folder: str | Path) -> Folds[Pair]:
    """The folds that :func:`write_folds` wrote.

    Raises:
        ValueError: ``folds.json`` is damaged, or a list has other images than it records.
        FileNotFoundError: a file is missing.
    """
    path = Path(folder) / _FILE
    content = _read_json(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        got = f"format {content.get('format')!r}" if isinstance(content, dict) else "something else"
        raise ValueError(message(str(path), f"folds of format {_FORMAT}", got, _AGAIN))
    images, count, seed = (content.get(name) for name in ("images", "folds", "seed"))
    valid = (
        isinstance(images, dict)
        and all(is_whole(k, 0) for k in images.values())
        and is_whole(seed, 0)
        and is_whole(count, 2)
        and {*images.values()} == {*range(min(count or 0, len(images) + 1))}
    )
    if not valid:
        raise ValueError(message(str(path), "a fold for every image", "something else", _AGAIN))
    assert isinstance(images, dict)
    fold_of: dict[str, int] = images
    masks: dict[str, str | None] = {}
    for k in range(max(fold_of.values()) + 1):
        train, score = fold_lists(folder, k)
        held = read_ids(score)
        check_same_images(score, held, [image for image, own in fold_of.items() if own == k])
        training = [image for image, own in fold_of.items() if own != k]
        check_same_images(train, read_ids(train), training)
        masks.update(held)
    pairs = tuple(Pair(image, masks[image]) for image in fold_of)
    return Folds(pairs, tuple(fold_of.values()), int(content["seed"]))


def check_same_images(path: str | Path, pairs: Sequence[Pair], recorded: Sequence[str]) -> None:
    """An id list has just the images that ``folds.json`` records, in any order.

    Raises:
        ValueError: it has more, fewer or other images.
    """
    listed, wanted = {pair.image for pair in pairs}, set(recorded)
    if listed != wanted:
        stranger = min(listed - wanted, default=None)
        differs = f"no {min(wanted - listed)}" if stranger is None else f"{stranger} too"
        expected = f"the {len(wanted)} images that {_FILE} records"
        raise ValueError(message(str(path), expected, f"{len(listed)} with {differs}", _AGAIN))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, "folds in JSON", error) from error
