"""Proven bounds on the error of pseudo-labels: by labelled images, or by clicks (audits)."""

from cpseg.calibration.certificate import Certificate
from cpseg.certification.audit import AuditPlan, AuditResult, audit_sample
from cpseg.certification.certifier import Certifier

__all__ = [
    "AuditPlan",
    "AuditResult",
    "Certificate",
    "Certifier",
    "audit_sample",
]
