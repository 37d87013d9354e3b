"""Features of a pixel: the input of a recalibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cpseg._internal import words

CONTEXTS = words.CONTEXTS

# Scores below it count as equal. Stored maps (float16, uint8) have exact zeros, whose log must not
# outweigh all else; between 1e-3 and 1e-5 the fits on real scores hardly differ.
FLOOR = 1e-4


WINDOWS = (7 / 180, 31 / 180)  # sides of the neighbourhoods, in units of the image's shorter side


def log_scores(probs: Tensor, sigmoid: Sequence[int] = ()) -> Tensor:
    """Features ``[B, F, ...]`` of probabilities ``[B, S, ...]``: log p, then log(1 - p) of some.

    F is S and the number of channels in ``sigmoid``, those of independent scores; scores are
    floored at :data:`FLOOR`.
    """
    p = probs.to(torch.float32)
    logs = p.clamp(min=FLOOR).log_()
    if not sigmoid:
        return logs
    independent = p if len(sigmoid) == p.shape[1] else p[:, list(sigmoid)]
    return torch.cat([logs, (1 - independent).clamp_(min=FLOOR).log_()], 1)


def radii(height: int, width: int) -> list[int]:
    """Half sides of the two windows in an image of this size, at least 0: windows are odd."""
    return [max(0, round((side * min(height, width) - 1) / 2)) for side in WINDOWS]


def window_means(probs: Tensor, rows: slice, radius: int) -> Tensor:
    """Mean scores over a square window around every pixel, cut at the border.

    Args:
        probs: probabilities ``[B, S, H, W]``, whole images.
        rows: the rows wanted, within the image.
        radius: half the window's side.

    Returns:
        float32 ``[B, S, rows, W]``; it does not depend on how rows are split, up to the rounding
        of float64.
    """
    height, width = probs.shape[-2:]
    top, bottom = max(0, rows.start - radius), min(height, rows.stop + radius)
    down = _sums(probs[..., top:bottom, :], -2)
    low, high = _ends(torch.arange(rows.start, rows.stop, device=probs.device), radius, height)
    part = down[..., high - top, :] - down[..., low - top, :]
    part /= (high - low).unsqueeze(-1)
    across = _sums(part, -1)
    low, high = _ends(torch.arange(width, device=probs.device), radius, width)
    return ((across[..., high] - across[..., low]) / (high - low)).to(torch.float32)


def _sums(values: Tensor, dim: int) -> Tensor:
    """Running sums from 0 in float64, one longer than ``values``."""
    sums = values.cumsum(dim, dtype=torch.float64)
    return torch.cat([torch.zeros_like(sums.narrow(dim, 0, 1)), sums], dim)


def _ends(centre: Tensor, radius: int, size: int) -> tuple[Tensor, Tensor]:
    return (centre - radius).clamp(min=0), (centre + radius + 1).clamp(max=size)


def places(size: int, pixels: slice, device: torch.device) -> Tensor:
    """Centres of pixels along an axis of ``size``, in (-1, 1)."""
    return (2 * torch.arange(pixels.start, pixels.stop, device=device) + 1) / size - 1


def location(y: Tensor, x: Tensor) -> Tensor:
    """The four location features x, y, x², y², last axis."""
    return torch.stack([x, y, x * x, y * y], -1)


def colour_features(colour: Tensor) -> Tensor:
    """Nine features of colours ``[..., 3]`` in [0, 1]: themselves, their squares and products.

    They are stretched so that the penalty of a fit does not outweigh them.
    """
    return torch.cat([4 * colour, 8 * (colour - 0.5) ** 2, 4 * colour * colour.roll(1, -1)], -1)


@dataclass(frozen=True)
class Layout:
    """The order of the feature columns: the pixel's own log scores, then each context part.

    Attributes:
        num_scores: number S of the classes of all sources.
        sigmoid: the channels among them that are independent scores.
        context: the context parts in use, in the order of :data:`CONTEXTS`.
        components: number of components of an encoder's features, after all context parts.
        colour: whether the nine features of the pixel's colour come last.
    """

    num_scores: int
    sigmoid: tuple[int, ...]
    context: tuple[str, ...]
    components: int = 0
    colour: bool = False

    @property
    def own(self) -> int:
        """Number of features of the pixel's own scores."""
        return self.num_scores + len(self.sigmoid)

    @property
    def columns(self) -> dict[str, slice]:
        """The columns of each context part, of the ``"features"`` and the ``"colour"``."""
        columns, start = {}, self.own
        for part in self._parts:
            columns[part] = slice(start, start + self._size(part))
            start += self._size(part)
        return columns

    @property
    def width(self) -> int:
        """Number of all features."""
        return self.own + sum(map(self._size, self._parts))

    @property
    def _parts(self) -> tuple[str, ...]:
        return (*self.context, "features", "colour")

    def _size(self, part: str) -> int:
        own, colour = self.own, 9 * self.colour
        sizes = {"location": 4, "neighbourhood": 2 * own, "image": own, "colour": colour}
        return sizes.get(part, self.components)

    def indices(self, chosen: Sequence[str], components: int = 0) -> Tensor:
        """Column indices of the own features, chosen context parts, first components, colour."""
        index = torch.arange(self.width)
        kept = [self.columns[part] for part in self.context if part in chosen]
        first = self.columns["features"].start
        kept += [slice(first, first + components), self.columns["colour"]]
        return torch.cat([index[columns] for columns in (slice(self.own), *kept)])
