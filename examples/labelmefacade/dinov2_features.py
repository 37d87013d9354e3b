"""Features of DINOv2, by transformers, of every listed image: ``features/<name>.npz``.

python examples/labelmefacade/dinov2_features.py data --images labelmefacade/images
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cpseg.files import Pair, atomic, read_ids, write_text

MODEL, LONG_SIDE = "facebook/dinov2-small", 448
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DINOv2 was trained
Say = Callable[[str], None]
Size = tuple[int, int]


def grid(size: Size, long_side: int, patch: int) -> Size:
    """Rows and columns of patches of an image ``(height, width)`` brought to this long side."""
    factor = long_side / max(size) / patch
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def read_image(path: Path, patches: Size, patch: int) -> Tensor:
    """RGB, resized to whole patches and standardised, float32 ``[3, H, W]``."""
    size = (patches[1] * patch, patches[0] * patch)
    with Image.open(path) as opened:
        pixels = np.array(opened.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    values = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    mean, deviation = (torch.tensor(each)[:, None, None] for each in (MEAN, DEVIATION))
    return (values - mean) / deviation


@torch.no_grad()
def encode(model: Any, images: Tensor, patches: Size) -> Tensor:
    """Features ``[B, C, h, w]`` of images ``[B, 3, H, W]``: the patches' tokens.

    They come last, after the token of the image and, in some models, registers.
    """
    tokens = model(pixel_values=images).last_hidden_state[:, -patches[0] * patches[1] :]
    return tokens.transpose(1, 2).unflatten(2, patches)


def listed(data: Path, names: Sequence[str]) -> list[Pair]:
    """The images of some id lists, each once."""
    found: dict[str, Pair] = {}
    for name in names:
        found.update({pair.image: pair for pair in read_ids(data / name, columns=1)})
    return list(found.values())


def batches(missing: Sequence[tuple[Path, Path, Size]], most: int) -> Iterator[list[Any]]:
    """At most ``most`` images with the same number of patches at a time."""
    batch: list[Any] = []
    for item in sorted(missing, key=lambda item: item[2]):
        if batch and (len(batch) == most or item[2] != batch[0][2]):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Write down how a folder is made, or compare.

    Raises:
        ValueError: the folder was made in another way.
    """
    made = out / "made.json"
    if not made.is_file():
        write_text(made, json.dumps(settings) + "\n")
        return
    old = json.loads(made.read_text(encoding="utf-8"))
    if old != settings:
        raise ValueError(
            f"{out}: expected a new folder, or features made with {old}, got {settings}; "
            "choose another folder"
        )


def write(args: argparse.Namespace, say: Say) -> None:
    """Write the features that are not there yet.

    Raises:
        ImportError: transformers is missing.
        ValueError: a folder with other features, or two images of one name.
        OSError: a file, or the model, that cannot be read.
    """
    from transformers import AutoModel

    out = args.out or args.data / "features"
    model = AutoModel.from_pretrained(args.model, local_files_only=args.local)
    model = model.eval().to(args.device)
    patch = int(model.config.patch_size)
    settings = {"model": args.model, "long_side": args.long_side}
    check_settings(out, settings)
    missing, paths = [], set()
    pairs = listed(args.data, args.ids)
    for pair in pairs:
        image = (args.images or args.data / "images") / Path(pair.image).name
        path = out / f"{image.stem}.npz"
        if path in paths:
            raise ValueError(f"{path}: expected features of one image, got two; rename one of them")
        paths.add(path)
        if not path.is_file():
            with Image.open(image) as opened:
                size = (opened.height, opened.width)
            missing.append((image, path, grid(size, args.long_side, patch)))
    for batch in batches(missing, args.batch):
        patches = batch[0][2]
        images = torch.stack([read_image(image, patches, patch) for image, _, _ in batch])
        features = encode(model, images.to(args.device), patches)
        for (_, path, _), values in zip(batch, features, strict=True):
            with atomic(path) as file:
                np.savez_compressed(file, features=values.cpu().numpy().astype(np.float16))
    say(f"{out}: features of {len(missing)} images written, {len(pairs) - len(missing)} were there")


def main(argv: list[str] | None = None, say: Say = print) -> int:
    """Write features; returns 0 on success, 2 after one line on stderr for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of convert.py")
    parser.add_argument("--images", type=Path, help="larger images of the same names")
    parser.add_argument("--ids", nargs="+", default=["all_350.txt", "heldout.txt"])
    parser.add_argument("--out", type=Path, help="folder to write (default DATA/features)")
    parser.add_argument("--model", default=MODEL, help=f"on the hub, or a folder ({MODEL})")
    parser.add_argument("--local", action="store_true", help="ask nothing of the hub")
    parser.add_argument("--long-side", type=int, default=LONG_SIDE, help="of what the model sees")
    parser.add_argument("--batch", type=int, default=8, help="images of one size (default 8)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    args = parser.parse_args(argv)
    try:
        write(args, say)
    except (ImportError, ValueError, OSError) as error:
        print(f"dinov2_features.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
