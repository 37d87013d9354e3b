"""The recommendation and the guarantees of a report, in words."""

from __future__ import annotations

from cpseg.jobs.estimate import Estimate, plus_minus
from cpseg.report.findings import RAW, Findings, Rule
from cpseg.report.recommendation import paired


def advice(findings: Findings) -> list[str]:
    """Three paragraphs: what to label with, which labels to keep, what is guaranteed."""
    return [_labelling(findings), _keeping(findings), _promise(findings)]


def labels_to_show(findings: Findings) -> Rule:
    """The labels worth keeping: certified at the first bound that is, else confident ones."""
    for rule in findings.keep.values():
        if rule is not None:
            return rule
    return Rule(findings.label_with.scores, "confidence", None, 0.9)


def _labelling(findings: Findings) -> str:
    raw_miou, raw_error = _miou_and_error(findings, Rule(RAW, "argmax"))
    if findings.label_with == Rule(RAW, "argmax"):
        text = (
            "To label every pixel, stay with the raw argmax. On images not used to make any rule, "
            f"its mIoU over all pixels is {raw_miou}, and its error (share of pixels without their "
            f"true label) {raw_error}. "
        )
        other = _closest(findings)
        if other is not None:
            text += (
                f"The best of the others, {other.name}, {_change(findings, other)}. A change would "
                "have to be better by more than a standard error in mIoU, and no worse than one in "
                "error."
            )
        return text + _fewer_mistakes(findings)
    miou, error = _miou_and_error(findings, findings.label_with)
    return (
        f"To label every pixel, use {findings.label_with.name}. On images not used to make any "
        f"rule, its mIoU over all pixels is {miou}, and its error (share of pixels without their "
        f"true label) {error}, against {raw_miou} and {raw_error} for the raw argmax. Paired over "
        f"{findings.plan.folds} folds it {_change(findings, findings.label_with)}."
    )


def _miou_and_error(findings: Findings, rule: Rule) -> tuple[str, str]:
    measured = findings.rules[rule]
    miou = plus_minus(measured.estimate("miou_all"), share=False)
    return miou, plus_minus(measured.estimate("error"))


def _others(findings: Findings) -> list[Rule]:
    """The rules that could have been recommended."""
    return [
        rule
        for rule in findings.rules
        if rule != Rule(RAW, "argmax")
        and (rule.kind == "argmax" or (rule.kind == "eq4" and rule.level == findings.plan.asked))
    ]


def _closest(findings: Findings) -> Rule | None:
    """The one with the best mIoU among :func:`_others`."""
    return max(
        _others(findings),
        key=lambda rule: findings.rules[rule].estimate("miou_all").mean,
        default=None,
    )


def _fewer_mistakes(findings: Findings) -> str:
    """A rule with a lower error than the argmax beyond noise, though not a better mIoU."""
    raw = findings.rules[Rule(RAW, "argmax")].values("error")
    least, chosen = 0.0, None
    for rule in _others(findings):
        saved = paired(raw, over=findings.rules[rule].values("error"))
        if saved.mean > max(saved.se, least):
            least, chosen = saved.mean, rule
    if chosen is None:
        return ""
    return f" If pixels matter more than rare classes: {chosen.name} {_change(findings, chosen)}."


def _change(findings: Findings, rule: Rule) -> str:
    raw, chosen = findings.rules[Rule(RAW, "argmax")], findings.rules[rule]
    miou = paired(chosen.values("miou_all"), over=raw.values("miou_all"))
    error = paired(chosen.values("error"), over=raw.values("error"))
    points = plus_minus(
        Estimate(100 * error.mean, 100 * error.se, error.folds), share=False, digits=1
    )
    return (
        f"changes mIoU by {_signed(miou, plus_minus(miou, share=False))} and the "
        f"error by {_signed(error, points)} percentage points"
    )


def _signed(value: Estimate, text: str) -> str:
    return f"+{text}" if value.mean > 0 else text


def _keeping(findings: Findings) -> str:
    """The rule for every bound, or why there is none; without any, a constant confidence."""
    if not findings.keep:
        return "No bound on the error of the labels kept was asked for. " + _confident(findings)
    parts = []
    for bound, rule in findings.keep.items():
        if rule is None:
            parts.append(_uncertified(findings, bound))
            continue
        measured = findings.rules[rule]
        proven = min(proof.num_images for proof in measured.certificates)
        parts.append(
            f"For an error of at most {_rate(bound)}: {rule.name}, which every fold certified "
            f"from {proven} images or more; it keeps {plus_minus(measured.estimate('kept'))} "
            f"of the pixels, of which {plus_minus(measured.estimate('wrong'))} are wrong on images "
            "not used for the certificate."
        )
    text = "To keep only labels that are rarely wrong: " + " ".join(parts)
    if all(rule is None for rule in findings.keep.values()):
        text += " " + _confident(findings)
    return text


def _uncertified(findings: Findings, bound: float) -> str:
    """How far the best rule is from the bound."""
    tried = [
        measured.certificates
        for rule, measured in findings.rules.items()
        if rule.kind == "certified" and rule.level == bound
    ]
    closest = max(tried, key=lambda proofs: sum(proof.certified for proof in proofs))
    count, folds = sum(proof.certified for proof in closest), findings.plan.folds
    images = min(proof.num_images for proof in closest)
    per = "per label" if findings.plan.per == "labels" else "per image"
    text = (
        f"For an error of at most {_rate(bound)} no rule was certified {per} in every fold "
        f"({count} of {folds} at best, from {images} images or more)"
    )
    needed = [proof.needed_images for proof in closest if proof.needed_images is not None]
    lowest = [proof.lowest_error for proof in closest if proof.lowest_error is not None]
    if needed:
        text += f"; that takes at least {max(needed)} images besides those that set thresholds"
    elif lowest:
        text += (
            f"; the lowest bound that the other folds would have certified is {_rate(max(lowest))}"
        )
    return text + "."


def _confident(findings: Findings) -> str:
    rule = labels_to_show(findings)
    measured = findings.rules[rule]
    return (
        f"Without a certificate, {rule.name} kept {plus_minus(measured.estimate('kept'))} of the "
        f"pixels with {plus_minus(measured.estimate('wrong'))} of them wrong; nothing guarantees "
        "that elsewhere. Labels that are made can be audited: cpseg audit bounds their error by "
        "answers about some of their pixels."
    )


def _promise(findings: Findings) -> str:
    plan = findings.plan
    confidence = _rate(1 - plan.risk)
    tried = len(findings.reliability) * len(plan.backgrounds)
    text = "Guaranteed: "
    if any(rule is not None for rule in findings.keep.values()):
        text += (
            f"{_BOUNDED[plan.per]}, on images like these, with {confidence} confidence for each "
            "bound. "
        )
        if tried > 1:
            text += (
                f"One of {tried} certified rules was chosen by their results on these images, "
                "which no certificate takes into account: certify the chosen rule on other images, "
                f"or on these with delta {plan.risk / tried:.3g}. "
            )
    else:
        text += "nothing about the labels, since no bound was certified in every fold. "
    text += f"Promised by eq. 4: {findings.calibration.guarantee()}. "
    return text + (
        "Not guaranteed: the error of an argmax, of a constant confidence and of the labels of "
        "eq. 4, and anything on images of another kind. Figures after ± are standard errors over "
        f"{plan.folds} folds."
    )


_BOUNDED = {
    "labels": "a certificate bounds the share of wrong labels among all labels kept",
    "image": "a certificate bounds the mean, over images that keep a label, of the share of wrong "
    "labels, so that of all labels more may be wrong",
}


def _rate(value: float) -> str:
    """A rate as short as it was written by the user."""
    return f"{100 * value:.4g} %"
