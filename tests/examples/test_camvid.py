"""The CamVid example on a small synthetic download."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.folders import files

from cpseg import Calibration
from cpseg.cli import command

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = [str(EXAMPLES / name) for name in ("camvid", "segformer", "ablation")]
NAMES = ("convert", "runner", "students", "teacher", "results", "train", "run")
BESIDE = ("crops", "networks", "paper", "pseudo", "resuming", "scoring", "tables")
SIZE = (64, 48)
SHORT = ["--model", "unet-8", "--epochs", "4", "--every", "2", "--device", "cpu"]
PARTS = {"train": ("0001TP", 2, "0006R0", 2, "0016E5", 120), "val": ("0016E5", 63)}
PARTS["test"] = ("0001TP", 1, "Seq05VD", 1)


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    """The example's modules, and those that it calls."""
    sys.path[:0] = FOLDERS
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in NAMES})
    finally:
        sys.path[:] = [path for path in sys.path if path not in FOLDERS]
        for name in NAMES + BESIDE:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Streets of a sky, houses and a road with a car, in the layout of the SegNet tutorial."""
    root, rng = tmp_path_factory.mktemp("download") / "CamVid", np.random.default_rng(0)
    colours = rng.integers(0, 256, (12, 3))
    frame = 0
    for part, drives in PARTS.items():
        for folder in (part, f"{part}annot"):
            (root / folder).mkdir(parents=True)
        for drive, count in zip(drives[::2], drives[1::2], strict=True):
            for _ in range(int(count)):
                frame += 1
                labels = np.zeros(SIZE[::-1], np.uint8)
                labels[16 + frame % 3 :] = 1
                labels[32:] = 3
                left = int(rng.integers(0, SIZE[0] - 16))
                labels[28:38, left : left + 16] = 8
                labels[rng.random(labels.shape) < 0.02] = 11
                pixels = colours[labels] + rng.normal(0, 25, (*labels.shape, 3))
                name = f"{drive}_{frame:05d}.png"
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / part / name)
                Image.fromarray(labels).save(root / f"{part}annot" / name)
    return root


def convert(example: SimpleNamespace, download: Path, out: Path, *more: str) -> int:
    words = [str(download), str(out), "--size", *map(str, SIZE), *more]
    return example.convert.main(words, lambda _: None)


@pytest.fixture(scope="module")
def converted(
    example: SimpleNamespace, download: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("converted") / "camvid"
    assert convert(example, download, out) == 0
    return out


@pytest.fixture(scope="module")
def taught(
    example: SimpleNamespace, converted: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """A folder with a foundation model's scores, and what the command said."""
    out, said = tmp_path_factory.mktemp("taught") / "camvid", []
    shutil.copytree(converted, out)
    assert example.teacher.main([str(out), *SHORT], said.append) == 0
    return SimpleNamespace(out=out, said=said)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def refused(capsys: pytest.CaptureFixture[str], code: int, said: str) -> None:
    assert code == 2
    assert capsys.readouterr().err == said + "\n"


def test_masks_are_those_of_the_download_at_half_the_size(converted, download):
    for part, name in (("train", "0016E5_00005.png"), ("val", "0016E5_00125.png")):
        mask, image = (Image.open(converted / folder / name) for folder in ("masks", "images"))
        assert (mask.mode, mask.size, image.mode) == ("P", (32, 24), "RGB")
        there = np.array(Image.open(download / f"{part}annot" / name))[1::2, 1::2]
        np.testing.assert_array_equal(np.array(mask), np.where(there == 11, 255, there))
        pixels = np.array(Image.open(download / part / name), dtype=float)
        mean = pixels.reshape(24, 2, 32, 2, 3).mean((1, 3))
        assert np.abs(np.array(image) - mean).max() <= 1, "the mean of 2x2, rounded twice"


def test_lists_split_the_drive(example, converted):
    read = {path.stem: lines_of(path) for path in converted.glob("*.txt")}
    names = {line.split(" ")[0].split("/")[1].split("_")[0] for line in read["source"]}
    assert names == {"0001TP", "0006R0"}
    assert len(read["source"]) == 4, "those of test are left alone"
    assert len(read["heldout"]) == 80
    assert sorted(read["heldout"] + read["pool"]) == sorted(
        f"images/{path.name} masks/{path.name}" for path in (converted / "images").glob("0016E5*")
    )
    assert len(read["heldout"] + read["pool"]) == 183
    for budget in (8, 25, 50, 100):
        labelled, rest = read[f"labelled_{budget}"], read[f"unlabelled_{budget}"]
        assert labelled == read["pool"][:budget]
        assert rest == read["pool"][budget:]
        folder = converted / "lists" / str(budget)
        assert lines_of(folder / "labelled.txt") == labelled
        assert lines_of(folder / "unlabelled.txt") == rest
        assert lines_of(folder / "val.txt") == read["heldout"]
    assert lines_of(converted / "lists" / "all" / "labelled.txt") == read["pool"]
    assert len(lines_of(converted / "lists" / "all" / "unlabelled.txt")) == 1
    target = sorted(read["heldout"] + read["pool"])
    assert read["pool"] != [line for line in target if line in set(read["pool"])]
    again = example.convert.lists_of(read["source"], target, 0)
    assert again["pool"] == read["pool"], "the seed decides"
    assert example.convert.lists_of(read["source"], target, 1)["pool"] != read["pool"]


def test_the_class_map_is_that_of_the_results(converted):
    found = json.loads((converted / "map.json").read_text())
    text = (EXAMPLES.parent / "docs" / "results" / "camvid.md").read_text()
    assert found == json.loads(re.search(r"```json\n(.*?)```", text, re.S)[1])


def test_a_stopped_conversion_goes_on(example, converted, download, tmp_path, monkeypatch):
    out, left, write = tmp_path / "out", iter(range(30)), example.convert.write_mask

    def stopping(*given: object) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(*given)

    monkeypatch.setattr(example.convert, "write_mask", stopping)
    with pytest.raises(KeyboardInterrupt):
        convert(example, download, out)
    monkeypatch.undo()
    (out / "images" / sorted(p.name for p in (out / "images").iterdir())[0]).unlink()
    there = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert len(there) == 29
    assert convert(example, download, out) == 0
    assert files(out) == files(converted)
    assert all(path.stat().st_mtime_ns == time for path, time in there.items()), "left alone"


def test_a_folder_of_another_seed_is_refused(example, converted, download, capsys):
    before = files(converted)
    said = f"convert.py: {converted}: expected a new folder, or one with the same settings, "
    said += "got one of another seed; choose another folder, or delete this one"
    refused(capsys, convert(example, download, converted, "--seed", "1"), said)
    assert files(converted) == before


def wrong_size(root: Path) -> str:
    path = root / "val" / "0016E5_00130.png"
    Image.new("RGB", (48, 64)).save(path)
    fix = "use the download unchanged, or pass its --size"
    return f"{path}: expected 64x48 pixels, got 48x64; {fix}"


def no_mask(root: Path) -> str:
    path = root / "trainannot" / "0006R0_00003.png"
    path.unlink()
    return f"{path}: expected a mask, got no such file; download the folder again"


def no_folder(root: Path) -> str:
    shutil.rmtree(root / "valannot")
    fix = "pass the folder CamVid of the SegNet tutorial"
    return f"{root / 'valannot'}: expected a folder of PNGs, got none; {fix}"


def few_images(root: Path) -> str:
    for path in sorted((root / "val").iterdir())[:3]:
        path.unlink()
    fix = "download the folder again"
    return f"{root}: expected 181 images or more of 0016E5, got 180; {fix}"


@pytest.mark.parametrize("damage", [wrong_size, no_mask, no_folder, few_images])
def test_a_bad_download_is_one_line_and_writes_nothing(
    example, download, tmp_path, capsys, damage: Callable[[Path], str]
):
    root = tmp_path / "CamVid"
    shutil.copytree(download, root)
    said = damage(root)
    refused(capsys, convert(example, root, tmp_path / "out"), f"convert.py: {said}")
    assert not (tmp_path / "out").exists()


def test_other_values_in_a_mask_are_refused(example, download, tmp_path, capsys):
    root = tmp_path / "CamVid"
    shutil.copytree(download, root)
    path = root / "trainannot" / "0001TP_00002.png"
    values = np.array(Image.open(path))
    values[5, 7] = 12
    Image.fromarray(values).save(path)
    assert convert(example, root, tmp_path / "out") == 2
    expected = "expected labels in 0..10 or 11 (ignore_index), got 12"
    fix = "map other values to ignore_index"
    assert capsys.readouterr().err == f"convert.py: {path}: {expected}; {fix}\n"
    assert not (tmp_path / "out" / "masks" / path.name).exists()


def test_odd_sizes_are_refused(example, download, tmp_path, capsys):
    code = example.convert.main([str(download), str(tmp_path / "out"), "--size", "64", "49"])
    said = "convert.py: --size: expected even numbers, got 64x49; pass the download's size"
    refused(capsys, code, said)


def scores_of(out: Path, line: str) -> np.ndarray:
    image = line.split(" ")[0]
    return np.load((out / "probs" / image).with_suffix(".npz"))["probs"]


def truth_of(out: Path, line: str) -> np.ndarray:
    return np.array(Image.open(out / line.split(" ")[1]))


def test_the_foundation_model_writes_scores_of_the_whole_drive(taught):
    drive = lines_of(taught.out / "pool.txt") + lines_of(taught.out / "heldout.txt")
    assert "probs: 183 score files written, 0 were there" in taught.said
    for line in drive[::40]:
        probs = scores_of(taught.out, line)
        assert (probs.dtype, probs.shape) == (np.float16, (11, 24, 32))
        np.testing.assert_allclose(probs.astype(float).sum(0), 1, atol=0.01)
    assert len(files(taught.out / "probs")) == 183 + 1, "and made.json"
    assert re.fullmatch(r"mIoU .*, 4 source images, used for training: 0\.\d{3}", taught.said[-2])


def numpy_iou(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """mIoU and the share of wrong pixels, from labels found and true labels."""
    found = np.concatenate([f[t != 255] for f, t in pairs])
    true = np.concatenate([t[t != 255] for _, t in pairs])
    ious = []
    for k in range(11):
        union = ((found == k) | (true == k)).sum()
        if union:
            ious.append(((found == k) & (true == k)).sum() / union)
    return float(np.mean(ious)), float((found != true).mean())


def test_the_held_out_miou_is_that_of_numpy(taught):
    lines = lines_of(taught.out / "heldout.txt")
    pairs = [(scores_of(taught.out, line).argmax(0), truth_of(taught.out, line)) for line in lines]
    said = re.fullmatch(r"mIoU of the raw argmax, 80 held-out images: (0\.\d{3})", taught.said[-1])
    # Scores are rounded to half precision: ties may fall otherwise in a few pixels.
    assert float(said[1]) == pytest.approx(numpy_iou(pairs)[0], abs=0.002)


def test_a_stopped_teacher_ends_the_same(example, taught, converted, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(converted, out)

    def stop(line: str) -> None:
        if "step 2 of" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        example.teacher.main([str(out), *SHORT], stop)
    assert not (out / "probs").exists()
    assert example.teacher.main([str(out), *SHORT], lambda _: None) == 0
    own, other = (
        torch.load(folder / "teacher" / "checkpoint.pt", weights_only=True)["student"]
        for folder in (out, taught.out)
    )
    assert all(torch.equal(own[name], other[name]) for name in other)
    for name in ("0016E5_00005.npz", "0016E5_00125.npz"):
        left, right = (np.load(f / "probs" / "images" / name)["probs"] for f in (out, taught.out))
        np.testing.assert_array_equal(left, right)


def test_scores_that_are_there_stay(example, taught, tmp_path):
    out, said = tmp_path / "out", []
    shutil.copytree(taught.out, out)
    gone = sorted((out / "probs" / "images").iterdir())[:2]
    for path in gone:
        path.unlink()
    times = {path: path.stat().st_mtime_ns for path in (out / "probs" / "images").iterdir()}
    assert example.teacher.main([str(out), *SHORT], said.append) == 0
    assert "probs: 2 score files written, 181 were there" in said
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    before = np.load(taught.out / "probs" / "images" / gone[0].name)["probs"]
    np.testing.assert_array_equal(np.load(gone[0])["probs"], before)


def test_scores_of_another_teacher_are_refused(example, taught, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(taught.out, out)
    words = [str(out), *SHORT, "--seed", "1"]
    assert example.teacher.main(words, lambda _: None) == 2
    assert "another seed" in capsys.readouterr().err, "its checkpoint is another's"
    shutil.rmtree(out / "teacher")
    fix = "choose another folder, or delete this one"
    got = f"expected a new folder, or one with the same settings, got one of another seed; {fix}"
    code = example.teacher.main(words, lambda _: None)
    refused(capsys, code, f"teacher.py: probs: {got}")


def test_steps_come_in_order(example, tmp_path, capsys):
    code = example.teacher.main([str(tmp_path)])
    fix = "run examples/camvid/convert.py first"
    said = f"teacher.py: {tmp_path}: expected a folder of convert.py, got none; {fix}"
    refused(capsys, code, said)
    code, fix = example.results.main([str(tmp_path)]), "run examples/camvid/teacher.py first"
    said = f"results.py: {tmp_path}: expected probabilities of teacher.py, got none; {fix}"
    refused(capsys, code, said)


def test_unknown_sections_are_refused(example, taught, capsys):
    code = example.results.main([str(taught.out), "twelve"])
    names = "eleven, objects, coverage, sweep, certificates, refitted, promise, students"
    said = f"results.py: section: expected one of {names}, got twelve; choose among them"
    refused(capsys, code, said)


@pytest.fixture(scope="module")
def tabled(example: SimpleNamespace, taught: SimpleNamespace) -> Path:
    """The folder after a section whose time ran out, and then did not."""
    words = [str(taught.out), "eleven"]
    assert example.results.main([*words, "--budget-seconds", "-1"]) == 1
    assert example.results.main(words) == 0
    return taught.out


def cells(text: str) -> list[list[str]]:
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    return [row for row in rows if row[0] and not set(row[0]) <= set("-: ")]


@pytest.mark.nightly
def test_the_first_table(tabled):
    rows = cells((tabled / "results" / "eleven" / "table.md").read_text())
    titles = ["rule", "α", "coverage", "set size", "kept", "wrong", "mIoU kept", "mIoU all"]
    assert rows[0] == titles
    names = [(row[0], row[1]) for row in rows[1:]]
    alphas = ("0.1", "0.05", "0.01")
    variants = [(name, alpha) for name in ("pixel-wise", "image-wise") for alpha in alphas]
    assert names == [("raw argmax", ""), ("constant 0.3", ""), *variants]
    lines = lines_of(tabled / "heldout.txt")
    pairs = [(scores_of(tabled, line).argmax(0), truth_of(tabled, line)) for line in lines]
    miou, wrong = numpy_iou(pairs)
    assert rows[1][4:] == ["100 %", f"{100 * wrong:.1f} %", f"{miou:.3f}", f"{miou:.3f}"]


def test_what_was_said_is_not_asked_again(example, tabled, capsys, monkeypatch):
    monkeypatch.setattr(example.runner, "_cpseg", lambda words: pytest.fail(str(words)))
    code = example.results.main([str(tabled), "eleven", "--budget-seconds", "-1"])
    assert code == 0
    table = (tabled / "results" / "eleven" / "table.md").read_text()
    assert capsys.readouterr().out == f"## eleven\n\n{table}\n"


def test_another_command_under_the_same_name_is_run(example, tabled, monkeypatch):
    monkeypatch.setattr(example.results, "ALPHAS", ("0.2",))
    path = tabled / "results" / "eleven" / "pixel-0.2-calibrate.txt"
    path.write_text("$ cpseg calibrate --something else\nnothing\n")
    assert example.results.main([str(tabled), "eleven"]) == 0
    assert "alpha 0.2, 100 images" in path.read_text()


def test_results_of_another_teacher_are_refused(example, tabled, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "probs").mkdir(parents=True)
    (out / "results").mkdir()
    made = json.loads((tabled / "probs" / "made.json").read_text())
    (out / "results" / "made.json").write_text(json.dumps(made))
    (out / "probs" / "made.json").write_text(json.dumps(made | {"epochs": [45, 0]}))
    got = "expected a new folder, or one with the same settings, got one of another epochs"
    fix = "choose another folder, or delete this one"
    refused(
        capsys,
        example.results.main([str(out), "eleven"]),
        f"results.py: {out / 'results'}: {got}; {fix}",
    )


def test_a_failed_command_is_one_line(example, tabled, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "probs").mkdir(parents=True)
    shutil.copy(tabled / "probs" / "made.json", out / "probs")
    assert example.results.main([str(out), "eleven"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("$ cpseg calibrate --root . ")
    assert said[1].startswith("results.py: cpseg calibrate --root . ")
    assert "labelled_100.txt: expected an id list or a folder, got no such file; " in said[1]
    assert len(said) == 2
    assert not list((out / "results").rglob("*.txt"))


def test_a_certificate_and_its_mean_over_images(example, tabled):
    with example.results.inside(tabled):
        runner = example.runner.Runner("certificates", float("inf"), 1)
        given = (runner, "eleven", 100, "0.9", "--pvalue", "betting")
        said = example.results.certified(*given)
        assert said == example.results.certified(*given)
        none = example.results.certified(runner, "eleven", 25, "0.05", "--pvalue", "betting")
    assert none == "none: 20 images, needs 50"
    path = tabled / "results" / "certificates" / "eleven-100-0.9-pvalue-betting.safetensors"
    threshold = float(Calibration.load(path).threshold.flatten()[0])
    kept = wrong = valid = 0
    means = []
    for line in lines_of(tabled / "heldout.txt"):
        probs, truth = scores_of(tabled, line).astype(np.float32), truth_of(tabled, line)
        known = (np.float32(1) - probs.max(0) <= np.float32(threshold)) & (truth != 255)
        bad = known & (probs.argmax(0) != truth)
        kept, wrong, valid = kept + known.sum(), wrong + bad.sum(), valid + (truth != 255).sum()
        if known.any():
            means.append(bad.sum() / known.sum())
    share = f"{100 * kept / valid:.1f} %".replace("100.0", "100")
    assert said == f"{share}, {100 * wrong / kept:.1f} / {100 * np.mean(means):.1f} % wrong"


def test_the_mean_over_images_counts_labels_that_are_kept(example, tabled, tmp_path):
    made = Calibration.load(tabled / "results" / "eleven" / "image-0.1.safetensors")
    lines = lines_of(tabled / "heldout.txt")
    probs = [scores_of(tabled, line).astype(np.float32) for line in lines]
    half = float(np.median(np.stack([np.float32(1) - p.max(0) for p in probs])))
    path, errors = tmp_path / "half.safetensors", []
    replace(made, threshold=torch.full_like(made.threshold, half)).save(path)
    for line, p in zip(lines, probs, strict=True):
        truth = truth_of(tabled, line)
        kept = (np.float32(1) - p.max(0) <= np.float32(half)) & (truth != 255)
        if kept.any():
            errors.append((kept & (p.argmax(0) != truth)).sum() / kept.sum())
    with example.results.inside(tabled):
        found = example.results.mean_wrong(path, ())
    assert found == pytest.approx(np.mean(errors), abs=1e-6)


def test_every_section_asks_for_what_there_is(example, taught, tmp_path, monkeypatch):
    """Commands are parsed as they would be, and answered with made-up figures."""
    out = tmp_path / "out"
    (out / "probs").mkdir(parents=True)
    shutil.copy(taught.out / "probs" / "made.json", out / "probs")
    parser, asked = command.parser(), []

    def answer(words: list[str]) -> tuple[int, str]:
        args = parser.parse_args(words[1:])
        asked.append(words[1])
        if words[1] == "sweep":
            args.output.mkdir(parents=True)
            figures = ("miou_all", "kept", "wrong", "coverage")
            names = [f"{figure}{end}" for figure in figures for end in ("", "_se")]
            settings = [("raw argmax", "", "")]
            settings += [
                (variant, "none" if ground is None else str(ground), alpha)
                for variant in args.variants
                for ground in args.backgrounds
                for alpha in args.alphas
            ]
            with (args.output / "sweep.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["variant", "background", "alpha", *names])
                writer.writerows([*setting, *[0.25] * len(names)] for setting in settings)
        if words[1] == "evaluate":
            rules = ["raw argmax", "constant 0.3"]
            for variant in ("pixel", "image", "blocks", "kmeans", "annuli"):
                rules += [variant, f"{variant}, suppressed"]
            row = dict.fromkeys(("kept", "wrong", "miou_kept", "miou_all"), 0.5)
            rows = [row | {"rule": r, "coverage": 0.75, "set_size": 2.5} for r in rules]
            rows[0] |= {"coverage": None}
            args.output.write_text(json.dumps(rows))
        return (1, "cpseg: not certified: none") if words[1] == "certify" else (0, "")

    monkeypatch.setattr(example.runner, "_cpseg", answer)
    sections = ("eleven", "objects", "coverage", "sweep", "certificates", "promise")
    assert example.results.main([str(out), *sections]) == 0
    counts = {name: asked.count(name) for name in set(asked)}
    held = 6 + 6 + 45 + 15 + 9 + 20
    assert counts == {"calibrate": held, "evaluate": held, "sweep": 2, "certify": 39}
    for section in sections:
        rows = cells((out / "results" / section / "table.md").read_text())
        assert len({len(row) for row in rows if len(row) > 2}) == 1, section


def test_refitted_scores_over_draws(example, taught, tmp_path, monkeypatch):
    out, rng = tmp_path / "out", np.random.default_rng(0)
    (out / "probs").mkdir(parents=True)
    shutil.copy(taught.out / "probs" / "made.json", out / "probs")
    scores = ("raw", "temperature", "vector", "dirichlet", "dirichlet, context")
    rules = [f"{s}, {end}" for s in scores for end in ("argmax", "confidence 0.9")]
    rules += [
        f"{s}, certified {b} % per {per}"
        for s in (scores[0], scores[-1])
        for b in (5, 10)
        for per in ("labels", "image")
    ]
    values: dict[str, list[float]] = {}

    def answer(words: list[str]) -> tuple[int, str]:
        path, budget = Path(words[words.index("-o") + 1]), words[words.index("--budgets") + 1]
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            fields = ("error", "miou_all", "miou_kept", "kept", "wrong", "area")
            if new:
                writer.writerow(["budget", "split", "rule", *fields])
            for split in range(5):
                for rule in [*rules, "raw, eq. 4"]:
                    row = rng.random(6)
                    values.setdefault(f"{path.stem} {budget} {rule}", []).append(row[0])
                    area = row[5] if "argmax" in rule else ""
                    writer.writerow([budget, split, rule, *row[:5], area])
                writer.writerow([budget, split, "recommended: raw argmax", *[""] * 6])
        return 0, ""

    monkeypatch.setattr(example.runner, "_script", answer)
    assert example.results.main([str(out), "refitted"]) == 0
    text = (out / "results" / "refitted" / "table.md").read_text()
    rows = [row for row in cells(text) if row[0] == "dirichlet, context" and row[1] == "50"]
    for column, kind in ((2, "eleven"), (5, "objects")):
        found = 100 * np.array(values[f"{kind} 50 dirichlet, context, argmax"])
        error = found.std(ddof=1) / 5**0.5
        assert rows[0][column] == f"{found.mean():.1f} ± {error:.1f}"
    assert [row[-1] for row in cells(text) if row[0] == "raw, eq. 4"] == ["-"] * 3
    assert text.endswith("recommends, of 30 draws: raw argmax in 30\n")


def test_students_are_options_of_the_other_examples(example, taught, tmp_path, monkeypatch):
    out, asked = tmp_path / "out", []
    (out / "probs").mkdir(parents=True)
    shutil.copy(taught.out / "probs" / "made.json", out / "probs")
    shutil.copy(taught.out / "map.json", out)

    def answer(words: list[str]) -> tuple[int, str]:
        assert words[:2] == ["python", "examples/ablation/run.py"]
        args, rest = example.run.parser().parse_known_args(words[2:])
        needed = ["--dataset", args.dataset, "--lists", "l", "--out", "o", "--method", "label-only"]
        parser = example.train.parser()
        parser.parse_args([*needed, *rest])
        for row in args.row:
            parser.parse_args([*needed, "--root", "r", *row.labels, "--method", row.method])
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{args.table}.md").write_text("| row |\n| --- |\n")
        classes = 7 if "--class-map" in rest else 11
        values = ",".join(["12.5"] * (classes - 1) + ["nan"])
        lines = ["row,labelled,of", f"x,9,labels,{values}", f"x,9,student,{values}"]
        lines += [f"x + SR,9,labels,{values}", f"x + SR,9,student,{values}"]
        (args.out / f"{args.table}-classes.csv").write_text("\n".join(lines) + "\n")
        asked.append((args.out.name, args.lists[0].name, len(args.seeds), bool(args.certified)))
        return 0, ""

    monkeypatch.setattr(example.runner, "_script", answer)
    assert example.results.main([str(out), "students"]) == 0
    parts = [(f"{k}-{b}", str(b), b == 50) for k in ("eleven", "objects") for b in (25, 50)]
    parts += [("eleven-8", "8", False)]
    parts += [(f"{kind}-25-more", "25", False) for kind in ("eleven", "objects")]
    parts += [("eleven-all", "all", False)]
    assert asked == [(n, lists, s, c) for n, lists, c in parts for s in (1, 2, 3)]
    rows = cells((out / "results" / "students" / "table.md").read_text())
    by_class = [row for row in rows if row[0].startswith("x")]
    assert [row[:2] for row in by_class[:3]] == [
        ["x", "labels"],
        ["x", "student"],
        ["x + SR", "student"],
    ]
    titles = [row[2:] for row in rows if row[0] == "IoU"]
    assert [len(row) for row in titles] == [11, 11, 7, 7, 11, 11, 7, 11]
    assert titles[2][0] == "background"
    assert [row[2:] for row in by_class][6] == ["12"] * 6 + ["-"]


def test_the_name_of_a_u_net_may_say_its_width(example):
    build = example.teacher.build
    sizes = [sum(p.numel() for p in build(n, 11).parameters()) for n in ("unet", "unet-16")]
    assert sizes[0] == sizes[1]
    assert build("unet-24", 11).head.in_channels == 24
