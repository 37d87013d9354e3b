"""The experiment with labels that are wrong along edges: that it runs, and that it weighs."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

pytest.importorskip("sklearn")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "boundary_noise.py"


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    if not SCRIPT.exists():
        pytest.skip("benchmarks are not part of this copy")
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.mark.nightly
def test_the_command_runs(bench, tmp_path, capsys):
    path = tmp_path / "noise.csv"
    bench.main(["--quick", "--seeds", "1", "-o", str(path)])
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert [len(table.splitlines()) - 2 for table in tables] == [2, 2, 7]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 + 2 * 5 + 7 * 2
    assert all(0 <= float(row["value"]) <= 1 for row in rows)


def test_tables(bench):
    rows = [
        (seed, "students", row, {"mIoU": value})
        for row, values in ((bench.PLAIN, (0.5, 0.75)), ("other", (0.625, 0.625)))
        for seed, value in enumerate(values)
    ]
    title, _, plain, other = bench.tables(rows).splitlines()
    assert title.split()[1:-1] == ["students", "|", "mIoU", "|", "mIoU:", "gain"]
    assert " 62.5 ± 17.7 | +0.0 ± 0.0 |" in " ".join(plain.split())
    assert " 62.5 ± 0.0 | +0.0 ± 17.7 |" in " ".join(other.split())
    one = bench.tables(rows[1::2]).splitlines()[3]
    assert " 62.5 ± 0.0 | -12.5 ± 0.0 |" in " ".join(one.split())


def test_coarse_masks_are_wrong_along_edges_and_sure_elsewhere(bench):
    found = bench.part(6, 0)
    masks, coarse = found.masks[:, 0].numpy(), found.coarse[:, 0].numpy()
    wrong = (coarse > 0) != masks
    assert 0.02 < wrong.mean() < 0.08
    grown = shrunk = 0
    for mask, logits, off in zip(masks, coarse, wrong, strict=True):
        far = ndimage.distance_transform_edt(mask) + ndimage.distance_transform_edt(~mask)
        assert (off & (far > 6)).sum() <= 0.02 * off.sum()  # but for holes that close
        assert abs(logits[far > 8]).min() > 3
        grown += (off & ~mask).sum()
        shrunk += (off & mask).sum()
    assert grown > 2 * shrunk > 0
    again = bench.part(6, 0)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_what_is_uncertain_teaches_nothing(bench):
    found = bench.part(4, 0)
    weights = torch.zeros_like(found.coarse)
    weights[2:] = 1

    def trained(targets: torch.Tensor, unsure: torch.Tensor) -> list[torch.Tensor]:
        net = bench.train(found.images, targets, unsure, labelled=2, steps=2, seed=0)
        return list(net.parameters())

    other = found.masks.clone()
    other[2:] = ~other[2:]
    left, right = trained(found.masks, weights), trained(other, weights)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    plain = trained(other, torch.zeros_like(weights))
    assert not all(torch.equal(a, b) for a, b in zip(left, plain, strict=True))


def test_how_well_uncertainty_finds_errors(bench):
    rng = np.random.default_rng(0)
    score, wrong = rng.integers(0, 5, (3, 1, 4, 5)) / 4, rng.random((3, 1, 4, 5)) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in score[wrong].tolist() for b in score[~wrong].tolist()]
    found = bench.removed(torch.from_numpy(score), torch.from_numpy(wrong))
    assert found["AUROC"] == pytest.approx(np.mean(pairs))
    assert found["focal, wrong"] == pytest.approx(score[wrong].mean())
    assert found["focal, right"] == pytest.approx(score[~wrong].mean())
    assert found["Dice, wrong"] == pytest.approx((score[wrong] > 0.45).mean())
    assert found["Dice, right"] == pytest.approx((score[~wrong] > 0.45).mean())
