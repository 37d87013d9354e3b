"""Files with one wrong byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.folders import complains


def damage_every_byte(path: Path, flip: int, read: Callable[[], object]) -> None:
    """Whatever byte is flipped: the file reads, or is refused in one line."""
    whole = path.read_bytes()
    refusals = 0
    surprises: dict[str, int] = {}
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= flip
        path.write_bytes(damaged)
        try:
            read()
        except ValueError as error:
            refusals += 1
            complains(error, path)
        except Exception as error:
            surprises.setdefault(f"{type(error).__module__}.{type(error).__name__}", place)
    assert surprises == {}, "an error of another kind, with the first byte that gives it"
    assert refusals > 0
