"""``AuditPlan``: which pixels are asked about, and what the answers prove (``AuditResult``)."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from cpseg._internal import words
from cpseg._internal.checks import (
    check_alpha,
    check_choice,
    message,
)
from cpseg._internal.fields import among, list_of, rate, read_fields, share, whole
from cpseg._internal.fields import count as count_or_none
from cpseg.certification.finite_bounds import (
    Look,
    allowed_at_any_time,
    bound_at_any_time,
    bound_at_look,
    planned_looks,
)
from cpseg.certification.weighted_bounds import Evidence, any_bets, rate_bound

DESIGNS, LOOKING, UNSURE = words.AUDIT_DESIGNS, words.AUDIT_LOOKING, words.AUDIT_UNSURE
ANSWERS = words.AUDIT_ANSWERS
_ENDLESS = 10**15


class Draw(NamedTuple):
    """One drawn pixel.

    Attributes:
        image: its name.
        row: from 0 at the top.
        column: from 0 at the left.
        label: the label that is asked about.
        probability: the chance to be this pixel at one draw (of its class, by class).
        predicted: of a focused draw, the predicted chance that the label is wrong; else 0.
    """

    image: str
    row: int
    column: int
    label: int
    probability: float
    predicted: float = 0.0


class Stratum(NamedTuple):
    """Labels that are drawn from by themselves: all of them, or those of one class.

    Attributes:
        label: the class; None where all are together.
        size: labels kept.
        answers: how many are drawn.
        looks: after how many answers one looks, and how many of these may be wrong; empty for
            looking at any time and for a focused draw.
    """

    label: int | None
    size: int
    answers: int
    looks: tuple[Look, ...]


@dataclass(frozen=True, repr=False)
class AuditPlan:
    """Which pixels are asked about, in which order, and when one looks at the answers.

    Attributes:
        folder: fingerprint of the labels that were drawn from.
        design: ``"uniform"``, ``"by-class"`` or ``"focus"``.
        looking: ``"fixed"``: once, after a fixed number of answers; ``"planned"``: at a few
            numbers of answers, up to the first that certifies; ``"any"``: whenever one likes.
        max_error: the bound that is to be certified.
        delta: 1 - confidence; by class, of all classes at once, and of all labels together.
        expected_error: the error that the number of answers was planned for.
        seed: of the draw.
        images: images that were drawn from, with and without labels.
        labels: labels kept in them, N.
        strata: what is drawn from by itself.
        draws: the pixels in the order in which they are asked about.
        mean_predicted: of a focused draw, the mean predicted error of all labels.
        largest_weight: of a focused draw, the most that one answer can weigh.
        bets: of a focused draw, the bets by which its bound is found, fixed before any answer.
    """

    folder: str
    design: str
    looking: str
    max_error: float
    delta: float
    expected_error: float
    seed: int
    images: int
    labels: int
    strata: tuple[Stratum, ...]
    draws: tuple[Draw, ...]
    mean_predicted: float = 0.0
    largest_weight: float = 1.0
    bets: tuple[float, ...] = ()

    def __repr__(self) -> str:
        return (
            f"AuditPlan({self.design}, {self.looking}, {len(self.draws)} of {self.labels} labels, "
            f"bound {100 * self.max_error:g} %, {confidence(self.delta)} confidence)"
        )

    @property
    def fingerprint(self) -> str:
        """A digest of the whole plan, by which answers are matched to it."""
        text = json.dumps(self.to_json(), sort_keys=True)
        # The word keeps a spreadsheet from reading 12e34 as a number.
        return f"plan-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def stratum_delta(self) -> float:
        """``delta`` shared among the strata."""
        return self.delta / len(self.strata)

    def allowed(self) -> list[int] | None:
        """How many of the first n answers may be wrong for the bound to be certified.

        For n = 0 .. all; -1 where it cannot be, or where one does not look. None where answers
        weigh unequally or there are several strata.
        """
        if self.design != "uniform":
            return None
        (stratum,) = self.strata
        if self.looking == "any":
            size, most = stratum.size, stratum.answers
            return list(map(int, allowed_at_any_time(size, self.max_error, self.delta, most)))
        allowed = [-1] * (stratum.answers + 1)
        for look in stratum.looks:
            allowed[look.answers] = look.wrong
        return allowed

    def result(
        self, answers: Mapping[int, str], *, max_error: float | None = None, unsure: str = "wrong"
    ) -> AuditResult:
        """What the answers prove.

        Only answers without a gap from the first count, and of these, with planned looks, those up
        to the first look that certifies; the result says how many.

        Args:
            answers: ``"yes"`` (the label is right), ``"no"`` or ``"unsure"`` by the number of the
                draw, from 0.
            max_error: another bound to compare with; by default the planned one, for which the
                looks are best.
            unsure: ``"wrong"`` counts an ``"unsure"`` as a wrong label; ``"skip"`` leaves it out,
                and the bound is about labels that a person can judge; by class that holds for the
                bounds of classes, and the one of all labels together counts them as wrong.

        Raises:
            ValueError: a number that is not in the plan, another word, a bound outside (0, 1),
                ``"skip"`` for a focused draw.

        Example:
            >>> import torch
            >>> from cpseg.certification import audit_sample
            >>> mask = torch.zeros(100, 100, dtype=torch.uint8)
            >>> plan = audit_sample(["a"], lambda name: mask, expected_error=0.01, seed=0)
            >>> result = plan.result({number: "yes" for number in range(len(plan.draws))})
            >>> result.certified, result.answers
            (True, 60)
        """
        where = "AuditPlan.result"
        check_choice(where, unsure, UNSURE, name="unsure")
        bound = self.max_error
        if max_error is not None:
            bound = float(check_alpha(where, max_error, name="max_error"))
        for number, word in answers.items():
            if number not in range(len(self.draws)):
                expected = f"numbers from 0 to {len(self.draws) - 1}"
                fix = "answer the questions of this plan"
                raise ValueError(message(where, expected, str(number), fix))
            check_choice(where, word, ANSWERS, name="answers")
        if self.design == "focus" and unsure == "skip":
            fix = "count them as wrong, or draw uniformly"
            raise ValueError(message(where, "unsure='wrong' for a focused draw", "'skip'", fix))
        first = next(i for i in itertools.count() if i not in answers)
        given = [answers[number] for number in range(first)]
        parts = [self._part(stratum, given, unsure) for stratum in self.strata]
        upper, used, next_look = self._together(parts, given)
        # How many of each class can be judged is not known, so all labels together count them.
        skipped = unsure == "skip" and self.design == "uniform"
        unsures = [given[number] for number in used]
        if self.design == "uniform":  # with those left out in between
            unsures = given[: used[-1] + 1 if used else None]
        return AuditResult(
            design=self.design,
            looking=self.looking,
            labels=self.labels,
            max_error=bound,
            delta=self.delta,
            bound=upper,
            answers=len(used),
            wrong=sum(given[number] != "yes" for number in used),
            unsure=unsures.count("unsure"),
            skipped=skipped,
            given=len(answers),
            planned=len(self.draws),
            next_look=next_look,
            classes=tuple(part.row for part in parts) if self.design == "by-class" else None,
        )

    def restricted(
        self, inside: Sequence[bool], sizes: Mapping[int, int], folder: str
    ) -> AuditPlan:
        """The plan of a stricter rule, which keeps some of these labels and no others.

        The drawn pixels that it keeps are a draw from its labels, so that the answers serve it too.
        Bounds of several rules hold each by itself. To choose among them by looking: take the
        loosest one that is certified together with all that are stricter.

        Args:
            inside: for every draw, whether the stricter rule keeps its label.
            sizes: labels that it keeps, by class.
            folder: fingerprint of its labels.

        Raises:
            ValueError: a focused draw, or no drawn pixel that is kept.
        """
        where = "AuditPlan.restricted"
        if self.design == "focus":
            fix = "draw uniformly for nested rules"
            raise ValueError(message(where, "a uniform draw or one by class", "focus", fix))
        if not any(inside):
            fix = "audit the stricter rule by itself"
            raise ValueError(message(where, "drawn pixels that are kept", "none", fix))
        kept = [draw for draw, keeps in zip(self.draws, inside, strict=True) if keeps]
        strata = []
        for stratum in self.strata:
            here = [
                keeps
                for draw, keeps in zip(self.draws, inside, strict=True)
                if stratum.label in (None, draw.label)
            ]
            size = sum(sizes.values()) if stratum.label is None else sizes.get(stratum.label, 0)
            if size == 0:
                continue
            # A class of which no pixel was drawn stays: nothing is known of its labels.
            times = sorted({sum(here[: look.answers]) for look in stratum.looks} - {0})
            looks: tuple[Look, ...] = ()
            if times:
                looks = planned_looks(size, self.max_error, self.stratum_delta, times, 1.0)
            strata.append(Stratum(stratum.label, size, sum(here), looks))
        labels = sum(sizes.values())
        return replace(self, folder=folder, labels=labels, strata=tuple(strata), draws=tuple(kept))

    def to_json(self) -> dict[str, Any]:
        """Plain values, as :meth:`from_json` reads them."""
        content = asdict(self)
        content["bets"] = list(self.bets)
        content["draws"] = [list(draw) for draw in self.draws]
        content["strata"] = [
            {**stratum._asdict(), "looks": [list(look) for look in stratum.looks]}
            for stratum in self.strata
        ]
        return content

    @classmethod
    def from_json(cls, value: object, *, where: str = "plan") -> AuditPlan:
        """Read what :meth:`to_json` gave.

        Raises:
            ValueError: a field is missing, unknown, or has an impossible value.
        """
        fix = "use the file as cpseg audit wrote it"
        names = {field.name for field in fields(cls)}
        if not isinstance(value, dict) or set(value) != names:
            got = str(sorted(value)) if isinstance(value, dict) else repr(value)
            raise ValueError(message(where, "an audit plan with its fields", got[:80], fix))
        read_fields(where, value, _FIELDS, fix=fix)
        try:
            strata = tuple(
                Stratum(
                    each["label"],
                    int(each["size"]),
                    int(each["answers"]),
                    tuple(Look(*map(int, look)) for look in each["looks"]),
                )
                for each in value["strata"]
            )
            draws = tuple(
                Draw(str(name), int(row), int(column), int(label), float(chance), float(error))
                for name, row, column, label, chance, error in value["draws"]
            )
        except (TypeError, ValueError, KeyError) as error:
            got = f"{type(error).__name__}: {error}"[:80]
            raise ValueError(message(where, "draws and strata of a plan", got, fix)) from error
        return cls(**{**value, "strata": strata, "draws": draws, "bets": tuple(value["bets"])})

    # --- what the answers prove ---

    def _part(self, stratum: Stratum, given: Sequence[str], unsure: str) -> _Part:
        """The bound of one stratum, from the answers about it."""
        places = [
            number
            for number, draw in enumerate(self.draws[: len(given)])
            if stratum.label in (None, draw.label)
        ]
        size, total = stratum.size, len(places)
        looks = [look for look in stratum.looks if look.answers <= total]
        waiting = next((look.answers for look in stratum.looks if look.answers > total), None)
        if unsure == "skip":
            told = [given[number] != "unsure" for number in places]
            places = [number for number, tells in zip(places, told, strict=True) if tells]
            size = _ENDLESS  # how many can be judged is not known: independent draws
            looks = self._looks_of(stratum, looks, told)
        wrong = np.array([given[number] != "yes" for number in places], np.int64).cumsum()
        seen = int(wrong[-1]) if len(wrong) else 0
        if self.design == "focus":
            return _Part(stratum, places, 1.0, None, seen)
        if self.looking == "any":
            upper = size
            if len(wrong):
                upper = bound_at_any_time(size, self.max_error, wrong, self.stratum_delta)
            return _Part(stratum, places, upper / size, None, seen)
        for number, look in enumerate(looks):
            so_far = int(wrong[look.answers - 1])
            last = number == len(looks) - 1 and waiting is None
            if so_far <= look.wrong or last:
                upper = bound_at_look(size, looks, number, so_far, self.stratum_delta)
                return _Part(stratum, places[: look.answers], upper / size, None, so_far)
        return _Part(stratum, places, 1.0, waiting, seen)

    def _looks_of(
        self, stratum: Stratum, looks: Sequence[Look], told: Sequence[bool]
    ) -> list[Look]:
        """The looks that are past, at those answers that tell; each spends what it would have."""
        times: dict[int, float] = {}
        for look in looks:
            count = sum(told[: look.answers])
            if count > max(times, default=0):
                times[count] = look.answers / stratum.answers
        risk, shares = self.stratum_delta, list(times.values())
        return [*planned_looks(_ENDLESS, self.max_error, risk, list(times), 1.0, shares)]

    def _together(
        self, parts: Sequence[_Part], given: Sequence[str]
    ) -> tuple[float, list[int], int | None]:
        """The bound on all labels, the answers it uses, and the next look."""
        if self.design == "uniform":
            (part,) = parts
            return part.bound, part.used, part.next_look
        if self.design == "focus":
            evidence = self._weighted(given)
            return rate_bound(evidence, self.delta), list(range(len(given))), None
        if len(given) == self.labels:  # all were asked about: nothing is left to chance
            return sum(word != "yes" for word in given) / self.labels, [*range(len(given))], None
        evidence, used = self._blocks(parts, given)
        waiting = [part.next_look for part in parts if part.next_look is not None]
        return rate_bound(evidence, self.delta), used, min(waiting) if waiting else None

    def _weighted(self, given: Sequence[str]) -> Evidence:
        """Inverse probabilities, with the predicted error as control variate."""
        draws = self.draws[: len(given)]
        wrong = np.array([word != "yes" for word in given], np.float64)
        weight = np.array([1 / (self.labels * draw.probability) for draw in draws])
        predicted = np.array([draw.predicted for draw in draws])
        value = (wrong - predicted) * weight + self.mean_predicted
        one, none = np.ones(len(draws)), np.zeros(len(draws))
        largest = self.largest_weight + self.mean_predicted
        return Evidence(value, one, none, largest, np.array(self.bets))

    def _blocks(self, parts: Sequence[_Part], given: Sequence[str]) -> tuple[Evidence, list[int]]:
        """One answer of every class at a time, weighed by the labels that the class has.

        Drawing without replacement leaves on average no fewer wrong ones among those still to come
        than the total less those that were seen. Where all drawn pixels of a class are answered,
        its labels that were not drawn count as wrong in the further blocks. Also returned: which
        answers are in the blocks.
        """
        strata = [part.stratum for part in parts]
        places = [self._places(stratum, len(given)) for stratum in strata]
        blocks = min(
            (
                len(numbers)
                for numbers, stratum in zip(places, strata, strict=True)
                if len(numbers) < stratum.answers
            ),
            default=max(map(len, places)),
        )
        value, shift = np.zeros(blocks), np.zeros(blocks)
        used: list[int] = []
        for numbers, stratum in zip(places, strata, strict=True):
            taken = numbers[:blocks]
            used += taken
            wrong = np.array([given[number] != "yes" for number in taken], np.float64)
            value[: len(taken)] += wrong * stratum.size / self.labels
            value[len(taken) :] += (stratum.size - stratum.answers) / self.labels
            before = np.concatenate([[0.0], wrong.cumsum()])
            shift += np.pad(before, (0, blocks), mode="edge")[:blocks] / self.labels
        return Evidence(value, np.ones(blocks), shift, 1.0, any_bets(1.0)), sorted(used)

    def _places(self, stratum: Stratum, count: int) -> list[int]:
        return [i for i, draw in enumerate(self.draws[:count]) if draw.label == stratum.label]


class _Part(NamedTuple):
    """What was found in one stratum; ``used`` are the numbers of the answers that count."""

    stratum: Stratum
    used: list[int]
    bound: float
    next_look: int | None
    wrong: int = 0

    @property
    def row(self) -> AuditRow:
        size = self.stratum.size
        answers = len(self.used)
        return AuditRow(self.stratum.label or 0, size, answers, self.wrong, self.bound)


class AuditRow(NamedTuple):
    """One class of an audit by class: its labels, answers, wrong ones, and the bound."""

    label: int
    labels: int
    answers: int
    wrong: int
    bound: float


@dataclass(frozen=True, repr=False)
class AuditResult:
    """What an audit proves.

    Attributes:
        design: of the plan.
        looking: of the plan.
        labels: labels that the bound is about, N.
        max_error: the bound asked for.
        delta: 1 - confidence.
        bound: at most this share of the labels is wrong; 1 where nothing is proven yet.
        answers: answers that count.
        wrong: of these, how many say or count as wrong.
        unsure: of these, how many say "cannot tell".
        skipped: whether those were left out instead of counted as wrong.
        given: answers there are.
        planned: answers of the plan.
        next_look: how many answers (of a class, by class) the next look waits for; None where there
            is none.
        classes: by class, a row of each, whose bounds hold at once; else None.
    """

    design: str
    looking: str
    labels: int
    max_error: float
    delta: float
    bound: float
    answers: int
    wrong: int
    unsure: int
    skipped: bool
    given: int
    planned: int
    next_look: int | None
    classes: tuple[AuditRow, ...] | None

    @property
    def certified(self) -> bool:
        """Whether the bound asked for is proven."""
        return self.bound <= self.max_error

    def __repr__(self) -> str:
        return f"AuditResult({self})"

    def __str__(self) -> str:
        """One sentence."""
        seen = f"{self.answers} answer{'s' * (self.answers != 1)}, {self.wrong} wrong"
        if self.unsure:
            told = f"{self.unsure} more that could not be told left out"
            if not self.skipped:
                told = f"{self.unsure} of these could not be told and counted as wrong"
            seen += f", {told}"
        sure = f"with {confidence(self.delta)} confidence"
        which = "of those that a person can judge among" if self.skipped else "of"
        if self.bound >= 1:
            text = f"nothing is proven yet about the {self.labels:,} labels ({seen})"
        else:
            limit = percent_up(self.bound)
            text = f"{which} the {self.labels:,} labels at most {limit} are wrong, {sure} ({seen})"
        if self.certified:
            return text
        if self.next_look is not None:
            each = " of a class" if self.classes is not None else ""
            return f"{text}; the next look is after {self.next_look} answers{each}"
        return f"{text}; {100 * self.max_error:g} % is not certified"


def confidence(delta: float) -> str:
    """``1 - delta`` in per cent, with as many decimals as it takes to tell it from 100 %."""
    exact = 100 * (1 - Decimal(repr(float(delta))))
    return f"{exact.normalize():f} %"


def percent_up(rate: float) -> str:
    """A share in per cent, rounded up to a tenth, so that what is printed is proven."""
    return f"{math.ceil(1000 * rate - 1e-9) / 10:.1f} %"


_FIELDS = {
    "folder": lambda value: isinstance(value, str),
    "design": among(DESIGNS),
    "looking": among(LOOKING),
    "max_error": rate,
    "delta": rate,
    "expected_error": share,
    "seed": count_or_none,
    "images": whole,
    "labels": whole,
    "strata": list_of(lambda value: isinstance(value, dict)),
    "draws": list_of(lambda value: isinstance(value, list) and len(value) == len(Draw._fields)),
    "mean_predicted": share,
    "bets": list_of(lambda value: isinstance(value, float) and value > 0),
    "largest_weight": lambda value: isinstance(value, float) and value >= 1,
}
