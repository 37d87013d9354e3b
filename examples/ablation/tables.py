"""The table of an ablation as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from typing import Any

BY_CLASS = {"labels": "labels_iou", "student": "iou"}


def row_of(
    name: str,
    lists: str,
    found: list[dict[str, Any]],
    labels: dict[str, Any] | None,
    paper: float | None,
) -> dict[str, Any]:
    """One line: mean and standard deviation over the finished runs, in percent."""
    values = [100 * run["miou"] for run in found if "miou" in run]
    return {
        "row": name,
        "labelled": lists,
        "seeds": len(values),
        "miou": statistics.mean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "kept": 100 * labels["kept"] if labels else None,
        "wrong": 100 * labels["wrong"] if labels else None,
        "labels_miou": 100 * labels["miou_kept"] if labels else None,
        "paper": paper,
        "iou": _by_class([run["iou"] for run in found if "iou" in run]),
        "labels_iou": _by_class([labels["iou_kept"]] if labels else []),
    }


def _by_class(runs: list[list[float]]) -> list[float] | None:
    """Mean over the runs per class, in percent; NaN for a class without pixels."""
    return [100 * statistics.mean(values) for values in zip(*runs, strict=True)] or None


def markdown_of(lines: list[dict[str, Any]], *, labels_only: bool) -> str:
    """The lines as a Markdown table; a missing figure is a dash."""
    titles = ["row", "labelled", "kept", "wrong", "mIoU of labels kept"]
    names = ["kept", "wrong", "labels_miou"]
    if not labels_only:
        titles, names = [*titles, "student's mIoU", "seeds"], names
    titles.append("paper")
    out = [" | ".join(titles), " | ".join(["---"] * 2 + ["---:"] * (len(titles) - 2))]
    for line in lines:
        cells = [line["row"], line["labelled"], *(_number(line[name]) for name in names)]
        if not labels_only:
            spread = "" if line["std"] is None else f" ± {line['std']:.1f}"
            cells += [_number(line["miou"]) + spread, str(line["seeds"])]
        out.append(" | ".join([*cells, _number(line["paper"], 2)]))
    return "".join(f"| {line} |\n" for line in out)


def csv_of(lines: list[dict[str, Any]]) -> str:
    """The lines with all figures except those per class."""
    names = [name for name in lines[0] if name not in BY_CLASS.values()]
    return _csv([names, *([line[name] for name in names] for line in lines)])


def classes_csv_of(lines: list[dict[str, Any]]) -> str:
    """IoU per class in percent, of the labels kept and of the students."""
    rows = []
    for line in lines:
        for title, name in BY_CLASS.items():
            if line[name] is not None:
                rows.append([line["row"], line["labelled"], title, *line[name]])
    classes = range(max((len(row) for row in rows), default=3) - 3)
    return _csv([["row", "labelled", "of", *(f"class_{index}" for index in classes)], *rows])


def _csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
