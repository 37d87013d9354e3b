"""Labels from the masks of a data set, however they are stored."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cpseg._internal.checks import message
from cpseg.core.mask_format import MaskFormat
from cpseg.files.masks import check_mask_size, read_values


def read_labels(path: Path, stored: MaskFormat, num_classes: int, size: tuple[int, int]) -> Tensor:
    """The labels of an image.

    Args:
        path: its mask.
        stored: how masks are stored.
        num_classes: number of classes of the data set.
        size: height and width of its scores.

    Returns:
        uint8 ``[H, W]``, 255 for void.

    Raises:
        ValueError: not a mask, one of another size, or a value that is no class.
        FileNotFoundError: there is no such file.
    """
    values = read_values(path, stored.palette, stored.void)
    check_mask_size(path, values, size, num_classes)
    classes = stored.classes_of_values(num_classes)
    counts = torch.bincount(values.flatten(), minlength=256)
    strange: list[int] = ((counts > 0) & (classes < 0)).nonzero().flatten().tolist()
    if strange:
        raise _stray(path, stored, strange, num_classes)
    return classes.to(torch.uint8)[values.to(torch.int64)]


def _stray(path: Path, stored: MaskFormat, strange: list[int], num_classes: int) -> ValueError:
    """Which value is no class, and the option that would make it one."""
    value, void = strange[0], f"or {stored.void} (void)"
    if stored.map is not None:
        expected = f"values 0..{len(stored.map.target) - 1} {void}"
        fix = f"{value} is not in --mask-map: add it there, mapped to null where it is void"
        return ValueError(message(str(path), expected, str(value), fix))
    first, fix = stored.first_class, f"pass --void {value} if it is void, or --mask-map"
    if strange == [num_classes] and not first:
        fix = f"pass --first-class 1 if masks count from 1, --void {value} if it is void"
    expected = f"labels in {first}..{first + num_classes - 1} {void}"
    return ValueError(message(str(path), expected, str(value), fix))
