"""Folds: the same for any order of the list, every image in one, and lists that are checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.folders import complains
from tests.support.helpers import raises

import cpseg
from cpseg.files import Folds, Pair, cross_fit, read_folds, read_ids, write_folds
from cpseg.files.folds import check_same_images, fold_lists

NAMES = [f"images/{number:02d}.png" for number in range(11)]
PAIRS = [Pair(name, name.replace("images", "masks")) for name in NAMES]


@contextmanager
def refuses(path: object, *parts: str) -> Iterator[None]:
    """A ``ValueError`` in one line that names the file and says ``parts``."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        yield
    complains(caught.value, path, *parts)


@st.composite
def deals(draw: st.DrawFn) -> tuple[list[str], list[str], int, int]:
    """Names, the same in another order, a number of folds and a seed."""
    names = draw(st.lists(st.sampled_from([*NAMES, "ü.png", "x"]), min_size=2, unique=True))
    return (
        names,
        draw(st.permutations(names)),
        draw(st.integers(2, len(names))),
        draw(st.integers(0, 5)),
    )


@given(deals())
def test_any_order_gives_the_same_folds(deal: tuple[list[str], list[str], int, int]) -> None:
    names, shuffled, count, seed = deal
    one, other = cross_fit(names, count, seed), cross_fit(shuffled, count, seed)
    assert dict(zip(names, one.fold, strict=True)) == dict(zip(shuffled, other.fold, strict=True))
    for k in range(count):
        assert set(one.held(k)) == set(other.held(k))
        assert one.held(k) == [name for name in names if name in set(one.held(k))], "given order"


@given(deals())
def test_every_image_is_in_one_fold_and_sizes_differ_by_at_most_one(
    deal: tuple[list[str], list[str], int, int],
) -> None:
    names, _, count, seed = deal
    folds = cross_fit(names, count, seed)
    assert folds.count == count
    assert sorted(name for k in range(count) for name in folds.held(k)) == sorted(names)
    sizes = [len(folds.held(k)) for k in range(count)]
    assert max(sizes) - min(sizes) <= 1
    for k in range(count):
        assert not set(folds.train(k)) & set(folds.held(k))
        assert [name for name in names if name not in folds.held(k)] == folds.train(k)


def test_the_deal_is_by_hash_of_seed_and_name() -> None:
    def key(name: str) -> str:
        return hashlib.sha256(b"cross_fit\x003\x00" + name.encode()).hexdigest()

    folds = cross_fit(NAMES, 4, 3)
    for place, name in enumerate(sorted(NAMES, key=key)):
        assert folds.fold[NAMES.index(name)] == place % 4
    assert folds.fold != cross_fit(NAMES, 4, 4).fold
    assert cpseg.cross_fit is cross_fit


def test_names_lines_and_paths_are_dealt_alike_and_given_back() -> None:
    by_name = cross_fit(NAMES, 3)
    for given_as in (PAIRS, [Path(name) for name in NAMES], [f"./{name}" for name in NAMES]):
        folds: Folds[Any] = cross_fit(given_as, 3)
        assert folds.fold == by_name.fold
        assert sorted([*folds.train(1), *folds.held(1)]) == sorted(given_as)
    assert repr(by_name) == "Folds(11 images in 3 folds, seed 0)"


@pytest.mark.parametrize(
    ("images", "folds", "seed", "says"),
    [
        (["a"], 2, 0, "at least 2 labelled images, got 1"),
        ([], 2, 0, "at least 2 labelled images, got 0"),
        (["a", "b", "c"], 4, 0, "2 to 3 folds for 3 labelled images, got 4"),
        (["a", "b", "c"], 1, 0, "2 to 3 folds for 3 labelled images, got 1"),
        (["a", "b", "./a"], 2, 0, "every image once, got a twice"),
        (["a", "b"], 2, -1, "a seed >= 0, got -1"),
        (["a", "b"], 2, 0.5, "a seed >= 0, got 0.5"),
        (["a", "b"], True, 0, "a number of folds, got True"),
        (["a", "b"], 2.0, 0, "a number of folds, got 2.0"),
    ],
)
def test_what_cannot_be_dealt(images: list[str], folds: Any, seed: Any, says: str) -> None:
    with raises(ValueError, "cross_fit", says):
        cross_fit(images, folds, seed)


@pytest.mark.parametrize("images", ["ab", 3, [1, 2], [("a",), ()], ["a", ""], [None, "a"]])
def test_images_without_names(images: Any) -> None:
    with raises(TypeError, "cross_fit", "image"):
        cross_fit(images, 2)


@pytest.mark.parametrize("k", [-1, 4, True, 0.0, None])
def test_no_such_fold(k: Any) -> None:
    folds = cross_fit(NAMES, 4)
    with raises(ValueError, "Folds.train", "a fold in 0..3"):
        folds.train(k)
    with raises(ValueError, "Folds.held", "a fold in 0..3"):
        folds.held(k)


def test_lists_are_written_as_the_input_is_and_read_again(tmp_path: Path) -> None:
    folds = cross_fit(PAIRS, 4, 7)
    write_folds(tmp_path / "F", folds)
    assert read_folds(tmp_path / "F") == folds
    for k in range(4):
        train, score = fold_lists(tmp_path / "F", k)
        assert train == tmp_path / "F" / f"fold_{k}" / "train.txt"
        assert (read_ids(train), read_ids(score)) == (folds.train(k), folds.held(k))
    content = json.loads((tmp_path / "F/folds.json").read_text())
    assert (content["format"], content["seed"], content["folds"]) == (1, 7, 4)
    assert list(content["images"].items()) == list(zip(NAMES, folds.fold, strict=True))


def test_the_same_folds_are_written_again_and_others_refused(tmp_path: Path) -> None:
    write_folds(tmp_path / "F", cross_fit(PAIRS, 4))
    (tmp_path / "F/fold_2/train.txt").unlink()  # as after a kill
    write_folds(tmp_path / "F", cross_fit(PAIRS, 4))
    read_folds(tmp_path / "F")
    for other in (cross_fit(PAIRS, 3), cross_fit(PAIRS, 4, 1), cross_fit(PAIRS[:-1], 4)):
        with refuses(tmp_path / "F", "one with other folds"):
            write_folds(tmp_path / "F", other)
    (tmp_path / "G").mkdir()
    (tmp_path / "G/mine.txt").touch()
    with refuses(tmp_path / "G", "a new or empty folder, got one with 'mine.txt'"):
        write_folds(tmp_path / "G", cross_fit(PAIRS, 4))


def test_a_path_that_no_list_holds_leaves_nothing_behind(tmp_path: Path) -> None:
    folds = cross_fit([Pair("a\tb.png", "m.png"), Pair("c.png", "m.png")], 2)
    with pytest.raises(ValueError, match="paths without white space"):
        write_folds(tmp_path / "F", folds)
    assert not (tmp_path / "F").exists()


def test_lists_that_changed_since_are_refused(tmp_path: Path) -> None:
    folds = cross_fit(PAIRS, 4)
    write_folds(tmp_path, folds)
    train, score = fold_lists(tmp_path, 1)
    whole = train.read_text()
    train.write_text(whole + score.read_text())
    with refuses(train, f"got 11 with {min(folds.held(1)).image} too"):
        read_folds(tmp_path)
    train.write_text("".join(whole.splitlines(keepends=True)[1:]))
    with refuses(train, f"got 7 with no {folds.train(1)[0].image}"):
        read_folds(tmp_path)
    train.write_text("".join(reversed(whole.splitlines(keepends=True))))
    assert read_folds(tmp_path) == folds, "another order is the same list"
    score.write_text(whole)
    with refuses(score, "images that folds.json records"):
        read_folds(tmp_path)
    score.unlink()
    with pytest.raises(FileNotFoundError):
        read_folds(tmp_path)
    with refuses("ids.txt", "got 10 with no images/10.png"):
        check_same_images("ids.txt", PAIRS[:-1], NAMES)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "folds of format 1, got format 2"),
        ({"seed": -1}, "a fold for every image"),
        ({"folds": 3}, "a fold for every image"),
        ({"folds": 10**12}, "a fold for every image"),
        ({"folds": None}, "a fold for every image"),
        ({"images": []}, "a fold for every image"),
        ({"images": {"a": "0"}}, "a fold for every image"),
        ({"images": {"a": 0, "b": 2}}, "a fold for every image"),
    ],
)
def test_damaged_records(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    write_folds(tmp_path, cross_fit(PAIRS, 4))
    path = tmp_path / "folds.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with refuses(path, says):
        read_folds(tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", "{", "\xff"])
def test_records_that_are_none(content: str, tmp_path: Path) -> None:
    write_folds(tmp_path, cross_fit(PAIRS, 4))
    (tmp_path / "folds.json").write_bytes(content.encode("latin-1"))
    with refuses(tmp_path / "folds.json", "folds"):
        read_folds(tmp_path)
