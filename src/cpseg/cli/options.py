"""The command's arguments: what may be asked for, and what each word must be."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from cpseg._version import __version__
from cpseg.calibration.calibration import UNITS
from cpseg.calibration.certificate import METHODS, PVALUES
from cpseg.foundation.foundation import AMP
from cpseg.jobs.certify import VARIANTS as FIXED
from cpseg.jobs.predict import DTYPES
from cpseg.jobs.sweep import ALPHAS, DEFAULT_VARIANTS
from cpseg.jobs.variants import VARIANTS
from cpseg.recalibration.features import CONTEXTS
from cpseg.recalibration.fit import METHODS as REFITS
from cpseg.recalibration.recalibration import SCORES

Run = Callable[[argparse.Namespace], Any]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like every other error."""
        raise ValueError(f"{message}; see '{self.prog} --help'")


def _background(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a class index or 'none', got {text!r}")
    return int(text)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _backgrounds(text: str) -> list[int | None]:
    return [_background(word) for word in _words(text)]


def _void(text: str) -> int:
    if not text.isdecimal() or int(text) > 255:
        raise argparse.ArgumentTypeError(f"expected a value in 0..255, got {text!r}")
    return int(text)


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, got {text!r}")
        return int(text)

    return parse


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got {text!r}")


def _shares(text: str) -> list[float]:
    return [_share(word) for word in _words(text)]


def _context(text: str) -> str | tuple[str, ...]:
    if text in ("auto", "none"):
        return "auto" if text == "auto" else ()
    parts = tuple(text.split(","))
    if not set(parts) <= set(CONTEXTS):
        raise argparse.ArgumentTypeError(
            f"expected auto, none or a list of {', '.join(CONTEXTS)}, got {text!r}"
        )
    return parts


def _grid(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 512x512, got {text!r}")
    return int(sides[0]), int(sides[1])


def parser(runs: Mapping[str, Run]) -> argparse.ArgumentParser:
    """The command's parser; ``runs`` are the functions of its subcommands."""
    top = _Parser(
        prog="cpseg",
        description="Calibrated pseudo-labels from a foundation model's class scores.",
    )
    top.add_argument("--version", action="version", version=f"cpseg {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    data = _Parser(add_help=False)
    group = data.add_argument_group("data")
    group.add_argument("--root", type=Path, required=True, help="folder that id lists start from")
    group.add_argument("--ids", type=Path, required=True, help="id list: 'image mask' a line")
    group.add_argument("--probs", type=Path, required=True, help="folder of score files")
    group.add_argument("--device", default="cpu", help="where to work, cpu or cuda (default cpu)")
    masks = _Parser(add_help=False)
    masks.add_argument("--void", type=_void, default=255, help="void in masks (default 255)")
    masks.add_argument("--mask-map", type=Path, help="JSON: value in the masks to class")
    mapped = _Parser(add_help=False)
    mapped.add_argument("--class-map", type=Path, help="JSON: class of the model to class here")
    ground = _Parser(add_help=False)
    ground.add_argument(
        "--background",
        type=_background,
        required=True,
        help="index of a dominant class to suppress, or 'none' where every class counts",
    )
    seen = _Parser(add_help=False)
    group = seen.add_argument_group("what a recalibration sees")
    group.add_argument(
        "--context",
        type=_context,
        default="auto",
        help="what else vector and dirichlet see: auto (default), none, or a list of "
        + ", ".join(CONTEXTS),
    )
    group.add_argument(
        "--scores", choices=SCORES, default="softmax", help="the model's (default softmax)"
    )
    refit = _Parser(add_help=False, parents=[seen])
    group = refit.add_argument_group("refitted scores")
    group.add_argument(
        "--recalibrate",
        choices=REFITS,
        default="none",
        help="fit the scores to the labelled images first (default none)",
    )
    group.add_argument(
        "--prior-power",
        type=_share,
        default=0.0,
        help="divide out the class prior to this power in [0, 1] (default 0)",
    )
    group.add_argument(
        "--num-classes", type=_whole(2), help="of the data set, where the model has others"
    )
    made = _Parser(add_help=False)
    made.add_argument("--calibration", type=Path, required=True, help="what calibrate wrote")

    command = commands.add_parser("demo", help="the whole job on handwritten digits")
    command.add_argument("-o", "--output", type=Path, default=Path("demo_out"))
    command.add_argument("--seed", type=_whole(0), default=0)
    command.add_argument(
        "--steps", type=_whole(1), default=1000, help="training steps (default 1000)"
    )
    command.set_defaults(run=runs["demo"])

    command = commands.add_parser(
        "calibrate",
        parents=[data, masks, mapped, ground, refit],
        help="thresholds from labelled images",
    )
    command.add_argument(
        "--recalibrate-share",
        type=_share,
        default=0.3,
        help="share of the images that refits the scores and does not calibrate (default 0.3)",
    )
    command.add_argument(
        "--recalibrate-folds",
        type=_whole(2),
        default=0,
        help="refit by folds instead: all images calibrate, without a promise",
    )
    command.add_argument("--alpha", default="0.05", help="miscoverage rate (default 0.05)")
    command.add_argument("--variant", choices=VARIANTS, default="pixel")
    command.add_argument("--block", type=_whole(1), default=32, help="side of a block (default 32)")
    command.add_argument("--num-groups", type=_whole(1), default=8, help="learned ones (default 8)")
    command.add_argument(
        "--group-share",
        type=_share,
        default=0.0,
        help="share of the images that learns the groups and does not calibrate (default 0)",
    )
    command.add_argument("--seed", type=_whole(0), default=0, help="of learned groups (default 0)")
    command.add_argument("--grid", type=_grid, help="HxW (default: the first image's size)")
    command.add_argument("--per-class", action="store_true", help="thresholds for every class")
    command.add_argument(
        "--score",
        default="lac",
        help="lac (default), or for prediction sets alone aps, raps, raps:PENALTY:FREE, margin",
    )
    command.add_argument(
        "--unit",
        choices=UNITS,
        default="pixel",
        help="what is exchangeable in pooled groups (default pixel; image keeps a promise)",
    )
    command.add_argument(
        "--fallback",
        action="store_true",
        help="infinite thresholds take that of their block, then that of the image",
    )
    command.add_argument("-o", "--output", type=Path, required=True, help=".safetensors to write")
    command.set_defaults(run=runs["calibrate"])

    command = commands.add_parser(
        "label", parents=[data, mapped, made], help="masks and an id list for training code"
    )
    command.add_argument("--labelled", type=Path, help="labelled id list, for stage1.txt")
    command.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    command.set_defaults(run=runs["label"])

    command = commands.add_parser(
        "evaluate", parents=[data, masks, mapped, made], help="rules compared on held-out images"
    )
    command.add_argument("--constant", type=_share, help="also a constant threshold such as 0.3")
    command.add_argument("--per-class", action="store_true", help="IoU of every class too")
    command.add_argument("-o", "--output", type=Path, help="also write the figures as JSON")
    command.set_defaults(run=runs["evaluate"])

    command = commands.add_parser(
        "certify",
        parents=[data, masks, mapped, ground, refit],
        help="thresholds whose labels are proven to be wrong rarely",
    )
    command.add_argument(
        "--max-error", default="0.05", help="bound on an image's mean error (default 0.05)"
    )
    command.add_argument("--delta", default="0.1", help="1 - confidence (default 0.1)")
    command.add_argument("--method", choices=METHODS, default="ltt", help="(default ltt)")
    command.add_argument("--pvalue", choices=PVALUES, default="betting", help="(default betting)")
    command.add_argument("--per-class", action="store_true", help="a level for every class")
    command.add_argument("--variant", choices=FIXED, default="image")
    command.add_argument("--block", type=_whole(1), default=32, help="side of a block (default 32)")
    command.add_argument(
        "--calibrate-share",
        type=_share,
        default=0.2,
        help="share of the images that sets thresholds and does not certify (default 0.2)",
    )
    command.add_argument(
        "--calibration-ids", type=Path, help="id list that sets thresholds; all of --ids certify"
    )
    command.add_argument("--seed", type=_whole(0), default=0, help="of the draw (default 0)")
    command.add_argument("--grid", type=_grid, help="HxW (default: the first image's size)")
    command.add_argument("-o", "--output", type=Path, required=True, help=".safetensors to write")
    command.set_defaults(run=runs["certify"])

    command = commands.add_parser(
        "sweep",
        parents=[data, masks, mapped, seen],
        help="scores, alphas, variants and background rules cross-validated on labelled images",
    )
    command.add_argument(
        "--backgrounds",
        type=_backgrounds,
        required=True,
        help="rules to try: 'none', indices of classes to suppress, or several such as none,0",
    )
    command.add_argument(
        "--alphas",
        type=_words,
        default=list(ALPHAS),
        help=f"miscoverage rates (default {','.join(ALPHAS)})",
    )
    command.add_argument(
        "--variants",
        type=_words,
        default=list(DEFAULT_VARIANTS),
        help=f"among {','.join(VARIANTS)} (default {','.join(DEFAULT_VARIANTS)})",
    )
    command.add_argument("--block", type=_whole(1), default=32, help="side of a block (default 32)")
    command.add_argument("--num-groups", type=_whole(1), default=8, help="learned ones (default 8)")
    command.add_argument(
        "--group-share",
        type=_share,
        default=0.3,
        help="share of a fold's training images that learns the groups (default 0.3)",
    )
    command.add_argument(
        "--recalibrate",
        type=_words,
        default=["none"],
        help=f"how scores are refitted, among {','.join(REFITS)} (default none)",
    )
    command.add_argument(
        "--prior-powers",
        type=_shares,
        default=[0.0],
        help="powers in [0, 1] to which the class prior is divided out (default 0)",
    )
    command.add_argument(
        "--recalibrate-share",
        type=_share,
        default=0.3,
        help="share of a fold's training images that fits maps and prior (default 0.3)",
    )
    command.add_argument("--folds", type=_whole(1), default=5, help="parts (default 5)")
    command.add_argument("--seed", type=_whole(0), default=0, help="of all draws (default 0)")
    command.add_argument("--grid", type=_grid, help="HxW (default: the first image's size)")
    command.add_argument("-o", "--output", type=Path, help="folder to write, and to go on in")
    command.set_defaults(run=runs["sweep"])

    command = commands.add_parser(
        "report",
        parents=[data, masks, mapped, ground, seen],
        help="one page: which rule serves this model, and how far to trust it",
    )
    command.add_argument("--alpha", default="0.05", help="miscoverage rate (default 0.05)")
    command.add_argument("--variant", choices=FIXED, default="pixel")
    command.add_argument("--block", type=_whole(1), default=32, help="side of a block (default 32)")
    command.add_argument("--folds", type=_whole(1), default=5, help="parts (default 5)")
    command.add_argument("--seed", type=_whole(0), default=0, help="of all draws (default 0)")
    command.add_argument(
        "--max-error",
        type=_words,
        default=["0.05", "0.1"],
        help="bounds to certify, or none (default 0.05,0.1)",
    )
    command.add_argument("--delta", default="0.1", help="1 - confidence (default 0.1)")
    command.add_argument(
        "--recalibrate",
        type=_words,
        default=["none", "dirichlet"],
        help=f"how scores are refitted, among {','.join(REFITS)} (default none,dirichlet)",
    )
    command.add_argument(
        "--recalibrate-share",
        type=_share,
        default=0.3,
        help="share of a fold's training images that refits and sets levels (default 0.3)",
    )
    command.add_argument("--images", type=_whole(0), default=4, help="to show (default 4)")
    command.add_argument("--names", type=Path, help="class names, one a line")
    command.add_argument("--grid", type=_grid, help="HxW (default: the first image's size)")
    command.add_argument("-o", "--output", type=Path, required=True, help=".html to write")
    command.set_defaults(run=runs["report"])

    command = commands.add_parser(
        "compact", parents=[data, mapped], help="score files to small evidence files"
    )
    choice = command.add_mutually_exclusive_group(required=True)
    choice.add_argument(
        "--background",
        type=_background,
        default=-1,  # not None, which argparse would take for no answer
        help="index of a dominant class to suppress, or 'none' where every class counts",
    )
    choice.add_argument(
        "--calibration", type=Path, help="take background, class map and recalibration from it"
    )
    command.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    command.set_defaults(run=runs["compact"])

    command = commands.add_parser("predict", help="score files from a foundation model")
    command.add_argument("--model", required=True, help="name on the hub, or a folder")
    command.add_argument("--images", type=Path, help="folder: every image in it")
    command.add_argument("--root", type=Path, help="instead: folder that --ids starts from")
    command.add_argument("--ids", type=Path, help="id list: 'image' or 'image mask' a line")
    command.add_argument("--classes", type=Path, help="'name' or 'name: prompt, prompt' a line")
    command.add_argument("--class-map", type=Path, help="JSON: class of the model to class here")
    command.add_argument(
        "--background",
        choices=("prompt", "complement", "none"),
        required=True,
        help="prompt: it is class 0; complement: class 0 is added, 1 - max of the others",
    )
    command.add_argument(
        "--evidence",
        type=_background,
        default=-1,  # not None, which argparse would take for no answer
        help="write evidence, for selection that suppresses this class index, or 'none'",
    )
    command.add_argument("--dtype", choices=DTYPES, default="uint8", help="(default uint8)")
    command.add_argument("--batch", type=_whole(1), default=1, help="of one size (default 1)")
    command.add_argument("--tile", type=_whole(1), help="side of tiles for larger images")
    command.add_argument("--overlap", type=_whole(0), help="of tiles (default a quarter)")
    command.add_argument("--amp", choices=tuple(AMP), help="mixed precision")
    command.add_argument("--revision", help="branch, tag or commit on the hub")
    command.add_argument("--device", default="cpu", help="where to work, cpu or cuda (default cpu)")
    command.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    command.set_defaults(run=runs["predict"])
    return top
