"""Colours of classes on a report's pictures, and label maps laid over photographs.

The first colours are those of Okabe & Ito (2008) but black. More are chosen to be far from all
before them, and from grey, as seen by people with and without a colour vision deficiency. Pixels
without a class never have a colour of their own: void pixels are hatched in two greys, pixels left
without a label are dotted.
"""

from __future__ import annotations

import base64
import functools
import io
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpseg.files.masks import VOID, open_image

Array = npt.NDArray[Any]

SIDE = 480  # pixels, about the longer side of a picture
OKABE_ITO = ("E69F00", "56B4E9", "009E73", "F0E442", "0072B2", "D55E00", "CC79A7")
WRONG = (213, 0, 50)  # laid over wrong labels
_STRENGTH = 0.55  # of a class's colour over the photograph
_HATCH = (95, 185)  # two greys
_DOTS = (245, 40)  # paper and dot of a pixel without a label
# Machado, Oliveira & Fernandes (2009), severity 1, on linear RGB.
_VISIONS = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ],
    ]
)
# Björn Ottosson's OKLab: distances in it are about as large as they look.
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_FROM_CONES = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def seen(colours: Array) -> Array:
    """OKLab coordinates of colours, ``[4, n, 3]``.

    As seen with usual colour vision, and without the long, the middle and the short cones.

    Args:
        colours: sRGB in 0..255, ``[n, 3]``.
    """
    value = np.asarray(colours, float) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    by_vision = np.clip(np.einsum("vij,nj->vni", _VISIONS, linear), 0, 1)
    return np.asarray(np.cbrt(by_vision @ _TO_CONES.T) @ _FROM_CONES.T)


@functools.cache
def _palette() -> Array:
    """A colour for each of 256 classes, uint8 ``[256, 3]``, the same on every machine."""
    chosen = [[int(name[at : at + 2], 16) for at in (0, 2, 4)] for name in OKABE_ITO]
    steps = np.arange(0, 256, 17)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lab = seen(grid)
    chroma = np.hypot(lab[0, :, 1], lab[0, :, 2])
    able = (chroma > 0.06) & (lab[0, :, 0] > 0.3) & (lab[0, :, 0] < 0.95)
    grid, lab = grid[able], lab[:, able]
    greys = [[level] * 3 for level in (*_HATCH, *_DOTS)]

    def nearest(others: Array) -> Array:
        """The distance to one colour, in the vision in which it is smallest."""
        return np.asarray(np.linalg.norm(lab - others[:, None], axis=-1).min(0))

    first = seen(np.array(chosen + greys))
    least = np.stack([nearest(first[:, n]) for n in range(first.shape[1])]).min(0)
    while len(chosen) < 256:
        place = int(np.round(least, 9).argmax())
        chosen.append(grid[place].tolist())
        least = np.minimum(least, nearest(lab[:, place]))
    return np.array(chosen, np.uint8)


def class_colours(num_classes: int) -> Array:
    """The colours of the first classes, uint8 ``[K, 3]``."""
    return _palette()[:num_classes]


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


def hatched(size: tuple[int, int]) -> Array:
    """Void: diagonals in two greys, ``[h, w, 3]``."""
    down, across = np.indices(size)
    return np.where((down + across) // 5 % 2 == 0, *_HATCH)[..., None].repeat(3, -1)


def dotted(paper: Array) -> Array:
    """No label: the picture made pale, with dark dots."""
    down, across = np.indices(paper.shape[:2])
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
    painted = (1 - strength) * paper + strength * _palette()[labels]
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
