"""Curves against plain quantiles, k-means and annuli against planted structure and brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.helpers import raises, same, seeded
from torch import Tensor

from cpseg._internal import tiling
from cpseg.groups import learned as learned_groups
from cpseg.groups.learned import annuli, curves, kmeans

LEARNERS = [("groups.kmeans", kmeans), ("groups.annuli", annuli)]


def scores_with_gaps(shape: tuple[int, ...], seed: int = 0, share: float = 0.3) -> Tensor:
    scores = torch.rand(shape, generator=seeded(seed))
    return scores.masked_fill(torch.rand(shape, generator=seeded(seed + 1)) < share, torch.nan)


def naive_curve(scores: np.ndarray, levels: int) -> list[float]:
    """Quantiles of one cell, interpolated by hand."""
    have = sorted(float(score) for score in scores if not math.isnan(score))
    if not have:
        return [math.nan] * levels
    result = []
    for level in range(levels):
        place = level / (levels - 1) * (len(have) - 1)
        below = min(int(place), len(have) - 1)
        above = min(below + 1, len(have) - 1)
        result.append(have[below] + (place - below) * (have[above] - have[below]))
    return result


def within(points: np.ndarray, groups: np.ndarray) -> float:
    """Sum of squared distances to the group's mean."""
    loss = 0.0
    for group in set(groups.tolist()):
        members = [point for point, own in zip(points, groups, strict=True) if own == group]
        mean = sum(members) / len(members)
        loss += sum(float(((member - mean) ** 2).sum()) for member in members)
    return loss


def pairs_within(points: np.ndarray, groups: np.ndarray) -> float:
    """Squared distances over all pairs within a group, weighted by one over its size."""
    loss = 0.0
    for group in set(groups.tolist()):
        members = [point for point, own in zip(points, groups, strict=True) if own == group]
        pairs = itertools.combinations(members, 2)
        loss += sum(float(((a - b) ** 2).sum()) for a, b in pairs) / len(members)
    return loss


def as_points(maps: Tensor) -> np.ndarray:
    return maps.flatten(1).T.double().numpy()


def discs(size: tuple[int, int], centre: tuple[float, float], radii: list[float]) -> Tensor:
    """Annuli around a centre, cell by cell."""
    rows = [
        [sum(math.dist((i, j), centre) >= radius for radius in radii) for j in range(size[1])]
        for i in range(size[0])
    ]
    return torch.tensor(rows)


def noisy_curves(groups: Tensor, seed: int = 0, noise: float = 0.02, levels: int = 12) -> Tensor:
    """Rising curves, higher from group to group."""
    rise = torch.linspace(0, 0.3, levels)[:, None, None]
    spread = noise * torch.randn(levels, *groups.shape, generator=seeded(seed))
    return rise + 0.1 * groups + spread


# --- curves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 4, 5), (1, 2, 3), (6, 3, 2, 4)])
def test_curves_are_quantiles_of_every_cell(shape: tuple[int, ...]) -> None:
    scores = scores_with_gaps(shape)
    got = curves(scores, levels=7)
    assert got.shape == (7, *shape[1:])
    assert got.dtype == torch.float32
    for cell in np.ndindex(shape[1:]):
        want = naive_curve(scores[(slice(None), *cell)].numpy(), 7)
        np.testing.assert_allclose(got[(slice(None), *cell)].numpy(), want, atol=1e-6)


@pytest.mark.parametrize("levels", [1, 2, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_curves_equal_published_code(levels: int, dtype: torch.dtype) -> None:
    scores = scores_with_gaps((11, 6, 7)).to(dtype)
    want = scores.nanquantile(torch.linspace(0, 1, levels, dtype=dtype), dim=0)
    assert same(curves(scores, levels), want.to(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_as_float32(dtype: torch.dtype) -> None:
    scores = scores_with_gaps((11, 3, 4)).to(dtype)
    assert same(curves(scores, 9), curves(scores.to(torch.float32), 9))


@pytest.mark.parametrize("tile", [1, 40, 300])
def test_cells_go_in_parts(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    scores = scores_with_gaps((11, 6, 7))
    want = curves(scores, 10)
    monkeypatch.setattr(tiling, "TILE", tile)
    assert same(curves(scores, 10), want)


def test_more_elements_than_quantile_takes() -> None:
    scores = scores_with_gaps((9, 1500, 1300))
    assert scores.numel() > 2**24  # older releases of PyTorch refuse these
    got = curves(scores, 3)
    for row in (0, 700, 1499):
        assert same(got[:, row], scores[:, row].nanquantile(torch.linspace(0, 1, 3), dim=0))


def test_the_order_of_images_and_void_images_change_nothing() -> None:
    scores = scores_with_gaps((11, 6, 7))
    want = curves(scores, 10)
    assert same(curves(scores[torch.randperm(11, generator=seeded(0))], 10), want)
    assert same(curves(torch.cat([scores, torch.full_like(scores, torch.nan)]), 10), want)


def test_cells_without_a_score_have_no_curve() -> None:
    scores = scores_with_gaps((5, 2, 3), share=0.0)
    scores[:, 1, 2] = torch.nan
    got = curves(scores, 4)
    assert got[:, 1, 2].isnan().all()
    assert got.isnan().sum() == 4


def test_scores_stay_as_they_are() -> None:
    scores = scores_with_gaps((5, 2, 3))
    before = scores.clone()
    curves(scores.requires_grad_(), 4)
    assert same(scores.detach(), before)


@pytest.mark.parametrize(
    ("scores", "levels", "kind", "match"),
    [
        ([0.1], 5, TypeError, "floating-point scores, got list; convert"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), 5, TypeError, r"got torch\.int64"),
        (torch.zeros(2, 2), 5, ValueError, r"\[N, H, W\] or \[N, K, H, W\], got \[2, 2\]"),
        (torch.zeros(2, 2, 2, 2, 2), 5, ValueError, r"got \[2, 2, 2, 2, 2\]"),
        (torch.zeros(0, 2, 2), 5, ValueError, r"at least one element in scores, got \[0, 2, 2\]"),
        (torch.full((2, 2, 2), torch.inf), 5, ValueError, "finite scores, got infinite"),
        (torch.zeros(2, 2, 2), 0, ValueError, "levels as a whole number >= 1, got 0"),
        (torch.zeros(2, 2, 2), 2.0, ValueError, r"whole number >= 1, got 2\.0; count from 1"),
        (torch.zeros(2, 2, 2), True, ValueError, "whole number >= 1, got True"),
    ],
)
def test_scores_that_are_none(scores: Any, levels: Any, kind: Any, match: str) -> None:
    with raises(kind, "groups.curves", match):
        curves(scores, levels)


# --- k-means -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 17), (150, 140)])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_planted_families_are_found(size: tuple[int, int], k: int) -> None:
    planted = torch.randint(k, size, generator=seeded(3))
    assert size[0] < 100 or planted.numel() > learned_groups._SAMPLE
    got = kmeans(noisy_curves(planted), k, generator=seeded(0))
    assert same(got, planted), "and numbered by the mean score"


def test_the_shape_of_a_curve_counts_not_only_its_mean() -> None:
    planted = torch.randint(2, (9, 11), generator=seeded(1))
    flat, steep = torch.full((20,), 0.5), torch.linspace(0, 1, 20)
    maps = torch.where(planted.bool(), steep[:, None, None], flat[:, None, None])
    got = kmeans(maps + 0.02 * torch.randn(maps.shape, generator=seeded(2)), 2)
    assert same(got, planted) or same(got, 1 - planted)


def test_hardly_a_partition_of_few_cells_is_better() -> None:
    """The search is a heuristic: the best of all partitions most of the time, else close."""
    ratios = []
    for seed in range(8):
        maps = torch.rand(4, 2, 4, generator=seeded(seed))
        got = within(as_points(maps), kmeans(maps, 3, generator=seeded(0)).flatten().numpy())
        partitions = (np.array((0, *rest)) for rest in itertools.product(range(3), repeat=7))
        ratios.append(got / min(within(as_points(maps), partition) for partition in partitions))
    assert min(ratios) > 1 - 1e-5
    assert max(ratios) < 1.1
    assert sum(ratio < 1 + 1e-5 for ratio in ratios) >= 6


def test_every_cell_is_nearest_to_its_own_group() -> None:
    points_of = torch.rand(6, 15, 20, generator=seeded(0))
    groups = kmeans(points_of, 5, generator=seeded(0)).flatten()
    points = torch.from_numpy(as_points(points_of))
    means = torch.stack([points[groups == group].mean(0) for group in range(5)])
    assert torch.equal(torch.cdist(points, means).argmin(1), groups)


@pytest.mark.parametrize("upright", [False, True])
def test_cells_without_a_score_join_the_nearest(upright: bool) -> None:
    planted = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]).repeat(3, 1)
    maps = noisy_curves(planted)
    maps[:, :, [1, 2, 4, 5]] = torch.nan
    want = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]]).repeat(3, 1)
    if upright:
        assert same(kmeans(maps.transpose(1, 2), 2), want.T)
    else:
        assert same(kmeans(maps, 2), want)


def test_equal_curves_share_a_group_and_every_group_is_used() -> None:
    kinds = torch.tensor([0.0, 1e-6, 2e-6, 0.5, 0.50001, 1.0])
    index = torch.randint(6, (40, 40), generator=seeded(0))
    maps = kinds[index].expand(5, 40, 40)
    for k in range(1, 7):
        got = kmeans(maps, k, generator=seeded(k))
        assert got.unique().tolist() == list(range(k))
        for kind in range(6):
            assert len(got[index == kind].unique()) == 1
    assert same(kmeans(maps, 6), index)


def test_a_curve_that_the_sample_misses_is_not_lost() -> None:
    maps = torch.zeros(3, 150, 150)
    maps[:, 70, 80], maps[:, 10, 20] = 1.0, 2.0
    for seed in range(3):
        got = kmeans(maps, 3, generator=seeded(seed))
        assert got[70, 80] == 1
        assert got[10, 20] == 2
        assert got.sum() == 3


def test_an_empty_group_takes_no_group_s_only_curve() -> None:
    values, centroids = np.array([[11.0], [0.1], [-0.3]]), np.array([[20.0], [0.0], [0.0]])
    got = learned_groups._nearest(values, centroids)
    assert got.tolist() == [0, 1, 2], "11 fits worst, but group 0 has nothing else"


def test_minus_zero_is_zero() -> None:
    maps = torch.tensor([[[0.0, -0.0, 1.0]]])
    assert kmeans(maps, 2).tolist() == [[0, 0, 1]]
    with raises(ValueError, "groups.kmeans", "k <= 2"):
        kmeans(maps, 3)


def test_more_groups_than_distinct_curves() -> None:
    with raises(ValueError, "groups.kmeans", "k <= 2, the number of distinct curves, got 3; ask"):
        kmeans(torch.tensor([[[0.1, 0.1, 0.7, torch.nan]]]), 3)


def test_classes_count_side_by_side() -> None:
    planted = torch.randint(2, (10, 12), generator=seeded(1))
    first = noisy_curves(torch.zeros_like(planted))
    maps = torch.stack([first, noisy_curves(planted, seed=1)], dim=1)
    assert same(kmeans(maps, 2), planted)
    maps[:, 0, :, :4] = torch.nan  # no score of a class that tells nothing
    assert same(kmeans(maps, 2), planted)
    maps[:, :, 5, 5] = torch.nan
    others = torch.ones_like(planted, dtype=torch.bool)
    others[5, 5] = False
    assert same(kmeans(maps, 2)[others], planted[others])
    maps = torch.cat([maps, torch.full_like(maps[:, :1], torch.nan)], dim=1)
    assert same(kmeans(maps, 2)[others], planted[others]), "nor of a class without any score"


# --- annuli ------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("size", [(24, 30), (90, 100)])
def test_planted_annuli_are_found(size: tuple[int, int]) -> None:
    scale = size[0] / 24
    centre, radii = (9.3 * scale, 17.6 * scale), [4.0 * scale, 8.0 * scale]
    planted = discs(size, centre, radii)
    for seed in range(3):
        got = annuli(noisy_curves(planted), 3, generator=seeded(seed))
        assert got.dtype == torch.int64
        for index, radius in enumerate(radii):
            inner = got <= index
            middle = inner.nonzero().double().mean(0)
            assert math.dist(middle.tolist(), centre) < 1
            assert abs(math.sqrt(float(inner.sum()) / math.pi) - radius) < 1
        assert (got != planted).double().mean() < 0.01


def test_squared_distances_to_the_mean_are_those_over_pairs() -> None:
    """What the docstring says of the objective, for arbitrary groups."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        points, groups = generator.random((12, 3)), generator.integers(0, 4, 12)
        assert within(points, groups) == pytest.approx(pairs_within(points, groups))


def every_partition(size: tuple[int, int], n: int) -> Iterator[np.ndarray]:
    """Annuli around the points of a fine lattice, with any radii."""
    for centre in itertools.product(
        np.arange(-0.47, size[0] - 0.5, 0.11), np.arange(-0.48, size[1] - 0.5, 0.13)
    ):
        reach = [math.dist(cell, centre) for cell in np.ndindex(size)]
        for radii in itertools.combinations(sorted(reach)[1:], n - 1):
            yield np.array([sum(r >= radius for radius in radii) for r in reach])


@pytest.mark.parametrize("n", [2, 3])
def test_no_annuli_of_few_cells_are_better(n: int) -> None:
    for seed in range(3):
        maps = torch.rand(3, 3, 3, generator=seeded(seed))
        points = as_points(maps)
        got = pairs_within(points, annuli(maps, n, generator=seeded(0)).flatten().numpy())
        seen = {tuple(groups.tolist()) for groups in every_partition((3, 3), n)}
        best = min(pairs_within(points, np.array(groups)) for groups in seen)
        assert got <= best * (1 + 1e-5)


def test_transposing_the_grid_transposes_annuli() -> None:
    maps = noisy_curves(discs((24, 30), (9.3, 17.6), [4.0, 8.0]))
    got, turned = annuli(maps, 3), annuli(maps.transpose(1, 2), 3)
    assert (got != turned.T).double().mean() < 0.01


@pytest.mark.parametrize("size", [(24, 30), (90, 100)])
def test_cells_without_a_score_belong_where_they_lie(size: tuple[int, int]) -> None:
    scale = size[0] / 24
    planted = discs(size, (9.3 * scale, 17.6 * scale), [4.0 * scale, 8.0 * scale])
    maps = noisy_curves(planted)
    maps[:, torch.rand(size, generator=seeded(5)) < 0.3] = torch.nan
    maps[:, : size[0] // 6, : size[1] // 3] = torch.nan
    got = annuli(maps, 3)
    assert (got != planted).double().mean() < 0.015


@pytest.mark.nightly
@pytest.mark.parametrize("size", [(1, 6), (6, 1), (3, 3), (1, 1), (20, 20)])
def test_every_annulus_is_used(size: tuple[int, int]) -> None:
    cells = size[0] * size[1]
    for n in {1, 2, 3, cells} if cells <= 9 else {1, 7, 16}:
        if n <= cells:
            got = annuli(torch.rand(4, *size, generator=seeded(0)), n)
            assert got.unique().tolist() == list(range(n))


def test_equal_curves_still_make_annuli() -> None:
    assert annuli(torch.zeros(3, 7, 7), 4).unique().tolist() == [0, 1, 2, 3]


def test_more_annuli_than_cells_with_a_score() -> None:
    maps = torch.full((3, 2, 4), torch.nan)
    maps[:, 0, :2] = 0.5
    assert annuli(maps, 2).unique().tolist() == [0, 1]
    with raises(ValueError, "groups.annuli", "that 2 cells with a score can fill, got n = 3; ask"):
        annuli(maps, 3)


def test_annuli_of_classes() -> None:
    planted = discs((24, 30), (9.3, 17.6), [4.0, 8.0])
    maps = torch.stack([noisy_curves(planted), noisy_curves(0 * planted, seed=1)], dim=1)
    assert (annuli(maps, 3) != planted).double().mean() < 0.01


# --- both --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "learn"), LEARNERS)
def test_seeds_reproduce(where: str, learn: Callable[..., Tensor]) -> None:
    maps = torch.rand(10, 13, 9, generator=seeded(0))
    state = np.random.get_state()[1].copy()  # type: ignore[union-attr]  # noqa: NPY002
    want = learn(maps, 4, generator=seeded(7))
    assert same(learn(maps, 4, generator=seeded(7)), want)
    torch.manual_seed(7)
    assert same(learn(maps, 4), want), "PyTorch's own generator where none is given"
    generator = seeded(7)
    learn(maps, 4, generator=generator)
    assert not torch.equal(generator.get_state(), seeded(7).get_state()), "and it moves on"
    assert (np.random.get_state()[1] == state).all()  # type: ignore[index]  # noqa: NPY002


@pytest.mark.parametrize(("where", "learn"), LEARNERS)
def test_no_warnings_and_no_change_of_the_curves(
    where: str, learn: Callable[..., Tensor], recwarn: pytest.WarningsRecorder
) -> None:
    maps = curves(scores_with_gaps((6, 12, 14), share=0.6), 10)
    before = maps.clone()
    got = learn(maps.requires_grad_(), 3)
    assert got.unique().tolist() == [0, 1, 2]
    assert same(maps.detach(), before)
    assert not recwarn.list


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize(("where", "learn"), LEARNERS)
def test_any_floating_point_dtype(
    where: str, learn: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    maps = noisy_curves(discs((12, 15), (4.3, 8.6), [3.0])).to(dtype)
    want = learn(maps.to(torch.float32), 2, generator=seeded(0))
    assert same(learn(maps, 2, generator=seeded(0)), want)


def in_part() -> Tensor:
    maps = torch.rand(3, 2, 2, generator=seeded(0))
    maps[0, 1, 1] = torch.nan
    return maps


@pytest.mark.parametrize(
    ("maps", "count", "kind", "match"),
    [
        (np.zeros((2, 2, 2)), 1, TypeError, "floating-point curves, got ndarray; convert"),
        (torch.zeros(2, 2, 2, dtype=torch.uint8), 1, TypeError, r"got torch\.uint8"),
        (torch.zeros(2, 2), 1, ValueError, r"\[levels, H, W\] or .*, got \[2, 2\]"),
        (torch.zeros(2, 0, 2), 1, ValueError, r"at least one element in curves, got \[2, 0, 2\]"),
        (torch.full((2, 2, 2), -torch.inf), 1, ValueError, "finite curves, got infinite or"),
        (torch.full((2, 2, 2), 1e300, dtype=torch.float64), 1, ValueError, "finite curves"),
        (in_part(), 1, ValueError, "at all levels or none, got 1 that are so in part; make them"),
        (torch.full((2, 2, 2), torch.nan), 1, ValueError, "a cell with a score, got NaN every"),
        (torch.zeros(2, 2, 2), 0, ValueError, "as a whole number >= 1, got 0; count"),
        (torch.zeros(2, 2, 2), -1, ValueError, "as a whole number >= 1, got -1"),
        (torch.zeros(2, 2, 2), 1.0, ValueError, r"as a whole number >= 1, got 1\.0"),
        (torch.zeros(2, 2, 2), True, ValueError, "as a whole number >= 1, got True"),
    ],
)
@pytest.mark.parametrize(("where", "learn"), LEARNERS)
def test_curves_that_are_none(
    where: str, learn: Any, maps: Any, count: Any, kind: Any, match: str
) -> None:
    with raises(kind, where, match):
        learn(maps, count)
