"""Rules: from scores, features and colours to a label for every pixel of the unlabelled images."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from convert import CLASSES
from cpseg import confusion_matrix, mean_iou
from cpseg.files import Source, read_ids, read_mask
from cpseg.jobs import RecalibrationOptions, calibrate, label

RULE: dict[str, Any] = {  # the recommended rule; all but the sources are RecalibrationOptions
    "sources": ("foundation", "student", "features", "colour"),
    "method": "trees",
    "prior_power": 0.125,
    "context": (),
}
DIRICHLET: dict[str, Any] = {
    "method": "dirichlet",
    "context": (),
}  # the rule to compare with: one linear map
ROUND_2_KEEPS = False  # whether in round 2 the student of the labels alone stays a source

FOUNDATION, STUDENT, ROUND_1 = "foundation", "student", "round 1"  # folders of scores
FEATURES, COLOUR = "features", "colour"


@dataclass(frozen=True)
class Rule:
    """How labels are made.

    Attributes:
        sources: scores of models, features, colours; the first are scores.
        options: of the recalibration to the labelled images; None for the scores as they are.
    """

    sources: tuple[str, ...]
    options: Mapping[str, Any] | None = field(default_factory=dict)

    @classmethod
    def recommended(cls) -> Rule:
        """``RULE``."""
        options = {name: value for name, value in RULE.items() if name != "sources"}
        return cls(tuple(RULE["sources"]), options)

    def without(self, source: str) -> Rule:
        """The same with one source less."""
        return Rule(tuple(each for each in self.sources if each != source), self.options)

    def second_round(self) -> Rule:
        """The same with the scores of round 1's student, which :data:`STUDENT` were before."""
        if ROUND_2_KEEPS:
            place = self.sources.index(STUDENT) + 1
            return Rule((*self.sources[:place], ROUND_1, *self.sources[place:]), self.options)
        sources = tuple(ROUND_1 if each == STUDENT else each for each in self.sources)
        return Rule(sources, self.options)

    def source(self, data: Path, budget: int, scores: Mapping[str, Path]) -> Source:
        """What the jobs read.

        Args:
            data: the folder of the data set.
            budget: number of labelled images.
            scores: the folder of scores of every model.
        """
        more: dict[str, Any] = {}
        if FEATURES in self.sources:
            unlabelled = data / f"unlabelled_{budget}.txt"
            more = {"features": data / "features", "unlabelled": unlabelled}
        if COLOUR in self.sources:
            more["colour"] = True
        first, *others = (scores[name] for name in self.sources if name in scores)
        models = tuple(model for folder in others for model in Source(data, folder).models)
        return Source(data, first, others=models, **more)

    def label(self, data: Path, budget: int, scores: Mapping[str, Path], out: Path) -> None:
        """Label every pixel of the unlabelled images; a folder from before is removed.

        Raises:
            ValueError: settings or files that the jobs refuse.
            OSError: a file that cannot be read or written.
        """
        shutil.rmtree(out, ignore_errors=True)
        source = self.source(data, budget, scores)
        options = None if self.options is None else RecalibrationOptions(**self.options)
        calibration = calibrate(
            source,
            data / f"labelled_{budget}.txt",
            alpha=None,
            background=None,
            recalibration=options,
        )
        label(source, data / f"unlabelled_{budget}.txt", calibration, out)


def errors(data: Path, budget: int, masks: Path) -> dict[str, Any]:
    """How wrong labels are, in percent.

    Args:
        data: the folder of the data set.
        budget: number of labelled images; the labels are those of the others.
        masks: the folder of their masks.

    Returns:
        ``wrong``, share of all labels; ``miou``; ``of_class``, for every class the share of its
        pixels with another label, None for a class that does not occur.
    """
    counts = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
    for pair in read_ids(data / f"unlabelled_{budget}.txt"):
        truth = read_mask(data / str(pair.mask), num_classes=len(CLASSES), size=None)
        with Image.open(masks / f"{Path(pair.image).stem}.png") as opened:
            labels = torch.from_numpy(np.array(opened))
        counts += confusion_matrix(labels, truth, num_classes=len(CLASSES))
    right, there = counts.diag(), counts.sum(1)
    of_class = [
        100 * (1 - float(share)) if number else None
        for share, number in zip(right / there, there, strict=True)
    ]
    wrong = 100 * (1 - int(right.sum()) / int(there.sum()))
    return {"wrong": wrong, "miou": 100 * float(mean_iou(counts)), "of_class": of_class}
