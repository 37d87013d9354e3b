"""From probabilities and thresholds to prediction sets and pseudo-labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpseg._internal.checks import (
    check_background,
    check_ignore_index,
    check_integer,
    check_probs,
    check_same_device,
    check_same_shape,
    check_threshold,
    is_compiling,
    message,
    shape,
    short,
)
from cpseg.core.argmax import Tile, best_of_classes, class_dtype, for_each_tile
from cpseg.core.nonconformity import check_drawing, check_score, nonconformity_map_unchecked

_INTEGERS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
# Not every version of PyTorch has all of them.
_LABEL_DTYPES = tuple(getattr(torch, name) for name in _INTEGERS if hasattr(torch, name))


@dataclass(frozen=True)
class Evidence:
    """Compact probabilities: all that selection by one threshold per pixel needs.

    Two probabilities and a class index per pixel: with them any alpha and any variant can be tried
    later without the model's full output.

    Attributes:
        best: largest score among the classes other than the background, as given, ``[B, H, W]``
            or ``[H, W]``.
        best_class: its class, the lowest index among ties, uint8 (int16 above 255 classes,
            int32 above 32,768).
        background_score: the score of the background, None without one.
        background: index of the background class, or None.
        num_classes: number of classes K.
        recalibration: fingerprint of the recalibration that the scores came through, or None.
        class_map: fingerprint of the class map that ``cpseg compact`` applied, or None.
    """

    best: Tensor
    best_class: Tensor
    background_score: Tensor | None
    background: int | None
    num_classes: int
    recalibration: str | None = None
    class_map: str | None = None

    def pseudo_labels(
        self,
        threshold: Tensor | float,
        *,
        ignore_index: int = 255,
        dtype: torch.dtype = torch.int64,
    ) -> Tensor:
        """The labels that :func:`pseudo_labels` gives for the scores behind this evidence.

        Args:
            threshold: a number, ``[]`` or ``[H, W]``; thresholds per class need all scores.
            ignore_index: the label of pixels whose set is empty.
            dtype: integer dtype of the labels.

        Returns:
            Labels, the shape of ``best``.

        Raises:
            ValueError: a threshold per class or of another size, an unfit ``ignore_index``.

        Reference:
            ConformalSAM (ICCV 2025), eq. 4.

        Example:
            >>> probs = torch.tensor([0.6, 0.3, 0.1]).reshape(3, 1, 1)
            >>> evidence(probs, background=0).pseudo_labels(0.75)
            tensor([[1]])
        """
        where = "Evidence.pseudo_labels"
        if isinstance(threshold, Tensor) and threshold.ndim == 3:
            expected, fix = "threshold [] or [H, W]", "thresholds per class need the class scores"
            raise ValueError(message(where, expected, shape(threshold), fix))
        threshold = check_threshold(where, threshold, self.best.unsqueeze(-3))
        _check_output(where, ignore_index, dtype, self.num_classes)
        parts = (self.best, self.best_class, self.background_score)
        return _select(parts, self.background, threshold, ignore_index).to(dtype)

    def score_of(self, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
        """LAC score ``1 - p`` of labels that were selected from this evidence.

        Args:
            labels: integer, the shape of ``best``: ``best_class``, the background, or ignored.
            ignore_index: the label of ignored pixels.

        Returns:
            float32, the shape of ``labels``; NaN where they are ignored.

        Raises:
            ValueError: labels of another shape or on another device.
            TypeError: labels or an ``ignore_index`` that are not integer.

        Example:
            >>> found = evidence(torch.tensor([0.6, 0.3, 0.1]).reshape(3, 1, 1), background=0)
            >>> found.score_of(torch.tensor([[0]])), found.score_of(torch.tensor([[1]]))
            (tensor([[0.4000]]), tensor([[0.7000]]))
        """
        where = "Evidence.score_of"
        check_integer(where, labels)
        check_same_shape(where, labels, self.best, name="labels", ref="best")
        check_same_device(where, labels, self.best, name="labels", reference="best")
        check_ignore_index(where, ignore_index)
        labels = labels.to(torch.int64)  # in a byte, other numbers would wrap around
        p = self.best
        if self.background_score is not None and self.background is not None:
            p = torch.where(labels == self.background, self.background_score, p)
        return (1 - p.to(torch.float32)).masked_fill(labels == ignore_index, torch.nan)

    def argmax(self, *, dtype: torch.dtype = torch.int64) -> Tensor:
        """The most probable class of every pixel, the lowest index among ties.

        Args:
            dtype: integer dtype of the result.

        Raises:
            ValueError: ``dtype`` does not hold every class.
            TypeError: ``dtype`` is not integer.

        Example:
            >>> evidence(torch.tensor([0.6, 0.3, 0.1]).reshape(3, 1, 1), background=0).argmax()
            tensor([[0]])
        """
        _check_dtype("Evidence.argmax", dtype, 0, self.num_classes - 1)
        label, back = self.best_class, self.background_score
        if back is not None and self.background is not None:
            behind = (back > self.best) | ((back == self.best) & (label > self.background))
            label = label.masked_fill(behind, self.background)
        return label.to(dtype)


def prediction_set(
    probs: Tensor,
    threshold: Tensor | float,
    *,
    score: str = "lac",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The set of classes whose nonconformity, ``1 - p`` for LAC, is at most the threshold.

    Args:
        probs: probabilities in [0, 1], float, ``[B, K, H, W]`` or ``[K, H, W]``.
        threshold: a number or float32 ``[]``, ``[H, W]`` or ``[K, H, W]``; +inf takes every class.
        score: the score used in calibration, see :func:`nonconformity`.
        generator: draws for the randomised APS and RAPS.

    Returns:
        bool, the shape of ``probs``.

    Raises:
        ValueError: shapes or devices do not belong together, or an unknown score.
        TypeError: ``probs`` is not floating point.

    Guarantee:
        With the threshold of a pixel-wise calibration, the true class at a given cell of a new
        image is in the set with probability in [1 - alpha, 1 - alpha + 1/(n + 1)], over the draw
        of the n calibration images and the new one, if they are exchangeable and the score
        function was fixed before.

    Reference:
        ConformalSAM (ICCV 2025), section 3.3.1.

    Example:
        >>> prediction_set(torch.tensor([0.6, 0.3, 0.1]).reshape(3, 1, 1), 0.75).flatten()
        tensor([ True,  True, False])
    """
    where = "prediction_set"
    check_score(where, score)
    check_probs(where, probs)
    check_drawing(where, score, probs, generator)
    threshold = check_threshold(where, threshold, probs)
    return nonconformity_map_unchecked(probs, score, generator) <= threshold


def pseudo_labels(
    probs: Tensor,
    threshold: Tensor | float,
    *,
    background: int | None,
    ignore_index: int = 255,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Labels where the prediction set allows one; the other pixels are ignored.

    The most probable class of the prediction set other than the background, the background where
    it stands alone in the set, ``ignore_index`` where the set is empty. Ties go to the lowest
    index.

    Args:
        probs: probabilities in [0, 1], float, ``[B, K, H, W]`` or ``[K, H, W]``. A pixel with a NaN
            among its scores is ignored.
        threshold: a number or float32 ``[]``, ``[H, W]`` or ``[K, H, W]``.
        background: index of a dominant class to suppress (VOC: 0), or None where every class
            counts (ADE20K). A wrong choice gives bad labels without an error.
        ignore_index: the label of pixels whose set is empty.
        dtype: integer dtype of the labels.

    Returns:
        Labels ``[B, H, W]`` or ``[H, W]``.

    Raises:
        ValueError: shapes or devices do not belong together, ``background`` is not a class,
            ``ignore_index`` is one or does not fit ``dtype``.
        TypeError: ``probs`` is not floating point.

    Guarantee:
        None for the chosen label: coverage is a promise about the set.

    Reference:
        ConformalSAM (ICCV 2025), eq. 4; its printed second case means that 0 is in C.

    Example:
        >>> probs = torch.tensor([[0.6, 0.3, 0.1], [0.9, 0.1, 0.0], [0.2, 0.2, 0.2]])
        >>> probs = probs.T.reshape(3, 1, 3)  # three pixels
        >>> pseudo_labels(probs, 0.75, background=0)
        tensor([[  1,   0, 255]])
    """
    where = "pseudo_labels"
    check_probs(where, probs)
    threshold = check_threshold(where, threshold, probs)
    check_background(where, background, probs.shape[-3])
    _check_output(where, ignore_index, dtype, probs.shape[-3])
    per_class = threshold if threshold.ndim == 3 else None
    batch = probs.detach() if probs.ndim == 4 else probs.detach().unsqueeze(0)
    size = batch[:, 0].shape
    if is_compiling() or batch.device.type != "cpu":
        found = best_of_classes(batch, background, per_class)
        back = None if background is None else batch[:, background]
        labels = _select((*found, back), background, threshold, ignore_index).to(dtype)
    else:
        labels = torch.empty(size, dtype=dtype, device=batch.device)
        limits = threshold.expand(*threshold.shape[:-2], *size[1:])

        def take(tile: Tile) -> None:
            back = None if background is None else batch[tile.image, background, tile.rows]
            parts = (tile.best, tile.best_class, back)
            limit = limits[..., tile.rows, :]
            labels[tile.image, tile.rows] = _select(parts, background, limit, ignore_index)

        for_each_tile(batch, background, per_class, take)
    return labels.reshape(*probs.shape[:-3], *size[1:])


def threshold_of(labels: Tensor, threshold: Tensor, *, ignore_index: int) -> Tensor:
    """The threshold that each pixel's label must pass.

    Args:
        labels: classes or ``ignore_index``, integer, ``[B, H, W]`` or ``[H, W]``.
        threshold: ``[H, W]``, or ``[K, H, W]`` per class.
        ignore_index: the label of ignored pixels, which get the threshold of class 0.

    Returns:
        ``[H, W]``, or the shape of ``labels`` where thresholds are per class.

    Example:
        >>> per_class = torch.tensor([0.2, 0.7]).reshape(2, 1, 1).expand(2, 1, 2)
        >>> threshold_of(torch.tensor([[1, 0]]), per_class, ignore_index=255)
        tensor([[0.7000, 0.2000]])
    """
    if threshold.ndim == 2:
        return threshold
    index = labels.to(torch.int64)
    index = index.masked_fill(index == ignore_index, 0).unsqueeze(-3)
    per_class = threshold.expand(*index.shape[:-3], *threshold.shape)
    return per_class.gather(-3, index).squeeze(-3)


def evidence(probs: Tensor, *, background: int | None) -> Evidence:
    """The best score besides the background, its class, and the background's score.

    Args:
        probs: probabilities in [0, 1], float, ``[B, K, H, W]`` or ``[K, H, W]``.
        background: index of a dominant class to suppress, or None where every class counts.

    Returns:
        An :class:`Evidence`, two probabilities and an index per pixel, whatever K is.

    Raises:
        ValueError: wrong rank, an empty batch, ``background`` is not a class or the only one.
        TypeError: ``probs`` is not floating point.

    Example:
        >>> found = evidence(torch.tensor([0.6, 0.3, 0.1]).reshape(3, 1, 1), background=0)
        >>> found.best.item(), found.best_class.item(), found.background_score.item()
        (0.30000001192092896, 1, 0.6000000238418579)
    """
    check_probs("evidence", probs)
    check_background("evidence", background, probs.shape[-3])
    best, best_class, back = _find(probs, background)
    # A copy: evidence that held a view would hold all scores.
    back = None if back is None else back.clone()
    best_class = best_class.to(class_dtype(probs.shape[-3]))
    return Evidence(best, best_class, back, background, probs.shape[-3])


# Best score, its class, the background's score: what an Evidence is made of. Functions pass the
# parts among themselves, since older versions of torch.compile cannot build an object.
_Parts = tuple[Tensor, Tensor, Tensor | None]


def _select(parts: _Parts, background: int | None, threshold: Tensor, ignore_index: int) -> Tensor:
    """Labels by eq. 4, as float32 where that holds ``ignore_index`` and as int64 elsewhere.

    Comparisons that write floats keep vector instructions, and products choose. With thresholds per
    class the best must be that of :func:`best_of_classes` with them: -inf where none is inside.
    """
    best, best_class, back = parts
    per_class = threshold.ndim == 3
    limit = torch.finfo(torch.float32).max if per_class else threshold
    fits = abs(ignore_index) < 2**24
    ignored = ignore_index if fits else -1
    label = best_class.to(torch.float32)
    some = inside = _inside(best, limit)
    if back is None or background is None:
        label = label - ignored
    else:
        label = (label - background).mul_(inside).add_(background - ignored)
        # Some class is inside just if the largest score is. NaN spreads into that: ignored.
        some = _inside(torch.maximum(best, back), limit)
        if per_class:
            some = some * torch.maximum(inside, _inside(back, threshold[background]))
    label = label.mul_(some).add_(ignored)
    return label if fits else torch.where(label < 0, ignore_index, label.to(torch.int64))


def _inside(p: Tensor, threshold: Tensor | float) -> Tensor:
    """Membership as 1 or 0: the score that calibration ranked, in float32, within the threshold."""
    return (1 - p.to(torch.float32)).le_(threshold)


def _find(probs: Tensor, background: int | None) -> _Parts:
    """The best class besides the background, and the background's score."""
    batch = probs.detach() if probs.ndim == 4 else probs.detach().unsqueeze(0)
    best, best_class = best_of_classes(batch, background, None)
    if probs.ndim == 3:
        best, best_class = best[0], best_class[0]
    back = None if background is None else probs.detach().select(-3, background)
    return best, best_class, back


def _check_output(where: str, ignore_index: int, dtype: torch.dtype, num_classes: int) -> None:
    check_ignore_index(where, ignore_index, num_classes)
    _check_dtype(where, dtype, min(ignore_index, 0), max(ignore_index, num_classes - 1))


def _check_dtype(where: str, dtype: torch.dtype, low: int, high: int) -> None:
    """An integer dtype that holds labels from ``low`` to ``high``."""
    if dtype not in _LABEL_DTYPES:
        fix = "pass torch.int64 or torch.uint8"
        raise TypeError(message(where, "an integer dtype", short(dtype), fix))
    info = torch.iinfo(dtype)
    if low < info.min or high > info.max:
        expected = f"a dtype that holds labels {low}..{high}"
        raise ValueError(message(where, expected, str(dtype), "pass torch.int64"))
