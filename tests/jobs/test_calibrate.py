"""Calibrate, evaluate and compact over folders; calibrations as files."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support import folders
from tests.support.folders import DataSet, complains, newer

from cpseg import Calibration, evidence
from cpseg._internal.safe_files import (
    read_tensors,
    write_tensors,
)
from cpseg.core.class_map import ClassMap
from cpseg.files.dataset import Source
from cpseg.files.score_files import (
    write_evidence,
)
from cpseg.jobs.calibrate import calibrate, images_needed
from cpseg.jobs.compact import compact
from cpseg.jobs.evaluate import evaluate

SIZES = ((12, 16), (10, 20), (24, 32))


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return folders.make(tmp_path / "data", count=12)


@pytest.fixture
def mixed(tmp_path: Path) -> DataSet:
    return folders.make(tmp_path / "mixed", count=12, sizes=SIZES)


def source(data: DataSet, **options: Any) -> Source:
    return Source(data.root, data.probs, **options)


def stacked(data: DataSet) -> np.ndarray:
    """1 - p of the true class, [N, H, W], NaN where void."""
    found = []
    for image in data.images:
        truth = data.labels[image]
        index = np.where(truth == 255, 0, truth)[None]
        score = np.float32(1) - np.take_along_axis(data.scores[image], index, 0)[0]
        found.append(np.where(truth == 255, np.float32(np.nan), score))
    return np.stack(found)


def quantile(values: np.ndarray, alpha: str) -> np.float32:
    """The conformal quantile of the values that are numbers."""
    values = np.sort(values[~np.isnan(values)])
    rank = math.ceil((len(values) + 1) * (1 - Fraction(alpha)))
    return np.float32(np.inf) if rank > len(values) else values[rank - 1]


def same(left: Calibration, right: Calibration) -> bool:
    """Every field, bit for bit; neither has a recalibration."""
    tensors = [(left.threshold, right.threshold), (left.count, right.count)]
    names = {field.name for field in fields(Calibration)} - {"threshold", "count"}
    assert left.recalibration is right.recalibration is None
    return all(str(getattr(left, n)) == str(getattr(right, n)) for n in names) and all(
        a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes() and a.shape == b.shape
        for a, b in tensors
    )


# Calibrate


def test_pixelwise_thresholds_are_the_quantiles_at_each_cell(data: DataSet) -> None:
    found = calibrate(source(data), data.ids, alpha="0.2", background=0)
    scores = stacked(data)
    want = np.array([[quantile(scores[:, i, j], "0.2") for j in range(16)] for i in range(12)])
    assert np.array_equal(found.threshold, want)
    assert np.array_equal(found.count, (~np.isnan(scores)).sum(0))
    facts = (found.alpha, found.num_images, found.num_classes, found.background, found.variant)
    assert facts == (0.2, 12, 4, 0, "pixel")
    assert found.extra["images"] == sorted(data.images)


@pytest.mark.parametrize("variant", ["image", "blocks"])
def test_pooled_thresholds_are_the_quantile_rounded_up_by_a_percent_in_odds(
    data: DataSet, variant: str
) -> None:
    found = calibrate(source(data), data.ids, alpha=0.1, background=None, variant=variant, block=5)
    side = 5 if variant == "blocks" else 99
    scores = stacked(data)
    for top in range(0, 12, side):
        for left in range(0, 16, side):
            place = (slice(top, top + side), slice(left, left + side))
            cell = found.threshold[place].double().numpy()
            exact = float(quantile(scores[:, place[0], place[1]], "0.1"))
            assert (cell == cell.flat[0]).all()
            assert cell.flat[0] >= exact
            assert cell.flat[0] / (1 - cell.flat[0]) <= 1.01 * exact / (1 - exact)
    assert (found.variant, found.background) == (variant, None)


def test_thresholds_per_class_use_the_pixels_of_that_class(data: DataSet) -> None:
    found = calibrate(
        source(data), data.ids, alpha=0.1, background=0, variant="image", per_class=True
    )
    truth, scores = np.stack(list(data.labels.values())), stacked(data)
    assert found.threshold.shape == (4, 12, 16)
    for k in range(4):
        exact = float(quantile(scores[truth == k], "0.1"))
        value = float(found.threshold[k, 0, 0])
        assert exact <= value
        assert value / (1 - value) <= 1.01 * exact / (1 - exact)


def test_images_of_any_size_are_brought_to_the_grid(mixed: DataSet) -> None:
    found = calibrate(source(mixed), mixed.ids, alpha=0.2, background=0)
    assert found.grid == (12, 16), "the first image's size"
    assert found.num_images == 12
    assert calibrate(source(mixed), mixed.ids, alpha=0.2, background=0, grid=(5, 7)).grid == (5, 7)


def test_the_order_of_the_list_changes_nothing(data: DataSet) -> None:
    backwards = data.list_ids("backwards.txt", data.images[::-1])
    for variant in ("pixel", "image"):
        first, second = (
            calibrate(source(data), ids, alpha=0.2, background=0, variant=variant)
            for ids in (data.ids, backwards)
        )
        assert same(first, second)


def test_scores_may_lie_flat_and_in_any_format(data: DataSet, tmp_path: Path) -> None:
    before = calibrate(source(data), data.ids, alpha=0.2, background=0)
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, image in enumerate(data.images):
        stem, scores = Path(image).stem, data.scores[image]
        if number % 3 == 0:
            np.save(flat / f"{stem}.npy", scores)
        elif number % 3 == 1:
            np.savez(flat / f"{stem}.npz", probs=scores)
        else:
            write_tensors(flat / f"{stem}.safetensors", {"probs": torch.from_numpy(scores)}, {})
    assert same(calibrate(Source(data.root, flat), data.ids, alpha=0.2, background=0), before)


def test_two_images_that_would_share_flat_scores_are_refused(data: DataSet, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    np.save(tmp_path / "flat" / "00.npy", data.scores[data.images[0]])
    (data.root / "two.txt").write_text("a/00.png m.png\nb/00.png n.png\n")
    with pytest.raises(ValueError, match="subfolders") as caught:
        calibrate(
            Source(data.root, tmp_path / "flat"), data.root / "two.txt", alpha=0.2, background=0
        )
    complains(caught.value, tmp_path / "flat" / "00.npy", "a/00.png and b/00.png")


def test_another_void_value_is_void(data: DataSet) -> None:
    before = calibrate(source(data), data.ids, alpha=0.2, background=0)
    for image in data.images:
        labels = data.labels[image]
        Image.fromarray(np.where(labels == 255, 11, labels).astype(np.uint8)).save(
            data.mask_file(image)
        )
    found = calibrate(source(data, void=11), data.ids, alpha=0.2, background=0)
    assert found.extra["masks"] == {"void": 11, "map": None}
    assert same(replace(found, extra=before.extra), before)
    with pytest.raises(ValueError, match="got 11") as caught:
        calibrate(source(data), data.ids, alpha=0.2, background=0)
    complains(caught.value, data.mask_file(data.images[0]), "0..3 or 255")


def test_a_mask_map_brings_mask_values_to_classes(data: DataSet) -> None:
    before = calibrate(source(data), data.ids, alpha=0.2, background=0)
    values = np.array([5, 0, 7, 2], np.uint8)  # class k is stored as values[k]; 1, 3, 4, 6 drop
    for image in data.images:
        labels = data.labels[image]
        stored = np.where(labels == 255, 3, values[np.minimum(labels, 3)]).astype(np.uint8)
        Image.fromarray(stored).save(data.mask_file(image))
    mask_map = ClassMap((1, None, 3, None, None, 0, None, 2))
    found = calibrate(source(data, mask_map=mask_map), data.ids, alpha=0.2, background=0)
    assert found.extra["masks"] == {"void": 255, "map": mask_map.to_json()}
    assert same(replace(found, extra=before.extra), before)


def test_a_mask_map_of_more_values_than_masks_hold_is_refused(data: DataSet) -> None:
    mask_map = ClassMap((0, 1, 2, 3, *[None] * 253))
    with pytest.raises(ValueError, match="mask map: expected at most 256 values, got 257; map"):
        calibrate(source(data, mask_map=mask_map), data.ids, alpha=0.2, background=0)


def test_evidence_of_another_class_map_is_refused(data: DataSet, tmp_path: Path) -> None:
    turned = ClassMap((1, 2, 3, 0))
    made = calibrate(source(data, class_map=turned), data.ids, alpha=0.2, background=0)
    for class_map, other in ((None, "no"), (ClassMap((2, 1, 3, 0)), "another")):
        out = tmp_path / other
        compact(source(data, class_map=class_map), data.ids, out, background=0)
        with pytest.raises(ValueError, match="evidence") as caught:
            evaluate(Source(data.root, out), data.ids, made)
        said = f"evidence made with this class map, got evidence made with {other} class map"
        complains(caught.value, out / "images" / "00.safetensors", said)
    plain = calibrate(source(data), data.ids, alpha=0.2, background=0)
    with pytest.raises(ValueError, match=r"made with no class map, got .* made with another"):
        evaluate(Source(data.root, tmp_path / "another"), data.ids, plain)
    compact(source(data), data.ids, tmp_path / "right", background=0, calibration=made)
    rows = evaluate(Source(data.root, tmp_path / "right"), data.ids, made, constant=0.4)
    scores = evaluate(source(data), data.ids, made, constant=0.4)
    kept = {row.rule: row.miou_kept for row in scores}
    assert "constant 0.4" in kept
    assert {row.rule: row.miou_kept for row in rows}.items() <= kept.items()
    assert "constant 0.4" in {row.rule for row in rows}


def test_evidence_older_than_its_scores_is_made_again(data: DataSet, tmp_path: Path) -> None:
    compact(source(data), data.ids, tmp_path / "out", background=0)
    assert compact(source(data), data.ids, tmp_path / "out", background=0) == 0
    newer(data.score_file(data.images[3]))
    assert compact(source(data), data.ids, tmp_path / "out", background=0) == 1


def test_a_mask_map_to_other_classes_is_refused(data: DataSet) -> None:
    mask_map = ClassMap((0, 1, 2, 2))
    with pytest.raises(ValueError, match="mask map") as caught:
        calibrate(source(data, mask_map=mask_map), data.ids, alpha=0.2, background=0)
    complains(caught.value, "mask map", "classes up to 3", "got 2 as the largest")


def test_a_class_map_is_applied_and_kept(data: DataSet) -> None:
    class_map = ClassMap((0, 1, 1, 0))
    for image in data.images:
        labels = data.labels[image]
        merged = np.where(labels == 255, 255, np.array([0, 1, 1, 0])[np.minimum(labels, 3)])
        Image.fromarray(merged.astype(np.uint8)).save(data.mask_file(image))
        data.labels[image][:] = merged
        scores = torch.from_numpy(data.scores[image])
        data.scores[image] = class_map(scores).numpy()
    found = calibrate(source(data, class_map=class_map), data.ids, alpha="0.2", background=0)
    scores = stacked(data)
    want = np.array([[quantile(scores[:, i, j], "0.2") for j in range(16)] for i in range(12)])
    assert np.array_equal(found.threshold, want)
    assert found.num_classes == 2
    assert found.extra["class_map"] == class_map.to_json()
    # Evaluating needs no map: the calibration brings it; the same again does no harm.
    rows = evaluate(source(data), data.ids, found)
    assert str(evaluate(source(data, class_map=class_map), data.ids, found)) == str(rows)
    with pytest.raises(ValueError, match="--class-map") as caught:
        evaluate(source(data, class_map=ClassMap((0, 1, 0, 1))), data.ids, found)
    complains(caught.value, "class map", "that of the calibration")


def test_a_class_map_of_another_model_names_the_file(data: DataSet) -> None:
    with pytest.raises(ValueError, match="model classes") as caught:
        calibrate(source(data, class_map=ClassMap((0, 1, 1))), data.ids, alpha=0.2, background=0)
    assert str(caught.value).startswith(f"{data.score_file(data.images[0])}: class map: ")


def test_evidence_does_not_calibrate(data: DataSet) -> None:
    image = data.images[3]
    data.score_file(image).unlink()
    path = data.score_file(image).with_suffix(".safetensors")
    write_evidence(path, evidence(torch.from_numpy(data.scores[image]), background=0))
    with pytest.raises(ValueError, match="evidence") as caught:
        calibrate(source(data), data.ids, alpha=0.2, background=0)
    complains(caught.value, path, "probabilities [K, H, W]")


@pytest.mark.parametrize("classes", [3, 5])
def test_scores_of_another_class_count_name_the_file(data: DataSet, classes: int) -> None:
    image = data.images[3]
    np.save(data.score_file(image), data.scores[image][[0, 1, 2, 3, 0][:classes]])
    with pytest.raises(ValueError, match="4 classes") as caught:
        calibrate(source(data), data.ids, alpha=0.2, background=0)
    assert str(caught.value).startswith(f"{data.score_file(image)}: ")


def test_a_mask_of_another_size_is_refused(data: DataSet) -> None:
    image = data.images[3]
    Image.fromarray(data.labels[image].T.copy()).save(data.mask_file(image))
    with pytest.raises(ValueError, match="16x12") as caught:
        calibrate(source(data), data.ids, alpha=0.2, background=0)
    complains(caught.value, data.mask_file(image), "12x16")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"alpha": 0}, "alpha"),
        ({"alpha": 1}, "alpha"),
        ({"alpha": "x"}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"variant": "voronoi"}, "voronoi"),
        ({"background": 4}, "background"),
        ({"background": -1}, "background"),
        ({"variant": "blocks", "block": 0}, "block"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(data: DataSet, settings: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part) as caught:
        calibrate(source(data), data.ids, **{"alpha": 0.2, "background": 0, **settings})
    assert len(str(caught.value).splitlines()) == 1


def test_images_needed_is_the_fewest_that_give_a_finite_threshold() -> None:
    assert [images_needed(alpha) for alpha in (0.05, "0.1", "0.5", "0.3", 0.01)] == [
        19,
        9,
        1,
        3,
        99,
    ]
    for alpha in (f"{n / 1000:.3f}" for n in range(1, 1000, 7)):
        n = images_needed(alpha)
        assert math.isfinite(quantile(np.zeros(n), alpha)), alpha
        assert n == 0 or math.isinf(quantile(np.zeros(n - 1), alpha)), alpha


# Calibrations as files


@pytest.fixture
def saved(data: DataSet, tmp_path: Path) -> tuple[Calibration, Path]:
    made = calibrate(source(data), data.ids, alpha=0.2, background=0)
    made.save(tmp_path / "c.safetensors")
    return made, tmp_path / "c.safetensors"


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("alpha", ["0.05", "0.2"])
@pytest.mark.parametrize("background", [2, None])
def test_a_calibration_comes_back_bit_for_bit(
    data: DataSet, tmp_path: Path, per_class: bool, alpha: str, background: int | None
) -> None:
    made = calibrate(
        source(data), data.ids, alpha=alpha, background=background, per_class=per_class
    )
    made = replace(made, extra={"class_map": ClassMap((0, None, 1, 2)).to_json(), "note": "ü"})
    assert (made.infinite_share == 1) == (alpha == "0.05") or per_class
    made.save(tmp_path / "sub" / "c.safetensors")
    found = Calibration.load(tmp_path / "sub" / "c.safetensors")
    assert same(found, made)
    made.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "sub" / "c.safetensors"
    ).read_bytes()


def test_infinite_thresholds_come_back(tmp_path: Path) -> None:
    threshold = torch.tensor([[torch.inf, -torch.inf, 1e-45], [0.1, 1.0, 0.0]])
    made = Calibration(threshold, torch.zeros(2, 3, dtype=torch.int64), 0.1, 3, 4)
    made.save(tmp_path / "c.safetensors")
    assert same(Calibration.load(tmp_path / "c.safetensors"), made)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_calibration_is_refused(saved: tuple[Calibration, Path], length: int) -> None:
    path = saved[1]
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="unreadable") as caught:
        Calibration.load(path)
    complains(caught.value, path, "safetensors")


def change(path: Path, tensors: dict[str, torch.Tensor | None], metadata: dict[str, Any]) -> None:
    held, known = read_tensors(path)
    held = {name: t for name, t in {**held, **tensors}.items() if t is not None}
    known = {name: v for name, v in {**known, **metadata}.items() if v != "gone"}
    write_tensors(path, held, known)


BAD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a later format": ({}, {"format": 99}),
    "another kind": ({}, {"kind": "evidence"}),
    "no threshold": ({"threshold": None}, {}),
    "no count": ({"count": None}, {}),
    "NaN": ({"threshold": torch.full((12, 16), torch.nan)}, {}),
    "another dtype": ({"threshold": torch.zeros(12, 16).double()}, {}),
    "another shape": ({"threshold": torch.zeros(12, 15), "count": torch.zeros(12, 15)}, {}),
    "transposed": ({"threshold": torch.zeros(16, 12), "count": torch.zeros(16, 12)}, {}),
    "counts of another shape": ({"count": torch.zeros(3, 3, dtype=torch.int64)}, {}),
    "classes of another number": (
        {"threshold": torch.zeros(5, 12, 16), "count": torch.zeros(5, 12, 16)},
        {},
    ),
    "an unknown score": ({}, {"score": "topk"}),
    "an unknown unit": ({}, {"unit": "scene"}),
    "a randomness that is none": ({}, {"randomized": 1}),
    **{
        f"no {name}": ({}, {name: "gone"})
        for name in (
            "kind",
            "format",
            "alpha",
            "variant",
            "score",
            "num_classes",
            "num_images",
            "grid",
            "background",
            "ignore_index",
        )
    },
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_calibration_is_refused(saved: tuple[Calibration, Path], case: str) -> None:
    path = saved[1]
    change(path, *BAD[case])
    with pytest.raises(ValueError, match="expected") as caught:
        Calibration.load(path)
    complains(caught.value, path)


@pytest.mark.parametrize(
    "metadata",
    [{"grid": None}, {"alpha": "x"}, {"alpha": 7}, {"background": 9}, {"num_classes": "4"}],
    ids=str,
)
def test_nonsense_in_a_calibration_is_refused(
    saved: tuple[Calibration, Path], metadata: dict[str, Any]
) -> None:
    path = saved[1]
    change(path, {}, metadata)
    with pytest.raises(ValueError, match="expected") as caught:
        Calibration.load(path)
    complains(caught.value, path)


def test_other_safetensors_files_are_no_calibration(data: DataSet, tmp_path: Path) -> None:
    scores = torch.from_numpy(data.scores[data.images[0]])
    write_evidence(tmp_path / "e.safetensors", evidence(scores, background=0))
    write_tensors(tmp_path / "p.safetensors", {"probs": scores}, {})
    (tmp_path / "n.safetensors").write_bytes(data.score_file(data.images[0]).read_bytes())
    for name in "epn":
        with pytest.raises(ValueError, match="expected") as caught:
            Calibration.load(tmp_path / f"{name}.safetensors")
        complains(caught.value, tmp_path / f"{name}.safetensors")


def test_a_missing_calibration_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"c\.safetensors"):
        Calibration.load(tmp_path / "c.safetensors")


def test_a_calibration_is_applied_to_its_class_count_alone(
    saved: tuple[Calibration, Path], data: DataSet
) -> None:
    loaded = Calibration.load(saved[1])
    scores = torch.from_numpy(data.scores[data.images[0]])
    with pytest.raises(ValueError, match="4 classes as calibrated"):
        loaded.pseudo_labels(scores[:3])
    with pytest.raises(ValueError, match="4 classes as calibrated"):
        loaded.prediction_set(torch.cat([scores, scores[:1]]))
    with pytest.raises(ValueError, match="classes"):
        loaded.pseudo_labels(evidence(scores[:3], background=0))
    with pytest.raises(ValueError, match="background"):
        loaded.pseudo_labels(evidence(scores, background=1))
    with pytest.raises(ValueError, match="background"):
        loaded.pseudo_labels(evidence(scores, background=None))
