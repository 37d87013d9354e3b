"""From class scores (and labels) to nonconformity scores: larger is stranger."""

from __future__ import annotations

import torch
from torch import Tensor

from cpseg.checks import (
    check_ignore_index,
    check_label_values,
    check_labels,
    check_probs,
    is_compiling,
    message,
)

SCORES = ("lac",)


def check_score(where: str, score: str) -> None:
    """A score that this version knows."""
    if score not in SCORES:
        names = ", ".join(repr(name) for name in SCORES)
        raise ValueError(message(where, f"a score among {names}", repr(score), "choose one"))


def nonconformity(
    probs: Tensor, labels: Tensor, *, score: str = "lac", ignore_index: int = 255
) -> Tensor:
    """Nonconformity of the true class; LAC is ``1 - p_y``.

    Args:
        probs: class scores in [0, 1], float, ``[B, K, H, W]`` or ``[K, H, W]``; they need not
            sum to 1. Half precision is scored in float32.
        labels: true classes, any integer dtype, ``[B, H, W]`` or ``[H, W]``.
        score: ``"lac"``, the score of ConformalSAM.
        ignore_index: the label of void pixels.

    Returns:
        float32 ``[B, H, W]`` or ``[H, W]``, NaN where the pixel is void.

    Raises:
        ValueError: shapes or devices do not belong together, a label is neither a class nor void.
        TypeError: ``probs`` is not floating point or ``labels`` not integer.

    Reference:
        ConformalSAM (ICCV 2025), eq. 3; the LAC score of Sadinle, Lei & Wasserman (2019).

    Example:
        >>> probs = torch.tensor([0.75, 0.25]).reshape(1, 2, 1, 1).expand(1, 2, 1, 3)
        >>> nonconformity(probs, torch.tensor([[[0, 1, 255]]]))
        tensor([[[0.2500, 0.7500,    nan]]])
    """
    where = "nonconformity"
    check_score(where, score)
    check_probs(where, probs)
    check_labels(where, labels, probs)
    check_ignore_index(where, ignore_index, probs.shape[-3])
    return true_class_score(where, probs, labels, ignore_index)


def true_class_score(where: str, probs: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """:func:`nonconformity` without the checks on shapes; ``where`` names the caller."""
    if _all_classes(labels, probs):
        p_true = probs.gather(-3, labels.to(torch.int64).unsqueeze(-3)).squeeze(-3)
        return p_true.to(torch.float32).neg_().add_(1)  # 1 - p, in place
    labels = labels.to(torch.int64)
    void = labels == ignore_index
    index = torch.where(void, 0, labels).unsqueeze(-3)
    try:
        p_true = probs.gather(-3, index).squeeze(-3)
    except RuntimeError:  # an index out of range: say which label it was
        check_label_values(where, labels, probs.shape[-3], ignore_index)
        raise
    return p_true.to(torch.float32).neg_().add_(1).masked_fill_(void, torch.nan)


def _all_classes(labels: Tensor, probs: Tensor) -> bool:
    """Where a look at the values is free: no pixel is void, so that no mask is needed."""
    if probs.device.type != "cpu" or is_compiling() or labels.numel() == 0:
        return False
    low, high = labels.aminmax()
    return int(low) >= 0 and int(high) < probs.shape[-3]


def class_scores(probs: Tensor, *, score: str = "lac") -> Tensor:
    """The same nonconformity score for every candidate class; LAC is ``1 - p``.

    Args:
        probs: class scores in [0, 1], float, ``[B, K, H, W]`` or ``[K, H, W]``.
        score: ``"lac"``.

    Returns:
        float32, the shape of ``probs``.

    Raises:
        ValueError: wrong rank, or an unknown score.
        TypeError: ``probs`` is not floating point.

    Reference:
        ConformalSAM (ICCV 2025), the inverse prediction map of section 3.3.1.

    Example:
        >>> class_scores(torch.tensor([0.75, 0.25]).reshape(2, 1, 1)).flatten()
        tensor([0.2500, 0.7500])
    """
    check_score("class_scores", score)
    check_probs("class_scores", probs)
    return 1 - probs.to(torch.float32)
