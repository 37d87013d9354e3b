"""Colours of classes on pictures, which colour-blind people tell apart, and the look of void.

The first colours are those of Okabe & Ito (2008) but black. More are chosen to be far from all
before them, and from grey, as seen by people with and without a colour vision deficiency. Void
pixels never have a colour of their own: they are hatched in two greys.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

OKABE_ITO = ("E69F00", "56B4E9", "009E73", "F0E442", "0072B2", "D55E00", "CC79A7")
GREYS = (95, 185, 245, 40)  # of void, then of paper and dot of a pixel without a label
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
    greys = [[level] * 3 for level in GREYS]

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


def hatched(size: tuple[int, int]) -> Array:
    """Void: diagonals in two greys, ``[h, w, 3]``."""
    down, across = np.indices(size)
    return np.where((down + across) // 5 % 2 == 0, *GREYS[:2])[..., None].repeat(3, -1)
