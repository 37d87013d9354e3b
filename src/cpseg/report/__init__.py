"""One static page: which rule to use on labelled images, and its guarantees."""

from cpseg.report.page import report

__all__ = [
    "report",
]
