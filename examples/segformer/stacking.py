"""Pseudo-labels of ``--method stacked``: one map over the foundation model and a student.

The foundation model and the few labels know different things. A student of the labels scores the
images too, and one map, fitted on the labelled images, makes labels of both models' scores. For the
fit a labelled image needs scores by a student that was not trained on it: there is one per fold. In
a second round students of the first round's labels take the place of those of the labels alone.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from arguments import rule_of, settings_of
from cpseg import mean_iou
from cpseg.files import Folds, Pair, Source, output_path, read_ids, record_scores
from cpseg.jobs import deal_folds, join_folds
from crops import Lists
from order import Plan, Stage, plan
from pseudo import quality, read_pseudo, write_labels
from ranks import rank, wait
from resuming import once
from scoring import evaluate, write_scores

Say = Callable[[str], None]
Figures = dict[str, Any]


class Trained(Protocol):
    """A student, and the type in which it computes, if it is not its weights'."""

    student: nn.Module
    amp: torch.dtype | None


Train = Callable[[argparse.Namespace, Plan, Source, Say], Trained]


@dataclass(frozen=True)
class Labels:
    """The unlabelled images with the pseudo-labels of a round.

    Attributes:
        whole: made with all true labels; none before the first round.
        without: by fold, made without the true labels of its images.
    """

    whole: list[Pair] = field(default_factory=list)
    without: dict[int, list[Pair]] = field(default_factory=dict)


def stack(
    args: argparse.Namespace, source: Source, lists: Lists, train: Train, say: Say
) -> tuple[list[Pair], Figures]:
    """Make pseudo-labels in ``args.rounds`` rounds; steps that an earlier run finished are skipped.

    Ranks divide the images, and train together.

    Args:
        args: the arguments of the run.
        source: the data set with the scores of the foundation model.
        lists: its id lists.
        train: trains a student in the folder ``args.out`` of its arguments, by a plan, or goes on.
        say: takes a line on the progress.

    Returns:
        The unlabelled images with their pseudo-labels, and the figures of every round.

    Raises:
        ValueError: images in both lists, too few of them, or bad files.
        FileNotFoundError: scores or features of an image are missing.
    """
    source = replace(source, colour=True)
    if args.features is not None:
        source = replace(source, features=args.features, unlabelled=lists.unlabelled)
    _check(args, source, lists)
    folds = deal_folds(lists.labelled, args.out / "folds", folds=args.folds, seed=args.seed)
    wait()
    stacking = Stacking(args, source, lists, folds, train, say)
    labels, rounds = Labels(), []
    for number in range(1, args.rounds + 1):
        labels, figures = stacking.round(number, labels)
        rounds.append(figures)
    return labels.whole, {"pseudo_labels": rounds[-1]["pseudo_labels"], "rounds": rounds}


@dataclass(frozen=True)
class Stacking:
    """What the steps of all rounds share: the arguments of :func:`stack`, and the folds."""

    args: argparse.Namespace
    source: Source
    lists: Lists
    folds: Folds[Pair]
    train: Train
    say: Say

    def round(self, number: int, given: Labels) -> tuple[Labels, Figures]:
        """Train students with the given labels, and make new labels with their scores."""
        place = self.args.out / f"round-{number}"
        folds = [place / "students" / f"fold_{k}" for k in range(self.folds.count)]
        whole = place / "students" / "all"
        for k, folder in enumerate(folds):
            self._once(folder / "finished.json", self._fold_student, folder, k, given)
        student = self._once(whole / "finished.json", self._whole_student, whole, given)
        self.say(
            f"round {number}: mIoU {student['miou']:.3f} of the student of all labelled images"
        )
        found = self._once(place / "finished.json", self._label, place, folds, whole)
        if found:
            share = f"{found['kept']:.1%} of the pixels, {found['wrong']:.1%} of them wrong"
            self.say(f"round {number}: labels for {share}")
        without = {}
        if number < self.args.rounds:
            for k, folder in enumerate(folds):
                record = folder / "labels.json"
                self._once(record, self._label_without, place, folder, k, given)
                without[k] = self._pseudo(folder / "labels")
        labels = Labels(self._pseudo(place / "labels"), without)
        return labels, {"student": student, "pseudo_labels": found}

    def _once(self, record: Path, work: Callable[..., Figures], *args: Any) -> Figures:
        """The figures of a step, which is done unless its record is there."""
        settings = settings_of(self.args) | {"method": "stacked", "rounds": None}
        return once(record, settings, partial(work, *args))

    def _fold_student(self, folder: Path, k: int, given: Labels) -> Figures:
        """Train on the other folds, and score the images of this one."""
        trained = self._trained(folder, k, given)
        self._score(trained, folder, self.folds.held(k), folder / "scores", k)
        return {}

    def _whole_student(self, folder: Path, given: Labels) -> Figures:
        """Train on all labelled images, score the unlabelled ones, and evaluate."""
        trained = self._trained(folder, None, given)
        self._score(trained, folder, self._unlabelled, folder / "scores", None)
        args = self.args
        confusion = evaluate(
            trained.student,
            self.source,
            read_ids(self.lists.val),
            args.classes,
            window=args.window,
            device=args.device,
            amp=trained.amp,
        ).cpu()
        iou = mean_iou(confusion, per_class=True)
        return {"miou": float(mean_iou(confusion)), "iou": iou.tolist()}

    def _label(self, place: Path, folds: list[Path], whole: Path) -> Figures:
        """Join the scores, and choose labels by one map over them and the foundation model's."""
        join_folds(
            self.args.out / "folds",
            [folder / "scores" for folder in folds],
            whole / "scores",
            place / "scores",
            ids=self.lists.labelled,
            others=self.lists.unlabelled,
        )
        wait()
        args, source = self.args, self._stacked(place / "scores")
        write_labels(source, self.lists, rule_of(args), args.classes, place / "labels")
        return quality(source, self._pseudo(place / "labels"), self._unlabelled, args.classes)

    def _label_without(self, place: Path, folder: Path, k: int, given: Labels) -> Figures:
        """Choose labels without the true labels of a fold: by its student and the others' map.

        The student scores all unlabelled images for this, as many files as there are in the joined
        folder, which are removed once the labels are written.
        """
        trained = self._trained(folder, k, given, finished=True)
        # A calibration knows its sources by their names: this folder's is that of the joined one.
        scores = folder / "unlabelled" / "scores"
        self._score(trained, folder, self._unlabelled, scores, k)
        write_labels(
            self._stacked(place / "scores"),
            self.lists._replace(labelled=self.args.out / "folds" / f"fold_{k}" / "train.txt"),
            rule_of(self.args),
            self.args.classes,
            folder / "labels",
            scored=self._stacked(scores),
        )
        if rank() == 0:
            shutil.rmtree(scores.parent)
        return {}

    def _trained(
        self, folder: Path, k: int | None, given: Labels, *, finished: bool = False
    ) -> Trained:
        """The student of a fold, or of all labelled images, for its share of the run's steps."""
        pseudo = given.whole if k is None else given.without.get(k, [])
        method = "stacked" if pseudo else "label-only"
        own = {"out": folder, "method": method, "rounds": None, "stage1": None}
        args = argparse.Namespace(**vars(self.args) | own)
        made = plan(args, self.lists, pseudo)
        steps, labelled = made.steps, self._labelled(k)
        if k is not None:
            steps = max(1, steps * (self.folds.count - 1) // self.folds.count)
        stages = (Stage(steps, halves=False), Stage(0, halves=True))
        made = made._replace(
            labelled=labelled, stages=stages, switch=0
        )  # no end of Stage I to save
        name = f"{folder.parents[1].name}, {folder.name}"
        say: Say = (lambda line: None) if finished else (lambda line: self.say(f"{name}: {line}"))
        return self.train(args, made, self.source, say)

    def _score(
        self, trained: Trained, folder: Path, pairs: list[Pair], out: Path, k: int | None
    ) -> None:
        """Write the scores of images by the student in a folder, and what it was trained on."""
        if rank() == 0:
            name = f"{folder.parents[1].name} {folder.name}"
            record_scores(out, trained_on=self._labelled(k), name=name)
        write_scores(
            trained.student,
            self.source,
            pairs,
            out,
            window=self.args.window,
            device=self.args.device,
            amp=trained.amp,
            newer_than=folder / "checkpoint.pt",
        )
        wait()

    def _stacked(self, scores: Path) -> Source:
        """The foundation model's scores, colours and features, with the scores of a student."""
        return replace(self.source, others=Source(self.source.root, scores).models)

    def _labelled(self, k: int | None) -> list[Pair]:
        return [*self.folds.images] if k is None else self.folds.train(k)

    @property
    def _unlabelled(self) -> list[Pair]:
        return read_ids(self.lists.unlabelled, columns=1)

    def _pseudo(self, labels: Path) -> list[Pair]:
        return read_pseudo(labels / "ids.txt", self._unlabelled)


def _check(args: argparse.Namespace, source: Source, lists: Lists) -> None:
    """What can be known before the first student is trained."""
    labelled, unlabelled = read_ids(lists.labelled), read_ids(lists.unlabelled, columns=1)
    both = {pair.image for pair in labelled} & {pair.image for pair in unlabelled}
    if both:
        raise ValueError(
            f"{args.lists / 'unlabelled.txt'}: expected images that are not labelled too, "
            f"got {min(both)}; remove it from one of the lists"
        )
    for pair in [*labelled, *unlabelled]:
        output_path(args.out, pair.image, ".npy")
    files = source.locate([*labelled, *unlabelled])
    source.shape(files[labelled[0]])
    outside = len(labelled) - -(-len(labelled) // max(args.folds, 1))
    if rule_of(args).conformal and outside < 5:  # the calibration has folds of its own
        raise ValueError(
            f"--alpha: expected 5 labelled images or more outside every fold, got {outside}; "
            "leave --alpha out, or label more images"
        )
