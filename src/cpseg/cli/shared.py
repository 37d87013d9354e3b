"""What the subcommands share once they run: reading the data options, printing, saving."""

from __future__ import annotations

import argparse
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cpseg.cli.terminal import coloured, fitted, is_coloured, width_of

if TYPE_CHECKING:
    from cpseg.calibration.calibration import Calibration
    from cpseg.core.class_map import ClassMap
    from cpseg.core.score_reading import ScoreReading
    from cpseg.files.dataset import Source
    from cpseg.jobs.recalibrate import RecalibrationOptions
    from cpseg.jobs.shift import Notice
    from cpseg.report.commands import DataWords

Settings = TypeVar("Settings")


def settings_from(kind: type[Settings], arguments: argparse.Namespace, **more: Any) -> Settings:
    """A settings object: its fields are the options of the same names, and ``more``."""
    names = {field.name for field in fields(kind)} & set(vars(arguments))  # type: ignore[arg-type]
    values = {name: getattr(arguments, name) for name in names} | more
    return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def say(text: str) -> None:
    """Print, on the first rank."""
    from cpseg._internal.distributed import rank

    if rank() == 0:
        print(text)


def say_paragraph(text: str) -> None:
    """Print a paragraph; on a terminal its lines end between words."""
    width = width_of(sys.stdout)
    if width is not None:
        text = textwrap.fill(text, min(100, width), break_long_words=False, break_on_hyphens=False)
    say(text)


def say_table(table: str) -> None:
    """Print a Markdown table; on a terminal that is too narrow, a paragraph for each row."""
    say(fitted(table, width_of(sys.stdout)))


def warn(text: str) -> None:
    """Print a warning beside the output, on the first rank."""
    from cpseg._internal.distributed import rank

    if rank() == 0:
        level = coloured("warning", "warning", wanted=is_coloured(sys.stderr))
        print(f"cpseg: {level}: {text}", file=sys.stderr)


def tell(notice: Notice) -> None:
    """Print what a job has to say besides its result: a warning, or a remark."""
    warn(notice.text) if notice.is_warning else say(notice.text)


def source_of(arguments: argparse.Namespace) -> Source:
    """The data set and the scores that the options name.

    Raises:
        ValueError: a folder that is none, a bad class map, or an unknown device.
    """
    from cpseg._internal.checks import message
    from cpseg.files.dataset import ScoreFolder, Source
    from cpseg.files.score_arrays import OF_ALL_IMAGES

    features = [] if arguments.features is None else [arguments.features]
    folders = [("root", arguments.root), *(("probs", folder) for folder in arguments.probs)]
    for option, folder in [*folders, *(("features", folder) for folder in features)]:
        if option == "probs" and folder.suffix in OF_ALL_IMAGES and folder.is_file():
            continue
        if not folder.is_dir():
            fix = "check the path"
            raise ValueError(message(f"--{option}", "a folder", f"{folder}, which is none", fix))
    for name in ("unlabelled", "components"):
        if arguments.features is None and getattr(arguments, name, None) is not None:
            fix = "pass --features too, or leave it out"
            raise ValueError(message(f"--{name}", "an encoder's features", "none", fix))
    check_device(arguments.device)
    given = getattr(arguments, "class_map", None) or []
    if len(given) not in (0, len(arguments.probs)):
        expected = f"{len(arguments.probs)} class maps, one for each --probs"
        got, fix = f"{len(given)}", "pass 'none' for a model whose classes stay as they are"
        raise ValueError(message("--class-map", expected, got, fix))
    maps = [None if path is None else _class_map(path) for path in given]
    empty = [None] * len(arguments.probs)
    readings = readings_of(arguments)
    first, *others = map(ScoreFolder, arguments.probs, maps or empty, readings)
    names = {"void", "masks", "first_class", "unlabelled", "components", "colour", "workers"}
    names &= set(vars(arguments))
    more: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    if getattr(arguments, "mask_map", None) is not None:
        more["mask_map"] = _class_map(arguments.mask_map)
    if getattr(arguments, "palette", None) is not None:
        from cpseg.core.palette import read_palette

        more["palette"] = read_palette(arguments.palette)
    source = Source(
        arguments.root,
        first.probs,
        first.class_map,
        others=tuple(others),
        features=arguments.features,
        device=arguments.device,
        reading=first.reading,
        **more,
    )
    source.mask_format  # noqa: B018  refuses options that exclude each other
    return source


def data_words(source: Source, arguments: argparse.Namespace) -> DataWords:
    """The words that name the data set, for other subcommands."""
    from cpseg.report.commands import DataWords

    return DataWords.of(
        source,
        arguments.ids,
        unlabelled=arguments.unlabelled,
        class_maps=arguments.class_map,
        mask_map=arguments.mask_map,
        palette=arguments.palette,
    )


def readings_of(arguments: argparse.Namespace) -> list[ScoreReading]:
    """How the scores of every model are stored.

    Raises:
        ValueError: an option that was given neither once nor once for each model.
    """
    from cpseg.core.score_reading import ScoreReading

    count = len(arguments.probs)
    kinds = str(getattr(arguments, "scores", "softmax")).split(",")
    layouts = _of_each(getattr(arguments, "layout", None), "layout", count, "chw")
    logits = _of_each(getattr(arguments, "logits", None), "logits", count, "no")
    upsample = _of_each(getattr(arguments, "upsample", None), "upsample", count, "no")
    kind_of = kinds if len(kinds) == count else kinds[:1] * count
    asked = {"no": None, "softmax": "softmax", "sigmoid": "sigmoid"}
    return [
        ScoreReading(layout, kind if given == "auto" else asked[given], up == "yes")
        for layout, given, up, kind in zip(layouts, logits, upsample, kind_of, strict=True)
    ]


def _of_each(given: list[str] | None, name: str, count: int, default: str) -> list[str]:
    """An option of every model, which was given once for all of them or once for each."""
    from cpseg._internal.checks import message

    words = given or [default]
    if len(words) not in (1, count):
        expected = f"--{name} once, or once for each of {count} --probs"
        raise ValueError(message(f"--{name}", expected, f"{len(words)} times", "give all of them"))
    return words if len(words) == count else words * count


def _class_map(path: Path) -> ClassMap:
    from cpseg._internal.checks import message
    from cpseg.core.class_map import read_class_map

    try:
        return read_class_map(path)
    except RecursionError as error:
        got, fix = "one nested without end", "see the command's page in the docs"
        raise ValueError(message(str(path), "a class map in JSON", got, fix)) from error


def check_device(device: str) -> None:
    """Refuse a device that torch does not find here."""
    import torch

    from cpseg._internal.checks import message

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        expected, got = "cpu, or a device of this machine", f"{device} ({reason})"
        raise ValueError(message("--device", expected, got, "choose another")) from error


_OF_A_RECALIBRATION = (
    *("context", "scores", "num_classes"),
    *("recalibrate_share", "recalibrate_folds", "recalibrate_ids"),
)


def refuse_unused(
    arguments: argparse.Namespace, recalibrates: bool, *, but: tuple[str, ...] = ()
) -> None:
    """Refuse options of a recalibration where none was asked for, in place of ignoring them.

    These options have no default of their own, so they are there only if they were given. Those in
    ``but`` have another use too.
    """
    from cpseg._internal.checks import message

    for name in _OF_A_RECALIBRATION if not recalibrates else ():
        used = name == "scores" and getattr(arguments, "logits", None)  # they say what logits are
        if hasattr(arguments, name) and name not in but and not used:
            option = f"--{name.replace('_', '-')}"
            fix = "pass --recalibrate dirichlet too, or leave it out"
            raise ValueError(message(option, "a recalibration", "--recalibrate none", fix))


def recalibration_of(arguments: argparse.Namespace) -> RecalibrationOptions | None:
    """The recalibration that the options ask for, or None."""
    from cpseg.jobs.recalibrate import RecalibrationOptions

    method = arguments.recalibrate
    if method is None:
        several = len(arguments.probs) > 1 or arguments.features is not None or arguments.colour
        method = "dirichlet" if several else "none"
    recalibrates = method != "none" or arguments.prior_power != 0
    refuse_unused(arguments, recalibrates)
    if not recalibrates:
        return None
    names = {
        "share": "recalibrate_share",
        "folds": "recalibrate_folds",
        "fit_ids": "recalibrate_ids",
    }
    given = {
        field: getattr(arguments, option)
        for field, option in names.items()
        if hasattr(arguments, option)
    }
    return settings_from(RecalibrationOptions, arguments, method=method, **given)


def job_settings(kind: type[Settings], arguments: argparse.Namespace) -> Settings:
    """The settings of a job that groups cells and may recalibrate first."""
    from cpseg.jobs.variants import Grouping

    grouping = settings_from(Grouping, arguments)
    recalibration = recalibration_of(arguments)
    return settings_from(kind, arguments, grouping=grouping, recalibration=recalibration)


def save(calibration: Calibration, path: Path) -> None:
    """Write a calibration on the first rank, and its recalibration beside it."""
    from cpseg._internal.distributed import rank

    if rank() > 0:
        return
    calibration.save(path)
    if calibration.recalibration is not None:
        stem = path.name.removesuffix(".safetensors")
        calibration.recalibration.save(path.with_name(f"{stem}.recalibration.safetensors"))


def tell_recalibration(calibration: Calibration) -> None:
    """Say how probabilities were recalibrated, for which classes not, and what it costs."""
    recalibration = calibration.recalibration
    if recalibration is None:
        return
    say(recalibration.describe())
    if recalibration.absent:
        classes = ", ".join(map(str, recalibration.absent))
        warn(f"no labelled pixel of class {classes} to recalibrate with: left as it is")
    used = calibration.provenance.recalibration
    if used is not None and not used.disjoint and calibration.alpha > 0:
        how = f"by {used.folds} folds" if used.folds else "on the calibration images"
        warn(
            f"the recalibration was fitted {how}: nothing is promised; pass "
            "--recalibrate-share 0.3 to fit it on images of their own"
        )
