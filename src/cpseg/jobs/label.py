"""The job ``cpseg label``: a pseudo-label mask for every image, and an id list to train on."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cpseg._internal.checks import check_count, message, name_file_in_errors
from cpseg._internal.distributed import barrier, rank, shard
from cpseg._internal.hashing import digest
from cpseg._internal.safe_files import write_text
from cpseg._internal.threads import in_order
from cpseg.calibration.calibration import Calibration
from cpseg.files.dataset import Files, Progress, Source, as_json, quiet
from cpseg.files.id_lists import Pair, check_ids, from_root, path_in_list, write_ids
from cpseg.files.masks import VOID, image_size, read_mask, write_mask
from cpseg.files.run_folder import RunFolder, open_run_folder, output_path, output_paths
from cpseg.jobs.label_layout import OutputLayout, lay_out, plan_layout
from cpseg.jobs.shift import Look, Notice, Tell, look, sameness, silent, unlike
from cpseg.jobs.sources import as_calibrated, scores_of_image

_SPACES = (
    "ids.txt and stage1.txt are separated by tabs where paths have spaces: training code that "
    "splits lines on spaces needs care"
)


def label(
    source: Source,
    ids: str | Path,
    calibration: Calibration,
    out: str | Path,
    *,
    labelled: str | Path | None = None,
    repeat_labelled: int = 1,
    relative: bool = False,
    layout: OutputLayout | None = None,
    progress: Progress = quiet,
    tell: Tell = silent,
) -> float:
    """Write a pseudo-label mask for every image of an id list; go on where a run stopped.

    The folder gets ``masks/`` (8-bit palette PNG, 255 = ignore, image size), ``ids.txt`` (pairs as
    UniMatch and AllSpark read them), ``summary.csv`` (kept share and pixels of every class, per
    image), ``calibration.safetensors``, ``run.json``, ``manifest.jsonl``, and with ``labelled`` a
    ``stage1.txt``: both lists in one. Where a mask map or another void value was used for
    calibration, ``true/`` gets the labelled masks in the form in which training code reads
    pseudo-labels. A mask is made again if its scores or its image have changed, or if it is not
    the one that was written. With ``layout`` there are also images, masks and lists as other
    training code expects them; :class:`OutputLayout`.

    Args:
        source: the data set and the scores, maps or evidence.
        ids: id list of unlabelled images; a second column is not read.
        calibration: selects the labels.
        out: the folder to write.
        labelled: the labelled id list, for ``stage1.txt`` and the layout.
        repeat_labelled: how often ``stage1.txt`` and the list of a layout name a labelled image.
        relative: write paths of masks relative to the root also where they lie outside of it, and
            links of a layout relative to their folder, so that root and ``out`` may be moved
            together. By default they are absolute where a mask lies outside of the root.
        layout: for which other training code the folder is laid out too, or None.
        progress: wraps the loop over images.
        tell: takes a warning where the images are not like those that calibrated, by two tests
            with a false-alarm rate of 1 in 1,000 together, and a remark where the labels are those
            of the argmax.

    Returns:
        The share of pixels that carry a label.

    Raises:
        ValueError: bad settings or files, or a folder that holds another run or another layout or
            is in use.
        OSError: a file that cannot be read or written.
    """
    out = Path(out)
    _check_repeats(repeat_labelled, labelled)
    if calibration.num_classes is not None and calibration.num_classes > VOID:
        got, fix = f"{calibration.num_classes} classes", "8-bit masks hold no more: map the classes"
        raise ValueError(message("label", f"at most {VOID} classes", got, fix))
    pairs = source.read_ids(ids, columns=1)
    masks = output_paths("label", out / "masks", pairs, ".png", kind="masks")
    known = [] if labelled is None else source.read_ids(labelled)
    source.check_masks(known, str(labelled))
    listed = [
        (pair.image, path_in_list(masks[pair], source.root, relative=relative)) for pair in pairs
    ]
    spaces = check_ids(out, listed)  # before the work, not after it
    source = as_calibrated("label", source, calibration)
    paths = source.locate(pairs)
    plan = None
    if layout is not None:
        plan = plan_layout(layout, out, source, calibration, known, pairs, repeat_labelled)
    run = _fingerprint(source, calibration, pairs)
    facts = {"root": str(source.root.resolve()), **source.identity()}
    chosen = replace(calibration, ignore_index=VOID).to(source.device)
    with open_run_folder(out, run, facts=facts, digest_files=True) as folder:

        def make(pair: Pair) -> None:
            image = source.root / pair.image
            _label_image(folder, source, chosen, image, paths[pair], masks[pair])

        mine, count = shard(pairs)
        with closing(in_order(make, mine, source.workers)) as made:
            for _ in zip(progress(mine, count, "label"), made, strict=True):
                pass
        barrier()
        if rank() > 0:
            return float("nan")
        facts_of_masks = folder.facts(list(masks.values()))
        num_classes = chosen.num_classes or VOID
        kept, pixels = summarise(out, masks, num_classes, facts_of_masks)
        notices = _notices(masks, chosen, pixels, facts_of_masks)
        calibration.save(out / "calibration.safetensors")
        if labelled is not None:
            lines = _true_masks(folder, source, known, calibration, relative)
            true = {image for image, _ in lines}
            more = [line for line in listed if line[0] not in true]
            write_ids(out / "stage1.txt", [*lines * repeat_labelled, *more])
        if plan is not None:
            lay_out(plan, folder, source, masks, repeat_labelled, relative=relative)
        write_ids(out / "ids.txt", listed)
    if spaces or check_ids(out, [(pair.image, str(pair.mask)) for pair in known]):
        notices.append(Notice(_SPACES, is_warning=True))
    for notice in notices:
        tell(notice)
    return kept


def _label_image(
    folder: RunFolder,
    source: Source,
    calibration: Calibration,
    image: Path,
    files: Files,
    mask: Path,
) -> None:
    """Write the mask of one image from its score file, unless it is there."""
    path, inputs = files[0], (*files, image)
    if folder.is_up_to_date(mask, *inputs, sound=lambda: _fits(mask, image, calibration)):
        return
    stamps = folder.stamps(*inputs)
    scores = scores_of_image(source, files, image)
    with name_file_in_errors(path):
        labels, seen = look(calibration, scores)
    write_mask(mask, labels)
    folder.record(mask, inputs, stamps, {**seen._asdict(), **_pixels(labels)})


def _pixels(labels: Tensor) -> dict[str, float]:
    """Pixels of a mask that are ignored, and of each of its classes, named as in the summary."""
    *counts, ignored = torch.bincount(labels.flatten(), minlength=VOID + 1).tolist()
    present = {f"class_{index}": count for index, count in enumerate(counts) if count > 0}
    return {"ignored": ignored, **present}


def _fits(mask: Path, image: Path, calibration: Calibration) -> bool:
    """Whether a file can be the mask of an image."""
    try:
        num_classes = calibration.num_classes or VOID
        read_mask(mask, num_classes=num_classes, size=image_size(image))
    except ValueError:
        return False
    return True


def _true_masks(
    folder: RunFolder,
    source: Source,
    pairs: Sequence[Pair],
    calibration: Calibration,
    relative: bool,
) -> list[tuple[str, str]]:
    """Lines of ``stage1.txt`` for labelled images.

    Masks with other values are written anew, since training code reads all masks of the list in
    the same way: class indices as they are, 255 for void.
    """
    stored = calibration.provenance.masks
    if stored is None:
        masks = [str(pair.mask) for pair in pairs]
        if relative:
            masks = [from_root(mask, source.root) for mask in masks]
        return [(pair.image, mask) for pair, mask in zip(pairs, masks, strict=True)]
    source = source.with_mask_format(stored)
    source = replace(source, device="cpu")
    lines = []
    for pair in pairs:
        path = output_path(folder.out / "true", pair.image, ".png")
        inputs = (source.root / str(pair.mask), source.root / pair.image)
        if not folder.is_up_to_date(path, *inputs):
            stamps = folder.stamps(*inputs)
            size = image_size(source.root / pair.image)
            write_mask(path, source.labels(pair, calibration.num_classes or VOID, size))
            folder.record(path, inputs, stamps)
        lines.append((pair.image, path_in_list(path, source.root, relative=relative)))
    return lines


def _check_repeats(repeat_labelled: int, labelled: str | Path | None) -> None:
    fix = "1 names every labelled image once"
    check_count("label", repeat_labelled, name="repeat_labelled", fix=fix, most=10_000)
    if repeat_labelled > 1 and labelled is None:
        expected, got = "a list of labelled images", "none"
        raise ValueError(message("--repeat-labelled", expected, got, "pass --labelled LIST"))


def _fingerprint(source: Source, calibration: Calibration, pairs: Sequence[Pair]) -> str:
    """What must be the same for a run to go on in a folder."""
    recalibration = calibration.recalibration
    maps = [calibration.threshold]
    if calibration.class_threshold is not None:
        maps.append(calibration.class_threshold)
    thresholds = b"".join(each.cpu().contiguous().numpy().tobytes() for each in maps)
    return digest(
        {
            "threshold": hashlib.sha256(thresholds).hexdigest(),
            "background": calibration.background,
            **({} if recalibration is None else {"recalibration": recalibration.fingerprint}),
            "map": as_json(source.class_map),
            **source.identity(),
            "root": str(source.root.resolve()),
            "images": [pair.image for pair in pairs],
        }
    )


def summarise(
    out: Path,
    masks: dict[Pair, Path],
    num_classes: int,
    facts: Sequence[Mapping[str, float] | None],
) -> tuple[float, list[int]]:
    """Write ``summary.csv``; the kept share over all pixels, and how many every image has.

    Masks that an older version wrote, without a record of their classes, are read again.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [f"class_{index}" for index in range(num_classes)]
    writer.writerow(["image", "kept_share", "ignored", *names])
    kept, pixels = 0, []
    for (pair, path), recorded in zip(masks.items(), facts, strict=True):
        if recorded is None or "ignored" not in recorded:
            recorded = _pixels(read_mask(path, num_classes=num_classes, size=None))
        ignored, *row = (int(recorded.get(name, 0)) for name in ("ignored", *names))
        total = ignored + sum(row)
        writer.writerow([pair.image, f"{1 - ignored / total:.6f}", ignored, *row])
        kept += total - ignored
        pixels.append(total)
    write_text(out / "summary.csv", text.getvalue())
    return kept / sum(pixels), pixels


def _notices(
    masks: dict[Pair, Path],
    calibration: Calibration,
    pixels: Sequence[int],
    facts: Sequence[Mapping[str, float] | None],
) -> list[Notice]:
    """What is to be said of the images, by what was recorded when their masks were written.

    Nothing where masks of an older version, of which nothing was recorded, are among them. Images
    that made the calibration are not compared with themselves.
    """
    looks = [
        Look(*(each[name] for name in Look._fields))
        for each in facts
        if each is not None and set(Look._fields) <= set(each)
    ]
    if len(looks) < len(masks):
        return []
    provenance = calibration.provenance
    used = provenance.images_used
    new = [seen for pair, seen in zip(masks, looks, strict=True) if pair.image not in used]
    same = sum(seen.same * area for seen, area in zip(looks, pixels, strict=True)) / sum(pixels)
    notices = [unlike(provenance.profile, new), sameness(same)]
    if calibration.alpha == 0:  # the labels of the argmax are what was asked for
        notices = notices[:1]
    return [notice for notice in notices if notice is not None]
