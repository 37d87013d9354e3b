"""``cpseg check``: is this what you think it is?"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cpseg.cli import options
from cpseg.cli.options import Commands
from cpseg.cli.progress import Progress
from cpseg.cli.shared import say, source_of
from cpseg.cli.terminal import coloured, is_coloured

if TYPE_CHECKING:
    from cpseg.jobs.check_findings import Check, ClassShare

_WIDEST = 100  # columns
_MOST_CLASSES = 25  # in the table


def add(commands: Commands) -> None:
    """The subcommand's options."""
    command = commands.add_parser(
        "check",
        parents=[options.data(), options.masks(), options.class_map()],
        help="is this what you think it is?",
    )
    add = command.add_argument
    text = "id list of the images to label"
    add("--unlabelled", type=Path, dest="to_label", metavar="UNLABELLED", help=text)
    add(
        "--all",
        action="store_true",
        help="read the scores of all labelled images (default: of 24, spread over the list)",
    )
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("check.png"),
        help="picture to write: photographs, masks and argmax (default check.png)",
    )
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from cpseg._internal.distributed import rank
    from cpseg.jobs.check import check
    from cpseg.jobs.check_findings import counted, error, ok
    from cpseg.jobs.check_picture import draw

    if rank() > 0:
        return 0
    source = source_of(arguments)
    with Progress() as progress:
        found = check(
            source,
            arguments.ids,
            unlabelled=arguments.to_label,
            everything=arguments.all,
            progress=progress,
        )
    try:
        drawn = draw(found, arguments.output)
    except OSError as problem:
        reason = f"{arguments.output}: {problem.strerror or problem}; pass -o PICTURE"
        found = replace(found, findings=(*found.findings, error("picture", reason)))
    else:
        if drawn:
            said = f"{arguments.output}: {counted(drawn, 'image')}, masks and argmax over them"
            found = replace(found, findings=(*found.findings, ok("picture", said)))
    say(text(found, width=_width(), colour=is_coloured(sys.stdout)))
    return 0 if found.can_work else 2


def text(check: Check, *, width: int, colour: bool = False) -> str:
    """A paragraph for each finding, errors last, the table of classes and the verdict."""
    blocks = []
    for level in ("ok", "warning", "error"):
        for finding in check.at(level):
            block = _wrapped(str(finding), width)
            blocks.append(coloured(level, level, wanted=colour) + block[len(level) :])
        if level == "ok" and check.shares:
            blocks.append(_table(check.shares, width))
    return "\n".join([*blocks, _wrapped(check.verdict, width)])


def _table(shares: tuple[ClassShare, ...], width: int) -> str:
    """Shares of the labelled pixels; of many classes those that differ most."""
    shown = shares
    if len(shares) > _MOST_CLASSES:
        differ = sorted(shares, key=lambda each: -abs(each.masks - each.argmax))
        shown = tuple(sorted(differ[:_MOST_CLASSES], key=lambda each: each.index))
    lines = ["  class  masks argmax  found"]
    for each in shown:
        cells = " ".join(_percent(value) for value in (each.masks, each.argmax, each.recall))
        lines.append(f"  {each.index:5d} {cells}")
    notes = "masks, argmax: % of labelled pixels; found: % of the class that argmax gets right"
    if len(shown) < len(shares):
        notes += f"; {len(shares) - len(shown)} classes whose shares differ less are left out"
    return "\n".join([*lines, _wrapped(f"({notes})", width, indent="  ")])


def _percent(share: float) -> str:
    return "     -" if share != share else f"{100 * share:6.1f}"


def _wrapped(line: str, width: int, indent: str = "") -> str:
    filled = textwrap.fill(
        line.replace(" %", "\0%"),  # a number and its per cent stay together
        width,
        initial_indent=indent,
        subsequent_indent=indent or "  ",
        break_on_hyphens=False,
    )
    return filled.replace("\0%", " %")


def _width() -> int:
    return max(20, min(_WIDEST, shutil.get_terminal_size().columns or 80))
