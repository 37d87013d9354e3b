"""`cpseg certify`: the parts of the labelled images, what is printed, refused and left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tests.support import folders
from tests.support.data import CAMVID as ROOT
from tests.support.folders import DataSet, command, done, files, refused
from tests.support.processes import ranks_of

from cpseg import Calibration, Calibrator, Certifier, groups
from cpseg.files.dataset import Source
from cpseg.files.id_lists import read_ids
from cpseg.jobs.certify import certify

Capture = pytest.CaptureFixture[str]
EASY = {"background": "none", "max_error": 0.4, "delta": 0.2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return folders.make(tmp_path_factory.mktemp("data"), count=40)


def source(data: DataSet) -> Source:
    return Source(data.root, data.probs)


def test_from_the_list_to_masks(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    some = data.list_ids("some.txt", data.images[:36])
    rest = data.list_ids("rest.txt", data.images[36:])
    made = tmp_path / "c.safetensors"
    result = done(command(capsys, "certify", *data.options(ids=some, **EASY), "-o", made))
    calibration = Calibration.load(made)
    certificate = calibration.certificate
    assert certificate is not None
    assert result.out == f"{made}: {certificate}\n"
    assert certificate.num_images == 29
    assert calibration.num_images == 7, "a fifth of 36"
    assert calibration.variant == "image"
    seen = (calibration.extra["images"], calibration.extra["certifying_images"])
    assert sorted([*seen[0], *seen[1]]) == data.images[:36]

    heldout = data.options(ids=rest, calibration=made)
    result = done(command(capsys, "evaluate", *heldout))
    assert f"promised: {certificate}\n" in result.out
    done(command(capsys, "label", *heldout, "-o", tmp_path / "out"))
    mask = np.array(Image.open(tmp_path / "out" / "masks" / data.images[36]))
    want = calibration.pseudo_labels(torch.from_numpy(data.scores[data.images[36]]))
    assert np.array_equal(mask, want.numpy())


def test_it_is_what_the_library_does_by_hand(data: DataSet) -> None:
    made = certify(source(data), data.ids, background=0, max_error=0.4, delta=0.2, seed=3)
    setting = made.extra["images"]
    calibrator = Calibrator(groups.image((12, 16)), alpha="0.995", background=0, num_classes=4)
    loaded = source(data)
    pairs = {pair.image: pair for pair in read_ids(data.ids)}

    def load(image: str) -> tuple[Any, Any]:
        probs = loaded.probabilities(data.score_file(image))
        return probs, loaded.labels(pairs[image], 4, (12, 16))

    for image in setting:
        calibrator.update(*load(image), ids=image)
    certifier = Certifier(calibrator, max_error=0.4, delta=0.2, seed=3)
    for image in setting:
        certifier.learn_order(*load(image), ids=image)
    for image in sorted(set(data.images) - set(setting), reverse=True):
        certifier.update(*load(image), ids=image)
    assert certifier.compute().certificate == made.certificate


def test_the_parts_are_drawn_by_name_and_seed(data: DataSet) -> None:
    backwards = data.list_ids("backwards.txt", data.images[::-1])
    drawn = []
    for ids, seed in ((data.ids, 0), (backwards, 0), (data.ids, 1)):
        made = certify(source(data), ids, background=None, max_error=0.4, seed=seed)
        drawn.append(made.extra["images"])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 8
    assert drawn[0] != sorted(data.images)[:8]


def test_the_grid_is_that_of_the_first_listed_image(tmp_path: Path) -> None:
    data = folders.make(tmp_path / "data", count=30, sizes=((12, 16), (10, 20), (24, 32)))
    for first in range(3):
        ids = data.list_ids("ids.txt", data.images[first:])
        made = certify(source(data), ids, background=None, max_error=0.9, seed=first)
        assert made.grid == data.scores[data.images[first]].shape[1:]


def test_a_list_of_its_own_sets_the_thresholds(
    data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    first = data.list_ids("first.txt", data.images[:10])
    others = data.list_ids("others.txt", data.images[10:])
    made = tmp_path / "c.safetensors"
    words = data.options(ids=others, calibration_ids=first, **EASY)
    done(command(capsys, "certify", *words, "-o", made))
    calibration = Calibration.load(made)
    assert calibration.extra["images"] == data.images[:10]
    assert calibration.extra["certifying_images"] == data.images[10:]
    overlapping = data.list_ids("overlapping.txt", data.images[9:])
    words = data.options(ids=overlapping, calibration_ids=first, **EASY)
    result = command(capsys, "certify", *words, "-o", tmp_path / "no")
    refused(result, "images in one of the two lists, got images/09.png in both")


def test_per_class(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    made = tmp_path / "c.safetensors"
    words = data.options(per_class=True, per="image", **{**EASY, "max_error": 0.6})
    result = done(command(capsys, "certify", *words, "-o", made))
    certificate = Calibration.load(made).certificate
    assert certificate is not None
    assert certificate.classes is not None
    table = result.out.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in table] == ["class", "---", *"0123"]
    assert any(row["certified"] for row in certificate.classes)
    for row, line in zip(certificate.classes, table[2:], strict=True):
        cells = [cell.strip() for cell in line.split("|")[2:6]]
        if row["certified"]:
            seen = (row["pooled_error"], row["mean_error"], row["kept"])
            assert cells == [f"{row['alpha']:g}", *(f"{100 * share:.1f} %" for share in seen)]
        else:
            assert cells == ["none", "-", "-", "-"]


def test_what_cannot_be_certified_leaves_no_file(
    data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    words = data.options(background=0, max_error=0.05)
    result = command(capsys, "certify", *words, "-o", tmp_path / "c.safetensors")
    assert (result.code, result.out) == (1, "")
    assert result.err == (
        "cpseg: not certified: 32 images: an error of 5 % cannot be certified, with 90 % "
        "confidence (Learn-then-Test, betting, per labels); that needs at least 50 images "
        "without any error; an audit of the labels (cpseg audit) needs no labelled images\n"
    )
    assert files(tmp_path) == {}
    words = data.options(background=0, max_error=0.05, pvalue="hoeffding-bentkus")
    result = command(capsys, "certify", *words, "-o", tmp_path / "c.safetensors")
    assert "needs at least 47 images" in result.err
    words = data.options(background=0, method="crc", per="image")
    refused(command(capsys, "certify", *words, "-o", tmp_path / "c.safetensors"), "leave --per out")


def test_evaluate_warns_of_images_that_made_the_calibration(
    data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    some = data.list_ids("some.txt", data.images[:36])
    late = data.list_ids("late.txt", data.images[35:])
    made, plain = tmp_path / "c.safetensors", tmp_path / "plain.safetensors"
    done(command(capsys, "certify", *data.options(ids=some, **EASY), "-o", made))
    words = data.options(ids=some, background="none", variant="image")
    done(command(capsys, "calibrate", *words, "-o", plain))
    for calibration in (made, plain):
        result = command(capsys, "evaluate", *data.options(ids=late, calibration=calibration))
        assert result.code == 0
        assert result.err == (
            "cpseg: warning: 1 of these images were used for the calibration, for example "
            "images/35.png: "
            "figures on them are too good; evaluate on other labelled images\n"
        )


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"max_error": "5%"}, ["max_error in (0, 1), got '5%'"]),
        ({"max_error": "0"}, ["max_error in (0, 1)"]),
        ({"delta": "1"}, ["delta in (0, 1)"]),
        ({"delta": "-0.1"}, ["delta in (0, 1)"]),
        ({"background": None}, ["--background"]),
        ({"background": "4"}, ["background in 0..3 or None, got 4"]),
        ({"variant": "kmeans"}, ["--variant", "kmeans"]),
        ({"method": "rcps"}, ["--method", "rcps"]),
        ({"pvalue": "t"}, ["--pvalue"]),
        ({"calibrate_share": "0"}, ["splits 40 images in two, got 0"]),
        ({"calibrate_share": "1"}, ["splits 40 images in two, got 1"]),
        ({"calibrate_share": "0.01"}, ["splits 40 images in two, got 0.01"]),
        ({"calibration_ids": "nowhere.txt"}, ["nowhere.txt"]),
        ({"seed": "-1"}, ["--seed"]),
    ],
)
def test_bad_options(
    changed: dict[str, Any], parts: list[str], data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    words = data.options(**{**EASY, **changed})
    refused(command(capsys, "certify", *words, "-o", tmp_path / "c.safetensors"), *parts)
    assert files(tmp_path) == {}


def test_one_labelled_image_cannot_be_split(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    one = data.list_ids("one.txt", data.images[:1])
    result = command(capsys, "certify", *data.options(ids=one, **EASY), "-o", tmp_path / "c")
    refused(result, "splits 1 images in two")


def test_an_image_of_another_number_of_classes(tmp_path: Path, capsys: Capture) -> None:
    data = folders.make(tmp_path / "data", count=10)
    path = data.score_file(data.images[4])
    np.save(path, data.scores[data.images[4]][:3])
    result = command(capsys, "certify", *data.options(**EASY), "-o", tmp_path / "c")
    refused(result, "classes like the first image")


@pytest.mark.nightly
@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
def test_ranks_give_the_bytes_of_one_process(
    data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    runs = [
        ["certify", *data.options(**EASY), "-o", str(out / "c.safetensors")],
        ["certify", *data.options(per_class=True, method="crc", **EASY), "-o", str(out / "d")],
    ]
    printed = "".join(done(command(capsys, *words)).out for words in runs)
    wanted = files(out)
    for path in out.iterdir():
        path.unlink()
    ranks = ranks_of(2, runs)
    assert [code for code, _, _ in ranks] == [0, 0], ranks
    assert [said for _, said, _ in ranks] == [printed, ""]
    assert files(out) == wanted


@pytest.mark.parametrize(("per", "max_error"), [("labels", 0.25), ("image", 0.2)])
@pytest.mark.skipif(not ROOT.is_dir(), reason="no CamVid in ../shared/data/camvid")
def test_camvid_keeps_its_certificate(per: str, max_error: float) -> None:
    """100 labelled images, raw scores; betting keeps more than Hoeffding-Bentkus."""
    data = Source(ROOT, ROOT / "probs")
    labelled = ROOT / "labelled_100.txt"
    made = certify(data, labelled, background=None, max_error=max_error, per=per)
    certificate = made.certificate
    assert certificate is not None
    assert certificate.certified
    assert certificate.num_images == 80
    assert certificate.beside is not None
    assert certificate.kept >= certificate.beside["kept"]
    wrong, kept = [], []
    for pair in read_ids(ROOT / "heldout.txt"):
        probs = data.probabilities(ROOT / "probs" / f"{Path(pair.image).stem}.npz")
        truth = data.labels(pair, len(probs), (probs.shape[1], probs.shape[2]))
        chosen = made.pseudo_labels(probs)
        on = (chosen != 255) & (truth != 255)
        wrong.append(float((on & (chosen != truth)).sum()))
        kept.append(float(on.sum()))
    errors = np.divide(wrong, kept, out=np.full(len(kept), np.nan), where=np.array(kept) > 0)
    assert (sum(wrong) / sum(kept) if per == "labels" else np.nanmean(errors)) <= max_error
