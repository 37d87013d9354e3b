"""The foundation model: a small U-Net trained on other drives, and files of its probabilities.

python examples/camvid/teacher.py camvid
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cpseg import mean_iou
from cpseg.files import Pair, Source, atomic, image_size, read_ids

sys.path.insert(0, str(Path(__file__).parent.parent / "segformer"))

import train
from convert import CLASSES, inside, record
from crops import read_pixels
from networks import build
from scoring import evaluate, predict

Say = Callable[[str], None]


def fit(args: argparse.Namespace, say: Say) -> int:
    """Train on ``source.txt``, or continue; returns the exit code of ``examples/segformer``."""
    crop = min(image_size(read_ids("source.txt")[0].image))
    # Class weights, flips and crops of the whole height, as for students; there is no Stage II.
    options = {
        "--dataset": ["camvid"],
        "--root": ["."],
        "--lists": ["lists/teacher"],
        "--method": ["label-only"],
        "--class-weights": [],
        "--model": [args.model],
        "--optimizer": ["adamw"],
        "--epochs": [args.epochs, 0],
        "--crop": [crop],
        "--scale": [1, 1.5],
        "--amp": [args.amp],
        "--seed": [args.seed],
        "--every": [args.every],
        "--device": [args.device],
        "--out": ["teacher"],
    }
    words = [str(word) for name, values in options.items() for word in (name, *values)]
    return train.main(words, lambda line: say(line) if line.startswith("stage") else None)


def write_scores(model: torch.nn.Module, pairs: list[Pair], device: str) -> int:
    """Write float16 probabilities ``[K, H, W]`` of every image without; returns their number."""
    written = 0
    for pair in pairs:
        path = ("probs" / Path(pair.image)).with_suffix(".npz")
        if path.is_file():
            continue
        with torch.no_grad():
            probs = predict(model, read_pixels(Path(pair.image))[None].to(device), None)
        with atomic(path) as file:
            np.savez_compressed(file, probs=probs[0].cpu().numpy().astype(np.float16))
        written += 1
    return written


def teach(args: argparse.Namespace, say: Say) -> int:
    """Train, write probabilities and measure, in the folder of the data."""
    code = fit(args, say)
    if code:
        return code
    folder = Path("teacher")
    model = build(args.model, len(CLASSES)).to(args.device).eval()
    model.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["student"])
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    record(Path("probs"), result["settings"])
    source, heldout, pool = (read_ids(f"{name}.txt") for name in ("source", "heldout", "pool"))
    written, total = write_scores(model, pool + heldout, args.device), len(pool + heldout)
    say(f"probs: {written} score files written, {total - written} were there")
    data = Source(Path(), Path("probs"))
    for pairs, title in (
        (source, "source images, used for training"),
        (heldout, "held-out images"),
    ):
        confusion = evaluate(model, data, pairs, len(CLASSES), window=None, device=args.device)
        say(f"mIoU of the raw argmax, {len(pairs)} {title}: {float(mean_iou(confusion)):.3f}")
    return 0


def main(argv: list[str] | None = None, say: Say = print) -> int:
    """Train and write; returns 0 on success, 2 after one line on stderr for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder of convert.py")
    parser.add_argument(
        "--epochs", type=int, default=45, help="epochs over the source images (default 45)"
    )
    parser.add_argument("--model", default="unet-24", help="unet-WIDTH (default unet-24)")
    parser.add_argument("--amp", choices=("none", "bf16"), default="none", help="(default none)")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        if not (args.out / "lists" / "teacher").is_dir():
            raise FileNotFoundError(
                f"{args.out}: expected a folder of convert.py, got none; "
                "run examples/camvid/convert.py first"
            )
        with inside(args.out):
            return teach(args, say)
    except (ValueError, OSError) as error:
        print(f"teacher.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
