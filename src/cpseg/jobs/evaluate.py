"""The job ``cpseg evaluate``: rules compared on held-out labelled images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from cpseg._internal.checks import name_file_in_errors
from cpseg._internal.distributed import broadcast_first, shard
from cpseg._internal.threads import in_order
from cpseg.calibration.calibration import Calibration
from cpseg.core.selection import Evidence, evidence, pseudo_labels
from cpseg.files.dataset import Progress, Source, check_distinct, quiet
from cpseg.files.masks import VOID
from cpseg.jobs.seen_images import approximate, check_unseen, cross_fitted
from cpseg.jobs.shift import Notice, Tell, Watch, silent
from cpseg.jobs.sources import as_calibrated
from cpseg.jobs.tally import Row, Tally

Scores = Tensor | Evidence
Apply = Callable[[Scores, Scores], Tensor | None]


class Rule(NamedTuple):
    """A way to choose labels.

    Attributes:
        name: its name in the table.
        labels: takes the scores in a file, and the same recalibrated; gives labels, or None where
            the rule has prediction sets only.
        has_sets: whether the calibration's prediction sets are the rule's.
    """

    name: str
    labels: Apply
    has_sets: bool = False


def evaluate(
    source: Source,
    ids: str | Path,
    calibration: Calibration,
    *,
    constant: float | None = None,
    progress: Progress = quiet,
    tell: Tell = silent,
) -> list[Row]:
    """Compare rules on labelled images that were not used for the calibration.

    What is seen is compared with what the calibration promises: coverage, or the error of a
    certificate.

    Args:
        source: the data set and the scores, probabilities or evidence.
        ids: id list of labelled images.
        calibration: the calibration to judge.
        constant: also a constant threshold; 0.3 is confidence 0.7.
        progress: wraps the loop over images.
        tell: takes a warning where more is wrong than was promised, by a test over images with a
            false-alarm rate of 1 in 1,000, and a remark where the labels are those of the argmax.

    Returns:
        Raw argmax (of every model with the classes of the data set), that of the recalibrated
        probabilities if there are such, the calibration's rule without background suppression if
        it has one, the calibration's rule (its sets alone where the score is not LAC), and the
        constant threshold if given. From evidence: without coverage and set size.

    Raises:
        ValueError: bad files, named in the message.
        OSError: a file that cannot be read.
    """
    source = as_calibrated("evaluate", source, calibration)
    calibration = replace(calibration, ignore_index=VOID).to(source.device)
    applied = replace(calibration, recalibration=None)  # to probabilities recalibrated before
    pairs = source.read_ids(ids)
    check_distinct(source.root, pairs)
    paths = source.locate(pairs)
    check_unseen("evaluate", source, pairs)
    names = [folder.name for folder in source.folders]
    tallies: list[tuple[Rule, Tally]] = []
    watch = Watch(calibration)
    mine, count = shard(pairs)
    with closing(in_order(lambda pair: source.scores(paths[pair]), mine, source.workers)) as read:
        for pair, scores in zip(progress(mine, count, "evaluate"), read, strict=True):
            with name_file_in_errors(paths[pair][0]):
                mapped = scores
                if isinstance(scores, Tensor) and calibration.recalibration is not None:
                    mapped = calibration.recalibration(scores)
                if not tallies:
                    num_classes = _num_classes(mapped)
                    tallies = [
                        (rule, Tally(rule.name, num_classes, device=source.device))
                        for rule in _rules(calibration, scores, constant, names)
                    ]
                labels = [rule.labels(scores, mapped) for rule, _ in tallies]
            size = mapped.best.shape if isinstance(mapped, Evidence) else mapped.shape[-2:]
            truth = source.labels(pair, _num_classes(mapped), (size[0], size[1]))
            sets = applied.prediction_set(mapped) if isinstance(mapped, Tensor) else None
            for (rule, tally), predictions in zip(tallies, labels, strict=True):
                if predictions is not None:
                    tally.update(predictions, truth)
                if rule.has_sets and sets is not None:
                    tally.update_sets(sets, truth)
            named = {rule.name: each for (rule, _), each in zip(tallies, labels, strict=True)}
            argmax = named.get("recalibrated argmax", named.get("raw argmax"))
            watch.update(pair, truth, named[_name(calibration)], sets, argmax)
    rows = _rows([tally for _, tally in tallies], source.device)
    for notice in watch.notices():
        tell(notice)
    for text in approximate(cross_fitted(source, pairs), "what is seen here"):
        tell(Notice(text, is_warning=True))
    return rows


def _num_classes(scores: Scores) -> int:
    return scores.num_classes if isinstance(scores, Evidence) else len(scores)


def _rules(
    calibration: Calibration, scores: Scores, constant: float | None, folders: Sequence[str]
) -> list[Rule]:
    """The rules to compare, in the order of the table; they depend on the kind of the files."""
    background = calibration.background
    without = replace(calibration, background=None)

    def argmax(file: Scores) -> Tensor:
        each = file if isinstance(file, Evidence) else evidence(file, background=background)
        return each.argmax()

    def at_constant(file: Scores) -> Tensor:
        limit = 0.0 if constant is None else constant
        if isinstance(file, Evidence):
            return file.pseudo_labels(limit)
        return pseudo_labels(file, limit, background=background)

    def select(by: Calibration) -> Apply:
        applied = replace(by, recalibration=None)
        if by.score != "lac":
            return lambda file, mapped: None
        return lambda file, mapped: (
            by.pseudo_labels(file) if isinstance(file, Evidence) else applied.pseudo_labels(mapped)
        )

    rules = []
    recalibrated = calibration.recalibration is not None
    if isinstance(scores, Evidence):
        recalibrated = scores.recalibration is not None
        if not recalibrated:
            rules.append(Rule("raw argmax", lambda file, mapped: argmax(file)))
    else:
        rules += _raw_rules(calibration, scores, folders, argmax)
    if recalibrated:
        rules.append(Rule("recalibrated argmax", lambda file, mapped: argmax(mapped)))
    if background is not None and calibration.score == "lac" and isinstance(scores, Tensor):
        rules.append(Rule(_name(without), select(without), has_sets=True))
    rules.append(Rule(_name(calibration), select(calibration), has_sets=True))
    if constant is not None:
        rules.append(Rule(f"constant {constant:g}", lambda file, mapped: at_constant(mapped)))
    return rules


def _raw_rules(
    calibration: Calibration,
    scores: Tensor,
    folders: Sequence[str],
    argmax: Callable[[Scores], Tensor],
) -> list[Rule]:
    """The raw argmax of every model that has the classes of the data set."""
    recalibration = calibration.recalibration
    parts = [slice(0, len(scores))] if recalibration is None else recalibration.channels
    num_classes = len(scores) if recalibration is None else recalibration.num_classes

    def rule(name: str, part: slice) -> Rule:
        return Rule(name, lambda file, mapped: argmax(file[part]))  # type: ignore[index]

    return [
        rule("raw argmax" if len(parts) == 1 else f"raw argmax, {folder}", part)
        for folder, part in zip(folders, parts, strict=False)
        if part.stop - part.start == num_classes
    ]


def _name(calibration: Calibration) -> str:
    if calibration.score != "lac":
        return f"{calibration.variant}, {calibration.score} sets"
    suppressed = calibration.background is not None
    return f"{calibration.variant}{', suppressed' if suppressed else ''}"


def _rows(tallies: list[Tally], device: str) -> list[Row]:
    """Rows over all ranks; a rank without images takes part with zeros."""
    names = broadcast_first([(tally.rule, tally.num_classes) for tally in tallies])
    tallies = tallies or [Tally(rule, classes, device=device) for rule, classes in names]
    for tally in tallies:
        tally.sync()
    return [tally.row() for tally in tallies]
