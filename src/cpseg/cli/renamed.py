"""Options under their old names, which work until the release after the one that renamed them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

# Subcommand, or "*" for all, and old name: the new one. Renamed in 0.2, to be removed in 0.3.
RENAMED = {
    ("*", "--score"): "--nonconformity",
    ("predict", "--background"): "--background-from",
    ("report", "--images"): "--show",
}


def with_new_names(words: Sequence[str]) -> list[str]:
    """The words of a command with today's names of options; says on stderr what was renamed.

    Example:
        >>> from cpseg.cli.renamed import with_new_names
        >>> with_new_names(["report", "--images=2", "-o", "r.html"])
        ['report', '--show=2', '-o', 'r.html']
    """
    command = next((word for word in words if not word.startswith("-")), "")
    found = []
    for word in words:
        option, equals, value = word.partition("=")
        new = RENAMED.get((command, option)) or RENAMED.get(("*", option))
        if new is None:
            found.append(word)
            continue
        print(f"cpseg: warning: {option} is now {new}; see CHANGELOG.md", file=sys.stderr)
        found.append(f"{new}{equals}{value}")
    return found
