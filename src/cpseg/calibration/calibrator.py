"""One ``Calibrator`` for every partition of the grid; it computes a ``Calibration``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpseg._internal import distributed as ranks
from cpseg._internal.checks import (
    MOST_CLASSES,
    SCORES_FIX,
    check_alike,
    check_alpha,
    check_background,
    check_choice,
    check_count,
    check_flag,
    check_float,
    check_generator,
    check_ignore_index,
    check_image_ids,
    check_labels,
    check_not_empty,
    check_other,
    check_unit_interval,
    in_unit_interval,
    labels_outside,
    message,
    shape,
    short,
    surely_in_unit_interval,
)
from cpseg._internal.streaming import begin_sync, gather_alike, refuse_after_sync
from cpseg.calibration.calibration import UNITS, Calibration
from cpseg.calibration.provenance import Provenance
from cpseg.calibration.score_stores import BinnedScores, ClassScores, TopScores
from cpseg.core.nonconformity import (
    check_drawing,
    check_score,
    score_range,
    scores_and_void,
)
from cpseg.core.quantiles import from_top
from cpseg.groups.fixed import check_groups, is_pixelwise
from cpseg.groups.resampling import to_grid
from cpseg.recalibration.recalibration import Recalibration, join_for
from cpseg.recalibration.sources import Probs

_MOST_SCORES = 2**36  # 256 GiB
_LOOKED_AT = 2**17  # of the probabilities that the score does not use, about so many are checked


class Calibrator:
    """Streaming calibration: thresholds from labelled images, exact for any split or order.

    Args:
        groups: which cells share a threshold, integer ``[H, W]``, from :mod:`cpseg.groups`. Where
            every cell is its own group the largest scores are kept and the result is exact; else
            scores are counted in bins and the threshold is rounded up by less than 1 % in odds.
        alpha: miscoverage rate in (0, 1), the largest that ``compute`` will be asked for.
        background: index of a dominant class that selection suppresses, or None.
        num_classes: number of classes; read off the first update where not given.
        per_class: a separate threshold for every class.
        max_images: an upper bound on the number of images; pixel-wise it bounds the memory to
            ``floor(alpha (max_images + 1))`` floats per cell, and without it all scores are kept.
        score: the nonconformity score, see :func:`nonconformity`; labels need ``"lac"``.
        ignore_index: the label of void pixels.
        unit: what is exchangeable in a pooled group: ``"pixel"`` takes the quantile of all pixels,
            ``"image"`` lets every image weigh the same (conformal risk control; its pixels are
            those that the grid samples). Where every cell is its own group both are the same.
        fallback: coarser group maps ``[H, W]``, blocks and then the image for instance: a cell
            whose threshold is +inf takes that of the first of them that is finite, and with it
            loses its promise.
        generator: draws for the randomised APS and RAPS; the thresholds then depend on the order
            of images.
        recalibration: applied by ``update`` to the probabilities first, and recorded in the
            calibration. Fit it on other images than these, or nothing is promised.
        variant: the name of the groups that the calibration records: ``"pixel"`` where every cell
            is its own group and ``"groups"`` elsewhere by default.
        provenance: what else is known of the data, for the calibration to record; the calibrator
            adds the ids of its images.

    Raises:
        ValueError: a value outside its range.
        TypeError: groups that are not integer.

    Guarantee:
        See :class:`Calibration`, whose thresholds this computes.

    Reference:
        ConformalSAM (ICCV 2025), section 3.3.1; Brunekreef et al. (2024) for the variants.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> calibrator = Calibrator(groups.pixel((2, 2)), alpha=0.1, background=0)
        >>> for _ in range(10):
        ...     probs = torch.rand(2, 3, 2, 2, generator=generator).softmax(1)
        ...     calibrator.update(probs, torch.randint(3, (2, 2, 2), generator=generator))
        >>> calibration = calibrator.compute()
        >>> calibration.num_images, calibration.infinite_share
        (20, 0.0)
        >>> calibration.pseudo_labels(probs).shape
        torch.Size([2, 2, 2])
    """

    def __init__(
        self,
        groups: Tensor,
        *,
        alpha: float | str | Fraction = 0.05,
        background: int | None = None,
        num_classes: int | None = None,
        per_class: bool = False,
        max_images: int | None = None,
        score: str = "lac",
        ignore_index: int = 255,
        unit: str = "pixel",
        fallback: Sequence[Tensor] = (),
        generator: torch.Generator | None = None,
        recalibration: Recalibration | None = None,
        variant: str | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        where = "Calibrator"
        check_groups(where, groups)
        self.alpha = check_alpha(where, alpha)
        check_score(where, score)
        if max_images is not None:
            fix = "count the images, or leave it out"
            check_count(where, max_images, name="max_images", fix=fix)
        check_ignore_index(where, ignore_index)
        check_flag(where, per_class, name="per_class")
        if num_classes is not None:
            _check_classes(where, num_classes, background, ignore_index, per_class)
        if not isinstance(fallback, (list, tuple)):
            got, fix = type(fallback).__name__, "pass a list of group maps"
            raise TypeError(message(where, "fallback as a list of groups", got, fix))
        if generator is not None:
            check_generator(where, generator, getattr(generator, "device", groups.device))
        if recalibration is not None and not isinstance(recalibration, Recalibration):
            got, fix = type(recalibration).__name__, "pass the result of Recalibrator.fit"
            raise TypeError(message(where, "a Recalibration or None", got, fix))
        if variant is not None and not isinstance(variant, str):
            fix = "name it in a word"
            raise TypeError(message(where, "variant as a word", short(variant), fix))
        self.groups = groups.to(torch.int64)
        self.background = background
        self.num_classes = num_classes
        self.per_class = per_class
        self.max_images = max_images
        self.score = score
        self.ignore_index = ignore_index
        check_choice(where, unit, UNITS, name="unit")
        for coarser in fallback:
            check_groups(where, coarser)
            if coarser.shape != groups.shape:
                expected, got = f"fallback groups of the grid {shape(groups)}", shape(coarser)
                raise ValueError(message(where, expected, got, "build both with the same size"))
        self.unit = unit
        self.fallback = tuple(coarser.to(torch.int64) for coarser in fallback)
        self.generator = generator
        self.recalibration = recalibration
        if recalibration is not None:
            if num_classes not in (None, recalibration.num_classes):
                expected = f"num_classes={recalibration.num_classes}, those of the recalibration"
                raise ValueError(message(where, expected, str(num_classes), "leave it out"))
            self.num_classes = recalibration.num_classes
            _check_classes(where, self.num_classes, background, ignore_index, per_class)
        self._pixelwise = is_pixelwise(groups)
        if max_images is not None and self._pixelwise and not per_class:
            kept = from_top(max_images, self.alpha) * groups.numel()
            if kept > _MOST_SCORES:
                expected, fix = f"at most {_MOST_SCORES} scores to keep", "count the images"
                got = f"{short(kept)} for max_images={short(max_images)}"
                raise ValueError(message(where, expected, got, fix))
        if variant == "pixel" and not self._pixelwise:
            fix = "pass groups.pixel(size), or another name"
            raise ValueError(message(where, "a group per cell for 'pixel'", "pooled groups", fix))
        self.variant = variant or ("pixel" if self._pixelwise else "groups")
        self._provenance = Provenance() if provenance is None else provenance
        self._store: TopScores | ClassScores | BinnedScores | None = None
        self._coarser: list[BinnedScores] = []
        # On an accelerator a look at the values would wait for the device: a batch with bad ones
        # counts for nothing there, and `compute` says so.
        self._bad_batches = torch.zeros((), dtype=torch.int64)
        self._synced = False
        self._largest_image = 0
        self.ids: set[str] = set()

    def __repr__(self) -> str:
        parts = [
            self.variant,
            "per class" if self.per_class else "",
            f"score {self.score}" if self.score != "lac" else "",
            f"{self.num_classes or 'unknown'} classes",
            f"grid {self._grid[0]}x{self._grid[1]}",
            f"alpha {float(self.alpha):g}",
            f"{self.num_images} images",
            "" if self.recalibration is None else "recalibrated",
        ]
        return f"Calibrator({', '.join(filter(None, parts))})"

    @property
    def num_images(self) -> int:
        """Images seen so far."""
        return 0 if self._store is None else self._store.images

    @property
    def largest_image(self) -> int:
        """Pixels of the largest image (or score map) seen so far, with void; 0 before the first."""
        return self._largest_image

    @property
    def provenance(self) -> Provenance:
        """What the calibration records of its data: all that was given, and the image ids."""
        images = tuple(sorted({*self._provenance.images, *self.ids}))
        return replace(self._provenance, images=images)

    @property
    def largest_alpha(self) -> Fraction | None:
        """The largest alpha that ``compute`` takes; None where every one will do."""
        bounded = self._pixelwise and not self.per_class and self.max_images is not None
        return self.alpha if bounded else None

    def update(
        self, probs: Probs, labels: Tensor, *, ids: str | Sequence[str] | None = None
    ) -> None:
        """Score a batch of labelled images.

        Args:
            probs: probabilities of the model in [0, 1], float, ``[B, K, h, w]`` or ``[K, h, w]``,
                any size: the score map is brought to the grid by nearest sampling. With a
                recalibration of several sources, those that it takes.
            labels: true classes, integer, ``[B, h, w]`` or ``[h, w]``, ``ignore_index`` for void.
            ids: a name for every image, a string for a single one, so that a ``Certifier`` can
                tell them from its own; remembered in ``ids``.

        Raises:
            ValueError: wrong rank or shape, an empty batch, another device or number of classes
                than before, scores outside [0, 1] or NaN, labels that are neither class nor void,
                more than ``max_images`` images, an id that came before. Nothing of the batch is
                counted. On an accelerator the two checks on values are reported by ``compute``.
                LAC uses the probability of the true class alone: of the others in a large batch
                some rows are checked, about 100,000 values.
            TypeError: wrong dtypes.
        """
        where = "Calibrator.update"
        probs = join_for(where, self.recalibration, probs)
        check_labels(where, labels, probs)
        num_classes = probs.shape[-3]
        if self.recalibration is not None:
            num_classes = self.recalibration.num_classes
        if self.num_classes is None:
            _check_classes(where, num_classes, self.background, self.ignore_index, self.per_class)
        elif self.recalibration is None and num_classes != self.num_classes:
            expected, got = f"{self.num_classes} classes as before", f"probs {shape(probs)}"
            raise ValueError(message(where, expected, got, "use one calibrator per model"))
        if probs.ndim == 3:
            probs, labels = probs.unsqueeze(0), labels.unsqueeze(0)
        names = check_image_ids(where, ids, len(probs), self.ids)
        check_drawing(where, self.score, probs, self.generator)
        self._check_room(where, len(probs), probs.device)
        if probs.device.type == "cpu":
            if not self._uses_one_class:
                check_unit_interval(where, self._source(probs), name="probs", fix=SCORES_FIX)
            scores, void = self._score(where, probs, labels)
            if self._uses_one_class and not (
                surely_in_unit_interval(scores) and surely_in_unit_interval(_some_rows(probs))
            ):
                check_unit_interval(where, probs, name="probs", fix=SCORES_FIX)
        else:
            labels = labels.to(torch.int64)
            bad = labels_outside(labels, num_classes, self.ignore_index)
            labels = labels.masked_fill(bad, self.ignore_index)
            scores, void = self._score(where, probs, labels)
            if self._uses_one_class:
                inside = in_unit_interval(scores) & in_unit_interval(_some_rows(probs))
            else:
                inside = in_unit_interval(self._source(probs))
            scores = self._without_bad(scores, bad.any() | ~inside)
        if void is not None:
            scores.masked_fill_(void, torch.nan)
        self.num_classes = num_classes
        self._largest_image = max(self._largest_image, scores[0].numel())
        scores = to_grid(scores, self._grid)
        classes = None
        if self.per_class:  # void pixels may have any: their score is NaN
            classes = to_grid(labels.to(torch.int64), self._grid).masked_fill(scores.isnan(), 0)
        self._take(scores, classes)
        self.ids.update(names or ())

    def update_scores(self, scores: Tensor) -> None:
        """Take nonconformity scores made elsewhere.

        Args:
            scores: float ``[B, h, w]`` or ``[h, w]``, NaN where there is none; in the range of the
                calibrator's score ([0, 1] for LAC) unless every cell is its own group.

        Raises:
            ValueError: wrong rank, an empty batch, another device, scores outside their range
                for pooled groups, thresholds per class (which need labels), too many images.
            TypeError: not floating point.
        """
        where = "Calibrator.update_scores"
        if self.per_class:
            fix = "call update, or calibrate without per_class"
            raise ValueError(message(where, "probs and labels per class", "scores", fix))
        check_float(where, scores, name="scores")
        if scores.ndim not in (2, 3):
            fix = "pass one score per pixel"
            raise ValueError(message(where, "scores [B, H, W] or [H, W]", shape(scores), fix))
        check_not_empty(where, scores, name="scores")
        scores = scores.detach().reshape(-1, *scores.shape[-2:]).to(torch.float32)
        self._check_room(where, len(scores), scores.device)
        if not self._pixelwise or self.fallback:
            low, high = self._limits(where)
            within = scores.nan_to_num(nan=low).sub_(low).div_(high - low)
            if scores.device.type == "cpu":
                fix = "pooled groups count scores in bins of that range"
                check_unit_interval(
                    where, within, name="scores", fix=fix, interval=f"[{low:g}, {high:g}]"
                )
            else:
                scores = self._without_bad(scores, ~in_unit_interval(within))
        self._largest_image = max(self._largest_image, scores[0].numel())
        # The store keeps the tensor: it must not be the caller's.
        self._take(to_grid(scores, self._grid).clone(), None)

    def merge(self, other: Calibrator) -> None:
        """Take all that another calibrator of the same settings has seen; it stays as it is.

        Raises:
            ValueError: other settings, another device, more than ``max_images`` together, or an
                id in both.
        """
        where = "Calibrator.merge"
        check_other(where, self, other)
        own, theirs = self._settings(), other._settings()
        if self.num_classes is None or other.num_classes is None:
            own["num_classes"] = theirs["num_classes"] = None
        check_alike(where, own, theirs)
        if other._store is None:
            return
        self._check_room(where, other.num_images, other._bad_batches.device)
        check_image_ids(where, sorted(other.ids), len(other.ids), self.ids)
        self.ids |= other.ids
        self._largest_image = max(self._largest_image, other._largest_image)
        self.num_classes = other.num_classes if self.num_classes is None else self.num_classes
        store: Any = self._ensure_store(other._bad_batches.device)
        store.merge(other._store)
        for own_pooled, their_pooled in zip(self._coarser, other._coarser, strict=True):
            own_pooled.merge(their_pooled)
        self._bad_batches += other._bad_batches

    def sync(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Merge over the ranks of ``torch.distributed``; every rank then holds the whole.

        Call it once, after the last update: a second call would count every image again. A rank
        without images takes part like the others. Does nothing where no process group is set up.

        Args:
            process_group: the ranks to merge over; all by default.

        Raises:
            ValueError: settings differ between ranks (said by every rank), more than
                ``max_images`` together, an id on two ranks, or a second call.
        """
        where = "Calibrator.sync"
        if not begin_sync(where, self._synced):
            return
        device = self._bad_batches.device
        if self._store is None:
            device = ranks.device_without_data(process_group)
        if self._check_ranks_agree(where, process_group):
            self._ensure_store(device).sync(process_group)
            for pooled in self._coarser:
                pooled.sync(process_group)
            self._bad_batches = ranks.all_reduce_sum(self._bad_batches, process_group)
        self._synced = True

    def compute(self, alpha: float | str | Fraction | None = None) -> Calibration:
        """The thresholds for ``alpha``, by default the one given at the start.

        Raises:
            ValueError: nothing but void so far, ``alpha`` above the one that the kept scores
                suffice for, or (on an accelerator) batches with bad values among the updates.
        """
        where = "Calibrator.compute"
        exact = self.alpha if alpha is None else check_alpha(where, alpha)
        if self._store is None:
            raise ValueError(message(where, "labelled images", "none", "call update first"))
        if self.largest_alpha is not None and exact > self.largest_alpha:
            expected = f"alpha <= {float(self.alpha):g}, the scores kept with max_images allow"
            fix = f"build the calibrator with alpha={float(exact):g}"
            raise ValueError(message(where, expected, f"{float(exact):g}", fix))
        if int(self._bad_batches) > 0:
            expected = f"probs in [0, 1] and labels among the classes or {self.ignore_index}"
            got = f"{int(self._bad_batches)} batches with other values (left out)"
            raise ValueError(message(where, expected, got, SCORES_FIX))
        threshold, count = self._store.quantile(exact)
        level = torch.zeros_like(count, dtype=torch.uint8)
        for number, pooled in enumerate(self._coarser, 1):
            missing = threshold.isposinf()
            other, behind = pooled.quantile(exact)
            level = torch.where(missing & other.isfinite(), number, level).to(torch.uint8)
            count = torch.where(missing, behind, count)
            threshold = torch.where(missing, other, threshold)
        if not bool(count.any()):
            got = f"only void pixels in {self.num_images} images"
            fix = f"check ignore_index ({self.ignore_index}), which is --void of the command"
            raise ValueError(message(where, "at least one labelled pixel", got, fix))
        return Calibration(
            threshold,
            count,
            alpha=float(exact),
            num_images=self.num_images,
            num_classes=self.num_classes,
            background=self.background,
            score=self.score,
            ignore_index=self.ignore_index,
            variant=self.variant,
            unit=self.unit,
            randomized=self.generator is not None,
            recalibration=self.recalibration,
            level=level if self._coarser else None,
            extra=self.provenance,
        )

    def p_values(self, probs: Probs, labels: Tensor) -> Tensor:
        """Conformal p-value of one class a pixel: the share of calibration scores as strange.

        ``(1 + number of the cell's scores at least as large) / (n + 1)``. It is above alpha just
        where that class is in the prediction set at alpha, for every alpha.

        Args:
            probs: probabilities in [0, 1], float, ``[B, K, h, w]`` or ``[K, h, w]``, any size.
            labels: the class of each pixel, integer, ``[B, h, w]`` or ``[h, w]``.

        Returns:
            float64, the shape of ``labels``; NaN where they are ``ignore_index``, 1 where no score
            is behind the cell.

        Raises:
            ValueError: nothing to compare with, randomised scores, a fallback, another number of
                classes, or ``max_images`` that let scores be forgotten.
            TypeError: wrong dtypes.

        Guarantee:
            Pixel-wise, at each cell of a new image: P(p-value of the true class <= a) <= a for
            every a, where images are exchangeable. With binned scores it is rounded up. With
            ``unit="image"`` the number is that of conformal risk control (shares of images in
            place of scores) and promises no more than its sets do. For a class chosen by looking
            at ``probs`` it promises nothing.

        Reference:
            Vovk, Gammerman & Shafer (2005), section 2.2.
        """
        return self.p_values_and_counts(probs, labels, where="Calibrator.p_values")[0]

    def p_values_and_counts(
        self, probs: Probs, labels: Tensor, *, where: str = "Calibrator.p_values_and_counts"
    ) -> tuple[Tensor, Tensor]:
        """:meth:`p_values`, and how many calibration scores are behind each.

        Args:
            probs: as there.
            labels: as there.
            where: who asks, for messages.

        Returns:
            p-values, and int64 counts of scores (of images where those are the unit).

        Raises:
            ValueError: as there.
            TypeError: as there.
        """
        probs = join_for(where, self.recalibration, probs)
        check_labels(where, labels, probs)
        if self._store is None:
            raise ValueError(message(where, "labelled images", "none", "call update first"))
        if self.recalibration is None and self.num_classes not in (None, probs.shape[-3]):
            expected, got = f"{self.num_classes} classes as before", f"probs {shape(probs)}"
            raise ValueError(message(where, expected, got, "use the model of the calibration"))
        if self.generator is not None or self.fallback:
            got = "a generator" if self.generator is not None else "a fallback"
            fix = "calibrate without it for p-values"
            raise ValueError(message(where, "one fixed score and group a cell", got, fix))
        if not self._store.complete:
            expected = "a calibrator that keeps every score"
            got, fix = f"max_images={self.max_images}", "build it without max_images"
            raise ValueError(message(where, expected, got, fix))
        scores, void = self._score(where, probs, labels)
        if void is not None:
            scores.masked_fill_(void, torch.nan)
        rows = scores.reshape(-1, *scores.shape[-2:])
        classes = None
        if self.per_class:
            classes = labels.to(torch.int64).reshape(rows.shape).masked_fill(rows.isnan(), 0)
        at_least, count = self._store.at_least(rows, classes)
        found = (at_least + 1).to(torch.float64) / (count + 1)
        found = found.masked_fill(rows.isnan(), torch.nan)
        return found.reshape(scores.shape), count.reshape(scores.shape)

    @property
    def _grid(self) -> tuple[int, int]:
        return self.groups.shape[0], self.groups.shape[1]

    def _check_room(self, where: str, images: int, device: torch.device) -> None:
        """A batch fits: not after ``sync``, on the device of those before, not too many images."""
        fix = "sync after the last update, or start a new calibrator and merge"
        refuse_after_sync(where, self._synced, fix=fix)
        if self._store is not None and device != self._bad_batches.device:
            expected = f"tensors on {self._bad_batches.device} as before"
            raise ValueError(message(where, expected, str(device), "move them with .to(device)"))
        if self.max_images is not None and self.num_images + images > self.max_images:
            expected = f"at most max_images={self.max_images} images"
            got = f"{self.num_images + images}"
            raise ValueError(message(where, expected, got, "build it with a larger max_images"))

    def _ensure_store(self, device: torch.device) -> TopScores | ClassScores | BinnedScores:
        if self._store is None:
            self._bad_batches = self._bad_batches.to(device)
            layers = self.num_classes if self.per_class else None
            self._coarser = [self._pooled(coarser, device) for coarser in self.fallback]
            if not self._pixelwise:
                self._store = self._pooled(self.groups, device)
            elif layers is not None:
                self._store = ClassScores(self._grid, num_classes=layers, device=device)
            else:
                self._store = TopScores(
                    self._grid, alpha=self.alpha, max_images=self.max_images, device=device
                )
        return self._store

    def _pooled(self, groups: Tensor, device: torch.device) -> BinnedScores:
        return BinnedScores(
            groups,
            num_classes=self.num_classes if self.per_class else None,
            device=device,
            limits=self._limits("Calibrator"),
            per_image=self.unit == "image",
        )

    def _limits(self, where: str) -> tuple[float, float]:
        """The range of the score, which depends on the number of classes for RAPS alone."""
        if self.num_classes is None and self.score.startswith("raps"):
            fix = "pass num_classes to the Calibrator"
            raise ValueError(message(where, "the number of classes for raps", "none", fix))
        return score_range(self.score, self.num_classes or 1)

    def _source(self, probs: Tensor) -> Tensor:
        """The probabilities of a model, without the image features that may follow them."""
        return probs if self.recalibration is None else probs[:, : self.recalibration.num_source]

    @property
    def _uses_one_class(self) -> bool:
        """Whether a score is made of the probability of the true class alone."""
        return self.score == "lac" and self.recalibration is None

    def _score(self, where: str, probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.recalibration is not None:
            probs = self.recalibration(probs)
        return scores_and_void(where, probs, labels, self.ignore_index, self.score, self.generator)

    def _take(self, scores: Tensor, classes: Tensor | None) -> None:
        """Let every store take scores on the grid."""
        store = self._ensure_store(scores.device)
        for pooled in self._coarser:
            pooled.update(scores, classes)
        store.update(scores, classes)

    def _without_bad(self, scores: Tensor, bad: Tensor) -> Tensor:
        """No score where the batch is bad, and note it, without waiting for the device."""
        self._bad_batches = self._bad_batches.to(scores.device) + bad
        return scores.masked_fill(bad, torch.nan)

    def _settings(self) -> dict[str, Any]:
        """What two calibrators must share to be merged."""
        maps = [coarser.cpu().numpy().tobytes() for coarser in (self.groups, *self.fallback)]
        digests = [hashlib.sha256(cells).hexdigest()[:16] for cells in maps]
        return {
            "grid": list(self._grid),
            "groups": digests[0],
            "fallback": digests[1:],
            "unit": self.unit,
            "randomized": self.generator is not None,
            "recalibration": self.recalibration and self.recalibration.fingerprint,
            "alpha": str(self.alpha),
            "background": self.background,
            "num_classes": self.num_classes,
            "per_class": self.per_class,
            "max_images": self.max_images,
            "score": self.score,
            "ignore_index": self.ignore_index,
        }

    def _check_ranks_agree(self, where: str, group: dist.ProcessGroup | None) -> bool:
        """Raise on every rank alike unless all can be merged; whether there is any image."""
        settings = {**self._settings(), "num_classes": None}
        state = (self.num_classes, self.num_images, sorted(self.ids), self._largest_image)
        everyone = gather_alike(where, settings, state, group)
        classes, images, ids, largest = zip(*everyone, strict=True)
        known = {number for number in classes if number is not None}
        if len(known) > 1:
            expected, got = "the same number of classes on all ranks", str(sorted(known))
            raise ValueError(message(where, expected, got, "use one model"))
        if self.max_images is not None and sum(images) > self.max_images:
            expected = f"at most max_images={self.max_images} images"
            got, fix = f"{sum(images)} on all ranks", "build it with a larger max_images"
            raise ValueError(message(where, expected, got, fix))
        names = [name for each in ids for name in each]
        self.ids = set(check_image_ids(where, names, len(names), set()) or ())
        self.num_classes = known.pop() if known else None
        self._largest_image = max(largest)
        return any(images)


def _some_rows(probs: Tensor) -> Tensor:
    """All rows of a small batch, evenly chosen ones of a large batch."""
    return probs[..., :: max(1, probs.numel() // _LOOKED_AT), :]


def _check_classes(
    where: str, num_classes: int, background: int | None, ignore: int, per_class: bool
) -> None:
    fix = "count the probabilities of a pixel"
    most = MOST_CLASSES if per_class else None
    check_count(where, num_classes, name="num_classes", fix=fix, most=most)
    check_background(where, background, num_classes)
    check_ignore_index(where, ignore, num_classes)
