"""What each object prints: one line that says what it is and what it holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.support.helpers import seeded

from cpseg import Calibrator, Certificate, Certifier, Recalibrator, groups


def draw(images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(seed)
    probs = torch.rand(images, 3, 4, 4, generator=generator).mul(6).softmax(1)
    return probs, torch.randint(3, (images, 4, 4), generator=generator)


@pytest.fixture
def calibrator() -> Calibrator:
    made = Calibrator(groups.image((4, 4)), alpha=0.9, background=0)
    made.update(*draw(5, 0))
    return made


def test_calibrators(calibrator: Calibrator) -> None:
    said = "Calibrator(groups, 3 classes, grid 4x4, alpha 0.9, 5 images)"
    assert repr(calibrator) == said
    fresh = Calibrator(groups.pixel((2, 3)), score="margin", per_class=True, variant="blocks")
    said = "Calibrator(blocks, per class, score margin, unknown classes, grid 2x3, alpha 0.05, "
    assert repr(fresh) == said + "0 images)"


def test_calibrations(calibrator: Calibrator) -> None:
    made = calibrator.compute()
    said = "Calibration(groups, 3 classes, grid 4x4, alpha 0.9, 5 images, background 0, 0.0 % "
    assert repr(made) == said + "infinite)"
    recalibrator = Recalibrator(3, method="none")
    recalibrator.update(*draw(2, 1))
    said = "Recalibrator(none, 3 softmax classes to 3, context none, 2 images, 32 pixels)"
    assert repr(recalibrator) == said
    recalibration = recalibrator.fit()
    said = "Recalibration(none, 3 softmax classes to 3, context none, 2 images, strength 0)"
    assert repr(recalibration) == said
    said = "context none, 2 images, strength 0, prior power 0.5)"
    assert repr(recalibration.with_prior_power(0.5)).endswith(said)
    absent = replace(recalibration, prior=torch.tensor([0.5, 0.5, 0], dtype=torch.float64))
    assert repr(absent).endswith("strength 0, 1 classes absent)")
    unknown = replace(
        made,
        threshold=torch.full((3, 4, 4), torch.inf),
        background=None,
        num_classes=None,
        score="aps",
        recalibration=recalibration,
    )
    said = "Calibration(groups, per class, score aps, unknown classes, grid 4x4, alpha 0.9, "
    said += "5 images, no background, 100.0 % infinite, recalibrated)"
    assert repr(unknown) == said
    assert repr(Recalibrator(4, context="auto")).startswith(
        "Recalibrator(dirichlet, unknown softmax classes to 4, context auto, 0 images"
    )
    assert "context location + image," in repr(Recalibrator(4, context=("image", "location")))


def test_certificates(calibrator: Calibrator) -> None:
    certifier = Certifier(calibrator, max_error=0.05)
    alphas = len(certifier.alphas)
    said = f"Certifier(ltt per labels, betting, delta 0.1, at most 5 % error, {alphas} alphas, "
    assert repr(certifier) == said + "3 classes, 0 images)"
    certifier.update(*draw(6, 1))
    assert repr(certifier).endswith("6 images)")
    made = certifier.compute()
    said = "Certificate(not certified at 5 %, ltt per labels, betting, 90 % confidence, 6 images, "
    assert repr(made.certificate) == said + "0 % kept)"
    assert repr(made).endswith("0.0 % infinite, not certified at 5 %)")
    other = Certifier(calibrator, method="crc", per_class=True, max_error="0.5", alphas=[0.5])
    said = "Certifier(crc, per class, at most 50 % error, 1 alphas, 3 classes, 0 images)"
    assert repr(other) == said
    certificate = Certificate(
        "crc", None, 0.5, None, True, 0.3, 60, 0.01, 0.4, None, None, ({}, {}), None, None
    )
    said = "Certificate(certified at 50 %, crc, 60 images, alpha 0.3, 2 classes, 40 % kept)"
    assert repr(certificate) == said
    certified = replace(made, certificate=certificate)
    assert repr(certified).endswith("0.0 % infinite, certified at 50 %)")
