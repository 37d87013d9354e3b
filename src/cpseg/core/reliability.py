"""How far probabilities can be trusted: proper scores, reliability, error against kept share.

All are sums over pixels (int64 counts, float64 sums), so images stream by and nothing of them is
kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpseg._internal.checks import check_label_values, check_labels, check_probs, message, shape
from cpseg.core.score_bins import NUM_BINS, score_bins
from cpseg.core.selection import evidence

BINS = 15  # of equal width in [0, 1], as in Guo et al. (2017)
FLOOR = 2.0**-20  # about 1e-6: files hold exact zeros, whose logarithm would be all that counts


class ProperScores(NamedTuple):
    """How good probabilities are: each figure is a mean over pixels; smaller is better.

    Attributes:
        nll: negative log likelihood of the true class, in nats, scores below 2**-20 taken as that.
        brier: squared distance between the scores and the truth, in [0, 2].
        classwise_ece: calibration error of each class's score in 15 bins, the mean over classes.
        ece: calibration error of the largest score in 15 bins.
        area: under the error rate of the pixels kept against their share, the most confident first.
    """

    nll: float
    brier: float
    classwise_ece: float
    ece: float
    area: float


class Diagram(NamedTuple):
    """A reliability diagram: of every bin of the largest score, ``[15]``."""

    pixels: Tensor
    confidence: Tensor  # mean of the largest score; NaN in an empty bin
    accuracy: Tensor  # share of pixels whose class has it


class Reliability:
    """Sums over the labelled pixels of images, for the scores of one model.

    The largest score is taken as given: it is what thresholds cut. For ``nll``, ``brier`` and
    ``classwise_ece``, which judge distributions, scores are divided by their sum over the classes
    (a pixel of zeros alone counts as uniform); softmax scores stay what they are.

    Args:
        num_classes: number of classes K.
        device: where the sums lie.

    Reference:
        Kull et al. (2019), Beyond temperature scaling (class-wise calibration error); Guo et al.
        (2017), On calibration of modern neural networks; Geifman & El-Yaniv (2017), Selective
        classification (error against kept share).

    Example:
        >>> from cpseg.core.reliability import Reliability
        >>> tally = Reliability(2)
        >>> tally.update(torch.tensor([[[0.75, 0.5]], [[0.25, 0.5]]]), torch.tensor([[0, 1]]))
        >>> round(tally.scores().brier, 4)  # (2 * 0.25**2 + 2 * 0.5**2) / 2
        0.3125
    """

    def __init__(self, num_classes: int, *, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        counts = torch.zeros(0, dtype=torch.int64, device=device)
        sums = torch.zeros(0, dtype=torch.float64, device=device)
        self._top = counts.new_zeros(2, BINS)  # pixels, right
        self._top_sum = sums.new_zeros(BINS)  # of the largest score
        self._class = counts.new_zeros(num_classes, BINS)  # pixels of that class
        self._class_sum = sums.new_zeros(num_classes, BINS)
        self._order = counts.new_zeros(2, NUM_BINS)  # pixels, wrong, by 1 - largest score
        self._losses = sums.new_zeros(2)  # nll, brier
        self._unlikely = counts.new_zeros(())

    @property
    def pixels(self) -> int:
        """Labelled pixels seen so far."""
        return int(self._top[0].sum())

    @property
    def unlikely(self) -> int:
        """Pixels whose true class has less than the floor of ``nll``."""
        return int(self._unlikely)

    def update(self, probs: Tensor, labels: Tensor, *, ignore_index: int = 255) -> None:
        """Count the pixels of one image.

        Args:
            probs: probabilities in [0, 1], ``[K, H, W]``.
            labels: true classes, integer ``[H, W]``.
            ignore_index: the label of void pixels, which do not count.

        Raises:
            ValueError: shapes do not belong together, or stray label values.
            TypeError: wrong dtypes.
        """
        where = "Reliability.update"
        check_probs(where, probs)
        if probs.ndim != 3 or len(probs) != self.num_classes:
            expected, fix = f"probs [{self.num_classes}, H, W]", "pass one image of this model"
            raise ValueError(message(where, expected, shape(probs), fix))
        check_labels(where, labels, probs)
        check_label_values(where, labels, self.num_classes, ignore_index)
        valid = labels.to(torch.int64) != ignore_index
        truth = labels.to(torch.int64)[valid]
        found = evidence(probs, background=None)
        confidence = found.best.to(torch.float32)[valid]
        right = found.best_class.to(torch.int64)[valid] == truth
        top = _bin(confidence)
        self._top += torch.stack([_count(top, BINS), _count(top[right], BINS)])
        self._top_sum += _sum(top, confidence, BINS)
        order = score_bins(1 - confidence)
        self._order += torch.stack([_count(order, NUM_BINS), _count(order[~right], NUM_BINS)])
        self._update_proper(probs.detach(), valid, truth)

    def _update_proper(self, probs: Tensor, valid: Tensor, truth: Tensor) -> None:
        """A class at a time: temporaries are as large as the image, whatever K is."""
        total = torch.zeros(len(truth), dtype=torch.float64, device=truth.device)
        for each in probs:
            total += each[valid]
        known = total > 0
        total.masked_fill_(~known, 1.0)
        squares, p_true = torch.zeros_like(total), torch.zeros_like(total)
        for k, each in enumerate(probs):
            q = torch.where(known, each[valid] / total, 1 / self.num_classes)
            here = truth == k
            squares += (q - here.to(torch.float64)) ** 2
            p_true = torch.where(here, q, p_true)
            place = _bin(q)
            self._class[k] += _count(place[here], BINS)
            self._class_sum[k] += _sum(place, q, BINS)
        nll = -p_true.clamp(min=FLOOR).log().sum()
        self._losses += torch.stack([nll, squares.sum()])
        self._unlikely += (p_true < FLOOR).sum()

    def merge(self, other: Reliability) -> None:
        """Take all that ``other`` has counted; it stays as it is."""
        for name in ("_top", "_top_sum", "_class", "_class_sum", "_order", "_losses", "_unlikely"):
            getattr(self, name).add_(getattr(other, name))

    def scores(self) -> ProperScores:
        """The figures; NaN where no pixel was seen."""
        pixels = self._top[0].sum().to(torch.float64)
        nll, brier = (self._losses / pixels).tolist()
        classwise = (self._class - self._class_sum).abs().sum() / (pixels * self.num_classes)
        ece = (self._top[1] - self._top_sum).abs().sum() / pixels
        return ProperScores(nll, brier, float(classwise), float(ece), self._area())

    def diagram(self) -> Diagram:
        """The bins of the largest score."""
        pixels, right = self._top
        return Diagram(pixels, self._top_sum / pixels, right.to(torch.float64) / pixels)

    def error_at(self, shares: Tensor) -> Tensor:
        """Error rate of the most confident pixels, for every share of them in (0, 1].

        Exact where a share ends at a bin of ``1 - confidence`` (9,732 bins); in between, the
        pixels of a bin count as equally confident. float64, NaN where no pixel was seen.
        """
        pixels, wrong = self._order.to(torch.float64)
        kept, mistakes = pixels.cumsum(0), wrong.cumsum(0)
        want = shares.to(kept) * kept[-1]
        last = torch.searchsorted(kept, want).clamp(max=NUM_BINS - 1)
        rate = (wrong / pixels)[last]
        error: Tensor = (mistakes[last] + rate * (want - kept[last])) / want
        return error

    def _area(self) -> float:
        """The integral of :meth:`error_at` over the share, in closed form in every bin.

        With C pixels before a bin, W of them wrong, and n pixels of error rate r in it, the error
        after t of these is (W + r t) / (C + t).
        """
        pixels, wrong = self._order[:, self._order[0] > 0].to(torch.float64)
        before, mistakes = pixels.cumsum(0) - pixels, wrong.cumsum(0) - wrong
        rate = wrong / pixels
        growth = torch.where(before > 0, (pixels / before).log1p(), 0.0)  # W = C = 0 at first
        parts = wrong + (mistakes - rate * before) * growth
        return float(parts.sum() / pixels.sum())


def _bin(p: Tensor) -> Tensor:
    """Bins (i/15, (i + 1)/15]; 0 is in the first."""
    return (p.to(torch.float64) * BINS).ceil().to(torch.int64).sub_(1).clamp_(0, BINS - 1)


def _count(place: Tensor, bins: int) -> Tensor:
    return torch.bincount(place, minlength=bins)


def _sum(place: Tensor, values: Tensor, bins: int) -> Tensor:
    return torch.bincount(place, weights=values.to(torch.float64), minlength=bins)
