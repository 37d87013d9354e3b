"""Select the masks of SAM's automatic generation that are good enough as pseudo-labels."""

from __future__ import annotations

from torch import Tensor

from cpseg._internal.checks import (
    check_float,
    check_not_empty,
    check_same_device,
    is_number,
    message,
    shape,
    short,
)


def mask_filters(
    logits: Tensor,
    predicted_iou: Tensor,
    *,
    min_iou: float = 88.0,
    min_stability: float = 95.0,
    stability_offset: float = 1.0,
    max_area: float = 95.0,
) -> Tensor:
    """Masks that pass the three filters of SAM's data engine; all limits are in percent.

    A mask passes if its predicted IoU is at least ``min_iou``, its stability (the IoU of the masks
    ``logits > +offset`` and ``logits > -offset``) is at least ``min_stability``, and the mask
    ``logits > 0`` covers less than ``max_area`` of the image.

    Args:
        logits: mask logits, float ``[N, H, W]``.
        predicted_iou: the model's own estimate of the IoU, **in percent**, float ``[N]``. SAM's
            head predicts a share in [0, 1]: multiply it by 100.
        min_iou: smallest predicted IoU that passes.
        min_stability: smallest stability that passes.
        stability_offset: distance of the two thresholds from 0, in logits.
        max_area: a mask must cover less than this.

    Returns:
        bool ``[N]``. An empty mask (no logit above ``-offset``) does not pass, nor does NaN.

    Raises:
        ValueError: shapes or devices do not match, or a limit lies outside 0..100.
        TypeError: not floating point.

    Reference:
        SUM (NeurIPS 2024), appendix B.1; Kirillov et al. (2023), Segment Anything, appendix B.

    Example:
        >>> logits = torch.full((2, 4, 4), -9.0)
        >>> logits[:, :2] = 9.0
        >>> mask_filters(logits, torch.tensor([93.0, 70.0]))
        tensor([ True, False])
    """
    where = "mask_filters"
    for name, values in (("logits", logits), ("predicted_iou", predicted_iou)):
        check_float(where, values, name=name, fix="pass the model's output, before any threshold")
    if logits.ndim != 3:
        fix = "flatten batch and masks into one axis"
        raise ValueError(message(where, "logits [N, H, W]", shape(logits), fix))
    check_not_empty(where, logits, name="logits")
    if predicted_iou.shape != logits.shape[:1]:
        expected = f"predicted_iou [{len(logits)}] for logits {shape(logits)}"
        raise ValueError(message(where, expected, shape(predicted_iou), "pass one value per mask"))
    check_same_device(where, predicted_iou, logits, name="predicted_iou", reference="logits")
    limits = {"min_iou": min_iou, "min_stability": min_stability, "max_area": max_area}
    for name, limit in limits.items():
        if not is_number(limit, 0, 100):
            raise ValueError(message(where, f"{name} in 0..100", short(limit), "pass percent"))
        if 0 < limit <= 1:
            fix = "pass percent, such as 88.0"
            raise ValueError(message(where, f"{name} in percent", f"{float(limit):g}", fix))
    if not is_number(stability_offset, 0):
        got, fix = short(stability_offset), "SAM uses 1"
        raise ValueError(message(where, "stability_offset >= 0", got, fix))
    pixels = logits.shape[1] * logits.shape[2]
    # The smaller mask is part of the larger one, so their IoU is the ratio of their areas.
    small, mask, large = (
        (logits > edge).sum((1, 2)) for edge in (stability_offset, 0.0, -stability_offset)
    )
    stable = (large > 0) & (100 * small >= min_stability * large)
    return (predicted_iou >= min_iou) & stable & (100 * mask < max_area * pixels)
