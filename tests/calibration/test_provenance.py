"""``Provenance``: its JSON is that of older files, and whatever does not fit is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.helpers import seeded

from cpseg import Calibration, Calibrator, Certifier, groups
from cpseg.calibration.provenance import (
    GroupImages,
    ImageProfile,
    Provenance,
    RecalibrationImages,
    SourceImages,
)
from cpseg.core.class_map import ClassMap
from cpseg.core.mask_format import MaskFormat

CLASS_MAP = ClassMap((0, None, 1, 2)).to_json()
FULL = Provenance(
    images=("a", "b"),
    certification_images=("c",),
    recalibration=RecalibrationImages(("d",), 0, True),
    groups=GroupImages(("e", "f"), 2, True),
    class_map=CLASS_MAP,
    masks=MaskFormat(11, ClassMap((0, None, 1, 2))),
    fallback_shares={"pixel": 0.25, "blocks": 0.5, "image": 0.0},
    profile=ImageProfile((0.5, 1.0), (0.75, 0.875), True),
    sources=(SourceImages("S", 2, 5), SourceImages("T", 1, 1)),
    other={"note": "ü"},
)
# As version 0.x wrote it, key for key; profile and cross_fitted came later.
FULL_JSON: dict[str, Any] = {
    "images": ["a", "b"],
    "certifying_images": ["c"],
    "refitted": {"apart": True, "folds": 0, "images": ["d"]},
    "groups": {"learned_on": 2, "apart": True, "images": ["e", "f"]},
    "class_map": CLASS_MAP,
    "masks": {"void": 11, "map": CLASS_MAP},
    "fallback": {"pixel": 0.25, "blocks": 0.5, "image": 0.0},
    "profile": {"kept": [0.5, 1.0], "largest": [0.75, 0.875], "in_sample": True},
    "cross_fitted": [
        {"folder": "S", "out_of_fold": 2, "trained_on": 5},
        {"folder": "T", "out_of_fold": 1, "trained_on": 1},
    ],
    "note": "ü",
}


def test_its_json_is_that_of_older_files() -> None:
    assert FULL.to_json() == FULL_JSON
    assert Provenance().to_json() == {}
    json.dumps(FULL.to_json())


@pytest.mark.parametrize("key", [None, *FULL_JSON])
def test_json_comes_back_whole_and_entry_by_entry(key: str | None) -> None:
    content = FULL_JSON if key is None else {key: FULL_JSON[key]}
    found = Provenance.from_json(json.loads(json.dumps(content)))
    assert found.to_json() == content
    if key is None:
        assert found == FULL


def test_groups_and_recalibration_of_files_without_ids_come_back() -> None:
    content = {
        "groups": {"learned_on": 3, "apart": False},
        "refitted": {"apart": False, "folds": 4},
        "masks": {"void": 0, "map": None},
    }
    found = Provenance.from_json(content)
    assert found.groups == GroupImages(None, 3, False)
    assert found.recalibration == RecalibrationImages(None, 4, False)
    assert found.to_json() == content
    assert found.images_used == frozenset()


def test_images_used_are_those_of_every_part() -> None:
    assert FULL.images_used == {*"abcdef"}
    assert replace(FULL, images=()).images_used == {*"cdef"}
    assert replace(FULL, certification_images=()).images_used == {*"abdef"}
    assert replace(FULL, groups=None).images_used == {*"abcd"}
    assert replace(FULL, recalibration=None).images_used == {*"abcef"}


def test_it_is_a_read_only_mapping_of_its_json() -> None:
    assert dict(FULL) == FULL_JSON
    assert FULL == FULL_JSON
    assert Provenance() not in (FULL, FULL_JSON)
    assert Provenance() == {}
    assert (len(FULL), set(FULL)) == (len(FULL_JSON), set(FULL_JSON))
    assert (FULL.get("masks"), FULL.get("nothing")) == (FULL_JSON["masks"], None)
    FULL["groups"].pop("images")
    FULL["images"].append("z")
    assert FULL.to_json() == FULL_JSON
    with pytest.raises(KeyError, match="nothing"):
        FULL["nothing"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "a JSON object as extra"),
        (["images"], "a JSON object as extra"),
        ({"images": "a"}, "images as a list of image ids"),
        ({"images": [1]}, "images as a list of image ids"),
        ({"certifying_images": {}}, "certifying_images as a list"),
        ({"refitted": []}, "refitted with apart, folds"),
        ({"refitted": {"apart": True}}, "refitted with apart, folds"),
        ({"refitted": {"apart": 1, "folds": 0}}, "apart as a bool"),
        ({"refitted": {"apart": True, "folds": -1}}, "folds as a whole number"),
        ({"refitted": {"apart": True, "folds": 0, "images": 3}}, "refitted images as a list"),
        ({"groups": {"learned_on": 3}}, "groups with apart, learned_on"),
        ({"groups": {"learned_on": True, "apart": True}}, "learned_on as a whole number"),
        ({"groups": {"learned_on": 1, "apart": None}}, "apart as a bool"),
        ({"groups": {"learned_on": 1, "apart": True, "images": [None]}}, "groups images as a"),
        ({"class_map": 3}, "a JSON object"),
        ({"class_map": {"map": {"0": 0, "1": 2}}}, "a model class for every class"),
        ({"masks": {"void": 11}}, "masks with map, void"),
        ({"cross_fitted": {"folder": "S"}}, "cross_fitted as a list of folders"),
        ({"cross_fitted": [{"folder": "S", "trained_on": 1}]}, "cross_fitted with folder, out_of"),
        (
            {"cross_fitted": [{"folder": "S", "out_of_fold": 0, "trained_on": 1}]},
            "cross_fitted as a list of folders",
        ),
        (
            {"cross_fitted": [{"folder": 3, "out_of_fold": 1, "trained_on": 1}]},
            "cross_fitted as a list of folders",
        ),
        ({"masks": {"void": "11", "map": None}}, "void as a whole number"),
        ({"masks": {"void": 11, "map": {"map": {"0": 1}}}}, "a model class for every class"),
        ({"fallback": [0.5]}, "fallback as a JSON object"),
        ({"fallback": {"pixel": 1.5}}, "fallback with a proportion"),
        ({"profile": [0.5]}, "profile with in_sample, kept, largest"),
        ({"profile": {"kept": [0.5], "largest": [0.5]}}, "profile with in_sample, kept, largest"),
        ({"profile": {"kept": 1, "largest": [], "in_sample": True}}, "two lists of shares"),
        ({"profile": {"kept": [1], "largest": [], "in_sample": True}}, "as long as each other"),
        ({"profile": {"kept": [2], "largest": [1], "in_sample": True}}, "two lists of shares"),
        ({"profile": {"kept": ["a"], "largest": [1], "in_sample": True}}, "two lists of shares"),
        ({"profile": {"kept": [1], "largest": [1], "in_sample": 1}}, "in_sample as a bool"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_one_line(content: Any, part: str) -> None:
    with pytest.raises(ValueError, match=part) as caught:
        Provenance.from_json(content, where="c.safetensors")
    text = str(caught.value)
    assert text.startswith("c.safetensors")
    assert "expected" in text
    assert "; " in text
    assert len(text.splitlines()) == 1


def calibration(**extra: Any) -> Calibration:
    return Calibration(
        torch.zeros(1, 2),
        torch.ones(1, 2, dtype=torch.int64),
        alpha=0.1,
        num_images=1,
        num_classes=3,
        **extra,
    )


def test_a_calibration_takes_a_mapping_and_gives_it_typed(tmp_path: Path) -> None:
    assert calibration().provenance == Provenance()
    made = calibration(extra=FULL_JSON)
    assert isinstance(made.extra, Provenance)
    assert made.extra == FULL_JSON
    assert made.provenance is made.extra
    assert made.provenance.images_used == FULL.images_used
    made.save(tmp_path / "c")
    assert Calibration.load(tmp_path / "c").provenance == FULL
    assert made.to("cpu").provenance is made.provenance
    with pytest.raises(ValueError, match="Calibration: expected images as a list"):
        calibration(extra={"images": 3})


def draw(images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(seed)
    probs = torch.rand(images, 3, 4, 4, generator=generator).mul(6).softmax(1)
    return probs, torch.randint(3, (images, 4, 4), generator=generator)


def test_a_calibrator_records_what_it_was_given_and_its_images() -> None:
    given = replace(FULL, images=(), certification_images=())
    calibrator = Calibrator(
        groups.image((4, 4)), alpha=0.9, variant="kmeans", provenance=given, background=None
    )
    calibrator.update(*draw(2, 0), ids=["b", "a"])
    made = calibrator.compute()
    assert made.variant == "kmeans"
    assert made.provenance == replace(given, images=("a", "b"))
    assert calibrator.provenance == made.provenance
    plain = Calibrator(groups.image((4, 4)), alpha=0.9)
    plain.update(*draw(2, 0))
    assert (plain.compute().variant, plain.compute().extra) == ("groups", {})
    pixelwise = Calibrator(groups.pixel((4, 4)), variant="blocks")
    pixelwise.update(*draw(2, 0))
    assert pixelwise.compute().variant == "blocks"
    with pytest.raises(ValueError, match="a group per cell for 'pixel', got pooled groups"):
        Calibrator(groups.image((4, 4)), variant="pixel")


def test_a_certifier_passes_it_on_and_refuses_every_image_of_it() -> None:
    calibrator = Calibrator(
        groups.image((4, 4)), alpha=0.9, variant="image", provenance=Provenance(groups=FULL.groups)
    )
    calibrator.update(*draw(3, 0), ids=["a", "b", "c"])
    certifier = Certifier(calibrator, alphas=["0.9", "0.5"], max_error=0.5)
    for name in ("a", "e"):
        with pytest.raises(ValueError, match=f"'{name}', used in calibration"):
            certifier.update(*draw(1, 1), ids=[name])
    certifier.update(*draw(2, 1), ids=["y", "x"])
    made = certifier.compute()
    assert made.variant == "image"
    assert made.provenance == Provenance(("a", "b", "c"), ("x", "y"), groups=FULL.groups)
