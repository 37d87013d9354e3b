"""Refitting class scores to a data set, as the first step of the offline jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cpseg._internal.checks import message, name_file_in_errors
from cpseg._internal.distributed import shard
from cpseg.files.dataset import VOID, Progress, Source, read_example
from cpseg.files.id_lists import Pair
from cpseg.files.splits import split
from cpseg.recalibration.recalibration import Recalibration
from cpseg.recalibration.recalibrator import Recalibrator


@dataclass(frozen=True)
class RecalibrationOptions:
    """How class scores are refitted, and on which images.

    Attributes:
        method: see :class:`Recalibrator`.
        share: share of the images, drawn with the seed, that fits the map and does not calibrate;
            0 fits it on the calibration images themselves, and nothing is promised.
        folds: with 2 or more all images calibrate, each scored by a map that the other folds
            fitted, and the map of all images is kept: an approximation, without a promise.
        context: ``"auto"``, or parts of the context.
        scores: ``"softmax"`` or ``"sigmoid"``, what the model's scores are.
        prior_power: tau in [0, 1], see :meth:`Recalibration.with_prior_power`.
        num_classes: classes of the data set, where the model has others.
    """

    method: str = "dirichlet"
    share: float = 0.3
    folds: int = 0
    context: str | Sequence[str] = "auto"
    scores: str = "softmax"
    prior_power: float = 0.0
    num_classes: int | None = None

    def recalibrator(self, num_classes: int, seed: int) -> Recalibrator:
        """A fresh one; the methods without parameters a class take no context."""
        plain = self.method in ("none", "temperature")
        return Recalibrator(
            num_classes,
            method=self.method,
            scores=self.scores,
            context=() if plain and self.context == "auto" else self.context,
            seed=seed,
            ignore_index=VOID,
        )


@dataclass(frozen=True)
class RecalibratedScores:
    """Maps for the images that calibrate, and the one to keep.

    Attributes:
        recalibration: what new images go through.
        calibrating: the images that calibrate.
        fitted_on: the images that fitted it.
        own: map of a calibrating image, where that is another.
    """

    recalibration: Recalibration
    calibrating: list[Pair]
    fitted_on: list[Pair]
    own: Mapping[Pair, Recalibration]

    @property
    def apart(self) -> bool:
        """Whether no image that fitted calibrates."""
        return not set(self.calibrating) & set(self.fitted_on)

    def map_of(self, pair: Pair) -> Recalibration:
        """The map whose scores of an image calibrate."""
        return self.own.get(pair, self.recalibration)


def recalibrate_scores(
    where: str,
    refit: RecalibrationOptions,
    source: Source,
    pairs: list[Pair],
    paths: Mapping[Pair, Path],
    num_source: int,
    *,
    seed: int,
    progress: Progress,
) -> RecalibratedScores:
    """Fit the map on a share of the images, or by folds on all of them; every rank gets it.

    Raises:
        ValueError: a share or folds that leave a part empty, and what the fit refuses.
    """
    num_classes = num_source if refit.num_classes is None else refit.num_classes
    generator = torch.Generator().manual_seed(seed)
    fold_of: dict[Pair, int] = {}
    fitting = calibrating = pairs
    if refit.folds == 0:
        fitting, calibrating = split(
            where, pairs, refit.share, generator, option="--recalibrate-share"
        )
    elif not 2 <= refit.folds <= len(pairs):
        expected = f"2 to {len(pairs)} --recalibrate-folds for {len(pairs)} images"
        raise ValueError(message(where, expected, f"{refit.folds}", "choose another number"))
    else:
        order = torch.randperm(len(pairs), generator=generator).tolist()
        fold_of = {pairs[place]: number % refit.folds for number, place in enumerate(order)}
    whole = refit.recalibrator(num_classes, seed)
    parts = [refit.recalibrator(num_classes, seed) for _ in range(refit.folds)]
    for pair in progress(*shard(fitting), "refit scores"):
        probs, labels = read_example(source, pair, paths[pair], num_classes, num_source)
        with name_file_in_errors(paths[pair]):
            whole.update(probs, labels, ids=pair.image)
            for number, part in enumerate(parts):
                if fold_of[pair] != number:
                    part.update(probs, labels, ids=pair.image)

    def fit(recalibrator: Recalibrator) -> Recalibration:
        recalibrator.sync()
        return recalibrator.fit().with_prior_power(refit.prior_power).to(source.device)

    made = [fit(part) for part in parts]
    own = {pair: made[number] for pair, number in fold_of.items()}
    return RecalibratedScores(fit(whole), calibrating, fitting, own)


def unchanged(pair: Pair) -> Callable[[torch.Tensor], torch.Tensor]:
    """The map of an image whose scores are not refitted."""
    return lambda probs: probs
