"""Validators of saved metadata: what passes and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from cpseg._internal import fields
from cpseg._internal.fields import Valid

ROW = fields.table_of({"a": fields.whole, "b": fields.or_none(fields.rate)})
CASES: dict[str, tuple[Valid, list[Any], list[Any]]] = {
    "whole": (fields.whole, [1, 7], [0, -1, 1.0, True, "1", None]),
    "rate": (fields.rate, [0.5, 1e-9], [0.0, 1.0, 1, True, "0.5", None, float("nan")]),
    "share": (fields.share, [0.0, 1.0, 0.5], [-0.1, 1.1, 0, 1, True, None, float("nan")]),
    "truth": (fields.truth, [True, False], [0, 1, None, "true"]),
    "text": (fields.text, ["", "a"], [None, 1, ["a"]]),
    "among": (fields.among(("a", "b")), ["a"], ["c", None, ["a"], "ab"]),
    "or_none": (fields.or_none(fields.whole), [None, 1], [0, "None"]),
    "list_of": (fields.list_of(fields.whole), [[], [1, 2], (1,)], [[0], 1, None, "1"]),
    "table_of": (
        ROW,
        [{"a": 1, "b": None}, {"a": 1, "b": 0.5}],
        [{}, {"a": 1}, {"a": 1, "b": None, "c": 1}, {"a": 0, "b": None}, None, [1]],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_valid_and_what_is_not(case: str) -> None:
    valid, right, wrong = CASES[case]
    assert [value for value in right if not valid(value)] == []
    assert [value for value in wrong if valid(value)] == []


def test_fields_are_read_or_named_in_the_error() -> None:
    known: dict[str, Valid] = {"n": fields.whole, "name": fields.text}
    content = {"n": 2, "name": "x", "more": 1}
    assert fields.read_fields("f", content, known, fix="mend it") == {"n": 2, "name": "x"}
    with pytest.raises(ValueError, match=r"^f: expected 'name' in it, got nothing; mend it$"):
        fields.read_fields("f", {"n": 2}, known, fix="mend it")
    with pytest.raises(ValueError, match=r"^f: expected a valid n, got 'a b'; mend it$"):
        fields.read_fields("f", {**content, "n": "a b"}, known, fix="mend it")
