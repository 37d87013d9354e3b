"""Does uncertainty help where pseudo-labels are wrong along edges? One student, seven losses.

A few scenes of the demo's digits have true masks; many have only coarse ones, which are enlarged or
shrunk, with closed holes and irregular edges, and confident, like those of a foundation model. A
refinement network learns the errors of the coarse masks from the few scenes; the change that it
makes to the masks of the others is their uncertainty (SUM, eq. 3). The same student, with the same
initial weights and batches, is then trained with the labels and weights of each row and tested on
true masks of other digits.

    python benchmarks/boundary_noise.py                three Markdown tables, in minutes
    python benchmarks/boundary_noise.py -o noise.csv   also every figure as CSV
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.functional import interpolate

from cpseg import (
    boundary_iou,
    confidence_uncertainty,
    confusion_matrix,
    mean_iou,
    poly_lr,
    sum_loss,
    uncertainty_map,
)
from cpseg.demo.scenes import HEIGHT, VOID, WIDTH, scenes
from cpseg.jobs.tally import aligned

CROP = 64
BATCH = 8
RATE = 4e-3
BAND = 1 / (HEIGHT**2 + WIDTH**2) ** 0.5  # boundary IoU of one pixel
KEPT = 0.6  # Dice keeps certainties above it (SUM, appendix B.1)
PLAIN = "coarse, plain loss"


class Size(NamedTuple):
    labelled: int = 16
    unlabelled: int = 200
    heldout: int = 100
    steps: int = 300


QUICK = Size(labelled=2, unlabelled=4, heldout=2, steps=2)


class Part(NamedTuple):
    """Image, true mask and coarse logits of scenes, ``[N, 1, H, W]`` each."""

    images: Tensor
    masks: Tensor
    coarse: Tensor


def part(count: int, seed: int, digits: str = "train") -> Part:
    """Faint digits on cluttered paper; the void rim around them counts as paper."""
    images, labels = scenes(count, domain="target", seed=seed, digits=digits)
    gray = images.astype(np.float32).mean(3) / 255
    gray -= gray.mean((1, 2), keepdims=True)
    masks = (labels > 0) & (labels != VOID)
    rng = np.random.default_rng([seed, 1])
    coarse = np.stack([blurred(mask, rng) for mask in masks])
    return Part(*(torch.from_numpy(x)[:, None] for x in (5 * gray, masks, coarse)))


def blurred(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Logits of a mask: each object's edge is moved by -0.5 to 2 pixels, smoothed and varied."""
    objects, count = ndimage.label(mask, structure=np.ones((3, 3)))
    logits = np.full(mask.shape, -20.0)
    for k in range(1, count + 1):
        own = objects == k
        distance = ndimage.distance_transform_edt(own) - ndimage.distance_transform_edt(~own)
        waver = ndimage.gaussian_filter(rng.standard_normal(mask.shape), 3.0)
        edge = ndimage.gaussian_filter(distance, 1.5) + rng.uniform(-0.5, 2.0)
        logits = np.maximum(logits, 3 * (edge + 0.7 * waver / waver.std()))
    return logits.clip(-20, 20).astype(np.float32)


class Net(nn.Module):
    """A small U-shaped network with one logit per pixel."""

    def __init__(self, inputs: int, width: int = 8) -> None:
        super().__init__()
        self.top = _convolutions(inputs, width)
        self.middle = _convolutions(width, 2 * width)
        self.bottom = _convolutions(2 * width, 4 * width)
        self.up_middle = _convolutions(6 * width, 2 * width)
        self.up_top = _convolutions(3 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.top(x)
        b = self.middle(_halve(a))
        c = self.bottom(_halve(b))
        b = self.up_middle(torch.cat([_double(c), b], 1))
        out: Tensor = self.head(self.up_top(torch.cat([_double(b), a], 1)))
        return out


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for k in (inputs, outputs):
        layers += [nn.Conv2d(k, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers)


def _halve(x: Tensor) -> Tensor:
    return nn.functional.max_pool2d(x, 2)


def _double(x: Tensor) -> Tensor:
    return interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def train(
    inputs: Tensor, targets: Tensor, weights: Tensor, labelled: int, steps: int, seed: int
) -> Net:
    """Train a network from random weights; half of each batch are labelled images.

    Args:
        inputs: ``[N, C, H, W]``.
        targets: bool ``[N, 1, H, W]``.
        weights: uncertainty, ``[N, 1, H, W]``.
        labelled: the number of labelled images; they come first.
        steps: steps of Adam.
        seed: seed of the weights and of the batches, which depend only on the number of images.
    """
    torch.manual_seed(seed)
    net = Net(inputs.shape[1]).to(memory_format=torch.channels_last)
    draws = np.random.default_rng([seed, 2])
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    net.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = poly_lr(step, steps, base_lr=RATE)
        first = draws.integers(0, labelled, BATCH // 2)
        rest = draws.integers(labelled if labelled < len(inputs) else 0, len(inputs), BATCH // 2)
        crops = [_crop(draws) for _ in range(BATCH)]
        batch = [
            torch.stack([maps[k][c] for k, c in zip([*first, *rest], crops, strict=True)])
            for maps in (inputs, targets, weights)
        ]
        flips = [axis for axis in (2, 3) if draws.random() < 0.5]
        x, y, u = (maps.flip(flips) for maps in batch)
        x = x.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        sum_loss(net(x), y, uncertainty=u, certainty_threshold=KEPT).backward()
        optimizer.step()
    return net.eval()


def _crop(draws: np.random.Generator) -> tuple[slice, slice, slice]:
    top, left = draws.integers(0, (HEIGHT - CROP + 1, WIDTH - CROP + 1))
    return slice(None), slice(top, top + CROP), slice(left, left + CROP)


@torch.no_grad()
def logits_of(net: Net, inputs: Tensor) -> Tensor:
    rows = inputs.contiguous(memory_format=torch.channels_last).split(20)
    return torch.cat([net(x) for x in rows]).contiguous()


def auroc(score: Tensor, truth: Tensor) -> float:
    """Probability that a pixel of ``truth`` has a larger score than another; ties count half."""
    flags = truth.flatten().numpy()
    ranks = rankdata(score.flatten().numpy())[flags].sum()
    positive, negative = float(flags.sum()), float((~flags).sum())
    return float((ranks - positive * (positive + 1) / 2) / (positive * negative))


def quality(masks: Tensor, truth: Tensor) -> dict[str, float]:
    """mIoU of digit and paper, and boundary IoU of the digits."""
    ours, true = masks[:, 0].long(), truth[:, 0].long()
    confusion = confusion_matrix(ours, true, num_classes=2)
    bands = boundary_iou(ours, true, num_classes=2, dilation_ratio=BAND, per_class=True)
    return {"mIoU": float(mean_iou(confusion)), "boundary IoU": float(bands[1])}


def experiment(size: Size, seed: int, heldout: Part):
    """For one draw of scenes, yield table, row and figures of each row."""
    x, u = part(size.labelled, 2 * seed), part(size.unlabelled, 2 * seed + 1)
    zero = torch.zeros_like(x.coarse), torch.zeros_like(u.coarse)
    both = [torch.cat([p.images, p.coarse / 10], 1) for p in (x, u)]
    refiner = train(both[0], x.masks, zero[0], size.labelled, size.steps, seed)
    refined = logits_of(refiner, both[1])
    coarse, better = u.coarse > 0, refined > 0
    wrong = coarse != u.masks
    for name, masks in (("coarse", coarse), ("refined", better)):
        share = float((masks != u.masks).float().mean())
        yield "labels", name, {"wrong": share, **quality(masks, u.masks)}
    unsure = {
        "uncertainty_map": uncertainty_map(u.coarse, refined),
        "confidence_uncertainty": confidence_uncertainty(u.coarse)[:, None],
    }
    for name, weights in unsure.items():
        yield "uncertainty", name, removed(weights, wrong)
    arms = {
        "true masks of the few alone": None,
        PLAIN: (coarse, zero[1]),
        **{f"coarse, {name}": (coarse, weights) for name, weights in unsure.items()},
        "coarse, wrong pixels left out (oracle)": (coarse, wrong.float()),
        "refined masks, plain loss": (better, zero[1]),
        "true masks of all": (u.masks, zero[1]),
    }
    for name, arm in arms.items():
        images, targets, weights = x.images, x.masks, zero[0]
        if arm is not None:
            images = torch.cat([images, u.images])
            targets, weights = torch.cat([targets, arm[0]]), torch.cat([weights, arm[1]])
        net = train(images, targets, weights, size.labelled, size.steps, seed)
        yield "students", name, quality(logits_of(net, heldout.images) > 0, heldout.masks)


def removed(unsure: Tensor, wrong: Tensor) -> dict[str, float]:
    """How well uncertainty finds wrong labels, and how much weight right and wrong ones lose."""
    found = {"AUROC": auroc(unsure, wrong)}
    for name, gone in (("focal", unsure), ("Dice", (1 - unsure <= KEPT).float())):
        for side, pixels in (("wrong", wrong), ("right", ~wrong)):
            found[f"{name}, {side}"] = float(gone[pixels].mean())
    return found


def tables(rows: list[tuple[int, str, str, dict[str, float]]]) -> str:
    """Means over seeds ± standard deviation; for students also the gain over the plain loss."""
    values = defaultdict(lambda: defaultdict(dict))
    for seed, table, row, figures in rows:
        for name, value in figures.items():
            values[table][row].setdefault(name, {})[seed] = value
    texts = []
    for table, found in values.items():
        if table == "students":
            for figures in found.values():
                for name in list(figures):
                    plain = found[PLAIN][name]
                    figures[f"{name}: gain"] = {k: v - plain[k] for k, v in figures[name].items()}
        names = list(next(iter(found.values())))
        lines = [(table, *names), ("---", *["---:"] * len(names))]
        for row, figures in found.items():
            lines.append((row, *(spread(figures[name].values(), "gain" in name) for name in names)))
        texts.append(aligned(lines))
    return "\n\n".join(texts)


def spread(values, signed: bool) -> str:
    values = [100 * value for value in values]
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{fmean(values):{'+' if signed else ''}.1f} ± {deviation:.1f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of draws of scenes and initial weights"
    )
    parser.add_argument("--labelled", type=int, help="scenes with true masks (16)")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("-o", "--output", type=Path, help="CSV, one line per seed, row and figure")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else Size()
    if options.labelled:
        size = size._replace(labelled=options.labelled)
    heldout = part(size.heldout, 0, "test")
    rows = []
    for seed in range(options.seeds):
        for row in experiment(size, seed, heldout):
            rows.append((seed, *row))
            print(f"seed {seed}: {row[1]}", file=sys.stderr, flush=True)
    if options.output:
        lines = [(*row[:3], name, value) for row in rows for name, value in row[3].items()]
        with options.output.open("w", newline="") as file:
            csv.writer(file).writerows([("seed", "table", "row", "figure", "value"), *lines])
    print(tables(rows))


if __name__ == "__main__":
    main()
