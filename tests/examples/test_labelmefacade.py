"""The LabelMeFacade example on a small synthetic download, with tiny models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.folders import command, done, files
from tests.support.helpers import modules

from cpseg import Calibration
from cpseg.files import ScoreRecord, read_class_map, read_ids

EXAMPLE = Path(__file__).parents[2] / "examples" / "labelmefacade"
NAMES = ("convert", "pseudo", "students", "results", "dinov2_features")
FOLDERS = {"boston__p": 9, "madrid__IMG_": 5, "palma__img_": 4, "spatial__street": 3}
COLOURS = np.array(  # of various, building, door, window, car, pavement, road, sky, vegetation
    [
        *([0, 0, 0], [128, 0, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128]),
        *([128, 128, 128], [128, 64, 0], [0, 128, 128], [0, 128, 0]),
    ],
    np.uint8,
)
OURS = np.array([255, 0, 0, 0, 1, 2, 3, 4, 5], np.uint8)
SHORT = ("--pool", "12", "--heldout", "5", "--budgets", "4", "6", "--long-side", "32")


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    with modules("labelmefacade", NAMES) as found:
        yield found


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Streets of 64x48 pixels, a few of another size, in the layout of the public repository."""
    root, rng = tmp_path_factory.mktemp("download"), np.random.default_rng(0)
    paint = rng.integers(0, 256, (9, 3))
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for start, count in FOLDERS.items():
        for number in range(count):
            size = (20, 24) if start.startswith("spatial") else (48, 64)
            scene = np.ones(size, int)
            scene[: size[0] // 4] = 7
            scene[size[0] // 4 :, : size[1] // 4] = 8
            scene[size[0] * 2 // 3 :] = 6
            scene[size[0] * 2 // 3 : size[0] * 3 // 4] = 5
            left = int(rng.integers(0, size[1] // 2))
            scene[size[0] * 3 // 4 :, left : left + size[1] // 4] = 4
            scene[size[0] // 2 : size[0] * 2 // 3, left : left + size[1] // 6] = 2 + number % 2
            scene[rng.random(size) < 0.02] = 0
            pixels = paint[scene] + rng.normal(0, 20, (*size, 3))
            name = f"{start}{number}"
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / "images" / f"{name}.jpg", quality=95)
            rgba = np.dstack([COLOURS[scene], np.full(size, 255, np.uint8)])
            Image.fromarray(rgba).save(root / "labels" / f"{name}.png")
    (root / "images" / "filelist.txt").write_text("")
    return root


@pytest.fixture(scope="module")
def converted(
    example: SimpleNamespace, download: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("converted") / "data"
    assert example.convert.main([str(download), str(out), *SHORT], lambda _: None) == 0
    return out


@pytest.fixture(scope="module")
def data(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With scores that are wrong about sky, and features that know it."""
    root, rng = tmp_path_factory.mktemp("data") / "data", np.random.default_rng(1)
    shutil.copytree(converted, root)
    for folder in ("probs", "features"):
        (root / folder).mkdir()
    basis = rng.normal(size=(7, 10))
    for path in sorted((root / "masks").glob("*.png")):
        truth = np.array(Image.open(path))
        truth[truth == 255] = 6
        believed = np.where(truth >= 4, 0, np.minimum(truth, 5))
        logits = rng.normal(size=(6, *truth.shape)) + 3 * (believed == np.arange(6)[:, None, None])
        probs = np.exp(logits) / np.exp(logits).sum(0)
        np.savez(root / "probs" / f"{path.stem}.npz", probs=probs.astype(np.float16))
        coarse = np.array(Image.fromarray(truth).resize((12, 9), Image.Resampling.NEAREST))
        features = basis[coarse].transpose(2, 0, 1) + rng.normal(0, 0.5, (10, 9, 12))
        file = root / "features" / f"{path.stem}.npz"
        np.savez(file, features=features.astype(np.float16))
    return root


def names(path: Path) -> list[str]:
    return [Path(pair.image).stem for pair in read_ids(path)]


def refused(capsys: pytest.CaptureFixture[str], code: int, *parts: str) -> None:
    said = capsys.readouterr().err
    assert code == 2, said
    assert len(said.splitlines()) == 1, said
    for part in parts:
        assert part in said


def test_masks_are_the_labels_in_our_classes(
    example: SimpleNamespace, converted: Path, download: Path
) -> None:
    seen = set()
    for path in (converted / "masks").glob("*.png"):
        mask, image = Image.open(path), Image.open(converted / "images" / f"{path.stem}.jpg")
        there = np.array(Image.open(download / "labels" / path.name))[..., :3]
        kinds = (there[..., None, :] == COLOURS).all(-1).argmax(-1)
        height, width = kinds.shape
        size = (24, 32) if width > 32 else (20, 24)
        assert mask.size == image.size == size[::-1], "reduced, but never enlarged"
        rows, columns = ((np.arange(n) + 0.5) / n for n in size)
        nearest = kinds[(rows * height).astype(int)][:, (columns * width).astype(int)]
        np.testing.assert_array_equal(np.array(mask), OURS[nearest])
        seen |= set(nearest.flatten().tolist())
    assert seen == set(range(9)), "every colour of the download occurs"
    assert len(example.convert.COLOURS) == 9


def test_folders_are_held_out_whole_and_budgets_nested(
    example: SimpleNamespace, converted: Path
) -> None:
    pool, held = names(converted / "all_12.txt"), names(converted / "heldout.txt")
    folders = [{name.split("__")[0] for name in each} for each in (pool, held)]
    assert not folders[0] & folders[1]
    assert len(pool) == 12
    assert 0 < len(held) <= 5
    for folder in folders[1]:
        total = next(n for start, n in FOLDERS.items() if start.startswith(folder))
        assert sum(name.startswith(folder) for name in held) == total, "the whole folder"
    assert pool != sorted(pool), "a random order"
    for budget in (4, 6):
        assert names(converted / f"labelled_{budget}.txt") == pool[:budget]
        assert names(converted / f"unlabelled_{budget}.txt") == pool[budget:]
    line = (converted / "labelled_4.txt").read_text().splitlines()[0]
    assert line == f"images/{pool[0]}.jpg masks/{pool[0]}.png"
    every = [f"{start}{i}" for start, count in FOLDERS.items() for i in range(count)]
    drawn = [example.convert.deal(every, pool=12, heldout=5, seed=seed) for seed in (0, 1)]
    assert drawn[0].pool == pool, "the seed decides"
    assert drawn[1].pool != pool


def test_a_conversion_goes_on_and_refuses_other_settings(
    example: SimpleNamespace,
    converted: Path,
    download: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, said = tmp_path / "data", []
    shutil.copytree(converted, out)
    before = files(out)
    lost = names(out / "heldout.txt")[0]
    (out / "masks" / f"{lost}.png").unlink()
    assert example.convert.main([str(download), str(out), *SHORT], said.append) == 0
    assert said[0].endswith(": 1 images written, 16 were there")
    assert files(out) == before
    code = example.convert.main([str(download), str(out), *SHORT, "--seed", "1"])
    refused(capsys, code, "expected a new folder", "seed 0", "choose another folder")


@pytest.mark.parametrize("kind", ["no labels", "colour", "size", "nothing", "few", "budget"])
def test_a_bad_download_is_refused(
    kind: str,
    example: SimpleNamespace,
    download: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, out = tmp_path / "download", tmp_path / "out"
    shutil.copytree(download, root)
    words, said = [*SHORT], ""
    label = next((root / "labels").glob("boston*"))
    if kind == "no labels":
        label.unlink()
        said = f"{label}: expected labels, got no such file"
    elif kind == "colour":
        for path in (root / "labels").glob("*.png"):
            pixels = np.array(Image.open(path))
            pixels[3, 4] = (1, 2, 3, 255)
            Image.fromarray(pixels).save(path)
        said = "got 1:2:3; download"
    elif kind == "size":
        for path in (root / "labels").glob("*.png"):
            Image.open(path).crop((0, 0, 10, 10)).save(path)
        said = "got 10x10; download"
    elif kind == "nothing":
        root = tmp_path / "empty"
        said = "pass a clone of https://github.com/cvjena/labelmefacade"
    elif kind == "few":
        words[1] = "20"
        said = "--pool: expected at most the"
    else:
        words[5] = "12"
        said = "--budgets: expected numbers below the pool's 12, got 12"
    refused(capsys, example.convert.main([str(root), str(out), *words]), said)


def test_the_class_map_takes_a_cityscapes_model(
    example: SimpleNamespace,
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers")
    from tests.support.tiny_models import folder

    path = EXAMPLE / "cityscapes.json"
    content = json.loads(path.read_text())
    assert content["classes"] == list(example.convert.CLASSES)
    assert read_class_map(path).target.count(None) == 8
    model = folder("segformer", tmp_path / "model", labels=content["model_classes"])
    words = ("--root", converted, "--ids", converted / "labelled_4.txt", "-o", tmp_path / "probs")
    more = ("--class-map", path, "--background-from", "none", "--dtype", "float16")
    done(command(capsys, "predict", "--model", model, *words, *more))
    for name in names(converted / "labelled_4.txt"):
        [written] = (tmp_path / "probs" / "images").glob(f"{name}.*")
        probs = np.load(written)["probs"]
        with Image.open(converted / "images" / f"{name}.jpg") as image:
            assert probs.shape == (6, image.height, image.width)
        assert (probs.sum(0) <= 1.01).all(), "what was dropped is missing"


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=28,
        patch_size=7,
    )
    path = tmp_path_factory.mktemp("dinov2")
    transformers.Dinov2Model(config).eval().save_pretrained(path)
    return path


@pytest.fixture
def encode(
    example: SimpleNamespace, converted: Path, dinov2: Path, tmp_path: Path
) -> Callable[..., tuple[int, list[str]]]:
    def call(*more: object) -> tuple[int, list[str]]:
        said: list[str] = []
        words = [converted, "--model", dinov2, "--local", "--ids", "all_12.txt", "heldout.txt"]
        words += ["--long-side", 42, "--out", tmp_path / "features", *more]
        return example.dinov2_features.main([str(word) for word in words], said.append), said

    return call


def test_features_are_the_tokens_of_the_patches(
    encode: Callable[..., Any], converted: Path, dinov2: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    assert encode("--batch", 3)[0] == 0
    model = transformers.AutoModel.from_pretrained(dinov2).eval()
    listed = names(converted / "all_12.txt") + names(converted / "heldout.txt")
    written = sorted((tmp_path / "features").glob("*.npz"))
    assert [path.stem for path in written] == sorted(listed)
    shapes = set()
    for path in written:
        found = np.load(path)["features"]
        assert found.dtype == np.float16
        shapes.add(found.shape)
        height, width = (7 * n for n in found.shape[1:])
        with Image.open(converted / "images" / f"{path.stem}.jpg") as image:
            pixels = np.array(image.resize((width, height), Image.Resampling.BICUBIC)) / 255
        pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            tokens = model(torch.from_numpy(pixels).float().permute(2, 0, 1)[None])[0][0]
        for row, column in ((0, 0), (1, 2), (found.shape[1] - 1, found.shape[2] - 1)):
            token = tokens[1 + row * found.shape[2] + column]  # the first is that of the image
            np.testing.assert_allclose(found[:, row, column], token.numpy(), atol=5e-3)
    assert shapes <= {(12, 4, 6), (12, 5, 6)}, "rows by columns, the long side in 6 patches"
    assert (12, 4, 6) in shapes


def test_features_go_on_and_refuse_another_size(
    encode: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode()[0] == 0
    before = files(tmp_path / "features")
    lost = min((tmp_path / "features").glob("*.npz"))
    lost.unlink()
    code, said = encode("--batch", 1)
    assert code == 0
    assert said[0].endswith(": features of 1 images written, 16 were there")
    for name in before.keys() - {"made.json"}:
        found = np.load(tmp_path / "features" / name)["features"]
        assert np.isfinite(found).all()
    capsys.readouterr()  # transformers' progress bars
    assert encode("--long-side", 28)[0] == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"dinov2_features.py: {tmp_path / 'features'}: expected a new folder")
    assert files(tmp_path / "features").keys() == before.keys()


def learned(example: SimpleNamespace, data: Path, *more: object) -> tuple[int, list[str]]:
    said: list[str] = []
    words = [data, "--labelled", "labelled_4.txt", "--pool", "all_12.txt", "--seeds", 0, *more]
    return example.students.main([str(word) for word in words], said.append), said


def test_a_student_learns(example: SimpleNamespace, data: Path, tmp_path: Path) -> None:
    found = {}
    for steps in (1, 60):
        path = tmp_path / f"{steps}.json"
        code, said = learned(example, data, "--steps", steps, "--json", path)
        assert code == 0
        found[steps] = json.loads(path.read_text())
        shown = f"mIoU {found[steps]['miou'][0]:.2f} ± 0.00  wrong {found[steps]['wrong'][0]:.2f}"
        assert said[0].startswith(shown)
    assert found[60]["wrong"][0] < 25 < found[1]["wrong"][0]
    assert found[60]["miou"][0] > found[1]["miou"][0]
    path = tmp_path / "again.json"
    learned(example, data, "--steps", 60, "--json", path)
    assert json.loads(path.read_text()) == found[60], "the seed decides"


def test_figures_are_those_of_the_answers(
    example: SimpleNamespace, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sky everywhere: its IoU is its share, that of all others 0."""
    always = torch.full((6,), -1.0)
    always[4] = 1.0

    def sky(model: object, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return always[:, None, None].expand(6, *size)

    monkeypatch.setattr(example.students, "answer", sky)
    path = tmp_path / "found.json"
    assert learned(example, data, "--steps", 1, "--json", path)[0] == 0
    pixels = np.concatenate(
        [
            np.array(Image.open(data / "masks" / f"{name}.png")).flatten()
            for name in names(data / "heldout.txt")
        ]
    )
    pixels = pixels[pixels != 255]
    share = (pixels == 4).mean()
    there = len({4, *pixels.tolist()})
    found = json.loads(path.read_text())
    assert found["wrong"][0] == pytest.approx(100 * (1 - share))
    assert found["miou"][0] == pytest.approx(100 * share / there)


def test_pseudo_labels_are_learned_and_half_of_each_batch(
    example: SimpleNamespace, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pseudo, found = tmp_path / "masks", {}
    pseudo.mkdir()
    for kind in ("true", "sky"):
        for name in names(data / "unlabelled_4.txt"):
            mask = np.array(Image.open(data / "masks" / f"{name}.png"))
            Image.fromarray(mask if kind == "true" else np.full_like(mask, 4)).save(
                pseudo / f"{name}.png"
            )
        path = tmp_path / f"{kind}.json"
        more = ("--pseudo", pseudo, "--steps", 40, "--json", path)
        assert learned(example, data, *more)[0] == 0
        found[kind] = json.loads(path.read_text())["wrong"][0]
    assert found["true"] + 5 < found["sky"]
    labels = torch.zeros(12, 2, 2, dtype=torch.int64)
    torch.manual_seed(0)
    drawn = [example.students.Examples(labels, labels, 4).draw(8) for _ in range(50)]
    assert all((each < 4).sum() == 4 for each in drawn)
    assert {int(i) for each in drawn for i in each} == set(range(12))
    min(pseudo.glob("*.png")).unlink()
    refused(capsys, learned(example, data, "--pseudo", pseudo)[0], "expected pseudo-labels of")


def test_scores_are_out_of_fold(
    example: SimpleNamespace,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A stand-in for training remembers its images: its scores say how many there were."""
    trained: list[int] = []

    def train(examples: Any, *, seed: int, steps: int) -> int:
        trained.append(len(examples.labels))
        return len(trained) - 1

    def answer(model: int, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return torch.full((6, *size), (model + 1) / 10)

    monkeypatch.setattr(example.students, "train", train)
    monkeypatch.setattr(example.students, "answer", answer)
    out = tmp_path / "scores"
    assert learned(example, data, "--scores", out, "--folds", 2)[0] == 0
    assert trained == [2, 2, 4], "a student for every fold, and one of all"
    record = ScoreRecord.of(out)
    labelled = [pair.image for pair in read_ids(data / "labelled_4.txt")]
    others = [pair.image for pair in read_ids(data / "unlabelled_4.txt")]
    others += [pair.image for pair in read_ids(data / "heldout.txt")]
    assert record is not None
    for image in labelled + others:
        probs = np.load(out / Path(image).with_suffix(".npz"))["probs"]
        model = round(float(probs[0, 0, 0]) * 10) - 1
        assert (model == 2) == (image in others)
        assert not record.saw(image)
        if image in labelled:
            assert image not in record.models[model].trained_on
        with Image.open(data / image) as opened:
            assert probs.shape == (6, opened.height, opened.width)
    assert [path.name for path in tmp_path.iterdir()] == ["scores"], "nothing is left over"
    code = learned(example, data, "--scores", out)[0]
    refused(capsys, code, "expected a new or empty folder")


def test_labels_are_measured(example: SimpleNamespace, data: Path, tmp_path: Path) -> None:
    """Against loops: 10 pixels of each class wrong, where it has so many."""
    rng, pairs = np.random.default_rng(0), read_ids(data / "unlabelled_4.txt")
    hits, there, given = np.zeros(6), np.zeros(6), np.zeros(6)
    for pair in pairs:
        truth = np.array(Image.open(data / str(pair.mask)))
        labels = np.where(rng.random(truth.shape) < 0.2, (truth + 1) % 6, truth % 6)
        path = tmp_path / f"{Path(pair.image).stem}.png"
        Image.fromarray(labels.astype(np.uint8)).save(path)
        for k in range(6):
            known = truth != 255
            hits[k] += ((truth == k) & (labels == k)).sum()
            there[k] += (truth == k).sum()
            given[k] += ((labels == k) & known).sum()
    found = example.pseudo.errors(data, 4, tmp_path)
    assert found["of_class"] == pytest.approx((100 * (1 - hits / there)).tolist(), rel=1e-5)
    assert found["wrong"] == pytest.approx(100 * (1 - hits.sum() / there.sum()))
    assert found["miou"] == pytest.approx(100 * (hits / (there + given - hits)).mean())


@pytest.mark.parametrize(
    ("value", "sign", "said"),
    [
        (49.0, 1, "< 22"),
        (50.0, 1, "22"),
        (52.0, 1, "31"),  # half of the way from 22 to 44 on the logarithm
        (54.0, 1, "44"),  # 88 was no better
        (56.0, 1, "175"),  # half of the way from 88 to 350
        (58.0, 1, "350"),
        (58.1, 1, "> 350"),
        (-52.0, -1, "31"),
    ],
)
def test_what_a_student_is_worth(
    example: SimpleNamespace, value: float, sign: int, said: str
) -> None:
    curve = [(22, 50.0), (44, 54.0), (88, 53.0), (350, 58.0)]
    curve = [(number, sign * reached) for number, reached in curve]
    assert example.results.worth(value, curve, sign=sign) == said


@pytest.fixture
def calls(example: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the student; the rules are ones that take little time."""
    seen: list[str] = []
    student = example.results.Student
    for name in ("train", "score"):
        method = getattr(student, name)

        def call(self: Any, *args: Any, method: Any = method, name: str = name) -> Any:
            seen.append(name)
            return method(self, *args)

        monkeypatch.setattr(student, name, call)
    options = {"method": "temperature", "context": ()}
    rule = {"sources": ("foundation", "student"), "prior_power": 0.25, **options}
    monkeypatch.setattr(example.pseudo, "DIRICHLET", options)
    monkeypatch.setattr(example.pseudo, "RULE", rule)
    return seen


def tables(example: SimpleNamespace, data: Path, out: Path, *more: object) -> int:
    words = [data, out, "--budgets", 4, "--folds", 2, "--steps", 2, *more]
    code: int = example.results.main([str(word) for word in words])
    return code


@pytest.mark.nightly
def test_the_whole_table(
    example: SimpleNamespace,
    data: Path,
    tmp_path: Path,
    calls: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert tables(example, data, out, "--seeds", 0, 1) == 0
    said = capsys.readouterr().out
    rows = [line.split(" | ")[0].removeprefix("| ") for line in said.splitlines() if "|" in line]
    recommended = ["recommended", *(f"recommended without {s}" for s in ("foundation", "student"))]
    recommended.append("recommended, round 2")
    kinds = ["foundation, raw", "foundation, Dirichlet", "student's own", "both, one Dirichlet map"]
    kinds += recommended
    assert rows == [
        *("true masks alone", "---", "mIoU", "wrong %"),
        *("pseudo-labels", "---", "labels only", *kinds, "true masks of all 12"),
        *("wrong % of the pixels of", "---", *kinds),
    ]
    made = sorted(path.stem for path in (out / "4").glob("*.json"))
    assert len(made) == 2 + 2 * len(kinds)
    assert calls.count("train") == 3 + len(kinds)
    assert calls.count("score") == 2
    # The recommended labels: by its options, from its sources.
    calibration = Calibration.load(out / "4" / "recommended" / "calibration.safetensors")
    assert calibration.recalibration.prior_power == 0.25
    sources = calibration.provenance.sources_read
    assert sources.folders == ("probs", "student")
    other = Calibration.load(out / "4" / "recommended_round_2" / "calibration.safetensors")
    assert other.provenance.sources_read.folders == ("probs", "round_1")
    less = Calibration.load(out / "4" / "recommended_without_foundation/calibration.safetensors")
    assert less.provenance.sources_read is None, "one model is left"
    [folder] = {path.parent for path in (out / "4" / "student").rglob("*.npz")}
    for name in names(data / "unlabelled_4.txt")[:2]:  # temperature and prior alone
        probs = torch.from_numpy(np.load(folder / f"{name}.npz")["probs"])
        own = less.recalibration(probs).argmax(0).numpy()
        masks = out / "4" / "recommended_without_foundation" / "masks" / "images"
        np.testing.assert_array_equal(np.array(Image.open(masks / f"{name}.png")), own)
    # Raw labels are the largest scores, and their errors are in the table.
    wrong = []
    for name in names(data / "unlabelled_4.txt"):
        labels = np.array(Image.open(out / "4/foundation_raw/masks/images" / f"{name}.png"))
        probs = np.load(data / "probs" / f"{name}.npz")["probs"]
        np.testing.assert_array_equal(labels, probs.argmax(0))
        truth = np.array(Image.open(data / "masks" / f"{name}.png"))
        wrong.append((labels != truth)[truth != 255])
    share = 100 * np.concatenate(wrong).mean()
    assert f"| foundation, raw | {share:.1f} |" in said
    # Nothing is done twice; one more seed trains again, but makes no labels and no scores.
    calls.clear()
    before = files(out)
    assert tables(example, data, out, "--seeds", 0, 1) == 0
    assert capsys.readouterr() == (said, "")
    assert calls == []
    assert files(out) == before
    assert tables(example, data, out, "--seeds", 0, 1, 2) == 0
    assert calls == ["train"] * (3 + len(kinds))
    assert not [line for line in capsys.readouterr().err.splitlines() if "_labels" in line]


@pytest.mark.nightly
def test_another_rule_makes_only_its_own_rows_again(
    example: SimpleNamespace,
    data: Path,
    tmp_path: Path,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tables(example, data, tmp_path, "--seeds", 0) == 0
    capsys.readouterr()
    monkeypatch.setitem(example.pseudo.RULE, "prior_power", 0.5)
    assert tables(example, data, tmp_path, "--seeds", 0) == 0
    again = capsys.readouterr().err.splitlines()
    assert again
    assert all(line.startswith(("4/recommended", "4/round_1")) for line in again)
    monkeypatch.setattr(example.pseudo, "ROUND_2_KEEPS", True)
    assert tables(example, data, tmp_path, "--seeds", 0) == 0
    assert capsys.readouterr().err.splitlines() == [
        "4/recommended_round_2_labels",
        "4/recommended_round_2_student",
    ]
    path = tmp_path / "4" / "recommended_round_2" / "calibration.safetensors"
    folders = Calibration.load(path).provenance.sources_read.folders
    assert folders == ("probs", "student", "round_1")


def test_a_probe_of_the_same_options_takes_the_students_place(
    example: SimpleNamespace,
    data: Path,
    tmp_path: Path,
    calls: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its answers say whether it got pseudo-labels."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import json, shutil, sys\n"
        "from pathlib import Path\n"
        "def of(name): return sys.argv[sys.argv.index(name) + 1]\n"
        "data = Path(sys.argv[1])\n"
        "number = len((data / of('--labelled')).read_text().splitlines())\n"
        "if '--scores' in sys.argv:\n"
        "    assert of('--folds') == '2'\n"
        "    shutil.copytree(data / 'probs', Path(of('--scores')) / 'images')\n"
        "else:\n"
        "    found = number + 0.5 * ('--pseudo' in sys.argv)\n"
        "    answer = {'miou': [found], 'wrong': [50 - found]}\n"
        "    Path(of('--json')).write_text(json.dumps(answer))\n"
    )
    out = tmp_path / "out"
    assert tables(example, data, out, "--seeds", 0, "--probe", probe) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("| recommended |"))
    assert line.endswith("| 4.5 | 45.5 | 6 % | 6 % | 4 | 4 |"), "of the way from 4 to 12"
    [line] = [line for line in said.splitlines() if line.startswith("| true masks of all 12 |")]
    assert line == "| true masks of all 12 | - | - | 12.0 | 38.0 | 100 % | 100 % | 12 | 12 |"
    probe.write_text("import sys\nprint('out of luck')\nsys.exit(3)\n")
    assert tables(example, data, out, "--seeds", 0, "--probe", probe) == 2
    assert capsys.readouterr().err.splitlines() == [
        "only_labelled_4",
        "results.py: probe.py: expected it to train, got: out of luck; mend that",
    ]


def test_what_is_missing_is_named(
    example: SimpleNamespace, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, tables(example, tmp_path, tmp_path / "out"), "expected one list all_*.txt")


def test_the_recommended_rule_is_one_that_the_library_has(
    example: SimpleNamespace, data: Path, tmp_path: Path
) -> None:
    if example.pseudo.RULE["method"] == "trees":
        pytest.importorskip("sklearn")
    rule = example.pseudo.Rule.recommended()
    assert set(rule.sources) <= {"foundation", "student", "features", "colour"}
    scores = {"foundation": data / "probs", "student": tmp_path / "student"}
    shutil.copytree(data / "probs", tmp_path / "student")
    rule.label(data, 4, scores, tmp_path / "out")
    calibration = Calibration.load(tmp_path / "out" / "calibration.safetensors")
    sources = calibration.provenance.sources_read
    assert sources.folders == ("probs", "student")
    assert (sources.features, sources.colour) == ("features", True)
    found = example.pseudo.errors(data, 4, tmp_path / "out" / "masks" / "images")
    raw = example.pseudo.Rule(("foundation",), None)
    raw.label(data, 4, scores, tmp_path / "raw")
    worst = example.pseudo.errors(data, 4, tmp_path / "raw" / "masks" / "images")
    assert found["wrong"] < worst["wrong"] / 2, "the features know where the scores are wrong"
