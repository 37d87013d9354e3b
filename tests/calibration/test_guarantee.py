"""``Calibration.guarantee``: every branch by its words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cpseg import Calibration, Certificate, Recalibration
from cpseg.calibration.guarantee import guarantee
from cpseg.calibration.provenance import (
    GroupImages,
    Provenance,
    RecalibrationImages,
    SourceImages,
)

PIXELS = "the 2x3 pixels that the grid samples"
ASSUMED = (
    "if new images are exchangeable with the calibration images and the model was trained on others"
)
LABELS = "nothing about the error of pseudo-labels"
POOLED = (
    "nothing: groups pool the pixels of several images, which are not exchangeable; "
    "unit 'image' gives a promise on average over images"
)
CERTIFICATE = Certificate(
    "ltt", "betting", 0.05, 0.1, True, 0.3, 60, 0.01, 0.4, 0.02, None, None, None, None
)


def calibration(classes: int | None = None, **fields: Any) -> Calibration:
    size = (2, 3) if classes is None else (classes, 2, 3)
    return Calibration(
        torch.full(size, 0.5),
        torch.full(size, 99),
        **{"alpha": 0.05, "num_images": 99, "num_classes": 4, "variant": "pixel", **fields},
    )


def recalibration(*images: str) -> Recalibration:
    return Recalibration(
        torch.eye(4),
        torch.zeros(4),
        torch.full((4,), 0.25, dtype=torch.float64),
        method="dirichlet",
        scores="softmax",
        context=(),
        num_source=4,
        num_images=9,
        strength=1.0,
        images=images,
    )


def test_at_each_pixel() -> None:
    assert calibration().guarantee() == (
        f"coverage of at least 95 % at each of {PIXELS}: coverage is the probability that the "
        f"prediction set contains the true class, {ASSUMED}; {LABELS}"
    )
    assert "at least 99.5 % at" in calibration(alpha=0.005).guarantee()
    assert calibration(classes=4).guarantee() == calibration().guarantee()
    assert calibration(unit="image").guarantee() == calibration().guarantee()
    assert guarantee(calibration()) == calibration().guarantee()


@pytest.mark.parametrize("variant", ["image", "blocks", "kmeans", "groups"])
def test_on_average_over_images(variant: str) -> None:
    means = "a pixel is covered where the prediction set contains its true class"
    assert calibration(variant=variant, unit="image").guarantee() == (
        "at least 95 % of an image's pixels covered on average over images, in each group of "
        f"{PIXELS}: {means}, {ASSUMED}; {LABELS}"
    )
    assert calibration(4, variant=variant, unit="image").guarantee() == (
        "at least 95 % of a class's pixels covered on average over images that show it, in each "
        f"group of {PIXELS}: {means}, {ASSUMED}; {LABELS}"
    )


@pytest.mark.parametrize("classes", [None, 4])
def test_nothing_where_pixels_are_pooled(classes: int | None) -> None:
    assert calibration(classes, variant="image").guarantee() == POOLED


def test_nothing_where_the_recalibration_saw_the_calibration_images() -> None:
    said = "nothing: the probabilities were recalibrated on the calibration images themselves"
    for folds in (0, 4):
        same = Provenance(recalibration=RecalibrationImages(None, folds, False))
        assert calibration(extra=same).guarantee() == said
        other = Provenance(recalibration=RecalibrationImages(None, folds, True))
        assert calibration(extra=other).guarantee() == calibration().guarantee()
    mapped = calibration(recalibration=recalibration("a", "b"), extra={"images": ["b", "c"]})
    assert mapped.guarantee() == said
    mapped = replace(mapped, extra={"images": ["c"]})
    assert mapped.guarantee() == calibration().guarantee()


def test_nothing_where_groups_were_learned_on_the_calibration_images() -> None:
    made = calibration(variant="kmeans", unit="image")
    same = replace(made, extra=Provenance(groups=GroupImages(("a",), 1, False)))
    said = "nothing: groups were learned on the calibration images themselves"
    assert same.guarantee() == said
    other = replace(made, extra=Provenance(groups=GroupImages(("a",), 1, True)))
    assert other.guarantee() == made.guarantee()


def test_only_where_cells_did_not_fall_back() -> None:
    level = torch.tensor([[0, 0, 0], [1, 2, 0]], dtype=torch.uint8)
    made = calibration(level=level)
    made = replace(made, threshold=made.threshold.index_put((torch.tensor(1), torch.tensor(2)),
                                                            torch.tensor(torch.inf)))  # fmt: skip
    assert made.guarantee().startswith(
        f"coverage of at least 95 % at each of {PIXELS}, where thresholds are its own (50.0 %); "
        "nothing where they fell back to a coarser group: coverage is the probability"
    )
    unused = calibration(level=torch.zeros(2, 3, dtype=torch.uint8))
    assert unused.guarantee() == calibration().guarantee()
    assert calibration(variant="blocks", level=level).guarantee() == POOLED


def test_a_certificate_says_its_own_sentence() -> None:
    same = Provenance(recalibration=RecalibrationImages(None, 0, False))
    made = calibration(variant="image", certificate=CERTIFICATE, extra=same)
    assert made.guarantee() == str(CERTIFICATE)


def test_nothing_where_the_scores_were_cross_fitted_on_calibration_images() -> None:
    provenance = Provenance(sources=(SourceImages("S", 3, 9),))
    said = calibration(extra=provenance).guarantee()
    assert said.startswith("nothing: models behind the scores were trained on calibration images")
    assert said.endswith("so that coverage is approximate")
    certified = calibration(extra=provenance, certificate=CERTIFICATE)
    assert certified.guarantee() == str(CERTIFICATE), "its own images are apart: certify sees to it"
