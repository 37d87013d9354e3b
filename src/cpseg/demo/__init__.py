"""The whole job on handwritten digits: ``cpseg demo``."""

from cpseg.demo.demo import demo

__all__ = [
    "demo",
]
