"""cpseg inside loops built like UniMatch, UniMatch-V2 and AllSpark, from files on disk."""

from __future__ import annotations

import inspect
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support import clients, folders
from tests.support.folders import DataSet, command, select
from torch import Tensor, nn

import cpseg
from cpseg import OnlineThreshold, pseudo_label_loss, self_reliance_weight
from cpseg.files.id_lists import write_ids

DOCS = Path(__file__).resolve().parents[2] / "docs" / "integrations"
FEW, MANY = 6, 10
ALPHA = 0.2


@dataclass(frozen=True, repr=False)
class Files:
    """What `cpseg calibrate` and `cpseg label` left, and the lists that a user has."""

    data: DataSet
    labelled: Path
    unlabelled: Path
    out: Path

    @property
    def root(self) -> Path:
        return self.data.root

    @property
    def stage1(self) -> Path:
        return self.out / "stage1.txt"

    @property
    def ids(self) -> Path:
        return self.out / "ids.txt"


@pytest.fixture
def files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Files:
    data = folders.make(tmp_path / "data", count=FEW + MANY, sizes=((12, 16), (20, 14)))
    labelled = data.list_ids("labelled.txt", data.images[:FEW])
    unlabelled = data.list_ids("unlabelled.txt", data.images[FEW:])
    calibration, out = tmp_path / "c.safetensors", tmp_path / "out"
    some = data.options(ids=labelled, background=0, alpha=ALPHA)
    assert command(capsys, "calibrate", *some, "-o", calibration).code == 0
    some = data.options(ids=unlabelled, calibration=calibration, labelled=labelled)
    assert command(capsys, "label", *some, "-o", out).code == 0
    return Files(data, labelled, unlabelled, out)


def config(**changed: Any) -> dict[str, Any]:
    base = {"epochs": 80, "stop": 2, "batch_size": 2, "lr": 0.05, "crop_size": 17, "seed": 0}
    return {**base, "conf_thresh": 0.95, **changed}


def finite(history: list[dict[str, float]]) -> bool:
    return bool(history) and all(math.isfinite(v) for row in history for v in row.values())


# --- the files, read as those codebases read them ----------------------------------------------


def test_lists_and_masks_are_read_as_they_stand(files: Files) -> None:
    text = files.stage1.read_text()
    assert text.endswith("\n")
    assert "\n\n" not in text
    lines = text.splitlines()
    assert lines[:FEW] == files.labelled.read_text().splitlines()
    assert lines[FEW:] == files.ids.read_text().splitlines()
    assert len(lines) == FEW + MANY
    whole = clients.Listed(files.root, files.stage1, "whole", 0)
    for i, line in enumerate(lines):
        assert line.count(" ") == 1
        name, stored = line.split(" ")
        with Image.open(files.root / name) as image, Image.open(files.root / stored) as mask:
            assert mask.mode in ("L", "P")
            assert mask.size == image.size
        values = set(whole[i][1].unique().tolist())
        assert values <= {*range(clients.K), 255}


def test_masks_hold_the_selection_pixel_for_pixel(files: Files, tmp_path: Path) -> None:
    calibration = cpseg.Calibration.load(tmp_path / "c.safetensors")
    whole = clients.Listed(files.root, files.ids, "whole", 0)
    kept = 0
    for i, name in enumerate(files.data.images[FEW:]):
        img, mask, _ = whole[i]
        scores = files.data.scores[name]
        threshold = folders.nearest(calibration.threshold.numpy(), scores.shape[-2:])
        assert np.array_equal(mask.numpy(), select(scores, threshold, 0))
        assert img.shape[-2:] == mask.shape
        kept += int((mask != 255).sum())
    assert kept > 0


def test_their_crops_move_the_mask_with_the_image(tmp_path: Path) -> None:
    """An image whose colour is its class everywhere: at every crop the two still agree."""
    classes = np.kron(np.arange(12).reshape(3, 4) % clients.K, np.ones((8, 8), int))
    Image.fromarray(np.repeat(60 * classes[..., None], 3, -1).astype(np.uint8)).save(
        tmp_path / "image.png"
    )
    cpseg.files.write_mask(tmp_path / "mask.png", torch.from_numpy(classes))
    write_ids(tmp_path / "ids.txt", [("image.png", "mask.png")])
    data = clients.Listed(tmp_path, tmp_path / "ids.txt", "labelled", 33)
    random.seed(0)
    for _ in range(20):
        img, mask = data[0]
        assert img.shape == (3, 33, 33)
        valid = mask != 255
        seen = (img[0] * 255 / 60)[valid]
        share = (seen.round() == mask[valid]).float().mean()
        assert share > 0.8, "blurred only at the borders between classes"


@pytest.mark.parametrize("text", ["a.png  b.png\n", "a b.png c.png\n", "a.png b.png\n\n"])
def test_what_breaks_their_reader_is_refused_by_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / "ids.txt").write_text(text)
    data = clients.Listed(tmp_path, tmp_path / "ids.txt", "labelled", 8)
    with pytest.raises((OSError, IndexError)):
        data[len(data) - 1]
    with pytest.raises(ValueError, match="one pair a line, no blank line, one space between"):
        cpseg.files.read_ids(tmp_path / "ids.txt")


def test_a_long_labelled_list_is_cut_in_their_second_stage(files: Files) -> None:
    """Why `stage1.txt` goes to the supervised script alone."""
    data = clients.Listed(files.root, files.stage1, "labelled", 17, nsample=MANY)
    assert len(data) == MANY
    assert data.ids == files.stage1.read_text().splitlines()[:MANY]
    short = clients.Listed(files.root, files.labelled, "labelled", 17, nsample=MANY)
    assert len(short) == MANY


# --- Stage I and II of UniMatch ----------------------------------------------------------------


def test_stage_two_goes_on_from_stage_one(files: Files, tmp_path: Path) -> None:
    losses = clients.supervised(files.root, files.stage1, tmp_path, config(stop=5))
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    some = files.root, files.labelled, files.unlabelled, tmp_path
    cfg = config(stop=7, conf_thresh=0)
    history = clients.unimatch(*some, cfg, weight="schedule")
    assert len(history) == 2 * (MANY // 2), "epochs 5 and 6"
    assert finite(history)
    assert {row["mask"] for row in history} == {1.0}, "conf_thresh 0 keeps every pixel"
    assert clients.latest(tmp_path)["epoch"] == 6  # type: ignore[index]
    assert clients.unimatch(*some, cfg, weight="schedule") == [], "nothing is left to train"


@pytest.mark.parametrize("loop", ["unimatch", "unimatch_v2", "allspark"])
def test_a_weight_of_one_half_is_their_own_loss(files: Files, tmp_path: Path, loop: str) -> None:
    histories = []
    for weight in (None, 0.5):
        folder = tmp_path / f"{loop}{weight}"
        folder.mkdir()
        lists = files.root, files.labelled, files.unlabelled
        if loop == "allspark":
            history = clients.allspark(*lists, config(crop_size=33), weight=weight)
        else:
            train = getattr(clients, loop)
            history = train(*lists, folder, config(conf_thresh=0.3), weight=weight)
        assert finite(history)
        histories.append([row["loss"] for row in history])
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)


def test_the_weight_is_clamped_before_its_stage_and_takes_any_unit(tmp_path: Path) -> None:
    # The formula itself reaches 0.01 e^15 there.
    assert {self_reliance_weight(epoch, 80, start=60) for epoch in range(61)} == {0.01}
    steps = 250
    for epoch in (0, 60, 70, 79):
        by_step = self_reliance_weight(epoch * steps, 80 * steps, start=60 * steps)
        assert by_step == pytest.approx(self_reliance_weight(epoch, 80, start=60))


@pytest.mark.parametrize("loop", ["unimatch", "unimatch_v2", "allspark"])
def test_stage_two_is_all_but_supervised(files: Files, tmp_path: Path, loop: str) -> None:
    lists = files.root, files.labelled, files.unlabelled
    if loop == "allspark":
        history = clients.allspark(*lists, config(crop_size=33), weight="schedule")
    else:
        cfg = config(conf_thresh=0)
        history = getattr(clients, loop)(*lists, tmp_path, cfg, weight="schedule")
    assert finite(history)
    for row in history:  # epochs 0 and 1 come before the stage: the weight is 0.01
        want = 0.99 * row["loss_x"] + 0.01 * row["loss_u"]
        assert row["loss"] == pytest.approx(want, rel=1e-5)


# --- void, and 254 -----------------------------------------------------------------------------


def all_void(files: Files, tmp_path: Path) -> Path:
    pairs = []
    for name in files.data.images[:FEW]:
        size = files.data.labels[name].shape
        path = tmp_path / "void" / f"{Path(name).stem}.png"
        cpseg.files.write_mask(path, torch.full(size, 255))
        pairs.append((name, str(path)))
    write_ids(tmp_path / "void.txt", pairs)
    return tmp_path / "void.txt"


def test_a_batch_without_labels_breaks_their_loss_and_not_ours(
    files: Files, tmp_path: Path
) -> None:
    ids = all_void(files, tmp_path)
    theirs = clients.supervised(files.root, ids, tmp_path, config())
    assert all(map(math.isnan, theirs))
    ours = clients.supervised(files.root, ids, tmp_path, config(), patched=True)
    assert ours == [0.0, 0.0]
    state = clients.latest(tmp_path)
    assert state is not None
    assert all(value.isfinite().all() for value in state["model"].values())


def test_their_loss_and_ours_agree_where_there_are_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, clients.K, 9, 9, generator=generator)
    labels = torch.randint(clients.K, (2, 9, 9), generator=generator)
    labels[:, :4] = 255
    theirs = nn.CrossEntropyLoss(ignore_index=255)(logits, labels)
    assert pseudo_label_loss(logits, labels) == pytest.approx(float(theirs), rel=1e-6)


def test_an_online_threshold_survives_a_batch_without_labels(files: Files, tmp_path: Path) -> None:
    ids = all_void(files, tmp_path)
    cal = OnlineThreshold(clients.K, stride=1)
    cfg = config(stop=1)
    clients.unimatch(files.root, ids, files.unlabelled, tmp_path, cfg, cal=cal)
    assert cfg["conf_thresh"] == 0, "no score was ever seen"


# --- AllSpark ----------------------------------------------------------------------------------


def test_four_lines_bring_the_masks_into_stage_one(files: Files) -> None:
    lists = files.root, files.labelled, files.ids
    history = clients.allspark(*lists, config(crop_size=33, stop=12), masks_u=True)
    assert finite(history)
    early, late = history[: MANY // 2], history[-MANY // 2 :]
    assert np.mean([row["loss_u"] for row in late]) < np.mean([row["loss_u"] for row in early])


def test_a_gate_takes_unsure_pixels_out_of_the_target(files: Files) -> None:
    lists = files.root, files.labelled, files.unlabelled
    cal = OnlineThreshold(clients.K, alpha=0.7, stride=1)
    history = clients.allspark(*lists, config(crop_size=33, stop=4), cal=cal)
    assert finite(history)
    assert min(row["kept"] for row in history) < 1
    assert max(row["kept"] for row in history) > 0
    plain = clients.allspark(*lists, config(crop_size=33, stop=4))
    assert {row["kept"] for row in plain} == {1.0}


def test_a_patched_data_set_pads_with_255_alone(files: Files) -> None:
    theirs = clients.Listed(files.root, files.ids, "unlabelled", 65, views="allspark")
    assert isinstance(theirs[0], Tensor)
    patched = clients.Listed(
        files.root, files.ids, "unlabelled", 65, views="allspark", masks_u=True
    )
    for i in range(len(patched)):
        img, mask = patched[i]
        assert img.shape[-2:] == mask.shape == (65, 65)
        assert set(mask.unique().tolist()) <= {*range(clients.K), 255}
        assert (mask == 255).any(), "padded: 65 is larger than twice any side"


def test_their_padding_value_is_no_target() -> None:
    logits, mask = torch.zeros(1, clients.K, 2, 2), torch.full((1, 2, 2), 254)
    with pytest.raises((IndexError, RuntimeError)):
        nn.CrossEntropyLoss(ignore_index=255)(logits, mask)
    with pytest.raises(ValueError, match=r"got 254; map other values to ignore_index"):
        pseudo_label_loss(logits, mask)


def test_memory_is_bound_to_the_crop_and_halves_are_equal() -> None:
    model = clients.AllSpark(33).train()
    model.pseudo_prob_map = torch.zeros(2, clients.K, 33, 33)
    assert model(torch.zeros(4, 3, 33, 33)).shape == (4, clients.K, 33, 33)
    with pytest.raises(ValueError, match="too many values"):
        model(torch.zeros(3, 3, 33, 33))
    with pytest.raises(RuntimeError):
        model(torch.zeros(4, 3, 65, 65))


# --- a threshold that follows the model --------------------------------------------------------

LOOPS: list[Callable[..., list[dict[str, float]]]] = [clients.unimatch, clients.unimatch_v2]


def lists(files: Files) -> tuple[Path, Path, Path]:
    return files.root, files.labelled, files.unlabelled


@pytest.mark.parametrize("loop", LOOPS)
def test_three_lines_replace_the_fixed_number(
    files: Files, tmp_path: Path, loop: Callable[..., list[dict[str, float]]]
) -> None:
    cal = OnlineThreshold(clients.K, alpha=0.5, stride=1)
    history = loop(*lists(files), tmp_path, config(stop=3), cal=cal)
    assert finite(history)
    thresholds = [row["thresh"] for row in history]
    assert all(0 < threshold < 1 for threshold in thresholds)
    assert len(set(thresholds)) > len(thresholds) // 2


@pytest.mark.parametrize("loop", LOOPS)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    files: Files, tmp_path: Path, loop: Callable[..., list[dict[str, float]]]
) -> None:
    def start() -> OnlineThreshold:
        return OnlineThreshold(clients.K, alpha=0.5, stride=1, decay=0.9)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    straight = loop(*lists(files), whole, config(stop=4), cal=start())
    stopped = loop(*lists(files), parts, config(stop=2), cal=start())
    stopped += loop(*lists(files), parts, config(stop=4), cal=start())
    assert stopped == straight
    without = tmp_path / "without"
    without.mkdir()
    forgot = loop(*lists(files), without, config(stop=2), cal=start())
    state = torch.load(without / "latest.pth", weights_only=True)
    del state["cal"]
    torch.save(state, without / "latest.pth")
    forgot += loop(*lists(files), without, config(stop=4), cal=start())
    assert forgot != straight, "the state in the checkpoint is what made it so"


# --- the pages say what was run ----------------------------------------------------------------


SCRIPTS: dict[str, list[Any]] = {
    "unimatch": [clients.supervised, clients.unimatch],
    "unimatch-v2": [clients.supervised, clients.unimatch_v2],
    # The loop of AllSpark saves nothing here; its lines for that are UniMatch's.
    "allspark": [clients.supervised, clients.Listed, clients.allspark, clients.unimatch],
}
IMPORT = "from cpseg import OnlineThreshold"
CAL = "cal = OnlineThreshold(cfg['nclass'], alpha=0.2)"
# What the loops here have in another form, by how it begins: heads of loops, settings, what
# chooses the best checkpoint, what is logged and saved beside the weights, one baseline's loss.
ELSEWHERE = (
    *("import math", IMPORT, CAL.removesuffix(")"), "cfg['batch_size']", "cfg['conf_thresh'] = 0"),
    *("for epoch in range(epoch + 1, ", "for i, ((img_x, mask_x), (img_u_s, mask_u))", "img_u_s, "),
    *("previous_best", "best_epoch", "model_ema.load_state_dict(", "writer.add_scalar("),
    *("for k, value in ", "mask_ratio = ", "loss = (1 - w) * loss_x + w * loss_u_w_fp"),
    *("loss_u_s1 = ", "loss_u_s2 = ", "loss_u_w_fp = "),  # per class
)


def added(page: Path) -> list[str]:
    """Lines that a diff of the page adds."""
    blocks = re.findall(r"```diff\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line[1:] for line in lines if line.startswith("+")]


def plain(line: str) -> str:
    return re.sub(r"\s+", " ", line.replace('"', "'")).strip()


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_the_pages_add_is_what_the_loops_here_run(name: str) -> None:
    sources = [inspect.getsource(script) for script in SCRIPTS[name]]
    run = {plain(line) for source in sources for line in source.splitlines()}
    found = [plain(line) for line in added(DOCS / f"{name}.md")]
    assert [line for line in found if line not in run and not line.startswith(ELSEWHERE)] == []
    weight = next(line for line in found if line.startswith("w = "))
    safe = next(line for line in found if "else 0 * pred" in line)
    threshold = next(line for line in found if "cal.update(" in line)
    assert {weight, safe, threshold} <= run, "what matters most"
    here: dict[str, Any] = {"cfg": {"nclass": clients.K}}
    for line in [line for line in found if line in (IMPORT, CAL)]:
        exec(line, here)
    assert isinstance(here["cal"], OnlineThreshold)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_weight_of_the_pages_is_ours_to_the_bit(name: str) -> None:
    """For every length of a config and every epoch; the pages need no cpseg for it."""
    lines = [line.strip() for line in added(DOCS / f"{name}.md")]
    start, weight = (next(x for x in lines if x.startswith(word)) for word in ("start =", "w ="))
    for epochs in (10, 20, 30, 60, 80, 180, 240):
        for epoch in range(epochs):
            here: dict[str, Any] = {"math": math, "cfg": {"epochs": epochs}, "epoch": epoch}
            exec(f"{start}\n{weight}", here)
            assert here["w"] == self_reliance_weight(epoch, epochs, start=here["start"])
    assert here["start"] == 180


@pytest.mark.parametrize("name", ["unimatch", "unimatch-v2"])
def test_comparisons_per_class_take_the_class_of_the_mixed_mask(name: str) -> None:
    """The lines of the page, run on three views, against a loop over pixels."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(2, clients.K, 6, 6)))
    labels = torch.from_numpy(rng.integers(0, clients.K, (2, 6, 6)))
    threshold = OnlineThreshold(clients.K, alpha=0.6, per_class=True, stride=1)
    limits = threshold.update(logits, labels).threshold()
    assert len(limits.unique()) == clients.K
    here: dict[str, Any] = {"cfg": {"conf_thresh": limits}}
    for view in ("", "_cutmixed1", "_cutmixed2"):
        here[f"mask_u_w{view}"] = torch.from_numpy(rng.integers(0, clients.K, (2, 6, 6)))
        here[f"conf_u_w{view}"] = torch.from_numpy(rng.random((2, 6, 6)))
        here[f"ignore_mask{view}"] = torch.from_numpy(255 * rng.integers(0, 2, (2, 6, 6)))
    views = {"loss_u_s1": "_cutmixed1", "loss_u_s2": "_cutmixed2", "loss_u_w_fp": ""}
    lines = [line.strip() for line in added(DOCS / f"{name}.md") if "conf_thresh'][" in line]
    losses = [line for line in lines if line.startswith("loss_u_")]
    assert len(losses) == len(lines) - 1 == (3 if name == "unimatch" else 2)
    for line in losses:
        loss = line.split(" ")[0]
        here[loss] = torch.ones(2, 6, 6)
        exec(line, here)
        mask, conf, ignored = (
            here[f"{part}{views[loss]}"] for part in ("mask_u_w", "conf_u_w", "ignore_mask")
        )
        for at in np.ndindex(2, 6, 6):
            kept = conf[at] >= limits[mask[at]] and ignored[at] != 255
            assert here[loss][at] == float(kept)
