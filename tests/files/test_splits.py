"""Splits: parts are disjoint and whole, the hashed one whatever the order of the list."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.helpers import raises, seeded

from cpseg.files.id_lists import Pair
from cpseg.files.splits import count_of_share, drawn_order, drawn_share, hashed_share

PAIRS = [Pair(f"images/{number:02d}.png", f"masks/{number:02d}.png") for number in range(20)]


@given(st.floats(0.06, 0.94), st.integers(0, 99))
def test_drawn_parts_are_disjoint_and_whole(share: float, seed: int) -> None:
    some, others = drawn_share("here", "--share", PAIRS, share, seeded(seed))
    assert len(some) == round(share * len(PAIRS))
    assert sorted([*some, *others]) == PAIRS
    assert (some, others) == drawn_share("here", "--share", PAIRS, share, seeded(seed))


def test_a_share_of_zero_uses_all_images_twice() -> None:
    assert drawn_share("here", "--share", PAIRS, 0, seeded(0)) == (PAIRS, PAIRS)


def test_hashed_parts_do_not_depend_on_the_order_of_the_list() -> None:
    shuffled = random.Random(1).sample(PAIRS, len(PAIRS))
    parts = hashed_share("here", "--share", PAIRS, 0.2, 7, purpose="calibrate")
    assert parts == hashed_share("here", "--share", shuffled, 0.2, 7, purpose="calibrate")
    assert parts != hashed_share("here", "--share", PAIRS, 0.2, 8, purpose="calibrate")
    assert parts != hashed_share("here", "--share", PAIRS, 0.2, 7, purpose="other")

    def key(pair: Pair) -> str:
        return hashlib.sha256(b"calibrate\x007\x00" + pair.image.encode()).hexdigest()

    assert parts[0] == sorted(PAIRS, key=key)[:4], "the draw of recorded certificates"
    assert sorted([*parts[0], *parts[1]]) == PAIRS


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_share_that_leaves_a_part_empty_is_refused(share: float) -> None:
    with raises(ValueError, "here", f"a --share that splits 20 images in two, got {share:g}"):
        count_of_share("here", "--share", share, 20)


def test_folds_are_dealt_from_one_drawn_order() -> None:
    order = drawn_order("here", 7, 3, seeded(0))
    assert sorted(i for number in range(3) for i in order[number::3]) == list(range(7))
    assert order != drawn_order("here", 7, 3, seeded(1))


@pytest.mark.parametrize(
    ("images", "folds", "says"),
    [(1, 2, "at least 2 labelled images, got 1"), (5, 6, "2 to 5 folds"), (5, 1, "2 to 5 folds")],
)
def test_folds_that_cannot_be_dealt_are_refused(images: int, folds: int, says: str) -> None:
    with raises(ValueError, "here", says):
        drawn_order("here", images, folds, seeded(0))
