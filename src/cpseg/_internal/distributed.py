"""Helpers around ``torch.distributed``; without a process group there is one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cpseg._internal.tiling import tiles

T = TypeVar("T")


def active() -> bool:
    """Whether a process group is set up."""
    return dist.is_available() and dist.is_initialized()


def device_without_data(group: dist.ProcessGroup | None) -> torch.device:
    """The device on which a rank without any tensor must send."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_reduce_sum(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``value`` summed over the ranks."""
    value = value.clone()
    dist.all_reduce(value, group=group)
    return value


def all_gather_ints(
    values: Sequence[int], device: torch.device, group: dist.ProcessGroup | None
) -> list[list[int]]:
    """The whole numbers of every rank, in the order of ranks."""
    own = torch.tensor(values, dtype=torch.int64, device=device)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return [part.tolist() for part in parts]


def gather_rows(block: Tensor, rows: int, fill: float, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all ranks, ``[world * rows, cells]``; shorter blocks are filled up."""
    padded = block.new_full((rows, block.shape[1]), fill)
    padded[: len(block)] = block
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, padded, group=group)
    return torch.cat(parts)


def gather_blocks(
    blocks: list[Tensor], empty: Tensor, fill: float, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """All rows of all ranks as one block, tile by tile; ``empty`` is a block of no rows."""
    own = sum(map(len, blocks))
    most = max(counts[0] for counts in all_gather_ints([own], empty.device, group))
    if most == 0:
        return []
    rows = empty.new_empty(dist.get_world_size(group) * most, empty.shape[1])
    for cells in tiles(empty.shape[1], len(rows)):
        own_rows = torch.cat([block[:, cells] for block in (empty, *blocks)])
        rows[:, cells] = gather_rows(own_rows, most, fill, group)
    return [rows]


def rank() -> int:
    """This process among the ranks; 0 alone."""
    return dist.get_rank() if active() else 0


def barrier() -> None:
    """Wait for the other ranks."""
    if active():
        dist.barrier()


def broadcast_from_rank0(pairs: Sequence[T]) -> Sequence[T]:
    """The first rank's list, on every rank."""
    found = [pairs]
    if active():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def shard(pairs: Sequence[T]) -> tuple[Sequence[T], int]:
    """This rank's part of the images, and how many those are."""
    part = pairs[rank() :: dist.get_world_size()] if active() else pairs
    return part, len(part)


def broadcast_first(values: list[T]) -> list[T]:
    """The list of the first rank that has one, on every rank."""
    if not active():
        return values
    lists: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, values)
    return next((each for each in lists if each), values)
