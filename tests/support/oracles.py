"""Naive loops that share no code with cpseg. Slow, literal, and meant to be read beside a paper."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
from scipy import ndimage

Array = np.ndarray[Any, Any]
INFINITY = np.float32(np.inf)


def lac(p: float) -> np.float32:
    """The score of ConformalSAM eq. 3, in float32."""
    return np.float32(1) - np.float32(p)


# --- quantiles ---------------------------------------------------------------------------------


def rank(n: int, alpha: str) -> int:
    """ceil((n + 1)(1 - alpha)) in decimal arithmetic, alpha as written."""
    with localcontext() as context:
        context.prec = 400
        return math.ceil((n + 1) * (1 - Decimal(alpha)))


def quantile(scores: Iterable[float], alpha: str) -> float:
    """The conformal quantile by sorting a list; NaN scores do not count."""
    ordered = sorted(score for score in scores if not math.isnan(score))
    place = rank(len(ordered), alpha)
    return math.inf if place > len(ordered) else ordered[place - 1]


# --- geometry ----------------------------------------------------------------------------------


def cell_of(pixel: int, pixels: int, cells: int) -> int:
    """The cell of the grid that a pixel of the image belongs to, along one axis."""
    return math.floor(pixel * cells / pixels)


def pixel_for(cell: int, pixels: int, cells: int) -> int:
    """The first pixel whose cell is not before ``cell``; the last pixel where there is none."""
    for pixel in range(pixels):
        if cell_of(pixel, pixels, cells) >= cell:
            return pixel
    return pixels - 1


def grid_from_image(values: Array, size: tuple[int, int]) -> Array:
    """A map of an image at the cells of the grid."""
    result = np.empty(size, values.dtype)
    for a in range(size[0]):
        for b in range(size[1]):
            i, j = pixel_for(a, values.shape[0], size[0]), pixel_for(b, values.shape[1], size[1])
            result[a, b] = values[i, j]
    return result


def image_from_grid(values: Array, size: tuple[int, int]) -> Array:
    """A map of the grid at the pixels of an image."""
    result = np.empty((*values.shape[:-2], *size), values.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            a, b = cell_of(i, size[0], values.shape[-2]), cell_of(j, size[1], values.shape[-1])
            result[..., i, j] = values[..., a, b]
    return result


# --- calibration -------------------------------------------------------------------------------


def score_map(probs: Array, labels: Array, void: int) -> Array:
    """Scores of one image: probs ``[K, h, w]``, labels ``[h, w]``; NaN where void."""
    result = np.empty(labels.shape, np.float32)
    for i in range(labels.shape[0]):
        for j in range(labels.shape[1]):
            y = int(labels[i, j])
            result[i, j] = np.nan if y == void else lac(probs[y, i, j])
    return result


def calibrate(
    images: Sequence[tuple[Array, Array]],
    groups: Array,
    alpha: str,
    *,
    num_classes: int | None = None,
    void: int = 255,
) -> tuple[Array, Array]:
    """Thresholds and counts over (probs, labels) pairs; per class if ``num_classes`` is given."""
    pools: dict[tuple[int, int], list[float]] = {}
    for probs, labels in images:
        scores = grid_from_image(score_map(probs, labels, void), groups.shape)
        classes = grid_from_image(labels, groups.shape)
        for a in range(groups.shape[0]):
            for b in range(groups.shape[1]):
                if not np.isnan(scores[a, b]):
                    layer = 0 if num_classes is None else int(classes[a, b])
                    pools.setdefault((layer, int(groups[a, b])), []).append(float(scores[a, b]))
    layers = 1 if num_classes is None else num_classes
    threshold = np.empty((layers, *groups.shape), np.float32)
    count = np.zeros((layers, *groups.shape), np.int64)
    for k in range(layers):
        for a in range(groups.shape[0]):
            for b in range(groups.shape[1]):
                pool = pools.get((k, int(groups[a, b])), [])
                threshold[k, a, b], count[k, a, b] = quantile(pool, alpha), len(pool)
    if num_classes is None:
        return threshold[0], count[0]
    return threshold, count


# --- selection ---------------------------------------------------------------------------------


def in_set(p: float, threshold: np.float32) -> bool:
    """Membership by the float32 score; a NaN is in no set."""
    return bool(lac(p) <= threshold)


def threshold_at(threshold: Array, k: int, i: int, j: int) -> np.float32:
    """One number from ``[]``, ``[H, W]`` or ``[K, H, W]``."""
    at = {0: (), 2: (i, j), 3: (k, i, j)}[threshold.ndim]
    return np.float32(threshold[at])


def sets(probs: Array, threshold: Array) -> Array:
    """Prediction sets of one image, bool ``[K, H, W]``."""
    result = np.zeros(probs.shape, bool)
    for k, i, j in np.ndindex(*probs.shape):
        result[k, i, j] = in_set(probs[k, i, j], threshold_at(threshold, k, i, j))
    return result


def select(probs: Array, threshold: Array, background: int | None, ignore: int = 255) -> Array:
    """ConformalSAM eq. 4 for one image, ``[K, H, W]``, case by case."""
    inside = sets(probs, threshold)
    num_classes, height, width = probs.shape
    result = np.full((height, width), ignore, np.int64)
    for i in range(height):
        for j in range(width):
            members = [k for k in range(num_classes) if inside[k, i, j]]
            if any(math.isnan(probs[k, i, j]) for k in range(num_classes)) or not members:
                continue
            others = [k for k in members if k != background]
            if not others:
                result[i, j] = background
                continue
            best = others[0]
            for k in others[1:]:
                if probs[k, i, j] > probs[best, i, j]:
                    best = k
            result[i, j] = best
    return result


# --- metrics -----------------------------------------------------------------------------------


def confusion(predictions: Array, labels: Array, num_classes: int, ignore: int) -> Array:
    """``[K, K + 1]``; the last column counts pixels left without a label."""
    pairs = Counter(zip(labels.ravel().tolist(), predictions.ravel().tolist(), strict=True))
    result = np.zeros((num_classes, num_classes + 1), np.int64)
    for (truth, guess), number in pairs.items():
        if truth != ignore:
            result[truth, num_classes if guess == ignore else guess] += number
    return result


def iou(
    predictions: Array, labels: Array, num_classes: int, ignore: int, *, with_ignored: bool
) -> list[float]:
    """IoU of every class over the pixels with a truth, NaN where the class is nowhere."""
    result = []
    for k in range(num_classes):
        both = either = 0
        pairs = zip(predictions.ravel().tolist(), labels.ravel().tolist(), strict=True)
        for guess, truth in pairs:
            if truth == ignore or (guess == ignore and not with_ignored):
                continue
            both += guess == k and truth == k
            either += guess == k or truth == k
        result.append(both / either if either else math.nan)
    return result


def band(mask: Array, ratio: float) -> Array:
    """Boundary band of one mask as published: what ``d`` erosions by 3x3 take away."""
    diagonal = math.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2)
    steps = max(1, round(ratio * diagonal))
    padded = np.pad(mask, 1, constant_values=False)
    eroded = ndimage.binary_erosion(padded, np.ones((3, 3), bool), iterations=steps)
    return mask & ~eroded[1:-1, 1:-1]


def boundary_iou(
    predictions: Array, labels: Array, num_classes: int, ignore: int, ratio: float
) -> list[float]:
    """Boundary IoU of every class over a batch ``[B, H, W]``; void pixels are in no mask."""
    result = []
    for k in range(num_classes):
        both = either = 0
        for guess, truth in zip(predictions, labels, strict=True):
            ours = band((guess == k) & (truth != ignore), ratio)
            theirs = band(truth == k, ratio)
            both += int((ours & theirs).sum())
            either += int((ours | theirs).sum())
        result.append(both / either if either else math.nan)
    return result


def mean(values: Iterable[float]) -> float:
    """Over the values that are not NaN."""
    present = [value for value in values if not math.isnan(value)]
    return sum(present) / len(present) if present else math.nan
