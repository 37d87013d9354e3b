"""The assertions pass on what is right and fail, saying why, on what is nearly right.

False alarms: ``assert_leave_one_out`` and ``assert_selection_law`` have none. A call of
``assert_coverage`` on correct code fails with probability at most 1e-6 over its seed (its default).
Some fifteen calls here must pass, and eight checks of the bounds at 1e-6: a correct library fails
this file with probability below 3e-5 over the seeds, which are fixed. That nearly right code is
rejected is a matter of power, not of that rate.
"""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import find, given, settings
from hypothesis.errors import NoSuchExample
from scipy.stats import binom
from tests.support.helpers import STANDARD, raises, same
from torch import Tensor

from cpseg import (
    Calibration,
    Calibrator,
    conformal_quantile,
    groups,
    nonconformity,
    prediction_set,
    pseudo_labels,
    testing,
)
from cpseg.testing import assertions
from cpseg.testing.assertions import assert_coverage, assert_leave_one_out, assert_selection_law

Draw = Callable[[torch.Generator, int], tuple[Tensor, Tensor]]
SIZE = (16, 16)


def fails(match: str) -> Any:
    return pytest.raises(AssertionError, match=match)


def assert_one_standard_line(caught: pytest.ExceptionInfo[AssertionError]) -> None:
    assert STANDARD.fullmatch(str(caught.value)), caught.value


# --- rules that are nearly right ---------------------------------------------------------------


def right(scores: Tensor, alpha: float) -> Tensor:
    return conformal_quantile(scores, alpha)


def kth(scores: Tensor, k: int) -> Tensor:
    ends = torch.full_like(scores[:1], math.inf)
    return torch.cat([-ends, scores.sort(0).values, ends])[min(k, len(scores) + 1)]


def rank(n: int, alpha: float) -> int:
    return math.ceil((n + 1) * (1 - Fraction(str(alpha))))


def off_by_one(scores: Tensor, alpha: float) -> Tensor:
    return kth(scores, min(rank(len(scores), alpha) - 1, len(scores)))


def missing_plus_one(scores: Tensor, alpha: float) -> Tensor:
    return kth(scores, math.ceil(len(scores) * (1 - Fraction(str(alpha)))))


def linear(scores: Tensor, alpha: float) -> Tensor:
    return conformal_quantile(scores, alpha, rule="linear")


def largest_for_infinity(scores: Tensor, alpha: float) -> Tensor:
    return kth(scores, min(rank(len(scores), alpha), len(scores)))


def too_high(scores: Tensor, alpha: float) -> Tensor:
    return kth(scores, rank(len(scores), alpha) + 1)


def infinite(scores: Tensor, alpha: float) -> Tensor:
    return torch.full_like(scores[0], math.inf)


def below_the_score(scores: Tensor, alpha: float) -> Tensor:
    """Right but for the last bit: only a comparison with the score itself sees it."""
    return torch.nextafter(right(scores, alpha), torch.tensor(-math.inf))


def of_distinct_scores(scores: Tensor, alpha: float) -> Tensor:
    """Ties taken for one score."""
    return right(scores.unique(), alpha)


TOO_LOW = [off_by_one, missing_plus_one, linear, largest_for_infinity]


# --- assert_leave_one_out ----------------------------------------------------------------------


def test_leave_one_out_holds_for_the_library() -> None:
    assert_leave_one_out(conformal_quantile, exact=True)
    assert_leave_one_out(conformal_quantile, sizes=[5, 60], alphas=[0.01, 0.3, 0.9], seed=3)


@pytest.mark.parametrize("rule", [*TOO_LOW, below_the_score, of_distinct_scores])
@pytest.mark.parametrize("sizes", [(1, 2, 3, 4), (9, 19, 29, 40)])
def test_leave_one_out_rejects(rule: Callable[..., Tensor], sizes: tuple[int, ...]) -> None:
    if rule is largest_for_infinity and sizes[0] == 9:
        sizes = (9,)  # below 19 scores alpha = 0.05 has no finite quantile
    with fails(r"assert_leave_one_out: expected at least \d+ of the \d+ scores \[") as caught:
        assert_leave_one_out(rule, sizes=sizes)
    assert_one_standard_line(caught)


@pytest.mark.parametrize("rule", [too_high, infinite])
def test_leave_one_out_rejects_more_than_needed_only_if_asked_to(
    rule: Callable[..., Tensor],
) -> None:
    assert_leave_one_out(rule)
    for sizes in ((1, 2, 3), (19, 40)):
        with fails(r"expected exactly \d+ of the"):
            assert_leave_one_out(rule, sizes=sizes, exact=True)


def test_the_counterexample_is_one() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_leave_one_out(linear, sizes=[4, 9], alphas=[0.1])
    said = str(caught.value)
    found = re.search(r"at least (\d+) of the 5 scores \[(.*?)\].* got (\d+) with", said)
    assert found, said
    s = torch.tensor([float(value) for value in found[2].split(",")])
    got = sum(
        bool(s[i] <= linear(torch.cat([s[:i], s[i + 1 :]]), 0.1)) for i in range(len(s))
    )  # the message can be replayed
    assert (int(found[1]), int(found[3])) == (rank(4, 0.1), got)
    assert got < rank(4, 0.1)
    assert "(alpha=0.1)" in said


def test_leave_one_out_tries_every_small_vector_and_asks_once_for_each() -> None:
    asked: list[tuple[float, ...]] = []

    def quantile(scores: Tensor, alpha: float) -> float:
        asked.append(tuple(scores.tolist()))
        return math.inf

    assert_leave_one_out(quantile, sizes=[3], alphas=[0.5])
    assert sorted(asked) == sorted((a, b, c) for a in range(4) for b in range(4) for c in range(4))


def test_leave_one_out_is_repeatable() -> None:
    said = []
    for seed in (0, 0, 1):
        with pytest.raises(AssertionError) as caught:
            assert_leave_one_out(off_by_one, sizes=[10], seed=seed)
        said.append(str(caught.value))
    assert said[0] == said[1] != said[2]


def test_a_quantile_that_is_nan_covers_nothing() -> None:
    with fails("got 0 with the quantiles"):
        assert_leave_one_out(lambda scores, alpha: math.nan)


# --- assert_coverage ---------------------------------------------------------------------------


def continuous(generator: torch.Generator, m: int) -> tuple[Tensor, Tensor]:
    """Cells independent of one another, scores without ties."""
    probs = torch.rand(m, 2, *SIZE, generator=generator)
    return probs, torch.randint(2, (m, *SIZE), generator=generator)


def tied(generator: torch.Generator, m: int) -> tuple[Tensor, Tensor]:
    probs, y = continuous(generator, m)
    return (probs * 4).round() / 4, y


def with_void(generator: torch.Generator, m: int) -> tuple[Tensor, Tensor]:
    """A part of every image, of another share in each, is void; empty images occur."""
    probs, y = continuous(generator, m)
    void = (
        torch.rand(m, *SIZE, generator=generator) < torch.rand(m, 1, 1, generator=generator) * 1.1
    )
    return probs, y.masked_fill(void, 255).to(torch.uint8)


def correlated(generator: torch.Generator, m: int) -> tuple[Tensor, Tensor]:
    """Hard and easy images: the pixels of an image err together."""
    hard = torch.rand(m, 1, 1, 1, generator=generator)
    noise = torch.rand(m, 2, *SIZE, generator=generator)
    _, y = continuous(generator, m)
    return 1 - (hard * 9 + noise) / 10, y


def pixelwise(probs: Tensor, y: Tensor, alpha: float) -> Calibration:
    calibrator = Calibrator(groups.pixel((y.shape[1], y.shape[2])), alpha=alpha)
    calibrator.update(probs, y)
    return calibrator.compute()


def by_rule(rule: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Calibration cell by cell with a rule for stacked scores, void or not."""

    def calibrate(probs: Tensor, y: Tensor, alpha: float) -> Tensor:
        return rule(nonconformity(probs, y), alpha)

    return calibrate


def within(threshold: Tensor, probs: Tensor) -> Tensor:
    return prediction_set(probs, threshold)


def strict(threshold: Tensor, probs: Tensor) -> Tensor:
    return 1 - probs < threshold


@pytest.mark.parametrize("draw", [continuous, tied, with_void, correlated])
@pytest.mark.parametrize(("alpha", "n"), [(0.1, 10), (0.2, 5)])
def test_pixelwise_calibration_covers(draw: Draw, alpha: float, n: int) -> None:
    assert_coverage(pixelwise, Calibration.prediction_set, draw, alpha=alpha, n=n)


def test_pixelwise_calibration_covers_exactly() -> None:
    for independent in (False, True):
        assert_coverage(
            pixelwise,
            Calibration.prediction_set,
            continuous,
            alpha=0.2,
            n=9,
            exact=True,
            independent_cells=independent,
        )


def test_coverage_with_void_counts_cells_alike_by_both_bounds() -> None:
    assert_coverage(by_rule(right), within, with_void, alpha=0.2, n=9, independent_cells=True)


@pytest.mark.parametrize("rule", TOO_LOW)
@pytest.mark.parametrize("independent", [False, True])
def test_coverage_rejects(rule: Callable[..., Tensor], independent: bool) -> None:
    n = 5 if rule is largest_for_infinity else 10
    with fails("assert_coverage: expected coverage of at least 0.9 ") as caught:
        assert_coverage(
            by_rule(rule), within, continuous, alpha=0.1, n=n, independent_cells=independent
        )
    assert_one_standard_line(caught)
    said = str(caught.value)
    found = re.search(r"got (0\.\d+), at most (0\.\d+) by .*in 200 trials with n=(\d+)", said)
    assert found, said
    assert float(found[1]) < float(found[2]) < 0.9
    assert found[3] == str(n)


def test_coverage_rejects_a_strict_comparison() -> None:
    """Where scores tie: without ties it is no mistake."""
    with fails("coverage of at least 0.8"):
        assert_coverage(by_rule(right), strict, tied, alpha=0.2, n=9)
    assert_coverage(by_rule(right), strict, continuous, alpha=0.2, n=9)


def test_coverage_rejects_what_errs_by_whole_images() -> None:
    """One threshold for all images of a trial, too low: found with images as units, too."""
    for unit in ("cell", "image"):
        with fails(f"unit '{unit}'"):
            assert_coverage(
                by_rule(off_by_one), within, correlated, alpha=0.2, n=4, unit=unit, trials=400
            )


def test_the_unit_matters() -> None:
    """A world where images with few labelled pixels are hard: cells are covered, images are not."""

    def draw(generator: torch.Generator, m: int) -> tuple[Tensor, Tensor]:
        probs, y = continuous(generator, m)
        small = torch.rand(m, 1, 1, generator=generator) < 0.3
        easy = torch.where(small[:, None], probs / 2, (1 + probs) / 2)
        void = torch.rand(m, *SIZE, generator=generator) < 0.95
        return easy, y.masked_fill(small & void, 255)

    def constant(probs: Tensor, y: Tensor, alpha: float) -> Tensor:
        return torch.tensor(0.5)  # misses every pixel of a small image, and no other

    # 2 % of the labelled pixels are missed, 30 % of the images
    assert_coverage(constant, within, draw, alpha=0.1)
    with fails("unit 'image'"):
        assert_coverage(constant, within, draw, alpha=0.1, unit="image")


@pytest.mark.parametrize("rule", [too_high, infinite])
@pytest.mark.parametrize("independent", [False, True])
def test_coverage_rejects_more_than_needed_only_if_asked_to(
    rule: Callable[..., Tensor], independent: bool
) -> None:
    def check(exact: bool) -> None:
        assert_coverage(
            by_rule(rule),
            within,
            continuous,
            alpha=0.2,
            n=4,
            exact=exact,
            independent_cells=independent,
        )

    check(False)
    with fails(r"expected coverage of at most 0.8 \(alpha=0.2, exact\), got") as caught:
        check(True)
    assert_one_standard_line(caught)


def test_coverage_draws_what_it_says() -> None:
    seen: list[tuple[int, ...]] = []

    def draw(generator: torch.Generator, m: int) -> tuple[Tensor, Tensor]:
        return torch.rand(m, 2, 3, 4, generator=generator), torch.zeros(m, 3, 4, dtype=torch.uint8)

    def calibrate(probs: Tensor, y: Tensor, alpha: float) -> str:
        seen.append((*probs.shape, *y.shape))
        return "anything"

    def predict(calibration: str, probs: Tensor) -> Tensor:
        assert calibration == "anything"
        seen.append(tuple(probs.shape))
        return torch.ones_like(probs, dtype=torch.bool)

    assert_coverage(calibrate, predict, draw, alpha=0.1, n=7, trials=40)
    assert seen == [(7, 2, 3, 4, 7, 3, 4), (1, 2, 3, 4)] * 40


# --- the bounds of assert_coverage --------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("cells", [1, 4, 64])
@pytest.mark.parametrize("chance", [0.2, 0.05])
def test_the_betting_bound_keeps_its_false_alarm_rate(cells: int, chance: float) -> None:
    """At rates that can be seen; a bound that keeps its rate fails here below 1e-6."""
    random = np.random.default_rng(cells)
    times = 400
    above = sum(
        assertions._least_by_betting(x, np.ones_like(x), chance) > 0.1
        for x in random.binomial(cells, 0.1, (times, 60)) / cells
    )
    assert binom.sf(above - 1, times, chance) > 1e-6


@pytest.mark.nightly
def test_the_betting_bound_is_a_bound_with_void() -> None:
    """Weights that go with the shares, at the edge of the promise: E[x] = 0.2 E[weight]."""
    random = np.random.default_rng(0)
    times, above = 400, 0
    for _ in range(times):
        weight = random.random(60)
        x = np.where(random.random(60) < 0.2, weight, 0)
        above += assertions._least_by_betting(x, weight, 0.2) > 0.2
    assert binom.sf(above - 1, times, 0.2) > 1e-6


def test_the_betting_bound_has_the_power_that_the_docstring_states() -> None:
    random = np.random.default_rng(1)
    for alpha, trials, cells in ((0.1, 200, 1), (0.1, 200, 1024), (0.05, 100, 64)):
        spread = math.sqrt(alpha * (1 - alpha) / cells)
        gap = 24 * alpha / trials + 9 * spread / math.sqrt(trials)
        drawn = random.binomial(cells, alpha + gap, (50, trials)) / cells
        found = sum(assertions._least_by_betting(x, np.ones(trials), 1e-6) > alpha for x in drawn)
        assert found >= 40, (alpha, trials, cells, found)


def test_the_counting_bound_is_clopper_and_pearson() -> None:
    for hits, cells in ((1, 10), (7, 10), (10, 10), (300, 5000)):
        bound = assertions._least_by_counting(hits, cells, 0.01)
        assert binom.sf(hits - 1, cells, bound) == pytest.approx(0.01)
    assert assertions._least_by_counting(0, 10, 0.01) == 0


# --- assert_selection_law -----------------------------------------------------------------------


def library(probs: Tensor, threshold: Tensor, background: int | None) -> Tensor:
    return pseudo_labels(probs, threshold, background=background)


def selection(
    *,
    inside: Callable[[Tensor, Tensor], Tensor] = lambda p, q: 1 - p.float() <= q,
    suppress: bool = True,
    highest: bool = False,
    by_score: bool = False,
) -> Callable[[Tensor, Tensor, int | None], Tensor]:
    """Eq. 4 with one mistake at a time."""

    def select(probs: Tensor, threshold: Tensor, background: int | None) -> Tensor:
        members = inside(probs, threshold)
        value = 1 - (1 - probs.float()) if by_score else probs.float()
        kept = torch.where(members, value, -1.0)
        if background is not None and suppress:
            kept[background] = torch.where(members[background], -0.5, -1.0)
        best = len(kept) - 1 - kept.flip(0).argmax(0) if highest else kept.argmax(0)
        return torch.where(members.any(0), best, 255)

    return select


def test_selection_holds_for_the_library() -> None:
    assert_selection_law(library)
    assert_selection_law(library, num_classes=[1, 2, 21], draws=2, seed=1)
    assert_selection_law(selection())
    assert_selection_law(
        lambda p, q, b: pseudo_labels(p, q, background=b, ignore_index=-1, dtype=torch.int8),
        ignore_index=-1,
        draws=1,
    )


@pytest.mark.parametrize(
    ("wrong", "only"),
    [
        ({"inside": lambda p, q: 1 - p.float() < q}, {}),
        ({"inside": lambda p, q: p.float() >= 1 - q}, {}),
        ({"inside": lambda p, q: p.float() >= 1 - q}, {"dtypes": [torch.float32], "draws": 10}),
        ({"inside": lambda p, q: 1 - p <= q.to(p.dtype)}, {"dtypes": [torch.float16]}),
        ({"highest": True}, {"backgrounds": [None]}),
        ({"highest": True}, {"backgrounds": [0]}),
        ({"suppress": False}, {}),
        ({"by_score": True}, {"dtypes": [torch.float32]}),
    ],
    ids=["strict", "p", "p32", "half", "highest", "highest0", "unsuppressed", "score"],
)
@pytest.mark.parametrize("kind", ["scalar", "map", "class"])
def test_selection_rejects(wrong: dict[str, Any], only: dict[str, Any], kind: str) -> None:
    only = {"draws": 15, **only}
    match = r"assert_selection_law: expected label \d+ at pixel \(\d, \d\) with float\d\d scores"
    with fails(match) as caught:
        assert_selection_law(selection(**wrong), thresholds=[kind], **only)
    assert_one_standard_line(caught)
    assert "threshold" in str(caught.value)
    assert "background" in str(caught.value)


def test_selection_that_ignores_nothing_is_rejected() -> None:
    with fails(r"expected label 255 at pixel .* got label"):
        assert_selection_law(lambda p, q, b: p.argmax(0), backgrounds=[None])


def test_the_difference_that_is_shown_is_one() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_selection_law(selection(highest=True), backgrounds=[None], thresholds=["map"])
    said = str(caught.value)
    found = re.search(
        r"label (\d+) at .* with (float\d\d) scores p = \[(.*)\], threshold (\S+), "
        r".* got label (\d+)",
        said,
    )
    assert found, said
    p = torch.tensor([float(v) for v in found[3].split(",")], dtype=getattr(torch, found[2]))
    q = torch.tensor(float(found[4]))
    got = [int(f(p[:, None, None], q, None)) for f in (library, selection(highest=True))]
    assert got == [int(found[1]), int(found[5])]


# --- strategies --------------------------------------------------------------------------------


@given(testing.scores(max_images=6, size=(2, 2), infinite=True))
def test_scores_are_what_they_say(s: Tensor) -> None:
    assert s.dtype == torch.float32
    assert s.ndim == 3
    assert 1 <= len(s) <= 6
    assert s.shape[1:] == (2, 2)
    assert (s.isnan() | s.isinf() | ((s >= 0) & (s <= 1))).all()


@given(testing.labels(num_classes=3, size=(2, 3), images=2))
def test_labels_are_what_they_say(y: Tensor) -> None:
    assert y.dtype in (torch.uint8, torch.int64)
    assert y.shape == (2, 2, 3)
    assert ((y < 3) | (y == 255)).all()


@given(testing.probs(num_classes=3, size=(2, 2)))
def test_probs_are_what_they_say(p: Tensor) -> None:
    assert p.dtype in (torch.float16, torch.float32)
    assert p.shape == (1, 3, 2, 2)
    assert ((p >= 0) & (p <= 1)).all()


@given(testing.calibration_problems())
def test_problems_calibrate_and_select(problem: testing.CalibrationProblem) -> None:
    size = (problem.new_labels.shape[0], problem.new_labels.shape[1])
    assert problem.new_probs.shape[1:] == size
    stacked = torch.stack([nonconformity(p, y) for p, y in problem.images])
    calibrator = Calibrator(groups.pixel(size), alpha=problem.alpha, background=problem.background)
    for p, y in problem.images:
        calibrator.update(p, y)
    if stacked.isnan().all():
        with raises(ValueError, "Calibrator.compute", "labelled pixel"):
            calibrator.compute()
        return
    calibration = calibrator.compute()
    assert same(calibration.threshold, conformal_quantile(stacked, problem.alpha))
    assert calibration.pseudo_labels(problem.new_probs).shape == size


def finds(strategy: Any, condition: Callable[[Any], Any]) -> None:
    some = settings(max_examples=2000, database=None, derandomize=True)
    find(strategy, lambda value: bool(condition(value)), settings=some)


@pytest.mark.ci
def test_strategies_reach_what_breaks_code() -> None:
    s = testing.scores(infinite=True)
    finds(s, lambda s: len(s) > 3 and len(s.unique()) < len(s) and not s.isnan().any())
    finds(s, lambda s: s.isnan().all())
    finds(s, lambda s: (s == 0).any() and (s == 1).any())
    finds(s, lambda s: s.isposinf().any())
    y = testing.labels(num_classes=3, size=(2, 2))
    finds(y, lambda y: (y == 255).any() and (y == 2).any() and y.dtype == torch.uint8)
    finds(y, lambda y: (y == 255).all() and y.dtype == torch.int64)
    p = testing.probs(num_classes=3, size=(2, 2))
    finds(p, lambda p: p.dtype == torch.float16 and (p.float().sum(1) > 1.5).any())
    finds(p, lambda p: ((p[:, 0] == p[:, 1]) & (p[:, 0] > 0) & (p[:, 0] < 1)).any())
    finds(p, lambda p: ((p > 0) & (1 - p.float() == 1)).any())
    problems = testing.calibration_problems()
    finds(problems, lambda it: it.background is None)
    finds(problems, lambda it: it.background == 1 and len(it.images) > 2)


def test_switches_of_the_strategies() -> None:
    for strategy, never in (
        (testing.scores(void=False), lambda s: s.isnan().any()),
        (testing.scores(), lambda s: s.isinf().any()),
        (testing.scores(min_images=3), lambda s: len(s) < 3),
        (testing.labels(num_classes=2, size=(2, 2), void=False), lambda y: (y > 1).any()),
        (
            testing.calibration_problems(void=False),
            lambda it: (it.new_labels == 255).any(),
        ),
    ):
        with pytest.raises(NoSuchExample):
            find(strategy, lambda v, n=never: bool(n(v)), settings=settings(max_examples=100))


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"sizes": [0]}, "every size >= 1, got 0"),
        ({"sizes": []}, "at least one of sizes"),
        ({"alphas": [0.1, 1.0]}, r"alpha in \(0, 1\), got 1.0"),
        ({"draws": 0}, "draws >= 1"),
    ],
)
def test_bad_arguments_of_leave_one_out(arguments: dict[str, Any], match: str) -> None:
    with raises(ValueError, "assert_leave_one_out", match):
        assert_leave_one_out(right, **arguments)


def test_a_quantile_that_is_no_number() -> None:
    with raises(TypeError, "assert_leave_one_out", r"one number from quantile, got \[2\]"):
        assert_leave_one_out(lambda s, a: torch.zeros(2))
    with raises(TypeError, "assert_leave_one_out", "got NoneType"):
        assert_leave_one_out(lambda s, a: None)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"alpha": 0}, r"alpha in \(0, 1\)"),
        ({"false_alarm": 0.0}, r"false_alarm in \(0, 1\)"),
        ({"n": 0}, "n >= 1"),
        ({"trials": 2.5}, "trials >= 1"),
        ({"trials": 3}, "enough trials"),
        ({"unit": "pixel"}, "unit 'cell' or 'image'"),
        ({"unit": "image", "independent_cells": True}, "unit 'cell' for independent cells"),
        ({"draw": with_void, "exact": True}, "no void"),
        ({"ignore_index": 1}, "ignore_index outside"),
        ({"draw": lambda g, m: continuous(g, m - 1)}, r"probs \[21, K, H, W\] from draw"),
        ({"draw": lambda g, m: (continuous(g, m)[0], torch.zeros(m, 2, 2).long())}, "labels from"),
        (
            {"draw": lambda g, m: (continuous(g, m)[0], continuous(g, m)[1] + 1)},
            r"in 0\.\.1 or 255",
        ),
        ({"predict": lambda q, p: p[:, 0] > 0}, r"sets \[1, 2, 16, 16\] from predict"),
    ],
)
def test_bad_arguments_of_coverage(arguments: dict[str, Any], match: str) -> None:
    given_ = {"calibrate": by_rule(right), "predict": within, "draw": continuous}
    with raises(ValueError, "assert_coverage", match):
        assert_coverage(**{**given_, "alpha": 0.1, **arguments})


def test_trials_without_a_label_decide_nothing() -> None:
    def void(generator: torch.Generator, m: int) -> tuple[Tensor, Tensor]:
        return torch.rand(m, 2, 2, 2, generator=generator), torch.full((m, 2, 2), 255)

    for options in ({}, {"unit": "image"}, {"independent_cells": True}):
        with raises(ValueError, "assert_coverage", "200 trials with 0 labelled cells"):
            assert_coverage(by_rule(right), within, void, alpha=0.1, **options)


@pytest.mark.parametrize("sets", [torch.ones(1, 2, *SIZE), None])
def test_sets_that_are_not_bool(sets: Any) -> None:
    with raises(TypeError, "assert_coverage", "bool sets from predict"):
        assert_coverage(by_rule(right), lambda q, p: sets, continuous, alpha=0.1)


@pytest.mark.parametrize(
    ("kind", "arguments", "match"),
    [
        (ValueError, {"num_classes": [0]}, "every num_classes >= 1"),
        (ValueError, {"num_classes": []}, "at least one of num_classes"),
        (ValueError, {"thresholds": ["pixel"]}, "thresholds among"),
        (ValueError, {"backgrounds": [2]}, r"background in 0\.\.1"),
        (ValueError, {"ignore_index": 1}, "ignore_index outside"),
        (ValueError, {"draws": 0}, "draws >= 1"),
        (TypeError, {"dtypes": [torch.bfloat16]}, "float32 or torch.float16"),
    ],
)
def test_bad_arguments_of_selection(
    kind: type[Exception], arguments: dict[str, Any], match: str
) -> None:
    with raises(kind, "assert_selection_law", match):
        assert_selection_law(library, **arguments)


def test_labels_that_are_none() -> None:
    with raises(TypeError, "assert_selection_law", "integer labels"):
        assert_selection_law(lambda p, q, b: p[0])
    with raises(ValueError, "assert_selection_law", r"labels \[4, 8\] for probs"):
        assert_selection_law(lambda p, q, b: p.argmax(0)[None])


@pytest.mark.parametrize(
    ("make", "where", "kind", "match"),
    [
        (lambda: testing.scores(max_images=0), "scores", ValueError, "max_images >= 1"),
        (lambda: testing.scores(min_images=20), "scores", ValueError, "min_images <= max_images"),
        (lambda: testing.scores(size=(99, 99)), "scores", ValueError, "at most 4096 values"),
        (
            lambda: testing.labels(num_classes=300, size=(1, 1)),
            "labels",
            ValueError,
            "ignore_index outside",
        ),
        (
            lambda: testing.labels(num_classes=2, size=(1, 1), ignore_index=-1),
            "labels",
            ValueError,
            r"dtypes that hold -1\.\.1",
        ),
        (
            lambda: testing.labels(num_classes=2, size=(1, 1), dtypes=[torch.float32]),
            "labels",
            TypeError,
            "integer dtypes",
        ),
        (
            lambda: testing.probs(num_classes=2, size=(1, 1), dtypes=[torch.float64]),
            "probs",
            TypeError,
            "float32 or",
        ),
        (
            lambda: testing.probs(num_classes=2, size=(0, 1)),
            "probs",
            ValueError,
            "every axis >= 1, got 0",
        ),
        (
            lambda: testing.calibration_problems(max_classes=1),
            "calibration_problems",
            ValueError,
            "max_classes",
        ),
        (
            lambda: testing.calibration_problems(alphas=[2]),
            "calibration_problems",
            ValueError,
            r"alpha in \(0, 1\)",
        ),
    ],
)
def test_bad_arguments_of_strategies(
    make: Callable[[], Any], where: str, kind: type[Exception], match: str
) -> None:
    with raises(kind, where, match):
        make()


def test_strategies_name_the_extra_where_hypothesis_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for make in (
        testing.scores,
        lambda: testing.labels(num_classes=2, size=(1, 1)),
        lambda: testing.probs(num_classes=2, size=(1, 1)),
        testing.calibration_problems,
    ):
        with pytest.raises(ImportError, match=r"expected hypothesis, .*cpseg\[dev\]") as caught:
            make()
        assert STANDARD.fullmatch(str(caught.value))


@pytest.mark.ci
def test_the_assertions_need_no_hypothesis() -> None:
    code = (
        "import sys; sys.modules['hypothesis'] = None; from cpseg.testing import *; "
        "assert_leave_one_out(lambda s, a: float('inf'), sizes=[2])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
