"""Prompts of interactive segmentation: sampled ones for training, fixed ones for evaluation.

Masks come as ``[N, H, W]``, points and boxes go out as (x, y) in pixels: column first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpseg._internal.checks import (
    check_integer,
    check_not_empty,
    check_same_device,
    check_same_shape,
    check_unit_interval,
    message,
    shape,
)

_TILE = 2**16  # pixels of a step on the CPU


class Prompts(NamedTuple):
    """One prompt for each of N masks.

    Attributes:
        points: float32 ``[N, 2]`` as (x, y); 0 where the prompt is a box.
        labels: int64 ``[N]``: 1 inside the target, 0 outside, -1 where the prompt is a box (which
            is also SAM's number for "no point").
        boxes: float32 ``[N, 4]`` as (x0, y0, x1, y1), both ends in the mask; 0 where the prompt is
            a point. None where no mask can get a box.
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

    Without predictions, the first prompt: with probability ``box_share`` the jittered box of the
    target, else a point in it. With predictions, a correction: a point where the two differ,
    positive where the target is missed and negative where it is overrun. A pixel i of the region is
    drawn with probability ``c_i / sum c``, where ``c = 1 - u``.

    Where the region is empty or its certainty is 0, the prompt is the mask's backup point, as a
    positive one. Looks at values, so on an accelerator it waits for the device.

    Args:
        targets: bool ``[N, H, W]``.
        predictions: bool ``[N, H, W]``, or None for the first prompt.
        uncertainty: in [0, 1], float ``[N, H, W]``; None draws uniformly.
        box_share: probability of a box in the first round.
        box_noise: see :func:`jitter_boxes`; 0 for exact boxes.
        backup_points: (x, y), float or integer ``[N, 2]``, the point that made the pseudo-label
            for instance.
        generator: makes the draws reproducible, on the device of ``targets``. A mask's point is the
            same whatever the masks after it are.

    Returns:
        A :class:`Prompts`; its boxes are None with predictions.

    Raises:
        ValueError: shapes or devices differ, uncertainty outside [0, 1], or a region without a
            pixel to draw and no backup point.
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
    if not 0 <= box_share <= 1:
        raise ValueError(message(where, "box_share in [0, 1]", str(box_share), "SAM uses 0.5"))
    count, device = len(targets), targets.device
    numbers = torch.rand(count, 3, dtype=torch.float64, generator=generator, device=device)
    row, column, empty = _draw(targets, predictions, uncertainty, numbers[:, :2])
    points = torch.stack([column, row], 1).to(torch.float32)
    labels = targets[torch.arange(count, device=device), row, column].to(torch.int64)
    boxed = numbers[:, 2] < box_share if predictions is None else torch.zeros_like(empty)
    if predictions is None:
        boxes = masks_to_boxes(targets)
        filled = targets.view(torch.uint8).amax(2).amax(1) > 0
        empty = empty & ~(boxed & filled)  # a box needs no certain pixel
    if backup_points is not None:
        _check_points(where, backup_points, targets)
        points = torch.where(empty.unsqueeze(1), backup_points.to(torch.float32), points)
        labels = labels.masked_fill(empty, 1)
    elif bool(empty.any()):
        number = int(empty.nonzero()[0])
        expected = "a pixel to draw in every mask, or backup_points"
        fix = "pass backup_points, or leave that mask out"
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
    """The box of each mask; its four sides are the outermost pixels of the mask.

    Args:
        masks: bool ``[N, H, W]``.

    Returns:
        float32 ``[N, 4]`` as (x0, y0, x1, y1); zeros for an empty mask.

    Raises:
        ValueError: another rank, or empty.
        TypeError: not bool.

    Example:
        >>> mask = torch.zeros(1, 4, 5, dtype=torch.bool)
        >>> mask[0, 1:3, 2:4] = True
        >>> masks_to_boxes(mask)
        tensor([[2., 1., 3., 2.]])
    """
    _check_masks("masks_to_boxes", masks, "masks")
    sides = []
    for axis in (1, 2):  # columns, then rows
        line = masks.view(torch.uint8).amax(axis)  # faster than any
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
    """Boxes as a person draws them: normal noise on every coordinate, inside the image.

    As SAM describes it. The published code of SUM shifts a whole box instead, and only towards
    larger coordinates.

    Args:
        boxes: float ``[N, 4]`` as (x0, y0, x1, y1).
        size: height and width of the image.
        noise: standard deviation as a share of the box's side.
        most: bound on the shift of a coordinate, in pixels.
        generator: makes the draws reproducible.

    Returns:
        Boxes with x0 <= x1 and y0 <= y1 within the image, the shape and dtype of ``boxes``.

    Raises:
        ValueError: not ``[N, 4]``, or negative noise.
        TypeError: not floating point.

    Reference:
        Kirillov et al. (2023), Segment Anything, appendix A.

    Example:
        >>> jitter_boxes(torch.tensor([[2.0, 1.0, 30.0, 20.0]]), (40, 40), noise=0)
        tensor([[ 2.,  1., 30., 20.]])
    """
    where = "jitter_boxes"
    if not isinstance(boxes, Tensor) or not boxes.is_floating_point():
        got = str(getattr(boxes, "dtype", type(boxes).__name__))
        raise TypeError(message(where, "floating-point boxes", got, "convert them to float32"))
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        fix = "pass one box a row"
        raise ValueError(message(where, "boxes [N, 4]", shape(boxes), fix))
    if not (noise >= 0 and most >= 0):
        got = f"{noise} and {most}"
        raise ValueError(message(where, "noise and most >= 0", got, "SAM uses 0.1 and 20"))
    corners = boxes.reshape(-1, 2, 2)  # both ends, x and y
    side = (corners[:, 1] - corners[:, 0]).abs().unsqueeze(1)
    draws = torch.randn(corners.shape, generator=generator, device=boxes.device, dtype=boxes.dtype)
    moved = corners + (draws * side * noise).clamp(-most, most)
    limit = torch.tensor([size[1] - 1, size[0] - 1], device=boxes.device, dtype=boxes.dtype)
    moved = torch.minimum(moved.clamp(min=0), limit)
    return moved.sort(dim=1).values.reshape(-1, 4)


def centre_point(targets: Tensor, predictions: Tensor | None = None) -> Prompts:
    """The point farthest from the boundary: the prompt that evaluations use.

    Of each target, or, with predictions, of the region where the two differ: the parts that are
    missed and those that are overrun are looked at apart, and the farther point wins (the missed
    part, if both are as far). The image's border counts as a boundary. The first in reading order
    wins among equals.

    Args:
        targets: bool ``[N, H, W]``.
        predictions: bool ``[N, H, W]``, or None for the first prompt.

    Returns:
        A :class:`Prompts` without boxes. Where prediction and target agree, the label is -1 and the
        point (0, 0): there is nothing to correct.

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
        depth, place = _deepest(targets)
        _check_drawable(where, depth)
        return Prompts(_as_points(place, targets), torch.ones_like(place))
    _check_masks(where, predictions, "predictions")
    check_same_shape(where, predictions, targets, name="predictions", ref="targets")
    check_same_device(where, predictions, targets, name="predictions", reference="targets")
    missed, inside = _deepest(targets & ~predictions)
    overrun, outside = _deepest(predictions & ~targets)
    positive = missed >= overrun
    labels = positive.to(torch.int64).masked_fill((missed == 0) & (overrun == 0), -1)
    place = torch.where(positive, inside, outside).masked_fill(labels == -1, 0)
    return Prompts(_as_points(place, targets), labels)


def boundary_point(targets: Tensor, *, distance: float = 10.0) -> Prompts:
    """A harder first prompt: the median of the pixels of a target near its boundary.

    Of the pixels of the target at most ``distance`` from its outside, in reading order, the middle
    one.

    Args:
        targets: bool ``[N, H, W]``.
        distance: width of the band in pixels (Euclidean); the image's border counts as outside.

    Returns:
        A :class:`Prompts` of positive points without boxes.

    Raises:
        ValueError: another rank, an empty target, or ``distance`` below 1.
        TypeError: masks that are not bool.

    Reference:
        SUM (NeurIPS 2024), appendices B.3 and F.2, which leave the order of the pixels open.

    Example:
        >>> boundary_point(torch.ones(1, 3, 5, dtype=torch.bool), distance=1).points
        tensor([[0., 1.]])
    """
    where = "boundary_point"
    _check_masks(where, targets, "targets")
    if not distance >= 1:
        raise ValueError(message(where, "distance >= 1", str(distance), "the paper uses 10"))
    places = []
    for mask in targets.cpu().numpy():
        depth = _depth(mask).ravel()
        near = np.flatnonzero((depth > 0) & (depth <= distance))
        places.append(int(near[(len(near) - 1) // 2]) if len(near) else -1)
    place = torch.tensor(places, device=targets.device)
    _check_drawable(where, place + 1)
    return Prompts(_as_points(place, targets), torch.ones_like(place))


def _draw(
    targets: Tensor, predictions: Tensor | None, uncertainty: Tensor | None, numbers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A pixel of each region by weight, first its row, then its place there; where is none."""
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

    A few rows at a time on a CPU, so that no array of the size of the masks leaves the cache.
    """
    count, height, width = targets.shape
    lines = [None if x is None else x.reshape(-1, width) for x in (predictions, uncertainty)]
    step = max(1, _TILE // width) if targets.device.type == "cpu" else count * height
    found = []
    for start in range(0, count * height, step):
        part = slice(start, start + step)
        predicted, unsure = (None if line is None else line[part] for line in lines)
        found.append(_weights(targets.reshape(-1, width)[part], predicted, unsure).sum(1))
    return torch.cat(found).reshape(count, height).to(torch.float64)


def _weights(targets: Tensor, predictions: Tensor | None, uncertainty: Tensor | None) -> Tensor:
    """Certainty in the region, 0 outside, float32."""
    region = targets if predictions is None else targets ^ predictions
    weight = region.to(torch.float32)
    if uncertainty is None:
        return weight
    return weight.addcmul_(weight, uncertainty.detach().to(torch.float32), value=-1)


def _pick(weight: Tensor, number: Tensor) -> Tensor:
    """Invert the cumulative weights ``[N, M]`` at uniform numbers; never a place of weight 0."""
    reached = weight.cumsum(1)
    wanted = (number * reached[:, -1]).unsqueeze(1)
    place = torch.searchsorted(reached, wanted, right=True).squeeze(1)
    return place.clamp(max=weight.shape[1] - 1)


def _deepest(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Largest distance to the outside, 0 for an empty mask, and the pixel that has it."""
    found = [_depth(mask).ravel() for mask in masks.cpu().numpy()]
    place = [int(depth.argmax()) for depth in found]
    depth = [float(depth[index]) for depth, index in zip(found, place, strict=True)]
    device = masks.device
    return torch.tensor(depth, device=device), torch.tensor(place, device=device)


def _depth(mask: np.ndarray) -> np.ndarray:
    """Euclidean distance of every pixel of a mask to its outside; 0 outside."""
    from scipy import ndimage

    depth: np.ndarray = ndimage.distance_transform_edt(np.pad(mask, 1))
    return depth[1:-1, 1:-1]


def _as_points(place: Tensor, masks: Tensor) -> Tensor:
    width = masks.shape[2]
    return torch.stack([place % width, place // width], 1).to(torch.float32)


def _check_drawable(where: str, depth: Tensor) -> None:
    if bool((depth == 0).any()):
        number = int((depth == 0).nonzero()[0])
        expected, got = "a pixel in every target", f"none in mask {number}"
        raise ValueError(message(where, expected, got, "leave that mask out"))


def _check_masks(where: str, masks: Tensor, name: str) -> None:
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        got = str(getattr(masks, "dtype", type(masks).__name__))
        fix = "compare with a threshold, as in logits > 0"
        raise TypeError(message(where, f"bool {name}", got, fix))
    if masks.ndim != 3:
        fix = "flatten batch and masks into one axis"
        raise ValueError(message(where, f"{name} [N, H, W]", shape(masks), fix))
    check_not_empty(where, masks, name=name)


def _check_uncertainty(where: str, uncertainty: Tensor, targets: Tensor) -> None:
    if not isinstance(uncertainty, Tensor) or not uncertainty.is_floating_point():
        got = str(getattr(uncertainty, "dtype", type(uncertainty).__name__))
        raise TypeError(message(where, "floating-point uncertainty", got, "convert to float32"))
    check_same_shape(where, uncertainty, targets, name="uncertainty", ref="targets")
    check_same_device(where, uncertainty, targets, name="uncertainty", reference="targets")
    fix = "make it with uncertainty_map"
    check_unit_interval(where, uncertainty.detach(), name="uncertainty", fix=fix)


def _check_points(where: str, points: Tensor, targets: Tensor) -> None:
    if not isinstance(points, Tensor) or points.shape != (len(targets), 2):
        got = shape(points) if isinstance(points, Tensor) else type(points).__name__
        expected = f"backup_points [{len(targets)}, 2]"
        raise ValueError(message(where, expected, got, "pass one (x, y) a mask"))
    if not points.is_floating_point():
        check_integer(where, points, name="backup_points")
    check_same_device(where, points, targets, name="backup_points", reference="targets")
