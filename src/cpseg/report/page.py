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
from cpseg.report.findings import RAW, Findings, Measured, Plan, Rule
from cpseg.report.measure import gather
from cpseg.report.wording import advice, labels_to_show

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
        source: the data set and the class scores; evidence will not do.
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
    found = gather(source, ids, plan, progress=progress)
    write_text(out, page(found, root=source.root, made_by=made_by))
    return found


def page(found: Findings, *, root: str | Path, made_by: str = "") -> str:
    """The report as HTML: no script, nothing to fetch, the same text for the same findings.

    Args:
        found: what the job measured.
        root: the folder of the images; one that cannot be opened is left out.
        made_by: the command, to be shown.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    plots.require()
    named = found.plan.names or [f"class {k}" for k in range(found.num_classes)]
    sections = [
        ("Recommendation", _recommendation(found)),
        ("Rules", _rules(found)),
        ("Reliability of the scores", _reliability(found)),
        ("Error against the share kept", _curves(found)),
        ("Thresholds", _thresholds(found)),
        ("Classes", _classes(found, named)),
        ("Images", _panels(found, Path(root), named)),
        ("How this was made", _making(found, made_by)),
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


def _recommendation(found: Findings) -> str:
    return "\n".join(f"<p>{escape(text)}</p>" for text in advice(found))


def _rules(found: Findings) -> str:
    chosen = {found.label_with, *(rule for rule in found.keep.values() if rule is not None)}
    rows = []
    for rule, measured in found.rules.items():
        if not _listed(rule, found):
            continue
        cells = [
            plus_minus(measured.estimate(name), share=False) for name in ("miou_all", "miou_kept")
        ]
        cells += [
            plus_minus(measured.estimate(name)) for name in ("error", "kept", "wrong", "coverage")
        ]
        rows.append((rule.name + (" (recommended)" if rule in chosen else ""), *cells))
    header = ("rule", "mIoU all", "mIoU kept", "not right", "kept", "wrong", "coverage")
    return (
        _table(header, rows)
        + _note(
            "Mean ± standard error over folds. mIoU all: over all pixels, those without a label "
            "counted as wrong; mIoU kept: over pixels that carry one. Not right: share of all "
            "pixels that do not carry their true label; kept: share that carries a label; wrong: "
            "share of these that are wrong; coverage: share of pixels whose class is in the "
            "prediction set, where a rule has sets. Folds share training images, so true standard "
            "errors are somewhat larger."
        )
        + _infinite(found)
    )


def _listed(rule: Rule, found: Findings) -> bool:
    """The other alphas and confidences are for the picture."""
    if rule.kind == "eq4":
        return rule.level == found.plan.asked
    return rule.kind != "confidence" or rule.level in (0.9, 0.7)


def _infinite(found: Findings) -> str:
    asked = [rule for rule in found.rules if rule.kind == "eq4" and rule.level == found.plan.asked]
    shares = [Estimate.over(found.rules[rule].infinite).mean for rule in asked]
    if not any(share > 0 for share in shares):
        return ""
    return _note(
        f"In folds up to {small_percent(max(shares))} of the thresholds at alpha {found.plan.asked:g} "
        f"are infinite and let every class in: that needs {images_needed(found.plan.alpha)} scores "
        "each. With all images, or pooled cells, there may be enough."
    )


def _reliability(found: Findings) -> str:
    rows, figures = [], []
    for place, (name, folds) in enumerate(found.reliability.items()):
        scores = [fold.scores() for fold in folds]
        cells = [
            plus_minus(Estimate.over([getattr(each, field) for each in scores]), share=False)
            for field in ProperScores._fields
        ]
        rows.append((_scores_name(name), *cells))
        figures.append(_diagram(found, name, place))
    header = ("scores", "NLL", "Brier", "class-wise ECE", "ECE", "area, error against kept")
    first = next(iter(found.reliability.values()))
    unlikely = sum(fold.unlikely for fold in first) / max(sum(fold.pixels for fold in first), 1)
    return (
        '<div class="plots">\n'
        + "\n".join(figures)
        + "\n</div>\n"
        + _table(header, rows)
        + _note(
            "Smaller is better everywhere. Points on the dotted line: of the pixels with that "
            "confidence, just that share is right; bars on points are standard errors over folds. "
            "NLL, Brier score and class-wise calibration error judge the scores divided by their "
            f"sum; scores below a millionth count as that in NLL ({small_percent(unlikely)} of pixels "
            "before refitting). The area is that below the curve of the next section."
        )
    )


def _diagram(found: Findings, name: str, place: int) -> str:
    folds = [fold.diagram() for fold in found.reliability[name]]
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
    ece = Estimate.over([fold.scores().ece for fold in found.reliability[name]]).mean
    return _figure(
        source,
        f"Reliability diagram of the {title}: share of right pixels against confidence in 15 bins, "
        f"and the share of pixels in each; expected calibration error {ece:.3f}.",
        title[0].upper() + title[1:],
    )


def _curves(found: Findings) -> str:
    families = list(found.reliability)
    series = [*_lines(found), *_points(found)]
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
        for folds in found.reliability.values()
    ]
    cells = [
        (f"{100 * share:.0f} %", *map(plus_minus, row))
        for share, *row in zip(SHARES, *tables, strict=True)
    ]
    table = _table(("share kept", *map(_scores_name, families)), cells)
    note = _note("Wrong pixels among the most confident ones, mean ± standard error over folds.")
    return f'<div class="plots">\n{picture}\n<div>{table}{note}</div>\n</div>\n'


def _lines(found: Findings) -> list[plots.Series]:
    """For each kind of scores the error rate of the most confident pixels, with its band."""
    shares = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    made = []
    for place, (name, folds) in enumerate(found.reliability.items()):
        estimates = _over_folds([fold.error_at(shares).tolist() for fold in folds])
        mean, se, _ = np.array(estimates).T
        title = f"{_scores_name(name)}, most confident first"
        made.append(plots.Series(title, shares.numpy(), mean, 0 * se, se, place, "line"))
    return made


def _points(found: Findings) -> list[plots.Series]:
    """The other rules, each at the share it keeps; what keeps nothing has no error rate."""
    titles: dict[tuple[str, int, str], list[tuple[Estimate, Estimate]]] = {}
    families = list(found.reliability)
    for rule, measured in found.rules.items():
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


def _thresholds(found: Findings) -> str:
    made = found.calibration
    asked = f"Eq. 4 at alpha {made.alpha:g} on the raw scores of all {made.num_images} images"
    if found.plan.variant == "image":
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
        f"<p>{asked}, {found.plan.variant}: a class is in the set of a pixel where 1 − score is "
        f"at most the threshold. Deciles 1, 5 and 9 of the thresholds: {low}, {middle}, {high}."
        '</p>\n<div class="plots">\n' + "\n".join(pictures) + "\n</div>"
    )


def _classes(found: Findings, names: Sequence[str]) -> str:
    columns = [("raw argmax", Rule(RAW, "argmax"), False)]
    if found.label_with != columns[0][1]:
        columns.append(("recommended labels", found.label_with, False))
    kept = labels_to_show(found)
    columns.append(("labels kept", kept, True))
    header = ["class", "images", "labelled pixels"]
    parts = []
    for title, rule, with_kept in columns:
        confusion = _total(found.rules[rule])
        right = confusion.diagonal().double()
        parts.append((right / confusion[:, :-1].sum(0)).tolist())
        parts.append((right / confusion.sum(1)).tolist())
        header += [f"{title}: precision", "recall"]
        if with_kept:
            parts.append((1 - confusion[:, -1] / confusion.sum(1).double()).tolist())
            header.append("kept share")
    pixels = _total(found.rules[Rule(RAW, "argmax")]).sum(1).tolist()
    rows = [
        (name, str(int(images)), str(count), *(small_percent(value) for value in values))
        for name, images, count, *values in zip(
            names, found.images_of_class, pixels, *parts, strict=True
        )
    ]
    return _table(header, rows) + _note(
        f"Over all folds. Labels kept: {kept.name}. Precision: of the pixels that carry the "
        "class's label; recall and kept share: of the pixels that are of the class, whatever label "
        "they carry. A dash: no such pixel."
    )


def _total(measured: Measured) -> torch.Tensor:
    return torch.stack(measured.confusion).sum(0)


def _panels(found: Findings, root: Path, names: Sequence[str]) -> str:
    kept = labels_to_show(found)
    parts = []
    for panel in found.panels:
        truth = panel.truth.numpy()
        raw = Rule(RAW, "argmax")
        shown = [("raw argmax", panel.labels[raw].numpy(), False)]
        if found.label_with not in (raw, kept):
            labels = panel.labels[found.label_with].numpy()
            shown.append((f"labels: {found.label_with.name}", labels, True))
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
        "Colours as in mask files. Grey stripes: no label; white: truth not known. Mistakes: wrong "
        "labels black, right ones light grey. Labels are those of a fold that had not seen the "
        "image."
    )
    return f'<ul class="key">\n{key}\n</ul>\n{note}' + "\n".join(parts)


def _making(found: Findings, made_by: str) -> str:
    plan = found.plan
    background = "none" if plan.background is None else str(plan.background)
    context = plan.context if isinstance(plan.context, str) else ", ".join(plan.context)
    absent = ", ".join(map(str, found.absent))
    bounds = ", ".join(f"{bound:g}" for bound in plan.bounds) or "none"
    fitting, proving, testing = (sorted(set(each)) for each in zip(*found.used, strict=True))
    packages = [("Python", platform.python_version()), ("cpseg", __version__)]
    packages += [(name, version(name)) for name in ("torch", "numpy", "scipy", "matplotlib")]
    facts = [
        ("images", f"{found.images}, each measured once"),
        ("folds", f"{plan.folds}, seed {plan.seed}"),
        ("images of a fold that refit scores and set certified levels", _range(fitting)),
        ("that calibrate and certify", _range(proving)),
        ("that measure", _range(testing)),
        ("alpha, variant", f"{plan.asked:g}, {plan.variant}"),
        ("background", background),
        ("recalibration", ", ".join(found.reliability)),
        ("context", context or "none"),
        ("scores of the model", plan.scores),
        ("classes that refitting images of some fold lack", absent or "none"),
        ("bounds certified", f"{bounds}; delta {plan.risk:g} for each"),
        ("versions", ", ".join(f"{name} {number}" for name, number in packages)),
    ]
    command = f"<pre>{escape(made_by)}</pre>\n" if made_by else ""
    return (
        command
        + _table(("", ""), facts)
        + _note(
            "Nothing on this page was measured on images that made it: no image tests scores that "
            "it refitted, thresholds that it set, or a certificate that it is part of. Eq. 4 on "
            "raw scores is calibrated on both training parts, on recalibrated ones on the second. "
            "The threshold map alone is of all images."
        )
    )


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _over_folds(values: Sequence[Sequence[float]]) -> list[Estimate]:
    """From a row a fold to an estimate a column."""
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
