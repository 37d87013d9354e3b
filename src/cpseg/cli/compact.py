"""``cpseg compact``: score files to small evidence files."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpseg.cli import options
from cpseg.cli.options import Commands, background
from cpseg.cli.progress import Progress
from cpseg.cli.shared import say, source_of


def add(commands: Commands) -> None:
    """The subcommand's options."""
    command = commands.add_parser(
        "compact",
        parents=[options.data(), options.class_map()],
        help="score files to small evidence files",
    )
    choice = command.add_mutually_exclusive_group(required=True)
    choice.add_argument(
        "--background",
        type=background,
        default=argparse.SUPPRESS,
        help="index of a dominant class to suppress, or 'none' if every class counts",
    )
    choice.add_argument(
        "--calibration", type=Path, help="take background, class map and recalibration from it"
    )
    command.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    command.set_defaults(run=_run, resumes=lambda arguments: True)


def _run(arguments: argparse.Namespace) -> None:
    from cpseg.calibration.calibration import Calibration
    from cpseg.jobs.compact import compact

    calibration = arguments.calibration and Calibration.load(arguments.calibration)
    with Progress() as progress:
        written = compact(
            source_of(arguments),
            arguments.ids,
            arguments.output,
            background=calibration.background if calibration else arguments.background,
            calibration=calibration,
            progress=progress,
        )
    say(f"{arguments.output}: {written} evidence files written by this rank")
