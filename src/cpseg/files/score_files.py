"""Score files: probabilities of one image, or the evidence made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cpseg._internal.checks import (
    SCORES_FIX,
    check_background,
    check_unit_interval,
    labels_outside,
    message,
)
from cpseg._internal.safe_files import (
    damaged,
    read_tensor_shapes,
    read_tensors,
    write_tensors,
)
from cpseg.core.argmax import class_dtype
from cpseg.core.selection import Evidence

T = TypeVar("T")
SUFFIXES = (".npy", ".npz", ".safetensors")


def find_scores(folder: str | Path, image: str, *, kind: str = "probabilities") -> Path:
    """The file of an image: its relative path without suffix, under ``folder``.

    A folder without the image's subfolders is searched by the image's name alone.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    stem = Path(image).with_suffix("")
    for place in (Path(folder) / stem, Path(folder) / stem.name):
        names = [place.with_name(place.name + suffix) for suffix in SUFFIXES]
        files = [path for path in names if path.is_file()]
        if len(files) > 1:
            got = " and ".join(path.name for path in files)
            expected = f"one file of {kind}"
            raise ValueError(message(str(place), expected, got, "remove all but one"))
        if files:
            return files[0]
    expected = f"{stem}{' | '.join(SUFFIXES)}"
    fix = f"write the {kind} of every listed image"
    raise FileNotFoundError(message(str(folder), expected, "no such file", fix))


def read_scores(path: str | Path, *, device: torch.device | str = "cpu") -> Tensor | Evidence:
    """The probabilities ``[K, H, W]`` of one image, or :class:`Evidence`, as the file holds.

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
        probs = _from_numpy(path, "probs")
    _three(path, probs.shape)
    if probs.dtype == torch.uint8:
        probs = probs.to(device).to(torch.float32) / 255
    elif probs.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        probs = probs.to(device)
        fix = f"{SCORES_FIX}, and write the file anew"
        check_unit_interval(str(path), probs, name="probabilities", fix=fix)
    else:
        expected, fix = "uint8, float16 or float32 scores", "convert and write it anew"
        raise ValueError(message(str(path), expected, str(probs.dtype), fix))
    return probs


def read_features(path: str | Path, *, device: torch.device | str = "cpu") -> Tensor:
    """The features ``[C, h, w]`` of one image by an encoder, float32.

    Args:
        path: ``.npy``, ``.npz`` (key ``features``, or its only array) or ``.safetensors``: float16,
            bfloat16 or float32.
        device: where the tensor lies.

    Raises:
        ValueError: the file is damaged, of another shape or dtype, or a value is NaN or infinite.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        features = _only(path, read_tensors(path)[0], "features")
    else:
        features = _from_numpy(path, "features")
    if features.ndim != 3 or 0 in features.shape:
        got, fix = str(list(features.shape)), "write one image per file, channels first"
        raise ValueError(message(str(path), "features [C, h, w]", got, fix))
    if not features.is_floating_point():
        fix = "write float16 or float32"
        raise ValueError(message(str(path), "floating-point features", str(features.dtype), fix))
    if not bool(features.isfinite().all()):
        fix = "write the file anew"
        raise ValueError(message(str(path), "finite features", "NaN or infinite values", fix))
    return features.to(device, torch.float32)


def holds_evidence(path: str | Path) -> bool:
    """Whether a file holds evidence, from its header alone."""
    path = Path(path)
    return path.suffix == ".safetensors" and read_tensor_shapes(path)[1].get("kind") == "evidence"


def read_shape(path: str | Path) -> tuple[int, int, int]:
    """Classes, height and width of a file of probabilities, without reading the values.

    Raises:
        ValueError: the file is damaged, holds evidence or an array of another rank.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        shapes, metadata = read_tensor_shapes(path)
        if metadata.get("kind") == "evidence":
            raise no_probabilities(path)
    else:
        return _three(path, _shape_from_numpy(path))
    return _three(path, _only(path, shapes))


def no_probabilities(path: Path) -> ValueError:
    """The error where a job needs the probabilities and finds evidence."""
    fix = "pass the folder of probabilities"
    return ValueError(message(str(path), "probabilities [K, H, W]", "evidence", fix))


def _three(path: Path, size: Sequence[int]) -> tuple[int, int, int]:
    """The shape of one image's probabilities."""
    if len(size) != 3 or 0 in size:
        got, fix = str(list(size)), "write one image per file, classes first"
        raise ValueError(message(str(path), "probabilities [K, H, W]", got, fix))
    return size[0], size[1], size[2]


def _shape_from_numpy(path: Path) -> Sequence[int]:
    header = np.lib.format
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix == ".npy" else None)
        if isinstance(loaded, np.ndarray):
            return tuple(loaded.shape)
        with loaded:
            name = _only(path, {name: name for name in loaded.files})
            with loaded.zip.open(f"{name}.npy") as file:
                old = header.read_magic(file) == (1, 0)
                read = header.read_array_header_1_0 if old else header.read_array_header_2_0
                size: tuple[int, ...] = read(file)[0]
                return size
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, FileNotFoundError) or str(error).startswith(f"{path}:"):
            raise
        raise damaged(path, f"a {path.suffix} file of probabilities", error) from error
    except Exception as error:  # from zip, zlib, NumPy's header parser: anything may come
        raise damaged(path, f"a {path.suffix} file of probabilities", error) from error


def _from_numpy(path: Path, name: str) -> Tensor:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return torch.from_numpy(loaded)
        with loaded:
            arrays = {each: torch.from_numpy(loaded[each]) for each in loaded.files}
            return _only(path, arrays, name)
    except FileNotFoundError:
        raise
    except Exception as error:  # from zip, zlib, NumPy's header parser: anything may come
        kind = "probabilities" if name == "probs" else name
        raise damaged(path, f"a {path.suffix} file of {kind}", error) from error


def _only(path: Path, arrays: Mapping[str, T], name: str = "probs") -> T:
    """The array of this name among those of a file, or its only one."""
    if name in arrays:
        return arrays[name]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    names = ", ".join(sorted(arrays)) or "none"
    fix = f"name the array {name!r}"
    raise ValueError(message(str(path), f"an array {name!r}", f"arrays {names}", fix))


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
        best_class.to(device, class_dtype(num_classes)),
        None if back is None else back.to(device),
        background,
        num_classes,
        metadata.get("recalibration"),
        metadata.get("class_map"),
    )
