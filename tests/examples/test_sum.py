"""The SUM example, run on digits with a tiny random SAM."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.support.helpers import modules, seeded
from torch import Tensor

from cpseg import TaskPrompt, sum_loss
from cpseg._internal.safe_files import read_tensors, write_tensors
from cpseg.files.masks import write_mask

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
NAMES = (
    "checkpoints",
    "coarse",
    "digits_data",
    "refinement",
    "rounds",
    "sam_data",
    "sam_model",
    "train",
)
SHORT = ["--model", "tiny", "--data", "digits", "--digits", "3", "--masks", "2"]
SHORT += ["--steps", "4", "--refine-steps", "6", "--every", "2"]


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    with modules("sum", NAMES) as found:
        yield found


@pytest.fixture(scope="module")
def finished(example: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A whole run: its folder and what it said."""
    out, said = tmp_path_factory.mktemp("sum"), []
    assert example.train.main(["all", *SHORT, "--out", str(out)], said.append) == 0
    return SimpleNamespace(out=out, said=said)


@pytest.fixture
def tiny(example: SimpleNamespace) -> torch.nn.Module:
    return example.sam_model.load("tiny", 0).eval()


@pytest.fixture
def unmeasured(example: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuning without its two tables, which take longer than its steps."""
    monkeypatch.setattr(example.train, "table", lambda *given: None)


def read(example: SimpleNamespace, finished: SimpleNamespace, part: str, number: int = 0):
    folder = finished.out / "digits"
    pair = example.sam_data.read_list(folder, part)[number]
    if part == "unlabelled":
        return example.sam_data.read_unlabelled(folder, pair, 128)
    return example.sam_data.read_labelled(folder, pair, 128, coarse=part == "labelled")


def weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["modules"]


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def copied(finished: SimpleNamespace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.out, tmp_path / "copy"))


def test_the_whole_command(example, finished):
    text = "\n".join(finished.said)
    assert re.search(r"refine: \d+ masks of 3 images", text)
    assert "refine: step 6 of 6, loss" in text
    assert "uncertainty: 3 maps written, 0 were there" in text
    assert "finetune-sum: step 4 of 4, loss" in text
    for when in ("before", " after"):
        for name in ("mIoU ", "mBIoU"):
            row = re.search(rf"^{when}, {name} after 1..6 points:((?: +\d+\.\d){{6}})$", text, re.M)
            assert row, text
            assert all(0 <= float(value) <= 100 for value in row[1].split())
    maps = sorted((finished.out / "uncertainty-sum" / "images").iterdir())
    assert [path.name for path in maps] == [f"unlabelled_{k:04d}.safetensors" for k in range(3)]
    model = example.sam_model.load(str(finished.out / "finetune-sum"), 0)
    own = weights(finished.out / "finetune-sum.pt")
    assert all(torch.equal(own[f"sam.{k}"], v) for k, v in model.state_dict().items())
    task_prompt = TaskPrompt(3, 64)
    start = task_prompt.embedding.weight.clone()
    path = finished.out / "finetune-sum" / "task_prompt.safetensors"
    task_prompt.load_state_dict(load_file(path))
    assert torch.equal(own["task_prompt.embedding.weight"], task_prompt.embedding.weight)
    assert not torch.equal(start, task_prompt.embedding.weight)


def test_only_prompt_encoder_and_decoder_learn_to_refine(tiny, finished):
    start, end = tiny.state_dict(), weights(finished.out / "refine.pt")
    moved = {name for name in start if not torch.equal(start[name], end[f"sam.{name}"])}
    assert {name.split(".")[0] for name in moved} == {"prompt_encoder", "mask_decoder"}
    end = weights(finished.out / "finetune-sum.pt")
    moved = {name for name in start if not torch.equal(start[name], end[f"sam.{name}"])}
    assert {"vision_encoder", "prompt_encoder", "mask_decoder"} == {n.split(".")[0] for n in moved}


@pytest.mark.nightly
@pytest.mark.usefixtures("unmeasured")
def test_a_stopped_run_ends_the_same(example, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished.out / "digits", out / "digits")

    def until(words: str):
        def say(line: str) -> None:
            if words in line:
                raise KeyboardInterrupt

        return say

    stops = ("refine: step 2 of", "refine: step 4 of", "maps written", "finetune-sum: step 2 of")
    for words in stops:
        with pytest.raises(KeyboardInterrupt):
            example.train.main(["all", *SHORT, "--out", str(out)], until(words))
    said: list[str] = []
    assert example.train.main(["all", *SHORT, "--out", str(out)], said.append) == 0
    assert "uncertainty: 0 maps written, 3 were there" in said
    assert "finetune-sum: goes on after step 2 of 4" in said
    for name in ("refine.pt", "finetune-sum.pt"):
        assert equal(weights(out / name), weights(finished.out / name)), name


def test_a_lost_map_is_written_again_and_nothing_else(example, finished, tmp_path):
    out = copied(finished, tmp_path)
    lost = out / "uncertainty-sum" / "images" / "unlabelled_0001.safetensors"
    before = lost.read_bytes()
    lost.unlink()
    said: list[str] = []
    assert example.train.main(["uncertainty", *SHORT, "--out", str(out)], said.append) == 0
    assert said[-1] == "uncertainty: 1 maps written, 2 were there"
    assert lost.read_bytes() == before


def change(path: Path, name: str) -> None:
    """Another tensor in a file of tensors, with the same metadata."""
    tensors, about = read_tensors(path)
    write_tensors(path, tensors | {name: tensors[name] * 0.9}, about)


def test_maps_of_changed_inputs_are_written_again(example, finished, tmp_path):
    out = copied(finished, tmp_path)

    def written() -> str:
        said: list[str] = []
        assert example.train.main(["uncertainty", *SHORT, "--out", str(out)], said.append) == 0
        return said[-1]

    names = [f"images/unlabelled_{k:04d}" for k in range(3)]
    maps = [out / "uncertainty-sum" / f"{name}.safetensors" for name in names]
    before = [path.read_bytes() for path in maps]
    change(out / "digits" / "coarse" / f"{names[1]}.safetensors", "logits")
    assert written() == "uncertainty: 1 maps written, 2 were there"
    same = [path.read_bytes() == old for path, old in zip(maps, before, strict=True)]
    assert same == [True, False, True]
    image = out / "digits" / f"{names[2]}.png"
    with Image.open(image) as old:
        turned = old.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned.save(image)
    assert written() == "uncertainty: 1 maps written, 2 were there"
    state = torch.load(out / "refine.pt", weights_only=True)
    state["modules"]["sam.mask_decoder.iou_token.weight"] += 1
    torch.save(state, out / "refine.pt")
    assert written() == "uncertainty: 3 maps written, 0 were there"
    assert written() == "uncertainty: 0 maps written, 3 were there"


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("kind", ["maps", "coarse_masks"])
def test_a_checkpoint_of_other_inputs_is_refused(example, finished, tmp_path, capsys, kind):
    out = copied(finished, tmp_path)
    said: list[str] = []
    args = ["finetune", *SHORT, "--out", str(out)]
    assert example.train.main(args, said.append) == 0
    assert "finetune-sum: goes on after step 4 of 4" in said
    folder, name = (
        (out / "uncertainty-sum", "uncertainty")
        if kind == "maps"
        else (out / "digits" / "coarse", "logits")
    )
    change(folder / "images" / "unlabelled_0002.safetensors", name)
    capsys.readouterr()
    assert example.train.main(args) == 2
    error = capsys.readouterr().err
    assert f"expected a checkpoint of the same settings, got another {kind};" in error
    assert error.count("\n") == 1


def test_fine_tuning_gets_its_masks_maps_and_tasks(example, finished, tmp_path, monkeypatch):
    out = copied(finished, tmp_path)
    (out / "finetune-sum.pt").unlink()
    for k in range(3):  # a constant for each mask tells whose map it is
        path = out / "uncertainty-sum" / "images" / f"unlabelled_{k:04d}.safetensors"
        tensors, about = read_tensors(path)
        rows = torch.arange(len(tensors["uncertainty"])).half() / 64
        maps = rows[:, None, None].expand_as(tensors["uncertainty"])
        write_tensors(path, {"uncertainty": maps}, about)
    whole = {e.name: e for k in range(3) for e in [read(example, finished, "unlabelled", k)]}
    calls, measured = [], []
    backward, evaluate = example.train.backward, example.train.evaluate

    def learn(model, task_prompt, examples, uncertainties, tasks, generator):
        calls.append((examples, uncertainties, tasks))
        return backward(model, task_prompt, examples, uncertainties, tasks, generator)

    def measure(model, task_prompt, image, task):
        measured.append((task_prompt, image.name, task))
        return evaluate(model, task_prompt, image, task)

    monkeypatch.setattr(example.train, "backward", learn)
    monkeypatch.setattr(example.train, "evaluate", measure)
    args = ["finetune", *SHORT, "--task", "1", "--out", str(out)]
    assert example.train.main(args, lambda line: None) == 0
    assert len(calls) == 4
    taken = []
    for (x, u), (of_x, of_u), tasks in calls:
        assert tasks == [1, 0]
        assert x.name.startswith("images/labelled_")
        assert u.name.startswith("images/unlabelled_")
        assert x.coarse is None
        assert of_x is None
        assert len(x.masks) == len(u.masks) == len(of_u) == 2
        for mask, unsure in zip(u.masks, of_u, strict=True):
            (row,) = (k for k, m in enumerate(whole[u.name].masks) if torch.equal(m, mask))
            taken.append(row)
            torch.testing.assert_close(unsure, torch.full((128, 128), row / 64))
    assert max(taken) >= 2  # others than the first two masks of an image
    assert len(measured) == 6
    assert {task for _, _, task in measured} == {1}
    assert all(name.startswith("images/val_") for _, name, _ in measured)
    assert all(task_prompt is not None for task_prompt, _, _ in measured)


def test_rates_and_weight_decay_of_the_options(example, finished, tmp_path, monkeypatch):
    made: dict[str, tuple[torch.optim.Optimizer, dict]] = {}

    def note(title, path, modules, optimizer, backward, *, settings, **more):
        made[title] = (optimizer, settings)

    monkeypatch.setattr(example.train, "train", note)
    out = copied(finished, tmp_path)
    more = ["--lr", "0.01", "--layer-decay", "0.5", "--weight-decay", "0.03", "--out", str(out)]
    for command in ("refine", "finetune"):
        assert example.train.main([command, *SHORT, *more], lambda line: None) == 0
    rates = {"refine": [0.01], "finetune-sum": [0.01 * 0.5**k for k in range(4)]}
    assert made.keys() == rates.keys()
    for name, (optimizer, settings) in made.items():
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates[name])
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.03}
        assert (settings["lr"], settings["weight_decay"]) == (0.01, 0.03)
    assert made["finetune-sum"][1]["layer_decay"] == 0.5


def test_a_stop_leaves_no_old_digits(example, tmp_path, monkeypatch):
    make, counts = example.digits_data.make, {"labelled": 1, "unlabelled": 1, "val": 1}
    make(tmp_path, counts, 0)
    image = tmp_path / "images" / "val_0000.png"
    first = image.read_bytes()

    def stop(*some: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(example.digits_data, "write_ids", stop)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, counts, 1)
    image.write_bytes(b"of the run that was stopped")
    make(tmp_path, counts, 0)
    assert image.read_bytes() == first


@pytest.mark.parametrize("share", ["70", "0", "-0.1", "1.01", "nan"])
def test_nms_is_a_share(example, tmp_path, capsys, share):
    assert example.train.main(["coarse", *SHORT, f"--nms={share}", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    expected = f"train.py: --nms: expected a share in (0, 1], got {float(share)}; "
    assert error.startswith(expected)
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.nightly
@pytest.mark.usefixtures("unmeasured")
def test_every_uncertainty_and_no_task_prompt(example, finished, tmp_path):
    ends = {"sum": weights(finished.out / "finetune-sum.pt")}
    for kind in ("confidence", "discrepancy", "none"):
        out = tmp_path / kind
        shutil.copytree(finished.out / "digits", out / "digits")
        more = ["--uncertainty", kind, "--no-task-prompt", "--steps", "2", "--out", str(out)]
        assert example.train.main(["all", *SHORT, *more], lambda line: None) == 0
        assert not (out / "refine.pt").exists()
        assert (out / f"uncertainty-{kind}").is_dir() == (kind != "none")
        ends[kind] = weights(out / f"finetune-{kind}-no-task.pt")
        assert not any(name.startswith("task_prompt") for name in ends[kind])
    names = list(ends)
    for k, left in enumerate(names):
        for right in names[k + 1 :]:
            name = "sam.mask_decoder.iou_prediction_head.proj_in.weight"
            assert not torch.equal(ends[left][name], ends[right][name]), (left, right)


def test_uncertainty_maps(example, finished, tiny):
    image = read(example, finished, "unlabelled")
    coarse = example.sam_model.shrink(image.coarse, 64)[:, 0].double().numpy()
    p = 1 / (1 + np.exp(-coarse))
    tiny.load_state_dict(
        {k[4:]: v for k, v in weights(finished.out / "refine.pt").items() if k[:4] == "sam."}
    )
    with torch.no_grad():
        embedding = example.sam_model.encode(tiny, image.pixels[None])
        refined, _ = example.refinement.refine(tiny, embedding, image)
    r = 1 / (1 + np.exp(-refined[:, 0].double().numpy()))
    path = finished.out / "uncertainty-sum" / "images" / "unlabelled_0000.safetensors"
    written = read_tensors(path)[0]["uncertainty"]
    assert written.dtype == torch.float16
    np.testing.assert_allclose(written.double().numpy(), abs(p - r), atol=6e-4)
    found = example.refinement.uncertainty_of("confidence", tiny, image)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -(np.nan_to_num(p * np.log2(p)) + np.nan_to_num((1 - p) * np.log2(1 - p)))
    np.testing.assert_allclose(found.double().numpy(), entropy, atol=6e-4)


def test_refinement_uses_mask_box_and_point(example, finished, tiny):
    image = read(example, finished, "unlabelled")
    embedding = example.sam_model.encode(tiny, image.pixels[None])
    logits, _ = example.refinement.refine(tiny, embedding, image)
    narrow = image.coarse.clone()
    narrow[:, :, image.points[:, 0].long().min() :] = -20  # another box
    for other in (
        image._replace(points=image.points + 9),
        image._replace(coarse=image.coarse / 2),
        image._replace(coarse=narrow),
    ):
        changed, _ = example.refinement.refine(tiny, embedding, other)
        assert not torch.equal(logits, changed)


def test_pairs_for_refinement(example, finished):
    image = read(example, finished, "labelled")
    truth, coarse = (image.masks == 1).numpy(), (image.coarse > 0).numpy()
    iou = [(t & c).sum() / (t | c).sum() for t, c in zip(truth, coarse, strict=True)]
    assert 0.7 < min(iou) < 0.95  # the digits' coarse masks are wrong, but not too wrong
    order = np.argsort(iou)
    for least in (0.0, (iou[order[0]] + iou[order[1]]) / 2, 1.0):
        expected = [k for k, value in enumerate(iou) if value >= least]
        assert example.refinement.good_pairs(image, least).tolist() == expected


def test_rounds_of_training(example, finished, tiny, monkeypatch):
    x, u = read(example, finished, "labelled"), read(example, finished, "unlabelled")
    x = example.sam_data.take(x, torch.tensor([0]))  # fewer masks than the other
    x.masks[:, 100:][x.masks[:, 100:] == 0] = 255
    assert len(u.masks) > 1
    task_prompt = TaskPrompt(3, 64)
    task_prompt.embedding.weight.data.normal_(generator=seeded(0))
    calls, answers, real = [], [], example.rounds.predict

    def spy(model, embedding, prompts, masks=None, **more):
        calls.append((embedding.detach(), prompts, masks, more))
        logits, iou = real(model, embedding, prompts, masks, **more)
        if more["several"]:  # a random model's candidates are all the same
            logits = logits + torch.tensor([1.0, -1.0, 0.0])[:, None, None]
            iou = iou + torch.rand(iou.shape, generator=seeded(7))
        found = (logits, iou)
        answers.append([tensor.detach() for tensor in found])
        return found

    monkeypatch.setattr(example.rounds, "predict", spy)
    unsure = torch.rand(u.masks.shape, generator=seeded(4))
    loss = example.rounds.backward(tiny, task_prompt, [x, u], [None, unsure], [2, 0], seeded(3))
    assert len(calls) == 7
    per_mask = losses_by_hand(example, answers, [x, u], torch.cat([0 * x.masks.float(), unsure]))
    by_image = (per_mask[:, : len(x.masks)].mean() + per_mask[:, len(x.masks) :].mean()) / 2
    torch.testing.assert_close(loss, by_image)
    assert abs(by_image - per_mask.mean()) > 0.01  # every image counts alike, not every mask
    assert [prompts.points.shape[1] for _, prompts, _, _ in calls] == [1, 2, 3, 4, 5, 6, 6]
    assert [more["several"] for *_, more in calls] == [True] + 6 * [False]
    assert calls[0][2] is None
    assert all(masks.shape[1:] == (1, 64, 64) for _, _, masks, _ in calls[1:])
    candidates, iou = answers[0]
    believed = [mask[score.argmax()] for mask, score in zip(candidates, iou, strict=True)]
    assert torch.equal(calls[1][2][:, 0], torch.stack(believed))
    assert not torch.equal(calls[1][2], candidates[:, :1])
    first, later = calls[0][0], calls[1][0]
    task = torch.tensor([2] * len(x.masks) + [0] * len(u.masks))
    expected = task_prompt.embedding(task)[:, :, None, None]
    torch.testing.assert_close(first - later, expected.expand_as(first), atol=1e-5, rtol=0)
    assert all(torch.equal(embedding, later) for embedding, *_ in calls[1:])
    for rows in (slice(0, len(x.masks)), slice(len(x.masks), None)):  # each its own image
        assert (later[rows] == later[rows][:1]).all()
    assert not torch.equal(later[0], later[-1])
    assert torch.equal(task_prompt.embedding.weight.grad[1], torch.zeros(64))
    assert (task_prompt.embedding.weight.grad[[0, 2]] != 0).any(1).all()
    masks = torch.cat([x.masks, u.masks])
    targets = masks == 1
    prompts = calls[-1][1]
    for row in range(len(targets)):  # a positive point lies in the mask, a negative one outside
        for k in range(6):
            if k == 0 and prompts.boxed[row]:
                continue
            column, line = prompts.points[row, k].long().tolist()
            assert bool(targets[row, line, column]) == bool(prompts.labels[row, k])
            assert masks[row, line, column] != 255
            if k > 0:  # and both where the model's own choice of the round before is wrong
                large = example.sam_model.enlarge(calls[k][2][row : row + 1], 128)[0, 0]
                assert bool(large[line, column] > 0) != bool(targets[row, line, column])


def losses_by_hand(example, answers, examples, unsure: Tensor) -> Tensor:
    """Loss of every round and mask; in the first round that of the best of the candidates."""
    masks, rounds = torch.cat([e.masks for e in examples]), []
    for logits, iou in answers:
        large = example.sam_model.enlarge(logits, 128)
        rows = []
        for k, mask in enumerate(masks):
            here = {"uncertainty": unsure[k : k + 1], "reduction": "none"}
            own = [
                sum_loss(large[k : k + 1, c : c + 1], mask[None], **here).item()
                for c in range(large.shape[1])
            ]
            c = int(np.argmin(own))
            assert len(own) == 1 or max(own) - min(own) > 1e-4
            here["predicted_iou"] = iou[k : k + 1, c]
            rows.append(sum_loss(large[k : k + 1, c : c + 1], mask[None], **here))
        rounds.append(torch.cat(rows))
    return torch.stack(rounds)


def gradients(example, model, examples, uncertainties) -> list[Tensor]:
    model.zero_grad()
    example.rounds.backward(model, None, examples, uncertainties, [2, 0], seeded(5))
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_an_uncertain_pseudo_label_teaches_nothing(example, finished, tiny):
    x, u = read(example, finished, "labelled"), read(example, finished, "unlabelled")
    wrong = u.masks.clone()
    boxes = example.refinement.masks_to_boxes(wrong == 1).long()
    for mask, (x0, y0, x1, y1) in zip(wrong, boxes.tolist(), strict=True):
        mask[y0 + 4 : y1 - 3, x0 + 4 : x1 - 3] ^= 1  # another inside in the same box
    other = u._replace(masks=wrong)
    one = torch.ones(u.masks.shape)
    left = gradients(example, tiny, [x, u], [None, one])
    right = gradients(example, tiny, [x, other], [None, one])
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    sure = [gradients(example, tiny, [x, e], [None, 0 * one]) for e in (u, other)]
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(*sure, strict=True))


def test_rows_with_and_without_a_box(example, finished, tiny):
    image = read(example, finished, "labelled")
    model = example.sam_model
    embedding = model.encode(tiny, image.pixels[None])
    masks = image.masks == 1
    count = len(masks)
    boxed = torch.arange(count) % 2 == 0
    boxes = example.refinement.masks_to_boxes(masks)
    prompts = model.Prompted(image.points[:, None], torch.ones(count, 1).long(), boxes, boxed)
    prompts = prompts.add(image.points.flip(0), torch.zeros(count).long())
    before = torch.randn(count, 1, 64, 64, generator=seeded(1))
    logits, iou = model.predict(tiny, embedding.expand(count, -1, -1, -1), prompts, before)
    for k in range(count):
        first = 1 if boxed[k] else 0
        out = tiny(
            image_embeddings=embedding,
            input_points=prompts.points[k][None, None, first:],
            input_labels=prompts.labels[k][None, None, first:],
            input_boxes=boxes[k][None, None] if boxed[k] else None,
            input_masks=before[k][None],
            multimask_output=False,
        )
        torch.testing.assert_close(logits[k], out.pred_masks[0, 0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(iou[k], out.iou_scores[0, 0], atol=1e-5, rtol=1e-4)


def test_evaluation_finds_a_perfect_model(example, finished, tiny, monkeypatch):
    image = read(example, finished, "val")
    image.masks[:, :40][image.masks[:, :40] != 1] = 255  # what is void counts for nothing
    truth = torch.nn.functional.interpolate(
        (image.masks == 1).float()[:, None], size=(128, 128), mode="nearest"
    )
    void = (image.masks == 255).float()[:, None]
    assert void.any()
    embeddings, rounds = [], []

    def oracle(model, embedding, prompts, masks=None, *, several=False):
        embeddings.append(embedding)
        rounds.append(prompts)
        logits = 20 * torch.maximum(truth, void) - 10
        if several:  # the second candidate is the right one
            logits = torch.cat([-logits, logits, -logits], 1)
        return logits, torch.zeros(logits.shape[:2])

    monkeypatch.setattr(example.rounds, "predict", oracle)
    task_prompt = TaskPrompt(3, 64)
    task_prompt.embedding.weight.data.normal_(generator=seeded(0))
    found = example.rounds.evaluate(tiny, task_prompt, image, 1)
    assert found.iou.tolist() == [1.0] * 6
    assert found.boundary_iou.tolist() == [1.0] * 6
    assert len(rounds) == 6
    assert (rounds[-1].labels[:, 1:] == -1).all()  # nothing to correct
    own = task_prompt.embedding.weight[1][:, None, None].expand_as(embeddings[0])
    torch.testing.assert_close(embeddings[0] - embeddings[1], own, atol=1e-5, rtol=0)
    assert all(torch.equal(embedding, embeddings[1]) for embedding in embeddings[2:])


def test_learning_rates_fall_with_depth(example, tiny):
    groups = example.sam_model.layer_groups(tiny, 1e-5, 0.8, TaskPrompt(3, 64))
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    learnt = [name for name, p in tiny.named_parameters() if id(p) in rate]
    assert sum(len(g["params"]) for g in groups) == len(rate) == 1 + len(learnt)
    left = {name for name, _ in tiny.named_parameters()} - set(learnt)
    assert all(name.endswith(".positional_embedding") for name in left)
    encoder = tiny.vision_encoder
    for module, power in (
        (tiny.mask_decoder, 0),
        (tiny.prompt_encoder, 0),
        (encoder.neck, 0),
        (encoder.layers[1], 1),
        (encoder.layers[0], 2),
        (encoder.patch_embed, 3),
    ):
        rates = {rate[id(p)] for p in module.parameters() if p.requires_grad}
        assert [*rates] == [pytest.approx(1e-5 * 0.8**power)]
    assert rate[id(encoder.pos_embed)] == pytest.approx(1e-5 * 0.8**3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One image of 40 x 20 pixels with two objects in each list."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    Image.fromarray(rng.integers(0, 256, (40, 20, 3), dtype=np.uint8)).save(
        tmp_path / "images" / "a.png"
    )
    labels = torch.zeros(40, 20, dtype=torch.uint8)
    labels[4:12, 4:12], labels[20:36, 10:16], labels[38:] = 1, 2, 255
    write_mask(tmp_path / "masks" / "a.png", labels)
    logits = torch.stack([labels == 1, labels == 2]).float() * 8 - 4
    points = torch.tensor([[7, 8], [13, 28]])
    write_tensors(
        tmp_path / "coarse" / "images" / "a.safetensors", {"logits": logits, "points": points}, {}
    )
    for part in ("labelled", "val"):
        (tmp_path / f"{part}.txt").write_text("images/a.png masks/a.png\n")
    (tmp_path / "unlabelled.txt").write_text("images/a.png\n")
    return tmp_path


def test_frames(example, folder):
    data = example.sam_data
    x = data.read_labelled(folder, data.read_list(folder, "labelled")[0], 80, coarse=True)
    assert x.size == (80, 40)
    assert (x.masks[:, :, 40:] == 255).all()
    assert (x.pixels[:, :, 40:] == 0).all()
    assert (x.masks[:, 76:] == 255).all()  # void
    assert (x.masks[0] == 1).nonzero().aminmax() == (torch.tensor(8), torch.tensor(23))
    assert (x.masks[1] == 1).sum() == 32 * 12
    assert torch.equal((x.coarse > 0) & (x.masks != 255), x.masks == 1)
    assert (x.coarse[:, :, 40:] < 0).all()
    assert x.points.tolist() == [[14.5, 16.5], [26.5, 56.5]]  # the middles of their pixels
    u = data.read_unlabelled(folder, data.read_list(folder, "unlabelled")[0], 80)
    assert torch.equal(u.masks == 1, x.coarse > 0)
    assert (u.masks[:, :, 40:] == 255).all()


def test_coarse_masks_without_a_pixel_are_left_out(example, folder):
    path = folder / "coarse" / "images" / "a.safetensors"
    logits = read_tensors(path)[0]["logits"]
    write_tensors(path, {"logits": torch.cat([logits[:1] * 0 - 1, logits])}, {})
    pair = example.sam_data.read_list(folder, "unlabelled")[0]
    u = example.sam_data.read_unlabelled(folder, pair, 80)
    assert len(u.masks) == len(u.coarse) == len(u.points) == 2
    for mask, (x, y) in zip(u.masks, u.points.long().tolist(), strict=True):
        assert mask[y, x] == 1


# --- coarse masks --------------------------------------------------------------------------------

LOOSE = ["--grid", "3", "--min-iou", "0", "--min-stability", "0", "--max-area", "100"]


def objects(labels: np.ndarray, side: int = 64) -> Tensor:
    """Logits of every label of an image of 40 x 20 in the masks of a frame of 128."""
    inner = labels[np.arange(side) * 40 // side][:, np.arange(side // 2) * 20 // (side // 2)]
    full = np.pad(inner, ((0, 0), (0, side // 2)))
    return torch.stack([torch.from_numpy(full == k) for k in (1, 2)]).float() * 18 - 9


def answering(example, monkeypatch, answer) -> list[Tensor]:
    """Let ``answer(points)`` stand for SAM's three masks and their IoU; the points it was asked."""
    asked: list[Tensor] = []

    def predict(model, embedding, prompts, masks=None, *, several=False):
        assert several
        assert masks is None
        assert prompts.labels.tolist() == [[1]] * len(embedding)
        assert not prompts.boxed.any()
        asked.append(prompts.points[:, 0])
        return answer(prompts.points[:, 0])

    monkeypatch.setattr(example.coarse, "predict", predict)
    return asked


def labels_of(folder: Path) -> np.ndarray:
    return np.array(Image.open(folder / "masks" / "a.png"))


def about_the_object(folder: Path):
    """The object or what is none under a point, the whole image, and noise."""
    first, second = objects(labels_of(folder))

    def answer(points: Tensor) -> tuple[Tensor, Tensor]:
        x, y = (points / 2).round().long().unbind(1)
        own = torch.where((first[y, x] > 0)[:, None, None], first, second)
        neither = (first[y, x] < 0) & (second[y, x] < 0)
        own = torch.where(neither[:, None, None], torch.maximum(first, second).neg(), own)
        noise = torch.randn(own.shape, generator=seeded(0))  # not stable
        iou = torch.where(neither, 0.9, 0.95)
        return (
            torch.stack([own, torch.full_like(own, 9), noise], 1),
            torch.stack([iou, torch.full_like(iou, 0.99), torch.full_like(iou, 0.98)], 1),
        )

    return answer


def test_masks_from_a_grid(example, folder, tiny, monkeypatch):
    asked = answering(example, monkeypatch, about_the_object(folder))
    bare, full = example.sam_data.read_image(
        folder, example.sam_data.read_list(folder, "unlabelled")[0], 128
    )
    assert (bare.size, full) == ((128, 64), (40, 20))
    logits, points = example.coarse.from_grid(tiny, bare, 16, example.coarse.Filters())
    own = [((x + 0.5) * 4 - 0.5, (y + 0.5) * 8 - 0.5) for y in range(16) for x in range(16)]
    assert torch.cat(asked).tolist() == [list(point) for point in own]
    assert max(map(len, asked)) == 64
    assert logits.shape == (3, 64, 32)
    labels = labels_of(folder)
    want = objects(labels)[:, :, :32]
    found = {k for k in range(2) for mask in logits[:2] if torch.equal(mask, want[k])}
    assert found == {0, 1}  # an object each, and the rest, which is believed in less, last
    assert torch.equal(logits[2], torch.maximum(*want).neg())
    for mask, (x, y) in zip(logits, (points / 2).round().long().tolist(), strict=True):
        assert mask[y, x] > 0
    strict = example.coarse.Filters(min_iou=92.0)
    assert len(example.coarse.from_grid(tiny, bare, 16, strict)[0]) == 2
    nothing, none = example.coarse.from_grid(tiny, bare, 16, example.coarse.Filters(99.5))
    assert nothing.shape == (0, 64, 32)
    assert none.shape == (0, 2)


@pytest.mark.parametrize("limit", [0.3, 0.7])
def test_duplicates_go(example, limit):
    rng = np.random.default_rng(0)
    for _ in range(20):
        corners = np.sort(rng.integers(0, 12, (15, 2, 2)), 1)
        scores = rng.integers(0, 6, 15) / 6  # with ties
        drawn = np.zeros((15, 12, 12), dtype=bool)
        for mask, ((x0, y0), (x1, y1)) in zip(drawn, corners, strict=True):
            mask[y0 : y1 + 1, x0 : x1 + 1] = True
        kept: list[int] = []
        for k in sorted(range(15), key=lambda k: -scores[k]):
            shares = [(drawn[k] & drawn[j]).sum() / (drawn[k] | drawn[j]).sum() for j in kept]
            if all(share <= limit for share in shares):
                kept.append(k)
        boxes = torch.from_numpy(corners.reshape(15, 4)).float()
        assert example.coarse.distinct(boxes, torch.from_numpy(scores), limit).tolist() == kept


def test_an_image_whose_edge_cuts_a_pixel_of_the_masks(example, tiny):
    ramp = (2 * torch.arange(64) + 0.5).expand(1, 64, 64)  # the column in the frame
    found = example.coarse._cut(ramp, tiny, (128, 85))
    assert found.shape == (1, 64, 42)
    expected = (np.arange(42) + 0.5) * 85 / 42 - 0.5
    np.testing.assert_allclose(found[0, 7].numpy()[1:], expected[1:], atol=1e-4)
    assert torch.equal(example.coarse._cut(ramp.mT, tiny, (128, 64)), ramp.mT[:, :, :32])


def test_a_point_in_each_true_mask(example, folder, tiny, monkeypatch):
    labels = torch.from_numpy(labels_of(folder)).clone()
    labels[labels == 2] = 3  # no label 2
    write_mask(folder / "masks" / "a.png", labels)
    pair = example.sam_data.read_list(folder, "labelled")[0]
    image, kept, _ = example.sam_data.read_objects(folder, pair, 128)
    assert kept == [1, 3]
    first, second = objects(np.where(labels == 3, 2, labels))
    calls = []

    def answer(points: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(points)
        masks = torch.stack([-first, first, second])[None].expand(len(points), -1, -1, -1)
        return masks, torch.tensor([[0.99, 0.95, 0.5]]).expand(len(points), -1)

    answering(example, monkeypatch, answer)
    found, points, good = example.coarse.from_masks(
        tiny, image, example.coarse.Filters(), seeded(1)
    )
    assert torch.equal(found, torch.stack([first, second])[:, :, :32])  # the closest to the truth
    assert good.tolist() == [True, False]  # the second is one the model does not believe in
    for mask, (x, y) in zip(image.masks, points.long().tolist(), strict=True):
        assert mask[y, x] == 1
    args = ["coarse", "--model", "tiny", "--data", str(folder), "--out", str(folder / "out")]
    shutil.rmtree(folder / "coarse")
    (folder / "unlabelled.txt").write_text("")
    said: list[str] = []
    example.train.main(args, said.append)
    written, about = read_tensors(folder / "coarse" / "images" / "a.safetensors")
    assert written["logits"].dtype == torch.float16
    assert written["logits"].shape == (3, 64, 32)
    assert torch.equal(written["logits"][0].float(), first[:, :32])
    assert (written["logits"][1:] == -20).all()
    assert about["mask"] == "masks/a.png"
    for label, channel in ((1, 0), (3, 2)):
        x, y = written["points"][channel].round().long().tolist()
        assert labels[y, x] == label
    x = example.sam_data.read_labelled(folder, pair, 128, coarse=True)
    assert example.refinement.good_pairs(x).tolist() == [0]


@pytest.mark.ci
@pytest.mark.usefixtures("unmeasured")
def test_the_whole_command_makes_its_coarse_masks(example, finished, tmp_path, monkeypatch, capsys):
    data = Path(shutil.copytree(finished.out / "digits", tmp_path / "data"))
    shutil.rmtree(data / "coarse")
    args = [*SHORT, *LOOSE, "--uncertainty", "confidence", "--out", str(tmp_path / "out")]
    args[args.index("digits")] = str(data)
    real, count = example.coarse.from_grid, []

    def second_is_empty(model, image, grid, filters):
        count.append(image.name)
        logits, points = real(model, image, grid, filters)
        return (logits, points) if len(count) != 2 else (logits[:0], points[:0])

    monkeypatch.setattr(example.coarse, "from_grid", second_is_empty)

    def stop(line: str) -> None:
        if line == "coarse: labelled, 3 images":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        example.train.main(["all", *args], stop)
    written = sorted((data / "coarse").rglob("*.*"))
    assert [path.name for path in written] == [f"labelled_{k:04d}.safetensors" for k in range(3)]
    said: list[str] = []
    assert example.train.main(["all", *args], said.append) == 0
    assert re.fullmatch(r"coarse: 3 files written; \d+ masks of unlabelled .*", said[2])
    left_out = "coarse: no mask passes in 1 unlabelled images, left out: images/unlabelled_0001.png"
    assert said[3] == left_out
    assert "uncertainty: 2 maps written, 0 were there" in said
    assert any(line.startswith("finetune-confidence: step 4 of 4") for line in said)
    before = {path: path.read_bytes() for path in (data / "coarse").rglob("*.safetensors")}
    said.clear()
    assert example.train.main(["coarse", *args], said.append) == 0
    assert said[2].startswith("coarse: 0 files written;")
    assert said[3] == left_out
    assert all(path.read_bytes() == old for path, old in before.items())
    assert example.train.main(["coarse", *args, "--grid", "2"], said.append) == 0
    assert said[-1].startswith("coarse: 3 files written;")  # the grid is nothing to labelled images
    mask = data / "masks" / "labelled_0001.png"
    other = torch.from_numpy(np.array(Image.open(mask)))
    other[other == 1] = 0
    write_mask(mask, other)
    assert example.train.main(["coarse", *args, "--grid", "2"], said.append) == 0
    assert said[-1].startswith("coarse: 1 files written;")
    assert example.train.main(["coarse", *args, "--grid", "2"], said.append) == 0
    assert said[-1].startswith("coarse: 0 files written;")
    strict = ["--min-iou", "100", "--min-stability", "100"]
    assert example.train.main(["coarse", *args, *strict], said.append) == 0
    capsys.readouterr()
    assert example.train.main(["uncertainty", *args, *strict]) == 2
    error = capsys.readouterr().err
    assert "an image with a coarse mask, got none; lower --min-iou or --min-stability" in error
    assert error.count("\n") == 1


def test_masks_of_others_are_left_alone(example, folder, capsys):
    path = folder / "coarse" / "images" / "a.safetensors"
    before = path.read_bytes()
    args = ["coarse", "--model", "tiny", "--data", str(folder), "--out", str(folder / "out")]
    assert example.train.main(args) == 2
    error = capsys.readouterr().err
    assert "expected coarse masks of this command, or none, got others; move that" in error
    assert path.read_bytes() == before


def _coarse(logits: Tensor, **more: Tensor):
    def change(folder: Path) -> None:
        path = folder / "coarse" / "images" / "a.safetensors"
        write_tensors(path, {"logits": logits, **more}, {})

    return change


ONES = torch.ones(2, 40, 20)
BAD = {
    "no list": (lambda f: (f / "labelled.txt").unlink(), "labelled.txt"),
    "no mask": (lambda f: (f / "labelled.txt").write_text("images/a.png\n"), "'image mask'"),
    "no coarse": (lambda f: shutil.rmtree(f / "coarse"), "a.safetensors"),
    "no object": (
        lambda f: write_mask(f / "masks" / "a.png", torch.zeros(40, 20).byte()),
        "expected at least one object, got none",
    ),
    "mask size": (
        lambda f: write_mask(f / "masks" / "a.png", torch.ones(20, 40).byte()),
        "expected a mask 40x20",
    ),
    "no image": (lambda f: (f / "images" / "a.png").write_text("x"), "expected an image"),
    "a way out": (
        lambda f: (f / "labelled.txt").write_text(f"{f}/images/a.png masks/a.png\n"),
        "below the root",
    ),
    "one channel": (_coarse(ONES[:1]), "expected coarse logits of 2 masks, one per label, got"),
    "integers": (_coarse(ONES.long()), r"'logits' \[M, h, w\]"),
    "nan": (_coarse(ONES * torch.nan), "finite 'logits'"),
    "points": (_coarse(ONES, points=torch.ones(3, 2)), r"'points' \[2, 2\], got \[3, 2\]"),
    "bad pairs": (_coarse(-ONES), "a coarse mask with an IoU of at least 0.7, got none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_line(example, folder, tmp_path, capsys, name):
    change, match = BAD[name]
    change(folder)
    args = ["refine", "--model", "tiny", "--data", str(folder), "--out", str(tmp_path / "out")]
    assert example.train.main(args) == 2
    error = capsys.readouterr().err
    assert re.search(match, error), error
    assert error.startswith("train.py: ")
    assert error.count("\n") == 1


def test_bad_runs_are_one_line(example, finished, tmp_path, capsys):
    out = copied(finished, tmp_path)

    def fails(*more: str) -> str:
        assert example.train.main([*more, *SHORT, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "of the same settings, got another lr;" in fails("refine", "--lr", "0.5")
    for path in (out / "uncertainty-sum" / "images").iterdir():
        write_tensors(path, {"uncertainty": torch.zeros(1, 64, 64)}, {})
    (out / "finetune-sum.pt").unlink()
    assert re.search(r"expected [2-9]\d* maps, got 1; delete it", fails("finetune"))
    shutil.rmtree(out / "uncertainty-sum")
    assert "expected an uncertainty map, got none; run uncertainty" in fails("finetune")
    (out / "refine.pt").write_bytes(b"no checkpoint")
    assert "expected a checkpoint, got a damaged file" in fails("uncertainty")
    (out / "refine.pt").unlink()
    assert "expected a refinement module, got none; run refine" in fails("uncertainty")
    with pytest.raises(SystemExit, match="2"):
        example.train.main(["refine", *SHORT, "--out", str(out), "--masks", "0"])
