"""Audits: the error of labels that exist, proven by a person's answers about drawn pixels.

The randomness is the draw alone. Which images these are, how the labels were made, how pixels
depend on each other and what was tuned on what do not matter: the bound is about exactly the labels
that were drawn from.
"""

from cpseg.certification.audit_draw import MOST_ANSWERS, audit_sample
from cpseg.certification.audit_plan import (
    AuditPlan,
    AuditResult,
    AuditRow,
    Draw,
    Stratum,
    confidence,
    percent_up,
)

__all__ = [
    "MOST_ANSWERS",
    "AuditPlan",
    "AuditResult",
    "AuditRow",
    "Draw",
    "Stratum",
    "audit_sample",
    "confidence",
    "percent_up",
]
