"""Hypothesis strategies for calibration problems; they need ``cpseg[dev]``."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cpseg._internal.checks import check_alpha, check_ignore_index, message

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

# Ends, ties, neighbours in float32, and values whose `1 - p` is rounded.
POOL = (0.0, 1.0, 0.5, 0.25, 0.3, 0.7, 0.1, 0.9, 1 / 3, 2 / 3, 1e-7, 1 - 2**-24, 0.29999998)
_LARGEST = 4096  # values in one example; hypothesis shrinks nothing larger in reasonable time
NUMPY = {torch.float16: np.float16, torch.float32: np.float32}


def scores(
    *,
    min_images: int = 1,
    max_images: int = 12,
    size: tuple[int, ...] = (),
    void: bool = True,
    infinite: bool = False,
) -> SearchStrategy[Tensor]:
    """Stacked nonconformity scores in [0, 1], with ties, exact 0 and 1, and NaN where void.

    Args:
        min_images: the fewest scores of a cell, at least 1.
        max_images: the most.
        size: the grid; ``()`` is one cell.
        void: with NaN among the scores; all of them may be.
        infinite: with +inf among the scores.

    Returns:
        A strategy for float32 ``[n, *size]``.

    Raises:
        ValueError: a size below 1, or more than 4096 values.
        ImportError: hypothesis is not installed.

    Example:
        >>> from hypothesis import find
        >>> find(scores(max_images=3), lambda s: bool(s.isnan().any()))
        tensor([nan])
    """
    where = "scores"
    _need_hypothesis(where)
    check_counts(where, min_images=min_images, max_images=max_images)
    check_range(where, "images", min_images, max_images)
    check_grid(where, max_images, *size)
    from hypothesis import strategies as st

    values = _floats(torch.float32)
    if void:
        values |= st.just(math.nan)
    if infinite:
        values |= st.just(math.inf)
    number = st.integers(min_images, max_images)
    return number.flatmap(lambda n: _tensors(np.float32, (n, *size), values))


def labels(
    *,
    num_classes: int,
    size: tuple[int, int],
    images: int = 1,
    void: bool = True,
    ignore_index: int = 255,
    dtypes: Sequence[torch.dtype] = (torch.uint8, torch.int64),
) -> SearchStrategy[Tensor]:
    """True classes ``0..K-1``, and void.

    Args:
        num_classes: number of classes K.
        size: height and width.
        images: number of images B.
        void: with void among the labels; all of them may be.
        ignore_index: the label of void.
        dtypes: integer dtypes to choose from.

    Returns:
        A strategy for integer ``[B, H, W]``.

    Raises:
        ValueError: a size below 1, more than 4096 values, ``ignore_index`` is a class, or a label
            does not fit a dtype.
        TypeError: a dtype that is not integer.
        ImportError: hypothesis is not installed.

    Example:
        >>> from hypothesis import find
        >>> find(labels(num_classes=2, size=(1, 1), dtypes=[torch.int64]), lambda y: y.max() > 1)
        tensor([[[255]]])
    """
    where = "labels"
    _need_hypothesis(where)
    check_counts(where, num_classes=num_classes)
    check_grid(where, images, *size)
    check_ignore_index(where, ignore_index, num_classes)
    values = [*range(num_classes), *([ignore_index] if void else [])]
    for dtype in at_least_one(where, "dtypes", dtypes):
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            fix = "pass torch.uint8 or torch.int64"
            raise TypeError(message(where, "integer dtypes", str(dtype), fix))
        info = torch.iinfo(dtype)
        if min(values) < info.min or max(values) > info.max:
            expected = f"dtypes that hold {min(values)}..{max(values)}"
            raise ValueError(message(where, expected, str(dtype), "pass torch.int64"))
    from hypothesis import strategies as st

    drawn = _tensors(np.int64, (images, *size), st.sampled_from(values))
    return st.builds(lambda y, dtype: y.to(dtype), drawn, st.sampled_from(list(dtypes)))


def probs(
    *,
    num_classes: int,
    size: tuple[int, int],
    images: int = 1,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16),
) -> SearchStrategy[Tensor]:
    """Class probabilities in [0, 1] that do not sum to 1, with ties and exact 0 and 1.

    Args:
        num_classes: number of classes K.
        size: height and width.
        images: number of images B.
        dtypes: ``torch.float32``, ``torch.float16`` or both.

    Returns:
        A strategy for floating-point ``[B, K, H, W]``.

    Raises:
        ValueError: a size below 1, or more than 4096 values.
        TypeError: another dtype.
        ImportError: hypothesis is not installed.

    Example:
        >>> from hypothesis import find
        >>> two = probs(num_classes=2, size=(1, 1), dtypes=[torch.float32])
        >>> find(two, lambda p: p.sum() == 2).flatten()
        tensor([1., 1.])
    """
    where = "probs"
    _need_hypothesis(where)
    check_grid(where, images, num_classes, *size)
    for dtype in at_least_one(where, "dtypes", dtypes):
        if dtype not in NUMPY:
            fix = "convert the drawn scores with .to(dtype)"
            raise TypeError(message(where, "torch.float32 or torch.float16", str(dtype), fix))
    from hypothesis import strategies as st

    full = (images, num_classes, *size)
    return st.sampled_from(list(dtypes)).flatmap(
        lambda dtype: _tensors(NUMPY[dtype], full, _floats(dtype))
    )


@dataclass(frozen=True)
class CalibrationProblem:
    """Labelled images of one grid and a new one.

    Attributes:
        images: pairs of probabilities ``[K, H, W]`` and labels ``[H, W]``.
        new_probs: probabilities of the new image, ``[K, H, W]``.
        new_labels: its labels, ``[H, W]``.
        alpha: miscoverage rate.
        background: index of the dominant class, or None.
    """

    images: list[tuple[Tensor, Tensor]]
    new_probs: Tensor
    new_labels: Tensor
    alpha: float
    background: int | None


def calibration_problems(
    *,
    max_images: int = 8,
    max_classes: int = 4,
    max_side: int = 3,
    alphas: Sequence[float] = (0.5, 0.25, 0.2, 0.1, 0.05),
    void: bool = True,
    ignore_index: int = 255,
) -> SearchStrategy[CalibrationProblem]:
    """Everything that calibration and selection are given.

    Args:
        max_images: the most labelled images, at least 1.
        max_classes: the most classes; there are at least 2.
        max_side: the largest height and width.
        alphas: miscoverage rates to choose from.
        void: with void pixels.
        ignore_index: the label of void.

    Returns:
        A strategy for :class:`CalibrationProblem`.

    Raises:
        ValueError: a size below 1, more than 4096 values, fewer than 2 classes, a rate outside
            (0, 1), or an ``ignore_index`` that may be a class or does not fit a byte.
        ImportError: hypothesis is not installed.

    Example:
        >>> from hypothesis import find
        >>> found = find(calibration_problems(alphas=[0.2]), lambda it: len(it.images) == 4)
        >>> found.alpha, found.background, found.images[0][0].shape, found.new_labels.tolist()
        (0.2, None, torch.Size([2, 1, 1]), [[0]])
    """
    where = "calibration_problems"
    _need_hypothesis(where)
    check_counts(where, max_images=max_images, max_classes=max_classes - 1, max_side=max_side)
    check_grid(where, max_images + 1, max_classes, max_side, max_side)
    check_ignore_index(where, ignore_index, max_classes)
    rates = list(at_least_one(where, "alphas", alphas))
    for alpha in rates:
        check_alpha(where, alpha)
    from hypothesis import strategies as st

    @st.composite
    def problems(draw: DrawFn) -> CalibrationProblem:
        num_classes = draw(st.integers(2, max_classes))
        sides = st.integers(1, max_side)
        size = (draw(sides), draw(sides))
        number = draw(st.integers(1, max_images)) + 1
        # One dtype for all images, as from one model and one reader.
        p = draw(probs(num_classes=num_classes, size=size, images=number))
        y = draw(
            labels(
                num_classes=num_classes,
                size=size,
                images=number,
                void=void,
                ignore_index=ignore_index,
                dtypes=(torch.uint8, torch.int64) if 0 <= ignore_index < 256 else (torch.int64,),
            )
        )
        alpha = draw(st.sampled_from(rates))
        background = draw(st.none() | st.integers(0, num_classes - 1))
        return CalibrationProblem(
            list(zip(p[:-1], y[:-1], strict=True)), p[-1], y[-1], alpha, background
        )

    return problems()


def _need_hypothesis(where: str) -> None:
    if importlib.util.find_spec("hypothesis") is None:
        fix = "install it with: pip install 'cpseg[dev]'"
        raise ImportError(message(where, "hypothesis", "no such package", fix))


def _floats(dtype: torch.dtype) -> SearchStrategy[float]:
    from hypothesis import strategies as st

    pool = sorted({float(torch.tensor(value, dtype=dtype)) for value in POOL})
    width = 16 if dtype == torch.float16 else 32
    return st.sampled_from(pool) | st.floats(0, 1, width=width)  # type: ignore[arg-type]


def _tensors(dtype: Any, full: tuple[int, ...], values: SearchStrategy[Any]) -> Any:
    from hypothesis.extra import numpy as arrays

    return arrays.arrays(dtype, full, elements=values).map(torch.from_numpy)


def check_counts(where: str, **counts: int) -> None:
    """Whole numbers from 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            expected, fix = f"a whole {name} >= 1", "pass a positive whole number"
            raise ValueError(message(where, expected, repr(value), fix))


def check_range(where: str, name: str, least: int, most: int) -> None:
    """The minimum is not above the maximum."""
    if least > most:
        expected = f"min_{name} <= max_{name}"
        raise ValueError(message(where, expected, f"{least} > {most}", "raise the maximum"))


def check_grid(where: str, *sides: int) -> None:
    """Whole sides from 1, and not too many values for hypothesis."""
    for side in sides:
        check_counts(where, **{"number for every axis": side})
    if math.prod(sides) > _LARGEST:
        expected, got = f"at most {_LARGEST} values in one example", str(list(sides))
        raise ValueError(message(where, expected, got, "test small problems"))


def at_least_one(where: str, name: str, values: Iterable[Any]) -> list[Any]:
    """The values as a list that is not empty."""
    listed = list(values)
    if not listed:
        raise ValueError(message(where, f"at least one of {name}", "none", "leave it out"))
    return listed
