"""The command line of the training, and the defaults that depend on the data set."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cpseg.files import read_class_map
from crops import LAYOUTS, Layout
from pseudo import Rule

METHODS = (
    "label-only",
    "self-training",
    "foundation",
    "foundation+sr",
    "foundation+cp",
    "foundation+cp+sr",
    "stacked",
    "stacked+sr",
)
PRIOR_POWER_OF_STACKED = 0.125


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        "train.py", description="Two-stage semi-supervised training as in ConformalSAM (ICCV 2025)."
    )
    data = out.add_argument_group("data")
    data.add_argument("--dataset", choices=[*LAYOUTS, "folder"], required=True)
    data.add_argument(
        "--root", type=Path, required=True, help="folder to which paths in id lists are relative"
    )
    data.add_argument(
        "--lists",
        type=Path,
        required=True,
        help="folder with labelled.txt, unlabelled.txt and val.txt",
    )
    data.add_argument(
        "--classes", type=int, help="number of classes, with --dataset folder or other classes"
    )
    data.add_argument(
        "--background", default="data set's", help="index of the class to suppress, or none"
    )
    data.add_argument("--mask-map", type=Path, help="JSON: map from values in masks to classes")
    labels = out.add_argument_group("pseudo-labels")
    labels.add_argument("--method", choices=METHODS, default="foundation+cp+sr")
    labels.add_argument("--probs", type=Path, help="folder of the foundation model's probabilities")
    labels.add_argument("--class-map", type=Path, help="JSON: map from the model's classes")
    labels.add_argument("--pseudo-labels", type=Path, help="use a folder of `cpseg label` instead")
    every = "default 0.05; by default stacked gives every pixel its most probable class"
    labels.add_argument("--alpha", type=float, help=every)
    variants = ("pixel", "image", "kmeans", "annuli")
    labels.add_argument("--variant", choices=variants, default="pixel")
    labels.add_argument(
        "--constant", type=float, help="a fixed threshold instead of calibrated ones"
    )
    methods = ("temperature", "vector", "dirichlet", "trees")
    labels.add_argument("--recalibrate", choices=methods, help="default none; of stacked trees")
    labels.add_argument("--context", help="auto, or none (default auto; of stacked none)")
    power = f"raise rare classes, 0 to 1 (default 0; of stacked {PRIOR_POWER_OF_STACKED})"
    labels.add_argument("--prior-power", type=float, help=power)
    certified = "labels with a certified error per image; --alpha and --variant have no effect"
    labels.add_argument("--certified", type=float, metavar="ERROR", help=certified)
    labels.add_argument("--rounds", type=int, choices=(1, 2), help="of stacked (default 1)")
    labels.add_argument("--folds", type=int, help="of the labelled images in stacked (default 4)")
    features = "folder of an image encoder's features, one more source of stacked"
    labels.add_argument("--features", type=Path, help=features)
    training = out.add_argument_group("training")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument(
        "--labels-only", action="store_true", help="only write and measure the labels"
    )
    training.add_argument(
        "--stage1", type=Path, help="start from stage1.pt of the method without Stage II"
    )
    training.add_argument("--model", default="nvidia/mit-b5", help="or tiny, unet, unet-32")
    training.add_argument("--epochs", type=int, nargs=2, metavar=("I", "II"))
    training.add_argument("--batch", type=int, default=4, help="images per optimiser step")
    training.add_argument("--accumulate", type=int, default=1, help="forward passes per batch")
    training.add_argument(
        "--optimizer", choices=("sgd", "adamw"), help="default sgd; adamw for tiny and unet"
    )
    training.add_argument("--lr", type=float, help="learning rate (default 0.003)")
    training.add_argument("--weight-decay", type=float, default=1e-4)
    training.add_argument(
        "--class-weights", action="store_true", help="higher weights for rare classes"
    )
    training.add_argument(
        "--balance", action="store_true", help="half of each batch of Stage I is labelled"
    )
    training.add_argument("--crop", type=int)
    training.add_argument("--scale", type=float, nargs=2, default=(0.5, 2.0))
    training.add_argument(
        "--sr-weight",
        type=float,
        default=0.01,
        help="initial weight of the unsupervised loss in Stage II",
    )
    training.add_argument(
        "--self-training-weight",
        type=float,
        default=1.0,
        help="weight of the unsupervised loss in eq. 2",
    )
    training.add_argument("--amp", choices=("none", "fp16", "bf16"), default="none")
    training.add_argument("--workers", type=int, default=0)
    training.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    training.add_argument("--window", type=int, help="evaluate in sliding windows of this side")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return out


def complete(args: argparse.Namespace) -> Layout:
    """Fill in the defaults of the data set and the model, and check the arguments."""
    folder = Layout(args.classes or 0, None, ("{}", "{}"), (60, 20))
    layout = LAYOUTS.get(args.dataset, folder)
    if args.mask_map is not None:
        layout = replace(layout, mask_map=read_class_map(args.mask_map))
    args.classes = args.classes or layout.classes
    if args.classes < 2:
        raise ValueError(
            f"--classes: expected a number above 1, got {args.classes or 'none'}; count the classes"
        )
    if layout.mask_map is not None and layout.mask_map.num_classes != args.classes:
        raise ValueError(
            f"--classes: expected masks of {args.classes} classes, "
            f"got a mask map to {layout.mask_map.num_classes}; change one of them"
        )
    default = args.background == "data set's"
    args.background = layout.background if default else _index(args.background)
    args.epochs = tuple(args.epochs or layout.epochs)
    args.crop = args.crop or layout.crop
    args.optimizer = args.optimizer or (
        "adamw" if args.model.partition("-")[0] in ("tiny", "unet") else "sgd"
    )
    args.lr = args.lr or 0.003
    world = int(os.environ.get("WORLD_SIZE", "1"))
    divisor = 2 * world * args.accumulate
    if args.batch % divisor:
        raise ValueError(
            f"--batch: expected two halves for {world} ranks in {args.accumulate} passes, "
            f"got {args.batch}; choose a multiple of {divisor}"
        )
    (_complete_stacked if is_stacked(args.method) else _complete_others)(args)
    if args.certified is not None and (args.constant is not None or "+cp" not in args.method):
        got = args.method if args.constant is None else f"--constant {args.constant:g}"
        raise ValueError(
            f"--certified: expected a calibrated method, +cp, got {got}; leave one of them out"
        )
    if args.stage1 is not None and counterpart(args.method) == args.method:
        raise ValueError(
            f"--stage1: expected a method with a stage II, got {args.method}; leave it out"
        )
    return layout


def is_stacked(method: str) -> bool:
    """Whether the method's pseudo-labels come from several models."""
    return method.startswith("stacked")


def _complete_stacked(args: argparse.Namespace) -> None:
    if args.probs is None or args.pseudo_labels is not None:
        got = "none" if args.pseudo_labels is None else "--pseudo-labels"
        raise ValueError(
            f"{args.method}: expected --probs, got {got}; pass the foundation model's probabilities"
        )
    if args.recalibrate not in (None, "dirichlet", "trees"):
        raise ValueError(
            f"--recalibrate: expected trees or dirichlet with {args.method}, one map over all "
            f"sources, got {args.recalibrate}; leave it out"
        )
    if args.alpha is not None and args.constant is not None:
        raise ValueError(
            "--constant: expected no --alpha beside it, got both; leave one of them out"
        )
    if args.alpha is None and args.variant != "pixel":
        raise ValueError(
            f"--variant: expected --alpha with it, got {args.variant} alone; "
            f"{args.method} has calibrated thresholds only with --alpha"
        )
    args.recalibrate = args.recalibrate or "trees"
    args.context = args.context or "none"
    args.rounds = args.rounds or 1
    args.folds = 4 if args.folds is None else args.folds
    if args.prior_power is None:
        args.prior_power = PRIOR_POWER_OF_STACKED


def _complete_others(args: argparse.Namespace) -> None:
    for name in ("rounds", "folds", "features"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name}: expected a stacked method, got {args.method}; leave it out"
            )
    needs = args.method.startswith("foundation")
    if needs and (args.probs is None) == (args.pseudo_labels is None):
        got = "neither" if args.probs is None else "both"
        raise ValueError(f"{args.method}: expected --probs or --pseudo-labels, got {got}; pass one")
    args.context = args.context or "auto"
    args.alpha = 0.05 if args.alpha is None else args.alpha
    args.prior_power = args.prior_power or 0.0


def _index(text: str) -> int | None:
    return None if text == "none" else int(text)


def counterpart(method: str) -> str:
    """The method that has the same Stage I as this one, but no Stage II."""
    return "label-only" if method == "self-training" else method.removesuffix("+sr")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments on which the weights depend, as JSON."""
    free = ("out", "workers", "every", "window", "device", "accumulate", "stage1", "labels_only")
    kept = {k: v for k, v in vars(args).items() if k not in free}
    return json.loads(json.dumps(kept, default=str))


def rule_of(args: argparse.Namespace) -> Rule:
    """The rule that chooses the pseudo-labels of a method."""
    stacked = is_stacked(args.method)
    calibrated = args.alpha is not None if stacked else "+cp" in args.method
    return Rule(
        calibrated and args.constant is None,
        0.05 if args.alpha is None else args.alpha,
        args.variant,
        args.background if calibrated else None,
        args.constant,
        args.recalibrate,
        args.context,
        args.prior_power,
        args.certified,
    )
