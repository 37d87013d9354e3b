"""GeoTIFF: scores in, masks out, read and written in windows. Needs rasterio (``cpseg[geo]``)."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpseg._internal.checks import (
    SCORES_FIX,
    check_count,
    check_unit_interval,
    message,
    short,
)
from cpseg._internal.safe_files import damaged
from cpseg.core.mask_format import VOID
from cpseg.files.annotations import Annotated, check_class_names
from cpseg.files.score_arrays import from_bytes

RASTERS = (".tif", ".tiff")
_NEAR = 0.01  # of a pixel: what positions of tiles may be off by rounding
_BLOCK = 256  # pixels: the side of a tile inside the files written here


@dataclass(frozen=True)
class _Grid:
    """Where the pixels of a raster lie."""

    path: Path
    crs: Any
    transform: Any
    height: int
    width: int

    @classmethod
    def of(cls, path: str | Path) -> _Grid:
        """That of a file.

        Raises:
            ValueError: a file that is no raster, or one without a coordinate reference system.
        """
        path = Path(path)
        with _opened(path) as raster:
            if raster.crs is None:
                expected, fix = "a coordinate reference system", "assign the one of the images"
                raise ValueError(message(str(path), expected, "none", fix))
            return cls(path, raster.crs, raster.transform, raster.height, raster.width)

    @property
    def size(self) -> str:
        """Height and width, for messages."""
        return f"{self.height}x{self.width}"

    def place_of(self, other: _Grid) -> tuple[int, int]:
        """Row and column at which another raster begins on this grid.

        Raises:
            ValueError: another reference system or pixel size, or pixels between those of this.
        """
        if other.crs != self.crs:
            expected, fix = f"{self.crs} as in {self.path}", "reproject one of them"
            raise ValueError(message(str(other.path), expected, f"{other.crs}", fix))
        longest = max(other.height, other.width)
        steps = [getattr(other.transform, each) - getattr(self.transform, each) for each in "abde"]
        own = self.transform
        east, north = other.transform.c - own.c, other.transform.f - own.f
        area = own.a * own.e - own.b * own.d
        pixel = math.sqrt(abs(area))
        column = (own.e * east - own.b * north) / area
        row = (own.a * north - own.d * east) / area
        off = max(abs(row - round(row)), abs(column - round(column)))
        if max(map(abs, steps)) * longest > _NEAR * pixel or off > _NEAR:
            expected = f"pixels on the grid of {self.path}"
            got, fix = f"others ({other.transform!r})".replace("\n", " "), "resample one of them"
            raise ValueError(message(str(other.path), expected, " ".join(got.split()), fix))
        return round(row), round(column)


def require() -> Any:
    """The module rasterio.

    Raises:
        ImportError: it is missing; names the extra.
    """
    try:
        import rasterio
    except ImportError as error:
        raise ImportError('GeoTIFF needs rasterio: pip install "cpseg[geo]"') from error
    return rasterio


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A raster, open for reading."""
    rasterio = require()
    if not path.is_file():
        raise FileNotFoundError(message(str(path), "a raster", "no such file", "check the path"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            raster = rasterio.open(path)
    except rasterio.errors.RasterioError as error:
        raise damaged(path, "a raster", error) from error
    with raster:
        yield raster


@contextlib.contextmanager
def _written(path: Path, grid: _Grid) -> Iterator[Any]:
    """A mask raster that appears under its name once it is complete."""
    rasterio = require()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name[:64]}.{os.getpid()}.part")
    try:
        with rasterio.open(
            part,
            "w",
            driver="GTiff",
            height=grid.height,
            width=grid.width,
            count=1,
            dtype="uint8",
            nodata=VOID,  # what is never written reads as void
            crs=grid.crs,
            transform=grid.transform,
            compress="deflate",
            tiled=True,
            blockxsize=_BLOCK,
            blockysize=_BLOCK,
            BIGTIFF="IF_SAFER",
        ) as raster:
            yield raster
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def scores_shape(path: Path) -> tuple[int, int, int]:
    """Bands, height and width of a raster."""
    with _opened(path) as raster:
        return raster.count, raster.height, raster.width


def stored_scores(path: Path) -> Tensor:
    """All bands of a raster as they are stored, ``[K, H, W]``.

    Raises:
        ValueError: a file that is no raster, or no-data pixels, which would count as scores.
    """
    with _opened(path) as raster:
        stored = _tensor(path, _read(path, raster))
        if any(value is not None for value in raster.nodatavals):
            missing = int((raster.dataset_mask() == 0).sum())
            if missing:
                expected, got = "scores at every pixel", f"no-data at {missing} pixels"
                fix = "cpseg.files.label_raster leaves them void; or cut the images to the scores"
                raise ValueError(message(str(path), expected, got, fix))
        return stored


def _read(path: Path, raster: Any, **options: Any) -> Any:
    try:
        return raster.read(**options)
    except Exception as error:  # from GDAL's decoders: anything may come
        raise damaged(path, "a raster", error) from error


def _tensor(path: Path, values: Any) -> Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(values))
    except TypeError as error:
        expected, fix = "uint8 or floating-point bands", "convert and write it anew"
        raise ValueError(message(str(path), expected, str(values.dtype), fix)) from error


def label_raster(
    scores: str | Path,
    path: str | Path,
    select: Callable[[Tensor], Tensor],
    *,
    image: str | Path | None = None,
    window: int = 1024,
) -> float:
    """Label a raster of any size, window by window.

    Each window goes through ``select`` by itself, as if it were an image: use the size of the
    calibration's images. Pixels without data in all bands become void.

    Args:
        scores: a raster with one band per class: uint8 (p = u/255) or floating-point in [0, 1].
        path: the GeoTIFF to write: uint8 class indices, 255 as void and as its no-data value.
        select: from probabilities ``[K, h, w]`` to integer labels ``[h, w]`` with 255 for void,
            such as :meth:`cpseg.Calibration.pseudo_labels`.
        image: the raster whose reference system and transform the labels get; by default that of
            the scores.
        window: side of a window in pixels; those at the right and lower edge may be smaller.

    Returns:
        The share of pixels that carry a label.

    Raises:
        ValueError: no reference system, an image of another size, scores outside [0, 1], or labels
            that do not fit the window.
        FileNotFoundError: there is no such file.
        ImportError: rasterio is missing; names the extra.

    Example:
        >>> rule = Calibration.load("rule.safetensors")  # doctest: +SKIP
        >>> label_raster("scores.tif", "labels.tif", rule.pseudo_labels)  # doctest: +SKIP
        0.874
    """
    rasterio = require()
    check_count("label_raster", window, name="window", fix="pass the side of a window in pixels")
    scores = Path(scores)
    grid = _Grid.of(scores if image is None else image)
    kept = 0
    with _opened(scores) as source:
        if (source.height, source.width) != (grid.height, grid.width):
            expected = f"scores {grid.size} like {grid.path}"
            got, fix = f"{source.height}x{source.width}", "write both on one grid"
            raise ValueError(message(str(scores), expected, got, fix))
        with _written(Path(path), grid) as target:
            for top in range(0, grid.height, window):
                for left in range(0, grid.width, window):
                    size = min(window, grid.height - top), min(window, grid.width - left)
                    part = rasterio.windows.Window(left, top, size[1], size[0])
                    labels = _labels(scores, source, part, select)
                    kept += int((labels != VOID).sum())
                    target.write(labels.numpy(), 1, window=part)
    return kept / (grid.height * grid.width)


def _labels(path: Path, source: Any, part: Any, select: Callable[[Tensor], Tensor]) -> Tensor:
    """The labels of one window, uint8."""
    probs = _tensor(path, _read(path, source, window=part))
    empty = torch.from_numpy(source.dataset_mask(window=part)) == 0
    if probs.dtype == torch.uint8:
        probs = from_bytes(probs)
    if not probs.is_floating_point():
        expected, fix = "uint8 or floating-point bands", "convert and write it anew"
        raise ValueError(message(str(path), expected, str(probs.dtype), fix))
    void = torch.full(empty.shape, VOID, dtype=torch.uint8)
    if bool(empty.all()):
        return void
    probs[:, empty] = 0
    check_unit_interval(str(path), probs, name="probabilities", fix=SCORES_FIX)
    labels = select(probs)
    if labels.shape != empty.shape or labels.is_floating_point():
        expected, got = (
            f"integer labels {list(empty.shape)}",
            f"{labels.dtype} {list(labels.shape)}",
        )
        raise ValueError(message("label_raster", expected, got, "return one label per pixel"))
    labels = labels.cpu()
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high > VOID:
        fix = "a mask of 8 bits holds at most 255 classes and void"
        raise ValueError(message("label_raster", "labels in 0..255", f"{low}..{high}", fix))
    return torch.where(empty, void, labels.to(torch.uint8))


def write_geotiff(path: str | Path, labels: Tensor, image: str | Path) -> None:
    """Write a mask as a GeoTIFF where its image lies.

    Args:
        path: the file to write: uint8, with 255 as its no-data value.
        labels: uint8 ``[H, W]``, class indices and 255 for void.
        image: the image, a GeoTIFF; the mask gets its reference system and transform.

    Raises:
        ValueError: an image without a reference system, or of another size.
        FileNotFoundError: there is no such image.
        ImportError: rasterio is missing; names the extra.

    Example:
        >>> write_geotiff("mask.tif", labels, "image.tif")  # doctest: +SKIP
    """
    grid = _Grid.of(image)
    _check_size(grid, labels)
    with _written(Path(path), grid) as target:
        target.write(labels.cpu().numpy(), 1)


def _check_size(grid: _Grid, labels: Tensor) -> None:
    if labels.dtype != torch.uint8 or tuple(labels.shape) != (grid.height, grid.width):
        expected, got = f"a uint8 mask {grid.size}", f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(message(str(grid.path), expected, got, "write both at the image's size"))


def write_mosaic(path: str | Path, masks: Iterable[Tensor], images: Sequence[str | Path]) -> None:
    """Write the masks of tiles as one GeoTIFF.

    The raster covers all tiles; what none of them covers is void. One mask is in memory at a time.

    Args:
        path: the file to write: uint8, with 255 as its no-data value.
        masks: uint8 ``[H, W]``, class indices and 255 for void, in the order of the images.
        images: the tiles, GeoTIFFs on one grid that do not overlap.

    Raises:
        ValueError: tiles without a reference system, with different ones or on different grids,
            tiles that overlap, or a mask of another size.
        FileNotFoundError: there is no such image.
        ImportError: rasterio is missing; names the extra.

    Example:
        >>> write_mosaic("mask.tif", [left, right], ["left.tif", "right.tif"])  # doctest: +SKIP
    """
    rasterio = require()
    if not images:
        raise ValueError(message("write_mosaic", "images", "none", "pass one or more"))
    grids = [_Grid.of(image) for image in images]
    places = np.array([grids[0].place_of(grid) for grid in grids])
    ends = places + [[grid.height, grid.width] for grid in grids]
    _check_apart(grids, places, ends)
    top, left = (int(side) for side in places.min(0))
    height, width = (int(side) for side in ends.max(0) - places.min(0))
    own = grids[0].transform
    corner = rasterio.Affine(
        own.a,
        own.b,
        own.c + own.a * left + own.b * top,
        own.d,
        own.e,
        own.f + own.d * left + own.e * top,
    )
    whole = _Grid(Path(path), grids[0].crs, corner, height, width)
    with _written(Path(path), whole) as target:
        for grid, (row, column), labels in zip(grids, places.tolist(), masks, strict=True):
            _check_size(grid, labels)
            part = rasterio.windows.Window(column - left, row - top, grid.width, grid.height)
            target.write(labels.cpu().numpy(), 1, window=part)


def _check_apart(grids: Sequence[_Grid], starts: Any, ends: Any) -> None:
    for number in range(1, len(grids)):
        before = (starts[:number] < ends[number]) & (ends[:number] > starts[number])
        met = np.flatnonzero(before.all(1))
        if met.size:
            other = grids[int(met[0])].path
            fix = "crop them, or write a file for each"
            got = f"{other}, which it overlaps"
            raise ValueError(message(str(grids[number].path), "tiles apart", got, fix))


def read_mosaic(
    path: str | Path, images: Mapping[str, str | Path], class_names: Sequence[str]
) -> Iterator[Annotated]:
    """The labels of every image, cut out of a mask raster that covers them.

    Args:
        path: the raster, of which the first band is read: class indices; 255 and its no-data value
            are void.
        images: the GeoTIFF of every image by its name, all on the grid of the raster.
        class_names: names by class index.

    Yields:
        Name and labels of every image, also of one without a label.

    Raises:
        ValueError: no reference system, or another one; an image beyond the raster; or a value that
            is no class.
        FileNotFoundError: there is no such file.
        ImportError: rasterio is missing; names the extra.

    Example:
        >>> dict(read_mosaic("mask.tif", {"a": "a.tif"}, ["road"]))  # doctest: +SKIP
    """
    rasterio = require()
    path = Path(path)
    names = check_class_names("read_mosaic", class_names)
    whole = _Grid.of(path)
    with _opened(path) as raster:
        if raster.dtypes[0] != "uint8":
            expected, fix = "a mask of 8 bits", "export it as Byte (uint8)"
            raise ValueError(message(str(path), expected, raster.dtypes[0], fix))
        void = {VOID, VOID if raster.nodata is None else int(raster.nodata)}
        for name, image in images.items():
            grid = _Grid.of(image)
            row, column = whole.place_of(grid)
            fits = row + grid.height <= whole.height and column + grid.width <= whole.width
            if min(row, column) < 0 or not fits:
                expected = f"an image within {path} ({whole.size})"
                got = f"{grid.size} at row {row}, column {column}"
                raise ValueError(message(str(grid.path), expected, got, "export a larger extent"))
            part = rasterio.windows.Window(column, row, grid.width, grid.height)
            values = torch.from_numpy(_read(path, raster, indexes=1, window=part))
            present = torch.bincount(values.flatten(), minlength=256).nonzero().flatten().tolist()
            strange = sorted({*present} - {*range(len(names))} - void)
            if strange:
                expected = f"classes 0..{len(names) - 1} or {VOID} for {name}"
                fix = "name every class"
                raise ValueError(message(str(path), expected, short(strange[0]), fix))
            for value in void:
                values[values == value] = VOID
            yield Annotated(name, values)
