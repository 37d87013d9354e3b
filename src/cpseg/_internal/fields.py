"""Validators of saved metadata: what a field read from JSON must be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from cpseg._internal.checks import is_share, is_whole, message

Valid = Callable[[Any], bool]


def whole(value: object) -> bool:
    """A count of things, at least 1."""
    return is_whole(value)


def count(value: object) -> bool:
    """A whole number, 0 or more."""
    return is_whole(value, 0)


def rate(value: object) -> bool:
    """A float strictly between 0 and 1."""
    return isinstance(value, float) and 0 < value < 1


def share(value: object) -> bool:
    """A float in [0, 1]."""
    return isinstance(value, float) and is_share(value)


def truth(value: object) -> bool:
    """True or false."""
    return isinstance(value, bool)


def text(value: object) -> bool:
    """A string."""
    return isinstance(value, str)


def among(words: Collection[str]) -> Valid:
    """One of some words."""
    return lambda value: isinstance(value, str) and value in words


def or_none(valid: Valid) -> Valid:
    """None, or what is valid."""
    return lambda value: value is None or valid(value)


def list_of(valid: Valid) -> Valid:
    """A list whose entries are valid."""
    return lambda value: isinstance(value, (list, tuple)) and all(map(valid, value))


def table_of(columns: Mapping[str, Valid]) -> Valid:
    """An object with just these entries, each of them valid."""
    return lambda value: (
        isinstance(value, dict)
        and set(value) == set(columns)
        and all(valid(value[name]) for name, valid in columns.items())
    )


def read_fields(
    where: str, content: Mapping[str, Any], fields: Mapping[str, Valid], *, fix: str
) -> dict[str, Any]:
    """The fields of saved metadata; further entries are ignored.

    Raises:
        ValueError: a field is missing or not valid.
    """
    for name, valid in fields.items():
        if name not in content:
            raise ValueError(message(where, f"{name!r} in it", "nothing", fix))
        if not valid(content[name]):
            got = " ".join(repr(content[name]).split())[:80]
            raise ValueError(message(where, f"a valid {name}", got, fix))
    return {name: content[name] for name in fields}
