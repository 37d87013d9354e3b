"""Questions and answers of an audit: CSV, Label Studio, the JSON of the page, several people."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.support.folders import complains
from tests.support.helpers import raises

from cpseg.files.audit_files import (
    CLOSE_UP,
    Answers,
    Question,
    merge_answers,
    once,
    read_answers,
    write_label_studio,
    write_questions_csv,
)

PLAN = "plan-1f2e"
QUESTIONS = [
    Question(0, "a.png", 3, 4, 1),
    Question(1, "ü, b.png", 0, 0, 2),
    Question(2, "a.png", 3, 4, 1),  # the pixel of 0, drawn again
    Question(3, "a.png", 4, 3, 0),
]
NAMES = ["road", "sky", 'a "building", old']


def entry(of: int, word: str, **changed: object) -> dict[str, object]:
    return {**QUESTIONS[of]._asdict(), "answer": word, **changed}


def page(*entries: dict[str, object], **changed: object) -> str:
    return json.dumps({"plan": PLAN, "who": "Anna", "answers": entries, **changed})


def filled(text: str, answers: Sequence[str]) -> str:
    """A table with its last column filled in."""
    head, *lines = text.splitlines()
    return "\n".join([head, *(a + b for a, b in zip(lines, answers, strict=True))]) + "\n"


def export(*answers: Sequence[str], **changed: object) -> str:
    """As Label Studio exports tasks: for each pixel, an annotation per answer."""
    tasks = []
    for number, (question, given) in enumerate(zip(once(QUESTIONS), answers, strict=False)):
        annotations: list[dict[str, Any]] = [
            {
                "id": 7,
                "completed_by": 1,
                "was_cancelled": False,
                "result": [
                    {"from_name": "pixel", "type": "rectanglelabels", "value": {"x": 1.0}},
                    {"from_name": "answer", "type": "choices", "value": {"choices": [answer]}},
                ],
            }
            for answer in given
        ]
        data = {"plan": PLAN, **question._asdict(), "picture": "data:image/jpeg;base64,"}
        tasks.append({"id": number, "data": {**data, **changed}, "annotations": annotations})
    return json.dumps(tasks)


def picture(size: tuple[int, int] = (200, 100), kind: str = "JPEG") -> bytes:
    made = io.BytesIO()
    Image.new("RGB", size).save(made, kind)
    return made.getvalue()


def names_the_file(error: Exception, path: Path) -> None:
    """One line that begins with the file, and the place in it if one is at fault."""
    where = str(error).partition(": expected ")[0]
    assert re.fullmatch(rf"{re.escape(str(path))}(, (line|answer|task) \d+)?", where)
    complains(error, where)


# What is written


def test_the_table_has_a_line_for_each_pixel_and_no_answers(tmp_path: Path) -> None:
    write_questions_csv(tmp_path / "q.csv", PLAN, QUESTIONS, NAMES)
    with open(tmp_path / "q.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["plan", "number", "image", "row", "column", "label", "class", "answer"],
        [PLAN, "0", "a.png", "3", "4", "1", "sky", ""],
        [PLAN, "1", "ü, b.png", "0", "0", "2", 'a "building", old', ""],
        [PLAN, "3", "a.png", "4", "3", "0", "road", ""],
    ]


def test_a_table_filled_in_reads_and_a_pixel_drawn_twice_is_answered_twice(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    write_questions_csv(path, PLAN, QUESTIONS, NAMES)
    path.write_text(filled(path.read_text("utf-8"), ["yes", "", " No"]), encoding="utf-8")
    answers = read_answers(path, PLAN, QUESTIONS)
    assert answers == Answers(PLAN, {0: "yes", 2: "yes", 3: "no"}, None, path)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_table_of_a_spreadsheet_reads(tmp_path: Path, delimiter: str) -> None:
    text = io.StringIO()
    table = csv.writer(text, delimiter=delimiter, lineterminator="\r\n")
    table.writerow(["who", *reversed(entry(0, "")), "plan"])
    for number, answer in ((0, "yes"), (1, "unsure")):
        table.writerow(["Anna", *reversed(entry(number, answer).values()), PLAN])
    (tmp_path / "q.csv").write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode() + b"\r\n")
    assert read_answers(tmp_path / "q.csv", PLAN, QUESTIONS).answer == {
        0: "yes",
        1: "unsure",
        2: "yes",
    }


def test_tasks_for_label_studio_hold_the_picture_and_frame_the_pixel(tmp_path: Path) -> None:
    pictures = {0: picture(), 1: picture((81, 81), "PNG"), 3: picture()}
    write_label_studio(tmp_path / "tasks.json", PLAN, QUESTIONS, NAMES, pictures)
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    assert [task["data"]["number"] for task in tasks] == [0, 1, 3]
    assert {name: tasks[1]["data"][name] for name in Question._fields} == QUESTIONS[1]._asdict()
    kind, _, code = tasks[1]["data"]["picture"].partition(";base64,")
    assert (kind, base64.b64decode(code)) == ("data:image/png", pictures[1])

    (first,) = tasks[0]["predictions"][0]["result"]
    frame = first["value"]
    assert (first["original_width"], first["original_height"]) == (200, 100)
    middle = (frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2)
    assert middle == pytest.approx((25, 50))  # of the square on the left
    assert frame["height"] == pytest.approx(3 * 100 / CLOSE_UP)
    assert frame["rectanglelabels"] == ["sky"]


def test_the_labelling_configuration_names_what_the_tasks_use(tmp_path: Path) -> None:
    pictures = {number: picture() for number in range(4)}
    write_label_studio(tmp_path / "tasks.json", PLAN, QUESTIONS, ["x", "<&>", "x"], pictures)
    tree = ElementTree.parse(tmp_path / "tasks.xml")
    assert [each.get("value") for each in tree.iter("Choice")] == ["yes", "no", "unsure"]
    labels = [each.get("value") for each in tree.iter("Label")]
    assert labels == ["x (0)", "<&>", "x (2)"]
    for task in json.loads((tmp_path / "tasks.json").read_text()):
        assert task["predictions"][0]["result"][0]["value"]["rectanglelabels"][0] in labels


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with raises(ValueError, "write_label_studio", "a picture for every pixel, got none of 3"):
        write_label_studio(
            tmp_path / "t.json", PLAN, QUESTIONS, NAMES, {0: picture(), 1: picture()}
        )
    assert not list(tmp_path.iterdir())


# What is read


def test_answers_of_the_page(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(page(entry(0, "yes"), entry(2, "yes"), entry(3, "unsure"), entry(1, "")))
    answers = read_answers(path, PLAN, QUESTIONS)
    assert answers == Answers(PLAN, {0: "yes", 2: "yes", 3: "unsure"}, "Anna", path)
    path.write_text(page(who=None))
    assert read_answers(path, PLAN, QUESTIONS) == Answers(PLAN, {}, None, path)


def test_an_export_of_label_studio(tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    tasks = json.loads(export(["yes"], [], ["no", "no"]))
    skipped = json.loads(export(["no"]))[0]["annotations"][0]
    tasks[0]["annotations"].insert(0, {**skipped, "was_cancelled": True})
    path.write_text(json.dumps(tasks))
    assert read_answers(path, PLAN, QUESTIONS).answer == {0: "yes", 2: "yes", 3: "no"}


def test_a_short_export_of_label_studio(tmp_path: Path) -> None:
    rows = [{"plan": PLAN, "id": 5, "annotator": 1, **entry(n, a)} for n, a in ((0, "no"), (1, ""))]
    del rows[1]["answer"]
    (tmp_path / "min.json").write_text(json.dumps(rows))
    assert read_answers(tmp_path / "min.json", PLAN, QUESTIONS).answer == {0: "no", 2: "no"}


def test_a_table_exported_by_label_studio(tmp_path: Path) -> None:
    text = io.StringIO()
    table = csv.writer(text, quoting=csv.QUOTE_ALL)
    table.writerow(["picture", "plan", "annotator", *entry(0, "")])
    long = "data:image/jpeg;base64," + "A" * 150_000  # more than the reader takes for one field
    for number, answer in ((0, "no"), (3, "yes")):
        table.writerow([long, PLAN, 1, *entry(number, answer).values()])
    (tmp_path / "export.csv").write_text(text.getvalue())
    answers = read_answers(tmp_path / "export.csv", PLAN, QUESTIONS)
    assert answers.answer == {0: "no", 2: "no", 3: "yes"}


CSV_HEAD = "plan,number,image,row,column,label,class,answer\n"
WRONG: list[tuple[str, str]] = [
    (page(plan="other"), "expected answers for plan plan-1f2e, got answers for plan other"),
    (page(entry(0, "yes"), plan=None), "got answers for plan None"),
    (page(entry(0, "yes", number=4)), "answer 1: expected the number of a pixel .*, got 4"),
    (page(entry(0, "yes", number=-1)), "got -1"),
    (page(entry(0, "yes", number="")), "got nothing"),
    (page(entry(0, "yes", number=True)), "got True"),
    (page(entry(0, "yes", number=10**25)), "got 1000000000"),
    (page(entry(0, "yes", row=5)), "pixel 0 of the plan, a.png row 3 .*, got a.png row 5 column 4"),
    (page(entry(0, "yes", image="c.png")), "got c.png row 3"),
    (page(entry(0, "yes", label=2)), "got a.png row 3 column 4 class 2"),
    (page(entry(0, "yes"), entry(0, "no")), "one answer for pixel 0, got yes and no; decide"),
    (page(entry(0, "yes"), entry(2, "unsure")), "one answer for pixel 2, got yes and unsure"),
    (page(entry(0, "maybe")), "an answer among yes, no, unsure, got maybe; correct the word"),
    (page(entry(0, "yes", answer=1)), "got 1"),
    (page(entry(0, "yes", answer=["yes"])), "got \\['yes'\\]"),
    (json.dumps({"plan": PLAN, "answers": ["yes"]}), "answer 1: expected answers saved by"),
    (json.dumps({"answers": []}), "got JSON without plan and answers"),
    (json.dumps({"plan": PLAN, "answers": {}}), "got JSON without plan and answers"),
    (page(entry(0, "yes"))[:-20], "an unreadable one"),
    ("[" * 100_000, "an unreadable one"),
    (export(["yes"], ["no"])[:-30], "an unreadable one"),
    (export(["yes"], plan="other"), "task 1: expected answers for plan"),
    (export(["yes", "no"]), "task 1: expected one answer for pixel 0, got yes and no"),
    (export(["perhaps"]), "task 1: expected an answer among"),
    (json.dumps(["yes"]), "task 1: expected answers saved"),
    (json.dumps([{"data": [], "annotations": []}]), "task 1: expected answers saved"),
    (json.dumps([{**json.loads(export([]))[0], "annotations": [1]}]), "task 1: expected"),
    ("", "got a file without plan, number, image, row, column, label, answer"),
    ("no such file", "got a file without"),
    ("plan,number,answer\n", "got a file without image, row, column, label"),
    (f"{CSV_HEAD}{PLAN},0,a.png,3,4,1,sky,yes\n{PLAN},1,ü", "line 3: expected 8 columns, got 3"),
    (f"{CSV_HEAD}{PLAN},0,a.png,3,4,1,sky,ye", "line 2: expected an answer among .* got ye"),
    (f'{CSV_HEAD}{PLAN},0,"a.png', "an unreadable one"),
    (f"{CSV_HEAD}{PLAN},0,a.png,3,4.5,1,sky,yes\n", "got a.png row 3 column 4.5 class 1"),
    (f"{CSV_HEAD}other,0,a.png,3,4,1,sky,\n", "line 2: expected answers for plan plan-1f2e"),
]


@pytest.mark.parametrize(("text", "match"), WRONG, ids=range(len(WRONG)))
def test_what_does_not_belong_to_the_plan_is_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=match) as caught:
        read_answers(path, PLAN, QUESTIONS)
    names_the_file(caught.value, path)


def test_a_picture_is_no_answers_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(picture())
    with pytest.raises(ValueError, match="an unreadable one") as caught:
        read_answers(tmp_path / "a.json", PLAN, QUESTIONS)
    complains(caught.value, tmp_path / "a.json")


@pytest.mark.parametrize("kind", ["page", "export", "table"])
def test_whatever_byte_is_wrong_the_file_reads_or_is_refused_in_one_line(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "answers"
    table = f"{CSV_HEAD}{PLAN},0,a.png,3,4,1,sky,yes\n{PLAN},3,a.png,4,3,0,road,no\n"
    made = {"page": page(entry(0, "yes")), "export": export(["yes"]), "table": table}
    whole = made[kind].encode()
    refused = 0
    for place, flip in itertools.product(range(len(whole)), (1, 128)):
        damaged = bytearray(whole)
        damaged[place] ^= flip
        path.write_bytes(damaged)
        try:
            read_answers(path, PLAN, QUESTIONS)
        except ValueError as error:
            names_the_file(error, path)
            refused += 1
    assert refused > len(whole)


# Several people


def test_people_who_disagree_make_a_label_wrong() -> None:
    anna = Answers(PLAN, {0: "yes", 1: "yes", 3: "no"}, "Anna", Path("a"))
    ben = Answers(PLAN, {1: "unsure", 2: "unsure", 3: "no"}, None, Path("b"))
    cleo = Answers(PLAN, {0: "yes", 3: "yes"}, "Cleo", Path("c"))
    merged = merge_answers([anna, ben, cleo])
    expected = {0: "yes", 1: "no", 2: "unsure", 3: "no"}
    assert merged.answers == Answers(PLAN, expected, "Anna, Cleo", Path("a"))
    assert (merged.disagreements, merged.both) == ((1, 3), 3)
    assert merge_answers([anna]) == (anna, (), 0)


def test_answers_for_different_plans_are_not_merged() -> None:
    given = [Answers(plan, {}, None, Path(plan)) for plan in ("p", "q")]
    with raises(ValueError, "merge_answers", "answers for plan p, got q for q"):
        merge_answers(given)
    with raises(ValueError, "merge_answers", "expected answers, got none"):
        merge_answers([])
