"""Which images do what: draws that depend on a seed.

Two kinds of draw. :func:`drawn_share` and :func:`drawn_order` shuffle the list, so they depend on
its order; the recorded results were made with them. :func:`hashed_share` sorts the images by a hash
of seed and name, so it gives the same images for any order of the list: prefer it in new code.
"""

from __future__ import annotations

import hashlib

import torch

from cpseg._internal.checks import message
from cpseg.files.id_lists import Pair


def count_of_share(
    where: str, option: str, share: float, images: int, fix: str = "choose another share"
) -> int:
    """How many images a share is, at least one and not all of them.

    Raises:
        ValueError: one of the two parts would be empty.
    """
    count = round(share * images)
    if not 0 < count < images:
        expected = f"a {option} that splits {images} images in two"
        raise ValueError(message(where, expected, f"{share:g}", fix))
    return count


def drawn_share(
    where: str, option: str, pairs: list[Pair], share: float, generator: torch.Generator
) -> tuple[list[Pair], list[Pair]]:
    """A drawn share of the images and the others; all images in both parts for a share of 0."""
    if share == 0:
        return pairs, pairs
    count = count_of_share(where, option, share, len(pairs))
    shuffled = [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()]
    return shuffled[:count], shuffled[count:]


def hashed_share(
    where: str, option: str, pairs: list[Pair], share: float, seed: int, *, purpose: str
) -> tuple[list[Pair], list[Pair]]:
    """A share of the images and the others, the same for any order of the list.

    ``purpose`` makes draws with one seed independent of each other.
    """
    fix = "choose another share, or label more images"
    count = count_of_share(where, option, share, len(pairs), fix)

    def hashed(pair: Pair) -> bytes:
        return hashlib.sha256(f"{purpose}\0{seed}\0{pair.image}".encode()).digest()

    ordered = sorted(pairs, key=hashed)
    return ordered[:count], ordered[count:]


def drawn_order(
    where: str, images: int, folds: int, generator: torch.Generator, *, option: str = "--folds"
) -> list[int]:
    """Indices of the images in a drawn order; fold number n is ``order[n::folds]``.

    Raises:
        ValueError: fewer than two images, or another number of folds than 2 to ``images``.
    """
    check_folds(where, images, folds, option=option)
    order: list[int] = torch.randperm(images, generator=generator).tolist()
    return order


def check_folds(where: str, images: int, folds: int, *, option: str = "--folds") -> None:
    """That images can be dealt into folds without an empty one.

    Raises:
        ValueError: fewer than two images, or another number of folds than 2 to ``images``.
    """
    if images < 2:
        fix = "label more: some calibrate and others measure"
        raise ValueError(message(where, "at least 2 labelled images", f"{images}", fix))
    if not 2 <= folds <= images:
        expected = f"2 to {images} folds for {images} labelled images"
        raise ValueError(message(where, expected, f"{folds}", f"pass another {option}"))
