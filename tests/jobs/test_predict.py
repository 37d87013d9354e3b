"""`cpseg predict`: the files it writes, where it goes on, and what it refuses.

No statistical test here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tests.support import tiny_models
from tests.support.folders import command, complains, done, files, finish, options, refused, start
from torch import Tensor

from cpseg import foundation
from cpseg.core.selection import Evidence
from cpseg.files.id_lists import Pair
from cpseg.files.score_files import find_scores, read_scores
from cpseg.jobs.predict import find_images, predict, read_image

CLI = sys.modules["cpseg.cli.command"]
NAMES = ("background", "red", "green", "blue")
MADE = {"model": "colours"}


def colours(images: Tensor) -> Tensor:
    """A segmenter without a network: how red, green and blue; the background is the rest."""
    share = images / 3
    return torch.cat((1 - share.amax(1, keepdim=True), share), dim=1)


def expected(values: np.ndarray) -> np.ndarray:
    """``colours`` of 8-bit RGB ``[H, W, 3]`` by NumPy, ``[4, H, W]`` in 0..255 as written."""
    share = values.transpose(2, 0, 1) / 255 / 3  # thirds: never half way between two numbers
    return np.rint(np.concatenate([1 - share.max(0, keepdims=True), share]) * 255)


def pictures(
    root: Path, sizes: list[tuple[int, int]], seed: int = 0
) -> tuple[list[Pair], dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    values = {}
    for number, size in enumerate(sizes):
        name = f"images/{number:02d}.png"
        values[name] = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values[name]).save(root / name)
    (root / "ids.txt").write_text("".join(f"{name}\n" for name in values))
    return [Pair(name, None) for name in values], values


SIZES = [(6, 9), (9, 6), (6, 9), (7, 7), (6, 9)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    pictures(tmp_path / "data", SIZES)
    return tmp_path / "data"


@pytest.fixture
def pairs(root: Path) -> list[Pair]:
    return find_images(root)


def run(root: Path, pairs: list[Pair], out: Path, segmenter=colours, made=MADE, **how) -> int:
    return predict(segmenter, root, pairs, out, **{"names": NAMES, "made": made, **how})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return tiny_models.folder("segformer", tmp_path_factory.mktemp("segformer"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# What is written.


def test_score_maps(tmp_path: Path) -> None:
    pairs, values = pictures(tmp_path / "data", SIZES)
    out = tmp_path / "out"
    assert run(tmp_path / "data", pairs, out) == 5
    written = {f"images/{n:02d}.npz" for n in range(5)}
    assert set(files(out)) == {"run.json", "manifest.jsonl", "classes.txt", *written}
    assert (out / "classes.txt").read_text().splitlines() == list(NAMES)
    for name, image in values.items():
        stored = np.load((out / name).with_suffix(".npz"))["probs"]
        assert stored.dtype == np.uint8
        assert np.array_equal(stored, expected(image))
        assert torch.equal(
            read_scores((out / name).with_suffix(".npz")), torch.from_numpy(stored) / 255
        )


def test_half_precision(root: Path, pairs: list[Pair], tmp_path: Path) -> None:
    run(root, pairs, tmp_path / "out", dtype="float16")
    found = read_scores(tmp_path / "out" / "images" / "00.npz")
    assert found.dtype == torch.float16
    image = read_image(root / "images" / "00.png") / 255
    assert torch.equal(found, colours(image[None])[0].to(torch.float16))


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
@pytest.mark.parametrize("background", [0, 2, None])
def test_evidence_is_that_of_the_maps(
    dtype: str,
    background: int | None,
    root: Path,
    pairs: list[Pair],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(root, pairs, tmp_path / "maps", dtype=dtype)
    run(root, pairs, tmp_path / "E", dtype=dtype, evidence=True, background=background)
    words = options(root=root, ids=root / "ids.txt", probs=tmp_path / "maps")
    rule = "none" if background is None else background
    done(command(capsys, "compact", *words, "--background", rule, "-o", tmp_path / "C"))
    compacted = {name: text for name, text in files(tmp_path / "C").items() if "images" in name}
    written = {name: text for name, text in files(tmp_path / "E").items() if "images" in name}
    assert len(written) == 5
    assert written == compacted
    found = read_scores(tmp_path / "E" / "images" / "00.safetensors")
    assert isinstance(found, Evidence)
    assert (found.background, found.num_classes) == (background, 4)


def test_batches_hold_images_of_one_size(root: Path, pairs: list[Pair], tmp_path: Path) -> None:
    seen = []

    def watched(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape))
        return colours(images)

    run(root, pairs, tmp_path / "one")
    run(root, pairs, tmp_path / "two", watched, batch=2)
    assert seen == [(2, 3, 6, 9), (1, 3, 6, 9), (1, 3, 7, 7), (1, 3, 9, 6)]
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_images_as_stored(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    turned = Image.fromarray(values)
    exif = turned.getexif()
    exif[0x0112] = 6  # a camera held upright
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png").permute(1, 2, 0), values)
    grey = Image.fromarray(values[..., 0])
    grey.save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png")[2], values[..., 0])
    palette = grey.convert("P")
    palette.save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").shape == (3, 4, 6)
    Image.fromarray(values).convert("RGBA").save(tmp_path / "alpha.png")
    assert np.array_equal(read_image(tmp_path / "alpha.png").permute(1, 2, 0), values)


def test_images_of_a_folder(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "a.png", "b/.hidden.png", ".git/c.png", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [pair.image for pair in find_images(tmp_path)] == ["a.png", "b/2.JPG"]


# Going on.


def test_a_run_that_was_stopped_goes_on(root: Path, pairs: list[Pair], tmp_path: Path) -> None:
    out, calls = tmp_path / "out", []

    def failing(images: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return colours(images)

    with pytest.raises(KeyboardInterrupt):
        run(root, pairs, out, failing)
    (out / "images" / ".02.npz.abc.part").write_bytes(b"half")
    assert len(list(out.rglob("*.npz"))) == 2
    assert run(root, pairs, out) == 3
    assert run(root, pairs, out) == 0
    run(root, pairs, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_an_image_is_predicted_again_only_if_its_content_changes(
    root: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    """A model may take seconds for an image: other times alone are no reason."""
    out = tmp_path / "out"
    assert run(root, pairs, out) == 5
    for pair in pairs:
        os.utime(root / pair.image)
    assert run(root, pairs, out) == 0
    first = root / pairs[0].image
    status = first.stat()
    with Image.open(first) as image:
        turned = image.transpose(Image.Transpose.ROTATE_180)
    turned.save(first)
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns))
    before = files(out)
    assert run(root, pairs, out) == 1
    changed = {name for name, content in files(out).items() if content != before[name]}
    assert changed == {str(Path(pairs[0].image).with_suffix(".npz")), "manifest.jsonl"}


@pytest.mark.nightly
def test_a_killed_command_goes_on(
    root: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(model=model, images=root, background_from="complement", workers=1)
    code = """
import os, sys
from cpseg.cli import main
replace = os.replace
def killing(source, target):
    if str(target).endswith("03.npz"):
        os.kill(os.getpid(), 9)
    replace(source, target)
os.replace = killing
main(sys.argv[1:])
"""
    out = tmp_path / "out"
    assert finish(start("predict", *words, "-o", out, code=code)).code == -9
    left = files(out)
    assert {"images/02.npz"} <= set(left)
    assert not any(name.endswith("03.npz") for name in left)
    assert any(name.endswith(".part") for name in left)
    result = done(command(capsys, "predict", *words, "-o", out))
    assert f"{out}: 2 score files written" in result.out
    done(command(capsys, "predict", *words, "-o", tmp_path / "fresh"))
    assert files(out) == files(tmp_path / "fresh")


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": "float16"},
        {"evidence": True, "background": 0},
        {"evidence": True, "background": 1},
        {"made": {"model": "another"}},
        {"names": NAMES[::-1]},
    ],
)
def test_a_folder_of_another_run_is_refused(
    changed: dict, root: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(root, pairs, out, evidence=True, background=None)
    before = files(out)
    with pytest.raises(ValueError, match="new folder") as caught:
        run(root, pairs, out, **{"evidence": True, "background": None, **changed})
    complains(caught.value, out, "got another run's")
    assert files(out) == before


def test_a_folder_of_other_images_is_refused(root: Path, pairs: list[Pair], tmp_path: Path) -> None:
    run(root, pairs, tmp_path / "out")
    shutil.copytree(root, tmp_path / "others")
    with pytest.raises(ValueError, match="another run's"):
        run(tmp_path / "others", pairs, tmp_path / "out")


@pytest.mark.nightly
@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
def test_two_ranks_write_the_bytes_of_one(
    root: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", *options(model=model, images=root, background_from="complement")]
    done(command(capsys, *words, "-o", tmp_path / "one"))
    out = tmp_path / "two"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def two_ranks() -> str:
        ran = subprocess.run(
            [sys.executable, *launcher, "-m", "cpseg", *words, "-o", str(out)],
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        assert files(out) == files(tmp_path / "one")
        return ran.stdout

    assert "3 score files written by this rank" in two_ranks()
    for number in (0, 2, 4):  # all of them the first rank's
        (out / "images" / f"{number:02d}.npz").unlink()
    assert "2 score files written by this rank" in two_ranks(), "what is left is shared"


def test_ranks_wait_for_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda _, **how: asked.update(how))
    with CLI._Ranks():
        assert asked["timeout"].days >= 1


FLAT = """
import resource, sys
from pathlib import Path
from cpseg import foundation
from cpseg.jobs.predict import find_images, predict
model, data, out = map(Path, sys.argv[1:])
network = foundation.load(model, [f"class {i}" for i in range(60)], background="complement")
pairs = find_images(data)
made = {}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for count in (20, 100):
    predict(network, data, pairs[:count], out, names=network.names, made=made, evidence=True)
    print(peak())
"""


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory in other units")
def test_memory_is_flat_over_100_images(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pictures(tmp_path / "data", [(64, 96)] * 100)
    path = tiny_models.folder("clipseg", tmp_path / "model")
    recorded = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps({**recorded, "size": 32}))
    result = finish(start(path, tmp_path / "data", tmp_path / "out", code=FLAT))
    assert result.code == 0, result.err
    first, last = map(float, result.out.split())
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) == 100
    # 80 more images of 61 classes: 114 MiB of scores, if they stayed.
    assert last - first < 30


def test_what_came_before_a_bad_image_is_kept(
    root: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    (root / "images" / "03.png").write_bytes(b"GIF")
    with pytest.raises(ValueError, match=r"03\.png: expected an image"):
        run(root, pairs, tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("*.npz"))) == 3


# The command.


def test_from_images_to_labels(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    pairs, _ = pictures(root, [(12, 16)] * 6)
    rng = np.random.default_rng(0)
    lines = []
    for pair in pairs:
        mask = f"masks/{Path(pair.image).name}"
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 5, (12, 16), dtype=np.uint8)).save(root / mask)
        lines.append(f"{pair.image} {mask}\n")
    (root / "ids.txt").write_text("".join(lines))
    ids = {"root": root, "ids": root / "ids.txt"}
    out = tmp_path / "P"
    words = options(model=model, **ids, background_from="complement")
    result = done(command(capsys, "predict", *words, "-o", out))
    assert result.out == (
        f"{out}: 6 score files written by this rank; "
        "5 classes in classes.txt, background: class 0\n"
    )
    calibration = tmp_path / "c.safetensors"
    words = options(**ids, probs=out, background=0, alpha=0.3)
    done(command(capsys, "calibrate", *words, "-o", calibration))
    words = options(**ids, probs=out, calibration=calibration)
    done(command(capsys, "label", *words, "-o", tmp_path / "L"))
    words = options(model=model, **ids, background_from="complement", evidence=0)
    done(command(capsys, "predict", *words, "-o", tmp_path / "E"))
    words = options(**ids, probs=tmp_path / "E", calibration=calibration)
    done(command(capsys, "label", *words, "-o", tmp_path / "M"))
    for pair in pairs:
        mask = Path("masks") / pair.image
        assert (tmp_path / "L" / mask).read_bytes() == (tmp_path / "M" / mask).read_bytes()


def test_every_option(root: Path, model: Path, tmp_path: Path, capsys) -> None:
    classes, mapping = tmp_path / "classes.txt", tmp_path / "map.json"
    classes.write_text("rest\nvehicle\n")
    target = {"sky": "rest", "road": "rest", "car": "vehicle", "bus": None}
    mapping.write_text(json.dumps(target))
    words = options(
        model=model,
        images=root,
        classes=classes,
        class_map=mapping,
        background_from="prompt",
        dtype="float16",
        batch=2,
        tile=8,
        overlap=3,
        amp="bfloat16",
    )
    result = done(command(capsys, "predict", *words, "-o", tmp_path / "out"))
    assert "2 classes in classes.txt, background: class 0" in result.out
    assert (tmp_path / "out" / "classes.txt").read_text() == "rest\nvehicle\n"
    found = read_scores(tmp_path / "out" / "images" / "01.npz")
    assert (found.shape, found.dtype) == ((2, 9, 6), torch.float16)
    segmenter = foundation.load(
        model,
        classes,
        class_map=mapping,
        background="prompt",
        tile=8,
        overlap=3,
        amp=torch.bfloat16,
    )
    image = read_image(root / "images" / "01.png").to(torch.float32) / 255
    assert torch.equal(found, segmenter(image[None])[0].to(torch.float16))


def test_options_reach_the_job(
    root: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def load(*_: object, **how: object) -> foundation.Foundation:
        asked.update(how)
        return foundation.Foundation(lambda images, size: colours(images), NAMES, None)

    def job(*_: object, **how: object) -> int:
        asked.update(how)
        return 0

    monkeypatch.setattr(foundation, "load", load)
    monkeypatch.setattr(sys.modules["cpseg.jobs.predict"], "predict", job)
    wanted = {"revision": "v2", "tile": 8, "overlap": 3, "batch": 4, "dtype": "float16"}
    words = options(model="m", images=root, background_from="none", amp="float16", **wanted)
    done(command(capsys, "predict", *words, "-o", tmp_path / "out"))
    wanted |= {"amp": torch.float16, "background": None, "evidence": False, "device": "cpu"}
    assert {name: asked[name] for name in wanted} == wanted


def test_bad_input(root: Path, model: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"

    def said(**changed: object) -> tuple:
        words = {"model": model, "images": root, "background_from": "none", **changed}
        return command(capsys, "predict", *options(**words), "-o", out)

    def listed(text: str) -> tuple:
        (tmp_path / "ids.txt").write_text(text)
        return said(images=None, root=root, ids=tmp_path / "ids.txt")

    refused(listed("images/00.png\n\nimages/01.png\n"), "ids.txt, line 2", "got ''", "no blank")
    refused(listed("my images/00 1.png\n"), "line 1: expected 'image'", "separate by a tab")
    refused(listed("images/00.png\nimages/00.png\n"), "line 2: expected every image once")
    refused(listed("images/00.png\nimages/77.png\n"), "images/77.png: expected an image, got no")
    refused(listed("../data/images/00.png\n"), "expected image paths below the root")
    refused(said(root=root, ids=tmp_path / "ids.txt"), "--images, or --root and --ids, got both")
    refused(said(images=None), "--images, or --root and --ids, got none of them")
    refused(said(images=None, root=root), "--root and --ids, got --root alone; pass both")
    refused(said(images=root / "ids.txt"), "--images: expected a folder", "--root and --ids")
    refused(said(images=tmp_path / "nowhere"), "--images: expected a folder")
    refused(said(device="cuda:77"), "--device: expected cpu, or a device of this machine")
    refused(said(background_from=0), "argument --background-from: invalid choice: '0'")
    refused(said(evidence=4), "predict: expected background in 0..3 or None, got 4")
    refused(said(evidence="x"), "expected a class index or 'none', got 'x'")
    refused(said(model="./nowhere"), "expected a folder with a model, got './nowhere'")
    refused(said(overlap=4), "expected a tile for the overlap")
    mapping = tmp_path / "map.json"
    mapping.write_text(json.dumps({"sky": 0, "road": 1, "bus": 1}))
    refused(said(class_map=mapping), "an entry for every model class, got none for 2")
    mapping.unlink()
    refused(said(class_map=mapping), "map.json: No such file")
    classes = tmp_path / "classes.txt"
    classes.write_text("sky\n\nroad\n")
    refused(said(classes=classes), "classes.txt, line 2", "got ''", "without blank lines")
    assert not out.exists()
    (out / "mine").mkdir(parents=True)
    refused(said(), "expected a new or empty folder, got one with 'mine' in it")


def test_images_that_are_none(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected images") as caught:
        find_images(tmp_path / "empty")
    complains(caught.value, tmp_path / "empty", "got none; check the path")
    path = tmp_path / "x.png"
    path.write_bytes(b"GIF")
    with pytest.raises(ValueError, match="an image") as caught:
        read_image(path)
    complains(caught.value, path, "got an unreadable one")
    whole = (root / "images" / "00.png").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="an image") as caught:
        read_image(path)
    complains(caught.value, path, "got an unreadable one")
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(path)
    with pytest.raises(ValueError, match="8 bits") as caught:
        read_image(path)
    complains(caught.value, path, "8 bits per channel, got mode I", "; convert it to RGB")
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "nowhere.png")


def test_names_that_would_share_a_file_are_refused_and_spaces_are_not(
    root: Path, tmp_path: Path
) -> None:
    shutil.copy(root / "images" / "00.png", root / "images" / "00.jpg")
    with pytest.raises(ValueError, match="differ") as caught:
        run(root, find_images(root), tmp_path / "out")
    complains(caught.value, "predict", "got images/00.jpg and images/00.png; rename one")
    (root / "images" / "00.jpg").rename(root / "images" / "a b.jpg")
    assert not (tmp_path / "out").exists()
    run(root, find_images(root), tmp_path / "out")
    assert find_scores(tmp_path / "out", "images/a b.jpg").name == "a b.npz"


@pytest.mark.parametrize(
    ("segmenter", "said"),
    [
        (lambda x: colours(x) * float("nan"), "probabilities in [0, 1], got NaN; return prob"),
        (lambda x: colours(x) * 7, "probabilities in [0, 1], got values from"),
        (lambda x: colours(x) - 1, "probabilities in [0, 1], got values from"),
        (lambda x: colours(x)[:, 1:], "scores [1, 4, 6, 9], got [1, 3, 6, 9]; return one"),
        (lambda x: colours(x)[..., 1:], "scores [1, 4, 6, 9], got [1, 4, 6, 8]; return one"),
    ],
)
def test_bad_segmenters_leave_no_file(
    segmenter, said: str, root: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"scores|probabilities") as caught:
        run(root, pairs, tmp_path / "out", segmenter)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list((tmp_path / "out").rglob("*.npz"))


def test_bad_settings(root: Path, pairs: list[Pair], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype") as caught:
        run(root, pairs, tmp_path / "out", dtype="float32")
    complains(
        caught.value, "predict", "a dtype among 'uint8', 'float16', got 'float32'; choose one"
    )
    with pytest.raises(ValueError, match="batch") as caught:
        run(root, pairs, tmp_path / "out", batch=0)
    complains(caught.value, "predict", "batch as a whole number >= 1, got 0; pass 1")
    with pytest.raises(ValueError, match="background") as caught:
        run(root, pairs, tmp_path / "out", evidence=True, background=4)
    complains(caught.value, "predict", "background in 0..3 or None, got 4")
