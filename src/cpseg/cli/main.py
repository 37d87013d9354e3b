"""The command: reads its arguments, runs a job, prints what came of it.

Exit 0 on success, 2 with one line on bad input, 1 where nothing can be certified. Under
``torchrun`` the images are shared out over the ranks; the result is the same to the byte.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cpseg import foundation, jobs
from cpseg._internal.checks import message
from cpseg._internal.distributed import rank
from cpseg._internal.safe_files import write_text
from cpseg.calibration.calibration import Calibration
from cpseg.cli.options import parser
from cpseg.core.class_map import read_class_map
from cpseg.files.dataset import Source
from cpseg.files.id_lists import Pair, read_ids
from cpseg.foundation.foundation import AMP
from cpseg.jobs.calibrate import images_needed
from cpseg.jobs.certify import class_levels, overlap
from cpseg.jobs.predict import find_images, predict
from cpseg.jobs.recalibrate import RecalibrationOptions
from cpseg.jobs.sweep_table import conclusion, infinite_threshold_warning, table_of_sweep
from cpseg.jobs.tally import Row, class_table, table
from cpseg.report.findings import Plan
from cpseg.report.page import report
from cpseg.report.wording import advice


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    global _bar_open
    _bar_open = False
    try:
        arguments = parser(_RUNS).parse_args(argv)
        with _Ranks():
            code: int | None = arguments.run(arguments)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("cpseg: interrupted; run the same command to go on", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if _bar_open:
            print(file=sys.stderr)
        print(f"cpseg: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return code or 0


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename else ""
        return f"{named}{error.strerror}"
    return " ".join(str(error).split())


class _Ranks:
    """The process group, where ``torchrun`` started us."""

    def __enter__(self) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Ranks wait for the slowest, which may be hours later than the first.
            dist.init_process_group("gloo", timeout=timedelta(days=7))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the others may be waiting for us: torchrun stops them.
        if kind is None and dist.is_initialized():
            dist.destroy_process_group()


_bar_open = False  # a bar waits on the terminal's line


def _progress(items: Iterable[Pair], count: int, title: str) -> Iterable[Pair]:
    """A bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty() or rank() > 0:
        yield from items
        return
    start = shown = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done == 0 or now - shown > 0.1:
            shown = now
            _draw(title, done, count, now - start)
        yield item
    _draw(title, count, count, time.monotonic() - start)


def _draw(title: str, done: int, count: int, seconds: float) -> None:
    filled = 30 * done // max(count, 1)
    left = f"{seconds / done * (count - done):.0f} s left" if done else ""
    bar = "#" * filled + "-" * (30 - filled)
    global _bar_open
    _bar_open = done < count
    end = "" if _bar_open else "\n"
    print(f"\r{title} [{bar}] {done}/{count} {left}\x1b[K", end=end, file=sys.stderr, flush=True)


def _say(text: str) -> None:
    if rank() == 0:
        print(text)


def _warn(text: str) -> None:
    if rank() == 0:
        print(f"cpseg: warning: {text}", file=sys.stderr)


def _source(arguments: argparse.Namespace) -> Source:
    for option in ("root", "probs"):
        folder = getattr(arguments, option)
        if not folder.is_dir():
            fix = "check the path"
            raise ValueError(message(f"--{option}", "a folder", f"{folder}, which is none", fix))
    _check_device(arguments.device)
    maps = {
        option: read_class_map(path)
        for option in ("class_map", "mask_map")
        if (path := getattr(arguments, option, None)) is not None
    }
    return Source(
        arguments.root,
        arguments.probs,
        **maps,
        void=getattr(arguments, "void", 255),
        device=arguments.device,
    )


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        expected, got = "cpu, or a device of this machine", f"{device} ({reason})"
        raise ValueError(message("--device", expected, got, "choose another")) from error


def _calibrate(arguments: argparse.Namespace) -> None:
    calibration = jobs.calibrate(
        _source(arguments),
        arguments.ids,
        alpha=arguments.alpha,
        background=arguments.background,
        variant=arguments.variant,
        block=arguments.block,
        num_groups=arguments.num_groups,
        group_share=arguments.group_share,
        seed=arguments.seed,
        grid=arguments.grid,
        per_class=arguments.per_class,
        score=arguments.score,
        unit=arguments.unit,
        fallback=arguments.fallback,
        refit=_refit(arguments),
        progress=_progress,
    )
    if rank() == 0:
        _save(calibration, arguments.output)
    background = (
        "no background"
        if calibration.background is None
        else (f"background {calibration.background} suppressed")
    )
    _say(
        f"{arguments.output}: {calibration.variant}{', per class' * arguments.per_class}, "
        f"alpha {calibration.alpha:g}, {calibration.num_images} images, "
        f"{calibration.num_classes} classes, {background}, "
        f"grid {calibration.grid[0]}x{calibration.grid[1]}, "
        f"{100 * calibration.infinite_share:.1f} % of thresholds infinite"
    )
    if "fallback" in calibration.extra:
        shares = calibration.extra["fallback"].items()
        _say("thresholds by " + ", ".join(f"{name} {100 * part:.1f} %" for name, part in shares))
    _tell_refit(calibration)
    learned = calibration.extra.get("groups")
    if learned is not None and not learned["apart"]:
        _warn(
            f"groups were learned on the {learned['learned_on']} images that calibrate: nothing is "
            "promised; pass --group-share 0.2 to learn them on images of their own"
        )
    if calibration.infinite_share > 0:
        needed = images_needed(arguments.alpha)
        _warn(
            f"{100 * calibration.infinite_share:.1f} % of thresholds are infinite and let every "
            f"class in: alpha {calibration.alpha:g} needs {needed} scores each; "
            "label more images, raise --alpha, pass --fallback, or pool cells with --variant "
            "blocks or image"
        )


def _label(arguments: argparse.Namespace) -> None:
    calibration = Calibration.load(arguments.calibration)
    kept = jobs.label(
        _source(arguments),
        arguments.ids,
        calibration,
        arguments.output,
        labelled=arguments.labelled,
        progress=_progress,
    )
    lists = "ids.txt" if arguments.labelled is None else "ids.txt and stage1.txt"
    _say(f"{arguments.output}: masks, {lists}, summary.csv; {100 * kept:.1f} % of pixels labelled")


def _evaluate(arguments: argparse.Namespace) -> None:
    calibration = Calibration.load(arguments.calibration)
    rows = jobs.evaluate(
        _source(arguments),
        arguments.ids,
        calibration,
        constant=arguments.constant,
        progress=_progress,
    )
    _say(
        f"alpha {calibration.alpha:g}, calibrated on {calibration.num_images} images; "
        f"promised: {_promise(calibration)}\n"
    )
    _say(table(rows))
    if arguments.per_class:
        _say("\nIoU over all pixels\n\n" + class_table(rows))
    if arguments.output is not None and rank() == 0:
        _write_rows(arguments.output, rows)
    seen = overlap(calibration, arguments.ids)
    if seen:
        _warn(
            f"{len(seen)} of these images made the calibration, {seen[0]} for one: figures on "
            "them are too good; evaluate on other labelled images"
        )


def _refit(arguments: argparse.Namespace) -> RecalibrationOptions | None:
    """What the options ask for."""
    if arguments.recalibrate == "none" and arguments.prior_power == 0:
        asked = {
            "--num-classes": arguments.num_classes is not None,
            "--recalibrate-folds": getattr(arguments, "recalibrate_folds", 0) > 0,
            "--scores": arguments.scores != "softmax",
        }
        for option in (name for name, is_set in asked.items() if is_set):
            fix = "pass --recalibrate dirichlet too, or leave it out"
            raise ValueError(message(option, "scores to refit", "--recalibrate none", fix))
        return None
    return RecalibrationOptions(
        arguments.recalibrate,
        share=getattr(arguments, "recalibrate_share", 0.0),
        folds=getattr(arguments, "recalibrate_folds", 0),
        context=arguments.context,
        scores=arguments.scores,
        prior_power=arguments.prior_power,
        num_classes=arguments.num_classes,
    )


def _save(calibration: Calibration, path: Path) -> None:
    """Write a calibration, and the map of its scores beside it."""
    calibration.save(path)
    if calibration.recalibration is not None:
        stem = path.name.removesuffix(".safetensors")
        calibration.recalibration.save(path.with_name(f"{stem}.recalibration.safetensors"))


def _tell_refit(calibration: Calibration) -> None:
    """How the scores were refitted, which classes it left, and where it voids the promise."""
    fitted = calibration.recalibration
    if fitted is None:
        return
    _say(fitted.describe())
    if fitted.absent:
        classes = ", ".join(map(str, fitted.absent))
        _warn(f"no labelled pixel of class {classes} to refit by: left as they are")
    refitted = calibration.extra.get("refitted")
    if refitted is not None and not refitted["apart"]:
        how = f"by {refitted['folds']} folds" if refitted["folds"] else "on these images"
        _warn(
            f"scores were refitted {how}, and the same images calibrate: nothing is promised; "
            "pass --recalibrate-share 0.3 to fit on images of their own"
        )


def _promise(calibration: Calibration) -> str:
    """What a calibration promises on new images, in words."""
    if calibration.certificate is not None:
        return str(calibration.certificate)
    refitted = calibration.extra.get("refitted")
    if refitted is not None and not refitted["apart"]:
        return "nothing: scores were refitted on the images that calibrated"
    learned = calibration.extra.get("groups")
    if learned is not None and not learned["apart"]:
        return "nothing: groups were learned on the images that calibrated"
    covered = f"{100 * (1 - calibration.alpha):g} %"
    height, width = calibration.grid
    sampled = f"{height}x{width} pixels that the grid samples"
    at_pixel = f"coverage of at least {covered} at each of the {sampled}"
    pooled = "nothing exactly where groups are pooled over pixels"
    if calibration.unit == "image":
        whose, which = "an image's", "images"
        if calibration.threshold.ndim == 3:
            whose, which = "a class's", "images that show it"
        pooled = (
            f"at least {covered} of {whose} pixels covered on average over {which}, in each group "
            f"of the {sampled}"
        )
    promise = at_pixel if calibration.variant == "pixel" else pooled
    shares: dict[str, float] = calibration.extra.get("fallback", {})
    own = shares.get(calibration.variant, 1.0)
    if any(share > 0 for name, share in shares.items() if name != calibration.variant):
        promise += (
            f", where thresholds are its own ({100 * own:.1f} %); nothing where they fell back"
        )
    return promise


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Figures as JSON; what is not a number becomes null."""
    text = json.dumps([asdict(row) for row in rows], indent=2)
    write_text(path, text.replace("NaN", "null") + "\n")


def _certify(arguments: argparse.Namespace) -> int:
    calibration = jobs.certify(
        _source(arguments),
        arguments.ids,
        background=arguments.background,
        max_error=arguments.max_error,
        delta=arguments.delta,
        variant=arguments.variant,
        block=arguments.block,
        method=arguments.method,
        pvalue=arguments.pvalue,
        per_class=arguments.per_class,
        calibrate_share=arguments.calibrate_share,
        calibration_ids=arguments.calibration_ids,
        seed=arguments.seed,
        grid=arguments.grid,
        refit=_refit(arguments),
        progress=_progress,
    )
    certificate = calibration.certificate
    assert certificate is not None
    if not certificate.certified:
        if rank() == 0:
            print(f"cpseg: not certified: {certificate}", file=sys.stderr)
        return 1
    if rank() == 0:
        _save(calibration, arguments.output)
    _say(f"{arguments.output}: {certificate}")
    _tell_refit(calibration)
    if certificate.classes is not None:
        _say("\n" + class_levels(certificate))
    return 0


def _sweep(arguments: argparse.Namespace) -> None:
    rows = jobs.sweep(
        _source(arguments),
        arguments.ids,
        backgrounds=arguments.backgrounds,
        alphas=arguments.alphas,
        variants=arguments.variants,
        block=arguments.block,
        num_groups=arguments.num_groups,
        group_share=arguments.group_share,
        recalibrate=arguments.recalibrate,
        prior_powers=arguments.prior_powers,
        recalibrate_share=arguments.recalibrate_share,
        context=arguments.context,
        scores=arguments.scores,
        folds=arguments.folds,
        seed=arguments.seed,
        grid=arguments.grid,
        out=arguments.output,
        progress=_progress,
    )
    _say(f"{table_of_sweep(rows)}\n\n{conclusion(rows)}")
    short = infinite_threshold_warning(rows)
    if short is not None:
        _warn(short)


def _report(arguments: argparse.Namespace) -> None:
    plan = Plan(
        arguments.background,
        alpha=arguments.alpha,
        variant=arguments.variant,
        block=arguments.block,
        folds=arguments.folds,
        seed=arguments.seed,
        max_errors=() if arguments.max_error == ["none"] else tuple(arguments.max_error),
        delta=arguments.delta,
        methods=tuple(arguments.recalibrate),
        context=arguments.context,
        scores=arguments.scores,
        share=arguments.recalibrate_share,
        samples=arguments.images,
        grid=arguments.grid,
        names=None if arguments.names is None else _names(arguments.names),
    )
    found = report(
        _source(arguments),
        arguments.ids,
        plan,
        arguments.output,
        made_by=_command(arguments),
        progress=_progress,
    )
    _say("\n\n".join([*advice(found), f"{arguments.output}: figures, pictures, and how made"]))


def _names(path: Path) -> tuple[str, ...]:
    """Class names, one a line."""
    try:
        names = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        fix = "write them in UTF-8"
        raise ValueError(message(str(path), "class names", "other bytes", fix)) from error
    for number, name in enumerate(names, start=1):
        if not name.strip():
            where, fix = f"{path}, line {number}", "one name a line, no blank line"
            raise ValueError(message(where, "the name of a class", "a blank line", fix))
    return tuple(names)


def _command(arguments: argparse.Namespace) -> str:
    """The command of a report with all its options, defaults too."""
    words = ["cpseg", "report"]
    for name, value in vars(arguments).items():
        if name == "run" or (value is None and name != "background"):
            continue
        if isinstance(value, (list, tuple)):
            joined = ("x" if name == "grid" else ",").join(map(str, value))
            value = joined or "none"
        words += [f"--{name.replace('_', '-')}", "none" if value is None else str(value)]
    return shlex.join(words)


def _compact(arguments: argparse.Namespace) -> None:
    calibration = arguments.calibration and Calibration.load(arguments.calibration)
    background = calibration.background if calibration else arguments.background
    written = jobs.compact(
        _source(arguments),
        arguments.ids,
        arguments.output,
        background=background,
        calibration=calibration,
        progress=_progress,
    )
    _say(f"{arguments.output}: {written} evidence files written by this rank")


def _predict(arguments: argparse.Namespace) -> None:
    if (arguments.images is None) == (arguments.root is None and arguments.ids is None):
        got = "none of them" if arguments.images is None else "both"
        expected, fix = "--images, or --root and --ids", "pass a folder of images, or an id list"
        raise ValueError(message("predict", expected, got, fix))
    if arguments.images is not None:
        root, pairs = arguments.images, find_images(arguments.images)
    else:
        if arguments.root is None or arguments.ids is None:
            got = "--ids alone" if arguments.root is None else "--root alone"
            raise ValueError(message("predict", "--root and --ids", got, "pass both"))
        root, pairs = arguments.root, read_ids(arguments.ids, columns=1)
    device = arguments.device
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a device for each rank
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    _check_device(device)
    model = foundation.load(
        arguments.model,
        arguments.classes,
        background=None if arguments.background == "none" else arguments.background,
        class_map=arguments.class_map,
        device=device,
        amp=arguments.amp and AMP[arguments.amp],
        tile=arguments.tile,
        overlap=arguments.overlap,
        revision=arguments.revision,
    )
    evidence = arguments.evidence != -1
    written = predict(
        model,
        root,
        pairs,
        arguments.output,
        names=model.names,
        made={"foundation": model.fingerprint},
        dtype=arguments.dtype,
        evidence=evidence,
        background=arguments.evidence if evidence else None,
        batch=arguments.batch,
        device=device,
        progress=_progress,
    )
    what = "evidence" if evidence else "score"
    rule = "there is none" if model.background is None else "class 0"
    _say(
        f"{arguments.output}: {written} {what} files written by this rank; {model.num_classes} "
        f"classes in classes.txt, background: {rule}"
    )


def _demo(arguments: argparse.Namespace) -> None:
    from cpseg.demo.demo import demo

    demo(arguments.output, seed=arguments.seed, steps=arguments.steps, say=_say)


_RUNS = {
    "demo": _demo,
    "calibrate": _calibrate,
    "label": _label,
    "evaluate": _evaluate,
    "sweep": _sweep,
    "certify": _certify,
    "report": _report,
    "compact": _compact,
    "predict": _predict,
}
