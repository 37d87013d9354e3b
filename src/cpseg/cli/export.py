"""``cpseg export``: the labels of a folder in the format of an annotation or map tool."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from cpseg._internal.words import EXCHANGE_FORMATS
from cpseg.cli.options import Commands, whole
from cpseg.cli.progress import Progress
from cpseg.cli.shared import say, settings_from

# Options of one format alone, which mean nothing for the others.
_OF_ONE = {"uncompressed": "coco", "prefix": "label-studio"}


def add(commands: Commands) -> None:
    """The subcommand's options."""
    command = commands.add_parser(
        "export", help="labels as COCO, for Label Studio or CVAT, or as GeoTIFF"
    )
    add, absent = command.add_argument, argparse.SUPPRESS
    add("folder", type=Path, metavar="OUT", help="folder that cpseg label has finished")
    add("--to", choices=EXCHANGE_FORMATS, required=True, help="format to write")
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="file to write; for geotiff F.tif is one raster of all images, anything else a folder "
        "with one per image",
    )
    add("--names", type=Path, help="file of class names, one per line (default: classes.txt of P)")
    add("--root", type=Path, help="folder of the images (default: as recorded by cpseg label)")
    choose = command.add_argument_group("which images").add_argument
    choose("--ids", type=Path, help="id list of the images (default: all)")
    choose(
        "--draw",
        type=whole(1),
        metavar="N",
        help="N of them at random: what a calibration on the corrected masks needs to promise "
        "anything",
    )
    choose("--seed", type=whole(0), default=absent, help="seed of the draw (default 0)")
    only = command.add_argument_group("of one format").add_argument
    only("--uncompressed", action="store_true", help="coco: run lengths as lists of numbers")
    only(
        "--prefix",
        default=absent,
        help="label-studio: what comes before an image's path in its address (default "
        "/data/local-files/?d=)",
    )
    command.set_defaults(run=_run, resumes=lambda arguments: False)


def _run(arguments: argparse.Namespace) -> None:
    from cpseg._internal.checks import message
    from cpseg._internal.distributed import rank
    from cpseg.jobs.exchange import ExportOptions, export_labels

    for name, form in _OF_ONE.items():
        if getattr(arguments, name, None) and arguments.to != form:
            raise ValueError(message(f"--{name}", f"--to {form}", arguments.to, "leave it out"))
    if hasattr(arguments, "seed") and arguments.draw is None:
        raise ValueError(message("--seed", "--draw", "none", "leave it out, or draw images"))
    if rank() > 0:
        return
    options = settings_from(ExportOptions, arguments, compressed=not arguments.uncompressed)
    with Progress() as progress:
        done = export_labels(
            arguments.folder, arguments.to, arguments.output, options, progress=progress
        )
    some = f", drawn at random from {done.of}" if arguments.draw else f" of {done.of}"
    say(f"{arguments.output}: {len(done.images)} images{some}, {len(done.class_names)} classes")
    if arguments.to == "label-studio":
        say(f"{arguments.output.with_suffix('.xml')}: the labelling configuration")
    if arguments.to == "cvat":
        say("the task in CVAT needs these labels: " + ", ".join([*done.class_names, "void"]))
    given = "" if arguments.names is None else f" --names {shlex.quote(str(arguments.names))}"
    out = shlex.quote(str(arguments.folder))
    say(
        f"when the masks are corrected: cpseg import FILE --from {arguments.to} "
        f"--labels {out}{given} -o CORRECTED"
    )
