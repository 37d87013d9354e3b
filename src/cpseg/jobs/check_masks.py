"""Masks as they lie on disk, and what their values seem to mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpseg.core.class_map import ClassMap
from cpseg.core.mask_format import MaskFormat
from cpseg.files.dataset import Source
from cpseg.files.masks import open_image, palette, read_values
from cpseg.jobs.check_findings import Finding, counted, error, listed, ok, percent, warning

VOID, UNKNOWN = -1, -2  # in place of classes
Lookup = npt.NDArray[np.int64]  # [256]: what a value of masks means
Agreement = Callable[[Lookup], float]
_MOST_COLOURS = 256


class RawMask(NamedTuple):
    """A mask as it is stored.

    Attributes:
        values: uint8 ``[H, W]``; None where there is no such value for every pixel.
        mode: Pillow's name of the format.
        size: height and width.
        colours: of an RGB mask, at most 257, each as one number.
    """

    values: npt.NDArray[np.uint8] | None
    mode: str
    size: tuple[int, int]
    colours: frozenset[int] = frozenset()


def read_raw_mask(path: Path, stored: MaskFormat) -> RawMask:
    """A mask of any format; without a palette, colours of PASCAL VOC become their class index.

    Raises:
        ValueError: no image, a damaged one, or a colour that is not in the palette.
        FileNotFoundError: there is no such file.
    """
    if stored.palette is not None:
        coloured = read_values(path, stored.palette, stored.void).numpy()
        return RawMask(coloured, "L", (coloured.shape[0], coloured.shape[1]))
    with open_image(path, "a mask image") as image:
        mode, size = image.mode, (image.height, image.width)
        if mode == "L" and ";" in str(image.tile[0][3]):  # Pillow scales these up
            return RawMask(None, "L with fewer than 8 bits", size)
        if mode in ("L", "P"):
            return RawMask(np.array(image), mode, size)
        if mode not in ("RGB", "RGBA"):
            return RawMask(None, mode, size)
        pixels = np.array(image.convert("RGB")).astype(np.int64)
    grey = bool((pixels == pixels[..., :1]).all())
    if grey:
        return RawMask(pixels[..., 0].astype(np.uint8), f"{mode}, grey", size)
    codes = (pixels * (65536, 256, 1)).sum(-1)
    colours, index = np.unique(codes, return_inverse=True)
    known = {code: value for value, code in reversed(list(enumerate(_voc_codes())))}
    known[0xE0E0C0] = 255  # what VOC draws borders with
    values = None
    if all(int(code) in known for code in colours):
        table = np.array([known[int(code)] for code in colours], dtype=np.uint8)
        values = table[index.reshape(codes.shape)]
    few = frozenset(int(code) for code in colours[: _MOST_COLOURS + 1])
    return RawMask(values, mode, size, few)


def _voc_codes() -> list[int]:
    flat = np.array(palette(), dtype=np.int64).reshape(256, 3)
    return [int(code) for code in (flat * (65536, 256, 1)).sum(1)]


@dataclass
class MaskFacts:
    """What the masks have in common, collected one by one."""

    source: Source
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    modes: dict[str, str] = field(default_factory=dict)  # a mode: a mask
    colours: set[int] = field(default_factory=set)
    voc: bool = True  # whether all colours are of the VOC palette
    other_size: list[str] = field(default_factory=list)  # masks and images that differ in size
    same_as_scores: int = 0  # of those, masks of the size of the scores
    read: int = 0

    def add(self, name: str, mask: RawMask) -> None:
        """Look at a mask."""
        self.read += 1
        self.modes.setdefault(mask.mode, name)
        self.colours |= mask.colours
        if mask.values is None:
            self.voc = False
        else:
            self.counts += np.bincount(mask.values.ravel(), minlength=256)

    def lookup(self, num_classes: int) -> Lookup:
        """What values mean by the source's mask map, first class and void."""
        lookup = np.full(256, UNKNOWN, np.int64)
        mask_map, first = self.source.mask_map, self.source.first_class
        if mask_map is None:
            count = min(num_classes, 256 - first)
            lookup[first : first + count] = np.arange(count)
            lookup[:first] = VOID
        else:
            for value, target in enumerate(mask_map.target[:256]):
                lookup[value] = VOID if target is None else target
        if 0 <= self.source.void < 256:
            lookup[self.source.void] = VOID
        return lookup

    def format_findings(self) -> list[Finding]:
        """What to say of the files, whatever their values mean."""
        found: list[Finding] = []
        for mode, name in self.modes.items():
            if mode in ("L", "P"):
                continue
            if mode.endswith("grey"):
                text = f"masks are grey images of mode {mode[:-6]} ({name}); store 8 bits (L)"
                found.append(error("mode", text))
            elif mode not in ("RGB", "RGBA"):
                text = f"masks of mode {mode} ({name}); store class indices in 8 bits (L or P)"
                found.append(error("mode", text))
        if self.colours:
            found.append(self._about_colours())
        if self.other_size:
            text = f"{counted(len(self.other_size), 'mask')} of {self.read} read differ in size "
            text += f"from their image: {self.other_size[0]}; "
            if self.same_as_scores == len(self.other_size):
                text += "labels will have the size of masks and scores, not of the images"
                found.append(warning("size", text))
            else:
                text += "write both at one size"
                found.append(error("size", text))
        return found

    def _about_colours(self) -> Finding:
        number = len(self.colours)
        if number > _MOST_COLOURS:
            text = "masks have over 256 colours: are these photographs, or masks stored as JPEG?"
            return error("colours", text)
        names = [f"#{code:06x}" for code in sorted(self.colours)]
        fix = "--palette voc" if self.voc else "--palette with the colour of every class"
        text = f"masks are colours ({number}: {listed(names, 3)}), not class indices; pass {fix}"
        return error("colours", text)


def judge_values(
    facts: MaskFacts, void_only: Sequence[str], num_classes: int, agreement: Agreement
) -> tuple[Lookup, list[Finding]]:
    """What the values of masks mean, and what to say of them.

    Args:
        facts: the masks.
        void_only: masks that the options call void altogether.
        num_classes: number of classes of the scores.
        agreement: how well masks agree with the argmax if values mean what a lookup says.

    Returns:
        The meaning that the options give to values, or the one that seems right where they leave
        some without a meaning; and findings.
    """
    lookup = facts.lookup(num_classes)
    wrong = _map_of_other_classes(facts.source.mask_map, num_classes)
    if wrong:
        return lookup, [wrong]
    present = [int(value) for value in np.flatnonzero(facts.counts)]
    if not present:
        return lookup, []
    strange = [value for value in present if lookup[value] == UNKNOWN]
    if strange:
        return _judge_strange(facts, lookup, present, strange, num_classes, agreement)
    known = [value for value in present if lookup[value] >= 0]
    if not known:
        values = listed(present)
        text = f"the {counted(facts.read, 'mask')} read are void alone (value {values}); "
        text += "pass --void for another value, or --mask-map"
        return lookup, [error("void-only", text)]
    share = float(facts.counts[lookup == VOID].sum() / facts.counts.sum())
    span = f"{known[0]}..{known[-1]}" if len(known) > 1 else f"{known[0]}"
    text = f"masks: values {span}, void {percent(share)} of pixels"
    found = [ok("masks", text)]
    if void_only:
        text = f"{len(void_only)} of {facts.read} masks read are void alone: {listed(void_only, 2)}"
        found.append(warning("void-only", text))
    if len(known) == 1:
        text = f"masks read have one value besides void ({known[0]}): "
        text += "is void a class? pass --void or --mask-map"
        found.append(warning("one-class", text))
    return lookup, found


def _map_of_other_classes(mask_map: ClassMap | None, num_classes: int) -> Finding | None:
    if mask_map is None or mask_map.num_classes == num_classes:
        return None
    text = f"--mask-map leads to {mask_map.num_classes} classes, the scores have {num_classes}; "
    return error("classes", text + "map to the same, or pass --class-map for the scores")


def _judge_strange(
    facts: MaskFacts,
    lookup: Lookup,
    present: Sequence[int],
    strange: Sequence[int],
    num_classes: int,
    agreement: Agreement,
) -> tuple[Lookup, list[Finding]]:
    """Values that are neither a class nor void."""
    shares = facts.counts / facts.counts.sum()
    said = listed([f"{value} ({percent(float(shares[value]))} of pixels)" for value in strange])
    void = facts.source.void
    first = facts.source.first_class
    classes = f"a class {first}..{first + num_classes - 1}"
    classes = "in --mask-map" if facts.source.mask_map else classes
    head = f"masks: value {said} is neither {classes} nor void ({void}); "
    if len(strange) == 1:
        as_void = lookup.copy()
        as_void[strange[0]] = VOID
        from_one = _from_one(lookup, num_classes, void)
        if strange[0] == num_classes and facts.source.mask_map is None and not first:
            fits = agreement(from_one) >= agreement(as_void) if shares[0] else True
            if fits:
                zero = "0 becomes void" if shares[0] else "there is no 0"
                text = f"masks: values up to {num_classes} for classes 0..{num_classes - 1}: "
                text += f"ids start at 1 ({zero}); pass --first-class 1"
                return from_one, [error("first-class", text)]
        if facts.counts[void]:  # two void values
            fix = f"if it is void too, pass --mask-map with {strange[0]}: null"
        else:
            fix = f"if it is void, pass --void {strange[0]}"
        return as_void, [error("void", f"{head}{fix}")]
    without = np.where(lookup == UNKNOWN, VOID, lookup)
    head = head.replace(" is neither ", " are neither ").replace("value ", "values ", 1)
    if len(present) > num_classes + 2:
        text = f"{head}masks of another data set? ({len(present)} values, "
        text += f"{num_classes} classes of scores) pass --mask-map or --class-map"
        return without, [error("data-set", text)]
    return without, [error("values", f"{head}masks of another data set? pass --mask-map")]


def _from_one(lookup: Lookup, num_classes: int, void: int) -> Lookup:
    """Value v is class v - 1, and 0 is void."""
    shifted = np.full_like(lookup, UNKNOWN)
    shifted[1 : num_classes + 1] = np.arange(num_classes)[:255]
    shifted[[0, *([void] if 0 <= void < 256 else [])]] = VOID
    return shifted


def apply(lookup: Lookup, values: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """Classes ``[H, W]`` of a mask; void and what has no meaning are negative."""
    return lookup[values]
