"""Files: probability maps, evidence, masks, id lists; whole or not at all."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.support.damage import damage_every_byte
from tests.support.folders import complains
from torch import Tensor

from cpseg import Evidence, evidence
from cpseg._internal.safe_files import (
    read_tensors,
    write_tensors,
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
    elif path.suffix in (".pt", ".pth"):
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
        torch.save(tensors if len(tensors) > 1 else next(iter(tensors.values())), path)
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
    try:
        path = write(tmp_path / f"a{suffix}", probs=np.ones((3, 4, 5), dtype))
    except KeyError as error:
        pytest.skip(f"this version of safetensors cannot write {error}")
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
    fix = "what made it" if got == "NaN" else "softmax or sigmoid"
    with pytest.raises(ValueError, match=fix) as caught:
        read_scores(path)
    complains(caught.value, path, "probabilities in [0, 1]", got)
    assert ("divide percentages by 100" in str(caught.value)) == (value > 1)


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


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("flip", [0xFF, 0x01, 0x20])
def test_any_damaged_byte_is_a_plain_error_or_reads(tmp_path: Path, suffix: str, flip: int) -> None:
    path = write(tmp_path / f"a{suffix}", probs=scores())
    damage_every_byte(path, flip, lambda: read_scores(path))


@pytest.mark.parametrize("flip", [0xFF, 0x01, 0x20])
def test_any_damaged_byte_of_a_mapped_file_is_a_plain_error_or_reads(
    tmp_path: Path, flip: int
) -> None:
    path = write(tmp_path / "a.npy", probs=scores())
    damage_every_byte(path, flip, lambda: read_scores(path, mapped=True))


def test_a_mapped_file_reads_or_complains_like_a_whole_one(tmp_path: Path) -> None:
    arrays = [scores().astype(kind) for kind in (np.float16, np.float32, np.float64)]
    arrays += [np.arange(60, dtype=np.uint8).reshape(3, 4, 5), np.asfortranarray(scores())]
    arrays += [scores()[:, 0], np.zeros((3, 0, 5), np.float32), np.ones((3, 4, 5), np.int64)]
    arrays += [7 * scores(), np.array([{}], dtype=object)]
    paths = [tmp_path / f"{number}.npy" for number in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        np.save(path, array, allow_pickle=True)
    (tmp_path / "short.npy").write_bytes(paths[1].read_bytes()[:-1])

    def outcome(path: Path, *, mapped: bool) -> object:
        try:
            found = read_scores(path, mapped=mapped)
        except ValueError as error:
            return str(error)
        assert isinstance(found, Tensor)
        return found.dtype, found.tolist()

    for path in (*paths, tmp_path / "short.npy"):
        assert outcome(path, mapped=True) == outcome(path, mapped=False)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not replace a mapped file")
def test_scores_stay_where_their_file_is_written_anew(tmp_path: Path) -> None:
    """Not mapped, they are in memory; mapped, a replaced file leaves them as they were."""
    path = write(tmp_path / "a.npy", probs=scores())
    whole, mapped = read_scores(path), read_scores(path, mapped=True)
    write(tmp_path / "new.npy", probs=1 - scores()).replace(path)
    assert isinstance(whole, Tensor)
    assert isinstance(mapped, Tensor)
    assert np.array_equal(mapped.numpy(), scores())
    path.write_bytes(b"")
    assert np.array_equal(whole.numpy(), scores())


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
        complains(caught.value, tmp_path / name, "probabilities")
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
