"""Weights and learning rates over training time."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.support.helpers import raises

from cpseg import poly_lr, self_reliance_weight


def test_weight_follows_the_formula() -> None:
    for step in range(60, 81):
        want = 0.01 * math.exp(-5 * (step - 60) / 20)
        assert self_reliance_weight(step, 80, start=60) == pytest.approx(want, rel=1e-12)
    got = self_reliance_weight(3, 10, start=1, initial=0.5, decay=2)
    assert got == pytest.approx(0.5 * math.exp(-4 / 9), rel=1e-12)


def test_weight_before_the_stage_is_not_extrapolated() -> None:
    assert [self_reliance_weight(s, 80, start=60) for s in (-1000, 0, 59, 60)] == [0.01] * 4
    assert self_reliance_weight(0, 80, start=79, decay=500) == 0.01


def test_weight_falls_and_stays_in_bounds() -> None:
    weights = [self_reliance_weight(s, 80, start=60, initial=0.25) for s in range(2000)]
    assert all(0 <= w <= 0.25 for w in weights)
    assert weights == sorted(weights, reverse=True)
    assert weights[60] > weights[61] > weights[80] > weights[81]


def test_weight_with_no_decay_or_no_weight() -> None:
    assert self_reliance_weight(70, 80, decay=0) == 0.01
    assert self_reliance_weight(70, 80, initial=0) == 0
    assert self_reliance_weight(0, 80, initial=1) == 1


@pytest.mark.parametrize(
    ("total", "options", "match"),
    [
        (80, {"start": 80}, "total_steps above start, got 80 after start 80; let the stage"),
        (80, {"start": 81}, "got 80 after start 81"),
        (0, {}, "got 0 after start 0"),
        (math.nan, {}, "total_steps as a finite number, got nan"),
        (80, {"initial": 1.01}, r"initial in \[0, 1\], got 1.01"),
        (80, {"initial": -0.01}, r"initial in \[0, 1\], got -0.01"),
        (80, {"initial": math.nan}, r"initial in \[0, 1\], got nan"),
        (80, {"decay": -1}, "decay >= 0, got -1; pass 5.0"),
        (80, {"decay": math.nan}, "decay as a finite number, got nan"),
    ],
)
def test_weight_says_what_is_wrong(total: float, options: dict[str, Any], match: str) -> None:
    with raises(ValueError, "self_reliance_weight", match):
        self_reliance_weight(1, total, **options)


def test_poly_follows_the_formula() -> None:
    for step in range(101):
        want = 0.02 * (1 - step / 100) ** 0.9
        assert poly_lr(step, 100, base_lr=0.02) == pytest.approx(want, rel=1e-12)
    assert poly_lr(25, 100, base_lr=1.0, power=2) == 0.5625
    assert poly_lr(0, 100, base_lr=0.02) == 0.02
    assert poly_lr(100, 100, base_lr=0.02) == 0


def test_poly_is_a_plain_float() -> None:
    assert type(poly_lr(50, 100, base_lr=1, power=1)) is float
    assert type(self_reliance_weight(50, 100)) is float


@pytest.mark.parametrize(
    ("step", "total", "match"),
    [
        (101, 100, r"a step in 0\.\.100, got 101; count steps"),
        (-1, 100, r"a step in 0\.\.100, got -1"),
        (0, 0, r"a step in 0\.\.0, got 0"),
        (math.nan, 100, "got nan"),
    ],
)
def test_poly_says_what_is_wrong(step: float, total: float, match: str) -> None:
    with raises(ValueError, "poly_lr", match):
        poly_lr(step, total, base_lr=0.01)
