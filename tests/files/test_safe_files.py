"""Files appear whole or not at all; tensors with metadata."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.support.folders import complains

from cpseg._internal.safe_files import (
    atomic,
    locked,
    read_tensors,
    write_tensors,
    write_text,
)
from cpseg.files.id_lists import (
    write_ids,
)
from cpseg.files.masks import (
    write_mask,
)


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


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_metadata_nested_without_end_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"cpseg": text})
    with pytest.raises(ValueError, match="unreadable") as caught:
        read_tensors(path)
    complains(caught.value, path)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"kind"'])
def test_metadata_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"cpseg": text})
    with pytest.raises(ValueError, match="an object as its metadata") as caught:
        read_tensors(path)
    complains(caught.value, path)


def test_a_missing_tensor_file_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors"):
        read_tensors(tmp_path / "x.safetensors")


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


def test_a_name_that_utf8_cannot_hold_is_shown(tmp_path: Path) -> None:
    """As Python reads names where the locale is C and PYTHONUTF8 is 0."""
    with pytest.raises(ValueError, match="PYTHONUTF8=1") as caught:
        write_text(tmp_path / "ids.txt", "images/a\udcc3\udca4.png\n")
    complains(caught.value, tmp_path / "ids.txt", r"images/a\udcc3\udca4.png")
    assert list(tmp_path.iterdir()) == []


def test_a_locked_file_is_locked_and_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "x.lock"
    with locked(path) as holds:
        assert holds
        with pytest.raises(BlockingIOError), locked(path):
            pass
        assert path.exists(), "the refused one took it away"
    assert not path.exists()
    path.write_text("left by a killed process")
    with locked(path) as holds:
        assert holds


def test_text_is_utf8_with_plain_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "ü\n")
    assert (tmp_path / "x").read_bytes() == b"\xc3\xbc\n"
