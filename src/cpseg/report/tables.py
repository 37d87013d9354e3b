"""The tables of a report: rules for every pixel, all rules, and classes."""

from __future__ import annotations

from collections.abc import Sequence

from cpseg.jobs.calibrate import images_needed
from cpseg.jobs.estimate import Estimate, plus_minus, small_percent
from cpseg.report.findings import RAW, Findings, Rule, scores_in_words, tried_for_labels
from cpseg.report.markup import Group, Row, details, note, table
from cpseg.report.wording import (
    change,
    in_a_sentence,
    labels_to_show,
    lost_classes,
    recommended_to_keep,
)

_RAW = Rule(RAW, "argmax")
RECOMMENDED = "recommended"


def labels(findings: Findings) -> str:
    """Every rule that may label for a student, beside the one that it must beat."""
    tried = tried_for_labels(findings.rules, findings.sources, findings.student)
    titles = {"argmax": "sources as they are", "labels": "maps", "eq4": "thresholds of eq. 4"}
    groups: dict[str, list[Row]] = {}
    for place, rule in enumerate(tried):
        measured = findings.rules[rule]
        if rule.kind == "eq4" and not _listed(rule, findings):
            continue
        changes = ("–", "–") if place == 0 else change(findings, rule)
        own = rule.kind == "labels" and rule.scores.endswith(" as it is")
        miou = plus_minus(measured.estimate("miou_all"), share=False)
        best = rule == findings.label_with
        row = Row(
            (
                rule.name if rule.kind == "eq4" else _title(rule),
                miou,
                plus_minus(measured.estimate("error")),
                *changes,
            ),
            marked=best,
            mark=RECOMMENDED if best else "",
            remark=lost_classes(findings, rule),
        )
        groups.setdefault(titles["argmax" if own else rule.kind], []).append(row)
    base = "the raw argmax of the first source" if findings.student is None else tried[0].name
    header = ("labels", "mIoU", "error", "change in mIoU", "change in error, points")
    return table(
        "Labels for every pixel, by cross-validation",
        header,
        [Group(title, _without_twins(rows)) for title, rows in groups.items()],
        stacked=True,
    ) + note(
        f"Changes are against {base}, image by image (± one standard error, jackknife). A map "
        "recalibrates the scores of its sources, and every pixel gets its most probable class. "
        "Maps are fitted on all training "
        "images of a fold, since labels for every pixel need no thresholds; pixels without a label "
        "count as wrong. A student gains by labels that are better than those it gives by itself. "
        "Rules that lose at least a quarter of the classes that the raw argmax finds are not "
        "recommended."
    )


def rules(findings: Findings) -> str:
    """Every rule, in groups by the scores that it reads."""
    kept = [rule for rule in findings.keep.values() if recommended_to_keep(findings, rule)]
    groups: dict[str, list[Row]] = {name: [] for name in findings.reliability}
    for rule, measured in findings.rules.items():
        if not _listed(rule, findings):
            continue
        cells = [
            plus_minus(measured.estimate(name), share=False) for name in ("miou_all", "miou_kept")
        ]
        cells += [
            plus_minus(measured.estimate(name)) for name in ("error", "kept", "wrong", "coverage")
        ]
        best = rule in (findings.label_with, *kept)
        mark = RECOMMENDED if best else ""
        if rule.kind == "certified" and not best:
            proven = sum(proof.certified for proof in measured.certificates)
            mark = f"certified in {proven} of {findings.plan.folds} folds"
        loses = rule.kind != "certified" or any(p.certified for p in measured.certificates)
        remark = lost_classes(findings, rule) if loses else ""
        groups[rule.scores].append(Row((_title(rule), *cells), best, mark, remark))
    header = ("rule", "mIoU all", "mIoU kept", "error", "kept", "wrong", "coverage")
    named = [
        Group(scores_in_words(name), _without_twins(rows)) for name, rows in groups.items() if rows
    ]
    return (
        table("All rules, by cross-validation", header, named, stacked=True)
        + note(
            "Mean ± standard error over folds. mIoU all: over all pixels, those without a label "
            "counted as wrong; mIoU kept: over pixels with a label. Error: share of all pixels "
            "without their true label; kept: share that carries a label; wrong: "
            "share of these that are wrong; coverage: share of pixels whose class is in the "
            "prediction set, where a rule has sets. Folds share training images, so true standard "
            "errors are somewhat larger."
        )
        + _infinite(findings)
    )


def _title(rule: Rule) -> str:
    return rule.name if rule == _RAW else rule.choice


def _without_twins(rows: Sequence[Row]) -> list[Row]:
    """Rows with the same figures as an earlier one of the group are named there instead."""
    kept: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        kept.setdefault((*row.cells[1:], row.remark), []).append(row)
    return [_merged(twins) for twins in kept.values()]


def _merged(twins: Sequence[Row]) -> Row:
    """One row for all; that of the marked one, if there is one, comes first."""
    first, *others = sorted(twins, key=lambda row: not row.marked)
    if not others:
        return first
    same = f"Same figures: {'; '.join(row.cells[0] for row in others)}."
    return first._replace(remark=f"{first.remark} {same}".strip())


def _listed(rule: Rule, findings: Findings) -> bool:
    """Whether a rule has a row among all rules; other alphas and confidences are in the picture."""
    if rule.kind == "eq4":
        return rule.level == findings.plan.asked or rule == findings.label_with
    return rule.kind != "labels" and (rule.kind != "confidence" or rule.level in (0.9, 0.7))


def _infinite(findings: Findings) -> str:
    asked = [
        rule for rule in findings.rules if rule.kind == "eq4" and rule.level == findings.plan.asked
    ]
    shares = [Estimate.over(findings.rules[rule].infinite).mean for rule in asked]
    if not any(share > 0 for share in shares):
        return ""
    plan = findings.plan
    return note(
        f"In folds, up to {small_percent(max(shares))} of the thresholds at alpha {plan.asked:g} "
        f"are infinite and admit every class: this alpha needs {images_needed(plan.alpha)} scores "
        "for each threshold. All images together, or pooled cells, may be enough."
    )


def classes(findings: Findings) -> str:
    """Recall per class of the rules on show; how many pixels, and precision, on request."""
    kept, columns = labels_to_show(findings), {"raw argmax": _RAW}
    if findings.label_with != _RAW:
        columns[RECOMMENDED] = findings.label_with
    apart = kept not in columns.values()
    if apart:
        columns["labels kept"] = kept
    which = "; ".join(f"{title}: {in_a_sentence(rule)}" for title, rule in columns.items())
    recall = table(
        "Recall of each class: the share of its pixels that carry its label",
        ("class", "images", *columns),
        [Group("", _recall_rows(findings, list(columns.values())))],
    )
    precision = table(
        "Precision of each class: of the pixels that carry its label, the share that are of it",
        ("class", "labelled pixels", *columns, *(["kept share"] if apart else [])),
        [Group("", _precision_rows(findings, list(columns.values()), kept if apart else None))],
        stacked=True,
    )
    share = (
        "Kept share: of the pixels of a class, those that carry a label under the rule of the "
        "labels kept, whatever label it is. "
    )
    return (
        recall
        + note(
            f"{which[0].upper()}{which[1:]}. Over all pixels of all folds, those without a label "
            "counted as wrong. ▼: more than half of the recall of the raw argmax is lost. A dash: "
            "no such pixel."
        )
        + details(
            "Pixels and precision of each class",
            precision + note(f"{share if apart else ''}A dash: no such pixel."),
        )
    )


def _recall_rows(findings: Findings, rules: Sequence[Rule]) -> list[Row]:
    recalls = [findings.rules[rule].recall() for rule in rules]
    lost = [findings.loss(rule).classes for rule in rules]
    rows = []
    for k, (name, images) in enumerate(
        zip(findings.names, findings.images_of_class.tolist(), strict=True)
    ):
        shares = [
            small_percent(recall[k]) + (" ▼" if k in gone else "")
            for recall, gone in zip(recalls, lost, strict=True)
        ]
        rows.append(Row((name, str(images), *shares)))
    return rows


def _precision_rows(findings: Findings, rules: Sequence[Rule], kept: Rule | None) -> list[Row]:
    totals = [findings.rules[rule].total().double() for rule in rules]
    columns = [(total.diagonal() / total[:, :-1].sum(0)).tolist() for total in totals]
    if kept is not None:
        total = findings.rules[kept].total().double()
        columns.append((1 - total[:, -1] / total.sum(1)).tolist())
    pixels = totals[0].sum(1).long().tolist()
    return [
        Row((name, str(count), *map(small_percent, values)))
        for name, count, *values in zip(findings.names, pixels, *columns, strict=True)
    ]
