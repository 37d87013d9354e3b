"""Id lists as UniMatch and AllSpark read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.folders import complains

from cpseg.files.id_lists import (
    Pair,
    read_ids,
    write_ids,
)

# Id lists


def test_ids_are_pairs(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("a/b.jpg m/b.png\nü.jpg /abs/ü.png\n", encoding="utf-8")
    assert read_ids(tmp_path / "ids.txt") == [("a/b.jpg", "m/b.png"), ("ü.jpg", "/abs/ü.png")]


@pytest.mark.parametrize("text", ["a m\nb m2", "a m\r\nb m2\r\n"])
def test_a_missing_last_line_end_and_windows_line_ends_do_no_harm(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "ids.txt").write_bytes(text.encode())
    assert read_ids(tmp_path / "ids.txt") == [Pair("a", "m"), Pair("b", "m2")]


def test_one_column_is_enough_where_no_mask_is_needed(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("a\nb m\n")
    assert read_ids(tmp_path / "ids.txt", columns=1) == [Pair("a", None), Pair("b", "m")]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a m\n\nb m\n", 2),
        ("a m\nb m\n\n", 3),
        ("\na m\n", 1),
        ("a m\nb  m\n", 2),
        ("a m\nb m \n", 2),
        (" a m\n", 1),
        ("a m\nb\n", 2),
        ("a b m\n", 1),
        ("a m\nb\tm\n", 2),
    ],
    ids=[
        "blank line",
        "blank last line",
        "blank first line",
        "two spaces",
        "space at the end",
        "space at the start",
        "no mask",
        "space in a path",
        "tab",
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "ids.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"line {line}") as caught:
        read_ids(path)
    shown = repr(text.splitlines()[line - 1])
    complains(caught.value, f"{path}, line {line}", "'image mask'", shown)


@pytest.mark.parametrize("text", ["a\n\n", "a b c\n", "a  \n"])
def test_a_bad_line_is_named_where_one_column_is_enough(tmp_path: Path, text: str) -> None:
    (tmp_path / "ids.txt").write_text(text)
    with pytest.raises(ValueError, match="'image' or 'image mask'"):
        read_ids(tmp_path / "ids.txt", columns=1)


def test_an_image_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("a m\nb m\na n\n")
    with pytest.raises(ValueError, match="line 1") as caught:
        read_ids(path)
    complains(caught.value, f"{path}, line 3", "every image once")


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("")
    with pytest.raises(ValueError, match="empty") as caught:
        read_ids(path)
    complains(caught.value, path)


def test_a_list_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_bytes("ü.jpg m.png\n".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8") as caught:
        read_ids(path)
    complains(caught.value, path)


def test_a_missing_list_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ids\.txt"):
        read_ids(tmp_path / "ids.txt")


def test_written_ids_are_what_training_code_splits(tmp_path: Path) -> None:
    pairs = [("a/b.jpg", "m/b.png"), ("ü.jpg", "/abs/ü.png")]
    write_ids(tmp_path / "ids.txt", pairs)
    assert (tmp_path / "ids.txt").read_bytes() == "a/b.jpg m/b.png\nü.jpg /abs/ü.png\n".encode()
    assert [tuple(pair) for pair in read_ids(tmp_path / "ids.txt")] == pairs


@pytest.mark.parametrize("name", ["a b.png", "a\tb.png", "a\n", " a", "", "a\u2028b"])
@pytest.mark.parametrize("column", [0, 1])
def test_a_path_with_white_space_is_not_written(tmp_path: Path, name: str, column: int) -> None:
    pair = ("image.png", name) if column else (name, "mask.png")
    with pytest.raises(ValueError, match="without spaces") as caught:
        write_ids(tmp_path / "ids.txt", [("x", "y"), pair])
    complains(caught.value, tmp_path / "ids.txt", repr(name))
    assert list(tmp_path.iterdir()) == []
