"""Options that several subcommands share, and what each word on the command line must be."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from cpseg._internal.words import CONTEXTS, OUTPUT_LAYOUTS, RECALIBRATIONS, SCORE_KINDS

Commands = Any  # what add_subparsers returns has no public name


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; its help begins with what is required.

    Attributes:
        example: a line to copy, for the end of the help; only a subcommand has one.
    """

    example: str | None = None

    def format_help(self) -> str:
        """Usage, description, what is required, all other options by group, and the example."""
        if self.example is None:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        required = [action for action in self._actions if action.required]
        sections = [("required", required)]
        for each in self._action_groups:
            left = [action for action in each._group_actions if action not in required]
            sections.append((each.title or "options", left))
        for title, actions in sections:
            if any(action.help is not argparse.SUPPRESS for action in actions):
                formatter.start_section(title)
                formatter.add_arguments(actions)
                formatter.end_section()
        width = max(40, shutil.get_terminal_size().columns - 6)
        lines = textwrap.wrap(self.example, width, break_long_words=False, break_on_hyphens=False)
        example = " \\\n      ".join(lines)
        return f"{formatter.format_help()}\nexample:\n  {example}\n"

    def error(self, message: str) -> NoReturn:
        """Raise in place of printing the usage."""
        raise ValueError(f"{message}; see '{self.prog} --help'")


def group() -> Parser:
    """Options to share: a parser that others take as a parent."""
    return Parser(add_help=False)


# --- what a word must be -----------------------------------------------------------------------


def background(text: str) -> int | None:
    """A class index or ``none``."""
    if text == "none":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a class index or 'none', got {text!r}")
    return int(text)


def words(text: str) -> list[str]:
    """Words with commas between them."""
    return [word.strip() for word in text.split(",")]


def backgrounds(text: str) -> list[int | None]:
    """Class indices or ``none``, with commas between them."""
    return [background(word) for word in words(text)]


def whole(least: int) -> Callable[[str], int]:
    """A whole number, ``least`` or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, got {text!r}")
        return int(text)

    return parse


def share(text: str) -> float:
    """A number in [0, 1]."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got {text!r}")


def shares(text: str) -> list[float]:
    """Numbers in [0, 1], with commas between them."""
    return [share(word) for word in words(text)]


def context(text: str) -> str | tuple[str, ...]:
    """``auto``, ``none``, or parts of the context with commas between them."""
    if text in ("auto", "none"):
        return "auto" if text == "auto" else ()
    parts = tuple(text.split(","))
    if not set(parts) <= set(CONTEXTS):
        raise argparse.ArgumentTypeError(
            f"expected auto, none or a list of {', '.join(CONTEXTS)}, got {text!r}"
        )
    return parts


def _kinds(text: str) -> str:
    if not set(text.split(",")) <= set(SCORE_KINDS):
        raise argparse.ArgumentTypeError(f"expected {' or '.join(SCORE_KINDS)}, got {text!r}")
    return text


def _score_layout(text: str) -> str:
    if text in OUTPUT_LAYOUTS:
        raise argparse.ArgumentTypeError(
            f"expected the axes of scores, chw or hwc, got {text!r}; how the folder of labels is "
            "laid out is --output-layout"
        )
    return text


def _path_or_none(text: str) -> Path | None:
    return None if text == "none" else Path(text)


def _void(text: str) -> int:
    if not text.isdecimal() or int(text) > 255:
        raise argparse.ArgumentTypeError(f"expected a value in 0..255, got {text!r}")
    return int(text)


def _grid(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 512x512, got {text!r}")
    return int(sides[0]), int(sides[1])


# --- options that several subcommands have -----------------------------------------------------


_IDS = (
    "id list: a line 'image mask' per image, separated by a space, a tab or a comma; or a folder "
    "of images"
)


def data(ids: str = "--ids") -> Parser:
    """The data set and its score files; ``ids`` is the name of the list's option."""
    options = group()
    titled = options.add_argument_group("data")
    add = titled.add_argument
    add("--root", type=Path, required=True, help="folder to which the paths in id lists are added")
    add(ids, dest="ids", type=Path, required=True, help=_IDS)
    add(
        "--probs",
        type=Path,
        action="append",
        required=True,
        help="folder of score files, or one .npz, .safetensors or .pt file with those of all "
        "images; of several models once for each, always in the same order",
    )
    add("--features", type=Path, help="folder with an image encoder's features of every image")
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    workers(options)
    _reading(options)
    return options


def _reading(options: argparse.ArgumentParser) -> None:
    """How scores are stored. No defaults: a calibration says it where nothing is given."""
    titled = options.add_argument_group("how scores are stored (of several models once for each)")
    add = titled.add_argument
    add(
        "--layout",
        type=_score_layout,
        choices=("chw", "hwc"),
        action="append",
        help="axes of an image's scores: chw, classes first (default), or hwc, classes last",
    )
    add(
        "--logits",
        choices=("auto", "softmax", "sigmoid", "no"),
        nargs="?",
        const="auto",
        action="append",
        help="scores are logits: softmax is applied, or sigmoid with '--logits sigmoid' or "
        "--scores sigmoid (default no)",
    )
    add(
        "--upsample",
        choices=("yes", "no"),
        nargs="?",
        const="yes",
        action="append",
        help="scores of a lower resolution are resized to the image's size, bilinear (default no)",
    )


def workers(options: argparse.ArgumentParser) -> None:
    """How many threads read and write files."""
    options.add_argument(
        "--workers",
        type=whole(1),
        default=2,
        help="threads that read files, and write them; results are the same (default 2)",
    )


def mask_folder() -> Parser:
    """The folder of masks."""
    options = group()
    options.add_argument(
        "--masks",
        type=Path,
        help="folder with the mask of every image, by path and name, where the id list has none",
    )
    return options


def masks() -> Parser:
    """How masks are stored."""
    options = Parser(add_help=False, parents=[mask_folder()])
    add = options.add_argument
    void(options)
    add("--mask-map", type=Path, help="JSON file: from values in masks to classes")
    add(
        "--palette",
        metavar="FILE|voc",
        help="for masks in colours: JSON file with the colour of every class, or 'voc'",
    )
    add(
        "--first-class",
        type=whole(0),
        default=0,
        help="value of class 0 in masks: 1 where they count from 1 and 0 is void (default 0)",
    )
    return options


def void(options: argparse.ArgumentParser) -> None:
    """The value of void pixels."""
    options.add_argument(
        "--void", type=_void, default=255, help="value of void pixels in masks (default 255)"
    )


def class_map() -> Parser:
    """From the model's classes to those of the data set."""
    options = group()
    options.add_argument(
        "--class-map",
        type=_path_or_none,
        action="append",
        help="JSON file: from the model's classes to those of the data set; of several models "
        "once for each, or 'none'",
    )
    return options


def unlabelled() -> Parser:
    """What components of features are found on."""
    options = group()
    add = options.add_argument_group("features").add_argument
    add("--colour", action="store_true", help="the images themselves are a source too")
    add(
        "--unlabelled",
        type=Path,
        help="with --features: id list of the images to label, on which and on the labelled ones "
        "the features' principal components are found",
    )
    add(
        "--components",
        type=whole(1),
        default=argparse.SUPPRESS,
        help="number of principal components at most (default 64); cross-validation chooses",
    )
    return options


def suppression() -> Parser:
    """The dominant class."""
    options = group()
    options.add_argument(
        "--background",
        type=background,
        required=True,
        help="index of a dominant class to suppress, or 'none' if every class counts",
    )
    return options


def calibration() -> Parser:
    """The calibration file to apply."""
    options = group()
    help_text = "file written by cpseg calibrate or cpseg certify"
    options.add_argument("--calibration", type=Path, required=True, help=help_text)
    return options


def grouping(variants: tuple[str, ...], default: str) -> Parser:
    """Which cells share a threshold."""
    options = group()
    add = options.add_argument
    add(
        "--variant",
        choices=variants,
        default=default,
        help=f"which cells of the grid share a threshold (default {default})",
    )
    block(options)
    grid(options)
    return options


def block(options: argparse.ArgumentParser) -> None:
    """The size of a block."""
    options.add_argument(
        "--block", type=whole(1), default=32, help="side of a block in cells (default 32)"
    )


def grid(options: argparse.ArgumentParser) -> None:
    """The size of the grid."""
    options.add_argument(
        "--grid", type=_grid, help="HEIGHTxWIDTH in cells (default: size of the first image)"
    )


def recalibration_input() -> Parser:
    """What a recalibration uses besides the probabilities of a pixel.

    No defaults here: an option that was not given is not there, so that one given in vain can be
    refused.
    """
    options = group()
    add = options.add_argument_group("input of the recalibration").add_argument
    add(
        "--context",
        type=context,
        default=argparse.SUPPRESS,
        help="what else the methods vector and dirichlet use: auto (default), none, or a list of "
        + ", ".join(CONTEXTS),
    )
    add(
        "--scores",
        type=_kinds,
        default=argparse.SUPPRESS,
        help="kind of the model's probabilities, softmax (default) or sigmoid; with commas where "
        "models differ",
    )
    return options


def recalibration() -> Parser:
    """One recalibration before everything else."""
    options = Parser(add_help=False, parents=[recalibration_input()])
    add = options.add_argument_group("recalibrated probabilities").add_argument
    add(
        "--recalibrate",
        choices=RECALIBRATIONS,
        help="recalibrate the probabilities to the labelled images first (default none; dirichlet "
        "with several sources)",
    )
    add(
        "--prior-power",
        type=share,
        default=0.0,
        help="divide out the class prior to this power in [0, 1] (default 0)",
    )
    add(
        "--num-classes",
        type=whole(2),
        default=argparse.SUPPRESS,
        help="number of classes of the data set, if the model has others",
    )
    return options
