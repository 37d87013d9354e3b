"""The audit job in Python: what it takes from the folder, and what it says of costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support.folders import complains, files

from cpseg.certification.finite_bounds import fixed_number
from cpseg.jobs import AuditSettings, audit_by_truth, open_audit, plan_audit
from cpseg.jobs.audit import Labels, costs, suggested_error

QUICK = AuditSettings(max_error=0.3, delta=0.2, seed=0)


def made(root: Path, *, images: int = 3, kept: int = 40) -> Path:
    """Images of one colour, masks with ``kept`` labels of class 1 each, and a list."""
    out = root / "out"
    (out / "masks").mkdir(parents=True)
    mask = np.full((8, 10), 255, np.uint8)
    mask.ravel()[:kept] = 1
    for number in range(images):
        Image.new("RGB", (10, 8)).save(root / f"{number}.png")
        Image.fromarray(mask).save(out / "masks" / f"{number}.png")
    lines = [f"{number}.png out/masks/{number}.png\n" for number in range(images)]
    (out / "ids.txt").write_text("".join(lines))
    return out


def test_a_plan_is_drawn_once_and_opened_again(tmp_path: Path) -> None:
    out = made(tmp_path)
    drawn = plan_audit(out, AuditSettings(max_error="3/10", delta="0.2", root=tmp_path))
    assert drawn.is_new
    again = plan_audit(out, AuditSettings(max_error=0.3, delta=0.2, root=tmp_path))
    assert not again.is_new
    assert again.plan == drawn.plan == open_audit(out, root=tmp_path).plan
    assert [question.number for question in drawn.questions] == list(range(len(drawn.plan.draws)))
    assert set(files(out / "audit")) == {"plan.json"}
    outcome = audit_by_truth(drawn, out / "masks")
    assert outcome.result.wrong == 0
    assert outcome.result.certified
    assert (outcome.people, outcome.both, outcome.disagreements) == (1, 0, 0)


def test_the_fingerprint_is_of_names_and_masks(tmp_path: Path) -> None:
    out = made(tmp_path)
    first = Labels.open(out, tmp_path).fingerprint()
    assert Labels.open(out, tmp_path).fingerprint() == first
    Image.fromarray(np.zeros((8, 10), np.uint8)).save(out / "masks" / "1.png")
    assert Labels.open(out, tmp_path).fingerprint() != first


def test_a_list_without_masks_is_refused(tmp_path: Path) -> None:
    out = made(tmp_path)
    (out / "masks" / "1.png").unlink()
    (out / "ids.txt").write_text("0.png a.png\n1.png\n")
    with pytest.raises(ValueError, match="image mask"):
        Labels.open(out, tmp_path)


def test_costs_are_those_of_the_bounds(tmp_path: Path) -> None:
    labels = Labels.open(made(tmp_path), tmp_path)
    settings = AuditSettings(max_error=0.2, delta=0.1, expected_error=0.03)
    rows = costs(labels, settings)
    assert [row.error for row in rows] == pytest.approx([0.03, 0.04, 0.08, 0.12])
    for row in rows:
        assert row.fixed == fixed_number(120, 0.2, 0.1, row.error)
        assert row.average <= row.planned <= 120
        assert row.any_time <= 120
    assert suggested_error(labels, 0.2) is None


def test_a_bound_that_nobody_can_certify_is_refused(tmp_path: Path) -> None:
    out = made(tmp_path)
    big = np.zeros((400, 400), np.uint8)
    for number in range(3):
        Image.fromarray(big).save(out / "masks" / f"{number}.png")
    labels = Labels.open(out, tmp_path)
    with pytest.raises(ValueError, match="20,000 answers") as caught:
        costs(labels, AuditSettings(max_error=1e-5, root=tmp_path))
    complains(caught.value, "audit")
    with pytest.raises(ValueError, match="20,000 answers") as caught:
        plan_audit(out, AuditSettings(max_error=1e-5, root=tmp_path))
    complains(caught.value, "audit_sample")
    assert not (out / "audit" / "plan.json").exists()
