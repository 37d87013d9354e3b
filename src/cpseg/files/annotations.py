"""What the formats of annotation tools share: names of classes, and one mask out of several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpseg._internal import words
from cpseg._internal.checks import check_choice, message, short
from cpseg._internal.safe_files import damaged
from cpseg.core.mask_format import VOID
from cpseg.files.masks import MOST_PIXELS

VOID_NAME = "void"  # in tools that must name every pixel
OVERLAPS = words.OVERLAPS


class Annotated(NamedTuple):
    """One image of an annotation tool's file.

    Attributes:
        image: its name there; CVAT leaves the suffix out.
        labels: uint8 ``[H, W]``, 255 where nothing was annotated.
    """

    image: str
    labels: Tensor


def check_class_names(where: str, names: Sequence[str], *, without: str = "\n\r") -> list[str]:
    """Names by class index, which tell the classes apart.

    Args:
        where: the function, for messages.
        names: of the classes, in their order.
        without: characters that a name must not hold.

    Raises:
        ValueError: none or more than 254, one that is empty, twice, ``void``, or holds such a
            character or white space at its ends.
    """
    names = list(names)
    if not 1 <= len(names) < VOID:
        got, fix = str(len(names)), "pass one name per class"
        raise ValueError(message(where, f"1 to {VOID - 1} class names", got, fix))
    for name in names:
        if not isinstance(name, str) or not name or name != name.strip():
            fix = "rename the class"
            raise ValueError(message(where, "class names as words", repr(name), fix))
        bad = [each for each in without if each in name]
        if bad:
            expected = f"class names without {bad[0]!r}"
            raise ValueError(message(where, expected, repr(name), "rename the class"))
        if name == VOID_NAME or names.count(name) > 1:
            expected = "every class name once" if name != VOID_NAME else "class names but 'void'"
            fix = "rename the class" if name != VOID_NAME else "void pixels have that name"
            raise ValueError(message(where, expected, repr(name), fix))
    return names


def class_of(where: str, name: object, names: Sequence[str]) -> int:
    """The index of a class by its name; 255 for void.

    Raises:
        ValueError: no such class.
    """
    if name == VOID_NAME:
        return VOID
    if name in names:
        return list(names).index(str(name))
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    fix = "rename it there, or pass the names that it was annotated with"
    raise ValueError(message(where, f"a class among {shown}", short(name), fix))


def check_labels(where: str, image: str, labels: Tensor, names: Sequence[str]) -> list[int]:
    """The classes that occur in the labels of an image.

    Raises:
        ValueError: not uint8 ``[H, W]``, or a value that is neither a class with a name nor 255.
    """
    if labels.ndim != 2 or labels.dtype != torch.uint8 or labels.numel() == 0:
        got = f"{labels.dtype} {list(labels.shape)} for {image}"
        fix = "pass class indices with 255 for void"
        raise ValueError(message(where, "uint8 labels [H, W]", got, fix))
    present: list[int] = (
        torch.bincount(labels.flatten(), minlength=256).nonzero().flatten().tolist()
    )
    classes = [label for label in present if label != VOID]
    if classes and classes[-1] >= len(names):
        expected = f"labels in 0..{len(names) - 1} or {VOID}, one name for each class"
        fix = "name every class"
        raise ValueError(message(where, expected, f"{classes[-1]} in {image}", fix))
    return classes


class Painter:
    """The labels of one image out of masks of single classes.

    Args:
        where: file and image, for messages.
        size: height and width.
        overlap: what happens where masks of two classes meet: ``"error"``, ``"last"`` for the
            later mask, or ``"void"`` for neither.
        names: of the classes, for messages.
    """

    def __init__(
        self, where: str, size: tuple[int, int], overlap: str, names: Sequence[str]
    ) -> None:
        if size[0] * size[1] > MOST_PIXELS:
            got, fix = f"{size[0]}x{size[1]}", "export the file anew"
            raise ValueError(message(where, f"at most {MOST_PIXELS} pixels", got, fix))
        self.where = where
        self.overlap = overlap
        self.names = [*names]
        self.labels = torch.full(size, VOID, dtype=torch.uint8)
        self.painted = torch.zeros(size, dtype=torch.bool)

    def paint(self, mask: Tensor, label: int) -> None:
        """Give the pixels of a mask a class, or void.

        Raises:
            ValueError: a mask of another size, or one that overlaps where that is an error.
        """
        if mask.shape != self.labels.shape:
            expected = f"a mask of {self.labels.shape[0]}x{self.labels.shape[1]} pixels"
            got, fix = "x".join(map(str, mask.shape)), "annotate the image at its own size"
            raise ValueError(message(self.where, expected, got, fix))
        clash = mask & self.painted & (self.labels != label)
        if self.overlap == "error" and bool(clash.any()):
            row, column = clash.nonzero()[0].tolist()
            mine, other = (_name(self.names, k) for k in (label, int(self.labels[row, column])))
            got = f"{other} and {mine} at row {row}, column {column}"
            fix = "correct it there, or choose what overlaps become: last or void (--overlap)"
            raise ValueError(message(self.where, "one class per pixel", got, fix))
        self.labels[mask] = label
        if self.overlap == "void":
            self.labels[clash] = VOID
        self.painted |= mask


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else VOID_NAME


def check_overlap(where: str, overlap: object) -> None:
    """One of ``OVERLAPS``."""
    check_choice(where, overlap, OVERLAPS, name="overlap")


def check_once(where: str, images: Iterable[str]) -> None:
    """Every image once.

    Raises:
        ValueError: one twice.
    """
    seen: set[str] = set()
    for image in images:
        if image in seen:
            fix = "remove one of them"
            raise ValueError(message(where, "every image once", f"{image} twice", fix))
        seen.add(image)


def size_of(
    where: str, height: object, width: object, *, expected: str, fix: str
) -> tuple[int, int]:
    """Height and width, which may be anything in a damaged file.

    Raises:
        ValueError: they are none.
    """
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise ValueError(message(where, expected, f"{short(height)} and {short(width)}", fix))
    return height, width


def read_json(path: Path, expected: str) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is none; ``expected`` says what it should be.
        FileNotFoundError: there is no such file.
    """
    import json

    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, expected, error) from error
