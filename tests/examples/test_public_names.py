"""Examples import nothing but public names: what they do, a reader may do too."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.rglob("*.py"))
# Those of docs/stability.md, and the demo, which examples borrow data and pictures from.
PUBLIC = (
    "cpseg",
    *(
        f"cpseg.{package}"
        for package in (
            "calibration",
            "certification",
            "demo",
            "files",
            "foundation",
            "groups",
            "jobs",
            "recalibration",
            "report",
            "testing",
            "training",
        )
    ),
)


def imports(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Every module of cpseg that is imported, with each name that is taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from ((str(node.module), alias.name) for alias in node.names)


def private(text: str) -> list[str]:
    """The imports of cpseg in a script that are not public."""
    return [
        module if name is None else f"{module}: {name}"
        for module, name in imports(ast.parse(text))
        if module.partition(".")[0] == "cpseg" and not is_public(module, name)
    ]


def is_public(module: str, name: str | None) -> bool:
    if module not in PUBLIC:
        return False
    return name is None or name in importlib.import_module(module).__all__


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_examples_use_public_names_only(script: Path) -> None:
    assert private(script.read_text(encoding="utf-8")) == []


def test_the_scripts_are_found_and_some_use_cpseg() -> None:
    assert len(SCRIPTS) > 20
    assert sum("from cpseg" in script.read_text(encoding="utf-8") for script in SCRIPTS) > 10


@pytest.mark.parametrize(
    "line",
    [
        "from cpseg._internal.checks import message",
        "import cpseg.cli",
        "def f():\n    from cpseg.files.masks import read_mask",
        "from cpseg.files import masks",
        "from cpseg import files",
        "from cpseg.files import *",
    ],
)
def test_private_names_are_seen(line: str) -> None:
    assert len(private(line)) == 1


def test_public_names_pass() -> None:
    text = "import cpseg\nimport numpy.random\nfrom cpseg.files import read_mask, Source as S"
    assert private(text) == []
