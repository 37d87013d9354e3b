"""``cpseg check``: what it prints, its exit codes, narrow terminals and pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support import folders
from tests.support.folders import DataSet, command, options

from cpseg.cli import check as cli

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return folders.make(tmp_path / "data", count=20)


def test_good_data(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    picture = tmp_path / "new" / "look.png"
    result = command(capsys, "check", *data.options(), "-o", picture)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "ok: 20 labelled images listed"
    assert "  class  masks argmax  found" in lines
    assert lines[-1].startswith("Nothing looks wrong: argmax and masks agree on ")
    assert "warning" not in result.out
    assert "\x1b" not in result.out
    assert Image.open(picture).size[0] == 992
    assert "look.png: 3 images, masks and argmax over them" in " ".join(result.out.split())
    rows = [line.split() for line in lines if line[:7].strip().isdecimal()]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert sum(float(row[1]) for row in rows) == pytest.approx(100, abs=0.2)


def test_errors_come_last_and_give_exit_2(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    for image, scores in data.scores.items():
        np.save(data.score_file(image), scores.transpose(1, 2, 0))
        mask = data.labels[image]
        Image.fromarray(np.where(mask == 255, 255, (mask + 1) % 4).astype(np.uint8)).save(
            data.mask_file(image)
        )
    result = command(capsys, "check", *data.options(), "-o", tmp_path / "check.png")
    assert (result.code, result.err) == (2, "")
    levels = [
        line.split(":")[0]
        for line in result.out.splitlines()
        if line.startswith(("ok: ", "warning: ", "error: "))
    ]
    assert levels == sorted(levels, key=["ok", "warning", "error"].index)
    text = " ".join(result.out.split())
    assert "warning: class i of the scores looks like class i+1 of the masks" in text
    assert "error: scores [12, 16, 4] for an image of 12x16" in text
    assert "--layout hwc" in text
    assert result.out.splitlines()[-1] == "This cannot work yet: mend 1 error first."
    words = [*data.options(layout="hwc"), "-o", tmp_path / "check.png"]
    result = command(capsys, "check", *words)
    assert result.code == 0
    assert result.out.splitlines()[-1] == "This will run, but look at 1 warning first."


def test_a_warning_alone_gives_exit_0(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    few = data.list_ids("few.txt", data.images[:3])
    result = command(capsys, "check", *data.options(ids=few), "-o", tmp_path / "check.png")
    assert result.code == 0
    assert result.out.splitlines()[-1] == "This will run, but look at 1 warning first."


def test_options_reach_the_job(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    for image in data.images:
        mask = data.labels[image]
        Image.fromarray(np.where(mask == 255, 9, mask).astype(np.uint8)).save(data.mask_file(image))
    out = tmp_path / "check.png"
    assert command(capsys, "check", *data.options(), "-o", out).code == 2
    unlabelled = data.list_ids("unlabelled.txt", data.images[:2], masks=False)
    words = data.options(void=9, unlabelled=unlabelled, all=True)
    result = command(capsys, "check", *words, "-o", out)
    assert result.code == 0
    assert "2 labelled images are in the unlabelled list too" in result.out


def test_what_cannot_be_read_at_all_is_one_line(data: DataSet, capsys: Capture) -> None:
    result = command(capsys, "check", *data.options(ids=data.root / "nothing.txt"))
    folders.refused(result, "nothing.txt")
    folders.refused(command(capsys, "check", *data.options(probs=data.ids)), "--probs")


def test_a_picture_that_cannot_be_written(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    result = command(capsys, "check", *data.options(), "-o", tmp_path)
    assert result.code == 2
    assert f"error: {tmp_path}: " in result.out.replace("\n  ", " ").replace("\n", " ")
    assert "ok: 20 labelled images listed" in result.out


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_lines_fit_the_terminal(
    columns: int, data: DataSet, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(tmp_path)
    np.save(data.score_file(data.images[0]), data.scores[data.images[0]].transpose(1, 2, 0))
    result = command(capsys, "check", *data.options())
    assert result.code == 2
    widths = [len(line) for line in result.out.splitlines()]
    assert max(widths) <= min(columns, 100)
    assert not [line for line in result.out.splitlines() if line.strip().startswith("%")]
    assert Path("check.png").is_file()


def test_of_many_classes_those_that_differ_most_are_shown(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_MOST_CLASSES", 5)
    data = folders.make(tmp_path / "data", count=20, num_classes=9)
    result = command(capsys, "check", *data.options(), "-o", tmp_path / "check.png")
    rows = [line for line in result.out.splitlines() if line[:7].strip().isdecimal()]
    assert len(rows) == 5
    assert "4 classes whose shares differ less" in " ".join(result.out.split())


def test_colour_on_a_terminal_unless_it_is_not_wanted(
    data: DataSet, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["check", *data.options(), "-o", tmp_path / "check.png"]
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(cli.sys.stdout.__class__, "isatty", lambda self: True, raising=False)
    assert "\x1b[32mok\x1b[0m: 20 labelled images" in command(capsys, *words).out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in command(capsys, *words).out


def test_output_closed_by_head(data: DataSet, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "cpseg", "check", *data.options(), "-o", tmp_path / "c.png"]
    script = " ".join(f"'{word}'" for word in words) + " | head -n 1"
    ran = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert ran.stdout == "ok: 20 labelled images listed\n"
    assert ran.stderr == ""
    assert ran.returncode == 0


def test_the_help_says_what_it_does(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        command(capsys, "check", "--help")
    assert "names what is wrong" in " ".join(capsys.readouterr().out.split())
    assert options(all=True) == ["--all"]
