"""Exact bounds on how many of N things are wrong, from a random sample drawn without replacement.

``size`` is N, ``wrong`` the number of wrong things among all, ``answers`` the number drawn,
``seen`` the number of wrong ones drawn. Where N is large all of this is the binomial distribution;
where it is small the hypergeometric one needs fewer answers, and none where all are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
_ENDLESS = 10**15  # so large that draws without replacement are independent
_GRID = 60  # alternatives that a test at any time bets on
_SHARES = (1.0, 1.05, 1.1, 1.15, 1.2, 1.25)  # largest number of answers, in fixed numbers
_SPENDING = (0.5, 1.0, 1.5, 2.0, 3.0)  # powers of the share of answers by which delta is spent
_TIMES = ((0.4, 0.6, 0.8, 1.0), (0.5, 0.75, 1.0), (0.35, 0.55, 0.75, 1.0))


class Look(NamedTuple):
    """After so many answers the bound is certified if at most so many are wrong; -1 if none may."""

    answers: int
    wrong: int


def _falling(start: int, size: int, length: int) -> Floats:
    """Logarithms of ``start (start - 1) ...`` of 0 .. length factors, each divided by ``size``."""
    with np.errstate(divide="ignore"):
        factors = np.log(np.maximum(start - np.arange(length, dtype=np.float64), 0) / size)
    return np.concatenate([[0.0], factors.cumsum()])


def sample_probabilities(size: int, wrong: int, answers: int) -> Floats:
    """Chance of 0, 1, .. ``answers`` wrong ones, ``[answers + 1]`` (hypergeometric)."""
    seen = np.arange(answers + 1, dtype=np.float64)
    above = np.concatenate([[0.0], np.log(np.arange(1, answers + 1)).cumsum()])  # log n!
    ways = above[-1] - above - above[::-1]
    bad, good = _falling(wrong, size, answers), _falling(size - wrong, size, answers)[::-1]
    whole = _falling(size, size, answers)[-1]
    chances = np.exp(ways + bad + good - whole)
    chances[seen > wrong] = 0.0
    return np.asarray(chances / chances.sum())


def bound_at(size: int, answers: int, seen: int, delta: float) -> int:
    """The largest number of wrong ones under which so few are seen with a chance above ``delta``.

    The one-sided bound of Clopper and Pearson for a finite population.

    Example:
        >>> from cpseg.certification.finite_bounds import bound_at
        >>> bound_at(10**7, 45, 0, 0.1) / 10**7 < 0.05, bound_at(20, 20, 3, 0.1)
        (True, 3)
    """
    return _largest(
        seen, size - answers + seen, lambda wrong: _tail(size, wrong, answers, seen) > delta
    )


def _tail(size: int, wrong: int, answers: int, seen: int) -> float:
    return float(sample_probabilities(size, wrong, answers)[: seen + 1].sum())


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest whole number in low .. high that holds, where smaller ones hold; at least low."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


# --- a few planned looks -----------------------------------------------------------------------


def _stopped(size: int, wrong: int, looks: Sequence[Look], last: int | None = None) -> Floats:
    """Chance to have certified for the first time at each look, ``[looks]``.

    ``last`` takes the place of the last look's number of wrong ones.
    """
    chances = []
    alive = np.ones(1)  # chance of every number seen so far, where nothing was certified
    before = 0
    for number, look in enumerate(looks):
        alive = _drawn(alive, size, wrong, before, look.answers - before)
        limit = look.wrong if last is None or number < len(looks) - 1 else last
        chances.append(alive[: limit + 1].sum())
        alive[: limit + 1] = 0.0
        before = look.answers
    return np.array(chances)


def _drawn(alive: Floats, size: int, wrong: int, before: int, more: int) -> Floats:
    """Chances of the number of wrong ones after ``more`` further draws."""
    after = np.zeros(len(alive) + more)
    if before == 0 or size == _ENDLESS:  # the first draws do not change the others
        return np.convolve(alive, sample_probabilities(size - before, wrong, more))
    for seen in np.flatnonzero(alive):
        left = wrong - int(seen)
        if left >= 0:
            chances = sample_probabilities(size - before, left, more)
            after[seen : seen + more + 1] += alive[seen] * chances
    return after


def planned_looks(
    size: int,
    max_error: float,
    delta: float,
    times: Sequence[int],
    power: float,
    shares: Sequence[float] | None = None,
) -> tuple[Look, ...]:
    """How many may be wrong at each look, so that a false certificate has a chance of ``delta``.

    Up to a look with a share t of all answers, ``delta * t ** power`` is spent; what a look cannot
    spend, since numbers are whole, is left to the later ones. The shares are those of the last of
    ``times`` unless they are given.

    Reference:
        Lan & DeMets (1983), Discrete sequential boundaries, with the power family of Kim & DeMets.

    Example:
        >>> from cpseg.certification.finite_bounds import planned_looks
        >>> planned_looks(10**6, 0.05, 0.1, (45,), 1.0)
        (Look(answers=45, wrong=0),)
    """
    wrong = least_false(size, max_error)
    looks: list[Look] = []
    alive, before, spent = np.ones(1), 0, 0.0
    shares = [answers / times[-1] for answers in times] if shares is None else shares
    for answers, share in zip(times, shares, strict=True):
        alive = _drawn(alive, size, wrong, before, answers - before)
        allowed = delta * share**power - spent
        limit = int(np.searchsorted(alive.cumsum(), allowed, side="right")) - 1
        spent += float(alive[: limit + 1].sum())
        alive[: limit + 1] = 0.0
        looks.append(Look(answers, limit))
        before = answers
    return tuple(looks)


def least_false(size: int, max_error: float) -> int:
    """The fewest wrong ones of which "at most ``max_error``" is false."""
    return math.floor(max_error * size + 1e-9) + 1


def bound_at_look(size: int, looks: Sequence[Look], number: int, seen: int, delta: float) -> int:
    """The bound on the number of wrong ones where one stops at look ``number`` with ``seen`` wrong.

    One stops at the first look that certifies, or at the last. Outcomes are ordered by stages:
    stopping earlier, or at this look with fewer wrong ones, speaks for fewer wrong ones.

    Reference:
        Jennison & Turnbull (2000), Group sequential methods, section 8.4 (stage-wise ordering).
    """
    up_to = looks[: number + 1]
    answers = looks[number].answers

    def possible(wrong: int) -> bool:
        return float(_stopped(size, wrong, up_to, seen).sum()) > delta

    return _largest(seen, size - answers + seen, possible)


def rough_number(size: int, max_error: float, delta: float, expected: float) -> float:
    """About :func:`fixed_number` for a chance of 90 %, at once, by the normal approximation."""
    normal = NormalDist()
    spread = max(normal.inv_cdf(1 - delta), 0.0) * math.sqrt(max_error * (1 - max_error))
    spread += normal.inv_cdf(0.9) * math.sqrt(expected * (1 - expected))
    none_wrong = math.log(delta) / math.log1p(-max_error)
    endless = max(none_wrong, (spread / (max_error - expected)) ** 2)
    return endless / (1 + endless / size)


def fixed_number(
    size: int, max_error: float, delta: float, expected: float, power: float = 0.9
) -> int:
    """The fewest answers that certify with a chance of ``power`` where ``expected`` are wrong.

    All N where no smaller number does.
    """
    wrong, truly = least_false(size, max_error), round(expected * size)
    answers = 0
    # Each number of wrong ones allowed is best with the fewest answers that allow it.
    for limit in range(size):
        answers = _fewest(size, wrong, limit, delta, answers + 1)
        if answers >= size or _tail(size, truly, answers, limit) >= power:
            break
    return min(answers, size)


def _fewest(size: int, wrong: int, limit: int, delta: float, low: int) -> int:
    """The fewest answers, ``low`` or more, that certify with ``limit`` wrong ones; N if none do."""

    def allows(answers: int) -> bool:
        return answers >= size or _tail(size, wrong, answers, limit) <= delta

    step = 1
    while not allows(low + step - 1):
        low, step = low + step, 2 * step
    high = min(low + step - 1, size)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if allows(middle) else (middle + 1, high)
    return low


def best_looks(
    size: int, max_error: float, delta: float, expected: float, power: float = 0.9
) -> tuple[Look, ...]:
    """Three or four looks with the fewest answers on average where ``expected`` are wrong.

    The last look is at no more than 1.25 times the fixed number of the same ``power``.
    """
    fixed = fixed_number(size, max_error, delta, expected, power)
    best: tuple[int, ...] = (fixed,)
    spent = 1.0
    # Where few of many are drawn, the search is as good with a folder without end, and faster.
    near = size if size < 20 * fixed else _ENDLESS
    least, truly = float(fixed), round(expected * near)
    for share in _SHARES:
        most = min(size, math.floor(share * fixed))
        for shares in _TIMES:
            times = sorted({max(1, round(part * most)) for part in shares})
            for spending in _SPENDING:
                looks = planned_looks(near, max_error, delta, times, spending)
                chances = _stopped(near, truly, looks)
                if chances.sum() < power:
                    continue
                mean = float(most - (most - np.array(times)) @ chances)
                if mean < least:
                    best, spent, least = tuple(times), spending, mean
    looks = planned_looks(size, max_error, delta, best, spent)
    return tuple(look for look in looks if look.wrong >= 0) or looks[-1:]


def average_answers(size: int, looks: Sequence[Look], expected: float) -> float:
    """Answers up to the first look that certifies, or the last, where ``expected`` are wrong."""
    chances = _stopped(size, round(expected * size), looks)
    most = looks[-1].answers
    saved = most - np.array([look.answers for look in looks])
    return float(most - saved @ chances)


# --- at any time -------------------------------------------------------------------------------


def _alternatives(size: int, max_error: float) -> Integers:
    """Numbers of wrong ones that a test at any time bets on."""
    shares = max_error * np.linspace(0.0, 1.0, _GRID, endpoint=False)
    return np.unique((shares * size).astype(np.int64))


def wealth(size: int, wrong: int, max_error: float, answers: Integers, seen: Integers) -> Floats:
    """Wealth after so many answers with so many wrong ones, elementwise.

    The mean likelihood ratio of fewer wrong ones, evenly up to ``max_error``, to ``wrong``. Under
    ``wrong`` or more of them it is a supermartingale that starts at 1 or less, so it ever reaches
    1 / delta with a chance of delta at most.

    Reference:
        Waudby-Smith & Ramdas (2020), Confidence sequences for sampling without replacement;
        Robbins (1970), Statistical methods related to the law of the iterated logarithm (mixtures).
    """
    most = int(answers.max(initial=0))
    right = answers - seen
    bets = _alternatives(size, max_error)
    base_bad, base_good = _falling(wrong, size, most), _falling(size - wrong, size, most)
    total = np.zeros(np.broadcast_shapes(answers.shape, seen.shape))
    with np.errstate(invalid="ignore", over="ignore"):
        for bet in bets[bets < wrong]:
            bad = (_falling(int(bet), size, most) - base_bad)[seen]
            good = (_falling(size - int(bet), size, most) - base_good)[right]
            total += np.nan_to_num(np.exp(bad + good), nan=0.0, posinf=np.inf)
    return total / len(bets)


def bound_at_any_time(size: int, max_error: float, seen: Integers, delta: float) -> int:
    """The bound on the number of wrong ones, from the running number seen ``[n]``.

    It holds at every number of answers at once. ``max_error`` only says where it is sharpest.
    """
    answers = np.arange(1, len(seen) + 1)

    def possible(wrong: int) -> bool:
        return bool(wealth(size, wrong, max_error, answers, seen).max(initial=0) < 1 / delta)

    return _largest(int(seen[-1]), size - len(seen) + int(seen[-1]), possible)


def allowed_at_any_time(size: int, max_error: float, delta: float, answers: int) -> Integers:
    """The most wrong ones with which n answers certify, ``[answers + 1]`` for n = 0, 1, ..."""
    wrong = least_false(size, max_error)
    number = np.arange(answers + 1)
    low, high = np.full(answers + 1, -1), np.minimum(number, wrong - 1)
    while (low < high).any():
        middle = (low + high + 1) // 2
        enough = wealth(size, wrong, max_error, number, middle.clip(min=0)) >= 1 / delta
        enough |= middle + size - number < wrong  # however those left may be
        low, high = np.where(enough, middle, low), np.where(enough, high, middle - 1)
    return low


def number_at_any_time(
    size: int, max_error: float, delta: float, expected: float, power: float = 0.9
) -> int:
    """Answers within which the test at any time certifies with a chance of ``power``.

    All N where no smaller number does.
    """
    fixed = fixed_number(size, max_error, delta, expected, power)
    most = min(size, 4 * fixed + 50)
    allowed = allowed_at_any_time(size, max_error, delta, most)
    alive, first = np.ones(1), 0  # chances of ``first``, ``first + 1`` ... wrong ones
    truly = round(expected * size)
    done = 0.0
    for answers in range(1, most + 1):
        seen = first + np.arange(len(alive))
        chance = ((truly - seen) / (size - answers + 1)).clip(0, 1)
        alive = np.append(alive * (1 - chance), 0.0) + np.append(0.0, alive * chance)
        certified = max(int(allowed[answers]) + 1 - first, 0)
        done += float(alive[:certified].sum())
        alive, first = alive[certified:], first + min(certified, len(alive))
        if done >= power or len(alive) == 0:
            return answers
        if alive[-1] < 1e-15:
            alive = alive[:-1]
    return most
