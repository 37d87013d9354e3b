"""The recommendation and the guarantees of a report, in words."""

from __future__ import annotations

from cpseg.jobs.estimate import Estimate, plus_minus
from cpseg.report.findings import RAW, Findings, Rule, tried_for_labels
from cpseg.report.recommendation import paired


def advice(findings: Findings) -> list[str]:
    """Three paragraphs: what to label with, which labels to keep, what is guaranteed."""
    return [_labelling(findings), _keeping(findings), _promise(findings)]


def labels_to_show(findings: Findings) -> Rule:
    """The labels worth keeping: certified at the first bound that is, else confident ones."""
    for rule in findings.keep.values():
        if rule is not None:
            return rule
    rule = Rule(findings.label_with.scores, "confidence", None, 0.9)
    return rule if rule in findings.rules else Rule(list(findings.reliability)[-1], *rule[1:])


def _labelling(findings: Findings) -> str:
    if findings.student is not None:
        return _for_the_student(findings)
    base = _base(findings)
    if findings.label_with == base:
        miou, error = _miou_and_error(findings, base)
        text = (
            "To label every pixel, stay with the raw argmax. On images not used to make any rule, "
            f"its mIoU over all pixels is {miou}, and its error (share of pixels without their "
            f"true label) {error}. {_closest(findings)}{_fewer_mistakes(findings)}"
        )
    else:
        text = f"To label every pixel, use {_figures_of(findings)}"
    return (
        f"{text} Whether a student gains by these labels is not known: none of the sources is a "
        "student that was trained on these images, and labels worse than its own would cost it. "
        "cpseg folds gives its scores, to be passed as one more source."
    )


def _for_the_student(findings: Findings) -> str:
    """What to train on, where a student's own labels are known."""
    base = _base(findings)
    if findings.label_with != base:
        return (
            "Train on the labelled images and on pseudo-labels. To label every pixel, use "
            f"{_figures_of(findings)}"
        )
    miou, error = _miou_and_error(findings, base)
    return (
        "These pseudo-labels will cost you: no rule is better than the labels that the student "
        "gives by itself. Train on the labels alone, or on the student's own pseudo-labels "
        "(self-training). On images that it was not trained on, the mIoU of its own labels is "
        f"{miou}, and their error (share of pixels without their true label) {error}. "
        f"{_closest(findings)}{_fewer_mistakes(findings)}"
    )


def _figures_of(findings: Findings) -> str:
    """The recommended rule with its figures, and what they are better than."""
    rule, raw = findings.label_with, Rule(RAW, "argmax")
    miou, error = _miou_and_error(findings, rule)
    text = (
        f"{rule.name}. On images not used to make any rule, its mIoU over all pixels is {miou}, "
        f"and its error (share of pixels without their true label) {error}, against "
    )
    names = [(raw, "the raw argmax")]
    own = findings.students_own
    if own is not None and own != raw:
        names.insert(0, (own, "the student's own labels"))
    against = []
    for base, name in names:
        miou, error = _miou_and_error(findings, base)
        against.append(f"{miou} and {error} for {name}")
    than = "" if findings.student is None else " against the student's own labels"
    return (
        f"{text}{', '.join(against)}. Paired over {findings.plan.folds} folds it "
        f"{_change(findings, rule)}{than}."
    )


def _base(findings: Findings) -> Rule:
    """What another rule must be better than: the student's own labels, the raw argmax else."""
    return findings.students_own or Rule(RAW, "argmax")


def _miou_and_error(findings: Findings, rule: Rule) -> tuple[str, str]:
    measured = findings.rules[rule]
    miou = plus_minus(measured.estimate("miou_all"), share=False)
    return miou, plus_minus(measured.estimate("error"))


def _others(findings: Findings) -> list[Rule]:
    """The rules that could have been recommended."""
    return tried_for_labels(findings.rules, findings.sources, findings.student)[1:]


def _closest(findings: Findings) -> str:
    """The one with the best mIoU among :func:`_others`, and what it lacks."""
    others = _others(findings)
    if not others:
        return ""
    best = max(others, key=lambda rule: findings.rules[rule].estimate("miou_all").mean)
    return (
        f"The best of the others, {best.name}, {_change(findings, best)}. A change would have to "
        "be better by more than a standard error in mIoU, and no worse than one in error."
    )


def _fewer_mistakes(findings: Findings) -> str:
    """A rule with a lower error than the base beyond noise, though not a better mIoU."""
    base = findings.rules[_base(findings)].values("error")
    least, chosen = 0.0, None
    for rule in _others(findings):
        saved = paired(base, over=findings.rules[rule].values("error"))
        if saved.mean > max(saved.se, least):
            least, chosen = saved.mean, rule
    if chosen is None:
        return ""
    return f" If pixels matter more than rare classes: {chosen.name} {_change(findings, chosen)}."


def _change(findings: Findings, rule: Rule) -> str:
    miou, error = change(findings, rule)
    return f"changes mIoU by {miou} and the error by {error} percentage points"


def change(findings: Findings, rule: Rule) -> tuple[str, str]:
    """How a rule's mIoU and error (in percentage points) differ from those of the base."""
    base, chosen = findings.rules[_base(findings)], findings.rules[rule]
    miou = paired(chosen.values("miou_all"), over=base.values("miou_all"))
    error = paired(chosen.values("error"), over=base.values("error"))
    points = plus_minus(
        Estimate(100 * error.mean, 100 * error.se, error.folds), share=False, digits=1
    )
    return _signed(miou, plus_minus(miou, share=False)), _signed(error, points)


def _signed(value: Estimate, text: str) -> str:
    return f"+{text}" if value.mean > 0 else text


def _keeping(findings: Findings) -> str:
    """The rule for every bound, or why there is none; without any, a constant confidence."""
    if not findings.keep:
        return f"{_uncertifiable(findings)} {_confident(findings)}"
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


def _uncertifiable(findings: Findings) -> str:
    """Why no bound was tried."""
    if findings.student is None:
        return "No bound on the error of the labels kept was asked for."
    return (
        "No bound on the error of the labels kept can be certified on these images: "
        f"{findings.sources[findings.student]} holds scores of models that were trained on some of "
        "them. Certify on labelled images that no model was trained on."
    )


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
