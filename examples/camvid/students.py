"""Students on CamVid: ``examples/ablation`` with a small U-Net from random weights, three seeds."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

from runner import DATA, KINDS, Lines, Runner, table

STUDENT = (
    *("--model", "unet", "--amp", "bf16", "--epochs", "12", "4"),
    *("--crop", "128", "--scale", "0.75", "1.5"),
)
SEEDS = ("0", "1", "2")
REFITTED = "--recalibrate dirichlet"
KEPT = f"{REFITTED} --background none"
MORE = {
    "eleven": (
        ("refitted, balanced", f"{REFITTED} --balance"),
        ("refitted, prior 0.5", f"{REFITTED} --prior-power 0.5"),
        ("refitted, weighted", f"{REFITTED} --class-weights"),
    ),
    "objects": (
        ("refitted, weighted", f"{REFITTED} --class-weights"),
        ("refitted, not suppressed, weighted", f"{KEPT} --class-weights"),
        ("refitted, not suppressed, prior 0.5", f"{KEPT} --prior-power 0.5"),
    ),
}


def students(run: Runner) -> str:
    """The paper's table 5 at two budgets, fewer labels, and other ways to choose the labels."""
    texts = []
    for kind in KINDS:
        for budget in (25, 50):
            options = ["--recalibrate", "dirichlet"]
            if budget == 50:
                options += ["--certified", "0.1"]
            if kind == "objects":
                options += _with_sr("refitted, not suppressed", KEPT)
            texts.append(trained(run, f"{kind}-{budget}", kind, budget, "table5", *options))
    fewer = _with_sr("refitted", f"{REFITTED} --variant image")
    labels_only = ("--row", "labels only: label-only")
    texts.append(trained(run, "eleven-8", "eleven", 8, "rows", *labels_only, *fewer))
    for kind, rows in MORE.items():
        more = [word for name, labels in rows for word in _with_sr(name, labels)]
        more += ["--row", "labels only, weighted: label-only --class-weights"]
        if kind == "eleven":
            more += ["--row", "CP, image, 0.5: foundation+cp --variant image --alpha 0.5"]
            more += ["--row", f"refitted, confidence 0.9: foundation+cp {REFITTED} --constant 0.1"]
        texts.append(trained(run, f"{kind}-25-more", kind, 25, "rows", *more))
    truth = (
        "--row",
        "true masks of all: label-only --epochs 19 0",
    )  # the same number of steps as the others
    texts.append(trained(run, "eleven-all", "eleven", "all", "rows", *truth))
    return "\n\n".join(texts)


def _with_sr(name: str, labels: str) -> tuple[str, ...]:
    """Options for a row, and for the same row with a Stage II."""
    pairs = (("", ""), (" + SR", "+sr"))
    return tuple(
        word
        for title, stage in pairs
        for word in ("--row", f"{name}{title}: foundation+cp{stage} {labels}")
    )


def trained(run: Runner, name: str, kind: str, budget: int | str, form: str, *options: str) -> str:
    """A table of ``examples/ablation``, and IoU per class."""
    background, maps = KINDS[kind]
    out = run.place / name
    given = [form, "--dataset", "camvid", *DATA, "--lists", f"lists/{budget}", "--out", str(out)]
    given += ["--jobs", str(run.jobs), *STUDENT, *options]
    if maps:
        given += [*maps, "--classes", "7", "--background", background]
    for last in range(
        len(SEEDS)
    ):  # one more seed per command, so that the time may end between them
        seeds = SEEDS[: last + 1]
        run.script(f"{name}-{last}", "examples/ablation/run.py", *given, "--seeds", *seeds)
    text = (out / f"{form}.md").read_text(encoding="utf-8").rstrip()
    return f"{name}\n\n{text}\n\n{by_class(out / f'{form}-classes.csv', kind)}"


def by_class(path: Path, kind: str) -> str:
    """IoU per class in percent; a row with SR has the same labels as the row without."""
    names = json.loads(Path("map.json").read_text(encoding="utf-8"))
    lines: Lines = [("IoU", "of", *names["model_classes" if kind == "eleven" else "classes"])]
    with path.open(encoding="utf-8", newline="") as file:
        for row, _, of, *values in list(csv.reader(file))[1:]:
            if of == "student" or not row.endswith("+ SR"):
                lines.append((row, of, *(_percent(float(value)) for value in values)))
    return table(lines)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0f}"
