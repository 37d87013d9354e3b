"""The demo: its scenes, its files, and what it says where scikit-learn is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cpseg import Calibration
from cpseg.cli.command import main
from cpseg.demo import demo
from cpseg.demo import scenes as demo_scenes
from cpseg.demo.scenes import NUM_CLASSES, VOID, class_scores, scenes, train_foundation

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


def test_training_is_the_same_for_a_seed_and_leaves_random_state_alone() -> None:
    images = scenes(2, domain="target", seed=0)[0]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    steps: list[tuple[int, int]] = []
    first = train_foundation(seed=3, steps=3, progress=lambda *done: steps.append(done))
    assert torch.equal(torch.get_rng_state(), before)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    torch.manual_seed(6)
    second = train_foundation(seed=3, steps=3)
    scores = class_scores(first, images)
    assert np.array_equal(scores, class_scores(second, images))
    assert scores.shape == (2, NUM_CLASSES, demo_scenes.HEIGHT, demo_scenes.WIDTH)
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)
    assert np.array_equal(scores, class_scores(first, images, batch=1)) or np.allclose(
        scores, class_scores(first, images, batch=1), atol=1e-5
    )


def test_training_learns_something() -> None:
    images, labels = scenes(8, domain="source", seed=9, digits="test")
    known = labels != VOID
    wrong = [
        (class_scores(train_foundation(seed=0, steps=n), images).argmax(1) != labels)[known].mean()
        for n in (1, 20)
    ]
    assert wrong[1] < 0.9 * wrong[0]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DEMO, "LABELLED", 10)
    monkeypatch.setattr(DEMO, "UNLABELLED", 6)


@pytest.mark.usefixtures("small")
def test_the_demo_leaves_what_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "-o", str(tmp_path), "--steps", "4"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rules = ["raw argmax", "constant 0.3", "pixel", "image, suppressed", "pixel, suppressed"]
    text = (tmp_path / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == rules
    assert text in out
    with Image.open(tmp_path / "demo.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        assert len(np.unique(np.array(picture).reshape(-1, 3), axis=0)) > 50, "an empty picture"
    for variant in ("image", "pixel"):
        loaded = Calibration.load(tmp_path / f"{variant}.safetensors")
        assert (loaded.variant, loaded.num_images, loaded.alpha) == (variant, 10, 0.1)
        assert (loaded.background, loaded.num_classes) == (0, NUM_CLASSES)
    names = ("ids.txt", "stage1.txt", "summary.csv", "run.json")
    assert all((tmp_path / "pseudo" / name).is_file() for name in names)
    for name, count in (("ids.txt", 6), ("stage1.txt", 16)):
        lines = (tmp_path / "pseudo" / name).read_text().splitlines()
        assert len(lines) == count
        for line in lines:
            image, mask = (np.array(Image.open(tmp_path / "data" / x)) for x in line.split(" "))
            assert mask.shape == image.shape[:2]
            assert set(np.unique(mask)) <= {*range(NUM_CLASSES), VOID}
    assert not list(tmp_path.rglob("*.part"))

    # The command continues the demo's files, and says the same.
    heldout = tmp_path / "data" / "unlabelled.txt"
    words = ["--root", tmp_path / "data", "--ids", heldout, "--probs", tmp_path / "data" / "probs"]
    words += ["--calibration", tmp_path / "pixel.safetensors"]
    assert main(["evaluate", *map(str, words)]) == 0
    said = capsys.readouterr().out
    figures = {
        tuple(cell.strip() for cell in line.split("|")) for line in (said + text).splitlines()
    }
    assert len([cells for cells in figures if cells[1:2] == ("pixel, suppressed",)]) == 1


@pytest.mark.usefixtures("small")
def test_a_second_demo_with_another_seed_replaces_the_first(tmp_path: Path) -> None:
    said: list[str] = []
    first = demo(tmp_path, steps=1, say=said.append)
    mask = tmp_path / "pseudo" / "masks" / "images" / "010.png"
    before = mask.read_bytes()
    again = demo(tmp_path, steps=1, say=said.append)
    assert str(again) == str(first)
    assert mask.read_bytes() == before
    other = demo(tmp_path, seed=1, steps=1, say=said.append)
    assert str(other) != str(first)
    assert said


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
def test_steps_below_one_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-o", str(tmp_path / "out"), "--steps", "0"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "steps" in err
    assert not (tmp_path / "out").exists()
