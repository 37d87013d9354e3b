"""Masks as a data set has them: in colours, with classes from 1, with other values than classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpseg._internal.checks import message
from cpseg.core.class_map import ClassMap, parse_class_map
from cpseg.core.palette import Palette, parse_palette
from cpseg.files.masks import VOID, check_mask_size, read_values


@dataclass(frozen=True)
class MaskFormat:
    """How the masks of a data set are stored.

    Attributes:
        void: the value of void pixels.
        map: from the values in masks to the data set's classes, or None where they are the same.
        palette: the colours of the values, or None for masks that hold values.
        first_class: the value of class 0; smaller values are void.
    """

    void: int = VOID
    map: ClassMap | None = None
    palette: Palette | None = None
    first_class: int = 0

    def __post_init__(self) -> None:
        if self.map is not None and self.first_class:
            expected, got = "one of mask map and first class", "both"
            fix = "leave --first-class out, and map value 1 to class 0 in --mask-map"
            raise ValueError(message("masks", expected, got, fix))

    @property
    def is_plain(self) -> bool:
        """Whether masks hold classes as they are, and 255 for void."""
        return self == MaskFormat()

    def to_json(self) -> dict[str, Any]:
        """What the provenance of a calibration records of it."""
        found: dict[str, Any] = {"void": self.void, "map": self.map and self.map.to_json()}
        if self.palette is not None:
            found["palette"] = self.palette.to_json()
        if self.first_class:
            found["first_class"] = self.first_class
        return found

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> MaskFormat:
        """Read what :meth:`to_json` gave."""
        stored, palette = facts["map"], facts.get("palette")
        return cls(
            facts["void"],
            None if stored is None else parse_class_map(stored),
            None if palette is None else parse_palette(palette),
            facts.get("first_class", 0),
        )

    def read(self, path: Path, num_classes: int, size: tuple[int, int]) -> Tensor:
        """The labels of an image.

        Args:
            path: its mask.
            num_classes: number of classes of the data set.
            size: height and width of its scores.

        Returns:
            uint8 ``[H, W]``, 255 for void.

        Raises:
            ValueError: not a mask, one of another size, or a value that is no class.
            FileNotFoundError: there is no such file.
        """
        values = read_values(path, self.palette, self.void)
        check_mask_size(path, values, size, num_classes)
        classes = self._classes(num_classes)
        counts = torch.bincount(values.flatten(), minlength=256)
        strange: list[int] = ((counts > 0) & (classes < 0)).nonzero().flatten().tolist()
        if strange:
            raise self._stray(path, strange, num_classes)
        return classes.to(torch.uint8)[values.to(torch.int64)]

    def _classes(self, num_classes: int) -> Tensor:
        """The class of every value, int64 ``[256]``; 255 for void and -1 for none."""
        count = num_classes if self.map is None else len(self.map.target)
        if count > 256:
            fix = "map the values of 8-bit masks"
            raise ValueError(message("mask map", "at most 256 values", str(count), fix))
        classes = torch.full((256,), -1, dtype=torch.int64)
        if self.map is None:
            last = min(self.first_class + count, 256)
            classes[self.first_class : last] = torch.arange(last - self.first_class)
            classes[: self.first_class] = VOID
            classes[self.void] = VOID
            return classes
        if self.map.num_classes != num_classes:
            expected, got = f"{num_classes} classes as in the scores", str(self.map.num_classes)
            raise ValueError(message("mask map", expected, got, "map to the same classes"))
        classes[self.void] = VOID
        targets = [VOID if target is None else target for target in self.map.target]
        classes[:count] = torch.tensor(targets)
        return classes

    def _stray(self, path: Path, strange: list[int], num_classes: int) -> ValueError:
        """Which value is no class, and the option that would make it one."""
        value, void = strange[0], f"or {self.void} (void)"
        if self.map is not None:
            expected = f"values 0..{len(self.map.target) - 1} {void}"
            fix = f"{value} is not in --mask-map: add it there, mapped to null where it is void"
            return ValueError(message(str(path), expected, str(value), fix))
        first, fix = self.first_class, f"pass --void {value} if it is void, or --mask-map"
        if strange == [num_classes] and not first:
            fix = f"pass --first-class 1 if masks count from 1, --void {value} if it is void"
        expected = f"labels in {first}..{first + num_classes - 1} {void}"
        return ValueError(message(str(path), expected, str(value), fix))
