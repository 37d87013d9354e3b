"""Which rule a report recommends: a cautious choice from figures over images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cpseg.jobs.estimate import Estimate

FOUND = 0.05  # the recall from which on a class counts as found
ERASED = 0.25  # the share of the classes found whose loss makes a rule erase classes


class Loss(NamedTuple):
    """Classes that a rule loses against another one.

    Attributes:
        classes: those of which more than half of the recall is gone, in order.
        found: how many classes the other rule finds: its recall is at least ``FOUND``.
    """

    classes: tuple[int, ...]
    found: int

    @property
    def erases(self) -> bool:
        """Whether at least ``ERASED`` of the classes found are lost."""
        return len(self.classes) > 0 and len(self.classes) >= ERASED * self.found


def loss_of_classes(recall: Sequence[float], *, over: Sequence[float]) -> Loss:
    """Which classes lose more than half of their right pixels.

    A pixel left without a label is not right. Classes that the base does not find cannot be lost,
    nor can those without pixels (NaN).

    Args:
        recall: share of the pixels of a class that carry its label, one per class.
        over: the same for the rule that it is compared with.

    Example:
        >>> from cpseg.report.recommendation import loss_of_classes
        >>> loss_of_classes([0.9, 0.1, 0.0], over=[0.8, 0.4, 0.01])
        Loss(classes=(1,), found=2)
    """
    pairs = list(zip(recall, over, strict=True))
    found = [k for k, (_, base) in enumerate(pairs) if base >= FOUND]
    return Loss(tuple(k for k in found if pairs[k][0] < pairs[k][1] / 2), len(found))


class Candidate(NamedTuple):
    """The figures of a rule, one per fold or, better, per part of the images.

    Attributes:
        name: the rule.
        miou: mean IoU over all pixels, those without a label counted as wrong.
        error: share of all pixels that do not carry their true label.
    """

    name: str
    miou: Sequence[float]
    error: Sequence[float]


class Certified(NamedTuple):
    """A certified rule, with one value per fold.

    Attributes:
        name: the rule.
        certified: whether the fold could certify it.
        kept: share of pixels that it keeps.
    """

    name: str
    certified: Sequence[bool]
    kept: Sequence[float]


def paired(values: Sequence[float], over: Sequence[float]) -> Estimate:
    """The mean difference and its standard error, NaN below two values.

    Example:
        >>> from cpseg.report.recommendation import paired
        >>> paired([0.5, 0.75], over=[0.25, 0.25])
        Estimate(mean=0.375, se=0.125, folds=2)
    """
    return Estimate.over([value - base for value, base in zip(values, over, strict=True)])


def better(candidate: Candidate, than: Candidate) -> bool:
    """Whether mIoU grows by more than a standard error and the error by no more than one.

    Differences are paired, since a hard image is hard for both. With fewer than two values there
    is no standard error, and no rule is better.
    """
    gain = paired(candidate.miou, over=than.miou)
    loss = paired(candidate.error, over=than.error)
    if math.isnan(gain.se) or math.isnan(loss.se):
        return False
    return gain.mean > gain.se and loss.mean <= loss.se


def recommend(candidates: Sequence[Candidate]) -> int:
    """The index of the rule to label with; the candidates begin with the simplest (raw argmax).

    A rule replaces a simpler one only if it is :func:`better` than that one and than the first.
    Noise, or a chain of small losses, therefore ends at the simpler rule.

    Example:
        >>> from cpseg.report.recommendation import Candidate, recommend
        >>> raw = Candidate("raw argmax", (0.31, 0.33, 0.32), (0.35, 0.34, 0.36))
        >>> noise = Candidate("noise", (0.36, 0.30, 0.31), (0.35, 0.34, 0.36))
        >>> map = Candidate("recalibrated", (0.41, 0.42, 0.43), (0.16, 0.17, 0.15))
        >>> recommend([raw, noise]), recommend([raw, noise, map])
        (0, 2)
    """
    chosen = 0
    for place, candidate in enumerate(candidates):
        if better(candidate, candidates[0]) and better(candidate, candidates[chosen]):
            chosen = place
    return chosen


def choose_certified(candidates: Sequence[Certified]) -> int | None:
    """The index of the certified rule that keeps most; None where no rule is certified.

    Only rules that every fold certified are candidates. A later one replaces an earlier one if it
    keeps more by more than a standard error, paired over folds.
    """
    chosen: int | None = None
    for place, candidate in enumerate(candidates):
        if not candidate.certified or not all(candidate.certified):
            continue
        if chosen is None:
            chosen = place
            continue
        gain = paired(candidate.kept, over=candidates[chosen].kept)
        if not math.isnan(gain.se) and gain.mean > gain.se:
            chosen = place
    return chosen
