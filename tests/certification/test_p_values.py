"""P-values: naive formulas, laws, and how often they reject what is true."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from tests.support import helpers  # noqa: F401  (the profile of hypothesis)

from cpseg.calibration.certificate import (
    PVALUES,
)
from cpseg.certification.p_values import (
    Floats,
    betting,
    fixed_sequence,
    hoeffding_bentkus,
    images_needed,
    p_values,
)

FALSE_ALARM = 1e-7  # of one binomial check; below 1e-6 for each test here


def naive_betting(losses: list[float], m: float, delta: float) -> float:
    """The wealth, image after image."""
    n, wealth, best = len(losses), 1.0, 1.0
    total, squares, variance = 0.5, 0.25, 0.25
    for i, loss in enumerate(losses, 1):
        bet = min(math.sqrt(2 * math.log(1 / delta) / (n * variance)), 0.97 / (1 - m))
        wealth *= 1 - bet * (loss - m)
        best = max(best, wealth)
        total += loss
        squares += (loss - total / (i + 1)) ** 2
        variance = squares / (i + 1)
    return 1 / best


def naive_hoeffding_bentkus(losses: list[float], m: float) -> float:
    n, total = len(losses), math.fsum(losses)
    mean = total / n
    hoeffding = 1.0
    if mean < m:
        parts = [(a, math.log(a / b)) for a, b in ((mean, m), (1 - mean, 1 - m)) if a > 0]
        hoeffding = math.exp(-n * sum(a * log for a, log in parts))
    most = math.ceil(total)
    tail = sum(math.comb(n, k) * m**k * (1 - m) ** (n - k) for k in range(most + 1))
    return min(hoeffding, math.e * tail, 1.0)


LOSSES = st.lists(st.sampled_from([0.0, 0.0, 0.01, 0.05, 0.125, 0.5, 1.0]), min_size=1, max_size=60)
RATES = st.sampled_from([0.01, 0.05, 0.1, 0.3, 0.7])


@given(losses=LOSSES, m=RATES, delta=RATES)
def test_both_are_their_formulas(losses: list[float], m: float, delta: float) -> None:
    array = np.array(losses)
    assert betting(array, m, delta=delta) == pytest.approx(naive_betting(losses, m, delta), 1e-9)
    assert hoeffding_bentkus(array, m) == pytest.approx(naive_hoeffding_bentkus(losses, m), 1e-9)


@given(losses=LOSSES, m=RATES, higher=RATES)
@pytest.mark.parametrize("pvalue", PVALUES)
def test_a_larger_bound_is_easier_to_prove(
    pvalue: str, losses: list[float], m: float, higher: float
) -> None:
    array = np.array(losses)
    low, high = (
        p_values(array, x, delta=0.1, pvalue=pvalue) for x in sorted((m, higher), reverse=True)
    )
    assert 0 <= low <= high + 1e-12 <= 1 + 1e-12


@pytest.mark.parametrize("pvalue", PVALUES)
def test_columns_are_tested_side_by_side(pvalue: str) -> None:
    losses = np.random.default_rng(0).beta(0.5, 6, (40, 3, 5))
    together = p_values(losses, 0.1, delta=0.1, pvalue=pvalue)
    assert together.shape == (3, 5)
    for c, a in np.ndindex(3, 5):
        alone = p_values(losses[:, c, a], 0.1, delta=0.1, pvalue=pvalue)
        assert together[c, a] == pytest.approx(float(alone), rel=1e-12)


@pytest.mark.parametrize("pvalue", PVALUES)
def test_losses_at_the_bound_prove_nothing(pvalue: str) -> None:
    assert p_values(np.full(50, 0.1), 0.1, delta=0.1, pvalue=pvalue) == 1
    assert p_values(np.full(50, 0.9), 0.1, delta=0.1, pvalue=pvalue) == 1


@pytest.mark.parametrize("max_error", [0.02, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("delta", [0.3, 0.1, 0.01])
def test_the_fewest_images(max_error: float, delta: float) -> None:
    bound = next(n for n in range(1, 999) if (1 - max_error) ** n <= delta)
    for pvalue in PVALUES:
        needed = images_needed(max_error, delta, pvalue)

        def rejects(n: int, pvalue: str = pvalue) -> bool:
            return bool(p_values(np.zeros(n), max_error, delta=delta, pvalue=pvalue) <= delta)

        assert rejects(needed)
        assert not any(rejects(n) for n in range(1, needed))
        # Betting starts with small bets: 2 more at 5 % and 0.1, never a tenth more.
        more = 0 if pvalue == "hoeffding-bentkus" else max(2, bound // 10)
        assert bound <= needed <= bound + more
    assert images_needed(0.05, 0.1, "betting") == 47
    assert images_needed(1e-9, 0.1, "betting") > 2 * 10**9, "without trying them"


def test_one_early_loss_of_1_is_not_the_end() -> None:
    losses = np.full(80, 0.03)
    losses[0] = 1.0
    assert betting(losses, 0.1, delta=0.1) < 0.1
    assert betting(np.roll(losses, 10), 0.1, delta=0.1) < 0.25


def test_betting_uses_a_low_variance() -> None:
    losses = np.random.default_rng(0).beta(1.2, 18.8, 80)  # mean 0.06
    assert betting(losses, 0.1, delta=0.1) < 0.1 < hoeffding_bentkus(losses, 0.1)


# How often a true hypothesis is rejected


def draws(world: str, n: int, sets: int, m: float) -> Floats:
    """Losses whose mean is exactly ``m``, ``[n, sets]``."""
    rng = np.random.default_rng(7)
    if world == "sparse":
        return (rng.random((n, sets)) < m).astype(float)
    if world == "skewed":
        return rng.choice([0.0, m, 1.0], (n, sets), p=[0.5 - m / 2, 0.5, m / 2])
    return rng.beta(m * 20, (1 - m) * 20, (n, sets))


def rejections(p: Floats, delta: float) -> int:
    return int((p <= delta).sum())


WORLDS = ["sparse", "skewed", "beta"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("pvalue", PVALUES)
def test_a_true_hypothesis_is_rejected_at_most_as_often_as_allowed(world: str, pvalue: str) -> None:
    sets = 4000
    for n in (30, 80):
        for m in (0.05, 0.1):
            losses = draws(world, n, sets, m)
            assert losses.max() <= 1
            for delta in (0.1, 0.3):
                p = p_values(losses, m, delta=delta, pvalue=pvalue)
                assert rejections(p, delta) <= binom.isf(FALSE_ALARM, sets, delta)


def in_lucky_order(losses: Floats, m: float, delta: float) -> Floats:
    return betting(np.sort(losses, 0), m, delta=delta)


def by_the_normal_law(losses: Floats, m: float, delta: float) -> Floats:
    error = np.sqrt(losses.var(0, ddof=1) / len(losses)) + 1e-12
    return np.vectorize(math.erfc)((m - losses.mean(0)) / error / math.sqrt(2)) / 2


def knowing_the_next_loss(losses: Floats, m: float, delta: float) -> Floats:
    wealth = np.where(losses < m, 1 + (m - losses) / (1 - m), 1.0)
    return np.asarray(1 / wealth.prod(0))


@pytest.mark.parametrize("wrong", [in_lucky_order, by_the_normal_law, knowing_the_next_loss])
def test_what_is_nearly_right_rejects_too_often(
    wrong: Callable[[Floats, float, float], Floats],
) -> None:
    losses = draws("sparse", 80, 4000, 0.05)
    assert rejections(wrong(losses, 0.05, 0.1), 0.1) > binom.isf(FALSE_ALARM, 4000, 0.1)


@given(p=st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.2]), min_size=1, max_size=6))
def test_a_fixed_sequence_stops_at_the_first_that_is_not_rejected(p: list[float]) -> None:
    expected = 0
    while expected < len(p) and p[expected] <= 0.1:
        expected += 1
    assert fixed_sequence(np.array([p]), 0.1).tolist() == [expected]
