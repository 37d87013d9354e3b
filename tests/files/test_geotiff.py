"""GeoTIFF: scores in, masks out where the images lie, tiles together and apart again."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpseg import Calibrator, groups
from cpseg.files import (
    find_scores,
    label_raster,
    read_mosaic,
    read_scores,
    write_geotiff,
    write_mosaic,
)
from cpseg.files.score_files import read_shape

rasterio = pytest.importorskip("rasterio")
VOID = 255
ORIGIN = (500_000.0, 5_400_000.0)
KEPT = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def raster(
    path: Path,
    bands: np.ndarray,
    *,
    at: tuple[int, int] = (0, 0),
    crs: str | None = "EPSG:32632",
    pixel: float = 0.5,
    **options: Any,
) -> Path:
    """A GeoTIFF with its first pixel at a row and column of the common grid."""
    row, column = at
    transform = rasterio.Affine(
        pixel, 0, ORIGIN[0] + column * 0.5, 0, -pixel, ORIGIN[1] - row * 0.5
    )
    count, height, width = bands.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            count=count,
            height=height,
            width=width,
            dtype=bands.dtype,
            crs=crs,
            transform=transform if crs else None,
            **options,
        ) as made:
            made.write(bands)
    return path


def image(path: Path, size: tuple[int, int], **options: Any) -> Path:
    return raster(path, np.zeros((3, *size), np.uint8), **options)


def probabilities(size: tuple[int, int], classes: int = 3) -> np.ndarray:
    odds = np.exp(2 * np.random.default_rng(0).normal(size=(classes, *size)))
    return (odds / odds.sum(0)).astype(np.float32)


def argmax(probs: Tensor) -> Tensor:
    return probs.argmax(0)


# Scores


@pytest.mark.parametrize("suffix", [".tif", ".tiff"])
def test_a_raster_is_a_score_file(tmp_path: Path, suffix: str) -> None:
    probs = probabilities((5, 7))
    path = raster(tmp_path / f"a{suffix}", probs)
    assert find_scores(tmp_path, "images/a.png") == path
    assert read_shape(path) == (3, 5, 7)
    found = read_scores(path)
    assert isinstance(found, Tensor)
    assert np.array_equal(found, probs)
    raster(path, (255 * probs).astype(np.uint8))
    found = read_scores(path)
    assert isinstance(found, Tensor)
    assert np.array_equal(found, (255 * probs).astype(np.uint8).astype(np.float32) / 255)


def test_bad_score_rasters(tmp_path: Path) -> None:
    path = raster(tmp_path / "a.tif", probabilities((2, 2)) * 3)
    with pytest.raises(ValueError, match=r"a\.tif: expected probabilities in \[0, 1\]"):
        read_scores(path)
    raster(path, np.zeros((2, 2, 2), np.uint16))
    with pytest.raises(ValueError, match=r"a\.tif: expected uint8"):
        read_scores(path)
    path.write_bytes(b"no raster")
    with pytest.raises(ValueError, match=r"a\.tif: expected a raster, got an unreadable one"):
        read_scores(path)
    with pytest.raises(FileNotFoundError, match=r"none\.tif: expected a raster, got no such file"):
        read_scores(tmp_path / "none.tif")


# One raster, in windows


@KEPT
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50), st.booleans())
def test_windows_do_not_show(
    tmp_path: Path, height: int, width: int, window: int, whole_numbers: bool
) -> None:
    probs = probabilities((height, width))
    stored = (255 * probs).astype(np.uint8) if whole_numbers else probs
    scores = raster(tmp_path / "s.tif", stored, at=(3, 4))
    share = label_raster(scores, tmp_path / "l.tif", argmax, window=window)
    assert share == 1
    with rasterio.open(tmp_path / "l.tif") as made, rasterio.open(scores) as given_:
        assert np.array_equal(made.read(1), stored.argmax(0))
        assert (made.crs, made.transform) == (given_.crs, given_.transform)
        assert (made.count, made.dtypes[0], made.nodata) == (1, "uint8", VOID)


def test_a_window_goes_through_the_rule_as_an_image_of_its_own(tmp_path: Path) -> None:
    probs = torch.from_numpy(probabilities((40, 40)))
    labels = probs.argmax(0)
    calibrator = Calibrator(groups.image((20, 20)), background=None)
    for row in (0, 20):
        for column in (0, 20):
            part = slice(row, row + 20), slice(column, column + 20)
            calibrator.update(probs[:, *part][None], labels[part][None])
    rule = calibrator.compute(alpha=0.3)
    scores = raster(tmp_path / "s.tif", probs.numpy())
    share = label_raster(scores, tmp_path / "l.tif", rule.pseudo_labels, window=20)
    with rasterio.open(tmp_path / "l.tif") as made:
        found = torch.from_numpy(made.read(1))
    for row in (0, 20):
        for column in (0, 20):
            part = slice(row, row + 20), slice(column, column + 20)
            assert torch.equal(found[part].long(), rule.pseudo_labels(probs[:, *part]))
    assert share == float((found != VOID).double().mean())
    assert 0 < share < 1


def test_pixels_without_data_are_void(tmp_path: Path) -> None:
    probs = probabilities((30, 30))
    probs[:, :20] = -9999
    probs[:, 25, 5] = np.nan
    seen: list[tuple[int, ...]] = []

    def select(part: Tensor) -> Tensor:
        seen.append(tuple(part.shape))
        return argmax(part)

    scores = raster(tmp_path / "s.tif", probs, nodata=-9999)
    with pytest.raises(ValueError, match=r"probabilities in .* got NaN"):
        label_raster(scores, tmp_path / "l.tif", select, window=10)
    assert list(tmp_path.iterdir()) == [scores], "nothing is left half written"
    probs[:, 25, 5] = -9999
    seen.clear()
    raster(scores, probs, nodata=-9999)
    label_raster(scores, tmp_path / "l.tif", select, window=10)
    assert seen == [(3, 10, 10)] * 3, "windows without data are not labelled"
    wanted = probs.argmax(0)
    wanted[:20] = wanted[25, 5] = VOID
    with rasterio.open(tmp_path / "l.tif") as made:
        assert np.array_equal(made.read(1), wanted)


def test_the_place_may_be_that_of_the_image(tmp_path: Path) -> None:
    scores = raster(tmp_path / "s.tif", probabilities((6, 8)), crs=None)
    with pytest.raises(
        ValueError, match=r"s\.tif: expected a coordinate reference system, got none"
    ):
        label_raster(scores, tmp_path / "l.tif", argmax)
    where = image(tmp_path / "i.tif", (6, 8), at=(2, 1))
    label_raster(scores, tmp_path / "l.tif", argmax, image=where)
    with rasterio.open(tmp_path / "l.tif") as made, rasterio.open(where) as given_:
        assert (made.crs, made.transform) == (given_.crs, given_.transform)
    image(where, (6, 9))
    with pytest.raises(ValueError, match=r"s\.tif: expected scores 6x9 like .*i\.tif, got 6x8"):
        label_raster(scores, tmp_path / "l.tif", argmax, image=where)


@pytest.mark.parametrize(
    ("select", "says"),
    [
        (lambda probs: probs[0], r"integer labels \[2, 2\], got torch.float32"),
        (lambda probs: probs.argmax(0)[:1], r"integer labels \[2, 2\], got torch.int64 \[1, 2\]"),
        (lambda probs: probs.argmax(0) - 5, r"labels in 0\.\.255, got -"),
    ],
)
def test_bad_labels_of_a_window(
    select: Callable[[Tensor], Tensor], says: str, tmp_path: Path
) -> None:
    scores = raster(tmp_path / "s.tif", probabilities((2, 2)))
    with pytest.raises(ValueError, match=says):
        label_raster(scores, tmp_path / "l.tif", select)
    with pytest.raises(ValueError, match="label_raster: expected window as a whole number"):
        label_raster(scores, tmp_path / "l.tif", argmax, window=0)


# Masks of images, and tiles


def tiles(
    folder: Path, masks: dict[str, np.ndarray], places: dict[str, tuple[int, int]]
) -> list[Path]:
    return [image(folder / f"{name}.tif", masks[name].shape, at=places[name]) for name in masks]


@KEPT
@given(st.data())
def test_tiles_come_together_and_apart_again(tmp_path: Path, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
    columns = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
    gap = data.draw(st.sampled_from([0, 2]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    masks, places, top = {}, {}, -5
    for i, height in enumerate(rows):
        left = 7
        for j, width in enumerate(columns):
            masks[f"{i}-{j}"] = rng.choice([0, 1, 2, VOID], (height, width)).astype(np.uint8)
            places[f"{i}-{j}"] = top, left
            left += width + gap
        top += height + gap
    order = data.draw(st.permutations(sorted(masks)))
    masks = {name: masks[name] for name in order}
    images = tiles(tmp_path, masks, places)
    write_mosaic(tmp_path / "m.tif", (torch.from_numpy(mask) for mask in masks.values()), images)
    size = (sum(rows) + gap * (len(rows) - 1), sum(columns) + gap * (len(columns) - 1))
    whole = np.full(size, VOID, np.uint8)
    for name, (row, column) in places.items():
        height, width = masks[name].shape
        whole[row + 5 : row + 5 + height, column - 7 : column - 7 + width] = masks[name]
    with rasterio.open(tmp_path / "m.tif") as made:
        assert np.array_equal(made.read(1), whole)
        assert (made.transform.c, made.transform.f) == (ORIGIN[0] + 3.5, ORIGIN[1] + 2.5)
        assert made.crs == "EPSG:32632"
    found = dict(
        read_mosaic(tmp_path / "m.tif", dict(zip(masks, images, strict=True)), ["a", "b", "c"])
    )
    assert list(found) == list(masks)
    for name, labels in found.items():
        assert np.array_equal(labels, masks[name])


def test_a_mask_lies_where_its_image_lies(tmp_path: Path) -> None:
    where = image(tmp_path / "i.tif", (3, 5), at=(9, 9))
    labels = torch.tensor([[0, 1, 2, VOID, VOID]] * 3, dtype=torch.uint8)
    write_geotiff(tmp_path / "deep" / "m.tif", labels, where)
    with rasterio.open(tmp_path / "deep" / "m.tif") as made, rasterio.open(where) as given_:
        assert np.array_equal(made.read(1), labels)
        assert (made.crs, made.transform, made.nodata) == (given_.crs, given_.transform, VOID)
    with pytest.raises(
        ValueError, match=r"i\.tif: expected a uint8 mask 3x5, got torch.uint8 \[3, 4\]"
    ):
        write_geotiff(tmp_path / "m.tif", labels[:, :4], where)
    with pytest.raises(FileNotFoundError, match=r"none\.tif: expected a raster"):
        write_geotiff(tmp_path / "m.tif", labels, tmp_path / "none.tif")


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"at": (0, 3)}, r"b\.tif: expected tiles apart, got .*a\.tif, which it overlaps"),
        ({"at": (-3, -3)}, r"b\.tif: expected tiles apart"),
        ({"at": (0, 0)}, r"b\.tif: expected tiles apart"),
        (
            {"at": (0, 9), "crs": "EPSG:4326"},
            r"b\.tif: expected EPSG:32632 as in .*a\.tif, got EPSG:4326",
        ),
        ({"at": (0, 9), "crs": None}, r"b\.tif: expected a coordinate reference system, got none"),
        ({"at": (0, 9), "pixel": 0.6}, r"b\.tif: expected pixels on the grid of .*a\.tif"),
        ({"at": (0.5, 9)}, r"b\.tif: expected pixels on the grid of .*a\.tif"),
        (
            {"at": (0, 9), "size": (5, 4)},
            r"b\.tif: expected a uint8 mask 5x4, got torch.uint8 \[4, 4\]",
        ),
    ],
)
def test_tiles_that_do_not_fit_together(second: dict[str, Any], says: str, tmp_path: Path) -> None:
    options = {"size": (4, 4), **second}
    images = [
        image(tmp_path / "a.tif", (4, 4)),
        image(tmp_path / "b.tif", options.pop("size"), **options),
    ]
    mask = torch.zeros(4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=says) as caught:
        write_mosaic(tmp_path / "m.tif", [mask, mask], images)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "m.tif").exists()
    with pytest.raises(ValueError, match="write_mosaic: expected images, got none"):
        write_mosaic(tmp_path / "m.tif", [], [])


def test_rasters_that_tell_no_masks(tmp_path: Path) -> None:
    where = {"a": image(tmp_path / "a.tif", (4, 4), at=(1, 1))}
    path = raster(tmp_path / "m.tif", np.full((1, 5, 5), 2, np.uint8))
    assert next(read_mosaic(path, where, ["x", "y", "z"])).labels.tolist() == [[2] * 4] * 4
    with pytest.raises(ValueError, match=r"m\.tif: expected classes 0\.\.1 or 255 for a, got 2"):
        list(read_mosaic(path, where, ["x", "y"]))
    raster(path, np.full((1, 5, 5), 2, np.uint8), nodata=2)
    assert next(read_mosaic(path, where, ["x"])).labels.tolist() == [[VOID] * 4] * 4
    raster(path, np.zeros((1, 4, 5), np.uint8))
    with pytest.raises(
        ValueError, match=r"a\.tif: expected an image within .*m\.tif \(4x5\), got 4x4"
    ):
        list(read_mosaic(path, where, ["x"]))
    raster(path, np.zeros((1, 5, 5), np.float32))
    with pytest.raises(ValueError, match=r"m\.tif: expected a mask of 8 bits, got float32"):
        list(read_mosaic(path, where, ["x"]))
    raster(path, np.zeros((1, 5, 5), np.uint8), crs=None)
    with pytest.raises(ValueError, match=r"m\.tif: expected a coordinate reference system"):
        list(read_mosaic(path, where, ["x"]))


def test_without_rasterio_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = raster(tmp_path / "a.tif", probabilities((2, 2)))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    for call in (
        lambda: read_scores(path),
        lambda: label_raster(path, tmp_path / "l.tif", argmax),
        lambda: write_mosaic(tmp_path / "l.tif", [], [path]),
        lambda: list(read_mosaic(path, {}, ["a"])),
    ):
        with pytest.raises(
            ImportError, match=r'GeoTIFF needs rasterio: pip install "cpseg\[geo\]"'
        ):
            call()


@pytest.mark.ci
def test_a_raster_larger_than_the_memory_it_may_take(tmp_path: Path) -> None:
    """4 bands of 6,000 x 6,000 pixels are 576 MB as float32; windows of 500 take a fraction."""
    import tracemalloc

    path = tmp_path / "s.tif"
    profile = {"driver": "GTiff", "count": 4, "height": 6000, "width": 6000, "dtype": "uint8"}
    transform = rasterio.Affine(1, 0, 9, 0, -1, 9)
    with rasterio.open(
        path, "w", crs="EPSG:32632", transform=transform, compress="deflate", tiled=True, **profile
    ):
        pass
    tracemalloc.start()
    label_raster(path, tmp_path / "l.tif", argmax, window=500)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 30e6
    with rasterio.open(tmp_path / "l.tif") as made:
        assert made.shape == (6000, 6000)


@pytest.mark.parametrize(("dtype", "nodata"), [("float32", -9999.0), ("uint8", 0.0)])
def test_no_data_does_not_count_as_scores(tmp_path: Path, dtype: str, nodata: float) -> None:
    bands = np.full((3, 4, 5), 1, dtype)
    bands[:, 1, 2:4] = nodata
    bands[0, 0, 0] = nodata  # in one band alone: a score, and refused where it is none
    path = raster(tmp_path / "s.tif", bands, nodata=nodata)
    with pytest.raises(ValueError, match="scores at every pixel, got no-data at 2 pixels; cpseg"):
        read_scores(path)
    bands[:, 1, 2:4] = 1
    whole = raster(tmp_path / "w.tif", bands, nodata=nodata)
    if dtype == "uint8":
        assert isinstance(read_scores(whole), Tensor)
    else:
        with pytest.raises(ValueError, match=r"probabilities in \[0, 1\], got values from -9999"):
            read_scores(whole)
