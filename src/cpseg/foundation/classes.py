"""The classes that a model is asked for, and the map from its classes to those of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpseg._internal.checks import message
from cpseg.core.class_map import ClassMap, parse_class_map, read_class_map_json
from cpseg.foundation.hub import WHERE


@dataclass(frozen=True)
class Classes:
    """The classes of a data set and the texts with which a model is asked for them.

    Attributes:
        names: one per class.
        prompts: one or several texts per class.
    """

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]


def parse_classes(lines: Sequence[str], *, where: str = "classes") -> Classes:
    """Classes from lines ``name`` or ``name: prompt, another prompt``; the first is class 0.

    Args:
        lines: one per class. Without prompts, the name is the prompt.
        where: the first words of messages.

    Raises:
        ValueError: there is no line, a line or prompt is blank, or a name occurs twice.

    Example:
        >>> parse_classes(["background: sky, road", "car"]).prompts
        (('sky', 'road'), ('car',))
    """
    names: list[str] = []
    prompts: list[tuple[str, ...]] = []
    for number, line in enumerate(lines, start=1):
        name, colon, rest = (part.strip() for part in line.partition(":"))
        texts = tuple(text.strip() for text in rest.split(",")) if colon else (name,)
        if not name or not all(texts):
            place, fix = (
                f"{where}, line {number}",
                "write one class per line, without blank lines or prompts",
            )
            raise ValueError(message(place, "'name' or 'name: prompt, prompt'", repr(line), fix))
        if name in names:
            place, got = f"{where}, line {number}", f"{name!r} as on line {names.index(name) + 1}"
            fix = "write all prompts of a class on one line, after a colon"
            raise ValueError(message(place, "every class once", got, fix))
        names.append(name)
        prompts.append(texts)
    if not names:
        raise ValueError(message(where, "one class per line", "none", "list the classes"))
    return Classes(tuple(names), tuple(prompts))


def read_classes(path: str | Path) -> Classes:
    """Read the classes of a file with lines as in :func:`parse_classes`.

    Args:
        path: the file, in UTF-8.

    Raises:
        ValueError: the file is not UTF-8, or a line is invalid.
        FileNotFoundError: there is no such file.

    Example:
        >>> read_classes("classes.txt").names                               # doctest: +SKIP
        ('background', 'car')
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        fix = "save the file in UTF-8"
        raise ValueError(message(str(path), "class names", "other bytes", fix)) from error
    return parse_classes(lines, where=str(path))


def as_classes(classes: Classes | Sequence[str] | str | Path | None) -> Classes | None:
    """Convert any form of classes that :func:`cpseg.foundation.load` accepts."""
    if classes is None or isinstance(classes, Classes):
        return classes
    if isinstance(classes, (str, Path)):
        return read_classes(classes)
    return parse_classes(classes)


def mapped(
    given: ClassMap | Mapping[str, Any] | str | Path | None,
    sources: tuple[str, ...],
    names: tuple[str, ...] | None,
) -> tuple[ClassMap | None, tuple[str, ...]]:
    """The class map from the model's classes ``sources``, and the names of the classes it returns.

    If the JSON of a map lists no ``model_classes`` or ``classes``, it means ``sources`` and
    ``names``.

    Raises:
        ValueError: the map is invalid, or leaves a class out.
    """
    if given is None:
        if names is not None and names != sources:
            got = f"{len(names)} others" if len(names) != len(sources) else "others"
            expected = f"the {len(sources)} classes of the model ({', '.join(sources[:3])}, ...)"
            raise ValueError(
                message(WHERE, expected, got, "pass a class map from the model's classes")
            )
        return None, sources
    where = "class map" if isinstance(given, (ClassMap, Mapping)) else str(given)
    if isinstance(given, ClassMap):
        class_map = given
    else:
        content = given if isinstance(given, Mapping) else read_class_map_json(given)
        content = dict(content) if "map" in content else {"map": dict(content)}
        for key, listed in (("model_classes", sources), ("classes", names)):
            if listed is None or len(set(listed)) < len(listed):  # then only indices are clear
                continue
            if content.setdefault(key, list(listed)) != list(listed):
                expected = f"'{key}' {', '.join(listed[:3])}, ... in their order"
                fix = f"leave '{key}' out, or list the classes of the model and of --classes"
                raise ValueError(message(where, expected, "others", fix))
        class_map = parse_class_map(content, where=where)
        names = names or tuple(content.get("classes", ())) or None
    if len(class_map.target) != len(sources):
        expected = f"an entry for each of the model's {len(sources)} classes"
        got = str(len(class_map.target))
        raise ValueError(message(where, expected, got, "map each to a class or to null"))
    names = names or tuple(str(index) for index in range(class_map.num_classes))
    if len(names) != class_map.num_classes:
        expected, got = f"{len(names)} classes to map to", str(class_map.num_classes)
        raise ValueError(message(where, expected, got, "map a model class to each"))
    return class_map, names
