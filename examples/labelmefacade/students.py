"""A student: a small convolutional head on an encoder's frozen features.

python examples/labelmefacade/students.py data --labelled labelled_44.txt
python examples/labelmefacade/students.py data --labelled labelled_44.txt --pseudo out/masks/images
python examples/labelmefacade/students.py data --labelled labelled_44.txt --scores scores

The first two print mIoU and the share of wrong pixels on the held-out list. The third writes the
student's scores of every image instead: out of fold for the labelled ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from convert import CLASSES
from cpseg import FeatureProjection, confusion_matrix, mean_iou
from cpseg.files import VOID, Pair, atomic, find_scores, read_ids, record_scores
from cpseg.jobs import deal_folds, join_folds

COMPONENTS, WIDTH, BATCH, RATE, DECAY = 64, 64, 8, 3e-3, 0.05
AVERAGED = 0.98  # of the running mean of the weights that predicts
Say = Callable[[str], None]
Size = tuple[int, int]


class Head(nn.Module):
    """Components of features ``[B, C, h, w]`` to logits ``[B, K, 2h, 2w]``."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.lift = nn.Conv2d(channels, WIDTH, 1)
        self.wide = nn.Conv2d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH)
        self.mix = nn.Conv2d(WIDTH, WIDTH, 1)
        self.drop = nn.Dropout2d(0.2)
        self.fine = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.classify = nn.Conv2d(WIDTH, num_classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits."""
        values = F.gelu(self.lift(features))
        values = values + F.gelu(self.mix(self.wide(values)))  # what lies around a place
        values = F.interpolate(self.drop(values), scale_factor=2, mode="bilinear")
        return self.classify(F.gelu(self.fine(values)))


class Examples(NamedTuple):
    """Images to train on.

    Attributes:
        features: components ``[N, C, h, w]``.
        labels: int64 ``[N, 2h, 2w]``, 255 where there is none.
        labelled: the first so many have true masks, the others pseudo-labels.
    """

    features: Tensor
    labels: Tensor
    labelled: int

    def draw(self, size: int) -> Tensor:
        """Indices of a batch: with pseudo-labels, half of it are images with true masks."""
        total = len(self.labels)
        if self.labelled == total:
            return torch.randint(total, (size,))
        half = size // 2
        pseudo = torch.randint(self.labelled, total, (size - half,))
        return torch.cat([torch.randint(self.labelled, (half,)), pseudo])


@dataclass(frozen=True)
class Data:
    """The folder of the data set, with what the student sees of every image.

    Attributes:
        root: has ``images``, ``masks`` and ``features``.
        projection: of the features, fitted on the pool, whose labels it does not need.
        size: of the features of the pool's first image; all are brought to it.
    """

    root: Path
    projection: FeatureProjection
    size: Size

    @classmethod
    def open(cls, root: Path, pool: Sequence[Pair]) -> Data:
        """Fit the projection."""
        folder = root / "features"
        read = (_features(folder, pair) for pair in pool)
        projection = FeatureProjection.fit(read, components=COMPONENTS)
        height, width = _features(folder, pool[0]).shape[-2:]
        return cls(root, projection, (height, width))

    def features(self, pairs: Sequence[Pair]) -> Tensor:
        """Components ``[N, C, h, w]``."""
        rows = []
        for pair in pairs:
            row = self.projection(_features(self.root / "features", pair))[None]
            if row.shape[-2:] != self.size:
                row = F.interpolate(row, self.size, mode="bilinear", antialias=True)
            rows.append(row)
        return torch.cat(rows)

    def labels(self, masks: Sequence[Path]) -> Tensor:
        """Masks at the size of the logits, int64 ``[N, 2h, 2w]``."""
        height, width = 2 * self.size[0], 2 * self.size[1]
        rows = []
        for path in masks:
            with Image.open(path) as opened:
                rows.append(np.array(opened.resize((width, height), Image.Resampling.NEAREST)))
        return torch.from_numpy(np.stack(rows)).long()

    def true_masks(self, pairs: Sequence[Pair]) -> list[Path]:
        """The files that the id list names."""
        return [self.root / str(pair.mask) for pair in pairs]

    def sizes(self, pairs: Sequence[Pair]) -> list[Size]:
        """Height and width of every image, from the header of its mask."""
        found = []
        for path in self.true_masks(pairs):
            with Image.open(path) as opened:
                found.append((opened.height, opened.width))
        return found


def _features(folder: Path, pair: Pair) -> Tensor:
    with np.load(find_scores(folder, pair.image, kind="features")) as file:
        return torch.from_numpy(file["features"]).float()


def train(examples: Examples, *, seed: int, steps: int) -> nn.Module:
    """A student with the running mean of its weights."""
    torch.manual_seed(seed)
    model = Head(examples.features.shape[1], len(CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGED)
    )
    for _ in range(steps):
        chosen = examples.draw(BATCH)
        features, labels = examples.features[chosen], examples.labels[chosen]
        if torch.rand(()) < 0.5:
            features, labels = features.flip(-1), labels.flip(-1)
        loss = F.cross_entropy(model(features), labels, ignore_index=VOID, reduction="sum")
        loss = loss / (labels != VOID).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)
    return averaged.eval()


@torch.no_grad()
def answer(model: nn.Module, features: Tensor, size: Size) -> Tensor:
    """Probabilities ``[K, H, W]`` of one image, from its components ``[C, h, w]``."""
    logits = F.interpolate(model(features[None]), size, mode="bilinear")
    return logits.softmax(1)[0]


def measure(model: nn.Module, data: Data, pairs: Sequence[Pair]) -> tuple[float, float]:
    """The mIoU and the share of wrong pixels in percent, at the size of the masks."""
    counts = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
    sizes = data.sizes(pairs)
    for pair, path, size in zip(pairs, data.true_masks(pairs), sizes, strict=True):
        labels = answer(model, data.features([pair])[0], size).argmax(0)
        with Image.open(path) as opened:
            truth = torch.from_numpy(np.array(opened)).long()
        counts += confusion_matrix(labels, truth, num_classes=len(CLASSES))
    wrong = 1 - int(counts.diag().sum()) / int(counts.sum())
    return 100 * float(mean_iou(counts)), 100 * wrong


def gather(data: Data, labelled: Sequence[Pair], others: Sequence[Pair], pseudo: Path) -> Examples:
    """Labelled images, and where there are ``others`` these with their pseudo-labels."""
    paths = data.true_masks(labelled)
    for pair in others:
        name = Path(pair.image).with_suffix(".png").name
        if not (pseudo / name).is_file():
            raise FileNotFoundError(
                f"{pseudo / name}: expected pseudo-labels of {pair.image}, got no such file; "
                "run cpseg label, and pass the folder masks/images that it writes"
            )
        paths.append(pseudo / name)
    return Examples(data.features([*labelled, *others]), data.labels(paths), len(labelled))


def write_scores(
    model: nn.Module, data: Data, pairs: Sequence[Pair], out: Path, *, seen: Sequence[Pair]
) -> None:
    """Write float16 probabilities ``[K, H, W]``, and record which images the model has seen."""
    record_scores(out, trained_on=seen, name="student")
    for pair, size in zip(pairs, data.sizes(pairs), strict=True):
        probs = answer(model, data.features([pair])[0], size)
        with atomic((out / pair.image).with_suffix(".npz")) as file:
            np.savez_compressed(file, probs=probs.numpy().astype(np.float16))


def cross_fitted(args: argparse.Namespace, data: Data, others: Sequence[Pair]) -> None:
    """Scores of a student for every fold and of one trained on all labelled images, as one folder.

    The labelled images of a fold get those of a student that has not seen their masks.
    """
    out, ids = args.scores, args.data / args.labelled
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(
            f"{out}: expected a new or empty folder, got one with files in it; choose another"
        )
    labelled, heldout = read_ids(ids), read_ids(args.data / args.heldout)
    pseudo = others if args.pseudo else []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        place = Path(name)
        folds = deal_folds(ids, place / "folds", folds=args.folds)
        parts = [place / f"fold_{k}" for k in range(folds.count)]
        steps = args.steps * (folds.count - 1) // folds.count  # as often through the images
        jobs = [(folds.train(k), folds.held(k), parts[k], steps) for k in range(folds.count)]
        listed = {pair.image: pair for pair in (*others, *heldout)}
        jobs.append((labelled, list(listed.values()), place / "all", args.steps))
        for own, scored, part, count in jobs:
            model = train(
                gather(data, own, pseudo, args.pseudo), seed=args.seeds[0], steps=max(1, count)
            )
            write_scores(model, data, scored, part, seen=own)
        join_folds(place / "folds", parts, place / "all", out)


def run(args: argparse.Namespace, say: Say) -> None:
    """Train, then measure or write scores.

    Raises:
        ValueError: bad settings or files.
        OSError: a file that cannot be read or written.
    """
    labelled, pool = (read_ids(args.data / name) for name in (args.labelled, args.pool))
    known = {pair.image for pair in labelled}
    others = [pair for pair in pool if pair.image not in known]
    data = Data.open(args.data, pool)
    if args.scores:
        cross_fitted(args, data, others)
        return
    examples = gather(data, labelled, others if args.pseudo else [], args.pseudo)
    heldout = read_ids(args.data / args.heldout)
    found = []
    for seed in args.seeds:
        found.append(measure(train(examples, seed=seed, steps=args.steps), data, heldout))
    miou, wrong = ([pair[i] for pair in found] for i in range(2))
    spread = [stdev(values) if len(values) > 1 else 0.0 for values in (miou, wrong)]
    say(
        f"mIoU {fmean(miou):.2f} ± {spread[0]:.2f}  "
        f"wrong {fmean(wrong):.2f} ± {spread[1]:.2f} %  ({len(heldout)} images)"
    )
    if args.json:
        args.json.write_text(json.dumps({"miou": miou, "wrong": wrong}), encoding="utf-8")


def main(argv: list[str] | None = None, say: Say = print) -> int:
    """Returns 0 on success, 2 after one line on stderr for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with images, masks, features and id lists")
    parser.add_argument("--labelled", default="labelled_44.txt", help="id list with true masks")
    parser.add_argument("--pool", default="all_350.txt", help="labelled and unlabelled images")
    parser.add_argument("--heldout", default="heldout.txt", help="images to measure on")
    parser.add_argument("--pseudo", type=Path, help="masks of the pool's other images")
    parser.add_argument("--scores", type=Path, help="write scores of all images into this folder")
    parser.add_argument("--folds", type=int, default=4, help="for --scores (default 4)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="of training (default 300)")
    parser.add_argument("--json", type=Path, help="also write the figures of every seed here")
    args = parser.parse_args(argv)
    try:
        run(args, say)
    except (ValueError, OSError) as error:
        print(f"students.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
