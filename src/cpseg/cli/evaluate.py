"""``cpseg evaluate``: rules compared on held-out images."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpseg.cli import options
from cpseg.cli.options import Commands, share
from cpseg.cli.progress import Progress
from cpseg.cli.shared import say, say_table, source_of, tell, warn

if TYPE_CHECKING:
    from cpseg.jobs.tally import Row


def add(commands: Commands) -> None:
    """The subcommand's options."""
    command = commands.add_parser(
        "evaluate",
        parents=[options.data(), options.masks(), options.class_map(), options.calibration()],
        help="rules compared on held-out labelled images",
    )
    add = command.add_argument
    add("--constant", type=share, help="compare a constant threshold such as 0.3 too")
    add("--per-class", action="store_true", help="print the IoU of every class too")
    add("-o", "--output", type=Path, help="also write the figures to this JSON file")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from cpseg._internal.distributed import rank
    from cpseg.calibration.calibration import Calibration
    from cpseg.jobs.certify import overlap
    from cpseg.jobs.evaluate import evaluate
    from cpseg.jobs.shift import Notice
    from cpseg.jobs.tally import class_table, table

    source = source_of(arguments)
    calibration, notices = Calibration.load(arguments.calibration), list[Notice]()
    with Progress() as progress:
        rows = evaluate(
            source,
            arguments.ids,
            calibration,
            constant=arguments.constant,
            progress=progress,
            tell=notices.append,
        )
    say(
        f"alpha {calibration.alpha:g}, calibrated on {calibration.num_images} images; "
        f"promised: {calibration.guarantee()}\n"
    )
    say_table(table(rows))
    if arguments.per_class:
        say("\nIoU over all pixels\n")
        say_table(class_table(rows))
    if arguments.output is not None and rank() == 0:
        _write(arguments.output, rows)
    for notice in notices:
        tell(notice)
    seen = overlap(calibration, arguments.ids, source)
    if seen:
        warn(
            f"{len(seen)} of these images were used for the calibration, for example {seen[0]}: "
            "figures on them are too good; evaluate on other labelled images"
        )


def _write(path: Path, rows: Sequence[Row]) -> None:
    """Figures as JSON, with null where there is no figure."""
    from cpseg._internal.safe_files import write_text

    content = [_without_nan(asdict(row)) for row in rows]
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
