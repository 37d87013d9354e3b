"""The script for FiftyOne, with a stand-in for its package: what it is told of each image."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image
from tests.support import folders
from tests.support.folders import VOID, DataSet, command, done

SCRIPT = Path(__file__).parents[2] / "examples" / "fiftyone" / "load.py"


class Sample(dict[str, Any]):
    def __init__(self, **fields: Any) -> None:
        super().__init__(fields)


class Dataset:
    made: ClassVar[dict[str, Dataset]] = {}

    def __init__(self, name: str, persistent: bool = False) -> None:
        assert persistent
        self.mask_targets: dict[str, dict[int, str]] = {}
        self.samples: list[Sample] = []
        Dataset.made[name] = self

    def add_samples(self, samples: list[Sample]) -> None:
        self.samples += samples

    def __len__(self) -> int:
        return len(self.samples)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    stand_in = ModuleType("fiftyone")
    vars(stand_in).update(
        Dataset=Dataset, Sample=Sample, Segmentation=SimpleNamespace, Heatmap=SimpleNamespace
    )
    monkeypatch.setitem(sys.modules, "fiftyone", stand_in)
    spec = importlib.util.spec_from_file_location("fiftyone_load", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[DataSet, Path]:
    data = folders.make(tmp_path / "data", count=4)
    rule, labels = tmp_path / "c.safetensors", tmp_path / "OUT"
    options = ["--alpha", "0.3", "--variant", "image", "--background", "none", "-o", rule]
    done(command(capsys, "calibrate", *data.options(), *options))
    command(capsys, "label", *data.options(calibration=rule), "-o", labels)
    return data, labels


def values(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_what_fiftyone_is_told(
    script: ModuleType, out: tuple[DataSet, Path], tmp_path: Path
) -> None:
    data, labels = out
    (tmp_path / "names.txt").write_text("sky\nroad: road, street\ncar\ntree\n")
    script.main([str(labels), "--name", "x", "--names", str(tmp_path / "names.txt")])
    dataset = Dataset.made.pop("x")
    assert dataset.mask_targets == {"pseudo_labels": {1: "sky", 2: "road", 3: "car", 4: "tree"}}
    assert [sample["filepath"] for sample in dataset.samples] == [
        str(data.root / image) for image in data.images
    ]
    for sample, image in zip(dataset.samples, data.images, strict=True):
        mask = values(str(labels / "masks" / image))
        shown, certain = (
            values(sample["pseudo_labels"].mask_path),
            values(sample["certainty"].map_path),
        )
        assert np.array_equal(shown, np.where(mask == VOID, 0, mask + 1))
        assert sample["kept_share"] == pytest.approx((mask != VOID).mean())
        assert (certain[mask == VOID] == 0).all()
        assert 0 < sample["mean_certainty"] < 1
        assert certain[mask != VOID].mean() / 255 == pytest.approx(
            sample["mean_certainty"], abs=0.01
        )


def test_labels_alone(script: ModuleType, out: tuple[DataSet, Path]) -> None:
    _, labels = out
    facts = json.loads((labels / "run.json").read_text())
    (labels / "run.json").write_text(json.dumps({**facts, "others": ["Q"]}))
    with pytest.raises(SystemExit):
        script.main([str(labels), "--name", "y"])
    script.main([str(labels), "--name", "y", "--without-certainty"])
    dataset = Dataset.made.pop("y")
    assert all("certainty" not in sample for sample in dataset.samples)
    assert dataset.mask_targets["pseudo_labels"][1] == "class 0"
