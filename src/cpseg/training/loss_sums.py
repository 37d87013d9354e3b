"""The sums that focal and Dice loss are made of, one a sample.

With the logit z of a pixel, its target y in {0, 1} and s = 1 - 2y, the probability of the other
value is q = sigma(s z), that of the target p_t = 1 - q, and -log p_t = log(1 + exp(s z)), neither
with overflow. The focal term is -a q^gamma log p_t. For Dice, y p = y p_t and y + p = 2 y p_t + q.
The binary sums have a derivative written out, so that an eager loss reads its data once forward and
once backward, in tiles that stay in the cache; where it is traced, or differentiated twice, the
formula itself is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softplus

from cpseg._internal.checks import is_compiling

_TILE = 2**17  # pixels of a step on the CPU
# Weight of a class (None: 1), gamma, certainty threshold, value of void pixels, and whether all
# values are known to be good and no pixel void.
Settings = tuple[Any, float, float, int, bool]


def binary_sums(
    logits: Tensor, targets: Tensor, uncertainty: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the pixels of a sample: focal terms, y p and y + p, ``[B]`` each.

    Args:
        logits: float32 or float64 ``[B, N]``.
        targets: 0, 1 or the void value, any dtype, ``[B, N]``.
        uncertainty: in [0, 1], float, ``[B, N]``; None is 0 everywhere.
        settings: see ``Settings``. Values that are not known to be good give NaN if they are bad.
    """
    if is_compiling():
        return _formula(logits, targets, uncertainty, settings)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        sums = _BinarySums.forward(logits, targets, uncertainty, settings)
    else:
        arguments = (logits, targets, uncertainty, settings)
        sums = _BinarySums.apply(*arguments)  # type: ignore[no-untyped-call]
    return sums[0], sums[1], sums[2]


def class_sums(
    logits: Tensor, targets: Tensor, uncertainty: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for softmax over K classes: focal ``[B]``, the others ``[B, K]``, a class each.

    ``logits`` is ``[B, K, N]``, the others are ``[B, N]``.
    """
    balance, gamma, threshold, void_value, trusted = settings
    num_classes = logits.shape[1]
    label = targets.to(torch.int64)
    certainty = logits.new_ones(label.shape)
    if uncertainty is not None:
        certainty = 1 - uncertainty.detach().to(logits.dtype)
    if not trusted:
        void = label == void_value
        bad = ~void & ((label < 0) | (label >= num_classes))
        certainty = _good(certainty).masked_fill(bad, torch.nan).masked_fill(void, 0)
        label = label.masked_fill(void | bad, 0)
    silent = (certainty == 0).unsqueeze(1)
    log_p = log_softmax(logits.masked_fill(silent, 0), dim=1)
    log_true = log_p.gather(1, label.unsqueeze(1)).squeeze(1)
    weight = certainty
    if isinstance(balance, Tensor):
        weight = weight * balance.to(logits)[label]
    elif balance is not None:
        weight = weight * balance
    focal = -log_true * _power(-torch.expm1(log_true), gamma) * weight
    classes = torch.arange(num_classes, device=label.device)
    kept = _kept(certainty, uncertainty is not None, threshold).unsqueeze(1)
    p = log_p.exp() * kept
    y = (label.unsqueeze(1) == classes[:, None]) * kept
    return focal.sum(1), (y * p).sum(2), (y + p).sum(2)


def _formula(
    logits: Tensor, targets: Tensor, uncertainty: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """The binary sums as they are defined; autograd differentiates them."""
    balance, gamma = settings[:2]
    other, y, _, certainty, kept = _pixels(logits, targets, uncertainty, settings)
    q = other.sigmoid()
    focal = _softplus(other) * _power(q, gamma)
    overlap = y * (1 - q)
    if balance is not None:
        focal = focal * _class_weight(y, balance)
    if certainty is not None:
        focal = focal * certainty
    if kept is not None:
        overlap, q = overlap * kept, q * kept
    overlap = overlap.sum(1)
    return focal.sum(1), overlap, 2 * overlap + q.sum(1)


class _BinarySums(torch.autograd.Function):
    """The formula and, on the way, what its derivative needs: no transcendental function twice.

    By the chain rule a logit's slope is ``focal_slope`` times the first incoming gradient, plus
    ``p_slope = dp/dz`` times (y times the second plus the third).
    """

    @staticmethod
    def forward(
        logits: Tensor, targets: Tensor, uncertainty: Tensor | None, settings: Settings
    ) -> tuple[Tensor, ...]:
        sums = logits.new_zeros(3, len(logits))
        slopes = logits.new_empty(2, *logits.shape)
        for tile in _tiles(logits):
            part = None if uncertainty is None else uncertainty[tile]
            found = _tile(logits[tile], targets[tile], part, settings, slopes[:, tile[0], tile[1]])
            for total, value in zip(sums, found, strict=True):
                total[tile[0]] += value
        return (*sums.unbind(), *slopes.unbind())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        logits, targets, uncertainty, ctx.settings = inputs
        ctx.save_for_backward(logits, targets, uncertainty, *output[3:])
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)  # zeros for the slopes would be as large as they are

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits, targets, uncertainty, focal_slope, p_slope = ctx.saved_tensors
        grads = [logits.new_zeros(len(logits)) if g is None else g for g in incoming[:3]]
        if torch.is_grad_enabled():  # the gradient is itself to be differentiated
            found = _formula(logits, targets, uncertainty, ctx.settings)
            (slope,) = torch.autograd.grad(found, logits, grads, create_graph=True)
            return slope, None, None, None
        slope = torch.empty_like(logits)
        for tile in _tiles(logits):
            focal, overlap, mass = (grad[tile[0]].unsqueeze(1) for grad in grads)
            y = _targets(targets[tile], logits.dtype, ctx.settings)
            part = slope[tile]
            torch.mul(y, overlap, out=part).add_(mass).mul_(p_slope[tile])
            part.addcmul_(focal_slope[tile], focal.expand_as(part))
        return slope, None, None, None


def _tile(
    logits: Tensor,
    targets: Tensor,
    uncertainty: Tensor | None,
    settings: Settings,
    slopes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of a tile; writes the slopes of its focal term and of p."""
    balance, gamma = settings[:2]
    other, y, sign, certainty, kept = _pixels(logits, targets, uncertainty, settings)
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
    z: Tensor, targets: Tensor, uncertainty: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The product s z, target, s, certainty and what Dice keeps; the last two None if all 1."""
    threshold, void_value, trusted = settings[2:]
    y = _targets(targets, z.dtype, settings)
    certainty = None if uncertainty is None else 1 - uncertainty.detach().to(z.dtype)
    if not trusted:
        void = targets == void_value
        z = z.masked_fill(void, 0)
        certainty = torch.ones_like(y) if certainty is None else _good(certainty)
        certainty = certainty.masked_fill(void, 0)
    kept = None
    if certainty is not None:
        kept = _kept(certainty, uncertainty is not None, threshold)
    sign = torch.add(y.new_full((), 1), y, alpha=-2)
    return sign * z, y, sign, certainty, kept


def _softplus(other: Tensor) -> Tensor:
    """``log(1 + exp(x))``, bounded, so that an infinite logit counts nothing at certainty 0."""
    # Above the threshold it is x itself, to the last digit.
    threshold = 40.0 if other.dtype == torch.float64 else 20.0
    return softplus(other, threshold=threshold).clamp_(max=torch.finfo(other.dtype).max)


def _targets(targets: Tensor, dtype: torch.dtype, settings: Settings) -> Tensor:
    """Targets as numbers, 0 where void and NaN where they are neither."""
    y = targets.to(dtype)
    if settings[4]:
        return y
    void = targets == settings[3]
    return torch.where((y == 0) | (y == 1) | void, y, torch.nan).masked_fill(void, 0)


def _kept(certainty: Tensor, uncertain: bool, threshold: float) -> Tensor:
    """What the indicator of eq. 2 keeps; void pixels have certainty 0."""
    return certainty.clone().gt_(threshold if uncertain else 0)  # 1 and 0, without a bool between


def _good(certainty: Tensor) -> Tensor:
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
    """Rows and columns of steps that stay in the cache; all at once but on a CPU."""
    samples, pixels = logits.shape
    limit = _TILE if logits.device.type == "cpu" else logits.numel()
    across = min(pixels, limit)
    down = max(1, limit // across)
    for row in range(0, samples, down):
        for column in range(0, pixels, across):
            yield slice(row, row + down), slice(column, column + across)
