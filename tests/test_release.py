"""What a release promises: one version everywhere, tested bounds, links that lead somewhere."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

import cpseg

ROOT = Path(__file__).parents[1]
ADDRESS = "https://github.com/cpseg/cpseg"
BLOB, RAW = f"{ADDRESS}/blob/main/", "https://raw.githubusercontent.com/cpseg/cpseg/main/"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
LOWEST = "completion", "hf", "report", "test", "trees"  # the extras that make test-lowest installs


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def jobs(path: Path) -> dict[str, Any]:
    """The jobs of a workflow."""
    yaml = pytest.importorskip("yaml")
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return found


def commands(path: Path) -> list[list[str]]:
    """The words of every line that a workflow runs."""
    steps = [step for job in jobs(path).values() for step in job["steps"]]
    lines = [line for step in steps for line in step.get("run", "").splitlines()]
    return [shlex.split(line) for line in lines]


def pins(name: str) -> dict[str, str]:
    """Names and versions of a file of constraints."""
    lines = [line for line in text(name).splitlines() if line and not line.startswith("#")]
    return {name.lower(): version for name, version in (line.split("==") for line in lines)}


def bounds(*extras: str) -> dict[str, str]:
    """Names and lower bounds of the dependencies, and of those of some extras."""
    optional = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *(each for extra in extras for each in optional[extra])]
    return dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", each).groups() for each in needed)  # type: ignore[union-attr,misc]


def number(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.split(".")]
    return tuple([*parts, 0, 0][:3])


# One version.


def test_version_and_date_are_the_same_everywhere() -> None:
    version = cpseg.__version__
    dates = re.findall(
        rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)$", text("CHANGELOG.md"), re.M
    )
    assert len(dates) == 1 or ".dev" in version
    if dates:
        citation = text("CITATION.cff")
        assert f"\nversion: {version}\n" in citation
        assert f"\ndate-released: {dates[0]}\n" in citation


def test_citation_names_the_library_and_its_papers() -> None:
    citation = pytest.importorskip("yaml").safe_load(text("CITATION.cff"))
    assert {
        "cff-version",
        "message",
        "title",
        "authors",
    } <= citation.keys()  # what the format requires
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == ADDRESS == PROJECT["urls"]["Source"]
    assert citation["authors"] == PROJECT["authors"]
    papers = {paper["conference"]["name"]: paper for paper in citation["references"]}
    assert papers.keys() == {"ICCV 2025", "NeurIPS 2024", "CVPR 2024"}
    for paper in papers.values():
        assert {"type", "title", "authors", "year"} <= paper.keys()
    assert "ConformalSAM" in papers["ICCV 2025"]["title"]
    assert "Uncertainty-aware" in papers["NeurIPS 2024"]["title"]
    assert "Kandinsky" in papers["CVPR 2024"]["title"]


# Versions of Python and of the dependencies.


def test_versions_of_python_agree() -> None:
    prefix = "Programming Language :: Python :: 3."
    minors = sorted(
        int(each.removeprefix(prefix)) for each in PROJECT["classifiers"] if each.startswith(prefix)
    )
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert PROJECT["requires-python"] == f">=3.{minors[0]}"
    tested = jobs(ROOT / ".github" / "workflows" / "ci.yml")["test"]["strategy"]["matrix"]["python"]
    assert tested == [f"3.{minor}" for minor in minors]
    assert f"| Python | 3.{minors[0]} | 3.{minors[-1]} |" in text("docs/stability.md")


def test_every_lower_bound_is_what_the_lowest_run_installs() -> None:
    lowest, declared = pins("constraints-lowest.txt"), bounds(*LOWEST)
    assert {name: number(version) for name, version in lowest.items()} == {
        name: number(version) for name, version in declared.items()
    }
    assert f'--editable ".[{",".join(LOWEST)}]"' in text("Makefile")


def test_the_table_of_versions_is_that_of_the_constraints() -> None:
    rows = re.findall(
        r"^\| ([\w-]+)(?: \(.*\))? \| ([\d.]+) \| ([\d.]+) \|$", text("docs/stability.md"), re.M
    )
    table = {name: (low, high) for name, low, high in rows if name != "Python"}
    lowest, newest = pins("constraints-lowest.txt"), pins("constraints.txt")
    told = bounds(*(extra for extra in LOWEST if extra != "test"))
    assert table == {name: (lowest[name], newest[name]) for name in told}


# Workflows.


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_exists(path: Path) -> None:
    targets = set(re.search(r"^\.PHONY: (.*)$", text("Makefile"), re.M)[1].split())  # type: ignore[index]
    assert all(re.search(rf"^{target}:", text("Makefile"), re.M) for target in targets)
    made = 0
    for words in commands(path):
        if words[:1] == ["make"]:
            assert set(words[1:]) <= targets
            made += 1
        for word in words:
            for extra in re.findall(r"^\.\[(.*)\]$", word):
                assert set(extra.split(",")) <= PROJECT["optional-dependencies"].keys()
            if word.endswith(".txt"):
                assert (ROOT / word).is_file()
    assert made


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_read_only_and_end(path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["permissions"] == {"contents": "read"}
    for name, job in jobs(path).items():
        assert job["timeout-minutes"] <= 180
        allowed = {"id-token": "write"} if name == "publish" else None
        assert job.get("permissions") == allowed


def test_only_tested_files_are_published() -> None:
    release = jobs(ROOT / ".github" / "workflows" / "release.yml")
    assert release["publish"]["needs"] == "test"
    assert release["test"]["needs"] == "build"
    assert not any("run" in step for step in release["publish"]["steps"])  # nothing is built there
    assert "secrets." not in text(".github/workflows/release.yml")


# The README on PyPI.


def anchors(name: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text(name), re.M)
    return {re.sub(r"[^\w -]", "", each).strip().lower().replace(" ", "-") for each in headings}


def test_readme_has_absolute_links_to_what_exists() -> None:
    readme = re.sub(r"^```.*?^```", "", text("README.md"), flags=re.M | re.S)
    inline = re.findall(r"\]\(([^)\s]+)\)", readme)
    defined = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", readme, re.M))
    assert len(defined) > 10
    for link in [*inline, *defined.values()]:
        assert link.startswith(("https://", "#")), f"{link} leads nowhere on PyPI"
        path, _, anchor = link.removeprefix(BLOB).removeprefix(RAW).partition("#")
        if link.startswith((BLOB, RAW)):
            assert (ROOT / path).is_file(), link
        if not path.startswith("https://") and anchor:
            assert anchor in anchors(path or "README.md"), link


def test_readme_uses_every_link_that_it_defines() -> None:
    definition = r"^\[([^\]]+)\]: http.*$"
    readme = text("README.md")
    used = re.sub(definition, "", readme, flags=re.M).lower()
    assert [
        name for name in re.findall(definition, readme, re.M) if f"[{name.lower()}]" not in used
    ] == []
