"""`unit="image"` against rational arithmetic, and `fallback=` level by level."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.helpers import raises, same, seeded
from torch import Tensor

from cpseg import Calibration, Calibrator, groups
from cpseg.core.score_bins import bin_edges

GRID = (4, 6)
EDGES = bin_edges(torch.device("cpu")).to(torch.float64).numpy()


def shares_above(scores: np.ndarray, member: np.ndarray, t: float) -> list[Fraction]:
    """For every image with a scored pixel in the group: its share of scores above t."""
    found = []
    for image in scores:
        own = image[member & ~np.isnan(image)]
        if len(own):
            found.append(Fraction(int((own > t).sum()), len(own)))
    return found


def naive_risk_control(scores: np.ndarray, member: np.ndarray, alpha: str) -> tuple[float, int]:
    """The lowest bin edge t with (sum of shares above t + 1) / (n + 1) <= alpha, exactly."""
    n = len(shares_above(scores, member, 2.0))
    good = [
        t
        for t in EDGES
        if (sum(shares_above(scores, member, t), Fraction(1))) / (n + 1) <= Fraction(alpha)
    ]
    return (min(good) if good and n else float("inf")), n


def images(seed: int, number: int, *, ties: bool = True) -> Tensor:
    """Scores with ties, void and images that are all void, whose pixels resemble each other."""
    generator = seeded(seed)
    level = torch.rand(number, 1, 1, generator=generator)
    scores = (level + 0.2 * torch.rand(number, *GRID, generator=generator)).clamp(max=1)
    if ties:
        scores = (scores * 8).round() / 8
    void = torch.rand(number, *GRID, generator=generator) < (
        torch.rand(number, 1, 1, generator=generator).pow(2)
    )
    return scores.masked_fill(void, torch.nan)


@pytest.mark.nightly
@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    number=st.integers(1, 12),
    alpha=st.sampled_from(["0.1", "0.2", "0.25", "0.5", "0.75"]),
    ties=st.booleans(),
)
def test_thresholds_equal_rational_arithmetic(
    seed: int, number: int, alpha: str, ties: bool
) -> None:
    scores = images(seed, number, ties=ties)
    partition = groups.blocks(GRID, 3)
    calibrator = Calibrator(partition, alpha=alpha, unit="image")
    calibrator.update_scores(scores)
    if scores.isnan().all():
        return
    made = calibrator.compute()
    for group in range(int(partition.max()) + 1):
        member = (partition == group).numpy()
        want, count = naive_risk_control(scores.to(torch.float64).numpy(), member, alpha)
        assert (made.count[partition == group] == count).all()
        assert (made.threshold[partition == group].to(torch.float64) == want).all(), group


def test_a_share_that_meets_the_bound_exactly_is_allowed() -> None:
    # 19 images at 0.1: shares may sum to (19 + 1) / 10 - 1 = 1: one image above, wholly.
    scores = torch.full((19, *GRID), 0.25)
    scores[3] = 0.75
    calibrator = Calibrator(groups.image(GRID), alpha="0.1", unit="image")
    calibrator.update_scores(scores)
    assert 0.25 <= float(calibrator.compute().threshold[0, 0]) < 0.26
    one_more = scores.clone()
    one_more[4, 0, 0] = 0.75
    calibrator = Calibrator(groups.image(GRID), alpha="0.1", unit="image")
    calibrator.update_scores(one_more)
    assert float(calibrator.compute().threshold[0, 0]) >= 0.75


def test_images_weigh_the_same_whatever_their_pixels() -> None:
    """Nine small images are certain, one large one is not: pixels and images disagree."""
    scores = torch.full((39, *GRID), torch.nan)
    scores[:36, 0, 0] = 0.125
    scores[36:] = 0.875
    thresholds = {}
    for unit in ("pixel", "image"):
        calibrator = Calibrator(groups.image(GRID), alpha=0.1, unit=unit)
        calibrator.update_scores(scores)
        made = calibrator.compute()
        thresholds[unit] = float(made.threshold[0, 0])
        assert made.unit == unit
        assert int(made.count[0, 0]) == {"pixel": 36 + 3 * 24, "image": 39}[unit]
    assert thresholds["pixel"] >= 0.875  # most pixels lie in the three uncertain images
    assert thresholds["image"] < 0.126  # which are 3 of 39, and (3 + 1) / 40 is 0.1


def test_pixelwise_both_units_are_the_same() -> None:
    scores = images(3, 40)
    made = []
    for unit in ("pixel", "image"):
        calibrator = Calibrator(groups.pixel(GRID), alpha=0.2, unit=unit)
        calibrator.update_scores(scores)
        made.append(calibrator.compute())
    assert same(made[0].threshold, made[1].threshold)


def test_per_class_counts_the_images_that_show_the_class() -> None:
    probs = torch.rand(20, 3, *GRID, generator=seeded(1))
    labels = torch.zeros(20, *GRID, dtype=torch.int64)
    labels[:7, :2] = 1
    calibrator = Calibrator(groups.image(GRID), alpha=0.3, unit="image", per_class=True)
    calibrator.update(probs, labels)
    made = calibrator.compute()
    assert made.count[:, 0, 0].tolist() == [20, 7, 0]
    assert made.threshold[2].isposinf().all()
    only = Calibrator(groups.image(GRID), alpha=0.3, unit="image")
    only.update(probs, labels.masked_fill(labels == 0, 255))
    assert same(made.threshold[1], only.compute().threshold)


# --- fallback ----------------------------------------------------------------------------------

LEVELS = (groups.blocks(GRID, 3), groups.image(GRID))


def with_void_cells(number: int) -> Tensor:
    """The upper left block has scores in one image alone, the cell beside it in six."""
    scores = images(5, number, ties=False).nan_to_num(nan=0.5)
    scores[1:, :3, :3] = torch.nan
    scores[6:, 0, 4] = torch.nan
    return scores


@pytest.mark.parametrize("unit", ["pixel", "image"])
def test_every_cell_takes_the_finest_finite_level(unit: str) -> None:
    scores = with_void_cells(10)
    alpha = 0.1  # nine scores
    levels = []
    for partition in (groups.pixel(GRID), *LEVELS):
        calibrator = Calibrator(partition, alpha=alpha, unit=unit)
        calibrator.update_scores(scores)
        levels.append(calibrator.compute())
    calibrator = Calibrator(groups.pixel(GRID), alpha=alpha, unit=unit, fallback=LEVELS)
    for part in scores.split(3):
        calibrator.update_scores(part)
    made = calibrator.compute()
    assert made.level is not None
    seen = set()
    for i, j in np.ndindex(GRID):
        finite = [n for n, level in enumerate(levels) if level.threshold[i, j].isfinite()]
        use = finite[0] if finite else 0
        seen.add(use if finite else None)
        assert int(made.level[i, j]) == use
        assert made.threshold[i, j] == levels[use].threshold[i, j]
        if finite:
            assert made.count[i, j] == levels[use].count[i, j]
    assert {0, 1} <= seen  # the case is one
    if unit == "image":
        assert 2 in seen


def test_a_fallback_merges_saves_and_resizes(tmp_path: Path) -> None:
    scores = with_void_cells(12)
    whole, one, two = (
        Calibrator(groups.pixel(GRID), alpha=0.1, fallback=LEVELS, max_images=12) for _ in range(3)
    )
    whole.update_scores(scores)
    two.update_scores(scores[5:])
    one.update_scores(scores[:5])
    two.merge(one)
    left, right = whole.compute(), two.compute()
    assert same(left.threshold, right.threshold)
    assert left.level is not None
    assert right.level is not None
    assert same(left.level, right.level)
    left.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert loaded.level is not None
    assert same(loaded.level, left.level)
    larger = loaded.resize((8, 12))
    assert larger.level is not None
    assert same(larger.level[::2, ::2], left.level)
    with raises(ValueError, "Calibrator.merge", "the same fallback"):
        Calibrator(groups.pixel(GRID), alpha=0.1, max_images=12).merge(whole)


def test_per_class_and_pixel_falls_back_to_class_and_image() -> None:
    probs = torch.rand(30, 2, *GRID, generator=seeded(4))
    labels = torch.randint(2, (30, *GRID), generator=seeded(5))
    bare = Calibrator(groups.pixel(GRID), alpha=0.05, per_class=True)
    bare.update(probs, labels)
    assert bare.compute().infinite_share > 0.5
    calibrator = Calibrator(groups.pixel(GRID), alpha=0.05, per_class=True, fallback=LEVELS)
    calibrator.update(probs, labels)
    made = calibrator.compute()
    assert made.infinite_share == 0
    pooled = Calibrator(LEVELS[0], alpha=0.05, per_class=True)
    pooled.update(probs, labels)
    assert made.level is not None
    fell = made.level == 1
    assert fell.any()
    assert same(made.threshold[fell], pooled.compute().threshold[fell])


def test_errors(tmp_path: Path) -> None:
    with raises(ValueError, "Calibrator", "unit among 'pixel', 'image', got 'scene'"):
        Calibrator(groups.image(GRID), unit="scene")
    with raises(ValueError, "Calibrator", r"fallback groups of the grid \[4, 6\], got \[4, 5\]"):
        Calibrator(groups.pixel(GRID), fallback=[groups.image((4, 5))])
    one, other = Calibrator(groups.image(GRID)), Calibrator(groups.image(GRID), unit="image")
    with raises(ValueError, "Calibrator.merge", r"the same unit \(pixel\), got image"):
        one.merge(other)
