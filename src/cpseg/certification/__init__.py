"""Proven bounds on the error of pseudo-labels: ``Certifier`` makes a ``Certificate``."""

from cpseg.calibration.certificate import Certificate
from cpseg.certification.certifier import Certifier

__all__ = [
    "Certificate",
    "Certifier",
]
