"""The one way through labelled images: what it reads, whom it blames, how it counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.folders import DataSet, complains, make
from torch import Tensor

from cpseg import evidence
from cpseg.core.class_map import ClassMap
from cpseg.files import dataset
from cpseg.files.dataset import LabelledImages, Source, announce, quiet
from cpseg.files.id_lists import Pair, read_ids
from cpseg.files.score_files import read_shape, write_evidence


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return make(tmp_path / "data")


def opened(data: DataSet, **options: Any) -> LabelledImages:
    return LabelledImages.open(Source(data.root, data.probs), read_ids(data.ids), **options)


def test_images_come_one_after_the_other_with_their_labels(data: DataSet) -> None:
    seen: list[tuple[str, Tensor, Tensor]] = []
    images = opened(data)
    images.feed(lambda pair, *tensors: seen.append((pair.image, *tensors)), images.pairs, "read")
    assert [name for name, _, _ in seen] == data.images
    for name, probs, labels in seen:
        assert np.array_equal(probs.numpy(), data.scores[name])
        assert np.array_equal(labels.numpy(), data.labels[name])
    assert (images.num_classes, images.num_source, images.size) == (4, 4, (12, 16))


def test_an_error_of_the_consumer_names_the_file(data: DataSet) -> None:
    def update(pair: Pair, probs: Tensor, labels: Tensor) -> None:
        if pair.image == data.images[2]:
            raise ValueError("here: expected this, got that; do so")

    images = opened(data)
    with pytest.raises(ValueError, match="here: expected this") as caught:
        images.feed(update, images.pairs, "read")
    assert str(caught.value).startswith(f"{data.score_file(data.images[2])}: here:")


def test_opening_reads_no_values(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "read_scores", lambda *_, **__: pytest.fail("it read a file"))
    assert opened(data).num_classes == 4


@pytest.mark.parametrize("link", ["folder", "file"])
def test_an_image_under_two_names_is_refused(data: DataSet, link: str) -> None:
    """It would count twice. Its scores may well be two files."""
    if link == "folder":
        (data.root / "also").symlink_to(data.root / "images")
        twice = f"also/{Path(data.images[1]).name}"
    else:
        twice = "images/again.png"
        (data.root / twice).symlink_to(data.root / data.images[1])
    scores = (data.probs / twice).with_suffix(".npy")
    scores.parent.mkdir(exist_ok=True)
    np.save(scores, data.scores[data.images[1]])
    with data.ids.open("a") as file:
        file.write(f"{twice} masks/01.png\n")
    with pytest.raises(ValueError, match="are one file") as caught:
        opened(data)
    complains(caught.value, "id list", f"{data.images[1]} and {twice}", "remove one")


def test_a_linked_root_and_linked_images_of_their_own_are_welcome(
    data: DataSet, tmp_path: Path
) -> None:
    (tmp_path / "linked").symlink_to(data.root)
    image = data.root / data.images[0]
    image.rename(tmp_path / "elsewhere.png")
    image.symlink_to(tmp_path / "elsewhere.png")
    source = Source(tmp_path / "linked", data.probs)
    assert len(LabelledImages.open(source, read_ids(data.ids)).pairs) == len(data.images)


def test_another_number_of_classes_than_the_first_image_is_refused(data: DataSet) -> None:
    path = data.score_file(data.images[1])
    np.save(path, np.full((3, 12, 16), 0.25, np.float32))
    images = opened(data)
    with pytest.raises(ValueError, match="4 classes like the first image, got 3") as caught:
        images.feed(lambda *_: None, images.pairs, "read")
    complains(caught.value, path)


def test_a_progress_sees_the_title_and_the_count_and_may_expect_all_passes(data: DataSet) -> None:
    class Progress:
        def __init__(self) -> None:
            self.said: list[Any] = []

        def expect(self, images: int) -> None:
            self.said.append(images)

        def __call__(self, items: Iterable[Pair], count: int, title: str) -> Iterator[Pair]:
            self.said.append((count, title))
            yield from items

    progress = Progress()
    images = opened(data, progress=progress)
    announce(progress, 12)
    announce(quiet, 12)  # a plain function is told nothing
    images.feed(lambda *_: None, images.pairs[:2], "some")
    images.feed(lambda *_: None, [], "none: no bar")
    assert progress.said == [12, (2, "some")]


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_header_says_the_shape(tmp_path: Path, suffix: str, dtype: type) -> None:
    values, path = np.zeros((3, 4, 5), dtype), tmp_path / f"a{suffix}"
    np.save(path, values) if suffix == ".npy" else np.savez_compressed(path, probs=values)
    assert read_shape(path) == (3, 4, 5)


def test_a_header_of_evidence_or_of_another_rank_is_refused(tmp_path: Path) -> None:
    write_evidence(tmp_path / "e.safetensors", evidence(torch.rand(3, 4, 5), background=0))
    with pytest.raises(ValueError, match=r"expected probabilities \[K, H, W\], got evidence"):
        read_shape(tmp_path / "e.safetensors")
    np.save(tmp_path / "flat.npy", np.zeros((4, 5), np.float32))
    with pytest.raises(
        ValueError, match=r"flat.npy: expected probabilities \[K, H, W\], got \[4, 5\]"
    ):
        read_shape(tmp_path / "flat.npy")
    for name in ("broken.npy", "broken.npz", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"no such format")
        with pytest.raises(ValueError, match=f"{name}: expected .* got an unreadable one"):
            read_shape(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_shape(tmp_path / "missing.npy")


def test_a_recorded_class_map_is_taken_and_must_not_differ(data: DataSet) -> None:
    source = Source(data.root, data.probs)
    assert source.with_recorded_class_map(None) == source
    mapped = source.with_recorded_class_map({"0": 0, "1": 1, "2": 1, "3": 0})
    assert mapped.class_map == ClassMap((0, 1, 1, 0))
    assert mapped.shape(data.score_file(data.images[0])) == (2, 12, 16)
    other = replace(source, class_map=ClassMap((0, 1, 0, 1)))
    with pytest.raises(ValueError, match="class map: expected that of the calibration"):
        other.with_recorded_class_map({"0": 0, "1": 1, "2": 1, "3": 0})
