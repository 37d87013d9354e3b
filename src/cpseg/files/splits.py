"""Which images do what: draws that depend on a seed."""

from __future__ import annotations

import torch

from cpseg._internal.checks import message
from cpseg.files.id_lists import Pair


def split(
    where: str,
    pairs: list[Pair],
    share: float,
    generator: torch.Generator,
    *,
    option: str = "--group-share",
) -> tuple[list[Pair], list[Pair]]:
    """A drawn share of the images and the rest; all of them twice for a share of 0."""
    if share == 0:
        return pairs, pairs
    count = round(share * len(pairs))
    if not 0 < count < len(pairs):
        expected = f"a {option} that splits {len(pairs)} images in two"
        raise ValueError(message(where, expected, f"{share:g}", "choose another share"))
    order = torch.randperm(len(pairs), generator=generator).tolist()
    return [pairs[i] for i in order[:count]], [pairs[i] for i in order[count:]]
