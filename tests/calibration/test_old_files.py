"""Files of version 0.1: they load, they select the same labels, and they are still written so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support import saved

from cpseg import Calibration, Recalibration
from cpseg._internal.safe_files import read_tensors
from cpseg.calibration import calibration as calibration_module

LABELS, _ = read_tensors(saved.FOLDER / "labels.safetensors")
NAMES = sorted(path.stem for path in saved.FOLDER.glob("*.safetensors") if path.stem != "labels")
EXACT, FITTED = saved.calibrations(), saved.fitted()


@pytest.fixture(autouse=True)
def _version_of_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "__version__", "0.1.0")


def loaded(name: str) -> Calibration | Recalibration:
    kind = Recalibration if name.startswith("recalibration") else Calibration
    return kind.load(saved.FOLDER / f"{name}.safetensors")


def old_bytes(name: str) -> bytes:
    return (saved.FOLDER / f"{name}.safetensors").read_bytes()


def test_every_file_has_its_recipe() -> None:
    assert sorted([*EXACT, *FITTED]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_old_file_loads_and_is_written_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    loaded(name).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == old_bytes(name)


@pytest.mark.parametrize("name", LABELS)
def test_an_old_file_selects_the_same_labels(name: str) -> None:
    made = loaded(name)
    if isinstance(made, Recalibration):
        torch.testing.assert_close(made(saved.images(200, 4)[0]), LABELS[name])
    else:
        assert torch.equal(saved.labels_of(made), LABELS[name])


@pytest.mark.parametrize("name", sorted(set(EXACT) - {"certified_crc"}))
def test_the_same_images_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    EXACT[name].save(tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == old_bytes(name)


# The statement of "ltt" has changed since, and certificates say more of what was seen.
CERTIFIED = {"certified_ltt", "certified_per_class", "certified_crc"}


@pytest.mark.parametrize("name", ["certified_per_class", "certified_crc"])
def test_conformal_risk_control_proves_what_it_proved(name: str) -> None:
    new, old = {**EXACT, **FITTED}[name], loaded(name)
    assert isinstance(new, Calibration)
    assert isinstance(old, Calibration)
    assert torch.equal(saved.labels_of(new), LABELS[name])
    assert new.extra == old.extra
    assert new.certificate is not None
    assert old.certificate is not None
    assert new.certificate.mean_error == old.certificate.mean_error
    assert repr(new.certificate) == repr(old.certificate)
    assert old.certificate.per == new.certificate.per == "pixels"
    assert "- of all labels kept" in str(old.certificate), "not recorded then"


def test_an_old_certificate_says_what_it_had_proven() -> None:
    old = loaded("certified_ltt")
    assert isinstance(old, Calibration)
    assert old.certificate is not None
    assert (old.certificate.per, old.certificate.pooled_error) == ("any image", None)
    said = str(old.certificate)
    assert "where an image that keeps none counts as 0 % wrong" in said
    assert "of all labels kept more may be wrong, so certify anew" in said
    assert old.guarantee() == said


@pytest.mark.parametrize("name", sorted(set(FITTED) - CERTIFIED))
def test_the_same_images_give_the_same_result(name: str) -> None:
    new, old = FITTED[name], loaded(name)
    if isinstance(new, Recalibration):
        assert isinstance(old, Recalibration)
        torch.testing.assert_close(new.weight, old.weight, rtol=1e-3, atol=1e-4)
        assert torch.equal(new.prior, old.prior)
        assert (new.images, new.context) == (old.images, old.context)
    else:
        assert isinstance(old, Calibration)
        assert torch.equal(saved.labels_of(new), LABELS[name])
        assert new.extra == old.extra
        assert repr(new) == repr(old)


def test_what_the_old_files_say_of_their_images() -> None:
    pixel = Calibration.load(saved.FOLDER / "pixel.safetensors").provenance
    assert pixel.images == tuple(saved.images(0, 24)[2])
    assert pixel.images_used == {*pixel.images, "x.png", "y.png"}
    assert pixel.recalibration is not None
    assert not pixel.recalibration.disjoint
    assert pixel.masks is not None
    assert (pixel.masks.void, dict(pixel.other)) == (11, {"note": "ü"})
    certified = Calibration.load(saved.FOLDER / "certified_ltt.safetensors").provenance
    assert certified.certification_images == tuple(saved.images(24, 40)[2])
