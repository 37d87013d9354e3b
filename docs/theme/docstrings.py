"""How docstrings become pages: an ``Example`` is code, and a Sphinx role is the name in it."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)  # griffe knows "Examples" alone
_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`([^`]+)`")


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once per module, class, function and attribute."""
        if obj.docstring is not None:
            value = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = _ROLE.sub(r"`\1`", value)
