"""The page of an audit: one HTML file that shows drawn pixels and takes the answers of a person."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpseg._internal.checks import message
from cpseg._internal.safe_files import atomic
from cpseg.files.audit_files import CLOSE_UP, Question, class_name, once
from cpseg.files.dataset import Progress, quiet
from cpseg.files.id_lists import Pair
from cpseg.files.masks import palette

if TYPE_CHECKING:
    from PIL import Image

Mask = npt.NDArray[np.uint8]
_TEMPLATE = "audit_page.html"
_AROUND = 100  # pixels of the image on each side of the one in question, in the page
_OVERVIEW = 640  # pixels, the longer side of a whole image as shown
_CELLS = 256  # cells, the longer side of the region's outline in the whole image
_SCALE = 6  # pixels of a picture for each pixel of its close-up
_OUTSIDE = (200, 200, 200)  # the colour of a picture beyond the image


class _Opened(NamedTuple):
    """An image with what all questions about it share."""

    image: Image.Image
    mask: Mask
    overview: Image.Image


def write_audit_page(
    path: str | Path,
    *,
    plan: str,
    questions: Sequence[Question],
    class_names: Sequence[str],
    image: Callable[[str], Image.Image],
    mask: Callable[[str], Mask],
    allowed: Sequence[int] | None,
    title: str,
    statement: str,
    progress: Progress = quiet,
) -> None:
    """Write the page, atomically. It needs no server and no network.

    Args:
        path: the HTML file.
        plan: fingerprint of the plan; a browser keeps answers under it.
        questions: the drawn pixels, in the order of the draw, numbered from 0.
        class_names: names by class index.
        image: opens an image by its name; called once for each image.
        mask: the labels of an image by its name, uint8 ``[H, W]``; called once for each image.
        allowed: for n = 0 to the number of questions, how many of the first n answers may be wrong
            for the bound to be certified, -1 where it cannot be; None shows no verdict.
        title: headline of the page.
        statement: what the audit is to show and how answers count, in a sentence or two.
        progress: wraps the loop over images.

    Raises:
        ValueError: questions are not numbered in order, ``allowed`` has another length, a mask has
            not the size of its image, or has another label at a pixel than the question says.
        OSError: a file that cannot be read or written.
    """
    where = "write_audit_page"
    if [question.number for question in questions] != list(range(len(questions))):
        expected, fix = "questions numbered 0, 1, 2 in order", "pass the whole draw"
        got = f"numbers {[question.number for question in questions[:5]]}"
        raise ValueError(message(where, expected, got, fix))
    if not questions:
        raise ValueError(message(where, "questions", "none", "draw at least one pixel"))
    if allowed is not None and len(allowed) != len(questions) + 1:
        expected, fix = f"{len(questions) + 1} entries in allowed", "begin with no answers"
        raise ValueError(message(where, expected, str(len(allowed)), fix))
    template = Path(__file__).with_name(_TEMPLATE).read_text(encoding="utf-8")
    before, after = template.split("<!--DATA-->\n")
    head = before.replace("@STATEMENT@", escape(statement)).replace("@TITLE@", escape(title))
    with atomic(path) as file:
        file.write(head.encode())
        images: list[dict[str, Any]] = []
        pixels: dict[int, dict[str, Any]] = {}
        asked = once(questions)
        for name, opened, places in _by_image(asked, image, mask, progress):
            file.write(_block(f"o{len(images)}", _jpeg(opened.overview, quality=75)))
            for place in places:
                question = asked[place]
                parts, pixels[place] = _pixel(question, opened)
                pixels[place] |= {"image": len(images), "numbers": []}
                for key, content in parts.items():
                    file.write(_block(f"{key}{place}", content))
            height, width = opened.mask.shape
            cells = [len(each) for each in _cells(width, height)]
            images.append({"name": name, "width": width, "height": height, "cells": cells})
        place_of = {question.pixel: place for place, question in enumerate(asked)}
        for question in questions:
            pixels[place_of[question.pixel]]["numbers"].append(question.number)
        data = {
            "plan": plan,
            "total": len(questions),
            "allowed": None if allowed is None else [int(most) for most in allowed],
            "classes": _classes(asked, class_names),
            "images": images,
            "pixels": [pixels[place] for place in range(len(asked))],
        }
        text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        file.write(f'<script type="application/json" id="data">{text}</script>\n{after}'.encode())


def _by_image(
    asked: Sequence[Question],
    image: Callable[[str], Image.Image],
    mask: Callable[[str], Mask],
    progress: Progress,
) -> Iterator[tuple[str, _Opened, list[int]]]:
    """Each image once, opened, with the places in ``asked`` of the questions about it."""
    places: dict[str, list[int]] = {}
    for place, question in enumerate(asked):
        places.setdefault(question.image, []).append(place)
    pairs = [Pair(name, None) for name in places]
    for name, _ in progress(pairs, len(pairs), "images"):
        with image(name) as opened:
            labels = np.asarray(mask(name))
            _check(name, opened, labels, [asked[place] for place in places[name]])
            yield name, _Opened(opened, labels, _overview(opened)), places[name]


def _check(name: str, image: Image.Image, labels: Mask, asked: Sequence[Question]) -> None:
    size = (image.height, image.width)
    if labels.shape != size:
        expected, got = f"a mask {list(size)} like the image", str(list(labels.shape))
        raise ValueError(message(name, expected, got, "pass masks of the images' size"))
    for _, _, row, column, label in asked:
        inside = 0 <= row < size[0] and 0 <= column < size[1]
        found = f"label {int(labels[row, column])}" if inside else f"a mask {list(size)}"
        if found != f"label {label}":
            expected = f"label {label} at row {row} column {column}"
            raise ValueError(message(name, expected, found, "draw pixels of these masks"))


def _pixel(question: Question, opened: _Opened) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The parts of the page about one pixel, and the facts that its script needs."""
    height, width = opened.mask.shape
    left, top = max(question.column - _AROUND, 0), max(question.row - _AROUND, 0)
    right = min(question.column + _AROUND + 1, width)
    bottom = min(question.row + _AROUND + 1, height)
    close = _rgb(opened.image.crop((left, top, right, bottom)))
    columns, rows = _cells(width, height)
    parts = {
        "c": _jpeg(close, quality=90, subsampling=0),  # one pixel counts: its colour is kept
        "b": _bits(opened.mask[top:bottom, left:right] == question.label),
        "m": _bits(opened.mask[np.ix_(rows, columns)] == question.label),
    }
    crop = [left, top, right - left, bottom - top]
    facts = {"row": question.row, "column": question.column, "label": question.label, "crop": crop}
    return parts, facts


def _classes(asked: Sequence[Question], names: Sequence[str]) -> dict[int, dict[str, str]]:
    """Name and colour of each class that occurs; colours as in mask files."""
    colours = palette()
    return {
        label: {
            "name": class_name(names, label),
            "colour": "rgb({}, {}, {})".format(*colours[3 * label : 3 * label + 3]),
        }
        for label in sorted({question.label for question in asked})
    }


def _cells(width: int, height: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The columns and rows at the middle of each cell of a coarse grid."""
    scale = max(width, height, _CELLS) / _CELLS
    sides = (max(round(side / scale), 1) for side in (width, height))
    columns, rows = (
        ((np.arange(cells) + 0.5) * side / cells).astype(np.intp)
        for cells, side in zip(sides, (width, height), strict=True)
    )
    return columns, rows


def _overview(image: Image.Image) -> Image.Image:
    """A small copy. Whole factors first: that is fast, and enough for large images."""
    if image.mode not in ("L", "RGB"):
        image = _rgb(image)
    factor = max(image.width, image.height) // _OVERVIEW
    small = image.reduce(factor) if factor > 1 else image.copy()
    small.thumbnail((_OVERVIEW, _OVERVIEW))
    return _rgb(small)


def _rgb(image: Image.Image) -> Image.Image:
    """In 8 bits; deeper images from their darkest to their brightest value."""
    from PIL import Image

    if image.mode[0] in "IF":
        values = np.asarray(image, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        scaled = 255 * (values - low) / max(high - low, 1e-12)
        image = Image.fromarray(scaled.round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _jpeg(image: Image.Image, *, quality: int, subsampling: int = -1) -> bytes:
    made = io.BytesIO()
    image.save(made, format="JPEG", quality=quality, subsampling=subsampling, optimize=True)
    return made.getvalue()


def _bits(inside: npt.NDArray[np.bool_]) -> bytes:
    return np.packbits(inside).tobytes()


def _block(name: str, content: bytes) -> bytes:
    """A part of the page that the browser keeps as text until the script asks for it."""
    code = base64.b64encode(content).decode()
    return f'<script type="text/plain" id="{name}">{code}</script>\n'.encode()


def audit_pictures(
    questions: Sequence[Question],
    image: Callable[[str], Image.Image],
    mask: Callable[[str], Mask],
    *,
    progress: Progress = quiet,
) -> dict[int, bytes]:
    """A picture for the first question about each pixel, by number; each image is opened once.

    Args:
        questions: the drawn pixels.
        image: opens an image by its name.
        mask: the labels of an image by its name, uint8 ``[H, W]``.
        progress: wraps the loop over images.

    Raises:
        ValueError: a mask has not the size of its image, or another label than a question says.
        OSError: a file that cannot be read.
    """
    asked = once(questions)
    return {
        asked[place].number: _picture(asked[place], opened)
        for _, opened, places in _by_image(asked, image, mask, progress)
        for place in places
    }


def picture_of(question: Question, image: Image.Image, mask: Mask) -> bytes:
    """A JPEG of one question: the close-up with the pixel framed, and the whole image beside it.

    Args:
        question: the pixel.
        image: its image.
        mask: the labels of that image, uint8 ``[H, W]``.

    Returns:
        A picture as ``cpseg.files.audit_files.write_label_studio`` takes it.

    Raises:
        ValueError: the mask has not the size of the image, or another label than the question says.
    """
    _check(question.image, image, mask, [question])
    return _picture(question, _Opened(image, mask, _overview(image)))


def _picture(question: Question, opened: _Opened) -> bytes:
    from PIL import Image, ImageOps

    side, half = _SCALE * CLOSE_UP, CLOSE_UP // 2
    left, top = question.column - half, question.row - half
    inside = np.zeros((CLOSE_UP, CLOSE_UP), dtype=bool)
    height, width = opened.mask.shape
    rows = slice(max(top, 0), min(top + CLOSE_UP, height))
    columns = slice(max(left, 0), min(left + CLOSE_UP, width))
    inside[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = (
        opened.mask[rows, columns] == question.label
    )
    window = (columns.start, rows.start, columns.stop, rows.stop)
    close = Image.new("RGB", (CLOSE_UP, CLOSE_UP), _OUTSIDE)
    close.paste(_rgb(opened.image.crop(window)), (columns.start - left, rows.start - top))
    drawn = np.asarray(close.resize((side, side), Image.Resampling.NEAREST)).copy()
    drawn[_border(inside)] = (255, 225, 77)
    _mark(drawn, half * _SCALE)

    overview = ImageOps.contain(opened.overview, (side, side))
    made = Image.new("RGB", (side + _SCALE + overview.width, side), _OUTSIDE)
    made.paste(Image.fromarray(drawn), (0, 0))
    made.paste(overview, (side + _SCALE, 0))
    _ring(made, question, side + _SCALE, overview.width / width)
    return _jpeg(made, quality=85, subsampling=0)


def _border(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The pixels of the enlarged close-up on either side of the border of a region."""
    large = inside.repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)
    border = np.zeros_like(large)
    across, down = large[:, 1:] != large[:, :-1], large[1:] != large[:-1]
    border[:, 1:] |= across
    border[:, :-1] |= across
    border[1:] |= down
    border[:-1] |= down
    return border


def _mark(drawn: npt.NDArray[Any], start: int) -> None:
    """Frame the pixel that begins at ``start``, white in black, and leave it as it is."""
    stop = start + _SCALE
    kept = drawn[start:stop, start:stop].copy()
    for colour, wide in ((0, 4), (255, 2)):
        drawn[start - wide : stop + wide, start - wide : stop + wide] = colour
    drawn[start:stop, start:stop] = kept
    middle = start + _SCALE // 2
    for colour, thick in ((0, 3), (255, 1)):
        for near, far in ((start - 6 * _SCALE, start - _SCALE), (stop + _SCALE, stop + 6 * _SCALE)):
            drawn[middle - thick : middle + thick, near:far] = colour
            drawn[near:far, middle - thick : middle + thick] = colour


def _ring(made: Image.Image, question: Question, left: int, scale: float) -> None:
    """A ring around the place of the pixel in the whole image."""
    from PIL import ImageDraw

    x, y = left + (question.column + 0.5) * scale, (question.row + 0.5) * scale
    draw = ImageDraw.Draw(made)
    for colour, radius, thick in (("black", 12, 6), ("white", 10, 2)):
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, outline=colour, width=thick)
