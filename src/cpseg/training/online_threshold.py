"""A confidence threshold that follows a model in training.

Training code keeps an unlabelled pixel where the softmax maximum reaches a fixed 0.95. Here the
number comes from labelled pixels: it is the conformal quantile of their scores ``1 - p_y``, where
recent batches weigh more than old ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

from cpseg._internal.checks import (
    check_alpha,
    check_ignore_index,
    check_label_values,
    check_labels,
    check_probs,
    is_compiling,
    labels_outside,
    message,
    shape,
)
from cpseg._internal.distributed import active, all_reduce_sum, device_without_data
from cpseg.core.argmax import best_of_classes
from cpseg.core.score_bins import NUM_BINS, bin_edges, score_bins

_TILE = 2**17  # logits that a step on the CPU holds in cache
_UNIT = 1024  # the weight of a new score; weights are whole, so that sums have no order
_BAD = -(2**40)  # as a count: this batch held values that are no labels or no logits


class OnlineThreshold:
    """Conformal confidence threshold for a training loop, from its labelled batches.

    An update's scores ``1 - p_y`` weigh 1 each; every further update multiplies the weights of
    older ones by ``decay``. The threshold is the smallest score q with ``A + 1 <= alpha (W + 1)``,
    where W is the weight of all scores and A of those above q; ``decay=1`` is the conformal
    quantile of all scores seen. Scores are counted in fixed bins and q is the upper end of its bin
    (:class:`cpseg.stores.BinnedScores`), so it is rounded up. Weights are kept in whole 1024ths,
    rounded down.

    Args:
        num_classes: K, at least 2.
        alpha: share of labelled pixels whose true class may lie below the threshold, with at most
            9 decimals.
        per_class: a threshold for every class from the pixels of that class alone.
        decay: in (0, 1]. 0.99 remembers about 100 updates, ``1 / (1 - decay)``. What an update
            has no labelled pixel of (a class, or any) does not fade.
        stride: every how many rows and columns a pixel is scored; 1 is all. Models upsample their
            logits by 4 or more: neighbours say the same again.
        ignore_index: the label of void pixels.

    Raises:
        ValueError: an argument outside its range.
        TypeError: ``num_classes`` is not a whole number.

    Guarantee:
        None while training. The split conformal promise needs labelled pixels that the model has
        not seen and that are exchangeable with the new ones; pixels of an image are not, training
        pixels are too easy, and the model changes between updates. Update on held-out labelled
        images to be near it. It would then be coverage: a share 1 - alpha of true classes reaches
        the threshold. That is not precision: where more than alpha of the labelled pixels are
        wrong, the threshold must fall until it keeps them, and may keep everything.

    Reference:
        The threshold's place in the loop: FixMatch (2020), UniMatch (CVPR 2023). Weighted
        quantile: Barber, Candes, Ramdas & Tibshirani (2023), section 3.

    Example:
        >>> cal = OnlineThreshold(2, alpha=0.1, stride=1)
        >>> cal.threshold()  # too few scores: everything is kept
        tensor(0.)
        >>> margin = torch.linspace(0, 4, 40).reshape(1, 1, 5, 8)
        >>> logits = torch.cat([margin, -margin], dim=1)  # sure of class 0, more or less
        >>> cal.update(logits, torch.zeros(1, 5, 8, dtype=torch.int64)).threshold()
        tensor(0.6484)
        >>> cal.gate(logits).float().mean()
        tensor(0.9250)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        alpha: float | str | Fraction = 0.05,
        per_class: bool = False,
        decay: float = 0.99,
        stride: int = 4,
        ignore_index: int = 255,
    ) -> None:
        where = "OnlineThreshold"
        if isinstance(num_classes, bool) or not isinstance(num_classes, int):
            fix = "pass the number of classes of the model"
            raise TypeError(message(where, "num_classes as int", repr(num_classes), fix))
        if num_classes < 2:
            fix = "add a channel for the background"
            raise ValueError(message(where, "num_classes of at least 2", str(num_classes), fix))
        check_ignore_index(where, ignore_index, num_classes)
        self.alpha = check_alpha(where, alpha)
        if self.alpha.denominator > 10**9:
            got = " ".join(repr(alpha).split())[:80]
            raise ValueError(message(where, "alpha of at most 9 decimals", got, "round it"))
        if not 0 < decay <= 1:
            fix = "pass 0.99, or 1 to remember everything"
            raise ValueError(message(where, "decay in (0, 1]", str(decay), fix))
        if isinstance(stride, bool) or not isinstance(stride, int):
            fix = "pass 4, or 1 for every pixel"
            raise TypeError(message(where, "stride as int", repr(stride), fix))
        if stride < 1:
            fix = "pass 4, or 1 for every pixel"
            raise ValueError(message(where, "stride of at least 1", str(stride), fix))
        self.num_classes = num_classes
        self.per_class = per_class
        self.decay = float(decay)
        self.stride = stride
        self.ignore_index = ignore_index
        layers = num_classes if per_class else 1
        self._weights = torch.zeros(layers, NUM_BINS, dtype=torch.float64)
        # For sync: the weights before the last update, and its counts.
        self._before = self._weights
        self._recent = torch.zeros(layers, NUM_BINS, dtype=torch.int64)
        self._unsynced = 0
        self._confidence = _confidences(bin_edges(self._weights.device))

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> OnlineThreshold:
        """Take a labelled batch.

        Args:
            logits: float of any width ``[B, K, H, W]`` or ``[K, H, W]``; no gradient flows.
            labels: integer ``[B, H, W]`` or ``[H, W]``, ``ignore_index`` where void.

        Returns:
            Itself, so that ``.threshold()`` can follow.

        Raises:
            ValueError: shapes or devices do not belong together; a label that is neither a class
                nor void, or NaN at a labelled pixel, among the pixels scored. The last two are
                seen on a CPU; elsewhere, where a look would wait for the device, the threshold is
                NaN from there on.
            TypeError: wrong dtypes.
        """
        where = "OnlineThreshold.update"
        self._check(where, logits)
        check_labels(where, labels, logits)
        every = slice(None, None, self.stride)
        logits, labels = logits[..., every, every], labels[..., every, every]
        flat = labels.to(torch.int64).reshape(-1, labels.shape[-2] * labels.shape[-1])
        void = flat == self.ignore_index
        stray = labels_outside(flat, self.num_classes, self.ignore_index)
        index = flat.masked_fill(void | stray, 0)
        prob = _by_tiles(_planes(logits), index)
        bad = ((prob.isnan() & ~void) | stray).any()
        if logits.device.type == "cpu" and not is_compiling() and bool(bad):
            check_label_values(where, labels, self.num_classes, self.ignore_index)
            fix = "look for the step at which training diverged"
            raise ValueError(message(where, "finite logits at labelled pixels", "NaN", fix))
        self._move(logits.device)
        place = score_bins(1 - prob)
        if self.per_class:
            place = place + index * NUM_BINS
        size = self._recent.numel()
        place = place.clamp(0, size - 1).masked_fill(void, size).flatten()  # NaN got any bin
        counts = torch.zeros(size + 1, dtype=torch.int64, device=place.device)
        counts.scatter_add_(0, place, torch.ones_like(place))
        counts = torch.where(bad, _BAD, counts[:size])
        self._recent = counts.reshape(self._recent.shape)
        self._before, self._weights = self._weights, self._add(self._weights, self._recent)
        self._unsynced += 1
        return self

    @torch.no_grad()
    def threshold(self) -> Tensor:
        """Least confidence that is kept: ``p >= threshold`` where ``1 - p <= q`` in float32.

        Returns:
            float32 in [0, 1] on the device of the updates, ``[]`` or per class ``[K]``. 0, which
            keeps everything, where there are too few scores for alpha, as before the first update
            (or, per class, before the first pixel of the class).
        """
        from_above = self._weights.flip(-1).cumsum(-1)
        weight = from_above[:, -1:]
        # Exact in int64 for any weight: floor((W + 1) alpha) - 1, in units.
        whole = weight.to(torch.int64) + _UNIT
        above, below = self.alpha.numerator, self.alpha.denominator
        most = whole // below * above + whole % below * above // below - _UNIT
        place = NUM_BINS - 1 - (from_above <= most).sum(-1, keepdim=True)
        place = torch.where(most >= 0, place, NUM_BINS)
        found = self._confidence[place].masked_fill(weight.isnan(), torch.nan).squeeze(-1)
        return found if self.per_class else found.squeeze(0)

    @torch.no_grad()
    def gate(self, logits: Tensor) -> Tensor:
        """Whether the most probable class is sure enough to be a pseudo-label.

        Args:
            logits: float of any width ``[B, K, H, W]`` or ``[K, H, W]``.

        Returns:
            bool ``[B, H, W]`` or ``[H, W]``: the softmax maximum, in float32, reaches the
            threshold (of the class that ``argmax`` gives).

        Raises:
            ValueError: shapes do not belong together.
            TypeError: wrong dtypes.
        """
        self._check("OnlineThreshold.gate", logits)
        planes = _planes(logits)
        threshold = self.threshold().to(logits.device)
        if self.per_class:
            best_class = best_of_classes(planes.unsqueeze(-1), None, None)[1].squeeze(-1)
            threshold = threshold[best_class.to(torch.int64)]
        kept = _by_tiles(planes, None) >= threshold
        return kept.reshape(*logits.shape[:-3], *logits.shape[-2:])

    def sync(self, process_group: dist.ProcessGroup | None = None) -> OnlineThreshold:
        """Add the last update of all ranks; call it after every update, or never.

        Every rank then holds, to the bit, what one process would that took the batches of all
        ranks as one. Without a process group it does nothing, and a second call adds nothing.

        Args:
            process_group: the ranks, all of them by default; all must call.

        Returns:
            Itself, so that ``.threshold()`` can follow.

        Raises:
            ValueError: several updates since the last call: ranks would disagree.
        """
        if not active():
            return self
        if self._unsynced > 1 and dist.get_world_size(process_group) > 1:
            expected, got = "one update between two calls", f"{self._unsynced} updates"
            fix = "call it after every update"
            raise ValueError(message("OnlineThreshold.sync", expected, got, fix))
        if self._weights.device.type == "cpu":  # no update yet, perhaps
            self._move(device_without_data(process_group))
        recent = all_reduce_sum(self._recent, process_group)
        self._settle(self._add(self._before, recent))
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: ``{"weights": float64 [1 or K, bins]}``, a copy."""
        return {"weights": self._weights.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint; alpha and decay stay as they were given.

        Raises:
            ValueError: not a state of :meth:`state_dict`, or of other classes.
        """
        where = "OnlineThreshold.load_state_dict"
        weights = state.get("weights")
        if not isinstance(weights, Tensor):
            got, fix = f"keys {sorted(map(str, state))}", "pass what state_dict gave"
            raise ValueError(message(where, "'weights' as a tensor", got, fix))
        if weights.shape != self._weights.shape:
            expected, fix = f"weights {shape(self._weights)}", "build it as it was when saved"
            raise ValueError(message(where, expected, shape(weights), fix))
        self._settle(weights.detach().to(self._weights.device, torch.float64, copy=True))

    def _add(self, weights: Tensor, counts: Tensor) -> Tensor:
        """Weights after an update; what it has a score of fades first."""
        seen = counts.any(-1, keepdim=True)
        older = torch.where(seen, (weights * self.decay).floor_(), weights)
        bad = counts.amin(-1, keepdim=True) < 0
        return older.add_(counts, alpha=_UNIT).masked_fill_(bad, torch.nan)

    def _settle(self, weights: Tensor) -> None:
        """Hold ``weights``, with nothing left to sync."""
        self._weights = self._before = weights
        self._recent = torch.zeros_like(self._recent)
        self._unsynced = 0

    def _move(self, device: torch.device) -> None:
        if self._weights.device != device:
            self._weights = self._weights.to(device)
            self._before = self._before.to(device)
            self._recent = self._recent.to(device)
            self._confidence = self._confidence.to(device)

    def _check(self, where: str, logits: Tensor) -> None:
        check_probs(where, logits, name="logits")
        if logits.shape[-3] != self.num_classes:
            expected, fix = f"logits of {self.num_classes} classes", "build it for this model"
            raise ValueError(message(where, expected, shape(logits), fix))


def _planes(logits: Tensor) -> Tensor:
    """``[B, K, H W]``."""
    return logits.reshape(-1, *logits.shape[-3:]).flatten(2)


def _by_tiles(logits: Tensor, index: Tensor | None) -> Tensor:
    """Softmax in float32 at ``index [B, N]``, or its largest value; ``logits [B, K, N]``.

    Both go over the same tiles: a pixel's probability has the same bits in either.
    """
    if logits.device.type != "cpu" or is_compiling():
        return _chosen(logits, index)
    found = logits.new_empty(logits.shape[0], logits.shape[2], dtype=torch.float32)
    for image, part in _tiles(logits):
        own = None if index is None else index[image : image + 1, part]
        found[image, part] = _chosen(logits[image : image + 1, :, part], own)
    return found


def _tiles(logits: Tensor) -> Iterator[tuple[int, slice]]:
    batch, num_classes, pixels = logits.shape
    step = max(1, _TILE // num_classes)
    for image in range(batch):
        for start in range(0, pixels, step):
            yield image, slice(start, start + step)


def _chosen(logits: Tensor, index: Tensor | None) -> Tensor:
    probs = logits.softmax(1, dtype=torch.float32)
    return probs.amax(1) if index is None else probs.gather(1, index.unsqueeze(1)).squeeze(1)


def _confidences(scores: Tensor) -> Tensor:
    """Least float32 p with ``1 - p <= q`` in float32, for q in [0, 1]; behind them 0, for +inf."""
    # 1 - p is exact for p >= 1/2. Below, it rounds to a multiple of 2**-24, and a tie to even.
    upper = scores >= 0.5
    least = ((1 - scores.to(torch.float64)) * 2**24).ceil() / 2**24
    found = (least - torch.where(upper, 2.0**-25, 0)).clamp(min=0).to(torch.float32)
    above = torch.nextafter(found, torch.ones_like(found))
    return torch.cat([torch.where(1 - found <= scores, found, above), found.new_zeros(1)])
