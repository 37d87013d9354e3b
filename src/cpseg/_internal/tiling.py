"""Work through a large grid in tiles that stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator

TILE = 2**20  # elements that a step over the cells holds at once


def tiles(cells: int, rows: int) -> Iterator[slice]:
    """Slices of the cells such that ``rows`` of them stay small."""
    step = max(1, TILE // max(1, rows))
    return (slice(start, min(start + step, cells)) for start in range(0, cells, step))
