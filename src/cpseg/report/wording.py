"""What a report recommends and what is guaranteed, in words."""

from __future__ import annotations

from cpseg.jobs.estimate import Estimate, plus_minus
from cpseg.report.findings import RAW, Findings, Rule
from cpseg.report.recommendation import paired


def advice(found: Findings) -> list[str]:
    """Three paragraphs: what to label with, which labels to keep, what is guaranteed."""
    return [_labelling(found), _keeping(found), _promise(found)]


def labels_to_show(found: Findings) -> Rule:
    """The labels worth keeping: certified at the first bound that is, else confident ones."""
    for rule in found.keep.values():
        if rule is not None:
            return rule
    return Rule(found.label_with.scores, "confidence", None, 0.9)


def _labelling(found: Findings) -> str:
    raw = found.rules[Rule(RAW, "argmax")]
    base = (
        f"{plus_minus(raw.estimate('miou_all'), share=False)} and "
        f"{plus_minus(raw.estimate('error'))} for the raw argmax"
    )
    if found.label_with == Rule(RAW, "argmax"):
        text = (
            "To label every pixel, stay with the raw argmax. On images that made no rule its mIoU "
            f"over all pixels is {plus_minus(raw.estimate('miou_all'), share=False)}, and "
            f"{plus_minus(raw.estimate('error'))} of the pixels do not get their true label. "
        )
        other = _closest(found)
        if other is not None:
            text += (
                f"The best of the others, {other.name}, {_change(found, other)}. A change would "
                "have to be better by more than a standard error in mIoU, and no worse than one in "
                "error."
            )
        return text + _fewer_mistakes(found)
    chosen = found.rules[found.label_with]
    return (
        f"To label every pixel, use {found.label_with.name}. On images that made no rule its mIoU "
        f"over all pixels is {plus_minus(chosen.estimate('miou_all'), share=False)}, and "
        f"{plus_minus(chosen.estimate('error'))} of the pixels do not get their true label, "
        f"against {base}. Paired over {found.plan.folds} folds it "
        f"{_change(found, found.label_with)}."
    )


def _others(found: Findings) -> list[Rule]:
    """The rules that could have been recommended."""
    return [
        rule
        for rule in found.rules
        if rule != Rule(RAW, "argmax")
        and (rule.kind == "argmax" or (rule.kind == "eq4" and rule.level == found.plan.asked))
    ]


def _closest(found: Findings) -> Rule | None:
    """The one of these with the best mIoU."""
    return max(
        _others(found),
        key=lambda rule: found.rules[rule].estimate("miou_all").mean,
        default=None,
    )


def _fewer_mistakes(found: Findings) -> str:
    """Whether another rule is right in more pixels beyond noise: a choice of what counts."""
    raw = found.rules[Rule(RAW, "argmax")].values("error")
    least, chosen = 0.0, None
    for rule in _others(found):
        saved = paired(raw, over=found.rules[rule].values("error"))
        if saved.mean > max(saved.se, least):
            least, chosen = saved.mean, rule
    if chosen is None:
        return ""
    return f" Where pixels count more than rare classes: {chosen.name} {_change(found, chosen)}."


def _change(found: Findings, rule: Rule) -> str:
    raw, chosen = found.rules[Rule(RAW, "argmax")], found.rules[rule]
    miou = paired(chosen.values("miou_all"), over=raw.values("miou_all"))
    error = paired(chosen.values("error"), over=raw.values("error"))
    points = plus_minus(
        Estimate(100 * error.mean, 100 * error.se, error.folds), share=False, digits=1
    )
    return (
        f"changes mIoU by {_signed(miou, plus_minus(miou, share=False))} and the share of pixels "
        f"not right by {_signed(error, points)} percentage points"
    )


def _signed(value: Estimate, text: str) -> str:
    return f"+{text}" if value.mean > 0 else text


def _keeping(found: Findings) -> str:
    """For every bound the rule, or why there is none; without any, a constant confidence."""
    if not found.keep:
        return "No bound on the error of the labels kept was asked for. " + _confident(found)
    parts = []
    for bound, rule in found.keep.items():
        if rule is None:
            parts.append(_uncertified(found, bound))
            continue
        measured = found.rules[rule]
        proven = min(proof.num_images for proof in measured.certificates)
        parts.append(
            f"For an error of at most {_rate(bound)}: {rule.name}, which every fold certified "
            f"from {proven} images or more; it keeps {plus_minus(measured.estimate('kept'))} "
            f"of the pixels, of which {plus_minus(measured.estimate('wrong'))} are wrong on images "
            "that did not certify."
        )
    text = "To keep only labels that are rarely wrong: " + " ".join(parts)
    if all(rule is None for rule in found.keep.values()):
        text += " " + _confident(found)
    return text


def _uncertified(found: Findings, bound: float) -> str:
    """How far the rule that came closest got."""
    tried = [
        measured.certificates
        for rule, measured in found.rules.items()
        if rule.kind == "certified" and rule.level == bound
    ]
    closest = max(tried, key=lambda proofs: sum(proof.certified for proof in proofs))
    count, folds = sum(proof.certified for proof in closest), found.plan.folds
    images = min(proof.num_images for proof in closest)
    text = (
        f"For an error of at most {_rate(bound)} no rule was certified in every fold "
        f"({count} of {folds} at best, from {images} images or more)"
    )
    needed = [proof.needed_images for proof in closest if proof.needed_images is not None]
    lowest = [proof.lowest_error for proof in closest if proof.lowest_error is not None]
    if needed:
        text += f"; it takes at least {max(needed)} images besides those that set thresholds"
    elif lowest:
        text += f"; the lowest bound that the others would have certified is {_rate(max(lowest))}"
    return text + "."


def _confident(found: Findings) -> str:
    rule = labels_to_show(found)
    measured = found.rules[rule]
    return (
        f"Without a certificate, {rule.name} kept {plus_minus(measured.estimate('kept'))} of the "
        f"pixels with {plus_minus(measured.estimate('wrong'))} of them wrong; nothing guarantees "
        "that elsewhere."
    )


def _promise(found: Findings) -> str:
    plan = found.plan
    confidence = _rate(1 - plan.risk)
    tried = len(found.reliability) * len(plan.backgrounds)
    text = "Guaranteed: "
    if any(rule is not None for rule in found.keep.values()):
        text += (
            "a certificate bounds the share of wrong labels among those an image keeps, on average "
            f"over images drawn like these, with {confidence} confidence, each bound by itself. "
        )
        if tried > 1:
            text += (
                f"The choice among the {tried} certified rules of this page was made by looking at "
                "these images: certify the one chosen on other images, or on these with delta "
                f"{plan.risk / tried:.3g}. "
            )
    else:
        text += "nothing about the labels, since no bound was certified in every fold. "
    if plan.variant == "pixel":
        text += (
            f"Eq. 4's sets contain the true class of a pixel that the grid samples with at least "
            f"{_rate(1 - plan.asked)} probability, which says nothing of the label chosen. "
        )
    return text + (
        "Not guaranteed: the error of an argmax, of a constant confidence and of eq. 4's labels, "
        "and anything on images of another kind. Figures after ± are standard errors over "
        f"{plan.folds} folds."
    )


def _rate(value: float) -> str:
    """A rate that was asked for, as short as it was."""
    return f"{100 * value:.4g} %"
