"""Conformally calibrated pseudo-labels for semi-supervised semantic segmentation."""

from cpseg import groups
from cpseg._version import __version__
from cpseg.calibration import Calibration, Calibrator
from cpseg.metrics import (
    boundary_iou,
    confusion_matrix,
    coverage,
    kept_share,
    mean_iou,
    set_size,
)
from cpseg.quantiles import conformal_quantile, conformal_rank
from cpseg.recalibration import Recalibration, Recalibrator
from cpseg.risk import Certifier
from cpseg.schedules import poly_lr, self_reliance_weight
from cpseg.scores import class_scores, nonconformity
from cpseg.selection import Evidence, evidence, prediction_set, pseudo_labels

__all__ = [
    "Calibration",
    "Calibrator",
    "Certifier",
    "Evidence",
    "Recalibration",
    "Recalibrator",
    "__version__",
    "boundary_iou",
    "class_scores",
    "conformal_quantile",
    "conformal_rank",
    "confusion_matrix",
    "coverage",
    "evidence",
    "groups",
    "kept_share",
    "mean_iou",
    "nonconformity",
    "poly_lr",
    "prediction_set",
    "pseudo_labels",
    "self_reliance_weight",
    "set_size",
]
