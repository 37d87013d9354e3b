"""A real model with a real domain gap: CamVid, where a copy lies beside the repository."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support.data import CAMVID as ROOT

from cpseg import Calibration
from cpseg.cli.command import main
from cpseg.files.dataset import Source
from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.evaluate import evaluate
from cpseg.jobs.tally import Row

pytestmark = pytest.mark.skipif(
    not ROOT.is_dir(), reason="no CamVid in ../shared/data/camvid beside the repository"
)
ALPHA = 0.1
SCENERY = (0, 1, 3, 4, 5)  # sky, building, road, pavement, tree
OBJECTS = (2, 6, 7, 8, 9, 10)  # pole, sign, fence, car, pedestrian, bicyclist


@pytest.fixture(scope="module")
def classes() -> tuple[Calibration, dict[str, Row]]:
    """All eleven classes, no background."""
    source = Source(ROOT, ROOT / "probs")
    made = calibrate(source, ROOT / "labelled_25.txt", alpha=ALPHA, background=None)
    rows = evaluate(source, ROOT / "heldout.txt", made, constant=0.3)
    return made, {row.rule: row for row in rows}


def test_raw_argmax_is_wrong_in_a_third_of_the_pixels(
    classes: tuple[Calibration, dict[str, Row]],
) -> None:
    raw = classes[1]["raw argmax"]
    assert raw.kept == 1
    assert raw.wrong == pytest.approx(0.35, abs=0.03)
    assert raw.miou_all == pytest.approx(0.32, abs=0.03)


def test_raw_argmax_is_that_of_numpy(classes: tuple[Calibration, dict[str, Row]]) -> None:
    wrong = known = 0
    for line in (ROOT / "heldout.txt").read_text().splitlines():
        image, mask = line.split(" ")
        scores = np.load(ROOT / "probs" / f"{Path(image).stem}.npz")["probs"]
        truth = np.array(Image.open(ROOT / mask))
        wrong += int(((scores.argmax(0) != truth) & (truth != 255)).sum())
        known += int((truth != 255).sum())
    assert classes[1]["raw argmax"].wrong == pytest.approx(wrong / known, abs=1e-12)


def test_coverage_is_what_was_promised(classes: tuple[Calibration, dict[str, Row]]) -> None:
    """Images of one drive in random order: exchangeable, so the promise holds in the mean.

    A cell with n = 25 scores promises a coverage in [0.9, 0.9 + 1/26]; cells with void have fewer
    and promise up to 1/(n + 1) more. The mean over 80 new images and the draw of 25 scatters: with
    s.d. 0.06 per calibration cell (beta law) and few independent regions in a street scene, 0.03
    on either side of the interval is two to three standard errors.
    """
    made, rows = classes
    assert made.num_images == 25
    assert 1 - ALPHA - 0.03 < rows["pixel"].coverage < 1 - ALPHA + 1 / 26 + 0.03
    assert rows["pixel"].set_size < 11


def test_a_constant_threshold_keeps_fewer_labels_and_better_ones(
    classes: tuple[Calibration, dict[str, Row]],
) -> None:
    raw, constant = classes[1]["raw argmax"], classes[1]["constant 0.3"]
    assert constant.kept < 0.9
    assert constant.wrong < 0.9 * raw.wrong


def test_background_plus_objects_by_a_class_map(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = {str(k): 0 for k in SCENERY} | {str(k): n for n, k in enumerate(OBJECTS, start=1)}
    (tmp_path / "map.json").write_text(json.dumps(entries))
    lines = (ROOT / "heldout.txt").read_text().splitlines()[:12]
    (tmp_path / "ids.txt").write_text("\n".join(lines) + "\n")
    data = ["--root", str(ROOT), "--probs", str(ROOT / "probs")]
    both = ["--class-map", str(tmp_path / "map.json"), "--mask-map", str(tmp_path / "map.json")]
    made, out = str(tmp_path / "c.safetensors"), tmp_path / "out"
    ids = ["--ids", str(ROOT / "labelled_25.txt")]
    words = [*data, *ids, *both, "--alpha", "0.1", "--background", "0", "-o", made]
    assert main(["calibrate", *words]) == 0
    assert "7 classes, background 0 suppressed, grid 180x240" in capsys.readouterr().out
    heldout = [*data, "--ids", str(tmp_path / "ids.txt"), "--calibration", made]
    assert main(["label", *heldout, "-o", str(out)]) == 0
    for line in (out / "ids.txt").read_text().splitlines():
        mask = np.array(Image.open(line.split(" ")[1]))
        assert mask.shape == (180, 240)
        assert set(np.unique(mask)) <= {*range(7), 255}
    words = [*heldout, "--mask-map", str(tmp_path / "map.json"), "-o", str(tmp_path / "rows.json")]
    assert main(["evaluate", *words]) == 0
    rows = {row["rule"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["raw argmax", "pixel", "pixel, suppressed"]
    assert len(rows["raw argmax"]["iou"]) == 7
    assert rows["raw argmax"]["wrong"] < 0.35, "merging classes forgives"
    # Suppression turns background into objects wherever an object is in the set.
    assert rows["pixel, suppressed"]["kept"] == rows["pixel"]["kept"]
    assert rows["pixel, suppressed"]["coverage"] == rows["pixel"]["coverage"]
