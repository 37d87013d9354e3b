"""Masks: palette PNG files, what training code would read wrongly is refused."""

from __future__ import annotations

import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.damage import damage_every_byte
from tests.support.folders import command, complains, done, make, refused
from torch import Tensor

from cpseg import Calibration
from cpseg.calibration.provenance import Provenance
from cpseg.core.class_map import ClassMap
from cpseg.core.mask_format import MaskFormat
from cpseg.core.palette import parse_palette, read_palette
from cpseg.files.labels import read_labels
from cpseg.files.masks import (
    image_size,
    palette,
    read_mask,
    size_fix,
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
    named = mode.partition(";")[0]  # Pillow before 11 reads mode I;16 as I
    complains(caught.value, path, "8-bit mask (L or P)", f"mode {named}")


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


COLOURS = {0: "#000000", 1: "#ff0000", 2: "#00ff00", 3: "#0000ff"}
PALETTES: list[Any] = [
    {**{str(key): value for key, value in COLOURS.items()}, "void": "#808080"},
    {
        "road": "#000000",
        "sky": [255, 0, 0],
        "void": [[128, 128, 128]],
        "c": "#00FF00",
        "d": "#0000ff",
    },
]


def in_colours(values: np.ndarray, mode: str = "RGB") -> Image.Image:
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]])
    image = Image.fromarray(colours[np.where(values == 255, 4, values)].astype(np.uint8))
    return (
        image.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else image.convert(mode)
    )


@pytest.mark.parametrize("content", PALETTES)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_masks_in_colours(tmp_path: Path, content: Any, mode: str) -> None:
    path = tmp_path / "m.png"
    in_colours(LABELS, mode).save(path)
    colours = parse_palette(content)
    assert np.array_equal(read_labels(path, MaskFormat(palette=colours), 4, (2, 3)), LABELS)
    assert parse_palette(colours.to_json()) == colours
    merged = MaskFormat(map=ClassMap((0, 1, 1, None)), palette=colours)
    expected = np.array([[0, 1, 1], [255, 255, 0]])
    assert np.array_equal(read_labels(path, merged, 2, (2, 3)), expected)
    assert MaskFormat.from_json(merged.to_json()) == merged


def test_a_list_of_colours_has_no_void_and_another_void_value_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    in_colours(LABELS).save(path)
    with pytest.raises(ValueError, match="#808080 at row 1, column 1") as caught:
        read_labels(path, MaskFormat(palette=parse_palette(list(COLOURS.values()))), 4, (2, 3))
    complains(caught.value, path, "colours of --palette", "0 more pixels", "JPEG")
    five = parse_palette([*COLOURS.values(), "#808080"])
    assert np.array_equal(read_labels(path, MaskFormat(void=4, palette=five), 4, (2, 3)), LABELS)


def test_the_palette_of_voc_is_the_one_that_is_written(tmp_path: Path) -> None:
    labels = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    write_mask(tmp_path / "m.png", labels)
    Image.open(tmp_path / "m.png").convert("RGB").save(tmp_path / "rgb.png")
    for name in ("m.png", "rgb.png"):
        found = read_labels(tmp_path / name, MaskFormat(palette=read_palette("voc")), 255, (16, 16))
        assert torch.equal(found, labels)
    with pytest.raises(ValueError, match="pass --palette") as caught:
        read_mask(tmp_path / "rgb.png", num_classes=255, size=None)
    complains(caught.value, tmp_path / "rgb.png", "mode RGB")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("#000000", "a list or an object of colours, got str"),
        ([], "1 to 256 colours, got 0"),
        (["#00"], "a colour, got '#00'"),
        ([[0, 0, 256]], "a colour"),
        ([[0, 0]], "a colour"),
        (["#000000", [0, 0, 0]], "every colour once, got #000000 twice"),
        ({"a": "#000000", "void": "#000000"}, "every colour once"),
        ({"0": "#000000", "a": "#000001"}, "numbers or names"),
        ({"0": "#000000", "00": "#000001"}, "every value once"),
        ({"256": "#000000"}, "values below 256, got 256"),
        ({"void": "#000000"}, "1 to 256 colours, got 0"),
    ],
)
def test_what_is_no_palette_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "palette.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected") as caught:
        read_palette(path)
    complains(caught.value, path, said)
    path.write_text("{")
    with pytest.raises(ValueError, match="a palette in JSON"):
        read_palette(path)


def test_classes_may_count_from_one(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    image_of(LABELS, "L").save(path)
    expected = np.array([[255, 0, 1], [2, 255, 255]])
    assert np.array_equal(read_labels(path, MaskFormat(first_class=1), 3, (2, 3)), expected)
    with pytest.raises(ValueError, match=r"labels in 1\.\.2 or 255 \(void\), got 3"):
        read_labels(path, MaskFormat(first_class=1), 2, (2, 3))
    with pytest.raises(ValueError, match="pass --first-class 1") as caught:
        read_labels(path, MaskFormat(), 3, (2, 3))
    complains(caught.value, path, "0..2 or 255", "--void 3")
    with pytest.raises(ValueError, match="pass --void 2 if it is void, or --mask-map") as caught:
        read_labels(path, MaskFormat(), 2, (2, 3))
    with pytest.raises(ValueError, match="one of mask map and first class"):
        MaskFormat(map=ClassMap((0, 1)), first_class=1)
    full = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    write_mask(path, full)
    found = read_labels(path, MaskFormat(void=0, first_class=1), 256, (16, 16))
    assert torch.equal(found.flatten()[1:].long(), torch.arange(255))


def test_a_value_that_the_mask_map_lacks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    image_of(LABELS, "L").save(path)
    with pytest.raises(ValueError, match="3 is not in --mask-map") as caught:
        read_labels(path, MaskFormat(map=ClassMap((0, 1, 1))), 2, (2, 3))
    complains(caught.value, path, "values 0..2 or 255 (void), got 3")


@pytest.mark.parametrize(
    ("found", "scores", "classes", "fix"),
    [
        ((180, 240), (240, 11), 180, "classes last: pass --layout hwc"),
        ((180, 240), (45, 60), 11, "pass --upsample"),
        ((513, 1025), (129, 257), 21, "pass --upsample"),
        ((181, 239), (23, 30), 21, "pass --upsample"),
        ((180, 240), (60, 60), 11, "write both at the image's size"),
        ((180, 240), (360, 480), 11, "write both at the image's size"),
    ],
)
def test_another_size_names_the_option_that_cures_it(
    found: tuple[int, int], scores: tuple[int, int], classes: int, fix: str
) -> None:
    assert fix in size_fix(found, scores, classes)


def test_a_calibration_carries_how_masks_are_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``evaluate`` and the masks of ``stage1.txt`` take it from there."""
    data = make(tmp_path / "data")
    for name, truth in data.labels.items():
        in_colours(truth).save(data.mask_file(name))
    colours = {"void": "#808080"}
    colours |= {str(key + 1): value for key, value in COLOURS.items()}
    (tmp_path / "colours.json").write_text(json.dumps(colours))
    made = tmp_path / "c.safetensors"
    run = ("calibrate", *data.options(), "--background", "none", "--variant", "image", "-o", made)
    refused(command(capsys, *run), "pass --palette")
    run = (*run, "--palette", tmp_path / "colours.json")
    refused(command(capsys, *run), "got 4; pass --first-class 1")
    done(command(capsys, *run, "--first-class", 1))
    said = done(command(capsys, "evaluate", *data.options(), "--calibration", made)).out
    again = ("--palette", tmp_path / "colours.json", "--first-class", 1, "--void", 255)
    told = command(capsys, "evaluate", *data.options(), "--calibration", made, *again)
    assert done(told).out == said
    stored = Calibration.load(made).provenance.masks
    assert stored is not None
    assert (stored.first_class, stored.palette) == (1, parse_palette(colours))
    words = data.options(calibration=made, labelled=data.ids, output=data.root / "out")
    done(command(capsys, "label", *words))
    for name, truth in data.labels.items():
        true = read_mask(data.root / "out/true" / name, num_classes=4, size=None)
        assert np.array_equal(true, truth)
    bad = Calibration.load(made).extra.to_json()
    for change in ({"first_class": -1}, {"palette": {"0": "red"}}):
        with pytest.raises(ValueError, match="expected"):
            Provenance.from_json({"masks": {**bad["masks"], **change}})


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
