"""Which cells of the grid share a threshold.

Every variant of the Kandinsky family is a partition of the grid: a map of group indices, int64
``[H, W]``, that ``Calibrator`` takes.
"""

from cpseg.groups.fixed import blocks, image, pixel
from cpseg.groups.learned import annuli, curves, kmeans

__all__ = [
    "annuli",
    "blocks",
    "curves",
    "image",
    "kmeans",
    "pixel",
]
