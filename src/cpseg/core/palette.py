"""Masks in colours: which value a colour stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpseg._internal.checks import is_whole, message, short

Colour = tuple[int, int, int]
_FIX = 'write colours as "#rrggbb" or [r, g, b]'
_MOST = 256  # values of an 8-bit mask


@dataclass(frozen=True)
class Palette:
    """The colours of a data set's masks.

    Attributes:
        colours: the colour of every value, or None for a value that has none.
        void: the colours of void pixels.
    """

    colours: tuple[Colour | None, ...]
    void: tuple[Colour, ...] = ()

    def values(self, image: Tensor, *, void: int = 255, where: str = "palette") -> Tensor:
        """The value of every pixel of a mask in colours.

        Args:
            image: uint8 ``[H, W, 3]``, red, green, blue.
            void: the value of pixels with a colour of void.
            where: the mask's file, for messages.

        Returns:
            uint8 ``[H, W]``.

        Raises:
            ValueError: a colour that is not in the palette.

        Example:
            >>> image = torch.tensor([[[255, 0, 0], [0, 0, 0], [9, 9, 9]]], dtype=torch.uint8)
            >>> Palette(((0, 0, 0), (255, 0, 0)), void=((9, 9, 9),)).values(image)
            tensor([[  1,   0, 255]], dtype=torch.uint8)
        """
        numbered = [(_code(each), value) for value, each in enumerate(self.colours) if each]
        numbered += [(_code(each), void) for each in self.void]
        known, numbers = (torch.tensor(part) for part in zip(*sorted(numbered), strict=True))
        wide = image.to(torch.int64)
        codes = (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]
        places = torch.searchsorted(known, codes).clamp_(max=len(known) - 1)
        strange = known[places] != codes
        if bool(strange.any()):
            row, column = strange.nonzero()[0].tolist()
            seen = f"#{int(codes[row, column]):06x} at row {row}, column {column}"
            got = f"{seen}, and {int(strange.sum()) - 1} more pixels of other colours"
            fix = "add the colour to --palette; JPEG blends colours, so save masks as PNG"
            raise ValueError(message(where, "colours of --palette", got, fix))
        return numbers[places].to(torch.uint8)

    def to_json(self) -> dict[str, Any]:
        """What :func:`parse_palette` reads."""
        found: dict[str, Any] = {
            str(value): _text(each) for value, each in enumerate(self.colours) if each
        }
        if self.void:
            found["void"] = [_text(each) for each in self.void]
        return found


def _code(colour: Colour) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def _text(colour: Colour) -> str:
    return f"#{_code(colour):06x}"


@cache  # every mask that is written needs all of them
def voc_colour(index: int) -> Colour:
    """The colour of a value in 0..255 in masks of PASCAL VOC.

    Example:
        >>> voc_colour(1), voc_colour(255)
        ((128, 0, 0), (224, 224, 192))
    """
    red, green, blue = (
        sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
        for channel in range(3)
    )
    return red, green, blue


def voc_palette() -> Palette:
    """The colours of PASCAL VOC, for values up to 254; that of 255 is void."""
    return Palette(tuple(map(voc_colour, range(255))), (voc_colour(255),))


def read_palette(path: str | Path) -> Palette:
    """The palette in a JSON file, or that of VOC for the word ``voc``.

    Raises:
        ValueError: not JSON, or not a palette.
        FileNotFoundError: there is no such file.
    """
    if str(path) == "voc":
        return voc_palette()
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(message(str(path), "a palette in JSON", reason, _FIX)) from error
    return parse_palette(content, where=str(path))


def parse_palette(content: Any, *, where: str = "palette") -> Palette:
    """A :class:`Palette` from parsed JSON.

    Either a list of colours, that of value 0 first; or an object with a colour for every value, by
    its number, or for every class, by its name: names get the values 0, 1, ... in their order. The
    key ``void`` holds the colour, or a list of the colours, of void pixels.

    Raises:
        ValueError: anything else, or a colour twice.

    Example:
        >>> parse_palette({"road": "#804080", "sky": [70, 130, 180], "void": "#000000"}).colours
        ((128, 64, 128), (70, 130, 180))
    """
    void: tuple[Colour, ...] = ()
    if isinstance(content, list):
        colours: list[Colour | None] = [_colour(where, each) for each in content]
    elif isinstance(content, dict):
        entries = {key: value for key, value in content.items() if key != "void"}
        if "void" in content:
            several = isinstance(content["void"], list) and not _is_numbers(content["void"])
            listed = content["void"] if several else [content["void"]]
            void = tuple(_colour(where, each) for each in listed)
        numbered = [key.isdecimal() and key.isascii() for key in entries]
        if any(numbered) and not all(numbered):
            got = "both"
            raise ValueError(message(where, "keys that are numbers or names", got, "use one kind"))
        values = [int(key) if all(numbered) else place for place, key in enumerate(entries)]
        if values and max(values) >= _MOST:
            raise ValueError(message(where, f"values below {_MOST}", f"{max(values)}", _FIX))
        if len(set(values)) < len(values):
            raise ValueError(message(where, "every value once", "one twice", "remove one of them"))
        colours = [None] * (1 + max(values, default=-1))
        for value, each in zip(values, entries.values(), strict=True):
            colours[value] = _colour(where, each)
    else:
        got = type(content).__name__
        raise ValueError(message(where, "a list or an object of colours", got, _FIX))
    if not 1 <= len(colours) <= _MOST:
        raise ValueError(message(where, f"1 to {_MOST} colours", f"{len(colours)}", _FIX))
    _check_once(where, [each for each in (*colours, *void) if each])
    return Palette(tuple(colours), void)


def _check_once(where: str, colours: Iterable[Colour]) -> None:
    seen: set[Colour] = set()
    for colour in colours:
        if colour in seen:
            fix = "a colour stands for one value"
            raise ValueError(message(where, "every colour once", f"{_text(colour)} twice", fix))
        seen.add(colour)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(is_whole(each, 0) for each in value)


def _colour(where: str, value: Any) -> Colour:
    if isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value):
        code = int(value[1:], 16)
        return code >> 16, code >> 8 & 255, code & 255
    if _is_numbers(value) and max(value) < 256:
        return value[0], value[1], value[2]
    raise ValueError(message(where, "a colour", short(value), _FIX))
