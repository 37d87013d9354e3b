"""From a foundation model's classes to those of a data set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpseg._internal.checks import check_probs, is_whole, message, shape

_MOST_CLASSES = 2**15
_ROUNDING = 0.02  # tolerance for sums above 1 caused by half-precision and uint8 files
_STEP = 0.5 / 255  # tolerance for uint8 files, per summed probability


@dataclass(frozen=True)
class ClassMap:
    """Which class of the data set each class of the model belongs to.

    Attributes:
        target: for every model class the data set's class, or None to drop its scores.
        reduce: ``"sum"`` for scores that share one distribution (softmax), ``"max"`` for
            independent ones (sigmoid).
    """

    target: tuple[int | None, ...]
    reduce: str = "sum"

    @property
    def num_classes(self) -> int:
        """Classes of the data set."""
        return 1 + max(index for index in self.target if index is not None)

    def __call__(self, probs: Tensor) -> Tensor:
        """Probabilities of the data set's classes.

        Args:
            probs: scores of the model's classes, float ``[B, M, H, W]`` or ``[M, H, W]``.

        Returns:
            float32 ``[B, K, H, W]`` or ``[K, H, W]``. A sum that rounding took above 1 (by at most
            0.02, or 0.5 / 255 for each of more than ten scores) is 1.

        Raises:
            ValueError: another number of model classes, or sums above 1.

        Example:
            >>> probs = torch.tensor([0.2, 0.5, 0.3]).reshape(3, 1, 1)
            >>> ClassMap((0, 1, 0))(probs).flatten()
            tensor([0.5000, 0.5000])
        """
        check_probs("class map", probs)
        self.check_source(probs.shape[-3], shape(probs))
        values = probs.to(torch.float32)
        members = self._members()
        parts = [values[..., own, :, :] for own in members]
        if self.reduce == "max":
            return torch.stack([part.amax(-3) for part in parts], dim=-3)
        merged = torch.stack([part.sum(-3) for part in parts], dim=-3)
        most = 1 + max(_ROUNDING, _STEP * max(map(len, members)))
        if float(merged.amax()) > most:
            got, fix = f"{float(merged.amax()):.4g}", "set 'reduce' to 'max' for sigmoid scores"
            raise ValueError(message("class map", "sums of scores up to 1", got, fix))
        return merged.clamp_(max=1)

    def check_source(self, num_source: int, got: str) -> None:
        """Refuse another number of model classes; ``got`` says where they come from."""
        if num_source != len(self.target):
            expected = f"scores of {len(self.target)} model classes"
            raise ValueError(message("class map", expected, got, "list every class of the model"))

    @property
    def adds(self) -> bool:
        """Whether scores of several model classes are added."""
        return self.reduce == "sum" and max(map(len, self._members())) > 1

    def _members(self) -> list[list[int]]:
        """The model classes of every class of the data set."""
        members: list[list[int]] = [[] for _ in range(self.num_classes)]
        for source, target in enumerate(self.target):
            if target is not None:
                members[target].append(source)
        return members

    def to_json(self) -> dict[str, Any]:
        """What :func:`parse_class_map` reads."""
        return {"map": {str(m): t for m, t in enumerate(self.target)}, "reduce": self.reduce}


def read_class_map(path: str | Path) -> ClassMap:
    """Read a class map from a JSON file; see :func:`parse_class_map`.

    Raises:
        ValueError: not JSON, or not a class map.
        FileNotFoundError: there is no such file.
    """
    return parse_class_map(read_class_map_json(path), where=str(path))


def read_class_map_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in the file of a class map, before it is parsed."""
    fix = "see the command's page in the docs"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(message(str(path), "a class map in JSON", str(error), fix)) from error
    if not isinstance(content, dict):
        raise ValueError(message(str(path), "a JSON object", type(content).__name__, fix))
    return content


def parse_class_map(content: Any, *, where: str = "class map") -> ClassMap:
    """A :class:`ClassMap` from parsed JSON.

    Either the map alone, model class to data set class, by index; or an object with ``map``,
    ``reduce`` (``"sum"`` or ``"max"``) and the names of ``model_classes`` and ``classes``, which
    the map may then use. A model class mapped to null is dropped; none may be left out, and every
    class of the data set needs one.

    Raises:
        ValueError: anything else.

    Example:
        >>> parse_class_map({"map": {"car": "vehicle", "bus": "vehicle", "sky": "other"},
        ...                  "model_classes": ["sky", "car", "bus"],
        ...                  "classes": ["other", "vehicle"]}).target
        (0, 1, 1)
    """
    fix = "see the command's page in the docs"
    if not isinstance(content, dict):
        raise ValueError(message(where, "a JSON object", type(content).__name__, fix))
    entries = content.get("map", content)
    options = content if "map" in content else {}
    unknown = set(options) - {"map", "reduce", "classes", "model_classes"}
    if not isinstance(entries, dict) or not entries or unknown:
        got = ", ".join(sorted(unknown)) or repr(entries)
        raise ValueError(message(where, "'map', 'reduce', 'classes', 'model_classes'", got, fix))
    reduce = options.get("reduce", "sum")
    if reduce not in ("sum", "max"):
        raise ValueError(message(where, "'reduce' 'sum' or 'max'", repr(reduce), fix))
    sources = _numbers(where, "model_classes", options)
    targets = _numbers(where, "classes", options)
    found: dict[int, int | None] = {}
    for key, value in entries.items():
        source = _index(where, key, sources, "model_classes")
        if source in found:
            got = f"{key!r} again"
            raise ValueError(message(where, "every model class once", got, "remove one of them"))
        found[source] = None if value is None else _index(where, value, targets, "classes")
    expected_models = len(sources) or max(found) + 1
    missing = sorted(set(range(expected_models)) - set(found))
    if missing:
        got = f"none for {', '.join(map(str, missing))}"
        raise ValueError(message(where, "an entry for every model class", got, "map it or to null"))
    used = {target for target in found.values() if target is not None}
    expected_classes = len(targets) or 1 + max(used, default=0)
    empty = sorted(set(range(expected_classes)) - used)
    if empty:
        got = f"none for {', '.join(map(str, empty))}"
        fix = "map one to it, or leave the class out"
        raise ValueError(message(where, "a model class for every class of the data set", got, fix))
    return ClassMap(tuple(found[source] for source in sorted(found)), reduce)


def _numbers(where: str, key: str, options: Mapping[str, Any]) -> Mapping[str, int]:
    """Names to their places in the list under ``key``; empty where there is no list."""
    names = options.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(message(where, f"'{key}' as a list of names", repr(names), "mend it"))
    numbers = {name: number for number, name in enumerate(names)}
    if len(numbers) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(message(where, f"every name in '{key}' once", repr(twice), "rename one"))
    return numbers


def _index(where: str, name: Any, numbers: Mapping[str, int], listed: str) -> int:
    """A class by name, or by index as a number or its digits."""
    if isinstance(name, str) and name in numbers:
        return numbers[name]
    if is_whole(name, 0) or (isinstance(name, str) and name.isdecimal()):
        index = int(name)
        if 0 <= index < (len(numbers) or _MOST_CLASSES):
            return index
    expected = f"a name in '{listed}' or an index"
    raise ValueError(message(where, expected, repr(name), f"add it to '{listed}'"))
