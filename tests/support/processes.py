"""What tests that start ranks of their own need."""

from __future__ import annotations

import socket

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
