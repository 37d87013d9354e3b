"""``recommend``: what the report and the commands give for files, from tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import folders
from tests.support.folders import DataSet, command
from torch import Tensor

from cpseg import recommend
from cpseg.files.masks import read_mask


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    """10 labelled images and 2 others."""
    made = folders.make(tmp_path, count=12)
    made.list_ids("ids.txt", made.images[:10])
    made.list_ids("unlabelled.txt", made.images[10:], masks=False)
    return made


def tensors(data: DataSet) -> tuple[list[Tensor], list[Tensor]]:
    scores = [torch.from_numpy(each) for each in data.scores.values()]
    return scores, [torch.from_numpy(each) for each in data.labels.values()]


@pytest.mark.parametrize(
    ("methods", "rule"),
    [("none", "raw argmax"), ("none,dirichlet", "labels: dirichlet map over probs")],
    ids=["raw", "map"],
)
def test_the_same_rule_and_labels_as_by_the_commands(
    data: DataSet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    methods: str,
    rule: str,
) -> None:
    pytest.importorskip("matplotlib")
    scores, masks = tensors(data)
    options: dict[str, Any] = {"context": (), "folds": 2, "prior_powers": (0.0,)}
    options |= {"methods": methods.split(","), "models": ["probs"]}
    found = recommend(scores[:10], masks[:10], **options)
    asked = data.options(background="none", folds=2, recalibrate=methods, show=0)
    asked += ["--prior-powers", "0", "--max-error", "none"]
    asked += ["--context", "none"] if "dirichlet" in methods else []
    facts = tmp_path / "facts.json"
    ran = command(capsys, "report", *asked, "-o", tmp_path / "r.html", "--json", facts)
    assert ran.code == 0, ran.err
    told = json.loads(facts.read_text())
    assert found.rule == told["recommended"] == rule
    figures = told["rules"][rule]["figures"]
    measured = found.findings.rules[found.findings.label_with]
    assert measured.estimate("error").mean == pytest.approx(figures["error"]["mean"], abs=1e-12)
    monkeypatch.chdir(tmp_path)
    making, labelling, _ = told["rules"][rule]["commands"]
    assert command(capsys, *making[1:]).code == 0
    assert command(capsys, *labelling[1:]).code == 0
    for image, each in zip(data.images[10:], scores[10:], strict=True):
        written = read_mask(Path("pseudo/masks") / image, num_classes=4, size=None)
        assert torch.equal(found.pseudo_labels(each), written.long())


def test_two_models_and_a_student(data: DataSet) -> None:
    scores, masks = tensors(data)
    noise = [torch.full_like(each, 0.25) for each in scores]
    pairs = list(zip(noise, scores, strict=True))
    options: dict[str, Any] = {"context": (), "folds": 2, "methods": ("none",)}
    own = recommend(pairs, masks, models=("foundation", "student"), student=1, **options)
    assert own.labels_alone
    assert own.rule == "labels: student as it is"
    assert own.models == (1,)
    assert own.calibration.guarantee().startswith("nothing")
    assert torch.equal(own.pseudo_labels(pairs[0]), scores[0].argmax(0))
    assert own.summary().startswith("Train on the labels alone")
    assert repr(own).startswith("Recommendation(Train on the labels alone")
    assert own._repr_html_().count("<p>") == own.summary().count("\n\n") + 1
    free = recommend(pairs, masks, **options)
    assert not free.labels_alone
    assert free.rule == "labels: model 1 as it is"


def test_arrays_are_taken_and_nothing_is_changed(data: DataSet) -> None:
    scores, masks = tensors(data)
    before = [each.clone() for each in scores]
    options: dict[str, Any] = {"context": (), "folds": 2, "methods": ("none",)}
    first = recommend(scores, masks, **options)
    arrays = [each.numpy() for each in scores], [each.numpy() for each in masks]
    second = recommend(*arrays, **options)  # type: ignore[arg-type]
    assert first.rule == second.rule
    assert torch.equal(first.calibration.threshold, second.calibration.threshold)
    assert all(torch.equal(*each) for each in zip(before, scores, strict=True))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"scores": "x"}, "recommend: expected scores of every image in a list"),
        ({"masks": []}, "expected scores and masks of the same images, got 10 and 0"),
        ({"folds": 1}, "expected folds as a whole number >= 2, got 1"),
        ({"folds": 11}, "2 to 10 folds for 10 labelled images, got 11"),
        ({"student": 1}, r"expected a student in 0\.\.0, got 1"),
        ({"methods": "none"}, "expected methods in a list"),
        ({"methods": ["unknown"]}, "expected a recalibrate among"),
        ({"alpha": 2}, r"expected alpha in \(0, 1\)"),
        ({"prior_powers": [2]}, r"expected prior powers in \[0, 1\]"),
        ({"names": ["one"]}, "expected 4 class names"),
        ({"models": ["a", "b"]}, "of 2 models"),
        ({"background": 9}, "background"),
    ],
)
def test_bad_input(data: DataSet, changed: dict[str, Any], said: str) -> None:
    scores, masks = tensors(data)
    given = {"scores": scores[:10], "masks": masks[:10], "folds": 2, "context": (), **changed}
    with pytest.raises((ValueError, TypeError), match=said) as caught:
        recommend(given.pop("scores"), given.pop("masks"), **given)
    assert len(str(caught.value).splitlines()) == 1


def test_an_image_with_other_classes_is_named(data: DataSet) -> None:
    scores, masks = tensors(data)
    scores[3] = scores[3][:2]
    with pytest.raises(ValueError, match=r"recommend, image 3: expected 4 classes of 1 models"):
        recommend(scores, masks, folds=2)
    scores, masks = tensors(data)
    scores[4] = scores[4][None]
    with pytest.raises(ValueError, match=r"image 4: expected scores \[K, H, W\], got \[1, 4,"):
        recommend(scores, masks, folds=2)
    scores, masks = tensors(data)
    masks[2] = masks[2][:3]
    with pytest.raises(ValueError, match="recommend, image 2: expected the mask"):
        recommend(scores, masks, folds=2)
