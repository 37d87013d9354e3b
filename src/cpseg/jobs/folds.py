"""The job ``cpseg folds``: folds of the labelled images, and the scores of the folds put together.

A student per fold scores the images that it did not see, one trained on all labelled images scores
the others. Together they are one folder of scores that any job reads.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cpseg._internal.checks import message
from cpseg._internal.distributed import barrier, rank, shard
from cpseg._internal.hashing import digest
from cpseg._internal.safe_files import atomic, write_text
from cpseg.files.dataset import Progress, quiet
from cpseg.files.folds import (
    Folds,
    check_same_images,
    cross_fit,
    fold_lists,
    read_folds,
    write_folds,
)
from cpseg.files.id_lists import Pair, read_ids
from cpseg.files.run_folder import RunFolder, open_run_folder, output_path
from cpseg.files.score_files import SUFFIXES, find_scores, read_shape
from cpseg.files.score_folder import ScoreRecord, ScoringModel
from cpseg.files.splits import check_folds

_CLASSES = "classes.txt"


class Joined(NamedTuple):
    """What :func:`join_folds` put together.

    Attributes:
        labelled: number of images scored out of fold.
        others: number of images scored by the model of all labelled images.
        written: number of files that this rank wrote; the others were there.
    """

    labelled: int
    others: int
    written: int


class _Item(NamedTuple):
    """A score file and where it goes."""

    name: Pair
    source: Path
    target: Path


def deal_folds(ids: str | Path, out: str | Path, *, folds: int = 4, seed: int = 0) -> Folds[Pair]:
    """Deal the images of an id list into folds, and write the lists of every fold.

    The folder gets ``fold_0/train.txt`` and ``fold_0/score.txt`` and so on, in the form of the id
    list, and ``folds.json``. See :func:`cpseg.cross_fit`.

    Args:
        ids: id list of labelled images.
        out: the folder to write; one with the same folds is written again.
        folds: how many.
        seed: of the deal.

    Raises:
        ValueError: too few images, or a folder with other folds or other files in it.
        OSError: a file that cannot be read or written.
    """
    pairs = read_ids(ids)
    check_folds("folds", len(pairs), folds)
    dealt = cross_fit(pairs, folds, seed)
    if rank() == 0:
        write_folds(out, dealt)
    return dealt


def join_folds(
    folder: str | Path,
    scores: Sequence[str | Path],
    whole: str | Path,
    out: str | Path,
    *,
    ids: str | Path | None = None,
    others: str | Path | None = None,
    progress: Progress = quiet,
) -> Joined:
    """Put the scores of the folds together: each labelled image from the model that did not see it.

    Score files are hard links where the file system has them, else copies; a stopped run goes on.
    A link shares its content with its source: what overwrites the one in place changes the other.
    ``scores.json`` says which model scored which image and what each was trained on: as recorded
    in the given folders, else as dealt.

    Args:
        folder: the folds, as :func:`deal_folds` wrote them.
        scores: a folder per fold, in their order: the scores of its ``score.txt`` by the model
            trained on its ``train.txt``. Scores of other images in it are left alone.
        whole: scores of all other images, by the model trained on all labelled images.
        out: the folder to write.
        ids: the id list that was dealt, to be sure that it is the same still.
        others: id list of the other images; by default every score file in ``whole`` that is not
            a labelled image's.
        progress: wraps the loop over images.

    Raises:
        ValueError: folders that are not as many as the folds, one given twice, other images than
            were dealt, scores of other classes, a model that is recorded to have seen what it
            scores, or a folder ``out`` that holds another run or is in use.
        FileNotFoundError: scores of an image are missing; the message names fold and folder.
        OSError: a file that cannot be read or written.
    """
    folds, out, whole = read_folds(folder), Path(out), Path(whole)
    parts = [Path(each) for each in scores]
    if ids is not None:
        check_same_images(ids, read_ids(ids), [pair.image for pair in folds.images])
    _check_folders(folds, parts, whole, out)
    models = _models(folds, parts, whole)
    owner: dict[Path, str] = {}
    labelled = _labelled(Path(folder), folds, parts, out, owner)
    rest = _rest(folds, whole, out, others, owner)
    _check_classes([*labelled, *rest], [*parts, whole])
    scored_by = {pair.image: (k,) for pair, k in zip(folds.images, folds.fold, strict=True)}
    record = ScoreRecord(out, tuple(models), scored_by, (folds.count,))
    trained_on = [model.trained_on for model in models]
    facts = [str(each.resolve()) for each in (*parts, whole)], scored_by, trained_on
    written = 0
    with open_run_folder(out, digest(facts)) as run:
        if rank() == 0:
            record.write()  # first: no scores without it
            if (names := _class_names(whole)) is not None:
                write_text(out / _CLASSES, names)
        barrier()
        by_name = {item.name: item for item in (*labelled, *rest)}
        for name in progress(*shard([*by_name]), "join"):
            written += _put(run, by_name[name])
    return Joined(len(labelled), len(rest), written)


def _check_folders(folds: Folds[Pair], scores: Sequence[Path], whole: Path, out: Path) -> None:
    if len(scores) != folds.count:
        expected = f"{folds.count} folders of scores for {folds.count} folds"
        fix = "pass one per fold, in their order"
        raise ValueError(message("folds", expected, str(len(scores)), fix))
    seen: set[Path] = set()
    for each in (*scores, whole):
        if not each.is_dir():
            raise ValueError(
                message("folds", "folders of scores", f"{each}, which is none", "mend the path")
            )
        if each.resolve() in seen:
            fix = "pass one per fold, in their order, and that of the model of all"
            raise ValueError(message("folds", "every folder once", f"{each} twice", fix))
        seen.add(each.resolve())
    if out.resolve() in seen or any(each in out.resolve().parents for each in seen):
        fix = "choose another with -o"
        raise ValueError(message("folds", "a folder outside those of the scores", str(out), fix))


def _models(folds: Folds[Pair], scores: Sequence[Path], whole: Path) -> list[ScoringModel]:
    """What each folder's model was trained on: as its folder records it, or as it was dealt."""
    models = []
    for k, folder in enumerate(scores):
        record = ScoreRecord.of(folder)
        if record is None:
            trained_on = [pair.image for pair in folds.train(k)]
        else:
            seen = [pair.image for pair in folds.held(k) if record.knows(pair.image)]
            if seen:
                expected = f"scores of fold {k} by a model that did not see its images"
                got = f"one trained on {len(seen)} of them: {seen[0]}"
                fix = "pass the folders in the order of the folds, or train on its train.txt"
                raise ValueError(message(str(folder), expected, got, fix))
            trained_on = [*record.trained_on]
        models.append(ScoringModel(f"fold {k} ({folder.name})", tuple(sorted(trained_on))))
    record = ScoreRecord.of(whole)
    known = [pair.image for pair in folds.images] if record is None else [*record.trained_on]
    return [*models, ScoringModel(f"all ({whole.name})", tuple(sorted(known)))]


def _labelled(
    folder: Path, folds: Folds[Pair], scores: Sequence[Path], out: Path, owner: dict[Path, str]
) -> list[_Item]:
    """The score file of every labelled image, from the model that did not see it."""
    items: list[_Item] = []
    for k, place in enumerate(scores):
        for pair in folds.held(k):
            try:
                source = find_scores(place, pair.image)
            except FileNotFoundError as error:
                train, score = fold_lists(folder, k)
                expected, got = f"scores of {pair.image}, which fold {k} holds out", "no such file"
                fix = (
                    f"score {score} with the model trained on {train}, and pass the folders in "
                    "the order of the folds"
                )
                raise FileNotFoundError(message(str(place), expected, got, fix)) from error
            items.append(_item(pair, source, output_path(out, pair.image, source.suffix), owner))
    return items


def _rest(
    folds: Folds[Pair], whole: Path, out: Path, others: str | Path | None, owner: dict[Path, str]
) -> list[_Item]:
    """The score files of all other images."""
    labelled = {pair.image for pair in folds.images}
    if others is not None:
        listed = [pair for pair in read_ids(others, columns=1) if pair.image not in labelled]
        found = [(pair, find_scores(whole, pair.image)) for pair in listed]
        return [
            _item(pair, source, output_path(out, pair.image, source.suffix), owner)
            for pair, source in found
        ]
    theirs = set()
    for image in labelled:
        with contextlib.suppress(FileNotFoundError):
            theirs.add(find_scores(whole, image))
    items, stems = [], set()
    for source in _score_files(whole):
        if source in theirs:
            continue
        relative = source.relative_to(whole)
        stem = relative.with_suffix("")
        if stem in stems:
            got, fix = "files with several suffixes", "remove all but one"
            raise ValueError(message(str(whole / stem), "one score file", got, fix))
        stems.add(stem)
        items.append(_Item(Pair(stem.as_posix(), None), source, out / relative))
    return items


def _item(pair: Pair, source: Path, target: Path, owner: dict[Path, str]) -> _Item:
    """A score file that belongs to one image alone; ``owner`` holds the images seen so far."""
    for path in (source, target.with_suffix("")):
        if path in owner:
            got = f"{owner[path]} and {pair.image}"
            fix = "lay the folder out like the images, with names that differ before the suffix"
            raise ValueError(message(str(source), "scores of one image", got, fix))
        owner[path] = pair.image
    return _Item(pair, source, target)


def _score_files(folder: Path) -> Iterable[Path]:
    """All score files below a folder, without hidden files and folders."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix in SUFFIXES and not hidden and path.is_file():
            yield path


def _check_classes(items: Sequence[_Item], folders: Sequence[Path]) -> None:
    """All scores have the same number of classes, and their names where they are written down."""
    first: tuple[Path, int] | None = None
    for item in items:
        num_classes = read_shape(item.source)[0]
        if first is None:
            first = item.source, num_classes
        elif num_classes != first[1]:
            expected = f"{first[1]} classes as in {first[0]}"
            fix = "train all models on the same classes"
            raise ValueError(message(str(item.source), expected, str(num_classes), fix))
    named = [(folder, names) for folder in folders if (names := _class_names(folder)) is not None]
    for folder, names in named:
        if names != named[0][1]:
            expected, got = f"the class names of {named[0][0]}", "others"
            fix = "train all models on the same classes, in the same order"
            raise ValueError(message(str(folder / _CLASSES), expected, got, fix))


def _class_names(folder: Path) -> str | None:
    path = folder / _CLASSES
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _put(run: RunFolder, item: _Item) -> bool:
    """Link or copy a score file to its place; False where it is there."""
    source, target = item.source.resolve(), item.target
    if target.exists() and (os.path.samefile(source, target) or run.is_up_to_date(target, source)):
        return False
    for suffix in set(SUFFIXES) - {target.suffix}:  # scores in another form, from before
        target.with_name(target.stem + suffix).unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name[:64]}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:  # another file system, or one without hard links
        stamps = run.stamps(source)
        with source.open("rb") as read, atomic(target) as file:
            shutil.copyfileobj(read, file)
        run.record(target, [source], stamps)
    else:
        os.replace(part, target)
    return True
