"""Do argmax and masks agree, and would they agree better under other class numbers?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cpseg.jobs.check_findings import ClassShare, Finding, classes_text, ok, percent, warning
from cpseg.jobs.check_masks import Lookup

Counts = npt.NDArray[Any]  # [images, K, K]: pixels of each true class and argmax
GAIN = 0.1  # agreement on the pixels of the classes that another numbering must gain
_BETTER = 0.8  # share of the images with such pixels in which it must be better
# Confidence of a t-test over images that the gain is there. A numbering is the best of many, which
# asks for more. With models of 40 % agreement that err by whole regions, simulated, fewer than 2 in
# 100 data sets are then told of a numbering that is not there (tests/jobs/test_check.py).
_SURE_OF_SHIFT, _SURE_OF_NUMBERING = 0.99, 0.999
_FEWEST_IMAGES, _FEWEST_PIXELS = 3, 100
_CHANCE = 0.05  # agreement beyond that of chance, below which nothing is recognised


def joint_counts(values: npt.NDArray[Any], argmax: npt.NDArray[Any], num_classes: int) -> Counts:
    """Pixels of each mask value and argmax ``[256, K]``; the mask is sampled at the argmax's grid.

    Args:
        values: of the mask, uint8 ``[H, W]``.
        argmax: ``[h, w]`` over the same image, in 0..K-1.
        num_classes: K.
    """
    near = at_size(values, (argmax.shape[0], argmax.shape[1])).astype(np.int64)
    both = near * num_classes + argmax
    counts: Counts = np.bincount(both.ravel(), minlength=256 * num_classes)
    counts.shape = (256, num_classes)
    return counts


def at_size(values: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """A map ``[H, W]`` at another size, nearest."""
    rows = ((np.arange(size[0]) + 0.5) * values.shape[0] / size[0]).astype(np.int64)
    columns = ((np.arange(size[1]) + 0.5) * values.shape[1] / size[1]).astype(np.int64)
    sampled: npt.NDArray[Any] = values[rows[:, None], columns]
    return sampled


def confusions(joints: Sequence[Counts], lookup: Lookup) -> Counts:
    """Pixels of every true class and argmax, ``[images, K, K]``."""
    num_classes = joints[0].shape[1]
    counts = np.zeros((len(joints), num_classes, num_classes), np.int64)
    for value, target in enumerate(lookup):
        if 0 <= target < num_classes:
            for number, joint in enumerate(joints):
                counts[number, target] += joint[value]
    return counts


def agreement(counts: Counts) -> float:
    """Share of the labelled pixels where argmax and mask agree; NaN without any."""
    pooled = counts.sum(0)
    return float(np.trace(pooled) / pooled.sum()) if pooled.sum() else float("nan")


def mean_iou(counts: Counts) -> float:
    """Mean IoU over the classes that masks have; NaN without any."""
    pooled = counts.sum(0)
    labelled = pooled.sum(1)
    union = labelled + pooled.sum(0) - np.diag(pooled)
    present = labelled > 0
    if not present.any():
        return float("nan")
    return float((np.diag(pooled)[present] / union[present]).mean())


def class_shares(counts: Counts) -> tuple[ClassShare, ...]:
    """A line for each class."""
    pooled = counts.sum(0)
    total, labelled, found = max(1, pooled.sum()), pooled.sum(1), pooled.sum(0)
    lines = []
    for index in range(len(pooled)):
        right = pooled[index, index]
        recall = float(right / labelled[index]) if labelled[index] else float("nan")
        lines.append(
            ClassShare(index, float(labelled[index] / total), float(found[index] / total), recall)
        )
    return tuple(lines)


def better_numbering(counts: Counts) -> tuple[int, ...]:
    """For every class of the masks, the class of the scores that looks like it.

    The assignment, by the Hungarian method, that agrees best, where a class that is given another
    number must gain 10 points of agreement over its pixels for it (on average over the classes
    that change places with each other). Of these changes only those remain that more than chance
    over images speaks for: a t-test is 99.9 % sure of the gain, and it is there in four of five
    images that have such pixels, and in three images at least, if there are three. Of a change
    of more than two classes, a swap of two is taken where it has half of the gain.
    """
    from scipy.optimize import linear_sum_assignment

    pooled = counts.sum(0).astype(float)
    worth = pooled + np.diag(GAIN * pooled.sum(1)) + 1e-6 * np.eye(len(pooled))
    _, assigned = linear_sum_assignment(worth, maximize=True)
    chosen = list(range(len(pooled)))
    for cycle in _cycles([int(each) for each in assigned]):
        places = [int(assigned[each]) for each in cycle]
        if len(cycle) > 2:
            cycle, places = _simplest(pooled, cycle, places)
        if len(cycle) > 1 and _is_better(counts, cycle, places, _SURE_OF_NUMBERING):
            for each, place in zip(cycle, places, strict=True):
                chosen[each] = place
    return tuple(chosen)


def _simplest(pooled: Counts, cycle: list[int], places: list[int]) -> tuple[list[int], list[int]]:
    """Two of the classes alone, where both gain by a swap, and half of the gain is theirs."""

    def gain(rows: Sequence[int], columns: Sequence[int]) -> float:
        return float((pooled[rows, columns] - pooled[rows, rows]).sum())

    def both_gain(pair: Sequence[int]) -> bool:
        a, b = pair
        return all(gain([x], [y]) >= GAIN * pooled[x].sum() for x, y in ((a, b), (b, a)))

    pairs = [[a, b] for at, a in enumerate(cycle) for b in cycle[at + 1 :]]
    pairs = [pair for pair in pairs if both_gain(pair)]
    best = max(pairs, key=lambda pair: gain(pair, pair[::-1]), default=None)
    if best and 2 * gain(best, best[::-1]) >= gain(list(cycle), list(places)):
        return best, best[::-1]
    return cycle, places


def best_shift(counts: Counts) -> int:
    """1 where class i of the scores looks like class i + 1 of the masks, -1 where like i - 1, or 0.

    By the rule of :func:`better_numbering`, over all classes together and with 99 %.
    """
    classes = np.arange(counts.shape[1])
    shares = {}
    for shift in (1, -1):
        places = (classes - shift) % len(classes)
        if len(classes) > 2 and _is_better(counts, classes, places, _SURE_OF_SHIFT):
            shares[shift] = float(counts.sum(0)[classes, places].sum())
    return max(shares, key=lambda shift: shares[shift]) if shares else 0


def _is_better(
    counts: Counts, classes: Sequence[int] | Any, places: Sequence[int] | Any, sure: float
) -> bool:
    """Whether classes of the masks agree better with others of the scores than with theirs.

    Args:
        counts: ``[images, K, K]``.
        classes: of the masks.
        places: of the scores, one for each.
        sure: confidence of the t-test over images that the gain is positive.
    """
    from scipy.special import stdtrit

    rows = np.asarray(classes)
    gained = (counts[:, rows, np.asarray(places)] - counts[:, rows, rows]).sum(1)
    pixels = counts[:, rows].sum((1, 2))
    there = pixels > 0
    gained, pixels = gained[there].astype(float), pixels[there].astype(float)
    images = len(pixels)
    if images < min(_FEWEST_IMAGES, len(counts)) or pixels.sum() < _FEWEST_PIXELS:
        return False
    needed = float(stdtrit(max(1, images - 1), sure))  # standard errors
    gain = gained.sum() / pixels.sum()
    rest = gained - gain * pixels  # of the ratio estimator
    spread = np.sqrt(images / max(1, images - 1) * (rest**2).sum()) / pixels.sum()
    often = (gained > 0).mean() >= _BETTER
    return bool(gain >= GAIN and gain > needed * spread and often)


def _cycles(assigned: Sequence[int]) -> list[list[int]]:
    """The classes that change places with each other."""
    left, cycles = set(range(len(assigned))), []
    while left:
        cycle = [min(left)]
        while (following := assigned[cycle[-1]]) != cycle[0]:
            cycle.append(following)
        cycles.append(cycle)
        left -= set(cycle)
    return cycles


def renumbered(counts: Counts, places: Sequence[int]) -> Counts:
    """The counts if class i of the masks were class ``places[i]`` of the scores."""
    return counts[:, :, list(places)]


def agreement_findings(prefix: str, counts: Counts) -> list[Finding]:
    """What to say of how well argmax and masks agree."""
    share = agreement(counts)
    if share != share:
        return []
    said = f"{prefix}argmax and masks agree on {percent(share)} of the labelled pixels"
    said += f" (mIoU {mean_iou(counts):.2f})"
    found = _numbering_findings(prefix, counts)
    pooled = counts.sum(0)
    by_chance = float((pooled.sum(0) * pooled.sum(1)).sum() / float(pooled.sum()) ** 2)
    comparable = (pooled.sum(1) > 0).sum() > 1
    if not found and comparable and share < by_chance + _CHANCE:
        text = f"{said}, by chance it would be {percent(by_chance)}: are these masks and "
        text += "scores of the same images and classes?"
        return [warning("agreement", text)]
    return [ok("agreement", said), *found]


def _numbering_findings(prefix: str, counts: Counts) -> list[Finding]:
    """Whether the class numbers of the scores seem to be others than those of the masks."""
    num_classes, before = counts.shape[1], agreement(counts)
    shift, places = best_shift(counts), better_numbering(counts)
    moved = [each for each in range(num_classes) if places[each] != each]
    if shift:
        shifted = [(each - shift) % num_classes for each in range(num_classes)]
        after = agreement(renumbered(counts, shifted))
        if not moved or after > agreement(renumbered(counts, places)) - GAIN / 2:
            return [_shifted(prefix, shift, before, after)]
    found = []
    for cycle in _cycles(places):
        if len(cycle) < 2:
            continue
        rows = counts[:, cycle]
        pixels = rows.sum()
        old = float(counts[:, cycle, cycle].sum() / pixels)
        new = float(counts[:, cycle, [places[each] for each in cycle]].sum() / pixels)
        change = (
            f"(they would agree on {percent(new)} of these classes' pixels, not {percent(old)})"
        )
        if len(cycle) == 2 and counts[:, cycle[0]].sum() and counts[:, cycle[1]].sum():
            text = f"{prefix}{classes_text(sorted(cycle))} look swapped in masks or scores {change}"
        else:
            pairs = [
                f"{places[each]} like {each}" for each in sorted(cycle) if counts[:, each].sum()
            ]
            text = f"{prefix}other class numbers: of the scores, class {', '.join(pairs[:6])}"
            text += f"{' and so on' if len(pairs) > 6 else ''} of the masks {change}"
        found.append(warning("permutation", f"{text}; renumber them with --class-map"))
    return found


def _shifted(prefix: str, shift: int, before: float, after: float) -> Finding:
    of_scores, of_masks = ("i", "i+1") if shift == 1 else ("i+1", "i")
    text = f"{prefix}class {of_scores} of the scores looks like class {of_masks} of the masks: "
    text += "masks or scores are shifted by one (they would agree on "
    text += f"{percent(after)} of pixels, not {percent(before)})"
    if shift == 1:
        text += "; pass --first-class 1 if ids in masks start at 1"
    else:
        text += "; drop the scores' first class or renumber by --mask-map"
    return warning("shift", text)
