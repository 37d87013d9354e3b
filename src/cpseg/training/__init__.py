"""What a training loop calls: losses and prompts of SUM, schedules and data of ConformalSAM."""

from cpseg.training.dataset import PseudoLabelled, WeakAugmentation
from cpseg.training.losses import (
    dice_loss,
    focal_loss,
    pseudo_label_loss,
    self_reliance_loss,
    sum_loss,
)
from cpseg.training.mask_filters import mask_filters
from cpseg.training.online_threshold import OnlineThreshold
from cpseg.training.prompts import (
    Prompts,
    boundary_point,
    centre_point,
    jitter_boxes,
    masks_to_boxes,
    sample_prompts,
)
from cpseg.training.schedules import poly_lr, self_reliance_weight
from cpseg.training.task_prompt import TaskPrompt
from cpseg.training.uncertainty import (
    certainty,
    confidence_uncertainty,
    discrepancy_uncertainty,
    uncertainty_map,
)

__all__ = [
    "OnlineThreshold",
    "Prompts",
    "PseudoLabelled",
    "TaskPrompt",
    "WeakAugmentation",
    "boundary_point",
    "centre_point",
    "certainty",
    "confidence_uncertainty",
    "dice_loss",
    "discrepancy_uncertainty",
    "focal_loss",
    "jitter_boxes",
    "mask_filters",
    "masks_to_boxes",
    "poly_lr",
    "pseudo_label_loss",
    "sample_prompts",
    "self_reliance_loss",
    "self_reliance_weight",
    "sum_loss",
    "uncertainty_map",
]
