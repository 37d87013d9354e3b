"""The convex fit behind a recalibration: a multinomial map of log probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpseg._internal import words
from cpseg._internal.threads import in_order, one_thread

METHODS = words.RECALIBRATIONS

STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # candidates, strongest first
FINE_STRENGTHS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)  # with several sources
DEFAULT_STRENGTH = 1e-2  # where there is one image, which leaves nothing to choose by
TEMPERATURE_STRENGTH = 1e-5  # one parameter: only keeps it finite where the scores separate
# Lower bound on the standard deviation used for scaling: near-constant features would otherwise
# get huge weights that extrapolate badly.
_LEAST_SPREAD = 0.3
_TILE = 4096  # pixels whose scores are made at once: they stay in the cache


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
    objective = _Objective(x, pixels.labels, shares, origin, strength, coordinates)
    first = torch.zeros_like(origin) if start is None else _scaled(start, scale, mean) - origin
    with one_thread():  # several would mostly wait for each other in products as small as these
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


class _Objective:
    """The penalised loss of a map, and its gradient, as a function of the coordinates.

    The part of the loss that is linear in the map, and so its gradient, is summed once; for every
    map a pass over tiles of pixels makes the rest. Probabilities are class first, so that sums over
    classes run along pixels.
    """

    def __init__(
        self,
        x: Tensor,
        labels: Tensor,
        shares: Tensor,
        origin: Tensor,
        strength: float,
        coordinates: _Coordinates,
    ) -> None:
        self._dtype = x.dtype
        tiles = zip(torch.split(x, _TILE), torch.split(shares, _TILE), strict=True)
        self._tiles = [(tile, part, part.to(x.dtype)) for tile, part in tiles]
        self._origin, self._strength, self._coordinates = origin, strength, coordinates
        self._of_labels = torch.zeros_like(origin).index_add_(
            0, labels, x.to(torch.float64) * shares.unsqueeze(1)
        )

    def __call__(self, theta: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        step = self._coordinates.apart(torch.from_numpy(theta))
        scores = self._origin + step
        loss = -(scores * self._of_labels).sum()
        gradient = torch.zeros_like(scores)
        weight = scores.to(self._dtype)
        for x, shares, weights in self._tiles:
            z = torch.mm(weight, x.T)
            top = z.amax(0)
            total = z.sub_(top).exp_().sum(0)
            loss += total.log().add_(top).to(torch.float64) @ shares
            gradient += torch.mm(z.mul_(weights / total), x)
        gradient += 2 * self._strength * step - self._of_labels
        value = loss + self._strength * step.square().sum()
        return float(value), self._coordinates.gather(gradient).numpy()


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
    factors: tuple[Tensor, Tensor] | None  # dirichlet: L and its inverse, D = theta L^-1

    def apart(self, theta: Tensor) -> Tensor:
        """The step written as this vector."""
        if self.direction is not None:
            return theta * self.direction
        step = theta.reshape(self.shape)
        if self.factors is not None:
            return step @ self.factors[1]
        assert self.mask is not None
        return step * self.mask

    def together(self, step: Tensor) -> Tensor:
        """The vector of a step that can be written so."""
        if self.direction is not None:
            square = self.direction.square().sum()
            return ((step * self.direction).sum() / square).reshape(1)
        return (step if self.factors is None else step @ self.factors[0]).flatten()

    def gather(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to the vector: the transpose of :meth:`apart`."""
        if self.direction is not None:
            return (gradient * self.direction).sum().reshape(1)
        if self.factors is not None:
            return (gradient @ self.factors[1].T).flatten()
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
    one = torch.eye(len(moments), dtype=torch.float64)
    lower = torch.linalg.cholesky(moments + (2 * strength + 1e-6) * one)
    inverse = torch.linalg.solve_triangular(lower, one, upper=False)
    return _Coordinates(origin.shape, None, None, (lower, inverse))


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

    def loss(k: int) -> Tensor:
        rest, held = parts[k]
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
        return made.losses(held) @ held.weights / held.weights.sum()

    workers = min(folds, torch.get_num_threads())
    for strength in strengths:
        yield strength, torch.stack(list(in_order(loss, range(folds), workers)))
