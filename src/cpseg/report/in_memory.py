"""``recommend``: which labels to train on, from score maps in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpseg._internal.checks import check_alpha, check_count, check_share, is_whole, message, short
from cpseg.calibration.calibration import Calibration
from cpseg.calibration.provenance import SourceImages
from cpseg.core.channels import join_channels
from cpseg.files.memory import ImagesInMemory
from cpseg.jobs.calibrate import calibrate_images
from cpseg.jobs.labellings import OWN, Labelling
from cpseg.jobs.recalibrate import RecalibrationOptions
from cpseg.jobs.settings import CalibrationSettings
from cpseg.jobs.variants import Grouping
from cpseg.report.findings import RAW, Findings, Plan, Rule
from cpseg.report.measure import check_plan, measure
from cpseg.report.wording import advice, verdict

Scores = Tensor | Sequence[Tensor]


@dataclass(frozen=True, repr=False)
class Recommendation:
    """What :func:`recommend` found.

    Attributes:
        rule: the labels recommended, in words.
        labels_alone: whether a student should be trained on the labelled images alone.
        calibration: makes these labels, fitted on all labelled images.
        models: the places of the models that it reads.
        findings: all figures, as those of :mod:`cpseg.report`.
    """

    rule: str
    labels_alone: bool
    calibration: Calibration
    models: tuple[int, ...]
    findings: Findings

    def __repr__(self) -> str:
        return f"Recommendation({verdict(self.findings)})"

    def _repr_html_(self) -> str:
        return "".join(f"<p>{escape(text)}</p>" for text in self._texts())

    def summary(self) -> str:
        """What to do, what was measured and what is promised, a paragraph each."""
        return "\n\n".join(self._texts())

    def _texts(self) -> list[str]:
        return [verdict(self.findings), *advice(self.findings)]

    def pseudo_labels(self, scores: Scores) -> Tensor:
        """The labels of a new image.

        Args:
            scores: of all models that :func:`recommend` was given, ``[K, H, W]`` each.

        Returns:
            int64 ``[H, W]``, 255 for pixels without a label.
        """
        parts = _of_image("Recommendation.pseudo_labels", scores)
        used = [parts[model] for model in self.models]
        return self.calibration.pseudo_labels(join_channels(used))


def recommend(
    scores: Sequence[Scores],
    masks: Sequence[Tensor],
    *,
    background: int | None = None,
    alpha: float | str = 0.05,
    methods: Sequence[str] = (RAW, "dirichlet"),
    prior_powers: Sequence[float] = (0.0, 0.25, 0.5),
    context: str | Sequence[str] = "auto",
    folds: int = 5,
    names: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    student: int | None = None,
    seed: int = 0,
) -> Recommendation:
    """Which labels to train on, by cross-validation on labelled images in memory.

    What ``cpseg report`` does for files: every model as it is, maps over each and over all, prior
    powers, and eq. 4 of ConformalSAM at several alphas are measured on folds of the images, by maps
    and thresholds from the other folds. A rule is recommended in place of the raw argmax (or of the
    student's own labels) only where it is better beyond the noise of the folds. The figures of the
    one that comes first are a little too good, since it was chosen by them; nothing is promised
    about them. Nor does what the calibration promises take into account that its rule was chosen by
    the images that calibrate it.

    Args:
        scores: for every image the probabilities float ``[K, H, W]``, or those of several models.
        masks: for every image its labels, integers ``[H, W]``, void as 255.
        background: a dominant class whose suppression is tried (eq. 4), or None.
        alpha: miscoverage rate of eq. 4 beside those of the sweep.
        methods: of recalibration, see :class:`cpseg.Recalibrator`.
        prior_powers: tried with maps over all models.
        context: what maps see besides the scores of a pixel.
        folds: number of parts of the images.
        names: of the classes.
        models: names of the models; by default ``"model 0"`` and so on.
        student: the place of a model that is a student of these images and scored each of them
            without having seen it; pseudo-labels must then be better than its own.
        seed: of all draws.

    Raises:
        ValueError: bad settings, scores or masks, or too few images for the folds.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> masks = [torch.randint(3, (8, 8), generator=generator) for _ in range(8)]
        >>> wrong = [mask.roll(1, 0) if i % 4 else mask for i, mask in enumerate(masks)]
        >>> scores = [torch.nn.functional.one_hot(m, 3).movedim(2, 0) * 0.7 + 0.1 for m in wrong]
        >>> found = recommend(scores, masks, folds=2, context=(), methods=("none",))
        >>> found
        Recommendation(Label with the raw argmax: no other rule tried is a sure gain.)
        >>> torch.equal(found.pseudo_labels(scores[0]), masks[0])
        True
    """
    where = "recommend"
    parts = [_of_image(where, each) for each in _list(where, scores, "scores of every image")]
    truth = [_tensor(where, mask, "masks") for mask in _list(where, masks, "a mask of every image")]
    count = len(parts[0]) if parts else 1
    called = [f"model {place}" for place in range(count)]
    if models is not None:
        called = _words(where, models, "names of the models")
    if student is not None and (not is_whole(student, 0) or student >= count):
        fix = "pass its place among the models"
        raise ValueError(message(where, f"a student in 0..{count - 1}", short(student), fix))
    check_alpha(where, alpha)
    check_count(where, folds, name="folds", least=2, fix="the report has 5")
    check_count(where, seed, name="a seed", least=0, fix="pass 0")
    for power in _list(where, prior_powers, "prior powers"):
        check_share(where, power, name="prior powers", fix="pass 0 and 0.25")
    images = ImagesInMemory.of(where, parts, truth, called)
    plan = Plan(
        background,
        alpha=str(alpha),
        folds=folds,
        seed=seed,
        max_errors=(),
        methods=tuple(_words(where, methods, "methods")),
        prior_powers=tuple(prior_powers),
        context=context if isinstance(context, str) else tuple(_words(where, context, "context")),
        samples=0,
        names=None if names is None else tuple(_words(where, names, "names of the classes")),
    )
    check_plan(plan)
    findings = measure(images, plan, student=student)
    rule = findings.label_with
    settings, used = _settings(findings, rule)
    seen = (
        () if student not in used else (SourceImages(called[student or 0], len(truth), len(truth)),)
    )
    calibration = calibrate_images(images.of_models(used), settings, seen=seen)
    alone = student is not None and rule == findings.students_own
    return Recommendation(rule.name, alone, calibration, used, findings)


def _of_image(where: str, scores: object) -> list[Tensor]:
    parts = scores if isinstance(scores, (list, tuple)) else [scores]
    return [_tensor(where, part, "scores") for part in parts]


def _tensor(where: str, value: object, name: str) -> Tensor:
    if isinstance(value, (Tensor, np.ndarray)):
        return torch.as_tensor(value)
    fix = "convert them"
    raise TypeError(message(where, f"{name} as tensors or arrays", short(value), fix))


def _list(where: str, value: object, name: str) -> Sequence[Any]:
    if isinstance(value, (list, tuple)):
        return value
    raise TypeError(message(where, f"{name} in a list", short(value), "pass a list"))


def _words(where: str, value: object, name: str) -> list[str]:
    words = _list(where, value, name)
    if not all(isinstance(word, str) for word in words):
        raise TypeError(message(where, f"{name} as a list of words", short(value), "pass words"))
    return list(words)


def _settings(findings: Findings, rule: Rule) -> tuple[CalibrationSettings, tuple[int, ...]]:
    """How a rule is made of all labelled images, and the models that it reads."""
    plan = findings.plan
    every = tuple(range(findings.num_models))
    if rule.kind == "labels":
        labelling = findings.labellings[rule.scores]
    elif rule.kind == "argmax":
        labelling = Labelling(rule.scores, (0,) if rule.scores == RAW else every)
    else:
        options = RecalibrationOptions(rule.scores, share=plan.share, context=plan.context)
        recalibration = None if rule.scores == RAW else options
        grouping = Grouping(plan.variant, plan.block, grid=plan.grid)
        settings = CalibrationSettings(
            rule.level, rule.background, grouping, recalibration=recalibration, seed=plan.seed
        )
        return settings, (0,) if rule.scores == RAW else every
    options = RecalibrationOptions(
        labelling.method, context=plan.context, prior_power=labelling.prior_power
    )
    recalibration = None if labelling.method == OWN else options
    settings = CalibrationSettings(None, None, recalibration=recalibration, seed=plan.seed)
    return settings, labelling.sources
