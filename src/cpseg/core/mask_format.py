"""How a data set stores its masks: in colours, with classes from 1, with other values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpseg._internal.checks import message
from cpseg.core.class_map import ClassMap, parse_class_map
from cpseg.core.palette import Palette, parse_palette

VOID = 255  # in files that training code reads


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
    def from_json(cls, facts: Mapping[str, Any], *, where: str = "masks") -> MaskFormat:
        """Read what :meth:`to_json` gave.

        Raises:
            ValueError: a map or a palette that is none, after ``where``.
        """
        stored, palette = facts["map"], facts.get("palette")
        return cls(
            facts["void"],
            None if stored is None else parse_class_map(stored, where=where),
            None if palette is None else parse_palette(palette, where=where),
            facts.get("first_class", 0),
        )

    def classes_of_values(self, num_classes: int) -> Tensor:
        """The class of every value, int64 ``[256]``; 255 for void and -1 for none.

        Raises:
            ValueError: a map onto another number of classes.
        """
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
            last = self.map.num_classes - 1
            expected = f"classes up to {num_classes - 1}, as in the scores"
            fix = "map a value to every class of the scores, or map these with --class-map"
            raise ValueError(message("mask map", expected, f"{last} as the largest", fix))
        classes[self.void] = VOID
        targets = [VOID if target is None else target for target in self.map.target]
        classes[:count] = torch.tensor(targets)
        return classes
