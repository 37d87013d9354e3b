"""Labels as other training code reads them; the readers here follow its documents, not our code."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support import folders
from tests.support.folders import DataSet, complains, files

from cpseg import Calibration
from cpseg.files.dataset import Source
from cpseg.files.id_lists import read_ids
from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.label import label
from cpseg.jobs.label_layout import OutputLayout

SIZES = ((12, 16), (16, 12))
LAYOUTS = ("yolo", "mmseg", "voc", "ade")


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    made = folders.make(tmp_path / "data", count=9, sizes=SIZES)
    made.list_ids("labelled.txt", made.images[:3])
    made.list_ids("unlabelled.txt", made.images[3:7], masks=False)
    made.list_ids("validation.txt", made.images[7:])
    return made


def thresholds(data: DataSet) -> Calibration:
    ids = data.root / "labelled.txt"
    source = Source(data.root, data.probs)
    return calibrate(source, ids, alpha=0.3, background=None, grid=(4, 4))


def write(
    data: DataSet,
    out: Path,
    layout: str,
    *,
    repeat: int = 1,
    calibration: Calibration | None = None,
    relative: bool = False,
    labelled: bool = True,
    **settings: object,
) -> None:
    label(
        Source(data.root, data.probs),
        data.root / "unlabelled.txt",
        calibration or thresholds(data),
        out,
        labelled=data.root / "labelled.txt" if labelled else None,
        repeat_labelled=repeat,
        relative=relative,
        layout=OutputLayout(layout, **settings),  # type: ignore[arg-type]
    )


def wanted(data: DataSet, out: Path, image: str) -> np.ndarray:
    """True labels where there are some, else the mask of the ordinary folder."""
    if image in data.images[3:7]:
        return np.array(Image.open(out / "masks" / image))
    return data.labels[image]


def as_ultralytics(yaml: Path, split: str) -> list[tuple[Path, np.ndarray]]:
    """As its page on semantic data sets says: images/ becomes masks_dir, the suffix png."""
    lines = yaml.read_text(encoding="utf-8").splitlines()
    keys = dict(line.split("  #")[0].split(": ", 1) for line in lines if ": " in line)
    listed = (yaml.parent / keys[split]).read_text(encoding="utf-8").splitlines()
    rows = []
    for line in listed:
        assert line.startswith("./")
        image = f"{yaml.parent}/{line[2:]}"
        head, _, tail = image.rpartition("/images/")
        mask = Image.open(f"{head}/{keys['masks_dir']}/{tail.rpartition('.')[0]}.png")
        rows.append((Path(image), np.array(mask)))
    return rows


def as_mmseg(settings: dict, root: Path) -> list[tuple[Path, np.ndarray]]:
    """As BaseSegDataset joins its prefixes, the lines of ann_file and its two suffixes."""
    images, masks = (root / settings["data_prefix"][key] for key in ("img_path", "seg_map_path"))
    suffix = settings.get("img_suffix", ".jpg")
    if "ann_file" in settings:
        names = (root / settings["ann_file"]).read_text(encoding="utf-8").split("\n")[:-1]
    else:
        names = sorted(path.name.removesuffix(suffix) for path in images.iterdir())
    rows = []
    for name in names:
        labels = np.array(Image.open(masks / f"{name}.png"))
        if settings.get("reduce_zero_label"):  # 0 is void, 1 the first class
            labels = np.where(labels == 0, 255, labels.astype(int) - 1)
            labels = np.where(labels == 254, 255, labels)
        rows.append((images / f"{name}{suffix}", labels))
    return rows


def read_back(out: Path, layout: str, split: str) -> list[tuple[Path, np.ndarray]]:
    if layout == "yolo":
        return as_ultralytics(out / "data.yaml", split)
    if layout == "mmseg":
        loader = mmseg_config(out)["train_dataloader" if split == "train" else "val_dataloader"]
        assert loader["dataset"]["data_root"] == str(out)
        return as_mmseg(loader["dataset"], out)
    if layout == "voc":
        prefix = {"img_path": "JPEGImages", "seg_map_path": "SegmentationClass"}
        lists = f"ImageSets/Segmentation/{split}.txt"
        return as_mmseg({"data_prefix": prefix, "ann_file": lists}, out)
    folder = {"train": "training", "val": "validation"}[split]
    prefix = {"img_path": f"images/{folder}", "seg_map_path": f"annotations/{folder}"}
    return as_mmseg({"data_prefix": prefix, "reduce_zero_label": True}, out)


def mmseg_config(out: Path) -> dict:
    """The config as MMEngine reads it: the name of its folder is put in, then it is Python."""
    text = (out / "dataset.py").read_text(encoding="utf-8")
    found: dict = {}
    exec(text.replace("{{ fileDirname }}", str(out)), found)
    return found


def same_image(found: Path, data: DataSet, image: str) -> bool:
    return np.array_equal(np.array(Image.open(found)), np.array(Image.open(data.root / image)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("copied", [False, True])
def test_every_layout_is_read_back(
    data: DataSet, tmp_path: Path, layout: str, copied: bool
) -> None:
    out = tmp_path / "out"
    repeat = 1 if layout == "ade" else 2
    validation = data.root / "validation.txt"
    write(data, out, layout, repeat=repeat, copy_images=copied, validation=validation)
    listed = {"train": [*data.images[:3] * repeat, *data.images[3:7]], "val": data.images[7:]}
    seen: set[int] = set()
    for split, images in listed.items():
        rows = read_back(out, layout, split)
        assert len(rows) == len(images)
        for image, (path, labels) in zip(images, rows, strict=True):
            assert same_image(path, data, image)
            assert np.array_equal(labels, wanted(data, out, image))
            assert path.is_symlink() != copied
            seen |= set(labels.ravel().tolist())
    assert seen == {0, 1, 2, 3, 255}, "the case is too tame"


def test_pascal_masks_have_its_palette_and_ade_masks_are_grey(
    data: DataSet, tmp_path: Path
) -> None:
    write(data, tmp_path / "voc", "voc")
    write(data, tmp_path / "ade", "ade")
    for path in (tmp_path / "voc" / "SegmentationClass").iterdir():
        mask = Image.open(path)
        assert (mask.format, mask.mode) == ("PNG", "P")
        assert mask.getpalette()[3:9] == [128, 0, 0, 0, 128, 0]  # aeroplane, bicycle
        assert mask.getpalette()[765:] == [224, 224, 192]
    for path in (tmp_path / "ade" / "annotations" / "training").iterdir():
        assert Image.open(path).mode == "L"


def test_class_names_reach_the_files_of_the_loader(data: DataSet, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    names = tmp_path / "names.txt"
    names.write_text('sky\na road\ncar\'s\ntree "old"\n')
    for layout in LAYOUTS:
        write(data, tmp_path / layout, layout, names=names)
    want = ["sky", "a road", "car's", 'tree "old"']
    content = yaml.safe_load((tmp_path / "yolo" / "data.yaml").read_text())
    assert content["names"] == dict(enumerate(want))
    assert content["val"] == content["train"] == "train.txt"
    config = mmseg_config(tmp_path / "mmseg")
    assert config["metainfo"]["classes"] == want
    assert len(config["metainfo"]["palette"]) == 4
    assert "val_dataloader" not in config
    for layout in ("voc", "ade"):
        assert (tmp_path / layout / "classes.txt").read_text().splitlines() == want


def test_names_come_from_beside_the_scores(data: DataSet, tmp_path: Path) -> None:
    (data.probs / "classes.txt").write_text("a\nb\nc\nd\n")
    write(data, tmp_path / "voc", "voc")
    assert (tmp_path / "voc" / "classes.txt").read_text() == "a\nb\nc\nd\n"
    (data.probs / "classes.txt").write_text("a\nb\nc\nd\ne\n")  # of a model that was mapped
    write(data, tmp_path / "other", "voc")
    assert (tmp_path / "other" / "classes.txt").read_text().startswith("class_0\nclass_1\n")


def test_images_of_one_name_in_two_folders(data: DataSet, tmp_path: Path) -> None:
    """Names without folders would collide, and no name holds /images/ a second time."""
    for old, new in zip(data.images[3:5], ("a/x.png", "b/images/x.png"), strict=True):
        for source, target in (
            (data.root / old, data.root / new),
            (data.score_file(old), data.score_file(new)),
        ):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    data.list_ids("unlabelled.txt", ["a/x.png", "b/images/x.png"], masks=False)
    for layout in LAYOUTS:
        out = tmp_path / layout
        write(data, out, layout)
        rows = {path.stem: labels for path, labels in read_back(out, layout, "train")}
        assert len(rows) == 5
        for image, name in (("a/x.png", "a_x"), ("b/images/x.png", "b_images_x")):
            assert np.array_equal(rows[name], np.array(Image.open(out / "masks" / image)))


def test_mixed_suffixes_get_the_one_that_the_config_names(data: DataSet, tmp_path: Path) -> None:
    old, new = data.images[3], "images/03.bmp"
    Image.open(data.root / old).save(data.root / new)
    data.list_ids("unlabelled.txt", [new, *data.images[4:7]], masks=False)
    write(data, tmp_path / "out", "mmseg")
    rows = read_back(tmp_path / "out", "mmseg", "train")
    assert {path.suffix for path, _ in rows} == {".jpg"}
    assert all(np.array(Image.open(path)).shape[:2] == labels.shape for path, labels in rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_root_and_folder_move_together(data: DataSet, tmp_path: Path, layout: str) -> None:
    out = tmp_path / "made" / "out"
    write(data, out, layout, relative=True)
    want = [labels for _, labels in read_back(out, layout, "train")]
    masks = {image: data.labels[image] for image in data.images[:3]}
    place = tmp_path / "container"
    place.mkdir()
    for name in ("data", "made"):
        os.rename(tmp_path / name, place / name)
    moved = place / "made" / "out"
    rows = read_back(moved, layout, "train")
    assert len(rows) == 7
    assert all(np.array_equal(a, b) for (_, a), b in zip(rows, want, strict=True))
    assert all(path.exists() for path, _ in rows)
    for line in read_ids(moved / "stage1.txt"):  # relative to the root, with the readers here
        assert not os.path.isabs(str(line.mask))
        labels = np.array(Image.open(place / "data" / str(line.mask)))
        assert np.array_equal(labels, masks.get(line.image, labels))


def test_a_second_run_changes_nothing(data: DataSet, tmp_path: Path) -> None:
    calibration = thresholds(data)
    for layout in LAYOUTS:
        out = tmp_path / layout
        write(data, out, layout, calibration=calibration, copy_images=layout == "voc")
        before = files(out)
        times = {path: path.lstat().st_mtime_ns for path in out.rglob("*.png")}
        write(data, out, layout, calibration=calibration, copy_images=layout == "voc")
        assert files(out) == before
        assert {path: path.lstat().st_mtime_ns for path in times} == times, "made again"


def test_a_layout_is_added_to_finished_labels_and_follows_the_lists(
    data: DataSet, tmp_path: Path
) -> None:
    out, calibration = tmp_path / "out", thresholds(data)
    label(Source(data.root, data.probs), data.root / "unlabelled.txt", calibration, out)
    write(data, out, "ade", calibration=calibration)
    assert len(read_back(out, "ade", "train")) == 7
    mine = out / "images" / "training" / "mine.jpg"
    mine.write_bytes(b"a file of the user")
    data.list_ids("labelled.txt", data.images[:2])
    write(data, out, "ade", calibration=calibration)
    left = {path.name for path in (out / "images" / "training").iterdir()}
    assert left == {"00.jpg", "01.jpg", "03.jpg", "04.jpg", "05.jpg", "06.jpg", "mine.jpg"}
    assert len(list((out / "annotations" / "training").iterdir())) == 6


def test_copies_stand_in_where_there_are_no_links(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(os, "symlink", refuse)
    for layout in LAYOUTS:
        write(data, tmp_path / layout, layout)
        rows = read_back(tmp_path / layout, layout, "train")
        for image, (path, labels) in zip(data.images[:7], rows, strict=True):
            assert same_image(path, data, image)
            assert np.array_equal(labels, wanted(data, tmp_path / layout, image))
            assert not path.is_symlink()


def test_true_masks_in_other_values_are_written_as_classes(data: DataSet, tmp_path: Path) -> None:
    for image in data.images:
        stored = np.where(data.labels[image] == 255, 0, np.minimum(data.labels[image], 3) + 1)
        Image.fromarray(stored.astype(np.uint8)).save(data.mask_file(image))
    source = Source(data.root, data.probs, first_class=1)
    calibration = calibrate(
        source, data.root / "labelled.txt", alpha=0.3, background=None, grid=(4, 4)
    )
    for layout in LAYOUTS:
        write(data, tmp_path / layout, layout, calibration=calibration)
        rows = read_back(tmp_path / layout, layout, "train")
        for image, (_, labels) in zip(data.images[:3], rows, strict=False):
            assert np.array_equal(labels, data.labels[image])


# What is refused, before any work


def refused(
    data: DataSet, out: Path, layout: str, where: object, *parts: str, **more: object
) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        write(data, out, layout, **more)  # type: ignore[arg-type]
    complains(caught.value, where, *parts)
    assert not out.exists(), "refused before the work"


def test_other_classes_are_refused(data: DataSet, tmp_path: Path) -> None:
    names, out = tmp_path / "names.txt", tmp_path / "out"
    names.write_text("a\nb\nc\n")
    refused(data, out, "yolo", names, "4 names", "got 3", names=names)
    names.write_text("a\nb\nd\nc\n")
    (data.probs / "classes.txt").write_text("a\nb\nc\nd\n")
    refused(data, out, "yolo", names, "class 2 is 'c'", "got 'd'", names=names)


def test_a_folder_with_another_layout_or_other_names_is_refused(
    data: DataSet, tmp_path: Path
) -> None:
    out, calibration, names = tmp_path / "out", thresholds(data), tmp_path / "names.txt"
    write(data, out, "voc", calibration=calibration)
    before = files(out)
    with pytest.raises(ValueError, match="no layout yet, or yolo, got voc") as caught:
        write(data, out, "yolo", calibration=calibration)
    complains(caught.value, out, "choose another folder with -o")
    names.write_text("a\nb\nc\nd\n")
    with pytest.raises(ValueError, match="classes a, b, c, d, got one with others"):
        write(data, out, "voc", calibration=calibration, names=names)
    assert files(out) == before


def test_lists_that_do_not_fit_are_refused(data: DataSet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = data.list_ids("both.txt", data.images[6:])
    refused(data, out, "voc", both, "not trained on", data.images[6], validation=both)
    refused(data, out, "ade", "--output-layout ade", "got 2 times", repeat=2)
    refused(data, out, "voc", "label", "repeat_labelled", "got 0", repeat=0)
    refused(data, out, "voc", "--repeat-labelled", "got none", repeat=2, labelled=False)
    data.mask_file(data.images[1]).unlink()
    where = data.root / "labelled.txt"
    refused(data, out, "voc", where, f"a mask of {data.images[1]}", calibration=cached(data))
    data.list_ids("labelled.txt", data.images[:3], masks=False)
    with pytest.raises(ValueError, match="'image mask'"):
        write(data, out, "voc", calibration=cached(data))


def cached(data: DataSet) -> Calibration:
    """A calibration that needs no masks."""
    return Calibration(torch.full((4, 4), 0.6), torch.full((4, 4), 9), 0.3, 9, 4, None)


def test_images_that_a_layout_cannot_hold_are_refused(data: DataSet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    many = Calibration(torch.full((1, 1), 0.6), torch.full((1, 1), 9), 0.3, 9, 255, None)
    refused(data, out, "ade", "--output-layout ade", "at most 254 classes", calibration=many)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(data.root / data.images[4])
    turned.save(data.root / data.images[4], exif=exif)
    refused(data, out, "mmseg", data.root / data.images[4], "orientation 6")
    shutil.copy(data.root / data.images[3], data.root / "images/03.gif")
    data.list_ids("unlabelled.txt", ["images/03.gif"], masks=False)
    refused(data, out, "yolo", "--output-layout yolo", "images/03.gif")
    with pytest.raises(ValueError, match="layout among 'yolo', 'mmseg', 'voc', 'ade', got 'coco'"):
        OutputLayout("coco")


def test_paths_on_another_drive_cannot_be_relative(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", refuse)
    refused(data, tmp_path / "out", "voc", "--relative", "the drive of --root", relative=True)


# Lists


def test_labelled_images_are_repeated_in_stage1(data: DataSet, tmp_path: Path) -> None:
    write(data, tmp_path / "out", "voc", repeat=3)
    lines = (tmp_path / "out" / "stage1.txt").read_text().splitlines()
    labelled = (data.root / "labelled.txt").read_text().splitlines()
    assert lines[:9] == labelled * 3
    assert lines[9:] == (tmp_path / "out" / "ids.txt").read_text().splitlines()


# The command


def test_the_command_lays_out_and_says_how_to_use_it(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thresholds(data).save(tmp_path / "c.safetensors")
    unlabelled, labelled = (data.root / f"{name}.txt" for name in ("unlabelled", "labelled"))
    words = ["label", *data.options(ids=unlabelled, calibration=tmp_path / "c.safetensors")]
    words += ["--labelled", str(labelled), "--repeat-labelled", "2"]
    out = tmp_path / "yolo"
    result = folders.command(capsys, *words, "--output-layout", "yolo", "-o", out)
    assert result.code == 0
    assert f"yolo semantic train model=yolo26n-sem.yaml data={out / 'data.yaml'}" in result.out
    assert "validates on the training images" in result.err
    assert len((out / "train.txt").read_text().splitlines()) == 10
    assert json.loads((out / "layout.json").read_text())["layout"] == "yolo"
    out = tmp_path / "mmseg"
    more = ["--output-layout", "mmseg", "--validation", data.root / "validation.txt"]
    result = folders.done(folders.command(capsys, *words, *more, "-o", out))
    assert "num_classes=4" in result.out
    for wrong, *parts in (
        (["--layout", "yolo"], "chw or hwc", "--output-layout"),
        (["--names", "n.txt"], "--names", "--output-layout"),
        (["--repeat-labelled", "0"], "whole number >= 1", "'0'"),
    ):
        result = folders.command(capsys, *words, *wrong, "-o", tmp_path / "none")
        folders.refused(result, *parts)
