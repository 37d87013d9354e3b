"""Images with their pseudo-labels and certainty for a training loop, under one geometry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset

from cpseg._internal.checks import check_integer, message, shape
from cpseg.calibration.calibration import Calibration
from cpseg.core.selection import Evidence
from cpseg.training.uncertainty import certainty

Item = TypeVar("Item", covariant=True)
Row = tuple[Tensor, Tensor, Tensor]


class Rows(Protocol[Item]):
    """What a map-style data set or a list is."""

    def __getitem__(self, index: int, /) -> Item:
        """The item at ``index``."""

    def __len__(self) -> int:
        """How many there are."""


@dataclass(frozen=True)
class WeakAugmentation:
    """Random resize, flip and crop of an image and the maps that belong to it.

    The image is resized bilinearly, labels and certainty by nearest sampling; beyond the image its
    values are 0, labels ``ignore_index`` and certainty 0.

    Attributes:
        crop: side of the crop.
        scale: least and largest factor of the resize, drawn uniformly.
        flip: probability of a horizontal flip.
        ignore_index: the label of pixels beyond the image.

    Raises:
        ValueError: a side below 1, factors that are not positive or out of order, a ``flip`` that
            is no probability.

    Example:
        >>> augment = WeakAugmentation(4, scale=(1.0, 1.0), flip=0.0)
        >>> image, labels, certainty = augment(
        ...     torch.ones(3, 2, 4), torch.ones(2, 4, dtype=torch.uint8), torch.full((2, 4), 0.5))
        >>> labels
        tensor([[  1,   1,   1,   1],
                [  1,   1,   1,   1],
                [255, 255, 255, 255],
                [255, 255, 255, 255]], dtype=torch.uint8)
        >>> image.shape, certainty.sum()
        (torch.Size([3, 4, 4]), tensor(4.))
    """

    crop: int
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    ignore_index: int = 255

    def __post_init__(self) -> None:
        where = "WeakAugmentation"
        if self.crop < 1:
            raise ValueError(message(where, "crop of at least 1", str(self.crop), "pass 513"))
        if not 0 < self.scale[0] <= self.scale[1]:
            fix = "pass (0.5, 2.0)"
            raise ValueError(message(where, "factors from least to largest", str(self.scale), fix))
        if not 0 <= self.flip <= 1:
            raise ValueError(message(where, "flip in [0, 1]", str(self.flip), "pass 0.5"))

    def __call__(
        self,
        image: Tensor,
        labels: Tensor,
        certainty: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Row:
        """Draw a geometry and apply it to all three.

        Args:
            image: float ``[C, H, W]``.
            labels: integer ``[H, W]``, at most 2**24.
            certainty: float ``[H, W]``; None is 1 for all pixels.
            generator: draws on the CPU; None is PyTorch's own, which data loaders seed.

        Returns:
            The image ``[C, S, S]``, labels ``[S, S]`` and certainty ``[S, S]``, S the crop.

        Raises:
            ValueError: maps of another size than the image.
            TypeError: labels that are not integer.
        """
        where = "WeakAugmentation"
        check_integer(where, labels)
        maps = [labels] if certainty is None else [labels, certainty]
        for each in maps:
            if image.ndim != 3 or each.shape != image.shape[1:]:
                got, fix = f"image {shape(image)}, map {shape(each)}", "make labels at its size"
                raise ValueError(message(where, "maps [H, W] of an image [C, H, W]", got, fix))
        draw = torch.rand(4, generator=generator).tolist()
        least, largest = self.scale
        factor = least + draw[0] * (largest - least)
        size = [max(1, round(side * factor)) for side in labels.shape]
        weight = torch.ones_like(labels, dtype=torch.float32) if certainty is None else certainty
        image = interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
        named = interpolate(labels[None, None].float(), size=size, mode="nearest-exact")[0]
        weight = interpolate(weight[None, None].float(), size=size, mode="nearest-exact")[0]
        top = draw[2] * max(1, size[0] - self.crop + 1)
        left = draw[3] * max(1, size[1] - self.crop + 1)

        def place(maps: Tensor, fill: float) -> Tensor:
            turned = maps.flip(-1) if draw[1] < self.flip else maps
            below = (max(0, self.crop - size[1]), max(0, self.crop - size[0]))
            padded = pad(turned, (0, below[0], 0, below[1]), value=fill)
            return padded[:, int(top) :, int(left) :][:, : self.crop, : self.crop]

        named = place(named, self.ignore_index)[0].to(labels.dtype)
        return place(image, 0), named, place(weight, 0)[0]


class PseudoLabelled(Dataset[Row]):
    """Unlabelled images with pseudo-labels and certainty, made when they are asked for.

    Labels are made at the full size of the image and go through its geometry afterwards. Scores
    are dropped at once: with :class:`Evidence` on disk, or a model that is asked in the loop,
    nothing of K channels is kept.

    Args:
        images: a data set or list of float images ``[C, H, W]``.
        scores: the class scores ``[K, H, W]`` or the :class:`Evidence` of the image at an index.
        calibration: what selects the labels.
        transform: from image, labels int64 ``[H, W]`` and certainty ``[H, W]`` to the same three,
            all by one geometry: a :class:`WeakAugmentation`, or your own.

    Raises:
        ValueError: scores of another size than their image, or what
            :meth:`Calibration.pseudo_labels` raises.

    Example:
        >>> images = [torch.zeros(3, 1, 2)]
        >>> scores = [torch.tensor([[[0.9, 0.4]], [[0.1, 0.6]]])]
        >>> calibration = Calibration(torch.tensor([[0.3]]), torch.tensor([[99]]),
        ...                           alpha=0.1, num_images=99, num_classes=2)
        >>> image, labels, certainty = PseudoLabelled(images, scores.__getitem__, calibration)[0]
        >>> labels, certainty
        (tensor([[  0, 255]]), tensor([[0.6667, 0.0000]]))
    """

    def __init__(
        self,
        images: Rows[Tensor],
        scores: Callable[[int], Tensor | Evidence],
        calibration: Calibration,
        *,
        transform: Callable[[Tensor, Tensor, Tensor], Row] | None = None,
    ) -> None:
        self.images, self.scores, self.calibration = images, scores, calibration
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    @torch.no_grad()
    def __getitem__(self, index: int) -> Row:
        """The image at ``index``, its labels int64 and their certainty, see :func:`certainty`."""
        image, found = self.images[index], self.scores(index)
        labels = self.calibration.pseudo_labels(found)
        if image.ndim != 3 or labels.shape != image.shape[1:]:
            expected = f"scores of image {index}'s size"
            got, fix = f"image {shape(image)}, labels {shape(labels)}", "make them at its size"
            raise ValueError(message("PseudoLabelled", expected, got, fix))
        weight = certainty(found, self.calibration)
        if self.transform is None:
            return image, labels, weight
        return self.transform(image, labels, weight)
