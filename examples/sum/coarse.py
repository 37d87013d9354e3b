"""Coarse masks: SAM's automatic generation, or one point in each labelled mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from transformers import SamModel

from cpseg import mask_filters, masks_to_boxes, sample_prompts
from sam_data import VOID, Example
from sam_model import Prompted, encode, enlarge, frame_size, mask_size, pick, predict

BATCH = 64  # points per call
NOTHING = -20.0  # logit everywhere where no mask passed


class Filters(NamedTuple):
    """Limits for masks (appendix B.1), in percent, and the IoU above which boxes are duplicates."""

    min_iou: float = 88.0
    min_stability: float = 95.0
    max_area: float = 95.0
    nms: float = 0.7


@torch.no_grad()
def from_grid(
    model: SamModel, example: Example, grid: int, filters: Filters
) -> tuple[Tensor, Tensor]:
    """SAM's automatic generation: ``grid * grid`` points, one at a time, three masks each.

    Only ``pixels`` and ``size`` of the example are used.

    Returns:
        Logits ``[M, h, w]`` of the image without padding, best predicted IoU first, and the points
        from which they were made, ``[M, 2]`` as (x, y) in the frame. M may be 0.
    """
    embedding = encode(model, example.pixels[None])
    points = _grid(grid, example.size).to(embedding.device)
    logits, iou, origin = [], [], []
    for batch in points.split(BATCH):
        small, predicted = _ask(model, embedding, batch)
        # This filter removes most masks, so it comes first.
        rows, which = (100 * predicted >= filters.min_iou).nonzero(as_tuple=True)
        if len(rows) == 0:
            continue
        for part in torch.arange(len(rows), device=rows.device).split(BATCH):
            row, candidate = rows[part], which[part]
            masks, mask_iou = small[row, candidate], predicted[row, candidate]
            good = _passes(_inside(masks, example, model), mask_iou, filters)
            logits.append(masks[good])
            iou.append(mask_iou[good])
            origin.append(batch[row][good])
    if sum(map(len, logits)) == 0:
        return embedding.new_zeros(0, *_small_size(model, example.size)), points[:0]
    small, predicted, origins = torch.cat(logits), torch.cat(iou), torch.cat(origin)
    boxes = torch.cat([masks_to_boxes(_inside(s, example, model) > 0) for s in small.split(BATCH)])
    kept = distinct(boxes, predicted, filters.nms)
    return _cut(small[kept], model, example.size), origins[kept]


@torch.no_grad()
def from_masks(
    model: SamModel, example: Example, filters: Filters, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """One random point in every true mask; of its three masks the one closest to it (D.2).

    Returns:
        Logits ``[M, h, w]``, points ``[M, 2]`` in the frame, and bool ``[M]``, True where the mask
        passes the filters.
    """
    embedding = encode(model, example.pixels[None])
    targets = example.masks == 1
    drawn = sample_prompts(targets.cpu(), box_share=0.0, generator=generator)
    points = drawn.points.to(embedding.device)
    logits, passed = [], []
    for rows in torch.arange(len(points), device=points.device).split(BATCH // 4):
        small, predicted = _ask(model, embedding, points[rows])
        valid = (example.masks[rows] != VOID)[:, None]
        now = (enlarge(small, frame_size(model)) > 0) & valid
        truth = targets[rows][:, None]
        best = ((now & truth).flatten(2).sum(2) / (now | truth).flatten(2).sum(2)).argmax(1)
        chosen, iou = pick(small, best)[:, 0], pick(predicted, best)[:, 0]
        logits.append(chosen)
        passed.append(_passes(_inside(chosen, example, model), iou, filters))
    return _cut(torch.cat(logits), model, example.size), points, torch.cat(passed)


def distinct(boxes: Tensor, scores: Tensor, limit: float) -> Tensor:
    """Non-maximum suppression: drop a box whose IoU with a better kept box is above ``limit``.

    Returns the indices of the boxes kept, best first. Boxes are (x0, y0, x1, y1) with both ends
    inside, ``[M, 4]``.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    both = (high - low + 1).clamp(min=0).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    alike = (both / (area[:, None] + area - both) > limit).cpu()
    kept = torch.ones(len(boxes), dtype=torch.bool)
    for k in range(len(boxes)):
        if kept[k]:
            kept[k + 1 :] &= ~alike[k, k + 1 :]
    return order[kept.to(order.device)]


def _grid(number: int, size: tuple[int, int]) -> Tensor:
    """The centres of ``number * number`` equal parts of the image, ``[N, 2]`` as (x, y)."""
    middles = (torch.arange(number) + 0.5) / number
    y, x = torch.meshgrid(middles * size[0] - 0.5, middles * size[1] - 0.5, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def _ask(model: SamModel, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Three masks ``[R, 3, L, L]`` for each point, and their predicted IoU ``[R, 3]``."""
    labels = torch.ones(len(points), 1, dtype=torch.int64, device=points.device)
    prompts = Prompted(points[:, None], labels, None, labels[:, 0] == 0)
    rows = embedding.expand(len(points), -1, -1, -1)
    return predict(model, rows, prompts, several=True)


def _inside(small: Tensor, example: Example, model: SamModel) -> Tensor:
    """Logits ``[M, L, L]`` at the size of the frame, without the padding."""
    height, width = example.size
    return enlarge(small[:, None], frame_size(model))[:, 0, :height, :width]


def _passes(logits: Tensor, iou: Tensor, filters: Filters) -> Tensor:
    limits = {"min_iou": filters.min_iou, "min_stability": filters.min_stability}
    return mask_filters(logits, 100 * iou, max_area=filters.max_area, **limits)


def _small_size(model: SamModel, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the image in the model's masks, rounded."""
    share = mask_size(model) / frame_size(model)
    return max(1, round(size[0] * share)), max(1, round(size[1] * share))


def _cut(small: Tensor, model: SamModel, size: tuple[int, int]) -> Tensor:
    """The part of logits ``[M, L, L]`` that the image covers, resampled at its edges."""
    height, width = _small_size(model, size)
    side = frame_size(model)
    y = (torch.arange(height, device=small.device) + 0.5) / height * 2 * size[0] / side - 1
    x = (torch.arange(width, device=small.device) + 0.5) / width * 2 * size[1] / side - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2).to(small.dtype)
    return grid_sample(
        small[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False
    )[0]
