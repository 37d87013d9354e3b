"""Random calls of every public function, right and wrong, whose outcome must be one of two.

A call returns, and agrees with an oracle of loops where there is one; or it raises ValueError or
TypeError in one line. ``run(seed, number)`` makes one call, the same every time;
``python tests/support/fuzz.py SEED NUMBER`` shows one, ``python tests/support/fuzz.py SEED FIRST
CALLS`` makes many. A new public name needs an entry in ``GENERATORS``.
"""

from __future__ import annotations

import copy
import math
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import cpseg
import cpseg.testing
from cpseg import groups
from cpseg.files import Pair

if __name__ == "__main__":  # as a script: its folder is on the path
    import oracles
else:
    from tests.support import oracles

SECONDS = 5.0  # the longest that a call may take
ALLOWED = (ValueError, TypeError)
NO_DRIVER = "Found no NVIDIA driver"  # what a CUDA build of torch says of a CUDA device
FLOATS = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int64, torch.uint8, torch.int16, torch.int32)
ODD_DTYPES = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.bool,
    torch.int8,
    torch.int64,
    torch.float16,
    torch.float64,
)


class Call(NamedTuple):
    """A call that is about to be made.

    Attributes:
        function: what is called.
        arguments: by position.
        options: by name.
        oracle: fails if the result is wrong; only for arguments that nothing has spoilt.
        after: goes on with the result, a method of it for instance.
    """

    function: Callable[..., Any]
    arguments: list[Any]
    options: dict[str, Any]
    oracle: Callable[[Any], None] | None = None
    after: Callable[[Any], Any] | None = None


class Draw:
    """Random tensors and numbers."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = np.random.default_rng((seed, number))

    def chance(self, p: float) -> bool:
        return bool(self.random.random() < p)

    def whole(self, low: int, high: int) -> int:
        """In low..high."""
        return int(self.random.integers(low, high + 1))

    def of(self, *choices: Any) -> Any:
        return choices[self.whole(0, len(choices) - 1)]

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.whole(0, 2**31))

    def layout(self, tensor: Tensor) -> Tensor:
        """The same values, laid out in another way."""
        kind = self.whole(0, 5)
        if kind == 1 and tensor.ndim == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        if kind == 2 and tensor.ndim:
            return tensor.flip(-1).contiguous().flip(-1)
        if kind == 3 and tensor.ndim > 1:
            return tensor.mT.contiguous().mT
        if kind == 4 and tensor.ndim:
            return torch.stack([tensor, tensor], -1)[..., 0]
        if kind == 5 and tensor.ndim and tensor.shape[0] > 0:
            return tensor[:1].expand(tensor.shape) if self.chance(0.3) else tensor
        return tensor

    def values(self, *size: int, kind: str = "unit", dtype: torch.dtype | None = None) -> Tensor:
        """Floats: in [0, 1] with ties, exact ends and neighbours; or logits."""
        dtype = dtype or self.of(*FLOATS)
        if kind == "logits":
            found = self.random.normal(0, self.of(0.1, 3, 30), size)
        else:
            found = self.random.random(size)
            if self.chance(0.4):
                found = np.round(found * self.of(1, 2, 4, 255)) / self.of(1, 2, 4, 255)
                found = np.clip(found, 0, 1)
        return self.layout(torch.as_tensor(found).to(dtype))

    def labels(self, *size: int, classes: int, ignore: int = 255, void: float = 0.2) -> Tensor:
        found = self.random.integers(0, classes, size)
        found = np.where(self.random.random(size) < void, ignore, found)
        fits = [d for d in INTEGERS if torch.iinfo(d).min <= ignore <= torch.iinfo(d).max]
        fits = [d for d in fits if torch.iinfo(d).max >= classes]
        return self.layout(torch.as_tensor(found).to(self.of(*fits)))

    def masks(self, *size: int) -> Tensor:
        return self.layout(torch.as_tensor(self.random.random(size) < self.of(0.1, 0.5, 0.9)))

    def size(self) -> tuple[int, int]:
        return self.whole(1, 5), self.whole(1, 6)

    def problem(self) -> tuple[Tensor, Tensor, int, int]:
        """Probabilities and labels, with and without a batch; K and the label of void."""
        classes = self.of(2, 3, 5, 21) if self.chance(0.97) else self.of(256, 300, 40_000)
        shape = (classes, *((1, 2) if classes > 999 else self.size()))
        ignore = self.of(-1, 255) if classes < 255 else -1
        batch = (self.whole(1, 3),) if self.chance(0.6) else ()
        probs = self.values(*batch, *shape)
        return (
            probs,
            self.labels(*batch, *shape[1:], classes=classes, ignore=ignore),
            classes,
            ignore,
        )

    def threshold(self, probs: Tensor) -> Any:
        kind = self.whole(0, 3)
        if kind == 0:
            return self.of(0, 1, 0.5, math.inf, -math.inf, math.nan, float(self.random.random()))
        size = {1: (), 2: probs.shape[-2:], 3: probs.shape[-3:]}[kind]
        found = self.values(*size, dtype=torch.float32)
        return found.masked_fill(torch.as_tensor(self.random.random(size) < 0.1), math.inf)

    def alpha(self) -> Any:
        return self.of(0.05, 0.1, "0.25", Fraction(1, 7), 0.5, 0.9, "1e-3", 1e-12, "1e-200")

    def nothing(self) -> Any:
        """Something that hardly any argument may be."""
        odd = self.of(*ODD_DTYPES)
        made: Callable[[], Any] = self.of(
            lambda: None,
            lambda: "x",
            lambda: "1e-20000000",
            lambda: self.of(True, False),
            lambda: self.of(0, 1, 2, 255, -1, 2**31, -(2**63), 2**63, 10**30, 10**400, -(10**400)),
            lambda: self.of(0.0, 254.5, -0.5, 1e38, 1e300, math.nan, math.inf, -math.inf),
            lambda: self.of(1j, b"x", [], {}, (), [0.5], object(), int, math.floor, {1, 2}),
            lambda: self.of(np.float32(0.5), np.int64(3), np.zeros(3), np.nan),
            lambda: torch.rand(()),
            lambda: torch.rand(0),
            lambda: torch.zeros(2, 0, 4, 5),
            lambda: torch.rand(1, 2, 3, 4, 5),
            lambda: torch.rand(2, 3, 4, 5, device="meta"),
            lambda: torch.rand(2, 3, 4).to_sparse(),
            lambda: torch.zeros(2, 3, 4, 5, dtype=torch.float32).to(odd),
            lambda: torch.Generator(),
            lambda: self.of(torch.float32, torch.qint8, torch.int64),
            lambda: Fraction(1, 3),
        )
        return made()

    def spoil(self, value: Any) -> Any:
        """Another value, often one that is only slightly wrong."""
        if not isinstance(value, Tensor) or value.layout != torch.strided or self.chance(0.3):
            return self.nothing()
        kind = self.whole(0, 9)
        if kind == 0:
            return value.to("meta")
        if kind == 1:
            return value.to(self.of(*ODD_DTYPES))
        if kind == 2:
            return value[..., :0] if value.ndim else value.reshape(1)
        if kind == 3:
            return value[0] if value.ndim and len(value) else value.unsqueeze(0)
        if kind == 4:
            return value.unsqueeze(self.whole(0, value.ndim))
        if kind == 5:
            return value[..., 1:] if value.ndim else value
        if kind == 6:
            usual = (
                value.ndim and value.dtype in (*FLOATS, *INTEGERS) and value.device.type == "cpu"
            )
            return value.to_sparse() if usual and value.layout == torch.strided else value
        if kind == 7 and value.is_floating_point() and value.dtype in FLOATS:
            return value.detach().clone().requires_grad_()
        if value.device.type != "cpu" or value.layout != torch.strided:
            return self.nothing()
        if value.numel() and value.dtype in (*FLOATS, *INTEGERS):
            changed = value.clone().contiguous()
            pool: tuple[Any, ...] = (math.nan, math.inf, -math.inf, -0.0, -1.0, 2.0, 1e38, -1e38)
            if not value.is_floating_point():
                info = torch.iinfo(value.dtype)
                pool = (info.min, info.max, 254, 7, -1 if info.min < 0 else 3)
            limit = 6e4 if value.dtype == torch.float16 else math.inf
            bad = self.of(*pool)
            if value.is_floating_point() and math.isfinite(bad):
                bad = max(-limit, min(limit, bad))
            if not value.is_floating_point():
                bad = max(torch.iinfo(value.dtype).min, min(torch.iinfo(value.dtype).max, bad))
            changed.view(-1)[self.whole(0, value.numel() - 1)] = bad
            return changed
        return self.nothing()


# --- what a result must be -----------------------------------------------------------------------


def numbers(tensor: Tensor) -> np.ndarray[Any, Any]:
    """As float64 or int64, which hold what is compared here exactly."""
    wide = torch.float64 if tensor.is_floating_point() else torch.int64
    return np.asarray(tensor.detach().to(wide).numpy())


def expect(found: Tensor, wanted: Any, tolerance: float = 0.0) -> None:
    """Equal, NaN to NaN; or nearly."""
    left, right = numbers(found).astype(np.float64), np.asarray(wanted, dtype=np.float64)
    assert left.shape == right.shape, f"shape {left.shape}, the oracle says {right.shape}"
    if tolerance:
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance, equal_nan=True)
    else:
        np.testing.assert_array_equal(left, right)


def each(probs: Tensor) -> list[np.ndarray[Any, Any]]:
    """The images of a batch, or the one, as float32 where they are no wider."""
    batch = probs.detach() if probs.ndim == 4 else probs.detach().unsqueeze(0)
    return [image.to(torch.float64).numpy() for image in batch]


def shaped(maps: list[Any], like: Tensor) -> Any:
    return np.stack(maps) if like.ndim == 4 else maps[0]


def within(low: float, high: float, *, nan: bool = False) -> Callable[[Any], None]:
    """Every value of a tensor or number lies there."""

    def check(found: Any) -> None:
        values = numbers(found) if isinstance(found, Tensor) else np.asarray(float(found))
        if nan:
            values = values[~np.isnan(values)]
        assert ((values >= low) & (values <= high)).all(), f"{values} outside {low}..{high}"

    return check


def lac_of(probs: Tensor, labels: Tensor, ignore: int) -> Any:
    maps = zip(each(probs), labels.reshape(-1, *labels.shape[-2:]), strict=True)
    return shaped([oracles.score_map(p, y.numpy(), ignore) for p, y in maps], probs)


def thresholds(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(value.numpy() if isinstance(value, Tensor) else value, dtype=np.float32)


def sigmoid(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.exp(-np.logaddexp(0, -z))


def focal_of(logits: Tensor, targets: Tensor, unsure: Tensor | None, ignore: int) -> list[float]:
    """Per sample, from the definition, for binary masks, balance 0.25 and gamma 2."""
    result = []
    for i, z in enumerate(numbers(logits)[:, 0]):
        y = numbers(targets)[i].reshape(z.shape)
        c = 1 - (numbers(unsure)[i].reshape(z.shape) if unsure is not None else np.zeros(z.shape))
        total, valid = 0.0, 0
        for index in np.ndindex(*z.shape):
            if y[index] == ignore:
                continue
            sign = 1 if y[index] == 1 else -1
            p = float(sigmoid(np.float64(sign * z[index])))
            weight = 0.25 if y[index] == 1 else 0.75
            total += c[index] * weight * (1 - p) ** 2 * np.logaddexp(0, -sign * z[index])
            valid += 1
        result.append(total / max(1, valid))
    return result


def dice_of(logits: Tensor, targets: Tensor, unsure: Tensor | None, ignore: int) -> list[float]:
    result = []
    for i, z in enumerate(numbers(logits)[:, 0]):
        y = numbers(targets)[i].reshape(z.shape)
        kept = y != ignore
        if unsure is not None:
            rest = 1 - unsure[i].to(
                logits.dtype if logits.dtype == torch.float64 else torch.float32
            )
            kept &= (rest > 0.6).numpy().reshape(z.shape)
        p, y = sigmoid(z)[kept], y[kept]
        result.append(1 - (2 * (y * p).sum() + 1) / ((y + p).sum() + 1) if kept.any() else 0.0)
    return result


# --- one call of each name -----------------------------------------------------------------------


def scored(draw: Draw) -> dict[str, Any]:
    """Options of a score; LAC mostly."""
    if draw.chance(0.6):
        return {}
    score = draw.of("lac", "aps", "raps", "margin", "raps:0.1:2", "raps:0:0", "raps:9:99", "none")
    options: dict[str, Any] = {"score": score}
    if draw.chance(0.3):
        options["generator"] = draw.generator()
    return options


def nonconformity(draw: Draw) -> Call:
    probs, labels, _, ignore = draw.problem()
    options = scored(draw)

    def oracle(found: Tensor) -> None:
        assert found.dtype == torch.float32
        if options.get("score", "lac") == "lac":
            expect(found, lac_of(probs, labels, ignore))
        else:
            void = labels.to(torch.int64) == ignore
            assert torch.equal(found.isnan(), void)

    return Call(cpseg.nonconformity, [probs, labels], {"ignore_index": ignore, **options}, oracle)


def nonconformity_map(draw: Draw) -> Call:
    probs, _, _, _ = draw.problem()
    options = scored(draw)

    def oracle(found: Tensor) -> None:
        assert found.dtype == torch.float32
        assert found.shape == probs.shape
        if options.get("score", "lac") == "lac":
            expect(found, np.float32(1) - numbers(probs).astype(np.float32))

    return Call(draw.of(cpseg.nonconformity_map, cpseg.class_scores), [probs], options, oracle)


def conformal_rank(draw: Draw) -> Call:
    n, alpha = draw.of(0, 1, 19, 20, draw.whole(0, 5000), 10**20), draw.alpha()

    def oracle(found: int) -> None:
        exact = Fraction(str(alpha))
        assert found == math.ceil((n + 1) * (1 - exact))

    return Call(cpseg.conformal_rank, [n, alpha], {}, oracle)


def conformal_quantile(draw: Draw) -> Call:
    size = [draw.whole(1, 30), *(draw.whole(1, 3) for _ in range(draw.whole(0, 2)))]
    scores, alpha = draw.values(*size), draw.alpha()
    void = torch.as_tensor(draw.random.random(size) < draw.of(0, 0.3, 1))
    scores = scores.masked_fill(void, math.nan)
    dim = draw.whole(-len(size), len(size) - 1)
    options: dict[str, Any] = {} if draw.chance(0.8) else {"rule": draw.of("linear", "conformal")}

    def oracle(found: Tensor) -> None:
        if options.get("rule") == "linear":
            return within(0, 1, nan=True)(found)
        moved = np.moveaxis(numbers(scores), dim, 0)
        flat = moved.reshape(len(moved), -1)
        wanted = []
        for column in flat.T:
            ordered = sorted(v for v in column if not math.isnan(v))
            place = math.ceil((len(ordered) + 1) * (1 - Fraction(str(alpha))))
            wanted.append(math.inf if place > len(ordered) else ordered[place - 1])
        return expect(found, np.reshape(wanted, moved.shape[1:]))

    return Call(cpseg.conformal_quantile, [scores, alpha], {"dim": dim, **options}, oracle)


def background_of(draw: Draw, classes: int) -> int | None:
    return None if draw.chance(0.4) else draw.whole(0, classes - 1)


def prediction_set(draw: Draw) -> Call:
    probs, _, _, _ = draw.problem()
    threshold, options = draw.threshold(probs), scored(draw)

    def oracle(found: Tensor) -> None:
        assert found.dtype == torch.bool
        assert found.shape == probs.shape
        if options.get("score", "lac") == "lac" and probs.shape[-3] < 999:
            maps = [oracles.sets(image, thresholds(threshold)) for image in each(probs)]
            expect(found, shaped(maps, probs))

    return Call(cpseg.prediction_set, [probs, threshold], options, oracle)


def pseudo_labels(draw: Draw) -> Call:
    probs, _, classes, ignore = draw.problem()
    threshold, background = draw.threshold(probs), background_of(draw, classes)
    options: dict[str, Any] = {"background": background, "ignore_index": ignore}
    if draw.chance(0.3):
        options["dtype"] = draw.of(torch.uint8, torch.int16, torch.int32, torch.float32)

    def oracle(found: Tensor) -> None:
        assert found.dtype == options.get("dtype", torch.int64)
        if classes < 999:
            limits = thresholds(threshold)
            maps = [oracles.select(p, limits, background, ignore) for p in each(probs)]
            expect(found, shaped(maps, probs))

    return Call(cpseg.pseudo_labels, [probs, threshold], options, oracle)


def evidence(draw: Draw) -> Call:
    probs, labels, classes, ignore = draw.problem()
    background = background_of(draw, classes)

    def oracle(found: cpseg.Evidence) -> None:
        others = probs.detach().to(torch.float64).clone()
        if background is not None:
            others.select(-3, background).fill_(-1)
            assert found.background_score is not None
            expect(found.background_score, numbers(probs.select(-3, background)))
        expect(found.best, others.amax(-3).numpy())
        expect(found.best_class, np.argmax(others.numpy(), -3))

    def after(found: cpseg.Evidence) -> Any:
        if draw.chance(0.3):
            return found.score_of(*odd(draw, labels), **odd_options(draw, ignore_index=ignore))
        if draw.chance(0.3):
            return found.argmax()
        threshold = draw.threshold(probs)
        return found.pseudo_labels(*odd(draw, threshold), **odd_options(draw, ignore_index=ignore))

    return Call(cpseg.evidence, [probs], {"background": background}, oracle, after)


def odd(draw: Draw, *values: Any) -> list[Any]:
    return [draw.spoil(value) if draw.chance(0.2) else value for value in values]


def odd_options(draw: Draw, **values: Any) -> dict[str, Any]:
    return {name: odd(draw, value)[0] for name, value in values.items()}


def make_evidence(draw: Draw) -> Call:
    values = draw.values(2, 3)
    found = [values, torch.zeros(2, 3, dtype=torch.uint8), draw.of(None, values), None, 2]
    return Call(cpseg.Evidence, found, {})


def label_pair(draw: Draw) -> tuple[Tensor, Tensor, int, int]:
    classes = draw.of(1, 2, 3, 21)
    ignore = draw.of(-1, 255)
    size = (draw.whole(1, 2), *draw.size()) if draw.chance(0.6) else draw.size()
    one, other = (draw.labels(*size, classes=classes, ignore=ignore) for _ in range(2))
    return one, other, classes, ignore


def confusion_matrix(draw: Draw) -> Call:
    guess, truth, classes, ignore = label_pair(draw)
    whole = draw.chance(0.5)
    options = {"num_classes": classes, "ignore_index": ignore, "with_ignored": whole}

    def oracle(found: Tensor) -> None:
        wanted = oracles.confusion(numbers(guess), numbers(truth), classes, ignore)
        expect(found, wanted if whole else wanted[:, :classes])

    return Call(cpseg.confusion_matrix, [guess, truth], options, oracle)


def mean_iou(draw: Draw) -> Call:
    guess, truth, classes, ignore = label_pair(draw)
    matrix = oracles.confusion(numbers(guess), numbers(truth), classes, ignore)
    per_class, whole = draw.chance(0.5), draw.chance(0.5)
    matrix = torch.as_tensor(matrix if whole else matrix[:, :classes]).to(draw.of(*INTEGERS))

    def oracle(found: Tensor) -> None:
        pair = numbers(guess), numbers(truth)
        wanted = oracles.iou(*pair, classes, ignore, with_ignored=whole)
        expect(found, wanted if per_class else oracles.mean(wanted), 1e-12)

    return Call(cpseg.mean_iou, [matrix], {"per_class": per_class}, oracle)


def boundary_iou(draw: Draw) -> Call:
    guess, truth, classes, ignore = label_pair(draw)
    ratio = draw.of(0.0, 0.02, 0.1, 0.3, 1)
    options = {"num_classes": classes, "ignore_index": ignore, "dilation_ratio": ratio}
    options["per_class"] = True

    def oracle(found: Tensor) -> None:
        maps = [numbers(m).reshape(-1, *m.shape[-2:]) for m in (guess, truth)]
        expect(found, oracles.boundary_iou(*maps, classes, ignore, ratio), 1e-12)

    return Call(cpseg.boundary_iou, [guess, truth], options, oracle)


def interactive_iou(draw: Draw) -> Call:
    size = (draw.whole(1, 2), *draw.size())
    rounds, targets = draw.masks(draw.whole(1, 3), *size), draw.masks(*size)

    def oracle(found: Any) -> None:
        wanted = []
        for masks in rounds.numpy():
            pairs = zip(masks, targets.numpy(), strict=True)
            shares = [
                (a & b).sum() / (a | b).sum() if (a | b).any() else math.nan for a, b in pairs
            ]
            wanted.append(oracles.mean(shares))
        expect(found.iou, wanted, 1e-12)

    options = {"dilation_ratio": draw.of(0.02, 0.2, 1)}
    return Call(cpseg.interactive_iou, [rounds, targets], options, oracle)


def coverage(draw: Draw) -> Call:
    probs, labels, _, ignore = draw.problem()
    sets = probs > 0.5

    def oracle(found: Tensor) -> None:
        batch = sets if sets.ndim == 4 else sets[None]
        inside = total = 0
        for one, truth in zip(batch, labels.reshape(-1, *labels.shape[-2:]), strict=True):
            for i, j in np.ndindex(*truth.shape):
                if int(truth[i, j]) != ignore:
                    total += 1
                    inside += bool(one[int(truth[i, j]), i, j])
        expect(found, inside / total if total else math.nan, 1e-12)

    return Call(cpseg.coverage, [sets, labels], {"ignore_index": ignore}, oracle)


def set_size(draw: Draw) -> Call:
    sets = draw.problem()[0] > 0.5

    def oracle(found: Tensor) -> None:
        expect(found, sets.numpy().sum() / (sets.numel() / sets.shape[-3]), 1e-12)

    return Call(cpseg.set_size, [sets], {}, oracle)


def kept_share(draw: Draw) -> Call:
    labels, _, _, ignore = label_pair(draw)

    def oracle(found: Tensor) -> None:
        expect(found, (numbers(labels) != ignore).mean(), 1e-12)

    return Call(cpseg.kept_share, [labels], {"ignore_index": ignore}, oracle)


def loss_arguments(draw: Draw) -> tuple[Tensor, Tensor, dict[str, Any], bool]:
    batch, size = draw.whole(1, 3), draw.size()
    classes = draw.of(1, 1, 1, 2, 4)
    logits = draw.values(batch, classes, *size, kind="logits")
    ignore = draw.of(-1, 255)
    axis = (1,) if draw.chance(0.3) else ()
    targets = draw.labels(batch, *axis, *size, classes=max(2, classes), ignore=ignore)
    if classes == 1 and draw.chance(0.4):
        targets = targets.to(draw.of(*FLOATS))
    options: dict[str, Any] = {"ignore_index": ignore, "reduction": "none"}
    if draw.chance(0.5):
        options["uncertainty"] = draw.values(batch, *axis, *size)
    if draw.chance(0.5):
        logits = logits.detach().requires_grad_()
    return logits, targets, options, classes == 1


def backward(found: Any) -> Any:
    """The gradient must be there and finite."""
    if isinstance(found, Tensor) and found.requires_grad and bool(found.isfinite().all()):
        found.sum().backward()
    return found


def loss(name: str) -> Callable[[Draw], Call]:
    def make(draw: Draw) -> Call:
        logits, targets, options, binary = loss_arguments(draw)
        unsure, ignore = options.get("uncertainty"), options["ignore_index"]

        def oracle(found: Tensor) -> None:
            assert bool(found.isfinite().all())
            within(-1e-6, math.inf)(found)
            if binary:
                focal = np.array(focal_of(logits, targets, unsure, ignore))
                dice = np.array(dice_of(logits, targets, unsure, ignore))
                wanted = {"focal_loss": focal, "dice_loss": dice, "sum_loss": 20 * focal + dice}
                expect(found, wanted[name], 2e-5)

        return Call(getattr(cpseg, name), [logits, targets], options, oracle, backward)

    return make


def pseudo_label_loss(draw: Draw) -> Call:
    classes, batch, size = draw.of(2, 4), draw.whole(1, 2), draw.size()
    logits = draw.values(batch, classes, *size, kind="logits")
    labels = draw.labels(batch, *size, classes=classes)
    options: dict[str, Any] = {}
    if draw.chance(0.4):
        options["valid"] = draw.masks(batch, *size)
    if draw.chance(0.4):
        options["certainty"] = draw.values(batch, *size)
    if draw.chance(0.4):
        options["normalize"] = draw.of("kept", "valid")

    def oracle(found: Tensor) -> None:
        z = numbers(logits)
        log_p = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))
        log_p -= z.max(1, keepdims=True)
        total, kept, valid = 0.0, 0, 0
        for b, i, j in np.ndindex(*labels.shape):
            here = "valid" not in options or bool(options["valid"][b, i, j])
            valid += here
            if here and int(labels[b, i, j]) != 255:
                kept += 1
                weight = float(options["certainty"][b, i, j]) if "certainty" in options else 1.0
                total -= weight * log_p[b, int(labels[b, i, j]), i, j]
        number = valid if options.get("normalize") == "valid" else kept
        expect(found, total / max(1, number), 1e-4)

    return Call(cpseg.pseudo_label_loss, [logits, labels], options, oracle)


def self_reliance_loss(draw: Draw) -> Call:
    size = draw.of((), (3,))
    one, other = (draw.values(*size, dtype=torch.float64) for _ in range(2))
    weight = draw.of(0, 1, 0.25, torch.rand(()), torch.rand(size))

    def oracle(found: Tensor) -> None:
        w = numbers(weight) if isinstance(weight, Tensor) else weight
        expect(found, (1 - w) * numbers(one) + w * numbers(other), 1e-6)

    return Call(cpseg.self_reliance_loss, [one, other, weight], {}, oracle)


def self_reliance_weight(draw: Draw) -> Call:
    options = {"start": draw.of(0, 10), "initial": draw.of(0.01, 1, 0), "decay": draw.of(0, 5.0)}
    arguments = [draw.whole(0, 100), draw.of(80, 100, 10)]
    return Call(cpseg.self_reliance_weight, arguments, options, within(0, options["initial"]))


def poly_lr(draw: Draw) -> Call:
    total, power = draw.of(1, 80, 1.5), draw.of(0.9, 0, 1, 2.5)
    step = total * float(draw.random.random())

    def oracle(found: float) -> None:
        assert math.isclose(found, 0.1 * (1 - step / total) ** power, rel_tol=1e-12)

    return Call(cpseg.poly_lr, [step, total], {"base_lr": 0.1, "power": power}, oracle)


def uncertainty_map(draw: Draw) -> Call:
    size = draw.size()
    one, other = (draw.values(*size, kind="logits") for _ in range(2))

    def oracle(found: Tensor) -> None:
        expect(found, np.abs(sigmoid(numbers(one)) - sigmoid(numbers(other))), 1e-5)

    return Call(cpseg.uncertainty_map, [one, other], {}, oracle)


def confidence_uncertainty(draw: Draw) -> Call:
    logits = draw.values(draw.whole(1, 2), draw.whole(1, 4), *draw.size(), kind="logits")
    return Call(cpseg.confidence_uncertainty, [logits], {}, within(0, 1))


def discrepancy_uncertainty(draw: Draw) -> Call:
    size = (draw.whole(1, 2), draw.whole(1, 4), *draw.size())
    pair = [draw.values(*size, kind="logits") for _ in range(2)]
    return Call(cpseg.discrepancy_uncertainty, pair, {}, within(0, 1))


def masks_to_boxes(draw: Draw) -> Call:
    masks = draw.masks(draw.whole(1, 3), *draw.size())

    def oracle(found: Tensor) -> None:
        wanted = []
        for mask in masks.numpy():
            rows, columns = np.nonzero(mask)
            ends = (columns.min(), rows.min(), columns.max(), rows.max()) if len(rows) else (0,) * 4
            wanted.append(ends)
        expect(found, wanted)

    return Call(cpseg.masks_to_boxes, [masks], {}, oracle)


def jitter_boxes(draw: Draw) -> Call:
    height, width = draw.size()
    ends = draw.random.random((draw.whole(0, 3), 2, 2)) * (width - 1, height - 1)
    boxes = torch.as_tensor(np.sort(ends, 1).reshape(-1, 4)).to(
        draw.of(*FLOATS[-2:], torch.float32)
    )
    options = {"noise": draw.of(0, 0.1, 3), "most": draw.of(0, 20.0, math.inf)}
    options["generator"] = draw.of(None, draw.generator())

    def oracle(found: Tensor) -> None:
        assert found.shape == boxes.shape
        x0, y0, x1, y1 = numbers(found).T
        assert ((x0 >= 0) & (x0 <= x1) & (x1 <= width - 1)).all()
        assert ((y0 >= 0) & (y0 <= y1) & (y1 <= height - 1)).all()

    return Call(cpseg.jitter_boxes, [boxes, (height, width)], options, oracle)


def sample_prompts(draw: Draw) -> Call:
    size = (draw.whole(1, 3), *draw.size())
    targets = draw.masks(*size)
    predictions = draw.masks(*size) if draw.chance(0.5) else None
    options: dict[str, Any] = {"generator": draw.generator(), "box_share": draw.of(0, 0.5, 1)}
    if draw.chance(0.4):
        options["uncertainty"] = draw.values(*size)
    if draw.chance(0.7):
        options["backup_points"] = torch.zeros(size[0], 2)

    def oracle(found: cpseg.Prompts) -> None:
        for i, (x, y) in enumerate(found.points.tolist()):
            label = int(found.labels[i])
            if label == -1 or (x, y) == (0, 0):
                continue
            assert bool(targets[i, int(y), int(x)]) == (label == 1)
            if predictions is not None:
                assert bool(predictions[i, int(y), int(x)]) != (label == 1)

    return Call(cpseg.sample_prompts, [targets, predictions], options, oracle)


def centre_point(draw: Draw) -> Call:
    size = (draw.whole(1, 3), *draw.size())
    targets = draw.masks(*size)
    predictions = draw.masks(*size) if draw.chance(0.5) else None

    def oracle(found: cpseg.Prompts) -> None:
        for i, (x, y) in enumerate(found.points.tolist()):
            label = int(found.labels[i])
            inside = bool(targets[i, int(y), int(x)])
            assert label == -1 or inside == (label == 1)

    return Call(cpseg.centre_point, [targets, predictions], {}, oracle)


def boundary_point(draw: Draw) -> Call:
    targets = draw.masks(draw.whole(1, 3), *draw.size())

    def oracle(found: cpseg.Prompts) -> None:
        for mask, (x, y) in zip(targets, found.points.tolist(), strict=True):
            assert bool(mask[int(y), int(x)])

    return Call(cpseg.boundary_point, [targets], {"distance": draw.of(1, 2.5, 10)}, oracle)


def mask_filters(draw: Draw) -> Call:
    count = draw.whole(1, 3)
    logits = draw.values(count, *draw.size(), kind="logits")
    share = draw.values(count) * 100
    options = {"min_iou": draw.of(0, 50, 88.0), "min_stability": draw.of(0, 95.0)}

    def oracle(found: Tensor) -> None:
        for z, iou, passes in zip(numbers(logits), numbers(share), found.tolist(), strict=True):
            small, large = (z > 1).sum(), (z > -1).sum()
            good = large > 0 and 100 * small >= options["min_stability"] * large
            good = good and iou >= options["min_iou"] and 100 * (z > 0).sum() < 95 * z.size
            assert passes == good

    return Call(cpseg.mask_filters, [logits, share], options, oracle)


def calibration_of(draw: Draw, classes: int) -> cpseg.Calibration:
    size = draw.size()
    shape = (classes, *size) if draw.chance(0.3) else size
    threshold = draw.values(*shape, dtype=torch.float32).contiguous()
    threshold = threshold.masked_fill(torch.as_tensor(draw.random.random(shape) < 0.2), math.inf)
    count = torch.full(shape, 9)
    return cpseg.Calibration(threshold, count, 0.1, 9, classes, background_of(draw, classes))


def calibration(draw: Draw) -> Call:
    probs, _, classes, _ = draw.problem()
    if classes > 99:
        probs, classes = probs[..., :3, :, :], 3
    made = calibration_of(draw, classes)
    method = draw.of("pseudo_labels", "prediction_set", "evidence", "resize", "guarantee")
    arguments = {"resize": [draw.size()], "guarantee": []}.get(method, [probs])
    return Call(getattr(made, method), arguments, {})


def certainty(draw: Draw) -> Call:
    probs, labels, classes, _ = draw.problem()
    if classes > 99:
        probs, labels, classes = probs[..., :3, :, :], labels.clamp(max=2), 3
    made = calibration_of(draw, classes)
    if draw.chance(0.2):
        return Call(cpseg.certainty, [cpseg.evidence(probs, background=made.background), made], {})
    options = (
        {"labels": labels.to(torch.int64).masked_fill(labels < 0, 255)} if draw.chance(0.4) else {}
    )
    return Call(cpseg.certainty, [probs, made], options, within(0, 1))


def partition(draw: Draw, size: tuple[int, int]) -> Tensor:
    made: Tensor = draw.of(groups.pixel(size), groups.image(size), groups.blocks(size, 2))
    return made


def calibrator(draw: Draw) -> Call:
    """Built, fed and computed; pixel-wise thresholds against the loops."""
    size, classes, alpha = draw.size(), draw.of(2, 3), draw.of("0.1", "0.25", "0.5")
    cells = partition(draw, size)
    batch = draw.whole(1, 9)
    ignore = draw.of(-1, 255)
    probs = draw.values(batch, classes, *size)
    labels = draw.labels(batch, *size, classes=classes, ignore=ignore)
    per_class = draw.chance(0.3)
    options: dict[str, Any] = {"alpha": alpha, "ignore_index": ignore, "per_class": per_class}
    if draw.chance(0.3):
        options["max_images"] = draw.of(9, 100)
    options |= {"unit": draw.of("pixel", "image")} if draw.chance(0.3) else {}
    options |= {"background": 0} if draw.chance(0.3) else {}
    options |= {"num_classes": classes} if draw.chance(0.3) else {}
    options |= {"fallback": [groups.image(size)]} if draw.chance(0.2) else {}
    options |= {"score": draw.of("aps", "raps", "margin")} if draw.chance(0.2) else {}

    def after(made: cpseg.Calibrator) -> Any:
        given = odd(draw, probs, labels)
        made.update(*given)
        if draw.chance(0.2):
            made.update_scores(*odd(draw, draw.values(2, *size)))
        if draw.chance(0.2):
            made.p_values(*odd(draw, probs, labels))
        found = made.compute(*(odd(draw, alpha) if draw.chance(0.3) else []))
        exact = type(made._store).__name__ != "BinnedScores"  # bins round up
        plain = exact and not made.fallback and made.score == "lac" and made.num_images == batch
        same = given[0] is probs and given[1] is labels and found.alpha == float(alpha)
        if (
            plain
            and same
            and made.ignore_index == ignore
            and made.groups.numel() == made.groups.max() + 1
        ):
            known = classes if made.per_class else None
            pairs = list(zip(each(probs), numbers(labels), strict=True))
            wanted = oracles.calibrate(
                pairs, made.groups.numpy(), alpha, num_classes=known, void=ignore
            )
            expect(found.threshold, wanted[0])
        return found

    return Call(cpseg.Calibrator, [cells], options, None, after)


def certifier(draw: Draw) -> Call:
    size, classes = draw.size(), 3
    made = cpseg.Calibrator(partition(draw, size), alpha=0.5, num_classes=classes)
    probs, labels = draw.values(4, classes, *size), draw.labels(4, *size, classes=classes)
    made.update(probs, labels)
    options: dict[str, Any] = {"max_error": draw.of(0.05, "0.5"), "delta": draw.of(0.1, 0.5)}
    options |= {"method": draw.of("ltt", "crc")} if draw.chance(0.3) else {}
    options |= {"per_class": True} if draw.chance(0.3) else {}

    def after(found: cpseg.Certifier) -> Any:
        found.update(*odd(draw, probs, labels))
        return found.compute(*(odd(draw, "0.3") if draw.chance(0.3) else []))

    return Call(cpseg.Certifier, [made], options, None, after)


def certificate(draw: Draw) -> Call:
    numbers_ = [0.1, 0.1, True, 0.05, 40, 0.02, 0.5]
    return Call(cpseg.Certificate, ["ltt", "betting", *numbers_], {})


def online_threshold(draw: Draw) -> Call:
    classes, size = draw.of(2, 3, 5), draw.size()
    options: dict[str, Any] = {"alpha": draw.of(0.05, "0.5"), "stride": draw.of(1, 2)}
    options |= {"per_class": draw.chance(0.5), "decay": draw.of(0.5, 1, 0.99)}
    logits = draw.values(2, classes, *size, kind="logits")
    labels = draw.labels(2, *size, classes=classes)

    def after(made: cpseg.OnlineThreshold) -> Any:
        for _ in range(draw.whole(0, 2)):
            made.update(*odd(draw, logits, labels))
        gate = made.gate(*odd(draw, logits))
        assert gate.dtype == torch.bool
        within(0, 1)(made.threshold())
        made.load_state_dict(*odd(draw, made.state_dict()))
        return made.sync()

    return Call(cpseg.OnlineThreshold, [classes], options, None, after)


def recalibrator(draw: Draw) -> Call:
    classes, size = draw.of(2, 3), (draw.whole(2, 5), draw.whole(2, 5))
    probs, labels = draw.values(3, classes, *size), draw.labels(3, *size, classes=classes)
    options: dict[str, Any] = {"method": draw.of("none", "temperature", "vector", "dirichlet")}
    options |= {"scores": draw.of("softmax", "sigmoid"), "budget": draw.of(5, 100)}
    if draw.chance(0.3):
        options["context"] = draw.of("location", ("neighbourhood", "image"))

    def after(made: cpseg.Recalibrator) -> Any:
        made.update(*odd(draw, probs, labels))
        fitted = made.fit()
        given = odd(draw, probs)
        mapped = fitted(*given)
        if given[0] is probs:
            expect(mapped.sum(1), np.ones((len(mapped), *size)), 1e-4)
        power = fitted.with_prior_power(*odd(draw, draw.of(0, 0.5, 1)))
        power.describe(*odd(draw, None))
        return power.evidence(*odd(draw, probs), **odd_options(draw, background=0))

    return Call(cpseg.Recalibrator, [classes], options, None, after)


def recalibration(draw: Draw) -> Call:
    tensors = [draw.values(2, 2, dtype=torch.float32), torch.zeros(2), torch.tensor([0.5, 0.5])]
    tensors[2] = tensors[2].double()
    options = {"method": "dirichlet", "scores": "softmax", "context": (), "num_source": 2}
    return Call(cpseg.Recalibration, tensors, {**options, "num_images": 3, "strength": 0.1})


def prompts(draw: Draw) -> Call:
    return Call(cpseg.Prompts, [torch.zeros(2, 2), torch.ones(2, dtype=torch.int64)], {})


def pseudo_labelled(draw: Draw) -> Call:
    size = draw.size()
    images, scores = [draw.values(3, *size)], [draw.values(3, *size)]
    images, scores = odd(draw, images[0]), odd(draw, scores[0])

    def build(calibration: cpseg.Calibration) -> cpseg.PseudoLabelled:
        return cpseg.PseudoLabelled(images, scores.__getitem__, calibration)

    return Call(build, [calibration_of(draw, 3)], {}, None, lambda made: made[0])


def task_prompt(draw: Draw) -> Call:
    count, dim = draw.whole(1, 4), draw.whole(1, 4)
    embedding = draw.values(2, dim, *draw.size())
    tasks = draw.labels(2, classes=count, void=0)

    def after(made: cpseg.TaskPrompt) -> Any:
        return made(*odd(draw, embedding, tasks))

    return Call(cpseg.TaskPrompt, [count, dim], {}, None, after)


def weak_augmentation(draw: Draw) -> Call:
    size = draw.size()
    options: dict[str, Any] = {"scale": draw.of((0.5, 2.0), (1, 1)), "flip": draw.of(0, 0.5, 1)}
    options |= {"ignore_index": -1} if draw.chance(0.2) else {}
    image, labels = draw.values(3, *size), draw.labels(*size, classes=3)
    weight = draw.of(None, draw.values(*size))
    crop = draw.whole(1, 6)

    def after(made: cpseg.WeakAugmentation) -> Any:
        made_options = odd_options(draw, generator=draw.generator())
        found = made(*odd(draw, image, labels, weight), **made_options)
        assert [part.shape[-1] for part in found] == [made.crop] * 3
        return found

    return Call(cpseg.WeakAugmentation, [crop], options, None, after)


def fixed(name: str) -> Callable[[Draw], Call]:
    def make(draw: Draw) -> Call:
        size = draw.size()
        more = [draw.of(1, 2, (2, 3))] if name == "blocks" else []
        options = {"device": draw.of(None, "cpu", torch.device("cpu"))}

        def oracle(found: Tensor) -> None:
            assert found.shape == size
            within(0, size[0] * size[1] - 1)(found)

        return Call(getattr(groups, name), [size, *more], options, oracle)

    return make


def curves(draw: Draw) -> Call:
    axis = (2,) if draw.chance(0.3) else ()
    scores = draw.values(draw.whole(1, 6), *axis, *draw.size())

    def oracle(found: Tensor) -> None:
        levels = np.linspace(0, 1, 4)
        expect(found, np.quantile(numbers(scores), levels, axis=0), 1e-5)

    return Call(groups.curves, [scores], {"levels": 4}, oracle)


def learned(name: str) -> Callable[[Draw], Call]:
    def make(draw: Draw) -> Call:
        size = draw.size()
        values = draw.values(3, *size)
        values = values.to(torch.float32).cumsum(0).to(values.dtype)  # half: not in every torch
        number = draw.whole(1, 3)
        options = {"generator": draw.generator()}

        def oracle(found: Tensor) -> None:
            assert found.shape == size
            assert set(found.unique().tolist()) == set(range(number))

        return Call(getattr(groups, name), [values, number], options, oracle)

    return make


def strategy(name: str) -> Callable[[Draw], Call]:
    def make(draw: Draw) -> Call:
        options: dict[str, dict[str, Any]] = {
            "scores": {"max_images": draw.whole(1, 9), "size": draw.size()},
            "labels": {"num_classes": draw.whole(1, 4), "size": draw.size()},
            "probs": {"num_classes": draw.whole(1, 4), "size": draw.size()},
            "calibration_problems": {"max_images": draw.whole(1, 4), "alphas": [0.1]},
        }
        return Call(getattr(cpseg.testing, name), [], options[name])

    return make


def feature_projection(draw: Draw) -> Call:
    channels, kept = draw.whole(1, 4), draw.whole(1, 3)
    parts = [draw.values(channels, dtype=torch.float32)]
    parts.append(draw.values(channels, kept, dtype=torch.float32))
    features = draw.values(2, channels, *draw.size(), dtype=torch.float32)

    def after(made: cpseg.FeatureProjection) -> Any:
        given = odd(draw, features)
        found = made(*given)
        if given[0] is features:
            centred = features - made.mean.detach()[:, None, None]
            wanted = torch.einsum("cp,bchw->bphw", made.basis.detach().to(centred), centred)
            expect(found, wanted.numpy(), 1e-4)
        return type(made).fit(*odd(draw, list(features)), **odd_options(draw, components=kept))

    return Call(cpseg.FeatureProjection, [*parts, 3], {}, None, after)


def cross_fit(draw: Draw) -> Call:
    count = draw.whole(2, 9)
    folds, seed = draw.whole(2, count), draw.whole(0, 99)
    images = [f"{draw.of('a', 'b')}/{number}.png" for number in range(count)]
    form = draw.of(str, Path, lambda image: Pair(image, "mask.png"))

    def oracle(found: Any) -> None:
        hashes = [sha256(f"cross_fit\0{seed}\0{image}".encode()).digest() for image in images]
        for image, hashed, fold in zip(images, hashes, found.fold, strict=True):
            assert fold == sum(other < hashed for other in hashes) % folds
            assert form(image) in found.held(fold)
            assert form(image) not in found.train(fold)

    return Call(cpseg.cross_fit, [[form(image) for image in images], folds, seed], {}, oracle)


def recommend(draw: Draw) -> Call:
    classes, count, models = draw.whole(2, 4), draw.whole(4, 8), draw.whole(1, 2)
    generator = torch.Generator().manual_seed(draw.whole(0, 10**6))
    masks = [torch.randint(classes, (6, 7), generator=generator) for _ in range(count)]

    def one() -> Tensor:
        return torch.randn(classes, 6, 7, generator=generator).softmax(0)

    scores = [one() if models == 1 else [one(), one()] for _ in range(count)]
    options = {
        "background": draw.of(None, 0),
        "alpha": draw.of("0.2", 0.3),
        "methods": draw.of(["none"], ["none", "temperature"]),
        "prior_powers": draw.of([0.0], (0.0, 0.5)),
        "context": (),
        "folds": 2,
        "student": draw.of(None, models - 1),
    }

    def oracle(found: Any) -> None:
        labels = found.pseudo_labels(scores[0])
        assert labels.shape == (6, 7)
        if found.rule == "raw argmax":
            first = scores[0] if models == 1 else scores[0][0]
            assert torch.equal(labels, first.argmax(0))

    return Call(cpseg.recommend, [scores, masks], options, oracle)


# Every public name and how it is called. A heavy one is called less often.
GENERATORS: dict[str, Callable[[Draw], Call]] = {
    "Calibration": calibration,
    "Calibrator": calibrator,
    "Certificate": certificate,
    "Certifier": certifier,
    "Evidence": make_evidence,
    "FeatureProjection": feature_projection,
    "OnlineThreshold": online_threshold,
    "Prompts": prompts,
    "PseudoLabelled": pseudo_labelled,
    "Recalibration": recalibration,
    "Recalibrator": recalibrator,
    "TaskPrompt": task_prompt,
    "WeakAugmentation": weak_augmentation,
    "boundary_iou": boundary_iou,
    "boundary_point": boundary_point,
    "centre_point": centre_point,
    "certainty": certainty,
    "class_scores": nonconformity_map,
    "confidence_uncertainty": confidence_uncertainty,
    "conformal_quantile": conformal_quantile,
    "conformal_rank": conformal_rank,
    "confusion_matrix": confusion_matrix,
    "coverage": coverage,
    "cross_fit": cross_fit,
    "dice_loss": loss("dice_loss"),
    "discrepancy_uncertainty": discrepancy_uncertainty,
    "evidence": evidence,
    "focal_loss": loss("focal_loss"),
    "groups.annuli": learned("annuli"),
    "groups.blocks": fixed("blocks"),
    "groups.curves": curves,
    "groups.image": fixed("image"),
    "groups.kmeans": learned("kmeans"),
    "groups.pixel": fixed("pixel"),
    "interactive_iou": interactive_iou,
    "jitter_boxes": jitter_boxes,
    "kept_share": kept_share,
    "mask_filters": mask_filters,
    "masks_to_boxes": masks_to_boxes,
    "mean_iou": mean_iou,
    "nonconformity": nonconformity,
    "nonconformity_map": nonconformity_map,
    "poly_lr": poly_lr,
    "prediction_set": prediction_set,
    "pseudo_label_loss": pseudo_label_loss,
    "pseudo_labels": pseudo_labels,
    "recommend": recommend,
    "sample_prompts": sample_prompts,
    "self_reliance_loss": self_reliance_loss,
    "self_reliance_weight": self_reliance_weight,
    "set_size": set_size,
    "sum_loss": loss("sum_loss"),
    "testing.calibration_problems": strategy("calibration_problems"),
    "testing.labels": strategy("labels"),
    "testing.probs": strategy("probs"),
    "testing.scores": strategy("scores"),
    "uncertainty_map": uncertainty_map,
}
HEAVY = {
    "recommend": 0.05,
    "groups.annuli": 0.02,
    "groups.kmeans": 0.2,
    "Recalibrator": 0.2,
    "Certifier": 0.3,
}


class Outcome(NamedTuple):
    """What came of a call: ``"returned"``, ``"refused"`` or ``"failed"``."""

    name: str
    kind: str
    checked: bool
    said: str
    seconds: float


def run(seed: int, number: int) -> Outcome:
    """Make one call."""
    draw = Draw(seed, number)
    name = draw.of(*GENERATORS)
    while not draw.chance(HEAVY.get(name, 1.0)):
        name = draw.of(*GENERATORS)
    torch.manual_seed(number)
    call = GENERATORS[name](draw)
    arguments, options, oracle = [*call.arguments], {**call.options}, call.oracle
    spoilt = bool(arguments or options) and draw.chance(0.5)
    if spoilt:
        places: list[Any] = [*range(len(arguments)), *options]
        for _ in range(draw.of(1, 1, 2)):
            place = draw.of(*places)
            where: Any = arguments if isinstance(place, int) else options
            where[place] = draw.spoil(where[place])
    given = [v for v in [*arguments, *options.values()] if isinstance(v, Tensor)]
    given = [v for v in given if v.device.type == "cpu" and v.layout == torch.strided]
    before = [v.detach().clone() for v in given]
    checked, start = False, time.perf_counter()

    def outcome(kind: str, said: str) -> Outcome:
        seconds = time.perf_counter() - start
        if kind != "failed" and seconds > SECONDS:
            kind, said = "failed", f"took {seconds:.1f} s"
        return Outcome(name, kind, checked, said, seconds)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = call.function(*arguments, **options)
    except ALLOWED as error:
        one_line = len(str(error).splitlines()) == 1
        return outcome("refused" if one_line else "failed", f"{type(error).__name__}: {error}")
    except Exception as error:
        kind = "refused" if NO_DRIVER in str(error) else "failed"
        return outcome(kind, f"{type(error).__name__}: {error}\n{last_lines()}")
    try:
        if oracle is not None and not spoilt:
            oracle(found)
            checked = True
        for old, new in zip(before, given, strict=True):
            assert same_bits(old, new.detach()), "an argument was modified"
        if call.after is not None:
            copy.copy(call.after(found))
    except ALLOWED as error:
        one_line = len(str(error).splitlines()) == 1
        return outcome("refused" if one_line else "failed", f"{type(error).__name__}: {error}")
    except Exception as error:
        return outcome("failed", f"{type(error).__name__}: {error}\n{last_lines()}")
    return outcome("returned", "")


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype.itemsize == 1 and one.is_floating_point():
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return bool(((one == other) | ((one != one) & (other != other))).all())


def last_lines() -> str:
    return "".join(traceback.format_exc().splitlines(keepends=True)[-7:])


def main(arguments: list[str]) -> int:
    """Make calls and say what came of them; 1 if any failed."""
    torch.set_num_threads(1)
    seed, first = int(arguments[0]), int(arguments[1])
    calls = int(arguments[2]) if len(arguments) > 2 else 1
    counts: Counter[str] = Counter()
    for number in range(first, first + calls):
        found = run(seed, number)
        counts[found.kind] += 1
        counts["checked by an oracle"] += found.checked
        if calls == 1 or found.kind == "failed":
            print(f"{found.name}: {found.kind} in {found.seconds:.3f} s. {found.said}", flush=True)
        if found.kind == "failed":
            print(f"again: python tests/support/fuzz.py {seed} {number}", flush=True)
    print(", ".join(f"{number} {kind}" for kind, number in counts.items()))
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
