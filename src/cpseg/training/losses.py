"""Losses that weight pixels by their certainty.

Focal loss, Dice loss and their sum (SUM), and cross-entropy over pseudo-labels (ConformalSAM). One
channel means a binary mask and sigmoid; several channels mean classes and softmax. Losses are
computed in float32 (in float64 for float64 logits), also under autocast.

On a CPU, invalid values raise an error. On an accelerator, where checking would wait for the
device, and under ``torch.compile``, they make the loss NaN instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cpseg._internal.checks import (
    check_bool,
    check_choice,
    check_float,
    check_has_values,
    check_ignore_index,
    check_integer,
    check_label_values,
    check_labels,
    check_probs,
    check_same_device,
    check_unit_interval,
    is_compiling,
    is_number,
    message,
    shape,
    short,
)
from cpseg.training.loss_sums import LossRule, binary_sums, class_sums

REDUCTIONS = ("none", "mean", "sum")
_MOST_SMOOTH, _MOST_GAMMA = 1e30, 1e4  # float32 holds what is computed from them
_WEIGHT_FIXES = {
    "uncertainty": "make it with uncertainty_map",
    "certainty": "make it with cpseg.certainty",
}


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    uncertainty: Tensor | None = None,
    balance: float | Tensor | None = 0.25,
    gamma: float = 2.0,
    ignore_index: int = 255,
    reduction: str = "mean",
) -> Tensor:
    """Focal loss in which each pixel is weighted by its certainty ``c = 1 - u``.

    The loss of a sample is the mean of ``-c a (1 - p_t)^gamma log p_t`` over its pixels that are
    not void. It is divided by the number of these pixels and not by the sum of c, so an uncertain
    sample counts less.

    Args:
        logits: float ``[B, 1, H, W]`` (sigmoid) or ``[B, K, H, W]`` (softmax over K classes).
        targets: ``[B, H, W]`` or ``[B, 1, H, W]``. Binary: 0 or 1, any dtype; soft targets are
            refused. Classes: integer 0..K-1.
        uncertainty: in [0, 1], float, the shape of the targets; None is 0 everywhere. It is only
            a weight: no gradient flows into it.
        balance: the weight a. Binary: ``balance`` for the mask and ``1 - balance`` for the rest.
            Classes: a tensor ``[K]``, or one number for all classes. None: 1.
        gamma: how fast easy pixels lose weight; 0 is (balanced) cross-entropy.
        ignore_index: the value of void pixels in ``targets``.
        reduction: over samples: ``"none"`` gives ``[B]``; ``"mean"`` and ``"sum"`` give ``[]``.

    Returns:
        float32 (float64 for float64 logits) ``[]`` or ``[B]``; 0 with a gradient of 0 for a
        sample in which every pixel is void.

    Raises:
        ValueError: shapes or devices do not match, values lie outside their range (on a CPU),
            or the reduction is unknown.
        TypeError: wrong dtypes.

    Reference:
        SUM (NeurIPS 2024), eq. 1; Lin et al. (2017), eq. 5.

    Example:
        >>> logits = torch.tensor([2.0, -1.0]).reshape(1, 1, 1, 2)
        >>> targets = torch.tensor([[[1, 1]]])
        >>> focal_loss(logits, targets)
        tensor(0.0880)
        >>> focal_loss(logits, targets, uncertainty=torch.tensor([[[0.0, 1.0]]]))
        tensor(0.0002)
    """
    where = "focal_loss"
    pixels, trusted = _checked(where, logits, targets, uncertainty, ignore_index, reduction)
    weight, power = _check_balance(where, balance, logits), _check_gamma(where, gamma)
    rule = LossRule(weight, power, void=ignore_index, trusted=trusted)
    return _reduce(_sums(pixels, rule).focal / _count(pixels.targets, rule), reduction)


def dice_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    uncertainty: Tensor | None = None,
    certainty_threshold: float = 0.6,
    smooth: float = 1.0,
    ignore_index: int = 255,
    reduction: str = "mean",
) -> Tensor:
    """Dice loss over the pixels whose certainty ``1 - u`` is above a threshold.

    ``1 - (2 sum(y p) + smooth) / (sum(y + p) + smooth)`` over the pixels kept. For K classes it is
    the mean over the classes, each against the rest.

    ``logits``, ``targets``, ``ignore_index`` and ``reduction`` are those of :func:`focal_loss`.

    Args:
        logits: float ``[B, 1, H, W]`` or ``[B, K, H, W]``.
        targets: ``[B, H, W]`` or ``[B, 1, H, W]``.
        uncertainty: in [0, 1], float, the shape of the targets; None keeps every pixel.
        certainty_threshold: in [0, 1); a pixel is kept if its certainty is strictly above it. The
            paper says 0.6; its published code has 0.5 as the default.
        smooth: added to numerator and denominator.
        ignore_index: the value of void pixels.
        reduction: ``"none"``, ``"mean"`` or ``"sum"`` over samples.

    Returns:
        float32 (float64 for float64 logits) ``[]`` or ``[B]``; 0 with a gradient of 0 for a
        sample of which no pixel is kept.

    Raises:
        ValueError: as :func:`focal_loss`.
        TypeError: wrong dtypes.

    Reference:
        SUM (NeurIPS 2024), eq. 2; Milletari et al. (2016), without their squares.

    Example:
        >>> logits = torch.tensor([2.0, -1.0]).reshape(1, 1, 1, 2)
        >>> targets = torch.tensor([[[1, 1]]])
        >>> dice_loss(logits, targets)
        tensor(0.2049)
        >>> dice_loss(logits, targets, uncertainty=torch.tensor([[[0.0, 0.4]]]))
        tensor(0.0414)
    """
    where = "dice_loss"
    pixels, trusted = _checked(where, logits, targets, uncertainty, ignore_index, reduction)
    _check_dice(where, certainty_threshold, smooth)
    rule = LossRule(certainty_threshold=certainty_threshold, void=ignore_index, trusted=trusted)
    return _reduce(_dice(_sums(pixels, rule), smooth), reduction)


def sum_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    uncertainty: Tensor | None = None,
    focal_weight: float = 20.0,
    dice_weight: float = 1.0,
    predicted_iou: Tensor | None = None,
    iou_weight: float = 1.0,
    balance: float | Tensor | None = 0.25,
    gamma: float = 2.0,
    certainty_threshold: float = 0.6,
    smooth: float = 1.0,
    ignore_index: int = 255,
    reduction: str = "mean",
) -> Tensor:
    """The loss of SUM and SAM: focal and Dice loss 20 : 1, and the error of the IoU head.

    Args:
        logits: float ``[B, 1, H, W]`` or ``[B, K, H, W]``, see :func:`focal_loss`.
        targets: see :func:`focal_loss`.
        uncertainty: see :func:`focal_loss`; None for labels made by people.
        focal_weight: weight of the focal loss.
        dice_weight: weight of the Dice loss.
        predicted_iou: the IoU that the model's IoU head predicts for each mask, float ``[B]`` or
            ``[B, 1]``; None leaves this term out. Binary masks only. Its squared error is added,
            against the IoU of ``logits > 0`` with the target over the pixels that Dice keeps (the
            published code takes all pixels). Where uncertainty leaves no pixel, the term is 0.
        iou_weight: weight of that squared error.
        balance: see :func:`focal_loss`.
        gamma: see :func:`focal_loss`.
        certainty_threshold: see :func:`dice_loss`.
        smooth: see :func:`dice_loss`.
        ignore_index: see :func:`focal_loss`.
        reduction: see :func:`focal_loss`.

    Returns:
        float32 (float64 for float64 logits) ``[]`` or ``[B]``.

    Raises:
        ValueError: as :func:`focal_loss`, or a ``predicted_iou`` that does not fit.
        TypeError: wrong dtypes.

    Reference:
        SUM (NeurIPS 2024), section 3.2.1 and appendix B.1.

    Example:
        >>> logits = torch.tensor([2.0, -1.0]).reshape(1, 1, 1, 2)
        >>> targets = torch.tensor([[[1, 1]]])
        >>> sum_loss(logits, targets)
        tensor(1.9641)
        >>> sum_loss(logits, targets, predicted_iou=torch.tensor([0.9]))
        tensor(2.1241)
    """
    where = "sum_loss"
    weights = {"focal_weight": focal_weight, "dice_weight": dice_weight, "iou_weight": iou_weight}
    for name, number in weights.items():
        if not isinstance(number, Tensor) and not is_number(number):
            raise ValueError(message(where, f"{name} as a number", short(number), "SAM: 20, 1, 1"))
    pixels, trusted = _checked(where, logits, targets, uncertainty, ignore_index, reduction)
    _check_dice(where, certainty_threshold, smooth)
    weight, power = _check_balance(where, balance, logits), _check_gamma(where, gamma)
    rule = LossRule(weight, power, certainty_threshold, ignore_index, trusted)
    sums = _sums(pixels, rule)
    focal = sums.focal / _count(pixels.targets, rule)
    loss = focal_weight * focal + dice_weight * _dice(sums, smooth)
    if predicted_iou is not None:
        loss = loss + iou_weight * _iou_error(where, predicted_iou, pixels, rule)
    return _reduce(loss, reduction)


def pseudo_label_loss(
    logits: Tensor,
    pseudo_labels: Tensor,
    *,
    ignore_index: int = 255,
    normalize: str = "kept",
    valid: Tensor | None = None,
    certainty: Tensor | None = None,
) -> Tensor:
    """Cross-entropy over the pixels that have a pseudo-label.

    Args:
        logits: float ``[B, K, H, W]``, softmax over K >= 2 classes.
        pseudo_labels: integer ``[B, H, W]``, ``ignore_index`` where there is none.
        ignore_index: the value of pixels without a pseudo-label.
        normalize: the divisor of the sum over kept pixels: ``"kept"`` is their number; ``"valid"``
            is the number of all valid pixels, as in UniMatch, so that a batch with few
            pseudo-labels counts less.
        valid: bool ``[B, H, W]``, False where there is no image (padding); None is all True. Only
            valid pixels are kept.
        certainty: weights in [0, 1], float ``[B, H, W]``, for instance from
            :func:`cpseg.certainty`. No gradient flows into them, and they do not change the
            divisor.

    Returns:
        float32 (float64 for float64 logits) ``[]``; 0 with a gradient of 0 where nothing is kept.

    Raises:
        ValueError: shapes or devices do not match, values lie outside their range (on a CPU),
            or ``normalize`` is unknown.
        TypeError: wrong dtypes.

    Reference:
        ConformalSAM (ICCV 2025), section 3.3.1.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)
        >>> labels = torch.tensor([[[0, 255]]])
        >>> pseudo_label_loss(logits, labels), pseudo_label_loss(logits, labels, normalize="valid")
        (tensor(0.1269), tensor(0.0635))
    """
    where = "pseudo_label_loss"
    _check_logits(where, logits)
    num_classes = logits.shape[1]
    if num_classes < 2:
        fix = "use sum_loss for binary masks"
        raise ValueError(message(where, "logits of at least 2 classes", shape(logits), fix))
    check_labels(where, pseudo_labels, logits, name="pseudo_labels")
    check_ignore_index(where, ignore_index, num_classes)
    check_choice(where, normalize, ("kept", "valid"), name="normalize")
    if valid is not None:
        check_bool(where, valid, name="valid", fix="compare the mask with its value")
        _check_plane(where, valid, pseudo_labels, "valid", "pseudo_labels")
        valid = valid.reshape(pseudo_labels.shape)
    if certainty is not None:
        _check_weight(where, certainty, pseudo_labels, "certainty")
        certainty = certainty.reshape(pseudo_labels.shape)
    label = pseudo_labels.to(torch.int64)
    if _checks_values(logits):
        check_label_values(where, label, num_classes, ignore_index, name="pseudo_labels")
    kept = label != ignore_index
    bad = kept & ((label < 0) | (label >= num_classes))
    if valid is not None:
        kept = kept & valid
    logits = _at_least_float32(logits)
    weight = kept.to(logits.dtype)
    if certainty is not None:
        sure = certainty.detach().to(logits.dtype)
        sure = torch.where((sure >= 0) & (sure <= 1), sure, torch.nan)
        weight = torch.where(kept, sure, 0)
    weight = weight.masked_fill(bad, torch.nan)
    unused = weight == 0
    logits = logits.masked_fill(unused.unsqueeze(1), 0)  # 0 times infinity would be NaN
    entropy = cross_entropy(logits, label.masked_fill(unused | bad, 0), reduction="none")
    counted = kept if normalize == "kept" else valid
    number = kept.numel() if counted is None else counted.sum().clamp(min=1)
    return (entropy * weight).sum() / number


def self_reliance_loss(loss_x: Tensor, loss_u: Tensor, weight: float | Tensor) -> Tensor:
    """``(1 - weight) loss_x + weight loss_u``, the objective of the self-reliance stage.

    Args:
        loss_x: loss on labelled images, float ``[]`` or ``[B]``.
        loss_u: loss on unlabelled images, float, the same shape.
        weight: in [0, 1], from :func:`cpseg.self_reliance_weight`.

    Returns:
        The weighted loss, of the same shape as the two losses.

    Raises:
        ValueError: shapes or devices differ, or a number ``weight`` outside [0, 1].
        TypeError: losses that are not float tensors.

    Reference:
        ConformalSAM (ICCV 2025), eq. 5.

    Example:
        >>> self_reliance_loss(torch.tensor(1.0), torch.tensor(3.0), 0.01)
        tensor(1.0200)
    """
    where = "self_reliance_loss"
    for name, loss in (("loss_x", loss_x), ("loss_u", loss_u)):
        check_float(where, loss, name=name, fix="pass the loss itself, as a tensor")
    if loss_x.shape != loss_u.shape:
        expected, fix = (
            f"loss_u of the shape of loss_x {shape(loss_x)}",
            "reduce both in the same way",
        )
        raise ValueError(message(where, expected, shape(loss_u), fix))
    check_same_device(where, loss_u, loss_x, name="loss_u", reference="loss_x")
    check_has_values(where, loss_x, name="loss_x")
    fix = "take it from self_reliance_weight"
    if isinstance(weight, Tensor):
        check_float(where, weight, name="weight", fix=fix)
        if weight.shape not in (torch.Size(()), loss_x.shape):
            expected = f"weight [] or of the shape of the losses {shape(loss_x)}"
            raise ValueError(message(where, expected, shape(weight), fix))
        check_same_device(where, weight, loss_x, name="weight", reference="the losses")
    elif not is_number(weight, 0, 1):
        raise ValueError(message(where, "weight in [0, 1]", short(weight), fix))
    return (1 - weight) * loss_x + weight * loss_u


class _Pixels(NamedTuple):
    """Logits ``[B, 1 or K, N]``, targets and uncertainty ``[B, N]`` of N pixels per sample."""

    logits: Tensor
    targets: Tensor
    uncertainty: Tensor | None


class _Sums(NamedTuple):
    """Per sample the focal sum ``[B]``; per sample and class sums of y p and y + p ``[B, K]``."""

    focal: Tensor
    overlap: Tensor
    mass: Tensor


def _sums(pixels: _Pixels, rule: LossRule) -> _Sums:
    logits, targets, uncertainty = pixels
    if logits.shape[1] > 1:
        return _Sums(*class_sums(logits, targets, uncertainty, rule))
    focal, overlap, mass = binary_sums(logits.squeeze(1), targets, uncertainty, rule)
    return _Sums(focal, overlap.unsqueeze(1), mass.unsqueeze(1))


def _dice(sums: _Sums, smooth: float) -> Tensor:
    """Eq. 2; 0 where both sums are 0."""
    denominator = sums.mass + smooth
    empty = denominator == 0
    overlap = (2 * sums.overlap + smooth) / denominator.masked_fill(empty, 1)
    return (1 - overlap.masked_fill(empty, 1)).mean(1)


def _count(targets: Tensor, rule: LossRule) -> Tensor | int:
    """Number of pixels per sample that are not void, at least 1."""
    if rule.trusted:
        return targets.shape[1]
    return (targets != rule.void).sum(1).clamp(min=1)


def _iou_error(where: str, predicted: Tensor, pixels: _Pixels, rule: LossRule) -> Tensor:
    """Squared error of the predicted IoU over the pixels that Dice keeps, ``[B]``."""
    logits, targets, uncertainty = pixels
    if logits.shape[1] > 1:
        expected, got = "binary masks with predicted_iou", f"{logits.shape[1]} classes"
        raise ValueError(message(where, expected, got, "leave it out"))
    check_float(where, predicted, name="predicted_iou", fix="pass the output of the IoU head")
    if predicted.shape not in ((len(logits),), (len(logits), 1)):
        expected = f"predicted_iou [{len(logits)}] or [{len(logits)}, 1]"
        raise ValueError(message(where, expected, shape(predicted), "pass one value per mask"))
    check_same_device(where, predicted, logits, name="predicted_iou", reference="logits")
    mask, truth, kept = logits.squeeze(1) > 0, targets == 1, targets != rule.void
    if uncertainty is not None:
        kept = kept & (1 - uncertainty.to(logits.dtype) > rule.certainty_threshold)
    both = (mask & truth & kept).sum(1)
    either = ((mask | truth) & kept).sum(1)
    # Two empty masks agree; SAM's targets are never empty.
    iou = torch.where(either > 0, both / either.clamp(min=1), 1.0).to(logits.dtype)
    error = (predicted.reshape(-1).to(logits.dtype) - iou).square()
    return torch.where(kept.any(1), error, 0)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _checked(
    where: str,
    logits: Tensor,
    targets: Tensor,
    uncertainty: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> tuple[_Pixels, bool]:
    """The checked arguments with all pixels in one axis, and :attr:`LossRule.trusted`."""
    _check_logits(where, logits)
    check_choice(where, reduction, REDUCTIONS, name="reduction")
    num_classes = logits.shape[1]
    if not isinstance(targets, Tensor):
        got, fix = type(targets).__name__, "convert them with torch.as_tensor"
        raise TypeError(message(where, "targets as a tensor", got, fix))
    if num_classes > 1:
        check_integer(where, targets, name="targets")
    elif targets.is_floating_point():
        check_float(where, targets, name="targets")
    elif targets.dtype != torch.bool:
        check_integer(where, targets, name="targets")
    targets = targets.detach()
    check_ignore_index(where, ignore_index, max(2, num_classes))
    _check_plane(where, targets, logits, "targets", "logits")
    if uncertainty is not None:
        _check_weight(where, uncertainty, logits, "uncertainty")
        uncertainty = uncertainty.reshape(len(logits), -1)
    if not targets.is_floating_point() and targets.dtype != torch.bool:
        limits = torch.iinfo(targets.dtype)
        if not limits.min <= ignore_index <= limits.max:  # in this dtype it would wrap around
            targets = targets.to(torch.int64)
    trusted = _checks_values(logits) and _check_targets(where, targets, num_classes, ignore_index)
    flat = _at_least_float32(logits).flatten(2)
    return _Pixels(flat, targets.reshape(len(logits), -1), uncertainty), trusted


def _check_targets(where: str, targets: Tensor, num_classes: int, ignore_index: int) -> bool:
    """Raise on invalid targets; otherwise return whether no target is void."""
    if targets.dtype == torch.bool:
        return True
    if not targets.is_floating_point():
        low, high = (int(value) for value in targets.aminmax())
        if low >= 0 and high < max(2, num_classes):
            return True
        check_label_values(where, targets, max(2, num_classes), ignore_index, name="targets")
        return False
    # t (1 - t) is 0 only for t = 0 and t = 1, also among NaN and inf. It is computed on parts that
    # fit into the cache and read as integers, whose minimum and maximum are found faster.
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[targets.element_size()]
    for part in torch.split(targets.flatten(), 2**15):
        if any(int(end) for end in (1 - part).mul_(part).view(integers).aminmax()):
            break
    else:
        return True
    good = (targets == 0) | (targets == 1) | (targets == ignore_index)
    if not bool(good.all()):
        got = f"{float(targets[~good][0]):.4g}"
        fix = "threshold soft targets, and weight them by uncertainty"
        raise ValueError(message(where, f"targets 0, 1 or {ignore_index} (ignore_index)", got, fix))
    return False


def _check_logits(where: str, logits: Tensor) -> None:
    check_probs(where, logits, name="logits")
    if logits.ndim != 4:
        expected, fix = "logits [B, 1, H, W] or [B, K, H, W]", "add the batch axis"
        raise ValueError(message(where, expected, shape(logits), fix))


def _check_plane(where: str, values: Tensor, other: Tensor, name: str, reference: str) -> None:
    """One value per pixel, with or without a channel axis; no broadcasting."""
    planes = other.shape if other.ndim == 3 else (other.shape[0], *other.shape[2:])
    flat = tuple(planes)
    if values.shape not in (flat, (flat[0], 1, *flat[1:])):
        expected = f"{name} {list(flat)} or {[flat[0], 1, *flat[1:]]} for {reference}"
        fix = "pass one map per sample, at the size of the logits"
        raise ValueError(message(where, f"{expected} {shape(other)}", shape(values), fix))
    check_same_device(where, values, other, name=name, reference=reference)


def _check_weight(where: str, values: Tensor, other: Tensor, name: str) -> None:
    """A float map in [0, 1]; its values are checked on a CPU."""
    check_float(where, values, name=name)
    _check_plane(where, values, other, name, "logits" if other.ndim == 4 else "pseudo_labels")
    if _checks_values(values):
        check_unit_interval(where, values.detach(), name=name, fix=_WEIGHT_FIXES[name])


def _check_dice(where: str, certainty_threshold: float, smooth: float) -> None:
    if not is_number(certainty_threshold, 0, 1) or certainty_threshold == 1:
        expected, fix = "certainty_threshold in [0, 1)", "the paper uses 0.6"
        raise ValueError(message(where, expected, short(certainty_threshold), fix))
    if not is_number(smooth, 0, _MOST_SMOOTH):
        fix = f"the published code uses 1, and {_MOST_SMOOTH:g} is the most"
        raise ValueError(message(where, "smooth >= 0", short(smooth), fix))


def _check_gamma(where: str, gamma: float) -> float:
    if not is_number(gamma, 0, _MOST_GAMMA):
        fix = f"the paper uses 2, and {_MOST_GAMMA:g} is the most"
        raise ValueError(message(where, "gamma >= 0", short(gamma), fix))
    return float(gamma)


def _check_balance(
    where: str, balance: float | Tensor | None, logits: Tensor
) -> float | Tensor | None:
    num_classes = logits.shape[1]
    if isinstance(balance, Tensor):
        if num_classes == 1 or balance.shape != (num_classes,):
            expected = "a number" if num_classes == 1 else f"balance [{num_classes}] or a number"
            got, fix = f"balance {shape(balance)}", "pass one weight per class"
            raise ValueError(message(where, expected, got, fix))
        if not balance.is_floating_point():
            check_integer(where, balance, name="balance")
        check_same_device(where, balance, logits, name="balance", reference="logits")
        return balance.detach()
    if balance is None:
        return None
    if not is_number(balance, 0, 1):
        raise ValueError(message(where, "balance in [0, 1]", short(balance), "the paper uses 0.25"))
    return float(balance)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.to(torch.float32)


def _checks_values(tensor: Tensor) -> bool:
    """Whether values can be checked without waiting for a device and without breaking a trace."""
    return tensor.device.type == "cpu" and not is_compiling()
