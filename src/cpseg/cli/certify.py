"""``cpseg certify``: thresholds whose labels are proven to be wrong rarely."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cpseg._internal.words import CERTIFICATES, CERTIFIED_PER, FIXED_VARIANTS, PVALUES
from cpseg.cli import options
from cpseg.cli.options import Commands, share, whole
from cpseg.cli.progress import Progress
from cpseg.cli.shared import (
    job_settings,
    save,
    say,
    source_of,
    tell_recalibration,
)


def add(commands: Commands) -> None:
    """The subcommand's options."""
    command = commands.add_parser(
        "certify",
        parents=[
            options.data(),
            options.unlabelled(),
            options.masks(),
            options.class_map(),
            options.suppression(),
            options.recalibration(),
            options.grouping(FIXED_VARIANTS, "image"),
        ],
        help="thresholds whose labels are proven to be wrong rarely",
    )
    add = command.add_argument
    add("--max-error", default="0.05", help="bound on the share of wrong labels (default 0.05)")
    add("--delta", default="0.1", help="1 - confidence of the certificate (default 0.1)")
    add("--method", choices=CERTIFICATES, default="ltt", help="kind of certificate (default ltt)")
    add(
        "--per",
        choices=CERTIFIED_PER,
        default=None,
        help="what ltt bounds: labels, the share of wrong ones among all labels kept (default); "
        "image, its mean over images that keep a label",
    )
    add("--pvalue", choices=PVALUES, default="betting", help="kind of p-value (default betting)")
    add("--per-class", action="store_true", help="a separate alpha for every class")
    add(
        "--calibrate-share",
        type=share,
        default=0.2,
        help="share of the images that sets the thresholds; the others are used for the "
        "certificate (default 0.2)",
    )
    add(
        "--calibration-ids",
        type=Path,
        help="id list of images that set the thresholds; all images of --ids are then used for "
        "the certificate",
    )
    add("--seed", type=whole(0), default=0, help="seed of the draw (default 0)")
    add("-o", "--output", type=Path, required=True, help=".safetensors file to write")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from cpseg._internal.checks import message
    from cpseg._internal.distributed import rank
    from cpseg.jobs.certify import certify, class_levels
    from cpseg.jobs.settings import CertificationSettings

    if arguments.per is not None and arguments.method == "crc":
        expected, fix = "--method ltt with --per", "crc has one statement: leave --per out"
        raise ValueError(message("certify", expected, "--method crc", fix))
    arguments.per = arguments.per or "labels"
    settings = job_settings(CertificationSettings, arguments)
    source = source_of(arguments)
    with Progress() as progress:
        calibration = certify(source, arguments.ids, settings, progress=progress)
    certificate = calibration.certificate
    assert certificate is not None
    if not certificate.certified:
        if rank() == 0:
            print(f"cpseg: not certified: {certificate}", file=sys.stderr)
        return 1
    save(calibration, arguments.output)
    say(f"{arguments.output}: {certificate}")
    tell_recalibration(calibration)
    if certificate.classes is not None:
        say("\n" + class_levels(certificate))
    return 0
