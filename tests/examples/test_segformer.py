"""The two-stage example: what it trains on, what its loss is, and that it goes on where it was."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support import folders
from tests.support.helpers import modules, seeded
from tests.support.processes import free_port

from cpseg import Calibration
from cpseg.core.class_map import ClassMap

FOLDER = Path(__file__).parents[2] / "examples" / "segformer"
NAMES = (
    "networks",
    "crops",
    "pseudo",
    "resuming",
    "scoring",
    "order",
    "ranks",
    "arguments",
    "stacking",
    "train",
)
CLASSES = 4
CASES = [
    ("label-only",),
    ("self-training",),
    ("foundation",),
    ("foundation+sr",),
    ("foundation+cp", "--variant", "image"),
    ("foundation+cp+sr", "--variant", "image", "--alpha", "0.3"),
    ("foundation+cp", "--recalibrate", "vector", "--context", "none", "--variant", "image"),
    ("foundation+cp", "--constant", "0.3"),
]


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    with modules("segformer", NAMES) as found:
        yield found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> folders.DataSet:
    """Six labelled, five unlabelled and three other images, and their lists."""
    made = folders.make(
        tmp_path_factory.mktemp("data"), count=14, sizes=((20, 28),), num_classes=CLASSES
    )
    made.list_ids("labelled.txt", made.images[:6])
    made.list_ids("unlabelled.txt", made.images[6:11])
    made.list_ids("val.txt", made.images[11:])
    return made


def words(data: folders.DataSet, out: Path, *more: str) -> list[str]:
    common = {"dataset": "folder", "root": data.root, "lists": data.root, "classes": CLASSES}
    common |= {"background": 0, "model": "unet", "crop": 16, "epochs": None, "every": 2, "out": out}
    return [*folders.options(**common), "--epochs", "2", "2", "--device", "cpu", *more]


def run(example, data, out: Path, method: str, *more: str) -> SimpleNamespace:
    """A run, what it said, and its last weights."""
    said: list[str] = []
    scores = ["--probs", str(data.probs)] if method.startswith("foundation") else []
    code = example.train.main(words(data, out, "--method", method, *scores, *more), said.append)
    assert code == 0
    state = torch.load(out / "checkpoint.pt", weights_only=True)["student"]
    result = json.loads((out / "result.json").read_text())
    return SimpleNamespace(out=out, said=said, state=state, result=result)


@pytest.fixture(scope="module")
def whole(example, data, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs without a stop, each of them once for all tests."""

    @cache
    def get(method: str, *more: str) -> SimpleNamespace:
        return run(example, data, tmp_path_factory.mktemp("whole"), method, *more)

    return get


def refused(capsys, example, data, out: Path, *more: str) -> str:
    """The one line on stderr of a run that ends with code 2."""
    capsys.readouterr()
    assert example.train.main(words(data, out, *more), lambda line: None) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("train.py: ")
    return lines[0].removeprefix("train.py: ")


class Noisy(torch.nn.Module):
    """Says one thing in evaluation mode and another in training mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Conv2d(3, CLASSES, 1)
        self.norm = torch.nn.BatchNorm2d(CLASSES)
        self.drop = torch.nn.Dropout(0.8)
        torch.nn.init.normal_(self.norm.running_mean)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(self.head(pixels)))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_every_method_trains_and_measures(example, data, tmp_path: Path, case) -> None:
    found = run(example, data, tmp_path, *case)
    steps = 2 * (11 // 4) + 2 * (2 * 5 // 4)
    last = f"step {steps} of {steps}"
    assert last in found.said[-2]
    assert found.said[-1].startswith("| class | IoU |")
    assert 0 <= found.result["miou"] <= 1
    assert len(found.result["iou"]) == CLASSES
    assert ("kept" in found.result["pseudo_labels"]) == case[0].startswith("foundation")
    stage_two = [line for line in found.said if line.startswith("stage II")]
    assert bool(stage_two) == (case[0] == "self-training" or case[0].endswith("+sr"))


def test_tiny_segformer_trains(example, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    data = folders.make(tmp_path / "data", count=4, sizes=((40, 48),), num_classes=CLASSES)
    for part in ("labelled", "unlabelled", "val"):
        data.list_ids(f"{part}.txt", data.images)
    found = run(example, data, tmp_path / "out", "foundation", "--model", "tiny", "--crop", "32")
    assert 0 <= found.result["miou"] <= 1


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["self-training", "foundation+cp+sr"])
@pytest.mark.parametrize("kill", [1, 3, 5, 7])
def test_a_run_that_is_killed_ends_with_the_same_weights(
    example, data, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kill: int
) -> None:
    expected = whole(method, "--variant", "image")
    step, calls = example.train.Trainer.step, Counter()

    def killed(*args):
        calls["steps"] += 1
        if calls["steps"] > kill:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(example.train.Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(example, data, tmp_path / "killed", method, "--variant", "image")
    monkeypatch.undo()
    again = run(example, data, tmp_path / "killed", method, "--variant", "image")
    assert ("goes on" in " ".join(again.said)) == (kill >= 2)
    assert same(expected.state, again.state)
    assert expected.result["miou"] == again.result["miou"]
    other = whole(method, "--variant", "image", "--seed", "1")
    assert not same(expected.state, other.state)


@pytest.mark.parametrize(
    ("method", "first"), [("foundation+sr", "foundation"), ("self-training", "label-only")]
)
def test_stage_two_goes_on_from_the_end_of_stage_one(
    example, data, whole, tmp_path: Path, method: str, first: str
) -> None:
    stage1 = ("--stage1", str(whole(first).out / "stage1.pt"))
    again = run(example, data, tmp_path / "again", method, *stage1)
    assert "goes on after step 4 of 8" in again.said[0]
    assert same(whole(method).state, again.state)


def test_stage_two_starts_at_the_end_of_its_own_stage_one_only(
    example, data, whole, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, scores = whole("foundation").out, ("--probs", str(data.probs))

    def said(out: str, method: str, file: str = "stage1.pt") -> str:
        more = ("--method", method, *scores, "--stage1", str(base / file))
        return refused(capsys, example, data, tmp_path / out, *more)

    assert "the same settings, got another method" in said("cp", "foundation+cp+sr")
    late = said("late", "foundation+sr", "checkpoint.pt")
    assert "expected the end of stage I, step 4, got step 8" in late
    assert said("one", "foundation").startswith(
        "--stage1: expected a method with a stage II, got foundation"
    )

    step, calls = example.train.Trainer.step, Counter()

    def killed(*args):
        calls["steps"] += 1
        if calls["steps"] > 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(example.train.Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(example, data, tmp_path / "begun", "foundation+sr")
    monkeypatch.undo()
    assert "expected step 4 or later with --stage1, got step 2" in said("begun", "foundation+sr")


@pytest.mark.parametrize("method", ["foundation+sr", "self-training"])
def test_weights_and_rates_of_every_step(
    example, data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    seen = []

    def step(self, passes, stage, weight):
        (group,) = self.optimizer.param_groups
        seen.append((stage.halves, weight, group["lr"]))
        return torch.zeros(())

    monkeypatch.setattr(example.train.Trainer, "step", step)
    weights = ("--sr-weight", "0.2", "--self-training-weight", "0.7")
    run(example, data, tmp_path, method, *weights, "--lr", "0.01", "--epochs", "3", "2")
    steps, first = 10, 6
    assert [halves for halves, _, _ in seen] == [False] * first + [True] * (steps - first)
    rates = [0.01 * (1 - step / steps) ** 0.9 for step in range(steps)]
    assert [rate for _, _, rate in seen] == pytest.approx(rates)
    falls = [0.2 * math.exp(-5 * (step - first) / (steps - first)) for step in range(first, steps)]
    wanted = [0.7] * 4 if method == "self-training" else falls
    assert [weight for _, weight, _ in seen[first:]] == pytest.approx(wanted)


def test_labels_of_cpseg_label_serve_as_they_are(example, data, whole, tmp_path: Path) -> None:
    own = whole("foundation+cp", "--variant", "image")
    given = own.out / "labels"
    more = ("--pseudo-labels", str(given), "--method", "foundation+cp", "--variant", "image")
    said: list[str] = []
    assert example.train.main(words(data, tmp_path / "given", *more), said.append) == 0
    state = torch.load(tmp_path / "given" / "checkpoint.pt", weights_only=True)["student"]
    assert same(own.state, state)


@pytest.mark.parametrize("method", ["foundation", "foundation+sr"])
def test_passes_of_a_batch_add_up_to_it(example, data, whole, tmp_path: Path, method: str) -> None:
    one = whole(method)
    two = run(example, data, tmp_path / "two", method, "--accumulate", "2")
    for name, value in one.state.items():
        torch.testing.assert_close(two.state[name], value, rtol=1e-3, atol=1e-4)


TWO_RANKS = ("foundation+cp", "foundation+cp+sr")


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks of every method, by the method's name; each rank is one process.

    They get what torchrun gives: the variables of the environment. Every run has a port of its own.
    """
    out = tmp_path_factory.mktemp("ranks")
    lines = ["import os, train"]
    for name in TWO_RANKS:
        more = ("--method", name, "--probs", str(data.probs))
        lines.append(f"os.environ['MASTER_PORT'] = '{free_port()}'")
        lines.append(f"assert train.main({words(data, out / 'two' / name, *more)!r}) == 0")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = os.pathsep.join([str(FOLDER), *sys.path])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", "\n".join(lines)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    return out / "two"


@pytest.mark.nightly
@pytest.mark.parametrize("method", TWO_RANKS)
def test_two_ranks_train_as_one(example, data, two_ranks: Path, method: str) -> None:
    one = run(example, data, two_ranks.parent / "one" / method, method)
    two = two_ranks / method
    state = torch.load(two / "checkpoint.pt", weights_only=True)["student"]
    for name, value in one.state.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)
    for name in ("labels.safetensors", "labels/ids.txt", "labels/summary.csv"):
        here = (one.out / name).read_text(encoding="latin1")
        there = (two / name).read_text(encoding="latin1")
        assert here.replace("/one/", "/two/") == there
    result = json.loads((two / "result.json").read_text())
    assert result["pseudo_labels"] == one.result["pseudo_labels"]
    assert result["miou"] == pytest.approx(one.result["miou"], abs=3e-3)
    assert result["iou"] == pytest.approx(one.result["iou"], abs=6e-3)  # of all images


def test_the_stages_are_as_long_as_the_paper_says(example) -> None:
    def steps(method: str) -> list[tuple[int, bool]]:
        args = SimpleNamespace(method=method, epochs=(60, 20), batch=4)
        lists = SimpleNamespace(labelled="92", unlabelled="1372")
        return list(example.train.plan(args, lists, []).stages)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.order, "read_ids", lambda path, columns=2: [None] * int(path))
        two_stages = steps("foundation+cp+sr")
        assert two_stages == [(60 * 366, False), (20 * 686, True)]
        assert steps("foundation+cp") == [(60 * 366 + 20 * 686, False), (0, True)]
        assert steps("label-only") == steps("foundation+cp")


def test_batches_repeat_labelled_images_evenly(example) -> None:
    train = example.order
    labelled = [train.Pair(f"x{i}", "m") for i in range(3)]
    unlabelled = [train.Pair(f"u{i}", "truth") for i in range(8)]
    pseudo = [train.Pair(f"u{i}", "pseudo") for i in range(8)]
    stages = (train.Stage(11, False), train.Stage(8, True))
    made = train.batches(train.Plan(labelled, unlabelled, pseudo, 11, stages), 4, 5)
    mixed = Counter(sample.pair for batch in made[:11] for sample in batch)
    assert set(mixed.values()) == {4}
    assert set(mixed) == {*labelled, *pseudo}
    assert all(s.pseudo == (s.pair.mask == "pseudo") for batch in made[:11] for s in batch)
    halves = made[11:]
    assert {s.pair for batch in halves for s in batch[:2]} == set(labelled)
    own = Counter(s.pair for batch in halves for s in batch[2:])
    assert set(own) == {train.Pair(pair.image, None) for pair in unlabelled}  # no true mask
    assert set(own.values()) == {2}
    counts = Counter(s.pair for batch in halves for s in batch[:2]).values()
    assert max(counts) - min(counts) <= 1
    seeds = [s.seed for batch in made for s in batch]
    assert len(set(seeds)) == len(seeds)
    alone = train.batches(train.Plan(labelled, unlabelled, [], 11, stages), 4, 5)
    assert alone[11:] == halves  # stage II does not see what stage I was labelled with
    balanced = train.batches(
        train.Plan(labelled, unlabelled, pseudo, 11, stages), 4, 5, balance=True
    )
    assert all([s.pseudo for s in batch] == [False, True, False, True] for batch in balanced[:11])
    assert balanced[11:] == halves
    for batch, half in ((made[0], False), (made[-1], True)):
        parts = [train.portion(batch, part, 2, halves=half) for part in range(2)]
        assert sorted(s.seed for part in parts for s in part) == sorted(s.seed for s in batch)
        if half:
            assert all([s.pair.mask is not None for s in p] == [True, False] for p in parts)


@pytest.mark.parametrize("method", ["self-training", "foundation+sr"])
def test_the_loss_of_stage_two_is_the_papers(example, data, tmp_path: Path, method: str) -> None:
    """Equations 2 and 5, against NumPy; the first half is labelled."""
    train = example.train
    args = train.parser().parse_args(words(data, tmp_path, "--method", method))
    args.optimizer, args.lr = "sgd", 0.1
    trainer = train.Trainer(args, CLASSES)
    logits = torch.randn(4, CLASSES, 5, 6, generator=seeded(0))
    labels = torch.randint(0, CLASSES, (4, 5, 6), generator=seeded(1)).to(torch.uint8)
    labels[0, :2], labels[3] = 255, 255
    stage = train.Stage(1, True)
    counts = trainer._counts([labels], stage)
    found = trainer._loss(logits, labels, counts, stage, 0.25)
    values = logits.double().numpy()
    log_p = values - np.log(np.exp(values).sum(1, keepdims=True))
    halves = []
    for half in (slice(0, 2), slice(2, 4)):
        own, y = log_p[half], labels[half].numpy()
        picked = [own[b, y[b, i, j], i, j] for b, i, j in zip(*np.nonzero(y != 255), strict=True)]
        halves.append(-np.mean(picked))
    x, u = halves
    expected = x + 0.25 * u if method == "self-training" else 0.75 * x + 0.25 * u
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_weights_of_classes_enter_sum_and_count(example, data, tmp_path: Path) -> None:
    train = example.train
    args = train.parser().parse_args(words(data, tmp_path, "--method", "label-only"))
    train.complete(args)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    trainer = train.Trainer(args, CLASSES, weight)
    logits = torch.randn(2, CLASSES, 5, 6, generator=seeded(0))
    labels = torch.randint(0, CLASSES, (2, 5, 6), generator=seeded(1)).to(torch.uint8)
    labels[0, :2] = 255
    stage = train.Stage(1, False)
    found = trainer._loss(logits, labels, trainer._counts([labels], stage), stage, 0.0)
    expected = torch.nn.functional.cross_entropy(logits, labels.long(), weight, ignore_index=255)
    torch.testing.assert_close(found, expected)


def test_a_batch_without_a_label_has_a_loss_of_zero(example, data, tmp_path: Path) -> None:
    args = example.train.parser().parse_args(words(data, tmp_path, "--method", "label-only"))
    example.train.complete(args)
    trainer = example.train.Trainer(args, CLASSES)
    before = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    trainer.optimizer.param_groups[0]["weight_decay"] = 0.0
    void = torch.full((4, 16, 16), 255, dtype=torch.uint8)
    pixels = torch.randn(4, 3, 16, 16, generator=seeded(0))
    for stage in (example.train.Stage(1, False), example.train.Stage(1, True)):
        assert float(trainer.step([(pixels, void)], stage, 0.5)) == 0
    assert same(before, trainer.student.state_dict())


def test_the_unlabelled_half_learns_from_the_students_own_labels(example, data, tmp_path) -> None:
    """From the list to the batch to the loss: void beyond the image, the student's class inside."""
    train = example.train
    args = train.parser().parse_args(words(data, tmp_path, "--method", "self-training"))
    train.complete(args)
    args.crop, args.scale = 40, (1.0, 1.0)
    labelled = train.read_ids(data.root / "labelled.txt")
    unlabelled = train.read_ids(data.root / "unlabelled.txt")
    stages = (train.Stage(0, False), train.Stage(1, True))
    made = train.Plan(labelled, unlabelled, [], 0, stages)
    trainer = train.Trainer(args, CLASSES)
    source = train.Source(data.root, data.probs)
    pixels, labels = next(iter(train._loader(args, trainer, made, source, 0)))
    found = trainer._answers(pixels, labels)[2:]
    trainer.student.eval()
    own = trainer.student(pixels[2:]).argmax(1).to(torch.uint8)
    inside = torch.zeros(40, 40, dtype=torch.bool)
    inside[:20, :28] = True  # the images' size
    for label, answer in zip(found, own, strict=True):
        assert torch.equal(label[inside], answer[inside])
        assert bool((label[~inside] == 255).all())


def test_own_labels_leave_padding_void_and_dropout_off(
    example, data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example.train, "build", lambda *args, **options: Noisy())
    args = example.train.parser().parse_args(words(data, tmp_path, "--method", "self-training"))
    example.train.complete(args)
    trainer = example.train.Trainer(args, CLASSES)
    pixels = torch.randn(4, 3, 16, 16, generator=seeded(0))
    labels = torch.zeros(4, 16, 16, dtype=torch.uint8)
    labels[2, :, 8:] = 255
    before = copy.deepcopy(trainer.student.state_dict())
    found = trainer._answers(pixels, labels)
    assert trainer.student.training
    assert same(before, trainer.student.state_dict())  # running statistics
    assert torch.equal(found[:2], labels[:2])
    assert bool((found[2, :, 8:] == 255).all())
    expected = trainer.student.eval()(pixels[2:]).argmax(1).to(torch.uint8)
    assert len(expected.unique()) > 1
    assert torch.equal(found[2, :, :8], expected[0, :, :8])
    assert torch.equal(found[3], expected[1])


def test_evaluation_leaves_dropout_off_and_trains_on(example, data) -> None:
    model = Noisy()
    before = copy.deepcopy(model.state_dict())
    pairs = example.train.read_ids(data.root / "val.txt")
    source = example.train.Source(data.root, data.probs)
    found = example.scoring.evaluate(model, source, pairs, CLASSES, window=None, device="cpu")
    assert model.training
    assert same(before, model.state_dict())
    model.eval()
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for pair in pairs:
        own = model(example.crops.read_pixels(data.root / pair.image)[None]).argmax(1)[0]
        truth = torch.from_numpy(data.labels[pair.image]).long()
        for true, guess in zip(truth[truth != 255], own[truth != 255], strict=True):
            expected[true, guess] += 1
    assert torch.equal(found, expected)


def test_rare_classes_weigh_more(
    example, data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def trainer(args, num_classes, class_weight):
        seen.append(class_weight)
        raise KeyboardInterrupt

    monkeypatch.setattr(example.train, "Trainer", trainer)
    for more in ((), ("--class-weights",)):
        with pytest.raises(KeyboardInterrupt):
            run(example, data, tmp_path, "label-only", *more)
    values = np.concatenate([data.labels[image].ravel() for image in data.images[:6]])
    share = np.bincount(values[values != 255]) / (values != 255).sum()
    weight = seen[1].double().numpy()
    assert seen[0] is None
    assert np.argsort(weight).tolist() == np.argsort(-share).tolist()
    assert (weight / weight[0]) ** 2 == pytest.approx(share[0] / share, rel=1e-5)
    assert (weight * share).sum() == pytest.approx(1, rel=1e-5)


def test_true_masks_go_through_the_map_and_pseudo_labels_do_not(example, tmp_path: Path) -> None:
    """A pixel's place is its colour, so that every pixel of a crop can be found again."""
    rng = np.random.default_rng(0)
    colours = np.stack([*np.mgrid[:20, :28], np.zeros((20, 28))], -1).astype(np.uint8)
    true = rng.choice(np.array([0, 3, 7, 8, 254], np.uint8), (20, 28))
    made = rng.choice(np.array([0, 1, 255], np.uint8), (20, 28))
    for name, values in (("i", colours), ("true", true), ("made", made)):
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    crops, pair = example.crops, example.train.Pair
    classes = {0: 1, 7: 0, 8: 1}
    source = example.train.Source(
        tmp_path, tmp_path, mask_map=ClassMap(tuple(map(classes.get, range(10)))), void=254
    )
    masks = [("true.png", False), ("made.png", True), (None, True)]
    order = [crops.Sample(pair("i.png", m), p, seed) for m, p in masks for seed in range(4)]
    augment = example.train.WeakAugmentation(16, scale=(1.0, 1.0))
    data = crops.Crops(source, 2, augment=augment, order=order)
    through = np.vectorize(lambda value: classes.get(value, 255))(true)
    for index, expected in enumerate([through, made, np.zeros_like(made)]):
        for number in range(4):
            pixels, labels = data[4 * index + number]
            places = ((pixels * crops.STD + crops.MEAN) * 255).round().long()
            assert np.array_equal(labels.numpy(), expected[places[0], places[1]])


def test_options_arrive_where_they_are_used(
    example, data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, seen, types = example.train, {}, set()

    def spy(name):
        original = getattr(train, name)

        def called(*args, **options):
            seen[name] = (args, options)
            return original(*args, **options)

        monkeypatch.setattr(train, name, called)

    for name in ("batches", "evaluate", "WeakAugmentation"):
        spy(name)
    build = train.build

    def watched(*args, **options):
        model = build(*args, **options)
        model.head.register_forward_hook(lambda module, given, found: types.add(found.dtype))
        return model

    monkeypatch.setattr(train, "build", watched)
    more = ("--balance", "--window", "12", "--scale", "0.8", "1.2", "--crop", "24")
    run(example, data, tmp_path, "foundation+sr", *more, "--amp", "bf16")
    assert seen["batches"][1] == {"balance": True}
    assert seen["evaluate"][1]["window"] == 12
    assert seen["WeakAugmentation"] == ((24,), {"scale": (0.8, 1.2)})
    assert types == {torch.bfloat16}


def test_ranks_with_gpus_talk_about_what_lies_on_cpus_as_well(
    example, data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def started(backend):
        raise ValueError(backend)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(example.train.dist, "init_process_group", started)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for device, backend in (("cuda", "cpu:gloo,cuda:nccl"), ("cpu", "gloo")):
        assert refused(capsys, example, data, tmp_path, "--device", device) == backend


@pytest.mark.parametrize(
    ("name", "line", "image", "mask"),
    [
        ("voc", "2007_1", "JPEGImages/2007_1.jpg", "SegmentationClass/2007_1.png"),
        ("voc-aug", "2008_2", "JPEGImages/2008_2.jpg", "SegmentationClassAug/2008_2.png"),
        (
            "ade20k",
            "training/ADE_train_00000001",
            "images/training/ADE_train_00000001.jpg",
            "annotations/training/ADE_train_00000001.png",
        ),
        (
            "cityscapes",
            "train/ulm/ulm_000009_000019",
            "leftImg8bit/train/ulm/ulm_000009_000019_leftImg8bit.png",
            "gtFine/train/ulm/ulm_000009_000019_gtFine_labelIds.png",
        ),
        ("camvid", "0016E5_08087", "images/0016E5_08087.png", "masks/0016E5_08087.png"),
        ("voc", "a.jpg b.png", "a.jpg", "b.png"),
    ],
)  # fmt: skip
def test_ids_become_paths(example, tmp_path: Path, name, line, image, mask) -> None:
    for part in ("labelled", "unlabelled", "val"):
        (tmp_path / f"{part}.txt").write_text(f"{line}\n")
    given = example.crops.Lists(*(tmp_path / f"{p}.txt" for p in ("labelled", "unlabelled", "val")))
    (tmp_path / "out").mkdir()
    made = example.crops.write_lists(example.crops.LAYOUTS[name], given, tmp_path / "out")
    for path in made:
        assert path.read_text() == f"{image} {mask}\n"


def test_values_in_masks_become_classes(example) -> None:
    ade, city = (example.crops.LAYOUTS[name].mask_map.target for name in ("ade20k", "cityscapes"))
    assert ade[0] is None
    assert ade[1:] == tuple(range(150))
    # labelIds of road, sidewalk, sky, person, car, bicycle in Cityscapes' own table
    assert [city[value] for value in (7, 8, 23, 24, 26, 33)] == [0, 1, 10, 11, 13, 18]
    assert sorted(c for c in city if c is not None) == list(range(19))


def test_windows_cover_the_image_and_agree_with_the_whole(example) -> None:
    model = torch.nn.Conv2d(3, CLASSES, 1)
    pixels = torch.randn(1, 3, 37, 53, generator=seeded(0))
    whole = example.scoring.predict(model, pixels, None)
    for window in (16, 20, 37, 60):
        found = example.scoring.predict(model, pixels, window)
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.sum(1), torch.ones(1, 37, 53))


def test_the_table_shows_absent_classes_as_such(example) -> None:
    confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    text = example.scoring.table(confusion, ["a", "b", "c"])
    assert text.splitlines()[2:] == [
        "| a | 0.750 |",
        "| b | 0.800 |",
        "| c | - |",
        "| mean | 0.775 |",
    ]


def test_rules_choose_what_they_say(example, data, tmp_path: Path) -> None:
    pseudo = example.pseudo
    source = example.train.Source(data.root, data.probs)
    ids = data.root / "labelled.txt"
    probs = torch.from_numpy(data.scores[data.images[7]])
    raw = pseudo.choose(source, ids, pseudo.Rule(conformal=False), CLASSES)
    assert torch.equal(raw.pseudo_labels(probs), probs.argmax(0))
    fixed = pseudo.choose(source, ids, pseudo.Rule(conformal=False, constant=0.4), CLASSES)
    kept = fixed.pseudo_labels(probs)
    best = probs.amax(0)
    assert torch.equal(kept == 255, 1 - best > 0.4)
    rule = pseudo.Rule(conformal=True, alpha=0.3, variant="image", background=0)
    made = pseudo.choose(source, ids, rule, CLASSES)
    assert made.variant == "image"
    assert made.background == 0
    assert made.num_images == 6
    refit = pseudo.Rule(conformal=False, recalibrate="vector", context="none")
    refitted = pseudo.choose(source, ids, refit, CLASSES)
    assert refitted.recalibration is not None
    assert torch.equal(refitted.pseudo_labels(probs), refitted.recalibration(probs).argmax(0))
    for method in (None, "vector"):
        rule = pseudo.Rule(conformal=False, recalibrate=method, context="none", prior_power=0.75)
        lifted = pseudo.choose(source, ids, rule, CLASSES).recalibration
        mapped = refitted.recalibration(probs) if method else probs
        weighed = mapped.double() / lifted.prior.reshape(-1, 1, 1) ** 0.75
        expected = weighed / weighed.sum(0)
        torch.testing.assert_close(lifted(probs).double(), expected, rtol=1e-3, atol=1e-4)


def test_quality_counts_kept_and_wrong(example, tmp_path: Path) -> None:
    truth = np.array([[0, 1, 2, 255], [3, 3, 0, 1]], np.uint8)
    found = np.array([[0, 2, 255, 1], [3, 255, 1, 1]], np.uint8)
    Image.fromarray(np.zeros((2, 4, 3), np.uint8)).save(tmp_path / "i.png")
    Image.fromarray(truth).save(tmp_path / "t.png")
    Image.fromarray(found).save(tmp_path / "p.png")
    pair = example.train.Pair
    source = example.train.Source(tmp_path, tmp_path)
    got = example.pseudo.quality(source, [pair("i.png", "p.png")], [pair("i.png", "t.png")], 4)
    assert got["kept"] == pytest.approx(5 / 7)
    assert got["wrong"] == pytest.approx(2 / 5)


def test_labels_are_measured_where_every_mask_is_there(example, data, tmp_path: Path) -> None:
    for part in ("labelled", "unlabelled", "val"):
        (tmp_path / f"{part}.txt").write_text((data.root / f"{part}.txt").read_text())
    with (tmp_path / "unlabelled.txt").open("a") as file:
        file.write("images/12.png masks/none.png\n")
    found = run(example, data, tmp_path / "out", "foundation", "--lists", str(tmp_path))
    assert found.result["pseudo_labels"] == {}


def test_certified_labels_or_a_line(example, data, tmp_path: Path, capsys) -> None:
    more = ("--method", "foundation+cp", "--probs", str(data.probs), "--certified", "0.1")
    said = refused(capsys, example, data, tmp_path, *more)
    assert "5 images" in said
    found = run(example, data, tmp_path / "loose", "foundation+cp", "--certified", "0.9")
    made = Calibration.load(tmp_path / "loose" / "labels.safetensors")
    assert made.certificate is not None
    assert made.certificate.certified
    assert found.result["pseudo_labels"]["kept"] > 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("images/00.png masks/00.png\n\n", "line 2: expected 'image' or 'image mask', got ''"),
        ("images/a b.png masks/00.png\n", "line 1: expected 'image' or 'image mask'"),
        ("images/00.png\n", "expected a mask for every image, got images/00.png"),
    ],
)
def test_bad_lists(example, data, tmp_path: Path, capsys, content: str, says: str) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    for part in ("unlabelled", "val"):
        (lists / f"{part}.txt").write_text((data.root / f"{part}.txt").read_text())
    (lists / "labelled.txt").write_text(content)
    more = ("--method", "label-only", "--lists", str(lists))
    assert says in refused(capsys, example, data, tmp_path / "out", *more)


def test_a_mask_of_another_size(example, tmp_path: Path, capsys) -> None:
    data = folders.make(tmp_path / "data", count=4, num_classes=CLASSES)
    for part in ("labelled", "unlabelled", "val"):
        data.list_ids(f"{part}.txt", data.images)
    Image.fromarray(np.zeros((16, 12), np.uint8)).save(data.mask_file(data.images[2]))
    said = refused(capsys, example, data, tmp_path / "out", "--method", "label-only")
    assert "expected a mask 12x16 like its image's scores, got 16x12" in said


def test_labels_of_another_class_list(example, data, tmp_path: Path, capsys) -> None:
    more = ("--method", "foundation", "--probs", str(data.probs), "--labels-only")
    assert example.train.main(words(data, tmp_path / "made", *more), lambda line: None) == 0
    given = ("--method", "foundation", "--pseudo-labels", str(tmp_path / "made" / "labels"))
    said = refused(capsys, example, data, tmp_path / "out", *given, "--classes", "5")
    assert "expected labels of 5 classes, got 4; write them with the same class map" in said
    few = tmp_path / "few"
    few.mkdir()
    for part in ("labelled", "val"):
        (few / f"{part}.txt").write_text((data.root / f"{part}.txt").read_text())
    (few / "unlabelled.txt").write_text("images/00.png\n")
    said = refused(capsys, example, data, tmp_path / "other", *given, "--lists", str(few))
    assert "expected a label for every unlabelled image, got none of images/00.png" in said


def test_a_checkpoint_of_another_model(example, data, tmp_path: Path, capsys) -> None:
    run(example, data, tmp_path, "label-only")
    said = refused(capsys, example, data, tmp_path, "--method", "label-only", "--lr", "0.01")
    assert "expected a checkpoint of the same settings, got another lr" in said
    (tmp_path / "checkpoint.pt").write_bytes(b"no")
    said = refused(capsys, example, data, tmp_path, "--method", "label-only")
    assert "expected a checkpoint, got a damaged file" in said


def test_a_class_map_that_misses_a_class(example, data, tmp_path: Path, capsys) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"map": {"0": 0, "1": 1, "2": 2}, "reduce": "sum"}))
    more = ("--method", "foundation", "--probs", str(data.probs), "--class-map", str(path))
    said = refused(capsys, example, data, tmp_path / "out", *more)
    assert "scores of 3 model classes" in said


def test_a_class_without_a_label_is_named(example, data, tmp_path: Path) -> None:
    found = run(example, data, tmp_path, "label-only", "--classes", "6")
    assert found.said[0] == "no labelled pixel of class 4, 5: it cannot be learned"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--batch", "3"), "--batch: expected two halves for 1 ranks in 1 passes, got 3"),
        (("--method", "foundation"), "expected --probs or --pseudo-labels, got neither; pass one"),
        (("--classes", "1"), "--classes: expected a number above 1, got 1"),
        (("--lists", "nowhere"), "nowhere/labelled.txt"),
        (
            ("--method", "foundation+cp", "--certified", "0.9", "--constant", "0.3"),
            "--certified: expected a calibrated method, +cp, got --constant 0.3; leave one",
        ),
        (
            ("--method", "foundation+sr", "--certified", "0.9"),
            "--certified: expected a calibrated method, +cp, got foundation+sr; leave one",
        ),
        (("--lr", "1e30", "--optimizer", "sgd"), "training: expected a finite loss, got"),
    ],
)  # fmt: skip
def test_bad_options(example, data, tmp_path: Path, capsys, more, says: str) -> None:
    if "--method" not in more:
        more = (*more, "--method", "label-only")
    elif "--certified" in more:
        more = (*more, "--probs", str(data.probs))
    assert says in refused(capsys, example, data, tmp_path, *more)
