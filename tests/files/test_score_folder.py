"""Records of score folders: who scored which image, and what that model was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.folders import complains
from tests.support.helpers import raises

from cpseg.files import Pair, ScoreRecord, record_scores
from cpseg.files.score_folder import ScoringModel, carry_record

FOLD, WHOLE = ScoringModel("fold", ("b",)), ScoringModel("all", ("a", "b", "c"))


@contextmanager
def refuses(path: object, *parts: str) -> Iterator[None]:
    """A ``ValueError`` in one line that names the file and says ``parts``."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        yield
    complains(caught.value, path, *parts)


def joined(folder: Path) -> ScoreRecord:
    """Image a by a model trained on b, all others by one trained on a, b and c."""
    record = ScoreRecord(folder, (FOLD, WHOLE), {"a": (0,)}, (1,))
    record.write()
    return record


def test_a_record_comes_back(tmp_path: Path) -> None:
    record = joined(tmp_path)
    assert ScoreRecord.of(tmp_path) == record
    assert ScoreRecord.of(str(tmp_path)) == record
    assert ScoreRecord.of(tmp_path / "nowhere") is None
    assert repr(record) == f"ScoreRecord({tmp_path}: fold, all; 3 images trained on)"


def test_saw_is_of_the_model_that_scored_the_image(tmp_path: Path) -> None:
    record = joined(tmp_path)
    assert [record.saw(image) for image in "abcd"] == [False, True, True, False]
    assert [record.knows(image) for image in "abcd"] == [True, True, True, False]
    assert record.trained_on == {*"abc"}
    assert record.saw("./b"), "the same name"


def test_images_are_the_same_if_their_score_file_is(tmp_path: Path) -> None:
    record_scores(tmp_path, trained_on=["images/a.png", "images/b.png"])
    record = ScoreRecord.of(tmp_path)
    assert record is not None
    assert [record.saw(f"images/{name}") for name in ("a.png", "a.jpg", "c.png")] == [1, 1, 0]
    assert not record.saw("a.png"), "nothing says that it is images/a.png"
    np.save(tmp_path / "a.npy", np.zeros(1))  # the file of images/a.png, without its folder
    record = ScoreRecord.of(tmp_path)
    assert record is not None
    assert [record.saw(name) for name in ("a.png", "images/a.png", "b.png")] == [1, 1, 0]
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images/a.npy", np.zeros(1))  # now it has one of its own
    record = ScoreRecord.of(tmp_path)
    assert record is not None
    assert [record.saw(name) for name in ("a.png", "images/a.png")] == [0, 1]


def test_a_training_script_records_its_model(tmp_path: Path) -> None:
    made = record_scores(tmp_path / "S", trained_on=[Pair("b", "m"), "./a", "a"], name="net")
    assert made == ScoreRecord.of(tmp_path / "S")
    assert made.models == (ScoringModel("net", ("a", "b")),)
    assert json.loads((tmp_path / "S/scores.json").read_text()) == {
        "format": 1,
        "kind": "cpseg scores",
        "models": [{"name": "net", "trained_on": ["a", "b"]}],
        "scored_by": {},
        "default": [0],
    }
    record_scores(tmp_path / "S", trained_on=[])  # trained anew, on none of these images
    again = ScoreRecord.of(tmp_path / "S")
    assert again is not None
    assert not again.saw("a")


def test_what_cannot_be_recorded(tmp_path: Path) -> None:
    for names in ("a.png", 3, [1], [()], [None]):
        with raises(TypeError, "record_scores", "names|a list of images"):
            record_scores(tmp_path, trained_on=names)  # type: ignore[arg-type]
    with raises(TypeError, "record_scores", "names, got 3"):
        record_scores(tmp_path, trained_on=[], name=3)  # type: ignore[arg-type]
    joined(tmp_path)
    with raises(ValueError, "record_scores", "joined from several"):
        record_scores(tmp_path, trained_on=["a"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "a record of format 1, got format 2"),
        ({"models": [{"name": "x"}]}, "a valid models"),
        ({"models": [{"name": "x", "trained_on": [1]}]}, "a valid models"),
        ({"models": []}, "models 0..-1"),
        ({"scored_by": {"a": 0}}, "a valid scored_by"),
        ({"scored_by": {"a": [2]}}, "models 0..1"),
        ({"scored_by": ["a"]}, "a valid scored_by"),
        ({"default": [-1]}, "a valid default"),
        ({"default": 1}, "a valid default"),
    ],
)
def test_damaged_records(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    joined(tmp_path)
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with refuses(path, says):
        ScoreRecord.of(tmp_path)


def test_a_torn_record_is_refused_and_another_programs_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text('{"kind": "cpseg sc')
    with refuses(tmp_path / "scores.json", "unreadable"):
        ScoreRecord.of(tmp_path)
    for content in ("[0.5, 0.25]", '{"mIoU": 0.5}'):
        (tmp_path / "scores.json").write_text(content)
        assert ScoreRecord.of(tmp_path) is None


def test_what_is_made_from_several_folders_carries_their_records(tmp_path: Path) -> None:
    joined(tmp_path / "A")
    record_scores(tmp_path / "B", trained_on=["d"], name="other")
    (tmp_path / "C").mkdir()
    carry_record([tmp_path / "C"], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    carry_record([tmp_path / name for name in "CAB"], tmp_path / "out")
    record = ScoreRecord.of(tmp_path / "out")
    assert record is not None
    assert [model.name for model in record.models] == ["fold", "all", "other"]
    assert (record.scored_by, record.default) == ({"a": (0, 2)}, (1, 2))
    assert [record.saw(image) for image in "abcde"] == [False, True, True, True, False]
    carry_record([tmp_path / "A"], tmp_path / "again")
    again = ScoreRecord.of(tmp_path / "again")
    assert again is not None
    assert (again.models, again.scored_by, again.default) == ((FOLD, WHOLE), {"a": (0,)}, (1,))
