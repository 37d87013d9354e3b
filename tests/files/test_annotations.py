"""Files for annotation tools: what is written comes back, the tools' own rules, and bad input."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.support.folders import complains
from torch import Tensor

from cpseg.files import (
    decode_coco_rle,
    encode_brush_rle,
    encode_coco_rle,
    read_brush_tasks,
    read_coco,
    read_cvat,
    write_brush_tasks,
    write_coco,
    write_cvat,
)

NAMES = ["background", "road", "sky & sea", "rêve"]
VOID = 255
Masks = list[tuple[str, Tensor]]
KEPT = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def label_maps(draw: st.DrawFn, classes: int = len(NAMES)) -> Masks:
    """Small images: of one pixel, wide, high; with void, absent classes, all void."""
    masks = []
    for number in range(draw(st.integers(1, 3))):
        height, width = draw(st.sampled_from([(1, 1), (1, 9), (9, 1), (3, 4), (2, 2)]))
        values = st.sampled_from([*range(classes), VOID, VOID])
        drawn = draw(st.lists(values, min_size=height * width, max_size=height * width))
        masks.append(
            (
                f"a folder/{number}.jpg",
                torch.tensor(drawn, dtype=torch.uint8).reshape(height, width),
            )
        )
    return masks


def same(found: Iterator[tuple[str, Tensor]], masks: Masks, *, suffix: bool = True) -> None:
    found_ = list(found)
    wanted = [(name if suffix else name.removesuffix(".jpg"), labels) for name, labels in masks]
    assert [name for name, _ in found_] == [name for name, _ in wanted]
    for (name, labels), (_, expected) in zip(found_, wanted, strict=True):
        assert labels.dtype == torch.uint8
        assert torch.equal(labels, expected), name


# Round trips


@KEPT
@given(label_maps(), st.booleans())
def test_coco_comes_back(tmp_path: Path, masks: Masks, compressed: bool) -> None:
    path = tmp_path / "f.json"
    assert write_coco(path, masks, NAMES, compressed=compressed) == len(masks)
    same(read_coco(path, NAMES), masks)


@KEPT
@given(label_maps())
def test_a_coco_file_says_what_the_masks_are(tmp_path: Path, masks: Masks) -> None:
    write_coco(tmp_path / "f.json", masks, NAMES)
    content = json.loads((tmp_path / "f.json").read_text())
    assert [each["name"] for each in content["categories"]] == NAMES
    names = {each["id"]: each["name"] for each in content["categories"]}
    assert len({each["id"] for each in content["annotations"]}) == len(content["annotations"])
    for image, (name, labels) in zip(content["images"], masks, strict=True):
        assert image["file_name"] == name
        assert [image["height"], image["width"]] == list(labels.shape)
        own = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        assert len(own) == len({*labels.unique().tolist()} - {VOID})
        for each in own:
            rows, columns = np.nonzero(labels.numpy() == NAMES.index(names[each["category_id"]]))
            assert each["area"] == len(rows)
            left, top, width, height = each["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width - 1, top + height - 1) == (columns.max(), rows.max())
            assert each["iscrowd"] == 0


@settings(KEPT, max_examples=15)
@given(label_maps())
def test_pycocotools_reads_the_same_masks(tmp_path: Path, masks: Masks) -> None:
    tool = pytest.importorskip("pycocotools.coco")
    write_coco(tmp_path / "f.json", masks, NAMES)
    found = tool.COCO(str(tmp_path / "f.json"))
    assert len(found.getImgIds()) == len(masks)
    for number in found.getImgIds():
        labels = dict(masks)[found.imgs[number]["file_name"]]
        painted = np.full(labels.shape, VOID)
        for each in found.loadAnns(found.getAnnIds(imgIds=[number])):
            mask = found.annToMask(each) == 1
            assert (painted[mask] == VOID).all()
            painted[mask] = each["category_id"] - 1
        assert np.array_equal(painted, labels)


def annotated(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tasks as Label Studio exports them once people have accepted the predictions."""
    return [
        {
            "id": place,
            "data": task["data"],
            "annotations": [
                {"id": 1, "was_cancelled": False, "result": task["predictions"][0]["result"]}
            ],
            "predictions": [],
        }
        for place, task in enumerate(tasks)
    ]


@KEPT
@given(label_maps())
def test_label_studio_comes_back(tmp_path: Path, masks: Masks) -> None:
    path = tmp_path / "tasks.json"
    assert write_brush_tasks(path, masks, NAMES) == len(masks)
    tasks = json.loads(path.read_text())
    path.write_text(json.dumps(annotated(tasks)))
    painted = [(name, labels) for name, labels in masks if bool((labels != VOID).any())]
    same(read_brush_tasks(path, NAMES), painted)
    for task, (name, labels) in zip(tasks, masks, strict=True):
        assert task["data"]["image"] == "/data/local-files/?d=" + name.replace(" ", "%20")
        for region in task["predictions"][0]["result"]:
            size = [region["original_height"], region["original_width"]]
            assert size == list(labels.shape)
            k = NAMES.index(region["value"]["brushlabels"][0])
            assert region["value"]["rle"] == encode_brush_rle(labels == k)


def test_the_configuration_fits_the_tasks(tmp_path: Path) -> None:
    write_brush_tasks(tmp_path / "t.json", [("a.jpg", torch.zeros(1, 1).byte())], NAMES)
    view = ElementTree.parse(tmp_path / "t.xml").getroot()
    (region,) = json.loads((tmp_path / "t.json").read_text())[0]["predictions"][0]["result"]
    (brush,), (image,) = view.findall("BrushLabels"), view.findall("Image")
    assert [each.get("value") for each in brush] == [*NAMES, "void"]
    assert region["from_name"] == brush.get("name")
    assert region["to_name"] == brush.get("toName") == image.get("name")
    assert image.get("value") == "$image"


@KEPT
@given(label_maps(), st.sampled_from([NAMES, ["a", "b", "c", "d"]]))
def test_cvat_comes_back(tmp_path: Path, masks: Masks, names: list[str]) -> None:
    path = tmp_path / "f.zip"
    assert write_cvat(path, masks, names) == len(masks)
    same(read_cvat(path, names), masks, suffix=False)


def cvat_masks(path: Path) -> dict[str, np.ndarray]:
    """The labels by name, and objects, of an archive read by its description."""
    with zipfile.ZipFile(path) as archive:
        lines = archive.read("labelmap.txt").decode().splitlines()
        parts = [line.split(":") for line in lines if not line.startswith("#")]
        assert all(len(each) == 4 for each in parts)
        names = {tuple(map(int, colour.split(","))): name for name, colour, _, _ in parts}
        assert len(names) == len(parts)
        found = {}
        for item in archive.read("ImageSets/Segmentation/default.txt").decode().splitlines():
            for folder in ("SegmentationClass", "SegmentationObject"):
                with Image.open(io.BytesIO(archive.read(f"{folder}/{item}.png"))) as image:
                    assert image.mode == "RGB"
                    found[f"{folder}/{item}"] = np.array(image)
            found[item] = np.array(
                [
                    [names[tuple(pixel)] for pixel in row]
                    for row in found[f"SegmentationClass/{item}"]
                ]
            )
    return found


@settings(KEPT, max_examples=12)
@given(label_maps(), st.sampled_from([NAMES, ["a", "b", "c", "d"]]))
def test_an_archive_for_cvat_names_every_pixel(
    tmp_path: Path, masks: Masks, names: list[str]
) -> None:
    write_cvat(tmp_path / "f.zip", masks, names)
    found = cvat_masks(tmp_path / "f.zip")
    for name, labels in masks:
        item = name.removesuffix(".jpg")
        wanted = [[[*names, "void"][min(v, len(names))] for v in row] for row in labels.tolist()]
        assert found[item].tolist() == wanted
        objects = found[f"SegmentationObject/{item}"].reshape(-1, 3)
        of_class: dict[str, set[tuple[int, ...]]] = {}
        for label, colour in zip(found[item].flat, map(tuple, objects), strict=True):
            of_class.setdefault(label, set()).add(colour)
        assert all(len(colours) == 1 for colours in of_class.values())
        numbers = [colour for label, (colour,) in of_class.items() if label != "background"]
        assert len({*numbers, (0, 0, 0)}) == len(numbers) + 1
        assert of_class.get("background", {(0, 0, 0)}) == {(0, 0, 0)}


def test_the_same_masks_give_the_same_bytes(tmp_path: Path) -> None:
    masks = [("a.jpg", torch.tensor([[0, 1, VOID]], dtype=torch.uint8))]
    for write in (write_coco, write_brush_tasks, write_cvat):
        for name in ("one", "two"):
            write(tmp_path / name, masks, NAMES)  # type: ignore[operator]
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


# What is refused, and what people do in the tools

ROW = torch.tensor([[0, 1, VOID]], dtype=torch.uint8)
WRITERS: list[Callable[..., int]] = [write_coco, write_brush_tasks, write_cvat]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("masks", "names", "says"),
    [
        ([("a.jpg", ROW + 3)], NAMES, "labels in 0..3 or 255, one name for each class, got 4 in a"),
        ([("a.jpg", ROW.long())], NAMES, "uint8 labels [H, W], got torch.int64 [1, 3] for a.jpg"),
        ([("a.jpg", ROW[0])], NAMES, "uint8 labels [H, W]"),
        ([("a.jpg", ROW), ("a.jpg", ROW)], NAMES, "every image once, got a"),
        ([("a.jpg", ROW)], [], "1 to 254 class names, got 0"),
        ([("a.jpg", ROW)], ["a", "b", "a"], "every class name once, got 'a'"),
        ([("a.jpg", ROW)], ["a", "void"], "class names but 'void'"),
        ([("a.jpg", ROW)], ["a", " b"], "class names as words, got ' b'"),
        ([("a.jpg", ROW)], ["a", "b\nc"], "class names without '\\n'"),
    ],
)
def test_what_cannot_be_written(
    write: Callable[..., int], masks: Masks, names: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        write(tmp_path / "f", masks, names)
    complains(caught.value, write.__name__, says)
    assert not list(tmp_path.iterdir()), "nothing is left half written"


def test_cvat_takes_no_colons_and_no_names_that_differ_in_their_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="class names without ':', got 'a:b'"):
        write_cvat(tmp_path / "f", [("a.jpg", ROW)], ["a:b", "c"])
    with pytest.raises(ValueError, match="every image once, got a twice"):
        write_cvat(tmp_path / "f", [("a.jpg", ROW), ("a.png", ROW)], NAMES)


def coco(**changed: Any) -> dict[str, Any]:
    """A file with one image of 2 x 3 pixels; keywords change its only annotation."""
    entry = {"id": 1, "image_id": 7, "category_id": 5, "iscrowd": 0}
    entry["segmentation"] = encode_coco_rle(torch.eye(2, 3, dtype=torch.bool))
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "height": 2, "width": 3}],
        "categories": [{"id": 5, "name": "road"}, {"id": 6, "name": "void"}],
        "annotations": [{**entry, **changed}],
    }


def of_coco(path: Path, content: object, overlap: str = "error") -> list[tuple[str, Tensor]]:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return list(read_coco(path, NAMES, overlap=overlap))


def test_polygons_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools.mask")
    square = [[0, 0, 2, 0, 2, 2, 0, 2]]
    ((name, labels),) = of_coco(tmp_path / "f.json", coco(segmentation=square))
    assert (name, labels.tolist()) == ("a.jpg", [[1, 1, VOID], [1, 1, VOID]])


def test_polygons_need_pycocotools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r'pip install "cpseg\[coco\]"'):
        of_coco(tmp_path / "f.json", coco(segmentation=[[0, 0, 2, 0, 2, 2]]))


def test_void_in_coco_is_void_and_an_image_without_annotations_too(tmp_path: Path) -> None:
    ((_, labels),) = of_coco(tmp_path / "f.json", coco(category_id=6))
    assert (labels == VOID).all()
    ((_, labels),) = of_coco(tmp_path / "f.json", {**coco(), "annotations": []})
    assert labels.tolist() == [[VOID] * 3] * 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "COCO annotations in JSON, got an unreadable one"),
        ([], "got a file without a list of images"),
        ({"images": []}, "got a file without a list of annotations"),
        ({**coco(), "categories": None}, "without a list of categories"),
        (coco(image_id=8), "annotations of listed images, got one of image 8"),
        (coco(category_id=[9]), "a class among background, road"),
        (coco(category_id=9), "a class among background, road, sky & sea, rêve, got None"),
        (coco(segmentation=None), "an RLE or polygons as segmentation, got None"),
        (coco(segmentation=[[1, 2]]), "polygons with x and y of three points or more"),
        (
            coco(segmentation={"size": [3, 2], "counts": [6]}),
            "an RLE of size [2, 3], got one of [3",
        ),
        (coco(segmentation={"size": [2, 3], "counts": [5]}), "counts of 6 pixels"),
        ({**coco(), "images": [{"id": 7}]}, "got entries without 'file_name'"),
        ({**coco(), "images": coco()["images"] * 2}, "images with ids of their own, got one twice"),
        ({**coco(), "categories": [{"id": 5, "name": "Road"}]}, "got 'Road'; rename it there"),
        (
            {**coco(), "images": [{**coco()["images"][0], "width": 0}]},
            "height and width of an image, got 2 and 0",
        ),
        (
            {**coco(), "images": [{**coco()["images"][0], "width": 10**12}]},
            "at most 2147483647 pixels, got 2x1000000000000",
        ),
    ],
)
def test_bad_coco_files(content: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        of_coco(tmp_path / "f.json", content)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "f.json"))
    assert says in text
    assert len(text.splitlines()) == 1


def test_what_two_classes_claim(tmp_path: Path) -> None:
    content = coco()
    content["categories"].append({"id": 8, "name": "sky & sea"})
    first = content["annotations"][0]
    row = torch.tensor([[True, True, False], [False, False, False]])
    content["annotations"].append(
        {**first, "category_id": 8, "segmentation": encode_coco_rle(row, compressed=False)}
    )
    path = tmp_path / "f.json"
    with pytest.raises(
        ValueError, match="one class per pixel, got road and sky & sea at row 0, col"
    ):
        of_coco(path, content)
    assert of_coco(path, content, "last")[0][1].tolist() == [[2, 2, VOID], [VOID, 1, VOID]]
    assert of_coco(path, content, "void")[0][1].tolist() == [[VOID, 2, VOID], [VOID, 1, VOID]]
    with pytest.raises(
        ValueError, match="read_coco: expected overlap among 'error', 'last', 'void'"
    ):
        of_coco(path, content, "first")
    content["annotations"][1]["category_id"] = 5  # two masks of one class are one
    assert of_coco(path, content)[0][1].tolist() == [[1, 1, VOID], [VOID, 1, VOID]]


def task(**changed: Any) -> dict[str, Any]:
    """An annotated task with an image of 2 x 3 pixels; keywords change its only region."""
    mask = torch.eye(2, 3, dtype=torch.bool)
    region = {
        "type": "brushlabels",
        "original_height": 2,
        "original_width": 3,
        "value": {"format": "rle", "rle": encode_brush_rle(mask), "brushlabels": ["road"]},
    }
    region = {**region, **changed}
    return {"data": {"file": "a.jpg"}, "annotations": [{"result": [region]}]}


def of_tasks(path: Path, *tasks: Any) -> list[tuple[str, Tensor]]:
    path.write_text(json.dumps(list(tasks)))
    return list(read_brush_tasks(path, NAMES))


def test_tasks_that_nobody_annotated_are_left_out(tmp_path: Path) -> None:
    skipped = task()
    skipped["annotations"][0]["was_cancelled"] = True
    both = task()
    both["annotations"].insert(0, {"was_cancelled": True, "result": []})
    empty = {"data": {"file": "b.jpg"}, "annotations": []}
    erased = {"data": {"file": "c.jpg"}, "annotations": [{"result": []}]}
    found = of_tasks(
        tmp_path / "f.json", {**skipped, "data": {"file": "d.jpg"}}, both, empty, erased
    )
    assert [name for name, _ in found] == ["a.jpg"]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"file": "x/a.jpg", "image": "/data/upload/1/b.jpg"}, "x/a.jpg"),
        ({"image": "/data/local-files/?d=x/a%20b.jpg"}, "x/a b.jpg"),
        ({"image": "https://host/x/a%20b.jpg?token=1"}, "x/a b.jpg"),
    ],
)
def test_the_image_of_a_task(data: dict[str, str], name: str, tmp_path: Path) -> None:
    ((found, _),) = of_tasks(tmp_path / "f.json", {**task(), "data": data})
    assert found == name


def test_other_results_of_an_annotation_are_not_read(tmp_path: Path) -> None:
    both = task()
    both["annotations"][0]["result"].append({"type": "choices", "value": {"choices": ["good"]}})
    ((_, labels),) = of_tasks(tmp_path / "f.json", both)
    assert labels.tolist() == [[1, VOID, VOID], [VOID, 1, VOID]]


VALUE = task()["annotations"][0]["result"][0]["value"]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"tasks": []}, "an export of Label Studio in the format JSON"),
        ({"image": "a.jpg", "label": []}, "an export of Label Studio in the format JSON"),
        ({**task(), "annotations": [{}]}, "an export of Label Studio in the format JSON"),
        ({**task(), "annotations": task()["annotations"] * 2}, "one annotation per image, got 2"),
        ({**task(), "data": {"text": "x"}}, "a task with its image in data.file or data.image"),
        (task(type="polygonlabels"), "regions of the kind brushlabels, got 'polygonlabels'; paint"),
        (task(value={"brushlabels": ["road"]}), "regions of the kind brushlabels"),
        (task(original_height=None), "original_height and original_width, got None and 3"),
        (task(image_rotation=90), "image_rotation 0, got 90"),
        (task(value={**VALUE, "brushlabels": ["road", "sky & sea"]}), "one label per region"),
        (task(value={**VALUE, "brushlabels": ["Road"]}), "a class among background, road"),
        (task(original_height=3), "an RLE of 3x3 pixels with 4 values each, got 24 values"),
        (task(value={**VALUE, "rle": VALUE["rle"][:-3]}), "a whole RLE"),
    ],
)
def test_bad_exports_of_label_studio(found: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        of_tasks(tmp_path / "f.json", found)
    assert str(caught.value).startswith(str(tmp_path / "f.json"))
    assert says in str(caught.value)


def test_more_bad_exports_of_label_studio(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    with pytest.raises(ValueError, match=r"every image once, got a\.jpg twice"):
        of_tasks(path, task(), task())
    path.write_text('{"tasks": []}')
    with pytest.raises(ValueError, match="in the format JSON, got a JSON dict"):
        list(read_brush_tasks(path, NAMES))
    both = task()
    again = task(value={**VALUE, "brushlabels": ["sky & sea"]})
    both["annotations"][0]["result"] += again["annotations"][0]["result"]
    with pytest.raises(ValueError, match="one class per pixel, got road and sky & sea at row 0"):
        of_tasks(path, both)
    resized = task()
    other = task(original_height=1, value={**VALUE, "rle": encode_brush_rle(torch.ones(1, 3) > 0)})
    resized["annotations"][0]["result"] += other["annotations"][0]["result"]
    with pytest.raises(ValueError, match="a mask of 2x3 pixels, got 1x3"):
        of_tasks(path, resized)


def archive(path: Path, **changed: bytes | None) -> Path:
    """An archive with one mask; keywords change files, None leaves one out."""
    names = {
        "labelmap": "labelmap.txt",
        "mask": "SegmentationClass/a.png",
        "lists": "ImageSets/Segmentation/default.txt",
    }
    files = {"labelmap": b"# l\nbackground:0,0,0::\nroad:9,8,7::\nignored:1,1,1::\n\ntree:5,5,5::"}
    files |= {"mask": png([[0, 0, 0], [9, 8, 7], [1, 1, 1]]), "lists": b"a\n"}
    with zipfile.ZipFile(path, "w") as made:
        for name, content in {**files, **changed}.items():
            if content is not None:
                made.writestr(names[name], content)
    return path


def png(row: list[list[int]], mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    image = Image.fromarray(np.array([row], np.uint8))
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    image.save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
@pytest.mark.parametrize("lists", [b"a\n", None])
@pytest.mark.parametrize("names", [["background", "road"], ["sky", "road"]])
def test_archives_that_cvat_writes(
    mode: str, lists: bytes | None, names: list[str], tmp_path: Path
) -> None:
    mask = png([[0, 0, 0], [9, 8, 7], [1, 1, 1]], mode)
    path = archive(tmp_path / "f.zip", mask=mask, lists=lists)
    ((name, labels),) = read_cvat(path, names)
    nothing = 0 if names[0] == "background" else VOID
    assert (name, labels.tolist()) == ("a", [[nothing, 1, VOID]])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"labelmap": None}, "got one without labelmap.txt"),
        ({"labelmap": b"# nothing\n"}, "labelmap.txt: expected labels, got none"),
        ({"labelmap": b"road:1,2\n"}, "line 1: expected 'label:red,green,blue::', got 'road:1,2'"),
        ({"labelmap": b"road:1,2,999::\n"}, "line 1: expected 'label:red,green,blue::'"),
        (
            {"labelmap": b"a:1,1,1::\nb:1,1,1::"},
            "line 2: expected a colour for each label, got a and b",
        ),
        ({"labelmap": b"\xff"}, "labelmap.txt: expected a text in UTF-8"),
        ({"mask": None}, "expected SegmentationClass/a.png, which is listed, got none"),
        ({"mask": b"no image"}, "SegmentationClass/a.png: expected a mask image"),
        ({"mask": png([[1, 1, 1]], "L")}, "a mask in colours, got mode L"),
        (
            {"mask": png([[1, 2, 3]])},
            "a: expected colours of labelmap.txt, got #010203 at row 0, col",
        ),
        ({"mask": png([[5, 5, 5]])}, "a: expected a class among background, road, got 'tree'"),
        ({"lists": b"a\na\n"}, "every image once, got a twice"),
    ],
)
def test_bad_archives(changed: dict[str, bytes | None], says: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "f.zip", **changed)
    with pytest.raises(ValueError, match="expected") as caught:
        list(read_cvat(path, ["background", "road"]))
    assert str(caught.value).startswith(str(path))
    assert says in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "f.zip"
    path.write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"an archive of CVAT's format 'Segmentation mask 1\.1'"):
        list(read_cvat(path, NAMES))
    readers: list[Callable[..., Any]] = [read_cvat, read_coco, read_brush_tasks]
    for read in readers:
        with pytest.raises(FileNotFoundError):
            list(read(tmp_path / "none", NAMES))


def test_a_decoder_that_drops_a_column_would_be_seen() -> None:
    """The comparison of round trips can fail."""
    labels = torch.tensor([[0, 1]], dtype=torch.uint8)
    with pytest.raises(AssertionError):
        same(iter([("a.jpg", labels[:, :1])]), [("a.jpg", labels)])
    assert decode_coco_rle({"size": [1, 2], "counts": [0, 1, 1]}).tolist() == [[True, False]]
