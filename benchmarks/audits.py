"""How often audits are false at the bound, and how many answers they take.

    python benchmarks/audits.py --folders 20000

For every design and way of looking: simulated folders in which just more than the bound is wrong,
and the share of false certificates among them; then the answers that certify with a chance of 90 %
and on average, in folders with fewer wrong labels. Looking at any time looks after every answer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from cpseg.certification.audit import AuditPlan, Draw, audit_sample
from cpseg.certification.finite_bounds import best_looks, fixed_number, number_at_any_time
from cpseg.jobs.estimate import aligned, percent

BOUND, DELTA = 0.05, 0.1
LOOKING = ("fixed", "planned", "any")
CLASSES = np.array([0.6, 0.3, 0.08, 0.02])  # shares of the labels, by class
Answers = Callable[[np.random.Generator], Mapping[int, str]]


def masks(size: int) -> torch.Tensor:
    """Labels of one folder with those shares, as one image."""
    counts = (CLASSES * size).astype(int)
    return torch.from_numpy(np.repeat(np.arange(4), counts).astype(np.uint8))[None]


def words(wrong: np.ndarray) -> dict[int, str]:
    return {number: "no" if bad else "yes" for number, bad in enumerate(wrong)}


def uniform(plan: AuditPlan, wrong: int) -> Callable[[np.random.Generator], tuple]:
    """Answers where ``wrong`` of the labels are, without replacement."""

    def simulate(random: np.random.Generator) -> tuple[AuditPlan, dict[int, str]]:
        ranks = random.choice(plan.labels, len(plan.draws), replace=False, shuffle=True)
        return plan, words(ranks < wrong)

    return simulate


def by_class(plan: AuditPlan, wrong: np.ndarray) -> Callable[[np.random.Generator], tuple]:
    """Answers where so many labels of each class are wrong."""
    labels = np.array([draw.label for draw in plan.draws])

    def simulate(random: np.random.Generator) -> tuple[AuditPlan, dict[int, str]]:
        bad = np.zeros(len(labels), bool)
        for stratum in plan.strata:
            here = np.flatnonzero(labels == stratum.label)
            ranks = random.choice(stratum.size, len(here), replace=False, shuffle=True)
            bad[here] = ranks < wrong[stratum.label]
        return plan, words(bad)

    return simulate


def focus(plan: AuditPlan, error: np.ndarray, rate: float, size: int, informed: float):
    """A new draw each time, and answers that are wrong as predicted, or less so.

    ``informed`` is how much of the error the prediction knows: 1 where wrong labels are as likely
    as predicted (scaled to ``rate``), 0 where they are anywhere.
    """
    chance = informed * error / error.mean() * rate + (1 - informed) * rate
    chance = chance.clip(max=1)
    chance *= rate / chance.mean()
    roots = np.sqrt(error)
    draw = 0.5 / size + 0.5 * roots / roots.sum()
    running = draw.cumsum()

    def simulate(random: np.random.Generator) -> tuple[AuditPlan, dict[int, str]]:
        picks = np.searchsorted(running, random.random(len(plan.draws)) * running[-1])
        draws = tuple(
            Draw("a", 0, 0, 0, float(draw[i]), float(error[i])) for i in picks.clip(max=size - 1)
        )
        bad = random.random(len(picks)) < chance[picks.clip(max=size - 1)]
        return replace(plan, draws=draws), words(bad)

    return simulate


def false(simulate, folders: int, statement: Callable[..., bool]) -> float:
    random = np.random.default_rng(0)
    return float(np.mean([statement(*simulate(random)) for _ in range(folders)]))


def certified(plan: AuditPlan, answers: Mapping[int, str]) -> bool:
    return plan.result(answers).certified


def some_class_false(wrong: np.ndarray):
    """Whether the bound of some class is below what is wrong of it."""

    def statement(plan: AuditPlan, answers: Mapping[int, str]) -> bool:
        rows = plan.result(answers).classes or ()
        return any(row.bound * row.labels < wrong[row.label] - 1e-6 for row in rows)

    return statement


def predicted_errors(size: int) -> np.ndarray:
    """Errors as a model predicts them: most labels are sure, some are not."""
    return np.random.default_rng(5).beta(0.12, 3.9, size)


def false_certificates(folders: int) -> str:
    lines = [("design", "looking", "labels", "false"), ("---", "---", "---:", "---:")]
    for looking in LOOKING:
        for size in (1_000, 1_000_000):
            mask = masks(size)
            options = {"max_error": BOUND, "delta": DELTA, "looking": looking, "seed": 0}
            plan = audit_sample(["a"], lambda _, mask=mask: mask, **options)
            wrong = int(BOUND * plan.labels) + 1
            share = false(uniform(plan, wrong), folders, certified)
            lines.append(("uniform", looking, f"{size:,}", percent(share)))
        mask = masks(100_000)
        options = {"max_error": BOUND, "delta": DELTA, "looking": looking, "seed": 0}
        plan = audit_sample(["a"], lambda _, mask=mask: mask, design="by-class", **options)
        sizes = np.array([s.size for s in plan.strata])
        for name, shares in (
            ("evenly", np.full(4, 1.0)),
            ("rare classes wrong", np.array([0.2, 1.0, 4.0, 10.0])),
        ):
            rates = (BOUND * sizes.sum() + 1) * shares / (shares @ sizes)
            bad = np.ceil(rates * sizes)
            share = false(by_class(plan, bad), folders, certified)
            lines.append((f"by class, all labels, {name}", looking, "100,000", percent(share)))
        bad = np.floor(BOUND * sizes) + 1
        share = false(by_class(plan, bad), folders, some_class_false(bad))
        lines.append(("by class, some class", looking, "100,000", percent(share)))
        size = 20_000
        error = predicted_errors(size)
        for informed in (1.0, 0.0):
            plan = focused_plan(error, looking, 300, 0.03)
            simulate = focus(plan, error, BOUND * 1.0001, size, informed)
            share = false(simulate, folders, certified)
            name = "right" if informed else "useless"
            lines.append((f"focus, prediction {name}", looking, f"{size:,}", percent(share)))
    return aligned(lines)


def focused_plan(error: np.ndarray, looking: str, answers: int, expected: float) -> AuditPlan:
    mask = torch.zeros(1, len(error), dtype=torch.uint8)
    sure = torch.from_numpy(1 - error)[None]
    return audit_sample(
        ["a"],
        lambda _: mask,
        certainty=lambda _: sure,
        design="focus",
        looking=looking,
        answers=answers,
        max_error=BOUND,
        delta=DELTA,
        expected_error=expected,
        seed=0,
    )


def answers_needed(folders: int) -> str:
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
        from cpseg.certification.finite_bounds import average_answers

        fixed = fixed_number(size, bound, DELTA, wrong)
        looks = best_looks(size, bound, DELTA, wrong)
        most = looks[-1].answers
        lines.append(
            (
                percent(bound),
                percent(wrong),
                str(fixed),
                str(most),
                f"{most / fixed:.2f}",
                f"{average_answers(size, looks, wrong):.0f}",
                str(number_at_any_time(size, bound, DELTA, wrong)),
            )
        )
    return aligned(lines)


def focus_against_uniform(folders: int) -> str:
    """Answers at any time until 5 % is certified, at 3 % wrong."""
    size, most = 20_000, 2_400
    error = predicted_errors(size)
    random = np.random.default_rng(3)
    lines = [("draw", "90 % chance", "half"), ("---", "---:", "---:")]
    for name, informed in (
        ("uniform", None),
        ("focus, prediction right", 1.0),
        ("focus, half right", 0.5),
        ("focus, useless", 0.0),
    ):
        taken = []
        if informed is None:
            from cpseg.certification.finite_bounds import allowed_at_any_time

            allowed = allowed_at_any_time(10**9, BOUND, DELTA, most)[1:]
            for _ in range(folders):
                passes = (random.random(most) < 0.03).cumsum() <= allowed
                taken.append(passes.argmax() + 1 if passes.any() else most)
        else:
            from cpseg.certification.weighted_bounds import wealth_path

            plan = focused_plan(error, "any", most, 0.03)
            simulate = focus(plan, error, 0.03, size, informed)
            for _ in range(folders):
                drawn, answers = simulate(random)
                evidence = drawn._weighted([answers[n] for n in range(most)])
                passes = wealth_path(evidence, BOUND) >= 1 / DELTA
                taken.append(passes.argmax() + 1 if passes.any() else most)
        lines.append((name, f"{np.quantile(taken, 0.9):.0f}", f"{np.median(taken):.0f}"))
    return aligned(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folders", type=int, default=20_000)
    options = parser.parse_args()
    print(answers_needed(options.folders), flush=True)
    print()
    print(focus_against_uniform(min(options.folders, 500)), flush=True)
    print()
    print(false_certificates(options.folders), flush=True)


if __name__ == "__main__":
    main()
