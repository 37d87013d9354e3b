"""Every level of a nested grid of rules at once: against each level by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tests.support import oracles
from tests.support.helpers import FLOATS, same

from cpseg import confusion_matrix, evidence, prediction_set, pseudo_labels
from cpseg.core.nested_rules import confusion_per_alpha, coverage_counts, first_alpha_in_set

VOID = 255
PROBS = (0.0, 0.25, 0.5, 0.75, 1.0, np.nan)  # few values: ties of scores, and scores on thresholds
LIMITS = (-np.inf, 0.0, 0.25, 0.5, 0.625, 0.75, 1.0, np.inf)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int | None]:
    """Probs ``[K, H, W]``, truth with void, growing thresholds, a background."""
    classes, levels = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    size = (draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    probs = draw(arrays(np.float32, (classes, *size), elements=st.sampled_from(PROBS)))
    truth = draw(arrays(np.uint8, size, elements=st.sampled_from([*range(classes), VOID])))
    cells = draw(st.sampled_from([(), size]))
    limits = draw(arrays(np.float32, (levels, *cells), elements=st.sampled_from(LIMITS)))
    background = draw(st.none() | st.integers(0, classes - 1)) if classes > 1 else None
    return probs, truth, np.sort(limits, axis=0), background


def found(problem: tuple[np.ndarray, ...], **options: bool) -> torch.Tensor:
    probs, truth, limits, background = problem
    some = evidence(torch.from_numpy(probs), background=background)
    return confusion_per_alpha(some, torch.from_numpy(truth), torch.from_numpy(limits), **options)


@given(problems())
def test_every_level_is_eq_4_at_that_level(problem: tuple[np.ndarray, ...]) -> None:
    probs, truth, limits, background = problem
    result = found(problem)
    for level, threshold in enumerate(limits):
        chosen = oracles.select(probs, threshold, background, VOID)
        expected = oracles.confusion(chosen, truth, len(probs), VOID)
        assert same(result[level], expected), level


@given(problems())
def test_every_level_is_that_of_pseudo_labels(problem: tuple[np.ndarray, ...]) -> None:
    probs, truth, limits, background = problem
    result = found(problem)
    for level, threshold in enumerate(torch.from_numpy(limits)):
        chosen = pseudo_labels(torch.from_numpy(probs), threshold, background=background)
        options = {"num_classes": len(probs), "with_ignored": True}
        expected = confusion_matrix(chosen, torch.from_numpy(truth), **options)
        assert same(result[level], expected), level


@given(problems())
def test_own_levels_drop_labels_of_the_loosest_level(problem: tuple[np.ndarray, ...]) -> None:
    probs, truth, limits, background = problem
    final = oracles.select(probs, limits[-1], background, VOID)
    result = found(problem, per_class=True)
    for level, threshold in enumerate(limits):
        chosen = final.copy()
        for i, j in np.ndindex(*final.shape):
            k = int(final[i, j])
            limit = oracles.threshold_at(threshold, k, i, j)
            if k != VOID and not oracles.in_set(probs[k, i, j], limit):
                chosen[i, j] = VOID
        assert same(result[level], oracles.confusion(chosen, truth, len(probs), VOID)), level


@given(problems())
def test_own_and_plain_agree_at_the_loosest_level(problem: tuple[np.ndarray, ...]) -> None:
    assert same(found(problem)[-1], found(problem, per_class=True)[-1])


@given(problems())
def test_hits_are_those_of_the_prediction_sets(problem: tuple[np.ndarray, ...]) -> None:
    probs, truth, limits, _ = problem
    known = truth != VOID
    p_true = np.take_along_axis(probs, np.where(known, truth, 0)[None].astype(int), 0)[0]
    result = coverage_counts(
        torch.from_numpy(np.where(known, p_true, np.float32(np.nan))), torch.from_numpy(limits)
    )
    for level, threshold in enumerate(limits):
        sets = prediction_set(torch.from_numpy(probs), torch.as_tensor(threshold)).numpy()
        assert np.array_equal(sets, oracles.sets(probs, threshold))
        inside = [bool(sets[(truth[at], *at)]) for at in np.ndindex(*truth.shape) if known[at]]
        assert int(result[level]) == sum(inside), level


@given(problems())
def test_entry_is_the_first_level_inside(problem: tuple[np.ndarray, ...]) -> None:
    probs, _, limits, _ = problem
    level = first_alpha_in_set(torch.from_numpy(probs[0]), torch.from_numpy(limits))
    assert level.dtype == torch.int64
    for i, j in np.ndindex(*probs.shape[1:]):
        inside = [
            oracles.in_set(probs[0, i, j], oracles.threshold_at(limit, 0, i, j)) for limit in limits
        ]
        expected = inside.index(True) if True in inside else len(limits)
        assert int(level[i, j]) == expected


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_membership_is_by_the_float32_score_of_any_dtype(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(3, 6, 7, generator=generator, dtype=torch.float64).to(dtype)
    truth = torch.randint(3, (6, 7), generator=generator)
    # Thresholds that are scores: a comparison in another dtype would tip over here.
    limits = (1 - probs[0].to(torch.float32)).flatten()[:9].sort().values
    result = confusion_per_alpha(evidence(probs, background=1), truth, limits)
    for level, threshold in enumerate(limits):
        chosen = pseudo_labels(probs, threshold, background=1)
        expected = confusion_matrix(chosen, truth, num_classes=3, with_ignored=True)
        assert same(result[level], expected)


def test_another_void_value() -> None:
    probs, truth = torch.eye(2).reshape(2, 1, 2), torch.tensor([[0, -1]])
    limits = torch.tensor([0.0])
    result = confusion_per_alpha(evidence(probs, background=None), truth, limits, ignore_index=-1)
    assert result.tolist() == [[[1, 0, 0], [0, 0, 0]]]


def test_every_pixel_is_counted_once_at_every_level() -> None:
    generator = torch.Generator().manual_seed(1)
    probs = torch.rand(5, 8, 9, generator=generator)
    truth = torch.randint(5, (8, 9), generator=generator)
    limits = torch.linspace(-0.1, 1.1, 300)  # more levels than a byte holds
    for background in (None, 0, 4):
        for own in (False, True):
            result = confusion_per_alpha(
                evidence(probs, background=background), truth, limits, per_class=own
            )
            assert (result.sum((1, 2)) == 72).all()
            assert (result >= 0).all()
            assert (result[..., -1].diff(dim=0) <= 0).all(), "labels only come, from level to level"
