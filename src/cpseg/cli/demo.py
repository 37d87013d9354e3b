"""``cpseg demo``: the whole job on handwritten digits."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpseg.cli.options import Commands, whole
from cpseg.cli.shared import say, say_table


def add(commands: Commands) -> None:
    """The subcommand's options."""
    command = commands.add_parser("demo", help="the whole job on handwritten digits")
    command.add_argument(
        "-o", "--output", type=Path, default=Path("demo_out"), help="folder (default demo_out)"
    )
    command.add_argument("--seed", type=whole(0), default=0, help="seed (default 0)")
    command.add_argument(
        "--steps", type=whole(1), default=1000, help="training steps of the model (default 1000)"
    )
    command.add_argument(
        "--student-steps",
        type=whole(1),
        default=800,
        help="training steps of every student (default 800)",
    )
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from cpseg.demo.demo import demo

    demo(
        arguments.output,
        seed=arguments.seed,
        steps=arguments.steps,
        student_steps=arguments.student_steps,
        say=lambda text: say_table(text) if text.startswith("| ") else say(text),
    )
