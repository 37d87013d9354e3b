"""``python -m cpseg``, for ``torchrun -m cpseg``."""

import sys

from cpseg.cli.main import main

sys.exit(main())
