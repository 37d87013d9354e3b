"""`OnlineThreshold.sync` on one of two gloo ranks, run as a script by test_online.py."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpseg import OnlineThreshold


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shares(step: int) -> list[tuple[Tensor, Tensor]]:
    """What two ranks see in a step: batches of different sizes, the second sometimes void."""
    parts = []
    for rank, size in enumerate((2, 1)):
        logits = 2 * torch.randn(size, 3, 12, 12, generator=seeded(10 * step + rank))
        labels = torch.randint(3, (size, 12, 12), generator=seeded(10 * step + rank + 5))
        if rank == 1 and step % 2:
            labels[:] = 255
        parts.append((logits, labels))
    return parts


def fresh(per_class: bool) -> OnlineThreshold:
    return OnlineThreshold(3, alpha=0.3, per_class=per_class, decay=0.8, stride=1)


# What the two ranks are built with: all else is the same.
UNLIKE: dict[str, tuple[Any, Any]] = {
    "num_classes": (3, 4),
    "alpha": (0.3, 0.2),
    "per_class": (True, False),
    "decay": (0.8, 0.9),
    "stride": (1, 2),
    "ignore_index": (255, -1),
}


def one_rank(folder: str) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    result: dict[str, Any] = {}
    for per_class in (False, True):
        cal = fresh(per_class)
        rows = []
        for step in range(6):
            if step == 4 and rank == 1:  # a rank without a batch
                rows.append(cal.sync().threshold())
                continue
            rows.append(cal.update(*shares(step)[rank]).sync().threshold())
            if step == 2:
                cal.sync()
            if step == 3:  # as a checkpoint of rank 0 that every rank loads
                state = [cal.state_dict()]
                dist.broadcast_object_list(state)
                cal = fresh(per_class)
                cal.load_state_dict(state[0])
        result[f"thresholds {per_class}"] = torch.stack(rows)
        result[f"weights {per_class}"] = cal.state_dict()["weights"]
    cal = fresh(False).update(*shares(0)[rank]).update(*shares(1)[rank])
    try:
        cal.sync()
    except ValueError as error:
        result["late"] = str(error)
    for name, options in UNLIKE.items():
        settings = {"num_classes": 3, "alpha": 0.3, "per_class": True, "decay": 0.8, "stride": 1}
        settings |= {name: options[rank]}
        cal = OnlineThreshold(**settings)
        classes = settings["num_classes"]
        logits = torch.randn(1, classes, 6, 6, generator=seeded(rank))
        cal.update(logits, torch.randint(classes, (1, 6, 6), generator=seeded(rank)))
        before = cal.state_dict()["weights"]
        for _ in range(2):  # the second time it is no other
            try:
                cal.sync()
            except ValueError as error:
                result[f"unlike {name}"] = str(error)
            assert torch.equal(cal.state_dict()["weights"], before)
    cal = fresh(False).update(*shares(0)[rank])  # one rank has an update too many
    if rank == 1:
        cal.update(*shares(1)[rank])
    try:
        cal.sync()
    except ValueError as error:
        result["late on one"] = str(error)
    dist.barrier()
    dist.destroy_process_group()
    torch.save(result, f"{folder}/{rank}.pt")


if __name__ == "__main__":
    one_rank(sys.argv[1])
