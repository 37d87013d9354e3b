"""The public names, written out: a change here is a change for everyone who imports cpseg."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest

import cpseg
from cpseg import (
    Calibration,
    Calibrator,
    Certifier,
    Evidence,
    OnlineThreshold,
    Recalibration,
    Recalibrator,
    foundation,
    groups,
)

NAMES = [
    "Calibration",
    "Calibrator",
    "Certificate",
    "Certifier",
    "Evidence",
    "FeatureProjection",
    "OnlineThreshold",
    "Recalibration",
    "Recalibrator",
    "__version__",
    "boundary_iou",
    "class_scores",
    "confusion_matrix",
    "conformal_quantile",
    "conformal_rank",
    "coverage",
    "cross_fit",
    "evidence",
    "groups",
    "kept_share",
    "mean_iou",
    "nonconformity",
    "nonconformity_map",
    "poly_lr",
    "prediction_set",
    "pseudo_labels",
    "self_reliance_weight",
    "set_size",
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
    "foundation",
    "interactive_iou",
    "jitter_boxes",
    "mask_filters",
    "masks_to_boxes",
    "pseudo_label_loss",
    "recommend",
    "sample_prompts",
    "self_reliance_loss",
    "sum_loss",
    "uncertainty_map",
]

# What may be given by position, then what only by name (= where it has a default).
SIGNATURES: dict[Any, tuple[list[str], list[str]]] = {
    cpseg.nonconformity: (["probs", "labels"], ["score=", "ignore_index=", "generator="]),
    cpseg.nonconformity_map: (["probs"], ["score=", "generator="]),
    cpseg.conformal_rank: (["n", "alpha"], []),
    cpseg.conformal_quantile: (["scores", "alpha"], ["dim=", "rule="]),
    cpseg.prediction_set: (["probs", "threshold"], ["score=", "generator="]),
    cpseg.pseudo_labels: (["probs", "threshold"], ["background", "ignore_index=", "dtype="]),
    cpseg.evidence: (["probs"], ["background"]),
    cpseg.confusion_matrix: (
        ["predictions", "labels"],
        ["num_classes", "ignore_index=", "with_ignored="],
    ),
    cpseg.mean_iou: (["confusion"], ["per_class="]),
    cpseg.boundary_iou: (
        ["predictions", "labels"],
        ["num_classes", "ignore_index=", "dilation_ratio=", "per_class="],
    ),
    cpseg.recommend: (
        ["scores", "masks"],
        [
            *("background=", "alpha=", "methods=", "prior_powers=", "context=", "folds="),
            *("names=", "models=", "student=", "seed="),
        ],
    ),
    cpseg.cross_fit: (["images", "folds=", "seed="], []),
    cpseg.coverage: (["prediction_set", "labels"], ["ignore_index="]),
    cpseg.set_size: (["prediction_set"], []),
    cpseg.kept_share: (["pseudo_labels"], ["ignore_index="]),
    cpseg.self_reliance_weight: (["step", "total_steps"], ["start=", "initial=", "decay="]),
    cpseg.interactive_iou: (["predictions", "targets"], ["dilation_ratio="]),
    cpseg.uncertainty_map: (["logits", "refined_logits"], []),
    cpseg.confidence_uncertainty: (["logits"], []),
    cpseg.discrepancy_uncertainty: (["logits", "other_logits"], []),
    cpseg.certainty: (["probs", "calibration"], ["labels="]),
    cpseg.focal_loss: (
        ["logits", "targets"],
        ["uncertainty=", "balance=", "gamma=", "ignore_index=", "reduction="],
    ),
    cpseg.dice_loss: (
        ["logits", "targets"],
        ["uncertainty=", "certainty_threshold=", "smooth=", "ignore_index=", "reduction="],
    ),
    cpseg.sum_loss: (
        ["logits", "targets"],
        [
            "uncertainty=",
            "focal_weight=",
            "dice_weight=",
            "predicted_iou=",
            "iou_weight=",
            "balance=",
            "gamma=",
            "certainty_threshold=",
            "smooth=",
            "ignore_index=",
            "reduction=",
        ],
    ),
    cpseg.pseudo_label_loss: (
        ["logits", "pseudo_labels"],
        ["ignore_index=", "normalize=", "valid=", "certainty="],
    ),
    cpseg.self_reliance_loss: (["loss_x", "loss_u", "weight"], []),
    cpseg.sample_prompts: (
        ["targets", "predictions="],
        ["uncertainty=", "box_share=", "box_noise=", "backup_points=", "generator="],
    ),
    cpseg.masks_to_boxes: (["masks"], []),
    cpseg.jitter_boxes: (["boxes", "size"], ["noise=", "most=", "generator="]),
    cpseg.centre_point: (["targets", "predictions="], []),
    cpseg.boundary_point: (["targets"], ["distance="]),
    cpseg.mask_filters: (
        ["logits", "predicted_iou"],
        ["min_iou=", "min_stability=", "stability_offset=", "max_area="],
    ),
    cpseg.TaskPrompt: (["num_tasks", "dim"], []),
    cpseg.TaskPrompt.forward: (["self", "image_embedding", "tasks"], []),
    cpseg.PseudoLabelled: (
        ["images", "scores", "calibration"],
        ["transform=", "labelled=", "mean=", "std="],
    ),
    cpseg.PseudoLabelled.from_folders: (
        ["root", "ids", "probs", "calibration"],
        [
            *("labelled=", "repeat_labelled=", "masks=", "features=", "transform=", "mean="),
            *("std=", "as_dict="),
        ],
    ),
    cpseg.WeakAugmentation.__call__: (
        ["self", "image", "labels", "certainty="],
        ["generator="],
    ),
    cpseg.poly_lr: (["step", "total_steps"], ["base_lr", "power="]),
    OnlineThreshold: (
        ["num_classes"],
        ["alpha=", "per_class=", "decay=", "stride=", "ignore_index="],
    ),
    OnlineThreshold.update: (["self", "logits", "labels"], []),
    OnlineThreshold.threshold: (["self"], []),
    OnlineThreshold.gate: (["self", "logits"], []),
    OnlineThreshold.sync: (["self", "process_group="], []),
    OnlineThreshold.state_dict: (["self"], []),
    OnlineThreshold.load_state_dict: (["self", "state"], []),
    groups.pixel: (["size"], ["device="]),
    groups.image: (["size"], ["device="]),
    groups.blocks: (["size", "block"], ["device="]),
    foundation.load: (
        ["model", "classes="],
        [
            "background",
            "class_map=",
            "device=",
            "amp=",
            "tile=",
            "overlap=",
            "revision=",
            "local_files_only=",
        ],
    ),
    foundation.read_classes: (["path"], []),
    foundation.parse_classes: (["lines"], ["where="]),
    Calibrator: (
        ["groups"],
        [
            "alpha=",
            "background=",
            "num_classes=",
            "per_class=",
            "max_images=",
            "score=",
            "ignore_index=",
            "unit=",
            "fallback=",
            "generator=",
            "recalibration=",
            "variant=",
            "provenance=",
        ],
    ),
    Calibrator.update: (["self", "probs", "labels"], ["ids="]),
    Calibrator.update_scores: (["self", "scores"], []),
    Calibrator.p_values: (["self", "probs", "labels"], []),
    Calibrator.p_values_and_counts: (["self", "probs", "labels"], ["where="]),
    Calibrator.merge: (["self", "other"], []),
    Calibrator.sync: (["self", "process_group="], []),
    Calibrator.compute: (["self", "alpha="], []),
    Certifier: (
        ["calibrator"],
        [
            *("alphas=", "max_error=", "delta=", "method=", "per=", "pvalue=", "per_class="),
            *("max_pixels=", "seed="),
        ],
    ),
    Certifier.learn_order: (["self", "probs", "labels"], ["ids="]),
    Certifier.update: (["self", "probs", "labels"], ["ids="]),
    Certifier.merge: (["self", "other"], []),
    Certifier.sync: (["self", "process_group="], []),
    Certifier.compute: (["self", "max_error="], []),
    Calibration.guarantee: (["self"], []),
    Calibration.summary: (["self", "names="], []),
    Calibration.plot: (["self", "names="], []),
    Calibration.resize: (["self", "size"], []),
    Calibration.to: (["self", "device"], []),
    Calibration.prediction_set: (["self", "probs"], ["generator="]),
    Calibration.evidence: (["self", "probs"], []),
    Calibration.pseudo_labels: (["self", "probs"], ["dtype="]),
    Calibration.save: (["self", "path"], []),
    Calibration.load: (["path"], []),
    Calibration.from_parts: (["tensors", "metadata"], ["where="]),
    Evidence.pseudo_labels: (["self", "threshold"], ["ignore_index=", "dtype="]),
    Evidence.score_of: (["self", "labels"], ["ignore_index="]),
    Evidence.argmax: (["self"], ["dtype="]),
    Recalibrator: (
        ["num_classes"],
        [
            *("method=", "scores=", "context=", "budget=", "seed=", "folds=", "ignore_index="),
            *("sources=", "features=", "colour="),
        ],
    ),
    Recalibrator.update: (["self", "probs", "labels"], ["ids="]),
    Recalibrator.merge: (["self", "other"], []),
    Recalibrator.sync: (["self", "process_group="], []),
    Recalibrator.fit: (["self"], []),
    Recalibration.join: (["self", "probs"], ["check_values=", "where="]),
    Calibration.join: (["self", "probs"], ["check_values=", "where="]),
    Recalibration.evidence: (["self", "probs"], ["background="]),
    Recalibration.with_prior_power: (["self", "tau"], []),
    Recalibration.divide_prior: (["self", "probs", "tau"], []),
    Recalibration.to: (["self", "device"], []),
    Recalibration.correspondence: (["self", "top="], []),
    Recalibration.describe: (["self", "source_names=", "names="], []),
    Recalibration.tensors: (["self"], []),
    Recalibration.metadata: (["self"], []),
    Recalibration.from_parts: (["tensors", "metadata"], ["where="]),
    Recalibration.save: (["self", "path"], []),
    Recalibration.load: (["path"], []),
}
DEFAULTS = {"score": "lac", "ignore_index": 255, "alpha": 0.05, "rule": "conformal", "dim": 0}


def test_public_names() -> None:
    assert sorted(cpseg.__all__) == sorted(NAMES)
    assert len(set(cpseg.__all__)) == len(cpseg.__all__)
    assert all(hasattr(cpseg, name) for name in NAMES)


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([.-]?\w+)*", cpseg.__version__)


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signatures(function: Any) -> None:
    parameters = inspect.signature(function).parameters.values()

    def written(kinds: tuple[Any, ...]) -> list[str]:
        some = [p for p in parameters if p.kind in kinds]
        return [p.name + ("" if p.default is p.empty else "=") for p in some]

    by_position, by_name = SIGNATURES[function]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert written(positional) == by_position
    assert written((inspect.Parameter.KEYWORD_ONLY,)) == by_name
    assert len(by_position) + len(by_name) == len(parameters), "no *args or **kwargs"
    for p in parameters:
        if p.name in DEFAULTS and p.default not in (p.empty, None):
            assert p.default == DEFAULTS[p.name]


def test_every_public_function_has_its_signature_above() -> None:
    functions = [getattr(cpseg, name) for name in NAMES]
    functions = [f for f in functions if inspect.isfunction(f)]
    kinds = (Calibrator, Calibration, Certifier, Evidence, Recalibrator, Recalibration)
    for kind in (*kinds, OnlineThreshold):
        methods = inspect.getmembers(kind, lambda m: inspect.isfunction(m) or inspect.ismethod(m))
        functions += [m for name, m in methods if not name.startswith("_")]
    for function in functions:
        assert function in SIGNATURES, function


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_everything_public_is_documented(function: Any) -> None:
    doc = inspect.getdoc(function) or ""
    assert doc.splitlines()[0].strip(), function
    short = len(inspect.signature(function).parameters) <= 2 and inspect.isfunction(function)
    if not short or "self" not in inspect.signature(function).parameters:
        has = [part for part in ("Args:", "Returns:", "Example:", "Raises:") if part in doc]
        assert has, function
    if not function.__qualname__.count("."):
        assert "Example:" in doc, "a function says how it is called"
        assert "Args:" in doc


def test_what_promises_coverage_says_of_what() -> None:
    for promise in (
        cpseg.conformal_quantile,
        cpseg.prediction_set,
        Calibrator,
        Calibration,
        Certifier,
        OnlineThreshold,
    ):
        assert "Guarantee:" in (inspect.getdoc(promise) or "")


def test_fields() -> None:
    names = [field.name for field in dataclasses.fields(Evidence)]
    assert names[:3] == ["best", "best_class", "background_score"]
    assert names[3:] == ["background", "num_classes", "recalibration", "class_map"]
    assert [field.name for field in dataclasses.fields(Calibration)] == [
        "threshold",
        "count",
        "alpha",
        "num_images",
        "num_classes",
        "background",
        "score",
        "ignore_index",
        "variant",
        "unit",
        "randomized",
        "level",
        "recalibration",
        "class_threshold",
        "certificate",
        "extra",
    ]
    assert isinstance(Calibration.infinite_share, property)
    assert isinstance(Calibration.grid, property)
