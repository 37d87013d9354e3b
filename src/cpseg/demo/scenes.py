"""Data of the built-in demo: real handwriting in two domains.

Scenes are composed of the 1797 handwritten digits that come with scikit-learn
(``load_digits``, nothing is downloaded). The *source* domain is clean: dark ink on nearly even
paper. The *target* domain looks like a bad photograph: faint ink, texture at several scales,
stains, ruled lines, stray strokes and uneven light.

Classes: 0 is background, digit ``d`` is class ``d + 1``, 255 is void (a thin rim around every
object, as in Pascal VOC).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from cpseg._internal.checks import check_choice, check_count

__all__ = [
    "CLASS_NAMES",
    "HEIGHT",
    "NUM_CLASSES",
    "VOID",
    "WIDTH",
    "scenes",
]

Domain = Literal["source", "target"]
Digits = Literal["train", "test"]
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

HEIGHT = 96
WIDTH = 128
NUM_CLASSES = 11
VOID = 255
CLASS_NAMES: tuple[str, ...] = ("background", *(str(d) for d in range(10)))

_PATCH = 64  # side of the square in which one digit is drawn
# Start and end of each part in a fixed shuffle of the 1797 digits; parts are disjoint.
_PARTS: dict[tuple[str, str], tuple[int, int]] = {
    ("source", "train"): (0, 900),
    ("source", "test"): (900, 1097),
    ("target", "train"): (1097, 1447),
    ("target", "test"): (1447, 1797),
}
_SHUFFLE_SEED = 8128


@dataclass(frozen=True)
class _Style:
    """The look of one domain; pairs are the limits of a uniform draw."""

    count: tuple[int, int]  # digits per scene, both ends included
    size: tuple[float, float]  # height of a digit in pixels
    paper: tuple[float, float]
    ink: tuple[float, float]  # how much darker than the paper, 0 to 1
    texture: float  # strength of the texture at several scales
    shade: float  # strength of the uneven light
    lines: tuple[int, int]
    blobs: tuple[int, int]
    strokes: tuple[int, int]
    clutter: tuple[float, float]  # how much darker (or lighter) the clutter is
    noise: float  # standard deviation of the pixel noise


_STYLES: dict[str, _Style] = {
    "source": _Style(
        count=(3, 5),
        size=(26.0, 44.0),
        paper=(0.70, 0.95),
        ink=(0.35, 0.80),
        texture=0.025,
        shade=0.10,
        lines=(0, 3),
        blobs=(0, 3),
        strokes=(0, 1),
        clutter=(0.03, 0.10),
        noise=0.02,
    ),
    "target": _Style(
        count=(5, 7),
        size=(26.0, 40.0),
        paper=(0.60, 0.90),
        ink=(0.14, 0.22),
        texture=0.035,
        shade=0.15,
        lines=(2, 5),
        blobs=(2, 5),
        strokes=(1, 3),
        clutter=(0.03, 0.12),
        noise=0.02,
    ),
}


@lru_cache(maxsize=1)
def _digits() -> tuple[F32, I64]:
    """The 8 x 8 digits scaled to 0..1, in a fixed shuffle, and their values."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError(
            "the demo draws its scenes from scikit-learn's digits: pip install cpseg[demo]"
        ) from error
    bunch = load_digits()
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(bunch.target))
    images = (np.asarray(bunch.images, dtype=np.float32) / 16.0)[order]
    return images, np.asarray(bunch.target, dtype=np.int64)[order]


def scenes(count: int, *, domain: Domain, seed: int, digits: Digits = "train") -> tuple[U8, U8]:
    """Compose ``count`` scenes of one domain from the digits of one part.

    Returns RGB images ``[N, H, W, 3]`` and label maps ``[N, H, W]`` with 255 as void. The four
    parts (two domains, ``train`` and ``test`` each) share no digit.
    """
    check_choice("scenes", domain, ("source", "target"), name="domain")
    check_choice("scenes", digits, ("train", "test"), name="digits")
    check_count("scenes", count, name="count", fix="ask for a scene")
    part = sorted(_PARTS).index((domain, digits))
    rng = np.random.default_rng([seed, part])
    return _compose(count, _STYLES[domain], _PARTS[domain, digits], rng)


def _compose(
    count: int, style: _Style, part: tuple[int, int], rng: np.random.Generator
) -> tuple[U8, U8]:
    """Place digits on backgrounds, ``count`` times."""
    images, values = _digits()
    per_scene = rng.integers(style.count[0], style.count[1] + 1, count)
    total = int(per_scene.sum())
    picks = rng.integers(part[0], part[1], total)
    sizes = rng.uniform(*style.size, total)
    patches = _draw_digits(images[picks], sizes, rng)
    masks = _stroke_masks(patches)

    gray = _backgrounds(count, style, rng)
    depth = rng.uniform(*style.ink, total).astype(np.float32)
    labels = np.zeros((count, HEIGHT, WIDTH), dtype=np.uint8)
    radii = 0.5 * sizes
    start = 0
    for n in range(count):
        stop = start + int(per_scene[n])
        for k, (y, x) in _place(radii[start:stop], rng):
            m = start + k
            _paste(
                gray[n],
                labels[n],
                patches[m],
                masks[m],
                int(values[picks[m]]) + 1,
                float(depth[m]),
                y,
                x,
            )
        start = stop

    gray *= _light(count, style.shade, rng)
    gray += style.noise * rng.standard_normal(gray.shape, dtype=np.float32)
    tint = 1.0 + rng.uniform(-1.0, 1.0, (count, 1, 1, 3)).astype(np.float32) * np.array(
        [0.03, 0.0, 0.06], dtype=np.float32
    )
    rgb = np.clip(gray[..., None] * tint, 0.0, 1.0)
    return np.rint(rgb * 255.0).astype(np.uint8), labels


def _draw_digits(small: F32, sizes: npt.NDArray[np.float64], rng: np.random.Generator) -> F32:
    """Draw 8 x 8 digits smoothly at the given sizes, rotated and sheared: ``[M, P, P]``."""
    m = len(small)
    angle = np.deg2rad(rng.uniform(-15.0, 15.0, m))
    shear = rng.uniform(-0.2, 0.2, m)
    aspect = rng.uniform(0.85, 1.15, m)
    # From a pixel of the patch back to the digit: undo rotation, shear and scale.
    cos, sin = np.cos(angle), np.sin(angle)
    scale_y = _PATCH / sizes
    scale_x = scale_y / aspect
    theta = np.zeros((m, 2, 3), dtype=np.float32)
    theta[:, 0, 0] = scale_x * (cos + shear * sin)
    theta[:, 0, 1] = scale_x * (sin - shear * cos)
    theta[:, 1, 0] = -scale_y * sin
    theta[:, 1, 1] = scale_y * cos
    padded = np.zeros((m, 1, 12, 12), dtype=np.float32)
    padded[:, 0, 2:10, 2:10] = small
    theta *= 8.0 / 12.0
    grid = F.affine_grid(torch.from_numpy(theta), [m, 1, _PATCH, _PATCH], align_corners=False)
    drawn = F.grid_sample(
        torch.from_numpy(padded), grid, mode="bicubic", padding_mode="zeros", align_corners=False
    )[:, 0].clamp(0.0, 1.0)
    # A soft threshold turns the blurred copy into a stroke with an even edge.
    inked: F32 = torch.sigmoid((drawn - 0.42) * 14.0).numpy()
    inked[inked < 0.02] = 0.0
    return inked


def _stroke_masks(patches: F32) -> U8:
    """1 on the stroke (dilated by a pixel), 2 on the void rim, 0 elsewhere."""
    stroke = torch.from_numpy((patches > 0.35).astype(np.float32))[:, None]
    fat = F.max_pool2d(stroke, 3, 1, 1)
    rim = F.max_pool2d(fat, 3, 1, 1)
    masks: U8 = (2.0 * rim - fat)[:, 0].numpy().astype(np.uint8)
    return masks


def _place(
    radii: npt.NDArray[np.float64], rng: np.random.Generator
) -> list[tuple[int, tuple[int, int]]]:
    """Centres of digits that do not overlap, largest first; digits without room are left out."""
    placed: list[tuple[int, tuple[int, int]]] = []
    tries = rng.uniform(size=(len(radii), 30, 2))
    for k in np.argsort(-radii, kind="stable"):
        r = radii[k]
        inset = 0.5 * r  # the border may cut a digit a little
        ys = inset + tries[k, :, 0] * (HEIGHT - 2 * inset)
        xs = inset + tries[k, :, 1] * (WIDTH - 2 * inset)
        free = np.ones(len(ys), dtype=bool)
        for other, (y, x) in placed:
            free &= np.hypot(ys - y, xs - x) > 0.95 * (r + radii[other])
        if free.any():
            first = int(np.argmax(free))
            placed.append((int(k), (int(ys[first]), int(xs[first]))))
    return placed


def _paste(
    gray: F32, label: U8, patch: F32, mask: U8, value: int, depth: float, y: int, x: int
) -> None:
    """Darken ``gray`` by one digit centred at ``(y, x)`` and write its label, in place."""
    half = _PATCH // 2
    top, left = max(0, y - half), max(0, x - half)
    bottom, right = min(HEIGHT, y + half), min(WIDTH, x + half)
    rows = slice(top - y + half, bottom - y + half)
    cols = slice(left - x + half, right - x + half)
    gray[top:bottom, left:right] *= 1.0 - depth * patch[rows, cols]
    region = label[top:bottom, left:right]
    part = mask[rows, cols]
    region[(part == 2) & (region == 0)] = VOID
    region[part == 1] = value


def _smooth_noise(count: int, cells: tuple[int, int], rng: np.random.Generator) -> F32:
    """Unit-variance noise on a coarse grid, enlarged to the scene size."""
    coarse = torch.from_numpy(rng.standard_normal((count, 1, *cells), dtype=np.float32))
    field: F32 = F.interpolate(coarse, size=(HEIGHT, WIDTH), mode="bicubic", align_corners=True)[
        :, 0
    ].numpy()
    return field


def _light(count: int, strength: float, rng: np.random.Generator) -> F32:
    """Light around 1 that falls off in one direction and varies in soft patches."""
    yy, xx = _axes()
    angle = rng.uniform(0.0, 2.0 * np.pi, (count, 1, 1)).astype(np.float32)
    ramp = np.cos(angle) * xx + np.sin(angle) * yy
    patches = np.tanh(_smooth_noise(count, (3, 4), rng))
    return np.asarray(1.0 + strength * (0.8 * ramp + 0.5 * patches), dtype=np.float32)


def _axes() -> tuple[F32, F32]:
    """Pixel coordinates: rows in -0.75..0.75, columns in -1..1."""
    yy = (np.arange(HEIGHT, dtype=np.float32)[:, None] - HEIGHT / 2) / (WIDTH / 2)
    xx = (np.arange(WIDTH, dtype=np.float32)[None, :] - WIDTH / 2) / (WIDTH / 2)
    return yy, xx


def _backgrounds(count: int, style: _Style, rng: np.random.Generator) -> F32:
    """Paper with texture at three scales, ruled lines, stains and stray strokes."""
    gray = np.empty((count, HEIGHT, WIDTH), dtype=np.float32)
    gray[:] = rng.uniform(*style.paper, (count, 1, 1))
    for cells, weight in (((6, 8), 0.6), ((16, 21), 0.5), ((40, 54), 0.4)):
        gray += style.texture * weight * _smooth_noise(count, cells, rng)
    yy, xx = _axes()
    for n in range(count):
        for _ in range(int(rng.integers(style.blobs[0], style.blobs[1] + 1))):
            _blob(gray[n], yy, xx, style, rng)
        for _ in range(int(rng.integers(style.lines[0], style.lines[1] + 1))):
            _line(gray[n], yy, xx, style, rng)
        for _ in range(int(rng.integers(style.strokes[0], style.strokes[1] + 1))):
            _stroke(gray[n], style, rng)
    return gray


def _amount(style: _Style, rng: np.random.Generator, lighter: float) -> float:
    """How much a piece of clutter darkens the paper; negative with probability ``lighter``."""
    amount = float(rng.uniform(*style.clutter))
    return -amount if rng.uniform() < lighter else amount


def _blob(gray: F32, yy: F32, xx: F32, style: _Style, rng: np.random.Generator) -> None:
    """Add a soft elliptical stain to ``gray``, in place."""
    cy, cx = rng.uniform(-0.75, 0.75), rng.uniform(-1.0, 1.0)
    ry, rx = rng.uniform(0.08, 0.35, 2)
    inside = 1.0 - np.hypot((yy - cy) / ry, (xx - cx) / rx)
    gray *= 1.0 - np.float32(_amount(style, rng, 0.4)) * np.clip(inside * 4.0, 0.0, 1.0)


def _line(gray: F32, yy: F32, xx: F32, style: _Style, rng: np.random.Generator) -> None:
    """Draw a thin straight line across ``gray``, in place."""
    angle = rng.uniform(0.0, np.pi)
    offset, width = rng.uniform(-0.8, 0.8), rng.uniform(0.008, 0.02)
    away = np.abs(np.float32(np.cos(angle)) * xx + np.float32(np.sin(angle)) * yy - offset)
    gray *= 1.0 - np.float32(_amount(style, rng, 0.3)) * np.clip(2.0 - away / width, 0.0, 1.0)


def _stroke(gray: F32, style: _Style, rng: np.random.Generator) -> None:
    """Draw a curved distractor, about as wide as a digit's stroke, on ``gray``, in place."""
    t = np.linspace(0.0, 1.0, 24, dtype=np.float32)[:, None]
    centre = rng.uniform((0.0, 0.0), (HEIGHT, WIDTH))
    a, b, c = (centre + rng.uniform(-18.0, 18.0, (3, 2))).astype(np.float32)
    path = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
    width = rng.uniform(1.2, 2.4)
    low = np.maximum(np.floor(path.min(axis=0) - 6), 0).astype(int)
    high = np.minimum(np.ceil(path.max(axis=0) + 6), (HEIGHT, WIDTH)).astype(int)
    if (high <= low).any():
        return
    ys = np.arange(low[0], high[0], dtype=np.float32)[:, None, None]
    xs = np.arange(low[1], high[1], dtype=np.float32)[None, :, None]
    away = np.sqrt(((ys - path[:, 0]) ** 2 + (xs - path[:, 1]) ** 2).min(axis=2))
    gray[low[0] : high[0], low[1] : high[1]] *= 1.0 - np.float32(
        _amount(style, rng, 0.2)
    ) * np.clip(1.5 - away / np.float32(width), 0.0, 1.0)
