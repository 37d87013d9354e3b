"""The mask-refinement module of SUM, and its uncertainty maps (section 3.2.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import SamModel

from cpseg import (
    confidence_uncertainty,
    discrepancy_uncertainty,
    masks_to_boxes,
    sum_loss,
    uncertainty_map,
)
from sam_data import VOID, Example
from sam_model import Prompted, encode, enlarge, frame_size, mask_size, predict, shrink


def good_pairs(example: Example, least: float = 0.7) -> Tensor:
    """The masks whose coarse version has an IoU of at least ``least`` (appendix D.2)."""
    assert example.coarse is not None
    valid = example.masks != VOID
    truth, coarse = example.masks == 1, (example.coarse > 0) & valid
    both = (truth & coarse).flatten(1).sum(1)
    iou = both / (truth | coarse).flatten(1).sum(1)
    return (iou >= least).nonzero().squeeze(1)


def refine(model: SamModel, embedding: Tensor, example: Example) -> tuple[Tensor, Tensor]:
    """Refined logits ``[M, 1, L, L]`` and predicted IoU of the coarse masks of an image.

    Prompts are the coarse logits, the box around the coarse mask and the point of its origin;
    ``embedding`` is ``[1, C, h, w]``.
    """
    assert example.coarse is not None
    return predict(
        model,
        embedding.expand(len(example.points), -1, -1, -1),
        _prompts(example, example.coarse > 0),
        shrink(example.coarse, mask_size(model)),
        all_points=True,
    )


def refinement_loss(model: SamModel, example: Example) -> Tensor:
    """Loss of the refined masks against the true ones; the image encoder is not trained."""
    with torch.no_grad():
        embedding = encode(model, example.pixels[None])
    logits, iou = refine(model, embedding, example)
    return sum_loss(enlarge(logits, frame_size(model)), example.masks, predicted_iou=iou)


@torch.no_grad()
def uncertainty_of(kind: str, model: SamModel, example: Example) -> Tensor:
    """Uncertainty of the coarse masks of an image, float16 ``[M, L, L]``.

    ``sum``: eq. 3, where ``model`` is the refinement module. ``confidence``: the entropy of the
    coarse logits. ``discrepancy``: the distance between a coarse mask and what ``model`` predicts
    for its box.
    """
    assert example.coarse is not None
    coarse = shrink(example.coarse, mask_size(model))
    if kind == "confidence":
        return confidence_uncertainty(coarse).to(torch.float16)
    embedding = encode(model, example.pixels[None])
    if kind == "sum":
        return uncertainty_map(coarse, refine(model, embedding, example)[0])[:, 0].to(torch.float16)
    rows = embedding.expand(len(example.points), -1, -1, -1)
    other, _ = predict(model, rows, _prompts(example, example.coarse > 0))
    return discrepancy_uncertainty(coarse, other).to(torch.float16)


def _prompts(example: Example, masks: Tensor) -> Prompted:
    count = len(masks)
    boxed = torch.ones(count, dtype=torch.bool, device=masks.device)
    labels = torch.ones(count, 1, dtype=torch.int64, device=masks.device)
    return Prompted(example.points[:, None], labels, masks_to_boxes(masks), boxed)


def map_metadata(
    kind: str, settings: dict[str, Any], inputs: str, refined: str | None
) -> dict[str, Any]:
    """What a map depends on, as metadata of its file; if it changes, the map is written again.

    ``inputs`` is a digest of the image and its coarse file, ``refined`` one of the refinement
    module.
    """
    about = {"kind": "uncertainty", "uncertainty": kind, "settings": settings}
    return about | {"inputs": inputs, "refined": refined}
