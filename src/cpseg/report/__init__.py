"""One static page: which rule to use on labelled images, and what is guaranteed."""

from cpseg.report.page import report

__all__ = [
    "report",
]
