"""Which cells of the grid share a threshold, and how a grid meets images of another size.

Every variant of the Kandinsky family is a partition of the grid: a map of group indices, int64
``[H, W]``, that ``Calibrator`` takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpseg._internal.checks import (
    check_has_values,
    check_integer,
    is_whole,
    message,
    shape,
    short,
)

Size = tuple[int, int]
_MOST_GROUPS = 2**16


def pixel(size: Size, *, device: torch.device | str | None = None) -> Tensor:
    """Every cell its own group: the pixel-wise calibration of ConformalSAM.

    Args:
        size: height and width of the grid, in cells.
        device: where the map lies.

    Returns:
        int64 ``[H, W]``.

    Raises:
        ValueError: a side is not a positive whole number.

    Reference:
        ConformalSAM (ICCV 2025), section 3.3.1; Brunekreef et al. (2024), Kandinsky conformal
        prediction.

    Example:
        >>> groups.pixel((2, 3))
        tensor([[0, 1, 2],
                [3, 4, 5]])
    """
    height, width = check_size("groups.pixel", size)
    device = _check_device("groups.pixel", device)
    return torch.arange(height * width, device=device).reshape(height, width)


def image(size: Size, *, device: torch.device | str | None = None) -> Tensor:
    """One group for the whole grid: image-wise calibration.

    Args:
        size: height and width of the grid, in cells.
        device: where the map lies.

    Returns:
        int64 ``[H, W]`` of zeros.

    Raises:
        ValueError: a side is not a positive whole number.

    Example:
        >>> groups.image((2, 3))
        tensor([[0, 0, 0],
                [0, 0, 0]])
    """
    height, width = check_size("groups.image", size)
    device = _check_device("groups.image", device)
    return torch.zeros(height, width, dtype=torch.int64, device=device)


def blocks(
    size: Size, block: int | tuple[int, int], *, device: torch.device | str | None = None
) -> Tensor:
    """Rectangular blocks of neighbouring cells; the last of a row or column may be smaller.

    Args:
        size: height and width of the grid, in cells.
        block: side of a block, or its height and width, in cells.
        device: where the map lies.

    Returns:
        int64 ``[H, W]``, numbered row by row.

    Raises:
        ValueError: a side is not a positive whole number.

    Example:
        >>> groups.blocks((2, 5), 2)
        tensor([[0, 0, 1, 1, 2],
                [0, 0, 1, 1, 2]])
    """
    height, width = check_size("groups.blocks", size)
    sides = (block, block) if isinstance(block, int) else block
    down, across = check_size("groups.blocks", sides, name="block")
    device = _check_device("groups.blocks", device)
    rows = torch.arange(height, device=device) // down
    columns = torch.arange(width, device=device) // across
    return rows[:, None] * (columns[-1] + 1) + columns


def check_groups(where: str, groups: Tensor) -> None:
    """A group map: integers from 0, ``[H, W]``."""
    if isinstance(groups, str):
        name = groups if groups in ("pixel", "image") else "pixel"
        fix = f"pass the map, for example cpseg.groups.{name}((height, width))"
        raise TypeError(message(where, "groups as a tensor", short(groups), fix))
    check_integer(where, groups, name="groups")
    fix = "make the map with cpseg.groups"
    if groups.ndim != 2 or groups.numel() == 0:
        raise ValueError(message(where, "groups [H, W]", shape(groups), fix))
    check_has_values(where, groups, name="groups")
    least, most = (int(end) for end in groups.aminmax())
    if least < 0:
        raise ValueError(message(where, "group indices from 0", str(least), fix))
    limit = max(groups.numel(), _MOST_GROUPS)  # memory grows with the largest
    if most >= limit:
        fix = "number the groups from 0 without gaps"
        raise ValueError(message(where, f"group indices below {limit}", str(most), fix))


def is_pixelwise(groups: Tensor) -> bool:
    """Whether every cell is its own group."""
    ordered = groups.flatten().sort().values
    return bool((ordered[1:] != ordered[:-1]).all())


def check_size(where: str, size: Size, *, name: str = "size") -> Size:
    """Height and width as positive whole numbers."""
    sides = tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(sides) != 2 or not all(is_whole(side) for side in sides):
        fix = "pass positive whole numbers of cells"
        raise ValueError(message(where, f"{name} as (height, width)", short(size), fix))
    if max(sides) * min(sides) >= 2**31:
        expected, fix = f"a {name} of fewer than 2**31 cells", "take a coarser grid"
        raise ValueError(message(where, expected, short(size), fix))
    return sides


def _check_device(where: str, device: object) -> torch.device | None:
    """A device, or the name of one."""
    if device is None or isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)  # type: ignore[call-overload, no-any-return]
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        fix = "pass the name of one, such as 'cpu'"
        raise ValueError(message(where, "a device", short(device), fix)) from error
