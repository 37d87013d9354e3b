"""What the scripts for SEEM and GLaMM do around those projects, which stand-ins play here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.folders import files
from tests.helpers import modules

from cpseg.foundation import read_classes
from cpseg.store import read_scores

FOLDER = Path(__file__).parents[1] / "examples" / "foundation"
NAMES = ("prob_files", "seem_probs", "glamm_probs")


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    with modules("foundation", NAMES) as found:
        yield found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    for name, size in (("a/0.png", (8, 12)), ("a/1.jpg", (10, 6))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "ids.txt").write_text("a/0.png masks/0.png\na/1.jpg\n")
    (tmp_path / "classes.txt").write_text("road: road, street\ncar\n")
    return tmp_path


def test_class_scores(example: SimpleNamespace) -> None:
    maps = [np.full((2, 3), value) for value in (0.2, 0.6, 0.3)]
    scores = example.prob_files.class_scores(maps, [2, 1], "none")
    assert scores.shape == (2, 2, 3)
    assert np.allclose(scores[:, 0, 0], [0.4, 0.3])
    rest = example.prob_files.class_scores(maps, [2, 1], "complement")
    assert np.allclose(rest[:, 0, 0], [0.6, 0.4, 0.3])
    assert np.allclose(example.prob_files.class_scores(maps, [2, 1], "prompt"), scores)
    for bad in ([np.full((2, 3), 1.1)], [np.full((2, 3), np.nan)]):
        with pytest.raises(ValueError, match="take the sigmoid of logits"):
            example.prob_files.class_scores(bad, [1], "none")
    with pytest.raises(ValueError, match="expected 3 maps, got 1"):
        example.prob_files.class_scores(maps[:1], [2, 1], "none")
    with pytest.raises(ValueError, match="expected one of"):
        example.prob_files.class_scores(maps, [2, 1], "0")


def test_sigmoid(example: SimpleNamespace) -> None:
    logits = np.array([-1000, -2.0, 0, 2, 1000], np.float32)
    wanted = [0, 1 / (1 + np.exp(2)), 0.5, 1 / (1 + np.exp(-2)), 1]
    with np.errstate(all="raise"):
        assert np.allclose(example.prob_files.sigmoid(logits), wanted, atol=1e-12)


def test_files_are_what_cpseg_reads(example: SimpleNamespace, data: Path) -> None:
    asked = []

    def ask(path: Path, prompts: list[str]) -> list[np.ndarray]:
        asked.append((path.name, prompts))
        height, width = np.array(Image.open(path)).shape[:2]
        return [np.full((height, width), value) for value in (0.2, 0.6, 0.3)]

    how = {"root": data, "ids": data / "ids.txt", "classes": data / "classes.txt"}
    how |= {"background": "complement", "out": data / "P"}
    assert example.prob_files.write_all(ask, **how) == 2
    assert asked == [("0.png", ["road", "street", "car"]), ("1.jpg", ["road", "street", "car"])]
    assert set(files(data / "P")) == {"a/0.npz", "a/1.npz"}
    found = read_scores(data / "P" / "a" / "1.npz")
    assert torch.equal(found[:, 0, 0], torch.tensor([153, 102, 76]) / 255)
    assert found.shape == (3, 10, 6)
    (data / "P" / "a" / "0.npz").unlink()
    assert example.prob_files.write_all(ask, **how) == 1
    classes = read_classes(data / "classes.txt")
    same = example.prob_files.read_classes(data / "classes.txt")
    assert dict(zip(classes.names, map(list, classes.prompts), strict=True)) == same


@pytest.mark.parametrize("text", ["", "a\n\nb", "a\na", "a:", "a: b,"])
def test_bad_lists_of_classes(text: str, example: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(text or "\n")
    with pytest.raises(ValueError, match=r"x, line \d: expected a new 'name'"):
        example.prob_files.read_classes(tmp_path / "x")


@pytest.mark.parametrize("text", ["a b c", "a\n\nb", "a  b"])
def test_bad_id_lists(text: str, example: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match=r"x, line \d: expected 'image' or 'image mask'"):
        example.prob_files.read_ids(tmp_path / "x")


def test_a_write_that_fails_leaves_nothing(example: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        example.prob_files.write(tmp_path / "x.npz", [None])
    assert files(tmp_path) == {}


def test_seem_gets_names_in_turn(example: SimpleNamespace, data: Path) -> None:
    seen = []

    def evaluate_grounding(batch, mode):
        (asked,) = batch
        seen.append((tuple(asked["image"].shape), asked["groundings"]["texts"]))
        assert asked["image"].dtype == torch.uint8
        texts = asked["groundings"]["texts"]
        values = torch.tensor([float(len(text)) for (text,) in texts])
        size = (asked["height"], asked["width"])
        return [{"grounding_mask": values[:, None, None].expand(-1, *size)}]

    model = SimpleNamespace(evaluate_grounding=evaluate_grounding)
    prompts = ["a", "bus", "truck"]
    maps = example.seem_probs.ask(model, data / "a" / "0.png", prompts, at_once=2, side=16)
    assert maps.shape == (3, 8, 12)
    assert np.allclose(maps[:, 0, 0], 1 / (1 + np.exp(-np.array([1, 3, 5]))))
    assert seen == [((3, 16, 24), [["a"], ["bus"]]), ((3, 16, 24), [["truck"]])]


def test_glamm_is_asked_one_prompt_at_a_time(example: SimpleNamespace, data: Path) -> None:
    questions = []

    def answer(image: np.ndarray, question: str) -> torch.Tensor:
        questions.append(question)
        assert image.shape == (8, 12, 3)
        if "car" in question:
            return torch.empty(0, 8, 12, dtype=torch.bfloat16)
        return torch.stack([torch.full((8, 12), -2.0), torch.full((8, 12), 2.0)]).bfloat16()

    maps = example.glamm_probs.ask(answer, data / "a" / "0.png", ["road", "car"])
    assert np.allclose(maps[0], 1 / (1 + np.exp(-2)))
    assert np.array_equal(maps[1], np.zeros((8, 12)))
    assert questions == [f"Can you segment the {x} in this image?" for x in ("road", "car")]


def test_the_scripts_need_neither_cpseg_nor_a_new_python() -> None:
    for name in NAMES:
        tree = ast.parse((FOLDER / f"{name}.py").read_text(), feature_version=(3, 8))
        tops = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {
            alias.name for node in tops if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {node.module for node in tops if isinstance(node, ast.ImportFrom)}
        known = {
            "__future__",
            "argparse",
            "collections.abc",
            "os",
            "tempfile",
            "pathlib",
            "typing",
            "numpy",
        }
        assert names <= known | {"torch", "PIL", "prob_files"}
