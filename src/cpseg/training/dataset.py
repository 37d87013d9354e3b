"""Images with their pseudo-labels and certainty for a training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset

from cpseg._internal.checks import (
    check_count,
    check_float,
    check_generator,
    check_ignore_index,
    check_integer,
    check_not_empty,
    check_same_device,
    check_share,
    is_number,
    message,
    shape,
    short,
)
from cpseg.calibration.calibration import Calibration
from cpseg.core.selection import Evidence
from cpseg.training.uncertainty import certainty

Item = TypeVar("Item", covariant=True)
Row = tuple[Tensor, Tensor, Tensor]


class Rows(Protocol[Item]):
    """A map-style data set or a list."""

    def __getitem__(self, index: int, /) -> Item:
        """The item at ``index``."""

    def __len__(self) -> int:
        """The number of items."""


@dataclass(frozen=True)
class WeakAugmentation:
    """Random resize, flip and crop, applied alike to an image, its labels and its certainty.

    The image is resized bilinearly, labels and certainty by nearest sampling. Where the crop
    reaches beyond the image, pixel values and certainty are 0 and labels are ``ignore_index``.

    Attributes:
        crop: side of the crop.
        scale: smallest and largest factor of the resize; the factor is drawn uniformly.
        flip: probability of a horizontal flip.
        ignore_index: the label of pixels beyond the image.

    Raises:
        ValueError: ``crop`` is below 1, the factors are not positive or not in order, or ``flip``
            is not a probability.

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
        check_count(where, self.crop, name="crop", fix="pass 513", most=2**20)
        factors = tuple(self.scale) if isinstance(self.scale, (tuple, list)) else ()
        numbers = len(factors) == 2 and all(is_number(factor) for factor in factors)
        if not numbers or not 0 < factors[0] <= factors[1]:
            expected, fix = "positive scale factors, smallest first", "pass (0.5, 2.0)"
            raise ValueError(message(where, expected, short(self.scale), fix))
        check_share(where, self.flip, name="flip", fix="pass 0.5")
        check_ignore_index(where, self.ignore_index)

    def __call__(
        self,
        image: Tensor,
        labels: Tensor,
        certainty: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Row:
        """Draw factor, flip and crop, and apply them to image, labels and certainty.

        Args:
            image: float ``[C, H, W]``.
            labels: integer ``[H, W]``, at most 2**24.
            certainty: float ``[H, W]``; None is 1 for all pixels.
            generator: draws on the CPU; None is PyTorch's default generator, which data loaders
                seed.

        Returns:
            The image ``[C, S, S]``, labels ``[S, S]`` and certainty ``[S, S]``, where S is
            ``crop``.

        Raises:
            ValueError: the size or device of a map differs from that of the image, or the dtype of
                the labels does not hold ``ignore_index``.
            TypeError: wrong dtypes.
        """
        where = "WeakAugmentation"
        check_float(where, image, name="image", fix="scale it to float32")
        check_integer(where, labels)
        if certainty is not None:
            check_float(where, certainty, name="certainty")
        check_not_empty(where, image, name="image")
        maps = [labels] if certainty is None else [labels, certainty]
        for each in maps:
            if image.ndim != 3 or each.shape != image.shape[1:]:
                got = f"image {shape(image)}, map {shape(each)}"
                fix = "make labels and certainty at the size of the image"
                raise ValueError(message(where, "maps [H, W] of an image [C, H, W]", got, fix))
            check_same_device(where, each, image, name="labels and certainty", reference="image")
        limits = torch.iinfo(labels.dtype)
        if not max(limits.min, -(2**24)) <= self.ignore_index <= min(limits.max, 2**24):
            expected = f"labels of a dtype that holds ignore_index {self.ignore_index}"
            raise ValueError(message(where, expected, str(labels.dtype), "pass int64 labels"))
        check_generator(where, generator, torch.device("cpu"))
        draw_scale, draw_flip, draw_top, draw_left = torch.rand(4, generator=generator).tolist()
        smallest, largest = self.scale
        factor = smallest + draw_scale * (largest - smallest)
        size = [max(1, round(side * factor)) for side in labels.shape]
        weight = torch.ones_like(labels, dtype=torch.float32) if certainty is None else certainty
        kind = image.dtype  # on a CPU there is no antialiasing in half precision
        values = image if kind == torch.float64 else image.to(torch.float32)
        values = interpolate(values[None], size=size, mode="bilinear", antialias=True)
        image = values[0].to(kind)
        classes = interpolate(labels[None, None].float(), size=size, mode="nearest-exact")[0]
        weight = interpolate(weight[None, None].float(), size=size, mode="nearest-exact")[0]
        top = int(draw_top * max(1, size[0] - self.crop + 1))
        left = int(draw_left * max(1, size[1] - self.crop + 1))

        def flip_and_crop(maps: Tensor, fill: float) -> Tensor:
            flipped = maps.flip(-1) if draw_flip < self.flip else maps
            right, below = (max(0, self.crop - side) for side in (size[1], size[0]))
            padded = pad(flipped, (0, right, 0, below), value=fill)
            return padded[:, top : top + self.crop, left : left + self.crop]

        classes = flip_and_crop(classes, self.ignore_index)[0].to(labels.dtype)
        return flip_and_crop(image, 0), classes, flip_and_crop(weight, 0)[0]


class PseudoLabelled(Dataset[Row]):
    """Unlabelled images with pseudo-labels and certainty, which are made on access.

    Labels are made at the full size of the image and transformed together with it. Probabilities
    are not kept: with :class:`Evidence` on disk, or a model that is called in the loop, no map of
    K channels stays in memory.

    Args:
        images: a data set or list of float images ``[C, H, W]``.
        scores: a function from an index to the class probabilities ``[K, H, W]`` or the
            :class:`Evidence` of that image.
        calibration: selects the labels.
        transform: from image, labels int64 ``[H, W]`` and certainty ``[H, W]`` to the same three,
            transformed alike: a :class:`WeakAugmentation`, or your own function.

    Raises:
        ValueError: probabilities of another size than their image, or what
            :meth:`Calibration.pseudo_labels` raises.
        TypeError: ``calibration`` is none, or images that are not floating point.

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
        if not isinstance(calibration, Calibration):
            got, fix = type(calibration).__name__, "pass the result of Calibrator.compute"
            raise TypeError(message("PseudoLabelled", "a Calibration", got, fix))
        self.images, self.scores, self.calibration = images, scores, calibration
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    @torch.no_grad()
    def __getitem__(self, index: int) -> Row:
        """The image at ``index``, its labels int64 and their certainty, see :func:`certainty`."""
        image, probs = self.images[index], self.scores(index)
        labels = self.calibration.pseudo_labels(probs)
        check_float("PseudoLabelled", image, name=f"image {index}")
        if image.ndim != 3 or labels.shape != image.shape[1:]:
            expected = f"probabilities at the size of image {index}"
            got = f"image {shape(image)}, labels {shape(labels)}"
            fix = "resize the probabilities to the image"
            raise ValueError(message("PseudoLabelled", expected, got, fix))
        weight = certainty(probs, self.calibration)
        if self.transform is None:
            return image, labels, weight
        return self.transform(image, labels, weight)
