"""`assert_certificate`: cpseg's certificates pass it, the first version and other mistakes fail."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.helpers import raises
from torch import Tensor

from cpseg import Calibration
from cpseg.certification.rule_choice import Start, Statement, choose
from cpseg.testing import WORLDS, assert_certificate, try_world
from cpseg.testing.certificates import Certify, Image

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "certificates.py"
GRID = (8, 8)
SLOW = pytest.mark.ci
if not SCRIPT.exists():
    pytest.skip("benchmarks are not part of this copy", allow_module_level=True)
# A certifier that measures each image once for the images that set the thresholds.
Measured = runpy.run_path(str(SCRIPT))["Measured"]


def labeller(made: Calibration) -> Callable[[Tensor], Tensor] | None:
    assert made.certificate is not None
    return made.pseudo_labels if made.certificate.certified else None


def ours(per: str, *, per_class: bool = False, learn: bool = True) -> Certify:
    measured = Measured(learn, max_error=0.1, delta=0.1, per=per, per_class=per_class)

    def certify(
        setting: Sequence[Image], certifying: Sequence[Image], max_error: float, delta: float
    ) -> Callable[[Tensor], Tensor] | None:
        return labeller(measured(setting, certifying).compute())

    return certify


def first_version(per_class: bool = False) -> Certify:
    """An image that keeps nothing counts as one without an error; strictest level first."""
    measured = Measured(False, per_class=per_class)

    def certify(
        setting: Sequence[Image], certifying: Sequence[Image], max_error: float, delta: float
    ) -> Callable[[Tensor], Tensor] | None:
        tested = measured(setting, certifying)
        wrong = np.stack([image.wrong for image in tested._images])
        kept = np.stack([image.kept for image in tested._images])
        statement = Statement("ltt", "image", "betting", max_error, delta)
        start = Start(np.zeros(wrong.shape[1], np.int64), 1.0)
        levels, _ = choose(wrong / np.maximum(kept, 1), statement, [start])
        if (levels < 0).all():
            return None
        own = [tested._thresholds[a] if a >= 0 else torch.full(GRID, -torch.inf) for a in levels]

        def label(probs: Tensor) -> Tensor:
            if not per_class:
                return Calibration(
                    own[0], torch.ones(GRID, dtype=torch.int64), 0.1, 15, 3
                ).pseudo_labels(probs)
            base = Calibration(
                tested._thresholds[-1],
                torch.ones(GRID, dtype=torch.int64),
                0.1,
                15,
                3,
                class_threshold=torch.stack(own),
            )
            return base.pseudo_labels(probs)

        return label

    return certify


@pytest.mark.parametrize("per", ["labels", "image"])
def test_ours_pass_in_every_world(per: str) -> None:
    assert_certificate(ours(per), per=per, draws=20, reuse=20, images=60)


@pytest.mark.nightly
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("per", ["labels", "image"])
def test_ours_pass_in_many_draws(per: str, per_class: bool) -> None:
    certify = ours(per, per_class=per_class)
    assert_certificate(certify, per=per, per_class=per_class, draws=60, reuse=60)


@SLOW
def test_ours_pass_with_few_images_and_without_an_order() -> None:
    whole = ["images right or wrong as a whole"]
    assert_certificate(ours("labels"), worlds=whole, images=25, draws=100, reuse=50)
    assert_certificate(ours("labels", learn=False), draws=20, reuse=20)


@pytest.mark.parametrize(
    ("world", "per", "per_class"),
    [
        ("images that keep nothing", "labels", False),
        ("images that keep nothing", "image", False),
        ("few labelled pixels", "labels", False),
        ("a rare and always wrong class", "labels", True),
        ("a rare and always wrong class", "image", True),
    ],
)
def test_the_first_version_fails(world: str, per: str, per_class: bool) -> None:
    with raises(AssertionError, "assert_certificate", f"to be false .* world '{world}', per {per}"):
        certify = first_version(per_class)
        assert_certificate(
            certify, per=per, per_class=per_class, worlds=[world], draws=40, reuse=10
        )


@pytest.mark.parametrize("world", ["sizes that differ", "images that keep little"])
def test_the_statement_per_image_is_not_the_one_per_label(world: str) -> None:
    with raises(AssertionError, "assert_certificate", "per labels"):
        assert_certificate(ours("image"), per="labels", worlds=[world], draws=40, reuse=10)


def by_the_mean(
    setting: Sequence[Image], certifying: Sequence[Image], max_error: float, delta: float
) -> Callable[[Tensor], Tensor] | None:
    """As if pixels were independent and so many that their mean is the truth."""
    wrong = [(image.probs.argmax(0) != image.labels).float().mean() for image in certifying]
    return (lambda probs: probs.argmax(1)) if torch.stack(wrong).mean() <= max_error else None


def test_the_mean_is_no_bound() -> None:
    with raises(AssertionError, "assert_certificate", "the image is the unit, not the pixel"):
        worlds = ["images right or wrong as a whole"]
        assert_certificate(by_the_mean, worlds=worlds, draws=100, images=25)


def test_counts_of_one_world() -> None:
    tried = try_world(
        lambda *_: lambda probs: probs.argmax(1), "images right or wrong as a whole", draws=5
    )
    assert (tried.draws, tried.issued, tried.kept) == (5, 5, 1.0)
    nothing = try_world(
        lambda *_: lambda probs: torch.full_like(probs[:, 0], 255).long(),
        "correlated pixels",
        draws=5,
    )
    assert (nothing.issued, nothing.false, nothing.kept) == (5, 0, 0.0)


def test_draws_may_share_the_images_that_set_the_thresholds() -> None:
    seen: list[object] = []

    def certify(setting: Sequence[Image], certifying: Sequence[Image], *_: float) -> None:
        seen.append(setting)
        assert (len(setting), len(certifying)) == (15, 80)

    try_world(certify, "correlated pixels", draws=7, reuse=3)
    assert [seen[i] is seen[i - 1] for i in range(1, 7)] == [True, True, False, True, True, False]


def test_what_is_refused() -> None:
    certify = ours("labels")
    with raises(ValueError, "assert_certificate", "per"):
        assert_certificate(certify, per="pixel")
    with raises(ValueError, "assert_certificate", "worlds"):
        assert_certificate(certify, worlds=["mine"])
    with raises(ValueError, "assert_certificate", "a whole draws >= 1"):
        assert_certificate(certify, draws=0)
    for wrong in (lambda probs: probs[:, 0], lambda probs: probs.argmax(1)[:, :1]):
        with raises(TypeError, "assert_certificate", "integer labels"):
            assert_certificate(lambda *_, label=wrong: label, worlds=[next(iter(WORLDS))], draws=1)
