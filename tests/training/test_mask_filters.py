"""The three filters of SAM's data engine, mask by mask; interactive metrics round by round."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support import oracles
from tests.support.helpers import raises, seeded

from cpseg import interactive_iou, mask_filters


def filters(logits: np.ndarray, iou: np.ndarray) -> list[bool]:
    """Paper, appendix B.1, one mask and one pixel at a time."""
    kept = []
    for mask, predicted in zip(logits, iou, strict=True):
        both = either = inside = 0
        for value in mask.ravel():
            both += value > 1 and value > -1
            either += value > 1 or value > -1
            inside += value > 0
        stable = either > 0 and both / either >= 0.95
        kept.append(bool(predicted >= 88.0 and stable and inside / mask.size < 0.95))
    return kept


@given(seed=st.integers(0, 10**6))
def test_filters_equal_loops(seed: int) -> None:
    generator = seeded(seed)
    logits = 40 * torch.randn(20, 1, 1, generator=generator)
    logits = logits + 20 * torch.randn(20, 9, 11, generator=generator)
    iou = 85 + 8 * torch.rand(20, generator=generator)
    assert mask_filters(logits, iou).tolist() == filters(logits.numpy(), iou.numpy())


def test_the_limits_are_the_papers() -> None:
    """20 x 20 pixels: 380 are 95 %."""

    def mask(sure: int, weak: int) -> torch.Tensor:
        values = torch.full((400,), -5.0)
        values[:sure], values[sure : sure + weak] = 5.0, 0.5
        return values.reshape(20, 20)

    logits = torch.stack([mask(95, 5), mask(94, 6), mask(379, 0), mask(380, 0), mask(0, 0)])
    high = torch.full((5,), 88.0)
    assert mask_filters(logits, high).tolist() == [True, False, True, False, False]
    assert not mask_filters(logits, torch.full((5,), 87.99)).any()
    assert not mask_filters(logits, torch.full((5,), math.nan)).any()
    assert mask_filters(logits, high, min_stability=94.0).tolist()[:2] == [True, True]
    assert mask_filters(logits, high, max_area=96.0).tolist()[3]


def test_thousands_at_once() -> None:
    logits = torch.full((5000, 8, 8), -9.0)
    logits[:, :4] = 9.0
    iou = torch.arange(5000) % 100.0
    assert int(mask_filters(logits, iou).sum()) == 50 * 12


LOGITS, IOU = torch.zeros(2, 3, 4), torch.full((2,), 90.0)


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        (
            {"logits": LOGITS > 0},
            TypeError,
            r"floating-point logits, got torch\.bool; pass the model's",
        ),
        ({"logits": LOGITS[None]}, ValueError, r"logits \[N, H, W\], got \[1, 2, 3, 4\]"),
        ({"predicted_iou": IOU[:1]}, ValueError, r"predicted_iou \[2\] .* got \[1\]; pass one"),
        ({"predicted_iou": IOU.long()}, TypeError, "floating-point predicted_iou"),
        ({"min_iou": 120}, ValueError, r"min_iou in 0\.\.100, got 120"),
        ({"min_iou": 0.88, "min_stability": 0.95}, ValueError, r"min_iou in percent, got 0\.88;"),
        ({"min_stability": 0.95}, ValueError, r"min_stability in percent, got 0\.95"),
        ({"max_area": 0.95}, ValueError, r"max_area in percent, got 0\.95"),
        ({"stability_offset": -1}, ValueError, "stability_offset >= 0, got -1"),
    ],
)
def test_what_is_no_mask(changes: dict[str, Any], kind: type[Exception], match: str) -> None:
    with raises(kind, "mask_filters", match):
        mask_filters(**{"logits": LOGITS, "predicted_iou": IOU, **changes})


# --- metrics over rounds -------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), ratio=st.sampled_from([0.02, 0.1]))
def test_interactive_iou_equals_loops(seed: int, ratio: float) -> None:
    draw = np.random.default_rng(seed)
    masks = np.zeros((4, 3, 14, 19), np.int64)  # three rounds and the target
    for mask in masks.reshape(-1, 14, 19):
        i, j = draw.integers(0, 10), draw.integers(0, 14)
        mask[i : i + draw.integers(0, 9), j : j + draw.integers(0, 12)] = 1
    predictions, targets = masks[:3], masks[3]
    got = interactive_iou(
        torch.from_numpy(predictions == 1), torch.from_numpy(targets == 1), dilation_ratio=ratio
    )
    for r, masks_of_round in enumerate(predictions):
        iou, bands = [], []
        for predicted, target in zip(masks_of_round, targets, strict=True):
            both, either = (predicted & target).sum(), (predicted | target).sum()
            iou.append(both / either if either else math.nan)
            found = oracles.boundary_iou(predicted[None], target[None], 2, 255, ratio)
            bands.append(found[1])
        for value, each in ((got.iou[r], iou), (got.boundary_iou[r], bands)):
            want = np.nan if np.isnan(each).all() else np.nanmean(each)
            assert np.allclose(float(value), want, rtol=1e-12, equal_nan=True)


def test_interactive_iou_says_what_is_wrong() -> None:
    masks = torch.ones(2, 3, 4, dtype=torch.bool)
    with raises(ValueError, "interactive_iou", r"got \[2, 3, 4\] and \[2, 3, 4\]; stack"):
        interactive_iou(masks, masks)
    with raises(TypeError, "interactive_iou", "bool predictions, got torch.float32"):
        interactive_iou(masks[None].float(), masks)
    with raises(ValueError, "interactive_iou", "at least one element in predictions"):
        interactive_iou(masks[None][:0], masks)
