"""Groups learned from scores: nonconformity curves, and the k-means and annuli made of them.

A curve is what a cell's scores look like: their quantiles over images. Cells with similar curves
may share a threshold. Both learners see the curves through their leading principal components,
which leave out at most 0.1 % of the variance, or more where 16 components do not reach that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cpseg._internal.checks import (
    check_count,
    check_float,
    check_generator,
    check_not_empty,
    message,
    shape,
)
from cpseg._internal.tiling import tiles

Array = np.ndarray[Any, Any]

_VARIANCE, _COMPONENTS = 0.999, 16  # what the search sees of the curves
_STARTS, _SAMPLE = 20, 2**14  # k-means++ starts, and the cells that they look at
_MOST_ANNULI = 128
_LARGEST = 1e12  # scores are near 1
_BLOCKS, _RINGS = 2**12, 128  # blocks of cells in the search for a centre, radii that it tries


def curves(scores: Tensor, levels: int = 100) -> Tensor:
    """Nonconformity curves: the quantiles of every cell's scores over the images.

    Equal to ``torch.nanquantile(scores, torch.linspace(0, 1, levels), dim=0)``, taken over the
    cells in parts, so that the limit of 16 million elements in older PyTorch does not bind.

    Args:
        scores: float ``[N, H, W]``, NaN where there is none; or ``[N, K, H, W]``, a curve for every
            class apart.
        levels: number of evenly spaced probabilities in [0, 1].

    Returns:
        float32 ``[levels, H, W]`` or ``[levels, K, H, W]``, NaN where a cell has no score.

    Raises:
        ValueError: wrong rank, empty or infinite scores, ``levels`` not a positive whole number.
        TypeError: ``scores`` is not floating point.

    Guarantee:
        None. Groups learned on the calibration images void every promise of coverage: learn them
        on other images.

    Reference:
        Brunekreef et al. (2024), Kandinsky conformal prediction.

    Example:
        >>> groups.curves(torch.tensor([0.1, 0.5, torch.nan]).reshape(3, 1, 1), levels=3).flatten()
        tensor([0.1000, 0.3000, 0.5000])
    """
    where = "groups.curves"
    _check_maps(where, scores, name="scores", first="N")
    check_count(where, levels, name="levels", fix="count from 1", most=2**16)
    _check_finite(where, scores, name="scores")
    if scores.dtype != torch.float64:
        scores = scores.to(torch.float32)
    probabilities = torch.linspace(0, 1, levels, dtype=scores.dtype, device=scores.device)
    cells = scores.detach().flatten(1)
    result = torch.empty(levels, cells.shape[1], device=scores.device)
    for part in tiles(cells.shape[1], max(levels, len(cells))):
        result[:, part] = cells[:, part].nanquantile(probabilities, dim=0)
    return result.reshape(levels, *scores.shape[1:])


def kmeans(curves: Tensor, k: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Cells with similar nonconformity curves: k-means over the curves.

    The best of several k-means++ starts, run on at most 16,384 cells drawn at random, goes on with
    all cells. Equal curves share a group. Cells without a score take the group of the nearest cell
    that has one.

    Args:
        curves: float ``[levels, H, W]``, NaN where a cell has no score; or ``[levels, K, H, W]``:
            the curves of all classes side by side, and a class without a score at a cell counts
            there as the mean of its curves elsewhere.
        k: number of groups.
        generator: the source of randomness; PyTorch's own where not given.

    Returns:
        int64 ``[H, W]``: 0 .. k - 1, all used, in ascending order of the mean score.

    Raises:
        ValueError: wrong rank, empty or infinite curves, curves NaN in part or everywhere, ``k``
            not a positive whole number or above the number of distinct curves.
        TypeError: ``curves`` is not floating point.

    Guarantee:
        None. Groups learned on the calibration images void every promise of coverage: learn them
        on other images.

    Reference:
        Brunekreef et al. (2024), Kandinsky conformal prediction; ConformalSAM (ICCV 2025), table 6.

    Example:
        >>> groups.kmeans(torch.tensor([[[0.9, 0.1, 0.1, torch.nan, 0.8]]]), 2)
        tensor([[1, 0, 0, 0, 1]])
    """
    from scipy.ndimage import distance_transform_edt

    where = "groups.kmeans"
    check_count(where, k, name="k", fix="count from 1")
    check_generator(where, generator, _device_of(generator))
    rows, present = _rows(where, curves)
    _, first, inverse = np.unique(_as_bytes(rows), return_index=True, return_inverse=True)
    if k > len(first):
        expected, got = f"k <= {len(first)}, the number of distinct curves", str(k)
        raise ValueError(message(where, expected, got, "ask for fewer groups"))
    distinct = _components(rows)[first]
    centroids = _centroids(distinct[inverse], k, _rng(generator))
    groups = _nearest(distinct, centroids)[inverse]

    mean_score = np.bincount(groups, weights=rows.mean(1, dtype=np.float64)) / np.bincount(groups)
    rank = np.empty(k, dtype=np.int64)
    rank[np.lexsort((np.unique(groups, return_index=True)[1], mean_score))] = np.arange(k)
    result = np.zeros(present.shape, dtype=np.int64)
    result[present] = rank[groups]
    nearest = distance_transform_edt(~present, return_distances=False, return_indices=True)
    return torch.from_numpy(result[tuple(nearest)]).to(curves.device)


def annuli(curves: Tensor, n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Concentric annuli whose cells have similar nonconformity curves: genetic annuli.

    Minimises ``sum_g sum_{i in g} ||x_i - mean_g||^2``, linear in the cells, over the centre and
    the radii; x are curves. As ``sum_{i < j in g} ||x_i - x_j||^2 = n_g sum_i ||x_i - mean_g||^2``,
    this is the sum of squared distances over all pairs within an annulus of ``n_g`` cells, weighted
    by ``1 / n_g``. The published objective sums plain distances over these pairs, all of one
    weight: there a large annulus costs more than its share of the cells.

    Differential evolution moves the centre within the grid, and for every centre the radii are
    solved by dynamic programming over rings of cells. On grids above 4,096 cells the search sees
    means over square blocks, and a local search over all cells follows.

    Args:
        curves: as in :func:`kmeans`.
        n: number of annuli; the innermost is a disc.
        generator: the source of randomness; PyTorch's own where not given.

    Returns:
        int64 ``[H, W]``: 0 .. n - 1 from the centre outwards, each with a cell that has a score.
        Cells without a score count for nothing in the search and belong where they lie.

    Raises:
        ValueError: wrong rank, empty or infinite curves, curves NaN in part or everywhere, ``n``
            not a positive whole number, above 128, or more annuli than cells can fill.
        TypeError: ``curves`` is not floating point.

    Guarantee:
        None. Groups learned on the calibration images void every promise of coverage: learn them
        on other images.

    Reference:
        Brunekreef et al. (2024), Kandinsky conformal prediction; ConformalSAM (ICCV 2025), table 6.

    Example:
        >>> groups.annuli(torch.tensor([[[0.9, 0.1, 0.1, 0.1, 0.9, 0.8]]]), 2)
        tensor([[1, 0, 0, 0, 1, 1]])
    """
    from scipy.optimize import differential_evolution, minimize

    where = "groups.annuli"
    check_count(where, n, name="n", fix="count from 1")
    check_generator(where, generator, _device_of(generator))
    rows, present = _rows(where, curves)
    most = min(len(rows), _MOST_ANNULI)  # the tables of the search grow with n squared
    if n > most:
        expected = f"n <= {most}, annuli that {len(rows)} cells with a score can fill"
        raise ValueError(message(where, expected, f"n = {n}", "ask for fewer annuli"))
    places = np.argwhere(present).astype(np.float64)
    cells = np.column_stack([np.ones(len(rows)), _components(rows)])  # count and sum of curves
    height, width = present.shape
    side = int(np.ceil(np.sqrt(height * width / _BLOCKS)))
    block = np.unique((places // side) @ (width, 1), return_inverse=True)[1]
    blocks = _totals(block, cells)
    middles = _totals(block, places) / blocks[:, :1]
    rings = max(_RINGS, 8 * n)

    def cost(centre: Array, places: Array, cells: Array) -> float:
        return -_part(_rings(_squared(places, centre), rings), cells, n)[0]

    low, high = (-0.5, -0.5), (height - 0.5, width - 0.5)
    bounds = list(zip(low, high, strict=True))
    options: dict[str, Any] = {"popsize": 24, "maxiter": 60, "tol": 1e-6, "polish": False}
    options["seed"] = _rng(generator)
    centre = differential_evolution(cost, bounds, (middles, blocks), **options).x
    if side > 1:
        simplex = np.clip(centre + side * np.array([[0, 0], [1, 0.5], [-0.5, 1]]), low, high)
        options = {"initial_simplex": simplex, "maxfev": 80, "xatol": 0.05, "fatol": 0.0}
        with np.errstate(invalid="ignore"):  # a centre without room for n annuli costs infinity
            local = minimize(
                cost, centre, (places, cells), "Nelder-Mead", bounds=bounds, options=options
            )
        centre = local.x

    squared = _squared(places, centre)
    ring = _rings(squared, 8 * rings)
    first = _part(ring, cells, n)[1]
    if first is None:
        expected = f"annuli that {len(rows)} cells with a score can fill"
        raise ValueError(message(where, expected, f"n = {n}", "ask for fewer annuli"))
    edges = [squared[ring >= start].min() for start in first]
    everywhere = np.argwhere(np.ones_like(present)).reshape(height, width, 2)
    groups = np.searchsorted(edges, _squared(everywhere, centre), side="right")
    return torch.from_numpy(groups.astype(np.int64)).to(curves.device)


def _rows(where: str, curves: Tensor) -> tuple[Array, Array]:
    """The curves of the cells that have one, ``[cells, K * levels]``, and where these are."""
    _check_maps(where, curves, name="curves", first="levels")
    stacked = curves.detach().to("cpu", torch.float32)
    _check_finite(where, stacked, name="curves")
    if stacked.ndim == 3:
        stacked = stacked.unsqueeze(1)
    missing = stacked.isnan()
    none, some = missing.all(0), missing.any(0)
    if not torch.equal(none, some):
        got = f"{int((none != some).sum())} that are so in part"
        fix = "make them with groups.curves"
        raise ValueError(message(where, "curves that are NaN at all levels or none", got, fix))
    present = ~none.all(0)
    if not bool(present.any()):
        got = "NaN everywhere"
        raise ValueError(message(where, "a cell with a score", got, "check the labels for void"))
    rows = rearrange(stacked, "levels k h w -> h w (k levels)")[present].numpy()
    absent = np.isnan(rows)
    if absent.any():  # classes without a score at a cell
        count = np.maximum((~absent).sum(0), 1)
        rows = np.where(absent, np.nansum(rows, axis=0) / count, rows).astype(np.float32)
    return rows, present.numpy()


def _components(rows: Array) -> Array:
    """The leading principal components of the rows, float64 ``[cells, d]``."""
    centred = rows - rows.mean(0, dtype=np.float64).astype(np.float32)
    variances, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    share = np.cumsum(np.maximum(variances[::-1], 0)) / max(variances.sum(), 1e-300)
    keep = min(int(np.searchsorted(share, _VARIANCE)) + 1, _COMPONENTS, len(variances))
    result: Array = (centred @ axes[:, ::-1][:, :keep].astype(np.float32)).astype(np.float64)
    return result


def _as_bytes(rows: Array) -> Array:
    """Every row as one item that compares at once."""
    rows = np.ascontiguousarray(rows + np.float32(0))  # -0.0 and 0.0 are one value
    return rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]


def _centroids(values: Array, k: int, rng: np.random.Generator) -> Array:
    """k-means: the best of several starts on a sample, carried on with all values."""
    import warnings

    from scipy.cluster.vq import kmeans2, vq

    sample = values
    if len(values) > max(_SAMPLE, 8 * k):
        sample = values[rng.choice(len(values), max(_SAMPLE, 8 * k), replace=False)]
    best: tuple[float, Array] | None = None
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", UserWarning)  # an empty group: _nearest fills it
        for _ in range(_STARTS):
            centroids = kmeans2(sample, k, iter=30, minit="++", seed=rng)[0]
            inertia = float(np.square(vq(sample, centroids)[1]).sum())
            if best is None or inertia < best[0]:
                best = inertia, centroids
        assert best is not None
        result: Array = kmeans2(values, best[1], iter=30, minit="matrix")[0]
    return result


def _nearest(distinct: Array, centroids: Array) -> Array:
    """The nearest centroid; one that nobody is nearest to takes the value that fits worst."""
    from scipy.cluster.vq import vq

    groups: Array = vq(distinct, centroids)[0].astype(np.int64)
    misfit = np.square(distinct - centroids[groups]).sum(1)
    while True:
        size = np.bincount(groups, minlength=len(centroids))
        if size.all():
            return groups
        groups[np.where(size[groups] > 1, misfit, -1).argmax()] = size.argmin()


def _squared(places: Array, centre: Array) -> Array:
    """Squared distance to the centre."""
    return np.asarray(np.square(places - centre).sum(-1))


def _rings(squared: Array, most: int) -> Array:
    """Index of the ring around the centre, none empty: every radius, or ``most`` equal steps."""
    if len(squared) <= most:
        return np.asarray(np.unique(squared, return_inverse=True)[1])
    radius = np.sqrt(squared)
    low, high = radius.min(), radius.max()
    step = np.minimum((radius - low) * (most / (high - low)), most - 1).astype(np.int64)
    return np.asarray((np.cumsum(np.bincount(step) > 0) - 1)[step])


def _totals(index: Array, values: Array) -> Array:
    """Sums of the rows of ``values`` that share an index, ``[indices, d]``."""
    count, width = int(index.max()) + 1, values.shape[1]
    flat = (index[:, None] * width + np.arange(width)).ravel()
    sums = np.bincount(flat, weights=values.ravel(), minlength=count * width)
    result: Array = sums.reshape(count, width)
    return result


def _part(ring: Array, cells: Array, n: int) -> tuple[float, list[int] | None]:
    """The best ``n`` runs of rings: the sum of squares between them, and where all but one begin.

    The sum of squares within and between runs is fixed, so the largest between is the best.
    ``cells`` are pairs of count and sum of curves.
    """
    upto = np.pad(_totals(ring, cells).cumsum(0), ((1, 0), (0, 0)))
    if len(upto) <= n:
        return -np.inf, None
    count, total = upto[:, 0], upto[:, 1:]
    square = np.square(total).sum(1)
    run = np.triu(np.ones((len(upto), len(upto)), dtype=bool), 1)  # from a ring to a later one
    size = np.where(run, count - count[:, None], 1)
    between = np.where(run, (square[:, None] + square - 2 * (total @ total.T)) / size, -np.inf)
    best, chosen = between[0], []
    for _ in range(n - 1):
        candidates = best[:, None] + between
        chosen.append(candidates.argmax(0))
        best = candidates.max(0)
    starts = [len(upto) - 1]
    for choice in reversed(chosen):
        starts.append(int(choice[starts[-1]]))
    return float(best[-1]), starts[:0:-1]


def _rng(generator: torch.Generator | None) -> np.random.Generator:
    """NumPy's generator, seeded by a draw from PyTorch's."""
    device = _device_of(generator)
    seed = torch.randint(2**63 - 1, (), generator=generator, device=device)
    return np.random.default_rng(int(seed))


def _device_of(generator: object) -> torch.device:
    """Where a generator draws: the learners take one of any device."""
    return getattr(generator, "device", torch.device("cpu"))


def _check_maps(where: str, maps: Tensor, *, name: str, first: str) -> None:
    """Floating point, ``[first, H, W]`` or ``[first, K, H, W]``, nothing empty."""
    check_float(where, maps, name=name)
    if maps.ndim not in (3, 4):
        expected = f"{name} [{first}, H, W] or [{first}, K, H, W]"
        raise ValueError(message(where, expected, shape(maps), "stack maps of one size"))
    check_not_empty(where, maps, name=name)


def _check_finite(where: str, values: Tensor, *, name: str) -> None:
    """Neither infinity nor what is infinite as a square in float32; NaN is no score."""
    if bool((values.abs() > _LARGEST).any()):
        fix = "score with probabilities, NaN where there is none"
        raise ValueError(message(where, f"finite {name}", "infinite or huge values", fix))
