"""Run-length codes: against decoders written here from the formats' descriptions, and the tools."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.folders import complains
from torch import Tensor

from cpseg.files import decode_brush_rle, decode_coco_rle, encode_brush_rle, encode_coco_rle


@st.composite
def masks(draw: st.DrawFn, most: int = 12) -> Tensor:
    """Binary masks: blocks, noise, one pixel, one row, one column, all and nothing."""
    height, width = draw(st.integers(1, most)), draw(st.integers(1, most))
    bits = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits).reshape(height, width)
    scale = draw(st.sampled_from([(1, 1), (1, 40), (40, 1), (7, 9)]))
    return torch.from_numpy(np.kron(mask, np.ones(scale, bool)))


def bits_of(code: list[int]) -> str:
    return "".join(f"{byte:08b}" for byte in code)


def brush_values(code: list[int]) -> list[int]:
    """The bytes of a brush code: a header, then runs or single values, as a text of bits."""
    text = bits_of(code)
    place = 0

    def number(count: int) -> int:
        nonlocal place
        place += count
        assert place <= len(text), "the code ends too soon"
        return int(text[place - count : place], 2)

    total, word = number(32), number(5) + 1
    widths = [number(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < total:
        is_run, width = number(1), widths[number(2)]
        length = number(width) + 1
        values += [number(word)] * length if is_run else [number(word) for _ in range(length)]
    assert len(values) == total
    return values


def brush_code(
    values: list[int], *, runs: bool, widths: tuple[int, ...] = (3, 4, 8, 16)
) -> list[int]:
    """A code of the same format in another way: single values, or widths of another choice."""
    text = f"{len(values):032b}{7:05b}" + "".join(f"{width - 1:04b}" for width in widths)
    place = 0
    while place < len(values):
        if runs:
            same = 1
            while same < 2 ** widths[0] and values[place : place + same + 1] == values[
                place : place + 1
            ] * (same + 1):
                same += 1
            text += f"100{same - 1:0{widths[0]}b}{values[place]:08b}"
            place += same
            continue
        count = min(2 ** widths[1], len(values) - place)
        text += f"001{count - 1:0{widths[1]}b}"
        text += "".join(f"{value:08b}" for value in values[place : place + count])
        place += count
    text += "0" * (-len(text) % 8)
    return [int(text[start : start + 8], 2) for start in range(0, len(text), 8)]


@settings(max_examples=40, deadline=None)
@given(masks())
def test_a_brush_code_holds_the_mask_in_all_four_values(mask: Tensor) -> None:
    code = encode_brush_rle(mask)
    assert all(0 <= byte < 256 for byte in code)
    rgba = np.array(brush_values(code)).reshape(*mask.shape, 4)
    assert np.array_equal(rgba, np.repeat(mask.numpy()[..., None] * 255, 4, axis=2))
    assert torch.equal(decode_brush_rle(code, tuple(mask.shape)), mask)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.booleans(), st.sampled_from([(3, 4, 8, 16), (1, 2, 3, 4), (16, 16, 16, 16)]))
def test_brush_codes_of_other_encoders_are_read(
    data: st.DataObject, runs: bool, widths: tuple[int, ...]
) -> None:
    height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    values = data.draw(
        st.lists(
            st.sampled_from([0, 0, 127, 128, 255]),
            min_size=height * width * 4,
            max_size=height * width * 4,
        )
    )
    code = brush_code(values, runs=runs, widths=widths)
    opacity = np.array(values).reshape(height, width, 4)[..., 3]
    assert np.array_equal(decode_brush_rle(code, (height, width)), opacity >= 128)


def test_a_run_longer_than_its_field() -> None:
    mask = torch.zeros(1, 40000, dtype=torch.bool)
    mask[0, 100:] = True
    code = encode_brush_rle(mask)
    assert brush_values(code)[3::4] == [0] * 100 + [255] * 39900
    assert torch.equal(decode_brush_rle(code, (1, 40000)), mask)


def coco_mask(counts: list[int], height: int, width: int) -> list[list[bool]]:
    """The mask of uncompressed counts, pixel by pixel down the columns."""
    flat = [bool(place % 2) for place, count in enumerate(counts) for _ in range(count)]
    assert len(flat) == height * width
    return [[flat[column * height + row] for column in range(width)] for row in range(height)]


@settings(max_examples=40, deadline=None)
@given(masks())
def test_coco_codes_hold_the_mask(mask: Tensor) -> None:
    plain = encode_coco_rle(mask, compressed=False)
    assert plain["size"] == list(mask.shape)
    assert coco_mask(plain["counts"], *mask.shape) == mask.tolist()
    assert min(plain["counts"][1:], default=1) > 0
    assert torch.equal(decode_coco_rle(plain), mask)
    assert torch.equal(decode_coco_rle(encode_coco_rle(mask)), mask)


@settings(max_examples=30, deadline=None)
@given(masks(30))
def test_coco_codes_are_those_of_pycocotools(mask: Tensor) -> None:
    tool = pytest.importorskip("pycocotools.mask")
    theirs = tool.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    ours = encode_coco_rle(mask)
    assert ours["counts"] == theirs["counts"].decode()
    assert np.array_equal(tool.decode(ours), mask)
    assert torch.equal(decode_coco_rle(theirs), mask)
    plain = encode_coco_rle(mask, compressed=False)
    assert tool.frPyObjects(plain, *mask.shape)["counts"] == theirs["counts"]


@pytest.mark.parametrize(
    ("rle", "says"),
    [
        ({"size": [2, 3], "counts": [1, 4]}, "counts of 6 pixels for size 2x3, got 5"),
        (
            {"size": [2, 3], "counts": [7, -1]},
            "counts of 6 pixels for size 2x3, got a negative one",
        ),
        ({"size": [2, 3], "counts": "0"}, "counts of 6 pixels for size 2x3, got 0"),
        ({"size": [2, 3], "counts": "P"}, "counts of a compressed RLE, got a cut-off one"),
        ({"size": [2, 3], "counts": "\x01"}, "counts of a compressed RLE"),
        ({"size": [2, 3], "counts": "o" * 20}, "counts of a compressed RLE"),
        ({"size": [2, 3], "counts": [1.5, 4.5]}, "counts of an RLE"),
        ({"size": [2, 3]}, "counts of an RLE, got None"),
        ({"size": [2], "counts": [2]}, "an RLE with its size [H, W], got [2]"),
        ({"size": [10**6, 10**6], "counts": [10**12]}, "an RLE of at most 2147483647 pixels"),
        ({"size": [0, 2], "counts": []}, "an RLE with its size [H, W]"),
        ({"counts": [1]}, "an RLE with its size [H, W], got None"),
    ],
)
def test_bad_coco_codes(rle: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        decode_coco_rle(rle, where="f.json, a.png")
    complains(caught.value, "f.json, a.png", says)


MASK = torch.tensor([[True, False, True]])


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (encode_brush_rle(MASK.T.repeat(2, 1)), "an RLE of 1x3 pixels with 4 values each, got 24"),
        (encode_brush_rle(MASK)[:-2], "a whole RLE, got one that ends after"),
        (encode_brush_rle(MASK)[:3], "a whole RLE, got one that ends after 3 bytes"),
        ([], "a whole RLE, got one that ends after 0 bytes"),
        ([256], "a list of bytes"),
        ("text", "a list of bytes"),
        ([0, 0, 0, 12, 0b01111_001], "a whole RLE"),
        ([0, 0, 0, 12, 0b01111_001, 0, 0, 0, 0], "values of 8 bits in an RLE, got 16 bits"),
        (brush_code([255] * 12, runs=True, widths=(16,) * 4)[:-3] + [255] * 5, "runs of 12 values"),
    ],
)
def test_bad_brush_codes(code: Any, says: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        decode_brush_rle(code, (1, 3), where="f.json, a.png")
    complains(caught.value, "f.json, a.png", says)


@pytest.mark.parametrize("encode", [encode_brush_rle, encode_coco_rle])
@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(2, 2),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(0, 3, dtype=torch.bool),
        [[True]],
    ],
)
def test_what_is_no_mask(encode: Any, mask: Any) -> None:
    with pytest.raises(ValueError, match="a bool mask \\[H, W\\]") as caught:
        encode(mask)
    complains(caught.value, encode.__name__, "pass labels == k")
