"""Tables and colours follow the terminal; a pipe gets neither."""

from __future__ import annotations

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpseg.cli.command import main
from cpseg.cli.terminal import coloured, fitted, is_coloured, width_of
from cpseg.jobs.estimate import aligned

words = st.text("abcdef 0123456789.%±", min_size=1, max_size=14).map(str.strip).filter(bool)


@given(st.data(), st.integers(1, 6), st.integers(1, 5), st.integers(20, 120))
def test_no_line_is_wider_and_no_figure_is_lost(
    data: st.DataObject, columns: int, rows: int, width: int
) -> None:
    lines = data.draw(
        st.lists(
            st.lists(words, min_size=columns, max_size=columns),
            min_size=rows + 1,
            max_size=rows + 1,
        )
    )
    lines.insert(1, ["---"] * columns)
    table = aligned(lines)
    shown = fitted(table, width)
    if max(map(len, table.splitlines())) <= width:
        assert shown == table
        return
    longest = max(
        len(f"  {what} {value},")
        for row in lines[2:]
        for what, value in zip(lines[0], row, strict=True)
    )
    assert max(map(len, shown.splitlines())) <= max(width, longest)
    flat = " ".join(shown.split())
    for row in lines[2:]:
        for what, value in zip(lines[0][1:], row[1:], strict=True):
            assert " ".join(f"{what} {value}".split()) in flat


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert is_coloured(Terminal())
    assert not is_coloured(io.StringIO())
    assert width_of(io.StringIO()) is None
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert not is_coloured(Terminal())
    assert coloured("error", "x", wanted=False) == "x"
    assert coloured("error", "x", wanted=True) == "\x1b[31mx\x1b[0m"


def test_an_error_is_red_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    said = []
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert main(["calibrate", "--nothing"]) == 2
        said.append(stream.getvalue())
    assert said[0].startswith("cpseg: \x1b[31merror\x1b[0m: ")
    assert said[1].startswith("cpseg: error: ")
