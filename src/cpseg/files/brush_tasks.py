"""Masks as tasks of Label Studio with painted regions, and its exports read back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import quoteattr

from torch import Tensor

from cpseg._internal.checks import message, short
from cpseg._internal.safe_files import atomic, write_text
from cpseg.files.annotations import (
    VOID_NAME,
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
from cpseg.files.run_lengths import decode_brush_rle, encode_brush_rle

LOCAL_FILES = "/data/local-files/?d="  # where Label Studio serves files of its own machine
_KIND = "an export of Label Studio in the format JSON"
_FIX = "export the annotations as JSON"


def write_brush_tasks(
    path: str | Path,
    masks: Iterable[tuple[str, Tensor]],
    class_names: Sequence[str],
    *,
    prefix: str = LOCAL_FILES,
) -> int:
    """Write masks as tasks for Label Studio, and beside them as ``.xml`` its configuration.

    Each class of an image is one painted region of the task's prediction. Void pixels belong to no
    region. The configuration has a label ``void`` besides the classes, for pixels that a person
    cannot name; it means the same as not painted. Only one mask is in memory at a time.

    Args:
        path: the JSON file of the tasks.
        masks: name and labels of every image: uint8 ``[H, W]``, class indices and 255 for void.
        class_names: names by class index.
        prefix: what comes before an image's name in its address. The default is that of files on
            Label Studio's machine, below its document root.

    Returns:
        How many tasks were written.

    Raises:
        ValueError: bad names or labels, or an image twice.
        OSError: a file cannot be written.

    Example:
        >>> write_brush_tasks("tasks.json", [("a.jpg", labels)], ["road", "sky"])  # doctest: +SKIP
        1
    """
    where = "write_brush_tasks"
    names = check_class_names(where, class_names)
    images: list[str] = []
    with atomic(path) as file:
        for image, labels in masks:
            present = check_labels(where, image, labels, names)
            regions = [_region(labels, k, names[k], len(images)) for k in present]
            task = {
                "data": {"image": prefix + quote(image), "file": image},
                "predictions": [{"model_version": "cpseg", "result": regions}],
            }
            file.write((",\n" if images else "[\n").encode() + json.dumps(task).encode())
            images.append(image)
        check_once(where, images)
        file.write(b"\n]\n" if images else b"[]\n")
    write_text(Path(path).with_suffix(".xml"), _configuration(names))
    return len(images)


def _region(labels: Tensor, k: int, name: str, number: int) -> dict[str, Any]:
    height, width = labels.shape
    return {
        "id": f"image-{number}-class-{k}",
        "type": "brushlabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": {"format": "rle", "rle": encode_brush_rle(labels == k), "brushlabels": [name]},
    }


def _configuration(names: Sequence[str]) -> str:
    labels = "\n".join(f"    <Label value={quoteattr(name)}/>" for name in [*names, VOID_NAME])
    return f"""<View>
  <Image name="image" value="$image" zoom="true" zoomControl="true"/>
  <BrushLabels name="label" toName="image">
{labels}
  </BrushLabels>
</View>
"""


def read_brush_tasks(
    path: str | Path, class_names: Sequence[str], *, overlap: str = "error"
) -> Iterator[Annotated]:
    """The labels of every annotated image in an export of Label Studio (JSON).

    What people painted counts, not the predictions. A pixel is painted where the opacity is 128 of
    255 or more; the brush blends its edges. Tasks without an annotation, with skipped ones alone,
    or in which nothing is painted are left out. Unpainted pixels are void.

    Args:
        path: the export.
        class_names: names by class index.
        overlap: what pixels become that two classes claim: ``"error"``, ``"last"`` for the
            later region in the file, or ``"void"``.

    Yields:
        Name and labels of every annotated image.

    Raises:
        ValueError: a damaged file, two annotations of one image, a region of another kind, a label
            that is no class, a code of another size, or an overlap.
        FileNotFoundError: there is no such file.

    Example:
        >>> for image, labels in read_brush_tasks("export.json", ["road"]):  # doctest: +SKIP
        ...     print(image, labels.shape)
        a.jpg torch.Size([480, 640])
    """
    path = Path(path)
    names = check_class_names("read_brush_tasks", class_names)
    check_overlap("read_brush_tasks", overlap)
    tasks = read_json(path, _KIND)
    if not isinstance(tasks, list):
        raise ValueError(message(str(path), _KIND, f"a JSON {type(tasks).__name__}", _FIX))
    seen: set[str] = set()
    for place, task in enumerate(tasks, start=1):
        given = _annotations(f"{path}, task {place}", task)
        if not given:
            continue
        image = _image(f"{path}, task {place}", task["data"])
        check_once(str(path), [image, *({image} & seen)])
        seen.add(image)
        where = f"{path}, {image}"
        if len(given) > 1:
            fix = "delete all but one there: which is right is for people to say"
            got = str(len(given))
            raise ValueError(message(where, "one annotation per image", got, fix))
        labels = _labels(where, given[0], overlap, names)
        if labels is not None:
            yield Annotated(image, labels)


def _annotations(where: str, task: Any) -> list[list[Mapping[str, Any]]]:
    """The regions of every annotation of a task that was not skipped."""
    fits = isinstance(task, dict) and isinstance(task.get("data"), dict)
    annotations = task.get("annotations") if fits else None
    if not isinstance(annotations, list):
        raise ValueError(message(where, _KIND, short(task), _FIX))
    found = []
    for annotation in annotations:
        regions = annotation.get("result") if isinstance(annotation, dict) else None
        if not isinstance(regions, list) or not all(isinstance(each, dict) for each in regions):
            raise ValueError(message(where, _KIND, short(annotation), _FIX))
        if not annotation.get("was_cancelled"):
            found.append(regions)
    return found


def _image(where: str, data: Mapping[str, Any]) -> str:
    """The image of a task: as it was exported, or by its address."""
    if isinstance(data.get("file"), str):
        return str(data["file"])
    address = data.get("image")
    if not isinstance(address, str):
        expected = "a task with its image in data.file or data.image"
        raise ValueError(message(where, expected, short(dict(data)), _FIX))
    parts = urlsplit(address)
    served = parse_qs(parts.query).get("d")
    return served[0] if served else unquote(parts.path).lstrip("/")


def _labels(
    where: str, regions: Sequence[Mapping[str, Any]], overlap: str, names: Sequence[str]
) -> Tensor | None:
    """The labels of one annotation; None where nothing is painted, so that its size is unknown."""
    painter = None
    for region in regions:
        kind, value = region.get("type"), region.get("value")
        if not str(kind).endswith("labels"):
            continue  # choices, texts, relations: nothing of a mask
        if kind != "brushlabels" or not isinstance(value, dict) or "rle" not in value:
            fix = "paint with the brush, or remove the region"
            raise ValueError(message(where, "regions of the kind brushlabels", short(kind), fix))
        height, width = region.get("original_height"), region.get("original_width")
        expected = "original_height and original_width"
        size = size_of(where, height, width, expected=expected, fix=_FIX)
        if region.get("image_rotation") not in (0, None):
            got, fix = short(region["image_rotation"]), "annotate the image as it is stored"
            raise ValueError(message(where, "image_rotation 0", got, fix))
        chosen = value.get("brushlabels")
        if not isinstance(chosen, list) or len(chosen) != 1:
            fix = "give every region one label"
            raise ValueError(message(where, "one label per region", short(chosen), fix))
        painter = painter or Painter(where, size, overlap, names)
        mask = decode_brush_rle(value["rle"], size, where=where)
        painter.paint(mask, class_of(where, chosen[0], names))
    return None if painter is None else painter.labels
