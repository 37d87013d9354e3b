"""The top of a report: what to do, what it changes, one picture, and the commands."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from cpseg.jobs.estimate import number, percent, plus_minus
from cpseg.report.findings import Findings, Rule
from cpseg.report.gallery import before, hero
from cpseg.report.wording import advice, base_of, losses_of_the_recommended, verdict


def card(findings: Findings, root: Path) -> str:
    """One sentence, one pair of figures, one picture."""
    base, rule = base_of(findings), findings.label_with
    kind = "stay" if rule == base else "go"
    lost = losses_of_the_recommended(findings)
    warning = f'<p class="lost"><strong>What is lost:</strong> {escape(lost)}</p>\n' if lost else ""
    proven = (
        f"Measured by cross-validation on {findings.images} labelled images; ± is one standard "
        "error. These are estimates, not promises: see "
    )
    return (
        f'<div class="card {kind}">\n<div>\n<p class="verdict">{escape(verdict(findings))}</p>\n'
        f"{_pair(findings, base, rule)}{warning}"
        f'<p class="note">{proven}<a href="#in-words">what is guaranteed</a>.</p>\n</div>\n'
        f"<div>{hero(findings, root)}</div>\n</div>\n"
    )


def _pair(findings: Findings, base: Rule, rule: Rule) -> str:
    """Error and mIoU before and after; of the base alone if it is what is recommended."""
    every = all(findings.rules[each].estimate("kept").mean == 1 for each in (base, rule))
    titles = ("Wrong pixels" if every else "Pixels wrong or without a label", "mIoU, all pixels")
    rows = []
    for title, figure, share in zip(titles, ("error", "miou_all"), (True, False), strict=True):
        shown = []
        for label, each in ((before(findings), base), ("recommended", rule)):
            value = findings.rules[each].estimate(figure)
            text = percent(value.mean) if share else number(value.mean)
            spread = plus_minus(value, share=share).partition(" ")[2]
            shown.append(
                f'<span class="value"><strong>{text}</strong> <small>{escape(label)}</small> '
                f"<small>{spread}</small></span>"
            )
        values = shown[:1] if rule == base else shown
        arrow = ' <span class="arrow" aria-hidden="true">→</span> '
        rows.append(f"<div><dt>{title}</dt><dd>{arrow.join(values)}</dd></div>\n")
    return f'<dl class="pair">\n{"".join(rows)}</dl>\n'


def commands(findings: Findings, lines: Sequence[str]) -> str:
    """The commands that make the recommended labels, each to be copied by itself."""
    if not lines and findings.label_with == findings.students_own:
        return (
            "<p>No labels are to be made: train the student on the labelled images alone, as for "
            "its scores.</p>\n"
        )
    if not lines:
        return (
            "<p>This page was made without the names of the files: <code>cpseg report</code> "
            "writes the commands.</p>\n"
        )
    shown = "\n".join(f"<pre><code>{_unbroken(line)}</code></pre>" for line in lines)
    return (
        "<p>These lines make the recommended labels, and plan the audit that bounds their error. "
        f"A click selects a line.</p>\n{shown}\n"
    )


def _unbroken(line: str) -> str:
    """A command in which a line does not end within the name of an option."""
    words = (escape(word) for word in line.split(" "))
    return " ".join(
        f'<span class="pm">{word}</span>' if word.startswith("-") else word for word in words
    )


def in_words(findings: Findings) -> str:
    """The three paragraphs: labels for every pixel, labels to keep, guarantees."""
    titles = ("Labels for every pixel", "Labels to keep", "What is guaranteed")
    return "\n".join(
        f"<h3>{title}</h3>\n<p>{escape(text)}</p>"
        for title, text in zip(titles, advice(findings), strict=True)
    )
