"""Thresholds and prediction sets beside those of TorchCP and MAPIE, on flattened pixels.

All three take the ``ceil((n + 1)(1 - alpha))``-th smallest of n scores and keep the classes whose
score is at most that, so LAC, APS, RAPS and the margin agree. Where they differ, and why:

- **Rank.** Both peers round ``(n + 1)(1 - alpha)`` up in floating point, which is one too high
  where the product is whole in decimals but not in binary (alpha = 0.7, n = 9: 4 for 3).
- **Too few scores.** TorchCP returns +inf as we do; MAPIE raises an error below ``1/alpha`` scores,
  one more than a finite threshold needs.
- **Normalisation.** APS and RAPS here divide by the sum of the class scores; with softmax scores
  that changes the last bits, so thresholds agree to 1e-6 and sets wherever no score lies nearer to
  the threshold. MAPIE refuses scores that do not sum to 1, and compares with a slack of 1e-8.
- **Which end u = 0 is.** Here the mass before y plus ``u p_y``, u = 1 where not randomised; both
  peers subtract ``u p_y`` from the mass up to y, so their u is 1 - ours.
- **Randomised sets.** TorchCP draws a u for every class of a pixel, here and in MAPIE it is one for
  the pixel: with one, the set is a run of the most probable classes.
- **The last label.** MAPIE always randomises when it calibrates; by default it then includes the
  class that crosses the threshold, hence covers more. ``include_last_label="randomized"`` is the
  rule of the paper and ours; ``False`` is ours too, but for the most probable class, which is
  always in.
- **RAPS.** Penalty and free ranks are arguments here and in TorchCP (defaults 0.01 and 5 here, 0
  and 0 there). MAPIE chooses both on a part of the data that it splits off; ranks count from 1 in
  all three.
- **Void** is unknown to both.

TorchCP declares torchvision, transformers, torch_geometric and torchsort, which needs a compiler,
as dependencies, and imports them all. Its scores and its split predictor need none of these: they
are loaded without the package's ``__init__`` and run after ``pip install --no-deps torchcp tqdm``.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.helpers import seeded
from torch import Tensor

from cpseg import (
    Calibrator,
    conformal_quantile,
    conformal_rank,
    groups,
    nonconformity,
    nonconformity_map,
    prediction_set,
)

NUM_CLASSES, SIZE = 5, (30, 40)
ALPHAS = (0.2, 0.1, 0.05)
CLOSE = 1e-6  # rounding of float32 sums: nearer to the threshold a class may fall on either side


def softmax_maps(seed: int) -> tuple[Tensor, Tensor]:
    """A model that knows something: one image with its labels."""
    generator = seeded(seed)
    labels = torch.randint(NUM_CLASSES, (1, *SIZE), generator=generator)
    logits = torch.randn(1, NUM_CLASSES, *SIZE, generator=generator)
    logits.scatter_add_(1, labels[:, None], torch.full((1, 1, *SIZE), 1.5))
    return logits.softmax(1), labels


def flat(maps: Tensor) -> Tensor:
    """``[1, K, H, W]`` as ``[H W, K]``: a pixel a row."""
    return maps[0].flatten(1).T.contiguous()


def assert_same_sets(ours: Tensor, theirs: Any, scores: Tensor, threshold: Tensor) -> None:
    """Equal but where a score is the threshold up to rounding; some in, some out."""
    theirs = torch.as_tensor(np.asarray(theirs)).bool()
    clear = (flat(scores) - threshold).abs() > CLOSE
    assert clear.float().mean() > 0.99
    assert torch.equal(flat(ours)[clear], theirs[clear])
    assert 0.1 < float(theirs.float().mean()) < 0.9


# --- TorchCP -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchcp() -> Iterator[types.SimpleNamespace]:
    spec = importlib.util.find_spec("torchcp")
    if spec is None or spec.origin is None:
        pytest.skip("TorchCP is not installed: pip install --no-deps torchcp tqdm")
    root = Path(spec.origin).parent
    before = set(sys.modules)
    for name, path in (("torchcp", root), ("torchcp.classification", root / "classification")):
        package = types.ModuleType(name)  # in place of an __init__ that imports everything
        package.__path__ = [str(path)]
        sys.modules[name] = package
    try:
        from torchcp.classification.predictor.split import SplitPredictor
        from torchcp.classification.score import APS, LAC, RAPS, Margin
    except ImportError as error:
        pytest.skip(f"TorchCP cannot be imported: {error}")
    yield types.SimpleNamespace(
        SplitPredictor=SplitPredictor, LAC=LAC, APS=APS, RAPS=RAPS, Margin=Margin
    )
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "torchcp":
            del sys.modules[name]


def torchcp_predictor(torchcp: Any, score: str, randomized: bool = False) -> Any:
    kwargs: dict[str, Any] = {"score_type": "identity"}
    if score == "aps":
        function = torchcp.APS(randomized=randomized, **kwargs)
    elif score.startswith("raps"):
        penalty, free = score.split(":")[1:]
        function = torchcp.RAPS(
            randomized=randomized, penalty=float(penalty), kreg=int(free), **kwargs
        )
    else:
        function = {"lac": torchcp.LAC, "margin": torchcp.Margin}[score](**kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torchcp.SplitPredictor(function)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("score", ["lac", "aps", "raps:0.1:1", "raps:0.01:5", "margin"])
def test_torchcp_agrees(torchcp: Any, score: str, alpha: float) -> None:
    probs, labels = softmax_maps(1)
    fresh, _ = softmax_maps(2)
    predictor = torchcp_predictor(torchcp, score)
    predictor.calculate_threshold(flat(probs), labels.flatten(), alpha)
    threshold = conformal_quantile(nonconformity(probs, labels, score=score).flatten(), alpha)
    sets = prediction_set(fresh, threshold, score=score)
    theirs = predictor.predict_with_logits(flat(fresh))
    scores = nonconformity_map(fresh, score=score)
    torch.testing.assert_close(
        flat(scores), predictor.score_function(flat(fresh)), atol=CLOSE, rtol=0
    )
    if score in ("lac", "margin"):  # the same float32 operations
        assert threshold == predictor.q_hat
        assert torch.equal(flat(sets), theirs.bool())
    assert abs(float(threshold - predictor.q_hat)) < CLOSE
    assert_same_sets(sets, theirs, scores, threshold)


@pytest.mark.parametrize("score", ["aps", "raps:0.1:1"])
def test_torchcp_agrees_with_the_same_random_numbers(
    torchcp: Any, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probs, labels = softmax_maps(3)
    fresh, _ = softmax_maps(4)
    ours = nonconformity(probs, labels, score=score, generator=seeded(5))
    threshold = conformal_quantile(ours.flatten(), 0.1)
    sets = prediction_set(fresh, threshold, score=score, generator=seeded(6))
    scores = nonconformity_map(fresh, score=score, generator=seeded(6))
    predictor = torchcp_predictor(torchcp, score, randomized=True)

    def theirs(u: Tensor, call: Any, *args: Any) -> Any:
        """Run with 1 - u where TorchCP draws: one for a pixel, the same for all of its classes."""
        own = (1 - u).flatten()
        with monkeypatch.context() as patch:
            patch.setattr(
                torch,
                "rand",
                lambda *shape, **_: own if shape == (len(own),) else own[:, None].expand(*shape),
            )
            return call(*args)

    u = [torch.rand(1, 1, *SIZE, generator=seeded(seed)) for seed in (5, 6)]
    theirs(u[0], predictor.calculate_threshold, flat(probs), labels.flatten(), 0.1)
    assert abs(float(threshold - predictor.q_hat)) < CLOSE
    assert_same_sets(
        sets, theirs(u[1], predictor.predict_with_logits, flat(fresh)), scores, threshold
    )


def test_torchcp_with_too_few_scores(torchcp: Any) -> None:
    probs, labels = softmax_maps(1)
    predictor = torchcp_predictor(torchcp, "lac")
    for n, alpha in ((18, 0.05), (19, 0.05), (8, 0.1), (9, 0.1)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            predictor.calculate_threshold(flat(probs)[:n], labels.flatten()[:n], alpha)
        scores = nonconformity(probs, labels).flatten()[:n]
        assert float(conformal_quantile(scores, alpha)) == float(predictor.q_hat)


def test_torchcp_rounds_the_rank_up_in_floating_point(torchcp: Any) -> None:
    probs, labels = softmax_maps(1)
    predictor = torchcp_predictor(torchcp, "lac")
    predictor.calculate_threshold(flat(probs)[:9], labels.flatten()[:9], 0.7)
    scores = nonconformity(probs, labels).flatten()[:9].sort().values
    assert conformal_rank(9, 0.7) == 3
    assert conformal_quantile(scores, 0.7) == scores[2]
    assert predictor.q_hat == scores[3]


def test_pooled_calibration_is_torchcp_rounded_up(torchcp: Any) -> None:
    """``Calibrator`` over an image counts in bins: never below, within 1 % in odds."""
    probs, labels = softmax_maps(1)
    predictor = torchcp_predictor(torchcp, "lac")
    predictor.calculate_threshold(flat(probs), labels.flatten(), 0.1)
    calibrator = Calibrator(groups.image(SIZE), alpha=0.1)
    calibrator.update(probs, labels)
    binned, exact = float(calibrator.compute().threshold[0, 0]), float(predictor.q_hat)
    assert exact <= binned
    assert binned / (1 - binned) <= 1.01 * exact / (1 - exact)


# --- MAPIE -------------------------------------------------------------------------------------


class Uniform(np.random.RandomState):
    """MAPIE's source of randomness: ``uniform`` gives the numbers in turn, the rest is NumPy's."""

    def __init__(self, *numbers: Any) -> None:
        super().__init__(0)
        self.numbers = list(numbers)

    def uniform(self, low: float = 0.0, high: float = 1.0, size: Any = None) -> Any:
        return np.broadcast_to(np.asarray(self.numbers.pop(0)), size)


class Model:
    """An estimator whose inputs are numbers of pixels."""

    classes_ = np.arange(NUM_CLASSES)
    n_features_in_ = 1

    def __init__(self, *maps: Tensor) -> None:
        self.probs = np.concatenate([flat(probs).double().numpy() for probs in maps])
        self.probs /= self.probs.sum(1, keepdims=True)

    def fit(self, x: Any, y: Any) -> Model:
        return self

    def predict_proba(self, x: Any) -> Any:
        return self.probs[np.asarray(x, dtype=np.int64)[:, 0]]

    def predict(self, x: Any) -> Any:
        return self.predict_proba(x).argmax(1)

    def __sklearn_is_fitted__(self) -> bool:
        return True


def mapie(
    score: Any, alpha: float, maps: list[Tensor], labels: Tensor, random: Uniform, last: Any
) -> tuple[Any, Any]:
    """MAPIE calibrated on the first map, and its sets on the second."""
    classification = pytest.importorskip("mapie.classification", reason="MAPIE is not installed")
    pixels = labels.numel()
    classifier = classification.SplitConformalClassifier(
        Model(*maps), confidence_level=1 - alpha, conformity_score=score, random_state=random
    )
    classifier.conformalize(np.arange(pixels)[:, None], labels.flatten().numpy())
    parameters = {} if score == "lac" else {"include_last_label": last}
    _, sets = classifier.predict_set(
        np.arange(pixels, 2 * pixels)[:, None], conformity_score_params=parameters
    )
    return classifier, sets[:, :, 0]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("score", "last"), [("lac", None), ("aps", "randomized"), ("aps", False)])
def test_mapie_agrees(score: str, last: Any, alpha: float) -> None:
    """Their u = 0 is our deterministic score."""
    probs, labels = softmax_maps(1)
    fresh, _ = softmax_maps(2)
    classifier, theirs = mapie(score, alpha, [probs, fresh], labels, Uniform(0, 0), last)
    threshold = conformal_quantile(nonconformity(probs, labels, score=score).flatten(), alpha)
    sets = prediction_set(fresh, threshold, score=score)
    assert abs(float(threshold) - float(quantile(classifier))) < CLOSE
    if last is False:  # the most probable class is always in
        sets |= fresh == fresh.amax(1, keepdim=True)
    assert_same_sets(sets, theirs, nonconformity_map(fresh, score=score), threshold)


def quantile(classifier: Any) -> Any:
    return classifier._mapie_classifier.conformity_score_function_.quantiles_[0]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_mapie_agrees_with_the_same_random_numbers(alpha: float) -> None:
    probs, labels = softmax_maps(3)
    fresh, _ = softmax_maps(4)
    u = [torch.rand(1, 1, *SIZE, generator=seeded(seed)) for seed in (5, 6)]
    random = Uniform(*(1 - part.double().flatten().numpy() for part in u))
    random.numbers[1] = random.numbers[1][:, None]
    classifier, theirs = mapie("aps", alpha, [probs, fresh], labels, random, "randomized")
    ours = nonconformity(probs, labels, score="aps", generator=seeded(5))
    threshold = conformal_quantile(ours.flatten(), alpha)
    assert abs(float(threshold) - float(quantile(classifier))) < CLOSE
    sets = prediction_set(fresh, threshold, score="aps", generator=seeded(6))
    scores = nonconformity_map(fresh, score="aps", generator=seeded(6))
    assert_same_sets(sets, theirs, scores, threshold)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_mapie_agrees_on_raps_with_what_it_chose(alpha: float) -> None:
    """Penalty, free ranks and the pixels that are left are read off MAPIE."""
    probs, labels = softmax_maps(1)
    fresh, _ = softmax_maps(2)
    classifier, theirs = mapie("raps", alpha, [probs, fresh], labels, Uniform(0, 0), False)
    function = classifier._mapie_classifier.conformity_score_function_
    spent = torch.as_tensor(np.asarray(function.X_raps)[:, 0])
    left = torch.ones(labels.numel(), dtype=torch.bool)
    left[spent] = False
    assert len(spent) == labels.numel() // 10
    free, penalty = int(np.ravel(function.k_star)[0]), float(function.lambda_star)
    score = f"raps:{penalty}:{free}"
    ours = nonconformity(probs, labels, score=score).flatten()
    threshold = conformal_quantile(ours[left], alpha)
    assert abs(float(threshold) - float(quantile(classifier))) < CLOSE
    sets = prediction_set(fresh, threshold, score=score)
    sets |= fresh == fresh.amax(1, keepdim=True)
    assert_same_sets(sets, theirs, nonconformity_map(fresh, score=score), threshold)


def test_the_label_that_mapie_adds_by_default() -> None:
    """``include_last_label=True``: our set, and the most probable class that is not in it."""
    probs, labels = softmax_maps(1)
    fresh, _ = softmax_maps(2)
    _, theirs = mapie("aps", 0.1, [probs, fresh], labels, Uniform(0, 0), True)
    threshold = conformal_quantile(nonconformity(probs, labels, score="aps").flatten(), 0.1)
    sets = flat(prediction_set(fresh, threshold, score="aps"))
    last = flat(fresh).masked_fill(sets, -1).argmax(1, keepdim=True)
    more = sets.scatter(1, last, torch.ones_like(sets))
    clear = (flat(nonconformity_map(fresh, score="aps")) - threshold).abs().amin(1) > CLOSE
    assert torch.equal(more[clear], torch.as_tensor(theirs).bool()[clear])
    assert theirs.sum(1).mean() > sets.sum(1).float().mean() + 0.5


def few_scores(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """n pixels, their labels, all classes among them, and their sorted scores."""
    probs = softmax_maps(1)[0][..., :1, :n]
    labels = torch.arange(n).reshape(1, 1, n) % NUM_CLASSES
    return probs, labels, nonconformity(probs, labels).flatten().sort().values


def test_mapie_with_too_few_scores() -> None:
    for n, ours in ((8, torch.tensor(torch.inf)), (9, few_scores(9)[2][-1])):
        probs, labels, scores = few_scores(n)
        with pytest.raises(ValueError, match="Number of samples of the score is too low"):
            mapie("lac", 0.1, [probs, probs], labels, Uniform(), None)
        assert conformal_quantile(scores, 0.1) == ours


def test_mapie_rounds_the_rank_up_in_floating_point() -> None:
    probs, labels, scores = few_scores(9)
    classifier, _ = mapie("lac", 0.7, [probs, probs], labels, Uniform(), None)
    assert conformal_quantile(scores, 0.7) == scores[2]
    assert (
        abs(float(quantile(classifier)) - float(scores[3])) < CLOSE < float(scores[3] - scores[2])
    )
