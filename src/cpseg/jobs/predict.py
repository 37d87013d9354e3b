"""The job ``cpseg predict``: score files from a foundation model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpseg._internal import words
from cpseg._internal.checks import (
    check_background,
    check_choice,
    check_count,
    check_unit_interval,
    message,
    name_file_in_errors,
    shape,
)
from cpseg._internal.distributed import broadcast_from_rank0, rank, shard
from cpseg._internal.hashing import digest
from cpseg._internal.safe_files import atomic, write_text
from cpseg._internal.threads import in_order
from cpseg.core.selection import Evidence
from cpseg.core.selection import evidence as evidence_of
from cpseg.files.dataset import Progress, quiet
from cpseg.files.id_lists import Pair, check_ids
from cpseg.files.manifest import Stamp
from cpseg.files.masks import image_size, read_image
from cpseg.files.run_folder import open_run_folder, output_paths
from cpseg.files.score_files import write_evidence
from cpseg.foundation.foundation import Segmenter

DTYPES = words.SCORE_DTYPES

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


def predict(
    segmenter: Segmenter,
    root: str | Path,
    pairs: Sequence[Pair],
    out: str | Path,
    *,
    names: Sequence[str],
    made: Mapping[str, Any],
    dtype: str = "uint8",
    evidence: bool = False,
    background: int | None = None,
    batch: int = 1,
    device: torch.device | str = "cpu",
    workers: int = 1,
    progress: Progress = quiet,
) -> int:
    """Write the probabilities of images, except those already written; ranks share the images.

    The folder also gets ``classes.txt``, the names of the channels.

    Args:
        segmenter: turns images into probabilities, on ``device``.
        root: the folder that the images are relative to.
        pairs: the images; their masks are not read.
        out: the folder to write, laid out like the images.
        names: names of the segmenter's classes.
        made: everything that the probabilities depend on, in JSON's types; a folder written with
            another value is refused.
        dtype: dtype of the files, ``"uint8"`` (p = u/255) or ``"float16"``.
        evidence: write evidence in place of the probabilities. It is made from probabilities
            rounded to ``dtype``, so that both kinds of files give the same labels.
        background: index of the dominant class that selection will suppress, for evidence.
        batch: number of images of one size that go through the model together. With more than
            1, images are processed in the order of their sizes, and results may differ in the
            last digits.
        device: the device of the segmenter.
        workers: how many threads read images, and as many write files, beside the model; with 1
            the calling thread does all.
        progress: wraps the loop over images.

    Returns:
        The number of files written by this rank.

    Raises:
        ValueError: bad settings or images, a folder that holds another run or is in use, scores of
            another shape or outside [0, 1].
        FileNotFoundError: an image is missing.
        OSError: a file that cannot be read or written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> with TemporaryDirectory() as folder:
        ...     Image.new("RGB", (4, 3)).save(f"{folder}/a.png")
        ...     images, out = find_images(folder), f"{folder}/P"
        ...     predict(lambda x: x / 3, folder, images, out, names="rgb", made={})
        1
    """
    root, out = Path(root), Path(out)
    check_choice("predict", dtype, DTYPES, name="a dtype")
    check_count("predict", batch, name="batch", fix="pass 1")
    if evidence:
        check_background("predict", background, len(names))
    check_ids("predict", [(pair.image, pair.image) for pair in pairs])
    suffix = ".safetensors" if evidence else ".npz"
    paths = output_paths("predict", out, pairs, suffix, kind="scores")
    for pair in pairs:
        if not (root / pair.image).is_file():
            raise FileNotFoundError(
                message(str(root / pair.image), "an image", "no such file", "mend the list")
            )
    form = [dtype, background] if evidence else [dtype]
    facts = {"made": dict(made), "names": list(names), "form": form, "root": str(root.resolve())}
    # An image is read once more for its digest: a model takes longer, should only times change.
    with open_run_folder(out, digest(facts), digest_inputs=True) as folder:
        if rank() == 0:
            write_text(out / "classes.txt", "".join(f"{name}\n" for name in names))
        left = broadcast_from_rank0(
            [
                pair
                for pair in pairs
                if rank() > 0 or not folder.is_up_to_date(paths[pair], root / pair.image)
            ]
        )
        mine = list(shard(left)[0])
        if batch > 1:
            mine.sort(key=lambda pair: image_size(root / pair.image))

        def read(pair: Pair) -> _Item:
            stamps = folder.stamps(root / pair.image)
            return _Item(pair, read_image(root / pair.image), stamps)

        def predicted(items: Iterable[_Item]) -> Iterator[tuple[_Item, Tensor | Evidence]]:
            for group in _batches(items, batch):
                images = torch.stack([item.pixels for item in group])
                images = images.to(device).to(torch.float32) / 255
                probs = segmenter(images)
                wanted = [len(group), len(names), *images.shape[-2:]]
                if list(probs.shape) != wanted:
                    fix = "return one score per class and pixel, and name every class"
                    raise ValueError(message("predict", f"scores {wanted}", shape(probs), fix))
                for item, scores in zip(group, probs, strict=True):
                    with name_file_in_errors(root / item.pair.image):
                        kept = _kept(scores, dtype)
                        found = _evidence_of(kept, background) if evidence else kept
                    yield item, found

        def write(result: tuple[_Item, Tensor | Evidence]) -> None:
            item, made = result
            path = paths[item.pair]
            if isinstance(made, Evidence):
                write_evidence(path, made)
            else:
                with atomic(path) as file:
                    np.savez_compressed(file, probs=made.cpu().numpy())
            folder.record(path, [root / item.pair.image], item.stamps)

        with (
            closing(in_order(read, progress(mine, len(mine), "predict"), workers)) as images,
            closing(in_order(write, predicted(images), workers)) as written,
        ):
            for _ in written:
                pass
    return len(mine)


def _evidence_of(kept: Tensor, background: int | None) -> Evidence:
    """The evidence of probabilities as a file keeps them."""
    read = kept.to(torch.float32) / 255 if kept.dtype == torch.uint8 else kept
    return evidence_of(read, background=background)


def _kept(scores: Tensor, dtype: str) -> Tensor:
    """Probabilities in the dtype of the file."""
    fix = "return probabilities; where mixed precision overflowed, try bfloat16 or none"
    check_unit_interval("predict", scores, name="probabilities", fix=fix)
    if dtype == "uint8":
        return (scores.to(torch.float32) * 255).round().to(torch.uint8)
    return scores.to(torch.float16)


class _Item(NamedTuple):
    """An image that was read, and the stamp of its file from before that."""

    pair: Pair
    pixels: Tensor
    stamps: list[Stamp]


def _batches(items: Iterable[_Item], most: int) -> Iterator[list[_Item]]:
    """Groups of at most ``most`` images of one size."""
    group: list[_Item] = []
    for item in items:
        if group and group[0].pixels.shape != item.pixels.shape:
            yield group
            group = []
        group.append(item)
        if len(group) == most:
            yield group
            group = []
    if group:
        yield group


def find_images(folder: str | Path) -> list[Pair]:
    """Every image below a folder, by path, without hidden files and folders.

    Raises:
        ValueError: there is none, or ``folder`` is no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        fix = "pass a folder, or a list of images with --root and --ids"
        raise ValueError(message("--images", "a folder", f"{folder}, which is none", fix))
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    images = [path for path in files if path.suffix.lower() in _IMAGES]
    shown = [path for path in images if not any(part.startswith(".") for part in path.parts)]
    if not shown:
        expected, got = f"images ({', '.join(_IMAGES)})", "none"
        raise ValueError(message(str(folder), expected, got, "check the path"))
    return [Pair(path.as_posix(), None) for path in sorted(shown)]
