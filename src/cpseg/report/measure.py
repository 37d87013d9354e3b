"""The offline job behind ``cpseg report``: every figure, from labelled images alone.

In each fold one part of the images measures. Of the others some refit the scores and set the levels
of certified rules, the rest calibrates and certifies: nothing is measured on images that made it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cpseg import groups
from cpseg._internal import distributed as ranks
from cpseg._internal.checks import check_alpha, check_background, message, name_file_in_errors
from cpseg.calibration.calibration import Calibration
from cpseg.calibration.calibrator import Calibrator
from cpseg.certification.certifier import ALPHAS as LEVELS
from cpseg.certification.certifier import Certifier
from cpseg.core.metrics import confusion_matrix
from cpseg.core.nested_rules import confusion_per_alpha, coverage_counts
from cpseg.core.reliability import Reliability
from cpseg.core.selection import Evidence, evidence
from cpseg.files.dataset import VOID, Progress, Source, quiet, read_example
from cpseg.files.id_lists import Pair, read_ids
from cpseg.groups.resampling import to_image
from cpseg.jobs.certify import VARIANTS
from cpseg.jobs.recalibrate import RecalibrationOptions
from cpseg.jobs.variants import fixed_partition
from cpseg.recalibration.fit import METHODS
from cpseg.report.findings import (
    CONFIDENCES,
    RAW,
    Findings,
    Measured,
    Panel,
    Plan,
    Rule,
    certified_at,
    label_with,
)

Map = Callable[[Tensor], Tensor]


@dataclass
class _Sums:
    """What the folds add to."""

    rules: dict[Rule, Measured]
    reliability: dict[str, list[Reliability]]
    images_of_class: Tensor
    panels: list[Panel] = field(default_factory=list)
    absent: set[int] = field(default_factory=set)


class _Fold(NamedTuple):
    fitting: list[Pair]
    proving: list[Pair]
    testing: list[Pair]


class _Family(NamedTuple):
    """One fold's rules on scores refitted in one way."""

    refit: Map
    thresholds: Tensor  # [A, H, W], growing
    certified: dict[tuple[int | None, float], Calibration]


class _Run(NamedTuple):
    """What every step of the job needs."""

    source: Source
    plan: Plan
    paths: dict[Pair, Path]
    num_classes: int
    grid: tuple[int, int]
    progress: Progress

    def images(self, pairs: list[Pair], title: str) -> Iterable[tuple[Pair, Tensor, Tensor]]:
        """Scores and labels of images, one after the other."""
        for pair in self.progress(pairs, len(pairs), title):
            probs, labels = read_example(self.source, pair, self.paths[pair], self.num_classes)
            with name_file_in_errors(self.paths[pair]):
                yield pair, probs, labels


def gather(source: Source, ids: str | Path, plan: Plan, *, progress: Progress = quiet) -> Findings:
    """Measure every rule of a plan on the labelled images of an id list.

    Args:
        source: the data set and the class scores; evidence will not do.
        ids: id list of labelled images.
        plan: what to try.
        progress: wraps the loops over images.

    Raises:
        ValueError: bad settings or files, too few images for the folds, or several processes.
        OSError: a file that cannot be read.
    """
    _check(plan)
    pairs = read_ids(ids)
    parts = deal(pairs, plan)
    paths = source.locate(pairs)
    first = source.probabilities(paths[pairs[0]])
    check_background("report", plan.background, len(first))
    if plan.names is not None and len(plan.names) != len(first):
        expected, got = f"{len(first)} class names as in the scores", f"{len(plan.names)}"
        raise ValueError(message("report", expected, got, "write one name a line, in order"))
    size = plan.grid or (first.shape[-2], first.shape[-1])
    run = _Run(source, plan, paths, len(first), size, progress)
    names = [RAW, *(name for name in plan.methods if name != RAW)]
    whole = _calibrator(
        run, fixed_partition(plan.variant, size, plan.block), plan.alpha, len(pairs)
    )
    of_class = torch.zeros(len(first), dtype=torch.int64)
    sums = _Sums({}, {name: [] for name in names}, of_class)
    shown = _samples(pairs, plan.samples)
    for number, fold in enumerate(parts):
        title = f"fold {number + 1}/{plan.folds}"
        families = _families(run, fold, names, sums, title)
        _measure(run, fold, families, sums, whole, shown, title)
    places = {pair.image: place for place, pair in enumerate(shown)}
    return Findings(
        plan,
        len(first),
        len(pairs),
        sums.images_of_class,
        sums.rules,
        sums.reliability,
        whole.compute(),
        sorted(sums.panels, key=lambda panel: places[panel.image]),
        tuple(sorted(sums.absent)),
        [(len(fold.fitting), len(fold.proving), len(fold.testing)) for fold in parts],
        label_with(plan, sums.rules),
        {error: certified_at(error, sums.rules) for error in plan.bounds},
    )


def _check(plan: Plan) -> None:
    where = "report"
    if ranks.active():
        fix = "run it without torchrun"
        raise ValueError(message(where, "one process", "several ranks", fix))
    check_alpha(where, plan.alpha)
    check_alpha(where, plan.delta, name="delta")
    errors = [check_alpha(where, error, name="max_error") for error in plan.max_errors]
    for name, values in (("max-error", errors), ("recalibrate", plan.methods)):
        if len(set(values)) < len(values):
            raise ValueError(message(where, f"every --{name} once", "one twice", "list it once"))
    for name, value, known in (
        ("variant", plan.variant, VARIANTS),
        *(("recalibrate", method, METHODS) for method in plan.methods),
    ):
        if value not in known:
            expected = f"a {name} among {', '.join(known)}"
            raise ValueError(message(where, expected, repr(value), "choose among them"))


def deal(pairs: list[Pair], plan: Plan) -> list[_Fold]:
    """The folds of a sweep with the same seed; of a fold's training images a part that refits."""
    count = len(pairs)
    if not 2 <= plan.folds <= count:
        expected = f"2 to {count} folds for {count} labelled images"
        if count < 2:
            expected = "at least 2 labelled images"
        got = f"{plan.folds}" if count >= 2 else f"{count}"
        fix = "pass another --folds, or label more images"
        raise ValueError(message("report", expected, got, fix))
    generator = torch.Generator().manual_seed(plan.seed)
    order = torch.randperm(count, generator=generator).tolist()
    parts = []
    for number in range(plan.folds):
        testing = set(order[number :: plan.folds])
        training = [place for place in order if place not in testing]
        some = round(plan.share * len(training))
        if not 0 < some < len(training):
            expected = f"a --recalibrate-share that splits {len(training)} images in two"
            fix = "choose another share, or label more images"
            raise ValueError(message("report", expected, f"{plan.share:g}", fix))
        shuffled = torch.randperm(len(training), generator=generator).tolist()
        fitting = {training[place] for place in shuffled[:some]}
        proving = sorted(set(training) - fitting)
        parts.append(
            _Fold(*([pairs[p] for p in sorted(part)] for part in (fitting, proving, testing)))
        )
    return parts


def _samples(pairs: list[Pair], count: int) -> list[Pair]:
    """Images evenly spread over the list."""
    count = min(count, len(pairs))
    return [pairs[(2 * number + 1) * len(pairs) // (2 * count)] for number in range(count)]


def _calibrator(
    run: _Run,
    partition: Tensor,
    alpha: float | str,
    images: int,
    background: int | None = None,
) -> Calibrator:
    return Calibrator(
        partition,
        alpha=alpha,
        background=background,
        num_classes=run.num_classes,
        max_images=images,
        ignore_index=VOID,
    )


def _families(
    run: _Run, fold: _Fold, names: Sequence[str], sums: _Sums, title: str
) -> dict[str, _Family]:
    """Refit, calibrate and certify on a fold's training images."""
    plan = run.plan
    maps, absent = _refit(run, fold, names, title)
    sums.absent.update(absent)
    pairs = [(name, background) for name in names for background in plan.backgrounds]
    strict = max(LEVELS, key=float)
    setting = {
        key: _calibrator(run, groups.image(run.grid), strict, len(fold.fitting), key[1])
        for key in pairs
    }
    partition = fixed_partition(plan.variant, run.grid, plan.block)
    images = len(fold.fitting) + len(fold.proving)
    making = {name: _calibrator(run, partition, plan.alphas[0], images) for name in names}
    for pair, probs, labels in run.images(fold.fitting, f"{title}, set levels"):
        for name, refit in maps.items():
            refitted = refit(probs)
            if name == RAW:
                making[name].update(probs, labels, ids=pair.image)
            for background in plan.backgrounds:
                setting[name, background].update(refitted, labels, ids=pair.image)
    proving = {
        key: Certifier(setting[key], delta=plan.delta, seed=plan.seed)
        for key in (pairs if plan.max_errors else [])
    }
    for pair, probs, labels in run.images(fold.proving, f"{title}, calibrate"):
        for name, refit in maps.items():
            refitted = refit(probs)
            making[name].update(refitted, labels, ids=pair.image)
            for background in plan.backgrounds if plan.max_errors else []:
                proving[name, background].update(refitted, labels, ids=pair.image)
    families = {}
    for name, refit in maps.items():
        thresholds = [making[name].compute(alpha).threshold for alpha in plan.alphas]
        certified = {
            (background, error): _at(proving[name, background], error)
            for background in plan.backgrounds
            for error in plan.bounds
        }
        families[name] = _Family(refit, torch.stack(thresholds), certified)
    return families


def _at(certifier: Certifier, max_error: float) -> Calibration:
    """The losses are those of the images, whatever bound they are held against."""
    certifier.max_error = max_error
    return certifier.compute()


def _refit(
    run: _Run, fold: _Fold, names: Sequence[str], title: str
) -> tuple[dict[str, Map], set[int]]:
    """How every kind of scores is made from the model's."""
    plan = run.plan
    made = {
        name: RecalibrationOptions(name, context=plan.context, scores=plan.scores).recalibrator(
            run.num_classes, plan.seed
        )
        for name in names
        if name != RAW
    }
    if made:
        for _, probs, labels in run.images(fold.fitting, f"{title}, refit"):
            for each in made.values():
                each.update(probs, labels)
    fitted = {name: each.fit().to(run.source.device) for name, each in made.items()}
    absent = {k for each in fitted.values() for k in each.absent}
    return {RAW: lambda probs: probs, **fitted}, absent


def _measure(
    run: _Run,
    fold: _Fold,
    families: dict[str, _Family],
    sums: _Sums,
    whole: Calibrator,
    shown: Sequence[Pair],
    title: str,
) -> None:
    """Count everything on the fold's other images."""
    plan, width, device = run.plan, run.num_classes, run.source.device
    constants = torch.tensor([1 - c for c in CONFIDENCES], dtype=torch.float64).float().to(device)
    counted: dict[Rule, Tensor] = {}
    inside = {name: torch.zeros(len(plan.alphas), dtype=torch.int64) for name in families}
    tallies = {name: Reliability(width, device=device) for name in families}

    def count(rule: Rule, confusion: Tensor) -> None:
        counted[rule] = counted.get(rule, 0) + confusion.cpu()

    for pair, probs, labels in run.images(fold.testing, f"{title}, measure"):
        truth = labels.to(torch.int64)
        void = truth == VOID
        whole.update(probs, labels, ids=pair.image)
        present = torch.bincount(truth[~void].cpu(), minlength=width) > 0
        sums.images_of_class += present
        for name, family in families.items():
            refitted = family.refit(probs)
            tallies[name].update(refitted, labels)
            evidences = {b: evidence(refitted, background=b) for b in plan.backgrounds}
            plain = evidences[None]
            raw = confusion_matrix(plain.argmax(), truth, num_classes=width, with_ignored=True)
            count(Rule(name, "argmax"), raw)
            for level, one in zip(
                CONFIDENCES, confusion_per_alpha(plain, truth, constants), strict=True
            ):
                count(Rule(name, "confidence", None, level), one)
            here = to_image(family.thresholds, (truth.shape[0], truth.shape[1]))
            index = truth.masked_fill(void, 0).unsqueeze(0)
            p_true = refitted.gather(0, index)[0].masked_fill(void, torch.nan)
            inside[name] += coverage_counts(p_true, here).cpu()
            for background, one in evidences.items():
                for alpha, matrix in zip(
                    plan.alphas, confusion_per_alpha(one, truth, here), strict=True
                ):
                    count(Rule(name, "eq4", background, alpha), matrix)
            for (background, level), certified in family.certified.items():
                chosen = certified.pseudo_labels(evidences[background])
                matrix = confusion_matrix(chosen, truth, num_classes=width, with_ignored=True)
                count(Rule(name, "certified", background, level), matrix)
            if pair in shown:
                _show(sums, pair, truth, name, family, evidences, plan)
    for name, tally in tallies.items():
        sums.reliability[name].append(tally)
    for rule, confusion in counted.items():
        _file(sums.rules.setdefault(rule, Measured()), rule, confusion, families, inside, plan)


def _file(
    measured: Measured,
    rule: Rule,
    confusion: Tensor,
    families: dict[str, _Family],
    inside: dict[str, Tensor],
    plan: Plan,
) -> None:
    """Add a fold's figures to a rule's."""
    measured.confusion.append(confusion)
    hit, infinite = math.nan, math.nan
    if rule.kind == "eq4":
        place = plan.alphas.index(rule.level or 0.0)
        hit = float(inside[rule.scores][place])
        infinite = float(families[rule.scores].thresholds[place].isposinf().double().mean())
    measured.inside.append(hit)
    measured.infinite.append(infinite)
    if rule.kind == "certified":
        proven = families[rule.scores].certified[rule.background, rule.level or 0.0].certificate
        assert proven is not None
        measured.certificates.append(proven)


def _show(
    sums: _Sums,
    pair: Pair,
    truth: Tensor,
    name: str,
    family: _Family,
    evidences: dict[int | None, Evidence],
    plan: Plan,
) -> None:
    """Keep the labels of an image that the page will show."""
    panel = next((panel for panel in sums.panels if panel.image == pair.image), None)
    if panel is None:
        panel = Panel(pair.image, truth.to(torch.uint8).cpu(), {})
        sums.panels.append(panel)
    here = to_image(family.thresholds, (truth.shape[0], truth.shape[1]))
    asked = here[plan.alphas.index(plan.asked)]
    labels = {Rule(name, "argmax"): evidences[None].argmax()}
    for level in CONFIDENCES:
        limit = float(1 - level)
        labels[Rule(name, "confidence", None, level)] = evidences[None].pseudo_labels(limit)
    for background, one in evidences.items():
        labels[Rule(name, "eq4", background, plan.asked)] = one.pseudo_labels(asked)
    for (background, level), certified in family.certified.items():
        chosen = certified.pseudo_labels(evidences[background])
        labels[Rule(name, "certified", background, level)] = chosen
    panel.labels.update({rule: each.to(torch.uint8).cpu() for rule, each in labels.items()})
