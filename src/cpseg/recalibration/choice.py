"""Which features a recalibration uses, and how strong its penalty is: by cross-validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from cpseg.recalibration.features import Layout
from cpseg.recalibration.fit import Map, Pixels, fold_losses


class Choice(NamedTuple):
    """What cross-validation chose.

    Attributes:
        context: the parts of the context in use.
        components: how many components of the features.
        strength: weight of the penalty.
    """

    context: tuple[str, ...]
    components: int
    strength: float


class _Measured(NamedTuple):
    """A candidate at its best strength."""

    loss: float
    losses: Tensor  # of every fold
    strength: float


def choose(
    pixels: Pixels,
    base: Map,
    layout: Layout,
    method: str,
    *,
    contexts: Sequence[tuple[str, ...]],
    components: Sequence[int],
    strengths: Sequence[float],
    folds: int,
) -> tuple[Choice, tuple[dict[str, Any], ...]]:
    """The simplest candidate within one standard error of the best, over folds of images.

    The number of components is chosen first, without what is to be chosen of the context.

    Args:
        pixels: with all features of the layout.
        base: the map to shrink to, over all features.
        layout: of the features.
        method: as in :func:`cpseg.recalibration.fit.fit_map`.
        contexts: to choose from, the simplest first.
        components: numbers of components to choose from, the fewest first.
        strengths: from strong to weak; once a weaker one is worse the others are not tried.
        folds: at most the number of images.

    Returns:
        The choice, and a row for every candidate and strength that was tried.
    """
    table: list[dict[str, Any]] = []
    measured: dict[tuple[tuple[str, ...], int], _Measured] = {}

    def measure(context: tuple[str, ...], count: int) -> _Measured:
        kept = layout.indices(context, count)
        part = pixels._replace(features=pixels.features[:, kept])
        start = Map(base.weight[:, kept], base.bias)
        found: list[_Measured] = []
        for strength, losses in fold_losses(
            part, start, method, strengths, own=layout.own, folds=folds
        ):
            found.append(_Measured(float(losses.mean()), losses, strength))
            error = float(losses.std() / math.sqrt(folds))
            row = {"strength": strength, "loss": found[-1].loss, "error": error}
            if layout.components:
                row["components"] = count
            table.append({"context": list(context), **row})
            if len(found) > 1 and found[-1].loss > found[-2].loss:
                break
        return min(found, key=lambda candidate: candidate.loss)

    def simplest(candidates: Sequence[tuple[tuple[str, ...], int]]) -> Choice:
        for candidate in candidates:
            if candidate not in measured:
                measured[candidate] = measure(*candidate)
        lowest = min((measured[each] for each in candidates), key=lambda found: found.loss)
        for candidate in candidates:
            worse = measured[candidate].losses - lowest.losses
            if float(worse.mean()) <= float(worse.std() / math.sqrt(folds)):
                return Choice(*candidate, measured[candidate].strength)
        raise AssertionError("the lowest is within its own error")

    count = simplest([(contexts[0], count) for count in components]).components
    return simplest([(context, count) for context in contexts]), tuple(table)


def numbers_of_components(most: int) -> list[int]:
    """How many components are tried: none, then 8 doubled up to all of them."""
    tried = [0]
    count = 8
    while count < most:
        tried.append(count)
        count *= 2
    return tried if most == 0 else [*tried, most]
