"""SIGKILL at any instant: no torn file, and the next run ends with the bytes of an undisturbed one.

A process that has imported everything forks a child for each run, which costs milliseconds, and
kills it after the given time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.support import folders
from tests.support.folders import DataSet, files, start

from cpseg.files.dataset import Source
from cpseg.jobs.calibrate import calibrate

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

FORKS = """
import json, os, signal, sys, time
import numpy, PIL.Image, PIL.PngImagePlugin, safetensors.torch, torch
import cpseg.jobs.compact, cpseg.jobs.label
from cpseg.cli import main
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    seconds, words = json.loads(line)
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(words))
    while seconds is None or time.monotonic() - begun < seconds:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.0002)
    else:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), time.monotonic() - begun, flush=True)
"""


class Forks:
    """Runs the command, for a limited time if wanted."""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = start(code=FORKS, stdin=subprocess.PIPE, env=env)
        self._hear()

    def _hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def run(self, words: list[str], seconds: float | None = None) -> tuple[int, float]:
        """The exit code, negative for a signal, and how long it took."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([seconds, words]) + "\n")
        self.process.stdin.flush()
        code, took = self._hear().split()
        return int(code), float(took)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.process.communicate(timeout=60)


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return folders.make(tmp_path / "data", count=12, sizes=((12, 16), (10, 20), (96, 128)))


def words_of(name: str, data: DataSet, tmp_path: Path, out: Path) -> list[str]:
    if name == "compact":
        return ["compact", *data.options(background=0, output=out)]
    made = calibrate(Source(data.root, data.probs), data.ids, alpha=0.3, background=0)
    made.save(tmp_path / "c.safetensors")
    labelled = data.list_ids("labelled.txt", data.images[:3])
    more = {"calibration": tmp_path / "c.safetensors", "labelled": labelled, "output": out}
    return ["label", *data.options(**more)]


@pytest.mark.parametrize(
    "kills", [3, pytest.param(50, marks=pytest.mark.nightly)], ids=["few", "many"]
)
@pytest.mark.parametrize("name", ["label", "compact"])
def test_a_run_that_is_killed_at_any_instant_ends_as_if_it_were_not(
    name: str, kills: int, data: DataSet, tmp_path: Path, forks: Forks
) -> None:
    out = tmp_path / "out"
    words = words_of(name, data, tmp_path, out)
    assert forks.run(words)[0] == 0
    wanted = files(out)
    shutil.rmtree(out)
    code, whole = forks.run(words)
    assert code == 0
    assert files(out) == wanted, "two undisturbed runs"
    shutil.rmtree(out)

    rng = np.random.default_rng(kills)
    done = unfinished = 0
    while done < kills:
        for _ in range(int(rng.integers(1, 4))):  # a resumed run may be killed too
            code, _ = forks.run(words, seconds=float(rng.uniform(0, 1.05 * whole)))
            assert code in (0, -signal.SIGKILL)
            done += code != 0
            left = files(out) if out.exists() else {}
            unfinished += left != wanted
            for path, content in left.items():
                if not path.endswith((".part", ".log", "run.lock", "manifest.jsonl")):
                    assert content == wanted[path], f"{path} is torn"
        assert forks.run(words)[0] == 0
        assert files(out) == wanted
        shutil.rmtree(out)
    assert unfinished, "every run was over before it was killed"


@pytest.mark.nightly
def test_a_run_killed_after_scores_changed_makes_the_new_masks(
    data: DataSet, tmp_path: Path, forks: Forks
) -> None:
    """The records of the first run must not vouch for the second one's masks, nor the reverse."""
    out = tmp_path / "out"
    words = words_of("label", data, tmp_path, out)
    code, whole = forks.run(words)
    assert code == 0
    for image in data.images:
        path = data.score_file(image)
        when = path.stat().st_mtime_ns
        np.save(path, data.scores[image][::-1].copy())
        os.utime(path, ns=(when, when))
    for share in (0.3, 0.5, 0.7):
        forks.run(words, seconds=share * whole)
    assert forks.run(words)[0] == 0
    resumed = files(out)
    shutil.rmtree(out)
    assert forks.run(words)[0] == 0
    assert files(out) == resumed
