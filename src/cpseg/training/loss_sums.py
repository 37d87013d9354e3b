"""The sums per sample from which focal and Dice loss are computed.

With the logit z of a pixel, its target y in {0, 1} and s = 1 - 2y, the probability of the other
value is q = sigma(s z), that of the target is p_t = 1 - q, and -log p_t = log(1 + exp(s z)). None
of these overflows. The focal term is -a q^gamma log p_t. For Dice, y p = y p_t and
y + p = 2 y p_t + q.

The derivative of the binary sums is written by hand, so that an eager loss reads its data once
forward and once backward, in tiles that fit into the cache. Where the loss is traced or
differentiated twice, autograd differentiates the plain formula instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softplus

from cpseg._internal.checks import is_compiling

_TILE = 2**17  # pixels per step on the CPU


class LossRule(NamedTuple):
    """How focal and Dice loss treat a pixel.

    Attributes:
        balance: weight of the classes, see :func:`cpseg.focal_loss`; None is 1.
        gamma: exponent of the focal loss.
        certainty_threshold: Dice keeps a pixel whose certainty is above it.
        void: the target value of void pixels.
        trusted: all values are known to be valid and no pixel is void.
    """

    balance: Any = None
    gamma: float = 2.0
    certainty_threshold: float = 0.0
    void: int = 255
    trusted: bool = False


def binary_sums(
    logits: Tensor, targets: Tensor, uncertainty: Tensor | None, rule: LossRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the pixels of each sample: focal terms, y p and y + p, ``[B]`` each.

    Args:
        logits: float32 or float64 ``[B, N]``.
        targets: 0, 1 or the void value, any dtype, ``[B, N]``.
        uncertainty: in [0, 1], float, ``[B, N]``; None is 0 everywhere.
        rule: what is computed. Unless it trusts the values, invalid ones make the sums NaN.
    """
    if is_compiling():
        return _formula(logits, targets, uncertainty, rule)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        sums = _BinarySums.forward(logits, targets, uncertainty, rule)
    else:
        arguments = (logits, targets, uncertainty, rule)
        sums = _BinarySums.apply(*arguments)  # type: ignore[no-untyped-call]
    return sums[0], sums[1], sums[2]


def class_sums(
    logits: Tensor, targets: Tensor, uncertainty: Tensor | None, rule: LossRule
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for softmax over K classes: focal ``[B]``, the others per class, ``[B, K]``.

    ``logits`` is ``[B, K, N]``, the others are ``[B, N]``.
    """
    num_classes = logits.shape[1]
    label = targets.to(torch.int64)
    certainty = logits.new_ones(label.shape)
    if uncertainty is not None:
        certainty = 1 - uncertainty.detach().to(logits.dtype)
    if not rule.trusted:
        void = label == rule.void
        bad = ~void & ((label < 0) | (label >= num_classes))
        certainty = _nan_if_invalid(certainty).masked_fill(bad, torch.nan).masked_fill(void, 0)
        label = label.masked_fill(void | bad, 0)
    silent = (certainty == 0).unsqueeze(1)
    log_p = log_softmax(logits.masked_fill(silent, 0), dim=1)
    log_true = log_p.gather(1, label.unsqueeze(1)).squeeze(1)
    weight = certainty
    if isinstance(rule.balance, Tensor):
        weight = weight * rule.balance.to(logits)[label]
    elif rule.balance is not None:
        weight = weight * rule.balance
    focal = -log_true * _power(-torch.expm1(log_true), rule.gamma) * weight
    classes = torch.arange(num_classes, device=label.device)
    kept = _kept(certainty, uncertainty is not None, rule).unsqueeze(1)
    p = log_p.exp() * kept
    y = (label.unsqueeze(1) == classes[:, None]) * kept
    return focal.sum(1), (y * p).sum(2), (y + p).sum(2)


def _formula(
    logits: Tensor, targets: Tensor, uncertainty: Tensor | None, rule: LossRule
) -> tuple[Tensor, Tensor, Tensor]:
    """The binary sums by their definition, for autograd to differentiate."""
    other, y, _, certainty, kept = _pixels(logits, targets, uncertainty, rule)
    q = other.sigmoid()
    focal = _softplus(other) * _power(q, rule.gamma)
    overlap = y * (1 - q)
    if rule.balance is not None:
        focal = focal * _class_weight(y, rule.balance)
    if certainty is not None:
        focal = focal * certainty
    if kept is not None:
        overlap, q = overlap * kept, q * kept
    overlap = overlap.sum(1)
    return focal.sum(1), overlap, 2 * overlap + q.sum(1)


class _BinarySums(torch.autograd.Function):
    """The formula with its derivative; each transcendental function is computed only once.

    By the chain rule the gradient of a logit is ``focal_slope`` times the first incoming gradient,
    plus ``p_slope = dp/dz`` times (y times the second plus the third).
    """

    @staticmethod
    def forward(
        logits: Tensor, targets: Tensor, uncertainty: Tensor | None, rule: LossRule
    ) -> tuple[Tensor, ...]:
        sums = logits.new_zeros(3, len(logits))
        slopes = logits.new_empty(2, *logits.shape)
        for tile in _tiles(logits):
            unsure = None if uncertainty is None else uncertainty[tile]
            tile_sums = _tile(
                logits[tile], targets[tile], unsure, rule, slopes[:, tile[0], tile[1]]
            )
            for total, value in zip(sums, tile_sums, strict=True):
                total[tile[0]] += value
        return (*sums.unbind(), *slopes.unbind())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        logits, targets, uncertainty, ctx.rule = inputs
        ctx.save_for_backward(logits, targets, uncertainty, *output[3:])
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)  # zeros for the slopes would take as much memory

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits, targets, uncertainty, focal_slope, p_slope = ctx.saved_tensors
        grads = [logits.new_zeros(len(logits)) if g is None else g for g in incoming[:3]]
        if torch.is_grad_enabled():  # the gradient will itself be differentiated
            sums = _formula(logits, targets, uncertainty, ctx.rule)
            (slope,) = torch.autograd.grad(sums, logits, grads, create_graph=True)
            return slope, None, None, None
        slope = torch.empty_like(logits)
        for tile in _tiles(logits):
            focal, overlap, mass = (grad[tile[0]].unsqueeze(1) for grad in grads)
            y = _targets(targets[tile], logits.dtype, ctx.rule)
            tile_slope = slope[tile]
            torch.mul(y, overlap, out=tile_slope).add_(mass).mul_(p_slope[tile])
            tile_slope.addcmul_(focal_slope[tile], focal.expand_as(tile_slope))
        return slope, None, None, None


def _tile(
    logits: Tensor,
    targets: Tensor,
    uncertainty: Tensor | None,
    rule: LossRule,
    slopes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of one tile; writes the slopes of its focal term and of p to ``slopes``."""
    balance, gamma = rule.balance, rule.gamma
    other, y, sign, certainty, kept = _pixels(logits, targets, uncertainty, rule)
    surprise = _softplus(other)
    q = other.sigmoid()
    true = 1 - q
    weight = _power(q, gamma)
    if balance is not None:
        weight = _class_weight(y, balance).mul_(weight)
    if certainty is not None:
        weight = certainty.mul_(weight)
    # d/dz of -a q^gamma log p_t is s a q^gamma (q - gamma p_t log p_t).
    torch.addcmul(q, true, surprise, value=gamma, out=slopes[0]).mul_(sign).mul_(weight)
    focal = surprise.mul_(weight).sum(1)
    overlap = true * y
    if kept is not None:
        overlap.mul_(kept)
        q.mul_(kept)
    torch.mul(true, q, out=slopes[1])  # dp/dz = p (1 - p) = p_t q
    overlap = overlap.sum(1)
    return focal, overlap, 2 * overlap + q.sum(1)


def _pixels(
    z: Tensor, targets: Tensor, uncertainty: Tensor | None, rule: LossRule
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Per pixel: s z, target, s, certainty, and 1 where Dice keeps it; None where all are 1."""
    y = _targets(targets, z.dtype, rule)
    certainty = None if uncertainty is None else 1 - uncertainty.detach().to(z.dtype)
    if not rule.trusted:
        void = targets == rule.void
        z = z.masked_fill(void, 0)
        certainty = torch.ones_like(y) if certainty is None else _nan_if_invalid(certainty)
        certainty = certainty.masked_fill(void, 0)
    kept = None
    if certainty is not None:
        kept = _kept(certainty, uncertainty is not None, rule)
    sign = torch.add(y.new_full((), 1), y, alpha=-2)
    return sign * z, y, sign, certainty, kept


def _softplus(other: Tensor) -> Tensor:
    """``log(1 + exp(x))``, bounded, so that an infinite logit times certainty 0 is 0, not NaN."""
    # Above this threshold the result equals x to the last digit.
    threshold = 40.0 if other.dtype == torch.float64 else 20.0
    return softplus(other, threshold=threshold).clamp_(max=torch.finfo(other.dtype).max)


def _targets(targets: Tensor, dtype: torch.dtype, rule: LossRule) -> Tensor:
    """Targets as floats: 0 where void, NaN where invalid."""
    y = targets.to(dtype)
    if rule.trusted:
        return y
    void = targets == rule.void
    return torch.where((y == 0) | (y == 1) | void, y, torch.nan).masked_fill(void, 0)


def _kept(certainty: Tensor, uncertain: bool, rule: LossRule) -> Tensor:
    """The indicator of eq. 2 as 1 or 0; void pixels have certainty 0."""
    # In place, so that no bool tensor is made and converted.
    return certainty.clone().gt_(rule.certainty_threshold if uncertain else 0)


def _nan_if_invalid(certainty: Tensor) -> Tensor:
    return torch.where((certainty >= 0) & (certainty <= 1), certainty, torch.nan)


def _class_weight(y: Tensor, balance: float) -> Tensor:
    """``balance`` where y is 1, ``1 - balance`` where it is 0."""
    return torch.add(y.new_full((), 1 - balance), y, alpha=2 * balance - 1)


def _power(q: Tensor, gamma: float) -> Tensor:
    if gamma == 2:
        return q * q
    if gamma < 1:  # the slope at 0 is infinite
        q = q.clamp(min=torch.finfo(q.dtype).tiny)
    return q**gamma


def _tiles(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of tiles that fit into the cache; a single tile unless on a CPU."""
    samples, pixels = logits.shape
    limit = _TILE if logits.device.type == "cpu" else logits.numel()
    across = min(pixels, limit)
    down = max(1, limit // across)
    for row in range(0, samples, down):
        for column in range(0, pixels, across):
            yield slice(row, row + down), slice(column, column + across)
