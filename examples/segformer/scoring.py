"""A student on whole images, or in sliding windows: its mIoU, and its scores as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cpseg import confusion_matrix, mean_iou
from cpseg.files import Pair, Source, atomic, output_path
from crops import read_labels, read_pixels
from ranks import rank, ranks


@torch.no_grad()
def evaluate(
    model: nn.Module,
    source: Source,
    pairs: list[Pair],
    num_classes: int,
    *,
    window: int | None,
    device: str,
    amp: torch.dtype | None = None,
) -> Tensor:
    """Confusion matrix ``[K, K]`` over all images, which ranks divide among them."""
    model.eval()
    total = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for pair in pairs[rank() :: ranks()]:
        pixels = read_pixels(source.root / pair.image)
        labels = read_labels(source, pair, num_classes, pixels).to(device)
        with torch.autocast(torch.device(device).type, dtype=amp, enabled=amp is not None):
            probs = predict(model, pixels[None].to(device), window)
        total += confusion_matrix(probs.argmax(1), labels[None].long(), num_classes=num_classes)
    if ranks() > 1:
        dist.all_reduce(total)
    model.train()
    return total


@torch.no_grad()
def write_scores(
    model: nn.Module,
    source: Source,
    pairs: list[Pair],
    out: Path,
    *,
    window: int | None,
    device: str,
    amp: torch.dtype | None = None,
    newer_than: Path,
) -> None:
    """Write float16 probabilities ``[K, H, W]`` of all images, which ranks divide among them.

    Files that are newer than ``newer_than``, the student's checkpoint, are not written again.
    """
    model.eval()
    since = newer_than.stat().st_mtime_ns
    for pair in pairs[rank() :: ranks()]:
        path = output_path(out, pair.image, ".npy")
        if path.is_file() and path.stat().st_mtime_ns >= since:
            continue
        pixels = read_pixels(source.root / pair.image)
        with torch.autocast(torch.device(device).type, dtype=amp, enabled=amp is not None):
            probs = predict(model, pixels[None].to(device), window)
        with atomic(path) as file:
            np.save(file, probs[0].clamp(max=1).half().cpu().numpy())
    model.train()


def predict(model: nn.Module, pixels: Tensor, window: int | None) -> Tensor:
    """Class probabilities ``[1, K, H, W]``; windows overlap by a third and are averaged."""
    height, width = pixels.shape[-2:]
    if window is None or max(height, width) <= window:
        return model(pixels).float().softmax(1)
    total = count = torch.zeros((), device=pixels.device)
    for top in _starts(height, window):
        for left in _starts(width, window):
            area = (..., slice(top, top + window), slice(left, left + window))
            probs = model(pixels[area]).float().softmax(1)
            if total.ndim == 0:
                total = probs.new_zeros(1, probs.shape[1], height, width)
                count = probs.new_zeros(1, 1, height, width)
            total[area] += probs
            count[area] += 1
    return total / count


def _starts(side: int, window: int) -> list[int]:
    stride = max(1, window * 2 // 3)
    last = max(0, side - window)
    return sorted({*range(0, last, stride), last})


def table(confusion: Tensor, names: list[str]) -> str:
    """IoU of every class, and their mean, as a Markdown table."""
    values = mean_iou(confusion, per_class=True).tolist()
    lines = ["| class | IoU |", "| --- | ---: |"]
    for name, value in zip(names, values, strict=True):
        lines.append(f"| {name} | {'-' if value != value else f'{value:.3f}'} |")
    return "\n".join([*lines, f"| mean | {float(mean_iou(confusion)):.3f} |"])
