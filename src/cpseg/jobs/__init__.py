"""Folders in, folders out: one file per job, each with a function of its name."""

from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.certify import certify
from cpseg.jobs.compact import compact
from cpseg.jobs.evaluate import evaluate
from cpseg.jobs.label import label
from cpseg.jobs.predict import predict
from cpseg.jobs.recalibrate import RecalibrationOptions
from cpseg.jobs.sweep import sweep

__all__ = [
    "RecalibrationOptions",
    "calibrate",
    "certify",
    "compact",
    "evaluate",
    "label",
    "predict",
    "sweep",
]
