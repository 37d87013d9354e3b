"""The diagrams of a report with their tables: reliability, error against share kept, thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cpseg.core.reliability import ProperScores
from cpseg.jobs.estimate import Estimate, plus_minus, small_percent
from cpseg.report import plots
from cpseg.report.findings import RAW, Findings, scores_in_words
from cpseg.report.markup import Group, Row, chart, note, table

SHARES = tuple(number / 10 for number in range(1, 11))  # rows of the table of the curves


def reliability(findings: Findings) -> str:
    """Diagrams and proper scores, for each kind of scores."""
    rows, figures = [], []
    for place, (name, folds) in enumerate(findings.reliability.items()):
        scores = [fold.scores() for fold in folds]
        cells = [
            plus_minus(Estimate.over([getattr(each, field) for each in scores]), share=False)
            for field in ProperScores._fields
        ]
        rows.append(Row((scores_in_words(name), *cells)))
        figures.append(_diagram(findings, name, place))
    header = ("scores", "NLL", "Brier", "class-wise ECE", "ECE", "area, error against kept")
    first = next(iter(findings.reliability.values()))
    unlikely = sum(fold.unlikely for fold in first) / max(sum(fold.pixels for fold in first), 1)
    return (
        '<div class="plots">\n'
        + "\n".join(figures)
        + "\n</div>\n"
        + table("Proper scores and calibration", header, [Group("", rows)], stacked=True)
        + note(
            "Smaller is better everywhere. For points on the dotted line the share of right pixels "
            "equals their confidence; bars on points are standard errors over folds. "
            "NLL, Brier score and class-wise calibration error judge the scores divided by their "
            "sum; scores below a millionth count as that in NLL "
            f"({small_percent(unlikely)} of pixels before recalibration). The area is that below "
            "the curve of the next section."
        )
    )


def _diagram(findings: Findings, name: str, place: int) -> str:
    folds = [fold.diagram() for fold in findings.reliability[name]]
    pixels = torch.stack([fold.pixels for fold in folds]).double()
    weights = pixels / pixels.sum(0)
    each = torch.stack([fold.accuracy for fold in folds])
    spread = [Estimate.over(column.tolist()).se for column in each.T]
    confidence, accuracy = (
        (weights * torch.stack(parts).nan_to_num()).sum(0).cpu().numpy()
        for parts in ([fold.confidence for fold in folds], [fold.accuracy for fold in folds])
    )
    share = (pixels.sum(0) / pixels.sum()).cpu().numpy()
    source = plots.reliability(confidence, accuracy, np.array(spread), share, style=place)
    title = scores_in_words(name)
    ece = Estimate.over([fold.scores().ece for fold in findings.reliability[name]]).mean
    return chart(
        source,
        f"Reliability diagram of the {title}: share of right pixels against confidence in 15 bins, "
        f"and the share of pixels in each; expected calibration error {ece:.3f}.",
        title[0].upper() + title[1:],
    )


def curves(findings: Findings) -> str:
    """Wrong pixels against pixels kept: lines for scores, marks for rules."""
    families = list(findings.reliability)
    series = [*_lines(findings), *_points(findings)]
    highest = max(1.35 * max(float(np.nanmax(one.y)) for one in series if one.kind == "line"), 0.02)
    highest = min(highest, 1.0)
    above = sum(int((one.y > highest).sum()) for one in series)
    beyond = f" Above the picture: {above} points." if above else ""
    picture = chart(
        plots.error_against_kept(series, highest=highest),
        "Error rate of the pixels kept against the share kept; the table holds the lines' values.",
        "Lines: pixels in the order of their confidence, with a band of one standard error over "
        "folds. Hollow points: constant confidences, and eq. 4 at several alphas. Large filled "
        "marks: certified rules." + beyond,
    )
    tables = [
        _over_folds([fold.error_at(torch.tensor(SHARES)).tolist() for fold in folds])
        for folds in findings.reliability.values()
    ]
    cells = [
        Row((f"{100 * share:.0f} %", *map(plus_minus, row)))
        for share, *row in zip(SHARES, *tables, strict=True)
    ]
    lines = table(
        "Error of the most confident pixels",
        ("share kept", *map(scores_in_words, families)),
        [Group("", cells)],
    )
    of = note("Wrong pixels among the most confident ones, mean ± standard error over folds.")
    return f'<div class="plots">\n{picture}\n<div>{lines}{of}</div>\n</div>\n'


def _lines(findings: Findings) -> list[plots.Series]:
    """For each kind of scores the error rate of the most confident pixels, with its band."""
    shares = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    made = []
    for place, (name, folds) in enumerate(findings.reliability.items()):
        estimates = _over_folds([fold.error_at(shares).tolist() for fold in folds])
        mean, se, _ = np.array(estimates).T
        title = f"{scores_in_words(name)}, most confident first"
        made.append(plots.Series(title, shares.numpy(), mean, 0 * se, se, place, "line"))
    return made


def _points(findings: Findings) -> list[plots.Series]:
    """The other rules, each at the share it keeps; without kept pixels there is no error rate."""
    titles: dict[tuple[str, int, str], list[tuple[Estimate, Estimate]]] = {}
    families = list(findings.reliability)
    for rule, measured in findings.rules.items():
        if rule.kind == "labels":
            continue
        place, by = families.index(rule.scores), scores_in_words(rule.scores)
        if rule.kind == "confidence":
            key = (f"constant confidence, {by}", place, "points")
        elif rule.kind == "eq4" and rule.scores == RAW:
            how = "without suppression" if rule.background is None else "with suppression"
            key = (f"eq. 4, {by}, {how}", 4 + (rule.background is not None), "points")
        elif rule.kind == "certified":
            key = (f"certified, {by}", place, "stars")
        else:
            continue
        kept, wrong = measured.estimate("kept"), measured.estimate("wrong")
        if wrong.folds > 0:
            titles.setdefault(key, []).append((kept, wrong))
    made = []
    for (title, style, kind), both in titles.items():
        x, y, x_se, y_se = np.array([(k.mean, w.mean, k.se, w.se) for k, w in both]).T
        made.append(plots.Series(title, x, y, x_se, y_se, style, kind))
    return made


def thresholds(findings: Findings) -> str:
    """Eq. 4 on all images: its thresholds and how many scores are behind them."""
    made = findings.calibration
    asked = f"Eq. 4 at alpha {made.alpha:g} on the raw scores of all {made.num_images} images"
    if findings.plan.variant == "image":
        value, count = float(made.threshold.flatten()[0]), int(made.count.flatten()[0])
        return f"<p>{asked}: one threshold for all cells, {value:.4f}, from {count} scores.</p>"
    range_ = f"{int(made.count.min())} to {int(made.count.max())}"
    infinite = small_percent(made.infinite_share)
    pictures = [
        chart(plots.grid_map(values.cpu().numpy(), label=label), f"Map of the {label}.", caption)
        for values, label, caption in (
            (made.threshold, "threshold on 1 − score", f"Thresholds; {infinite} are infinite."),
            (made.count, "scores behind a threshold", f"Counts, {range_}; fewer where void."),
        )
    ]
    low, middle, high = (
        f"{float(value):.4f}"
        for value in made.threshold.flatten()
        .double()
        .cpu()
        .quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), interpolation="nearest")
    )
    return (
        f"<p>{asked}, {findings.plan.variant}: a class is in the set of a pixel where 1 − score is "
        f"at most the threshold. Deciles 1, 5 and 9 of the thresholds: {low}, {middle}, {high}."
        '</p>\n<div class="plots">\n' + "\n".join(pictures) + "\n</div>"
    )


def _over_folds(values: Sequence[Sequence[float]]) -> list[Estimate]:
    """One estimate per column, from one row per fold."""
    return [Estimate.over(column) for column in zip(*values, strict=True)]
