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
from cpseg.core.mask_format import VOID as VOID
from cpseg.core.palette import Palette, voc_colour

if TYPE_CHECKING:
    from PIL import ImageFile

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
    labels = read_values(path)
    if size is not None:
        check_mask_size(path, labels, size, num_classes)
    known = [*range(min(num_classes, 256)), *([ignore_index] if 0 <= ignore_index < 256 else [])]
    counts = torch.bincount(labels.flatten(), minlength=256)
    counts[known] = 0
    if bool(counts.any()):  # the check that names a value takes 30 bytes per pixel
        check_label_values(str(path), labels, num_classes, ignore_index)
    return labels


def read_values(path: str | Path, colours: Palette | None = None, void: int = VOID) -> Tensor:
    """The values of a mask: of an 8-bit image, or by a palette those of an image in colours.

    Args:
        path: the mask.
        colours: the palette, or None.
        void: the value of pixels with a colour of void.

    Returns:
        uint8 ``[H, W]``.

    Raises:
        ValueError: not such an image, or a colour that is not in the palette.
        FileNotFoundError: there is no such file.
    """
    with open_image(path, "a mask image") as image:
        mode = image.mode
        if mode == "L" and ";" in str(image.tile[0][3]):  # Pillow would scale these up
            mode = f"{str(image.tile[0][3]).strip('()').partition(',')[0]} bits"
        if colours is not None and mode in _MODES:
            values = np.array(image.convert("RGB"))
        else:
            values = np.array(image) if mode in ("L", "P") else np.empty(0)
    if colours is not None and values.ndim == 3:
        return colours.values(torch.from_numpy(values), void=void, where=str(path))
    if mode not in ("L", "P") or values.ndim != 2:
        fix = "store class indices, 255 for void"
        if mode in ("RGB", "RGBA"):
            fix += ", or pass --palette FILE|voc for a mask in colours"
        raise ValueError(message(str(path), "an 8-bit mask (L or P)", f"mode {mode}", fix))
    return torch.from_numpy(values)


def check_mask_size(
    path: str | Path, labels: Tensor, size: Sequence[int], num_classes: int
) -> None:
    """A mask has the size of its image's scores.

    Raises:
        ValueError: another one. The message names what the scores look like instead.
    """
    found = tuple(labels.shape)
    if found == tuple(size):
        return
    expected, got = f"a mask {_by(size)} like its image's scores", _by(found)
    fix = size_fix(found, size, num_classes)
    raise ValueError(message(str(path), expected, got, fix))


def size_fix(
    found: Sequence[int],
    scores: Sequence[int],
    num_classes: int,
    *,
    otherwise: str = "write both at the image's size",
) -> str:
    """What to do where an image or mask has another size than its scores.

    Args:
        found: height and width of the image.
        scores: height and width of the scores.
        num_classes: number of classes of the scores.
        otherwise: what to do where they look like neither mistake.
    """
    (height, width), (rows, columns) = found, scores
    if (num_classes, rows) == (height, width):
        return f"the scores have their {columns} classes last: pass --layout hwc"
    like = abs(rows * width - columns * height) <= max(height, width)  # up to one rounded cell
    if like and rows <= height and columns <= width:
        return "the scores have a lower resolution: pass --upsample"
    return otherwise


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
    return [channel for index in range(256) for channel in voc_colour(index)]


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
