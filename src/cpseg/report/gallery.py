"""Pictures of a report: labels over photographs, with the truth beside them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpseg.core.colours import class_colours
from cpseg.files.masks import VOID
from cpseg.jobs.estimate import small_percent
from cpseg.report import overlays
from cpseg.report.findings import RAW, Findings, Panel, Rule
from cpseg.report.markup import Shot, details, note, shots
from cpseg.report.wording import base_of, in_a_sentence, labels_to_show

_RAW = Rule(RAW, "argmax")
_NAMED = 24  # classes in the legend before the rest is folded away


class _Labels(NamedTuple):
    """What a picture shows: labels of a rule."""

    title: str
    rule: Rule


def hero(findings: Findings, root: Path) -> str:
    """One image: the photograph, the labels before and after, and the truth."""
    panel = typical(findings)
    if panel is None:
        return ""
    base, rule = base_of(findings), findings.label_with
    shown = [_Labels(before(findings), base)]
    if rule != base:
        shown.append(_Labels("recommended", rule))
    wrong = [f"{label.title} {small_percent(error(panel, label.rule))}" for label in shown]
    row = shots("one-image", _pictures(panel, root, shown, findings.plan.background))
    return (
        row
        + legend(findings, [panel])
        + note(
            f"{panel.image}, wrong: {', '.join(wrong)}. Of the images shown on this page it is the "
            f"one nearest to the mean. {_key(findings)}"
        )
    )


def before(findings: Findings) -> str:
    """Whose labels the recommended ones are compared with, in a few words."""
    return "raw argmax" if findings.student is None else "student's own"


def error(panel: Panel, rule: Rule) -> float:
    """The share of a panel's labelled pixels that do not carry their true label."""
    known = panel.truth != VOID
    return float((panel.labels[rule] != panel.truth)[known].double().mean())


def typical(findings: Findings) -> Panel | None:
    """The panel whose error, of the recommended labels, is nearest to that of all images."""
    known = [panel for panel in findings.panels if bool((panel.truth != VOID).any())]
    if not known:
        return None
    mean = findings.rules[findings.label_with].estimate("error").mean
    return min(known, key=lambda panel: abs(error(panel, findings.label_with) - mean))


def gallery(findings: Findings, root: Path) -> str:
    """Every panel: photograph, labels, mistakes and truth."""
    if not findings.panels:
        return "<p>No images were asked for.</p>\n"
    kept, rule, base = labels_to_show(findings), findings.label_with, base_of(findings)
    shown = [_Labels("raw argmax", _RAW)]
    if base != _RAW:
        shown.append(_Labels("student's own", base))
    if rule not in (base, _RAW):
        shown.append(_Labels("recommended", rule))
    apart = kept not in (rule, base, _RAW)
    if apart:
        shown.append(_Labels("labels kept", kept))
    parts = []
    for number, panel in enumerate(findings.panels, 1):
        background = findings.plan.background
        pictures = _pictures(panel, root, shown, background, kept=apart, wrong=rule)
        wrong = f"Recommended labels: {small_percent(error(panel, rule))} wrong."
        if kept != rule:
            of_known = (panel.labels[kept] != VOID)[panel.truth != VOID].double().mean()
            wrong += f" Labels kept: {small_percent(float(of_known))} of the labelled pixels."
        parts.append(
            f'<article class="panel">\n<h3>{escape(panel.image)}</h3>\n<p>{escape(wrong)}</p>\n'
            f"{shots(f'image-{number}', pictures)}</article>\n"
        )
    words = ", ".join(f"{label.title}: {in_a_sentence(label.rule)}" for label in shown[1:])
    rules = f"{words[0].upper()}{words[1:]}. " if words else ""
    return (
        legend(findings, findings.panels)
        + note(
            f"{rules}{_key(findings)} Mistakes of the recommended labels are red, over the grey "
            "photograph. All labels are those of a fold that did not use the image."
        )
        + "".join(parts)
    )


def _key(findings: Findings) -> str:
    """What is not in the colours."""
    background = findings.plan.background
    bare = ""
    if background is not None:
        bare = f"Where nothing is painted the label is {findings.names[background]}. "
    return (
        f"Colours lie over the photograph. {bare}Grey stripes: true label unknown (void). Dots on "
        "pale ground: no label. Click a picture to enlarge it."
    )


def _pictures(
    panel: Panel,
    root: Path,
    shown: Sequence[_Labels],
    background: int | None,
    *,
    kept: bool = False,
    wrong: Rule | None = None,
) -> list[Shot]:
    """A photograph if there is one, labels, the truth beside them, labels kept, and mistakes."""
    truth = panel.truth.numpy()
    canvas = overlays.Canvas.over(str(root / panel.image), truth.shape)
    made = [] if canvas.photo is None else [("photograph", canvas.photo)]
    for title, rule in shown:
        labels = panel.labels[rule].numpy()
        made.append((title, overlays.overlay(canvas, labels, ignored=True, background=background)))
    painted = overlays.overlay(canvas, truth, ignored=False, background=background)
    made.insert(len(made) - kept, ("truth", painted))
    if wrong is not None:
        labels = panel.labels[wrong].numpy()
        made.append(("mistakes", overlays.mistakes(canvas, labels, truth)))
    return [Shot(title, overlays.jpeg(pixels), f"{panel.image}: {title}") for title, pixels in made]


def legend(findings: Findings, panels: Sequence[Panel]) -> str:
    """The colours of the classes that panels show, the most frequent first where they are many."""
    counts = np.zeros(256, np.int64)
    rules = {base_of(findings), findings.label_with, labels_to_show(findings), _RAW}
    for panel in panels:
        for labels in (panel.truth, *(panel.labels[rule] for rule in rules)):
            counts += np.bincount(labels.numpy().ravel(), minlength=256)
    shown = [k for k in range(findings.num_classes) if counts[k] > 0]
    if len(shown) <= _NAMED:
        return _entries(findings, shown)
    shown.sort(key=lambda k: (-counts[k], k))
    rest = _entries(findings, shown[_NAMED:])
    return _entries(findings, shown[:_NAMED]) + details(
        f"{len(shown) - _NAMED} more classes, rarer in these pictures", rest
    )


def _entries(findings: Findings, classes: Sequence[int]) -> str:
    paints = class_colours(findings.num_classes).tolist()
    entries = "\n".join(
        f'<li><span style="background: rgb({r}, {g}, {b})"></span>{escape(findings.names[k])}</li>'
        for k, (r, g, b) in ((k, paints[k]) for k in classes)
        if k != findings.plan.background
    )
    return f'<ul class="key">\n{entries}\n</ul>\n'
