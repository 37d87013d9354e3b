"""The network of the demo: what it depends on, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpseg.demo.network import class_scores, train_foundation, train_network
from cpseg.demo.scenes import HEIGHT, NUM_CLASSES, VOID, WIDTH, scenes

pytest.importorskip("sklearn", reason="the demo needs scikit-learn's digits")


def test_training_is_the_same_for_a_seed_and_leaves_random_state_alone() -> None:
    images, labels = scenes(2, domain="target", seed=0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    steps: list[tuple[int, int]] = []
    first = train_network(
        images, labels, seed=3, steps=3, progress=lambda *done: steps.append(done)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    torch.manual_seed(6)
    scores = class_scores(first, images)
    again = train_network(images, labels, seed=3, steps=3)
    assert np.array_equal(scores, class_scores(again, images))
    assert not np.array_equal(
        scores, class_scores(train_network(images, labels, seed=4, steps=3), images)
    )
    assert scores.shape == (2, NUM_CLASSES, HEIGHT, WIDTH)
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(scores, class_scores(first, images, batch=1), atol=1e-5)


def test_a_student_learns_from_a_few_scenes() -> None:
    images, labels = scenes(12, domain="target", seed=9)
    new, truth = scenes(4, domain="target", seed=9, digits="test")

    found = class_scores(train_network(images, labels, seed=0, steps=60), new).argmax(1)
    known = truth != VOID
    objects = (truth > 0)[known]
    wrong = ((found > 0)[known] != objects).mean()
    assert wrong < 0.7 * objects.mean(), "hardly better than background everywhere"


def test_pixels_without_a_label_change_nothing() -> None:
    images, labels = scenes(3, domain="target", seed=0)
    nothing = np.full_like(labels[:1], VOID)
    more = np.concatenate([images, images[:1]]), np.concatenate([labels, nothing])
    first = train_network(images, labels, seed=0, steps=2)
    second = train_network(*more, seed=0, steps=2)
    assert np.array_equal(class_scores(first, images), class_scores(second, images))
    with pytest.raises(ValueError, match="expected labelled pixels, got none"):
        train_network(images[:1], nothing, seed=0, steps=2)


@pytest.mark.nightly
def test_the_foundation_model_is_good_at_home_and_loses_faint_digits() -> None:
    model = train_foundation(seed=0)
    wrong, lost = {}, {}
    for domain in ("source", "target"):
        images, truth = scenes(10, domain=domain, seed=1, digits="test")  # type: ignore[arg-type]
        found = class_scores(model, images).argmax(1)
        wrong[domain] = (found != truth)[truth != VOID].mean()
        objects = (truth > 0) & (truth != VOID)
        lost[domain] = (found == 0)[objects].mean()
    assert wrong["source"] < 0.08
    assert lost["target"] > 0.4 > 4 * lost["source"]


def test_windows_at_some_places_are_those_of_all() -> None:
    model = train_network(*scenes(1, domain="target", seed=0), seed=0, steps=1)
    gray = torch.rand(1, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([0, 1, WIDTH // 2 - 1, WIDTH // 2, HEIGHT * WIDTH // 4 - 1, 7, 7])
    assert torch.equal(model.windows_at(gray, places), model.windows(gray)[0, places])
