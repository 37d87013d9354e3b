"""``audit_sample``: pixels drawn at random among all labels kept."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpseg._internal.checks import (
    check_alpha,
    check_choice,
    check_count,
    is_whole,
    message,
    shape,
)
from cpseg.certification.audit_plan import DESIGNS, LOOKING, AuditPlan, Draw, Stratum
from cpseg.certification.finite_bounds import (
    best_looks,
    fixed_number,
    number_at_any_time,
    planned_looks,
    rough_number,
)
from cpseg.certification.p_values import Floats
from cpseg.certification.weighted_bounds import bets_for

MOST_ANSWERS = 20_000  # that are planned; at 4 seconds an answer three days
_BINS = 200  # of predicted errors
_UNIFORM_PART = 0.5  # of a focused draw: no pixel weighs more than its inverse
Certainty = Callable[[str], Tensor]


def audit_sample(
    images: Sequence[str],
    read: Callable[[str], Tensor],
    *,
    max_error: float | str = 0.05,
    delta: float | str = 0.1,
    expected_error: float | None = None,
    design: str = "uniform",
    looking: str = "planned",
    answers: int | None = None,
    certainty: Certainty | None = None,
    folder: str = "",
    ignore_index: int = 255,
    seed: int | None = None,
) -> AuditPlan:
    """Draw pixels at random among all labels kept.

    - ``"uniform"``: every label with the same chance, without replacement.
    - ``"by-class"``: as many of each class, so that rare classes get a bound of their own; all
      labels together from the classes by their sizes. A class with fewer labels than answers is
      asked about whole.
    - ``"focus"``: uncertain labels more often, with replacement; answers are weighed by the
      inverse of their chance.

    Args:
        images: names, each once.
        read: the labels of an image, uint8 or int64 ``[H, W]``, ``ignore_index`` where none is
            kept. Called once per image, and again for images with a drawn pixel.
        max_error: the bound that is to be certified.
        delta: 1 - confidence.
        expected_error: the error for which the number of answers is planned: with it the bound is
            certified with a chance of 90 %. By default 0.4 of ``max_error``.
        design: one of :data:`DESIGNS`.
        looking: one of :data:`LOOKING`.
        answers: how many pixels to draw (of each class, by class), in place of the planned number;
            with ``"planned"`` as three looks.
        certainty: of a focused draw: the predicted chance that a label is right, float in [0, 1]
            ``[H, W]``. It may be as wrong as it likes; then more answers are needed.
        folder: fingerprint of the labels, kept in the plan.
        ignore_index: the label of pixels that keep none.
        seed: of the draw; by default from the system, since a draw must not be known before the
            labels are made.

    Raises:
        ValueError: no label kept, a value outside its range, an image twice, labels that change
            between two reads, a focused draw without certainty, a plan of more than 20,000 answers.
        TypeError: labels that are not integer.

    Guarantee:
        For the labels as they are and answers that are right: with probability at least
        1 - delta over the draw, the share of wrong labels is at most ``AuditResult.bound``, for
        the way of looking of the plan. Nothing is assumed about images or labels.

    Reference:
        Olofsson et al. (2014), Good practices for estimating area and assessing accuracy of land
        change. Bounds: Clopper & Pearson (1934), Lan & DeMets (1983), Waudby-Smith & Ramdas
        (2020, 2024).

    Example:
        >>> mask = torch.zeros(100, 100, dtype=torch.uint8)
        >>> audit_sample(["a"], lambda name: mask, expected_error=0.01, seed=0)
        AuditPlan(uniform, planned, 120 of 10000 labels, bound 5 %, 90 % confidence)
    """
    where = "audit_sample"
    bound, risk = (
        float(check_alpha(where, value, name=name))
        for name, value in (("max_error", max_error), ("delta", delta))
    )
    expected = 0.4 * bound if expected_error is None else float(expected_error)
    if not 0 <= expected < bound:
        fix = "give the error that you expect, below the bound"
        text = f"expected_error in [0, {bound:g})"
        raise ValueError(message(where, text, f"{expected:g}", fix))
    check_choice(where, design, DESIGNS, name="design")
    check_choice(where, looking, LOOKING, name="looking")
    if answers is not None:
        check_count(where, answers, name="answers", fix="pass how many pixels to draw")
    if len(set(images)) != len(images):
        raise ValueError(message(where, "every image once", "one twice", "name each once"))
    if design == "focus" and certainty is None:
        fix = "pass the probability of each label"
        raise ValueError(message(where, "certainty for a focused draw", "None", fix))
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    if not is_whole(seed, 0):
        raise ValueError(message(where, "seed a whole number, 0 or more", repr(seed), "pass one"))
    found = [_counts(where, name, read(name), ignore_index) for name in images]
    counts = np.stack(found) if found else np.zeros((0, 256), np.int64)
    if not counts.any():
        fix = "audit a folder whose rule keeps some"
        raise ValueError(message(where, "at least one label kept", "none", fix))
    source = random.Random(seed)
    base = AuditPlan(
        folder,
        design,
        looking,
        bound,
        risk,
        expected,
        seed,
        len(images),
        int(counts.sum()),
        (),
        (),
    )
    if design == "focus":
        assert certainty is not None
        if answers is None:
            _check_cost(where, base.labels, bound, risk, expected)
        return _focused(where, base, images, read, certainty, answers, source, ignore_index)
    classes = np.flatnonzero(counts.sum(0)) if design == "by-class" else [None]
    each = risk / len(classes)
    if answers is None:
        largest = counts.sum(0).max() if design == "by-class" else counts.sum()
        _check_cost(where, int(largest), bound, each, expected)
    strata, drawn = [], []
    for label in classes:
        of_image = counts.sum(1) if label is None else counts[:, label]
        size = int(of_image.sum())
        stratum = _stratum(base, None if label is None else int(label), size, each, answers)
        strata.append(stratum)
        ranks = source.sample(range(size), stratum.answers)
        place = np.searchsorted(of_image.cumsum(), ranks, side="right")
        before = of_image.cumsum() - of_image
        drawn.append(
            [
                (int(image), None if label is None else int(label), int(rank - before[image]))
                for image, rank in zip(place, ranks, strict=True)
            ]
        )
    # By class: one of each class in turn, so that a look at all of them comes early.
    turns = itertools.chain.from_iterable(itertools.zip_longest(*drawn))
    order = [each for each in turns if each is not None]
    sizes = {stratum.label: stratum.size for stratum in strata}
    draws = _looked_up(where, images, read, order, ignore_index, sizes)
    return replace(base, strata=tuple(strata), draws=tuple(draws))


def _check_cost(where: str, size: int, bound: float, delta: float, expected: float) -> None:
    """Refuse a plan that no person answers, which would take minutes to make as well."""
    about = rough_number(size, bound, delta, expected)
    if about > MOST_ANSWERS:
        wanted = f"a plan of at most {MOST_ANSWERS:,} answers"
        fix = f"expect fewer wrong than {100 * expected:g} %, raise the bound, or pass the answers"
        raise ValueError(message(where, wanted, f"one of about {about:,.0f}", fix))


def _counts(where: str, name: str, labels: Tensor, ignore_index: int) -> npt.NDArray[np.int64]:
    """How many labels of each value an image keeps, int64 ``[256]``."""
    numbers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not numbers or labels.ndim != 2:
        expected = "integer labels [H, W] from read"
        got = f"{labels.dtype} {shape(labels)} for '{name}'"
        raise TypeError(message(where, expected, got, "read class indices"))
    flat = labels.flatten().to(torch.int64)
    flat = flat[flat != ignore_index]
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) <= 255:
        expected, got = "labels from 0 to 255", f"others in '{name}'"
        raise ValueError(message(where, expected, got, "read class indices"))
    return np.bincount(flat.cpu().numpy(), minlength=256).astype(np.int64)


def _stratum(
    plan: AuditPlan, label: int | None, size: int, delta: float, answers: int | None
) -> Stratum:
    """How many to draw and when to look."""
    bound, expected = plan.max_error, plan.expected_error
    if plan.looking == "any":
        number = answers or number_at_any_time(size, bound, delta, expected)
        return Stratum(label, size, min(number, size), ())
    if answers is not None:
        number = min(answers, size)
        times = [number]
        if plan.looking == "planned":
            times = sorted({max(1, round(part * number)) for part in (0.5, 0.75, 1.0)})
        looks = planned_looks(size, bound, delta, times, 1.0)
    elif plan.looking == "fixed":
        number = fixed_number(size, bound, delta, expected)
        looks = planned_looks(size, bound, delta, [number], 1.0)
    else:
        looks = best_looks(size, bound, delta, expected)
    return Stratum(label, size, looks[-1].answers, looks)


def _looked_up(
    where: str,
    images: Sequence[str],
    read: Callable[[str], Tensor],
    order: Sequence[tuple[int, int | None, int]],
    ignore_index: int,
    sizes: Mapping[int | None, int],
) -> list[Draw]:
    """The pixels of (image, class, rank among its labels), in that order; every image read once."""
    found: dict[int, Draw] = {}
    for image, group in _by_image(order):
        labels = read(images[image]).cpu().numpy()
        flat = labels.ravel()
        places_of = {
            label: np.flatnonzero(flat != ignore_index if label is None else flat == label)
            for label in {label for _, label, _ in group}
        }
        for number, label, rank in group:
            places = places_of[label]
            if rank >= len(places):
                expected, got = "labels that stay as they are", f"others in '{images[image]}'"
                raise ValueError(message(where, expected, got, "draw when they are complete"))
            row, column = divmod(int(places[rank]), labels.shape[1])
            shown = int(labels[row, column])
            found[number] = Draw(images[image], row, column, shown, 1 / sizes[label])
    return [found[number] for number in range(len(order))]


def _by_image(
    order: Sequence[tuple[int, int | None, int]],
) -> Iterator[tuple[int, list[tuple[int, int | None, int]]]]:
    """The numbers, classes and ranks of every image that was drawn."""
    numbered = sorted(
        (image, number, label, rank) for number, (image, label, rank) in enumerate(order)
    )
    for image, group in itertools.groupby(numbered, key=lambda entry: entry[0]):
        yield image, [(number, label, rank) for _, number, label, rank in group]


def _focused(
    where: str,
    plan: AuditPlan,
    images: Sequence[str],
    read: Callable[[str], Tensor],
    certainty: Certainty,
    answers: int | None,
    source: random.Random,
    ignore_index: int,
) -> AuditPlan:
    """Draw with a chance that grows with the square root of the predicted error."""

    def predicted(name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], Tensor]:
        labels = read(name)
        sure = certainty(name)
        if sure.shape != labels.shape:
            expected, got = f"certainty {shape(labels)} of '{name}'", shape(sure)
            raise ValueError(message(where, expected, got, "give one number per pixel"))
        places = np.flatnonzero((labels != ignore_index).cpu().numpy().ravel())
        error = 1 - sure.detach().cpu().double().flatten().numpy()[places]
        return places, np.nan_to_num(error, nan=1.0).clip(0, 1), labels

    sums = []
    errors = np.zeros(_BINS)
    for name in images:
        _, error, _ = predicted(name)
        sums.append((len(error), float(error.sum()), float(np.sqrt(error).sum())))
        errors += np.histogram(error, _BINS, (0.0, 1.0))[0]
    total = np.array(sums)
    roots, mean = float(total[:, 2].sum()), float(total[:, 1].sum()) / plan.labels
    stratum = Stratum(None, plan.labels, 0, ())
    number = answers or number_at_any_time(
        plan.labels, plan.max_error, plan.delta, plan.expected_error
    )
    part = _UNIFORM_PART if roots > 0 else 1.0
    picks = _picks(number, total[:, 0], total[:, 2], part, source)
    found: dict[int, Draw] = {}
    for image, group in itertools.groupby(sorted(picks), key=lambda pick: pick.image):
        places, error, labels = predicted(images[image])
        root = np.sqrt(error).cumsum()
        for pick in group:
            rank = int(pick.place * len(places))
            if not pick.even:
                rank = int(np.searchsorted(root, pick.place * root[-1], side="right"))
            rank = min(rank, len(places) - 1)
            row, column = divmod(int(places[rank]), labels.shape[1])
            of_roots = math.sqrt(error[rank]) / roots if roots > 0 else 0.0
            chance = part / plan.labels + (1 - part) * of_roots
            label = int(labels[row, column])
            found[pick.number] = Draw(images[image], row, column, label, chance, float(error[rank]))
    return replace(
        plan,
        strata=(stratum._replace(answers=number),),
        draws=tuple(found[each] for each in range(number)),
        mean_predicted=mean,
        largest_weight=1 / part,
        bets=tuple(map(float, _focused_bets(plan, errors, part, mean))),
    )


class _Pick(NamedTuple):
    """An image, the number of the draw, whether all its labels are alike, and a place in [0, 1)."""

    image: int
    number: int
    even: bool
    place: float


def _picks(
    count: int, labels: Floats, roots: Floats, part: float, source: random.Random
) -> list[_Pick]:
    """In which images the pixels lie, by their numbers of labels or by their sums of roots."""
    picks = []
    for number in range(count):
        even = source.random() < part
        running = (labels if even else roots).cumsum()
        image = int(np.searchsorted(running, source.random() * float(running[-1]), side="right"))
        picks.append(_Pick(min(image, len(labels) - 1), number, even, source.random()))
    return picks


def _focused_bets(plan: AuditPlan, errors: Floats, part: float, mean: float) -> Floats:
    """Bets for answers that are as wrong as predicted, scaled to the error that is expected."""
    centre = (np.arange(_BINS) + 0.5) / _BINS
    roots = np.sqrt(centre) / max(float(errors @ np.sqrt(centre)) / plan.labels, 1e-9)
    scaled = (centre * plan.expected_error / max(mean, 1e-9)).clip(max=1)
    spread = scaled * (1 - scaled) / (part + (1 - part) * roots)
    variance = float(errors @ spread) / plan.labels
    return bets_for(plan.max_error, plan.expected_error, variance, 1 / part + mean)
