"""The job that asks a segmenter about images and writes its class scores as files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpseg._internal import words
from cpseg._internal.checks import (
    check_background,
    check_unit_interval,
    message,
    name_file_in_errors,
    shape,
)
from cpseg._internal.distributed import (
    barrier,
    broadcast_from_rank0,
    rank,
    shard,
)
from cpseg._internal.hashing import (
    digest,
)
from cpseg._internal.safe_files import atomic, write_text
from cpseg.core.selection import evidence as evidence_of
from cpseg.files.dataset import (
    Progress,
    quiet,
)
from cpseg.files.id_lists import Pair, check_ids
from cpseg.files.masks import image_size
from cpseg.files.run_folder import (
    is_up_to_date,
    open_run_folder,
    output_path,
)
from cpseg.files.score_files import write_evidence
from cpseg.foundation.foundation import Segmenter

DTYPES = words.SCORE_DTYPES

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
_MODES = ("RGB", "L", "P", "1", "RGBA", "LA", "PA", "CMYK", "YCbCr")  # 8 bits, or fewer


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
    progress: Progress = quiet,
) -> int:
    """Write the class scores of images, skipping those that are there; ranks share the images.

    Next to the score files lies ``classes.txt``, the names of the channels.

    Args:
        segmenter: images to class scores, on ``device``.
        root: the folder that the images are relative to.
        pairs: the images; their masks are not read.
        out: the folder to write, laid out like the images.
        names: of the segmenter's classes.
        made: what the scores depend on, in JSON's types: a folder of others is refused.
        dtype: how scores are kept, ``"uint8"`` (p = u/255) or ``"float16"``.
        evidence: write evidence in place of the scores. It is taken from scores as ``dtype`` would
            keep them, so that scores and evidence are of one score function.
        background: index of the dominant class that selection will suppress, for evidence.
        batch: images of one size that go through the model together. They are taken in the
            order of their sizes then; more than 1 may round differently.
        device: where the segmenter works.
        progress: wraps the loop over images.

    Returns:
        The number of files written by this rank.

    Raises:
        ValueError: bad settings or images, a folder that holds another run, scores of another
            shape or outside [0, 1].
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
    if dtype not in DTYPES:
        expected = f"a dtype among {', '.join(DTYPES)}"
        raise ValueError(message("predict", expected, dtype, "choose one"))
    if batch < 1:
        raise ValueError(message("predict", "batch >= 1", str(batch), "pass 1"))
    if evidence:
        check_background("predict", background, len(names))
    places = _places(pairs, out, ".safetensors" if evidence else ".npz")
    for pair in pairs:
        if not (root / pair.image).is_file():
            raise FileNotFoundError(
                message(str(root / pair.image), "an image", "no such file", "mend the list")
            )
    form = [dtype, background] if evidence else [dtype]
    facts = {"made": dict(made), "names": list(names), "form": form, "root": str(root.resolve())}
    open_run_folder(out, digest(facts))
    if rank() == 0:
        write_text(out / "classes.txt", "".join(f"{name}\n" for name in names))
    left = broadcast_from_rank0(
        [pair for pair in pairs if not is_up_to_date(places[pair], root / pair.image)]
    )
    mine = list(shard(left)[0])
    if batch > 1:
        mine.sort(key=lambda pair: image_size(root / pair.image))
    for group in _batches(progress(mine, len(mine), "predict"), root, batch):
        images = torch.stack([image for _, image in group]).to(device).to(torch.float32) / 255
        probs = segmenter(images)
        wanted = [len(group), len(names), *images.shape[-2:]]
        if list(probs.shape) != wanted:
            fix = "return one score a class and pixel, and name every class"
            raise ValueError(message("predict", f"scores {wanted}", shape(probs), fix))
        for (pair, _), scores in zip(group, probs, strict=True):
            with name_file_in_errors(root / pair.image):
                kept = _kept(scores, dtype)
                if evidence:
                    read = kept.to(torch.float32) / 255 if dtype == "uint8" else kept
                    write_evidence(places[pair], evidence_of(read, background=background))
                    continue
            with atomic(places[pair]) as file:
                np.savez_compressed(file, probs=kept.cpu().numpy())
    barrier()
    return len(mine)


def _kept(scores: Tensor, dtype: str) -> Tensor:
    """Scores as a file holds them."""
    fix = "return probabilities; where mixed precision overflowed, try bfloat16 or none"
    check_unit_interval("predict", scores, name="class scores", fix=fix)
    if dtype == "uint8":
        return (scores.to(torch.float32) * 255).round().to(torch.uint8)
    return scores.to(torch.float16)


def _batches(pairs: Iterable[Pair], root: Path, most: int) -> Iterator[list[tuple[Pair, Tensor]]]:
    """Images of one size, at most ``most`` together."""
    group: list[tuple[Pair, Tensor]] = []
    for pair in pairs:
        image = read_image(root / pair.image)
        if group and group[0][1].shape != image.shape:
            yield group
            group = []
        group.append((pair, image))
        if len(group) == most:
            yield group
            group = []
    if group:
        yield group


def _places(pairs: Sequence[Pair], out: Path, suffix: str) -> dict[Pair, Path]:
    """The file of every image; images that would share one are refused."""
    check_ids("predict", [(pair.image, pair.image) for pair in pairs])
    places: dict[Pair, Path] = {}
    owner: dict[Path, str] = {}
    for pair in pairs:
        path = output_path(out, pair.image, suffix)
        if path in owner:
            expected, got = "image names that differ before the suffix", owner[path]
            fix = "rename one: their scores would be the same file"
            raise ValueError(message("predict", expected, f"{got} and {pair.image}", fix))
        owner[path] = pair.image
        places[pair] = path
    return places


def find_images(folder: str | Path) -> list[Pair]:
    """Every image below a folder, by path, hidden files and folders left out.

    Raises:
        ValueError: there is none, or ``folder`` is no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        fix = "pass a folder, or a list of images with --root and --ids"
        raise ValueError(message("--images", "a folder", f"{folder}, which is none", fix))
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    images = [path for path in found if path.suffix.lower() in _IMAGES]
    shown = [path for path in images if not any(part.startswith(".") for part in path.parts)]
    if not shown:
        expected, got = f"images ({', '.join(_IMAGES)})", "none"
        raise ValueError(message(str(folder), expected, got, "check the path"))
    return [Pair(path.as_posix(), None) for path in sorted(shown)]


def read_image(path: str | Path) -> Tensor:
    """An image as uint8 RGB ``[3, H, W]``, as stored: EXIF rotation is not applied.

    Raises:
        ValueError: not an image of 8 bits a channel.
        FileNotFoundError: there is no such file.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode = image.mode
            values = np.array(image.convert("RGB")) if mode in _MODES else None
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        reason = " ".join(str(error).split())
        got = f"an unreadable one ({reason})"
        raise ValueError(message(str(path), "an image", got, "mend or remove it")) from error
    if values is None:
        expected, fix = "an image of 8 bits a channel", "convert it to RGB"
        raise ValueError(message(str(path), expected, f"mode {mode}", fix))
    return torch.from_numpy(values).permute(2, 0, 1)
