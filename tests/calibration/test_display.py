"""What a calibration shows to people: facts, a table for notebooks, a picture."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch

from cpseg import Calibration


def made(threshold: torch.Tensor, **more: Any) -> Calibration:
    given: dict[str, Any] = {"alpha": 0.1, "num_images": 40, "num_classes": 3, **more}
    return Calibration(threshold, torch.full_like(threshold, 9, dtype=torch.int64), **given)


def test_facts_say_what_it_is() -> None:
    maps = torch.tensor([[0.1, 0.2], [0.3, torch.inf]])
    said = made(maps, background=1, variant="pixel").summary(["sky", "road", "car"])
    lines = dict(line.split("  ", 1) for line in said.splitlines())
    facts = {title.strip(): text.strip() for title, text in lines.items()}
    assert facts["thresholds"] == "pixel, alpha 0.1, grid 2x2"
    assert (
        facts["their values"]
        == "0.200 in the middle, 0.110 to 0.290 for nine in ten, 25.0 % infinite"
    )
    assert facts["classes"] == "3: sky, road, car"
    assert facts["suppressed"].startswith("road,")
    calibration = made(maps, background=1, variant="pixel")
    assert facts["promised"] == calibration.guarantee()
    assert "suppressed    class 1," in calibration.summary()
    assert "suppressed" not in made(maps).summary()
    assert "all infinite" in made(torch.full((2, 2), torch.inf)).summary()
    plain = made(torch.full((1, 1), torch.inf), alpha=0.0, variant="every pixel").summary()
    assert plain.startswith("thresholds  none: every pixel gets its most probable class")
    with pytest.raises(ValueError, match=r"Calibration\.summary: expected 3 names, got 2"):
        made(maps).summary(["sky", "road"])


def test_a_notebook_shows_a_table_with_nothing_but_text() -> None:
    shown = made(torch.tensor([[0.1]]), variant="<b>")._repr_html_()
    assert shown.startswith("<table><caption>Calibration</caption>")
    assert "&lt;b&gt;, alpha 0.1" in shown
    assert "<b>" not in shown
    assert "http" not in shown


def test_a_picture_of_the_thresholds() -> None:
    pytest.importorskip("matplotlib")
    maps = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    maps[1, 2, 3] = torch.inf
    figure = made(maps).plot(["sky", "road", "car"])
    shown = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in shown] == ["sky", "road", "car"]
    for axis, values in zip(shown, maps, strict=True):
        drawn = torch.from_numpy(axis.images[0].get_array().data)
        assert torch.equal(drawn, values.nan_to_num(posinf=2.0))
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
    assert len([a for a in made(maps[0]).plot().axes if a.images]) == 1
    with pytest.raises(ValueError, match="a calibration with thresholds, got every pixel"):
        made(torch.full((1, 1), torch.inf), alpha=0.0, variant="every pixel").plot()


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "cpseg\[report\]"'):
        made(torch.tensor([[0.1]])).plot()
