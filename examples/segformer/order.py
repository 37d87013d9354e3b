"""The length of each stage, and the images of every step."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from cpseg.files import Pair, read_ids
from crops import Lists, Sample


class Stage(NamedTuple):
    """A part of the training.

    Attributes:
        steps: number of optimiser steps.
        halves: half of each batch is labelled, half is unlabelled with labels by the student.
    """

    steps: int
    halves: bool


class Plan(NamedTuple):
    """The images of a run and its stages; Stage II, if any, begins after ``switch`` steps."""

    labelled: list[Pair]
    unlabelled: list[Pair]
    pseudo: list[Pair]
    switch: int
    stages: tuple[Stage, Stage]

    @property
    def steps(self) -> int:
        """Optimiser steps of both stages."""
        return sum(stage.steps for stage in self.stages)


def plan(args: argparse.Namespace, lists: Lists, pseudo: list[Pair]) -> Plan:
    """The length of each stage.

    An epoch of Stage I passes once over the labelled and unlabelled images. An epoch of Stage II
    passes over the unlabelled images with as many labelled ones (appendix A). Methods without a
    Stage II stay in Stage I, and label-only repeats its images, so that all methods take the same
    number of steps.
    """
    labelled, unlabelled = read_ids(lists.labelled), read_ids(lists.unlabelled, columns=1)
    steps_1 = args.epochs[0] * max(1, (len(labelled) + len(unlabelled)) // args.batch)
    steps_2 = args.epochs[1] * max(1, 2 * len(unlabelled) // args.batch)
    if args.method == "self-training" or args.method.endswith("+sr"):
        stages = (Stage(steps_1, False), Stage(steps_2, True))
    else:
        stages = (Stage(steps_1 + steps_2, False), Stage(0, True))
    return Plan(labelled, unlabelled, pseudo, steps_1, stages)


def batches(made: Plan, batch: int, seed: int, *, balance: bool = False) -> list[list[Sample]]:
    """The images of every step of the run; the first half of a batch of Stage II is labelled.

    Stage I mixes labelled and pseudo-labelled images; with ``balance`` they alternate.
    """
    labelled = [(pair, False) for pair in made.labelled]
    pseudo = [(pair, True) for pair in made.pseudo]
    mixed = _shuffled(labelled + pseudo, seed, 0)
    if balance and pseudo:
        turns = zip(_shuffled(labelled, seed, 3), _shuffled(pseudo, seed, 4), strict=False)
        mixed = itertools.chain.from_iterable(turns)
    streams = [
        mixed,
        _shuffled(labelled, seed, 1),
        _shuffled([(Pair(pair.image, None), True) for pair in made.unlabelled], seed, 2),
    ]
    counts = [(batch, 0, 0)] * made.stages[0].steps
    counts += [(0, batch // 2, batch // 2)] * made.stages[1].steps
    seeds = itertools.count(seed * 1_000_003)
    return [
        [
            Sample(*next(stream), next(seeds))
            for stream, count in zip(streams, of_streams, strict=True)
            for _ in range(count)
        ]
        for of_streams in counts
    ]


def _shuffled(
    items: list[tuple[Pair, bool]], seed: int, number: int
) -> Iterator[tuple[Pair, bool]]:
    """The items in a random order, again and again, each time in another order."""
    generator = torch.Generator().manual_seed(3 * seed + number)
    while True:
        yield from (items[i] for i in torch.randperm(len(items), generator=generator).tolist())


def portion(samples: list[Sample], part: int, parts: int, *, halves: bool) -> list[Sample]:
    """The samples of one rank's pass; if the batch is half labelled, so are they."""
    if not halves:
        return samples[part::parts]
    middle = len(samples) // 2
    return samples[:middle][part::parts] + samples[middle:][part::parts]
