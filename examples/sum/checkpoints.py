"""A training loop that writes checkpoints and continues from them."""

from __future__ import annotations

import hashlib
import pickle
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpseg.files import atomic


def train(
    title: str,
    path: Path,
    modules: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[int], Tensor],
    *,
    steps: int,
    every: int,
    settings: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Take the remaining steps of ``steps``; every ``every`` steps a checkpoint goes to ``path``.

    ``backward`` gets the number of the step, adds to the gradients and returns the loss. Its random
    numbers must depend on that number alone, so that a run that was stopped ends with the same
    weights. Afterwards ``modules`` have the weights of the last checkpoint.

    Raises:
        ValueError: the checkpoint has other settings or is damaged, or the loss is not finite.
    """
    done = restore(path, modules, settings, optimizer) if path.is_file() else 0
    if done:
        say(f"{title}: goes on after step {done} of {steps}")
    start, since, total = time.monotonic(), done, 0.0
    for step in range(done, steps):
        optimizer.zero_grad(set_to_none=True)
        loss = backward(step).detach()
        if not bool(loss.isfinite()):
            raise ValueError(
                f"{title}: expected a finite loss, got {loss.item()} at step {step}; "
                "lower --lr, or look at the data"
            )
        optimizer.step()
        total += float(loss)
        if (step + 1) % every == 0 or step + 1 == steps:
            _save(path, modules, optimizer, settings, step + 1)
            pace = (time.monotonic() - start) / (step + 1 - done)
            mean = total / (step + 1 - since)
            say(f"{title}: step {step + 1} of {steps}, loss {mean:.4f}, {pace:.2f} s per step")
            since, total = step + 1, 0.0


def restore(
    path: Path,
    modules: nn.ModuleDict,
    settings: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """Load a checkpoint with the same settings; returns its number of steps."""
    fix = "choose another --out, or delete the file"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        old = state["settings"]
    except (RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: expected a checkpoint, got a damaged file; {fix}") from error
    if old != settings:
        other = sorted(k for k in settings.keys() | old.keys() if settings.get(k) != old.get(k))
        raise ValueError(
            f"{path}: expected a checkpoint of the same settings, got another {', '.join(other)}; "
            f"{fix}"
        )
    modules.load_state_dict(state["modules"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def digest(paths: Iterable[Path]) -> str:
    """16 hex digits of a SHA-256 of the contents of files, in this order."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]


def _save(
    path: Path,
    modules: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    step: int,
) -> None:
    state = {
        "modules": modules.state_dict(),
        "optimizer": optimizer.state_dict(),
        "settings": settings,
        "step": step,
    }
    with atomic(path) as file:
        torch.save(state, file)
