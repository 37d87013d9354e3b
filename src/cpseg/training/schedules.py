"""Loss weight and learning rate as functions of the step, in any unit (iterations, epochs)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from cpseg._internal.checks import check_share, is_number, message, short


def self_reliance_weight(
    step: float,
    total_steps: float,
    *,
    start: float = 0,
    initial: float = 0.01,
    decay: float = 5.0,
) -> float:
    """Weight of the unsupervised loss in the self-reliance stage.

    It is ``initial * exp(-decay * progress)``, where progress grows from 0 at ``start`` to 1 at
    ``total_steps``. Before ``start`` it is ``initial``: the formula is not extrapolated.

    Args:
        step: the current step, in the unit of ``total_steps``.
        total_steps: the last step of the stage.
        start: the first step of the stage.
        initial: the weight at ``start``; in the paper 0.01 was best, 0.25 and 0.5 were worse.
        decay: the weight falls by the factor exp(-decay) over the stage; the paper gives no value.

    Returns:
        The weight, in [0, ``initial``].

    Raises:
        ValueError: ``total_steps`` is not above ``start``, ``initial`` lies outside [0, 1], or
            ``decay`` is negative.

    Reference:
        ConformalSAM (ICCV 2025), eq. 5 and appendix H.

    Example:
        >>> [round(self_reliance_weight(epoch, 80, start=60), 4) for epoch in (0, 60, 70, 80)]
        [0.01, 0.01, 0.0008, 0.0001]
    """
    where = "self_reliance_weight"
    steps = {"step": step, "total_steps": total_steps, "start": start}
    _check_numbers(where, {**steps, "decay": decay})
    if not total_steps > start:
        got, fix = f"{total_steps} after start {start}", "let the stage end after it starts"
        raise ValueError(message(where, "total_steps above start", got, fix))
    check_share(where, initial, name="initial", fix="the paper uses 0.01")
    if decay < 0:
        raise ValueError(message(where, "decay >= 0", str(decay), "pass 5.0"))
    progress = max(0.0, (step - start) / (total_steps - start))
    return initial * math.exp(-decay * progress)


def poly_lr(step: float, total_steps: float, *, base_lr: float, power: float = 0.9) -> float:
    """Polynomial learning rate, ``base_lr * (1 - step / total_steps) ** power``.

    The same schedule as ``torch.optim.lr_scheduler.PolynomialLR``, as a function of the step: a
    resumed loop needs no scheduler state, and steps may be fractions of an epoch.

    Args:
        step: the current step, from 0 to ``total_steps``.
        total_steps: the step at which the learning rate reaches 0.
        base_lr: the learning rate at step 0.
        power: the exponent.

    Returns:
        The learning rate.

    Raises:
        ValueError: ``step`` outside 0..``total_steps``, a negative ``power``, or what is no number.

    Reference:
        Chen et al. (2017), DeepLab; the schedule of the ConformalSAM experiments.

    Example:
        >>> poly_lr(0, 100, base_lr=0.001), poly_lr(100, 100, base_lr=0.001)
        (0.001, 0.0)
    """
    where = "poly_lr"
    numbers = {"step": step, "total_steps": total_steps, "base_lr": base_lr, "power": power}
    _check_numbers(where, numbers)
    if not (total_steps > 0 and 0 <= step <= total_steps):
        expected, fix = f"a step in 0..{total_steps}", "count steps in the unit of total_steps"
        raise ValueError(message(where, expected, str(step), fix))
    if power < 0:
        raise ValueError(message(where, "power >= 0", str(power), "the papers use 0.9"))
    return float(base_lr * (1 - step / total_steps) ** power)


def _check_numbers(where: str, numbers: Mapping[str, object]) -> None:
    for name, number in numbers.items():
        if not is_number(number):
            fix = "pass an int or a float"
            raise ValueError(message(where, f"{name} as a finite number", short(number), fix))
