"""``cpseg patch``: the edits of docs/integrations in training code, for ``git apply``.

A patch is a file in ``patches``: lines that say what it does and for which commit of which client,
a blank line, and the output of ``git diff --full-index``, without which ``git apply --3way`` cannot
find the client's file. Its page shows the same edits.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import NamedTuple

from cpseg.cli.options import Commands

_PATCHES = Path(__file__).with_name("patches")


class Patch(NamedTuple):
    """A shipped patch and what its first lines say of it."""

    name: str
    content: bytes
    what: str
    client: str
    commit: str


def patches() -> list[Patch]:
    """All shipped patches by name."""
    paths = _PATCHES.glob("*.patch")
    return [_read(path) for path in sorted(paths, key=lambda path: path.stem)]


def add(commands: Commands) -> None:
    """The subcommand's options."""
    command = commands.add_parser("patch", help="edits of UniMatch, UniMatch-V2 and AllSpark")
    either = command.add_mutually_exclusive_group()
    either.add_argument(
        "name", nargs="?", metavar="NAME", help="patch to print; without it they are listed"
    )
    either.add_argument(
        "--list", action="store_true", help="list all patches with the client's commit"
    )
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.name is None:
        _list()
        return
    found = {patch.name: patch for patch in patches()}
    if arguments.name not in found:
        raise ValueError(_unknown(arguments.name, list(found)))
    # As bytes: the end of a line is "\n" on every system, as in the client's files.
    sys.stdout.flush()
    sys.stdout.buffer.write(found[arguments.name].content)


def _read(path: Path) -> Patch:
    content = path.read_bytes()
    head = content.decode("utf-8").partition("\n\n")[0]
    said = dict(line.split(": ", 1) for line in head.splitlines())
    return Patch(path.stem, content, said["What"], said["Client"], said["Commit"])


def _list() -> None:
    shown = patches()
    width = max(len(patch.name) for patch in shown)
    for patch in shown:
        client = patch.client.rpartition("/")[2]
        print(f"{patch.name:{width}}  {client} {patch.commit[:7]}  {patch.what}")
    print("in the client's folder: cpseg patch NAME | git apply")


def _unknown(name: str, names: list[str]) -> str:
    """The message, with the names that begin alike or look alike."""
    begins = [each for each in names if name and each.startswith(name)]
    near = begins or difflib.get_close_matches(name, names, n=4)
    fix = f"near: {', '.join(near)}" if near else "run cpseg patch --list"
    # Written out, since `message` imports torch.
    return f"patch: expected a name from cpseg patch --list, got {name!r}; {fix}"
