"""Rules for pseudo-labels on a data set with held-out labels, over random draws of labelled images.

    python benchmarks/refitted_scores.py --root R --ids pool.txt --heldout heldout.txt --probs P \
        --budgets 25,50,100 --splits 5 -o eleven.csv

For every budget and split it draws that many images from the pool, measures each rule on the
held-out images, certifies, and asks the report for its recommendation (without context, to save
time). It writes one CSV row per rule; a run that was stopped continues. `--summary` prints the
table of one or more such files.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import fmean, stdev

import torch

from cpseg import Calibrator, Certifier, confusion_matrix, evidence, groups, pseudo_labels
from cpseg.certification.certifier import ALPHAS
from cpseg.core.class_map import read_class_map
from cpseg.core.reliability import Reliability
from cpseg.files.dataset import Source, read_example
from cpseg.files.id_lists import Pair, read_ids, write_ids
from cpseg.jobs.recalibrate import RecalibrationOptions
from cpseg.jobs.tally import aligned, row_of
from cpseg.report.findings import Plan
from cpseg.report.measure import gather

FIELDS = ("budget", "split", "rule", "error", "miou_all", "miou_kept", "kept", "wrong", "area")
METHODS = ("temperature", "vector", "dirichlet", "dirichlet, context")
CONSTANTS = (0.7, 0.9)
BOUNDS = ("0.05", "0.1")
STATEMENTS = ("labels", "image")


def refit(name: str) -> RecalibrationOptions:
    method, _, context = name.partition(", ")
    return RecalibrationOptions(method, context="auto" if context else ())


class Cell:
    """One draw of labelled images: makes rules from it and measures them on held-out images."""

    def __init__(self, source: Source, drawn: list[Pair], background: int | None, seed: int):
        self.source, self.drawn, self.background, self.seed = source, drawn, background, seed
        self.paths = source.locate(drawn)
        first = source.probabilities(self.paths[drawn[0]])
        self.num_classes, self.size = first.shape[0], tuple(first.shape[1:])

    def read(self, pairs: list[Pair]):
        for pair in pairs:
            path = self.paths.get(pair) or self.source.locate([pair])[pair]
            yield pair, *read_example(self.source, pair, path, self.num_classes)

    def fit(self, pairs: list[Pair], names: tuple[str, ...]):
        made = {name: refit(name).recalibrator(self.num_classes, self.seed) for name in names}
        for _, probs, labels in self.read(pairs):
            for each in made.values():
                each.update(probs, labels)
        return {name: each.fit() for name, each in made.items()}

    def certified(self):
        """Certified rules: 20 % of the images set thresholds, the rest is for certificates."""
        count = round(0.2 * len(self.drawn))
        setting, proving = self.drawn[:count], self.drawn[count:]
        maps = {"raw": None, **self.fit(setting, ("dirichlet, context",))}
        calibrators = {
            name: Calibrator(
                groups.image(self.size),
                alpha=max(map(Fraction, ALPHAS)),
                background=self.background,
                recalibration=map_,
            )
            for name, map_ in maps.items()
        }
        for pair, probs, labels in self.read(setting):
            for each in calibrators.values():
                each.update(probs, labels, ids=pair.image)
        certifiers = {
            (name, per): Certifier(each, per=per)
            for name, each in calibrators.items()
            for per in STATEMENTS
        }
        for pair, probs, labels in self.read(setting):
            for each in certifiers.values():
                each.learn_order(probs, labels, ids=pair.image)
        for pair, probs, labels in self.read(proving):
            for each in certifiers.values():
                each.update(probs, labels, ids=pair.image)
        return {
            f"{name}, certified {100 * float(bound):g} % per {per}": each.compute(bound)
            for (name, per), each in certifiers.items()
            for bound in BOUNDS
        }

    def eq4(self):
        calibrator = Calibrator(
            groups.pixel(self.size), alpha=0.05, background=self.background, max_images=1000
        )
        for _, probs, labels in self.read(self.drawn):
            calibrator.update(probs, labels)
        return calibrator.compute()

    def measure_certified(self, heldout: list[Pair]):
        """The certified rules alone."""
        certified, width = self.certified(), self.num_classes
        counts = {rule: torch.zeros(width, width + 1, dtype=torch.int64) for rule in certified}
        for _, probs, truth in self.read(heldout):
            for rule, calibration in certified.items():
                labels = calibration.pseudo_labels(probs)
                counts[rule] += confusion_matrix(
                    labels, truth, num_classes=width, with_ignored=True
                )
        for rule, confusion in counts.items():
            row = row_of(rule, confusion, torch.full((3,), torch.nan, dtype=torch.float64))
            error = float(1 - confusion.diagonal().sum() / confusion.sum())
            yield rule, error, row.miou_all, row.miou_kept, row.kept, row.wrong, ""

    def measure(self, heldout: list[Pair]):
        maps = {"raw": None, **self.fit(self.drawn, METHODS)}
        eq4, certified = self.eq4(), self.certified()
        width = self.num_classes
        counts = defaultdict(lambda: torch.zeros(width, width + 1, dtype=torch.int64))
        scores = {name: Reliability(width) for name in maps}

        def count(rule: str, labels: torch.Tensor, truth: torch.Tensor) -> None:
            counts[rule] += confusion_matrix(labels, truth, num_classes=width, with_ignored=True)

        for _, probs, truth in self.read(heldout):
            for name, map_ in maps.items():
                p = probs if map_ is None else map_(probs)
                scores[name].update(p, truth)
                count(f"{name}, argmax", evidence(p, background=None).argmax(), truth)
                for constant in CONSTANTS:
                    kept = pseudo_labels(p, 1 - constant, background=None)
                    count(f"{name}, confidence {constant}", kept, truth)
            count("raw, eq. 4", eq4.pseudo_labels(probs), truth)
            if self.background is not None:
                plain = replace(eq4, background=None)
                count("raw, eq. 4 without suppression", plain.pseudo_labels(probs), truth)
            for rule, calibration in certified.items():
                count(rule, calibration.pseudo_labels(probs), truth)
        for rule, confusion in counts.items():
            row = row_of(rule, confusion, torch.full((3,), torch.nan, dtype=torch.float64))
            error = float(1 - confusion.diagonal().sum() / confusion.sum())
            area = scores[rule.split(", argmax")[0]].scores().area if "argmax" in rule else ""
            yield rule, error, row.miou_all, row.miou_kept, row.kept, row.wrong, area


def draw(pool: list[Pair], number: int, split: int) -> list[Pair]:
    return random.Random(f"{number} {split}").sample(pool, number)


def run(options: argparse.Namespace) -> None:
    maps = {}
    if options.class_map:
        maps = dict.fromkeys(("class_map", "mask_map"), read_class_map(options.class_map))
    source = Source(options.root, options.probs, **maps)
    pool, heldout = read_ids(options.ids), read_ids(options.heldout)
    done = set()
    if options.output.exists():
        done = {(int(r["budget"]), int(r["split"])) for r in rows_of([options.output])}
    for budget in options.budgets:
        for split in options.splits:
            if (budget, split) in done:
                continue
            drawn = draw(pool, budget, split)
            cell = Cell(source, drawn, options.background, split)
            if options.certified_only:
                write(
                    options.output, [(budget, split, *r) for r in cell.measure_certified(heldout)]
                )
                print(budget, split, flush=True)
                continue
            found = list(cell.measure(heldout))
            listed = options.output.with_suffix(f".{budget}-{split}.txt")
            write_ids(listed, [(pair.image, pair.mask) for pair in drawn])
            plan = Plan(options.background, context=(), seed=split, samples=0)
            chosen = gather(source, listed, plan).label_with
            listed.unlink()
            rows = [(budget, split, *row) for row in found]
            rows.append((budget, split, f"recommended: {chosen.name}", *[""] * 6))
            write(options.output, rows)
            print(budget, split, chosen.name, flush=True)


def write(path: Path, rows: list[tuple]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        writer.writerows(rows)


def rows_of(paths: list[Path]) -> list[dict[str, str]]:
    found = []
    for path in paths:
        with path.open(newline="") as file:
            found += list(csv.DictReader(file))
    return found


def summary(paths: list[Path]) -> str:
    """Mean ± standard error over splits."""
    values = defaultdict(list)
    for row in rows_of(paths):
        key = row["rule"], int(row["budget"])
        figures = [float(row[name] or "nan") for name in FIELDS[3:]]
        values[key].append(figures)
    lines = [("rule", "images", "splits", *FIELDS[3:]), ("---", *["---:"] * 8)]
    for (rule, budget), figures in values.items():
        cells = []
        for name, column in zip(FIELDS[3:], zip(*figures, strict=True), strict=True):
            column = [value for value in column if value == value]
            if not column:
                cells.append("-")
                continue
            se = stdev(column) / len(column) ** 0.5 if len(column) > 1 else 0.0
            scale, digits = (1, 3) if "miou" in name or name == "area" else (100, 1)
            cells.append(f"{scale * fmean(column):.{digits}f} ± {scale * se:.{digits}f}")
        lines.append((rule, str(budget), str(len(figures)), *cells))
    return aligned(lines)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name in ("root", "ids", "heldout", "probs", "class-map"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--background", type=int)
    parser.add_argument("--certified-only", action="store_true", help="the certified rules alone")
    parser.add_argument("--budgets", type=numbers, default=[25, 50, 100])
    parser.add_argument(
        "--splits", type=lambda text: list(range(int(text))), default=list(range(5))
    )
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--summary", type=Path, nargs="+", help="print the table of these files")
    options = parser.parse_args()
    if options.summary:
        print(summary(options.summary))
    else:
        run(options)


if __name__ == "__main__":
    main()
