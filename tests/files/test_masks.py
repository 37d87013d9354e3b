"""Masks: palette PNG files, what training code would read wrongly is refused."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.damage import damage_every_byte
from tests.support.folders import complains
from torch import Tensor

from cpseg.files.masks import (
    image_size,
    palette,
    read_mask,
    write_mask,
)

# Masks

LABELS = np.array([[0, 1, 2], [3, 255, 0]], np.uint8)


def image_of(values: np.ndarray, mode: str) -> Image.Image:
    if mode == "P":
        image = Image.fromarray(values).convert("L")
        image.putpalette(palette())
        return image
    if mode == "I;16":
        return Image.fromarray(values.astype(np.uint16))
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_are_read_as_indices(tmp_path: Path, mode: str) -> None:
    image_of(LABELS, mode).save(tmp_path / "m.png")
    found = read_mask(tmp_path / "m.png", num_classes=4, size=(2, 3))
    assert found.dtype == torch.uint8
    assert np.array_equal(found, LABELS)
    assert np.array_equal(read_mask(tmp_path / "m.png", num_classes=4, size=None), LABELS)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "I;16"])
def test_other_modes_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "m.png"
    image_of(LABELS, mode).save(path)
    with pytest.raises(ValueError, match="mode") as caught:
        read_mask(path, num_classes=4, size=(2, 3))
    complains(caught.value, path, "8-bit mask (L or P)", f"mode {mode}")


@pytest.mark.parametrize("bits", [2, 4])
def test_a_grey_mask_of_fewer_bits_is_refused(tmp_path: Path, bits: int) -> None:
    """Pillow opens them as 8 bits, with their values scaled up: 3 of 2 bits is 255, void."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", 2, 1, bits, 0, 0, 0, 0)
    row = bytes([0, (3 << (8 - bits)) | (1 << (8 - 2 * bits))])
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    path = tmp_path / "mask.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    with Image.open(path) as image:
        assert (image.mode, image.size) == ("L", (2, 1))
    with pytest.raises(ValueError, match=f"an 8-bit mask .* got mode L;{bits} bits"):
        read_mask(path, num_classes=4, size=None)


@pytest.mark.parametrize("size", [(3, 2), (2, 4), (4, 6)])
def test_a_mask_of_another_size_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "m.png"
    image_of(LABELS, "L").save(path)
    with pytest.raises(ValueError, match="got 2x3") as caught:
        read_mask(path, num_classes=4, size=size)
    complains(caught.value, path, f"{size[0]}x{size[1]}")


@pytest.mark.parametrize("value", [4, 254])
def test_a_value_that_is_no_class_is_refused(tmp_path: Path, value: int) -> None:
    path = tmp_path / "m.png"
    image_of(np.where(LABELS == 3, value, LABELS).astype(np.uint8), "L").save(path)
    with pytest.raises(ValueError, match=f"got {value}") as caught:
        read_mask(path, num_classes=4, size=None)
    complains(caught.value, path, "0..3 or 255")


def test_another_void_value_is_void(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    image_of(np.where(LABELS == 255, 11, LABELS).astype(np.uint8), "L").save(path)
    assert 11 in read_mask(path, num_classes=11, ignore_index=11, size=None)
    with pytest.raises(ValueError, match="got 11"):
        read_mask(path, num_classes=11, size=None)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"not an image"])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="unreadable") as caught:
        read_mask(path, num_classes=4, size=None)
    complains(caught.value, path, "a mask image")
    with pytest.raises(ValueError, match="unreadable") as caught:
        image_size(path)
    complains(caught.value, path, "an image")


@pytest.mark.parametrize("flip", [0xFF, 0x01, 0x20])
def test_any_damaged_byte_of_a_mask_is_a_plain_error_or_reads(tmp_path: Path, flip: int) -> None:
    path = tmp_path / "m.png"
    image_of(LABELS, "L").save(path)
    damage_every_byte(path, flip, lambda: read_mask(path, num_classes=4, size=(2, 3)))


def test_every_truncation_of_a_mask_is_refused_or_complete(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    image_of(LABELS, "L").save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        try:
            found = read_mask(path, num_classes=4, size=(2, 3))
        except ValueError as error:
            complains(error, path)
        else:
            assert np.array_equal(found, LABELS)


def grey_png(path: Path, height: int, width: int) -> None:
    """An image of one grey value, written without holding it whole."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    packed = zlib.compressobj(1)
    rows = bytes(1 + width)
    data = b"".join(packed.compress(rows) for _ in range(min(height, 20_000))) + packed.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


@pytest.mark.parametrize("side", [10_000, 14_000])
def test_images_of_satellites_are_read_without_a_warning(tmp_path: Path, side: int) -> None:
    """Pillow warns from 89 million pixels and refuses from 179 million."""
    path = tmp_path / "m.png"
    grey_png(path, side, side)
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(path) == (side, side)
        labels = read_mask(path, num_classes=4, size=(side, side))
    assert labels.shape == (side, side)
    assert int(labels.max()) == 0
    assert limit == Image.MAX_IMAGE_PIXELS, "other code keeps its limit"


def test_an_image_of_absurd_size_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    grey_png(path, 2**30, 2)
    for read in (image_size, lambda path: read_mask(path, num_classes=4, size=None)):
        with pytest.raises(ValueError, match="cut it into tiles") as caught:
            read(path)
        complains(caught.value, path, "at most 2147483647 pixels", "1073741824x2")


def test_missing_images_are_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"m\.png"):
        read_mask(tmp_path / "m.png", num_classes=4, size=None)
    with pytest.raises(FileNotFoundError, match=r"m\.png"):
        image_size(tmp_path / "m.png")


def test_image_size_is_height_and_width_without_exif_rotation(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    image.save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == (20, 30)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_a_written_mask_is_an_8_bit_palette_png(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "sub" / "m.png"
    labels = torch.arange(256, dtype=torch.int64).reshape(8, 32).to(dtype)
    if dtype == torch.uint8:
        labels = labels.T  # not contiguous
    write_mask(path, labels)
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "P")
        assert image.size == (labels.shape[1], labels.shape[0])
        assert np.array_equal(np.array(image), labels)
        colours = np.array(image.getpalette()).reshape(256, 3)
    assert path.read_bytes()[24] == 8, "bit depth"
    assert np.array_equal(colours, np.array(palette()).reshape(256, 3))


def test_a_written_mask_is_8_bit_even_where_few_classes_occur(tmp_path: Path) -> None:
    write_mask(tmp_path / "m.png", torch.zeros(3, 3, dtype=torch.uint8))
    assert (tmp_path / "m.png").read_bytes()[24] == 8, "bit depth"
    assert read_mask(tmp_path / "m.png", num_classes=1, size=(3, 3)).sum() == 0


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([[256]]),
        torch.tensor([[-1]]),
        torch.zeros(1, 2, 2, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(0, 4, dtype=torch.uint8),
    ],
    ids=["256", "-1", "three axes", "one axis", "nothing"],
)
def test_labels_that_no_mask_holds_are_not_written(tmp_path: Path, labels: Tensor) -> None:
    with pytest.raises(ValueError, match="write_mask") as caught:
        write_mask(tmp_path / "m.png", labels)
    complains(caught.value, "write_mask", "[H, W] in 0..255", str(list(labels.shape)))
    assert list(tmp_path.iterdir()) == []


def test_palette_is_that_of_voc() -> None:
    colours = np.array(palette()).reshape(256, 3)
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        5: (128, 0, 128),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    for index, colour in known.items():
        assert tuple(colours[index]) == colour
    assert len({tuple(colour) for colour in colours}) == 256
