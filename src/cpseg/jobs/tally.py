"""How good rules for pseudo-labels are on images whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cpseg._internal import distributed as ranks
from cpseg.core.metrics import confusion_matrix, mean_iou
from cpseg.files.masks import VOID
from cpseg.jobs.estimate import aligned, number, percent

_HEADER = ("rule", "mIoU kept", "mIoU all", "kept", "wrong", "coverage", "set size")


@dataclass(frozen=True)
class Row:
    """One rule's figures.

    Attributes:
        rule: its name.
        miou_kept: mean IoU over the pixels that carry a label.
        miou_all: mean IoU over all pixels, those without a label counted as wrong.
        kept: share of non-void pixels that carry a label.
        wrong: share of wrong labels among those kept; NaN where none is kept.
        coverage: share of pixels whose class is in the prediction set; NaN without sets.
        set_size: mean number of classes in the set; NaN without sets.
        iou: IoU of every class over all pixels; NaN for classes that do not occur.
    """

    rule: str
    miou_kept: float
    miou_all: float
    kept: float
    wrong: float
    coverage: float
    set_size: float
    iou: tuple[float, ...]


class Tally:
    """Sums from which a :class:`Row` is made: exact for any split of the images.

    Args:
        rule: name of the rule.
        num_classes: number of classes K.
        device: where labels lie.
    """

    def __init__(self, rule: str, num_classes: int, *, device: torch.device | str = "cpu") -> None:
        self.rule = rule
        self.num_classes = num_classes
        size = (num_classes, num_classes + 1)
        self._confusion = torch.zeros(size, dtype=torch.int64, device=device)
        self._sets = torch.zeros(3, dtype=torch.int64, device=device)  # hits, members, pixels

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count labels ``[H, W]`` against the truth; 255 is void, or no label."""
        self._confusion += confusion_matrix(
            predictions, labels, num_classes=self.num_classes, with_ignored=True
        )

    def update_sets(self, prediction_set: Tensor, labels: Tensor) -> None:
        """Count sets ``[K, H, W]`` against the truth; void pixels do not count."""
        labels = labels.to(torch.int64)
        valid = labels != VOID
        index = labels.masked_fill(~valid, 0).unsqueeze(0)
        hits = prediction_set.gather(0, index).squeeze(0) & valid
        members = (prediction_set & valid).sum()
        self._sets += torch.stack([hits.sum(), members, valid.sum()])

    def sync(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Sum over the ranks."""
        if ranks.active():
            self._confusion = ranks.all_reduce_sum(self._confusion, process_group)
            self._sets = ranks.all_reduce_sum(self._sets, process_group)

    def row(self) -> Row:
        """The figures."""
        return row_of(self.rule, self._confusion, self._sets)


def row_of(rule: str, confusion: Tensor, sets: Tensor) -> Row:
    """The figures of a rule from its sums.

    Args:
        rule: its name.
        confusion: int64 ``[K, K + 1]``, the last column for pixels without a label.
        sets: ``[3]``: pixels whose class is in the set, classes in all sets (NaN if not counted),
            pixels (0 without sets).
    """
    square = confusion[:, : len(confusion)]
    labelled, pixels = square.sum().double(), confusion.sum().double()
    hits, members, in_sets = sets.double()
    return Row(
        rule,
        float(mean_iou(square)),
        float(mean_iou(confusion)),
        float(labelled / pixels),
        float(1 - square.diagonal().sum() / labelled),
        float(hits / in_sets),
        float(members / in_sets),
        tuple(mean_iou(confusion, per_class=True).tolist()),
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [_HEADER, ("---",) + ("---:",) * (len(_HEADER) - 1)]
    for row in rows:
        size = "-" if row.set_size != row.set_size else f"{row.set_size:.2f}"
        shares = (row.kept, row.wrong, row.coverage)
        miou = (number(row.miou_kept), number(row.miou_all))
        lines.append((row.rule, *miou, *map(percent, shares), size))
    return aligned(lines)


def class_table(rows: Sequence[Row]) -> str:
    """IoU of every class over all pixels, one column per rule, as a Markdown table."""
    lines = [("class", *(row.rule for row in rows)), ("---",) + ("---:",) * len(rows)]
    for index, values in enumerate(zip(*(row.iou for row in rows), strict=True)):
        lines.append((str(index), *map(number, values)))
    return aligned(lines)
