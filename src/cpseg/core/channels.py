"""Scores of several models, and components of features, as the channels of one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

# Weights of an interpolation can sum to a little more than 1, and scores must not.
_SHRINK = 1 - 2**-20


def join_channels(
    scores: Sequence[Tensor], components: Tensor | None = None, colour: Tensor | None = None
) -> Tensor:
    """Scores ``[..., K, h, w]`` of several models, colours, components, at the first one's size.

    Example:
        >>> join_channels([torch.ones(2, 4, 4), torch.zeros(3, 2, 2)]).shape
        torch.Size([5, 4, 4])
    """
    size = tuple(scores[0].shape[-2:])
    parts = [s if tuple(s.shape[-2:]) == size else _resized(s, size) * _SHRINK for s in scores]
    if colour is not None:
        parts.append(_resized(colour, size))
    if components is not None and components.shape[-3] > 0:
        parts.append(_resized(components, size))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -3)


def _resized(values: Tensor, size: tuple[int, ...]) -> Tensor:
    """Values ``[..., C, h, w]`` at this size, bilinear."""
    if tuple(values.shape[-2:]) == size:
        return values
    batch = values.to(torch.float32)
    batch = batch if values.ndim == 4 else batch.unsqueeze(0)
    found = functional.interpolate(batch, size=size, mode="bilinear", align_corners=False)
    return found if values.ndim == 4 else found[0]
