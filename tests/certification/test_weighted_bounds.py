"""Bounds from answers of unequal weight: the wealth by hand, and coverage in simulated draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import helpers  # noqa: F401  (the profile of hypothesis)

from cpseg.certification.weighted_bounds import (
    Evidence,
    any_bets,
    bets_for,
    rate_bound,
    wealth_path,
)


def evidence(value: np.ndarray, largest: float = 1.0, bets: np.ndarray | None = None) -> Evidence:
    bets = any_bets(largest) if bets is None else bets
    return Evidence(value, np.ones(len(value)), np.zeros(len(value)), largest, bets)


@given(st.lists(st.floats(-1, 2), min_size=1, max_size=6), st.floats(0.01, 1))
def test_wealth_is_the_mean_over_the_bets(values: list[float], rate: float) -> None:
    bets, unit, shift = [0.1, 0.3], 0.5, 0.02
    given_ = Evidence(
        np.array(values),
        np.full(len(values), unit),
        np.full(len(values), shift),
        2.0,
        np.array(bets),
    )
    for number in range(len(values)):
        wealths = [
            math.prod(1 + bet * (unit * max(rate - shift, 0) - v) for v in values[: number + 1])
            for bet in bets
        ]
        assert wealth_path(given_, rate)[number] == pytest.approx(sum(wealths) / len(bets))


def test_the_bound_is_the_first_millionth_that_is_ruled_out() -> None:
    given_ = evidence(np.zeros(60))
    bound = rate_bound(given_, 0.1)
    assert wealth_path(given_, bound).max() >= 10
    assert wealth_path(given_, bound - 1e-6).max() < 10
    assert 0.03 < bound < 0.1
    assert rate_bound(evidence(np.zeros(0)), 0.1) == 1.0
    assert rate_bound(evidence(np.ones(50)), 0.1) == 1.0


@given(st.lists(st.booleans(), min_size=1, max_size=80))
def test_more_wrong_answers_never_lower_the_bound(wrong: list[bool]) -> None:
    value = np.array(wrong, np.float64)
    better = value.copy()
    better[np.argmax(value)] = 0.0
    assert rate_bound(evidence(better), 0.1) <= rate_bound(evidence(value), 0.1)
    assert rate_bound(evidence(value), 0.05) >= rate_bound(evidence(value), 0.1)


@given(st.floats(0.001, 0.5), st.floats(0, 0.99), st.floats(0, 1), st.floats(1, 3))
def test_no_bet_can_ruin(rate: float, share: float, variance: float, largest: float) -> None:
    for bets in (any_bets(largest), bets_for(rate, share * rate, variance, largest)):
        assert (bets > 0).all()
        assert (bets * largest < 1).all()


@pytest.mark.parametrize("informed", [True, False])
def test_coverage_at_any_time_of_weighted_answers(informed: bool) -> None:
    """20,000 draws of 300 answers from labels at the bound; false alarm below 1e-6."""
    random = np.random.default_rng(4)
    size, rate, delta, folders = 2_000, 0.05, 0.1, 20_000
    predicted = random.beta(0.12, 3.9, size)
    wrong = np.zeros(size, bool)
    order = np.argsort(-predicted) if informed else random.permutation(size)
    wrong[order[: int(rate * size)]] = True
    chance = 0.5 / size + 0.5 * np.sqrt(predicted) / np.sqrt(predicted).sum()
    value = (wrong - predicted) / (size * chance) + predicted.mean()
    assert chance @ value == pytest.approx(rate)
    largest = 2 + predicted.mean()
    assert value.max() <= largest
    bets = bets_for(rate, 0.02, float(chance @ value**2), largest)
    picks = np.searchsorted(chance.cumsum() / chance.sum(), random.random((folders, 300)))
    gain = rate - value[picks]
    wealth = np.mean([np.exp(np.log1p(bet * gain).cumsum(1)) for bet in bets], 0)
    first = evidence(value[picks[0]], largest, bets)
    np.testing.assert_allclose(wealth_path(first, rate), wealth[0])
    false = (wealth.max(1) >= 1 / delta).mean()
    assert false <= delta + 5 * math.sqrt(delta * (1 - delta) / folders)
    # The bound says the same as the wealth at the true rate.
    for row in picks[:40]:
        drawn = evidence(value[row], largest, bets)
        assert (rate_bound(drawn, delta) <= rate) == bool(
            wealth_path(drawn, rate).max() >= 1 / delta
        )
