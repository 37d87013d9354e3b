"""``cpseg calibrate``: thresholds from labelled images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cpseg._internal.words import FIXED_VARIANTS, LEARNED_VARIANTS, UNITS
from cpseg.cli import options
from cpseg.cli.options import Commands, share, whole
from cpseg.cli.progress import Progress
from cpseg.cli.shared import (
    job_settings,
    save,
    say,
    source_of,
    tell_recalibration,
    warn,
)

if TYPE_CHECKING:
    from cpseg.calibration.calibration import Calibration


def add(commands: Commands) -> None:
    """The subcommand's options."""
    command = commands.add_parser(
        "calibrate",
        parents=[
            options.data(),
            options.unlabelled(),
            options.masks(),
            options.class_map(),
            options.suppression(),
            options.recalibration(),
            options.grouping((*FIXED_VARIANTS, *LEARNED_VARIANTS), "pixel"),
        ],
        help="thresholds from labelled images",
    )
    add = command.add_argument
    add(
        "--recalibrate-share",
        type=share,
        default=argparse.SUPPRESS,
        help="share of the images on which the recalibration is fitted and which are not used "
        "for calibration (default 0.3)",
    )
    add(
        "--recalibrate-folds",
        type=whole(2),
        default=argparse.SUPPRESS,
        help="recalibrate by this number of folds instead: all images are used for calibration, "
        "and nothing is promised",
    )
    add(
        "--recalibrate-ids",
        type=Path,
        default=argparse.SUPPRESS,
        help="id list of images on which the recalibration is fitted instead; those of --ids are "
        "then all used for calibration",
    )
    add(
        "--alpha",
        default="0.05",
        help="miscoverage rate (default 0.05), or none: no thresholds, every pixel is labelled and "
        "the recalibration fitted on all images",
    )
    add("--num-groups", type=whole(1), default=8, help="number of learned groups (default 8)")
    add(
        "--group-share",
        type=share,
        default=0.0,
        help="share of the images on which groups are learned and which are not used for "
        "calibration (default 0)",
    )
    add("--seed", type=whole(0), default=0, help="seed of all draws (default 0)")
    add("--per-class", action="store_true", help="separate thresholds for every class")
    add(
        "--nonconformity",
        dest="score",
        default="lac",
        help="nonconformity score: lac (default), or for prediction sets alone aps, raps, "
        "raps:PENALTY:FREE, margin",
    )
    add(
        "--unit",
        choices=UNITS,
        default="pixel",
        help="what is exchangeable in pooled groups; only image gives a promise (default pixel)",
    )
    add(
        "--fallback",
        action="store_true",
        help="replace infinite thresholds by that of the block, then by that of the image",
    )
    add(
        "--allow-infinite",
        action="store_true",
        help="write a calibration whose thresholds are all infinite, which admits every class",
    )
    add("-o", "--output", type=Path, required=True, help=".safetensors file to write")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from cpseg.jobs.calibrate import calibrate
    from cpseg.jobs.settings import CalibrationSettings

    if arguments.alpha == "none":
        _check_unused(arguments)
        arguments.alpha = None
    settings = job_settings(CalibrationSettings, arguments)
    source = source_of(arguments)
    with Progress() as progress:
        calibration = calibrate(source, arguments.ids, settings, progress=progress)
    all_infinite = arguments.alpha is not None and calibration.infinite_share == 1
    if all_infinite and not arguments.allow_infinite:
        raise ValueError(_too_few(arguments, calibration.num_images))
    save(calibration, arguments.output)
    _tell(calibration, arguments)


def _too_few(arguments: argparse.Namespace, images: int) -> str:
    from cpseg._internal.checks import message
    from cpseg.jobs.calibrate import images_needed

    expected = f"{images_needed(arguments.alpha)} scores or more in some cell of the grid"
    got = f"fewer in every one, from {images} images: no label would be left out"
    pooled = arguments.variant == "image" or arguments.fallback
    pool = "" if pooled else "pool cells with --variant image or --fallback, "
    fix = f"label more images, raise --alpha, {pool}or pass --allow-infinite"
    return message(f"calibrate at alpha {arguments.alpha}", expected, got, fix)


def _check_unused(arguments: argparse.Namespace) -> None:
    """Without thresholds there is nothing to set images apart for, and nothing to group."""
    from cpseg._internal.checks import message

    given = [
        name
        for name in ("recalibrate_share", "recalibrate_folds", "recalibrate_ids")
        if hasattr(arguments, name)
    ]
    given += [name for name in ("per_class", "fallback") if getattr(arguments, name)]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        fix = "leave one of the two out"
        raise ValueError(message(option, "an alpha", "--alpha none, which has no thresholds", fix))


def _tell(calibration: Calibration, arguments: argparse.Namespace) -> None:
    """What was made, and where it promises less than one may think."""
    from cpseg.jobs.calibrate import images_needed
    from cpseg.jobs.estimate import percent
    from cpseg.jobs.seen_images import approximate

    background = "no background"
    if calibration.background is not None:
        background = f"background {calibration.background} suppressed"
    if calibration.alpha == 0:
        say(
            f"{arguments.output}: every pixel gets its most probable class, "
            f"{calibration.num_images} images, {calibration.num_classes} classes, {background}"
        )
        tell_recalibration(calibration)
        return
    infinite = percent(calibration.infinite_share)
    say(
        f"{arguments.output}: {calibration.variant}{', per class' * arguments.per_class}, "
        f"alpha {calibration.alpha:g}, {calibration.num_images} images, "
        f"{calibration.num_classes} classes, {background}, "
        f"grid {calibration.grid[0]}x{calibration.grid[1]}, {infinite} of thresholds infinite"
    )
    levels = calibration.provenance.fallback_shares
    if levels is not None:
        parts = (f"{name} {percent(level)}" for name, level in levels.items())
        say("thresholds by " + ", ".join(parts))
    tell_recalibration(calibration)
    for text in approximate(calibration.provenance.sources):
        warn(text)
    learned = calibration.provenance.groups
    if learned is not None and not learned.disjoint:
        warn(
            f"groups were learned on the {learned.learned_on} calibration images: nothing is "
            "promised; pass --group-share 0.2 to learn them on images of their own"
        )
    if calibration.infinite_share > 0:
        needed = images_needed(arguments.alpha)
        warn(
            f"{infinite} of thresholds are infinite and admit every class: alpha "
            f"{calibration.alpha:g} needs {needed} scores each; label more images, raise --alpha, "
            "pass --fallback, or pool cells with --variant blocks or image"
        )
