"""``FeatureProjection``: an image encoder's features, reduced to few standardised components."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cpseg._internal.checks import (
    check_count,
    check_float,
    check_probs,
    check_same_device,
    message,
    shape,
)

_NAME = "features"
_TENSORS = ("mean", "basis")
_LEAST_VARIANCE = 1e-6  # of the first component's: below it a component is rounding


@dataclass(frozen=True, repr=False)
class FeatureProjection:
    """Principal components of an encoder's features, each with variance 1 over the fitted images.

    The features may be those of any encoder (DINOv2, DINOv3, the student's own backbone), with C
    channels and any size. A :class:`Recalibrator` takes them beside the scores of models, and
    chooses by cross-validation how many components it uses.

    Attributes:
        mean: float32 ``[C]``, over all pixels of the fitted images.
        basis: float32 ``[C, P]``, the components, divided by their standard deviation.
        num_images: images behind the fit.

    Guarantee:
        None is lost where the projection was fitted without the images that calibrate, or on these
        and the new images alike, since it needs no labels and treats all of them the same.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> images = [torch.randn(8, 6, 5, generator=generator) for _ in range(4)]
        >>> projection = FeatureProjection.fit(images, components=3)
        >>> projection(images[0]).shape
        torch.Size([3, 6, 5])
    """

    mean: Tensor
    basis: Tensor
    num_images: int

    def __post_init__(self) -> None:
        where, fix = "FeatureProjection", "fit one with FeatureProjection.fit"
        for name in _TENSORS:
            check_float(where, getattr(self, name), name=name, fix=fix)
        if self.basis.ndim != 2 or tuple(self.mean.shape) != (len(self.basis),):
            got = f"{shape(self.mean)} and {shape(self.basis)}"
            raise ValueError(message(where, "mean [C] and basis [C, P]", got, fix))
        check_count(where, self.num_images, name="num_images", fix=fix)

    def __repr__(self) -> str:
        return (
            f"FeatureProjection({self.channels} channels to {self.components} components, "
            f"{self.num_images} images)"
        )

    @property
    def channels(self) -> int:
        """Number of channels C of the features."""
        return self.basis.shape[0]

    @property
    def components(self) -> int:
        """Number of components P."""
        return self.basis.shape[1]

    @classmethod
    def fit(cls, features: Iterable[Tensor], *, components: int = 64) -> FeatureProjection:
        """Find the components of some images, labelled or not; every pixel weighs the same.

        Args:
            features: float ``[C, h, w]`` of every image; sizes may differ.
            components: how many to keep at most.

        Returns:
            At most ``components``, fewer where the features have fewer dimensions. Another order
            of the images changes them by rounding alone.

        Raises:
            ValueError: no image, images of different depth, NaN or infinite values, features that
                are the same everywhere.
            TypeError: not floating point.
        """
        where = "FeatureProjection.fit"
        check_count(where, components, name="components", fix="pass 64")
        total = products = torch.zeros(0)
        pixels = images = 0
        for each in features:
            _check(where, each, images and len(total))
            flat = each.detach().to(torch.float64).flatten(1)
            if images == 0:
                total = flat.new_zeros(len(flat))
                products = flat.new_zeros(len(flat), len(flat))
            total = total + flat.sum(1)
            products = products + flat @ flat.T
            pixels, images = pixels + flat.shape[1], images + 1
        if images == 0:
            fix = "pass those of the unlabelled images"
            raise ValueError(message(where, "features of at least one image", "none", fix))
        mean = total / pixels
        covariance = products / pixels - mean.outer(mean)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0), vectors.flip(1)
        if float(values[0]) <= _LEAST_VARIANCE * float(products.trace() / pixels):
            fix = "check how they were written"
            raise ValueError(message(where, "features that differ", "the same everywhere", fix))
        kept = min(components, int((values > _LEAST_VARIANCE * values[0]).sum()))
        vectors = vectors[:, :kept]
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        basis = vectors * largest.sign() / values[:kept].sqrt()
        return cls(mean.float(), basis.float().contiguous(), images)

    def __call__(self, features: Tensor) -> Tensor:
        """The components of every pixel.

        Args:
            features: float ``[B, C, h, w]`` or ``[C, h, w]``.

        Returns:
            float32 ``[B, P, h, w]`` or ``[P, h, w]``.

        Raises:
            ValueError: another number of channels or another device.
            TypeError: not floating point.
        """
        where = "FeatureProjection"
        check_probs(where, features, name=_NAME)
        if features.shape[-3] != self.channels:
            expected, got = f"features of {self.channels} channels", shape(features)
            fix = "use those of the encoder that the projection was fitted on"
            raise ValueError(message(where, expected, got, fix))
        check_same_device(where, self.mean, features, name="the projection", reference=_NAME)
        values = features.detach().to(torch.float32).movedim(-3, -1) - self.mean
        return (values @ self.basis).movedim(-1, -3)

    def first(self, components: int) -> FeatureProjection:
        """The same projection with its first components alone."""
        return replace(self, basis=self.basis[:, :components].contiguous())

    def to(self, device: torch.device | str) -> FeatureProjection:
        """The same projection on another device."""
        return replace(self, mean=self.mean.to(device), basis=self.basis.to(device))

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all that changes its result."""
        parts = (part.cpu().contiguous().numpy().tobytes() for part in (self.mean, self.basis))
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a file."""
        return {f"{_NAME}.{name}": getattr(self, name) for name in _TENSORS}

    @classmethod
    def from_parts(
        cls, where: str, tensors: Mapping[str, Tensor], facts: Any, *, fix: str
    ) -> FeatureProjection:
        """What :meth:`tensors` and ``num_images`` describe.

        Raises:
            ValueError: a part is missing, damaged or does not fit the other.
        """
        parts = [tensors.get(f"{_NAME}.{name}") for name in _TENSORS]
        mean, basis = parts
        if mean is None or basis is None:
            raise ValueError(message(where, "the projection of its features", "none", fix))
        fits = basis.ndim == 2 and tuple(mean.shape) == (len(basis),)
        plain = all(
            part.dtype == torch.float32 and bool(part.isfinite().all()) for part in (mean, basis)
        )
        if not fits or not plain:
            got = f"{mean.dtype} {shape(mean)} and {basis.dtype} {shape(basis)}"
            expected = "finite float32 mean [C] and basis [C, P] of its features"
            raise ValueError(message(where, expected, got, fix))
        return cls(mean.clone(), basis.clone(), facts)


def _check(where: str, features: Tensor, channels: int) -> None:
    """Features of one image, as many channels as before; 0 for the first image."""
    check_probs(where, features, name=_NAME)
    if features.ndim != 3:
        got, fix = shape(features), "pass the images one by one"
        raise ValueError(message(where, f"{_NAME} [C, h, w]", got, fix))
    if channels and len(features) != channels:
        expected, got = f"{channels} channels like the first image", f"{_NAME} {shape(features)}"
        raise ValueError(message(where, expected, got, "use one encoder"))
    if not bool(features.isfinite().all()):
        fix = "write them anew"
        raise ValueError(message(where, f"finite {_NAME}", "NaN or infinite values", fix))
