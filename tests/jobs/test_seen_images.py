"""Labelled images that a model behind the scores was trained on: refused, warned of, or fine."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support import folders
from tests.support.folders import DataSet, command, complains, done, refused
from tests.support.helpers import seeded
from torch import Tensor

from cpseg import Calibration, conformal_quantile, cross_fit
from cpseg.calibration.provenance import SourceImages
from cpseg.files import Pair, ScoreRecord, Source, find_scores, read_ids, record_scores
from cpseg.files.score_folder import ScoringModel
from cpseg.jobs import RecalibrationOptions, calibrate, certify, deal_folds, join_folds
from cpseg.jobs.seen_images import approximate, check_apart, check_unseen, cross_fitted

PAIRS = [Pair(name, "m") for name in "abcd"]


def source(folder: Path) -> Source:
    return Source(folder.parent, folder)


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    """12 labelled images; the folder of scores records nothing yet."""
    return folders.make(tmp_path, count=12)


def cross_fitted_folder(data: DataSet, *, out_of_fold: int) -> None:
    """As joined from two folds over the first images, each scored by the model of the other."""
    known = data.images[:out_of_fold]
    halves = known[::2], known[1::2]
    models = tuple(ScoringModel(f"fold {k}", tuple(sorted(half))) for k, half in enumerate(halves))
    whole = ScoringModel("all", tuple(sorted(known)))
    scored_by = {image: (1 - k,) for k, half in enumerate(halves) for image in half}
    ScoreRecord(data.probs, (*models, whole), scored_by, (2,)).write()


def test_without_a_record_nothing_is_known(tmp_path: Path) -> None:
    check_apart("here", source(tmp_path), PAIRS)
    assert cross_fitted(source(tmp_path), PAIRS) == ()


def test_images_that_their_model_saw_are_refused(tmp_path: Path) -> None:
    record_scores(tmp_path, trained_on=["c", "b", "x"])
    for check in (check_unseen, check_apart):
        with pytest.raises(ValueError, match="trained on") as caught:
            check("here", source(tmp_path), PAIRS)
        complains(
            caught.value,
            "here",
            f"2 of 4 in {tmp_path} that they were: b and others",
            "cpseg folds",
        )
    check_unseen("here", source(tmp_path), [PAIRS[0], PAIRS[3]])
    check_apart("here", source(tmp_path), [PAIRS[0], PAIRS[3]])
    with pytest.raises(ValueError, match=r"1 of 2 in .* that they were: c; score"):
        check_unseen("here", source(tmp_path), PAIRS[2:])


def test_images_out_of_fold_are_counted_and_cannot_certify(tmp_path: Path) -> None:
    fold, whole = ScoringModel("fold", ("b", "c")), ScoringModel("all", ("a", "b", "c"))
    ScoreRecord(tmp_path, (fold, whole), {"a": (0,)}, (1,)).write()
    check_unseen("here", source(tmp_path), [PAIRS[0], PAIRS[3]])
    found = cross_fitted(source(tmp_path), [PAIRS[0], PAIRS[3]])
    assert found == (SourceImages(tmp_path.name, 1, 3),)
    (said,) = approximate(found)
    assert said.startswith(f"{tmp_path.name}: the score function was cross-fitted on 1 of these")
    assert "coverage is approximate and nothing is promised in finite samples; cpseg audit" in said
    with pytest.raises(ValueError, match="prove nothing") as caught:
        check_apart("here", source(tmp_path), [PAIRS[0], PAIRS[3]])
    complains(caught.value, "here", f"1 of 2 in {tmp_path} out of fold: a", "cpseg audit")
    check_apart("here", source(tmp_path), [PAIRS[3]])
    assert cross_fitted(source(tmp_path), [PAIRS[3]]) == ()


def test_every_job_refuses_images_that_were_seen(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.safetensors"
    fixed = {"alpha": 0.2, "background": "none", "variant": "image"}
    done(command(capsys, "calibrate", *data.options(**fixed), "-o", out))
    record_scores(data.probs, trained_on=[data.images[3], data.images[7]], name="student")
    said = (f"2 of 12 in {data.probs}", data.images[3], "cpseg folds")
    for words in (
        ["calibrate", *data.options(**fixed), "-o", tmp_path / "d.safetensors"],
        ["certify", *data.options(background="none"), "-o", tmp_path / "d.safetensors"],
        ["sweep", *data.options(backgrounds="none")],
        ["report", *data.options(background="none"), "-o", tmp_path / "r.html"],
        ["evaluate", *data.options(calibration=out)],
    ):
        if words[0] == "certify":
            refused(command(capsys, *words), "certify: ", "that they were")
        else:
            refused(command(capsys, *words), f"{words[0]}: ", *said)
    assert not (tmp_path / "d.safetensors").exists()
    others = data.list_ids("others.txt", [i for i in data.images if i not in data.images[3:8:4]])
    done(command(capsys, "calibrate", *data.options(ids=others, **fixed), "-o", out))


def test_certify_looks_at_both_of_its_lists(data: DataSet) -> None:
    first = data.list_ids("first.txt", data.images[:4])
    last = data.list_ids("last.txt", data.images[4:])
    settings = {"background": None, "max_error": 0.9, "calibration_ids": first}
    source = Source(data.root, data.probs)
    cross_fitted_folder(data, out_of_fold=4)
    certified = certify(source, last, **settings)
    assert certified.certificate is not None
    assert certified.provenance.sources == (SourceImages("probs", 4, 4),)
    record_scores_of(data, data.images[2:3])
    with pytest.raises(ValueError, match="1 of 4 in"):
        certify(source, last, **settings)
    cross_fitted_folder(data, out_of_fold=6)
    with pytest.raises(ValueError, match=r"2 of 8 in .* out of fold"):
        certify(source, last, **settings)


def record_scores_of(data: DataSet, images: list[str]) -> None:
    (data.probs / "scores.json").unlink()
    record_scores(data.probs, trained_on=images)


def test_out_of_fold_calibrates_with_a_warning_and_without_a_promise(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cross_fitted_folder(data, out_of_fold=8)
    out = tmp_path / "c.safetensors"
    fixed = data.options(alpha=0.2, background="none", variant="pixel")
    ran = command(capsys, "calibrate", *fixed, "-o", out)
    assert ran.code == 0
    warned = [line for line in ran.err.splitlines() if "cross-fitted" in line]
    assert len(warned) == 1
    assert "probs: the score function was cross-fitted on 8 of these images" in warned[0]
    calibration = Calibration.load(out)
    assert calibration.provenance.sources == (SourceImages("probs", 8, 8),)
    assert calibration.guarantee().startswith("nothing: models behind the scores")
    refused(
        command(capsys, "certify", *data.options(background="none"), "-o", tmp_path / "d"),
        "out of fold",
        "cpseg audit",
    )
    swept = command(capsys, "sweep", *data.options(backgrounds="none", variants="image"))
    assert (swept.code, swept.err.count("cross-fitted on 8 of these images")) == (0, 1)
    seen = command(capsys, "evaluate", *data.options(calibration=out))
    assert (seen.code, seen.err.count("what is seen here is approximate")) == (0, 1)


def test_the_report_leaves_certified_rules_out(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    cross_fitted_folder(data, out_of_fold=8)
    asked = data.options(background="none", folds=2, max_error="0.9", show=0, recalibrate="none")
    ran = command(capsys, "report", *asked, "-o", tmp_path / "r.html")
    assert ran.code == 0, ran.err
    assert ran.err.count("cross-fitted on 8 of these images") == 1
    assert ran.err.count("rules with a certificate are left out") == 1
    page = (tmp_path / "r.html").read_text()
    assert "can be certified on these images: probs holds scores of models that were" in page
    assert "certified at" not in page
    assert "Promised by eq. 4: nothing: models behind the scores" in page
    assert "was asked for" not in page
    (data.probs / "scores.json").unlink()
    ran = command(capsys, "report", *asked, "-o", tmp_path / "r.html")
    assert (ran.code, ran.err) == (0, "")
    page = (tmp_path / "r.html").read_text()
    assert "error of at most 90 %" in page
    assert "Promised by eq. 4: coverage of at least" in page
    assert "can be certified on these images" not in page


def test_images_apart_keep_every_promise(data: DataSet) -> None:
    source, settings = Source(data.root, data.probs), {"alpha": 0.2, "background": None}
    plain = calibrate(source, data.ids, **settings)
    record_scores(data.probs, trained_on=["images/elsewhere.png"])
    recorded = calibrate(source, data.ids, **settings)
    assert recorded.provenance == plain.provenance
    assert recorded.guarantee().startswith("coverage of at least 80 %")
    cross_fitted_folder(data, out_of_fold=8)
    apart = data.list_ids("apart.txt", data.images[8:])
    assert calibrate(source, apart, **settings).guarantee().startswith("coverage of at least 80 %")


def test_a_share_set_apart_for_the_map_is_no_share_apart_from_the_students(data: DataSet) -> None:
    cross_fitted_folder(data, out_of_fold=12)
    made = calibrate(
        Source(data.root, data.probs),
        data.ids,
        alpha=0.2,
        background=None,
        recalibration=RecalibrationOptions("temperature", share=0.25),
        variant="image",
        unit="image",
    )
    assert made.provenance.sources == (SourceImages("probs", 9, 12),)
    apart = replace(made, extra=replace(made.provenance, sources=()))
    assert made.guarantee().startswith("nothing: models")
    assert apart.guarantee().startswith("at least 80 %")


def test_evidence_carries_the_record(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.safetensors"
    done(
        command(
            capsys,
            "calibrate",
            *data.options(alpha=0.2, background="none", variant="image"),
            "-o",
            out,
        )
    )
    record_scores(data.probs, trained_on=[data.images[3]])
    evidence = tmp_path / "E"
    done(command(capsys, "compact", *data.options(background="none"), "-o", evidence))
    asked = data.options(probs=evidence, calibration=out)
    refused(command(capsys, "evaluate", *asked), f"1 of 12 in {evidence}", data.images[3])


def test_from_the_deal_to_the_calibration(data: DataSet, tmp_path: Path) -> None:
    folds = deal_folds(data.ids, tmp_path / "F", folds=3)
    for name in ("S0", "S1", "S2", "S"):
        for image in data.images:
            target = (tmp_path / name / image).with_suffix(".npy")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data.score_file(image).read_bytes())
    scores = [tmp_path / f"S{k}" for k in range(3)]
    joined = join_folds(tmp_path / "F", scores, tmp_path / "S", tmp_path / "J")
    assert joined.labelled == len(folds.images) == 12
    settings = {"alpha": 0.2, "background": None, "variant": "image"}
    made = calibrate(Source(data.root, tmp_path / "J"), data.ids, **settings)
    plain = calibrate(Source(data.root, data.probs), data.ids, **settings)
    assert torch.equal(made.threshold, plain.threshold)
    assert made.provenance.sources == (SourceImages("J", 12, 12),)
    record_scores(tmp_path / "S", trained_on=[pair.image for pair in read_ids(data.ids)])
    with pytest.raises(ValueError, match="12 of 12 in"):
        calibrate(Source(data.root, tmp_path / "S"), data.ids, **settings)
    assert find_scores(tmp_path / "J", data.images[0]).exists()


# --- how far off: a model that learns its training images by heart ------------------------------

CLASSES, LABELLED, NEW, ALPHA = 3, 40, 250, 0.1


def draw(images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images of one pixel: two features around a centre per class, classes overlapping."""
    labels = torch.randint(CLASSES, (images,), generator=generator)
    centres = torch.tensor([[0.0, 1.0], [0.9, -0.5], [-0.9, -0.5]], dtype=torch.float64)
    noise = torch.randn(images, 2, generator=generator, dtype=torch.float64)
    return centres[labels] + noise, labels


def scores(train: tuple[Tensor, Tensor], images: tuple[Tensor, Tensor]) -> Tensor:
    """1 - p of the true class, p by a narrow kernel over the training images: it overfits."""
    distance = (images[0][:, None] - train[0][None]).square().sum(-1)
    weight = torch.softmax(-distance / (2 * 0.3**2), -1)
    p = weight @ torch.nn.functional.one_hot(train[1], CLASSES).double()
    # A little of the plain distance, so that there are no ties.
    return 1 - p.gather(1, images[1][:, None])[:, 0] + 1e-6 * distance.min(-1).values


def coverages(draws: int) -> dict[str, Tensor]:
    """Coverage of new images in every draw, by the images that set the threshold."""
    generator, found = seeded(11), {"seen": [], "out of fold": [], "apart": []}
    names = [f"{number}.png" for number in range(LABELLED)]
    for number in range(draws):
        labelled, new, others = (draw(n, generator) for n in (LABELLED, NEW, LABELLED))
        whole = scores(labelled, new)
        out_of_fold = torch.empty(LABELLED, dtype=torch.float64)
        fold = torch.tensor(cross_fit(names, 4, seed=number).fold)
        for k in range(4):
            train = (labelled[0][fold != k], labelled[1][fold != k])
            held = (labelled[0][fold == k], labelled[1][fold == k])
            out_of_fold[fold == k] = scores(train, held)
        for name, calibration in (
            ("seen", scores(labelled, labelled)),
            ("out of fold", out_of_fold),
            ("apart", scores(labelled, others)),
        ):
            threshold = conformal_quantile(calibration.float(), ALPHA)
            found[name].append((whole.float() <= threshold).double().mean())
    return {name: torch.stack(each) for name, each in found.items()}


def test_coverage_falls_short_on_seen_images_and_holds_on_images_apart() -> None:
    """Apart: k of n + 1 in expectation, exactly. False alarm below 1e-6 (5 standard errors)."""
    draws = 400
    found = coverages(draws)
    law = math.ceil((LABELLED + 1) * (1 - ALPHA)) / (LABELLED + 1)
    mean = {name: float(each.mean()) for name, each in found.items()}
    error = {name: float(each.std()) / math.sqrt(draws) for name, each in found.items()}
    assert abs(mean["apart"] - law) < 5 * error["apart"]
    assert mean["seen"] < 1 - ALPHA - 0.15, "trained on the calibration images: far too strict"
    assert abs(mean["out of fold"] - law) < 0.03, "off by little, and nothing says by how much"
    assert mean["out of fold"] > mean["seen"] + 0.15
