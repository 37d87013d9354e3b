"""Options under their old names: they work for one release, and say what they are called now."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.folders import command, make, options

from cpseg.cli.command import parser
from cpseg.cli.renamed import RENAMED, with_new_names


@pytest.mark.parametrize(("command_name", "old"), RENAMED)
def test_no_subcommand_has_an_old_name(command_name: str, old: str) -> None:
    subparsers = next(a for a in parser()._actions if a.choices and "run" in a.choices)
    for name, sub in subparsers.choices.items():
        if command_name in ("*", name):
            assert old not in sub._option_string_actions


def test_an_old_name_does_the_same_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make(tmp_path / "data")
    files = []
    for option in ("--score", "--nonconformity"):
        path = tmp_path / f"{option[2:]}.safetensors"
        words = options(root=data.root, ids=data.ids, probs=data.probs, background=0, alpha=0.4)
        result = command(capsys, "calibrate", *words, f"{option}=aps", "-o", path)
        assert result.code == 0, result.err
        warned = "--score is now --nonconformity" in result.err
        assert warned == (option == "--score")
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_words_that_are_values_stay() -> None:
    words = ["evaluate", "--root", "x", "--", "score"]
    assert with_new_names(words) == words
    assert with_new_names(["calibrate", "--background", "0"]) == ["calibrate", "--background", "0"]
