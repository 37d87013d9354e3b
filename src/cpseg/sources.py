"""A data set on disk with a model's scores, and what a run over it shares among its ranks."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpseg import ranks
from cpseg._version import __version__
from cpseg.checks import message
from cpseg.class_map import ClassMap, parse_class_map
from cpseg.selection import Evidence
from cpseg.store import Pair, find_scores, read_mask, read_scores, write_text
from cpseg.thresholds import Calibration

IGNORE = 255  # what training code expects in files
Progress = Callable[[Iterable[Pair], int, str], Iterable[Pair]]


def quiet(items: Iterable[Pair], count: int, title: str) -> Iterable[Pair]:
    """No progress bar."""
    return items


@dataclass(frozen=True)
class Source:
    """A data set on disk with a model's scores.

    Attributes:
        root: the folder that id lists are relative to.
        probs: the folder of score files.
        class_map: from the model's classes to the data set's, or None if they are the same.
        mask_map: from the values in masks to the data set's classes, if they are not the same.
        void: the value of void pixels in masks; the job works with 255.
        device: where tensors are worked on.
    """

    root: Path
    probs: Path
    class_map: ClassMap | None = None
    mask_map: ClassMap | None = None
    void: int = IGNORE
    device: str = "cpu"

    def facts(self) -> dict[str, Any]:
        """What a calibration records of the data set."""
        found: dict[str, Any] = {}
        if self.class_map is not None:
            found["class_map"] = self.class_map.to_json()
        if self.mask_map is not None or self.void != IGNORE:
            masks = None if self.mask_map is None else self.mask_map.to_json()
            found["masks"] = {"void": self.void, "map": masks}
        return found

    def locate(self, pairs: Sequence[Pair]) -> dict[Pair, Path]:
        """The score file of every image, before any work is done.

        Raises:
            FileNotFoundError: an image has none.
            ValueError: two images would share one.
        """
        paths: dict[Pair, Path] = {}
        owner: dict[Path, str] = {}
        for pair in pairs:
            path = find_scores(self.probs, pair.image)
            if path in owner:
                got = f"{owner[path]} and {pair.image}"
                fix = "lay the folder out like the images, with their subfolders"
                raise ValueError(message(str(path), "scores of one image", got, fix))
            owner[path] = pair.image
            paths[pair] = path
        return paths

    def scores(self, path: Path) -> Tensor | Evidence:
        """The scores in a file, in the classes of the data set."""
        found = read_scores(path, device=self.device)
        if isinstance(found, Evidence):
            if found.class_map != fingerprint(self.class_map):
                expected = f"evidence made with {'this' if self.class_map else 'no'} class map"
                got = f"evidence made with {'another' if found.class_map else 'no'} class map"
                fix = "run cpseg compact with the calibration's"
                raise ValueError(message(str(path), expected, got, fix))
            return found
        if self.class_map is None:
            return found
        with naming(path):
            return self.class_map(found)

    def probabilities(self, path: Path) -> Tensor:
        """Class scores ``[K, H, W]``: evidence will not do."""
        found = self.scores(path)
        if isinstance(found, Evidence):
            fix = "pass the folder of class scores"
            raise ValueError(message(str(path), "class scores [K, H, W]", "evidence", fix))
        return found

    def labels(self, pair: Pair, num_classes: int, size: tuple[int, int]) -> Tensor:
        """The true labels of an image, void as 255."""
        assert pair.mask is not None
        path = self.root / pair.mask
        values = num_classes if self.mask_map is None else len(self.mask_map.target)
        if values > 256:
            fix = "map the values of 8-bit masks"
            raise ValueError(message("mask map", "at most 256 values", str(values), fix))
        labels = read_mask(path, num_classes=values, ignore_index=self.void, size=size)
        classes = torch.arange(256, dtype=torch.uint8)
        classes[self.void] = IGNORE
        if self.mask_map is not None:
            if self.mask_map.num_classes != num_classes:
                expected, got = f"{num_classes} classes as in the scores", self.mask_map.num_classes
                raise ValueError(message("mask map", expected, str(got), "map to the same classes"))
            for value, target in enumerate(self.mask_map.target):
                classes[value] = IGNORE if target is None else target
        return classes[labels.to(torch.int64)].to(self.device)


def labelled(
    source: Source, pair: Pair, path: Path, num_classes: int, num_source: int | None = None
) -> tuple[Tensor, Tensor]:
    """Class scores and true labels of an image, as many classes as the others have.

    ``num_source`` is the number of the model's classes, where it is another.
    """
    probs = source.probabilities(path)
    num_source = num_classes if num_source is None else num_source
    if probs.shape[0] != num_source:
        expected, got = f"{num_source} classes like the first image", f"{probs.shape[0]}"
        raise ValueError(message(str(path), expected, got, "use the scores of one model"))
    return probs, source.labels(pair, num_classes, (probs.shape[1], probs.shape[2]))


def split(
    where: str,
    pairs: list[Pair],
    share: float,
    generator: torch.Generator,
    *,
    option: str = "--group-share",
) -> tuple[list[Pair], list[Pair]]:
    """A drawn share of the images and the rest; all of them twice for a share of 0."""
    if share == 0:
        return pairs, pairs
    count = round(share * len(pairs))
    if not 0 < count < len(pairs):
        expected = f"a {option} that splits {len(pairs)} images in two"
        raise ValueError(message(where, expected, f"{share:g}", "choose another share"))
    order = torch.randperm(len(pairs), generator=generator).tolist()
    return [pairs[i] for i in order[:count]], [pairs[i] for i in order[count:]]


def with_map_of(source: Source, calibration: Calibration) -> Source:
    """The source with the class map that the calibration was made with."""
    recorded = calibration.extra.get("class_map")
    if recorded is None:
        return source
    class_map = parse_class_map(recorded)
    if source.class_map is not None and source.class_map != class_map:
        got, fix = "another one", "leave --class-map out: the calibration carries it"
        raise ValueError(message("class map", "the one that calibrated", got, fix))
    return replace(source, class_map=class_map)


def rank() -> int:
    """This process among the ranks; 0 alone."""
    return dist.get_rank() if ranks.active() else 0


def barrier() -> None:
    """Wait for the other ranks."""
    if ranks.active():
        dist.barrier()


def agreed(pairs: Sequence[Pair]) -> Sequence[Pair]:
    """The first rank's list, on every rank."""
    found = [pairs]
    if ranks.active():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def share(pairs: Sequence[Pair]) -> tuple[Sequence[Pair], int]:
    """This rank's part of the images, and how many those are."""
    part = pairs[rank() :: dist.get_world_size()] if ranks.active() else pairs
    return part, len(part)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say which file an error is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def digest(content: object) -> str:
    """A fingerprint of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint(class_map: ClassMap | None) -> str | None:
    """Of a class map, by which evidence knows it."""
    return None if class_map is None else digest(class_map.to_json())


def fresh(made: Path, *inputs: Path) -> bool:
    """Whether a file is there and no older than what it was made of."""
    if not made.exists():
        return False
    when = made.stat().st_mtime_ns
    return all(path.stat().st_mtime_ns <= when for path in inputs)


def place(out: Path, image: str, suffix: str) -> Path:
    """Where in a run's folder a file about an image lies.

    Raises:
        ValueError: the image does not lie below the root.
    """
    relative = Path(image).with_suffix(suffix)
    if relative.is_absolute() or ".." in relative.parts:
        fix = "pass the folder that holds all images as --root"
        raise ValueError(message("id list", "image paths below the root", image, fix))
    return out / relative


def begin(out: Path, fingerprint: str) -> None:
    """Open a folder for a run, or go on with the same one; remove what a killed one left open.

    Raises:
        ValueError: the folder holds another run's files, or somebody's.
    """
    if rank() == 0:
        path = out / "run.json"
        if not path.exists() and out.is_dir():
            strangers = [entry.name for entry in out.iterdir() if entry.suffix != ".part"]
            if strangers:
                expected, got = "a new or empty folder", f"one with '{min(strangers)}' in it"
                raise ValueError(message(str(out), expected, got, "choose another with -o"))
        if path.exists():
            try:
                recorded = json.loads(path.read_text(encoding="utf-8")).get("fingerprint")
            except (ValueError, AttributeError):
                recorded = None
            if recorded != fingerprint:
                expected, got = "a new folder, or one of the same run", "another run's"
                raise ValueError(message(str(out), expected, got, "choose another with -o"))
        else:
            written = json.dumps({"cpseg": __version__, "fingerprint": fingerprint}, indent=2)
            write_text(path, written + "\n")
        for part in out.rglob(".*.part"):
            part.unlink()
    barrier()
