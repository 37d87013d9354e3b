"""``python -m cpseg``, for ``torchrun -m cpseg``."""

import sys

from cpseg.cli.command import main

sys.exit(main())
