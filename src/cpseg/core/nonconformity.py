"""From probabilities (and labels) to nonconformity scores: larger is stranger.

Four of them: LAC looks at the candidate class alone; APS and RAPS at the mass of the classes that
the model prefers to it; the margin at its best rival.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cpseg._internal.checks import (
    check_generator,
    check_ignore_index,
    check_label_values,
    check_labels,
    check_probs,
    is_compiling,
    is_number,
    message,
    short,
)

SCORES = ("lac", "aps", "raps", "margin")
_RAPS = (0.01, 5)  # penalty and free ranks where "raps" stands alone, the paper's for ImageNet
_MOST_PENALTY, _MOST_RANKS = 2.0**20, 2**20  # of RAPS: far beyond use, and float32 holds them
_TILE = 2**20  # probabilities that a step of a sorting score holds


def check_score(where: str, score: str) -> None:
    """A score that this version knows."""
    _parse(where, score)


def score_range(score: str, num_classes: int) -> tuple[float, float]:
    """Least and largest value that a score can take with K classes."""
    name, penalty, free = _parse("score_range", score)
    if name == "margin":
        return -1.0, 1.0
    most = penalty * max(0, num_classes - free)
    return 0.0, 1.0 if most == 0 else (1 + most) * (1 + 2.0**-20)  # room for float32 rounding


def nonconformity(
    probs: Tensor,
    labels: Tensor,
    *,
    score: str = "lac",
    ignore_index: int = 255,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Nonconformity of the true class.

    - ``"lac"``: ``1 - p_y``.
    - ``"aps"``: the mass of the classes ranked before y plus ``u p_y``, on scores divided by their
      sum, so that it fits models whose scores do not sum to 1. ``u`` is 1 without a generator
      (deterministic) and uniform for each pixel with one (randomised). Ties rank by index; where
      all scores are 0 every class gets 1.
    - ``"raps"``: APS plus ``penalty * max(0, rank - free)``, ranks from 1. ``"raps"`` means
      ``"raps:0.01:5"``, which is ``"raps:penalty:free"``.
    - ``"margin"``: ``max_{k != y} p_k - p_y``, from -1 to 1.

    Args:
        probs: probabilities in [0, 1], float, ``[B, K, H, W]`` or ``[K, H, W]``; they need not
            sum to 1. Half precision is scored in float32.
        labels: true classes, any integer dtype, ``[B, H, W]`` or ``[H, W]``.
        score: the score's name.
        ignore_index: the label of void pixels.
        generator: draws ``u`` of the randomised APS and RAPS, on the device of ``probs``.

    Returns:
        float32 ``[B, H, W]`` or ``[H, W]``, NaN where the pixel is void.

    Raises:
        ValueError: shapes or devices do not belong together, a label is neither a class nor void,
            an unknown score, a generator for a score without randomness.
        TypeError: ``probs`` is not floating point or ``labels`` not integer.

    Reference:
        LAC: ConformalSAM (ICCV 2025), eq. 3; Sadinle, Lei & Wasserman (2019). APS: Romano, Sesia &
        Candès (2020). RAPS: Angelopoulos et al. (2021), eq. 4. Margin: Johansson et al. (2017).

    Example:
        >>> probs = torch.tensor([0.75, 0.25]).reshape(1, 2, 1, 1).expand(1, 2, 1, 3)
        >>> nonconformity(probs, torch.tensor([[[0, 1, 255]]]))
        tensor([[[0.2500, 0.7500,    nan]]])
        >>> nonconformity(probs, torch.tensor([[[0, 1, 255]]]), score="aps")
        tensor([[[0.7500, 1.0000,    nan]]])
    """
    where = "nonconformity"
    check_score(where, score)
    check_probs(where, probs)
    check_labels(where, labels, probs)
    check_ignore_index(where, ignore_index, probs.shape[-3])
    check_drawing(where, score, probs, generator)
    return nonconformity_unchecked(where, probs, labels, ignore_index, score, generator)


def nonconformity_unchecked(
    where: str,
    probs: Tensor,
    labels: Tensor,
    ignore_index: int,
    score: str = "lac",
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`nonconformity` without the checks on shapes; ``where`` names the caller."""
    found, void = scores_and_void(where, probs, labels, ignore_index, score, generator)
    return found if void is None else found.masked_fill_(void, torch.nan)


def scores_and_void(
    where: str,
    probs: Tensor,
    labels: Tensor,
    ignore_index: int,
    score: str,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor | None]:
    """Scores before they are NaN where the pixel is void, and where it is; None if nowhere."""
    if _all_classes(labels, probs):
        return _of_class(probs, labels.to(torch.int64), score, generator), None
    labels = labels.to(torch.int64)
    void = labels == ignore_index
    index = torch.where(void, 0, labels)
    try:
        found = _of_class(probs, index, score, generator)
    except RuntimeError:  # an index out of range: say which label it was
        check_label_values(where, labels, probs.shape[-3], ignore_index)
        raise
    return found, void


def _all_classes(labels: Tensor, probs: Tensor) -> bool:
    """Where a look at the values is free: no pixel is void, so that no mask is needed."""
    if probs.device.type != "cpu" or is_compiling() or labels.numel() == 0:
        return False
    low, high = labels.aminmax()
    return int(low) >= 0 and int(high) < probs.shape[-3]


def _of_class(
    probs: Tensor, labels: Tensor, score: str, generator: torch.Generator | None
) -> Tensor:
    """The score of one class a pixel, float32."""
    index = labels.unsqueeze(-3)
    if score == "lac":
        return probs.gather(-3, index).squeeze(-3).to(torch.float32).neg_().add_(1)  # 1 - p
    uniform = _uniform(probs, generator)
    parts = [
        _all_scores(probs[..., rows, :], score, None if uniform is None else uniform[..., rows, :])
        .gather(-3, index[..., rows, :])
        .squeeze(-3)
        for rows in _rows(probs)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def nonconformity_map(
    probs: Tensor, *, score: str = "lac", generator: torch.Generator | None = None
) -> Tensor:
    """The same nonconformity score for every candidate class; LAC is ``1 - p``.

    Args:
        probs: probabilities in [0, 1], float, ``[B, K, H, W]`` or ``[K, H, W]``.
        score: ``"lac"``, ``"aps"``, ``"raps"`` or ``"margin"``, see :func:`nonconformity`.
        generator: draws ``u`` of the randomised APS and RAPS, one per pixel.

    Returns:
        float32, the shape of ``probs``. Gathered at the labels it is :func:`nonconformity`, bit
        for bit, with a generator in the same state.

    Raises:
        ValueError: wrong rank, an unknown score, a generator for a score without randomness.
        TypeError: ``probs`` is not floating point.

    Reference:
        ConformalSAM (ICCV 2025), the inverse prediction map of section 3.3.1.

    Example:
        >>> nonconformity_map(torch.tensor([0.75, 0.25]).reshape(2, 1, 1)).flatten()
        tensor([0.2500, 0.7500])
    """
    check_score("nonconformity_map", score)
    check_probs("nonconformity_map", probs)
    check_drawing("nonconformity_map", score, probs, generator)
    return nonconformity_map_unchecked(probs, score, generator)


class_scores = nonconformity_map  # its name up to version 0.1, which elsewhere means probabilities


def nonconformity_map_unchecked(
    probs: Tensor, score: str, generator: torch.Generator | None
) -> Tensor:
    """:func:`nonconformity_map` without the checks."""
    if score == "lac":
        return 1 - probs.to(torch.float32)
    uniform = _uniform(probs, generator)
    if is_compiling():
        return _all_scores(probs, score, uniform)
    out = torch.empty(probs.shape, device=probs.device)
    for rows in _rows(probs):
        part = None if uniform is None else uniform[..., rows, :]
        out[..., rows, :] = _all_scores(probs[..., rows, :], score, part)
    return out


def _all_scores(probs: Tensor, score: str, uniform: Tensor | None) -> Tensor:
    name, penalty, free = _parse("score", score)
    p = probs.to(torch.float32)
    if name == "margin":
        best = p.topk(2, dim=-3).values
        first, second = best.narrow(-3, 0, 1), best.narrow(-3, 1, 1)
        return torch.where(p >= first, second, first) - p
    ordered, order = p.sort(dim=-3, descending=True, stable=True)
    mass = ordered.cumsum(-3)
    total = mass.narrow(-3, mass.shape[-3] - 1, 1)
    if uniform is not None:
        before = torch.cat([torch.zeros_like(total), mass.narrow(-3, 0, mass.shape[-3] - 1)], -3)
        mass = before + uniform * ordered
    # A parallel sum may overtake its own end by a rounding: the share of all mass is 1.
    value = torch.where(total == 0, 1.0, mass / total).clamp(max=1)
    if name not in ("aps", "raps"):
        raise NotImplementedError(f"the score {name!r} is listed but not computed")
    if name == "raps":
        rank = torch.arange(1, p.shape[-3] + 1, device=p.device).reshape(-1, 1, 1)
        value = value + penalty * (rank - free).clamp(min=0)
    return torch.empty_like(value).scatter_(-3, order, value)


def _uniform(probs: Tensor, generator: torch.Generator | None) -> Tensor | None:
    """One uniform number per pixel, the same for all of its classes."""
    if generator is None:
        return None
    shape = (*probs.shape[:-3], 1, *probs.shape[-2:])
    return torch.rand(shape, generator=generator, device=probs.device)


def _rows(probs: Tensor) -> Iterator[slice]:
    """Slices of the rows that hold few probabilities each; one where they are traced."""
    height = probs.shape[-2]
    step = height if is_compiling() else max(1, _TILE * height // max(1, probs.numel()))
    return (slice(start, start + step) for start in range(0, height, step))


def check_drawing(where: str, score: str, probs: Tensor, generator: torch.Generator | None) -> None:
    """A score fits the classes, and a generator fits the score."""
    name = _parse(where, score)[0]
    if name == "margin" and probs.shape[-3] == 1:
        raise ValueError(message(where, "at least 2 classes for a margin", "1", "use 'lac'"))
    check_generator(where, generator, probs.device)
    if generator is not None and name not in ("aps", "raps"):
        expected, got = "no generator: only aps and raps are randomised", f"one for {score!r}"
        raise ValueError(message(where, expected, got, "leave it out"))


def _parse(where: str, score: str) -> tuple[str, float, int]:
    """Name, penalty and free ranks (0 and 0 for all but RAPS)."""
    if isinstance(score, str):
        if score == "raps":
            return score, *_RAPS
        if score in SCORES:
            return score, 0.0, 0
        name, *numbers = score.split(":")
        if name == "raps" and len(numbers) == 2:
            try:
                penalty, free = float(numbers[0]), int(numbers[1])
            except ValueError:
                penalty, free = -1.0, 0
            if is_number(penalty, 0, _MOST_PENALTY) and 0 <= free <= _MOST_RANKS:
                return name, penalty, free
    names = ", ".join(repr(name) for name in SCORES)
    expected = f"a score among {names} or 'raps:PENALTY:FREE'"
    raise ValueError(message(where, expected, short(score), "choose one, such as 'raps:0.01:5'"))
