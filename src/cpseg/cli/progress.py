"""Progress: a bar on a terminal; in a pipe one line a minute, and none for a short job."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
SILENCE = 60.0  # seconds between lines in a pipe


class Progress:
    """Wraps the loops of a job; the first rank alone writes.

    A job with several passes over the images announces their sum by :meth:`expect`, and one bar
    with one estimate of the time left runs over all passes. Leaving the ``with`` block finishes the
    line of the bar, so that what is printed next has a line of its own.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._whole_job = False
        self._spoken = time.monotonic()

    def expect(self, images: int) -> None:
        """Say how many images all passes of the job read, on all ranks together."""
        self.close()
        self._whole_job = True
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self._bar = _new_bar(-(-images // ranks))

    def __call__(self, items: Iterable[Item], count: int, title: str) -> Iterator[Item]:
        """The items of one pass, counted."""
        if not self._whole_job:
            self._bar = _new_bar(count)
        bar = self._bar
        bar.set_description(title)
        for done, item in enumerate(items):
            self._speak(f"{title}: {done} of {count} images")
            yield item
            bar.update()
        if not self._whole_job:
            self.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish the line on which a bar stands."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._whole_job = None, False

    def _speak(self, text: str) -> None:
        now = time.monotonic()
        if self._bar.disable and _first_rank() and now - self._spoken >= SILENCE:
            self._spoken = now
            print(f"cpseg: {text}", file=sys.stderr, flush=True)


def _new_bar(total: int) -> Any:
    from tqdm import tqdm

    quiet = not (sys.stderr.isatty() and _first_rank())
    width = shutil.get_terminal_size().columns or 80
    # A size of 0 x 0, which some pseudo-terminals report, would hide the bar.
    return tqdm(total=total, unit="image", disable=quiet, file=sys.stderr, ncols=width, nrows=20)


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
