"""Questions about drawn pixels and people's answers: CSV, tasks for Label Studio, JSON of the page.

A question may come up more than once in a draw with replacement. Whoever answers is asked once per
pixel; the answer counts for every question about it.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

from cpseg._internal import words
from cpseg._internal.checks import message
from cpseg._internal.safe_files import atomic, damaged, write_text

ANSWERS = words.AUDIT_ANSWERS
CLOSE_UP = 81  # pixels of the image across the close-up of a picture for Label Studio; odd
_FIELDS = ("plan", "number", "image", "row", "column", "label")
_COLUMNS = (*_FIELDS, "class", "answer")
_KINDS = "answers saved by the audit page, its CSV, or an export of Label Studio"
_FIX = "use the file as it was saved"


class Question(NamedTuple):
    """One drawn pixel: is ``label`` what the image shows there?

    ``number`` is the place in the draw, from 0. Two questions may be about the same pixel.
    """

    number: int
    image: str
    row: int
    column: int
    label: int

    @property
    def pixel(self) -> tuple[str, int, int]:
        """What two questions about the same pixel share."""
        return self.image, self.row, self.column


@dataclass(frozen=True)
class Answers:
    """What one person answered, or several together.

    Attributes:
        plan: fingerprint of the plan that drew the pixels.
        answer: a word of ``ANSWERS`` for each number that has one.
        who: the name of the person, if the file has one.
        path: the file; of several, the first.
    """

    plan: str
    answer: dict[int, str]
    who: str | None
    path: Path


class Merged(NamedTuple):
    """Answers of several people.

    ``disagreements`` are the numbers that got different answers, ``both`` is how many got more
    than one.
    """

    answers: Answers
    disagreements: tuple[int, ...]
    both: int


def once(questions: Sequence[Question]) -> list[Question]:
    """The first question about each pixel, in the order of the draw."""
    first: dict[tuple[str, int, int], Question] = {}
    for question in questions:
        first.setdefault(question.pixel, question)
    return list(first.values())


def class_name(names: Sequence[str], label: int) -> str:
    """The name of a class, or ``class 7`` where there is none."""
    return names[label] if 0 <= label < len(names) else f"class {label}"


def write_questions_csv(
    path: str | Path, plan: str, questions: Sequence[Question], class_names: Sequence[str] = ()
) -> None:
    """Write a table with one line per pixel and an empty column ``answer``, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    for question in once(questions):
        table.writerow((plan, *question, class_name(class_names, question.label), ""))
    write_text(path, text.getvalue())


def write_label_studio(
    path: str | Path,
    plan: str,
    questions: Sequence[Question],
    class_names: Sequence[str],
    pictures: Mapping[int, bytes],
) -> None:
    """Write tasks for Label Studio and, beside them as ``.xml``, its labelling configuration.

    Each task has its picture in it, so that Label Studio needs no access to the images. A rectangle
    around the pixel carries the proposed class in advance; the answer is left open.

    Args:
        path: the JSON file of the tasks.
        plan: fingerprint of the plan.
        questions: the drawn pixels.
        class_names: names by class index.
        pictures: JPEG or PNG by number, for the first question about each pixel. The leftmost
            square of a picture shows ``CLOSE_UP`` x ``CLOSE_UP`` pixels with the one in question
            in the middle.

    Raises:
        ValueError: a picture is missing.
        OSError: a file cannot be written.
    """
    asked = once(questions)
    missing = [question.number for question in asked if question.number not in pictures]
    if missing:
        expected, fix = "a picture for every pixel", "pass one by its number"
        raise ValueError(message("write_label_studio", expected, f"none of {missing[0]}", fix))
    tags = _tags(class_names, {question.label for question in asked})
    with atomic(path) as file:
        for place, question in enumerate(asked):
            task = _task(plan, question, tags[question.label], pictures[question.number])
            file.write((",\n" if place else "[\n").encode() + json.dumps(task).encode())
        file.write(b"\n]\n" if asked else b"[]\n")
    write_text(Path(path).with_suffix(".xml"), _labelling(tags))


def _tags(class_names: Sequence[str], labels: set[int]) -> dict[int, str]:
    """A name for each class that occurs, no two alike: Label Studio knows classes by name."""
    tags = {label: class_name(class_names, label) for label in sorted(labels)}
    names = list(tags.values())
    return {k: name if names.count(name) == 1 else f"{name} ({k})" for k, name in tags.items()}


def _task(plan: str, question: Question, tag: str, picture: bytes) -> dict[str, Any]:
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as opened:
        kind, (width, height) = Image.MIME[str(opened.format)], opened.size
    side = 100 * 3 / CLOSE_UP  # around the pixel, in percent of the close-up; the line hides none
    frame = {
        "id": f"pixel-{question.number}",
        "type": "rectanglelabels",
        "from_name": "pixel",
        "to_name": "picture",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": {
            "x": (50 - side / 2) * height / width,
            "y": 50 - side / 2,
            "width": side * height / width,
            "height": side,
            "rotation": 0,
            "rectanglelabels": [tag],
        },
    }
    data = dict(zip(_FIELDS, (plan, *question), strict=True))
    data |= {
        "class": tag,
        "picture": f"data:{kind};base64,{base64.b64encode(picture).decode()}",
    }
    return {"data": data, "predictions": [{"model_version": f"plan {plan}", "result": [frame]}]}


def _labelling(tags: Mapping[int, str]) -> str:
    labels = "\n".join(f"    <Label value={quoteattr(tag)}/>" for tag in tags.values())
    return f"""<View>
  <Header value="Is the framed pixel: $class?"/>
  <Image name="picture" value="$picture" zoom="true" zoomControl="true"/>
  <Choices name="answer" toName="picture" choice="single" required="true" showInline="true">
    <Choice value="yes" hotkey="y"/>
    <Choice value="no" hotkey="n"/>
    <Choice value="unsure" hotkey="u"/>
  </Choices>
  <RectangleLabels name="pixel" toName="picture" opacity="0" strokeWidth="1" canRotate="false">
{labels}
  </RectangleLabels>
</View>
"""


def read_answers(path: str | Path, plan: str, questions: Sequence[Question]) -> Answers:
    """The answers in a file of the audit page, a CSV, or an export of Label Studio.

    What is empty is not answered. An answer counts for every question about its pixel.

    Args:
        path: the file; its contents say which of them it is.
        plan: fingerprint of the plan that the answers must belong to.
        questions: the questions of that plan.

    Raises:
        ValueError: another kind of file or a damaged one, another plan, a pixel that is not in the
            plan, a pixel answered twice and differently, an answer that is not in ``ANSWERS``.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise damaged(path, _KINDS, error) from error
    who = None
    rows: Iterator[tuple[str, Mapping[str, Any]]]
    if text.lstrip()[:1] in ("{", "["):
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise damaged(path, _KINDS, error) from error
        if isinstance(content, dict):
            who = content.get("who")
            rows = _rows_of_page(path, content)
        else:
            rows = _rows_of_label_studio(path, content)
    else:
        rows = _rows_of_csv(path, text)
    answer = _check(path, rows, plan, questions)
    return Answers(plan, answer, who.strip() or None if isinstance(who, str) else None, path)


def _rows_of_page(
    path: Path, content: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    entries = content.get("answers")
    if "plan" not in content or not isinstance(entries, list):
        got = "JSON without plan and answers"
        raise ValueError(message(str(path), _KINDS, got, _FIX))
    yield "", {"plan": content["plan"]}  # checked where nothing is answered too
    for place, entry in enumerate(entries, start=1):
        where = f"answer {place}"
        if not isinstance(entry, dict):
            raise _malformed(path, where, entry)
        yield where, {**entry, "plan": content["plan"]}


def _rows_of_label_studio(
    path: Path, content: Sequence[Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """One row per annotation; a task of the short export (JSON-MIN) is a row by itself."""
    for place, task in enumerate(content, start=1):
        where = f"task {place}"
        if not isinstance(task, dict):
            raise _malformed(path, where, task)
        if "data" not in task:
            answer = task.get("answer", "")
            yield where, {**task, "answer": answer}
            continue
        data, annotations = task["data"], task.get("annotations", [])
        if not isinstance(data, dict) or not isinstance(annotations, list):
            raise _malformed(path, where, data)
        yield where, {**data, "answer": ""}
        for annotation in annotations:
            try:
                if annotation.get("was_cancelled"):
                    continue
                given = [
                    choice
                    for result in annotation["result"]
                    if result.get("from_name") == "answer"
                    for choice in result["value"]["choices"]
                ]
            except (AttributeError, KeyError, TypeError) as error:
                raise _malformed(path, where, annotation) from error
            for choice in given:
                yield where, {**data, "answer": choice}


def _rows_of_csv(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    text = re.sub(r'data:image/[^"]*', "", text)  # pictures in a CSV export of Label Studio
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)  # spreadsheets of some countries write semicolons
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [name.strip() for name in next(table, [])]
        lacking = [name for name in (*_FIELDS, "answer") if name not in columns]
        if lacking:
            got = f"a file without {', '.join(lacking)}"
            raise ValueError(message(str(path), _KINDS, got, _FIX))
        for row in table:
            where = f"line {table.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(columns):
                expected, got = f"{len(columns)} columns", str(len(row))
                raise ValueError(message(f"{path}, {where}", expected, got, _FIX))
            yield where, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise damaged(path, _KINDS, error) from error


def _check(
    path: Path,
    rows: Iterator[tuple[str, Mapping[str, Any]]],
    plan: str,
    questions: Sequence[Question],
) -> dict[int, str]:
    """The answers by number, each row compared with the question that it claims to answer."""
    by_number = {question.number: question for question in questions}
    given: dict[tuple[str, int, int], str] = {}
    for place, row in rows:
        where = f"{path}, {place}" if place else str(path)
        if str(row.get("plan")).strip() != plan:
            got = f"answers for plan {_short(row.get('plan'))}"
            fix = "pass the answers that belong to this plan"
            raise ValueError(message(where, f"answers for plan {plan}", got, fix))
        if not place:
            continue
        number = _whole(row.get("number"))
        question = None if number is None else by_number.get(number)
        if question is None:
            expected = "the number of a pixel of the plan"
            got = _short(row.get("number"))
            raise ValueError(message(where, expected, got, _FIX))
        names = ("row", "column", "label")
        position = (row.get("image"), *(_whole(row.get(name)) for name in names))
        if position != question[1:]:
            expected = f"pixel {question.number} of the plan, {_place(question[1:])}"
            got = _place([row.get(name) for name in ("image", *names)])
            raise ValueError(message(where, expected, got, _FIX))
        word = row.get("answer")
        word = "" if word is None else word.strip().lower() if isinstance(word, str) else word
        if word == "":
            continue
        if word not in ANSWERS:
            expected, got = f"an answer among {', '.join(ANSWERS)}", _short(row.get("answer"))
            raise ValueError(message(where, expected, got, "correct the word, or leave it empty"))
        before = given.setdefault(question.pixel, word)
        if before != word:
            expected = f"one answer for pixel {question.number}"
            fix = "decide for one; answers of two people go into two files"
            raise ValueError(message(where, expected, f"{before} and {word}", fix))
    return {
        question.number: given[question.pixel] for question in questions if question.pixel in given
    }


def _malformed(path: Path, where: str, got: object) -> ValueError:
    return ValueError(message(f"{path}, {where}", _KINDS, _short(got), _FIX))


def _whole(value: object) -> int | None:
    """A whole number from JSON or a cell of a table."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    text = str(value).strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _place(position: Sequence[object]) -> str:
    image, row, column, label = map(_short, position)
    return f"{image} row {row} column {column} class {label}"


def _short(value: object) -> str:
    return " ".join(str(value).split())[:80] or "nothing"


def merge_answers(given: Sequence[Answers]) -> Merged:
    """The answers of several people as one; where two differ the label counts as wrong.

    Args:
        given: one ``Answers`` per person, all for the same plan.

    Returns:
        The merged answers, the numbers on which people disagree, and how many questions more than
        one person answered.

    Raises:
        ValueError: no answers, or answers for different plans.

    Example:
        >>> anna = Answers("p", {0: "yes", 1: "yes"}, "Anna", Path("a.json"))
        >>> ben = Answers("p", {1: "unsure", 2: "no"}, "Ben", Path("b.json"))
        >>> merged = merge_answers([anna, ben])
        >>> merged.answers.answer, merged.disagreements, merged.both
        ({0: 'yes', 1: 'no', 2: 'no'}, (1,), 1)
    """
    if not given:
        fix = "pass the answers of one person or more"
        raise ValueError(message("merge_answers", "answers", "none", fix))
    for other in given:
        if other.plan != given[0].plan:
            expected, got = f"answers for plan {given[0].plan}", f"{other.path} for {other.plan}"
            fix = "merge answers for one plan"
            raise ValueError(message("merge_answers", expected, got, fix))
    words: dict[int, list[str]] = {}
    for person in given:
        for number, word in person.answer.items():
            words.setdefault(number, []).append(word)
    merged = {n: each[0] if len({*each}) == 1 else "no" for n, each in sorted(words.items())}
    names = ", ".join(person.who for person in given if person.who) or None
    return Merged(
        Answers(given[0].plan, merged, names, given[0].path),
        tuple(number for number, each in sorted(words.items()) if len({*each}) > 1),
        sum(len(each) > 1 for each in words.values()),
    )
