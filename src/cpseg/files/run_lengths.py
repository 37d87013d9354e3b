"""Run-length codes of binary masks: those of COCO, and those of Label Studio's brush."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpseg._internal.checks import message, short
from cpseg.files.masks import MOST_PIXELS

Bits = NDArray[np.bool_]
_FIX = "export the file anew"
_OPAQUE = 128  # the least alpha of a painted pixel: the brush's edges are blended
_HEADER = 32 + 5 + 4 * 4  # bits: number of values, bits per value, four widths of lengths
_WIDTHS = (3, 4, 8, 16)  # bits of a run's length that the encoder chooses from


def encode_coco_rle(mask: Tensor, *, compressed: bool = True) -> dict[str, Any]:
    """A binary mask as COCO's run-length code, down the columns.

    Args:
        mask: bool ``[H, W]``.
        compressed: counts as COCO's ASCII text; else as a list of integers.

    Returns:
        ``{"size": [H, W], "counts": ...}``.

    Raises:
        ValueError: not such a mask.

    Example:
        >>> encode_coco_rle(torch.tensor([[False, True], [True, True]]), compressed=False)
        {'size': [2, 2], 'counts': [1, 3]}
    """
    values = _bits("encode_coco_rle", mask)
    lengths, first = _runs(values.ravel(order="F"))
    counts = [0, *lengths] if first else lengths
    size = list(values.shape)
    return {"size": size, "counts": _to_text(counts) if compressed else counts}


def decode_coco_rle(rle: Mapping[str, Any], *, where: str = "decode_coco_rle") -> Tensor:
    """The mask of COCO's run-length code, compressed or not.

    Args:
        rle: ``size`` and ``counts``.
        where: what the code belongs to, for messages.

    Returns:
        bool ``[H, W]``.

    Raises:
        ValueError: not such a code, or counts that do not sum to the size.

    Example:
        >>> decode_coco_rle({"size": [2, 2], "counts": "13"}).tolist()
        [[False, True], [True, True]]
    """
    height, width = _size_of(where, rle)
    counts = rle.get("counts")
    if isinstance(counts, bytes):
        counts = counts.decode("latin-1")
    if isinstance(counts, str):
        counts = _from_text(where, counts)
    if not isinstance(counts, list) or not all(type(each) is int for each in counts):
        raise ValueError(message(where, "counts of an RLE", short(counts), _FIX))
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        expected = f"counts of {height * width} pixels for size {height}x{width}"
        got = "a negative one" if min(counts, default=0) < 0 else str(sum(counts))
        raise ValueError(message(where, expected, got, _FIX))
    painted = np.arange(len(counts)) % 2 == 1
    return torch.from_numpy(np.repeat(painted, counts).reshape(width, height).T.copy())


def encode_brush_rle(mask: Tensor) -> list[int]:
    """A binary mask as the run-length code of Label Studio's brush.

    The code packs runs of bytes into a stream of bits. The bytes are red, green, blue and opacity
    of every pixel along the rows; here all four are 255 where the mask is painted.

    Args:
        mask: bool ``[H, W]``.

    Returns:
        The bytes of the stream, as numbers.

    Raises:
        ValueError: not such a mask, or more than 2^30 - 1 pixels.

    Example:
        >>> encode_brush_rle(torch.tensor([[True, False]]))
        [0, 0, 0, 8, 57, 27, 252, 127, 241, 128, 0]
    """
    values = _bits("encode_brush_rle", mask)
    if values.size >= 2**30:
        expected, fix = "fewer than 2^30 pixels", "cut the image into tiles"
        raise ValueError(message("encode_brush_rle", expected, str(values.size), fix))
    lengths, first = _runs(values.ravel())
    run = np.array(lengths, np.int64) * 4
    value = np.where(np.arange(len(run)) % 2 == 0, first, not first) * 255
    longest = 2 ** _WIDTHS[-1]
    pieces = (run + longest - 1) // longest  # a run may be longer than its field can say
    length = np.full(int(pieces.sum()), longest, np.int64)
    length[np.cumsum(pieces) - 1] = run - (pieces - 1) * longest
    value = np.repeat(value, pieces)
    choice = np.searchsorted([2**width for width in _WIDTHS], length)
    width = np.array(_WIDTHS)[choice]
    # One run: a 1, two bits for the width of the length, the length - 1, eight bits of value.
    code = (((4 | choice) << width | (length - 1)) << 8) | value
    size = 3 + width + 8
    start = _HEADER + np.cumsum(size) - size
    bits = np.zeros(_HEADER + int(size.sum()), np.uint8)
    head = values.size * 4
    for part, count in ((7, 5), *((each - 1, 4) for each in _WIDTHS)):
        head = head << count | part
    bits[:_HEADER] = [head >> (_HEADER - 1 - place) & 1 for place in range(_HEADER)]
    for place in range(int(size.max())):  # the bits at this place of all runs that have it
        own = size > place
        bits[start[own] + place] = code[own] >> (size[own] - 1 - place) & 1
    packed: list[int] = np.packbits(bits).tolist()
    return packed


def decode_brush_rle(
    code: Sequence[int], size: tuple[int, int], *, where: str = "decode_brush_rle"
) -> Tensor:
    """The mask of the run-length code of Label Studio's brush.

    Args:
        code: the bytes of the stream, as numbers.
        size: height and width of the image.
        where: what the code belongs to, for messages.

    Returns:
        bool ``[H, W]``, True where the opacity is 128 or more.

    Raises:
        ValueError: not such a code, one of another size, or one that ends too soon.

    Example:
        >>> decode_brush_rle(encode_brush_rle(torch.tensor([[True, False]])), (1, 2)).tolist()
        [[True, False]]
    """
    try:
        stream = bytes(code)
    except (TypeError, ValueError) as error:
        raise ValueError(message(where, "a list of bytes", short(code), _FIX)) from error
    bits = 8 * len(stream)
    head = int.from_bytes(stream[:7].ljust(7, b"\0"), "big") >> (56 - _HEADER)
    total, word = head >> 21, 1 + (head >> 16 & 31)
    if bits < _HEADER:
        raise _cut_off(where, stream)
    if word != 8:
        raise ValueError(message(where, "values of 8 bits in an RLE", f"{word} bits", _FIX))
    if total != 4 * size[0] * size[1]:
        expected = f"an RLE of {size[0]}x{size[1]} pixels with 4 values each"
        raise ValueError(message(where, expected, f"{total} values", _FIX))
    widths = [1 + (head >> shift & 15) for shift in (12, 8, 4, 0)]
    padded = stream + bytes(8)
    lengths, values, done, place = [], bytearray(), 0, _HEADER
    while done < total:
        # Of 64 bits at most 7 lie before the run, and its code has at most 3 + 16 + 8.
        window = int.from_bytes(padded[place // 8 : place // 8 + 8], "big")
        left = 61 - place % 8  # bits of the window after the first three of the run
        first = window >> left & 7
        left -= widths[first & 3]
        length = 1 + (window >> left & ((1 << widths[first & 3]) - 1))
        place += 3 + widths[first & 3]
        done += length
        end = place + (8 if first & 4 else 8 * length)
        if end > bits:
            raise _cut_off(where, stream)
        if first & 4:
            lengths.append(length)
            values.append(window >> (left - 8) & 255)
        else:  # not a run: every value by itself
            lengths += [1] * length
            values += _bytes_at(stream, place, length)
        place = end
    if done != total:
        raise ValueError(message(where, f"runs of {total} values", f"{done}", _FIX))
    rgba = np.repeat(np.frombuffer(values, np.uint8), lengths).reshape(*size, 4)
    return torch.from_numpy(rgba[..., 3] >= _OPAQUE)


def _cut_off(where: str, stream: bytes) -> ValueError:
    got = f"one that ends after {len(stream)} bytes"
    return ValueError(message(where, "a whole RLE", got, _FIX))


def _bytes_at(stream: bytes, place: int, count: int) -> bytes:
    """So many groups of eight bits from a bit on."""
    end = place + 8 * count
    last = (end + 7) // 8
    window = int.from_bytes(stream[place // 8 : last], "big") >> (8 * last - end)
    return (window & ((1 << 8 * count) - 1)).to_bytes(count, "big")


def _bits(where: str, mask: Tensor) -> Bits:
    fits = isinstance(mask, Tensor) and mask.ndim == 2 and mask.dtype == torch.bool
    if not fits or 0 in mask.shape:
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else short(mask)
        raise ValueError(message(where, "a bool mask [H, W]", got, "pass labels == k"))
    values: Bits = mask.cpu().numpy()
    return values


def _runs(values: Bits) -> tuple[list[int], bool]:
    """Lengths of the runs of equal values, and the first value."""
    ends = np.append(np.flatnonzero(values[1:] != values[:-1]) + 1, len(values))
    return np.diff(ends, prepend=0).tolist(), bool(values[0])


def _size_of(where: str, rle: Mapping[str, Any]) -> tuple[int, int]:
    size = rle.get("size")
    sides = isinstance(size, (list, tuple)) and len(size) == 2
    if not sides or not all(type(side) is int and side > 0 for side in size):  # type: ignore[union-attr]
        raise ValueError(message(where, "an RLE with its size [H, W]", short(size), _FIX))
    height, width = size  # type: ignore[misc]
    if height * width > MOST_PIXELS:
        expected = f"an RLE of at most {MOST_PIXELS} pixels"
        raise ValueError(message(where, expected, f"{height}x{width}", _FIX))
    return height, width


def _to_text(counts: Sequence[int]) -> str:
    """Counts in COCO's text: from the third on the change since the last but one, in 5 bits each.

    The lowest bits come first, a sixth bit says that more follow, and 48 is added.
    """
    text = bytearray()
    for place, count in enumerate(counts):
        rest = count - (counts[place - 2] if place > 2 else 0)
        while True:
            low, rest = rest & 31, rest >> 5
            ends = rest == (-1 if low & 16 else 0)
            text.append(48 + (low if ends else low | 32))
            if ends:
                break
    return text.decode("ascii")


def _from_text(where: str, text: str) -> list[int]:
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise ValueError(message(where, "counts of a compressed RLE", short(text), _FIX))
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        value -= 1 << shift if code & 16 else 0
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError(message(where, "counts of a compressed RLE", "a cut-off one", _FIX))
    return counts
