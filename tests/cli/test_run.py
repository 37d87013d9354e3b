"""``cpseg run``: its steps are the other subcommands, and what it says is what they did."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from tests.support import folders
from tests.support.folders import DataSet, command, files, newer, refused
from tests.support.processes import ranks_of

from cpseg import Calibration
from cpseg.cli import run
from cpseg.cli.command import parser
from cpseg.files import ScoreRecord, record_scores
from cpseg.files.score_folder import ScoringModel
from cpseg.report.choice import choose

pytest.importorskip("matplotlib")


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    """12 labelled images and 4 others."""
    made = folders.make(tmp_path, count=16)
    made.list_ids("ids.txt", made.images[:12])
    made.list_ids("rest.txt", made.images[12:], masks=False)
    return made


def words(data: DataSet, out: Path, **more: object) -> list[str]:
    asked: dict[str, object] = {"fast": True, "recalibrate": "none,vector", **more}
    named = {"root": data.root, "labelled": data.ids, "unlabelled": data.root / "rest.txt"}
    named |= {"probs": data.probs, "output": out}
    return ["run", *folders.options(**named, **asked)]


def steps(out: str) -> list[list[str]]:
    return [shlex.split(line)[2:] for line in out.splitlines() if line.startswith("$ cpseg ")]


def test_the_steps_are_commands_that_give_the_same_labels_and_are_not_done_twice(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    first = command(capsys, *words(data, out))
    assert first.code == 0, first.err
    made = steps(first.out)
    assert [each[0] for each in made] == ["check", "report", "calibrate", "label"]
    stage = (out / "pseudo" / "stage1.txt").read_text().splitlines()
    assert [line.split()[0] for line in stage] == [*data.images[:12], *data.images[12:]]
    left = files(out / "pseudo" / "masks")
    for each in made[2:]:
        moved = [word.replace(str(out), str(again)) for word in each]
        assert command(capsys, *moved).code == 0
    assert files(again / "pseudo" / "masks") == left

    said = first.out.splitlines()[-1]
    found = json.loads((out / "report.json").read_text())
    chosen = found["rules"][found["recommended"]]
    assert said.startswith(f"Chosen: {chosen['in_words']}, by 3-fold cross-validation on 12 ")
    assert "Whether a student gains by these labels is not known" in said
    assert f"of which {100 * chosen['figures']['wrong']['mean']:.1f} % are wrong" in said
    assert f"Promised: {Calibration.load(out / 'rule.safetensors').guarantee()}. " in said
    assert str(out / "pseudo" / "stage1.txt") in said

    rule = (out / "rule.safetensors").stat().st_mtime_ns
    second = command(capsys, *words(data, out))
    assert second.out.count("(done before)") == 2
    assert (out / "rule.safetensors").stat().st_mtime_ns == rule
    assert second.out.splitlines()[-1] == said
    assert command(capsys, *words(data, out, folds=2)).out.count("(done before)") == 1
    (out / "steps.json").write_text((out / "steps.json").read_text()[:-5])  # damaged: no record
    assert "(done before)" not in command(capsys, *words(data, out, folds=2)).out


def test_a_changed_mask_is_noticed(data: DataSet, tmp_path: Path) -> None:
    arguments = parser().parse_args(words(data, tmp_path / "out"))
    before = run._inputs(arguments)
    assert run._inputs(arguments) == before
    newer(data.mask_file(data.images[3]))
    assert run._inputs(arguments) != before


@pytest.mark.parametrize("keep", ["every-pixel", "sets"])
def test_a_choice_can_be_fixed(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], keep: str
) -> None:
    out = tmp_path / "out"
    ran = command(capsys, *words(data, out, keep=keep, alpha="0.2", recalibrate="none"))
    assert ran.code == 0, ran.err
    calibration = Calibration.load(out / "rule.safetensors")
    assert calibration.alpha == (0.2 if keep == "sets" else 0)
    chosen = "this does not take into account that the rule was chosen by these images"
    assert (chosen in ran.out) == (keep == "sets")
    assert calibration.recalibration is None


def test_a_certified_rule_or_a_line_that_says_why_not(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = words(data, tmp_path / "out", keep="certified", fast=None, folds=2, recalibrate="none")
    asked += ["--background", "1", "--max-error"]
    ran = command(capsys, *asked, "0.95")
    assert ran.code == 0, ran.err
    proof = Calibration.load(tmp_path / "out" / "rule.safetensors").certificate
    assert proof is not None
    assert proof.delta == 0.05  # of two rules, with and without suppression, one was chosen
    said = "one of 2 rules and was chosen by these images, so that its delta is 0.1 / 2 and the"
    assert f"{said} statement holds with a confidence of 90 % whichever was chosen" in ran.out
    ran = command(capsys, *asked, "0.001")
    assert ran.code == 2
    assert "a rule that every fold certifies at an error of 0.001, got none" in ran.err
    refused(
        command(capsys, *words(data, tmp_path / "other", keep="certified")),
        "--keep certified or --fast",
    )
    given = words(data, tmp_path / "other", recalibrate="none", context="none")
    ran = command(capsys, *given)
    refused(ran, "--context", "a recalibration, got --recalibrate none")
    assert ran.out == ""  # before any work


def test_where_pseudo_labels_would_cost_the_list_is_of_labelled_images_alone(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scores are those of a student, out of fold: nothing is better than its own labels."""
    labelled = data.images[:12]
    model = ScoringModel("fold 0", tuple(labelled[::2]))
    other = ScoringModel("fold 1", tuple(labelled[1::2]))
    seen = {image: (1 - place % 2,) for place, image in enumerate(labelled)}
    ScoreRecord(data.probs, (model, other), seen, (0,)).write()
    out = tmp_path / "out"
    ran = command(capsys, *words(data, out, recalibrate="none"))
    assert ran.code == 0, ran.err
    assert "These pseudo-labels will cost you" in ran.out
    listed = [line.split()[0] for line in (out / "stage1.txt").read_text().splitlines()]
    assert listed == labelled
    assert not (out / "pseudo").exists()


def test_bad_data_ends_before_any_work(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    record_scores(data.probs, trained_on=data.images[:2])
    ran = command(capsys, *words(data, out))
    assert ran.code == 2
    assert not (out / "report.html").exists()
    asked = words(data, out)
    asked[asked.index("--probs") + 1] = str(data.root / "nothing")
    refused(command(capsys, *asked), "--probs: ", "which is none")


def test_choose() -> None:
    figures = {
        name: {"miou_all": {"mean": value}}
        for name, value in zip("abcd", (1, 2, 4, 3), strict=True)
    }
    kinds = {"a": ("argmax", None), "b": ("labels", None), "c": ("eq4", 0.1), "d": ("eq4", 0.2)}
    found = {
        "recommended": "c",
        "labels_alone": False,
        "keep": {"0.05": None, "0.1": "a"},
        "rules": {
            name: {"kind": kind, "level": level, "figures": figures[name]}
            for name, (kind, level) in kinds.items()
        },
    }
    assert choose(found, "best", "0.05", "0.05") == "c"
    assert choose(found, "every-pixel", "0.05", "0.05") == "b"
    assert choose(found, "sets", "0.20", "0.05") == "d"
    assert choose(found, "certified", "0.05", "0.10") == "a"
    with pytest.raises(ValueError, match="run: expected a rule that every fold certifies"):
        choose(found, "certified", "0.05", "0.05")
    assert choose({**found, "labels_alone": True}, "best", "0.05", "0.05") is None
    assert choose({**found, "recommended": "a"}, "every-pixel", "0.05", "0.05") == "a"


@pytest.mark.nightly
def test_ranks_give_the_labels_of_one_process(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(capsys, *words(data, tmp_path / "one")).code == 0
    ranks = ranks_of(2, [words(data, tmp_path / "two")])
    assert [code for code, _, _ in ranks] == [0, 0], ranks
    masks = [files(tmp_path / name / "pseudo" / "masks") for name in ("one", "two")]
    assert masks[0] == masks[1] != {}
