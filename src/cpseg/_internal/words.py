"""The words that options and arguments may be, where the command can read them without torch."""

from __future__ import annotations

FIXED_VARIANTS = ("pixel", "image", "blocks")
LEARNED_VARIANTS = ("kmeans", "annuli")
UNITS = ("pixel", "image")
RECALIBRATIONS = ("none", "temperature", "vector", "dirichlet", "trees")
CONTEXTS = ("location", "neighbourhood", "image")
SCORE_KINDS = ("softmax", "sigmoid")
CERTIFICATES = ("ltt", "crc")
CERTIFIED_PER = ("labels", "image")
AUDIT_DESIGNS = ("uniform", "by-class", "focus")
AUDIT_LOOKING = ("planned", "fixed", "any")
AUDIT_ANSWERS = ("yes", "no", "unsure")  # the label is right, it is wrong, cannot tell
AUDIT_UNSURE = ("wrong", "skip")
PVALUES = ("betting", "hoeffding-bentkus")
OUTPUT_LAYOUTS = ("yolo", "mmseg", "voc", "ade")  # folders that other training code loads
SCORE_DTYPES = ("uint8", "float16")
AMP_DTYPES = ("bfloat16", "float16")
ALPHAS = ("0.5", "0.3", "0.2", "0.1", "0.05", "0.02", "0.01")  # those that sweep and report try
EXCHANGE_FORMATS = ("coco", "label-studio", "cvat", "geotiff")  # of annotation and map tools
OVERLAPS = ("error", "last", "void")  # what pixels become that two classes claim
