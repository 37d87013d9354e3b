"""Functions on tensors: no state, no files."""

from cpseg.core.class_map import ClassMap, parse_class_map, read_class_map
from cpseg.core.feature_projection import FeatureProjection
from cpseg.core.metrics import (
    InteractiveIoU,
    boundary_iou,
    confusion_matrix,
    coverage,
    interactive_iou,
    kept_share,
    mean_iou,
    set_size,
)
from cpseg.core.nonconformity import class_scores, nonconformity, nonconformity_map
from cpseg.core.quantiles import conformal_quantile, conformal_rank
from cpseg.core.reliability import Reliability
from cpseg.core.selection import Evidence, evidence, prediction_set, pseudo_labels

__all__ = [
    "ClassMap",
    "Evidence",
    "FeatureProjection",
    "InteractiveIoU",
    "Reliability",
    "boundary_iou",
    "class_scores",
    "conformal_quantile",
    "conformal_rank",
    "confusion_matrix",
    "coverage",
    "evidence",
    "interactive_iou",
    "kept_share",
    "mean_iou",
    "nonconformity",
    "nonconformity_map",
    "parse_class_map",
    "prediction_set",
    "pseudo_labels",
    "read_class_map",
    "set_size",
]
