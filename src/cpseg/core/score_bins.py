"""Bins for scores in [0, 1], spaced evenly in odds."""

from __future__ import annotations

import torch
from torch import Tensor

# Bins: the sign side and the leading bits of the float32 nearer end of [0, 1]. Eight bits of
# mantissa are steps of at most 1/256 in s (or 1 - s), hence under 1 % in the odds s / (1 - s).
_SHIFT = 23 - 8


_LOW = 2.0**-20


_LOW_KEY = (127 - 20) << 8  # key of 2**-20


_SIDE = 19 * 256  # keys from 2**-20 up to 1/2


NUM_BINS = 2 * _SIDE + 4


def score_bins(scores: Tensor) -> Tensor:
    """Bin of scores in [0, 1], int64, growing with the score.

    Bin 0 is the score 0, bin 1 lies below 2**-20, the last bin above 1 - 2**-20. NaN gets any bin.
    """
    upper = scores > 0.5
    nearer = torch.where(upper, 1 - scores, scores).contiguous()  # 1 - s is exact above 1/2
    key = (nearer.view(torch.int32) >> _SHIFT) - _LOW_KEY
    lower_bin = torch.where(scores > 0, key.clamp(min=-1) + 2, 0)
    return torch.where(upper, 2 * _SIDE + 2 - key.clamp(min=-1), lower_bin).to(torch.int64)


def bin_edges(device: torch.device) -> Tensor:
    """The largest float32 score of every bin, ``[NUM_BINS]``."""
    keys = torch.arange(_SIDE + 1, dtype=torch.int32, device=device) + _LOW_KEY
    lower = (((keys + 1) << _SHIFT) - 1).view(torch.float32).clamp(max=0.5)
    smallest = (keys[:-1] << _SHIFT).view(torch.float32).to(torch.float64)
    # 1 - s is a multiple of 2**-24 there; so is its smallest value in a bin.
    upper = 1 - (smallest * 2**24).ceil() / 2**24
    ends = torch.tensor([0.0, _LOW * (1 - 2.0**-24)], device=device)
    one = torch.ones(1, device=device)
    return torch.cat([ends, lower, upper.flip(0).to(torch.float32), one])
