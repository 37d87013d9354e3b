"""Label maps laid over photographs, for the pictures of a report.

Pixels without a class never have a colour of their own: void pixels are hatched in two greys, those
left without a label are dotted.
"""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import numpy as np

from cpseg.core.colours import GREYS, Array, class_colours, hatched
from cpseg.files.masks import VOID, open_image

SIDE = 480  # pixels, about the longer side of a picture
WRONG = (213, 0, 50)  # laid over wrong labels
_STRENGTH = 0.55  # of a class's colour over the photograph
_DOTS = GREYS[2:]


class Canvas(NamedTuple):
    """A photograph at the size of a page's pictures, and what maps labels to that size.

    Attributes:
        photo: uint8 ``[h, w, 3]``, or None where the file cannot be opened.
        rows: the row of the labels behind each row of the picture.
        columns: the same for columns.
    """

    photo: Array | None
    rows: Array
    columns: Array

    @classmethod
    def over(cls, path: str, size: tuple[int, ...]) -> Canvas:
        """For an image file and labels of a size; small images are enlarged, large ones reduced."""
        from PIL import Image

        height, width = size[:2]
        scale = min(SIDE / max(height, width), 8)
        scale = max(1, round(scale)) if scale >= 1 else scale
        h, w = max(round(height * scale), 1), max(round(width * scale), 1)
        rows, columns = np.arange(h) * height // h, np.arange(w) * width // w
        try:
            with open_image(path) as image:
                small = image.convert("RGB").resize((w, h), Image.Resampling.BICUBIC)
        except (OSError, ValueError):
            return cls(None, rows, columns)
        return cls(np.array(small), rows, columns)

    def labels(self, labels: Array) -> Array:
        """Labels at the size of the picture."""
        return np.asarray(labels[self.rows][:, self.columns])

    def paper(self) -> Array:
        """The photograph, or white."""
        if self.photo is not None:
            return self.photo
        return np.full((len(self.rows), len(self.columns), 3), 255, np.uint8)


def jpeg(pixels: Array) -> str:
    """A picture ``[h, w, 3]`` as the source of an ``<img>``."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def dotted(paper: Array) -> Array:
    """No label: the picture made pale, with dark dots."""
    grid = np.indices(paper.shape[:2])
    down, across = grid[0], grid[1]
    pale = 0.3 * paper + 0.7 * _DOTS[0]
    dots = (down % 8 < 2) & ((across + 4 * (down // 8 % 2)) % 8 < 2)
    return np.where(dots[..., None], _DOTS[1], pale)


def overlay(
    canvas: Canvas, labels: Array, *, ignored: bool, background: int | None = None
) -> Array:
    """Labels ``[H, W]`` laid over a photograph, uint8 ``[h, w, 3]``.

    Args:
        canvas: the photograph.
        labels: classes; 255 is dotted where it was ``ignored``, and hatched where it is void.
        ignored: whether 255 means a pixel without a label.
        background: a class that is not painted.
    """
    labels, paper = canvas.labels(labels), canvas.paper().astype(float)
    strength = _STRENGTH if canvas.photo is not None else 1.0
    painted = (1 - strength) * paper + strength * class_colours(256)[labels]
    if background is not None:
        painted = np.where((labels == background)[..., None], paper, painted)
    without = dotted(paper) if ignored else hatched((paper.shape[0], paper.shape[1]))
    painted = np.where((labels == VOID)[..., None], without, painted)
    return np.asarray(painted.round().clip(0, 255).astype(np.uint8))


def mistakes(canvas: Canvas, labels: Array, truth: Array) -> Array:
    """Wrong labels red over a grey photograph, uint8 ``[h, w, 3]``.

    Pixels without a label are dotted, those without a known truth hatched.
    """
    labels, truth = canvas.labels(labels), canvas.labels(truth)
    grey = canvas.paper().mean(-1, keepdims=True).repeat(3, -1)
    grey = 0.6 * grey + 0.4 * 255
    pixels = np.where((labels != truth)[..., None], np.array(WRONG), grey)
    pixels = np.where((labels == VOID)[..., None], dotted(grey), pixels)
    hatch = hatched((grey.shape[0], grey.shape[1]))
    pixels = np.where((truth == VOID)[..., None], hatch, pixels)
    return np.asarray(pixels.round().clip(0, 255).astype(np.uint8))
