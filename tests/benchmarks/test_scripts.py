"""The benchmarks that compare ranks and other libraries run, in a small size, and agree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """A copy, which writes its results there."""
    if not BENCHMARKS.exists():
        pytest.skip("benchmarks are not part of this copy")
    copy = tmp_path / "benchmarks"
    copy.mkdir()
    for script in BENCHMARKS.glob("*.py"):
        shutil.copy(script, copy)
    return copy


def run(script: Path, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="bytes and memory are read from /proc")
def test_ranks_come_to_the_same_bits(scripts: Path) -> None:
    said = run(
        scripts / "ranks.py",
        *("--images", "50", "--others", "8", "--size", "32", "--classes", "5"),
        *("--ranks", "1", "2"),
    )
    assert said.count("the same bits") == 10  # five things on one and two ranks
    assert "differ" not in said
    (path,) = (scripts / "results").glob("*-ranks.json")
    assert [each["world"] for each in json.loads(path.read_text())["rows"]] == [1, 2]


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_peers_give_the_same_labels_and_thresholds(scripts: Path) -> None:
    said = run(scripts / "peers.py", "--quick")
    (path,) = (scripts / "results").glob("*-peers.json")
    rows = json.loads(path.read_text())["rows"]
    assert said.count("the same masks") == 3
    assert len(rows) == len([line for line in said.splitlines() if line.startswith("| ")]) - 1
    assert all(row["times_faster"] > 0 for row in rows if "times_faster" in row)
