"""Conformal rank and the quantile of stacked scores.

The conformal quantile of n scores is their ``ceil((n + 1)(1 - alpha))``-th smallest. Counted from
the top that is the ``floor((n + 1) alpha)``-th largest, and only the largest few are ever needed.
"""

from __future__ import annotations

import operator
from fractions import Fraction

import torch
from torch import Tensor

from cpseg._internal.checks import (
    check_alpha,
    check_choice,
    check_float,
    check_not_empty,
    message,
    short,
)

RULES = ("conformal", "linear")


def conformal_rank(n: int, alpha: float | str | Fraction) -> int:
    """Rank of the conformal quantile among n scores, ``ceil((n + 1)(1 - alpha))``, exactly.

    Args:
        n: number of scores, at least 0.
        alpha: miscoverage rate in (0, 1), taken as the decimal that the caller wrote: 0.1 is 1/10.

    Returns:
        The rank, from 1; a rank above ``n`` means that the quantile is +inf.

    Raises:
        ValueError: ``alpha`` lies outside (0, 1), or ``n`` is negative.

    Reference:
        Vovk, Gammerman & Shafer (2005); Angelopoulos & Bates (2023), section 1.

    Example:
        >>> conformal_rank(29, 0.1), conformal_rank(19, 0.05), conformal_rank(18, 0.05)
        (27, 19, 19)
    """
    exact = check_alpha("conformal_rank", alpha)
    try:
        number = operator.index(n)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor without values
        number = -1
    if isinstance(n, bool) or number < 0:
        fix = "count the scores that are not NaN"
        raise ValueError(message("conformal_rank", "a whole n >= 0", short(n), fix))
    return number + 1 - from_top(number, exact)


def from_top(n: int, alpha: Fraction) -> int:
    """Which score from the top the conformal quantile is, ``floor((n + 1) alpha)``; 0: +inf."""
    return (n + 1) * alpha.numerator // alpha.denominator


def from_top_of_counts(count: Tensor, alpha: Fraction, most: int) -> Tensor:
    """:func:`from_top` for a tensor of counts, none above ``most``; no synchronisation."""
    if max((most + 1) * alpha.numerator, alpha.denominator) < 2**63:
        return (count + 1) * alpha.numerator // alpha.denominator
    # Too many decimals for int64: place j begins where n + 1 reaches j / alpha.
    places = range(1, from_top(most, alpha) + 1)
    first = [-(-place * alpha.denominator // alpha.numerator) for place in places]
    return torch.bucketize(count + 1, torch.tensor(first, device=count.device), right=True)


def conformal_quantile(
    scores: Tensor, alpha: float | str | Fraction, *, dim: int = 0, rule: str = "conformal"
) -> Tensor:
    """Quantile of stacked scores along ``dim``; NaN scores do not count.

    Args:
        scores: nonconformity scores, float, NaN where there is none.
        alpha: miscoverage rate in (0, 1).
        dim: the axis of the exchangeable units, images for instance.
        rule: ``"conformal"``, the ``ceil((n + 1)(1 - alpha))``-th smallest of the n scores, +inf
            where that rank exceeds n; ``"linear"``, the plain interpolated ``nanquantile`` of
            published code, which promises nothing (NaN where there is no score).

    Returns:
        The shape of ``scores`` without ``dim``; float32, or float64 for float64 scores.

    Raises:
        ValueError: ``alpha`` lies outside (0, 1), an unknown rule, no score axis, empty scores.
        TypeError: ``scores`` is not floating point.

    Guarantee:
        With ``rule="conformal"``, a further score exchangeable with the n given ones is at most
        this quantile with probability in [1 - alpha, 1 - alpha + 1/(n + 1)]; the upper end holds
        for scores without ties.

    Reference:
        Angelopoulos & Bates (2023), section 1; ConformalSAM (2025), section 3.3.1, for ``linear``.

    Example:
        >>> conformal_quantile(torch.arange(1.0, 20.0), 0.1)
        tensor(18.)
    """
    where = "conformal_quantile"
    exact = check_alpha(where, alpha)
    check_float(where, scores, name="scores", fix="convert them to float32")
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(message(where, "dim as int", short(dim), "pass the number of an axis"))
    if scores.ndim == 0 or not -scores.ndim <= dim < scores.ndim:
        expected, got = f"scores with an axis {short(dim)}", str(list(scores.shape))
        raise ValueError(message(where, expected, got, "stack the scores along that axis"))
    check_not_empty(where, scores, name="scores")
    check_choice(where, rule, RULES, name="rule")
    if scores.dtype != torch.float64:
        scores = scores.to(torch.float32)
    if rule == "linear":
        return _linear_quantile(scores, float(1 - exact), dim)
    missing = scores.isnan()
    count = (~missing).sum(dim)
    filled = scores.masked_fill(missing, -torch.inf)
    return top_quantile(filled, count, exact, most=scores.shape[dim], dim=dim)


def _linear_quantile(scores: Tensor, q: float, dim: int) -> Tensor:
    """``torch.nanquantile``, in parts that stay under its limit of 16 million elements."""
    stacked = scores.movedim(dim, 0)
    cells = stacked.reshape(stacked.shape[0], -1)
    step = max(1, 2**24 // len(cells))
    starts = range(0, cells.shape[1], step)
    parts = [cells[:, start : start + step].nanquantile(q, dim=0) for start in starts]
    return torch.cat(parts).reshape(stacked.shape[1:])


def top_quantile(
    scores: Tensor, count: Tensor, alpha: Fraction, *, most: int, dim: int = 0
) -> Tensor:
    """The conformal quantile of cells that hold ``count <= most`` scores, -inf where none is left.

    ``scores`` need only hold the ``from_top(most, alpha)`` largest of each cell.
    """
    rows = from_top(most, alpha)
    if rows == 0:
        return torch.full_like(scores.select(dim, 0), torch.inf)
    top = scores.amax(dim, keepdim=True) if rows == 1 else scores.topk(rows, dim).values
    place = from_top_of_counts(count, alpha, most)
    value = top.gather(dim, (place - 1).clamp(min=0).unsqueeze(dim)).squeeze(dim)
    return torch.where(place > 0, value, torch.inf)
