"""What other people's tests import: calibration problems to try, and the laws as assertions.

The assertions take the user's own callables, so they test any conformal code, not only this
package's, and share no code with it. The strategies need hypothesis, which ``cpseg[dev]`` installs;
the assertions need nothing beyond the package.
"""

from cpseg.testing.assertions import assert_coverage, assert_leave_one_out, assert_selection_law
from cpseg.testing.certificates import WORLDS, assert_certificate, try_world
from cpseg.testing.strategies import (
    CalibrationProblem,
    calibration_problems,
    labels,
    probs,
    scores,
)

__all__ = [
    "WORLDS",
    "CalibrationProblem",
    "assert_certificate",
    "assert_coverage",
    "assert_leave_one_out",
    "assert_selection_law",
    "calibration_problems",
    "labels",
    "probs",
    "scores",
    "try_world",
]
