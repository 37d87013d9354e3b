"""The offline job: which scores, alpha, variant and background rule label best.

By cross-validation over labelled images alone: in each fold one part fits and calibrates everything
and the rest measures every setting, with one read of each score file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cpseg import groups
from cpseg._internal import distributed as ranks
from cpseg._internal.checks import (
    check_alpha,
    check_background,
    message,
    name_file_in_errors,
)
from cpseg._internal.distributed import (
    rank,
    shard,
)
from cpseg._internal.safe_files import write_text
from cpseg.calibration.calibrator import Calibrator
from cpseg.core.metrics import confusion_matrix
from cpseg.core.nested_rules import confusion_per_alpha, coverage_counts
from cpseg.core.nonconformity import nonconformity
from cpseg.core.selection import evidence
from cpseg.files.dataset import (
    VOID,
    Progress,
    Source,
    quiet,
    read_example,
)
from cpseg.files.id_lists import Pair, read_ids
from cpseg.files.run_folder import (
    is_up_to_date,
    open_run_folder,
)
from cpseg.groups.resampling import to_grid, to_image
from cpseg.jobs.sweep_plan import (
    PLAIN,
    Fold,
    Plan,
    Scoring,
    check,
    deal,
    fold_file,
    read_fold,
    write_fold,
)
from cpseg.jobs.sweep_table import (
    FIGURES,
    Estimate,
    SweepRow,
    conclusion,
    csv_of_sweep,
    table_of_sweep,
)
from cpseg.jobs.tally import row_of
from cpseg.jobs.variants import LEARNED, fixed_partition, learned_partition
from cpseg.recalibration.recalibrator import Recalibrator

ALPHAS = ("0.5", "0.3", "0.2", "0.1", "0.05", "0.02", "0.01")
DEFAULT_VARIANTS = ("pixel", "image", "blocks")
Map = Callable[[Tensor], Tensor]


class _Made(NamedTuple):
    """What a fold's training images made of one way to score."""

    refit: Map
    thresholds: dict[str, Tensor]  # [A, H, W] of every variant, growing; none if not asked for


def sweep(
    source: Source,
    ids: str | Path,
    *,
    backgrounds: Sequence[int | None],
    alphas: Sequence[float | str] = ALPHAS,
    variants: Sequence[str] = DEFAULT_VARIANTS,
    block: int = 32,
    num_groups: int = 8,
    group_share: float = 0.3,
    recalibrate: Sequence[str] = ("none",),
    prior_powers: Sequence[float] = (0.0,),
    recalibrate_share: float = 0.3,
    context: str | Sequence[str] = "auto",
    scores: str = "softmax",
    folds: int = 5,
    seed: int = 0,
    grid: tuple[int, int] | None = None,
    out: str | Path | None = None,
    progress: Progress = quiet,
) -> list[SweepRow]:
    """Cross-validate every way to score, variant, background rule and alpha over labelled images.

    With ``out`` the folder gets ``sweep.csv`` (all figures), ``sweep.md`` (the table),
    ``fold-0.json`` and so on for every finished fold, and ``run.json``; a run that was stopped goes
    on with the next fold.

    M ways to score, V variants, B background rules and A alphas take ``8 M V B A K (K + 1)`` bytes
    for counts (91 MB for 12, 3, 2 and 7 at K = 150) and ``4 M V A`` bytes a cell for thresholds
    (264 MB on 512 x 512 cells); pixel-wise calibration takes its memory M times.

    Args:
        source: the data set and the class scores; evidence will not do.
        ids: id list of labelled images.
        backgrounds: classes to suppress, each by itself; None where every class counts.
        alphas: miscoverage rates.
        variants: among ``"pixel"``, ``"image"``, ``"blocks"``, ``"kmeans"`` and ``"annuli"``.
        block: side of a block in cells.
        num_groups: number of learned groups.
        group_share: share of a fold's training images on which groups are learned; they
            calibrate only the variants that learn nothing.
        recalibrate: methods of a :class:`Recalibrator`; ``"none"`` is the model's own scores.
        prior_powers: tau in [0, 1], each with every method, see
            :meth:`Recalibration.with_prior_power`.
        recalibrate_share: share of a fold's training images that fits the maps and measures the
            prior; they calibrate only the model's own scores.
        context: ``"auto"`` or parts of the context, for ``"vector"`` and ``"dirichlet"``.
        scores: ``"softmax"`` or ``"sigmoid"``, what the model's scores are, for the maps.
        folds: number of parts, each measured once.
        seed: of the parts, of those shares, of the learning and of the maps' samples.
        grid: height and width of the grid; by default the size of the first listed image.
        out: a folder to write and to go on in, or None.
        progress: wraps the loops over images.

    Returns:
        A row for the raw argmax, then for every way to score (methods, and prior powers within
        them, in the order given) its argmax if it is another and a row a setting: variants and
        background rules in the order given, alphas falling. Figures are computed from all pixels of
        a fold at once, then averaged over folds; the standard error is that of the folds' mean.

    Raises:
        ValueError: bad settings or files, a fold whose images fit no map, or a folder that holds
            another run.
        OSError: a file that cannot be read or written.
    """
    check(
        alphas=alphas,
        variants=variants,
        backgrounds=backgrounds,
        group_share=group_share,
        recalibrate=recalibrate,
        prior_powers=prior_powers,
        recalibrate_share=recalibrate_share,
        context=context,
        scores=scores,
    )
    pairs = read_ids(ids)
    learns = bool(set(variants) & set(LEARNED))
    refits = set(recalibrate) != {"none"} or any(prior_powers)
    parts = deal(pairs, folds, group_share * learns, recalibrate_share * refits, seed)
    paths = source.locate(pairs)
    first = source.probabilities(paths[pairs[0]])
    if refits and source.mask_map is not None and source.mask_map.num_classes != len(first):
        expected = f"scores of the {source.mask_map.num_classes} classes in the mask map"
        fix = "maps of a sweep keep the number of classes: merge the model's with --class-map"
        raise ValueError(message("sweep", expected, str(len(first)), fix))
    for background in backgrounds:
        check_background("sweep", background, len(first))
    plan = Plan(
        alphas=sorted(map(str, alphas), key=lambda a: check_alpha("sweep", a), reverse=True),
        variants=list(variants),
        backgrounds=list(backgrounds),
        block=block,
        num_groups=num_groups,
        group_share=group_share,
        folds=folds,
        seed=seed,
        size=grid or (first.shape[-2], first.shape[-1]),
        num_classes=len(first),
        recalibrate=list(recalibrate),
        prior_powers=[float(tau) for tau in prior_powers],
        recalibrate_share=recalibrate_share,
        context=context if isinstance(context, str) else list(context),
        scores=scores,
    )
    finished: set[int] = set()
    if out is not None:
        out = Path(out)
        open_run_folder(out, plan.fingerprint(pairs, **_data(source)))
        inputs = [*paths.values(), *(source.root / str(pair.mask) for pair in pairs)]
        finished = {n for n in range(folds) if is_up_to_date(fold_file(out, n), *inputs)}
    figures = []
    for number, fold in enumerate(parts):
        if out is not None and number in finished:
            figures.append(read_fold(fold_file(out, number), plan))
            continue
        title = f"fold {number + 1}/{folds}"
        made = _calibrate(source, fold, plan, paths, progress, title)
        figures.append(_measure(source, fold, plan, made, paths, progress, title))
        if out is not None and rank() == 0:
            write_fold(fold_file(out, number), plan, figures[-1])
    rows = [
        SweepRow(
            **setting._asdict()
            | {name: Estimate.over([fold[place][name] for fold in figures]) for name in FIGURES}
        )
        for place, setting in enumerate(plan.settings())
    ]
    if out is not None and rank() == 0:
        write_text(out / "sweep.csv", csv_of_sweep(rows))
        write_text(out / "sweep.md", f"{table_of_sweep(rows)}\n\n{conclusion(rows)}\n")
    return rows


def _data(source: Source) -> dict[str, object]:
    """What a fingerprint says of the data set."""
    maps = (source.class_map, source.mask_map)
    return {
        "maps": [None if each is None else each.to_json() for each in maps],
        "void": source.void,
        "root": str(source.root.resolve()),
        "probs": str(source.probs.resolve()),
    }


def _calibrate(
    source: Source,
    fold: Fold,
    plan: Plan,
    paths: dict[Pair, Path],
    progress: Progress,
    title: str,
) -> dict[Scoring, _Made]:
    """Maps and thresholds from one read of the training images.

    Images that learn the groups are read by every rank, so that all learn the same.
    """

    def calibrator(partition: Tensor) -> Calibrator:
        return Calibrator(
            partition,
            alpha=plan.alphas[0],
            num_classes=plan.num_classes,
            max_images=len(fold.learning) + len(fold.fitting) + len(fold.calibrating),
            ignore_index=VOID,
        )

    learning = [variant for variant in plan.variants if variant in LEARNED]
    made = {
        scoring: {
            variant: calibrator(fixed_partition(variant, plan.size, plan.block))
            for variant in plan.variants
            if variant not in LEARNED
        }
        for scoring in plan.scorings()
    }

    def on_grid(probs: Tensor, labels: Tensor) -> Tensor:
        return to_grid(nonconformity(probs, labels), plan.size)

    # The model's own scores of the images that fit maps calibrate too: at once where groups are
    # fixed, and where they are learned as soon as they are, from these scores.
    waiting: list[Tensor] = []
    recalibrators = plan.recalibrators()
    for pair in _bar(progress, *shard(fold.fitting), f"{title}, recalibrate"):
        probs, labels = read_example(source, pair, paths[pair], plan.num_classes)
        with name_file_in_errors(paths[pair]):
            for recalibrator in recalibrators.values():
                recalibrator.update(probs, labels)
            for each in made.get(PLAIN, {}).values():
                each.update(probs, labels)
            if learning and PLAIN in made:
                waiting.append(on_grid(probs, labels))
    maps = _maps(recalibrators, plan, source.device, title)
    own = set(shard(fold.learning)[0])
    curves: dict[Scoring, list[Tensor]] = {scoring: [] for scoring in made}
    for pair in _bar(progress, fold.learning, len(fold.learning), f"{title}, learn groups"):
        probs, labels = read_example(source, pair, paths[pair], plan.num_classes)
        with name_file_in_errors(paths[pair]):
            for scoring, calibrators in made.items():
                refitted = maps[scoring](probs)
                curves[scoring].append(on_grid(refitted, labels))
                for each in calibrators.values() if pair in own else ():
                    each.update(refitted, labels)
    for scoring in made if learning else ():
        curve = groups.curves(torch.stack(curves.pop(scoring)))
        for variant in learning:
            generator = torch.Generator().manual_seed(plan.seed)
            each = calibrator(learned_partition(variant, curve, plan.num_groups, generator))
            for one in waiting if scoring == PLAIN else ():
                each.update_scores(one)
            made[scoring][variant] = each
    for pair in progress(*shard(fold.calibrating), f"{title}, calibrate"):
        probs, labels = read_example(source, pair, paths[pair], plan.num_classes)
        with name_file_in_errors(paths[pair]):
            for scoring, calibrators in made.items():
                refitted = maps[scoring](probs)
                for each in calibrators.values():
                    each.update(refitted, labels)
    thresholds: dict[Scoring, dict[str, Tensor]] = {scoring: {} for scoring in maps}
    for scoring, variant in itertools.product(made, plan.variants):
        each = made[scoring][variant]
        each.sync()
        limits = [each.compute(alpha).threshold for alpha in plan.alphas]
        thresholds[scoring][variant] = torch.stack(limits)
    return {scoring: _Made(maps[scoring], thresholds[scoring]) for scoring in maps}


def _bar(progress: Progress, pairs: Sequence[Pair], count: int, title: str) -> Iterable[Pair]:
    """A pass over images, without a bar where there are none."""
    return progress(pairs, count, title) if count else pairs


def _maps(
    recalibrators: dict[str, Recalibrator], plan: Plan, device: str, title: str
) -> dict[Scoring, Map]:
    """Every way to score, the model's own first; a method is fitted once for all prior powers."""
    maps: dict[Scoring, Map] = {PLAIN: lambda probs: probs}
    try:
        fitted = {}
        for method, recalibrator in recalibrators.items():
            recalibrator.sync()
            fitted[method] = recalibrator.fit().to(device)
    except ValueError as error:
        raise ValueError(f"{title}: {error}") from error
    for scoring in plan.scorings():
        if scoring != PLAIN:
            maps[scoring] = fitted[scoring.recalibrate].with_prior_power(scoring.prior_power)
    return maps


def _measure(
    source: Source,
    fold: Fold,
    plan: Plan,
    made: dict[Scoring, _Made],
    paths: dict[Pair, Path],
    progress: Progress,
    title: str,
) -> list[dict[str, float]]:
    """The figures of every setting on a fold's other images, from one read of them."""
    shape = (len(plan.variants), len(plan.backgrounds), len(plan.alphas))
    width, ways = plan.num_classes, len(made)
    # Of the model's own scores the argmax counts in any case.
    argmax = torch.zeros(ways, width, width + 1, dtype=torch.int64, device=source.device)
    counts = argmax.new_zeros(ways, *shape, width, width + 1)
    inside = argmax.new_zeros(ways, shape[0], shape[2])
    for pair in progress(*shard(fold.testing), f"{title}, measure"):
        probs, labels = read_example(source, pair, paths[pair], width)
        truth = labels.to(torch.int64)
        void = truth == VOID
        for m, (refit, thresholds) in enumerate(made.values()):
            refitted = refit(probs)
            p_true = refitted.gather(0, truth.masked_fill(void, 0)[None])[0]
            p_true = p_true.masked_fill(void, torch.nan)
            found = [evidence(refitted, background=background) for background in plan.backgrounds]
            argmax[m] += confusion_matrix(
                found[0].argmax(), truth, num_classes=width, ignore_index=VOID, with_ignored=True
            )
            for v, variant in enumerate(thresholds):
                levels = to_image(thresholds[variant], (probs.shape[1], probs.shape[2]))
                inside[m, v] += coverage_counts(p_true, levels)
                for b, one in enumerate(found):
                    counts[m, v, b] += confusion_per_alpha(one, truth, levels, ignore_index=VOID)
    if ranks.active():
        argmax, counts, inside = (
            ranks.all_reduce_sum(each, None) for each in (argmax, counts, inside)
        )
    figures = [_figures(argmax[0], torch.zeros(()), torch.tensor(math.nan))]
    place = {scoring: number for number, scoring in enumerate(made)}
    for scoring in plan.scorings():
        m = place[scoring]
        if scoring != PLAIN:
            figures.append(_figures(argmax[m], torch.zeros(()), torch.tensor(math.nan)))
        for v, b, a in itertools.product(*map(range, shape)):
            limits = made[scoring].thresholds[plan.variants[v]][a]
            infinite = limits.isposinf().double().mean()
            figures.append(_figures(counts[m, v, b, a], inside[m, v, a], infinite))
    return figures


def _figures(confusion: Tensor, inside: Tensor, infinite: Tensor) -> dict[str, float]:
    sets = 0 if infinite.isnan() else int(confusion.sum())
    row = row_of("", confusion, torch.tensor([float(inside), math.nan, sets], dtype=torch.float64))
    values = (row.miou_kept, row.miou_all, row.kept, row.wrong, row.coverage, float(infinite))
    return dict(zip(FIGURES, values, strict=True))
