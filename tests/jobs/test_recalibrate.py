"""Refitted scores through the offline jobs and through calibrations, files and certificates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support import folders
from tests.support.folders import DataSet, command, complains, done, refused
from tests.support.helpers import raises, same, seeded
from torch import Tensor

from cpseg import (
    Calibration,
    Calibrator,
    Certifier,
    Recalibration,
    Recalibrator,
    coverage,
    evidence,
    groups,
    prediction_set,
    pseudo_labels,
)
from cpseg._internal.safe_files import read_tensors, write_tensors
from cpseg.files.dataset import Source
from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.certify import certify, overlap
from cpseg.jobs.evaluate import evaluate
from cpseg.jobs.recalibrate import RecalibrationOptions

Capture = pytest.CaptureFixture[str]
SIZE = (12, 16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """24 images whose scores name class k + 1 where class k is: argmax is nearly always wrong."""
    made = folders.make(tmp_path_factory.mktemp("refit"), count=24)
    for image, scores in made.scores.items():
        made.scores[image] = np.roll(scores, 1, axis=0)
        np.save(made.score_file(image), made.scores[image])
    return made


def source(data: DataSet) -> Source:
    return Source(data.root, data.probs)


def pair(data: DataSet, image: str) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(data.scores[image]), torch.from_numpy(data.labels[image])


def fitted(data: DataSet, images: list[str], method: str = "dirichlet") -> Recalibration:
    recalibrator = Recalibrator(4, method=method, seed=3)
    for image in images:
        recalibrator.update(*pair(data, image))
    return recalibrator.fit()


REFIT = RecalibrationOptions("dirichlet", share=0.25, context=())


def test_some_images_fit_and_the_others_calibrate(data: DataSet) -> None:
    made = calibrate(
        source(data), data.ids, alpha=0.1, background=0, variant="image", seed=3, refit=REFIT
    )
    apart = made.extra["refitted"]["images"]
    assert len(apart) == 6
    assert made.extra["images"] == sorted(set(data.images) - set(apart))
    assert made.num_images == 18
    by_hand = fitted(data, apart)
    calibrator = Calibrator(groups.image(SIZE), alpha=0.1, background=0, recalibration=by_hand)
    for image in made.extra["images"]:
        calibrator.update(*pair(data, image))
    want = calibrator.compute()
    assert same(made.threshold, want.threshold)
    assert made.recalibration is not None
    assert made.recalibration.fingerprint == by_hand.fingerprint
    mapped = Calibrator(groups.image(SIZE), alpha=0.1, background=0)
    for image in made.extra["images"]:
        probs, labels = pair(data, image)
        mapped.update(by_hand(probs), labels)
    assert same(mapped.compute().threshold, want.threshold)


@pytest.mark.parametrize("threshold", ["map", "per class"])
def test_a_calibration_takes_raw_scores_and_applies_its_map(
    data: DataSet, tmp_path: Path, threshold: str
) -> None:
    per_class = threshold == "per class"
    made = calibrate(
        source(data), data.ids, alpha=0.2, background=1, variant="image", refit=REFIT,
        per_class=per_class,
    )  # fmt: skip
    made.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    recalibration = loaded.recalibration
    assert recalibration is not None
    for image in data.images[:3]:
        probs, _ = pair(data, image)
        mapped = recalibration(probs)
        want = pseudo_labels(mapped, made.threshold, background=1)
        assert same(loaded.pseudo_labels(probs), want)
        assert same(loaded.prediction_set(probs), prediction_set(mapped, made.threshold))
        found = loaded.evidence(probs)
        assert same(found.best, evidence(mapped, background=1).best)
        if not per_class:
            assert same(loaded.pseudo_labels(found), want)
    with raises(ValueError, "Calibration.pseudo_labels", "got evidence made with no recalibration"):
        loaded.pseudo_labels(evidence(mapped, background=1))
    plain = replace(loaded, recalibration=None)
    with raises(
        ValueError, "Calibration.pseudo_labels", "evidence made with no recalibration, got"
    ):
        plain.pseudo_labels(found)


def test_folds_score_every_image_by_a_map_that_did_not_see_it(data: DataSet) -> None:
    refit = RecalibrationOptions("vector", folds=4, context=())
    made = calibrate(
        source(data), data.ids, alpha=0.1, background=None, variant="image", seed=3, refit=refit
    )
    order = torch.randperm(24, generator=seeded(3)).tolist()
    calibrator = Calibrator(groups.image(SIZE), alpha=0.1)
    for number in range(4):
        inside = [data.images[place] for place in order[number::4]]
        own = fitted(data, [i for i in data.images if i not in inside], "vector")
        for image in inside:
            probs, labels = pair(data, image)
            calibrator.update(own(probs), labels)
    assert same(made.threshold, calibrator.compute().threshold)
    assert made.recalibration is not None
    assert made.recalibration.fingerprint == fitted(data, data.images, "vector").fingerprint
    assert made.extra["refitted"] == {"apart": False, "folds": 4, "images": sorted(data.images)}


def test_learned_groups_learn_from_refitted_scores(data: DataSet) -> None:
    made = calibrate(
        source(data), data.ids, alpha=0.2, background=None, variant="kmeans", num_groups=3,
        group_share=0.5, refit=REFIT,
    )  # fmt: skip
    assert made.num_images == 9
    learned = made.extra["groups"]["images"]
    assert made.extra["groups"] == {"learned_on": 9, "apart": True, "images": learned}
    assert len(learned) == 9
    assert not set(learned) & set(made.extra["images"])
    assert made.threshold.unique().numel() == 3


def test_a_model_of_other_classes(tmp_path: Path, capsys: Capture) -> None:
    """Six classes of the model, two of them never there, onto four."""
    data = folders.make(tmp_path / "data", count=24)
    for image, scores in data.scores.items():
        wide = np.concatenate([scores[::-1] * 0.9, np.full((2, *SIZE), 0.05, np.float32)])
        np.save(data.score_file(image), wide.astype(np.float32))
    words = data.options(alpha=0.1, background=0, variant="image", recalibrate="dirichlet")
    words += ["--num-classes", "4", "--context", "none", "-o", str(tmp_path / "c.safetensors")]
    said = done(command(capsys, "calibrate", *words)).out
    assert "dirichlet map of 6 softmax scores onto 4 classes" in said
    beside = Recalibration.load(tmp_path / "c.recalibration.safetensors")
    assert [pairs[0][0] for pairs in beside.correspondence()] == [3, 2, 1, 0]
    rows = evaluate(source(data), data.ids, Calibration.load(tmp_path / "c.safetensors"))
    assert [row.rule for row in rows] == ["recalibrated argmax", "image", "image, suppressed"]
    assert rows[0].wrong < 0.35
    for option, value in (("num_classes", 4), ("recalibrate_folds", 3), ("scores", "sigmoid")):
        words = data.options(alpha=0.1, background=0, **{option: value})
        result = command(capsys, "calibrate", *words, "-o", tmp_path / "no")
        name = f"--{option.replace('_', '-')}"
        refused(result, f"{name}: expected a recalibration, got --recalibrate none; pass")
    vector = data.options(alpha=0.1, background=0, recalibrate="vector", num_classes=4)
    result = command(capsys, "calibrate", *vector, "-o", tmp_path / "no")
    refused(result, "expected 4 source classes for method 'vector', got 6")


def test_masks_evidence_and_tables_go_through_the_map(
    data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    words = data.options(alpha=0.1, background="none", recalibrate="dirichlet", context="none")
    done(command(capsys, "calibrate", *words, "-o", tmp_path / "c.safetensors"))
    words = data.options(calibration=tmp_path / "c.safetensors")
    done(command(capsys, "label", *words, "-o", tmp_path / "one"))
    done(command(capsys, "compact", *words, "-o", tmp_path / "evidence"))
    small = data.options(calibration=tmp_path / "c.safetensors", probs=tmp_path / "evidence")
    done(command(capsys, "label", *small, "-o", tmp_path / "two"))
    made = Calibration.load(tmp_path / "c.safetensors")
    for image in data.images:
        one, two = (
            np.array(Image.open(tmp_path / out / "masks" / image)) for out in ("one", "two")
        )
        assert np.array_equal(one, two)
        want = made.pseudo_labels(pair(data, image)[0]).numpy()
        assert np.array_equal(one, want)
    said = done(command(capsys, "evaluate", *words)).out
    assert "raw argmax" in said
    assert "recalibrated argmax" in said
    assert "promised: coverage of at least 90 % at each of the 12x16 pixels that" in said
    # Evidence of raw scores does not fit, and a folder of another map's masks is another run.
    raw = data.options(background="none")
    done(command(capsys, "compact", *raw, "-o", tmp_path / "raw"))
    mixed = data.options(calibration=tmp_path / "c.safetensors", probs=tmp_path / "raw")
    refused(command(capsys, "label", *mixed, "-o", tmp_path / "three"), "no recalibration")
    assert made.recalibration is not None
    tilted = replace(made, recalibration=made.recalibration.with_prior_power(0.5))
    tilted.save(tmp_path / "tilted.safetensors")
    words = data.options(calibration=tmp_path / "tilted.safetensors")
    refused(command(capsys, "label", *words, "-o", tmp_path / "one"), "another run")
    refused(command(capsys, "compact", *words, "-o", tmp_path / "evidence"), "another run")


def test_the_prior_alone_is_divided_out(data: DataSet) -> None:
    refit = RecalibrationOptions("none", share=0.25, prior_power=1.0)
    made = calibrate(source(data), data.ids, alpha=0.1, background=None, refit=refit)
    assert made.recalibration is not None
    probs, _ = pair(data, data.images[0])
    tilted = probs / made.recalibration.prior.reshape(-1, 1, 1)
    assert torch.allclose(made.recalibration(probs), (tilted / tilted.sum(0)).float(), atol=1e-5)


@pytest.mark.parametrize("share", ["0", None])
def test_what_voids_the_promise_is_said(
    data: DataSet, tmp_path: Path, capsys: Capture, share: str | None
) -> None:
    words = data.options(alpha=0.2, background="none", recalibrate="vector", context="none")
    words += ["--recalibrate-share", share] if share else ["--recalibrate-folds", "3"]
    result = command(capsys, "calibrate", *words, "-o", tmp_path / "c.safetensors")
    assert result.code == 0
    (warning,) = result.err.splitlines()
    assert "the recalibration was fitted " in warning
    assert ": nothing is promised; pass --recalibrate-share 0.3" in warning
    said = done(command(capsys, "evaluate", *data.options(calibration=tmp_path / "c.safetensors")))
    assert (
        "promised: nothing: the probabilities were recalibrated on the calibration images"
        in said.out
    )


def test_certificates_refit_on_the_images_that_set_thresholds(
    data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    words = data.options(background="none", max_error=0.4, calibrate_share=0.25)
    result = command(capsys, "certify", *words, "-o", tmp_path / "no.safetensors")
    assert result.code == 1  # the raw scores are wrong nearly everywhere
    words += ["--recalibrate", "dirichlet", "--context", "none"]
    done(command(capsys, "certify", *words, "-o", tmp_path / "c.safetensors"))
    made = Calibration.load(tmp_path / "c.safetensors")
    assert made.certificate is not None
    assert made.certificate.num_images == 18
    assert made.recalibration is not None
    assert made.recalibration.fingerprint == fitted_like(data, made).fingerprint
    assert overlap(made, data.ids) == sorted(data.images)
    rows = evaluate(source(data), data.ids, made)
    assert rows[-1].wrong < 0.4


def fitted_like(data: DataSet, made: Calibration) -> Recalibration:
    recalibrator = Recalibrator(4, seed=0)
    for image in made.extra["images"]:
        recalibrator.update(*pair(data, image))
    return recalibrator.fit()


def test_a_certifier_measures_through_the_map(data: DataSet) -> None:
    made = certify(
        source(data), data.ids, background=None, max_error=0.4, calibrate_share=0.25,
        refit=RecalibrationOptions(context=()),
    )  # fmt: skip
    assert made.recalibration is not None
    setting = made.extra["images"]
    outside = [image for image in data.images if image not in setting]
    by_hand = {}
    for mapped in (False, True):
        calibrator = Calibrator(
            groups.image(SIZE), alpha=0.995, recalibration=None if mapped else made.recalibration
        )
        apply = made.recalibration if mapped else (lambda probs: probs)
        for image in setting:
            probs, labels = pair(data, image)
            calibrator.update(apply(probs), labels, ids=image)
        certifier = Certifier(calibrator, max_error=0.4)
        for image in setting:
            probs, labels = pair(data, image)
            certifier.learn_order(apply(probs), labels, ids=image)
        for image in outside:
            probs, labels = pair(data, image)
            certifier.update(apply(probs), labels, ids=image)
        by_hand[mapped] = certifier.compute()
    assert same(by_hand[False].threshold, by_hand[True].threshold)
    assert same(by_hand[False].threshold, made.threshold)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"recalibrate_share": 0.01}, "a --recalibrate-share that splits 24 images in two"),
        ({"recalibrate_share": 1}, "a --recalibrate-share that splits 24 images in two"),
        (
            {"recalibrate_folds": 25},
            "2 to 24 folds for 24 labelled images, got 25; pass another --recalibrate-folds",
        ),
        ({"recalibrate": "isotonic"}, "invalid choice: 'isotonic'"),
        ({"recalibrate": "temperature", "context": "location"}, "no context for 'temperature'"),
        ({"context": "weather"}, "expected auto, none or a list of location"),
        ({"prior_power": 1.5}, "expected a number in [0, 1], got '1.5'"),
    ],
    ids=str,
)
def test_bad_options_are_refused_in_one_line(
    data: DataSet, tmp_path: Path, capsys: Capture, option: dict[str, object], says: str
) -> None:
    words = {"alpha": 0.2, "background": "none", "recalibrate": "dirichlet", "context": "none"}
    result = command(
        capsys, "calibrate", *data.options(**{**words, **option}), "-o", tmp_path / "c.safetensors"
    )
    refused(result, says)
    assert list(tmp_path.iterdir()) == []


def test_scores_of_another_model_are_refused(data: DataSet) -> None:
    made = calibrate(source(data), data.ids, alpha=0.2, background=None, refit=REFIT)
    with raises(ValueError, "Calibration.pseudo_labels", "scores of 4 source classes, got probs"):
        made.pseudo_labels(torch.rand(5, 3, 3))
    calibrator = Calibrator(groups.image(SIZE), recalibration=made.recalibration)
    with raises(ValueError, "Calibrator.update", "scores of 4 source classes, got probs"):
        calibrator.update(torch.rand(5, 3, 3), torch.zeros(3, 3, dtype=torch.int64))
    with raises(ValueError, "Calibrator", "num_classes=4, those of the recalibration, got 3"):
        Calibrator(groups.image(SIZE), recalibration=made.recalibration, num_classes=3)
    with raises(ValueError, "Calibrator.merge", "the same recalibration"):
        calibrator.merge(Calibrator(groups.image(SIZE)))


@pytest.mark.parametrize("damage", ["no facts", "facts", "no weight", "a weight", "classes"])
def test_a_file_whose_map_is_damaged_is_refused(data: DataSet, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.safetensors"
    calibrate(source(data), data.ids, alpha=0.2, background=None, refit=REFIT).save(path)
    tensors, metadata = read_tensors(path)
    if damage == "no facts":
        del metadata["recalibration"]
    elif damage == "facts":
        metadata["recalibration"]["method"] = "isotonic"
    elif damage == "no weight":
        del tensors["recalibration.weight"]
    elif damage == "a weight":
        tensors["recalibration.weight"] = tensors["recalibration.weight"][:, :-1].contiguous()
    else:
        metadata["num_classes"] = 5
    write_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=r"c\.safetensors") as caught:
        Calibration.load(path)
    complains(caught.value, path)


# --- the promise -------------------------------------------------------------------------------


def worlds(seed: int, images: int) -> tuple[Tensor, Tensor]:
    """Noisy scores of 8 classes, four labelled pixels an image, all independent."""
    generator = seeded(seed)
    labels = torch.randint(8, (images, 2, 2), generator=generator)
    hot = torch.nn.functional.one_hot(labels, 8).movedim(-1, 1)
    noise = 2 * torch.randn(images, 8, 2, 2, generator=generator)
    return (noise + 2 * hot).softmax(1), labels


def mean_coverage(apart: bool, *, trials: int = 130, few: int = 9) -> float:
    """Mean over calibrations of 9 images of the coverage of 200 fresh ones, alpha = 0.1."""
    found = []
    for trial in range(trials):
        probs, labels = worlds(trial, 2 * few + 200)
        recalibrator = Recalibrator(8, method="dirichlet", seed=trial)
        mine = slice(0, few) if apart else slice(few, 2 * few)
        recalibrator.update(probs[mine], labels[mine])
        calibrator = Calibrator(groups.pixel((2, 2)), alpha=0.1, recalibration=recalibrator.fit())
        calibrator.update(probs[few : 2 * few], labels[few : 2 * few])
        sets = calibrator.compute().prediction_set(probs[2 * few :])
        found.append(float(coverage(sets, labels[2 * few :])))
    return sum(found) / trials


@pytest.mark.nightly
def test_coverage_holds_where_other_images_fitted_and_falls_short_where_the_same_did() -> None:
    """Law of each cell: mean coverage 9 / 10 (n = 9, continuous scores), Beta(9, 1).

    Given the map the 520 cells of 130 trials are independent, each measured on 200 images: variance
    at most v = 0.0083 + 0.09 / 200. By Bernstein their mean lies within t = 0.034 of 0.9 but with
    probability 2 exp(-520 t^2 / (2 v + 2 t / 3)) < 1e-6.
    """
    assert abs(mean_coverage(apart=True) - 0.9) < 0.034
    assert mean_coverage(apart=False) < 0.9 - 0.034


def test_a_certifier_refuses_the_images_that_fitted_the_map(data: DataSet) -> None:
    recalibrator = Recalibrator(4)
    calibrator_images, fitting, new = data.images[:5], data.images[5:9], data.images[9:]
    for image in fitting:
        recalibrator.update(*pair(data, image), ids=image)
    made = recalibrator.fit()
    assert made.images == tuple(sorted(fitting))
    calibrator = Calibrator(groups.image(SIZE), alpha=0.9, recalibration=made)
    for image in calibrator_images:
        calibrator.update(*pair(data, image), ids=image)
    certifier = Certifier(calibrator, max_error=0.3)
    for image in (calibrator_images[0], fitting[0]):
        says = f"got '{image}', used in calibration, recalibration"
        with raises(ValueError, "Certifier.update", says):
            certifier.update(*pair(data, image), ids=image)
    certifier.update(*pair(data, new[0]), ids=new[0])
    with raises(ValueError, "Recalibrator.update", "every image once"):
        recalibrator.update(*pair(data, fitting[0]), ids=fitting[0])


def test_p_values_go_through_the_map(data: DataSet) -> None:
    made = fitted(data, data.images[:6])
    raw = Calibrator(groups.pixel(SIZE), alpha=0.5, recalibration=made)
    mapped = Calibrator(groups.pixel(SIZE), alpha=0.5)
    for image in data.images[6:]:
        probs, labels = pair(data, image)
        raw.update(probs, labels)
        mapped.update(made(probs), labels)
    probs, labels = pair(data, data.images[0])
    assert same(raw.p_values(probs, labels), mapped.p_values(made(probs), labels))
