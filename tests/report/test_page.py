"""The page for people: what it recommends, how it is read, and what its colours mean."""

from __future__ import annotations

import base64
import io
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support import folders
from tests.support.folders import DataSet

from cpseg.calibration.certificate import Certificate
from cpseg.core import colours
from cpseg.files.dataset import Source
from cpseg.report import overlays
from cpseg.report.commands import next_commands
from cpseg.report.findings import (
    RAW,
    Findings,
    Measured,
    Panel,
    Plan,
    Rule,
    certified_at,
    label_with,
)
from cpseg.report.gallery import legend, typical
from cpseg.report.markup import Group, Row, Shot, shots, table
from cpseg.report.measure import gather
from cpseg.report.overlays import Canvas
from cpseg.report.page import page
from cpseg.report.recommendation import Loss, loss_of_classes
from cpseg.report.wording import (
    advice,
    labels_to_show,
    losses_of_the_recommended,
    lost_classes,
    verdict,
)

ARGMAX = Rule(RAW, "argmax")
MAP = Rule("dirichlet map over probs", "labels")
VOID_TAGS = frozenset({"meta", "img", "br", "link"})


# Classes that are lost


def counts(*recall: float, kept: float = 1.0) -> torch.Tensor:
    """Truth by label, 1,000 pixels a class; what is not right is of the next class, or ignored."""
    k = len(recall)
    made = torch.zeros(k, k + 1, dtype=torch.int64)
    for truth, share in enumerate(recall):
        right = round(1000 * share)
        wrong = round((1000 - right) * kept)
        made[truth, truth] += right
        made[truth, (truth + 1) % k] += wrong
        made[truth, k] += 1000 - right - wrong
    return made


def measured(*recall: float, noise: float = 0.0, kept: float = 1.0) -> Measured:
    """The same in four folds, but for noise."""
    made = Measured()
    for sign in (1, -1, 1, -1):
        made.add(counts(*(share + sign * noise for share in recall), kept=kept))
    return made


@pytest.mark.parametrize(
    ("recall", "over", "lost", "erases"),
    [
        ([0.5, 0.5], [0.5, 0.5], (), False),
        ([0.25, 0.5], [0.5, 0.5], (), False),  # exactly half is not more than half
        ([0.24, 0.5], [0.5, 0.5], (0,), True),
        ([0.0, 0.5], [0.04, 0.5], (), False),  # a class that was not found cannot be lost
        ([0.0, 0.5], [0.05, 0.5], (0,), True),
        ([0.1] + [0.5] * 4, [0.5] * 5, (0,), False),  # one in five
        ([0.1] + [0.5] * 3, [0.5] * 4, (0,), True),  # one in four
        ([float("nan"), 0.5], [float("nan"), 0.5], (), False),
        ([0.9] + [0.1] * 9, [0.9] + [0.5] * 9, tuple(range(1, 10)), True),
    ],
)
def test_a_class_is_lost_with_more_than_half_of_its_recall(
    recall: list[float], over: list[float], lost: tuple[int, ...], erases: bool
) -> None:
    loss = loss_of_classes(recall, over=over)
    assert loss.classes == lost
    assert loss.erases is erases
    assert loss.found == sum(share >= 0.05 for share in over)


def test_recall_counts_pixels_without_a_label_as_wrong() -> None:
    made = measured(0.5, 0.25, kept=0.0)
    assert made.recall() == [0.5, 0.25]
    assert made.total().sum() == 8000


def test_a_rule_that_erases_classes_is_never_recommended() -> None:
    """Better in mIoU and error beyond noise, but one class of three is gone."""
    raw = measured(0.5, 0.5, 0.4, noise=0.01)
    erasing, whole = measured(0.99, 0.99, 0.15), measured(0.6, 0.6, 0.5)
    assert label_with({ARGMAX: raw, MAP: measured(0.99, 0.99, 0.25)}) == MAP
    assert label_with({ARGMAX: raw, MAP: erasing}) == ARGMAX
    other = Rule("trees map over probs", "labels")
    assert label_with({ARGMAX: raw, MAP: erasing, other: whole}) == other


def certified(*recall: float) -> Measured:
    made = measured(*recall, kept=0.0)
    proof = Certificate("ltt", "betting", 0.1, 0.1, True, 0.1, 45, 0.02, 0.5)
    made.certificates = [proof] * 4
    return made


def test_of_certified_rules_one_that_keeps_all_classes_is_taken() -> None:
    erasing, whole = Rule(RAW, "certified", None, 0.1), Rule("dirichlet", "certified", None, 0.1)
    rules = {ARGMAX: measured(0.9, 0.5), erasing: certified(0.9, 0.1)}
    assert certified_at(0.1, rules) == erasing, "nothing else there is"
    assert certified_at(0.1, {**rules, whole: certified(0.4, 0.5)}) == erasing, "both erase"
    assert certified_at(0.1, {**rules, whole: certified(0.45, 0.3)}) == whole
    assert certified_at(0.05, rules) is None


# A report on a tiny data set


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return folders.make(tmp_path_factory.mktemp("data"), count=6, sizes=((12, 15),), seed=4)


@pytest.fixture(scope="module")
def found(data: DataSet) -> Findings:
    plan = Plan(2, "0.3", folds=2, max_errors=("0.9",), context=(), samples=2, share=0.5)
    return gather(Source(data.root, data.probs), data.ids, plan)


@pytest.fixture(scope="module")
def text(data: DataSet, found: Findings) -> str:
    pytest.importorskip("matplotlib")
    lines = next_commands(found, Source(data.root, data.probs), data.ids)
    return page(found, root=data.root, commands=lines, made_by="cpseg report")


def planted_on(found: Findings, *recall: float, kept: float = 1.0) -> Measured:
    """The same counts in every part of the folds that ``found`` has."""
    made = Measured()
    for fold, parts in enumerate(found.rules[ARGMAX].parts):
        for _ in parts:
            made.add(counts(*recall, kept=kept), fold=fold)
    return made


def with_erasing_certificate(found: Findings) -> tuple[Findings, Rule]:
    """A certified rule for 90 % that keeps the first class alone."""
    rule = Rule(RAW, "certified", None, 0.9)
    proof = Certificate("ltt", "betting", 0.9, 0.1, True, 0.1, 45, 0.02, 0.5)
    planted = planted_on(found, 0.9, 0.01, 0.01, 0.01, kept=0.0)
    planted.certificates += [proof] * 2
    raw = planted_on(found, 0.9, 0.5, 0.5, 0.5)
    rules = {**found.rules, rule: planted, ARGMAX: raw}
    return replace(found, rules=rules, keep={0.9: rule}, label_with=ARGMAX), rule


def test_a_certified_rule_that_erases_classes_is_told_but_not_recommended(
    found: Findings, data: DataSet
) -> None:
    planted, rule = with_erasing_certificate(found)
    lost = lost_classes(planted, rule)
    assert lost == (
        "3 of the 4 classes that the raw argmax finds lose more than half of their right pixels: "
        "class 1, class 2, class 3."
    )
    assert labels_to_show(planted) != rule
    keeping = advice(planted)[1]
    assert lost.removesuffix(".") + ", and it is not recommended." in keeping
    assert "Without a certificate" in keeping
    text = page(planted, root=data.root)
    rows = next(t for t in re.findall(r"<table.*?</table>", text, re.S) if "All rules" in t)
    row = next(r for r in rows.split("<tr ") if "certified at 90 % error <" in r)
    assert lost in row
    assert "(recommended)" not in row
    # As it was before the classes were looked at, and with names.
    kept = replace(planted, rules={**planted.rules, rule: planted.rules[ARGMAX]})
    assert labels_to_show(kept) == rule
    named = replace(planted, plan=replace(planted.plan, names=("sky", "road", "tree", "car")))
    assert lost_classes(named, rule).endswith(": road, tree, car.")
    assert lost_classes(named, rule, most=2).endswith(": road, tree and 1 more.")


def test_every_constant_confidence_may_erase_classes_too(found: Findings) -> None:
    planted, rule = with_erasing_certificate(found)
    confident = {each: planted.rules[rule] for each in found.rules if each.kind == "confidence"}
    planted = replace(planted, rules={**planted.rules, **confident})
    assert labels_to_show(planted) == planted.label_with == ARGMAX
    assert "every constant confidence tried erases classes" in advice(planted)[1]


def test_a_recommended_rule_says_what_it_loses(found: Findings, data: DataSet) -> None:
    chosen = next(rule for rule in found.rules if rule.kind == "labels")
    planted, _ = with_erasing_certificate(found)
    lossy = planted_on(found, 0.9, 0.9, 0.9, 0.1)
    planted = replace(planted, rules={**planted.rules, chosen: lossy}, label_with=chosen)
    text = page(planted, root=data.root)
    card = re.findall(r'<section id="what-to-do".*?</section>', text, re.S)[0]
    said = "1 of the 4 classes that the raw argmax finds loses more than half of their right pixels"
    assert "What is lost:" in card
    assert said in card
    assert said in advice(planted)[0]
    alone = replace(planted, rules={r: planted.rules[r] for r in (ARGMAX, chosen)}, keep={})
    assert losses_of_the_recommended(alone) == lost_classes(alone, chosen)
    other = Rule("dirichlet map over probs, prior power 0.5", "labels")
    whole = planted_on(found, 0.95, 0.95, 0.95, 0.95)
    planted = replace(planted, rules={**planted.rules, other: whole})
    assert f"Without such a loss: a {other.scores}, mIoU 0." in advice(planted)[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "Label with the raw argmax: no other rule tried is a sure gain."),
        ({"label_with": MAP}, "Label with a dirichlet map over probs."),
        (
            {"label_with": Rule(RAW, "eq4", 2, 0.3)},
            "Label with eq. 4 at alpha 0.3, class 2 suppressed, raw scores.",
        ),
        (
            {"label_with": MAP, "student": 1, "sources": ("probs", "student")},
            "Train on the labelled images and on labels by a dirichlet map over probs.",
        ),
        (
            {
                "label_with": Rule("student as it is", "labels"),
                "student": 1,
                "sources": ("probs", "student"),
            },
            "Train on the labels alone: no pseudo-labels tried are a sure gain over the student's "
            "own.",
        ),
    ],
)
def test_the_verdict_is_one_sentence(
    found: Findings, changes: dict[str, object], said: str
) -> None:
    assert verdict(replace(found, **{"label_with": ARGMAX, **changes})) == said


def test_the_card_holds_the_figures_before_and_after(found: Findings, data: DataSet) -> None:
    chosen = next(rule for rule in found.rules if rule.kind == "labels")
    for rule in (ARGMAX, chosen):
        text = page(replace(found, label_with=rule), root=data.root)
        card = re.findall(r'<section id="what-to-do".*?</section>', text, re.S)[0]
        figures = re.findall(r"<strong>(.*?)</strong>", card.partition("</dl>")[0])
        rules = dict.fromkeys((ARGMAX, rule))
        errors = [f"{100 * found.rules[each].estimate('error').mean:.1f} %" for each in rules]
        mious = [f"{found.rules[each].estimate('miou_all').mean:.3f}" for each in rules]
        assert figures == [*errors, *mious]


# How it is read


class Reader(HTMLParser):
    """The elements of a page in order, with their attributes and the elements around them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.words: list[tuple[tuple[str, ...], str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs), tuple(self.stack)))
        if tag not in VOID_TAGS:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append((tuple(self.stack), data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.seen if name == tag]


def test_landmarks_headings_and_links(text: str) -> None:
    read = Reader(text)
    assert read.all("html") == [{"lang": "en"}]
    assert len(read.all("main")) == len(read.all("h1")) == len(read.all("header")) == 1
    assert [each["aria-label"] for each in read.all("nav")] == ["On this page"]
    levels = [int(tag[1]) for tag, *_ in read.seen if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    names = [attributes["id"] for _, attributes, _ in read.seen if "id" in attributes]
    assert len(set(names)) == len(names)
    for link in read.all("a"):
        assert (link["href"] or "").removeprefix("#") in names, link
    for part in read.all("section"):
        assert part["aria-labelledby"] in names


def test_nothing_is_fetched(text: str) -> None:
    read = Reader(text)
    assert not {tag for tag, *_ in read.seen} & {"script", "link", "iframe", "object", "style:src"}
    for tag, attributes, _ in read.seen:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "srcset", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/")), (tag, value)
    assert all(image["alt"] for image in read.all("img"))
    assert "url(" not in text
    assert "@import" not in text


def test_tables_can_be_read_aloud(text: str) -> None:
    for made in re.findall(r"<table.*?</table>", text, re.S):
        read = Reader(made)
        assert len(read.all("caption")) == 1
        for cell in read.all("th"):
            assert cell["scope"] in ("col", "row", "rowgroup")
        heads = re.findall(r"<th[^>]*>(.*?)</th>", made, re.S)
        assert all(head.strip() for head in heads)
        header, *rows = re.findall(r"<tr.*?</tr>", made, re.S)
        columns = header.count("<th")
        for row in rows:
            if 'class="group"' in row:
                assert f'colspan="{columns}"' in row
                continue
            assert row.count("<th") == 1
            assert row.count("<td") == columns - 1
        if "stacked" not in made:
            assert columns <= 5, "it must fit a phone as it is"


def test_the_recommended_row_is_marked_by_a_word(text: str) -> None:
    rows = re.findall(r'<tr role="row" class="best">.*?</tr>', text, re.S)
    assert rows
    assert all("(recommended)" in row for row in rows)


def test_rows_with_the_same_figures_are_one(text: str) -> None:
    for made in re.findall(r"<table[^>]*stacked.*?</table>", text, re.S):
        for body in re.findall(r"<tbody.*?</tbody>", made, re.S):
            rows = [
                "".join(re.findall(r"<td.*?</td>", row)) for row in re.findall("<tr.*?</tr>", body)
            ]
            rows = [row for row in rows if row]
            assert len(set(rows)) == len(rows)


def test_twins_are_named_in_the_row_that_stays(found: Findings, data: DataSet) -> None:
    plain, suppressed = Rule(RAW, "eq4", None, 0.3), Rule(RAW, "eq4", 2, 0.3)
    rules = {**found.rules, suppressed: found.rules[plain]}
    text = page(replace(found, rules=rules), root=data.root)
    assert "Same figures: eq. 4 at alpha 0.3, class 2 suppressed" in text


def test_a_table_escapes_what_it_holds() -> None:
    made = table("a & b", ("<x>", "y"), [Group("<g>", [Row(("<r>", '"v"'), mark="m<")])])
    assert "<x>" not in made
    assert "<g>" not in made
    assert "<r>" not in made
    assert "m&lt;" in made
    assert "a &amp; b" in made


def test_enlarged_pictures_lead_to_their_neighbours_and_back() -> None:
    read = Reader(
        shots("row", [Shot(f"p{n}", "data:image/png;base64,", f"p{n}") for n in range(3)])
    )
    links = [link["href"] for link in read.all("a")]
    assert links == [
        *("#row-1", "#row-3", "#row", "#row-2"),
        *("#row-2", "#row-1", "#row", "#row-3"),
        *("#row-3", "#row-2", "#row", "#row-1"),
    ]


# Contrast


def tokens(block: str) -> dict[str, str]:
    return dict(re.findall(r"--(\w+):\s*(#[0-9a-fA-F]+)", block))


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    value = np.array([int(digits[at : at + 2], 16) for at in (0, 2, 4)]) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_contrast_is_what_it_should_be_by_hand() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#2fa4e7", "#fff") == pytest.approx(2.77, abs=0.01)


@pytest.mark.parametrize("mode", ["light", "dark", "print"])
def test_text_can_be_read_in_every_mode(text: str, mode: str) -> None:
    style = re.findall(r"<style>(.*?)</style>", text, re.S)[0]
    light, dark, printed = re.findall(r":root \{(.*?)\}", style, re.S)
    assert "prefers-color-scheme: dark" in style.partition(dark)[0][-60:]
    assert "@media print" in style.partition(printed)[0][-30:]
    used = tokens(light) | {"light": {}, "dark": tokens(dark), "print": tokens(printed)}[mode]
    for paper in ("paper", "card", "mark"):
        for ink in ("ink", "soft", "link", "lost"):
            assert contrast(used[ink], used[paper]) >= 4.5, (ink, paper)
    for edge in ("go", "stay"):
        assert contrast(used[edge], used["card"]) >= 3, edge
    # No text has a colour that is not among these.
    for value in re.findall(r"[{;\s]color:\s*([^;}]+)", style):
        assert value.strip() in {f"var(--{name})" for name in ("ink", "soft", "link", "lost")}


# Colours and pictures


def pixels(source: str) -> np.ndarray:
    raw = base64.b64decode(source.partition(",")[2])
    return np.array(Image.open(io.BytesIO(raw)).convert("RGB"))


def test_the_palette_begins_with_okabe_and_ito_and_never_repeats() -> None:
    made = colours.class_colours(256)
    assert made.shape == (256, 3)
    assert made[:7].tolist()[::6] == [[230, 159, 0], [204, 121, 167]]
    assert len(np.unique(made, axis=0)) == 256
    assert colours.class_colours(3).tolist() == made[:3].tolist()


@pytest.mark.parametrize(("count", "apart"), [(7, 0.07), (12, 0.07), (21, 0.06), (64, 0.03)])
def test_classes_are_told_apart_by_every_kind_of_eye(count: int, apart: float) -> None:
    """The Okabe-Ito colours themselves are 0.076 apart for the eye that tells them apart worst."""
    lab = colours.seen(colours.class_colours(count))
    distance = np.linalg.norm(lab[:, :, None] - lab[:, None], axis=-1).min(0)
    assert (distance + np.eye(count)).min() >= apart


def test_no_class_is_grey() -> None:
    lab = colours.seen(colours.class_colours(256))[0]
    assert np.hypot(lab[:, 1], lab[:, 2]).min() > 0.03
    assert colours.seen(np.array([[128] * 3]))[0, 0, 1:] == pytest.approx([0, 0], abs=1e-3)


def test_without_red_or_green_cones_red_and_green_come_near() -> None:
    """The simulation does something, and to the right colours."""
    lab = colours.seen(np.array([[200, 60, 40], [110, 120, 30], [30, 60, 200]]))
    red_green = np.linalg.norm(lab[:, 0] - lab[:, 1], axis=-1)
    red_blue = np.linalg.norm(lab[:, 0] - lab[:, 2], axis=-1)
    assert red_green[1] < red_green[0] / 1.5
    assert red_green[2] < red_green[0] / 1.5
    assert (red_blue > 0.2).all()


def photograph(tmp_path: Path, size: tuple[int, int]) -> str:
    path = tmp_path / "photo.png"
    Image.fromarray(np.full((*size, 3), 100, np.uint8)).save(path)
    return str(path)


def test_labels_lie_over_the_photograph(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 255], [2, 2, 255]], np.uint8)
    canvas = Canvas.over(photograph(tmp_path, (2, 3)), labels.shape)
    assert canvas.photo is not None
    assert canvas.photo.shape == (16, 24, 3), "small ones are enlarged eight times at most"
    shown = overlays.overlay(canvas, labels, ignored=True, background=2)
    paint = colours.class_colours(2)
    for column, k in ((0, 0), (8, 1)):
        mixed = 0.45 * 100 + 0.55 * paint[k].astype(float)
        np.testing.assert_allclose(shown[0, column], mixed, atol=0.6)
    assert (shown[8:, :16] == 100).all(), "the background class is not painted"
    void = overlays.overlay(canvas, labels, ignored=False)[:, 16:]
    ignored = shown[:, 16:]
    assert {tuple(c) for c in void.reshape(-1, 3).tolist()} == {(95,) * 3, (185,) * 3}
    assert len({tuple(c) for c in ignored.reshape(-1, 3).tolist()}) == 2, "paper and dots"
    assert ignored.mean() > void.mean() + 20, "told apart by lightness, and by the pattern"
    assert (ignored == 40).all(-1).mean() < 0.2


def test_mistakes_are_red_and_void_is_none(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 255, 1]], np.uint8)
    truth = np.array([[0, 2, 0, 255]], np.uint8)
    canvas = Canvas.over(photograph(tmp_path, (1, 4)), labels.shape)
    shown = overlays.mistakes(canvas, labels, truth)
    assert (shown[:, :8] == 162).all()
    assert (shown[:, 8:16] == overlays.WRONG).all()
    assert not (shown[:, 16:] == overlays.WRONG).all(-1).any()


def test_large_images_are_shown_small(tmp_path: Path) -> None:
    canvas = Canvas.over(photograph(tmp_path, (1100, 730)), (1100, 730))
    assert canvas.photo is not None
    assert canvas.photo.shape == (480, 319, 3)
    labels = np.arange(1100 * 730).reshape(1100, 730) // (550 * 730)
    assert canvas.labels(labels).mean(1).round(2).tolist() == [0.0] * 240 + [1.0] * 240


def test_an_image_that_cannot_be_opened_leaves_white_paper(tmp_path: Path) -> None:
    canvas = Canvas.over(str(tmp_path / "none.png"), (4, 4))
    assert canvas.photo is None
    shown = overlays.overlay(canvas, np.zeros((4, 4), np.uint8), ignored=True)
    assert (shown == colours.class_colours(1)[0]).all()


def test_pictures_are_named_by_what_they_show(found: Findings, text: str) -> None:
    for number, panel in enumerate(found.panels, 1):
        row = re.findall(rf'<div class="shots[^"]*" id="image-{number}">.*?</div>', text, re.S)[0]
        titles = re.findall(r"<figcaption>(.*?)</figcaption>", row)
        assert titles[:2] == ["photograph", "raw argmax"]
        assert "truth" in titles
        assert titles[-1] == "mistakes"
        alts = [image["alt"] for image in Reader(row).all("img")]
        assert alts == [f"{panel.image}: {title}" for title in titles]


def test_the_picture_on_top_is_the_one_nearest_to_the_mean(found: Findings) -> None:
    truth = torch.zeros(2, 2, dtype=torch.uint8)
    wrong = [0, 1, 2, 4]
    panels = []
    for number, count in enumerate(wrong):
        labels = torch.zeros(4, dtype=torch.uint8)
        labels[:count] = 1
        panels.append(Panel(str(number), truth, {ARGMAX: labels.reshape(2, 2)}))
    rules = {**found.rules, ARGMAX: measured(0.55, 0.55, 0.55, 0.55)}
    planted = replace(found, panels=panels, rules=rules, label_with=ARGMAX)
    chosen = typical(planted)
    assert chosen is not None
    assert chosen.image == "2"
    unknown = Panel("void", torch.full((2, 2), 255, dtype=torch.uint8), panels[0].labels)
    assert typical(replace(planted, panels=[unknown])) is None


def test_the_legend_names_the_classes_on_show(found: Findings) -> None:
    labels = dict.fromkeys(found.panels[0].labels, torch.zeros(2, 2, dtype=torch.uint8))
    truth = torch.tensor([[0, 3], [255, 2]], dtype=torch.uint8)
    made = legend(found, [Panel("a", truth, labels)])
    assert re.findall("</span>(.*?)</li>", made) == ["class 0", "class 3"], "2 is not painted"


def test_many_classes_fold_the_rare_ones_away(found: Findings) -> None:
    labels = dict.fromkeys(found.panels[0].labels, torch.zeros(10, 10, dtype=torch.uint8))
    truth = torch.arange(100, dtype=torch.uint8).reshape(10, 10)
    planted = replace(found, num_classes=100)
    made = legend(planted, [Panel("a", truth, labels)])
    first, _, rest = made.partition("<details>")
    assert first.count("<li>") == 23, "24, of which one is the background"
    assert rest.count("<li>") == 76
    assert "class 0" in first


def test_other_commands_are_explained(text: str) -> None:
    assert "cpseg sweep with --folds 2 --seed 0 measures the raw scores on the same" in text
    assert "cpseg demo calibrates at alpha 0.1" in text
    assert "eq. 4 is shown at alpha 0.3" in text


def test_a_loss_of_nothing_erases_nothing() -> None:
    assert not Loss((), 0).erases
