"""Were the models behind the scores trained on the labelled images of a job?

Where a folder of scores records it (``scores.json``), three cases. An image scored by a model that
was trained on it is refused: its scores are too good. Images scored out of fold are taken, and it
is said that nothing is promised. Images that no model was trained on need no word.
"""

from __future__ import annotations

from collections.abc import Sequence

from cpseg._internal.checks import message
from cpseg.calibration.provenance import SourceImages
from cpseg.files.dataset import Source
from cpseg.files.id_lists import Pair
from cpseg.files.score_folder import ScoreRecord


def check_unseen(where: str, source: Source, pairs: Sequence[Pair]) -> None:
    """No image is scored by a model that was trained on it, as far as the folders record it.

    Raises:
        ValueError: some are, in the folder that is named.
    """
    for record in _records(source):
        seen = [pair.image for pair in pairs if record.saw(pair.image)]
        if seen:
            expected = "images that the models which scored them were not trained on"
            got = f"{len(seen)} of {len(pairs)} in {record.folder} that they were: {seen[0]}"
            fix = "score them out of fold (cpseg folds), or use other labelled images"
            raise ValueError(message(where, expected, f"{got}{_and_more(seen)}", fix))


def check_apart(where: str, source: Source, pairs: Sequence[Pair]) -> None:
    """No model behind the scores was trained on an image, not even one that scored others.

    Raises:
        ValueError: one was, in the folder that is named.
    """
    check_unseen(where, source, pairs)
    for record in _records(source):
        known = [pair.image for pair in pairs if record.knows(pair.image)]
        if known:
            expected = "certification images that no model behind the scores was trained on"
            got = f"{len(known)} of {len(pairs)} in {record.folder} out of fold: {known[0]}"
            fix = (
                "cross-fitted scores prove nothing in finite samples: certify on other labelled "
                "images, or prove the finished labels with cpseg audit"
            )
            raise ValueError(message(where, expected, f"{got}{_and_more(known)}", fix))


def cross_fitted(source: Source, pairs: Sequence[Pair]) -> tuple[SourceImages, ...]:
    """The folders whose models were trained on some of the images, each scored by another one."""
    found = []
    for record in _records(source):
        known = sum(record.knows(pair.image) for pair in pairs)
        if known:
            found.append(SourceImages(record.folder.name, known, len(record.trained_on)))
    return tuple(found)


def approximate(sources: Sequence[SourceImages], what: str = "coverage") -> list[str]:
    """What to say of cross-fitted folders, a line for each, without a full stop."""
    return [
        f"{each.folder}: the score function was cross-fitted on {each.out_of_fold} of these "
        f"images: {what} is approximate and nothing is promised in finite samples; cpseg audit "
        "proves the finished labels anyway"
        for each in sources
    ]


def _records(source: Source) -> list[ScoreRecord]:
    records = map(ScoreRecord.of, source.folders)
    return [record for record in records if record is not None]


def _and_more(images: Sequence[str]) -> str:
    return " and others" if len(images) > 1 else ""
