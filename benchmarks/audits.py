"""How often audits are false at the bound, and how many answers they take.

    python benchmarks/audits.py --folders 20000

For every design and way of looking: simulated folders in which just more than the bound is wrong,
and the share of false certificates among them; then the answers that certify with a chance of 90 %
and on average, in folders with fewer wrong labels. Looking at any time looks after every answer.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch

from cpseg.certification.audit import AuditPlan, Draw, audit_sample
from cpseg.certification.audit_plan import _Part
from cpseg.certification.finite_bounds import (
    allowed_at_any_time,
    average_answers,
    best_looks,
    bound_at_look,
    fixed_number,
    number_at_any_time,
    wealth,
)
from cpseg.certification.weighted_bounds import Evidence, wealth_path
from cpseg.jobs.estimate import aligned, percent

BOUND, DELTA = 0.05, 0.1
LOOKING = ("fixed", "planned", "any")
CLASSES = np.array([0.6, 0.3, 0.08, 0.02])  # shares of the labels, by class


def masks(size: int) -> torch.Tensor:
    """Labels of one folder with those shares, as one image."""
    counts = (CLASSES * size).astype(int)
    return torch.from_numpy(np.repeat(np.arange(4), counts).astype(np.uint8))[None]


def sequences(random: np.random.Generator, folders: int, size: int, wrong: int, answers: int):
    """Which of the answers in turn are wrong, ``[folders, answers]``, without replacement."""
    seen = np.zeros(folders, np.int64)
    drawn = np.zeros((folders, answers), bool)
    for n in range(answers):
        drawn[:, n] = random.random(folders) * (size - n) < wrong - seen
        seen += drawn[:, n]
    return drawn


def uniform(plan: AuditPlan, wrong: int, folders: int, random: np.random.Generator) -> float:
    """How often the first n answers have few enough wrong ones, at any look."""
    drawn = sequences(random, folders, plan.labels, wrong, len(plan.draws))
    return float((drawn.cumsum(1) <= np.array(plan.allowed())[1:]).any(1).mean())


def by_class(plan: AuditPlan, wrong: np.ndarray, folders: int, random: np.random.Generator):
    """How often the bound of all labels, or of some class, is below what is wrong."""
    drawn = {
        stratum.label: sequences(
            random, folders, stratum.size, int(wrong[stratum.label]), stratum.answers
        )
        for stratum in plan.strata
    }
    some = np.zeros(folders, bool)
    for stratum in plan.strata:
        some |= class_false(plan, stratum, int(wrong[stratum.label]), drawn[stratum.label])
    labels = np.array([draw.label for draw in plan.draws])
    together = np.zeros(folders, bool)
    for folder in range(folders):
        bad = np.zeros(len(labels), bool)
        for label, answers in drawn.items():
            bad[labels == label] = answers[folder]
        words = ["no" if each else "yes" for each in bad]
        parts = [_Part(stratum, [], 1.0, None) for stratum in plan.strata]
        evidence, _ = plan._blocks(parts, words)
        rate = wrong.sum() / plan.labels
        together[folder] = wealth_path(evidence, rate - 1e-9).max() >= 1 / DELTA
    return float(some.mean()), float(together.mean())


def class_false(plan: AuditPlan, stratum, wrong: int, drawn: np.ndarray) -> np.ndarray:
    """Whether the bound of a class is below what is wrong of it, for each folder."""
    size, seen, risk = stratum.size, drawn.cumsum(1), plan.stratum_delta
    if plan.looking == "any":
        number = np.arange(1, drawn.shape[1] + 1)
        table = wealth(size, wrong, plan.max_error, number[:, None], np.arange(seen.max() + 1))
        return (table[number - 1, seen] >= 1 / risk).any(1)
    false = np.zeros(len(drawn), bool)
    going = np.ones(len(drawn), bool)
    for number, look in enumerate(stratum.looks):
        at = seen[:, look.answers - 1]
        last = number == len(stratum.looks) - 1
        stops = going & ((at <= look.wrong) | last)
        for x in np.unique(at[stops]):
            bound = bound_at_look(size, stratum.looks, number, int(x), risk)
            false[stops & (at == x)] = bound < wrong
        going &= ~stops
    return false


def focus(plan: AuditPlan, error: np.ndarray, rate: float, informed: float):
    """A new draw each time, and answers that are wrong as predicted, or less so.

    ``informed`` is how much of the error the prediction knows: 1 where wrong labels are as likely
    as predicted (scaled to ``rate``), 0 where they are anywhere.
    """
    size = len(error)
    chance = (informed * error / error.mean() * rate + (1 - informed) * rate).clip(max=1)
    chance *= rate / chance.mean()
    roots = np.sqrt(error)
    draw = 0.5 / size + 0.5 * roots / roots.sum()
    running = draw.cumsum()

    def simulate(random: np.random.Generator) -> Evidence:
        picks = np.searchsorted(running, random.random(len(plan.draws)) * running[-1])
        picks = picks.clip(max=size - 1)
        draws = tuple(Draw("a", 0, 0, 0, float(draw[i]), float(error[i])) for i in picks)
        bad = random.random(len(picks)) < chance[picks]
        words = ["no" if each else "yes" for each in bad]
        return replace(plan, draws=draws)._weighted(words)

    return simulate


def predicted_errors(size: int) -> np.ndarray:
    """Errors as a model predicts them: most labels are sure, some are not."""
    return np.random.default_rng(5).beta(0.12, 3.9, size)


def false_certificates(folders: int) -> str:
    lines = [("design", "looking", "labels", "false"), ("---", "---", "---:", "---:")]
    random = np.random.default_rng(0)
    for looking in LOOKING:
        options = {"max_error": BOUND, "delta": DELTA, "looking": looking, "seed": 0}
        for size in (1_000, 1_000_000):
            mask = masks(size)
            plan = audit_sample(["a"], lambda _, mask=mask: mask, **options)
            share = uniform(plan, int(BOUND * plan.labels) + 1, folders, random)
            lines.append(("uniform", looking, f"{size:,}", exact(share)))
        mask = masks(100_000)
        plan = audit_sample(["a"], lambda _, mask=mask: mask, design="by-class", **options)
        sizes = np.array([stratum.size for stratum in plan.strata])
        for name, shares in (
            ("every class at the bound", np.full(4, 1.0)),
            ("rare classes worse", np.array([0.2, 1.0, 4.0, 10.0])),
        ):
            bad = np.ceil((BOUND * sizes.sum() + 1) * shares / (shares @ sizes) * sizes)
            some, together = by_class(plan, bad, folders, random)
            lines.append((f"by class, some class: {name}", looking, "100,000", exact(some)))
            lines.append((f"by class, all labels: {name}", looking, "100,000", exact(together)))
            print(*lines[-2], *lines[-1], flush=True)
    error = predicted_errors(20_000)
    for informed in (1.0, 0.0):
        simulate = focus(focused_plan(error, 300, 0.03), error, BOUND * 1.0001, informed)
        passed = [wealth_path(simulate(random), BOUND).max() >= 1 / DELTA for _ in range(folders)]
        name = "right" if informed else "useless"
        share = exact(float(np.mean(passed)))
        lines.append((f"focus, prediction {name}", "any", "20,000", share))
    return aligned(lines)


def exact(share: float) -> str:
    return f"{100 * share:.2f} %"


def focused_plan(error: np.ndarray, answers: int, expected: float) -> AuditPlan:
    mask = torch.zeros(1, len(error), dtype=torch.uint8)
    sure = torch.from_numpy(1 - error)[None]
    return audit_sample(
        ["a"],
        lambda _: mask,
        certainty=lambda _: sure,
        design="focus",
        looking="any",
        answers=answers,
        max_error=BOUND,
        delta=DELTA,
        expected_error=expected,
        seed=0,
    )


def answers_needed() -> str:
    size = 7_000_000
    lines = [
        ("bound", "wrong", "fixed", "planned: most", "ratio", "average", "at any time"),
        ("---:", *["---:"] * 6),
    ]
    for bound, wrong in (
        (0.05, 0.01),
        (0.05, 0.018),
        (0.05, 0.03),
        (0.1, 0.03),
        (0.1, 0.05),
        (0.02, 0.005),
    ):
        fixed = fixed_number(size, bound, DELTA, wrong)
        looks = best_looks(size, bound, DELTA, wrong)
        most = looks[-1].answers
        any_time = number_at_any_time(size, bound, DELTA, wrong)
        mean = f"{average_answers(size, looks, wrong):.0f}"
        cells = (str(fixed), str(most), f"{most / fixed:.2f}", mean, str(any_time))
        lines.append((percent(bound), percent(wrong), *cells))
    return aligned(lines)


def focus_against_uniform(folders: int) -> str:
    """Answers at any time until 5 % is certified, at 3 % wrong."""
    most = 2_400
    error = predicted_errors(20_000)
    random = np.random.default_rng(3)
    lines = [("draw", "90 % chance", "half"), ("---", "---:", "---:")]
    allowed = allowed_at_any_time(10**9, BOUND, DELTA, most)[1:]
    passes = (random.random((folders, most)) < 0.03).cumsum(1) <= allowed
    lines.append(("uniform", *quantiles(passes)))
    plan = focused_plan(error, most, 0.03)
    for name, informed in (("right", 1.0), ("half right", 0.5), ("useless", 0.0)):
        simulate = focus(plan, error, 0.03, informed)
        paths = [wealth_path(simulate(random), BOUND) >= 1 / DELTA for _ in range(folders)]
        lines.append((f"focus, prediction {name}", *quantiles(np.array(paths))))
    return aligned(lines)


def quantiles(passes: np.ndarray) -> tuple[str, str]:
    """Answers until the first pass: of 90 % and of half of the folders."""
    most = passes.shape[1]
    taken = np.where(passes.any(1), passes.argmax(1) + 1, most + 1)
    found = (int(np.quantile(taken, share)) for share in (0.9, 0.5))
    ninety, half = (str(n) if n <= most else f"over {most}" for n in found)
    return ninety, half


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folders", type=int, default=20_000)
    options = parser.parse_args()
    print(answers_needed(), flush=True)
    print()
    print(focus_against_uniform(min(options.folders, 500)), flush=True)
    print()
    print(false_certificates(options.folders), flush=True)


if __name__ == "__main__":
    main()
