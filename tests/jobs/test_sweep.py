"""The sweep: against loops over folds and settings, stopped runs, files, ranks."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tests.support import folders, oracles
from tests.support.folders import DataSet, command, complains, done, files, newer, refused
from tests.support.processes import free_port

from cpseg import Calibrator, groups
from cpseg.core.class_map import ClassMap, parse_class_map
from cpseg.files import dataset as sources
from cpseg.files.dataset import Source
from cpseg.files.id_lists import Pair
from cpseg.files.score_files import write_evidence
from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.evaluate import evaluate
from cpseg.jobs.sweep import sweep
from cpseg.jobs.sweep_table import (
    FIGURES,
    Estimate,
    SweepRow,
    conclusion,
    infinite_threshold_warning,
    table_of_sweep,
)
from cpseg.recalibration.recalibrator import Recalibrator

Capture = pytest.CaptureFixture[str]
FOLDS, SEED, SHARE, BLOCK, GROUPS = 3, 5, 0.5, 5, 2
FITTING = 0.3
ALL = ("pixel", "image", "blocks", "kmeans", "annuli")


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return folders.make(tmp_path / "data", count=8, sizes=((6, 9), (8, 7)))


def run(data: DataSet, **options: Any) -> list[SweepRow]:
    settings: dict[str, Any] = {
        "backgrounds": [None, 2],
        "alphas": ["0.1", "0.5", "0.3"],
        "variants": ["pixel", "blocks"],
        "block": BLOCK,
        "num_groups": GROUPS,
        "group_share": SHARE,
        "folds": FOLDS,
        "seed": SEED,
    }
    settings |= options
    return sweep(Source(data.root, data.probs), data.ids, **settings)


# Figures


def dealt(data: DataSet) -> list[tuple[list[str], list[str], list[str]]]:
    """For every fold the images that learn groups, the other training images, the rest."""
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(data.images), generator=generator).tolist()
    parts = []
    for fold in range(FOLDS):
        testing = [data.images[n] for n in order[fold::FOLDS]]
        training = [image for image in data.images if image not in testing]
        drawn = torch.randperm(len(training), generator=generator).tolist()
        count = round(SHARE * len(training))
        learning = [training[n] for n in drawn[:count]]
        parts.append((learning, [training[n] for n in drawn[count:]], testing))
    return parts


def recalibrated(
    data: DataSet, fitting: list[str], method: str, tau: float, **settings: Any
) -> DataSet:
    """The data set with the scores that a map fitted on some of its images gives."""
    recalibrator = Recalibrator(4, method=method, seed=SEED, **settings)
    for image in fitting:
        probs, labels = data.scores[image], data.labels[image]
        recalibrator.update(torch.from_numpy(probs), torch.from_numpy(labels))
    refit = recalibrator.fit().with_prior_power(tau)
    scores = {name: refit(torch.from_numpy(each)).numpy() for name, each in data.scores.items()}
    return replace(data, scores=scores)


def threshold(
    data: DataSet, variant: str, alpha: str, learning: list[str], rest: list[str]
) -> np.ndarray:
    """The thresholds of one fold and setting, calibrated by themselves."""
    grid = data.labels[data.images[0]].shape
    training = [*learning, *rest]
    if variant == "pixel":
        images = [(data.scores[image], data.labels[image]) for image in training]
        cells = np.arange(grid[0] * grid[1]).reshape(grid)
        return oracles.calibrate(images, cells, alpha)[0]
    if variant == "image":
        partition = groups.image(grid)
    elif variant == "blocks":
        partition = groups.blocks(grid, BLOCK)
    else:
        training = rest
        scores = [
            oracles.grid_from_image(oracles.score_map(data.scores[i], data.labels[i], 255), grid)
            for i in learning
        ]
        curves = groups.curves(torch.from_numpy(np.stack(scores)))
        learn = groups.kmeans if variant == "kmeans" else groups.annuli
        partition = learn(curves, GROUPS, generator=torch.Generator().manual_seed(SEED))
    calibrator = Calibrator(partition, alpha=alpha)
    for image in training:
        probs, labels = data.scores[image], data.labels[image]
        calibrator.update(torch.from_numpy(probs), torch.from_numpy(labels))
    return calibrator.compute().threshold.numpy()


def figures(
    data: DataSet, testing: list[str], limit: np.ndarray | None, background: int | None
) -> dict[str, float]:
    """Of one fold and setting, over all its pixels at once; the raw argmax without a limit."""
    chosen, truths, inside = [], [], []
    for image in testing:
        probs, truth = data.scores[image], data.labels[image]
        if limit is None:
            chosen.append(probs.argmax(0).ravel())
        else:
            here = oracles.image_from_grid(limit, truth.shape)
            chosen.append(oracles.select(probs, here, background).ravel())
            sets = oracles.sets(probs, here)
            inside += [sets[(truth[at], *at)] for at in np.ndindex(truth.shape) if truth[at] != 255]
        truths.append(truth.ravel())
    labels, truth = np.concatenate(chosen), np.concatenate(truths)
    known = truth != 255
    kept = known & (labels != 255)

    def miou(*, with_ignored: bool) -> float:
        return oracles.mean(oracles.iou(labels, truth, 4, 255, with_ignored=with_ignored))

    return {
        "miou_kept": miou(with_ignored=False),
        "miou_all": miou(with_ignored=True),
        "kept": kept.sum() / known.sum(),
        "wrong": (labels != truth)[kept].mean() if kept.any() else math.nan,
        "coverage": np.mean(inside) if inside else math.nan,
        "infinite": math.nan if limit is None else np.isinf(limit).mean(),
    }


def check(row: SweepRow, folds: list[dict[str, float]]) -> None:
    for name in FIGURES:
        values = np.array([fold[name] for fold in folds])
        values = values[~np.isnan(values)]
        mean, se, count = getattr(row, name)
        assert count == len(values), (row.name, name)
        if count:
            assert mean == pytest.approx(values.mean(), abs=1e-12), (row.name, name)
            error = values.std(ddof=1) / math.sqrt(count)
            assert se == pytest.approx(error, abs=1e-12), (row.name, name)
        else:
            assert math.isnan(mean)
            assert math.isnan(se)


def test_every_figure_is_that_of_a_loop(data: DataSet) -> None:
    rows = run(data, variants=ALL)
    settings = list(itertools.product(ALL, [None, 2], ["0.5", "0.3", "0.1"]))
    assert [(r.variant, r.background, r.alpha) for r in rows] == [
        ("raw argmax", None, None),
        *((variant, background, float(alpha)) for variant, background, alpha in settings),
    ]
    parts = dealt(data)
    check(rows[0], [figures(data, testing, None, None) for *_, testing in parts])
    for row, (variant, background, alpha) in zip(rows[1:], settings, strict=True):
        folds = []
        for learning, rest, testing in parts:
            limit = threshold(data, variant, alpha, learning, rest)
            folds.append(figures(data, testing, limit, background))
        check(row, folds)
    named = {(r.variant, r.background, r.alpha): r for r in rows}
    assert named["pixel", None, 0.1].infinite.mean == 1, "5 or 6 images a fold: 9 are needed"
    assert named["pixel", 2, 0.5].infinite.mean < 1


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("method", "context", "scores"),
    [("vector", (), "softmax"), ("dirichlet", ("location",), "sigmoid")],
)
def test_recalibrated_figures_are_those_of_maps_fitted_by_hand(
    data: DataSet, method: str, context: tuple[str, ...], scores: str
) -> None:
    variants, alphas, taus = ("pixel", "image", "kmeans"), ("0.5", "0.3"), (0.0, 0.5)
    rows = run(
        data,
        variants=variants,
        alphas=alphas,
        recalibrate=["none", method],
        prior_powers=taus,
        context=context,
        scores=scores,
    )
    settings: list[tuple[Any, ...]] = [("none", 0.0, "raw argmax", None, None)]
    for name, tau in itertools.product(["none", method], taus):
        if (name, tau) != ("none", 0.0):
            settings.append((name, tau, "argmax", None, None))
        settings += itertools.product([name], [tau], variants, [None, 2], map(float, alphas))
    assert [(r.recalibrate, r.prior_power, *astuple(r)[:3]) for r in rows] == settings
    parts = dealt(data)
    folds: dict[tuple[Any, ...], list[dict[str, float]]] = {each: [] for each in settings}
    for learning, rest, testing in parts:
        count = round(FITTING * len([*learning, *rest]))
        calibrating, fitting = rest[:-count], rest[-count:]
        scored: dict[tuple[str, float], tuple[DataSet, list[str]]] = {}
        for name, tau in itertools.product(["none", method], taus):
            used = {"scores": scores, "context": context if name == method else ()}
            refitted = recalibrated(data, fitting, name, tau, **used)
            scored[name, tau] = (refitted, calibrating)
        scored["none", 0.0] = (data, rest)  # the model's own scores: every image calibrates
        for setting in settings:
            name, tau, variant, background, alpha = setting
            seen, images = scored[name, tau]
            limit = None
            if alpha is not None:
                limit = threshold(seen, variant, str(alpha), learning, images)
            folds[setting].append(figures(seen, testing, limit, background))
    for row, setting in zip(rows, settings, strict=True):
        check(row, folds[setting])


def test_figures_do_not_depend_on_what_else_is_tried(data: DataSet) -> None:
    def key(row: SweepRow) -> tuple[object, ...]:
        return row.recalibrate, row.prior_power, row.variant, row.background, row.alpha

    named = {key(row): str(row) for row in run(data, variants=ALL)}
    for variant in ALL:
        for row in run(data, variants=[variant], alphas=[0.3], backgrounds=[2]):
            assert str(row) == named[key(row)]
    for row in run(
        data,
        variants=["image", "kmeans"],
        recalibrate=["none", "temperature", "vector"],
        prior_powers=[0, 1],
        context=(),
    ):
        assert named.setdefault(key(row), str(row)) == str(row)
    for method, variant in (("temperature", "image"), ("vector", "kmeans")):
        rows = run(data, variants=[variant], recalibrate=[method], prior_powers=[1], context=())
        assert [row.name for row in rows[:2]] == [
            "raw argmax",
            f"{method}, prior power 1, argmax",
        ]
        assert len(rows) == 2 + 6
        for row in rows:
            assert str(row) == named[key(row)]


def test_a_fold_is_what_calibrate_and_evaluate_say_of_it(data: DataSet, tmp_path: Path) -> None:
    run(data, out=tmp_path / "out", variants=["image"], alphas=[0.3])
    source = Source(data.root, data.probs)
    for fold, (learning, rest, testing) in enumerate(dealt(data)):
        train = data.list_ids("train.txt", [*learning, *rest])
        calibration = calibrate(
            source, train, alpha=0.3, background=2, variant="image", grid=(6, 9)
        )
        expected = evaluate(source, data.list_ids("test.txt", testing), calibration)
        found = json.loads((tmp_path / "out" / f"fold-{fold}.json").read_text())
        assert len(found) == len(expected) == 3
        for one, row in zip(found, expected, strict=True):
            for name in ("miou_kept", "miou_all", "kept", "wrong"):
                assert one[name] == getattr(row, name)
        assert found[2]["coverage"] == expected[2].coverage


def test_a_fold_that_keeps_nothing_has_no_error_rate(data: DataSet) -> None:
    image = data.images[3]
    np.save(data.score_file(image), np.full_like(data.scores[image], 0.1))
    rows = run(data, variants=["image"], alphas=[0.5, 0.01], backgrounds=[None], folds=8)
    assert [row.kept.folds for row in rows] == [8, 8, 8]
    assert [row.wrong.folds for row in rows] == [8, 7, 8]
    assert [row.miou_kept.folds for row in rows] == [8, 7, 8]
    assert rows[1].miou_all.folds == 8


def test_the_seed_deals_the_folds(data: DataSet) -> None:
    assert str(run(data)) == str(run(data))
    assert str(run(data)) != str(run(data, seed=SEED + 1))


# Reading


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"variants": ALL, "backgrounds": [None, 0, 1, 2]},
        {"variants": ["image", "kmeans"], "recalibrate": ["none", "vector"]},
        {"recalibrate": ["temperature"], "prior_powers": [0, 1]},
    ],
    ids=str,
)
def test_a_score_file_is_read_once_a_fold(
    data: DataSet, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    reads: Counter[str] = Counter()
    read = sources.read_scores

    def counting(path: Path, **options: Any) -> object:
        reads[path.stem] += 1
        return read(path, **options)

    monkeypatch.setattr(sources, "read_scores", counting)
    run(data, **settings)
    assert reads == {Path(image).stem: FOLDS for image in data.images}


# Files, and runs that were stopped


def stop_at(title: str, place: int) -> Any:
    """A progress that is interrupted before an image of a pass."""

    def progress(items: Iterable[Pair], count: int, name: str) -> Iterable[Pair]:
        for number, item in enumerate(items):
            if name == title and number == place:
                raise KeyboardInterrupt
            yield item

    return progress


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("title", "finished"),
    [
        ("fold 1/3, recalibrate", 0),
        ("fold 1/3, calibrate", 0),
        ("fold 2/3, learn groups", 1),
        ("fold 2/3, measure", 1),
        ("fold 3/3, measure", 2),
    ],
)
def test_a_run_that_was_stopped_goes_on_with_the_next_fold(
    data: DataSet, tmp_path: Path, title: str, finished: int
) -> None:
    options: dict[str, Any] = {
        "variants": ["pixel", "kmeans"],
        "recalibrate": ["none", "temperature"],
        "prior_powers": [0, 0.5],
    }
    rows = run(data, out=tmp_path / "whole", **options)
    out = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        run(data, out=out, progress=stop_at(title, 0), **options)
    left = [f"fold-{n}.json" for n in range(finished)] + ["run.json"]
    assert sorted(name for name in files(out) if not name.startswith(".")) == left
    passes: list[str] = []

    def listing(items: Iterable[Pair], count: int, name: str) -> Iterable[Pair]:
        passes.append(name)
        return items

    assert str(run(data, out=out, progress=listing, **options)) == str(rows)
    assert files(out) == files(tmp_path / "whole")
    assert len(passes) == 4 * (FOLDS - finished)
    assert passes[0].startswith(f"fold {finished + 1}/3")
    assert str(run(data, out=out, progress=stop_at("any", 0), **options)) == str(rows)


@pytest.mark.parametrize(
    "changed",
    [
        {"alphas": ["0.1", "0.5"]},
        {"variants": ["pixel"]},
        {"variants": ["blocks", "pixel"]},
        {"backgrounds": [None]},
        {"block": 4},
        {"folds": 4},
        {"seed": 6},
        {"grid": (3, 4)},
        {"recalibrate": ["none", "temperature"]},
        {"prior_powers": [0, 0.5]},
        {"recalibrate_share": 0.4},
        {"context": ()},
        {"scores": "sigmoid"},
    ],
    ids=str,
)
def test_a_folder_of_another_sweep_is_refused(
    data: DataSet, tmp_path: Path, changed: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    run(data, out=out)
    before = files(out)
    with pytest.raises(ValueError, match="another run's") as caught:
        run(data, out=out, **changed)
    complains(caught.value, out, "choose another with -o")
    assert files(out) == before


def test_a_folder_of_another_data_set_is_refused(data: DataSet, tmp_path: Path) -> None:
    run(data, out=tmp_path / "out")
    shutil.copytree(data.root, tmp_path / "moved")
    settings = {"backgrounds": [None, 2], "alphas": ["0.1", "0.5", "0.3"], "block": BLOCK}
    settings |= {"variants": ["pixel", "blocks"], "num_groups": GROUPS, "group_share": SHARE}
    for other in (
        Source(tmp_path / "moved", data.probs),
        Source(data.root, data.probs, void=9),
        Source(data.root, data.probs, mask_map=ClassMap(tuple(range(4)))),
    ):
        with pytest.raises(ValueError, match="another run's"):
            sweep(other, data.ids, folds=FOLDS, seed=SEED, out=tmp_path / "out", **settings)


def test_folds_older_than_the_scores_are_swept_again(data: DataSet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = run(data, out=out)
    for image in data.images:
        np.save(data.score_file(image), data.scores[image][::-1].copy())
        newer(data.score_file(image))
    assert str(run(data, out=out)) != str(rows)


def test_scores_with_an_older_time_are_noticed(data: DataSet, tmp_path: Path) -> None:
    """As rsync -a, cp -p and tar leave them; files of one shape have one size."""
    out = tmp_path / "out"
    rows = run(data, out=out)
    for image in data.images:
        path = data.score_file(image)
        when = path.stat().st_mtime_ns - 3600 * 10**9
        np.save(path, data.scores[image][::-1].copy())
        os.utime(path, ns=(when, when))
    assert str(run(data, out=out)) != str(rows)


def made_by_an_older_version(out: Path) -> None:
    run_file = json.loads((out / "run.json").read_text())
    del run_file["manifest"]
    (out / "run.json").write_text(json.dumps(run_file))
    (out / "manifest.jsonl").unlink()


def test_folds_of_an_older_version_are_taken_over(data: DataSet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = run(data, out=out)
    before = files(out)
    made_by_an_older_version(out)
    assert str(run(data, out=out, progress=stop_at("any", 0))) == str(rows)
    assert files(out) == before


def test_the_same_alphas_otherwise_written_go_on(data: DataSet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = run(data, out=out)
    assert str(run(data, out=out, alphas=[0.5, "3/10", "0.10"])) == str(rows)


def test_a_folder_with_other_files_is_refused(data: DataSet, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="new or empty folder"):
        run(data, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "thesis.txt"]


def test_there_is_no_bar_for_what_is_not_done(data: DataSet) -> None:
    passes: list[str] = []

    def listing(items: Iterable[Pair], count: int, name: str) -> Iterable[Pair]:
        passes.append(name.partition(", ")[2])
        return items

    run(data, progress=listing)
    assert passes == ["calibrate", "measure"] * FOLDS


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", "null", '[{"variant": "pixel"}]'])
def test_a_damaged_fold_is_measured_again(data: DataSet, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    run(data, out=out)
    before = files(out)
    (out / "fold-1.json").write_text(text)
    run(data, out=out)
    assert files(out) == before


def test_a_damaged_fold_of_the_same_size_is_measured_again(data: DataSet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(data, out=out)
    before = files(out)
    path = out / "fold-1.json"
    path.write_text(path.read_text().replace("0.1", "0.2"))
    run(data, out=out)
    assert files(out) == before


def test_a_damaged_fold_of_an_older_version_is_refused(data: DataSet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(data, out=out)
    made_by_an_older_version(out)
    path = out / "fold-1.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="damaged") as caught:
        run(data, out=out)
    complains(caught.value, path, "delete it")


def test_files_hold_the_figures(data: DataSet, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    rows = run(data, out=out, alphas=[0.1, 0.5], recalibrate=["none", "vector"], context=())
    assert "NaN" not in "".join(path.read_text() for path in out.iterdir())
    assert (out / "sweep.md").read_text() == f"{table_of_sweep(rows)}\n\n{conclusion(rows)}\n"
    with open(out / "sweep.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows) == 18
    assert [line["background"] for line in lines] == 2 * ["", *2 * ["none", "none", "2", "2"]]
    assert list(lines[0])[:4] == ["recalibrate", "prior_power", "variant", "background"]
    for line, row in zip(lines, rows, strict=True):
        assert line["variant"] == row.variant
        assert (line["recalibrate"], line["prior_power"]) == (row.recalibrate, "0.0")
        assert line["alpha"] == ("" if row.alpha is None else str(row.alpha))
        for name in FIGURES:
            for value, end in zip(getattr(row, name), ("", "_se", "_folds"), strict=True):
                text = line[name + end]
                assert (math.isnan(value) and text == "") or float(text) == value


# Text


def row(variant: str = "pixel", alpha: float | None = 0.1, **means: float) -> SweepRow:
    values = {name: Estimate(means.get(name, 0.5), 0.01, 5) for name in FIGURES}
    return SweepRow(variant, None, alpha, **values)


RAW = replace(row("raw argmax", None, kept=1.0), coverage=Estimate(math.nan, math.nan, 0))


def test_closing_names_the_best_and_the_cleanest() -> None:
    best = row("image", 0.3, miou_all=0.6)
    cleanest = row("blocks", 0.2, wrong=0.1, kept=0.5)
    too_strict = row("pixel", 0.5, wrong=0.01, kept=0.49)
    text = conclusion([RAW, too_strict, best, cleanest])
    assert "pixels: image, background none, alpha 0.3 (0.600 ± 0.010; raw argmax 0.500" in text
    assert "kept: blocks, background none, alpha 0.2 (10.0 ± 1.0 % of 50.0 %)" in text
    assert "certify it, or measure it on others" in text
    assert "\n" not in text


def test_refitted_scores_are_named() -> None:
    fitted = replace(row("image", 0.3, miou_all=0.6), recalibrate="dirichlet", prior_power=0.5)
    plain = replace(row("argmax", None, wrong=0.1), recalibrate="vector")
    divided = replace(row("image"), prior_power=1.0)
    text = conclusion([RAW, row(), fitted, plain, divided])
    assert "pixels: dirichlet, prior power 0.5, image, background none, alpha 0.3 (0.600" in text
    assert "kept: vector, argmax (10.0" in text
    assert divided.name == "prior power 1, image, background none, alpha 0.1"
    lines = table_of_sweep([RAW, fitted, divided]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:4] == ["recalibrate", "prior power", "variant", "background"]
    assert cells[2][:4] == ["none", "0", "raw argmax", "-"]
    assert cells[3][:4] == ["dirichlet", "0.5", "image", "none"]
    assert cells[4][:4] == ["none", "1", "image", "none"]
    assert table_of_sweep([RAW, row()]).startswith("| variant ")


def test_a_setting_that_is_no_better_than_the_raw_argmax_is_not_the_best() -> None:
    text = conclusion([RAW, row()])
    assert "pixels: raw argmax (0.500 ± 0.010). " in text
    assert "kept: raw argmax" in text


def test_the_table_is_aligned_and_says_what_is_missing() -> None:
    alone = replace(row(infinite=1e-5), wrong=Estimate(0.25, math.nan, 1))
    lines = table_of_sweep([RAW, alone, row(infinite=0.4)]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in lines}) == 1
    assert cells[0][:5] == ["variant", "background", "alpha", "mIoU kept", "mIoU all"]
    assert cells[0][5:] == ["kept", "wrong", "coverage", "infinite"]
    assert cells[2][:3] == ["raw argmax", "-", "-"]
    assert cells[2][7:] == ["-", "-"]
    assert cells[3][6:] == ["25.0 ± ? %", "50.0 ± 1.0 %", "< 0.1 %"]
    assert cells[4][8] == "40.0 %"
    assert "nan" not in "".join(lines)


def test_too_few_images_are_said_with_the_number_needed() -> None:
    fine = row(infinite=0.0)
    assert infinite_threshold_warning([RAW, fine]) is None
    short = [row(infinite=1.0), row("blocks", 0.1, infinite=0.5), row("pixel", 0.05, infinite=1.0)]
    text = infinite_threshold_warning([RAW, fine, *short, short[0]])
    assert text is not None
    assert "alpha 0.1 (pixel, blocks; needs 9 scores each), 0.05 (pixel; needs 19" in text


def test_estimates_leave_out_folds_without_a_figure() -> None:
    mean, se, folds = Estimate.over([0.2, math.nan, 0.4])
    assert (mean, se, folds) == (pytest.approx(0.3), pytest.approx(0.1), 2)
    mean, se, folds = Estimate.over([0.5, math.nan])
    assert (mean, folds) == (0.5, 1)
    assert math.isnan(se)
    assert Estimate.over([math.nan]).folds == 0


# Bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"folds": 1}, "2 to 8 folds for 8 labelled images, got 1;"),
        ({"folds": 9}, "2 to 8 folds for 8 labelled images, got 9;"),
        ({"alphas": [0.1, 1.5]}, "alpha in (0, 1), got 1.5"),
        ({"alphas": []}, "alphas, each once, got none"),
        ({"alphas": [0.1, "0.10"]}, "alphas, each once, got one twice"),
        (
            {"variants": ["pixel", "voxel"]},
            "'pixel', 'image', 'blocks', 'kmeans', 'annuli', got 'voxel'",
        ),
        ({"variants": []}, "variants, each once, got none"),
        ({"backgrounds": []}, "backgrounds, each once, got none"),
        ({"backgrounds": [2, 2]}, "backgrounds, each once, got one twice"),
        ({"backgrounds": [None, 4]}, "background in 0..3 or None, got 4"),
        ({"variants": ["kmeans"], "group_share": 0.0}, "a --group-share above 0"),
        ({"variants": ["annuli"], "group_share": 1.0}, "splits 5 images in two, got 1"),
        (
            {"recalibrate": ["platt"]},
            "'none', 'temperature', 'vector', 'dirichlet', 'trees', got 'platt'",
        ),
        ({"recalibrate": []}, "recalibrations, each once, got none"),
        ({"recalibrate": ["vector"] * 2}, "recalibrations, each once, got one twice"),
        ({"prior_powers": []}, "prior powers, each once, got none"),
        ({"prior_powers": [0, 0.0]}, "prior powers, each once, got one twice"),
        ({"prior_powers": [0, 1.5]}, "prior powers in [0, 1], got 1.5; 0 leaves the probabilities"),
        ({"prior_powers": ["0.5"]}, "prior powers in [0, 1], got '0.5'"),
        ({"scores": "logits"}, "scores among 'softmax', 'sigmoid', got 'logits'"),
        ({"context": "place"}, "'location', 'neighbourhood', 'image', got 'place'"),
        ({"recalibrate": ["vector"], "recalibrate_share": 0}, "a --recalibrate-share above 0"),
        ({"prior_powers": [1], "recalibrate_share": 0}, "a --recalibrate-share above 0"),
        (
            {"recalibrate": ["vector"], "recalibrate_share": 1},
            "a --recalibrate-share that splits 5 images in two, got 1",
        ),
        (
            {"variants": ALL, "recalibrate": ["vector"], "recalibrate_share": 0.6},
            "shares that leave some of 5 images to calibrate, got --group-share 0.5 and "
            "--recalibrate-share 0.6",
        ),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_any_work(
    data: DataSet, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        run(data, out=tmp_path / "out", **options)
    complains(caught.value, "sweep", said)
    assert not (tmp_path / "out").exists()


def test_one_labelled_image_is_refused(data: DataSet) -> None:
    data.list_ids("ids.txt", data.images[:1])
    with pytest.raises(ValueError, match="expected") as caught:
        run(data)
    complains(caught.value, "sweep", "at least 2 labelled images, got 1; label more")


def test_shares_are_not_looked_at_where_nothing_is_learned(data: DataSet) -> None:
    assert len(run(data, group_share=0.0, recalibrate_share=0.0)) == 13


def test_maps_that_change_the_classes_are_refused(data: DataSet) -> None:
    table = {"0": 0, "1": 0, "2": 1, "3": 1}
    source = Source(data.root, data.probs, mask_map=parse_class_map(table))
    with pytest.raises(ValueError, match="expected") as caught:
        sweep(source, data.ids, backgrounds=[None], recalibrate=["dirichlet"])
    complains(caught.value, "sweep", "2 classes in the mask map, got 4", "--class-map")


def test_a_fold_that_fits_no_map_is_named(data: DataSet) -> None:
    for image in data.images:
        Image.fromarray(np.zeros_like(data.labels[image])).save(data.mask_file(image))
    with pytest.raises(ValueError, match="expected") as caught:
        run(data, recalibrate=["vector"])
    complains(caught.value, "fold 1/3: Recalibrator.fit", "2 labelled classes, got class 0 alone")


def test_evidence_is_refused(data: DataSet) -> None:
    from cpseg import evidence

    for image in data.images:
        data.score_file(image).unlink()
        found = evidence(torch.from_numpy(data.scores[image]), background=None)
        write_evidence(data.score_file(image).with_suffix(".safetensors"), found)
    with pytest.raises(ValueError, match="got evidence; pass the folder of probabilities"):
        run(data)


def test_scores_of_another_model_are_refused(data: DataSet) -> None:
    image = data.images[5]
    np.save(data.score_file(image), data.scores[image][:3])
    with pytest.raises(ValueError, match="4 classes like the first image, got 3"):
        run(data)


# The command


def test_the_command_prints_the_table(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    words = data.options(
        backgrounds="none,2",
        alphas="0.1, 0.5,0.3",
        variants="image,blocks",
        block=BLOCK,
        folds=FOLDS,
        seed=SEED,
        recalibrate="none",
    )
    result = done(command(capsys, "sweep", *words, "--all"))
    rows = run(data, variants=["image", "blocks"])
    assert result.out == f"{table_of_sweep(rows)}\n\n{conclusion(rows)}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    again = done(command(capsys, "sweep", *words, "--all", "-o", tmp_path / "out"))
    assert again.out == result.out == (tmp_path / "out" / "sweep.md").read_text()
    shown = done(command(capsys, "sweep", *words, "-o", tmp_path / "out")).out
    best = sorted(rows[1:], key=lambda row: -row.miou_all.mean)[:10]
    assert len(rows) == 13
    cut = f"and the 10 best of 12 others by mIoU over all pixels; all are in {tmp_path / 'out'}"
    assert shown.startswith(f"{table_of_sweep([rows[0], *best])}\n\nThe raw argmax {cut}")
    assert shown.endswith(f"\n\n{conclusion(rows)}\n")


def test_the_command_tries_recalibration_by_default(data: DataSet, capsys: Capture) -> None:
    words = data.options(backgrounds="none", alphas="0.5", variants="image", folds=FOLDS)
    said = done(command(capsys, "sweep", *words)).out
    assert sum(line.startswith("| dirichlet ") for line in said.splitlines()) == 2


def test_a_difference_within_noise_is_called_so() -> None:
    close, far = (row("image", 0.3, miou_all=mean) for mean in (0.505, 0.52))
    assert "it may be noise" in conclusion([RAW, close])
    assert "it may be noise" not in conclusion([RAW, far])
    assert "it may be noise" not in conclusion([RAW, row(miou_all=0.4)])


def test_the_command_tries_recalibrations(data: DataSet, capsys: Capture) -> None:
    words = data.options(
        backgrounds="none",
        alphas=0.5,
        variants="image",
        folds=FOLDS,
        seed=SEED,
        recalibrate="none, dirichlet",
        prior_powers="0, 0.5",
        recalibrate_share=0.5,
        context="location,image",
        scores="sigmoid",
    )
    result = done(command(capsys, "sweep", *words))
    rows = run(
        data,
        backgrounds=[None],
        alphas=[0.5],
        variants=["image"],
        recalibrate=["none", "dirichlet"],
        prior_powers=[0, 0.5],
        recalibrate_share=0.5,
        context=["location", "image"],
        scores="sigmoid",
    )
    assert result.out == f"{table_of_sweep(rows)}\n\n{conclusion(rows)}\n"
    assert len(rows) == 2 + 3 * 2


def test_the_command_warns_of_too_few_images(data: DataSet, capsys: Capture) -> None:
    words = data.options(backgrounds="none", folds=2, recalibrate="none")
    result = command(capsys, "sweep", *words)
    assert result.code == 0
    assert len(result.out.splitlines()) == 3 + 10 + 4
    assert result.err.startswith("cpseg: warning: in the folds, thresholds are infinite")
    assert "0.1 (pixel; needs 9 scores each)" in result.err
    assert len(result.err.splitlines()) == 1


def test_class_and_mask_maps(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"0": 0, "1": 0, "2": 1, "3": 1}))
    maps: dict[str, object] = dict.fromkeys(("class_map", "mask_map"), tmp_path / "map.json")
    maps["recalibrate"] = "none"
    words = data.options(backgrounds="none,0", alphas=0.3, variants="image", **maps)
    result = done(command(capsys, "sweep", *words))
    assert len(result.out.splitlines()) == 7
    words = data.options(backgrounds=2, alphas=0.3, **maps)
    refused(command(capsys, "sweep", *words), "background in 0..1 or None, got 2")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "--backgrounds"),
        ({"backgrounds": "none,x"}, "got 'x'"),
        ({"backgrounds": "none,"}, "got ''"),
        ({"backgrounds": 0, "folds": 0}, ">= 1, got '0'"),
        ({"backgrounds": 0, "folds": 9}, "2 to 8 folds"),
        ({"backgrounds": 0, "alphas": "0.1;0.2"}, "alpha in (0, 1), got '0.1;0.2'"),
        ({"backgrounds": 0, "variants": "pixels"}, "got 'pixels'"),
        ({"backgrounds": 0, "recalibrate": "none,platt"}, "got 'platt'"),
        ({"backgrounds": 0, "prior_powers": "0,2"}, "in [0, 1], got '2'"),
        ({"backgrounds": 0, "recalibrate": "vector", "recalibrate_share": 0}, "above 0"),
    ],
    ids=str,
)
def test_bad_words_are_refused(
    data: DataSet, capsys: Capture, options: dict[str, object], said: str
) -> None:
    refused(command(capsys, "sweep", *data.options(**options)), said)


@pytest.mark.nightly
@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
def test_torchrun_gives_the_bytes_of_one_process(
    data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    words = data.options(
        backgrounds="none,2",
        alphas="0.5,0.3",
        variants=",".join(ALL),
        num_groups=2,
        folds=2,
        recalibrate="none,vector",
        context="none",
    )
    single = command(capsys, "sweep", *words, "-o", tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--master-port", str(free_port()), "-m", "cpseg", "sweep"]
    both = subprocess.run(
        [*launcher, *words, "-o", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert both.returncode == 0, both.stderr
    assert both.stdout.replace(str(tmp_path / "two"), str(tmp_path / "one")) == single.out
    assert "fold 1" not in both.stderr, "no bar in a pipe"
    assert files(tmp_path / "two") == files(tmp_path / "one")
