"""Python sessions are coloured as sessions: a ``python`` block that begins with ``>>>``."""

from __future__ import annotations

import re
from typing import Any

_SESSION = re.compile(r"^( *```)python\n(?= *>>> )", re.MULTILINE)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called once per page."""
    return _SESSION.sub(r"\1pycon\n", markdown)
