"""The best class of every pixel, in one pass: three ways, one for each kind of machine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cpseg._internal.checks import is_compiling

_TILE = 2**21  # probabilities that a step on the CPU holds in cache


def class_dtype(num_classes: int) -> torch.dtype:
    """The smallest dtype of a class index: uint8, int16 above 255 classes, int32 above 32,768."""
    if num_classes <= 255:
        return torch.uint8
    return torch.int16 if num_classes <= 2**15 else torch.int32


def best_of_classes(
    probs: Tensor, background: int | None, threshold: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Largest score besides the background, and the lowest class that has it.

    With a threshold per class ``[K, H, W]``, among the classes inside theirs: -inf where none is.
    A NaN among the scores makes the result NaN.

    Args:
        probs: float ``[B, K, H, W]``.
        background: a class to leave out, or None.
        threshold: float32 ``[K, H, W]`` or None.

    Returns:
        Score, in the dtype of ``probs``, and class index, of any dtype, ``[B, H, W]`` each.
    """
    if is_compiling():
        return _compiled(probs, background, threshold)
    if probs.device.type == "cpu":
        return _tiled(probs, background, threshold)
    return _by_index(probs, background, threshold)


def _spans(num_classes: int, background: int | None) -> Iterator[slice]:
    """The classes before and behind the background."""
    if background is None:
        yield slice(0, num_classes)
        return
    if background > 0:
        yield slice(0, background)
    if background < num_classes - 1:
        yield slice(background + 1, num_classes)


def _masked(probs: Tensor, threshold: Tensor | None) -> Tensor:
    """``probs`` where the class is inside its threshold, -inf elsewhere; NaN stays."""
    if threshold is None:
        return probs
    outside = (1 - probs.to(torch.float32) > threshold) | threshold.isnan()
    return torch.where(outside, -torch.inf, probs)


def _tiled(
    probs: Tensor, background: int | None, threshold: Tensor | None
) -> tuple[Tensor, Tensor]:
    """On the CPU: the largest value of a tile in cache, then where it stands.

    ``max`` with indices reads class after class without vector instructions. A vectorised
    ``amax``, an equality pass over the tile still in cache and an ``amax`` over bytes cost a third.
    """
    batch, num_classes, height, width = probs.shape
    code_dtype = class_dtype(num_classes)
    top = torch.iinfo(code_dtype).max
    # The lowest class has the largest code, so that ties go to it.
    codes = torch.arange(top, top - num_classes, -1).to(code_dtype).reshape(-1, 1, 1)
    if background is not None:
        codes[background] = 0
    best = probs.new_empty(batch, height, width)
    code = torch.empty(batch, height, width, dtype=code_dtype)
    spans = list(_spans(num_classes, background))
    step = max(1, _TILE // (num_classes * width))
    for image in range(batch):
        for row in range(0, height, step):
            rows = slice(row, row + step)
            limit = threshold if threshold is None else threshold[:, rows]
            tile = _masked(probs[image, :, rows], limit)
            found = best[image, rows]
            torch.amax(tile[spans[0]], 0, out=found)
            for span in spans[1:]:
                torch.maximum(found, tile[span].amax(0), out=found)
            equal = torch.eq(tile, found)
            # A bool is one byte, 0 or 1.
            equal = equal.view(torch.uint8) if top == 255 else equal.to(code_dtype)
            torch.amax(equal.mul_(codes), 0, out=code[image, rows])
    return best, (top - code).clamp_(max=num_classes - 1)


def _by_index(
    probs: Tensor, background: int | None, threshold: Tensor | None
) -> tuple[Tensor, Tensor]:
    """On an accelerator: ``max`` with indices is one pass there."""
    probs = _masked(probs, threshold)
    pairs = []
    for span in _spans(probs.shape[1], background):
        value, index = probs[:, span].max(1)
        pairs.append((value, index + span.start))
    best, best_class = pairs[0]
    for value, index in pairs[1:]:
        behind = (value > best) | value.isnan()
        best, best_class = torch.where(behind, value, best), torch.where(behind, index, best_class)
    return best, best_class


def _compiled(
    probs: Tensor, background: int | None, threshold: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For ``torch.compile``: reductions that it fuses into one pass and vectorises.

    On the CPU a kernel that reads every class of a pixel before the next pixel defeats the
    prefetcher, so classes are reduced in about sqrt(K) groups of as many. Indices are float32: they
    stay vectors.
    """
    if probs.device.type != "cpu":
        return _by_index(probs, background, threshold)
    batch, num_classes, height, width = probs.shape
    index = torch.arange(num_classes, dtype=torch.float32).reshape(1, -1, 1, 1)
    values = _masked(probs, threshold)
    if background is not None:
        values = torch.where(index == background, -torch.inf, values)
    last = float(num_classes - 1)
    side = round(num_classes**0.5)
    whole = num_classes // side * side
    parted = values[:, :whole].reshape(batch, -1, side, height, width)
    inner = _first_max(parted, index[:, :whole].reshape(1, -1, side, 1, 1), last, dim=2)
    best, best_class = _first_max(*inner, last)
    if whole < num_classes:
        value, place = _first_max(values[:, whole:], index[:, whole:], last)
        behind = (value > best) | value.isnan()
        best, best_class = torch.where(behind, value, best), torch.where(behind, place, best_class)
    return best, best_class


def _first_max(values: Tensor, index: Tensor, last: float, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Largest value and the lowest index that has it, at most ``last`` (where it is NaN)."""
    best = values.amax(dim)
    return best, torch.where(values == best.unsqueeze(dim), index, last).amin(dim)
