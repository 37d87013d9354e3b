"""Recalibration: what it recovers, what it leaves alone, what it refuses."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.helpers import exact, raises, same, seeded
from torch import Tensor

from cpseg import Evidence, Recalibration, Recalibrator, evidence
from cpseg.recalibration import recalibration as score_map
from cpseg.recalibration import recalibrator as recalibration
from cpseg.recalibration.features import FLOOR

K = 4
Images = list[tuple[Tensor, Tensor]]
CONTEXTS = [(), ("location",), ("neighbourhood",), ("image",), ("location", "image"), "all"]


def drawn(p: Tensor, generator: torch.Generator) -> Tensor:
    """Labels drawn from probabilities [K, H, W]."""
    noise = torch.empty_like(p).exponential_(generator=generator)
    return (p / noise).argmax(0)


def calibrated(number: int, seed: int, *, classes: int = K, side: int = 40) -> Images:
    """Images whose labels follow their scores."""
    generator = seeded(seed)
    result = []
    for _ in range(number):
        probs = (1.5 * torch.randn(classes, side, side, generator=generator)).softmax(0)
        result.append((probs, drawn(probs, generator)))
    return result


def planted(number: int, seed: int, weight: Tensor, bias: Tensor, side: int = 40) -> Images:
    """Images whose labels follow ``softmax(W log p + b)``."""
    generator = seeded(seed)
    result = []
    for _ in range(number):
        probs = (1.5 * torch.randn(weight.shape[1], side, side, generator=generator)).softmax(0)
        z = torch.einsum("ks,shw->khw", weight, probs.log()) + bias[:, None, None]
        result.append((probs, drawn(z.softmax(0), generator)))
    return result


def fitted(images: Images, classes: int = K, **options: Any) -> Recalibration:
    recalibrator = Recalibrator(classes, **options)
    for probs, labels in images:
        recalibrator.update(probs, labels)
    return recalibrator.fit()


def nll(probs: Tensor, labels: Tensor) -> float:
    return -float(probs.gather(0, labels[None]).clamp(min=1e-12).log().mean())


def made(
    context: Any = (),
    *,
    scores: str = "softmax",
    classes: int = K,
    sources: int = K,
    absent: tuple[int, ...] = (),
    seed: int = 0,
    power: float = 0.0,
) -> Recalibration:
    """A map with random weights."""
    context = ("location", "neighbourhood", "image") if context == "all" else context
    own = sources * (2 if scores == "sigmoid" else 1)
    wide = {"location": 4, "neighbourhood": 2 * own, "image": own}
    generator = seeded(seed)
    columns = own + sum(wide[part] for part in context)
    weight = 0.4 * torch.randn(classes, columns, generator=generator)
    bias = torch.randn(classes, generator=generator)
    prior = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.1
    prior[list(absent)] = weight[list(absent)] = 0
    return Recalibration(
        weight,
        bias,
        prior / prior.sum(),
        "dirichlet",
        scores,
        context,
        sources,
        9,
        0.01,
        power,
    )


def naive(recal: Recalibration, probs: np.ndarray) -> np.ndarray:
    """The map pixel by pixel in float64."""
    sources, height, width = probs.shape
    clip = lambda p: np.log(np.maximum(p, FLOOR))  # noqa: E731
    weight, bias, prior = (exact(t) for t in (recal.weight, recal.bias, recal.prior))
    out = np.zeros((len(weight), height, width))
    present = prior > 0
    logs = lambda p: (  # noqa: E731
        np.concatenate([clip(p), clip(1 - p)]) if recal.scores == "sigmoid" else clip(p)
    )
    for i, j in itertools.product(range(height), range(width)):
        features = [logs(probs[:, i, j])]
        if "location" in recal.context:
            x, y = (2 * j + 1) / width - 1, (2 * i + 1) / height - 1
            features.append(np.array([x, y, x * x, y * y]))
        if "neighbourhood" in recal.context:
            for side in (7 / 180, 31 / 180):
                r = max(0, round((side * min(height, width) - 1) / 2))
                window = probs[:, max(0, i - r) : i + r + 1, max(0, j - r) : j + r + 1]
                features.append(logs(window.mean((1, 2))))
        if "image" in recal.context:
            features.append(logs(probs.mean((1, 2))))
        z = weight @ np.concatenate(features) + bias
        with np.errstate(divide="ignore"):
            z = z - recal.prior_power * np.where(present, np.log(prior), 0)
        e = np.where(present, np.exp(z - z[present].max()), 0)
        kept = np.zeros(len(weight))
        if sources == len(weight):
            kept[~present] = probs[~present, i, j] / max(1, probs[:, i, j].sum())
        out[:, i, j] = e / e.sum() * (1 - kept.sum()) + kept
    return out


# --- the map -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_map_is_that_of_a_loop(context: Any, scores: str) -> None:
    probs = torch.rand(2, K, 21, 34, generator=seeded(1))
    probs = probs.softmax(1) if scores == "softmax" else probs
    probs[0, :, 3, 3] = torch.tensor([1.0, 0, 0, 0])
    for absent, power in (((), 0.0), ((1, 3), 0.7)):
        recal = made(context, scores=scores, absent=absent, power=power)
        assert recal.absent == absent
        found = recal(probs)
        assert found.dtype == torch.float32
        assert found.shape == probs.shape
        torch.testing.assert_close(found.sum(1), torch.ones(2, 21, 34))
        for image, expected in zip(found, probs, strict=True):
            expected = naive(recal, exact(expected))
            np.testing.assert_allclose(exact(image), expected, atol=2e-5)


def test_a_rectangular_map_is_that_of_a_loop() -> None:
    probs = torch.rand(6, 9, 8, generator=seeded(1)).softmax(0)
    recal = made(sources=6, absent=(2,), power=0.5)
    found = recal(probs)
    np.testing.assert_allclose(exact(found), naive(recal, exact(probs)), atol=2e-5)
    assert bool((found[2] == 0).all())


@pytest.mark.parametrize("tile", [1, 300, 2**18])
@pytest.mark.parametrize("background", [None, 0, 3])
@pytest.mark.parametrize("context", CONTEXTS)
def test_evidence_is_that_of_the_map_bit_for_bit(
    context: Any, background: int | None, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_map, "_TILE", tile)
    probs = torch.rand(2, K, 37, 23, generator=seeded(2)).softmax(1)
    probs[0] = (4 * probs[0]).round() / 4  # ties
    for absent in ((), (3,)):
        recal = made(context, absent=absent)
        for some in (probs, probs[0]):
            one = recal.evidence(some, background=background)
            other = evidence(recal(some), background=background)
            assert isinstance(one, Evidence)
            assert same(one.best, other.best)
            assert same(one.best_class, other.best_class)
            assert (one.background, one.num_classes) == (background, K)
            if background is not None:
                assert same(one.background_score, other.background_score)


@pytest.mark.parametrize("context", CONTEXTS)
def test_tiles_leave_no_seam(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    probs = torch.rand(2, K, 150, 23, generator=seeded(3)).softmax(1)
    recal = made(context)
    whole = recal(probs)
    monkeypatch.setattr(score_map, "_TILE", 1)
    torch.testing.assert_close(recal(probs), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_mapped_in_float32(dtype: torch.dtype) -> None:
    probs = torch.rand(K, 9, 7, generator=seeded(4)).softmax(0).to(dtype)
    for scores in ("softmax", "sigmoid"):
        recal = made("all", scores=scores)
        torch.testing.assert_close(recal(probs), recal(probs.float()), atol=1e-6, rtol=0)


def test_a_nan_stays_in_its_pixel() -> None:
    probs = torch.full((K, 2, 3), 0.25)
    probs[1, 0, 2] = torch.nan
    found = made()(probs).isnan()
    assert bool(found[:, 0, 2].all())
    assert int(found.sum()) == K


def test_context_means_the_same_at_any_size() -> None:
    """Windows of 7 and 31 pixels at 180 rows are of 21 and 93 at 540."""
    probs = torch.rand(1, K, 6, 8, generator=seeded(5))
    probs = torch.nn.functional.interpolate(probs, (180, 240), mode="bilinear").softmax(1)
    large = torch.nn.functional.interpolate(probs, scale_factor=3, mode="nearest")
    recal = made("all")
    centres = recal(large)[..., 1::3, 1::3]
    torch.testing.assert_close(centres, recal(probs), atol=2e-3, rtol=0)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_compiling"), reason="torch.compile before 2.3")
def test_it_traces_whole() -> None:
    torch._dynamo.reset()
    probs = torch.rand(2, K, 5, 6, generator=seeded(6)).softmax(1)
    for recal in (made(), made(absent=(1,)), made("all"), made(scores="sigmoid")):
        compiled = torch.compile(lambda p, r=recal: r(p), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(probs), recal(probs), atol=1e-6, rtol=0)


# --- the prior ---------------------------------------------------------------------------------


def test_the_prior_is_the_mean_of_the_images_frequencies() -> None:
    probs = torch.rand(3, 2, 5, generator=seeded(0)).softmax(0)
    first = torch.tensor([[0, 0, 1, 255, 255], [255] * 5])
    second = torch.tensor([[2, 1, 1, 1, 1], [1] * 5])
    void = torch.full((2, 5), 255)
    recal = fitted([(probs, first), (probs, second), (probs, void)], 3, method="none")
    assert recal.num_images == 2
    expected = torch.tensor([(2 / 3) / 2, (1 / 3 + 0.9) / 2, 0.1 / 2], dtype=torch.float64)
    torch.testing.assert_close(recal.prior, expected)


@given(st.floats(0, 1), st.booleans())
def test_the_prior_power_divides_and_normalises(tau: float, missing: bool) -> None:
    absent = (2,) if missing else ()
    recal = made(absent=absent)
    probs = torch.rand(K, 3, 3, generator=seeded(1)).softmax(0)
    before, after = exact(recal(probs)), exact(recal.with_prior_power(tau)(probs))
    present = [k for k in range(K) if k not in absent]
    favoured = before[present] * (recal.prior[present].numpy() ** -tau)[:, None, None]
    expected = favoured / favoured.sum(0) * before[present].sum(0)
    np.testing.assert_allclose(after[present], expected, atol=1e-5)
    np.testing.assert_array_equal(after[list(absent)], before[list(absent)])
    divided = recal.divide_prior(recal(probs), tau)
    np.testing.assert_allclose(exact(divided), after, atol=1e-6)


def test_none_is_the_scores_themselves() -> None:
    images = calibrated(2, 0)
    recal = fitted(images, method="none")
    torch.testing.assert_close(recal(images[0][0]), images[0][0], atol=1e-3, rtol=0)
    assert recal.strength == 0
    odds = fitted(images, method="none", scores="sigmoid")(images[0][0])
    expected = images[0][0] / (1 - images[0][0])
    torch.testing.assert_close(odds, expected / expected.sum(0), atol=2e-3, rtol=0)


# --- what is recovered -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["temperature", "vector", "dirichlet"])
def test_calibrated_scores_stay_as_they_are(method: str) -> None:
    recal = fitted(calibrated(12, 0), method=method)
    (probs, labels) = calibrated(1, 99, side=100)[0]
    found = recal(probs)
    assert float((found - probs).abs().mean()) < 0.01
    assert nll(found, labels) < nll(probs, labels) + 0.002


def test_a_planted_matrix_is_recovered() -> None:
    """40,000 pixels: the standard error of an entry is about 0.02, of an intercept 0.06."""
    noise = torch.from_numpy(np.random.default_rng(7).normal(size=(K, K)))  # on every version
    weight = 0.8 * torch.eye(K)[[1, 2, 3, 0]] + 0.3 * noise.float()
    bias = torch.tensor([0.5, -0.5, 0.2, -0.2])
    recal = fitted(planted(25, 8, weight, bias), folds=3)
    centred = lambda t: t - t.mean(0)  # noqa: E731  softmax does not see what all classes share
    torch.testing.assert_close(centred(recal.weight), centred(weight), atol=0.1, rtol=0)
    torch.testing.assert_close(centred(recal.bias), centred(bias), atol=0.3, rtol=0)
    assert [pairs[0][0] for pairs in recal.correspondence()] == weight.argmax(1).tolist()


def test_a_temperature_is_recovered() -> None:
    recal = fitted(planted(10, 9, 0.4 * torch.eye(K), torch.zeros(K)), method="temperature")
    torch.testing.assert_close(recal.weight, 0.4 * torch.eye(K), atol=0.03, rtol=0)


def test_sigmoid_scores() -> None:
    """Overconfident independent scores of a calibrated source."""
    generator = seeded(10)
    images = []
    for probs, labels in calibrated(10, 10):
        logit = 2 * (probs.log() - (1 - probs).log()) + 1
        noise = 0.1 * torch.randn(logit.shape, generator=generator)
        images.append(((logit + noise).sigmoid(), labels))
    scores, labels = images.pop()
    raw = scores / scores.sum(0)
    for method in ("temperature", "vector", "dirichlet"):
        found = fitted(images, method=method, scores="sigmoid")(scores)
        assert nll(found, labels) < nll(raw, labels) - 0.01


def test_a_rectangular_permutation_is_recovered_and_printed() -> None:
    """Five source classes onto three: 4 and 1 are road, 0 and 3 are car, 2 is sky."""
    target = torch.tensor([1, 0, 2, 1, 0])
    generator = seeded(11)
    images = []
    for _ in range(6):
        z = 2 * torch.randn(5, 30, 30, generator=generator)
        images.append((z.softmax(0), target[z.argmax(0)]))
    recal = fitted(images, 3)
    assert recal.num_source == 5
    found = recal.correspondence(top=2)
    assert [{source for source, _ in pairs} for pairs in found[:2]] == [{1, 4}, {0, 3}]
    assert all(p > 0.9 for pairs in found[:2] for _, p in pairs)
    assert found[2][0][0] == 2
    assert found[2][0][1] > 0.9 > 0.1 > found[2][1][1]
    text = recal.describe(list("abcde"), ["road", "car", "sky"]).splitlines()
    assert text[0].startswith("dirichlet map of 5 softmax scores onto 3 classes, 6 images")
    assert "0.9 sure of a source class" in text[1]
    assert text[4].startswith("sky : ")
    named = [[part.split() for part in line.split(": ")[1].split(", ")] for line in text[2:]]
    assert named[2][0] == [f"{found[2][0][1]:.2f}", "where", "c"]
    assert {words[2] for words in named[0][:2]} == {"b", "e"}
    with raises(ValueError, "Recalibration.describe", "5 source_names, got 2"):
        recal.describe(["a", "b"])


def test_a_class_map_of_one_to_one_is_learned() -> None:
    """A model with a class too many, its order another."""
    target = torch.tensor([2, 0, 255, 1])
    images = [(probs, target[probs.argmax(0)]) for probs, _ in calibrated(5, 14)]
    recal = fitted(images[1:], 3)
    probs, labels = images[0]
    known = labels != 255
    assert float((recal(probs).argmax(0) == labels)[known].float().mean()) > 0.95


@pytest.mark.parametrize("context", [(), "auto"])
def test_few_images_and_two_pixels_of_a_class_do_not_explode(context: Any) -> None:
    images = calibrated(6, 12)
    few = []
    for probs, labels in images[:5]:
        few.append((probs, labels.masked_fill(labels == 3, 255)))
    labels = few[0][1]
    labels[5, 5] = labels[20, 9] = 3
    recal = fitted(few, context=context)
    probs, labels = images[5]
    labels = labels.masked_fill(labels == 3, 0)
    found = recal(probs)
    assert bool(found.isfinite().all())
    assert float(recal.weight.abs().max()) < 10
    assert nll(found, labels) < nll(probs, labels)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("number", [1, 2, 5])
def test_few_small_images_do_not_harm_calibrated_scores(number: int, seed: int) -> None:
    recal = fitted(calibrated(number, seed, side=16), context="auto")
    fresh, labels = calibrated(1, 100 + seed, side=100)[0]
    assert nll(recal(fresh), labels) < nll(fresh, labels) + 0.05
    assert (recal.cv == ()) == (number == 1)


def test_absent_classes_keep_their_mass() -> None:
    images = [(p, y.masked_fill(y == 2, 255)) for p, y in calibrated(6, 13)]
    for method in ("none", "temperature", "vector", "dirichlet"):
        recal = fitted(images, method=method)
        assert recal.absent == (2,)
        probs = images[0][0]
        found = recal(probs)
        torch.testing.assert_close(found[2], probs[2] / probs.sum(0).clamp(min=1))
        torch.testing.assert_close(found.sum(0), torch.ones_like(found[0]))
        assert "absent from the labelled images" in recal.describe()


# --- context and strength ----------------------------------------------------------------------


def by_location(number: int, seed: int, *, informative: bool) -> Images:
    generator = seeded(seed)
    result = []
    x = torch.linspace(-2, 2, 24).expand(24, 24)
    for _ in range(number):
        probs = torch.randn(3, 24, 24, generator=generator).softmax(0)
        z = probs.log()
        z = torch.stack([z[0] + x, z[1] - x, z[2]]) if informative else z
        result.append((probs, drawn(z.softmax(0), generator)))
    return result


def test_auto_takes_location_where_it_tells_and_leaves_it_where_not() -> None:
    assert fitted(by_location(10, 0, informative=False), 3, context="auto").context == ()
    recal = fitted(by_location(10, 1, informative=True), 3, context="auto")
    assert recal.context == ("location",)
    x1 = recal.weight[:, 3]
    assert float(x1[0] - x1[1]) == pytest.approx(4, abs=0.5)
    table = json.loads(json.dumps(list(recal.cv)))
    assert {tuple(row["context"]) for row in table} >= {(), ("location",)}
    best = {
        c: min(r["loss"] for r in table if tuple(r["context"]) == c) for c in ((), ("location",))
    }
    assert best[("location",)] < best[()]
    chosen = min((r for r in table if r["context"] == ["location"]), key=lambda r: r["loss"])
    assert recal.strength == chosen["strength"]


def test_fitted_context_is_applied_as_it_was_stored() -> None:
    """The features of the fit and of the map are one: the fit's own loss, met again."""
    images = by_location(4, 2, informative=True)
    for context in (("location",), ("neighbourhood",), ("image",), ("location", "neighbourhood")):
        recalibrator = Recalibrator(3, context=context)
        for probs, labels in images:
            recalibrator.update(probs, labels)
        samples = sorted(recalibrator._reservoir.samples, key=lambda s: s.digest)
        pixels = recalibrator._pixels(samples, torch.arange(3))
        recal = recalibrator.fit()
        z = pixels.features @ recal.weight.T + recal.bias
        stored = z.log_softmax(1)[torch.arange(len(z)), pixels.labels]
        applied = sum(nll(recal(p), y) for p, y in images) / len(images)
        assert -float(stored.double() @ pixels.weights) / 4 == pytest.approx(applied, abs=1e-5)


# --- streaming ---------------------------------------------------------------------------------


def parts(recal: Recalibration) -> tuple[Any, ...]:
    return (*(t.numpy().tobytes() for t in recal.tensors().values()), recal.metadata())


@settings(max_examples=8)
@given(st.randoms(), st.integers(0, 6))
def test_any_order_and_split_gives_the_same_map(random: Any, cut: int) -> None:
    images = by_location(6, 3, informative=True)
    options: dict[str, Any] = {"context": ("location",), "budget": 900, "folds": 2}
    expected = fitted(images, 3, **options)
    order = list(images)
    random.shuffle(order)
    one, other = (Recalibrator(3, **options) for _ in range(2))
    for probs, labels in order[:cut]:
        one.update(probs, labels.to(torch.uint8))
    if cut < 6:
        rest = [torch.stack(part) for part in zip(*order[cut:], strict=True)]
        other.update(rest[0], rest[1])
    one.merge(other)
    assert one.num_pixels <= 900
    assert parts(one.fit()) == parts(expected)


def test_another_seed_draws_other_pixels() -> None:
    images = calibrated(3, 0)
    one, other = (fitted(images, budget=300, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.weight, other.weight)


def test_images_weigh_the_same_whatever_their_size() -> None:
    """A small image beside a large one: the frequencies of the fit are those of the prior."""
    small, large = calibrated(1, 0, side=10)[0], calibrated(1, 1, side=80)[0]
    recalibrator = Recalibrator(K, budget=2000)
    for probs, labels in (small, large):
        recalibrator.update(probs, labels)
    weights = [sample.weights().sum() for sample in recalibrator._reservoir.samples]
    assert weights == pytest.approx([1, 1])


def one_rank(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    recalibrator = Recalibrator(3, budget=900)
    if rank == 1:  # the first has no images
        for probs, labels in by_location(4, 4, informative=True):
            recalibrator.update(probs, labels)
    recalibrator.sync()
    recalibrator.fit().save(folder / f"{rank}.safetensors")
    both = Recalibrator(3, budget=900)
    for number, (probs, labels) in enumerate(by_location(4, 4, informative=True)):
        if number % 2 == rank:
            both.update([probs, probs.flip(0)], labels, ids=f"{number}")
    both.sync()
    both.fit().save(folder / f"both-{rank}.safetensors")
    said = []
    for call in (recalibrator.sync, lambda: recalibrator.merge(Recalibrator(3, budget=900))):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    odd = Recalibrator(3, budget=900 + rank)
    try:
        odd.sync()
    except ValueError as error:
        said.append(str(error))
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.barrier()  # nobody hangs up while another still reads
    dist.destroy_process_group()


@pytest.mark.nightly
@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
def test_ranks_fit_the_same_map(tmp_path: Path) -> None:
    code = "\n\n".join(
        [
            "from __future__ import annotations",
            "import json, sys, torch, torch.distributed as dist",
            "from pathlib import Path",
            "from cpseg import Recalibrator",
            *map(inspect.getsource, (seeded, drawn, by_location, one_rank)),
            "one_rank(int(sys.argv[2]), Path(sys.argv[1]))",
        ]
    )
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(rank)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    expected = fitted(by_location(4, 4, informative=True), 3, budget=900)
    whole = Recalibrator(3, budget=900)
    for number, (probs, labels) in enumerate(by_location(4, 4, informative=True)):
        whole.update([probs, probs.flip(0)], labels, ids=f"{number}")
    both = whole.fit()
    assert both.sources == (3, 3)
    for rank in range(2):
        assert parts(Recalibration.load(tmp_path / f"{rank}.safetensors")) == parts(expected)
        assert parts(Recalibration.load(tmp_path / f"both-{rank}.safetensors")) == parts(both)
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert "a second one" in said[0]
        assert "before sync" in said[1]
        assert "the same budget" in said[2]


# --- files -------------------------------------------------------------------------------------


def test_a_file_gives_the_same_map(tmp_path: Path) -> None:
    images = calibrated(3, 0, side=12)
    probs = images[0][0]
    recal = fitted(images, context=("location", "image")).with_prior_power(0.5)
    recal.save(tmp_path / "r.safetensors")
    again = Recalibration.load(tmp_path / "r.safetensors")
    assert parts(again) == parts(recal)
    assert same(again(probs), recal(probs))
    assert again.absent == recal.absent
    assert same(recal.to("cpu")(probs), recal(probs))
    nested = Recalibration.from_parts(recal.tensors(), json.loads(json.dumps(recal.metadata())))
    assert parts(nested) == parts(recal)


DAMAGE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "kind": (
        {},
        {"kind": "calibration"},
        "a recalibration of format 1 or 2, got kind 'calibration'",
    ),
    "format": ({}, {"format": 3}, "of format 3"),
    "no weight": ({"weight": None}, {}, "'weight' in it, got nothing"),
    "no method": ({}, {"method": None}, "'method' in it, got nothing"),
    "method": ({}, {"method": "magic"}, "a valid method, got 'magic'"),
    "scores": ({}, {"scores": ["softmax"]}, "a valid scores"),
    "context": ({}, {"context": ["image", "location"]}, "a valid context"),
    "power": ({}, {"prior_power": 2}, "a valid prior_power, got 2"),
    "cv": ({}, {"cv": [1]}, "a valid cv"),
    "source": ({}, {"num_source": 5}, r"'weight' \[4, 5\]"),
    "square": (
        {"weight": torch.zeros(4, 5)},
        {"num_source": 5, "method": "vector"},
        "4 source",
    ),
    "shape": ({"bias": torch.zeros(3)}, {}, r"'bias' \[4\], got torch.float32 \[3\]"),
    "scalar": ({"weight": torch.tensor(1.0)}, {}, "'weight'"),
    "dtype": ({"prior": torch.full((4,), 0.25)}, {}, "finite torch.float64 'prior'"),
    "nan": ({"weight": torch.full((4, 4), torch.nan)}, {}, "got NaN or infinite values"),
    "prior": ({"prior": torch.full((4,), 0.5).double()}, {}, "sums to 1, got a sum of 2"),
    "sign": ({"prior": torch.tensor([-1.0, 1, 1, 0]).double()}, {}, "'prior'"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_parts_are_refused(case: str) -> None:
    tensors, metadata, match = DAMAGE[case]
    good = made()
    mixed = {**good.tensors(), **tensors}
    facts = {**good.metadata(), **metadata}
    with raises(ValueError, "Recalibration.from_parts", match):
        Recalibration.from_parts(
            {name: value for name, value in mixed.items() if value is not None},
            {name: value for name, value in facts.items() if value is not None},
        )


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    made().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="unreadable"):
        Recalibration.load(path)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_classes": 1}, "num_classes as a whole number >= 2, got 1"),
        ({"num_classes": 3.0}, "num_classes as a whole number >= 2, got 3.0"),
        ({"method": "isotonic"}, "method among .*, got 'isotonic'"),
        ({"scores": "logits"}, "scores among 'softmax', 'sigmoid', got 'logits'"),
        ({"context": ("weather",)}, "context 'auto' or some of .*, got 'weather'"),
        ({"context": "image", "method": "temperature"}, "no context for 'temperature'"),
        ({"context": "auto", "method": "none"}, "no context for 'none'"),
        ({"budget": 0}, "budget as a whole number >= 1, got 0"),
        ({"folds": 1}, "folds as a whole number >= 2, got 1"),
        ({"seed": -1}, "seed as a whole number >= 0, got -1"),
        ({"ignore_index": 2}, "ignore_index outside"),
    ],
)
def test_options_are_checked(options: dict[str, Any], match: str) -> None:
    with raises(ValueError, "Recalibrator", match):
        Recalibrator(**{"num_classes": K, **options})


def test_updates_are_checked() -> None:
    where = "Recalibrator.update"
    probs, labels = calibrated(1, 0, side=6)[0]
    recalibrator = Recalibrator(K)
    with raises(ValueError, where, "probs in .*, got NaN"):
        recalibrator.update(probs.masked_fill(probs < 0.3, torch.nan), labels)
    with raises(ValueError, where, "probs in .*, got values from"):
        recalibrator.update(2 * probs, labels)
    with raises(ValueError, where, "labels in 0..3 or 255"):
        recalibrator.update(probs, labels + 1)
    with raises(TypeError, where, "integer labels"):
        recalibrator.update(probs, labels.float())
    with raises(ValueError, where, r"labels \[6, 6\]"):
        recalibrator.update(probs, labels[:5])
    with raises(ValueError, "Recalibrator.fit", "labelled pixels, got none"):
        recalibrator.fit()
    assert recalibrator.num_source is None, "nothing was counted"
    recalibrator.update(probs, labels)
    with raises(ValueError, where, "scores of 4 source classes, got probs"):
        recalibrator.update(probs[:3], labels)
    for method in ("none", "temperature", "vector"):
        with raises(ValueError, where, f"4 source classes for method '{method}', got 3"):
            Recalibrator(K, method=method).update(probs[:3], labels)


def test_fits_with_nothing_to_learn_are_refused() -> None:
    probs, labels = calibrated(1, 0, side=6)[0]
    where = "Recalibrator.fit"
    with raises(ValueError, where, "labelled pixels, got none"):
        fitted([(probs, torch.full_like(labels, 255))])
    with raises(ValueError, where, "at least 2 labelled classes, got class 2 alone"):
        fitted([(probs, torch.full_like(labels, 2))])
    for constant in (0.0, 1.0):
        with raises(ValueError, where, "scores that differ between pixels"):
            fitted([(torch.full_like(probs, constant), labels)])


def test_merges_are_checked() -> None:
    where = "Recalibrator.merge"
    recalibrator = Recalibrator(K)
    with raises(TypeError, where, "a Recalibrator, got int"):
        recalibrator.merge(3)  # type: ignore[arg-type]
    with raises(ValueError, where, "itself"):
        recalibrator.merge(recalibrator)
    others = {"num_classes": 3, "method": "vector", "budget": 9, "seed": 1, "context": "auto"}
    for name, value in others.items():
        with raises(ValueError, where, f"the same {name} "):
            recalibrator.merge(Recalibrator(**{"num_classes": K, name: value}))


def test_the_map_is_checked_where_it_is_applied() -> None:
    recal = made()
    for call, where in (
        (recal, "Recalibration"),
        (recal.evidence, "Recalibration.evidence"),
    ):
        with raises(ValueError, where, r"scores of 4 source classes, got probs \[5, 2, 2\]"):
            call(torch.rand(5, 2, 2))
        with raises(TypeError, where, "floating-point probs"):
            call(torch.zeros(4, 2, 2, dtype=torch.uint8))
    with raises(ValueError, "Recalibration.evidence", "background in 0..3"):
        recal.evidence(torch.rand(4, 2, 2), background=4)
    for tau in (-0.1, 1.5, float("nan"), True, "1"):
        with raises(ValueError, "Recalibration.with_prior_power", r"in \[0, 1\]"):
            recal.with_prior_power(tau)  # type: ignore[arg-type]
    assert replace(recal, prior_power=0.3).prior_power == 0.3
    assert recalibration.Recalibration is Recalibration
