"""The job ``cpseg calibrate``: thresholds from the labelled images of an id list."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpseg import groups
from cpseg._internal.checks import check_alpha
from cpseg.calibration.calibration import Calibration
from cpseg.calibration.calibrator import Calibrator
from cpseg.calibration.provenance import GroupImages, Provenance, SourceImages
from cpseg.core.nonconformity import nonconformity
from cpseg.files.dataset import LabelledImages, Progress, Source, announce, quiet
from cpseg.files.id_lists import Pair
from cpseg.files.masks import VOID
from cpseg.files.splits import drawn_share
from cpseg.groups.resampling import to_grid
from cpseg.jobs.recalibrate import Recalibrated, for_target, recalibrate
from cpseg.jobs.seen_images import check_unseen, cross_fitted
from cpseg.jobs.settings import CalibrationSettings, settings_of
from cpseg.jobs.shift import MOST_PROFILED, Without, profile
from cpseg.jobs.variants import fixed_partition, learned_partition
from cpseg.recalibration.recalibration import Recalibration

EVERY_PIXEL = "every pixel"  # the variant without thresholds


def calibrate(
    source: Source,
    ids: str | Path,
    settings: CalibrationSettings | None = None,
    *,
    progress: Progress = quiet,
    **keywords: Any,
) -> Calibration:
    """Calibrate on the labelled images of an id list; ranks share the images.

    The calibration records how much it keeps of at most 1,000 of its images and how sure the model
    is on them, so that ``label`` can say whether new images are like them. That takes thresholds,
    and so a second reading of the scores of these images.

    Args:
        source: the data set and the probabilities.
        ids: id list of labelled images.
        settings: how to calibrate.
        progress: wraps the loops over images.
        **keywords: fields of :class:`CalibrationSettings`, in place of ``settings``.

    Raises:
        ValueError: bad settings or files, named in the message.
        TypeError: an unknown setting.
        OSError: a file that cannot be read.
    """
    settings = settings_of("calibrate", CalibrationSettings, settings, keywords)
    if settings.alpha is not None:
        check_alpha("calibrate", settings.alpha)
    settings.grouping.check("calibrate")
    images = LabelledImages.open(source, source.read_ids(ids), progress=progress)
    check_unseen("calibrate", source, images.pairs)
    return calibrate_images(images, settings)


def calibrate_images(
    images: LabelledImages,
    settings: CalibrationSettings,
    *,
    seen: tuple[SourceImages, ...] | None = None,
) -> Calibration:
    """Calibrate on images that are open; see :func:`calibrate`.

    Args:
        images: the labelled images.
        settings: how to calibrate.
        seen: the sources that were cross-fitted on them; None to look at what their folders record.
    """
    source, progress = images.source, images.progress
    announce(progress, _reads(settings, len(images.pairs)))
    provenance = Provenance.from_json(source.facts())
    pairs, recalibrated, options = images.pairs, None, settings.recalibration
    images = for_target("calibrate", images, options)
    if options is not None:
        if settings.alpha is None:
            options = replace(options, share=0.0, folds=0)
        if options.fit_ids is not None:
            check_unseen("calibrate", source, source.read_ids(options.fit_ids))
        recalibrated = recalibrate("calibrate", options, images, seed=settings.seed)
        pairs = recalibrated.calibration_images
        provenance = replace(provenance, recalibration=recalibrated.provenance(options))
    grouping, grid = settings.grouping, settings.grouping.grid or images.size
    if settings.alpha is None:
        return _every_pixel(images, pairs, settings, recalibrated, provenance)
    if grouping.learns:
        partition, pairs, learned_on = _learn_groups(images, pairs, recalibrated, settings)
        provenance = replace(provenance, groups=learned_on)
    else:
        partition = fixed_partition(grouping.variant, grid, grouping.block)
    seen = cross_fitted(source, pairs) if seen is None else seen
    provenance = replace(provenance, sources=seen)
    coarser = grouping.fallbacks() if settings.fallback else []
    of_image = {} if recalibrated is None else recalibrated.of_image
    whole = None if recalibrated is None else recalibrated.recalibration
    largest = _one_score_more(settings, len(pairs))
    calibrator = Calibrator(
        partition,
        alpha=largest or settings.alpha,
        background=settings.background,
        num_classes=images.num_classes,
        per_class=settings.per_class,
        max_images=len(pairs),
        score=settings.score,
        ignore_index=VOID,
        unit=settings.unit,
        fallback=[fixed_partition(name, grid, grouping.block) for name in coarser],
        recalibration=None if of_image else whole,
        variant=grouping.variant,
        provenance=provenance,
    )

    def update(pair: Pair, probs: Tensor, labels: Tensor) -> None:
        own = of_image.get(pair)
        calibrator.update(probs if own is None else own(probs), labels, ids=pair.image)

    images.feed(update, pairs, "calibrate")
    calibrator.sync()
    calibration = calibrator.compute(settings.alpha)
    if of_image:  # each image had a recalibration of its own; new images go through the whole one
        calibration = replace(calibration, recalibration=whole)
    if settings.fallback:
        shares = _shares_of_levels(calibration, [grouping.variant, *coarser])
        calibration = replace(
            calibration, extra=replace(calibration.provenance, fallback_shares=shares)
        )
    if settings.score != "lac":  # selects no labels
        return calibration
    if whole is not None and whole.trees is not None and not _are_apart(recalibrated):
        return (
            calibration  # trees know the images they were fitted on: no new image looks like them
        )
    without: Without | None = None
    if largest is not None:
        next_threshold = calibrator.compute(largest).threshold.to(source.device)
        without = _leave_out(calibration, next_threshold, of_image)
    in_sample = largest is None and (grouping.variant != "image" or settings.per_class)
    looks = profile(images, pairs, calibration, in_sample=in_sample, without=without)
    return replace(calibration, extra=replace(calibration.provenance, profile=looks))


def _every_pixel(
    images: LabelledImages,
    pairs: list[Pair],
    settings: CalibrationSettings,
    recalibrated: Recalibrated | None,
    provenance: Provenance,
) -> Calibration:
    """No thresholds: every class is in every set, so that labels are the most probable classes."""
    grid = settings.grouping.grid or images.size
    names = tuple(sorted(pair.image for pair in pairs))
    calibration = Calibration(
        torch.full(grid, torch.inf),
        torch.zeros(grid, dtype=torch.int64),
        alpha=0.0,
        num_images=len(pairs),
        num_classes=images.num_classes,
        background=settings.background,
        variant=EVERY_PIXEL,
        recalibration=None if recalibrated is None else recalibrated.recalibration,
        extra=replace(provenance, images=names),
    )
    if recalibrated is not None:  # it knows these images: a new one would not look like them
        return calibration
    seen = profile(images, pairs, calibration, in_sample=True)
    return replace(calibration, extra=replace(calibration.provenance, profile=seen))


def _are_apart(recalibrated: Recalibrated | None) -> bool:
    return recalibrated is None or recalibrated.disjoint


def _reads(settings: CalibrationSettings, images: int) -> int:
    """About how many images all passes read, for one progress bar."""
    options, grouping = settings.recalibration, settings.grouping
    twice = options is not None and (options.folds > 0 or options.share == 0)
    learns = grouping.learns and grouping.group_share == 0
    again = min(images, MOST_PROFILED) if settings.score == "lac" else 0
    return images * (1 + twice + learns) + again


def _one_score_more(settings: CalibrationSettings, images: int) -> Fraction | None:
    """The alpha whose threshold is the next lower score at every cell; None but pixel-wise.

    With it the threshold that a cell has without one of its images is known.
    """
    assert settings.alpha is not None
    plain = settings.grouping.variant == "pixel" and not settings.per_class
    alpha = check_alpha("calibrate", settings.alpha) + Fraction(1, images + 1)
    if not plain or settings.fallback or settings.score != "lac" or alpha >= 1:
        return None
    return alpha


def _leave_out(
    calibration: Calibration, next_threshold: Tensor, of_image: Mapping[Pair, Recalibration]
) -> Without:
    """What gives the calibration without an image, as it is for a new one.

    A threshold is the r-th largest score of its cell; without an image that is among these r it is
    the next one. Where v of n images are void at a cell, the one known may still be the r-th; in
    about a share v / n of such cells.
    """

    def without(pair: Pair, probs: Tensor, labels: Tensor) -> Calibration:
        recalibration = of_image.get(pair, calibration.recalibration)
        if recalibration is not None:
            probs = recalibration.to(probs.device)(probs)
        own = to_grid(nonconformity(probs, labels), calibration.grid)
        threshold = calibration.threshold.to(probs.device)
        limit = torch.where(own >= threshold, next_threshold, threshold)
        return replace(calibration.to(probs.device), threshold=limit)

    return without


def _shares_of_levels(calibration: Calibration, names: list[str]) -> dict[str, float]:
    """Which share of the cells each level of a fallback gave a finite threshold."""
    finite = calibration.threshold.isfinite()
    level = torch.zeros_like(finite) if calibration.level is None else calibration.level
    cells = finite.numel()
    return {name: int((finite & (level == i)).sum()) / cells for i, name in enumerate(names)}


def _learn_groups(
    images: LabelledImages,
    pairs: list[Pair],
    recalibrated: Recalibrated | None,
    settings: CalibrationSettings,
) -> tuple[Tensor, list[Pair], GroupImages]:
    """The partition, the images left for calibration, and the record of those learned on.

    Every rank reads all images for learning, so that all ranks learn the same groups.
    """
    grouping, grid = settings.grouping, settings.grouping.grid or images.size
    generator = torch.Generator().manual_seed(settings.seed)
    share = grouping.group_share
    learning, left = drawn_share("calibrate", "--group-share", pairs, share, generator)
    scores: list[Tensor] = []

    def update(pair: Pair, probs: Tensor, labels: Tensor) -> None:
        if recalibrated is not None:
            probs = recalibrated.map_of(pair)(probs)
        scores.append(to_grid(nonconformity(probs, labels, score=settings.score), grid))

    images.feed(update, learning, "learn groups", every_rank=True)
    curves = groups.curves(torch.stack(scores))
    partition = learned_partition(grouping.variant, curves, grouping.num_groups, generator)
    names = tuple(sorted(pair.image for pair in learning))
    return partition, left, GroupImages(names, len(learning), share > 0)


def images_needed(alpha: float | str) -> int:
    """The fewest scores at a cell that give a finite threshold; 19 at 0.05."""
    return math.ceil(1 / check_alpha("images_needed", alpha)) - 1
