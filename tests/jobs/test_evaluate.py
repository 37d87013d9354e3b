"""`cpseg.jobs.evaluate`: figures against NumPy, from probabilities and from evidence."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import folders
from tests.support.folders import DataSet, nearest, select

from cpseg import Calibration
from cpseg.files.dataset import Source
from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.compact import compact
from cpseg.jobs.evaluate import evaluate

SIZES = ((12, 16), (10, 20), (24, 32))


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return folders.make(tmp_path / "data", count=12)


@pytest.fixture
def mixed(tmp_path: Path) -> DataSet:
    return folders.make(tmp_path / "mixed", count=12, sizes=SIZES)


def source(data: DataSet, **options: Any) -> Source:
    return Source(data.root, data.probs, **options)


# Evaluate


def iou(predictions: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    union = [((predictions == k) | (truth == k)).sum() for k in range(num_classes)]
    both = [((predictions == k) & (truth == k)).sum() for k in range(num_classes)]
    return np.array([b / u if u else np.nan for b, u in zip(both, union, strict=True)])


def figures(
    data: DataSet, rule: str, calibration: Calibration, constant: float
) -> dict[str, object]:
    """The figures of a rule over all pixels at once, in NumPy."""
    chosen, truths, sets = [], [], []
    for image in data.images:
        probs, truth = data.scores[image], data.labels[image]
        limit = nearest(calibration.threshold.numpy(), truth.shape)
        chosen.append(
            {
                "raw argmax": lambda p=probs: p.argmax(0).astype(np.uint8),
                "pixel": lambda p=probs, t=limit: select(p, t, None),
                "pixel, suppressed": lambda p=probs, t=limit: select(p, t, 0),
                "constant": lambda p=probs: select(p, constant, 0),
            }[rule]().ravel()
        )
        truths.append(truth.ravel())
        sets.append(((np.float32(1) - probs) <= limit).reshape(len(probs), -1))
    predictions, truth, inside = np.concatenate(chosen), np.concatenate(truths), np.hstack(sets)
    known = truth != 255
    predictions, truth, inside = predictions[known], truth[known], inside[:, known]
    kept = predictions != 255
    covered = inside[truth, np.arange(len(truth))].mean()
    has_sets = rule.startswith("pixel")
    return {
        "miou_kept": np.nanmean(iou(predictions[kept], truth[kept], 4)),
        "miou_all": np.nanmean(iou(predictions, truth, 4)),
        "kept": kept.mean(),
        "wrong": (predictions[kept] != truth[kept]).mean(),
        "coverage": covered if has_sets else np.nan,
        "set_size": inside.sum(0).mean() if has_sets else np.nan,
        "iou": iou(predictions, truth, 4),
    }


@pytest.mark.parametrize("background", [0, None])
def test_figures_agree_with_numpy(mixed: DataSet, background: int | None) -> None:
    calibration = calibrate(source(mixed), mixed.ids, alpha=0.3, background=background)
    rows = evaluate(source(mixed), mixed.ids, calibration, constant=0.5)
    names = [row.rule for row in rows]
    suppressed = ["pixel, suppressed"] if background == 0 else []
    assert names == ["raw argmax", "pixel", *suppressed, "constant 0.5"]
    for row in rows:
        rule = row.rule.removesuffix(" 0.5")
        if rule == "constant" and background is None:
            continue  # select() above suppresses 0
        for name, value in figures(mixed, rule, calibration, 0.5).items():
            np.testing.assert_allclose(
                getattr(row, name), value, rtol=1e-9, err_msg=f"{row.rule}, {name}"
            )


def test_figures_from_evidence_are_those_of_the_scores(data: DataSet, tmp_path: Path) -> None:
    calibration = calibrate(source(data), data.ids, alpha=0.3, background=0)
    compact(source(data), data.ids, tmp_path / "evidence", background=0)
    rows = {row.rule: row for row in evaluate(source(data), data.ids, calibration)}
    short = evaluate(Source(data.root, tmp_path / "evidence"), data.ids, calibration)
    assert [row.rule for row in short] == ["raw argmax", "pixel, suppressed"]
    for row in short:
        assert math.isnan(row.coverage)
        assert math.isnan(row.set_size)
        whole = replace(rows[row.rule], coverage=math.nan, set_size=math.nan)
        assert str(row) == str(whole)
