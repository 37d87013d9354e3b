"""APS, RAPS and the margin: values against loops, the same bits everywhere, sets, errors."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.helpers import FLOATS, exact, raises, same, seeded
from torch import Tensor

from cpseg import (
    Calibration,
    Calibrator,
    groups,
    nonconformity,
    nonconformity_map,
    prediction_set,
)
from cpseg.core.nonconformity import score_range

OTHERS = ("aps", "raps", "raps:0.3:1", "margin")


def naive(p: np.ndarray, score: str, u: float = 1.0) -> np.ndarray:
    """Scores of all classes of one pixel, in float64, by the definition of each."""
    count = len(p)
    if score == "margin":
        return np.array([max(np.delete(p, k)) - p[k] for k in range(count)])
    penalty, free = {"aps": (0.0, 0), "raps": (0.01, 5), "raps:0.3:1": (0.3, 1)}[score]
    total = sum(p)
    found = []
    for k in range(count):
        before = [j for j in range(count) if p[j] > p[k] or (p[j] == p[k] and j < k)]
        share = 1.0 if total == 0 else (sum(p[j] for j in before) + u * p[k]) / total
        found.append(share + penalty * max(0, len(before) + 1 - free))
    return np.array(found)


def probs_with_ties(seed: int, num_classes: int, *, batch: int = 2) -> Tensor:
    p = torch.rand(batch, num_classes, 3, 4, generator=seeded(seed))
    p[:, :, 1] = (p[:, :, 1] * 3).round() / 3
    p[0, :, 2, 0] = 0  # nothing believed at all
    p[0, :, 2, 1] = 1  # a sigmoid model that believes everything
    return p


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), num_classes=st.integers(2, 8), score=st.sampled_from(OTHERS))
def test_values_equal_loops(seed: int, num_classes: int, score: str) -> None:
    p = probs_with_ties(seed, num_classes)
    got = nonconformity_map(p, score=score)
    assert got.dtype == torch.float32
    for b, i, j in np.ndindex(2, 3, 4):
        want = naive(exact(p[b, :, i, j]), score)
        assert np.allclose(got[b, :, i, j].numpy(), want, atol=1e-6)


@pytest.mark.parametrize("score", ["aps", "raps:0.3:1"])
def test_randomised_values_equal_loops_with_the_same_draw(score: str) -> None:
    p = probs_with_ties(4, 5)
    got = nonconformity_map(p, score=score, generator=seeded(9))
    u = torch.rand(2, 1, 3, 4, generator=seeded(9))
    for b, i, j in np.ndindex(2, 3, 4):
        want = naive(exact(p[b, :, i, j]), score, float(u[b, 0, i, j]))
        assert np.allclose(got[b, :, i, j].numpy(), want, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("score", OTHERS)
@pytest.mark.parametrize("seed", [None, 3])
def test_true_class_scores_are_the_class_scores_bit_for_bit(
    score: str, seed: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seed is not None and score == "margin":
        pytest.skip("the margin is not randomised")
    p = probs_with_ties(5, 6).to(dtype)
    labels = torch.randint(6, (2, 3, 4), generator=seeded(6))
    labels[0, 0, 0] = 255
    draws: list[Any] = [None if seed is None else seeded(seed) for _ in range(3)]
    every = nonconformity_map(p, score=score, generator=draws[0])
    want = every.gather(1, labels.where(labels != 255, 0)[:, None])[:, 0]
    want[labels == 255] = torch.nan
    assert same(nonconformity(p, labels, score=score, generator=draws[1]), want)
    monkeypatch.setattr(sys.modules["cpseg.core.nonconformity"], "_TILE", 5)  # one row at a time
    assert same(nonconformity(p, labels, score=score, generator=draws[2]), want)


@pytest.mark.parametrize("score", OTHERS)
def test_scores_fall_as_the_probability_grows(score: str) -> None:
    p = torch.rand(7, 9, 9, generator=seeded(1))
    by_p = nonconformity_map(p, score=score).gather(0, p.argsort(0, descending=True))
    assert (by_p.diff(dim=0) >= 0).all()


@pytest.mark.parametrize("score", OTHERS)
@pytest.mark.parametrize("num_classes", [2, 9])
def test_scores_stay_in_their_range_and_reach_its_ends(score: str, num_classes: int) -> None:
    low, high = score_range(score, num_classes)
    certain = torch.zeros(num_classes, 1, 1)
    certain[1] = 1
    every = torch.cat([nonconformity_map(probs_with_ties(2, num_classes), score=score).flatten(),
                       nonconformity_map(certain, score=score).flatten()])  # fmt: skip
    assert low <= every.min()
    assert every.max() <= high
    assert every.max() == pytest.approx(high, rel=1e-5)


def test_classes_may_be_permuted() -> None:
    p = torch.rand(6, 4, 4, generator=seeded(8))
    order = torch.randperm(6, generator=seeded(1))
    for score in OTHERS:
        got, want = (
            nonconformity_map(p[order], score=score),
            nonconformity_map(p, score=score)[order],
        )
        assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("score", OTHERS)
@pytest.mark.parametrize("variant", ["pixel", "image", "image, unit image"])
def test_a_calibration_carries_its_score(score: str, variant: str, tmp_path: Any) -> None:
    p = torch.rand(39, 4, 3, 4, generator=seeded(2))
    labels = torch.randint(4, (39, 3, 4), generator=seeded(3))
    partition = groups.pixel((3, 4)) if variant == "pixel" else groups.image((3, 4))
    unit = "image" if variant.endswith("unit image") else "pixel"
    calibrator = Calibrator(partition, alpha=0.2, score=score, unit=unit)
    calibrator.update(p, labels)
    made = calibrator.compute()
    made.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert (loaded.score, loaded.unit) == (score, unit)
    sets = loaded.prediction_set(p)
    assert same(sets, prediction_set(p, made.threshold, score=score))
    assert same(sets, nonconformity_map(p, score=score) <= made.threshold)
    # Calibration pixels at the quantile are inside their own set.
    hit = sets.gather(1, labels[:, None]).float().mean()
    assert hit >= 0.8
    with raises(ValueError, "Calibration.pseudo_labels", "of the lac score to select labels"):
        loaded.pseudo_labels(p)


@pytest.mark.parametrize("score", OTHERS)
@pytest.mark.parametrize("percent", [5, 20, 50])
def test_pooled_thresholds_are_rounded_up_within_a_percent_in_odds(
    score: str, percent: int
) -> None:
    values = nonconformity(
        torch.rand(50, 7, 3, 4, generator=seeded(percent)),
        torch.randint(7, (50, 3, 4), generator=seeded(7)),
        score=score,
    )
    calibrator = Calibrator(groups.image((3, 4)), alpha=percent / 100, score=score, num_classes=7)
    calibrator.update_scores(values)
    got = float(calibrator.compute().threshold[0, 0])
    ordered = np.sort(values.numpy().ravel())
    want = float(ordered[len(ordered) - int((len(ordered) + 1) * percent / 100 + 1e-9)])
    low, high = score_range(score, 7)
    place, exact_place = ((x - low) / (high - low) for x in (got, want))
    assert got >= want
    assert place * (1 - exact_place) <= 1.01 * exact_place * (1 - place) + 1e-5


def test_randomised_calibrations_want_a_generator_for_sets() -> None:
    p = torch.rand(30, 3, 2, 2, generator=seeded(2))
    labels = torch.randint(3, (30, 2, 2), generator=seeded(3))
    drawn = Calibrator(groups.pixel((2, 2)), alpha=0.2, score="aps", generator=seeded(1))
    drawn.update(p, labels)
    made = drawn.compute()
    assert made.randomized
    assert made.prediction_set(p, generator=seeded(5)).shape == p.shape
    with raises(ValueError, "Calibration.prediction_set", "a generator: the calibration is random"):
        made.prediction_set(p)
    plain = Calibrator(groups.pixel((2, 2)), alpha=0.2, score="aps")
    plain.update(p, labels)
    with raises(ValueError, "Calibration.prediction_set", "no generator"):
        plain.compute().prediction_set(p, generator=seeded(5))
    with raises(ValueError, "Calibrator.merge", "the same randomized"):
        plain.merge(drawn)


@pytest.mark.parametrize(
    "score", ["", "LAC", "raps:", "raps:1", "raps:x:1", "raps:-1:2", "raps:1:-2", "raps:1:2:3",
              "raps:inf:1", "raps:nan:1", "raps:1:2.5", None]
)  # fmt: skip
def test_unknown_scores_are_named(score: Any) -> None:
    with raises(ValueError, "nonconformity_map", "a score among 'lac', 'aps', 'raps', 'margin' or"):
        nonconformity_map(torch.rand(2, 3, 3), score=score)


def test_errors() -> None:
    p, y = torch.rand(2, 3, 3), torch.zeros(3, 3, dtype=torch.int64)
    for score in ("lac", "margin"):
        with raises(ValueError, "nonconformity", "no generator: only aps and raps"):
            nonconformity(p, y, score=score, generator=seeded(0))
    with raises(ValueError, "nonconformity_map", "at least 2 classes for a margin, got 1"):
        nonconformity_map(p[:1], score="margin")
    with raises(ValueError, "Calibrator.update", "at least 2 classes for a margin"):
        Calibrator(groups.pixel((3, 3)), score="margin").update(p[:1], y)
    with raises(ValueError, "nonconformity", "got 7"):
        nonconformity(p, y + 7, score="aps")
    pooled = Calibrator(groups.image((3, 3)), score="raps")
    with raises(ValueError, "Calibrator.update_scores", "the number of classes for raps"):
        pooled.update_scores(torch.rand(3, 3))
    pooled = Calibrator(groups.image((3, 3)), score="margin")
    pooled.update_scores(torch.full((3, 3), -1.0))
    with raises(ValueError, "Calibrator.update_scores", r"scores in \[-1, 1\], got values outside"):
        pooled.update_scores(torch.full((3, 3), 1.5))
    assert pooled.num_images == 1
