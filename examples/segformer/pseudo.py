"""Pseudo-labels for the unlabelled images: raw, calibrated, recalibrated or certified."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cpseg import Calibration, confusion_matrix, mean_iou
from cpseg.files import Pair, Source, image_size, read_ids, read_mask
from cpseg.jobs import (
    CalibrationSettings,
    CertificationSettings,
    Grouping,
    RecalibrationOptions,
    calibrate,
    certify,
    label,
)
from crops import VOID, Lists
from ranks import rank, ranks, wait


@dataclass(frozen=True)
class Rule:
    """How labels are chosen from probabilities.

    Attributes:
        conformal: choose labels by the prediction sets of a calibration. Otherwise, and without
            a constant, every pixel gets its most probable class.
        alpha: miscoverage rate.
        variant: how pixels share thresholds.
        background: the dominant class to suppress, or None.
        constant: one threshold for all pixels instead of a calibration: 0.3 is confidence 0.7.
        recalibrate: the method of recalibration before the choice, or None.
        context: the context that the recalibration uses: ``"auto"``, ``"none"``, or its parts.
        prior_power: how far the class frequencies are divided out of the probabilities, 0 to 1.
        max_error: the certified bound on the error of the labels kept, or None.
    """

    conformal: bool
    alpha: float = 0.05
    variant: str = "pixel"
    background: int | None = None
    constant: float | None = None
    recalibrate: str | None = None
    context: str = "auto"
    prior_power: float = 0.0
    max_error: float | None = None


def write_labels(
    source: Source,
    lists: Lists,
    rule: Rule,
    classes: int,
    out: Path,
    *,
    scored: Source | None = None,
) -> Path:
    """Write pseudo-labels of the unlabelled images to ``out``; returns their id list.

    The calibration is saved next to them as ``out.safetensors``. Ranks divide the images.

    Args:
        source: the scores of the labelled images, and of the others.
        lists: the images.
        rule: how labels are chosen.
        classes: number of classes.
        out: the folder to write.
        scored: the scores of the unlabelled images, where they are others.
    """
    calibration = choose(source, lists.labelled, rule, classes)
    if rank() == 0:
        calibration.save(out.with_suffix(".safetensors"))
    label(scored or source, lists.unlabelled, calibration, out)
    wait()
    return out / "ids.txt"


def choose(source: Source, ids: Path, rule: Rule, classes: int) -> Calibration:
    """Calibrate on the labelled images.

    Raises:
        ValueError: nothing could be certified with so few images.
    """
    context = () if rule.context == "none" else rule.context
    recalibration = None
    if rule.recalibrate is not None or rule.prior_power > 0:
        # With folds, the recalibration is fitted on all labelled images and all are used for
        # calibration. This is an approximation without a guarantee; a certificate has one.
        folds = 5 if rule.conformal and rule.max_error is None else 0
        recalibration = RecalibrationOptions(
            rule.recalibrate or "none",
            share=0.0,
            folds=folds,
            context=context,
            prior_power=rule.prior_power,
            num_classes=classes,
        )
    if rule.max_error is not None:
        # Per image: per label, a hundred labelled images rarely suffice.
        certified = CertificationSettings(
            background=rule.background,
            max_error=rule.max_error,
            per="image",
            recalibration=recalibration,
        )
        calibration = certify(source, ids, certified)
        assert calibration.certificate is not None
        if not calibration.certificate.certified:
            raise ValueError(str(calibration.certificate))
        return calibration
    if rule.conformal or recalibration is not None:
        share = 0.3 if rule.variant in ("kmeans", "annuli") else 0.0
        settings = CalibrationSettings(
            alpha=rule.alpha,
            background=rule.background,
            grouping=Grouping(rule.variant, group_share=share),
            recalibration=recalibration,
        )
        calibration = calibrate(source, ids, settings)
        if rule.conformal:
            return calibration
    else:
        zero = torch.zeros(1, 1)
        calibration = Calibration(zero, zero.long(), 0.0, 0, classes, rule.background)
    threshold = torch.inf if rule.constant is None else rule.constant
    constant = torch.full_like(calibration.threshold, threshold)
    return replace(calibration, threshold=constant, variant="constant")


def check_labels(folder: Path, unlabelled: list[Pair], classes: int) -> Path:
    """The id list of a folder that ``cpseg label`` wrote for these images and classes."""
    path = folder / "summary.csv"
    with path.open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    columns = sum(name.startswith("class_") for name in rows[0])
    if columns != classes:
        raise ValueError(
            f"{path}: expected labels of {classes} classes, got {columns}; "
            "write them with the same class map"
        )
    missing = sorted({pair.image for pair in unlabelled} - {row[0] for row in rows[1:]})
    if missing:
        raise ValueError(
            f"{path}: expected a label for every unlabelled image, got none of {missing[0]}; "
            "label the same list"
        )
    return folder / "ids.txt"


def read_pseudo(ids: Path, unlabelled: list[Pair]) -> list[Pair]:
    """The unlabelled images with their pseudo-labels, in the order of their list."""
    masks = {pair.image: pair for pair in read_ids(ids)}
    return [masks[pair.image] for pair in unlabelled]


def quality(source: Source, pseudo: list[Pair], truth: list[Pair], classes: int) -> dict[str, Any]:
    """Compare the pseudo-labels with the true masks, which are used for nothing else.

    Ranks divide the images. Where a true mask is missing, nothing is measured.
    """
    if not all(pair.mask and (source.root / pair.mask).is_file() for pair in truth):
        return {}
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    counts = torch.zeros(2, dtype=torch.int64)  # valid, kept
    for guess, true in list(zip(pseudo, truth, strict=True))[rank() :: ranks()]:
        pixels = image_size(source.root / true.image)
        chosen = read_mask(source.root / str(guess.mask), num_classes=classes, size=pixels)
        labels = source.labels(true, classes, pixels)
        known, unlabelled = labels != VOID, chosen == VOID
        counts += torch.stack([known.sum(), (known & ~unlabelled).sum()])
        labels = labels.masked_fill(unlabelled, VOID)
        chosen = chosen.masked_fill(unlabelled, 0)  # any class: these pixels are void in the labels
        confusion += confusion_matrix(chosen[None].long(), labels[None].long(), num_classes=classes)
    if dist.is_initialized():
        dist.all_reduce(confusion)
        dist.all_reduce(counts)
    valid, kept = counts.tolist()
    right = int(confusion.diagonal().sum())
    return {
        "kept": kept / max(valid, 1),
        "wrong": 1 - right / max(kept, 1),
        "miou_kept": float(mean_iou(confusion)),
        "iou_kept": mean_iou(confusion, per_class=True).tolist(),
        "kept_of_class": confusion.sum(1).tolist(),
    }
