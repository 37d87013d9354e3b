"""A data set on disk: images, masks and the scores of a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpseg._internal.checks import message, name_file_in_errors
from cpseg._internal.distributed import shard
from cpseg._internal.hashing import digest
from cpseg.core.class_map import ClassMap, parse_class_map
from cpseg.core.selection import Evidence
from cpseg.files.id_lists import Pair
from cpseg.files.masks import VOID, read_mask
from cpseg.files.score_files import find_scores, no_probabilities, read_scores, read_shape

Progress = Callable[[Iterable[Pair], int, str], Iterable[Pair]]


def quiet(items: Iterable[Pair], count: int, title: str) -> Iterable[Pair]:
    """No progress bar."""
    return items


def announce(progress: Progress, images: int) -> None:
    """Tell a progress with a method ``expect`` how many images all passes of a job read."""
    expect = getattr(progress, "expect", None)
    if expect is not None:
        expect(images)


@dataclass(frozen=True)
class Source:
    """A data set on disk with a model's scores.

    Attributes:
        root: the folder that id lists are relative to.
        probs: the folder of score files.
        class_map: from the model's classes to the data set's, or None where they are the same.
        mask_map: from the values in masks to the data set's classes, where they differ.
        void: the value of void pixels in masks; labels have 255 there.
        device: the device of the tensors.
    """

    root: Path
    probs: Path
    class_map: ClassMap | None = None
    mask_map: ClassMap | None = None
    void: int = VOID
    device: str = "cpu"

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of score files, one per model whose scores are used."""
        return (self.probs,)

    def with_recorded_class_map(self, recorded: Any) -> Source:
        """The source with the class map that a calibration was made with, as JSON or None.

        Raises:
            ValueError: the source has another one.
        """
        if recorded is None:
            return self
        class_map = parse_class_map(recorded)
        if self.class_map is not None and self.class_map != class_map:
            fix = "leave --class-map out: the calibration carries it"
            raise ValueError(message("class map", "that of the calibration", "another one", fix))
        return replace(self, class_map=class_map)

    def facts(self) -> dict[str, Any]:
        """What the provenance of a calibration records of the data set, as JSON."""
        facts: dict[str, Any] = {}
        if self.class_map is not None:
            facts["class_map"] = self.class_map.to_json()
        if self.mask_map is not None or self.void != VOID:
            masks = None if self.mask_map is None else self.mask_map.to_json()
            facts["masks"] = {"void": self.void, "map": masks}
        return facts

    def locate(self, pairs: Sequence[Pair]) -> dict[Pair, Path]:
        """The score file of every image, before any work is done.

        Raises:
            FileNotFoundError: an image has none.
            ValueError: two images would share one.
        """
        paths: dict[Pair, Path] = {}
        owner: dict[Path, str] = {}
        for pair in pairs:
            path = find_scores(self.probs, pair.image)
            if path in owner:
                got = f"{owner[path]} and {pair.image}"
                fix = "lay the folder out like the images, with their subfolders"
                raise ValueError(message(str(path), "scores of one image", got, fix))
            owner[path] = pair.image
            paths[pair] = path
        return paths

    def scores(self, path: Path) -> Tensor | Evidence:
        """The scores in a file, in the classes of the data set."""
        scores = read_scores(path, device=self.device)
        if isinstance(scores, Evidence):
            if scores.class_map != fingerprint(self.class_map):
                expected = f"evidence made with {'this' if self.class_map else 'no'} class map"
                got = f"evidence made with {'another' if scores.class_map else 'no'} class map"
                fix = "run cpseg compact with the calibration's"
                raise ValueError(message(str(path), expected, got, fix))
            return scores
        if self.class_map is None:
            return scores
        with name_file_in_errors(path):
            return self.class_map(scores)

    def probabilities(self, path: Path) -> Tensor:
        """The probabilities ``[K, H, W]`` in a file; evidence is refused."""
        scores = self.scores(path)
        if isinstance(scores, Evidence):
            raise no_probabilities(path)
        return scores

    def shape(self, path: Path) -> tuple[int, int, int]:
        """Classes, height and width of the probabilities in a file, from its header alone."""
        num_classes, height, width = read_shape(path)
        if self.class_map is not None:
            with name_file_in_errors(path):
                self.class_map.check_source(num_classes, str([num_classes, height, width]))
            num_classes = self.class_map.num_classes
        return num_classes, height, width

    def labels(self, pair: Pair, num_classes: int, size: tuple[int, int]) -> Tensor:
        """The true labels of an image, void as 255."""
        assert pair.mask is not None
        path = self.root / pair.mask
        values = num_classes if self.mask_map is None else len(self.mask_map.target)
        if values > 256:
            fix = "map the values of 8-bit masks"
            raise ValueError(message("mask map", "at most 256 values", str(values), fix))
        labels = read_mask(path, num_classes=values, ignore_index=self.void, size=size)
        classes = torch.arange(256, dtype=torch.uint8)
        classes[self.void] = VOID
        if self.mask_map is not None:
            if self.mask_map.num_classes != num_classes:
                expected, got = f"{num_classes} classes as in the scores", self.mask_map.num_classes
                raise ValueError(message("mask map", expected, str(got), "map to the same classes"))
            for value, target in enumerate(self.mask_map.target):
                classes[value] = VOID if target is None else target
        return classes[labels.to(torch.int64)].to(self.device)


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images with the score file of each: the one way to go through them.

    Attributes:
        source: the data set and the scores.
        pairs: the images and their masks.
        paths: the score file of every image.
        num_source: number of classes in the score files, after the source's class map.
        num_classes: number of classes in the masks; another number where a recalibration maps
            the model's classes onto those of the data set.
        size: height and width of the first image's scores.
        progress: wraps the loops over images.
    """

    source: Source
    pairs: list[Pair]
    paths: Mapping[Pair, Path]
    num_source: int
    num_classes: int
    size: tuple[int, int]
    progress: Progress = quiet

    @classmethod
    def open(
        cls, source: Source, pairs: Sequence[Pair], *, progress: Progress = quiet
    ) -> LabelledImages:
        """Locate every score file; the first one says how many classes there are.

        Raises:
            FileNotFoundError: an image has no score file.
            ValueError: two images share one, the first holds evidence, or one image is listed
                under two names, by a symbolic link: it would count twice.
        """
        pairs = list(pairs)
        check_distinct(source.root, pairs)
        paths = source.locate(pairs)
        num_classes, height, width = source.shape(paths[pairs[0]])
        return cls(source, pairs, paths, num_classes, num_classes, (height, width), progress)

    def read(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Probabilities ``[K, H, W]`` and true labels ``[H, W]`` of an image, void as 255.

        Raises:
            ValueError: another number of classes than the first image, or bad files.
        """
        return read_example(self.source, pair, self.paths[pair], self.num_classes, self.num_source)

    def feed(
        self,
        update: Callable[[Pair, Tensor, Tensor], object],
        pairs: Sequence[Pair],
        title: str,
        *,
        every_rank: bool = False,
    ) -> None:
        """Read images one after the other and hand each to ``update(pair, probs, labels)``.

        An error that ``update`` raises names the image's score file.

        Args:
            update: what takes the image.
            pairs: images among :attr:`pairs`.
            title: of the progress bar; no bar where there are no images.
            every_rank: every rank reads all of these images; by default each reads its shard.
        """
        mine, count = (pairs, len(pairs)) if every_rank else shard(pairs)
        for pair in self.progress(mine, count, title) if pairs else ():
            probs, labels = self.read(pair)
            with name_file_in_errors(self.paths[pair]):
                update(pair, probs, labels)


def check_distinct(root: Path, pairs: Sequence[Pair]) -> None:
    """Every listed image is another file.

    Raises:
        ValueError: one file has two names, by a symbolic link.
    """
    folders: dict[str, str] = {}  # what a folder really is; there are few
    owner: dict[str, str] = {}
    for pair in pairs:
        path = os.path.join(root, pair.image)
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        file = os.path.join(folders[folder], name)
        if os.path.islink(file):
            file = os.path.realpath(file)
        if file in owner:
            got = f"{owner[file]} and {pair.image}, which are one file"
            raise ValueError(message("id list", "every image once", got, "remove one of them"))
        owner[file] = pair.image


def read_example(
    source: Source, pair: Pair, path: Path, num_classes: int, num_source: int | None = None
) -> tuple[Tensor, Tensor]:
    """Probabilities and true labels of an image, as many classes as the other images have.

    Args:
        source: the data set and the scores.
        pair: the image and its mask.
        path: its score file.
        num_classes: number of classes in the masks.
        num_source: number of classes in the score files, where it is another.
    """
    probs = source.probabilities(path)
    num_source = num_classes if num_source is None else num_source
    if probs.shape[0] != num_source:
        expected, got = f"{num_source} classes like the first image", f"{probs.shape[0]}"
        raise ValueError(message(str(path), expected, got, "use the scores of one model"))
    return probs, source.labels(pair, num_classes, (probs.shape[1], probs.shape[2]))


def fingerprint(class_map: ClassMap | None) -> str | None:
    """Of a class map, by which evidence knows it."""
    return None if class_map is None else digest(class_map.to_json())
