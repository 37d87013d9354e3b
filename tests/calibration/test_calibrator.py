"""`Calibrator` and `Calibration`: values against loops, laws 3, 4 and 7, geometry, errors."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import oracles
from tests.support.helpers import FLOATS, INTEGERS, exact, raises, same, seeded
from torch import Tensor

from cpseg import (
    Calibration,
    Calibrator,
    confusion_matrix,
    coverage,
    evidence,
    groups,
    prediction_set,
    pseudo_labels,
)
from cpseg._internal import checks

INF, NAN = math.inf, math.nan
GRID = (4, 3)
VARIANTS: dict[str, dict[str, Any]] = {
    "pixel": {"groups": groups.pixel(GRID)},
    "pixel, bounded": {"groups": groups.pixel(GRID), "max_images": 60},
    "pixel, per class": {"groups": groups.pixel(GRID), "per_class": True},
    "blocks": {"groups": groups.blocks(GRID, 2)},
    "image": {"groups": groups.image(GRID)},
    "image, per class": {"groups": groups.image(GRID), "per_class": True},
}
POOLED = [name for name in VARIANTS if not name.startswith("pixel")]


def batch(
    seed: int, number: int, *, num_classes: int = 3, size: tuple[int, int] = GRID, void: float = 0.2
) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    probs = torch.rand(number, num_classes, *size, generator=generator)
    labels = torch.randint(num_classes, (number, *size), generator=generator)
    missing = torch.rand(number, *size, generator=generator) < void
    return probs, labels.masked_fill(missing, 255)


def calibrate(
    variant: str, probs: Tensor, labels: Tensor, alpha: Any = "0.2", **options: Any
) -> Calibration:
    calibrator = Calibrator(**{**VARIANTS[variant], "alpha": alpha, **options})
    calibrator.update(probs, labels)
    return calibrator.compute()


def equal(one: Calibration, other: Calibration) -> bool:
    return same(one.threshold, other.threshold) and same(one.count, other.count)


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [GRID, (8, 6), (2, 3), (9, 5), (1, 1), (3, 7)])
@pytest.mark.parametrize("alpha", ["0.2", "0.05"])
def test_thresholds_equal_loops(variant: str, size: tuple[int, int], alpha: str) -> None:
    probs, labels = batch(1, 26, size=size)
    got = calibrate(variant, probs, labels, alpha)
    options = VARIANTS[variant]
    images = [(p.numpy(), y.numpy()) for p, y in zip(probs, labels, strict=True)]
    layers = 3 if options.get("per_class") else None
    want, count = oracles.calibrate(images, options["groups"].numpy(), alpha, num_classes=layers)
    assert same(got.count, count)
    if variant not in POOLED:
        assert same(got.threshold, want)
        return
    value = got.threshold.numpy()
    finite = np.isfinite(want)
    assert (np.isfinite(value) == finite).all()
    assert (value >= want).all()
    ours, theirs = (x[finite].astype(np.float64) for x in (value, want))
    assert (ours / (1 - ours) <= 1.01 * theirs / (1 - theirs)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_probs_of_every_dtype(variant: str, dtype: torch.dtype) -> None:
    probs, labels = batch(2, 20)
    probs = probs.to(dtype)
    got = calibrate(variant, probs, labels)
    assert got.threshold.dtype == torch.float32
    assert equal(got, calibrate(variant, probs.to(torch.float32), labels))


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_labels_of_every_dtype(variant: str, dtype: torch.dtype) -> None:
    probs, labels = batch(3, 20)
    labels = torch.where(labels == 255, 100, labels)
    want = calibrate(variant, probs, labels, ignore_index=100)
    assert equal(calibrate(variant, probs, labels.to(dtype), ignore_index=100), want)
    assert int(want.count.max()) > 0
    if dtype == torch.int8:  # 255 is no int8: nothing is void then, and nothing breaks
        full = torch.where(labels == 100, 0, labels)
        got = calibrate(variant, probs, full.to(dtype))
        assert equal(got, calibrate(variant, probs, full))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_image_at_a_time_without_a_batch_axis(variant: str) -> None:
    probs, labels = batch(4, 22)
    one = Calibrator(**VARIANTS[variant], alpha=0.2)
    for p, y in zip(probs, labels, strict=True):
        one.update(p, y)
    assert one.num_images == 22
    assert equal(one.compute(), calibrate(variant, probs, labels))


def test_strided_inputs() -> None:
    probs, labels = batch(5, 20)
    last = probs.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    got = calibrate("pixel", last, labels.mT.contiguous().mT)
    assert equal(got, calibrate("pixel", probs, labels))
    wide = torch.stack([probs, probs.double().float()], -1)[..., 0]
    assert not wide.is_contiguous()
    assert equal(calibrate("image", wide, labels), calibrate("image", probs, labels))


def test_probs_that_require_a_gradient_leave_no_graph() -> None:
    probs, labels = batch(6, 20)
    for variant in VARIANTS:
        got = calibrate(variant, probs.requires_grad_(), labels)
        assert not got.threshold.requires_grad
    calibrator = Calibrator(groups.pixel(GRID))
    calibrator.update_scores(torch.rand(3, *GRID, requires_grad=True))
    assert not calibrator.compute().threshold.requires_grad


def test_the_fields_of_a_calibration() -> None:
    probs, labels = batch(7, 20)
    got = calibrate("pixel", probs, labels, Fraction(1, 5), background=1)
    assert (got.alpha, got.num_images, got.num_classes, got.background) == (0.2, 20, 3, 1)
    assert (got.score, got.ignore_index, got.variant, got.grid) == ("lac", 255, "pixel", GRID)
    assert calibrate("image", probs, labels).variant == "groups"
    assert got.count.dtype == torch.int64
    assert got.infinite_share == 0
    calibrator = Calibrator(groups.pixel(GRID), alpha="0.5", num_classes=3)
    assert calibrator.num_images == 0
    calibrator.update(probs, labels)
    assert calibrator.compute().alpha == 0.5
    assert calibrator.compute(0.1).alpha == 0.1
    assert calibrator.compute(0.04).infinite_share == 1.0
    with pytest.raises(AttributeError):
        got.alpha = 0.1  # type: ignore[misc]


def test_infinite_share_counts_cells() -> None:
    calibration = Calibration(
        torch.tensor([[INF, 0.5, 0.1, -INF]]), torch.zeros(1, 4, dtype=torch.int64), 0.1, 1, 2
    )
    assert calibration.infinite_share == 0.25


def test_a_single_class_without_background() -> None:
    probs, labels = batch(8, 20, num_classes=1, void=0.0)
    got = calibrate("pixel", probs, labels)
    assert got.num_classes == 1
    assert set(got.pseudo_labels(probs).unique().tolist()) <= {0, 255}


def test_more_classes_than_bytes() -> None:
    probs, labels = batch(9, 20, num_classes=300, void=0.0)
    for variant in ("pixel", "pixel, per class", "blocks"):
        got = calibrate(variant, probs, labels, ignore_index=-1)
        assert int(got.count.max()) >= 1
        want = pseudo_labels(probs, got.threshold, background=None, ignore_index=-1)
        assert same(got.pseudo_labels(probs), want)


# --- laws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_calibration_pixel_at_the_quantile_is_inside_its_set(
    variant: str, dtype: torch.dtype
) -> None:
    """Law 3, and at least rank of n calibration scores are covered at every cell."""
    probs, labels = batch(10, 39, void=0.0)
    probs = probs.to(dtype)
    got = calibrate(variant, probs, labels)
    sets = got.prediction_set(probs)
    covered = sets.gather(1, labels[:, None])[:, 0]
    at = 1 - probs.to(torch.float32).gather(1, labels[:, None])[:, 0]
    if got.threshold.ndim == 3:
        limit = got.threshold.expand(39, -1, -1, -1).gather(1, labels[:, None])[:, 0]
    else:
        limit = got.threshold.expand(39, -1, -1)
    if variant in ("pixel", "pixel, bounded"):
        assert ((at == limit).sum(0) >= 1).all(), "the quantile is one of the scores"
        assert (covered.sum(0) >= 32).all()
    assert covered[at == limit].all()
    if variant == "image":
        assert covered.sum() >= math.ceil((covered.numel() + 1) * 0.8)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_thresholds_sets_and_kept_pixels_are_nested(variant: str, seed: int) -> None:
    probs, labels = batch(seed, 24)
    probs = (probs * 8).round() / 8 if seed % 2 else probs
    calibrator = Calibrator(**VARIANTS[variant], alpha=0.5, background=seed % 3 or None)
    calibrator.update(probs, labels)
    strict = [calibrator.compute(a) for a in ("0.04", "0.1", "0.25", "0.251", "0.5")]
    for low, high in itertools.pairwise(strict):
        assert (low.threshold >= high.threshold).all()
        assert not (high.prediction_set(probs) & ~low.prediction_set(probs)).any()
        kept_low, kept_high = low.pseudo_labels(probs) != 255, high.pseudo_labels(probs) != 255
        assert not (kept_high & ~kept_low).any()


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_void_pixels_influence_nothing(variant: str, seed: int) -> None:
    probs, labels = batch(seed, 20, void=0.4)
    labels[0, 0, 0] = 1
    other, _ = batch(seed + 1, 20)
    void = labels == 255
    changed = torch.where(void[:, None], other, probs)
    assert equal(calibrate(variant, probs, labels), calibrate(variant, changed, labels))


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_void_change_only_the_number_of_images(variant: str) -> None:
    probs, labels = batch(11, 24)
    want = calibrate(variant, probs, labels)
    calibrator = Calibrator(**VARIANTS[variant], alpha="0.2")
    for p, y in zip(probs, labels, strict=True):
        calibrator.update(p, y)
        calibrator.update(p, torch.full_like(y, 255))
    got = calibrator.compute()
    assert got.num_images == 48
    assert equal(got, want)


@pytest.mark.parametrize("make", [groups.pixel, groups.image, lambda size: groups.blocks(size, 2)])
@pytest.mark.parametrize("per_class", [False, True])
def test_padding_with_void_changes_nothing(make: Any, per_class: bool) -> None:
    """Images of 4 x 4 padded to a grid of 7 x 6: the cells they fill are as without padding."""
    probs, labels = batch(12, 25, size=(4, 4))
    padded_probs, _ = batch(13, 25, size=(7, 6))
    padded_labels = torch.full((25, 7, 6), 255)
    padded_probs[:, :, :4, :4], padded_labels[:, :4, :4] = probs, labels
    small = Calibrator(make((4, 4)), alpha=0.2, per_class=per_class)
    large = Calibrator(make((7, 6)), alpha=0.2, per_class=per_class)
    small.update(probs, labels)
    large.update(padded_probs, padded_labels)
    want, got = small.compute(), large.compute()
    assert same(got.threshold[..., :4, :4], want.threshold)
    assert same(got.count[..., :4, :4], want.count)
    # Measures over the padded images say the same, too.
    limit = torch.full((), 0.4)
    measured = [
        (
            coverage(prediction_set(p, limit), y),
            confusion_matrix(pseudo_labels(p, limit, background=0), y, num_classes=3),
        )
        for p, y in ((probs, labels), (padded_probs, padded_labels))
    ]
    assert same(measured[0][0], measured[1][0])
    assert same(measured[0][1], measured[1][1])


@pytest.mark.parametrize("background", [0, 2])
def test_permuting_the_other_classes_permutes_the_labels(background: int) -> None:
    probs, labels = batch(14, 30, num_classes=4)
    order = [k for k in (2, 3, 0, 1) if k != background]
    order.insert(background, background)
    new_index = torch.arange(256)
    new_index[torch.tensor(order)] = torch.arange(4)
    for variant in VARIANTS:
        one = calibrate(variant, probs, labels, background=background)
        two = calibrate(variant, probs[:, order], new_index[labels], background=background)
        assert same(two.pseudo_labels(probs[:, order]), new_index[one.pseudo_labels(probs)])


# --- what a calibration does -------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("background", [None, 0, 1])
@pytest.mark.parametrize("size", [GRID, (8, 6), (9, 4), (2, 2), (1, 7)])
def test_sets_and_labels_at_any_size(
    variant: str, background: int | None, size: tuple[int, int]
) -> None:
    fitted = calibrate(variant, *batch(15, 26), background=background)
    probs, _ = batch(16, 2, size=size)
    threshold = oracles.image_from_grid(fitted.threshold.numpy(), size)
    want = np.stack([oracles.select(exact(p), threshold, background) for p in probs])
    assert same(fitted.pseudo_labels(probs), want)
    assert same(fitted.pseudo_labels(probs[0]), want[0])
    assert same(fitted.pseudo_labels(probs, dtype=torch.uint8), want.astype(np.uint8))
    sets = np.stack([oracles.sets(exact(p), threshold) for p in probs])
    assert same(fitted.prediction_set(probs), sets)
    assert same(fitted.prediction_set(probs[1]), sets[1])
    resized = fitted.resize(size)
    assert same(resized.threshold, threshold)
    assert same(resized.count, oracles.image_from_grid(fitted.count.numpy(), size))
    assert same(resized.pseudo_labels(probs), want)
    assert (resized.grid, resized.alpha, resized.background) == (size, 0.2, background)
    if not VARIANTS[variant].get("per_class"):
        found = evidence(probs, background=background)
        assert same(fitted.pseudo_labels(found), want)
        one = evidence(probs[0], background=background)
        assert same(fitted.pseudo_labels(one, dtype=torch.int16), want[0].astype(np.int16))


def test_a_pixel_uses_the_threshold_that_its_own_score_went_into() -> None:
    """Images larger and smaller than the grid: what calibration samples, inference covers."""
    for size in [(8, 6), (9, 5), (4, 3), (3, 3), (2, 1)]:
        probs, labels = batch(17, 1, size=size, void=0.0)
        got = calibrate("pixel", probs, labels, "0.6")  # one image: its own score
        resized = got.resize(size).threshold
        scores = 1 - probs[0].gather(0, labels)[0]
        at = got.threshold
        for i, j in np.ndindex(*size):
            a, b = i * 4 // size[0], j * 3 // size[1]
            assert resized[i, j] == at[a, b]
        sampled = {float(x) for x in at.flatten()}
        assert sampled <= {float(x) for x in scores.flatten()}
        if size[0] <= 4 and size[1] <= 3:
            assert same(resized, scores), "every pixel meets its own score"


def test_ignore_index_of_the_calibration_is_used() -> None:
    probs, labels = batch(18, 20)
    labels = torch.where(labels == 255, -1, labels)
    got = calibrate("pixel", probs, labels, background=0, ignore_index=-1)
    assert got.ignore_index == -1
    made = got.pseudo_labels(probs * 0.01)
    assert set(made.unique().tolist()) == {-1}
    assert set(got.pseudo_labels(evidence(probs * 0.01, background=0)).unique().tolist()) == {-1}


def test_scores_of_another_model_are_ranked_alike() -> None:
    probs, labels = batch(19, 20)
    want = calibrate("pixel", probs, labels)
    scores = (1 - probs.gather(1, labels.masked_fill(labels == 255, 0)[:, None]))[:, 0]
    scores = scores.masked_fill(labels == 255, NAN)
    for dtype in (torch.float32, torch.float64):
        calibrator = Calibrator(groups.pixel(GRID), alpha="0.2")
        calibrator.update_scores(scores[:7].to(dtype))
        calibrator.update_scores(scores[7].to(dtype))
        calibrator.update_scores(scores[8:].to(dtype))
        got = calibrator.compute()
        assert equal(got, want)
        assert got.num_classes is None
        assert got.pseudo_labels(probs).shape == (20, *GRID)


def test_another_device() -> None:
    fitted = calibrate("pixel", *batch(20, 20))
    moved = fitted.to("meta")
    assert moved.threshold.device.type == moved.count.device.type == "meta"
    assert fitted.threshold.device.type == "cpu"
    with raises(ValueError, "pseudo_labels", r"threshold on the device of probs \(cpu\), got meta"):
        moved.pseudo_labels(torch.rand(3, *GRID))


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    for variant in VARIANTS:
        fitted = calibrate(variant, *batch(21, 12), "0.09", background=1)
        fitted.save(tmp_path / "c.safetensors")
        again = Calibration.load(tmp_path / "c.safetensors")
        assert equal(again, fitted)
        for name in ("alpha", "num_images", "num_classes", "background", "score", "variant"):
            assert getattr(again, name) == getattr(fitted, name)
        assert again.ignore_index == 255


# --- the deferred checks of an accelerator -----------------------------------------------------
# No accelerator here: a tensor on the CPU says that it lies elsewhere, so that `update` takes that
# branch on real values, and "meta" tensors show that nothing looks at a value on the way.


class SomeDevice:
    """Neither the CPU nor different from it."""

    type = "accelerator"

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class Elsewhere(Tensor):
    """Data on the CPU that claims another device; results are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = SomeDevice()  # type: ignore[assignment]

    def detach(self) -> Tensor:
        return self


def elsewhere(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Elsewhere)


def warm(**options: Any) -> Calibrator:
    """A calibrator that has its store already, so that the claimed device is asked for nothing."""
    calibrator = Calibrator(**{"groups": groups.pixel(GRID), "alpha": 0.2, **options})
    probs, labels = batch(30, 20, void=0.0)
    calibrator.update(probs, labels)
    return calibrator


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values pass, as the stand-in for those of an accelerator."""
    monkeypatch.setattr(checks, "check_has_values", lambda *_, **__: None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_deferred_branch_runs_without_looking_at_values(variant: str, meta: None) -> None:
    calibrator = Calibrator(**VARIANTS[variant], num_classes=3, alpha=0.2)
    probs = torch.rand(2, 3, 8, 5, device="meta")
    calibrator.update(probs, torch.zeros(2, 8, 5, dtype=torch.uint8, device="meta"))
    calibrator.update(probs[0], torch.zeros(8, 5, dtype=torch.int64, device="meta"))
    assert calibrator.num_images == 3
    with raises(ValueError, "Calibrator.update", "tensors on meta as before, got cpu; move"):
        calibrator.update(*batch(0, 1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_deferred_branch_gives_the_same_thresholds(variant: str, dtype: torch.dtype) -> None:
    probs, labels = batch(31, 12, size=(8, 5))
    one, other = warm(**VARIANTS[variant]), warm(**VARIANTS[variant])
    one.update(probs.to(dtype), labels.to(torch.uint8))
    other.update(elsewhere(probs.to(dtype)), labels.to(torch.uint8))
    assert equal(one.compute(), other.compute())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [NAN, 7.6, -0.1, 254, -1, 3])
def test_the_deferred_branch_reports_at_compute(variant: str, value: float) -> None:
    probs, labels = batch(32, 4)
    if value in (254, -1, 3):
        labels[1, 2, 1] = int(value)
    else:
        probs[1, 2, 3, 2] = value
    calibrator = warm(**VARIANTS[variant])
    before = calibrator._store.quantile(calibrator.alpha)[1]  # type: ignore[union-attr]
    calibrator.update(elsewhere(probs), labels)
    after = calibrator._store.quantile(calibrator.alpha)[1]  # type: ignore[union-attr]
    assert same(before, after), "the batch counts for nothing"
    with raises(ValueError, "Calibrator.compute", "got 1 batches with other values"):
        calibrator.compute()


def test_the_deferred_branch_takes_signed_bytes() -> None:
    probs, labels = batch(33, 4, void=0.0)
    signed, wide = warm(), warm()
    signed.update(elsewhere(probs), labels.to(torch.int8))
    wide.update(elsewhere(probs), labels)
    ours, theirs = signed.compute(), wide.compute()
    assert ours.num_images == warm().num_images + len(probs), "the batch counts"
    assert same(ours.threshold, theirs.threshold)
    assert same(ours.count, theirs.count)


def test_the_deferred_branch_takes_bytes_with_a_negative_void() -> None:
    probs, labels = batch(34, 4, void=0.0)
    labels[0, 0, 0] = 200
    calibrator = warm(ignore_index=-1)
    calibrator.update(elsewhere(probs), labels.to(torch.uint8))
    with raises(ValueError, "Calibrator.compute", "got 1 batches with other values"):
        calibrator.compute()


@pytest.mark.parametrize(("value", "bad"), [(1.5, True), (-0.1, True), (NAN, False), (1.0, False)])
def test_the_deferred_branch_of_pooled_scores(value: float, bad: bool) -> None:
    calibrator = Calibrator(groups.image(GRID), alpha=0.2)
    calibrator.update_scores(torch.full((9, *GRID), 0.5))
    scores = torch.full((1, *GRID), 0.25)
    scores[0, 1, 1] = value
    present = scores.nan_to_num(nan=0.0)
    low, high = float(present.min()), float(present.max())
    assert (low < 0 or high > 1) == bad
    kept = calibrator._without_bad(scores, torch.tensor(bad))
    assert bool(kept.isnan().all()) == bad


@pytest.mark.parametrize("bad", [True, False])
def test_a_bad_batch_counts_for_nothing_and_is_reported(bad: bool) -> None:
    probs, labels = batch(22, 20)
    calibrator = Calibrator(groups.pixel(GRID), alpha=0.2)
    calibrator.update(probs, labels)
    scores = torch.rand(2, *GRID)
    kept = calibrator._without_bad(scores, torch.tensor(bad))
    assert same(kept, torch.full_like(scores, NAN) if bad else scores)
    if not bad:
        calibrator.compute()
        return
    calibrator._without_bad(scores, torch.tensor(True))
    match = r"probs in \[0, 1\] and labels among .* 255, got 2 batches with other values"
    with raises(ValueError, "Calibrator.compute", match):
        calibrator.compute()
    other = Calibrator(groups.pixel(GRID), alpha=0.2)
    other.merge(calibrator)
    with raises(ValueError, "Calibrator.compute", "got 2 batches"):
        other.compute()


# --- errors ------------------------------------------------------------------------------------

PIXEL = groups.pixel(GRID)


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"groups": PIXEL.float()}, TypeError, r"integer groups, got torch\.float32"),
        ({"groups": [[0]]}, TypeError, "groups as a tensor, got list"),
        ({"groups": PIXEL[0]}, ValueError, r"groups \[H, W\], got \[3\]; make the map"),
        ({"groups": PIXEL - 1}, ValueError, "group indices from 0, got -1"),
        ({"alpha": 0}, ValueError, r"alpha in \(0, 1\), got 0; pass"),
        ({"alpha": 1.0}, ValueError, r"alpha in \(0, 1\), got 1.0"),
        ({"alpha": NAN}, ValueError, r"alpha in \(0, 1\), got nan"),
        ({"alpha": "x"}, ValueError, r"alpha in \(0, 1\), got 'x'"),
        ({"alpha": -0.05}, ValueError, r"alpha in \(0, 1\), got -0.05"),
        ({"score": "topk"}, ValueError, "a score among 'lac', .* got 'topk'"),
        ({"max_images": 0}, ValueError, "max_images as a whole number >= 1, got 0"),
        ({"num_classes": 0}, ValueError, "num_classes as a whole number >= 1, got 0"),
        ({"num_classes": True}, ValueError, "num_classes as a whole number >= 1, got True"),
        ({"num_classes": 2.0}, ValueError, "num_classes as a whole number >= 1, got 2.0"),
        ({"num_classes": 3, "background": 3}, ValueError, r"background in 0\.\.2 or None, got 3"),
        ({"num_classes": 3, "background": -1}, ValueError, "got -1"),
        ({"num_classes": 3, "background": False}, TypeError, "as int or None, got False"),
        ({"num_classes": 3, "background": 1.0}, TypeError, "as int or None, got 1.0"),
        ({"num_classes": 1, "background": 0}, ValueError, "a class besides the background"),
        ({"num_classes": 300}, ValueError, r"outside the classes 0\.\.299, got 255"),
        ({"num_classes": 3, "ignore_index": 2}, ValueError, "got 2; pass ignore_index=-1"),
    ],
)
def test_settings_that_are_none(changes: dict[str, Any], kind: type[Exception], match: str) -> None:
    with raises(kind, "Calibrator", match):
        Calibrator(**{"groups": PIXEL, **changes})


@pytest.mark.parametrize("bound", ["x", 2.5, True])
def test_max_images_is_a_whole_number(bound: Any) -> None:
    with pytest.raises(ValueError, match="Calibrator: expected max_images as a whole number"):
        Calibrator(PIXEL, max_images=bound)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"background": 3}, r"background in 0\.\.2 or None, got 3"),
        ({"ignore_index": 2}, r"outside the classes 0\.\.2, got 2"),
    ],
)
def test_settings_that_the_first_update_refutes(options: dict[str, Any], match: str) -> None:
    calibrator = Calibrator(PIXEL, **options)
    with raises(ValueError, "Calibrator.update", match):
        calibrator.update(*batch(0, 2))
    assert calibrator.num_images == 0


PROBS, LABELS = batch(23, 2)


def with_value(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    probs = PROBS.to(dtype).clone()
    probs[1, 2, 3, 2] = value
    return probs


BAD_BATCHES: list[tuple[Any, Any, type[Exception], str]] = [
    (PROBS[0, 0], LABELS, ValueError, r"\[B, K, H, W\] or \[K, H, W\], got \[4, 3\]"),
    (PROBS[:0], LABELS[:0], ValueError, r"at least one element in probs, got \[0, 3, 4, 3\]; skip"),
    (PROBS.long(), LABELS, TypeError, r"floating-point probs, got torch\.int64"),
    (PROBS, LABELS.float(), TypeError, r"integer labels, got torch\.float32"),
    (PROBS, LABELS[:1], ValueError, r"labels \[2, 4, 3\] for .*, got \[1, 4, 3\]"),
    (PROBS[:1], LABELS[0], ValueError, r"labels \[1, 4, 3\] .*, got \[4, 3\]"),
    (PROBS, LABELS.mT, ValueError, r"got \[2, 3, 4\]; resize the labels"),
    (PROBS, LABELS.to("meta"), ValueError, r"labels on the device of probs \(cpu\), got meta"),
    (
        PROBS.to("meta"),
        LABELS.to("meta"),
        ValueError,
        "probs with values, got a tensor on device m",
    ),
    (PROBS[:, :2], LABELS, ValueError, r"3 classes as before, got probs \[2, 2, 4, 3\]"),
    (with_value(NAN), LABELS, ValueError, r"probs in \[0, 1\], got NaN; find what made it"),
    (with_value(7.6), LABELS, ValueError, r"probs in \[0, 1\], got values from .* to 7\.6; apply"),
    (with_value(-0.1), LABELS, ValueError, r"got values from -0\.1 to 0\.9"),
    (with_value(INF), LABELS, ValueError, "got values from .* to inf"),
    (with_value(-INF), LABELS, ValueError, "got values from -inf to"),
    (with_value(1 + 2**-23), LABELS, ValueError, r"probs in \[0, 1\], got values from"),
    (with_value(-1e-45), LABELS, ValueError, r"probs in \[0, 1\], got values from -1\.4"),
    (with_value(NAN, torch.float16), LABELS, ValueError, r"probs in \[0, 1\], got NaN"),
    (with_value(7.6, torch.bfloat16), LABELS, ValueError, "got values from .* to 7"),
    (with_value(-0.1, torch.float64), LABELS, ValueError, r"got values from -0\.1"),
    (PROBS, LABELS.clamp(max=3) // 3 * 254, ValueError, r"0\.\.2 or 255 .*, got 254; map other"),
    (PROBS, LABELS - 1, ValueError, r"labels in 0\.\.2 or 255 \(ignore_index\), got -1"),
    (PROBS, torch.full_like(LABELS, 3), ValueError, "got 3; map other values to ignore_index"),
    (PROBS, torch.full_like(LABELS, 254).to(torch.uint8), ValueError, "got 254"),
]


@pytest.mark.parametrize("number", range(len(BAD_BATCHES)))
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_that_is_none_leaves_nothing_behind(variant: str, number: int) -> None:
    probs, labels, kind, match = BAD_BATCHES[number]
    if "254; map" in match:
        labels = torch.where(labels == 254, 254, 0)
        labels[0, 0, 0] = 254
    if "got -1" in match:
        labels = torch.where(LABELS == 255, 255, LABELS - 1)
    calibrator = Calibrator(**VARIANTS[variant], alpha=0.4)
    calibrator.update(PROBS, LABELS)
    before = calibrator.compute()
    with raises(kind, "Calibrator.update", match):
        calibrator.update(probs, labels)
    after = calibrator.compute()
    assert calibrator.num_images == after.num_images == 2
    assert equal(before, after)


def one_large_batch() -> tuple[Tensor, Tensor]:
    """More probabilities than those whose every value is checked, and void pixels."""
    generator = seeded(0)
    probs = torch.rand(1, 8, 256, 256, generator=generator)
    labels = torch.randint(8, (1, 256, 256), generator=generator)
    return probs, labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.1, 255)


@pytest.mark.parametrize("value", [NAN, -0.01, 1.01])
@pytest.mark.parametrize("score", ["lac", "aps", "margin"])
def test_a_value_that_a_score_uses_is_seen_wherever_it_is(score: str, value: float) -> None:
    probs, labels = one_large_batch()
    calibrator = Calibrator(groups.image((256, 256)), score=score)
    for row, column in ((0, 0), (101, 57), (255, 255)):
        labels[0, row, column] = 3
        bad = probs.clone()
        bad[0, 3, row, column] = value
        with raises(ValueError, "Calibrator.update", r"probs in \[0, 1\], got"):
            calibrator.update(bad, labels)
    assert calibrator.num_images == 0


def test_a_batch_that_is_none_takes_no_draws() -> None:
    probs, labels = one_large_batch()
    generator = seeded(3)
    before = generator.get_state()
    calibrator = Calibrator(groups.image((256, 256)), score="aps", generator=generator)
    with raises(ValueError, "Calibrator.update", "got NaN"):
        calibrator.update(probs.index_fill(1, torch.tensor([2]), NAN), labels)
    assert torch.equal(generator.get_state(), before)


def test_of_a_large_batch_lac_looks_at_rows_of_the_other_classes() -> None:
    """A model that is not bounded is found. What no label asks for is no score."""
    probs, labels = one_large_batch()
    labels = labels.clamp(max=3).masked_fill(labels == 255, 255)
    want = Calibrator(groups.image((256, 256)))
    want.update(probs, labels)
    for scale in (1.5, 100.0):  # the labels' own probabilities stay
        wrong = probs.clone()
        wrong[:, 4:] *= scale
        with raises(ValueError, "Calibrator.update", r"probs in \[0, 1\], got values from"):
            Calibrator(groups.image((256, 256))).update(wrong, labels)
    stray = probs.clone()
    stray[0, 7, 1, 5] = NAN
    got = Calibrator(groups.image((256, 256)))
    got.update(stray, labels)
    assert equal(got.compute(), want.compute())
    with raises(ValueError, "Calibrator.update", "got NaN"):
        Calibrator(groups.image((256, 256)), score="aps").update(stray, labels)


def test_values_at_the_very_ends_are_fine() -> None:
    for dtype in FLOATS:
        probs = torch.tensor([0.0, 1.0, -0.0], dtype=dtype).reshape(1, 3, 1, 1).expand(1, 3, *GRID)
        calibrator = Calibrator(PIXEL)
        calibrator.update(probs, torch.zeros(1, *GRID, dtype=torch.uint8))
        assert calibrator.num_images == 1


def test_a_first_batch_that_is_none_settles_nothing() -> None:
    calibrator = Calibrator(PIXEL, alpha=0.5, background=2)
    with raises(ValueError, "Calibrator.update", r"probs in \[0, 1\], got NaN"):
        calibrator.update(torch.full((1, 7, *GRID), NAN), torch.zeros(1, *GRID, dtype=torch.uint8))
    with raises(ValueError, "Calibrator.compute", "labelled images, got none; call update first"):
        calibrator.compute()
    calibrator.update(PROBS, LABELS)
    assert calibrator.compute().num_classes == 3


def test_max_images_bounds_every_way_in() -> None:
    for variant in VARIANTS:
        calibrator = Calibrator(**{**VARIANTS[variant], "max_images": 3}, alpha=0.5)
        calibrator.update(PROBS, LABELS)
        before = calibrator.compute()
        match = "at most max_images=3 images, got 4; build it with a larger"
        with raises(ValueError, "Calibrator.update", match):
            calibrator.update(PROBS, LABELS)
        with raises(ValueError, "Calibrator.merge", match):
            other = Calibrator(**{**VARIANTS[variant], "max_images": 3}, alpha=0.5)
            other.update(PROBS, LABELS)
            calibrator.merge(other)
        if not VARIANTS[variant].get("per_class"):
            with raises(ValueError, "Calibrator.update_scores", match):
                calibrator.update_scores(torch.rand(2, *GRID))
        assert equal(before, calibrator.compute())
        calibrator.update(PROBS[0], LABELS[0])
        assert calibrator.num_images == 3


@pytest.mark.parametrize(
    ("scores", "kind", "match"),
    [
        ([0.1], TypeError, "floating-point scores, got list; convert it to float32"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, r"got torch\.int64"),
        (torch.rand(4), ValueError, r"scores \[B, H, W\] or \[H, W\], got \[4\]; pass one"),
        (torch.rand(1, 1, 4, 3), ValueError, r"got \[1, 1, 4, 3\]"),
        (torch.rand(0, 4, 3), ValueError, r"at least one element in scores, got \[0, 4, 3\]"),
        (torch.rand(2, 4, 3, device="meta"), ValueError, "scores with values, got a tensor on dev"),
    ],
)
def test_scores_that_are_none(scores: Any, kind: type[Exception], match: str) -> None:
    for variant in ("pixel", "pixel, bounded", "image"):
        calibrator = Calibrator(**VARIANTS[variant])
        calibrator.update_scores(torch.rand(2, *GRID))
        with raises(kind, "Calibrator.update_scores", match):
            calibrator.update_scores(scores)
        assert calibrator.num_images == 2


@pytest.mark.parametrize("value", [1.5, -0.1, INF, -INF])
def test_pooled_scores_lie_in_the_unit_interval(value: float) -> None:
    calibrator = Calibrator(groups.image(GRID), alpha=0.2)
    scores = torch.full(GRID, 0.5)
    scores[0, 0], scores[1, 1] = value, NAN
    with raises(ValueError, "Calibrator.update_scores", r"in \[0, 1\], got values .*; pooled"):
        calibrator.update_scores(scores)
    assert calibrator.num_images == 0


def test_scores_without_labels_have_no_class() -> None:
    calibrator = Calibrator(PIXEL, per_class=True)
    with raises(ValueError, "Calibrator.update_scores", "probs and labels per class, got scores"):
        calibrator.update_scores(torch.rand(1, *GRID))


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_but_void(variant: str) -> None:
    calibrator = Calibrator(**VARIANTS[variant], alpha=0.5)
    with raises(ValueError, "Calibrator.compute", "labelled images, got none; call update first"):
        calibrator.compute()
    for _ in range(20):
        calibrator.update(PROBS, torch.full_like(LABELS, 255))
    match = r"only void pixels in 40 images; check ignore_index \(255\), which is --void"
    with raises(ValueError, "Calibrator.compute", match):
        calibrator.compute()
    calibrator.update(PROBS, LABELS)
    calibrator.compute()


def test_alpha_of_compute() -> None:
    bounded = Calibrator(PIXEL, alpha=0.2, max_images=9)
    bounded.update(PROBS, LABELS)
    match = r"alpha <= 0\.2, .* allow, got 0\.21; build the calibrator with alpha=0\.21"
    with raises(ValueError, "Calibrator.compute", match):
        bounded.compute(0.21)
    bounded.compute(0.2)
    bounded.compute("0.1999")
    for alpha in (0, 1, NAN, "x"):
        with raises(ValueError, "Calibrator.compute", r"alpha in \(0, 1\), got"):
            bounded.compute(alpha)  # type: ignore[arg-type]
    for variant in VARIANTS:
        if variant != "pixel, bounded":  # the others keep enough for every alpha
            calibrator = Calibrator(**VARIANTS[variant], alpha=0.2)
            calibrator.update(PROBS, LABELS)
            calibrator.compute(0.9)


MERGES: list[tuple[dict[str, Any], str]] = [
    ({"groups": groups.pixel((3, 4))}, r"the same grid \(\[4, 3\]\), got \[3, 4\]; build both"),
    ({"groups": groups.pixel((5, 5))}, r"the same grid"),
    ({"groups": groups.image(GRID)}, "the same groups"),
    ({"groups": PIXEL.flip(0)}, "the same groups"),
    ({"alpha": 0.1}, r"the same alpha \(1/5\), got 1/10"),
    ({"background": 1}, r"the same background \(None\), got 1"),
    ({"per_class": True}, r"the same per_class \(False\), got True"),
    ({"max_images": 10}, r"the same max_images \(None\), got 10"),
    ({"ignore_index": 100}, r"the same ignore_index \(255\), got 100"),
]


@pytest.mark.parametrize(("changes", "match"), MERGES)
@pytest.mark.parametrize("filled", [True, False])
def test_merging_what_was_built_otherwise(
    changes: dict[str, Any], match: str, filled: bool
) -> None:
    one = Calibrator(PIXEL, alpha=0.2)
    other = Calibrator(**{"groups": PIXEL, "alpha": 0.2, **changes})
    one.update(PROBS, LABELS)
    if filled:
        labels = torch.where(LABELS == 255, other.ignore_index, LABELS)
        other.update(PROBS, labels)
    before = one.compute()
    with raises(ValueError, "Calibrator.merge", match):
        one.merge(other)
    assert equal(before, one.compute())


def test_merging_what_cannot_be() -> None:
    one = Calibrator(PIXEL, alpha=0.2)
    one.update(PROBS, LABELS)
    with raises(ValueError, "Calibrator.merge", "another calibrator, got itself; merge each one"):
        one.merge(one)
    with raises(TypeError, "Calibrator.merge", "a Calibrator, got Calibration; merge"):
        one.merge(one.compute())  # type: ignore[arg-type]
    other = Calibrator(PIXEL, alpha=0.2)
    other.update(*batch(0, 2, num_classes=4))
    with raises(ValueError, "Calibrator.merge", r"the same num_classes \(3\), got 4"):
        one.merge(other)
    assert one.num_images == 2


def test_devices_do_not_mix(meta: None) -> None:
    one, away = Calibrator(PIXEL, alpha=0.2), Calibrator(PIXEL, alpha=0.2)
    one.update(PROBS, LABELS)
    away.update(PROBS.to("meta"), LABELS.to("meta"))
    match = "tensors on cpu as before, got meta; move"
    with raises(ValueError, "Calibrator.merge", match):
        one.merge(away)
    with raises(ValueError, "Calibrator.update", match):
        one.update(PROBS.to("meta"), LABELS.to("meta"))
    with raises(ValueError, "Calibrator.update_scores", match):
        one.update_scores(torch.rand(2, *GRID, device="meta"))
    assert one.num_images == 2


def test_merging_into_and_from_what_saw_nothing() -> None:
    for variant in VARIANTS:
        full = Calibrator(**VARIANTS[variant], alpha=0.2)
        full.update(PROBS, LABELS)
        empty = Calibrator(**VARIANTS[variant], alpha=0.2)
        full.merge(empty)
        assert full.num_images == 2
        empty.merge(full)
        assert empty.num_classes == 3
        assert equal(empty.compute(), full.compute())


def test_alpha_written_otherwise_is_the_same() -> None:
    one, other = Calibrator(PIXEL, alpha=0.2), Calibrator(PIXEL, alpha=Fraction(1, 5))
    other.update(PROBS, LABELS)
    one.merge(other)
    assert one.num_images == 2


def test_calibrations_say_what_does_not_belong() -> None:
    fitted = calibrate("pixel", *batch(24, 20), background=0)
    where = "Calibration.pseudo_labels"
    four = torch.rand(4, *GRID)
    match = r"3 classes as calibrated, got probs \[4, 4, 3\]; apply"
    with raises(ValueError, where, match):
        fitted.pseudo_labels(four)
    with raises(ValueError, "Calibration.prediction_set", match):
        fitted.prediction_set(four)
    with raises(TypeError, where, r"floating-point probs, got torch\.uint8"):
        fitted.pseudo_labels(torch.zeros(3, *GRID, dtype=torch.uint8))
    with raises(ValueError, where, "evidence of 3 classes, background 0, got 4 classes, backgr"):
        fitted.pseudo_labels(evidence(four, background=0))
    with raises(ValueError, where, "got 3 classes, background None"):
        fitted.pseudo_labels(evidence(four[:3], background=None))
    per_class = calibrate("pixel, per class", *batch(24, 20))
    with raises(ValueError, "Evidence.pseudo_labels", "need the class scores"):
        per_class.pseudo_labels(evidence(four[:3], background=None))
    for size in ((0, 3), (3,), (3, 3, 3), (-1, 2)):
        with raises(ValueError, "Calibration.resize", r"size as \(height, width\), got"):
            fitted.resize(size)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [3, (2.5, 3)])
def test_resize_to_what_is_no_size(size: Any) -> None:
    fitted = calibrate("pixel", *batch(24, 20))
    with pytest.raises(ValueError, match=r"expected size as \(height, width\), got"):
        fitted.resize(size)


def test_p_values_come_with_the_number_of_scores_behind_them() -> None:
    calibrator = Calibrator(groups.pixel((1, 2)), num_classes=2)
    labels = torch.tensor([[[0, 0]], [[0, 255]], [[1, 1]]])
    probs = torch.tensor([0.7, 0.3]).reshape(1, 2, 1, 1).expand(3, 2, 1, 2)
    calibrator.update(probs, labels)
    p_values, counts = calibrator.p_values_and_counts(probs[0], labels[2])
    assert same(p_values, calibrator.p_values(probs[0], labels[2]))
    assert p_values.tolist() == [[2 / 4, 2 / 3]]
    assert counts.tolist() == [[3, 2]]
    assert counts.dtype == torch.int64
    with raises(ValueError, "asked", "2 classes as before"):
        calibrator.p_values_and_counts(torch.rand(3, 1, 2), labels[2], where="asked")
