"""One thread per process, and the slowest tests on continuous integration alone.

On busy cores, threads that wait for each other cost 20 times the work.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands and scripts that tests run

import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``ci`` unless the environment variable CI is set."""
    reason = "slow: runs on continuous integration, or by make test-all"
    for item in items if not os.environ.get("CI") else ():
        if item.get_closest_marker("ci"):
            item.add_marker(pytest.mark.skip(reason=reason))
