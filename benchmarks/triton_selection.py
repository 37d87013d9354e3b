"""Selection by one threshold per pixel as a single Triton kernel: an experiment of the benchmark.

It is no part of the library. It enters ``src`` only if it beats the compiled form of
``cpseg.pseudo_labels`` on a card by more than noise: if the quartiles of the two rows in
``benchmarks/gpu.py`` do not overlap.

The kernel reads every score once and writes every label once. It is the same bit for bit as
``cpseg.pseudo_labels(probs, threshold, background=...)``. Triton's interpreter runs it without a
card: set TRITON_INTERPRET=1 before this module is imported.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # pixels of one program
BLOCKS = (256, 512, 1024)  # what the benchmark tries
TOGETHER = 8  # classes of one step of the loop: so many loads are on their way at once
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


@triton.jit
def _read(place, inside, scale: tl.constexpr):
    """Scores of one class as float32, times ``scale`` where they are bytes."""
    score = tl.load(place, mask=inside, other=0).to(tl.float32)
    if scale != 1.0:
        score = score * scale
    return score


@triton.jit
def _better(best, label, score, number):
    """The best score and its class after one more class; the earlier class on a tie.

    A NaN stays: nothing compares as larger than it, and the maximum keeps it.
    """
    label = tl.where(score > best, number, label)
    return tl.maximum(best, score, propagate_nan=tl.PropagateNan.ALL), label


@triton.jit
def _best_of_span(
    row,
    stride,
    inside,
    best,
    label,
    first: tl.constexpr,
    last: tl.constexpr,
    scale: tl.constexpr,
    together: tl.constexpr,
):
    """The best of the classes from ``first`` to before ``last``; ``row`` points to the first."""
    whole: tl.constexpr = (last - first) // together * together
    for start in tl.range(0, whole, together):
        for step in tl.static_range(together):
            score = _read(row + step * stride, inside, scale)
            best, label = _better(best, label, score, first + start + step)
        row += together * stride
    for step in tl.static_range(last - first - whole):
        score = _read(row + step * stride, inside, scale)
        best, label = _better(best, label, score, first + whole + step)
    return best, label


@triton.jit
def _kernel(
    probs,
    threshold,
    labels,
    pixels,
    image_stride,
    class_stride,
    num_classes: tl.constexpr,
    background: tl.constexpr,  # -1 where every class counts
    ignore_index: tl.constexpr,
    scale: tl.constexpr,
    block: tl.constexpr,
    together: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)  # a large batch has more scores than 32 bits count
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < pixels
    row = probs + image * image_stride + place
    limit = tl.load(threshold + place, mask=inside, other=0)
    best = tl.full([block], float("-inf"), tl.float32)
    label = tl.full([block], 1 if background == 0 else 0, tl.int32)
    if background >= 0:
        best, label = _best_of_span(
            row, class_stride, inside, best, label, 0, background, scale, together
        )
        row += background * class_stride
        back = _read(row, inside, scale)
        best, label = _best_of_span(
            row + class_stride,
            class_stride,
            inside,
            best,
            label,
            background + 1,
            num_classes,
            scale,
            together,
        )
        other = tl.where(1 - back <= limit, background, ignore_index).to(tl.int64)
        # Some class has NaN: the whole pixel is ignored.
        found = tl.where(1 - best <= limit, label.to(tl.int64), other)
        found = tl.where((best == best) & (back == back), found, ignore_index)
    else:
        best, label = _best_of_span(
            row, class_stride, inside, best, label, 0, num_classes, scale, together
        )
        found = tl.where(1 - best <= limit, label.to(tl.int64), ignore_index)
    tl.store(labels + image * pixels + place, found, mask=inside)


def pseudo_labels(
    probs: Tensor,
    threshold: Tensor,
    *,
    background: int | None,
    ignore_index: int = 255,
    block: int = BLOCK,
) -> Tensor:
    """The labels of ``cpseg.pseudo_labels`` for one threshold per pixel, by one kernel.

    Args:
        probs: float32, bfloat16 or float16 ``[B, K, H, W]``; or uint8, which counts as
            ``probs.float() / 255`` does on a card: there PyTorch multiplies by the float32
            nearest to 1 / 255. Copied first where the pixels of a class are not contiguous.
        threshold: float32 ``[H, W]``.
        background: index of a dominant class to suppress, or None where every class counts.
        ignore_index: the label of pixels whose set is empty or that have a NaN.
        block: pixels of one program, a power of two.

    Returns:
        int64 ``[B, H, W]``.

    Raises:
        ValueError: another dtype or shape. The experiment checks nothing else.
    """
    batch, num_classes, height, width = probs.shape
    if probs.dtype not in DTYPES or threshold.dtype != torch.float32:
        raise ValueError(f"dtypes {probs.dtype} and {threshold.dtype}")
    if threshold.shape != (height, width) or (background is not None and num_classes < 2):
        raise ValueError(f"shapes {tuple(probs.shape)} and {tuple(threshold.shape)}")
    pixels = height * width
    if probs.stride()[2:] != (width, 1):
        probs = probs.contiguous()
    labels = torch.empty(batch, height, width, dtype=torch.int64, device=probs.device)
    _kernel[(triton.cdiv(pixels, block), batch)](
        probs,
        threshold.contiguous(),
        labels,
        pixels,
        probs.stride(0),
        probs.stride(1),
        num_classes=num_classes,
        background=-1 if background is None else background,
        ignore_index=ignore_index,
        scale=1 / 255 if probs.dtype == torch.uint8 else 1.0,
        block=block,
        together=TOGETHER,
        enable_fp_fusion=False,  # 1 - score * scale in one step would round once, not twice
    )
    return labels
