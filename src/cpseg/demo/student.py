"""The end of the demo: students trained on different labels, compared on held-out scenes.

The labels-only student and the foundation model know different things: the one has seen the faint
scenes, the other many digits. The recommended labels use both: the student's scores, out of fold on
the labelled scenes, are a second source beside the foundation model's, and one map, fitted on the
labelled scenes, makes one label of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cpseg._internal.safe_files import atomic
from cpseg.calibration.calibration import Calibration
from cpseg.demo.network import Network, class_scores, train_network
from cpseg.demo.scenes import F32, NUM_CLASSES, U8
from cpseg.files.dataset import Source
from cpseg.files.folds import cross_fit
from cpseg.files.score_folder import ScoreRecord, ScoringModel
from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.estimate import aligned, number, percent
from cpseg.jobs.recalibrate import RecalibrationOptions
from cpseg.jobs.tally import Row, Tally

FOLDS = 3
CONTEXT = ("neighbourhood",)
TRAININGS = FOLDS + 5  # by folds, labels alone, three kinds of pseudo-labels, true masks of all

ALONE = "the labelled scenes alone"
RAW = "+ raw argmax"
PAPER = "+ calibrated, eq. 4"
BOTH = "+ two sources, one map"
TRUE = "+ true masks of all"

Train = Callable[[Sequence[tuple[U8, U8]]], list[Network]]


@dataclass(frozen=True)
class Result:
    """A student.

    Attributes:
        trained_on: which labels.
        labels: figures of the pseudo-labels that it was trained on, or None where there are none.
        student: figures of the student on held-out scenes.
        predictions: its classes there, ``[N, H, W]``.
    """

    trained_on: str
    labels: Row | None
    student: Row
    predictions: U8


def trainer(*, seed: int, steps: int, progress: Callable[[], object]) -> Train:
    """How students are trained on images and labels: the same network, seed and number of steps.

    Two at a time, each in a thread of its own: their layers are too small for two threads to share.
    """

    def train(scenes: tuple[U8, U8]) -> Network:
        torch.set_num_threads(1)
        return train_network(*scenes, seed=seed, steps=steps, progress=lambda done, of: progress())

    def train_all(given: Sequence[tuple[U8, U8]]) -> list[Network]:
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(min(2, threads)) as pool:
                return list(pool.map(train, given))
        finally:
            torch.set_num_threads(threads)

    return train_all


def score_out_of_fold(
    train: Train, images: U8, labels: U8, names: Sequence[str], folder: Path
) -> Network:
    """Write the scores of labels-only students for all scenes, and return the one of all labels.

    A labelled scene is scored by a student that did not see it, all others by that of all labels.
    ``scores.json`` records who saw what.

    Args:
        train: trains students.
        images: of all scenes, the labelled ones first, ``[N, H, W, 3]``.
        labels: true labels of the labelled scenes, ``[L, H, W]``.
        names: of all images, relative to the data's root.
        folder: for the scores.
    """
    count = len(labels)
    known = list(names[:count])
    folds = cross_fit(known, FOLDS)
    place = {name: index for index, name in enumerate(names)}
    seen = [range(count), *([place[name] for name in folds.train(k)] for k in range(FOLDS))]
    models = train([(images[list(each)], labels[list(each)]) for each in seen])
    everything = [known, *(folds.train(k) for k in range(FOLDS))]
    record = ScoreRecord(
        folder,
        tuple(
            ScoringModel(f"student of {'all' if not k else f'fold {k - 1}'}", tuple(sorted(seen)))
            for k, seen in enumerate(everything)
        ),
        {name: (fold + 1,) for name, fold in zip(known, folds.fold, strict=True)},
        (0,),
    )
    record.write()
    for k, model in enumerate(models):
        scored = list(names[count:]) if not k else folds.held(k - 1)
        write_scores(folder, scored, class_scores(model, images[[place[n] for n in scored]]))
    return models[0]


def write_scores(folder: Path, names: Sequence[str], probs: F32) -> None:
    """Write scores ``[N, K, H, W]`` as the files that a user would have."""
    for name, values in zip(names, probs, strict=True):
        with atomic((folder / name).with_suffix(".npy")) as file:
            np.save(file, values.astype(np.float16))


def one_map(source: Source, labelled: Path, *, seed: int) -> Calibration:
    """All sources as one Dirichlet map, fitted on the labelled scenes; labels are its argmax."""
    return calibrate(
        source,
        labelled,
        alpha=None,
        background=None,
        recalibration=RecalibrationOptions(context=CONTEXT),
        seed=seed,
    )


def figures(rule: str, predictions: U8, truth: U8) -> Row:
    """Of labels ``[N, H, W]`` against true ones."""
    tally = Tally(rule, NUM_CLASSES)
    tally.update(torch.from_numpy(predictions), torch.from_numpy(truth))
    return tally.row()


def student_table(results: Sequence[Result]) -> str:
    """The students as a Markdown table."""
    lines = [
        ("student trained on", "wrong labels", "student's mIoU", "student's wrong pixels"),
        ("---", "---:", "---:", "---:"),
    ]
    for each in results:
        wrong = "-" if each.labels is None else percent(each.labels.wrong)
        row = each.student
        lines.append((each.trained_on, wrong, number(row.miou_all), percent(row.wrong)))
    return aligned(lines)


def verdict(results: Sequence[Result]) -> str:
    """Which labels to train on, from the students that need no further true masks."""
    students = {each.trained_on: each.student for each in results}
    choice = max((name for name in students if name != TRUE), key=lambda n: students[n].miou_all)
    alone, best, most = students[ALONE], students[choice], students[TRUE]
    if choice == ALONE:
        return "Train on the labelled scenes alone: no pseudo-labels made the student better here."
    text = (
        f"Train on the labelled scenes {choice}: {number(best.miou_all)} mIoU and "
        f"{percent(best.wrong)} wrong pixels,\nwhere the labelled scenes alone give "
        f"{number(alone.miou_all)} and {percent(alone.wrong)}"
    )
    if most.miou_all > alone.miou_all:
        way = (best.miou_all - alone.miou_all) / (most.miou_all - alone.miou_all)
        text += f": {100 * way:.0f} % of the mIoU that true masks\nof all scenes would gain"
    return text + "."
