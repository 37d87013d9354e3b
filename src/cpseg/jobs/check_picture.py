"""One picture of a check: photographs, with their masks and with the argmax over them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cpseg._internal.safe_files import atomic
from cpseg.core.colours import class_colours, hatched
from cpseg.files.masks import read_image
from cpseg.jobs.check_agreement import at_size
from cpseg.jobs.check_findings import Check, Classes, Example

if TYPE_CHECKING:
    from PIL import ImageDraw

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


def _coloured(classes: Classes) -> npt.NDArray[np.uint8]:
    """Classes ``[H, W]`` as colours; void is hatched."""
    rows, columns = classes.shape
    painted = class_colours(256)[np.clip(classes, 0, 255)]
    picture = np.where((classes < 0)[..., None], hatched((rows, columns)), painted)
    return np.asarray(picture.astype(np.uint8))
