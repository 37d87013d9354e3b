"""How a grid of cells and an image of another size belong together."""

from __future__ import annotations

import torch
from torch import Tensor

from cpseg.groups.fixed import Size


def to_grid(maps: Tensor, size: Size) -> Tensor:
    """Bring maps ``[..., h, w]`` to the grid by sampling.

    A cell takes its value from a pixel that :func:`to_image` maps back to that very cell, wherever
    there is one: row ``ceil(a h / H)`` for cell row a.
    """
    height, width = maps.shape[-2:]
    if (height, width) == tuple(size):
        return maps
    rows = _first_pixels(height, size[0], maps.device)
    columns = _first_pixels(width, size[1], maps.device)
    return maps[..., rows[:, None], columns]


def to_image(maps: Tensor, size: Size) -> Tensor:
    """Bring maps ``[..., H, W]`` from the grid to an image: row i reads ``floor(i H / h)``."""
    height, width = maps.shape[-2:]
    if (height, width) == tuple(size):
        return maps
    rows = torch.arange(size[0], device=maps.device) * height // size[0]
    columns = torch.arange(size[1], device=maps.device) * width // size[1]
    return maps[..., rows[:, None], columns]


def _first_pixels(pixels: int, cells: int, device: torch.device) -> Tensor:
    """The first pixel of every cell; a cell that no pixel maps to takes the next one's."""
    first = (torch.arange(cells, device=device) * pixels + cells - 1) // cells
    return first.clamp(max=pixels - 1)
