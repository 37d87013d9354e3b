"""Every kind of file that the command reads, damaged: one line and exit 2, or the right result."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.support import folders
from tests.support.folders import command, files, refused

from cpseg.files.dataset import Source
from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.predict import read_image
from cpseg.jobs.settings import RecalibrationOptions

CASES = 200
REMADE = ("manifest", "finished mask", "fold")
HARMLESS = "images were used for the calibration"

Rng = np.random.Generator


# How a file is damaged: a function from its content and a draw to its new content.


def truncated(content: bytes, rng: Rng) -> bytes:
    return content[: int(rng.integers(len(content)))]


def flipped(content: bytes, rng: Rng) -> bytes:
    damaged = bytearray(content)
    for place in rng.integers(len(content), size=int(rng.integers(1, 4))):
        damaged[place] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def flipped_at_the_start(content: bytes, rng: Rng) -> bytes:
    """Where headers are."""
    return flipped(content[:64], rng) + content[64:]


def zeroed(content: bytes, rng: Rng) -> bytes:
    begin = int(rng.integers(len(content)))
    return content[:begin] + bytes(min(512, len(content) - begin)) + content[begin + 512 :]


def longer(content: bytes, rng: Rng) -> bytes:
    return content + rng.bytes(int(rng.integers(1, 100)))


def shifted(content: bytes, rng: Rng) -> bytes:
    return rng.bytes(int(rng.integers(1, 9))) + content


def noise(content: bytes, rng: Rng) -> bytes:
    return rng.bytes(len(content))


def other_text(content: bytes, rng: Rng) -> bytes:
    texts = ["", "\n", "null", "[]", "{}", "3", '"a"', "[" * 100_000, '{"a":' * 100_000, "\0" * 99]
    texts += ["a b c d", "\ufeff", "NaN", '{"map": 3}', "1e999999999"]
    return texts[int(rng.integers(len(texts)))].encode()


def utf16(content: bytes, rng: Rng) -> bytes:
    return content.decode("latin-1").encode("utf-16")


def lying_numpy(content: bytes, rng: Rng) -> bytes:
    """A header that says more, or something else, than there is."""
    shape = [(4, 10**6, 10**6), (4, 12, 0), (4,), (2**62, 4, 4), (-1, 12, 16)][int(rng.integers(5))]
    kind = ["<f4", "|O", "<c8", "<U9", "|u1"][int(rng.integers(5))]
    header = str({"descr": kind, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content[128:]


def lying_safetensors(content: bytes, rng: Rng) -> bytes:
    length = [2**63, 10**9, 0, 7, len(content)][int(rng.integers(5))]
    return struct.pack("<Q", length) + content[8:]


def lying_png(content: bytes, rng: Rng) -> bytes:
    """Another size or bit depth with a checksum that fits."""
    import zlib

    sizes = [(10**5, 10**5), (0, 4), (40_000, 3), (1, 1), (2**31 - 1, 2)]
    size = struct.pack(">II", *sizes[int(rng.integers(len(sizes)))])
    header = b"IHDR" + size + bytes([int(rng.integers(17)), int(rng.integers(7)), 0, 0, 0])
    checksum = struct.pack(">I", zlib.crc32(header))
    return content[:12] + header + checksum + content[33:]


ANY = [truncated, truncated, flipped, flipped_at_the_start, zeroed, longer, shifted, noise]
ANY += [other_text, other_text, utf16]


class Workshop:
    """A data set, a calibration, finished folders, and the command that reads each file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = data = folders.make(root / "data", count=4, sizes=((12, 16), (10, 20)))
        source = Source(data.root, data.probs)
        made = calibrate(
            source,
            data.ids,
            alpha=0.5,
            background=0,
            variant="image",
            recalibration=RecalibrationOptions(method="temperature", folds=2),
        )
        self.calibration = root / "c.safetensors"
        made.save(self.calibration)
        self.class_map, self.mask_map = root / "classes.json", root / "masks.json"
        self.class_map.write_text('{"map": {"0": 0, "1": 1, "2": 2, "3": 3}, "reduce": "sum"}')
        self.mask_map.write_text('{"0": 0, "1": 1, "2": 2, "3": 3}')
        self.jpeg = data.root / "images" / "photo.jpg"
        Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(self.jpeg)
        for name, suffix in (("zipped", "npz"), ("tensors", "safetensors")):
            (root / name / "images").mkdir(parents=True)
            for image in data.images:
                path = (root / name / image).with_suffix(f".{suffix}")
                if suffix == "npz":
                    np.savez_compressed(path, probs=data.scores[image])
                else:
                    save_file({"probs": torch.from_numpy(data.scores[image])}, path)

    def label(self, out: Path, probs: Path | None = None, **more: object) -> list[str]:
        changed = {"calibration": self.calibration, "output": out, "labelled": self.data.ids}
        probs = self.data.probs if probs is None else probs
        return ["label", *self.data.options(**changed, probs=probs, **more)]

    def calibrate(self, out: Path, **more: object) -> list[str]:
        return ["calibrate", *self.data.options(background=0, alpha=0.5, output=out, **more)]

    def sweep(self, out: Path) -> list[str]:
        some = {"folds": 2, "alphas": "0.5", "variants": "image", "backgrounds": "0"}
        return ["sweep", *self.data.options(output=out, **some)]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    return Workshop(tmp_path)


Words = Callable[[Path], list[str]]
Kind = tuple[Path, Words, list[Callable[[bytes, Rng], bytes]], bool]


def kinds(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> dict[str, Kind]:
    """The file, the command, more damages, and whether it starts from a finished folder."""
    data, root = shop.data, shop.root
    image = data.images[1]
    finished, swept, evidence = root / "finished", root / "swept", root / "evidence"
    small = ["compact", *data.options(calibration=shop.calibration, output=evidence)]
    for words in (shop.label(finished), shop.sweep(swept), small):
        result = command(capsys, *words)
        assert result.code == 0, result
    plain = {"class_map": shop.class_map}
    masks = {"mask_map": shop.mask_map}
    return {
        "npy": (data.score_file(image), shop.label, [lying_numpy], False),
        "npz": (
            (root / "zipped" / image).with_suffix(".npz"),
            lambda out: shop.label(out, root / "zipped"),
            [],
            False,
        ),
        "safetensors": (
            (root / "tensors" / image).with_suffix(".safetensors"),
            lambda out: shop.label(out, root / "tensors"),
            [lying_safetensors],
            False,
        ),
        "evidence": (
            (evidence / image).with_suffix(".safetensors"),
            lambda out: shop.label(out, evidence),
            [lying_safetensors],
            False,
        ),
        "first scores": (data.score_file(data.images[0]), shop.calibrate, [lying_numpy], False),
        "calibration": (shop.calibration, shop.label, [lying_safetensors], False),
        "image": (data.root / image, shop.label, [lying_png], False),
        "mask": (data.mask_file(image), shop.calibrate, [lying_png], False),
        "ids": (data.ids, shop.label, [], False),
        "class map": (shop.class_map, lambda out: shop.calibrate(out, **plain), [], False),
        "mask map": (shop.mask_map, lambda out: shop.calibrate(out, **masks), [], False),
        "run.json": (finished / "run.json", shop.label, [], True),
        "manifest": (finished / "manifest.jsonl", shop.label, [], True),
        "finished mask": (finished / "masks" / image, shop.label, [lying_png], True),
        "fold": (swept / "fold-0.json", shop.sweep, [], True),
    }


def test_a_damaged_file_of_any_kind_is_one_line_or_does_no_harm(
    shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(5)
    every = kinds(shop, capsys)
    names = list(every)
    codes: dict[str, list[int]] = {name: [] for name in names}
    failures = []
    for case in range(CASES):
        name = names[case % len(names)]
        path, words, more, resumes = every[name]
        choices = [*ANY, *more, *more]
        damage = choices[int(rng.integers(len(choices)))]
        whole = path.read_bytes()
        kept = files(path.parent) if resumes else {}
        out = path.parent if resumes else shop.root / f"out{case}"
        if name == "finished mask":
            out = shop.root / "finished"
            kept = files(out)
        damaged = damage(whole, rng)
        path.write_bytes(damaged)
        result = command(capsys, *words(out))
        codes[name].append(result.code)
        try:
            if result.code == 0:
                said = [line for line in result.err.splitlines() if HARMLESS not in line]
                assert [line for line in said if not line.startswith("cpseg: warning: ")] == []
                if name in REMADE:
                    remade = {**files(out), "manifest.jsonl": kept["manifest.jsonl"]}
                    assert remade == kept, "what was made again is not what was there"
            else:
                refused(result)
                assert "--debug" not in result.err or "RecursionError" in result.err
                assert not list(out.rglob(".*.part")) if out.is_dir() else True
        except AssertionError as error:
            failures.append(f"{case}: {name}, {damage.__name__}: {error} {result.err}"[:400])
        finally:
            path.write_bytes(whole)  # which makes what was made from it stale
            for relative, content in kept.items():
                (out / relative).write_bytes(content)
            if not resumes and out.exists():
                shutil.rmtree(out) if out.is_dir() else out.unlink()
    assert failures == []
    assert all(2 in of for name, of in codes.items() if name not in REMADE)
    assert {code for name in REMADE for code in codes[name]} == {0}


@pytest.mark.parametrize("put", ["folder", "loop", "nothing", "device"])
def test_what_is_no_file_at_all_is_one_line(
    put: str, shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (path, words, _, resumes) in kinds(shop, capsys).items():
        if name in ("run.json", "manifest", "finished mask", "fold") and put != "folder":
            continue  # not there is not damaged, and what is written there replaces a link
        if put == "device" and name in ("npy", "npz", "safetensors", "evidence", "first scores"):
            continue  # not a file, so not found
        whole = path.read_bytes()
        path.unlink()
        if put == "folder":
            path.mkdir()
        elif put == "loop":
            path.symlink_to(path)
        elif put == "device":
            path.symlink_to("/dev/null")
        out = shop.root / "finished" if resumes else shop.root / "out"
        result = command(capsys, *words(path.parent if name == "fold" else out))
        refused(result)
        assert "--debug" not in result.err, (name, result.err)
        path.rmdir() if put == "folder" else path.unlink(missing_ok=True)
        path.write_bytes(whole)
        if not resumes:
            shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_damaged_photograph_is_one_line(shop: Workshop, suffix: str) -> None:
    """As ``predict`` reads it."""
    rng = np.random.default_rng(6)
    path = shop.jpeg if suffix == "jpg" else shop.data.root / shop.data.images[0]
    whole = path.read_bytes()
    refusals = 0
    for _ in range(100):
        damage = ANY[int(rng.integers(len(ANY)))]
        path.write_bytes(damage(whole, rng))
        try:
            read_image(path)
        except ValueError as error:
            folders.complains(error, path)
            refusals += 1
    assert refusals > 30
