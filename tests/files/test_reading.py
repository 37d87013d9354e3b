"""Scores as people have them: logits, classes last, low resolution, of torch, one file for all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.support.folders import DataSet, command, complains, done, files, make, refused
from torch import Tensor

from cpseg import Calibration
from cpseg.calibration.provenance import Provenance
from cpseg.core.score_reading import ScoreReading, parse_reading
from cpseg.files import dataset, score_files
from cpseg.files.dataset import LabelledImages, ScoreFolder, Source
from cpseg.files.id_lists import Pair, read_ids
from cpseg.files.score_files import find_scores, read_scores, read_shape
from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.label import label
from cpseg.jobs.sources import as_calibrated


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return make(tmp_path / "data")


def bilinear(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """``[K, h, w]`` at another size, by the formula of ``align_corners=False``."""
    out = np.zeros((len(values), height, width))
    for i in range(height):
        for j in range(width):
            y = max((i + 0.5) * values.shape[1] / height - 0.5, 0)
            x = max((j + 0.5) * values.shape[2] / width - 0.5, 0)
            top, left = int(y), int(x)
            down, right = min(top + 1, values.shape[1] - 1), min(left + 1, values.shape[2] - 1)
            above = values[:, top, left] * (1 - x + left) + values[:, top, right] * (x - left)
            below = values[:, down, left] * (1 - x + left) + values[:, down, right] * (x - left)
            out[:, i, j] = above * (1 - y + top) + below * (y - top)
    return out


def softmax(values: np.ndarray) -> np.ndarray:
    odds = np.exp(values - values.max(0))
    return np.asarray(odds / odds.sum(0))


def read(path: Path, *words: Any, size: tuple[int, int] | None = None) -> Tensor:
    found = read_scores(path, reading=ScoreReading(*words), size=size)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_each_reading_is_what_its_formula_says(tmp_path: Path, dtype: type) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(dtype) * 3
    wide = logits.astype(np.float64)
    np.save(tmp_path / "a.npy", logits)
    np.save(tmp_path / "last.npy", logits.transpose(1, 2, 0))
    np.save(tmp_path / "probs.npy", softmax(wide).astype(np.float32))
    close = {"rtol": 1e-3, "atol": 1e-5} if dtype == np.float16 else {"rtol": 1e-5, "atol": 1e-6}

    def same(found: Tensor, expected: np.ndarray) -> None:
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        np.testing.assert_allclose(found.numpy(), expected, **close)

    same(read(tmp_path / "a.npy", "chw", "softmax"), softmax(wide))
    same(read(tmp_path / "a.npy", "chw", "sigmoid"), 1 / (1 + np.exp(-wide)))
    same(read(tmp_path / "last.npy", "hwc", "softmax"), softmax(wide))
    low = read(tmp_path / "probs.npy", "chw", None, True, size=(10, 13))
    same(low, bilinear(softmax(wide), 10, 13))
    low = read(tmp_path / "last.npy", "hwc", "softmax", True, size=(10, 13))
    same(low, softmax(bilinear(wide, 10, 13)))  # logits are resized, not their probabilities
    assert float(low.max()) <= 1
    assert read_shape(tmp_path / "last.npy", reading=ScoreReading("hwc")) == (3, 4, 5)
    assert ScoreReading("hwc", None, True).shape((4, 5, 3), (8, 9)) == (3, 8, 9)


def test_without_a_reading_no_more_is_done(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """No resizing, no look at the image, and floats as they are stored."""
    fail = pytest.fail
    monkeypatch.setattr(ScoreReading, "__call__", lambda *_: fail("it converted"))
    monkeypatch.setattr(dataset, "image_size", lambda *_: fail("it opened the image"))
    source = Source(data.root, data.probs)
    located = source.locate(read_ids(data.ids))
    assert all(len(each) == 1 for each in located.values())
    assert source.shape(located[Pair("images/00.png", "masks/00.png")]) == (4, 12, 16)
    for pair, found in located.items():
        assert np.array_equal(source.probabilities(found).numpy(), data.scores[pair.image])
    assert source.facts() == {}
    assert source.identity() == {"probs": str(data.probs.resolve())}
    double = data.probs / "images/00.npy"
    np.save(double, data.scores["images/00.png"].astype(np.float64))
    assert source.probabilities(double).dtype == torch.float64


@pytest.mark.parametrize(
    ("values", "reading", "said"),
    [
        (np.full((3, 4, 5), np.nan, np.float32), ScoreReading("chw", "softmax"), "finite logits"),
        (np.zeros((3, 4, 5), np.uint8), ScoreReading("chw", "softmax"), "leave --logits out"),
        (np.zeros((4, 5), np.float32), ScoreReading("hwc"), "[H, W, K], got [4, 5]"),
        (np.full((3, 4, 5), 2, np.float32), ScoreReading("hwc"), "pass --logits"),
        (np.zeros((3, 9, 9), np.float32), ScoreReading("chw", None, True), "image's size [8, 9]"),
    ],
)
def test_what_does_not_fit_its_reading_is_refused(
    tmp_path: Path, values: np.ndarray, reading: ScoreReading, said: str
) -> None:
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match="expected") as caught:
        read_scores(tmp_path / "a.npy", reading=reading, size=(8, 9))
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'a.npy'}: ")


def test_a_reading_is_checked_and_goes_through_json() -> None:
    for reading in (ScoreReading(), ScoreReading("hwc", "sigmoid", True)):
        assert parse_reading(reading.to_json()) == reading
    for content in ({}, {"layout": "chw"}, [], {"layout": "chw", "logits": None, "upsample": 1}):
        with pytest.raises(ValueError, match="score reading: expected an object with layout"):
            parse_reading(content)
    with pytest.raises(ValueError, match="layout among 'chw', 'hwc'"):
        ScoreReading("nchw")
    with pytest.raises(ValueError, match="logits among"):
        ScoreReading(logits="yes")
    with pytest.raises(ValueError, match="pass size"):
        ScoreReading(upsample=True)(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="readings"):
        Provenance.from_json({"readings": {}})
    with pytest.raises(ValueError, match="readings"):
        Provenance.from_json({"readings": [{"layout": "x"}]})


# Files of torch


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("old_format", [False, True])
def test_files_of_torch(tmp_path: Path, suffix: str, old_format: bool) -> None:
    values, path = torch.rand(3, 4, 5), tmp_path / f"a{suffix}"
    new = not old_format
    for content in (values, {"x": values, "epoch": 3}, {"probs": values, "y": values[0]}):
        torch.save(content, path, _use_new_zipfile_serialization=new)
        assert torch.equal(read(path), values)
        assert read_shape(path) == (3, 4, 5)
    torch.save({"a": values, "b": values}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match="an array 'probs', got arrays a, b"):
        read_scores(path)
    torch.save([values], path, _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match="a dictionary of tensors, got list") as caught:
        read_scores(path)
    complains(caught.value, path)
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match="with other objects than tensors") as caught:
        read_scores(path)
    complains(caught.value, path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        read_shape(path)
    with pytest.raises(FileNotFoundError):
        read_scores(tmp_path / f"b{suffix}")


# Other folders


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_leading_folders_of_the_image_may_be_missing(tmp_path: Path) -> None:
    touch(tmp_path, "train/x.npy", "y.pt", "images/z.npz", "z.npz")
    assert find_scores(tmp_path, "images/train/x.jpg") == tmp_path / "train/x.npy"
    assert find_scores(tmp_path, "a/images/train/x.jpg") == tmp_path / "train/x.npy"
    assert find_scores(tmp_path, "images/train/y.jpg") == tmp_path / "y.pt"
    assert find_scores(tmp_path, "images/z.jpg") == tmp_path / "images/z.npz", "the whole path"
    touch(tmp_path, "x.npy")
    with pytest.raises(ValueError, match="one file of probabilities for images") as caught:
        find_scores(tmp_path, "images/train/x.jpg")
    complains(caught.value, tmp_path, "train/x.npy and x.npy")
    with pytest.raises(FileNotFoundError, match="or train/q or q") as caught:
        find_scores(tmp_path, "images/train/q.jpg")
    complains(caught.value, tmp_path, "images/train/q.npy")


# One file for all images


def one_file(folder: Path, arrays: dict[str, np.ndarray], suffix: str) -> Path:
    path = folder / f"all{suffix}"
    tensors = {name: torch.from_numpy(v.copy(order="C")) for name, v in arrays.items()}
    if suffix == ".npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]
    elif suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
@pytest.mark.parametrize("key", ["images/00.png", "images/00", "00.png", "00"])
def test_one_file_with_all_images(data: DataSet, suffix: str, key: str) -> None:
    end = Path(key).suffix
    start = "images/" if key.startswith("images/") else ""
    arrays = {f"{start}{Path(name).stem}{end}": data.scores[name] for name in data.images}
    path = one_file(data.root, arrays, suffix)
    pairs = read_ids(data.ids)
    source = Source(data.root, path)
    images = LabelledImages.open(source, pairs)
    assert (images.num_classes, images.size) == (4, (12, 16))
    for pair in pairs:
        assert np.array_equal(images.read(pair)[0].numpy(), data.scores[pair.image])
    last = {name: values.transpose(1, 2, 0) for name, values in arrays.items()}
    turned = replace(source, probs=one_file(data.probs, last, suffix), reading=ScoreReading("hwc"))
    found = turned.locate(pairs)[pairs[2]]
    assert turned.shape(found) == (4, 12, 16)
    assert np.array_equal(turned.probabilities(found).numpy(), data.scores[pairs[2].image])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_an_image_that_one_file_lacks_or_holds_twice_is_named(data: DataSet, suffix: str) -> None:
    scores = data.scores["images/00.png"]
    path = one_file(data.root, {"images/00": scores, "images/00.png": scores, "1": scores}, suffix)
    with pytest.raises(ValueError, match="expected one array of") as caught:
        Source(data.root, path).locate([Pair("images/00.png", None)])
    complains(caught.value, path, "'images/00.png' and 'images/00'")
    with pytest.raises(FileNotFoundError, match="expected an array named") as caught:
        Source(data.root, path).locate([Pair("images/01.png", None)])
    complains(caught.value, path, "3 others")
    with pytest.raises(ValueError, match="scores of one image, got a"):
        Source(data.root, path).locate([Pair("a/1.png", None), Pair("b/1.png", None)])
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="expected"):
        Source(data.root, path).locate([Pair("images/01.png", None)])


def test_a_changed_file_is_read_anew(data: DataSet) -> None:
    pairs = [Pair("images/00.png", None)]
    for value in (0.25, 0.5):
        values = {"00": np.full((4, 12, 16), value, np.float32)}
        source = Source(data.root, one_file(data.root, values, ".pt"))
        found = source.probabilities(source.locate(pairs)[pairs[0]])
        assert float(found.max()) == value
        found.zero_()  # what was read is the reader's own


# Jobs and the command


def stored_otherwise(data: DataSet) -> Path:
    """The scores again: logits at a third of the size, classes last, in another folder."""
    folder = data.root / "low"
    folder.mkdir()
    for name, scores in data.scores.items():
        low = np.log(scores)[:, ::3, ::3].transpose(1, 2, 0).astype(np.float64)
        torch.save(torch.from_numpy(np.ascontiguousarray(low)), folder / f"{Path(name).stem}.pt")
    return folder


def expected_scores(data: DataSet, name: str) -> np.ndarray:
    low = np.log(data.scores[name].astype(np.float64))[:, ::3, ::3]
    return softmax(bilinear(low, 12, 16)).astype(np.float32)


READ = ("--layout", "hwc", "--logits", "--upsample")


def test_a_calibration_carries_how_scores_were_read(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same labels as from files of probabilities, without saying it again."""
    low, plain = stored_otherwise(data), data.root / "plain"
    for name in data.images:
        (plain / "images").mkdir(parents=True, exist_ok=True)
        np.save(plain / Path(name).with_suffix(".npy"), expected_scores(data, name))
    made = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    run = ("--background", "none", "--variant", "image", "-o")
    done(command(capsys, "calibrate", *data.options(probs=low), *READ, *run, made[0]))
    done(command(capsys, "calibrate", *data.options(probs=plain), *run, made[1]))
    first, second = map(Calibration.load, made)
    torch.testing.assert_close(first.threshold, second.threshold)
    assert first.provenance["readings"] == [ScoreReading("hwc", "softmax", True).to_json()]
    assert "readings" not in second.provenance
    told = [
        done(command(capsys, "evaluate", *data.options(probs=probs), "--calibration", path)).out
        for probs, path in zip((low, plain), made, strict=True)
    ]
    assert told[0] == told[1]
    again = (*data.options(probs=low), *READ, "--calibration", made[0])
    assert done(command(capsys, "evaluate", *again)).out == told[0]
    for other in (("--layout", "hwc"), ("--logits", "sigmoid"), ("--upsample",)):
        words = (*data.options(probs=low), *other, "--calibration", made[0])
        refused(command(capsys, "label", *words, "-o", tmp_path / "L"), "read as calibrated")
    outs = [tmp_path / "L0", tmp_path / "L1"]
    for probs, path, out in zip((low, plain), made, outs, strict=True):
        words = (*data.options(probs=probs), "--calibration", path, "-o", out)
        done(command(capsys, "label", *words))
    assert files(outs[0] / "masks") == files(outs[1] / "masks")
    evidence = tmp_path / "E"
    words = data.options(probs=low, calibration=made[0], output=evidence)
    done(command(capsys, "compact", *words))
    words = data.options(probs=evidence, calibration=made[0], output=tmp_path / "L2")
    done(command(capsys, "label", *words))
    assert files(tmp_path / "L2/masks") == files(outs[0] / "masks")


def test_options_are_given_once_or_once_for_each_model(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low = stored_otherwise(data)
    logits = {Path(name).stem: np.log(scores) for name, scores in data.scores.items()}
    whole = one_file(data.root, logits, ".npz")
    made = tmp_path / "c.safetensors"
    words = ("calibrate", *data.options(), "--probs", low, "--probs", whole, "-o", made)
    words = (*words, "--background", "none", "--variant", "image", "--alpha", "0.5")
    each = ("--layout", "chw", "--layout", "hwc", "--layout", "chw")
    each = (*each, "--upsample", "no", "--upsample", "--upsample", "no")
    said = command(capsys, *words, *each, "--logits", "no", "--logits")
    refused(said, "--logits: expected --logits once, or once for each of 3 --probs, got 2 times")
    said = command(capsys, *words, *each, "--logits", "no", "--logits", "--logits")
    assert said.code == 0, said.err
    readings = [
        ScoreReading(),
        ScoreReading("hwc", "softmax", True),
        ScoreReading(logits="softmax"),
    ]
    stored = Calibration.load(made).provenance
    assert stored.readings == tuple(each.to_json() for each in readings)
    evaluated = (*data.options(), "--probs", low, "--probs", whole, "--calibration", made)
    assert command(capsys, "evaluate", *evaluated).code == 0


def test_sigmoid_may_be_said_by_the_kind_of_scores(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits = {Path(name).stem: np.log(scores) for name, scores in data.scores.items()}
    whole, made = one_file(data.root, logits, ".npz"), tmp_path / "c.safetensors"
    words = ("calibrate", *data.options(probs=whole), "--background", "none", "-o", made)
    words = (*words, "--variant", "image", "--scores", "sigmoid")
    done(command(capsys, *words, "--logits"))
    assert Calibration.load(made).provenance.readings[0]["logits"] == "sigmoid"
    refused(command(capsys, *words), "--scores: expected a recalibration")
    (tmp_path / "all.npy").touch()
    words = ("calibrate", *data.options(probs=tmp_path / "all.npy"), "--background", "none")
    refused(command(capsys, *words, "-o", made), "--probs: expected a folder")


def test_a_mistake_names_the_option_that_cures_it(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, scores in data.scores.items():
        for kind, values in (("last", scores.transpose(1, 2, 0)), ("small", scores[:, ::4, ::4])):
            path = data.root / kind / Path(name).with_suffix(".npy")
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, values)
    run = ("--background", "none", "-o", tmp_path / "c")
    for kind, option in (("last", "--layout hwc"), ("small", "--upsample")):
        words = ("calibrate", *data.options(probs=data.root / kind), *run)
        refused(command(capsys, *words), f"pass {option}")
        calibration = calibrate(Source(data.root, data.probs), data.ids, alpha=0.5, background=None)
        with pytest.raises(ValueError, match=f"pass {option}"):
            label(Source(data.root, data.root / kind), data.ids, calibration, tmp_path / kind)


def test_a_reading_changes_the_identity_of_a_run(data: DataSet) -> None:
    copytree(data.probs, data.root / "more")
    source = Source(data.root, data.probs, others=(ScoreFolder(data.root / "more"),))
    turned = replace(source, reading=ScoreReading("hwc"))
    assert turned.identity() != source.identity()
    assert turned.facts()["readings"] == [ScoreReading("hwc").to_json(), ScoreReading().to_json()]
    assert as_calibrated(
        "x",
        source,
        calibrate(source, data.ids, alpha=None, background=None, recalibration=recalibration()),
    ).reading.is_plain
    low = replace(Source(data.root, data.probs), reading=ScoreReading(upsample=True))
    with pytest.raises(ValueError, match="pass those of Source"):
        low.scores(data.score_file(data.images[0]))


def recalibration() -> Any:
    from cpseg.jobs.recalibrate import RecalibrationOptions

    return RecalibrationOptions(share=0)


def test_score_maps_of_satellites_are_not_opened_for_their_size(
    data: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image's header says its size; the shape of scores comes from theirs."""
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it decoded the image"))
    monkeypatch.setattr(score_files, "from_numpy", lambda *_: pytest.fail("it read the scores"))
    for path in data.probs.rglob("*.npy"):
        np.save(path, np.load(path)[:, ::2, ::2])
    source = Source(data.root, data.probs, reading=ScoreReading(upsample=True))
    assert source.shape(source.locate(read_ids(data.ids))[read_ids(data.ids)[0]]) == (4, 12, 16)
