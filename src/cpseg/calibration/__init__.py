"""From labelled images to thresholds: ``Calibrator`` makes a ``Calibration``.

``README.md`` in this folder says why the result is exact for every split, order and merge tree.
"""

from cpseg.calibration.calibration import Calibration
from cpseg.calibration.calibrator import Calibrator
from cpseg.calibration.certificate import Certificate
from cpseg.calibration.provenance import Provenance

__all__ = [
    "Calibration",
    "Calibrator",
    "Certificate",
    "Provenance",
]
