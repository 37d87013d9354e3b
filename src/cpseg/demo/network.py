"""The network of the demo: the model in place of a foundation model, and the students.

A pixel is classified from a window of some 40 pixels around it: a fixed bank of filters finds edges
in eight directions, trained layers tell from their arrangement which digit the pixel belongs to.
As the bank is fixed, training needs only some pixels of every scene, and takes seconds.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cpseg._internal.checks import check_count, message
from cpseg.demo.scenes import F32, NUM_CLASSES, U8, VOID, scenes

__all__ = ["Network", "class_scores", "train_foundation", "train_network"]

Progress = Callable[[int, int], object]

_DIRECTIONS = 8
_WIDTHS = (192, 96)
_BATCH = 512  # pixels
_RATE = 1e-2
_DECAY = 0.05
_PIXELS = 400  # of a scene that are drawn for training, half of them on objects

_STARTING = threading.Lock()  # the global random state belongs to one training at a time

_SOURCE_SCENES = 300
_SOURCE_PIXELS = 250


class Network(nn.Module):
    """Gray images ``[N, 1, H, W]`` in, logits ``[N, 11, H, W]`` out; H and W are even."""

    def __init__(self) -> None:
        super().__init__()
        edges, gray = 7 * 7 * _DIRECTIONS, 7 * 7
        self.layers = nn.Sequential(
            nn.Linear(edges + gray, _WIDTHS[0], bias=False),
            nn.BatchNorm1d(_WIDTHS[0]),
            nn.ReLU(),
            nn.Linear(_WIDTHS[0], _WIDTHS[1], bias=False),
            nn.BatchNorm1d(_WIDTHS[1]),
            nn.ReLU(),
            nn.Linear(_WIDTHS[1], NUM_CLASSES),
        )
        self.bank: torch.Tensor
        self.centre: torch.Tensor
        self.spread: torch.Tensor
        self.register_buffer("bank", _edge_filters())
        self.register_buffer("centre", torch.zeros(edges + gray))
        self.register_buffer("spread", torch.ones(edges + gray))

    def windows(self, gray: torch.Tensor) -> torch.Tensor:
        """What the trained layers see at every second pixel: ``[N, H / 2 * W / 2, 441]``."""
        edges, relief = self._maps(gray)
        far = F.unfold(edges, 7, dilation=3, padding=9)  # the digit around the pixel
        near = F.unfold(relief, 7, padding=3)  # the stroke that it lies on
        return torch.cat([far, near], dim=1).transpose(1, 2)

    def windows_at(self, gray: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The same at some places of one image ``[1, 1, H, W]``: ``[M, 441]``."""
        edges, relief = self._maps(gray)
        return torch.cat([_around(edges[0], places, 3), _around(relief[0], places, 1)], dim=1)

    def _maps(self, gray: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        edges = F.relu(F.conv2d(F.pad(gray, (3, 3, 3, 3), mode="replicate"), self.bank, stride=2))
        edges = F.avg_pool2d(F.pad(edges, (1, 1, 1, 1)), 3, 1)
        edges = edges / (_surround(edges.mean(1, keepdim=True)) + 0.004)
        half = F.avg_pool2d(gray, 2)
        relief = (half - _surround(half)) / 0.08
        return edges.sqrt(), relief

    def classify(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits ``[M, 11]`` of windows ``[M, 441]``."""
        logits: torch.Tensor = self.layers((windows - self.centre) / self.spread)
        return logits

    def forward(self, gray: torch.Tensor) -> torch.Tensor:
        """Logits ``[N, 11, H, W]``: means over 3 x 3 of every second pixel, interpolated."""
        rows, columns = gray.shape[-2] // 2, gray.shape[-1] // 2
        logits = self.classify(self.windows(gray).flatten(0, 1))
        coarse = logits.reshape(len(gray), rows, columns, NUM_CLASSES).permute(0, 3, 1, 2)
        coarse = F.avg_pool2d(F.pad(coarse, (1, 1, 1, 1), mode="replicate"), 3, 1)
        return F.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False)


def _around(maps: torch.Tensor, places: torch.Tensor, dilation: int) -> torch.Tensor:
    """The 7 x 7 values around some places of ``[C, H, W]``, zeros outside: ``[M, C * 49]``."""
    columns, edge = maps.shape[-1], 3 * dilation
    padded = F.pad(maps, (edge, edge, edge, edge))
    width = padded.shape[-1]
    steps = dilation * torch.arange(7)
    offsets = (steps[:, None] * width + steps).flatten()
    first = places // columns * width + places % columns
    found = padded.flatten(1)[:, first[:, None] + offsets]
    return found.transpose(0, 1).flatten(1)


def _edge_filters() -> torch.Tensor:
    """Derivatives of a Gaussian in every direction: ``[8, 1, 7, 7]``."""
    side = torch.arange(-3.0, 4.0)
    y, x = torch.meshgrid(side, side, indexing="ij")
    bell = torch.exp(-(x**2 + y**2) / (2 * 1.3**2))
    angles = [2 * math.pi * number / _DIRECTIONS for number in range(_DIRECTIONS)]
    filters = torch.stack([bell * (x * math.cos(a) + y * math.sin(a)) for a in angles])
    return (filters / filters.abs().sum(dim=(1, 2), keepdim=True)).unsqueeze(1)


def _surround(values: torch.Tensor) -> torch.Tensor:
    """Mean over the 21 x 21 places around each."""
    return F.avg_pool2d(F.pad(values, (10, 10, 10, 10), mode="replicate"), 21, 1)


def _gray(images: U8) -> torch.Tensor:
    return torch.from_numpy(images.astype(np.float32).mean(axis=3) / 255.0).unsqueeze(1)


def train_network(
    images: U8,
    labels: U8,
    *,
    seed: int,
    steps: int,
    pixels: int = _PIXELS,
    progress: Progress | None = None,
) -> Network:
    """Train a network on scenes by cross-entropy; pixels labelled 255 are left out.

    Of every scene some pixels are drawn, as many on objects as on the background, and weighted back
    to their true shares. The result depends on the arguments alone, and the global random state
    does not change.

    Args:
        images: RGB, ``[N, H, W, 3]``.
        labels: classes or 255, ``[N, H, W]``.
        seed: of the initial weights and all draws.
        steps: of the optimiser, each on 512 pixels.
        pixels: how many are drawn from a scene.
        progress: called after every step with the number of steps done and of all steps.

    Raises:
        ValueError: no step, or no pixel with a label.
    """
    check_count("train_network", steps, name="steps", fix="the demo uses 1000")
    generator = torch.Generator().manual_seed(seed)
    with _STARTING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Network()
    drawn = list(_draw(model, images, labels, pixels, generator))
    if not drawn:
        raise ValueError(message("train_network", "labelled pixels", "none", "label some"))
    seen, wanted, weight = (torch.cat(part) for part in zip(*drawn, strict=True))
    model.centre.copy_(seen.mean(dim=0))
    model.spread.copy_(seen.std(dim=0, correction=0) + 1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=_DECAY)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * _factor(step, steps)
        batch = torch.randint(len(wanted), (_BATCH,), generator=generator)
        losses = F.cross_entropy(model.classify(seen[batch]), wanted[batch], reduction="none")
        loss = (losses * weight[batch]).sum() / weight[batch].sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if progress is not None:
            progress(step + 1, steps)
    return model.eval()


def _draw(
    model: Network, images: U8, labels: U8, pixels: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of every scene the windows of some pixels, their labels and their weights."""
    truth = torch.from_numpy(labels[:, 1::2, 1::2].astype(np.int64)).flatten(1)
    for image, classes in zip(images, truth, strict=True):
        chosen, weights = [], []
        for part in (classes == 0, (classes > 0) & (classes != VOID)):
            places = part.nonzero().flatten()
            if len(places):
                picks = torch.randint(len(places), (pixels // 2,), generator=generator)
                chosen.append(places[picks])
                weights.append(torch.full((pixels // 2,), len(places) / (pixels // 2)))
        if chosen:
            at = torch.cat(chosen)
            with torch.no_grad():
                windows = model.windows_at(_gray(image[None]), at)
            yield windows, classes[at], torch.cat(weights)


def _factor(step: int, steps: int) -> float:
    """Of the learning rate: a linear rise for a fifth of the steps, then a cosine decay."""
    done = (step + 0.5) / steps
    return done / 0.2 if done < 0.2 else 0.5 * (1.0 + math.cos(math.pi * (done - 0.2) / 0.8))


def train_foundation(*, seed: int, steps: int = 1000, progress: Progress | None = None) -> Network:
    """Train the network that takes the place of a foundation model, on clean scenes only.

    Args:
        seed: of the scenes and the training.
        steps: of the optimiser.
        progress: called after every step with the number of steps done and of all steps.

    Raises:
        ValueError: no step.
        ImportError: scikit-learn is missing.
    """
    check_count("train_foundation", steps, name="steps", fix="the demo uses 1000")
    images, labels = scenes(_SOURCE_SCENES, domain="source", seed=seed)
    return train_network(
        images,
        labels,
        seed=seed,
        steps=steps,
        pixels=_SOURCE_PIXELS,
        progress=progress,
    )


def class_scores(model: nn.Module, images: U8, *, batch: int = 1) -> F32:
    """Softmax probabilities ``[N, 11, H, W]`` of ``images`` ``[N, H, W, 3]``."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            logits = model(_gray(images[start : start + batch]))
            parts.append(logits.softmax(dim=1).numpy())
    scores: F32 = np.concatenate(parts)
    return scores
