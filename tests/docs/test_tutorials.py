"""The notebooks of the tutorials have the cells of their scripts, are small, and run."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.examples.test_public_names import private

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
NAMES = (
    "certificate_and_audit",
    "from_scores_to_labels",
    "testing_your_claim",
    "two_sources",
    "your_training_loop",
)
FASTEST = "testing_your_claim"
AGAIN = "run make tutorials"


def cells_of_script(text: str) -> list[tuple[str, str]]:
    """Kind and text of every cell of a script in the percent format."""
    parts = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)
    assert not parts[0].strip(), "text before the first cell"
    cells = []
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        kind = "markdown" if title.strip() == "[markdown]" else "code"
        lines = body.strip("\n").split("\n")
        if kind == "markdown":
            assert all(line == "#" or line.startswith("# ") for line in lines), lines
            lines = [line[2:] for line in lines]
        cells.append((kind, "\n".join(lines)))
    return cells


def notebook(name: str) -> Any:
    return json.loads((TUTORIALS / f"{name}.ipynb").read_text(encoding="utf-8"))


def test_every_tutorial_is_listed() -> None:
    scripts = {path.stem for path in TUTORIALS.glob("*.py")} - {"make"}
    notebooks = {path.stem for path in TUTORIALS.glob("*.ipynb")}
    assert scripts == notebooks == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_has_the_cells_of_the_script(name: str) -> None:
    script = (TUTORIALS / f"{name}.py").read_text(encoding="utf-8")
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook(name)["cells"]]
    assert found == cells_of_script(script), AGAIN


def test_a_changed_cell_is_seen() -> None:
    text = "# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1\n\n\n# %%\ny = 2\n"
    cells = [("markdown", "# Title\n\ntext"), ("code", "x = 1"), ("code", "y = 2")]
    assert cells_of_script(text) == cells
    assert cells_of_script(text.replace("y = 2", "y = 3")) != cells


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_was_run_from_top_to_bottom(name: str) -> None:
    code = [cell for cell in notebook(name)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), AGAIN
    for output in (output for cell in code for output in cell["outputs"]):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_is_small_and_names_no_machine(name: str) -> None:
    text = (TUTORIALS / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text.encode()) < 400_000
    for place in (str(TUTORIALS.parents[1]), "/tmp/", "/home/", "/root/", "0x7f"):
        assert place not in text
    for cell in notebook(name)["cells"]:
        for output in cell.get("outputs", ()):
            picture = output.get("data", {}).get("image/png", "")
            assert len(base64.b64decode("".join(picture))) <= 60_000


@pytest.mark.parametrize("name", NAMES)
def test_tutorials_use_public_names_only(name: str) -> None:
    assert private((TUTORIALS / f"{name}.py").read_text(encoding="utf-8")) == []


def run(name: str, folder: Path) -> str:
    pytest.importorskip("matplotlib", reason="pip install cpseg[report]")
    pytest.importorskip("sklearn", reason="pip install cpseg[demo]")
    environment = {**os.environ, "MPLBACKEND": "agg"}
    made = subprocess.run(
        [sys.executable, str(TUTORIALS / f"{name}.py")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return made.stdout


@pytest.mark.ci
def test_the_fastest_tutorial_runs(tmp_path: Path) -> None:
    said = run(FASTEST, tmp_path)
    printed = [
        "".join(output["text"])
        for cell in notebook(FASTEST)["cells"]
        for output in cell.get("outputs", ())
        if output["output_type"] == "stream"
    ]
    assert re.sub(r"\d+", "N", said) == re.sub(r"\d+", "N", "".join(printed)), AGAIN


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in NAMES if name != FASTEST])
def test_tutorials_run(name: str, tmp_path: Path) -> None:
    assert run(name, tmp_path)
