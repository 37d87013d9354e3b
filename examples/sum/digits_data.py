"""A small data set to try the example: digit scenes with coarse masks that are wrong at edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from cpseg.demo import digit_scenes
from cpseg.files import VOID, atomic, write_ids, write_mask, write_tensors, write_text


def make(folder: Path, counts: dict[str, int], seed: int) -> None:
    """Write ``counts[part]`` scenes for labelled, unlabelled and val, unless they are there."""
    done = folder / "digits.txt"
    recipe = f"{sorted(counts.items())} seed {seed}\n"
    if done.is_file() and done.read_text() == recipe:
        return
    done.unlink(missing_ok=True)  # until all scenes are written, none of them count
    for number, (part, count) in enumerate(sorted(counts.items())):
        rng = np.random.default_rng([seed, number])
        digits = "test" if part == "val" else "train"
        images, labels = digit_scenes(count, domain="source", seed=seed + number, digits=digits)
        lines = []
        for k, (image, label) in enumerate(zip(images, labels, strict=True)):
            name = f"{part}_{k:04d}"
            lines.append((f"images/{name}.png", f"masks/{name}.png"))
            objects = _objects(label)
            with atomic(folder / lines[-1][0]) as file:
                Image.fromarray(image).save(file, format="PNG")
            write_mask(folder / lines[-1][1], torch.from_numpy(objects))
            if part != "val":
                coarse = np.stack([_coarse(objects == v, rng) for v in range(1, _count(objects))])
                path = folder / "coarse" / "images" / f"{name}.safetensors"
                write_tensors(path, {"logits": torch.from_numpy(coarse)}, {})
        if part == "unlabelled":  # its masks are only for viewing; the list does not contain them
            write_text(folder / "unlabelled.txt", "".join(f"{image}\n" for image, _ in lines))
        else:
            write_ids(folder / f"{part}.txt", lines)
    write_text(done, recipe)


def _count(objects: np.ndarray) -> int:
    return int(objects[objects != VOID].max()) + 1


def _objects(label: np.ndarray) -> np.ndarray:
    """One number per digit; the rim of digits becomes background, specks become void."""
    parts, count = ndimage.label((label > 0) & (label != VOID), structure=np.ones((3, 3)))
    objects = np.zeros_like(label)
    number = 0
    for k in range(1, count + 1):
        large = (parts == k).sum() >= 40
        number += int(large)
        objects[parts == k] = number if large else VOID
    return objects


def _coarse(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Logits that enlarge a mask, close its small holes and vary along its edge."""
    distance = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
    swollen = ndimage.gaussian_filter(distance, 1.5) + 0.8
    waver = ndimage.gaussian_filter(rng.standard_normal(mask.shape), 3.0)
    logits: np.ndarray = 3.0 * (swollen + 0.5 * waver / waver.std())
    return logits.clip(-20, 20).astype(np.float32)
