"""Several processes give the bytes of one.

Slow for what it is: every process imports torch. Under pytest-xdist each case runs on one worker.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from tests.support import folders
from tests.support.folders import DataSet, command, files
from tests.support.processes import free_port, ranks_of

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)


def jobs(data: DataSet, out: Path, **calibrate: object) -> list[list[str]]:
    some = data.options(background=0, **calibrate)
    made = data.options(calibration=out / "c.safetensors")
    return [
        ["calibrate", *some, "-o", str(out / "c.safetensors")],
        ["label", *made, "--labelled", str(data.ids), "-o", str(out / "labels")],
        ["evaluate", *made, "--constant", "0.3", "--per-class", "-o", str(out / "rows.json")],
    ]


def alone(
    capsys: pytest.CaptureFixture[str], out: Path, runs: list[list[str]]
) -> tuple[str, dict[str, bytes]]:
    """What one process prints and leaves; the folder is taken away again."""
    results = [command(capsys, *words) for words in runs]
    assert [result.code for result in results] == [0] * len(runs)
    left = files(out)
    assert {"c.safetensors", "rows.json", "labels/ids.txt", "labels/stage1.txt"} < set(left)
    shutil.rmtree(out)
    return "".join(result.out for result in results), left


@pytest.mark.nightly
def test_torchrun_gives_the_bytes_of_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folders.make(tmp_path / "data", count=7, sizes=((12, 16), (10, 20)))
    out = tmp_path / "out"
    runs = jobs(data, out, alpha=0.3)
    wanted, left = alone(capsys, out, runs)
    printed = ""
    for words in runs:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*launcher, "--master-port", str(free_port()), "-m", "cpseg", *words],
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        used = "were used for the calibration"
        said = [line for line in done.stderr.splitlines() if used not in line]
        assert not any("cpseg" in line for line in said), done.stderr
        printed += done.stdout
    assert printed == wanted
    assert files(out) == left


# What torchrun sets, without torchrun: one start for all jobs, each with a port of its own.


@pytest.mark.nightly
@pytest.mark.parametrize("variant", ["pixel", "image"])
def test_a_rank_without_an_image_changes_nothing(
    variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folders.make(tmp_path / "data", count=2)
    out = tmp_path / "out"
    runs = jobs(data, out, alpha=0.5, variant=variant, per_class=True)
    wanted, left = alone(capsys, out, runs)
    ranks = ranks_of(3, runs)
    assert [code for code, _, _ in ranks] == [0, 0, 0], ranks
    assert [said for _, said, _ in ranks] == [wanted, "", ""]
    assert files(out) == left


@pytest.mark.nightly
def test_ranks_write_the_layouts_of_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folders.make(tmp_path / "data", count=7, sizes=((12, 16), (10, 20)))
    labelled = data.list_ids("labelled.txt", data.images[:2])
    unlabelled = data.list_ids("unlabelled.txt", data.images[2:], masks=False)
    thresholds, out = tmp_path / "c.safetensors", tmp_path / "out"
    (tmp_path / "names.txt").write_text("".join(f"class {index}\n" for index in range(4)))
    settings = data.options(ids=labelled, background=0, grid="4x4", alpha=0.5)
    assert command(capsys, "calibrate", *settings, "-o", thresholds).code == 0
    words = data.options(
        ids=unlabelled,
        calibration=thresholds,
        labelled=labelled,
        names=tmp_path / "names.txt",
        copy_images=True,
    )
    runs = [
        ["label", *words, "--output-layout", layout, "-o", str(out / layout)]
        for layout in ("yolo", "mmseg", "voc", "ade")
    ]
    results = [command(capsys, *words) for words in runs]
    assert [result.code for result in results] == [0] * 4, results
    left = files(out)
    shutil.rmtree(out)
    ranks = ranks_of(3, runs)
    assert [code for code, _, _ in ranks] == [0, 0, 0], ranks
    now = files(out)
    assert set(now) == set(left)
    different = {name for name in now if now[name] != left[name]}
    assert different <= {"ade/manifest.jsonl"}  # times of the masks that its own are made from
