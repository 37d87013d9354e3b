"""``cpseg sweep``: rules cross-validated on labelled images."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpseg._internal.words import ALPHAS, FIXED_VARIANTS, LEARNED_VARIANTS, RECALIBRATIONS
from cpseg.cli import options
from cpseg.cli.options import Commands, backgrounds, share, shares, whole, words
from cpseg.cli.progress import Progress
from cpseg.cli.shared import (
    refuse_unused,
    say,
    say_paragraph,
    say_table,
    settings_from,
    source_of,
    warn,
)


def add(commands: Commands) -> None:
    """The subcommand's options."""
    command = commands.add_parser(
        "sweep",
        parents=[
            options.data(),
            options.unlabelled(),
            options.masks(),
            options.class_map(),
            options.recalibration_input(),
        ],
        help="recalibrations, alphas, variants and background rules cross-validated on labelled "
        "images",
    )
    add = command.add_argument
    add(
        "--backgrounds",
        type=backgrounds,
        required=True,
        help="rules to try: 'none', indices of classes to suppress, or several such as none,0",
    )
    add(
        "--alphas",
        type=words,
        default=list(ALPHAS),
        help=f"miscoverage rates (default {','.join(ALPHAS)})",
    )
    variants = ",".join((*FIXED_VARIANTS, *LEARNED_VARIANTS))
    add(
        "--variants",
        type=words,
        default=list(FIXED_VARIANTS),
        help=f"among {variants} (default {','.join(FIXED_VARIANTS)})",
    )
    options.block(command)
    add("--num-groups", type=whole(1), default=8, help="number of learned groups (default 8)")
    add(
        "--group-share",
        type=share,
        default=0.3,
        help="share of a fold's training images on which groups are learned (default 0.3)",
    )
    add(
        "--recalibrate",
        type=words,
        default=["none", "dirichlet"],
        help=f"methods of recalibration, among {','.join(RECALIBRATIONS)} (default none,dirichlet)",
    )
    add(
        "--prior-powers",
        type=shares,
        default=[0.0],
        help="powers in [0, 1] to which the class prior is divided out (default 0)",
    )
    add(
        "--recalibrate-share",
        type=share,
        default=argparse.SUPPRESS,
        help="share of a fold's training images on which recalibrations are fitted (default 0.3)",
    )
    add("--folds", type=whole(1), default=5, help="number of folds (default 5)")
    add("--seed", type=whole(0), default=0, help="seed of all draws (default 0)")
    options.grid(command)
    add("--all", action="store_true", help="print every row, not the ten best")
    add("-o", "--output", type=Path, help="folder to write; a stopped run goes on there")
    command.set_defaults(run=_run, resumes=lambda arguments: arguments.output is not None)


def _run(arguments: argparse.Namespace) -> None:
    from cpseg.jobs.seen_images import approximate, cross_fitted
    from cpseg.jobs.settings import SweepSettings
    from cpseg.jobs.sweep import sweep
    from cpseg.jobs.sweep_table import (
        best_of_sweep,
        conclusion,
        infinite_threshold_warning,
        table_of_sweep,
    )

    refuse_unused(arguments, arguments.recalibrate != ["none"] or any(arguments.prior_powers))
    source = source_of(arguments)
    with Progress() as progress:
        rows = sweep(
            source,
            arguments.ids,
            settings_from(SweepSettings, arguments),
            out=arguments.output,
            progress=progress,
        )
    shown = rows if arguments.all else best_of_sweep(rows)
    say_table(table_of_sweep(shown))
    if len(shown) < len(rows):
        where = "--all shows them all"
        if arguments.output is not None:
            where = f"all are in {arguments.output / 'sweep.csv'}"
        say(
            f"\nThe raw argmax and the {len(shown) - 1} best of {len(rows) - 1} others by mIoU "
            f"over all pixels; {where}."
        )
    say("")
    say_paragraph(conclusion(rows))
    short = infinite_threshold_warning(rows)
    if short is not None:
        warn(short)
    for text in approximate(cross_fitted(source, source.read_ids(arguments.ids))):
        warn(text)
