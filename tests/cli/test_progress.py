"""Progress: one bar for a whole job, one line a minute in a pipe, nothing for a short job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.test_cli import Terminal
from tests.support.folders import command, done, make, options, refused

from cpseg.cli import progress
from cpseg.cli.command import SUBCOMMANDS, main
from cpseg.cli.progress import Progress


def test_one_bar_runs_over_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    bar = Progress()
    bar.expect(5)
    assert [*bar("ab", 2, "first"), *bar("cde", 3, "second")] == [*"abcde"]
    bar.close()
    shown = terminal.shown()
    assert "first:" in shown
    assert shown.rstrip("\r\n").rsplit("\r", 1)[-1].startswith("second: 100%|")
    assert "5/5" in shown
    assert "2/2" not in shown
    assert "3/3" not in shown
    assert shown.count("\n") == 1


def test_what_is_printed_after_a_job_has_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where more images were announced than read."""
    terminal = Terminal(monkeypatch)
    with Progress() as bar:
        bar.expect(9)
        assert [*bar("ab", 2, "first")] == [*"ab"]
    print("the table", file=sys.stderr)
    lines = terminal.shown().split("\n")
    assert lines[1] == "the table\r"


def test_a_pass_has_a_bar_of_its_own_where_nothing_was_announced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal(monkeypatch)
    bar = Progress()
    assert [*bar("ab", 2, "first"), *bar("cde", 3, "second")] == [*"abcde"]
    shown = terminal.shown()
    assert "2/2" in shown
    assert "3/3" in shown
    assert shown.count("\n") == 2


def test_a_pipe_gets_a_line_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1, 59, 60, 61, 119, 120, 180])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    bar = Progress()
    assert list(bar(range(7), 7, "label")) == list(range(7))
    assert capsys.readouterr().err == (
        "cpseg: label: 2 of 7 images\ncpseg: label: 5 of 7 images\ncpseg: label: 6 of 7 images\n"
    )


def test_other_ranks_say_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    assert list(Progress()("ab", 2, "label")) == ["a", "b"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["label", "--help"], ["--nonsense"]])
def test_words_about_the_command_import_no_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom cpseg.cli import main\n"
        f"try:\n    main({words})\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("module", SUBCOMMANDS, ids=lambda module: module.__name__)
def test_every_option_has_a_help_text(module: object) -> None:
    name = module.__name__.removeprefix("cpseg.cli.").rstrip("_")  # type: ignore[attr-defined]
    from cpseg.cli.command import parser

    (commands,) = (a for a in parser()._actions if a.__class__.__name__ == "_SubParsersAction")
    for action in commands.choices[name]._actions:  # type: ignore[attr-defined,index]
        assert action.help, action.option_strings


RECALIBRATION = {"context": "none", "scores": "sigmoid", "recalibrate_share": 0.5}


@pytest.mark.parametrize("option", RECALIBRATION)
@pytest.mark.parametrize("job", ["calibrate", "certify", "sweep"])
def test_an_option_of_a_recalibration_that_is_not_asked_for_is_refused(
    job: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were ignored in silence."""
    if (job, option) == ("certify", "recalibrate_share"):
        pytest.skip("certify recalibrates on the images that set the thresholds")
    data = make(tmp_path / "data")
    background = {"background": "none"}
    if job == "sweep":
        background = {"backgrounds": "none", "recalibrate": "none"}
    words = data.options(**background, **{option: RECALIBRATION[option]})
    name = f"--{option.replace('_', '-')}"
    out = tmp_path / "out"
    refused(command(capsys, job, *words, "-o", out), f"{name}: expected a recalibration")
    assert not out.exists()


def test_a_report_without_recalibration_refuses_its_options_but_for_the_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same share sets the thresholds of certified rules."""
    data = make(tmp_path / "data", count=9)
    words = ["report", *data.options(background="none", recalibrate="none", folds=3), "-o"]
    page = str(tmp_path / "r.html")
    refused(command(capsys, *words, page, "--context", "none"), "--context: expected a recal")
    share = ["--recalibrate-share", "0.5"]
    never = [*share, "--max-error", "none"]
    refused(command(capsys, *words, page, *never), "--recalibrate-share: expected a recalibration")
    done(command(capsys, *words, page, *share))


def test_an_interrupted_command_says_whether_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(tmp_path / "data")
    made = tmp_path / "c.safetensors"
    done(command(capsys, "calibrate", *data.options(background=0, alpha=0.3), "-o", made))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "__call__", interrupt)
    for words, then in (
        (["calibrate", *data.options(background=0)], "the same command starts over"),
        (["label", *data.options(calibration=made)], "run the same command to go on"),
        (["sweep", *data.options(backgrounds=0)], "run the same command to go on"),
    ):
        assert main([*words, "-o", str(tmp_path / "out" / words[0])]) == 130
        assert capsys.readouterr().err == f"cpseg: interrupted; {then}\n"
    assert main(["sweep", *options(root=data.root, ids=data.ids, probs=data.probs, backgrounds=0)])
    assert capsys.readouterr().err == "cpseg: interrupted; the same command starts over\n"
