"""The table: what each way of making pseudo-labels does to a student.

python examples/labelmefacade/results.py data out
python examples/labelmefacade/results.py data out --budgets 44 --seeds 0
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pseudo
from convert import BUDGETS, CLASSES
from cpseg.files import read_ids, write_text
from pseudo import FOUNDATION, ROUND_1, STUDENT, Rule, errors

STUDENTS = Path(__file__).parent / "students.py"
LABELS_ONLY, RECOMMENDED = "labels only", "recommended"
Figures = dict[str, Any]
Line = tuple[str, ...]


class Steps:
    """Steps whose results are kept as JSON: one that was done in the same way is not done again."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __call__(self, name: str, made: Any, call: Callable[[], Any]) -> Any:
        """The result of a call.

        Args:
            name: of the step, and of its file.
            made: all that decides the result, as JSON.
            call: does the work and returns what is kept.
        """
        path, made = self.out / f"{name}.json", json.loads(json.dumps(made))
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["made"] == made:
                return kept["result"]
        print(name, file=sys.stderr, flush=True)
        result = call()
        write_text(path, json.dumps({"made": made, "result": result}, indent=1) + "\n")
        return result


@dataclass(frozen=True)
class Student:
    """A script that trains students: ``students.py``, or one with the same options.

    Attributes:
        script: takes ``DATA --labelled LIST --pool LIST [--pseudo MASKS] --seeds S ...`` and
            ``--json FILE``, or in its place ``--scores FOLDER --folds N``.
        data: the folder of the data set.
        pool: the id list of labelled and unlabelled images.
        seeds: of the students that are measured; the first one is that of scores.
        folds: of the scores out of fold.
        more: further options.
    """

    script: Path
    data: Path
    pool: str
    seeds: tuple[int, ...]
    folds: int
    more: tuple[str, ...] = ()

    def made(self, labelled: str) -> Figures:
        """What decides its results on a list, besides seeds and pseudo-labels."""
        lists = [_names(self.data / name) for name in (labelled, self.pool)]
        text = self.script.read_bytes()
        return {
            "script": hashlib.sha256(text).hexdigest(),
            "options": self.more,
            "data": str(self.data.resolve()),
            "lists": hashlib.sha256(json.dumps(lists).encode()).hexdigest(),
        }

    def train(self, labelled: str, pseudo: Path | None, path: Path) -> Figures:
        """The mIoU and wrong share in percent on the held-out list, one each per seed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._run(labelled, pseudo, "--json", str(path))
        found: Figures = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        return found

    def score(self, labelled: str, pseudo: Path | None, out: Path) -> None:
        """Write its scores of all images, out of fold for the labelled ones."""
        shutil.rmtree(out, ignore_errors=True)
        self._run(labelled, pseudo, "--scores", str(out), "--folds", str(self.folds))

    def _run(self, labelled: str, pseudo: Path | None, *more: str) -> None:
        words = [str(self.script), str(self.data), "--labelled", labelled, "--pool", self.pool]
        words += ["--seeds", *map(str, self.seeds), *more, *self.more]
        if pseudo is not None:
            words += ["--pseudo", str(pseudo)]
        said, argv, code = io.StringIO(), sys.argv, 0
        sys.argv = words
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                runpy.run_path(str(self.script), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.argv = argv
        if code:
            last = (said.getvalue().strip().splitlines() or ["nothing"])[-1]
            raise ValueError(f"{self.script.name}: expected it to train, got: {last}; mend that")


def rules() -> dict[str, Rule]:
    """Every rule by its row's name; round 2 is made of the recommended one's student."""
    best, dirichlet = Rule.recommended(), dict(pseudo.DIRICHLET)
    return {
        "foundation, raw": Rule((FOUNDATION,), None),
        "foundation, Dirichlet": Rule((FOUNDATION,), dirichlet),
        "student's own": Rule((STUDENT,), None),
        "both, one Dirichlet map": Rule((FOUNDATION, STUDENT), dirichlet),
        RECOMMENDED: best,
        **{f"recommended without {source}": best.without(source) for source in best.sources},
        "recommended, round 2": best.second_round(),
    }


def rows_of(steps: Steps, student: Student, budget: int) -> dict[str, Figures]:
    """For every row ``labels``, the errors of its labels, and ``student``, those of its student."""
    listed, place = f"labelled_{budget}.txt", steps.out / str(budget)
    base = student.made(listed)
    rows = {LABELS_ONLY: {"student": labels_only(steps, student, listed)}}
    scores = {FOUNDATION: student.data / "probs"}
    made_of: dict[str, Figures] = {}  # of scores and labels by name

    def scored(name: str, labels: str | None) -> None:
        """The scores of a student of the labels alone, or also of those of a row."""
        folder = place / name.replace(" ", "_")
        pseudo = None if labels is None else _masks(place, labels)
        made_of[name] = {**base, "seed": student.seeds[0], "folds": student.folds}
        made_of[name]["labels"] = None if labels is None else made_of[labels]
        steps(
            f"{budget}/{folder.name}_scores",
            made_of[name],
            lambda: student.score(listed, pseudo, folder),
        )
        scores[name] = folder

    scored(STUDENT, None)
    for name, rule in rules().items():
        if ROUND_1 in rule.sources:
            scored(ROUND_1, RECOMMENDED)
        read = {each: made_of[each] for each in rule.sources if each in made_of}
        made_of[name] = {"rule": asdict(rule), "read": read, "data": base["data"]}
        made_of[name]["lists"] = base["lists"]
        rows[name] = row_of(steps, student, budget, name, rule, scores, made_of[name])
    return rows


def row_of(
    steps: Steps,
    student: Student,
    budget: int,
    name: str,
    rule: Rule,
    scores: dict[str, Path],
    made: Figures,
) -> Figures:
    """Make the labels of a row, measure them, and train students on them."""
    listed, place = f"labelled_{budget}.txt", steps.out / str(budget)
    masks = _masks(place, name)

    def label() -> Figures:
        rule.label(student.data, budget, scores, masks.parent.parent)
        return errors(student.data, budget, masks)

    trained = {**student.made(listed), "seeds": student.seeds, "labels": made}
    path = place / f"{_slug(name)}_seeds.json"
    return {
        "labels": steps(f"{budget}/{_slug(name)}_labels", made, label),
        "student": steps(
            f"{budget}/{_slug(name)}_student", trained, lambda: student.train(listed, masks, path)
        ),
    }


def _slug(name: str) -> str:
    return re.sub(r"\W+", "_", name)


def _masks(place: Path, name: str) -> Path:
    """The masks of the labels of a row."""
    return place / _slug(name) / "masks" / "images"


def labels_only(steps: Steps, student: Student, listed: str) -> Figures:
    """Students of the true masks of a list alone."""
    made = {**student.made(listed), "seeds": student.seeds}
    name = f"only_{Path(listed).stem}"
    path = steps.out / f"{name}_seeds.json"
    found: Figures = steps(name, made, lambda: student.train(listed, None, path))
    return found


def _names(path: Path) -> list[str]:
    return [pair.image for pair in read_ids(path)]


def worth(value: float, curve: Sequence[tuple[int, float]], *, sign: int = 1) -> str:
    """How many labelled images give a student as good as this one.

    Args:
        value: what it reaches.
        curve: numbers of labelled images and what they reach, in increasing order. Between two of
            them it is a straight line over the logarithm of the number; where it gets worse
            again, it stays at the best so far.
        sign: -1 where smaller is better.
    """
    best = -math.inf
    points = []
    for number, reached in curve:
        best = max(best, sign * reached)
        points.append((number, best))
    value *= sign
    if value < points[0][1]:
        return f"< {points[0][0]}"
    for (few, low), (many, high) in itertools.pairwise(points):
        if value == low:
            return str(few)
        if value < high:
            share = (value - low) / (high - low)
            return str(round(few * (many / few) ** share))
    return str(points[-1][0]) if value == points[-1][1] else f"> {points[-1][0]}"


def table(lines: Sequence[Line]) -> str:
    """Lines of cells as a Markdown table; the first line is the header."""
    rule = ("---", *["---:"] * (len(lines[0]) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def _over_seeds(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{fmean(values):.1f} ± {stdev(values):.1f}"


def _closed(value: float, low: float, high: float) -> str:
    """The share of the way from labels only to the true masks of all."""
    return "-" if high == low else f"{100 * (value - low) / (high - low):.0f} %"


def students_table(rows: dict[str, Figures], curve: dict[int, Figures]) -> str:
    """Labels and students of every row of a budget."""
    start, end = rows[LABELS_ONLY]["student"], curve[max(curve)]
    titles = ("labels wrong %", "labels mIoU", "student mIoU", "wrong %", "way, mIoU", "way, wrong")
    lines: list[Line] = [("pseudo-labels", *titles, "worth, mIoU", "worth, wrong")]
    ends = {f"true masks of all {max(curve)}": {"student": end}}
    for name, row in {**rows, **ends}.items():
        labels, found = row.get("labels"), row["student"]
        cells = ["-", "-"] if labels is None else [f"{labels[k]:.1f}" for k in ("wrong", "miou")]
        cells += [_over_seeds(found[key]) for key in ("miou", "wrong")]
        for key in ("miou", "wrong"):
            mean, low, high = (fmean(each[key]) for each in (found, start, end))
            cells.append(_closed(mean, low, high))
        for key, sign in (("miou", 1), ("wrong", -1)):
            points = [(number, fmean(curve[number][key])) for number in sorted(curve)]
            cells.append(worth(fmean(found[key]), points, sign=sign))
        lines.append((name, *cells))
    return table(lines)


def classes_table(rows: dict[str, Figures]) -> str:
    """For every class the share of its pixels that carry another label."""
    lines: list[Line] = [("wrong % of the pixels of", *CLASSES)]
    for name, row in rows.items():
        if "labels" in row:
            of_class = row["labels"]["of_class"]
            lines.append((name, *("-" if v is None else f"{v:.1f}" for v in of_class)))
    return table(lines)


def curve_table(curve: dict[int, Figures]) -> str:
    """Students of true masks alone."""
    lines: list[Line] = [("true masks alone", *map(str, sorted(curve)))]
    for name, key in (("mIoU", "miou"), ("wrong %", "wrong")):
        lines.append((name, *(_over_seeds(curve[number][key]) for number in sorted(curve))))
    return table(lines)


def run(args: argparse.Namespace) -> None:
    """Do what is not done yet, and print the tables.

    Raises:
        ValueError: bad settings or files.
        OSError: a file that cannot be read or written.
    """
    pools = sorted(args.data.glob("all_*.txt"))
    if len(pools) != 1:
        raise ValueError(
            f"{args.data}: expected one list all_*.txt of labelled and unlabelled images, "
            f"got {len(pools)}; pass the folder of convert.py"
        )
    more = () if args.steps is None else ("--steps", str(args.steps))
    script = args.probe or STUDENTS
    student = Student(script, args.data, pools[0].name, tuple(args.seeds), args.folds, more)
    steps = Steps(args.out)
    sizes = [int(path.stem.split("_")[1]) for path in args.data.glob("labelled_*.txt")]
    curve = {n: labels_only(steps, student, f"labelled_{n}.txt") for n in sorted(sizes)}
    curve[len(_names(pools[0]))] = labels_only(steps, student, pools[0].name)
    texts = [curve_table(curve)]
    for budget in args.budgets:
        rows = rows_of(steps, student, budget)
        texts.append(f"## {budget} labelled images\n\n{students_table(rows, curve)}")
        texts.append(classes_table(rows))
        write_text(args.out / f"table_{budget}.md", "\n\n".join(texts[-2:]) + "\n")
    print("\n\n".join(texts))


def main(argv: list[str] | None = None) -> int:
    """Returns 0 on success, 2 after one line on stderr for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with images, masks, probs, features, lists")
    parser.add_argument("out", type=Path, help="folder to write; a stopped run goes on")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folds", type=int, default=4, help="of the student's scores (default 4)")
    parser.add_argument("--steps", type=int, help="of a student's training (default: its own)")
    parser.add_argument(
        "--probe", type=Path, help="another script than students.py, with the same options"
    )
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"results.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
