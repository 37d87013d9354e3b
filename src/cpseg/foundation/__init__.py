"""Class probabilities from foundation models: :func:`load` one, call it on images."""

from cpseg.foundation.classes import Classes, parse_classes, read_classes
from cpseg.foundation.foundation import Foundation, Segmenter, load

__all__ = [
    "Classes",
    "Foundation",
    "Segmenter",
    "load",
    "parse_classes",
    "read_classes",
]
