"""What the report recommends to train on, in worlds where the right answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support.folders import command

from cpseg.files.dataset import ScoreFolder, Source
from cpseg.files.folds import cross_fit
from cpseg.files.score_folder import ScoreRecord, ScoringModel
from cpseg.report.findings import RAW, Findings, Plan, Rule
from cpseg.report.measure import gather
from cpseg.report.wording import advice

Capture = pytest.CaptureFixture[str]
K, SIDE = 3, 12
# How often the foundation model and the student see a pixel's class, on the left and on the right.
WORLDS = {
    "the foundation is better": ((0.9, 0.9), (0.55, 0.55)),
    "the student is better": ((0.45, 0.45), (0.85, 0.85)),
    "both know other things": ((0.9, 0.4), (0.4, 0.9)),
    "the foundation knows nothing": ((1 / 3, 1 / 3), (0.8, 0.8)),
}
STUDENT = Rule("student as it is", "labels")


def scores(truth: np.ndarray, sees: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Scores whose largest is that of the true class with these chances, and says how sure."""
    half = SIDE // 2
    chance = np.repeat([sees], half, 1).reshape(1, SIDE) * np.ones((SIDE, 1))
    right = rng.random(truth.shape) < (chance - 1 / K) / (1 - 1 / K)
    seen = np.where(right, truth, rng.integers(0, K, truth.shape))
    sure = np.where(rng.random(truth.shape) < 0.5, chance, 0.9 * chance + 0.1 / K)
    sure = np.maximum(sure, rng.choice([0.4, 0.5], truth.shape))
    probs = np.repeat(((1 - sure) / (K - 1))[None], K, 0)
    np.put_along_axis(probs, seen[None], sure[None], 0)
    return probs.astype(np.float32)


def make(root: Path, world: str, seed: int, *, images: int = 16, students: bool = True) -> Source:
    """Labelled images with the scores of both, the student's out of fold."""
    rng = np.random.default_rng(seed)
    names = [f"images/{number:02d}.png" for number in range(images)]
    for folder in ("images", "masks", "probs/images", "student/images"):
        (root / folder).mkdir(parents=True)
    for name in names:
        truth = np.kron(rng.integers(0, K, (4, 4)), np.ones((3, 3), int)).astype(np.uint8)
        Image.fromarray(truth).save(root / name.replace("images", "masks"))
        Image.fromarray(truth).save(root / name)
        for folder, sees in zip(("probs", "student"), WORLDS[world], strict=True):
            np.save(root / folder / Path(name).with_suffix(".npy"), scores(truth, sees, rng))
    (root / "ids.txt").write_text(
        "".join(f"{name} {name.replace('images', 'masks')}\n" for name in names)
    )
    if students:
        folds = cross_fit(names, folds=4)
        models = tuple(
            ScoringModel(f"fold {k}", tuple(sorted(folds.train(k)))) for k in range(folds.count)
        )
        scored_by = {name: (folds.fold[place],) for place, name in enumerate(names)}
        ScoreRecord(root / "student", models, scored_by, (0,)).write()
    return Source(root, root / "probs", others=(ScoreFolder(root / "student"),))


def found_in(root: Path, world: str, seed: int) -> Findings:
    plan = Plan(None, "0.3", samples=0, max_errors=(), context=(), variant="image", folds=4)
    return gather(make(root / f"{seed}", world, seed), root / f"{seed}/ids.txt", plan)


def is_right(world: str, findings: Findings) -> bool:
    """Whether the recommendation gives labels about as good as the best there are."""
    chosen = findings.label_with
    if world in ("the student is better", "the foundation knows nothing"):
        # No pseudo-labels, or those of a map that uses the student and is no worse.
        error = findings.rules[chosen].estimate("error").mean
        own = findings.rules[STUDENT].estimate("error").mean
        return chosen == STUDENT or (error <= own and "student" in chosen.name)
    if world == "the foundation is better":
        return chosen != STUDENT and chosen.name != "labels: dirichlet map over student"
    return "probs + student" in chosen.name


@pytest.mark.parametrize("world", WORLDS)
def test_what_is_right_is_recommended(tmp_path: Path, world: str) -> None:
    findings = found_in(tmp_path, world, 0)
    assert findings.student == 1
    assert findings.sources == ("probs", "student")
    assert is_right(world, findings)
    text = advice(findings)[0]
    if findings.label_with == STUDENT:
        assert text.startswith("These pseudo-labels will cost you")
        assert "Train on the labels alone, or on the student's own" in text
    else:
        assert text.startswith("Train on the labelled images and on pseudo-labels")
        assert "for the student's own labels" in text


@pytest.mark.nightly
@pytest.mark.parametrize("world", WORLDS)
def test_the_right_thing_is_recommended_in_nine_of_ten_draws(tmp_path: Path, world: str) -> None:
    right = [is_right(world, found_in(tmp_path, world, seed)) for seed in range(1, 11)]
    assert sum(right) >= 9, right


def test_every_labelling_has_its_row(tmp_path: Path) -> None:
    findings = found_in(tmp_path, "both know other things", 0)
    named = [rule.scores for rule in findings.rules if rule.kind == "labels"]
    assert named == [
        "student as it is",
        "dirichlet map over probs",
        "dirichlet map over student",
        *(
            f"dirichlet map over probs + student{power}"
            for power in ("", ", prior power 0.25", ", prior power 0.5")
        ),
    ]
    errors = {
        rule.scores: found.estimate("error").mean
        for rule, found in findings.rules.items()
        if rule.kind == "labels"
    }
    raw = findings.rules[Rule(RAW, "argmax")].estimate("error").mean
    assert errors["student as it is"] == pytest.approx(0.35, abs=0.03)
    assert raw == pytest.approx(0.35, abs=0.03)
    assert errors["dirichlet map over probs + student"] < 0.25


def test_the_command_says_what_to_train_on(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    source = make(tmp_path / "data", "both know other things", 3)
    result = command(
        capsys,
        *("report", "--root", source.root, "--ids", source.root / "ids.txt"),
        *("--probs", source.probs, "--probs", source.root / "student"),
        *("--background", "none", "--variant", "image", "--context", "none", "--show", "1"),
        *("-o", tmp_path / "report.html"),
    )
    assert result.code == 0, result.err
    assert "Train on the labelled images and on pseudo-labels" in result.out
    assert "cross-fitted on 16 of these" in result.err
    page = (tmp_path / "report.html").read_text()
    assert "labels: dirichlet map over probs + student" in page
    assert "(recommended)" in page
    assert f"--probs {source.probs} --probs {source.root / 'student'}" in page


def test_without_a_record_nothing_is_known_of_a_student(tmp_path: Path) -> None:
    source = make(tmp_path, "both know other things", 0, students=False)
    plan = Plan(None, "0.3", samples=0, max_errors=(), context=(), variant="image")
    findings = gather(source, tmp_path / "ids.txt", plan)
    assert findings.student is None
    assert "Whether a student gains by these labels is not known" in advice(findings)[0]
