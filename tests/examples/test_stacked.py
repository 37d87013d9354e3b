"""``--method stacked``: who is trained on what, who scores what, and that a stopped run goes on."""

from __future__ import annotations

import json
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
from tests.support import folders
from tests.support.helpers import modules
from tests.support.processes import free_port

from cpseg import Calibration
from cpseg.files import ScoreRecord, read_folds, read_ids, read_mask, read_scores
from cpseg.files.masks import read_image

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
CLASSES, FOLDS = 3, 3
LABELLED, UNLABELLED = 6, 5
STEPS = 2 * ((LABELLED + UNLABELLED) // 4) + 2 * (2 * UNLABELLED // 4)


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    with modules("segformer", NAMES) as found:
        yield found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> folders.DataSet:
    """Six labelled, five unlabelled and three other images, and their lists."""
    root = tmp_path_factory.mktemp("data")
    made = folders.make(root, count=14, sizes=((20, 28),), num_classes=CLASSES)
    made.list_ids("labelled.txt", made.images[:LABELLED])
    made.list_ids("unlabelled.txt", made.images[LABELLED : LABELLED + UNLABELLED])
    made.list_ids("val.txt", made.images[LABELLED + UNLABELLED :])
    rng = np.random.default_rng(1)
    for image in made.images:
        path = root / "features" / Path(image).with_suffix(".npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, rng.normal(size=(5, 10, 14)).astype(np.float32))
    return made


def words(data: folders.DataSet, out: Path, method: str, *more: str) -> list[str]:
    common = {"dataset": "folder", "root": data.root, "lists": data.root, "classes": CLASSES}
    common |= {"background": 0, "model": "unet", "crop": 16, "every": 2, "out": out}
    given = ["--method", method, "--probs", str(data.probs), "--context", "none"]
    if method.startswith("stacked") and "--rounds" not in more:
        given += ["--rounds", "2"]
    if "--folds" not in more:
        given += ["--folds", str(FOLDS)]
    return [*folders.options(**common), "--epochs", "2", "2", "--device", "cpu", *given, *more]


def run(example, data, out: Path, method: str, *more: str) -> SimpleNamespace:
    """A run, what it said, its last weights if there are any, and its result."""
    said: list[str] = []
    assert example.train.main(words(data, out, method, *more), said.append) == 0
    result = json.loads((out / "result.json").read_text())
    state = None if "--labels-only" in more else state_of(out)
    return SimpleNamespace(out=out, said=said, state=state, result=result)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["student"]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def listed(pairs) -> list[str]:
    return sorted(pair.image for pair in pairs)


@pytest.fixture(scope="module")
def whole(example, data, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs without a stop, each of them once for all tests, with what every student was given."""

    @cache
    def get(method: str, *more: str) -> SimpleNamespace:
        plans, fit = {}, example.train.fit

        def recorded(args, trainer, made, source, say):
            plans.setdefault(args.out, made)
            fit(args, trainer, made, source, say)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(example.train, "fit", recorded)
            found = run(example, data, tmp_path_factory.mktemp("whole"), method, *more)
        plans = {path.relative_to(found.out).as_posix(): made for path, made in plans.items()}
        return SimpleNamespace(**vars(found), plans=plans)

    return get


def scores_by(example, data, folder: Path, image: str) -> torch.Tensor:
    """What the student in a folder says of an image, as it is written to a file."""
    model = example.networks.build("unet", CLASSES)
    model.load_state_dict(state_of(folder))
    pixels = example.crops.read_pixels(data.root / image)
    with torch.no_grad():
        return model.eval()(pixels[None]).softmax(1)[0].half()


@pytest.fixture(scope="module")
def stacked(whole) -> SimpleNamespace:
    return whole("stacked")


def students(number: int) -> list[str]:
    return [f"round-{number}/students/{name}" for name in ("fold_0", "fold_1", "fold_2", "all")]


def test_one_command_does_every_step(stacked) -> None:
    out = stacked.out
    assert [*stacked.plans] == [*students(1), *students(2), "."]
    for number in (1, 2):
        for name in ("scores/scores.json", "labels/ids.txt", "labels.safetensors"):
            assert (out / f"round-{number}" / name).is_file()
    assert not list(out.rglob("unlabelled/"))  # scores for one use
    assert stacked.said[-1].startswith("| class | IoU |")
    result = stacked.result
    assert 0 <= result["miou"] <= 1
    assert len(result["rounds"]) == 2
    for each in result["rounds"]:
        assert 0 <= each["student"]["miou"] <= 1
        assert each["pseudo_labels"]["kept"] == 1
    assert result["pseudo_labels"] == result["rounds"][1]["pseudo_labels"]
    rounds = [line for line in stacked.said if line.startswith("round ") and "labels for" in line]
    assert ["100.0% of the pixels" in line for line in rounds] == [True, True]


def test_no_student_is_trained_on_the_images_of_its_fold(stacked, data) -> None:
    """By the plan that the training got; pseudo-labels are of unlabelled images alone."""
    folds = read_folds(stacked.out / "folds")
    assert listed(folds.images) == listed(read_ids(data.root / "labelled.txt"))
    unlabelled = listed(read_ids(data.root / "unlabelled.txt"))
    for number in (1, 2):
        *each_fold, of_all = (stacked.plans[name] for name in students(number))
        for k, made in enumerate(each_fold):
            held = listed(folds.held(k))
            assert len(held) == 2
            assert listed(made.labelled) == sorted(set(listed(folds.images)) - set(held))
            assert listed(made.pseudo) == (unlabelled if number == 2 else [])
        assert listed(of_all.labelled) == listed(folds.images)
        assert listed(of_all.pseudo) == (unlabelled if number == 2 else [])


def test_students_of_folds_take_their_share_of_the_steps(stacked) -> None:
    for number in (1, 2):
        *each_fold, of_all = (stacked.plans[name] for name in students(number))
        assert {made.steps for made in each_fold} == {STEPS * (FOLDS - 1) // FOLDS}
        assert of_all.steps == STEPS
    assert stacked.plans["."].steps == STEPS


def test_scores_of_labelled_images_are_those_of_their_folds_student(example, data, stacked) -> None:
    """Bit for bit what the fold's student says of them; the others are scored by that of all."""
    folds = read_folds(stacked.out / "folds")
    fold_of = {pair.image: f"fold_{k}" for pair, k in zip(folds.images, folds.fold, strict=True)}
    for number in (1, 2):
        place = stacked.out / f"round-{number}"
        record = ScoreRecord.of(place / "scores")
        for image in data.images[: LABELLED + UNLABELLED]:
            student = place / "students" / fold_of.get(image, "all")
            found = read_scores(place / "scores" / Path(image).with_suffix(".npy"))
            assert torch.equal(found, scores_by(example, data, student, image))
            assert not record.saw(image)
            assert record.knows(image) == (image in fold_of)


def test_the_second_round_is_trained_on_the_labels_of_the_first(stacked) -> None:
    """The student of all and the last one on the round's; a fold's on those made without it."""
    first, second = stacked.out / "round-1", stacked.out / "round-2"
    masks = {name: {Path(p.mask) for p in made.pseudo} for name, made in stacked.plans.items()}

    def labels(folder: Path) -> set[Path]:
        return {Path(pair.mask) for pair in read_ids(folder / "ids.txt")}

    *each_fold, of_all = students(2)
    assert masks[of_all] == labels(first / "labels")
    for k, name in enumerate(each_fold):
        assert masks[name] == labels(first / "students" / f"fold_{k}" / "labels")
    assert masks["."] == labels(second / "labels")
    state = state_of(second / "students" / "all")
    assert not same(state, state_of(first / "students" / "all"))


def test_labels_for_a_folds_student_are_made_without_its_fold(example, data, stacked) -> None:
    """The map is fitted on the other folds, the scores are those of the fold's own student."""
    folds = read_folds(stacked.out / "folds")
    place = stacked.out / "round-1"
    for k in range(FOLDS):
        folder = place / "students" / f"fold_{k}"
        made = Calibration.load(folder / "labels.safetensors")
        assert made.provenance.images_used == {pair.image for pair in folds.train(k)}
        for pair in read_ids(folder / "labels" / "ids.txt"):
            probs = torch.from_numpy(data.scores[pair.image])
            own = scores_by(example, data, folder, pair.image).float()
            colours = read_image(data.root / pair.image) / 255
            expected = made.recalibration([probs, own, colours]).argmax(0)
            found = read_mask(Path(pair.mask), num_classes=CLASSES, size=(20, 28))
            assert torch.equal(found.long(), expected)
    made = Calibration.load(place / "labels.safetensors")
    assert made.provenance.images_used == {pair.image for pair in folds.images}


def test_the_map_raises_rare_classes_and_keeps_every_pixel(stacked, whole) -> None:
    made = Calibration.load(stacked.out / "round-2" / "labels.safetensors")
    assert made.recalibration.prior_power == 0.125
    assert made.threshold.isposinf().all()
    assert made.background is None
    assert made.provenance.sources_read.folders == ("probs", "scores")
    other = whole("stacked", "--labels-only", "--prior-power", "0", "--rounds", "1")
    assert (
        Calibration.load(other.out / "round-1" / "labels.safetensors").recalibration.prior_power
        == 0
    )


@pytest.mark.nightly
def test_stage_two_starts_where_the_same_labels_ended_stage_one(
    example, data, stacked, whole, tmp_path: Path
) -> None:
    both = whole("stacked+sr")
    assert [line for line in both.said if line.startswith("stage II")]
    stage1 = ("--stage1", str(stacked.out / "stage1.pt"))
    again = run(example, data, tmp_path, "stacked+sr", *stage1)
    assert again.said[0] == f"goes on after step 4 of {STEPS}"
    assert same(both.state, again.state)
    for name in students(1) + students(2):  # those of both methods are the same
        assert same(state_of(both.out / name), state_of(stacked.out / name))


class Stopped(BaseException):
    """A run that was killed."""


def killing(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, at: int) -> None:
    """The ``at``-th call of a function kills the run."""
    original, calls = getattr(place, name), Counter()

    def called(*args: Any, **options: Any) -> Any:
        calls["all"] += 1
        if calls["all"] == at:
            raise Stopped
        return original(*args, **options)

    monkeypatch.setattr(place, name, called)


KILLS = [
    ("train.Trainer", "step", 25),  # student of all
    ("train.Trainer", "step", 51),  # the last one
    ("scoring", "predict", 12),  # scores for the labels of a fold
    ("stacking", "join_folds", 2),
    ("stacking", "write_labels", 3),
    ("resuming", "write_text", 7),
]


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: f"{kill[1]}-{kill[2]}")
@pytest.mark.nightly
def test_a_run_that_is_killed_ends_with_the_same_weights(
    example, data, stacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill
) -> None:
    module, name, at = kill
    module, _, inside = module.partition(".")
    place = example.stacking.shutil if module == "shutil" else getattr(example, module)
    killing(monkeypatch, getattr(place, inside) if inside else place, name, at)
    with pytest.raises(Stopped):
        run(example, data, tmp_path, "stacked")
    monkeypatch.undo()
    again = run(example, data, tmp_path, "stacked")
    assert same(stacked.state, again.state)
    assert again.result["miou"] == stacked.result["miou"]
    assert again.result["rounds"] == stacked.result["rounds"]
    for name in students(1) + students(2):
        assert same(state_of(again.out / name), state_of(stacked.out / name))


def test_scores_older_than_the_students_checkpoint_are_written_again(
    example, data, tmp_path: Path
) -> None:
    """In evaluation mode, in windows if there are any; training goes on in training mode."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, CLASSES, 1), torch.nn.BatchNorm2d(CLASSES))
    torch.nn.init.normal_(model[1].running_mean)
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.touch()
    source = example.train.Source(data.root, data.probs)
    pairs = read_ids(data.root / "val.txt")

    def write(window: int | None) -> list[torch.Tensor]:
        options = {"window": window, "device": "cpu", "newer_than": checkpoint}
        example.scoring.write_scores(model, source, pairs, tmp_path, **options)
        assert model.training
        return [read_scores(tmp_path / Path(pair.image).with_suffix(".npy")) for pair in pairs]

    first = write(window=None)
    pixels = [example.crops.read_pixels(data.root / pair.image)[None] for pair in pairs]
    model.eval()
    with torch.no_grad():
        for found, image in zip(first, pixels, strict=True):
            assert torch.equal(found, model(image).softmax(1)[0].half())
    model.train()
    torch.nn.init.zeros_(model[0].weight)
    again = write(window=None)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    folders.newer(checkpoint)
    other = write(window=16)
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_finished_steps_are_skipped(
    example, data, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    one = whole("stacked", "--rounds", "1")
    for place, name in ((example.train.Trainer, "step"), (example.stacking, "write_labels")):
        killing(monkeypatch, place, name, 1)
    again = run(example, data, one.out, "stacked", "--rounds", "1")
    assert same(one.state, again.state)
    assert again.result == one.result
    assert example.train.main(words(data, one.out, "stacked", "--prior-power", "0.5")) == 2
    assert (
        "fold_0/finished.json: expected a step of the same settings, got another prior_power"
        in (capsys.readouterr().err)
    )


def test_one_round_ends_with_the_student_that_starts_the_second(stacked, whole) -> None:
    """Both are trained on the labels of round 1."""
    one = whole("stacked", "--rounds", "1")
    assert [*one.plans] == [*students(1), "."]
    assert same(one.state, state_of(stacked.out / "round-2" / "students" / "all"))
    assert not list(one.out.glob("round-1/students/fold_*/labels"))
    assert one.result["pseudo_labels"] == stacked.result["rounds"][0]["pseudo_labels"]


def test_features_are_a_third_source(data, whole) -> None:
    features = str(data.root / "features")
    found = whole("stacked", "--labels-only", "--rounds", "1", "--features", features)
    made = Calibration.load(found.out / "round-1" / "labels.safetensors")
    assert made.provenance.sources_read.features == "features"


@pytest.mark.nightly
def test_alpha_chooses_labels_by_equation_four(whole) -> None:
    found = whole("stacked", "--labels-only", "--rounds", "1", "--alpha", "0.3", "--folds", "6")
    made = Calibration.load(found.out / "round-1" / "labels.safetensors")
    assert float(made.alpha) == 0.3
    assert made.background == 0
    assert made.provenance.recalibration.folds == 5
    assert not made.threshold.isposinf().all()


def test_rare_classes_weigh_more_by_the_students_own_labels(
    example, data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def counted(source, labelled, classes):
        seen.append(listed(labelled))
        return torch.arange(1, classes + 1)

    monkeypatch.setattr(example.train, "pixels_of_classes", counted)
    killing(monkeypatch, example.train, "fit", 2)
    with pytest.raises(Stopped):
        run(example, data, tmp_path, "stacked", "--class-weights")
    folds = read_folds(tmp_path / "folds")
    expected = [folds.images, folds.train(0), folds.train(1)]
    assert seen == [listed(pairs) for pairs in expected]


@pytest.mark.nightly
def test_two_ranks_make_what_one_makes(data, stacked, tmp_path: Path) -> None:
    """Equal but for rounding, which differs between one and two ranks and grows over the rounds."""
    code = f"import train; assert train.main({words(data, tmp_path, 'stacked')!r}) == 0"
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(FOLDER), *sys.path])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **common, "RANK": str(number), "LOCAL_RANK": str(number)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], said
    scores = "round-1/scores"
    paths = sorted((stacked.out / scores).rglob("*.npy"))
    assert len(paths) == len([*(tmp_path / scores).rglob("*.npy")]) == LABELLED + UNLABELLED
    for path in paths:
        mine = np.load(path).astype(np.float32)
        theirs = np.load(tmp_path / path.relative_to(stacked.out)).astype(np.float32)
        np.testing.assert_allclose(theirs, mine, atol=2e-3)
    result = json.loads((tmp_path / "result.json").read_text())
    for mine, theirs in zip(stacked.result["rounds"], result["rounds"], strict=True):
        assert theirs["student"]["miou"] == pytest.approx(mine["student"]["miou"], abs=0.02)
        wrong = mine["pseudo_labels"]["wrong"]
        assert theirs["pseudo_labels"]["wrong"] == pytest.approx(wrong, abs=0.02)


def refused(capsys, example, words: list[str]) -> str:
    """The one line on stderr of a run that ends with code 2."""
    capsys.readouterr()
    assert example.train.main(words, lambda line: None) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("train.py: ")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--recalibrate", "vector"), "--recalibrate: expected trees or dirichlet with stacked"),
        (("--alpha", "0.1", "--constant", "0.3"), "--constant: expected no --alpha beside it"),
        (("--variant", "image"), "--variant: expected --alpha with it, got image alone"),
        (("--certified", "0.1"), "--certified: expected a calibrated method, +cp, got stacked"),
        (("--pseudo-labels", "x"), "stacked: expected --probs, got --pseudo-labels; pass"),
        (("--stage1", "x"), "--stage1: expected a method with a stage II, got stacked"),
        (("--folds", "0"), "folds: expected 2 to 6 folds for 6 labelled images, got 0; pass"),
        (("--folds", "7"), "folds: expected 2 to 6 folds for 6 labelled images, got 7; pass"),
        (("--alpha", "0.1"), "--alpha: expected 5 labelled images or more outside every fold, got"),
        (("--features", "nowhere"), "nowhere: expected images/00"),
        (("--probs", "nowhere"), "nowhere: expected images/00"),
    ],
)  # fmt: skip
def test_bad_options(example, data, tmp_path: Path, capsys, monkeypatch, more, says: str) -> None:
    """All of it is said before a student is trained."""
    killing(monkeypatch, example.train, "fit", 1)
    assert says in refused(capsys, example, words(data, tmp_path / "out", "stacked", *more))


@pytest.mark.parametrize("more", [("--rounds", "1"), ("--folds", "4"), ("--features", "x")])
def test_options_of_stacked_alone(example, data, tmp_path: Path, capsys, more) -> None:
    given = words(data, tmp_path, "foundation", "--folds", "4")[:-2]
    said = refused(capsys, example, [*given, *more])
    assert said == f"{more[0]}: expected a stacked method, got foundation; leave it out"


def test_an_image_is_labelled_or_unlabelled(
    example, data, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    killing(monkeypatch, example.train, "fit", 1)
    for part in ("labelled", "unlabelled", "val"):
        (tmp_path / f"{part}.txt").write_text((data.root / f"{part}.txt").read_text())
    with (tmp_path / "unlabelled.txt").open("a") as file:
        file.write("images/02.png\n")
    given = words(data, tmp_path / "out", "stacked", "--lists", str(tmp_path))
    said = refused(capsys, example, given)
    assert "unlabelled.txt: expected images that are not labelled too, got images/02.png" in said


def test_other_labelled_images_need_another_folder(
    example, data, whole, tmp_path: Path, capsys
) -> None:
    one = whole("stacked", "--rounds", "1")
    for part in ("labelled", "unlabelled", "val"):
        lines = (data.root / f"{part}.txt").read_text().splitlines(keepends=True)
        (tmp_path / f"{part}.txt").write_text("".join(lines[part == "labelled" :]))
    given = words(data, one.out, "stacked", "--rounds", "1", "--lists", str(tmp_path))
    assert "got one with other folds; choose another" in refused(capsys, example, given)


def test_a_damaged_record_of_a_step(example, tmp_path: Path) -> None:
    path = tmp_path / "finished.json"
    once = example.resuming.once
    assert once(path, {"a": 1}, lambda: {"miou": 0.5}) == {"miou": 0.5}
    assert once(path, {"a": 1}, lambda: pytest.fail("done already")) == {"miou": 0.5}
    with pytest.raises(ValueError, match="got another a; choose another file or --out"):
        once(path, {"a": 2}, dict)
    for content in ("{", "[]", "{}"):
        path.write_text(content)
        with pytest.raises(ValueError, match="expected the record of a finished step, got a"):
            once(path, {"a": 1}, dict)
