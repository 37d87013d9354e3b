"""Quality of labels and sets, over the pixels that are not void."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, one_hot

from cpseg._internal.checks import (
    MOST_CLASSES,
    check_bool,
    check_count,
    check_flag,
    check_float,
    check_has_values,
    check_ignore_index,
    check_integer,
    check_label_values,
    check_not_empty,
    check_same_device,
    check_same_shape,
    check_share,
    message,
    shape,
)

_RATIO_FIX = "pass a share of the diagonal such as 0.02"


def confusion_matrix(
    predictions: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    ignore_index: int = 255,
    with_ignored: bool = False,
) -> Tensor:
    """Counts of pixels by true class (row) and predicted class (column).

    Matrices of several batches add up.

    Args:
        predictions: predicted classes or pseudo-labels, integer; ``ignore_index`` where a pixel
            was left without a label.
        labels: true classes, integer, the shape of ``predictions``; void pixels do not count.
        num_classes: number of classes K.
        ignore_index: void in ``labels``, unlabelled in ``predictions``.
        with_ignored: append a column for pixels without a predicted label, so that
            :func:`mean_iou` takes them as wrong; without it they do not count.

    Returns:
        int64 ``[K, K]``, or ``[K, K + 1]`` with ``with_ignored``.

    Raises:
        ValueError: shapes or devices differ, or a value is neither a class nor ``ignore_index``.
        TypeError: not integer.

    Example:
        >>> predictions, labels = torch.tensor([0, 1, 255, 1]), torch.tensor([0, 0, 1, 255])
        >>> confusion_matrix(predictions, labels, num_classes=2, with_ignored=True)
        tensor([[1, 1, 0],
                [0, 0, 1]])
    """
    where = "confusion_matrix"
    _check_pair(where, predictions, labels)
    _check_classes(where, num_classes, ignore_index)
    check_flag(where, with_ignored, name="with_ignored")
    check_label_values(where, predictions, num_classes, ignore_index, name="predictions")
    check_label_values(where, labels, num_classes, ignore_index)
    columns = num_classes + 1
    predictions, labels = predictions.to(torch.int64).flatten(), labels.to(torch.int64).flatten()
    column = predictions.masked_fill(predictions == ignore_index, num_classes)
    place = (labels * columns + column).masked_fill(labels == ignore_index, num_classes * columns)
    counts = torch.zeros(num_classes * columns + 1, dtype=torch.int64, device=labels.device)
    counts.scatter_add_(0, place, torch.ones_like(place))
    matrix = counts[:-1].reshape(num_classes, columns)
    return matrix if with_ignored else matrix[:, :num_classes]


def mean_iou(confusion: Tensor, *, per_class: bool = False) -> Tensor:
    """Mean intersection over union from a confusion matrix.

    Args:
        confusion: int64 ``[K, K]``, or ``[K, K + 1]`` with a last column of pixels without a
            label, which then count as wrong.
        per_class: return the IoU of every class instead of their mean.

    Returns:
        float64 ``[]``, over the classes that occur in truth or prediction (NaN where none does);
        or ``[K]``, NaN for classes that do not occur.

    Raises:
        ValueError: another shape.
        TypeError: not a tensor, or one of bools or complex numbers.

    Reference:
        Everingham et al. (2010), PASCAL VOC; SUM (NeurIPS 2024), appendix B.3.

    Example:
        >>> mean_iou(torch.tensor([[1, 1, 0], [0, 0, 1]]))
        tensor(0.2500, dtype=torch.float64)
    """
    check_flag("mean_iou", per_class, name="per_class")
    if not isinstance(confusion, Tensor):
        got, fix = type(confusion).__name__, "make it with confusion_matrix"
        raise TypeError(message("mean_iou", "confusion as a tensor", got, fix))
    if confusion.is_floating_point():
        check_float("mean_iou", confusion, name="confusion")
    else:
        check_integer("mean_iou", confusion, name="confusion")
    check_has_values("mean_iou", confusion, name="confusion")
    if confusion.ndim != 2 or confusion.shape[1] - confusion.shape[0] not in (0, 1):
        expected, fix = "confusion [K, K] or [K, K + 1]", "make it with confusion_matrix"
        raise ValueError(message("mean_iou", expected, shape(confusion), fix))
    if confusion.is_floating_point():
        confusion = confusion.to(torch.float64)
    square = confusion[:, : len(confusion)]
    hits = square.diagonal().to(torch.float64)
    union = confusion.sum(1) + square.sum(0) - square.diagonal()
    iou = hits / union  # 0 / 0 is NaN
    return iou if per_class else iou.nanmean()


def boundary_iou(
    predictions: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    ignore_index: int = 255,
    dilation_ratio: float = 0.02,
    per_class: bool = False,
) -> Tensor:
    """Mean intersection over union of the classes' boundary bands.

    The band of a mask is the part that an erosion by ``dilation_ratio`` of the diagonal removes;
    pixels outside the image count as outside the mask.

    Args:
        predictions: predicted classes, integer ``[B, H, W]`` or ``[H, W]``.
        labels: true classes, integer, the same shape; void pixels belong to no mask.
        num_classes: number of classes K.
        ignore_index: void, or without a predicted label.
        dilation_ratio: width of the band as a share of the diagonal, in [0, 1]; at least one
            pixel.
        per_class: return the IoU of every class instead of their mean.

    Returns:
        float64 ``[]``, over the classes with a band in truth or prediction (intersections and
        unions added up over the batch first); or ``[K]``, NaN for classes without.

    Raises:
        ValueError: shapes or devices differ, or values that are neither class nor void.
        TypeError: not integer.

    Reference:
        Cheng et al. (2021), Boundary IoU; SUM (NeurIPS 2024), appendix B.3.

    Example:
        >>> labels = torch.zeros(8, 8, dtype=torch.int64)
        >>> labels[2:6, 2:6] = 1
        >>> boundary_iou(labels, labels, num_classes=2)
        tensor(1., dtype=torch.float64)
    """
    where = "boundary_iou"
    _check_pair(where, predictions, labels)
    if labels.ndim not in (2, 3):
        expected, fix = "labels [B, H, W] or [H, W]", "pass maps of class indices"
        raise ValueError(message(where, expected, shape(labels), fix))
    _check_classes(where, num_classes, ignore_index)
    check_flag(where, per_class, name="per_class")
    check_share(where, dilation_ratio, name="dilation_ratio", fix=_RATIO_FIX)
    check_label_values(where, predictions, num_classes, ignore_index, name="predictions")
    check_label_values(where, labels, num_classes, ignore_index)
    width = _band_width(dilation_ratio, labels)
    predictions, labels = predictions.to(torch.int64), labels.to(torch.int64)
    predictions = predictions.masked_fill(labels == ignore_index, ignore_index)
    ours = _bands(predictions, num_classes, ignore_index, width)
    truth = _bands(labels, num_classes, ignore_index, width)
    both = (ours & truth).sum((0, 2, 3)).to(torch.float64)
    iou = both / (ours | truth).sum((0, 2, 3))
    return iou if per_class else iou.nanmean()


class InteractiveIoU(NamedTuple):
    """Quality after each of R rounds, means over the masks.

    Attributes:
        iou: mean IoU, float64 ``[R]``.
        boundary_iou: mean IoU of the boundary bands, float64 ``[R]``.
    """

    iou: Tensor
    boundary_iou: Tensor


def interactive_iou(
    predictions: Tensor, targets: Tensor, *, dilation_ratio: float = 0.02
) -> InteractiveIoU:
    """Mean IoU and mean boundary IoU of the masks after each round of interaction.

    Here every mask counts the same; in :func:`mean_iou` and :func:`boundary_iou` every class
    does.

    Args:
        predictions: bool ``[R, N, H, W]``: the masks after each of R rounds.
        targets: bool ``[N, H, W]``.
        dilation_ratio: width of the band as a share of the diagonal, in [0, 1]; at least one
            pixel.

    Returns:
        An :class:`InteractiveIoU`. A mask that is empty in target and prediction does not count;
        NaN where none does.

    Raises:
        ValueError: shapes or devices do not belong together.
        TypeError: masks that are not bool.

    Reference:
        SUM (NeurIPS 2024), appendix B.3; Cheng et al. (2021), Boundary IoU.

    Example:
        >>> target = torch.zeros(1, 8, 8, dtype=torch.bool)
        >>> target[0, 2:6, 2:6] = True
        >>> first = target.clone()
        >>> first[0, 2:4] = False
        >>> interactive_iou(torch.stack([first, target]), target).iou
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    where = "interactive_iou"
    for name, masks in (("predictions", predictions), ("targets", targets)):
        check_bool(where, masks, name=name, fix="compare logits with 0")
    if targets.ndim != 3 or predictions.ndim != 4 or predictions.shape[1:] != targets.shape:
        expected = "predictions [R, N, H, W] and targets [N, H, W]"
        got = f"{shape(predictions)} and {shape(targets)}"
        raise ValueError(message(where, expected, got, "stack the rounds in front"))
    check_same_device(where, predictions, targets, name="predictions", reference="targets")
    check_not_empty(where, predictions, name="predictions")
    check_share(where, dilation_ratio, name="dilation_ratio", fix=_RATIO_FIX)
    width = _band_width(dilation_ratio, targets)
    truth = _band(targets, width)
    iou = [_mean_of_masks(masks, targets) for masks in predictions]
    bands = [_mean_of_masks(_band(masks, width), truth) for masks in predictions]
    return InteractiveIoU(torch.stack(iou), torch.stack(bands))


def _band_width(dilation_ratio: float, maps: Tensor) -> int:
    """Width of the band in pixels; one that is as wide as the image takes all of it."""
    height, width = maps.shape[-2:]
    return min(max(1, round(dilation_ratio * math.hypot(height, width))), max(height, width))


def _mean_of_masks(masks: Tensor, targets: Tensor) -> Tensor:
    both = (masks & targets).sum((1, 2)).to(torch.float64)
    return (both / (masks | targets).sum((1, 2))).nanmean()


def _bands(labels: Tensor, num_classes: int, ignore_index: int, width: int) -> Tensor:
    """Boundary bands of all classes, bool ``[B, K, H, W]``."""
    labels = labels.reshape(-1, *labels.shape[-2:])
    index = labels.masked_fill(labels == ignore_index, num_classes)
    masks = one_hot(index, num_classes + 1)[..., :num_classes].permute(0, 3, 1, 2).bool()
    return _band(masks, width)


def _band(masks: Tensor, width: int) -> Tensor:
    """Pixels that an erosion by ``width`` removes, masks ``[A, B, H, W]`` or ``[A, H, W]``."""
    outside = torch.nn.functional.pad((~masks).float(), [width] * 4, value=1.0)
    side = 2 * width + 1  # an erosion by a square, one axis after the other
    near = max_pool2d(max_pool2d(outside, (side, 1), stride=1), (1, side), stride=1)
    return masks & (near > 0)


def coverage(prediction_set: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Share of pixels whose true class is in their set, float64 ``[]``; NaN if all are void.

    Args:
        prediction_set: bool ``[B, K, H, W]`` or ``[K, H, W]``.
        labels: true classes, integer ``[B, H, W]`` or ``[H, W]``.
        ignore_index: the label of void pixels, which do not count.

    Raises:
        ValueError: shapes or devices do not belong together, or stray label values.
        TypeError: ``prediction_set`` is not bool or ``labels`` not integer.

    Example:
        >>> sets = torch.tensor([[True, False], [True, True]]).reshape(2, 1, 2)
        >>> coverage(sets, torch.tensor([[0, 0]]))
        tensor(0.5000, dtype=torch.float64)
    """
    where = "coverage"
    _check_set(where, prediction_set)
    expected = (*prediction_set.shape[:-3], *prediction_set.shape[-2:])
    check_integer(where, labels)
    if labels.shape != expected:
        wanted = f"labels {list(expected)} for sets {shape(prediction_set)}"
        raise ValueError(message(where, wanted, shape(labels), "resize the labels (nearest)"))
    check_same_device(where, labels, prediction_set, name="labels", reference="prediction_set")
    check_ignore_index(where, ignore_index)
    check_label_values(where, labels, prediction_set.shape[-3], ignore_index)
    labels = labels.to(torch.int64)
    void = labels == ignore_index
    inside = prediction_set.gather(-3, labels.masked_fill(void, 0).unsqueeze(-3)).squeeze(-3)
    return (inside & ~void).sum().to(torch.float64) / (~void).sum()


def set_size(prediction_set: Tensor) -> Tensor:
    """Mean number of classes in the set of a pixel, float64 ``[]``.

    Args:
        prediction_set: bool ``[B, K, H, W]`` or ``[K, H, W]``.

    Raises:
        ValueError: wrong rank or empty.
        TypeError: not bool.

    Example:
        >>> set_size(torch.tensor([[True, False], [True, True]]).reshape(2, 1, 2))
        tensor(1.5000, dtype=torch.float64)
    """
    _check_set("set_size", prediction_set)
    pixels = prediction_set.numel() // prediction_set.shape[-3]
    return prediction_set.sum().to(torch.float64) / pixels


def kept_share(pseudo_labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Share of pixels that carry a pseudo-label, float64 ``[]``.

    Args:
        pseudo_labels: integer labels of any shape.
        ignore_index: the label of pixels without one.

    Raises:
        ValueError: empty.
        TypeError: not integer.

    Example:
        >>> kept_share(torch.tensor([0, 1, 255, 1]))
        tensor(0.7500, dtype=torch.float64)
    """
    check_integer("kept_share", pseudo_labels, name="pseudo_labels")
    check_not_empty("kept_share", pseudo_labels, name="pseudo_labels")
    check_ignore_index("kept_share", ignore_index)
    return (pseudo_labels.to(torch.int64) != ignore_index).to(torch.float64).mean()


def _check_classes(where: str, num_classes: int, ignore_index: int) -> None:
    fix = "count the classes of the data set"
    check_count(where, num_classes, name="num_classes", fix=fix, most=MOST_CLASSES)
    check_ignore_index(where, ignore_index, num_classes)


def _check_pair(where: str, predictions: Tensor, labels: Tensor) -> None:
    check_integer(where, predictions, name="predictions")
    check_integer(where, labels)
    check_same_shape(where, predictions, labels, name="predictions", ref="labels")
    check_same_device(where, predictions, labels, name="predictions", reference="labels")
    check_not_empty(where, labels, name="labels")


def _check_set(where: str, prediction_set: Tensor) -> None:
    check_bool(where, prediction_set, name="prediction_set", fix="make it with prediction_set")
    if prediction_set.ndim not in (3, 4):
        expected, got = "prediction_set [B, K, H, W] or [K, H, W]", shape(prediction_set)
        raise ValueError(message(where, expected, got, "keep the class axis"))
    check_not_empty(where, prediction_set, name="prediction_set")
