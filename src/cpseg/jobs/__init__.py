"""Folders in, folders out: one file per job, each with a function of its name."""

from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.certify import certify
from cpseg.jobs.compact import compact
from cpseg.jobs.evaluate import evaluate
from cpseg.jobs.label import label
from cpseg.jobs.predict import predict
from cpseg.jobs.recalibrate import RecalibrationOptions
from cpseg.jobs.settings import CalibrationSettings, CertificationSettings, SweepSettings
from cpseg.jobs.sweep import sweep
from cpseg.jobs.variants import Grouping

__all__ = [
    "CalibrationSettings",
    "CertificationSettings",
    "Grouping",
    "RecalibrationOptions",
    "SweepSettings",
    "calibrate",
    "certify",
    "compact",
    "evaluate",
    "label",
    "predict",
    "sweep",
]
