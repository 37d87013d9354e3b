"""Streaming stores: what a calibration keeps of the scores it has seen.

All three take ``update(scores, classes)``, merge exactly, and give the same quantile for every
split of the images into batches, orders, merge trees and ranks.

- :class:`TopScores`: one score per image and cell; the largest few of each cell, exact.
- :class:`ClassScores`: the same per class; keeps all scores with their class, exact.
- :class:`BinnedScores`: many scores per image and group; counts in fixed bins, rounded up.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cpseg._internal.distributed import all_gather_ints, all_reduce_sum, gather_blocks, gather_rows
from cpseg._internal.tiling import tiles
from cpseg.core.quantiles import from_top, from_top_of_counts, top_quantile
from cpseg.core.score_bins import NUM_BINS, bin_edges, score_bins
from cpseg.groups.resampling import to_image

Size = tuple[int, int]
_WAITING = 48  # images that wait to be absorbed together: a pass over what is kept costs the same


def _total_images(own: int, device: torch.device, group: dist.ProcessGroup | None) -> int:
    return sum(images[0] for images in all_gather_ints([own], device, group))


def _stack(blocks: list[Tensor], cells: slice) -> Tensor:
    """One tile of several ``[n, cells]`` blocks as ``[rows, tile]``."""
    return torch.cat([block[:, cells] for block in blocks])


def _size(maps: Tensor) -> Size:
    return maps.shape[-2], maps.shape[-1]


class TopScores:
    """The largest scores of every cell of a grid, where each image has at most one score per cell.

    With ``max_images`` N the ``floor(alpha (N + 1))`` largest are kept, which is exact for every
    alpha up to the one given; without it all are kept. New images wait in ``_pending`` and are
    absorbed a few dozen at a time, tile by tile, so that a step costs little more than the copy.
    """

    def __init__(
        self, size: Size, *, alpha: Fraction, max_images: int | None, device: torch.device
    ) -> None:
        self.size = size
        self.images = 0
        self.keep = None if max_images is None else from_top(max_images, alpha)
        cells = size[0] * size[1]
        self._top = torch.empty(0 if self.keep is None else self.keep, cells, device=device)
        self._filled = 0
        self._count = torch.zeros(cells, dtype=torch.int64, device=device)
        self._pending: list[Tensor] = []  # with max_images: one block, the used part of _room
        waiting = 0 if max_images is None else min(_WAITING, max_images)
        self._room = torch.empty(waiting, cells, device=device)

    def update(self, scores: Tensor, classes: Tensor | None) -> None:
        """Take scores ``[B, H, W]``, NaN where there is none; the tensor may be kept."""
        self.images += len(scores)
        self._take(scores.flatten(1))

    def merge(self, other: TopScores) -> None:
        """Take all that ``other`` has seen; ``other`` stays as it is."""
        self.images += other.images
        self._count += other._count
        self._absorb([other._top[: other._filled]], counted=True)
        for block in other._pending:
            self._take(block)

    def sync(self, group: dist.ProcessGroup | None) -> None:
        """Merge over the ranks of ``group``; every rank then holds the whole."""
        if self.keep is None:
            self._pending = gather_blocks(self._pending, self._top, torch.nan, group)
        else:
            self._absorb_pending()
            self._sync_top(self.keep, group)
        self._count = all_reduce_sum(self._count, group)
        self.images = _total_images(self.images, self._count.device, group)

    def quantile(self, alpha: Fraction) -> tuple[Tensor, Tensor]:
        """Threshold and number of scores of every cell, ``[H, W]`` each."""
        blocks = [self._top[: self._filled], *self._pending]
        rows = sum(map(len, blocks))
        count = self._count.clone()
        threshold = torch.full_like(count, torch.inf, dtype=torch.float32)
        for cells in tiles(len(count) if rows else 0, rows):
            scores = _stack(blocks, cells)
            missing = scores.isnan()
            count[cells] += rows - self._filled - missing[self._filled :].sum(0)
            scores.masked_fill_(missing, -torch.inf)
            threshold[cells] = top_quantile(scores, count[cells], alpha, most=self.images)
        return threshold.reshape(self.size), count.reshape(self.size)

    @property
    def complete(self) -> bool:
        """Whether every score seen is still here."""
        return self.keep is None or self.images <= self.keep

    def at_least(self, scores: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor]:
        """How many scores of a pixel's cell are at least its own, ``[B, h, w]``; of how many.

        One pass over the batch for every image kept; ``scores`` may have any size.
        """
        found = torch.zeros_like(scores, dtype=torch.int64)
        count = self._count.clone()
        for block in (self._top[: self._filled], *self._pending):
            for row in block:
                found += to_image(row.reshape(self.size), _size(scores)) >= scores
        for block in self._pending:
            count += (~block.isnan()).sum(0)
        return found, to_image(count.reshape(self.size), _size(scores)).expand(scores.shape)

    def _sync_top(self, keep: int, group: dist.ProcessGroup | None) -> None:
        counts = all_gather_ints([self._filled], self._top.device, group)
        most = max(count[0] for count in counts)
        rows = most * len(counts)
        own, self._filled = self._filled, min(keep, rows)
        for cells in tiles(self._top.shape[1] if rows else 0, rows):
            scores = gather_rows(self._top[:own, cells], most, -torch.inf, group)
            if rows > self._filled:
                scores = _largest(scores, self._filled)
            self._top[: self._filled, cells] = scores

    def _take(self, rows: Tensor) -> None:
        """Let rows wait; absorb those that do when there is no more room."""
        if self.keep is None:
            self._pending.append(rows)
            return
        while len(rows) > 0:
            used = sum(map(len, self._pending))
            part = rows[: len(self._room) - used]
            self._room[used : used + len(part)] = part
            self._pending = [self._room[: used + len(part)]]
            rows = rows[len(part) :]
            if used + len(part) == len(self._room):
                self._absorb_pending()

    def _absorb_pending(self) -> None:
        pending, self._pending = self._pending, []
        self._absorb(pending, counted=False)

    def _absorb(self, blocks: list[Tensor], *, counted: bool) -> None:
        """Keep the largest of what is there and what comes, in place; count what is new."""
        rows = sum(map(len, blocks))
        if self.keep is None or rows == 0:
            return
        filled = min(self._filled + rows, self.keep)
        for cells in tiles(len(self._count), self._filled + rows):
            fresh = _stack(blocks, cells)
            missing = fresh.isnan()
            if not counted:
                self._count[cells] += rows - missing.sum(0)
            fresh.masked_fill_(missing, -torch.inf)
            if filled == self._filled + rows:
                self._top[self._filled : filled, cells] = fresh
            elif filled > 0:
                both = torch.cat([self._top[: self._filled, cells], fresh])
                self._top[:, cells] = _largest(both, filled)
        self._filled = filled


def _largest(scores: Tensor, rows: int) -> Tensor:
    """The ``rows`` largest of every column, in any order."""
    if rows == 1:
        return scores.amax(0, keepdim=True)
    columns = scores.T.contiguous()
    if columns.device.type == "cpu":  # NumPy selects with vector instructions
        behind = columns.shape[1] - rows
        selected = np.partition(columns.numpy(), behind, axis=1)[:, behind:]
        return torch.from_numpy(selected).T
    return columns.topk(rows, sorted=False).values.T


class ClassScores:
    """All scores of every cell with their class, for thresholds per cell and class.

    Keeping the largest few of every class would hold as much: at most one score per image and
    cell, whatever its class.
    """

    complete = True

    def __init__(self, size: Size, *, num_classes: int, device: torch.device) -> None:
        self.size = size
        self.num_classes = num_classes
        self.images = 0
        self._device = device
        self._scores: list[Tensor] = []
        self._classes: list[Tensor] = []

    def update(self, scores: Tensor, classes: Tensor | None) -> None:
        """Take scores ``[B, H, W]``, NaN where there is none, with their classes."""
        assert classes is not None
        self.images += len(scores)
        # Void pixels get a class of their own, behind the others.
        classes = classes.masked_fill(scores.isnan(), self.num_classes)
        self._scores.append(scores.flatten(1))
        self._classes.append(classes.flatten(1).to(torch.int16))

    def merge(self, other: ClassScores) -> None:
        """Take all that ``other`` has seen; ``other`` stays as it is."""
        self.images += other.images
        self._scores += other._scores
        self._classes += other._classes

    def sync(self, group: dist.ProcessGroup | None) -> None:
        """Merge over the ranks of ``group``; every rank then holds the whole."""
        empty = torch.empty(0, self.size[0] * self.size[1], device=self._device)
        self._scores = gather_blocks(self._scores, empty, torch.nan, group)
        # Not every backend carries int16.
        wide = [block.to(torch.int32) for block in self._classes]
        rows = gather_blocks(wide, empty.to(torch.int32), self.num_classes, group)
        self._classes = [block.to(torch.int16) for block in rows]
        self.images = _total_images(self.images, self._device, group)

    def quantile(self, alpha: Fraction) -> tuple[Tensor, Tensor]:
        """Threshold and number of scores of every class and cell, ``[K, H, W]`` each."""
        shape = (self.num_classes, self.size[0] * self.size[1])
        threshold = torch.full(shape, torch.inf, device=self._device)
        count = torch.zeros(shape, dtype=torch.int64, device=self._device)
        rows = sum(map(len, self._scores))
        for cells in tiles(shape[1] if rows else 0, rows + self.num_classes):
            scores, order = _stack(self._scores, cells).sort(dim=0, descending=True)
            classes = _stack(self._classes, cells).gather(0, order).to(torch.int64)
            classes, order = classes.sort(dim=0, stable=True)  # classes in turn, largest first
            scores = scores.gather(0, order)
            number = scores.new_zeros(self.num_classes + 1, scores.shape[1], dtype=torch.int64)
            number.scatter_add_(0, classes, torch.ones_like(classes))
            first = number.cumsum(0) - number
            place = from_top_of_counts(number, alpha, self.images)
            value = scores.gather(0, (first + place - 1).clamp(min=0, max=rows - 1))
            value = torch.where(place > 0, value, torch.inf)
            threshold[:, cells], count[:, cells] = value[:-1], number[:-1]
        return threshold.reshape(-1, *self.size), count.reshape(-1, *self.size)

    def at_least(self, scores: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor]:
        """How many scores of a pixel's cell and class are at least its own; of how many."""
        assert classes is not None
        found = torch.zeros_like(scores, dtype=torch.int64)
        count = torch.zeros_like(found)
        for block, owners in zip(self._scores, self._classes, strict=True):
            for row, owner in zip(block, owners, strict=True):
                same = to_image(owner.reshape(self.size), _size(scores)) == classes
                found += same & (to_image(row.reshape(self.size), _size(scores)) >= scores)
                count += same
        return found, count


_WHOLE = 2**36  # the weight of an image in fixed point: room for 2**26 pixels and 2**26 images


class BinnedScores:
    """Counts of scores in fixed bins, for groups that see many scores per image.

    The quantile is the largest score of its bin: never below the exact one, and within 1 % of it
    in odds s/(1 - s) for s in [1e-6, 1 - 1e-6], s being the score's place in its range. Counts are
    int64.

    With ``per_image`` every image weighs the same in a group, however many pixels it has there: a
    pixel counts 1/m of its m pixels, in fixed point, so that sums are exact in any order. The
    threshold is then that of conformal risk control over images.
    """

    complete = True

    def __init__(
        self,
        groups: Tensor,
        *,
        num_classes: int | None,
        device: torch.device,
        limits: tuple[float, float] = (0.0, 1.0),
        per_image: bool = False,
    ) -> None:
        self.images = 0
        self.num_classes = num_classes
        self.per_image = per_image
        self._limits = limits
        self._groups = groups.to(device)
        self._num_groups = int(groups.max()) + 1
        self._layers = (1 if num_classes is None else num_classes) * self._num_groups
        size = self._layers * NUM_BINS
        self._counts = torch.zeros(size + 1, dtype=torch.int64, device=device)  # the last: void
        # Images with a pixel in the layer, where those are counted; the last: void.
        self._seen = torch.zeros(self._layers + 1, dtype=torch.int64, device=device)

    def update(self, scores: Tensor, classes: Tensor | None) -> None:
        """Take scores ``[B, H, W]``, NaN where there is none; classes if they part."""
        self.images += len(scores)
        cell = self._groups.expand(scores.shape)
        if classes is not None:
            cell = classes * self._num_groups + cell
        low, high = self._limits
        within = scores if self._limits == (0.0, 1.0) else (scores - low) / (high - low)
        place = cell * NUM_BINS + score_bins(within)
        place = place.masked_fill(scores.isnan(), len(self._counts) - 1).flatten(1)
        one = torch.ones(1, dtype=torch.int64, device=place.device).expand(place.numel())
        if self.per_image:
            for pixels in place:
                self._update_image(pixels, one[: len(pixels)])
        else:
            self._counts.scatter_add_(0, place.flatten(), one)

    def _update_image(self, place: Tensor, one: Tensor) -> None:
        """Count the pixels of one image such that they weigh ``_WHOLE`` in every layer."""
        place = place.sort(descending=True).values  # the largest score of a layer first
        layer = place // NUM_BINS
        pixels = torch.zeros_like(self._seen).scatter_add_(0, layer, one)
        before = pixels.sum() - pixels.cumsum(0)  # those of the layers above
        rank = one.cumsum(0) - before[layer]  # 1 .. m, from the largest score down
        # The share of the image at or above a score is rounded up; a pixel weighs the step.
        share = -(-rank * _WHOLE // pixels[layer])
        step = share + (-(rank - 1) * _WHOLE // pixels[layer])
        self._counts.scatter_add_(0, place, step)
        self._seen += pixels > 0

    def merge(self, other: BinnedScores) -> None:
        """Take all that ``other`` has seen; ``other`` stays as it is."""
        self.images += other.images
        self._counts += other._counts
        self._seen += other._seen

    def sync(self, group: dist.ProcessGroup | None) -> None:
        """Merge over the ranks of ``group``; every rank then holds the whole."""
        self._counts = all_reduce_sum(self._counts, group)
        self._seen = all_reduce_sum(self._seen, group)
        self.images = _total_images(self.images, self._counts.device, group)

    def quantile(self, alpha: Fraction) -> tuple[Tensor, Tensor]:
        """Threshold and number of scores of every group as a map: ``[H, W]`` or ``[K, H, W]``.

        With ``per_image`` the number is that of images that have a pixel there.
        """
        counts = self._counts[:-1].reshape(-1, self._num_groups, NUM_BINS)
        from_above = counts.flip(-1).cumsum(-1)
        count = from_above[..., -1]
        if self.per_image:
            count = self._seen[:-1].reshape(count.shape)
        numbers, which = torch.unique(count, return_inverse=True)  # few, and of any size
        most = [self._allowed(n, alpha) for n in numbers.tolist()]
        # Find the bin in which the count from the top first exceeds the allowed number.
        place = torch.tensor(most, device=count.device)[which] + 1
        found = torch.searchsorted(from_above, place.unsqueeze(-1)).squeeze(-1)
        value = self._edges()[(NUM_BINS - 1 - found).clamp(min=0)]
        value = torch.where(place > 0, value, torch.inf)
        threshold, count = value[:, self._groups], count[:, self._groups]
        if self.num_classes is None:
            return threshold[0], count[0]
        return threshold, count

    def at_least(self, scores: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor]:
        """How many scores of a pixel's group lie in its own bin or above; of how many.

        With ``per_image``: the sum of the images' shares, and the number of images.
        """
        counts = self._counts[:-1].reshape(self._layers, NUM_BINS)
        from_above = counts.flip(-1).cumsum(-1).flip(-1)
        layer = to_image(self._groups, _size(scores)).expand(scores.shape)
        if classes is not None:
            layer = classes * self._num_groups + layer
        low, high = self._limits
        within = scores if self._limits == (0.0, 1.0) else (scores - low) / (high - low)
        found = from_above[layer, score_bins(within).clamp(0, NUM_BINS - 1)]
        if self.per_image:
            return found.to(torch.float64) / _WHOLE, self._seen[:-1][layer]
        return found, from_above[:, 0][layer]

    def _allowed(self, n: int, alpha: Fraction) -> int:
        """Largest count allowed above the threshold; negative if only +inf is valid."""
        if not self.per_image:
            return from_top(n, alpha) - 1
        # Conformal risk control: (sum of the images' shares + 1) / (n + 1) <= alpha.
        return math.floor(((n + 1) * alpha - 1) * _WHOLE)

    def _edges(self) -> Tensor:
        """The largest score of every bin, rounded up where the range is not [0, 1]."""
        edges = bin_edges(self._counts.device)
        low, high = self._limits
        if self._limits == (0.0, 1.0):
            return edges
        # Two roundings brought the score into [0, 1], and one brings the edge back.
        return (low + (high - low) * (edges.to(torch.float64) + 2.0**-22)).to(torch.float32)
