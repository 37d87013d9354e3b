"""Law 5 (streaming) for all four stores, law 9 (bins), and what the stores keep."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import oracles
from tests.support.helpers import raises, same, seeded
from torch import Tensor

from cpseg import Calibrator, groups
from cpseg._internal import tiling
from cpseg.calibration import score_stores as stores
from cpseg.calibration.score_stores import (
    BinnedScores,
    ClassScores,
    TopScores,
)
from cpseg.core.score_bins import (
    NUM_BINS,
    bin_edges,
    score_bins,
)

GRID = (4, 3)
NUM_CLASSES = 3
STORES: dict[str, dict[str, Any]] = {
    "bounded": {"groups": groups.pixel(GRID), "max_images": 60},
    "unbounded": {"groups": groups.pixel(GRID)},
    "per class": {"groups": groups.pixel(GRID), "per_class": True},
    "binned": {"groups": groups.blocks(GRID, 2)},
    "binned per class": {"groups": groups.blocks(GRID, 2), "per_class": True},
    "images": {"groups": groups.blocks(GRID, 2), "unit": "image"},
    "images per class": {"groups": groups.image(GRID), "unit": "image", "per_class": True},
    "fallback": {"groups": groups.pixel(GRID), "fallback": [groups.image(GRID)]},
    "raps": {"groups": groups.image(GRID), "score": "raps:0.2:1"},
}
PLAIN = [name for name, options in STORES.items() if not {"unit", "fallback", "score"} & {*options}]
WAITING = stores._WAITING
SIZES = [(4, 3), (8, 6), (3, 3), (9, 4), (1, 1), (5, 7)]
Image = tuple[Tensor, Tensor]


def images(seed: int, number: int, *, sizes: list[tuple[int, int]] = SIZES) -> list[Image]:
    """Scores with ties, labels with void, sizes that differ."""
    generator = seeded(seed)
    result = []
    for i in range(number):
        size = sizes[(seed + i * i) % len(sizes)]
        probs = torch.rand(NUM_CLASSES, *size, generator=generator)
        if i % 2:
            probs = (probs * 4).round() / 4
        labels = torch.randint(NUM_CLASSES, size, generator=generator)
        void = torch.rand(size, generator=generator) < (1.0 if i % 7 == 6 else 0.2)
        result.append((probs, labels.masked_fill(void, 255)))
    return result


def build(store: str, alpha: Any = "0.2") -> Calibrator:
    return Calibrator(**STORES[store], alpha=alpha, num_classes=NUM_CLASSES)


def feed(calibrator: Calibrator, some: list[Image]) -> Calibrator:
    for probs, labels in some:
        calibrator.update(probs, labels)
    return calibrator


def equal(one: Calibrator, other: Calibrator, alphas: tuple[str, ...] = ("0.2", "0.07")) -> bool:
    """The same thresholds and counts, bit for bit."""
    if one.num_images != other.num_images:
        return False
    for alpha in alphas:
        left, right = one.compute(alpha), other.compute(alpha)
        if not (same(left.threshold, right.threshold) and same(left.count, right.count)):
            return False
    return True


@pytest.fixture(autouse=True)
def absorb_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images here: the bounded store absorbs every few of them, not every few dozen."""
    monkeypatch.setattr(stores, "_WAITING", 5)


# --- law 5 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", PLAIN)
def test_one_pass_equals_the_oracle(store: str) -> None:
    """Every store, exact: the binned ones are compared at scores that are ends of bins."""
    for number in (1, 5, 20, 45):
        some = images(number, number)
        if store.startswith("binned"):
            edges = bin_edges(torch.device("cpu"))
            some = [(1 - edges[score_bins(1 - p)], y) for p, y in some]
            some = [(p, y) for p, y in some if same(edges[score_bins(1 - p)], 1 - p)]
        if not some or all((y == 255).all() for _, y in some):
            continue
        pairs = [(p.numpy(), y.numpy()) for p, y in some]
        options = STORES[store]
        layers = NUM_CLASSES if options.get("per_class") else None
        calibrator = feed(build(store), some)
        for alpha in ("0.2", "0.05", "0.013"):
            got = calibrator.compute(alpha)
            maps = options["groups"].numpy()
            want, count = oracles.calibrate(pairs, maps, alpha, num_classes=layers)
            assert same(got.count, count)
            assert same(got.threshold, want), alpha


@pytest.mark.parametrize("store", STORES)
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), number=st.integers(2, 50))
def test_any_order_and_any_merge_tree(store: str, seed: int, number: int) -> None:
    some = images(seed, number)
    some[0] = (some[0][0], some[0][1].masked_fill(some[0][1] == 255, 0))  # not all void
    whole = feed(build(store), some)
    draw = np.random.default_rng(seed)
    order = draw.permutation(number)
    parts = [build(store) for _ in range(1 + seed % 5)]
    for i in order:
        feed(parts[draw.integers(len(parts))], [some[i]])
    while len(parts) > 1:  # any tree; some parts saw nothing
        part = parts.pop(int(draw.integers(len(parts))))
        into = parts[int(draw.integers(len(parts)))]
        before = part.num_images
        into.merge(part)
        assert part.num_images == before
        if draw.integers(2) and number < 40:
            part.update(*some[0])  # the one that was merged goes its own way
    assert equal(whole, parts[0])


@pytest.mark.parametrize("store", STORES)
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
def test_any_split_into_batches(store: str, seed: int) -> None:
    some = images(seed, 40, sizes=[(5, 4)])
    probs, labels = (torch.stack(part) for part in zip(*some, strict=True))
    one_by_one, at_once, split = feed(build(store), some), build(store), build(store)
    at_once.update(probs, labels)
    draw = np.random.default_rng(seed)
    cuts = sorted({0, 40, *draw.integers(1, 40, 6).tolist()})
    for start, end in itertools.pairwise(cuts):
        split.update(probs[start:end], labels[start:end].to(torch.uint8))
        if draw.integers(2):
            split.compute()  # looking does not change what comes
    assert equal(one_by_one, at_once)
    assert equal(one_by_one, split)


@pytest.mark.parametrize("store", STORES)
def test_merging_leaves_the_other_as_it_was(store: str) -> None:
    some = images(3, 45)
    one, two = feed(build(store), some[:20]), feed(build(store), some[20:])
    before = two.compute()
    one.merge(two)
    one_before = one.compute()
    feed(one, some[:9])
    after = two.compute()
    assert same(before.threshold, after.threshold)
    assert same(before.count, after.count)
    assert after.num_images == 25
    feed(two, some[:9])
    assert same(one_before.count, feed(build(store), some).compute().count)


@pytest.mark.parametrize("store", STORES)
def test_what_comes_back_and_what_went_in_are_not_shared(store: str) -> None:
    some = images(5, 12, sizes=[GRID])
    calibrator = feed(build(store), some)
    first = calibrator.compute()
    kept = first.threshold.clone(), first.count.clone()
    for probs, labels in some:
        probs.zero_()
        labels.zero_()
    first.threshold.zero_()
    first.count.zero_()
    again = calibrator.compute()
    assert same(again.threshold, kept[0])
    assert same(again.count, kept[1])


@pytest.mark.parametrize("store", ["unbounded", "bounded", "binned"])
def test_scores_given_are_copied_and_equal_to_updates(store: str) -> None:
    some = images(6, 30)
    by_probs = feed(build(store), some)
    by_scores = build(store)
    for probs, labels in some:
        wanted = np.stack([oracles.score_map(probs.numpy(), labels.numpy(), 255)])
        scores = torch.from_numpy(wanted)
        by_scores.update_scores(scores)
        scores.zero_()
    assert equal(by_probs, by_scores)


@pytest.mark.parametrize("tile", [1, 7, 50])
@pytest.mark.parametrize("store", STORES)
def test_tiles_of_cells_meet_without_a_seam(
    monkeypatch: pytest.MonkeyPatch, store: str, tile: int
) -> None:
    some = images(8, 45)
    whole = feed(build(store), some)
    want = whole.compute()
    monkeypatch.setattr(tiling, "TILE", tile)
    tiled = feed(build(store), some[:30])
    tiled.merge(feed(build(store), some[30:]))
    got = tiled.compute()
    assert same(got.threshold, want.threshold)
    assert same(got.count, want.count)


# --- top scores --------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ["0.05", "0.2", "0.5", "0.97", "0.001"])
@pytest.mark.parametrize("bound", [1, 19, 20, 45, 200, 1000])
def test_bounded_equals_unbounded_for_every_alpha_up_to_its_own(alpha: str, bound: int) -> None:
    some = images(11, min(45, bound), sizes=[GRID])
    if all((y == 255).all() for _, y in some):
        return
    bounded = feed(Calibrator(groups.pixel(GRID), alpha=alpha, max_images=bound), some)
    free = feed(Calibrator(groups.pixel(GRID), alpha=alpha), some)
    for part in range(1, 25):
        smaller = Fraction(alpha) * part / 24
        left, right = bounded.compute(smaller), free.compute(smaller)
        assert same(left.threshold, right.threshold)
        assert same(left.count, right.count)


@pytest.mark.parametrize("waiting", [WAITING, 5, 1])
def test_a_bounded_store_keeps_no_more_than_it_says(
    monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    monkeypatch.setattr(stores, "_WAITING", waiting)
    store = TopScores((5, 5), alpha=Fraction("0.05"), max_images=10_000, device=torch.device("cpu"))
    for batch in (1, 3, 50, 200):
        for _ in range(12):
            store.update(torch.rand(batch, 5, 5), None)
            assert store._top.shape == (500, 25)
            assert store._filled <= 500
            assert sum(map(len, store._pending)) < waiting
    assert store.images == 12 * 254
    assert store._filled == 500


@pytest.mark.parametrize("batch", [1, WAITING // 2 + 1, 2 * WAITING + 1])
def test_absorbing_as_seldom_as_outside_of_tests(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(stores, "_WAITING", WAITING)
    number = 4 * WAITING + 3
    scores = torch.rand(number, 2, 3, generator=seeded(0))
    scores[torch.rand(number, 2, 3, generator=seeded(1)) < 0.2] = math.nan
    bounded = Calibrator(groups.pixel((2, 3)), alpha=0.1, max_images=number)
    other = Calibrator(groups.pixel((2, 3)), alpha=0.1, max_images=number)
    for part in scores[: 2 * WAITING + 1].split(batch):
        bounded.update_scores(part)
    for part in scores[2 * WAITING + 1 :].split(batch):
        other.update_scores(part)
    bounded.merge(other)
    free = Calibrator(groups.pixel((2, 3)), alpha=0.1)
    free.update_scores(scores)
    assert equal(bounded, free, ("0.1", "0.034", "0.01"))


def test_a_bound_too_small_for_alpha_gives_infinity() -> None:
    calibrator = Calibrator(groups.pixel(GRID), alpha=0.05, max_images=18)
    feed(calibrator, images(1, 18, sizes=[GRID]))
    assert calibrator.compute().infinite_share == 1.0
    assert int(calibrator.compute().count.sum()) > 0


def test_scores_of_any_size_rank_pixelwise() -> None:
    """Scores made elsewhere may lie outside [0, 1]; -inf and +inf are scores, NaN is none."""
    rows = torch.tensor([-math.inf, -3.0, 0.0, 7.6, math.inf, math.nan, math.nan, 1e30])
    for options in ({}, {"max_images": 8}, {"max_images": 100}):
        calibrator = Calibrator(groups.pixel((1, 1)), alpha=0.9, **options)
        calibrator.update_scores(rows.reshape(-1, 1, 1))
        for percent in range(5, 95, 5):
            alpha = f"{percent / 100}"
            got = calibrator.compute(alpha)
            assert got.threshold.item() == oracles.quantile(rows.tolist(), alpha)
            assert got.count.item() == 6


# --- bins: law 9 -------------------------------------------------------------------------------

CPU = torch.device("cpu")


def odds(s: Tensor) -> Tensor:
    s = s.to(torch.float64)
    return s / (1 - s)


def test_bins_up_to_a_half() -> None:
    """Exhaustive: each edge is the largest float32 of its bin, the next float opens the next."""
    edges = bin_edges(CPU)
    assert edges.dtype == torch.float32
    assert edges.shape == (NUM_BINS,)
    number = torch.arange(int(score_bins(torch.tensor([0.5]))) + 1)
    assert torch.equal(score_bins(edges[number]), number)
    first = torch.nextafter(edges[number[:-1]], torch.tensor(2.0))
    assert torch.equal(score_bins(first), number[1:])
    assert edges[0] == 0
    assert edges[number[-1]] == 0.5
    last = edges[number[1:]]
    inside = last >= 1e-6
    ratio = odds(last[inside]) / odds(first[inside].to(torch.float64).clamp(min=1e-6))
    assert inside.sum() > 4500
    assert 1 <= float(ratio.min()) <= float(ratio.max()) <= 1.01


def test_bins_above_a_half() -> None:
    """Exhaustive: all 2**23 float32 from 1/2 to 1, which lie 2**-24 apart."""
    scores = 1 - torch.arange(2**23, -1, -1, dtype=torch.float64) / 2**24
    single = scores.to(torch.float32)
    assert torch.equal(single.to(torch.float64), scores)
    bins = score_bins(single)
    assert (bins[1:] >= bins[:-1]).all()
    assert bins[-1] == NUM_BINS - 1
    edge = bin_edges(CPU)[bins].to(torch.float64)
    ends = torch.cat([bins[1:] != bins[:-1], torch.tensor([True])])
    assert torch.equal(edge[ends], scores[ends]), "the largest score of its bin"
    assert (edge >= scores).all()
    assert edge[-1] == 1
    inside = scores <= 1 - 1e-6
    assert float((odds(edge[inside]) / odds(scores[inside])).max()) <= 1.01


@given(scores=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40))
def test_bins_grow_with_the_score(scores: list[float]) -> None:
    ordered = torch.tensor(sorted(scores))
    bins = score_bins(ordered)
    assert (bins[1:] >= bins[:-1]).all()
    assert (bin_edges(CPU)[bins] >= ordered).all()


def test_ends_of_bins_grow() -> None:
    edges = bin_edges(torch.device("cpu"))
    assert len(edges) == NUM_BINS
    assert (edges.diff() >= 0).all()  # near 1 bins are finer than floats
    low = edges <= 0.5
    assert torch.equal(score_bins(edges[low]), torch.arange(NUM_BINS)[low])


def test_bins_of_strided_scores_and_signed_zero() -> None:
    scores = torch.rand(6, 8, generator=seeded(0)).T
    assert torch.equal(score_bins(scores), score_bins(scores.contiguous()))
    assert score_bins(torch.tensor([-0.0, 0.0, 1e-45])).tolist() == [0, 0, 1]


def near_the_ends(seed: int, number: int) -> Tensor:
    """Scores over the whole range of odds, some exactly at the ends."""
    draw = np.random.default_rng(seed)
    s = 1 / (1 + np.exp(draw.uniform(-20, 20, number)))
    s[draw.random(number) < 0.1] = 0
    s[draw.random(number) < 0.1] = 1
    return torch.from_numpy(s.astype(np.float32))


@given(seed=st.integers(0, 10**6), percent=st.integers(1, 99))
def test_binned_thresholds_round_up_by_less_than_a_percent(seed: int, percent: int) -> None:
    scores = near_the_ends(seed, 6 * 12).reshape(6, 4, 3)
    scores[0, 0, 0] = math.nan
    calibrator = Calibrator(groups.blocks((4, 3), 2), alpha=0.5)
    calibrator.update_scores(scores)
    alpha = f"{percent / 100}"
    got = calibrator.compute(alpha)
    for group in groups.blocks((4, 3), 2).unique().tolist():
        cells = groups.blocks((4, 3), 2) == group
        exact = oracles.quantile(scores[:, cells].flatten().tolist(), alpha)
        value = got.threshold[cells].unique()
        assert len(value) == 1
        value = value.item()
        assert value >= exact
        if exact in (0.0, 1.0, math.inf):
            assert value == exact
        elif 1e-6 <= exact <= 1 - 1e-6:
            assert value / (1 - value) <= 1.01 * exact / (1 - exact)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_scores_at_the_ends_give_thresholds_at_the_ends(value: float) -> None:
    calibrator = Calibrator(groups.image(GRID), alpha=0.2)
    calibrator.update_scores(torch.full((3, *GRID), value))
    assert calibrator.compute().threshold.unique().tolist() == [value]


@pytest.mark.parametrize("layers", [None, 2])
def test_counts_survive_thirty_two_bits(layers: int | None) -> None:
    maps = groups.blocks((2, 4), 2)
    store = BinnedScores(maps, num_classes=layers, device=CPU)
    assert store._counts.dtype == torch.int64
    edges = bin_edges(CPU)
    low, high = 2000, 7000
    view = store._counts[:-1].reshape(-1, 2, NUM_BINS)
    view[0, 0, low], view[0, 0, high] = 7 * 10**9, 3 * 10**9
    view[0, 1, low] = 5
    scores = torch.full((1, 2, 4), float(edges[low]))
    store.update(scores, None if layers is None else torch.zeros(1, 2, 4, dtype=torch.int64))
    other = BinnedScores(maps, num_classes=layers, device=CPU)
    other.merge(store)
    other.merge(store)
    for one, times in ((store, 1), (other, 2)):
        for alpha, want in (("0.3", low), ("0.29", high), ("0.31", low)):
            threshold, count = one.quantile(Fraction(alpha))
            first = (0, 0) if layers is None else (0, 0, 0)
            last = (1, 3) if layers is None else (0, 1, 3)
            assert threshold[first] == edges[want], alpha
            assert count[first] == times * (10**10 + 4)
            assert count[last] == times * 9
    if layers is not None:
        assert store.quantile(Fraction("0.3"))[0][1].isposinf().all()
    # The very rank, far beyond float32: floor((n + 1) alpha) scores lie above.
    exact = Fraction(3 * 10**9, 10**10 + 5)
    assert store.quantile(exact)[0].flatten()[0] == edges[high]
    exact = Fraction(3 * 10**9 + 1, 10**10 + 5)
    assert store.quantile(exact)[0].flatten()[0] == edges[low]


def test_void_falls_into_no_bin() -> None:
    calibrator = Calibrator(groups.image(GRID), alpha=0.4)
    calibrator.update_scores(torch.full((3, *GRID), math.nan))
    with raises(ValueError, "Calibrator.compute", "only void pixels in 3 images; check ignore"):
        calibrator.compute()
    calibrator.update_scores(torch.full(GRID, 0.5))
    assert calibrator.compute().count.unique().tolist() == [12]


def test_groups_may_be_numbered_with_gaps() -> None:
    maps = torch.tensor([[5, 5], [2, 2]])
    calibrator = Calibrator(maps, alpha=0.5)
    calibrator.update_scores(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert calibrator.compute().threshold.tolist() == [[0.0, 0.0], [1.0, 1.0]]


# --- scores with their classes -----------------------------------------------------------------


def test_a_class_that_never_occurs_at_a_cell_gets_infinity() -> None:
    calibrator = Calibrator(groups.pixel((1, 2)), alpha=0.5, per_class=True, num_classes=3)
    probs = torch.full((4, 3, 1, 2), 0.25)
    labels = torch.tensor([[[0, 1]], [[0, 255]], [[2, 1]], [[0, 255]]])
    calibrator.update(probs, labels)
    got = calibrator.compute()
    assert got.count.tolist() == [[[3, 0]], [[0, 2]], [[1, 0]]]
    want = [[[0.75, math.inf]], [[math.inf, 0.75]], [[0.75, math.inf]]]
    assert got.threshold.tolist() == want


def test_many_classes_keep_their_index() -> None:
    store = ClassScores((1, 1), num_classes=300, device=CPU)
    classes = torch.tensor([299, 0, 257, 255]).reshape(4, 1, 1)
    scores = torch.tensor([0.1, 0.2, 0.3, math.nan]).reshape(4, 1, 1)
    store.update(scores, classes)
    threshold, count = store.quantile(Fraction("0.5"))
    assert count.flatten().nonzero().flatten().tolist() == [0, 257, 299]
    found = threshold.flatten()[[0, 257, 299]]
    assert torch.equal(found, torch.tensor([0.2, 0.3, 0.1]))


@pytest.mark.parametrize("store", PLAIN)
def test_alpha_with_many_digits(store: str) -> None:
    some = images(2, 45)
    for alpha in ("1e-20", 0.001 / 3, "0." + "3" * 30, "0.19999999999999999999"):
        got = feed(build(store, alpha="0.5"), some).compute(alpha)
        if store.startswith("binned"):
            continue  # checked against exact ranks above
        pairs = [(p.numpy(), y.numpy()) for p, y in some]
        layers = NUM_CLASSES if STORES[store].get("per_class") else None
        maps = STORES[store]["groups"].numpy()
        want, _ = oracles.calibrate(pairs, maps, str(alpha), num_classes=layers)
        assert same(got.threshold, want)
