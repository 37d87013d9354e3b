"""Work on items in a few threads, with the results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    do: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """``do(item)`` for every item, in the order of the items.

    With several workers at most ``workers`` results wait to be taken, so that memory does not grow
    with the number of items. An error of ``do`` comes where its result would. Close the generator
    where it may be left early (:func:`contextlib.closing`): the items in work are finished, and no
    thread of it runs afterwards.

    Args:
        do: called in a thread; what it reads and writes must not be another item's.
        items: taken in the calling thread, as they are needed.
        workers: number of threads; with 1 the calling thread does the work.
    """
    if workers == 1:
        yield from map(do, items)
        return
    threads = torch.get_num_threads()  # the workers share the cores that one thread would use
    each = max(1, threads // workers)
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, "cpseg", torch.set_num_threads, (each,))
    try:
        for item in items:
            waiting.append(pool.submit(do, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # of threads that start later


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's operators in the calling thread use no other threads; its setting comes back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
