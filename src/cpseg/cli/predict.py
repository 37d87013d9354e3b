"""``cpseg predict``: score files from a foundation model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cpseg._internal.words import AMP_DTYPES, SCORE_DTYPES
from cpseg.cli.options import Commands, background, whole, workers
from cpseg.cli.progress import Progress
from cpseg.cli.shared import check_device, say

if TYPE_CHECKING:
    from cpseg.files.id_lists import Pair


def add(commands: Commands) -> None:
    """The subcommand's options."""
    command = commands.add_parser("predict", help="score files from a foundation model")
    add = command.add_argument
    add("--model", required=True, help="name on the hub, or a folder")
    add("--images", type=Path, help="folder; every image in it is used")
    add("--root", type=Path, help="in place of --images: folder to which paths in --ids are added")
    add("--ids", type=Path, help="id list: one line 'image' or 'image mask' per image")
    add("--classes", type=Path, help="file: 'name' or 'name: prompt, prompt' per line")
    add("--class-map", type=Path, help="JSON file: from the model's classes to those wanted")
    add(
        "--background-from",
        choices=("prompt", "complement", "none"),
        required=True,
        help="prompt: it is class 0; complement: class 0 is added, 1 - the largest of the others",
    )
    add(
        "--evidence",
        type=background,
        default=argparse.SUPPRESS,
        help="write evidence in place of probabilities, for labels that suppress the class of "
        "this index, or 'none'",
    )
    add("--dtype", choices=SCORE_DTYPES, default="uint8", help="of the files (default uint8)")
    add("--batch", type=whole(1), default=1, help="images of one size per batch (default 1)")
    add("--tile", type=whole(1), help="side of the tiles of larger images, in pixels")
    add("--overlap", type=whole(0), help="overlap of tiles in pixels (default a quarter)")
    add("--amp", choices=AMP_DTYPES, help="dtype of mixed precision")
    add("--revision", help="branch, tag or commit on the hub")
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    workers(command)
    add("-o", "--output", type=Path, required=True, help="folder to write")
    command.set_defaults(run=_run, resumes=lambda arguments: True)


def _run(arguments: argparse.Namespace) -> None:
    from cpseg import foundation
    from cpseg.foundation.foundation import AMP
    from cpseg.jobs.predict import predict

    root, pairs = _images(arguments)
    device = arguments.device
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: one device per rank
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(device)
    model = foundation.load(
        arguments.model,
        arguments.classes,
        background=None if arguments.background_from == "none" else arguments.background_from,
        class_map=arguments.class_map,
        device=device,
        amp=arguments.amp and AMP[arguments.amp],
        tile=arguments.tile,
        overlap=arguments.overlap,
        revision=arguments.revision,
    )
    evidence = hasattr(arguments, "evidence")
    with Progress() as progress:
        written = predict(
            model,
            root,
            pairs,
            arguments.output,
            names=model.names,
            made={"foundation": model.fingerprint},
            dtype=arguments.dtype,
            evidence=evidence,
            background=arguments.evidence if evidence else None,
            batch=arguments.batch,
            device=device,
            workers=arguments.workers,
            progress=progress,
        )
    what = "evidence" if evidence else "score"
    rule = "there is none" if model.background is None else "class 0"
    say(
        f"{arguments.output}: {written} {what} files written by this rank; {model.num_classes} "
        f"classes in classes.txt, background: {rule}"
    )


def _images(arguments: argparse.Namespace) -> tuple[Path, list[Pair]]:
    """The folder and the images in it, by either way to name them."""
    from cpseg._internal.checks import message
    from cpseg.files.id_lists import read_ids
    from cpseg.jobs.predict import find_images

    if (arguments.images is None) == (arguments.root is None and arguments.ids is None):
        got = "none of them" if arguments.images is None else "both"
        expected, fix = "--images, or --root and --ids", "pass a folder of images, or an id list"
        raise ValueError(message("predict", expected, got, fix))
    if arguments.images is not None:
        return arguments.images, find_images(arguments.images)
    if arguments.root is None or arguments.ids is None:
        got = "--ids alone" if arguments.root is None else "--root alone"
        raise ValueError(message("predict", "--root and --ids", got, "pass both"))
    return arguments.root, read_ids(arguments.ids, columns=1, root=arguments.root)
