"""The tables of docs/results-in-detail.md on CamVid, from the folder of teacher.py.

python examples/camvid/results.py camvid eleven certificates
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from convert import VOID, inside, record
from cpseg import Calibration
from cpseg.files import Source, read_class_map, read_ids, write_text
from runner import DATA, KINDS, Lines, Runner, StoppedError, table
from students import students

ALPHAS = ("0.1", "0.05", "0.01")
TITLES = {"pixel": "pixel-wise", "image": "image-wise"}
LEARNED = ("kmeans", "annuli")
Row = dict[str, Any]


def calibrated(
    run: Runner, name: str, kind: str, *options: object, constant: bool = False
) -> list[Row]:
    """Calibrate on 100 labelled images and evaluate on the held-out ones; one row per rule."""
    background, maps = KINDS[kind]
    made = run.place / f"{name}.safetensors"
    given = (*DATA, "--ids", "labelled_100.txt", "--background", background, *maps, *options)
    run.cpseg(f"{name}-calibrate", "calibrate", *given, "-o", made)
    return evaluated(run, name, maps, *(("--constant", "0.3") if constant else ()))


def evaluated(run: Runner, name: str, maps: tuple[str, ...], *options: str) -> list[Row]:
    """Evaluate a calibration of the section on the held-out images."""
    made, path = run.place / f"{name}.safetensors", run.place / f"{name}.json"
    given = (*DATA, "--ids", "heldout.txt", "--calibration", made, *maps[2:], *options)
    run.cpseg(f"{name}-evaluate", "evaluate", *given, "-o", path)
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def labels_table(run: Runner, kind: str) -> str:
    """Sections *11 classes, no background* and *Background plus objects*."""
    lines: Lines = [("rule", "α", "coverage", "set size", "kept", "wrong", "mIoU kept", "mIoU all")]
    for variant in ("pixel", "image"):
        for alpha in ALPHAS:
            given = ("--variant", variant, "--alpha", alpha)
            found = calibrated(run, f"{variant}-{alpha}", kind, *given, constant=True)
            rows = {row["rule"]: row for row in found}
            if len(lines) == 1:
                for name in ("raw argmax", "constant 0.3"):
                    lines.append((name, "", "", "", *_labels(rows[name])))
            for rule in (variant, f"{variant}, suppressed"):
                if rule in rows:
                    row, title = rows[rule], rule.replace(variant, TITLES[variant])
                    sets = (_percent(row["coverage"]), f"{row['set_size']:.2f}")
                    lines.append((title, alpha, *sets, *_labels(row)))
    return table(lines)


def _labels(row: Row) -> tuple[str, ...]:
    shares = (_percent(row["kept"]), _percent(row["wrong"]))
    return (*shares, _number(row["miou_kept"]), _number(row["miou_all"]))


EACH, MEAN = "each pixel", "mean over images"
UNIT = ("--variant", "image", "--unit", "image")
VARIANTS = (
    ("pixel", EACH, ("--variant", "pixel")),
    ("image", "none", ("--variant", "image")),
    ("blocks", "none", ("--variant", "blocks")),
    ("kmeans, 30 learn", "none", ("--variant", "kmeans", "--group-share", "0.3")),
    ("annuli, 30 learn", "none", ("--variant", "annuli", "--group-share", "0.3")),
    ("image, unit image", MEAN, UNIT),
    ("blocks, unit image", MEAN, ("--variant", "blocks", "--unit", "image")),
    ("image, unit image, per class", f"{MEAN}, each class", (*UNIT, "--per-class")),
    (
        "pixel, per class, fallback",
        f"{EACH} and class, where the cell gave it",
        ("--variant", "pixel", "--per-class", "--fallback"),
    ),
    *((f"pixel, {s}", EACH, ("--nonconformity", s.lower())) for s in ("APS", "RAPS", "margin")),
    *(
        (f"image, unit image, {s}", MEAN, (*UNIT, "--nonconformity", s.lower()))
        for s in ("APS", "RAPS", "margin")
    ),
)


def coverage(run: Runner) -> str:
    """Section *Coverage of every variant and score*."""
    lines: Lines = [("variant", "promised", "α = 0.1", "size", "0.05", "size", "0.01", "size")]
    for title, promised, options in VARIANTS:
        name = title.replace(", ", "-").replace(" ", "-")
        cells = [
            cell
            for alpha in ALPHAS
            for cell in sets(run, f"{name}-{alpha}", *options, "--alpha", alpha)
        ]
        lines.append((title, promised, *cells))
    return table(lines)


def sets(run: Runner, name: str, *options: str) -> tuple[str, str]:
    """Coverage in percent and mean size of the sets, with 11 classes."""
    row = next(r for r in calibrated(run, name, "eleven", *options) if r["coverage"] is not None)
    return f"{100 * row['coverage']:.1f}", f"{row['set_size']:.2f}"


def sweep(run: Runner) -> str:
    """Section *What the sweep sees, and what held-out images say*."""
    every = ("pixel", "image", "blocks", *LEARNED)
    shown = {
        "eleven": (every, ("0.5", "0.3", "0.1")),
        "objects": (("pixel", "image", "kmeans"), ("0.5", "0.1", "0.01")),
    }
    figures = {
        "mIoU all": "miou_all",
        "kept %": "kept",
        "wrong %": "wrong",
        "coverage %": "coverage",
    }
    header = ("variant", "α", *(c for f in figures for c in (f"{f}: sweep", "held out")))
    texts = []
    for kind, (variants, alphas) in shown.items():
        background, maps = KINDS[kind]
        folder = run.place / kind
        backgrounds = "none" if background == "none" else f"none,{background}"
        given = (*DATA, "--ids", "labelled_100.txt", "--backgrounds", backgrounds, *maps)
        run.cpseg(
            f"{kind}-sweep",
            "sweep",
            *given,
            "--recalibrate",
            "none",
            "--variants",
            ",".join(every),
            "-o",
            folder,
        )
        with (folder / "sweep.csv").open(encoding="utf-8", newline="") as file:
            rows = {(r["variant"], r["background"], r["alpha"]): r for r in csv.DictReader(file)}
        lines: Lines = [header]
        for variant in variants:
            share = ("--group-share", "0.3") if variant in LEARNED else ()
            found = {
                alpha: calibrated(
                    run,
                    f"{kind}-{variant}-{alpha}",
                    kind,
                    *("--variant", variant, "--alpha", alpha, *share),
                )
                for alpha in alphas
            }
            settings = [(variant, "none", alpha) for alpha in alphas]
            if background != "none":
                settings += [(f"{variant}, suppressed", background, alpha) for alpha in alphas]
            if len(lines) == 1:
                settings.insert(0, ("raw argmax", "", ""))
            for rule, ground, alpha in settings:
                swept = rows[rule.removesuffix(", suppressed"), ground, alpha]
                held = {row["rule"]: row for row in found[alpha or alphas[0]]}[rule]
                lines.append((rule, alpha, *_beside(swept, held, figures.values())))
        texts.append(f"{kind}\n\n{table(lines)}")
    return "\n\n".join(texts)


def _beside(swept: dict[str, str], held: Row, names: Any) -> Iterator[str]:
    for name in names:
        scale, digits = (1, 3) if name == "miou_all" else (100, 1)
        if held[name] is None:
            yield from ("-", "-")
            continue
        mean, error = (f"{scale * float(swept[key]):.{digits}f}" for key in (name, f"{name}_se"))
        yield from (f"{mean} ± {error}", f"{scale * held[name]:.{digits}f}")


def certificates(run: Runner) -> str:
    """Section *Certificates*."""
    lines: Lines = [("classes", "labelled", "at most", "per labels", "per image")]
    for kind in KINDS:
        for number in (25, 50, 100):
            for bound in ("0.05", "0.1", "0.2"):
                cells = [
                    certified(run, kind, number, bound, "--per", per) for per in ("labels", "image")
                ]
                lines.append((kind, str(number), f"{100 * float(bound):g} %", *cells))
    more: Lines = [("100 labelled, at most 10 %", "")]
    for kind, options in (
        ("eleven", ("--method", "crc")),
        ("eleven", ("--pvalue", "hoeffding-bentkus", "--per", "image")),
        ("objects", ("--background", "none", "--per-class", "--per", "image")),
    ):
        said = certified(run, kind, 100, "0.1", *options)
        more.append((f"{kind}, {' '.join(options)}", said))
    return f"{table(lines)}\n\n{table(more)}"


def certified(run: Runner, kind: str, number: int, bound: str, *options: str) -> str:
    """Share kept, and the share of wrong labels: of all kept / mean over images that keep one."""
    background, maps = KINDS[kind]
    name = "-".join([kind, str(number), bound, *(o.lstrip("-") for o in options)])
    made = run.place / f"{name}.safetensors"
    given = (*DATA, "--ids", f"labelled_{number}.txt", "--background", background, *maps)
    said = run.cpseg(
        f"{name}-certify", "certify", *given, "--max-error", bound, *options, "-o", made
    )
    if "not certified" in said:
        images, need = re.search(r"(\d+) images?:", said), re.search(r"at least (\d+) im", said)
        least = re.search(r"certified is ([\d.]+ %)", said)
        if need and images:
            return f"none: {images[1]} images, needs {need[1]}"
        return f"none: lowest {least[1]}" if least else "none"
    rows = evaluated(run, name, maps)
    row = next(row for row in reversed(rows) if row["coverage"] is not None)
    words = ["mean", "over", "images", str(made)]
    mean = run.kept(f"{name}-mean", words, lambda _: (0, repr(mean_wrong(made, maps))))
    return f"{_percent(row['kept'])}, {100 * row['wrong']:.1f} / {100 * float(mean):.1f} % wrong"


def mean_wrong(path: Path, maps: tuple[str, ...]) -> float:
    """Share of wrong labels among those kept, averaged over the held-out images that keep one."""
    calibration = Calibration.load(path)
    mapped = read_class_map(Path(maps[1])) if maps else None
    source = Source(Path(), Path("probs"), mapped, mapped)
    errors = []
    for pair, file in source.locate(read_ids("heldout.txt")).items():
        probs = source.probabilities(file)
        truth = source.labels(pair, len(probs), (probs.shape[1], probs.shape[2]))
        labels = calibration.pseudo_labels(probs)
        kept = (labels != VOID) & (truth != VOID)
        if kept.any():
            errors.append(float(((labels != truth) & kept).sum() / kept.sum()))
    return fmean(errors)


SCORES = ("raw", "temperature", "vector", "dirichlet", "dirichlet, context")


def refitted(run: Runner) -> str:
    """Section *Recalibrated probabilities*, over five draws of labelled images."""
    script, paths = "benchmarks/refitted_scores.py", {}
    for kind, (background, maps) in KINDS.items():
        paths[kind] = run.place / f"{kind}.csv"
        given = ("--root", ".", "--probs", "probs", "--ids", "pool.txt", "--heldout", "heldout.txt")
        mapped = (*maps[:2], "--background", background) if maps else ()
        for number in (25, 50, 100):
            more = ("--budgets", number, "-o", paths[kind])
            run.script(f"{kind}-{number}", script, *given, *mapped, *more)
    values: dict[tuple[str, str, str, str], list[float]] = {}
    chosen: Counter[str] = Counter()
    for kind, path in paths.items():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["rule"].startswith("recommended: "):
                    chosen[row["rule"].removeprefix("recommended: ")] += 1
                    continue
                for name in ("error", "miou_all", "area", "kept", "wrong", "miou_kept"):
                    key = (kind, row["budget"], row["rule"], name)
                    values.setdefault(key, []).append(float(row[name] or "nan"))

    def cells(rule: str, budget: str, names: tuple[str, ...]) -> Iterator[str]:
        for kind in KINDS:
            for name in names:
                yield _over_draws(values[kind, budget, rule, name], name)

    titles = ("11: wrong %", "mIoU", "area", "objects: wrong %", "mIoU", "area")
    first: Lines = [("scores", "labelled", *titles)]
    titles = ("11: kept %", "wrong %", "mIoU kept", "objects: kept %", "wrong %", "mIoU kept")
    second: Lines = [("rule", "labelled", *titles)]
    for budget in ("25", "50", "100"):
        for name in SCORES if budget == "25" else SCORES[2:]:
            figures = cells(f"{name}, argmax", budget, ("error", "miou_all", "area"))
            first.append((name, "" if name == "raw" else budget, *figures))
        figures = cells("raw, eq. 4", budget, ("error", "miou_all", "area"))
        first.append(("raw, eq. 4", budget, *figures))
    names = ("kept", "wrong", "miou_kept")
    rules = [(f"{name}, confidence 0.9", "25") for name in SCORES]
    rules += [
        (f"{name}, certified {bound} % per {per}", budget)
        for budget in ("50", "100")
        for bound in ("5", "10")
        for per in ("labels", "image")
        for name in ("raw", "dirichlet, context")
    ]
    second += [(rule, budget, *cells(rule, budget, names)) for rule, budget in rules]
    said = ", ".join(f"{name} in {count}" for name, count in chosen.most_common())
    total = f"`cpseg report` recommends, of {chosen.total()} draws"
    return f"{table(first)}\n\n{table(second)}\n\n{total}: {said}"


def _over_draws(values: list[float], name: str) -> str:
    """Mean ± standard error, or a dash."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "-"
    scale, digits = (1, 3) if "miou" in name or name == "area" else (100, 1)
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{scale * fmean(values):.{digits}f} ± {scale * error:.{digits}f}"


def promise(run: Runner) -> str:
    """Table *The promise is kept, with smaller sets*."""
    rules = {
        "raw (100 calibrate)": (),
        "temperature": ("--recalibrate", "temperature", "--context", "none"),
        "vector, no context": ("--recalibrate", "vector", "--context", "none"),
        "dirichlet, no context": ("--recalibrate", "dirichlet", "--context", "none"),
        "dirichlet, location": ("--recalibrate", "dirichlet", "--context", "location"),
    }
    titles = ("pixel-wise, α = 0.1", "size", "0.05", "size", "image as the unit, 0.1", "size")
    lines: Lines = [("scores", *titles, "0.05", "size")]
    for title, options in rules.items():
        cells: list[str] = []
        for unit, variant in (("pixel", ("--variant", "pixel")), ("image", UNIT)):
            for alpha in ("0.1", "0.05"):
                name = "-".join([re.sub(r"\W+", "-", title).strip("-"), unit, alpha])
                cells += sets(run, name, *variant, *options, "--alpha", alpha)
        lines.append((title, *cells))
    return table(lines)


SECTIONS: dict[str, Callable[[Runner], str]] = {
    "eleven": lambda run: labels_table(run, "eleven"),
    "objects": lambda run: labels_table(run, "objects"),
    "coverage": coverage,
    "sweep": sweep,
    "certificates": certificates,
    "refitted": refitted,
    "promise": promise,
    "students": students,
}


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    text = f"{100 * share:.1f} %"
    return "100 %" if text == "100.0 %" else text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def run(args: argparse.Namespace) -> int:
    """Print the table of every section asked for; returns 1 if time ran out before the end."""
    scores = args.out / "probs" / "made.json"
    if not scores.is_file():
        raise FileNotFoundError(
            f"{args.out}: expected probabilities of teacher.py, got none; "
            "run examples/camvid/teacher.py first"
        )
    record(args.out / "results", json.loads(scores.read_text(encoding="utf-8")))
    deadline = time.monotonic() + args.budget_seconds
    code = 0
    with inside(args.out):
        for section in args.section or SECTIONS:
            runner = Runner(section, deadline, args.jobs)
            try:
                text = SECTIONS[section](runner)
            except StoppedError:
                print(f"{section}: time is up; the same command continues", file=sys.stderr)
                code = 1
                continue
            write_text(runner.place / "table.md", text + "\n")
            print(f"## {section}\n\n{text}\n", flush=True)
    return code


def main(argv: list[str] | None = None) -> int:
    """Returns 0 on success, 1 if time ran out, 2 after one line on stderr for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder of convert.py and teacher.py")
    parser.add_argument("section", nargs="*", help=f"{', '.join(SECTIONS)} (default all)")
    parser.add_argument("--jobs", type=int, default=1, help="number of students trained at a time")
    parser.add_argument(
        "--budget-seconds", type=float, default=math.inf, help="start no command after this time"
    )
    args = parser.parse_args(argv)
    try:
        for section in args.section:
            if section not in SECTIONS:
                raise ValueError(
                    f"section: expected one of {', '.join(SECTIONS)}, got {section}; "
                    "choose among them"
                )
        return run(args)
    except (ValueError, OSError) as error:
        print(f"results.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
