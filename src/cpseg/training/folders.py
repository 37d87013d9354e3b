"""Images, scores and true labels of a data set on disk, read on access."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cpseg._internal.checks import check_count, message
from cpseg.calibration.calibration import Calibration
from cpseg.core.selection import Evidence
from cpseg.files.dataset import Files, Source
from cpseg.files.id_lists import Pair
from cpseg.files.masks import VOID, image_size, read_image
from cpseg.files.model_scores import ScoreFolder
from cpseg.jobs.sources import as_calibrated, scores_of_image

_WHERE = "PseudoLabelled.from_folders"
_OPTION = re.compile(r"--(root|ids|probs|labelled|masks|features)\b")


@contextlib.contextmanager
def _by_keyword() -> Iterator[None]:
    """Errors name the keywords of ``from_folders`` where they name options of the command."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        said = _OPTION.sub(r"\1=", str(error))
        if said == str(error) or type(error) not in (ValueError, FileNotFoundError):
            raise
        raise type(error)(said) from error


class Images(Dataset[Tensor]):
    """Images as float32 ``[3, H, W]`` in [0, 1]."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return read_image(self.paths[index]).to(torch.float32) / 255


@dataclass(frozen=True)
class Scores:
    """The scores of every image; an object, so that workers of a loader can be sent it.

    Attributes:
        source: the data set and the scores, read as for the calibration.
        files: the files of every image.
        images: the images themselves.
    """

    source: Source
    files: Sequence[Files]
    images: Sequence[Path]

    def __call__(self, index: int) -> Tensor | Evidence:
        """The scores of one image.

        Raises:
            ValueError: a bad file, or scores of another size than the image.
        """
        return scores_of_image(self.source, self.files[index], self.images[index])


class Labelled(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images with their true labels, void as ``ignore_index``."""

    def __init__(
        self, source: Source, pairs: Sequence[Pair], num_classes: int, ignore_index: int
    ) -> None:
        self.source, self.pairs = source, list(pairs)
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.images = Images([source.root / pair.image for pair in pairs])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        size = image_size(self.images.paths[index])
        labels = self.source.labels(self.pairs[index], self.num_classes, size).to(torch.int64)
        return self.images[index], labels.masked_fill(labels == VOID, self.ignore_index)


@dataclass(frozen=True)
class Folders:
    """What :class:`PseudoLabelled` takes of data on disk."""

    images: Images
    scores: Scores
    labelled: Labelled


def open_folders(
    root: str | Path,
    ids: str | Path | None,
    probs: Sequence[str | Path],
    calibration: Calibration,
    *,
    labelled: str | Path | None,
    repeat_labelled: int,
    masks: str | Path | None,
    features: str | Path | None,
) -> Folders:
    """Find every file that rows will be read from; :meth:`PseudoLabelled.from_folders`.

    Raises:
        ValueError: bad lists or settings.
        FileNotFoundError: a folder, an image, a score file or a mask is missing.
    """
    fix = "1 takes every labelled image once"
    check_count(_WHERE, repeat_labelled, name="repeat_labelled", fix=fix, most=10_000)
    if labelled is None and (repeat_labelled > 1 or masks is not None):
        got = "repeat_labelled or masks without it"
        raise ValueError(message(_WHERE, "a list of labelled images", got, "pass labelled=LIST"))
    if ids is None and labelled is None:
        raise ValueError(message(_WHERE, "an id list", "neither ids nor labelled", "pass one"))
    if not probs:
        raise ValueError(message(_WHERE, "folders of scores", "none", "pass probs"))
    for name, folder in (("root", root), *(("probs", each) for each in probs)):
        if not Path(folder).exists():
            expected, got = f"a folder as {name}", f"{folder}, which is none"
            raise FileNotFoundError(message(_WHERE, expected, got, "check the path"))
    first, *others = map(Path, probs)
    source = Source(
        Path(root),
        first,
        others=tuple(map(ScoreFolder, others)),
        features=None if features is None else Path(features),
        masks=None if masks is None else Path(masks),
    )
    with _by_keyword():
        return _opened(source, ids, calibration, labelled, repeat_labelled)


def _opened(
    source: Source,
    ids: str | Path | None,
    calibration: Calibration,
    labelled: str | Path | None,
    repeat_labelled: int,
) -> Folders:
    source = as_calibrated(_WHERE, source, calibration)
    known = [] if labelled is None else source.read_ids(labelled)
    source.check_masks(known, str(labelled))
    true = {pair.image for pair in known}
    listed = [] if ids is None else source.read_ids(ids, columns=1)
    pairs = [pair for pair in listed if pair.image not in true]
    located = source.locate(pairs)
    for image in (pair.image for pair in (*known, *pairs)):
        if not (source.root / image).is_file():
            expected, got = f"an image {image} in {source.root}", "no such file"
            raise FileNotFoundError(message(_WHERE, expected, got, "check root and lists"))
    paths = [source.root / pair.image for pair in pairs]
    classes = calibration.num_classes or VOID
    return Folders(
        Images(paths),
        Scores(source, [located[pair] for pair in pairs], paths),
        Labelled(source, known * repeat_labelled, classes, calibration.ignore_index),
    )
