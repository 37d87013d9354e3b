"""Law 1 (rank), law 2 (leave-one-out), law 4 (nested), and the quantile of stacked scores."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support import oracles
from tests.support.helpers import raises, same, seeded
from torch import Tensor

from cpseg import conformal_quantile, conformal_rank, nonconformity
from cpseg.core.quantiles import from_top, from_top_of_counts

INF, NAN = math.inf, math.nan
ALPHAS = ("0.05", "0.1", "0.2", "0.5", "0.9", "0.0003333333333333333")


# --- law 1 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alpha", [0.1, "0.1", "1e-1", "1/10", Fraction(1, 10), np.float32(0.1), np.float64(0.1)]
)
def test_rank_takes_alpha_as_the_decimal_that_was_written(alpha: Any) -> None:
    assert conformal_rank(29, alpha) == 27


@pytest.mark.parametrize("n", [0, 1, 2, 5, 9, 10, 18, 19, 20, 29, 99, 100, 999, 10**6, 10**12])
@pytest.mark.parametrize(
    "alpha",
    ["0.05", "0.1", "0.2", "0.3", "0.7", "0.999", "1e-20", "0.00033333333333333335", "0.15"],
)
def test_rank_is_exact(n: int, alpha: str) -> None:
    assert conformal_rank(n, alpha) == oracles.rank(n, alpha)
    number = float(alpha)
    assert conformal_rank(n, number) == oracles.rank(n, str(number))
    assert conformal_rank(n, np.float64(number)) == oracles.rank(n, str(number))
    assert conformal_rank(n, Fraction(alpha)) == oracles.rank(n, alpha)


def test_rank_is_exact_wherever_the_product_is_whole() -> None:
    """Every two-decimal alpha at every n up to 400: float arithmetic fails on many of them."""
    wrong = 0
    for n, percent in itertools.product(range(400), range(1, 100)):
        want = -(-(n + 1) * (100 - percent) // 100)
        assert conformal_rank(n, percent / 100) == want
        wrong += math.ceil((n + 1) * (1 - percent / 100)) != want
    assert wrong > 0, "this test can fail"


@given(n=st.integers(0, 10**12), digits=st.integers(1, 10**20 - 1))
def test_rank_with_many_digits(n: int, digits: int) -> None:
    alpha = f"0.{digits:020d}"
    assert conformal_rank(n, alpha) == oracles.rank(n, alpha)


def test_rank_of_a_third() -> None:
    assert conformal_rank(8, Fraction(1, 3)) == 6
    assert conformal_rank(8, 1 / 3) == 7  # the float is written 0.3333333333333333, less than 1/3


@pytest.mark.parametrize(
    "alpha",
    [0.1, 0.05, 0.5, 0.999, 0.001 / 3, "1e-20", 1e-20, "0.99999999999999999999", "0." + "3" * 30],
)
@pytest.mark.parametrize("most", [0, 1, 19, 3000])
def test_places_of_a_tensor_of_counts_equal_the_exact_ones(alpha: Any, most: int) -> None:
    exact = Fraction(str(alpha))
    count = torch.arange(most + 1).reshape(1, -1)
    want = torch.tensor([[from_top(n, exact) for n in range(most + 1)]])
    assert torch.equal(from_top_of_counts(count, exact, most).to(torch.int64), want)


def test_the_overflow_branch_is_really_taken() -> None:
    for alpha in (0.001 / 3, 1e-20, "0." + "3" * 30):
        exact = Fraction(str(alpha))
        assert max(3001 * exact.numerator, exact.denominator) >= 2**63


def test_places_of_large_counts() -> None:
    count = torch.tensor([0, 9, 10**9, 10**12])
    got = from_top_of_counts(count, Fraction("0.05"), 10**12)
    assert got.tolist() == [from_top(int(n), Fraction("0.05")) for n in count]


@pytest.mark.parametrize(
    "n",
    [
        -1,
        2.0,
        True,
        "3",
        None,
    ],
)
def test_rank_wants_a_whole_number(n: Any) -> None:
    with raises(ValueError, "conformal_rank", "a whole n >= 0, got"):
        conformal_rank(n, 0.1)


BAD_ALPHAS = [0, 1, 0.0, 1.0, -0.1, 1.5, NAN, INF, -INF, "x", None, True, "nan", (0.1,)]


@pytest.mark.parametrize("alpha", BAD_ALPHAS)
def test_alpha_outside_the_unit_interval(alpha: Any) -> None:
    with raises(ValueError, "conformal_rank", r"alpha in \(0, 1\), got"):
        conformal_rank(9, alpha)
    with raises(ValueError, "conformal_quantile", r"alpha in \(0, 1\), got"):
        conformal_quantile(torch.rand(9), alpha)


def test_alpha_one_over_zero() -> None:
    with raises(ValueError, "conformal_rank", r"alpha in \(0, 1\), got '1/0'"):
        conformal_rank(9, "1/0")


# --- law 2 -------------------------------------------------------------------------------------


def covered(scores: Tensor, alpha: str) -> Tensor:
    """How many of the n + 1 scores ``[n + 1, cases]`` are at most the quantile of the others."""
    number = 0
    for i in range(len(scores)):
        others = torch.cat([scores[:i], scores[i + 1 :]])
        number = number + (scores[i] <= conformal_quantile(others, alpha)).to(torch.int64)
    return torch.as_tensor(number)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_leave_one_out_for_every_tuple_of_small_scores(n: int) -> None:
    every = torch.tensor(list(itertools.product((0.0, 1.0, 2.0, INF), repeat=n + 1))).T
    alphas = {Fraction(j, n + 1) for j in range(1, n + 1)} | {Fraction(j, 20) for j in range(1, 20)}
    for alpha in sorted(alphas):
        least = math.ceil((n + 1) * (1 - alpha))
        number = covered(every, str(alpha))
        assert int(number.min()) >= least
        # No more than needed where there are no ties: the quantile is not merely large.
        distinct = torch.arange(n + 1.0)[:, None]
        assert int(covered(distinct, str(alpha))) == least


@given(
    scores=st.lists(
        st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, 0.5, 1.0]),
        min_size=2,
        max_size=40,
    ),
    percent=st.integers(1, 99),
)
def test_leave_one_out_for_any_scores(scores: list[float], percent: int) -> None:
    alpha = f"{percent / 100}"
    number = int(covered(torch.tensor(scores)[:, None], alpha))
    assert number >= math.ceil(len(scores) * (1 - Fraction(alpha)))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda n, alpha: max(0, (n + 1) * alpha.numerator // alpha.denominator + 1),  # off by one
        lambda n, alpha: n - math.ceil(n * (1 - alpha)) + 1,  # ceil(n (1 - alpha)): no + 1
    ],
)
def test_leave_one_out_catches_a_wrong_rank(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    monkeypatch.setattr("cpseg.core.quantiles.from_top", wrong)
    monkeypatch.setattr(
        "cpseg.core.quantiles.from_top_of_counts",
        lambda count, alpha, most: torch.full_like(count, wrong(most, alpha)),
    )
    with pytest.raises(AssertionError):
        test_leave_one_out_for_every_tuple_of_small_scores(4)


# --- the quantile of stacked scores ------------------------------------------------------------

SCORES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0, -3.0, 7.6, INF, -INF, NAN])


@given(
    rows=st.lists(st.lists(SCORES, min_size=3, max_size=3), min_size=1, max_size=25),
    alpha=st.sampled_from(ALPHAS),
)
def test_quantile_equals_sorting_a_list(rows: list[list[float]], alpha: str) -> None:
    scores = torch.tensor(rows)
    want = [oracles.quantile(column.tolist(), alpha) for column in scores.T]
    assert same(conformal_quantile(scores, alpha), torch.tensor(want))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_quantile_along_any_axis(dim: int) -> None:
    scores = torch.rand(7, 8, 9, generator=seeded(3))
    got = conformal_quantile(scores, 0.2, dim=dim)
    want = np.apply_along_axis(lambda x: oracles.quantile(x.tolist(), "0.2"), dim, scores.numpy())
    assert same(got, want.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_quantile_is_one_of_the_scores(dtype: torch.dtype) -> None:
    scores = torch.rand(25, 4, generator=seeded(4), dtype=torch.float64).to(dtype)
    got = conformal_quantile(scores, 0.1)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for column, value in zip(scores.T, got, strict=True):
        assert value.item() == oracles.quantile(column.tolist(), "0.1")


def test_no_score_or_too_few_give_infinity() -> None:
    scores = torch.tensor([[0.1, NAN, 0.1], [0.2, NAN, 0.3]])
    assert conformal_quantile(scores, 0.5).tolist() == [pytest.approx(0.2), INF, pytest.approx(0.3)]
    assert conformal_quantile(scores, 0.3).tolist() == [INF] * 3
    assert conformal_quantile(torch.rand(18), 0.05).item() == INF
    assert conformal_quantile(torch.rand(19), 0.05).item() < INF
    assert conformal_quantile(torch.rand(5, 2), 1e-20).tolist() == [INF, INF]


def test_minus_infinity_is_a_score_and_nan_is_none() -> None:
    scores = torch.tensor([-INF, -INF, NAN, 3.0])
    assert conformal_quantile(scores, "0.5").item() == -INF  # second of three


def test_quantile_leaves_its_input_alone() -> None:
    scores = torch.tensor([0.3, NAN, 0.1])
    before = scores.clone()
    conformal_quantile(scores, 0.5)
    conformal_quantile(scores, 0.5, rule="linear")
    assert same(scores, before)


@given(seed=st.integers(0, 999), n=st.integers(1, 30))
def test_thresholds_are_nested_in_alpha(seed: int, n: int) -> None:
    scores = (torch.rand(n, 6, generator=seeded(seed)) * 8).round() / 8
    last = torch.full((6,), INF)
    for percent in range(1, 100, 7):
        now = conformal_quantile(scores, percent / 100)
        assert (now <= last).all()
        last = now


def test_order_does_not_matter() -> None:
    scores = torch.rand(31, 5, generator=seeded(5))
    scores[3, 2] = NAN
    shuffled = scores[torch.randperm(31, generator=seeded(6))]
    assert same(conformal_quantile(scores, 0.1), conformal_quantile(shuffled, 0.1))


# --- rule="linear" -----------------------------------------------------------------------------


def test_linear_is_nanquantile() -> None:
    scores = torch.rand(13, 4, 5, generator=seeded(7))
    scores[2, 1, 1] = scores[5, 1, 1] = NAN
    scores[:, 3, 3] = NAN
    for alpha in (0.05, 0.1, 0.5):
        got = conformal_quantile(scores, alpha, rule="linear")
        assert same(got, scores.nanquantile(1 - alpha, dim=0))
        assert got[3, 3].isnan()
        with np.errstate(all="ignore"):
            columns = scores.reshape(13, -1).T.numpy()
            want = [np.nanquantile(c, 1 - alpha) if c[0] == c[0] else NAN for c in columns]
        torch.testing.assert_close(got.flatten(), torch.tensor(want).float(), equal_nan=True)


def test_linear_along_other_axes_and_for_one_axis() -> None:
    scores = torch.rand(5, 6, generator=seeded(8))
    assert same(
        conformal_quantile(scores, 0.2, dim=1, rule="linear"), scores.nanquantile(0.8, dim=1)
    )
    got = conformal_quantile(scores[0], 0.2, rule="linear")
    assert got.shape == ()
    assert same(got, scores[0].nanquantile(0.8))


@pytest.mark.parametrize("kind", ["per class and cell", "per class", "classes stacked", "pooled"])
def test_linear_curves_are_those_of_nanquantile(kind: str) -> None:
    """As published: the score of the true class alone, NaN elsewhere. Per class at every cell, per
    class over the cells, images and classes in one stack, and everything in one."""
    probs = torch.rand(9, 3, 4, 5, generator=seeded(10))
    labels = torch.randint(3, (9, 4, 5), generator=seeded(11))
    labels[:, 0, 0] = 1  # two classes without a score at a cell
    every = torch.where(labels[:, None] == torch.arange(3).reshape(1, 3, 1, 1), 1 - probs, NAN)
    scores = {
        "per class and cell": every,
        "per class": every.movedim(1, -1).flatten(0, 2),
        "classes stacked": every.flatten(0, 1),
        "pooled": every.flatten(),
    }[kind]
    levels = [percent / 100 for percent in range(1, 100)]
    want = scores.nanquantile(torch.tensor(levels, dtype=scores.dtype), dim=0)
    got = [
        conformal_quantile(scores, Fraction(100 - percent, 100), rule="linear")
        for percent in range(1, 100)
    ]
    each = torch.stack([scores.nanquantile(level, dim=0) for level in levels])
    assert same(torch.stack(got), each)
    assert same(want, each)
    if kind == "pooled":  # the scores of the true classes and nothing else
        plain = nonconformity(probs, labels).flatten()
        assert same(got[94], plain.nanquantile(0.95))


def test_linear_in_parts() -> None:
    """More than the 16 million elements that older versions of nanquantile take at once."""
    scores = torch.rand(1, 17_000_000, generator=seeded(9))
    assert same(conformal_quantile(scores, 0.5, rule="linear"), scores[0])


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"scores": [0.1, 0.2]}, TypeError, "floating-point scores, got list"),
        ({"scores": torch.arange(5)}, TypeError, r"got torch\.int64; convert"),
        ({"scores": torch.tensor(0.5)}, ValueError, r"an axis 0, got \[\]; stack"),
        ({"dim": 2}, ValueError, r"an axis 2, got \[5, 3\]"),
        ({"dim": -3}, ValueError, r"an axis -3, got \[5, 3\]"),
        ({"scores": torch.rand(0, 3)}, ValueError, r"at least one element in scores, got \[0, 3\]"),
        ({"scores": torch.rand(3, 0)}, ValueError, "skip empty"),
        ({"rule": "higher"}, ValueError, "'conformal', 'linear', got 'higher'; choose one"),
    ],
)
def test_quantile_says_what_is_wrong(
    changes: dict[str, Any], kind: type[Exception], match: str
) -> None:
    with raises(kind, "conformal_quantile", match):
        conformal_quantile(**{"scores": torch.rand(5, 3), "alpha": 0.1, **changes})
