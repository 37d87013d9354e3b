"""Two-stage semi-supervised training as in ConformalSAM (ICCV 2025), with the parts of cpseg.

python examples/segformer/train.py --dataset voc --root VOC2012 --lists splits/92 \
    --probs seem_probs --method foundation+cp+sr --out runs/cp-sr
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from cpseg import (
    WeakAugmentation,
    mean_iou,
    poly_lr,
    self_reliance_loss,
    self_reliance_weight,
)
from cpseg.checks import message
from cpseg.class_map import read_class_map
from cpseg.sources import Source, rank
from cpseg.store import Pair, read_ids, write_text
from crops import LAYOUTS, VOID, Crops, Layout, Lists, Sample, read_labels, read_pixels, write_lists
from networks import build
from pseudo import Rule, check_labels, quality, read_pseudo, write_labels
from resuming import restore, save
from scoring import evaluate, table

Say = Callable[[str], None]
METHODS = (
    "label-only",
    "self-training",
    "foundation",
    "foundation+sr",
    "foundation+cp",
    "foundation+cp+sr",
)


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


def batches(made: Plan, batch: int, seed: int) -> list[list[Sample]]:
    """The images of every step of the run; the first half of a stage II batch is labelled."""
    mixed = [(pair, False) for pair in made.labelled] + [(pair, True) for pair in made.pseudo]
    streams = [
        _shuffled(mixed, seed, 0),
        _shuffled([(pair, False) for pair in made.labelled], seed, 1),
        _shuffled([(Pair(pair.image, None), True) for pair in made.unlabelled], seed, 2),
    ]
    counts = [(batch, 0, 0)] * made.stages[0].steps
    counts += [(0, batch // 2, batch // 2)] * made.stages[1].steps
    seeds = itertools.count(seed * 1_000_003)
    return [
        [
            Sample(*next(stream), next(seeds))
            for stream, count in zip(streams, own, strict=True)
            for _ in range(count)
        ]
        for own in counts
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


class Trainer:
    """The student, its optimiser and the loss of a step."""

    def __init__(
        self, args: argparse.Namespace, num_classes: int, class_weight: Tensor | None = None
    ) -> None:
        self.args, self.device = args, args.device
        weight = torch.ones(num_classes) if class_weight is None else class_weight
        # The weight of a label's pixel: void has none.
        self.weight = torch.cat([weight, torch.zeros(VOID + 1 - num_classes)]).to(self.device)
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        model = build(args.model, num_classes, seed=args.seed).to(self.device)
        if self.world > 1 and torch.device(self.device).type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.student = model
        self.model = DistributedDataParallel(model) if self.world > 1 else model
        kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "sgd": partial(torch.optim.SGD, momentum=0.9),
            "adamw": torch.optim.AdamW,
        }
        self.optimizer = kinds[args.optimizer](
            model.parameters(), lr=args.lr, weight_decay=args.weight_decay
        )
        self.amp = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}[args.amp]
        self.scaler = torch.amp.GradScaler("cuda", enabled=args.amp == "fp16")

    def step(self, passes: list[tuple[Tensor, Tensor]], stage: Stage, weight: float) -> Tensor:
        """One optimiser step over the passes of a batch; the loss.

        Args:
            passes: pixels and labels of each pass, on the device.
            stage: the stage that the step belongs to.
            weight: of the unsupervised loss, in stage II.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if stage.halves:
            passes = [(pixels, self._answers(pixels, labels)) for pixels, labels in passes]
        counts = self._counts([labels for _, labels in passes], stage)
        total = torch.zeros((), device=self.device)
        for number, (pixels, labels) in enumerate(passes):
            with contextlib.ExitStack() as stack:
                if self.world > 1 and number + 1 < len(passes):
                    stack.enter_context(self.model.no_sync())
                with self._autocast():
                    logits = self.model(pixels)
                loss = self._loss(logits.float(), labels, counts, stage, weight)
                self.scaler.scale(loss * self.world).backward()  # DDP averages over the ranks
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            torch.device(self.device).type, dtype=self.amp, enabled=self.amp is not None
        )

    @torch.no_grad()
    def _answers(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """The student's own labels for the second half of a batch; padding stays void."""
        middle = len(pixels) // 2
        self.student.eval()
        with self._autocast():
            own = self.student(pixels[middle:]).argmax(1).to(torch.uint8)
        self.student.train()
        inside = labels[middle:] != VOID
        return torch.cat([labels[:middle], own.where(inside, own.new_full((), VOID))])

    def _counts(self, labels: list[Tensor], stage: Stage) -> Tensor:
        """Weight of the labels in the whole batch: of all of them, or of each half."""
        parts = 2 if stage.halves else 1
        own = [torch.stack([self.weight[x.long()].sum() for x in y.chunk(parts)]) for y in labels]
        counts = torch.stack(own).sum(0)
        if self.world > 1:
            dist.all_reduce(counts)
        return counts.masked_fill(counts == 0, 1)  # without a label the loss is 0

    def _loss(
        self, logits: Tensor, labels: Tensor, counts: Tensor, stage: Stage, weight: float
    ) -> Tensor:
        """This pass's share of the batch's loss: the sum over its pixels by the batch's weight."""
        own = self.weight[: logits.shape[1]]
        losses = [
            cross_entropy(a, b.long(), own, ignore_index=VOID, reduction="sum") / count
            for a, b, count in zip(
                logits.chunk(len(counts)), labels.chunk(len(counts)), counts, strict=True
            )
        ]
        if not stage.halves:
            return losses[0]
        if self.args.method == "self-training":
            return losses[0] + weight * losses[1]  # eq. 2
        return self_reliance_loss(losses[0], losses[1], weight)  # eq. 5


def fit(args: argparse.Namespace, trainer: Trainer, made: Plan, source: Source, say: Say) -> None:
    """Take the steps that are left, with a checkpoint now and then."""
    path, settings = args.out / "checkpoint.pt", _settings(args)
    done = 0
    if path.is_file():
        done = restore(path, trainer, settings)
    elif args.stage1 is not None:
        done = restore(args.stage1, trainer, settings, but=("method",))
    if done:
        say(f"goes on after step {done} of {made.steps}")
    first = made.stages[0].steps
    loader = iter(_loader(args, trainer, made, source, done))
    writer = _writer(args.out)
    trainer.model.train()
    since, start = done, time.monotonic()
    total = torch.zeros((), device=args.device)
    for step in range(done, made.steps):
        stage = made.stages[int(step >= first)]
        for group in trainer.optimizer.param_groups:
            group["lr"] = poly_lr(step, made.steps, base_lr=args.lr)
        weight = args.self_training_weight
        if args.method.endswith("+sr") and stage.halves:
            weight = self_reliance_weight(step, made.steps, start=first, initial=args.sr_weight)
        torch.manual_seed((args.seed * 1_000_003 + step) * 1_000 + rank())  # for dropout
        passes = []
        for _ in range(args.accumulate):
            pixels, labels = next(loader)
            passes.append((pixels.to(args.device), labels.to(args.device)))
        total += trainer.step(passes, stage, weight)
        now = step + 1
        if now == made.switch and rank() == 0:
            save(args.out / "stage1.pt", trainer, settings, now)
        if now % args.every == 0 or now == made.steps:
            mean, pace = float(total) / (now - since), (time.monotonic() - start) / (now - done)
            if not math.isfinite(mean):
                fix = "lower --lr, or go on from the last checkpoint"
                raise ValueError(message("training", "a finite loss", f"{mean} at step {now}", fix))
            if rank() == 0:
                save(path, trainer, settings, now)
            part = "II" if stage.halves else "I"
            say(f"stage {part}, step {now} of {made.steps}, loss {mean:.4f}, {pace:.2f} s a step")
            if writer is not None:
                writer.add_scalar("loss", mean, now)
            since, total = now, torch.zeros_like(total)
    if writer is not None:
        writer.close()


def _loader(
    args: argparse.Namespace, trainer: Trainer, made: Plan, source: Source, done: int
) -> DataLoader[tuple[Tensor, Tensor]]:
    """This rank's passes of the steps after ``done``."""
    parts = trainer.world * args.accumulate
    own = [
        portion(samples, turn * trainer.world + rank(), parts, halves=step >= made.stages[0].steps)
        for step, samples in enumerate(batches(made, args.batch, args.seed))
        if step >= done
        for turn in range(args.accumulate)
    ]
    order = [sample for samples in own for sample in samples]
    numbers = iter(range(len(order)))
    indices = [[next(numbers) for _ in samples] for samples in own]
    augment = WeakAugmentation(args.crop, scale=(args.scale[0], args.scale[1]))
    crops = Crops(source, args.classes, augment=augment, order=order)
    return DataLoader(crops, batch_sampler=indices, num_workers=args.workers)


def _writer(out: Path) -> Any:
    """A TensorBoard writer, if TensorBoard is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard")) if rank() == 0 else None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = out.add_argument_group("data")
    data.add_argument("--dataset", choices=[*LAYOUTS, "folder"], required=True)
    data.add_argument("--root", type=Path, required=True, help="what id lists are relative to")
    data.add_argument("--lists", type=Path, required=True, help="labelled, unlabelled, val (.txt)")
    data.add_argument("--classes", type=int, help="with --dataset folder, or other classes")
    data.add_argument("--background", default="data set's", help="class to suppress, or none")
    data.add_argument("--mask-map", type=Path, help="JSON: from the values in masks to classes")
    labels = out.add_argument_group("pseudo-labels")
    labels.add_argument("--method", choices=METHODS, default="foundation+cp+sr")
    labels.add_argument("--probs", type=Path, help="class scores of the foundation model")
    labels.add_argument("--class-map", type=Path, help="JSON: from the model's classes")
    labels.add_argument("--pseudo-labels", type=Path, help="a folder of `cpseg label` instead")
    labels.add_argument("--alpha", type=float, default=0.05)
    variants = ("pixel", "image", "kmeans", "annuli")
    labels.add_argument("--variant", choices=variants, default="pixel")
    labels.add_argument("--constant", type=float, help="threshold in place of calibrated ones")
    labels.add_argument("--recalibrate", choices=("temperature", "vector", "dirichlet"))
    labels.add_argument("--context", default="auto", help="auto, or none")
    labels.add_argument("--certified", type=float, metavar="ERROR", help="labels certified so")
    training = out.add_argument_group("training")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--labels-only", action="store_true", help="write and measure the labels")
    training.add_argument("--stage1", type=Path, help="stage1.pt of the method without stage II")
    training.add_argument("--model", default="nvidia/mit-b5", help="or tiny, or unet")
    training.add_argument("--epochs", type=int, nargs=2, metavar=("I", "II"))
    training.add_argument("--batch", type=int, default=4, help="images of an optimiser step")
    training.add_argument("--accumulate", type=int, default=1, help="passes of a batch")
    training.add_argument("--optimizer", choices=("sgd", "adamw"), help="sgd; from nothing adamw")
    training.add_argument("--lr", type=float, help="0.003; from nothing also")
    training.add_argument("--weight-decay", type=float, default=1e-4)
    training.add_argument("--class-weights", action="store_true", help="rare classes count more")
    training.add_argument("--crop", type=int)
    training.add_argument("--scale", type=float, nargs=2, default=(0.5, 2.0))
    training.add_argument("--sr-weight", type=float, default=0.01, help="initial, of stage II")
    training.add_argument("--self-training-weight", type=float, default=1.0, help="of eq. 2")
    training.add_argument("--amp", choices=("none", "fp16", "bf16"), default="none")
    training.add_argument("--workers", type=int, default=0)
    training.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    training.add_argument("--window", type=int, help="slide windows of this side to evaluate")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return out


def complete(args: argparse.Namespace) -> Layout:
    """Fill in what the data set and the model decide, and check what they do not."""
    folder = Layout(args.classes or 0, None, ("{}", "{}"), (60, 20))
    layout = LAYOUTS.get(args.dataset, folder)
    if args.mask_map is not None:
        layout = replace(layout, mask_map=read_class_map(args.mask_map))
    args.classes = args.classes or layout.classes
    if args.classes < 2:
        got = str(args.classes or "none")
        raise ValueError(message("--classes", "a number above 1", got, "count the classes"))
    if layout.mask_map is not None and layout.mask_map.num_classes != args.classes:
        got, fix = f"a mask map to {layout.mask_map.num_classes}", "change one of them"
        raise ValueError(message("--classes", f"masks of {args.classes} classes", got, fix))
    known = args.background == "data set's"
    args.background = layout.background if known else _index(args.background)
    args.epochs = tuple(args.epochs or layout.epochs)
    args.crop = args.crop or layout.crop
    args.optimizer = args.optimizer or ("adamw" if args.model in ("tiny", "unet") else "sgd")
    args.lr = args.lr or 0.003
    world = int(os.environ.get("WORLD_SIZE", "1"))
    share = 2 * world * args.accumulate
    if args.batch % share:
        fix = f"choose a multiple of {share}"
        expected = f"halves for {world} ranks in {args.accumulate} passes"
        raise ValueError(message("--batch", expected, str(args.batch), fix))
    needs = args.method.startswith("foundation")
    if needs and (args.probs is None) == (args.pseudo_labels is None):
        got = "neither" if args.probs is None else "both"
        raise ValueError(message(args.method, "--probs or --pseudo-labels", got, "pass one"))
    return layout


def _index(text: str) -> int | None:
    return None if text == "none" else int(text)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that the weights depend on, as JSON."""
    free = ("out", "workers", "every", "window", "device", "accumulate", "stage1", "labels_only")
    kept = {k: v for k, v in vars(args).items() if k not in free}
    return json.loads(json.dumps(kept, default=str))


def _pixels_of_classes(source: Source, labelled: list[Pair], classes: int) -> Tensor:
    """How many labelled pixels each class has, ``[K]``."""
    counts = torch.zeros(256, dtype=torch.int64)
    for pair in labelled:
        labels = read_labels(source, pair, classes, read_pixels(source.root / pair.image))
        counts += torch.bincount(labels.flatten().long(), minlength=256)
    return counts[:classes]


def run(args: argparse.Namespace, say: Say) -> None:
    """Labels, training and evaluation."""
    layout = complete(args)
    given = Lists(*(args.lists / f"{part}.txt" for part in Lists._fields))
    args.out.mkdir(parents=True, exist_ok=True)
    lists = write_lists(layout, given, args.out)
    class_map = read_class_map(args.class_map) if args.class_map else None
    source = Source(args.root, args.probs or args.root, class_map, layout.mask_map, layout.void)
    unlabelled = read_ids(lists.unlabelled, columns=1)
    counts = _pixels_of_classes(source, read_ids(lists.labelled), args.classes)
    absent = (counts == 0).nonzero().flatten().tolist()
    if absent:
        say(f"no labelled pixel of class {', '.join(map(str, absent))}: nothing tells what it is")
    pseudo: list[Pair] = []
    facts: dict[str, Any] = {}
    if args.method.startswith("foundation") and args.stage1 is None:
        if args.pseudo_labels is not None:
            ids = check_labels(args.pseudo_labels, unlabelled, args.classes)
        else:
            ids = write_labels(source, lists, _rule(args), args.classes, args.out / "labels")
        pseudo = read_pseudo(ids, unlabelled)
        if all(pair.mask for pair in unlabelled):
            facts = quality(source, pseudo, unlabelled, args.classes)
            say(f"pseudo-labels: {facts['kept']:.1%} kept, {facts['wrong']:.1%} of them wrong")
    if args.labels_only:
        _write_result(args, {"pseudo_labels": facts})
        return
    made = plan(args, lists, pseudo)
    weight = None
    if args.class_weights:  # the square root of the inverse frequency, 1 on average over pixels
        share = counts / counts.sum()
        weight = share.clamp(min=1e-4).rsqrt() / share.sqrt().sum()
    trainer = Trainer(args, args.classes, weight)
    fit(args, trainer, made, source, say)
    confusion = evaluate(
        trainer.student,
        source,
        read_ids(lists.val),
        args.classes,
        window=args.window,
        device=args.device,
        amp=trainer.amp,
    ).cpu()
    say(table(confusion, [str(index) for index in range(args.classes)]))
    iou = mean_iou(confusion, per_class=True).tolist()
    miou = float(mean_iou(confusion))
    _write_result(args, {"miou": miou, "iou": iou, "pseudo_labels": facts})


def _rule(args: argparse.Namespace) -> Rule:
    conformal = "+cp" in args.method and args.constant is None
    return Rule(
        conformal,
        args.alpha,
        args.variant,
        args.background if "+cp" in args.method else None,
        args.constant,
        args.recalibrate,
        args.context,
        args.certified,
    )


def _write_result(args: argparse.Namespace, found: dict[str, Any]) -> None:
    if rank() == 0:
        content = found | {"settings": _settings(args)}
        write_text(args.out / "result.json", json.dumps(content, indent=2) + "\n")


def main(argv: list[str] | None = None, say: Say = print) -> int:
    """Run; 0 on success, 2 with one line on bad input."""
    args = parser().parse_args(argv)
    own = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    try:
        if own:
            cuda = torch.device(args.device).type == "cuda"
            if cuda:
                args.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(args.device)
            dist.init_process_group("nccl" if cuda else "gloo")
        run(args, say if rank() == 0 else lambda line: None)
        if own:
            dist.barrier()  # nobody hangs up while another still reads
            dist.destroy_process_group()
    except (ValueError, OSError, ImportError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
