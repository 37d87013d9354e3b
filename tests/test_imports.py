"""Imports run one way, and `import cpseg` brings nothing but torch and NumPy along."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cpseg

PACKAGE = Path(cpseg.__file__).parent
ORDER = [
    "_version",
    "checks",
    "betting",
    "certificate",
    "scores",
    "quantiles",
    "ranks",
    "learned_groups",
    "groups",
    "best",
    "selection",
    "levels",
    "store",
    "refit",
    "reservoir",
    "score_map",
    "recalibration",
    "stores",
    "online",
    "thresholds",
    "calibration",
    "risk",
    "strategies",
    "testing",
    "metrics",
    "uncertainty",
    "training_data",
    "loss_sums",
    "losses",
    "prompts",
    "mask_filtering",
    "task_prompt",
    "schedules",
    "class_map",
    "foundation_images",
    "foundation_files",
    "foundation_classes",
    "foundation_models",
    "foundation",
    "sources",
    "predicting",
    "evaluation",
    "refitting",
    "jobs",
    "labelling",
    "certifying",
    "sweep_table",
    "sweep_plan",
    "sweeping",
    "reliability",
    "recommendation",
    "findings",
    "advice",
    "reporting",
    "plots",
    "report",
    "demo_scenes",
    "demo",
    "options",
    "cli",
]
FREE = {"__init__", "__main__"}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


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


def test_every_module_has_its_place() -> None:
    unknown = set(MODULES) - set(ORDER) - FREE
    assert not unknown, "give new modules a place in ORDER"
    assert not [path for path in PACKAGE.iterdir() if path.is_dir() and path.name[0].isalpha()]


@pytest.mark.parametrize("module", [name for name in MODULES if name not in FREE])
def test_modules_import_only_what_stands_above_them(module: str) -> None:
    imported = own_imports((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    above = set(ORDER[: ORDER.index(module)])
    assert imported <= above, f"{module} imports {sorted(imported - above)}"


def test_the_reader_of_imports_sees_every_form() -> None:
    source = """
import torch
import cpseg.cli
from cpseg import demo, groups
def f():
    from cpseg.calibration import Calibrator
"""
    assert own_imports(source) == {"cli", "demo", "groups", "calibration"}


def test_import_brings_in_no_optional_package() -> None:
    code = "import sys, cpseg; print(*sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in ran.stdout.split()}
    assert "torch" in loaded
    assert not loaded & {"PIL", "sklearn", "safetensors", "scipy", "matplotlib", "transformers"}


def test_import_says_nothing_and_changes_no_setting() -> None:
    code = (
        "import torch; before = (torch.get_num_threads(), torch.initial_seed(), "
        "torch.get_default_dtype(), torch.is_grad_enabled()); import cpseg; "
        "assert before == (torch.get_num_threads(), torch.initial_seed(), "
        "torch.get_default_dtype(), torch.is_grad_enabled())"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
