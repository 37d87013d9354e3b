"""Masks: 8-bit PNG files whose values are class indices. Images are opened here too."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cpseg._internal.checks import (
    check_label_values,
    message,
)
from cpseg._internal.safe_files import atomic, damaged

if TYPE_CHECKING:
    from PIL import ImageFile

VOID = 255  # what training code expects in files
MOST_PIXELS = 2**31 - 1  # 46,340 x 46,340

_opening = threading.Lock()


@contextlib.contextmanager
def open_image(path: str | Path, kind: str = "an image") -> Iterator[ImageFile.ImageFile]:
    """An image file, opened by Pillow, of any size up to ``MOST_PIXELS``.

    Pillow warns of images above 89 million pixels and refuses them above 179 million; satellite
    images have more.

    Args:
        path: the file.
        kind: what it is, for messages.

    Raises:
        ValueError: the file is not an image, is damaged where it is read inside the ``with``
            block, or has more pixels than that.
        FileNotFoundError: there is no such file.
    """
    from PIL import Image

    try:
        with _opening:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(path)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        with image:
            if image.width * image.height > MOST_PIXELS:
                expected = f"{kind} of at most {MOST_PIXELS} pixels"
                got, fix = f"{image.height}x{image.width}", "cut it into tiles, and its mask alike"
                raise ValueError(message(str(path), expected, got, fix))
            yield image
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # from Pillow's many decoders: anything may come
        if str(error).startswith(f"{path}: expected "):
            raise
        raise damaged(path, kind, error) from error


_MODES = ("RGB", "L", "P", "1", "RGBA", "LA", "PA", "CMYK", "YCbCr")  # 8 bits, or fewer


def read_mask(
    path: str | Path, *, num_classes: int, ignore_index: int = 255, size: tuple[int, int] | None
) -> Tensor:
    """Labels of one image from an 8-bit single-channel PNG (``L`` or palette).

    Args:
        path: the mask.
        num_classes: number of classes; every value must be one or ``ignore_index``.
        ignore_index: the value of void pixels.
        size: expected height and width; None takes any.

    Returns:
        uint8 ``[H, W]``.

    Raises:
        ValueError: not such an image, another size, or a value that is neither class nor void.
        FileNotFoundError: there is no such file.
    """
    with open_image(path, "a mask image") as image:
        mode = image.mode
        if mode == "L" and ";" in str(image.tile[0][3]):  # Pillow would scale these up
            mode = f"{str(image.tile[0][3]).strip('()').partition(',')[0]} bits"
        values = np.array(image) if mode in ("L", "P") else np.empty(0)
    if mode not in ("L", "P") or values.ndim != 2:
        fix = "store class indices, 255 for void"
        raise ValueError(message(str(path), "an 8-bit mask (L or P)", f"mode {mode}", fix))
    labels = torch.from_numpy(values)
    if size is not None and tuple(labels.shape) != tuple(size):
        expected, got = f"a mask {_by(size)} like its image's scores", _by(tuple(labels.shape))
        raise ValueError(message(str(path), expected, got, "write both at the image's size"))
    known = [*range(min(num_classes, 256)), *([ignore_index] if 0 <= ignore_index < 256 else [])]
    counts = torch.bincount(labels.flatten(), minlength=256)
    counts[known] = 0
    if bool(counts.any()):  # the check that names a value takes 30 bytes per pixel
        check_label_values(str(path), labels, num_classes, ignore_index)
    return labels


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of an image file as stored: EXIF rotation is not applied.

    Raises:
        ValueError: the file is not an image.
        FileNotFoundError: there is no such file.
    """
    with open_image(path) as image:
        return image.height, image.width


def read_image(path: str | Path) -> Tensor:
    """An image as uint8 RGB ``[3, H, W]``, as stored: EXIF rotation is not applied.

    Raises:
        ValueError: not an image of 8 bits per channel.
        FileNotFoundError: there is no such file.
    """
    with open_image(path) as image:
        mode = image.mode
        values = np.array(image.convert("RGB")) if mode in _MODES else None
    if values is None:
        expected, fix = "an image of 8 bits per channel", "convert it to RGB"
        raise ValueError(message(str(path), expected, f"mode {mode}", fix))
    return torch.from_numpy(values).permute(2, 0, 1)


def _by(size: Sequence[int]) -> str:
    return "x".join(str(side) for side in size)


def palette() -> list[int]:
    """The 256 colours of the PASCAL VOC palette as one flat list of red, green, blue."""
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return [int(value) for value in colours.flatten()]


def write_mask(path: str | Path, labels: Tensor) -> None:
    """Write labels ``[H, W]`` in 0..255 as an 8-bit palette PNG, atomically.

    Raises:
        ValueError: not two axes, or a value that eight bits do not hold.
    """
    from PIL import Image

    low, high = (int(value) for value in labels.aminmax()) if labels.numel() else (0, 256)
    if labels.ndim != 2 or low < 0 or high > 255:
        got = f"{list(labels.shape)} with values {low}..{high}"
        fix = "an 8-bit mask holds at most 255 classes and void"
        raise ValueError(message("write_mask", "labels [H, W] in 0..255", got, fix))
    image = Image.fromarray(labels.to(torch.uint8).cpu().numpy()).convert("L")
    image.putpalette(palette())
    with atomic(path) as file:
        image.save(file, format="PNG")
