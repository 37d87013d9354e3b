"""A whole grid of nested selection rules in one pass over an image.

With thresholds sorted from strict to loose, a class that enters the prediction set stays in it.
The first threshold that admits each class therefore determines the label at all thresholds: none,
then perhaps the background, then the best of the other classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpseg.core.selection import Evidence


def first_alpha_in_set(p: Tensor, thresholds: Tensor) -> Tensor:
    """Index of the first threshold at which a class is in the prediction set; A where it never is.

    Args:
        p: probabilities of one class, ``[H, W]``; NaN is never in.
        thresholds: float32 ``[A]`` or ``[A, H, W]``, growing along the first axis.

    Returns:
        int64 ``[H, W]`` in 0..A.
    """
    score = 1 - p.to(torch.float32)  # the one comparison of `prediction_set`
    level = torch.zeros(score.shape, dtype=torch.int16, device=score.device)
    for threshold in thresholds:
        level += ~(score <= threshold)
    return level.to(torch.int64)


def confusion_per_alpha(
    found: Evidence,
    labels: Tensor,
    thresholds: Tensor,
    *,
    ignore_index: int = 255,
    per_class: bool = False,
) -> Tensor:
    """Confusion matrix of the pseudo-labels of one image at every threshold.

    Args:
        found: evidence of one image, ``[H, W]``.
        labels: the truth ``[H, W]``, classes or ``ignore_index``.
        thresholds: float32 ``[A]`` or ``[A, H, W]``, growing along the first axis.
        ignore_index: the label of void pixels, which do not count.
        per_class: take the label at the loosest threshold, and at threshold j count it only if its
            class is in the set there. Otherwise apply eq. 4 separately at each threshold: the
            background gives way to another class as soon as that one is in.

    Returns:
        int64 ``[A, K, K + 1]``: truth, then prediction; the last column counts pixels without a
        label.
    """
    levels, num_classes = len(thresholds), found.num_classes
    truth = labels.to(torch.int64)
    valid = truth != ignore_index
    void = levels  # an index whose counts are dropped
    enter = first_alpha_in_set(found.best, thresholds)
    if found.background is not None and found.background_score is not None:
        unknown = found.best.isnan() | found.background_score.isnan()
        enter = enter.masked_fill(unknown, levels)
    steps = torch.zeros((levels + 1) * num_classes**2, dtype=torch.int64, device=truth.device)

    def count(level: Tensor, label: Tensor | int, amount: int) -> None:
        place = (level.masked_fill(~valid, void) * num_classes + truth.masked_fill(~valid, 0)) * (
            num_classes
        ) + label
        change = torch.tensor(amount, device=place.device).expand(place.numel())
        steps.scatter_add_(0, place.flatten(), change)

    count(enter, found.best_class.to(torch.int64), 1)
    if found.background is not None and found.background_score is not None:
        back = first_alpha_in_set(found.background_score, thresholds).masked_fill(unknown, levels)
        if per_class:  # the label is the background only where no other class is ever in the set
            count(back.masked_fill(enter < levels, levels), found.background, 1)
        else:
            count(back, found.background, 1)
            count(torch.maximum(back, enter), found.background, -1)
    square = steps.reshape(levels + 1, num_classes, num_classes)[:-1].cumsum(0)
    pixels = torch.zeros(num_classes + 1, dtype=torch.int64, device=truth.device)
    index = truth.masked_fill(~valid, num_classes).flatten()
    pixels.scatter_add_(0, index, torch.ones_like(index))
    rest = pixels[:-1] - square.sum(-1)
    return torch.cat([square, rest.unsqueeze(-1)], -1)


def coverage_counts(p_true: Tensor, thresholds: Tensor) -> Tensor:
    """How many pixels have their true class in the set at every threshold, int64 ``[A]``.

    Args:
        p_true: class score of the true class, ``[H, W]``, NaN where void.
        thresholds: float32 ``[A]`` or ``[A, H, W]``, growing along the first axis.
    """
    level = first_alpha_in_set(p_true, thresholds).flatten()
    steps = torch.zeros(len(thresholds) + 1, dtype=torch.int64, device=level.device)
    return steps.scatter_add_(0, level, torch.ones_like(level))[:-1].cumsum(0)
