"""What tests that start ranks of their own need."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

# Runs several command lines in one process; each is a rank of a group of its own.
ONE_RANK = """
import json, os, sys
from cpseg.cli import main
for port, words in zip(json.loads(sys.argv[1]), json.loads(sys.argv[2])):
    os.environ["MASTER_PORT"] = str(port)
    if main(words):
        sys.exit(2)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks_of(count: int, runs: Sequence[Sequence[str]]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of every rank that runs these command lines."""
    words = [json.dumps([free_port() for _ in runs]), json.dumps([list(map(str, r)) for r in runs])]
    world = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_RANK, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    try:
        printed = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *said) for rank, said in zip(ranks, printed, strict=True)]
