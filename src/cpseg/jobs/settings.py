"""What a job is asked to do: one frozen object in place of a dozen keywords."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from cpseg._internal import words
from cpseg._internal.checks import message
from cpseg.jobs.recalibrate import RecalibrationOptions
from cpseg.jobs.variants import FIXED, Grouping

ALPHAS = words.ALPHAS  # those that sweep and report try

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class CalibrationSettings:
    """How :func:`cpseg.jobs.calibrate` calibrates.

    Attributes:
        alpha: miscoverage rate; None for no thresholds: every pixel gets its most probable class,
            and a recalibration is fitted on all images.
        background: index of the dominant class to suppress, or None.
        grouping: which cells share a threshold.
        per_class: separate thresholds for every class.
        score: the nonconformity score; pseudo-labels need ``"lac"``.
        unit: what is exchangeable in a pooled group, ``"pixel"`` or ``"image"``.
        fallback: cells whose threshold is infinite take that of their block, and where that is
            infinite too that of the image.
        recalibration: how the probabilities are recalibrated first, or None.
        seed: seed of all draws and of the learning of groups.
    """

    alpha: float | str | None
    background: int | None
    grouping: Grouping = field(default_factory=Grouping)
    per_class: bool = False
    score: str = "lac"
    unit: str = "pixel"
    fallback: bool = False
    recalibration: RecalibrationOptions | None = None
    seed: int = 0


@dataclass(frozen=True)
class CertificationSettings:
    """How :func:`cpseg.jobs.certify` certifies.

    Attributes:
        background: index of the dominant class to suppress, or None.
        max_error: the bound on the error.
        delta: 1 - confidence.
        grouping: which cells share a threshold; groups cannot be learned here.
        method: ``"ltt"`` or ``"crc"``, see :class:`cpseg.Certifier`.
        per: ``"labels"`` or ``"image"``, what ``"ltt"`` bounds.
        pvalue: ``"betting"`` or ``"hoeffding-bentkus"``.
        per_class: a separate alpha for every class.
        calibrate_share: share of the images, drawn with ``seed``, that sets the thresholds; the
            others are used for certification.
        calibration_ids: id list of images that set the thresholds instead; all images of the
            other list are then used for certification.
        recalibration: how the probabilities are recalibrated first, or None: on all images that
            set the thresholds. A certificate needs no more than that neither step saw the images
            used for certification.
        seed: seed of the draw and of the order in which images are bet on.
    """

    background: int | None
    max_error: float | str = 0.05
    delta: float | str = 0.1
    grouping: Grouping = field(default_factory=lambda: Grouping("image"))
    method: str = "ltt"
    per: str = "labels"
    pvalue: str = "betting"
    per_class: bool = False
    calibrate_share: float = 0.2
    calibration_ids: str | Path | None = None
    recalibration: RecalibrationOptions | None = None
    seed: int = 0


@dataclass(frozen=True)
class AuditSettings:
    """How :func:`cpseg.jobs.plan_audit` draws pixels of a label folder and looks at answers.

    Attributes:
        max_error: the bound on the share of wrong labels.
        delta: 1 - confidence.
        expected_error: the error that the number of pixels is planned for; by default that of the
            certification images, if the labels came with a certificate, else 0.4 of ``max_error``.
        design: ``"uniform"``, ``"by-class"`` or ``"focus"``, see
            :func:`cpseg.certification.audit_sample`.
        looking: ``"planned"``, ``"fixed"`` or ``"any"``.
        answers: how many pixels to draw in place of the planned number.
        root: the folder of the images; by default the one that the label folder records.
        probs: for ``"focus"``, the folder of score files; by default the one recorded.
        calibration: for ``"focus"``, the calibration; by default the one in the label folder.
        seed: of the draw; by default from the system.
    """

    max_error: float | str = 0.05
    delta: float | str = 0.1
    expected_error: float | None = None
    design: str = "uniform"
    looking: str = "planned"
    answers: int | None = None
    root: str | Path | None = None
    probs: str | Path | None = None
    calibration: str | Path | None = None
    seed: int | None = None


@dataclass(frozen=True)
class SweepSettings:
    """What :func:`cpseg.jobs.sweep` compares.

    Attributes:
        backgrounds: classes to suppress, each by itself; None where every class counts.
        alphas: miscoverage rates.
        variants: among ``"pixel"``, ``"image"``, ``"blocks"``, ``"kmeans"`` and ``"annuli"``.
        block: side of a block in cells.
        num_groups: number of learned groups.
        group_share: share of a fold's training images on which groups are learned; these are used
            for calibration only by the variants that learn nothing.
        recalibrate: methods of a :class:`cpseg.Recalibrator`; ``"none"`` is the model's own
            probabilities.
        prior_powers: tau in [0, 1], each with every method, see
            :meth:`cpseg.Recalibration.with_prior_power`.
        recalibrate_share: share of a fold's training images on which recalibrations are fitted;
            these are used for calibration only with the model's own probabilities.
        context: ``"auto"`` or parts of the context, for ``"vector"`` and ``"dirichlet"``.
        scores: ``"softmax"`` or ``"sigmoid"``, the kind of the model's probabilities.
        folds: number of parts, each used for testing once.
        seed: seed of the folds, of those shares, of the learning and of the sampled pixels.
        grid: height and width of the grid; by default the size of the first listed image.
    """

    backgrounds: tuple[int | None, ...]
    alphas: tuple[float | str, ...] = ALPHAS
    variants: tuple[str, ...] = FIXED
    block: int = 32
    num_groups: int = 8
    group_share: float = 0.3
    recalibrate: tuple[str, ...] = ("none",)
    prior_powers: tuple[float, ...] = (0.0,)
    recalibrate_share: float = 0.3
    context: str | tuple[str, ...] = "auto"
    scores: str = "softmax"
    folds: int = 5
    seed: int = 0
    grid: tuple[int, int] | None = None


_OLD_NAMES = {"refit": "recalibration"}
_GROUPING = tuple(each.name for each in fields(Grouping))


def settings_of(
    where: str, kind: type[Settings], settings: Settings | None, keywords: Mapping[str, Any]
) -> Settings:
    """The settings object that was given, or one made of its fields given as keywords.

    Fields of a :class:`Grouping` may be given directly, ``variant="blocks"``.

    Raises:
        TypeError: both or neither were given, a field is missing or unknown.
    """
    if settings is not None:
        if keywords or not isinstance(settings, kind):
            got = ", ".join(keywords) if keywords else type(settings).__name__
            raise TypeError(message(where, f"a {kind.__name__} alone", got, "put all into it"))
        return settings
    values = {_OLD_NAMES.get(name, name): value for name, value in keywords.items()}
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    if "grouping" in known:
        parts = {name: values.pop(name) for name in _GROUPING if name in values}
        if parts and "grouping" not in values:
            variant = {} if kind is CalibrationSettings else {"variant": "image"}
            values["grouping"] = Grouping(**variant | parts)
    unknown = sorted(set(values) - set(known))
    if unknown:
        expected = f"settings among {', '.join(known)}"
        raise TypeError(message(where, expected, unknown[0], "see the settings' documentation"))
    try:
        return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})
    except TypeError as error:
        got = str(error).partition("missing ")[2] or "none"
        fix = "pass it, or the fields as keywords"
        raise TypeError(message(where, f"a {kind.__name__}", f"none of {got}", fix)) from error
