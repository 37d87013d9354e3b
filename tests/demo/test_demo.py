"""The demo: its scenes, its files, and what it says where scikit-learn is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cpseg import Calibration
from cpseg.cli.command import main
from cpseg.demo import demo, network, student
from cpseg.demo import scenes as demo_scenes
from cpseg.demo.scenes import NUM_CLASSES, VOID, scenes
from cpseg.files import ScoreRecord, read_ids

STUDENTS = [
    "the labelled scenes alone",
    "+ raw argmax",
    "+ calibrated, eq. 4",
    "+ two sources, one map",
    "+ true masks of all",
]
DEMO = sys.modules["cpseg.demo.demo"]
sklearn = pytest.importorskip("sklearn", reason="the demo needs scikit-learn's digits")


@pytest.mark.parametrize("domain", ["source", "target"])
def test_scenes_are_images_with_valid_labels(domain: Any) -> None:
    images, labels = scenes(6, domain=domain, seed=0)
    height, width = demo_scenes.HEIGHT, demo_scenes.WIDTH
    assert (images.shape, images.dtype) == ((6, height, width, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((6, height, width), np.uint8)
    assert set(np.unique(labels)) <= {*range(NUM_CLASSES), VOID}
    for label in labels:
        assert (label == 0).mean() > 0.3, "a dominant background"
        assert ((label > 0) & (label < VOID)).any(), "an object"
        assert (label == VOID).any(), "a rim"


def test_scenes_are_the_same_for_a_seed_and_others_for_another() -> None:
    first, again = (scenes(3, domain="target", seed=1) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (scenes(3, domain="target", seed=2), scenes(3, domain="source", seed=1)):
        assert not np.array_equal(first[0], other[0])
        assert not np.array_equal(first[1], other[1])


def test_all_digits_occur() -> None:
    labels = scenes(60, domain="target", seed=0)[1]
    assert set(np.unique(labels)) == {*range(NUM_CLASSES), VOID}


class Recorder:
    """An array that remembers which rows were asked for."""

    def __init__(self, array: np.ndarray, asked: set[int]) -> None:
        self.array, self.asked = array, asked

    def __getitem__(self, index: Any) -> Any:
        self.asked.update(np.atleast_1d(index).tolist())
        return self.array[index]


def test_no_digit_is_in_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    images, values = demo_scenes._digits()
    used: dict[tuple[str, str], set[int]] = {}
    parts: list[tuple[Any, Any]] = [(d, p) for d in ("source", "target") for p in ("train", "test")]
    for domain, digits in parts:
        asked = used.setdefault((domain, digits), set())
        pair = Recorder(images, asked), Recorder(values, asked)
        monkeypatch.setattr(demo_scenes, "_digits", lambda pair=pair: pair)
        scenes(60, domain=domain, seed=0, digits=digits)
        assert len(asked) > 50
    for first in used:
        for second in used:
            assert first == second or not used[first] & used[second]
    assert max(map(max, used.values())) < len(values)


def test_scenes_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="moon"):
        scenes(1, domain="moon", seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count"):
        scenes(0, domain="source", seed=0)


def shrink(patch: pytest.MonkeyPatch) -> None:
    """A demo of seconds: few scenes, and a map without context."""
    for name, count in (("LABELLED", 10), ("UNLABELLED", 6), ("HELDOUT", 5)):
        patch.setattr(DEMO, name, count)
    patch.setattr(network, "_SOURCE_SCENES", 12)
    patch.setattr(student, "CONTEXT", ())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a small demo, and what it said; tests leave it as it is."""
    out = tmp_path_factory.mktemp("demo")
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        demo(out, steps=20, student_steps=20, say=said.append)
    return out, "\n".join(said)


def test_the_demo_leaves_what_it_promises(
    made: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path, out = made
    rules = ["raw argmax", "constant 0.3", "pixel", "image, suppressed", "pixel, suppressed"]
    text = (tmp_path / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == rules
    assert text in out
    students = (tmp_path / "students.md").read_text()
    assert [line.split("|")[1].strip() for line in students.splitlines()[2:7]] == STUDENTS
    assert students.splitlines()[8].startswith("Train on the labelled scenes")
    assert students.split("\n\n")[0] in out
    for name in ("demo.png", "students.png"):
        with Image.open(tmp_path / name) as picture:
            assert (picture.format, picture.mode) == ("PNG", "RGB")
            assert len(picture.getcolors(2**24) or ()) > 50, "an empty picture"
    for variant in ("image", "pixel"):
        loaded = Calibration.load(tmp_path / f"{variant}.safetensors")
        assert (loaded.variant, loaded.num_images, loaded.alpha) == (variant, 10, 0.1)
        assert (loaded.background, loaded.num_classes) == (0, NUM_CLASSES)
    stacked = Calibration.load(tmp_path / "stacked.safetensors")
    assert stacked.recalibration is not None
    assert stacked.recalibration.sources == (NUM_CLASSES, NUM_CLASSES)
    assert stacked.recalibration.num_images == 10
    names = ("ids.txt", "stage1.txt", "summary.csv", "run.json")
    for folder in ("pseudo", "stacked"):
        assert all((tmp_path / folder / name).is_file() for name in names)
        for name, count in (("ids.txt", 6), ("stage1.txt", 16)):
            lines = (tmp_path / folder / name).read_text().splitlines()
            assert len(lines) == count
            for line in lines:
                image, mask = (np.array(Image.open(tmp_path / "data" / x)) for x in line.split(" "))
                assert mask.shape == image.shape[:2]
                assert set(np.unique(mask)) <= {*range(NUM_CLASSES), VOID}
    with_void = [np.array(Image.open(x)) for x in (tmp_path / "stacked" / "masks").rglob("*.png")]
    assert not any((mask == VOID).any() for mask in with_void), "one map labels every pixel"
    assert not list(tmp_path.rglob("*.part"))

    # The command continues the demo's files, and says the same.
    data = tmp_path / "data"
    words = ["--root", data, "--ids", data / "unlabelled.txt", "--probs", data / "probs"]
    words += ["--calibration", tmp_path / "pixel.safetensors"]
    assert main(["evaluate", *map(str, words)]) == 0
    said = capsys.readouterr().out
    figures = {
        tuple(cell.strip() for cell in line.split("|")) for line in (said + text).splitlines()
    }
    assert len([cells for cells in figures if cells[1:2] == ("pixel, suppressed",)]) == 1


def test_the_lists_of_the_data_are_disjoint_and_have_masks_and_both_scores(
    made: tuple[Path, str],
) -> None:
    data = made[0] / "data"
    lists = {name: read_ids(data / f"{name}.txt") for name in ("labelled", "unlabelled", "heldout")}
    assert [len(pairs) for pairs in lists.values()] == [10, 6, 5]
    truth = scenes(5, domain="target", seed=0, digits="test")[1]
    for pair, mask in zip(lists["heldout"], truth, strict=True):
        assert np.array_equal(np.array(Image.open(data / str(pair.mask))), mask), "of other digits"
    images = [pair.image for pairs in lists.values() for pair in pairs]
    assert len(set(images)) == 21
    for pair in (pair for pairs in lists.values() for pair in pairs):
        assert (data / str(pair.mask)).is_file()
        for folder in ("probs", "student_probs"):
            scores = np.load((data / folder / pair.image).with_suffix(".npy"))
            assert scores.shape == (NUM_CLASSES, demo_scenes.HEIGHT, demo_scenes.WIDTH)


def test_the_lines_of_the_readme_run_on_the_data(
    made: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = made[0] / "data"
    both = ["--probs", str(data / "probs"), "--probs", str(data / "student_probs")]
    root, made = ["--root", str(data)], str(tmp_path / "c.safetensors")
    labelled = ["--ids", str(data / "labelled.txt")]
    words = ["--recalibrate", "dirichlet", "--alpha", "none", "--background", "none", "-o", made]
    assert main(["calibrate", *root, *labelled, *both, *words, "--context", "none"]) == 0
    heldout = ["--ids", str(data / "heldout.txt")]
    assert main(["evaluate", *root, *heldout, *both, "--calibration", made]) == 0
    out, err = capsys.readouterr()
    assert "recalibrated argmax" in out
    assert "warning" not in err


def test_no_student_scores_a_scene_whose_labels_it_saw(made: tuple[Path, str]) -> None:
    data = made[0] / "data"
    record = ScoreRecord.of(data / "student_probs")
    assert record is not None
    names = {
        name: [pair.image for pair in read_ids(data / f"{name}.txt")]
        for name in ("labelled", "unlabelled", "heldout")
    }
    for image in names["labelled"]:
        assert record.knows(image)
        assert not record.saw(image)
    for image in (*names["unlabelled"], *names["heldout"]):
        assert not record.knows(image)
    assert {*record.models[0].trained_on} == {*names["labelled"]}


@pytest.mark.nightly
@pytest.mark.usefixtures("small")
def test_a_second_demo_with_another_seed_replaces_the_first(
    made: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("students.md", "table.md", "students.png", "demo.png")
    masks = [f"{folder}/masks/images/010.png" for folder in ("pseudo", "stacked")]
    first = [(made[0] / name).read_bytes() for name in (*names, *masks)]
    words = ["demo", "-o", str(tmp_path), "--steps", "20", "--student-steps", "20"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert (tmp_path / "students.md").read_text().splitlines()[3] in out
    assert [(tmp_path / name).read_bytes() for name in (*names, *masks)] == first
    assert main([*words, "--seed", "1"]) == 0
    for name, before in zip((*names, *masks), first, strict=True):
        assert (tmp_path / name).read_bytes() != before


def test_without_scikit_learn_the_demo_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    demo_scenes._digits.cache_clear()
    earlier = tmp_path / "pseudo" / "ids.txt"
    earlier.parent.mkdir()
    earlier.write_text("a b\n")
    assert main(["demo", "-o", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("cpseg: error: ")
    assert err.count("\n") == 1
    assert "pip install cpseg[demo]" in err
    assert earlier.exists(), "a demo that cannot start takes nothing away"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("option", ["--steps", "--student-steps"])
def test_steps_below_one_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert main(["demo", "-o", str(tmp_path / "out"), option, "0"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "steps" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
def test_a_student_gains_from_the_recommended_labels(tmp_path: Path) -> None:
    said: list[str] = []
    demo(tmp_path, say=said.append)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (tmp_path / "students.md").read_text().splitlines()[2:7]
    ]
    miou = {name: float(each) for name, _, each, _ in rows}
    wrong = {name: float(each.removesuffix(" %")) for name, _, _, each in rows}
    alone, raw, paper, both, true = STUDENTS
    for other in (alone, raw, paper):
        assert miou[both] > miou[other] + 0.01, rows
        assert wrong[both] < wrong[other] - 0.3, rows
    assert miou[true] > miou[alone] + 0.05, "no room to gain"
    assert any(text.strip().startswith(f"Train on the labelled scenes {both}") for text in said)
