"""Id lists: an image and its mask per line, separated by a space, a tab or a comma; or a folder."""

from __future__ import annotations

import csv
import io
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cpseg._internal.checks import message
from cpseg._internal.safe_files import damaged, write_text
from cpseg.files.image_folders import images_in, is_image_name, masks_in


class Pair(NamedTuple):
    """One line of an id list, both relative to the data root; ``mask`` is None for one column."""

    image: str
    mask: str | None


def read_ids(
    path: str | Path,
    *,
    columns: int = 2,
    root: str | Path | None = None,
    masks: str | Path | None = None,
) -> list[Pair]:
    """Images and their masks, relative to the data root, from an id list or a folder.

    The first line says how a list is written. With a tab in it the columns are separated by tabs.
    With a comma they are separated by commas, unless the line reads as one with a space in which a
    file's name has a comma. Otherwise one space separates ``image mask``, as UniMatch and AllSpark
    write it, and paths have none. Tables with tabs or commas follow RFC 4180 for quotes and may
    start with a header that names the column ``image`` and, where there is one, ``mask``; other
    columns are then not read.

    Args:
        path: the list, or a folder of which all images are taken, in the order of their paths. What
            does not exist from the working folder is looked up from the root.
        columns: 2 where masks are needed; 1 takes lines with and without a mask.
        root: the data root.
        masks: a folder with the mask of every image, for a folder of images and for lines without
            a mask; see :func:`cpseg.files.image_folders.masks_in`. Not read for one column.

    Raises:
        ValueError: an empty list, a blank line, a space in a path where spaces separate the
            columns, a missing mask, an image twice.
        FileNotFoundError: there is no such file, or an image has no mask in the folder.
    """
    path = _found(Path(path), root)
    base = Path() if root is None else Path(root)
    folder = None if masks is None else Path(masks)
    if path.is_dir():
        pairs = [Pair(image, None) for image in images_in(path, base, without=folder)]
        if columns == 2 and folder is None:
            expected, fix = "images and their masks", "pass --masks FOLDER, or a list with both"
            raise ValueError(message(str(path), expected, "a folder of images alone", fix))
    else:
        pairs = _read_list(path, 1 if folder is not None else columns, root)
    if columns == 1 or folder is None:
        return pairs
    without = [pair.image for pair in pairs if pair.mask is None]
    found = dict(zip(without, masks_in(folder, base, without), strict=True)) if without else {}
    return [
        pair if pair.mask is not None else Pair(pair.image, found[pair.image]) for pair in pairs
    ]


def resolved(path: str | Path, root: str | Path | None) -> Path:
    """A path as it is, or from the root where it does not exist from the working folder."""
    path = Path(path)
    if root is None or path.exists() or not (Path(root) / path).exists():
        return path
    return Path(root) / path


def _found(path: Path, root: str | Path | None) -> Path:
    found = resolved(path, root)
    if root is not None and not found.exists() and not path.is_absolute():
        other = Path(root) / path
        got = "no such file" if other == path else f"no such file, nor {other}"
        expected = "an id list or a folder"
        raise FileNotFoundError(message(str(path), expected, got, "check the path"))
    return found


def _read_list(path: Path, columns: int, root: str | Path | None) -> list[Pair]:
    """The lines of a list; with one column, lines with and without a mask."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise damaged(path, "an id list in UTF-8", error) from error
    first = next(iter(text.splitlines()), "")
    rows: Iterator[tuple[int, Sequence[str]]]
    if "\t" in first:
        rows, kind = _rows_of_table(path, text, "\t", columns), "separated by a tab"
    elif _is_csv(first, columns):
        rows, kind = _rows_of_table(path, text, ",", columns), "separated by a comma"
    else:
        rows, kind = _rows_of_lines(path, text, columns), ""
        _refuse_spaces(path, first, root)
    pairs: list[Pair] = []
    seen: dict[str, int] = {}
    for number, (image, *mask) in rows:
        image = posixpath.normpath(image)  # ./a.png is a.png
        if image in seen:
            got, fix = f"{image} as on line {seen[image]}", "remove one of them"
            raise ValueError(message(f"{path}, line {number}", "every image once", got, fix))
        seen[image] = number
        pairs.append(Pair(image, mask[0] if mask else None))
    if not pairs:
        expected = " ".join(filter(None, (f"lines {_expected(columns)}", kind)))
        raise ValueError(message(str(path), expected, "an empty list", "list images"))
    return pairs


def _expected(columns: int) -> str:
    return "'image mask'" if columns == 2 else "'image' or 'image mask'"


def _rows_of_lines(path: Path, text: str, columns: int) -> Iterator[tuple[int, Sequence[str]]]:
    """Lines with one space between image and mask."""
    for number, line in enumerate(text.splitlines(), start=1):
        parts = line.split(" ")
        if not columns <= len(parts) <= 2 or "" in parts:
            fix = "one pair a line, no blank line, one space between"
            if len(line.split()) > 2:
                fix += "; where paths have spaces separate by a tab"
            elif len(line.split()) == 1 and columns == 2:
                fix += "; or pass --masks FOLDER"
            raise ValueError(message(f"{path}, line {number}", _expected(columns), repr(line), fix))
        yield number, parts


def _refuse_spaces(path: Path, line: str, root: str | Path | None) -> None:
    """A first line that is the path of an image with a space in it, not an image and a mask."""
    image, space, _ = line.partition(" ")
    if root is None or not space or (Path(root) / image).exists():
        return
    if (Path(root) / line).exists():
        fix = "separate by a tab, or write 'image' as the first line of a list of images alone"
        got = f"{line!r}, an image with a space in its path"
        raise ValueError(message(f"{path}, line 1", "'image mask'", got, fix))


def _is_csv(line: str, columns: int) -> bool:
    """Whether the first line of a list without tabs is one of a table with commas."""
    cells = _cells(line, ",")
    names = [cell.strip().lower() for cell in cells]
    if "image" in names:
        return True
    if line.startswith('"'):
        return len(cells) <= 2
    if len(cells) != 2:
        return False
    parts = line.split(" ")
    as_spaces = columns <= len(parts) <= 2 and "" not in parts
    return not as_spaces or is_image_name(cells[0])


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:
        return []


def _rows_of_table(
    path: Path, text: str, delimiter: str, columns: int
) -> Iterator[tuple[int, Sequence[str]]]:
    """Rows of a table, of RFC 4180 or with tabs."""
    lines = io.StringIO(text, newline="")
    table = csv.reader(lines, delimiter=delimiter, skipinitialspace=delimiter == ",", strict=True)
    by = "a tab" if delimiter == "\t" else "a comma"
    expected = f"image and mask, separated by {by}"
    if columns == 1:
        expected = f"an image, or {expected}"
    order: list[int] | None = None
    width = 2
    try:
        for row in table:
            where = f"{path}, line {table.line_num}"
            names = [cell.strip().lower() for cell in row]
            if table.line_num == 1 and "image" in names:
                order = [names.index(name) for name in ("image", "mask") if name in names]
                width = len(row)
                if len(order) < columns:
                    fix = "name it, or pass --masks FOLDER"
                    got = f"a header without it: {', '.join(row)}"
                    raise ValueError(message(where, "a column mask", got, fix))
                continue
            cells = [row[place] for place in order] if order and len(row) == width else row
            if len(cells) == 2 and not cells[1] and columns == 1:
                cells = cells[:1]
            wrong = order is not None and len(row) != width
            if wrong or not columns <= len(cells) <= 2 or "" in cells:
                got = repr(delimiter.join(row)) if row else "a blank line"
                fix = 'quote a path with "" where it has that character, and leave no line blank'
                raise ValueError(message(where, expected, got, fix))
            yield table.line_num, cells
    except csv.Error as error:
        raise damaged(path, f"an id list separated by {by}", error) from error


def write_ids(path: str | Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Write an id list as UniMatch and AllSpark read it, atomically.

    Where a path has a space the columns are separated by tabs: :func:`read_ids` reads that, and
    training code that splits lines on spaces does not.

    Raises:
        ValueError: an empty path, or one with white space other than spaces between words.
    """
    pairs = list(pairs)
    if not check_ids(path, pairs):
        write_text(path, "".join(f"{image} {mask}\n" for image, mask in pairs))
        return
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(pairs)
    write_text(path, text.getvalue())


def path_in_list(mask: Path, root: Path, *, relative: bool = False) -> str:
    """A mask's path as training code joins it to the root.

    Where it lies outside of the root it is absolute, or relative to the root with ``..``.

    Raises:
        ValueError: it is to be relative, and lies on another drive.
    """
    mask, base = mask.resolve(), root.resolve()
    if mask.is_relative_to(base):
        return str(mask.relative_to(base))
    return from_root(str(mask), root) if relative else str(mask)


def from_root(path: str, root: Path) -> str:
    """An absolute path relative to the root; others are relative to it already.

    Raises:
        ValueError: they lie on different drives.
    """
    if not os.path.isabs(path):
        return path
    try:
        return os.path.relpath(path, root.resolve())
    except ValueError as error:
        expected, got = f"masks on the drive of --root {root}", path
        fix = "choose -o there, or leave --relative out"
        raise ValueError(message("--relative", expected, got, fix)) from error


def check_ids(path: str | Path, pairs: Iterable[tuple[str, str]]) -> bool:
    """Whether a path has a space, so that tabs must separate the columns.

    Raises:
        ValueError: a path with white space that no list holds.
    """
    spaces = False
    for name in (name for pair in pairs for name in pair):
        if name.split() == [name]:
            continue
        words = name.replace(" ", "_")
        if name != name.strip() or words.split() != [words]:
            expected = "paths without white space but spaces between words"
            fix = "a list cannot hold it: rename the file or its folder"
            raise ValueError(message(str(path), expected, repr(name), fix))
        spaces = True
    return spaces
