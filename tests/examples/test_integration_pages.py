"""The code of the pages for other training code runs as it stands, on a tiny data set.

Only sizes are smaller than on the pages, and a random network stands in for the download.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import folders

from cpseg.cli.command import main

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "integrations"
EXAMPLE = ROOT / "examples" / "lightning" / "pseudo_labels.py"
SMALLER = {"512": "32", "max_steps=1000": "max_steps=3", "imgsz=32": "imgsz=64"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``data``, ``scores`` and ``classes.txt``, as the pages name them."""
    made = folders.make(tmp_path / "data", count=10, sizes=((40, 48), (48, 40)))
    made.list_ids("labelled.txt", made.images[:4])
    made.list_ids("unlabelled.txt", made.images[4:8], masks=False)
    made.list_ids("validation.txt", made.images[8:])
    made.probs.rename(tmp_path / "scores")
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def blocks(page: str, kind: str) -> list[str]:
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    found = re.findall(rf"^```{kind}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for old, new in SMALLER.items():
        found = [block.replace(old, new) for block in found]
    return found


def type_commands(page: str) -> int:
    """Run every command of cpseg on a page."""
    count = 0
    for block in blocks(page, ""):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split()
            if words[:1] == ["cpseg"]:
                assert main(words[1:]) == 0, line
                count += 1
    return count


def run_blocks(page: str) -> str:
    """Run the blocks of a page one after the other, in one module; what they print."""
    module = types.ModuleType(f"page_{page}")
    sys.modules[module.__name__] = module
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for number, block in enumerate(blocks(page, "python")):
            exec(compile(block, f"{page}.md, block {number}", "exec"), module.__dict__)
    return out.getvalue()


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """SegFormer by name is a tiny random one with the same options."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    def random(name: str, **options: Any) -> torch.nn.Module:
        assert name == "nvidia/mit-b0"
        sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "decoder_hidden_size": 16}
        sizes["num_attention_heads"] = [1, 1, 2, 2]
        return SegformerForSemanticSegmentation(SegformerConfig(**sizes, **options))

    monkeypatch.setattr(SegformerForSemanticSegmentation, "from_pretrained", random)


def test_pytorch(place: Path) -> None:
    assert type_commands("pytorch") == 2
    said = run_blocks("pytorch")
    assert "torch.Size([4, 3, 32, 32]) torch.Size([4, 32, 32])" in said
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss ([\d.]+)", said)]
    assert len(losses) == 2
    assert all(0 < loss < 5 for loss in losses)
    assert 0 <= float(said.split("mIoU ")[1]) <= 1


def test_hugging_face(place: Path, no_download: None) -> None:
    pytest.importorskip(
        "accelerate", reason="the Trainer needs it: pip install transformers[torch]"
    )
    type_commands("pytorch")
    said = run_blocks("huggingface")
    assert said.count("train_loss") == 3


@pytest.mark.parametrize(
    ("page", "config"), [("mmsegmentation", "dataset.py"), ("ultralytics", "data.yaml")]
)
def test_commands_of_pages_for_layouts(place: Path, page: str, config: str) -> None:
    type_commands("pytorch")
    assert type_commands(page) == 1
    (out,) = place.glob("labels_*")
    assert (out / config).exists()
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    for name in re.findall(r"^\| `([^|]*)` \|", text, re.MULTILINE):
        for path in name.split("`, `"):
            assert (out / path).exists(), path


class FakeTrainer:
    """Calls the hooks in the order in which Lightning does, on one device."""

    def __init__(self, max_epochs: int, **settings: object) -> None:
        self.max_epochs = max_epochs

    def fit(self, model: Any, data: Any) -> None:
        data.setup("fit")
        optimizer = model.configure_optimizers()
        for _ in range(self.max_epochs):
            for index, batch in enumerate(data.train_dataloader()):
                optimizer.zero_grad()
                model.training_step(batch, index).backward()
                optimizer.step()
            model.on_validation_epoch_start()
            with torch.no_grad():
                for index, batch in enumerate(data.val_dataloader()):
                    model.validation_step(batch, index)
            model.on_validation_epoch_end()


class FakeModule(torch.nn.Module):
    def log(self, name: str, value: torch.Tensor, **settings: object) -> None:
        self.__dict__.setdefault("logged", {}).setdefault(name, []).append(float(value.detach()))

    def all_gather(self, value: torch.Tensor) -> torch.Tensor:
        return value


@pytest.fixture(params=["stub", "real"])
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's module, with Lightning itself where it is installed and with a stub."""
    if request.param == "real":
        pytest.importorskip("lightning", reason="pip install lightning")
    else:
        stub: Any = types.ModuleType("lightning")
        stub.LightningDataModule, stub.LightningModule = object, FakeModule
        stub.Trainer = FakeTrainer
        monkeypatch.setitem(sys.modules, "lightning", stub)
    spec = importlib.util.spec_from_file_location("pseudo_labels", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pseudo_labels", module)
    spec.loader.exec_module(module)
    return module


def test_lightning(place: Path, example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    type_commands("pytorch")
    run_blocks("lightning")
    state = sys.modules["page_lightning"].__dict__
    confusion = state["model"].confusion
    true = sum(int((row["labels"] != 255).sum()) for row in state["data"].validation_rows)
    assert int(confusion.sum()) == true, "every labelled validation pixel once"
    assert len(state["data"].train_rows) == 8


def test_the_command_of_the_lightning_example(
    place: Path, example: Any, no_download: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    type_commands("pytorch")
    (command,) = (b for b in blocks("lightning", "") if "pseudo_labels.py" in b)
    words = command.replace("\\\n", " ").split()[2:]
    words[words.index("--epochs") + 1] = "1"
    example.main([*words, "--crop", "32", "--workers", "0"])
