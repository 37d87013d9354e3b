"""The ablation grid: which runs a table needs, and that it goes on where it stopped."""

from __future__ import annotations

import contextlib
import csv
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.support import folders
from tests.support.helpers import modules

NAMES = ("paper", "tables", "run")
CLASSES = 4
PROCESS = subprocess.run  # a process of its own, where the fixture in_process takes none


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    with modules("ablation", NAMES) as found:
        yield found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> folders.DataSet:
    made = folders.make(
        tmp_path_factory.mktemp("data"), count=9, sizes=((16, 20),), num_classes=CLASSES
    )
    (made.root / "3").mkdir()
    made.list_ids("3/labelled.txt", made.images[:3])
    made.list_ids("3/unlabelled.txt", made.images[3:7])
    made.list_ids("3/val.txt", made.images[7:])
    return made


@pytest.fixture
def in_process(example, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs of ``train.py`` in this process, with what they say in their log."""
    with modules("segformer", ("train",)) as segformer:

        def ran(command, *, stdout, **options):
            assert Path(command[1]) == Path(segformer.train.__file__)
            with contextlib.redirect_stderr(stdout):
                code = segformer.train.main(command[2:], lambda line: print(line, file=stdout))
            return SimpleNamespace(returncode=code)

        monkeypatch.setattr(example.run.subprocess, "run", ran)
        yield


def words(data: folders.DataSet, table: str, out: Path, *more: str) -> list[str]:
    common = {"dataset": "folder", "root": data.root, "probs": data.probs, "out": out}
    common |= {"classes": CLASSES, "model": "unet", "crop": 16, "device": "cpu"}
    lists = ["--lists", str(data.root / "3")]
    return [table, *folders.options(**common), *lists, "--epochs", "1", "1", *more]


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.nightly
def test_a_table_is_written_and_goes_on(
    example, data, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    args = words(data, "table9", tmp_path, "--background", "0")
    assert example.run.main(args, said.append) == 0
    rows = cells((tmp_path / "table9.md").read_text())
    assert [row[:2] for row in rows] == [["confidence 0.7", "3"], ["CP", "3"]]
    for row in rows:
        assert all(float(cell) >= 0 for cell in row[2:6])
        assert row[6:] == ["1", "-"]
    with (tmp_path / "table9.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [f"{float(line['miou']):.1f}" for line in found] == [row[5] for row in rows]
    with (tmp_path / "table9-classes.csv").open() as file:
        by_class = list(csv.DictReader(file))
    assert [(line["row"], line["of"]) for line in by_class] == [
        (name, of) for name in ("confidence 0.7", "CP") for of in ("labels", "student")
    ]
    for line, run in zip(by_class[1::2], found, strict=True):
        values = [float(line[f"class_{index}"]) for index in range(CLASSES)]
        assert float(run["miou"]) == pytest.approx(sum(values) / CLASSES)

    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(stamps) == 4  # labels and a run, for two rows
    lost = next(path for path in stamps if "seed0" in str(path))
    lost.unlink()
    calls: list[list[str]] = []

    def counted(command, **options):
        calls.append(command)
        return PROCESS(command, **options)

    monkeypatch.setattr(example.run.subprocess, "run", counted)
    assert example.run.main(args, said.append) == 0
    assert len(calls) == 1
    assert calls[0][-1] == str(lost.parent)
    assert cells((tmp_path / "table9.md").read_text()) == rows
    assert all(path.stat().st_mtime_ns == stamps[path] for path in stamps if path != lost)


def test_runs_side_by_side_share_the_cores(example, tmp_path: Path, monkeypatch) -> None:
    run, seen = example.run, []

    def ran(command, *, env, **options):
        seen.append(env.get("OMP_NUM_THREADS"))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(run.subprocess, "run", ran)
    monkeypatch.setattr(run.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    job = run.Job(tmp_path / "a", ())
    for workers in (1, 3):
        run.carry_out([job], [], workers, lambda line: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    run.carry_out([job], [], 3, lambda line: None)
    assert seen == [None, "2", "5"]


@pytest.fixture
def calls(example, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What ``train.py`` is called with, in place of running it; every call leaves a result."""
    found: list[list[str]] = []
    labels = {"kept": 0.5, "wrong": 0.1, "miou_kept": 0.5, "iou_kept": [0.5]}

    def ran(command, **options):
        found.append(command)
        result = {"miou": 0.5, "iou": [0.5], "pseudo_labels": labels}
        (Path(command[-1]) / "result.json").write_text(json.dumps(result))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(example.run.subprocess, "run", ran)
    return found


def test_results_of_other_settings_are_not_taken(
    example, data, tmp_path: Path, capsys, calls: list[list[str]]
) -> None:
    def again(out: Path, *more: str) -> tuple[int, list[str]]:
        calls.clear()
        capsys.readouterr()
        args = words(data, "table9", out, "--background", "0", "--lr", "0.1", *more)
        return example.run.main(args, lambda line: None), capsys.readouterr().err.splitlines()

    out = tmp_path / "out"
    assert again(out) == (0, [])
    assert len(calls) == 4  # labels and a run, for two rows
    next(out.rglob("seed0/result.json")).unlink()
    assert again(out) == (0, [])
    assert len(calls) == 1
    free = ("--jobs", "2", "--workers", "3", "--seeds", "0", "1")
    assert again(out, *free) == (0, [])
    assert ["seed1" in call[-1] for call in calls] == [True, True]
    rows = cells((out / "table9.md").read_text())
    assert [row[5:7] for row in rows] == [["50.0 ± 0.0", "2"]] * 2
    other = ("--lr 0.2", "--epochs 2 1", "--background none", "--probs p", "--dataset camvid")
    for option in (*other, "--model unet-32"):
        code, said = again(out, *option.split())
        assert code == 2
        assert calls == []
        for line in said:
            name = option.partition(" ")[0]
            assert f": expected a cell of the same settings, got another {name}; choose" in line
        rows = cells((out / "table9.md").read_text())
        assert [row[2:7] for row in rows] == [["-"] * 4 + ["0"]] * 2
    out.rename(tmp_path / "moved")
    assert again(tmp_path / "moved") == (0, [])
    assert calls == []
    lost = next((tmp_path / "moved").rglob("seed0/options.json"))
    lost.unlink()
    code, (line,) = again(tmp_path / "moved")
    assert code == 2
    said = f"{lost.parent}: expected a cell of the same settings, got one without options.json;"
    assert line.startswith(f"run.py: {said}")


def test_two_budgets_of_one_name(example, data, tmp_path: Path, capsys, calls) -> None:
    lists = ("--lists", str(tmp_path / "a" / "3"), str(tmp_path / "b" / "3"))
    assert example.run.main(words(data, "table9", tmp_path, *lists), lambda line: None) == 2
    said = "run.py: --lists: expected folders of different names, got two 3; rename one, or use"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
    assert calls == []


def test_a_run_that_dies_is_named_by_this_try(example, tmp_path: Path, monkeypatch) -> None:
    run, said = example.run, [None, "train.py: one\nlast\n\n", None, None]

    def ran(command, *, stdout, **options):
        stdout.write(said.pop(0) or "")
        return SimpleNamespace(returncode=-9)

    monkeypatch.setattr(run.subprocess, "run", ran)
    job = run.Job(tmp_path / "a", ())
    killed = f"{tmp_path / 'a'}: exit code -9"
    for line in (killed, "last", killed):
        assert run.carry_out([job], [], 1, lambda line: None) == {job.out: line}
    mended = run.Job(job.out, ("--lr", "1"))  # nothing was done with the old options
    assert run.carry_out([mended], [], 1, lambda line: None) == {job.out: killed}


def test_table5_shares_labels_and_stage_one(example, tmp_path: Path) -> None:
    run = example.run
    rows = run.rows_of("table5", "dirichlet", [0.1])
    assert len(rows) == 10
    lists = tmp_path / "92"
    jobs = [job for row in rows for job in run.jobs_of(row, lists, [0, 1], "table5", tmp_path)]
    unique = {job.out: job for job in jobs}
    labels = [job for job in unique.values() if "--labels-only" in job.options]
    second = [job for job in unique.values() if "--stage1" in job.options]
    first = [job for job in unique.values() if job not in labels and job not in second]
    assert len(labels) == 4  # foundation, CP, refitted, certified
    assert len(first) == 2 * 5
    assert len(second) == 2 * 5
    for job in second:
        base = Path(job.options[job.options.index("--stage1") + 1]).parent
        assert job.after == (base,)
        assert base in unique
        same = unique[base].options
        assert job.options[: len(same) - 2] == same[:-2]  # all but the method
    for job in jobs:
        for path in job.after:
            assert path in unique


@pytest.mark.parametrize(("table", "count"), [("table6", 12), ("table9", 2), ("table11", 3)])
def test_rows_of_the_other_tables(example, table: str, count: int) -> None:
    rows = example.run.rows_of(table, None, [])
    assert len(rows) == count
    assert len({(row.method, row.labels) for row in rows}) == count
    known = {key[2] for key in example.paper.PAPER if key[1] == table}
    assert {row.paper for row in rows if row.paper} == known


def test_the_papers_numbers(example) -> None:
    """A few read off the paper's tables 5, 6, 8, 9 and 11."""
    paper = example.paper.PAPER
    assert paper["voc", "table5", "SEEM", "92"] == 42.00
    assert paper["voc", "table5", "SEEM + CP + SR", "732"] == 83.52
    assert paper["ade20k", "table5", "SEEM + CP + SR", "158"] == 26.21
    assert paper["voc", "table6", "K-Means 0.01", "732"] == 38.71
    assert paper["voc", "table9", "Confidence=0.7", "183"] == 41.84
    assert paper["ade20k", "table9", "SEEM+CP", "2526"] == 21.59
    assert paper["voc", "table11", "SEEM+CP", "366"] == 73.27


def test_rows_of_ones_own(example, tmp_path: Path, capsys) -> None:
    run = example.run
    row = run.own_row("CP, all: foundation+cp+sr --background none --balance")
    assert row == run.Row("CP, all", "foundation+cp+sr", ("--background", "none", "--balance"))
    labels, base, second = run.jobs_of(row, tmp_path / "9", [4], "rows", tmp_path)
    for job in (labels, base, second):
        assert "--balance" in job.options
        assert job.options[job.options.index("--background") + 1] == "none"
    assert second.after == (base.out,)
    with pytest.raises(SystemExit):
        run.main(["rows", "--row", "foundation+cp"])
    assert "expected 'name: method options', got 'foundation+cp'" in capsys.readouterr().err
    words = ["rows", "--dataset", "voc", "--lists", "9", "--probs", "P", "--out", str(tmp_path)]
    assert run.main(words) == 2
    assert capsys.readouterr().err == "run.py: expected a --row with rows, got none; write one\n"


def test_table11_measures_labels_and_trains_nothing(
    example, data, tmp_path: Path, in_process: None
) -> None:
    assert example.run.main(words(data, "table11", tmp_path), lambda line: None) == 0
    assert not list(tmp_path.rglob("checkpoint.pt"))
    rows = cells((tmp_path / "table11.md").read_text())
    assert [row[0] for row in rows] == ["foundation", "CP", "confidence 0.7"]
    assert rows[0][2] == "100.0"


def test_means_and_spreads(example) -> None:
    tables = example.tables
    labels = {"kept": 0.5, "wrong": 0.125, "miou_kept": 0.25, "iou_kept": [0.0, 0.5]}
    found = [{"miou": 0.5, "iou": [0.25, 0.75]}, {"miou": 0.7, "iou": [0.5, 0.875]}]
    line = tables.row_of("CP", "92", found, labels, 78.09)
    text = tables.markdown_of([line], labels_only=False)
    expected = "| CP | 92 | 50.0 | 12.5 | 25.0 | 60.0 ± 14.1 | 2 | 78.09 |"
    assert text.splitlines()[2] == expected
    assert tables.csv_of([line]).splitlines()[0].endswith(",wrong,labels_miou,paper")
    assert tables.classes_csv_of([line]).splitlines() == [
        "row,labelled,of,class_0,class_1",
        "CP,92,labels,0.0,50.0",
        "CP,92,student,37.5,81.25",
    ]
    none = tables.markdown_of([tables.row_of("x", "1", [], None, None)], labels_only=False)
    assert none.splitlines()[2] == "| x | 1 | - | - | - | - | 0 | - |"


@pytest.mark.ci
def test_a_cell_that_fails_is_named_and_the_rest_is_done(
    example, data, tmp_path: Path, capsys, in_process: None
) -> None:
    args = words(data, "table11", tmp_path, "--certified", "0.01")
    assert example.run.main(args, lambda line: None) == 2
    said = capsys.readouterr().err.splitlines()
    assert said
    assert all(line.startswith("run.py: train.py: ") for line in said)
    rows = cells((tmp_path / "table11.md").read_text())
    assert {row[0]: row[2] == "-" for row in rows} == {
        "foundation": False,
        "CP": False,
        "confidence 0.7": False,
        "certified, 1% wrong": True,
    }
