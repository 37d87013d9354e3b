"""Images with their pseudo-labels and certainty for a training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar, overload

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset

from cpseg._internal.checks import (
    check_count,
    check_flag,
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
    K channels stays in memory. Labelled images may come first, with certainty 1. For data on disk
    see :meth:`from_folders`.

    Args:
        images: a data set or list of float images ``[C, H, W]``.
        scores: a function from an index to the class probabilities ``[K, H, W]`` or the
            :class:`Evidence` of that image.
        calibration: selects the labels.
        transform: from image, labels int64 ``[H, W]`` and certainty ``[H, W]`` to the same three,
            transformed alike: a :class:`WeakAugmentation`, or your own function.
        labelled: a data set or list of float images ``[C, H, W]`` with their labels, integer
            ``[H, W]``. These rows come first; their certainty is 1, and 0 where the label is the
            ``ignore_index`` of the calibration.
        mean: of every channel, subtracted after ``transform``; with ``std``.
        std: of every channel, by which is then divided.

    Raises:
        ValueError: probabilities or labels of another size than their image, one of ``mean`` and
            ``std`` alone, or what :meth:`Calibration.pseudo_labels` raises.
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
        labelled: Rows[tuple[Tensor, Tensor]] = (),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if not isinstance(calibration, Calibration):
            got, fix = type(calibration).__name__, "pass the result of Calibrator.compute"
            raise TypeError(message("PseudoLabelled", "a Calibration", got, fix))
        self.images, self.scores, self.calibration = images, scores, calibration
        self.transform, self.labelled = transform, labelled
        self._mean_and_std = _mean_and_std(mean, std)

    @overload
    @classmethod
    def from_folders(
        cls,
        root: str | Path,
        ids: str | Path | None,
        probs: str | Path | Sequence[str | Path],
        calibration: Calibration | str | Path,
        *,
        labelled: str | Path | None = ...,
        repeat_labelled: int = ...,
        masks: str | Path | None = ...,
        features: str | Path | None = ...,
        transform: Callable[[Tensor, Tensor, Tensor], Row] | None = ...,
        mean: Sequence[float] | None = ...,
        std: Sequence[float] | None = ...,
        as_dict: Literal[False] = ...,
    ) -> PseudoLabelled: ...

    @overload
    @classmethod
    def from_folders(
        cls,
        root: str | Path,
        ids: str | Path | None,
        probs: str | Path | Sequence[str | Path],
        calibration: Calibration | str | Path,
        *,
        labelled: str | Path | None = ...,
        repeat_labelled: int = ...,
        masks: str | Path | None = ...,
        features: str | Path | None = ...,
        transform: Callable[[Tensor, Tensor, Tensor], Row] | None = ...,
        mean: Sequence[float] | None = ...,
        std: Sequence[float] | None = ...,
        as_dict: Literal[True],
    ) -> Dataset[dict[str, Tensor]]: ...

    @classmethod
    def from_folders(
        cls,
        root: str | Path,
        ids: str | Path | None,
        probs: str | Path | Sequence[str | Path],
        calibration: Calibration | str | Path,
        *,
        labelled: str | Path | None = None,
        repeat_labelled: int = 1,
        masks: str | Path | None = None,
        features: str | Path | None = None,
        transform: Callable[[Tensor, Tensor, Tensor], Row] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        as_dict: bool = False,
    ) -> PseudoLabelled | Dataset[dict[str, Tensor]]:
        """The images of id lists with score files, as the command ``cpseg label`` takes them.

        Images are read as float32 RGB in [0, 1]. Score files are found and read as by the command:
        by the image's path or name, of any of its formats, as probabilities, logits or evidence,
        with the class map and the reading that the calibration recorded. An image in both lists
        is labelled. Rows have the size of their image: to batch them, crop in ``transform``.

        Args:
            root: the folder that id lists are relative to.
            ids: id list of the unlabelled images, or a folder of images; None takes the labelled
                images alone, as for validation.
            probs: the folder of score files, or one file with those of all images; of several
                models a list of them, in the order of the calibration.
            calibration: a calibration or its file.
            labelled: id list of labelled images, with masks as they were for the calibration.
            repeat_labelled: how often every labelled image occurs; 1 weighs it like a
                pseudo-labelled one.
            masks: a folder with the masks of ``labelled``, where that list names none.
            features: a folder of an encoder's features, if the calibration takes them.
            transform: see :class:`PseudoLabelled`.
            mean: see :class:`PseudoLabelled`; for images in [0, 1].
            std: see :class:`PseudoLabelled`.
            as_dict: whether rows are dictionaries as the Trainer of Hugging Face takes them:
                ``pixel_values``, ``labels`` and ``weights``, the certainty.

        Raises:
            ValueError: bad lists, files or settings, or scores of another size than their image.
            FileNotFoundError: an image has no score file, or a labelled one no mask.

        Example:
            >>> from tempfile import mkdtemp
            >>> import numpy as np
            >>> from PIL import Image
            >>> root = Path(mkdtemp())
            >>> Image.fromarray(np.full((1, 2, 3), 255, np.uint8)).save(root / "x.png")
            >>> np.save(root / "x.npy", np.array([[[0.9, 0.4]], [[0.1, 0.6]]], np.float32))
            >>> _ = (root / "ids.txt").write_text("x.png")
            >>> calibration = Calibration(torch.tensor([[0.3]]), torch.tensor([[99]]),
            ...                           alpha=0.1, num_images=99, num_classes=2)
            >>> rows = PseudoLabelled.from_folders(
            ...     root, root / "ids.txt", root, calibration, as_dict=True)
            >>> rows[0]["labels"], rows[0]["weights"]
            (tensor([[  0, 255]]), tensor([[0.6667, 0.0000]]))
        """
        from cpseg.training.folders import open_folders

        check_flag("PseudoLabelled.from_folders", as_dict, name="as_dict")
        if isinstance(calibration, (str, Path)):
            calibration = Calibration.load(calibration)
        found = open_folders(
            root,
            ids,
            [probs] if isinstance(probs, (str, Path)) else probs,
            calibration,
            labelled=labelled,
            repeat_labelled=repeat_labelled,
            masks=masks,
            features=features,
        )
        rows = cls(
            found.images,
            found.scores,
            calibration,
            transform=transform,
            labelled=found.labelled,
            mean=mean,
            std=std,
        )
        return _Dictionaries(rows) if as_dict else rows

    def __len__(self) -> int:
        return len(self.labelled) + len(self.images)

    @torch.no_grad()
    def __getitem__(self, index: int) -> Row:
        """The image at ``index``, its labels int64 and their certainty, see :func:`certainty`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"PseudoLabelled has {len(self)} rows, asked for row {index}")
        index %= len(self)
        place = index - len(self.labelled)
        if place < 0:
            image, labels = self.labelled[index]
            check_integer("PseudoLabelled", labels)
            labels = labels.to(torch.int64)
            weight = (labels != self.calibration.ignore_index).to(torch.float32)
        else:
            image, probs = self.images[place], self.scores(place)
            labels = self.calibration.pseudo_labels(probs)
        check_float("PseudoLabelled", image, name=f"image {index}")
        if image.ndim != 3 or labels.shape != image.shape[1:]:
            kind = "labels" if place < 0 else "probabilities"
            expected = f"{kind} at the size of image {index}"
            got = f"image {shape(image)}, labels {shape(labels)}"
            fix = f"resize the {kind} to the image"
            raise ValueError(message("PseudoLabelled", expected, got, fix))
        if place >= 0:
            weight = certainty(probs, self.calibration)
        row = image, labels, weight
        return self._normalised(*(row if self.transform is None else self.transform(*row)))

    def _normalised(self, image: Tensor, labels: Tensor, weight: Tensor) -> Row:
        if self._mean_and_std is None:
            return image, labels, weight
        mean, std = (each.to(image.dtype).to(image.device) for each in self._mean_and_std)
        if len(mean) not in (1, len(image)):
            expected, got = f"mean and std of {len(image)} channels", f"{len(mean)} numbers"
            raise ValueError(message("PseudoLabelled", expected, got, "pass one per channel"))
        return (image - mean) / std, labels, weight


class _Dictionaries(Dataset[dict[str, Tensor]]):
    """The rows of a data set under the names that models of transformers take."""

    def __init__(self, rows: PseudoLabelled) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, labels, weight = self.rows[index]
        return {"pixel_values": image, "labels": labels, "weights": weight}


def _mean_and_std(
    mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Tensor, Tensor] | None:
    """Both as ``[C, 1, 1]``, or None."""
    if mean is None and std is None:
        return None
    where, fix = "PseudoLabelled", "pass both, one number per channel"
    if mean is None or std is None:
        raise ValueError(message(where, "mean and std", "one of them", fix))
    for name, numbers in (("mean", mean), ("std", std)):
        least = 1e-9 if name == "std" else -1e9
        good = isinstance(numbers, (tuple, list)) and len(numbers) == len(mean) > 0
        if not good or not all(is_number(each, least, 1e9) for each in numbers):
            wanted = "positive numbers" if name == "std" else "numbers"
            raise ValueError(message(where, f"{name} as {wanted}", short(numbers), fix))
    return tuple(torch.tensor(each).reshape(-1, 1, 1) for each in (mean, std))  # type: ignore[return-value]
