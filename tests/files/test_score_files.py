"""Files: probability maps, evidence, masks, id lists; whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.support.folders import complains
from torch import Tensor

from cpseg import Evidence, evidence
from cpseg._internal.safe_files import (
    atomic,
    read_tensors,
    write_tensors,
    write_text,
)
from cpseg.files.id_lists import (
    Pair,
    read_ids,
    write_ids,
)
from cpseg.files.masks import (
    image_size,
    palette,
    read_mask,
    write_mask,
)
from cpseg.files.score_files import (
    SUFFIXES,
    find_scores,
    read_scores,
    write_evidence,
)


def scores(*shape: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).random(shape or (3, 4, 5), dtype=np.float32)
    values.flat[0], values.flat[-1] = 0, 1  # both ends are allowed
    return values


def write(path: Path, **arrays: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        (array,) = arrays.values()
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        save_file({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}, path)
    return path


# Probability maps


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floating_scores_are_read_as_stored(tmp_path: Path, suffix: str, dtype: type) -> None:
    stored = scores().astype(dtype)
    found = read_scores(write(tmp_path / f"a{suffix}", probs=stored))
    assert isinstance(found, Tensor)
    assert found.numpy().dtype == dtype
    assert np.array_equal(found.numpy(), stored)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bytes_are_255ths(tmp_path: Path, suffix: str) -> None:
    stored = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    found = read_scores(write(tmp_path / f"a{suffix}", probs=stored))
    assert isinstance(found, Tensor)
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy().ravel(), np.arange(256, dtype=np.float32) / np.float32(255))


def test_bfloat16_is_read(tmp_path: Path) -> None:
    stored = torch.rand(3, 4, 5).to(torch.bfloat16)
    save_file({"probs": stored}, tmp_path / "a.safetensors")
    assert torch.equal(read_scores(tmp_path / "a.safetensors"), stored)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_the_key_is_probs_or_the_only_one(tmp_path: Path, suffix: str) -> None:
    first, second = scores(seed=1), scores(seed=2)
    both = read_scores(write(tmp_path / f"both{suffix}", other=first, probs=second))
    assert np.array_equal(both, second)
    assert np.array_equal(read_scores(write(tmp_path / f"one{suffix}", sem_seg=first)), first)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_several_arrays_without_probs_are_refused(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", first=scores(), second=scores())
    with pytest.raises(ValueError, match="first, second") as caught:
        read_scores(path)
    complains(caught.value, path, "'probs'")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_no_array_at_all_is_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ValueError, match="arrays none") as caught:
        read_scores(write(tmp_path / f"a{suffix}"))
    complains(caught.value, tmp_path / f"a{suffix}", "'probs'")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shape", [(4, 5), (1, 3, 4, 5), (7,)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_other_shapes_are_refused(
    tmp_path: Path, suffix: str, shape: tuple[int, ...], dtype: type
) -> None:
    path = write(tmp_path / f"a{suffix}", probs=scores(*shape).astype(dtype))
    with pytest.raises(ValueError, match="classes first") as caught:
        read_scores(path)
    complains(caught.value, path, "[K, H, W]", f"got {list(shape)}")


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_scores_of_nothing_are_refused(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    path = write(tmp_path / "a.npy", probs=np.zeros(shape, dtype))
    with pytest.raises(ValueError, match=r"a\.npy") as caught:
        read_scores(path)
    complains(caught.value, path, "[K, H, W]", f"got {list(shape)}")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.bool_, np.complex64])
def test_other_dtypes_are_refused(tmp_path: Path, suffix: str, dtype: type) -> None:
    path = write(tmp_path / f"a{suffix}", probs=np.ones((3, 4, 5), dtype))
    with pytest.raises(ValueError, match="convert") as caught:
        read_scores(path)
    complains(caught.value, path, "uint8, float16 or float32", f"got torch.{np.dtype(dtype).name}")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("value", "got"),
    [(np.nan, "NaN"), (np.inf, "inf"), (-np.inf, "-inf"), (7.6, "to 7.6"), (-0.25, "from -0.25")],
)
def test_values_outside_the_unit_interval_are_refused(
    tmp_path: Path, suffix: str, dtype: type, value: float, got: str
) -> None:
    stored = scores().astype(dtype)
    stored[1, 2, 3] = value
    path = write(tmp_path / f"a{suffix}", probs=stored)
    with pytest.raises(ValueError, match="softmax or sigmoid") as caught:
        read_scores(path)
    complains(caught.value, path, "class scores in [0, 1]", got)


def test_the_next_float_above_one_is_refused_and_minus_zero_is_not(tmp_path: Path) -> None:
    above = np.nextafter(np.float32(1), np.float32(2))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        read_scores(write(tmp_path / "a.npy", probs=np.full((1, 1, 1), above)))
    read_scores(write(tmp_path / "b.npy", probs=np.full((1, 1, 1), -0.0, np.float32)))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("length", [0, 1, 20, 0.5, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, length: float) -> None:
    path = write(tmp_path / f"a{suffix}", probs=scores())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(length * len(whole)) if length == 0.5 else int(length)])
    with pytest.raises(ValueError, match="unreadable") as caught:
        read_scores(path)
    complains(caught.value, path, suffix.lstrip("."), "write it anew")


def damage_every_byte(path: Path, flip: int, read: Callable[[], object]) -> None:
    """Whatever byte is flipped: the file reads, or is refused in one line."""
    whole = path.read_bytes()
    refusals = 0
    surprises: dict[str, int] = {}
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= flip
        path.write_bytes(damaged)
        try:
            read()
        except ValueError as error:
            refusals += 1
            complains(error, path)
        except Exception as error:
            surprises.setdefault(f"{type(error).__module__}.{type(error).__name__}", place)
    assert surprises == {}, "an error of another kind, with the first byte that gives it"
    assert refusals > 0


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("flip", [0xFF, 0x01, 0x20])
def test_any_damaged_byte_is_a_plain_error_or_reads(tmp_path: Path, suffix: str, flip: int) -> None:
    path = write(tmp_path / f"a{suffix}", probs=scores())
    damage_every_byte(path, flip, lambda: read_scores(path))


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(ran),)

    np.save(tmp_path / "a.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "b.npz", probs=np.array([Payload()], dtype=object), allow_pickle=True)
    assert not ran.exists()
    for name in ("a.npy", "b.npz"):
        with pytest.raises(ValueError, match="allow_pickle=False") as caught:
            read_scores(tmp_path / name)
        complains(caught.value, tmp_path / name, "class scores")
    assert not ran.exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_file_not_found(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"a{suffix}"):
        read_scores(tmp_path / f"a{suffix}")


# Where scores lie


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("image", ["a/b/c.png", "c.jpg", "a/v1.5/c.d.png", "a b/c.png"])
def test_scores_lie_where_the_image_lies(tmp_path: Path, suffix: str, image: str) -> None:
    path = write(tmp_path / (image.rpartition(".")[0] + suffix), probs=scores())
    assert find_scores(tmp_path, image) == path


def test_a_flat_folder_will_do(tmp_path: Path) -> None:
    path = write(tmp_path / "c.d.npz", probs=scores())
    assert find_scores(tmp_path, "images/a/c.d.png") == path


def test_the_laid_out_file_comes_before_the_flat_one(tmp_path: Path) -> None:
    write(tmp_path / "c.npy", probs=scores())
    laid_out = write(tmp_path / "a" / "c.npz", probs=scores())
    assert find_scores(tmp_path, "a/c.png") == laid_out


def test_two_files_for_one_image_are_refused(tmp_path: Path) -> None:
    for suffix in (".npy", ".npz"):
        write(tmp_path / "a" / f"c{suffix}", probs=scores())
    with pytest.raises(ValueError, match="remove all but one") as caught:
        find_scores(tmp_path, "a/c.png")
    complains(caught.value, tmp_path / "a" / "c", "c.npy and c.npz")


def test_no_file_for_an_image_names_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file") as caught:
        find_scores(tmp_path, "a/c.png")
    complains(caught.value, tmp_path, "a/c.npy | .npz | .safetensors")


# Evidence


@pytest.mark.parametrize("background", [0, 2, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_evidence_comes_back_bit_for_bit(
    tmp_path: Path, background: int | None, dtype: torch.dtype
) -> None:
    made = evidence(torch.from_numpy(scores()).to(dtype), background=background)
    write_evidence(tmp_path / "a.safetensors", made)
    found = read_scores(tmp_path / "a.safetensors")
    assert isinstance(found, Evidence)
    assert (found.background, found.num_classes) == (background, 3)
    for name in ("best", "best_class", "background_score"):
        left, right = getattr(made, name), getattr(found, name)
        assert (left is None) == (right is None)
        assert left is None or (left.dtype == right.dtype and torch.equal(left, right))


def test_evidence_of_many_classes_comes_back(tmp_path: Path) -> None:
    made = evidence(torch.from_numpy(scores(300, 2, 2)), background=0)
    write_evidence(tmp_path / "a.safetensors", made)
    found = read_scores(tmp_path / "a.safetensors")
    assert isinstance(found, Evidence)
    assert found.best_class.dtype == torch.int16
    assert torch.equal(found.best_class, made.best_class)


def rewrite(path: Path, *, tensors: dict[str, Any] | None = None, **metadata: Any) -> None:
    """Change tensors and metadata of one of our safetensors files; None takes a field out."""
    held, known = read_tensors(path)
    held.update(tensors or {})
    known.update(metadata)
    write_tensors(
        path,
        {name: tensor for name, tensor in held.items() if tensor is not None},
        {name: value for name, value in known.items() if value is not None},
    )


DAMAGE: dict[str, dict[str, Any]] = {
    "later format": {"format": 2},
    "no format": {"format": None},
    "no class count": {"num_classes": None},
    "tensor missing": {"tensors": {"best": None}},
    "background score missing": {"tensors": {"background_score": None}},
    "tensor too many": {"tensors": {"threshold": torch.zeros(4, 5)}},
    "NaN": {"tensors": {"best": torch.full((4, 5), torch.nan)}},
    "above 1": {"tensors": {"best": torch.full((4, 5), 7.6)}},
    "negative background": {"tensors": {"background_score": torch.full((4, 5), -0.1)}},
    "classes of another size": {"tensors": {"best_class": torch.zeros(4, 6, dtype=torch.uint8)}},
    "background of another size": {"tensors": {"background_score": torch.zeros(5, 4)}},
    "three axes": {
        "tensors": {
            "best": torch.zeros(1, 4, 5),
            "best_class": torch.zeros(1, 4, 5, dtype=torch.uint8),
            "background_score": torch.zeros(1, 4, 5),
        }
    },
    "class beyond the last": {"tensors": {"best_class": torch.full((4, 5), 9, dtype=torch.uint8)}},
    "classes as floats": {"tensors": {"best_class": torch.zeros(4, 5)}},
    "integer scores": {"tensors": {"best": torch.zeros(4, 5, dtype=torch.int64)}},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_evidence_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    write_evidence(path, evidence(torch.from_numpy(scores()), background=0))
    rewrite(path, **DAMAGE[damage])
    with pytest.raises(ValueError, match=r"a\.safetensors") as caught:
        read_scores(path)
    complains(caught.value, path, "evidence", "run cpseg compact anew")


def test_truncated_evidence_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_evidence(path, evidence(torch.from_numpy(scores()), background=0))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="unreadable") as caught:
        read_scores(path)
    complains(caught.value, path, "safetensors")


# Tensors with metadata


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    held = {"a": torch.tensor([[torch.inf, -torch.inf], [1e-45, 0.1]]), "b": torch.arange(3)}
    facts = {"name": "ü", "none": None, "list": [1, 2.5], "nested": {"0": None}}
    strided = {"a": held["a"].T, "b": held["b"]}
    write_tensors(tmp_path / "sub" / "x.safetensors", strided, facts)
    found, metadata = read_tensors(tmp_path / "sub" / "x.safetensors")
    assert metadata == facts
    assert list(found) == ["a", "b"]
    assert torch.equal(found["a"], held["a"].T)
    assert torch.equal(found["b"], held["b"])


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    held = {"b": torch.arange(3), "a": torch.rand(2)}
    write_tensors(tmp_path / "x", held, {"p": 1, "q": 2})
    write_tensors(tmp_path / "y", held, {"q": 2, "p": 1})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_metadata_of_other_programs_reads_as_nothing(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    assert read_tensors(tmp_path / "x.safetensors")[1] == {}
    assert read_tensors(tmp_path / "y.safetensors")[1] == {}


def test_metadata_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"cpseg": "{"})
    with pytest.raises(ValueError, match="unreadable") as caught:
        read_tensors(path)
    complains(caught.value, path)


def test_a_missing_tensor_file_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors"):
        read_tensors(tmp_path / "x.safetensors")


# Masks

LABELS = np.array([[0, 1, 2], [3, 255, 0]], np.uint8)


def image_of(values: np.ndarray, mode: str) -> Image.Image:
    if mode == "P":
        image = Image.fromarray(values).convert("L")
        image.putpalette(palette())
        return image
    if mode == "I;16":
        return Image.fromarray(values.astype(np.uint16))
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_are_read_as_indices(tmp_path: Path, mode: str) -> None:
    image_of(LABELS, mode).save(tmp_path / "m.png")
    found = read_mask(tmp_path / "m.png", num_classes=4, size=(2, 3))
    assert found.dtype == torch.uint8
    assert np.array_equal(found, LABELS)
    assert np.array_equal(read_mask(tmp_path / "m.png", num_classes=4, size=None), LABELS)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "I;16"])
def test_other_modes_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "m.png"
    image_of(LABELS, mode).save(path)
    with pytest.raises(ValueError, match="mode") as caught:
        read_mask(path, num_classes=4, size=(2, 3))
    complains(caught.value, path, "8-bit mask (L or P)", f"mode {mode}")


@pytest.mark.parametrize("bits", [2, 4])
def test_a_grey_mask_of_fewer_bits_is_refused(tmp_path: Path, bits: int) -> None:
    """Pillow opens them as 8 bits, with their values scaled up: 3 of 2 bits is 255, void."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", 2, 1, bits, 0, 0, 0, 0)
    row = bytes([0, (3 << (8 - bits)) | (1 << (8 - 2 * bits))])
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    path = tmp_path / "mask.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    with Image.open(path) as image:
        assert (image.mode, image.size) == ("L", (2, 1))
    with pytest.raises(ValueError, match=f"an 8-bit mask .* got mode L;{bits} bits"):
        read_mask(path, num_classes=4, size=None)


@pytest.mark.parametrize("size", [(3, 2), (2, 4), (4, 6)])
def test_a_mask_of_another_size_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "m.png"
    image_of(LABELS, "L").save(path)
    with pytest.raises(ValueError, match="got 2x3") as caught:
        read_mask(path, num_classes=4, size=size)
    complains(caught.value, path, f"{size[0]}x{size[1]}")


@pytest.mark.parametrize("value", [4, 254])
def test_a_value_that_is_no_class_is_refused(tmp_path: Path, value: int) -> None:
    path = tmp_path / "m.png"
    image_of(np.where(LABELS == 3, value, LABELS).astype(np.uint8), "L").save(path)
    with pytest.raises(ValueError, match=f"got {value}") as caught:
        read_mask(path, num_classes=4, size=None)
    complains(caught.value, path, "0..3 or 255")


def test_another_void_value_is_void(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    image_of(np.where(LABELS == 255, 11, LABELS).astype(np.uint8), "L").save(path)
    assert 11 in read_mask(path, num_classes=11, ignore_index=11, size=None)
    with pytest.raises(ValueError, match="got 11"):
        read_mask(path, num_classes=11, size=None)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"not an image"])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="unreadable") as caught:
        read_mask(path, num_classes=4, size=None)
    complains(caught.value, path, "a mask image")
    with pytest.raises(ValueError, match="unreadable") as caught:
        image_size(path)
    complains(caught.value, path, "an image")


@pytest.mark.parametrize("flip", [0xFF, 0x01, 0x20])
def test_any_damaged_byte_of_a_mask_is_a_plain_error_or_reads(tmp_path: Path, flip: int) -> None:
    path = tmp_path / "m.png"
    image_of(LABELS, "L").save(path)
    damage_every_byte(path, flip, lambda: read_mask(path, num_classes=4, size=(2, 3)))


def test_every_truncation_of_a_mask_is_refused_or_complete(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    image_of(LABELS, "L").save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        try:
            found = read_mask(path, num_classes=4, size=(2, 3))
        except ValueError as error:
            complains(error, path)
        else:
            assert np.array_equal(found, LABELS)


def test_missing_images_are_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"m\.png"):
        read_mask(tmp_path / "m.png", num_classes=4, size=None)
    with pytest.raises(FileNotFoundError, match=r"m\.png"):
        image_size(tmp_path / "m.png")


def test_image_size_is_height_and_width_without_exif_rotation(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    image.save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == (20, 30)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_a_written_mask_is_an_8_bit_palette_png(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "sub" / "m.png"
    labels = torch.arange(256, dtype=torch.int64).reshape(8, 32).to(dtype)
    if dtype == torch.uint8:
        labels = labels.T  # not contiguous
    write_mask(path, labels)
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "P")
        assert image.size == (labels.shape[1], labels.shape[0])
        assert np.array_equal(np.array(image), labels)
        colours = np.array(image.getpalette()).reshape(256, 3)
    assert path.read_bytes()[24] == 8, "bit depth"
    assert np.array_equal(colours, np.array(palette()).reshape(256, 3))


def test_a_written_mask_is_8_bit_even_where_few_classes_occur(tmp_path: Path) -> None:
    write_mask(tmp_path / "m.png", torch.zeros(3, 3, dtype=torch.uint8))
    assert (tmp_path / "m.png").read_bytes()[24] == 8, "bit depth"
    assert read_mask(tmp_path / "m.png", num_classes=1, size=(3, 3)).sum() == 0


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([[256]]),
        torch.tensor([[-1]]),
        torch.zeros(1, 2, 2, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(0, 4, dtype=torch.uint8),
    ],
    ids=["256", "-1", "three axes", "one axis", "nothing"],
)
def test_labels_that_no_mask_holds_are_not_written(tmp_path: Path, labels: Tensor) -> None:
    with pytest.raises(ValueError, match="write_mask") as caught:
        write_mask(tmp_path / "m.png", labels)
    complains(caught.value, "write_mask", "[H, W] in 0..255", str(list(labels.shape)))
    assert list(tmp_path.iterdir()) == []


def test_palette_is_that_of_voc() -> None:
    colours = np.array(palette()).reshape(256, 3)
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        5: (128, 0, 128),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    for index, colour in known.items():
        assert tuple(colours[index]) == colour
    assert len({tuple(colour) for colour in colours}) == 256


# Id lists


def test_ids_are_pairs(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("a/b.jpg m/b.png\nü.jpg /abs/ü.png\n", encoding="utf-8")
    assert read_ids(tmp_path / "ids.txt") == [("a/b.jpg", "m/b.png"), ("ü.jpg", "/abs/ü.png")]


@pytest.mark.parametrize("text", ["a m\nb m2", "a m\r\nb m2\r\n"])
def test_a_missing_last_line_end_and_windows_line_ends_do_no_harm(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "ids.txt").write_bytes(text.encode())
    assert read_ids(tmp_path / "ids.txt") == [Pair("a", "m"), Pair("b", "m2")]


def test_one_column_is_enough_where_no_mask_is_needed(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("a\nb m\n")
    assert read_ids(tmp_path / "ids.txt", columns=1) == [Pair("a", None), Pair("b", "m")]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a m\n\nb m\n", 2),
        ("a m\nb m\n\n", 3),
        ("\na m\n", 1),
        ("a m\nb  m\n", 2),
        ("a m\nb m \n", 2),
        (" a m\n", 1),
        ("a m\nb\n", 2),
        ("a b m\n", 1),
        ("a m\nb\tm\n", 2),
    ],
    ids=[
        "blank line",
        "blank last line",
        "blank first line",
        "two spaces",
        "space at the end",
        "space at the start",
        "no mask",
        "space in a path",
        "tab",
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "ids.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"line {line}") as caught:
        read_ids(path)
    shown = repr(text.splitlines()[line - 1])
    complains(caught.value, f"{path}, line {line}", "'image mask'", shown)


@pytest.mark.parametrize("text", ["a\n\n", "a b c\n", "a  \n"])
def test_a_bad_line_is_named_where_one_column_is_enough(tmp_path: Path, text: str) -> None:
    (tmp_path / "ids.txt").write_text(text)
    with pytest.raises(ValueError, match="'image' or 'image mask'"):
        read_ids(tmp_path / "ids.txt", columns=1)


def test_an_image_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("a m\nb m\na n\n")
    with pytest.raises(ValueError, match="line 1") as caught:
        read_ids(path)
    complains(caught.value, f"{path}, line 3", "every image once")


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("")
    with pytest.raises(ValueError, match="empty") as caught:
        read_ids(path)
    complains(caught.value, path)


def test_a_list_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_bytes("ü.jpg m.png\n".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8") as caught:
        read_ids(path)
    complains(caught.value, path)


def test_a_missing_list_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ids\.txt"):
        read_ids(tmp_path / "ids.txt")


def test_written_ids_are_what_training_code_splits(tmp_path: Path) -> None:
    pairs = [("a/b.jpg", "m/b.png"), ("ü.jpg", "/abs/ü.png")]
    write_ids(tmp_path / "ids.txt", pairs)
    assert (tmp_path / "ids.txt").read_bytes() == "a/b.jpg m/b.png\nü.jpg /abs/ü.png\n".encode()
    assert [tuple(pair) for pair in read_ids(tmp_path / "ids.txt")] == pairs


@pytest.mark.parametrize("name", ["a b.png", "a\tb.png", "a\n", " a", "", "a\u2028b"])
@pytest.mark.parametrize("column", [0, 1])
def test_a_path_with_white_space_is_not_written(tmp_path: Path, name: str, column: int) -> None:
    pair = ("image.png", name) if column else (name, "mask.png")
    with pytest.raises(ValueError, match="without spaces") as caught:
        write_ids(tmp_path / "ids.txt", [("x", "y"), pair])
    complains(caught.value, tmp_path / "ids.txt", repr(name))
    assert list(tmp_path.iterdir()) == []


# Whole or not at all


def test_a_file_appears_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "x.bin"
    with atomic(path) as file:
        file.write(b"half")
        assert not path.exists()
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert os.listdir(path.parent) == ["x.bin"]


@pytest.mark.parametrize("error", [RuntimeError("model"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [False, True])
def test_an_error_while_writing_leaves_what_was_there(
    tmp_path: Path, error: BaseException, there: bool
) -> None:
    path = tmp_path / "x.bin"
    if there:
        path.write_bytes(b"old")

    def fail() -> None:
        with atomic(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert os.listdir(tmp_path) == ["x.bin"] * there
    assert not there or path.read_bytes() == b"old"


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "m.png"
    write_mask(path, torch.zeros(2, 2, dtype=torch.uint8))
    old = path.read_bytes()
    monkeypatch.setattr(os, call, full)
    writers = {
        path: lambda p: write_mask(p, torch.ones(2, 2, dtype=torch.uint8)),
        tmp_path / "t.txt": lambda p: write_text(p, "text"),
        tmp_path / "i.txt": lambda p: write_ids(p, [("a", "b")]),
        tmp_path / "t.safetensors": lambda p: write_tensors(p, {"a": torch.zeros(2)}, {}),
    }
    for target, writer in writers.items():
        with pytest.raises(OSError, match="No space left"):
            writer(target)
    assert os.listdir(tmp_path) == ["m.png"]
    assert path.read_bytes() == old


def test_the_umask_is_obeyed(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "text")
        assert os.umask(0o027) == 0o027, "it was changed"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_text_is_utf8_with_plain_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "ü\n")
    assert (tmp_path / "x").read_bytes() == b"\xc3\xbc\n"
