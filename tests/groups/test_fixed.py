"""Partitions of the grid, and the geometry between a grid and images of other sizes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import oracles
from tests.support.helpers import raises, seeded

from cpseg import groups
from cpseg.groups.fixed import check_groups, is_pixelwise
from cpseg.groups.resampling import to_grid, to_image

SIDES = [*range(1, 13), 17]
BOTH = list(itertools.product(SIDES, SIDES))


def test_pixel_gives_every_cell_its_own_group() -> None:
    assert groups.pixel((2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert groups.pixel((2, 3)).dtype == torch.int64


def test_image_gives_one_group() -> None:
    assert groups.image((2, 3)).tolist() == [[0] * 3] * 2
    assert groups.image((2, 3)).dtype == torch.int64


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (5, 7), (3, 2)])
@pytest.mark.parametrize("block", [1, 2, 3, 9, (2, 3), (1, 4)])
def test_blocks(size: tuple[int, int], block: int | tuple[int, int]) -> None:
    down, across = (block, block) if isinstance(block, int) else block
    columns = -(-size[1] // across)
    want = [[i // down * columns + j // across for j in range(size[1])] for i in range(size[0])]
    got = groups.blocks(size, block)
    assert got.tolist() == want
    assert got.dtype == torch.int64
    assert got.unique().tolist() == list(range(int(got.max()) + 1)), "no group is empty"


def test_blocks_of_one_cell_are_pixels_and_one_block_is_the_image() -> None:
    assert torch.equal(groups.blocks((4, 5), 1), groups.pixel((4, 5)))
    assert torch.equal(groups.blocks((4, 5), (4, 5)), groups.image((4, 5)))


def test_sizes_may_come_as_lists_and_from_shapes() -> None:
    assert groups.pixel(torch.zeros(2, 3).shape).shape == (2, 3)  # type: ignore[arg-type]
    assert groups.image([2, 3]).shape == (2, 3)  # type: ignore[arg-type]


def test_maps_are_made_where_asked() -> None:
    assert groups.pixel((2, 2), device="meta").device.type == "meta"
    assert groups.image((2, 2), device="meta").device.type == "meta"
    assert groups.blocks((2, 2), 1, device="meta").device.type == "meta"


@pytest.mark.parametrize("size", [(0, 3), (3, -1), (3,), (3, 3, 3), (2.0, 3), (True, 3), ("a", 1)])
def test_sizes_that_are_none(size: Any) -> None:
    with raises(ValueError, "groups.pixel", r"size as \(height, width\), got .*; pass positive"):
        groups.pixel(size)
    with raises(ValueError, "groups.image", r"size as \(height, width\)"):
        groups.image(size)
    with raises(ValueError, "groups.blocks", r"size as \(height, width\)"):
        groups.blocks(size, 2)


@pytest.mark.parametrize("block", [0, -1, (2,), (2, 0), (2.5, 1), True])
def test_blocks_that_are_none(block: Any) -> None:
    with raises(ValueError, "groups.blocks", r"block as \(height, width\)"):
        groups.blocks((4, 4), block)


@pytest.mark.parametrize("call", [lambda: groups.pixel(3), lambda: groups.blocks((2, 2), 2.5)])
def test_a_number_where_a_pair_belongs(call: Any) -> None:
    with pytest.raises(ValueError, match=r"expected .* as \(height, width\), got"):
        call()


def test_is_pixelwise() -> None:
    assert is_pixelwise(groups.pixel((3, 4)))
    assert is_pixelwise(torch.tensor([[7, 3], [100, 0]]))
    assert is_pixelwise(torch.tensor([[5]]))
    assert not is_pixelwise(groups.image((1, 2)))
    assert not is_pixelwise(torch.tensor([[0, 1], [2, 0]]))


@pytest.mark.parametrize(
    ("bad", "kind", "match"),
    [
        ([[0]], TypeError, "groups as a tensor, got list"),
        ("image", TypeError, r"got .*image.*; .* cpseg\.groups\.image\(\(height, width\)\)"),
        ("x", TypeError, r"got .*x.*; .* cpseg\.groups\.pixel\(\(height, width\)\)"),
        (torch.zeros(2, 2), TypeError, r"integer groups, got torch\.float32"),
        (torch.zeros(4, dtype=torch.int64), ValueError, r"groups \[H, W\], got \[4\]"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), ValueError, r"got \[1, 2, 2\]; make the map"),
        (torch.zeros(0, 2, dtype=torch.int64), ValueError, r"got \[0, 2\]"),
        (torch.tensor([[0, -2]]), ValueError, "group indices from 0, got -2"),
    ],
)
def test_maps_that_are_none(bad: Any, kind: type[Exception], match: str) -> None:
    with raises(kind, "f", match):
        check_groups("f", bad)


# --- geometry ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("pixels", "cells"), BOTH)
def test_images_read_the_cell_they_belong_to(pixels: int, cells: int) -> None:
    index = torch.arange(cells)
    want = [pixel * cells // pixels for pixel in range(pixels)]
    assert to_image(index[:, None], (pixels, 1))[:, 0].tolist() == want
    assert to_image(index[None], (1, pixels))[0].tolist() == want
    assert want == [oracles.cell_of(pixel, pixels, cells) for pixel in range(pixels)]


@pytest.mark.parametrize(("pixels", "cells"), BOTH)
def test_a_cell_takes_its_score_from_a_pixel_that_inference_maps_to_it(
    pixels: int, cells: int
) -> None:
    image = torch.arange(pixels)
    taken = to_grid(image[:, None], (cells, 1))[:, 0].tolist()
    assert taken == to_grid(image[None], (1, cells))[0].tolist()
    read = to_image(torch.arange(cells)[:, None], (pixels, 1))[:, 0].tolist()
    used = range(cells) if pixels >= cells else sorted(set(read))
    assert all(read[taken[cell]] == cell for cell in used)
    if pixels < cells:  # every pixel is the one that its own cell took
        assert all(taken[read[pixel]] == pixel for pixel in range(pixels))
    assert taken == sorted(taken)
    assert all(abs(t - cell * pixels / cells) <= 1 for cell, t in enumerate(taken)), "near"
    assert taken == [oracles.pixel_for(cell, pixels, cells) for cell in range(cells)]


def test_the_rounded_centre_would_fail() -> None:
    """Why it is the first pixel of a cell: what common resizing takes breaks the law above."""

    def centre(cell: int, pixels: int, cells: int) -> int:
        return min(pixels - 1, round((cell + 0.5) * pixels / cells - 0.5))

    assert any(
        oracles.cell_of(centre(cell, pixels, cells), pixels, cells) != cell
        for pixels, cells in itertools.product(range(1, 13), range(1, 13))
        if pixels >= cells
        for cell in range(cells)
    )


@pytest.mark.parametrize("size", [(4, 6), (9, 5), (2, 2), (1, 1), (3, 8)])
def test_both_axes_and_leading_axes(size: tuple[int, int]) -> None:
    maps = torch.rand(2, 3, 4, 6, generator=seeded(0))
    got = to_grid(maps, size)
    assert got.shape == (2, 3, *size)
    for b, k in np.ndindex(2, 3):
        want = oracles.grid_from_image(maps[b, k].numpy(), size)
        assert np.array_equal(got[b, k].numpy(), want)
    assert np.array_equal(to_image(maps, size).numpy(), oracles.image_from_grid(maps.numpy(), size))


def test_sizes_where_float_arithmetic_would_slip() -> None:
    """49 * (1 / 49) < 1 in floats; whole numbers do not slip, nor overflow at real sizes."""
    for pixels, cells in ((4900, 49), (30_000, 29_999), (512, 375), (8192, 8191)):
        read = to_image(torch.arange(cells)[:, None], (pixels, 1))[:, 0]
        assert read.tolist() == [i * cells // pixels for i in range(pixels)]
        taken = to_grid(torch.arange(pixels)[:, None], (cells, 1))[:, 0]
        assert torch.equal(read[taken], torch.arange(cells))
