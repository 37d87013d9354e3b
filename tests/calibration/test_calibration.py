"""Files of calibrations that contradict themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.folders import complains

from cpseg import Calibration


def calibration(**changed: object) -> Calibration:
    maps = torch.full((2, 3), 0.5), torch.full((2, 3), 9)
    made = Calibration(*maps, alpha=0.1, num_images=9, num_classes=3)
    return replace(made, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("ignore_index", [0, 2])
def test_an_ignore_index_that_is_a_class_is_refused_on_load(
    tmp_path: Path, ignore_index: int
) -> None:
    path = tmp_path / "c.safetensors"
    calibration(ignore_index=ignore_index).save(path)
    with pytest.raises(ValueError, match="ignore_index") as caught:
        Calibration.load(path)
    complains(caught.value, path, "outside the classes 0..2", f"got {ignore_index}")


@pytest.mark.parametrize("ignore_index", [3, 255, -1])
def test_another_ignore_index_is_loaded(tmp_path: Path, ignore_index: int) -> None:
    calibration(ignore_index=ignore_index).save(tmp_path / "c")
    assert Calibration.load(tmp_path / "c").ignore_index == ignore_index
    calibration(ignore_index=ignore_index, num_classes=None).save(tmp_path / "c")
    assert Calibration.load(tmp_path / "c").ignore_index == ignore_index
