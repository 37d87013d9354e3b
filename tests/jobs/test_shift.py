"""Warnings where images are not like those that calibrated: right ones, and few false ones."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom
from tests.support import folders
from tests.support.data import CAMVID
from tests.support.folders import DataSet, command, done, files
from torch import Tensor, nn

from cpseg import Calibration, Calibrator, groups
from cpseg.calibration.certificate import Certificate
from cpseg.calibration.provenance import ImageProfile
from cpseg.files.dataset import Source
from cpseg.files.id_lists import Pair, read_ids
from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.certify import certify
from cpseg.jobs.evaluate import evaluate
from cpseg.jobs.label import label
from cpseg.jobs.settings import CalibrationSettings
from cpseg.jobs.shift import (
    FALSE_ALARM,
    Look,
    Notice,
    Watch,
    is_above,
    look,
    profiled,
    sameness,
    unlike,
)
from cpseg.jobs.variants import Grouping

FAR = 1e-6  # the chance that a test of a rate fails although the rate is right


def most(draws: int, rate: float = FALSE_ALARM) -> float:
    """False alarms among draws that are more with a chance of FAR alone."""
    return float(binom.isf(FAR, draws, rate))


# The test of a mean


@pytest.mark.parametrize("law", ["rare", "bernoulli", "flat"])
@pytest.mark.parametrize("images", [5, 40])
def test_a_mean_at_the_bound_is_rarely_above_it(law: str, images: int) -> None:
    """At a level of 1 in 50, where false alarms can be counted; of any distribution."""
    rng = np.random.default_rng(1)
    draws, bound = 3000, 0.1
    worlds = {
        "rare": lambda: np.where(rng.random(images) < 0.1, 1.0, 0.0),
        "bernoulli": lambda: rng.choice([0.0, 0.05, 0.5], images, p=[0.6, 0.22, 0.18]),
        "flat": lambda: rng.uniform(0, 0.2, images),
    }
    false = sum(is_above(worlds[law](), bound, 0.02) for _ in range(draws))
    assert false <= most(draws, 0.02)


def test_a_mean_far_above_the_bound_is_found() -> None:
    rng = np.random.default_rng(1)
    found = [is_above(rng.uniform(0, 0.5, 60), 0.1, FALSE_ALARM) for _ in range(100)]
    assert all(found)
    found = [
        is_above(rng.uniform(0, 0.8, 60), 0.1, FALSE_ALARM, calibrated_on=50) for _ in range(100)
    ]
    assert np.mean(found) > 0.95


def scores_of(world: str, rng: np.random.Generator, images: int) -> np.ndarray:
    """Scores of a cell's true class ``[images, cells]``; images are i.i.d., their cells are not."""
    own = rng.random((images, 1))
    if world == "one number per image":
        return np.repeat(own, 8, 1)
    cells = rng.random((images, 8))
    if world == "mixed":
        return 0.7 * own + 0.3 * cells
    return cells + 10 * (rng.random((images, 1)) < 0.08) * own  # a few are strange altogether


@pytest.mark.nightly
@pytest.mark.parametrize("world", ["one number per image", "mixed", "a few strange images"])
@pytest.mark.parametrize(("calibrating", "images"), [(19, 5), (20, 40), (100, 100)])
def test_the_luck_of_a_calibration_is_no_shift(world: str, calibrating: int, images: int) -> None:
    """Pixel-wise coverage is random itself. At 1 in 50; the bound without it fails."""
    rng = np.random.default_rng(2)
    draws, alpha = 1500, 0.1
    rank = math.ceil((calibrating + 1) * (1 - alpha) - 1e-9)
    false = without = 0
    for _ in range(draws):
        scores = scores_of(world, rng, calibrating + images)
        threshold = np.sort(scores[:calibrating], 0)[rank - 1]
        losses = (scores[calibrating:] > threshold).mean(1)
        false += is_above(losses, alpha, 0.02, calibrated_on=calibrating)
        without += is_above(losses, alpha, 0.02)
    assert false <= most(draws, 0.02)
    if (world, calibrating, images) == ("one number per image", 20, 40):
        assert without > most(draws, 0.02)


# Coverage


class World(NamedTuple):
    """Images ``[B, 3, 6, 8]`` whose labels are drawn from their probabilities, but for a shift."""

    probs: Tensor
    labels: Tensor


def draw(images: int, seed: int, *, shift: float = 0.0, void: float = 0.1) -> World:
    """``shift`` of the labels are the least probable class."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, 3, 6, 8, generator=generator) * 2
    logits = logits + torch.randn(images, 3, 1, 1, generator=generator)
    probs = logits.softmax(1)
    labels = torch.distributions.Categorical(probs.movedim(1, -1)).logits  # log probabilities
    drawn = (labels - (-torch.rand(labels.shape, generator=generator).log()).log()).argmax(-1)
    wrong = torch.rand(drawn.shape, generator=generator) < shift
    drawn = torch.where(wrong, probs.argmin(1), drawn)
    drawn[torch.rand(drawn.shape, generator=generator) < void] = 255
    return World(probs, drawn)


def calibrated(world: World, variant: str, *, per_class: bool = False, **options: Any) -> Any:
    partition = {
        "pixel": groups.pixel((6, 8)),
        "image": groups.image((6, 8)),
        "blocks": groups.blocks((6, 8), 4),
    }[variant]
    calibrator = Calibrator(
        partition,
        alpha=0.2,
        variant=variant,
        num_classes=3,
        per_class=per_class,
        unit="pixel" if variant == "pixel" else "image",
        **options,
    )
    calibrator.update(world.probs, world.labels, ids=[str(i) for i in range(len(world.probs))])
    return calibrator.compute()


def watched(calibration: Calibration, world: World) -> list[Notice]:
    watch = Watch(calibration)
    for number, (probs, labels) in enumerate(zip(*world, strict=True)):
        watch.update(
            Pair(f"new/{number}", None),
            labels,
            calibration.pseudo_labels(probs),
            calibration.prediction_set(probs),
            probs.argmax(0),
        )
    return [notice for notice in watch.notices() if notice.is_warning]


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("variant", ["pixel", "image", "blocks"])
def test_coverage_below_the_promise_is_told(variant: str, per_class: bool) -> None:
    calibration = calibrated(draw(60, 0), variant, per_class=per_class)
    assert watched(calibration, draw(60, 1)) == []
    (warning,) = watched(calibration, draw(60, 1, shift=0.5))
    assert "coverage of at least 80 % was promised, and on these 60 images it is" in warning.text
    assert "at most 1 in 1000" in warning.text
    assert "calibrate on labelled images like these; cpseg audit" in warning.text


def test_coverage_said_is_that_of_the_pixels_that_count() -> None:
    calibration = calibrated(draw(60, 0), "pixel")
    world = draw(40, 1, shift=0.5)
    missed = ~torch.stack([calibration.prediction_set(probs) for probs in world.probs])
    on = world.labels != 255
    missed = missed.gather(1, world.labels.masked_fill(~on, 0)[:, None])[:, 0] & on
    seen = 100 * (1 - float(missed.sum() / on.sum()))
    (warning,) = watched(calibration, world)
    assert f"it is {seen:.1f} %" in warning.text


def test_where_nothing_is_promised_nothing_is_broken() -> None:
    calibrator = Calibrator(groups.image((6, 8)), alpha=0.2, variant="image", num_classes=3)
    calibrator.update(*draw(60, 0))
    assert watched(calibrator.compute(), draw(60, 1, shift=0.5)) == []


@pytest.mark.nightly
@pytest.mark.parametrize("variant", ["pixel", "image"])
def test_like_images_are_rarely_told_from_the_promise(variant: str) -> None:
    """Over calibration and new images together, and not at 1 in 1000 but never here."""
    draws = [
        watched(calibrated(draw(30, seed), variant), draw(30, 1000 + seed)) for seed in range(60)
    ]
    assert sum(map(len, draws)) <= most(60)


# Certificates


def with_certificate(per: str, *, method: str = "ltt", classes: Any = None) -> Calibration:
    """Keeps every pixel; says that at most 10 % are wrong."""
    certificate = Certificate(
        method=method,
        pvalue=None if method == "crc" else "betting",
        max_error=0.1,
        delta=None if method == "crc" else 0.1,
        certified=True,
        alpha=None if classes else 0.1,
        num_images=60,
        mean_error=0.05,
        kept=1.0,
        per=per,
        pooled_error=0.05,
        classes=classes,
    )
    threshold = torch.full((6, 8), torch.inf)
    count = torch.full((6, 8), 60)
    return Calibration(threshold, count, 0.1, 60, 3, variant="image", certificate=certificate)


def confident(images: int, seed: int, wrong: float) -> World:
    """Of every image's pixels about a share is wrong."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (images, 6, 8), generator=generator)
    probs = nn.functional.one_hot(labels, 3).movedim(-1, 1).float() * 0.8 + 0.05
    changed = torch.rand(labels.shape, generator=generator) < wrong
    return World(probs, torch.where(changed, (labels + 1) % 3, labels))


@pytest.mark.parametrize(
    ("per", "method", "says"),
    [
        ("labels", "ltt", "at most 10 % of all labels kept are wrong"),
        ("image", "ltt", "on average over images that keep one are wrong"),
        ("any image", "ltt", "of an image's labels on average are wrong"),
        ("pixels", "crc", "of an image's pixels on average are wrong"),
    ],
)
def test_more_errors_than_certified_are_told(per: str, method: str, says: str) -> None:
    calibration = with_certificate(per, method=method)
    assert watched(calibration, confident(80, 0, 0.09)) == []
    world = confident(80, 0, 0.2)
    (warning,) = watched(calibration, world)
    assert says in warning.text
    seen = 100 * float((world.probs.argmax(1) != world.labels).double().mean())
    assert f"on these 80 images {seen:.1f} % are" in warning.text
    assert ("it is false with a chance of at most 10 %" in warning.text) == (method == "ltt")


def test_the_class_whose_certificate_is_broken_is_named() -> None:
    row = {"certified": True, "alpha": 0.1, "mean_error": 0.0, "pooled_error": 0.0, "kept": 0.3}
    none = {**row, "certified": False, "alpha": None}
    rows = tuple({**each, "p_value": 0.01} for each in (row, row, none))
    calibration = with_certificate("labels", classes=rows)
    world = confident(80, 0, 0.0)
    labels = torch.where(world.probs.argmax(1) == 0, world.labels, (world.labels + 1) % 3)
    (warning,) = watched(calibration, World(world.probs, labels))
    assert "of class 1 at most 10 % of all labels kept are wrong" in warning.text
    assert "100.0 % are" in warning.text


def test_images_larger_than_the_certificate_says_do_not_count() -> None:
    calibration = with_certificate("labels")
    assert calibration.certificate is not None
    small = replace(calibration, certificate=replace(calibration.certificate, max_pixels=47))
    assert watched(small, confident(80, 0, 0.5)) == []


# New images without labels


def looks(kept: np.ndarray, largest: np.ndarray) -> list[Look]:
    return [Look(float(k), float(x), 0.0) for k, x in zip(kept, largest, strict=True)]


def recorded(rng: np.random.Generator, images: int, *, in_sample: bool = False) -> ImageProfile:
    kept, largest = rng.random((2, images))
    return ImageProfile(tuple(kept), tuple(largest), in_sample)


@pytest.mark.nightly
@pytest.mark.parametrize("in_sample", [False, True])
def test_images_alike_are_rarely_told_from_each_other(in_sample: bool) -> None:
    rng = np.random.default_rng(3)
    draws = 1500
    false = sum(
        unlike(recorded(rng, 40, in_sample=in_sample), looks(*rng.random((2, 60)))) is not None
        for _ in range(draws)
    )
    assert false <= most(draws)


@pytest.mark.parametrize("what", ["kept", "largest"])
def test_other_images_are_told_with_both_medians(what: str) -> None:
    rng = np.random.default_rng(3)
    here = {"kept": rng.random(60), "largest": rng.random(60)}
    here[what] = here[what] / 2
    profile = recorded(rng, 50)
    warning = unlike(profile, looks(**here))
    assert warning is not None
    assert warning.is_warning
    for values in (here["kept"], here["largest"], profile.kept, profile.largest):
        assert f"{100 * np.median(values):.1f} %" in warning.text
    assert "at most 1 in 1000" in warning.text


def test_thresholds_made_on_the_images_keep_more_of_them() -> None:
    """So that less kept of new images says nothing, and more does."""
    rng = np.random.default_rng(3)
    profile = recorded(rng, 50, in_sample=True)
    assert unlike(profile, looks(rng.random(60) / 2, rng.random(60))) is None
    assert unlike(profile, looks(0.5 + rng.random(60) / 2, rng.random(60))) is not None
    assert unlike(None, looks(*rng.random((2, 9)))) is None
    assert unlike(ImageProfile((), (), False), looks(*rng.random((2, 9)))) is None


def test_a_look_is_at_what_the_labels_are() -> None:
    world = draw(1, 0)
    calibration = calibrated(draw(60, 0), "pixel")
    labels, seen = look(calibration, world.probs[0])
    assert torch.equal(labels, calibration.pseudo_labels(world.probs[0], dtype=torch.uint8))
    assert seen.kept == pytest.approx(float((labels != 255).double().mean()), abs=1e-6)
    assert seen.largest == pytest.approx(float(world.probs[0].amax(0).double().mean()), abs=1e-6)
    assert seen.same == seen.kept
    suppressed = replace(calibration, background=0, threshold=torch.full((6, 8), 0.9))
    labels, seen = look(suppressed, world.probs[0])
    same = labels == world.probs[0].argmax(0)
    assert seen.same == pytest.approx(float(same.double().mean()), abs=1e-6)
    assert seen.same < seen.kept


def test_at_most_a_thousand_images_are_looked_at_evenly() -> None:
    pairs = [Pair(f"{number:05d}", None) for number in range(2500)]
    chosen = profiled(list(reversed(pairs)))
    assert len(set(chosen)) == 1000
    assert chosen == profiled(pairs)
    assert [int(pair.image) for pair in chosen[:4]] == [0, 2, 5, 7]
    assert profiled(pairs[:7]) == pairs[:7]


def test_labels_of_the_argmax_are_told() -> None:
    for same, says in ((1.0, "on every pixel"), (0.99957, "on 99.957 % of pixels")):
        remark = sameness(same)
        assert remark is not None
        assert says in remark.text
        assert not remark.is_warning
    assert "99.999 %" in str(sameness(0.9999999))
    assert sameness(0.9989) is None


# The jobs


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return folders.make(tmp_path / "data", count=24)


def source(data: DataSet) -> Source:
    return Source(data.root, data.probs)


def test_a_calibration_records_each_image_as_if_it_were_new(data: DataSet) -> None:
    """Thresholds of the others, by a loop; rank and level as of all."""
    made = calibrate(source(data), data.ids, alpha=0.2, background=None)
    scores, best = [], []
    for image in data.images:
        truth = data.labels[image]
        index = np.where(truth == 255, 0, truth)[None]
        own = np.float32(1) - np.take_along_axis(data.scores[image], index, 0)[0]
        scores.append(np.where(truth == 255, np.float32(np.nan), own))
        best.append(np.float32(1) - data.scores[image].max(0))
    every, kept = np.stack(scores), []
    for number in range(len(every)):
        limit = made.threshold.numpy().copy()
        for cell in np.ndindex(*limit.shape):
            column = every[(slice(None), *cell)]
            present = np.sort(column[~np.isnan(column)])[::-1]
            count = len(present)
            rank = (2 * (count + 1)) // 10
            # The next score is known where no image is void; else it may be the same.
            after = math.floor((count + 1) * (0.2 + 1 / 25) + 1e-9)
            if rank and column[number] >= present[rank - 1]:
                limit[cell] = present[after - 1]
        kept.append(round(float((best[number] <= limit).mean()), 6))
    profile = made.provenance.profile
    assert profile is not None
    assert not profile.in_sample
    np.testing.assert_allclose(sorted(kept), profile.kept, atol=2e-6)
    largest = [round(float((1 - each.astype(np.float64)).mean()), 6) for each in best]
    np.testing.assert_allclose(sorted(largest), sorted(profile.largest), atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "in_sample"),
    [
        ({"grouping": Grouping("image")}, False),
        ({"grouping": Grouping("image"), "per_class": True}, True),
        ({"grouping": Grouping("blocks", block=4)}, True),
        ({"per_class": True}, True),
        ({"fallback": True}, True),
        ({"alpha": 0.98}, True),  # the next score would need an alpha above 1
        ({"score": "margin"}, None),
    ],
)
def test_what_is_recorded_says_whether_it_is_in_sample(
    data: DataSet, settings: dict[str, Any], in_sample: bool | None
) -> None:
    options = {"alpha": 0.2, "background": None, **settings}
    made = calibrate(source(data), data.ids, CalibrationSettings(**options))
    profile = made.provenance.profile
    assert (None if profile is None else profile.in_sample) is in_sample
    if in_sample:
        assert profile is not None
        want = [
            float((made.pseudo_labels(torch.from_numpy(data.scores[image])) != 255).double().mean())
            for image in data.images
        ]
        np.testing.assert_allclose(sorted(want), profile.kept, atol=1e-6)


def test_the_progress_expects_the_second_look(data: DataSet) -> None:
    class Counter:
        expected = 0
        seen = 0

        def expect(self, images: int) -> None:
            self.expected = images

        def __call__(self, items: Any, count: int, title: str) -> Any:
            for item in items:
                self.seen += 1
                yield item

    progress = Counter()
    calibrate(source(data), data.ids, alpha=0.2, background=None, progress=progress)
    assert progress.seen == progress.expected == 48


def test_a_certificate_records_its_images(data: DataSet, tmp_path: Path) -> None:
    made = certify(source(data), data.ids, max_error=0.9, background=None)
    assert made.certificate is not None
    assert made.certificate.certified
    profile = made.provenance.profile
    assert profile is not None
    assert len(profile.kept) == made.certificate.num_images
    assert not profile.in_sample
    made.save(tmp_path / "c.safetensors")
    assert Calibration.load(tmp_path / "c.safetensors").provenance.profile == profile


def without_ids(calibration: Calibration) -> Calibration:
    """Images of all folders here have the same names, and those known are not compared."""
    return replace(calibration, extra=replace(calibration.provenance, images=()))


def other_images(data: DataSet, tmp_path: Path) -> DataSet:
    """As many, on which the model is less sure."""
    other = folders.make(tmp_path / "other", count=24, seed=9)
    for image in other.images:
        flat = 0.3 * other.scores[image] + 0.7 / len(other.scores[image])
        np.save(other.score_file(image), flat.astype(np.float32))
    return other


def test_label_warns_of_other_images_and_a_resumed_run_alike(
    data: DataSet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = calibrate(source(data), data.ids, alpha=0.2, background=None)
    without_ids(made).save(tmp_path / "c")
    like = folders.make(tmp_path / "like", count=24, seed=8)
    done(command(capsys, "label", *like.options(calibration=tmp_path / "c"), "-o", tmp_path / "a"))
    other, out = other_images(data, tmp_path), tmp_path / "out"
    words = ["label", *other.options(calibration=tmp_path / "c"), "-o", out]
    first = command(capsys, *words)
    assert first.code == 0
    assert first.err.startswith("cpseg: warning: the images are not like those recorded")
    assert len(first.err.splitlines()) == 1
    before = files(out)

    def read(self: Source, path: Path) -> None:
        raise AssertionError(path)

    monkeypatch.setattr(Source, "scores", read)
    assert command(capsys, *words) == first
    assert files(out) == before


def test_images_that_calibrated_are_not_compared(data: DataSet, tmp_path: Path) -> None:
    """They are known by name, so that others of the same names are not compared either."""
    made, said = calibrate(source(data), data.ids, alpha=0.2, background=None), list[Notice]()
    label(source(data), data.ids, made, tmp_path / "known", tell=said.append)
    other = other_images(data, tmp_path)
    label(source(other), other.ids, made, tmp_path / "same_names", tell=said.append)
    assert said == []
    label(source(other), other.ids, without_ids(made), tmp_path / "new", tell=said.append)
    assert [notice.is_warning for notice in said] == [True]


@pytest.mark.nightly
def test_images_that_differ_by_noise_alone_are_alike(tmp_path: Path) -> None:
    """Kept shares of such images are nearly equal, and a threshold of one image less shows."""
    said = list[Notice]()
    for seed in range(12):
        data = folders.make(tmp_path / f"{seed}", count=30, sizes=((32, 32),), seed=seed)
        rng = np.random.default_rng(seed)
        for image in data.images:  # surer scores, and no void pixels
            truth = np.kron(rng.integers(0, 4, (8, 8)), np.ones((4, 4), int)).astype(np.uint8)
            odds = np.exp(3 * np.eye(4)[truth].transpose(2, 0, 1) + rng.normal(size=(4, 32, 32)))
            Image.fromarray(truth).save(data.mask_file(image))
            np.save(data.score_file(image), (odds / odds.sum(0)).astype(np.float32))
        labelled = data.list_ids("labelled.txt", data.images[:10])
        others = data.list_ids("others.txt", data.images[10:], masks=False)
        made = calibrate(source(data), labelled, alpha=0.3, background=None)
        label(source(data), others, made, tmp_path / f"out_{seed}", tell=said.append)
    assert [notice for notice in said if notice.is_warning] == []


def test_masks_of_which_nothing_was_recorded_are_left_out(data: DataSet, tmp_path: Path) -> None:
    made = without_ids(calibrate(source(data), data.ids, alpha=0.2, background=None))
    other, out, said = other_images(data, tmp_path), tmp_path / "out", list[Notice]()
    label(source(other), other.ids, made, out, tell=said.append)
    assert [notice.is_warning for notice in said] == [True]
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert set(lines[0]["facts"]) >= {"kept", "largest", "same"}
    for line in lines:
        del line["facts"], line["crc32"]
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said.clear()
    label(source(other), other.ids, made, out, tell=said.append)
    assert said == []


def test_the_commands_say_that_labels_are_those_of_the_argmax(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate(source(data), data.ids, alpha=0.01, background=None).save(tmp_path / "all")
    calibrate(source(data), data.ids, alpha=0.3, background=None).save(tmp_path / "some")
    for name, says in (("all", True), ("some", False)):
        words = data.options(calibration=tmp_path / name)
        for more in (["label", *words, "-o", tmp_path / f"out_{name}"], ["evaluate", *words]):
            out = done(command(capsys, *more)).out
            assert ("these are the labels of the argmax, on every pixel" in out) is says


def test_evaluate_warns_on_stderr_and_exits_as_before(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = calibrate(source(data), data.ids, alpha=0.2, background=None)
    without_ids(made).save(tmp_path / "c")
    other = folders.make(tmp_path / "other", count=24, seed=9)
    words = ["evaluate", *other.options(calibration=tmp_path / "c")]
    done(command(capsys, *words))
    for image in other.images:
        np.save(other.score_file(image), other.scores[image][::-1].copy())
    result = command(capsys, *words)
    assert result.code == 0
    assert result.err.startswith("cpseg: warning: a coverage of at least 80 % was promised")


@pytest.mark.parametrize("job", ["evaluate", "certify"])
def test_an_image_under_two_names_is_refused(data: DataSet, job: str) -> None:
    twice = "images/again.png"
    (data.root / twice).symlink_to(data.root / data.images[1])
    np.save(data.score_file(twice), data.scores[data.images[1]])
    if job == "evaluate":
        made = calibrate(source(data), data.ids, alpha=0.2, background=None)
        new = data.root / "new.txt"
        new.write_text(f"{data.images[1]} masks/01.png\n{twice} masks/01.png\n")
        with pytest.raises(ValueError, match="are one file"):
            evaluate(source(data), new, made)
        return
    setting = data.root / "setting.txt"
    setting.write_text(f"{twice} masks/01.png\n{data.images[2]} masks/02.png\n")
    rest = data.list_ids("rest.txt", [data.images[1], *data.images[3:]])
    with pytest.raises(ValueError, match="are one file"):
        certify(source(data), rest, calibration_ids=setting, background=None)


# CamVid


@pytest.mark.skipif(not CAMVID.is_dir(), reason="no CamVid in ../shared/data/camvid")
@pytest.mark.parametrize("variant", ["pixel", "image"])
def test_camvid_of_one_drive_is_alike(variant: str, tmp_path: Path) -> None:
    data, said = Source(CAMVID, CAMVID / "probs"), list[Notice]()
    settings = CalibrationSettings(
        alpha=0.1, background=None, unit="image", grouping=Grouping(variant)
    )
    made = calibrate(data, CAMVID / "labelled_50.txt", settings)
    evaluate(data, CAMVID / "heldout.txt", made, tell=said.append)
    label(data, CAMVID / "heldout.txt", made, tmp_path / "out", tell=said.append)
    assert [notice for notice in said if notice.is_warning] == []


class Camera(NamedTuple):
    """Features ``[N, 18, 45, 60]`` and labels ``[N, 45, 60]``."""

    features: Tensor
    labels: Tensor


def camera(pairs: list[Pair]) -> Camera:
    """Colours and place of every fourth pixel: what a small model knows of an image."""
    features, labels = [], []
    y, x = torch.meshgrid(torch.linspace(-1, 1, 45), torch.linspace(-1, 1, 60), indexing="ij")
    place = torch.stack([y, x, y * y, x * x, x * y, y**3])
    for image, mask in pairs:
        with Image.open(CAMVID / image) as opened:
            rgb = torch.from_numpy(np.array(opened.convert("RGB"))).float().movedim(-1, 0) / 255
        small = nn.functional.avg_pool2d(rgb, 4)
        wide = nn.functional.avg_pool2d(small, 5, 1, 2, count_include_pad=False)
        features.append(torch.cat([small, wide, small**2, wide**2, place]))
        with Image.open(CAMVID / str(mask)) as opened:
            labels.append(torch.from_numpy(np.array(opened)[2::4, 2::4]).long())
    return Camera(torch.stack(features), torch.stack(labels))


@pytest.mark.skipif(not CAMVID.is_dir(), reason="no CamVid in ../shared/data/camvid")
def test_dusk_is_not_day() -> None:
    """A small model of a drive at dusk, calibrated there and applied to one by day."""
    torch.manual_seed(0)
    dusk = [pair for pair in read_ids(CAMVID / "source.txt") if "0001TP" in pair.image]
    order = torch.randperm(len(dusk)).tolist()
    known, new = (
        camera([dusk[place] for place in order]),
        camera(read_ids(CAMVID / "heldout.txt")),
    )
    model = nn.Sequential(nn.Conv2d(18, 24, 1), nn.ReLU(), nn.Conv2d(24, 11, 1))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        output = model(known.features[:20])
        nn.functional.cross_entropy(output, known.labels[:20], ignore_index=255).backward()
        optimizer.step()
    with torch.no_grad():
        at_dusk, by_day = (model(each.features).softmax(1) for each in (known, new))
    calibrator = Calibrator(groups.pixel((45, 60)), alpha=0.1, variant="pixel", num_classes=11)
    calibrator.update(at_dusk[20:42], known.labels[20:42], ids=[str(i) for i in range(22)])
    calibration = calibrator.compute()
    assert watched(calibration, World(at_dusk[42:], known.labels[42:])) == []
    (warning,) = watched(calibration, World(by_day, new.labels))
    assert "a coverage of at least 90 % was promised" in warning.text
