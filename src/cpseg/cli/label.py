"""``cpseg label``: masks and an id list for training code."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cpseg._internal.words import OUTPUT_LAYOUTS
from cpseg.cli import options
from cpseg.cli.options import Commands
from cpseg.cli.progress import Progress
from cpseg.cli.shared import say, source_of, tell, warn

if TYPE_CHECKING:
    from cpseg.calibration.calibration import Calibration
    from cpseg.jobs.label_layout import OutputLayout

_OF_A_LAYOUT = ("names", "validation", "copy_images")


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
    command.add_argument(
        "--repeat-labelled",
        type=options.whole(1),
        default=1,
        metavar="N",
        help="name every labelled image N times in stage1.txt. With 1 (default) it counts as much "
        "as one pseudo-labelled image; with N = unlabelled / labelled both kinds are half of what "
        "a network sees, as where batches take half of their images from each list",
    )
    command.add_argument(
        "--relative",
        action="store_true",
        help="paths of masks relative to --root, with '..' where they lie outside, and relative "
        "links in a layout: --root and OUT may then be moved together (default: absolute outside)",
    )
    command.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    add = command.add_argument_group("folder for other training code").add_argument
    add(
        "--output-layout",
        choices=OUTPUT_LAYOUTS,
        help="also lay OUT out for Ultralytics (yolo), MMSegmentation (mmseg), or as Pascal VOC or "
        "ADE20K are, with links to the images",
    )
    add("--names", type=Path, help="file of class names, one per line (default: classes.txt of P)")
    add("--validation", type=Path, help="id list of labelled images for the validation split")
    add("--copy-images", action="store_true", help="copy the images in place of linking to them")
    command.set_defaults(run=_run, resumes=lambda arguments: True)


def _run(arguments: argparse.Namespace) -> None:
    from cpseg.calibration.calibration import Calibration
    from cpseg.jobs.estimate import percent
    from cpseg.jobs.label import label
    from cpseg.jobs.shift import Notice

    layout = _layout_of(arguments)
    calibration = Calibration.load(arguments.calibration)
    notices: list[Notice] = []
    with Progress() as progress:
        kept = label(
            source_of(arguments),
            arguments.ids,
            calibration,
            arguments.output,
            labelled=arguments.labelled,
            repeat_labelled=arguments.repeat_labelled,
            relative=arguments.relative,
            layout=layout,
            progress=progress,
            tell=notices.append,
        )
    lists = "ids.txt" if arguments.labelled is None else "ids.txt and stage1.txt"
    say(f"{arguments.output}: masks, {lists}, summary.csv; {percent(kept)} of pixels labelled")
    if layout is not None:
        _tell_layout(layout, arguments.output, calibration)
    for notice in notices:
        tell(notice)


def _layout_of(arguments: argparse.Namespace) -> OutputLayout | None:
    """The layout that the options ask for.

    Raises:
        ValueError: an option of a layout without one.
    """
    from cpseg._internal.checks import message
    from cpseg.jobs.label_layout import OutputLayout

    if arguments.output_layout is None:
        for name in _OF_A_LAYOUT:
            if getattr(arguments, name):
                option, fix = f"--{name.replace('_', '-')}", "leave it out, or choose a layout"
                raise ValueError(message(option, "--output-layout", "none", fix))
        return None
    given = {name: getattr(arguments, name) for name in _OF_A_LAYOUT}
    return OutputLayout(arguments.output_layout, **given)


def _tell_layout(layout: OutputLayout, out: Path, calibration: Calibration) -> None:
    """How the folder is used, and what its validation split is worth."""
    from cpseg.files.layout_texts import usage_of

    for line in usage_of(layout.name, out, calibration.num_classes):
        say(line)
    if layout.name == "yolo" and layout.validation is None:
        warn(
            "data.yaml validates on the training images, since Ultralytics needs a validation "
            "split: its figures say nothing; pass --validation LIST"
        )
