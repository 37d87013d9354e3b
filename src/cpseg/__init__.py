"""Conformally calibrated pseudo-labels for semi-supervised semantic segmentation.

The public names below are loaded on first use, so that ``cpseg --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cpseg import _moved
from cpseg._version import __version__

if TYPE_CHECKING:
    from cpseg import foundation, groups
    from cpseg.calibration import Calibration, Calibrator, Certificate
    from cpseg.certification import Certifier
    from cpseg.core import (
        Evidence,
        FeatureProjection,
        boundary_iou,
        class_scores,
        conformal_quantile,
        conformal_rank,
        confusion_matrix,
        coverage,
        evidence,
        interactive_iou,
        kept_share,
        mean_iou,
        nonconformity,
        nonconformity_map,
        prediction_set,
        pseudo_labels,
        set_size,
    )
    from cpseg.files import cross_fit
    from cpseg.recalibration import Recalibration, Recalibrator
    from cpseg.report import recommend
    from cpseg.training import (
        OnlineThreshold,
        Prompts,
        PseudoLabelled,
        TaskPrompt,
        WeakAugmentation,
        boundary_point,
        centre_point,
        certainty,
        confidence_uncertainty,
        dice_loss,
        discrepancy_uncertainty,
        focal_loss,
        jitter_boxes,
        mask_filters,
        masks_to_boxes,
        poly_lr,
        pseudo_label_loss,
        sample_prompts,
        self_reliance_loss,
        self_reliance_weight,
        sum_loss,
        uncertainty_map,
    )

__all__ = [
    "Calibration",
    "Calibrator",
    "Certificate",
    "Certifier",
    "Evidence",
    "FeatureProjection",
    "OnlineThreshold",
    "Prompts",
    "PseudoLabelled",
    "Recalibration",
    "Recalibrator",
    "TaskPrompt",
    "WeakAugmentation",
    "__version__",
    "boundary_iou",
    "boundary_point",
    "centre_point",
    "certainty",
    "class_scores",
    "confidence_uncertainty",
    "conformal_quantile",
    "conformal_rank",
    "confusion_matrix",
    "coverage",
    "cross_fit",
    "dice_loss",
    "discrepancy_uncertainty",
    "evidence",
    "focal_loss",
    "foundation",
    "groups",
    "interactive_iou",
    "jitter_boxes",
    "kept_share",
    "mask_filters",
    "masks_to_boxes",
    "mean_iou",
    "nonconformity",
    "nonconformity_map",
    "poly_lr",
    "prediction_set",
    "pseudo_label_loss",
    "pseudo_labels",
    "recommend",
    "sample_prompts",
    "self_reliance_loss",
    "self_reliance_weight",
    "set_size",
    "sum_loss",
    "uncertainty_map",
]

_HOMES = ("calibration", "certification", "core", "recalibration", "training", "files", "report")
_PACKAGES = (*_HOMES, "cli", "demo", "foundation", "groups", "jobs", "testing")


def __getattr__(name: str) -> Any:
    """A package, or a public name from the package that defines it."""
    if name in _PACKAGES or name in _moved.MOVED:
        return importlib.import_module(f"cpseg.{name}")
    if name in __all__:
        for package in _HOMES:
            module = importlib.import_module(f"cpseg.{package}")
            if name in module.__all__:
                globals()[name] = value = getattr(module, name)
                return value
    raise AttributeError(f"module 'cpseg' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})


_moved.install()
