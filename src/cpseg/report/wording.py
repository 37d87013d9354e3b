"""The recommendation and the guarantees of a report, in words."""

from __future__ import annotations

from cpseg.jobs.estimate import Estimate, plus_minus
from cpseg.report.findings import CONFIDENCES, RAW, Findings, Rule, tried_for_labels
from cpseg.report.recommendation import Candidate, better, paired


def advice(findings: Findings) -> list[str]:
    """Three paragraphs: what to label with, which labels to keep, what is guaranteed."""
    return [_labelling(findings), _keeping(findings), _promise(findings)]


def labels_to_show(findings: Findings) -> Rule:
    """The labels worth keeping, of rules that erase no classes.

    Certified at the first bound that is; else confident ones, from confidence 0.9 down; else the
    labels recommended for every pixel.
    """
    certified = [rule for rule in findings.keep.values() if rule is not None]
    for rule in (*certified, *_constant(findings)):
        if not findings.loss(rule).erases:
            return rule
    return findings.label_with


def _constant(findings: Findings) -> list[Rule]:
    """Constant confidences of the scores recommended, strictest first."""
    scores = findings.label_with.scores
    if scores not in findings.reliability:
        scores = list(findings.reliability)[-1]
    rules = [Rule(scores, "confidence", None, level) for level in CONFIDENCES if level <= 0.9]
    return [rule for rule in rules if rule in findings.rules]


_TRAIN_ON_BOTH = "Train on the labelled images and on labels by"


def verdict(findings: Findings) -> str:
    """What to do, in one sentence."""
    base, rule = base_of(findings), findings.label_with
    if rule != base:
        what = "Label with" if findings.student is None else _TRAIN_ON_BOTH
        return f"{what} {in_a_sentence(rule)}."
    if findings.student is None:
        return "Label with the raw argmax: no other rule tried is a sure gain."
    return (
        "Train on the labels alone: no pseudo-labels tried are a sure gain over the student's own."
    )


def in_a_sentence(rule: Rule) -> str:
    """A rule as a part of a sentence."""
    if rule == Rule(RAW, "argmax"):
        return "the raw argmax"
    if rule.kind == "labels":
        method, _, rest = rule.scores.partition(" map over ")
        if not rest:
            return f"the labels of {rule.scores.removesuffix(' as it is')}"
        return f"a {method} map over {rest}"
    return rule.name


def lost_classes(findings: Findings, rule: Rule, *, most: int = 12) -> str:
    """Which classes a rule loses against the raw argmax, as a sentence; empty where none is.

    Args:
        findings: the measured figures.
        rule: one of its rules.
        most: how many classes are named.
    """
    lost, found = findings.loss(rule)
    if not lost:
        return ""
    named = ", ".join(findings.names[k] for k in lost[:most])
    more = f" and {len(lost) - most} more" if len(lost) > most else ""
    verb = "loses" if len(lost) == 1 else "lose"
    return (
        f"{len(lost)} of the {found} classes that the raw argmax finds {verb} more than half of "
        f"their right pixels: {named}{more}."
    )


def losses_of_the_recommended(findings: Findings) -> str:
    """What the recommended rule loses, and the best rule that loses nothing; empty without loss."""
    lost = lost_classes(findings, findings.label_with)
    base = _as_candidate(findings, base_of(findings))
    whole = [
        rule
        for rule in _others(findings)
        if not findings.loss(rule).classes and better(_as_candidate(findings, rule), base)
    ]
    if not lost or not whole:
        return lost
    rule = max(whole, key=lambda each: findings.rules[each].estimate("miou_all").mean)
    miou, error = _miou_and_error(findings, rule)
    return f"{lost} Without such a loss: {in_a_sentence(rule)}, mIoU {miou}, error {error}."


def _as_candidate(findings: Findings, rule: Rule) -> Candidate:
    measured = findings.rules[rule]
    return Candidate(rule.name, measured.pseudo_values("miou_all"), measured.pseudo_values("error"))


def _labelling(findings: Findings) -> str:
    if findings.student is not None:
        return _for_the_student(findings)
    base = base_of(findings)
    if findings.label_with == base:
        miou, error = _miou_and_error(findings, base)
        text = (
            "To label every pixel, stay with the raw argmax. On images not used to make any rule, "
            f"its mIoU over all pixels is {miou}, and its error (share of pixels without their "
            f"true label) {error}. {_closest(findings)}{_fewer_mistakes(findings)}"
        )
    else:
        text = f"To label every pixel, use {_figures_of(findings)}"
    lost = losses_of_the_recommended(findings)
    text = f"{text} But {lost}" if lost else text
    return (
        f"{text} Whether a student gains by these labels is not known: none of the sources is a "
        "student that was trained on these images, and labels worse than its own would cost it. "
        "cpseg folds gives its scores, to be passed as one more source."
    )


def _for_the_student(findings: Findings) -> str:
    """What to train on, where a student's own labels are known."""
    base = base_of(findings)
    if findings.label_with != base:
        lost = losses_of_the_recommended(findings)
        return (
            "Train on the labelled images and on pseudo-labels. To label every pixel, use "
            f"{_figures_of(findings)}" + (f" But {lost}" if lost else "")
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
    return f"{text}{', '.join(against)}. Image by image it {_change(findings, rule)}{than}."


def base_of(findings: Findings) -> Rule:
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
    lost = lost_classes(findings, best)
    erased = f" With it {lost}" if lost else ""
    return (
        f"The best of the others, {best.name}, {_change(findings, best)}.{erased} A change would "
        "have to be better by more than a standard error in mIoU, and no worse than one in error, "
        "and erase no classes."
    )


def _fewer_mistakes(findings: Findings) -> str:
    """A rule with a lower error than the base beyond noise, though not a better mIoU."""
    base = findings.rules[base_of(findings)].pseudo_values("error")
    least, chosen = 0.0, None
    for rule in _others(findings):
        saved = paired(base, over=findings.rules[rule].pseudo_values("error"))
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
    base, chosen = findings.rules[base_of(findings)], findings.rules[rule]
    miou = paired(chosen.pseudo_values("miou_all"), over=base.pseudo_values("miou_all"))
    error = paired(chosen.pseudo_values("error"), over=base.pseudo_values("error"))
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
        lost = lost_classes(findings, rule)
        if lost:
            advised = ", and it is not recommended" if findings.loss(rule).erases else ""
            parts.append(f"But {lost.removesuffix('.')}{advised}.")
    text = "To keep only labels that are rarely wrong: " + " ".join(parts)
    if not any(recommended_to_keep(findings, rule) for rule in findings.keep.values()):
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


def recommended_to_keep(findings: Findings, rule: Rule | None) -> bool:
    """Whether a certified rule, or None, is one that erases no classes."""
    return rule is not None and not findings.loss(rule).erases


def _confident(findings: Findings) -> str:
    rule = labels_to_show(findings)
    measured = findings.rules[rule]
    if rule == findings.label_with:
        return (
            "Without a certificate, every constant confidence tried erases classes: keep the label "
            "of every pixel. Labels that are made can be audited: cpseg audit bounds their error "
            "by answers about some of their pixels."
        )
    lost = lost_classes(findings, rule)
    return (
        f"Without a certificate, {rule.name} kept {plus_minus(measured.estimate('kept'))} of the "
        f"pixels with {plus_minus(measured.estimate('wrong'))} of them wrong; nothing guarantees "
        f"that elsewhere. {f'But {lost} ' if lost else ''}Labels that are made can be "
        "audited: cpseg audit bounds their error by answers about some of their pixels."
    )


def _promise(findings: Findings) -> str:
    plan = findings.plan
    confidence = _rate(1 - plan.risk)
    tried = findings.certified_rules
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
                f"or on these with delta {findings.delta_of_one}. "
            )
    else:
        text += "nothing about the labels, since no bound was certified in every fold. "
    text += f"Promised by eq. 4: {findings.calibration.guarantee()}. "
    return text + (
        "Not guaranteed: the error of an argmax, of a constant confidence and of the labels of "
        "eq. 4, and anything on images of another kind. Figures after ± are standard errors over "
        f"{plan.folds} folds, those of changes over parts of the images."
    )


_BOUNDED = {
    "labels": "a certificate bounds the share of wrong labels among all labels kept",
    "image": "a certificate bounds the mean, over images that keep a label, of the share of wrong "
    "labels, so that of all labels more may be wrong",
}


def _rate(value: float) -> str:
    """A rate as short as it was written by the user."""
    return f"{100 * value:.4g} %"
