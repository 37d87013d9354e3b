"""Would a rule that keeps a fixed share of every image certify more? Per label, over random draws.

    python benchmarks/fixed_share.py --root R --ids pool.txt --heldout heldout.txt --probs P

The rule keeps the most confident s % of every image, by recalibrated probabilities, whatever the
probabilities are. All images then keep the same share, so that the share of wrong labels of an
image can be tested itself, which spans [0, 1] and has more power. Beside it the rule of `cpseg
certify`: a threshold for all images.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch

from cpseg.certification.rule_choice import Statement, choose, losses_of, starts_of
from cpseg.files.dataset import Source, read_example
from cpseg.files.id_lists import Pair, read_ids
from cpseg.jobs.estimate import aligned, percent
from cpseg.jobs.recalibrate import RecalibrationOptions

SHARES = np.arange(0.02, 1.001, 0.02)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name in ("root", "ids", "heldout", "probs"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--budget", type=int, default=100)
    parser.add_argument("--splits", type=int, default=5)
    options = parser.parse_args()
    source = Source(options.root, options.probs)
    pool, heldout = read_ids(options.ids), read_ids(options.heldout)
    read: dict[Pair, tuple] = {}

    def example(pair: Pair):
        if pair not in read:
            path = source.locate([pair])[pair]
            classes = source.shape(path)[0]
            read[pair] = read_example(source, pair, path, classes)
        return read[pair]

    def counts(pairs, recalibration):
        """Wrong and kept labels of every image at every share, and labelled pixels."""
        wrong, kept, pixels = [], [], []
        for pair in pairs:
            probs, truth = example(pair)
            best, label = recalibration(probs).max(0)
            order = best.flatten().argsort(descending=True)
            bad = (label != truth).flatten()[order]
            valid = (truth != 255).flatten()[order]
            ends = torch.from_numpy((SHARES * len(order)).round().astype(int) - 1)
            wrong.append((bad & valid).cumsum(0)[ends].numpy())
            kept.append(valid.cumsum(0)[ends].numpy())
            pixels.append(int(valid.sum()))
        return np.stack(wrong)[:, None], np.stack(kept)[:, None], np.array(pixels)

    lines = [("draw", "at most", "kept", "wrong of all kept"), ("---:", *["---:"] * 3)]
    for split in range(options.splits):
        drawn = random.Random(f"{options.budget} {split}").sample(pool, options.budget)
        number = round(0.2 * options.budget)
        setting, proving = drawn[:number], drawn[number:]
        fit = RecalibrationOptions("dirichlet", context="auto")
        recalibrator = fit.recalibrator(len(example(setting[0])[0]), split)
        for pair in setting:
            recalibrator.update(*example(pair))
        recalibration = recalibrator.fit()
        parts = [counts(pairs, recalibration) for pairs in (setting, proving, heldout)]
        for bound in (0.05, 0.1):
            statement = Statement("ltt", "image", "betting", bound, 0.1)
            learned, tested = (
                losses_of(statement, wrong, kept, np.ones(len(pixels)), pixels)
                for wrong, kept, pixels in parts[:2]
            )
            share = (parts[0][1] / parts[0][2][:, None, None]).mean(0)
            level = int(choose(tested, statement, starts_of(statement, learned, share, 1))[0][0])
            cells = ("-", "-")
            if level >= 0:
                wrong, kept, pixels = parts[2]
                error = wrong[:, 0, level].sum() / kept[:, 0, level].sum()
                cells = (percent(kept[:, 0, level].sum() / pixels.sum()), percent(error))
            lines.append((str(split), percent(bound), *cells))
            print(*lines[-1], flush=True)
    print("\n" + aligned(lines))


if __name__ == "__main__":
    main()
