"""Names that docstring examples use without importing them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cpseg


@pytest.fixture(autouse=True)
def names_in_examples(doctest_namespace: dict[str, Any]) -> None:
    """Every public name, and torch."""
    doctest_namespace["torch"] = torch
    for name in cpseg.__all__:
        doctest_namespace[name] = getattr(cpseg, name)
