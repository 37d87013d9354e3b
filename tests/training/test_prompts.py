"""Prompts: what is drawn, how often, and where evaluations click; the task prompt."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tests.support.helpers import raises, same, seeded
from torch import Tensor

from cpseg import (
    TaskPrompt,
    boundary_point,
    centre_point,
    jitter_boxes,
    masks_to_boxes,
    sample_prompts,
)
from cpseg.training.prompts import _pick

FALSE_ALARM = 1e-6  # of each chi-square test below; the seeds are fixed, so it is met once and kept


def blobs(seed: int, count: int = 4, size: tuple[int, int] = (12, 17)) -> Tensor:
    draw = np.random.default_rng(seed)
    masks = np.zeros((count, *size), bool)
    for mask in masks:
        for _ in range(2):
            i, j = draw.integers(0, size[0] - 3), draw.integers(0, size[1] - 3)
            mask[i : i + draw.integers(2, 7), j : j + draw.integers(2, 9)] = True
    return torch.from_numpy(masks)


def chi_square(points: Tensor, weight: np.ndarray) -> float:
    """p-value of points against probabilities weight / sum; 0 where one has probability 0."""
    height, width = weight.shape
    place = (points[:, 1] * width + points[:, 0]).long().numpy()
    seen = np.bincount(place, minlength=height * width)
    p = (weight / weight.sum()).ravel()
    if seen[p == 0].any():
        return 0.0
    return float(stats.chisquare(seen[p > 0], len(points) * p[p > 0]).pvalue)


# --- sampling ------------------------------------------------------------------------------------


def region(seed: int, draws: int, *, corrected: bool) -> tuple[Tensor, Tensor | None, Tensor, Any]:
    """The same small mask many times over, its uncertainty, and the certainty in the region."""
    generator = seeded(seed)
    target = torch.rand(5, 7, generator=generator) < 0.5
    predicted = torch.rand(5, 7, generator=generator) < 0.5
    u = torch.rand(5, 7, generator=generator)
    u[0], u[:, 0] = 1, 0
    where = target ^ predicted if corrected else target
    weight = np.where(where.numpy(), 1 - u.numpy().astype(np.float64), 0)
    many = [x.expand(draws, 5, 7) for x in (target, predicted, u)]
    return many[0], many[1] if corrected else None, many[2], weight


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_points_follow_certainty(seed: int, corrected: bool) -> None:
    targets, predictions, u, weight = region(seed, 20000, corrected=corrected)
    options: dict[str, Any] = {"box_share": 0.0, "generator": seeded(seed)}
    prompts = sample_prompts(targets, predictions, uncertainty=u, **options)
    assert chi_square(prompts.points, weight) > FALSE_ALARM
    uniform = sample_prompts(targets, predictions, **options)
    assert chi_square(uniform.points, (weight > 0) * 1.0) < FALSE_ALARM  # the row of certainty 0
    assert chi_square(uniform.points, weight) < FALSE_ALARM, "a uniform sampler is found out"


@pytest.mark.parametrize("corrected", [False, True])
def test_without_uncertainty_points_are_uniform(corrected: bool) -> None:
    targets, predictions, _, _ = region(3, 20000, corrected=corrected)
    where = targets[0] if predictions is None else targets[0] ^ predictions[0]
    got = sample_prompts(targets, predictions, box_share=0.0, generator=seeded(3))
    assert chi_square(got.points, where.numpy().astype(float)) > FALSE_ALARM


def test_first_prompts_are_boxes_half_of_the_time() -> None:
    targets = blobs(0, 1).expand(20000, 12, 17)
    prompts = sample_prompts(targets, generator=seeded(0))
    boxes = int((prompts.labels == -1).sum())
    assert stats.binomtest(boxes, 20000, 0.5).pvalue > FALSE_ALARM
    assert prompts.boxes is not None
    boxed = prompts.labels == -1
    assert not prompts.points[boxed].any()
    assert not prompts.boxes[~boxed].any()
    assert (prompts.labels[~boxed] == 1).all()
    assert (prompts.boxes[boxed, 2] > prompts.boxes[boxed, 0]).all()
    exact = sample_prompts(targets, box_share=1.0, box_noise=0)
    assert same(exact.boxes, masks_to_boxes(targets))
    assert (sample_prompts(targets, box_share=0.0).labels == 1).all()


@given(seed=st.integers(0, 10**6), unsure=st.booleans())
def test_corrections_lie_in_the_error_with_its_sign(seed: int, unsure: bool) -> None:
    targets, predictions = blobs(seed), blobs(seed + 1)
    u = torch.rand(targets.shape, generator=seeded(seed)) if unsure else None
    prompts = sample_prompts(targets, predictions, uncertainty=u, generator=seeded(seed))
    assert prompts.boxes is None
    for n, (x, y) in enumerate(prompts.points.long().tolist()):
        assert targets[n, y, x] != predictions[n, y, x]
        assert int(prompts.labels[n]) == int(targets[n, y, x])


def test_a_generator_repeats_draws() -> None:
    targets, predictions = blobs(1, 40), blobs(2, 40)
    for other in (None, predictions):
        one, two = (sample_prompts(targets, other, generator=seeded(7)) for _ in range(2))
        assert all(same(a, b) for a, b in zip(one[:2], two[:2], strict=True))
        assert not same(one.points, sample_prompts(targets, other, generator=seeded(8)).points)


def test_no_number_picks_a_place_of_weight_zero() -> None:
    weight = torch.tensor([[0.0, 0.0, 2.0, 0.0, 2.0, 0.0]], dtype=torch.float64)
    for number, place in ((0.0, 2), (0.4999, 2), (0.5, 4), (1 - 2.0**-53, 4)):
        assert _pick(weight, torch.tensor([number], dtype=torch.float64)).tolist() == [place]


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, predictions = blobs(3), blobs(4)
    u = torch.rand(targets.shape, generator=seeded(0))
    found = []
    for tile in (1, 50, 10**6):
        monkeypatch.setattr("cpseg.training.prompts._TILE", tile)
        found.append(sample_prompts(targets, predictions, uncertainty=u, generator=seeded(1)))
    assert all(same(one.points, found[0].points) for one in found)


def test_a_large_mask_and_half_precision() -> None:
    """One certain pixel among a million, in each of two masks."""
    targets = torch.ones(2, 1024, 1024, dtype=torch.bool)
    u = torch.ones(2, 1024, 1024)
    u[0, 1000, 3], u[1, 0, 1023] = 0.5, 1 - 2**-11
    for dtype in (torch.float32, torch.float16, torch.float64):
        got = sample_prompts(targets, uncertainty=u.to(dtype), box_share=0.0)
        assert got.points.tolist() == [[3, 1000], [1023, 0]]


# --- the backup, as the published code -----------------------------------------------------------


def test_backup_points() -> None:
    target = blobs(5, 4)
    target[3] = False
    predicted = target.clone()
    predicted[1, 0, 0] = ~target[1, 0, 0]
    u = torch.zeros(target.shape)
    u[2] = 1
    backup = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    corrected = sample_prompts(target, predicted, backup_points=backup)
    assert corrected.points.tolist() == [[1, 2], [0, 0], [5, 6], [7, 8]]
    assert corrected.labels.tolist() == [1, int(target[1, 0, 0]), 1, 1]
    first = sample_prompts(target, uncertainty=u, backup_points=backup, box_share=0.0)
    assert first.points[2:].tolist() == [[5, 6], [7, 8]]
    assert first.labels.tolist() == [1, 1, 1, 1]
    boxes = sample_prompts(target, uncertainty=u, backup_points=backup, box_share=1.0, box_noise=0)
    assert boxes.labels.tolist() == [-1, -1, -1, 1], "a box needs no certain pixel, but a pixel"
    assert boxes.points.tolist() == [[0, 0], [0, 0], [0, 0], [7, 8]]
    assert same(boxes.boxes, masks_to_boxes(target))


@pytest.mark.parametrize("which", ["agreement", "certainty", "target"])
def test_nothing_to_draw_and_no_backup(which: str) -> None:
    targets = blobs(6)
    options: dict[str, Any] = {"box_share": 0.0}
    if which == "agreement":
        options["predictions"] = targets ^ (torch.arange(4) != 2)[:, None, None]
    elif which == "certainty":
        options["uncertainty"] = (torch.arange(4) == 2)[:, None, None].expand(targets.shape).float()
    else:
        targets = targets & (torch.arange(4) != 2)[:, None, None]
        options["box_share"] = 1.0
    with raises(ValueError, "sample_prompts", "backup_points, got none in mask 2; pass backup"):
        sample_prompts(targets, **options)


# --- boxes ---------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.02, 0.2, 0.9]))
def test_boxes_of_masks(seed: int, share: float) -> None:
    masks = torch.rand(3, 6, 9, generator=seeded(seed)) < share
    for box, mask in zip(masks_to_boxes(masks).tolist(), masks.numpy(), strict=True):
        rows, columns = np.nonzero(mask)
        want = [0, 0, 0, 0]
        if len(rows):
            want = [columns.min(), rows.min(), columns.max(), rows.max()]
        assert box == want


def test_jitter_is_sams() -> None:
    """Standard deviation a tenth of the side, at most 20 pixels, both ways and apart."""
    boxes = torch.tensor([[300.0, 400.0, 400.0, 440.0]]).expand(20000, 4)
    shift = jitter_boxes(boxes, (1000, 1000), generator=seeded(0)) - boxes
    assert shift.abs().max() <= 20
    for column, side in zip(shift.T.double(), (100, 40, 100, 40), strict=True):
        edge = 20 / (0.1 * side)
        p = stats.kstest(column[column.abs() < 20] / (0.1 * side), stats.truncnorm(-edge, edge).cdf)
        assert p.pvalue > FALSE_ALARM
    correlation = np.corrcoef(shift.numpy().T)[np.triu_indices(4, 1)]
    assert np.abs(correlation).max() < 5 / math.sqrt(20000)


def test_jittered_boxes_stay_boxes_in_the_image() -> None:
    boxes = torch.rand(2000, 4, generator=seeded(1)) * 30
    got = jitter_boxes(boxes, (20, 31), noise=3.0, generator=seeded(2))
    assert (got[:, :2] <= got[:, 2:]).all()
    assert (got >= 0).all()
    assert (got[:, 0::2] <= 30).all()
    assert (got[:, 1::2] <= 19).all()


# --- evaluation ----------------------------------------------------------------------------------


def depth(mask: np.ndarray) -> np.ndarray:
    """Distance of every pixel to the nearest one outside, by looking at all of them."""
    padded = np.pad(mask, 1)
    outside = np.argwhere(~padded)
    result = np.zeros(padded.shape)
    for i, j in np.argwhere(padded):
        result[i, j] = np.sqrt(((outside - [i, j]) ** 2).sum(1).min())
    return result[1:-1, 1:-1]


@given(seed=st.integers(0, 10**6))
def test_centre_points_equal_brute_force(seed: int) -> None:
    targets, predictions = blobs(seed, 3), blobs(seed + 1, 3)
    predictions[2] = targets[2]
    first, later = centre_point(targets), centre_point(targets, predictions)
    assert first.labels.tolist() == [1, 1, 1]
    assert later.labels[2] == -1
    for n in range(3):
        far = depth(targets[n].numpy())
        y, x = np.unravel_index(far.argmax(), far.shape)
        assert first.points[n].tolist() == [x, y]
    for n in range(2):
        missed = depth((targets[n] & ~predictions[n]).numpy())
        overrun = depth((predictions[n] & ~targets[n]).numpy())
        positive = missed.max() >= overrun.max()
        far = missed if positive else overrun
        if far.max() > 0:
            y, x = np.unravel_index(far.argmax(), far.shape)
            assert later.points[n].tolist() == [x, y]
            assert int(later.labels[n]) == positive


def test_boundary_points_equal_brute_force() -> None:
    targets = blobs(9, 6, (40, 50))
    targets[0, 5:38, 5:45] = True
    for distance in (1.0, 2.5, 10.0):
        points = boundary_point(targets, distance=distance).points
        for n, mask in enumerate(targets.numpy()):
            far = depth(mask)
            near = [(x, y) for y, x in np.argwhere((far > 0) & (far <= distance))]
            assert tuple(points[n].tolist()) == near[(len(near) - 1) // 2]


# --- the task prompt -----------------------------------------------------------------------------


def test_task_prompt_adds_its_vector_everywhere() -> None:
    module = TaskPrompt(3, 4)
    image = torch.rand(2, 4, 5, 6, generator=seeded(0))
    tasks = torch.tensor([2, 0])
    assert same(module(image, tasks), image), "a model starts as it was"
    torch.nn.init.normal_(module.embedding.weight)
    got = module(image, tasks.to(torch.uint8))
    want = image + module.embedding.weight[tasks].detach().reshape(2, 4, 1, 1)
    assert same(got.detach(), want)
    assert module(image.half(), tasks).dtype == torch.float16
    got.sum().backward()
    assert module.embedding.weight.grad is not None
    assert module.embedding.weight.grad[:, 0].tolist() == [30, 0, 30]


# --- errors --------------------------------------------------------------------------------------

MASKS = torch.ones(2, 3, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"targets": MASKS.float()}, TypeError, r"bool targets, got torch\.float32; compare"),
        ({"targets": MASKS[None]}, ValueError, r"targets \[N, H, W\], got \[1, 2, 3, 4\]; flatten"),
        ({"targets": MASKS[:0]}, ValueError, "at least one element in targets"),
        ({"predictions": MASKS[:1]}, ValueError, r"shape of targets \[2, 3, 4\], got \[1, 3, 4\]"),
        ({"predictions": MASKS.to("meta")}, ValueError, "predictions with values, got a tensor on"),
        ({"uncertainty": MASKS[:1].float()}, ValueError, r"shape of targets .* got \[1, 3, 4\]"),
        (
            {"uncertainty": MASKS * 1.5},
            ValueError,
            r"uncertainty in \[0, 1\], got values from 1\.5",
        ),
        ({"uncertainty": MASKS}, TypeError, r"floating-point uncertainty, got torch\.bool"),
        ({"box_share": 2}, ValueError, r"box_share in \[0, 1\], got 2"),
        ({"backup_points": torch.ones(1, 2)}, ValueError, r"backup_points \[2, 2\], got \[1, 2\]"),
    ],
)
def test_prompts_that_cannot_be(changes: dict[str, Any], kind: type[Exception], match: str) -> None:
    with raises(kind, "sample_prompts", match):
        sample_prompts(**{"targets": MASKS, **changes})


def test_evaluation_wants_masks_with_pixels() -> None:
    for function in (centre_point, boundary_point):
        with raises(ValueError, function.__name__, "a pixel in every target, got none in mask 1"):
            function(MASKS & torch.tensor([True, False])[:, None, None])
        with raises(TypeError, function.__name__, "bool targets, got torch.int64"):
            function(MASKS.long())
    with raises(ValueError, "boundary_point", "distance >= 1, got 0"):
        boundary_point(MASKS, distance=0)
    with raises(ValueError, "centre_point", "predictions of the shape of targets"):
        centre_point(MASKS, MASKS[:1])


def test_boxes_that_are_none() -> None:
    with raises(ValueError, "jitter_boxes", r"boxes \[N, 4\], got \[4\]"):
        jitter_boxes(torch.rand(4), (3, 3))
    with raises(TypeError, "jitter_boxes", "floating-point boxes, got torch.int64"):
        jitter_boxes(torch.ones(1, 4, dtype=torch.int64), (3, 3))
    with raises(ValueError, "jitter_boxes", "noise >= 0, got -1; SAM uses 0.1"):
        jitter_boxes(torch.rand(1, 4), (3, 3), noise=-1)


def test_tasks_that_are_none() -> None:
    module, image = TaskPrompt(3, 4), torch.rand(2, 4, 5, 6)
    with raises(ValueError, "TaskPrompt", r"tasks in 0\.\.2, got 3; build"):
        module(image, torch.tensor([0, 3]))
    with raises(ValueError, "TaskPrompt", r"tasks \[2\], got \[1\]"):
        module(image, torch.tensor([0]))
    with raises(ValueError, "TaskPrompt", r"image_embedding \[B, 4, h, w\], got \[2, 3, 5, 6\]"):
        module(image[:, :3], torch.tensor([0, 1]))
    with raises(TypeError, "TaskPrompt", "integer tasks"):
        module(image, torch.tensor([0.0, 1.0]))
    with raises(ValueError, "TaskPrompt", "dim as a whole number >= 1, got 0"):
        TaskPrompt(3, 0)
