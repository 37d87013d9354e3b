"""P-values for "the mean loss is at least ``max_error``", from losses in [0, 1] of i.i.d. images.

Arrays are ``[n, ...]``: images first, then anything that is tested side by side (classes, levels).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# The largest bet, as a share of the one that a loss of 1 would ruin. At 0.97 images without any
# error certify 5 % at delta 0.1 with 47 of them (no method needs fewer than 45), and a loss of 1
# leaves 3 % of the wealth.
LARGEST_BET = 0.97


def p_values(losses: Floats, max_error: float, *, delta: float, pvalue: str) -> Floats:
    """One of :data:`PVALUES` by name; arguments as there."""
    if pvalue == "betting":
        return betting(losses, max_error, delta=delta)
    return hoeffding_bentkus(losses, max_error)


def betting(losses: Floats, max_error: float, *, delta: float) -> Floats:
    """The inverse of the largest wealth of a gambler who bets that losses are smaller.

    The wealth is the running product of ``1 - nu_i (L_i - max_error)``. The bet ``nu_i`` is made
    before image i is seen, and never so large that the wealth could turn negative: if the mean
    loss is ``max_error`` or more, no wealth ever exceeds ``1/p`` with a probability above p. Any
    order of the images that does not depend on their losses will do.

    Args:
        losses: in [0, 1], ``[n, ...]``, in the order of the bets.
        max_error: the mean that is tested.
        delta: the level the bets are tuned for; the p-value holds at every level.

    Returns:
        ``[...]``, at most 1, and falling where ``max_error`` grows.

    Reference:
        Waudby-Smith & Ramdas (2024), Estimating means of bounded random variables by betting,
        section 4: the capital process, with predictable plug-in bets for a known number of images.

    Example:
        >>> import numpy as np
        >>> from cpseg.certification.p_values import betting
        >>> bool(betting(np.zeros(47), 0.05, delta=0.1) <= 0.1)
        True
    """
    n = len(losses)
    number = np.arange(1.0, n + 1).reshape(-1, *[1] * (losses.ndim - 1))
    mean = (0.5 + losses.cumsum(0)) / (number + 1)
    variance = (0.25 + ((losses - mean) ** 2).cumsum(0)) / (number + 1)
    before = np.concatenate([np.full_like(losses[:1], 0.25), variance[:-1]])
    bet = np.sqrt(2 * math.log(1 / delta) / (n * before)).clip(max=LARGEST_BET / (1 - max_error))
    wealth = np.log1p(-bet * (losses - max_error)).cumsum(0)
    return np.asarray(np.exp(-wealth.max(0).clip(min=0)))


def hoeffding_bentkus(losses: Floats, max_error: float) -> Floats:
    """The smaller of Hoeffding's and Bentkus's bound on the chance of so small a mean.

    Args:
        losses: in [0, 1], ``[n, ...]``.
        max_error: the mean that is tested.

    Returns:
        ``[...]``, at most 1.

    Reference:
        Bates et al. (2021), Distribution-free risk-controlling prediction sets; Angelopoulos et al.
        (2021), Learn then test, the Hoeffding-Bentkus p-value.

    Example:
        >>> import numpy as np
        >>> from cpseg.certification.p_values import hoeffding_bentkus
        >>> bool(hoeffding_bentkus(np.zeros(45), 0.05) <= 0.1)
        True
    """
    from scipy.special import bdtr, rel_entr

    n = len(losses)
    mean = np.minimum(losses.mean(0), max_error)
    distance = rel_entr(mean, max_error) + rel_entr(1 - mean, 1 - max_error)
    tail = bdtr(np.ceil(losses.sum(0)), n, max_error)
    return np.asarray(np.minimum(np.minimum(np.exp(-n * distance), math.e * tail), 1.0))


def images_needed(max_error: float, delta: float, pvalue: str) -> int:
    """The fewest images that reject at ``delta`` where no label at all is wrong.

    Example:
        >>> from cpseg.certification.p_values import images_needed
        >>> images_needed(0.05, 0.1, "betting"), images_needed(0.05, 0.1, "hoeffding-bentkus")
        (47, 45)
    """
    low = math.ceil(math.log(delta) / math.log1p(-max_error))  # no method does with fewer
    high = 2 * low + 20
    if low > 10**6:  # a bound is enough to say that this is hopeless
        return low

    def rejects(images: int) -> bool:
        zeros: Floats = np.zeros(images)
        return bool(p_values(zeros, max_error, delta=delta, pvalue=pvalue) <= delta)

    return low + bisect_left(range(low, high), True, key=rejects)


def fixed_sequence(p: npt.NDArray[Any], delta: float) -> npt.NDArray[np.int64]:
    """How many hypotheses of the last axis are rejected, in their order, before one is not."""
    return np.asarray(np.logical_and.accumulate(p <= delta, axis=-1).sum(-1), np.int64)
