"""The figures of a rule: against NumPy, for any split, as a table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cpseg.jobs.tally import Row, Tally, class_table, table

K = 4


def draw(seed: int, size: tuple[int, int] = (7, 9)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions, truth (both with 255) and sets; class 3 is nowhere."""
    rng = np.random.default_rng(seed)
    predictions, truth = rng.integers(0, K - 1, (2, *size)).astype(np.uint8)
    predictions[rng.random(size) < 0.3] = 255
    truth[rng.random(size) < 0.2] = 255
    return predictions, truth, rng.random((K, *size)) < 0.6


def tally(*seeds: int) -> Tally:
    counted = Tally("rule", K)
    for seed in seeds:
        predictions, truth, sets = (torch.from_numpy(a) for a in draw(seed, (5 + seed, 9)))
        counted.update(predictions, truth)
        counted.update_sets(sets, truth)
    return counted


def ious(predictions: np.ndarray, truth: np.ndarray) -> list[float]:
    """IoU of every class over the pixels given; NaN where there is none of it."""
    found = []
    for k in range(K):
        union = ((predictions == k) | (truth == k)).sum()
        both = ((predictions == k) & (truth == k)).sum()
        found.append(both / union if union else math.nan)
    return found


def figures(*seeds: int) -> dict[str, object]:
    """The same figures from all pixels at once."""
    parts = [draw(seed, (5 + seed, 9)) for seed in seeds]
    predictions, truth = (np.concatenate([p[i].ravel() for p in parts]) for i in (0, 1))
    sets = np.concatenate([p[2].reshape(K, -1) for p in parts], axis=1)
    known = truth != 255
    predictions, truth, sets = predictions[known], truth[known], sets[:, known]
    kept = predictions != 255
    inside = [sets[label, place] for place, label in enumerate(truth)]
    return {
        "miou_kept": np.nanmean(ious(predictions[kept], truth[kept])),
        "miou_all": np.nanmean(ious(predictions, truth)),
        "kept": kept.mean(),
        "wrong": (predictions[kept] != truth[kept]).mean(),
        "coverage": np.mean(inside),
        "set_size": sets.sum(0).mean(),
        "iou": ious(predictions, truth),
    }


def test_figures_agree_with_numpy_over_all_pixels() -> None:
    row = tally(1, 2, 3).row()
    assert row.rule == "rule"
    for name, value in figures(1, 2, 3).items():
        np.testing.assert_allclose(getattr(row, name), value, rtol=1e-12, err_msg=name)
    assert math.isnan(row.iou[3])


def test_figures_do_not_depend_on_the_order() -> None:
    assert str(tally(1, 2, 3).row()) == str(tally(3, 1, 2).row())


def test_void_pixels_count_for_nothing() -> None:
    predictions, truth, sets = draw(0)
    void = truth == 255
    assert void.any()
    counted = []
    for filling in (0, 255):
        one = Tally("rule", K)
        filled = torch.from_numpy(np.where(void, filling, predictions).astype(np.uint8))
        one.update(filled, torch.from_numpy(truth))
        one.update_sets(torch.from_numpy(sets | (void & (filling == 0))), torch.from_numpy(truth))
        counted.append(str(one.row()))
    assert counted[0] == counted[1]


def test_a_rule_that_keeps_nothing_has_no_error_rate() -> None:
    counted = Tally("none", K)
    counted.update(torch.full((2, 2), 255), torch.zeros(2, 2, dtype=torch.uint8))
    row = counted.row()
    assert (row.kept, row.miou_all) == (0, 0)
    for value in (row.wrong, row.miou_kept, row.coverage, row.set_size):
        assert math.isnan(value)


def rows() -> list[Row]:
    return [
        Row("raw", 0.1234, 0.5, 1.0, 0.25, math.nan, math.nan, (0.25, math.nan)),
        Row("pixel, suppressed", math.nan, 0.0, 0.0, math.nan, 0.95, 1.234, (1.0, 0.0)),
    ]


def test_table_is_aligned_markdown() -> None:
    lines = table(rows()).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in lines}) == 1
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    assert cells[0] == ["rule", "mIoU kept", "mIoU all", "kept", "wrong", "coverage", "set size"]
    assert [cell.strip("-") for cell in cells[1]] == ["", *[":"] * 6]
    assert cells[2] == ["raw", "0.123", "0.500", "100.0 %", "25.0 %", "-", "-"]
    assert cells[3][0] == "pixel, suppressed"
    assert cells[3][2:] == ["0.000", "0.0 %", "-", "95.0 %", "1.23"]


def test_a_figure_that_is_missing_is_a_dash_not_nan() -> None:
    assert "nan" not in table(rows())


def test_class_table_has_a_line_a_class_and_a_column_a_rule() -> None:
    lines = class_table(rows()).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["class", "raw", "pixel, suppressed"]
    assert cells[2:] == [["0", "0.250", "1.000"], ["1", "-", "0.000"]]


def test_predictions_that_are_no_class_are_refused() -> None:
    with pytest.raises(ValueError, match="predictions"):
        Tally("rule", K).update(torch.tensor([[K]]), torch.tensor([[0]]))
