"""Blocks of code get their colours: Python sessions, and commands in blocks without a language."""

from __future__ import annotations

import re
from typing import Any

_SESSION = re.compile(r"^( *```)python\n(?= *>>> )", re.MULTILINE)
_BLOCK = re.compile(r"^( *```)(\w*)\n(.*?^ *```)$", re.MULTILINE | re.DOTALL)
_COMMANDS = re.compile(r'<div class="language-bash highlight">.*?</div>', re.DOTALL)
_OPTION = re.compile(r"(?<=[\s>])(--?[a-z][\w-]*)")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called once per page."""
    markdown = _SESSION.sub(r"\1pycon\n", markdown)
    return _BLOCK.sub(lambda found: f"{found[1]}{found[2] or 'bash'}\n{found[3]}", markdown)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Called once per page: a line does not end within the name of an option."""
    return _COMMANDS.sub(
        lambda found: _OPTION.sub(r'<span class="cp-option">\1</span>', found[0]), html
    )
