"""The command ``cpseg``: words in, words out; one file per subcommand."""

from cpseg.cli.command import main

__all__ = ["main"]
