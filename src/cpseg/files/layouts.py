"""Folders of images and masks as other training code expects them: where files lie, and values."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from torch import Tensor

from cpseg._internal.checks import message
from cpseg._internal.safe_files import atomic
from cpseg.core.mask_format import VOID
from cpseg.files.masks import open_image

_ORIENTATION = 0x0112  # of EXIF
YOLO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Layout:
    """Where a kind of training code looks for images, masks and lists.

    Attributes:
        name: the word of the option.
        images: folder of the images; ``{}`` is the split.
        masks: folder of the masks; ``{}`` is the split.
        splits: the names of the training and of the validation split.
        lists: the list of every split, or None where the loader reads whole folders.
        suffix: the suffix that the loader adds to a name, or None where it takes any.
        one_suffix: whether all images of a split must have the same.
        counts_from_one: masks hold class + 1 and 0 for void, in grey.
    """

    name: str
    images: str
    masks: str
    splits: tuple[str, str] = ("train", "val")
    lists: tuple[str, str] | None = None
    suffix: str | None = None
    one_suffix: bool = False
    counts_from_one: bool = False

    @property
    def most_classes(self) -> int:
        """How many classes a mask of eight bits holds besides void.

        Readers of masks that count from one turn 0 into 255 and subtract one, so that the value 255
        would become void as well.
        """
        return VOID - 1 if self.counts_from_one else VOID

    def image_path(self, split: int, name: str, suffix: str) -> str:
        """Where an image lies, relative to the folder."""
        return f"{self.images.format(self.splits[split])}/{name}{suffix}"

    def mask_path(self, split: int, name: str) -> str:
        """Where a mask lies, relative to the folder."""
        return f"{self.masks.format(self.splits[split])}/{name}.png"

    def values(self, labels: Tensor) -> Tensor:
        """Labels with 255 for void, as they are stored in masks of this layout: uint8."""
        return labels + 1 if self.counts_from_one else labels  # 255 + 1 is 0 in uint8


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("yolo", "images/{}", "annotations/{}", lists=("train.txt", "val.txt")),
        Layout(
            "mmseg",
            "img_dir/{}",
            "ann_dir/{}",
            lists=("names.txt", "names_val.txt"),
            one_suffix=True,
        ),
        Layout(
            "voc",
            "JPEGImages",
            "SegmentationClass",
            lists=("ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt"),
            suffix=".jpg",
        ),
        Layout(
            "ade",
            "images/{}",
            "annotations/{}",
            splits=("training", "validation"),
            suffix=".jpg",
            counts_from_one=True,
        ),
    )
}


def names_in_layout(images: Sequence[str]) -> dict[str, str]:
    """A name without folders for every image: its own, or its path with ``_`` for ``/``.

    Raises:
        ValueError: two images would still share one.

    Example:
        >>> names_in_layout(["a/x.jpg", "b/y.jpg"])
        {'a/x.jpg': 'x', 'b/y.jpg': 'y'}
        >>> names_in_layout(["a/x.jpg", "b/x.jpg"])
        {'a/x.jpg': 'a_x', 'b/x.jpg': 'b_x'}
    """
    paths = [PurePosixPath(Path(image).as_posix()) for image in images]
    names = [path.stem for path in paths]
    if len({name.casefold() for name in names}) < len(names):
        parts = [[p for p in path.with_suffix("").parts if p not in ("/", "..")] for path in paths]
        names = ["_".join(each) for each in parts]
    owner: dict[str, str] = {}
    for image, name in zip(images, names, strict=True):
        if name.casefold() in owner:
            got = f"{owner[name.casefold()]} and {image}"
            fix = "rename one: a layout has no subfolders"
            raise ValueError(message("label", "images with names of their own", got, fix))
        owner[name.casefold()] = image
    return dict(zip(images, names, strict=True))


def suffixes_in_layout(layout: Layout, images: Sequence[str]) -> dict[str, str]:
    """The suffix of every image in a layout; readers tell the format from the content.

    Raises:
        ValueError: a format that the loader does not take.
    """
    own = {image: Path(image).suffix for image in images}
    if layout.name == "yolo":
        for image, suffix in own.items():
            if suffix.lower() not in YOLO_SUFFIXES:
                expected = f"images with a suffix of {', '.join(YOLO_SUFFIXES)}"
                fix = "convert it, or choose another layout"
                raise ValueError(message("--output-layout yolo", expected, image, fix))
    shared = layout.suffix
    if layout.one_suffix:
        found = set(own.values())
        shared = found.pop() if len(found) == 1 else ".jpg"
    return own if shared is None else dict.fromkeys(images, shared)


def check_upright(path: Path) -> None:
    """An image that loaders do not rotate.

    Raises:
        ValueError: it has an EXIF orientation: many loaders then rotate the image and not its
            mask.
    """
    with open_image(path) as image:
        orientation = image.getexif().get(_ORIENTATION, 1)
    if orientation not in (0, 1):
        expected = "an image without EXIF orientation, which loaders apply to it and not to masks"
        fix = "store the image without the tag or as it is to be seen, and its scores alike"
        raise ValueError(message(str(path), expected, f"orientation {orientation}", fix))


def link(target: Path, path: Path, *, relative: bool) -> bool:
    """Make ``path`` a symbolic link to a file.

    Args:
        target: the file.
        path: where the link is to be.
        relative: whether the link holds a path relative to its own folder, or an absolute one.

    Returns:
        False where the file system or the operating system has no links, or relative ones would
        lead to another drive; nothing is there then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    place = os.path.abspath(target)
    try:
        if relative:
            place = os.path.relpath(target.parent.resolve() / target.name, path.parent.resolve())
        if path.is_symlink() and os.readlink(path) == place:
            return True
        remove(path)
        os.symlink(place, path)
    except (OSError, ValueError, NotImplementedError):
        return False
    return True


def copy(source: Path, path: Path) -> None:
    """Copy a file, atomically."""
    remove(path)
    with source.open("rb") as read, atomic(path) as write:
        shutil.copyfileobj(read, write)


def remove(path: Path) -> None:
    """Remove a file or a link, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def write_grey(path: Path, values: Tensor) -> None:
    """Write uint8 ``[H, W]`` as a grey PNG, atomically."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(values.cpu().numpy()))
    with atomic(path) as file:
        image.save(file, format="PNG")
