"""``Certifier``: a bound on the error of the labels that are kept, proven on labelled images."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cpseg._internal.checks import (
    check_alike,
    check_alpha,
    check_choice,
    check_count,
    check_flag,
    check_image_ids,
    check_label_values,
    check_labels,
    check_other,
    message,
)
from cpseg._internal.streaming import begin_sync, gather_alike, refuse_after_sync
from cpseg.calibration.calibration import Calibration
from cpseg.calibration.calibrator import Calibrator
from cpseg.calibration.certificate import METHODS, PER, PVALUES, Certificate
from cpseg.certification.p_values import Floats
from cpseg.certification.rule_choice import (
    Integers,
    Start,
    Statement,
    choose,
    fewest_images,
    losses_of,
    starts_of,
)
from cpseg.core.nested_rules import confusion_per_alpha
from cpseg.groups.resampling import to_image
from cpseg.recalibration.sources import Probs

# Strictest first: fine where little is kept, and where nearly everything is.
ALPHAS = (
    *("0.995", "0.99", "0.98", "0.97", "0.96"),
    *(f"0.{percent:02d}" for percent in range(95, 5, -2)),
    *("0.05", "0.04", "0.03", "0.02", "0.01"),
)


class _Image(NamedTuple):
    """Counts of one image, ``[C, A]``: one rule (or one per class) at every alpha."""

    name: str | None
    wrong: Integers
    kept: Integers
    pixels: int
    area: int

    @property
    def key(self) -> tuple[str, bytes, bytes]:
        """The same for the same image, and an order that depends on nothing else."""
        return (self.name or "", self.wrong.tobytes(), self.kept.tobytes())


class _Counts(NamedTuple):
    """The counts of several images, in the order of the bets: ``[n, C, A]``, ``[n]``, ``[n]``."""

    wrong: Integers
    kept: Integers
    pixels: Integers
    area: Integers

    @classmethod
    def of(cls, images: Sequence[_Image]) -> _Counts:
        """Of images, at least one."""
        wrong, kept = ([getattr(image, name) for image in images] for name in ("wrong", "kept"))
        sizes = np.array([(image.pixels, image.area) for image in images], np.int64)
        return cls(np.stack(wrong), np.stack(kept), sizes[:, 0], sizes[:, 1])


class Certifier:
    """The loosest selection rule whose error is proven to be small, on separate labelled images.

    Every alpha of a grid is a rule: the pseudo-labels of ``calibrator.compute(alpha)``. The error
    of each rule is measured on labelled images other than the calibration images, and the loosest
    rule that can be certified is returned. Images without any labelled pixel do not count.

    - ``method="ltt", per="labels"``: of all labels kept, at most ``max_error`` are wrong. Pixels
      are pooled: a large image weighs more than a small one, and the labelled pixels of an image
      stand for all its pixels. An image that keeps nothing proves nothing. Rules are tested from
      the level on where :meth:`learn_order` expects most, to looser ones, up to the first that is
      not proven (fixed-sequence testing). The error need not be monotone in alpha.
    - ``method="ltt", per="image"``: among images that keep a label, the mean over images of the
      share of wrong labels is at most ``max_error``. Every such image weighs the same, so that
      of all labels more may be wrong. Rules are tested in the same way.
    - ``method="crc"``: the share of an image's pixels with a wrong label, made monotone by a
      running maximum from the strictest rule.

    Per class, a pixel gets its label from the loosest rule, and keeps it if its class is in the
    set at the alpha certified for that class; a class without a certified alpha keeps no label.
    ``"ltt"`` tests each of K classes at ``delta / K``. ``"crc"`` bounds an expectation per class,
    which needs no correction, but the error of all classes together may be K times as large.

    Args:
        calibrator: has seen its images, with the LAC score and without thresholds per class. Its
            thresholds are computed once, here.
        alphas: levels in (0, 1), in any order; by default a grid from 0.995 to 0.01, as far as
            the calibrator allows.
        max_error: the bound on the mean error of an image.
        delta: 1 - confidence of ``"ltt"``.
        method: ``"ltt"`` or ``"crc"``.
        per: ``"labels"`` or ``"image"``, what ``"ltt"`` bounds; ``"crc"`` has a statement of its
            own and does not use it.
        max_pixels: of ``per="labels"``: pixels of the largest image that the statement is about;
            larger images are left out, and the certificate says so. By default the largest that
            was seen, here or by the calibrator.
        pvalue: ``"betting"`` or ``"hoeffding-bentkus"``, chosen before the images are seen.
        per_class: a level for every class.
        seed: of the order in which ``"betting"`` takes the images.

    Raises:
        ValueError: a value outside its range, or a calibrator that cannot be certified.
        TypeError: not a calibrator.

    Guarantee:
        ``"ltt"``: with probability at least 1 - delta over the draw of the certification images,
        E[wrong labels] <= ``max_error`` E[labels kept] for a new image under the returned rule
        (``"labels"``), or the mean of its share of wrong labels, given that it keeps one, is at
        most ``max_error`` (``"image"``); per class, for all classes at once. Images are i.i.d. and
        independent of the calibration images, the score function was fixed before, and void
        pixels are like the labelled ones of their image. delta is the chance that a certificate is
        issued and false, not the share of false ones among those issued. Per label, images are not
        larger than ``max_pixels``; where that is left to the largest of n certification images,
        larger than all before, delta grows by a factor of at most 1 / (1 - (1 - q)^n), q the share
        of images of that size.

        ``"crc"``: the mean error of a new image is at most ``max_error`` on average over the draw
        of images and the new one; images are exchangeable.

    Reference:
        Angelopoulos et al. (2021), Learn then test (fixed-sequence testing) with the p-values of
        Waudby-Smith & Ramdas (2024); Angelopoulos et al. (2024), Conformal risk control, thm. 1.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> def draw(images):
        ...     probs = torch.rand(images, 3, 8, 8, generator=generator).mul(6).softmax(1)
        ...     return probs, torch.distributions.Categorical(probs.movedim(1, -1)).sample()
        >>> calibrator = Calibrator(groups.image((8, 8)), alpha=0.9)
        >>> calibrator.update(*draw(20))
        >>> certifier = Certifier(calibrator, max_error=0.3, delta=0.1)
        >>> certifier.learn_order(*draw(20))
        >>> certifier.update(*draw(60))
        >>> calibration = certifier.compute()
        >>> calibration.certificate.certified, calibration.certificate.num_images
        (True, 60)
    """

    def __init__(
        self,
        calibrator: Calibrator,
        *,
        alphas: Sequence[float | str | Fraction] | None = None,
        max_error: float | str | Fraction = 0.05,
        delta: float | str | Fraction = 0.1,
        method: str = "ltt",
        per: str = "labels",
        pvalue: str = "betting",
        per_class: bool = False,
        max_pixels: int | None = None,
        seed: int = 0,
    ) -> None:
        where = "Certifier"
        _check_calibrator(where, calibrator)
        words = (("method", method, METHODS), ("per", per, PER), ("pvalue", pvalue, PVALUES))
        for name, value, known in words:
            check_choice(where, value, known, name=name)
        check_flag(where, per_class, name="per_class")
        if max_pixels is not None:
            fix = "count the pixels of the largest image that you will label"
            check_count(where, max_pixels, name="max_pixels", fix=fix)
        self.max_error = float(check_alpha(where, max_error, name="max_error"))
        self.delta = float(check_alpha(where, delta, name="delta"))
        self.method, self.per, self.pvalue = method, per, pvalue
        self.per_class, self.seed = per_class, seed
        self.max_pixels = max_pixels
        self._largest_before = calibrator.largest_image
        levels = _levels(where, calibrator, alphas)
        self.alphas = tuple(float(alpha) for alpha in levels)
        made = [calibrator.compute(alpha) for alpha in levels]
        self._base = made[-1]
        self._thresholds = torch.stack([calibration.threshold for calibration in made])
        fitted = calibrator.recalibration
        recalibrated = () if fitted is None else fitted.images
        self._calibrated = calibrator.provenance.images_used.union(recalibrated)
        self._images: list[_Image] = []
        self._learned: dict[tuple[str, bytes, bytes], _Image] = {}
        self._named: bool | None = None
        self._synced = False

    def __repr__(self) -> str:
        rule = ""
        if self.method == "ltt":
            rule = f" per {self.per}, {self.pvalue}, delta {self.delta:g}"
        return (
            f"Certifier({self.method}{rule}{', per class' if self.per_class else ''}, at most "
            f"{100 * self.max_error:g} % error, {len(self.alphas)} alphas, "
            f"{self._base.num_classes} classes, {self.num_images} images)"
        )

    @property
    def num_images(self) -> int:
        """Images seen so far, without those of void alone."""
        return len(self._images)

    @property
    def ids(self) -> frozenset[str]:
        """Ids of these images, where they were given."""
        return frozenset(image.name for image in self._images if image.name is not None)

    def learn_order(
        self, probs: Probs, labels: Tensor, *, ids: str | Sequence[str] | None = None
    ) -> None:
        """Choose by these labelled images at which level ``"ltt"`` starts to test.

        They must not be certification images: those that set the thresholds will do. Without them
        testing starts at three levels, each with a third of ``delta``, which needs more images
        (69 instead of 50 for 5 %) and certifies less.

        Args:
            probs: as for :meth:`update`.
            labels: as for :meth:`update`.
            ids: a name for every image; ``update`` then refuses these images.

        Raises:
            ValueError: as for :meth:`update`, an image that certifies, or a call after ``update``
                or ``sync``.
            TypeError: wrong dtypes.
        """
        where = "Certifier.learn_order"
        if self._images or self._synced:
            fix = "choose the order before a certification image is seen"
            raise ValueError(message(where, "a call before update", "one after it", fix))
        _, images = self._measure(where, probs, labels, ids)
        self._learned.update({image.key: image for image in images if image.pixels > 0})

    def update(
        self, probs: Probs, labels: Tensor, *, ids: str | Sequence[str] | None = None
    ) -> None:
        """Measure every rule on a batch of labelled images. Waits for an accelerator.

        Args:
            probs: probabilities in [0, 1], float, ``[B, K, h, w]`` or ``[K, h, w]``, any size; of
                several sources those that the calibrator takes.
            labels: true classes, integer, ``[B, h, w]`` or ``[h, w]``, ``ignore_index`` for void.
            ids: a name for every image, a string for a single one. With ids the result does not
                depend on batches, order and ranks, and calibration images are refused.

        Raises:
            ValueError: shapes, probabilities or labels that ``Calibrator.update`` refuses, the id
                of an image used before, ids in some updates only, or an update after ``sync``.
                Nothing of the batch is counted.
            TypeError: wrong dtypes.
        """
        where = "Certifier.update"
        refuse_after_sync(where, self._synced)
        names, images = self._measure(where, probs, labels, ids)
        learned = {image.name for image in self._learned.values() if image.name is not None}
        overlap = sorted((self._calibrated | learned).intersection(names or ()))
        if overlap:
            expected = "certification images that were not used before"
            got = f"'{overlap[0]}', used in calibration, recalibration or for the order of tests"
            raise ValueError(message(where, expected, got, "certify on other labelled images"))
        self._check_naming(where, names is not None)
        self._named = names is not None
        self._images += [image for image in images if image.pixels > 0]

    def _measure(
        self, where: str, probs: Probs, labels: Tensor, ids: str | Sequence[str] | None
    ) -> tuple[list[str] | None, list[_Image]]:
        """The names and counts of a batch of images, checked."""
        probs = self._base.join(probs, where=where, check_values=True)
        check_labels(where, labels, probs)
        check_label_values(where, labels, self._base.num_classes or 0, self._base.ignore_index)
        if probs.ndim == 3:
            probs, labels = probs.unsqueeze(0), labels.unsqueeze(0)
        names = check_image_ids(where, ids, len(probs), self.ids)
        return names, [
            _count(image, truth, name, self._thresholds, self._base, self.per_class)
            for image, truth, name in zip(
                probs,
                labels,
                names if names is not None else [None] * len(probs),
                strict=True,
            )
        ]

    def merge(self, other: Certifier) -> None:
        """Take all that another certifier of the same settings has seen; it stays as it is.

        Raises:
            ValueError: other settings or thresholds, an image twice, ids in one of them only.
            TypeError: not a certifier.
        """
        where = "Certifier.merge"
        check_other(where, self, other)
        refuse_after_sync(where, self._synced or other._synced)
        check_alike(where, self._settings(), other._settings())
        self._take(where, other._images)
        self._learned.update(other._learned)

    def sync(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Merge over the ranks of ``torch.distributed``; every rank then holds the whole.

        Call it once, after the last update. Does nothing where no process group is set up.

        Raises:
            ValueError: settings differ between ranks, an image on two of them (said by every
                rank), or a second call.
        """
        where = "Certifier.sync"
        if not begin_sync(where, self._synced):
            return
        state = (self._images, self._learned)
        everyone = gather_alike(where, self._settings(), state, process_group)
        self._images, self._named = [], None
        for images, learned in everyone:
            self._take(where, images)
            self._learned.update(learned)
        self._synced = True

    def compute(self, max_error: float | str | Fraction | None = None) -> Calibration:
        """The certified calibration; one that keeps no label where nothing is certified.

        Args:
            max_error: the bound to certify, by default the one given at the start. Certificates
                of several bounds hold each by itself, not all at once.

        Raises:
            ValueError: no image with a labelled pixel so far, or a bound outside (0, 1).
        """
        where = "Certifier.compute"
        bound = self.max_error
        if max_error is not None:
            bound = float(check_alpha(where, max_error, name="max_error"))
        if not self._images:
            fix = "call update with labelled images other than the calibration images"
            raise ValueError(message(where, "labelled images", "none", fix))
        within = [image for image in self._ordered() if self._is_within(image)]
        if not within:
            expected = f"an image of at most max_pixels={self.max_pixels} pixels"
            got = f"none among {self.num_images}"
            fix = "pass the pixels of the largest image that you will label"
            raise ValueError(message(where, expected, got, fix))
        counts = _Counts.of(within)
        losses, starts = self._tested(bound, counts)
        levels, p = choose(losses, self._statement(bound), starts)
        certificate = self._certificate(bound, losses, counts, starts, levels, p)
        base = replace(self._base, certificate=certificate)
        nothing = torch.full_like(base.threshold, -torch.inf)
        if self.ids:
            images_used = tuple(sorted(self.ids))
            provenance = replace(base.provenance, certification_images=images_used)
            base = replace(base, extra=provenance)
        if not certificate.certified:
            return replace(base, threshold=nothing)
        if not self.per_class:
            level = int(levels[0])
            return replace(base, threshold=self._thresholds[level], alpha=self.alphas[level])
        own = [self._thresholds[level] if level >= 0 else nothing for level in levels]
        return replace(base, class_threshold=torch.stack(own))

    def _ordered(self) -> list[_Image]:
        """The images in the order of the bets: by a hash of seed and id, or of seed and number.

        It must not depend on the losses: an order that put small ones first would make its own
        luck. A hash of the id gives the same order for any split into batches and ranks.
        """

        def place(entry: tuple[int, _Image]) -> bytes:
            number, image = entry
            name = str(number) if image.name is None else image.name
            return hashlib.sha256(f"{self.seed}\0{name}".encode()).digest()

        return [image for _, image in sorted(enumerate(self._images), key=place)]

    def _is_within(self, image: _Image) -> bool:
        """Whether the statement is about images of this size."""
        limited = self.method == "ltt" and self.per == "labels" and self.max_pixels is not None
        return not limited or image.area <= (self.max_pixels or 0)

    @property
    def _largest(self) -> int:
        """Pixels of the largest image that the statement is about."""
        if self.max_pixels is not None:
            return self.max_pixels
        seen = [*self._images, *self._learned.values()]
        return max(self._largest_before, *(image.area for image in seen))

    def _statement(self, max_error: float, pvalue: str | None = None) -> Statement:
        return Statement(self.method, self.per, pvalue or self.pvalue, max_error, self.delta)

    def _tested(self, max_error: float, counts: _Counts) -> tuple[Floats, list[Start]]:
        """Losses of the certification images, and where to start, which they do not decide."""
        statement = self._statement(max_error)
        classes, levels = counts.wrong.shape[1:]
        weight = counts.area / self._largest
        losses = losses_of(statement, counts.wrong, counts.kept, weight, counts.pixels)
        learned = [image for image in self._learned.values() if self._is_within(image)]
        setting, kept = None, np.zeros((classes, levels))
        if learned:
            known = _Counts.of(sorted(learned, key=lambda image: image.key))
            weight = known.area / self._largest
            setting = losses_of(statement, known.wrong, known.kept, weight, known.pixels)
            kept = (known.kept / known.pixels[:, None, None]).mean(0)
        return losses, starts_of(statement, setting, kept, classes)

    def _certificate(
        self,
        max_error: float,
        losses: Floats,
        counts: _Counts,
        starts: Sequence[Start],
        levels: Integers,
        p: Floats | None,
    ) -> Certificate:
        n, classes, _ = losses.shape
        certified = bool((levels >= 0).any())
        ltt, per_label = self.method == "ltt", self.method == "ltt" and self.per == "labels"
        kept, wrong = _at(counts.kept, levels), _at(counts.wrong, levels)
        kept_share = kept / counts.pixels[:, None]
        mean, pooled = self._errors(wrong.sum(1), kept.sum(1), counts)
        rows: list[dict[str, Any]] = []
        for c, level in enumerate(levels):
            errors = self._errors(wrong[:, c], kept[:, c], counts) if level >= 0 else (None, None)
            row = {
                "certified": bool(level >= 0),
                "alpha": self.alphas[level] if level >= 0 else None,
                "mean_error": errors[0],
                "pooled_error": errors[1],
                "kept": float(kept_share[:, c].mean()),
                "p_value": None if p is None else float(p[c, max(level, starts[0].levels[c])]),
            }
            rows.append(row)
        needed, lowest = None, None
        if not certified:
            needed = fewest_images(self._statement(max_error), classes, starts)
            needed = needed if needed > n else None
            if needed is None:
                lowest = self._lowest(max_error, counts)
        sizes = {*counts.area.tolist(), self._largest}
        return Certificate(
            self.method,
            self.pvalue if ltt else None,
            max_error,
            self.delta if ltt else None,
            certified,
            alpha=None if self.per_class else rows[0]["alpha"],
            num_images=n,
            mean_error=mean if certified else None,
            kept=float(kept_share.sum(1).mean()),
            p_value=None if self.per_class else rows[0]["p_value"],
            beside=self._beside(max_error, losses, starts, counts) if ltt else None,
            classes=tuple(rows) if self.per_class else None,
            needed_images=needed,
            lowest_error=lowest,
            per=self.per if ltt else "pixels",
            pooled_error=pooled if certified else None,
            max_pixels=self._largest if per_label and len(sizes) > 1 else None,
            larger_images=self.num_images - n,
        )

    def _errors(
        self, wrong: Integers, kept: Integers, counts: _Counts
    ) -> tuple[float | None, float | None]:
        """What was seen: the mean over images, and of all labels kept; None where none is."""
        if self.method == "crc":
            return float((wrong / counts.pixels).mean()), _share(wrong, kept, counts)
        keeps = kept > 0
        mean = float((wrong[keeps] / kept[keeps]).mean()) if keeps.any() else None
        return mean, _share(wrong, kept, counts)

    def _lowest(self, max_error: float, counts: _Counts) -> float | None:
        """The lowest bound in thousandths that these images certify for some class."""

        def certified(bound: int) -> bool:
            losses, starts = self._tested(bound / 1000, counts)
            levels, _ = choose(losses, self._statement(bound / 1000), starts)
            return bool((levels >= 0).any())

        bounds = range(math.floor(1000 * max_error) + 1, 1000)
        first = bisect_left(bounds, True, key=certified)
        return bounds[first] / 1000 if first < len(bounds) else None

    def _beside(
        self, max_error: float, losses: Floats, starts: Sequence[Start], counts: _Counts
    ) -> dict[str, Any]:
        """What the other p-value gives."""
        other = PVALUES[1 - PVALUES.index(self.pvalue)]
        levels, _ = choose(losses, self._statement(max_error, other), starts)
        alpha = self.alphas[levels[0]] if not self.per_class and levels[0] >= 0 else None
        share = (_at(counts.kept, levels) / counts.pixels[:, None]).sum(1).mean()
        return {"pvalue": other, "alpha": alpha, "kept": float(share)}

    def _check_naming(self, where: str, named: bool) -> None:
        if self._named not in (None, named):
            got = "some without" if self._named else "some without before"
            fix = "give every image an id, or none"
            raise ValueError(message(where, "ids for all images or for none", got, fix))

    def _take(self, where: str, images: Sequence[_Image]) -> None:
        if not images:
            return
        named = images[0].name is not None
        self._check_naming(where, named)
        twice = sorted(self.ids.intersection(image.name for image in images if image.name))
        if twice:
            got = f"'{twice[0]}' twice"
            raise ValueError(message(where, "every image once", got, "update with it once"))
        self._named = named
        self._images += images

    def _settings(self) -> dict[str, Any]:
        """What two certifiers must share to be merged."""
        cells = self._thresholds.cpu().contiguous().numpy().tobytes()
        return {
            "max_error": self.max_error,
            "delta": self.delta,
            "method": self.method,
            "per": self.per,
            "max_pixels": self.max_pixels,
            "largest image of the calibrator": self._largest_before,
            "pvalue": self.pvalue,
            "per_class": self.per_class,
            "seed": self.seed,
            "alphas": self.alphas,
            "num_classes": self._base.num_classes,
            "background": self._base.background,
            "ignore_index": self._base.ignore_index,
            "thresholds": hashlib.sha256(cells).hexdigest()[:16],
            "calibration images": hashlib.sha256(
                repr(sorted(self._calibrated)).encode()
            ).hexdigest()[:16],
        }


def _share(wrong: Integers, kept: Integers, counts: _Counts) -> float | None:
    """Wrong labels among all kept, the labelled pixels of an image standing for all of them."""
    weight = counts.area / counts.pixels
    total = float((weight * kept).sum())
    return float((weight * wrong).sum()) / total if total > 0 else None


def _at(counts: Integers, levels: Integers) -> Integers:
    """Counts ``[n, C]`` of every class at its level; 0 where it has none."""
    taken = np.take_along_axis(counts, np.maximum(levels, 0)[None, :, None], -1)[..., 0]
    return taken * (levels >= 0)


def _count(
    probs: Tensor,
    labels: Tensor,
    name: str | None,
    thresholds: Tensor,
    base: Calibration,
    per_class: bool,
) -> _Image:
    found = base.evidence(probs)
    here = to_image(thresholds.to(probs.device), (probs.shape[-2], probs.shape[-1]))
    matrix = confusion_per_alpha(
        found, labels, here, ignore_index=base.ignore_index, per_class=per_class
    )
    square = matrix[..., :-1]
    kept, right = square.sum(1), square.diagonal(dim1=1, dim2=2)
    if not per_class:
        kept, right = kept.sum(1, keepdim=True), right.sum(1, keepdim=True)
    wrong = (kept - right).T.cpu().numpy()
    area = labels.shape[-2] * labels.shape[-1]
    return _Image(name, wrong, kept.T.cpu().numpy(), int(matrix[0].sum()), area)


def _check_calibrator(where: str, calibrator: Calibrator) -> None:
    if not isinstance(calibrator, Calibrator):
        fix = "pass the calibrator whose thresholds are to be certified"
        raise TypeError(message(where, "a Calibrator", type(calibrator).__name__, fix))
    if calibrator.num_images == 0:
        fix = "update it with labelled images first"
        raise ValueError(message(where, "a calibrator with images", "one without", fix))
    if calibrator.score != "lac":
        expected, got = "a calibrator of the lac score", repr(calibrator.score)
        raise ValueError(message(where, expected, got, "labels are selected by lac alone"))
    if calibrator.per_class:
        fix = "calibrate without per_class; per_class here gives each class a level of its own"
        raise ValueError(message(where, "a threshold for all classes", "one for each", fix))
    if calibrator.fallback:
        expected, got = "a calibrator without a fallback", "one with"
        fix = "leave it out: strict levels need few scores"
        raise ValueError(message(where, expected, got, fix))
    if calibrator.num_classes is None:
        fix = "build it with num_classes, or update it with probs and labels"
        raise ValueError(message(where, "a calibrator that knows its classes", "scores alone", fix))


def _levels(
    where: str, calibrator: Calibrator, alphas: Sequence[float | str | Fraction] | None
) -> list[Fraction]:
    """The grid, strictest first; of the default one what the calibrator has kept scores for."""
    bound = calibrator.largest_alpha
    if alphas is None:
        grid = [Fraction(alpha) for alpha in ALPHAS]
        return grid if bound is None else [bound, *(alpha for alpha in grid if alpha < bound)]
    grid = sorted({check_alpha(where, alpha, name="alphas") for alpha in alphas}, reverse=True)
    if not grid:
        raise ValueError(message(where, "at least one of alphas", "none", "leave them out"))
    return grid
