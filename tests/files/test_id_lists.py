"""Id lists as UniMatch and AllSpark read them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from tests.support.folders import command, complains, done, make

from cpseg.files.dataset import Source
from cpseg.files.id_lists import (
    Pair,
    check_ids,
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


@pytest.mark.parametrize("name", ["a\tb.png", "a\n", " a", "a ", "", "a\u2028b", "a \n b"])
@pytest.mark.parametrize("column", [0, 1])
def test_a_path_that_no_list_holds_is_not_written(tmp_path: Path, name: str, column: int) -> None:
    pair = ("image.png", name) if column else (name, "mask.png")
    with pytest.raises(ValueError, match="white space") as caught:
        write_ids(tmp_path / "ids.txt", [("x", "y"), pair])
    complains(caught.value, tmp_path / "ids.txt", repr(name))
    assert list(tmp_path.iterdir()) == []


# Tables, with spaces in paths

SPACED = [("my photos/a.jpg", "my masks/a.png"), ("b, 2.jpg", 'say "b".png'), ("c.jpg", "c.png")]


def test_where_a_path_has_spaces_tabs_separate_and_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    write_ids(path, SPACED)
    assert path.read_text().splitlines()[0] == "my photos/a.jpg\tmy masks/a.png"
    assert read_ids(path) == SPACED
    assert check_ids(path, SPACED)
    assert not check_ids(path, SPACED[2:])


@pytest.mark.parametrize("header", [["image", "mask"], ["Image", "Mask"], None])
@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_with_and_without_a_header(
    tmp_path: Path, header: list[str] | None, delimiter: str, end: str
) -> None:
    path = tmp_path / "ids.of.any.suffix"
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets save it
        rows = csv.writer(file, delimiter=delimiter, lineterminator=end)
        rows.writerows([*([] if header is None else [header]), *SPACED])
    assert read_ids(path) == SPACED
    assert read_ids(path, columns=1) == SPACED


def test_a_header_may_name_other_columns_and_another_order(tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("fold,mask,image\n1,a.png,./x/a.jpg\n2,b.png,b.jpg\n")
    assert read_ids(tmp_path / "ids.csv") == [("x/a.jpg", "a.png"), ("b.jpg", "b.png")]
    (tmp_path / "one.txt").write_text("image\nmy a.jpg\nb.jpg\n")
    assert read_ids(tmp_path / "one.txt", columns=1) == [("my a.jpg", None), ("b.jpg", None)]


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("a,1.jpg m,1.png\n", ("a,1.jpg", "m,1.png")),
        ("a,1.jpg m1.png\n", ("a,1.jpg", "m1.png")),
        ("a,b m\n", ("a,b", "m")),
        ("a b.jpg,m.png\n", ("a b.jpg", "m.png")),
        ("2007_01,m/2007_01.png\n", ("2007_01", "m/2007_01.png")),
        ("a.jpg, m.png\n", ("a.jpg", "m.png")),
        ('"a, b.jpg",m.png\n', ("a, b.jpg", "m.png")),
    ],
)
def test_a_comma_in_a_name_is_no_table(tmp_path: Path, text: str, pair: tuple[str, str]) -> None:
    """Lists that were read by spaces before are read so still."""
    (tmp_path / "ids.txt").write_text(text)
    assert read_ids(tmp_path / "ids.txt") == [pair]


def test_a_name_with_a_comma_alone_is_one_column(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("a,1.jpg\nb,2.jpg\n")
    assert read_ids(tmp_path / "ids.txt", columns=1) == [("a,1.jpg", None), ("b,2.jpg", None)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a.jpg\tm\n\nb.jpg\tm\n", 2),
        ("a.jpg\tm\nb.jpg m\n", 2),
        ("a.jpg,m\nb.jpg,m,x\n", 2),
        ("a.jpg,m\n,m\n", 2),
        ("image,mask\na.jpg,m\nb.jpg,\n", 3),
        ("image,mask,fold\na.jpg,m\n", 2),
        ("image,label\na.jpg,m\n", 1),
        ("a.jpg\tm\n./a.jpg\tn\n", 2),
    ],
)
def test_a_bad_row_of_a_table_is_named(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "ids.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"line {line}: expected") as caught:
        read_ids(path)
    complains(caught.value, f"{path}, line {line}")


def test_quotes_that_do_not_close_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text('image,mask\n"a.jpg,m.png\n')
    with pytest.raises(ValueError, match="separated by a comma") as caught:
        read_ids(tmp_path / "ids.csv")
    complains(caught.value, tmp_path / "ids.csv")


def test_an_ambiguous_line_says_what_to_separate_by(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("my a.jpg my a.png\n")
    with pytest.raises(ValueError, match="where paths have spaces separate by a tab"):
        read_ids(path)
    path.write_text("my a.jpg\n")
    (tmp_path / "my a.jpg").touch()
    with pytest.raises(ValueError, match="a space in its path; separate by a tab") as caught:
        read_ids(path, columns=1, root=tmp_path)
    complains(caught.value, f"{path}, line 1")


# From the root, and folders


def lay(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_a_list_is_looked_up_from_the_root_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, here = tmp_path / "data", tmp_path / "here"
    root.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (root / "ids.txt").write_text("a m\n")
    assert read_ids("ids.txt", root=root) == [("a", "m")]
    (here / "ids.txt").write_text("b m\n")
    assert read_ids("ids.txt", root=root) == [("b", "m")], "the working folder comes first"
    with pytest.raises(FileNotFoundError, match="no such file, nor") as caught:
        read_ids("other.txt", root=root)
    complains(caught.value, "other.txt", f"nor {root / 'other.txt'}")
    assert Source(root, root).read_ids("ids.txt") == [("b", "m")]


def test_a_folder_is_all_its_images_in_the_order_of_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path, "i/b/2.JPG", "i/a 1.png", "i/.hidden.png", "i/.git/x.png", "i/note.txt", "o.png")
    expected = [("i/a 1.png", None), ("i/b/2.JPG", None)]
    assert read_ids(tmp_path / "i", columns=1, root=tmp_path) == expected
    assert read_ids("i", columns=1, root=tmp_path) == expected
    monkeypatch.chdir(tmp_path)
    assert read_ids(Path("i"), columns=1, root=tmp_path) == expected
    assert read_ids("i", columns=1) == expected
    with pytest.raises(ValueError, match="pass --masks FOLDER") as caught:
        read_ids("i")
    complains(caught.value, "i", "images alone")
    lay(tmp_path, "e/x.txt")
    with pytest.raises(ValueError, match="got none") as caught:
        read_ids("e", columns=1)
    complains(caught.value, "e")
    with pytest.raises(ValueError, match="below --root") as caught:
        read_ids(tmp_path / "e", columns=1, root=tmp_path / "i")
    complains(caught.value, tmp_path / "e")


@pytest.mark.parametrize("place", ["data/masks", "data/images/masks", "elsewhere"])
def test_masks_come_from_their_folder_by_path_and_name(tmp_path: Path, place: str) -> None:
    root, masks = tmp_path / "data", tmp_path / place
    lay(root, "images/a/x.jpg", "images/y.jpg", "images/a/z.v1.jpg")
    lay(masks, "a/x.png", "y.gif", "z.v1.png", "z.png")
    shown = Path("masks") if place == "data/masks" else masks
    shown = Path("images/masks") if "images" in place else shown
    listed = ["images/a/x.jpg", "images/a/z.v1.jpg", "images/y.jpg"]
    found = read_ids("images", root=root, masks=masks)
    assert found == list(
        zip(listed, [f"{shown}/a/x.png", f"{shown}/z.v1.png", f"{shown}/y.gif"], strict=True)
    )
    (root / "ids.txt").write_text("images/y.jpg\nimages/a/x.jpg own.png\n")
    mixed = [("images/y.jpg", f"{shown}/y.gif"), ("images/a/x.jpg", "own.png")]
    assert read_ids("ids.txt", root=root, masks=masks) == mixed
    assert read_ids("images", columns=1, root=root, masks=masks) == [(n, None) for n in listed]


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        (("x.png", "x.gif", "y.png"), "one mask of i/a/x.jpg, got x.gif and x.png"),
        (("a/x.png", "i/a/x.tif", "y.png", "x.png"), ""),
        (("a/x.png", "x.png", "y.png"), "one mask of i/a/x.jpg, got a/x.png and x.png"),
        (("y.png",), "a mask of i/a/x.jpg: i/a/x.png or a/x.png or x.png, got no such file"),
    ],
)
def test_two_masks_or_none_are_refused_by_name(
    tmp_path: Path, masks: tuple[str, ...], said: str
) -> None:
    lay(tmp_path, "i/a/x.jpg", "i/y.jpg")
    lay(tmp_path / "m", *masks)
    if not said:  # the whole path is the best match
        found = read_ids("i", root=tmp_path, masks=tmp_path / "m")
        assert found == [("i/a/x.jpg", "m/i/a/x.tif"), ("i/y.jpg", "m/y.png")]
        return
    with pytest.raises((ValueError, FileNotFoundError), match="mask") as caught:
        read_ids("i", root=tmp_path, masks=tmp_path / "m")
    complains(caught.value, tmp_path / "m", said)


def test_a_mask_of_two_images_and_a_folder_that_is_none_are_refused(tmp_path: Path) -> None:
    lay(tmp_path, "i/a/x.jpg", "i/b/x.jpg", "m/x.png")
    with pytest.raises(ValueError, match="mask of one image") as caught:
        read_ids("i", root=tmp_path, masks=tmp_path / "m")
    complains(caught.value, "m/x.png", "i/a/x.jpg and i/b/x.jpg")
    with pytest.raises(ValueError, match="--masks: expected a folder"):
        read_ids("i", root=tmp_path, masks=tmp_path / "nowhere")


def test_the_command_takes_folders_and_paths_with_spaces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make(tmp_path / "data")
    for name in ("images", "masks"):
        (data.root / name).rename(data.root / f"my {name}")
    words = ("--root", data.root, "--probs", data.probs / "images")
    masks = ("--masks", data.root / "my masks")
    made = tmp_path / "c.safetensors"
    run = ("calibrate", *words, *masks, "--ids", "my images", "--background", "none")
    done(command(capsys, *run, "--variant", "image", "-o", made))
    done(command(capsys, "evaluate", *words, *masks, "--ids", "my images", "--calibration", made))
    out = data.root / "labels"
    run = ("label", *words, *masks, "--ids", "my images", "--labelled", "my images")
    said = command(capsys, *run, "--calibration", made, "-o", out)
    assert (said.code, len(said.err.splitlines())) == (0, 1)
    assert "separated by tabs" in said.err
    assert (out / "stage1.txt").read_text().splitlines()[0] == "my images/00.png\tmy masks/00.png"
    assert read_ids(out / "ids.txt")[0] == ("my images/00.png", "labels/masks/my images/00.png")
