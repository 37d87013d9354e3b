"""Masks: 8-bit PNG files whose values are class indices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cpseg._internal.checks import (
    check_label_values,
    message,
)
from cpseg._internal.safe_files import atomic, damaged

VOID = 255  # what training code expects in files


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
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode = image.mode
            if mode == "L" and ";" in str(image.tile[0][3]):  # Pillow would scale these up
                mode = f"{str(image.tile[0][3]).strip('()').partition(',')[0]} bits"
            values = np.array(image)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise damaged(path, "a mask image", error) from error
    if mode not in ("L", "P") or values.ndim != 2:
        fix = "store class indices, 255 for void"
        raise ValueError(message(str(path), "an 8-bit mask (L or P)", f"mode {mode}", fix))
    labels = torch.from_numpy(values)
    if size is not None and tuple(labels.shape) != tuple(size):
        expected, got = f"a mask {_by(size)} like its image's scores", _by(tuple(labels.shape))
        raise ValueError(message(str(path), expected, got, "write both at the image's size"))
    check_label_values(str(path), labels, num_classes, ignore_index)
    return labels


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of an image file as stored: EXIF rotation is not applied.

    Raises:
        ValueError: the file is not an image.
        FileNotFoundError: there is no such file.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise damaged(path, "an image", error) from error


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
