"""Two-stage semi-supervised training as in ConformalSAM (ICCV 2025), with functions of cpseg.

python examples/segformer/train.py --dataset voc --root VOC2012 --lists splits/92 \
    --probs seem_probs --method foundation+cp+sr --out runs/cp-sr
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from arguments import complete, counterpart, is_stacked, parser, rule_of, settings_of
from cpseg import (
    WeakAugmentation,
    mean_iou,
    poly_lr,
    self_reliance_loss,
    self_reliance_weight,
)
from cpseg.files import Pair, Source, read_class_map, read_ids, write_text
from crops import VOID, Crops, Lists, pixels_of_classes, write_lists
from networks import build
from order import Plan, Stage, batches, plan, portion
from pseudo import check_labels, quality, read_pseudo, write_labels
from ranks import rank, ranks
from resuming import restore, save
from scoring import evaluate, table
from stacking import stack

Say = Callable[[str], None]

if hasattr(torch.amp, "GradScaler"):
    grad_scaler = partial(torch.amp.GradScaler, "cuda")
else:  # torch before 2.3
    grad_scaler = torch.cuda.amp.GradScaler


class Trainer:
    """The student, its optimiser and the loss of a step."""

    def __init__(
        self, args: argparse.Namespace, num_classes: int, class_weight: Tensor | None = None
    ) -> None:
        self.args, self.device = args, args.device
        weight = torch.ones(num_classes) if class_weight is None else class_weight
        # The weight of a pixel by its label; void pixels have weight 0.
        self.weight = torch.cat([weight, torch.zeros(VOID + 1 - num_classes)]).to(self.device)
        self.world = ranks()
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
        self.scaler = grad_scaler(enabled=args.amp == "fp16")

    def step(self, passes: list[tuple[Tensor, Tensor]], stage: Stage, weight: float) -> Tensor:
        """Take one optimiser step over the passes of a batch; returns the loss.

        Args:
            passes: pixels and labels of each pass, on the device.
            stage: the stage to which the step belongs.
            weight: weight of the unsupervised loss in Stage II.
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
        """Labels by the student for the second half of a batch; padding stays void."""
        middle = len(pixels) // 2
        self.student.eval()
        with self._autocast():
            predicted = self.student(pixels[middle:]).argmax(1).to(torch.uint8)
        self.student.train()
        padding = labels[middle:] == VOID
        return torch.cat([labels[:middle], predicted.masked_fill(padding, VOID)])

    def _counts(self, labels: list[Tensor], stage: Stage) -> Tensor:
        """Total weight of the labels in the whole batch, or in each half of it."""
        parts = 2 if stage.halves else 1
        sums = [torch.stack([self.weight[x.long()].sum() for x in y.chunk(parts)]) for y in labels]
        counts = torch.stack(sums).sum(0)
        if self.world > 1:
            dist.all_reduce(counts)
        return counts.masked_fill(counts == 0, 1)  # without labels the loss is 0

    def _loss(
        self, logits: Tensor, labels: Tensor, counts: Tensor, stage: Stage, weight: float
    ) -> Tensor:
        """This pass's part of the batch's loss: a sum over its pixels, divided by ``counts``."""
        class_weight = self.weight[: logits.shape[1]]
        losses = [
            cross_entropy(a, b.long(), class_weight, ignore_index=VOID, reduction="sum") / count
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
    """Take the remaining steps and write a checkpoint every ``--every`` steps."""
    path, settings = args.out / "checkpoint.pt", settings_of(args)
    done = 0
    if path.is_file():
        done = restore(path, trainer, settings)
        if args.stage1 is not None and done < made.switch:
            raise ValueError(
                f"{path}: expected step {made.switch} or later with --stage1, got step {done}; "
                "leave --stage1 out"
            )
    elif args.stage1 is not None:
        done = restore(args.stage1, trainer, settings | {"method": counterpart(args.method)})
        if done != made.switch:
            raise ValueError(
                f"{args.stage1}: expected the end of stage I, step {made.switch}, got step {done}; "
                "pass its stage1.pt"
            )
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
                raise ValueError(
                    f"training: expected a finite loss, got {mean} at step {now}; "
                    "lower --lr, or go on from the last checkpoint"
                )
            if rank() == 0:
                save(path, trainer, settings, now)
            number = "II" if stage.halves else "I"
            done_text = f"stage {number}, step {now} of {made.steps}"
            say(f"{done_text}, loss {mean:.4f}, {pace:.2f} s per step")
            if writer is not None:
                writer.add_scalar("loss", mean, now)
            since, total = now, torch.zeros_like(total)
    if writer is not None:
        writer.close()


def _loader(
    args: argparse.Namespace, trainer: Trainer, made: Plan, source: Source, done: int
) -> DataLoader[tuple[Tensor, Tensor]]:
    """The passes of this rank for the steps after ``done``."""
    parts = trainer.world * args.accumulate
    steps = batches(made, args.batch, args.seed, balance=args.balance)
    passes = [
        portion(samples, turn * trainer.world + rank(), parts, halves=step >= made.stages[0].steps)
        for step, samples in enumerate(steps)
        if step >= done
        for turn in range(args.accumulate)
    ]
    order = [sample for samples in passes for sample in samples]
    numbers = iter(range(len(order)))
    indices = [[next(numbers) for _ in samples] for samples in passes]
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


def train(args: argparse.Namespace, made: Plan, source: Source, say: Say) -> Trainer:
    """A student that was trained by a plan; a run that was stopped goes on."""
    weight = None
    if args.class_weights:  # root of the inverse frequency; the mean over pixels is 1
        counts = pixels_of_classes(source, made.labelled, args.classes)
        share = counts / counts.sum()
        weight = share.clamp(min=1e-4).rsqrt() / share.sqrt().sum()
    trainer = Trainer(args, args.classes, weight)
    fit(args, trainer, made, source, say)
    return trainer


def run(args: argparse.Namespace, say: Say) -> None:
    """Make labels, train and evaluate."""
    layout = complete(args)
    given = Lists(*(args.lists / f"{part}.txt" for part in Lists._fields))
    args.out.mkdir(parents=True, exist_ok=True)
    lists = write_lists(layout, given, args.out)
    class_map = read_class_map(args.class_map) if args.class_map else None
    source = Source(args.root, args.probs or args.root, class_map, layout.mask_map, layout.void)
    counts = pixels_of_classes(source, read_ids(lists.labelled), args.classes)
    absent = (counts == 0).nonzero().flatten().tolist()
    if absent:
        say(f"no labelled pixel of class {', '.join(map(str, absent))}: it cannot be learned")
    pseudo, figures = _pseudo_labels(args, source, lists, say)
    if args.labels_only:
        _write_result(args, figures)
        return
    trainer = train(args, plan(args, lists, pseudo), source, say)
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
    _write_result(args, {"miou": miou, "iou": iou} | figures)


def _pseudo_labels(
    args: argparse.Namespace, source: Source, lists: Lists, say: Say
) -> tuple[list[Pair], dict[str, Any]]:
    """The unlabelled images with the pseudo-labels of Stage I, and figures of these."""
    if args.stage1 is None and is_stacked(args.method):
        return stack(args, source, lists, train, say)
    if args.stage1 is not None or not args.method.startswith("foundation"):
        return [], {"pseudo_labels": {}}
    unlabelled = read_ids(lists.unlabelled, columns=1)
    if args.pseudo_labels is not None:
        ids = check_labels(args.pseudo_labels, unlabelled, args.classes)
    else:
        ids = write_labels(source, lists, rule_of(args), args.classes, args.out / "labels")
    pseudo = read_pseudo(ids, unlabelled)
    facts = quality(source, pseudo, unlabelled, args.classes)
    if facts:
        say(f"pseudo-labels: {facts['kept']:.1%} kept, {facts['wrong']:.1%} of them wrong")
    return pseudo, {"pseudo_labels": facts}


def _write_result(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    if rank() == 0:
        content = figures | {"settings": settings_of(args)}
        write_text(args.out / "result.json", json.dumps(content, indent=2) + "\n")


def main(argv: list[str] | None = None, say: Say = print) -> int:
    """Run; returns 0 on success, 2 after one line on stderr for bad input."""
    args = parser().parse_args(argv)
    starts_group = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    try:
        if starts_group:
            cuda = torch.device(args.device).type == "cuda"
            if cuda:
                args.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(args.device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        run(args, say if rank() == 0 else lambda line: None)
        if starts_group:
            dist.barrier()  # no rank closes the group while another one still uses it
            dist.destroy_process_group()
    except (ValueError, OSError, ImportError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
