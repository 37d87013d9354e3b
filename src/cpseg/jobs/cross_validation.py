"""The one engine of cross-validation, for the sweep and the report.

In every fold some images are for testing. The others fit recalibrations, learn groups and set
thresholds, so that nothing is measured on images that it was made from. An image is read, mapped
and scored once for all rules of a fold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from cpseg import groups
from cpseg._internal import distributed as ranks
from cpseg.calibration.calibrator import Calibrator
from cpseg.core.feature_projection import FeatureProjection
from cpseg.core.metrics import confusion_matrix
from cpseg.core.nested_rules import confusion_per_alpha, coverage_counts
from cpseg.core.nonconformity import nonconformity
from cpseg.core.selection import Evidence, evidence
from cpseg.files.dataset import LabelledImages
from cpseg.files.id_lists import Pair
from cpseg.files.masks import VOID
from cpseg.groups.resampling import to_grid, to_image
from cpseg.jobs.labellings import Labelling, LabellingFit
from cpseg.jobs.recalibrate import RecalibrationOptions
from cpseg.jobs.variants import LEARNED, fixed_partition, learned_partition
from cpseg.recalibration.recalibrator import Recalibrator

Map = Callable[[Tensor], Tensor]


class Scoring(NamedTuple):
    """Which probabilities a rule uses: the method of recalibration and its prior power."""

    recalibrate: str
    prior_power: float


PLAIN = Scoring("none", 0.0)  # the model's probabilities as they are


class Fold(NamedTuple):
    """What the images of a fold are used for.

    Images for recalibration are used for calibration too with the model's own probabilities, and
    images for learning groups with the variants that learn nothing.
    """

    learning: list[Pair]
    recalibrating: list[Pair]
    calibrating: list[Pair]
    testing: list[Pair]


@dataclass(frozen=True)
class Trial:
    """What is compared in every fold.

    Attributes:
        scorings: which probabilities.
        variants: how cells share thresholds.
        backgrounds: classes to suppress, each by itself; None for no suppression.
        alphas: miscoverage rates, the largest (strictest) first.
        num_classes: number of classes K.
        size: height and width of the grid.
        block: side of a block in cells.
        num_groups: number of learned groups.
        context: of the recalibrations with parameters per class.
        scores: ``"softmax"`` or ``"sigmoid"``.
        seed: of learned groups and of the pixels that recalibrations sample.
        classes: number of classes of every model. With several sources a scoring is a map over
            all, and :data:`PLAIN` the first model's probabilities.
        projection: of an encoder's features, or None.
        colour: whether the images themselves are a source.
        labellings: ways to label every pixel, measured beside the rules.
    """

    scorings: Sequence[Scoring]
    variants: Sequence[str]
    backgrounds: Sequence[int | None]
    alphas: Sequence[Fraction]
    num_classes: int
    size: tuple[int, int]
    block: int
    num_groups: int
    context: str | Sequence[str]
    scores: str
    seed: int
    classes: tuple[int, ...] = ()
    projection: FeatureProjection | None = None
    colour: bool = False
    labellings: Sequence[Labelling] = ()

    @property
    def learned_variants(self) -> list[str]:
        """The variants whose groups are learned in every fold."""
        return [variant for variant in self.variants if variant in LEARNED]

    def recalibrators(self) -> dict[str, Recalibrator]:
        """New ones, one per method, whatever the prior powers."""
        made = {}
        for method in dict.fromkeys(each.recalibrate for each in self.scorings if each != PLAIN):
            context = self.context if method not in ("none", "temperature") else ()
            options = RecalibrationOptions(method, context=context, scores=self.scores)
            made[method] = options.recalibrator(
                self.num_classes,
                self.seed,
                sources=self.classes or None,
                features=self.projection,
                colour=self.colour,
            )
        return made

    def first(self, probs: Tensor) -> Tensor:
        """The first model's probabilities."""
        return probs[: self.classes[0]] if self.classes else probs

    def labelling_fit(self) -> LabellingFit:
        """A new fit of the labellings' maps."""
        return LabellingFit(
            self.labellings,
            num_classes=self.num_classes,
            classes=self.classes,
            projection=self.projection,
            colour=self.colour,
            options=RecalibrationOptions(context=self.context, scores=self.scores),
            seed=self.seed,
        )


class FoldRules(NamedTuple):
    """The rules that a fold's images make: everything that testing needs.

    Attributes:
        maps: from the model's probabilities to those of a scoring; :data:`PLAIN` is among them
            even where no rule uses it.
        thresholds: ``[A, H, W]`` per scoring and variant, growing along the alphas.
        labellings: from the channels of all sources to the probabilities of a labelling.
    """

    maps: dict[Scoring, Map]
    thresholds: dict[Scoring, dict[str, Tensor]]
    labellings: dict[Labelling, Map] = {}  # noqa: RUF012 - never changed


class FoldFit:
    """Makes a fold's rules: :meth:`recalibrate` first, then :meth:`calibrate`.

    Args:
        images: all labelled images.
        fold: what they are used for.
        trial: the rules to compare.
        title: the fold's name, for progress bars and errors.
    """

    def __init__(self, images: LabelledImages, fold: Fold, trial: Trial, title: str) -> None:
        self._images = images
        self._fold = fold
        self._trial = trial
        self._title = title
        self.maps: dict[Scoring, Map] = {PLAIN: trial.first}
        self._labellings = trial.labelling_fit() if trial.labellings else None
        self.absent: set[int] = set()  # classes that the images for recalibration do not show
        self._calibrators = {
            scoring: {
                variant: self._calibrator(fixed_partition(variant, trial.size, trial.block))
                for variant in trial.variants
                if variant not in LEARNED
            }
            for scoring in trial.scorings
        }
        # Scores on the grid with the model's own probabilities, kept until the groups are learned.
        self._waiting: list[Tensor] = []

    def recalibrate(self) -> dict[Scoring, Map]:
        """Fit every recalibration, once per method, from one read of the images for it.

        Raises:
            ValueError: images that do not suffice for a fit; the message names the fold.
        """
        recalibrators = self._trial.recalibrators()
        calibrators = self._calibrators.get(PLAIN)

        def update(pair: Pair, probs: Tensor, labels: Tensor) -> None:
            for recalibrator in recalibrators.values():
                recalibrator.update(probs, labels)
            if self._labellings is not None:
                self._labellings.update(probs, labels)
            if calibrators is not None:
                scores = self._on_grid(self._trial.first(probs), labels)
                for calibrator in calibrators.values():
                    calibrator.update_scores(scores)
                if self._trial.learned_variants:
                    self._waiting.append(scores)

        self._images.feed(update, self._fold.recalibrating, f"{self._title}, recalibrate")
        fitted = {}
        try:
            for method, recalibrator in recalibrators.items():
                recalibrator.sync()
                fitted[method] = recalibrator.fit().to(self._images.source.device)
        except ValueError as error:
            raise ValueError(f"{self._title}: {error}") from error
        self.absent = {k for recalibration in fitted.values() for k in recalibration.absent}
        for scoring in self._trial.scorings:
            if scoring != PLAIN:
                recalibration = fitted[scoring.recalibrate]
                self.maps[scoring] = recalibration.with_prior_power(scoring.prior_power)
        return self.maps

    def calibrate(
        self, also: Callable[[Pair, Scoring, Tensor, Tensor], None] | None = None
    ) -> FoldRules:
        """Learn the groups, then set every threshold.

        Args:
            also: takes every calibration image with its probabilities under each scoring, and
                its labels.
        """
        trial = self._trial
        self._learn_groups()

        def update(pair: Pair, probs: Tensor, labels: Tensor) -> None:
            for scoring, calibrators in self._calibrators.items():
                mapped = self.maps[scoring](probs)
                scores = self._on_grid(mapped, labels)
                for calibrator in calibrators.values():
                    calibrator.update_scores(scores)
                if also is not None:
                    also(pair, scoring, mapped, labels)
            if self._labellings is not None:
                self._labellings.update(probs, labels)

        self._images.feed(update, self._fold.calibrating, f"{self._title}, calibrate")
        thresholds: dict[Scoring, dict[str, Tensor]] = {scoring: {} for scoring in self.maps}
        for scoring, variant in itertools.product(self._calibrators, trial.variants):
            calibrator = self._calibrators[scoring][variant]
            calibrator.sync()
            per_alpha = [calibrator.compute(alpha).threshold for alpha in trial.alphas]
            thresholds[scoring][variant] = torch.stack(per_alpha)
        return FoldRules(self.maps, thresholds, self._fit_labellings())

    def _fit_labellings(self) -> dict[Labelling, Map]:
        if self._labellings is None:
            return {}
        try:
            return self._labellings.fit(self._images.source.device)
        except ValueError as error:
            raise ValueError(f"{self._title}: {error}") from error

    def _learn_groups(self) -> None:
        """Learn groups for every scoring; every rank reads these images and learns the same."""
        trial, learning = self._trial, self._fold.learning
        if not trial.learned_variants:
            return
        mine = set(ranks.shard(learning)[0])
        scores_of: dict[Scoring, list[Tensor]] = {scoring: [] for scoring in self._calibrators}

        def update(pair: Pair, probs: Tensor, labels: Tensor) -> None:
            for scoring, calibrators in self._calibrators.items():
                scores = self._on_grid(self.maps[scoring](probs), labels)
                scores_of[scoring].append(scores)
                for calibrator in calibrators.values() if pair in mine else ():
                    calibrator.update_scores(scores)

        self._images.feed(update, learning, f"{self._title}, learn groups", every_rank=True)
        for scoring, calibrators in self._calibrators.items():
            curves = groups.curves(torch.stack(scores_of.pop(scoring)))
            for variant in trial.learned_variants:
                generator = torch.Generator().manual_seed(trial.seed)
                partition = learned_partition(variant, curves, trial.num_groups, generator)
                calibrators[variant] = self._calibrator(partition)
                for scores in self._waiting if scoring == PLAIN else ():
                    calibrators[variant].update_scores(scores)

    def _on_grid(self, probs: Tensor, labels: Tensor) -> Tensor:
        return to_grid(nonconformity(probs, labels), self._trial.size)

    def _calibrator(self, partition: Tensor) -> Calibrator:
        fold, trial = self._fold, self._trial
        return Calibrator(
            partition,
            alpha=trial.alphas[0],
            num_classes=trial.num_classes,
            max_images=len(fold.learning) + len(fold.recalibrating) + len(fold.calibrating),
            ignore_index=VOID,
        )


class Tested(NamedTuple):
    """A test image under one scoring, for what counts more than the engine does.

    Attributes:
        pair: the image.
        truth: true labels, int64 ``[H, W]``.
        scoring: which probabilities.
        probs: the probabilities ``[K, H, W]``.
        evidence: theirs, by background.
        thresholds: ``[A, H, W]`` at the image's size, by variant.
        labellings: labels ``[H, W]`` of every labelling, the same for every scoring.
    """

    pair: Pair
    truth: Tensor
    scoring: Scoring
    probs: Tensor
    evidence: dict[int | None, Evidence]
    thresholds: dict[str, Tensor]
    labellings: dict[Labelling, Tensor]


@dataclass(frozen=True)
class Counts:
    """Pixels counted on the test images of a fold, summed over ranks.

    Attributes:
        argmax: confusion matrix of the argmax by scoring, int64 ``[K, K + 1]``.
        eq4: those of eq. 4 by scoring, int64 ``[V, B, A, K, K + 1]``.
        covered: pixels whose class is in the set, by scoring, int64 ``[V, A]``.
        infinite: share of thresholds that are +inf, by scoring, float64 ``[V, A]``.
        labellings: confusion matrix of every labelling, int64 ``[K, K + 1]``.
    """

    argmax: dict[Scoring, Tensor]
    eq4: dict[Scoring, Tensor]
    covered: dict[Scoring, Tensor]
    infinite: dict[Scoring, Tensor]
    labellings: dict[Labelling, Tensor] = field(default_factory=dict)


def measure_fold(
    images: LabelledImages,
    fold: Fold,
    trial: Trial,
    rules: FoldRules,
    title: str,
    also: Callable[[Tested], None] | None = None,
) -> Counts:
    """Count every rule on a fold's test images, from one read of them."""
    classes, device = trial.num_classes, images.source.device
    shape = (len(trial.variants), len(trial.backgrounds), len(trial.alphas))

    def zeros(*sizes: int) -> dict[Scoring, Tensor]:
        return {s: torch.zeros(sizes, dtype=torch.int64, device=device) for s in rules.maps}

    argmax, eq4 = zeros(classes, classes + 1), zeros(*shape, classes, classes + 1)
    by_labelling = {
        labelling: torch.zeros(classes, classes + 1, dtype=torch.int64, device=device)
        for labelling in rules.labellings
    }
    covered = zeros(shape[0], shape[2])

    def update(pair: Pair, probs: Tensor, labels: Tensor) -> None:
        truth = labels.to(torch.int64)
        labelled = {
            labelling: evidence(apply(probs), background=None).argmax()
            for labelling, apply in rules.labellings.items()
        }
        for labelling, label in labelled.items():
            by_labelling[labelling] += confusion_matrix(
                label, truth, num_classes=classes, ignore_index=VOID, with_ignored=True
            )
        void = truth == VOID
        index = truth.masked_fill(void, 0)[None]
        for scoring, recalibrate in rules.maps.items():
            mapped = recalibrate(probs)
            p_true = mapped.gather(0, index)[0].masked_fill(void, torch.nan)
            by_background = {b: evidence(mapped, background=b) for b in trial.backgrounds}
            label = next(iter(by_background.values())).argmax()
            argmax[scoring] += confusion_matrix(
                label, truth, num_classes=classes, ignore_index=VOID, with_ignored=True
            )
            here = {
                variant: to_image(thresholds, (truth.shape[0], truth.shape[1]))
                for variant, thresholds in rules.thresholds[scoring].items()
            }
            for v, thresholds in enumerate(here.values()):
                covered[scoring][v] += coverage_counts(p_true, thresholds)
                for b, each in enumerate(by_background.values()):
                    eq4[scoring][v, b] += confusion_per_alpha(
                        each, truth, thresholds, ignore_index=VOID
                    )
            if also is not None:
                also(Tested(pair, truth, scoring, mapped, by_background, here, labelled))

    images.feed(update, fold.testing, f"{title}, measure")
    if ranks.active():
        for counts in (argmax, eq4, covered):
            counts |= {s: ranks.all_reduce_sum(count, None) for s, count in counts.items()}
        for labelling, count in by_labelling.items():
            by_labelling[labelling] = ranks.all_reduce_sum(count, None)
    infinite = {
        scoring: torch.stack([t.isposinf().double().mean((1, 2)) for t in by_variant.values()])
        for scoring, by_variant in rules.thresholds.items()
        if by_variant
    }
    return Counts(argmax, eq4, covered, infinite, by_labelling)
