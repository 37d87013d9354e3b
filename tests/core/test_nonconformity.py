"""Nonconformity: values, dtypes, void, gradients, errors."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import oracles
from tests.support.helpers import FLOATS, INTEGERS, exact, raises, same, seeded
from torch import Tensor

import cpseg
from cpseg import nonconformity, nonconformity_map


def case(dtype: torch.dtype = torch.float32, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    probs = torch.rand(2, num_classes, 3, 5, generator=seeded(1)).to(dtype)
    labels = torch.randint(num_classes, (2, 3, 5), generator=seeded(2))
    return probs, labels


@pytest.mark.parametrize("dtype", FLOATS)
def test_score_is_one_minus_the_true_class_in_float32(dtype: torch.dtype) -> None:
    probs, labels = case(dtype)
    labels[0, 1, 2] = labels[1, 2, 4] = 255
    want = [oracles.score_map(exact(p), y.numpy(), 255) for p, y in zip(probs, labels, strict=True)]
    assert same(nonconformity(probs, labels), np.stack(want))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_every_integer_dtype(dtype: torch.dtype) -> None:
    probs, labels = case()
    void = 255 if dtype == torch.uint8 else 100
    labels[0, 0, 0] = void
    want = nonconformity(probs, labels, ignore_index=void)
    assert want.isnan().sum() == 1
    assert same(nonconformity(probs, labels.to(dtype), ignore_index=void), want)


def test_one_image_without_a_batch_axis() -> None:
    probs, labels = case()
    assert same(nonconformity(probs[0], labels[0]), nonconformity(probs, labels)[0])
    assert same(nonconformity_map(probs[0]), nonconformity_map(probs)[0])


def test_a_listed_score_that_is_not_computed_is_no_other_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["cpseg.core.nonconformity"]
    monkeypatch.setattr(module, "SCORES", ("lac", "new"))
    with pytest.raises(NotImplementedError, match="'new' is listed but not computed"):
        nonconformity_map(torch.rand(3, 2, 2), score="new")


def test_the_old_name_of_the_map_is_an_alias() -> None:
    assert cpseg.class_scores is cpseg.nonconformity_map


@pytest.mark.parametrize("dtype", FLOATS)
def test_class_scores_at_the_true_class_are_the_nonconformity(dtype: torch.dtype) -> None:
    probs, labels = case(dtype)
    scores = nonconformity_map(probs)
    assert scores.shape == probs.shape
    assert scores.dtype == torch.float32
    assert same(scores.gather(1, labels[:, None])[:, 0], nonconformity(probs, labels))


def test_ends_of_the_unit_interval_are_exact() -> None:
    probs = torch.tensor([0.0, 1.0]).reshape(2, 1, 1)
    assert nonconformity_map(probs).flatten().tolist() == [1.0, 0.0]


def test_scores_need_not_sum_to_one() -> None:
    probs = torch.full((3, 1, 1), 0.75)
    assert nonconformity_map(probs).flatten().tolist() == [0.25] * 3


def test_a_single_class_works() -> None:
    probs = torch.tensor([[[0.25, 0.75]]])
    assert nonconformity(probs, torch.tensor([[0, 255]])).nan_to_num(9).tolist() == [[0.75, 9.0]]


def test_strided_and_expanded_inputs() -> None:
    probs, labels = case()
    strided = probs.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not strided.is_contiguous()
    assert same(nonconformity(strided, labels), nonconformity(probs, labels))
    expanded = probs[:1].expand(2, -1, -1, -1)
    want = nonconformity(torch.cat([probs[:1], probs[:1]]), labels)
    assert same(nonconformity(expanded, labels), want)


def test_inputs_stay_as_they_are() -> None:
    probs, labels = case()
    labels[0, 0, 0] = 255
    before = probs.clone(), labels.clone()
    nonconformity(probs, labels)
    assert same(probs, before[0])
    assert same(labels, before[1])


def test_the_score_is_differentiable_and_void_gives_no_gradient() -> None:
    probs, labels = case()
    labels[1, 0, 3] = 255
    probs.requires_grad_()
    scores = nonconformity(probs, labels)
    torch.where(labels == 255, 0.0, scores).sum().backward()
    want = torch.zeros_like(probs)
    want.scatter_(1, labels.masked_fill(labels == 255, 0)[:, None], -1.0)
    want[1, :, 0, 3] = 0.0
    assert probs.grad is not None
    assert same(probs.grad, want)


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"probs": [[0.5]]}, TypeError, "probs as a tensor, got list"),
        ({"probs": torch.ones(2, 4, 3, 5, dtype=torch.uint8)}, TypeError, "uint8; divide"),
        ({"probs": torch.rand(3, 5)}, ValueError, r"\[K, H, W\], got \[3, 5\]"),
        ({"probs": torch.rand(1, 2, 4, 3, 5)}, ValueError, r"got \[1, 2, 4, 3, 5\]"),
        ({"probs": torch.rand(0, 4, 3, 5)}, ValueError, r"at least one element in probs"),
        ({"probs": torch.rand(2, 0, 3, 5)}, ValueError, r"at least one element in probs"),
        ({"labels": [[0]]}, TypeError, "labels as a tensor, got list"),
        ({"labels": torch.zeros(2, 3, 5)}, TypeError, r"integer labels, got torch\.float32"),
        ({"labels": torch.zeros(2, 3, 5).bool()}, TypeError, r"integer labels, got torch\.bool"),
        (
            {"labels": torch.zeros(2, 5, 3, dtype=torch.uint8)},
            ValueError,
            r"labels \[2, 3, 5\] for probs \[2, 4, 3, 5\], got \[2, 5, 3\]; resize the labels",
        ),
        ({"labels": torch.zeros(1, 3, 5, dtype=torch.uint8)}, ValueError, r"got \[1, 3, 5\]"),
        ({"labels": torch.zeros(3, 5, dtype=torch.uint8)}, ValueError, r"got \[3, 5\]"),
        (
            {"labels": torch.zeros(2, 3, 5, dtype=torch.uint8, device="meta")},
            ValueError,
            r"labels on the device of probs \(cpu\), got meta; move one",
        ),
        ({"labels": torch.full((2, 3, 5), 254)}, ValueError, r"0\.\.3 or 255 .*, got 254; map"),
        ({"labels": torch.full((2, 3, 5), 4)}, ValueError, "got 4; map other values"),
        ({"labels": torch.full((2, 3, 5), -1)}, ValueError, "got -1; map other values"),
        ({"labels": torch.full((2, 3, 5), -1).to(torch.int8)}, ValueError, "got -1; map"),
        ({"ignore_index": 3}, ValueError, r"outside the classes 0\.\.3, got 3; pass"),
        ({"ignore_index": 0}, ValueError, "got 0; pass ignore_index=-1"),
        ({"score": "topk"}, ValueError, "a score among 'lac', .* got 'topk'; choose one"),
    ],
)
def test_nonconformity_says_what_is_wrong(
    changes: dict[str, Any], kind: type[Exception], match: str
) -> None:
    probs, labels = case()
    with raises(kind, "nonconformity", match):
        nonconformity(**{"probs": probs, "labels": labels, **changes})


@pytest.mark.parametrize(
    ("probs", "options", "kind", "match"),
    [
        (torch.ones(2, 3, 4, dtype=torch.int64), {}, TypeError, "floating-point probs"),
        (0.5, {}, TypeError, "got float; convert"),
        (torch.rand(3), {}, ValueError, r"got \[3\]"),
        (torch.rand(2, 3, 0), {}, ValueError, "skip empty batches"),
        (torch.rand(2, 3, 4), {"score": "topk"}, ValueError, "got 'topk'; choose one"),
    ],
)
def test_class_scores_says_what_is_wrong(
    probs: Any, options: dict[str, str], kind: type[Exception], match: str
) -> None:
    with raises(kind, "nonconformity_map", match):
        nonconformity_map(probs, **options)


def test_classes_beyond_255_need_another_void() -> None:
    probs = torch.rand(1, 300, 2, 2, generator=seeded(0))
    labels = torch.tensor([[[299, 255], [0, -1]]])
    with raises(ValueError, "nonconformity", r"outside the classes 0\.\.299, got 255"):
        nonconformity(probs, labels)
    scores = nonconformity(probs, labels, ignore_index=-1)
    assert scores[0, 0, 1] == 1 - probs[0, 255, 0, 1]
    assert scores.isnan().flatten().tolist() == [False, False, False, True]
