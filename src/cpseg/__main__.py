"""``python -m cpseg``, for ``torchrun -m cpseg``."""

import sys

from cpseg.cli import main

sys.exit(main())
