"""Proper scores, reliability and error against kept share: against loops over pixels."""

from __future__ import annotations

import copy
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from tests.support.helpers import raises, seeded

from cpseg.core.reliability import BINS, FLOOR, Reliability

VOID = 255


def draw(
    seed: int, *, num_classes: int = 3, size: tuple[int, int] = (6, 7)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores on a grid of 1/32, so that ties and exact 0 and 1 occur; labels with void."""
    generator = seeded(seed)
    probs = torch.randint(0, 33, (num_classes, *size), generator=generator) / 32
    probs[:, 0, 0] = 0.0
    labels = torch.randint(0, num_classes, size, generator=generator, dtype=torch.uint8)
    labels[torch.rand(size, generator=generator) < 0.2] = VOID
    labels[0, :2] = 0
    return probs, labels


def pixels(probs: torch.Tensor, labels: torch.Tensor) -> list[tuple[list[float], int]]:
    columns = probs.double().flatten(1).T.tolist()
    truths = labels.flatten().tolist()
    return [(p, y) for p, y in zip(columns, truths, strict=True) if y != VOID]


def normal(p: list[float]) -> list[float]:
    total = math.fsum(p)
    return [each / total if total else 1 / len(p) for each in p]


def place(value: float) -> int:
    """The bin (i/15, (i + 1)/15] of a value; 0 is in the first."""
    edges = [(i + 1) / BINS for i in range(BINS)]
    return next(i for i, edge in enumerate(edges) if value <= edge + 1e-12)


def gap(values: list[tuple[float, bool]]) -> float:
    """Calibration error of one score: the bins' gaps, weighted by their pixels."""
    total = 0.0
    for i in range(BINS):
        inside = [(p, right) for p, right in values if place(p) == i]
        if inside:
            confidence = sum(p for p, _ in inside) / len(inside)
            accuracy = sum(right for _, right in inside) / len(inside)
            total += len(inside) / len(values) * abs(confidence - accuracy)
    return total


def ranked(probs: torch.Tensor, labels: torch.Tensor) -> list[tuple[float, bool]]:
    """Confidence and mistake of every pixel, the most confident first."""
    found = [(max(p), p.index(max(p)) != y) for p, y in pixels(probs, labels)]
    return sorted(found, key=lambda pixel: -pixel[0])


def tally(*images: tuple[torch.Tensor, torch.Tensor]) -> Reliability:
    made = Reliability(len(images[0][0]))
    for probs, labels in images:
        made.update(probs, labels)
    return made


@given(st.integers(0, 10**6), st.integers(2, 5))
def test_scores_are_those_of_a_loop(seed: int, num_classes: int) -> None:
    probs, labels = draw(seed, num_classes=num_classes)
    known = pixels(probs, labels)
    found = tally((probs, labels)).scores()
    distributions = [(normal(p), y) for p, y in known]
    nll = [-math.log(max(q[y], 2**-20)) for q, y in distributions]
    brier = [sum((q[k] - (k == y)) ** 2 for k in range(num_classes)) for q, y in distributions]
    assert found.nll == pytest.approx(np.mean(nll), abs=1e-12)
    assert found.brier == pytest.approx(np.mean(brier), abs=1e-12)
    classwise = [gap([(q[k], k == y) for q, y in distributions]) for k in range(num_classes)]
    assert found.classwise_ece == pytest.approx(np.mean(classwise), abs=1e-12)
    top = [(confidence, not wrong) for confidence, wrong in ranked(probs, labels)]
    assert found.ece == pytest.approx(gap(top), abs=1e-12)


@given(st.integers(0, 10**6))
def test_the_diagram_is_that_of_a_loop(seed: int) -> None:
    probs, labels = draw(seed)
    diagram = tally((probs, labels)).diagram()
    for i in range(BINS):
        inside = [pixel for pixel in ranked(probs, labels) if place(pixel[0]) == i]
        assert diagram.pixels[i] == len(inside)
        if inside:
            assert diagram.confidence[i] == pytest.approx(np.mean([p for p, _ in inside]))
            assert diagram.accuracy[i] == pytest.approx(np.mean([not w for _, w in inside]))
        else:
            assert diagram.confidence[i].isnan()
            assert diagram.accuracy[i].isnan()


@given(st.integers(0, 10**6))
def test_error_of_the_most_confident_is_that_of_sorting(seed: int) -> None:
    """Between the ends of a tie its pixels count as drawn: the line through both ends."""
    probs, labels = draw(seed)
    order = ranked(probs, labels)
    made = tally((probs, labels))
    ends, mistakes = [0], [0]
    for number, (confidence, _) in enumerate(order, start=1):
        if number == len(order) or order[number][0] < confidence:
            ends.append(number)
            mistakes.append(sum(wrong for _, wrong in order[:number]))
    shares = torch.linspace(0.01, 1, 37, dtype=torch.float64)
    wanted = [np.interp(len(order) * s, ends, mistakes) / (len(order) * s) for s in shares.tolist()]
    assert made.error_at(shares).tolist() == pytest.approx(wanted, abs=1e-9)
    at_ends = made.error_at(torch.tensor(ends[1:], dtype=torch.float64) / len(order))
    assert at_ends.tolist() == pytest.approx(np.divide(mistakes[1:], ends[1:]), abs=1e-9)
    # The area: the mean of the error over many shares, by the rule of midpoints.
    fine = (np.arange(200_000) + 0.5) / 200_000 * len(order)
    area = np.mean(np.interp(fine, ends, mistakes) / fine)
    assert made.scores().area == pytest.approx(area, abs=2e-5)


def test_the_area_nears_that_of_pixels_one_by_one() -> None:
    """Without ties it is the mean over the pixels of the error up to them, but for 1/n."""
    generator = seeded(3)
    probs = torch.rand(3, 60, 80, generator=generator).pow(2)
    labels = torch.randint(0, 3, (60, 80), generator=generator)
    wrong = np.array([w for _, w in ranked(probs, labels)])
    expected = np.mean(wrong.cumsum() / np.arange(1, len(wrong) + 1))
    assert tally((probs, labels)).scores().area == pytest.approx(expected, abs=2e-3)


def test_a_perfect_model_has_nothing_to_lose() -> None:
    labels = torch.tensor([[0, 1, 2, VOID]])
    probs = torch.nn.functional.one_hot(labels.clamp(max=2), 3).movedim(-1, 0).float()
    made = tally((probs, labels))
    assert made.scores() == (0.0, 0.0, 0.0, 0.0, 0.0)
    assert made.pixels == 3
    assert made.unlikely == 0


def test_a_true_class_of_score_zero_costs_the_floor() -> None:
    probs = torch.tensor([1.0, 0.0]).reshape(2, 1, 1)
    made = tally((probs, torch.tensor([[1]])))
    assert made.scores().nll == pytest.approx(20 * math.log(2), abs=1e-12)
    assert math.log(1 / FLOOR) == pytest.approx(20 * math.log(2))
    assert made.scores().brier == 2
    assert made.unlikely == 1
    assert made.scores().area == 1


@given(st.integers(0, 10**6), st.permutations(range(4)))
def test_any_order_and_merge_gives_the_same(seed: int, order: list[int]) -> None:
    images = [draw(seed + number, size=(3, 4 + number)) for number in range(4)]
    whole = tally(*images)
    left, right = (tally(*(images[n] for n in part)) for part in (order[:1], order[1:]))
    left.merge(right)
    assert left.scores() == pytest.approx(whole.scores(), abs=1e-12)
    assert left.pixels == whole.pixels
    assert left.unlikely == whole.unlikely
    shares = torch.tensor([0.1, 0.5, 1.0])
    assert left.error_at(shares).tolist() == pytest.approx(whole.error_at(shares).tolist())


@given(st.integers(0, 10**6))
def test_void_pixels_influence_nothing(seed: int) -> None:
    probs, labels = draw(seed)
    more = torch.rand(3, *labels.shape, generator=seeded(seed))
    padded = torch.cat([probs, more], -1), torch.cat([labels, torch.full_like(labels, VOID)], -1)
    assert str(tally((probs, labels)).scores()) == str(tally(padded).scores())


def test_counts_survive_two_to_the_31() -> None:
    made = tally(draw(0))
    before, few = made.scores(), made.pixels
    for _ in range(30):
        made.merge(copy.deepcopy(made))
    assert made.pixels == few * 2**30 > 2**34
    assert made.scores() == pytest.approx(before, rel=1e-12)


def test_nothing_seen_is_nan() -> None:
    probs, labels = draw(0)
    for made in (Reliability(3), tally((probs, torch.full_like(labels, VOID)))):
        assert all(math.isnan(value) for value in made.scores())
        assert made.error_at(torch.tensor([0.5])).isnan().all()


def test_other_dtypes_and_a_void_of_their_own() -> None:
    probs, labels = draw(1)
    wanted = tally((probs, labels)).scores()
    made = Reliability(3)
    wide = labels.to(torch.int64)
    made.update(probs.half(), wide.masked_fill(wide == VOID, -1), ignore_index=-1)
    assert made.scores() == wanted, "multiples of 1/32 are exact in half precision"


def test_errors_say_what_to_do() -> None:
    where = "Reliability.update"
    probs, labels = draw(0)
    made = Reliability(3)
    with raises(ValueError, where, r"probs \[3, H, W\], got \[2, 6, 7\]"):
        made.update(probs[:2], labels)
    with raises(ValueError, where, r"probs \[3, H, W\], got \[1, 3, 6, 7\]"):
        made.update(probs[None], labels[None])
    with raises(ValueError, where, "labels"):
        made.update(probs, labels[:3])
    with raises(ValueError, where, "got 7"):
        made.update(probs, torch.full_like(labels, 7))
    with raises(TypeError, where, "floating"):
        made.update(probs.to(torch.uint8), labels)
    assert made.pixels == 0, "nothing of a refused image is counted"
