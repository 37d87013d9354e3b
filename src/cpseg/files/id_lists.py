"""Id lists: an image and its mask per line, as UniMatch and AllSpark read them."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cpseg._internal.checks import (
    message,
)
from cpseg._internal.safe_files import damaged, write_text


class Pair(NamedTuple):
    """One line of an id list, both relative to the data root; ``mask`` is None for one column."""

    image: str
    mask: str | None


def read_ids(path: str | Path, *, columns: int = 2) -> list[Pair]:
    """The lines of an id list: ``image mask``, split on one space, relative to the data root.

    Args:
        path: the list.
        columns: 2 where masks are needed; 1 takes lines with and without a mask.

    Raises:
        ValueError: an empty list, a blank line, spaces in a path, a missing mask, an image twice.
        FileNotFoundError: there is no such file.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise damaged(path, "an id list in UTF-8", error) from error
    pairs: list[Pair] = []
    seen: dict[str, int] = {}
    expected = "'image mask'" if columns == 2 else "'image' or 'image mask'"
    for number, line in enumerate(lines, start=1):
        parts = line.split(" ")
        if not columns <= len(parts) <= 2 or "" in parts:
            fix = "one pair a line, one space between, none in a path, no blank line"
            raise ValueError(message(f"{path}, line {number}", expected, repr(line), fix))
        parts[0] = posixpath.normpath(parts[0])  # ./a.png is a.png
        if parts[0] in seen:
            got, fix = f"{parts[0]} as on line {seen[parts[0]]}", "remove one of them"
            raise ValueError(message(f"{path}, line {number}", "every image once", got, fix))
        seen[parts[0]] = number
        pairs.append(Pair(parts[0], parts[1] if len(parts) == 2 else None))
    if not pairs:
        raise ValueError(message(str(path), f"lines {expected}", "an empty list", "list images"))
    return pairs


def write_ids(path: str | Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Write an id list as UniMatch and AllSpark read it, atomically.

    Raises:
        ValueError: a path with white space, which those codebases would split.
    """
    pairs = list(pairs)
    check_ids(path, pairs)
    write_text(path, "".join(f"{image} {mask}\n" for image, mask in pairs))


def check_ids(path: str | Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Raise where a path has white space: training code would split the line there."""
    for name in (name for pair in pairs for name in pair):
        if name.split() != [name]:
            fix = "training code splits lines there: rename the folder"
            raise ValueError(message(str(path), "paths without spaces", repr(name), fix))
