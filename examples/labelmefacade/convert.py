"""Convert a download of LabelMeFacade to files that cpseg reads: images, masks and id lists.

python examples/labelmefacade/convert.py labelmefacade data
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from cpseg.files import VOID, atomic, write_ids, write_mask, write_text

CLASSES = ("building", "car", "pavement", "road", "sky", "vegetation")
COLOURS = {  # of the download, and our classes: doors and windows belong to buildings
    (0, 0, 0): VOID,  # various
    (128, 0, 0): 0,  # building
    (128, 128, 0): 0,  # door
    (0, 0, 128): 0,  # window
    (128, 0, 128): 1,  # car
    (128, 128, 128): 2,  # pavement
    (128, 64, 0): 3,  # road
    (0, 128, 128): 4,  # sky
    (0, 128, 0): 5,  # vegetation
}
POOL, HELDOUT, BUDGETS, LONG_SIDE = 350, 182, (22, 44, 88, 175), 256
Say = Callable[[str], None]


class Lists(NamedTuple):
    """Names of images, without suffix.

    Attributes:
        pool: of which the first n are labelled, for every budget n.
        heldout: from other source folders, for measuring alone.
    """

    pool: list[str]
    heldout: list[str]


def folder_of(name: str) -> str:
    """The folder of LabelMe that an image comes from: what is before the two underscores."""
    return name.split("__")[0]


def find(download: Path) -> list[str]:
    """Names of all images of the download, sorted.

    Raises:
        FileNotFoundError: no images, or an image without labels.
    """
    names = sorted(path.stem for path in (download / "images").glob("*.jpg"))
    if not names:
        raise FileNotFoundError(
            f"{download}: expected a folder images with JPEGs, got none; "
            "pass a clone of https://github.com/cvjena/labelmefacade"
        )
    for name in names:
        path = download / "labels" / f"{name}.png"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: expected labels, got no such file; download the repository again"
            )
    return names


def deal(names: Sequence[str], *, pool: int, heldout: int, seed: int) -> Lists:
    """Hold out whole source folders, and draw the pool from the images of the others.

    Folders are taken in a random order, and those that would exceed ``heldout`` are passed over.

    Raises:
        ValueError: too few images.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffled(values: list[str]) -> list[str]:
        return [values[i] for i in torch.randperm(len(values), generator=generator).tolist()]

    by_folder: dict[str, list[str]] = {}
    for name in sorted(names):
        by_folder.setdefault(folder_of(name), []).append(name)
    held: list[str] = []
    for folder in shuffled(sorted(by_folder)):
        if len(held) + len(by_folder[folder]) <= heldout:
            held += by_folder.pop(folder)
    rest = shuffled(sorted(name for group in by_folder.values() for name in group))
    if len(rest) < pool or not held:
        raise ValueError(
            f"--pool: expected at most the {len(rest)} images of folders that are not held out, "
            f"and some folder held out, got {pool} and {len(held)} images held out; "
            "choose others, or download the repository again"
        )
    return Lists(rest[:pool], sorted(held))


def read_labels(path: Path) -> np.ndarray:
    """Our classes ``[H, W]`` of a colour image of labels, 255 where it is none of them.

    Raises:
        ValueError: a colour that the download's README does not list.
    """
    with Image.open(path) as opened:
        colours = np.asarray(opened.convert("RGB")).astype(np.int64)
    codes = colours @ np.array([1 << 16, 1 << 8, 1])
    labels = np.full(codes.shape, -1)
    for (red, green, blue), label in COLOURS.items():
        labels[codes == (red << 16) + (green << 8) + blue] = label
    if (labels < 0).any():
        red, green, blue = colours[labels < 0][0].tolist()
        raise ValueError(
            f"{path}: expected the 9 colours of the download's README, got {red}:{green}:{blue}; "
            "download the repository again"
        )
    return labels.astype(np.uint8)


def reduced(size: tuple[int, int], long_side: int) -> tuple[int, int]:
    """Width and height with this long side; smaller images are not enlarged."""
    factor = min(1.0, long_side / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def write(download: Path, out: Path, name: str, long_side: int) -> bool:
    """Write an image and its mask unless they exist; returns whether they were written.

    Raises:
        ValueError: labels of another size than the image, or of an unknown colour.
    """
    image, mask = out / "images" / f"{name}.jpg", out / "masks" / f"{name}.png"
    if image.is_file() and mask.is_file():
        return False
    path = download / "labels" / f"{name}.png"
    labels = read_labels(path)
    with Image.open(download / "images" / f"{name}.jpg") as opened:
        pixels = opened.convert("RGB")
    if pixels.size != labels.shape[::-1]:
        raise ValueError(
            f"{path}: expected {pixels.width}x{pixels.height} pixels like the image, "
            f"got {labels.shape[1]}x{labels.shape[0]}; download the repository again"
        )
    size = reduced(pixels.size, long_side)
    small = Image.fromarray(labels).resize(size, Image.Resampling.NEAREST)
    write_mask(mask, torch.from_numpy(np.array(small)))
    with atomic(image) as file:
        pixels.resize(size, Image.Resampling.LANCZOS).save(file, format="JPEG", quality=95)
    return True


def write_lists(out: Path, lists: Lists, budgets: Sequence[int]) -> None:
    """Write ``labelled_n.txt`` and ``unlabelled_n.txt`` of every budget, the pool, the held-out.

    Raises:
        ValueError: a budget that leaves nothing unlabelled.
    """

    def listed(name: str, names: Sequence[str]) -> None:
        write_ids(out / f"{name}.txt", [(f"images/{n}.jpg", f"masks/{n}.png") for n in names])

    for budget in budgets:
        if not 0 < budget < len(lists.pool):
            raise ValueError(
                f"--budgets: expected numbers below the pool's {len(lists.pool)}, got {budget}; "
                "choose smaller ones"
            )
        listed(f"labelled_{budget}", lists.pool[:budget])
        listed(f"unlabelled_{budget}", lists.pool[budget:])
    listed(f"all_{len(lists.pool)}", lists.pool)
    listed("heldout", lists.heldout)


def convert(args: argparse.Namespace, say: Say) -> None:
    """Write lists, images and masks; existing images are kept.

    Raises:
        ValueError: bad settings or files, or a folder that was made with other settings.
        OSError: a file that cannot be read or written.
    """
    out, settings = args.out, f"long side {args.long_side}, seed {args.seed}, pool {args.pool}"
    settings += f", held out {args.heldout}\n"
    made = out / "made.txt"
    if made.is_file() and made.read_text(encoding="utf-8") != settings:
        raise ValueError(
            f"{out}: expected a new folder, or one with the same settings, got one of "
            f"{made.read_text(encoding='utf-8').strip()}; choose another folder"
        )
    lists = deal(find(args.download), pool=args.pool, heldout=args.heldout, seed=args.seed)
    write_text(made, settings)
    write_lists(out, lists, args.budgets)
    names = [*lists.pool, *lists.heldout]
    written = sum(write(args.download, out, name, args.long_side) for name in names)
    folders = len({folder_of(name) for name in lists.heldout})
    say(f"{out}: {written} images written, {len(names) - written} were there")
    say(f"{len(lists.pool)} in the pool, {len(lists.heldout)} of {folders} other folders held out")


def main(argv: list[str] | None = None, say: Say = print) -> int:
    """Convert; returns 0 on success, 2 after one line on stderr for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("download", type=Path, help="a clone of cvjena/labelmefacade")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--long-side", type=int, default=LONG_SIDE, help=f"in pixels (default {LONG_SIDE})"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the lists (default 0)")
    parser.add_argument("--pool", type=int, default=POOL, help=f"images (default {POOL})")
    parser.add_argument(
        "--heldout", type=int, default=HELDOUT, help=f"images at most (default {HELDOUT})"
    )
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=BUDGETS, help="numbers of labelled images"
    )
    args = parser.parse_args(argv)
    try:
        convert(args, say)
    except (ValueError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
