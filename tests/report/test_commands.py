"""The commands of a report's rules: they run, and make the rule that they stand beside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.support import folders
from tests.support.folders import DataSet, command, files

from cpseg import Calibration

pytest.importorskip("matplotlib")


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    """12 labelled images and 3 others, with two models' scores."""
    made = folders.make(tmp_path / "data", count=15)
    made.list_ids("ids.txt", made.images[:12])
    made.list_ids("unlabelled.txt", made.images[12:], masks=False)
    other = folders.make(tmp_path / "other", count=15, seed=1)
    for image in made.images:
        (made.root / "second" / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(other.score_file(image), (made.root / "second" / image).with_suffix(".npy"))
    return made


def report(data: DataSet, capsys: pytest.CaptureFixture[str], *more: object) -> dict[str, Any]:
    asked = data.options(background="1", folds=2, max_error="0.9", recalibrate="none,dirichlet")
    asked += ["--show", "0", "--context", "none", "--prior-powers", "0,0.5"]
    facts = data.root / "facts.json"
    ran = command(capsys, "report", *asked, *more, "-o", data.root / "r.html", "--json", facts)
    assert ran.code == 0, ran.err
    found: dict[str, Any] = json.loads(facts.read_text())
    return found


@pytest.mark.nightly
def test_every_kind_of_rule_can_be_made(
    data: DataSet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = report(data, capsys, "--probs", data.root / "second")
    rules = found["rules"]
    assert {rule["kind"] for rule in rules.values()} == {
        *("argmax", "confidence", "eq4", "certified", "labels")
    }
    none = [name for name, rule in rules.items() if rule["commands"] is None]
    assert none
    assert all(rules[name]["kind"] == "confidence" for name in none)
    monkeypatch.chdir(tmp_path)
    for name, (alpha, sources, power) in {
        "raw argmax": (0, 1, 0),
        "eq. 4 at alpha 0.2, class 1 suppressed, raw scores": (0.2, 1, 0),
        "eq. 4 at alpha 0.5, recalibrated scores (dirichlet)": (0.5, 2, 0),
        "certified at 90 % error, raw scores": (None, 1, 0),
        "labels: second as it is": (0, 1, 0),
        "labels: dirichlet map over probs": (0, 1, 0),
        "labels: dirichlet map over probs + second, prior power 0.5": (0, 2, 0.5),
    }.items():
        making, labelling, audit = rules[name]["commands"]
        infinite = ["--allow-infinite"] if making[1] == "calibrate" else []
        ran = command(capsys, *making[1:], *infinite)
        assert ran.code == 0, (name, ran.err)
        made = Calibration.load("rule.safetensors")
        assert alpha is None or made.alpha == alpha
        assert made.background == (1 if "suppressed" in name else None)
        mapped = made.recalibration
        assert (mapped is not None) == ("dirichlet" in name)
        assert mapped is None or (len(mapped.sources), mapped.prior_power) == (sources, power)
        assert command(capsys, *labelling[1:]).code == 0, name
        assert len(files(Path("pseudo/masks"))) == 3
        assert command(capsys, *audit[1:]).code == 0, name
        shutil.rmtree("pseudo")


def test_the_words_name_the_data_as_they_were_named(
    data: DataSet, capsys: pytest.CaptureFixture[str]
) -> None:
    (data.root / "map.json").write_text(json.dumps({"0": 0, "1": 1, "2": 2, "3": 3}))
    maps = ["--class-map", data.root / "map.json", "--class-map", "none"]
    more = ["--probs", data.root / "second", *maps, "--mask-map", data.root / "map.json"]
    found = report(data, capsys, *more, "--upsample")
    model = ["--probs", str(data.root / "second"), "--class-map", "none", "--upsample", "yes"]
    rules = found["rules"]
    making, labelling, _ = rules["labels: second as it is"]["commands"]
    place = making.index("--probs")
    assert making[place : place + 6] == model
    assert making.count("--probs") == 1
    assert making[making.index("--mask-map") + 1] == str(data.root / "map.json")
    assert "--class-map" not in labelling
    both = rules["labels: dirichlet map over probs + second"]["commands"][0]
    assert [both[k + 1] for k, word in enumerate(both) if word == "--class-map"] == [
        str(data.root / "map.json"),
        "none",
    ]


def test_the_page_shows_the_commands_of_what_it_recommends(
    data: DataSet, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(data, capsys)
    page = (data.root / "r.html").read_text()
    making = found["rules"][found["recommended"]]["commands"][0]
    assert f"{' '.join(making[:2])} " in page
    assert "cpseg label" in page
