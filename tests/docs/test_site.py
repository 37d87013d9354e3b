"""The pages of the documentation: short, at old addresses too, with commands that parse."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cpseg.cli.command import parser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
NAMES = [str(path.relative_to(DOCS)) for path in PAGES]
WORDS = 2500
# What the pages were before they were split: their headings still lead on.
OLD_ANCHORS = {
    "command.md": "cpseg-run cpseg-predict score-files your-data-as-it-is cpseg-calibrate "
    "recalibrated-probabilities several-sources cpseg-label how-much-labelled-images-weigh "
    "layouts-of-other-training-code cpseg-patch cpseg-folds cpseg-evaluate cpseg-sweep "
    "cpseg-certify cpseg-audit cpseg-report cpseg-export-and-cpseg-import cpseg-compact class-maps "
    "several-processes cpseg-check",
    "results-in-detail.md": "the-demo labelmefacade camvid 11-classes-no-background "
    "background-plus-objects coverage-of-every-variant-and-score "
    "what-the-sweep-sees-and-what-held-out-images-say certificates audits "
    "recalibrated-probabilities students-on-camvid uncertainty-aware-losses",
    "results.md": "labelmefacade-a-student-that-gains the-demo students-on-camvid labels-on-camvid "
    "coverage-of-every-variant the-sweep-against-held-out-images certificates audits "
    "recalibrated-probabilities uncertainty-aware-losses",
    "theory.md": "the-promise-pixel-by-pixel with-too-few-images the-other-promises "
    "what-breaks-it-measured two-quantile-rules agreement-with-other-libraries "
    "the-selection-rule what-is-stored-and-how-exactly sizes",
}


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def without_code(name: str) -> str:
    return re.sub(r"^ *```.*?^ *```$|`[^`\n]*`", "", text(name), flags=re.M | re.S)


def anchors(name: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text(name), re.M)
    slugs = {re.sub(r"[^\w -]", "", each).strip().lower().replace(" ", "-") for each in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)"', text(name)))


def settings() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    read: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return read


def commands(name: str) -> list[list[str]]:
    """The words of every command of cpseg in a page's blocks; those of shell loops are left out."""
    found = []
    for block in re.findall(r"^ *```(?:bash|)\n(.*?)^ *```$", text(name), re.M | re.S):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            if line.strip().startswith("cpseg ") and not re.search(r"[$…]| \.\.\.", line):
                words = shlex.split(re.split(r" [|>] ", line)[0], comments=True)
                found.append(words[1:])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_pages_are_short(name: str) -> None:
    assert len(text(name).split()) <= WORDS


@pytest.mark.parametrize("name", NAMES)
def test_pictures_have_words(name: str) -> None:
    pictures = re.findall(r"!\[(.*?)\]\(([^)]+)\)", without_code(name), re.S)
    for words, link in pictures:
        assert len(words.split()) >= 5, f"{link} needs a text for those who do not see it"
        assert (PAGES[NAMES.index(name)].parent / link).is_file()
    for tag in re.findall(r"<img\b[^>]*>", without_code(name)):
        assert re.search(r'alt="[^"]+"', tag), tag


def test_pictures_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (DOCS / "images").iterdir()}
    assert {name: size for name, size in sizes.items() if size > 150_000} == {}
    assert sum(sizes.values()) < 1_500_000


@pytest.mark.parametrize("name", OLD_ANCHORS)
def test_old_addresses_lead_on(name: str) -> None:
    assert set(OLD_ANCHORS[name].split()) - anchors(name) == set()


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(name):
        try:
            parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"cpseg {shlex.join(words)}: {capsys.readouterr().err}")


def test_commands_are_found() -> None:
    assert sum(len(commands(name)) for name in NAMES) > 60
    assert ["demo", "-o", "demo_out"] in commands("index.md")


def test_the_theme_asks_nobody() -> None:
    """No fonts, statistics, scripts or repository figures from other servers."""
    read = settings()
    assert read["theme"]["font"] is False
    for name in ("repo_url", "extra_javascript"):
        assert name not in read
    assert "analytics" not in read["extra"]
    assert not [each for each in read["extra_css"] if "//" in each]
    for path in (DOCS / "stylesheets").iterdir():
        assert not re.search(r"url\(|@import", path.read_text(encoding="utf-8"))


def test_every_page_is_in_the_menu() -> None:
    def leaves(nav: Any) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        children = nav.values() if isinstance(nav, dict) else nav
        return [leaf for child in children for leaf in leaves(child)]

    listed = leaves(settings()["nav"])
    assert len(listed) == len(set(listed))
    assert set(NAMES) <= set(listed)


@pytest.mark.ci
def test_the_built_site_asks_nobody(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the theme: pip install cpseg[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    what = r"<(?:script|img|iframe|link)\b"
    loads = re.compile(what + r"[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\" >]+)")
    for page in tmp_path.rglob("*.html"):
        assert loads.findall(page.read_text(encoding="utf-8")) == [], page.name


def test_the_tables_of_speed_are_those_of_the_machines() -> None:
    """``python benchmarks/page.py`` makes them; nobody types a figure."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import page
    finally:
        sys.path.pop(0)
    text = (DOCS / "speed.md").read_text()
    assert page.BEGIN in text
    assert page.with_tables(text) == text
