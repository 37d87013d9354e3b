"""Convert CamVid of the SegNet tutorial, at half its size, to files that cpseg reads.

python examples/camvid/convert.py CamVid camvid
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from cpseg.files import atomic, image_size, read_mask, write_mask, write_text

CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car"),
    *("pedestrian", "bicyclist"),
)
SCENERY = ("sky", "building", "road", "pavement", "tree")
VOID_THERE, VOID = 11, 255
DRIVE = "0016E5"  # the target drive; it is part of train and val
SOURCE = ("0001TP", "0006R0")  # for the foundation model; the rest of 0001TP, in test, is not used
HELDOUT, BUDGETS = 80, (100, 50, 25, 8)
Say = Callable[[str], None]


class Frame(NamedTuple):
    """A labelled image of the download."""

    image: Path
    mask: Path

    @property
    def line(self) -> str:
        """Its line in id lists."""
        return f"images/{self.image.name} masks/{self.image.name}"


def find(download: Path, size: tuple[int, int]) -> tuple[list[Frame], list[Frame]]:
    """The frames of the source drives and of the target drive, sorted by name.

    Raises:
        FileNotFoundError: a folder or the mask of an image is missing.
        ValueError: an image has another size, or a drive has too few images.
    """
    source, target = [], []
    for part in ("train", "val"):
        for folder in (download / part, download / f"{part}annot"):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{folder}: expected a folder of PNGs, got none; "
                    "pass the folder CamVid of the SegNet tutorial"
                )
        for image in sorted((download / part).glob("*.png")):
            drive = image.name.split("_")[0]
            frame = Frame(image, download / f"{part}annot" / image.name)
            if drive == DRIVE:
                target.append(frame)
            elif drive in SOURCE:
                source.append(frame)
    for frame in source + target:
        if not frame.mask.is_file():
            raise FileNotFoundError(
                f"{frame.mask}: expected a mask, got no such file; download the folder again"
            )
        for path in frame:
            height, width = image_size(path)
            if (width, height) != size:
                raise ValueError(
                    f"{path}: expected {size[0]}x{size[1]} pixels, got {width}x{height}; "
                    "use the download unchanged, or pass its --size"
                )
    least = HELDOUT + max(BUDGETS) + 1
    for drive, frames, count in ((DRIVE, target, least), (" and ".join(SOURCE), source, 1)):
        if len(frames) < count:
            raise ValueError(
                f"{download}: expected {count} images or more of {drive}, got {len(frames)}; "
                "download the folder again"
            )
    return source, target


def record(folder: Path, made: dict[str, Any]) -> None:
    """Write down the settings of a folder, or compare them with those written there.

    Raises:
        ValueError: the folder was made with other settings.
    """
    path = folder / "made.json"
    if not path.is_file():
        write_text(path, json.dumps(made, indent=2) + "\n")
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    other = sorted(name for name in made.keys() | old.keys() if made.get(name) != old.get(name))
    if other:
        raise ValueError(
            f"{folder}: expected a new folder, or one with the same settings, "
            f"got one of another {', '.join(other)}; choose another folder, or delete this one"
        )


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Change to a folder, so that commands do not depend on its path."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def shrink(frame: Frame, out: Path, size: tuple[int, int]) -> bool:
    """Write a frame at half its size unless it exists; returns whether it was written."""
    image, mask = out / "images" / frame.image.name, out / "masks" / frame.image.name
    if image.is_file() and mask.is_file():
        return False
    labels = read_mask(
        frame.mask, num_classes=len(CLASSES), ignore_index=VOID_THERE, size=(size[1], size[0])
    )
    half = (size[0] // 2, size[1] // 2)
    small = np.array(Image.fromarray(labels.numpy()).resize(half, Image.Resampling.NEAREST))
    write_mask(mask, torch.from_numpy(np.where(small == VOID_THERE, VOID, small)))
    with Image.open(frame.image) as opened:
        pixels = opened.convert("RGB").resize(half, Image.Resampling.BOX)  # the mean of 2x2
    with atomic(image) as file:
        pixels.save(file, format="PNG")
    return True


def lists_of(source: list[str], target: list[str], seed: int) -> dict[str, list[str]]:
    """The id lists by name, from one random order of the target drive; labelled lists are nested.

    ``lists/<budget>``, ``lists/all`` and ``lists/teacher`` are folders for ``examples/segformer``.
    The last two need no unlabelled image, but the list must not be empty.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [target[i] for i in torch.randperm(len(target), generator=generator).tolist()]
    heldout, pool = drawn[:HELDOUT], drawn[HELDOUT:]
    made = {"source": source, "heldout": heldout, "pool": pool}
    folders = {"teacher": (source, source[:1]), "all": (pool, pool[:1])}
    for budget in BUDGETS:
        made[f"labelled_{budget}"], made[f"unlabelled_{budget}"] = pool[:budget], pool[budget:]
        folders[str(budget)] = (pool[:budget], pool[budget:])
    for name, (labelled, unlabelled) in folders.items():
        parts = {"labelled": labelled, "unlabelled": unlabelled, "val": heldout}
        made |= {f"lists/{name}/{part}": lines for part, lines in parts.items()}
    return made


def class_map() -> dict[str, Any]:
    """The class map of background plus objects: the scenery is class 0."""
    objects = [name for name in CLASSES if name not in SCENERY]
    return {
        "model_classes": list(CLASSES),
        "classes": ["background", *objects],
        "map": {name: name if name in objects else "background" for name in CLASSES},
    }


def convert(download: Path, out: Path, *, seed: int, size: tuple[int, int], say: Say) -> None:
    """Write images, masks, lists and the class map to ``out``; existing images are kept."""
    if min(size) < 2 or size[0] % 2 or size[1] % 2:
        raise ValueError(
            f"--size: expected even numbers, got {size[0]}x{size[1]}; pass the download's size"
        )
    source, target = find(download, size)
    names = [frame.image.name for frame in source + target]
    record(out, {"seed": seed, "size": list(size), "images": names})
    written = sum(shrink(frame, out, size) for frame in source + target)
    lists = lists_of([frame.line for frame in source], [frame.line for frame in target], seed)
    for name, lines in lists.items():
        write_text(out / f"{name}.txt", "".join(f"{line}\n" for line in lines))
    write_text(out / "map.json", json.dumps(class_map(), indent=2) + "\n")
    say(f"{out}: {written} images written, {len(names) - written} were there")
    say(
        f"{len(source)} images of {' and '.join(SOURCE)} for the foundation model, {len(target)} of"
    )
    say(f"{DRIVE}: {HELDOUT} held out, {len(target) - HELDOUT} from which labelled ones are drawn")


def main(argv: list[str] | None = None, say: Say = print) -> int:
    """Convert; returns 0 on success, 2 after one line on stderr for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("download", type=Path, help="the folder CamVid of the SegNet tutorial")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="seed of the lists (default 0)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(480, 360),
        help="width and height of the images (default 480 360)",
    )
    args = parser.parse_args(argv)
    size = (args.size[0], args.size[1])
    try:
        convert(args.download, args.out, seed=args.seed, size=size, say=say)
    except (ValueError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
