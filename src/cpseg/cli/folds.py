"""``cpseg folds``: labelled images dealt into folds, and the scores of the folds put together."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from cpseg.cli.options import Commands, whole
from cpseg.cli.progress import Progress
from cpseg.cli.shared import say

_DEALING, _JOINING = ("folds", "seed"), ("scores", "whole", "others")


def add(commands: Commands) -> None:
    """The subcommand's options."""
    command = commands.add_parser(
        "folds",
        help="labelled images dealt into folds, and the scores of the folds put together",
        description="Without --join: writes for every fold the list to train on and the list to "
        "score. With --join: puts the scores of the folds together, every labelled image from "
        "the model that did not see it, all others from the model of all labelled images.",
    )
    absent = argparse.SUPPRESS  # an option that was not given is not there
    command.add_argument(
        "--ids", type=Path, help="id list of the labelled images: one line 'image mask' per image"
    )
    add = command.add_argument_group("to deal").add_argument
    add("--folds", type=whole(2), default=absent, help="number of folds (default 4)")
    add("--seed", type=whole(0), default=absent, help="seed of the deal (default 0)")
    add = command.add_argument_group("to put together").add_argument
    add("--join", type=Path, metavar="FOLDS", help="folder that cpseg folds wrote")
    add(
        "--scores",
        type=Path,
        nargs="+",
        default=absent,
        metavar="S",
        help="folders of scores, one per fold in their order",
    )
    add(
        "--whole",
        type=Path,
        default=absent,
        metavar="S",
        help="folder of scores by the model trained on all labelled images",
    )
    add(
        "--others",
        type=Path,
        default=absent,
        help="id list of the other images (default: all score files in --whole)",
    )
    command.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    command.set_defaults(run=_run, resumes=lambda arguments: arguments.join is not None)


def _run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    _deal(arguments) if arguments.join is None else _join(arguments)


def _check(arguments: argparse.Namespace) -> None:
    """The options of one of the two ways, and all that it needs."""
    from cpseg._internal.checks import message

    joins = arguments.join is not None
    for name in _DEALING if joins else _JOINING:
        if hasattr(arguments, name):
            expected, got = ("no --join", "--join") if joins else ("--join FOLDS", "none")
            raise ValueError(message(f"--{name}", expected, got, "leave one of the two out"))
    needed = ("scores", "whole") if joins else ("ids",)
    for name in needed:
        if getattr(arguments, name, None) is None:
            expected = "--join with --scores and --whole" if joins else "--ids, or --join"
            raise ValueError(message("folds", expected, f"no --{name}", "pass it"))


def _deal(arguments: argparse.Namespace) -> None:
    from cpseg.jobs.folds import deal_folds

    given = {name: getattr(arguments, name) for name in _DEALING if hasattr(arguments, name)}
    folds = deal_folds(arguments.ids, arguments.output, **given)
    sizes = sorted({len(folds.held(k)) for k in range(folds.count)})
    say(
        f"{arguments.output}: {len(folds.images)} images in {folds.count} folds of "
        f"{' or '.join(map(str, sizes))}"
    )
    students = " ".join(f"S{k}" for k in range(folds.count))
    out = shlex.quote(str(arguments.output))
    say(
        f"next: for every fold train a student on {arguments.output}/fold_*/train.txt and write "
        "its scores of score.txt beside it;\n"
        f"train one on all of {arguments.ids} and write its scores of all other images; then\n"
        f"cpseg folds --join {out} --scores {students} --whole SALL -o SCORES"
    )


def _join(arguments: argparse.Namespace) -> None:
    from cpseg.jobs.folds import join_folds

    with Progress() as progress:
        joined = join_folds(
            arguments.join,
            arguments.scores,
            arguments.whole,
            arguments.output,
            ids=arguments.ids,
            others=getattr(arguments, "others", None),
            progress=progress,
        )
    say(
        f"{arguments.output}: {joined.labelled} labelled images scored out of fold, "
        f"{joined.others} others by the model of all; {joined.written} files written by this rank"
    )
