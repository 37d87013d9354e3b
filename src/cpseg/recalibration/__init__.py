"""Class probabilities mapped to the target domain: ``Recalibrator`` makes a ``Recalibration``."""

from cpseg.recalibration.recalibration import Recalibration
from cpseg.recalibration.recalibrator import Recalibrator

__all__ = [
    "Recalibration",
    "Recalibrator",
]
