"""The job ``cpseg audit``: draws pixels of a finished label folder, and reads people's answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpseg._internal.checks import check_alpha, message, name_file_in_errors
from cpseg._internal.safe_files import locked, write_text
from cpseg._version import __version__
from cpseg.calibration.calibration import Calibration
from cpseg.certification.audit import MOST_ANSWERS, AuditPlan, AuditResult, audit_sample
from cpseg.certification.finite_bounds import (
    average_answers,
    best_looks,
    fixed_number,
    number_at_any_time,
    rough_number,
)
from cpseg.core.selection import Evidence
from cpseg.files.audit_files import Question, merge_answers, read_answers
from cpseg.files.dataset import Progress, ScoreFolder, Source, quiet
from cpseg.files.id_lists import Pair, read_ids
from cpseg.files.masks import VOID, read_mask
from cpseg.files.run_folder import output_path
from cpseg.jobs.settings import AuditSettings
from cpseg.jobs.sources import as_calibrated

_PLAN = "plan.json"
_ANY_CLASS = 255  # a label folder may hold every value below void


@dataclass(frozen=True)
class Labels:
    """A finished label folder.

    Attributes:
        out: the folder.
        root: the folder that image paths are relative to.
        masks: the mask of every image, in the order of ``ids.txt``.
        probs: the folder of score files that the labels were made from, if it is known.
        others: those of further models.
        features: the folder of an encoder's features, if there was one.
    """

    out: Path
    root: Path
    masks: Mapping[str, Path]
    probs: Path | None
    others: tuple[Path, ...] = ()
    features: Path | None = None

    @classmethod
    def open(cls, out: str | Path, root: str | Path | None = None) -> Labels:
        """The folder that ``cpseg label`` wrote, or another with masks and an ``ids.txt``.

        Raises:
            ValueError: it has no list of masks, or does not say where the images are.
            OSError: a file that cannot be read.
        """
        out = Path(out)
        if not (out / "ids.txt").exists():
            expected = "a folder that cpseg label has finished"
            fix = "run cpseg label to its end, or write ids.txt with a line 'image mask' per image"
            raise ValueError(message(str(out), expected, "one without ids.txt", fix))
        facts = _facts(out)
        if root is None and "root" not in facts:
            fix = "pass the folder of the images as --root"
            expected, got = "a run.json that names the images' folder", "none that does"
            raise ValueError(message(str(out), expected, got, fix))
        base = Path(facts["root"] if root is None else root)
        masks = {}
        for pair in read_ids(out / "ids.txt"):
            own = output_path(out / "masks", pair.image, ".png")
            if pair.mask is None and not own.exists():
                expected, got = f"a mask of {pair.image}", "none"
                fix = "write a line 'image mask' per image"
                raise ValueError(message(str(out / "ids.txt"), expected, got, fix))
            masks[pair.image] = own if own.exists() else base / str(pair.mask)
        probs, features = (
            Path(facts[name]) if facts.get(name) is not None else None
            for name in ("probs", "features")
        )
        return cls(out, base, masks, probs, tuple(map(Path, facts.get("others", ()))), features)

    def read(self, image: str) -> Tensor:
        """The labels of an image, uint8 ``[H, W]``."""
        return read_mask(self.masks[image], num_classes=_ANY_CLASS, size=None)

    def fingerprint(self) -> str:
        """A digest of all names and masks."""
        whole = hashlib.sha256()
        for image, path in self.masks.items():
            whole.update(f"{image}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        return whole.hexdigest()[:16]


def _facts(out: Path) -> dict[str, Any]:
    try:
        facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


class Audit(NamedTuple):
    """A plan in its folder.

    Attributes:
        plan: what was drawn.
        folder: where the plan, the page and the lists are.
        labels: what was drawn from.
        is_new: whether it was drawn just now; else it was there.
    """

    plan: AuditPlan
    folder: Path
    labels: Labels
    is_new: bool

    @property
    def questions(self) -> list[Question]:
        """The draws as questions, numbered in their order."""
        return [
            Question(number, draw.image, draw.row, draw.column, draw.label)
            for number, draw in enumerate(self.plan.draws)
        ]


def plan_audit(
    out: str | Path,
    settings: AuditSettings,
    *,
    folder: str | Path | None = None,
    progress: Progress = quiet,
) -> Audit:
    """Draw the pixels of a label folder, or take the plan that is there.

    Args:
        out: a finished label folder.
        settings: how to draw and to look.
        folder: where to write ``plan.json``; by default ``audit`` in ``out``.
        progress: wraps the loop over images.

    Raises:
        ValueError: bad settings or files, a plan with other settings or for labels that changed
            since, or another audit at work in the folder.
        OSError: a file that cannot be read or written.
    """
    labels = Labels.open(out, settings.root)
    place = labels.out / "audit" if folder is None else Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    try:
        with locked(place / "audit.lock"):
            if (place / _PLAN).exists():
                found = _read_plan(place, labels)
                _check_settings(place, found, settings)
                return Audit(found, place, labels, False)
            plan = _drawn(labels, settings, progress)
            content = {"cpseg": __version__, "audit": 1, "plan": plan.to_json()}
            write_text(place / _PLAN, json.dumps(content, indent=1) + "\n")
            return Audit(plan, place, labels, True)
    except BlockingIOError as error:
        expected, got = "no other audit at work", "one that draws at this moment"
        fix = "wait for it, or choose another folder with -o"
        raise ValueError(message(str(place), expected, got, fix)) from error


def open_audit(
    out: str | Path, *, root: str | Path | None = None, folder: str | Path | None = None
) -> Audit:
    """The plan that is there, for labels that are as they were.

    Raises:
        ValueError: no plan or a damaged one, or labels that changed since.
        OSError: a file that cannot be read.
    """
    labels = Labels.open(out, root)
    place = labels.out / "audit" if folder is None else Path(folder)
    if not (place / _PLAN).exists():
        fix = "draw the pixels first: cpseg audit without --answers"
        raise ValueError(message(str(place), "a plan.json", "none", fix))
    return Audit(_read_plan(place, labels), place, labels, False)


def _read_plan(place: Path, labels: Labels) -> AuditPlan:
    path = place / _PLAN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fix = "use the file as cpseg audit wrote it"
        raise ValueError(message(str(path), "a plan", "a damaged file", fix)) from error
    stored = content.get("plan") if isinstance(content, dict) else None
    plan = AuditPlan.from_json(stored, where=str(path))
    if plan.folder != labels.fingerprint():
        expected, got = "the labels that the pixels were drawn from", "others"
        fix = f"audit the new labels with -o, or remove {place}"
        raise ValueError(message(str(labels.out), expected, got, fix))
    return plan


def _check_settings(place: Path, plan: AuditPlan, settings: AuditSettings) -> None:
    """A plan goes on only with the settings that it was drawn with."""
    wanted: dict[str, Any] = {
        "design": settings.design,
        "looking": settings.looking,
        "max_error": float(check_alpha("audit", settings.max_error, name="max_error")),
        "delta": float(check_alpha("audit", settings.delta, name="delta")),
    }
    for name in ("seed", "expected_error"):
        if getattr(settings, name) is not None:
            wanted[name] = getattr(settings, name)
    for name, value in wanted.items():
        if getattr(plan, name) != value:
            expected = f"the plan's {name.replace('_', ' ')} {getattr(plan, name)}"
            fix = "leave it as it was, or choose another folder with -o"
            raise ValueError(message(str(place), expected, str(value), fix))
    if settings.answers is not None:
        had = [stratum.answers for stratum in plan.strata]
        if settings.design == "focus":
            drawn = [settings.answers]
        else:
            drawn = [min(settings.answers, stratum.size) for stratum in plan.strata]
        if had != drawn:
            expected = f"the plan's {max(had)} answers"
            fix = "leave them as they were, or choose another folder with -o"
            raise ValueError(message(str(place), expected, str(settings.answers), fix))


def suggested_error(labels: Labels, max_error: float) -> float | None:
    """The error that the certification images suggest, if the labels came with a certificate.

    Between 0.2 and 0.6 of the bound: above that no reasonable number of answers certifies it.
    """
    path = labels.out / "calibration.safetensors"
    certificate = Calibration.load(path).certificate if path.exists() else None
    if certificate is None or certificate.pooled_error is None:
        return None
    return min(max(certificate.pooled_error, 0.2 * max_error), 0.6 * max_error)


def _drawn(labels: Labels, settings: AuditSettings, progress: Progress) -> AuditPlan:
    images = list(labels.masks)
    pairs = [Pair(image, None) for image in images]
    # The first pass reads every image once: the bar goes along with it.
    waiting = iter(progress(pairs, len(pairs), "draw"))
    passed: set[str] = set()

    def read(image: str) -> Tensor:
        if image not in passed:
            passed.add(image)
            next(waiting, None)
        return labels.read(image)

    expected = settings.expected_error
    if expected is None:
        bound = float(check_alpha("audit", settings.max_error, name="max_error"))
        expected = suggested_error(labels, bound)
    plan = audit_sample(
        images,
        read,
        max_error=settings.max_error,
        delta=settings.delta,
        expected_error=expected,
        design=settings.design,
        looking=settings.looking,
        answers=settings.answers,
        certainty=_certainty(labels, settings) if settings.design == "focus" else None,
        folder=labels.fingerprint(),
        ignore_index=VOID,
        seed=settings.seed,
    )
    for _ in waiting:  # so that the bar ends
        pass
    return plan


def _certainty(labels: Labels, settings: AuditSettings) -> Callable[[str], Tensor]:
    """The probability of each label, recalibrated as it was when the labels were made."""
    probs, others, features = labels.probs, labels.others, labels.features
    if settings.probs is not None:
        probs, others, features = Path(settings.probs), (), None
    file = labels.out / "calibration.safetensors"
    if settings.calibration is not None:
        file = Path(settings.calibration)
    if probs is None or not file.exists():
        fix = "pass --probs and --calibration"
        raise ValueError(message(str(labels.out), "scores for --focus", "none recorded", fix))
    calibration = Calibration.load(file)
    source = Source(labels.root, probs, others=tuple(map(ScoreFolder, others)), features=features)
    source = as_calibrated("audit", source, calibration)
    files = source.locate([Pair(image, None) for image in labels.masks])
    of_image = {pair.image: each for pair, each in files.items()}

    def certainty(image: str) -> Tensor:
        scores = source.scores(of_image[image])
        with name_file_in_errors(of_image[image][0]):
            if isinstance(scores, Evidence):
                return scores.best.to(torch.float32)
            if calibration.recalibration is not None:
                scores = calibration.recalibration(scores)
            shown = labels.read(image).to(torch.int64)
            held = shown.masked_fill(shown == VOID, 0).unsqueeze(0)
            return scores.to(torch.float32).gather(0, held).squeeze(0)

    return certainty


# --- answers -----------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What the answers prove.

    Attributes:
        result: of the labels that were drawn from.
        stricter: of the folders of stricter rules, in the order given.
        people: how many files of answers there were.
        both: pixels that more than one person answered.
        disagreements: pixels with different answers, which count as wrong.
    """

    result: AuditResult
    stricter: tuple[tuple[Path, AuditResult], ...]
    people: int
    both: int
    disagreements: int


def read_audit(
    audit: Audit,
    answers: Sequence[str | Path],
    *,
    max_error: float | str | None = None,
    unsure: str = "wrong",
    stricter: Sequence[str | Path] = (),
) -> Outcome:
    """Read people's answers and bound the error.

    Args:
        audit: from :func:`open_audit`.
        answers: files of the page, CSV, or exports of Label Studio.
        max_error: another bound than the plan's.
        unsure: ``"wrong"`` or ``"skip"``, see :meth:`AuditPlan.result`.
        stricter: label folders of stricter rules on the same images.

    Raises:
        ValueError: answers that are not the plan's or not well-formed, a folder whose rule is not
            stricter.
        OSError: a file that cannot be read.
    """
    questions = audit.questions
    given = [read_answers(path, audit.plan.fingerprint, questions) for path in answers]
    merged = merge_answers(given)
    return _outcome(
        audit,
        merged.answers.answer,
        max_error,
        unsure,
        stricter,
        people=len(given),
        both=merged.both,
        disagreements=len(merged.disagreements),
    )


def audit_by_truth(
    audit: Audit,
    truth: str | Path,
    *,
    void: int = VOID,
    max_error: float | str | None = None,
    unsure: str = "wrong",
    stricter: Sequence[str | Path] = (),
) -> Outcome:
    """As :func:`read_audit`, with answers from masks; a void pixel cannot be told.

    Args:
        audit: from :func:`open_audit`.
        truth: an id list with the masks, or a folder with a mask for every image, laid out like the
            images.
        void: the value of void pixels in masks.
        max_error: another bound than the plan's.
        unsure: ``"wrong"`` or ``"skip"``.
        stricter: label folders of stricter rules on the same images.

    Raises:
        ValueError: an image without a mask, a mask of another size.
        OSError: a file that cannot be read.
    """
    truth = Path(truth)
    root = audit.labels.root
    listed = (
        {} if truth.is_dir() else {pair.image: pair.mask for pair in read_ids(truth, root=root)}
    )

    @lru_cache(maxsize=8)
    def mask_of(image: str) -> Tensor:
        if truth.is_dir():
            path = output_path(truth, image, ".png")
        elif listed.get(image) is not None:
            path = audit.labels.root / str(listed[image])
        else:
            fix = "list every image that has a drawn pixel"
            raise ValueError(message(str(truth), f"a mask of {image}", "none", fix))
        labels = audit.labels.read(image)
        size = (labels.shape[0], labels.shape[1])
        return read_mask(path, num_classes=_ANY_CLASS, ignore_index=void, size=size)

    words = {}
    for question in sorted(audit.questions, key=lambda question: question.image):
        true = int(mask_of(question.image)[question.row, question.column])
        word = "unsure" if true == void else "yes" if true == question.label else "no"
        words[question.number] = word
    return _outcome(audit, words, max_error, unsure, stricter)


def _outcome(
    audit: Audit,
    words: Mapping[int, str],
    max_error: float | str | None,
    unsure: str,
    stricter: Sequence[str | Path],
    *,
    people: int = 1,
    both: int = 0,
    disagreements: int = 0,
) -> Outcome:
    bound = None
    if max_error is not None:
        bound = float(check_alpha("audit", max_error, name="max_error"))
    result = audit.plan.result(words, max_error=bound, unsure=unsure)
    others = []
    for folder in map(Path, stricter):
        inside, sizes, digest = _nested(audit, folder)
        plan = audit.plan.restricted(inside, sizes, digest)
        kept = [number for number, keeps in enumerate(inside) if keeps]
        own = {place: words[number] for place, number in enumerate(kept) if number in words}
        others.append((folder, plan.result(own, max_error=bound, unsure=unsure)))
    return Outcome(result, tuple(others), people, both, disagreements)


def _nested(audit: Audit, folder: Path) -> tuple[list[bool], dict[int, int], str]:
    """Which drawn pixels a stricter rule keeps, how many of each class, and its fingerprint."""
    other = Labels.open(folder, audit.labels.root)
    if list(other.masks) != list(audit.labels.masks):
        expected, got = f"the images of {audit.labels.out}", "others"
        fix = "label the same id list with both rules"
        raise ValueError(message(str(folder), expected, got, fix))
    inside: dict[int, bool] = {}
    counts = np.zeros(256, np.int64)
    of_image: dict[str, list[Question]] = {}
    for question in audit.questions:
        of_image.setdefault(question.image, []).append(question)
    for image in other.masks:
        loose, strict = audit.labels.read(image), other.read(image)
        if loose.shape != strict.shape or bool(((strict != VOID) & (strict != loose)).any()):
            expected, got = f"labels that {audit.labels.out} has too", f"others in {image}"
            fix = "pass the folder of a stricter rule, and draw from that of the loosest"
            raise ValueError(message(str(folder), expected, got, fix))
        counts += np.bincount(strict.numpy().ravel(), minlength=256)
        for question in of_image.get(image, ()):
            inside[question.number] = bool(strict[question.row, question.column] != VOID)
    sizes = {label: int(count) for label, count in enumerate(counts) if count and label != VOID}
    return [inside[number] for number in range(len(inside))], sizes, other.fingerprint()


# --- what it costs -----------------------------------------------------------------------------


class Cost(NamedTuple):
    """Answers that certify a bound with a chance of 90 %, where ``error`` of the labels are wrong.

    ``planned`` are those of the last planned look, ``average`` is what planned looks take on
    average; ``any_time`` is for looking after every answer.
    """

    error: float
    fixed: int
    planned: int
    average: float
    any_time: int


def costs(labels: Labels, settings: AuditSettings) -> list[Cost]:
    """What a uniform draw costs at several errors, before anything is drawn or answered."""
    bound = float(check_alpha("audit", settings.max_error, name="max_error"))
    delta = float(check_alpha("audit", settings.delta, name="delta"))
    size = sum(int((labels.read(image) != VOID).sum()) for image in labels.masks)
    if size == 0:
        fix = "audit a folder whose rule keeps some"
        raise ValueError(message(str(labels.out), "at least one label kept", "none", fix))
    errors = {0.2 * bound, 0.4 * bound, 0.6 * bound}
    own = settings.expected_error
    own = suggested_error(labels, bound) if own is None else own
    if own is not None and 0 < own < bound:
        errors.add(own)
    found = []
    for error in sorted(errors):
        if rough_number(size, bound, delta, error) > MOST_ANSWERS:
            continue  # as audit_sample refuses it
        fixed = fixed_number(size, bound, delta, error)
        looks = best_looks(size, bound, delta, error)
        average = average_answers(size, looks, error)
        any_time = number_at_any_time(size, bound, delta, error)
        found.append(Cost(error, fixed, looks[-1].answers, average, any_time))
    if not found:
        expected, got = f"a bound that {MOST_ANSWERS:,} answers certify", f"{bound:g}"
        raise ValueError(message("audit", expected, got, "raise the bound"))
    return found
