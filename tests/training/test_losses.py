"""Losses against NumPy in float64, their laws, and every way of computing them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.helpers import FLOATS, exact, raises, same, seeded
from torch import Tensor

from cpseg import dice_loss, focal_loss, pseudo_label_loss, self_reliance_loss, sum_loss

LOSSES = [focal_loss, dice_loss, sum_loss]


# --- oracles: formulas pixel by pixel -----------------------------------------------------------


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def pixels(logits: Tensor, targets: Tensor, uncertainty: Tensor | None) -> Iterator[Any]:
    """For each sample, (log-probabilities of all classes, target, certainty) of every pixel."""
    z, y = exact(logits), targets.reshape(len(logits), -1).to(torch.float64).numpy()
    u = np.zeros(y.shape) if uncertainty is None else exact(uncertainty).reshape(y.shape)
    for b in range(len(z)):
        sample = []
        columns = z[b].reshape(z.shape[1], -1).T
        for column, target, unsure in zip(columns, y[b], u[b], strict=True):
            if len(column) == 1:
                log_p = [log_sigmoid(-column[0]), log_sigmoid(column[0])]
            else:
                top = max(column)
                norm = top + math.log(sum(math.exp(v - top) for v in column))
                log_p = [v - norm for v in column]
            sample.append((log_p, int(target), 1 - unsure))
        yield sample


def focal(logits: Tensor, targets: Tensor, u: Tensor | None = None, **kw: Any) -> list[float]:
    """torchvision's sigmoid_focal_loss, (1 - p_t)^gamma ce alpha_t, times 1 - u; its mean."""
    balance, gamma = kw.get("balance", 0.25), kw.get("gamma", 2.0)
    result = []
    for sample in pixels(logits, targets, u):
        terms = []
        for log_p, target, c in sample:
            if target == 255:
                continue
            if balance is None:
                weight = 1.0
            elif isinstance(balance, Tensor):
                weight = float(balance[target])
            else:
                binary = logits.shape[1] == 1 and target == 0
                weight = 1 - balance if binary else balance
            rest = -math.expm1(log_p[target])
            terms.append(-c * weight * rest**gamma * log_p[target])
        result.append(sum(terms) / len(terms) if terms else 0.0)
    return result


def dice(logits: Tensor, targets: Tensor, u: Tensor | None = None, **kw: Any) -> list[float]:
    """The published Dice: y and p masked where 1 - u > theta; a class at a time."""
    theta, smooth = kw.get("certainty_threshold", 0.6), kw.get("smooth", 1.0)
    classes = [1] if logits.shape[1] == 1 else range(logits.shape[1])
    result = []
    for sample in pixels(logits, targets, u):
        losses = []
        for k in classes:
            both = total = 0.0
            for log_p, target, c in sample:
                if target != 255 and (u is None or c > theta):
                    p, y = math.exp(log_p[k]), float(target == k)
                    both, total = both + y * p, total + y + p
            below = total + smooth
            losses.append(1 - (2 * both + smooth) / below if below else 0.0)
        result.append(sum(losses) / len(losses))
    return result


def case(
    seed: int, classes: int, *, batch: int = 2, size: tuple[int, int] = (5, 6), void: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, some of them extreme, targets with void, and uncertainty with 0, 1 and ties."""
    generator = seeded(seed)
    logits = 4 * torch.randn(batch, classes, *size, generator=generator)
    extreme = torch.rand(logits.shape, generator=generator)
    logits = logits.masked_fill(extreme < 0.1, 100.0).masked_fill(extreme > 0.9, -100.0)
    targets = torch.randint(max(2, classes), (batch, *size), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < void] = 255
    uncertainty = (torch.rand(targets.shape, generator=generator) * 8).round() / 8
    return logits, targets, uncertainty


def near(got: Tensor, want: Any, rtol: float = 2e-5, atol: float = 1e-6) -> bool:
    return bool(np.allclose(exact(got), want, rtol=rtol, atol=atol))


# --- values --------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), classes=st.sampled_from([1, 2, 4]), unsure=st.booleans())
def test_losses_equal_loops(seed: int, classes: int, unsure: bool) -> None:
    logits, targets, u = case(seed, classes)
    uncertainty = u if unsure else None
    one = focal_loss(logits, targets, uncertainty=uncertainty, reduction="none")
    two = dice_loss(logits, targets, uncertainty=uncertainty, reduction="none")
    assert near(one, focal(logits, targets, uncertainty))
    assert near(two, dice(logits, targets, uncertainty))
    both = sum_loss(logits, targets, uncertainty=uncertainty, reduction="none")
    assert near(both, 20 * exact(one) + exact(two), atol=1e-5)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("balance", [0.25, 0.9, None])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.5])
def test_focal_settings(classes: int, balance: float | None, gamma: float) -> None:
    logits, targets, u = case(1, classes)
    got = focal_loss(
        logits.double(), targets, uncertainty=u, balance=balance, gamma=gamma, reduction="none"
    )
    want = focal(logits, targets, u, balance=balance, gamma=gamma)
    assert near(got, want, rtol=1e-12, atol=1e-14)


def test_focal_weights_of_classes() -> None:
    logits, targets, u = case(2, 3)
    weights = torch.tensor([0.1, 2.0, 0.7])
    got = focal_loss(logits, targets, uncertainty=u, balance=weights, reduction="none")
    assert near(got, focal(logits, targets, u, balance=weights))


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("theta", [0.0, 0.5, 0.6])
@pytest.mark.parametrize("smooth", [0.0, 1.0, 10.0])
def test_dice_settings(classes: int, theta: float, smooth: float) -> None:
    logits, targets, u = case(3, classes)
    got = dice_loss(
        logits.double(),
        targets,
        uncertainty=u.double(),
        certainty_threshold=theta,
        smooth=smooth,
        reduction="none",
    )
    want = dice(logits, targets, u, certainty_threshold=theta, smooth=smooth)
    assert near(got, want, rtol=1e-12, atol=1e-14)


def test_the_threshold_is_strict() -> None:
    logits, targets = torch.zeros(1, 1, 1, 2), torch.tensor([[[1, 1]]])
    u = torch.tensor([[[0.5, 0.0]]])
    for theta, kept in ((0.5, 1), (0.49, 2)):
        got = dice_loss(logits, targets, uncertainty=u, certainty_threshold=theta)
        assert near(got, 1 - (kept + 1) / (1.5 * kept + 1))


def test_the_published_defaults_differ_in_the_threshold() -> None:
    """The paper says 0.6, its code 0.5: u = 0.45 tells them apart."""
    logits, targets, u = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1), torch.full((1, 1, 1), 0.45)
    assert float(dice_loss(logits, targets, uncertainty=u)) == 0
    published = dice_loss(logits, targets, uncertainty=u, certainty_threshold=0.5)
    assert near(published, 1 - 2 / 2.5)


def test_focal_divides_by_pixels_and_not_by_certainty() -> None:
    logits, targets, _ = case(4, 1, void=0)
    half = torch.full(targets.shape, 0.5)
    assert same(focal_loss(logits, targets, uncertainty=half) * 2, focal_loss(logits, targets))


@pytest.mark.parametrize("empty", [0, 1, 255])
@pytest.mark.parametrize("classes", [1, 3])
def test_targets_of_one_value(empty: int, classes: int) -> None:
    logits, targets, u = case(5, classes)
    targets = torch.full_like(targets, empty)
    for uncertainty in (None, u):
        one = focal_loss(logits, targets, uncertainty=uncertainty, reduction="none")
        two = dice_loss(logits, targets, uncertainty=uncertainty, reduction="none")
        assert near(one, focal(logits, targets, uncertainty))
        assert near(two, dice(logits, targets, uncertainty))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [1, 3])
def test_reductions(loss: Callable[..., Tensor], classes: int) -> None:
    logits, targets, u = case(6, classes, batch=3)
    each = loss(logits, targets, uncertainty=u, reduction="none")
    assert each.shape == (3,)
    assert near(loss(logits, targets, uncertainty=u), exact(each).mean())
    assert near(loss(logits, targets, uncertainty=u, reduction="sum"), exact(each).sum())
    alone = [loss(logits[b : b + 1], targets[b : b + 1], uncertainty=u[b : b + 1]) for b in (0, 2)]
    assert near(torch.stack(alone), exact(each)[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_binary_targets_of_every_dtype_and_rank(dtype: torch.dtype) -> None:
    logits, targets, u = case(7, 1, void=0 if dtype == torch.bool else 0.2)
    want = sum_loss(logits, targets, uncertainty=u)
    assert same(sum_loss(logits, targets.to(dtype), uncertainty=u), want)
    assert same(sum_loss(logits, targets.to(dtype)[:, None], uncertainty=u[:, None]), want)


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets, u = case(8, 1, batch=5, size=(9, 11))
    found = []
    for tile in (1, 7, 99, 250, 10**6):
        monkeypatch.setattr("cpseg.training.loss_sums._TILE", tile)
        leaf = logits.double().requires_grad_()
        loss = sum_loss(leaf, targets, uncertainty=u, reduction="none")
        loss.sum().backward()
        assert leaf.grad is not None
        found.append(torch.cat([loss.detach(), leaf.grad.flatten()]))
    assert all(torch.allclose(one, found[0], rtol=1e-12, atol=1e-15) for one in found)


# --- the IoU head --------------------------------------------------------------------------------


def test_iou_head() -> None:
    logits, targets, u = case(9, 1, batch=4, size=(8, 8))
    targets[3] = 255
    predicted = torch.tensor([0.9, 0.1, 0.5, 0.7])
    plain = sum_loss(logits, targets, reduction="none")
    for unsure in (None, u):
        without = sum_loss(logits, targets, uncertainty=unsure, reduction="none")
        got = sum_loss(
            logits,
            targets,
            uncertainty=unsure,
            predicted_iou=predicted,
            iou_weight=0.5,
            reduction="none",
        )
        want = []
        for b in range(4):
            kept = targets[b] != 255
            if unsure is not None:
                kept &= 1 - u[b] > 0.6
            mask, truth = (logits[b, 0] > 0) & kept, (targets[b] == 1) & kept
            either = int((mask | truth).sum())
            iou = int((mask & truth).sum()) / either if either else 1.0
            want.append(0.5 * (float(predicted[b]) - iou) ** 2 if kept.any() else 0.0)
        assert near(got - without, want, atol=1e-5)
    again = sum_loss(logits, targets, predicted_iou=predicted[:, None], reduction="none")
    assert same(again, sum_loss(logits, targets, predicted_iou=predicted, reduction="none"))
    assert not same(again, plain)


def test_iou_head_learns_and_the_mask_does_not_through_it() -> None:
    logits, targets, _ = case(10, 1)
    leaf, head = logits.clone().requires_grad_(), torch.rand(2).requires_grad_()
    options: dict[str, Any] = {"focal_weight": 0.0, "dice_weight": 0.0, "predicted_iou": head}
    sum_loss(leaf, targets, **options).backward()
    assert leaf.grad is not None
    assert head.grad is not None
    assert not leaf.grad.any()
    assert head.grad.all()


# --- laws ----------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), classes=st.sampled_from([1, 3]), void=st.sampled_from([0, 0.3]))
def test_no_uncertainty_is_the_plain_loss_bit_for_bit(seed: int, classes: int, void: float) -> None:
    logits, targets, u = case(seed, classes, void=void)
    for loss in LOSSES:
        grads = []
        for uncertainty in (None, torch.zeros_like(u)):
            leaf = logits.clone().requires_grad_()
            value = loss(leaf, targets, uncertainty=uncertainty)
            value.backward()
            grads.append((value.detach(), leaf.grad))
        assert same(grads[0][0], grads[1][0])
        assert same(grads[0][1], grads[1][1])


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_full_uncertainty_is_no_gradient(loss: Callable[..., Tensor], classes: int) -> None:
    logits, targets, u = case(11, classes)
    logits[0, 0, 0, 0] = math.inf
    logits[0, 0, 0, 1] = -math.inf
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        leaf = logits.to(dtype).requires_grad_()
        value = loss(leaf, targets, uncertainty=torch.ones_like(u))
        value.backward()
        assert float(value.detach()) == 0
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert not leaf.grad.any()  # NaN would be something


def test_full_uncertainty_is_no_gradient_for_the_iou_head() -> None:
    logits, targets, u = case(11, 1)
    head = torch.rand(2).requires_grad_()
    sum_loss(logits, targets, uncertainty=torch.ones_like(u), predicted_iou=head).backward()
    assert head.grad is not None
    assert not head.grad.any()


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_nothing_valid_is_zero_with_a_gradient_path(
    loss: Callable[..., Tensor], classes: int, smooth: float
) -> None:
    logits, targets, u = case(12, classes)
    options = {} if loss is focal_loss else {"smooth": smooth}
    for uncertainty in (None, u):
        leaf = logits.clone().requires_grad_()
        void = torch.full_like(targets, 255)
        value = loss(leaf, void, uncertainty=uncertainty, **options)
        value.backward()
        assert float(value.detach()) == 0
        assert leaf.grad is not None
        assert not leaf.grad.any()


@given(seed=st.integers(0, 10**6), classes=st.sampled_from([1, 3]))
def test_void_pixels_influence_nothing(seed: int, classes: int) -> None:
    logits, targets, u = case(seed, classes)
    padded = torch.nn.functional.pad(logits, [0, 3, 0, 2], value=math.nan)
    around = torch.nn.functional.pad(targets, [0, 3, 0, 2], value=255)
    unsure = torch.nn.functional.pad(u, [0, 3, 0, 2], value=0.5)
    for loss in LOSSES:
        leaf = padded.clone().requires_grad_()
        got = loss(leaf, around, uncertainty=unsure, reduction="none")
        want = loss(logits, targets, uncertainty=u, reduction="none")
        assert near(got, exact(want))
        got.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert not leaf.grad[..., 5:, :].any()


def test_no_gradient_flows_into_weights() -> None:
    for classes in (1, 3):
        logits, targets, u = case(13, classes)
        u = u.requires_grad_()
        loss = sum_loss(logits.requires_grad_(), targets, uncertainty=u)
        assert torch.autograd.grad(loss, u, allow_unused=True) == (None,)


# --- derivatives, precision, compilers -----------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("unsure", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_first_and_second_derivatives(classes: int, unsure: bool, gamma: float) -> None:
    generator = seeded(14)
    logits = torch.randn(2, classes, 2, 3, dtype=torch.float64, generator=generator) * 2
    targets = torch.randint(max(2, classes), (2, 2, 3), generator=generator)
    targets[0, 0, 0] = 255
    u = torch.rand(2, 2, 3, dtype=torch.float64, generator=generator) if unsure else None

    def loss(z: Tensor) -> Tensor:
        return sum_loss(z, targets, uncertainty=u, gamma=gamma, reduction="none")

    logits.requires_grad_()
    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_under_autocast(classes: int, dtype: torch.dtype) -> None:
    logits, targets, u = case(15, classes, size=(40, 50))
    leaf = logits.to(dtype).requires_grad_()
    reference = leaf.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = sum_loss(leaf, targets, uncertainty=u.to(dtype))
    value.backward()
    want = sum_loss(reference, targets, uncertainty=u.to(dtype))
    want.backward()
    assert value.dtype == torch.float32
    assert near(value, exact(want))
    assert leaf.grad is not None
    assert reference.grad is not None
    assert torch.equal(leaf.grad, reference.grad.float().to(dtype)) or torch.allclose(
        leaf.grad.double(), reference.grad, rtol=2e-2, atol=1e-6
    )


@pytest.mark.skipif(not hasattr(torch.compiler, "is_compiling"), reason="torch.compile before 2.3")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("classes", [1, 3])
def test_losses_trace_whole(backend: str, classes: int) -> None:
    torch._dynamo.reset()
    logits, targets, u = case(16, classes)
    head = torch.tensor([0.3, 0.8]) if classes == 1 else None

    def loss(z: Tensor, y: Tensor, unsure: Tensor) -> Tensor:
        return sum_loss(z, y, uncertainty=unsure, predicted_iou=head)

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=False)
    found = []
    for function in (loss, compiled):
        leaf = logits.clone().requires_grad_()
        value = function(leaf, targets, u)
        value.backward()
        assert leaf.grad is not None
        found.append((value.detach(), leaf.grad))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-7)
    torch._dynamo.reset()


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("wrong", ["targets", "uncertainty"])
def test_where_nothing_is_looked_at_bad_values_are_nan(
    classes: int, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator: no look at values, no wait, and no silence either."""
    monkeypatch.setattr("cpseg.training.losses._checks_values", lambda tensor: False)
    logits, targets, u = case(17, classes)
    want = sum_loss(logits, targets, uncertainty=u, reduction="none")
    assert want.isfinite().all()
    if wrong == "targets":
        targets[0, 0, 0] = 7
    else:
        u[0, 0, 0], targets[0, 0, 0] = 1.5, 0
    got = sum_loss(logits, targets, uncertainty=u, reduction="none")
    assert got[0].isnan()
    assert same(got[1], want[1])
    if classes > 1:
        weights = None if wrong == "targets" else 1 - u
        assert pseudo_label_loss(logits, targets, certainty=weights).isnan()


def test_functional_transforms() -> None:
    logits, targets, u = case(18, 1)
    leaf = logits.clone().requires_grad_()
    sum_loss(leaf, targets, uncertainty=u).backward()
    got = torch.func.grad(lambda z: sum_loss(z, targets, uncertainty=u))(logits)
    assert leaf.grad is not None
    assert torch.allclose(got, leaf.grad, rtol=1e-5, atol=1e-8)


# --- pseudo-labels -------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), weighted=st.booleans(), cropped=st.booleans())
def test_pseudo_label_loss_equals_loops(seed: int, weighted: bool, cropped: bool) -> None:
    logits, labels, u = case(seed, 4)
    valid = torch.rand(labels.shape, generator=seeded(seed)) < 0.7 if cropped else None
    entropy, kept, area = 0.0, 0, 0
    inside = torch.ones_like(labels, dtype=torch.bool) if valid is None else valid
    for b, sample in enumerate(pixels(logits, labels, u if weighted else None)):
        for (log_p, target, c), is_valid in zip(sample, inside[b].flatten().tolist(), strict=True):
            area += is_valid
            if target != 255 and is_valid:
                kept += 1
                entropy -= c * log_p[target]
    certainty = 1 - u if weighted else None
    for normalize, number in (("kept", kept), ("valid", area)):
        got = pseudo_label_loss(
            logits, labels, normalize=normalize, valid=valid, certainty=certainty
        )
        assert near(got, entropy / max(number, 1), rtol=1e-5)


def test_pseudo_label_loss_without_certainty_does_not_see_the_logits() -> None:
    """Also where they are infinite, in value and gradient."""
    logits = torch.tensor([[1.0, 0.5], [-math.inf, 0.25]]).reshape(1, 2, 1, 2).requires_grad_()
    labels, certainty = torch.tensor([[[1, 0]]]), torch.tensor([[[0.0, 1.0]]])
    loss = pseudo_label_loss(logits, labels, certainty=certainty)
    assert float(loss) == pytest.approx(math.log1p(math.exp(-0.25)) / 2)
    loss.backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    assert bool((logits.grad[..., 0] == 0).all())


@pytest.mark.parametrize("void", [256, -1, -100])
def test_a_void_value_that_targets_cannot_hold_does_not_wrap_around(void: int) -> None:
    logits, _, _ = case(0, 1)
    masks = (torch.rand(len(logits), *logits.shape[2:], generator=seeded(1)) < 0.5).to(torch.uint8)
    iou = torch.full((len(logits),), 0.5)
    want = sum_loss(logits, masks, predicted_iou=iou)
    assert same(sum_loss(logits, masks, predicted_iou=iou, ignore_index=void), want)
    if void < 0:  # as 8 bits they are 255 and 156
        with raises(ValueError, "sum_loss", "got"):
            sum_loss(logits, masks.masked_fill(masks == 0, void % 256), ignore_index=void)


def test_pseudo_label_loss_is_plain_cross_entropy() -> None:
    logits, labels, _ = case(19, 5)
    want = torch.nn.functional.cross_entropy(logits, labels, ignore_index=255)
    assert torch.allclose(pseudo_label_loss(logits, labels), want)
    assert torch.allclose(pseudo_label_loss(logits, labels.to(torch.uint8)), want)
    moved = labels.masked_fill(labels == 255, -1)
    assert torch.allclose(pseudo_label_loss(logits, moved, ignore_index=-1), want)


@pytest.mark.parametrize("normalize", ["kept", "valid"])
def test_pseudo_label_loss_over_nothing(normalize: str) -> None:
    """Their cross-entropy is NaN here."""
    logits = torch.full((2, 3, 4, 4), math.nan).requires_grad_()
    labels = torch.full((2, 4, 4), 255)
    for valid in (None, torch.zeros(2, 4, 4, dtype=torch.bool)):
        loss = pseudo_label_loss(logits, labels, normalize=normalize, valid=valid)
        (grad,) = torch.autograd.grad(loss, logits)
        assert float(loss.detach()) == 0
        assert not grad.any()


def test_pseudo_label_loss_derivative_and_trace() -> None:
    logits, labels, u = case(20, 3)
    exactly = logits.clamp(-3, 3).double().requires_grad_()

    def loss(z: Tensor) -> Tensor:
        return pseudo_label_loss(z, labels, certainty=u, normalize="valid")

    assert torch.autograd.gradcheck(loss, exactly)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.allclose(compiled(logits), loss(logits))
    torch._dynamo.reset()


def test_self_reliance_loss() -> None:
    one, two = torch.tensor(2.0), torch.tensor(6.0, requires_grad=True)
    loss = self_reliance_loss(one, two, 0.25)
    assert float(loss) == 3.0
    assert torch.autograd.grad(loss, two)[0] == 0.25
    assert self_reliance_loss(one, two, 0.0) == one
    assert (
        self_reliance_loss(torch.ones(3), torch.zeros(3), torch.tensor(0.5)).tolist() == [0.5] * 3
    )


# --- errors --------------------------------------------------------------------------------------

LOGITS, MASK = torch.zeros(2, 1, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int64)
SURE = torch.zeros(2, 3, 4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"logits": LOGITS[:, 0]}, ValueError, r"logits \[B, 1, H, W\] .* got \[2, 3, 4\]; add"),
        ({"logits": MASK[:, None]}, TypeError, r"floating-point logits, got torch\.int64"),
        ({"logits": LOGITS[:0]}, ValueError, "at least one element in logits"),
        (
            {"targets": MASK[:1]},
            ValueError,
            r"targets \[2, 3, 4\] or .* got \[1, 3, 4\]; pass one map",
        ),
        ({"targets": MASK[:, None, None]}, ValueError, r"got \[2, 1, 1, 3, 4\]"),
        ({"targets": MASK[..., :1]}, ValueError, r"got \[2, 3, 1\]"),
        ({"targets": [[0]]}, TypeError, "targets as a tensor, got list"),
        ({"targets": MASK.to("meta")}, ValueError, r"device of logits \(cpu\), got meta"),
        ({"targets": MASK + 2}, ValueError, r"targets in 0\.\.1 or 255 \(ignore_index\), got 2"),
        ({"targets": MASK - 1}, ValueError, "got -1"),
        ({"targets": MASK + 0.5}, ValueError, r"targets 0, 1 or 255 .*, got 0\.5; threshold soft"),
        ({"targets": MASK + math.nan}, ValueError, r"targets 0, 1 or 255 .*, got nan"),
        ({"targets": MASK + 3, "logits": torch.zeros(2, 3, 3, 4)}, ValueError, r"0\.\.2 .*got 3"),
        ({"targets": SURE, "logits": torch.zeros(2, 3, 3, 4)}, TypeError, "integer targets"),
        ({"uncertainty": SURE[:1]}, ValueError, r"uncertainty \[2, 3, 4\] or .* got \[1, 3, 4\]"),
        ({"uncertainty": SURE[..., :1]}, ValueError, r"uncertainty .* got \[2, 3, 1\]"),
        ({"uncertainty": SURE[:, None, None]}, ValueError, r"got \[2, 1, 1, 3, 4\]"),
        ({"uncertainty": SURE + 1.5}, ValueError, r"uncertainty in \[0, 1\], got values from 1\.5"),
        ({"uncertainty": SURE - 0.1}, ValueError, r"got values from -0\.1"),
        ({"uncertainty": SURE + math.nan}, ValueError, "got NaN"),
        ({"uncertainty": MASK}, TypeError, r"floating-point uncertainty, got torch\.int64"),
        ({"reduction": "batch"}, ValueError, r"'none', 'mean', 'sum', got 'batch'; choose"),
        ({"ignore_index": 1}, ValueError, r"outside the classes 0\.\.1, got 1"),
    ],
)
def test_what_does_not_belong_together(
    loss: Callable[..., Tensor], changes: dict[str, Any], kind: type[Exception], match: str
) -> None:
    arguments = {"logits": LOGITS, "targets": MASK, **changes}
    with raises(kind, loss.__name__, match):
        loss(**arguments)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nearly_zero_or_one_is_a_soft_target(dtype: torch.dtype) -> None:
    ends = torch.finfo(dtype)
    for value in (ends.tiny, 2 * ends.eps, 1 - ends.eps, 1 + ends.eps, -ends.tiny, math.inf):
        targets = MASK.to(dtype)
        targets[0, 1] = 1
        targets[1, 2, 3] = value
        with raises(ValueError, "dice_loss", r"targets 0, 1 or 255 \(ignore_index\), got"):
            dice_loss(LOGITS, targets)
    for zero in (0.0, -0.0):
        expected = dice_loss(LOGITS, MASK)
        assert same(dice_loss(LOGITS, MASK.to(dtype).fill_(zero)), expected)


@pytest.mark.parametrize(
    ("loss", "options", "match"),
    [
        (focal_loss, {"gamma": -1}, "gamma >= 0, got -1"),
        (focal_loss, {"balance": 1.5}, r"balance in \[0, 1\], got 1\.5"),
        (focal_loss, {"balance": torch.ones(2)}, r"a number, got balance \[2\]"),
        (dice_loss, {"certainty_threshold": 1.0}, r"certainty_threshold in \[0, 1\), got 1\.0"),
        (dice_loss, {"smooth": -1}, "smooth >= 0, got -1"),
        (sum_loss, {"predicted_iou": torch.ones(1)}, r"\[2\] or \[2, 1\], got \[1\]"),
    ],
)
def test_settings_out_of_range(loss: Any, options: dict[str, Any], match: str) -> None:
    with raises(ValueError, loss.__name__, match):
        loss(LOGITS, MASK, **options)


def test_the_iou_head_is_for_binary_masks() -> None:
    with raises(ValueError, "sum_loss", "binary masks with predicted_iou, got 3 classes"):
        sum_loss(torch.zeros(2, 3, 3, 4), MASK, predicted_iou=torch.ones(2))
    with raises(TypeError, "sum_loss", "floating-point predicted_iou, got torch.int64"):
        sum_loss(LOGITS, MASK, predicted_iou=torch.ones(2, dtype=torch.int64))


SCORES = torch.zeros(2, 3, 3, 4)


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"logits": LOGITS}, ValueError, r"logits of at least 2 classes, got \[2, 1, 3, 4\]; use"),
        ({"pseudo_labels": MASK[:1]}, ValueError, r"pseudo_labels \[2, 3, 4\] .* got \[1, 3, 4\]"),
        ({"pseudo_labels": SURE}, TypeError, "integer pseudo_labels"),
        ({"pseudo_labels": MASK + 3}, ValueError, r"pseudo_labels in 0\.\.2 or 255 .* got 3"),
        ({"normalize": "all"}, ValueError, "normalize among 'kept', 'valid', got 'all'"),
        ({"valid": MASK}, TypeError, r"bool valid, got torch\.int64"),
        ({"valid": (MASK == 0)[:1]}, ValueError, r"valid \[2, 3, 4\] .* got \[1, 3, 4\]"),
        ({"certainty": SURE[:1]}, ValueError, r"certainty \[2, 3, 4\] .* got \[1, 3, 4\]"),
        ({"certainty": SURE + 2}, ValueError, r"certainty in \[0, 1\], got values from 2"),
    ],
)
def test_pseudo_labels_that_are_none(
    changes: dict[str, Any], kind: type[Exception], match: str
) -> None:
    arguments = {"logits": SCORES, "pseudo_labels": MASK, **changes}
    with raises(kind, "pseudo_label_loss", match):
        pseudo_label_loss(**arguments)


def test_losses_that_cannot_be_mixed() -> None:
    one = torch.tensor(1.0)
    with raises(ValueError, "self_reliance_loss", r"weight in \[0, 1\], got 1\.5"):
        self_reliance_loss(one, one, 1.5)
    with raises(ValueError, "self_reliance_loss", r"shape of loss_x \[\], got \[2\]"):
        self_reliance_loss(one, torch.ones(2), 0.5)
    with raises(TypeError, "self_reliance_loss", "floating-point loss_u, got float"):
        self_reliance_loss(one, 1.0, 0.5)  # type: ignore[arg-type]
