"""The offline jobs over folders besides labelling: calibrate, evaluate, compact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cpseg import groups
from cpseg._internal.checks import (
    check_alpha,
    message,
    name_file_in_errors,
)
from cpseg._internal.distributed import (
    shard,
)
from cpseg.calibration.calibration import Calibration
from cpseg.calibration.calibrator import Calibrator
from cpseg.core.nonconformity import nonconformity
from cpseg.core.quantiles import conformal_rank
from cpseg.files.dataset import (
    VOID,
    Progress,
    Source,
    quiet,
    read_example,
)
from cpseg.files.id_lists import Pair, read_ids
from cpseg.files.splits import (
    split,
)
from cpseg.groups.resampling import to_grid
from cpseg.jobs.recalibrate import RecalibrationOptions, recalibrate_scores, unchanged
from cpseg.jobs.variants import (
    LEARNED,
    VARIANTS,
    fixed_partition,
    learned_partition,
)


def calibrate(
    source: Source,
    ids: str | Path,
    *,
    alpha: float | str,
    background: int | None,
    variant: str = "pixel",
    block: int = 32,
    num_groups: int = 8,
    group_share: float = 0.0,
    seed: int = 0,
    grid: tuple[int, int] | None = None,
    per_class: bool = False,
    score: str = "lac",
    unit: str = "pixel",
    fallback: bool = False,
    refit: RecalibrationOptions | None = None,
    progress: Progress = quiet,
) -> Calibration:
    """Calibrate on the labelled images of an id list, sharing them out over the ranks.

    Args:
        source: the data set and the scores.
        ids: id list of labelled images.
        alpha: miscoverage rate.
        background: index of the dominant class to suppress, or None.
        variant: ``"pixel"``, ``"image"``, ``"blocks"``, ``"kmeans"`` or ``"annuli"``.
        block: side of a block in cells.
        num_groups: number of learned groups.
        group_share: share of the images, drawn with ``seed``, on which groups are learned and
            which then do not calibrate; 0 learns them on the calibration images themselves.
        seed: of that draw and of the learning.
        grid: height and width of the grid; by default the size of the first listed image.
        per_class: thresholds for every class apart.
        score: the nonconformity score; pseudo-labels need ``"lac"``.
        unit: what is exchangeable in a pooled group, ``"pixel"`` or ``"image"``.
        fallback: cells whose threshold is infinite take that of their block, and where that one
            is too that of the image.
        refit: how the scores are refitted first, or None.
        progress: wraps the loop over images.

    Raises:
        ValueError: bad settings or files, named in the message.
        OSError: a file that cannot be read.
    """
    check_alpha("calibrate", alpha)
    pairs = read_ids(ids)
    paths = source.locate(pairs)
    first = source.probabilities(paths[pairs[0]])
    num_source = num_classes = first.shape[0]
    if grid is None:
        grid = (first.shape[-2], first.shape[-1])
    if variant not in VARIANTS:
        names = ", ".join(VARIANTS)
        raise ValueError(message("calibrate", f"a variant among {names}", variant, "choose one"))
    if group_share > 0 and variant not in LEARNED:
        expected, fix = "a variant that learns groups for --group-share", "leave it out"
        raise ValueError(message("calibrate", expected, variant, fix))
    extra = source.facts()
    map_of: Callable[[Pair], Callable[[Tensor], Tensor]] = unchanged
    recalibration = None
    if refit is not None:
        refitted = recalibrate_scores(
            "calibrate", refit, source, pairs, paths, num_source, seed=seed, progress=progress
        )
        recalibration, pairs, map_of = (
            refitted.recalibration,
            refitted.calibrating,
            refitted.map_of,
        )
        num_classes = recalibration.num_classes
        extra["refitted"] = {
            "apart": refitted.apart,
            "folds": refit.folds,
            "images": sorted(pair.image for pair in refitted.fitted_on),
        }
    if variant in LEARNED:
        generator = torch.Generator().manual_seed(seed)
        learning, pairs = split("calibrate", pairs, group_share, generator)
        extra["groups"] = {
            "learned_on": len(learning),
            "apart": group_share > 0,
            "images": sorted(pair.image for pair in learning),
        }
        images = [(pair, paths[pair]) for pair in learning]
        curves = _curves(source, images, num_classes, map_of, grid, score, progress)
        partition = learned_partition(variant, curves, num_groups, generator)
    else:
        partition = fixed_partition(variant, grid, block)
    coarser = ["blocks", "image"] if fallback else []
    if variant in coarser:
        coarser = coarser[coarser.index(variant) + 1 :]
    calibrator = Calibrator(
        partition,
        alpha=alpha,
        background=background,
        num_classes=num_classes,
        per_class=per_class,
        max_images=len(pairs),
        score=score,
        ignore_index=VOID,
        unit=unit,
        fallback=[fixed_partition(name, grid, block) for name in coarser],
    )
    for pair in progress(*shard(pairs), "calibrate"):
        probs, labels = read_example(source, pair, paths[pair], num_classes, num_source)
        with name_file_in_errors(paths[pair]):
            calibrator.update(map_of(pair)(probs), labels, ids=pair.image)
    calibrator.sync()
    calibration = calibrator.compute()
    extra.update(calibration.extra)
    calibration = replace(calibration, variant=variant, extra=extra, recalibration=recalibration)
    if fallback:
        extra["fallback"] = _level_shares(calibration, [variant, *coarser])
    return calibration


def _level_shares(calibration: Calibration, names: list[str]) -> dict[str, float]:
    """Which share of the finite thresholds each level of a fallback gave."""
    finite = calibration.threshold.isfinite()
    level = torch.zeros_like(finite) if calibration.level is None else calibration.level
    cells = finite.numel()
    return {name: int((finite & (level == i)).sum()) / cells for i, name in enumerate(names)}


def _curves(
    source: Source,
    images: list[tuple[Pair, Path]],
    num_classes: int,
    map_of: Callable[[Pair], Callable[[Tensor], Tensor]],
    grid: tuple[int, int],
    score: str,
    progress: Progress,
) -> Tensor:
    """Nonconformity curves; every rank reads all of these images, so that all learn the same."""
    where = dict(images)
    scores = []
    for pair in progress(list(where), len(where), "learn groups"):
        probs = source.probabilities(where[pair])
        labels = source.labels(pair, num_classes, (probs.shape[1], probs.shape[2]))
        with name_file_in_errors(where[pair]):
            found = nonconformity(map_of(pair)(probs), labels, score=score)
        scores.append(to_grid(found, grid))
    return groups.curves(torch.stack(scores))


def images_needed(alpha: float | str) -> int:
    """The fewest scores at a cell that give a finite threshold; 19 at 0.05."""
    n = int(1 / check_alpha("images_needed", alpha)) - 2
    while conformal_rank(max(n, 0), alpha) > max(n, 0):
        n += 1
    return max(n, 0)
