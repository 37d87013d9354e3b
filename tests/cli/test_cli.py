"""The command: what it prints, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support import folders
from tests.support.folders import DataSet, command, done, files, finish, options, refused, start

import cpseg
from cpseg import Calibration
from cpseg.cli.command import SUBCOMMANDS, main, parser
from cpseg.cli.help_texts import HELP_TEXTS
from cpseg.files.dataset import Source
from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.evaluate import evaluate
from cpseg.jobs.tally import table

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return folders.make(tmp_path / "data", count=12)


@pytest.fixture
def calibration(data: DataSet, tmp_path: Path) -> Path:
    made = calibrate(Source(data.root, data.probs), data.ids, alpha=0.3, background=0)
    made.save(tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


# The whole job


def test_the_whole_job(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    labelled = data.list_ids("labelled.txt", data.images[:9])
    unlabelled = data.list_ids("unlabelled.txt", data.images[9:], masks=False)
    heldout = data.list_ids("heldout.txt", data.images[9:])
    made, out = tmp_path / "new" / "c.safetensors", tmp_path / "out"

    words = data.options(ids=labelled, alpha=0.1, variant="image", background=0)
    result = done(command(capsys, "calibrate", *words, "-o", made))
    assert result.out == (
        f"{made}: image, alpha 0.1, 9 images, 4 classes, background 0 suppressed, "
        "grid 12x16, 0.0 % of thresholds infinite\n"
    )
    loaded = Calibration.load(made)
    assert (loaded.variant, loaded.alpha, loaded.num_images, loaded.background) == (
        "image",
        0.1,
        9,
        0,
    )

    words = data.options(ids=unlabelled, calibration=made, labelled=labelled)
    result = done(command(capsys, "label", *words, "-o", out))
    kept = np.mean([np.array(Image.open(out / "masks" / x)) != 255 for x in data.images[9:]])
    assert result.out == (
        f"{out}: masks, ids.txt and stage1.txt, summary.csv; "
        f"{100 * kept:.1f} % of pixels labelled\n"
    )
    assert len((out / "stage1.txt").read_text().splitlines()) == 12

    words = data.options(ids=heldout, calibration=made, constant=0.3, per_class=True)
    result = done(command(capsys, "evaluate", *words, "-o", tmp_path / "rows.json"))
    rows = evaluate(Source(data.root, data.probs), heldout, loaded, constant=0.3)
    assert table(rows) in result.out
    assert "alpha 0.1, calibrated on 9 images" in result.out
    assert "IoU over all pixels" in result.out
    kept_rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["rule"] for row in kept_rows] == [
        "raw argmax",
        "image",
        "image, suppressed",
        "constant 0.3",
    ]

    words = data.options(ids=unlabelled, background=0)
    result = done(command(capsys, "compact", *words, "-o", tmp_path / "evidence"))
    assert "3 evidence files" in result.out
    words = data.options(ids=unlabelled, probs=tmp_path / "evidence", calibration=made)
    done(command(capsys, "label", *words, "-o", tmp_path / "short"))
    assert files(tmp_path / "short" / "masks") == files(out / "masks")


def test_figures_as_json_are_those_of_the_table(
    data: DataSet, calibration: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = [*data.options(calibration=calibration), "-o", tmp_path / "rows.json"]
    done(command(capsys, "evaluate", *words))
    text = (tmp_path / "rows.json").read_text()
    assert "NaN" not in text
    assert text.endswith("\n")
    rows = evaluate(Source(data.root, data.probs), data.ids, Calibration.load(calibration))
    for row, found in zip(rows, json.loads(text), strict=True):
        assert list(found) == [
            "rule",
            "miou_kept",
            "miou_all",
            "kept",
            "wrong",
            "coverage",
            "set_size",
            "iou",
        ]
        for name, value in found.items():
            want = getattr(row, name)
            if name == "iou":
                assert value == list(want)
            elif value is None:
                assert np.isnan(want)
            else:
                assert value == want


@pytest.mark.parametrize(
    ("option", "found"),
    [
        ({"background": "none"}, {"background": None}),
        ({"background": 3}, {"background": 3}),
        ({"background": 0, "grid": "5x7"}, {"grid": (5, 7)}),
        ({"background": 0, "grid": "5X7"}, {"grid": (5, 7)}),
        ({"background": 0, "alpha": 0.25}, {"alpha": 0.25}),
        ({"background": 0, "alpha": "1/4"}, {"alpha": 0.25}),
        ({"background": 0, "variant": "blocks", "block": 4}, {"variant": "blocks"}),
        ({"background": 0, "nonconformity": "raps:0.1:2"}, {"score": "raps:0.1:2"}),
        ({"background": 0, "variant": "image", "unit": "image"}, {"unit": "image"}),
    ],
    ids=str,
)
def test_options_of_calibrate_are_recorded(
    data: DataSet,
    tmp_path: Path,
    capsys: Capture,
    option: dict[str, object],
    found: dict[str, object],
) -> None:
    words = data.options(**{"alpha": 0.2, **option})
    done(command(capsys, "calibrate", *words, "-o", tmp_path / "c"))
    loaded = Calibration.load(tmp_path / "c")
    assert {name: getattr(loaded, name) for name in found} == found


def test_alpha_is_the_decimal_that_was_written(tmp_path: Path, capsys: Capture) -> None:
    """29 scores at 0.1: rank 27, where floating point says 28."""
    data = folders.make(tmp_path / "data", count=29, sizes=((2, 2),))
    for image in data.images:
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(data.mask_file(image))
    words = data.options(alpha="0.1", background="none")
    done(command(capsys, "calibrate", *words, "-o", tmp_path / "c"))
    scores = np.sort([np.float32(1) - data.scores[image][0] for image in data.images], axis=0)
    assert np.array_equal(Calibration.load(tmp_path / "c").threshold, scores[26])


def test_a_class_map_and_a_mask_map(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "map.json").write_text('{"0": 0, "1": 1, "2": 1, "3": 0}')
    maps = {"class_map": tmp_path / "map.json", "mask_map": tmp_path / "map.json"}
    words = data.options(**maps, alpha=0.2, background=0)
    result = done(command(capsys, "calibrate", *words, "-o", tmp_path / "c"))
    assert "2 classes" in result.out
    words = data.options(calibration=tmp_path / "c", mask_map=tmp_path / "map.json")
    done(command(capsys, "evaluate", *words))
    words = data.options(calibration=tmp_path / "c")
    done(command(capsys, "label", *words, "-o", tmp_path / "out"))
    assert set(np.array(Image.open(tmp_path / "out/masks/images/00.png")).flat) <= {0, 1, 255}


def test_void_is_an_option(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    for image in data.images:
        labels = data.labels[image]
        Image.fromarray(np.where(labels == 255, 11, labels).astype(np.uint8)).save(
            data.mask_file(image)
        )
    words = data.options(background=0, alpha=0.2)
    refused(command(capsys, "calibrate", *words, "-o", tmp_path / "c"), "got 11")
    done(command(capsys, "calibrate", *words, "--void", 11, "-o", tmp_path / "c"))
    words = data.options(calibration=tmp_path / "c")
    recorded = done(command(capsys, "evaluate", *words)).out
    assert done(command(capsys, "evaluate", *words, "--void", 11)).out == recorded
    refused(command(capsys, "evaluate", *words, "--void", 12), "got 11")


def test_infinite_thresholds_are_warned_of_with_the_number_that_would_do(
    data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    words = data.options(background=0)
    said = "calibrate at alpha 0.05: expected 19 scores or more in some cell of the grid, got fewer"
    refused(command(capsys, "calibrate", *words, "-o", tmp_path / "c"), said, "--allow-infinite")
    assert not (tmp_path / "c").exists()
    result = command(capsys, "calibrate", *words, "--allow-infinite", "-o", tmp_path / "c")
    assert result.code == 0
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("cpseg: warning: 100.0 % of thresholds are infinite")
    assert "alpha 0.05 needs 19 scores each" in result.err
    assert "100.0 % of thresholds infinite" in result.out
    assert Calibration.load(tmp_path / "c").threshold.isposinf().all()


def test_the_promise_is_that_of_the_variant(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    said = {}
    for variant in ("pixel", "image"):
        words = data.options(background="none", alpha=0.3, variant=variant)
        done(command(capsys, "calibrate", *words, "-o", tmp_path / variant))
        words = data.options(calibration=tmp_path / variant)
        said[variant] = done(command(capsys, "evaluate", *words)).out.splitlines()[0]
    promise = "coverage of at least 70 % at each of the 12x16 pixels that the grid samples"
    assert f"promised: {promise}: coverage is the probability that" in said["pixel"]
    assert "promised: nothing: groups pool the pixels of several images" in said["image"]


def test_images_as_units_promise_a_share_of_the_image(
    data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    words = data.options(background="none", alpha=0.3, variant="image", unit="image")
    done(command(capsys, "calibrate", *words, "-o", tmp_path / "c"))
    said = done(command(capsys, "evaluate", *data.options(calibration=tmp_path / "c"))).out
    assert "promised: at least 70 % of an image's pixels covered on average over images, in" in said
    done(command(capsys, "calibrate", *words, "--per-class", "-o", tmp_path / "c"))
    said = done(command(capsys, "evaluate", *data.options(calibration=tmp_path / "c"))).out
    promise = "at least 70 % of a class's pixels covered on average over images that show it, in"
    assert f"promised: {promise} each group of the 12x16 pixels that the grid samples: a" in said


def test_a_fallback_says_which_level_gave_the_thresholds(
    data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    words = data.options(background="none", alpha=0.05, block=4, unit="image")
    words.append("--allow-infinite")
    result = command(capsys, "calibrate", *words, "--fallback", "-o", tmp_path / "c")
    assert result.code == 0
    assert "100.0 % of thresholds infinite" in result.out  # 12 images are too few for 0.05
    assert "thresholds by pixel 0.0 %, blocks 0.0 %, image 0.0 %" in result.out
    words = data.options(background="none", alpha=0.05, block=4)
    result = done(command(capsys, "calibrate", *words, "--fallback", "-o", tmp_path / "c"))
    assert "thresholds by pixel 0.0 %, blocks 100.0 %, image 0.0 %" in result.out
    said = done(command(capsys, "evaluate", *data.options(calibration=tmp_path / "c"))).out
    assert "where thresholds are its own (0.0 %); nothing where they fell back" in said
    words = data.options(background="none", alpha=0.3, block=4)
    result = done(command(capsys, "calibrate", *words, "--fallback", "-o", tmp_path / "c"))
    assert "thresholds by pixel 100.0 %" in result.out
    said = done(command(capsys, "evaluate", *data.options(calibration=tmp_path / "c"))).out
    assert "promised: coverage of at least 70 % at each of the 12x16 pixels that the" in said


@pytest.mark.parametrize("score", ["aps", "raps", "margin"])
def test_other_scores_are_measured_by_their_sets_and_give_no_labels(
    score: str, data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    words = data.options(background=0, alpha=0.2, nonconformity=score)
    done(command(capsys, "calibrate", *words, "-o", tmp_path / "c"))
    words = data.options(calibration=tmp_path / "c")
    said = done(command(capsys, "evaluate", *words, "--constant", 0.3)).out
    (row,) = [line for line in said.splitlines() if f"pixel, {score} sets" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:5] == ["-"] * 4
    assert float(cells[5].removesuffix("%")) >= 80  # on the calibration images themselves
    assert "constant 0.3" in said
    result = command(capsys, "label", *words, "-o", tmp_path / "out")
    refused(result, "of the lac score to select labels")
    refused(
        command(
            capsys,
            "calibrate",
            *data.options(background=0, nonconformity="x"),
            "-o",
            tmp_path / "d",
        ),
        "a score among",
    )


# What is refused


def job(name: str, data: DataSet, made: Path, out: Path, /, **changed: object) -> list[str]:
    """The words of a job that works, but for what is changed."""
    own: dict[str, dict[str, object]] = {
        "calibrate": {"background": 0, "alpha": 0.3},
        "compact": {"background": 0},
        "label": {"calibration": made},
        "evaluate": {"calibration": made},
    }
    return [name, *data.options(**{**own[name], "output": out, **changed})]


JOBS = ("calibrate", "label", "evaluate", "compact")


@pytest.mark.parametrize("name", JOBS)
def test_the_jobs_work_when_nothing_is_changed(
    name: str, data: DataSet, calibration: Path, tmp_path: Path, capsys: Capture
) -> None:
    done(command(capsys, *job(name, data, calibration, tmp_path / "out")))
    assert (tmp_path / "out").exists()


CHANGES: list[tuple[str, dict[str, object], str]] = [
    *((name, {"root": "nowhere"}, "--root: expected a folder") for name in JOBS),
    *((name, {"probs": "nowhere"}, "--probs: expected a folder") for name in JOBS),
    *((name, {"ids": "nowhere.txt"}, "nowhere.txt: expected an id list") for name in JOBS),
    *((name, {"root": None}, "--root") for name in JOBS),
    *((name, {"unknown": "x"}, "--unknown") for name in JOBS),
    *((name, {"device": "abacus"}, "abacus") for name in JOBS),
    ("calibrate", {"background": None}, "--background"),
    ("compact", {"background": None}, "--background"),
    ("calibrate", {"background": "sky"}, "'sky'"),
    ("calibrate", {"background": 4}, "0..3"),
    ("calibrate", {"background": -1}, "-1"),
    ("compact", {"background": 4}, "0..3"),
    ("calibrate", {"output": None}, "--output"),
    ("label", {"output": None}, "--output"),
    *(("calibrate", {"alpha": alpha}, str(alpha)) for alpha in (0, 1, 2, -0.1, "x", "nan", "inf")),
    ("calibrate", {"alpha": "1/0"}, "alpha"),
    ("calibrate", {"alpha": "5%"}, "5%"),
    ("calibrate", {"variant": "voronoi"}, "voronoi"),
    *(("calibrate", {"grid": grid}, grid) for grid in ("0x5", "5", "5x", "axb", "5x5x5")),
    ("calibrate", {"grid": "-5x5"}, "--grid"),
    ("calibrate", {"variant": "blocks", "block": 0}, "block"),
    ("calibrate", {"variant": "blocks", "block": -3}, "block"),
    ("calibrate", {"block": "x"}, "--block"),
    ("calibrate", {"void": 256}, "0..255"),
    ("calibrate", {"void": "x"}, "0..255"),
    ("calibrate", {"class_map": "nowhere.json"}, "nowhere.json"),
    ("calibrate", {"mask_map": "nowhere.json"}, "nowhere.json"),
    ("label", {"calibration": "nowhere"}, "nowhere"),
    ("label", {"labelled": "nowhere.txt"}, "nowhere.txt"),
    ("evaluate", {"calibration": None}, "--calibration"),
    ("evaluate", {"constant": "x"}, "--constant"),
]


@pytest.mark.parametrize(("name", "changed", "part"), CHANGES, ids=str)
def test_bad_options_are_refused_in_one_line_and_leave_nothing(
    name: str,
    changed: dict[str, object],
    part: str,
    data: DataSet,
    calibration: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    before = files(tmp_path)
    result = command(capsys, *job(name, data, calibration, tmp_path / "out", **changed))
    refused(result, part)
    after = files(tmp_path)
    after.pop("out/run.json", None)
    assert after == before


def damage(kind: str, data: DataSet) -> str:
    """Spoil the input in one way; returns what the message must say."""
    image = data.images[2]
    path = data.score_file(image)
    scores = data.scores[image]
    if kind == "no scores for an image":
        path.unlink()
        return "images/02.npy | .npz | .safetensors"
    if kind == "ids of images without scores":
        data.ids.write_text("images/99.png masks/99.png\n")
        return "images/99.npy | .npz | .safetensors"
    if kind == "empty list":
        data.ids.write_text("")
        return f"{data.ids}: expected"
    if kind == "blank last line":
        data.ids.write_text(data.ids.read_text() + "\n")
        return f"{data.ids}, line 13: "
    if kind == "list that is a folder":
        data.ids.unlink()
        data.ids.mkdir()
        return f"{data.ids}: expected images"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "not numpy":
        path.write_bytes(b"PK not really")
    elif kind == "compressed and damaged":
        path.unlink()
        path = path.with_suffix(".npz")
        np.savez_compressed(path, probs=scores)
        spoilt = bytearray(path.read_bytes())
        spoilt[100:140] = bytes(b ^ 0xFF for b in spoilt[100:140])
        path.write_bytes(spoilt)
    elif kind == "nothing in it":
        np.save(path, scores[:, :0])
    elif kind == "no class axis":
        np.save(path, scores[0])
    elif kind == "integers":
        np.save(path, scores.astype(np.int32))
    elif kind == "unbounded":
        np.save(path, scores * np.float32(7.6))
    elif kind == "NaN":
        np.save(path, np.where(scores > 0.5, np.float32(np.nan), scores))
    elif kind == "more classes":
        np.save(path, np.concatenate([scores, scores[:1]]))
    elif kind == "fewer classes":
        np.save(path, scores[:3])
    elif kind == "two files":
        np.savez(path.with_suffix(".npz"), probs=scores)
        return str(path.with_suffix(""))
    return f"{path}: "


DAMAGES = (
    "no scores for an image",
    "ids of images without scores",
    "empty list",
    "blank last line",
    "list that is a folder",
    "truncated",
    "empty",
    "not numpy",
    "compressed and damaged",
    "nothing in it",
    "no class axis",
    "integers",
    "unbounded",
    "NaN",
    "more classes",
    "fewer classes",
    "two files",
)


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("kind", DAMAGES)
def test_bad_files_are_refused_in_one_line_and_leave_nothing_half_written(
    name: str, kind: str, data: DataSet, calibration: Path, tmp_path: Path, capsys: Capture
) -> None:
    part = damage(kind, data)
    if name == "compact" and kind.endswith(("more classes", "fewer classes")):
        pytest.skip("nothing there says how many classes there should be")
    before = files(tmp_path)
    out = tmp_path / "out"
    refused(command(capsys, *job(name, data, calibration, out), "--workers", "1"), part)
    left = {path: content for path, content in files(tmp_path).items() if path not in before}
    if name in ("label", "compact"):  # what comes before the bad file is whole and stays
        suffix = "png" if name == "label" else "safetensors"
        pattern = rf"out/(run\.json|\.manifest-0\.log|(masks/)?images/0[01]\.{suffix})"
        assert all(re.fullmatch(pattern, path) for path in left), left.keys()
    else:
        assert left == {}


@pytest.mark.parametrize(
    ("name", "spoil", "part"),
    [
        ("calibrate", "unlink", "02.png: No such file"),
        ("evaluate", "unlink", "02.png: No such file"),
        ("calibrate", "text", "a mask image"),
        ("calibrate", "rgb", "mode RGB"),
        ("evaluate", "transpose", "16x12"),
        ("calibrate", "254", "got 254"),
    ],
)
def test_bad_masks_are_refused(
    name: str,
    spoil: str,
    part: str,
    data: DataSet,
    calibration: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    path = data.mask_file(data.images[2])
    labels = data.labels[data.images[2]].copy()
    if spoil == "unlink":
        path.unlink()
    elif spoil == "text":
        path.write_text("text")
    elif spoil == "rgb":
        Image.fromarray(labels).convert("RGB").save(path)
    elif spoil == "transpose":
        Image.fromarray(labels.T.copy()).save(path)
    else:
        labels[0, 0] = 254
        Image.fromarray(labels).save(path)
    refused(command(capsys, *job(name, data, calibration, tmp_path / "out")), str(path), part)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["missing", "not an image", "another size"])
def test_bad_images_are_refused_by_label(
    kind: str, data: DataSet, calibration: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = data.root / data.images[2]
    if kind == "missing":
        path.unlink()
        part = "02.png: No such file"
    elif kind == "not an image":
        path.write_text("text")
        part = "expected an image"
    else:
        Image.new("RGB", (12, 16)).save(path)
        part = "[16, 12]"
    refused(command(capsys, *job("label", data, calibration, tmp_path / "out")), part)
    assert not (tmp_path / "out" / "ids.txt").exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "in JSON"),
        ("[]", "a JSON object"),
        ('{"0": 0}', "1 model classes"),
        ('{"0": 0, "1": 2, "2": 0, "3": 0}', "none for 1"),
        ('{"0": 0, "1": 0, "2": 0, "3": "car"}', "'car'"),
        ('{"map": {"0": 0}, "classes": null}', "'classes'"),
    ],
)
def test_bad_class_maps_are_refused(
    content: str, part: str, data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "map.json").write_text(content)
    words = job("calibrate", data, Path(), tmp_path / "out", class_map=tmp_path / "map.json")
    refused(command(capsys, *words), part)
    assert not (tmp_path / "out").exists()


def test_sums_above_one_point_to_the_class_map(
    data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    for image in data.images:
        np.save(data.score_file(image), np.full_like(data.scores[image], 0.9))  # sigmoids
    (tmp_path / "map.json").write_text('{"0": 0, "1": 1, "2": 1, "3": 0}')
    words = job("calibrate", data, Path(), tmp_path / "out", class_map=tmp_path / "map.json")
    refused(command(capsys, *words), str(data.score_file(data.images[0])), "1.8", "'max'")


@pytest.mark.parametrize("name", JOBS)
def test_an_output_below_a_file_is_refused(
    name: str, data: DataSet, calibration: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("text")
    before = files(tmp_path)
    result = command(capsys, *job(name, data, calibration, tmp_path / "file" / "out"))
    assert result.err.count("\n") == 1
    assert result.code == 2
    assert str(tmp_path / "file") in result.err
    assert files(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("name", JOBS)
def test_a_device_that_is_not_there_is_refused(
    name: str, data: DataSet, calibration: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = job(name, data, calibration, tmp_path / "out", device="cuda")
    refused(command(capsys, *words), "cuda")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="needs a user who may not write anywhere",
)
@pytest.mark.parametrize("name", JOBS)
def test_an_output_that_may_not_be_written_is_refused(
    name: str, data: DataSet, calibration: Path, tmp_path: Path, capsys: Capture
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    result = command(capsys, *job(name, data, calibration, locked / "out"))
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "Permission denied" in result.err
    assert files(locked) == {}


@pytest.mark.parametrize("name", ["calibrate", "evaluate"])
def test_an_output_that_is_a_folder_is_named(
    name: str, data: DataSet, calibration: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "out").mkdir()
    result = command(capsys, *job(name, data, calibration, tmp_path / "out"))
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert f"{tmp_path / 'out'}: " in result.err
    assert ".part" not in result.err
    assert files(tmp_path / "out") == {}
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("words", [[], ["unknown"], ["--unknown"], ["calibrate"]], ids=str)
def test_bad_commands_are_refused(words: list[str], capsys: Capture) -> None:
    refused(command(capsys, *words), "--help")


def test_scores_that_do_not_calibrate_leave_an_older_file(
    data: DataSet, calibration: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = calibration.read_bytes()
    damage("NaN", data)
    refused(command(capsys, *job("calibrate", data, calibration, calibration)), "NaN")
    assert calibration.read_bytes() == before


def test_evidence_does_not_calibrate(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    done(command(capsys, *job("compact", data, Path(), tmp_path / "evidence")))
    words = job("calibrate", data, Path(), tmp_path / "out", probs=tmp_path / "evidence")
    refused(command(capsys, *words), "00.safetensors: expected probabilities", "got evidence")


def test_the_folder_of_another_run_is_refused(
    data: DataSet, calibration: Path, tmp_path: Path, capsys: Capture
) -> None:
    done(command(capsys, *job("label", data, calibration, tmp_path / "out")))
    fewer = data.list_ids("fewer.txt", data.images[:3])
    words = job("label", data, calibration, tmp_path / "out", ids=fewer)
    refused(command(capsys, *words), f"{tmp_path / 'out'}: expected a new folder")
    refused(command(capsys, *job("compact", data, calibration, tmp_path / "out")), "another run")


# Terminals, pipes, processes


class Terminal:
    """The other end of a pseudo-terminal that stands in for stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ours, theirs = os.openpty()
        self._file = os.fdopen(theirs, "w")
        monkeypatch.setattr(sys, "stderr", self._file)
        monkeypatch.setenv("NO_COLOR", "1")

    def shown(self) -> str:
        self._file.close()
        text = b""
        while True:
            try:
                part = os.read(self._ours, 65536)
            except OSError:  # how Linux says that the other end is closed
                part = b""
            if not part:
                os.close(self._ours)
                return text.decode()
            text += part


@pytest.mark.parametrize("name", JOBS)
def test_a_terminal_shows_a_bar_and_a_pipe_does_not(
    name: str,
    data: DataSet,
    calibration: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done(command(capsys, *job(name, data, calibration, tmp_path / "piped")))
    terminal = Terminal(monkeypatch)
    assert main(job(name, data, calibration, tmp_path / "out")) == 0
    shown = terminal.shown()
    assert f"{name}:   0%|" in shown
    looks = 2 if name == "calibrate" else 1  # the second records what the images are like
    assert f"{12 * looks}/{12 * looks}" in shown
    _, rest = shown.rstrip("\r\n").rsplit("\r", 1)[-1], shown.split("\n", 1)[1]
    assert rest == "" or rest.startswith("cpseg: warning: 12 of these images were used")


def test_an_error_stands_on_a_line_of_its_own_below_the_bar(
    data: DataSet, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage("NaN", data)
    terminal = Terminal(monkeypatch)
    assert main(job("label", data, calibration, tmp_path / "out")) == 2
    lines = re.split(r"[\r\n]+", terminal.shown().rstrip())
    assert lines[-1].startswith("cpseg: error: ")


def test_output_that_nobody_reads_ends_quietly(data: DataSet, calibration: Path) -> None:
    words = ["evaluate", *data.options(calibration=calibration)]
    process = start(*words)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    complaint = process.stderr.read()
    process.wait(timeout=120)
    process.stderr.close()
    assert complaint == ""
    assert process.returncode == 0


def test_module_and_script_are_the_command() -> None:
    assert finish(start("--version")) == (0, f"cpseg {cpseg.__version__}\n", "")
    script = shutil.which("cpseg", path=str(Path(sys.executable).parent))
    assert script is not None
    assert "sys.exit(main())" in Path(script).read_text()


def test_a_map_that_takes_maxima_says_nothing_on_stderr(data: DataSet, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"map": {"0": 0, "1": 1, "2": 2, "3": 3}, "reduce": "max"}')
    words = job("calibrate", data, Path(), tmp_path / "c", class_map=tmp_path / "map.json")
    done(finish(start(*words)))


def test_an_error_in_a_process_is_exit_code_2(tmp_path: Path) -> None:
    words = options(root=tmp_path, ids=tmp_path / "x", probs=tmp_path, background=0)
    refused(finish(start("calibrate", *words, "-o", tmp_path / "c")), "No such file")


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in JOBS)], ids=str)
def test_help_is_printed(words: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    assert "usage: cpseg" in capsys.readouterr().out


# Errors of any kind


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("a\n b"), "RuntimeError: a b; --debug shows where it comes from"),
        (AssertionError(), "AssertionError: no message; --debug shows where it comes from"),
        (RecursionError("deep"), "RecursionError: deep; --debug shows where it comes from"),
        (MemoryError(), "MemoryError: no message; --debug shows where it comes from"),
        (ValueError(), "ValueError: no message; --debug shows where it comes from"),
        (ValueError("f: expected a, got b; c"), "f: expected a, got b; c"),
        (OSError(28, "No space left on device", "x"), "x: No space left on device"),
    ],
)
def test_every_error_is_one_line_and_debug_shows_its_trace(
    error: Exception,
    line: str,
    data: DataSet,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules["cpseg.jobs.calibrate"], "calibrate", fail)
    words = job("calibrate", data, Path(), tmp_path / "out")
    assert command(capsys, *words) == (2, "", f"cpseg: error: {line}\n")
    for debug in (["--debug", *words], [*words, "--debug"]):
        result = command(capsys, *debug)
        assert result.code == 2
        assert result.err.startswith("Traceback (most recent call last):\n")
        assert result.err.endswith(f"cpseg: error: {line}\n")


def test_debug_is_heard_where_the_options_are_wrong(capsys: Capture) -> None:
    result = command(capsys, "--debug", "label", "--unknown")
    assert result.code == 2
    assert "Traceback" in result.err


@pytest.mark.parametrize("text", ["[" * 100_000, '{"map":' * 100_000])
def test_a_class_map_nested_without_end_is_refused(
    text: str, data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "map.json").write_text(text)
    words = job("calibrate", data, Path(), tmp_path / "out", class_map=tmp_path / "map.json")
    refused(command(capsys, *words), str(tmp_path / "map.json"), "nested")


@pytest.mark.ci
def test_names_that_the_locale_cannot_hold_are_shown(
    data: DataSet, calibration: Path, tmp_path: Path, capsys: Capture
) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = job("label", data, calibration, tmp_path / "öut")
    result = finish(start(*words, env={**os.environ, **plain}))
    refused(result, "ut/ids.txt: expected text in UTF-8", "PYTHONUTF8=1")
    done(command(capsys, *words))

    for folder in ("images", "masks", "probs/images"):
        (path,) = (data.root / folder).glob("00.*")
        path.rename(path.with_stem("ü"))
    data.ids.write_text(data.ids.read_text().replace("00.png", "ü.png"), encoding="utf-8")
    words = job("label", data, calibration, tmp_path / "out")
    result = finish(start(*words, env={**os.environ, **plain}))
    refused(result, r"images/\xfc.png", "PYTHONUTF8=1")
    done(command(capsys, *words))


# Two at once

# Runs a command line for every line that comes in, so that two of these start at one moment.
WAITING = """
import contextlib, io, json, sys
import cpseg.jobs.label
from cpseg.cli import main
print("ready", flush=True)
for words in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(json.loads(words))
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Waiting:
    """The command in a process that is up and waits for words."""

    def __init__(self) -> None:
        self._process = start(code=WAITING, stdin=subprocess.PIPE)

    def tell(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def end(self) -> None:
        self._process.communicate(timeout=60)


@pytest.mark.nightly
@pytest.mark.parametrize("other", ["the same", "another"])
def test_of_two_runs_at_once_one_is_refused_and_the_folder_is_of_the_other(
    other: str, data: DataSet, calibration: Path, tmp_path: Path, capsys: Capture
) -> None:
    second = calibration
    if other == "another":
        second = tmp_path / "second.safetensors"
        made = calibrate(Source(data.root, data.probs), data.ids, alpha=0.1, background=0)
        made.save(second)
    wanted = []
    for path in (calibration, second):
        alone = tmp_path / f"alone_{path.stem}"
        shutil.rmtree(alone, ignore_errors=True)
        done(command(capsys, *job("label", data, path, alone)))
        wanted.append(files(alone / "masks"))
    both = [Waiting(), Waiting()]
    assert [each.hear() for each in both] == ["ready\n"] * 2
    refusals = 0
    for attempt in range(10):
        out = tmp_path / f"out{attempt}"
        for each, path in zip(both, (calibration, second), strict=True):
            each.tell(json.dumps(job("label", data, path, out)))
        results = [folders.Result(*json.loads(each.hear())) for each in both]
        codes = [result.code for result in results]
        assert 0 in codes, results
        for result in results:
            if result.code:
                refused(result, str(out), "choose another with -o")
                refusals += 1
        assert files(out / "masks") == wanted[codes.index(0)]
        left = {path.name for path in out.iterdir()}
        assert left == {path.name for path in (tmp_path / "alone_c").iterdir()}
    for each in both:
        each.end()
    assert refusals == 10 if other == "another" else refusals > 0


def test_an_interrupt_says_how_to_go_on(
    data: DataSet,
    calibration: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    result = command(capsys, *job("label", data, calibration, tmp_path / "out"))
    assert result == (130, "", "cpseg: interrupted; run the same command to go on\n")
    assert files(tmp_path / "out") == {}


def test_the_command_leaves_random_state_alone(
    data: DataSet, calibration: Path, tmp_path: Path, capsys: Capture
) -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    for name in JOBS:
        done(command(capsys, *job(name, data, calibration, tmp_path / f"out_{name}")))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tobytes() == before[1]  # noqa: NPY002


def test_the_help_of_every_subcommand_has_an_example_that_parses() -> None:
    modules = [module.__name__.rpartition(".")[2].rstrip("_") for module in SUBCOMMANDS]
    assert modules == list(HELP_TEXTS)
    for name, (description, example) in HELP_TEXTS.items():
        assert description.endswith(".")
        words = example.split()
        assert words[:2] == ["cpseg", name]
        arguments = parser().parse_args(words[1:])
        assert arguments.run is not None


def test_help_begins_with_what_is_required(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["label", "--help"])
    shown = capsys.readouterr().out
    required = shown[shown.index("\nrequired:") : shown.index("\noptions:")]
    # Python 3.13 writes "-o, --out OUT" where older ones write "-o OUT, --out OUT".
    names = [line.split()[0].rstrip(",") for line in required.splitlines() if line[:3] == "  -"]
    assert names == ["--root", "--ids", "--probs", "--calibration", "-o"]
    assert "--labelled" not in required
    assert shown.rstrip().endswith("-o labels")


def test_a_completion_script_names_subcommands_and_options(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit):
        parser().parse_args(["--print-completion", "bash"])
    script = capsys.readouterr().out
    assert "calibrate" in script
    assert "--recalibrate" in script
    monkeypatch.setitem(sys.modules, "shtab", None)
    refused(command(capsys, "--print-completion", "bash"), 'pip install "cpseg[completion]"')
