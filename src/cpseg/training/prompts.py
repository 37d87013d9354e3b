"""Prompts of interactive segmentation: sampled ones for training, fixed ones for evaluation.

Masks are ``[N, H, W]``; points and boxes are returned as (x, y) in pixels: column first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpseg._internal.checks import (
    check_bool,
    check_float,
    check_generator,
    check_has_values,
    check_integer,
    check_not_empty,
    check_same_device,
    check_same_shape,
    check_share,
    check_unit_interval,
    is_number,
    is_whole,
    message,
    shape,
    short,
)

_TILE = 2**16  # pixels per step on the CPU
_MOST_NOISE = 100.0  # sides of a box


class Prompts(NamedTuple):
    """One prompt for each of N masks.

    Attributes:
        points: float32 ``[N, 2]`` as (x, y); 0 where the prompt is a box.
        labels: int64 ``[N]``: 1 inside the target, 0 outside, -1 where the prompt is a box (SAM
            also uses -1 for "no point").
        boxes: float32 ``[N, 4]`` as (x0, y0, x1, y1), with both ends inside the mask; 0 where the
            prompt is a point. None if no mask can get a box.
    """

    points: Tensor
    labels: Tensor
    boxes: Tensor | None = None


def sample_prompts(
    targets: Tensor,
    predictions: Tensor | None = None,
    *,
    uncertainty: Tensor | None = None,
    box_share: float = 0.5,
    box_noise: float = 0.1,
    backup_points: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Prompts:
    """A prompt for each mask, as in the interactive training of SAM and SUM.

    Without predictions it is the first prompt: with probability ``box_share`` the jittered box of
    the target, otherwise a point inside it. With predictions it is a correction: a point where
    target and prediction differ, positive if the pixel belongs to the target and negative if not.
    Pixel i of the region is drawn with probability ``c_i / sum c``, where ``c = 1 - u``.

    If the region is empty or its certainty is 0 everywhere, the prompt is the backup point of the
    mask, as a positive point. The function checks values, so it waits for an accelerator.

    Args:
        targets: bool ``[N, H, W]``.
        predictions: bool ``[N, H, W]``, or None for the first prompt.
        uncertainty: in [0, 1], float ``[N, H, W]``; None draws uniformly.
        box_share: probability of a box in the first round.
        box_noise: see :func:`jitter_boxes`; 0 for exact boxes.
        backup_points: (x, y), float or integer ``[N, 2]``, for instance the points from which the
            pseudo-labels were made.
        generator: makes the draws reproducible, on the device of ``targets``. The point of a mask
            does not depend on the masks after it.

    Returns:
        A :class:`Prompts`; its boxes are None with predictions.

    Raises:
        ValueError: shapes or devices differ, uncertainty lies outside [0, 1], or a region has no
            pixel to draw and there is no backup point.
        TypeError: masks that are not bool.

    Reference:
        SUM (NeurIPS 2024), section 3.2.2 and appendix B.1.

    Example:
        >>> target = torch.zeros(1, 4, 5, dtype=torch.bool)
        >>> target[0, 1:3, 2:4] = True
        >>> prediction = target.clone()
        >>> prediction[0, 1, 2] = False
        >>> sample_prompts(target, prediction)
        Prompts(points=tensor([[2., 1.]]), labels=tensor([1]), boxes=None)
    """
    where = "sample_prompts"
    _check_masks(where, targets, "targets")
    if predictions is not None:
        _check_masks(where, predictions, "predictions")
        check_same_shape(where, predictions, targets, name="predictions", ref="targets")
        check_same_device(where, predictions, targets, name="predictions", reference="targets")
    if uncertainty is not None:
        _check_uncertainty(where, uncertainty, targets)
    check_share(where, box_share, name="box_share", fix="SAM uses 0.5")
    _check_noise(where, "box_noise", box_noise)
    check_generator(where, generator, targets.device)
    count, device = len(targets), targets.device
    numbers = torch.rand(count, 3, dtype=torch.float64, generator=generator, device=device)
    row, column, empty = _draw(targets, predictions, uncertainty, numbers[:, :2])
    points = torch.stack([column, row], 1).to(torch.float32)
    labels = targets[torch.arange(count, device=device), row, column].to(torch.int64)
    boxed = numbers[:, 2] < box_share if predictions is None else torch.zeros_like(empty)
    if predictions is None:
        boxes = masks_to_boxes(targets)
        has_target = targets.view(torch.uint8).amax(2).amax(1) > 0
        empty = empty & ~(boxed & has_target)  # a box does not need a certain pixel
    if backup_points is not None:
        _check_points(where, backup_points, targets)
        points = torch.where(empty.unsqueeze(1), backup_points.to(torch.float32), points)
        labels = labels.masked_fill(empty, 1)
    elif bool(empty.any()):
        number = int(empty.nonzero()[0])
        expected = "a pixel to draw in every mask, or backup_points"
        fix = "pass backup_points, or leave this mask out"
        raise ValueError(message(where, expected, f"none in mask {number}", fix))
    if predictions is not None:
        return Prompts(points, labels)
    boxed = boxed & ~empty
    if box_noise > 0:
        size = (targets.shape[1], targets.shape[2])
        boxes = jitter_boxes(boxes, size, noise=box_noise, generator=generator)
    points = points.masked_fill(boxed.unsqueeze(1), 0)
    boxes = boxes.masked_fill(~boxed.unsqueeze(1), 0)
    return Prompts(points, labels.masked_fill(boxed, -1), boxes)


def masks_to_boxes(masks: Tensor) -> Tensor:
    """The bounding box of each mask; its sides are the outermost pixels of the mask.

    Args:
        masks: bool ``[N, H, W]``.

    Returns:
        float32 ``[N, 4]`` as (x0, y0, x1, y1); zeros for an empty mask.

    Raises:
        ValueError: the masks are not 3-dimensional, or empty.
        TypeError: the masks are not bool.

    Example:
        >>> mask = torch.zeros(1, 4, 5, dtype=torch.bool)
        >>> mask[0, 1:3, 2:4] = True
        >>> masks_to_boxes(mask)
        tensor([[2., 1., 3., 2.]])
    """
    _check_masks("masks_to_boxes", masks, "masks")
    sides = []
    for axis in (1, 2):  # columns, then rows
        line = masks.view(torch.uint8).amax(axis)  # faster than Tensor.any
        last = line.shape[1] - 1 - line.flip(1).argmax(1)
        sides.append((line.argmax(1), last.masked_fill(line.amax(1) == 0, 0)))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], 1).to(torch.float32)


def jitter_boxes(
    boxes: Tensor,
    size: tuple[int, int],
    *,
    noise: float = 0.1,
    most: float = 20.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Boxes as a person would draw them: normal noise on every coordinate, inside the image.

    This is what SAM describes. The published code of SUM shifts the whole box instead, and only
    towards larger coordinates.

    Args:
        boxes: float ``[N, 4]`` as (x0, y0, x1, y1).
        size: height and width of the image.
        noise: standard deviation as a share of the side of the box.
        most: largest shift of a coordinate, in pixels.
        generator: makes the draws reproducible.

    Returns:
        Boxes with x0 <= x1 and y0 <= y1 within the image, of the shape and dtype of ``boxes``.

    Raises:
        ValueError: not ``[N, 4]``, negative noise, or a size that is not positive.
        TypeError: not floating point.

    Reference:
        Kirillov et al. (2023), Segment Anything, appendix A.

    Example:
        >>> jitter_boxes(torch.tensor([[2.0, 1.0, 30.0, 20.0]]), (40, 40), noise=0)
        tensor([[ 2.,  1., 30., 20.]])
    """
    where = "jitter_boxes"
    check_float(where, boxes, name="boxes", fix="convert them to float32")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        fix = "pass one box per row"
        raise ValueError(message(where, "boxes [N, 4]", shape(boxes), fix))
    check_has_values(where, boxes, name="boxes")
    sides = tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(sides) != 2 or not all(is_whole(side) and side < 2**31 for side in sides):
        fix = "pass the height and width of the image"
        raise ValueError(message(where, "size as two whole numbers >= 1", short(size), fix))
    _check_noise(where, "noise", noise)
    if not is_number(most, 0, math.inf):
        raise ValueError(message(where, "most >= 0", short(most), "SAM uses 20"))
    check_generator(where, generator, boxes.device)
    corners = boxes.reshape(-1, 2, 2)  # both ends, x and y
    side = (corners[:, 1] - corners[:, 0]).abs().unsqueeze(1)
    draws = torch.randn(corners.shape, generator=generator, device=boxes.device, dtype=boxes.dtype)
    moved = corners + (draws * side * float(noise)).clamp(-float(most), float(most))
    limit = torch.tensor([size[1] - 1, size[0] - 1], device=boxes.device, dtype=boxes.dtype)
    moved = torch.minimum(moved.clamp(min=0), limit)
    return moved.sort(dim=1).values.reshape(-1, 4)


def centre_point(targets: Tensor, predictions: Tensor | None = None) -> Prompts:
    """The point farthest from the boundary: the prompt that evaluations use.

    Without predictions the region is the target. With predictions there are two regions, the
    pixels of the target that the prediction misses and the predicted pixels outside the target;
    the region whose point is farther from its boundary is used (the missed pixels on a tie). The
    border of the image counts as a boundary. Of several points that are equally far, the first in
    reading order is taken.

    Args:
        targets: bool ``[N, H, W]``.
        predictions: bool ``[N, H, W]``, or None for the first prompt.

    Returns:
        A :class:`Prompts` without boxes. If prediction and target agree, there is nothing to
        correct: the label is -1 and the point is (0, 0).

    Raises:
        ValueError: shapes or devices differ, or an empty target without predictions.
        TypeError: masks that are not bool.

    Reference:
        SUM (NeurIPS 2024), appendix B.3; Xu et al. (2016), Deep interactive object selection.

    Example:
        >>> target = torch.zeros(1, 5, 9, dtype=torch.bool)
        >>> target[0, 1:4, 1:4] = True
        >>> centre_point(target)
        Prompts(points=tensor([[2., 2.]]), labels=tensor([1]), boxes=None)
    """
    where = "centre_point"
    _check_masks(where, targets, "targets")
    if predictions is None:
        depth, pixel = _deepest(targets)
        _check_drawable(where, depth)
        return Prompts(_as_points(pixel, targets), torch.ones_like(pixel))
    _check_masks(where, predictions, "predictions")
    check_same_shape(where, predictions, targets, name="predictions", ref="targets")
    check_same_device(where, predictions, targets, name="predictions", reference="targets")
    missed_depth, missed = _deepest(targets & ~predictions)
    extra_depth, extra = _deepest(predictions & ~targets)
    positive = missed_depth >= extra_depth
    agree = (missed_depth == 0) & (extra_depth == 0)
    pixel = torch.where(positive, missed, extra).masked_fill(agree, 0)
    return Prompts(_as_points(pixel, targets), positive.to(torch.int64).masked_fill(agree, -1))


def boundary_point(targets: Tensor, *, distance: float = 10.0) -> Prompts:
    """A harder first prompt: the median of the target's pixels near its boundary.

    It is the middle one, in reading order, of the pixels of the target whose distance to its
    outside is at most ``distance``.

    Args:
        targets: bool ``[N, H, W]``.
        distance: width of the band in pixels (Euclidean); beyond the image counts as outside.

    Returns:
        A :class:`Prompts` of positive points without boxes.

    Raises:
        ValueError: the masks are not 3-dimensional, a target is empty, or ``distance`` is below 1.
        TypeError: the masks are not bool.

    Reference:
        SUM (NeurIPS 2024), appendices B.3 and F.2, which do not define the order of the pixels.

    Example:
        >>> boundary_point(torch.ones(1, 3, 5, dtype=torch.bool), distance=1).points
        tensor([[0., 1.]])
    """
    where = "boundary_point"
    _check_masks(where, targets, "targets")
    if not is_number(distance, 1, math.inf):
        raise ValueError(message(where, "distance >= 1", short(distance), "the paper uses 10"))
    medians = []
    for mask in targets.cpu().numpy():
        depth = _depth(mask).ravel()
        near = np.flatnonzero((depth > 0) & (depth <= distance))
        medians.append(int(near[(len(near) - 1) // 2]) if len(near) else -1)
    pixel = torch.tensor(medians, device=targets.device)
    _check_drawable(where, pixel + 1)
    return Prompts(_as_points(pixel, targets), torch.ones_like(pixel))


def _draw(
    targets: Tensor, predictions: Tensor | None, uncertainty: Tensor | None, numbers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a pixel of each region by weight: first its row, then its column.

    Returns rows and columns ``[N]``, and bool ``[N]``, True where all weights are 0.
    """
    rows = _row_weights(targets, predictions, uncertainty)
    row = _pick(rows, numbers[:, 0])
    index = (torch.arange(len(targets), device=targets.device), row)
    line = _weights(
        targets[index],
        None if predictions is None else predictions[index],
        None if uncertainty is None else uncertainty[index],
    )
    return row, _pick(line.to(torch.float64), numbers[:, 1]), rows.sum(1) == 0


def _row_weights(targets: Tensor, predictions: Tensor | None, uncertainty: Tensor | None) -> Tensor:
    """Sum of the weights of every row of every mask, float64 ``[N, H]``.

    On a CPU it takes a few rows at a time, so that the temporary arrays fit into the cache.
    """
    count, height, width = targets.shape
    maps = [None if x is None else x.reshape(-1, width) for x in (predictions, uncertainty)]
    step = max(1, _TILE // width) if targets.device.type == "cpu" else count * height
    sums = []
    for start in range(0, count * height, step):
        rows = slice(start, start + step)
        predicted, unsure = (None if values is None else values[rows] for values in maps)
        sums.append(_weights(targets.reshape(-1, width)[rows], predicted, unsure).sum(1))
    return torch.cat(sums).reshape(count, height).to(torch.float64)


def _weights(targets: Tensor, predictions: Tensor | None, uncertainty: Tensor | None) -> Tensor:
    """Certainty inside the region and 0 outside, float32."""
    region = targets if predictions is None else targets ^ predictions
    weight = region.to(torch.float32)
    if uncertainty is None:
        return weight
    return weight.addcmul_(weight, uncertainty.detach().to(torch.float32), value=-1)


def _pick(weight: Tensor, number: Tensor) -> Tensor:
    """Invert the cumulative weights ``[N, M]`` at uniform numbers; never an index of weight 0."""
    cumulative = weight.cumsum(1)
    target = (number * cumulative[:, -1]).unsqueeze(1)
    index = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return index.clamp(max=weight.shape[1] - 1)


def _deepest(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Largest distance to the outside (0 for an empty mask), and the pixel where it is reached."""
    depths = [_depth(mask).ravel() for mask in masks.cpu().numpy()]
    pixels = [int(depth.argmax()) for depth in depths]
    largest = [float(depth[pixel]) for depth, pixel in zip(depths, pixels, strict=True)]
    device = masks.device
    return torch.tensor(largest, device=device), torch.tensor(pixels, device=device)


def _depth(mask: np.ndarray) -> np.ndarray:
    """Euclidean distance of every pixel of a mask to its outside; 0 outside."""
    from scipy import ndimage

    depth: np.ndarray = ndimage.distance_transform_edt(np.pad(mask, 1))
    return depth[1:-1, 1:-1]


def _as_points(pixel: Tensor, masks: Tensor) -> Tensor:
    """(x, y) of pixels numbered in reading order."""
    width = masks.shape[2]
    return torch.stack([pixel % width, pixel // width], 1).to(torch.float32)


def _check_drawable(where: str, depth: Tensor) -> None:
    if bool((depth == 0).any()):
        number = int((depth == 0).nonzero()[0])
        expected, got = "a pixel in every target", f"none in mask {number}"
        raise ValueError(message(where, expected, got, "leave this mask out"))


def _check_masks(where: str, masks: Tensor, name: str) -> None:
    check_bool(where, masks, name=name, fix="compare with a threshold, as in logits > 0")
    if masks.ndim != 3:
        fix = "flatten batch and masks into one axis"
        raise ValueError(message(where, f"{name} [N, H, W]", shape(masks), fix))
    check_not_empty(where, masks, name=name)


def _check_uncertainty(where: str, uncertainty: Tensor, targets: Tensor) -> None:
    check_float(where, uncertainty, name="uncertainty")
    check_same_shape(where, uncertainty, targets, name="uncertainty", ref="targets")
    check_same_device(where, uncertainty, targets, name="uncertainty", reference="targets")
    fix = "make it with uncertainty_map"
    check_unit_interval(where, uncertainty.detach(), name="uncertainty", fix=fix)


def _check_noise(where: str, name: str, noise: object) -> None:
    if not is_number(noise, 0, _MOST_NOISE):
        fix = f"SAM uses 0.1, and {_MOST_NOISE:g} is the most"
        raise ValueError(message(where, f"{name} >= 0", short(noise), fix))


def _check_points(where: str, points: Tensor, targets: Tensor) -> None:
    if not isinstance(points, Tensor) or points.shape != (len(targets), 2):
        got = shape(points) if isinstance(points, Tensor) else type(points).__name__
        expected = f"backup_points [{len(targets)}, 2]"
        raise ValueError(message(where, expected, got, "pass one (x, y) per mask"))
    if points.is_floating_point():
        check_float(where, points, name="backup_points")
    else:
        check_integer(where, points, name="backup_points")
    check_same_device(where, points, targets, name="backup_points", reference="targets")
