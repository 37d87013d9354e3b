"""The convex fit against objectives written out in NumPy, scikit-learn, and planted maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize
from tests.support.helpers import seeded
from torch import Tensor

from cpseg.recalibration import features
from cpseg.recalibration import fit as refit
from cpseg.recalibration import pixel_sample as reservoir
from cpseg.recalibration.features import FLOOR
from cpseg.recalibration.fit import Map, Pixels, fit_map

K = 3


def pixels(number: int, features: int, seed: int, *, classes: int = K) -> Pixels:
    """Features of a few images with labels that depend on them, and uneven weights."""
    generator = seeded(seed)
    x = torch.randn(number, features, generator=generator) * torch.linspace(0.5, 2, features) - 1
    truth = torch.randn(classes, features, generator=generator)
    labels = torch.multinomial((x @ truth.T).softmax(1), 1, generator=generator).squeeze(1)
    weights = torch.rand(number, generator=generator, dtype=torch.float64) + 0.1
    return Pixels(x, labels, weights, torch.arange(number) % 5)


def naive_objective(
    weight: np.ndarray, bias: np.ndarray, some: Pixels, base: Map, strength: float
) -> float:
    """Mean loss and penalty as the docstring says, pixel by pixel."""
    x, shares = some.features.double().numpy(), some.weights.numpy() / some.weights.sum().item()
    mean = shares @ x
    spread = np.maximum(np.sqrt(shares @ (x - mean) ** 2), 0.3)
    total = 0.0
    for row, label, share in zip(x, some.labels.tolist(), shares, strict=True):
        z = weight @ row + bias
        total += share * (np.log(np.exp(z - z.max()).sum()) + z.max() - z[label])
    far = weight - base.weight.numpy()
    centre = bias - base.bias.numpy() + far @ mean
    return total + strength * (((far * spread) ** 2).sum() + (centre**2).sum())


def square_base(features: int = K) -> Map:
    return Map(torch.eye(K, features, dtype=torch.float64), torch.zeros(K, dtype=torch.float64))


@pytest.mark.parametrize("method", ["dirichlet", "vector", "temperature"])
def test_the_fit_is_the_optimum_that_scipy_finds(method: str) -> None:
    own, some, strength = K, pixels(60, K + 2, 3), 0.01
    base = square_base(K + 2)
    if method == "temperature":
        some = some._replace(features=some.features[:, :K])
        base, strength = square_base(), refit.TEMPERATURE_STRENGTH
    fitted = fit_map(some, base, method, strength, own=own)
    shape = tuple(base.weight.shape)

    def unpack(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if method == "temperature":
            return theta[0] * np.eye(K), np.zeros(K)
        weight = theta[: shape[0] * shape[1]].reshape(shape).copy()
        if method == "vector":
            weight[:, :K] *= np.eye(K)
        return weight, theta[shape[0] * shape[1] :]

    size = 1 if method == "temperature" else shape[0] * (shape[1] + 1)
    other = minimize(
        lambda theta: naive_objective(*unpack(theta), some, base, strength),
        np.zeros(size),
        method="BFGS",
        options={"gtol": 1e-7},
    )
    weight, bias = unpack(other.x)
    own_value = naive_objective(fitted.weight.numpy(), fitted.bias.numpy(), some, base, strength)
    assert own_value <= other.fun + 1e-8
    np.testing.assert_allclose(fitted.weight.numpy(), weight, atol=2e-4)
    np.testing.assert_allclose(fitted.bias.numpy(), bias, atol=2e-4)


def test_the_search_ends_where_the_gradient_is_zero() -> None:
    some, base, strength = pixels(200, K, 5), square_base(), 1e-4
    fitted = fit_map(some, base, "dirichlet", strength, own=K)
    weight, bias = fitted.weight.numpy(), fitted.bias.numpy()
    for index in np.ndindex(*weight.shape):
        step = np.zeros_like(weight)
        step[index] = 1e-4
        ahead = naive_objective(weight + step, bias, some, base, strength)
        behind = naive_objective(weight - step, bias, some, base, strength)
        assert abs(ahead - behind) / 2e-4 < 2e-5


def test_ridge_regression_of_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    some, strength = pixels(300, 4, 1), 1e-3
    x, shares = some.features.double(), some.weights / some.weights.sum()
    mean = shares @ x
    standard = (x - mean) / (shares @ (x - mean).square()).sqrt()
    # It leaves the intercept free; a column of ones lets it be penalised as ours is.
    ones = torch.cat([standard, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    other = linear.LogisticRegression(
        C=1 / (2 * strength), fit_intercept=False, tol=1e-10, max_iter=10_000
    ).fit(ones.numpy(), some.labels.numpy(), sample_weight=shares.numpy())
    zero = Map(torch.zeros(K, 4, dtype=torch.float64), torch.zeros(K, dtype=torch.float64))
    fitted = fit_map(some, zero, "dirichlet", strength, own=4)
    ours = (x @ fitted.weight.T + fitted.bias).softmax(1)
    np.testing.assert_allclose(ours.numpy(), other.predict_proba(ones.numpy()), atol=1e-4)


def test_the_start_and_the_dtype_do_not_change_the_optimum() -> None:
    some, base = pixels(300, K, 2), square_base()
    first = fit_map(some, base, "dirichlet", 1e-3, own=K)
    far = Map(5 * torch.ones(K, K, dtype=torch.float64), torch.arange(K, dtype=torch.float64))
    for start, dtype, within in ((far, torch.float64, 1e-4), (None, torch.float32, 1e-2)):
        again = fit_map(some, base, "dirichlet", 1e-3, own=K, start=start, dtype=dtype)
        torch.testing.assert_close(again.weight, first.weight, atol=within, rtol=0)


def test_the_number_of_threads_changes_no_bit() -> None:
    some, base = pixels(9000, 6, seed=4), Map(torch.eye(K, 6).double(), torch.zeros(K).double())

    def fits() -> list[Tensor]:
        chosen = list(refit.fold_losses(some, base, "dirichlet", (1e-1, 1e-2), own=6, folds=5))
        return [*fit_map(some, base, "dirichlet", 1e-2, own=6), *(losses for _, losses in chosen)]

    before = torch.get_num_threads()
    try:
        one, three = [
            (torch.set_num_threads(n), fits(), torch.get_num_threads())[1:] for n in (1, 3)
        ]
    finally:
        torch.set_num_threads(before)
    assert (one[1], three[1]) == (1, 3), "the setting is the caller's again"
    assert all(torch.equal(a, b) for a, b in zip(one[0], three[0], strict=True))


def test_weights_are_as_good_as_copies() -> None:
    some, base = pixels(50, K, 4), square_base()
    times = torch.arange(50) % 3 + 1
    twice = some.where(torch.arange(50).repeat_interleave(times))
    twice = twice._replace(weights=torch.ones(len(twice.labels), dtype=torch.float64))
    weighed = some._replace(weights=times.double())
    one, other = (fit_map(p, base, "dirichlet", 1e-3, own=K) for p in (weighed, twice))
    torch.testing.assert_close(one.weight, other.weight, atol=1e-4, rtol=0)


def test_a_separable_problem_stays_finite() -> None:
    x = torch.tensor([[0.0, -9.0], [-9.0, 0.0]]).repeat(5, 1)
    some = Pixels(x, torch.tensor([0, 1] * 5), torch.ones(10).double(), torch.arange(10))
    base = Map(torch.eye(2).double(), torch.zeros(2).double())
    for method in ("temperature", "vector", "dirichlet"):
        fitted = fit_map(some, base, method, 1e-5, own=2)
        assert bool(fitted.weight.isfinite().all())
        assert float(fitted.weight.abs().max()) < 50


def test_a_feature_that_hardly_moved_gets_no_large_weight() -> None:
    some = pixels(200, 2, 0, classes=2)
    tiny = some.features.clone()
    tiny[:, 1] = 1e-3 * torch.randn(200, generator=seeded(1))
    base = Map(torch.eye(2).double(), torch.zeros(2).double())
    fitted = fit_map(some._replace(features=tiny), base, "dirichlet", 1e-2, own=2)
    assert float((fitted.weight[:, 1] - base.weight[:, 1]).abs().max()) < 0.1


def test_folds_hold_out_whole_images() -> None:
    some = pixels(100, K, 7)
    for strength, losses in refit.fold_losses(
        some, square_base(), "dirichlet", [1e-1, 1e-2], own=K, folds=3
    ):
        assert losses.shape == (3,)
        for k in range(3):
            inside = torch.tensor([image % 3 == k for image in some.image.tolist()])
            made = fit_map(some.where(~inside), square_base(), "dirichlet", strength, own=K)
            held = some.where(inside)
            p = (held.features.double() @ made.weight.T + made.bias).softmax(1)
            nll = -p[torch.arange(len(p)), held.labels].log()
            expected = float((nll * held.weights).sum() / held.weights.sum())
            assert float(losses[k]) == pytest.approx(expected, abs=1e-3)


# Features


def test_log_scores_are_floored() -> None:
    probs = torch.tensor([0.0, 1e-9, 0.5, 1.0]).reshape(1, 4, 1)
    logs = features.log_scores(probs).flatten()
    np.testing.assert_allclose(logs, np.log([FLOOR, FLOOR, 0.5, 1]), rtol=1e-6)
    both = features.log_scores(probs, (0, 1, 2, 3)).flatten()
    np.testing.assert_allclose(both[4:], np.log([1, 1, 0.5, FLOOR]), rtol=1e-6, atol=1e-7)
    some = features.log_scores(probs, (2,)).flatten()
    np.testing.assert_allclose(some, both[[0, 1, 2, 3, 6]])
    assert probs.flatten()[0] == 0, "the caller's scores stay as they are"


def naive_means(probs: np.ndarray, radius: int) -> np.ndarray:
    out = np.empty(probs.shape)
    for s, i, j in np.ndindex(*probs.shape):
        rows = slice(max(0, i - radius), i + radius + 1)
        columns = slice(max(0, j - radius), j + radius + 1)
        out[s, i, j] = probs[s, rows, columns].mean()
    return out


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 12), st.integers(1, 4))
def test_window_means_are_those_of_a_loop(height: int, across: int, radius: int, step: int) -> None:
    probs = torch.rand(1, 2, height, across, generator=seeded(radius))
    expected = naive_means(probs[0].double().numpy(), radius)
    for start in range(0, height, step):
        rows = slice(start, min(height, start + step))
        found = features.window_means(probs, rows, radius)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found[0].numpy(), expected[:, rows], rtol=1e-6)


def test_windows_are_in_units_of_the_image() -> None:
    assert features.radii(180, 240) == [3, 15], "7 and 31 pixels"
    assert features.radii(720, 960) == [14, 62]
    assert features.radii(2, 2) == [0, 0]


def test_columns_of_a_chosen_context() -> None:
    stored = ("location", "neighbourhood", "image")
    layout = features.Layout(2, (), stored, components=3)
    assert layout.indices(()).tolist() == [0, 1]
    assert layout.indices(("image",)).tolist() == [0, 1, 10, 11]
    assert layout.indices(stored).tolist() == list(range(12))
    assert layout.columns == {
        "location": slice(2, 6),
        "neighbourhood": slice(6, 10),
        "image": slice(10, 12),
        "features": slice(12, 15),
        "colour": slice(15, 15),
    }
    coloured = features.Layout(2, (), ("image",), components=3, colour=True)
    assert coloured.indices((), 1).tolist() == [0, 1, 4, *range(7, 16)]
    assert coloured.width == 16
    assert layout.indices(("image",), 2).tolist() == [0, 1, 10, 11, 12, 13]
    alone = features.Layout(2, (), ("image",))
    assert alone.indices(("image",)).tolist() == [0, 1, 2, 3]
    sigmoid = features.Layout(2, (0, 1), ("location", "image"))
    assert (sigmoid.own, sigmoid.width, layout.width, alone.width) == (4, 12, 15, 4)
    assert sigmoid.indices(("image",)).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


# The reservoir


def labels_of(count: Any, seed: int) -> Tensor:
    labels = torch.repeat_interleave(torch.arange(len(count)), torch.tensor(count))
    return labels[torch.randperm(len(labels), generator=seeded(seed))]


def sample_of(labels: Tensor, number: int, quota: int, classes: int) -> reservoir.Sample:
    name = reservoir.digest(labels.reshape(1, -1), torch.rand(1, 1, len(labels)), number)
    count = torch.bincount(labels, minlength=classes)
    chosen = reservoir.draw(name, labels, count, quota)
    return reservoir.Sample(name, count, labels[chosen], chosen[:, None].float())


class Backwards:
    """Shuffles by turning round."""

    def shuffle(self, values: list[Any]) -> None:
        values.reverse()


counts = st.lists(hnp.arrays(np.int64, 4, elements=st.integers(0, 40)), min_size=1, max_size=6)


@given(counts, st.integers(4, 90))
def test_a_reservoir_is_bounded_balanced_and_true_to_frequencies(
    images: list[np.ndarray], budget: int
) -> None:
    held = reservoir.PixelSample(budget)
    images = [count for count in images if count.sum() > 0]
    for number, count in enumerate(images):
        labels = labels_of(count.tolist(), number)
        held.add([sample_of(labels, number, held.quota, 4)], held.quota)
    least = sum(int((count > 0).sum()) for count in images)
    assert sum(len(s.labels) for s in held.samples) <= max(budget, least)
    for count, sample in zip(images, held.samples, strict=True):
        kept = np.bincount(sample.labels.numpy(), minlength=4)
        assert (kept <= count).all()
        assert ((kept > 0) == (count > 0)).all(), "no class is lost"
        most = max(kept[kept < count], default=0)
        assert all(kept[k] == count[k] or kept[k] >= most - 1 for k in range(4)), "evenly"
        weights = np.zeros(4)
        np.add.at(weights, sample.labels.numpy(), sample.weights().numpy())
        np.testing.assert_allclose(weights, count / count.sum(), atol=1e-12)


# Large images, thinned by themselves, are merged into small ones that needed no thinning.
@example([np.full(4, 1)] * 3 + [np.full(4, 40)] * 3, 70, Backwards())
@given(counts, st.integers(4, 60), st.randoms())
def test_a_reservoir_is_the_same_in_any_order(
    images: list[np.ndarray], budget: int, random: Any
) -> None:
    torch.manual_seed(0)
    images = [count for count in images if count.sum() > 0]
    samples = [sample_of(labels_of(c.tolist(), n), n, budget, 4) for n, c in enumerate(images)]
    first, second, part = (reservoir.PixelSample(budget) for _ in range(3))
    first.add(samples, budget)
    shuffled = list(samples)
    random.shuffle(shuffled)
    part.add(shuffled[: len(shuffled) // 2], budget)
    second.add(shuffled[len(shuffled) // 2 :], budget)
    second.add(part.samples, part.quota)
    assert first.quota == second.quota
    found = [sorted(r.samples, key=lambda s: s.digest) for r in (first, second)]
    for one, other in zip(*found, strict=True):
        assert one.digest == other.digest
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.values, other.values)


def test_a_trimmed_sample_is_the_smaller_draw() -> None:
    labels = labels_of([300, 7, 0, 90], 0)
    torch.manual_seed(0)
    whole = sample_of(labels, 0, 1000, 4)
    for quota in (200, 50, 7, 1):
        torch.manual_seed(0)
        assert torch.equal(whole.trim(quota).values, sample_of(labels, 0, quota, 4).values)


def test_draws_are_uniform_within_a_class() -> None:
    """2000 draws of 2 among 10: each pixel 400 times, s.d. 17.9; 6 s.d. fails once in 10^8."""
    hits = torch.zeros(10)
    labels = torch.zeros(10, dtype=torch.int64)
    for number in range(2000):
        name = reservoir.digest(labels.reshape(1, -1), torch.zeros(1, 1, 10), number)
        hits[reservoir.draw(name, labels, torch.tensor([10]), 2)] += 1
    assert float((hits - 400).abs().max()) < 108
