"""Conformally calibrated pseudo-labels for semi-supervised semantic segmentation."""

from cpseg import foundation, groups
from cpseg._version import __version__
from cpseg.calibration import Calibration, Calibrator
from cpseg.losses import (
    dice_loss,
    focal_loss,
    pseudo_label_loss,
    self_reliance_loss,
    sum_loss,
)
from cpseg.mask_filtering import mask_filters
from cpseg.metrics import (
    boundary_iou,
    confusion_matrix,
    coverage,
    interactive_iou,
    kept_share,
    mean_iou,
    set_size,
)
from cpseg.online import OnlineThreshold
from cpseg.prompts import (
    Prompts,
    boundary_point,
    centre_point,
    jitter_boxes,
    masks_to_boxes,
    sample_prompts,
)
from cpseg.quantiles import conformal_quantile, conformal_rank
from cpseg.recalibration import Recalibration, Recalibrator
from cpseg.risk import Certifier
from cpseg.schedules import poly_lr, self_reliance_weight
from cpseg.scores import class_scores, nonconformity
from cpseg.selection import Evidence, evidence, prediction_set, pseudo_labels
from cpseg.task_prompt import TaskPrompt
from cpseg.training_data import PseudoLabelled, WeakAugmentation
from cpseg.uncertainty import (
    certainty,
    confidence_uncertainty,
    discrepancy_uncertainty,
    uncertainty_map,
)

__all__ = [
    "Calibration",
    "Calibrator",
    "Certifier",
    "Evidence",
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
    "poly_lr",
    "prediction_set",
    "pseudo_label_loss",
    "pseudo_labels",
    "sample_prompts",
    "self_reliance_loss",
    "self_reliance_weight",
    "set_size",
    "sum_loss",
    "uncertainty_map",
]
