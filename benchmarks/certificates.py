"""How often certificates are false, and how much they keep, in worlds made to break them.

    python benchmarks/certificates.py --draws 1000 -o certificates.csv
    python benchmarks/certificates.py --summary certificates.csv

The worlds are those of `cpseg.testing.assert_certificate`. Beside each statement stand the first
version of the certificate, which counted an image that keeps nothing as one without an error, and
an oracle that knows the error of every level and takes the loosest that is reached from the
strictest (or from the start of the tests) without a gap.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cpseg import Calibration, Calibrator, Certifier, groups
from cpseg.certification.rule_choice import Start, Statement, choose
from cpseg.jobs.estimate import aligned, percent
from cpseg.testing import WORLDS, try_world
from cpseg.testing.certificates import Image

LEVELS = (0.96, 0.93, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
GRID = (8, 8)
BOUND, DELTA = 0.1, 0.1
FIELDS = ("world", "statement", "images", "draws", "issued", "false", "kept")
STATEMENTS = ("labels", "image", "labels, per class", "image, per class", "first version")
Labeller = Callable[[Tensor], Tensor]


class Measured:
    """A certifier of the images that set the thresholds; each image is measured once for it."""

    def __init__(self, learn: bool, **options) -> None:
        self.learn, self.options = learn, options
        self.setting: Sequence[Image] | None = None

    def __call__(self, setting: Sequence[Image], certifying: Sequence[Image]) -> Certifier:
        if setting is not self.setting:
            self.setting, self.counts = setting, {}
            calibrator = Calibrator(groups.image(GRID), alpha=max(LEVELS))
            for image in setting:
                calibrator.update(image.probs, image.labels)
            self.certifier = Certifier(calibrator, alphas=LEVELS, **self.options)
            for image in setting if self.learn else ():
                self.certifier.learn_order(image.probs, image.labels)
        for image in certifying:
            if id(image) not in self.counts:
                self.certifier._images = []
                self.certifier.update(image.probs, image.labels)
                self.counts[id(image)] = self.certifier._images[0]
        self.certifier._images = [self.counts[id(image)] for image in certifying]
        return self.certifier


def stated(statement: str) -> Callable[..., Labeller | None]:
    per, _, per_class = statement.partition(", ")
    measured = Measured(True, max_error=BOUND, delta=DELTA, per=per, per_class=bool(per_class))

    def certify(setting, certifying, max_error: float, delta: float) -> Labeller | None:
        made = measured(setting, certifying).compute()
        return made.pseudo_labels if made.certificate.certified else None

    return certify


def first_version() -> Callable[..., Labeller | None]:
    measured = Measured(False)

    def certify(setting, certifying, max_error: float, delta: float) -> Labeller | None:
        tested = measured(setting, certifying)
        wrong = np.stack([image.wrong for image in tested._images])
        kept = np.stack([image.kept for image in tested._images])
        statement = Statement("ltt", "image", "betting", max_error, delta)
        start = Start(np.zeros(1, np.int64), 1.0)
        level = int(choose(wrong / np.maximum(kept, 1), statement, [start])[0][0])
        return labeller(tested._thresholds[level]) if level >= 0 else None

    return certify


def labeller(threshold: Tensor) -> Labeller:
    cells = torch.ones(GRID, dtype=torch.int64)
    return Calibration(threshold, cells, alpha=0.1, num_images=1, num_classes=3).pseudo_labels


def oracle(world: str, per: str) -> Callable[..., Labeller | None]:
    """The loosest level whose error over 400 other images of the world is small enough."""
    random = np.random.default_rng(1)
    known = [WORLDS[world].draw(random, 0.1) for _ in range(400)]
    known = [image._replace(labels=image.truth) for image in known][:400]
    measured = Measured(False)

    def certify(setting, certifying, max_error: float, delta: float) -> Labeller | None:
        tested = measured(setting, known)
        wrong = np.stack([image.wrong[0] for image in tested._images]).astype(float)
        kept = np.stack([image.kept[0] for image in tested._images]).astype(float)
        errors = wrong.sum(0) / np.maximum(kept.sum(0), 1)
        if per == "image":
            with np.errstate(invalid="ignore"):
                errors = np.nanmean(wrong / kept, 0)
        good = np.flatnonzero((errors <= max_error) & (kept.sum(0) > 0))
        return labeller(tested._thresholds[good.max()]) if len(good) else None

    return certify


def run(options: argparse.Namespace) -> None:
    done = set()
    if options.output.exists():
        with options.output.open(newline="") as file:
            done = {(row["world"], row["statement"]) for row in csv.DictReader(file)}
    with options.output.open("a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(FIELDS)
        for name in WORLDS:
            for statement in STATEMENTS:
                if (name, statement) in done:
                    continue
                first = statement == "first version"
                certify = first_version() if first else stated(statement)
                per = "labels" if statement == "first version" else statement.partition(",")[0]
                tried = try_world(
                    certify,
                    name,
                    per=per,
                    per_class="per class" in statement,
                    images=options.images,
                    max_error=BOUND,
                    delta=DELTA,
                    draws=options.draws,
                    reuse=20,
                )
                writer.writerow([name, statement, options.images, *tried])
                file.flush()
                print(name, statement, tried, flush=True)
            for per in ("labels", "image"):
                if (name, f"oracle, {per}") in done:
                    continue
                tried = try_world(oracle(name, per), name, per=per, draws=20, max_error=BOUND)
                writer.writerow([name, f"oracle, {per}", options.images, *tried])
                file.flush()


def summary(path: Path) -> str:
    lines = [("world", "statement", "issued", "false", "kept", "oracle keeps")]
    lines.append(("---", "---", *["---:"] * 4))
    rows = list(csv.DictReader(path.open(newline="")))
    kept = {(row["world"], row["statement"]): float(row["kept"]) for row in rows}
    for row in rows:
        if row["statement"].startswith("oracle"):
            continue
        draws = int(row["draws"])
        best = kept.get((row["world"], f"oracle, {row['statement']}"))
        shares = [percent(int(row[name]) / draws) for name in ("issued", "false")]
        own = percent(float(row["kept"]))
        lines.append(
            (row["world"], row["statement"], *shares, own, "" if best is None else percent(best))
        )
    return aligned(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--images", type=int, default=80)
    parser.add_argument("-o", "--output", type=Path, default=Path("certificates.csv"))
    parser.add_argument("--summary", type=Path, help="print the table of this file")
    options = parser.parse_args()
    if options.summary:
        print(summary(options.summary))
    else:
        run(options)


if __name__ == "__main__":
    main()
