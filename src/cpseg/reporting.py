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

from cpseg import groups, ranks
from cpseg.calibration import Calibrator
from cpseg.certificate import Certificate
from cpseg.certifying import VARIANTS
from cpseg.checks import check_alpha, check_background, message
from cpseg.evaluation import row_of
from cpseg.jobs import fixed, labelled
from cpseg.levels import confusions, hits
from cpseg.metrics import confusion_matrix
from cpseg.recommendation import Candidate, Certified, choose_certified, recommend
from cpseg.reliability import Reliability
from cpseg.risk import ALPHAS as LEVELS
from cpseg.risk import Certifier
from cpseg.selection import Evidence, evidence
from cpseg.sources import IGNORE, Progress, Source, naming, quiet
from cpseg.store import Pair, read_ids
from cpseg.sweep_table import Estimate
from cpseg.sweeping import ALPHAS
from cpseg.thresholds import Calibration

RAW = "none"  # the scores as the model gives them
METHODS = (RAW, "temperature", "vector", "dirichlet")
CONFIDENCES = (0.95, 0.9, 0.8, 0.7, 0.5)  # constant ones, strictest first
KINDS = ("argmax", "confidence", "eq4", "certified")
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Plan:
    """What a report tries.

    Attributes:
        background: index of the dominant class that suppression would be for, or None.
        alpha: miscoverage rate of eq. 4.
        variant: how cells share its thresholds, ``"pixel"``, ``"image"`` or ``"blocks"``.
        block: side of a block in cells.
        folds: number of parts, each measured once.
        seed: of all draws.
        max_errors: bounds on the mean error of an image to certify, each for itself.
        delta: 1 - confidence of these.
        methods: how scores are refitted; ``"none"`` is always measured.
        share: of a fold's training images, those that refit the scores and set certified levels.
        samples: number of images to show.
        grid: height and width of the grid; by default the size of the first listed image.
    """

    background: int | None
    alpha: str = "0.05"
    variant: str = "pixel"
    block: int = 32
    folds: int = 5
    seed: int = 0
    max_errors: tuple[str, ...] = ("0.05", "0.1")
    delta: str = "0.1"
    methods: tuple[str, ...] = (RAW, "dirichlet")
    share: float = 0.25
    samples: int = 4
    grid: tuple[int, int] | None = None

    @property
    def backgrounds(self) -> list[int | None]:
        """Without suppression, then with it if there is a background."""
        return [None] if self.background is None else [None, self.background]

    @property
    def alphas(self) -> list[str]:
        """Those of the sweep and the one asked for, the largest (strictest) first."""
        exact = {check_alpha("report", alpha): alpha for alpha in (*ALPHAS, self.alpha)}
        return [exact[alpha] for alpha in sorted(exact, reverse=True)]


class Rule(NamedTuple):
    """A way to choose labels.

    Attributes:
        scores: ``"none"`` for the model's own, else how they were refitted.
        kind: ``"argmax"``, ``"confidence"``, ``"eq4"`` or ``"certified"``.
        background: the class that selection suppresses, or None.
        level: the least confidence, alpha, or the bound on the error; None for ``"argmax"``.
    """

    scores: str
    kind: str
    background: int | None = None
    level: float | None = None

    @property
    def name(self) -> str:
        """The rule in words."""
        if self == Rule(RAW, "argmax"):
            return "raw argmax"
        what = {
            "argmax": "argmax",
            "confidence": f"confidence {self.level:g} or more" if self.level else "",
            "eq4": f"eq. 4 at alpha {self.level:g}" if self.level else "",
            "certified": f"certified {100 * (self.level or 0):g} % error",
        }[self.kind]
        by = "raw scores" if self.scores == RAW else f"recalibrated scores ({self.scores})"
        suppressed = "" if self.background is None else f", class {self.background} suppressed"
        return f"{what}{suppressed}, {by}"


@dataclass
class Measured:
    """What a rule did in every fold.

    Attributes:
        confusion: int64 ``[K, K + 1]`` a fold; the last column counts pixels without a label.
        inside: pixels whose class is in the prediction set, a fold; NaN for rules without sets.
        infinite: share of thresholds that are +inf, a fold; NaN for rules without thresholds.
        certificates: those of a certified rule, a fold.
    """

    confusion: list[Tensor] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    infinite: list[float] = field(default_factory=list)
    certificates: list[Certificate] = field(default_factory=list)

    def values(self, name: str) -> list[float]:
        """A figure of :class:`cpseg.evaluation.Row`, or ``"error"``, in every fold.

        ``"error"`` is the share of all pixels that do not carry their true label.
        """
        if name == "error":
            return [float(1 - c.diagonal().sum() / c.sum().double()) for c in self.confusion]
        found = []
        for confusion, inside in zip(self.confusion, self.inside, strict=True):
            pixels = 0.0 if math.isnan(inside) else float(confusion.sum())
            sets = torch.tensor([inside, math.nan, pixels], dtype=torch.float64)
            found.append(float(getattr(row_of("", confusion, sets), name)))
        return found

    def estimate(self, name: str) -> Estimate:
        """Its mean and standard error over folds."""
        return Estimate.over(self.values(name))


class Panel(NamedTuple):
    """An image to show: labels are uint8 ``[H, W]``, made by a fold that did not train on it."""

    image: str
    truth: Tensor
    labels: dict[Rule, Tensor]


@dataclass
class Findings:
    """All that a report says.

    Attributes:
        plan: what was tried.
        num_classes: number of classes K.
        images: images measured, each once.
        images_of_class: int64 ``[K]``, how many of them show a class.
        rules: every rule measured.
        reliability: sums of a fold, by how its scores were refitted.
        calibration: eq. 4 on all images, for its threshold map.
        panels: images to show.
        used: images that refit or set levels, that calibrate and certify, and that measure, a fold.
        label_with: the rule recommended to label with.
        keep: for every bound on the error the certified rule recommended, None where there is none.
    """

    plan: Plan
    num_classes: int
    images: int
    images_of_class: Tensor
    rules: dict[Rule, Measured]
    reliability: dict[str, list[Reliability]]
    calibration: Calibration
    panels: list[Panel]
    used: list[tuple[int, int, int]]
    label_with: Rule = Rule(RAW, "argmax")
    keep: dict[float, Rule | None] = field(default_factory=dict)


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
            probs, labels = labelled(self.source, pair, self.paths[pair], self.num_classes)
            with naming(self.paths[pair]):
                yield pair, probs, labels


def gather(
    source: Source, ids: str | Path, plan: Plan, *, progress: Progress = quiet
) -> Findings:
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
    size = plan.grid or (first.shape[-2], first.shape[-1])
    run = _Run(source, plan, paths, len(first), size, progress)
    names = [RAW, *(name for name in plan.methods if name != RAW)]
    whole = _calibrator(run, fixed(plan.variant, size, plan.block), plan.alpha, len(pairs))
    found = Findings(
        plan,
        len(first),
        len(pairs),
        torch.zeros(len(first), dtype=torch.int64),
        {},
        {name: [] for name in names},
        whole.compute(),
        [],
        [(len(fold.fitting), len(fold.proving), len(fold.testing)) for fold in parts],
    )
    shown = _samples(pairs, plan.samples)
    for number, fold in enumerate(parts):
        title = f"fold {number + 1}/{plan.folds}"
        families = _families(run, fold, names, title)
        _measure(run, fold, families, found, whole, shown, title)
    found.panels.sort(key=lambda panel: [pair.image for pair in shown].index(panel.image))
    found.calibration = whole.compute()
    _recommend(found)
    return found


def _check(plan: Plan) -> None:
    where = "report"
    if ranks.active():
        fix = "run it without torchrun"
        raise ValueError(message(where, "one process", "several ranks", fix))
    check_alpha(where, plan.alpha)
    check_alpha(where, plan.delta, name="delta")
    errors = [check_alpha(where, error, name="max_error") for error in plan.max_errors]
    for name, values in (("max_error", errors), ("recalibrate", plan.methods)):
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
        ignore_index=IGNORE,
    )


def _families(run: _Run, fold: _Fold, names: Sequence[str], title: str) -> dict[str, _Family]:
    """Refit, calibrate and certify on a fold's training images."""
    plan = run.plan
    maps = _refit(run, fold, names, title)
    pairs = [(name, background) for name in names for background in plan.backgrounds]
    strict = max(LEVELS, key=float)
    setting = {
        key: _calibrator(run, groups.image(run.grid), strict, len(fold.fitting), key[1])
        for key in pairs
    }
    partition = fixed(plan.variant, run.grid, plan.block)
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
            (background, float(level)): _at(proving[name, background], level)
            for background in plan.backgrounds
            for level in plan.max_errors
        }
        families[name] = _Family(refit, torch.stack(thresholds), certified)
    return families


def _at(certifier: Certifier, max_error: str) -> Calibration:
    """The losses are those of the images, whatever bound they are held against."""
    certifier.max_error = float(max_error)
    return certifier.compute()


def _refit(run: _Run, fold: _Fold, names: Sequence[str], title: str) -> dict[str, Map]:
    from cpseg.recalibration import Recalibrator

    made = {
        name: Recalibrator(run.num_classes, method=name, seed=run.plan.seed)
        for name in names
        if name != RAW
    }
    if made:
        for _, probs, labels in run.images(fold.fitting, f"{title}, refit"):
            for each in made.values():
                each.update(probs, labels)
    return {RAW: lambda probs: probs, **{name: each.fit() for name, each in made.items()}}


def _measure(
    run: _Run,
    fold: _Fold,
    families: dict[str, _Family],
    found: Findings,
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
        void = truth == IGNORE
        whole.update(probs, labels, ids=pair.image)
        present = torch.bincount(truth[~void].cpu(), minlength=width) > 0
        found.images_of_class += present
        for name, family in families.items():
            refitted = family.refit(probs)
            tallies[name].update(refitted, labels)
            evidences = {b: evidence(refitted, background=b) for b in plan.backgrounds}
            plain = evidences[None]
            raw = confusion_matrix(plain.argmax(), truth, num_classes=width, with_ignored=True)
            count(Rule(name, "argmax"), raw)
            for level, one in zip(CONFIDENCES, confusions(plain, truth, constants), strict=True):
                count(Rule(name, "confidence", None, level), one)
            here = groups.to_image(family.thresholds, (truth.shape[0], truth.shape[1]))
            index = truth.masked_fill(void, 0).unsqueeze(0)
            p_true = refitted.gather(0, index)[0].masked_fill(void, torch.nan)
            inside[name] += hits(p_true, here).cpu()
            for background, one in evidences.items():
                for alpha, matrix in zip(
                    plan.alphas, confusions(one, truth, here), strict=True
                ):
                    count(Rule(name, "eq4", background, float(alpha)), matrix)
            for (background, level), certified in family.certified.items():
                chosen = certified.pseudo_labels(evidences[background])
                matrix = confusion_matrix(chosen, truth, num_classes=width, with_ignored=True)
                count(Rule(name, "certified", background, level), matrix)
            if pair in shown:
                _show(found, pair, truth, name, family, evidences, plan)
    for name, family in families.items():
        found.reliability[name].append(tallies[name])
    for rule, confusion in counted.items():
        _file(found.rules.setdefault(rule, Measured()), rule, confusion, families, inside, plan)


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
        place = [float(alpha) for alpha in plan.alphas].index(rule.level or 0.0)
        hit = float(inside[rule.scores][place])
        infinite = float(families[rule.scores].thresholds[place].isposinf().double().mean())
    measured.inside.append(hit)
    measured.infinite.append(infinite)
    if rule.kind == "certified":
        proven = families[rule.scores].certified[rule.background, rule.level or 0.0].certificate
        assert proven is not None
        measured.certificates.append(proven)


def _show(
    found: Findings,
    pair: Pair,
    truth: Tensor,
    name: str,
    family: _Family,
    evidences: dict[int | None, Evidence],
    plan: Plan,
) -> None:
    """Keep the labels of an image that the page will show."""
    panel = next((panel for panel in found.panels if panel.image == pair.image), None)
    if panel is None:
        panel = Panel(pair.image, truth.to(torch.uint8).cpu(), {})
        found.panels.append(panel)
    here = groups.to_image(family.thresholds, (truth.shape[0], truth.shape[1]))
    asked = here[[float(alpha) for alpha in plan.alphas].index(float(plan.alpha))]
    labels = {Rule(name, "argmax"): evidences[None].argmax()}
    for level in CONFIDENCES:
        limit = float(1 - level)
        labels[Rule(name, "confidence", None, level)] = evidences[None].pseudo_labels(limit)
    for background, one in evidences.items():
        labels[Rule(name, "eq4", background, float(plan.alpha))] = one.pseudo_labels(asked)
    for (background, level), certified in family.certified.items():
        chosen = certified.pseudo_labels(evidences[background])
        labels[Rule(name, "certified", background, level)] = chosen
    panel.labels.update({rule: each.to(torch.uint8).cpu() for rule, each in labels.items()})


def _recommend(found: Findings) -> None:
    """The rule to label with and, for every bound, the certified rule that keeps most."""
    plan = found.plan
    tried = [
        rule
        for name in found.reliability
        for rule in (
            Rule(name, "argmax"),
            *(Rule(name, "eq4", b, float(plan.alpha)) for b in plan.backgrounds),
        )
    ]
    candidates = [
        Candidate(rule.name, found.rules[rule].values("miou_all"), found.rules[rule].values("error"))
        for rule in tried
    ]
    found.label_with = tried[recommend(candidates)]
    for error in map(float, plan.max_errors):
        rules = [rule for rule in found.rules if rule[1] == "certified" and rule.level == error]
        place = choose_certified(
            [
                Certified(
                    rule.name,
                    [proven.certified for proven in found.rules[rule].certificates],
                    found.rules[rule].values("kept"),
                )
                for rule in rules
            ]
        )
        found.keep[error] = None if place is None else rules[place]
