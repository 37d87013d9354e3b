"""``cpseg patch``: what it prints, that git takes it, and that the pages say the same."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.support.folders import command, done, refused

import cpseg

Capture = pytest.CaptureFixture[str]
FOLDER = Path(cpseg.__file__).parent / "cli" / "patches"
NAMES = sorted(path.stem for path in FOLDER.glob("*.patch"))
DOCS = Path(__file__).resolve().parents[2] / "docs" / "integrations"
PAGES = {name: (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in
         ("unimatch", "unimatch-v2", "allspark")}  # fmt: skip


class Hunk(NamedTuple):
    """Where it begins in the old file, and its lines with their first character."""

    start: int
    lines: list[str]

    def side(self, sign: str) -> list[str]:
        """The lines before (``-``) or after (``+``)."""
        return [line[1:] for line in self.lines if line[0] in (" ", sign)]


def printed(capsys: Capture, name: str) -> str:
    result = done(command(capsys, "patch", name))
    return result.out


def hunks(text: str) -> dict[str, list[Hunk]]:
    """The hunks of every file of a patch."""
    found: dict[str, list[Hunk]] = {}
    for part in text.split("diff --git ")[1:]:
        head, *rest = re.split(r"(?m)^@@ -(\d+),\d+ \+\d+,\d+ @@.*\n", part)
        file = re.search(r"(?m)^\+\+\+ b/(\S+)$", head)
        assert file is not None
        pairs = zip(rest[::2], rest[1::2], strict=True)
        found[file[1]] = [Hunk(int(start), body.splitlines()) for start, body in pairs]
    return found


def on_page(page: str) -> Iterator[tuple[str, str, list[list[str]]]]:
    """Patch, file and pieces of every diff of a page, in its order."""
    name = file = ""
    pattern = r"(?m)^cpseg patch (\S+) \| git apply$|^\*\*File\*\* `(\S+)`|^```diff\n((?s:.*?))^```"
    for match in re.finditer(pattern, page):
        name, file = match[1] or name, match[2] or file
        if match[3] is not None:
            pieces = match[3].split("...\n")
            yield name, file, [piece.splitlines() for piece in pieces]


def test_the_list_names_every_patch_with_its_commit(capsys: Capture) -> None:
    said = done(command(capsys, "patch", "--list")).out
    assert done(command(capsys, "patch")).out == said
    *lines, last = said.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert len(NAMES) == 13
    for line in lines:
        assert re.fullmatch(r"\S+ +(UniMatch|UniMatch-V2|AllSpark) [0-9a-f]{7}  \S.*", line)
        assert len(line) <= 120
    assert last == "in the client's folder: cpseg patch NAME | git apply"


@pytest.mark.parametrize("name", NAMES)
def test_git_applies_what_is_printed_and_takes_it_back(
    name: str, capsys: Capture, tmp_path: Path
) -> None:
    """On files that have the patch's old lines where it expects them."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    text = printed(capsys, name)
    assert text.encode() == (FOLDER / f"{name}.patch").read_bytes()
    before: dict[Path, str] = {}
    after: dict[Path, str] = {}
    for file, parts in hunks(text).items():
        old, new = [], []
        for hunk in parts:
            filler = [f"# {number}" for number in range(len(old) + 1, hunk.start)]
            old += filler + hunk.side("-")
            new += filler + hunk.side("+")
        path = tmp_path / file
        before[path], after[path] = ("\n".join(lines) + "\n# end\n" for lines in (old, new))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(before[path].encode())

    def apply(*options: str) -> None:
        words = ["git", "apply", *options]
        subprocess.run(words, input=text.encode(), cwd=tmp_path, check=True, capture_output=True)

    apply()
    assert {path: path.read_bytes().decode() for path in after} == after
    assert before != after
    apply("-R")
    assert {path: path.read_bytes().decode() for path in before} == before


def test_the_pages_show_all_patches_and_their_lines() -> None:
    """Every line that a patch changes, in its order, with context that the patch has too."""
    shown: dict[str, dict[str, list[list[str]]]] = {}
    for page in PAGES.values():
        for name, file, pieces in on_page(page):
            assert file not in shown.setdefault(name, {}), "one block per file of a patch"
            shown[name][file] = pieces
    assert sorted(shown) == NAMES
    for name, files in shown.items():
        patch = hunks((FOLDER / f"{name}.patch").read_text(encoding="utf-8"))
        assert sorted(files) == sorted(patch)
        for file, pieces in files.items():
            lines = [line for hunk in patch[file] for line in [*hunk.lines, "..."]]
            at = 0
            for piece in pieces:
                width = len(piece)
                places = range(at, len(lines) - width + 1)
                found = next((i for i in places if lines[i : i + width] == piece), None)
                assert found is not None, f"{name}, {file}: {piece}"
                assert {line[0] for line in lines[at:found]} <= set(" ."), "a change left out"
                at = found + width
            assert {line[0] for line in lines[at:]} <= set(" ."), "a change left out"


def test_the_tables_count_the_edits_truthfully() -> None:
    for page in PAGES.values():
        for name, file, pieces in on_page(page):
            row = next(line for line in page.splitlines() if line.endswith(f"| `{name}` |"))
            assert f"{len(pieces)} in `{file}`" in row


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_the_commit_of_its_patches(page: str) -> None:
    commits = re.findall(r"\b[0-9a-f]{40}\b", PAGES[page])
    names = {name for name, _, _ in on_page(PAGES[page])}
    heads = [(FOLDER / f"{name}.patch").read_text(encoding="utf-8")[:600] for name in names]
    assert [f"Commit: {commits[0]}\n" in head for head in heads] == [True] * len(heads)
    assert len(commits) == 1
    named = set(re.findall(r"cpseg patch ([a-z][\w-]+)", PAGES[page]))
    assert named <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_stages_need_no_cpseg(name: str) -> None:
    """They run in the client's own environment; the thresholds import one name."""
    text = (FOLDER / f"{name}.patch").read_text(encoding="utf-8")
    new = [line[1:] for line in text.splitlines() if re.match(r"\+(?!\+\+ )", line)]
    imports = [line for line in new if re.match(r"(from|import) ", line)]
    if "threshold" in name:
        assert imports == ["from cpseg import OnlineThreshold"]
    else:
        assert "cpseg" not in "".join(new)
        assert imports in ([], ["import math"])
        assert any("math." in line for line in new) == bool(imports)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("unimatch-stag2", "; near: unimatch-stage2, unimatch-stage1"),
        ("unimatch_v2_stage1", "; near: unimatch-v2-stage1"),
        ("allspark", f"; near: {', '.join(n for n in NAMES if n.startswith('allspark'))}"),
        ("../patches/unimatch-stage1", "; near: unimatch-stage1"),
        ("segformer", "; run cpseg patch --list"),
        ("", "; run cpseg patch --list"),
        ("a\nb", r"got 'a\nb'; run cpseg patch --list"),
    ],
)
def test_an_unknown_name_lists_near_ones(name: str, near: str, capsys: Capture) -> None:
    said = "patch: expected a name from cpseg patch --list, got "
    refused(command(capsys, "patch", name), said, near)


def test_a_name_and_the_list_exclude_each_other(capsys: Capture) -> None:
    result = command(capsys, "patch", "unimatch-stage1", "--list")
    refused(result, "--list: not allowed with argument NAME")


def test_it_needs_no_torch() -> None:
    code = "import sys; from cpseg.cli import main; assert main(['patch', 'unimatch-stage1']) == 0"
    words = [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"]
    result = subprocess.run(words, capture_output=True, check=True)
    assert result.stdout == (FOLDER / "unimatch-stage1.patch").read_bytes()
