"""The convex fit behind a recalibration: a multinomial map of log probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpseg._internal import words

METHODS = words.RECALIBRATIONS

STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # candidates, strongest first
FINE_STRENGTHS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)  # with several sources
DEFAULT_STRENGTH = 1e-2  # where there is one image, which leaves nothing to choose by
TEMPERATURE_STRENGTH = 1e-5  # one parameter: only keeps it finite where the scores separate
# Lower bound on the standard deviation used for scaling: near-constant features would otherwise
# get huge weights that extrapolate badly.
_LEAST_SPREAD = 0.3


class Pixels(NamedTuple):
    """Labelled pixels to fit on.

    Attributes:
        features: float32 ``[n, F]``.
        labels: int64 ``[n]``, in 0..K-1.
        weights: float64 ``[n]``, sum 1 over every image.
        image: int64 ``[n]``, the image that the pixel is of, from 0.
    """

    features: Tensor
    labels: Tensor
    weights: Tensor
    image: Tensor

    def where(self, chosen: Tensor) -> Pixels:
        """Some of the pixels."""
        return Pixels(*(part[chosen] for part in self))


class Map(NamedTuple):
    """``z = weight f + bias``, float64 ``[K, F]`` and ``[K]``."""

    weight: Tensor
    bias: Tensor

    def losses(self, pixels: Pixels) -> Tensor:
        """Negative log likelihood of every pixel, float64."""
        z = torch.addmm(self.bias.float(), pixels.features, self.weight.float().T)
        found = z.log_softmax(1).gather(1, pixels.labels.unsqueeze(1)).squeeze(1)
        return -found.to(torch.float64)


def fit_map(
    pixels: Pixels,
    base: Map,
    method: str,
    strength: float,
    *,
    own: int,
    start: Map | None = None,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-13,
) -> Map:
    """Minimise mean negative log likelihood plus ``strength`` times the penalty.

    With features centred at their weighted mean and divided by their weighted standard deviation
    s_j (at least 0.3), the map is ``base + D`` and the penalty is the sum of D's squares, the
    intercepts' (at the mean features) among them: ``sum_kj (s_j (W_kj - base_kj))²``.
    ``"dirichlet"`` fits all of D, ``"vector"`` the entries where the base has one, the intercepts
    and the context, ``"temperature"`` D as a multiple of the base.

    Args:
        pixels: what to fit on.
        base: the map to shrink to.
        method: ``"temperature"``, ``"vector"`` or ``"dirichlet"``.
        strength: weight of the penalty.
        own: how many of the columns are of the pixel's own scores; the others are context.
        start: a map to start from, by default the base.
        dtype: of the products; sums are always float64.
        tolerance: relative decrease of the objective below which the search ends.

    Returns:
        The map, float64.

    Reference:
        Kull et al. (2019), Beyond temperature scaling, section 4: Dirichlet calibration with
        off-diagonal and intercept regularisation. Here the diagonal is shrunk too, to its base.
    """
    from scipy.optimize import minimize

    shares = pixels.weights / pixels.weights.sum()
    x, scale, mean = _standardised(pixels.features, shares, dtype)
    origin = _scaled(base, scale, mean)
    if method == "temperature":
        strength = TEMPERATURE_STRENGTH
    coordinates = _coordinates(method, origin, _free(base, own), x, shares, strength)
    rows, labels = torch.arange(len(x)), pixels.labels
    weights = shares.to(dtype).unsqueeze(1)

    def objective(theta: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        step = coordinates.apart(torch.from_numpy(theta))
        log_p = torch.mm(x, (origin + step).to(dtype).T).log_softmax(1)
        loss = -(log_p[rows, labels].to(torch.float64) @ shares)
        slope = log_p.exp_()
        slope[rows, labels] -= 1
        gradient = torch.mm((slope * weights).T, x).to(torch.float64) + 2 * strength * step
        value = loss + strength * step.square().sum()
        return float(value), coordinates.gather(gradient).numpy()

    first = torch.zeros_like(origin) if start is None else _scaled(start, scale, mean) - origin
    found = minimize(
        objective,
        coordinates.together(first).numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 1000, "maxcor": 20, "ftol": tolerance, "gtol": 1e-7},
    )
    fitted = origin + coordinates.apart(torch.from_numpy(found.x))
    weight = fitted[:, :-1] / scale
    return Map(weight, fitted[:, -1] - weight @ mean)


def _standardised(
    features: Tensor, shares: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Centred and scaled features with a column of ones, the scales and the means."""
    mean = shares @ features.to(torch.float64)
    centred = features.to(dtype) - mean.to(dtype)
    scale = (shares @ centred.to(torch.float64).square()).sqrt().clamp(min=_LEAST_SPREAD)
    x = torch.cat([centred / scale.to(dtype), torch.ones(len(features), 1, dtype=dtype)], 1)
    return x, scale, mean


def _scaled(plain: Map, scale: Tensor, mean: Tensor) -> Tensor:
    """A map in standardised coordinates, ``[K, F + 1]``."""
    return torch.cat([plain.weight * scale, (plain.bias + plain.weight @ mean).unsqueeze(1)], 1)


def _free(base: Map, own: int) -> Tensor:
    """Bool ``[K, F + 1]``: what a vector map fits."""
    free = torch.ones(base.weight.shape[0], base.weight.shape[1] + 1, dtype=torch.bool)
    free[:, :own] = base.weight[:, :own] != 0
    return free


class _Coordinates(NamedTuple):
    """A linear way to write the step D ``[K, F + 1]`` as a flat vector."""

    shape: torch.Size
    direction: Tensor | None  # temperature: D is a multiple of it
    mask: Tensor | None  # vector: which entries are free
    factor: Tensor | None  # dirichlet: lower triangular, D = theta factor^-1

    def apart(self, theta: Tensor) -> Tensor:
        """The step written as this vector."""
        if self.direction is not None:
            return theta * self.direction
        step = theta.reshape(self.shape)
        if self.factor is not None:
            found: Tensor = torch.linalg.solve_triangular(
                self.factor, step, upper=False, left=False
            )
            return found
        assert self.mask is not None
        return step * self.mask

    def together(self, step: Tensor) -> Tensor:
        """The vector of a step that can be written so."""
        if self.direction is not None:
            square = self.direction.square().sum()
            return ((step * self.direction).sum() / square).reshape(1)
        return (step if self.factor is None else step @ self.factor).flatten()

    def gather(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to the vector: the transpose of :meth:`apart`."""
        if self.direction is not None:
            return (gradient * self.direction).sum().reshape(1)
        if self.factor is not None:
            solved: Tensor = torch.linalg.solve_triangular(
                self.factor.T, gradient, upper=True, left=False
            )
            return solved.flatten()
        assert self.mask is not None
        return (gradient * self.mask).flatten()


def _coordinates(
    method: str, origin: Tensor, free: Tensor, x: Tensor, shares: Tensor, strength: float
) -> _Coordinates:
    if method == "temperature":
        return _Coordinates(origin.shape, origin, None, None)
    if method == "vector":
        return _Coordinates(origin.shape, None, free, None)
    # Half the features' second moments bound the Hessian (Böhning 1992): in these coordinates it
    # lies between strength and about 1, and the search takes tens of steps, not thousands.
    moments = 0.5 * torch.mm((x * shares.to(x.dtype).unsqueeze(1)).T, x).to(torch.float64)
    bound = moments + (2 * strength + 1e-6) * torch.eye(len(moments), dtype=torch.float64)
    return _Coordinates(origin.shape, None, None, torch.linalg.cholesky(bound))


def fold_losses(
    pixels: Pixels, base: Map, method: str, strengths: Sequence[float], *, own: int, folds: int
) -> Iterator[tuple[float, Tensor]]:
    """Mean loss of every fold's images under a map fitted on the others, for every strength.

    Args:
        pixels: images numbered from 0; image i lies in fold i modulo ``folds``.
        base: the map to shrink to.
        method: as in :func:`fit_map`.
        strengths: from strong to weak, so that each fit starts from the one before.
        own: as in :func:`fit_map`.
        folds: at most the number of images.

    Yields:
        Strength, and float64 ``[folds]``.
    """
    fold = pixels.image % folds
    parts = [(pixels.where(fold != k), pixels.where(fold == k)) for k in range(folds)]
    fitted: list[Map | None] = [None] * folds
    for strength in strengths:
        losses = []
        for k, (rest, held) in enumerate(parts):
            fitted[k] = made = fit_map(
                rest,
                base,
                method,
                strength,
                own=own,
                start=fitted[k],
                dtype=torch.float32,
                tolerance=1e-5,
            )
            losses.append(made.losses(held) @ held.weights / held.weights.sum())
        yield strength, torch.stack(losses)
