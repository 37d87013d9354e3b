"""Data sets by the folders they unpack to, their id lists, and crops to train on."""

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

_KEPT = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # by Cityscapes


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk, and how it is trained on.

    Attributes:
        classes: number of classes.
        background: the dominant class that selection suppresses, or None.
        locate: paths of the image and the mask of an id, with ``{}`` for the id.
        epochs: of stage I and of stage II.
        crop: side of a training crop.
        void: the value of void pixels in its masks.
        mask_map: from the values in its masks to classes, where they differ.
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
    """Id lists with an image and its mask a line."""

    labelled: Path
    unlabelled: Path
    val: Path


def write_lists(layout: Layout, given: Lists, out: Path) -> Lists:
    """The id lists as ``image mask`` lines in ``out``, in whatever way they were given.

    A line is ``image mask``, or an id that stands for both by the layout. The masks of unlabelled
    images, where there are files, are for measuring.
    """
    made = []
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
        made.append(out / f"{part}.txt")
        write_text(made[-1], "".join(f"{line}\n" for line in lines))
    return Lists(*made)


class Sample(NamedTuple):
    """Which image to read, whether its label is a pseudo-label, and the seed of its crop."""

    pair: Pair
    pseudo: bool
    seed: int


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Weakly augmented crops, in an order that was decided before.

    Rows are ``(pixels [3, S, S], labels uint8 [S, S])``; without a mask the labels are 0, and void
    beyond the image alone.

    Args:
        source: where images and masks lie, and what the values in masks mean.
        num_classes: number of classes.
        augment: what makes a crop of an image.
        order: what to read, batch after batch.
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
    """Labels ``[H, W]`` at the size of ``pixels``; pseudo-labels hold classes as they are."""
    size = (pixels.shape[-2], pixels.shape[-1])
    if pair.mask is None:
        return torch.zeros(size, dtype=torch.uint8)  # not void, as what lies beyond the image is
    plain = Source(source.root, source.probs) if pseudo else source
    return plain.labels(pair, num_classes, size)
