"""Maps of how reliable pseudo-labels are.

Uncertainty from models, for the losses of SUM, and certainty from conformal calibration. Both lie
in [0, 1]; uncertainty is one minus certainty and is the argument ``uncertainty=`` of a loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from cpseg._internal.checks import (
    check_float,
    check_labels,
    check_not_empty,
    check_probs,
    check_same_device,
    check_same_shape,
    message,
    shape,
)
from cpseg.calibration.calibration import Calibration
from cpseg.calibration.calibrator import Calibrator
from cpseg.core.nonconformity import nonconformity_unchecked
from cpseg.core.selection import Evidence, threshold_of
from cpseg.groups.resampling import to_image
from cpseg.recalibration.sources import Probs


def uncertainty_map(logits: Tensor, refined_logits: Tensor) -> Tensor:
    """How much a refinement module, trained on good labels, changes the prediction.

    ``|sigma(s) - sigma(r)|`` for each element: 0 where both agree, 1 where they contradict.

    Args:
        logits: logits of the pseudo-label, float, any shape.
        refined_logits: logits of the refinement module, float, the same shape.

    Returns:
        float32 (float64 for float64), of the same shape; no gradient.

    Raises:
        ValueError: shapes or devices differ.
        TypeError: not floating point.

    Reference:
        SUM (NeurIPS 2024), eq. 3.

    Example:
        >>> uncertainty_map(torch.tensor([0.0, 9.0]), torch.tensor([0.0, -9.0]))
        tensor([0.0000, 0.9998])
    """
    _check_pair("uncertainty_map", logits, refined_logits, "refined_logits")
    return (_float(logits).sigmoid() - _float(refined_logits).sigmoid()).abs()


def confidence_uncertainty(logits: Tensor) -> Tensor:
    """Entropy of a model's prediction, as a share of the largest possible entropy.

    The alternative "Confidence-Uncertainty" of the paper: 0 where the model is certain, 1 where all
    classes are equally probable. It cannot find errors about which the model is certain.

    Args:
        logits: float ``[B, 1, H, W]`` (sigmoid) or ``[B, K, H, W]`` (softmax).

    Returns:
        float32 (float64 for float64) ``[B, H, W]`` in [0, 1]; no gradient.

    Raises:
        ValueError: not four-dimensional, or empty.
        TypeError: not floating point.

    Reference:
        SUM (NeurIPS 2024), section 4.2; Wang et al. (2022), U2PL, eq. 3.

    Example:
        >>> confidence_uncertainty(torch.tensor([0.0, 9.0]).reshape(1, 1, 1, 2))
        tensor([[[1.0000, 0.0018]]])
    """
    _check_maps("confidence_uncertainty", logits, "logits")
    log_p = _log_probs(logits)
    return -(log_p.exp() * log_p).sum(1).div(math.log(log_p.shape[1])).clamp(-1, 0)


def discrepancy_uncertainty(logits: Tensor, other_logits: Tensor) -> Tensor:
    """Distance between two predictions of a pixel: of two heads, or of teacher and student.

    The alternative "Discrepancy-Uncertainty" of the paper: the total variation distance of the two
    distributions. For one channel it is ``|sigma(a) - sigma(b)|``.

    Args:
        logits: float ``[B, 1, H, W]`` (sigmoid) or ``[B, K, H, W]`` (softmax).
        other_logits: the other prediction, float, the same shape.

    Returns:
        float32 (float64 for float64) ``[B, H, W]`` in [0, 1]; no gradient.

    Raises:
        ValueError: not four-dimensional, shapes or devices differ, or empty.
        TypeError: not floating point.

    Reference:
        SUM (NeurIPS 2024), section 4.2; Zheng & Yang (2021).

    Example:
        >>> even, sure = torch.zeros(1, 3, 1, 1), torch.tensor([9.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
        >>> discrepancy_uncertainty(even, sure)
        tensor([[[0.6664]]])
    """
    where = "discrepancy_uncertainty"
    _check_maps(where, logits, "logits")
    _check_pair(where, logits, other_logits, "other_logits")
    difference = _log_probs(logits).exp() - _log_probs(other_logits).exp()
    return difference.abs().sum(1).div(2).clamp(max=1)


def certainty(
    probs: Probs | Evidence,
    calibration: Calibration | Calibrator,
    *,
    labels: Tensor | None = None,
) -> Tensor:
    """Conformal certainty of the chosen label, to weight pseudo-labels instead of removing some.

    - With a :class:`Calibrator`, which holds all scores: the conformal p-value of the label, see
      :meth:`Calibrator.p_values`. It is above alpha exactly where the label is in the set at alpha.
    - With a :class:`Calibration`, which holds one threshold q per cell: ``1 - score / q`` inside
      the set, and 0 outside and at q. It keeps the order of the nonconformity scores, but it is not
      a p-value, and it changes with the alpha of the calibration.

    Both are 0 where there is no label, and where nothing is known: the cell has no scores, or its
    threshold is infinite.

    Args:
        probs: class probabilities, float, ``[B, K, H, W]`` or ``[K, H, W]``, of several sources
            those that the calibration takes; or their :class:`Evidence`, with a ``Calibration``
            and without ``labels``.
        calibration: a calibration of the same model.
        labels: the chosen labels, integer ``[B, H, W]`` or ``[H, W]``; with a ``Calibration`` they
            are its pseudo-labels by default.

    Returns:
        float32 in [0, 1], of the shape of the labels.

    Raises:
        ValueError: shapes, devices or classes do not match, labels are missing for a
            ``Calibrator``, a ``Calibration`` has another score than LAC, or what
            :meth:`Calibrator.p_values` raises.
        TypeError: wrong dtypes, or ``calibration`` is neither of the two.

    Guarantee:
        None for the chosen label: coverage is a guarantee about the true label.

    Reference:
        Vovk, Gammerman & Shafer (2005), section 2.2, for p-values.

    Example:
        >>> calibration = Calibration(torch.tensor([[0.8, 0.8]]), torch.tensor([[99, 99]]),
        ...                           alpha=0.1, num_images=99, num_classes=2)
        >>> certainty(torch.tensor([[[0.9, 0.6]], [[0.1, 0.4]]]), calibration)
        tensor([[0.8750, 0.5000]])
    """
    where = "certainty"
    if isinstance(probs, Evidence):
        return _of_evidence(where, probs, calibration, labels)
    if not isinstance(calibration, Calibration | Calibrator):
        expected, got = "a Calibration or a Calibrator", type(calibration).__name__
        raise TypeError(message(where, expected, got, "pass a calibration of this model"))
    ignore_index = calibration.ignore_index
    if isinstance(calibration, Calibrator):
        if labels is None:
            fix = "pass calibrator.compute().pseudo_labels(probs)"
            raise ValueError(message(where, "labels with a Calibrator", "none", fix))
        p_values, count = calibration.p_values_and_counts(probs, labels, where=where)
        unknown = (labels.to(torch.int64) == ignore_index) | (count == 0)
        return p_values.masked_fill(unknown, 0).to(torch.float32)
    if calibration.score != "lac":
        got, fix = repr(calibration.score), "pass the Calibrator"
        raise ValueError(message(where, "a calibration of the lac score", got, fix))
    joined = calibration.join(probs, where=where)
    if labels is None:
        labels = calibration.pseudo_labels(joined)
    else:
        check_labels(where, labels, joined)
    check_same_device(where, calibration.threshold, joined, name="calibration", reference="probs")
    if calibration.recalibration is not None:
        joined = calibration.recalibration(joined)
    score = nonconformity_unchecked(where, joined, labels, ignore_index)
    return _graded(score, labels, calibration)


def _of_evidence(
    where: str, evidence: Evidence, calibration: Calibration | Calibrator, labels: Tensor | None
) -> Tensor:
    """Certainty of the labels that a calibration selects from evidence."""
    if not isinstance(calibration, Calibration) or labels is not None:
        got = "labels as well" if labels is not None else type(calibration).__name__
        expected, fix = "evidence with a Calibration alone", "pass the probabilities"
        raise ValueError(message(where, expected, got, fix))
    selected = calibration.pseudo_labels(evidence)
    score = evidence.score_of(selected, ignore_index=calibration.ignore_index)
    return _graded(score, selected, calibration)


def _graded(score: Tensor, labels: Tensor, calibration: Calibration) -> Tensor:
    """``1 - score / q`` inside the set; 0 outside, and where q is infinite or the score is NaN."""

    def of_label(threshold: Tensor) -> Tensor:
        threshold = to_image(threshold, (score.shape[-2], score.shape[-1]))
        return threshold_of(labels, threshold, ignore_index=calibration.ignore_index)

    threshold = of_label(calibration.threshold)
    inside = (score <= threshold) & threshold.isfinite()
    if calibration.class_threshold is not None:
        inside &= score <= of_label(calibration.class_threshold)
    graded = torch.where(threshold == 0, 1.0, 1 - score / threshold)
    return torch.where(inside, graded, 0.0)


def _log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities ``[B, K, H, W]``; a single channel becomes two classes."""
    values = _float(logits)
    if values.shape[1] == 1:
        return torch.cat([logsigmoid(-values), logsigmoid(values)], 1)
    return log_softmax(values, dim=1)


def _float(logits: Tensor) -> Tensor:
    """At least float32, and detached from the graph, because uncertainty is only a weight."""
    values = logits.detach()
    return values if values.dtype == torch.float64 else values.to(torch.float32)


def _check_maps(where: str, logits: Tensor, name: str) -> None:
    check_probs(where, logits, name=name)
    if logits.ndim != 4:
        expected, fix = f"{name} [B, 1, H, W] or [B, K, H, W]", "add the batch axis"
        raise ValueError(message(where, expected, shape(logits), fix))


def _check_pair(where: str, logits: Tensor, other: Tensor, name: str) -> None:
    check_float(where, logits, name="logits", fix="pass logits")
    check_float(where, other, name=name, fix="pass logits")
    check_same_shape(where, other, logits, name=name, ref="logits")
    check_same_device(where, other, logits, name=name, reference="logits")
    check_not_empty(where, logits, name="logits")
