"""``cpseg import``: masks from an annotation or map tool as a folder of labelled images."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpseg._internal.words import EXCHANGE_FORMATS, OVERLAPS
from cpseg.cli.options import Commands
from cpseg.cli.shared import say, warn

_WITH_OVERLAPS = ("coco", "label-studio")


def add(commands: Commands) -> None:
    """The subcommand's options."""
    command = commands.add_parser(
        "import", help="corrected masks from COCO, Label Studio, CVAT or GeoTIFF"
    )
    add = command.add_argument
    add("file", type=Path, metavar="FILE", help="what the tool exported")
    add("--from", choices=EXCHANGE_FORMATS, required=True, dest="form", help="format of the file")
    add("-o", "--output", type=Path, required=True, help="folder to write")
    add("--labels", type=Path, metavar="OUT", help="folder that was exported")
    add("--root", type=Path, help="folder of the images (default: as recorded in OUT)")
    add("--ids", type=Path, help="id list of images that may be in FILE (default: those of OUT)")
    add("--names", type=Path, help="file of class names, one per line (default: as exported)")
    add(
        "--overlap",
        choices=OVERLAPS,
        default=argparse.SUPPRESS,
        help="pixels that two classes claim: an error (default), the later one, or void",
    )
    command.set_defaults(run=_run, resumes=lambda arguments: False)


def _run(arguments: argparse.Namespace) -> None:
    from cpseg._internal.checks import message
    from cpseg._internal.distributed import rank
    from cpseg.jobs.estimate import small_percent
    from cpseg.jobs.exchange import import_labels

    if hasattr(arguments, "overlap") and arguments.form not in _WITH_OVERLAPS:
        got, fix = arguments.form, "leave it out: a pixel has one class there"
        raise ValueError(message("--overlap", f"--from {' or '.join(_WITH_OVERLAPS)}", got, fix))
    if rank() > 0:
        return
    done = import_labels(
        arguments.file,
        arguments.form,
        arguments.output,
        labels=arguments.labels,
        root=arguments.root,
        ids=arguments.ids,
        names=arguments.names,
        overlap=getattr(arguments, "overlap", "error"),
    )
    say(f"{arguments.output}: ids.txt and masks of {len(done.images)} images")
    if done.before:
        say(
            f"{small_percent(done.changed / done.before)} of their labels were changed, and "
            f"{done.added} pixels without a label got one"
        )
    if done.missing:
        say(f"{done.missing} other images are not in {arguments.file}")
    if done.empty:
        warn(f"{len(done.empty)} images without a labelled pixel were left out: {done.empty[0]}")
    say(
        "these masks promise something for other images only if the images were drawn at random, "
        "not chosen by how they look"
    )
