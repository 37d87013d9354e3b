"""The command ``cpseg``: words in, words out."""

from cpseg.cli.main import main

__all__ = [
    "main",
]
