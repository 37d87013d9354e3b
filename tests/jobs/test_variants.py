"""Learned groups through the command: the split, what the file says, and the warning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.folders import DataSet, make

from cpseg import Calibration, groups, nonconformity
from cpseg.cli.command import main
from cpseg.files.dataset import Source
from cpseg.files.id_lists import read_ids
from cpseg.jobs.calibrate import calibrate


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return make(tmp_path / "data", count=12)


def source(data: DataSet) -> Source:
    return Source(data.root, data.probs)


@pytest.mark.parametrize("variant", ["kmeans", "annuli"])
def test_groups_are_learned_on_images_that_do_not_calibrate(data: DataSet, variant: str) -> None:
    made = calibrate(
        source(data),
        data.ids,
        alpha=0.4,
        background=None,
        variant=variant,
        num_groups=2,
        group_share=0.5,
        seed=3,
    )
    pairs = read_ids(data.ids)
    learned = round(0.5 * len(pairs))
    assert made.variant == variant
    images = made.extra["groups"]["images"]
    assert made.extra["groups"] == {"learned_on": learned, "apart": True, "images": images}
    assert made.num_images == len(pairs) - learned
    assert len(made.threshold.unique()) <= 2

    # By hand: the same draw, curves of the first part, and groups of those curves.
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(len(pairs), generator=generator).tolist()
    assert images == sorted(pairs[number].image for number in order[:learned])
    where = source(data)
    paths = where.locate(pairs)
    scores = []
    for number in order[:learned]:
        probs = where.probabilities(paths[pairs[number]])
        labels = where.labels(pairs[number], len(probs), (probs.shape[1], probs.shape[2]))
        scores.append(nonconformity(probs, labels))
    learn = groups.kmeans if variant == "kmeans" else groups.annuli
    expected = learn(groups.curves(torch.stack(scores)), 2, generator=generator)
    for group in (0, 1):
        assert len(made.threshold[expected == group].unique()) == 1
        assert len(made.count[expected == group].unique()) == 1


def test_learning_on_the_calibration_images_is_said(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.safetensors"
    options = ["--root", str(data.root), "--ids", str(data.ids), "--probs", str(data.probs)]
    options += ["--variant", "kmeans", "--num-groups", "2", "--background", "none"]
    assert main(["calibrate", *options, "--alpha", "0.4", "-o", str(out)]) == 0
    assert "groups were learned on the" in capsys.readouterr().err
    loaded = Calibration.load(out)
    assert loaded.extra["groups"]["apart"] is False
    assert loaded.num_images == len(read_ids(data.ids))

    options += ["--group-share", "0.5"]
    assert main(["calibrate", *options, "--alpha", "0.4", "-o", str(out)]) == 0
    assert "learned" not in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.001, 1.0])
def test_a_share_that_leaves_a_part_empty_is_refused(data: DataSet, share: float) -> None:
    with pytest.raises(ValueError, match=r"--group-share that splits \d+ images in two, got"):
        calibrate(
            source(data),
            data.ids,
            alpha=0.4,
            background=None,
            variant="kmeans",
            num_groups=2,
            group_share=share,
        )


def test_a_share_for_groups_that_are_not_learned_is_refused(data: DataSet) -> None:
    with pytest.raises(ValueError, match="a variant that learns groups for --group-share, got pix"):
        calibrate(source(data), data.ids, alpha=0.4, background=None, group_share=0.3)
