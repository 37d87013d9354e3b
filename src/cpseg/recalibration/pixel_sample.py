"""A bounded sample of labelled pixels, balanced over images and classes, the same in any order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """The pixels kept of one image.

    Attributes:
        digest: what the image was, by its labels and scores; it orders images and seeds the draw.
        count: int64 ``[K]``, labelled pixels of every class.
        labels: int64 ``[n]``, ascending; within a class in random order.
        values: float32 ``[n, D]``, what is kept of every pixel.
    """

    digest: bytes
    count: Tensor
    labels: Tensor
    values: Tensor

    def trim(self, quota: int) -> Sample:
        """The sample that this quota would have drawn: the first pixels of every class."""
        if len(self.labels) <= quota:
            return self
        keep = place_in_class(self.labels) < allotment(self.count, quota)[self.labels]
        return replace(self, labels=self.labels[keep], values=self.values[keep])

    def weights(self) -> Tensor:
        """float64 ``[n]``, sum 1 over the image: a pixel represents its proportion of its class."""
        kept = torch.bincount(self.labels, minlength=len(self.count))
        each = self.count.to(torch.float64) / (kept.clamp(min=1) * self.count.sum())
        return each[self.labels]


class PixelSample:
    """Samples of images, at most ``budget`` pixels together.

    Every image keeps at most ``quota`` pixels. When all of them exceed the budget the quota is
    halved, and every sample trimmed to what the smaller quota would have drawn. The draw of an
    image depends on its content and the seed alone, and the quota on the images seen: the state is
    the same for every order, split and merge tree.
    """

    def __init__(self, budget: int) -> None:
        self.budget = self.quota = budget
        self.samples: list[Sample] = []

    def add(self, samples: Iterable[Sample], quota: int) -> None:
        """Take samples that were drawn with a quota, so that all of their pixels say how many.

        A smaller quota than this one trims the samples here: those that it trimmed are not as
        many pixels as they would be, and the sum would not exceed the budget where it should.
        """
        if quota < self.quota:
            self.quota = quota
            self.samples = [kept.trim(quota) for kept in self.samples]
        for sample in samples:
            self.samples.append(sample.trim(self.quota))
            while sum(len(kept.labels) for kept in self.samples) > self.budget and self.quota > 1:
                self.quota //= 2
                self.samples = [kept.trim(self.quota) for kept in self.samples]


def allotment(count: Tensor, quota: int) -> Tensor:
    """How many pixels of every class to keep: evenly, and rare classes whole.

    Args:
        count: int64 ``[K]``, pixels there are.
        quota: the most to keep together, but one of every class at least.

    Example:
        >>> allotment(torch.tensor([900, 3, 0, 50]), 21)
        tensor([9, 3, 0, 9])
    """
    kept = torch.zeros_like(count)
    left, classes = quota, int((count > 0).sum())
    for index in count.argsort().tolist():
        if count[index] > 0:
            kept[index] = min(int(count[index]), max(1, left // classes))
            left -= int(kept[index])
            classes -= 1
    return kept


def place_in_class(labels: Tensor) -> Tensor:
    """The place of every pixel among those of its class; ``labels`` ascend."""
    counts = torch.bincount(labels)
    return torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels]


def digest(labels: Tensor, probs: Tensor, seed: int) -> bytes:
    """A name for an image by content: all labels, and the scores of every 16th row and column."""
    code = hashlib.blake2b(str((seed, *probs.shape)).encode(), digest_size=16)
    code.update(labels.to(torch.int32).contiguous().numpy().tobytes())
    thin = probs[:, ::16, ::16].to("cpu", torch.float32).contiguous()
    code.update(thin.numpy().tobytes())
    return code.digest()


def draw(name: bytes, labels: Tensor, count: Tensor, quota: int) -> Tensor:
    """The pixels to keep, int64 indices, sorted by class and in random order within one.

    Args:
        name: the image's digest, which seeds the order.
        labels: int64 ``[n]``, void negative.
        count: int64 ``[K]``, pixels of every class.
        quota: the most to keep.
    """
    number = int.from_bytes(name[:8], "little")
    keys = torch.from_numpy(np.random.Generator(np.random.PCG64(number)).random(len(labels)))
    known = (labels >= 0).nonzero().squeeze(1)
    known = known[keys[known].argsort()]
    known = known[labels[known].argsort(stable=True)]
    sorted_labels = labels[known]
    return known[place_in_class(sorted_labels) < allotment(count, quota)[sorted_labels]]
