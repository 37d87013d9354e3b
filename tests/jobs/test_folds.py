"""Scores of folds put together: the bytes of the model that did not see an image, or a refusal."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.folders import complains, files

from cpseg.files import Folds, Pair, ScoreRecord, find_scores, record_scores
from cpseg.jobs import deal_folds, join_folds
from cpseg.jobs.folds import Joined


@dataclass(frozen=True)
class Students:
    """Folds of some images, the scores of every student for every image, and an id list."""

    at: Path
    folds: Folds[Pair]

    @property
    def scores(self) -> list[Path]:
        return [self.at / f"S{k}" for k in range(self.folds.count)]

    def join(self, **changed: Any) -> Joined:
        given = {"folder": self.at / "F", "scores": self.scores, "whole": self.at / "S"} | changed
        return join_folds(**{"out": self.at / "out", **given})

    def write(self, folder: str, image: str, value: float, classes: int = 3) -> Path:
        path = (self.at / folder / image).with_suffix(".npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.full((classes, 2, 2), value, np.float16))
        return path

    def value(self, image: str, out: str = "out") -> float:
        return float(np.load(find_scores(self.at / out, image)).mean())

    def refuses(self, where: object, *parts: str, **changed: Any) -> None:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            self.join(**changed)
        complains(caught.value, where, *parts)
        assert not (self.at / "out").exists(), "nothing is written before all is checked"


def students(at: Path, images: int = 7, count: int = 3, others: int = 2) -> Students:
    """The student of fold k says k / 16 everywhere, that of all images 0.5."""
    at.mkdir(exist_ok=True)
    names = [f"i/{number:02d}" for number in range(images)]
    (at / "ids.txt").write_text("".join(f"{name}.png m/{name}.png\n" for name in names))
    made = Students(at, deal_folds(at / "ids.txt", at / "F", folds=count))
    new = [f"new/{number}" for number in range(others)]
    for name in (*names, *new):
        for k in range(count):
            made.write(f"S{k}", f"{name}.png", k / 16)
        made.write("S", f"{name}.png", 0.5)
    return made


@pytest.mark.parametrize(
    ("images", "count", "others"), [(2, 2, 0), (3, 2, 1), (5, 5, 2), (8, 3, 1), (9, 4, 0)]
)
def test_every_image_has_the_bytes_of_the_model_that_did_not_see_it(
    images: int, count: int, others: int, tmp_path: Path
) -> None:
    at = tmp_path
    made = students(at, images, count, others)
    assert made.join() == Joined(images, others, images + others)
    for k in range(count):
        for pair in made.folds.held(k):
            source = find_scores(at / f"S{k}", pair.image)
            assert find_scores(at / "out", pair.image).read_bytes() == source.read_bytes()
    assert all(made.value(f"new/{number}") == 0.5 for number in range(others))
    assert len(list((at / "out").rglob("*.npy"))) == images + others


def no_link(*_: object) -> None:
    raise OSError(18, "Invalid cross-device link")


def test_the_record_says_who_scored_and_who_was_trained_on_what(tmp_path: Path) -> None:
    made = students(tmp_path)
    made.join()
    record = ScoreRecord.of(tmp_path / "out")
    assert record is not None
    images = {pair.image for pair in made.folds.images}
    assert record.trained_on == images
    assert not any(map(record.saw, images))
    assert all(map(record.knows, images))
    assert not record.knows("new/0.png")
    assert [model.name for model in record.models] == [
        "fold 0 (S0)",
        "fold 1 (S1)",
        "fold 2 (S2)",
        "all (S)",
    ]
    for pair, k in zip(made.folds.images, made.folds.fold, strict=True):
        assert record.scored_by[pair.image] == (k,)
        for model in (*record.models[:k], *record.models[k + 1 :]):
            assert pair.image in model.trained_on
        assert pair.image not in record.models[k].trained_on


def test_files_are_links_and_copies_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = students(tmp_path)
    made.join(out=tmp_path / "links")
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", no_link)
        made.join(out=tmp_path / "copies")
    for name in ("i/00.png", "new/1.png"):
        fold = dict(zip(made.folds.images, made.folds.fold, strict=True))
        k = fold.get(Pair(name, f"m/{name}"), 3)
        source = find_scores([*made.scores, tmp_path / "S"][k], name)
        assert os.path.samefile(source, find_scores(tmp_path / "links", name))
        copied = find_scores(tmp_path / "copies", name)
        assert copied.read_bytes() == source.read_bytes()
        assert not os.path.samefile(source, copied)


@pytest.mark.parametrize("links", [True, False])
def test_a_stopped_join_goes_on_and_changed_scores_are_taken_again(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = students(tmp_path)
    if not links:
        monkeypatch.setattr(os, "link", no_link)

    def stops(items: Any, count: int, title: str) -> Any:
        for number, item in enumerate(items):
            if number == 4:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        made.join(progress=stops)
    assert ScoreRecord.of(tmp_path / "out") is not None, "no scores without their record"
    assert made.join() == Joined(7, 2, 5)
    whole = files(tmp_path / "out")
    assert made.join() == Joined(7, 2, 0)
    assert files(tmp_path / "out") == whole
    new = tmp_path / "S/new/0.npy"
    new.unlink()  # as tools do that write a file whole: a new one under the old name
    made.write("S", "new/0.png", 0.25)
    assert made.join() == Joined(7, 2, 1)
    assert made.value("new/0.png") == 0.25
    held = made.folds.held(1)[0].image
    find_scores(tmp_path / "S1", held).unlink()
    np.savez((tmp_path / "S1" / held).with_suffix(".npz"), np.full((3, 2, 2), 0.75))
    made.join()
    assert find_scores(tmp_path / "out", held).suffix == ".npz", "not beside the old form"
    assert not list((tmp_path / "out").rglob(".*.part"))


def test_all_scores_are_taken_or_those_of_a_list(tmp_path: Path) -> None:
    made = students(tmp_path, others=3)
    (tmp_path / "others.txt").write_text("new/2.png\ni/00.png\n")
    assert made.join(others=tmp_path / "others.txt", out=tmp_path / "few") == Joined(7, 1, 8)
    assert made.value("new/2.png", "few") == 0.5
    fold = dict(zip(made.folds.images, made.folds.fold, strict=True))
    own = fold[Pair("i/00.png", "m/i/00.png")] / 16
    assert made.value("i/00.png", "few") == own, "a labelled image stays out of fold"
    (tmp_path / "others.txt").write_text("new/9.png\n")
    made.refuses(tmp_path / "S", "new/9.npy", others=tmp_path / "others.txt")


def test_a_flat_folder_of_all_scores_hides_no_labelled_image(tmp_path: Path) -> None:
    made = students(tmp_path)
    for path in [*(tmp_path / "S").rglob("*.npy")]:
        path.rename(tmp_path / "S" / path.name)
    assert made.join() == Joined(7, 2, 9)
    assert not (tmp_path / "out/00.npy").exists(), "the scores of the model that saw the image"
    assert made.value("elsewhere/0.png") == 0.5


def test_missing_scores_name_fold_and_folder(tmp_path: Path) -> None:
    made = students(tmp_path)
    image = made.folds.held(1)[0].image
    find_scores(tmp_path / "S1", image).unlink()
    made.refuses(tmp_path / "S1", image, "fold 1 holds out", "fold_1/score.txt", "fold_1/train.txt")


def test_folders_that_are_not_those_of_the_folds(tmp_path: Path) -> None:
    made = students(tmp_path)
    one, two, three = made.scores
    made.refuses("folds", "3 folders of scores for 3 folds, got 2", scores=[one, two])
    made.refuses("folds", "for 3 folds, got 4", scores=[one, two, three, tmp_path / "S"])
    made.refuses("folds", f"every folder once, got {two} twice", scores=[one, two, two])
    made.refuses("folds", f"{one} twice", whole=one)
    made.refuses("folds", "which is none", scores=[one, two, tmp_path / "S9"])
    made.refuses("folds", "outside those of the scores", out=one / "out")
    made.refuses("folds", "outside those of the scores", out=tmp_path / "S")


def test_other_classes(tmp_path: Path) -> None:
    made = students(tmp_path)
    path = made.write("S", "new/1.png", 0.5, classes=4)
    made.refuses(path, "3 classes as in", "got 4")
    made.write("S", "new/1.png", 0.5)
    for folder in (*made.scores, tmp_path / "S"):
        (folder / "classes.txt").write_text("a\nb\nc\n")
    (tmp_path / "S2/classes.txt").write_text("b\na\nc\n")
    made.refuses(tmp_path / "S2/classes.txt", "the class names of", "in the same order")
    (tmp_path / "S2/classes.txt").write_text("a\nb\nc\n")
    made.join()
    assert (tmp_path / "out/classes.txt").read_text() == "a\nb\nc\n"


def test_folders_that_record_another_fold(tmp_path: Path) -> None:
    made = students(tmp_path)
    for k, folder in enumerate(made.scores):
        record_scores(folder, trained_on=[*made.folds.train(k), "more.png"])
    one, two, three = made.scores
    made.refuses(two, "fold 0 by a model that did not see", scores=[two, one, three])
    made.join()
    record = ScoreRecord.of(tmp_path / "out")
    assert record is not None
    assert all("more.png" in model.trained_on for model in record.models[:3])
    assert record.knows("more.png")


def test_lists_that_changed_since_the_deal(tmp_path: Path) -> None:
    made = students(tmp_path)
    lines = (tmp_path / "ids.txt").read_text().splitlines(keepends=True)
    (tmp_path / "ids.txt").write_text("".join(lines[:-1]))
    made.refuses(tmp_path / "ids.txt", "7 images that folds.json records", ids=tmp_path / "ids.txt")
    (tmp_path / "ids.txt").write_text("".join(reversed(lines)))
    made.join(ids=tmp_path / "ids.txt", out=tmp_path / "other")
    path = tmp_path / "F/fold_0/train.txt"
    path.write_text(path.read_text() + lines[0])
    with pytest.raises(ValueError, match=r"train\.txt"):
        made.join()


def test_two_images_with_one_score_file(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("".join(f"{folder}/0.png m\n" for folder in "abcde"))
    made = Students(tmp_path, deal_folds(tmp_path / "ids.txt", tmp_path / "F", folds=2))
    for folder in ("S0", "S1", "S"):
        made.write(folder, "0.png", 0.5)
    made.refuses(tmp_path / "S0/0.npy", "scores of one image")


def test_another_join_in_the_folder_is_refused(tmp_path: Path) -> None:
    made = students(tmp_path)
    made.join()
    shutil.copytree(tmp_path / "S", tmp_path / "S9")
    with pytest.raises(ValueError, match="another run's"):
        made.join(whole=tmp_path / "S9")
    content = json.loads((tmp_path / "out/scores.json").read_text())
    assert content["models"][3]["name"] == "all (S)"
