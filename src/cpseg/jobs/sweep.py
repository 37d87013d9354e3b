"""The job ``cpseg sweep``: rules compared by cross-validation over labelled images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpseg._internal.checks import check_background, message
from cpseg._internal.distributed import rank
from cpseg._internal.safe_files import write_text
from cpseg.files.dataset import LabelledImages, Progress, Source, announce, as_json, quiet
from cpseg.files.run_folder import RunFolder, open_run_folder
from cpseg.jobs.cross_validation import PLAIN, Counts, Fold, FoldFit, measure_fold
from cpseg.jobs.estimate import Estimate
from cpseg.jobs.seen_images import check_unseen
from cpseg.jobs.settings import SweepSettings, settings_of
from cpseg.jobs.sweep_plan import (
    SweepPlan,
    check,
    deal,
    fold_file,
    read_fold,
    recalibrates,
    write_fold,
)
from cpseg.jobs.sweep_table import FIGURES, SweepRow, conclusion, csv_of_sweep, table_of_sweep
from cpseg.jobs.tally import row_of


def sweep(
    source: Source,
    ids: str | Path,
    settings: SweepSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: Progress = quiet,
    **keywords: Any,
) -> list[SweepRow]:
    """Cross-validate every scoring, variant, background rule and alpha over labelled images.

    With ``out`` the folder gets ``sweep.csv`` (all figures), ``sweep.md`` (the table),
    ``fold-0.json`` and so on for every finished fold, and ``run.json``; a run that was stopped goes
    on with the next fold.

    M scorings (a method of recalibration with a prior power), V variants, B background rules and A
    alphas take ``8 M V B A K (K + 1)`` bytes for counts (91 MB for 12, 3, 2 and 7 at K = 150) and
    ``4 M V A`` bytes per cell for thresholds (264 MB on 512 x 512 cells); pixel-wise calibration
    takes its memory M times.

    Args:
        source: the data set and the probabilities; evidence is refused. Of several models the
            first has the classes of the data set: its own probabilities are those of ``"none"``;
            recalibrations map all of them together.
        ids: id list of labelled images.
        settings: the rules to compare.
        out: a folder to write and to go on in, or None.
        progress: wraps the loops over images.
        **keywords: fields of :class:`SweepSettings`, in place of ``settings``.

    Returns:
        A row for the raw argmax, then for every scoring (methods, and prior powers within them, in
        the order given) its argmax if it is another and a row per setting: variants and background
        rules in the order given, alphas falling. Figures are computed from all pixels of a fold at
        once, then averaged over folds; the standard error is that of the folds' mean.

    Raises:
        ValueError: bad settings or files, a fold whose images do not suffice for a recalibration,
            or a folder that holds another run.
        TypeError: an unknown setting.
        OSError: a file that cannot be read or written.
    """
    settings = settings_of("sweep", SweepSettings, settings, keywords)
    check(settings)
    pairs = source.read_ids(ids)
    folds = deal(pairs, settings)
    images = LabelledImages.open(source, pairs, progress=progress)
    check_unseen("sweep", source, pairs)
    if recalibrates(settings) and source.mask_map is not None:
        _check_mask_map(source.mask_map.num_classes, images.num_classes)
    for background in settings.backgrounds:
        check_background("sweep", background, images.num_classes)
    plan = SweepPlan(
        settings,
        settings.grid or images.size,
        images.num_classes,
        images.sources,
        images.source.projection,
        images.source.colour,
    )
    if out is None:
        return _rows(images, folds, plan, None)
    fingerprint = plan.fingerprint(pairs, **_data(images.source))
    with open_run_folder(Path(out), fingerprint, digest_files=True) as folder:
        return _rows(images, folds, plan, folder)


def _rows(
    images: LabelledImages, folds: Sequence[Fold], plan: SweepPlan, folder: RunFolder | None
) -> list[SweepRow]:
    """Measure the folds that the folder does not hold yet, and average over all of them."""
    finished: dict[int, list[dict[str, float]]] = {}
    root = images.source.root
    inputs = [
        *itertools.chain(*images.paths.values()),
        *(root / str(pair.mask) for pair in images.pairs),
    ]
    if folder is not None:
        for number in range(len(folds)):
            if folder.is_up_to_date(fold_file(folder.out, number), *inputs):
                finished[number] = read_fold(fold_file(folder.out, number), plan)
        stamps = folder.stamps(*inputs)
    announce(
        images.progress, sum(sum(map(len, f)) for n, f in enumerate(folds) if n not in finished)
    )
    trial = plan.trial()
    figures = []
    for number, fold in enumerate(folds):
        if number not in finished:
            title = f"fold {number + 1}/{len(folds)}"
            fit = FoldFit(images, fold, trial, title)
            fit.recalibrate()
            counts = measure_fold(images, fold, trial, fit.calibrate(), title)
            finished[number] = _figures_of(counts, plan)
            if folder is not None and rank() == 0:
                path = fold_file(folder.out, number)
                write_fold(path, plan, finished[number])
                folder.record(path, inputs, stamps)
        figures.append(finished[number])
    rows = [
        SweepRow(
            **setting._asdict()
            | {name: Estimate.over([fold[place][name] for fold in figures]) for name in FIGURES}
        )
        for place, setting in enumerate(plan.rows())
    ]
    if folder is not None and rank() == 0:
        write_text(folder.out / "sweep.csv", csv_of_sweep(rows))
        write_text(folder.out / "sweep.md", f"{table_of_sweep(rows)}\n\n{conclusion(rows)}\n")
    return rows


def _check_mask_map(mask_classes: int, num_classes: int) -> None:
    if mask_classes != num_classes:
        expected = f"scores of the {mask_classes} classes in the mask map"
        fix = "maps of a sweep keep the number of classes: merge the model's with --class-map"
        raise ValueError(message("sweep", expected, str(num_classes), fix))


def _data(source: Source) -> dict[str, object]:
    """What a fingerprint says of the data set."""
    maps = (source.class_map, source.mask_map)
    stored = source.mask_format.to_json()
    more: dict[str, object] = {
        name: stored[name] for name in ("palette", "first_class") if name in stored
    }
    return {
        **more,
        "maps": [as_json(each) for each in maps],
        "void": source.void,
        "root": str(source.root.resolve()),
        **source.identity(),
    }


def _figures_of(counts: Counts, plan: SweepPlan) -> list[dict[str, float]]:
    """The figures of every row of a sweep in one fold."""
    asked = plan.settings
    shape = (len(asked.variants), len(asked.backgrounds), len(asked.alphas))
    figures = [_figures(counts.argmax[PLAIN])]
    for scoring in plan.scorings:
        if scoring != PLAIN:
            figures.append(_figures(counts.argmax[scoring]))
        covered, infinite = counts.covered[scoring], counts.infinite[scoring]
        for v, b, a in itertools.product(*map(range, shape)):
            confusion = counts.eq4[scoring][v, b, a]
            figures.append(_figures(confusion, float(covered[v, a]), float(infinite[v, a])))
    return figures


def _figures(
    confusion: Tensor, covered: float = 0.0, infinite: float = math.nan
) -> dict[str, float]:
    """One rule's; without thresholds there is no coverage."""
    pixels = 0.0 if math.isnan(infinite) else float(confusion.sum())
    sets = torch.tensor([covered, math.nan, pixels], dtype=torch.float64)
    row = row_of("", confusion, sets)
    values = (row.miou_kept, row.miou_all, row.kept, row.wrong, row.coverage, infinite)
    return dict(zip(FIGURES, values, strict=True))
