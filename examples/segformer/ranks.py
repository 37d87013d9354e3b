"""The number of this process among those of torchrun, and how many there are."""

from __future__ import annotations

import torch.distributed as dist


def rank() -> int:
    """The number of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Until all processes have come here."""
    if ranks() > 1:
        dist.barrier()
