"""The best class of every pixel, in one pass: three ways, one for each kind of machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cpseg._internal.checks import is_compiling
from cpseg._internal.threads import shared

_CACHED = 2**18  # probabilities that a step on the CPU reads, and then finds in the cache
_BAND = 2**16  # pixels whose labels are made at once
_FEW = 8  # classes that a compiled kernel reads at once, without groups
_LEAST_FOR_A_THREAD = 2**20  # probabilities; a thread for fewer is not worth waking


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


class Tile(NamedTuple):
    """Rows of an image whose best classes are found.

    Attributes:
        image: number of the image in the batch.
        rows: of the image.
        best: the largest score ``[h, W]``, float32 (float64 of float64); its memory is used again.
        best_class: the lowest class that has it, K where the score is NaN, as a float of the same
            kind; likewise.
    """

    image: int
    rows: slice
    best: Tensor
    best_class: Tensor


def for_each_tile(
    probs: Tensor,
    background: int | None,
    threshold: Tensor | None,
    take: Callable[[Tile], None],
) -> None:
    """On the CPU: :func:`best_of_classes` for tiles that stay in the cache, in some threads.

    ``max`` with indices reads class after class without vector instructions, and so does a
    comparison that writes bytes. One that writes floats does not: 1 where a score is the largest,
    times a negative code, the class less K, has the lowest such class as its minimum.

    Args:
        probs: float ``[B, K, H, W]`` on the CPU.
        background: a class to leave out, or None.
        threshold: float32 ``[K, H, W]`` or None.
        take: called once for every tile, in any order, in several threads at a time.
    """
    batch, num_classes, height, width = probs.shape
    kind = torch.promote_types(probs.dtype, torch.float32)
    threads = max(1, min(torch.get_num_threads(), probs.numel() // _LEAST_FOR_A_THREAD))
    step = max(1, _CACHED // (num_classes * width))
    band = step * max(1, min(_BAND, batch * height * width // threads) // (step * width))
    step, band = min(step, height), min(band, height)
    first, *others = _spans(num_classes, background)
    if not others:  # the background is at an end, or there is none
        probs = probs[:, first]
    codes = torch.arange(-num_classes, 0, dtype=kind, device=probs.device).reshape(-1, 1, 1)
    codes = codes if others else codes[first]
    if others and background is not None:
        codes[background] = 0
    channels_last = probs.stride(1) == 1 and probs.stride(3) == num_classes > 1
    as_it_is = probs.dtype == kind
    if threshold is not None:
        limits = threshold if others else threshold[first]

    def largest(values: Tensor, out: Tensor) -> None:
        if not others:
            torch.amax(values, 0, out=out)
            return
        torch.amax(values[first], 0, out=out)
        for span in others:
            torch.maximum(out, values[span].amax(0), out=out)

    def work(places: Iterator[tuple[int, int]]) -> None:
        if channels_last:
            room = probs.new_empty(2, step, width, len(codes), dtype=kind).movedim(-1, 1)
        else:
            room = probs.new_empty(2, len(codes), step, width, dtype=kind)
        scores, equal = room
        found = probs.new_empty(2, band, width, dtype=kind)
        for image, row in places:
            rows = slice(row, min(row + band, height))
            values, (best, code) = probs[image, :, rows], found[:, : rows.stop - row]
            parts = values.split(step, 1), best.split(step), code.split(step)  # type: ignore[no-untyped-call]
            for number, (part, part_best, part_code) in enumerate(zip(*parts, strict=True)):
                lines = part.shape[1]
                part_equal = equal if lines == step else equal[:, :lines]
                if threshold is not None:
                    start = row + number * step
                    part = _masked(part, limits[:, start : start + lines])
                if not as_it_is:
                    part = (scores if lines == step else scores[:, :lines]).copy_(part)
                largest(part, part_best)
                torch.eq(part, part_best, out=part_equal)
                torch.amin(part_equal.mul_(codes), 0, out=part_code)
            # A NaN equals nothing, itself included: it has code 0.
            take(Tile(image, rows, best, code.add_(num_classes)))

    shared(work, itertools.product(range(batch), range(0, height, band)), threads)


def _tiled(
    probs: Tensor, background: int | None, threshold: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, num_classes, height, width = probs.shape
    best = probs.new_empty(batch, height, width)
    best_class = probs.new_empty(batch, height, width, dtype=class_dtype(num_classes))

    def take(tile: Tile) -> None:
        best[tile.image, tile.rows] = tile.best
        best_class[tile.image, tile.rows] = tile.best_class.clamp_(max=num_classes - 1)

    for_each_tile(probs, background, threshold, take)
    return best, best_class


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
    batch, _, height, width = probs.shape
    num_classes = len([None for _ in range(probs.shape[1])])  # a number to the compiler, no symbol
    index = torch.arange(num_classes, dtype=torch.float32).reshape(1, -1, 1, 1)
    values = _masked(probs, threshold)
    if background is not None:
        values = torch.where(index == background, -torch.inf, values)
    last = float(num_classes - 1)
    if num_classes <= _FEW:
        return _first_max(values, index, last)
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
