"""Audits: what answers prove, against every order of small draws; the draw; every error."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from tests.support.helpers import raises
from torch import Tensor

from cpseg.certification import audit_plan
from cpseg.certification.audit import (
    AuditPlan,
    AuditResult,
    Draw,
    Stratum,
    audit_sample,
    confidence,
    percent_up,
)
from cpseg.certification.finite_bounds import planned_looks
from cpseg.certification.weighted_bounds import wealth_path

ROUNDING = 1e-12
VOID = 255


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds of the same answers are computed once."""
    monkeypatch.setattr(audit_plan, "bound_at_look", _frozen(audit_plan.bound_at_look))
    monkeypatch.setattr(audit_plan, "planned_looks", _frozen(audit_plan.planned_looks))
    monkeypatch.setattr(audit_plan, "bound_at_any_time", _frozen(audit_plan.bound_at_any_time))


def _frozen(function: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[str, Any] = {}

    def call(*values: Any) -> Any:
        key = repr(values)
        if key not in known:
            known[key] = function(*values)
        return known[key]

    return call


def plan_of(
    sizes: Mapping[int, int],
    *,
    design: str = "uniform",
    looking: str = "any",
    max_error: float = 0.3,
    delta: float = 0.3,
    times: tuple[int, ...] = (),
    most: int | None = None,
) -> AuditPlan:
    """A plan that asks about all labels, or ``most`` of each stratum."""
    total = sum(sizes.values())
    groups = dict(sizes) if design == "by-class" else {None: total}
    risk = delta / len(groups)
    strata = []
    for label, size in groups.items():
        number = min(size, most or size)
        here = [time for time in times if time <= number]
        looks = planned_looks(size, max_error, risk, here, 1.0) if here else ()
        strata.append(Stratum(label, size, number, looks))
    turns = itertools.zip_longest(*([s.label or 0] * s.answers for s in strata))
    order = [label for turn in turns for label in turn if label is not None]
    draws = tuple(Draw("a", 0, place, label, 0.1) for place, label in enumerate(order))
    return AuditPlan("", design, looking, max_error, delta, 0.1, 0, 1, total, tuple(strata), draws)


def answered(words: Mapping[int, str] | list[str] | tuple[str, ...]) -> dict[int, str]:
    return dict(enumerate(words)) if not isinstance(words, Mapping) else dict(words)


def yes_no(bits: tuple[int, ...] | np.ndarray) -> dict[int, str]:
    return {number: "no" if bit else "yes" for number, bit in enumerate(bits)}


# --- what is certified falsely, over every order of the draw ---


@pytest.mark.nightly
@pytest.mark.parametrize("looking", ["any", "planned", "fixed"])
@pytest.mark.parametrize("unsure", ["wrong", "skip"])
def test_uniform_bounds_hold_over_every_order(looking: str, unsure: str, cached: None) -> None:
    """Labels right, wrong, or that nobody can judge; one may stop after any answer."""
    size, delta = (4 if looking == "any" else 6), 0.3
    times = {"any": (), "planned": (2, 3, 5), "fixed": (4,)}[looking]
    plan = plan_of(
        {0: size}, looking=looking, times=times, delta=delta, most=max(times, default=size)
    )
    missed: dict[tuple[int, int], list[bool]] = defaultdict(list)
    results: dict[tuple[str, ...], float] = {}
    for words in itertools.product(("yes", "no", "unsure"), repeat=size):
        lowest = 1.0
        for n in range(len(plan.draws) + 1):
            if words[:n] not in results:
                results[words[:n]] = plan.result(answered(words[:n]), unsure=unsure).bound
            lowest = min(lowest, results[words[:n]])
        wrong, unknown = words.count("no"), words.count("unsure")
        judged = wrong / max(size - unknown, 1)
        truth = (wrong + unknown) / size if unsure == "wrong" else judged
        missed[wrong, unknown].append(lowest < truth - 1e-9)
    worst = max(np.mean(each) for each in missed.values())
    assert worst <= delta + ROUNDING
    assert worst > 0 or unsure == "skip"  # that takes labels for endless


@pytest.mark.parametrize(("first", "second", "delta"), [(4, 5, 0.3), (3, 6, 0.6)])
def test_by_class_bounds_hold_over_every_order(
    first: int, second: int, delta: float, cached: None
) -> None:
    plan = plan_of({0: first, 1: second}, design="by-class", delta=delta)
    few = replace(plan, strata=(plan.strata[0]._replace(answers=2), plan.strata[1]))
    taken = [n for n, draw in enumerate(plan.draws) if draw.label or n < 4]
    few = replace(few, draws=tuple(plan.draws[n] for n in taken))
    part: dict[tuple[int, int], list[bool]] = defaultdict(list)
    labels = [draw.label for draw in plan.draws]
    pooled: dict[tuple[int, int], list[bool]] = defaultdict(list)
    classes: dict[tuple[int, int], list[bool]] = defaultdict(list)
    results: dict[tuple[int, ...], AuditResult] = {}
    partly: dict[tuple[int, ...], float] = {}
    for bits in itertools.product((0, 1), repeat=first + second):
        truth = [sum(b for b, k in zip(bits, labels, strict=True) if k == c) for c in (0, 1)]
        low, false = 1.0, False
        for n in range(len(bits) + 1):
            if bits[:n] not in results:
                results[bits[:n]] = plan.result(yes_no(bits[:n]))
            result = results[bits[:n]]
            low = min(low, result.bound)
            assert result.classes is not None
            false |= any(
                row.bound * row.labels < wrong - 1e-6
                for row, wrong in zip(result.classes, truth, strict=True)
            )
        assert result.bound == sum(bits) / len(bits)  # a census
        pixels = tuple(bits[n] for n in taken)
        if pixels not in partly:
            partly[pixels] = min(
                few.result(yes_no(pixels[:n])).bound for n in range(len(pixels) + 1)
            )
        part[tuple(truth)].append(partly[pixels] < sum(bits) / len(bits) - 1e-9)
        pooled[tuple(truth)].append(low < sum(bits) / len(bits) - 1e-9)
        classes[tuple(truth)].append(false)
    assert max(np.mean(each) for each in pooled.values()) <= delta + ROUNDING
    assert max(np.mean(each) for each in part.values()) <= delta + ROUNDING
    assert max(np.mean(each) for each in classes.values()) <= delta + ROUNDING


def test_blocks_are_on_average_no_less_than_the_rate_that_is_left() -> None:
    """Given the blocks before, over every order of two small classes."""
    plan = plan_of({0: 3, 1: 4}, design="by-class")
    labels = np.array([draw.label for draw in plan.draws])
    left: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for bits in itertools.product((0, 1), repeat=7):
        parts = [plan._part(stratum, [], "wrong") for stratum in plan.strata]
        evidence, used = plan._blocks(parts, ["no" if bit else "yes" for bit in bits])
        assert used == list(range(7))
        classes = [tuple(np.array(bits)[labels == label]) for label in (0, 1)]
        rate = sum(bits) / 7
        for block in range(4):
            before = tuple(own[:block] for own in classes)
            key = (tuple(map(sum, classes)), block, before)
            mean = evidence.value[block] - max(rate - evidence.shift[block], 0)
            left[key].append(mean)
    assert min(np.mean(each) for each in left.values()) >= -ROUNDING


def test_by_class_pooled_bound_holds_in_simulated_folders() -> None:
    """Three classes at the bound, 1,500 folders; false alarm below 1e-6."""
    sizes = {0: 60, 1: 30, 2: 6}
    plan = plan_of(sizes, design="by-class", delta=0.2, max_error=0.2, most=25)
    labels = np.array([draw.label for draw in plan.draws])
    random = np.random.default_rng(8)
    for wrong in ((20, 0, 0), (8, 7, 5), (0, 14, 6)):
        false, folders = 0, 1500
        rate = sum(wrong) / plan.labels
        for _ in range(folders):
            bits = np.zeros(len(labels), int)
            for label, size in sizes.items():
                here = np.flatnonzero(labels == label)
                bits[here] = random.permutation(size)[: len(here)] < wrong[label]
            parts = [plan._part(s, [], "wrong") for s in plan.strata]
            words = ["no" if bit else "yes" for bit in bits]
            evidence, _ = plan._blocks(parts, words)
            false += wealth_path(evidence, rate).max() >= 1 / plan.delta
        assert false / folders <= plan.delta + 5 * math.sqrt(0.16 / folders)


def test_restricted_plans_hold_over_every_order(cached: None) -> None:
    """Labels of the loose rule alone, right ones and wrong ones of the stricter rule."""
    size, delta = 7, 0.3
    plan = plan_of({0: size}, looking="planned", times=(2, 4, 6), delta=delta, most=6)
    missed: dict[tuple[int, int], list[bool]] = defaultdict(list)
    known: dict[tuple[str, ...], float] = {}
    for words in itertools.product(("out", "yes", "no"), repeat=size):
        inside = [word != "out" for word in words]
        if not any(inside[:6]):
            continue
        kept = [word for word in words[:6] if word != "out"]
        key = (*words[:6], str(sum(inside)))
        if key not in known:
            strict = plan.restricted(inside[:6], {0: sum(inside)}, "strict")
            low = [strict.result(answered(kept[:n])).bound for n in range(len(kept) + 1)]
            known[key] = min(low)
        bound = known[key]
        wrong = words.count("no")
        missed[wrong, sum(inside)].append(bound < wrong / sum(inside) - 1e-9)
    assert 0 < max(np.mean(each) for each in missed.values()) <= delta + ROUNDING


def test_a_restricted_class_without_a_drawn_pixel_may_be_all_wrong() -> None:
    plan = plan_of({0: 400, 1: 200}, design="by-class", most=100, max_error=0.2)
    inside = [draw.label == 0 for draw in plan.draws]
    strict = plan.restricted(inside, {0: 400, 1: 100}, "strict")
    result = strict.result(yes_no([0] * 100))
    assert 0.2 < result.bound < 0.26
    assert result.classes is not None
    assert [row.bound < 1 for row in result.classes] == [True, False]
    gone = plan.restricted(inside, {0: 400}, "strict")
    assert [stratum.label for stratum in gone.strata] == [0]
    assert gone.labels == 400


def test_a_class_with_few_labels_does_not_stop_the_bound_of_all() -> None:
    """Three of its four labels are drawn, and the fourth counts as wrong."""
    plan = plan_of({0: 900, 1: 4}, design="by-class", most=60)
    (large, rare) = plan.strata
    plan = replace(
        plan, strata=(large, rare._replace(answers=3)), draws=plan.draws[:6] + plan.draws[8:]
    )
    assert [draw.label for draw in plan.draws[:7]] == [0, 1, 0, 1, 0, 1, 0]
    result = plan.result(yes_no([0] * len(plan.draws)))
    assert result.bound < 0.1
    assert result.answers == len(plan.draws)


# --- laws of results ---


def image_of(sizes: Mapping[int, int], void: int = 7) -> Tensor:
    values = [label for label, size in sizes.items() for _ in range(size)] + [VOID] * void
    return torch.tensor(values, dtype=torch.uint8)[None]


def sampled(sizes: Mapping[int, int] | int = 5_000, **options: Any) -> AuditPlan:
    mask = image_of({0: sizes} if isinstance(sizes, int) else sizes)
    return audit_sample(["a"], lambda _: mask, **{"seed": 0, **options})


def small(sizes: Mapping[int, int] | int = 600, **options: Any) -> AuditPlan:
    """A plan of few answers, which is quick to read."""
    return sampled(sizes, **{"max_error": 0.2, **options})


PLANS = [
    {"looking": "planned"},
    {"looking": "fixed"},
    {"looking": "any"},
    {"looking": "planned", "sizes": 30},
    {"looking": "any", "sizes": 30, "delta": 0.4},
    {"looking": "planned", "design": "by-class", "sizes": {0: 300, 3: 100, 9: 4}},
    {"looking": "any", "design": "by-class", "sizes": {0: 300, 3: 100, 9: 4}},
]


@pytest.mark.parametrize("options", PLANS)
def test_only_answers_without_a_gap_count(options: dict[str, Any]) -> None:
    plan = small(**options)
    words = yes_no([0] * len(plan.draws))
    gap = len(words) // 3
    with_gap = {number: word for number, word in words.items() if number != gap}
    before = {number: word for number, word in words.items() if number < gap}
    expected = replace(plan.result(before), given=len(with_gap))
    assert plan.result(with_gap) == expected


@pytest.mark.nightly
@settings(max_examples=4)
@given(st.data())
@pytest.mark.parametrize("options", PLANS)
def test_another_wrong_answer_never_lowers_the_bound(
    options: dict[str, Any], data: st.DataObject
) -> None:
    plan = small(**options)
    count = data.draw(st.integers(1, len(plan.draws)))
    wrong = data.draw(st.sets(st.integers(0, count - 1), max_size=4))
    words = {n: "no" if n in wrong else "yes" for n in range(count)}
    changed = data.draw(st.integers(0, count - 1))
    worse = {**words, changed: "no"}
    assert plan.result(worse).bound >= plan.result(words).bound
    unsure = {**words, changed: "unsure"}
    assert plan.result(unsure).bound == plan.result(worse).bound


def test_answers_after_a_passed_look_change_nothing() -> None:
    plan = small(looking="planned")
    looks = plan.strata[0].looks
    first = looks[0].answers
    assert len(looks) > 1
    at_look = plan.result(yes_no([0] * first))
    assert at_look.certified
    assert (at_look.answers, at_look.wrong) == (first, 0)
    later = plan.result(yes_no([0] * first + [1] * (len(plan.draws) - first)))
    assert later == replace(at_look, given=len(plan.draws))
    missed = plan.result(yes_no([1] * (looks[0].wrong + 1) + [0] * (first - 1 - looks[0].wrong)))
    assert (missed.bound, missed.next_look) == (1.0, looks[1].answers)
    assert str(missed).endswith(f"the next look is after {looks[1].answers} answers")


@pytest.mark.parametrize("options", PLANS[:5])
def test_allowed_agrees_with_result(options: dict[str, Any]) -> None:
    """For every n and x, where nothing was certified before."""
    plan = small(**options)
    allowed = plan.allowed()
    assert allowed is not None
    assert len(allowed) == len(plan.draws) + 1
    assert allowed[0] == -1
    step = 1 if len(plan.draws) < 40 else 7
    looks = {look.answers for look in plan.strata[0].looks}
    for n in sorted({*range(1, len(allowed), step), *looks}):
        near = {allowed[n] - 1, allowed[n], allowed[n] + 1} & set(range(n + 1))
        for wrong in near | {0}:
            path = np.minimum(np.arange(1, n), wrong)
            if (path <= np.array(allowed[1:n])).any():
                continue
            result = plan.result(yes_no([1] * wrong + [0] * (n - wrong)))
            assert result.certified == (wrong <= allowed[n]), (n, wrong)


def test_allowed_is_for_one_group_of_equal_weight() -> None:
    assert sampled({0: 50, 1: 50}, design="by-class").allowed() is None


@pytest.mark.parametrize("options", PLANS)
def test_json_keeps_the_plan(options: dict[str, Any]) -> None:
    plan = small(**options)
    read = AuditPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert read == plan
    assert read.fingerprint == plan.fingerprint
    moved = replace(plan, draws=plan.draws[1:] + plan.draws[:1])
    assert moved.fingerprint != plan.fingerprint


def test_by_class_the_bounds_of_classes_are_those_of_plans_of_their_own() -> None:
    sizes = {0: 300, 3: 100, 9: 4}
    plan = small(sizes, design="by-class", looking="planned")
    bits = [int(number % 29 == 3) for number in range(len(plan.draws))]
    rows = plan.result(yes_no(bits)).classes
    assert rows is not None
    assert [row.label for row in rows] == [0, 3, 9]
    for row, stratum in zip(rows, plan.strata, strict=True):
        own = [b for b, draw in zip(bits, plan.draws, strict=True) if draw.label == row.label]
        alone = plan_of(
            {row.label: sizes[row.label]},
            looking="planned",
            delta=plan.delta / 3,
            max_error=plan.max_error,
            most=stratum.answers,
        )
        alone = replace(alone, strata=(stratum._replace(label=None),))
        result = alone.result(yes_no(own))
        assert (row.bound, row.answers, row.wrong) == (result.bound, result.answers, result.wrong)
    assert rows[2].answers == 4
    assert rows[2].bound == rows[2].wrong / 4  # all of them were asked about


def test_by_class_the_sentence_counts_the_answers_of_its_bound() -> None:
    """A wrong answer after a class's own look is in the bound of all labels, and is said."""
    plan = small({0: 3000, 1: 3000}, design="by-class", looking="planned")
    first = plan.strata[0].looks[0].answers
    bits = [0] * (2 * first) + [1] * 10
    result = plan.result(yes_no(bits))
    assert (result.answers, result.wrong) == (2 * first + 10, 10)
    assert result.classes is not None
    assert [row.wrong for row in result.classes] == [0, 0]


@pytest.mark.parametrize("looking", ["planned", "fixed", "any"])
def test_a_census_is_exact(looking: str) -> None:
    for wrong in (0, 1, 3):
        plan = sampled(20, looking=looking, answers=20)
        result = plan.result(yes_no([0] * (20 - wrong) + [1] * wrong))
        if result.answers == 20:
            assert result.bound == wrong / 20
        one = sampled(1, looking=looking)
        assert one.result({0: "yes"}).bound == 0
        assert one.result({0: "no"}).bound == 1


def test_unsure_left_out_is_a_statement_about_what_can_be_judged() -> None:
    plan = sampled(looking="fixed")
    count = len(plan.draws)
    words = {n: "unsure" if n < 9 else "yes" for n in range(count)}
    counted, skipped = plan.result(words), plan.result(words, unsure="skip")
    assert (counted.wrong, counted.unsure, counted.answers) == (9, 9, count)
    assert (skipped.wrong, skipped.unsure, skipped.answers) == (0, 9, count - 9)
    assert skipped.bound < counted.bound
    assert "9 of these could not be told" in str(counted)
    said = str(skipped)
    assert said.startswith("of those that a person can judge among the 5,000 labels at most ")
    assert "9 more that could not be told left out" in said
    nothing = plan.result(dict.fromkeys(range(count), "unsure"), unsure="skip")
    assert (nothing.bound, nothing.answers) == (1.0, 0)


def test_by_class_unsure_left_out_counts_in_the_bound_of_all_labels() -> None:
    plan = sampled({0: 400, 1: 400}, design="by-class", looking="any")
    words = {n: "unsure" if n % 10 == 0 else "yes" for n in range(len(plan.draws))}
    counted, skipped = plan.result(words), plan.result(words, unsure="skip")
    assert str(counted) == str(skipped)
    assert "of these could not be told" in str(skipped)
    assert counted.classes is not None
    assert skipped.classes is not None
    assert skipped.classes[0].bound < counted.classes[0].bound


# --- the sentence ---


def test_the_sentence() -> None:
    plan = sampled(7_412_332 // 1000, looking="fixed")
    good = plan.result(yes_no([0] * len(plan.draws)))
    count = len(plan.draws)
    limit = percent_up(good.bound)
    assert str(good) == (
        f"of the 7,412 labels at most {limit} are wrong, with 90 % confidence ({count} answers, "
        "0 wrong)"
    )
    assert repr(good) == f"AuditResult({good})"
    bad = str(plan.result(yes_no([1] * 30 + [0] * (count - 30))))
    assert bad.endswith("; 5 % is not certified")
    assert str(plan.result({})) == (
        "nothing is proven yet about the 7,412 labels (0 answers, 0 wrong); the next look is "
        f"after {count} answers"
    )
    other = plan.result(yes_no([1] * 3 + [0] * (count - 3)), max_error=0.01234)
    assert str(other).endswith("; 1.234 % is not certified")


@given(st.integers(1, 10**10), st.data())
def test_what_is_printed_is_never_below_what_is_proven(size: int, data: st.DataObject) -> None:
    upper = data.draw(st.integers(0, size))
    shown = Fraction(percent_up(upper / size).removesuffix(" %")) / 100
    assert (
        0
        <= shown - Fraction(upper, size) + Fraction(1, 10**11)
        <= Fraction(1, 1000) + Fraction(1, 10**10)
    )


def test_confidence_is_never_rounded_up() -> None:
    said = {0.1: "90 %", 0.05: "95 %", 0.005: "99.5 %", 1e-6: "99.9999 %", 1e-9: "99.9999999 %"}
    assert {delta: confidence(delta) for delta in said} == said
    assert confidence(0.9) == "10 %"
    assert "99.9999 % confidence" in repr(sampled(delta=1e-6, answers=9))


# --- the draw ---


def three_images() -> tuple[list[str], Callable[[str], Tensor]]:
    a = torch.full((3, 4), VOID, dtype=torch.uint8)
    a[0, 1], a[2, 3] = 0, 1
    b = torch.tensor([[0, 0, 1], [VOID, 2, 0]], dtype=torch.uint8)
    empty = torch.full((2, 2), VOID, dtype=torch.uint8)
    c = torch.tensor([[1, 1], [0, VOID]], dtype=torch.uint8)
    images = {"a": a, "empty": empty, "b": b, "c": c}
    return list(images), images.__getitem__


def sureness(name: str) -> Tensor:
    shape = three_images()[1](name).shape
    return torch.linspace(0, 1, shape.numel()).reshape(shape)


def kept_pixels() -> list[tuple[str, int, int, int]]:
    names, read = three_images()
    return [
        (name, int(row), int(column), int(read(name)[row, column]))
        for name in names
        for row, column in (read(name) != VOID).nonzero()
    ]


@pytest.mark.nightly
@pytest.mark.parametrize("design", ["uniform", "by-class", "focus"])
def test_pixels_are_drawn_by_their_probability(design: str) -> None:
    """Chi-square of the first draw (of each class) over 1,500 seeds; false alarm 1e-6."""
    names, read = three_images()
    seeds = 1500
    drawn: Counter[tuple[str, int, int, int]] = Counter()
    said: dict[tuple[str, int, int, int], float] = {}
    for seed in range(seeds):
        options = {"design": design, "looking": "any", "answers": 1, "certainty": sureness}
        plan = audit_sample(names, read, seed=seed, **options)
        drawn.update(draw[:4] for draw in plan.draws)
        said.update({draw[:4]: draw.probability for draw in plan.draws})
        assert plan.labels == 10
    pixels = kept_pixels()
    assert set(said) == set(pixels)
    groups = {pixel[3] for pixel in pixels} if design == "by-class" else {None}
    assert sum(said.values()) == pytest.approx(len(groups))
    statistic = sum((drawn[p] - seeds * said[p]) ** 2 / (seeds * said[p]) for p in pixels)
    assert statistic < chi2.isf(1e-6, len(pixels) - len(groups))
    if design == "uniform":
        assert set(said.values()) == {0.1}
    if design == "focus":
        roots = {
            pixel: math.sqrt(1 - float(sureness(pixel[0])[pixel[1], pixel[2]])) for pixel in pixels
        }
        for pixel in pixels:
            share = roots[pixel] / sum(roots.values())
            assert said[pixel] == pytest.approx(0.05 + 0.5 * share, rel=1e-5)


def test_a_draw_is_without_replacement_and_pairs_are_even() -> None:
    """Chi-square of the ordered first two of the draw; false alarm 1e-6."""
    names, read = three_images()
    pairs: Counter[tuple[Any, Any]] = Counter()
    for seed in range(1500):
        plan = audit_sample(names, read, looking="any", answers=3, seed=seed)
        pixels = [draw[:4] for draw in plan.draws]
        assert len(set(pixels)) == 3
        pairs[pixels[0], pixels[1]] += 1
    expected = 1500 / 90
    statistic = sum(
        (pairs[pair] - expected) ** 2 / expected
        for pair in itertools.permutations(kept_pixels(), 2)
    )
    assert statistic < chi2.isf(1e-6, 89)


def test_a_focused_draw_is_as_sampled() -> None:
    names, read = three_images()
    plan = audit_sample(
        names, read, design="focus", answers=200, certainty=sureness, seed=3, looking="any"
    )
    pixels = kept_pixels()
    error = {p: 1 - float(sureness(p[0])[p[1], p[2]]) for p in pixels}
    assert plan.mean_predicted == pytest.approx(np.mean(list(error.values())), rel=1e-6)
    for draw in plan.draws:
        assert draw.predicted == pytest.approx(error[draw[:4]], abs=1e-6)
        assert 1 / (plan.labels * draw.probability) <= plan.largest_weight
    values = plan._weighted(["no", "yes"]).value
    for draw, value, wrong in zip(plan.draws[:2], values, (1, 0), strict=True):
        weighed = (wrong - draw.predicted) / (10 * draw.probability)
        assert value == pytest.approx(weighed + plan.mean_predicted)
    result = plan.result(yes_no([0] * 200))
    assert result.answers == 200
    assert result.bound <= plan.result(yes_no([0] * 100 + [1] * 100)).bound
    read_again = AuditPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert read_again.fingerprint == plan.fingerprint


@pytest.mark.parametrize("sure", [0.0, 1.0, math.nan, 7.0])
def test_focus_with_any_certainty(sure: float) -> None:
    mask = image_of({0: 300})
    plan = audit_sample(
        ["a"],
        lambda _: mask,
        design="focus",
        certainty=lambda _: torch.full(mask.shape, sure),
        answers=150,
        seed=1,
    )
    np.testing.assert_allclose([draw.probability for draw in plan.draws], 1 / 300)
    assert plan.result(yes_no([1] * 150)).bound == 1
    assert plan.result(yes_no([0] * 150)).bound < 0.2


def test_seeds_make_the_draw() -> None:
    one, same, other = (small(seed=seed, answers=20) for seed in (1, 1, 2))
    assert one == same
    assert one.draws != other.draws
    assert small(seed=None, answers=5).seed != small(seed=None, answers=5).seed


def test_expected_error_sets_the_number_of_answers() -> None:
    numbers = [
        len(sampled(10**5, expected_error=error, looking="fixed").draws)
        for error in (0.0, 0.01, 0.018, 0.03)
    ]
    assert numbers == sorted(numbers)
    assert numbers[1] == 105
    default = sampled(10**5, looking="fixed")
    assert default.expected_error == pytest.approx(0.02)
    assert len(sampled(10**5, answers=77).draws) == 77
    assert len(sampled(50, answers=77).draws) == 50


@pytest.mark.nightly
@pytest.mark.parametrize("size", [1, 20, 43])
@pytest.mark.parametrize("design", ["uniform", "by-class"])
@pytest.mark.parametrize("looking", ["planned", "fixed", "any"])
def test_folders_and_classes_with_few_labels(size: int, design: str, looking: str) -> None:
    plan = sampled({0: 500, 5: size}, design=design, looking=looking)
    assert len({draw[:3] for draw in plan.draws}) == len(plan.draws)
    alone = sampled(size, design=design, looking=looking)
    assert len(alone.draws) <= size
    if design == "uniform":
        assert alone.result(yes_no([0] * len(alone.draws))).certified


def test_wide_images_and_many_labels() -> None:
    mask = torch.zeros(1500, 2000, dtype=torch.uint8)
    mask[:, :17] = VOID
    plan = audit_sample(["a", "b"], lambda _: mask, answers=50, seed=0)
    assert plan.labels == 2 * 1500 * 1983
    assert all(draw.column >= 17 for draw in plan.draws)


# --- errors ---


def test_errors_of_the_draw() -> None:
    mask = image_of({0: 100})

    def draw(images: list[str] = ["a"], read: Any = lambda _: mask, **options: Any) -> None:  # noqa: B006
        audit_sample(images, read, **options)

    def bad(match: str, kind: type[Exception] = ValueError, **options: Any) -> None:
        with raises(kind, "audit_sample", match):
            draw(**options)

    bad("max_error in \\(0, 1\\), got 0; ", max_error=0)
    bad("max_error in \\(0, 1\\), got 1; ", max_error=1)
    bad("delta in \\(0, 1\\), got 2; ", delta=2)
    bad("expected_error in \\[0, 0.05\\), got 0.05", expected_error=0.05)
    bad("expected_error in .* got nan", expected_error=math.nan)
    bad("design", design="other")
    bad("looking", looking="never")
    bad("answers", answers=0)
    bad("every image once, got one twice", images=["a", "a"])
    bad("certainty for a focused draw, got None", design="focus")
    bad("at least one label kept, got none", read=lambda _: torch.full((2, 2), VOID))
    bad("at least one label kept, got none", images=[])
    bad("seed a whole number, 0 or more, got -1", seed=-1)
    bad("seed a whole number, 0 or more, got 1.5", seed=1.5)
    bad("integer labels \\[H, W\\] from read, got .* for 'a'", TypeError, read=lambda _: mask / 2)
    bad("integer labels", TypeError, read=lambda _: mask == 0)
    bad("integer labels", TypeError, read=lambda _: mask[0])
    bad("labels from 0 to 255, got others in 'a'", read=lambda _: mask.long() - 1)
    bad("at most 20,000 answers, got one of about", max_error=1e-4, read=lambda _: big())
    options = {"design": "focus", "certainty": lambda _: torch.zeros(2, 2)}
    bad("certainty \\[1, 107\\] of 'a', got \\[2, 2\\]", **options)
    states = iter([mask, torch.full_like(mask, VOID)])
    bad("labels that stay as they are, got others in 'a'", read=lambda _: next(states))


@functools.cache
def big() -> Tensor:
    return torch.zeros(1000, 1000, dtype=torch.uint8)


def test_errors_of_results() -> None:
    plan = sampled(100)
    with raises(ValueError, "AuditPlan.result", "numbers from 0 to .*, got 999"):
        plan.result({999: "yes"})
    with raises(ValueError, "AuditPlan.result", "answers"):
        plan.result({0: "maybe"})
    with raises(ValueError, "AuditPlan.result", "unsure"):
        plan.result({}, unsure="ignore")
    with raises(ValueError, "AuditPlan.result", "max_error in"):
        plan.result({}, max_error=1.0)
    with raises(ValueError, "AuditPlan.restricted", "drawn pixels that are kept, got none"):
        plan.restricted([False] * len(plan.draws), {}, "")
    focus = sampled(100, design="focus", certainty=lambda _: torch.zeros(1, 107), answers=5)
    with raises(ValueError, "AuditPlan.result", "unsure='wrong' for a focused draw"):
        focus.result({}, unsure="skip")
    with raises(ValueError, "AuditPlan.restricted", "uniform draw or one by class, got focus"):
        focus.restricted([True] * 5, {0: 100}, "")


def test_damaged_plans_are_refused() -> None:
    good = sampled(100).to_json()
    for broken in (
        None,
        [],
        {},
        {**good, "more": 1},
        {k: v for k, v in good.items() if k != "seed"},
    ):
        with raises(ValueError, "plan", "an audit plan with its fields"):
            AuditPlan.from_json(broken)
    for name in good:
        with raises(ValueError, "plan", "expected"):
            AuditPlan.from_json({**good, name: {"no": 1}})
    for draws in ([["a", 1, 2]], [["a", "x", 2, 0, 0.1, 0.0]]):
        with raises(ValueError, "plan", "expected"):
            AuditPlan.from_json({**good, "draws": draws})
    with raises(ValueError, "plan", "draws and strata of a plan"):
        AuditPlan.from_json({**good, "strata": [{"label": None}]})
