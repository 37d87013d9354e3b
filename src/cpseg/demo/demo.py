"""The whole job on an embedded default: handwriting, a model from a cleaner domain, a picture.

A small network learns to find digits in clean scenes and is applied to faint, cluttered ones,
where it loses many of them to the background, as a foundation model does outside its domain. The
demo writes images, masks and class scores to a folder and runs the same jobs on it as the command.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cpseg._internal.safe_files import atomic, write_text
from cpseg.calibration.calibration import Calibration
from cpseg.core.selection import evidence, pseudo_labels
from cpseg.demo.scenes import NUM_CLASSES, class_scores, scenes, train_foundation
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
_SHOWN = 5


def demo(
    out: str | Path, *, seed: int = 0, steps: int = 1000, say: Callable[[str], None] = print
) -> list[Row]:
    """Run the demo and leave ``demo.png``, ``table.md`` and every file of the job in a folder.

    Args:
        out: the folder; pseudo-labels of an earlier demo in it are replaced.
        seed: of the scenes and the network.
        steps: training steps of the network.
        say: prints a line.

    Returns:
        The rows of the table.

    Raises:
        ImportError: scikit-learn is missing; names the extra.
        OSError: the folder cannot be written.
    """
    out = Path(out)
    began = time.monotonic()
    say(f"Composing {LABELLED + UNLABELLED} scenes of the target domain from handwritten digits")
    images, labels = scenes(LABELLED + UNLABELLED, domain="target", seed=seed)
    say(f"Training the stand-in for a foundation model on clean scenes, {steps} steps")
    shutil.rmtree(out / "pseudo", ignore_errors=True)
    model = train_foundation(seed=seed, steps=steps, progress=_bar)
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
    chosen = [rows[name] for name in (*order, "pixel, suppressed")]
    write_text(out / "table.md", table(chosen) + "\n")
    _draw(out, source, images[LABELLED:], calibration)
    say(
        f"\n{UNLABELLED} scenes against true labels that neither training nor calibration saw\n"
        f"(promised: coverage of at least {1 - ALPHA:.0%} at each pixel)\n"
    )
    say(table(chosen))
    say(
        "\nwrong: share of wrong labels among those kept. 'suppressed' prefers objects to the\n"
        "background (eq. 4); 'pixel' without it is the plain set rule.\n"
        f"\n{out / 'demo.png'}: the picture. {out / 'pseudo' / 'stage1.txt'}: the list to train "
        f"on.\n{time.monotonic() - began:.0f} s."
    )
    return chosen


def _bar(done: int, steps: int) -> None:
    if sys.stderr.isatty() and (done % 10 == 0 or done == steps):
        end = "\n" if done == steps else ""
        print(f"\rtrain {done}/{steps}", end=end, file=sys.stderr, flush=True)


def _write(
    root: Path,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.uint8],
    probs: npt.NDArray[np.float32],
) -> Source:
    """The data set and the scores as files, as a user would have them."""
    from PIL import Image

    pairs = []
    for number, (image, mask, scores) in enumerate(zip(images, labels, probs, strict=True)):
        pair = (f"images/{number:03d}.png", f"masks/{number:03d}.png")
        with atomic(root / pair[0]) as file:
            Image.fromarray(image).save(file, format="PNG")
        write_mask(root / pair[1], torch.from_numpy(mask))
        with atomic(root / "probs" / "images" / f"{number:03d}.npy") as file:
            np.save(file, scores.astype(np.float16))
        pairs.append(pair)
    write_ids(root / "labelled.txt", pairs[:LABELLED])
    write_ids(root / "unlabelled.txt", pairs[LABELLED:])
    return Source(root, root / "probs")


def _draw(
    out: Path, source: Source, images: npt.NDArray[np.uint8], calibration: Calibration
) -> None:
    """Rows of panels: image, truth and every rule; colours are classes, white is ignored."""
    rows: dict[str, list[npt.NDArray[np.uint8]]] = {}
    colours = np.array(palette(), dtype=np.uint8).reshape(256, 3)
    colours[255] = 255
    numbers = np.linspace(0, len(images) - 1, _SHOWN).astype(int)
    for number in numbers:
        name = f"{LABELLED + number:03d}"
        scores = source.probabilities(source.probs / "images" / f"{name}.npy")
        limit = calibration.threshold
        maps = {
            "true labels": _read(source.root / "masks" / f"{name}.png"),
            "raw argmax": evidence(scores, background=0).argmax(),
            f"constant {CONSTANT:g}": pseudo_labels(scores, CONSTANT, background=0),
            "calibrated,\nwithout\nsuppression": pseudo_labels(scores, limit, background=None),
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
