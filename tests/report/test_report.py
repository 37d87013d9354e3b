"""The report: its decisions on planted cases, its figures against loops, the page as a file."""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import re
import shlex
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support import folders, oracles
from tests.support.folders import DataSet, command, complains, done, files, refused

from cpseg import Calibrator, Certifier, Recalibrator, groups
from cpseg.files.dataset import Source
from cpseg.files.id_lists import read_ids
from cpseg.jobs.sweep import sweep
from cpseg.report.findings import RAW, Findings, Measured, Plan, Rule, scores_in_words
from cpseg.report.measure import deal, gather
from cpseg.report.page import page, report
from cpseg.report.recommendation import (
    Candidate,
    Certified,
    better,
    choose_certified,
    paired,
    recommend,
)
from cpseg.report.wording import advice, labels_to_show

Capture = pytest.CaptureFixture[str]
ARGMAX = Rule(RAW, "argmax")
PLAN = Plan(2, "0.3", folds=3, seed=5, max_errors=("0.9",), share=0.5, samples=3)
SECTIONS = (
    "What to do",
    "Commands",
    "In words",
    "Labels for a student",
    "Classes",
    "Images",
    "Rules",
    "Error against the share kept",
    "Reliability of the scores",
    "Thresholds",
    "How this was made",
)

# Decisions


def candidate(name: str, miou: float, error: float, *noise: float) -> Candidate:
    """Figures of four folds, the noise of its own added to what makes the folds differ."""
    folds = (0.05, -0.03, 0.02, -0.04)
    own = noise or (0.0, 0.0, 0.0, 0.0)
    return Candidate(
        name,
        [miou + fold + each for fold, each in zip(folds, own, strict=True)],
        [error - fold - each for fold, each in zip(folds, own, strict=True)],
    )


BASE = candidate("raw", 0.4, 0.3)
NOISE = (0.02, -0.02, 0.01, -0.01)


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ([], 0),
        ([candidate("same", 0.4, 0.3)], 0),
        ([candidate("suppressed", 0.5, 0.2, *NOISE)], 1),
        ([candidate("worse", 0.3, 0.4, *NOISE)], 0),
        ([candidate("recalibrated", 0.45, 0.2, *NOISE)], 1),
        ([candidate("suppressed", 0.45, 0.25), candidate("recalibrated", 0.6, 0.1, *NOISE)], 2),
        ([candidate("recalibrated", 0.6, 0.1, *NOISE), candidate("eq. 4 too", 0.6, 0.1)], 1),
        # A gain of 0.005 with a standard error of 0.009, and one beyond it.
        ([candidate("within noise", 0.405, 0.3, *NOISE)], 0),
        ([candidate("beyond it", 0.41, 0.3, *NOISE)], 1),
        # Better in mIoU and worse in error beyond a standard error, or within it.
        ([candidate("floods", 0.5, 0.32, *NOISE)], 0),
        ([candidate("hardly worse", 0.5, 0.305, *NOISE)], 1),
        # Every step loses less than a standard error in pixels, all together more than one.
        (
            [
                candidate("a step", 0.45, 0.308, *NOISE),
                candidate("and another", 0.5, 0.316, *(-each for each in NOISE)),
            ],
            1,
        ),
    ],
    ids=lambda value: ",".join(c.name for c in value) or "none" if isinstance(value, list) else "",
)
def test_a_change_needs_a_gain_beyond_noise(others: list[Candidate], chosen: int) -> None:
    assert recommend([BASE, *others]) == chosen


def test_what_makes_a_fold_hard_for_both_is_no_noise() -> None:
    """Folds differ by 0.09; the gain of 0.02 is the same in all of them."""
    steady = candidate("steady", 0.42, 0.28)
    assert better(steady, BASE)
    unpaired = candidate("unpaired", 0.42, 0.28, -0.09, 0.05, -0.06, 0.1)
    assert np.mean(unpaired.miou) == pytest.approx(np.mean(steady.miou))
    assert not better(unpaired, BASE)


def test_one_fold_is_no_evidence() -> None:
    one = Candidate("raw", (0.3,), (0.4,)), Candidate("far better", (0.9,), (0.1,))
    assert recommend(one) == 0
    assert math.isnan(paired((0.9,), over=(0.3,)).se)


def test_noise_is_that_of_a_jackknife_over_parts_of_the_images() -> None:
    rng = np.random.default_rng(0)
    parts = rng.integers(1, 50, (3, 4, 3, 4))  # folds, parts, K, K + 1
    measured = Measured()
    for fold in range(3):
        for part in parts[fold]:
            measured.add(torch.from_numpy(part), fold=fold)
    for name in ("miou_all", "error"):
        found = paired(measured.pseudo_values(name), over=[0.0] * 12)
        assert found.mean == pytest.approx(np.mean(measured.values(name)))
        without = []
        for left in itertools.product(range(3), range(4)):
            figures = []
            for fold in range(3):
                kept = [parts[fold, k] for k in range(4) if (fold, k) != left]
                sums = np.sum(kept, 0)
                right = np.diag(sums)
                if name == "error":
                    figures.append(1 - right.sum() / sums.sum())
                else:
                    union = sums.sum(1) + sums[:, :3].sum(0) - right
                    figures.append(np.mean(right / union))
            without.append(np.mean(figures))
        spread = np.sqrt(11 / 12 * np.sum((np.array(without) - np.mean(without)) ** 2))
        assert found.se == pytest.approx(spread)


def test_with_one_part_a_fold_noise_is_that_of_the_folds() -> None:
    measured = Measured()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        measured.add(torch.randint(1, 50, (3, 4), generator=generator))
    for name in ("miou_all", "error"):
        values = measured.values(name)
        found = paired(measured.pseudo_values(name), over=[0.0] * 4)
        assert found.mean == pytest.approx(np.mean(values))
        assert found.se == pytest.approx(np.std(values, ddof=1) / 2)


def test_figures_of_other_folds_are_not_paired() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired((0.1, 0.2), over=(0.1,))


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        ([], None),
        ([Certified("a", (True, False), (0.5, 0.0))], None),
        ([Certified("a", (False, True), (0.0, 0.9)), Certified("b", (True, True), (0.1, 0.2))], 1),
        ([Certified("a", (True, True), (0.5, 0.4)), Certified("b", (True, True), (0.5, 0.4))], 0),
        ([Certified("a", (True, True), (0.5, 0.4)), Certified("b", (True, True), (0.7, 0.5))], 1),
        ([Certified("a", (True, True), (0.5, 0.4)), Certified("b", (True, True), (0.8, 0.3))], 0),
        ([Certified("a", (True, True), (0.5, 0.4)), Certified("b", (True, False), (0.9, 0.9))], 0),
    ],
)
def test_the_certified_rule_is_that_of_every_fold_that_keeps_more(
    candidates: list[Certified], chosen: int | None
) -> None:
    assert choose_certified(candidates) == chosen


# Figures


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    root = tmp_path_factory.mktemp("data")
    return folders.make(root, count=9, sizes=((6, 9), (8, 7)))


@pytest.fixture(scope="module")
def found(data: DataSet) -> Findings:
    return gather(Source(data.root, data.probs), data.ids, PLAN)


def tensors(data: DataSet, image: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(data.scores[image]), torch.from_numpy(data.labels[image])


def dealt(data: DataSet) -> list[tuple[list[str], list[str], list[str]]]:
    """For every fold the images that refit, that calibrate, that measure."""
    generator = torch.Generator().manual_seed(PLAN.seed)
    order = torch.randperm(len(data.images), generator=generator).tolist()
    parts = []
    for fold in range(PLAN.folds):
        testing = order[fold :: PLAN.folds]
        training = [number for number in order if number not in testing]
        drawn = torch.randperm(len(training), generator=generator).tolist()
        fitting = [training[place] for place in drawn[: round(PLAN.share * len(training))]]
        proving = [number for number in training if number not in fitting]
        parts.append([[data.images[n] for n in sorted(p)] for p in (fitting, proving, testing)])
    return parts


def confusion(data: DataSet, testing: list[str], chosen: dict[str, np.ndarray]) -> list[list[int]]:
    """Truth by label, the last column for pixels without one, pixel by pixel."""
    counts = np.zeros((4, 5), int)
    for image in testing:
        for label, truth in zip(chosen[image].ravel(), data.labels[image].ravel(), strict=True):
            if truth != 255:
                counts[truth, min(label, 4)] += 1
    return counts.tolist()


def test_nothing_is_measured_on_images_that_made_it(data: DataSet) -> None:
    """Parts by hand are disjoint, each image measures once, and `deal` deals just so."""
    parts = dealt(data)
    for fitting, proving, testing in parts:
        assert not {*fitting} & {*proving}
        assert not {*fitting, *proving} & {*testing}
        assert len(fitting) + len(proving) + len(testing) == len(data.images)
    assert sorted(image for *_, testing in parts for image in testing) == data.images
    ours = deal(read_ids(data.ids), PLAN)
    assert [[[pair.image for pair in part] for part in fold[1:]] for fold in ours] == parts
    assert not any(fold.learning for fold in ours)


def test_every_rule_is_what_its_parts_make_of_the_rest(data: DataSet, found: Findings) -> None:
    """Refitted, calibrated and certified by hand, labelled by loops, counted by loops."""
    assert found.used == [(3, 3, 3)] * 3
    for number, (fitting, proving, testing) in enumerate(dealt(data)):
        recalibrator = Recalibrator(4, context="auto", seed=PLAN.seed)
        for image in fitting:
            recalibrator.update(*tensors(data, image))
        refit = recalibrator.fit()
        for name, apply in ((RAW, lambda p: p), ("dirichlet", refit)):
            scores = {i: apply(tensors(data, i)[0]).numpy() for i in data.images}
            images = proving if name != RAW else [*fitting, *proving]
            known = [(scores[i], data.labels[i]) for i in images]
            cells = np.arange(54).reshape(6, 9)
            limit = oracles.calibrate(known, cells, PLAN.alpha)[0]
            for rule in [rule for rule in found.rules if rule.scores == name]:
                chosen = {}
                for image in testing:
                    p = scores[image]
                    if rule.kind == "argmax":
                        chosen[image] = p.argmax(0)
                    elif rule.kind == "confidence":
                        chosen[image] = oracles.select(p, np.float32(1 - rule.level), None)
                    elif rule.kind == "eq4" and rule.level == 0.3:
                        here = oracles.image_from_grid(limit, p.shape[1:])
                        chosen[image] = oracles.select(p, here, rule.background)
                if rule.kind == "certified":
                    setting = Calibrator(
                        groups.image((6, 9)), alpha=0.995, num_classes=4, background=rule.background
                    )
                    for image in fitting:
                        labels = tensors(data, image)[1]
                        setting.update(torch.from_numpy(scores[image]), labels, ids=image)
                    certifier = Certifier(setting, max_error=0.9, delta="0.1", seed=PLAN.seed)
                    for image in fitting:
                        labels = tensors(data, image)[1]
                        certifier.learn_order(torch.from_numpy(scores[image]), labels, ids=image)
                    for image in proving:
                        labels = tensors(data, image)[1]
                        certifier.update(torch.from_numpy(scores[image]), labels, ids=image)
                    made = certifier.compute()
                    assert found.rules[rule].certificates[number] == made.certificate
                    for image in testing:
                        chosen[image] = made.pseudo_labels(torch.from_numpy(scores[image])).numpy()
                if chosen:
                    counted = found.rules[rule].confusion[number].tolist()
                    assert counted == confusion(data, testing, chosen), rule.name


def test_rules_on_raw_scores_are_those_of_the_sweep(data: DataSet, found: Findings) -> None:
    rows = sweep(
        Source(data.root, data.probs),
        data.ids,
        backgrounds=[None, 2],
        variants=["pixel"],
        alphas=["0.5", "0.3", "0.05"],
        folds=PLAN.folds,
        seed=PLAN.seed,
    )
    for row in rows:
        rule = ARGMAX if row.alpha is None else Rule(RAW, "eq4", row.background, row.alpha)
        for name in ("miou_all", "miou_kept", "kept", "wrong", "coverage"):
            assert str(found.rules[rule].estimate(name)) == str(getattr(row, name))
    assert found.rules[Rule(RAW, "eq4", 2, 0.05)].infinite == [1, 1, 1]


def test_error_counts_every_pixel_that_is_not_right(found: Findings) -> None:
    for measured in found.rules.values():
        for error, matrix in zip(measured.values("error"), measured.confusion, strict=True):
            assert error == pytest.approx(1 - np.trace(matrix[:, :4]) / matrix.sum().item())


def test_curves_end_at_the_error_of_the_argmax(found: Findings) -> None:
    for name, folds in found.reliability.items():
        ends = [float(fold.error_at(torch.ones(1))) for fold in folds]
        assert ends == pytest.approx(found.rules[Rule(name, "argmax")].values("wrong"))


def test_images_of_a_class_and_the_calibration_are_of_all_images(
    data: DataSet, found: Findings
) -> None:
    assert found.images == 9
    assert found.images_of_class.tolist() == [
        sum((labels == k).any() for labels in data.labels.values()) for k in range(4)
    ]
    assert found.calibration.num_images == 9
    known = [(data.scores[image], data.labels[image]) for image in data.images]
    limit = oracles.calibrate(known, np.arange(54).reshape(6, 9), PLAN.alpha)[0]
    np.testing.assert_array_equal(found.calibration.threshold.numpy(), limit)


def planted(tmp_path: Path, *, shifted: bool) -> DataSet:
    """Scores that take every class for the next one, or that are as they should be."""
    data = folders.make(tmp_path, count=12, sizes=((12, 15),), seed=1)
    for image in data.images if shifted else []:
        data.scores[image] = np.roll(data.scores[image], 1, axis=0)
        np.save(data.score_file(image), data.scores[image])
    return data


def test_recalibration_is_recommended_where_it_mends_the_scores(tmp_path: Path) -> None:
    data = planted(tmp_path, shifted=True)
    plan = Plan(None, "0.3", folds=3, samples=0)
    found = gather(Source(data.root, data.probs), data.ids, plan)
    assert found.label_with == Rule("dirichlet map over probs", "labels")
    assert found.rules[ARGMAX].estimate("error").mean > 0.7
    assert found.rules[found.label_with].estimate("error").mean < 0.4
    assert "use labels: dirichlet map over probs" in advice(found)[0]
    assert "Whether a student gains by these labels is not known" in advice(found)[0]
    cautious = advice(replace(found, label_with=ARGMAX))[0]
    assert "stay with the raw argmax" in cautious
    assert "If pixels matter more than rare classes: labels: dirichlet map" in cautious


def test_raw_argmax_stays_where_nothing_is_to_be_mended(tmp_path: Path) -> None:
    data = planted(tmp_path, shifted=False)
    plan = Plan(0, "0.3", folds=3, samples=0, methods=(RAW, "temperature"))
    found = gather(Source(data.root, data.probs), data.ids, plan)
    assert found.label_with == ARGMAX
    text = " ".join(advice(found))
    assert "stay with the raw argmax" in text
    assert "If pixels matter" not in text
    assert f"Promised by eq. 4: {found.calibration.guarantee()}." in text
    assert "at least 50 images" in text
    assert "Guaranteed: nothing about the labels" in text


def test_suppression_is_recommended_where_objects_are_lost(tmp_path: Path) -> None:
    """A background whose score is pushed over every object's."""
    data = folders.make(tmp_path, count=12, sizes=((12, 15),), seed=2)
    for image in data.images:
        scores, truth = data.scores[image], data.labels[image]
        loses = (truth != 0) & (truth != 255) & (scores.argmax(0) == truth)
        scores *= 0.45 / scores.max(0)
        scores[0] = np.where(loses, 0.5, np.where(truth == 0, 0.9, scores[0]))
        scores[1:] = np.where((truth == 0)[None], 0.02, scores[1:])
        np.save(data.score_file(image), scores)
    plan = Plan(0, "0.3", variant="image", folds=3, samples=0, methods=(RAW,))
    found = gather(Source(data.root, data.probs), data.ids, plan)
    assert found.label_with[:3] == (RAW, "eq4", 0)


# The page


class Reader(HTMLParser):
    """Checks that elements close in order; keeps what a test asks for."""

    void = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.images: list[dict[str, str | None]] = []
        self.headings: list[str] = []
        self.commands: list[str] = []
        self.rows: list[list[str]] = []
        self.group = ""  # the title of a table's rows
        self.grouped: dict[tuple[str, str], list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.void:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.headings.append("")
        if tag == "code" and self.open[-2:] == ["pre", "code"]:
            self.commands.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "tr":
            title, *cells = self.rows[-1]
            if not cells:
                self.group = title
            self.grouped[self.group, title.strip()] = cells
        if tag == "table":
            self.group = ""

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "h2":
            self.headings[-1] += data
        if "code" in self.open and "pre" in self.open:
            self.commands[-1] += data


@pytest.fixture(scope="module")
def text(data: DataSet, found: Findings) -> str:
    return page(found, root=data.root, made_by="cpseg report --root <somewhere>")


def test_the_page_is_whole_and_needs_nothing_else(text: str) -> None:
    read = Reader(text)
    assert tuple(read.headings) == SECTIONS
    assert not read.tags & {"script", "link", "iframe", "object"}
    bare = re.sub(r'src="data:[^"]*"', "", text)
    for word in ("http", "<script", "url(", "@import", "@font-face", "None"):
        assert word not in bare, word
    assert not re.search(r"\bnan\b", bare)
    assert all(image["alt"] for image in read.images)
    assert all((image["src"] or "").startswith("data:image/") for image in read.images)
    assert '<meta name="viewport"' in text
    assert "@media print" in text
    assert "--root &lt;somewhere&gt;" in text


def test_every_picture_can_be_opened(text: str) -> None:
    sources = [image["src"] or "" for image in Reader(text).images]
    # Two diagrams, curves, thresholds and counts; 3 panels of 4 to 6 pictures, the first of 3 or 4.
    assert sum("svg" in source[:20] for source in sources) == 5
    assert 3 * 4 + 3 <= len(sources) - 5 <= 3 * 6 + 4
    for source in sources:
        kind, _, content = source.partition(";base64,")
        raw = base64.b64decode(content, validate=True)
        if "svg" in kind:
            assert b"<script" not in raw
            assert not re.search(rb'href="(?!#|data:)', raw)
        else:
            Image.open(io.BytesIO(raw)).load()


def test_the_same_findings_give_the_same_bytes(data: DataSet, text: str) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "axes.labelsize": 30}):  # a user's own settings
        again = gather(Source(data.root, data.probs), data.ids, PLAN)
        assert page(again, root=data.root, made_by="cpseg report --root <somewhere>") == text
        assert matplotlib.rcParams["font.size"] == 30


def test_tables_hold_the_figures(found: Findings, text: str) -> None:
    rows = Reader(text).grouped
    for rule, measured in found.rules.items():
        if rule.kind in ("argmax", "certified"):
            title = "raw argmax" if rule == ARGMAX else rule.choice
            value, se, _ = measured.estimate("error")
            cells = rows.get((scores_in_words(rule.scores), title))
            if cells is None:  # named in the row of a rule with the same figures
                assert title in text
                assert f"Same figures: {title}" in text
                continue
            assert cells[2] == f"{100 * value:.1f} ± {100 * se:.1f} %"
    raw = torch.stack(found.rules[ARGMAX].confusion).sum(0)
    recalls, precisions = (
        {row[0]: row[1:] for row in table}
        for table in (
            [row for row in Reader(part).rows if row[0].startswith("class ")]
            for part in re.findall(r"<table.*?</table>", section(text, "classes"), re.S)
        )
    )
    for k in range(4):
        cells = recalls[f"class {k}"]
        assert cells[0] == str(int(found.images_of_class[k]))
        assert cells[1] == f"{100 * raw[k, k] / raw[k].sum():.1f} %"
        cells = precisions[f"class {k}"]
        assert cells[0] == str(int(raw[k].sum()))
        assert cells[1] == f"{100 * raw[k, k] / raw[:, k].sum():.1f} %"
        kept = labels_to_show(found)
        if kept not in (ARGMAX, found.label_with):
            counts = torch.stack(found.rules[kept].confusion).sum(0)
            assert cells[-1] == f"{100 * (1 - counts[k, 4] / counts[k].sum()):.1f} %"
    halves = [float(f.error_at(torch.tensor([0.5]))) for f in found.reliability[RAW]]
    assert rows["", "50 %"][0].startswith(f"{100 * np.mean(halves):.1f} ± ")


def section(text: str, name: str) -> str:
    """The HTML of a part of the page."""
    (part,) = re.findall(f'<section id="{name}".*?</section>', text, re.S)
    return str(part)


def test_a_panel_shows_labels_of_a_fold_that_had_not_seen_the_image(
    data: DataSet, found: Findings
) -> None:
    assert [panel.image for panel in found.panels] == [data.images[n] for n in (1, 4, 7)]
    for panel in found.panels:
        np.testing.assert_array_equal(panel.truth.numpy(), data.labels[panel.image])
        raw = panel.labels[ARGMAX].numpy()
        np.testing.assert_array_equal(raw, data.scores[panel.image].argmax(0))
        ((fitting, proving, _),) = [part for part in dealt(data) if panel.image in part[2]]
        known = [(data.scores[image], data.labels[image]) for image in (*fitting, *proving)]
        limit = oracles.calibrate(known, np.arange(54).reshape(6, 9), PLAN.alpha)[0]
        here = oracles.image_from_grid(limit, panel.truth.shape)
        chosen = oracles.select(data.scores[panel.image], here, 2)
        np.testing.assert_array_equal(panel.labels[Rule(RAW, "eq4", 2, 0.3)].numpy(), chosen)
        for labels in panel.labels.values():
            assert labels.shape == panel.truth.shape


def test_an_image_that_cannot_be_opened_is_left_out(
    data: DataSet, found: Findings, tmp_path: Path
) -> None:
    whole = len(Reader(page(found, root=data.root)).images)
    (tmp_path / "images").mkdir()
    (tmp_path / data.images[1]).write_text("not an image")
    assert len(Reader(page(found, root=tmp_path)).images) == whole - 4, "of 3 panels and the first"


# The command


def run(capsys: Capture, data: DataSet, out: Path, **options: object) -> folders.Result:
    changed = {"background": "none", "alpha": 0.3, "folds": 2, "recalibrate": "none", "show": 1}
    return command(capsys, "report", *data.options(**{**changed, **options}), "-o", out)


def test_the_command_writes_one_file_and_says_what_it_recommends(
    data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("sky\n<b>road & co</b>\nnan\ncar\n")
    out = tmp_path / "out" / "report.html"
    said = done(
        run(
            capsys,
            data,
            out,
            names=names,
            background=1,
            variant="blocks",
            block=4,
            max_error="0.9",
            recalibrate="vector,none",
            context="location",
        )
    ).out
    assert list(files(tmp_path / "out")) == ["report.html"]
    text = out.read_text()
    read = Reader(text)
    assert "b" not in read.tags, "names are escaped"
    assert "<b>road & co</b>" in {row[0] for row in read.rows}
    for line in read.commands:
        assert f"--probs {data.probs}" in line or line == "cpseg audit pseudo --plan"
    assert len(read.commands) == 3
    for paragraph in said.split("\n\n")[:4]:
        assert paragraph in re.sub(r"&#x27;", "'", text)
    assert said.rstrip().endswith("figures, pictures, and how made")
    for option in ("--background 1", "--names", "--recalibrate vector,none", "--block 4"):
        assert option in text
    assert "recalibrated scores (vector)" in text


@pytest.mark.parametrize("options", [{"variant": "image"}, {"max_error": "none", "show": 0}])
def test_other_ways_to_ask(
    data: DataSet, tmp_path: Path, capsys: Capture, options: dict[str, object]
) -> None:
    done(run(capsys, data, tmp_path / "r.html", **options))
    text = (tmp_path / "r.html").read_text()
    assert tuple(Reader(text).headings) == SECTIONS
    if "variant" in options:
        assert "one threshold for all cells" in text
    else:
        assert "No bound on the error" in text
        assert "certified at" not in text


@pytest.mark.parametrize(
    "options", [{}, {"recalibrate": "none,vector", "max_error": "none", "subsets": False}], ids=str
)
def test_the_command_on_the_page_makes_the_page_again(
    data: DataSet, tmp_path: Path, capsys: Capture, options: dict[str, object]
) -> None:
    flags = ["--no-subsets"] if options.pop("subsets", True) is False else []
    out = tmp_path / "r.html"
    given = {"background": "none", "alpha": 0.3, "folds": 2, "recalibrate": "none", "show": 1}
    done(command(capsys, "report", *data.options(**{**given, **options}), *flags, "-o", out))
    text = out.read_text()
    (line,) = re.findall(r"<pre>(cpseg report [^<]*)</pre>", text)
    words = shlex.split(html.unescape(line))
    out.unlink()
    done(command(capsys, *words[1:]))
    assert out.read_text() == text


def test_class_maps_and_void_are_those_of_calibrate(tmp_path: Path, capsys: Capture) -> None:
    data = folders.make(tmp_path, count=6)
    (tmp_path / "map.json").write_text('{"map": {"0": 0, "1": 0, "2": 1, "3": 1}, "reduce": "sum"}')
    maps = {"class_map": tmp_path / "map.json", "mask_map": tmp_path / "map.json"}
    done(run(capsys, data, tmp_path / "r.html", **maps))
    labels = {row[0] for row in Reader((tmp_path / "r.html").read_text()).rows}
    assert {"class 0", "class 1"} <= labels
    assert "class 2" not in labels


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"folds": 1}, ["2 to 9 folds for 9 labelled images", "got 1"]),
        ({"folds": 10}, ["2 to 9 folds", "got 10"]),
        ({"recalibrate": "dirichlet,platt"}, ["a recalibrate among 'none'", "'platt'"]),
        ({"recalibrate": "none,none"}, ["every --recalibrate once"]),
        ({"max_error": "0.1,0.10"}, ["every --max-error once"]),
        ({"max_error": "1.5"}, ["max_error"]),
        ({"delta": "0"}, ["delta"]),
        ({"alpha": "2"}, ["alpha"]),
        ({"background": 4}, ["background"]),
        ({"recalibrate_share": 0}, ["a --recalibrate-share that splits 4 images in two"]),
        ({"recalibrate_share": 1}, ["a --recalibrate-share that splits"]),
        ({"variant": "kmeans"}, ["kmeans"]),
        ({"context": "weather", "recalibrate": "dirichlet"}, ["weather"]),
        ({"names": "few"}, ["4 class names as in the scores", "got 2"]),
        ({"names": "blank"}, ["line 2", "without blank lines"]),
        ({"names": "bytes"}, ["class names", "UTF-8"]),
        ({"ids": "one"}, ["at least 2 labelled images"]),
    ],
    ids=str,
)
def test_bad_input_is_one_line(
    data: DataSet, tmp_path: Path, capsys: Capture, options: dict[str, object], parts: list[str]
) -> None:
    texts = {"few": b"a\nb\n", "blank": b"a\n \nc\nd\n", "bytes": b"\xff\xfe\x00"}
    if "names" in options:
        path = tmp_path / "names.txt"
        path.write_bytes(texts[str(options["names"])])
        options = {"names": path}
    if "ids" in options:
        options = {"ids": data.list_ids("one.txt", data.images[:1])}
    out = tmp_path / "r.html"
    refused(run(capsys, data, out, **options), *parts)
    assert not out.exists()


def test_without_matplotlib_it_names_the_extra_before_any_work(
    data: DataSet, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("cpseg.report.page.gather", lambda *_, **__: pytest.fail("it worked first"))
    refused(run(capsys, data, tmp_path / "r.html"), "pip install cpseg[report]")


def test_several_ranks_are_refused(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpseg._internal.distributed.active", lambda: True)
    with pytest.raises(ValueError, match="torchrun") as caught:
        report(Source(data.root, data.probs), data.ids, PLAN, tmp_path / "r.html")
    complains(caught.value, "report", "one process")


def test_an_error_while_an_image_is_counted_names_its_file(
    data: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was bare: the file was named around a `yield`, out of the consumer's reach."""
    calls = iter(range(99))
    score = sys.modules["cpseg.core.nonconformity"].nonconformity

    def third_fails(*tensors: torch.Tensor) -> torch.Tensor:
        if next(calls) == 2:
            raise ValueError("here: expected this, got that; do so")
        return score(*tensors)

    monkeypatch.setattr("cpseg.jobs.cross_validation.nonconformity", third_fails)
    with pytest.raises(ValueError, match="here: expected this") as caught:
        gather(Source(data.root, data.probs), data.ids, Plan(None, folds=3))
    path = Path(str(caught.value).partition(": here: ")[0])
    assert path in [data.score_file(image) for image in data.images]


def test_names_beside_the_scores_are_those_of_the_classes(data: DataSet, tmp_path: Path) -> None:
    source = Source(data.root, data.probs)
    plan = Plan(None, "0.3", folds=2, max_errors=(), methods=(RAW,), samples=0, variant="image")
    beside = data.probs / "classes.txt"
    try:
        beside.write_text("sky\nroad\ntree\ncar\n")
        assert gather(source, data.ids, plan).names == ["sky", "road", "tree", "car"]
        beside.write_text("of\nanother\nmodel\n")
        assert gather(source, data.ids, plan).names[0] == "class 0"
    finally:
        beside.unlink()
