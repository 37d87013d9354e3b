"""The ablations of ConformalSAM (ICCV 2025) on a data set, next to the paper's numbers.

python examples/ablation/run.py table5 --dataset voc --root VOC2012 --probs seem_probs \
    --lists splits/92 splits/732 --out ablation
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpseg.files import write_text
from paper import PAPER
from tables import classes_csv_of, csv_of, markdown_of, row_of

TRAIN = Path(__file__).parent.parent / "segformer" / "train.py"
TABLES = ("table5", "table6", "table9", "table11", "rows")
VARIANTS = {"pixel": "Pixel", "image": "Image", "kmeans": "K-Means", "annuli": "GenAnn"}
BEGUN = ("labels", "checkpoint.pt", "result.json")  # a cell with one of these was begun
FREE = ("--device", "--workers", "--every")  # options on which no result depends
OWN = ("--pseudo-labels", "--stage1")  # paths in other cells
Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One row: a method, and the options of its labels.

    Attributes:
        name: its name in the table.
        method: a method of ``train.py``.
        labels: options of ``train.py``; rows with the same share their pseudo-labels.
        paper: name of the paper's row, or None.
    """

    name: str
    method: str
    labels: tuple[str, ...] = ()
    paper: str | None = None


@dataclass(frozen=True)
class Job:
    """A call of ``train.py``, and the output folders of the calls for which it waits."""

    out: Path
    options: tuple[str, ...]
    after: tuple[Path, ...] = field(default=())


def rows_of(table: str, recalibrate: str | None, certified: list[float]) -> list[Row]:
    """The rows of a table, with rows of recalibrated and certified labels if they are asked for."""
    constant = ("--constant", "0.3")
    cp = "foundation+cp"
    more = []
    if recalibrate:
        more.append((f"CP, refitted ({recalibrate})", ("--recalibrate", recalibrate)))
    for bound in certified:
        refit = ("--recalibrate", recalibrate) if recalibrate else ()
        more.append((f"certified, {bound:.0%} wrong", (*refit, "--certified", f"{bound:g}")))
    if table == "table5":
        rows = [
            Row("labels only", "label-only"),
            Row("self-training", "self-training", paper="-"),
            Row("foundation", "foundation", paper="SEEM"),
            Row("foundation + SR", "foundation+sr", paper="SEEM + SR"),
            Row("CP", cp, paper="SEEM + CP"),
            Row("CP + SR", f"{cp}+sr", paper="SEEM + CP + SR"),
        ]
        for name, labels in more:
            rows += [Row(name, cp, labels), Row(f"{name} + SR", f"{cp}+sr", labels)]
        return rows
    if table == "table6":
        return [
            Row(
                f"{title}, {alpha}",
                cp,
                ("--variant", variant, "--alpha", alpha),
                f"{title} {alpha}",
            )
            for variant, title in VARIANTS.items()
            for alpha in ("0.1", "0.05", "0.01")
        ]
    if table == "table9":
        return [
            Row("confidence 0.7", cp, constant, "Confidence=0.7"),
            Row("CP", cp, paper="SEEM+CP"),
            *(Row(name, cp, labels) for name, labels in more),
        ]
    if table == "rows":
        return []
    return [
        Row("foundation", "foundation", paper="SEEM"),
        Row("CP", cp, paper="SEEM+CP"),
        Row("confidence 0.7", cp, constant),
        *(Row(name, cp, labels) for name, labels in more),
    ]


def own_row(text: str) -> Row:
    """A row of the user, from ``name: method options``."""
    name, colon, rest = text.partition(":")
    method, *options = shlex.split(rest) or [""]
    if not (name.strip() and colon and method):
        fix = "write 'CP, kept: foundation+cp --background none'"
        raise argparse.ArgumentTypeError(f"expected 'name: method options', got {text!r}; {fix}")
    return Row(name.strip(), method, tuple(options))


def jobs_of(row: Row, lists: Path, seeds: list[int], table: str, out: Path) -> list[Job]:
    """The jobs of a row at one label budget: labels, runs, and the runs from which those start."""
    home = out / lists.name
    given = ("--lists", str(lists))
    if not row.method.startswith("foundation"):
        jobs, pseudo = [], ()
    else:
        kind = "foundation" if "+cp" not in row.method else "cp"
        labels = home / "labels" / "-".join([kind, *(o.strip("-") for o in row.labels)])
        method = row.method.removesuffix("+sr")
        jobs = [Job(labels, (*given, "--method", method, *row.labels, "--labels-only"))]
        pseudo = ("--pseudo-labels", str(labels / "labels"))
    if table == "table11":
        return jobs
    waits = tuple(job.out for job in jobs)
    first = {"self-training": "label-only"}.get(row.method, row.method.removesuffix("+sr"))
    for seed in seeds:
        options = (*given, *pseudo, *row.labels, "--seed", str(seed))
        base = cell(row, lists, seed, out, method=first)
        jobs.append(Job(base, (*options, "--method", first), waits))
        if first != row.method:  # both have the same Stage I
            more = ("--method", row.method, "--stage1", str(base / "stage1.pt"))
            jobs.append(Job(cell(row, lists, seed, out), (*options, *more), (base,)))
    return jobs


def cell(row: Row, lists: Path, seed: int, out: Path, method: str | None = None) -> Path:
    """The folder of a run of a row."""
    name = "-".join([method or row.method, *(option.strip("-") for option in row.labels)])
    return out / lists.name / name / f"seed{seed}"


def settings_of(job: Job, common: list[str]) -> dict[str, list[str]]:
    """The options on which a result depends, whatever their order and the path of ``--out``."""
    options: dict[str, list[str]] = {}
    for word in (*common, *job.options):
        if word.startswith("--"):
            options[name := word] = []
        else:
            options[name].append(os.path.relpath(word, job.out) if name in OWN else word)
    return {name: words for name, words in options.items() if name not in FREE}


def check_settings(job: Job, common: list[str]) -> None:
    """Refuse to continue a cell that was begun with other options than these.

    The options are saved in the cell.
    """
    path, wanted = job.out / "options.json", settings_of(job, common)
    begun = any((job.out / name).exists() for name in BEGUN)
    got = "one without options.json" if begun else ""
    if begun and path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(old.keys() | wanted.keys())
        other = ", ".join(name for name in names if old.get(name) != wanted.get(name))
        got = f"another {other}" if other else ""
    if got:
        raise ValueError(
            f"{job.out}: expected a cell of the same settings, got {got}; "
            "choose another --out, or delete it"
        )
    write_text(path, json.dumps(wanted, indent=2) + "\n")


def call(job: Job, common: list[str], environment: dict[str, str]) -> str | None:
    """Run a job; returns the last line of its log, or its exit code, if it fails."""
    command = [sys.executable, str(TRAIN), *common, *job.options, "--out", str(job.out)]
    with (job.out / "log.txt").open("a", encoding="utf-8") as log:
        start = log.tell()
        code = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if not code:
        return None
    said = (job.out / "log.txt").read_bytes()[start:].decode(errors="replace").split("\n")
    return next((line for line in reversed(said) if line.strip()), f"{job.out}: exit code {code}")


def carry_out(jobs: list[Job], common: list[str], workers: int, say: Say) -> dict[Path, str]:
    """Run the jobs without a result, ``workers`` at a time; returns failed ones with a reason."""
    wanted = list({job.out: job for job in jobs}.values())
    environment = dict(os.environ)
    if workers > 1:  # otherwise each run would use all cores, and they would slow each other down
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    done = {job.out: threading.Event() for job in wanted}
    failed: dict[Path, str] = {}

    def work(job: Job) -> str:
        try:
            for path in job.after:
                done[path].wait()
                if path in failed:
                    failed[job.out] = failed[path]
                    return f"{job.out}: left out"
            job.out.mkdir(parents=True, exist_ok=True)
            try:
                check_settings(job, common)
            except ValueError as error:
                failed[job.out] = str(error)
                return failed[job.out]
            if (job.out / "result.json").is_file():
                return f"{job.out}: there"
            line = call(job, common, environment)
            if line is not None:
                failed[job.out] = line
                return f"{job.out}: {line}"
            return f"{job.out}: done"
        finally:
            done[job.out].set()

    # Every job comes after those for which it waits, so the pool, which is in order, cannot lock.
    with ThreadPoolExecutor(workers) as pool:
        for number, future in enumerate(as_completed([pool.submit(work, j) for j in wanted]), 1):
            say(f"{number} of {len(wanted)}: {future.result()}")
    return failed


def gather(
    table: str, rows: list[Row], args: argparse.Namespace, failed: Collection[Path]
) -> list[dict[str, Any]]:
    """One line per row and label budget, with the mean over the seeds and the paper's number.

    Results of failed cells are not used, because they may belong to other settings.
    """
    lines = []
    for row in rows:
        for lists in args.lists:
            if table == "table11":
                places = [jobs_of(row, lists, [], table, args.out)[0].out]
            else:
                places = [cell(row, lists, seed, args.out) for seed in args.seeds]
            found = [
                json.loads((place / "result.json").read_text(encoding="utf-8"))
                for place in places
                if place not in failed and (place / "result.json").is_file()
            ]
            labels = None
            if row.method.startswith("foundation"):
                place = jobs_of(row, lists, [], "table11", args.out)[0].out
                path = place / "result.json"
                if place not in failed and path.is_file():
                    labels = json.loads(path.read_text(encoding="utf-8"))["pseudo_labels"]
            key = (args.dataset, table, row.paper, lists.name)
            lines.append(row_of(row.name, lists.name, found, labels, PAPER.get(key)))
    return lines


def parser() -> argparse.ArgumentParser:
    """The command line; unknown options go to ``train.py``."""
    out = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    out.add_argument("table", choices=TABLES)
    out.add_argument("--dataset", required=True)
    out.add_argument(
        "--lists", type=Path, nargs="+", required=True, help="one folder per label budget"
    )
    out.add_argument(
        "--probs", required=True, help="folder of the foundation model's probabilities"
    )
    out.add_argument("--out", type=Path, required=True)
    out.add_argument("--seeds", type=int, nargs="+", default=[0])
    out.add_argument("--recalibrate", help="method: adds rows with recalibrated probabilities")
    out.add_argument("--certified", type=float, nargs="*", default=[], metavar="ERROR")
    out.add_argument(
        "--row", type=own_row, action="append", default=[], help="name: method options"
    )
    out.add_argument("--jobs", type=int, default=1, help="runs at a time")
    return out


def main(argv: list[str] | None = None, say: Say = print) -> int:
    """Run the missing cells and write the table; returns 0 if it is complete."""
    args, rest = parser().parse_known_args(argv)
    rows = rows_of(args.table, args.recalibrate, args.certified) + args.row
    if not rows:
        print("run.py: expected a --row with rows, got none; write one", file=sys.stderr)
        return 2
    names = [lists.name for lists in args.lists]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        line = f"--lists: expected folders of different names, got two {twice[0]}"
        line += "; rename one, or use another --out"
        print(f"run.py: {line}", file=sys.stderr)
        return 2
    jobs = [
        job
        for lists in args.lists
        for row in rows
        for job in jobs_of(row, lists, args.seeds, args.table, args.out)
    ]
    jobs = [
        Job(job.out, (*job.options, "--probs", args.probs), job.after)
        if "--labels-only" in job.options
        else job
        for job in jobs
    ]
    jobs.sort(key=lambda job: (len(job.after) > 0, "--stage1" in job.options))
    failed = carry_out(jobs, ["--dataset", args.dataset, *rest], args.jobs, say)
    lines = gather(args.table, rows, args, failed)
    text = markdown_of(lines, labels_only=args.table == "table11")
    write_text(args.out / f"{args.table}.md", text)
    write_text(args.out / f"{args.table}.csv", csv_of(lines))
    write_text(args.out / f"{args.table}-classes.csv", classes_csv_of(lines))
    say(text)
    for line in sorted(set(failed.values())):
        print(f"run.py: {line}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
