"""The pictures of the demo: rows of panels with a legend below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cpseg._internal.safe_files import atomic
from cpseg.demo.scenes import CLASS_NAMES, U8, VOID
from cpseg.files.masks import palette

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

IGNORED = 254  # drawn in place of 255 where a label was withheld, to tell it from void
_SCALE, _GAP, _MARGIN, _LEGEND = 2, 8, 170, 44
_PAPER = (235, 235, 235)


def colours() -> U8:
    """A colour for every value of a mask, ``[256, 3]``: void is white, ignored light grey."""
    found = np.array(palette(), dtype=np.uint8).reshape(256, 3)
    found[VOID] = 255
    found[IGNORED] = 170
    return found


def draw_panels(path: Path, rows: Mapping[str, Sequence[U8]]) -> None:
    """Write a PNG: a titled row of panels for every entry, and the legend.

    Args:
        path: the file.
        rows: by title, images ``[H, W, 3]`` or label maps ``[H, W]``, all of one size.
    """
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(rows.values()))
    height, width = (_SCALE * side for side in first[0].shape[:2])
    across = _MARGIN + len(first) * (width + _GAP)
    sheet = Image.new("RGB", (across, len(rows) * (height + _GAP) + _GAP + _LEGEND), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=20)
    for row, (title, panels) in enumerate(rows.items()):
        top = _GAP + row * (height + _GAP)
        pen.multiline_text((_GAP, top + height // 3), title, fill=(0, 0, 0), font=font)
        for column, panel in enumerate(panels):
            shown = panel if panel.ndim == 3 else colours()[panel]
            image = Image.fromarray(shown).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (_MARGIN + column * (width + _GAP), top))
    _legend(pen, font, len(rows) * (height + _GAP) + _GAP + 8)
    with atomic(path) as file:
        sheet.save(file, format="PNG", optimize=True)


def _legend(
    pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, top: int
) -> None:
    """A square of every colour with its meaning."""
    entries = [*enumerate(CLASS_NAMES), (IGNORED, "ignored"), (VOID, "void")]
    left = _MARGIN
    for value, name in entries:
        fill = tuple(int(channel) for channel in colours()[value])
        pen.rectangle((left, top, left + 20, top + 20), fill=fill, outline=(0, 0, 0))
        pen.text((left + 26, top - 2), name, fill=(0, 0, 0), font=font)
        left += 42 + int(pen.textlength(name, font=font))
