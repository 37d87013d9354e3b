"""What public functions say to what they cannot take: one line each, and at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from tests.support.helpers import raises, seeded
from torch import Tensor

import cpseg
from cpseg import groups

PROBS = torch.rand(2, 3, 4, 5, generator=seeded(0))
LABELS = torch.randint(3, (2, 4, 5), generator=seeded(1))
SETS = PROBS > 0.5
LOGITS = torch.randn(2, 1, 4, 5, generator=seeded(2))
TARGETS = torch.randint(2, (2, 4, 5), generator=seeded(3))
MASKS = torch.rand(2, 4, 5, generator=seeded(4)) > 0.3
BOXES = torch.tensor([[1.0, 1.0, 3.0, 2.0]])
CURVES = torch.rand(5, 4, 5, generator=seeded(5)).cumsum(0) / 5
IMAGE = torch.rand(3, 4, 5, generator=seeded(6))
CONFUSION = torch.tensor([[3, 1], [0, 2]])
AUGMENT = cpseg.WeakAugmentation(4)
FOUND = cpseg.evidence(PROBS, background=None)

Call = Callable[[Any], Any]

# --- the label of void pixels ------------------------------------------------------------------

WITH_IGNORE_INDEX: dict[str, tuple[str, Call]] = {
    "nonconformity": (
        "nonconformity",
        lambda i: cpseg.nonconformity(PROBS, LABELS, ignore_index=i),
    ),
    "pseudo_labels": (
        "pseudo_labels",
        lambda i: cpseg.pseudo_labels(PROBS, 0.5, background=0, ignore_index=i),
    ),
    "Evidence.pseudo_labels": (
        "Evidence.pseudo_labels",
        lambda i: FOUND.pseudo_labels(0.5, ignore_index=i),
    ),
    "Evidence.score_of": ("Evidence.score_of", lambda i: FOUND.score_of(LABELS, ignore_index=i)),
    "confusion_matrix": (
        "confusion_matrix",
        lambda i: cpseg.confusion_matrix(LABELS, LABELS, num_classes=3, ignore_index=i),
    ),
    "boundary_iou": (
        "boundary_iou",
        lambda i: cpseg.boundary_iou(LABELS, LABELS, num_classes=3, ignore_index=i),
    ),
    "coverage": ("coverage", lambda i: cpseg.coverage(SETS, LABELS, ignore_index=i)),
    "kept_share": ("kept_share", lambda i: cpseg.kept_share(LABELS, ignore_index=i)),
    "focal_loss": ("focal_loss", lambda i: cpseg.focal_loss(LOGITS, TARGETS, ignore_index=i)),
    "dice_loss": ("dice_loss", lambda i: cpseg.dice_loss(LOGITS, TARGETS, ignore_index=i)),
    "sum_loss": ("sum_loss", lambda i: cpseg.sum_loss(LOGITS, TARGETS, ignore_index=i)),
    "pseudo_label_loss": (
        "pseudo_label_loss",
        lambda i: cpseg.pseudo_label_loss(PROBS, LABELS, ignore_index=i),
    ),
    "Calibrator": (
        "Calibrator",
        lambda i: cpseg.Calibrator(groups.image((2, 2)), ignore_index=i),
    ),
    "Recalibrator": ("Recalibrator", lambda i: cpseg.Recalibrator(3, ignore_index=i)),
    "OnlineThreshold": ("OnlineThreshold", lambda i: cpseg.OnlineThreshold(3, ignore_index=i)),
    "WeakAugmentation": ("WeakAugmentation", lambda i: cpseg.WeakAugmentation(4, ignore_index=i)),
}


def _name(value: object) -> str:
    """The same in every worker of the tests: no address and no random number."""
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize("name", WITH_IGNORE_INDEX)
def test_an_ignore_index_is_an_int_of_64_bits(name: str) -> None:
    where, call = WITH_IGNORE_INDEX[name]
    for value in (254.5, math.nan, True, None, "255", [255]):
        with raises(TypeError, where, "ignore_index as int, got .*; pass the label of void pixels"):
            call(value)
    for value in (2**63, -(2**63) - 1, 10**400, 10**5000):
        with raises(ValueError, where, "an ignore_index of 64 bits, got .*; pass ignore_index=-1"):
            call(value)
    call(-1 if name != "kept_share" else 255)


def test_labels_of_a_byte_are_compared_as_numbers() -> None:
    few = torch.tensor([[44, 0]], dtype=torch.uint8)
    found = cpseg.evidence(torch.rand(2, 1, 2), background=None)
    assert not found.score_of(few, ignore_index=300).isnan().any(), "300 is 44 modulo 256"


# --- rates ---------------------------------------------------------------------------------------

RATES: dict[str, tuple[str, Call]] = {
    "conformal_rank": ("conformal_rank", lambda a: cpseg.conformal_rank(9, a)),
    "conformal_quantile": (
        "conformal_quantile",
        lambda a: cpseg.conformal_quantile(torch.rand(9), a),
    ),
    "Calibrator": ("Calibrator", lambda a: cpseg.Calibrator(groups.image((2, 2)), alpha=a)),
    "OnlineThreshold": ("OnlineThreshold", lambda a: cpseg.OnlineThreshold(3, alpha=a)),
}


@pytest.mark.parametrize("name", RATES)
def test_a_rate_of_millions_of_decimals_is_refused_at_once(name: str) -> None:
    where, call = RATES[name]
    start = time.perf_counter()
    for alpha in ("1e-20000000", "3.5E-99999999", "1e-301"):
        with raises(ValueError, where, "alpha of at most 300 decimals, got .*; pass a rate"):
            call(alpha)
    for alpha in ("1e20000000", "1e", "e-5", "1e-5e5", None, "x", [0.1], True, 10**5000):
        with raises(ValueError, where, r"alpha in \(0, 1\), got .*; pass a rate such as 0.05"):
            call(alpha)
    assert time.perf_counter() - start < 1


def test_small_rates_are_exact() -> None:
    assert cpseg.conformal_rank(10**300 - 1, "1e-300") == 10**300 - 1
    assert cpseg.conformal_rank(99, "1E-2") == cpseg.conformal_rank(99, 0.01) == 99


# --- numbers -------------------------------------------------------------------------------------

NUMBERS: list[tuple[str, str, Call]] = [
    ("focal_loss", "gamma >= 0", lambda v: cpseg.focal_loss(LOGITS, TARGETS, gamma=v)),
    ("focal_loss", "balance in", lambda v: cpseg.focal_loss(LOGITS, TARGETS, balance=v)),
    ("dice_loss", "smooth >= 0", lambda v: cpseg.dice_loss(LOGITS, TARGETS, smooth=v)),
    (
        "dice_loss",
        "certainty_threshold in",
        lambda v: cpseg.dice_loss(LOGITS, TARGETS, certainty_threshold=v),
    ),
    ("sum_loss", "dice_weight", lambda v: cpseg.sum_loss(LOGITS, TARGETS, dice_weight=v)),
    (
        "self_reliance_loss",
        "weight in",
        lambda v: cpseg.self_reliance_loss(LOGITS[0, 0], LOGITS[1, 0], v),
    ),
    ("poly_lr", "power as a finite number", lambda v: cpseg.poly_lr(1, 2, base_lr=1, power=v)),
    ("poly_lr", "base_lr as a finite number", lambda v: cpseg.poly_lr(1, 2, base_lr=v)),
    ("poly_lr", "step as a finite number", lambda v: cpseg.poly_lr(v, 2, base_lr=1)),
    (
        "self_reliance_weight",
        "decay as a finite number",
        lambda v: cpseg.self_reliance_weight(1, 2, decay=v),
    ),
    (
        "mask_filters",
        "min_iou in 0..100",
        lambda v: cpseg.mask_filters(LOGITS[:, 0], torch.rand(2), min_iou=v),
    ),
    (
        "mask_filters",
        "stability_offset >= 0",
        lambda v: cpseg.mask_filters(LOGITS[:, 0], torch.rand(2), stability_offset=v),
    ),
    ("jitter_boxes", "noise >= 0", lambda v: cpseg.jitter_boxes(BOXES, (9, 9), noise=v)),
    ("sample_prompts", "box_noise >= 0", lambda v: cpseg.sample_prompts(MASKS, box_noise=v)),
    ("OnlineThreshold", r"decay in \(0, 1\]", lambda v: cpseg.OnlineThreshold(3, decay=v)),
    (
        "boundary_iou",
        r"dilation_ratio in \[0, 1\]",
        lambda v: cpseg.boundary_iou(LABELS, LABELS, num_classes=3, dilation_ratio=v),
    ),
    (
        "interactive_iou",
        r"dilation_ratio in \[0, 1\]",
        lambda v: cpseg.interactive_iou(MASKS[None], MASKS, dilation_ratio=v),
    ),
]


@pytest.mark.parametrize(("where", "match", "call"), NUMBERS, ids=_name)
def test_numbers_that_are_none(where: str, match: str, call: Call) -> None:
    for value in ("x", [0.5], (), math.nan, math.inf, -math.inf, 1j, 10**400, {}, True):
        with raises(ValueError, where, f"{match}.*, got .*"):
            call(value)
    if "balance" not in match:
        with raises(ValueError, where, f"{match}.*, got None"):
            call(None)


def test_a_negative_power_is_refused() -> None:
    with raises(ValueError, "poly_lr", "power >= 0, got -0.5; the papers use 0.9"):
        cpseg.poly_lr(2, 2, base_lr=1, power=-0.5)


def test_a_ratio_of_one_takes_the_whole_mask() -> None:
    full = torch.ones(1, 6, 9, dtype=torch.int64)
    whole = cpseg.boundary_iou(full, full, num_classes=2, dilation_ratio=1, per_class=True)
    assert whole[1] == 1
    half = full.clone()
    half[:, :3] = 0
    found = cpseg.boundary_iou(half, full, num_classes=2, dilation_ratio=1, per_class=True)
    assert found[1] == 0.5, "the band is the mask"


@pytest.mark.parametrize("value", [10**400, -(10**400), True, None, "x", [0.5]])
def test_thresholds_that_are_none(value: Any) -> None:
    kind = ValueError if type(value) is int else TypeError
    for where, call in (
        ("pseudo_labels", lambda: cpseg.pseudo_labels(PROBS, value, background=None)),
        ("prediction_set", lambda: cpseg.prediction_set(PROBS, value)),
        ("Evidence.pseudo_labels", lambda: FOUND.pseudo_labels(value)),
    ):
        with raises(kind, where, "a threshold .*, got .*; pass"):
            call()


@pytest.mark.parametrize("size", [(2,), (-1, 2), (0, 5), None, 5, (2.0, 3), "ab", (2**31, 1)])
def test_sizes_that_are_none(size: Any) -> None:
    with raises(
        ValueError, "jitter_boxes", "size as two whole numbers >= 1, got .*; pass the heig"
    ):
        cpseg.jitter_boxes(BOXES, size)
    for grouping in (groups.pixel, groups.image):
        with raises(ValueError, f"groups.{grouping.__name__}", "size .*, got .*"):
            grouping(size)


@pytest.mark.parametrize("count", [0, -1, 2.5, None, "3", True, 2**15 + 1, 10**30])
def test_class_counts_that_are_none(count: Any) -> None:
    for where, call in (
        ("confusion_matrix", cpseg.confusion_matrix),
        ("boundary_iou", cpseg.boundary_iou),
    ):
        with raises(ValueError, where, "num_classes (as a whole|of at most).*, got"):
            call(LABELS, LABELS, num_classes=count)


def test_settings_of_raps_that_float32_cannot_hold() -> None:
    for score in ("raps:1e300:5", "raps:0.1:99999999999999999999", "raps:inf:1", "raps:-1:1"):
        with raises(ValueError, "nonconformity_map", f"a score among .*, got '{score}'"):
            cpseg.nonconformity_map(PROBS, score=score)


@pytest.mark.parametrize("dim", [None, "0", 0.0, True])
def test_an_axis_is_an_int(dim: Any) -> None:
    with raises(TypeError, "conformal_quantile", "dim as int, got"):
        cpseg.conformal_quantile(torch.rand(3), 0.5, dim=dim)


def test_a_dtype_is_one_of_integers() -> None:
    for dtype in (torch.float32, torch.bool, torch.qint8, None, int, "int64"):
        with raises(TypeError, "pseudo_labels", "an integer dtype, got .*; pass torch.int64"):
            cpseg.pseudo_labels(PROBS, 0.5, background=0, dtype=dtype)  # type: ignore[arg-type]


# --- generators ----------------------------------------------------------------------------------

WITH_GENERATOR: list[tuple[str, Call]] = [
    ("nonconformity", lambda g: cpseg.nonconformity(PROBS, LABELS, score="aps", generator=g)),
    ("nonconformity_map", lambda g: cpseg.nonconformity_map(PROBS, score="raps", generator=g)),
    ("prediction_set", lambda g: cpseg.prediction_set(PROBS, 0.5, score="aps", generator=g)),
    ("Calibrator", lambda g: cpseg.Calibrator(groups.image((2, 2)), score="aps", generator=g)),
    ("sample_prompts", lambda g: cpseg.sample_prompts(MASKS, generator=g)),
    ("jitter_boxes", lambda g: cpseg.jitter_boxes(BOXES, (9, 9), generator=g)),
    ("WeakAugmentation", lambda g: AUGMENT(IMAGE, LABELS[0], generator=g)),
    ("groups.kmeans", lambda g: groups.kmeans(CURVES, 2, generator=g)),
    ("groups.annuli", lambda g: groups.annuli(CURVES, 2, generator=g)),
]


@pytest.mark.parametrize(("where", "call"), WITH_GENERATOR, ids=_name)
@pytest.mark.parametrize("generator", [5, "cpu", torch.Generator, [torch.Generator()]], ids=_name)
def test_a_generator_is_one(where: str, call: Call, generator: Any) -> None:
    with raises(TypeError, where, "generator as torch.Generator or None, got .*; pass"):
        call(generator)


# --- tensors -------------------------------------------------------------------------------------

FLOATS: list[tuple[str, Call, Tensor]] = [
    ("nonconformity", lambda p: cpseg.nonconformity(p, LABELS), PROBS),
    ("nonconformity_map", cpseg.nonconformity_map, PROBS),
    ("prediction_set", lambda p: cpseg.prediction_set(p, 0.5), PROBS),
    ("pseudo_labels", lambda p: cpseg.pseudo_labels(p, 0.5, background=0), PROBS),
    ("evidence", lambda p: cpseg.evidence(p, background=0), PROBS),
    ("conformal_quantile", lambda s: cpseg.conformal_quantile(s, 0.5), PROBS),
    (
        "Calibrator.update",
        lambda p: cpseg.Calibrator(groups.image((2, 2))).update(p, LABELS),
        PROBS,
    ),
    ("Recalibrator.update", lambda p: cpseg.Recalibrator(3).update(p, LABELS), PROBS),
    ("OnlineThreshold.update", lambda p: cpseg.OnlineThreshold(3).update(p, LABELS), PROBS),
    ("OnlineThreshold.gate", lambda p: cpseg.OnlineThreshold(3).gate(p), PROBS),
    ("uncertainty_map", lambda p: cpseg.uncertainty_map(p, p), PROBS),
    ("confidence_uncertainty", cpseg.confidence_uncertainty, PROBS),
    ("discrepancy_uncertainty", lambda p: cpseg.discrepancy_uncertainty(p, p), PROBS),
    ("focal_loss", lambda p: cpseg.focal_loss(p, TARGETS), LOGITS),
    ("dice_loss", lambda p: cpseg.dice_loss(p, TARGETS), LOGITS),
    ("sum_loss", lambda p: cpseg.sum_loss(p, TARGETS), LOGITS),
    ("pseudo_label_loss", lambda p: cpseg.pseudo_label_loss(p, LABELS), PROBS),
    ("self_reliance_loss", lambda p: cpseg.self_reliance_loss(p, p, 0.5), LOGITS[0]),
    ("mask_filters", lambda p: cpseg.mask_filters(p, torch.rand(2).to(p.device)), LOGITS[:, 0]),
    ("jitter_boxes", lambda b: cpseg.jitter_boxes(b, (9, 9)), BOXES),
    ("TaskPrompt", lambda p: cpseg.TaskPrompt(2, 3).to(p.device)(p, torch.tensor([0, 1])), PROBS),
    ("groups.curves", groups.curves, PROBS),
    ("groups.kmeans", lambda c: groups.kmeans(c, 2), CURVES),
    ("groups.annuli", lambda c: groups.annuli(c, 2), CURVES),
    ("WeakAugmentation", lambda image: AUGMENT(image, LABELS[0]), IMAGE),
]
OTHERS: list[tuple[str, Call, Tensor]] = [
    ("mean_iou", cpseg.mean_iou, CONFUSION),
    ("confusion_matrix", lambda y: cpseg.confusion_matrix(y, y, num_classes=3), LABELS),
    ("boundary_iou", lambda y: cpseg.boundary_iou(y, y, num_classes=3), LABELS),
    ("kept_share", cpseg.kept_share, LABELS),
    ("set_size", cpseg.set_size, SETS),
    ("coverage", lambda s: cpseg.coverage(s, LABELS), SETS),
    ("interactive_iou", lambda m: cpseg.interactive_iou(m[None], m), MASKS),
    ("masks_to_boxes", cpseg.masks_to_boxes, MASKS),
    ("sample_prompts", cpseg.sample_prompts, MASKS),
    ("centre_point", cpseg.centre_point, MASKS),
    ("boundary_point", cpseg.boundary_point, MASKS),
    ("Calibrator", cpseg.Calibrator, groups.image((2, 2))),
]


@pytest.mark.parametrize(("where", "call", "values"), [*FLOATS, *OTHERS], ids=_name)
def test_a_tensor_without_values_is_refused(where: str, call: Call, values: Tensor) -> None:
    call(values)
    match = "(with values|on the device of|as before).*, got .*meta; "
    with raises(ValueError, where, match):
        call(values.to("meta"))


@pytest.mark.parametrize(("where", "call", "values"), FLOATS, ids=_name)
def test_eight_bits_are_too_few(where: str, call: Call, values: Tensor) -> None:
    with raises(
        TypeError, where, r"of 16 bits or more, got torch.float8_e5m2; convert it to float"
    ):
        call(values.to(torch.float8_e5m2))


def test_no_image_at_all() -> None:
    with raises(TypeError, "TaskPrompt", "floating-point image_embedding, got NoneType"):
        cpseg.TaskPrompt(2, 3)(None, torch.tensor([0]))  # type: ignore[arg-type]
    with raises(TypeError, "WeakAugmentation", "floating-point image, got NoneType; scale it"):
        AUGMENT(None, LABELS[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [cpseg.focal_loss, cpseg.dice_loss, cpseg.sum_loss])
def test_targets_that_want_a_gradient(call: Call) -> None:
    logits = LOGITS.clone().requires_grad_()
    targets = TARGETS.float()
    plain = call(logits, targets)
    (expected,) = torch.autograd.grad(plain, logits)
    wanting = targets.clone().requires_grad_()
    loss = call(logits, wanting)
    loss.backward()
    assert loss == plain
    assert torch.equal(logits.grad, expected)
    assert wanting.grad is None


def test_a_confusion_matrix_of_bools_is_refused() -> None:
    for values in (CONFUSION > 0, CONFUSION + 0j):
        with raises(TypeError, "mean_iou", "integer confusion, got .*; convert them to an integer"):
            cpseg.mean_iou(values)
    half = cpseg.mean_iou(torch.tensor([[60000, 30000], [0, 60000]]).to(torch.bfloat16))
    assert half.dtype == torch.float64


@pytest.mark.parametrize("num_classes", [2**15 - 1, 2**15, 2**15 + 1, 2**16 + 3])
@pytest.mark.parametrize("background", [None, 0, 32766])
def test_any_number_of_classes(num_classes: int, background: int | None) -> None:
    probs = torch.rand(num_classes, 1, 3, generator=seeded(num_classes)) / 2
    probs[num_classes - 1, 0, 0] = probs[32765, 0, 1] = probs[32766, 0, 2] = 0.9
    found = cpseg.evidence(probs, background=background)
    others = probs.clone()
    if background is not None:
        others[background] = -1
    assert torch.equal(found.best_class.long(), others.argmax(0))
    assert torch.equal(found.best, others.amax(0))
    labels = cpseg.pseudo_labels(probs, 0.2, background=background, ignore_index=-1)
    assert labels[0, 1] == 32765
    assert torch.equal(labels, found.pseudo_labels(0.2, ignore_index=-1))


def test_half_precision_images_are_augmented() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        image, _, _ = AUGMENT(IMAGE.to(dtype), LABELS[0], generator=seeded(7))
        whole, _, _ = AUGMENT(IMAGE.to(dtype).float(), LABELS[0], generator=seeded(7))
        assert image.dtype == dtype
        assert torch.equal(image, whole.to(dtype))
    with raises(ValueError, "WeakAugmentation", "labels of a dtype that holds ignore_index -1"):
        cpseg.WeakAugmentation(4, ignore_index=-1)(IMAGE, LABELS[0].to(torch.uint8))


def test_a_state_is_a_mapping() -> None:
    cal = cpseg.OnlineThreshold(3)
    for state in (None, 5, [("weights", torch.zeros(3))]):
        with raises(TypeError, "OnlineThreshold.load_state_dict", "a state_dict, got .*; pass the"):
            cal.load_state_dict(state)  # type: ignore[arg-type]
    with raises(TypeError, "OnlineThreshold.load_state_dict", "floating-point weights, got torch."):
        cal.load_state_dict({"weights": torch.zeros(3, dtype=torch.int64)})


def test_curves_that_overflow_are_refused() -> None:
    for call in (lambda c: groups.kmeans(c, 2), lambda c: groups.annuli(c, 2), groups.curves):
        with pytest.raises(ValueError, match="got infinite or huge values; score with probabil"):
            call(CURVES * 1e38)


def test_more_scores_than_memory_holds_are_refused() -> None:
    match = "at most 68719476736 scores to keep, got .* for max_images=4611686018427387904; count"
    with raises(ValueError, "Calibrator", match):
        cpseg.Calibrator(groups.pixel((2, 2)), max_images=2**62)
    cpseg.Calibrator(groups.image((2, 2)), max_images=2**62)


def test_a_crop_larger_than_any_image_is_refused() -> None:
    with raises(ValueError, "WeakAugmentation", "crop of at most 1048576, got 1000000000000"):
        cpseg.WeakAugmentation(10**30)


def test_odd_groups_devices_and_limits_are_refused() -> None:
    cells = torch.tensor([[0, 2**40]])
    with raises(ValueError, "Calibrator", "group indices below 65536, got 1099511627776; number"):
        cpseg.Calibrator(cells)
    for device in ("nowhere", 10**30, [], 0.5):
        with raises(ValueError, "groups.pixel", "a device, got .*; pass the name of one"):
            groups.pixel((2, 2), device=device)  # type: ignore[arg-type]
    with raises(ValueError, "mask_filters", "min_iou in percent, got 0.333333; pass percent"):
        cpseg.mask_filters(LOGITS[:, 0], torch.rand(2), min_iou=Fraction(1, 3))  # type: ignore[arg-type]


def test_maps_with_a_channel_axis_weigh_their_own_sample() -> None:
    weight = torch.rand(2, 4, 5, generator=seeded(8))
    valid = weight > 0.3
    plain = cpseg.pseudo_label_loss(PROBS, LABELS, valid=valid, certainty=weight)
    channel = cpseg.pseudo_label_loss(
        PROBS, LABELS, valid=valid.unsqueeze(1), certainty=weight.unsqueeze(1)
    )
    assert channel == plain


def test_no_float_holds_this_distance() -> None:
    for value in (10**400, -(10**400)):
        with raises(ValueError, "boundary_point", "distance >= 1, got .*; the paper uses 10"):
            cpseg.boundary_point(MASKS, distance=value)
        with raises(ValueError, "jitter_boxes", "most >= 0, got .*; SAM uses 20"):
            cpseg.jitter_boxes(BOXES, (9, 9), most=value)
