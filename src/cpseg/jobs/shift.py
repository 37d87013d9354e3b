"""Are new images like those that calibrated? What they show beside what was promised and recorded.

Every test here is over images, since the pixels of one depend on each other, and warns falsely
with a chance of at most ``FALSE_ALARM`` where images are exchangeable.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cpseg._internal.distributed import active
from cpseg.calibration.calibration import Calibration
from cpseg.calibration.certificate import Certificate
from cpseg.calibration.provenance import ImageProfile
from cpseg.certification.p_values import Floats, betting
from cpseg.certification.rule_choice import Statement, losses_of
from cpseg.core.selection import Evidence
from cpseg.files.dataset import LabelledImages
from cpseg.files.id_lists import Pair
from cpseg.files.masks import VOID
from cpseg.groups.resampling import to_grid
from cpseg.jobs.estimate import percent

FALSE_ALARM = 0.001
MOST_PROFILED = 1000
SAME = 0.999

_CHANCE = f"a chance of at most 1 in {round(1 / FALSE_ALARM)}"
_REMEDY = (
    "calibrate on labelled images like these; cpseg audit bounds the error of just these labels, "
    "whatever the images are"
)


Each = TypeVar("Each")


class Notice(NamedTuple):
    """What a job has to say besides its result.

    Attributes:
        text: a sentence, without a capital letter and a full stop.
        is_warning: whether something is amiss.
    """

    text: str
    is_warning: bool


Tell = Callable[[Notice], object]


def silent(notice: Notice) -> None:
    """Say nothing."""


class Look(NamedTuple):
    """What a calibration does to an image, of which no label is known.

    Attributes:
        kept: share of the pixels that keep a label.
        largest: mean over pixels of the largest probability, recalibrated.
        same: share of the pixels whose label is kept and that of the argmax.
    """

    kept: float
    largest: float
    same: float


def look(calibration: Calibration, scores: Tensor | Evidence) -> tuple[Tensor, Look]:
    """The pseudo-labels of an image, uint8, and what there is to see.

    Args:
        calibration: with 255 as its ``ignore_index``.
        scores: what a score file holds, ``[K, H, W]``, or evidence.
    """
    found = scores if isinstance(scores, Evidence) else calibration.evidence(scores)
    per_class = calibration.threshold.ndim == 3
    labels = calibration.pseudo_labels(scores if per_class else found, dtype=torch.uint8)
    largest = found.best
    if found.background_score is not None:
        largest = torch.maximum(largest, found.background_score)
    facts = torch.stack(
        [
            (labels != VOID).double().mean(),
            largest.double().mean(),
            (labels == found.argmax(dtype=torch.uint8)).double().mean(),
        ]
    )
    kept, mean, same = facts.tolist()
    return labels, Look(round(kept, 6), round(mean, 6), math.floor(1e6 * same) / 1e6)


# The calibration without an image, from its probabilities and labels.
Without = Callable[[Pair, Tensor, Tensor], Calibration]


def profiled(pairs: Sequence[Pair]) -> list[Pair]:
    """Evenly chosen images, at most ``MOST_PROFILED``, the same for any order of the list."""
    ordered = sorted(pairs)
    count = min(len(ordered), MOST_PROFILED)
    return [ordered[place * len(ordered) // count] for place in range(count)]


def profile(
    images: LabelledImages,
    pairs: Sequence[Pair],
    calibration: Calibration,
    *,
    in_sample: bool,
    without: Without | None = None,
) -> ImageProfile:
    """What a calibration does to the images it was made with: one more look at :func:`profiled`.

    Args:
        images: where they are read from.
        pairs: the images.
        calibration: as made.
        in_sample: see :class:`ImageProfile`.
        without: gives the calibration as it is without an image; that is then not in-sample.
    """
    looks: list[Look] = []

    def see(pair: Pair, probs: Tensor, labels: Tensor) -> None:
        own = calibration if without is None else without(pair, probs, labels)
        own = replace(own, ignore_index=VOID).to(probs.device)
        looks.append(look(own, probs)[1])

    images.feed(see, profiled(pairs), "record what the images are like")
    seen = sorted((each.kept, each.largest) for each in _of_all_ranks(looks))
    kept, largest = (tuple(pair[column] for pair in seen) for column in (0, 1))
    return ImageProfile(kept, largest, in_sample)


def unlike(recorded: ImageProfile | None, looks: Sequence[Look]) -> Notice | None:
    """A warning where images are not like those that calibrated.

    The distributions of the kept share and of the mean largest probability are compared by a
    Kolmogorov-Smirnov test each, at half of ``FALSE_ALARM``; that of the kept share is one-sided.
    Images on which thresholds were made keep more than new ones: among n images a pixel that keeps
    its label with a threshold of the others keeps it with its own score among them too. Against
    them only a larger kept share tells something. Images that were left out of their thresholds
    keep less than new ones, whose thresholds have one score more: the r-th largest of n scores is
    no lower than that of n - 1 of them. Against them only a smaller kept share tells something.
    A change the other way, because the model is more or less sure, shows in the other test.

    Args:
        recorded: of the calibration, None where a file has none.
        looks: at the new images.
    """
    if recorded is None or not recorded.kept or not looks:
        return None
    from scipy.stats import ks_2samp

    kept, largest = ([getattr(each, name) for each in looks] for name in ("kept", "largest"))
    side = "less" if recorded.in_sample else "greater"  # said of the distribution function
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of ties: the approximation will do
        p = min(
            ks_2samp(kept, recorded.kept, alternative=side).pvalue,
            ks_2samp(largest, recorded.largest).pvalue,
        )
    if p > FALSE_ALARM / 2:
        return None
    medians = [median(each) for each in (kept, recorded.kept, largest, recorded.largest)]
    here, there, sure_here, sure_there = map(percent, medians)
    return Notice(
        f"the images are not like those recorded in the calibration: half of these {len(looks)} "
        f"keep a label on at most {here} of their pixels, of those {len(recorded.kept)} on "
        f"{there}, and the largest probability is {sure_here} in the median image, there "
        f"{sure_there}. Such a difference has {_CHANCE} if they are alike, and what was promised "
        f"need not hold here: {_REMEDY}",
        is_warning=True,
    )


def sameness(same: float) -> Notice | None:
    """That a rule is no different from the argmax, or nearly so."""
    if same < SAME:
        return None
    share = "every pixel" if same == 1 else f"{100 * math.floor(1e5 * same) / 1e5:.3f} % of pixels"
    return Notice(
        f"these are the labels of the argmax, on {share}: the rule changes nothing; a larger "
        "--alpha, or certify with a lower --max-error, leaves doubtful pixels without a label",
        is_warning=False,
    )


class Watch:
    """Compares labelled images with what a calibration promises.

    Coverage is that at the pixels that the grid samples, where thresholds are finite and no
    fallback's. A pixel-wise promise holds at every cell, so that of all these pixels at most alpha
    are missed in expectation. One on average over images holds for every group of cells; groups
    weigh the same here, and cells of one threshold and count are taken for one group.

    Args:
        calibration: with 255 as its ``ignore_index``; recalibration plays no part.
    """

    def __init__(self, calibration: Calibration) -> None:
        self._certificate = calibration.certificate
        self._alpha, self._variant = calibration.alpha, calibration.variant
        self._images: list[_Image] = []
        self._groups: Tensor | None = None  # of every cell (and class), -1 where nothing counts
        self._count = 0.0
        if self._certificate is None and not calibration.guarantee().startswith("nothing"):
            counts = calibration.threshold.isfinite()
            if calibration.level is not None:
                counts = counts & (calibration.level == 0)
            if bool(counts.any()):
                self._groups = _groups(calibration, counts)
                self._count = float(1 / (1 / calibration.count[counts].double()).mean())
        self._num_groups = 0 if self._groups is None else int(self._groups.max()) + 1
        self._grid = calibration.grid

    def update(
        self,
        pair: Pair,
        truth: Tensor,
        labels: Tensor | None,
        prediction_set: Tensor | None,
        argmax: Tensor | None,
    ) -> None:
        """Count an image.

        Args:
            pair: the image.
            truth: its labels ``[H, W]``, 255 for void.
            labels: those that the rule gives, or None.
            prediction_set: bool ``[K, H, W]``, or None.
            argmax: the labels of the argmax, or None.
        """
        missed = there = 0.0
        if self._groups is not None and prediction_set is not None:
            missed, there = self._missed(truth, prediction_set)
        wrong = kept = np.zeros(1, np.int64)
        if self._certificate is not None and labels is not None:
            wrong, kept = _errors(labels, truth, self._certificate)
        same = 0
        if labels is not None and argmax is not None:
            same = int((labels == argmax).sum())
        pixels = int((truth != VOID).sum())
        self._images.append(
            _Image(pair.image, missed, there, wrong, kept, pixels, truth.numel(), same)
        )

    def _missed(self, truth: Tensor, prediction_set: Tensor) -> tuple[float, float]:
        """Pixels missed and pixels there; of groups on average over images the sums of shares."""
        assert self._groups is not None
        labels = truth.to(torch.int64)
        valid, index = labels != VOID, labels.masked_fill(labels == VOID, 0).unsqueeze(0)
        missed = ~prediction_set.gather(0, index).squeeze(0)
        maps = torch.stack([index.squeeze(0), valid.to(torch.int64), missed.to(torch.int64)])
        of_class, on, off = to_grid(maps, self._grid)
        group = self._groups
        if group.ndim == 3:
            group = group.gather(0, of_class.unsqueeze(0)).squeeze(0)
        counts = (on > 0) & (group >= 0)
        group, off = group[counts], off[counts]
        pixels = torch.bincount(group, minlength=self._num_groups).double()
        misses = torch.bincount(group, weights=off.double(), minlength=self._num_groups)
        if self._variant == "pixel":
            return float(misses.sum()), float(pixels.sum())
        there = pixels > 0
        return float((misses[there] / pixels[there]).sum()), float(there.sum())

    def notices(self) -> list[Notice]:
        """What there is to say: a broken promise, labels of the argmax. Every rank must ask."""
        images = sorted(_of_all_ranks(self._images), key=lambda image: image.place)
        same = sum(image.same for image in images) / sum(image.area for image in images)
        found = [self._of_promise([each for each in images if each.pixels > 0])]
        if self._alpha > 0:  # without thresholds the labels of the argmax are what was asked for
            found.append(sameness(same))
        return [notice for notice in found if notice is not None]

    def _of_promise(self, images: Sequence[_Image]) -> Notice | None:
        if len(images) < 2:
            return None
        if self._certificate is None:
            return self._of_coverage(images) if self._groups is not None else None
        if not self._certificate.certified:
            return None
        return _of_certificate(self._certificate, images)

    def _of_coverage(self, images: Sequence[_Image]) -> Notice | None:
        assert self._groups is not None
        missed, there = (
            np.array([getattr(image, name) for image in images]) for name in ("missed", "there")
        )
        if not there.any():
            return None
        cells = (self._groups >= 0).reshape(-1, *self._grid).any(0)
        largest = float(cells.sum()) if self._variant == "pixel" else self._num_groups
        losses = self._alpha + (missed - self._alpha * there) / largest
        if not is_above(losses, self._alpha, FALSE_ALARM, calibrated_on=self._count):
            return None
        seen, promised = percent(1 - missed.sum() / there.sum()), f"{100 * (1 - self._alpha):g} %"
        return Notice(
            f"a coverage of at least {promised} was promised, and on these {len(images)} images "
            f"it is {seen}: such a difference has {_CHANCE} if they are like those that "
            f"calibrated; {_REMEDY}",
            is_warning=True,
        )


class _Image(NamedTuple):
    name: str
    missed: float
    there: float
    wrong: np.ndarray[Any, np.dtype[np.int64]]
    kept: np.ndarray[Any, np.dtype[np.int64]]
    pixels: int
    area: int
    same: int

    @property
    def place(self) -> bytes:
        """In the order of the bets, which must not depend on the losses."""
        return hashlib.sha256(self.name.encode(errors="surrogateescape")).digest()


def _of_all_ranks(values: list[Each]) -> list[Each]:
    """The values of all ranks, on every rank."""
    if not active():
        return values
    lists: list[list[Each]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, values)
    return [value for each in lists for value in each]


def is_above(
    losses: Floats, bound: float, level: float, *, calibrated_on: float | None = None
) -> bool:
    """Whether the mean of images' losses is above a bound, for certain but a chance of ``level``.

    Args:
        losses: in [0, 1], of at least two i.i.d. images, in an order that does not depend on them.
        bound: what their mean should not exceed.
        level: the false-alarm rate.
        calibrated_on: the bound holds on average over the draw of so many calibration images: by
            their luck a calibration exceeds it by the standard error of a mean over them. None
            where the bound holds for the rule as it is.

    Guarantee:
        Without ``calibrated_on`` the rate is at most ``level`` (betting; no assumption on the
        distribution). With it half of ``level`` is spent on the luck of the calibration, judged by
        Student's t from the spread of these losses: to first order a threshold's excess loss is
        minus that of a mean over the calibration images.
    """
    if calibrated_on is not None:
        from scipy.stats import t

        level /= 2
        spread = float(losses.std(ddof=1)) / math.sqrt(calibrated_on)
        bound += spread * float(t.isf(level, len(losses) - 1))
    if bound >= min(1.0, float(losses.mean())):
        return False
    return bool(betting(1 - losses, 1 - bound, delta=level) <= level)


def _of_certificate(certificate: Certificate, images: Sequence[_Image]) -> Notice | None:
    bound, per = certificate.max_error, certificate.per
    if per == "labels" and certificate.max_pixels is not None:
        images = [image for image in images if image.area <= (certificate.max_pixels or 0)]
        if len(images) < 2:
            return None
    wrong, kept = (
        np.stack([getattr(image, name) for image in images])[..., None]
        for name in ("wrong", "kept")
    )
    pixels = np.array([image.pixels for image in images])
    area = np.array([image.area for image in images])
    statement = Statement(certificate.method, per, "betting", bound, FALSE_ALARM)
    if per == "any image":
        losses = wrong / np.maximum(kept, 1)
    else:
        weight = area / (certificate.max_pixels or area.max())
        losses = losses_of(statement, wrong, kept, weight, pixels)
    losses = losses[..., 0].clip(0, 1)
    own = certificate.num_images if certificate.method == "crc" else None
    rows = certificate.classes
    tested = [0] if rows is None else [c for c, row in enumerate(rows) if row["certified"]]
    above = [
        c
        for c in tested
        if is_above(losses[:, c], bound, FALSE_ALARM / len(tested), calibrated_on=own)
    ]
    if not above:
        return None
    where = "" if rows is None else f"of class {', '.join(map(str, above))} "
    seen = [_seen(certificate, wrong[:, c, 0], kept[:, c, 0], pixels, area) for c in above]
    limit = f"{100 * bound:g} %"
    what = {
        "labels": "of all labels kept",
        "image": "of an image's labels on average over images that keep one",
        "pixels": "of an image's pixels on average",
        "any image": "of an image's labels on average",
    }[per]
    sure = ""
    if certificate.delta is not None:
        sure = " and the certificate is true (it is false with a chance of at most "
        sure += f"{100 * certificate.delta:g} %)"
    return Notice(
        f"the certificate says that {where}at most {limit} {what} are wrong, and on these "
        f"{len(images)} images {', '.join(map(percent, seen))} are: such a difference has "
        f"{_CHANCE} if they are like those that certified{sure}; {_REMEDY}",
        is_warning=True,
    )


def _seen(
    certificate: Certificate, wrong: Floats, kept: Floats, pixels: Floats, area: Floats
) -> float:
    """The share that a certificate bounds, on these images."""
    if certificate.per == "labels":
        weight = area / pixels
        return float((weight * wrong).sum() / (weight * kept).sum())
    if certificate.per == "pixels":
        return float((wrong / pixels).mean())
    on = kept > 0 if certificate.per == "image" else np.ones_like(kept, bool)
    return float((wrong[on] / np.maximum(kept[on], 1)).mean())


def _errors(labels: Tensor, truth: Tensor, certificate: Certificate) -> tuple[Any, Any]:
    """Wrong and kept labels of an image, of each class where certificates are per class."""
    on = (labels != VOID) & (truth != VOID)
    wrong = on & (labels != truth)
    if certificate.classes is None:
        return np.array([int(wrong.sum())]), np.array([int(on.sum())])
    classes = len(certificate.classes)
    counted = (torch.bincount(labels[some].long(), minlength=classes) for some in (wrong, on))
    wrongs, kepts = (each.cpu().numpy()[:classes] for each in counted)
    return wrongs, kepts


def _groups(calibration: Calibration, counts: Tensor) -> Tensor:
    """Which cells share a threshold, int64 ``[H, W]`` or per class; -1 where none counts."""
    if calibration.variant == "pixel":
        return torch.where(counts, 0, -1)
    pairs = torch.stack([calibration.threshold.double(), calibration.count.double()])
    if pairs.ndim == 4:  # a group of a class is a group of its own
        number = torch.arange(len(counts), device=counts.device, dtype=torch.float64)
        of_class = number.reshape(-1, 1, 1).expand(counts.shape)
        pairs = torch.cat([pairs, of_class.unsqueeze(0)])
    _, index = torch.unique(pairs[:, counts], dim=1, return_inverse=True)
    groups = torch.full(counts.shape, -1, dtype=torch.int64, device=counts.device)
    groups[counts] = index
    return groups
