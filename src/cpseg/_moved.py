"""Module paths of version 0.1 and before: they work for one more release, with a warning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# Where the contents of ``cpseg.<name>`` are now; a file that was split has several places. Names
# that are packages today (``cpseg.calibration``, ``cpseg.groups`` ...) are not here: they export
# what the module of that name promised.
MOVED: dict[str, tuple[str, ...]] = {
    "advice": ("report.wording",),
    "best": ("core.argmax",),
    "betting": ("certification.p_values", "calibration.certificate"),
    "certificate": ("calibration.certificate",),
    "certifying": ("jobs.certify",),
    "checks": ("_internal.checks",),
    "class_map": ("core.class_map",),
    "demo_scenes": ("demo.scenes",),
    "evaluation": ("jobs.tally",),
    "findings": ("report.findings",),
    "foundation_classes": ("foundation.classes",),
    "foundation_files": ("foundation.hub",),
    "foundation_images": ("foundation.preprocessing",),
    "foundation_models": ("foundation.adapters",),
    "labelling": ("jobs.label",),
    "learned_groups": ("groups.learned",),
    "levels": ("core.nested_rules",),
    "loss_sums": ("training.loss_sums",),
    "losses": ("training.losses",),
    "mask_filtering": ("training.mask_filters",),
    "metrics": ("core.metrics",),
    "online": ("training.online_threshold",),
    "options": ("cli.options",),
    "plots": ("report.plots",),
    "predicting": ("jobs.predict",),
    "prompts": ("training.prompts",),
    "quantiles": ("core.quantiles",),
    "ranks": ("_internal.distributed", "_internal.tiling"),
    "recommendation": ("report.recommendation",),
    "refit": ("recalibration.fit", "recalibration.features"),
    "refitting": ("jobs.recalibrate",),
    "reliability": ("core.reliability",),
    "reporting": ("report.measure",),
    "reservoir": ("recalibration.pixel_sample",),
    "risk": ("certification.certifier",),
    "schedules": ("training.schedules",),
    "score_map": ("recalibration.recalibration",),
    "scores": ("core.nonconformity",),
    "selection": ("core.selection",),
    "sources": (
        "files.dataset",
        "files.run_folder",
        "files.splits",
        "jobs.variants",
        "_internal.distributed",
        "_internal.checks",
        "_internal.hashing",
    ),
    "store": (
        "files.score_files",
        "files.masks",
        "files.id_lists",
        "_internal.safe_files",
    ),
    "stores": ("calibration.score_stores", "core.score_bins"),
    "strategies": ("testing.strategies",),
    "sweep_plan": ("jobs.sweep_plan",),
    "sweep_table": ("jobs.sweep_table",),
    "sweeping": ("jobs.sweep",),
    "task_prompt": ("training.task_prompt",),
    "thresholds": ("calibration.calibration",),
    "training_data": ("training.dataset",),
    "uncertainty": ("training.uncertainty",),
}

# Names that the old modules had, where they changed too.
RENAMED = {
    "IGNORE": "VOID",
    "Refit": "RecalibrationOptions",
    "Reservoir": "PixelSample",
    "agreed": "broadcast_from_rank0",
    "begin": "open_run_folder",
    "confusions": "confusion_per_alpha",
    "entry_levels": "first_alpha_in_set",
    "fixed": "fixed_partition",
    "fresh": "is_up_to_date",
    "hits": "coverage_counts",
    "labelled": "read_example",
    "learned": "learned_partition",
    "naming": "name_file_in_errors",
    "place": "output_path",
    "refit_scores": "recalibrate_scores",
    "share": "shard",
    "total": "all_reduce_sum",
}


class _OldPaths(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes a stand-in for an old module, which looks its names up in the new ones."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "cpseg" or name not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        homes = [f"cpseg.{home}" for home in MOVED[old.removeprefix("cpseg.")]]
        warnings.warn(
            f"{old} has moved to {homes[0]}; the old path goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )

        def look_up(name: str) -> Any:
            for home in homes:
                module = importlib.import_module(home)
                for known in (name, RENAMED.get(name, name)):
                    if hasattr(module, known):
                        return getattr(module, known)
            raise AttributeError(f"module '{old}' has no attribute '{name}'")

        module.__dict__["__getattr__"] = look_up


def install() -> None:
    """Let ``import`` find the old paths; installing twice changes nothing."""
    if not any(isinstance(finder, _OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(_OldPaths())
