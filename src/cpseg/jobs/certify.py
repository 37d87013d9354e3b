"""The job ``cpseg certify``: thresholds from some images, a certificate from the others."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from cpseg._internal.checks import check_alpha, message
from cpseg.calibration.calibration import Calibration
from cpseg.calibration.calibrator import Calibrator
from cpseg.calibration.certificate import Certificate
from cpseg.calibration.provenance import Provenance
from cpseg.certification.certifier import ALPHAS, Certifier
from cpseg.files.dataset import LabelledImages, Progress, Source, announce, check_distinct, quiet
from cpseg.files.id_lists import Pair, read_ids
from cpseg.files.masks import VOID
from cpseg.files.splits import hashed_share
from cpseg.jobs.estimate import aligned, percent
from cpseg.jobs.recalibrate import for_target, recalibrate
from cpseg.jobs.seen_images import check_apart, check_unseen, cross_fitted
from cpseg.jobs.settings import CertificationSettings, settings_of
from cpseg.jobs.shift import MOST_PROFILED, profile
from cpseg.jobs.variants import FIXED, fixed_partition


def certify(
    source: Source,
    ids: str | Path,
    settings: CertificationSettings | None = None,
    *,
    progress: Progress = quiet,
    **keywords: Any,
) -> Calibration:
    """Find the loosest certified rule on the labelled images of an id list.

    Where there is one it records what at most 1,000 of the certification images look like under it,
    as :func:`calibrate` does; their scores are read again for that.

    Args:
        source: the data set and the probabilities.
        ids: id list of labelled images.
        settings: how to certify.
        progress: wraps the loops over images.
        **keywords: fields of :class:`CertificationSettings`, in place of ``settings``.

    Raises:
        ValueError: bad settings or files, named in the message; an image in both lists.
        TypeError: an unknown setting.
        OSError: a file that cannot be read.
    """
    where = "certify"
    settings = settings_of(where, CertificationSettings, settings, keywords)
    grouping = settings.grouping
    grouping.check(where, FIXED)
    check_alpha(where, settings.max_error, name="max_error")
    check_alpha(where, settings.delta, name="delta")
    listed = source.read_ids(ids)
    setting, certifying = _parts(source, settings, listed)
    check_distinct(source.root, [*setting, *certifying])
    images = LabelledImages.open(source, listed, progress=progress)
    images = replace(images, paths=images.source.locate([*setting, *certifying]))
    check_unseen(where, source, setting)
    check_apart(where, source, certifying)
    provenance = replace(
        Provenance.from_json(source.facts()), sources=cross_fitted(source, setting)
    )
    recalibration = None
    options = settings.recalibration
    learns = settings.method == "ltt"
    passes = 1 + learns + (options is not None)
    again = min(len(certifying), MOST_PROFILED)
    announce(progress, len(setting) * passes + len(certifying) + again)
    images = for_target(where, images, options)
    if options is not None:
        on_setting = replace(images, pairs=setting)
        options = replace(options, share=0.0, folds=0)
        recalibration = recalibrate(where, options, on_setting, seed=settings.seed).recalibration
        images = replace(images, num_classes=recalibration.num_classes)
    calibrator = Calibrator(
        fixed_partition(grouping.variant, grouping.grid or images.size, grouping.block),
        alpha=max(map(Fraction, ALPHAS)),
        background=settings.background,
        num_classes=images.num_classes,
        ignore_index=VOID,
        recalibration=recalibration,
        variant=grouping.variant,
        provenance=provenance,
    )

    def calibrate(pair: Pair, probs: Tensor, labels: Tensor) -> None:
        calibrator.update(probs, labels, ids=pair.image)

    images.feed(calibrate, setting, "calibrate")
    calibrator.sync()
    certifier = Certifier(
        calibrator,
        max_error=settings.max_error,
        delta=settings.delta,
        method=settings.method,
        per=settings.per,
        pvalue=settings.pvalue,
        per_class=settings.per_class,
        seed=settings.seed,
    )

    def learn_order(pair: Pair, probs: Tensor, labels: Tensor) -> None:
        certifier.learn_order(probs, labels, ids=pair.image)

    def certify_on(pair: Pair, probs: Tensor, labels: Tensor) -> None:
        certifier.update(probs, labels, ids=pair.image)

    if learns:
        images.feed(learn_order, setting, "choose the order of tests")
    images.feed(certify_on, certifying, "certify")
    certifier.sync()
    calibration = certifier.compute()
    certificate = calibration.certificate
    if certificate is None or not certificate.certified:
        return calibration
    seen = profile(images, certifying, calibration, in_sample=False)
    return replace(calibration, extra=replace(calibration.provenance, profile=seen))


def _parts(
    source: Source, settings: CertificationSettings, listed: list[Pair]
) -> tuple[list[Pair], list[Pair]]:
    """Images that set the thresholds, and images for the certificate."""
    where = "certify"
    if settings.calibration_ids is None:
        option, share = "--calibrate-share", settings.calibrate_share
        return hashed_share(where, option, listed, share, settings.seed, purpose="calibrate")
    setting = source.read_ids(settings.calibration_ids)
    both = sorted({pair.image for pair in setting} & {pair.image for pair in listed})
    if both:
        expected, got = "images in one of the two lists", f"{both[0]} in both"
        raise ValueError(message(where, expected, got, "certify on images of their own"))
    return setting, listed


def overlap(calibration: Calibration, ids: str | Path, source: Source | None = None) -> list[str]:
    """Images of an id list that were used for the calibration or its certificate, sorted."""
    read = read_ids if source is None else source.read_ids
    listed = {pair.image for pair in read(ids, columns=1)}
    return sorted(listed.intersection(calibration.provenance.images_used))


def class_levels(certificate: Certificate) -> str:
    """The alphas of the classes as a Markdown table."""
    lines: list[tuple[str, ...]] = [
        ("class", "alpha", "wrong of all kept", "mean over images", "kept"),
        ("---", *["---:"] * 4),
    ]
    for index, row in enumerate(certificate.classes or ()):
        if row["certified"]:
            seen = (row["pooled_error"], row["mean_error"], row["kept"])
            shares = (percent(math.nan if share is None else share) for share in seen)
            lines.append((str(index), f"{row['alpha']:g}", *shares))
        else:
            lines.append((str(index), "none", "-", "-", "-"))
    return aligned(lines)
