"""Several folders of scores, features and colours through the jobs and the command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support import folders
from tests.support.folders import DataSet, command, complains, done, files, options, refused
from tests.support.helpers import same, seeded

from cpseg import Calibration, FeatureProjection, Recalibrator
from cpseg.core.class_map import ClassMap
from cpseg.files.dataset import ScoreFolder, Source
from cpseg.jobs.audit import plan_audit
from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.certify import certify
from cpseg.jobs.compact import compact
from cpseg.jobs.evaluate import evaluate
from cpseg.jobs.label import label
from cpseg.jobs.recalibrate import RecalibrationOptions
from cpseg.jobs.settings import AuditSettings
from cpseg.jobs.sweep import sweep

Capture = pytest.CaptureFixture[str]
PLAIN = RecalibrationOptions(context=(), share=0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """16 images with two models' scores, the second of half the size with 5 classes, and features.

    The last 4 images are not in ``labelled.txt``.
    """
    made = folders.make(tmp_path_factory.mktemp("sources"), count=16, sizes=((12, 16), (10, 20)))
    rng = np.random.default_rng(3)
    for name in ("student", "dino"):
        (made.root / name / "images").mkdir(parents=True)
    for image, truth in made.labels.items():
        stem = Path(image).with_suffix(".npy")
        height, width = truth.shape
        logits = rng.normal(size=(5, height // 2, width // 2))
        seen = np.where(truth == 255, 0, truth)[::2, ::2]
        np.put_along_axis(logits, seen[None] + 1, 2.0, 0)
        odds = np.exp(logits)
        np.save(made.root / "student" / stem, (odds / odds.sum(0)).astype(np.float16))
        features = rng.normal(size=(9, height // 2, width // 2)).astype(np.float16)
        features[0] += 3 * (seen == 2)
        np.save(made.root / "dino" / stem, features)
    made.list_ids("labelled.txt", made.images[:12])
    made.list_ids("unlabelled.txt", made.images[12:], masks=False)
    return made


def source(data: DataSet, **changes: object) -> Source:
    made = Source(
        data.root,
        data.probs,
        others=(ScoreFolder(data.root / "student"),),
        features=data.root / "dino",
        unlabelled=data.root / "unlabelled.txt",
        colour=True,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def listed(data: DataSet, name: str = "labelled.txt") -> Path:
    return data.root / name


def calibrated(data: DataSet, **settings: object) -> Calibration:
    chosen = {"alpha": 0.3, "background": None, "recalibration": PLAIN, **settings}
    chosen["recalibration"] = replace(chosen["recalibration"], num_classes=4)  # type: ignore[type-var]
    return calibrate(source(data), listed(data), **chosen)


def read(data: DataSet, image: str) -> list[torch.Tensor]:
    stem = Path(image).with_suffix(".npy")
    names = ("probs", "student", "dino")
    parts = [torch.from_numpy(np.load(data.root / name / stem)).float() for name in names]
    pixels = np.asarray(Image.open(data.root / image).convert("RGB"), np.float32) / 255
    return [*parts, torch.from_numpy(pixels).permute(2, 0, 1)]


def test_files_give_the_map_that_tensors_give(data: DataSet) -> None:
    """The same images by hand: components of all 16, a map of the 12 labelled ones."""
    calibration = calibrated(data, alpha=None)
    every = [read(data, image)[2] for image in sorted(data.images)]
    projection = FeatureProjection.fit(every)
    recalibrator = Recalibrator(4, features=projection, colour=True)
    for image in data.images[:12]:
        labels = torch.from_numpy(data.labels[image])
        recalibrator.update(read(data, image), labels, ids=image)
    expected = recalibrator.fit()
    made = calibration.recalibration
    assert made is not None
    assert made.fingerprint == expected.fingerprint
    assert made.sources == (4, 5)
    assert made.images == tuple(sorted(data.images[:12]))
    assert calibration.guarantee().startswith("nothing: there are no thresholds")


def test_labels_are_those_of_the_calibration_on_the_tensors(data: DataSet, tmp_path: Path) -> None:
    calibration = calibrated(data)
    calibration.save(tmp_path / "calibration.safetensors")
    loaded = Calibration.load(tmp_path / "calibration.safetensors")
    assert loaded.provenance == calibration.provenance
    plain = source(data, unlabelled=None, colour=False)  # the calibration knows
    label(plain, listed(data, "unlabelled.txt"), loaded, tmp_path / "out")
    for image in data.images[12:]:
        mask = np.asarray(Image.open(tmp_path / "out/masks" / image))
        np.testing.assert_array_equal(mask, loaded.pseudo_labels(read(data, image)))
    before = files(tmp_path / "out" / "masks")
    label(plain, listed(data, "unlabelled.txt"), loaded, tmp_path / "out")
    assert files(tmp_path / "out" / "masks") == before
    facts = json.loads((tmp_path / "out/run.json").read_text())
    assert facts["others"] == [str((data.root / "student").resolve())]


def test_without_thresholds_every_pixel_is_labelled(data: DataSet, tmp_path: Path) -> None:
    calibration = calibrated(data, alpha=None)
    calibration.save(tmp_path / "calibration.safetensors")
    loaded = Calibration.load(tmp_path / "calibration.safetensors")
    assert (loaded.alpha, loaded.variant) == (0, "every pixel")
    assert loaded.provenance.profile is None, "the map was fitted on these images"
    heard: list[str] = []
    kept = label(
        source(data),
        listed(data, "unlabelled.txt"),
        loaded,
        tmp_path / "out",
        tell=lambda notice: heard.append(notice.text),
    )
    assert kept == 1
    evaluate(source(data), listed(data), loaded, tell=lambda notice: heard.append(notice.text))
    assert not heard, "labels of the argmax were asked for"
    recalibration = loaded.recalibration
    assert recalibration is not None
    for image in data.images[12:]:
        mask = np.asarray(Image.open(tmp_path / "out/masks" / image))
        np.testing.assert_array_equal(mask, recalibration(read(data, image)).argmax(0))


def test_evidence_takes_the_place_of_all_sources(data: DataSet, tmp_path: Path) -> None:
    calibration = calibrated(data)
    unlabelled = listed(data, "unlabelled.txt")
    compact(
        source(data), unlabelled, tmp_path / "evidence", background=None, calibration=calibration
    )
    label(source(data), unlabelled, calibration, tmp_path / "a")
    label(Source(data.root, tmp_path / "evidence"), unlabelled, calibration, tmp_path / "b")
    assert files(tmp_path / "a/masks") == files(tmp_path / "b/masks")


def test_other_jobs_take_several_sources(data: DataSet, tmp_path: Path) -> None:
    calibration = calibrated(data)
    rows = evaluate(source(data), listed(data), calibration)
    assert [row.rule for row in rows] == ["raw argmax, probs", "recalibrated argmax", "pixel"]
    plain = Source(data.root, data.probs)
    alone = calibrate(plain, listed(data), alpha=0.3, background=None, variant="image")
    assert rows[0].wrong == evaluate(plain, listed(data), alone)[0].wrong
    certified = certify(
        source(data),
        listed(data),
        background=None,
        max_error=0.9,
        calibrate_share=0.5,
        recalibration=replace(PLAIN, num_classes=4),
    )
    assert certified.recalibration is not None
    assert certified.recalibration.sources == (4, 5)
    label(source(data), listed(data, "unlabelled.txt"), calibration, tmp_path / "out")
    plan = plan_audit(tmp_path / "out", AuditSettings(design="focus", answers=9, seed=1)).plan
    assert sum(stratum.answers for stratum in plan.strata) == 9
    swept = sweep(
        source(data),
        listed(data),
        backgrounds=[None],
        variants=["image"],
        alphas=["0.3"],
        recalibrate=["none", "dirichlet"],
        context=(),
        folds=2,
    )
    by = {(row.recalibrate, row.variant): row.wrong.mean for row in swept}
    assert by["dirichlet", "argmax"] < by["none", "raw argmax"]


def test_each_model_has_its_own_class_map(data: DataSet) -> None:
    """The student's classes are one further; mapped back, they are those of the data set."""
    back = ClassMap((None, 0, 1, 2, 3))
    mapped = source(data, others=(ScoreFolder(data.root / "student", back),))
    calibration = calibrate(mapped, listed(data), alpha=None, background=None, recalibration=PLAIN)
    assert calibration.recalibration is not None
    assert calibration.recalibration.sources == (4, 4)
    recorded = calibration.provenance.sources_read
    assert recorded is not None
    assert recorded.class_maps == (None, back.to_json())
    rows = evaluate(source(data), listed(data), calibration)
    assert [row.rule for row in rows[:2]] == ["raw argmax, probs", "raw argmax, student"]
    again = evaluate(mapped, listed(data), calibration)
    assert [row.wrong for row in rows] == [row.wrong for row in again]
    other = source(data, others=(ScoreFolder(data.root / "student", ClassMap((0, 1, 2, 3, 0))),))
    with pytest.raises(ValueError, match="that of the calibration, got another one"):
        evaluate(other, listed(data), calibration)


def test_images_for_the_map_may_be_listed_apart(data: DataSet) -> None:
    first, second = data.images[:7], data.images[7:12]
    fit_ids, ids = data.list_ids("fit.txt", first), data.list_ids("rest.txt", second)
    chosen = replace(PLAIN, fit_ids=fit_ids, num_classes=4)
    calibration = calibrate(source(data), ids, alpha=0.3, background=None, recalibration=chosen)
    assert calibration.recalibration is not None
    assert calibration.recalibration.images == tuple(first)
    assert calibration.provenance.images == tuple(second)
    assert calibration.guarantee().startswith("coverage of at least 70 %")
    with pytest.raises(ValueError, match=r"images in one list, got .* in both"):
        calibrate(
            source(data),
            listed(data),
            alpha=0.3,
            background=None,
            recalibration=chosen,
        )


# The command


def words(data: DataSet, *probs: Path, ids: str = "labelled.txt", **more: object) -> list[str]:
    given = options(root=data.root, ids=data.root / ids, **more)
    for folder in probs or (data.probs, data.root / "student"):
        given += ["--probs", str(folder)]
    return given


def test_the_command_from_scores_to_masks(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    made = tmp_path / "c.safetensors"
    more = {"features": data.root / "dino", "unlabelled": data.root / "unlabelled.txt"}
    result = command(
        capsys,
        "calibrate",
        *words(data, background="none", alpha="none", num_classes=4, colour=True, **more),
        "-o",
        made,
    )
    assert "every pixel gets its most probable class, 12 images" in done(result).out
    assert "map of 4 + 5 softmax scores" in result.out
    given = words(data, ids="unlabelled.txt", features=data.root / "dino", calibration=made)
    done(command(capsys, "label", *given, "-o", tmp_path / "out"))
    assert len(files(tmp_path / "out/masks")) == 4


def test_bad_input_gets_one_line(data: DataSet, tmp_path: Path, capsys: Capture) -> None:
    made = tmp_path / "c.safetensors"
    base = {"background": "none", "num_classes": 4}

    def run(name: str, *given: str) -> folders.Result:
        out = ["-o", str(made)] if name == "calibrate" else []
        return command(capsys, name, *given, *out)

    said = run("calibrate", *words(data, recalibrate="none", **base))
    refused(said, "--num-classes")
    said = run("calibrate", *words(data, recalibrate="none", background="none"))
    refused(said, "a recalibration of several sources", "--recalibrate dirichlet")
    refused(run("calibrate", *words(data, background="none")), "4 and 5", "--num-classes")
    said = run("calibrate", *words(data, unlabelled=data.root / "unlabelled.txt", **base))
    refused(said, "--unlabelled", "an encoder's features")
    refused(run("calibrate", *words(data, components=8, **base)), "--components")
    one = words(data, data.probs, recalibrate="temperature", background="none", colour=True)
    refused(run("calibrate", *one), "scores alone for a recalibration by temperature")
    said = run("calibrate", *words(data, features=data.root / "dino", **base))
    refused(said, "the list of the unlabelled images", "--unlabelled")
    said = run("calibrate", *words(data, class_map="none", **base))
    refused(said, "2 class maps, one for each --probs")
    said = run("calibrate", *words(data, alpha="none", recalibrate_folds=2, **base))
    refused(said, "--recalibrate-folds", "--alpha none")
    said = run("calibrate", *words(data, data.probs, tmp_path / "none", **base))
    refused(said, "--probs", "none, which is none")
    assert not made.exists()
    done(run("calibrate", *words(data, alpha="none", **base)))
    ids = {"ids": "unlabelled.txt", "calibration": made}
    student = data.root / "student"
    out = tmp_path / "out"

    def labelled(*probs: Path, **more: object) -> folders.Result:
        return command(capsys, "label", *words(data, *probs, **ids, **more), "-o", out)

    refused(labelled(student, data.probs), "in the order probs, student", "got student, probs")
    refused(labelled(data.probs, student, data.root / "dino"), "2 folders of scores", "got 3")
    refused(labelled(data.probs), "scores of 4 + 5 source classes")
    refused(labelled(data.probs, student, features=data.root / "dino"), "no features")
    assert not list(out.glob("masks/**/*.png"))
    missing = tmp_path / "student"
    shutil.copytree(student, missing)
    (missing / "images/13.npy").unlink()
    refused(labelled(data.probs, missing), str(missing), "images/13")
    np.save(missing / "images/13.npy", np.full((4, 6, 8), 0.25, np.float16))
    out = tmp_path / "other"
    refused(labelled(data.probs, missing), "images/13.npy", "5 classes", "4")


def test_features_of_changing_depth_are_refused(data: DataSet, tmp_path: Path) -> None:
    dino = tmp_path / "dino"
    shutil.copytree(data.root / "dino", dino)
    np.save(dino / "images/09.npy", torch.randn(8, 3, 3, generator=seeded(0)).numpy())
    changed = source(data, features=dino)
    with pytest.raises(ValueError, match="channels") as caught:
        calibrate(changed, listed(data), alpha=None, background=None, recalibration=PLAIN)
    complains(caught.value, dino / "images/09.npy", "9 channels like the first", "got 8")
    np.save(dino / "images/09.npy", np.full((9, 3, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match="finite") as caught:
        calibrate(changed, listed(data), alpha=None, background=None, recalibration=PLAIN)
    complains(caught.value, dino / "images/09.npy", "finite features")


def test_trees_do_not_make_new_images_look_strange(data: DataSet, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    heard: list[str] = []
    for number, (alpha, share) in enumerate(((None, 0.0), (0.3, 0.0), (0.3, 0.5))):
        chosen = replace(PLAIN, method="trees", share=share)
        calibration = calibrated(data, alpha=alpha, recalibration=chosen, variant="image")
        assert (calibration.provenance.profile is None) == (share == 0)
        label(
            source(data),
            listed(data, "unlabelled.txt"),
            calibration,
            tmp_path / f"{number}",
            tell=lambda notice: heard.append(notice.text),
        )
    assert not [text for text in heard if "not like" in text]


def test_a_single_labelled_image_makes_a_map(data: DataSet) -> None:
    one = data.list_ids("one.txt", data.images[:1])
    chosen = replace(PLAIN, num_classes=4)
    calibration = calibrate(source(data), one, alpha=None, background=None, recalibration=chosen)
    assert calibration.recalibration is not None
    assert calibration.recalibration.cv == ()
    assert same(calibration.threshold, torch.full((12, 16), torch.inf))
