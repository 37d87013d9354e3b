"""One picture of a check: photographs, with their masks and with the argmax over them."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cpseg._internal.safe_files import atomic
from cpseg.files.masks import read_image
from cpseg.jobs.check_agreement import at_size
from cpseg.jobs.check_findings import Check, Classes, Example

if TYPE_CHECKING:
    from PIL import ImageDraw

# Okabe and Ito's colours, told apart by people who do not see red or green, without black; then
# others that differ from them and from each other in lightness. None is grey.
_COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66),
    (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (51, 34, 136), (187, 235, 130), (136, 34, 85), (17, 100, 40),
    (255, 190, 210), (110, 60, 20), (90, 240, 240),
)  # fmt: skip
_WIDTH, _GAP, _LINE = 320, 8, 18
_WEIGHT = 0.6  # of the colours over the photograph
_TITLES = ("photograph", "mask", "argmax of scores")
_MOST_NAMED = 60  # classes in the legend


def draw(check: Check, path: str | Path) -> int:
    """Write the picture as PNG, atomically; void is hatched in grey.

    Returns:
        Number of images in it; with 0 nothing is written.
    """
    from PIL import Image, ImageDraw

    rows = [row for example in check.examples if (row := _row(example)) is not None]
    if not rows:
        return 0
    classes = sorted({int(each) for _, found in rows for each in found if each >= 0})
    width = 3 * _WIDTH + 4 * _GAP
    columns = max(1, (width - _GAP) // 64)
    named = [-1, *classes[:_MOST_NAMED]]
    legend = -(-(len(named) + 1) // columns) * (_LINE + 4) + _GAP
    height = _LINE + 2 * _GAP + sum(len(panels) + _GAP for panels, _ in rows) + legend
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    for column, title in enumerate(_TITLES):
        pen.text((_GAP + column * (_WIDTH + _GAP), _GAP), title, fill="black")
    top = _LINE + 2 * _GAP
    for panels, _ in rows:
        canvas.paste(Image.fromarray(panels), (_GAP, top))
        top += len(panels) + _GAP
    for place, index in enumerate(named):
        line, column = divmod(place if index < 0 else place + 1, columns)  # void takes two places
        left, y = _GAP + column * 64, top + line * (_LINE + 4)
        swatch = _coloured(np.full((_LINE, 2 * _LINE), index))
        canvas.paste(Image.fromarray(swatch), (left, y))
        _name(pen, (left + 2 * _LINE + 4, y + 3), "void or unknown" if index < 0 else str(index))
    if len(classes) > _MOST_NAMED:
        _name(pen, (_GAP, height - _LINE), f"and {len(classes) - _MOST_NAMED} more classes")
    with atomic(path) as file:
        canvas.save(file, format="PNG")
    return len(rows)


def _name(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str) -> None:
    pen.text(place, text, fill="black")


def _row(example: Example) -> tuple[npt.NDArray[np.uint8], set[int]] | None:
    """Three panels side by side, and the classes in them; None where there is no photograph."""
    try:
        photograph = read_image(example.image).permute(1, 2, 0).numpy()
    except (OSError, ValueError):
        return None
    height = max(1, round(photograph.shape[0] * _WIDTH / photograph.shape[1]))
    base = at_size(photograph, (height, _WIDTH))
    gap = np.full((height, _GAP, 3), 255, np.uint8)
    found: set[int] = set()
    panels = [base]
    for classes in (example.truth, example.argmax):
        panel = np.full_like(base, 255)
        if classes is not None:
            panel = _over(base, at_size(classes, (height, _WIDTH)))
            found |= set(np.unique(classes).tolist())
        panels += [gap, panel]
    return np.concatenate(panels, axis=1), found


def _over(photograph: npt.NDArray[np.uint8], classes: Classes) -> npt.NDArray[np.uint8]:
    """The colours of classes over a photograph ``[H, W, 3]``."""
    colours = _coloured(classes)
    mixed: npt.NDArray[np.uint8] = (
        _WEIGHT * colours + (1 - _WEIGHT) * photograph.mean(-1, keepdims=True)
    ).astype(np.uint8)
    mixed[classes < 0] = colours[classes < 0]
    return mixed


def _coloured(classes: Any) -> npt.NDArray[np.uint8]:
    """Classes ``[H, W]`` as colours; void as dark and light grey stripes."""
    most = int(classes.max(initial=0)) + 1
    table = np.array([colour(index) for index in range(most)], np.uint8)
    picture = table[np.maximum(classes, 0)]
    rows, columns = np.indices(classes.shape)
    stripes = np.where((rows + columns) % 8 < 3, 90, 190)[..., None]
    return np.where((classes < 0)[..., None], stripes, picture).astype(np.uint8)


def colour(index: int) -> tuple[int, int, int]:
    """Of a class: none is grey, and the first seven are told apart by everyone."""
    if index < len(_COLOURS):
        return _COLOURS[index]
    turn = (index - len(_COLOURS)) * 0.61803398875
    light = (0.35, 0.6, 0.78)[index % 3]  # told apart by lightness too
    red, green, blue = colorsys.hls_to_rgb((0.08 + turn) % 1, light, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)
