"""Certificates: naive loops, laws, files, and the promise on simulated sets of images."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from tests.certification.test_p_values import naive_betting, naive_hoeffding_bentkus
from tests.support import oracles
from tests.support.helpers import raises, seeded
from torch import Tensor

from cpseg import Calibration, Calibrator, Certifier, evidence, groups
from cpseg._internal.safe_files import read_tensors, write_tensors
from cpseg.calibration.certificate import Certificate
from cpseg.certification import rule_choice
from cpseg.certification.certifier import ALPHAS

SIZE = (6, 7)
K = 3
LEVELS = ("0.9", "0.7", "0.5", "0.4", "0.2", "0.1")
# What is tested of an image is not at issue in most tests here.
per_image = functools.partial(Certifier, per="image")


def scenes(
    images: int, generator: torch.Generator, *, sharp: float = 3.0, size: tuple[int, int] = SIZE
) -> tuple[Tensor, Tensor]:
    """Truth in vertical stripes; a model whose confidence in it differs from image to image."""
    labels = torch.randint(K, (images, 1, size[1]), generator=generator).expand(-1, size[0], -1)
    skill = sharp * torch.rand(images, 1, 1, 1, generator=generator)
    logits = torch.randn(images, K, *size, generator=generator)
    logits = logits + skill * torch.nn.functional.one_hot(labels, K).movedim(-1, 1)
    void = torch.rand(images, *size, generator=generator) < 0.1
    return (1.5 * logits).softmax(1), labels.masked_fill(void, 255)


def calibrated(
    background: int | None = None, *, pixelwise: bool = False, ids: bool = False, **options: Any
) -> Calibrator:
    cells = groups.pixel(SIZE) if pixelwise else groups.image(SIZE)
    calibrator = Calibrator(cells, alpha="0.9", background=background, **options)
    probs, labels = scenes(25, seeded(1))
    names = [f"c{i}" for i in range(25)] if ids else None
    calibrator.update(probs, labels, ids=names)
    return calibrator


def certified(certifier: Certifier, images: int = 60, seed: int = 2, **options: Any) -> Calibration:
    certifier.update(*scenes(images, seeded(seed), **options))
    return certifier.compute()


def proof(calibration: Calibration) -> Certificate:
    assert calibration.certificate is not None
    return calibration.certificate


def choose(
    losses: np.ndarray, max_error: float, delta: float, method: str, pvalue: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """From the strictest level on."""
    statement = rule_choice.Statement(method, "image", pvalue, max_error, delta)
    start = rule_choice.Start(np.zeros(losses.shape[1], np.int64), 1.0)
    return rule_choice.choose(losses, statement, [start])


# --- against naive loops -----------------------------------------------------------------------


def naive_counts(
    calibrator: Calibrator, probs: np.ndarray, labels: np.ndarray, alphas: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kept and wrong ``[n, A]`` and pixels ``[n]``, every level by itself."""
    kept, wrong = (np.zeros((len(probs), len(alphas))) for _ in range(2))
    for a, alpha in enumerate(alphas):
        threshold = calibrator.compute(alpha).threshold.numpy()
        for i in range(len(probs)):
            chosen = oracles.select(probs[i], threshold, calibrator.background)
            on = (chosen != 255) & (labels[i] != 255)
            kept[i, a], wrong[i, a] = on.sum(), (on & (chosen != labels[i])).sum()
    return kept, wrong, (labels != 255).sum((1, 2))


def naive_level(losses: np.ndarray, max_error: float, delta: float, method: str, p: str) -> int:
    """``losses`` [n, A] in the order of the images; -1 where nothing is certified."""
    n, level = len(losses), -1
    for a in range(losses.shape[1]):
        if method == "crc":
            so_far = [max(row[: a + 1]) for row in losses.tolist()]
            if (math.fsum(so_far) + 1) / (n + 1) > max_error:
                break
            level = a
        elif naive_p_value(losses, a, max_error, delta, p) <= delta / 3:
            # Where no order was learned: from one of three levels on without a gap.
            first = [part * losses.shape[1] // 4 for part in (1, 2, 3)]
            gapless = [
                all(
                    naive_p_value(losses, b, max_error, delta, p) <= delta / 3
                    for b in range(start, a)
                )
                for start in first
                if start <= a
            ]
            level = a if any(gapless) else level
    return level


def naive_p_value(losses: np.ndarray, a: int, max_error: float, delta: float, p: str) -> float:
    column = losses[:, a].tolist()
    if p == "betting":
        return naive_betting(column, max_error, delta)
    return naive_hoeffding_bentkus(column, max_error)


CASES = [
    ("ltt", "betting", 0.25, 0.1),
    ("ltt", "hoeffding-bentkus", 0.3, 0.2),
    ("crc", "betting", 0.1, 0.1),
    ("crc", "betting", 0.02, 0.1),
]


@pytest.mark.parametrize("pixelwise", [False, True])
@pytest.mark.parametrize("background", [None, 0])
@pytest.mark.parametrize(("method", "pvalue", "max_error", "delta"), CASES)
def test_the_level_is_that_of_naive_loops(
    method: str,
    pvalue: str,
    max_error: float,
    delta: float,
    background: int | None,
    pixelwise: bool,
) -> None:
    calibrator = calibrated(background, pixelwise=pixelwise)
    settings = {"max_error": max_error, "delta": delta, "method": method, "pvalue": pvalue}
    certifier = per_image(calibrator, alphas=LEVELS, **settings)
    probs, labels = scenes(60, seeded(2))
    certifier.update(probs, labels)
    made = certifier.compute()
    kept, wrong, pixels = naive_counts(calibrator, probs.numpy(), labels.numpy(), LEVELS)
    order = [int(i) for i in np.argsort([_digest(0, str(i)) for i in range(60)])]
    losses = np.where(kept > 0, wrong / np.maximum(kept, 1), max_error)
    if method == "crc":
        losses = wrong / pixels[:, None]
    level = naive_level(losses[order], max_error, delta, method, pvalue)
    found = proof(made)
    assert found.num_images == 60
    assert found.certified == (level >= 0)
    if level < 0:
        assert bool((made.threshold == -torch.inf).all())
        assert (found.alpha, found.mean_error, found.kept) == (None, None, 0)
        return
    want = calibrator.compute(LEVELS[level])
    assert torch.equal(made.threshold, want.threshold)
    assert found.alpha == made.alpha == float(LEVELS[level])
    keeps = kept[:, level] > 0 if method == "ltt" else slice(None)
    assert found.mean_error == pytest.approx(losses[keeps, level].mean(), abs=1e-12)
    assert found.kept == pytest.approx((kept[:, level] / pixels).mean(), abs=1e-12)
    if method == "ltt":
        column = losses[order][:, level].tolist()
        p = naive_betting(column, max_error, delta)
        if pvalue != "betting":
            p = naive_hoeffding_bentkus(column, max_error)
        assert found.p_value == pytest.approx(p, rel=1e-9)
        other = "betting" if pvalue != "betting" else "hoeffding-bentkus"
        beside = naive_level(losses[order], max_error, delta, method, other)
        share = (kept[:, beside] / pixels).mean() if beside >= 0 else 0
        assert found.beside is not None
        assert found.beside["alpha"] == (float(LEVELS[beside]) if beside >= 0 else None)
        assert found.beside["kept"] == pytest.approx(share, abs=1e-12)
    else:
        assert (found.p_value, found.beside, found.pvalue, found.delta) == (None,) * 4


def _digest(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()


@pytest.mark.parametrize("background", [None, 1])
@pytest.mark.parametrize(("method", "max_error"), [("ltt", 0.35), ("crc", 0.05)])
def test_levels_of_classes_are_those_of_naive_loops(
    method: str, max_error: float, background: int | None
) -> None:
    calibrator = calibrated(background)
    settings = {"max_error": max_error, "delta": 0.2, "method": method}
    certifier = per_image(calibrator, alphas=LEVELS, per_class=True, **settings)
    probs, labels = scenes(60, seeded(2))
    swapped = (labels == 2) & (torch.arange(60) % 3 == 0).reshape(-1, 1, 1)
    labels = labels.masked_fill(swapped, 0)  # so that classes differ
    certifier.update(probs, labels)
    made = certifier.compute()
    thresholds = [float(calibrator.compute(a).threshold[0, 0]) for a in LEVELS]
    order = [int(i) for i in np.argsort([_digest(0, str(i)) for i in range(60)])]
    scores = 1 - probs.numpy()
    own = np.full(K, -math.inf)
    chosen = np.stack(
        [
            oracles.select(p, np.float32(thresholds[-1]) * np.ones(SIZE, np.float32), background)
            for p in probs.numpy()
        ]
    )
    of_label = np.take_along_axis(scores, np.where(chosen == 255, 0, chosen)[:, None], 1)[:, 0]
    valid = labels.numpy() != 255
    rows = proof(made).classes
    assert rows is not None
    for k in range(K):
        losses = np.zeros((60, len(LEVELS)))
        for a, threshold in enumerate(thresholds):
            on = (chosen == k) & (of_label <= threshold) & valid
            bad = (on & (labels.numpy() != k)).sum((1, 2))
            share = np.where(on.any((1, 2)), bad / np.maximum(on.sum((1, 2)), 1), np.nan)
            losses[:, a] = share if method == "ltt" else bad / valid.sum((1, 2))
        seen = np.nanmean(losses, 0)
        losses = np.where(np.isnan(losses), max_error, losses)
        level = naive_level(losses[order], max_error, 0.2 / K, method, "betting")
        assert rows[k]["alpha"] == (float(LEVELS[level]) if level >= 0 else None)
        if level >= 0:
            own[k] = thresholds[level]
            assert rows[k]["mean_error"] == pytest.approx(seen[level], abs=1e-12)
    assert len(set(own)) > 1, "classes that differ"
    keep = (chosen != 255) & (of_label <= own[np.where(chosen == 255, 0, chosen)])
    want = np.where(keep, chosen, 255)
    assert np.array_equal(made.pseudo_labels(probs).numpy(), want)
    assert np.array_equal(made.pseudo_labels(probs[0]).numpy(), want[0])
    found = evidence(probs, background=background)
    assert np.array_equal(made.pseudo_labels(found, dtype=torch.uint8).numpy(), want)
    share = ((keep & valid).sum((1, 2)) / valid.sum((1, 2))).mean()
    assert proof(made).kept == pytest.approx(share, abs=1e-12)


# --- per label ---------------------------------------------------------------------------------


def images_of_two_sizes(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Small and large images in turn; the large ones keep their void to themselves."""
    found = []
    for number in range(count):
        size = (6, 7) if number % 3 else (12, 14)
        probs, labels = scenes(1, seeded(1000 * seed + number), size=size, sharp=4.0)
        found.append((probs[0], labels[0]))
    return found


def naive_losses(
    calibrator: Calibrator,
    images: list[tuple[Tensor, Tensor]],
    max_error: float,
    largest: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses, wrong and kept labels ``[n, A]``, in floating point and one pixel at a time."""
    losses, wrongs, kepts = (np.zeros((len(images), len(LEVELS))) for _ in range(3))
    for a, alpha in enumerate(LEVELS):
        limit = float(calibrator.compute(alpha).threshold[0, 0])
        for i, (probs, labels) in enumerate(images):
            here = np.full(labels.shape, limit, np.float32)
            chosen = oracles.select(probs.numpy(), here, calibrator.background)
            wrong = kept = pixels = 0
            for got, true in zip(chosen.ravel(), labels.numpy().ravel(), strict=True):
                if true != 255:
                    pixels += 1
                    kept += got != 255
                    wrong += got != 255 and got != true
            share = labels.numel() / largest
            losses[i, a] = max_error + share * (wrong - max_error * kept) / pixels
            wrongs[i, a], kepts[i, a] = wrong / pixels, kept / pixels
    return losses, wrongs, kepts


def naive_starts(losses: np.ndarray, kept: np.ndarray, max_error: float) -> list[tuple[int, float]]:
    """The level that grows fastest with a standard error to spare; the one that keeps half."""
    n, levels = losses.shape
    grows = []
    for a in range(levels):
        gains = [max_error - loss for loss in losses[:, a]]
        mean = sum(gains) / n
        error = math.sqrt(sum((g - mean) ** 2 for g in gains) / (n - 1)) / math.sqrt(n)
        best = -math.inf
        for twentieth in range(1, 21):
            bet = twentieth / 20 * 0.97 / (1 - max_error)
            lowest = -(1 - max_error)
            total = sum(math.log1p(bet * max(g - error, lowest)) for g in gains)
            best = max(best, total / n)
        grows.append(best)
    main = grows.index(max(grows))
    shares = [kept[:, a].mean() for a in range(levels)]
    half = next(a for a in range(levels) if shares[a] >= shares[main] / 2)
    return [(main, 0.9), (min(half, main), 0.1)]


@pytest.mark.parametrize("max_error", [0.15, 0.25, 0.35])
@pytest.mark.parametrize("background", [None, 0])
def test_the_level_per_label_is_that_of_naive_loops(
    background: int | None, max_error: float
) -> None:
    calibrator = calibrated(background)
    setting, certifying = images_of_two_sizes(20, 1), images_of_two_sizes(60, 2)
    certifier = Certifier(calibrator, alphas=LEVELS, max_error=max_error, delta=0.1)
    for probs, labels in setting:
        certifier.learn_order(probs, labels)
    for probs, labels in certifying:
        certifier.update(probs, labels)
    found = proof(certifier.compute())
    largest = 12 * 14
    known, _, shares = naive_losses(calibrator, setting, max_error, largest)
    losses, wrong, kept = naive_losses(calibrator, certifying, max_error, largest)
    order = [int(i) for i in np.argsort([_digest(0, str(i)) for i in range(60)])]
    level = -1
    for start, share in naive_starts(known, shares, max_error):
        for a in range(start, len(LEVELS)):
            if naive_betting(losses[order, a].tolist(), max_error, 0.1) > 0.1 * share:
                break
            level = max(level, a)
    assert found.alpha == (float(LEVELS[level]) if level >= 0 else None)
    assert (found.per, found.max_pixels, found.larger_images) == ("labels", largest, 0)
    assert (level >= 0) == (max_error > 0.2), "both kinds of answer are tested"
    if level >= 0:
        area = np.array([labels.numel() for _, labels in certifying])
        pooled = (area * wrong[:, level]).sum() / (area * kept[:, level]).sum()
        assert found.pooled_error == pytest.approx(pooled, abs=1e-12)
        assert str(found).endswith(f"; for images of at most {largest} pixels")


@pytest.mark.parametrize("seed", range(20))
def test_starts_are_those_of_naive_loops(seed: int) -> None:
    random_ = np.random.default_rng(seed)
    max_error, levels = (0.05, 0.2)[seed % 2], len(LEVELS)
    kept = np.sort(random_.random((12, levels)), axis=1)
    wrong = kept * random_.random((12, levels)) * np.linspace(0.02, 3 * max_error, levels)
    losses = max_error + wrong - max_error * kept
    statement = rule_choice.Statement("ltt", "labels", "betting", max_error, 0.1)
    two = np.stack([losses, losses[::-1] * 0.9], 1)  # a class beside it changes nothing
    found = rule_choice.starts_of(statement, two, np.stack([kept.mean(0)] * 2), 2)
    assert [(start.levels[0], start.share) for start in found] == naive_starts(
        losses, kept, max_error
    )
    assert sum(start.share for start in found) <= 1
    for few in (None, two[:1]):  # three levels, whatever is kept
        three = rule_choice.starts_of(statement, few, np.zeros((2, levels)), 2)
        assert [start.levels.tolist() for start in three] == [[1, 1], [3, 3], [4, 4]]
        assert sum(start.share for start in three) <= 1 + 1e-12


def test_larger_images_are_left_out_and_counted() -> None:
    calibrator = calibrated()
    images = images_of_two_sizes(90, 2)
    small = [number for number, (_, labels) in enumerate(images) if labels.numel() == 42]
    some, all_of_them = (
        Certifier(calibrator, alphas=LEVELS, max_error=0.3, max_pixels=42) for _ in range(2)
    )
    for number in small:
        some.update(*images[number], ids=str(number))
    for number, image in enumerate(images):
        all_of_them.update(*image, ids=str(number))
    found, wanted = proof(all_of_them.compute()), proof(some.compute())
    assert (found.num_images, found.larger_images) == (60, 30)
    assert replace(found, larger_images=0) == wanted
    only_large = Certifier(calibrator, max_error=0.3, max_pixels=41)
    only_large.update(*images[small[0]])
    with raises(ValueError, "Certifier.compute", "an image of at most max_pixels=41 pixels"):
        only_large.compute()


def test_an_order_is_learned_before_and_from_other_images() -> None:
    calibrator = calibrated(ids=True)
    certifier = Certifier(calibrator, max_error=0.3)
    probs, labels = scenes(6, seeded(5))
    certifier.learn_order(probs[:2], labels[:2], ids=["a", "b"])
    certifier.learn_order(probs[:2], labels[:2], ids=["a", "b"])  # changes nothing
    assert len(certifier._learned) == 2
    with raises(ValueError, "Certifier.update", "got 'b', used in calibration, recalibration or"):
        certifier.update(probs[1], labels[1], ids="b")
    certifier.update(probs[2:], labels[2:], ids=list("cdef"))
    assert certifier.num_images == 4
    with raises(ValueError, "Certifier.learn_order", "a call before update, got one after it"):
        certifier.learn_order(probs[0], labels[0])


def test_parts_that_learned_apart_are_one_that_learned_all() -> None:
    calibrator = calibrated(ids=True)
    setting, certifying = scenes(20, seeded(1)), scenes(60, seeded(2))
    names = [f"s{i}" for i in range(20)], [f"n{i}" for i in range(60)]

    def certifier(learn: range, update: range) -> Certifier:
        made = Certifier(calibrator, max_error=0.3)
        for i in learn:
            made.learn_order(setting[0][i], setting[1][i], ids=names[0][i])
        for i in update:
            made.update(certifying[0][i], certifying[1][i], ids=names[1][i])
        return made

    whole = certifier(range(20), range(60))
    first = certifier(range(12), range(30))
    first.merge(certifier(range(19, 7, -1), range(59, 29, -1)))  # four images learned twice
    assert first._learned.keys() == whole._learned.keys()
    assert first.compute().certificate == whole.compute().certificate
    without = certifier(range(0), range(60))
    assert without.compute().certificate != whole.compute().certificate


def test_class_thresholds_follow_size_and_device_and_leave_nan_out() -> None:
    own = torch.tensor([0.25, 0.5]).reshape(2, 1, 1).expand(2, 1, 2)
    made = Calibration(
        torch.ones(1, 2), torch.ones(1, 2, dtype=torch.int64), 0.1, 9, 2, class_threshold=own
    )
    probs = torch.tensor([[0.75, 0.7, 0.1, math.nan], [0.0, 0.0, 0.5, 0.3]]).reshape(2, 1, 4)
    assert made.pseudo_labels(probs).tolist() == [[0, 255, 1, 255]]
    assert made.resize((1, 4)).to("cpu").pseudo_labels(probs).tolist() == [[0, 255, 1, 255]]
    never = replace(made, class_threshold=torch.full((2, 1, 2), -torch.inf))
    assert never.pseudo_labels(probs).tolist() == [[255] * 4]


# --- laws --------------------------------------------------------------------------------------


def saved(calibration: Calibration, path: Path) -> bytes:
    calibration.save(path)
    return path.read_bytes()


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("method", ["ltt", "crc"])
def test_any_split_order_and_merge_with_ids_gives_the_same_bytes(
    method: str, per_class: bool, tmp_path: Path
) -> None:
    calibrator = calibrated(0, ids=True)
    probs, labels = scenes(40, seeded(3))
    options = {"method": method, "per_class": per_class, "max_error": 0.3}

    def one(indices: list[int], step: int) -> Certifier:
        certifier = per_image(calibrator, **options)
        for start in range(0, len(indices), step):
            part = indices[start : start + step]
            certifier.update(probs[part], labels[part], ids=[f"i{i}" for i in part])
        return certifier

    want = saved(one(list(range(40)), 40).compute(), tmp_path / "whole")
    shuffle = random.Random(0)
    for step in (1, 7):
        indices = list(range(40))
        shuffle.shuffle(indices)
        first, second, third = one(indices[:5], step), one(indices[5:30], step), one([], 1)
        second.merge(third)
        third.merge(one(indices[30:], step))
        first.merge(third)
        first.merge(second)
        assert saved(first.compute(), tmp_path / "parts") == want
        assert first.num_images == 40


def test_without_ids_images_are_numbered_as_they_come() -> None:
    calibrator = calibrated()
    probs, labels = scenes(40, seeded(3))
    whole, first, second = (per_image(calibrator, max_error=0.3) for _ in range(3))
    whole.update(probs, labels)
    for i in range(15):
        first.update(probs[i], labels[i])
    second.update(probs[15:], labels[15:])
    first.merge(second)
    assert first.compute().certificate == whole.compute().certificate


def test_void_tells_nothing() -> None:
    calibrator = calibrated(0)
    probs, labels = scenes(30, seeded(4))
    plain, padded = (per_image(calibrator, max_error=0.4) for _ in range(2))
    plain.update(probs, labels)
    more = torch.rand(30, K, 9, 11, generator=seeded(5))
    truth = torch.full((30, 9, 11), 255)
    more[..., :6, :7], truth[..., :6, :7] = probs, labels
    padded.update(more, truth)
    padded.update(more[:4], torch.full((4, 9, 11), 255))  # counted nowhere
    assert padded.num_images == 30
    assert padded.compute().certificate == plain.compute().certificate


def test_a_higher_bound_never_keeps_less() -> None:
    calibrator = calibrated()
    probs, labels = scenes(60, seeded(4))
    kept = []
    for max_error in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6):
        certifier = per_image(calibrator, max_error=max_error)
        certifier.update(probs, labels)
        kept.append(proof(certifier.compute()).kept)
    assert kept == sorted(kept)
    assert kept[0] < kept[3] < kept[-1]


def test_the_seed_orders_the_bets_and_nothing_else() -> None:
    probs, labels = scenes(60, seeded(4))
    found = []
    for seed in (0, 0, 1):
        certifier = per_image(calibrated(), max_error=0.3, seed=seed)
        certifier.update(probs, labels)
        found.append(proof(certifier.compute()).p_value)
    assert found[0] == found[1] != found[2]


def test_grids() -> None:
    made = per_image(calibrated(), alphas=[0.1, "0.9", 0.5, 0.1]).alphas
    assert made == (0.9, 0.5, 0.1)
    assert per_image(calibrated()).alphas == tuple(map(float, ALPHAS))
    assert list(map(float, ALPHAS)) == sorted(set(map(float, ALPHAS)), reverse=True)
    bounded = calibrated(pixelwise=True, max_images=25)
    assert per_image(bounded).alphas[:2] == (0.9, 0.89)
    with raises(ValueError, "Calibrator.compute", r"alpha <= 0\.9"):
        per_image(bounded, alphas=[0.95, 0.1])


# --- what cannot be certified ------------------------------------------------------------------


@pytest.mark.parametrize(("pvalue", "needed"), [("betting", 69), ("hoeffding-bentkus", 67)])
def test_too_few_images_hear_how_many_it_takes(pvalue: str, needed: int, tmp_path: Path) -> None:
    made = certified(per_image(calibrated(), pvalue=pvalue), 44)
    found = proof(made)
    assert (found.certified, found.needed_images, found.lowest_error) == (False, needed, None)
    assert str(found) == (
        f"44 images: an error of 5 % cannot be certified, with 90 % confidence (Learn-then-Test, "
        f"{pvalue}, per image); that needs at least {needed} images without any error; an audit "
        "of the labels (cpseg audit) needs no labelled images"
    )
    assert bool((made.pseudo_labels(scenes(2, seeded(0))[0]) == 255).all())
    made.save(tmp_path / "c")
    loaded = Calibration.load(tmp_path / "c")
    assert loaded.certificate == found
    assert torch.equal(loaded.threshold, made.threshold)


def test_conformal_risk_control_needs_images_too() -> None:
    found = proof(certified(per_image(calibrated(), method="crc"), 18))
    assert found.needed_images == 19
    assert "(conformal risk control)" in str(found)
    assert "confidence" not in str(found)


@pytest.mark.parametrize("method", ["ltt", "crc"])
def test_enough_images_hear_the_lowest_bound_they_would_have_certified(method: str) -> None:
    certifier = per_image(calibrated(), alphas=["0.2", "0.1"], method=method)
    found = proof(certified(certifier, 90, sharp=1.0))
    lowest = found.lowest_error
    assert lowest is not None
    assert found.needed_images is None
    assert lowest == round(lowest, 3) > 0.05
    assert f"would have certified is {100 * lowest:.3g} %" in str(found)
    assert "needs new images" in str(found)
    for max_error, right in ((lowest, True), (round(lowest - 0.001, 3), False)):
        again = per_image(calibrated(), alphas=["0.2", "0.1"], max_error=max_error, method=method)
        assert proof(certified(again, 90, sharp=1.0)).certified == right


def test_no_bound_at_all() -> None:
    certifier = per_image(calibrated(), alphas=["0.1"], max_error=0.5)
    _, labels = scenes(30, seeded(2))
    worst = torch.nn.functional.one_hot((labels.clamp(max=2) + 1) % K, K).movedim(-1, 1)
    certifier.update(worst.to(torch.float32), labels)
    found = proof(certifier.compute())
    assert (found.certified, found.lowest_error) == (False, None)
    assert "no error could be on these images" in str(found)


def test_a_class_without_a_level_keeps_no_label() -> None:
    certifier = per_image(calibrated(), alphas=LEVELS[2:], max_error=0.4, per_class=True)
    probs, labels = scenes(80, seeded(2))
    labels = labels.masked_fill(labels == 2, 0)  # every label 2 is wrong
    certifier.update(probs, labels)
    made = certifier.compute()
    rows = proof(made).classes
    assert rows is not None
    assert [row["certified"] for row in rows] == [True, True, False]
    assert not bool((made.pseudo_labels(probs) == 2).any())
    assert str(proof(made)).startswith("80 images: of each of 2 classes out of 3 and all classes")


# --- sentences and files -----------------------------------------------------------------------


def test_the_sentence() -> None:
    certifier = per_image(calibrated(), alphas=LEVELS, max_error=0.25, delta=0.1)
    found = proof(certified(certifier))
    pooled, mean = (f"{100 * (e or 0):.3g} %" for e in (found.pooled_error, found.mean_error))
    seen = (
        f"over the draw of these images (Learn-then-Test, betting); seen: {pooled} of all labels "
        f"kept are wrong (mean over images {mean}), {100 * found.kept:.3g} % of the pixels kept, "
        f"alpha {found.alpha:g}"
    )
    assert str(found) == (
        "60 images: of the labels that an image keeps, at most 25 % are wrong on average over "
        "images that keep one, every such image weighing the same (of all labels it may be more), "
        f"with 90 % confidence {seen}"
    )
    assert str(replace(found, per="labels")) == (
        "60 images: of all labels kept, at most 25 % are wrong, with 90 % confidence " + seen
    )
    assert str(replace(found, per="labels", max_pixels=9, larger_images=2)).endswith(
        "; for images of at most 9 pixels, 2 larger ones not counted"
    )
    crc = proof(certified(per_image(calibrated(), max_error=0.1, method="crc")))
    assert str(crc).startswith(
        "60 images: a label is kept and wrong on average in at most 10 % of an image's pixels "
        "(of the labels kept it may be more) over the draw of these images and a new one "
        "(conformal risk control); seen: "
    )


@pytest.mark.parametrize("per_class", [False, True])
def test_a_file_keeps_the_certificate(per_class: bool, tmp_path: Path) -> None:
    certifier = per_image(calibrated(0, ids=True), max_error=0.4, per_class=per_class)
    probs, labels = scenes(60, seeded(2))
    certifier.update(probs, labels, ids=[f"i{i}" for i in range(60)])
    made = certifier.compute()
    made.save(tmp_path / "c")
    loaded = Calibration.load(tmp_path / "c")
    assert loaded.certificate == made.certificate
    assert proof(loaded).certified
    assert json.loads(json.dumps(proof(made).to_json()))["num_images"] == 60
    assert loaded.extra["images"] == sorted(f"c{i}" for i in range(25))
    assert loaded.extra["certifying_images"] == sorted(f"i{i}" for i in range(60))
    assert torch.equal(loaded.pseudo_labels(probs), made.pseudo_labels(probs))
    assert (loaded.class_threshold is not None) == per_class


DAMAGED: dict[str, Any] = {
    "method": "luck",
    "pvalue": "0.05",
    "max_error": 5,
    "delta": None,
    "certified": 1,
    "alpha": 1.5,
    "num_images": 0,
    "mean_error": None,
    "kept": "all",
    "p_value": -0.1,
    "beside": {"alpha": 0.1},
    "classes": [{"alpha": 0.1}],
    "needed_images": 3.5,
    "lowest_error": 0,
    "per": "pixel",
    "pooled_error": 2,
    "max_pixels": 0,
    "larger_images": -1,
    "more": 1,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_certificate_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    certified(per_image(calibrated(), max_error=0.4)).save(path)
    tensors, metadata = read_tensors(path)
    metadata["certificate"][name] = DAMAGED[name]
    write_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=r"expected .*; run cpseg certify anew") as caught:
        Calibration.load(path)
    assert str(caught.value).startswith(f"{path}: expected ")
    assert "\n" not in str(caught.value)


def test_a_certificate_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    certified(per_image(calibrated(), max_error=0.4)).save(path)
    tensors, metadata = read_tensors(path)
    for value in ("proven", None, {}):
        write_tensors(path, tensors, {**metadata, "certificate": value})
        with pytest.raises(ValueError, match="a certificate with its fields"):
            Calibration.load(path)


@pytest.mark.parametrize("damage", ["shape", "NaN", "dtype"])
def test_damaged_class_thresholds_are_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    certified(per_image(calibrated(), max_error=0.6, per_class=True)).save(path)
    tensors, metadata = read_tensors(path)
    own = tensors["class_threshold"]
    changed = {"shape": own[1:], "NaN": own * math.nan, "dtype": own.double()}[damage]
    write_tensors(path, {**tensors, "class_threshold": changed}, metadata)
    with pytest.raises(ValueError, match="float32 thresholds of every class"):
        Calibration.load(path)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_error": 0}, r"max_error in \(0, 1\), got 0"),
        ({"max_error": "1.0"}, r"max_error in \(0, 1\)"),
        ({"delta": 1}, r"delta in \(0, 1\)"),
        ({"delta": "ten"}, r"delta in \(0, 1\)"),
        ({"delta": math.nan}, r"delta in \(0, 1\)"),
        ({"method": "rcps"}, "method among 'ltt', 'crc', got 'rcps'"),
        ({"pvalue": "t"}, "pvalue among 'betting', 'hoeffding-bentkus'"),
        ({"alphas": []}, "at least one of alphas"),
        ({"alphas": [0.1, 0]}, r"alphas in \(0, 1\), got 0"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], match: str) -> None:
    with raises(ValueError, "Certifier", match):
        per_image(calibrated(), **options)


def test_calibrators_that_cannot_be_certified() -> None:
    with raises(TypeError, "Certifier", "a Calibrator, got Calibration"):
        per_image(calibrated().compute())  # type: ignore[arg-type]
    with raises(ValueError, "Certifier", "a calibrator with images, got one without"):
        per_image(Calibrator(groups.image(SIZE)))
    with raises(ValueError, "Certifier", "a threshold for all classes, got one for each"):
        per_image(calibrated(per_class=True))
    with raises(ValueError, "Certifier", "lac score, got 'aps'"):
        per_image(calibrated(score="aps"))
    with raises(ValueError, "Certifier", "without a fallback"):
        per_image(calibrated(pixelwise=True, fallback=[groups.image(SIZE)]))
    scores = Calibrator(groups.image(SIZE))
    scores.update_scores(torch.rand(3, *SIZE))
    with raises(ValueError, "Certifier", "that knows its classes, got scores alone"):
        per_image(scores)


def test_bad_updates_count_nothing() -> None:
    certifier = per_image(calibrated(ids=True))
    probs, labels = scenes(4, seeded(0))
    names = list("abcd")
    certifier.update(probs, labels, ids=names)
    where = "Certifier.update"
    wrong: list[tuple[Tensor, Tensor, Any, str]] = [
        (probs + 0.5, labels, list("efgh"), r"probs in \[0, 1\], got values"),
        (probs * math.nan, labels, list("efgh"), "got NaN"),
        (probs, labels + 1, list("efgh"), "labels in 0..2 or 255"),
        (probs, labels[:3], list("efgh"), r"labels \[4, 6, 7\]"),
        (probs[:, :2], labels, list("efgh"), "3 classes as calibrated"),
        (probs, labels, ["e", "f", "c7", "c3"], "not used before, got 'c3', used in calibration"),
        (probs, labels, ["e", "f", "g", "a"], "every image once, got 'a' twice"),
        (probs, labels, ["e", "f", "g", "e"], "every image once, got 'e' twice"),
        (probs, labels, ["e", "f"], "ids as 4 strings, one per image"),
        (probs, labels, [1, 2, 3, 4], "ids as 4 strings"),
        (probs, labels, "e", "ids as 4 strings"),
        (probs, labels, None, "ids for all images or for none, got some without"),
    ]
    for p, y, ids, match in wrong:
        with raises(ValueError, where, match):
            certifier.update(p, y, ids=ids)
        assert certifier.num_images == 4
        assert certifier.ids == set(names)
    certifier.update(probs[0], labels[0], ids="e")
    assert certifier.num_images == 5
    unnamed = per_image(calibrated())
    unnamed.update(probs, labels)
    with raises(ValueError, where, "got some without before"):
        unnamed.update(probs, labels, ids=names)
    with raises(TypeError, where, "floating-point probs"):
        certifier.update(probs.to(torch.uint8), labels)
    with raises(ValueError, "Certifier.compute", "labelled images, got none"):
        per_image(calibrated()).compute()


def test_bad_merges() -> None:
    calibrator = calibrated()
    probs, labels = scenes(4, seeded(0))
    first = per_image(calibrator)
    first.update(probs, labels, ids=list("abcd"))
    where = "Certifier.merge"
    with raises(ValueError, where, "another certifier, got itself"):
        first.merge(first)
    with raises(TypeError, where, "a Certifier, got Calibrator"):
        first.merge(calibrator)  # type: ignore[arg-type]
    for name, value in {"max_error": 0.1, "delta": 0.2, "method": "crc", "seed": 1}.items():
        with raises(ValueError, where, f"the same {name}"):
            first.merge(per_image(calibrator, **{name: value}))
    with raises(ValueError, where, "the same thresholds"):
        first.merge(per_image(calibrated(pixelwise=True)))
    with raises(ValueError, where, "the same calibration images"):
        first.merge(per_image(calibrated(ids=True)))
    twice = per_image(calibrator)
    twice.update(probs[1], labels[1], ids="b")
    with raises(ValueError, where, "every image once, got 'b' twice"):
        first.merge(twice)
    unnamed = per_image(calibrator)
    unnamed.update(probs, labels)
    with raises(ValueError, where, "ids for all images or for none"):
        first.merge(unnamed)
    assert first.num_images == 4


def test_a_calibrator_remembers_ids() -> None:
    probs, labels = scenes(4, seeded(0))
    first, second = (Calibrator(groups.image(SIZE)) for _ in range(2))
    first.update(probs[:2], labels[:2], ids=["b", "a"])
    first.update(probs, labels)  # without: as ever
    second.update(probs[2], labels[2], ids="c")
    for ids, match in ((["a", "d"], "got 'a' twice"), (["d", "d"], "got 'd' twice")):
        with raises(ValueError, "Calibrator.update", match):
            first.update(probs[:2], labels[:2], ids=ids)
    assert first.num_images == 6
    first.merge(second)
    assert first.ids == {"a", "b", "c"}
    assert first.compute().extra == {"images": ["a", "b", "c"]}
    with raises(ValueError, "Calibrator.merge", "got 'c' twice"):
        first.merge(second)
    assert first.num_images == 7
    plain = Calibrator(groups.image(SIZE))
    plain.update(probs, labels)
    assert plain.compute().extra == {}


# --- the promise -------------------------------------------------------------------------------
#
# Losses of worlds whose risk is known: `SETS` draws of n images each; how often does the rule that
# is returned have a risk above `max_error`? At most a share delta. The bound on the count is passed
# by a right implementation with probability `FALSE_ALARM` at most.

SETS = 1000
FALSE_ALARM = 1e-7
World = Callable[[np.random.Generator], np.ndarray]  # losses [n, C, A]
DELTA, MAX_ERROR = 0.1, 0.1


def correlated(rng: np.random.Generator) -> np.ndarray:
    """Pixels of an image are right or wrong together: its error rate is drawn, 2,000 pixels."""
    rate = rng.beta(0.6, 5.4, (80, 1, 1))  # mean 0.1 at the middle level
    scale = np.array(CORRELATED) / 0.1
    return rng.binomial(2000, np.minimum(rate * scale, 1.0)) / 2000


CORRELATED = (0.02, 0.05, 0.08, 0.09, 0.095, 0.1)  # scaled by at most 1: the mean is exact
FEW = (0.01, 0.02, 0.03, 0.101, 0.15, 0.3)
IMBALANCED = ((0.02, 0.05, 0.101, 0.2), (0.01, 0.101, 0.102, 0.103), (0.001, 0.002, 0.003, 0.101))
WAVES = (0.02, 0.101, 0.05, 0.101, 0.03, 0.101, 0.2, 0.05, 0.101, 0.12)


def few(rng: np.random.Generator) -> np.ndarray:
    """30 images: beta losses with few large ones, levels that move together."""
    return (rng.random((30, 1, 1)) < np.array(FEW)).astype(float)


def imbalanced(rng: np.random.Generator) -> np.ndarray:
    """Three classes, in every image, in half, in a fifth: where it is, a class is lost whole."""
    risks = np.array(IMBALANCED)
    present = np.array([1.0, 0.5, 0.2])[:, None]
    there = rng.random((120, 3, 1)) < present
    return there * (rng.random((120, 3, 1)) < risks / present)


def waves(rng: np.random.Generator) -> np.ndarray:
    """Risk that goes up and down along the levels, each with losses of its own."""
    return (rng.random((60, 1, len(WAVES))) < np.array(WAVES)).astype(float)


WORLDS: dict[str, tuple[World, np.ndarray]] = {
    "correlated pixels": (correlated, np.array([[*CORRELATED]])),
    "few images": (few, np.array([FEW])),
    "class imbalance": (imbalanced, np.array(IMBALANCED)),
    "not monotone": (waves, np.array([WAVES])),
}
"""Losses and the risk of every class and level."""

Rule = Callable[[np.ndarray], np.ndarray]  # losses to levels


def violations(world: str, rule: Rule, max_error: float) -> int:
    """How many of `SETS` draws return a rule, of any class, whose risk is above the bound."""
    draw, risks = WORLDS[world]
    rng = np.random.default_rng(11)
    count = 0
    for _ in range(SETS):
        levels = rule(draw(rng))
        count += any(risks[c, a] > max_error for c, a in enumerate(levels) if a >= 0)
    return count


def bound_of(world: str) -> float:
    """The correlated world's risks end at 0.1: there the bound lies below."""
    return 0.085 if world == "correlated pixels" else MAX_ERROR


MOST = int(binom.isf(FALSE_ALARM, SETS, DELTA))


@pytest.mark.parametrize("pvalue", ["betting", "hoeffding-bentkus"])
@pytest.mark.parametrize("world", WORLDS)
def test_the_promise_holds(world: str, pvalue: str) -> None:
    bound = bound_of(world)
    count = violations(world, lambda x: choose(x, bound, DELTA, "ltt", pvalue)[0], bound)
    print(f"{world}, {pvalue}: {count} of {SETS}")
    assert count <= MOST


def by_the_mean(losses: np.ndarray, bound: float) -> np.ndarray:
    """The loosest level whose errors were few enough on these images."""
    levels = np.arange(losses.shape[-1])
    return np.where(losses.mean(0) <= bound, levels, -1).max(-1)


def from_the_loose_side(losses: np.ndarray, bound: float) -> np.ndarray:
    """The loosest level whose p-value is small, as if it were the only one tested."""
    p = choose(losses, bound, DELTA * losses.shape[1], "ltt", "betting")[1]
    assert p is not None
    return np.where(p <= DELTA, np.arange(losses.shape[-1]), -1).max(-1)


def pixels_as_units(losses: np.ndarray, bound: float) -> np.ndarray:
    """Every image taken as 400 independent pixels."""
    return choose(losses.repeat(400, 0), bound, DELTA, "ltt", "hoeffding-bentkus")[0]


def without_correction(losses: np.ndarray, bound: float) -> np.ndarray:
    """Each class at delta."""
    apart = [choose(losses[:, [c]], bound, DELTA, "ltt", "betting")[0] for c in range(3)]
    return np.concatenate(apart)


@pytest.mark.parametrize(
    ("rule", "world"),
    [
        (by_the_mean, "correlated pixels"),
        (by_the_mean, "few images"),
        (by_the_mean, "class imbalance"),
        (by_the_mean, "not monotone"),
        (from_the_loose_side, "not monotone"),
        (pixels_as_units, "correlated pixels"),
        (without_correction, "class imbalance"),
    ],
)
def test_what_is_nearly_right_does_not_keep_it(
    rule: Callable[[np.ndarray, float], np.ndarray], world: str
) -> None:
    bound = bound_of(world)
    count = violations(world, lambda losses: rule(losses, bound), bound)
    print(f"{rule.__name__}, {world}: {count} of {SETS}")
    assert count > MOST


def steps(rng: np.random.Generator) -> np.ndarray:
    """Ten images, each right up to a level of its own and wrong beyond: the hardest case."""
    at = rng.random((10, 1, 1))
    return (np.arange(1, 101) / 100 > at).astype(float)


def test_conformal_risk_control_keeps_its_expectation() -> None:
    """Classical: (k + 1) / (n + 1) of a new image lies beyond the k-th step.

    At 0.2 with ten images that is 2/11; without the +1 of the new image it is 3/11. The mean of
    4,000 risks in [0, 1] with variance below 0.02 strays by 0.0175 with probability 2e-7 at most
    (Bernstein).
    """
    rng = np.random.default_rng(5)
    right, wrong = [], []
    for _ in range(4000):
        losses = steps(rng)
        level = choose(losses, 0.2, 0.1, "crc", "betting")[0][0]
        right.append((level + 1) / 100)  # risk of level a is (a + 1) / 100
        wrong.append((by_the_mean(losses, 0.2)[0] + 1) / 100)
    assert np.var(right) < 0.02
    assert 2 / 11 - 0.03 < np.mean(right) <= 0.2 + 0.0175
    assert np.mean(wrong) > 0.2 + 0.0175


def test_conformal_risk_control_without_the_running_maximum_breaks() -> None:
    """Levels that dip by chance: the last of them that looks good is one of luck."""
    rng = np.random.default_rng(6)
    draws = [(rng.random((20, 1, 60)) < 0.3).astype(float) for _ in range(400)]
    lucky = [(x.sum(0) + 1) / 21 <= 0.2 for x in draws]
    assert np.mean([0.3 * x.any() for x in lucky]) > 0.25
    kept = [choose(x, 0.2, 0.1, "crc", "betting")[0][0] >= 0 for x in draws]
    assert np.mean(kept) * 0.3 < 0.1


# The whole way: certifiers over images drawn from a population of which everything is known.


@pytest.mark.parametrize("per_class", [False, True])
def test_the_promise_from_scores_to_labels(per_class: bool) -> None:
    """300 images are the whole world; certifiers see 60 of them, drawn with replacement.

    Also the power: what is kept on average, beside an oracle that knows the risk of every level.
    """
    bound, draws = 0.3, 300
    certifier = per_image(calibrated(0), max_error=bound, delta=DELTA, per_class=per_class)
    certifier.learn_order(*scenes(25, seeded(1)))
    probs, labels = scenes(300, seeded(9))
    certifier.update(probs, labels)
    world = list(certifier._images)
    shuffle = random.Random(3)
    violated, kept = 0, []
    made: Calibration
    for _ in range(draws):
        certifier._images = shuffle.choices(world, k=60)
        made = certifier.compute()
        found = proof(made)
        alphas = [found.alpha] if found.classes is None else [r["alpha"] for r in found.classes]
        levels = [certifier.alphas.index(a) if a is not None else -1 for a in alphas]
        risks = [
            (
                np.mean([x.wrong[c, a] / x.kept[c, a] for x in world if x.kept[c, a] > 0])
                if a >= 0
                else 0.0
            )
            for c, a in enumerate(levels)
        ]
        violated += max(risks) > bound
        kept.append(found.kept)
    assert violated <= binom.isf(FALSE_ALARM, draws, DELTA)
    # The last one once more, by its labels.
    chosen = made.pseudo_labels(probs)
    on = (chosen != 255) & (labels != 255)
    for c, risk in enumerate(risks):
        mine = on & (chosen == c) if per_class else on
        wrong = (mine & (chosen != labels)).sum((1, 2)) / mine.sum((1, 2))
        assert float(wrong.double().nanmean().nan_to_num()) == pytest.approx(risk, abs=1e-6)
    ideal = 0.0
    for c in range(K if per_class else 1):
        kept_of = np.stack([x.kept[c] for x in world])
        wrong_of = np.stack([x.wrong[c] for x in world])
        risk = np.nanmean(np.where(kept_of > 0, wrong_of / np.maximum(kept_of, 1), np.nan), 0)
        best = int(np.flatnonzero(risk <= bound).max())
        ideal += float(np.mean([x.kept[c, best] / x.pixels for x in world]))
    print(f"kept {np.mean(kept):.3f}, an oracle {ideal:.3f}, violated {violated} of {draws}")
    assert np.mean(kept) > 0.4 * ideal


@pytest.mark.parametrize("method", ["ltt", "crc"])
@pytest.mark.parametrize("per_class", [False, True])
def test_a_bound_at_the_end_is_a_bound_at_the_start(method: str, per_class: bool) -> None:
    generator = seeded(3)
    probs = torch.rand(90, 3, 6, 6, generator=generator).mul(6).softmax(1)
    labels = probs.argmax(1)
    labels[:, :1] = torch.randint(3, (90, 1, 6), generator=generator)
    calibrator = Calibrator(groups.image((6, 6)), alpha="0.995", num_classes=3)
    calibrator.update(probs[:20], labels[:20])

    def certifier(max_error: float | str) -> Certifier:
        made = per_image(calibrator, max_error=max_error, method=method, per_class=per_class)
        made.update(probs[20:], labels[20:])
        return made

    asked = certifier(0.9)
    kept = []
    for bound in ("0.02", 0.1, 0.3):
        made, expected = asked.compute(bound), certifier(bound).compute()
        assert made.certificate == expected.certificate
        assert made.certificate is not None
        assert made.certificate.max_error == float(bound)
        assert torch.equal(made.threshold, expected.threshold)
        kept.append(made.certificate.kept)
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]
    assert asked.max_error == 0.9
    assert asked.compute().certificate == certifier(0.9).compute().certificate
    with pytest.raises(ValueError, match=r"Certifier.compute: expected max_error in \(0, 1\)"):
        asked.compute(1)
