"""Confusion matrix, mIoU, boundary IoU, coverage, set size, kept share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support import oracles
from tests.support.helpers import INTEGERS, raises, same, seeded
from torch import Tensor

from cpseg import (
    boundary_iou,
    confusion_matrix,
    coverage,
    kept_share,
    mean_iou,
    prediction_set,
    set_size,
)

NAN = math.nan


def maps(
    seed: int, num_classes: int, size: tuple[int, ...], ignore: int = 255
) -> tuple[Tensor, Tensor]:
    """Predictions with pixels left out and labels with void; some classes may be nowhere."""
    draw = np.random.default_rng(seed)
    values = [*range(num_classes), ignore]
    return (
        torch.from_numpy(draw.choice(values, size)),
        torch.from_numpy(draw.choice(values[1:], size)),
    )


def blobs(seed: int, num_classes: int, batch: int, size: tuple[int, int]) -> Tensor:
    """Label maps with regions, so that bands have an inside."""
    draw = np.random.default_rng(seed)
    result = np.zeros((batch, *size), np.int64)
    for b in range(batch):
        for k in [*range(num_classes), 255]:
            i, j = draw.integers(0, size[0]), draw.integers(0, size[1])
            result[b, i : i + size[0] // 2, j : j + size[1] // 2] = k
    return torch.from_numpy(result)


def close(got: Tensor, want: list[float] | float) -> bool:
    assert got.dtype == torch.float64
    return np.allclose(got.numpy(), want, rtol=1e-12, atol=0, equal_nan=True)


# --- confusion matrix and mIoU -----------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    num_classes=st.sampled_from([1, 2, 3, 21]),
    ignore=st.sampled_from([255, -1, 100]),
)
def test_confusion_and_iou_equal_loops(seed: int, num_classes: int, ignore: int) -> None:
    predictions, labels = maps(seed, num_classes, (2, 5, 6), ignore)
    want = oracles.confusion(predictions.numpy(), labels.numpy(), num_classes, ignore)
    options: dict[str, Any] = {"num_classes": num_classes, "ignore_index": ignore}
    whole = confusion_matrix(predictions, labels, with_ignored=True, **options)
    square = confusion_matrix(predictions, labels, **options)
    assert same(whole, want)
    assert same(square, want[:, :-1])
    for matrix, with_ignored in ((whole, True), (square, False)):
        each = oracles.iou(
            predictions.numpy(), labels.numpy(), num_classes, ignore, with_ignored=with_ignored
        )
        assert close(mean_iou(matrix, per_class=True), each)
        assert close(mean_iou(matrix), oracles.mean(each))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_confusion_of_every_integer_dtype(dtype: torch.dtype) -> None:
    predictions, labels = maps(1, 4, (3, 7), 100)
    want = confusion_matrix(predictions, labels, num_classes=4, ignore_index=100)
    for ours, theirs in ((dtype, torch.int64), (torch.int64, dtype), (dtype, dtype)):
        got = confusion_matrix(
            predictions.to(ours), labels.to(theirs), num_classes=4, ignore_index=100
        )
        assert same(got, want)


def test_rows_are_the_truth() -> None:
    got = confusion_matrix(torch.tensor([1, 1, 1]), torch.tensor([0, 0, 1]), num_classes=2)
    assert got.tolist() == [[0, 2], [0, 1]]
    assert close(mean_iou(got, per_class=True), [0.0, 1 / 3])


def test_confusion_of_batches_adds_up() -> None:
    predictions, labels = maps(2, 5, (4, 6, 6))
    whole = confusion_matrix(predictions, labels, num_classes=5, with_ignored=True)
    parts = [
        confusion_matrix(p, y, num_classes=5, with_ignored=True)
        for p, y in zip(predictions, labels, strict=True)
    ]
    assert same(whole, torch.stack(parts).sum(0))


def test_counts_are_exact_beyond_float32() -> None:
    matrix = torch.tensor([[2**40 + 1, 1], [0, 2**40 + 1]])
    assert close(mean_iou(matrix), (2**40 + 1) / (2**40 + 2))
    assert float(mean_iou(matrix)) < 1


def test_void_does_not_count_and_left_out_pixels_do_where_asked() -> None:
    predictions, labels = torch.tensor([0, 1, 255, 1]), torch.tensor([0, 255, 0, 1])
    assert float(mean_iou(confusion_matrix(predictions, labels, num_classes=2))) == 1
    strict = confusion_matrix(predictions, labels, num_classes=2, with_ignored=True)
    assert close(mean_iou(strict, per_class=True), [0.5, 1.0])


def test_classes_that_are_nowhere_do_not_count() -> None:
    labels = torch.tensor([0, 0, 2])
    matrix = confusion_matrix(labels, labels, num_classes=4)
    assert close(mean_iou(matrix, per_class=True), [1, NAN, 1, NAN])
    assert float(mean_iou(matrix)) == 1
    assert mean_iou(torch.zeros(3, 3, dtype=torch.int64)).isnan()


# --- boundary IoU ------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([(30, 40), (7, 90), (1, 9), (64, 48), (5, 5)]),
    ratio=st.sampled_from([0.02, 0.05, 0.0, 0.3]),
)
def test_boundary_iou_equals_erosion(seed: int, size: tuple[int, int], ratio: float) -> None:
    predictions, labels = blobs(seed, 3, 2, size), blobs(seed + 1, 3, 2, size)
    want = oracles.boundary_iou(predictions.numpy(), labels.numpy(), 3, 255, ratio)
    options: dict[str, Any] = {"num_classes": 3, "dilation_ratio": ratio}
    assert close(boundary_iou(predictions, labels, per_class=True, **options), want)
    assert close(boundary_iou(predictions, labels, **options), oracles.mean(want))
    one = oracles.boundary_iou(predictions[:1].numpy(), labels[:1].numpy(), 3, 255, ratio)
    assert close(boundary_iou(predictions[0], labels[0], per_class=True, **options), one)


def test_the_band_is_as_wide_as_published() -> None:
    """A 300 x 400 image has diagonal 500: erosion by 10."""
    labels = torch.zeros(300, 400, dtype=torch.int64)
    labels[100:200, 100:300] = 1
    shrunk = torch.zeros_like(labels)
    shrunk[110:190, 110:290] = 1
    inner = 100 * 200 - 80 * 180
    assert close(boundary_iou(labels, labels, num_classes=2), 1.0)
    got = boundary_iou(shrunk, labels, num_classes=2, per_class=True)
    assert float(got[1]) == 0, "the band of the one begins where the other's ends"
    nearly = torch.zeros_like(labels)
    nearly[101:199, 101:299] = 1
    common = 98 * 198 - 80 * 180
    other = 98 * 198 - 78 * 178
    want = common / (inner + other - common)
    assert close(boundary_iou(nearly, labels, num_classes=2, per_class=True)[1], want)


def test_boundary_iou_leaves_its_input_alone() -> None:
    predictions, labels = blobs(0, 3, 1, (9, 9)), blobs(1, 3, 1, (9, 9))
    before = predictions.clone(), labels.clone()
    boundary_iou(predictions, labels, num_classes=3)
    assert same(predictions, before[0])
    assert same(labels, before[1])


def test_what_is_predicted_at_void_does_not_matter() -> None:
    predictions, labels = blobs(3, 3, 2, (20, 24)), blobs(4, 3, 2, (20, 24))
    assert (labels == 255).any()
    changed = torch.where(labels == 255, 2, predictions)
    want = boundary_iou(predictions, labels, num_classes=3)
    assert same(boundary_iou(changed, labels, num_classes=3), want)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int8,
    ],
)
def test_boundary_iou_of_every_integer_dtype(dtype: torch.dtype) -> None:
    predictions = blobs(5, 3, 2, (20, 24)).clamp(max=2)
    labels = blobs(6, 3, 2, (20, 24)).clamp(max=2)
    want = boundary_iou(predictions, labels, num_classes=3)
    assert same(boundary_iou(predictions.to(dtype), labels.to(dtype), num_classes=3), want)


def test_boundary_iou_of_bytes_with_another_void() -> None:
    predictions, labels = blobs(5, 3, 2, (20, 24)), blobs(6, 3, 2, (20, 24))
    want = boundary_iou(predictions, labels, num_classes=3)
    shifted = [torch.where(x == 255, 77, x).to(torch.int8) for x in (predictions, labels)]
    assert same(boundary_iou(*shifted, num_classes=3, ignore_index=77), want)


# --- coverage, set size, kept share ------------------------------------------------------------


@given(seed=st.integers(0, 10**6))
def test_coverage_and_set_size_equal_loops(seed: int) -> None:
    generator = seeded(seed)
    sets = torch.rand(2, 4, 3, 5, generator=generator) < 0.6
    labels = torch.randint(4, (2, 3, 5), generator=generator)
    labels[torch.rand(2, 3, 5, generator=generator) < 0.3] = 255
    labels[0, 0, 0] = 1
    hit = number = 0
    for b, i, j in np.ndindex(2, 3, 5):
        y = int(labels[b, i, j])
        if y != 255:
            number += 1
            hit += bool(sets[b, y, i, j])
    assert close(coverage(sets, labels), hit / number)
    assert close(coverage(sets, labels.to(torch.uint8)), hit / number)
    assert close(set_size(sets), int(sets.sum()) / 30)
    assert close(set_size(sets[0]), int(sets[0].sum()) / 15)
    one = [bool(sets[1, y, i, j]) for i, j in np.ndindex(3, 5) if (y := int(labels[1, i, j])) < 4]
    assert close(coverage(sets[1], labels[1]), sum(one) / len(one) if one else NAN)


def test_coverage_of_nothing_is_nan() -> None:
    sets = torch.ones(2, 1, 2, dtype=torch.bool)
    assert coverage(sets, torch.full((1, 2), 255)).isnan()
    assert coverage(sets, torch.full((1, 2), -1), ignore_index=-1).isnan()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_kept_share(dtype: torch.dtype) -> None:
    labels = torch.tensor([[0, 1, 2, 100]]).to(dtype)
    assert close(kept_share(labels, ignore_index=100), 0.75)
    assert close(kept_share(labels, ignore_index=-1), 1.0)
    assert close(kept_share(torch.full((2, 2), 255, dtype=torch.uint8)), 0.0)


# --- errors ------------------------------------------------------------------------------------

MAP = torch.zeros(2, 3, 4, dtype=torch.int64)


@pytest.mark.parametrize("function", [confusion_matrix, boundary_iou])
@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"predictions": MAP.float()}, TypeError, r"integer predictions, got torch\.float32"),
        ({"labels": MAP.bool()}, TypeError, r"integer labels, got torch\.bool"),
        ({"labels": [[0]]}, TypeError, "labels as a tensor, got list"),
        (
            {"predictions": MAP[:, :, :3]},
            ValueError,
            r"predictions of the shape of labels \[2, 3, 4\], got \[2, 3, 3\]; resize",
        ),
        ({"predictions": MAP[:1]}, ValueError, r"got \[1, 3, 4\]"),
        ({"predictions": MAP.to("meta")}, ValueError, r"of labels \(cpu\), got meta"),
        ({"predictions": MAP[:0], "labels": MAP[:0]}, ValueError, "at least one element in labels"),
        ({"predictions": MAP + 3}, ValueError, r"predictions in 0\.\.2 or 255 .*, got 3; map"),
        ({"predictions": MAP - 1}, ValueError, "predictions in .* got -1"),
        ({"labels": MAP + 254}, ValueError, r"labels in 0\.\.2 or 255 .*, got 254"),
        ({"labels": MAP - 1}, ValueError, "labels in .* got -1"),
        ({"ignore_index": 2}, ValueError, r"outside the classes 0\.\.2, got 2"),
    ],
)
def test_pairs_that_are_none(
    function: Any, changes: dict[str, Any], kind: type[Exception], match: str
) -> None:
    arguments = {"predictions": MAP, "labels": MAP, "num_classes": 3, **changes}
    with raises(kind, function.__name__, match):
        function(**arguments)


def test_boundary_iou_wants_maps() -> None:
    for bad in (MAP[0, 0], MAP[None]):
        with raises(ValueError, "boundary_iou", r"labels \[B, H, W\] or \[H, W\], got"):
            boundary_iou(bad, bad, num_classes=3)


@pytest.mark.parametrize("shape", [(2, 4), (3, 2), (4,), (2, 2, 2)])
def test_mean_iou_wants_a_confusion_matrix(shape: tuple[int, ...]) -> None:
    with raises(ValueError, "mean_iou", r"confusion \[K, K\] or \[K, K \+ 1\], got .*; make it"):
        mean_iou(torch.zeros(shape, dtype=torch.int64))


SETS = torch.ones(2, 5, 3, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("sets", "kind", "match"),
    [
        (SETS.float(), TypeError, r"bool prediction_set, got torch\.float32; make it"),
        ([[True]], TypeError, "bool prediction_set, got list"),
        (SETS[0, 0], ValueError, r"\[B, K, H, W\] or \[K, H, W\], got \[3, 4\]; keep"),
        (SETS[None], ValueError, r"got \[1, 2, 5, 3, 4\]"),
        (SETS[:0], ValueError, r"at least one element in prediction_set, got \[0, 5, 3, 4\]"),
    ],
)
def test_sets_that_are_none(sets: Any, kind: type[Exception], match: str) -> None:
    with raises(kind, "set_size", match):
        set_size(sets)
    with raises(kind, "coverage", match):
        coverage(sets, MAP)


@pytest.mark.parametrize(
    ("labels", "kind", "match"),
    [
        (MAP.float(), TypeError, r"integer labels, got torch\.float32"),
        (MAP[0], ValueError, r"labels \[2, 3, 4\] for sets \[2, 5, 3, 4\], got \[3, 4\]; resize"),
        (MAP[:1], ValueError, r"got \[1, 3, 4\]"),
        (MAP.to("meta"), ValueError, r"labels on the device of prediction_set \(cpu\), got meta"),
        (MAP + 5, ValueError, r"labels in 0\.\.4 or 255 .*, got 5"),
        (MAP - 1, ValueError, "got -1"),
    ],
)
def test_labels_that_do_not_belong_to_the_sets(
    labels: Tensor, kind: type[Exception], match: str
) -> None:
    with raises(kind, "coverage", match):
        coverage(SETS, labels)


def test_coverage_checks_shapes_where_broadcasting_would_hide_them() -> None:
    probs = torch.rand(2, 5, 1, 1)
    with raises(ValueError, "coverage", r"got \[2, 3, 4\]"):
        coverage(prediction_set(probs, 0.5), MAP)


def test_kept_share_says_what_is_wrong() -> None:
    with raises(TypeError, "kept_share", r"integer pseudo_labels, got torch\.float32"):
        kept_share(MAP.float())
    with raises(TypeError, "kept_share", "pseudo_labels as a tensor, got list"):
        kept_share([0])  # type: ignore[arg-type]
    with raises(ValueError, "kept_share", r"at least one element in pseudo_labels, got \[0\]"):
        kept_share(torch.zeros(0, dtype=torch.int64))
