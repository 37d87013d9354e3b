"""Calibrations and recalibrations of fixed data, as version 0.1 saved them under ``old_files``.

To write those files again, run this file with that version on the path: they must not change.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cpseg import Calibration, Calibrator, Certifier, Recalibration, Recalibrator, groups

FOLDER = Path(__file__).parent / "old_files"
SIZE, CLASSES = (4, 6), 3
CLASS_MAP = {"map": {"0": 0, "1": 1, "2": 2}, "reduce": "sum"}


def images(first: int, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """Probabilities in 64ths without a random number, labels with void, and ids."""
    index = torch.arange(first, first + count).reshape(-1, 1, 1, 1)
    classes = torch.arange(CLASSES).reshape(1, -1, 1, 1)
    cells = torch.arange(SIZE[0] * SIZE[1]).reshape(1, 1, *SIZE)
    mixed = (index * 7919 + classes * 104729 + cells * 1299709 + index * cells * 31) % 3571
    probs = (mixed % 41).to(torch.float32) / 64
    labels = (index * 31 + cells * 17 + index * cells)[:, 0] % 11 % (CLASSES + 1)
    labels = torch.where((index[:, 0] + cells[:, 0]) % 3 > 0, probs.argmax(1), labels)
    labels = labels.masked_fill(labels == CLASSES, 255)
    return probs, labels, [f"{number:03}.png" for number in range(first, first + count)]


def updated(calibrator: Calibrator, first: int = 0, count: int = 24) -> Calibrator:
    probs, labels, ids = images(first, count)
    calibrator.update(probs, labels, ids=ids)
    return calibrator


def recalibrator(method: str, **options: object) -> Recalibrator:
    made = Recalibrator(CLASSES, method=method, **options)  # type: ignore[arg-type]
    probs, labels, ids = images(100, 8)
    made.update(probs, labels, ids=ids)
    return made


def certified(**options: object) -> Calibration:
    calibrator = updated(Calibrator(groups.image(SIZE), alpha=0.9, background=0))
    options = {"max_error": 0.4, "alphas": ("0.9", "0.6", "0.3"), **options}
    certifier = Certifier(calibrator, **options)  # type: ignore[arg-type]
    probs, labels, ids = images(24, 40)
    certifier.update(probs, labels, ids=ids)
    return certifier.compute()


def calibrations() -> dict[str, Calibration]:
    """Those whose every bit follows from exact arithmetic."""
    pixel = updated(Calibrator(groups.pixel(SIZE), alpha="0.3", background=0)).compute()
    facts = {
        "class_map": CLASS_MAP,
        "masks": {"void": 11, "map": None},
        "groups": {"learned_on": 2, "apart": True, "images": ["x.png", "y.png"]},
        "refitted": {"apart": False, "folds": 4, "images": ["000.png"]},
    }
    pixel = replace(pixel, variant="kmeans", extra={**facts, **pixel.extra, "note": "ü"})
    few = Calibrator(
        groups.pixel(SIZE),
        alpha="0.1",
        fallback=(groups.blocks(SIZE, 2), groups.image(SIZE)),
    )
    fallback = updated(few, count=5).compute()
    shares = {"pixel": 0.0, "blocks": 1.0, "image": 0.0}
    fallback = replace(fallback, extra={**fallback.extra, "fallback": shares})
    per_class = Calibrator(groups.blocks(SIZE, 2), alpha="0.4", per_class=True, score="margin")
    return {
        "pixel": pixel,
        "fallback": fallback,
        "per_class": updated(per_class).compute(),
        "certified_crc": certified(method="crc"),
    }


def fitted() -> dict[str, Calibration | Recalibration]:
    """Those with logarithms or a convex fit in them, which another machine may round otherwise."""
    mapped = Calibrator(
        groups.pixel(SIZE), alpha="0.3", recalibration=recalibrator("none").fit(), num_classes=3
    )
    return {
        "recalibrated": updated(mapped).compute(),
        "certified_ltt": certified(max_error=0.7, delta=0.2),
        "certified_per_class": certified(per_class=True, method="crc"),
        "recalibration": recalibrator("dirichlet", context=("location", "image")).fit(),
        "recalibration_none": recalibrator("none").fit().with_prior_power(0.5),
    }


def labels_of(calibration: Calibration) -> Tensor:
    """Pseudo-labels of new images, for the score that selects labels."""
    return calibration.pseudo_labels(images(200, 4)[0], dtype=torch.uint8)


def write() -> None:
    from cpseg.store import write_tensors

    labels = {}
    for name, made in {**calibrations(), **fitted()}.items():
        made.save(FOLDER / f"{name}.safetensors")
        if isinstance(made, Recalibration):
            labels[name] = made(images(200, 4)[0])
        elif made.score == "lac":
            labels[name] = labels_of(made)
    write_tensors(FOLDER / "labels.safetensors", labels, {})


if __name__ == "__main__":
    sys.exit(write())
