"""Weights and rates over training time; steps in any unit (iterations, epochs)."""

from __future__ import annotations

import math

from cpseg._internal.checks import message


def self_reliance_weight(
    step: float,
    total_steps: float,
    *,
    start: float = 0,
    initial: float = 0.01,
    decay: float = 5.0,
) -> float:
    """Weight of the unsupervised loss in the self-reliance stage.

    ``initial * exp(-decay * progress)``, where progress runs from 0 at ``start`` to 1 at
    ``total_steps``. Before ``start`` it is ``initial``: the formula is not extrapolated there.

    Args:
        step: the current step, in the unit of ``total_steps``.
        total_steps: the last step of the stage.
        start: the first step of the stage.
        initial: the weight at ``start``; the paper found 0.01 best, 0.25 and 0.5 worse.
        decay: how many factors of e the weight falls over the stage; the paper does not give it.

    Returns:
        The weight, in [0, ``initial``].

    Raises:
        ValueError: a stage without length, ``initial`` outside [0, 1], a negative ``decay``.

    Reference:
        ConformalSAM (ICCV 2025), eq. 5 and appendix H.

    Example:
        >>> [round(self_reliance_weight(epoch, 80, start=60), 4) for epoch in (0, 60, 70, 80)]
        [0.01, 0.01, 0.0008, 0.0001]
    """
    where = "self_reliance_weight"
    if not total_steps > start:
        got, fix = f"{total_steps} after start {start}", "let the stage end after it starts"
        raise ValueError(message(where, "total_steps above start", got, fix))
    if not 0 <= initial <= 1:
        raise ValueError(message(where, "initial in [0, 1]", str(initial), "the paper uses 0.01"))
    if not decay >= 0:
        raise ValueError(message(where, "decay >= 0", str(decay), "pass 5.0"))
    progress = max(0.0, (step - start) / (total_steps - start))
    return initial * math.exp(-decay * progress)


def poly_lr(step: float, total_steps: float, *, base_lr: float, power: float = 0.9) -> float:
    """Polynomial learning rate, ``base_lr * (1 - step / total_steps) ** power``.

    Args:
        step: the current step, from 0 to ``total_steps``.
        total_steps: the step at which the rate reaches 0.
        base_lr: the rate at step 0.
        power: the exponent.

    Returns:
        The learning rate.

    Raises:
        ValueError: ``step`` outside 0..``total_steps``.

    Reference:
        Chen et al. (2017), DeepLab; the schedule of the ConformalSAM experiments.

    Example:
        >>> poly_lr(0, 100, base_lr=0.001), poly_lr(100, 100, base_lr=0.001)
        (0.001, 0.0)
    """
    if not (total_steps > 0 and 0 <= step <= total_steps):
        expected, fix = f"a step in 0..{total_steps}", "count steps in the unit of total_steps"
        raise ValueError(message("poly_lr", expected, str(step), fix))
    return float(base_lr * (1 - step / total_steps) ** power)
