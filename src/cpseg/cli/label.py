"""``cpseg label``: masks and an id list for training code."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpseg.cli import options
from cpseg.cli.options import Commands
from cpseg.cli.progress import Progress
from cpseg.cli.shared import say, source_of, tell


def add(commands: Commands) -> None:
    """The subcommand's options."""
    command = commands.add_parser(
        "label",
        parents=[
            options.data(),
            options.mask_folder(),
            options.class_map(),
            options.calibration(),
        ],
        help="masks and an id list for training code",
    )
    command.add_argument("--labelled", type=Path, help="id list of labelled images for stage1.txt")
    command.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    command.set_defaults(run=_run, resumes=lambda arguments: True)


def _run(arguments: argparse.Namespace) -> None:
    from cpseg.calibration.calibration import Calibration
    from cpseg.jobs.estimate import percent
    from cpseg.jobs.label import label
    from cpseg.jobs.shift import Notice

    notices: list[Notice] = []
    with Progress() as progress:
        kept = label(
            source_of(arguments),
            arguments.ids,
            Calibration.load(arguments.calibration),
            arguments.output,
            labelled=arguments.labelled,
            progress=progress,
            tell=notices.append,
        )
    lists = "ids.txt" if arguments.labelled is None else "ids.txt and stage1.txt"
    say(f"{arguments.output}: masks, {lists}, summary.csv; {percent(kept)} of pixels labelled")
    for notice in notices:
        tell(notice)
