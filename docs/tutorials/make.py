"""Runs the tutorials and writes them as notebooks: ``python docs/tutorials/make.py [NAME ...]``.

A tutorial is a script with cells (``# %%``, the percent format of jupytext). Its notebook has the
same cells with what they print and draw. No time, path or version goes into it, so that a notebook
changes only where its script or its results do.
"""

from __future__ import annotations

import base64
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path != Path(__file__))
SECONDS = 1200  # the longest that a cell may take


def notebook_of(script: Path) -> Any:
    """The executed notebook of a script."""
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(script)
    NotebookClient(notebook, timeout=SECONDS, record_timing=False).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"file_extension": ".py", "name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell["id"], cell["metadata"] = f"cell-{number:02d}", {}
        if "outputs" in cell:
            cell["outputs"] = _joined(cell["outputs"])
        for output in cell.get("outputs", ()):
            _check(script.name, output)
            output.get("metadata", {}).clear()
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = _smaller(data["image/png"])
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """Outputs in which neighbouring pieces of printed text, cut at random times, are one."""
    found: list[Any] = []
    for output in outputs:
        if output["output_type"] == "stream" and found and found[-1].get("name") == output["name"]:
            found[-1]["text"] += output["text"]
        else:
            found.append(output)
    return found


def _check(name: str, output: Any) -> None:
    """Refuse warnings and errors, which no reader should find in a tutorial."""
    if output["output_type"] == "error" or output.get("name") == "stderr":
        text = output.get("text", output.get("evalue"))
        raise SystemExit(f"{name}: expected no warning or error, got {text}; mend the script")


def _smaller(picture: str) -> str:
    """A PNG with a palette and without the name of the program that made it."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    file = io.BytesIO()
    image.quantize(128, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main(names: list[str]) -> None:
    """Make the notebooks of some tutorials, of all by default."""
    import nbformat

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in names or NAMES:
        began = time.monotonic()
        notebook = notebook_of(HERE / f"{name}.py")
        text = nbformat.writes(notebook, version=nbformat.NO_CONVERT)
        (HERE / f"{name}.ipynb").write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        print(f"{name}.ipynb: {len(text) // 1000} kB in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
