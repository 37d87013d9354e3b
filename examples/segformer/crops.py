"""Layouts of data sets on disk, their id lists, and crops for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cpseg import WeakAugmentation
from cpseg.files import ClassMap, Pair, Source, read_ids, write_text

VOID = 255
MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)  # of ImageNet
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)

# The label ids that Cityscapes evaluates.
_KEPT = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass(frozen=True)
class Layout:
    """The paths, classes and training settings of a data set.

    Attributes:
        classes: number of classes.
        background: the dominant class that selection suppresses, or None.
        locate: paths of the image and the mask of an id, with ``{}`` for the id.
        epochs: number of epochs of Stage I and of Stage II.
        crop: side of a training crop.
        void: the value of void pixels in its masks.
        mask_map: from the values in its masks to classes, if they differ.
    """

    classes: int
    background: int | None
    locate: tuple[str, str]
    epochs: tuple[int, int]
    crop: int = 513
    void: int = VOID
    mask_map: ClassMap | None = None


_ADE20K = ClassMap((None, *range(150)))
_CITYSCAPES = ClassMap(tuple(_KEPT.index(v) if v in _KEPT else None for v in range(34)))
LAYOUTS = {
    "voc": Layout(21, 0, ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"), (60, 20)),
    "voc-aug": Layout(21, 0, ("JPEGImages/{}.jpg", "SegmentationClassAug/{}.png"), (60, 20)),
    "ade20k": Layout(
        150, None, ("images/{}.jpg", "annotations/{}.png"), (30, 10), mask_map=_ADE20K
    ),
    "cityscapes": Layout(
        19,
        None,
        ("leftImg8bit/{}_leftImg8bit.png", "gtFine/{}_gtFine_labelIds.png"),
        (60, 20),
        crop=769,
        mask_map=_CITYSCAPES,
    ),
    "camvid": Layout(11, None, ("images/{}.png", "masks/{}.png"), (60, 20), crop=160),
}


class Lists(NamedTuple):
    """Id lists with an image and its mask per line."""

    labelled: Path
    unlabelled: Path
    val: Path


def write_lists(layout: Layout, given: Lists, out: Path) -> Lists:
    """Write the id lists as ``image mask`` lines to ``out``.

    A given line is ``image mask``, or an id from which the layout makes both paths. Masks of
    unlabelled images, where they exist, are used only to measure pseudo-labels.
    """
    written = []
    for part, path in zip(Lists._fields, given, strict=True):
        lines = []
        for image, mask in read_ids(path, columns=1):
            if mask is None and not Path(image).suffix:
                image, mask = (pattern.format(image) for pattern in layout.locate)
            if mask is None and part != "unlabelled":
                raise ValueError(
                    f"{path}: expected a mask for every image, got {image}; "
                    "write 'image mask', or ids of the data set"
                )
            lines.append(image if mask is None else f"{image} {mask}")
        written.append(out / f"{part}.txt")
        write_text(written[-1], "".join(f"{line}\n" for line in lines))
    return Lists(*written)


class Sample(NamedTuple):
    """An image to read, whether its label is a pseudo-label, and the seed of its crop."""

    pair: Pair
    pseudo: bool
    seed: int


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Weakly augmented crops in a given order.

    Items are ``(pixels [3, S, S], labels uint8 [S, S])``. Without a mask the labels are 0 inside
    the image; beyond it they are void.

    Args:
        source: paths of images and masks, and the meaning of values in masks.
        num_classes: number of classes.
        augment: makes a crop of an image.
        order: the images to read, batch after batch.
    """

    def __init__(
        self,
        source: Source,
        num_classes: int,
        *,
        augment: WeakAugmentation,
        order: list[Sample],
    ) -> None:
        self.source, self.num_classes = source, num_classes
        self.augment, self.order = augment, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair, pseudo, seed = self.order[index]
        pixels = read_pixels(self.source.root / pair.image)
        labels = read_labels(self.source, pair, self.num_classes, pixels, pseudo=pseudo)
        generator = torch.Generator().manual_seed(seed)
        return self.augment(pixels, labels, generator=generator)[:2]


def read_pixels(path: Path) -> Tensor:
    """Normalised RGB ``[3, H, W]``; EXIF rotation is not applied."""
    try:
        with Image.open(path) as image:
            values = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path}: expected an image, got an unreadable file; remove the line or write it anew"
        ) from error
    return (torch.from_numpy(values).permute(2, 0, 1).float() / 255 - MEAN) / STD


def read_labels(
    source: Source, pair: Pair, num_classes: int, pixels: Tensor, *, pseudo: bool = False
) -> Tensor:
    """Labels ``[H, W]`` at the size of ``pixels``; no mask map is applied to pseudo-labels."""
    size = (pixels.shape[-2], pixels.shape[-1])
    if pair.mask is None:
        return torch.zeros(size, dtype=torch.uint8)  # only pixels beyond the image are void
    plain = Source(source.root, source.probs) if pseudo else source
    return plain.labels(pair, num_classes, size)


def pixels_of_classes(source: Source, labelled: list[Pair], classes: int) -> Tensor:
    """The number of labelled pixels of each class, ``[K]``."""
    counts = torch.zeros(256, dtype=torch.int64)
    for pair in labelled:
        labels = read_labels(source, pair, classes, read_pixels(source.root / pair.image))
        counts += torch.bincount(labels.flatten().long(), minlength=256)
    return counts[:classes]
