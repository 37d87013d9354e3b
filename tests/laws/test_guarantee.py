"""What is promised, measured on fresh draws, and what would break it.

Every cell is an experiment of its own: its n calibration scores and its one fresh score are
independent of those of every other cell. The number of covered cells is then binomial with the
coverage of the rule, over the draw of calibration and fresh image together, and the law

    1 - alpha <= coverage <= 1 - alpha + 1 / (n + 1)

is tested against it: a check raises a false alarm with probability at most ``FALSE_ALARM``. No test
has more than 24 checks, so a correct library fails it with probability below 1e-6 over the seeds;
these are fixed. The same assertions must reject rules that are nearly right.

The second half tests the whole law of coverage *given* the calibration images, Beta(k, n + 1 - k)
for continuous scores, in worlds where the distribution function of the score is known: coverage is
then that function of the threshold, and no fresh image is needed. Scores are rounded to float32,
which moves a coverage by less than 1e-6: nothing beside bounds of 1e-3 and more.
"""

from __future__ import annotations

import functools
import math
import re
import runpy
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import beta, binom
from scipy.stats import entropy as divergence
from tests.support import oracles
from tests.support.helpers import seeded
from torch import Tensor

from cpseg import Calibration, Calibrator, conformal_quantile, coverage, groups, nonconformity

Array = np.ndarray

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


# --- the law of coverage given the calibration images --------------------------------------------
#
# A world draws probs [m, 3, H, W] and labels; its distribution function gives P(true score <= t).

World = tuple[Callable[[int, torch.Generator], tuple[Tensor, Tensor]], Callable[[Array], Array]]
BETA_SIZE = (128, 128)
BETA_NUMBERS = (5, 19, 20, 50, 92, 200)
RAPS = "raps:0.1:1"  # the second class pays 0.1, the third 0.2


def placed(ranked: Tensor, rank: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Give the classes of rank 0, 1, 2 random indices; the label is the one of ``rank``."""
    index = torch.rand(ranked.shape, generator=generator).argsort(1)
    probs = torch.empty_like(ranked).scatter_(1, index, ranked)
    return probs, index.gather(1, rank[:, None])[:, 0]


def uniform(m: int, generator: torch.Generator) -> Tensor:
    return torch.rand(m, *BETA_SIZE, generator=generator)


def lac_world() -> World:
    """The score is uniform; the other classes have any probabilities, the sum is not 1."""

    def draw(m: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        v, *others = (uniform(m, generator) for _ in range(3))
        return placed(torch.stack([1 - v, *others], 1), torch.zeros_like(v).long(), generator)

    return draw, lambda t: np.clip(t, 0, 1)


def margin_world() -> World:
    """The margin is uniform on [-1, 1]; the third class lies below the rival."""

    def draw(m: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        margin, u, w = 2 * uniform(m, generator) - 1, uniform(m, generator), uniform(m, generator)
        true = u * (1 - margin.abs()) + (-margin).clamp(min=0)
        rival = (true + margin).clamp(0, 1)
        return placed(torch.stack([true, rival, w * rival], 1), true.long() * 0, generator)

    return draw, lambda t: np.clip((t + 1) / 2, 0, 1)


def ranked_world(penalty: float) -> World:
    """Deterministic (R)APS. The mass up to the true class is drawn first: uniform on [1/2, 1] for
    the most probable class, on [3/4, 1] for the second, each half of the time. The last class is
    never true: its score is 1 whatever the probabilities are, a tie."""

    def draw(m: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        v, w = uniform(m, generator), 0.5 + uniform(m, generator) / 7
        second = uniform(m, generator) < 0.5
        mass = torch.where(second, 0.75 + v / 4, 0.5 + v / 2)
        a = torch.where(second, mass * w, mass)
        b = torch.where(second, mass - a, (1 - mass) * w)
        return placed(torch.stack([a, b, 1 - a - b], 1), second.long(), generator)

    def cdf(t: Array) -> Array:
        first, second = np.clip(2 * t - 1, 0, 1), np.clip(4 * (t - penalty) - 3, 0, 1)
        return (first + second) / 2

    return draw, cdf


def drawn_world(penalty: float) -> World:
    """Randomised (R)APS with a model that is right: P(class) = its score, 0.5, 0.3 or 0.2. The
    score is then uniform on the class's share of [0, 1], moved by the penalty."""
    shares = (0.5, 0.3, 0.2)

    def draw(m: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        v = uniform(m, generator)
        rank = (v > 0.5).long() + (v > 0.8).long()
        ranked = torch.tensor(shares).reshape(3, 1, 1).expand(m, 3, *BETA_SIZE).contiguous()
        return placed(ranked, rank, generator)

    def cdf(t: Array) -> Array:
        begins = np.array([0, 0.5, 0.8]) + penalty * np.arange(3)
        parts = [np.clip(t - b, 0, p) for b, p in zip(begins, shares, strict=True)]
        return np.sum(parts, axis=0).clip(max=1)

    return draw, cdf


WORLDS = {
    "lac": ("lac", False, lac_world()),
    "margin": ("margin", False, margin_world()),
    "aps": ("aps", False, ranked_world(0)),
    "raps": (RAPS, False, ranked_world(0.1)),
    "aps, randomised": ("aps", True, drawn_world(0)),
    "raps, randomised": (RAPS, True, drawn_world(0.1)),
}


def bernstein(variance: float, span: float, number: int) -> float:
    """How far the mean of so many independent variables lies from its expectation, at most, but
    with probability ``FALSE_ALARM``: Bernstein, two-sided, for variables within ``span`` of it."""
    log = math.log(2 / FALSE_ALARM)
    third = log * span / (3 * number)
    return third + math.sqrt(third**2 + 2 * log * variance / number)


def assert_beta(coverage: Array, n: int, alpha: float, *, scale: float = 1.0) -> None:
    """Independent draws of the coverage given n scores follow Beta(k, n + 1 - k).

    Four checks. (1) The distribution function, by Dvoretzky, Kiefer, Wolfowitz and Massart: the
    empirical one lies within ``sqrt(log(2/d) / 2m)`` of it but with probability d. (2, 3) Mean and
    variance, by Bernstein. But with probability d all draws lie within ``reach`` of the mean, a
    quantile of the Beta law at d / m; cut off there, squared deviations are at most ``reach**2``
    and their mean is less by no more than d / m. (4) No finite threshold where k > n.

    With ``scale`` the coverages may be larger than the law's, by no more than that factor in odds,
    as bins allow: only the distribution function is then tested, its two sides apart.
    """
    k, m = oracles.rank(n, str(alpha)), len(coverage)
    if k > n:
        assert (coverage == 1).all(), "covers by a finite threshold what none can"
        return
    law = beta(k, n + 1 - k)
    ordered, steps = np.sort(coverage), np.arange(m + 1) / m
    odds = ordered / np.maximum(scale * (1 - ordered), 1e-300)
    above = (steps[1:] - law.cdf(ordered)).max()
    below = (law.cdf(odds / (1 + odds)) - steps[:-1]).max()
    within = math.sqrt(math.log(2 / FALSE_ALARM) / (2 * m))
    assert max(above, below) < within, f"the law of coverage is off by {max(above, below):.4f}"
    if scale > 1:
        return
    mean, variance = law.mean(), law.var()
    reach = max(law.isf(FALSE_ALARM / m / 2) - mean, mean - law.ppf(FALSE_ALARM / m / 2))
    fourth = (float(law.stats(moments="k")) + 3) * variance**2
    off = coverage.mean() - mean
    assert abs(off) < bernstein(variance, reach, m), f"mean coverage is off by {off:.4f}"
    spread = np.square(coverage - mean).clip(max=reach**2).mean() / variance
    within = bernstein(fourth - variance**2, reach**2, m) + FALSE_ALARM
    assert abs(spread - 1) < within / variance, f"variance of coverage is {spread:.3f} of the law"


@pytest.mark.parametrize("n", BETA_NUMBERS)
@pytest.mark.parametrize("name", WORLDS)
def test_coverage_given_the_calibration_is_beta(name: str, n: int) -> None:
    """Pixel-wise; and sets of a fresh image cover a binomial number of cells of mean k/(n + 1)."""
    score, randomised, (draw, cdf) = WORLDS[name]
    generator = seeded(100 + n)
    drawing = seeded(200 + n) if randomised else None
    calibrator = Calibrator(
        groups.pixel(BETA_SIZE), alpha=max(ALPHAS), score=score, max_images=n, generator=drawing
    )
    for start in range(0, n, 10):
        calibrator.update(*draw(min(10, n - start), generator))
    fresh, labels = draw(1, generator)
    for alpha in ALPHAS:
        calibration = calibrator.compute(alpha)
        threshold = calibration.threshold.flatten().double().numpy()
        assert_beta(cdf(threshold), n, alpha)
        drawing = seeded(300 + n) if randomised else None
        sets = calibration.prediction_set(fresh, generator=drawing)
        covered = int(sets.gather(1, labels[:, None]).sum())
        share = min(1.0, oracles.rank(n, str(alpha)) / (n + 1))
        assert binom.cdf(covered, labels.numel(), share) > FALSE_ALARM
        assert binom.sf(covered - 1, labels.numel(), share) > FALSE_ALARM


def rank_at_random(scores: Tensor, alpha: float) -> Tensor:
    """One rank too low or too high, in turn over the cells: the mean is right, the spread not."""
    k = oracles.rank(len(scores), str(alpha))
    ordered = torch.cat([scores.sort(0).values, torch.full_like(scores[:1], math.inf)])
    odd = torch.arange(scores[0].numel()).reshape(scores[0].shape) % 2 == 1
    return torch.where(odd, ordered[k - 2], ordered[min(k, len(scores))])


def always_the_mean(scores: Tensor, alpha: float) -> Tensor:
    """The threshold that covers k/(n + 1) of a uniform score: the mean is right, no spread."""
    n = len(scores)
    return torch.full_like(scores[0], oracles.rank(n, str(alpha)) / (n + 1))


@functools.cache
def uniform_scores(n: int) -> Tensor:
    draw, _ = lac_world()
    return torch.cat([nonconformity(*draw(1, seeded(1000 * n + i))) for i in range(n)])


@pytest.mark.parametrize("rule", [off_by_one, missing_plus_one, linear])
@pytest.mark.parametrize("n", [5, 20, 50, 92, 200])  # with 19 a missing +1 changes no rank
def test_the_beta_law_rejects_rules_that_are_nearly_right(
    rule: Callable[..., Tensor], n: int
) -> None:
    for alpha in ALPHAS:
        coverage = rule(uniform_scores(n), alpha).flatten().double().numpy()
        with pytest.raises(AssertionError):
            assert_beta(coverage, n, alpha)
        if oracles.rank(n, str(alpha)) <= n:  # each of the statistics sees it
            law = beta(oracles.rank(n, str(alpha)), n + 1 - oracles.rank(n, str(alpha)))
            assert abs(coverage.mean() - law.mean()) > bernstein(law.var(), 1, coverage.size)


@pytest.mark.parametrize("rule", [rank_at_random, always_the_mean])
def test_the_beta_law_rejects_a_wrong_spread(rule: Callable[..., Tensor]) -> None:
    n, alpha = 20, 0.2
    coverage = rule(uniform_scores(n), alpha).flatten().double().numpy()
    law = beta(17, 4)
    assert abs(coverage.mean() - law.mean()) < bernstein(law.var(), 1, coverage.size)
    with pytest.raises(AssertionError, match=r"law of coverage is off|variance of coverage"):
        assert_beta(coverage, n, alpha)
    jitter = np.square(coverage - law.mean()).mean() / law.var()
    assert jitter < 0.01 or jitter > 1.2


def assert_law_of_count(coverage: Tensor, count: Tensor, alpha: float) -> None:
    """A cell with c scores has coverage Beta(k(c), c + 1 - k(c)), so that the distribution function
    of its own law is uniform there: one check of all cells together."""
    rank = torch.tensor([oracles.rank(c, str(alpha)) for c in range(int(count.max()) + 1)])[count]
    assert (rank <= count).all()
    law = beta(rank.numpy(), (count + 1 - rank).numpy())
    place = np.sort(law.cdf(coverage.double().numpy()))
    m = len(place)
    off = np.maximum(np.arange(1, m + 1) / m - place, place - np.arange(m) / m).max()
    assert off < math.sqrt(math.log(2 / FALSE_ALARM) / (2 * m))


def test_thresholds_per_class_follow_the_law_of_their_own_number() -> None:
    alpha, n = 0.2, 40
    generator = seeded(7)
    calibrator = Calibrator(groups.pixel(BETA_SIZE), alpha=alpha, per_class=True)
    for _ in range(n):
        v, other = uniform(1, generator), uniform(1, generator)
        labels = (uniform(1, generator) < 0.3).long()
        true = 1 - torch.where(labels == 1, v.sqrt(), v)  # scores of class 1 are larger: F = t^2
        pair = torch.stack([true, other], 1)
        calibrator.update(torch.where(labels[:, None] == 1, pair.flip(1), pair), labels)
    calibration = calibrator.compute()
    for k in (0, 1):
        count, threshold = calibration.count[k], calibration.threshold[k]
        finite = threshold.isfinite()
        assert torch.equal(finite, count >= 4)
        assert_law_of_count(threshold[finite] ** (k + 1), count[finite], alpha)


def test_cells_that_did_not_fall_back_follow_the_law_of_their_own_number() -> None:
    """What decides is how many labels a cell has, not its scores."""
    alpha, n = 0.1, 20
    generator = seeded(8)
    calibrator = Calibrator(
        groups.pixel(BETA_SIZE), alpha=alpha, unit="image", fallback=[groups.image(BETA_SIZE)]
    )
    for _ in range(n):
        void = uniform(1, generator) < 0.6
        calibrator.update_scores(uniform(1, generator).masked_fill(void, torch.nan))
    calibration = calibrator.compute()
    assert calibration.level is not None
    own = calibration.level == 0
    assert 0.1 < float(own.float().mean()) < 0.9
    assert calibration.threshold.isfinite().all()
    assert_law_of_count(calibration.threshold[own], calibration.count[own], alpha)


# --- pooled groups -------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["pixel", "image"])
@pytest.mark.parametrize("n", [5, 20, 92])
def test_pooled_groups_follow_the_law_where_an_image_is_a_pixel(unit: str, n: int) -> None:
    """1,024 groups of two cells, of which every image labels one: images are the units of both
    rules, and the law holds up to the bins, which round up by less than 1 % in odds."""
    size = (64, 32)
    generator = seeded(n)
    calibrator = Calibrator(groups.blocks(size, (2, 1)), alpha=max(ALPHAS), unit=unit)
    for _ in range(n):
        scores = torch.rand(1, *size, generator=generator)
        void = torch.rand(1, 32, 1, 32, generator=generator) < 0.5
        void = torch.cat([void, ~void], 2).flatten(1, 2)
        calibrator.update_scores(scores.masked_fill(void, torch.nan))
    for alpha in ALPHAS:
        calibration = calibrator.compute(alpha)
        assert (calibration.count == n).all()
        assert_beta(calibration.threshold[::2].clamp(max=1).flatten().double().numpy(), n, alpha,
                    scale=1.01)  # fmt: skip


def highest_mean(expected: float, number: int) -> float:
    """Upper bound of the mean of independent variables in [0, 1] whose expectations are at most
    ``expected``, but with probability ``FALSE_ALARM``: Hoeffding (1963), theorem 1."""
    limit = math.log(1 / FALSE_ALARM) / number

    def gap(q: float) -> float:
        return float(divergence([q, 1 - q], [expected, 1 - expected])) - limit

    return 1.0 if gap(1 - 1e-9) < 0 else float(brentq(gap, expected, 1 - 1e-9))


def hard_and_easy(n: int, unit: str, seed: int) -> tuple[Calibrator, Callable[[Tensor], Tensor]]:
    """1,024 groups of 16 cells. In every image and group the scores are ``(9 d + noise)/10`` with
    one difficulty d ~ U(0, 1) for all of its cells, and the harder ones have fewer labels: all
    16 with d < 1/2, one above. Returns the expected uncovered share of a new image at thresholds.
    """
    size, generator = (128, 128), seeded(seed)
    calibrator = Calibrator(groups.blocks(size, 4), alpha=max(ALPHAS), unit=unit)
    corner = torch.zeros(4, 4, dtype=torch.bool)
    corner[0, 0] = True
    for _ in range(n):
        difficulty = torch.rand(32, 32, generator=generator)
        wide = difficulty.repeat_interleave(4, 0).repeat_interleave(4, 1)
        scores = (9 * wide + torch.rand(size, generator=generator)) / 10
        calibrator.update_scores(
            scores.masked_fill((wide > 0.5) & ~corner.tile(32, 32), torch.nan)[None]
        )

    def uncovered(threshold: Tensor) -> Tensor:
        """P(score > t): a share of an image has the expectation of one of its scores."""
        t = threshold[::4, ::4].clamp(max=1).double()
        # P((9 d + noise)/10 <= t) = mean over noise of clip((10 t - noise)/9, 0, 1)
        noise = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
        return 1 - ((10 * t[..., None] - noise) / 9).clamp(0, 1).mean(-1)

    return calibrator, uncovered


@pytest.mark.parametrize("n", [5, 19, 50])
def test_images_as_units_keep_their_promise_where_pixels_do_not(n: int) -> None:
    """E[uncovered share of a new image] <= alpha. The quantile of all pixels is far above it here,
    since hard images have few labels, and so is one that forgets the new image."""
    of_images, uncovered = hard_and_easy(n, "image", n)
    of_pixels, _ = hard_and_easy(n, "pixel", n)
    for alpha in ALPHAS:
        most = highest_mean(alpha, 1024)
        risk = uncovered(of_images.compute(alpha).threshold)
        assert float(risk.mean()) <= most
        assert float(uncovered(of_pixels.compute(alpha).threshold).mean()) > most


@pytest.mark.parametrize("alpha", [0.2, 0.1])
def test_forgetting_the_new_image_breaks_the_promise_of_images(alpha: float) -> None:
    """(sum of shares)/n <= alpha for (sum of shares + 1)/(n + 1) <= alpha, with 5 images: the
    image-wise rule at the alpha that this comes to."""
    n = 5
    calibrator, uncovered = hard_and_easy(n, "image", 1)
    risk = uncovered(calibrator.compute((n * Fraction(str(alpha)) + 1) / (n + 1)).threshold)
    assert float(risk.mean()) > highest_mean(alpha, 1024)


def test_correlated_pixels_scatter_the_pooled_quantile() -> None:
    """With 20 images of 16 pixels that err together, coverage given the calibration varies as with
    20 scores, not 320: ten times the variance at the least."""
    n, alpha, size = 20, 0.2, (128, 128)
    generator = seeded(5)
    calibrator = Calibrator(groups.blocks(size, 4), alpha=alpha)
    for _ in range(n):
        wide = torch.rand(32, 32, generator=generator)
        calibrator.update_scores(wide.repeat_interleave(4, 0).repeat_interleave(4, 1)[None])
    coverage = calibrator.compute().threshold[::4, ::4].flatten().double().numpy()
    independent = beta(oracles.rank(320, "0.2"), 321 - oracles.rank(320, "0.2"))
    assert coverage.var() > 10 * independent.var()
    with pytest.raises(AssertionError):
        assert_beta(coverage, 320, alpha, scale=1.01)


def test_the_table_of_broken_promises_has_a_row_for_each() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "broken_promises.py"
    if not path.exists():
        pytest.skip("benchmarks are not part of this copy")
    run = runpy.run_path(str(path))
    lines = run["table"](share=0)
    assert len(lines) == 2 + len(run["WORLDS"])
    for line in lines[2:]:
        row = re.fullmatch(r"\| .+? \| 0\.\d+ \| (0\.\d+) ± 0\.\d+ \| (0\.\d+) ± .*\|", line)
        assert row, line
        assert float(row[1]) < float(row[2])
