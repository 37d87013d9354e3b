"""Folders in place of lists: all images in one, and the masks in another that belong to them."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from cpseg._internal.checks import message

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")


def is_image_name(name: str) -> bool:
    """Whether a file's name ends like that of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def places_of(image: str) -> list[str]:
    """Where a file that belongs to an image may lie in another folder, without suffix.

    First the image's own path, then that path without its leading folders, one after the other:
    ``scores/train/x.npy`` belongs to ``images/train/x.jpg``.

    Example:
        >>> places_of("images/train/x.jpg")
        ['images/train/x', 'train/x', 'x']
    """
    parts = PurePosixPath(posixpath.normpath(Path(image).as_posix())).with_suffix("").parts
    return ["/".join(parts[start:]).replace("//", "/") for start in range(len(parts))]


def images_in(folder: Path, root: Path, *, without: Path | None = None) -> list[str]:
    """Every image below a folder in the order of their paths, relative to ``root``.

    Hidden files and folders are left out, and those below the folder ``without``.

    Raises:
        ValueError: there is none, or the folder does not lie below ``root``.
    """
    inside = _inside(folder, root)
    if inside is None:
        expected, got = f"a folder of images below --root {root}", "one that lies elsewhere"
        raise ValueError(message(str(folder), expected, got, "pass a --root that holds both"))
    apart = None if without is None else without.resolve()
    own = folder.resolve()
    left_out = apart if apart is not None and apart != own and own in apart.parents else None
    found = [
        path
        for path in _files(folder)
        if left_out is None or left_out not in (folder / path).resolve().parents
    ]
    if not found:
        expected = f"images ({', '.join(IMAGE_SUFFIXES)})"
        raise ValueError(message(str(folder), expected, "none", "check the path"))
    return [posixpath.normpath((inside / path).as_posix()) for path in found]


def masks_in(folder: Path, root: Path, images: Sequence[str]) -> list[str]:
    """The mask of every image in a folder, by relative path and name without suffix.

    The mask of ``a/x.jpg`` is ``a/x.png`` below the folder, with the suffix of any image, or else
    ``x.png``.

    Args:
        folder: the folder of masks.
        root: the root of the data set.
        images: images relative to the root.

    Returns:
        Paths relative to the root, absolute where the folder does not lie below it.

    Raises:
        FileNotFoundError: an image has no mask there.
        ValueError: the folder is none, an image has two masks, or two images have the same one.
    """
    if not folder.is_dir():
        got = f"{folder}, which is none"
        raise ValueError(message("--masks", "a folder", got, "check the path"))
    inside = _inside(folder, root)
    start = folder.resolve() if inside is None else inside
    by_stem: dict[str, list[str]] = {}
    for path in _files(folder):
        by_stem.setdefault(path.with_suffix("").as_posix(), []).append(path.as_posix())
    owner: dict[str, str] = {}
    masks = []
    for image in images:
        mask = posixpath.normpath((start / _mask_of(image, by_stem, folder, start)).as_posix())
        if mask in owner:
            got, fix = f"{owner[mask]} and {image}", "lay the folder out like the images"
            raise ValueError(message(mask, "the mask of one image", got, fix))
        owner[mask] = image
        masks.append(mask)
    return masks


def _mask_of(image: str, by_stem: dict[str, list[str]], folder: Path, start: Path) -> str:
    """The mask of an image, relative to the folder of masks."""
    whole, *shorter = places_of(image)
    for stems in ([whole], shorter):
        found = [name for stem in stems for name in by_stem.get(stem, [])]
        found = [name for name in found if (start / name).as_posix() != image]
        if len(found) > 1:
            expected, got = f"one mask of {image}", " and ".join(found)
            raise ValueError(message(str(folder), expected, got, "remove all but one"))
        if found:
            return found[0]
    expected = f"a mask of {image}: " + " or ".join(f"{place}.png" for place in [whole, *shorter])
    fix = "name masks like their images, or pass a list with the columns image and mask"
    raise FileNotFoundError(message(str(folder), expected, "no such file", fix))


def _files(folder: Path) -> list[Path]:
    """Image files below a folder, relative to it, by path; links to folders are followed."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(place).relative_to(folder)
        found += [
            inside / name for name in names if is_image_name(name) and not name.startswith(".")
        ]
    return sorted(found)


def _inside(folder: Path, root: Path) -> Path | None:
    """A folder relative to the root, or None where it lies elsewhere."""
    given, base = Path(os.path.abspath(folder)), Path(os.path.abspath(root))
    if given.is_relative_to(base):  # as it is spelled: the root may hold links to folders
        return given.relative_to(base)
    given, base = folder.resolve(), root.resolve()
    return given.relative_to(base) if given.is_relative_to(base) else None
