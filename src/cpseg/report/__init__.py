"""Which rule to use, measured on labelled images: one static page, or in Python."""

from cpseg.report.in_memory import Recommendation, recommend
from cpseg.report.page import report

__all__ = [
    "Recommendation",
    "recommend",
    "report",
]
