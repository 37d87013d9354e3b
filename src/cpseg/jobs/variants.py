"""Which cells share a threshold, by the name that a user gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cpseg import groups
from cpseg._internal import words
from cpseg._internal.checks import check_choice, message

FIXED = words.FIXED_VARIANTS
LEARNED = words.LEARNED_VARIANTS

VARIANTS = (*FIXED, *LEARNED)


@dataclass(frozen=True)
class Grouping:
    """How cells of the grid share thresholds.

    Attributes:
        variant: ``"pixel"``, ``"image"``, ``"blocks"``, ``"kmeans"`` or ``"annuli"``.
        block: side of a block in cells.
        num_groups: number of learned groups.
        group_share: share of the images, drawn with the seed, on which groups are learned and
            which are then not used for calibration; 0 learns them on the calibration images
            themselves.
        grid: height and width of the grid; by default the size of the first listed image.
    """

    variant: str = "pixel"
    block: int = 32
    num_groups: int = 8
    group_share: float = 0.0
    grid: tuple[int, int] | None = None

    @property
    def learns(self) -> bool:
        """Whether the groups are learned from images."""
        return self.variant in LEARNED

    def check(self, where: str, known: Sequence[str] = VARIANTS) -> None:
        """Refuse an unknown variant, and a share for learning where nothing is learned.

        Raises:
            ValueError: either of them.
        """
        check_choice(where, self.variant, known, name="a variant")
        if self.group_share > 0 and not self.learns:
            expected, fix = "a variant that learns groups for --group-share", "leave it out"
            raise ValueError(message(where, expected, self.variant, fix))

    def fallbacks(self) -> list[str]:
        """The coarser groups, finest first, whose thresholds replace infinite ones."""
        coarser = ["blocks", "image"]
        return coarser[coarser.index(self.variant) + 1 :] if self.variant in coarser else coarser


def fixed_partition(variant: str, grid: tuple[int, int], block: int) -> Tensor:
    """The partition of the grid for a variant that learns nothing.

    Raises:
        ValueError: an unknown variant, or one that learns its groups.
    """
    check_choice("variant", variant, FIXED, name="a variant that learns nothing")
    if variant == "blocks":
        return groups.blocks(grid, block)
    partition: Tensor = getattr(groups, variant)(grid)  # named like its function
    return partition


def learned_partition(
    variant: str, curves: Tensor, num_groups: int, generator: torch.Generator
) -> Tensor:
    """The partition of the grid that a variant learns from nonconformity curves.

    Raises:
        ValueError: a variant that learns nothing.
    """
    check_choice("variant", variant, LEARNED, name="a variant that learns groups")
    learn = getattr(groups, variant)  # named like its function
    partition: Tensor = learn(curves, num_groups, generator=generator)
    return partition
