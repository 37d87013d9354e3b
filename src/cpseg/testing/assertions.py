"""What other people's tests import: calibration problems to try, and the laws as assertions.

The assertions take the user's own callables, so they test any conformal code, not only this
package's, and share no code with it. The strategies need hypothesis, which ``cpseg[dev]`` installs;
the assertions need nothing beyond the package.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp
from scipy.stats import beta
from torch import Tensor

from cpseg._internal.checks import (
    check_alpha,
    check_background,
    check_ignore_index,
    check_label_values,
    check_labels,
    check_probs,
    message,
    shape,
)
from cpseg.testing.strategies import (
    NUMPY,
    POOL,
    at_least_one,
    check_counts,
)

_Array = np.ndarray[Any, Any]

# --- the law behind coverage, without randomness -----------------------------------------------


def assert_leave_one_out(
    quantile: Callable[[Tensor, float], Any],
    *,
    sizes: Iterable[int] = (1, 2, 3, 4, 9, 19, 29, 40),
    alphas: Iterable[float] = (0.5, 0.25, 0.1, 0.05),
    draws: int = 30,
    exact: bool = False,
    seed: int = 0,
) -> None:
    """Of any n + 1 scores, at least ``ceil((n + 1)(1 - alpha))`` are at most the others' quantile.

    This is the coverage theorem without its randomness: where it holds for every n + 1 scores, a
    score exchangeable with n others is at most their quantile with probability 1 - alpha or more.

    Args:
        quantile: the code under test, ``quantile(scores, alpha)`` with float32 scores ``[n]``; it
            returns a number or a tensor with one element.
        sizes: numbers n of scores to take the quantile of, at least 1.
        alphas: miscoverage rates in (0, 1).
        draws: random score vectors for every n and alpha that is not tried exhaustively.
        exact: where no two scores are equal also ask that there be *exactly* so many; it rejects a
            quantile that is larger than need be, +inf for instance.
        seed: of the random vectors.

    Raises:
        AssertionError: the first counterexample: its scores, alpha, the number needed and found.
        ValueError: a size below 1, a rate outside (0, 1), or nothing to try.
        TypeError: ``quantile`` returns something other than one number.

    Guarantee:
        No false alarm. Up to n = 4 every order and every pattern of ties is tried, which decides
        the matter there for rules that depend on ranks only; larger n are tried at random
        vectors, a third of them full of ties, a third with negative scores.

    Reference:
        Vovk, Gammerman & Shafer (2005); Angelopoulos & Bates (2023), appendix D.

    Example:
        >>> def kth_smallest(scores, alpha):
        ...     k = math.ceil((len(scores) + 1) * (1 - alpha))
        ...     return math.inf if k > len(scores) else scores.sort().values[k - 1]
        >>> assert_leave_one_out(kth_smallest)
    """
    where = "assert_leave_one_out"
    tried = sorted(at_least_one(where, "sizes", sizes))
    rates = [(alpha, check_alpha(where, alpha)) for alpha in at_least_one(where, "alphas", alphas)]
    check_counts(where, draws=draws, **{"every size": tried[0]})
    generator = torch.Generator().manual_seed(seed)
    for n in tried:
        for alpha, exact_alpha in rates:
            needed = _rank(n, exact_alpha)
            known: dict[tuple[float, ...], float] = {}
            for vector in _score_vectors(n, draws, generator):
                limits = []
                for i in range(n + 1):
                    others = vector[:i] + vector[i + 1 :]
                    if others not in known:
                        known[others] = _number(where, quantile(torch.tensor(others), alpha))
                    limits.append(known[others])
                got = sum(s <= limit for s, limit in zip(vector, limits, strict=True))
                too_many = exact and got > needed and len(set(vector)) == n + 1
                if got < needed or too_many:
                    raise AssertionError(
                        message(
                            where,
                            f"{'exactly' if too_many else 'at least'} {needed} of the {n + 1} "
                            f"scores {_listed(vector)} at most the quantile of the other {n} "
                            f"(alpha={alpha})",
                            f"{got} with the quantiles {_listed(limits)}",
                            "take the ceil((n + 1)(1 - alpha))-th smallest, +inf above the n-th",
                        )
                    )


def _score_vectors(n: int, draws: int, generator: torch.Generator) -> Iterator[tuple[float, ...]]:
    """Every pattern of n + 1 ranks where they are few, else random scores of three kinds."""
    if (n + 1) ** (n + 1) <= 4000:
        for whole in itertools.product(range(n + 1), repeat=n + 1):
            yield tuple(map(float, whole))
        return
    for i in range(draws):
        if i % 3 == 0:
            drawn = torch.rand(n + 1, generator=generator)
        elif i % 3 == 1:
            drawn = torch.randint(max(2, n // 3), (n + 1,), generator=generator) / 2
        else:
            drawn = torch.randn(n + 1, generator=generator)
        yield tuple(drawn.tolist())


def _number(where: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        got = shape(value) if isinstance(value, Tensor) else type(value).__name__
        fix = "return the quantile of the 1-D scores"
        raise TypeError(message(where, "one number from quantile", got, fix)) from error


def _rank(n: int, alpha: Fraction) -> int:
    return math.ceil((n + 1) * (1 - alpha))


def _listed(values: Iterable[float]) -> str:
    return "[" + ", ".join(f"{value:.9g}" for value in values) + "]"


# --- coverage on fresh draws -------------------------------------------------------------------


def assert_coverage(
    calibrate: Callable[[Tensor, Tensor, float], Any],
    predict: Callable[[Any, Tensor], Tensor],
    draw: Callable[[torch.Generator, int], tuple[Tensor, Tensor]],
    *,
    alpha: float,
    n: int = 20,
    trials: int = 200,
    unit: str = "cell",
    exact: bool = False,
    independent_cells: bool = False,
    ignore_index: int = 255,
    false_alarm: float = 1e-6,
    seed: int = 0,
) -> None:
    """The true class is in the set with probability at least 1 - alpha, measured on fresh draws.

    A trial draws n + 1 images, calibrates on the first n and looks at the last: trials are
    independent and alike, whatever the dependence between the pixels of an image.

    Args:
        calibrate: code under test, ``calibrate(probs, labels, alpha)`` with n images ``[n, K, H,
            W]`` and labels ``[n, H, W]``; it returns what ``predict`` wants.
        predict: code under test, ``predict(calibration, probs)`` with probs ``[1, K, H, W]``; it
            returns sets, bool ``[1, K, H, W]``.
        draw: the world, ``draw(generator, m)``: m exchangeable images, probs ``[m, K, H, W]`` and
            labels ``[m, H, W]``, all randomness from the ``torch.Generator``.
        alpha: miscoverage rate in (0, 1).
        n: calibration images in a trial.
        trials: number of trials.
        unit: whose coverage: ``"cell"``, of a labelled pixel, what pixel-wise thresholds promise
            (an image weighs as much as it has labelled pixels); ``"image"``, the mean over images
            of the covered share of their labelled pixels, what risk control over images promises.
        exact: also test that coverage is no more than ``ceil((n + 1)(1 - alpha))/(n + 1)``, its
            exact value for scores without ties and images without void (below ``1 - alpha +
            1/(n + 1)``); it rejects sets that are larger than need be. Only for thresholds cell
            by cell.
        independent_cells: count cells rather than images. Valid only if ``draw`` makes the
            cells of an image independent of one another, the labels being random too, and every
            cell is calibrated by itself.
        ignore_index: the label of void.
        false_alarm: largest probability, over the seed, that code which keeps the promise fails.
        seed: of the generator that ``draw`` is given.

    Raises:
        AssertionError: measured coverage, its confidence bound, what is promised, the trials.
        ValueError: a value outside its range, shapes that do not belong together, too few trials
            for any outcome to fail, void labels where ``exact`` is asked for.
        TypeError: sets that are not bool, wrong dtypes.

    Guarantee:
        With x the missed share of the test image, E[x] <= alpha is tested by betting: the wealth
        ``mean over r of prod over trials of (1 - r + r x / alpha)``, twelve stakes r in (0, 1),
        has mean at most 1 if the promise is kept, so it reaches 1/false_alarm with at most that
        probability (Markov). Nothing is assumed of x but 0 <= x <= 1. With
        ``independent_cells`` the number of covered cells is tested against the binomial law
        (Clopper & Pearson). With ``exact`` each end has half of the false-alarm rate.

        Power at the default rate, where s is the standard deviation of a trial's missed share,
        at most ``sqrt(alpha (1 - alpha))`` and small with many unlike pixels: a shortfall of
        coverage of ``24 alpha / trials + 9 s / sqrt(trials)`` is found nine times in ten
        (simulated; alpha = 0.1, 200 trials: 0.012 where s is near 0, 0.18 with one pixel an
        image), and with ``exact`` an excess of ``20 / trials + 9 s / sqrt(trials)``. With
        ``independent_cells`` either is ``7 sqrt(alpha (1 - alpha) / (trials * cells))``. A missing
        +1 is a shortfall of at most ``1/(n + 1)``: take n small.

    Reference:
        Waudby-Smith & Ramdas (2024) for betting; Clopper & Pearson (1934).

    Example:
        >>> def draw(generator, m):
        ...     p = torch.rand(m, 2, 8, 8, generator=generator)
        ...     return p, torch.randint(2, (m, 8, 8), generator=generator)
        >>> def calibrate(p, y, alpha):
        ...     scores = (1 - p.gather(1, y[:, None])[:, 0]).sort(0).values
        ...     return scores[math.ceil((len(p) + 1) * (1 - alpha)) - 1]
        >>> assert_coverage(calibrate, lambda q, p: 1 - p <= q, draw, alpha=0.2, trials=100)
    """
    where = "assert_coverage"
    rate = check_alpha(where, alpha)
    check_counts(where, n=n, trials=trials)
    chance = float(check_alpha(where, false_alarm, name="false_alarm")) / (1 + exact)
    if unit not in ("cell", "image"):
        raise ValueError(message(where, "unit 'cell' or 'image'", repr(unit), "choose one"))
    if independent_cells and unit != "cell":
        fix = "leave one of the two out"
        raise ValueError(message(where, "unit 'cell' for independent cells", repr(unit), fix))
    generator = torch.Generator().manual_seed(seed)
    counted = [
        _trial(where, calibrate, predict, draw, generator, alpha, n, ignore_index)
        for _ in range(trials)
    ]
    missed, labelled, cells = np.array(counted, np.float64).T
    if exact and (labelled < cells).any():
        fix = "draw images without void, or leave exact out"
        raise ValueError(message(where, "no void where exact is asked for", "void labels", fix))

    # x: share that errs; weight: share that counts. The promise: E[x] <= alpha E[weight].
    total = np.maximum(labelled, 1) if unit == "image" else cells
    x, weight = missed / total, labelled / total

    def least(hits: _Array, share: _Array) -> float:
        """Lower confidence bound of a rate."""
        if independent_cells:
            return _least_by_counting(hits.sum(), labelled.sum(), chance)
        return _least_by_betting(share, weight, chance)

    if least(labelled, weight) <= rate:
        got = f"{trials} trials with {int(labelled.sum())} labelled cells"
        expected = f"enough trials to find sets that are always empty (alpha={alpha})"
        raise ValueError(message(where, expected, got, "raise trials or false_alarm"))
    coverage = 1 - x.sum() / weight.sum()
    drawn = f"in {trials} trials with n={n}, false-alarm rate {false_alarm:g}"
    most = 1 - least(missed, x)
    if most < 1 - rate:
        raise AssertionError(
            message(
                where,
                f"coverage of at least {float(1 - rate):.4g} (alpha={alpha}, unit {unit!r})",
                f"{coverage:.4f}, at most {most:.4f} by its confidence bound ({drawn})",
                "take the ceil((n + 1)(1 - alpha))-th smallest score and keep what is <= it",
            )
        )
    highest = Fraction(_rank(n, rate), n + 1)
    fewest = least(labelled - missed, weight - x) if exact else 0.0
    if fewest > highest:
        raise AssertionError(
            message(
                where,
                f"coverage of at most {float(highest):.4g} (alpha={alpha}, exact)",
                f"{coverage:.4f}, at least {fewest:.4f} by its confidence bound ({drawn})",
                "take the ceil((n + 1)(1 - alpha))-th smallest score, no larger one",
            )
        )


def _trial(
    where: str,
    calibrate: Callable[[Tensor, Tensor, float], Any],
    predict: Callable[[Any, Tensor], Tensor],
    draw: Callable[[torch.Generator, int], tuple[Tensor, Tensor]],
    generator: torch.Generator,
    alpha: float,
    n: int,
    ignore_index: int,
) -> tuple[int, int, int]:
    """Cells of the fresh image: missed, labelled, all."""
    p, y = draw(generator, n + 1)
    check_probs(where, p, name="probs from draw")
    if p.ndim != 4 or len(p) != n + 1:
        expected = f"probs [{n + 1}, K, H, W] from draw(generator, {n + 1})"
        raise ValueError(message(where, expected, shape(p), "draw as many images as asked for"))
    check_labels(where, y, p, name="labels from draw")
    check_ignore_index(where, ignore_index, p.shape[1])
    check_label_values(where, y, p.shape[1], ignore_index, name="labels from draw")
    sets = predict(calibrate(p[:n], y[:n], alpha), p[n:])
    if not isinstance(sets, Tensor) or sets.dtype != torch.bool:
        got = str(sets.dtype) if isinstance(sets, Tensor) else type(sets).__name__
        raise TypeError(message(where, "bool sets from predict", got, "compare with <="))
    if sets.shape != p[n:].shape:
        expected = f"sets {shape(p[n:])} from predict"
        raise ValueError(message(where, expected, shape(sets), "keep the shape of the probs"))
    truth = y[n:].to(torch.int64)
    void = truth == ignore_index
    inside = sets.gather(1, truth.masked_fill(void, 0).unsqueeze(1)).squeeze(1)
    return int((~inside & ~void).sum()), int((~void).sum()), truth.numel()


_STAKES = np.geomspace(0.01, 0.95, 12)


def _least_by_betting(x: _Array, weight: _Array, chance: float) -> float:
    """Lower confidence bound m of E[x]/E[weight], for independent trials 0 <= x <= weight <= 1.

    A stake r on a trial multiplies wealth by ``1 - r weight + r x / m``, on average by at most 1 if
    E[x] <= m E[weight]. Wealth falls as m grows: the bound is the m at which it is 1/chance.
    """

    def rejected(m: float) -> bool:
        steps = np.log1p(_STAKES[:, None] * (x / m - weight))
        return bool(logsumexp(steps.sum(1)) - math.log(len(_STAKES)) >= -math.log(chance))

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def _least_by_counting(hits: float, cells: float, chance: float) -> float:
    """Lower Clopper-Pearson bound of a probability, for independent cells."""
    return float(beta.ppf(chance, hits, cells - hits + 1)) if hits else 0.0


# --- selection ---------------------------------------------------------------------------------

_SIDES = (4, 8)


def assert_selection_law(
    pseudo_labels: Callable[[Tensor, Tensor, int | None], Tensor],
    *,
    num_classes: Sequence[int] = (2, 3, 5),
    backgrounds: Sequence[int | None] | None = None,
    thresholds: Sequence[str] = ("scalar", "map", "class"),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16),
    ignore_index: int = 255,
    draws: int = 5,
    seed: int = 0,
) -> None:
    """Selection equals the literal Eq. 4, pixel by pixel, on inputs made to break it.

    With C the classes whose float32 score ``1 - p`` is at most the threshold: C empty, ignored;
    only the background in C, background; else the most probable class of C besides the background,
    by p as given, the lowest index among ties.

    Args:
        pseudo_labels: the code under test, ``pseudo_labels(probs, threshold, background)`` with
            probs ``[K, H, W]`` and a float32 threshold tensor; it returns labels ``[H, W]``.
        num_classes: numbers of classes to try.
        backgrounds: background indices to try, None for "every class counts"; left out, None and
            every class.
        thresholds: shapes to try: ``"scalar"`` ``[]``, ``"map"`` ``[H, W]``, ``"class"``
            ``[K, H, W]``.
        dtypes: of the probs, ``torch.float32``, ``torch.float16`` or both.
        ignore_index: the label that ``pseudo_labels`` gives where C is empty.
        draws: images for every combination.
        seed: of the images.

    Raises:
        AssertionError: the first pixel that differs: its scores, threshold, expected, got.
        ValueError: a value outside its range, labels of another shape.
        TypeError: labels that are not integer, another dtype.

    Guarantee:
        No false alarm. Scores tie, are 0 or 1, lie beside one another in float32 or differ where
        their ``1 - p`` do not; thresholds are -inf, +inf, 0, 1, a score of the pixel, or its
        neighbours in float32.

    Reference:
        ConformalSAM (ICCV 2025), eq. 4; its printed second case means that 0 is in C.

    Example:
        >>> def select(probs, threshold, background):
        ...     inside = 1 - probs.float() <= threshold
        ...     kept = torch.where(inside, probs.float(), -1.0)
        ...     if background is not None:  # it loses against every other member of the set
        ...         kept[background] = torch.where(inside[background], -0.5, -1.0)
        ...     return torch.where(inside.any(0), kept.argmax(0), 255)
        >>> assert_selection_law(select)
    """
    where = "assert_selection_law"
    counts = at_least_one(where, "num_classes", num_classes)
    check_counts(where, draws=draws, **{"every num_classes": min(counts)})
    kinds = at_least_one(where, "thresholds", thresholds)
    for kind in kinds:
        if kind not in ("scalar", "map", "class"):
            expected = "thresholds among 'scalar', 'map', 'class'"
            raise ValueError(message(where, expected, repr(kind), "choose among them"))
    for dtype in at_least_one(where, "dtypes", dtypes):
        if dtype not in NUMPY:
            fix = "convert inside the function that is tested"
            raise TypeError(message(where, "torch.float32 or torch.float16", str(dtype), fix))
    random = np.random.default_rng(seed)
    for num in counts:
        check_ignore_index(where, ignore_index, num)
        every = [None, *range(num if num > 1 else 0)] if backgrounds is None else backgrounds
        for background in at_least_one(where, "backgrounds", every):
            check_background(where, background, num)
            for dtype, kind, i in itertools.product(dtypes, kinds, range(draws)):
                p = _adversarial_probs(random, num, i).astype(NUMPY[dtype])
                threshold = _adversarial_thresholds(random, p, kind)
                got = pseudo_labels(torch.from_numpy(p), torch.from_numpy(threshold), background)
                _compare_labels(where, p, threshold, background, ignore_index, got)


def _adversarial_probs(random: np.random.Generator, num_classes: int, i: int) -> _Array:
    """Few values with ties, tiny ones whose ``1 - p`` is 1, or any, in turn."""
    full = (num_classes, *_SIDES)
    if i % 3 == 0:
        return random.choice(np.array(POOL[: 2 + i % 5] if i else POOL), full)
    if i % 3 == 1:
        return random.random(full) ** 3
    return random.choice(np.array([0.0, 1e-9, 2e-9, 1e-3, 0.5, 1.0]), full)


def _adversarial_thresholds(random: np.random.Generator, p: _Array, kind: str) -> _Array:
    """Exactly at a score of the pixel, beside it, or at the ends."""
    full = {"scalar": (), "map": p.shape[1:], "class": p.shape}[kind]
    score = np.float32(1) - p.astype(np.float32)
    if kind != "class":  # of any class, and for a scalar of any pixel
        score = random.permuted(score, axis=0)[0]
    if kind == "scalar":
        score = random.choice(score.ravel())
    ends = np.array([-np.inf, np.inf, 0.0, 1.0, 0.5], np.float32)
    choices = [
        score,
        score,
        np.nextafter(score, np.float32(-1)),
        np.nextafter(score, np.float32(2)),
        random.choice(ends, full),
    ]
    chosen = np.choose(random.integers(len(choices), size=full), choices)
    return np.asarray(chosen, np.float32)


def _compare_labels(
    where: str,
    p: _Array,
    threshold: _Array,
    background: int | None,
    ignore_index: int,
    got: Tensor,
) -> None:
    if not isinstance(got, Tensor) or got.is_floating_point() or got.dtype == torch.bool:
        said = str(got.dtype) if isinstance(got, Tensor) else type(got).__name__
        fix = "return class indices as a tensor"
        raise TypeError(message(where, "integer labels from pseudo_labels", said, fix))
    if got.shape != p.shape[1:]:
        expected = f"labels {list(p.shape[1:])} for probs {list(p.shape)}"
        raise ValueError(message(where, expected, shape(got), "return one label a pixel"))
    for i, j in np.ndindex(*p.shape[1:]):
        at = np.broadcast_to(threshold, p.shape)[:, i, j]
        expected_label = _equation_4(p[:, i, j], at, background, ignore_index)
        label = int(got[i, j])
        if label != expected_label:
            limit = _listed(at) if threshold.ndim == 3 else f"{at[0]:.9g}"
            raise AssertionError(
                message(
                    where,
                    f"label {expected_label} at pixel ({i}, {j}) with {p.dtype} scores "
                    f"p = {_listed(p[:, i, j])}, threshold {limit}, background {background}",
                    f"label {label}",
                    "C holds the classes with float32 1 - p <= threshold; take the largest p in C "
                    "besides the background, the lowest index among ties, ignore where C is empty",
                )
            )


def _equation_4(p: _Array, threshold: _Array, background: int | None, ignore_index: int) -> int:
    """The label of one pixel, case by case."""
    inside = [k for k in range(len(p)) if np.float32(1) - np.float32(p[k]) <= threshold[k]]
    others = [k for k in inside if k != background]
    if not inside:
        return ignore_index
    if not others:
        return inside[0]
    return max(others, key=lambda k: (p[k], -k))


# --- arguments ---------------------------------------------------------------------------------
