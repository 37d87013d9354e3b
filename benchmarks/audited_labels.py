"""Certificates and audits beside the truth, over random draws of labelled images.

    python benchmarks/audited_labels.py --root R --ids pool.txt --probs P --budget 100 --splits 5
    python benchmarks/audited_labels.py --root R --ids pool.txt --probs P --budget 88 \
        --apply heldout.txt

For every draw: a rule is certified on it, labels the other images of the pool (or those of
`--apply`), and these labels are audited, answered from their masks: by planned looks, at the bound
of the certificate. `truth` is the share of wrong labels among all kept where the masks are not
void. Void pixels cannot be told: "audit" counts them as wrong, "audit, judged" leaves them out.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from cpseg.files import Source, read_ids, write_ids
from cpseg.files.masks import VOID, read_mask
from cpseg.jobs import (
    AuditSettings,
    CertificationSettings,
    RecalibrationOptions,
    audit_by_truth,
    certify,
    label,
    plan_audit,
)
from cpseg.jobs.audit import Labels
from cpseg.jobs.estimate import aligned, percent


def truth(labels: Labels, pairs, root: Path) -> tuple[float, float]:
    """Wrong labels among all kept, and kept pixels among all, where masks are not void."""
    wrong = kept = pixels = 0
    for pair in pairs:
        chosen = labels.read(pair.image)
        true = read_mask(root / pair.mask, num_classes=255, size=tuple(chosen.shape))
        valid = true != VOID
        keeps = valid & (chosen != VOID)
        wrong += int((keeps & (chosen != true)).sum())
        kept, pixels = kept + int(keeps.sum()), pixels + int(valid.sum())
    return wrong / max(kept, 1), kept / pixels


def audited(out: Path, listed: Path, bound: str, seed: int, design: str) -> list[str]:
    settings = AuditSettings(max_error=bound, seed=seed, design=design)
    folder = out / f"audit-{design}"
    audit = plan_audit(out, settings, folder=folder)
    cells = []
    for unsure in ("wrong", "skip"):
        result = audit_by_truth(audit, listed, unsure=unsure).result
        found = "certified" if result.certified else "not"
        cells.append(f"{found}, {percent(result.bound)} after {result.answers}")
        if design == "focus":
            break
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name in ("root", "ids", "probs", "apply"):
        parser.add_argument(f"--{name}", type=Path, required=name != "apply")
    parser.add_argument("--budget", type=int, default=100)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--bounds", nargs="+", default=["0.05"])
    parser.add_argument("--per", nargs="+", default=["image"])
    parser.add_argument("--context", default="auto")
    options = parser.parse_args()
    source, pool = Source(options.root, options.probs), read_ids(options.ids)
    context = () if options.context == "none" else options.context
    titles = ("draw", "rule", "certificate saw", "kept", "truth", "audit", "audit, judged")
    lines = [titles, ("---:", "---", *["---:"] * 5)]
    for split in range(options.splits):
        drawn = random.Random(f"{options.budget} {split}").sample(pool, options.budget)
        rest = [pair for pair in pool if pair not in set(drawn)]
        rest = rest if options.apply is None else read_ids(options.apply)
        for per in options.per:
            for bound in options.bounds:
                with tempfile.TemporaryDirectory() as place:
                    lists = [Path(place, name) for name in ("drawn.txt", "rest.txt")]
                    for path, pairs in zip(lists, (drawn, rest), strict=True):
                        write_ids(path, [(pair.image, pair.mask) for pair in pairs])
                    settings = CertificationSettings(
                        None,
                        max_error=bound,
                        per=per,
                        seed=split,
                        recalibration=RecalibrationOptions("dirichlet", context=context),
                    )
                    made = certify(source, lists[0], settings)
                    rule = f"{100 * float(bound):g} % per {per}"
                    if not made.certificate.certified:
                        lines.append((str(split), rule, *["-"] * 5))
                        continue
                    out = Path(place, "out")
                    label(source, lists[1], made, out)
                    labels = Labels.open(out)
                    wrong, kept = truth(labels, rest, options.root)
                    cells = audited(out, lists[1], bound, split, "uniform")
                    saw = made.certificate.pooled_error
                    shares = (percent(each) for each in (saw, kept, wrong))
                    lines.append((str(split), rule, *shares, *cells))
        print(" ".join(lines[-1]), flush=True)
    print("\n" + aligned(lines))


if __name__ == "__main__":
    main()
