"""Which cells share a threshold, by the name that a user gives."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cpseg import groups
from cpseg._internal.checks import (
    message,
)
from cpseg.calibration.calibration import Calibration
from cpseg.core.class_map import parse_class_map
from cpseg.files.dataset import (
    Source,
)


def with_map_of(source: Source, calibration: Calibration) -> Source:
    """The source with the class map that the calibration was made with."""
    recorded = calibration.extra.get("class_map")
    if recorded is None:
        return source
    class_map = parse_class_map(recorded)
    if source.class_map is not None and source.class_map != class_map:
        got, fix = "another one", "leave --class-map out: the calibration carries it"
        raise ValueError(message("class map", "the one that calibrated", got, fix))
    return replace(source, class_map=class_map)


LEARNED = ("kmeans", "annuli")


VARIANTS = ("pixel", "image", "blocks", *LEARNED)


def fixed_partition(variant: str, grid: tuple[int, int], block: int) -> Tensor:
    """The partition of the grid for a variant that learns nothing."""
    if variant == "blocks":
        return groups.blocks(grid, block)
    return groups.pixel(grid) if variant == "pixel" else groups.image(grid)


def learned_partition(
    variant: str, curves: Tensor, num_groups: int, generator: torch.Generator
) -> Tensor:
    """The partition of the grid for ``"kmeans"`` or ``"annuli"``."""
    learn = groups.kmeans if variant == "kmeans" else groups.annuli
    return learn(curves, num_groups, generator=generator)
