"""`OnlineThreshold` against scores counted in plain Python."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from tests.support import online_ranks
from tests.support.helpers import raises, same, seeded
from tests.support.online_ranks import fresh, shares
from torch import Tensor

from cpseg import OnlineThreshold
from cpseg.core.score_bins import bin_edges
from cpseg.training.online_threshold import _confidences

# Margins between two classes whose scores lie in bins of their own, surest last.
MARGINS = (-6.0, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0, 7.0)
CELLS = torch.tensor(MARGINS)
UNIT = 1024


def batch(levels: list[int], *, labels: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """One row of pixels of two classes; level i is sure of class 0 by ``MARGINS[i]``."""
    margin = CELLS[torch.tensor(levels, dtype=torch.int64)].reshape(1, 1, 1, -1)
    logits = torch.cat([margin / 2, -margin / 2], dim=1)
    truth = torch.tensor(labels if labels is not None else [0] * len(levels))
    return logits, truth.reshape(1, 1, -1)


def build(**options: Any) -> OnlineThreshold:
    return OnlineThreshold(2, **{"alpha": 0.25, "stride": 1, "decay": 1, **options})


def covered(cal: OnlineThreshold) -> set[int]:
    """Levels whose confidence in class 0 reaches the threshold."""
    threshold = float(cal.threshold())
    least = -math.inf if threshold == 0 else -math.log(max(1 / threshold - 1, 1e-30))
    return {i for i, margin in enumerate(MARGINS) if margin + 0.02 >= least}


def wanted(weights: Counter[int], alpha: str) -> set[int]:
    """Levels whose score is at most the smallest q with A + 1 <= alpha (W + 1)."""
    most = Fraction(alpha) * (sum(weights.values()) + UNIT) - UNIT
    for level in reversed(range(len(MARGINS))):  # the surest level has the smallest score
        above = sum(weight for other, weight in weights.items() if other < level)
        if weights[level] and above <= most:
            return set(range(level, len(MARGINS)))
    return set(range(len(MARGINS)))  # q is +inf


levels = st.lists(st.integers(0, len(MARGINS) - 1), min_size=1, max_size=40)
alphas = st.sampled_from(["0.05", "0.1", "0.25", "0.5", "0.9", "0.333333333"])


# --- values ------------------------------------------------------------------------------------


def test_a_confidence_is_the_least_that_the_score_allows() -> None:
    scores = bin_edges(torch.device("cpu"))
    found = _confidences(scores).numpy()
    assert found[-1] == 0
    assert found.dtype == np.float32
    score, least = scores.numpy(), found[:-1]
    one = np.float32(1)
    assert (one - least <= score).all()
    below = np.nextafter(least, np.float32(-1))
    assert ((one - below > score) | (least == 0)).all()
    assert least[0] == 1
    assert (np.diff(least) <= 0).all()


@given(levels, alphas)
def test_without_decay_it_is_the_conformal_quantile(some: list[int], alpha: str) -> None:
    cal = build(alpha=alpha).update(*batch(some))
    assert covered(cal) == wanted(Counter({i: UNIT * some.count(i) for i in some}), alpha)
    n, count = len(some), math.ceil((len(some) + 1) * (1 - Fraction(alpha)))
    ranked = sorted(some, reverse=True)  # scores from the smallest
    want = set(range(ranked[count - 1] if count <= n else 0, len(MARGINS)))
    assert covered(cal) == want


@given(st.lists(levels, min_size=1, max_size=6), st.sampled_from([0.5, 0.9, 0.99, 1.0]), alphas)
def test_older_scores_weigh_less(batches: list[list[int]], decay: float, alpha: str) -> None:
    cal = build(alpha=alpha, decay=decay)
    weights: Counter[int] = Counter()
    for some in batches:
        cal.update(*batch(some))
        weights = Counter({i: math.floor(weight * decay) for i, weight in weights.items()})
        weights.update({i: UNIT * some.count(i) for i in set(some)})
    assert covered(cal) == wanted(weights, alpha)


@given(levels, alphas)
def test_weights_beyond_two_to_the_forty_are_exact(some: list[int], alpha: str) -> None:
    state = build().update(*batch(some)).state_dict()
    cal = build(alpha=alpha)
    cal.load_state_dict({"weights": state["weights"] * 2**36 + UNIT * (state["weights"] > 0)})
    weights = Counter({i: (2**36 * some.count(i) + 1) * UNIT for i in some})
    assert covered(cal) == wanted(weights, alpha)


@given(st.lists(st.floats(1e-5, 1 - 1e-5), min_size=1, max_size=60), alphas)
def test_the_threshold_is_rounded_up_in_score_within_one_percent_of_odds(
    probs: list[float], alpha: str
) -> None:
    margin = torch.tensor([math.log(p / (1 - p)) for p in probs]).reshape(1, 1, 1, -1)
    logits = torch.cat([margin, torch.zeros_like(margin)], dim=1)
    threshold = build(alpha=alpha).update(logits, torch.zeros(1, 1, len(probs)).long()).threshold()
    count = math.ceil((len(probs) + 1) * (1 - Fraction(alpha)))
    if count > len(probs):
        assert threshold == 0
        return
    exact = sorted(logits.softmax(1)[:, 0].flatten().tolist(), reverse=True)[count - 1]
    assert float(threshold) <= exact * (1 + 1e-6)
    odds = (1 - exact) / exact
    assert (1 - float(threshold)) / float(threshold) <= 1.01 * odds * (1 + 1e-5) + 1e-7


@given(st.lists(st.integers(0, len(MARGINS) - 1), min_size=2, max_size=12), alphas)
def test_leave_one_out(some: list[int], alpha: str) -> None:
    inside = 0
    for i, level in enumerate(some):
        others = some[:i] + some[i + 1 :]
        inside += level in covered(build(alpha=alpha).update(*batch(others)))
    assert inside >= math.ceil(len(some) * (1 - Fraction(alpha)))


@pytest.mark.ci
def test_coverage_of_a_fresh_exchangeable_pixel() -> None:
    """39 pixels, alpha 0.1: at least 90 % of fresh ones. False alarms: fewer than 1e-6."""
    generator = seeded(0)
    inside = 0
    trials = 2000
    for _ in range(trials):
        margin = 2 * torch.randn(1, 1, 1, 40, generator=generator)
        logits = torch.cat([margin, -margin], dim=1)
        labels = torch.bernoulli(0.3 * torch.ones(1, 1, 40), generator=generator).long()
        cal = build(alpha="0.1").update(logits[..., :39], labels[..., :39])
        own = logits.softmax(1)[0, labels[0, 0, 39], 0, 39]
        inside += bool(own >= cal.threshold())
    assert inside >= binom.ppf(1e-6, trials, 0.9)


# --- laws --------------------------------------------------------------------------------------


def test_too_few_scores_keep_everything() -> None:
    some = torch.randn(1, 2, 3, 4, generator=seeded(0))
    for cal in (build(), build(per_class=True)):
        assert not cal.threshold().any()
        assert cal.gate(some).all()
        assert cal.gate(some).dtype == torch.bool
    cal = build(alpha=0.05)
    assert cal.update(*batch([9] * 18)).threshold() == 0
    assert cal.update(*batch([9])).threshold() > 0.99


def test_it_fits_where_a_fixed_number_stood() -> None:
    cfg: dict[str, Any] = {"conf_thresh": 0.95}
    logits = 3 * torch.randn(2, 5, 8, 8, generator=seeded(1))
    labels = logits.argmax(1)
    labels[:, :1] = 0
    cal = OnlineThreshold(5, alpha=0.3, stride=1)
    cfg["conf_thresh"] = cal.update(logits, labels).threshold()
    assert cfg["conf_thresh"].shape == ()
    assert cfg["conf_thresh"].dtype == torch.float32
    assert 0 < cfg["conf_thresh"] < 1
    confidence = logits.softmax(dim=1).max(dim=1)[0]
    assert torch.equal(cal.gate(logits), confidence >= cfg["conf_thresh"])
    assert 0 < cal.gate(logits).float().mean() < 1


@pytest.mark.parametrize("num_classes", [2, 21, 150])
def test_a_calibration_pixel_at_the_quantile_is_kept(num_classes: int) -> None:
    """Right pixels are scored and gated by the same bits, whatever the place in a tile."""
    logits = 8 * torch.randn(2, num_classes, 61, 67, generator=seeded(num_classes))
    labels = logits.argmax(1)
    for alpha in (0.01, 0.3, 0.9):
        for stride in (1, 3):
            cal = OnlineThreshold(num_classes, alpha=alpha, stride=stride).update(logits, labels)
            kept = cal.gate(logits)[:, ::stride, ::stride]
            assert kept.sum() >= math.ceil((1 - alpha) * kept.numel())


@given(st.lists(levels, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_without_decay_batches_and_order_do_not_matter(
    batches: list[list[int]], random: Any
) -> None:
    whole = [level for some in batches for level in some]
    one = build().update(*batch(whole))
    random.shuffle(batches)
    many = build()
    for some in batches:
        many.update(*batch(some))
    assert same(many.threshold(), one.threshold())
    assert same(many.state_dict()["weights"], one.state_dict()["weights"])


def test_a_smaller_alpha_keeps_more() -> None:
    logits = torch.randn(1, 4, 30, 30, generator=seeded(0))
    labels = torch.randint(4, (1, 30, 30), generator=seeded(1))
    for per_class in (False, True):
        some = [
            OnlineThreshold(4, alpha=a, per_class=per_class).update(logits, labels)
            for a in (0.01, 0.1, 0.3, 0.8)
        ]
        thresholds = [cal.threshold() for cal in some]
        assert all((a <= b).all() for a, b in pairwise(thresholds))
        assert (thresholds[0] < thresholds[-1]).all()
        gates = [cal.gate(logits) for cal in some]
        assert all((b <= a).all() for a, b in pairwise(gates))


def test_void_pixels_influence_nothing() -> None:
    logits = torch.randn(2, 3, 9, 9, generator=seeded(0))
    labels = torch.randint(3, (2, 9, 9), generator=seeded(1))
    wide = torch.full((2, 3, 14, 11), math.nan)
    wide[..., :9, :9] = logits
    padded = torch.full((2, 14, 11), 255)
    padded[:, :9, :9] = labels
    for per_class in (False, True):
        plain, other = (OnlineThreshold(3, per_class=per_class, stride=2) for _ in range(2))
        plain.update(logits, labels)
        other.update(wide, padded.to(torch.uint8))
        assert same(plain.state_dict()["weights"], other.state_dict()["weights"])
        before = other.state_dict()["weights"]
        other.update(wide, torch.full_like(padded, 255))  # nothing labelled: nothing fades
        assert same(other.state_dict()["weights"], before)


def test_the_void_value_is_free() -> None:
    logits, labels = batch([3, 4, 5, 6, 7], labels=[0, 1, 0, -1, 1])
    other = labels.masked_fill(labels == -1, 254)
    weights = build(ignore_index=-1).update(logits, labels).state_dict()["weights"]
    assert weights.sum() == 4 * UNIT
    assert same(build(ignore_index=254).update(logits, other).state_dict()["weights"], weights)


def test_it_follows_a_change_and_without_decay_it_lags() -> None:
    early, late = batch([2] * 50 + [4] * 50), batch([7] * 50 + [9] * 50)
    forgets, remembers = build(decay=0.9), build(decay=1)
    for cal in (forgets, remembers):
        for _ in range(60):
            cal.update(*early)
        assert covered(cal) == set(range(2, 10))
        for _ in range(60):
            cal.update(*late)
    assert covered(forgets) == {7, 8, 9}
    assert covered(remembers) == set(range(2, 10))


def test_weights_fade_to_nothing() -> None:
    cal = build(decay=0.5).update(*batch([0] * 100))
    for _ in range(30):
        cal.update(*batch([9]))
    weights = cal.state_dict()["weights"]
    assert (weights > 0).sum() == 1, "no weight stays behind, however small"
    assert torch.equal(weights, weights.floor())


# --- per class ---------------------------------------------------------------------------------


def test_every_class_has_its_own_pixels() -> None:
    logits = 2 * torch.randn(2, 4, 20, 20, generator=seeded(0))
    labels = torch.randint(3, (2, 20, 20), generator=seeded(1))  # none of class 3
    cal = OnlineThreshold(4, alpha=0.2, per_class=True, stride=1).update(logits, labels)
    found = cal.threshold()
    assert found.shape == (4,)
    assert found[3] == 0, "no pixel of the class: its pixels are kept"
    for k in range(3):
        own = torch.where(labels == k, labels, 255)
        alone = OnlineThreshold(4, alpha=0.2, stride=1).update(logits, own)
        assert same(found[k], alone.threshold())
    confidence, best = logits.softmax(1).max(1)
    assert torch.equal(cal.gate(logits), confidence >= found[best])


def test_a_class_that_does_not_appear_keeps_its_scores() -> None:
    cal = OnlineThreshold(2, alpha=0.25, per_class=True, stride=1, decay=0.5)
    cal.update(*batch([1] * 20 + [9] * 20, labels=[1] * 20 + [0] * 20))
    first = cal.threshold()
    assert (first > 0.5).all()
    for _ in range(40):
        cal.update(*batch([6] * 20, labels=[0] * 20))
    later = cal.threshold()
    assert later[1] == first[1]
    assert later[0] < first[0]


def test_equal_classes_count_as_the_first() -> None:
    cal = OnlineThreshold(2, alpha=0.25, per_class=True, stride=1)
    cal.update(*batch([9] * 20, labels=[0] * 20))
    assert cal.threshold()[0] > 0.9
    assert cal.threshold()[1] == 0
    assert not cal.gate(torch.zeros(1, 2, 1, 1)).any()


# --- what a training loop does -----------------------------------------------------------------


def test_stride_takes_every_so_many_rows_and_columns() -> None:
    logits = torch.randn(2, 3, 11, 14, generator=seeded(0))
    labels = torch.randint(3, (2, 11, 14), generator=seeded(1))
    for stride in (1, 2, 4, 50):
        strided = OnlineThreshold(3, stride=stride).update(logits, labels)
        cut = logits[..., ::stride, ::stride], labels[:, ::stride, ::stride]
        whole = OnlineThreshold(3, stride=1).update(*cut)
        assert same(strided.state_dict()["weights"], whole.state_dict()["weights"])
        assert strided.gate(logits).shape == (2, 11, 14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_width_is_scored_in_float32(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(1, 4, 12, 12, generator=seeded(0))).to(dtype)
    labels = torch.randint(4, (1, 12, 12), generator=seeded(1)).to(torch.uint8)
    cal, full = (OnlineThreshold(4, stride=1) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cal.update(logits, labels)
        gate = cal.gate(logits)
    full.update(logits.float(), labels)
    assert same(cal.threshold(), full.threshold())
    assert torch.equal(gate, full.gate(logits.float()))


def test_no_gradient_flows_and_nothing_is_changed() -> None:
    logits = torch.randn(1, 3, 8, 8, generator=seeded(0)).requires_grad_()
    labels = torch.randint(3, (1, 8, 8), generator=seeded(1))
    copies = logits.detach().clone(), labels.clone()
    cal = OnlineThreshold(3)
    assert cal.update(logits, labels) is cal
    assert not cal.threshold().requires_grad
    assert not cal.gate(logits).requires_grad
    assert torch.equal(logits, copies[0])
    assert torch.equal(labels, copies[1])
    (logits.sum() * cal.threshold()).backward()
    assert logits.grad is not None


def test_one_image_without_a_batch_axis() -> None:
    logits = torch.randn(2, 3, 8, 9, generator=seeded(0))
    labels = torch.randint(3, (2, 8, 9), generator=seeded(1))
    both = OnlineThreshold(3, decay=1).update(logits, labels)
    each = OnlineThreshold(3, decay=1).update(logits[0], labels[0]).update(logits[1], labels[1])
    assert same(both.threshold(), each.threshold())
    assert torch.equal(both.gate(logits)[1], both.gate(logits[1]))


def test_layouts_of_memory_do_not_matter() -> None:
    logits = torch.randn(2, 3, 8, 9, generator=seeded(0))
    labels = torch.randint(3, (2, 8, 9), generator=seeded(1))
    other = logits.to(memory_format=torch.channels_last)
    plain, last = (OnlineThreshold(3).update(x, labels) for x in (logits, other))
    assert same(plain.threshold(), last.threshold())
    assert torch.equal(plain.gate(logits), plain.gate(other))


@pytest.mark.parametrize("per_class", [False, True])
def test_a_checkpoint_goes_on_to_the_bit(per_class: bool) -> None:
    def some(step: int) -> tuple[Tensor, Tensor]:
        logits = torch.randn(1, 3, 16, 16, generator=seeded(step))
        return logits, torch.randint(3, (1, 16, 16), generator=seeded(step + 100))

    def start() -> OnlineThreshold:
        return OnlineThreshold(3, alpha=0.2, per_class=per_class, decay=0.9)

    whole = start()
    for step in range(8):
        whole.update(*some(step))
        if step == 4:
            file = io.BytesIO()
            torch.save({"epoch": 4, "cal": whole.state_dict()}, file)
    file.seek(0)
    resumed = start()
    resumed.update(*some(77))  # what was there is replaced
    resumed.load_state_dict(torch.load(file, weights_only=True)["cal"])
    for step in range(5, 8):
        resumed.update(*some(step))
    assert same(resumed.threshold(), whole.threshold())
    assert same(resumed.state_dict()["weights"], whole.state_dict()["weights"])


def test_a_state_is_a_copy() -> None:
    cal = build().update(*batch([1] * 30))
    before = cal.threshold()
    cal.state_dict()["weights"].zero_()
    assert same(cal.threshold(), before)
    state = cal.state_dict()
    other = build()
    other.load_state_dict(state)
    state["weights"].zero_()
    assert same(other.threshold(), before)


# --- compiled, and as on an accelerator --------------------------------------------------------

modern = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_compiling"), reason="torch.compile before 2.3 traces less"
)


@modern
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("per_class", [False, True])
def test_it_traces_whole(backend: str, per_class: bool) -> None:
    torch._dynamo.reset()
    plain, traced = (OnlineThreshold(3, alpha=0.2, per_class=per_class) for _ in range(2))

    @torch.compile(fullgraph=True, backend=backend)
    def step(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return traced.update(logits, labels).threshold(), traced.gate(logits)

    for seed in range(3):
        logits = torch.randn(2, 3, 16, 16, generator=seeded(seed))
        labels = torch.randint(3, (2, 16, 16), generator=seeded(seed + 9))
        labels[:, :8] = 255
        threshold, gate = step(logits, labels)
        assert same(threshold, plain.update(logits, labels).threshold())
        assert torch.equal(gate, plain.gate(logits))


@modern
@pytest.mark.parametrize("what", ["label", "NaN"])
def test_where_no_look_is_taken_a_bad_batch_shows_as_nan(what: str) -> None:
    torch._dynamo.reset()
    cal = build()
    logits, labels = batch([5] * 30)
    if what == "label":
        labels[..., 3] = 2
    else:
        logits[..., 3] = math.nan
    torch.compile(cal.update, fullgraph=True, backend="eager")(logits, labels)
    cal.update(*batch([5] * 30))
    assert cal.threshold().isnan()
    assert not cal.gate(logits).any()


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (TypeError, {"num_classes": 2.0}, "num_classes as int, got 2.0; pass the number of"),
        (TypeError, {"num_classes": True}, "num_classes as int, got True"),
        (ValueError, {"num_classes": 1}, "num_classes of at least 2, got 1; add a channel"),
        (ValueError, {"alpha": 0}, r"alpha in \(0, 1\), got 0; pass a rate such as 0.05"),
        (ValueError, {"alpha": 1 / 3}, "alpha of at most 9 decimals, got 0.3333333333333333; rou"),
        (ValueError, {"decay": 0}, r"decay in \(0, 1\], got 0; pass 0.99, or 1 to weight all"),
        (ValueError, {"decay": 1.1}, "got 1.1"),
        (ValueError, {"decay": math.nan}, "got nan"),
        (ValueError, {"stride": 0}, "stride of at least 1, got 0; pass 4, or 1 for every pixel"),
        (TypeError, {"stride": 2.0}, "stride as int, got 2.0"),
        (ValueError, {"ignore_index": 2}, "an ignore_index outside the classes 0..2, got 2"),
    ],
)
def test_what_cannot_be_built(kind: type[Exception], options: dict[str, Any], match: str) -> None:
    with raises(kind, "OnlineThreshold", match):
        OnlineThreshold(**{"num_classes": 3, **options})


def test_what_update_and_gate_refuse() -> None:
    cal = build()
    logits, labels = batch([5] * 30)
    before = cal.update(logits, labels).state_dict()["weights"]
    where = "OnlineThreshold.update"
    with raises(
        ValueError, where, r"logits of 2 classes, got \[1, 3, 1, 30\]; build the object for"
    ):
        cal.update(torch.zeros(1, 3, 1, 30), labels)
    with raises(ValueError, where, r"labels \[1, 1, 30\] .*, got \[1, 1, 29\]; resize"):
        cal.update(logits, labels[..., 1:])
    with raises(TypeError, where, "integer labels, got torch.float32"):
        cal.update(logits, labels.float())
    with raises(TypeError, where, "floating-point logits, got torch.int64"):
        cal.update(logits.long(), labels)
    with raises(ValueError, where, r"labels in 0..1 or 255 \(ignore_index\), got 254; map"):
        cal.update(logits, labels + 254)
    with raises(ValueError, where, "finite logits at labelled pixels, got NaN; look for the step"):
        cal.update(logits * math.nan, labels)
    with raises(ValueError, "OnlineThreshold.gate", r"logits of 2 classes, got \[3, 4, 4\]"):
        cal.gate(torch.zeros(3, 4, 4))
    with raises(ValueError, "OnlineThreshold.gate", "at least one element in logits"):
        cal.gate(torch.zeros(0, 2, 4, 4))
    assert same(cal.state_dict()["weights"], before)


def test_what_cannot_be_loaded() -> None:
    where = "OnlineThreshold.load_state_dict"
    cal = build()
    with raises(ValueError, where, r"'weights' as a tensor, got keys \['model'\]; pass the result"):
        cal.load_state_dict({"model": torch.zeros(2)})
    with raises(
        ValueError, where, r"weights \[1, \d+\], got \[2, \d+\]; build the object as it was"
    ):
        cal.load_state_dict(build(per_class=True).state_dict())


# --- ranks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    running = [
        subprocess.Popen(
            [sys.executable, online_ranks.__file__, str(folder)],
            env={**os.environ, "RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank, process in enumerate(running):
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, f"rank {rank}: {errors}"
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("per_class", [False, True])
def test_ranks_hold_what_one_process_would(said: list[dict[str, Any]], per_class: bool) -> None:
    whole = fresh(per_class)
    rows = []
    for step in range(6):
        parts = shares(step)[:1] if step == 4 else shares(step)
        logits, labels = (torch.cat(some) for some in zip(*parts, strict=True))
        rows.append(whole.update(logits, labels).threshold())
    assert len({float(row.max()) for row in rows}) > 3
    for result in said:
        assert same(result[f"thresholds {per_class}"], torch.stack(rows))
        assert same(result[f"weights {per_class}"], whole.state_dict()["weights"])


def test_updates_between_two_syncs_are_refused(said: list[dict[str, Any]]) -> None:
    for result in said:
        assert result["late"] == (
            "OnlineThreshold.sync: expected one update between two calls, got 2 updates; "
            "call it after every update"
        )


def test_an_update_too_many_on_one_rank_is_said_by_both(said: list[dict[str, Any]]) -> None:
    for result in said:
        assert result["late on one"] == said[0]["late"]


@pytest.mark.parametrize("name", online_ranks.UNLIKE)
def test_other_settings_on_a_rank_are_said_by_both(said: list[dict[str, Any]], name: str) -> None:
    first, second = online_ranks.UNLIKE[name]
    if name == "alpha":
        first, second = "3/10", "1/5"
    for result in said:
        assert result[f"unlike {name}"] == (
            f"OnlineThreshold.sync: expected the same {name} on all ranks, "
            f"got {first} and {second}; build all alike"
        )


def test_without_a_process_group_sync_does_nothing() -> None:
    cal = build().update(*batch([1, 2, 3] * 9)).update(*batch([4] * 9))
    before = cal.threshold()
    assert cal.sync().sync() is cal
    assert same(cal.threshold(), before)
