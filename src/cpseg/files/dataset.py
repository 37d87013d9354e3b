"""A data set on disk with a model's scores, and what a run over it shares among its ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpseg._internal.checks import message, name_file_in_errors
from cpseg._internal.hashing import digest
from cpseg.core.class_map import ClassMap
from cpseg.core.selection import Evidence
from cpseg.files.id_lists import Pair
from cpseg.files.masks import read_mask
from cpseg.files.score_files import find_scores, read_scores

VOID = 255  # what training code expects in files
Progress = Callable[[Iterable[Pair], int, str], Iterable[Pair]]


def quiet(items: Iterable[Pair], count: int, title: str) -> Iterable[Pair]:
    """No progress bar."""
    return items


@dataclass(frozen=True)
class Source:
    """A data set on disk with a model's scores.

    Attributes:
        root: the folder that id lists are relative to.
        probs: the folder of score files.
        class_map: from the model's classes to the data set's, or None if they are the same.
        mask_map: from the values in masks to the data set's classes, if they are not the same.
        void: the value of void pixels in masks; the job works with 255.
        device: where tensors are worked on.
    """

    root: Path
    probs: Path
    class_map: ClassMap | None = None
    mask_map: ClassMap | None = None
    void: int = VOID
    device: str = "cpu"

    def facts(self) -> dict[str, Any]:
        """What a calibration records of the data set."""
        found: dict[str, Any] = {}
        if self.class_map is not None:
            found["class_map"] = self.class_map.to_json()
        if self.mask_map is not None or self.void != VOID:
            masks = None if self.mask_map is None else self.mask_map.to_json()
            found["masks"] = {"void": self.void, "map": masks}
        return found

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
        found = read_scores(path, device=self.device)
        if isinstance(found, Evidence):
            if found.class_map != fingerprint(self.class_map):
                expected = f"evidence made with {'this' if self.class_map else 'no'} class map"
                got = f"evidence made with {'another' if found.class_map else 'no'} class map"
                fix = "run cpseg compact with the calibration's"
                raise ValueError(message(str(path), expected, got, fix))
            return found
        if self.class_map is None:
            return found
        with name_file_in_errors(path):
            return self.class_map(found)

    def probabilities(self, path: Path) -> Tensor:
        """Class scores ``[K, H, W]``: evidence will not do."""
        found = self.scores(path)
        if isinstance(found, Evidence):
            fix = "pass the folder of class scores"
            raise ValueError(message(str(path), "class scores [K, H, W]", "evidence", fix))
        return found

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


def read_example(
    source: Source, pair: Pair, path: Path, num_classes: int, num_source: int | None = None
) -> tuple[Tensor, Tensor]:
    """Class scores and true labels of an image, as many classes as the others have.

    ``num_source`` is the number of the model's classes, where it is another.
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
