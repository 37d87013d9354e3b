"""``cpseg report``: one page, which rule to use and how far to trust it."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from cpseg._internal.words import CERTIFIED_PER, FIXED_VARIANTS, RECALIBRATIONS
from cpseg.cli import options
from cpseg.cli.options import Commands, share, shares, whole, words
from cpseg.cli.progress import Progress
from cpseg.cli.shared import (
    data_words,
    refuse_unused,
    say,
    say_paragraph,
    settings_from,
    source_of,
    warn,
)


def add(commands: Commands) -> None:
    """The subcommand's options."""
    command = commands.add_parser(
        "report",
        parents=[
            options.data(),
            options.unlabelled(),
            options.masks(),
            options.class_map(),
            options.suppression(),
            options.recalibration_input(),
            options.grouping(FIXED_VARIANTS, "pixel"),
        ],
        help="one page: which rule serves this model, and how far to trust it",
    )
    add = command.add_argument
    add("--alpha", default="0.05", help="miscoverage rate (default 0.05)")
    add("--folds", type=whole(1), default=5, help="number of folds (default 5)")
    add("--seed", type=whole(0), default=0, help="seed of all draws (default 0)")
    add(
        "--max-error",
        type=words,
        default=["0.05", "0.1"],
        help="bounds on the error to certify, or none (default 0.05,0.1)",
    )
    add("--delta", default="0.1", help="1 - confidence of the certificates (default 0.1)")
    add(
        "--per",
        choices=CERTIFIED_PER,
        default="labels",
        help="what certificates bound: the share of wrong ones among all labels kept (default), "
        "or its mean over images that keep a label",
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
        default=[0.0, 0.25, 0.5],
        help="to try with labels for every pixel (default 0,0.25,0.5)",
    )
    add(
        "--subsets",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with several sources, also try maps over each model alone and over all but one "
        "(default)",
    )
    add(
        "--recalibrate-share",
        type=share,
        default=argparse.SUPPRESS,
        help="share of a fold's training images on which recalibrations are fitted and the "
        "thresholds of certified rules are set (default 0.3)",
    )
    add("--show", type=whole(0), default=4, help="number of images to show (default 4)")
    add("--names", type=Path, help="file of class names, one per line (default: classes.txt of P)")
    add("--json", type=Path, help="file for the findings, with the commands that make every rule")
    add("-o", "--output", type=Path, required=True, help=".html file to write")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from cpseg._internal.safe_files import write_text
    from cpseg.foundation.classes import read_classes
    from cpseg.jobs.seen_images import approximate, cross_fitted
    from cpseg.report.findings import Plan
    from cpseg.report.page import report
    from cpseg.report.record import record
    from cpseg.report.wording import advice, verdict

    source = source_of(arguments)
    data = data_words(source, arguments)
    certifies = arguments.max_error != ["none"]
    certificates_use = ("recalibrate_share",) if certifies else ()
    refuse_unused(arguments, set(arguments.recalibrate) != {"none"}, but=certificates_use)
    plan = settings_from(
        Plan,
        arguments,
        max_errors=tuple(arguments.max_error) if certifies else (),
        methods=tuple(arguments.recalibrate),
        samples=arguments.show,
        names=None if arguments.names is None else read_classes(arguments.names).names,
        **_share(arguments),
    )
    with Progress() as progress:
        findings = report(
            source,
            arguments.ids,
            plan,
            arguments.output,
            made_by=_command(arguments, plan.context, plan.scores, plan.share),
            data=data,
            progress=progress,
        )
    if arguments.json is not None:
        facts = record(findings, data, colour=source.colour)
        write_text(arguments.json, json.dumps(facts, indent=1) + "\n")
    for text in (verdict(findings), *advice(findings)):
        say_paragraph(text)
        say("")
    say(f"{arguments.output}: the commands that come next, figures, pictures, and how made")
    approximations = approximate(cross_fitted(source, source.read_ids(arguments.ids)))
    for text in approximations:
        warn(text)
    if approximations and certifies:
        warn("rules with a certificate are left out: these images cannot certify such scores")


def _share(arguments: argparse.Namespace) -> dict[str, float]:
    given = hasattr(arguments, "recalibrate_share")
    return {"share": arguments.recalibrate_share} if given else {}


def _command(
    arguments: argparse.Namespace, context: str | tuple[str, ...], scores: str, share: float
) -> str:
    """The command with all its options, defaults too, so that the page can be made again."""
    defaults: dict[str, object] = {}  # those that the plan has; refused where they have no use
    if recalibrates := set(arguments.recalibrate) != {"none"}:
        defaults |= {"context": context, "scores": scores}
    if recalibrates or arguments.max_error != ["none"]:
        defaults["recalibrate_share"] = share
    words = ["cpseg", "report"]
    for name, value in (vars(arguments) | defaults).items():
        if name in ("run", "resumes", "json", "debug") or (value is None and name != "background"):
            continue
        if isinstance(value, bool):
            if value != (name == "subsets"):  # on by default, and off by --no-subsets
                words.append(f"--{name}" if value else f"--no-{name}")
            continue
        if name in ("probs", "class_map"):  # once for each model
            for each in value:
                words += [f"--{name.replace('_', '-')}", "none" if each is None else str(each)]
            continue
        if isinstance(value, (list, tuple)):
            joined = ("x" if name == "grid" else ",").join(map(str, value))
            value = joined or "none"
        words += [f"--{name.replace('_', '-')}", "none" if value is None else str(value)]
    return shlex.join(words)
