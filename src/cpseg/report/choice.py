"""Which of the rules of a report a run makes."""

from __future__ import annotations

from typing import Any

from cpseg._internal.checks import message


def choose(found: dict[str, Any], keep: str, alpha: str, max_error: str) -> str | None:
    """The name of a rule of :func:`cpseg.report.record.record`.

    Args:
        found: what ``record`` returned.
        keep: ``"best"``, what the report recommends for a student; ``"every-pixel"``, the same
            among rules that label every pixel; ``"sets"``, eq. 4 at ``alpha``; ``"certified"``.
        alpha: of the prediction sets.
        max_error: the bound of the certified rule.

    Returns:
        None where the student should be trained on the labelled images alone.

    Raises:
        ValueError: no rule of that kind.
    """
    if keep == "best" or (keep == "every-pixel" and _kind(found) in ("argmax", "labels")):
        return None if keep == "best" and found["labels_alone"] else str(found["recommended"])
    if keep == "certified":
        rule = found["keep"].get(f"{float(max_error):g}")
        if rule is None:
            expected = f"a rule that every fold certifies at an error of {max_error}"
            fix = "see the page for the lowest bound, label more images, or raise --max-error"
            raise ValueError(message("run", expected, "none", fix))
        return str(rule)
    if keep == "sets":
        names = [
            name
            for name, rule in found["rules"].items()
            if rule["kind"] == "eq4" and rule["level"] == float(alpha)
        ]
    else:
        names = [name for name, rule in found["rules"].items() if rule["kind"] in _EVERY_PIXEL]
    rules = found["rules"]
    return str(max(names, key=lambda name: rules[name]["figures"]["miou_all"]["mean"]))


_EVERY_PIXEL = ("argmax", "labels")


def _kind(found: dict[str, Any]) -> str:
    return str(found["rules"][found["recommended"]]["kind"])
