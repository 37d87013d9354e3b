"""The job behind ``cpseg report``: every figure, from labelled images alone.

The folds and the rules that need no certificate are those of :mod:`cpseg.jobs.cross_validation`.
Here the same images also certify rules, and more is counted on the test images: constant
confidences, reliability, and labels for the sample images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from cpseg._internal import distributed as ranks
from cpseg._internal.checks import check_alpha, check_background, check_choice, message
from cpseg.calibration.calibration import Calibration
from cpseg.calibration.calibrator import Calibrator
from cpseg.calibration.provenance import Provenance, SourceImages
from cpseg.certification.certifier import ALPHAS as LEVELS
from cpseg.certification.certifier import Certifier
from cpseg.core.metrics import confusion_matrix
from cpseg.core.nested_rules import confusion_per_alpha
from cpseg.core.reliability import Reliability
from cpseg.files.dataset import LabelledImages, Progress, Source, announce, quiet
from cpseg.files.id_lists import Pair
from cpseg.files.masks import VOID
from cpseg.files.splits import count_of_share, drawn_order
from cpseg.jobs.cross_validation import (
    PLAIN,
    Counts,
    Fold,
    FoldFit,
    Scoring,
    Tested,
    Trial,
    measure_fold,
)
from cpseg.jobs.labellings import OWN, Labelling, labellings_to_try
from cpseg.jobs.seen_images import check_unseen, cross_fitted
from cpseg.jobs.sources import names_beside
from cpseg.jobs.variants import FIXED, fixed_partition
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

PARTS = 20  # of the images, over all folds: what differs between them is noise
Certified = dict[tuple[str, int | None, float], Calibration]  # by scores, background and bound


@dataclass
class _Sums:
    """What the folds add to."""

    rules: dict[Rule, Measured]
    reliability: dict[str, list[Reliability]]
    images_of_class: Tensor
    panels: list[Panel] = field(default_factory=list)
    absent: set[int] = field(default_factory=set)


def gather(source: Source, ids: str | Path, plan: Plan, *, progress: Progress = quiet) -> Findings:
    """Measure every rule of a plan on the labelled images of an id list.

    Args:
        source: the data set and the probabilities; evidence is refused.
        ids: id list of labelled images.
        plan: what to try.
        progress: wraps the loops over images.

    Raises:
        ValueError: bad settings or files, too few images for the folds, or several processes.
        OSError: a file that cannot be read.
    """
    check_plan(plan)
    pairs = source.read_ids(ids)
    check_unseen("report", source, pairs)
    fitted = {each.folder for each in cross_fitted(source, pairs)}
    first_seen = cross_fitted(replace(source, others=()), pairs)  # eq. 4 on all images reads it
    student = next((n for n, f in enumerate(source.folders) if f.name in fitted), None)
    images = LabelledImages.open(source, pairs, progress=progress)
    if plan.names is None:
        plan = replace(plan, names=names_beside(source, images.num_classes) or None)
    return measure(images, plan, student=student, first_seen=first_seen)


def measure(
    images: LabelledImages,
    plan: Plan,
    *,
    student: int | None,
    first_seen: tuple[SourceImages, ...] = (),
) -> Findings:
    """Measure every rule of a plan on images that are open; see :func:`gather`.

    Args:
        images: the labelled images.
        plan: what to try; without bounds to certify where a source is a student's.
        student: the source that was trained on these images and scores them out of fold.
        first_seen: the first source, if it is that.
    """
    if student is not None and plan.max_errors:
        plan = replace(plan, max_errors=())  # such scores certify nothing on these images
    source, pairs, progress = images.source, images.pairs, images.progress
    folds, sources = deal(pairs, plan), _names(images.source)
    check_background("report", plan.background, images.num_classes)
    if plan.names is not None and len(plan.names) != images.num_classes:
        expected, got = f"{images.num_classes} class names as in the scores", f"{len(plan.names)}"
        raise ValueError(message("report", expected, got, "write one name per line, in order"))
    names = [RAW, *(name for name in plan.methods if name != RAW)]
    trial = _trial(plan, names, images)
    passes = 2 if plan.max_errors else 1
    announce(
        progress, sum(sum(map(len, fold)) + passes * len(fold.recalibrating) for fold in folds)
    )
    whole = _calibrator(trial, plan.variant, plan.alpha, len(pairs))
    of_class = torch.zeros(images.num_classes, dtype=torch.int64)
    sums = _Sums({}, {name: [] for name in names}, of_class)
    shown = _samples(pairs, plan.samples)
    for number, fold in enumerate(folds):
        title = f"fold {number + 1}/{plan.folds}"
        _measure(images, fold, number, trial, plan, sums, whole, shown, title)
    places = {pair.image: place for place, pair in enumerate(shown)}
    return Findings(
        plan,
        images.num_classes,
        len(pairs),
        sums.images_of_class,
        sums.rules,
        sums.reliability,
        replace(whole.compute(), extra=Provenance(sources=first_seen)),
        sorted(sums.panels, key=lambda panel: places[panel.image]),
        tuple(sorted(sums.absent)),
        [(len(fold.recalibrating), len(fold.calibrating), len(fold.testing)) for fold in folds],
        label_with(sums.rules, sources, student),
        {error: certified_at(error, sums.rules) for error in plan.bounds},
        sources,
        student,
        {labelling.in_words(sources): labelling for labelling in trial.labellings},
        len(source.models),
    )


def check_plan(plan: Plan) -> None:
    """Refuse settings of the wrong range, and several ranks.

    Raises:
        ValueError: such a setting.
    """
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
    check_choice(where, plan.variant, FIXED, name="a variant", fix="choose among them")
    for method in plan.methods:
        check_choice(where, method, METHODS, name="a recalibrate", fix="choose among them")


def _trial(plan: Plan, names: list[str], images: LabelledImages) -> Trial:
    """The rules without a certificate, for the engine."""
    return Trial(
        scorings=[Scoring(name, 0.0) for name in names],
        variants=(plan.variant,),
        backgrounds=plan.backgrounds,
        alphas=plan.exact_alphas,
        num_classes=images.num_classes,
        size=plan.grid or images.size,
        block=plan.block,
        num_groups=0,
        context=plan.context,
        scores=plan.scores,
        seed=plan.seed,
        classes=images.sources,
        projection=images.source.projection,
        colour=images.source.colour,
        labellings=[
            labelling
            for labelling in labellings_to_try(
                images.sources,
                images.num_classes,
                features=images.source.features is not None,
                methods=plan.methods,
                prior_powers=plan.prior_powers,
                subsets=plan.subsets,
            )
            if labelling != Labelling(OWN, (0,))  # the raw argmax, measured anyway
        ],
    )


def _names(source: Source) -> tuple[str, ...]:
    """Names of the sources: those of the folders where they differ."""
    folders = [*source.folders, *([] if source.features is None else [source.features])]
    names = [folder.name for folder in folders]
    return tuple(names if len(set(names)) == len(names) else map(str, folders))


def deal(pairs: list[Pair], plan: Plan) -> list[Fold]:
    """The folds of a sweep with the same seed; some training images of each recalibrate."""
    generator = torch.Generator().manual_seed(plan.seed)
    order = drawn_order("report", len(pairs), plan.folds, generator)
    folds = []
    for number in range(plan.folds):
        testing = set(order[number :: plan.folds])
        training = [place for place in order if place not in testing]
        fix = "choose another share, or label more images"
        option = "--recalibrate-share"
        count = count_of_share("report", option, plan.share, len(training), fix)
        shuffled = torch.randperm(len(training), generator=generator).tolist()
        recalibrating = {training[place] for place in shuffled[:count]}
        calibrating = set(training) - recalibrating
        parts = (recalibrating, calibrating, testing)
        folds.append(Fold([], *([pairs[place] for place in sorted(part)] for part in parts)))
    return folds


def _samples(pairs: list[Pair], count: int) -> list[Pair]:
    """Images evenly spread over the list."""
    count = min(count, len(pairs))
    return [pairs[(2 * number + 1) * len(pairs) // (2 * count)] for number in range(count)]


def _calibrator(
    trial: Trial, variant: str, alpha: float | str, images: int, background: int | None = None
) -> Calibrator:
    return Calibrator(
        fixed_partition(variant, trial.size, trial.block),
        alpha=alpha,
        background=background,
        num_classes=trial.num_classes,
        max_images=images,
        ignore_index=VOID,
    )


class _Certifiers:
    """One certifier per scoring and background, all bounds at once.

    The images for recalibration set the thresholds, those for calibration certify.
    """

    def __init__(self, images: LabelledImages, fold: Fold, trial: Trial, plan: Plan) -> None:
        self._plan = plan
        self._keys = [(s, b) for s in trial.scorings for b in trial.backgrounds]
        strict, count = max(LEVELS, key=float), len(fold.recalibrating)
        self._images, self._setting = images, fold.recalibrating
        self._calibrators = {
            (scoring, background): _calibrator(trial, "image", strict, count, background)
            for scoring, background in self._keys
        }
        self._certifiers: dict[tuple[Scoring, int | None], Certifier] = {}

    def set_thresholds(self, fit: FoldFit, title: str) -> None:
        """From the images for recalibration; needs the fold's recalibrations."""

        def mapped(probs: Tensor) -> Iterator[tuple[tuple[Scoring, int | None], Tensor]]:
            for scoring, recalibrate in fit.maps.items():
                recalibrated = recalibrate(probs)
                for background in self._plan.backgrounds:
                    yield (scoring, background), recalibrated

        def update(pair: Pair, probs: Tensor, labels: Tensor) -> None:
            for key, recalibrated in mapped(probs):
                self._calibrators[key].update(recalibrated, labels, ids=pair.image)

        def learn_order(pair: Pair, probs: Tensor, labels: Tensor) -> None:
            for key, recalibrated in mapped(probs):
                self._certifiers[key].learn_order(recalibrated, labels, ids=pair.image)

        self._images.feed(update, self._setting, f"{title}, set levels")
        self._certifiers = {
            key: Certifier(
                self._calibrators[key],
                delta=self._plan.delta,
                per=self._plan.per,
                seed=self._plan.seed,
            )
            for key in self._keys
        }
        self._images.feed(learn_order, self._setting, f"{title}, choose the order of tests")

    def update(self, pair: Pair, scoring: Scoring, probs: Tensor, labels: Tensor) -> None:
        """Take an image for the certificates."""
        for background in self._plan.backgrounds:
            self._certifiers[scoring, background].update(probs, labels, ids=pair.image)

    def compute(self) -> Certified:
        """The losses are those of the images, whatever bound they are compared with."""
        return {
            (scoring.recalibrate, background, bound): certifier.compute(max_error=bound)
            for (scoring, background), certifier in self._certifiers.items()
            for bound in self._plan.bounds
        }


def _measure(
    images: LabelledImages,
    fold: Fold,
    number: int,
    trial: Trial,
    plan: Plan,
    sums: _Sums,
    whole: Calibrator,
    shown: list[Pair],
    title: str,
) -> None:
    """Make a fold's rules and count everything on its test images."""
    width, device = trial.num_classes, images.source.device
    constants = torch.tensor([1 - c for c in CONFIDENCES], dtype=torch.float64).float().to(device)
    fit = FoldFit(images, fold, trial, title)
    fit.recalibrate()
    sums.absent.update(fit.absent)
    certified: Certified = {}
    if plan.max_errors:
        certifiers = _Certifiers(images, fold, trial, plan)
        certifiers.set_thresholds(fit, title)
        rules = fit.calibrate(also=certifiers.update)
        certified = certifiers.compute()
    else:
        rules = fit.calibrate()
    counted: dict[Rule, Tensor] = {}
    reliability = {s.recalibrate: Reliability(width, device=device) for s in trial.scorings}

    def count(rule: Rule, confusion: Tensor) -> None:
        counted[rule] = counted.get(rule, 0) + confusion.cpu()

    def also(tested: Tested) -> None:
        name, truth = tested.scoring.recalibrate, tested.truth
        if tested.scoring == PLAIN:
            whole.update(tested.probs, truth, ids=tested.pair.image)
            present = torch.bincount(truth[truth != VOID].cpu(), minlength=width) > 0
            sums.images_of_class += present
        reliability[name].update(tested.probs, truth)
        by_constant = confusion_per_alpha(tested.evidence[None], truth, constants)
        for confidence, confusion in zip(CONFIDENCES, by_constant, strict=True):
            count(Rule(name, "confidence", None, confidence), confusion)
        for (scores, background, bound), calibration in certified.items():
            if scores == name:
                labels = calibration.pseudo_labels(tested.evidence[background])
                confusion = confusion_matrix(labels, truth, num_classes=width, with_ignored=True)
                count(Rule(name, "certified", background, bound), confusion)
        if tested.pair in shown:
            _show(sums, tested, certified, plan, _names(images.source))

    for part in _parts(fold.testing, plan.folds):
        counted.clear()
        counts = measure_fold(images, fold._replace(testing=part), trial, rules, title, also)
        for scoring in trial.scorings:
            _file(sums, number, scoring, counts, counted, certified, plan)
        for labelling, confusion in counts.labellings.items():
            rule = Rule(labelling.in_words(_names(images.source)), "labels")
            sums.rules.setdefault(rule, Measured()).add(confusion, fold=number)
    for name, tally in reliability.items():
        sums.reliability[name].append(tally)


def _parts(testing: list[Pair], folds: int) -> list[list[Pair]]:
    """The test images of a fold in parts of about the same number, by which noise is judged."""
    count = min(len(testing), math.ceil(PARTS / folds))
    return [testing[place::count] for place in range(count)]


def _file(
    sums: _Sums,
    number: int,
    scoring: Scoring,
    counts: Counts,
    counted: dict[Rule, Tensor],
    certified: Certified,
    plan: Plan,
) -> None:
    """Add the counts of a part of a fold to those of the rules, in the order of the page."""

    def add(
        rule: Rule, confusion: Tensor, covered: float = math.nan, infinite: float = math.nan
    ) -> Measured:
        measured = sums.rules.setdefault(rule, Measured())
        measured.add(confusion, covered, infinite, fold=number)
        return measured

    name = scoring.recalibrate
    add(Rule(name, "argmax"), counts.argmax[scoring])
    for confidence in CONFIDENCES:
        rule = Rule(name, "confidence", None, confidence)
        add(rule, counted[rule])
    for b, background in enumerate(plan.backgrounds):
        for a, alpha in enumerate(plan.alphas):
            covered, infinite = counts.covered[scoring][0, a], counts.infinite[scoring][0, a]
            confusion = counts.eq4[scoring][0, b, a]
            rule = Rule(name, "eq4", background, alpha)
            add(rule, confusion, float(covered), float(infinite))
    for (scores, background, bound), calibration in certified.items():
        if scores == name and calibration.certificate is not None:
            rule = Rule(name, "certified", background, bound)
            measured = add(rule, counted[rule])
            if len(measured.certificates) == number:
                measured.certificates.append(calibration.certificate)


def _show(
    sums: _Sums, tested: Tested, certified: Certified, plan: Plan, sources: Sequence[str]
) -> None:
    """Keep the labels of an image that the page will show."""
    panel = next((panel for panel in sums.panels if panel.image == tested.pair.image), None)
    if panel is None:
        panel = Panel(tested.pair.image, tested.truth.to(torch.uint8).cpu(), {})
        sums.panels.append(panel)
    name, evidence = tested.scoring.recalibrate, tested.evidence
    labels = {Rule(name, "argmax"): evidence[None].argmax()}
    for labelling, label in tested.labellings.items():
        labels[Rule(labelling.in_words(sources), "labels")] = label
    for confidence in CONFIDENCES:
        limit = float(1 - confidence)
        labels[Rule(name, "confidence", None, confidence)] = evidence[None].pseudo_labels(limit)
    for background, each in evidence.items():
        for alpha, threshold in zip(plan.alphas, tested.thresholds[plan.variant], strict=True):
            labels[Rule(name, "eq4", background, alpha)] = each.pseudo_labels(threshold)
    for (scores, background, bound), calibration in certified.items():
        if scores == name:
            chosen = calibration.pseudo_labels(evidence[background])
            labels[Rule(name, "certified", background, bound)] = chosen
    panel.labels.update({rule: each.to(torch.uint8).cpu() for rule, each in labels.items()})
