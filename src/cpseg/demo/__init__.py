"""All jobs on handwritten digits (``cpseg demo``), and the scenes that it is made of."""

from cpseg.demo.demo import demo
from cpseg.demo.scenes import scenes as digit_scenes

__all__ = [
    "demo",
    "digit_scenes",
]
