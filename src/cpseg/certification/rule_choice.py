"""Which rule is certified: what is tested of an image, in which order, and at which level.

Arrays are ``[n, C, A]``: images, then what is tested side by side (one rule or one per class),
then the levels of a rule, strictest first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpseg.certification.p_values import (
    LARGEST_BET,
    Floats,
    fixed_sequence,
    images_needed,
    p_values,
)

Integers = npt.NDArray[np.int64]
_TRIED_BETS = np.linspace(0.05, 1.0, 20)


class Statement(NamedTuple):
    """What is certified, and how: the settings of a ``Certifier`` that decide it."""

    method: str
    per: str
    pvalue: str
    max_error: float
    delta: float


class Start(NamedTuple):
    """A level where testing starts, for each of C, and the share of delta that it may spend."""

    levels: Integers
    share: float


def losses_of(
    statement: Statement, wrong: Integers, kept: Integers, weight: Floats, pixels: Integers
) -> Floats:
    """The loss of every image under every rule, in [0, 1], ``[n, C, A]``.

    ``"ltt"`` tests whether its mean is below ``max_error``: ``"labels"`` per label, where an image
    that keeps nothing has exactly that loss and tells nothing; ``"image"`` per image that keeps a
    label. ``"crc"`` bounds the share of an image's pixels that are kept and wrong.

    Args:
        statement: what is certified.
        wrong: wrong labels, ``[n, C, A]``.
        kept: labels kept, ``[n, C, A]``.
        weight: size of each image as a share of the largest one, in (0, 1], ``[n]``.
        pixels: labelled pixels, ``[n]``.
    """
    bound = statement.max_error
    of_pixels = pixels[:, None, None]
    if statement.method == "crc":
        return np.asarray(wrong / of_pixels)
    if statement.per == "image":
        return np.asarray(np.where(kept > 0, wrong / np.maximum(kept, 1), bound))
    return np.asarray(bound + weight[:, None, None] * (wrong - bound * kept) / of_pixels)


def starts_of(statement: Statement, losses: Floats | None, kept: Floats, count: int) -> list[Start]:
    """Where testing starts, chosen without any certification image.

    Where the logarithm of the wealth is expected to grow fastest, judged by the images that set
    the thresholds with one standard error to spare, with 9 / 10 of delta; the rest is for a start
    where half as much is kept, should that be too loose. Without such images at three levels.
    ``"crc"`` has no order to choose.

    Args:
        statement: what is certified.
        losses: of the images that set the thresholds, ``[m, C, A]``, None where there are none.
        kept: mean share of the pixels that they keep, ``[C, A]``.
        count: number C, for which there may be no image.
    """
    levels = kept.shape[-1]
    strictest = np.zeros(count, np.int64)
    if statement.method == "crc":
        return [Start(strictest, 1.0)]
    if losses is None or len(losses) < 2:
        return [Start(strictest + levels * part // 4, 1 / 3) for part in (1, 2, 3)]
    gain = statement.max_error - losses
    cautious = gain - gain.std(0, ddof=1) / math.sqrt(len(gain))
    bets = _TRIED_BETS * LARGEST_BET / (1 - statement.max_error)
    lowest = -(1 - statement.max_error)
    grows = [np.log1p(bet * cautious.clip(min=lowest)).mean(0) for bet in bets]
    main = np.max(grows, 0).argmax(-1)
    half = np.take_along_axis(kept, main[:, None], -1) / 2
    return [Start(main, 0.9), Start((kept < half).sum(-1).clip(max=main), 0.1)]


def choose(
    losses: Floats, statement: Statement, starts: Sequence[Start]
) -> tuple[Integers, Floats | None]:
    """The loosest certified level of every class, and the p-values of all levels.

    From every start rules are tested in the order of the grid, each at that start's share of
    ``delta / C``, up to the first that is not proven (fixed-sequence testing).

    Args:
        losses: ``[n, C, A]``, images in the order of the bets.
        statement: what is certified.
        starts: shares of at most 1 together, chosen without these images.

    Returns:
        int64 ``[C]``, -1 where no level is certified; ``[C, A]``, None for ``"crc"``.
    """
    if statement.method == "crc":
        return (_expected(losses) <= statement.max_error).sum(-1) - 1, None
    each = statement.delta / losses.shape[1]
    p = p_values(losses, statement.max_error, delta=each, pvalue=statement.pvalue)
    level = np.arange(p.shape[-1])
    best = np.full(len(p), -1, np.int64)
    for start in starts:
        stricter = level < start.levels[:, None]
        passed = fixed_sequence(np.where(stricter, 0.0, p), each * start.share)
        best = np.maximum(best, np.where(passed > start.levels, passed - 1, -1))
    return best, p


def _expected(losses: Floats) -> Floats:
    """Conformal risk control's bound on the expectation, ``[C, A]``, growing along A."""
    return np.asarray(
        (np.maximum.accumulate(losses, -1).sum(0) + 1) / (len(losses) + 1), np.float64
    )


def fewest_images(statement: Statement, classes: int, starts: Sequence[Start]) -> int:
    """The fewest images that could certify, were every label kept and right."""
    if statement.method == "crc":
        return math.ceil(1 / Fraction(str(statement.max_error))) - 1
    share = max(start.share for start in starts)
    return images_needed(statement.max_error, statement.delta * share / classes, statement.pvalue)
