"""Is a certificate's sentence true? Worlds in which rules that look right certify wrong labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from cpseg._internal.checks import check_choice, message
from cpseg.testing.strategies import at_least_one, check_counts

_Array = np.ndarray[Any, Any]
_IMAGES = 400  # of a world: all that is known of it, and what is drawn from, with replacement
_SETTING = 15
_CLASSES = 3
_VOID = 255


class Image(NamedTuple):
    """An image of a world: probs ``[K, h, w]``, labels ``[h, w]`` (void 255), the whole truth."""

    probs: Tensor
    labels: Tensor
    truth: Tensor


class Tried(NamedTuple):
    """What came of many draws of one world.

    Attributes:
        draws: how often labelled images were drawn.
        issued: how many certificates were issued.
        false: how many of these say what is not true of the world.
        kept: mean share of the world's pixels that keep a label, 0 where none is issued.
    """

    draws: int
    issued: int
    false: int
    kept: float


Labeller = Callable[[Tensor], Tensor]
Certify = Callable[[Sequence[Image], Sequence[Image], float, float], Labeller | None]


def assert_certificate(
    certify: Certify,
    *,
    per: str = "labels",
    per_class: bool = False,
    worlds: Sequence[str] | None = None,
    images: int = 80,
    max_error: float = 0.1,
    delta: float = 0.1,
    draws: int = 1000,
    reuse: int = 1,
    false_alarm: float = 1e-6,
    seed: int = 0,
) -> None:
    """A certificate is false in at most a share ``delta`` of all draws, in worlds made to break it.

    A world is 400 images of which everything is known; labelled images are drawn from it with
    replacement, and what is certified is compared with the error over the whole world.

    Args:
        certify: the code under test, ``certify(setting, certifying, max_error, delta)`` with two
            lists of images (``probs`` ``[3, h, w]``, ``labels`` ``[h, w]``, 255 where void; sizes
            may differ within a list). It returns a function from probs ``[B, 3, h, w]`` to labels
            ``[B, h, w]`` with 255 where none is kept, or None where nothing is certified.
        per: what the certificate says: ``"labels"``, of all labels kept at most ``max_error`` are
            wrong; ``"image"``, so on average over images that keep one, each weighing the same.
        per_class: whether it says so of every class at once. A class that is never kept is not
            spoken of.
        worlds: names among :data:`WORLDS`, by default all.
        images: certification images in a draw.
        max_error: the bound.
        delta: 1 - confidence.
        draws: of every world.
        reuse: how many draws in a row share the images that set the thresholds (the same list),
            so that ``certify`` can keep what it made of them. Given these, a certificate is still
            false with a chance of at most ``delta``.
        false_alarm: chance that a right implementation fails in one world.
        seed: of the worlds and draws.

    Raises:
        AssertionError: the first world with too many false certificates: how many of how many.
        ValueError: an unknown world or statement, a value outside its range, nothing to try.
        TypeError: labels that are not integer.

    Guarantee:
        False alarms as stated: false certificates are independent over draws given the world, so
        that their number is at most binomial.

    Example:
        >>> def cautious(setting, certifying, max_error, delta):
        ...     return None  # it certifies nothing, and is never wrong
        >>> assert_certificate(cautious, draws=50)
    """
    where = "assert_certificate"
    check_choice(where, per, ("labels", "image"), name="per")
    check_counts(where, images=images, draws=draws, reuse=reuse)
    names = tuple(WORLDS) if worlds is None else at_least_one(where, "worlds", worlds)
    for name in names:
        check_choice(where, name, tuple(WORLDS), name="worlds")
    most = int(binom.isf(false_alarm, draws, delta))
    for name in names:
        tried = try_world(
            certify,
            name,
            per=per,
            per_class=per_class,
            images=images,
            max_error=max_error,
            delta=delta,
            draws=draws,
            reuse=reuse,
            seed=seed,
        )
        if tried.false > most:
            of_class = ", of every class" if per_class else ""
            expected = (
                f"at most {most} of {draws} certificates of {max_error:g} to be false "
                f"(delta={delta:g}) in the world '{name}', per {per}{of_class}"
            )
            fix = f"bound what it says, {WORLDS[name].catches}"
            raise AssertionError(message(where, expected, str(tried.false), fix))


def try_world(
    certify: Certify,
    name: str,
    *,
    per: str = "labels",
    per_class: bool = False,
    images: int = 80,
    max_error: float = 0.1,
    delta: float = 0.1,
    draws: int = 1000,
    reuse: int = 1,
    seed: int = 0,
) -> Tried:
    """Count false certificates in one world.

    Args:
        certify: as for :func:`assert_certificate`, and so are the others.
        name: of the world.
        per: what the certificate says.
        per_class: whether it says so of every class.
        images: certification images in a draw.
        max_error: the bound.
        delta: 1 - confidence.
        draws: how often certification images are drawn.
        reuse: how many draws in a row share the images that set the thresholds.
        seed: of the world and draws.
    """
    random = np.random.default_rng(seed)
    everything = [WORLDS[name].draw(random, max_error) for _ in range(_IMAGES)]
    sizes = sorted({image.truth.shape for image in everything})
    stacks = []
    for size in sizes:
        same = [image for image in everything if image.truth.shape == size]
        probs = torch.stack([image.probs for image in same])
        stacks.append((probs, torch.stack([image.truth for image in same])))
    issued = false = 0
    kept = 0.0
    setting: list[Image] = []
    for number in range(draws):
        if number % reuse == 0:
            setting = [everything[i] for i in random.integers(_IMAGES, size=_SETTING)]
        certifying = [everything[i] for i in random.integers(_IMAGES, size=images)]
        labeller = certify(setting, certifying, max_error, delta)
        if labeller is None:
            continue
        issued += 1
        wrong, held, pixels = _counted(labeller, stacks)
        kept += float(held.sum() / pixels)
        if not per_class:
            wrong, held = wrong.sum(1, keepdims=True), held.sum(1, keepdims=True)
        false += bool((_errors(wrong, held, per) > max_error).any())
    return Tried(draws, issued, false, kept / draws)


def _counted(
    labeller: Labeller, stacks: Sequence[tuple[Tensor, Tensor]]
) -> tuple[_Array, _Array, int]:
    """Wrong and kept labels of every image and class ``[n, K]``, and all pixels."""
    wrong, held, pixels = [], [], 0
    for probs, truth in stacks:
        labels = labeller(probs)
        if labels.is_floating_point() or labels.shape != truth.shape:
            got = f"{labels.dtype} {list(labels.shape)}"
            expected = f"integer labels {list(truth.shape)} from what certify returned"
            raise TypeError(message("assert_certificate", expected, got, "255 where none is kept"))
        of_class = torch.stack([(labels == k).flatten(1) for k in range(_CLASSES)], 1)
        bad = of_class & (labels != truth).flatten(1)[:, None]
        wrong.append(bad.sum(-1).numpy())
        held.append(of_class.sum(-1).numpy())
        pixels += truth.numel()
    return np.concatenate(wrong), np.concatenate(held), pixels


def _errors(wrong: _Array, held: _Array, per: str) -> _Array:
    """The error of each class that is kept anywhere, 0 of one that is not."""
    if per == "labels":
        return np.asarray(wrong.sum(0) / np.maximum(held.sum(0), 1))
    keeps = held > 0
    shares = np.where(keeps, wrong / np.maximum(held, 1), 0.0)
    return np.asarray(shares.sum(0) / np.maximum(keeps.sum(0), 1))


# --- worlds ------------------------------------------------------------------------------------


class World(NamedTuple):
    """A population of images.

    Attributes:
        draw: one image, from a source of random numbers and the bound that it is to break.
        catches: the mistake that it finds.
    """

    draw: Callable[[np.random.Generator, float], Image]
    catches: str


def _image(
    random: np.random.Generator,
    confidence: _Array,
    right: _Array,
    *,
    predicted: _Array | None = None,
    labelled: _Array | None = None,
) -> Image:
    """An image from the confidence of its argmax and whether it is right, both ``[h, w]``."""
    drawn = np.asarray(random.integers(_CLASSES - 1, size=right.shape))
    guess: _Array = drawn if predicted is None else predicted
    other = (guess + 1 + random.integers(_CLASSES - 1, size=right.shape)) % _CLASSES
    truth = torch.from_numpy(np.where(right, guess, other))
    rest = (1 - confidence) / (_CLASSES - 1)
    probs = np.where(np.arange(_CLASSES)[:, None, None] == guess, confidence, rest)
    labels = truth
    if labelled is not None:
        labels = truth.masked_fill(torch.from_numpy(~labelled), _VOID)
    return Image(torch.from_numpy(probs.astype(np.float32)), labels, truth)


def _keep_nothing(random: np.random.Generator, bound: float) -> Image:
    sure = random.random() < 1 / 7
    confidence = random.uniform(0.9, 0.99, (6, 6)) if sure else random.uniform(0.4, 0.6, (6, 6))
    return _image(random, confidence, random.random((6, 6)) > (3 * bound if sure else 0.5))


def _keep_little(random: np.random.Generator, bound: float) -> Image:
    """Most keep a pixel or two that are right, one in eight keeps all, often wrong."""
    if random.random() < 1 / 8:
        return _image(random, random.uniform(0.9, 0.99, (6, 6)), random.random((6, 6)) > 3 * bound)
    confidence = random.uniform(0.34, 0.5, (6, 6))
    confidence[0, :2] = 0.95
    right = random.random((6, 6)) > 0.6
    right[0, :2] = True
    return _image(random, confidence, right)


def _few_labelled(random: np.random.Generator, bound: float) -> Image:
    confidence = random.uniform(0.34, 0.6, (8, 8))
    confidence[:2] = random.uniform(0.9, 0.99, (2, 8))
    right = random.random((8, 8)) > np.where(confidence > 0.8, 2.5 * bound, 0.6)
    labelled = np.zeros(64, bool)
    labelled[random.choice(64, 2, replace=False)] = True
    return _image(random, confidence, right, labelled=labelled.reshape(8, 8))


def _sizes(random: np.random.Generator, bound: float) -> Image:
    """One in eight is 16 times as large as the others, and more often wrong."""
    large = random.random() < 1 / 8
    size = (16, 16) if large else (4, 4)
    right = random.random(size) > (1.8 * bound if large else 0.1 * bound)
    return _image(random, random.uniform(0.8, 0.99, size), right)


def _rare_class(random: np.random.Generator, bound: float) -> Image:
    """A class that is predicted in 3 % of the images and always wrong there."""
    right = random.random((6, 6)) > 0.2 * bound
    predicted = random.integers(2, size=(6, 6))
    if random.random() < 0.03:
        predicted[:2], right[:2] = 2, False
    return _image(random, random.uniform(0.8, 0.99, (6, 6)), right, predicted=predicted)


def _correlated(random: np.random.Generator, bound: float) -> Image:
    """All pixels of an image share one error rate, mostly small and sometimes near 1."""
    rate = random.beta(0.3, 0.3 * (1 / (1.25 * bound) - 1))
    return _image(random, random.uniform(0.8, 0.99, (10, 10)), random.random((10, 10)) > rate)


def _all_or_nothing(random: np.random.Generator, bound: float) -> Image:
    """An image is wrong as a whole or right as a whole: the hardest case for few images."""
    wrong = random.random() < 1.25 * bound
    return _image(random, random.uniform(0.8, 0.99, (3, 3)), np.full((3, 3), not wrong))


WORLDS: dict[str, World] = {
    "images that keep nothing": World(_keep_nothing, "where they prove nothing"),
    "images that keep little": World(_keep_little, "where they weigh as little as they keep"),
    "few labelled pixels": World(_few_labelled, "where labels outside the kept part prove nothing"),
    "sizes that differ": World(_sizes, "where a large image has more labels than a small one"),
    "a rare and always wrong class": World(_rare_class, "where images without the class say no"),
    "correlated pixels": World(_correlated, "where pixels of an image go wrong together"),
    "images right or wrong as a whole": World(
        _all_or_nothing, "where the image is the unit, not the pixel"
    ),
}
"""Worlds of :func:`assert_certificate` by their names."""
