"""Folders in, folders out: one file per job, each with a function of its name."""

from cpseg.jobs.audit import audit_by_truth, open_audit, plan_audit, read_audit
from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.certify import certify
from cpseg.jobs.check import check
from cpseg.jobs.compact import compact
from cpseg.jobs.evaluate import evaluate
from cpseg.jobs.exchange import ExportOptions, export_labels, import_labels
from cpseg.jobs.folds import deal_folds, join_folds
from cpseg.jobs.label import label
from cpseg.jobs.label_layout import OutputLayout
from cpseg.jobs.predict import predict
from cpseg.jobs.recalibrate import RecalibrationOptions
from cpseg.jobs.settings import (
    AuditSettings,
    CalibrationSettings,
    CertificationSettings,
    SweepSettings,
)
from cpseg.jobs.sweep import sweep
from cpseg.jobs.variants import Grouping

__all__ = [
    "AuditSettings",
    "CalibrationSettings",
    "CertificationSettings",
    "ExportOptions",
    "Grouping",
    "OutputLayout",
    "RecalibrationOptions",
    "SweepSettings",
    "audit_by_truth",
    "calibrate",
    "certify",
    "check",
    "compact",
    "deal_folds",
    "evaluate",
    "export_labels",
    "import_labels",
    "join_folds",
    "label",
    "open_audit",
    "plan_audit",
    "predict",
    "read_audit",
    "sweep",
]
