"""One thread per process, and the slowest tests on continuous integration or by night alone.

On busy cores, threads that wait for each other cost 20 times the work.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands and scripts that tests run

import torch

torch.set_num_threads(1)


SLOW = {
    "ci": ("CI", "slow: runs on continuous integration, or by make test-all"),
    "nightly": ("NIGHTLY", "slower: runs by make test-all"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that are marked as slow, unless the marker's environment variable is set."""
    for mark, (variable, reason) in SLOW.items():
        for item in items if not os.environ.get(variable) else ():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
