"""The offline job: which alpha, variant and background rule label best, by cross-validation.

Only labelled images are used. In each fold one part calibrates every variant and the rest measures
every setting, with one read of each score file.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpseg import groups, ranks
from cpseg.calibration import Calibrator
from cpseg.checks import check_alpha, check_background, message
from cpseg.evaluation import row_of
from cpseg.jobs import LEARNED, VARIANTS, fixed, labelled, learned, split
from cpseg.levels import confusions, hits
from cpseg.metrics import confusion_matrix
from cpseg.scores import nonconformity
from cpseg.selection import evidence
from cpseg.sources import IGNORE, Progress, Source, begin, digest, naming, quiet, rank, share
from cpseg.store import Pair, read_ids, write_text
from cpseg.sweep_table import (
    FIGURES,
    RAW,
    Estimate,
    SweepRow,
    closing,
    csv_of_sweep,
    table_of_sweep,
)

ALPHAS = ("0.5", "0.3", "0.2", "0.1", "0.05", "0.02", "0.01")
DEFAULT_VARIANTS = ("pixel", "image", "blocks")


class _Fold(NamedTuple):
    learning: list[Pair]
    calibrating: list[Pair]
    testing: list[Pair]


class _Grid(NamedTuple):
    """What is tried, alphas from the largest (strictest) to the smallest, and on which cells."""

    alphas: list[str]
    variants: list[str]
    backgrounds: list[int | None]
    block: int
    num_groups: int
    seed: int
    size: tuple[int, int]
    num_classes: int

    def settings(self) -> list[tuple[str, int | None, float | None]]:
        """Variant, background and alpha of every row."""
        tried: list[tuple[str, int | None, float | None]] = [(RAW, None, None)]
        for variant in self.variants:
            for background in self.backgrounds:
                tried += [(variant, background, _number(alpha)) for alpha in self.alphas]
        return tried


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
    folds: int = 5,
    seed: int = 0,
    grid: tuple[int, int] | None = None,
    out: str | Path | None = None,
    progress: Progress = quiet,
) -> list[SweepRow]:
    """Cross-validate every alpha, variant and background rule over labelled images.

    With ``out`` the folder gets ``sweep.csv`` (all figures), ``sweep.md`` (the table),
    ``fold-0.json`` and so on for every finished fold, and ``run.json``; a run that was stopped goes
    on with the next fold.

    Args:
        source: the data set and the class scores; evidence will not do.
        ids: id list of labelled images.
        backgrounds: classes to suppress, each by itself; None where every class counts.
        alphas: miscoverage rates.
        variants: among ``"pixel"``, ``"image"``, ``"blocks"``, ``"kmeans"`` and ``"annuli"``.
        block: side of a block in cells.
        num_groups: number of learned groups.
        group_share: share of a fold's calibration images on which groups are learned; they
            calibrate only the variants that learn nothing.
        folds: number of parts, each measured once.
        seed: of the parts, of that share and of the learning.
        grid: height and width of the grid; by default the size of the first listed image.
        out: a folder to write and to go on in, or None.
        progress: wraps the loops over images.

    Returns:
        A row for the raw argmax, then one a setting: variants and background rules in the order
        given, alphas falling. Figures are computed from all pixels of a fold at once, then averaged
        over folds; the standard error is that of the folds' mean.

    Raises:
        ValueError: bad settings or files, or a folder that holds another run.
        OSError: a file that cannot be read or written.
    """
    _check(alphas, variants, backgrounds, group_share)
    pairs = read_ids(ids)
    parts = _parts(pairs, folds, group_share if set(variants) & set(LEARNED) else 0.0, seed)
    paths = source.locate(pairs)
    first = source.probabilities(paths[pairs[0]])
    for background in backgrounds:
        check_background("sweep", background, len(first))
    tried = _Grid(
        sorted(map(str, alphas), key=lambda a: check_alpha("sweep", a), reverse=True),
        list(variants),
        list(backgrounds),
        block,
        num_groups,
        seed,
        grid or (first.shape[-2], first.shape[-1]),
        len(first),
    )
    finished: set[int] = set()
    if out is not None:
        out = Path(out)
        begin(out, _fingerprint(source, pairs, tried, folds, group_share))
        finished = {n for n in range(folds) if _fold_file(out, n).exists()}
    figures = []
    for number, fold in enumerate(parts):
        if out is not None and number in finished:
            figures.append(_read_fold(_fold_file(out, number), tried))
            continue
        title = f"fold {number + 1}/{folds}"
        thresholds = _calibrate(source, fold, tried, paths, progress, title)
        figures.append(_measure(source, fold, tried, thresholds, paths, progress, title))
        if out is not None and rank() == 0:
            _write_fold(_fold_file(out, number), tried, figures[-1])
    rows = [
        SweepRow(
            *setting, *(Estimate.over([fold[place][name] for fold in figures]) for name in FIGURES)
        )
        for place, setting in enumerate(tried.settings())
    ]
    if out is not None and rank() == 0:
        write_text(out / "sweep.csv", csv_of_sweep(rows))
        write_text(out / "sweep.md", f"{table_of_sweep(rows)}\n\n{closing(rows)}\n")
    return rows


def _check(
    alphas: Sequence[float | str],
    variants: Sequence[str],
    backgrounds: Sequence[int | None],
    group_share: float,
) -> None:
    exact = [check_alpha("sweep", alpha) for alpha in alphas]
    for variant in variants:
        if variant not in VARIANTS:
            expected = f"variants among {', '.join(VARIANTS)}"
            raise ValueError(message("sweep", expected, repr(variant), "choose among them"))
    lists = {"alphas": exact, "variants": variants, "backgrounds": backgrounds}
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            got = "none" if not values else "one twice"
            raise ValueError(message("sweep", f"{name}, each once", got, f"list the {name} to try"))
    if group_share == 0 and set(variants) & set(LEARNED):
        expected = f"a --group-share above 0 for {' and '.join(LEARNED)}"
        fix = "0.3 learns the groups on 30 % of the images, which then do not calibrate them"
        raise ValueError(message("sweep", expected, "0", fix))


def _parts(pairs: list[Pair], folds: int, group_share: float, seed: int) -> list[_Fold]:
    """Images in a drawn order, dealt out to the folds; what each fold learns groups on."""
    if len(pairs) < 2:
        fix = "label more: some calibrate and others measure"
        raise ValueError(message("sweep", "at least 2 labelled images", f"{len(pairs)}", fix))
    if not 2 <= folds <= len(pairs):
        expected = f"2 to {len(pairs)} folds for {len(pairs)} labelled images"
        raise ValueError(message("sweep", expected, f"{folds}", "pass another --folds"))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pairs), generator=generator).tolist()
    parts = []
    for number in range(folds):
        testing = set(order[number::folds])
        training = [pair for place, pair in enumerate(pairs) if place not in testing]
        learning: list[Pair] = []
        if group_share > 0:
            learning, training = split("sweep", training, group_share, generator)
        parts.append(_Fold(learning, training, [pairs[place] for place in sorted(testing)]))
    return parts


def _calibrate(
    source: Source,
    fold: _Fold,
    tried: _Grid,
    paths: dict[Pair, Path],
    progress: Progress,
    title: str,
) -> dict[str, Tensor]:
    """Thresholds ``[A, H, W]`` of every variant, growing, from one read of the images.

    Images that learn the groups are read by every rank, so that all learn the same.
    """

    def calibrator(partition: Tensor) -> Calibrator:
        return Calibrator(
            partition,
            alpha=tried.alphas[0],
            num_classes=tried.num_classes,
            max_images=len(fold.learning) + len(fold.calibrating),
            ignore_index=IGNORE,
        )

    made = {
        variant: calibrator(fixed(variant, tried.size, tried.block))
        for variant in tried.variants
        if variant not in LEARNED
    }
    own, scores = set(share(fold.learning)[0]), []
    learning: Iterable[Pair] = fold.learning
    if fold.learning:  # else a bar of nothing
        learning = progress(learning, len(fold.learning), f"{title}, learn groups")
    for pair in learning:
        probs, labels = labelled(source, pair, paths[pair], tried.num_classes)
        with naming(paths[pair]):
            scores.append(groups.to_grid(nonconformity(probs, labels), tried.size))
            for each in made.values() if pair in own else ():
                each.update(probs, labels)
    if scores:
        curves = groups.curves(torch.stack(scores))
        for variant in (v for v in tried.variants if v in LEARNED):
            generator = torch.Generator().manual_seed(tried.seed)
            made[variant] = calibrator(learned(variant, curves, tried.num_groups, generator))
    for pair in progress(*share(fold.calibrating), f"{title}, calibrate"):
        probs, labels = labelled(source, pair, paths[pair], tried.num_classes)
        with naming(paths[pair]):
            for each in made.values():
                each.update(probs, labels)
    thresholds = {}
    for variant in tried.variants:
        made[variant].sync()
        maps = [made[variant].compute(alpha).threshold for alpha in tried.alphas]
        thresholds[variant] = torch.stack(maps)
    return thresholds


def _measure(
    source: Source,
    fold: _Fold,
    tried: _Grid,
    thresholds: dict[str, Tensor],
    paths: dict[Pair, Path],
    progress: Progress,
    title: str,
) -> list[dict[str, float]]:
    """The figures of every setting on a fold's other images, from one read of them."""
    shape = (len(tried.variants), len(tried.backgrounds), len(tried.alphas))
    width = tried.num_classes
    raw = torch.zeros(width, width + 1, dtype=torch.int64, device=source.device)
    counts = raw.new_zeros(*shape, width, width + 1)
    inside = raw.new_zeros(shape[0], shape[2])
    for pair in progress(*share(fold.testing), f"{title}, measure"):
        probs, labels = labelled(source, pair, paths[pair], width)
        truth = labels.to(torch.int64)
        void = truth == IGNORE
        p_true = probs.gather(0, truth.masked_fill(void, 0)[None])[0].masked_fill(void, torch.nan)
        found = [evidence(probs, background=background) for background in tried.backgrounds]
        raw += confusion_matrix(
            found[0].argmax(), truth, num_classes=width, ignore_index=IGNORE, with_ignored=True
        )
        for v, variant in enumerate(tried.variants):
            levels = groups.to_image(thresholds[variant], (probs.shape[1], probs.shape[2]))
            inside[v] += hits(p_true, levels)
            for b, one in enumerate(found):
                counts[v, b] += confusions(one, truth, levels, ignore_index=IGNORE)
    if ranks.active():
        raw, counts, inside = (ranks.total(each, None) for each in (raw, counts, inside))
    figures = [_figures(raw, torch.zeros(()), torch.tensor(math.nan))]
    for v, b, a in itertools.product(*map(range, shape)):
        infinite = thresholds[tried.variants[v]][a].isposinf().double().mean()
        figures.append(_figures(counts[v, b, a], inside[v, a], infinite))
    return figures


def _figures(confusion: Tensor, inside: Tensor, infinite: Tensor) -> dict[str, float]:
    sets = 0 if infinite.isnan() else int(confusion.sum())
    row = row_of("", confusion, torch.tensor([float(inside), math.nan, sets], dtype=torch.float64))
    values = (row.miou_kept, row.miou_all, row.kept, row.wrong, row.coverage, float(infinite))
    return dict(zip(FIGURES, values, strict=True))


def _fingerprint(
    source: Source, pairs: Sequence[Pair], tried: _Grid, folds: int, group_share: float
) -> str:
    """What must be the same for a sweep to go on in a folder."""
    maps = (source.class_map, source.mask_map)
    return digest(
        {
            "sweep": [*tried[1:], folds, group_share],
            "alphas": [str(check_alpha("sweep", alpha)) for alpha in tried.alphas],
            "maps": [None if each is None else each.to_json() for each in maps],
            "void": source.void,
            "root": str(source.root.resolve()),
            "probs": str(source.probs.resolve()),
            "images": pairs,
        }
    )


def _fold_file(out: Path, number: int) -> Path:
    return out / f"fold-{number}.json"


def _write_fold(path: Path, tried: _Grid, figures: Sequence[dict[str, float]]) -> None:
    names = ("variant", "background", "alpha")
    rows: list[dict[str, Any]] = [
        dict(zip(names, setting, strict=True))
        | {name: None if math.isnan(value) else value for name, value in values.items()}
        for setting, values in zip(tried.settings(), figures, strict=True)
    ]
    write_text(path, json.dumps(rows, indent=1) + "\n")


def _read_fold(path: Path, tried: _Grid) -> list[dict[str, float]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if [(r["variant"], r["background"], r["alpha"]) for r in rows] != tried.settings():
            raise ValueError("other settings")
        return [
            {name: math.nan if row[name] is None else float(row[name]) for name in FIGURES}
            for row in rows
        ]
    except (ValueError, TypeError, KeyError) as error:
        fix = "delete it: the fold is measured again"
        raise ValueError(message(str(path), "a finished fold", "a damaged one", fix)) from error


def _number(alpha: str) -> float:
    return float(check_alpha("sweep", alpha))
