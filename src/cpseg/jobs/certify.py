"""The offline job: thresholds from some labelled images, a certificate from the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from cpseg._internal.checks import check_alpha, message, name_file_in_errors
from cpseg._internal.distributed import shard
from cpseg.calibration.calibration import Calibration
from cpseg.calibration.calibrator import Calibrator
from cpseg.calibration.certificate import Certificate
from cpseg.certification.certifier import ALPHAS, Certifier
from cpseg.files.dataset import VOID, Progress, Source, quiet, read_example
from cpseg.files.id_lists import Pair, read_ids
from cpseg.jobs.recalibrate import RecalibrationOptions, recalibrate_scores
from cpseg.jobs.tally import aligned
from cpseg.jobs.variants import fixed_partition

VARIANTS = ("pixel", "image", "blocks")


def certify(
    source: Source,
    ids: str | Path,
    *,
    background: int | None,
    max_error: float | str = 0.05,
    delta: float | str = 0.1,
    variant: str = "image",
    block: int = 32,
    method: str = "ltt",
    pvalue: str = "betting",
    per_class: bool = False,
    calibrate_share: float = 0.2,
    calibration_ids: str | Path | None = None,
    seed: int = 0,
    grid: tuple[int, int] | None = None,
    refit: RecalibrationOptions | None = None,
    progress: Progress = quiet,
) -> Calibration:
    """Find the loosest certified rule on the labelled images of an id list.

    Args:
        source: the data set and the scores.
        ids: id list of labelled images.
        background: index of the dominant class to suppress, or None.
        max_error: the bound on the mean error of an image.
        delta: 1 - confidence.
        variant: ``"pixel"``, ``"image"`` or ``"blocks"``: what thresholds are pooled over.
        block: side of a block in cells.
        method: ``"ltt"`` or ``"crc"``, see :class:`Certifier`.
        pvalue: ``"betting"`` or ``"hoeffding-bentkus"``.
        per_class: a level for every class.
        calibrate_share: share of the images, drawn with ``seed``, that sets the thresholds; the
            others certify.
        calibration_ids: id list of images that set the thresholds instead; all of ``ids`` certify.
        seed: of the draw and of the order in which images are bet on.
        grid: height and width of the grid; by default the size of the first listed image.
        refit: how the scores are refitted first, or None: on the images that set the thresholds,
            all of them. A certificate needs no more than that neither saw its own images.
        progress: wraps the loops over images.

    Raises:
        ValueError: bad settings or files, named in the message; an image in both lists.
        OSError: a file that cannot be read.
    """
    where = "certify"
    if variant not in VARIANTS:
        names = ", ".join(VARIANTS)
        raise ValueError(message(where, f"a variant among {names}", variant, "choose one"))
    check_alpha(where, max_error, name="max_error")
    check_alpha(where, delta, name="delta")
    listed = read_ids(ids)
    if calibration_ids is None:
        setting, proving = _parts(listed, calibrate_share, seed)
    else:
        setting, proving = read_ids(calibration_ids), listed
        both = sorted({pair.image for pair in setting} & {pair.image for pair in proving})
        if both:
            expected, got = "images in one of the two lists", f"{both[0]} in both"
            raise ValueError(message(where, expected, got, "certify on images of their own"))
    paths = source.locate([*setting, *proving])
    first = source.probabilities(paths[listed[0]])
    size = (first.shape[-2], first.shape[-1]) if grid is None else grid
    num_source = num_classes = first.shape[0]
    recalibration = None
    if refit is not None:
        refitted = recalibrate_scores(
            where,
            replace(refit, share=0.0, folds=0),
            source,
            setting,
            paths,
            num_source,
            seed=seed,
            progress=progress,
        )
        recalibration = refitted.recalibration
        num_classes = recalibration.num_classes
    calibrator = Calibrator(
        fixed_partition(variant, size, block),
        alpha=max(map(Fraction, ALPHAS)),
        background=background,
        num_classes=num_classes,
        ignore_index=VOID,
        recalibration=recalibration,
    )

    def feed(update: Callable[..., None], pairs: list[Pair], title: str) -> None:
        for pair in progress(*shard(pairs), title):
            probs, labels = read_example(source, pair, paths[pair], num_classes, num_source)
            with name_file_in_errors(paths[pair]):
                update(probs, labels, ids=pair.image)

    feed(calibrator.update, setting, "calibrate")
    calibrator.sync()
    certifier = Certifier(
        calibrator,
        max_error=max_error,
        delta=delta,
        method=method,
        pvalue=pvalue,
        per_class=per_class,
        seed=seed,
    )
    feed(certifier.update, proving, "certify")
    certifier.sync()
    made = certifier.compute()
    return replace(made, variant=variant, extra={**made.extra, **source.facts()})


def _parts(pairs: list[Pair], part: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Images that set thresholds and images that certify, whatever their order in the list."""
    count = round(part * len(pairs))
    if not 0 < count < len(pairs):
        expected = f"a --calibrate-share that splits {len(pairs)} images in two"
        fix = "choose another share, or label more images"
        raise ValueError(message("certify", expected, f"{part:g}", fix))

    def place(pair: Pair) -> bytes:
        return hashlib.sha256(f"calibrate\0{seed}\0{pair.image}".encode()).digest()

    ordered = sorted(pairs, key=place)
    return ordered[:count], ordered[count:]


def overlap(calibration: Calibration, ids: str | Path) -> list[str]:
    """Images of an id list that made the calibration or its certificate, sorted."""
    made = [
        *calibration.extra.get("images", []),
        *calibration.extra.get("certifying_images", []),
        *calibration.extra.get("refitted", {}).get("images", []),
        *calibration.extra.get("groups", {}).get("images", []),
    ]
    return sorted({pair.image for pair in read_ids(ids)}.intersection(made))


def class_levels(certificate: Certificate) -> str:
    """The levels of the classes as a Markdown table."""
    lines: list[tuple[str, ...]] = [("class", "alpha", "wrong", "kept"), ("---", *["---:"] * 3)]
    for index, row in enumerate(certificate.classes or ()):
        if row["certified"]:
            shares = (f"{100 * row[name]:.1f} %" for name in ("mean_error", "kept"))
            lines.append((str(index), f"{row['alpha']:g}", *shares))
        else:
            lines.append((str(index), "none", "-", "-"))
    return aligned(lines)
