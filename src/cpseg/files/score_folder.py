"""``scores.json`` in a folder of scores: which models made them, and what those were trained on.

With it the command notices where labelled images are scored by a model that has seen their labels:
such scores are too good, and thresholds on them too strict. ``cpseg folds --join`` writes it, and
so can a training script, with :func:`record_scores`. A folder without one is taken at its word.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cpseg._internal.checks import is_whole, message, short
from cpseg._internal.fields import Valid, list_of, read_fields, table_of, text
from cpseg._internal.safe_files import damaged, write_text
from cpseg.files.id_lists import Pair
from cpseg.files.image_folders import places_of
from cpseg.files.score_files import SUFFIXES

RECORD = "scores.json"
_KIND = "cpseg scores"
_FORMAT = 1
_AGAIN = "write it anew with cpseg.files.record_scores, or join the folds anew"


@dataclass(frozen=True)
class ScoringModel:
    """A model whose scores lie in a folder.

    Attributes:
        name: for people.
        trained_on: ids of the images whose labels it was trained on, sorted.
    """

    name: str
    trained_on: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class ScoreRecord:
    """Which models scored the images of a folder.

    Two spellings of an image count as one where they have the same score file.

    Attributes:
        folder: the folder of scores.
        models: all models.
        scored_by: for some images, which models their scores come from: indices into ``models``;
            more than one where scores of several models were put together.
        default: the models of all other images.
    """

    folder: Path
    models: tuple[ScoringModel, ...]
    scored_by: Mapping[str, tuple[int, ...]]
    default: tuple[int, ...]

    @classmethod
    def of(cls, folder: str | Path) -> ScoreRecord | None:
        """The record in a folder of scores; None where it has none.

        Raises:
            ValueError: a damaged record, or one of a later version.
        """
        path = Path(folder) / RECORD
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):  # one file with all images has none
            return None
        except (ValueError, RecursionError) as error:
            raise damaged(path, "a record of scores in JSON", error) from error
        if not isinstance(content, dict) or content.get("kind") != _KIND:
            return None  # another program's
        if content.get("format") != _FORMAT:
            expected, got = f"a record of format {_FORMAT}", f"format {content.get('format')!r}"
            raise ValueError(message(str(path), expected, got, _AGAIN))
        found = read_fields(str(path), content, _FIELDS, fix=_AGAIN)
        models = tuple(ScoringModel(m["name"], tuple(m["trained_on"])) for m in found["models"])
        scored_by = {image: tuple(numbers) for image, numbers in found["scored_by"].items()}
        default = tuple(found["default"])
        if any(number >= len(models) for each in (default, *scored_by.values()) for number in each):
            expected = f"models 0..{len(models) - 1} for every image"
            raise ValueError(message(str(path), expected, "another number", _AGAIN))
        return cls(Path(folder), models, scored_by, default)

    def write(self) -> None:
        """Write ``scores.json`` into the folder, atomically."""
        content = {
            "format": _FORMAT,
            "kind": _KIND,
            "models": [asdict(model) for model in self.models],
            "scored_by": {image: list(numbers) for image, numbers in self.scored_by.items()},
            "default": list(self.default),
        }
        write_text(self.folder / RECORD, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @property
    def trained_on(self) -> frozenset[str]:
        """All images that any of the models was trained on."""
        return frozenset().union(*(model.trained_on for model in self.models))

    def saw(self, image: str) -> bool:
        """Whether a model that scored the image was trained on it: its scores are too good."""
        name = self._file_of(image)
        scored_by = self._scored_by_file.get(name, self.default)
        return any(name in self._files_seen[number] for number in scored_by)

    def knows(self, image: str) -> bool:
        """Whether any of the models was trained on the image, be it scored by another one."""
        name = self._file_of(image)
        return any(name in seen for seen in self._files_seen)

    @cached_property
    def _files_seen(self) -> tuple[frozenset[str], ...]:
        """The score files of the images that each model was trained on."""
        file_of = {image: self._file_of(image) for image in self.trained_on}
        return tuple(frozenset(map(file_of.__getitem__, m.trained_on)) for m in self.models)

    @cached_property
    def _scored_by_file(self) -> Mapping[str, tuple[int, ...]]:
        return {self._file_of(image): numbers for image, numbers in self.scored_by.items()}

    def _file_of(self, image: str) -> str:
        """The image's score file without suffix, by the rule of ``find_scores``."""
        whole, *shorter = places_of(image)
        if not shorter or self._has(whole):
            return whole
        return next(filter(self._has, shorter), whole)

    def _has(self, stem: str) -> bool:
        return any((self.folder / f"{stem}{suffix}").is_file() for suffix in SUFFIXES)

    def __repr__(self) -> str:
        names = ", ".join(model.name for model in self.models)
        return f"ScoreRecord({self.folder}: {names}; {len(self.trained_on)} images trained on)"


def record_scores(
    folder: str | Path, *, trained_on: Iterable[str | Pair], name: str = "model"
) -> ScoreRecord:
    """Record in a folder of scores which images its model was trained on.

    Call it where a training script writes scores. Jobs then refuse labelled images that the model
    was trained on, and ``cpseg folds --join`` refuses the folders of the folds in another order.

    Args:
        folder: the folder of score files; it is made if it is not there.
        trained_on: the images whose labels it was trained on, as in the id list: names or lines
            of it. Pseudo-labels that were made with the labels of an image carry these on, weakly:
            scores of a student trained on them are a little too good on it. Name it to be strict.
        name: of the model, for messages.

    Returns:
        What was recorded.

    Raises:
        ValueError: the folder was put together by ``cpseg folds --join`` and has its own record.
        TypeError: names that are no strings.
        OSError: the file cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     record = record_scores(folder, trained_on=["a.png", "b.png"], name="fold 0")
        >>> record.saw("a.png"), record.saw("c.png")
        (True, False)
    """
    where = "record_scores"
    if isinstance(trained_on, str) or not isinstance(trained_on, Iterable):
        fix = "pass the names of the images"
        raise TypeError(message(where, "a list of images", short(trained_on), fix))
    names = [image[0] if isinstance(image, tuple) and image else image for image in trained_on]
    for each in (name, *names):
        if not isinstance(each, str):
            fix = "pass names as in the id list"
            raise TypeError(message(where, "names", short(each), fix))
    old = ScoreRecord.of(folder)
    if old is not None and old.scored_by:
        expected, got = "a folder with the scores of one model", f"{folder}, joined from several"
        raise ValueError(message(where, expected, got, "write the scores into another folder"))
    images = tuple(sorted({posixpath.normpath(str(image)) for image in names}))
    record = ScoreRecord(Path(folder), (ScoringModel(name, images),), {}, (0,))
    record.write()
    return record


def carry_record(sources: Sequence[Path], out: Path) -> None:
    """Write into ``out`` the record of scores that were made from those of some folders.

    Nothing is written where none of them has one. An image's models are those of all folders.
    """
    records = [record for folder in sources if (record := ScoreRecord.of(folder)) is not None]
    if not records:
        return
    models: list[ScoringModel] = []
    starts = []
    for record in records:
        starts.append(len(models))
        models += record.models

    def together(image: str | None) -> tuple[int, ...]:
        numbers: list[int] = []
        for start, record in zip(starts, records, strict=True):
            own = record.default if image is None else record.scored_by.get(image, record.default)
            numbers += [start + number for number in own]
        return tuple(numbers)

    images = {image for record in records for image in record.scored_by}
    scored_by = {image: together(image) for image in sorted(images)}
    ScoreRecord(out, tuple(models), scored_by, together(None)).write()


def _index(value: Any) -> bool:
    return is_whole(value, 0)


def _by_image(value: Any) -> bool:
    return isinstance(value, dict) and all(map(list_of(_index), value.values()))


_FIELDS: dict[str, Valid] = {
    "models": list_of(table_of({"name": text, "trained_on": list_of(text)})),
    "scored_by": _by_image,
    "default": list_of(_index),
}
