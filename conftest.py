"""Names that docstring examples use without importing them; the versions of a test run."""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path
from typing import Any

import pytest
import torch

import cpseg

# Of the documentation's environment, which users and `make test-lowest` do not have.
collect_ignore = [] if util.find_spec("griffe") else ["docs/theme/docstrings.py"]
collect_ignore_glob = ["docs/tutorials/*.py"]  # scripts, which run when they are imported

VERSIONS = (
    *("torch", "numpy", "scipy", "einops", "safetensors", "pillow", "tqdm"),
    *("transformers", "scikit-learn", "matplotlib"),
)


def pytest_report_header() -> list[str]:
    """Which cpseg is tested, and with what."""
    found = []
    for name in VERSIONS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return [f"cpseg {cpseg.__version__} in {Path(cpseg.__file__).parent}", ", ".join(found)]


@pytest.fixture(autouse=True)
def names_in_examples(doctest_namespace: dict[str, Any]) -> None:
    """Every public name, and torch."""
    doctest_namespace["torch"] = torch
    for name in cpseg.__all__:
        doctest_namespace[name] = getattr(cpseg, name)
