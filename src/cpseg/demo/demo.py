"""All jobs on built-in data: handwritten digits, a model from a cleaner domain, and students.

A small network learns to find digits in clean scenes. On faint, cluttered scenes it then labels
many digits as background, as a foundation model does outside its domain. The demo writes images,
masks and probabilities to a folder and runs the same jobs on it as the command. At the end students
are trained on the labels that came out, and compared on held-out scenes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cpseg._internal.checks import check_count
from cpseg._internal.safe_files import atomic, write_text
from cpseg.calibration.calibration import Calibration
from cpseg.core.selection import pseudo_labels
from cpseg.demo.network import Network, class_scores, train_foundation
from cpseg.demo.pictures import IGNORED, draw_panels
from cpseg.demo.scenes import CLASS_NAMES, F32, NUM_CLASSES, U8, VOID, scenes
from cpseg.demo.student import (
    ALONE,
    BOTH,
    PAPER,
    RAW,
    TRAININGS,
    TRUE,
    Result,
    Train,
    figures,
    one_map,
    score_out_of_fold,
    student_table,
    trainer,
    verdict,
    write_scores,
)
from cpseg.files.dataset import ScoreFolder, Source
from cpseg.files.id_lists import write_ids
from cpseg.files.masks import read_mask, write_mask
from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.evaluate import evaluate
from cpseg.jobs.label import label
from cpseg.jobs.tally import Row, table

ALPHA = 0.1
LABELLED, UNLABELLED, HELDOUT = 40, 200, 80
CONSTANT = 0.3  # confidence 0.7, as in Table 9 of ConformalSAM
_SHOWN = 5  # scenes in a picture
_LISTS = ("labelled", "unlabelled", "heldout")


def demo(
    out: str | Path,
    *,
    seed: int = 0,
    steps: int = 1000,
    student_steps: int = 800,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Run the demo and write pictures, tables and all files of the jobs to a folder.

    The folder gets ``demo.png`` and ``table.md`` of the labels, ``students.png`` and
    ``students.md`` of what students learn from them, the label folders ``pseudo`` (the paper's
    rule) and ``stacked`` (two sources, one map) with their calibrations, and ``data``: images,
    masks, the id lists ``labelled.txt``, ``unlabelled.txt`` and ``heldout.txt``, the scores of the
    model in ``probs`` and those of the labels-only student, out of fold, in ``student_probs``.

    Args:
        out: the folder; pseudo-labels of an earlier demo in it are replaced.
        seed: seed of the scenes and the networks.
        steps: training steps of the network in place of a foundation model.
        student_steps: training steps of every student.
        say: prints a line.

    Returns:
        The rows of the table of the labels.

    Raises:
        ImportError: scikit-learn is missing; the message names the extra to install.
        OSError: the folder cannot be written.
    """
    check_count("demo", student_steps, name="student_steps", fix="the demo uses 800")
    out = Path(out)
    began = time.monotonic()
    say(f"Composing {LABELLED + UNLABELLED} scenes of the target domain from handwritten digits")
    images, labels = _compose(seed)
    say(f"Training a small network on clean scenes in place of a foundation model, {steps} steps")
    for name in ("pseudo", "stacked"):
        shutil.rmtree(out / name, ignore_errors=True)
    with tqdm(total=steps, desc="train", unit="step", disable=None) as bar:
        model = train_foundation(seed=seed, steps=steps, progress=lambda done, total: bar.update())
    probs = class_scores(model, images)
    source = _write(out / "data", images, labels, probs)
    lists = {name: out / "data" / f"{name}.txt" for name in _LISTS}

    say(f"Calibrating on {LABELLED} labelled scenes, alpha {ALPHA}")
    shown = _label(out, source, lists)
    write_text(out / "table.md", table(shown) + "\n")
    say(
        f"\nLabels of {UNLABELLED} scenes used neither for training nor for calibration\n"
        f"(guaranteed: coverage of at least {1 - ALPHA:.0%} at each pixel)\n"
    )
    say(table(shown))
    say(
        "\nwrong: share of wrong labels among those kept. 'suppressed' prefers objects to the\n"
        "background (eq. 4); 'pixel' without it is the plain set rule.\n"
    )

    say(f"Training {TRAININGS} students of {student_steps} steps")
    with tqdm(total=TRAININGS * student_steps, desc="students", unit="step", disable=None) as bar:
        train = trainer(seed=seed, steps=student_steps, progress=bar.update)
        results = _students(out, source, lists, images, labels, probs, train, seed)
    write_text(out / "students.md", student_table(results) + "\n\n" + verdict(results) + "\n")
    _draw_labels(out, source, images, probs)
    _draw_students(out, images, labels, results)
    say(f"\nStudents on {HELDOUT} held-out scenes, of digits that nothing else has seen\n")
    say(student_table(results))
    say(f"\n{verdict(results)}\n")
    say(
        f"{out / 'demo.png'}, {out / 'students.png'}: the pictures. "
        f"{out / 'stacked' / 'stage1.txt'}: the list for training.\n"
        f"{time.monotonic() - began:.0f} s. On these files, or on yours, one command does it:\n"
        f"cpseg run --root {source.root} --labelled labelled.txt --unlabelled unlabelled.txt "
        f"--probs {source.probs} --probs {source.root / 'student_probs'} -o {out / 'run'}"
    )
    return shown


def _compose(seed: int) -> tuple[U8, U8]:
    """Labelled, unlabelled and held-out scenes; the last are of other digits."""
    parts = [
        scenes(LABELLED + UNLABELLED, domain="target", seed=seed),
        scenes(HELDOUT, domain="target", seed=seed, digits="test"),
    ]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return images, labels


def _label(out: Path, source: Source, lists: dict[str, Path]) -> list[Row]:
    """Calibrate, measure every rule on the unlabelled scenes, and label them by the paper's."""
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
    return [rows[name] for name in (*order, "pixel, suppressed")]


def _students(
    out: Path,
    source: Source,
    lists: dict[str, Path],
    images: U8,
    labels: U8,
    probs: F32,
    train: Train,
    seed: int,
) -> list[Result]:
    """Train a student on every kind of labels, and measure it on the held-out scenes."""
    names = [name for name, _ in _pairs(len(images))]
    pool, held = slice(LABELLED, LABELLED + UNLABELLED), slice(LABELLED + UNLABELLED, None)
    folder = source.root / "student_probs"
    alone = score_out_of_fold(train, images, labels[:LABELLED], names, folder)
    both = replace(source, others=(ScoreFolder(folder),))
    calibration = one_map(both, lists["labelled"], seed=seed)
    calibration.save(out / "stacked.safetensors")
    label(both, lists["unlabelled"], calibration, out / "stacked", labelled=lists["labelled"])
    kinds = {
        RAW: probs[pool].argmax(axis=1).astype(np.uint8),
        PAPER: _masks(out / "pseudo", names[pool]),
        BOTH: _masks(out / "stacked", names[pool]),
        TRUE: labels[pool],
    }
    seen = images[: LABELLED + UNLABELLED]
    students = train(
        [(seen, np.concatenate([labels[:LABELLED], given])) for given in kinds.values()]
    )

    def result(kind: str, row: Row | None, student: Network) -> Result:
        answers = class_scores(student, images[held]).argmax(axis=1).astype(np.uint8)
        return Result(kind, row, figures(kind, answers, labels[held]), answers)

    of_labels = (figures(kind, given, labels[pool]) for kind, given in kinds.items())
    return [
        result(ALONE, None, alone),
        *map(result, kinds, of_labels, students),
    ]


def _pairs(count: int) -> list[tuple[str, str]]:
    return [(f"images/{number:03d}.png", f"masks/{number:03d}.png") for number in range(count)]


def _masks(folder: Path, names: Sequence[str]) -> U8:
    """The pseudo-labels of some images, ``[N, H, W]``."""
    found = [_read((folder / "masks" / name).with_suffix(".png")).numpy() for name in names]
    return np.stack(found).astype(np.uint8)


def _write(root: Path, images: U8, labels: U8, probs: F32) -> Source:
    """Write the data set and the probabilities as the files that a user would have."""
    from PIL import Image

    pairs = _pairs(len(images))
    for pair, image, mask in zip(pairs, images, labels, strict=True):
        with atomic(root / pair[0]) as file:
            Image.fromarray(image).save(file, format="PNG")
        write_mask(root / pair[1], torch.from_numpy(mask))
    write_scores(root / "probs", [name for name, _ in pairs], probs)
    write_text(root / "probs" / "classes.txt", "".join(f"{name}\n" for name in CLASS_NAMES))
    ends = np.cumsum([0, LABELLED, UNLABELLED, HELDOUT])
    for name, start, stop in zip(_LISTS, ends, ends[1:], strict=False):
        write_ids(root / f"{name}.txt", pairs[start:stop])
    return Source(root, root / "probs")


def _draw_labels(out: Path, source: Source, images: U8, probs: F32) -> None:
    """Rows of panels: image, true labels and every rule."""
    calibration = Calibration.load(out / "pixel.safetensors")
    rows: dict[str, list[U8]] = {}
    for number in LABELLED + np.linspace(0, UNLABELLED - 1, _SHOWN).astype(int):
        name = f"{number:03d}.png"
        scores, threshold = torch.from_numpy(probs[number]), calibration.threshold
        labels = {
            f"constant {CONSTANT:g}": pseudo_labels(scores, CONSTANT, background=0),
            "calibrated,\nwithout\nsuppression": pseudo_labels(scores, threshold, background=None),
            "calibrated\n(eq. 4)": _read(out / "pseudo" / "masks" / "images" / name),
            "two sources,\none map": _read(out / "stacked" / "masks" / "images" / name),
        }
        rows.setdefault("image", []).append(images[number])
        true = _read(source.root / "masks" / name).numpy().astype(np.uint8)
        rows.setdefault("true labels", []).append(true)
        rows.setdefault("raw argmax", []).append(probs[number].argmax(axis=0).astype(np.uint8))
        for title, each in labels.items():
            shown = np.where(each.numpy() == VOID, IGNORED, each.numpy()).astype(np.uint8)
            rows.setdefault(title, []).append(shown)
    draw_panels(out / "demo.png", rows)


def _draw_students(out: Path, images: U8, labels: U8, results: Sequence[Result]) -> None:
    """Held-out scenes and what students trained on different labels say of them."""
    chosen = np.linspace(0, HELDOUT - 1, _SHOWN).astype(int)
    held = slice(LABELLED + UNLABELLED, None)
    rows = {"held-out\nimage": list(images[held][chosen])}
    rows["true labels"] = list(labels[held][chosen])
    titles = {
        ALONE: f"student of\n{LABELLED} labelled",
        RAW: "student,\n+ raw labels",
        BOTH: "student,\n+ two sources,\none map",
    }
    for each in results:
        if each.trained_on in titles:
            rows[titles[each.trained_on]] = list(each.predictions[chosen])
    draw_panels(out / "students.png", rows)


def _read(path: Path) -> torch.Tensor:
    return read_mask(path, num_classes=NUM_CLASSES, size=None)
