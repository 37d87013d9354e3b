"""Recalibrating a model's probabilities to a data set, as the first step of the offline jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from cpseg._internal.checks import message
from cpseg.calibration.provenance import RecalibrationImages
from cpseg.core.feature_projection import FeatureProjection
from cpseg.files.dataset import LabelledImages, check_distinct
from cpseg.files.id_lists import Pair
from cpseg.files.masks import VOID
from cpseg.files.splits import drawn_order, drawn_share
from cpseg.recalibration.recalibration import Recalibration
from cpseg.recalibration.recalibrator import Recalibrator

PLAIN = ("none", "temperature")  # methods that use the scores of a pixel and nothing else


@dataclass(frozen=True)
class RecalibrationOptions:
    """How probabilities are recalibrated, and on which images.

    Attributes:
        method: see :class:`cpseg.Recalibrator`.
        share: share of the images, drawn with the seed, on which the recalibration is fitted and
            which are then not used for calibration; 0 fits it on the calibration images
            themselves, and then nothing is promised.
        folds: with 2 or more, all images are used for calibration, each recalibrated by a fit on
            the other folds, and the fit on all images is kept: an approximation without a promise.
        context: ``"auto"``, or parts of the context.
        scores: ``"softmax"`` or ``"sigmoid"``, the kind of the model's probabilities.
        prior_power: tau in [0, 1], see :meth:`cpseg.Recalibration.with_prior_power`.
        num_classes: number of classes of the data set, where the model has others.
        fit_ids: id list of images on which it is fitted instead; all images of the other
            list are then used for calibration.
    """

    method: str = "dirichlet"
    share: float = 0.3
    folds: int = 0
    context: str | Sequence[str] = "auto"
    scores: str = "softmax"
    prior_power: float = 0.0
    num_classes: int | None = None
    fit_ids: str | Path | None = None

    def recalibrator(
        self,
        num_classes: int,
        seed: int,
        *,
        sources: Sequence[int] | None = None,
        features: FeatureProjection | None = None,
        colour: bool = False,
    ) -> Recalibrator:
        """A new one; methods without parameters per class take scores alone."""
        plain = self.method in PLAIN
        return Recalibrator(
            num_classes,
            method=self.method,
            scores=self.scores,
            context=() if plain and self.context == "auto" else self.context,
            seed=seed,
            ignore_index=VOID,
            sources=sources,
            features=None if plain else features,
            colour=colour and not plain,
        )


@dataclass(frozen=True)
class Recalibrated:
    """A fitted recalibration and the images that are left for calibration.

    Attributes:
        recalibration: the one that new images go through.
        calibration_images: images used for calibration.
        fitting_images: images on which the recalibration was fitted.
        of_image: by folds, the recalibration of each calibration image.
    """

    recalibration: Recalibration
    calibration_images: list[Pair]
    fitting_images: list[Pair]
    of_image: Mapping[Pair, Recalibration] = field(default_factory=dict)

    @property
    def disjoint(self) -> bool:
        """Whether no image is used both for fitting and for calibration."""
        return not set(self.calibration_images) & set(self.fitting_images)

    def map_of(self, pair: Pair) -> Recalibration:
        """The recalibration that a calibration image goes through."""
        return self.of_image.get(pair, self.recalibration)

    def provenance(self, options: RecalibrationOptions) -> RecalibrationImages:
        """What the calibration's file records."""
        names = tuple(sorted(pair.image for pair in self.fitting_images))
        return RecalibrationImages(names, options.folds, self.disjoint)


def for_target(
    where: str, images: LabelledImages, options: RecalibrationOptions | None
) -> LabelledImages:
    """The images with the number of classes that a recalibration maps onto.

    Raises:
        ValueError: several sources without a recalibration, or models with different classes and
            no word on those of the data set.
    """
    if options is None:
        if not images.source.is_single:
            got = "--recalibrate none"
            fix = "pass --recalibrate dirichlet: one map over all of them"
            raise ValueError(message(where, "a recalibration of several sources", got, fix))
        return images
    more = images.source.features is not None or images.source.colour
    if more and options.method in PLAIN:
        got = "features" if images.source.features is not None else "colours"
        expected = f"scores alone for a recalibration by {options.method}"
        raise ValueError(message(where, expected, got, "pass --recalibrate dirichlet or trees"))
    if options.num_classes is None and len(set(images.sources)) > 1:
        expected = "the number of classes of the data set, since the models' differ"
        got = " and ".join(map(str, images.sources))
        raise ValueError(message(where, expected, got, "pass --num-classes"))
    return replace(images, num_classes=options.num_classes or images.num_classes)


def recalibrate(
    where: str, options: RecalibrationOptions, images: LabelledImages, *, seed: int
) -> Recalibrated:
    """Fit on a share of the images, or by folds on all of them; every rank gets the result.

    ``images.num_classes`` is the number of classes of the result.

    Raises:
        ValueError: a share or folds that leave a part empty, an image in both lists, or images
            that do not suffice to fit.
    """
    generator = torch.Generator().manual_seed(seed)
    fitting = calibrating = images.pairs
    fold_of: dict[Pair, int] = {}
    if options.fit_ids is not None:
        fitting = images.source.read_ids(options.fit_ids)
        both = sorted({pair.image for pair in fitting} & {pair.image for pair in images.pairs})
        if both:
            fix = "calibrate on images of their own"
            raise ValueError(message(where, "images in one list", f"{both[0]} in both", fix))
        check_distinct(images.source.root, [*fitting, *images.pairs])
        images = replace(images, paths=images.source.locate([*fitting, *images.pairs]))
    elif options.folds == 0:
        option = "--recalibrate-share"
        fitting, calibrating = drawn_share(where, option, images.pairs, options.share, generator)
    else:
        option = "--recalibrate-folds"
        count = len(images.pairs)
        order = drawn_order(where, count, options.folds, generator, option=option)
        fold_of = {images.pairs[i]: number % options.folds for number, i in enumerate(order)}

    def new() -> Recalibrator:
        return options.recalibrator(
            images.num_classes,
            seed,
            sources=images.sources,
            features=images.source.projection,
            colour=images.source.colour,
        )

    whole = new()
    of_fold = [new() for _ in range(options.folds)]

    def update(pair: Pair, probs: Tensor, labels: Tensor) -> None:
        whole.update(probs, labels, ids=pair.image)
        for number, recalibrator in enumerate(of_fold):
            if fold_of[pair] != number:
                recalibrator.update(probs, labels, ids=pair.image)

    def fit(recalibrator: Recalibrator) -> Recalibration:
        recalibrator.sync()
        recalibration = recalibrator.fit().with_prior_power(options.prior_power)
        return recalibration.to(images.source.device)

    images.feed(update, fitting, "recalibrate")
    fitted = [fit(recalibrator) for recalibrator in of_fold]
    of_image = {pair: fitted[number] for pair, number in fold_of.items()}
    return Recalibrated(fit(whole), calibrating, fitting, of_image)
