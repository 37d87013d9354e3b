"""Figures over folds, and how figures are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple


class Estimate(NamedTuple):
    """A figure over folds: mean, standard error (NaN below two folds), folds that have one."""

    mean: float
    se: float
    folds: int

    @classmethod
    def over(cls, values: Sequence[float]) -> Estimate:
        """From the figure of every fold, NaN where a fold has none."""
        present = [value for value in values if not math.isnan(value)]
        mean = fmean(present) if present else math.nan
        se = stdev(present) / math.sqrt(len(present)) if len(present) > 1 else math.nan
        return cls(mean, se, len(present))


def number(value: float) -> str:
    """A figure between 0 and 1 with three digits; a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def percent(share: float) -> str:
    """A share with one digit; a dash where there is none."""
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def small_percent(share: float) -> str:
    """A share; one that is not zero is shown as "< 0.1 %" where it would be rounded to 0.0 %."""
    return "< 0.1 %" if 0 < share < 0.0005 else percent(share)


def plus_minus(value: Estimate, *, share: bool = True, digits: int | None = None) -> str:
    """Mean ± standard error, in per cent for a share; a dash where no fold has a figure."""
    if value.folds == 0:
        return "-"
    scale, unit = (100, " %") if share else (1, "")
    digits = digits if digits is not None else 1 if share else 3
    se = "?" if math.isnan(value.se) else f"{scale * value.se:.{digits}f}"
    return f"{scale * value.mean:.{digits}f} ± {se}{unit}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as a Markdown table whose columns line up."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = []
    for line in lines:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)
