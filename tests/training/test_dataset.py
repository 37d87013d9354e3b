"""Pseudo-labels in a data loader: one geometry for image, label and certainty."""

from __future__ import annotations

import weakref

import pytest
import torch
from tests.support.helpers import raises, same, seeded
from torch.utils.data import DataLoader

from cpseg import (
    Calibration,
    Evidence,
    PseudoLabelled,
    WeakAugmentation,
    certainty,
    evidence,
    pseudo_labels,
)


def blocks(seed: int, side: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels in blocks; the image and the certainty show the label as a brightness."""
    coarse = torch.randint(0, 4, (5, 7), generator=seeded(seed))
    labels = coarse.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return (labels.float() + 1).expand(3, -1, -1), labels, labels.float() / 8 + 0.5


def test_image_labels_and_certainty_get_one_geometry() -> None:
    image, labels, weight = blocks(3)
    augment = WeakAugmentation(64)
    padded = flipped = 0
    for seed in range(60):
        out, named, graded = augment(image, labels, weight, generator=seeded(seed))
        assert out.shape == (3, 64, 64)
        assert named.shape == graded.shape == (64, 64)
        assert named.dtype == labels.dtype
        void = named == 255
        assert bool((out[:, void] == 0).all())
        assert bool((graded[void] == 0).all())
        assert same(graded[~void], named[~void].float() / 8 + 0.5)  # nearest, both
        most = torch.nn.functional.max_pool2d(out[None, :1], 5, 1, 2)[0, 0]
        least = -torch.nn.functional.max_pool2d(-out[None, :1], 5, 1, 2)[0, 0]
        flat = (most - least < 1e-3) & ~void  # away from the edges of blocks
        assert flat.sum() > 20
        assert bool((out[0, flat].round() == named[flat] + 1).all())
        padded += int(void.any())
        again = augment(image, labels, weight, generator=seeded(seed))
        assert all(same(x, y) for x, y in zip(again, (out, named, graded), strict=True))
        still = WeakAugmentation(64, flip=0.0)(image, labels, generator=seeded(seed))[1]
        flipped += int(not same(still, named))
    assert 0 < padded < 60
    assert 12 < flipped < 48  # Binomial(60, 1/2) leaves this with probability 6e-6


def test_crops_and_sizes_reach_all_they_may() -> None:
    """Every place of a crop occurs, and the factor keeps between its ends."""
    labels = torch.arange(6).reshape(1, 6)
    image = labels.float().expand(3, -1, -1)
    augment = WeakAugmentation(1, scale=(1.0, 1.0), flip=0.0)
    found = {int(augment(image, labels, generator=seeded(s))[1]) for s in range(200)}
    assert found == set(range(6))  # one is missed with probability 6 (5/6)**200 < 1e-15
    large = WeakAugmentation(40, scale=(0.5, 2.0), flip=0.0)
    flat = torch.zeros(10, 10, dtype=torch.int64)
    sides = [
        int((large(flat.float().expand(3, -1, -1), flat, generator=seeded(s))[1] == 0).sum() ** 0.5)
        for s in range(200)
    ]
    assert min(sides) >= 5
    assert max(sides) <= 20
    assert len(set(sides)) > 10


def test_a_whole_image_at_its_own_size_is_left_alone() -> None:
    image, labels, weight = blocks(0, side=8)
    square = (image[:, :40, :40], labels[:40, :40].to(torch.uint8), weight[:40, :40])
    found = WeakAugmentation(40, scale=(1.0, 1.0), flip=0.0)(*square)
    assert all(same(x, y) for x, y in zip(found, square, strict=True))


def problem(seed: int, *, background: int | None) -> tuple[list[torch.Tensor], Calibration]:
    generator = seeded(seed)
    probs = [torch.rand(4, 6, 8, generator=generator) for _ in range(3)]
    threshold = torch.rand(3, 4, generator=generator)
    threshold[0, 0] = torch.inf
    count = torch.full((3, 4), 9)
    return probs, Calibration(threshold, count, 0.1, 9, 4, background)


@pytest.mark.parametrize("background", [None, 0, 2])
@pytest.mark.parametrize("compact", [False, True])
def test_rows_are_what_the_functions_give(background: int | None, compact: bool) -> None:
    probs, calibration = problem(1, background=background)
    images = [torch.rand(3, 6, 8, generator=seeded(i)) for i in range(3)]

    def scores(index: int) -> torch.Tensor | Evidence:
        return evidence(probs[index], background=background) if compact else probs[index]

    made = PseudoLabelled(images, scores, calibration)
    assert len(made) == 3
    for index in range(3):
        image, labels, weight = made[index]
        assert image is images[index]
        wide = calibration.resize((6, 8)).threshold
        assert same(labels, pseudo_labels(probs[index], wide, background=background))
        assert same(weight, certainty(probs[index], calibration))
        assert bool((weight[labels == 255] == 0).all())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("background", [None, 0, 3])
def test_certainty_of_evidence_is_that_of_the_scores(seed: int, background: int | None) -> None:
    probs, calibration = problem(seed, background=background)
    batch = torch.stack(probs)
    found = certainty(evidence(batch, background=background), calibration)
    assert same(found, certainty(batch, calibration))
    assert len(found.unique()) > 10


def test_labels_are_made_before_the_geometry_and_loaders_take_them() -> None:
    image, labels, _ = blocks(5)
    hot = torch.nn.functional.one_hot(labels, 4).movedim(-1, 0).float() * 0.9
    calibration = Calibration(torch.tensor([[0.5]]), torch.tensor([[99]]), 0.1, 99, 4)
    made = PseudoLabelled(
        [image] * 8, lambda index: hot, calibration, transform=WeakAugmentation(32)
    )
    torch.manual_seed(0)
    pixels, named, weight = next(iter(DataLoader(made, batch_size=8)))
    assert pixels.shape == (8, 3, 32, 32)
    assert named.shape == weight.shape == (8, 32, 32)
    assert not same(named[0], named[1])
    kept = named != 255
    torch.testing.assert_close(weight[kept], torch.full_like(weight[kept], 0.8))


def test_scores_are_dropped_at_once() -> None:
    """A model asked in the loop: nothing of K channels outlives a row."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def ask(index: int) -> Evidence:
        probs = torch.rand(4, 6, 8, generator=seeded(index))
        alive.append(weakref.ref(probs))
        return evidence(probs, background=None)

    _, calibration = problem(0, background=None)
    made = PseudoLabelled([torch.zeros(3, 6, 8)] * 3, ask, calibration)
    rows = [made[index] for index in range(3)]
    assert len(rows) == 3
    assert [each() for each in alive] == [None] * 3


def test_bad_input() -> None:
    image, labels, weight = blocks(0)
    augment = WeakAugmentation(16)
    with raises(ValueError, "WeakAugmentation", r"image \[3, 60, 84\], map \[59, 84\]"):
        augment(image, labels[1:], weight)
    with raises(ValueError, "WeakAugmentation", r"map \[60, 83\]"):
        augment(image, labels, weight[:, 1:])
    with raises(TypeError, "WeakAugmentation", "labels"):
        augment(image, weight)
    with raises(ValueError, "WeakAugmentation", "crop as a whole number >= 1, got 0"):
        WeakAugmentation(0)
    with raises(ValueError, "WeakAugmentation", "scale factors, smallest first"):
        WeakAugmentation(4, scale=(2.0, 0.5))
    with raises(ValueError, "WeakAugmentation", r"flip in \[0, 1\], got 2"):
        WeakAugmentation(4, flip=2)
    probs, calibration = problem(0, background=None)
    small = PseudoLabelled([torch.zeros(3, 6, 9)], probs.__getitem__, calibration)
    with raises(
        ValueError, "PseudoLabelled", r"probabilities at the size of image 0, got image \[3, 6, 9\]"
    ):
        small[0]
    found = evidence(probs[0], background=None)
    with raises(ValueError, "certainty", "evidence with a Calibration alone, got labels as well"):
        certainty(found, calibration, labels=found.argmax())
