"""The job ``cpseg calibrate``: thresholds from the labelled images of an id list."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpseg import groups
from cpseg._internal.checks import check_alpha
from cpseg.calibration.calibration import Calibration
from cpseg.calibration.calibrator import Calibrator
from cpseg.calibration.provenance import GroupImages, Provenance
from cpseg.core.nonconformity import nonconformity
from cpseg.files.dataset import LabelledImages, Progress, Source, announce, quiet
from cpseg.files.id_lists import Pair, read_ids
from cpseg.files.masks import VOID
from cpseg.files.splits import drawn_share
from cpseg.groups.resampling import to_grid
from cpseg.jobs.recalibrate import Recalibrated, recalibrate
from cpseg.jobs.settings import CalibrationSettings, settings_of
from cpseg.jobs.variants import fixed_partition, learned_partition


def calibrate(
    source: Source,
    ids: str | Path,
    settings: CalibrationSettings | None = None,
    *,
    progress: Progress = quiet,
    **keywords: Any,
) -> Calibration:
    """Calibrate on the labelled images of an id list; ranks share the images.

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
    check_alpha("calibrate", settings.alpha)
    settings.grouping.check("calibrate")
    images = LabelledImages.open(source, read_ids(ids), progress=progress)
    announce(progress, _reads(settings, len(images.pairs)))
    provenance = Provenance.from_json(source.facts())
    pairs, recalibrated, options = images.pairs, None, settings.recalibration
    if options is not None:
        images = replace(images, num_classes=options.num_classes or images.num_source)
        recalibrated = recalibrate("calibrate", options, images, seed=settings.seed)
        pairs = recalibrated.calibration_images
        provenance = replace(provenance, recalibration=recalibrated.provenance(options))
    grouping, grid = settings.grouping, settings.grouping.grid or images.size
    if grouping.learns:
        partition, pairs, learned_on = _learn_groups(images, pairs, recalibrated, settings)
        provenance = replace(provenance, groups=learned_on)
    else:
        partition = fixed_partition(grouping.variant, grid, grouping.block)
    coarser = grouping.fallbacks() if settings.fallback else []
    of_image = {} if recalibrated is None else recalibrated.of_image
    whole = None if recalibrated is None else recalibrated.recalibration
    calibrator = Calibrator(
        partition,
        alpha=settings.alpha,
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
    calibration = calibrator.compute()
    if of_image:  # each image had a recalibration of its own; new images go through the whole one
        calibration = replace(calibration, recalibration=whole)
    if settings.fallback:
        shares = _shares_of_levels(calibration, [grouping.variant, *coarser])
        calibration = replace(
            calibration, extra=replace(calibration.provenance, fallback_shares=shares)
        )
    return calibration


def _reads(settings: CalibrationSettings, images: int) -> int:
    """About how many images all passes read, for one progress bar."""
    options, grouping = settings.recalibration, settings.grouping
    twice = options is not None and (options.folds > 0 or options.share == 0)
    return images * (1 + twice) + images * (grouping.learns and grouping.group_share == 0)


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
