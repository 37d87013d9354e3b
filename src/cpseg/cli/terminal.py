"""What a terminal gets that a pipe does not: colours, and tables no wider than it is."""

from __future__ import annotations

import os
import shutil
import textwrap
from typing import TextIO

_COLOURS = {"ok": "32", "warning": "33", "error": "31"}


def is_coloured(stream: TextIO) -> bool:
    """Whether colours are wanted: a terminal, unless ``NO_COLOR`` is set or it is a plain one."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def coloured(level: str, text: str, *, wanted: bool) -> str:
    """A text in the colour of ``"ok"``, ``"warning"`` or ``"error"``, where that is wanted."""
    return f"\x1b[{_COLOURS[level]}m{text}\x1b[0m" if wanted else text


def width_of(stream: TextIO) -> int | None:
    """Columns of a terminal; None where lines may be as long as they are."""
    return (shutil.get_terminal_size().columns or 80) if stream.isatty() else None


def fitted(table: str, width: int | None) -> str:
    """A Markdown table, or, where that is too wide, a paragraph for each of its rows.

    Example:
        >>> from cpseg.cli.terminal import fitted
        >>> lines = "| rule | mIoU | wrong |", "| --- | ---: | ---: |", "| raw | 0.31 | 35 % |"
        >>> table = chr(10).join(lines)
        >>> print(fitted(table, 20))
        raw
          mIoU 0.31
          wrong 35 %
        >>> fitted(table, None) == fitted(table, 80) == table
        True
    """
    lines = table.splitlines()
    if width is None or max(map(len, lines)) <= width:
        return table
    header, _, *rows = ([cell.strip() for cell in line.strip("| ").split("|")] for line in lines)
    made = []
    for name, *values in rows:
        made += textwrap.wrap(name, width)
        parts = [f"{what}\0{value}" for what, value in zip(header[1:], values, strict=True)]
        text = ", ".join(part.replace(" ", "\0") for part in parts)  # breaks between figures alone
        lines = textwrap.wrap(
            text,
            width,
            initial_indent="  ",
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        made += [line.replace("\0", " ").rstrip(",") for line in lines]
    return "\n".join(made)
