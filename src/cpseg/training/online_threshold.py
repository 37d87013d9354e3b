"""A confidence threshold that is updated while a model trains.

Usual training code keeps an unlabelled pixel if its largest softmax probability reaches a fixed
0.95. Here the threshold is computed from labelled pixels: it is the conformal quantile of their
nonconformity scores ``1 - p_y``, where recent batches have more weight than old ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

from cpseg._internal.checks import (
    MOST_CLASSES,
    check_alpha,
    check_flag,
    check_float,
    check_has_values,
    check_ignore_index,
    check_label_values,
    check_labels,
    check_probs,
    is_compiling,
    is_number,
    labels_outside,
    message,
    shape,
    short,
)
from cpseg._internal.distributed import active, all_reduce_sum, device_without_data
from cpseg._internal.streaming import gather_alike
from cpseg.core.argmax import best_of_classes
from cpseg.core.score_bins import NUM_BINS, bin_edges, score_bins

_TILE = 2**17  # logits per step on the CPU, so that they fit into the cache
_UNIT = (
    1024  # weight of a new score; weights are integers, so that the order of a sum is irrelevant
)
_BAD = -(2**40)  # this count marks a batch with invalid labels or NaN


class OnlineThreshold:
    """Conformal confidence threshold for a training loop, from its labelled batches.

    New nonconformity scores ``1 - p_y`` have weight 1; every further update multiplies the weights
    of older scores by ``decay``. The threshold is the smallest score q with
    ``A + 1 <= alpha (W + 1)``, where W is the weight of all scores and A the weight of those above
    q. With ``decay=1`` it is the conformal quantile of all scores seen. Scores are counted in
    fixed bins and q is the upper end of its bin, so it is rounded up. Weights are stored as whole
    multiples of 1/1024, rounded down.

    Args:
        num_classes: K, at least 2.
        alpha: share of labelled pixels whose true class may lie below the threshold, with at most
            9 decimals.
        per_class: a threshold per class, computed from the pixels of that class alone.
        decay: in (0, 1]. The threshold depends on about the last ``1 / (1 - decay)`` updates, 100
            for 0.99. Weights do not decay in an update without a labelled pixel (with
            ``per_class``: without one of their class).
        stride: score one pixel in every ``stride`` rows and columns; 1 scores all. Models upsample
            their logits by 4 or more, so neighbouring pixels carry nearly the same information.
        ignore_index: the label of void pixels.

    Raises:
        ValueError: an argument lies outside its range.
        TypeError: ``num_classes`` or ``stride`` is not a whole number.

    Guarantee:
        None during training. Split conformal prediction needs labelled pixels that the model has
        not seen and that are exchangeable with the new ones. But the pixels of one image are not
        exchangeable, the model fits its training pixels too well, and it changes between updates.
        Updates on held-out labelled images come close to the guarantee, which is coverage: for a
        share 1 - alpha of pixels the probability of the true class reaches the threshold. It is
        not precision: if the model is wrong on more than alpha of the labelled pixels, the
        threshold must be low enough to keep them, and may keep everything.

    Reference:
        Use of the threshold in the training loop: FixMatch (2020), UniMatch (CVPR 2023). Weighted
        quantile: Barber, Candes, Ramdas & Tibshirani (2023), section 3.

    Example:
        >>> cal = OnlineThreshold(2, alpha=0.1, stride=1)
        >>> cal.threshold()  # too few scores, so everything is kept
        tensor(0.)
        >>> margin = torch.linspace(0, 4, 40).reshape(1, 1, 5, 8)
        >>> logits = torch.cat([margin, -margin], dim=1)  # class 0, more and more certain
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
            raise TypeError(message(where, "num_classes as int", short(num_classes), fix))
        if num_classes < 2:
            fix = "add a channel for the background"
            raise ValueError(message(where, "num_classes of at least 2", short(num_classes), fix))
        check_flag(where, per_class, name="per_class")
        if per_class and num_classes > MOST_CLASSES:
            expected, fix = f"num_classes of at most {MOST_CLASSES}", "leave per_class out"
            raise ValueError(message(where, expected, short(num_classes), fix))
        check_ignore_index(where, ignore_index, num_classes)
        self.alpha = check_alpha(where, alpha)
        if self.alpha.denominator > 10**9:
            got = " ".join(repr(alpha).split())[:80]
            raise ValueError(message(where, "alpha of at most 9 decimals", got, "round it"))
        if not is_number(decay, 0, 1) or decay == 0:
            fix = "pass 0.99, or 1 to weight all updates equally"
            raise ValueError(message(where, "decay in (0, 1]", short(decay), fix))
        if isinstance(stride, bool) or not isinstance(stride, int):
            fix = "pass 4, or 1 for every pixel"
            raise TypeError(message(where, "stride as int", short(stride), fix))
        if stride < 1:
            fix = "pass 4, or 1 for every pixel"
            raise ValueError(message(where, "stride of at least 1", short(stride), fix))
        if stride >= 2**31:
            fix = "pass 4, or 1 for every pixel"
            raise ValueError(message(where, "stride below 2**31", short(stride), fix))
        self.num_classes = num_classes
        self.per_class = per_class
        self.decay = float(decay)
        self.stride = stride
        self.ignore_index = ignore_index
        layers = num_classes if per_class else 1
        self._weights = torch.zeros(layers, NUM_BINS, dtype=torch.float64)
        # For sync: the weights before the last update, and the counts of the last update.
        self._before = self._weights
        self._recent = torch.zeros(layers, NUM_BINS, dtype=torch.int64)
        self._unsynced = 0
        self._alike = False  # whether the ranks have compared their settings
        self._confidence = _confidences(bin_edges(self._weights.device))

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> OnlineThreshold:
        """Add a labelled batch.

        Args:
            logits: float of any width ``[B, K, H, W]`` or ``[K, H, W]``; no gradient flows.
            labels: integer ``[B, H, W]`` or ``[H, W]``, ``ignore_index`` where void.

        Returns:
            Itself, so that ``.threshold()`` can follow.

        Raises:
            ValueError: shapes or devices do not match; or, among the pixels scored, a label is
                neither a class nor void, or the logits of a labelled pixel are NaN. The last two
                raise on a CPU only. On an accelerator, where checking would wait for the device,
                the threshold is NaN from then on.
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
        bins = score_bins(1 - prob)
        if self.per_class:
            bins = bins + index * NUM_BINS
        size = self._recent.numel()
        bins = bins.clamp(0, size - 1).masked_fill(void, size).flatten()  # the bin of NaN is random
        counts = torch.zeros(size + 1, dtype=torch.int64, device=bins.device)
        counts.scatter_add_(0, bins, torch.ones_like(bins))
        counts = torch.where(bad, _BAD, counts[:size])
        self._recent = counts.reshape(self._recent.shape)
        self._before, self._weights = self._weights, self._add(self._weights, self._recent)
        self._unsynced += 1
        return self

    @torch.no_grad()
    def threshold(self) -> Tensor:
        """Smallest confidence that is kept: ``p >= threshold`` just if ``1 - p <= q`` in float32.

        Returns:
            float32 in [0, 1] on the device of the updates, ``[]`` or per class ``[K]``. It is 0,
            which keeps everything, if there are too few scores for alpha, as before the first
            update (or, per class, before the first pixel of the class).
        """
        from_above = self._weights.flip(-1).cumsum(-1)
        weight = from_above[:, -1:]
        # floor((W + 1) alpha) - 1 in units of 1 / 1024; exact in int64 for any weight.
        total = weight.to(torch.int64) + _UNIT
        numerator, denominator = self.alpha.numerator, self.alpha.denominator
        allowed = total // denominator * numerator
        allowed = allowed + total % denominator * numerator // denominator - _UNIT
        bins = NUM_BINS - 1 - (from_above <= allowed).sum(-1, keepdim=True)
        bins = torch.where(allowed >= 0, bins, NUM_BINS)
        threshold = self._confidence[bins].masked_fill(weight.isnan(), torch.nan).squeeze(-1)
        return threshold if self.per_class else threshold.squeeze(0)

    @torch.no_grad()
    def gate(self, logits: Tensor) -> Tensor:
        """Whether the most probable class is confident enough for a pseudo-label.

        Args:
            logits: float of any width ``[B, K, H, W]`` or ``[K, H, W]``.

        Returns:
            bool ``[B, H, W]`` or ``[H, W]``: True where the largest softmax probability, in
            float32, reaches the threshold (per class: that of the most probable class).

        Raises:
            ValueError: shapes do not match.
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
        """Combine the last updates of all ranks; call it after every update, or never.

        Afterwards every rank holds bit for bit the state of a single process that received the
        batches of all ranks as one batch. Without a process group it does nothing, and a second
        call adds nothing.

        Args:
            process_group: the ranks, all of them by default; every one of them must call this.

        Returns:
            Itself, so that ``.threshold()`` can follow.

        Raises:
            ValueError: several updates since the last call, after which ranks would disagree; or,
                in the first call, other settings than on another rank. Every rank raises it.
        """
        if not active():
            return self
        where = "OnlineThreshold.sync"
        most = self._unsynced
        if not self._alike:  # in the first call alone: it costs more than the sums do
            most = max(gather_alike(where, self._settings(), most, process_group))
            self._alike = True
        if most > 1 and dist.get_world_size(process_group) > 1:
            expected, got = "one update between two calls", f"{most} updates"
            fix = "call it after every update"
            raise ValueError(message(where, expected, got, fix))
        if self._weights.device.type == "cpu":  # there may have been no update yet
            self._move(device_without_data(process_group))
        recent = all_reduce_sum(self._recent, process_group)
        self._settle(self._add(self._before, recent))
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The state for a checkpoint: ``{"weights": float64 [1 or K, bins]}``, a copy."""
        return {"weights": self._weights.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a checkpoint; alpha and decay keep the values of this object.

        Raises:
            ValueError: not a result of :meth:`state_dict`, or one for other classes.
            TypeError: not a mapping, or weights that are not floating point.
        """
        where = "OnlineThreshold.load_state_dict"
        fix = "pass the result of state_dict"
        if not isinstance(state, Mapping):
            raise TypeError(message(where, "a state_dict", type(state).__name__, fix))
        weights = state.get("weights")
        if not isinstance(weights, Tensor):
            got = f"keys {sorted(map(str, state))}"
            raise ValueError(message(where, "'weights' as a tensor", got, fix))
        check_float(where, weights, name="weights", fix=fix)
        check_has_values(where, weights, name="weights")
        if weights.shape != self._weights.shape:
            expected, fix = (
                f"weights {shape(self._weights)}",
                "build the object as it was when saved",
            )
            raise ValueError(message(where, expected, shape(weights), fix))
        self._settle(weights.detach().to(self._weights.device, torch.float64, copy=True))

    def _settings(self) -> dict[str, object]:
        """What all ranks must share."""
        return {
            "num_classes": self.num_classes,
            "alpha": str(self.alpha),
            "per_class": self.per_class,
            "decay": self.decay,
            "stride": self.stride,
            "ignore_index": self.ignore_index,
        }

    def _add(self, weights: Tensor, counts: Tensor) -> Tensor:
        """Weights after an update; rows for which it has scores decay first."""
        seen = counts.any(-1, keepdim=True)
        older = torch.where(seen, (weights * self.decay).floor_(), weights)
        bad = counts.amin(-1, keepdim=True) < 0
        return older.add_(counts, alpha=_UNIT).masked_fill_(bad, torch.nan)

    def _settle(self, weights: Tensor) -> None:
        """Set ``weights``, with nothing left to sync."""
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
            expected, fix = (
                f"logits of {self.num_classes} classes",
                "build the object for this model",
            )
            raise ValueError(message(where, expected, shape(logits), fix))


def _planes(logits: Tensor) -> Tensor:
    """Reshape to ``[B, K, H W]``."""
    return logits.reshape(-1, *logits.shape[-3:]).flatten(2)


def _by_tiles(logits: Tensor, index: Tensor | None) -> Tensor:
    """Softmax of ``logits [B, K, N]`` in float32 at ``index [B, N]``, or its maximum.

    Both cases use the same tiles, so that a probability has the same bits in both.
    """
    if logits.device.type != "cpu" or is_compiling():
        return _chosen(logits, index)
    probs = logits.new_empty(logits.shape[0], logits.shape[2], dtype=torch.float32)
    for image, pixels in _tiles(logits):
        classes = None if index is None else index[image : image + 1, pixels]
        probs[image, pixels] = _chosen(logits[image : image + 1, :, pixels], classes)
    return probs


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
    """Smallest float32 p with ``1 - p <= q`` in float32, per q in [0, 1]; then 0, for q = +inf."""
    # 1 - p is exact for p >= 1/2. Below, it is rounded to a multiple of 2**-24, with ties to even.
    upper = scores >= 0.5
    least = ((1 - scores.to(torch.float64)) * 2**24).ceil() / 2**24
    guess = (least - torch.where(upper, 2.0**-25, 0)).clamp(min=0).to(torch.float32)
    above = torch.nextafter(guess, torch.ones_like(guess))
    return torch.cat([torch.where(1 - guess <= scores, guess, above), guess.new_zeros(1)])
