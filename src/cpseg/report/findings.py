"""What a report finds: rules, their figures over folds, and the rules it recommends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from cpseg._internal.checks import check_alpha
from cpseg.calibration.calibration import Calibration
from cpseg.calibration.certificate import Certificate
from cpseg.core.metrics import mean_iou
from cpseg.core.reliability import Reliability
from cpseg.jobs.estimate import Estimate
from cpseg.jobs.labellings import OWN, Labelling
from cpseg.jobs.settings import ALPHAS
from cpseg.jobs.tally import row_of
from cpseg.report.recommendation import (
    Candidate,
    Certified,
    Loss,
    choose_certified,
    loss_of_classes,
    recommend,
)

RAW = "none"  # the scores as the model gives them
CONFIDENCES = (0.95, 0.9, 0.8, 0.7, 0.5)  # constant ones, strictest first


@dataclass(frozen=True)
class Plan:
    """What a report tries.

    Attributes:
        background: index of the dominant class that suppression is tried for, or None.
        alpha: miscoverage rate of eq. 4.
        variant: how cells share its thresholds, ``"pixel"``, ``"image"`` or ``"blocks"``.
        block: side of a block in cells.
        folds: number of parts, each measured once.
        seed: of all draws.
        max_errors: bounds on the error of the labels kept, each certified separately.
        delta: 1 - confidence of each certificate.
        per: what certificates bound, ``"labels"`` or ``"image"``, see :class:`cpseg.Certifier`.
        methods: methods of recalibration; ``"none"`` is always measured.
        prior_powers: to try with labels for every pixel.
        subsets: whether maps over a part of the sources are tried, where there are several.
        context: ``"auto"`` or parts of the context, see :class:`cpseg.Recalibrator`.
        scores: the model's, ``"softmax"`` or ``"sigmoid"``.
        share: share of a fold's training images on which recalibrations are fitted and the
            thresholds of certified rules are set.
        samples: number of images to show.
        grid: height and width of the grid; by default the size of the first listed image.
        names: names of the classes; by default their numbers.
    """

    background: int | None
    alpha: str = "0.05"
    variant: str = "pixel"
    block: int = 32
    folds: int = 5
    seed: int = 0
    max_errors: tuple[str, ...] = ("0.05", "0.1")
    delta: str = "0.1"
    per: str = "labels"
    methods: tuple[str, ...] = (RAW, "dirichlet")
    prior_powers: tuple[float, ...] = (0.0, 0.25, 0.5)
    subsets: bool = True
    context: str | tuple[str, ...] = "auto"
    scores: str = "softmax"
    share: float = 0.3
    samples: int = 4
    grid: tuple[int, int] | None = None
    names: tuple[str, ...] | None = None

    @property
    def backgrounds(self) -> list[int | None]:
        """Without suppression, then with it if there is a background."""
        return [None] if self.background is None else [None, self.background]

    @property
    def alphas(self) -> list[float]:
        """Those of the sweep and the one asked for, the largest (strictest) first."""
        return [float(alpha) for alpha in self.exact_alphas]

    @property
    def exact_alphas(self) -> list[Fraction]:
        """The same as exact decimals."""
        exact = {check_alpha("report", alpha) for alpha in (*ALPHAS, self.alpha)}
        return sorted(exact, reverse=True)

    @property
    def asked(self) -> float:
        """The alpha that was asked for."""
        return float(check_alpha("report", self.alpha))

    @property
    def risk(self) -> float:
        """``delta`` as a number."""
        return float(check_alpha("report", self.delta, name="delta"))

    @property
    def bounds(self) -> list[float]:
        """The bounds on the error as numbers."""
        return [float(check_alpha("report", error, name="max_error")) for error in self.max_errors]


def scores_in_words(name: str) -> str:
    """What a method of recalibration makes."""
    return "raw scores" if name == RAW else f"recalibrated scores ({name})"


class Rule(NamedTuple):
    """A way to choose labels.

    Attributes:
        scores: ``"none"`` for the model's own probabilities, or the method of recalibration; for
            ``"labels"`` the labelling in words.
        kind: ``"argmax"``, ``"confidence"``, ``"eq4"``, ``"certified"``, or ``"labels"`` for a
            labelling of every pixel whose map is fitted on all training images of a fold.
        background: the class that selection suppresses, or None.
        level: the least confidence, alpha, or the bound on the error; None for ``"argmax"`` and
            ``"labels"``.
    """

    scores: str
    kind: str
    background: int | None = None
    level: float | None = None

    @property
    def name(self) -> str:
        """The rule in words."""
        if self == Rule(RAW, "argmax"):
            return "raw argmax"
        if self.kind == "labels":
            return f"labels: {self.scores}"
        return f"{self.choice}, {scores_in_words(self.scores)}"

    @property
    def choice(self) -> str:
        """The rule in words, without the scores."""
        what = {
            "argmax": "argmax",
            "confidence": f"confidence {self.level:g} or more" if self.level else "",
            "eq4": f"eq. 4 at alpha {self.level:g}" if self.level else "",
            "certified": f"certified at {100 * (self.level or 0):g} % error",
            "labels": self.scores,
        }[self.kind]
        suppressed = "" if self.background is None else f", class {self.background} suppressed"
        return f"{what}{suppressed}"


@dataclass
class Measured:
    """What a rule did in every fold.

    Attributes:
        parts: per fold, the counts over each part of its test images, int64 ``[K, K + 1]``; the
            last column counts pixels without a label.
        inside: per fold, pixels whose class is in the prediction set; NaN for rules without sets.
        infinite: per fold, share of thresholds that are +inf; NaN for rules without thresholds.
        certificates: those of a certified rule, one per fold.
    """

    parts: list[list[Tensor]] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    infinite: list[float] = field(default_factory=list)
    certificates: list[Certificate] = field(default_factory=list)

    def add(
        self,
        confusion: Tensor,
        inside: float = math.nan,
        infinite: float = math.nan,
        *,
        fold: int | None = None,
    ) -> None:
        """The counts of one more part of a fold's images; by default of one more fold."""
        if fold is None or fold == len(self.parts):
            self.parts.append([])
            self.inside.append(0.0)
            self.infinite.append(infinite)
        self.parts[-1].append(confusion.cpu())
        self.inside[-1] += inside

    @property
    def confusion(self) -> list[Tensor]:
        """The counts of every fold, int64 ``[K, K + 1]``."""
        return [torch.stack(parts).sum(0) for parts in self.parts]

    def values(self, name: str) -> list[float]:
        """A figure of :class:`cpseg.jobs.tally.Row`, or ``"error"``, in every fold.

        ``"error"`` is the share of all pixels that do not carry their true label.
        """
        if name == "error":
            return [_error(confusion) for confusion in self.confusion]
        figures = []
        for confusion, inside in zip(self.confusion, self.inside, strict=True):
            pixels = 0.0 if math.isnan(inside) else float(confusion.sum())
            sets = torch.tensor([inside, math.nan, pixels], dtype=torch.float64)
            figures.append(float(getattr(row_of("", confusion, sets), name)))
        return figures

    def pseudo_values(self, name: str) -> list[float]:
        """The mean of ``"miou_all"`` or ``"error"`` over folds as values that differ by images.

        There is one per part g of the images: ``θ - (G - 1) (θ_g - mean of θ_g)``, where θ is the
        mean over folds and θ_g the same without the part. Their mean is θ, and their standard
        error that of the grouped jackknife over images. It does not see how much a map depends on
        the images that it was fitted on; the handful of folds by itself says little of either.

        Reference:
            Efron & Tibshirani (1993), An introduction to the bootstrap, chapter 11.
        """
        figure = _error if name == "error" else _miou
        sums = self.confusion
        values = [figure(confusion) for confusion in sums]
        replicates = [
            _mean([*values[:fold], figure(sums[fold] - part), *values[fold + 1 :]])
            for fold, parts in enumerate(self.parts)
            for part in parts
        ]
        whole, middle = _mean(values), _mean(replicates)
        return [whole - (len(replicates) - 1) * (value - middle) for value in replicates]

    def total(self) -> Tensor:
        """Counts over all pixels of all folds, ``[K, K + 1]``."""
        return torch.stack(self.confusion).sum(0)

    def recall(self) -> list[float]:
        """By class, the share of its pixels in all folds that carry its label; NaN without any."""
        confusion = self.total().double()
        shares: list[float] = (confusion.diagonal() / confusion.sum(1)).tolist()
        return shares

    def estimate(self, name: str) -> Estimate:
        """Its mean and standard error over folds."""
        return Estimate.over(self.values(name))


def _error(confusion: Tensor) -> float:
    """The share of all pixels that do not carry their true label; NaN without pixels."""
    return float(1 - confusion.diagonal().sum() / confusion.sum().double())


def _miou(confusion: Tensor) -> float:
    return float(mean_iou(confusion))


def _mean(values: Sequence[float]) -> float:
    """The mean of those that are numbers."""
    return Estimate.over(values).mean


class Panel(NamedTuple):
    """An image to show: labels are uint8 ``[H, W]``, made by a fold that did not train on it."""

    image: str
    truth: Tensor
    labels: dict[Rule, Tensor]


@dataclass(frozen=True)
class Findings:
    """All that a report says.

    Attributes:
        plan: what was tried.
        num_classes: number of classes K.
        images: images measured, each once.
        images_of_class: int64 ``[K]``, how many of them show a class.
        rules: every rule measured.
        reliability: one per fold, by method of recalibration.
        calibration: eq. 4 on all images, for its threshold map.
        panels: images to show.
        absent: classes that the images for recalibration do not show in some fold.
        used: per fold, the number of images for (recalibration and threshold setting, calibration
            and certification, testing).
        sources: names of the sources, the features' last.
        student: the source that was trained on these labelled images and scores them out of fold,
            or None where no folder records that.
        label_with: the rule recommended to label with.
        keep: for every bound on the error the certified rule that keeps most, None where there is
            none; one that erases classes is not recommended, see :meth:`loss`.
        labellings: those tried, by their words.
        num_models: number of sources that are scores of models.
    """

    plan: Plan
    num_classes: int
    images: int
    images_of_class: Tensor
    rules: dict[Rule, Measured]
    reliability: dict[str, list[Reliability]]
    calibration: Calibration
    panels: list[Panel]
    absent: tuple[int, ...]
    used: list[tuple[int, int, int]]
    label_with: Rule
    keep: dict[float, Rule | None]
    sources: tuple[str, ...] = ()
    student: int | None = None
    labellings: Mapping[str, Labelling] = field(default_factory=dict)
    num_models: int = 1

    @property
    def certified_rules(self) -> int:
        """Among how many rules with a certificate the one for a bound is chosen."""
        return len(self.reliability) * len(self.plan.backgrounds)

    @property
    def delta_of_one(self) -> Fraction:
        """The delta with which the chosen one is certified on the images by which it was chosen.

        By the union bound the chance that any of the certificates is wrong is then at most the
        plan's delta, so that it does not matter how one of them was chosen.
        """
        return check_alpha("report", self.plan.delta, name="delta") / self.certified_rules

    def loss(self, rule: Rule) -> Loss:
        """The classes that a rule loses against the raw argmax, over all pixels of the folds."""
        return loss(self.rules, rule)

    @property
    def names(self) -> list[str]:
        """Names of the classes, or "class 0" and so on."""
        return list(self.plan.names or [f"class {k}" for k in range(self.num_classes)])

    @property
    def students_own(self) -> Rule | None:
        """The labels that the student gives by itself, if one of the sources is a student."""
        return None if self.student is None else own_labels(self.sources, self.student)


def loss(rules: Mapping[Rule, Measured], rule: Rule) -> Loss:
    """The classes that a rule loses against the raw argmax, over all pixels of the folds."""
    return loss_of_classes(rules[rule].recall(), over=rules[Rule(RAW, "argmax")].recall())


def own_labels(sources: Sequence[str], model: int) -> Rule:
    """The most probable class of a model by itself."""
    if model == 0:
        return Rule(RAW, "argmax")
    return Rule(Labelling(OWN, (model,)).in_words(sources), "labels")


def tried_for_labels(
    rules: Iterable[Rule], sources: Sequence[str], student: int | None
) -> list[Rule]:
    """The rules that may be recommended to label with, from the simplest on.

    A student's own labels come first, since pseudo-labels must be better than these to be of use;
    the raw argmax of the first model else.
    """
    first = Rule(RAW, "argmax") if student is None else own_labels(sources, student)
    kinds = {"argmax": 0, "labels": 1, "eq4": 2}
    others = [rule for rule in rules if rule.kind in kinds and rule != first]
    # Of recalibrated scores the labels are those of a map fitted on more images.
    others = [rule for rule in others if rule.kind != "argmax" or rule.scores == RAW]
    return [first, *sorted(others, key=lambda rule: kinds[rule.kind])]


def label_with(
    rules: dict[Rule, Measured], sources: Sequence[str] = (), student: int | None = None
) -> Rule:
    """The rule recommended to label with: the first unless another is better beyond noise.

    A rule that erases classes is never recommended in place of the first.
    """
    first, *others = tried_for_labels(rules, sources, student)
    tried = [first, *(rule for rule in others if not loss(rules, rule).erases)]
    candidates = [
        Candidate(rule.name, *(rules[rule].pseudo_values(name) for name in ("miou_all", "error")))
        for rule in tried
    ]
    return tried[recommend(candidates)]


def certified_at(max_error: float, rules: dict[Rule, Measured]) -> Rule | None:
    """The certified rule for a bound that keeps most, if every fold could certify one.

    Rules that erase classes are taken only if all that are certified do.
    """
    tried = [rule for rule in rules if rule.kind == "certified" and rule.level == max_error]
    whole = [rule for rule in tried if not loss(rules, rule).erases]
    return _keeps_most(whole, rules) or _keeps_most(tried, rules)


def _keeps_most(tried: Sequence[Rule], rules: Mapping[Rule, Measured]) -> Rule | None:
    candidates = [
        Certified(
            rule.name,
            [proven.certified for proven in rules[rule].certificates],
            rules[rule].values("kept"),
        )
        for rule in tried
    ]
    place = choose_certified(candidates)
    return None if place is None else tried[place]
