"""The offline job: rules compared on held-out labelled images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from cpseg._internal import distributed as ranks
from cpseg._internal.checks import (
    name_file_in_errors,
)
from cpseg._internal.distributed import (
    shard,
)
from cpseg.calibration.calibration import Calibration
from cpseg.core.selection import Evidence, evidence, pseudo_labels
from cpseg.files.dataset import (
    VOID,
    Progress,
    Source,
    quiet,
)
from cpseg.files.id_lists import read_ids
from cpseg.jobs.tally import Row, Tally
from cpseg.jobs.variants import (
    with_map_of,
)

_RAW = "raw argmax"


_REFITTED = "refitted argmax"


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
    calibration = replace(calibration, ignore_index=VOID).to(source.device)
    background = calibration.background
    tallies: dict[str, Tally] = {}
    applied = replace(calibration, recalibration=None)  # to scores that are mapped once
    plain = replace(applied, background=None)
    pairs = read_ids(ids)
    paths = source.locate(pairs)
    for pair in progress(*shard(pairs), "evaluate"):
        path = paths[pair]
        found = source.scores(path)
        with name_file_in_errors(path):
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
