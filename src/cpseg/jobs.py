"""The offline jobs over folders besides labelling: calibrate, evaluate, compact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cpseg import groups, ranks
from cpseg.calibration import Calibrator
from cpseg.checks import check_alpha, message
from cpseg.evaluation import Row, Tally
from cpseg.quantiles import conformal_rank
from cpseg.refitting import Refit, refit_scores, unchanged
from cpseg.scores import nonconformity
from cpseg.selection import Evidence, evidence, pseudo_labels
from cpseg.sources import (
    IGNORE,
    Progress,
    Source,
    barrier,
    begin,
    digest,
    fingerprint,
    fresh,
    labelled,
    naming,
    place,
    quiet,
    share,
    split,
    with_map_of,
)
from cpseg.store import Pair, read_ids, write_evidence
from cpseg.thresholds import Calibration

LEARNED = ("kmeans", "annuli")
_RAW, _REFITTED = "raw argmax", "refitted argmax"
VARIANTS = ("pixel", "image", "blocks", *LEARNED)


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
    refit: Refit | None = None,
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
        refitted = refit_scores(
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
        partition = learned(variant, curves, num_groups, generator)
    else:
        partition = fixed(variant, grid, block)
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
        ignore_index=IGNORE,
        unit=unit,
        fallback=[fixed(name, grid, block) for name in coarser],
    )
    for pair in progress(*share(pairs), "calibrate"):
        probs, labels = labelled(source, pair, paths[pair], num_classes, num_source)
        with naming(paths[pair]):
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


def fixed(variant: str, grid: tuple[int, int], block: int) -> Tensor:
    """The partition of the grid for a variant that learns nothing."""
    if variant == "blocks":
        return groups.blocks(grid, block)
    return groups.pixel(grid) if variant == "pixel" else groups.image(grid)


def learned(variant: str, curves: Tensor, num_groups: int, generator: torch.Generator) -> Tensor:
    """The partition of the grid for ``"kmeans"`` or ``"annuli"``."""
    learn = groups.kmeans if variant == "kmeans" else groups.annuli
    return learn(curves, num_groups, generator=generator)


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
        with naming(where[pair]):
            found = nonconformity(map_of(pair)(probs), labels, score=score)
        scores.append(groups.to_grid(found, grid))
    return groups.curves(torch.stack(scores))


def images_needed(alpha: float | str) -> int:
    """The fewest scores at a cell that give a finite threshold; 19 at 0.05."""
    n = int(1 / check_alpha("images_needed", alpha)) - 2
    while conformal_rank(max(n, 0), alpha) > max(n, 0):
        n += 1
    return max(n, 0)


def evaluate(
    source: Source,
    ids: str | Path,
    calibration: Calibration,
    *,
    constant: float | None = None,
    progress: Progress = quiet,
) -> list[Row]:
    """Compare rules on labelled images that did not calibrate.

    Args:
        source: the data set and the scores, maps or evidence.
        ids: id list of labelled images.
        calibration: the calibration to judge.
        constant: also a constant threshold, 0.3 is confidence 0.7.
        progress: wraps the loop over images.

    Returns:
        Raw argmax, that of the refitted scores if there are such, the calibration's rule (its sets
        alone where the score is not LAC), the same without background suppression if it has one,
        and the constant threshold if given. From evidence: without coverage and set size.

    Raises:
        ValueError: bad files, named in the message.
        OSError: a file that cannot be read.
    """
    source = with_map_of(source, calibration)
    calibration = replace(calibration, ignore_index=IGNORE).to(source.device)
    background = calibration.background
    tallies: dict[str, Tally] = {}
    applied = replace(calibration, recalibration=None)  # to scores that are mapped once
    plain = replace(applied, background=None)
    pairs = read_ids(ids)
    paths = source.locate(pairs)
    for pair in progress(*share(pairs), "evaluate"):
        path = paths[pair]
        found = source.scores(path)
        with naming(path):
            selects = calibration.score == "lac"
            rules: dict[str, Tensor | None] = {_name(calibration): None}  # sets alone
            if isinstance(found, Evidence):
                rules[_name(calibration)] = calibration.pseudo_labels(found)
                num_classes, height, width = found.num_classes, *found.best.shape
                rules[_RAW if found.recalibration is None else _REFITTED] = found.argmax()
                if constant is not None:
                    rules[f"constant {constant:g}"] = found.pseudo_labels(constant)
            else:
                num_classes, height, width = found.shape
                probs = found
                if calibration.recalibration is not None:
                    probs = calibration.recalibration(found)
                    rules[_REFITTED] = evidence(probs, background=background).argmax()
                if num_classes == len(probs):  # else the model has other classes
                    rules[_RAW] = evidence(found, background=background).argmax()
                num_classes = len(probs)
                if selects:
                    rules[_name(calibration)] = applied.pseudo_labels(probs)
                if background is not None and selects:
                    rules[_name(plain)] = plain.pseudo_labels(probs)
                if constant is not None:
                    rules[f"constant {constant:g}"] = pseudo_labels(
                        probs, constant, background=background
                    )
        truth = source.labels(pair, num_classes, (height, width))
        for name, predictions in rules.items():
            if name not in tallies:
                tallies[name] = Tally(name, num_classes, device=source.device)
            if predictions is not None:  # other scores give sets alone
                tallies[name].update(predictions, truth)
        if not isinstance(found, Evidence):
            sets = applied.prediction_set(probs)
            for name in tallies.keys() & {_name(calibration), _name(plain)}:
                tallies[name].update_sets(sets, truth)
    return _rows(tallies, calibration, source.device)


def compact(
    source: Source,
    ids: str | Path,
    out: str | Path,
    *,
    background: int | None,
    calibration: Calibration | None = None,
    progress: Progress = quiet,
) -> int:
    """Turn the class scores of an id list into evidence files, skipping those that are there.

    Args:
        source: the data set and the scores.
        ids: id list; a second column is not read.
        out: the folder to write, laid out like the folder of scores.
        background: index of the dominant class that selection will suppress, or None.
        calibration: one whose class map and recalibration the scores go through, or None.
        progress: wraps the loop over images.

    Returns:
        The number of files written by this rank.

    Raises:
        ValueError: bad settings or files, or a folder that holds another run.
        OSError: a file that cannot be read or written.
    """
    out = Path(out)
    pairs = read_ids(ids, columns=1)
    recalibration = None
    if calibration is not None:
        source = with_map_of(source, calibration)
        recalibration = calibration.to(source.device).recalibration
    class_map = source.class_map and source.class_map.to_json()
    made: dict[str, object] = {"background": background, "map": class_map}
    if recalibration is not None:
        made["recalibration"] = recalibration.fingerprint
    paths = source.locate(pairs)
    places = {pair: place(out, pair.image, ".safetensors") for pair in pairs}
    begin(out, digest({**made, "probs": str(source.probs.resolve())}))
    written = 0
    for pair in progress(*share(pairs), "compact"):
        path = places[pair]
        if fresh(path, paths[pair]):
            continue
        probs = source.probabilities(paths[pair])
        with naming(paths[pair]):
            if recalibration is not None:
                found = recalibration.evidence(probs, background=background)
            else:
                found = evidence(probs, background=background)
        write_evidence(path, replace(found, class_map=fingerprint(source.class_map)))
        written += 1
    barrier()
    return written


def _name(calibration: Calibration) -> str:
    if calibration.score != "lac":
        return f"{calibration.variant}, {calibration.score} sets"
    suppressed = calibration.background is not None
    return f"{calibration.variant}{', suppressed' if suppressed else ''}"


def _rows(tallies: dict[str, Tally], calibration: Calibration, device: str) -> list[Row]:
    """Rows over all ranks; a rank without images takes part with zeros."""
    if ranks.active():
        known: list[list[tuple[str, int]] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(known, [(t.rule, t.num_classes) for t in tallies.values()])
        for rule, num_classes in max((names or [] for names in known), key=len):
            tallies.setdefault(rule, Tally(rule, num_classes, device=device))
    for name in sorted(tallies):
        tallies[name].sync()
    order = [_RAW, _REFITTED, _name(replace(calibration, background=None)), _name(calibration)]
    place = {name: number for number, name in enumerate(order)}
    return [tallies[name].row() for name in sorted(tallies, key=lambda n: place.get(n, 9))]
