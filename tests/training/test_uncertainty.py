"""Uncertainty maps against their formulas, and conformal certainty against counting."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.helpers import exact, raises, same, seeded
from torch import Tensor

from cpseg import (
    Calibration,
    Calibrator,
    certainty,
    confidence_uncertainty,
    discrepancy_uncertainty,
    groups,
    nonconformity,
    nonconformity_map,
    uncertainty_map,
)

# --- maps ----------------------------------------------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.where(
        x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-abs(x)))
    )


def distribution(logits: Tensor) -> np.ndarray:
    z = exact(logits)
    if z.shape[1] == 1:
        return np.concatenate([sigmoid(-z), sigmoid(z)], 1)
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def logits(seed: int, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = 5 * torch.randn(2, classes, 3, 4, generator=seeded(seed))
    values[0, 0, 0] = 100
    values[1, 0, 0] = -100
    return values.to(dtype)


@given(seed=st.integers(0, 10**6), classes=st.sampled_from([1, 2, 5]))
def test_maps_equal_their_formulas(seed: int, classes: int) -> None:
    one, two = logits(seed, classes), logits(seed + 1, classes)
    got = uncertainty_map(one, two)
    assert np.allclose(exact(got), np.abs(sigmoid(exact(one)) - sigmoid(exact(two))), atol=1e-6)
    p, q = distribution(one), distribution(two)
    apart = discrepancy_uncertainty(one, two)
    assert np.allclose(exact(apart), np.abs(p - q).sum(1) / 2, atol=1e-6)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(p > 0, p * np.log(p), 0).sum(1) / math.log(max(2, classes))
    sure = confidence_uncertainty(one)
    assert np.allclose(exact(sure), entropy, atol=2e-6)
    for found in (got, apart, sure):
        assert found.dtype == torch.float32
        assert (found >= 0).all()
        assert (found <= 1).all()
    if classes == 1:
        assert torch.allclose(apart, got[:, 0], atol=1e-6)


def test_ends_of_the_range() -> None:
    even, sure = torch.zeros(1, 3, 1, 1), torch.tensor([99.0, 0, 0]).reshape(1, 3, 1, 1)
    assert confidence_uncertainty(even).item() == pytest.approx(1)
    assert confidence_uncertainty(sure).item() < 1e-37
    assert discrepancy_uncertainty(sure, sure).item() == 0
    assert discrepancy_uncertainty(sure, sure.flip(1)).item() == 1
    assert uncertainty_map(torch.tensor([100.0]), torch.tensor([-100.0])).item() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_and_gradient(dtype: torch.dtype) -> None:
    one, two = logits(1, 1, dtype).requires_grad_(), logits(2, 1, dtype).requires_grad_()
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for found in (
        uncertainty_map(one, two),
        confidence_uncertainty(one),
        discrepancy_uncertainty(one, two),
    ):
        assert found.dtype == wanted
        assert not found.requires_grad
    want = uncertainty_map(one.to(wanted), two.to(wanted))
    assert same(uncertainty_map(one, two), want)


# --- certainty -----------------------------------------------------------------------------------

SIZE = (3, 4)


def images(seed: int, count: int, size: tuple[int, int] = SIZE) -> tuple[Tensor, Tensor]:
    """Scores with ties, labels with void."""
    generator = seeded(seed)
    probs = (torch.rand(count, 3, *size, generator=generator) * 16).round() / 16
    labels = torch.randint(3, (count, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return probs, labels


def counted(
    probs: Tensor, labels: Tensor, new: Tensor, chosen: Tensor, cells: Tensor, *, per_class: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(1 + #{scores >= s}) / (n + 1) by a loop over pixels, exactly; and n."""
    known, asked = nonconformity(probs, labels).numpy(), nonconformity(new, chosen).numpy()
    value, number = np.full(chosen.shape, np.nan), np.zeros(chosen.shape, int)
    for b, i, j in np.ndindex(*chosen.shape):
        n = above = 0
        for image, r, c in np.ndindex(*known.shape):
            y = int(labels[image, r, c])
            alike = cells[r, c] == cells[i, j] and (not per_class or y == int(chosen[b, i, j]))
            if alike and y != 255:
                n += 1
                above += known[image, r, c] >= asked[b, i, j]
        number[b, i, j] = n
        if int(chosen[b, i, j]) != 255:
            value[b, i, j] = Fraction(1 + int(above), n + 1)
    return value, number


@given(seed=st.integers(0, 10**6), per_class=st.booleans(), pooled=st.booleans())
def test_p_values_count(seed: int, per_class: bool, pooled: bool) -> None:
    """Multiples of 1/16 never share a bin: pooled groups are exact too."""
    cells = groups.blocks(SIZE, 2) if pooled else groups.pixel(SIZE)
    probs, labels = images(seed, 7)
    new, chosen = images(seed + 1, 2)
    calibrator = Calibrator(cells, alpha=0.2, num_classes=3, per_class=per_class)
    calibrator.update(probs[:3], labels[:3])
    other = Calibrator(cells, alpha=0.2, num_classes=3, per_class=per_class)
    other.update(probs[3:], labels[3:])
    calibrator.merge(other)
    want, number = counted(probs, labels, new, chosen, cells, per_class=per_class)
    assert same(calibrator.p_values(new, chosen), want)
    assert same(calibrator.p_values(new[0], chosen[0]), want[0])
    expected = np.where(np.isnan(want) | (number == 0), 0, want)
    assert same(certainty(new, calibrator, labels=chosen), torch.from_numpy(expected).float())


@given(
    seed=st.integers(0, 10**6),
    alpha=st.sampled_from(["0.05", "0.1", "0.25", "0.5", "0.9"]),
    kind=st.sampled_from(["pixel", "class", "image", "unit"]),
    score=st.sampled_from(["lac", "aps"]),
)
def test_above_alpha_just_where_in_the_set(seed: int, alpha: str, kind: str, score: str) -> None:
    generator = seeded(seed)
    cells = groups.pixel(SIZE) if kind in ("pixel", "class") else groups.image(SIZE)
    calibrator = Calibrator(
        cells,
        alpha=alpha,
        num_classes=3,
        per_class=kind == "class",
        unit="image" if kind == "unit" else "pixel",
        score=score,
    )
    probs = torch.rand(19, 3, *SIZE, generator=generator)
    calibrator.update(probs, torch.randint(3, (19, *SIZE), generator=generator))
    new = torch.rand(2, 3, *SIZE, generator=generator)
    new[0] = probs[4]
    sets = calibrator.compute().prediction_set(new)
    for k in range(3):
        p = calibrator.p_values(new, torch.full((2, *SIZE), k))
        assert same(p > float(alpha), sets[:, k])


def test_p_values_at_another_size() -> None:
    probs, labels = images(3, 9)
    calibrator = Calibrator(groups.pixel(SIZE))
    calibrator.update(probs, labels)
    new, chosen = images(4, 1)
    large, wide = (x.repeat_interleave(2, -2).repeat_interleave(3, -1) for x in (new, chosen))
    want = calibrator.p_values(new, chosen).repeat_interleave(2, -2).repeat_interleave(3, -1)
    assert same(calibrator.p_values(large, wide), want)


def test_p_values_of_true_classes_are_valid() -> None:
    """P(p <= a) <= a: mean over 4000 draws of 20 exchangeable images, at 5.2 standard errors."""
    generator = seeded(0)
    for a in (0.1, 0.5):
        probs = torch.rand(20, 2, 40, 100, generator=generator).softmax(1)
        labels = torch.randint(2, (20, 40, 100), generator=generator)
        calibrator = Calibrator(groups.pixel((40, 100)))
        calibrator.update(probs[:19], labels[:19])
        share = float((calibrator.p_values(probs[19], labels[19]) <= a).double().mean())
        assert abs(share - a) < 5.2 * math.sqrt(a * (1 - a) / 4000)  # a is a multiple of 1/20


def test_bounded_memory_forgets() -> None:
    probs, labels = images(5, 9)
    for most, enough in ((9, False), (None, True), (200, True)):
        calibrator = Calibrator(groups.pixel(SIZE), alpha=0.1, max_images=most)
        calibrator.update(probs, labels)
        if enough:
            calibrator.p_values(probs, labels)
        else:
            with raises(ValueError, "Calibrator.p_values", "keeps every score, got max_images=9"):
                calibrator.p_values(probs, labels)


@pytest.mark.parametrize("per_class", [False, True])
def test_certainty_of_a_calibration(per_class: bool) -> None:
    """1 - s / q in the set, 0 outside and where q is infinite."""
    probs, _ = images(6, 2)
    threshold = torch.rand(3, *SIZE, generator=seeded(6))
    threshold[:, 0, 0], threshold[:, 0, 1] = math.inf, 0
    if not per_class:
        threshold = threshold[0]
    calibration = Calibration(
        threshold,
        torch.full(threshold.shape, 9),
        alpha=0.1,
        num_images=9,
        num_classes=3,
        background=0,
    )
    chosen = calibration.pseudo_labels(probs)
    got = certainty(probs, calibration)
    scores = nonconformity_map(probs)
    want = np.zeros(chosen.shape)
    for b, i, j in np.ndindex(*chosen.shape):
        y = int(chosen[b, i, j])
        if y != 255:
            s = float(scores[b, y, i, j])
            q = float(threshold[y, i, j] if per_class else threshold[i, j])
            if s <= q < math.inf:
                want[b, i, j] = 1 - s / q if q else 1
    assert got.dtype == torch.float32
    assert np.allclose(exact(got), want, atol=1e-6)
    assert same(certainty(probs, calibration, labels=chosen), got)
    assert same(certainty(probs[0], calibration), got[0])
    assert (got[:, 0, 0] == 0).all()
    limits = torch.rand(3, *SIZE, generator=seeded(7))  # which a class must pass as well
    cut = replace(calibration, class_threshold=limits)
    own = torch.randint(0, 3, chosen.shape, generator=seeded(8))
    rows, columns = np.indices(SIZE)
    passes = scores.gather(1, own[:, None])[:, 0] <= limits[own, rows, columns]
    want = certainty(probs, calibration, labels=own).masked_fill(~passes, 0)
    assert same(certainty(probs, cut, labels=own), want)
    assert (want > 0).any()
    assert not passes.all()


def test_nothing_known_is_no_certainty() -> None:
    probs, labels = images(7, 3)
    labels[:, 0, 0] = 255
    calibrator = Calibrator(groups.pixel(SIZE))
    calibrator.update(probs, labels)
    chosen = torch.zeros(3, *SIZE, dtype=torch.int64)
    assert (calibrator.p_values(probs, chosen)[:, 0, 0] == 1).all()
    assert (certainty(probs, calibrator, labels=chosen)[:, 0, 0] == 0).all()


# --- errors --------------------------------------------------------------------------------------


def test_pairs_that_are_none() -> None:
    one = torch.zeros(2, 1, 3, 4)
    for function, name in (
        (uncertainty_map, "refined_logits"),
        (discrepancy_uncertainty, "other_logits"),
    ):
        with raises(ValueError, function.__name__, rf"{name} of the shape .* got \[1, 1, 3, 4\]"):
            function(one, one[:1])
        with raises(TypeError, function.__name__, f"floating-point {name}, got torch.int64"):
            function(one, one.long())
    with raises(ValueError, "uncertainty_map", "at least one element"):
        uncertainty_map(one[:0], one[:0])
    with raises(ValueError, "confidence_uncertainty", r"\[B, K, H, W\], got \[1, 3, 4\]; add"):
        confidence_uncertainty(one[0])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fallback": [groups.image(SIZE)]}, "one fixed score and group a cell, got a fallback"),
        ({"score": "aps", "generator": seeded(0)}, "group a cell, got a generator"),
    ],
)
def test_p_values_that_would_mean_nothing(options: dict[str, Any], match: str) -> None:
    probs, labels = images(8, 3)
    calibrator = Calibrator(groups.pixel(SIZE), **options)
    with raises(ValueError, "Calibrator.p_values", "labelled images, got none"):
        calibrator.p_values(probs, labels)
    calibrator.update(probs, labels)
    with raises(ValueError, "Calibrator.p_values", match):
        calibrator.p_values(probs, labels)
    with raises(ValueError, "Calibrator.p_values", "3 classes as before, got probs"):
        calibrator.p_values(probs[:, :2], labels.clamp(max=1))


def test_certainty_says_what_is_missing() -> None:
    probs, labels = images(9, 3)
    calibrator = Calibrator(groups.pixel(SIZE))
    calibrator.update(probs, labels)
    with raises(ValueError, "certainty", "labels with a Calibrator, got none; pass calibrator"):
        certainty(probs, calibrator)
    with raises(TypeError, "certainty", "a Calibration or a Calibrator, got Tensor"):
        certainty(probs, probs)  # type: ignore[arg-type]
    calibration = calibrator.compute()
    with raises(ValueError, "certainty", r"labels \[3, 3, 4\] .* got \[1, 3, 4\]"):
        certainty(probs, calibration, labels=labels[:1])
    with raises(ValueError, "certainty", "3 classes as calibrated"):
        certainty(probs[:, :2], calibration, labels=labels.clamp(max=1))
    aps = Calibrator(groups.pixel(SIZE), score="aps")
    aps.update(probs, labels)
    with raises(ValueError, "certainty", "a calibration of the lac score, got 'aps'; pass the"):
        certainty(probs, aps.compute(), labels=labels)
