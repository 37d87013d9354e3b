"""Lists and folders of a data set: which files are there, and what reading them will take."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cpseg.calibration.provenance import SourceImages
from cpseg.files.dataset import Source, check_distinct
from cpseg.files.id_lists import Pair
from cpseg.files.model_scores import ScoreFolder
from cpseg.files.score_arrays import entry_of
from cpseg.files.score_files import SUFFIXES, find_scores
from cpseg.jobs.calibrate import images_needed
from cpseg.jobs.check_findings import Finding, counted, error, listed, ok, warning
from cpseg.jobs.seen_images import check_unseen, cross_fitted

_ALPHA = 0.05  # the default of calibrate
_MANY_BYTES = 20 * 10**9  # of scores: evidence is smaller
_COPIES = 3  # of an image's float32 scores that a job holds at a time, roughly


@dataclass
class Located:
    """The score files of listed images.

    Attributes:
        files: for each model, the file of every image that has one.
        entries: for each model with one file for all images, the key of every image in it.
        missing: for each model, images without.
        problems: what else is wrong, once for each model at most.
    """

    files: list[dict[str, Path]] = field(default_factory=list)
    entries: list[dict[str, str]] = field(default_factory=list)
    missing: list[list[str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, models: Sequence[ScoreFolder], pairs: Sequence[Pair]) -> Located:
        """Look for the scores of all images by all models."""
        found = cls()
        for model in models:
            files: dict[str, Path] = {}
            entries: dict[str, str] = {}
            missing: list[str] = []
            problems: list[str] = []
            for pair in pairs:
                try:
                    if model.is_one_file:
                        entries[pair.image] = entry_of(model.probs, pair.image)
                        files[pair.image] = model.probs
                    else:
                        files[pair.image] = find_scores(model.probs, pair.image)
                except FileNotFoundError:
                    missing.append(pair.image)
                except ValueError as problem:
                    problems.append(str(problem))
            found.files.append(files)
            found.missing.append(missing)
            found.entries.append(entries)
            found.problems += problems[:1] + _shared(entries or files)[:1]
        return found

    def paths(self) -> set[Path]:
        """All files."""
        return {path for files in self.files for path in files.values()}


def _shared(files: Mapping[str, Path | str]) -> list[str]:
    """Where two images have one file, or one entry."""
    owner: dict[Path | str, str] = {}
    found = []
    for image, path in files.items():
        if path in owner:
            text = f"{Path(path).name} would be the scores of both {owner[path]} and {image}; "
            found.append(text + "lay the folder out like the images, with their subfolders")
        owner[path] = image
    return found


def list_findings(source: Source, pairs: Sequence[Pair]) -> list[Finding]:
    """What to say of the labelled list and the files that it names, but for scores."""
    found = []
    needed = images_needed(_ALPHA)
    text = f"{counted(len(pairs), 'labelled image')} listed"
    if len(pairs) < needed:
        text += f": thresholds of single pixels at alpha {_ALPHA:g} need {needed}; "
        found.append(warning("labelled", text + "pass --variant image, or label more"))
    else:
        found.append(ok("labelled", text))
    without = [pair.image for pair in pairs if pair.mask is None]
    if without and source.masks is None:
        text = (
            f"{len(without)} of {len(pairs)} lines of the list name no mask: {listed(without, 2)}"
        )
        found.append(error("masks-listed", text))
    masks = [pair.mask for pair in pairs if pair.mask is not None]
    found += _absent(source.root, masks, "mask", error)
    level = error if source.colour else warning
    found += _absent(source.root, [pair.image for pair in pairs], "image", level)
    if len(set(masks)) < len(masks):
        text = f"{len(masks) - len(set(masks))} masks are listed for more than one image"
        found.append(warning("masks-twice", text))
    try:
        check_distinct(source.root, pairs)
    except ValueError as problem:
        found.append(error("twice", str(problem)))
    return found


def _absent(root: Path, names: Sequence[str], noun: str, level: object) -> list[Finding]:
    absent = [name for name in names if not (root / name).is_file()]
    if not absent:
        return []
    if len(absent) == len(names):
        text = f"none of the {counted(len(names), noun)} listed is under {root}: {absent[0]}; "
        text += "check --root"
    else:
        text = f"{len(absent)} of {len(names)} {noun}s listed are not there: {listed(absent, 2)}"
    return [level(f"{noun}s-missing", text)]  # type: ignore[operator]


def score_findings(source: Source, located: Located, pairs: Sequence[Pair]) -> list[Finding]:
    """What to say of the score files of the labelled images."""
    found = [error("scores-files", problem) for problem in located.problems]
    for folder, missing in zip(source.folders, located.missing, strict=True):
        if not missing:
            continue
        text = f"{len(missing)} of {counted(len(pairs), 'labelled image')} have no scores in "
        text += f"{folder}: {listed(missing, 2)}"
        found.append(error("scores-missing", text))
    try:
        check_unseen("check", source, pairs)
        found += [ok("seen", _cross_fitted(each)) for each in cross_fitted(source, pairs)]
    except ValueError as problem:
        found.append(error("seen", str(problem).removeprefix("check: ")))
    return found


def _cross_fitted(each: SourceImages) -> str:
    text = f"{each.folder}: scores of {each.out_of_fold} labelled images were made out of fold: "
    return text + "nothing is promised in finite samples"


def unlabelled_findings(
    source: Source, pairs: Sequence[Pair], unlabelled: Sequence[Pair], located: Located
) -> list[Finding]:
    """What to say of the list of images to label."""
    found = [error("unlabelled-scores", problem) for problem in located.problems]
    found.append(ok("unlabelled", f"{counted(len(unlabelled), 'unlabelled image')} listed"))
    for folder, missing in zip(source.folders, located.missing, strict=True):
        if missing:
            text = f"{len(missing)} of {counted(len(unlabelled), 'unlabelled image')} have no "
            text += f"scores in {folder}: {listed(missing, 2)}"
            found.append(error("unlabelled-scores", text))
    level = error if source.colour else warning
    for each in _absent(source.root, [pair.image for pair in unlabelled], "image", level):
        found.append(Finding(each.level, each.name, f"unlabelled: {each.text}"))
    names = {pair.image for pair in pairs}
    both = [pair.image for pair in unlabelled if pair.image in names]
    if both:
        text = f"{len(both)} labelled images are in the unlabelled list too: {listed(both, 2)}; "
        found.append(warning("overlap", text + "take them out, or they get labels twice"))
    return found


def stray_findings(source: Source, used: set[Path], pairs: Iterable[Pair]) -> list[Finding]:
    """Score files of no listed image: of images in another list, or without an image at all."""
    found = []
    endings = {os.path.splitext(pair.image)[1] for pair in pairs}
    parents = {os.path.dirname(pair.image) for pair in pairs}
    for folder in source.folders:
        others, orphans = 0, []
        for path in _files_under(folder):
            if path in used:
                continue
            stem = str(path.relative_to(folder).with_suffix(""))
            places = {stem, *(os.path.join(parent, os.path.basename(stem)) for parent in parents)}
            if any((source.root / f"{p}{end}").is_file() for p in places for end in endings):
                others += 1
            else:
                orphans.append(path.name)
        if orphans:
            text = f"{folder}: {counted(len(orphans), 'score file')} without an image of that name "
            found.append(warning("orphans", f"{text}under --root: {listed(sorted(orphans), 2)}"))
        if others:
            text = f"{folder.name}: {counted(others, 'further score file')} of images in neither "
            found.append(ok("others", f"{text}list"))
    return found


def _files_under(folder: Path) -> list[Path]:
    return [
        Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in names
        if name.endswith(SUFFIXES)
    ]


def cost_findings(
    paths: set[Path], images: int, *, rate: float, shape: tuple[int, int, int]
) -> list[Finding]:
    """What `label` will take.

    Args:
        paths: the score files.
        images: number of images that get labels.
        rate: bytes read per second, NaN where unknown.
        shape: classes, height and width of the largest scores seen.
    """
    total = sum(path.stat().st_size for path in paths)
    number, height, width = shape
    text = f"{counted(len(paths), 'score file')}, {_bytes(total)}"
    if not math.isnan(rate):
        text += f": about {_duration(total / rate)} to read once"
    found = [ok("cost", text)]
    text = f"label needs up to {_bytes(images * height * width)} of disk for "
    text += f"{counted(images, 'mask')} and some {_bytes(_COPIES * 4 * number * height * width)} "
    found.append(ok("memory", text + "of memory besides torch's own"))
    if total > _MANY_BYTES:
        text = "score files are large: cpseg compact turns them into evidence of 9 bytes a pixel"
        found.append(ok("compact", text))
    return found


def _bytes(count: float) -> str:
    units = ["bytes", "KB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    unit = units[0]
    return f"{count:.0f} {unit}" if count >= 10 or unit == "bytes" else f"{count:.1f} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "a second"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
