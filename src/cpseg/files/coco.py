"""Semantic masks as COCO annotations: one annotation per class and image, in run-length code."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpseg._internal.checks import message, short
from cpseg._internal.safe_files import atomic
from cpseg.files.annotations import (
    Annotated,
    Painter,
    check_class_names,
    check_labels,
    check_once,
    check_overlap,
    class_of,
    read_json,
    size_of,
)
from cpseg.files.run_lengths import decode_coco_rle, encode_coco_rle

_KIND = "COCO annotations in JSON"
_FIX = "export the file anew"


def write_coco(
    path: str | Path,
    masks: Iterable[tuple[str, Tensor]],
    class_names: Sequence[str],
    *,
    compressed: bool = True,
) -> int:
    """Write masks as a COCO annotation file, atomically.

    Class k is category k + 1. Void pixels belong to no annotation. Only one mask is in memory at a
    time.

    Args:
        path: the JSON file.
        masks: name and labels of every image: uint8 ``[H, W]``, class indices and 255 for void.
        class_names: names by class index.
        compressed: run-length codes as COCO's text; else as lists of counts.

    Returns:
        How many images were written.

    Raises:
        ValueError: bad names or labels, or an image twice.
        OSError: the file cannot be written.

    Example:
        >>> write_coco("labels.json", [("a.jpg", labels)], ["road", "sky"])  # doctest: +SKIP
        1
    """
    names = check_class_names("write_coco", class_names)
    categories = [{"id": k + 1, "name": name, "supercategory": ""} for k, name in enumerate(names)]
    images: list[dict[str, Any]] = []
    number = 0
    with atomic(path) as file:
        file.write(b'{"annotations": [')
        for image, labels in masks:
            present = check_labels("write_coco", image, labels, names)
            height, width = labels.shape
            images.append(
                {"id": len(images) + 1, "file_name": image, "height": height, "width": width}
            )
            for k in present:
                mask = labels == k
                entry = {
                    "id": (number := number + 1),
                    "image_id": len(images),
                    "category_id": k + 1,
                    "segmentation": encode_coco_rle(mask, compressed=compressed),
                    "area": int(mask.sum()),
                    "bbox": _box(mask),
                    "iscrowd": 0,
                }
                file.write((",\n" if number > 1 else "\n").encode() + json.dumps(entry).encode())
        check_once("write_coco", (each["file_name"] for each in images))
        rest = json.dumps({"images": images, "categories": categories})
        file.write(b"\n],\n" + rest[1:].encode() + b"\n")
    return len(images)


def _box(mask: Tensor) -> list[int]:
    """Left, top, width and height of the pixels of a mask."""
    rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]


def read_coco(
    path: str | Path, class_names: Sequence[str], *, overlap: str = "error"
) -> Iterator[Annotated]:
    """The labels of every image in a COCO annotation file.

    Pixels without an annotation are void. Several annotations of one class are one. Polygons are
    drawn by pycocotools (``cpseg[coco]``); run-length codes need nothing.

    Args:
        path: the JSON file.
        class_names: names by class index; a category named ``void`` is void.
        overlap: what pixels become that two classes claim: ``"error"``, ``"last"`` for the
            later annotation in the file, or ``"void"``.

    Yields:
        Name and labels of every image, also of one without annotations.

    Raises:
        ValueError: a damaged file, a category that is no class, an annotation of another size, of
            no image or of an unknown kind, or an overlap.
        FileNotFoundError: there is no such file.
        ImportError: polygons without pycocotools; names the extra.

    Example:
        >>> for image, labels in read_coco("labels.json", ["road", "sky"]):  # doctest: +SKIP
        ...     print(image, labels.shape)
        a.jpg torch.Size([480, 640])
    """
    path = Path(path)
    names = check_class_names("read_coco", class_names)
    check_overlap("read_coco", overlap)
    content = read_json(path, _KIND)
    parts = ("images", "annotations", "categories")
    for part in parts:
        listed = content.get(part) if isinstance(content, dict) else None
        if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
            got = f"a file without a list of {part}"
            raise ValueError(message(str(path), _KIND, got, _FIX))
    images, annotations, categories = (content[part] for part in parts)
    try:
        known = {each["id"]: str(each["file_name"]) for each in images}
        called = {each["id"]: each["name"] for each in categories}
        of_image: dict[Any, list[Mapping[str, Any]]] = {each: [] for each in known}
        stray = [each for each in annotations if each["image_id"] not in known]
        for each in annotations if not stray else ():
            of_image[each["image_id"]].append(each)
    except (KeyError, TypeError) as error:
        raise ValueError(message(str(path), _KIND, f"entries without {error}", _FIX)) from error
    if stray:
        expected, got = "annotations of listed images", f"one of image {stray[0]['image_id']}"
        raise ValueError(message(str(path), expected, got, _FIX))
    if len(known) < len(images):
        raise ValueError(message(str(path), "images with ids of their own", "one twice", _FIX))
    check_once(str(path), known.values())
    for image in images:
        where = f"{path}, {image['file_name']}"
        height, width = image.get("height"), image.get("width")
        expected = "height and width of an image"
        size = size_of(where, height, width, expected=expected, fix=_FIX)
        painter = Painter(where, size, overlap, names)
        for entry in of_image[image["id"]]:
            label = class_of(where, _called(called, entry.get("category_id")), names)
            painter.paint(_mask(where, entry.get("segmentation"), painter.labels), label)
        yield Annotated(str(image["file_name"]), painter.labels)


def _called(names: Mapping[Any, object], category: Any) -> object:
    """The name of a category, which may be anything in a damaged file."""
    return names.get(category) if isinstance(category, (int, str)) else None


def _mask(where: str, segmentation: Any, like: Tensor) -> Tensor:
    """The mask of an annotation, in any of COCO's forms."""
    height, width = like.shape
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        if size != [height, width]:
            got = f"one of {short(size)}"
            fix = "annotate the image at its own size"
            raise ValueError(message(where, f"an RLE of size [{height}, {width}]", got, fix))
        return decode_coco_rle(segmentation, where=where)
    if not isinstance(segmentation, list):
        expected = "an RLE or polygons as segmentation"
        raise ValueError(message(where, expected, short(segmentation), _FIX))
    for polygon in segmentation:
        numbers = isinstance(polygon, list) and all(type(each) in (int, float) for each in polygon)
        if not numbers or len(polygon) < 6 or len(polygon) % 2:
            expected = "polygons with x and y of three points or more"
            raise ValueError(message(where, expected, short(polygon), _FIX))
    if not segmentation:
        return torch.zeros_like(like, dtype=torch.bool)
    try:
        from pycocotools import mask as tool
    except ImportError as error:
        text = 'polygons are drawn by pycocotools: pip install "cpseg[coco]"'
        raise ImportError(text) from error
    drawn = tool.decode(tool.merge(tool.frPyObjects(segmentation, height, width)))
    return torch.from_numpy(drawn).bool()
