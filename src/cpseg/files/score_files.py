"""Score files: probabilities of one image, or the evidence made from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpseg._internal.checks import (
    SCORES_FIX,
    check_background,
    check_unit_interval,
    labels_outside,
    message,
    name_file_in_errors,
)
from cpseg._internal.safe_files import (
    read_tensor_shapes,
    read_tensors,
    write_tensors,
)
from cpseg.core.argmax import class_dtype
from cpseg.core.score_reading import ScoreReading
from cpseg.core.selection import Evidence
from cpseg.files.geotiff import RASTERS, scores_shape, stored_scores
from cpseg.files.image_folders import places_of
from cpseg.files.score_arrays import (
    TORCH,
    from_bytes,
    from_numpy,
    from_safetensors,
    from_torch,
    only,
    shape_from_numpy,
)

SUFFIXES = (".npy", ".npz", ".safetensors", *TORCH)
_READABLE = (*SUFFIXES, *RASTERS)
PLAIN = ScoreReading()


def find_scores(folder: str | Path, image: str, *, kind: str = "probabilities") -> Path:
    """The file of an image: its relative path without suffix, under ``folder``.

    Where there is none, the path without its leading folders: ``train/x.npy`` or ``x.npy`` for
    ``images/train/x.jpg``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    whole, *shorter = places_of(image)
    for places in ([whole], shorter):
        found = [Path(folder) / f"{place}{suffix}" for place in places for suffix in _READABLE]
        files = [path for path in found if path.is_file()]
        if len(files) > 1:
            same = len({path.with_suffix("") for path in files}) == 1
            where = files[0].with_suffix("") if same else Path(folder)
            names = [path.name if same else str(path.relative_to(folder)) for path in files]
            expected = f"one file of {kind}" + ("" if same else f" for {image}")
            got = " and ".join(names)
            raise ValueError(message(str(where), expected, got, "remove all but one"))
        if files:
            return files[0]
    expected = f"{whole}{' | '.join(_READABLE)}"
    if shorter:
        expected += f", or {' or '.join(shorter)}"
    fix = f"write the {kind} of every listed image"
    raise FileNotFoundError(message(str(folder), expected, "no such file", fix))


def read_scores(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    reading: ScoreReading = PLAIN,
    size: tuple[int, int] | None = None,
    entry: str | None = None,
    mapped: bool = False,
) -> Tensor | Evidence:
    """The probabilities ``[K, H, W]`` of one image, or :class:`Evidence`, as the file holds.

    Args:
        path: ``.npy``, ``.npz`` (key ``probs``, or its only array), ``.safetensors`` (key
            ``probs``, or an evidence file), ``.pt`` or ``.pth`` (a tensor, or a dictionary with
            one), ``.tif`` or ``.tiff`` (one band per class; ``cpseg[geo]``): uint8 (p = u/255),
            float16, bfloat16, float32 or float64.
        device: where the tensors lie.
        reading: layout, logits and resolution of the scores in the file.
        size: the image's height and width, which ``reading.upsample`` needs.
        entry: the key of the image's scores in a file with those of all images.
        mapped: leave values of a ``.npy`` file on the disk until they are used, which is faster;
            then nothing may write into the file while the result lives.

    Returns:
        float ``[K, H, W]`` (uint8 becomes float32) or an :class:`Evidence` of ``[H, W]`` tensors.

    Raises:
        ValueError: the file is damaged, of another shape or dtype, or a value is NaN or lies
            outside [0, 1].
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    probs = read_stored(path, entry, mapped=mapped)
    if not isinstance(probs, Tensor):
        return _as_evidence(path, *probs, device)
    _three(path, probs.shape, reading)
    if reading.logits is not None:
        _check_logits(path, probs)
        probs = probs.to(device)
    elif probs.dtype == torch.uint8:
        probs = from_bytes(probs, device)
    elif probs.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        probs = probs.to(device)
        fix = f"pass --logits, or {SCORES_FIX}, and write the file anew"
        check_unit_interval(str(path), probs, name="probabilities", fix=fix)
    else:
        expected, fix = "uint8, float16 or float32 scores", "convert and write it anew"
        raise ValueError(message(str(path), expected, str(probs.dtype), fix))
    if reading.is_plain:
        return probs
    with name_file_in_errors(path):
        return reading(probs, size)


def read_stored(
    path: Path, entry: str | None = None, *, mapped: bool = False
) -> Tensor | tuple[dict[str, Tensor], dict[str, Any]]:
    """The array in a score file as it is stored, or the tensors and facts of an evidence file.

    Args:
        path: the file.
        entry: the key of the image's scores in a file with those of all images.
        mapped: see :func:`read_scores`.

    Raises:
        ValueError: a damaged file, or several arrays of which none is ``probs``.
        FileNotFoundError: there is no such file.
    """
    if path.suffix in TORCH:
        return from_torch(path, "probs", entry)
    if path.suffix in RASTERS:
        return stored_scores(path)
    if path.suffix != ".safetensors":
        return from_numpy(path, "probs", entry, mapped=mapped)
    if entry is not None:
        stored: Tensor = from_safetensors(path, entry)
        return stored
    tensors, metadata = read_tensors(path)
    is_evidence = metadata.get("kind") == "evidence"
    return (tensors, metadata) if is_evidence else only(path, tensors)


def _check_logits(path: Path, logits: Tensor) -> None:
    if not logits.is_floating_point():
        fix = "leave --logits out for probabilities in uint8"
        raise ValueError(message(str(path), "floating-point logits", str(logits.dtype), fix))
    if not bool(logits.isfinite().all()):
        fix = "write the file anew"
        raise ValueError(message(str(path), "finite logits", "NaN or infinite values", fix))


def read_features(path: str | Path, *, device: torch.device | str = "cpu") -> Tensor:
    """The features ``[C, h, w]`` of one image by an encoder, float32.

    Args:
        path: ``.npy``, ``.npz`` (key ``features``, or its only array), ``.safetensors``, ``.pt`` or
            ``.pth``: float16, bfloat16 or float32.
        device: where the tensor lies.

    Raises:
        ValueError: the file is damaged, of another shape or dtype, or a value is NaN or infinite.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        features = only(path, read_tensors(path)[0], "features")
    elif path.suffix in TORCH:
        features = from_torch(path, "features")
    else:
        features = from_numpy(path, "features")
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


def read_shape(
    path: str | Path, *, reading: ScoreReading = PLAIN, entry: str | None = None
) -> tuple[int, int, int]:
    """Classes, height and width of a file of probabilities, without reading the values.

    Args:
        path: the file.
        reading: the layout of its scores; the shape is that before they are resized.
        entry: the key of the image's scores in a file with those of all images.

    Raises:
        ValueError: the file is damaged, holds evidence or an array of another rank.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.suffix in TORCH:
        stored: Sequence[int] = tuple(from_torch(path, "probs", entry).shape)
    elif path.suffix in RASTERS:
        stored = scores_shape(path)
    elif path.suffix != ".safetensors":
        stored = shape_from_numpy(path, entry)
    elif entry is not None:
        stored = from_safetensors(path, entry, shape_alone=True)
    else:
        shapes, metadata = read_tensor_shapes(path)
        if metadata.get("kind") == "evidence":
            raise no_probabilities(path)
        stored = only(path, shapes)
    return _three(path, stored, reading)


def no_probabilities(path: Path) -> ValueError:
    """The error where a job needs the probabilities and finds evidence."""
    fix = "pass the folder of probabilities"
    return ValueError(message(str(path), "probabilities [K, H, W]", "evidence", fix))


def _three(path: Path, size: Sequence[int], reading: ScoreReading = PLAIN) -> tuple[int, int, int]:
    """The shape of one image's probabilities, classes first."""
    if len(size) != 3 or 0 in size:
        first = reading.layout == "chw"
        expected = f"probabilities {'[K, H, W]' if first else '[H, W, K]'}"
        fix = f"write one image per file, classes {'first' if first else 'last'}"
        if len(size) == 2:
            fix += "; labels are not enough, the scores of every class are needed"
        raise ValueError(message(str(path), expected, str(list(size)), fix))
    return reading.shape(size)


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
