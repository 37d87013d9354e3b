"""Images, masks and coarse logits of a folder, resized to the square input of SAM.

The folder holds ``labelled.txt`` and ``val.txt`` (``image mask`` per line), ``unlabelled.txt``
(``image`` per line), with paths relative to it, and ``coarse/<image without suffix>.safetensors``.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import interpolate, pad

from cpseg import centre_point
from cpseg.files import Pair, output_path, read_ids, read_mask, read_tensors

VOID = 255
MEAN = torch.tensor([123.675, 116.28, 103.53]).reshape(3, 1, 1)  # of SAM, for values 0..255
STD = torch.tensor([58.395, 57.12, 57.375]).reshape(3, 1, 1)


class Example(NamedTuple):
    """One image with M masks in a frame of S x S pixels; the image is in its upper left corner.

    Attributes:
        name: path of the image in its list.
        pixels: float ``[3, S, S]``, normalised, 0 in the padding.
        size: height and width of the image in the frame.
        masks: 1 inside the mask, 0 outside, 255 void or padding, uint8 ``[M, S, S]``.
        coarse: logits of the coarse masks, ``[M, S, S]``, or None.
        points: the point from which each coarse mask was made, as (x, y), ``[M, 2]``.
    """

    name: str
    pixels: Tensor
    size: tuple[int, int]
    masks: Tensor
    coarse: Tensor | None
    points: Tensor


def read_list(folder: Path, part: str) -> list[Pair]:
    """The lines of ``<part>.txt``."""
    return read_ids(folder / f"{part}.txt", columns=1 if part == "unlabelled" else 2)


def read_image(folder: Path, pair: Pair, size: int) -> tuple[Example, tuple[int, int]]:
    """An image without masks, and its original height and width."""
    image = _read_image(folder / pair.image)
    pixels, inner = _frame(image, size)
    no_masks = torch.zeros(0, size, size, dtype=torch.uint8)
    example = Example(pair.image, pixels, inner, no_masks, None, torch.zeros(0, 2))
    return example, (image.height, image.width)


def read_labelled(folder: Path, pair: Pair, size: int, *, coarse: bool) -> Example:
    """An image with its labelled masks: label k is mask k, 0 background, 255 void.

    With ``coarse``, channel k - 1 of the coarse logits belongs to label k.
    """
    example, kept, full = read_objects(folder, pair, size)
    if not coarse:
        return example
    logits, points = _read_coarse(folder, pair.image, full, size, example.size)
    if len(logits) < kept[-1]:
        raise ValueError(
            f"{pair.image}: expected coarse logits of {kept[-1]} masks, one per label, "
            f"got {len(logits)}; write one channel per label"
        )
    index = torch.tensor(kept) - 1
    points = example.points if points is None else points[index]
    return example._replace(coarse=logits[index], points=points)


def read_objects(folder: Path, pair: Pair, size: int) -> tuple[Example, list[int], tuple[int, int]]:
    """An image with its labelled masks, the label of each, and its original height and width."""
    bare, full = read_image(folder, pair, size)
    where = folder / str(pair.mask)
    labels = read_mask(where, num_classes=255, size=full)
    values = [int(v) for v in labels.unique() if v not in (0, VOID)]
    if not values:
        raise ValueError(f"{where}: expected at least one object, got none; remove the line")
    small = interpolate(labels[None, None].float(), size=bare.size, mode="nearest-exact")[0, 0]
    small = _pad(small[None], size, VOID)[0]
    # An object may vanish when the image shrinks.
    kept = [v for v in values if bool((small == v).any())]
    if not kept:
        raise ValueError(
            f"{where}: expected an object that {size} pixels show, got none; remove the line"
        )
    masks = torch.stack([(small == v).to(torch.uint8) for v in kept])
    masks = masks.masked_fill(small == VOID, VOID)
    return bare._replace(masks=masks, points=centre_point(masks == 1).points), kept, full


def read_unlabelled(folder: Path, pair: Pair, size: int) -> Example:
    """An image whose masks are its coarse logits above 0; empty masks are left out."""
    bare, full = read_image(folder, pair, size)
    logits, points = _read_coarse(folder, pair.image, full, size, bare.size)
    inside = _pad(torch.zeros(1, *bare.size), size, VOID) == 0
    masks = (logits > 0) & inside
    kept = masks.flatten(1).any(1)
    if not bool(kept.any()):
        raise ValueError(
            f"{pair.image}: expected a coarse mask with a pixel, got none; remove the line"
        )
    masks = masks[kept]
    points = centre_point(masks).points if points is None else points[kept]
    targets = masks.to(torch.uint8).masked_fill(~inside, VOID)
    return bare._replace(masks=targets, coarse=logits[kept], points=points)


def with_masks(folder: Path, pairs: list[Pair]) -> list[Pair]:
    """The unlabelled images, except those whose coarse file has no mask.

    Raises:
        ValueError: no image is left.
    """
    left = []
    for pair in pairs:
        path = output_path(folder / "coarse", pair.image, ".safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                empty = file.get_slice("logits").get_shape()[0] == 0
        except (OSError, SafetensorError):  # the error is reported when the file is read
            empty = False
        if not empty:
            left.append(pair)
    if not left:
        raise ValueError(
            f"{folder / 'unlabelled.txt'}: expected an image with a coarse mask, got none; "
            "lower --min-iou or --min-stability"
        )
    return left


def take(example: Example, index: Tensor) -> Example:
    """The example with only the masks at ``index``."""
    coarse = None if example.coarse is None else example.coarse[index]
    return example._replace(masks=example.masks[index], coarse=coarse, points=example.points[index])


def _read_image(path: Path) -> Image.Image:
    """RGB, as stored: EXIF rotation is not applied."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path}: expected an image, got an unreadable file; remove the line or write it anew"
        ) from error


def _frame(image: Image.Image, size: int) -> tuple[Tensor, tuple[int, int]]:
    """Normalised pixels in the frame, and the image's height and width there."""
    scale = size / max(image.height, image.width)
    inner = (max(1, round(image.height * scale)), max(1, round(image.width * scale)))
    small = image.resize((inner[1], inner[0]), Image.Resampling.BILINEAR)
    values = torch.from_numpy(np.array(small)).permute(2, 0, 1).float()
    return _pad((values - MEAN) / STD, size, 0), inner


def _pad(maps: Tensor, size: int, value: float) -> Tensor:
    return pad(maps, (0, size - maps.shape[2], 0, size - maps.shape[1]), value=value)


def _read_coarse(
    folder: Path, name: str, full: tuple[int, int], size: int, inner: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """Logits ``[M, S, S]`` and points ``[M, 2]``, if the file has them, in the frame."""
    path = output_path(folder / "coarse", name, ".safetensors")
    tensors, _ = read_tensors(path)
    fix = "store float 'logits' [M, h, w] of the whole image, and 'points' [M, 2] if you have them"
    logits, points = tensors.get("logits"), tensors.get("points")
    if logits is None or logits.ndim != 3 or 0 in logits.shape or not logits.is_floating_point():
        got = "none" if logits is None else f"{logits.dtype} {list(logits.shape)}"
        raise ValueError(f"{path}: expected 'logits' [M, h, w], got {got}; {fix}")
    if not bool(logits.isfinite().all()):
        raise ValueError(f"{path}: expected finite 'logits', got inf or NaN; clamp them")
    small = interpolate(logits[None].float(), size=inner, mode="bilinear", align_corners=False)[0]
    logits = _pad(small, size, min(float(small.min()), -1.0))
    if points is None:
        return logits, None
    if points.shape != (len(logits), 2):
        raise ValueError(
            f"{path}: expected 'points' [{len(logits)}, 2], got {list(points.shape)}; {fix}"
        )
    return logits, move_points(points.float(), full, inner)


def move_points(points: Tensor, size: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Points (x, y) of an image at the height and width ``size`` in the same image at ``to``."""
    scale = torch.tensor([to[1] / size[1], to[0] / size[0]], device=points.device)
    return (points + 0.5) * scale - 0.5  # 0.5: the centre of the first pixel is 0
