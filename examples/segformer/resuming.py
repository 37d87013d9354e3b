"""Writing and restoring checkpoints of a run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from cpseg.files import atomic, write_text
from ranks import rank, wait

_FIX = "choose another file or --out, or delete it"


class Trained(Protocol):
    """An object whose state a checkpoint holds."""

    student: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Any


def save(path: Path, trained: Trained, settings: dict[str, Any], step: int) -> None:
    """Write the state after ``step`` steps; if the run is killed meanwhile, the old file stays."""
    state = {
        "student": trained.student.state_dict(),
        "optimizer": trained.optimizer.state_dict(),
        "scaler": trained.scaler.state_dict(),
        "settings": settings,
        "step": step,
    }
    with atomic(path) as file:
        torch.save(state, file)


def restore(path: Path, trained: Trained, settings: dict[str, Any]) -> int:
    """Load a checkpoint with the same settings; returns its number of steps.

    Raises:
        ValueError: the checkpoint has other settings, for instance another model, or is damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        old = state["settings"]
    except (RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: expected a checkpoint, got a damaged file; {_FIX}") from error
    _check_same(path, "a checkpoint", settings, old)
    trained.student.load_state_dict(state["student"])
    trained.optimizer.load_state_dict(state["optimizer"])
    trained.scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def once(
    path: Path, settings: dict[str, Any], work: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The figures of a step of a run, which is done only if no earlier run has recorded them.

    Args:
        path: the record, written when all ranks have done the step.
        settings: those on which the step depends.
        work: does the step and returns its figures, as JSON.

    Raises:
        ValueError: the record is of other settings, or damaged.
    """
    if path.is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            old, figures = record["settings"], record["figures"]
        except (ValueError, LookupError, TypeError) as error:
            expected = "the record of a finished step"
            raise ValueError(f"{path}: expected {expected}, got a damaged file; {_FIX}") from error
        _check_same(path, "a step", settings, old)
        return dict(figures)
    figures = work()
    wait()
    if rank() == 0:
        content = {"figures": figures, "settings": settings}
        write_text(path, json.dumps(content, indent=2) + "\n")
    wait()
    return figures


def _check_same(path: Path, what: str, settings: dict[str, Any], old: dict[str, Any]) -> None:
    names = settings.keys() | old.keys()
    other = sorted(name for name in names if settings.get(name) != old.get(name))
    if other:
        raise ValueError(
            f"{path}: expected {what} of the same settings, got another {', '.join(other)}; {_FIX}"
        )
