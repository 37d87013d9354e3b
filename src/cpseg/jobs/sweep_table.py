"""What a sweep found: rows of figures over folds, as text."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cpseg.jobs.calibrate import images_needed
from cpseg.jobs.estimate import Estimate, aligned, plus_minus, small_percent

FIGURES = ("miou_kept", "miou_all", "kept", "wrong", "coverage", "infinite")
RAW = "raw argmax"
ARGMAX = "argmax"  # of recalibrated probabilities
_SCORING = ("recalibrate", "prior power")
_HEADER = (
    *("variant", "background", "alpha", "mIoU kept", "mIoU all"),
    *("kept", "wrong", "coverage", "infinite"),
)


@dataclass(frozen=True)
class SweepRow:
    """One setting's figures over the folds; the first row of a sweep is the raw argmax.

    Attributes:
        variant: how cells share thresholds, or ``"raw argmax"``, or ``"argmax"`` of
            recalibrated probabilities.
        background: the class that selection suppresses, or None.
        alpha: miscoverage rate; None for an argmax.
        miou_kept: mean IoU over the pixels that carry a label.
        miou_all: mean IoU over all pixels, those without a label counted as wrong.
        kept: share of non-void pixels that carry a label.
        wrong: share of wrong labels among those kept.
        coverage: share of pixels whose class is in the prediction set; no fold for an argmax.
        infinite: share of thresholds that are +inf, too few images in a fold for this alpha; no
            fold for an argmax.
        recalibrate: the method of recalibration, ``"none"`` for the model's own probabilities.
        prior_power: the power to which the class prior was divided out of them.
    """

    variant: str
    background: int | None
    alpha: float | None
    miou_kept: Estimate
    miou_all: Estimate
    kept: Estimate
    wrong: Estimate
    coverage: Estimate
    infinite: Estimate
    recalibrate: str = "none"
    prior_power: float = 0.0

    @property
    def name(self) -> str:
        """The setting in words."""
        words = [self.recalibrate] if self.recalibrate != "none" else []
        if self.prior_power > 0:
            words.append(f"prior power {self.prior_power:g}")
        words.append(self.variant)
        if self.alpha is not None:
            words += [f"background {_word(self.background)}", f"alpha {self.alpha:g}"]
        return ", ".join(words)


def table_of_sweep(rows: Sequence[SweepRow]) -> str:
    """The rows as a Markdown table, mean ± standard error over folds.

    There are columns for the recalibration where some row has one.
    """
    recalibrated = any(row.recalibrate != "none" or row.prior_power > 0 for row in rows)
    header = (*_SCORING, *_HEADER) if recalibrated else _HEADER
    lines: list[tuple[str, ...]] = [header, ("---",) + ("---:",) * (len(header) - 1)]
    for row in rows:
        baseline = row.alpha is None
        lines.append(
            (
                *((row.recalibrate, f"{row.prior_power:g}") if recalibrated else ()),
                row.variant,
                "-" if baseline else _word(row.background),
                "-" if baseline else f"{row.alpha:g}",
                *(plus_minus(value, share=False) for value in (row.miou_kept, row.miou_all)),
                *(plus_minus(value) for value in (row.kept, row.wrong, row.coverage)),
                "-" if baseline else small_percent(row.infinite.mean),
            )
        )
    return aligned(lines)


def best_of_sweep(rows: Sequence[SweepRow], count: int = 10) -> list[SweepRow]:
    """The raw argmax and the rows with the best mIoU over all pixels, the best first.

    Where no row is left out they keep their order.
    """
    if len(rows) <= count + 1:
        return list(rows)
    return [rows[0], *sorted(rows[1:], key=lambda row: -row.miou_all.mean)[:count]]


def conclusion(rows: Sequence[SweepRow]) -> str:
    """Which settings come first, and what such a choice is worth. Ties go to the earlier row."""
    raw, best = rows[0], max(rows, key=lambda row: row.miou_all.mean)
    enough = [row for row in rows if row.kept.mean >= 0.5 and row.wrong.folds > 0]
    said = f"Best mIoU over all pixels: {best.name} ({plus_minus(best.miou_all, share=False)}"
    said += "). " if best is raw else f"; {raw.name} {plus_minus(raw.miou_all, share=False)}). "
    if best is not raw and best.miou_all.mean - raw.miou_all.mean < max(
        best.miou_all.se, raw.miou_all.se
    ):
        said += "The difference is less than a standard error: it may be noise. "
    if enough:
        least = min(enough, key=lambda row: row.wrong.mean)
        said += (
            f"Fewest wrong labels with at least half the pixels kept: {least.name} "
            f"({plus_minus(least.wrong)} of {100 * least.kept.mean:.1f} %). "
        )
    return said + (
        "A choice made from this table is tuned on these images: certify it, or measure it on "
        "others."
    )


def infinite_threshold_warning(rows: Sequence[SweepRow]) -> str | None:
    """Which settings have infinite thresholds and how many scores they need, or None."""
    short: dict[float, list[str]] = {}
    for row in rows:
        if row.alpha is not None and row.infinite.mean > 0:
            names = short.setdefault(row.alpha, [])
            if row.variant not in names:
                names.append(row.variant)
    if not short:
        return None
    parts = (
        f"{alpha:g} ({', '.join(names)}; needs {images_needed(alpha)} scores each)"
        for alpha, names in short.items()
    )
    return (
        f"in the folds, thresholds are infinite and admit every class at alpha {', '.join(parts)}; "
        "all images together may be enough: use more --folds, label more, or drop these alphas"
    )


def csv_of_sweep(rows: Sequence[SweepRow]) -> str:
    """All figures at full precision, one line per setting; empty where a figure is missing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{name}{end}" for name in FIGURES for end in ("", "_se", "_folds")]
    names = ["recalibrate", "prior_power", "variant", "background", "alpha"]
    writer.writerow([*names, *columns])
    for row in rows:
        cells: list[object] = [row.recalibrate, repr(row.prior_power), row.variant, "", ""]
        if row.alpha is not None:
            cells[3:] = [_word(row.background), repr(row.alpha)]
        for name in FIGURES:
            mean, se, folds = getattr(row, name)
            cells += ["" if math.isnan(value) else repr(value) for value in (mean, se)]
            cells.append(folds)
        writer.writerow(cells)
    return text.getvalue()


def _word(background: int | None) -> str:
    return "none" if background is None else str(background)
