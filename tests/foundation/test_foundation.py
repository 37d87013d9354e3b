"""Every adapter with a random model of the real architecture, against the plain forward.

No statistical test here: everything is exact or a bound on rounding.
"""

from __future__ import annotations

import inspect
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.support import tiny_models
from tests.support.folders import complains
from tests.support.helpers import seeded
from torch import Tensor

from cpseg import evidence
from cpseg.core.class_map import ClassMap
from cpseg.foundation import Foundation, load, parse_classes, read_classes
from cpseg.foundation import hub as foundation_files
from cpseg.foundation.adapters import bounded
from cpseg.foundation.hub import fingerprint
from cpseg.foundation.preprocessing import Preparation, preparation, starts, tiled

transformers = pytest.importorskip("transformers")
PROMPTED = ("clipseg", "groupvit", "sam3")
VOCABULARY = tuple(kind for kind in tiny_models.KINDS if kind not in PROMPTED)
ASKED = ["sky", "road: road, street 1", "car", "bus"]
NAMES = ("sky", "road", "car", "bus")
WHERE = "foundation.load"
Folders = Callable[..., Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Folders of tiny models, each made once."""
    made: dict[object, Path] = {}

    def folder(kind: str, count: int = 4) -> Path:
        if kind == "sam3" and not hasattr(transformers, "Sam3Model"):
            pytest.skip("transformers before 5")
        if kind in ("eomt", "eomt_dinov3") and not hasattr(transformers, "EomtDinov3Config"):
            pytest.skip("transformers without EoMT on DINOv3")
        if kind == "upernet_dinov3" and not hasattr(transformers, "DINOv3ConvNextConfig"):
            pytest.skip("transformers without DINOv3")
        if (kind, count) not in made:
            labels = NAMES if count == 4 else [f"class {number}" for number in range(count)]
            path = tmp_path_factory.mktemp(kind)
            made[kind, count] = tiny_models.folder(kind, path, labels=labels)
        return made[kind, count]

    return folder


@contextmanager
def raises(kind: type[Exception], where: object, *parts: str) -> Iterator[None]:
    """``where: expected ..., got ...; fix`` in one line, with all of ``parts``."""
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    complains(caught.value, where, *parts)


def open_model(path: Path, kind: str, classes: list[str] | None = ASKED, **settings) -> Foundation:
    settings.setdefault("background", None)
    return load(path, classes if kind in PROMPTED else None, local_files_only=True, **settings)


def picture(*shape: int, seed: int = 0) -> Tensor:
    """Images with something large in them: noise alone averages out."""
    coarse = torch.randint(256, (shape[0], 3, 4, 5), generator=seeded(seed)) / 255
    return torch.nn.functional.interpolate(coarse, shape[1:], mode="nearest")


def input_of(path: Path, images: Tensor) -> Tensor:
    """What a model gets, for the pictures here: by Pillow, in 8 bits."""
    recorded = json.loads((path / "preprocessor_config.json").read_text())
    size = recorded["size"]
    if "crop_size" in recorded:
        size = recorded["crop_size"]
    height, width = images.shape[-2:]
    if isinstance(size, int):
        wanted = (size, size)
    elif "height" in size:
        wanted = (size["height"], size["width"])
    else:
        longest = size.get("longest_edge") or 107
        scale = min(size["shortest_edge"] / min(height, width), longest / max(height, width))
        step = recorded.get("size_divisor", 1)
        wanted = tuple(-(-round(side * scale) // step) * step for side in (height, width))
    pixels = []
    for image in images:
        eight = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
        scaled = np.asarray(eight.resize(wanted[::-1], Image.Resampling.BILINEAR)) / 255
        pixels.append((scaled - tiny_models.MEAN) / tiny_models.STD)
    return torch.from_numpy(np.stack(pixels).astype(np.float32)).permute(0, 3, 1, 2)


def enlarged(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear: the centre of pixel i lies at (i + 1/2) h / H - 1/2, held to the map."""
    for axis, length in zip((-2, -1), size, strict=True):
        old = maps.shape[axis]
        place = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, old - 1)
        shape = (-1, 1) if axis == -2 else (-1,)
        part = (place - low).reshape(shape)
        maps = maps.take(low, axis) * (1 - part) + maps.take(high, axis) * part
    return maps


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values.astype(np.float64)))


def softmax(values: np.ndarray, axis: int) -> np.ndarray:
    odds = np.exp(values.astype(np.float64) - values.max(axis, keepdims=True))
    return odds / odds.sum(axis, keepdims=True)


def close(found: Tensor, wanted: np.ndarray, most: float = 2e-5) -> None:
    assert found.dtype == torch.float32
    assert tuple(found.shape) == wanted.shape
    assert np.abs(found.numpy() - wanted).max() < most


def plain(kind: str, path: Path):
    """The model as its own documentation uses it."""
    name = {
        "clipseg": "CLIPSegForImageSegmentation",
        "groupvit": "GroupViTModel",
        "sam3": "Sam3Model",
        "segformer": "SegformerForSemanticSegmentation",
        "mask2former": "Mask2FormerForUniversalSegmentation",
        "maskformer": "MaskFormerForInstanceSegmentation",
        "oneformer": "OneFormerForUniversalSegmentation",
        "eomt": "EomtForUniversalSegmentation",
        "eomt_dinov3": "EomtDinov3ForUniversalSegmentation",
    }.get(kind, "AutoModelForSemanticSegmentation")
    return getattr(transformers, name).from_pretrained(path).eval()


def tokens(path: Path, texts: list[str], **how) -> dict[str, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return dict(tokenizer(texts, return_tensors="pt", **(how or {"padding": True})))


# What every adapter must do.


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_a_batch_that_is_not_square(kind: str, folders: Folders) -> None:
    model = open_model(folders(kind), kind)
    images = picture(2, 50, 83)
    probs = model(images)
    assert (probs.shape, probs.dtype) == ((2, 4, 50, 83), torch.float32)
    assert (model.names, model.num_classes, model.background) == (NAMES, 4, None)
    assert float(probs.amin()) >= 0
    assert float(probs.amax()) <= 1
    assert not probs.requires_grad
    assert float((probs[0] - probs[1]).abs().amax()) > 0.01, "it looks at the image"
    alone = torch.cat([model(image[None]) for image in images])
    assert float((probs - alone).abs().amax()) < 1e-4
    assert torch.equal(model(images), probs)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_150_classes(kind: str, folders: Folders) -> None:
    names = [f"class {number}" for number in range(150)]
    path = folders(kind) if kind in PROMPTED else folders(kind, 150)
    model = open_model(path, kind, names, background="complement")
    probs = model(picture(1, 40, 24))
    assert probs.shape == (1, 151, 40, 24)
    assert model.names == ("background", *names)
    found = evidence(probs, background=model.background)
    assert (found.num_classes, found.background) == (151, 0)
    if kind == "clipseg":  # batches of prompts change nothing
        some = open_model(path, kind, [names[149], names[40]])(picture(1, 40, 24))
        assert float((some - probs[:, [150, 41]]).abs().amax()) < 1e-5


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_mixed_precision_stays_inside_the_model(kind: str, folders: Folders) -> None:
    images = picture(1, 40, 56)
    full = open_model(folders(kind), kind)(images)
    mixed = open_model(folders(kind), kind, amp=torch.bfloat16)(images)
    assert mixed.dtype == torch.float32
    assert float(mixed.amin()) >= 0
    assert float(mixed.amax()) <= 1
    assert not torch.equal(mixed, full)
    assert float((mixed - full).abs().mean()) < 0.05
    values = mixed[0].flatten(1)
    assert len(values.unique()) > 300 or kind == "groupvit", "not rounded to half precision"


@pytest.mark.parametrize("kind", PROMPTED)
def test_texts_are_encoded_once(
    kind: str, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(folders(kind), kind)
    network = model.scores.frame.model
    encoder = network.clip if kind == "clipseg" else network
    monkeypatch.setattr(encoder, "get_text_features", None)
    for name in ("text_model", "text_encoder"):
        if hasattr(encoder, name):
            monkeypatch.setattr(getattr(encoder, name), "forward", None)
    model(picture(2, 40, 40))


# Each adapter against the model's plain forward.


def test_clipseg_equals_pairs_of_image_and_text(folders: Folders) -> None:
    path, images = folders("clipseg"), picture(2, 90, 131)
    texts = ["sky", "road", "street 1", "car", "bus"]
    asked, pixels = tokens(path, texts), input_of(path, images)
    network, pairs = plain("clipseg", path), []
    for image in pixels:
        with torch.no_grad():
            logits = network(**asked, pixel_values=image.expand(5, -1, -1, -1)).logits
        pairs.append(sigmoid(logits.numpy()))
    maps = np.stack(pairs)
    classes = np.stack([maps[:, 0], (maps[:, 1] + maps[:, 2]) / 2, maps[:, 3], maps[:, 4]], 1)
    assert classes.shape[-2:] == (64, 64)
    # The only difference is Pillow's rounding of pixels to 8 bits.
    close(open_model(path, "clipseg")(images), enlarged(classes, (90, 131)), 0.02)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_input_is_what_pillow_would_make(kind: str, folders: Folders) -> None:
    path, images = folders(kind), picture(2, 50, 83)
    prepare = open_model(path, kind).scores.frame.prepare
    wanted = input_of(path, images)
    found = prepare(images)
    assert found.shape == wanted.shape
    step = 1.01 / 255 / min(tiny_models.STD)  # Pillow rounds after each axis
    assert float((found - wanted).abs().amax()) < step


def exact_input(model: Foundation, images: Tensor) -> Tensor:
    return model.scores.frame.prepare(images)


def test_clipseg_equals_pairs_to_rounding(folders: Folders) -> None:
    path, images = folders("clipseg"), picture(2, 90, 131)
    model = open_model(path, "clipseg", ["sky", "car", "bus"])
    asked = tokens(path, ["sky", "car", "bus"])
    maps = []
    for image in exact_input(model, images):
        with torch.no_grad():
            pairs = plain("clipseg", path)(**asked, pixel_values=image.expand(3, -1, -1, -1))
        maps.append(sigmoid(pairs.logits.numpy()))
    close(model(images), enlarged(np.stack(maps), (90, 131)))


def test_sam3_equals_one_forward_a_concept(folders: Folders) -> None:
    path, images = folders("sam3"), picture(2, 90, 131)
    model, network, maps = open_model(path, "sam3"), plain("sam3", path), []
    for text in ("sky", "road", "street 1", "car", "bus"):
        asked = tokens(path, [text] * 2, padding="max_length", max_length=32)
        with torch.no_grad():
            found = network(pixel_values=exact_input(model, images), **asked)
        maps.append(sigmoid(found.semantic_seg[:, 0].numpy()))
    sky, road, street, car, bus = maps
    wanted = np.stack([sky, (road + street) / 2, car, bus], 1)
    assert np.abs(sky - car).max() > 1e-3, "what is asked for shows"
    close(model(images), enlarged(wanted, (90, 131)))


def test_sam3_as_the_hub_has_it(folders: Folders, tmp_path: Path) -> None:
    path = shutil.copytree(folders("sam3"), tmp_path / "hub")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({"model_type": "sam3_video", "detector_config": config})
    )
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    renamed = {f"detector_model.{name}": weight for name, weight in weights.items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    images = picture(1, 40, 56)
    hub, own = open_model(path, "sam3"), open_model(folders("sam3"), "sam3")
    assert torch.equal(hub(images), own(images))


def test_groupvit_equals_the_softmax_over_prompts(folders: Folders) -> None:
    path, images = folders("groupvit"), picture(2, 90, 131)
    model = open_model(path, "groupvit")
    asked = tokens(path, ["sky", "road", "street 1", "car", "bus"])
    with torch.no_grad():
        found = plain("groupvit", path)(
            **asked, pixel_values=exact_input(model, images), output_segmentation=True
        )
    logits = found.segmentation_logits.numpy()
    means = [logits[:, 0], (logits[:, 1] + logits[:, 2]) / 2, logits[:, 3], logits[:, 4]]
    probs = model(images)
    close(probs, softmax(enlarged(np.stack(means, 1), (90, 131)), 1))
    assert float((probs.sum(1) - 1).abs().amax()) < 1e-5


def plain_output(kind: str, path: Path, model: Foundation, images: Tensor):
    """What the model of a vocabulary gives for the input that it gets here."""
    task = {}
    if kind == "oneformer":
        text = tokens(path, ["the task is semantic"] * 2, padding="max_length", max_length=32)
        task["task_inputs"] = text["input_ids"] * text["attention_mask"]
    with torch.no_grad():
        return plain(kind, path)(pixel_values=exact_input(model, images), **task)


@pytest.mark.parametrize("kind", ["mask2former", "maskformer", "oneformer"])
def test_queries_are_summed_and_bounded(kind: str, folders: Folders) -> None:
    path, images = folders(kind), picture(2, 90, 131)
    model = open_model(path, kind)
    found = plain_output(kind, path, model, images)
    classes = softmax(found.class_queries_logits.numpy(), -1)[..., :-1]
    masks = sigmoid(found.masks_queries_logits.numpy())
    claims = np.zeros((2, 4, *masks.shape[-2:]))
    for query in range(masks.shape[1]):
        claims += classes[:, query, :, None, None] * masks[:, query, None]
    claims = enlarged(claims, (90, 131))
    assert claims.max() > 1, "unbounded, or this shows nothing"
    probs = model(images)
    close(probs, claims / np.maximum(1, claims.sum(1, keepdims=True)))
    gap = np.sort(claims, 1)[:, -1] - np.sort(claims, 1)[:, -2]
    same = probs.numpy().argmax(1) == claims.argmax(1)
    assert same[gap > 1e-4].all()


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("eomt", (64, 40)),
        ("eomt", (50, 64)),
        ("eomt", (64, 64)),
        ("eomt_dinov3", (64, 64)),
        ("eomt_dinov3", (64, 83)),
        ("eomt_dinov3", (150, 64)),
    ],
)
def test_eomt_equals_its_own_postprocessing(
    kind: str, size: tuple[int, int], folders: Folders
) -> None:
    """Images that need no resizing, so that only cutting or padding is compared."""
    path, images = folders(kind), picture(2, *size)
    images = (images * 255).round() / 255
    processor = transformers.AutoImageProcessor.from_pretrained(path)
    given = processor(list((images * 255).round().to(torch.uint8)), return_tensors="pt")
    offsets = given.pop("patch_offsets", None)
    with torch.no_grad():
        output = plain(kind, path)(pixel_values=given["pixel_values"])
    output["patch_offsets"] = offsets
    sizes = [size] * 2
    if not offsets:  # padded: the scores of the square, cut to the image
        sizes = [(64, 64)] * 2
    found = processor.post_process_semantic_segmentation(
        output, sizes, return_segmentation_scores=True
    )
    claims = torch.stack([each["segmentation_scores"] for each in found]).numpy()
    claims = claims[..., : size[0], : size[1]]
    close(open_model(path, kind)(images), claims / np.maximum(1, claims.sum(1, keepdims=True)))


def test_an_eomt_whose_processor_makes_other_sizes_is_refused(
    folders: Folders, tmp_path: Path
) -> None:
    path = tmp_path / "eomt"
    shutil.copytree(folders("eomt"), path)
    recorded = json.loads((path / "preprocessor_config.json").read_text())
    recorded["size"] = {"shortest_edge": 32, "longest_edge": 32}
    (path / "preprocessor_config.json").write_text(json.dumps(recorded))
    with raises(ValueError, path, "images of 64 pixels a side", "correct 'size'"):
        open_model(path, "eomt")


def test_segformer_equals_the_softmax_of_resized_logits(folders: Folders) -> None:
    path, images = folders("segformer"), picture(2, 90, 131)
    model = open_model(path, "segformer")
    with torch.no_grad():
        logits = plain("segformer", path)(exact_input(model, images)).logits.numpy()
    close(model(images), softmax(enlarged(logits, (90, 131)), 1))


def test_a_segformer_of_one_class_has_a_sigmoid(folders: Folders, tmp_path: Path) -> None:
    path, images = folders("segformer", 1), picture(2, 90, 131)
    model = open_model(path, "segformer", background="complement")
    with torch.no_grad():
        logits = plain("segformer", path)(exact_input(model, images)).logits.numpy()
    probs = model(images)
    close(probs[:, 1:], sigmoid(enlarged(logits, (90, 131))))
    assert float((probs.sum(1) - 1).abs().amax()) < 1e-6
    with raises(ValueError, folders("dpt", 1), "a dpt of 2 classes or more, got 1 class"):
        open_model(folders("dpt", 1), "dpt")


@pytest.mark.parametrize("kind", tiny_models.OTHERS)
def test_other_semantic_models(kind: str, folders: Folders) -> None:
    probs = open_model(folders(kind), kind)(picture(2, 50, 83))
    assert probs.shape == (2, 4, 50, 83)
    assert float((probs.sum(1) - 1).abs().amax()) < 1e-5
    assert float((probs[0] - probs[1]).abs().amax()) > 1e-4


# Not Mask2Former: transformers enlarges its masks to 384x384 before the sigmoid.
@pytest.mark.parametrize("kind", [*tiny_models.OTHERS, "segformer", "maskformer", "oneformer"])
def test_scores_are_those_of_transformers_own_postprocessing(kind: str, folders: Folders) -> None:
    """Where the image processor can return scores: logits of pixels, or sums over queries."""
    path, images, size = folders(kind), picture(2, 90, 131), (90, 131)
    old = transformers.SegformerImageProcessor.post_process_semantic_segmentation
    if "return_segmentation_scores" not in inspect.signature(old).parameters:
        pytest.skip("transformers whose image processors return no scores")
    post_process = transformers.AutoImageProcessor.from_pretrained(
        path
    ).post_process_semantic_segmentation
    model = open_model(path, kind)
    output = plain_output(kind, path, model, images)
    found = post_process(output, target_sizes=[size] * 2, return_segmentation_scores=True)
    scores = torch.stack([each["segmentation_scores"] for each in found]).numpy()
    by_queries = hasattr(output, "class_queries_logits")
    wanted = (
        scores / np.maximum(1, scores.sum(1, keepdims=True)) if by_queries else softmax(scores, 1)
    )
    close(model(images), wanted)


@pytest.mark.parametrize("kind", ["clipseg", "sam3"])
def test_prompts_of_a_class_are_averaged(kind: str, folders: Folders) -> None:
    images = picture(1, 40, 56)
    parts = open_model(folders(kind), kind, ["a", "b", "c"])(images)
    whole = open_model(folders(kind), kind, ["x: a, b, c", "b"])(images)
    assert float((parts.mean(1) - whole[:, 0]).abs().amax()) < 1e-6
    assert float((parts[:, 1] - whole[:, 1]).abs().amax()) < 1e-6


# The pieces.


@given(
    st.lists(st.floats(0, 8, width=32), min_size=2, max_size=6).filter(lambda c: min(c) > 1e-3),
)
def test_bounding_keeps_the_order_and_what_is_small(claims: list[float]) -> None:
    given_ = torch.tensor(claims).reshape(1, -1, 1, 1)
    probs = bounded(given_).flatten()
    assert float(probs.sum()) <= 1 + 1e-6
    assert float(probs.amax()) <= 1
    for i, left in enumerate(claims):
        for j, right in enumerate(claims):
            assert (left >= right) <= bool(probs[i] >= probs[j])
    if sum(claims) <= 0.999:
        assert torch.equal(probs, given_.flatten())


@given(st.integers(1, 300), st.integers(1, 120), st.data())
def test_tiles_cover_a_side_and_overlap(length: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    begin = starts(length, tile, overlap)
    assert begin[0] == 0
    assert begin[-1] == max(length - tile, 0)
    assert all(right - left <= tile - overlap for left, right in itertools.pairwise(begin))
    assert len(begin) <= 2 + max(length - tile, 0) // (tile - overlap)


def test_tiles_of_what_does_not_depend_on_place_are_the_whole() -> None:
    images = picture(2, 70, 101)
    seen = []

    def score(part: Tensor) -> Tensor:
        seen.append(tuple(part.shape[-2:]))
        return part * 0.5

    found = tiled(score, images, tile=32, overlap=8)
    assert float((found - images * 0.5).abs().amax()) < 1e-6
    assert set(seen) == {(32, 32)}
    assert len(seen) == 3 * 4
    assert torch.equal(tiled(score, images, tile=101, overlap=8), images * 0.5)
    assert seen[-1] == (70, 101)
    assert tiled(score, images[..., :20, :], tile=32, overlap=0).shape == (2, 3, 20, 101)


def test_tiles_are_averaged_where_they_overlap() -> None:
    calls = iter(range(100))
    found = tiled(lambda part: part * 0 + next(calls), picture(1, 6, 8), tile=6, overlap=4)
    assert torch.equal(found[0, 0, 0], torch.tensor([0, 0, 0.5, 0.5, 0.5, 0.5, 1, 1]))


def test_a_tiled_model(folders: Folders) -> None:
    images = picture(1, 96, 130)
    model = open_model(folders("segformer"), "segformer", tile=64)
    assert (model.tile, model.overlap) == (64, 16)
    probs = model(images)
    assert probs.shape == (1, 4, 96, 130)
    whole = open_model(folders("segformer"), "segformer")
    corner = whole(images[..., :64, :64])
    assert torch.equal(probs[..., :32, :32], corner[..., :32, :32])  # no other tile reaches it
    rest = open_model(folders("segformer"), "segformer", tile=64, background="complement")(images)
    assert torch.equal(rest[:, 1:], probs)
    assert torch.equal(rest[:, 0], 1 - probs.amax(1)), "of the averages, not averaged itself"


@pytest.mark.parametrize(
    ("recorded", "image", "wanted"),
    [
        ({"size": 352}, (50, 80), (352, 352)),
        ({"size": 640, "max_size": 2560}, (50, 80), (640, 1024)),
        ({"size": [30, 40]}, (50, 80), (30, 40)),
        ({"size": {"height": 30, "width": 40}}, (50, 80), (30, 40)),
        ({"size": {"shortest_edge": 100}}, (50, 80), (100, 160)),
        ({"size": {"shortest_edge": 100, "longest_edge": 120}}, (50, 80), (75, 120)),
        ({"size": {"shortest_edge": 100}, "size_divisor": 32}, (50, 80), (128, 160)),
        ({"size": {"shortest_edge": 9}, "do_center_crop": True, "crop_size": 7}, (50, 80), (7, 7)),
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}}, (427, 521), (800, 976)),
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}}, (400, 1000), (533, 1333)),
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}}, (1000, 400), (1333, 533)),
        (
            {"size": 480, "keep_aspect_ratio": True, "ensure_multiple_of": 32},
            (427, 640),
            (480, 704),
        ),
        ({"size": 480, "keep_aspect_ratio": True}, (427, 640), (480, 719)),
        ({"size": 480, "keep_aspect_ratio": True}, (640, 427), (719, 480)),
        ({"size": 100, "ensure_multiple_of": 32}, (50, 80), (96, 96)),
        ({"size": 9, "do_resize": False}, (50, 80), (50, 80)),
        ({}, (50, 80), (50, 80)),
    ],
)
def test_sizes_in_every_form(recorded: dict, image: tuple, wanted: tuple) -> None:
    prepare = preparation(recorded, where="x")
    assert prepare.target(image) == wanted
    assert prepare(torch.zeros(1, 3, *image)).shape == (1, 3, *wanted)


def test_pixel_values() -> None:
    images = torch.tensor([1.0, 0.5, 0.0]).reshape(1, 3, 1, 1)

    def values(**recorded: object) -> list[float]:
        return preparation(recorded, where="x")(images).flatten().tolist()

    assert values() == [1, 0.5, 0]
    normal = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]}
    assert values(**normal) == [1, 0, -1]
    assert values(**normal, do_normalize=False) == [1, 0.5, 0]
    silent = "MobileViTImageProcessor"  # by default it does not normalise, and records a mean
    assert values(**normal, image_processor_type=silent) == [1, 0.5, 0]
    assert values(**normal, image_processor_type=silent, do_normalize=True) == [1, 0, -1]
    assert values(do_rescale=False) == [255, 127.5, 0]
    assert values(rescale_factor=1 / 127.5) == [2, 1, 0]
    assert values(do_flip_channel_order=True) == [0, 0.5, 1]


def test_bicubic_does_not_leave_the_range() -> None:
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    found = Preparation((32, 32), filter="bicubic")(edge)
    assert (float(found.amin()), float(found.amax())) == (0, 1)


def test_the_filter_that_is_recorded_is_used() -> None:
    edge = torch.rand(1, 3, 8, 8, generator=seeded(0))
    found = {
        number: preparation({"size": 16, "resample": number}, where="x")(edge)
        for number in (0, 2, 3)
    }
    for number, filter in ((0, Image.NEAREST), (2, Image.BILINEAR), (3, Image.BICUBIC)):
        for channel in range(3):
            plane = Image.fromarray(edge[0, channel].numpy()).resize((16, 16), filter)
            wanted = np.asarray(plane).clip(0, 1)
            assert np.abs(found[number][0, channel].numpy() - wanted).max() < 1e-5, number


def test_bad_processors() -> None:
    padded = {"do_pad": True, "image_processor_type": "Sapiens2ImageProcessor"}
    with raises(ValueError, "m", "images that are not padded, got 'do_pad' true; set 'do_pad'"):
        preparation(padded, where="m")
    with raises(ValueError, "m", "bilinear, bicubic or nearest resampling, got 'resample' 1"):
        preparation({"resample": 1}, where="m")
    with raises(ValueError, "m", "'size' as a number, height and width"):
        preparation({"size": {"max_height": 3, "max_width": 4}}, where="m")


# Classes, background, class map.


def test_classes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffbackground : sky,  brick wall\nbus\n", encoding="utf-8")
    classes = read_classes(path)
    assert classes.names == ("background", "bus")
    assert classes.prompts == (("sky", "brick wall"), ("bus",))
    path.write_bytes(b"\xff\xfe\xff")
    with raises(ValueError, str(path), "class names, got other bytes"):
        read_classes(path)


@pytest.mark.parametrize(
    ("lines", "where", "said"),
    [
        (["a", "", "b"], "classes, line 2", "got ''; write one class per line, without blank"),
        (["a", "b: c,, d"], "classes, line 2", "got 'b: c,, d'"),
        (["a:"], "classes, line 1", "'name' or 'name: prompt, prompt'"),
        ([": b"], "classes, line 1", "got ': b'"),
        (["a", "b", "a: c"], "classes, line 3", "every class once, got 'a' as on line 1"),
        ([], "classes", "one class per line, got none"),
    ],
)
def test_bad_classes(lines: list[str], where: str, said: str) -> None:
    with raises(ValueError, where, said):
        parse_classes(lines)


def test_background(folders: Folders) -> None:
    path, images = folders("clipseg"), picture(1, 30, 40)
    none = open_model(path, "clipseg")
    prompt = open_model(path, "clipseg", background="prompt")
    rest = open_model(path, "clipseg", background="complement")
    assert (none.background, prompt.background, rest.background) == (None, 0, 0)
    probs = none(images)
    assert torch.equal(prompt(images), probs)
    more = rest(images)
    assert torch.equal(more[:, 1:], probs)
    assert torch.equal(more[:, 0], 1 - probs.amax(1))
    assert rest.names == ("background", *NAMES)
    with raises(ValueError, WHERE, "classes without 'background' for its complement"):
        open_model(path, "clipseg", ["background", "car"], background="complement")
    with raises(ValueError, WHERE, "a class besides the background, got 1 class"):
        open_model(path, "clipseg", ["car"], background="prompt")
    with raises(ValueError, WHERE, "background 'prompt', 'complement' or None, got 0"):
        open_model(path, "clipseg", background=0)


MAX = {"reduce": "max"}
MAP = {"map": {"sky": "rest", "road": "rest", "car": "vehicle", "bus": "vehicle"}}


def test_a_class_map_adds_the_scores_of_a_vocabulary(folders: Folders, tmp_path: Path) -> None:
    path, images = folders("segformer"), picture(1, 30, 40)
    own = open_model(path, "segformer")(images)
    content = {**MAP, "classes": ["rest", "vehicle"]}
    model = open_model(path, "segformer", class_map=content, background="prompt")
    assert (model.names, model.background) == (("rest", "vehicle"), 0)
    close(model(images)[:, 1], (own[:, 2] + own[:, 3]).numpy(), 1e-6)
    file = tmp_path / "map.json"
    file.write_text(json.dumps(MAP))
    named = load(path, ["rest", "vehicle"], background=None, class_map=file)
    assert torch.equal(named(images), model(images))
    assert named.names == ("rest", "vehicle")
    by_index = open_model(path, "segformer", class_map={"0": 0, "1": 0, "2": 1, "3": None})
    assert by_index.names == ("0", "1")
    assert torch.equal(by_index(images)[:, 1], own[:, 2])


def test_a_class_map_after_prompts(folders: Folders) -> None:
    path, images = folders("clipseg"), picture(1, 30, 40)
    own = open_model(path, "clipseg")(images)
    content = {"map": MAP["map"], "classes": ["rest", "vehicle"], "reduce": "max"}
    found = open_model(path, "clipseg", class_map=content, background="complement")
    assert found.names == ("background", "rest", "vehicle")
    probs = found(images)
    assert torch.equal(probs[:, 1], own[:, :2].amax(1))
    assert torch.equal(probs[:, 0], 1 - own.amax(1))


def test_the_scores_of_prompts_are_not_added(folders: Folders) -> None:
    said = "'reduce' 'max' for prompts, got 'sum'; set 'reduce' to 'max'"
    for kind in ("clipseg", "sam3"):
        with raises(ValueError, "class map", said):
            open_model(folders(kind), kind, class_map={"0": 0, "1": 1, "2": 1, "3": None})
        open_model(folders(kind), kind, class_map={"0": 1, "1": 0, "2": None, "3": 2})
    open_model(folders("groupvit"), "groupvit", class_map={"0": 0, "1": 1, "2": 1, "3": None})


def test_bad_class_maps(folders: Folders, tmp_path: Path) -> None:
    path = folders("segformer")

    def opened(content: object, classes: list[str] | None = None) -> Foundation:
        return load(path, classes, background=None, class_map=content)

    short = {"map": dict.fromkeys(NAMES[:3], 0)}
    with raises(ValueError, "class map", "an entry for every model class, got none for 3"):
        opened(short)
    with raises(ValueError, "class map", "an entry for each of the model's 4 classes, got 3"):
        opened(ClassMap((0, 0, 1)))
    with raises(ValueError, "class map", "a name in 'model_classes' or an index, got 'sea'"):
        opened({"map": {**MAP["map"], "sea": 0}, "classes": ["rest", "vehicle"]})
    listed = {**MAP, "classes": ["rest", "vehicle"], "model_classes": list(NAMES)[::-1]}
    with raises(ValueError, "class map", "'model_classes' sky, road, car, ... in their order"):
        opened(listed)
    with raises(ValueError, "class map", "a model class for every class of the data set"):
        opened(MAP, ["rest", "vehicle", "tree"])
    with raises(
        ValueError, WHERE, "the 4 classes of the model (sky, road, car, ...), got 2 others"
    ):
        opened(None, ["rest", "vehicle"])
    file = tmp_path / "map.json"
    file.write_text("{")
    with raises(ValueError, str(file), "a class map in JSON"):
        opened(file)
    file.write_text("[]")
    with raises(ValueError, str(file), "a JSON object, got list"):
        opened(file)


def test_names_that_a_vocabulary_has_twice_go_by_index(tmp_path: Path) -> None:
    path = tiny_models.folder("segformer", tmp_path, labels=["screen", "door", "screen"])
    model = load(path, background=None, class_map={"0": 0, "1": 1, "2": 0})
    assert model(picture(1, 30, 40)).shape == (1, 2, 30, 40)


# Loading.


def other_layers(config: dict) -> dict:
    return {**config, "extract_layers": [0, 1, 1]}


def other_letters(vocabulary: dict) -> dict:
    return {**vocabulary, "a": vocabulary["b"], "b": vocabulary["a"]}


def test_what_scores_depend_on_is_in_the_fingerprint(folders: Folders, tmp_path: Path) -> None:
    path = folders("clipseg")
    copy = shutil.copytree(path, tmp_path / "copy")
    one = open_model(path, "clipseg").fingerprint
    assert open_model(copy, "clipseg").fingerprint == one
    others = [
        open_model(path, "clipseg", [*ASKED[:3], "bus: coach"]),
        open_model(path, "clipseg", background="prompt"),
        open_model(path, "clipseg", amp=torch.bfloat16),
        open_model(path, "clipseg", tile=64),
        open_model(path, "clipseg", tile=64, overlap=3),
        open_model(path, "clipseg", class_map={**MAX, "map": {str(i): 0 for i in range(4)}}),
        open_model(path, "clipseg", class_map={**MAX, "map": {str(i): i for i in range(4)}}),
        open_model(tiny_models.folder("clipseg", tmp_path / "other", seed=1), "clipseg"),
    ]
    recorded = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps({**recorded, "size": 32}))
    others.append(open_model(copy, "clipseg"))
    for name, change in (("config.json", other_layers), ("vocab.json", other_letters)):
        changed = shutil.copytree(path, tmp_path / name)
        content = json.loads((changed / name).read_text())
        (changed / name).write_text(json.dumps(change(content)))
        others.append(open_model(changed, "clipseg"))
    others.append(open_model(path, "clipseg", ["x: sky", *ASKED[1:]]))
    assert len({one, *(model.fingerprint for model in others)}) == len(others) + 1


def test_the_fingerprint_of_weights_sees_every_layer() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    before = fingerprint(network)
    assert fingerprint(network) == before
    network[1].running_mean += 1
    assert fingerprint(network) != before
    long = torch.nn.Linear(100_000, 1)
    before = fingerprint(long)
    with torch.no_grad():
        long.weight[:, 50_000:] += 1
    assert fingerprint(long) != before


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"^foundation models need .*: pip install cpseg\[hf\]$"):
        load("x", background=None)


def test_bad_models(folders: Folders, tmp_path: Path) -> None:
    with raises(ValueError, WHERE, "a folder with a model, got './nowhere'; check the path"):
        load("./nowhere", background=None)
    with raises(ValueError, WHERE, "a model on the hub, or a folder with config.json, got"):
        load("nobody/nothing", background=None, local_files_only=True)
    with raises(ValueError, WHERE, "classes for clipseg, got none; list one"):
        load(folders("clipseg"), background=None)

    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with raises(ValueError, WHERE, "a model type among beit, clipseg, ", ", got bert;"):
        load(other, background=None)

    bare = shutil.copytree(folders("segformer"), tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with raises(ValueError, WHERE, "a model with its preprocessor_config.json, got"):
        load(bare, background=None)

    from transformers import SegformerModel

    headless = shutil.copytree(folders("segformer"), tmp_path / "headless")
    SegformerModel.from_pretrained(headless).save_pretrained(headless)
    said = (
        "weights of a SegformerForSemanticSegmentation, got none for 13 of them, for instance dec"
    )
    with raises(ValueError, str(headless), said):
        load(headless, background=None)

    with raises(ValueError, WHERE, "prompts of at most 77 tokens, got 92 for 'aaaa"):
        open_model(folders("clipseg"), "clipseg", ["car", "a" * 90])


def test_a_model_that_transformers_is_too_old_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam3"}))
    known = {"sam3": "AModelOfNextYear"}
    monkeypatch.setattr(foundation_files, "_classes_of_models", lambda: known)
    with pytest.raises(ImportError, match=r"^sam3 is not in transformers .*: install a newer one$"):
        load(tmp_path, ["car"], background=None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tile": 0}, "a tile above an overlap of at least 0, got tile 0 and overlap 0"),
        ({"tile": 8, "overlap": 8}, "got tile 8 and overlap 8"),
        ({"tile": 8, "overlap": -1}, "got tile 8 and overlap -1"),
        ({"overlap": 8}, "a tile for the overlap, got none"),
        ({"amp": torch.float32}, "amp as torch.bfloat16 or torch.float16, got torch.float32"),
    ],
)
def test_bad_settings(settings: dict, said: str) -> None:
    with raises(ValueError, WHERE, said):
        load("x", background=None, **settings)


def test_bad_images(folders: Folders) -> None:
    model = open_model(folders("segformer"), "segformer")
    with raises(TypeError, "Foundation", "floating-point images in [0, 1], got torch.uint8"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    for bad, got in ((127.5, "values from 127.5 to 127.5"), (float("nan"), "NaN")):
        with raises(ValueError, "Foundation", f"images in [0, 1], got {got}; divide 8-bit"):
            model(torch.full((1, 3, 8, 8), bad))
    with raises(ValueError, "Foundation", "images [B, 3, H, W], got [3, 8, 8]"):
        model(torch.zeros(3, 8, 8))
    with raises(ValueError, "Foundation", "got [1, 4, 8, 8]"):
        model(torch.zeros(1, 4, 8, 8))
    with raises(ValueError, "Foundation", "at least one element in images"):
        model(torch.zeros(0, 3, 8, 8))
