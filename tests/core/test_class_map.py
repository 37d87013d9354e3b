"""From a model's classes to those of a data set: sums, maxima, JSON, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.folders import complains

from cpseg.core.class_map import ClassMap, parse_class_map, read_class_map


def softmax(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).softmax(-3)


def test_sum_adds_the_scores_of_merged_classes() -> None:
    probs = softmax(2, 4, 3, 5)
    merged = ClassMap((0, 2, None, 0))(probs + 0)  # class 1 has no model class: zeros
    want = np.zeros((2, 3, 3, 5), np.float32)
    want[:, 0] = probs[:, 0] + probs[:, 3]
    want[:, 2] = probs[:, 1]
    assert merged.dtype == torch.float32
    np.testing.assert_allclose(merged, want, rtol=1e-6)
    assert torch.equal(ClassMap((0, 2, None, 0))(probs[0]), merged[0])


def test_max_takes_the_largest_of_merged_classes() -> None:
    probs = torch.rand(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    merged = ClassMap((1, 0, 1, None), "max")(probs)
    given = probs.numpy()
    want = np.stack([given[:, 1], np.maximum(given[:, 0], given[:, 2])], axis=1)
    assert np.array_equal(merged, want)
    assert torch.equal(ClassMap((1, 0, 1, None), "max")(probs[0]), merged[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_the_result_is_float32_whatever_comes_in(dtype: torch.dtype, reduce: str) -> None:
    probs = softmax(3, 2, 2).to(dtype)
    assert ClassMap((0, 1, 1), reduce)(probs).dtype == torch.float32


def test_the_input_is_left_as_it_was() -> None:
    probs = softmax(3, 2, 2)
    before = probs.clone()
    for reduce in ("sum", "max"):
        ClassMap((0, 1, 1), reduce)(probs)
        ClassMap((0, 1, 2), reduce)(probs)
    assert torch.equal(probs, before)


def test_a_sum_that_rounding_took_above_one_is_one() -> None:
    probs = torch.tensor([0.7, 0.31]).reshape(2, 1, 1)
    assert ClassMap((0, 0))(probs).item() == 1


def test_rounding_may_add_half_a_step_for_every_score() -> None:
    """Uniform scores of 150 classes, each 1.7 of 255 and stored as 2."""
    stored = (torch.full((150, 1, 1), 255 / 150).round() / 255).to(torch.float32)
    assert float(stored.sum()) > 1.17
    assert float(ClassMap((0,) * 150)(stored)) == 1
    with pytest.raises(ValueError, match=r"sums of scores up to 1, got 1\.35"):
        ClassMap((0,) * 150)(stored * 1.15)


def test_sums_above_one_are_refused_and_maxima_are_not() -> None:
    probs = torch.tensor([0.7, 0.9]).reshape(2, 1, 1)
    with pytest.raises(ValueError, match=r"1\.6") as caught:
        ClassMap((0, 0))(probs)
    complains(caught.value, "class map", "'max'")
    assert ClassMap((0, 0), "max")(probs).item() == pytest.approx(0.9)


@pytest.mark.parametrize("classes", [2, 4])
def test_another_number_of_model_classes_is_refused(classes: int) -> None:
    with pytest.raises(ValueError, match="3 model classes") as caught:
        ClassMap((0, 1, 1))(softmax(classes, 2, 2))
    complains(caught.value, "class map", f"got [{classes}, 2, 2]")


def test_a_map_by_index_needs_nothing_else() -> None:
    assert parse_class_map({"0": 1, "2": None, "1": 0}) == ClassMap((1, 0, None))


def test_a_map_by_name_uses_the_names() -> None:
    content = {
        "map": {"sky": "other", "car": "vehicle", "2": 1, "void": None},
        "model_classes": ["void", "car", "bus", "sky"],
        "classes": ["other", "vehicle"],
        "reduce": "max",
    }
    assert parse_class_map(content) == ClassMap((None, 1, 1, 0), "max")


def test_a_map_survives_json() -> None:
    for class_map in (ClassMap((1, 0, None, 1), "max"), ClassMap((0,))):
        assert parse_class_map(json.loads(json.dumps(class_map.to_json()))) == class_map


BAD: dict[str, tuple[Any, str]] = {
    "list": ([0, 1], "list"),
    "number": (3, "int"),
    "null": (None, "NoneType"),
    "empty": ({}, "{}"),
    "map is a list": ({"map": [0, 1]}, "[0, 1]"),
    "map is empty": ({"map": {}}, "{}"),
    "unknown option": ({"map": {"0": 0}, "reduction": "max"}, "reduction"),
    "unknown reduce": ({"map": {"0": 0}, "reduce": "mean"}, "'mean'"),
    "reduce is a list": ({"map": {"0": 0}, "reduce": ["sum"]}, "['sum']"),
    "unknown model class": ({"map": {"car": 0}}, "'car'"),
    "unknown class": ({"map": {"0": "car"}}, "'car'"),
    "negative model class": ({"-1": 0, "0": 0}, "'-1'"),
    "negative class": ({"0": -1}, "-1"),
    "fraction": ({"0": 0.5}, "0.5"),
    "truth value": ({"0": True}, "True"),
    "list as class": ({"0": [0]}, "[0]"),
    "model class left out": ({"0": 0, "2": 1}, "none for 1"),
    "last model class left out": ({"map": {"a": 0}, "model_classes": ["a", "b"]}, "none for 1"),
    "class without model class": ({"0": 0, "1": 2}, "none for 1"),
    "last class without": ({"map": {"0": "a"}, "classes": ["a", "b"]}, "none for 1"),
    "nothing kept": ({"0": None}, "none for 0"),
    "beyond the model classes": ({"map": {"1": 0, "a": 0}, "model_classes": ["a"]}, "'1'"),
    "beyond the classes": ({"map": {"0": 1}, "classes": ["a"]}, "1"),
    "the same twice": ({"map": {"a": 0, "0": 0}, "model_classes": ["a"]}, "again"),
    "names as text": ({"map": {"0": 0}, "classes": "a"}, "'a'"),
    "names as null": ({"map": {"0": 0}, "classes": None}, "None"),
    "names as lists": ({"map": {"0": 0}, "model_classes": [["a"]]}, "['a']"),
    "a name twice": ({"map": {"a": 0, "0": 0}, "model_classes": ["a", "a"]}, "a"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_class_map_is_refused(case: str) -> None:
    content, part = BAD[case]
    with pytest.raises(ValueError, match="expected") as caught:
        parse_class_map(content, where="maps/voc.json")
    complains(caught.value, "maps/voc.json", part)


def test_a_class_map_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"map": {"ü": 0}, "model_classes": ["ü"]}', "utf-8")
    assert read_class_map(tmp_path / "map.json") == ClassMap((0,))


@pytest.mark.parametrize("content", [b"", b"{", b"{'0': 0}", b"\xff\xfe", b'{"0":\n0,\n}'])
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "map.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="in JSON") as caught:
        read_class_map(path)
    complains(caught.value, path)


def test_a_bad_map_in_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text("[]")
    with pytest.raises(ValueError, match="expected") as caught:
        read_class_map(tmp_path / "map.json")
    complains(caught.value, tmp_path / "map.json")


def test_a_missing_map_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"map\.json"):
        read_class_map(tmp_path / "map.json")
