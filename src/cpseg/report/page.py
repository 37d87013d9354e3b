"""The page of ``cpseg report``: one static file in HTML, with its words, tables and pictures."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from cpseg._internal.safe_files import write_text
from cpseg._version import __version__
from cpseg.core.reliability import ProperScores
from cpseg.files.dataset import Progress, Source, quiet
from cpseg.jobs.calibrate import images_needed
from cpseg.jobs.estimate import Estimate, plus_minus, small_percent
from cpseg.report import plots
from cpseg.report.findings import RAW, Findings, Measured, Plan, Rule, tried_for_labels
from cpseg.report.measure import gather
from cpseg.report.wording import advice, change, labels_to_show

SHARES = tuple(number / 10 for number in range(1, 11))  # rows of the table of the curves
_STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; max-width: 52rem; padding: 0 1rem 3rem; background: #fff; color: #111;
  font: 1rem/1.5 system-ui, sans-serif }
h1 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 2px solid #111 }
.box { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ccc; text-align: right;
  white-space: nowrap }
th { vertical-align: bottom } th:first-child, td:first-child { text-align: left }
td:first-child { white-space: normal; min-width: 9rem }
figure { margin: 1rem 0 } figcaption, .note { font-size: .9rem; color: #333 }
img { width: 100%; height: auto; display: block }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr));
  gap: 1rem }
.plots > * { min-width: 0 } body { overflow-wrap: break-word }
.plots figure { margin: 0; max-width: 30rem }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .5rem;
  margin: 0 0 1.5rem }
.panels figure { margin: 0 } .panels img { image-rendering: pixelated; border: 1px solid #999 }
.key { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem }
.key span { display: inline-block; width: 1rem; height: 1rem; border: 1px solid #111;
  vertical-align: -.15rem; margin-right: .3rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f3f3f3; padding: .6rem }
@media print {
  body { max-width: none; font-size: 9.5pt } .box { overflow: visible }
  table { font-size: 8pt } th, td { padding: .1rem .3rem; white-space: normal }
  figure, tr, .panels { break-inside: avoid } h2, h3 { break-after: avoid }
  .key span, img { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""


def report(
    source: Source,
    ids: str | Path,
    plan: Plan,
    out: str | Path,
    *,
    made_by: str = "",
    progress: Progress = quiet,
) -> Findings:
    """Measure the rules of a plan on labelled images and write the page about them, atomically.

    Args:
        source: the data set and the probabilities; evidence is refused.
        ids: id list of labelled images, whose first column is shown.
        plan: what to try.
        out: the HTML file to write.
        made_by: the command, to be shown.
        progress: wraps the loops over images.

    Raises:
        ImportError: matplotlib is missing; names the extra.
        ValueError: bad settings or files, too few images for the folds, or several processes.
        OSError: a file that cannot be read or written.
    """
    plots.require()
    findings = gather(source, ids, plan, progress=progress)
    write_text(out, page(findings, root=source.root, made_by=made_by))
    return findings


def page(findings: Findings, *, root: str | Path, made_by: str = "") -> str:
    """The report as HTML: no script, nothing to fetch, the same text for the same findings.

    Args:
        findings: the measured figures.
        root: the folder of the images; one that cannot be opened is left out.
        made_by: the command, to be shown.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    plots.require()
    named = findings.plan.names or [f"class {k}" for k in range(findings.num_classes)]
    sections = [
        ("Recommendation", _recommendation(findings)),
        ("Labels for a student", _labels(findings)),
        ("Rules", _rules(findings)),
        ("Reliability of the scores", _reliability(findings)),
        ("Error against the share kept", _curves(findings)),
        ("Thresholds", _thresholds(findings)),
        ("Classes", _classes(findings, named)),
        ("Images", _panels(findings, Path(root), named)),
        ("How this was made", _making(findings, made_by)),
    ]
    body = "\n".join(
        f"<section>\n<h2>{title}</h2>\n{content}\n</section>" for title, content in sections
    )
    title = "Pseudo-labels: which rule, and how far to trust it"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def _recommendation(findings: Findings) -> str:
    return "\n".join(f"<p>{escape(text)}</p>" for text in advice(findings))


def _labels(findings: Findings) -> str:
    """Every rule that may label for a student, beside the one that it must beat."""
    tried = tried_for_labels(findings.rules, findings.sources, findings.student)
    rows = []
    for place, rule in enumerate(tried):
        measured = findings.rules[rule]
        if rule.kind == "eq4" and not _listed(rule, findings):
            continue
        changes = ("", "") if place == 0 else change(findings, rule)
        name = rule.name + (" (recommended)" if rule == findings.label_with else "")
        miou = plus_minus(measured.estimate("miou_all"), share=False)
        rows.append((name, miou, plus_minus(measured.estimate("error")), *changes))
    base = "the raw argmax of the first source" if findings.student is None else tried[0].name
    header = ("labels", "mIoU", "error", "change in mIoU", "change in error, points")
    return _table(header, rows) + _note(
        f"Changes are against {base}, paired over folds. Maps are fitted on all training images of "
        "a fold, since labels for every pixel need no thresholds; pixels without a label count as "
        "wrong. A student gains by labels that are better than those it gives by itself."
    )


def _rules(findings: Findings) -> str:
    chosen = {findings.label_with, *(rule for rule in findings.keep.values() if rule is not None)}
    rows = []
    for rule, measured in findings.rules.items():
        if not _listed(rule, findings):
            continue
        cells = [
            plus_minus(measured.estimate(name), share=False) for name in ("miou_all", "miou_kept")
        ]
        cells += [
            plus_minus(measured.estimate(name)) for name in ("error", "kept", "wrong", "coverage")
        ]
        rows.append((rule.name + (" (recommended)" if rule in chosen else ""), *cells))
    header = ("rule", "mIoU all", "mIoU kept", "error", "kept", "wrong", "coverage")
    return (
        _table(header, rows)
        + _note(
            "Mean ± standard error over folds. mIoU all: over all pixels, those without a label "
            "counted as wrong; mIoU kept: over pixels with a label. Error: share of all pixels "
            "without their true label; kept: share that carries a label; wrong: "
            "share of these that are wrong; coverage: share of pixels whose class is in the "
            "prediction set, where a rule has sets. Folds share training images, so true standard "
            "errors are somewhat larger."
        )
        + _infinite(findings)
    )


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
    return _note(
        f"In folds, up to {small_percent(max(shares))} of the thresholds at alpha {plan.asked:g} "
        f"are infinite and admit every class: this alpha needs {images_needed(plan.alpha)} scores "
        "for each threshold. All images together, or pooled cells, may be enough."
    )


def _reliability(findings: Findings) -> str:
    rows, figures = [], []
    for place, (name, folds) in enumerate(findings.reliability.items()):
        scores = [fold.scores() for fold in folds]
        cells = [
            plus_minus(Estimate.over([getattr(each, field) for each in scores]), share=False)
            for field in ProperScores._fields
        ]
        rows.append((_scores_name(name), *cells))
        figures.append(_diagram(findings, name, place))
    header = ("scores", "NLL", "Brier", "class-wise ECE", "ECE", "area, error against kept")
    first = next(iter(findings.reliability.values()))
    unlikely = sum(fold.unlikely for fold in first) / max(sum(fold.pixels for fold in first), 1)
    return (
        '<div class="plots">\n'
        + "\n".join(figures)
        + "\n</div>\n"
        + _table(header, rows)
        + _note(
            "Smaller is better everywhere. For points on the dotted line the share of right pixels "
            "equals their confidence; bars on points are standard errors over folds. "
            "NLL, Brier score and class-wise calibration error judge the scores divided by their "
            "sum; scores below a millionth count as that in NLL "
            f"({small_percent(unlikely)} of pixels before recalibration). The area is that below "
            "the curve of the next section."
        )
    )


def _diagram(findings: Findings, name: str, place: int) -> str:
    folds = [fold.diagram() for fold in findings.reliability[name]]
    pixels = torch.stack([fold.pixels for fold in folds]).double()
    weights = pixels / pixels.sum(0)
    each = torch.stack([fold.accuracy for fold in folds])
    spread = [Estimate.over(column.tolist()).se for column in each.T]
    confidence, accuracy = (
        (weights * torch.stack(parts).nan_to_num()).sum(0).cpu().numpy()
        for parts in ([fold.confidence for fold in folds], [fold.accuracy for fold in folds])
    )
    share = (pixels.sum(0) / pixels.sum()).cpu().numpy()
    source = plots.reliability(confidence, accuracy, np.array(spread), share, style=place)
    title = _scores_name(name)
    ece = Estimate.over([fold.scores().ece for fold in findings.reliability[name]]).mean
    return _figure(
        source,
        f"Reliability diagram of the {title}: share of right pixels against confidence in 15 bins, "
        f"and the share of pixels in each; expected calibration error {ece:.3f}.",
        title[0].upper() + title[1:],
    )


def _curves(findings: Findings) -> str:
    families = list(findings.reliability)
    series = [*_lines(findings), *_points(findings)]
    highest = max(1.35 * max(float(np.nanmax(one.y)) for one in series if one.kind == "line"), 0.02)
    highest = min(highest, 1.0)
    above = sum(int((one.y > highest).sum()) for one in series)
    beyond = f" Above the picture: {above} points." if above else ""
    picture = _figure(
        plots.error_against_kept(series, highest=highest),
        "Error rate of the pixels kept against the share kept; the table holds the lines' values.",
        "Lines: pixels in the order of their confidence, with a band of one standard error over "
        "folds. Hollow points: constant confidences, and eq. 4 at several alphas. Stars: certified "
        "rules." + beyond,
    )
    tables = [
        _over_folds([fold.error_at(torch.tensor(SHARES)).tolist() for fold in folds])
        for folds in findings.reliability.values()
    ]
    cells = [
        (f"{100 * share:.0f} %", *map(plus_minus, row))
        for share, *row in zip(SHARES, *tables, strict=True)
    ]
    table = _table(("share kept", *map(_scores_name, families)), cells)
    note = _note("Wrong pixels among the most confident ones, mean ± standard error over folds.")
    return f'<div class="plots">\n{picture}\n<div>{table}{note}</div>\n</div>\n'


def _lines(findings: Findings) -> list[plots.Series]:
    """For each kind of scores the error rate of the most confident pixels, with its band."""
    shares = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    made = []
    for place, (name, folds) in enumerate(findings.reliability.items()):
        estimates = _over_folds([fold.error_at(shares).tolist() for fold in folds])
        mean, se, _ = np.array(estimates).T
        title = f"{_scores_name(name)}, most confident first"
        made.append(plots.Series(title, shares.numpy(), mean, 0 * se, se, place, "line"))
    return made


def _points(findings: Findings) -> list[plots.Series]:
    """The other rules, each at the share it keeps; without kept pixels there is no error rate."""
    titles: dict[tuple[str, int, str], list[tuple[Estimate, Estimate]]] = {}
    families = list(findings.reliability)
    for rule, measured in findings.rules.items():
        if rule.kind == "labels":
            continue
        place, by = families.index(rule.scores), _scores_name(rule.scores)
        if rule.kind == "confidence":
            key = (f"constant confidence, {by}", place, "points")
        elif rule.kind == "eq4" and rule.scores == RAW:
            how = "without suppression" if rule.background is None else "with suppression"
            key = (f"eq. 4, {by}, {how}", 4 + (rule.background is not None), "points")
        elif rule.kind == "certified":
            key = (f"certified, {by}", place, "stars")
        else:
            continue
        kept, wrong = measured.estimate("kept"), measured.estimate("wrong")
        if wrong.folds > 0:
            titles.setdefault(key, []).append((kept, wrong))
    made = []
    for (title, style, kind), both in titles.items():
        x, y, x_se, y_se = np.array([(k.mean, w.mean, k.se, w.se) for k, w in both]).T
        made.append(plots.Series(title, x, y, x_se, y_se, style, kind))
    return made


def _thresholds(findings: Findings) -> str:
    made = findings.calibration
    asked = f"Eq. 4 at alpha {made.alpha:g} on the raw scores of all {made.num_images} images"
    if findings.plan.variant == "image":
        value, count = float(made.threshold.flatten()[0]), int(made.count.flatten()[0])
        return f"<p>{asked}: one threshold for all cells, {value:.4f}, from {count} scores.</p>"
    range_ = f"{int(made.count.min())} to {int(made.count.max())}"
    infinite = small_percent(made.infinite_share)
    pictures = [
        _figure(plots.grid_map(values.cpu().numpy(), label=label), f"Map of the {label}.", caption)
        for values, label, caption in (
            (made.threshold, "threshold on 1 − score", f"Thresholds; {infinite} are infinite."),
            (made.count, "scores behind a threshold", f"Counts, {range_}; fewer where void."),
        )
    ]
    low, middle, high = (
        f"{float(value):.4f}"
        for value in made.threshold.flatten()
        .double()
        .cpu()
        .quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), interpolation="nearest")
    )
    return (
        f"<p>{asked}, {findings.plan.variant}: a class is in the set of a pixel where 1 − score is "
        f"at most the threshold. Deciles 1, 5 and 9 of the thresholds: {low}, {middle}, {high}."
        '</p>\n<div class="plots">\n' + "\n".join(pictures) + "\n</div>"
    )


def _classes(findings: Findings, names: Sequence[str]) -> str:
    columns = [("raw argmax", Rule(RAW, "argmax"), False)]
    if findings.label_with != columns[0][1]:
        columns.append(("recommended labels", findings.label_with, False))
    kept = labels_to_show(findings)
    columns.append(("labels kept", kept, True))
    header = ["class", "images", "labelled pixels"]
    parts = []
    for title, rule, with_kept in columns:
        confusion = _total(findings.rules[rule])
        right = confusion.diagonal().double()
        parts.append((right / confusion[:, :-1].sum(0)).tolist())
        parts.append((right / confusion.sum(1)).tolist())
        header += [f"{title}: precision", "recall"]
        if with_kept:
            parts.append((1 - confusion[:, -1] / confusion.sum(1).double()).tolist())
            header.append("kept share")
    pixels = _total(findings.rules[Rule(RAW, "argmax")]).sum(1).tolist()
    rows = [
        (name, str(int(images)), str(count), *(small_percent(value) for value in values))
        for name, images, count, *values in zip(
            names, findings.images_of_class, pixels, *parts, strict=True
        )
    ]
    return _table(header, rows) + _note(
        f"Over all folds. Labels kept: {kept.name}. Precision: of the pixels that carry the "
        "class's label; recall and kept share: of the pixels that are of the class, whatever label "
        "they carry. A dash: no such pixel."
    )


def _total(measured: Measured) -> torch.Tensor:
    return torch.stack(measured.confusion).sum(0)


def _panels(findings: Findings, root: Path, names: Sequence[str]) -> str:
    kept = labels_to_show(findings)
    parts = []
    for panel in findings.panels:
        truth = panel.truth.numpy()
        raw = Rule(RAW, "argmax")
        shown = [("raw argmax", panel.labels[raw].numpy(), False)]
        if findings.label_with not in (raw, kept):
            labels = panel.labels[findings.label_with].numpy()
            shown.append((f"labels: {findings.label_with.name}", labels, True))
        chosen = panel.labels[kept].numpy()
        shown.append((f"labels kept: {kept.name}", chosen, True))
        pictures = [
            (title, plots.labels_picture(labels, ignored=ignored))
            for title, labels, ignored in shown
        ]
        pictures.append(("mistakes of the labels kept", plots.mistakes_picture(chosen, truth)))
        pictures.append(("truth", plots.labels_picture(truth, ignored=False)))
        photo = plots.photograph(str(root / panel.image), truth.shape)
        if photo is not None:
            pictures.insert(0, ("image", photo))
        of_known = (chosen != 255)[truth != 255]
        share = f" {small_percent(float(of_known.mean()))} of its labelled pixels keep a label."
        figures = "\n".join(
            _figure(source, f"{panel.image}: {title}", title) for title, source in pictures
        )
        caption = f"<p><strong>{escape(panel.image)}</strong>.{share}</p>"
        parts.append(f'{caption}\n<div class="panels">\n{figures}\n</div>')
    key = "\n".join(
        f'<li><span style="background: rgb({r}, {g}, {b})"></span>{escape(name)}</li>'
        for name, (r, g, b) in zip(names, plots.class_colours(len(names)).tolist(), strict=True)
    )
    note = _note(
        "Colours as in mask files. Grey stripes: no label; white: true label unknown. Mistakes: "
        "wrong labels are black, right ones light grey. The labels are those of a fold that did "
        "not use the image."
    )
    return f'<ul class="key">\n{key}\n</ul>\n{note}' + "\n".join(parts)


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
    return (
        command
        + _table(("", ""), facts)
        + _note(
            "No figure on this page was measured on images that were used to make the rule: not to "
            "recalibrate, not to set thresholds, not for its certificate. With raw scores, eq. 4 "
            "is calibrated on both training parts of a fold; with recalibrated scores, on the "
            "second. Only the threshold map is made from all images."
        )
    )


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _over_folds(values: Sequence[Sequence[float]]) -> list[Estimate]:
    """One estimate per column, from one row per fold."""
    return [Estimate.over(column) for column in zip(*values, strict=True)]


def _scores_name(name: str) -> str:
    return "raw scores" if name == RAW else f"recalibrated scores ({name})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="box"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n'
        "</tbody>\n</table></div>\n"
    )


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>\n'


def _figure(source: str, alt: str, caption: str) -> str:
    return (
        f'<figure><img src="{source}" alt="{escape(alt)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
