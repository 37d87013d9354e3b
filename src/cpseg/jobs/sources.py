"""The sources of a finished calibration: its scores are read as they were when it was made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from cpseg._internal.checks import message, shape
from cpseg.calibration.calibration import Calibration
from cpseg.calibration.provenance import SourcesRead
from cpseg.core.selection import Evidence
from cpseg.files.dataset import Files, Source
from cpseg.files.masks import image_size, size_fix
from cpseg.foundation.classes import read_classes


def as_calibrated(where: str, source: Source, calibration: Calibration) -> Source:
    """The source with the class maps, and the components of features, of a calibration.

    Masks are read as they were for the calibration, unless the source says how they are stored.
    A single folder may hold evidence made with the calibration, whatever its sources were.

    Raises:
        ValueError: class maps or readings other than those of the calibration, another number of
            folders of scores, folders in another order, or features where there were none, or none
            where there were some.
    """
    source = _with_masks(source, calibration)
    source = source.with_recorded_readings(calibration.provenance.readings)
    recorded, recalibration = calibration.provenance.sources_read, calibration.recalibration
    projection = None if recalibration is None else recalibration.projection
    needs_features = projection is not None and projection.components > 0
    if source.colour and not (recorded and recorded.colour):
        expected = "no colours of the images, as calibrated"
        raise ValueError(message(where, expected, "colour", "leave it out"))
    if recorded is None:
        if not source.is_single:
            expected, got = "the scores of one model, as calibrated", _said(source)
            raise ValueError(message(where, expected, got, "pass one --probs and no --features"))
        return source.with_recorded_class_map(calibration.provenance.class_map)
    _check_folders(where, source, recorded, needs_features=needs_features)
    first, *others = (
        model.with_recorded_map(class_map)
        for model, class_map in zip(source.models, recorded.class_maps, strict=False)
    )
    return replace(
        source,
        class_map=first.class_map,
        others=tuple(others),
        features=source.features if needs_features else None,
        projection=projection,
        colour=recorded.colour,
        classes=None if recalibration is None else recalibration.sources,
    )


def scores_of_image(source: Source, files: Files, image: Path) -> Tensor | Evidence:
    """The scores of an image, which have its size.

    Raises:
        ValueError: another size. The message names what the scores look like instead.
    """
    size = image_size(image)
    scores = source.scores(files)
    plane = scores.best if isinstance(scores, Evidence) else scores[0]
    if size != tuple(plane.shape):
        expected, fix = f"scores of the image's size {list(size)}", "resize and write them anew"
        if isinstance(scores, Tensor):
            fix = size_fix(size, tuple(plane.shape), len(scores), otherwise=fix)
        raise ValueError(message(str(files[0]), expected, shape(plane), fix))
    return scores


def _with_masks(source: Source, calibration: Calibration) -> Source:
    """Masks are read as they were for the calibration, where nothing else is said of them."""
    stored = calibration.provenance.masks
    if stored is None or not source.mask_format.is_plain:
        return source
    return source.with_mask_format(stored)


def _check_folders(
    where: str, source: Source, recorded: SourcesRead, *, needs_features: bool
) -> None:
    folders, features = recorded.folders, recorded.features
    given = [folder.name for folder in source.folders]
    names = ", ".join(folders)
    if len(given) != len(folders) and not source.is_single:
        expected = f"{len(folders)} folders of scores, as calibrated: {names}"
        fix = "pass --probs once for each, in this order"
        raise ValueError(message(where, expected, f"{len(given)}: {', '.join(given)}", fix))
    if sorted(given) == sorted(folders) and given != list(folders):
        expected, got = f"folders of scores in the order {names}", ", ".join(given)
        raise ValueError(message(where, expected, got, "pass --probs in that order"))
    if source.features is not None and features is None:
        expected, got = "no features, as calibrated", str(source.features)
        raise ValueError(message(where, expected, got, "leave --features out"))
    if source.features is None and needs_features and not source.is_single:
        expected = f"the encoder's features, as calibrated: {features}"
        raise ValueError(message(where, expected, "none", "pass --features"))


def _said(source: Source) -> str:
    said = f"{len(source.folders)} folders of scores"
    return said if source.features is None else f"{said} and features"


def names_beside(source: Source, num_classes: int | None) -> tuple[str, ...]:
    """The names in ``classes.txt`` beside the scores, as ``cpseg predict`` writes it.

    None where the first model's classes are not those of the data set.

    Args:
        source: the data set and the scores.
        num_classes: of the data set, if it is known.
    """
    path = source.probs / "classes.txt"
    if source.class_map is not None or not path.is_file():
        return ()
    names = read_classes(path).names
    return names if num_classes in (None, len(names)) else ()
