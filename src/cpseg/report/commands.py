"""The commands that make a rule of a report: calibrate or certify, label, audit."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cpseg.files.dataset import Source
from cpseg.files.masks import VOID
from cpseg.jobs.labellings import OWN, Labelling
from cpseg.report.findings import RAW, Findings, Plan, Rule

CALIBRATION, LABELS = "rule.safetensors", "pseudo"


@dataclass(frozen=True)
class DataWords:
    """How a data set is named on the command line.

    Attributes:
        root: words that name its root.
        ids: the id list of labelled images.
        models: for every model the words that name its scores, and how they are read.
        features: words that name an encoder's features, and the list that they are projected with.
        masks: words that say how masks are stored.
        unlabelled: the id list of images to label.
    """

    root: tuple[str, ...]
    ids: str
    models: tuple[tuple[str, ...], ...]
    features: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    unlabelled: str = "unlabelled.txt"

    @classmethod
    def of(
        cls,
        source: Source,
        ids: str | Path,
        *,
        unlabelled: str | Path | None = None,
        class_maps: Sequence[Path | None] | None = None,
        mask_map: Path | None = None,
        palette: str | Path | None = None,
    ) -> DataWords:
        """Those of a source.

        Args:
            source: the data set.
            ids: the id list of labelled images.
            unlabelled: that of the images to label; by default the source's.
            class_maps: the file of every model's class map, which a source does not know.
            mask_map: the file of its mask map, likewise.
            palette: the file of its palette, likewise. Where these are not given, a name to be
                replaced stands for them.
        """
        listed = str(unlabelled or source.unlabelled or "unlabelled.txt")
        root = ["--root", str(source.root)]
        root += [] if source.device == "cpu" else ["--device", source.device]
        features: list[str] = []
        if source.features is not None:
            features = ["--features", str(source.features), "--unlabelled", listed]
            features += ["--components", str(source.components)]
        stored = source.mask_format
        masks = [] if stored.void == VOID else ["--void", str(stored.void)]
        if stored.map is not None:
            masks += ["--mask-map", str(mask_map or "MASK_MAP.json")]
        if stored.palette is not None:
            masks += ["--palette", str(palette or "PALETTE.json")]
        if stored.first_class:
            masks += ["--first-class", str(stored.first_class)]
        if source.masks is not None:
            masks += ["--masks", str(source.masks)]
        models = _model_words(source, class_maps or [None] * len(source.models))
        return cls(tuple(root), str(ids), models, tuple(features), tuple(masks), listed)


def _model_words(source: Source, maps: Sequence[Path | None]) -> tuple[tuple[str, ...], ...]:
    """For every model its scores and, where one has any, its class map and how they are stored."""
    models, found = source.models, []
    for model in models:
        found.append(["--probs", str(model.probs)])
    if any(model.class_map is not None for model in models):
        for words, model, path in zip(found, models, maps, strict=True):
            named = "none" if model.class_map is None else str(path or "CLASS_MAP.json")
            words += ["--class-map", named]
    for option, values, default in (
        ("--layout", [model.reading.layout for model in models], "chw"),
        ("--logits", [model.reading.logits or "no" for model in models], "no"),
        ("--upsample", ["yes" if model.reading.upsample else "no" for model in models], "no"),
    ):
        if set(values) != {default}:
            for words, value in zip(found, values, strict=True):
                words += [option, value]
    return tuple(map(tuple, found))


@dataclass(frozen=True)
class _Making:
    """What a rule reads, and how it is made.

    Attributes:
        models: the places of the models used.
        features: whether an encoder's features are used.
        colour: whether the images' colours are used.
        words: further words of ``cpseg calibrate`` or ``certify``.
        subcommand: which of the two.
    """

    models: tuple[int, ...]
    features: bool
    colour: bool
    words: tuple[str, ...]
    subcommand: str = "calibrate"


def commands_of(
    findings: Findings, rule: Rule, data: DataWords, *, colour: bool = False
) -> list[list[str]]:
    """The words of the commands that make the labels of a rule and plan their audit.

    Args:
        findings: those of the report.
        rule: any of its rules but a constant confidence, which no command makes.
        data: how the data set is named.
        colour: whether the images' colours are a source of every map.

    Raises:
        ValueError: a constant confidence.
    """
    made = _making(findings, rule, colour)
    models = [data.models[model] for model in made.models]
    features = data.features if made.features else ()
    first = ["cpseg", made.subcommand, *data.root, "--ids", data.ids]
    first += [word for model in models for word in model]
    first += [*features, *(["--colour"] if made.colour else []), *data.masks, *made.words]
    second = ["cpseg", "label", *data.root, "--ids", data.unlabelled]
    second += [word for model in models for word in _without_map(model)]
    if "--masks" in data.masks:
        place = data.masks.index("--masks")
        second += data.masks[place : place + 2]
    second += [*features[:2], "--calibration", CALIBRATION, "--labelled", data.ids]
    return [
        [*first, "-o", CALIBRATION],
        [*second, "-o", LABELS],
        ["cpseg", "audit", LABELS, "--plan"],
    ]


def next_commands(
    findings: Findings,
    source: Source,
    ids: str | Path,
    *,
    rule: Rule | None = None,
    data: DataWords | None = None,
) -> list[str]:
    """The lines for a terminal that make the labels of a rule.

    Args:
        findings: those of the report.
        source: the data set.
        ids: the id list of labelled images.
        rule: one of the report; the one recommended to label with by default.
        data: how the data set is named, where more is known than the source says.

    Returns:
        One line for each command; none where the student's own labels are recommended, since a
        student is then trained on the labelled images alone.
    """
    rule = findings.label_with if rule is None else rule
    if rule == findings.students_own:
        return []
    words = DataWords.of(source, ids) if data is None else data
    return [shlex.join(each) for each in commands_of(findings, rule, words, colour=source.colour)]


def _making(findings: Findings, rule: Rule, colour: bool) -> _Making:
    plan = findings.plan
    models = tuple(range(findings.num_models))
    features = len(findings.sources) > len(models)
    if rule.kind == "labels":
        labelling = findings.labellings[rule.scores]
        return _labelling(labelling, plan, len(models), colour)
    if rule.kind == "argmax" and rule.scores != RAW:
        labelling = Labelling(rule.scores, tuple(range(len(findings.sources))))
        return _labelling(labelling, plan, len(models), colour)
    background = "none" if rule.background is None else str(rule.background)
    words = ["--background", background]
    if rule.kind == "argmax":
        return _Making((0,), False, False, (*words, "--alpha", "none"))
    recalibrated = rule.scores != RAW
    if recalibrated:
        words += _recalibration(rule.scores, plan, models)
    if rule.kind == "eq4":
        words += ["--alpha", f"{rule.level:g}", *_variant(plan)]
        if recalibrated:
            words += ["--recalibrate-share", f"{plan.share:g}"]
        made = "calibrate"
    elif rule.kind == "certified":
        delta = findings.delta_of_one
        words += ["--max-error", f"{rule.level:g}", "--delta", f"{delta}", "--per", plan.per]
        words += ["--calibrate-share", f"{plan.share:g}"]
        made = "certify"
    else:
        raise ValueError(f"commands: expected a rule that a command makes, got {rule.name}")
    if not recalibrated:
        models, features, colour = (0,), False, False
    return _Making(models, features, colour, tuple(words), made)


def _labelling(labelling: Labelling, plan: Plan, num_models: int, colour: bool) -> _Making:
    """One label for every pixel; the map is fitted on all labelled images."""
    models = tuple(source for source in labelling.sources if source < num_models)
    every = ("--background", "none", "--alpha", "none")
    if labelling.method == OWN:
        return _Making(models, False, False, every)
    words = [*every, *_recalibration(labelling.method, plan, models)]
    if labelling.prior_power:
        words += ["--prior-power", f"{labelling.prior_power:g}"]
    return _Making(models, num_models in labelling.sources, colour, tuple(words))


def _recalibration(method: str, plan: Plan, models: Sequence[int]) -> list[str]:
    words = ["--recalibrate", method]
    if plan.context != "auto" and method in ("vector", "dirichlet", "trees"):
        words += ["--context", ",".join(plan.context) or "none"]
    kinds = plan.scores.split(",")
    used = [kinds[model if len(kinds) > 1 else 0] for model in models]
    if set(used) != {"softmax"}:
        words += ["--scores", ",".join(used) if len(set(used)) > 1 else used[0]]
    return words


def _variant(plan: Plan) -> list[str]:
    words = ["--variant", plan.variant]
    if plan.variant == "blocks":
        words += ["--block", str(plan.block)]
    if plan.grid is not None:
        words += ["--grid", "x".join(map(str, plan.grid))]
    return words


def _without_map(model: Sequence[str]) -> list[str]:
    """A model's words without its class map, which the calibration carries."""
    kept = list(model)
    if "--class-map" in kept:
        place = kept.index("--class-map")
        del kept[place : place + 2]
    return kept
