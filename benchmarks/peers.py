"""The same work by the methods of other libraries and papers, side by side in one run.

The references are written here from the definition of each method. Rows in which cpseg is slower or
takes more memory stay in the table. A library that is not installed has a row that says so.

    pip install --no-deps torchcp tqdm; pip install mapie
    python benchmarks/peers.py            the table, JSON to benchmarks/results/
    python benchmarks/peers.py --quick    smaller sizes

Time is that of the processor, on one thread, so that other programs matter less: the median of the
ratios of neighbouring runs, other / cpseg, so above 1 cpseg is faster. Memory is how far the peak
of the process grows above what it held before (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import os
import statistics
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cpseg
from ranks import forget_peak, peak, save, timed

ALPHA = 0.1
VOID = 255


@dataclass
class Row:
    what: str
    peer: str
    size: str
    peer_ms: float
    times_faster: float
    low: float
    high: float
    peer_mb: float
    ours_mb: float
    result: str


@dataclass
class Missing:
    peer: str
    why: str


def grown(work: Callable[[], object]) -> float:
    """MB by which the peak grows; free pages of the heap are handed back first."""
    ctypes.CDLL(None).malloc_trim(0)
    before = forget_peak()
    work()
    return (peak() - before) / 1e6


def compared(
    what: str,
    peer: str,
    size: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    same: Callable[[Any, Any], str],
    rounds: int,
) -> Row:
    """One row: the results first, then neighbouring runs for the time, and one each for memory."""
    result = same(ours(), theirs())
    pairs = [(timed(theirs)[1], timed(ours)[1]) for _ in range(rounds)]
    low, median, high = statistics.quantiles([other / own for other, own in pairs], n=4)
    peer_ms = 1e3 * statistics.median(other for other, _ in pairs)
    return Row(what, peer, size, peer_ms, median, low, high, grown(theirs), grown(ours), result)


# --- (a) split conformal prediction over all pixels -----------------------------------------------


class Pixels:
    """Images as cpseg takes them, and their pixels as rows for the others."""

    def __init__(self, images: int, classes: int, side: int) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = 2 * torch.randn(images, classes, side, side, generator=generator)
        self.labels = torch.randint(classes, (images, side, side), generator=generator)
        logits.scatter_add_(1, self.labels[:, None], torch.full((images, 1, side, side), 2.0))
        self.probs = logits.softmax(1)
        self.rows = self.probs.movedim(1, -1).flatten(0, 2).contiguous()
        self.side = side
        self.size = f"{images}x{classes}x{side}x{side}"

    def ours(self) -> float:
        size = (self.side, self.side)
        calibrator = cpseg.Calibrator(cpseg.groups.image(size), alpha=ALPHA)
        for probs, labels in zip(self.probs, self.labels, strict=True):
            calibrator.update(probs, labels)
        return float(calibrator.compute().threshold[0, 0])

    def exactly(self) -> float:
        scores = cpseg.nonconformity(self.probs, self.labels).flatten()
        return float(cpseg.conformal_quantile(scores, ALPHA))


def odds(ours: float, theirs: float) -> str:
    """Our bins round up, by less than 1 % in odds; more than that is an error."""
    off = ours * (1 - theirs) / (theirs * (1 - ours)) - 1
    assert -1e-5 <= off < 0.01, (ours, theirs)
    return f"ours {100 * off:.2f} % higher in odds"


def equal(ours: float, theirs: float) -> str:
    assert abs(ours - theirs) < 1e-6, (ours, theirs)
    return "equal" if ours == theirs else f"equal to {abs(ours - theirs):.0e}"


def torchcp_threshold(pixels: Pixels) -> Callable[[], float]:
    """TorchCP's LAC and split predictor, without what its ``__init__`` imports."""
    spec = importlib.util.find_spec("torchcp")
    if spec is None or spec.origin is None:
        raise ImportError("pip install --no-deps torchcp tqdm")
    root = Path(spec.origin).parent
    for name, path in (("torchcp", root), ("torchcp.classification", root / "classification")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    split = importlib.import_module("torchcp.classification.predictor.split")
    score = importlib.import_module("torchcp.classification.score")
    labels = pixels.labels.flatten()

    def threshold() -> float:
        predictor = split.SplitPredictor(score.LAC(score_type="identity"))
        predictor.calculate_threshold(pixels.rows, labels, ALPHA)
        return float(predictor.q_hat)

    return threshold


class Given:
    """An estimator whose inputs are numbers of rows, for MAPIE."""

    n_features_in_ = 1

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.classes_ = rows, np.arange(rows.shape[1])

    def fit(self, x: Any, y: Any) -> Given:
        return self

    def predict_proba(self, x: Any) -> np.ndarray:
        return self.rows[np.asarray(x, dtype=np.int64)[:, 0]]

    def predict(self, x: Any) -> np.ndarray:
        return self.predict_proba(x).argmax(1)

    def __sklearn_is_fitted__(self) -> bool:
        return True


def mapie_threshold(pixels: Pixels) -> Callable[[], float]:
    try:
        classification = importlib.import_module("mapie.classification")
    except ImportError as error:
        raise ImportError("pip install mapie") from error
    rows = pixels.rows.double().numpy()
    model = Given(rows / rows.sum(1, keepdims=True))
    numbers, labels = np.arange(len(rows))[:, None], pixels.labels.flatten().numpy()

    def threshold() -> float:
        classifier = classification.SplitConformalClassifier(
            model, confidence_level=1 - ALPHA, conformity_score="lac", random_state=0
        )
        classifier.conformalize(numbers, labels)
        classifier.predict_set(numbers[:1])  # the quantile is taken here
        found = classifier._mapie_classifier.conformity_score_function_.quantiles_[0]
        return float(np.asarray(found))

    return threshold


def split_conformal(quick: bool) -> Iterator[Row | Missing]:
    pixels = Pixels(8, 21, 64 if quick else 256)
    labels = pixels.labels.flatten()

    def sorting() -> float:
        """The definition: all scores in one array, sorted."""
        scores = (1 - pixels.rows.gather(1, labels[:, None])).flatten().sort().values
        return float(scores[cpseg.conformal_rank(len(scores), ALPHA) - 1])

    peers: dict[str, Callable[[], Callable[[], float]]] = {
        "TorchCP, LAC, split": lambda: torchcp_threshold(pixels),
        "MAPIE, LAC, split": lambda: mapie_threshold(pixels),
        "gather and sort, in PyTorch": lambda: sorting,
    }
    ways = (
        ("Calibrator, image-wise", pixels.ours, odds),
        ("conformal_quantile", pixels.exactly, equal),
    )
    for peer, load in peers.items():
        try:
            theirs = load()
        except ImportError as error:
            yield Missing(peer, str(error))
            continue
        for what, ours, same in ways:
            yield compared(what, peer, pixels.size, ours, theirs, same, 5)


# --- (b) a threshold or a curve for every pixel ---------------------------------------------------


def kandinsky(quick: bool) -> Iterator[Row]:
    """Kandinsky calibration: the scores of all images in a stack, quantiles of every pixel."""
    images, classes, side = 60, 3, 16 if quick else 64
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(images, classes, side, side, generator=generator)
    labels = torch.randint(classes, (images, side, side), generator=generator)
    size = f"{images}x{classes}x{side}x{side}"
    levels = np.linspace(0, 1, 100)

    def stack() -> np.ndarray:
        """Of every class apart: NaN where a pixel has another."""
        scores = np.full(probs.shape, np.nan, np.float32)
        every = labels.numpy()[:, None]
        true = np.take_along_axis(probs.numpy(), every, 1)
        np.put_along_axis(scores, every, 1 - true, 1)
        return scores

    def curves() -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a class that a pixel never has
            return np.nanquantile(stack(), levels, axis=0)

    def pooled(q: float | np.ndarray) -> np.ndarray:
        """Of the true class, whichever it is."""
        return np.nanquantile(np.nanmax(stack(), axis=1), q, axis=0)

    def thresholds(per_class: bool) -> Tensor:
        grid = cpseg.groups.pixel((side, side))
        bound = None if per_class else images
        calibrator = cpseg.Calibrator(grid, alpha=ALPHA, per_class=per_class, max_images=bound)
        for image, truth in zip(probs, labels, strict=True):
            calibrator.update(image, truth)
        return calibrator.compute().threshold

    def our_curves() -> Tensor:
        return cpseg.groups.curves(torch.from_numpy(stack()), levels=100)

    def at_least(ours: Tensor, theirs: np.ndarray) -> str:
        """The conformal rank is above the interpolated quantile, or there are too few scores."""
        level = theirs if theirs.ndim < 4 and theirs.shape[0] != 100 else theirs[89]
        known = ~np.isnan(level)
        assert (ours.numpy()[known] >= level[known] - 1e-6).all()
        infinite = 100 * float(ours.isinf().float().mean())
        return f"ours at least theirs, {infinite:.0f} % infinite; theirs interpolates"

    def close(ours: Tensor, theirs: np.ndarray) -> str:
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5)
        return "equal to 1e-5"

    published = "stack + numpy.nanquantile"
    one = f"{published}, one level"
    hundred = f"{published}, 100 levels"
    pixel = "Calibrator, pixel-wise, one alpha"
    yield compared(
        pixel, one, size, lambda: thresholds(False), lambda: pooled(1 - ALPHA), at_least, 3
    )
    yield compared(
        pixel, hundred, size, lambda: thresholds(False), lambda: pooled(levels), at_least, 3
    )
    yield compared(
        f"{pixel}, per class",
        f"{hundred}, per class",
        size,
        lambda: thresholds(True),
        curves,
        at_least,
        3,
    )
    yield compared(
        "groups.curves, 100 levels, per class",
        f"{hundred}, per class",
        size,
        our_curves,
        curves,
        close,
        3,
    )


# --- (c) masks from probabilities -----------------------------------------------------------------


def loops(quick: bool) -> Iterator[Row]:
    """Eq. 4 of ConformalSAM without a background: the argmax where it is in the set, else void."""

    def rows_and_pixels(probs: np.ndarray, threshold: np.ndarray) -> np.ndarray:
        _, height, width = probs.shape
        mask = np.full((height, width), VOID, np.uint8)
        for row in range(height):
            for column in range(width):
                best = int(probs[:, row, column].argmax())
                if 1 - probs[best, row, column] <= threshold[row, column]:
                    mask[row, column] = best
        return mask

    def arrays(probs: np.ndarray, threshold: np.ndarray) -> np.ndarray:
        kept = 1 - probs.max(0) <= threshold
        return np.where(kept, probs.argmax(0), VOID).astype(np.uint8)

    def tensors(probs: np.ndarray, threshold: np.ndarray) -> np.ndarray:
        best, index = torch.from_numpy(probs).max(0)
        kept = 1 - best <= torch.from_numpy(threshold)
        return index.masked_fill(~kept, VOID).to(torch.uint8).numpy()

    def same(ours: Tensor, theirs: np.ndarray) -> str:
        assert (ours.numpy() == theirs).all()
        return "the same masks"

    cases = (
        ("loop over rows and pixels", rows_and_pixels, 64, 5),
        ("argmax and where, in NumPy", arrays, 128 if quick else 512, 9),
        ("max and masked_fill, in PyTorch", tensors, 128 if quick else 512, 9),
    )
    for peer, convert, side, rounds in cases:
        generator = torch.Generator().manual_seed(0)
        probs = (2 * torch.randn(21, side, side, generator=generator)).softmax(0)
        threshold = torch.rand(side, side, generator=generator)
        arguments = probs.numpy(), threshold.numpy()
        yield compared(
            "pseudo_labels",
            peer,
            f"21x{side}x{side}",
            lambda p=probs, t=threshold: cpseg.pseudo_labels(p, t, background=None),
            lambda c=convert, a=arguments: c(*a),
            same,
            rounds,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"alpha {ALPHA}, one thread, load {os.getloadavg()[0]:.1f}\n")
    print(
        "| cpseg | other | size | other, ms | times faster | quartiles | "
        "memory, MB: other | cpseg | result |\n|---|---|---|---:|---:|---:|---:|---:|---|"
    )
    rows: list[Row | Missing] = []
    for compare in (split_conformal, kandinsky, loops):
        for row in compare(options.quick):
            rows.append(row)
            if isinstance(row, Missing):
                print(f"| - | {row.peer} | | | | | | | skipped: {row.why} |", flush=True)
                continue
            slower = "" if row.times_faster >= 1 else " (slower)"
            print(
                f"| {row.what} | {row.peer} | {row.size} | {row.peer_ms:,.3g} | "
                f"{row.times_faster:.2g}{slower} | {row.low:.2g} to {row.high:.2g} | "
                f"{row.peer_mb:.0f} | {row.ours_mb:.0f} | {row.result} |",
                flush=True,
            )
    print(f"\n{save('peers', [asdict(row) for row in rows])}")


if __name__ == "__main__":
    main()
