"""Load a folder of ``cpseg label`` into FiftyOne: images, pseudo-labels and how certain they are.

::

    pip install fiftyone
    python examples/fiftyone/load.py OUT --name my-labels --names names.txt
    fiftyone app launch my-labels
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import cpseg
from cpseg.files import VOID, atomic, find_scores, output_path, read_ids, read_mask, read_scores

LABELS, CERTAINTY = "pseudo_labels", "certainty"


class Record(NamedTuple):
    """What FiftyOne is told of an image.

    Attributes:
        image: its path.
        mask: a mask with 1 + class, and 0 for void: FiftyOne does not draw 0.
        certainty: an 8-bit map, or None.
        kept: the share of pixels with a label.
        mean: the mean certainty of those pixels, or None.
    """

    image: Path
    mask: Path
    certainty: Path | None
    kept: float
    mean: float | None


def records(out: Path, work: Path, *, root: Path, probs: Path | None) -> Iterator[Record]:
    """Write the files that FiftyOne shows, image by image."""
    rule = cpseg.Calibration.load(out / "calibration.safetensors")
    for image, _ in read_ids(out / "ids.txt"):
        labels = read_mask(output_path(out / "masks", image, ".png"), num_classes=VOID, size=None)
        mask = output_path(work / "masks", image, ".png")
        kept = labels != VOID
        write(mask, torch.where(kept, labels + 1, 0))
        path = mean = None
        if probs is not None:
            scores = read_scores(find_scores(probs, image))
            certain = cpseg.certainty(scores, rule).nan_to_num(0)
            path = output_path(work / "certainty", image, ".png")
            write(path, (255 * certain).round())
            mean = float(certain[kept].mean()) if bool(kept.any()) else None
        yield Record(root / image, mask, path, float(kept.double().mean()), mean)


def write(path: Path, values: torch.Tensor) -> None:
    """Write an 8-bit grey image."""
    with atomic(path) as file:
        Image.fromarray(values.numpy().astype(np.uint8)).save(file, format="PNG")


def load(found: Iterator[Record], name: str, names: Sequence[str]) -> Any:
    """A dataset of FiftyOne that stays after the program ends."""
    import fiftyone as fo

    dataset = fo.Dataset(name, persistent=True)
    dataset.mask_targets = {LABELS: {k + 1: each for k, each in enumerate(names)}}
    samples = []
    for record in found:
        sample = fo.Sample(filepath=str(record.image.resolve()), kept_share=record.kept)
        sample[LABELS] = fo.Segmentation(mask_path=str(record.mask.resolve()))
        if record.certainty is not None:
            sample[CERTAINTY] = fo.Heatmap(map_path=str(record.certainty.resolve()))
            sample["mean_certainty"] = record.mean
        samples.append(sample)
    dataset.add_samples(samples)
    return dataset


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options, write the files and load them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that cpseg label has finished")
    parser.add_argument("--name", required=True, help="name of the dataset in FiftyOne")
    parser.add_argument("--names", type=Path, help="file of class names, one per line")
    parser.add_argument("--probs", type=Path, help="score files (default: as recorded)")
    parser.add_argument("--without-certainty", action="store_true", help="labels alone")
    parser.add_argument("--work", type=Path, help="where to write (default: OUT-fiftyone)")
    given = parser.parse_args(argv)
    facts = json.loads((given.out / "run.json").read_text(encoding="utf-8"))
    probs = given.probs or Path(facts["probs"])
    if not given.without_certainty and given.probs is None and facts.get("others"):
        parser.error("labels of several models: pass --without-certainty")
    rule = cpseg.Calibration.load(given.out / "calibration.safetensors")
    names = [f"class {k}" for k in range(rule.num_classes or VOID - 1)]
    if given.names is not None:
        names = given.names.read_text(encoding="utf-8").split("\n")
        names = [each.partition(":")[0].strip() for each in names if each.strip()]
    work = given.work or given.out.with_name(f"{given.out.name}-fiftyone")
    scores = None if given.without_certainty else probs
    found = records(given.out, work, root=Path(facts["root"]), probs=scores)
    dataset = load(found, given.name, names)
    print(f"{given.name}: {len(dataset)} images; fiftyone app launch {given.name}")


if __name__ == "__main__":
    main()
