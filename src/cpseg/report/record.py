"""The findings of a report as JSON: what is recommended, every rule's figures and commands."""

from __future__ import annotations

import math
from typing import Any

from cpseg.jobs.estimate import Estimate
from cpseg.report.commands import DataWords, commands_of
from cpseg.report.findings import RAW, Findings, Rule
from cpseg.report.wording import advice, in_a_sentence

FIGURES = ("miou_all", "error", "kept", "wrong")


def record(findings: Findings, data: DataWords, *, colour: bool = False) -> dict[str, Any]:
    """What the page says, for programs.

    Args:
        findings: those of the report.
        data: how the data set is named on the command line.
        colour: whether the images' colours are a source of every map.

    Returns:
        ``recommended``, ``base`` (what it must be better than) and ``keep`` (by the bound on the
        error) name rules; ``student`` is the source that is a student's, if one is;
        ``labels_alone`` says that a student should be trained on the labelled images alone;
        ``certified_rules`` is among how many rules ``keep`` chose, whose commands certify with
        ``delta`` divided by it; ``advice`` are the paragraphs of the page; ``promise`` is that of
        eq. 4; ``rules`` has for every rule its kind, its figures (mean and standard error over
        folds, null where there are none) and the words of the commands that make it, none for a
        constant confidence.
    """
    own = findings.students_own
    base = Rule(RAW, "argmax") if own is None else own
    rules = {}
    for rule, measured in findings.rules.items():
        made = rule.kind != "confidence"
        rules[rule.name] = {
            "in_words": in_a_sentence(rule),
            "kind": rule.kind,
            "scores": rule.scores,
            "background": rule.background,
            "level": rule.level,
            "figures": {name: _figure(measured.estimate(name)) for name in FIGURES},
            "commands": commands_of(findings, rule, data, colour=colour) if made else None,
        }
    return {
        "recommended": findings.label_with.name,
        "base": base.name,
        "student": None if findings.student is None else findings.sources[findings.student],
        "labels_alone": findings.label_with == own,
        "certified_rules": findings.certified_rules,
        "delta": findings.plan.delta,
        "keep": {
            f"{bound:g}": None if rule is None else rule.name
            for bound, rule in findings.keep.items()
        },
        "images": findings.images,
        "folds": findings.plan.folds,
        "promise": findings.calibration.guarantee(),
        "advice": advice(findings),
        "rules": rules,
    }


def _figure(value: Estimate) -> dict[str, float | None]:
    return {name: None if math.isnan(each) else each for name, each in value._asdict().items()}
