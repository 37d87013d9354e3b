"""How long each stage is, and which images every step takes."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from cpseg.files import Pair, read_ids
from crops import Lists, Sample


class Stage(NamedTuple):
    """A part of the training: its steps, and what the loss of a batch is made of.

    Attributes:
        steps: optimiser steps.
        halves: whether a batch is half labelled, half unlabelled with labels of the student's own.
    """

    steps: int
    halves: bool


class Plan(NamedTuple):
    """The images of a run and its stages; stage II begins after ``switch`` steps, if at all."""

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
    """How long each stage is.

    An epoch of stage I passes over labelled and unlabelled images once, one of stage II over the
    unlabelled ones with as many labelled (appendix A). Methods without a stage II stay in stage I,
    and label-only repeats its images: all take the same number of steps.
    """
    labelled, unlabelled = read_ids(lists.labelled), read_ids(lists.unlabelled, columns=1)
    one = args.epochs[0] * max(1, (len(labelled) + len(unlabelled)) // args.batch)
    two = args.epochs[1] * max(1, 2 * len(unlabelled) // args.batch)
    own = args.method == "self-training" or args.method.endswith("+sr")
    stages = (Stage(one if own else one + two, False), Stage(two if own else 0, True))
    return Plan(labelled, unlabelled, pseudo, one, stages)


def batches(made: Plan, batch: int, seed: int, *, balance: bool = False) -> list[list[Sample]]:
    """The images of every step of the run; the first half of a stage II batch is labelled.

    Stage I takes labelled and pseudo-labelled images as they come, or with ``balance`` in turn.
    """
    own, others = [(pair, False) for pair in made.labelled], [(pair, True) for pair in made.pseudo]
    mixed = _shuffled(own + others, seed, 0)
    if balance and others:
        turns = zip(_shuffled(own, seed, 3), _shuffled(others, seed, 4), strict=False)
        mixed = itertools.chain.from_iterable(turns)
    streams = [
        mixed,
        _shuffled([(pair, False) for pair in made.labelled], seed, 1),
        _shuffled([(Pair(pair.image, None), True) for pair in made.unlabelled], seed, 2),
    ]
    counts = [(batch, 0, 0)] * made.stages[0].steps
    counts += [(0, batch // 2, batch // 2)] * made.stages[1].steps
    seeds = itertools.count(seed * 1_000_003)
    return [
        [
            Sample(*next(stream), next(seeds))
            for stream, count in zip(streams, some, strict=True)
            for _ in range(count)
        ]
        for some in counts
    ]


def _shuffled(
    items: list[tuple[Pair, bool]], seed: int, number: int
) -> Iterator[tuple[Pair, bool]]:
    """The items in a random order, then in another one, without end."""
    generator = torch.Generator().manual_seed(3 * seed + number)
    while True:
        yield from (items[i] for i in torch.randperm(len(items), generator=generator).tolist())


def portion(samples: list[Sample], part: int, parts: int, *, halves: bool) -> list[Sample]:
    """What one rank takes of a batch in one of its passes; half labelled where the batch is."""
    if not halves:
        return samples[part::parts]
    middle = len(samples) // 2
    return samples[:middle][part::parts] + samples[middle:][part::parts]
