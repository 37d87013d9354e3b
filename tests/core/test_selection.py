"""Law 6: selection equals the literal Eq. 4 for every input; sets, evidence, law 8."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support import oracles
from tests.support.helpers import FLOATS, exact, raises, same, seeded
from torch import Tensor

from cpseg import Evidence, evidence, prediction_set, pseudo_labels
from cpseg.core import argmax as best
from cpseg.core.selection import threshold_of

INF, NAN = math.inf, math.nan
# Values that tie, that lie beside one another in float32, and that halves round.
POOL = [0.0, 1.0, 0.5, 0.25, 0.3, 0.7, 0.1, 0.9, 0.05, 1 / 3, 2 / 3, 1e-7, 1 - 2**-24, 0.29999998]
CLASSES = [1, 2, 3, 4, 7, 19, 21, 33]


def adversarial(
    seed: int, num_classes: int, dtype: torch.dtype, *, rank: int, batch: int = 2
) -> tuple[Tensor, Tensor]:
    """Scores drawn from few values, and thresholds exactly at scores or at the ends."""
    draw = np.random.default_rng(seed)
    size = (batch, num_classes, 3, 4)
    pool = POOL if seed % 2 else POOL[: 2 + seed % 5]
    probs = torch.from_numpy(draw.choice(pool, size)).to(dtype)
    scores = (1 - probs.to(torch.float32)).numpy()
    ends = np.array([-np.inf, np.inf, 0.0, 1.0, -0.0, -1e-9, 0.5], np.float32)
    below = np.nextafter(scores.ravel()[:20], np.float32(-1))
    limits = np.concatenate([scores.ravel(), ends, below])
    shape: tuple[int, ...] = {0: (), 2: size[2:], 3: size[1:]}[rank]
    return probs, torch.from_numpy(np.asarray(draw.choice(limits, shape), np.float32))


def backgrounds(num_classes: int) -> list[int | None]:
    if num_classes == 1:
        return [None]
    return [None, *sorted({0, num_classes // 2, num_classes - 1})]


def oracle(probs: Tensor, threshold: Tensor, background: int | None) -> np.ndarray:
    return np.stack([oracles.select(exact(p), threshold.numpy(), background) for p in probs])


# --- prediction sets ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rank", [0, 2, 3])
@given(seed=st.integers(0, 10**6), num_classes=st.sampled_from(CLASSES[:5]))
def test_sets_compare_the_float32_score(
    dtype: torch.dtype, rank: int, seed: int, num_classes: int
) -> None:
    probs, threshold = adversarial(seed, num_classes, dtype, rank=rank, batch=1)
    want = oracles.sets(exact(probs[0]), threshold.numpy())
    assert same(prediction_set(probs[0], threshold), want)
    assert same(prediction_set(probs, threshold), want[None])


def test_a_score_at_the_threshold_is_inside_where_the_other_comparison_fails() -> None:
    """Law 3: p >= 1 - q is another rule in floating point; some p show it."""
    p = torch.rand(100_000, generator=seeded(0)).reshape(1, 1, -1) ** 3
    q = (1 - p)[0]
    assert prediction_set(p, q).all()
    assert not (p >= 1 - (1 - p)).all(), "the test can fail"
    assert not prediction_set(p, torch.nextafter(q, torch.tensor(-1.0))).any()


def test_infinite_thresholds() -> None:
    probs = torch.rand(2, 3, 2, 2, generator=seeded(1))
    assert prediction_set(probs, INF).all()
    assert not prediction_set(probs, -INF).any()
    assert prediction_set(torch.zeros(1, 1, 1), 1).all()


# --- law 6 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rank", [0, 2, 3])
@given(seed=st.integers(0, 10**6), num_classes=st.sampled_from(CLASSES))
def test_selection_is_equation_4(
    dtype: torch.dtype, rank: int, seed: int, num_classes: int
) -> None:
    probs, threshold = adversarial(seed, num_classes, dtype, rank=rank)
    for background in backgrounds(num_classes):
        want = oracle(probs, threshold, background)
        got = pseudo_labels(probs, threshold, background=background)
        assert same(got, want), background
        assert same(pseudo_labels(probs[1], threshold, background=background), want[1])
        if rank < 3:
            found = evidence(probs, background=background)
            assert same(found.pseudo_labels(threshold), want)


@pytest.mark.parametrize("num_classes", [254, 255, 256, 257, 300])
@pytest.mark.parametrize("rank", [0, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_selection_with_many_classes(num_classes: int, rank: int, dtype: torch.dtype) -> None:
    probs, threshold = adversarial(3, num_classes, dtype, rank=rank)
    for seed, ignore in ((3, -1), (5, 1000), (8, 300)):
        probs, threshold = adversarial(seed, num_classes, dtype, rank=rank)
        for background in (None, 0, 253, num_classes - 1):
            got = pseudo_labels(probs, threshold, background=background, ignore_index=ignore)
            want = [oracles.select(exact(p), threshold.numpy(), background, ignore) for p in probs]
            assert same(got, np.stack(want))


def test_the_highest_class_can_win_whatever_their_number() -> None:
    for num_classes in (2, 3, 20, 21, 30, 255, 256, 300):
        for top in {1, num_classes // 2, num_classes - 1}:
            probs = torch.zeros(num_classes, 1, 1)
            probs[top] = 1
            for threshold in (0.5, torch.full((num_classes, 1, 1), 0.5)):
                got = pseudo_labels(probs, threshold, background=0, ignore_index=-1)
                assert got.item() == top


@pytest.mark.parametrize("threshold", [0.75, 0.3, -INF, INF, 0, 1])
def test_a_plain_number_is_a_threshold(threshold: float) -> None:
    probs, _ = adversarial(4, 3, torch.float32, rank=0)
    want = oracle(probs, torch.tensor(threshold, dtype=torch.float32), 0)
    assert same(pseudo_labels(probs, threshold, background=0), want)
    assert same(evidence(probs, background=0).pseudo_labels(threshold), want)


def test_the_cases_of_equation_4_one_by_one() -> None:
    def label(scores: list[float], threshold: float, background: int | None) -> int:
        probs = torch.tensor(scores).reshape(-1, 1, 1)
        return int(pseudo_labels(probs, threshold, background=background))

    assert label([0.6, 0.3, 0.1], 0.2, 0) == 255, "nothing inside"
    assert label([0.6, 0.3, 0.1], 0.5, 0) == 0, "the background alone"
    assert label([0.6, 0.3, 0.1], 0.75, 0) == 1, "the background with another"
    assert label([0.6, 0.3, 0.1], 1.0, 0) == 1, "with two others"
    assert label([0.1, 0.3, 0.6], 0.5, 0) == 2, "without the background"
    assert label([0.6, 0.3, 0.1], 0.75, None) == 0, "every class counts"
    assert label([0.3, 0.3, 0.3], 0.75, 0) == 1, "a tie"
    assert label([0.3, 0.3, 0.3], 0.75, None) == 0
    assert label([0.3, 0.6, 0.3], 0.75, 1) == 0


def test_per_class_thresholds_can_leave_the_most_probable_out() -> None:
    probs = torch.tensor([0.5, 0.4, 0.1]).reshape(3, 1, 1)
    limits = torch.tensor([0.1, 0.1, 0.95]).reshape(3, 1, 1)
    assert pseudo_labels(probs, limits, background=None).item() == 2
    limits = torch.tensor([0.6, 0.1, 0.2]).reshape(3, 1, 1)
    assert pseudo_labels(probs, limits, background=0).item() == 0
    assert pseudo_labels(probs, limits, background=1).item() == 0


def test_a_threshold_per_class_that_is_constant_changes_nothing() -> None:
    for seed in range(20):
        probs, threshold = adversarial(seed, 4, torch.float32, rank=2)
        stacked = threshold.expand(4, -1, -1)
        for background in (None, 0, 3):
            want = pseudo_labels(probs, threshold, background=background)
            assert same(pseudo_labels(probs, stacked, background=background), want)


def test_strided_scores_and_thresholds() -> None:
    probs, threshold = adversarial(7, 5, torch.float32, rank=3)
    want = oracle(probs, threshold, 2)
    last = probs.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not last.is_contiguous()
    assert same(pseudo_labels(last, threshold, background=2), want)
    assert same(pseudo_labels(probs.mT.contiguous().mT, threshold, background=2), want)
    wide = torch.stack([probs, probs], -1)[..., 0]
    limits = torch.stack([threshold, threshold], -1)[..., 0]
    assert same(pseudo_labels(wide, limits, background=2), want)
    one = probs[:1].expand(3, -1, -1, -1)
    assert same(pseudo_labels(one, threshold, background=2), np.stack([want[0]] * 3))


def test_inputs_stay_as_they_are_and_no_graph_is_kept() -> None:
    probs, threshold = adversarial(9, 5, torch.float32, rank=3)
    before = probs.clone(), threshold.clone()
    probs.requires_grad_()
    for limit in (threshold, threshold[0], 0.5):
        assert not pseudo_labels(probs, limit, background=1).requires_grad
    found = evidence(probs, background=1)
    assert not found.best.requires_grad
    assert found.background_score is not None
    assert not found.background_score.requires_grad
    found.pseudo_labels(threshold[0])
    assert same(probs.detach(), before[0])
    assert same(threshold, before[1])


# --- output ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore", [255, 4, 7])
def test_dtype_and_ignore_index(dtype: torch.dtype, ignore: int) -> None:
    for rank in (0, 2, 3):
        probs, threshold = adversarial(11, 4, torch.float32, rank=rank)
        options: dict[str, Any] = {"background": 1, "ignore_index": ignore}
        want = [oracles.select(exact(p), threshold.numpy(), 1, ignore) for p in probs]
        got = pseudo_labels(probs, threshold, dtype=dtype, **options)
        assert same(got, torch.from_numpy(np.stack(want)).to(dtype))


def test_negative_ignore_index() -> None:
    probs = torch.tensor([0.6, 0.1]).reshape(2, 1, 1)
    for threshold in (0.1, torch.full((2, 1, 1), 0.1)):
        for dtype in (torch.int8, torch.int64):
            got = pseudo_labels(probs, threshold, background=0, ignore_index=-100, dtype=dtype)
            assert got.item() == -100
            assert got.dtype == dtype


# --- NaN ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [None, 0, 2])
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_pixel_with_a_nan_is_ignored(
    background: int | None, per_class: bool, dtype: torch.dtype
) -> None:
    for k in range(4):
        if k == background:
            continue
        probs = torch.tensor([0.9, 0.8, 0.7, 0.95], dtype=dtype).reshape(4, 1, 1).repeat(1, 1, 3)
        probs[k, 0, 1] = NAN
        threshold = torch.full((4, 1, 3), 0.5) if per_class else 0.5
        got = pseudo_labels(probs, threshold, background=background).flatten().tolist()
        assert got[0] == got[2] == 3
        assert got[1] == 255


@pytest.mark.parametrize("per_class", [False, True])
def test_a_pixel_with_a_nan_background_is_ignored(per_class: bool) -> None:
    probs = torch.tensor([NAN, 0.9, 0.1]).reshape(3, 1, 1)
    threshold = torch.full((3, 1, 1), 0.5) if per_class else 0.5
    assert pseudo_labels(probs, threshold, background=0).item() == 255


def test_a_nan_background_alone_is_ignored() -> None:
    probs = torch.tensor([NAN, 0.2, 0.1]).reshape(3, 1, 1)
    for threshold in (0.5, torch.full((3, 1, 1), 0.5)):
        assert pseudo_labels(probs, threshold, background=0).item() == 255


def test_a_nan_threshold_takes_nothing() -> None:
    probs = torch.tensor([0.2, 0.9, 0.1]).reshape(3, 1, 1)
    assert not prediction_set(probs, torch.full((3, 1, 1), NAN)).any()
    assert pseudo_labels(probs, torch.full((1, 1), NAN), background=0).item() == 255


def test_a_nan_threshold_per_class_takes_nothing() -> None:
    probs = torch.tensor([0.2, 0.9, 0.1]).reshape(3, 1, 1)
    assert pseudo_labels(probs, torch.full((3, 1, 1), NAN), background=0).item() == 255


# --- three implementations ---------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [1, 2, 3, 9, 10, 11, 19, 20, 21, 30, 45, 257])
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("with_nan", [False, True])
def test_tiled_by_index_and_compiled_agree(
    num_classes: int, per_class: bool, dtype: torch.dtype, with_nan: bool
) -> None:
    for seed in (12, 13):
        probs, threshold = adversarial(seed, num_classes, dtype, rank=3)
        limit = threshold if per_class else None
        if with_nan:
            probs[0, num_classes // 2, 1, 1] = NAN
            probs[1, num_classes - 1, 2, 3] = NAN
            probs[1, 0, 0, 0] = NAN
        for background in backgrounds(num_classes):
            value, index = best._by_index(probs, background, limit)
            some = value > -INF  # where no class is inside, and at NaN, any class may stand
            others = [k for k in range(num_classes) if k != background]
            assert same(value, best._masked(probs, limit)[:, others].amax(1))
            for way in (best._tiled, best._compiled):
                got, got_index = way(probs, background, limit)
                assert same(got, value), way
                assert torch.equal(got_index.to(torch.int64)[some], index[some]), way
                stray = got_index.to(torch.int64)
                assert ((stray >= 0) & (stray < num_classes)).all()
            assert with_nan or per_class or some.all()


@pytest.mark.parametrize("implementation", ["_by_index", "_compiled"])
def test_every_implementation_selects_alike(
    monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    """What another machine runs in place of the tiles gives the labels of Eq. 4 too."""
    monkeypatch.setattr(best, "_tiled", getattr(best, implementation))
    for seed in range(16):
        for rank in (0, 2, 3):
            num_classes = CLASSES[seed % len(CLASSES)]
            probs, threshold = adversarial(seed, num_classes, torch.float32, rank=rank)
            for background in backgrounds(num_classes):
                want = oracle(probs, threshold, background)
                assert same(pseudo_labels(probs, threshold, background=background), want)
    test_a_pixel_with_a_nan_is_ignored(0, True, torch.float32)
    test_a_pixel_with_a_nan_is_ignored(0, False, torch.float32)


def test_tiles_meet_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    probs = torch.rand(2, 5, 13, 7, generator=seeded(2))
    threshold = torch.rand(5, 13, 7, generator=seeded(3))
    want = best._tiled(probs, 2, threshold)
    for tile in (1, 5 * 7, 3 * 5 * 7, 4 * 5 * 7 + 3):
        monkeypatch.setattr(best, "_CACHED", tile)
        got = best._tiled(probs, 2, threshold)
        assert same(got[0], want[0])
        assert same(got[1], want[1])
    assert same(want[0], best._by_index(probs, 2, threshold)[0])


# --- evidence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_evidence_holds_what_it_says(dtype: torch.dtype) -> None:
    probs, _ = adversarial(21, 4, dtype, rank=0)
    found = evidence(probs, background=1)
    others = probs[:, [0, 2, 3]]
    assert found.best.dtype == dtype
    assert same(found.best, others.amax(1))
    values = exact(probs)
    for b, i, j in np.ndindex(2, 3, 4):
        k = min((k for k in (0, 2, 3)), key=lambda k: (-values[b, k, i, j], k))
        assert found.best_class[b, i, j] == k
    assert found.best_class.dtype == torch.uint8
    assert found.background_score is not None
    assert same(found.background_score, probs[:, 1])
    assert (found.background, found.num_classes) == (1, 4)
    assert evidence(probs, background=None).background_score is None
    assert evidence(probs[0], background=None).best.shape == (3, 4)
    one = evidence(probs[0], background=1)
    assert one.best.shape == one.best_class.shape == (3, 4)
    assert same(one.best, found.best[0])


def test_evidence_does_not_hold_all_scores() -> None:
    probs = torch.rand(1, 50, 4, 4)
    found = evidence(probs, background=0)
    for kept in (found.best, found.best_class, found.background_score):
        assert kept is not None
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
    probs.zero_()
    assert found.best.min() > 0
    assert found.background_score is not None
    assert found.background_score.max() > 0


def test_the_index_of_evidence_is_wide_enough() -> None:
    for num_classes, dtype in ((255, torch.uint8), (256, torch.int16), (300, torch.int16)):
        probs = torch.zeros(num_classes, 1, 1)
        probs[-1] = 1
        found = evidence(probs, background=None)
        assert found.best_class.dtype == dtype
        assert found.best_class.item() == num_classes - 1


@given(seed=st.integers(0, 10**6), num_classes=st.sampled_from(CLASSES[1:6]))
def test_evidence_argmax_is_the_first_largest(seed: int, num_classes: int) -> None:
    probs, _ = adversarial(seed, num_classes, torch.float32, rank=0)
    want = np.argmax(probs.numpy(), 1)  # the first of the largest
    for background in backgrounds(num_classes):
        found = evidence(probs, background=background)
        assert same(found.argmax(), want)
        assert found.argmax(dtype=torch.uint8).dtype == torch.uint8
        assert same(found.argmax(dtype=torch.uint8).to(torch.int64), want)


def test_an_argmax_of_a_dtype_that_does_not_hold_it() -> None:
    found = evidence(torch.rand(300, 2, 2), background=None)
    assert found.argmax(dtype=torch.int16).dtype == torch.int16
    with raises(
        ValueError, "Evidence.argmax", r"labels 0\.\.299, got torch\.uint8; pass torch\.int"
    ):
        found.argmax(dtype=torch.uint8)
    with raises(TypeError, "Evidence.argmax", r"integer dtype, got torch\.float32"):
        found.argmax(dtype=torch.float32)


# --- laws 4 and 8 ------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), num_classes=st.sampled_from([2, 3, 5, 21]))
def test_a_larger_threshold_keeps_more(seed: int, num_classes: int) -> None:
    probs, low = adversarial(seed, num_classes, torch.float32, rank=3)
    high = torch.maximum(low, adversarial(seed + 1, num_classes, torch.float32, rank=3)[1])
    assert not (prediction_set(probs, low) & ~prediction_set(probs, high)).any()
    for background in backgrounds(num_classes):
        few = pseudo_labels(probs, low, background=background) != 255
        many = pseudo_labels(probs, high, background=background) != 255
        assert not (few & ~many).any()


@given(seed=st.integers(0, 10**6), num_classes=st.sampled_from([3, 5, 21]))
def test_permuting_the_other_classes_permutes_the_labels(seed: int, num_classes: int) -> None:
    generator = seeded(seed)
    probs = torch.rand(2, num_classes, 3, 4, generator=generator)
    threshold = torch.rand(num_classes, 3, 4, generator=generator)
    background = seed % num_classes
    order = torch.randperm(num_classes, generator=generator)
    place = int((order == background).nonzero())  # the background stays where it is
    order[place], order[background] = order[background].clone(), background
    new_index = torch.full((256,), 255)
    new_index[order] = torch.arange(num_classes)
    for limit, permuted in ((threshold, threshold[order]), (threshold[0], threshold[0])):
        want = new_index[pseudo_labels(probs, limit, background=background)]
        assert same(pseudo_labels(probs[:, order], permuted, background=background), want)


# --- errors ------------------------------------------------------------------------------------

PROBS = torch.rand(2, 4, 3, 5, generator=seeded(0))

BAD_PROBS: list[tuple[Any, type[Exception], str]] = [
    (torch.rand(3, 5), ValueError, r"probs \[B, K, H, W\] or \[K, H, W\], got \[3, 5\]; pass"),
    (torch.rand(0, 4, 3, 5), ValueError, "at least one element in probs"),
    (torch.ones(4, 3, 5, dtype=torch.uint8), TypeError, r"got torch\.uint8; divide uint8"),
    (np.ones((4, 3, 5)), TypeError, "probs as a tensor, got ndarray; convert"),
]


@pytest.mark.parametrize(("probs", "kind", "match"), BAD_PROBS)
def test_probs_that_are_none(probs: Any, kind: type[Exception], match: str) -> None:
    with raises(kind, "prediction_set", match):
        prediction_set(probs, 0.5)
    with raises(kind, "pseudo_labels", match):
        pseudo_labels(probs, 0.5, background=0)
    with raises(kind, "evidence", match):
        evidence(probs, background=0)


@pytest.mark.parametrize(
    ("threshold", "kind", "match"),
    [
        (torch.zeros(5, 3), ValueError, r"\[\], \[3, 5\] or \[4, 3, 5\] .*, got \[5, 3\]; bring"),
        (torch.zeros(3, 3, 5), ValueError, r"got \[3, 3, 5\]"),
        (torch.zeros(1, 3, 5), ValueError, r"got \[1, 3, 5\]"),
        (torch.zeros(2, 4, 3, 5), ValueError, r"got \[2, 4, 3, 5\]"),
        (torch.zeros(1), ValueError, r"got \[1\]"),
        (torch.zeros(4), ValueError, r"got \[4\]"),
        (torch.zeros((), dtype=torch.int64), TypeError, r"a float32 threshold, got torch\.int64"),
        (torch.zeros(3, 5).bool(), TypeError, r"got torch\.bool"),
        (torch.zeros(3, 5, device="meta"), ValueError, r"threshold on the device of probs \(cpu\)"),
        (torch.zeros(4, 3, 5, device="meta"), ValueError, "got meta; move one"),
    ],
)
def test_thresholds_that_are_none(threshold: Any, kind: type[Exception], match: str) -> None:
    with raises(kind, "prediction_set", match):
        prediction_set(PROBS, threshold)
    with raises(kind, "pseudo_labels", match):
        pseudo_labels(PROBS, threshold, background=0)


@pytest.mark.parametrize("threshold", ["x", None, np.zeros((3, 5))])
def test_thresholds_that_are_no_numbers(threshold: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        prediction_set(PROBS, threshold)
    if not str(caught.value).startswith("prediction_set: expected "):
        raise caught.value


@pytest.mark.parametrize(
    ("background", "kind", "match"),
    [
        (4, ValueError, r"background in 0\.\.3 or None, got 4; pass the index"),
        (-1, ValueError, r"background in 0\.\.3 or None, got -1"),
        (True, TypeError, "background as int or None, got True"),
        (0.0, TypeError, "background as int or None, got 0.0"),
        ("0", TypeError, "got '0'"),
    ],
)
def test_backgrounds_that_are_none(background: Any, kind: type[Exception], match: str) -> None:
    for threshold in (0.5, torch.zeros(4, 3, 5)):
        with raises(kind, "pseudo_labels", match):
            pseudo_labels(PROBS, threshold, background=background)
    with raises(kind, "evidence", match):
        evidence(PROBS, background=background)


def test_one_class_cannot_be_the_background_but_works_without() -> None:
    with raises(ValueError, "pseudo_labels", "a class besides the background, got 1 class"):
        pseudo_labels(PROBS[:, :1], 0.5, background=0)
    with raises(ValueError, "evidence", "a class besides the background, got 1 class"):
        evidence(PROBS[:, :1], background=0)
    probs = torch.tensor([[[0.6, 0.4]]])
    assert pseudo_labels(probs, 0.5, background=None).tolist() == [[0, 255]]


OUTPUTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ignore_index": 0}, ValueError, r"an ignore_index outside the classes 0\.\.3, got 0"),
    ({"ignore_index": 3}, ValueError, "got 3; pass ignore_index=-1"),
    ({"dtype": torch.float32}, TypeError, r"an integer dtype, got torch\.float32; pass"),
    ({"dtype": torch.bool}, TypeError, r"an integer dtype, got torch\.bool"),
    ({"dtype": torch.complex64}, TypeError, "an integer dtype"),
    ({"dtype": torch.int8}, ValueError, r"a dtype that holds labels 0\.\.255, got torch\.int8"),
    (
        {"dtype": torch.uint8, "ignore_index": -1},
        ValueError,
        r"holds labels -1\.\.3, got torch\.uint8; pass torch\.int64",
    ),
    ({"dtype": torch.uint8, "ignore_index": 256}, ValueError, r"holds labels 0\.\.256"),
]


@pytest.mark.parametrize(("options", "kind", "match"), OUTPUTS)
def test_outputs_that_are_none(options: dict[str, Any], kind: type[Exception], match: str) -> None:
    with raises(kind, "pseudo_labels", match):
        pseudo_labels(PROBS, torch.zeros(4, 3, 5), background=0, **options)
    with raises(kind, "Evidence.pseudo_labels", match):
        evidence(PROBS, background=0).pseudo_labels(0.5, **options)


@pytest.mark.parametrize(("options", "kind", "match"), OUTPUTS)
def test_errors_name_the_function_that_was_called(
    options: dict[str, Any], kind: type[Exception], match: str
) -> None:
    with raises(kind, "pseudo_labels", match):
        pseudo_labels(PROBS, 0.5, background=0, **options)


@pytest.mark.parametrize(
    ("threshold", "kind", "match"),
    [
        (torch.zeros(4, 3, 5), ValueError, r"threshold \[\] or \[H, W\], got \[4, 3, 5\]; thresh"),
        (torch.zeros(5, 3), ValueError, r"got \[5, 3\]"),
        (torch.zeros(3, 5, dtype=torch.int64), TypeError, r"got torch\.int64"),
        (torch.zeros(3, 5, device="meta"), ValueError, r"\(cpu\), got meta"),
    ],
)
def test_evidence_thresholds_that_are_none(
    threshold: Tensor, kind: type[Exception], match: str
) -> None:
    with raises(kind, "Evidence.pseudo_labels", match):
        evidence(PROBS, background=0).pseudo_labels(threshold)


def test_evidence_is_frozen() -> None:
    found = evidence(PROBS, background=0)
    assert isinstance(found, Evidence)
    with pytest.raises(AttributeError):
        found.background = 1  # type: ignore[misc]


@pytest.mark.parametrize("background", [None, 2])
@pytest.mark.parametrize("num_classes", [4, 300])
def test_the_score_and_threshold_of_selected_labels(
    background: int | None, num_classes: int
) -> None:
    probs, _ = adversarial(1, num_classes, torch.float16, rank=2)
    found = evidence(probs, background=background)
    labels = found.pseudo_labels(0.6, ignore_index=-1)
    per_class = torch.rand(num_classes, *labels.shape[-2:], generator=seeded(0))
    score = found.score_of(labels, ignore_index=-1)
    threshold = threshold_of(labels, per_class, ignore_index=-1)
    assert score.dtype == torch.float32
    assert same(threshold_of(labels, per_class[0], ignore_index=-1), per_class[0])
    for b, y, x in np.ndindex(*labels.shape):
        label = int(labels[b, y, x])
        if label < 0:
            assert score[b, y, x].isnan()
        else:
            assert score[b, y, x] == 1 - probs[b, label, y, x].float()
            assert threshold[b, y, x] == per_class[label, y, x]
    alone = evidence(probs[0], background=background).score_of(labels[0], ignore_index=-1)
    assert same(alone, score[0])
    assert same(threshold_of(labels[0], per_class, ignore_index=-1), threshold[0])
