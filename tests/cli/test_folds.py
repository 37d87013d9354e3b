"""``cpseg folds``: what it writes, what it says to do next, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support import folders
from tests.support.folders import DataSet, command, done, files, refused
from tests.support.processes import ranks_of

from cpseg.files import ScoreRecord, find_scores, read_folds, read_ids


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return folders.make(tmp_path, count=6)


def scored(data: DataSet, folder: str, *, classes: int = 4) -> Path:
    """A folder of scores of every image; the values are those of its name."""
    for image in data.images:
        path = (data.root / folder / image).with_suffix(".npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.full((classes, 12, 16), len(files(data.root)) % 97 / 97, np.float16))
    return data.root / folder


def test_deal_and_join_as_the_command_says(
    data: DataSet, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    labelled, out = data.list_ids("labelled.txt", data.images[:5]), tmp_path / "my folds"
    said = done(command(capsys, "folds", "--ids", labelled, "--folds", 2, "-o", out)).out
    assert said.splitlines()[0] == f"{out}: 5 images in 2 folds of 2 or 3"
    then = said.splitlines()[-1]
    assert then == f"cpseg folds --join '{out}' --scores S0 S1 --whole SALL -o SCORES"
    assert "fold_*/train.txt" in said
    assert f"all of {labelled}" in said
    folds = read_folds(out)
    assert (folds.seed, sorted(folds.images)) == (0, sorted(read_ids(labelled)))
    again = done(command(capsys, "folds", "--ids", labelled, "--folds", 2, "-o", out)).out
    assert again == said
    s0, s1, whole = (scored(data, name) for name in ("S0", "S1", "SALL"))
    words = ["folds", "--join", out, "--scores", s0, s1, "--whole", whole, "--ids", labelled]
    joined = tmp_path / "J"
    said = done(command(capsys, *words, "-o", joined)).out
    assert said == (
        f"{joined}: 5 labelled images scored out of fold, 1 others by the model of all; 6 files "
        "written by this rank\n"
    )
    for k, student in enumerate((s0, s1)):
        for pair in folds.held(k):
            own = find_scores(student, pair.image).read_bytes()
            assert find_scores(joined, pair.image).read_bytes() == own
    record = ScoreRecord.of(joined)
    assert record is not None
    assert record.trained_on == set(data.images[:5])
    assert "0 files written" in done(command(capsys, *words, "-o", joined)).out


def test_folds_and_seed_have_defaults(
    data: DataSet, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    done(command(capsys, "folds", "--ids", data.ids, "-o", tmp_path / "a"))
    given = ["--folds", 4, "--seed", 0, "-o", tmp_path / "b"]
    done(command(capsys, "folds", "--ids", data.ids, *given))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    done(command(capsys, "folds", "--ids", data.ids, "--seed", 1, "-o", tmp_path / "c"))
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_what_cannot_be_dealt(
    data: DataSet, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = ["-o", tmp_path / "F"]
    one = data.list_ids("one.txt", data.images[:1])
    refused(command(capsys, "folds", "--ids", one, *out), "folds: ", "at least 2 labelled images")
    refused(
        command(capsys, "folds", "--ids", data.ids, "--folds", 7, *out),
        "folds: expected 2 to 6 folds for 6 labelled images, got 7; pass another --folds",
    )
    refused(command(capsys, "folds", "--ids", data.ids, "--folds", 1, *out), "whole number >= 2")
    assert not (tmp_path / "F").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "folds: expected --ids, or --join, got no --ids"),
        (["--scores", "S"], "--scores: expected --join FOLDS, got none"),
        (["--ids", "L", "--whole", "S"], "--whole: expected --join FOLDS, got none"),
        (["--ids", "L", "--others", "L"], "--others: expected --join FOLDS, got none"),
        (["--join", "F", "--whole", "S"], "expected --join with --scores and --whole, got no --sc"),
        (["--join", "F", "--scores", "S"], "--join with --scores and --whole, got no --whole"),
        (
            ["--join", "F", "--scores", "S", "--whole", "S", "--folds", "4"],
            "--folds: expected no --join, got --join",
        ),
        (
            ["--join", "F", "--scores", "S", "--whole", "S", "--seed", "0"],
            "--seed: expected no --join, got --join",
        ),
    ],
)
def test_options_that_do_not_belong_together(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    refused(command(capsys, "folds", *words, "-o", tmp_path / "F"), says)


def test_refusals_of_a_join_are_one_line(
    data: DataSet, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    done(command(capsys, "folds", "--ids", data.ids, "--folds", 2, "-o", tmp_path / "F"))
    s0, s1, whole = (scored(data, name) for name in ("S0", "S1", "SALL"))
    words = ["folds", "--join", tmp_path / "F", "--whole", whole, "-o", tmp_path / "J", "--scores"]
    refused(command(capsys, *words, s0), "2 folders of scores for 2 folds, got 1")
    image = read_folds(tmp_path / "F").held(1)[0].image
    find_scores(s1, image).unlink()
    refused(command(capsys, *words, s0, s1), f"{s1}: ", image, "fold_1/train.txt")
    scored(data, "S1", classes=5)
    refused(command(capsys, *words, s0, s1), "4 classes as in", "got 5")
    refused(command(capsys, *words, s0, tmp_path / "none"), "which is none")
    refused(command(capsys, "folds", "--join", tmp_path, *words[3:], s0, s1), "folds.json")
    assert not (tmp_path / "J").exists()


@pytest.mark.nightly
def test_ranks_join_the_same_folder(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done(command(capsys, "folds", "--ids", data.ids, "--folds", 2, "-o", tmp_path / "F"))
    parts = [str(scored(data, name)) for name in ("S0", "S1")]
    words = ["folds", "--join", str(tmp_path / "F"), "--whole", str(scored(data, "SALL"))]
    words += ["--scores", *parts, "-o"]
    done(command(capsys, *words, tmp_path / "one"))
    ranks = ranks_of(2, [[*words, str(tmp_path / "two")]])
    assert [code for code, _, _ in ranks] == [0, 0], ranks
    assert "; 3 files written by this rank" in ranks[0][1]
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert set(one) == set(two)
    assert {name: one[name] for name in one if name != "manifest.jsonl"} == {
        name: two[name] for name in two if name != "manifest.jsonl"
    }
