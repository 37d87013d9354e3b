"""The jobs ``cpseg export`` and ``cpseg import``: labels to annotation and map tools, and back."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from cpseg._internal import words
from cpseg._internal.checks import check_choice, check_count, message
from cpseg._internal.safe_files import write_text
from cpseg.calibration.calibration import Calibration
from cpseg.files.annotations import Annotated, check_class_names
from cpseg.files.audit_files import class_name
from cpseg.files.brush_tasks import LOCAL_FILES, read_brush_tasks, write_brush_tasks
from cpseg.files.coco import read_coco, write_coco
from cpseg.files.cvat import read_cvat, write_cvat
from cpseg.files.dataset import Progress, quiet
from cpseg.files.geotiff import RASTERS, read_mosaic, write_geotiff, write_mosaic
from cpseg.files.id_lists import Pair, path_in_list, read_ids, write_ids
from cpseg.files.image_folders import places_of
from cpseg.files.masks import VOID, image_size, write_mask
from cpseg.files.run_folder import output_path, output_paths
from cpseg.foundation.classes import read_classes
from cpseg.jobs.audit import Labels

_IDS, _CLASSES = "ids.txt", "classes.txt"


class Exported(NamedTuple):
    """What an export wrote: the images, of how many, and the names of the classes."""

    images: tuple[str, ...]
    of: int
    class_names: tuple[str, ...]


class Imported(NamedTuple):
    """What an import wrote.

    Attributes:
        images: those that got a mask.
        empty: those in the file without a labelled pixel, which were left out.
        missing: how many of the known images are not in the file.
        before: pixels that had a label before and have one now; 0 where nothing is known of before.
        changed: how many of them have another one.
        added: pixels that had no label and have one now.
    """

    images: tuple[str, ...]
    empty: tuple[str, ...]
    missing: int
    before: int
    changed: int
    added: int


@dataclass(frozen=True)
class ExportOptions:
    """What is exported, and how.

    Attributes:
        names: a file of class names, one per line in order; by default the ``classes.txt`` beside
            the scores that the labels were made from, or ``class 0``, ``class 1``, ...
        root: the folder of the images; by default as ``cpseg label`` recorded it.
        ids: an id list of the images to export; by default all.
        draw: how many images to draw at random from those, or None for all.
        seed: of the draw.
        compressed: for COCO: run-length codes as text, not as lists.
        prefix: for Label Studio: what comes before an image's name in its address.
    """

    names: str | Path | None = None
    root: str | Path | None = None
    ids: str | Path | None = None
    draw: int | None = None
    seed: int = 0
    compressed: bool = True
    prefix: str = LOCAL_FILES


def export_labels(
    labels: str | Path,
    form: str,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    progress: Progress = quiet,
) -> Exported:
    """Write the labels of a folder in the format of another tool.

    Args:
        labels: a folder that :func:`cpseg.jobs.label` has finished, or another with ``ids.txt``.
        form: ``"coco"``, ``"label-studio"``, ``"cvat"`` or ``"geotiff"``.
        out: the file to write: JSON, JSON, zip, or one GeoTIFF that all images are tiles of. For
            GeoTIFF a path without that suffix is a folder, which gets a file per image.
        options: which images, and how.
        progress: wraps the loop over images.

    Raises:
        ValueError: bad options, labels or names, or a file that is not what it should be.
        OSError: a file that cannot be read or written.
        ImportError: GeoTIFF without rasterio; names the extra.
    """
    options = options or ExportOptions()
    check_choice("export", form, words.EXCHANGE_FORMATS, name="a format")
    folder = Labels.open(labels, options.root)
    names = _names(folder, options.names)
    chosen = _chosen(folder, options)
    out = Path(out)
    pairs = [Pair(image, None) for image in chosen]

    def masks() -> Iterator[tuple[str, Tensor]]:
        for pair in progress(pairs, len(pairs), "export"):
            yield pair.image, folder.read(pair.image)

    if form == "coco":
        write_coco(out, masks(), names, compressed=options.compressed)
    elif form == "label-studio":
        write_brush_tasks(out, masks(), names, prefix=options.prefix)
    elif form == "cvat":
        write_cvat(out, masks(), names)
    elif out.suffix.lower() in RASTERS:
        images = [folder.root / image for image in chosen]
        write_mosaic(out, (mask for _, mask in masks()), images)
    else:
        paths = output_paths("export", out, pairs, ".tif", kind="masks")
        for image, mask in masks():
            write_geotiff(paths[Pair(image, None)], mask, folder.root / image)
    return Exported(tuple(chosen), len(folder.masks), tuple(names))


def _chosen(folder: Labels, options: ExportOptions) -> list[str]:
    """The images to export, in the order of their list."""
    images = list(folder.masks)
    if options.ids is not None:
        images = [pair.image for pair in read_ids(options.ids, columns=1, root=folder.root)]
        strange = [image for image in images if image not in folder.masks]
        if strange:
            fix = "list images that were labelled"
            got = f"{strange[0]}, which is none"
            raise ValueError(message(str(options.ids), f"images of {folder.out}", got, fix))
    if options.draw is None:
        return images
    fix = "draw fewer images"
    check_count("export", options.draw, name="draw", fix=fix, most=len(images))
    drawn = {*random.Random(options.seed).sample(sorted(images), options.draw)}
    return [image for image in images if image in drawn]


def _names(folder: Labels | None, given: str | Path | None) -> list[str]:
    """The names of the classes: given, or found beside the scores, or numbers.

    Raises:
        ValueError: no file was given where nothing else tells, or another number of names than the
            calibration has classes.
    """
    path = None if folder is None else folder.out / "calibration.safetensors"
    count = Calibration.load(path).num_classes if path is not None and path.exists() else None
    if given is not None:
        names = list(read_classes(given).names)
        if count is not None and len(names) != count:
            fix = "name every class of the labels, in order"
            raise ValueError(message(str(given), f"{count} names", str(len(names)), fix))
        return names
    beside = None if folder is None or folder.probs is None else folder.probs / _CLASSES
    if beside is not None and beside.is_file():
        names = list(read_classes(beside).names)
        if count in (None, len(names)):
            return names
    if count is None:
        expected, fix = "names of the classes", "pass a file of names, one per line (--names)"
        raise ValueError(message("names", expected, "none", fix))
    return [class_name((), k) for k in range(count)]


def import_labels(
    path: str | Path,
    form: str,
    out: str | Path,
    *,
    labels: str | Path | None = None,
    root: str | Path | None = None,
    ids: str | Path | None = None,
    names: str | Path | None = None,
    overlap: str = "error",
) -> Imported:
    """Read masks of another tool into a folder of labelled images.

    The folder gets ``masks/`` (8-bit palette PNG, 255 = void), ``ids.txt`` with a line ``image
    mask`` per image, which ``cpseg calibrate --ids`` reads, and ``classes.txt``. Images without a
    labelled pixel are left out.

    Args:
        path: a file that :func:`export_labels` could have written; for GeoTIFF a raster that
            covers the images.
        form: ``"coco"``, ``"label-studio"``, ``"cvat"`` or ``"geotiff"``.
        out: a new or empty folder.
        labels: the folder that was exported: it knows the images, their folder and the classes.
        root: the folder of the images, where ``labels`` does not tell.
        ids: an id list of images that may be in the file; needed where ``labels`` is not given.
        names: a file of class names, one per line in order; by default as for the export.
        overlap: what pixels become that two classes claim: ``"error"``, ``"last"`` or ``"void"``.

    Raises:
        ValueError: bad options, a bad file, images or classes that are not known, or a mask of
            another size than its image.
        OSError: a file that cannot be read or written.
        ImportError: a package is missing; names the extra.
    """
    check_choice("import", form, words.EXCHANGE_FORMATS, name="a format")
    out, path = Path(out), Path(path)
    folder = None if labels is None else Labels.open(labels, root)
    if folder is None and (root is None or ids is None):
        expected = "the folder that was exported (--labels), or --root and --ids"
        raise ValueError(message("import", expected, "neither", "pass one of them"))
    base = folder.root if folder is not None else Path(str(root))
    images = [] if folder is None else list(folder.masks)
    if ids is not None:
        images = [pair.image for pair in read_ids(ids, columns=1, root=base)]
    known = _Known(path, images)
    class_names = check_class_names("import", _names(folder, names))
    _check_new(out)
    empty, listed, seen = [], [], [0, 0, 0]
    for name, mask in _read(path, form, class_names, overlap, known, base):
        image = known.image_of(name)
        _check_size(f"{path}, {name}", mask, folder, base, image)
        if bool((mask == VOID).all()):
            empty.append(image)
            continue
        if folder is not None and image in folder.masks:
            seen = [
                sum(pair) for pair in zip(seen, _compared(folder.read(image), mask), strict=True)
            ]
        target = output_path(out / "masks", image, ".png")
        write_mask(target, mask)
        listed.append((image, path_in_list(target, base)))
    if not listed:
        got = f"{len(empty)} images without one" if empty else "no annotated image"
        fix = "annotate some, and export them anew"
        raise ValueError(message(str(path), "images with labels", got, fix))
    write_text(out / _CLASSES, "".join(f"{name}\n" for name in class_names))
    write_ids(out / _IDS, listed)
    done = tuple(image for image, _ in listed)
    return Imported(done, tuple(empty), len(images) - len(done) - len(empty), *seen)


def _read(
    path: Path,
    form: str,
    names: Sequence[str],
    overlap: str,
    known: _Known,
    root: Path,
) -> Iterable[Annotated]:
    if form == "coco":
        return read_coco(path, names, overlap=overlap)
    if form == "label-studio":
        return read_brush_tasks(path, names, overlap=overlap)
    if form == "cvat":
        return read_cvat(path, names)
    return read_mosaic(path, {image: root / image for image in known.images}, names)


class _Known:
    """The images that a file may be about, found by what tools call them.

    Args:
        path: the file, for messages.
        images: their names relative to the root.
    """

    def __init__(self, path: Path, images: Sequence[str]) -> None:
        self.path = path
        self.images = images
        self._owner: dict[str, str] = {}
        self._of_place: Mapping[str, list[str]] = {}
        of_place: dict[str, list[str]] = {}
        for image in images:
            for place in places_of(image):
                of_place.setdefault(place, []).append(image)
        self._of_place = of_place

    def image_of(self, name: str) -> str:
        """The image of a name in the file.

        It is the image of that name, or the only one whose path without suffix ends like the name
        or is its end.

        Raises:
            ValueError: none, or several, or one that another name had.
        """
        places = places_of(name) if name.strip("./") else []
        found = [name] if places and name in self._of_place.get(places[0], ()) else []
        for place in places if not found else ():
            found = self._of_place.get(place, [])
            if found:
                break
        if len(found) != 1:
            got = f"{name!r}, which is {' and '.join(found[:3]) if found else 'none of them'}"
            fix = "list the image, or annotate under the images' own paths"
            expected = "names of the known images"
            raise ValueError(message(str(self.path), expected, got, fix))
        before = self._owner.setdefault(found[0], name)
        if before != name:
            got, fix = f"{before} and {name} for {found[0]}", "remove one of them"
            raise ValueError(message(str(self.path), "every image once", got, fix))
        return found[0]


def _check_new(out: Path) -> None:
    """The folder holds nothing, or what an import left that did not end."""
    names = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if names - {"masks", _CLASSES}:
        expected, got = "a new or empty folder", f"one with '{min(names)}' in it"
        raise ValueError(message(str(out), expected, got, "choose another with -o"))


def _check_size(where: str, mask: Tensor, folder: Labels | None, root: Path, image: str) -> None:
    known = folder is not None and image in folder.masks
    size = tuple(folder.read(image).shape) if folder is not None and known else None
    size = size or image_size(root / image)
    if tuple(mask.shape) != size:
        expected = f"a mask {size[0]}x{size[1]} like {image}"
        got, fix = "x".join(map(str, mask.shape)), "annotate the image at its own size"
        raise ValueError(message(where, expected, got, fix))


def _compared(before: Tensor, after: Tensor) -> tuple[int, int, int]:
    """Pixels labelled before and after, changed among them, and labelled only after."""
    both = (before != VOID) & (after != VOID)
    added = (before == VOID) & (after != VOID)
    return int(both.sum()), int((both & (before != after)).sum()), int(added.sum())
