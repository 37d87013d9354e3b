"""The page of ``cpseg report``: one static file in HTML, from what to do down to the details."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path

from cpseg._internal.safe_files import write_text
from cpseg._version import __version__
from cpseg.files.dataset import Progress, Source, quiet
from cpseg.report import diagrams, plots, tables, verdict
from cpseg.report.commands import DataWords, next_commands
from cpseg.report.findings import Findings, Plan
from cpseg.report.gallery import gallery
from cpseg.report.markup import Group, Row, contents, note, section, table
from cpseg.report.measure import gather

TITLE = "Pseudo-labels: which rule, and how far to trust it"
_STYLE = "page.css"


def report(
    source: Source,
    ids: str | Path,
    plan: Plan,
    out: str | Path,
    *,
    made_by: str = "",
    data: DataWords | None = None,
    progress: Progress = quiet,
) -> Findings:
    """Measure the rules of a plan on labelled images and write the page about them, atomically.

    Args:
        source: the data set and the probabilities; evidence is refused.
        ids: id list of labelled images, whose first column is shown.
        plan: what to try.
        out: the HTML file to write.
        made_by: the command, to be shown.
        data: how the data set is named in the commands that the page recommends.
        progress: wraps the loops over images.

    Raises:
        ImportError: matplotlib is missing; names the extra.
        ValueError: bad settings or files, too few images for the folds, or several processes.
        OSError: a file that cannot be read or written.
    """
    plots.require()
    findings = gather(source, ids, plan, progress=progress)
    lines = next_commands(findings, source, ids, data=data)
    write_text(out, page(findings, root=source.root, commands=lines, made_by=made_by))
    return findings


def page(
    findings: Findings, *, root: str | Path, commands: Sequence[str] = (), made_by: str = ""
) -> str:
    """The report as HTML: no script, nothing to fetch, the same text for the same findings.

    Args:
        findings: the measured figures.
        root: the folder of the images; one that cannot be opened is left out.
        commands: the lines that make the recommended labels, see
            :func:`cpseg.report.commands.next_commands`.
        made_by: the command, to be shown.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    plots.require()
    folder = Path(root)
    top = [
        ("What to do", verdict.card(findings, folder)),
        ("Commands", verdict.commands(findings, commands)),
    ]
    rest = [
        ("In words", verdict.in_words(findings)),
        ("Labels for a student", tables.labels(findings)),
        ("Classes", tables.classes(findings)),
        ("Images", gallery(findings, folder)),
        ("Rules", tables.rules(findings)),
        ("Error against the share kept", diagrams.curves(findings)),
        ("Reliability of the scores", diagrams.reliability(findings)),
        ("Thresholds", diagrams.thresholds(findings)),
        ("How this was made", _making(findings, made_by)),
    ]
    body = "\n".join(
        [
            *(section(title, content) for title, content in top),
            contents([title for title, _ in rest]),
            *(section(title, content) for title, content in rest),
        ]
    )
    style = Path(__file__).with_name(_STYLE).read_text(encoding="utf-8")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{TITLE}</h1>\n</header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _making(findings: Findings, made_by: str) -> str:
    plan = findings.plan
    background = "none" if plan.background is None else str(plan.background)
    context = plan.context if isinstance(plan.context, str) else ", ".join(plan.context)
    absent = ", ".join(map(str, findings.absent))
    bounds = ", ".join(f"{bound:g}" for bound in plan.bounds) or "none"
    fitting, proving, testing = (sorted(set(each)) for each in zip(*findings.used, strict=True))
    packages = [("Python", platform.python_version()), ("cpseg", __version__)]
    packages += [(name, version(name)) for name in ("torch", "numpy", "scipy", "matplotlib")]
    facts = [
        ("images", f"{findings.images}, each measured once"),
        ("folds", f"{plan.folds}, seed {plan.seed}"),
        ("images per fold for recalibration and certified thresholds", _range(fitting)),
        ("images per fold for calibration and certification", _range(proving)),
        ("images per fold for testing", _range(testing)),
        ("alpha, variant", f"{plan.asked:g}, {plan.variant}"),
        ("background", background),
        ("recalibration", ", ".join(findings.reliability)),
        ("context", context or "none"),
        ("scores of the model", plan.scores),
        ("classes without images for recalibration in some fold", absent or "none"),
        ("bounds certified", f"{bounds}; delta {plan.risk:g} for each, per {plan.per}"),
        ("versions", ", ".join(f"{name} {number}" for name, number in packages)),
    ]
    command = f"<pre>{escape(made_by)}</pre>\n" if made_by else ""
    made = table("Settings and counts", ("what", "value"), [Group("", list(map(Row, facts)))])
    return (
        command
        + made.replace('class="figures"', 'class="facts"')
        + note(
            "No figure on this page was measured on images that were used to make the rule: not to "
            "recalibrate, not to set thresholds, not for its certificate. With raw scores, eq. 4 "
            "is calibrated on both training parts of a fold; with recalibrated scores, on the "
            "second. Only the threshold map is made from all images."
        )
        + note(_others_say(plan))
    )


def _others_say(plan: Plan) -> str:
    """Why other commands may give other figures, or another winner, for the same images."""
    return (
        "Other commands on the same data may name another winner. cpseg sweep with "
        f"--folds {plan.folds} --seed {plan.seed} measures the raw scores on the same test images "
        "with the same figures; but it names the best row, by chance or not, where this page asks "
        "for a gain beyond one standard error, and it lists no maps that are fitted on all "
        "training images. cpseg demo calibrates at alpha 0.1 on all labelled images and counts on "
        "its unlabelled ones, students on held-out ones; here eq. 4 is shown at alpha "
        f"{plan.asked:g}, on labelled images alone. The best alpha to suppress a class differs: a "
        "smaller one puts more classes in each set, and suppression then takes more pixels from "
        "the background."
    )


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
