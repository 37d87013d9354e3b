"""``cpseg audit``: the error of the labels in a folder, proven by answers about drawn pixels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpseg._internal.words import AUDIT_LOOKING, AUDIT_UNSURE
from cpseg.cli import options
from cpseg.cli.options import Commands, share, whole
from cpseg.cli.progress import Progress
from cpseg.cli.shared import say, settings_from

if TYPE_CHECKING:
    from cpseg.certification.audit import AuditResult
    from cpseg.jobs.audit import Audit, Cost, Outcome
    from cpseg.jobs.settings import AuditSettings

# Options of the draw, which mean nothing once there are answers.
_OF_THE_DRAW = (
    "by_class",
    "focus",
    "looking",
    "draw",
    "expected_error",
    "probs",
    "calibration",
    "seed",
    "names",
    "label_studio",
)


def add(commands: Commands) -> None:
    """The subcommand's options."""
    command = commands.add_parser(
        "audit", help="the error of a folder's labels, proven by clicking through drawn pixels"
    )
    add = command.add_argument
    add("folder", type=Path, metavar="OUT", help="folder that cpseg label has finished")
    add("--root", type=Path, help="folder of the images (default: as recorded by cpseg label)")
    add("--max-error", help="bound on the share of wrong labels (default 0.05)")
    add("--delta", help="1 - confidence (default 0.1)")
    add("--names", type=Path, help="file of class names, one per line in order")
    add("-o", "--output", type=Path, help="folder for the plan and the page (default OUT/audit)")
    drawing = command.add_argument_group("drawing")
    draw, design = drawing.add_argument, drawing.add_mutually_exclusive_group()
    design.add_argument(
        "--by-class", action="store_true", help="as many pixels of every class: a bound for each"
    )
    design.add_argument(
        "--focus", action="store_true", help="uncertain pixels more often; needs their scores"
    )
    draw(
        "--looking",
        choices=AUDIT_LOOKING,
        help="when answers are looked at: a few planned times (default), once, or at any time",
    )
    draw("--draw", type=whole(1), metavar="N", help="draw N pixels (of a class) instead")
    draw(
        "--expected-error",
        type=share,
        help="error to plan for (default: what the certificate saw, else 0.4 of the bound)",
    )
    draw("--probs", type=Path, help="score files for --focus (default: as recorded)")
    draw("--calibration", type=Path, help="calibration for --focus (default: the one in OUT)")
    draw("--seed", type=whole(0), help="seed of the draw (default: from the system)")
    draw("--plan", action="store_true", help="say how many answers it takes, and write nothing")
    draw("--label-studio", action="store_true", help="also write tasks for Label Studio")
    answer = command.add_argument_group("answers").add_argument
    answer("--answers", type=Path, nargs="+", metavar="FILE", help="files of answers, one a person")
    answer("--truth", type=Path, metavar="MASKS", help="answer from masks: an id list, or a folder")
    options.void(command)
    answer(
        "--unsure",
        choices=AUDIT_UNSURE,
        help="'cannot tell' counts as wrong (default), or is left out of the statement",
    )
    answer(
        "--stricter",
        type=Path,
        nargs="+",
        default=[],
        metavar="OUT2",
        help="folders of stricter rules, which the same answers serve",
    )
    command.set_defaults(run=_run, resumes=lambda arguments: True)


def _run(arguments: argparse.Namespace) -> int:
    from cpseg._internal.checks import message

    asked = arguments.answers or arguments.truth
    if arguments.answers and arguments.truth:
        fix = "leave one of them out"
        raise ValueError(message("audit", "--answers or --truth", "both", fix))
    if arguments.plan and asked:
        fix = "leave one of them out"
        raise ValueError(message("audit", "--plan or answers", "both", fix))
    values = {name: getattr(arguments, name) for name in _OF_THE_DRAW}
    given = [name for name, value in values.items() if value is not None and value is not False]
    if arguments.answers and given:
        expected = f"--{given[0].replace('_', '-')} when pixels are drawn"
        fix = "leave it out: the plan has it"
        raise ValueError(message("audit", expected, "it with --answers", fix))
    if not asked and (arguments.unsure or arguments.stricter):
        name = "--unsure" if arguments.unsure else "--stricter"
        expected, fix = f"{name} with --answers or --truth", "leave it out"
        raise ValueError(message("audit", expected, f"{name} alone", fix))
    if arguments.plan:
        return _tell_costs(arguments)
    if arguments.answers:
        return _read(arguments)
    return _draw(arguments)


def _settings(arguments: argparse.Namespace) -> AuditSettings:
    from cpseg.jobs.settings import AuditSettings

    design = "by-class" if arguments.by_class else "focus" if arguments.focus else "uniform"
    return settings_from(
        AuditSettings,
        arguments,
        design=design,
        answers=arguments.draw,
        looking=arguments.looking or "planned",
        max_error=arguments.max_error or "0.05",
        delta=arguments.delta or "0.1",
    )


def _tell_costs(arguments: argparse.Namespace) -> int:
    from cpseg._internal.checks import check_alpha
    from cpseg.certification.audit import confidence
    from cpseg.jobs.audit import Labels, costs
    from cpseg.jobs.estimate import aligned, small_percent

    settings = _settings(arguments)
    rows: list[Cost] = costs(Labels.open(arguments.folder, arguments.root), settings)
    lines: list[tuple[str, ...]] = [
        ("if so many are wrong", "one look", "planned looks", "on average", "at any time"),
        ("---", *["---:"] * 4),
    ]
    for row in rows:
        numbers = (row.fixed, row.planned, round(row.average), row.any_time)
        lines.append((small_percent(row.error), *map(str, numbers)))
    bound = 100 * float(check_alpha("audit", settings.max_error, name="max_error"))
    sure = confidence(float(check_alpha("audit", settings.delta, name="delta")))
    say(
        f"Answers that certify at most {bound:g} % with a chance of 90 % "
        f"(confidence {sure}, drawn uniformly; by class so many "
        "of each, and more):\n"
    )
    say(aligned(lines))
    say("\nAt 3 to 5 seconds an answer; nothing was drawn or written.")
    return 0


def _draw(arguments: argparse.Namespace) -> int:
    from cpseg.jobs.audit import audit_by_truth, plan_audit

    settings = _settings(arguments)
    with Progress() as progress:
        audit = plan_audit(arguments.folder, settings, folder=arguments.output, progress=progress)
        if not arguments.truth:
            _write(audit, arguments, progress)
    if not arguments.truth:
        say(_drawn(audit))
        say(
            f"Open {audit.folder / 'page.html'}, answer and save the answers; then: cpseg audit "
            f"{arguments.folder} --answers FILE"
        )
        return 0
    outcome = audit_by_truth(
        audit,
        arguments.truth,
        void=arguments.void,
        unsure=arguments.unsure or "wrong",
        stricter=arguments.stricter,
    )
    say(_drawn(audit))
    return _tell(outcome, arguments.unsure)


def _drawn(audit: Audit) -> str:
    """What the plan is, in a sentence."""
    plan = audit.plan
    had = "" if audit.is_new else "the plan that is there: "
    text = f"{audit.folder}: {had}{len(plan.draws)} pixels of {plan.labels:,} labels"
    text += f" in {plan.images} images, {plan.design}"
    if plan.looking == "any" or plan.design == "focus":
        return f"{text}, looked at whenever you like"
    if plan.design == "by-class":
        numbers = [stratum.answers for stratum in plan.strata]
        return f"{text}: {min(numbers)} to {max(numbers)} of a class"
    looks = ", ".join(str(look.answers) for look in plan.strata[0].looks)
    return f"{text}, looked at after {looks} answers"


def _write(audit: Audit, arguments: argparse.Namespace, progress: Progress) -> None:
    """The page and the lists, unless they are there."""
    from PIL import Image

    from cpseg.certification.audit import confidence
    from cpseg.files.audit_files import write_label_studio, write_questions_csv
    from cpseg.report.audit_page import audit_pictures, write_audit_page

    plan, labels, questions = audit.plan, audit.labels, audit.questions
    names = _names(arguments.names, max(question.label for question in questions))

    def image(name: str) -> Image.Image:
        return Image.open(labels.root / name)

    page, table = audit.folder / "page.html", audit.folder / "questions.csv"
    if not table.exists():
        write_questions_csv(table, plan.fingerprint, questions, names)
    if not page.exists():
        write_audit_page(
            page,
            plan=plan.fingerprint,
            questions=questions,
            class_names=names,
            image=image,
            mask=lambda name: labels.read(name).numpy(),
            allowed=plan.allowed(),
            title=f"Audit of {labels.out.resolve().name}",
            statement=f"To be shown: of the {plan.labels:,} labels at most "
            f"{100 * plan.max_error:g} % are wrong, with {confidence(plan.delta)} confidence.",
            progress=progress,
        )
    tasks = audit.folder / "label_studio.json"
    if arguments.label_studio and not tasks.exists():
        pictures = audit_pictures(
            questions, image, lambda name: labels.read(name).numpy(), progress=progress
        )
        write_label_studio(tasks, plan.fingerprint, questions, names, pictures)


def _names(path: Path | None, largest: int) -> Sequence[str]:
    if path is None:
        return [f"class {index}" for index in range(largest + 1)]
    from cpseg._internal.checks import message
    from cpseg.foundation.classes import read_classes

    names = read_classes(path).names
    if len(names) <= largest:
        expected, got = f"a name for class {largest}", f"{len(names)} names"
        raise ValueError(message(str(path), expected, got, "write one name per line, in order"))
    return names


def _read(arguments: argparse.Namespace) -> int:
    from cpseg._internal.checks import check_alpha, message
    from cpseg.jobs.audit import open_audit, read_audit

    audit = open_audit(arguments.folder, root=arguments.root, folder=arguments.output)
    if arguments.delta is not None:
        delta = float(check_alpha("audit", arguments.delta, name="delta"))
        if delta != audit.plan.delta:
            expected = f"delta {audit.plan.delta:g} of the plan"
            fix = "leave it out: looks were planned for it"
            raise ValueError(message("audit", expected, f"{delta:g}", fix))
    return _tell(
        read_audit(
            audit,
            arguments.answers,
            max_error=arguments.max_error,
            unsure=arguments.unsure or "wrong",
            stricter=arguments.stricter,
        ),
        arguments.unsure,
    )


def _tell(outcome: Outcome, unsure: str | None) -> int:
    """Print what is proven; 1 where the bound asked for is not."""
    if outcome.both:
        say(
            f"{outcome.people} people: {outcome.both} pixels answered by more than one, "
            f"{outcome.disagreements} of them differently, which count as wrong"
        )
    say(str(outcome.result))
    if outcome.result.classes is not None:
        say("\n" + _classes(outcome.result, unsure == "skip"))
    for folder, result in outcome.stricter:
        say(f"{folder}: {result}")
    results = [outcome.result, *(result for _, result in outcome.stricter)]
    return 0 if any(result.certified for result in results) else 1


def _classes(result: AuditResult, skips: bool) -> str:
    from cpseg.certification.audit import confidence, percent_up
    from cpseg.jobs.estimate import aligned

    lines: list[tuple[str, ...]] = [
        ("class", "labels", "answers", "wrong", "at most"),
        ("---", *["---:"] * 4),
    ]
    for row in result.classes or ():
        bound = "-" if row.bound >= 1 else percent_up(row.bound)
        cells = (f"{row.labels:,}", str(row.answers), str(row.wrong), bound)
        lines.append((str(row.label), *cells))
    text = f"The bounds of all classes hold at once with {confidence(result.delta)} confidence"
    return f"{aligned(lines)}\n\n{text}{', of labels that a person can judge' * skips}."
