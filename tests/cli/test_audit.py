"""``cpseg audit``: draw, answer, and read what is proven; every bad input in one line."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support import folders
from tests.support.folders import DataSet, Result, command, files, refused

VOID = 255
SMALL = ("--max-error", "0.3", "--delta", "0.2", "--seed", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return folders.make(tmp_path_factory.mktemp("data") / "data", count=4)


@pytest.fixture
def data(made: DataSet, tmp_path: Path) -> DataSet:
    shutil.copytree(made.root, tmp_path / "data")
    return DataSet(tmp_path / "data", made.scores, made.labels)


@pytest.fixture
def out(data: DataSet) -> Path:
    """A folder that has masks and ``ids.txt`` and no more: every tenth label is wrong."""
    return folder_of(data, data.root.parent / "out", keep=0.7)


def folder_of(data: DataSet, out: Path, *, keep: float, wrong: float = 0.05) -> Path:
    random = np.random.default_rng(5)
    lines = []
    for image, truth in data.labels.items():
        labels = np.where(truth == VOID, 0, truth).astype(np.uint8)
        labels = np.where(random.random(truth.shape) < wrong, (labels + 1) % 4, labels)
        labels[random.random(truth.shape) >= keep] = VOID
        path = out / "masks" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels.astype(np.uint8)).save(path)
        lines.append(f"{image} {path}\n")
    (out / "ids.txt").write_text("".join(lines))
    return out


@pytest.fixture
def run(data: DataSet, capsys: pytest.CaptureFixture[str]) -> Any:
    def audit(*words: object, root: bool = True) -> Result:
        where = ("--root", data.root) if root else ()
        return command(capsys, "audit", *words, *where)

    return audit


def said(result: Result, code: int, *parts: str) -> str:
    assert result.code == code, result
    assert "error" not in result.err, result.err
    for part in parts:
        assert part in result.out, result.out
    return result.out


def verdict(result: Result) -> tuple[int, list[str]]:
    """What is proven, without the line about the plan."""
    return result.code, [line for line in result.out.splitlines() if " pixels of " not in line]


def plan_of(folder: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())["plan"]
    return plan


def answer(out: Path, name: str, word: Any, count: int | None = None) -> Path:
    """The table of questions, filled in; ``word`` is an answer or a function of the row."""
    rows = list(csv.DictReader((out / "audit" / "questions.csv").open()))
    for row in rows[:count]:
        row["answer"] = word(row) if callable(word) else word
    path = out.parent / name
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def is_right(data: DataSet) -> Any:
    def word(row: dict[str, str]) -> str:
        true = int(data.labels[row["image"]][int(row["row"]), int(row["column"])])
        return "unsure" if true == VOID else "yes" if true == int(row["label"]) else "no"

    return word


def test_draw_answer_and_read(run: Any, out: Path, data: DataSet) -> None:
    first = run(out, *SMALL, "--label-studio")
    plan = plan_of(out / "audit")
    count = len(plan["draws"])
    text = f"{out / 'audit'}: {count} pixels of {plan['labels']} labels in 4 images, uniform, "
    looks = ", ".join(str(look[0]) for look in plan["strata"][0]["looks"])
    said(first, 0, text + f"looked at after {looks} answers", "--answers FILE")
    names = {"plan.json", "page.html", "questions.csv", "label_studio.json", "label_studio.xml"}
    assert set(files(out / "audit")) == names
    kept = sum(int((np.array(Image.open(out / "masks" / i)) != VOID).sum()) for i in data.images)
    assert plan["labels"] == kept
    assert (plan["max_error"], plan["delta"], plan["seed"]) == (0.3, 0.2, 1)
    # The same again goes on where it was, and writes what is missing.
    before = files(out / "audit")
    (out / "audit" / "page.html").unlink()
    said(run(out, *SMALL), 0, "the plan that is there")
    assert files(out / "audit") == before
    good = run(out, "--answers", answer(out, "a.csv", "yes"))
    said(good, 0, f"of the {kept} labels at most ", "with 80 % confidence", "0 wrong)")
    bad = run(out, "--answers", answer(out, "b.csv", "no"))
    said(bad, 1, "30 % is not certified")
    waiting = run(out, "--answers", answer(out, "c.csv", "yes", 1))
    said(waiting, 1, "nothing is proven yet", "1 answer, 0 wrong", "the next look is after")
    said(run(out, "--answers", answer(out, "d.csv", "unsure")), 1, "counted as wrong")
    said(run(out, "--answers", out.parent / "d.csv", "--unsure", "skip"), 1, "left out")
    other = run(out, "--answers", out.parent / "a.csv", "--max-error", "0.001")
    said(other, 1, "0.1 % is not certified")


def test_truth_by_list_and_by_folder_answers_like_a_person(
    run: Any, out: Path, data: DataSet
) -> None:
    listed = run(out, *SMALL, "--truth", data.ids)
    by_folder = run(out, *SMALL, "--truth", folder_of_truth(data))
    assert verdict(listed) == verdict(by_folder)
    assert listed.code in (0, 1)
    assert not (out / "audit" / "page.html").exists()
    run(out, *SMALL)
    person = run(out, "--answers", answer(out, "a.csv", is_right(data)))
    assert verdict(person) == verdict(listed)
    skipped = run(out, *SMALL, "--truth", data.ids, "--unsure", "skip")
    again = run(out, "--answers", out.parent / "a.csv", "--unsure", "skip")
    assert verdict(skipped) == verdict(again)
    zero = run(out, *SMALL, "--truth", data.ids, "--void", "3")
    assert zero.code == 2 or "could not be told" in zero.out


def folder_of_truth(data: DataSet) -> Path:
    folder = data.root.parent / "truth"
    for image in data.images:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data.mask_file(image), folder / image)
    return folder


def test_truth_that_is_missing_or_of_another_size(run: Any, out: Path, data: DataSet) -> None:
    few = data.list_ids("few.txt", data.images[:1])
    refused(run(out, *SMALL, "--truth", few), "a mask of", "none; list every image")
    Image.new("L", (3, 3)).save(data.mask_file(data.images[0]))
    refused(run(out, *SMALL, "--truth", data.ids), data.images[0].split("/")[-1])


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        (("--max-error", "0.2"), "the plan's max error 0.3, got 0.2"),
        (("--delta", "0.1"), "the plan's delta 0.2, got 0.1"),
        (("--seed", "2"), "the plan's seed 1, got 2"),
        (("--by-class",), "the plan's design uniform, got by-class"),
        (("--looking", "any"), "the plan's looking planned, got any"),
        (("--expected-error", "0.01"), "the plan's expected error"),
        (("--draw", "3"), "answers, got 3; leave them as they were"),
    ],
)
def test_other_settings_are_refused(run: Any, out: Path, changed: Any, part: str) -> None:
    run(out, *SMALL)
    before = files(out)
    refused(run(out, *SMALL, *changed), part, "or choose another folder with -o")
    assert files(out) == before
    said(run(out, *SMALL, *changed, "-o", out.parent / "other"), 0, "other: ")


def test_labels_that_changed_are_refused(run: Any, out: Path, data: DataSet) -> None:
    run(out, *SMALL)
    answers = answer(out, "a.csv", "yes")
    mask = out / "masks" / data.images[2]
    labels = np.array(Image.open(mask))
    labels[0, 0] = 1 if labels[0, 0] != 1 else 2
    Image.fromarray(labels).save(mask)
    text = "expected the labels that the pixels were drawn from, got others"
    refused(run(out, "--answers", answers), text)
    refused(run(out, *SMALL), text)


def test_answers_that_are_not_of_this_plan(run: Any, out: Path) -> None:
    run(out, *SMALL)
    path = answer(out, "a.csv", "yes")
    text = path.read_text()
    lines = text.splitlines()
    plan = lines[1].split(",")[0]
    for name, changed, part in (
        ("plan.csv", text.replace(plan, "0" * 16), f"expected answers for plan {plan}, got"),
        ("pixel.csv", text.replace(lines[1], _with(lines[1], 1, "999")), "number of a pixel"),
        ("moved.csv", text.replace(lines[1], _with(lines[1], 3, "77")), "of the plan"),
        ("word.csv", text.replace(lines[1], _with(lines[1], -1, "perhaps")), "an answer among"),
        ("twice.csv", text + _with(lines[1], -1, "no") + "\n", "one answer for pixel 0"),
        ("half.csv", text[: text.index(lines[3]) + 20], "columns, got"),
        ("half.json", '{"plan": "' + plan + '", "answers": [{"numb', "answers saved by"),
        ("empty.csv", "", "answers saved by"),
    ):
        (out.parent / name).write_text(changed)
        refused(run(out, "--answers", out.parent / name), name, part)
    refused(run(out, "--answers", out.parent / "absent.csv"), "absent.csv", "No such file")
    # The same answer twice is one answer.
    (out.parent / "same.csv").write_text(text + lines[1] + "\n")
    assert run(out, "--answers", out.parent / "same.csv") == run(out, "--answers", path)


def _with(line: str, column: int, word: str) -> str:
    cells = line.split(",")
    cells[column] = word
    return ",".join(cells)


def test_two_people(run: Any, out: Path) -> None:
    run(out, *SMALL)
    one = answer(out, "a.csv", "yes")
    two = answer(out, "b.csv", lambda row: "no" if int(row["number"]) < 2 else "yes", 4)
    both = run(out, "--answers", one, two)
    text = "2 people: 4 pixels answered by more than one, 2 of them differently, which count as"
    assert both.out.startswith(text)
    alone = run(
        out,
        "--answers",
        answer(out, "c.csv", lambda row: "no" if int(row["number"]) < 2 else "yes"),
    )
    assert both.out.splitlines()[1:] == alone.out.splitlines()


def test_by_class_and_few_labels_of_a_class(run: Any, out: Path, data: DataSet) -> None:
    for image in data.images:
        labels = np.array(Image.open(out / "masks" / image))
        labels[labels == 3] = VOID
        labels[0, 0] = 3
        Image.fromarray(labels).save(out / "masks" / image)
    said(run(out, *SMALL, "--by-class"), 0, "by-class: 3 to ")
    plan = plan_of(out / "audit")
    assert [stratum["size"] for stratum in plan["strata"]][3] == 4
    result = run(out, "--answers", answer(out, "a.csv", "yes"))
    said(result, 0, "class", "The bounds of all classes hold at once with 80 % confidence.")
    row = next(line.split() for line in result.out.splitlines() if line.startswith("| 3 "))
    assert row == ["|", "3", "|", "4", "|", "3", "|", "0", "|", "25.0", "%", "|"]
    result = run(out, "--answers", out.parent / "a.csv", "--unsure", "skip")
    said(result, 0, "confidence, of labels that a person can judge.")


def test_stricter_rules(run: Any, out: Path, data: DataSet) -> None:
    strict = out.parent / "strict"
    shutil.copytree(out, strict)
    for image in data.images:
        path = strict / "masks" / image
        labels = np.array(Image.open(path))
        labels[::2] = VOID
        Image.fromarray(labels).save(path)
    run(out, *SMALL, "--draw", "60")
    answers = answer(out, "a.csv", "yes")
    result = run(out, "--answers", answers, "--stricter", strict)
    kept = sum(int((np.array(Image.open(strict / "masks" / i)) != VOID).sum()) for i in data.images)
    said(result, 0, f"{strict}: of the {kept} labels at most ")
    mask = strict / "masks" / data.images[1]
    labels = np.array(Image.open(mask))
    labels[1, 1] = 3 if labels[1, 1] != 3 else 2
    Image.fromarray(labels).save(mask)
    refused(run(out, "--answers", answers, "--stricter", strict), "has too", data.images[1])
    (strict / "ids.txt").write_text((strict / "ids.txt").read_text().partition("\n")[2])
    refused(run(out, "--answers", answers, "--stricter", strict), "expected the images of")


@pytest.mark.parametrize("bound", ["0.3", "3/10"])
def test_plan_says_the_cost_and_writes_nothing(run: Any, out: Path, bound: str) -> None:
    before = files(out)
    result = run(out, "--max-error", bound, "--plan")
    said(result, 0, "certify at most 30 % with a chance of 90 % (confidence 90 %", "one look")
    assert files(out) == before
    refused(run(out, "--plan", "--max-error", "0"), "max_error in (0, 1), got '0'")


def test_options_that_do_nothing_are_refused(run: Any, out: Path) -> None:
    run(out, *SMALL)
    path = answer(out, "a.csv", "yes")
    read = ("--answers", path)
    refused(run(out, *read, "--truth", path), "--answers or --truth, got both")
    refused(run(out, *read, "--plan"), "--plan or answers, got both")
    for words in (["--by-class"], ["--seed", "0"], ["--draw", "5"], ["--label-studio"]):
        refused(run(out, *read, *words), f"{words[0]} when pixels are drawn", "the plan has it")
    refused(run(out, "--unsure", "skip"), "--unsure with --answers or --truth")
    refused(run(out, "--stricter", out), "--stricter with --answers or --truth")
    refused(run(out, *read, "--delta", "0.1"), "expected delta 0.2 of the plan, got 0.1")
    assert run(out, *read, "--delta", "0.2") == run(out, *read)


def test_folders_without_labels_lists_or_images(
    run: Any, out: Path, data: DataSet, tmp_path: Path
) -> None:
    refused(run(out, root=False), "a run.json that names the images' folder", "--root")
    refused(run(tmp_path / "nowhere"), "expected a folder that cpseg label has finished")
    refused(run(out, "--answers", data.ids), "expected a plan.json, got none", "draw the pixels")
    refused(run(out, "--focus"), "expected scores for --focus, got none recorded")
    for image in data.images:
        Image.fromarray(np.full((12, 16), VOID, np.uint8)).save(out / "masks" / image)
    refused(run(out, *SMALL), "expected at least one label kept, got none")
    refused(run(out, *SMALL, "--plan"), "expected at least one label kept, got none")
    (out / "ids.txt").write_text("images/99.png\n")
    refused(run(out, *SMALL), "ids.txt")


@pytest.mark.parametrize("content", ["{", "[]", '{"plan": 3}', '{"plan": {"folder": ""}}'])
def test_a_damaged_plan_is_refused(run: Any, out: Path, content: str) -> None:
    run(out, *SMALL)
    (out / "audit" / "plan.json").write_text(content)
    refused(run(out, *SMALL), "plan.json", "use the file as cpseg audit wrote it")


def test_names(run: Any, out: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("sky\nroad\n")
    refused(run(out, *SMALL, "--names", names), "a name for class", "2 names")
    names.write_text("sky\nroad\ntree\ncar\n")
    said(run(out, *SMALL, "--names", names), 0)
    assert "sky" in (out / "audit" / "questions.csv").read_text()
    assert "tree" in (out / "audit" / "page.html").read_text()


def test_labels_of_cpseg_label_need_no_root(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ``--focus``, whose scores and calibration are recorded there."""
    file, out = tmp_path / "c.safetensors", tmp_path / "labels"
    words = data.options(alpha=0.2, background=0, output=file)
    assert command(capsys, "calibrate", *words).code == 0
    words = data.options(calibration=file, output=out)
    made = command(capsys, "label", *words)
    assert made.code == 0, made
    drawn = command(capsys, "audit", out, *SMALL, "--focus", "--draw", 150)
    said(drawn, 0, "focus, looked at whenever you like")
    plan = plan_of(out / "audit")
    assert len(plan["draws"]) == 150
    for image, row, column, label, _, predicted in plan["draws"]:
        score = float(data.scores[image][label, row, column])
        assert predicted == pytest.approx(1 - score, abs=1e-6)
    result = command(capsys, "audit", out, "--answers", answer(out, "a.csv", "yes"))
    said(result, 0, "150 answers, 0 wrong")
    by_truth = command(capsys, "audit", out, *SMALL, "--focus", "--draw", 150, "--truth", data.ids)
    assert by_truth.code in (0, 1)


def test_two_audits_at_once_and_in_one_folder(run: Any, out: Path, data: DataSet) -> None:
    from cpseg._internal.safe_files import locked

    holder = (
        "import sys\nfrom cpseg._internal.safe_files import locked\n"
        "with locked(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    (out / "audit").mkdir()
    words = [sys.executable, "-c", holder, str(out / "audit" / "audit.lock")]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        refused(run(out, *SMALL), "expected no other audit at work", "-o")
        process.communicate("")
    said(run(out, *SMALL), 0)
    with locked(out / "audit" / "audit.lock"):
        pass
    other = folder_of(data, out.parent / "two", keep=0.4)
    refused(run(other, *SMALL, "-o", out / "audit"), "the labels that the pixels were drawn from")


def test_in_a_pipe(out: Path, data: DataSet) -> None:
    words = [sys.executable, "-m", "cpseg", "audit", out, "--root", data.root, "--truth", data.ids]
    done = subprocess.run(
        [*map(str, words), *SMALL], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.splitlines()[1].startswith("of the ")
    assert "\r" not in done.stderr
