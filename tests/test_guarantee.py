"""What is promised, measured on fresh draws, and what would break it.

Every cell is an experiment of its own: its n calibration scores and its one fresh score are
independent of those of every other cell. The number of covered cells is then binomial with the
coverage of the rule, over the draw of calibration and fresh image together, and the law

    1 - alpha <= coverage <= 1 - alpha + 1 / (n + 1)

is tested against it: a check raises a false alarm with probability at most ``FALSE_ALARM``. There
are 36 one-sided checks, so a correct library fails this file with probability below 1e-6 over the
seeds; these are fixed. The same assertion must reject rules that are nearly right.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import binom
from tests.helpers import seeded
from torch import Tensor

from cpseg import Calibration, Calibrator, conformal_quantile, coverage, groups, nonconformity

FALSE_ALARM = 2e-8
ALPHAS = (0.2, 0.1, 0.05)
NUMBERS = (5, 10, 20, 40, 100)
NUM_CLASSES = 2
SIDE = 200  # 40,000 cells: up to 40 images a rank off by one is far outside the bound


def draw(images: int, size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scores without ties and classes that they say something about, cell by cell independent."""
    probs = torch.rand(images, NUM_CLASSES, *size, generator=generator)
    labels = torch.randint(NUM_CLASSES, (images, *size), generator=generator)
    right = torch.rand(images, *size, generator=generator) < 0.5
    return probs, torch.where(right, (probs[:, 1] > probs[:, 0]).to(torch.int64), labels)


def assert_covers(covered: int, cells: int, alpha: float, n: int, *, ties: bool = False) -> None:
    """The law for a binomial count, both ends; the upper one only holds without ties."""
    assert binom.cdf(covered, cells, 1 - alpha) > FALSE_ALARM, f"covers only {covered / cells}"
    if not ties:
        most = min(1.0, 1 - alpha + 1 / (n + 1))
        assert binom.sf(covered - 1, cells, most) > FALSE_ALARM, f"covers all of {covered / cells}"


@functools.cache
def stacked(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """n calibration score maps, and one fresh image with its labels."""
    size = (SIDE, SIDE)
    generator = seeded(n)
    scores = torch.cat([nonconformity(*draw(1, size, generator)) for _ in range(n)])
    probs, labels = draw(1, size, generator)
    return scores, probs, labels


def covered_by(threshold: Tensor, n: int, alpha: float) -> tuple[int, int]:
    _, probs, labels = stacked(n)
    count = torch.full(threshold.shape, n)
    sets = Calibration(threshold, count, alpha, n, NUM_CLASSES).prediction_set(probs)
    return round(float(coverage(sets, labels)) * labels.numel()), labels.numel()


@pytest.mark.parametrize("n", NUMBERS)
def test_pixelwise_calibration_covers_fresh_images(n: int) -> None:
    scores, *_ = stacked(n)
    calibrator = Calibrator(groups.pixel((SIDE, SIDE)), alpha=max(ALPHAS), max_images=n)
    for part in scores.split(7):
        calibrator.update_scores(part)
    for alpha in ALPHAS:
        covered, cells = covered_by(calibrator.compute(alpha).threshold, n, alpha)
        assert_covers(covered, cells, alpha, n)


def off_by_one(scores: Tensor, alpha: float) -> Tensor:
    rank = math.ceil(round((len(scores) + 1) * (1 - alpha), 9)) - 1
    return scores.sort(0).values[min(rank, len(scores)) - 1]


def missing_plus_one(scores: Tensor, alpha: float) -> Tensor:
    return scores.sort(0).values[math.ceil(round(len(scores) * (1 - alpha), 9)) - 1]


def linear(scores: Tensor, alpha: float) -> Tensor:
    return conformal_quantile(scores, alpha, rule="linear")


@pytest.mark.parametrize("rule", [off_by_one, missing_plus_one, linear])
@pytest.mark.parametrize("n", NUMBERS[:-1])
def test_rules_that_are_nearly_right_do_not(rule: Callable[..., Tensor], n: int) -> None:
    for alpha in ALPHAS:
        covered, cells = covered_by(rule(stacked(n)[0], alpha), n, alpha)
        with pytest.raises(AssertionError, match="covers only"):
            assert_covers(covered, cells, alpha, n)


@pytest.mark.parametrize("n", [5, 10])
def test_a_rank_too_high_covers_too_much(n: int) -> None:
    """The upper end of the law: the threshold is not merely large."""
    scores, *_ = stacked(n)
    rank = math.ceil(round((n + 1) * 0.8, 9)) + 1
    ordered = torch.cat([scores.sort(0).values, torch.full_like(scores[:1], math.inf)])
    covered, cells = covered_by(ordered[rank - 1], n, 0.2)
    with pytest.raises(AssertionError, match="covers all of"):
        assert_covers(covered, cells, 0.2, n)


def test_coverage_holds_with_ties() -> None:
    size, n, alpha = (200, 200), 20, 0.1
    generator = seeded(1)
    calibrator = Calibrator(groups.pixel(size), alpha=alpha)
    for _ in range(n):
        probs, labels = draw(1, size, generator)
        calibrator.update((probs * 8).round() / 8, labels)
    probs, labels = draw(1, size, generator)
    sets = calibrator.compute().prediction_set((probs * 8).round() / 8)
    covered = round(float(coverage(sets, labels)) * labels.numel())
    assert_covers(covered, labels.numel(), alpha, n, ties=True)


def test_coverage_holds_with_void() -> None:
    """Each cell has a number of scores of its own; void is drawn apart from everything else."""
    size, n, alpha = (200, 200), 30, 0.1
    generator = seeded(2)
    calibrator = Calibrator(groups.pixel(size), alpha=alpha, max_images=n)
    for _ in range(n):
        probs, labels = draw(1, size, generator)
        void = torch.rand(1, *size, generator=generator) < 0.4
        calibrator.update(probs, labels.masked_fill(void, 255))
    calibration = calibrator.compute()
    assert calibration.count.min() < 15 < calibration.count.max()
    probs, labels = draw(1, size, generator)
    inside = calibration.prediction_set(probs).gather(1, labels[:, None])[0, 0]
    for few in (calibration.count < 19, calibration.count >= 19):
        covered, cells = int(inside[few].sum()), int(few.sum())
        assert cells > 10_000
        assert_covers(covered, cells, alpha, 0, ties=True)


def test_thresholds_per_class_cover_every_class() -> None:
    """Scores that differ between the classes: one threshold covers the hard class too rarely."""
    size, n, alpha = (200, 200), 60, 0.2
    generator = seeded(3)

    def hard(images: int) -> tuple[Tensor, Tensor]:
        probs = torch.rand(images, 2, *size, generator=generator)
        labels = (torch.rand(images, *size, generator=generator) < 0.3).to(torch.int64)
        probs[:, 1] *= 0.5  # the scores of class 1 are larger
        return probs, labels

    apart = Calibrator(groups.pixel(size), alpha=alpha, per_class=True)
    together = Calibrator(groups.pixel(size), alpha=alpha)
    for _ in range(n // 10):
        probs, labels = hard(10)
        apart.update(probs, labels)
        together.update(probs, labels)
    probs, labels = hard(1)
    for calibrator, holds in ((apart, True), (together, False)):
        sets = calibrator.compute().prediction_set(probs)
        for k in (0, 1):
            only = labels.masked_fill(labels != k, 255)
            cells = int((labels == k).sum())
            covered = round(float(coverage(sets, only)) * cells)
            if holds or k == 0:
                assert_covers(covered, cells, alpha, 0, ties=True)
            else:
                with pytest.raises(AssertionError, match="covers only"):
                    assert_covers(covered, cells, alpha, 0, ties=True)
