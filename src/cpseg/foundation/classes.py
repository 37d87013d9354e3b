"""Which classes a model is asked for, and how its own become those of a data set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpseg._internal.checks import message
from cpseg.core.class_map import ClassMap, parse_class_map
from cpseg.foundation.hub import WHERE


@dataclass(frozen=True)
class Classes:
    """The classes of a data set and the texts that ask a model for them.

    Attributes:
        names: one a class.
        prompts: one or several texts a class.
    """

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]


def parse_classes(lines: Sequence[str], *, where: str = "classes") -> Classes:
    """Classes from lines ``name`` or ``name: prompt, another prompt``; the first is class 0.

    Args:
        lines: one a class. Without prompts the name is the prompt.
        where: what messages begin with.

    Raises:
        ValueError: no line, a blank one, a name twice, an empty prompt.

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
            place, fix = f"{where}, line {number}", "one class a line, no blank line or prompt"
            raise ValueError(message(place, "'name' or 'name: prompt, prompt'", repr(line), fix))
        if name in names:
            place, got = f"{where}, line {number}", f"{name!r} as on line {names.index(name) + 1}"
            fix = "write several prompts on its one line, after a colon"
            raise ValueError(message(place, "every class once", got, fix))
        names.append(name)
        prompts.append(texts)
    if not names:
        raise ValueError(message(where, "a class a line", "none", "list the classes"))
    return Classes(tuple(names), tuple(prompts))


def read_classes(path: str | Path) -> Classes:
    """Read the lines of :func:`parse_classes` from a file.

    Args:
        path: in UTF-8.

    Raises:
        ValueError: not such a file.
        FileNotFoundError: there is none.

    Example:
        >>> read_classes("classes.txt").names                               # doctest: +SKIP
        ('background', 'car')
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        fix = "write them in UTF-8"
        raise ValueError(message(str(path), "class names", "other bytes", fix)) from error
    return parse_classes(lines, where=str(path))


def as_classes(classes: Classes | Sequence[str] | str | Path | None) -> Classes | None:
    """Classes in any of the forms that :func:`cpseg.foundation.load` takes."""
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
    """The map from the model's classes, called ``sources``, and the names of what it gives.

    In a map's JSON ``sources`` and ``names`` stand for ``model_classes`` and ``classes``.

    Raises:
        ValueError: no such map, or it leaves a class out.
    """
    if given is None:
        if names is not None and names != sources:
            got = f"{len(names)} others" if len(names) != len(sources) else "others"
            expected = f"the {len(sources)} classes of the model ({', '.join(sources[:3])}, ...)"
            raise ValueError(message(WHERE, expected, got, "pass a class map from those to these"))
        return None, sources
    where = "class map" if isinstance(given, (ClassMap, Mapping)) else str(given)
    if isinstance(given, ClassMap):
        found = given
    else:
        content = given if isinstance(given, Mapping) else _json(Path(given))
        content = dict(content) if "map" in content else {"map": dict(content)}
        for key, own in (("model_classes", sources), ("classes", names)):
            if own is None or len(set(own)) < len(own):  # then it goes by index
                continue
            if content.setdefault(key, list(own)) != list(own):
                expected = f"'{key}' {', '.join(own[:3])}, ... in their order"
                fix = f"leave '{key}' out, or list what the model and --classes say"
                raise ValueError(message(where, expected, "others", fix))
        found = parse_class_map(content, where=where)
        names = names or tuple(content.get("classes", ())) or None
    if len(found.target) != len(sources):
        expected = f"an entry for each of the model's {len(sources)} classes"
        got = str(len(found.target))
        raise ValueError(message(where, expected, got, "map it or to null"))
    names = names or tuple(str(index) for index in range(found.num_classes))
    if len(names) != found.num_classes:
        expected, got = f"{len(names)} classes to map to", str(found.num_classes)
        raise ValueError(message(where, expected, got, "map a model class to each"))
    return found, names


def _json(path: Path) -> dict[str, Any]:
    fix = "see the command's page in the docs"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(message(str(path), "a class map in JSON", str(error), fix)) from error
    if not isinstance(content, dict):
        got = type(content).__name__
        raise ValueError(message(str(path), "a JSON object", got, fix))
    return content
