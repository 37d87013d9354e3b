"""Files: probability maps, evidence, masks, id lists; written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpseg.checks import (
    SCORES_FIX,
    check_background,
    check_label_values,
    check_unit_interval,
    labels_outside,
    message,
)
from cpseg.selection import Evidence

SUFFIXES = (".npy", ".npz", ".safetensors")
_METADATA = "cpseg"  # the one key of our safetensors metadata: a JSON text


class Pair(NamedTuple):
    """One line of an id list, both relative to the data root; ``mask`` is None for one column."""

    image: str
    mask: str | None


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that appears under its name only once it is complete.

    Raises:
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name[:64]}."  # well below the longest name a file may have
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # name the file, not its stand-in
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with atomic(path) as file:
        file.write(text.encode())


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file atomically, with ``metadata`` as JSON."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(metadata, sort_keys=True)
    with atomic(path) as file:
        file.write(save(contiguous, metadata={_METADATA: text}))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON metadata of a safetensors file; metadata of other programs reads as {}.

    Raises:
        ValueError: the file is truncated or not a safetensors file.
        FileNotFoundError: there is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {}).get(_METADATA, "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise _damaged(path, "a safetensors file", error) from error


def _damaged(path: str | Path, expected: str, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(
        message(str(path), expected, f"an unreadable one ({reason})", "write it anew")
    )


def find_scores(folder: str | Path, image: str) -> Path:
    """The score file of an image: its relative path without suffix, under ``folder``.

    A folder without the image's subfolders is searched by the image's name alone.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    stem = Path(image).with_suffix("")
    for place in (Path(folder) / stem, Path(folder) / stem.name):
        names = [place.with_name(place.name + suffix) for suffix in SUFFIXES]
        found = [path for path in names if path.is_file()]
        if len(found) > 1:
            got = " and ".join(path.name for path in found)
            raise ValueError(message(str(place), "one score file", got, "remove all but one"))
        if found:
            return found[0]
    expected = f"{stem}{' | '.join(SUFFIXES)}"
    fix = "write the class scores of every listed image"
    raise FileNotFoundError(message(str(folder), expected, "no such file", fix))


def read_scores(path: str | Path, *, device: torch.device | str = "cpu") -> Tensor | Evidence:
    """Class scores ``[K, H, W]`` of one image, or :class:`Evidence`, whichever the file holds.

    Args:
        path: ``.npy``, ``.npz`` (key ``probs``, or its only array) or ``.safetensors`` (key
            ``probs``, or an evidence file): uint8 (p = u/255), float16, bfloat16 or float32.
        device: where the tensors lie.

    Returns:
        float ``[K, H, W]`` (uint8 becomes float32) or an :class:`Evidence` of ``[H, W]`` tensors.

    Raises:
        ValueError: the file is damaged, of another shape or dtype, or a value is NaN or lies
            outside [0, 1].
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors, metadata = read_tensors(path)
        if metadata.get("kind") == "evidence":
            return _as_evidence(path, tensors, metadata, device)
        probs = _only(path, tensors)
    else:
        probs = _from_numpy(path)
    if probs.ndim != 3 or probs.numel() == 0:
        got, fix = str(list(probs.shape)), "write one image a file, classes first"
        raise ValueError(message(str(path), "scores [K, H, W]", got, fix))
    if probs.dtype == torch.uint8:
        probs = probs.to(device).to(torch.float32) / 255
    elif probs.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        probs = probs.to(device)
        fix = f"{SCORES_FIX}, and write the file anew"
        check_unit_interval(str(path), probs, name="class scores", fix=fix)
    else:
        expected, fix = "uint8, float16 or float32 scores", "convert and write it anew"
        raise ValueError(message(str(path), expected, str(probs.dtype), fix))
    return probs


def _from_numpy(path: Path) -> Tensor:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return torch.from_numpy(loaded)
        with loaded:
            return _only(path, {name: torch.from_numpy(loaded[name]) for name in loaded.files})
    except FileNotFoundError:
        raise
    except Exception as error:  # from zip, zlib, NumPy's header parser: anything may come
        raise _damaged(path, f"a {path.suffix} file of class scores", error) from error


def _only(path: Path, tensors: dict[str, Tensor]) -> Tensor:
    if "probs" in tensors:
        return tensors["probs"]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    names = ", ".join(sorted(tensors)) or "none"
    fix = "name the class scores 'probs'"
    raise ValueError(message(str(path), "an array 'probs'", f"arrays {names}", fix))


def write_evidence(path: str | Path, evidence: Evidence) -> None:
    """Write an :class:`Evidence` of one image (``[H, W]`` tensors) as safetensors."""
    tensors = {"best": evidence.best, "best_class": evidence.best_class}
    if evidence.background_score is not None:
        tensors["background_score"] = evidence.background_score
    metadata = {
        "kind": "evidence",
        "format": 1,
        "background": evidence.background,
        "num_classes": evidence.num_classes,
        "recalibration": evidence.recalibration,
        "class_map": evidence.class_map,
    }
    write_tensors(path, tensors, metadata)


def _as_evidence(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], device: torch.device | str
) -> Evidence:
    fix = "run cpseg compact anew"
    background, num_classes = metadata.get("background"), metadata.get("num_classes")
    wanted = {"best", "best_class"} | ({"background_score"} if background is not None else set())
    if metadata.get("format") != 1 or set(tensors) != wanted or not isinstance(num_classes, int):
        got = f"format {metadata.get('format')} with {', '.join(sorted(tensors))}"
        raise ValueError(message(str(path), "evidence of format 1", got, fix))
    check_background(str(path), background, num_classes)
    best, best_class = tensors["best"], tensors["best_class"]
    back = tensors.get("background_score")
    for name in sorted(wanted):
        tensor = tensors[name]
        kind = tensor.is_floating_point() != (name == "best_class")
        if not kind or tensor.shape != best.shape or best.ndim != 2 or best.numel() == 0:
            got = f"'{name}' {tensor.dtype} {list(tensor.shape)}"
            raise ValueError(message(str(path), "evidence [H, W], all of one size", got, fix))
        if name != "best_class":
            check_unit_interval(str(path), tensor, name=f"evidence '{name}'", fix=fix)
    if bool(labels_outside(best_class, num_classes, -1).any()) or int(best_class.min()) < 0:
        expected, got = f"classes 0..{num_classes - 1} in evidence", f"{int(best_class.max())}"
        raise ValueError(message(str(path), expected, got, fix))
    return Evidence(
        best.to(device),
        best_class.to(device, torch.uint8 if num_classes <= 255 else torch.int16),
        None if back is None else back.to(device),
        background,
        num_classes,
        metadata.get("recalibration"),
        metadata.get("class_map"),
    )


def read_mask(
    path: str | Path, *, num_classes: int, ignore_index: int = 255, size: tuple[int, int] | None
) -> Tensor:
    """Labels of one image from an 8-bit single-channel PNG (``L`` or palette).

    Args:
        path: the mask.
        num_classes: number of classes; every value must be one or ``ignore_index``.
        ignore_index: the value of void pixels.
        size: expected height and width; None takes any.

    Returns:
        uint8 ``[H, W]``.

    Raises:
        ValueError: not such an image, another size, or a value that is neither class nor void.
        FileNotFoundError: there is no such file.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode = image.mode
            if mode == "L" and ";" in str(image.tile[0][3]):  # Pillow would scale these up
                mode = f"{str(image.tile[0][3]).strip('()').partition(',')[0]} bits"
            values = np.array(image)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise _damaged(path, "a mask image", error) from error
    if mode not in ("L", "P") or values.ndim != 2:
        fix = "store class indices, 255 for void"
        raise ValueError(message(str(path), "an 8-bit mask (L or P)", f"mode {mode}", fix))
    labels = torch.from_numpy(values)
    if size is not None and tuple(labels.shape) != tuple(size):
        expected, got = f"a mask {_by(size)} like its image's scores", _by(tuple(labels.shape))
        raise ValueError(message(str(path), expected, got, "write both at the image's size"))
    check_label_values(str(path), labels, num_classes, ignore_index)
    return labels


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of an image file as stored: EXIF rotation is not applied.

    Raises:
        ValueError: the file is not an image.
        FileNotFoundError: there is no such file.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise _damaged(path, "an image", error) from error


def _by(size: Sequence[int]) -> str:
    return "x".join(str(side) for side in size)


def palette() -> list[int]:
    """The 256 colours of the PASCAL VOC palette as one flat list of red, green, blue."""
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return [int(value) for value in colours.flatten()]


def write_mask(path: str | Path, labels: Tensor) -> None:
    """Write labels ``[H, W]`` in 0..255 as an 8-bit palette PNG, atomically.

    Raises:
        ValueError: not two axes, or a value that eight bits do not hold.
    """
    from PIL import Image

    low, high = (int(value) for value in labels.aminmax()) if labels.numel() else (0, 256)
    if labels.ndim != 2 or low < 0 or high > 255:
        got = f"{list(labels.shape)} with values {low}..{high}"
        fix = "an 8-bit mask holds at most 255 classes and void"
        raise ValueError(message("write_mask", "labels [H, W] in 0..255", got, fix))
    image = Image.fromarray(labels.to(torch.uint8).cpu().numpy()).convert("L")
    image.putpalette(palette())
    with atomic(path) as file:
        image.save(file, format="PNG")


def read_ids(path: str | Path, *, columns: int = 2) -> list[Pair]:
    """The lines of an id list: ``image mask``, split on one space, relative to the data root.

    Args:
        path: the list.
        columns: 2 where masks are needed; 1 takes lines with and without a mask.

    Raises:
        ValueError: an empty list, a blank line, spaces in a path, a missing mask, an image twice.
        FileNotFoundError: there is no such file.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise _damaged(path, "an id list in UTF-8", error) from error
    pairs: list[Pair] = []
    seen: dict[str, int] = {}
    expected = "'image mask'" if columns == 2 else "'image' or 'image mask'"
    for number, line in enumerate(lines, start=1):
        parts = line.split(" ")
        if not columns <= len(parts) <= 2 or "" in parts:
            fix = "one pair a line, one space between, none in a path, no blank line"
            raise ValueError(message(f"{path}, line {number}", expected, repr(line), fix))
        parts[0] = posixpath.normpath(parts[0])  # ./a.png is a.png
        if parts[0] in seen:
            got, fix = f"{parts[0]} as on line {seen[parts[0]]}", "remove one of them"
            raise ValueError(message(f"{path}, line {number}", "every image once", got, fix))
        seen[parts[0]] = number
        pairs.append(Pair(parts[0], parts[1] if len(parts) == 2 else None))
    if not pairs:
        raise ValueError(message(str(path), f"lines {expected}", "an empty list", "list images"))
    return pairs


def write_ids(path: str | Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Write an id list as UniMatch and AllSpark read it, atomically.

    Raises:
        ValueError: a path with white space, which those codebases would split.
    """
    pairs = list(pairs)
    check_ids(path, pairs)
    write_text(path, "".join(f"{image} {mask}\n" for image, mask in pairs))


def check_ids(path: str | Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Raise where a path has white space: training code would split the line there."""
    for name in (name for pair in pairs for name in pair):
        if name.split() != [name]:
            fix = "training code splits lines there: rename the folder"
            raise ValueError(message(str(path), "paths without spaces", repr(name), fix))
