"""What objects that stream over images and merge over ranks share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from cpseg._internal.checks import message
from cpseg._internal.distributed import active

State = TypeVar("State")


def begin_sync(where: str, synced: bool) -> bool:
    """Whether a process group is set up to merge over; a second ``sync`` is refused.

    Raises:
        ValueError: ``sync`` was called before: it would count every image again.
    """
    if active() and synced:
        fix = "sync once, after the last update"
        raise ValueError(message(where, "one call", "a second one", fix))
    return active()


def refuse_after_sync(
    where: str, synced: bool, *, fix: str = "sync after the last update and merge"
) -> None:
    """No update and no merge after ``sync``: other ranks would not see it, or count it twice.

    Raises:
        ValueError: ``sync`` was called before.
    """
    if synced:
        raise ValueError(message(where, "updates and merges before sync", "one after it", fix))


def gather_alike(
    where: str, settings: Mapping[str, Any], state: State, group: dist.ProcessGroup | None
) -> list[State]:
    """The state of every rank, in the order of ranks, if all have the same settings.

    Raises:
        ValueError: settings differ; every rank raises it, with the same words.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (dict(settings), state), group=group)
    first: Mapping[str, Any] = everyone[0][0]
    for name, value in first.items():
        for theirs, _ in everyone:
            if theirs[name] != value:
                expected, got = f"the same {name} on all ranks", f"{value} and {theirs[name]}"
                raise ValueError(message(where, expected, got, "build all alike"))
    return [each for _, each in everyone]
