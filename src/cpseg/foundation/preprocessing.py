"""Images as input of a model, its maps back at the size of the image, and tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpseg._internal.checks import message

_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # as Pillow numbers them


@dataclass(frozen=True)
class Preparation:
    """How images become the input of a model, as its image processor recorded it.

    Images are never cropped: where the processor would crop, the whole image is resized to the
    size of the crop.

    Attributes:
        size: height and width; or, with ``keep_ratio``, the length of the shortest side and
            optionally the maximum of the longest side. None keeps the size of the image.
        keep_ratio: keep the aspect ratio; ``size`` is then about the shortest and longest side.
        fit: keep the aspect ratio: of the two factors that resize a side to ``size``, use the one
            nearer to 1 for both sides.
        multiple: round sides to the nearest multiple of this.
        divisor: round sides up to a multiple of this.
        filter: ``"bilinear"``, ``"bicubic"`` or ``"nearest"``.
        scale: factor for pixel values in [0, 1], before ``mean`` and ``std``.
        mean: of the three channels, or None.
        std: of the three channels, or None.
        flip: reverse the channels: blue comes first.
    """

    size: tuple[int, ...] | None
    keep_ratio: bool = False
    fit: bool = False
    multiple: int = 1
    divisor: int = 1
    filter: str = "bilinear"
    scale: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    flip: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """Pixel values for the model.

        Args:
            images: RGB in [0, 1], float ``[B, 3, H, W]``.

        Returns:
            float32 ``[B, 3, h, w]``.
        """
        pixels = images.to(torch.float32)
        size = self.target((images.shape[-2], images.shape[-1]))
        if size != tuple(images.shape[-2:]):
            smooth = self.filter != "nearest"
            pixels = F.interpolate(pixels, size, mode=self.filter, antialias=smooth)
            pixels = pixels.clamp(0, 1)  # bicubic overshoots, here as in 8-bit images
        if self.flip:
            pixels = pixels.flip(1)
        pixels = pixels * self.scale
        if self.mean is None or self.std is None:
            return pixels
        mean, std = pixels.new_tensor(self.mean), pixels.new_tensor(self.std)
        return (pixels - mean[:, None, None]) / std[:, None, None]

    def black(self, like: Tensor) -> Tensor:
        """What a black pixel becomes, ``[3, 1, 1]``."""
        if self.mean is None or self.std is None:
            return like.new_zeros(3, 1, 1)
        mean, std = like.new_tensor(self.mean), like.new_tensor(self.std)
        return (-mean / std)[:, None, None]

    def target(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the model's input for an image of ``size``."""
        height, width = size
        if self.size is not None and not self.keep_ratio:
            scales = [wanted / side for wanted, side in zip(self.size, size, strict=True)]
            if self.fit:
                scales = [min(scales, key=lambda scale: abs(1 - scale))] * 2
            height, width = (
                max(1, round(scale * side / self.multiple)) * self.multiple
                for scale, side in zip(scales, size, strict=True)
            )
        elif self.size is not None:
            short, long = self.size[0], self.size[0] * max(size) // min(size)
            if len(self.size) == 2 and long > self.size[1]:
                short, long = max(1, round(self.size[1] * min(size) / max(size))), self.size[1]
            height, width = (short, long) if height <= width else (long, short)
        step = self.divisor
        return math.ceil(height / step) * step, math.ceil(width / step) * step


def preparation(recorded: Mapping[str, Any], *, where: str) -> Preparation:
    """The :class:`Preparation` in an image processor's JSON (``preprocessor_config.json``).

    Raises:
        ValueError: a size or filter is not supported.

    Example:
        >>> preparation({"size": 352, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, where="x")
        Preparation(size=(352, 352), keep_ratio=False, ... mean=(0.5, 0.5, 0.5), ...)
    """
    size: tuple[int, ...] | None = None
    keep_ratio = False
    if recorded.get("do_center_crop") and recorded.get("crop_size"):
        size, keep_ratio = _size(recorded["crop_size"], None, where)
    elif recorded.get("do_resize", True) and recorded.get("size"):
        size, keep_ratio = _size(recorded["size"], recorded.get("max_size"), where)
    number = recorded.get("resample", 2)
    if number not in _FILTERS:
        expected, fix = "bilinear, bicubic or nearest resampling", "set 'resample' to 2 in its file"
        raise ValueError(message(where, expected, f"'resample' {number}", fix))
    factor = recorded.get("rescale_factor", 1 / 255) if recorded.get("do_rescale", True) else 1.0
    kind = str(recorded.get("image_processor_type"))
    # MobileViT does not normalise by default, even if its file records a mean.
    default = not kind.startswith("MobileViT")
    normalize = recorded.get("do_normalize", default) and "image_mean" in recorded
    if kind.startswith("Sapiens") and recorded.get("do_pad"):
        fix = "set 'do_pad' to false in its file"
        raise ValueError(message(where, "images that are not padded", "'do_pad' true", fix))
    return Preparation(
        size,
        keep_ratio,
        fit=bool(recorded.get("keep_aspect_ratio", False)),
        multiple=recorded.get("ensure_multiple_of") or 1,
        divisor=recorded.get("size_divisor") or recorded.get("size_divisibility") or 1,
        filter=_FILTERS[number],
        scale=255 * factor,
        mean=tuple(recorded["image_mean"]) if normalize else None,
        std=tuple(recorded["image_std"]) if normalize else None,
        flip=bool(recorded.get("do_flip_channel_order", False)),
    )


def _size(recorded: Any, longest: int | None, where: str) -> tuple[tuple[int, ...], bool]:
    """The size, in any form that processors write, and whether it keeps the aspect ratio."""
    if isinstance(recorded, int):
        return ((recorded, longest), True) if longest else ((recorded, recorded), False)
    if isinstance(recorded, (list, tuple)) and len(recorded) == 2:
        return (recorded[0], recorded[1]), False
    if isinstance(recorded, Mapping):
        if recorded.get("height") and recorded.get("width"):
            return (recorded["height"], recorded["width"]), False
        if recorded.get("shortest_edge"):
            sides = (recorded["shortest_edge"], recorded.get("longest_edge") or longest)
            return tuple(side for side in sides if side), True
    expected = "'size' as a number, height and width, or a shortest edge"
    fix = "correct the model's preprocessor_config.json"
    raise ValueError(message(where, expected, repr(recorded), fix))


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps ``[B, K, h, w]`` bilinearly, with antialiasing where they shrink."""
    height, width = maps.shape[-2:]
    if (height, width) == size:
        return maps
    shrinks = size[0] < height or size[1] < width
    return F.interpolate(maps, size, mode="bilinear", align_corners=False, antialias=shrinks)


def tiled(
    score: Callable[[Tensor], Tensor], images: Tensor, *, tile: int | None, overlap: int
) -> Tensor:
    """Score images in square tiles and average where the tiles overlap.

    Args:
        score: from images ``[B, 3, h, w]`` to probabilities ``[B, K, h, w]``.
        images: ``[B, 3, H, W]``.
        tile: side of a tile. Images that fit into one tile are scored whole, as with None.
        overlap: minimal number of pixels that neighbouring tiles share.

    Returns:
        ``[B, K, H, W]``. Besides it, only one tile at a time is in memory.
    """
    height, width = images.shape[-2:]
    if tile is None or max(height, width) <= tile:
        return score(images)
    total: Tensor | None = None
    count = images.new_zeros(height, width, dtype=torch.float32)
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            probs = score(images[..., top : top + tile, left : left + tile])
            if total is None:
                total = probs.new_zeros(*probs.shape[:2], height, width)
            total[..., top : top + tile, left : left + tile] += probs
            count[top : top + tile, left : left + tile] += 1
    assert total is not None
    return total.div_(count)


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side; they are spread evenly over it.

    Example:
        >>> starts(100, 40, 10), starts(30, 40, 10)
        ([0, 30, 60], [0])
    """
    last = max(length - tile, 0)
    steps = math.ceil(last / (tile - overlap))
    return [round(step * last / steps) for step in range(steps + 1)] if steps else [0]
