"""All jobs on built-in data: handwritten digits, a model from a cleaner domain, and a picture.

A small network learns to find digits in clean scenes. On faint, cluttered scenes it then labels
many digits as background, as a foundation model does outside its domain. The demo writes images,
masks and probabilities to a folder and runs the same jobs on it as the command.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from cpseg._internal.safe_files import atomic, write_text
from cpseg.calibration.calibration import Calibration
from cpseg.core.selection import evidence, pseudo_labels
from cpseg.demo.scenes import NUM_CLASSES, VOID, class_scores, scenes, train_foundation
from cpseg.files.dataset import Source
from cpseg.files.id_lists import write_ids
from cpseg.files.masks import palette, read_mask, write_mask
from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.evaluate import evaluate
from cpseg.jobs.label import label
from cpseg.jobs.tally import Row, table

ALPHA = 0.1
LABELLED, UNLABELLED = 60, 200
CONSTANT = 0.3  # confidence 0.7, as in Table 9 of ConformalSAM
_SHOWN = 5  # scenes in the picture


def demo(
    out: str | Path, *, seed: int = 0, steps: int = 1000, say: Callable[[str], None] = print
) -> list[Row]:
    """Run the demo and write ``demo.png``, ``table.md`` and all files of the jobs to a folder.

    Args:
        out: the folder; pseudo-labels of an earlier demo in it are replaced.
        seed: seed of the scenes and the network.
        steps: training steps of the network.
        say: prints a line.

    Returns:
        The rows of the table.

    Raises:
        ImportError: scikit-learn is missing; the message names the extra to install.
        OSError: the folder cannot be written.
    """
    out = Path(out)
    began = time.monotonic()
    say(f"Composing {LABELLED + UNLABELLED} scenes of the target domain from handwritten digits")
    images, labels = scenes(LABELLED + UNLABELLED, domain="target", seed=seed)
    say(f"Training a small network on clean scenes in place of a foundation model, {steps} steps")
    shutil.rmtree(out / "pseudo", ignore_errors=True)
    with tqdm(total=steps, desc="train", unit="step", disable=None) as bar:
        model = train_foundation(seed=seed, steps=steps, progress=lambda done, total: bar.update())
    source = _write(out / "data", images, labels, class_scores(model, images))
    lists = {name: out / "data" / f"{name}.txt" for name in ("labelled", "unlabelled")}

    say(f"Calibrating on {LABELLED} labelled scenes, alpha {ALPHA}")
    rows: dict[str, Row] = {}
    for variant in ("image", "pixel"):
        calibration = calibrate(
            source, lists["labelled"], alpha=ALPHA, background=0, variant=variant
        )
        calibration.save(out / f"{variant}.safetensors")
        for row in evaluate(source, lists["unlabelled"], calibration, constant=CONSTANT):
            rows[row.rule] = row
    label(source, lists["unlabelled"], calibration, out / "pseudo", labelled=lists["labelled"])

    order = ("raw argmax", f"constant {CONSTANT:g}", "pixel", "image, suppressed")
    shown = [rows[name] for name in (*order, "pixel, suppressed")]
    write_text(out / "table.md", table(shown) + "\n")
    _draw(out, source, images[LABELLED:], calibration)
    say(
        f"\nResults on {UNLABELLED} scenes used neither for training nor for calibration\n"
        f"(guaranteed: coverage of at least {1 - ALPHA:.0%} at each pixel)\n"
    )
    say(table(shown))
    say(
        "\nwrong: share of wrong labels among those kept. 'suppressed' prefers objects to the\n"
        "background (eq. 4); 'pixel' without it is the plain set rule.\n"
        f"\n{out / 'demo.png'}: the picture. {out / 'pseudo' / 'stage1.txt'}: the list for "
        f"training.\n{time.monotonic() - began:.0f} s."
    )
    return shown


def _write(
    root: Path,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.uint8],
    probs: npt.NDArray[np.float32],
) -> Source:
    """Write the data set and the probabilities as the files that a user would have."""
    from PIL import Image

    pairs = []
    for number, (image, mask, values) in enumerate(zip(images, labels, probs, strict=True)):
        pair = (f"images/{number:03d}.png", f"masks/{number:03d}.png")
        with atomic(root / pair[0]) as file:
            Image.fromarray(image).save(file, format="PNG")
        write_mask(root / pair[1], torch.from_numpy(mask))
        with atomic(root / "probs" / "images" / f"{number:03d}.npy") as file:
            np.save(file, values.astype(np.float16))
        pairs.append(pair)
    write_ids(root / "labelled.txt", pairs[:LABELLED])
    write_ids(root / "unlabelled.txt", pairs[LABELLED:])
    return Source(root, root / "probs")


def _draw(
    out: Path, source: Source, images: npt.NDArray[np.uint8], calibration: Calibration
) -> None:
    """Rows of panels: image, true labels and every rule; colours are classes, white is void."""
    rows: dict[str, list[npt.NDArray[np.uint8]]] = {}
    colours = np.array(palette(), dtype=np.uint8).reshape(256, 3)
    colours[VOID] = 255
    numbers = np.linspace(0, len(images) - 1, _SHOWN).astype(int)
    for number in numbers:
        name = f"{LABELLED + number:03d}"
        probs = source.probabilities(source.probs / "images" / f"{name}.npy")
        threshold = calibration.threshold
        maps = {
            "true labels": _read(source.root / "masks" / f"{name}.png"),
            "raw argmax": evidence(probs, background=0).argmax(),
            f"constant {CONSTANT:g}": pseudo_labels(probs, CONSTANT, background=0),
            "calibrated,\nwithout\nsuppression": pseudo_labels(probs, threshold, background=None),
            "calibrated\n(eq. 4)": _read(out / "pseudo" / "masks" / "images" / f"{name}.png"),
        }
        rows.setdefault("image", []).append(images[number])
        for title, labels in maps.items():
            rows.setdefault(title, []).append(colours[labels.numpy()])
    _panels(out / "demo.png", list(rows), list(rows.values()))


def _read(path: Path) -> torch.Tensor:
    return read_mask(path, num_classes=NUM_CLASSES, size=None)


def _panels(
    path: Path, titles: Sequence[str], rows: Sequence[Sequence[npt.NDArray[np.uint8]]]
) -> None:
    from PIL import Image, ImageDraw, ImageFont

    scale, gap, margin = 2, 8, 150
    height, width = (scale * side for side in rows[0][0].shape[:2])
    size = (margin + len(rows[0]) * (width + gap), len(rows) * (height + gap) + gap)
    sheet = Image.new("RGB", size, (235, 235, 235))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=20)
    for row, (title, panels) in enumerate(zip(titles, rows, strict=True)):
        top = gap + row * (height + gap)
        pen.multiline_text((gap, top + height // 3), title, fill=(0, 0, 0), font=font)
        for column, panel in enumerate(panels):
            image = Image.fromarray(panel).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (margin + column * (width + gap), top))
    with atomic(path) as file:
        sheet.save(file, format="PNG")
