"""Masks as an archive of CVAT's format "Segmentation mask 1.1", and such archives read back."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpseg._internal.checks import message
from cpseg._internal.safe_files import atomic, damaged
from cpseg.core.mask_format import VOID
from cpseg.core.palette import Colour, voc_colour
from cpseg.files.annotations import (
    VOID_NAME,
    Annotated,
    check_class_names,
    check_labels,
    check_once,
    class_of,
)

_BACKGROUND = "background"  # CVAT's name of what is not annotated, in black
_VOIDS = (VOID_NAME, "ignored")
_KIND = "an archive of CVAT's format 'Segmentation mask 1.1'"
_FIX = "export the task in that format"
_LABELMAP = "labelmap.txt"
_LISTS, _CLASSES, _OBJECTS = "ImageSets/Segmentation", "SegmentationClass", "SegmentationObject"
_WITHOUT = ":\n\r#"  # what separates the columns of labelmap.txt, and begins a remark
_NONE = -1  # a label of the archive that is no class


def write_cvat(
    path: str | Path, masks: Iterable[tuple[str, Tensor]], class_names: Sequence[str]
) -> int:
    """Write masks as a zip archive for CVAT, atomically.

    Void is a label of its own, ``void``, so that people see it and can name it; the task in CVAT
    needs it besides the classes. Each class of an image is one object. A class named ``background``
    is black, as CVAT paints what is not annotated. CVAT knows images by their names without suffix.

    Args:
        path: the archive.
        masks: name and labels of every image: uint8 ``[H, W]``, class indices and 255 for void.
        class_names: names by class index, without a colon or ``#``.

    Returns:
        How many masks were written.

    Raises:
        ValueError: bad names or labels, or two images whose names differ in their suffix alone.
        OSError: the file cannot be written.

    Example:
        >>> write_cvat("labels.zip", [("a.jpg", labels)], ["road", "sky"])  # doctest: +SKIP
        1
    """
    names = check_class_names("write_cvat", class_names, without=_WITHOUT)
    colours = _colours(names)
    paint = np.zeros((256, 3), np.uint8)
    for k, name in enumerate(names):
        paint[k] = colours[name]
    paint[VOID] = colours[VOID_NAME]
    objects = np.array([voc_colour(index) for index in range(256)], np.uint8)
    items: list[str] = []
    seen: set[str] = set()
    with atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        for image, labels in masks:
            present = check_labels("write_cvat", image, labels, names)
            item = PurePosixPath(image).with_suffix("").as_posix()
            check_once("write_cvat", [item, *({item} & seen)])
            items.append(item)
            seen.add(item)
            values = labels.cpu().numpy()
            drawn = [k for k in (*present, VOID) if paint[k].any()]  # in black there is no object
            number = np.zeros(256, np.uint8)
            number[drawn] = np.arange(1, len(drawn) + 1)
            _add(archive, f"{_CLASSES}/{item}.png", _png(paint[values]))
            _add(archive, f"{_OBJECTS}/{item}.png", _png(objects[number[values]]))
        lines = [f"{name}:{','.join(map(str, colours[name]))}::" for name in colours]
        text = "\n".join(["# label:color_rgb:parts:actions", *lines, ""])
        _add(archive, _LABELMAP, text.encode())
        _add(archive, f"{_LISTS}/default.txt", "".join(f"{item}\n" for item in items).encode())
    return len(items)


def _colours(names: Sequence[str]) -> dict[str, Colour]:
    """The colour of every label of the archive, black first."""
    colours = {_BACKGROUND: (0, 0, 0)}
    colours |= {name: voc_colour(k + 1) for k, name in enumerate(names) if name != _BACKGROUND}
    return {**colours, VOID_NAME: voc_colour(VOID)}


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """A file of the archive without its time, so that the same masks give the same bytes."""
    archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)


def _png(colours: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(colours).save(content, format="PNG")
    return content.getvalue()


def read_cvat(path: str | Path, class_names: Sequence[str]) -> Iterator[Annotated]:
    """The labels of every image in an archive of CVAT's format "Segmentation mask 1.1".

    The labels ``void`` and ``ignored`` are void. Black is ``background``: the class of that name,
    or void where no class has it. ``SegmentationObject`` is not read.

    Args:
        path: the archive.
        class_names: names by class index.

    Yields:
        Name without suffix, and labels of every image.

    Raises:
        ValueError: no such archive, one without ``labelmap.txt`` or without a listed mask, a mask
            that is not in colours, a colour of no label, or pixels of a label that is no class.
        FileNotFoundError: there is no such file.

    Example:
        >>> for image, labels in read_cvat("export.zip", ["road", "sky"]):  # doctest: +SKIP
        ...     print(image, labels.shape)
        a torch.Size([480, 640])
    """
    path = Path(path)
    names = check_class_names("read_cvat", class_names, without=_WITHOUT)
    with _opened(path) as archive:
        files = set(archive.namelist())
        if _LABELMAP not in files:
            got = f"one without {_LABELMAP}"
            raise ValueError(message(str(path), _KIND, got, _FIX))
        labelmap = _read_labelmap(path, _text(path, archive, _LABELMAP))
        codes = np.array([red << 16 | green << 8 | blue for red, green, blue in labelmap], np.int64)
        classes = np.array([_class(name, names) for name in labelmap.values()], np.int64)
        order = np.argsort(codes)
        for item in _items(path, archive, files):
            where = f"{path}, {item}"
            seen = _codes(path, archive, f"{_CLASSES}/{item}.png")
            places = order[np.searchsorted(codes[order], seen).clip(max=len(codes) - 1)]
            strange = codes[places] != seen
            if strange.any():
                row, column = (int(axis[0]) for axis in strange.nonzero())
                got = f"#{int(seen[row, column]):06x} at row {row}, column {column}"
                raise ValueError(message(where, f"colours of {_LABELMAP}", got, _FIX))
            labels = classes[places]
            if (labels == _NONE).any():
                unknown = [*labelmap.values()][int(places[labels == _NONE][0])]
                class_of(where, unknown, names)  # raises
            yield Annotated(item, torch.from_numpy(labels.astype(np.uint8)))


def _class(name: str, names: Sequence[str]) -> int:
    if name in names:
        return list(names).index(name)
    return VOID if name in (*_VOIDS, _BACKGROUND) else _NONE


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise damaged(path, _KIND, error) from error
    with archive:
        yield archive


def _content(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except Exception as error:  # from zlib, a password, a cut-off file: anything may come
        raise damaged(f"{path}, {name}", "a file in the archive", error) from error


def _text(path: Path, archive: zipfile.ZipFile, name: str) -> str:
    try:
        return _content(path, archive, name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise damaged(f"{path}, {name}", "a text in UTF-8", error) from error


def _read_labelmap(path: Path, text: str) -> Mapping[Colour, str]:
    """The label of every colour."""
    found: dict[Colour, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, rest = line.partition(":")
        channels = rest.partition(":")[0].split(",")
        values = [int(each) for each in channels if each.strip().isdecimal()]
        where = f"{path}, {_LABELMAP}, line {number}"
        if len(values) != 3 or len(channels) != 3 or max(values) > 255:
            expected = "'label:red,green,blue::'"
            raise ValueError(message(where, expected, repr(line), _FIX))
        colour = values[0], values[1], values[2]
        if found.setdefault(colour, name.strip()) != name.strip():
            got = f"{found[colour]} and {name.strip()} with {channels}"
            raise ValueError(message(where, "a colour for each label", got, "change one in CVAT"))
    if not found:
        raise ValueError(message(f"{path}, {_LABELMAP}", "labels", "none", _FIX))
    return found


def _items(path: Path, archive: zipfile.ZipFile, files: set[str]) -> list[str]:
    """The listed images; where there are no lists, those of all masks."""
    lists = sorted(name for name in files if PurePosixPath(name).parent.as_posix() == _LISTS)
    masks = f"{_CLASSES}/"
    if not lists:
        return sorted(
            name.removeprefix(masks).removesuffix(".png")
            for name in files
            if name.startswith(masks) and name.endswith(".png")
        )
    lines = [line.strip() for name in lists for line in _text(path, archive, name).splitlines()]
    items = [line for line in lines if line]
    check_once(str(path), items)
    for item in items:
        if f"{masks}{item}.png" not in files:
            expected, got = f"{masks}{item}.png, which is listed", "none"
            raise ValueError(message(str(path), expected, got, _FIX))
    return items


def _codes(path: Path, archive: zipfile.ZipFile, name: str) -> NDArray[np.int64]:
    """The colours of a mask, each as one number."""
    from PIL import Image

    where = f"{path}, {name}"
    try:
        with Image.open(io.BytesIO(_content(path, archive, name))) as image:
            mode = image.mode
            colours = np.array(image.convert("RGB"), np.int64)
    except Exception as error:  # from Pillow's many decoders: anything may come
        if str(error).startswith(f"{where}: expected "):
            raise
        raise damaged(where, "a mask image", error) from error
    if mode not in ("RGB", "RGBA", "P"):
        raise ValueError(message(where, "a mask in colours", f"mode {mode}", _FIX))
    found: NDArray[np.int64] = colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]
    return found
