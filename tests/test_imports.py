"""Imports between packages run one way, and `import cpseg` loads nothing that is not asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import cpseg
from cpseg._moved import MOVED

PACKAGE = Path(cpseg.__file__).parent
CORE = {"core", "_internal"}
TENSORS = {"core", "groups", "recalibration", "calibration", "_internal"}
JOBS = {*TENSORS, "certification", "files", "foundation"}
# What the files of a package may import, besides each other and `_version`.
MAY_IMPORT: dict[str, set[str]] = {
    "_internal": set(),
    "core": {"_internal"},
    "groups": {"_internal"},
    "testing": {"_internal.checks"},  # it shares no code with what it tests
    "recalibration": CORE,
    "foundation": CORE,
    "files": CORE,
    "calibration": TENSORS - {"calibration"},
    "certification": TENSORS,
    "training": {*TENSORS, "files", "jobs.sources"},  # data on disk, read as the command does
    "jobs": JOBS,
    "report": {*JOBS, "jobs"},
    "demo": {*JOBS, "jobs"},
    "cli": {*JOBS, "jobs", "report", "demo"},
}
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
INNER = [name for name in FILES if "/" in name]


def own_imports(source: str) -> set[str]:
    """Modules of cpseg that a source text imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {name.removeprefix("cpseg.") for name in names if name.startswith("cpseg.")}
            assert "cpseg" not in names, "import a module of cpseg, not the package"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "cpseg":
                found |= {alias.name for alias in node.names}
            elif node.module is not None and node.module.startswith("cpseg."):
                found.add(node.module.removeprefix("cpseg."))
    return found


def test_every_package_has_its_rule() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert packages == set(MAY_IMPORT)
    on_top = {name for name in FILES if "/" not in name}
    assert on_top == {"__init__.py", "__main__.py", "_moved.py", "_version.py"}


@pytest.mark.parametrize("file", INNER)
def test_packages_import_only_what_the_table_allows(file: str) -> None:
    package = file.split("/")[0]
    allowed = {package, *MAY_IMPORT[package]}
    imported = own_imports((PACKAGE / file).read_text(encoding="utf-8")) - {"_version"}
    stray = {name for name in imported if not {name, name.split(".")[0]} & allowed}
    assert not stray, f"{file} imports {sorted(stray)}; {package} may import {sorted(allowed)}"


def test_the_files_of_a_package_import_each_other_without_a_circle() -> None:
    imports = {
        file.removesuffix(".py").replace("/", "."): own_imports(
            (PACKAGE / file).read_text(encoding="utf-8")
        )
        for file in INNER
        if not file.endswith("__init__.py")
    }
    done: list[str] = []
    while len(done) < len(imports):
        ready = [m for m in imports if m not in done and not (imports[m] & set(imports)) - {*done}]
        assert ready, f"a circle among {sorted(set(imports) - set(done))}"
        done += ready


@pytest.mark.parametrize("file", [name for name in INNER if name.endswith("__init__.py")])
def test_init_files_hold_re_exports_only(file: str) -> None:
    for node in ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert docstring or names or isinstance(node, ast.ImportFrom), ast.unparse(node)


def test_the_reader_of_imports_sees_every_form() -> None:
    source = """
import torch
import cpseg.cli
from cpseg import demo, groups
def f():
    from cpseg.calibration.calibrator import Calibrator
"""
    assert own_imports(source) == {"cli", "demo", "groups", "calibration.calibrator"}


def loaded_by(code: str) -> set[str]:
    """Top-level packages in memory after a statement."""
    code = f"import sys; {code}; print(*sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in ran.stdout.splitlines()[-1].split()}


def test_importing_the_public_names_brings_in_no_optional_package() -> None:
    loaded = loaded_by("import cpseg; [getattr(cpseg, name) for name in cpseg.__all__]")
    assert "torch" in loaded
    assert not loaded & {"PIL", "sklearn", "safetensors", "scipy", "matplotlib", "transformers"}


def test_the_bare_import_leaves_torch_alone() -> None:
    assert not loaded_by("import cpseg") & {"torch", "numpy"}


def test_import_says_nothing_and_changes_no_setting() -> None:
    code = (
        "import torch; before = (torch.get_num_threads(), torch.initial_seed(), "
        "torch.get_default_dtype(), torch.is_grad_enabled()); import cpseg; cpseg.Calibrator; "
        "assert before == (torch.get_num_threads(), torch.initial_seed(), "
        "torch.get_default_dtype(), torch.is_grad_enabled())"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_lazy_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    typed = {alias.name for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert {*typed, "__version__"} == set(cpseg.__all__)
    assert set(cpseg.__all__) <= set(dir(cpseg))
    with pytest.raises(AttributeError, match="module 'cpseg' has no attribute 'nothing'"):
        cpseg.nothing  # noqa: B018


@pytest.mark.parametrize("name", sorted(MOVED))
def test_old_module_paths_work_with_a_warning(name: str) -> None:
    sys.modules.pop(f"cpseg.{name}", None)
    with pytest.warns(DeprecationWarning, match=f"cpseg.{name} has moved to cpseg"):
        old = __import__(f"cpseg.{name}", fromlist=["x"])
    with pytest.raises(AttributeError, match=f"'cpseg.{name}' has no attribute 'nothing'"):
        old.nothing  # noqa: B018
    for home in MOVED[name]:
        assert (PACKAGE / f"{home.replace('.', '/')}.py").exists()


def test_old_module_paths_give_the_names_that_they_had() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from cpseg.certificate import Certificate
        from cpseg.ranks import tiles, total
        from cpseg.sources import Source, barrier
        from cpseg.store import atomic, read_ids, read_mask, read_scores
    assert Certificate is cpseg.Certificate
    assert [each.__name__ for each in (atomic, read_ids, read_mask, read_scores)] == [
        "atomic",
        "read_ids",
        "read_mask",
        "read_scores",
    ]
    assert Source.__module__ == "cpseg.files.dataset"
    assert [each.__name__ for each in (barrier, tiles, total)] == [
        "barrier",
        "tiles",
        "all_reduce_sum",
    ]
