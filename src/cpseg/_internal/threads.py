"""Work on items in a few threads: with the results in order, or shared out as they come."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_MOST_HELPERS = 7  # the threads of a process share one interpreter
_helpers: ThreadPoolExecutor | None = None

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


def shared(work: Callable[[Iterator[Item]], None], items: Iterable[Item], threads: int) -> None:
    """``work(items)`` in the calling thread and in helpers, which take the items from each other.

    Torch's operators use one thread in each, so that no thread waits for another inside of them: a
    helper that gets no core takes fewer items. Helpers that have not begun when the items are used
    up never do. An error of any thread is raised when all have ended.

    Args:
        work: takes items until there are none, whatever the order.
        items: any number of them.
        threads: at most, with the calling one; at most 8.
    """
    remaining = iter(list(items))  # a list's iterator is safe to share
    inference = torch.is_inference_mode_enabled()  # a thread begins without it

    def help_out() -> None:
        torch.set_num_threads(1)
        with torch.inference_mode(inference):
            work(remaining)

    with one_thread():
        helping = [_pool().submit(help_out) for _ in range(min(threads - 1, _MOST_HELPERS))]
        try:
            work(remaining)
        finally:
            deque(remaining, maxlen=0)  # after an error or an interrupt nothing more is begun
            for helper in helping:
                if not helper.cancel():
                    helper.result()


def _pool() -> ThreadPoolExecutor:
    """Threads that are kept, since to start one takes longer than a small image."""
    global _helpers
    if _helpers is None:
        _helpers = ThreadPoolExecutor(_MOST_HELPERS, "cpseg-helper")
    return _helpers


def _forget_helpers() -> None:
    """In a forked process, which has the executor but none of its threads."""
    global _helpers
    _helpers = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)
