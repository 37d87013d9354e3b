"""Writing and restoring checkpoints of a run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from cpseg.files import atomic


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
    fix = "choose another file or --out, or delete it"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        old = state["settings"]
    except (RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: expected a checkpoint, got a damaged file; {fix}") from error
    names = settings.keys() | old.keys()
    other = sorted(name for name in names if settings.get(name) != old.get(name))
    if other:
        raise ValueError(
            f"{path}: expected a checkpoint of the same settings, got another {', '.join(other)}; "
            f"{fix}"
        )
    trained.student.load_state_dict(state["student"])
    trained.optimizer.load_state_dict(state["optimizer"])
    trained.scaler.load_state_dict(state["scaler"])
    return int(state["step"])
