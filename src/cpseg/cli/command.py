"""The command: finds the subcommand, runs it, and turns errors into one line.

Exit 0 on success, 2 with one line on bad input and any other error, 1 where nothing can be
certified, 130 after an interrupt. With ``--debug`` the trace of an error comes first. Under
``torchrun`` the images are shared out over the ranks; the result is the same to the byte.

Nothing here, nor on top of a subcommand's file, imports torch: ``cpseg --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from cpseg._version import __version__
from cpseg.cli import (
    audit,
    calibrate,
    certify,
    check,
    compact,
    demo,
    evaluate,
    export,
    folds,
    import_,
    label,
    patch,
    predict,
    report,
    run,
    sweep,
)
from cpseg.cli.help_texts import HELP_TEXTS
from cpseg.cli.options import Parser
from cpseg.cli.renamed import with_new_names
from cpseg.cli.terminal import coloured, is_coloured

# In the order of `cpseg --help`. A subcommand is a module with `add(commands)`.
SUBCOMMANDS = (
    demo,
    run,
    check,
    calibrate,
    label,
    evaluate,
    certify,
    audit,
    sweep,
    report,
    folds,
    compact,
    predict,
    export,
    import_,
    patch,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    resumes = False
    try:
        arguments = parser().parse_args(with_new_names(words))
        resumes = arguments.resumes(arguments)
        with _Ranks():
            code: int | None = arguments.run(arguments)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        if "--debug" in words:
            traceback.print_exc()
        then = "run the same command to go on" if resumes else "the same command starts over"
        print(f"cpseg: interrupted; {then}", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        level = coloured("error", "error", wanted=is_coloured(sys.stderr))
        print(f"cpseg: {level}: {_one_line(error)}", file=sys.stderr)
        return 2
    return code or 0


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    top = Parser(
        prog="cpseg",
        description="Calibrated pseudo-labels from the probabilities of a foundation model.",
    )
    top.add_argument("--version", action="version", version=f"cpseg {__version__}")
    top.add_argument("--debug", action="store_true", help="show the trace of an error")
    top.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        action=_Completion,
        help="print a script that completes options in this shell, and end",
    )
    top.set_defaults(resumes=lambda arguments: False)
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for subcommand in SUBCOMMANDS:
        subcommand.add(commands)
    for name, command in commands.choices.items():
        command.description, command.example = HELP_TEXTS[name]
        command.add_argument(  # after the subcommand too, where it is easy to add
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return top


class _Completion(argparse.Action):
    """Prints the completion script of a shell, made by shtab."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Print it, and end."""
        try:
            import shtab
        except ImportError as error:
            text = 'completion scripts are made by shtab: pip install "cpseg[completion]"'
            raise ImportError(text) from error
        print(shtab.complete(parser, shell=values))
        parser.exit()


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename else ""
        return _printable(f"{named}{error.strerror}")
    if isinstance(error, UnicodeEncodeError):
        got = f"{error.object!a}, which {error.encoding} cannot hold"
        return f"a name or a text: expected {error.encoding}, got {got}; set PYTHONUTF8=1"
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, TypeError, OSError, ImportError)) and text:
        return _printable(text)
    kind = type(error).__name__
    return _printable(f"{kind}: {text or 'no message'}; --debug shows where it comes from")


def _printable(text: str) -> str:
    """The text as stderr can show it: names of files may hold other bytes."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class _Ranks:
    """The process group, where ``torchrun`` started this process."""

    def __enter__(self) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch.distributed as dist

            # Ranks wait for the slowest, which may be hours later than the first.
            dist.init_process_group("gloo", timeout=timedelta(days=7))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or "torch" not in sys.modules:
            return  # after an error other ranks may be waiting for this one: torchrun stops them
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
