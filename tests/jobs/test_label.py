"""Masks and id lists for training code: right, whole, and the same after a kill."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support import folders
from tests.support.folders import (
    DataSet,
    complains,
    files,
    finish,
    nearest,
    newer,
    options,
    select,
    start,
)

from cpseg import Calibration
from cpseg.core.class_map import ClassMap
from cpseg.files.dataset import Source
from cpseg.files.id_lists import read_ids
from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.compact import compact
from cpseg.jobs.label import label
from cpseg.jobs.shift import Notice

SIZES = ((12, 16), (10, 20), (24, 32))


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return folders.make(tmp_path / "data", count=12, sizes=SIZES)


def source(data: DataSet) -> Source:
    return Source(data.root, data.probs)


def thresholds(data: DataSet, **settings: object) -> Calibration:
    chosen = {"alpha": 0.3, "background": 0, **settings}
    return calibrate(source(data), data.ids, **chosen)  # type: ignore[arg-type]


def masks(out: Path, data: DataSet) -> list[Path]:
    return [out / "masks" / image for image in data.images]


def as_unimatch(root: Path, ids: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Image and mask of every line, read the way UniMatch's dataset does."""
    lines = ids.read_text().splitlines()
    found = []
    for line in lines:
        image = Image.open(os.path.join(root, line.split(" ")[0])).convert("RGB")
        mask = Image.fromarray(np.array(Image.open(os.path.join(root, line.split(" ")[1]))))
        assert len(line.split(" ")) == 2
        found.append((np.array(image), np.array(mask)))
    return found


@pytest.mark.parametrize("background", [0, 2, None])
def test_masks_are_the_pseudo_labels_of_the_maps(
    data: DataSet, tmp_path: Path, background: int | None
) -> None:
    calibration = thresholds(data, background=background)
    label(source(data), data.ids, calibration, tmp_path / "out")
    seen = set()
    for image, path in zip(data.images, masks(tmp_path / "out", data), strict=True):
        probs = data.scores[image]
        limit = nearest(calibration.threshold.numpy(), (probs.shape[1], probs.shape[2]))
        with Image.open(path) as mask:
            assert (mask.format, mask.mode) == ("PNG", "P")
            found = np.array(mask)
        assert np.array_equal(found, select(probs, limit, background)), image
        seen |= set(found.ravel().tolist())
    assert seen == {0, 1, 2, 3, 255}, "the case is too tame"


def test_masks_are_those_of_the_tensor_function(data: DataSet, tmp_path: Path) -> None:
    calibration = thresholds(data, per_class=True, variant="image")
    label(source(data), data.ids, calibration, tmp_path / "out")
    for image, path in zip(data.images, masks(tmp_path / "out", data), strict=True):
        want = calibration.pseudo_labels(torch.from_numpy(data.scores[image]))
        assert np.array_equal(np.array(Image.open(path)), want)


@pytest.mark.parametrize("inside", [True, False])
def test_training_code_reads_the_list(data: DataSet, tmp_path: Path, inside: bool) -> None:
    out = (data.root if inside else tmp_path) / "out"
    ids = data.list_ids("images.txt", data.images, masks=False)
    label(source(data), ids, thresholds(data), out)
    lines = (out / "ids.txt").read_text().splitlines()
    assert [line.split(" ")[0] for line in lines] == data.images
    assert all(Path(line.split(" ")[1]).is_absolute() != inside for line in lines)
    for image, mask in as_unimatch(data.root, out / "ids.txt"):
        assert mask.dtype == np.uint8
        assert mask.shape == image.shape[:2]
        assert set(mask.ravel().tolist()) <= {0, 1, 2, 3, 255}


def test_relative_folders_give_lists_that_work_from_anywhere(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = thresholds(data)
    monkeypatch.chdir(tmp_path)
    relative = Source(Path("data"), Path("data/probs"))
    label(relative, "data/ids.txt", calibration, "out")
    label(relative, "data/ids.txt", calibration, "data/out")
    monkeypatch.chdir("/")
    for out in (tmp_path / "out", data.root / "out"):
        assert len(as_unimatch(data.root, out / "ids.txt")) == 12


def test_stage1_is_the_labelled_list_then_the_pseudo_labels(data: DataSet, tmp_path: Path) -> None:
    labelled = data.list_ids("labelled.txt", data.images[:4])
    unlabelled = data.list_ids("unlabelled.txt", data.images[4:])
    label(source(data), unlabelled, thresholds(data), tmp_path / "out", labelled=labelled)
    stage1 = (tmp_path / "out" / "stage1.txt").read_bytes()
    assert stage1 == labelled.read_bytes() + (tmp_path / "out" / "ids.txt").read_bytes()
    read = as_unimatch(data.root, tmp_path / "out" / "stage1.txt")
    assert len(read) == 12
    for image, (_, mask) in zip(data.images[:4], read, strict=False):
        assert np.array_equal(mask, data.labels[image])


def test_an_image_in_both_lists_keeps_its_true_mask(data: DataSet, tmp_path: Path) -> None:
    labelled = data.list_ids("labelled.txt", data.images[:4])
    label(source(data), data.ids, thresholds(data), tmp_path / "out", labelled=labelled)
    stage1 = read_ids(tmp_path / "out" / "stage1.txt")  # refuses an image twice
    assert stage1 == [*read_ids(labelled), *read_ids(tmp_path / "out" / "ids.txt")[4:]]


def test_true_masks_stored_otherwise_are_written_anew(data: DataSet, tmp_path: Path) -> None:
    """Training code reads the masks of a list alike: true ones and pseudo-labels."""
    truth = {image: data.labels[image].copy() for image in data.images}
    for image in data.images:
        stored = np.where(truth[image] == 255, 9, np.minimum(truth[image], 3) + 1)
        Image.fromarray(stored.astype(np.uint8)).save(data.mask_file(image))
    mask_map = ClassMap((None, 0, 1, 2, 3))
    mapped = Source(data.root, data.probs, mask_map=mask_map, void=9)
    calibration = calibrate(mapped, data.ids, alpha=0.3, background=0)
    calibration.save(tmp_path / "c")
    labelled = data.list_ids("labelled.txt", data.images[:4])
    unlabelled = data.list_ids("unlabelled.txt", data.images[4:])
    out = tmp_path / "out"
    label(source(data), unlabelled, Calibration.load(tmp_path / "c"), out, labelled=labelled)
    read = as_unimatch(data.root, out / "stage1.txt")
    assert len(read) == 12
    for image, (_, mask) in zip(data.images[:4], read, strict=False):
        assert np.array_equal(mask, truth[image])
    assert all(set(np.unique(mask)) <= {0, 1, 2, 3, 255} for _, mask in read)


def test_the_folder_says_what_made_it(data: DataSet, tmp_path: Path) -> None:
    calibration, out = thresholds(data), tmp_path / "out"
    label(source(data), data.ids, calibration, out)
    run = json.loads((out / "run.json").read_text())
    assert run["root"] == str(data.root.resolve())
    assert run["probs"] == str(data.probs.resolve())
    assert sorted(run) == ["cpseg", "fingerprint", "manifest", "probs", "root"]
    calibration.save(tmp_path / "c.safetensors")
    assert files(out)["calibration.safetensors"] == (tmp_path / "c.safetensors").read_bytes()


def test_masks_older_than_their_scores_are_made_again(data: DataSet, tmp_path: Path) -> None:
    calibration, out = thresholds(data), tmp_path / "out"
    label(source(data), data.ids, calibration, out)
    before = files(out)
    flipped = data.scores[data.images[0]][::-1].copy()
    np.save(data.score_file(data.images[0]), flipped)
    newer(data.score_file(data.images[0]))
    label(source(data), data.ids, calibration, out)
    changed = {name for name, text in files(out).items() if text != before[name]}
    assert changed == {f"masks/{data.images[0]}", "summary.csv", "manifest.jsonl"}
    want = calibration.pseudo_labels(torch.from_numpy(flipped))
    assert np.array_equal(np.array(Image.open(masks(out, data)[0])), want)


@pytest.mark.parametrize("time", ["older", "the same"])
@pytest.mark.parametrize("way", ["written over", "moved there"])
def test_replaced_scores_are_noticed_whatever_their_time(
    data: DataSet, tmp_path: Path, time: str, way: str
) -> None:
    """As rsync -a, cp -p and tar leave them; files of one shape have one size."""
    calibration, out = thresholds(data), tmp_path / "out"
    label(source(data), data.ids, calibration, out)
    path = data.score_file(data.images[0])
    was = path.stat()
    flipped = data.scores[data.images[0]][::-1].copy()
    if way == "written over":
        np.save(path, flipped)
    else:
        np.save(tmp_path / "new.npy", flipped)
        os.replace(tmp_path / "new.npy", path)
    when = was.st_mtime_ns - (3600 * 10**9 if time == "older" else 0)
    os.utime(path, ns=(when, when))
    assert path.stat().st_size == was.st_size
    label(source(data), data.ids, calibration, out)
    want = calibration.pseudo_labels(torch.from_numpy(flipped))
    assert np.array_equal(np.array(Image.open(masks(out, data)[0])), want)


def test_a_replaced_image_is_noticed(data: DataSet, tmp_path: Path) -> None:
    calibration, out = thresholds(data), tmp_path / "out"
    label(source(data), data.ids, calibration, out)
    Image.fromarray(np.zeros((20, 10, 3), np.uint8)).save(data.root / data.images[1])
    with pytest.raises(ValueError, match="image's size"):
        label(source(data), data.ids, calibration, out)


def test_a_file_that_is_not_the_mask_that_was_written_is_made_again(
    data: DataSet, tmp_path: Path
) -> None:
    calibration, out = thresholds(data), tmp_path / "out"
    label(source(data), data.ids, calibration, out)
    before = files(out)
    empty, foreign, torn, same_size = masks(out, data)[:4]
    empty.write_bytes(b"")
    Image.fromarray(np.zeros((3, 4), np.uint8)).save(foreign)
    torn.write_bytes(torn.read_bytes()[:-20])
    changed = bytearray(same_size.read_bytes())
    changed[60] ^= 1  # a colour of the palette
    same_size.write_bytes(changed)
    label(source(data), data.ids, calibration, out)
    assert files(out) == before


def made_by_an_older_version(out: Path) -> None:
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(
        json.dumps({name: run[name] for name in ("cpseg", "fingerprint")})
    )
    (out / "manifest.jsonl").unlink()
    (out / "calibration.safetensors").unlink()


def test_the_folder_of_an_older_version_is_taken_over(data: DataSet, tmp_path: Path) -> None:
    calibration, out = thresholds(data), tmp_path / "out"
    label(source(data), data.ids, calibration, out)
    before = files(out)
    times = {path: path.stat().st_mtime_ns for path in masks(out, data)[3:]}
    made_by_an_older_version(out)
    masks(out, data)[0].write_bytes(b"")
    Image.fromarray(np.zeros((3, 4), np.uint8)).save(masks(out, data)[1])
    newer(data.score_file(data.images[2]))
    label(source(data), data.ids, calibration, out)
    assert {path: path.stat().st_mtime_ns for path in times} == times, "made again"
    after = files(out)
    assert {**after, "manifest.jsonl": b""} == {**before, "manifest.jsonl": b""}

    # From now on its masks are recorded, and an older time is no excuse.
    path = data.score_file(data.images[5])
    flipped = data.scores[data.images[5]][::-1].copy()
    np.save(path, flipped)
    os.utime(path, ns=(10**18, 10**18))
    label(source(data), data.ids, calibration, out)
    want = calibration.pseudo_labels(torch.from_numpy(flipped))
    assert np.array_equal(np.array(Image.open(masks(out, data)[5])), want)


@pytest.mark.parametrize("text", ["", "{", "[]", "null\n{}\n"])
def test_masks_of_a_damaged_manifest_are_made_again(
    data: DataSet, tmp_path: Path, text: str
) -> None:
    calibration, out = thresholds(data), tmp_path / "out"
    label(source(data), data.ids, calibration, out)
    before = files(out)
    (out / "manifest.jsonl").write_text(text)
    masks(out, data)[0].write_bytes(b"")
    label(source(data), data.ids, calibration, out)
    assert files(out) == before


def test_without_a_labelled_list_there_is_no_stage1(data: DataSet, tmp_path: Path) -> None:
    label(source(data), data.ids, thresholds(data), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "masks",
        "ids.txt",
        "summary.csv",
        "run.json",
        "manifest.jsonl",
        "calibration.safetensors",
    }


def test_summary_counts_the_pixels_of_the_masks(data: DataSet, tmp_path: Path) -> None:
    kept = label(source(data), data.ids, thresholds(data), tmp_path / "out")
    text = (tmp_path / "out" / "summary.csv").read_text()
    lines = list(csv.DictReader(io.StringIO(text)))
    assert text.splitlines()[0] == "image,kept_share,ignored,class_0,class_1,class_2,class_3"
    pixels = labelled = 0
    for image, line in zip(data.images, lines, strict=True):
        mask = np.array(Image.open(tmp_path / "out" / "masks" / image))
        assert line["image"] == image
        assert int(line["ignored"]) == (mask == 255).sum()
        assert [int(line[f"class_{k}"]) for k in range(4)] == [(mask == k).sum() for k in range(4)]
        assert float(line["kept_share"]) == pytest.approx((mask != 255).mean(), abs=1e-6)
        pixels, labelled = pixels + mask.size, labelled + int((mask != 255).sum())
    assert kept == labelled / pixels


def test_masks_of_an_older_version_are_counted_too(data: DataSet, tmp_path: Path) -> None:
    calibration, out = thresholds(data), tmp_path / "out"
    label(source(data), data.ids, calibration, out)
    before = files(out)
    entries = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    for entry in entries[::2]:  # as version 0.1 recorded them, or an earlier state of this one
        entry["facts"] = {name: entry["facts"][name] for name in ("kept", "largest", "same")}
        del entry["crc32"]
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in entries))
    (out / "summary.csv").unlink()
    label(source(data), data.ids, calibration, out)
    assert files(out)["summary.csv"] == before["summary.csv"]


@pytest.mark.parametrize("background", [0, None])
def test_evidence_gives_the_same_bytes_as_the_maps(
    data: DataSet, tmp_path: Path, background: int | None
) -> None:
    calibration = thresholds(data, background=background)
    compact(source(data), data.ids, tmp_path / "evidence", background=background)
    label(source(data), data.ids, calibration, tmp_path / "maps")
    label(Source(data.root, tmp_path / "evidence"), data.ids, calibration, tmp_path / "short")
    assert files(tmp_path / "maps" / "masks") == files(tmp_path / "short" / "masks")
    assert files(tmp_path / "maps")["summary.csv"] == files(tmp_path / "short")["summary.csv"]


def test_evidence_that_does_not_fit_is_refused(data: DataSet, tmp_path: Path) -> None:
    compact(source(data), data.ids, tmp_path / "evidence", background=0)
    short = Source(data.root, tmp_path / "evidence")
    first = tmp_path / "evidence" / "images" / "00.safetensors"
    cases = {
        "background": thresholds(data, background=1),
        "classes": replace(thresholds(data), num_classes=5),
        "per class": thresholds(data, per_class=True),
    }
    for part, calibration in cases.items():
        with pytest.raises(ValueError, match=part) as caught:
            label(short, data.ids, calibration, tmp_path / "out")
        assert str(caught.value).startswith(f"{first}: ")
        assert not list((tmp_path / "out").rglob("*.png"))
        shutil.rmtree(tmp_path / "out")


def test_scores_that_are_not_of_the_image_size_are_refused(data: DataSet, tmp_path: Path) -> None:
    calibration = thresholds(data)
    image = data.images[1]
    Image.fromarray(np.zeros((20, 10, 3), np.uint8)).save(data.root / image)  # transposed
    with pytest.raises(ValueError, match="image's size") as caught:
        label(source(data), data.ids, calibration, tmp_path / "out")
    complains(caught.value, data.score_file(image), "[20, 10]", "got [10, 20]")
    assert not (tmp_path / "out" / "masks" / image).exists()
    assert not (tmp_path / "out" / "ids.txt").exists()


@pytest.mark.parametrize("where", ["absolute", "above"])
def test_an_image_outside_the_root_is_refused(data: DataSet, tmp_path: Path, where: str) -> None:
    listed = str(data.root / data.images[0]) if where == "absolute" else "../x.png"
    (data.root / "outside.txt").write_text(f"{listed}\n")
    with pytest.raises(ValueError, match="below the root") as caught:
        label(source(data), data.root / "outside.txt", thresholds(data), tmp_path / "out")
    complains(caught.value, "id list", listed)
    assert not (tmp_path / "out").exists()


def test_two_images_with_one_mask_are_refused(data: DataSet, tmp_path: Path) -> None:
    (data.root / "two.txt").write_text("images/00.png\nimages/00.jpg\n")
    with pytest.raises(ValueError, match="rename one") as caught:
        label(source(data), data.root / "two.txt", thresholds(data), tmp_path / "out")
    complains(caught.value, "label", "images/00.png and images/00.jpg")


def test_a_folder_that_no_list_holds_is_refused_before_the_work(
    data: DataSet, tmp_path: Path
) -> None:
    out = tmp_path / "out\tof root"
    with pytest.raises(ValueError, match="without white space") as caught:
        label(source(data), data.ids, thresholds(data), out)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(out.rglob("*.png")), "the whole run was done first"


def test_where_paths_have_spaces_the_lists_have_tabs_and_that_is_said(
    data: DataSet, tmp_path: Path
) -> None:
    out, said = tmp_path / "out of root", list[Notice]()
    label(source(data), data.ids, thresholds(data), out, tell=said.append)
    assert "separated by tabs" in said[-1].text
    assert said[-1].is_warning
    image, mask = (out / "ids.txt").read_text().splitlines()[0].split("\t")
    assert (image, mask) == (data.images[0], str(out / "masks" / image))


def test_a_space_above_the_root_does_no_harm(tmp_path: Path) -> None:
    data = folders.make(tmp_path / "my data", count=5)
    label(source(data), data.ids, thresholds(data), data.root / "out")
    assert len(as_unimatch(data.root, data.root / "out" / "ids.txt")) == 5


def test_too_many_classes_for_a_mask_are_refused(data: DataSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="255 classes") as caught:
        label(source(data), data.ids, replace(thresholds(data), num_classes=256), tmp_path / "o")
    complains(caught.value, "label", "got 256 classes")


def test_more_labelled_images_than_the_list_holds_do_no_harm_to_the_masks_of_others(
    data: DataSet, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="'image mask'"):
        label(
            source(data),
            data.ids,
            thresholds(data),
            tmp_path / "out",
            labelled=data.list_ids("one_column.txt", data.images, masks=False),
        )
    assert not (tmp_path / "out").exists(), "refused before the work"


def test_masks_that_are_not_of_a_run_are_never_taken_for_pseudo_labels(
    data: DataSet, tmp_path: Path
) -> None:
    """OUT that holds true masks where ours would go: refused or replaced, not listed as ours."""
    calibration = thresholds(data)
    shutil.copytree(data.root / "masks", tmp_path / "out" / "masks" / "images")
    theirs = files(tmp_path / "out" / "masks")
    label(source(data), data.ids, calibration, tmp_path / "fresh")
    wanted = files(tmp_path / "fresh" / "masks")
    with contextlib.suppress(ValueError):
        label(source(data), data.ids, calibration, tmp_path / "out")
        theirs = wanted
    assert files(tmp_path / "out" / "masks") == theirs


# Runs that stop


def test_a_second_run_changes_nothing(data: DataSet, tmp_path: Path) -> None:
    calibration, out = thresholds(data), tmp_path / "out"
    label(source(data), data.ids, calibration, out)
    before = files(out)
    times = [path.stat().st_mtime_ns for path in masks(out, data)]
    label(source(data), data.ids, calibration, out)
    assert files(out) == before
    assert [path.stat().st_mtime_ns for path in masks(out, data)] == times


def test_a_missing_mask_is_made_again(data: DataSet, tmp_path: Path) -> None:
    calibration, out = thresholds(data), tmp_path / "out"
    label(source(data), data.ids, calibration, out)
    before = files(out)
    masks(out, data)[5].unlink()
    label(source(data), data.ids, calibration, out)
    assert files(out) == before


def test_the_folder_of_another_run_is_refused(data: DataSet, tmp_path: Path) -> None:
    calibration, out = thresholds(data), tmp_path / "out"
    label(source(data), data.ids, calibration, out)
    before = files(out)
    shutil.copytree(data.probs, tmp_path / "probs")
    shutil.copytree(data.root, tmp_path / "moved")
    fewer = data.list_ids("fewer.txt", data.images[:5])
    others = {
        "thresholds": (source(data), data.ids, thresholds(data, alpha=0.2)),
        "background": (source(data), data.ids, replace(calibration, background=1)),
        "scores": (Source(data.root, tmp_path / "probs"), data.ids, calibration),
        "images": (source(data), fewer, calibration),
        "root": (Source(tmp_path / "moved", data.probs), data.ids, calibration),
        "class map": (
            Source(data.root, data.probs, class_map=ClassMap((1, 0, 2, 3))),
            data.ids,
            calibration,
        ),
        "thresholds of classes": (
            source(data),
            data.ids,
            replace(calibration, class_threshold=calibration.threshold.expand(4, -1, -1)),
        ),
    }
    for case, (other, ids, chosen) in others.items():
        with pytest.raises(ValueError, match="another run") as caught:
            label(other, ids, chosen, out)
        complains(caught.value, out, "choose another with -o")
        assert files(out) == before, case


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_a_damaged_manifest_is_another_run(data: DataSet, tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(content)
    with pytest.raises(ValueError, match="another run"):
        label(source(data), data.ids, thresholds(data), tmp_path / "out")


def run_of(data: DataSet, calibration: Path, out: Path) -> list[str]:
    return ["label", *data.options(calibration=calibration), "-o", str(out)]


# A kill at the worst moment: the fifth mask is written but not yet under its name.
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")

KILLED = f"""
import os, sys
from cpseg.cli import main
replace, done = os.replace, []
def kill(part, name):
    if str(name).endswith(".png"):
        done.append(name)
        if len(done) == 5:
            os.kill(os.getpid(), {int(getattr(signal, "SIGKILL", 9))})
    replace(part, name)
os.replace = kill
sys.exit(main(sys.argv[1:]))
"""


@posix
def test_a_killed_run_goes_on_where_it_stopped(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    calibration = thresholds(data)
    calibration.save(tmp_path / "c.safetensors")
    words = [*run_of(data, tmp_path / "c.safetensors", out), "--workers", "1"]
    killed = finish(start(*words, code=KILLED))
    assert killed.code == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert sorted(finished) == masks(out, data)[:4]
    assert len(list(out.rglob(".*.part"))) == 1
    assert not (out / "ids.txt").exists()
    assert not (out / "summary.csv").exists()

    folders.done(folders.command(capsys, *words))
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "made again"
    assert not list(out.rglob("*.part"))
    label(source(data), data.ids, calibration, whole)
    ours, theirs = files(out), files(whole)
    assert ours.pop("ids.txt") == theirs.pop("ids.txt").replace(bytes(whole), bytes(out))
    assert ours == theirs


LIMITED = """
import resource, sys
from cpseg.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


@posix
@pytest.mark.parametrize("workers", [1, 3])
def test_a_full_disk_ends_in_one_line_and_a_rerun_completes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    data = folders.make(tmp_path / "data", count=6, sizes=((12, 16), (12, 16), (96, 128)))
    calibration = calibrate(source(data), data.ids, alpha=0.3, background=0, grid=(12, 16))
    calibration.save(tmp_path / "c.safetensors")
    out, whole = tmp_path / "out", tmp_path / "whole"
    label(source(data), data.ids, calibration, whole)
    sizes = [path.stat().st_size for path in masks(whole, data)]
    limit = (max(sizes[:2]) + sizes[2]) // 2
    assert max(sizes[:2]) < limit < sizes[2]

    words = [*run_of(data, tmp_path / "c.safetensors", out), "--workers", workers]
    stopped = finish(start(limit, *words, code=LIMITED))
    folders.refused(stopped, "too large")
    written = sorted(out.rglob("*.png"))
    assert written[:2] == masks(out, data)[:2]  # with several, smaller ones that were in work too
    assert set(written) <= {path for path in masks(out, data) if path.stem not in ("02", "05")}
    assert workers > 1 or len(written) == 2
    assert not list(out.rglob("*.part"))
    assert not (out / "ids.txt").exists()
    folders.done(folders.command(capsys, *words))
    ours, theirs = files(out), files(whole)
    assert ours.pop("ids.txt") == theirs.pop("ids.txt").replace(bytes(whole), bytes(out))
    assert ours == theirs


def test_the_message_of_a_full_disk_names_the_folder_and_no_hidden_file(
    data: DataSet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thresholds(data).save(tmp_path / "c.safetensors")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    words = ["label", *data.options(), *options(calibration=tmp_path / "c.safetensors")]
    result = folders.command(capsys, *words, "-o", tmp_path / "out")
    folders.refused(result, "No space left on device", str(tmp_path / "out"))
    assert ".part" not in result.err
    assert files(tmp_path / "out") == {}
