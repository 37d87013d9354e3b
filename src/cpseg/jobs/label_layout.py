"""The second half of ``cpseg label --output-layout``: links and lists for other training code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpseg._internal.checks import check_choice, message
from cpseg._internal.safe_files import write_text
from cpseg._internal.words import OUTPUT_LAYOUTS
from cpseg.calibration.calibration import Calibration
from cpseg.files.dataset import Source
from cpseg.files.id_lists import Pair
from cpseg.files.layout_texts import config_of
from cpseg.files.layouts import (
    LAYOUTS,
    Layout,
    check_upright,
    copy,
    link,
    names_in_layout,
    remove,
    suffixes_in_layout,
    write_grey,
)
from cpseg.files.masks import image_size, read_mask, write_mask
from cpseg.files.run_folder import RunFolder
from cpseg.foundation.classes import read_classes
from cpseg.jobs.sources import names_beside

_RECORD = "layout.json"


@dataclass(frozen=True)
class OutputLayout:
    """For which training code a folder of labels is laid out.

    Attributes:
        name: ``yolo``, ``mmseg``, ``voc`` or ``ade``.
        names: file with the class names, one per line; by default ``classes.txt`` beside the
            scores, if it names as many classes as the calibration has, else ``class_0`` and so on.
        validation: id list of labelled images for the validation split.
        copy_images: copy images in place of linking to them.

    Raises:
        ValueError: an unknown layout.
    """

    name: str
    names: str | Path | None = None
    validation: str | Path | None = None
    copy_images: bool = False

    def __post_init__(self) -> None:
        fix = "choose one of them"
        check_choice("label", self.name, OUTPUT_LAYOUTS, name="layout", fix=fix)


@dataclass(frozen=True)
class Plan:
    """A layout whose images, names and classes are known to belong together.

    Attributes:
        settings: what was asked for.
        layout: where files lie.
        classes: the class names.
        labelled: labelled images of the training split, with their masks.
        unlabelled: the other images of the training split.
        validation: images of the validation split, with their masks.
        names: the name of every image in the layout.
        suffixes: the suffix of every image there.
    """

    settings: OutputLayout
    layout: Layout
    classes: tuple[str, ...]
    labelled: tuple[Pair, ...]
    unlabelled: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    names: dict[str, str]
    suffixes: dict[str, str]


def plan_layout(
    settings: OutputLayout,
    out: Path,
    source: Source,
    calibration: Calibration,
    labelled: Sequence[Pair],
    unlabelled: Sequence[Pair],
    repeat_labelled: int,
) -> Plan:
    """Check all that can be wrong with a layout before any label is made.

    Raises:
        ValueError: a folder that holds another layout or one of other classes; class names that
            are not as many as the classes of the calibration, or not those of the scores; images
            that the layout cannot hold; or images that are in both splits.
        FileNotFoundError: a list, mask or image is missing.
    """
    layout = LAYOUTS[settings.name]
    where = f"--output-layout {layout.name}"
    if layout.lists is None and repeat_labelled > 1:
        expected, got = "labelled images once, since there is no list", f"{repeat_labelled} times"
        raise ValueError(message(where, expected, got, "choose mmseg, voc or yolo"))
    classes = _class_names(settings, source, calibration)
    if len(classes) > layout.most_classes:
        got = f"{len(classes)} classes"
        fix = "choose voc, mmseg or yolo" if layout.counts_from_one else "map the classes"
        raise ValueError(message(where, f"at most {layout.most_classes} classes", got, fix))
    _check_record(out, layout, classes)
    true = {pair.image for pair in labelled}
    train = [*labelled, *(pair for pair in unlabelled if pair.image not in true)]
    validation: list[Pair] = []
    if settings.validation is not None:
        validation = source.read_ids(settings.validation)
        source.check_masks(validation, str(settings.validation))
        trained = {pair.image for pair in train}
        for pair in validation:
            if pair.image in trained:
                expected, fix = "images that are not trained on", "remove it from one of the lists"
                raise ValueError(message(str(settings.validation), expected, pair.image, fix))
    images = [pair.image for pair in (*train, *validation)]
    names, suffixes = names_in_layout(images), suffixes_in_layout(layout, images)
    for image in images:
        check_upright(source.root / image)
    rest = tuple(train[len(labelled) :])
    chosen = (tuple(labelled), rest, tuple(validation))
    return Plan(settings, layout, classes, *chosen, names, suffixes)


def lay_out(
    plan: Plan,
    folder: RunFolder,
    source: Source,
    masks: dict[Pair, Path],
    repeat_labelled: int,
    *,
    relative: bool,
) -> None:
    """Write the images, masks, lists and the configuration file of a layout.

    What an earlier run wrote for images that are no longer listed is removed; other files are not
    touched.

    Args:
        plan: from :func:`plan_layout`.
        folder: the open run folder, in which the pseudo-labels are complete.
        source: the data set, which knows how true masks are stored.
        masks: the pseudo-label of every unlabelled image.
        repeat_labelled: how often a list names a labelled image.
        relative: whether links to images are relative.

    Raises:
        ValueError: a true mask that does not fit its image or the classes.
        OSError: a file that cannot be read or written.
    """
    out, layout = folder.out, plan.layout
    truth = replace(source, device="cpu")
    places = _places(plan)
    made = [path for pair_of_paths in places.values() for path in pair_of_paths]
    _remove_stale(out, made)
    record = {"layout": layout.name, "classes": list(plan.classes), "files": made}
    write_text(out / _RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    true = {pair.image for pair in (*plan.labelled, *plan.validation)}
    for pair in (*plan.labelled, *plan.unlabelled, *plan.validation):
        image, mask = (out / path for path in places[pair.image])
        _place_image(folder, source.root / pair.image, image, plan.settings, relative)
        if pair.image in true:
            _place_true_mask(folder, layout, truth, pair, mask, len(plan.classes))
        else:
            _place_pseudo_label(folder, layout, masks[pair], mask, len(plan.classes))
    validates = bool(plan.validation)
    if layout.lists is not None:
        rows = [*plan.labelled * repeat_labelled, *plan.unlabelled]
        write_text(out / layout.lists[0], _lines(plan, places, rows))
        remove(out / layout.lists[1])
        if validates:
            write_text(out / layout.lists[1], _lines(plan, places, plan.validation))
    suffix = next(iter(plan.suffixes.values()))
    name, text = config_of(layout, plan.classes, suffix=suffix, validates=validates)
    write_text(out / name, text)


def _places(plan: Plan) -> dict[str, tuple[str, str]]:
    """Where image and mask of every listed image lie, relative to the folder."""
    places = {}
    for split, pairs in ((0, (*plan.labelled, *plan.unlabelled)), (1, plan.validation)):
        for image in (pair.image for pair in pairs):
            name = plan.names[image]
            at = plan.layout.image_path(split, name, plan.suffixes[image])
            places[image] = (at, plan.layout.mask_path(split, name))
    return places


def _class_names(
    settings: OutputLayout, source: Source, calibration: Calibration
) -> tuple[str, ...]:
    """The names that were given, those beside the scores, or numbers."""
    count = calibration.num_classes
    of_scores = names_beside(source, count)
    if settings.names is None:
        if not of_scores and count is None:
            expected, got = "class names, since the calibration has no number of them", "none"
            raise ValueError(message("--names", expected, got, "pass --names FILE"))
        return of_scores or tuple(f"class_{index}" for index in range(count or 0))
    names = read_classes(settings.names).names
    if count is not None and len(names) != count:
        expected, got = f"{count} names, for the classes of the calibration", f"{len(names)}"
        raise ValueError(message(str(settings.names), expected, got, "pass one name per class"))
    if of_scores and names != of_scores:
        index = next(k for k, name in enumerate(names) if name != of_scores[k])
        expected = (
            f"the names in {source.probs / 'classes.txt'}: class {index} is {of_scores[index]!r}"
        )
        fix = "leave --names out, or correct the wrong file"
        raise ValueError(message(str(settings.names), expected, repr(names[index]), fix))
    return names


def _read_record(out: Path) -> dict[str, Any]:
    """What an earlier run recorded of a layout; nothing where there was none."""
    try:
        content = json.loads((out / _RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_record(out: Path, layout: Layout, classes: tuple[str, ...]) -> None:
    record = _read_record(out)
    fix = "choose another folder with -o"
    if record and record.get("layout") != layout.name:
        expected, got = f"no layout yet, or {layout.name}", f"{record.get('layout')}"
        raise ValueError(message(str(out), expected, got, fix))
    if record and record.get("classes") != list(classes):
        expected, got = f"a layout with the classes {', '.join(classes)}", "one with others"
        raise ValueError(message(str(out), expected, got, fix))


def _place_image(
    folder: RunFolder, image: Path, path: Path, settings: OutputLayout, relative: bool
) -> None:
    if not settings.copy_images and link(image, path, relative=relative):
        return
    if path.is_symlink() or not folder.is_up_to_date(path, image):
        stamps = folder.stamps(image)
        copy(image, path)
        folder.record(path, (image,), stamps)


def _place_pseudo_label(
    folder: RunFolder, layout: Layout, mask: Path, path: Path, num_classes: int
) -> None:
    """A link to the mask in ``masks``, or the same labels in the values of the layout."""
    if not layout.counts_from_one and link(mask, path, relative=True):
        return
    if not folder.is_up_to_date(path, mask):
        stamps = folder.stamps(mask)
        if layout.counts_from_one:
            labels = read_mask(mask, num_classes=num_classes, size=None)
            write_grey(path, layout.values(labels))
        else:
            copy(mask, path)
        folder.record(path, (mask,), stamps)


def _place_true_mask(
    folder: RunFolder, layout: Layout, truth: Source, pair: Pair, path: Path, num_classes: int
) -> None:
    inputs = (truth.root / str(pair.mask), truth.root / pair.image)
    if path.is_symlink() or not folder.is_up_to_date(path, *inputs):
        stamps = folder.stamps(*inputs)
        labels = truth.labels(pair, num_classes, image_size(inputs[1]))
        write = write_grey if layout.counts_from_one else write_mask
        write(path, layout.values(labels))
        folder.record(path, inputs, stamps)


def _remove_stale(out: Path, made: Sequence[str]) -> None:
    """Remove what an earlier run wrote and this one did not."""
    kept = set(made)
    for name in _read_record(out).get("files", []):
        if name not in kept and ".." not in Path(name).parts and not Path(name).is_absolute():
            remove(out / name)


def _lines(plan: Plan, places: dict[str, tuple[str, str]], pairs: Sequence[Pair]) -> str:
    """The list of a split: of names, or for Ultralytics of paths from the list's folder."""
    if plan.layout.name == "yolo":
        return "".join(f"./{places[pair.image][0]}\n" for pair in pairs)
    return "".join(f"{plan.names[pair.image]}\n" for pair in pairs)
