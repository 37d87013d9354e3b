"""Bounds on an error rate from answers of unequal weight, by betting; they hold at any time.

Each answer, or block of answers, gives ``value``; ``unit`` and ``shift`` say what it is compared
with. Given all before, and an error rate of ``rate`` or more, the mean of
``value - unit * max(rate - shift, 0)`` is 0 or more. It is at most ``largest``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpseg.certification.p_values import LARGEST_BET, Floats

_SHARES = np.geomspace(0.05, 1.0, 16)
_AROUND = np.array([0.2, 0.5, 1.0])  # of the best bet, since the error is not known


class Evidence(NamedTuple):
    """Answers in the order of the draw, ``[n]`` each, and the largest value possible.

    ``bets`` are those that are tried; they must be fixed before any answer.
    """

    value: Floats
    unit: Floats
    shift: Floats
    largest: float
    bets: Floats


def any_bets(largest: float) -> Floats:
    """Bets for errors of which nothing is known."""
    return np.asarray(LARGEST_BET / largest * _SHARES)


def bets_for(rate: float, expected: float, variance: float, largest: float) -> Floats:
    """Bets that grow fast where the error is as expected and values vary so much."""
    gap = rate - expected
    best = gap / (variance + gap**2)
    return np.asarray((best * _AROUND).clip(max=LARGEST_BET / largest))


def wealth_path(evidence: Evidence, rate: float) -> Floats:
    """Wealth after each answer, of one who bets that the error rate is below ``rate``.

    The mean of the wealths under several constant bets. If the rate is ``rate`` or more it ever
    reaches 1 / delta with a chance of delta at most.

    Reference:
        Waudby-Smith & Ramdas (2024), Estimating means of bounded random variables by betting;
        Ville's inequality. Weights: Zrnic & Candes (2024), Active statistical inference.
    """
    gain = evidence.unit * np.maximum(rate - evidence.shift, 0) - evidence.value
    steps = np.log1p(evidence.bets[:, None] * gain)
    return np.asarray(np.exp(steps.cumsum(1)).mean(0))


def rate_bound(evidence: Evidence, delta: float) -> float:
    """The largest error rate that the answers do not rule out, rounded up to a millionth."""
    if len(evidence.value) == 0:
        return 1.0

    def possible(millionths: int) -> bool:
        return bool(wealth_path(evidence, millionths / 10**6).max() < 1 / delta)

    low, high = 0, 10**6
    if possible(high):
        return 1.0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if possible(middle) else (low, middle)
    return high / 10**6
