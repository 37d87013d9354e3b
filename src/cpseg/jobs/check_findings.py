"""What a check finds: findings, class shares, example images, and what they sum up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Classes = npt.NDArray[np.integer]  # [H, W]; negative is void
LEVELS = ("ok", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ``ok``; ``warning`` where something looks wrong; ``error`` where no job can work.
        name: what was looked at, one word for programs, such as ``layout`` or ``void``.
        text: one short sentence, with what cures it.
    """

    level: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.text}"


def ok(name: str, text: str) -> Finding:
    """A finding that is as expected."""
    return Finding("ok", name, text)


def warning(name: str, text: str) -> Finding:
    """A finding that looks wrong."""
    return Finding("warning", name, text)


def error(name: str, text: str) -> Finding:
    """A finding with which no job can work."""
    return Finding("error", name, text)


@dataclass(frozen=True)
class ClassShare:
    """How much of the pixels read a class has, and how much of it is found.

    Attributes:
        index: the class.
        masks: share of the labelled pixels that masks give it.
        argmax: share of the same pixels that the argmax gives it.
        recall: share of its labelled pixels where the argmax is right; NaN where it has none.
    """

    index: int
    masks: float
    argmax: float
    recall: float


@dataclass(frozen=True, eq=False, repr=False)
class Example:
    """An image to look at.

    Attributes:
        image: the file.
        truth: its mask ``[H, W]``, void negative; None where it cannot be read.
        argmax: of its scores ``[h, w]``, maybe at another size; None where they cannot be read.
    """

    image: Path
    truth: Classes | None
    argmax: Classes | None


@dataclass(frozen=True, repr=False)
class Check:
    """What :func:`cpseg.jobs.check` found.

    Attributes:
        findings: errors last.
        listed: number of labelled images in the list.
        read: number of those whose scores and masks were read, spread over the list.
        agreement: share of the labelled pixels read on which argmax and mask agree; NaN where
            they cannot be compared.
        miou: mean IoU of the argmax over the classes in those masks.
        shares: a line for each class.
        examples: images for :func:`cpseg.jobs.check_picture.draw`.
    """

    findings: tuple[Finding, ...]
    listed: int
    read: int
    agreement: float
    miou: float
    shares: tuple[ClassShare, ...]
    examples: tuple[Example, ...]

    def at(self, level: str) -> list[Finding]:
        """The findings of one level."""
        return [finding for finding in self.findings if finding.level == level]

    @property
    def can_work(self) -> bool:
        """Whether there is no error."""
        return not self.at("error")

    @property
    def verdict(self) -> str:
        """One sentence."""
        errors, warnings = self.at("error"), self.at("warning")
        if errors:
            return f"This cannot work yet: mend {counted(len(errors), 'error')} first."
        if warnings:
            return f"This will run, but look at {counted(len(warnings), 'warning')} first."
        return (
            "Nothing looks wrong: argmax and masks agree on "
            f"{percent(self.agreement)} of the labelled pixels read."
        )

    def __str__(self) -> str:
        return "\n".join([*map(str, self.findings), self.verdict])

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.at(level))} {level}" for level in LEVELS)
        return f"Check({self.read} of {self.listed} images read: {counts})"


def percent(share: float) -> str:
    """A share in whole per cent, one digit below 10."""
    if share != share:
        return "-"
    return f"{100 * share:.1f} %" if 0 < share < 0.0995 else f"{100 * share:.0f} %"


def counted(count: int, noun: str) -> str:
    """``1 image``, ``3 images``, ``1,200 images``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(values: Sequence[object], most: int = 4) -> str:
    """The first values with commas between them, and how many more there are."""
    shown = ", ".join(map(str, values[:most]))
    more = len(values) - most
    return shown if more <= 0 else f"{shown} and {more:,} more"


def classes_text(classes: Sequence[int]) -> str:
    """``class 3``, ``classes 3 and 5``, ``classes 3, 4, 5 and 2 more``."""
    if len(classes) == 1:
        return f"class {classes[0]}"
    if len(classes) == 2:
        return f"classes {classes[0]} and {classes[1]}"
    return f"classes {listed(classes, 6)}"
