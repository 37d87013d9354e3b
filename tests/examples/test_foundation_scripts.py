"""What the scripts for SEEM and GLaMM do around those projects, which stand-ins play here."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.folders import complains, files
from tests.support.helpers import modules

from cpseg.files.score_files import read_scores
from cpseg.foundation import read_classes

FOLDER = Path(__file__).parents[2] / "examples" / "foundation"
NAMES = ("prob_files", "seem_probs", "glamm_probs")


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    with modules("foundation", NAMES) as found:
        yield found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    for name, size in (("a/0.png", (8, 12)), ("a/1.jpg", (10, 6))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "ids.txt").write_text("a/0.png masks/0.png\na/1.jpg\n")
    (tmp_path / "classes.txt").write_text("road: road, street\ncar\n")
    return tmp_path


@pytest.fixture
def run(example: SimpleNamespace, data: Path) -> Callable[..., int]:
    """``write_all`` on the data set; keywords replace arguments."""

    def ask(path: Path, prompts: list[str]) -> list[np.ndarray]:
        shape = np.array(Image.open(path)).shape[:2]
        return [np.full(shape, 0.1 * number) for number in range(len(prompts))]

    def call(ask: Callable[..., object] = ask, **changed: object) -> int:
        how = {"root": data, "ids": data / "ids.txt", "classes": data / "classes.txt"}
        how |= {"background": "complement", "out": data / "P", "made": {"side": 512}}
        return example.prob_files.write_all(ask, **{**how, **changed})

    return call


def colours(path: Path) -> np.ndarray:
    """An image whose channels, rows and columns tell which they are, as RGB ``[8, 12, 3]``."""
    image = np.zeros((8, 12, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = 250, 20 * np.arange(8)[:, None], np.arange(12)
    Image.fromarray(image).save(path)
    return image


def test_class_scores(example: SimpleNamespace) -> None:
    maps = [np.full((2, 3), value) for value in (0.2, 0.6, 0.3)]
    scores = example.prob_files.class_scores(maps, [2, 1], "none")
    assert scores.shape == (2, 2, 3)
    assert np.allclose(scores[:, 0, 0], [0.4, 0.3])
    rest = example.prob_files.class_scores(maps, [2, 1], "complement")
    assert np.allclose(rest[:, 0, 0], [0.6, 0.4, 0.3])
    assert np.allclose(example.prob_files.class_scores(maps, [2, 1], "prompt"), scores)
    for bad in ([np.full((2, 3), 1.1)], [np.full((2, 3), np.nan)]):
        with pytest.raises(ValueError, match="take the sigmoid of logits"):
            example.prob_files.class_scores(bad, [1], "none")
    with pytest.raises(ValueError, match="expected 3 maps, got 1"):
        example.prob_files.class_scores(maps[:1], [2, 1], "none")
    with pytest.raises(ValueError, match="expected one of"):
        example.prob_files.class_scores(maps, [2, 1], "0")


def test_sigmoid(example: SimpleNamespace) -> None:
    logits = np.array([-1000, -2.0, 0, 2, 1000], np.float32)
    wanted = [0, 1 / (1 + np.exp(2)), 0.5, 1 / (1 + np.exp(-2)), 1]
    with np.errstate(all="raise"):
        assert np.allclose(example.prob_files.sigmoid(logits), wanted, atol=1e-12)


def test_files_are_what_cpseg_reads(example: SimpleNamespace, data: Path) -> None:
    asked = []

    def ask(path: Path, prompts: list[str]) -> list[np.ndarray]:
        asked.append((path.name, prompts))
        height, width = np.array(Image.open(path)).shape[:2]
        return [np.full((height, width), value) for value in (0.2, 0.6, 0.3)]

    how = {"root": data, "ids": data / "ids.txt", "classes": data / "classes.txt"}
    how |= {"background": "complement", "out": data / "P", "made": {}}
    assert example.prob_files.write_all(ask, **how) == 2
    assert asked == [("0.png", ["road", "street", "car"]), ("1.jpg", ["road", "street", "car"])]
    assert set(files(data / "P")) == {"a/0.npz", "a/1.npz", "classes.txt", "run.json"}
    found = read_scores(data / "P" / "a" / "1.npz")
    assert torch.equal(found[:, 0, 0], torch.tensor([153, 102, 76]) / 255)
    assert found.shape == (3, 10, 6)
    (data / "P" / "a" / "0.npz").unlink()
    assert example.prob_files.write_all(ask, **how) == 1
    classes = read_classes(data / "classes.txt")
    same = example.prob_files.read_classes(data / "classes.txt")
    assert dict(zip(classes.names, map(list, classes.prompts), strict=True)) == same


@pytest.mark.parametrize(
    ("changed", "lines", "what"),
    [
        ({}, "car\nroad: road, street\n", "classes"),
        ({}, "road: street, road\ncar\n", "classes"),
        ({}, "way: road, street\ncar\n", "classes"),
        ({"background": "none"}, None, "background"),
        ({"background": "prompt"}, None, "background"),
        ({"root": "elsewhere"}, None, "root"),
        ({"made": {"side": 640}}, None, "side"),
        ({"made": {}}, None, "side"),
        ({"made": {"side": 512, "at-once": 2}}, None, "at-once"),
        ({"made": {"side": 640}, "background": "none"}, None, "background, side"),
    ],
)
def test_another_run_is_refused(
    changed: dict[str, object], lines: str | None, what: str, run: Callable[..., int], data: Path
) -> None:
    assert run() == 2
    (data / "P" / "a" / "0.npz").unlink()
    before = files(data / "P")
    if lines is not None:
        (data / "classes.txt").write_text(lines)
    with pytest.raises(ValueError, match="choose another --out, or delete this one") as caught:
        run(**changed)
    complains(caught.value, data / "P", f"the same {what}, got another {what};")
    assert files(data / "P") == before


def test_the_same_run_goes_on(run: Callable[..., int], data: Path) -> None:
    (data / "less.txt").write_text("a/1.jpg\n")
    assert [run(ids=data / "less.txt"), run(), run()] == [1, 1, 0]
    assert json.loads((data / "P" / "run.json").read_text()) == {
        "classes": [["road", ["road", "street"]], ["car", ["car"]]],
        "background": "complement",
        "root": str(data.resolve()),
        "side": 512,
    }


def test_the_record_comes_first_and_whole(
    run: Callable[..., int], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="the disk is full"):
            run()
    assert not any(path.is_file() for path in (data / "P").rglob("*"))

    def killed(path: Path, prompts: list[str]) -> list[np.ndarray]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(killed)
    assert set(files(data / "P")) == {"classes.txt", "run.json"}
    with pytest.raises(ValueError, match="the same side"):
        run(made={"side": 640})
    assert run() == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"side": 512'])
def test_a_damaged_record_is_another_run(text: str, run: Callable[..., int], data: Path) -> None:
    (data / "P").mkdir()
    (data / "P" / "run.json").write_text(text)
    with pytest.raises(ValueError, match="the same classes, background, root, side, got") as caught:
        run()
    complains(caught.value, data / "P")


def test_a_folder_of_somebody_is_refused(run: Callable[..., int], data: Path) -> None:
    (data / "P").mkdir()
    (data / "P" / ".run.part").write_text("of a killed run")
    (data / "P" / "0.npz").write_text("")
    with pytest.raises(ValueError, match=r"got one with '0\.npz' in it") as caught:
        run()
    complains(caught.value, data / "P", "--out")
    (data / "P" / "0.npz").unlink()
    assert run() == 2


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ("a/0.png\na/1.jpg\na/0.jpg\n", "got a/0.png and a/0.jpg;"),
        ("a/0\na/0.png\n", "got a/0 and a/0.png;"),
        ("../0.png\n", "below the root, got ../0.png;"),
        ("/0.png\n", "below the root, got /0.png;"),
    ],
)
def test_images_without_a_file_of_their_own(
    ids: str, said: str, run: Callable[..., int], data: Path
) -> None:
    (data / "ids.txt").write_text(ids)
    with pytest.raises(ValueError, match="expected image") as caught:
        run(lambda *_: pytest.fail("the model was asked"))
    complains(caught.value, "id list", said)
    assert not (data / "P").exists()


@pytest.mark.parametrize(
    ("background", "wanted"),
    [
        ("complement", "background\nroad\ncar\n"),
        ("prompt", "road\ncar\n"),
        ("none", "road\ncar\n"),
    ],
)
def test_names_of_the_channels(
    background: str, wanted: str, run: Callable[..., int], data: Path
) -> None:
    run(background=background)
    assert (data / "P" / "classes.txt").read_bytes() == wanted.encode()
    assert len(read_scores(data / "P" / "a" / "0.npz")) == len(wanted.splitlines())


def test_two_backgrounds_are_refused(run: Callable[..., int], data: Path) -> None:
    (data / "classes.txt").write_text("background\ncar\n")
    with pytest.raises(ValueError, match="without 'background'") as caught:
        run()
    complains(caught.value, data / "classes.txt", "--background-from prompt")
    assert run(background="prompt") == 2


def test_a_byte_order_mark_is_no_part_of_a_name(
    example: SimpleNamespace, run: Callable[..., int], data: Path
) -> None:
    for name in ("ids.txt", "classes.txt"):
        (data / name).write_text((data / name).read_text(), encoding="utf-8-sig")
    assert example.prob_files.read_ids(data / "ids.txt") == ["a/0.png", "a/1.jpg"]
    assert list(example.prob_files.read_classes(data / "classes.txt")) == ["road", "car"]
    assert run() == 2


@pytest.mark.parametrize("text", ["", "a\n\nb", "a\na", "a:", "a: b,"])
def test_bad_lists_of_classes(text: str, example: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(text or "\n")
    with pytest.raises(ValueError, match=r"x, line \d: expected a new 'name'"):
        example.prob_files.read_classes(tmp_path / "x")


@pytest.mark.parametrize("text", ["a b c", "a\n\nb", "a  b"])
def test_bad_id_lists(text: str, example: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match=r"x, line \d: expected 'image' or 'image mask'"):
        example.prob_files.read_ids(tmp_path / "x")


def test_a_write_that_fails_leaves_nothing(example: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        example.prob_files.write(tmp_path / "x.npz", [None])
    assert files(tmp_path) == {}


def test_seem_gets_names_in_turn(example: SimpleNamespace, data: Path) -> None:
    seen = []

    def evaluate_grounding(batch, mode):
        (asked,) = batch
        seen.append((tuple(asked["image"].shape), asked["groundings"]["texts"]))
        assert asked["image"].dtype == torch.uint8
        texts = asked["groundings"]["texts"]
        values = torch.tensor([float(len(text)) for (text,) in texts])
        size = (asked["height"], asked["width"])
        return [{"grounding_mask": values[:, None, None].expand(-1, *size)}]

    model = SimpleNamespace(evaluate_grounding=evaluate_grounding)
    prompts = ["a", "bus", "truck"]
    maps = example.seem_probs.ask(model, data / "a" / "0.png", prompts, at_once=2, side=16)
    assert maps.shape == (3, 8, 12)
    assert np.allclose(maps[:, 0, 0], 1 / (1 + np.exp(-np.array([1, 3, 5]))))
    assert seen == [((3, 16, 24), [["a"], ["bus"]]), ((3, 16, 24), [["truck"]])]


@pytest.mark.parametrize("side", [8, 16])
def test_seem_gets_rgb(side: int, example: SimpleNamespace, tmp_path: Path) -> None:
    image, seen = colours(tmp_path / "x.png"), []

    def evaluate_grounding(batch, mode):
        seen.append(batch[0]["image"])
        return [{"grounding_mask": torch.zeros(1, 8, 12)}]

    model = SimpleNamespace(evaluate_grounding=evaluate_grounding)
    example.seem_probs.ask(model, tmp_path / "x.png", ["a"], at_once=1, side=side)
    times = side // 8
    wanted = torch.from_numpy(image).permute(2, 0, 1)
    if times == 1:
        assert torch.equal(seen[0], wanted)
    near = wanted.repeat_interleave(times, 1).repeat_interleave(times, 2)
    assert (seen[0].int() - near).abs().max() <= 10


def command(
    monkeypatch: pytest.MonkeyPatch, script: SimpleNamespace, data: Path, **always: object
) -> Callable[..., None]:
    """The ``main`` of a script; keywords are options."""
    monkeypatch.chdir(data)

    def call(**changed: object) -> None:
        given = {"root": ".", "ids": "ids.txt", "classes": "classes.txt", "out": "P"}
        given |= {"background": "complement", **always, **changed}
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["script", *words])
        script.main()

    return call


@pytest.fixture
def seem(
    example: SimpleNamespace, data: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """``seem_probs.py`` as a command, with SEEM's modules played."""

    def evaluate_grounding(batch, mode):
        (asked,) = batch
        size = len(asked["groundings"]["texts"]), asked["height"], asked["width"]
        return [{"grounding_mask": torch.zeros(size)}]

    texts = SimpleNamespace(get_text_embeddings=lambda names, is_eval: None)
    head = SimpleNamespace(predictor=SimpleNamespace(lang_encoder=texts))
    model = SimpleNamespace(
        evaluate_grounding=evaluate_grounding, task_switch={}, sem_seg_head=head
    )
    whole = SimpleNamespace(model=model)
    whole.from_pretrained = whole.eval = whole.cuda = lambda *_: whole
    played = {
        "modeling": {"build_model": lambda settings: None},
        "modeling.BaseModel": {"BaseModel": lambda settings, model: whole},
        "utils.arguments": {"load_opt_from_config_files": lambda paths: {}},
        "utils.constants": {"COCO_PANOPTIC_CLASSES": ["person"]},
        "utils.distributed": {"init_distributed": lambda settings: settings},
    }
    for name, content in played.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    (data / "c.yaml").write_text("c")
    (data / "w.pt").write_text("w")
    return command(monkeypatch, example.seem_probs, data, config=data / "c.yaml", weights="w.pt")


def test_what_a_run_of_seem_is(seem: Callable[..., None], data: Path) -> None:
    seem()
    record = json.loads((data / "P" / "run.json").read_text())
    assert {"classes", "background", "root", "config", "weights", "at-once", "side"} == set(record)
    seem(root=data)
    for name in ("at-once", "side"):
        with pytest.raises(ValueError, match=f"the same {name}, got"):
            seem(**{name: 2})
    for name, path in (("config", "c.yaml"), ("weights", "w.pt")):
        old = (data / path).read_text()
        (data / path).write_text("another")
        with pytest.raises(ValueError, match=f"the same {name}, got"):
            seem()
        (data / path).write_text(old)
    seem()


@pytest.fixture
def glamm(
    example: SimpleNamespace, data: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """``glamm_probs.py`` as a command, with GLaMM's modules played; it keeps what GLaMM sees."""

    def parse_args(words: list[str]) -> SimpleNamespace:
        settings = {"version": "hub/name", "image_size": 1024, "conv_type": "llava"}
        settings |= {"vis_save_path": "here", "local_rank": 0}
        names = [word.lstrip("-") for word in words[::2]]
        return SimpleNamespace(**{**settings, **dict(zip(names, words[1::2], strict=True))})

    def evaluate(whole, large, tokens, sizes, originals, max_tokens_new):
        call.seen.append((whole, large, sizes, originals))
        return None, [torch.zeros(1, *originals[0])]

    def tokens_of(settings: SimpleNamespace) -> None:
        settings.seg_token_idx = object()  # as in the project: added to the settings

    talk = SimpleNamespace(
        roles="ab", append_message=lambda *_: None, get_prompt=lambda: "", copy=lambda: talk
    )
    model = SimpleNamespace(
        evaluate=evaluate, eval=lambda: None, config=SimpleNamespace(vision_tower="")
    )
    whole = SimpleNamespace(
        preprocess=lambda image, return_tensors: {"pixel_values": torch.tensor(image)[None]}
    )
    played = {
        "app": {
            "parse_args": parse_args,
            "setup_tokenizer_and_special_tokens": tokens_of,
            "initialize_model": lambda settings, tokenizer: model,
            "prepare_model_for_inference": lambda model, settings: model,
            "grounding_enc_processor": lambda pixels: pixels,
        },
        "model.llava": {"conversation": SimpleNamespace(conv_templates={"llava": talk, "b": talk})},
        "model.llava.mm_utils": {"tokenizer_image_token": lambda *_, **__: torch.zeros(1)},
        "model.SAM.utils.transforms": {
            "ResizeLongestSide": lambda side: SimpleNamespace(apply_image=lambda image: image)
        },
        "tools.utils": {f"DEFAULT_{x}_TOKEN": "" for x in ("IM_END", "IM_START", "IMAGE")},
        "transformers": {"CLIPImageProcessor": SimpleNamespace(from_pretrained=lambda _: whole)},
    }
    for name, content in played.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    call = command(monkeypatch, example.glamm_probs, data)
    call.seen = []
    return call


def test_what_a_run_of_glamm_is(glamm: Callable[..., None], data: Path) -> None:
    glamm()
    record = json.loads((data / "P" / "run.json").read_text())
    settings = {"question", "version", "image_size", "conv_type"}
    assert {"classes", "background", "root", *settings} == set(record)
    glamm(root=data, vis_save_path="there", local_rank=1)
    for name, value in (("version", "hub/other"), ("image_size", 512), ("conv_type", "b")):
        with pytest.raises(ValueError, match=f"the same {name}, got"):
            glamm(**{name: value})
    (data / "weights").mkdir()
    glamm(version="weights", out="Q")
    glamm(version=data / "weights", out="Q")


def test_glamm_gets_rgb(glamm: Callable[..., None], example: SimpleNamespace, data: Path) -> None:
    image, seen = colours(data / "x.png"), []

    def answer(image: np.ndarray, question: str) -> torch.Tensor:
        seen.append(image)
        return torch.zeros(0, 8, 12)

    example.glamm_probs.ask(answer, data / "x.png", ["road"])
    assert np.array_equal(seen[0], image)

    (data / "ids.txt").write_text("x.png\n")
    glamm()
    whole, large, sizes, originals = glamm.seen[0]
    assert np.array_equal(whole[0].float(), image)
    assert np.array_equal(large[0].float(), image.transpose(2, 0, 1))
    assert sizes == originals == [(8, 12)]


def test_glamm_is_asked_one_prompt_at_a_time(example: SimpleNamespace, data: Path) -> None:
    questions = []

    def answer(image: np.ndarray, question: str) -> torch.Tensor:
        questions.append(question)
        assert image.shape == (8, 12, 3)
        if "car" in question:
            return torch.empty(0, 8, 12, dtype=torch.bfloat16)
        return torch.stack([torch.full((8, 12), -2.0), torch.full((8, 12), 2.0)]).bfloat16()

    maps = example.glamm_probs.ask(answer, data / "a" / "0.png", ["road", "car"])
    assert np.allclose(maps[0], 1 / (1 + np.exp(-2)))
    assert np.array_equal(maps[1], np.zeros((8, 12)))
    assert questions == [f"Can you segment the {x} in this image?" for x in ("road", "car")]


def test_the_scripts_need_neither_cpseg_nor_a_new_python() -> None:
    for name in NAMES:
        tree = ast.parse((FOLDER / f"{name}.py").read_text(), feature_version=(3, 8))
        tops = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {
            alias.name for node in tops if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {node.module for node in tops if isinstance(node, ast.ImportFrom)}
        known = {
            "__future__",
            "argparse",
            "collections.abc",
            "contextlib",
            "hashlib",
            "json",
            "os",
            "tempfile",
            "pathlib",
            "typing",
            "numpy",
        }
        assert names <= known | {"torch", "PIL", "prob_files"}
