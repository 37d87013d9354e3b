"""Bounds without replacement against every arrangement of small populations, and against scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, hypergeom
from tests.support import helpers  # noqa: F401  (the profile of hypothesis)

from cpseg.certification import finite_bounds
from cpseg.certification.finite_bounds import (
    Look,
    allowed_at_any_time,
    average_answers,
    best_looks,
    bound_at,
    bound_at_any_time,
    bound_at_look,
    fixed_number,
    least_false,
    number_at_any_time,
    planned_looks,
    rough_number,
    sample_probabilities,
    wealth,
)

ROUNDING = 1e-12
HUGE = 10**10


def arrangements(size: int) -> dict[int, np.ndarray]:
    """By the number of wrong ones, every order of the draw, as running numbers ``[orders, N]``."""
    every = np.array(list(itertools.product((0, 1), repeat=size)))
    return {wrong: every[every.sum(1) == wrong].cumsum(1) for wrong in range(size + 1)}


@given(st.data())
def test_sample_probabilities_are_hypergeometric(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 3000))
    wrong, answers = data.draw(st.integers(0, size)), data.draw(st.integers(0, min(size, 400)))
    expected = hypergeom(size, wrong, answers).pmf(np.arange(answers + 1))
    np.testing.assert_allclose(
        sample_probabilities(size, wrong, answers), expected, rtol=1e-8, atol=1e-12
    )


def test_sample_probabilities_of_very_many_are_binomial() -> None:
    from scipy.stats import binom

    found = sample_probabilities(10**15, 5 * 10**13, 300)
    np.testing.assert_allclose(found, binom(300, 0.05).pmf(np.arange(301)), rtol=1e-6, atol=1e-14)


@settings(max_examples=25)
@given(st.data())
def test_bound_at_is_the_largest_number_that_is_not_ruled_out(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 300))
    answers = data.draw(st.integers(1, size))
    seen = data.draw(st.integers(0, answers))
    delta = data.draw(st.sampled_from((0.5, 0.1, 0.013, 1e-6)))
    tails = [
        hypergeom(size, wrong, answers).cdf(seen)
        for wrong in range(seen, size - answers + seen + 1)
    ]
    possible = [wrong for wrong, tail in enumerate(tails, start=seen) if tail > delta]
    near = any(abs(tail - delta) < 1e-9 for tail in tails)
    assert near or bound_at(size, answers, seen, delta) == max(possible, default=seen)


def test_bound_at_of_very_many_is_that_of_clopper_and_pearson() -> None:
    for answers, seen in ((45, 0), (200, 4), (1000, 37)):
        expected = beta.ppf(0.9, seen + 1, answers - seen)
        assert bound_at(HUGE, answers, seen, 0.1) / HUGE == pytest.approx(expected, rel=1e-5)


# --- planned looks: every order of the draw ---

LOOKS = [
    (12, (3, 6, 9), 0.3, 0.2, 1.0),
    (12, (2, 3, 12), 0.2, 0.4, 0.5),
    (11, (5, 8), 0.25, 0.5, 2.0),
    (13, (4, 7, 10, 13), 0.35, 0.1, 1.5),
    (9, (9,), 0.2, 0.1, 1.0),
    (14, (3, 5, 9), 0.45, 0.3, 1.0),
]


@pytest.mark.parametrize(("size", "times", "max_error", "delta", "power"), LOOKS)
def test_planned_looks_certify_falsely_with_a_chance_of_delta(
    size: int, times: tuple[int, ...], max_error: float, delta: float, power: float
) -> None:
    looks = planned_looks(size, max_error, delta, times, power)
    assert [look.answers for look in looks] == list(times)
    for wrong, seen in arrangements(size).items():
        crossed = [seen[:, look.answers - 1] <= look.wrong for look in looks]
        if wrong > max_error * size:
            assert np.any(crossed, 0).mean() <= delta + ROUNDING
        if wrong == least_false(size, max_error):
            for number, look in enumerate(looks):
                spent = np.any(crossed[: number + 1], 0).mean()
                assert spent <= delta * (look.answers / times[-1]) ** power + ROUNDING
                # One more would have been too many.
                more = [*crossed[:number], seen[:, look.answers - 1] <= look.wrong + 1]
                full = np.any(more, 0).mean() > delta * (look.answers / times[-1]) ** power
                assert full or look.wrong + 1 > look.answers


@pytest.mark.parametrize(("size", "times", "max_error", "delta", "power"), LOOKS)
def test_bound_at_look_holds_for_the_whole_procedure(
    size: int, times: tuple[int, ...], max_error: float, delta: float, power: float
) -> None:
    looks = planned_looks(size, max_error, delta, times, power)
    bounds: dict[tuple[int, int], int] = {}
    worst = 0.0
    for wrong, orders in arrangements(size).items():
        missed = 0
        for seen in orders:
            number = next(
                (i for i, look in enumerate(looks) if seen[look.answers - 1] <= look.wrong),
                len(looks) - 1,
            )
            key = number, int(seen[looks[number].answers - 1])
            if key not in bounds:
                bounds[key] = bound_at_look(size, looks, *key, delta)
            missed += bounds[key] < wrong
        worst = max(worst, missed / len(orders))
    assert worst <= delta + ROUNDING
    assert worst > 0 or times[-1] == size  # the bound is not an empty one
    for (number, seen_), bound in bounds.items():
        certified = seen_ <= looks[number].wrong
        assert certified == (bound < least_false(size, max_error))


def test_bound_at_one_look_is_bound_at() -> None:
    for seen in range(8):
        look = (Look(30, 2),)
        assert bound_at_look(200, look, 0, seen, 0.1) == bound_at(200, 30, seen, 0.1)


@settings(max_examples=8)
@given(st.integers(60, 5000), st.sampled_from((0.5, 0.1, 0.01)))
def test_more_wrong_answers_or_an_earlier_end_order_the_bound(size: int, delta: float) -> None:
    looks = planned_looks(size, 0.2, delta, (8, 14, 20), 1.0)
    bounds = [
        bound_at_look(size, looks, number, seen, delta)
        for number, look in enumerate(looks)
        for seen in range(
            max(0, looks[number - 1].wrong + 1 if number else 0),
            (look.wrong if number < 2 else 14) + 1,
        )
    ]
    assert bounds == sorted(bounds)


# --- how many answers ---


def fewest(size: int, max_error: float, delta: float, expected: float, slack: float) -> int:
    wrong, truly = least_false(size, max_error), round(expected * size)
    for answers in range(1, size + 1):
        below = hypergeom(size, wrong, answers).cdf(np.arange(answers + 1)) <= delta + slack
        limit = int(below.sum()) - 1
        if limit >= 0 and hypergeom(size, truly, answers).cdf(limit) >= 0.9 - slack:
            return answers
    return size


@pytest.mark.nightly
@pytest.mark.parametrize("size", [1, 2, 5, 20, 21, 60, 250])
@pytest.mark.parametrize("max_error", [0.05, 0.1, 0.3, 0.999])
def test_fixed_number_is_the_fewest(size: int, max_error: float) -> None:
    for share, delta in ((0.0, 0.1), (0.4, 0.1), (0.6, 0.5), (0.6, 0.01)):
        found = fixed_number(size, max_error, delta, share * max_error)
        settings = size, max_error, delta, share * max_error
        assert fewest(*settings, 1e-9) <= found <= fewest(*settings, -1e-9)


def test_numbers_of_answers_are_those_known() -> None:
    """Fixed numbers from the binomial distribution, and about those of looking at any time."""
    known = {(0.05, 0.01): 105, (0.05, 0.018): 209, (0.05, 0.03): 628, (0.1, 0.05): 187}
    for (max_error, error), fixed in known.items():
        assert fixed_number(HUGE, max_error, 0.1, error) == fixed
        looks = best_looks(HUGE, max_error, 0.1, error)
        assert looks[-1].answers <= 1.25 * fixed
        assert average_answers(HUGE, looks, error) < fixed
        assert fixed < number_at_any_time(HUGE, max_error, 0.1, error) < 2.3 * fixed
        assert rough_number(HUGE, max_error, 0.1, error) == pytest.approx(fixed, rel=0.35)


@pytest.mark.nightly
@pytest.mark.parametrize("size", [1, 3, 19, 60, 1000, HUGE])
@pytest.mark.parametrize("delta", [0.5, 0.1, 1e-6])
@pytest.mark.parametrize("max_error", [0.01, 0.05, 0.999])
def test_best_looks_are_possible_and_certify_with_a_chance_of_90_percent(
    size: int, delta: float, max_error: float
) -> None:
    expected = 0.2 * max_error
    looks = best_looks(size, max_error, delta, expected)
    times = [look.answers for look in looks]
    assert times == sorted(set(times))
    assert times[0] >= 1
    assert times[-1] <= size
    assert all(-1 <= look.wrong < look.answers or size == look.answers for look in looks)
    truly = round(expected * size)
    assert finite_bounds._stopped(size, truly, looks).sum() >= 0.9 - 1e-6


def test_average_answers_counts_every_order() -> None:
    looks = (Look(3, 0), Look(6, 1), Look(9, 2))
    seen = arrangements(12)[3]
    first = np.where(seen[:, 2] <= 0, 3, np.where(seen[:, 5] <= 1, 6, 9))
    assert average_answers(12, looks, 0.25) == pytest.approx(first.mean())


@pytest.mark.parametrize("size", [12, 40])
def test_number_at_any_time_certifies_with_a_chance_of_90_percent(size: int) -> None:
    """In simulated draws, and not one answer earlier (false alarm below 1e-6)."""
    found = number_at_any_time(size, 0.3, 0.2, 0.1)
    allowed = allowed_at_any_time(size, 0.3, 0.2, size)
    random = np.random.default_rng(2)
    wrong = random.permuted(np.tile(np.arange(size) < round(0.1 * size), (100_000, 1)), axis=1)
    passed = wrong.cumsum(1) <= allowed[1:]
    noise = 5 * math.sqrt(0.25 / 100_000)
    assert passed[:, :found].any(1).mean() > 0.9 - noise
    assert passed[:, : found - 1].any(1).mean() < 0.9 + noise


# --- at any time ---


@pytest.mark.parametrize(("size", "max_error"), [(12, 0.2), (10, 0.34), (9, 0.5)])
def test_wealth_is_a_supermartingale_that_starts_at_one_or_less(
    size: int, max_error: float
) -> None:
    """By the exact expectation after every number of answers, under so many wrong ones or more."""
    false = least_false(size, max_error)
    for wrong, truly in itertools.product({1, (false + 1) // 2, false}, range(size + 1)):
        if truly < wrong:
            continue
        assert wealth(size, wrong, max_error, np.array(0), np.array(0)) <= 1 + ROUNDING
        for number in range(size):
            for seen in range(max(0, number - size + truly), min(number, truly) + 1):
                steps = np.array([number, number + 1, number + 1])
                now, right, bad = wealth(
                    size, wrong, max_error, steps, np.array([seen, seen, seen + 1])
                )
                chance = (truly - seen) / (size - number)
                after = sum(p * w for p, w in ((chance, bad), (1 - chance, right)) if p)
                assert not math.isfinite(now) or after <= now * (1 + 1e-9)


@pytest.mark.parametrize(("size", "max_error", "delta"), [(10, 0.3, 0.3), (9, 0.45, 0.5)])
def test_bound_at_any_time_holds_at_all_numbers_of_answers_at_once(
    size: int, max_error: float, delta: float
) -> None:
    bounds: dict[tuple[int, ...], int] = {}
    worst = 0.0
    for wrong, orders in arrangements(size).items():
        missed = 0
        for seen in orders:
            lowest = size
            for n in range(1, size + 1):
                prefix = tuple(seen[:n])
                if prefix not in bounds:
                    bounds[prefix] = bound_at_any_time(size, max_error, seen[:n], delta)
                lowest = min(lowest, bounds[prefix])
            missed += lowest < wrong
            assert bounds[tuple(seen)] == wrong  # all were drawn
        worst = max(worst, missed / len(orders))
    assert 0 < worst <= delta + ROUNDING


@pytest.mark.parametrize(("size", "max_error"), [(1, 0.05), (12, 0.3), (40, 0.05), (300, 0.1)])
@pytest.mark.parametrize("delta", [0.5, 0.1])
def test_allowed_at_any_time_is_where_the_bound_passes(
    size: int, max_error: float, delta: float
) -> None:
    most = min(size, 40)
    allowed = allowed_at_any_time(size, max_error, delta, most)
    assert allowed[0] == -1
    for n in range(1, most + 1):
        for seen in range(min(n, 3) + 1):
            # The wrong ones came first, so that nothing was certified before the last answer.
            path = np.minimum(np.arange(1, n + 1), seen)
            if n > 1 and np.any(path[:-1] <= allowed[1:n]):
                continue
            bound = bound_at_any_time(size, max_error, path, delta)
            assert (seen <= allowed[n]) == (bound < least_false(size, max_error)), (n, seen)


def test_least_false_is_exact_for_decimals() -> None:
    for size in (1, 7, 100, 1000, 10**6):
        for percent in range(1, 100):
            assert least_false(size, percent / 100) == percent * size // 100 + 1
