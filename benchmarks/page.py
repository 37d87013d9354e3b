"""Write the tables of docs/speed.md from the files in benchmarks/machines.

python benchmarks/page.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "speed.md"
_SHAPES = "shapes: "
BEGIN, END = "<!-- made by benchmarks/page.py -->", "<!-- end -->"


def table(machine: dict[str, Any]) -> str:
    """A machine's facts in a line, and its rows."""
    facts = (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; device: "
        f"{machine['device']}; torch {machine['torch']}, Python {machine['python']}, "
        f"cpseg {machine['cpseg']}."
    )
    lines = [
        "| what | against | target | median | quartiles | commit |",
        "|---|---|---|---:|---:|---|",
    ]
    for row in machine["rows"]:
        if row["name"].startswith(_SHAPES):
            continue
        median = f"{row['median']:.3g}"
        median = median if row["reached"] else f"**{median}**"
        quartiles = f"{row['low']:.3g} to {row['high']:.3g}"
        target = row["target"].replace(" ", "&nbsp;")
        cells = (row["name"], row["reference"], target, median, quartiles, row["commit"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([facts, "", *lines, *shapes(machine["rows"])])


def shapes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of selection for other numbers of classes: a column for each number of threads."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        if row["name"].startswith(_SHAPES):
            classes, dtype, layout, threads = row["name"].removeprefix(_SHAPES).split(", ")
            kind = (classes.removeprefix("K="), dtype, layout.removesuffix("_format"))
            threads = threads.removesuffix("s") if threads.startswith("1 ") else threads
            found.setdefault(kind, {})[threads] = f"{row['median']:.3g}"
    if not found:
        return []
    columns = list(next(iter(found.values())))
    head = " | ".join(("classes", "dtype", "layout", *columns))
    lines = [
        f"| {' | '.join((*kind, *(cells.get(each, '-') for each in columns)))} |"
        for kind, cells in found.items()
    ]
    title = "`pseudo_labels` of two images, as a multiple of `probs.amax(1)` with as many threads:"
    return ["", title, "", f"| {head} |", "|---|---|---|---:|---:|---:|", *lines]


def tables() -> str:
    """All machines, one after the other."""
    paths = sorted((HERE / "machines").glob("*.json"))
    parts = [f"### {path.stem}\n\n{table(json.loads(path.read_text()))}" for path in paths]
    return "\n\n".join(parts)


def with_tables(page: str) -> str:
    """The page with what stands between its marks made anew."""
    made = f"{BEGIN}\n\n{tables()}\n\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: made, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
