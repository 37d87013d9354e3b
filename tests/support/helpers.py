"""What several tests share: one check for error messages, dtypes, and how hypothesis runs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

# The same examples on every run: a red build is a change, not a draw. By night twice as many.
EXAMPLES = 60 if os.environ.get("NIGHTLY") else 30
settings.register_profile(
    "cpseg", deadline=None, max_examples=EXAMPLES, derandomize=True, database=None, print_blob=False
)
settings.load_profile("cpseg")

if "PYTEST_XDIST_WORKER" in os.environ:  # workers that share the cores must not fight over them
    torch.set_num_threads(1)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
STANDARD = re.compile(r"[\w.]+: expected [^\n]+, got [^\n]+; [^\n]+")


@contextmanager
def raises(kind: type[Exception], where: str, match: str) -> Iterator[None]:
    """``function: expected ..., got ...; fix`` in one line, from ``where``, saying ``match``."""
    with pytest.raises(kind, match=match) as caught:
        yield
    said = str(caught.value)
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {said}"
    assert STANDARD.fullmatch(said), said
    assert said.startswith(f"{where}: "), said


@contextmanager
def modules(example: str, names: Sequence[str]) -> Iterator[SimpleNamespace]:
    """The modules of an example, which lie beside each other and in no package."""
    folder = str(Path(__file__).parents[2] / "examples" / example)
    sys.path.insert(0, folder)
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in names})
    finally:
        sys.path.remove(folder)
        for name in names:
            sys.modules.pop(name, None)


def same(left: Tensor, right: Tensor | np.ndarray) -> bool:
    """Equal bit for bit but for the payload of NaN; same shape and dtype."""
    right = torch.as_tensor(right)
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not left.is_floating_point():
        return bool((left == right).all())
    return bool(((left == right) | (left.isnan() & right.isnan())).all())


def exact(values: Tensor) -> np.ndarray:
    """As float64, which holds every floating-point dtype here exactly."""
    return values.detach().to(torch.float64).numpy()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
