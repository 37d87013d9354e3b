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
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from cpseg._internal.checks import (
    SCORES_FIX,
    check_alike,
    check_alpha,
    check_choice,
    check_image_ids,
    check_label_values,
    check_labels,
    check_other,
    check_probs,
    check_unit_interval,
    message,
    shape,
)
from cpseg._internal.streaming import begin_sync, gather_alike, refuse_after_sync
from cpseg.calibration.calibration import Calibration
from cpseg.calibration.calibrator import Calibrator
from cpseg.calibration.certificate import METHODS, PVALUES, Certificate
from cpseg.certification.p_values import Floats, fixed_sequence, images_needed, p_values
from cpseg.core.nested_rules import confusion_per_alpha
from cpseg.groups.resampling import to_image

# Strictest first: fine where little is kept, and where nearly everything is.
ALPHAS = (
    *("0.995", "0.99", "0.98", "0.97", "0.96"),
    *(f"0.{percent:02d}" for percent in range(95, 5, -2)),
    *("0.05", "0.04", "0.03", "0.02", "0.01"),
)
Integers = npt.NDArray[np.int64]


class _Image(NamedTuple):
    """Counts of one image, ``[C, A]``: one rule (or one per class) at every alpha."""

    name: str | None
    wrong: Integers
    kept: Integers
    pixels: int


class Certifier:
    """The loosest selection rule whose error is proven to be small, on separate labelled images.

    Every alpha of a grid is a rule: the pseudo-labels of ``calibrator.compute(alpha)``. The error
    of each rule is measured on labelled images other than the calibration images, and the loosest
    rule that can be certified is returned. Images without any labelled pixel do not count.

    - ``method="ltt"``: the share of wrong labels among those an image keeps (0 where it keeps
      none). Rules are tested from the strictest on, each at ``delta``, up to the first that is
      not proven (fixed-sequence testing). The image's error need not be monotone in alpha.
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
        pvalue: ``"betting"`` or ``"hoeffding-bentkus"``, chosen before the images are seen.
        per_class: a level for every class.
        seed: of the order in which ``"betting"`` takes the images.

    Raises:
        ValueError: a value outside its range, or a calibrator that cannot be certified.
        TypeError: not a calibrator.

    Guarantee:
        ``"ltt"``: with probability at least 1 - delta over the draw of the certification images,
        the mean error of a new image under the returned rule is at most ``max_error``; per class,
        for all classes at once. Images are i.i.d. and independent of the calibration images, and
        the score function was fixed before. ``"crc"``: the mean error of a new image is at most
        ``max_error`` on average over the draw of images and the new one; images are exchangeable.

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
        >>> certifier = Certifier(calibrator, max_error=0.2, delta=0.1)
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
        pvalue: str = "betting",
        per_class: bool = False,
        seed: int = 0,
    ) -> None:
        where = "Certifier"
        _check_calibrator(where, calibrator)
        for name, value, known in (("method", method, METHODS), ("pvalue", pvalue, PVALUES)):
            check_choice(where, value, known, name=name)
        self.max_error = float(check_alpha(where, max_error, name="max_error"))
        self.delta = float(check_alpha(where, delta, name="delta"))
        self.method, self.pvalue, self.per_class, self.seed = method, pvalue, per_class, seed
        levels = _levels(where, calibrator, alphas)
        self.alphas = tuple(float(alpha) for alpha in levels)
        made = [calibrator.compute(alpha) for alpha in levels]
        self._base = made[-1]
        self._thresholds = torch.stack([calibration.threshold for calibration in made])
        fitted = calibrator.recalibration
        recalibrated = () if fitted is None else fitted.images
        self._calibrated = calibrator.provenance.images_used.union(recalibrated)
        self._images: list[_Image] = []
        self._named: bool | None = None
        self._synced = False

    def __repr__(self) -> str:
        rule = "" if self.method == "crc" else f", {self.pvalue}, delta {self.delta:g}"
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

    def update(
        self, probs: Tensor, labels: Tensor, *, ids: str | Sequence[str] | None = None
    ) -> None:
        """Measure every rule on a batch of labelled images. Waits for an accelerator.

        Args:
            probs: probabilities in [0, 1], float, ``[B, K, h, w]`` or ``[K, h, w]``, any size.
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
        check_probs(where, probs)
        check_labels(where, labels, probs)
        if probs.shape[-3] != self._base.num_source:
            expected = f"{self._base.num_source} classes as calibrated"
            fix = "certify with the model of the calibration"
            raise ValueError(message(where, expected, f"probs {shape(probs)}", fix))
        check_unit_interval(where, probs.detach(), name="probs", fix=SCORES_FIX)
        check_label_values(where, labels, self._base.num_classes or 0, self._base.ignore_index)
        if probs.ndim == 3:
            probs, labels = probs.unsqueeze(0), labels.unsqueeze(0)
        names = check_image_ids(where, ids, len(probs), self.ids)
        overlap = sorted(self._calibrated.intersection(names or ()))
        if overlap:
            expected = "certification images that were not used before"
            got = f"'{overlap[0]}', used in calibration or recalibration"
            raise ValueError(message(where, expected, got, "certify on other labelled images"))
        self._check_naming(where, names is not None)
        counted = [
            _count(image, truth, name, self._thresholds, self._base, self.per_class)
            for image, truth, name in zip(
                probs.detach(),
                labels,
                names if names is not None else [None] * len(probs),
                strict=True,
            )
        ]
        self._named = names is not None
        self._images += [image for image in counted if image.pixels > 0]

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
        everyone = gather_alike(where, self._settings(), self._images, process_group)
        self._images, self._named = [], None
        for images in everyone:
            self._take(where, images)
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
        images = self._ordered()
        wrong = np.stack([image.wrong for image in images])
        kept = np.stack([image.kept for image in images])
        pixels = np.array([image.pixels for image in images]).reshape(-1, 1, 1)
        losses = wrong / (np.maximum(kept, 1) if self.method == "ltt" else pixels)
        levels, p = choose(losses, bound, self.delta, self.method, self.pvalue)
        certificate = self._certificate(bound, losses, wrong, kept, pixels, levels, p)
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

    def _certificate(
        self,
        max_error: float,
        losses: Floats,
        wrong: Integers,
        kept: Integers,
        pixels: Integers,
        levels: Integers,
        p: Floats | None,
    ) -> Certificate:
        n, classes, _ = losses.shape
        certified = bool((levels >= 0).any())
        kept_share = _at(kept, levels) / pixels[..., 0]
        wrong_at, kept_at = _at(wrong, levels).sum(1), _at(kept, levels).sum(1)
        ltt = self.method == "ltt"
        error = wrong_at / (np.maximum(kept_at, 1) if ltt else pixels[:, 0, 0])
        rows: list[dict[str, Any]] = [
            {
                "certified": bool(level >= 0),
                "alpha": self.alphas[level] if level >= 0 else None,
                "mean_error": float(losses[:, c, level].mean()) if level >= 0 else None,
                "kept": float(kept_share[:, c].mean()),
                "p_value": None if p is None else float(p[c, max(level, 0)]),
            }
            for c, level in enumerate(levels)
        ]
        needed, lowest = None, None
        if not certified:
            needed = _needed(max_error, self.delta / classes, self.method, self.pvalue)
            needed = needed if needed > n else None
            if needed is None:
                lowest = _lowest(losses, max_error, self.delta, self.method, self.pvalue)
        return Certificate(
            self.method,
            self.pvalue if ltt else None,
            max_error,
            self.delta if ltt else None,
            certified,
            alpha=None if self.per_class else rows[0]["alpha"],
            num_images=n,
            mean_error=float(error.mean()) if certified else None,
            kept=float(kept_share.sum(1).mean()),
            p_value=None if self.per_class else rows[0]["p_value"],
            beside=self._beside(max_error, losses, kept, pixels) if ltt else None,
            classes=tuple(rows) if self.per_class else None,
            needed_images=needed,
            lowest_error=lowest,
        )

    def _beside(
        self, max_error: float, losses: Floats, kept: Integers, pixels: Integers
    ) -> dict[str, Any]:
        """What the other p-value gives."""
        other = PVALUES[1 - PVALUES.index(self.pvalue)]
        levels, _ = choose(losses, max_error, self.delta, self.method, other)
        alpha = self.alphas[levels[0]] if not self.per_class and levels[0] >= 0 else None
        share = (_at(kept, levels) / pixels[..., 0]).sum(1).mean()
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


def choose(
    losses: Floats, max_error: float, delta: float, method: str, pvalue: str
) -> tuple[Integers, Floats | None]:
    """The loosest certified level of every class, and the p-values of all levels.

    Args:
        losses: in [0, 1], ``[n, C, A]``, images in the order of the bets, strictest level first.
        max_error: the bound on their mean.
        delta: 1 - confidence, shared among the C classes (Bonferroni).
        method: ``"ltt"`` or ``"crc"``.
        pvalue: which p-value ``"ltt"`` tests with.

    Returns:
        int64 ``[C]``, -1 where no level is certified; ``[C, A]``, None for ``"crc"``.
    """
    if method == "crc":
        return (_expected(losses) <= max_error).sum(-1) - 1, None
    each = delta / losses.shape[1]
    p = p_values(losses, max_error, delta=each, pvalue=pvalue)
    return fixed_sequence(p, each) - 1, p


def _expected(losses: Floats) -> Floats:
    """Conformal risk control's bound on the expectation, ``[C, A]``, growing along A."""
    return np.asarray(
        (np.maximum.accumulate(losses, -1).sum(0) + 1) / (len(losses) + 1), np.float64
    )


def _needed(max_error: float, delta: float, method: str, pvalue: str) -> int:
    """The fewest images that could certify, were no label wrong."""
    if method == "crc":
        return math.ceil(1 / Fraction(str(max_error))) - 1
    return images_needed(max_error, delta, pvalue)


def _lowest(
    losses: Floats, max_error: float, delta: float, method: str, pvalue: str
) -> float | None:
    """The lowest bound in thousandths at which some class's strictest level is certified."""
    strictest = losses[..., :1]

    def certified(bound: int) -> bool:  # a larger bound is certified wherever a smaller one is
        levels, _ = choose(strictest, bound / 1000, delta, method, pvalue)
        return bool((levels >= 0).any())

    bounds = range(math.floor(1000 * max_error) + 1, 1000)
    first = bisect_left(bounds, True, key=certified)
    return bounds[first] / 1000 if first < len(bounds) else None


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
    return _Image(name, wrong, kept.T.cpu().numpy(), int(matrix[0].sum()))


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
