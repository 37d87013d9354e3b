"""Mistakes that break the guarantee of coverage, on simulated data, next to the correct procedure.

For every row it repeats: draw calibration images, calibrate, measure on fresh images. It prints the
mean coverage over the repetitions with its standard error. The seeds are fixed.

    python benchmarks/broken_promises.py             one Markdown table, in about a minute
    python benchmarks/broken_promises.py shift       the rows whose name contains a word
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import beta
from torch import Tensor

from cpseg import Calibrator, conformal_quantile, conformal_rank, coverage, groups, nonconformity

Images = tuple[Tensor, Tensor]


@dataclass
class Row:
    name: str
    promised: float
    broken: list[float]
    mended: list[float]
    remedy: str
    note: str = ""


def draw(
    images: int,
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    num_classes: int = 4,
    noise: float = 1.0,
    shared: float = 0.0,
) -> Images:
    """Softmax probabilities of a model with noisy logits; images are hard or easy.

    The noise of an image has the factor ``noise * exp(shared * z)``, with one normal z per image.
    """
    labels = torch.randint(num_classes, (images, *size), generator=generator)
    level = noise * torch.exp(shared * torch.randn(images, 1, 1, 1, generator=generator))
    logits = level * torch.randn(images, num_classes, *size, generator=generator)
    logits.scatter_add_(1, labels[:, None], torch.full((images, 1, *size), 2.0))
    return logits.softmax(1), labels


def covered(map_: Tensor, alpha: float, images: Images, fresh: Images, **settings: Any) -> float:
    """Coverage of the labelled pixels of fresh images, calibrated with ``Calibrator``."""
    calibrator = Calibrator(map_, alpha=alpha, **settings)
    calibrator.update(*images)
    return float(coverage(calibrator.compute().prediction_set(fresh[0]), fresh[1]))


def learned_groups(repeats: int, generator: torch.Generator) -> Row:
    """All cells are alike, so groups learn only noise; measures the group of lowest scores."""
    size, n, alpha = (16, 16), 20, 0.2
    broken, mended = [], []
    for _ in range(repeats):
        images, others = draw(n, size, generator), draw(n, size, generator)
        fresh = draw(20, size, generator)
        for learn, found in ((images, broken), (others, mended)):
            curves = groups.curves(nonconformity(*learn), levels=20)
            learned = groups.kmeans(curves, 20, generator=generator)
            lowest = fresh[0], fresh[1].masked_fill(learned != 0, 255)
            found.append(covered(learned, alpha, images, lowest, unit="image"))
    name = "k-means groups learned on the 20 calibration images, the lowest group"
    return Row(name, 1 - alpha, broken, mended, "learned on 20 other images")


def linear_map(features: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Multinomial regression of the labels on features ``[B, K, H, W]``, with a tiny penalty."""
    rows = features.movedim(1, -1).flatten(0, -2)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    weight = torch.zeros(rows.shape[1], features.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(rows @ weight, labels.flatten())
        value = value + 1e-5 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)  # type: ignore[arg-type]
    matrix = weight.detach()

    def apply(other: Tensor) -> Tensor:
        scores = torch.einsum("bkhw,kc->bchw", other, matrix[:-1])
        return (scores + matrix[-1].reshape(1, -1, 1, 1)).softmax(1)

    return apply


def tuned_model(repeats: int, generator: torch.Generator) -> Row:
    """A linear map of 8 log scores, fitted on the 19 images of 16 pixels used for calibration."""
    size, n, alpha = (4, 4), 19, 0.1
    broken, mended = [], []
    for _ in range(repeats):
        images, others, fresh = (
            draw(count, size, generator, num_classes=8, noise=2) for count in (n, n, 20)
        )
        for fit, found in ((images, broken), (others, mended)):
            tuned = linear_map(fit[0].log(), fit[1])
            calibrate, look = ((tuned(p.log()), y) for p, y in (images, fresh))
            found.append(covered(groups.pixel(size), alpha, calibrate, look))
    remedy = "fitted on 19 other images"
    return Row("scores refitted on the 19 calibration images", 1 - alpha, broken, mended, remedy)


def cross_fitted(repeats: int, generator: torch.Generator) -> Row:
    """The same 19 images for fit and calibration: at once, or each mapped by a fit on others."""
    size, n, alpha, folds = (4, 4), 19, 0.1, 5
    broken, mended = [], []
    for _ in range(repeats):
        (probs, labels), fresh = (
            draw(count, size, generator, num_classes=8, noise=2) for count in (n, 20)
        )
        whole = linear_map(probs.log(), labels)
        look = whole(fresh[0].log()), fresh[1]
        broken.append(covered(groups.pixel(size), alpha, (whole(probs.log()), labels), look))
        scored = torch.empty_like(probs)
        for fold in range(folds):
            inside = torch.arange(n) % folds == fold
            own = linear_map(probs[~inside].log(), labels[~inside])
            scored[inside] = own(probs[inside].log())
        mended.append(covered(groups.pixel(size), alpha, (scored, labels), look))
    remedy = "each scored by a map of the other folds; close, and no promise"
    return Row("the same, by five folds", 1 - alpha, broken, mended, remedy)


def student(features: Tensor, train: tuple[Tensor, Tensor]) -> Tensor:
    """A student that memorises: probabilities by kernel votes of the training pixels."""
    rows, labels = (part.movedim(1, -1).flatten(0, -2) for part in train)
    asked = features.movedim(1, -1)
    weight = torch.exp(-10 * torch.cdist(asked.flatten(0, -2), rows).square())
    votes = weight @ labels + 0.01
    probs = votes / votes.sum(1, keepdim=True)
    return probs.reshape(*asked.shape[:-1], labels.shape[1]).movedim(-1, 1)


def training_pixels(repeats: int, generator: torch.Generator) -> Row:
    """The student memorises its training pixels and is more confident there than elsewhere."""
    size, n, alpha = (4, 4), 19, 0.1
    broken, mended = [], []
    for _ in range(repeats):
        train, held_out, fresh = (
            draw(count, size, generator, num_classes=3) for count in (n, n, 20)
        )
        one_hot = torch.nn.functional.one_hot(train[1], 3).movedim(-1, 1).float()
        known = (train[0].log(), one_hot)
        look = (student(fresh[0].log(), known), fresh[1])
        for images, found in ((train, broken), (held_out, mended)):
            calibrate = (student(images[0].log(), known), images[1])
            found.append(covered(groups.pixel(size), alpha, calibrate, look))
    remedy = "calibrated on 19 held-out images"
    return Row("a student calibrated on its own training pixels", 1 - alpha, broken, mended, remedy)


def shift(repeats: int, generator: torch.Generator) -> Row:
    size, n, alpha = (16, 16), 39, 0.1
    broken, mended = [], []
    for _ in range(repeats):
        fresh = draw(10, size, generator, noise=1.5)
        for noise, found in ((1.0, broken), (1.5, mended)):
            images = draw(n, size, generator, noise=noise)
            found.append(covered(groups.pixel(size), alpha, images, fresh))
    remedy = "calibrated on images like the new ones"
    return Row(
        "shift: half as much noise again in the new images", 1 - alpha, broken, mended, remedy
    )


def dependence(repeats: int, generator: torch.Generator) -> Row:
    size, n, alpha = (16, 16), 5, 0.2
    broken, mended = [], []
    for _ in range(repeats):
        images = draw(n, size, generator, shared=1.2)
        fresh = draw(200, size, generator, shared=1.2)
        for unit, found in (("pixel", broken), ("image", mended)):
            found.append(covered(groups.image(size), alpha, images, fresh, unit=unit))
    pixels = n * size[0] * size[1]
    rank = conformal_rank(pixels, alpha)
    law = float(beta(rank, pixels + 1 - rank).std())
    note = (
        f"; standard deviation over calibrations {statistics.stdev(broken):.3f} for the "
        f"{law:.3f} of independent pixels, {statistics.stdev(mended):.3f} mended"
    )
    return Row(
        "one quantile of all pixels of 5 images", 1 - alpha, broken, mended, 'unit="image"', note
    )


def plain_quantile(repeats: int, generator: torch.Generator) -> Row:
    size, n, alpha = (16, 16), 10, 0.1
    broken, mended = [], []
    for _ in range(repeats):
        scores = nonconformity(*draw(n, size, generator))
        fresh = nonconformity(*draw(10, size, generator))
        for rule, found in (("linear", broken), ("conformal", mended)):
            threshold = conformal_quantile(scores, alpha, rule=rule)
            found.append(float((fresh <= threshold).float().mean()))
    return Row(
        "the interpolated quantile with 10 images", 1 - alpha, broken, mended, "the conformal one"
    )


def fallen_back(repeats: int, generator: torch.Generator) -> Row:
    """Hard cells with few labels get the threshold of a group of easier cells."""
    size, n, alpha = (8, 8), 30, 0.1
    rare = torch.zeros(size, dtype=torch.bool)
    rare[:2] = True

    def world(images: int, labelled: float) -> Images:
        easy, hard = (draw(images, size, generator, noise=noise) for noise in (1.0, 2.5))
        probs, labels = (torch.where(rare, h, e) for h, e in zip(hard, easy, strict=True))
        void = rare & (torch.rand(images, *size, generator=generator) > labelled)
        return probs, labels.masked_fill(void, 255)

    broken, mended = [], []
    for _ in range(repeats):
        images, (probs, labels) = world(n, 0.2), world(20, 1.0)
        fresh = probs, labels.masked_fill(~rare, 255)
        for coarser, found in ((groups.image(size), broken), (rare.long(), mended)):
            calibrated = covered(
                groups.pixel(size), alpha, images, fresh, fallback=[coarser], unit="image"
            )
            found.append(calibrated)
    remedy = "fallback to a group of their own kind"
    return Row("hard cells that fell back to the image", 1 - alpha, broken, mended, remedy)


def rare_class(repeats: int, generator: torch.Generator) -> Row:
    size, n, alpha = (16, 16), 100, 0.1

    def world(images: int) -> Images:
        """Class 1 is one pixel in five, and the model gives it low probabilities."""
        labels = (torch.rand(images, *size, generator=generator) < 0.2).long()
        logit = torch.randn(images, *size, generator=generator) + 2.5 * labels - 2
        return torch.stack([(-logit).sigmoid(), logit.sigmoid()], 1), labels

    broken, mended = [], []
    for _ in range(repeats):
        images, (probs, labels) = world(n), world(20)
        fresh = probs, labels.masked_fill(labels == 0, 255)
        for per_class, found in ((False, broken), (True, mended)):
            found.append(covered(groups.pixel(size), alpha, images, fresh, per_class=per_class))
    return Row("a rare class, one threshold for all", 1 - alpha, broken, mended, "per_class=True")


WORLDS: dict[str, tuple[Callable[[int, torch.Generator], Row], int]] = {
    "groups": (learned_groups, 100),
    "tuned": (tuned_model, 150),
    "training": (training_pixels, 200),
    "shift": (shift, 100),
    "dependence": (dependence, 600),
    "quantile": (plain_quantile, 100),
    "fallback": (fallen_back, 200),
    "rare": (rare_class, 40),
    "folds": (cross_fitted, 60),
}


def table(word: str = "", share: float = 1.0) -> list[str]:
    """Lines of Markdown, from a ``share`` of the repetitions, at least two."""
    lines = ["| what | promised | measured | mended | how |", "|---|---:|---:|---:|---|"]
    for seed, (name, (world, repeats)) in enumerate(WORLDS.items()):
        if word not in name:
            continue
        row = world(max(2, round(share * repeats)), torch.Generator().manual_seed(seed))
        said = []
        for found in (row.broken, row.mended):
            error = statistics.stdev(found) / len(found) ** 0.5
            said.append(f"{statistics.mean(found):.3f} ± {error:.3f}")
        lines.append(
            f"| {row.name} | {row.promised:.2f} | {said[0]} | {said[1]} | {row.remedy}{row.note} |"
        )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "word", nargs="?", default="", help="only rows with this word in their name"
    )
    print("\n".join(table(parser.parse_args().word)))
