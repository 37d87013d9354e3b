"""Settings as one object, or as its fields given as keywords."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tests.support.folders import make
from tests.support.helpers import same

from cpseg.files import Source
from cpseg.jobs import calibrate
from cpseg.jobs.recalibrate import RecalibrationOptions
from cpseg.jobs.settings import (
    CalibrationSettings,
    CertificationSettings,
    SweepSettings,
    settings_of,
)
from cpseg.jobs.variants import Grouping, fixed_partition, learned_partition


def asked(kind: type, **keywords: Any) -> Any:
    return settings_of("here", kind, None, keywords)


def test_keywords_make_the_object() -> None:
    options = RecalibrationOptions("vector")
    want = CalibrationSettings(
        0.1, None, grouping=Grouping("blocks", block=4, grid=(3, 5)), recalibration=options
    )
    got = asked(
        CalibrationSettings,
        alpha=0.1,
        background=None,
        variant="blocks",
        block=4,
        grid=(3, 5),
        refit=options,  # its name before
    )
    assert got == want
    assert settings_of("here", CalibrationSettings, want, {}) is want
    assert asked(SweepSettings, backgrounds=[None, 0]).backgrounds == (None, 0)


def test_a_part_of_a_grouping_keeps_the_default_of_its_job() -> None:
    assert asked(CertificationSettings, background=0, block=4).grouping == Grouping("image", 4)
    assert asked(CertificationSettings, background=0).grouping == Grouping("image")
    assert asked(CalibrationSettings, alpha=0.1, background=0, block=4).grouping.variant == "pixel"


@pytest.mark.parametrize(
    ("settings", "keywords", "says"),
    [
        (None, {"alpha": 0.1, "background": 0, "alhpa": 0.2}, "settings among alpha,.* got alhpa"),
        (None, {"alpha": 0.1}, "a CalibrationSettings, got none of .*background"),
        (CalibrationSettings(0.1, 0), {"alpha": 0.1}, "a CalibrationSettings alone, got alpha"),
        (SweepSettings((0,)), {}, "a CalibrationSettings alone, got SweepSettings"),
    ],
)
def test_anything_else_is_refused(settings: Any, keywords: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=rf"here: expected {says}"):
        settings_of("here", CalibrationSettings, settings, keywords)


def test_a_job_takes_either(tmp_path: Path) -> None:
    data = make(tmp_path / "data")
    source = Source(data.root, data.probs)
    by_object = calibrate(source, data.ids, CalibrationSettings(0.3, 0, Grouping("image")))
    by_keywords = calibrate(source, data.ids, alpha=0.3, background=0, variant="image")
    assert same(by_object.threshold, by_keywords.threshold)
    assert by_object.variant == by_keywords.variant == "image"


@pytest.mark.parametrize("kind", [CalibrationSettings, CertificationSettings, SweepSettings])
def test_every_setting_is_documented(kind: type) -> None:
    for field in fields(kind):
        assert f"\n    {field.name}: " in str(inspect.getdoc(kind)), field.name


def test_a_variant_without_a_function_of_its_name_is_no_other_variant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cpseg.jobs.variants.FIXED", ("pixel", "rows"))
    with pytest.raises(AttributeError, match="rows"):
        fixed_partition("rows", (4, 4), 2)


def test_an_unknown_variant_is_refused_where_groups_are_made() -> None:
    """It gave image-wise groups in silence."""
    for word in ("pixle", "kmeans", ""):
        with pytest.raises(ValueError, match="a variant that learns nothing among 'pixel'"):
            fixed_partition(word, (4, 4), 2)
    with pytest.raises(ValueError, match="a variant that learns groups among 'kmeans'"):
        learned_partition("pixel", None, 2, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"here: expected a variant among 'pixel'.* got 'pixle'"):
        Grouping("pixle").check("here")
