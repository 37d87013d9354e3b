"""Measure the design's targets, each as a ratio to its reference in the same run.

Reference and subject run in turns, and a row is the median of the ratios of neighbouring runs, with
its quartiles, because machines are noisy and drift affects both. Rows that miss their target are
shown as well.

    python benchmarks/run.py             all rows, JSON to benchmarks/results/
    python benchmarks/run.py update      the rows whose name contains a word
    python benchmarks/run.py --full      memory with all 10,582 images (minutes)
    python benchmarks/run.py --machine epyc   keeps the rows in benchmarks/machines/epyc.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import cpseg

HERE = Path(__file__).resolve().parent


@dataclass
class Row:
    name: str
    reference: str
    target: str
    median: float
    low: float
    high: float
    reached: bool
    note: str = ""


def ratios(
    subject: Callable[[], object], reference: Callable[[], object], rounds: int = 21
) -> tuple[float, float, float, float]:
    """Median and quartiles of subject / reference, and the reference's median in ms."""
    for _ in range(2):
        reference()
        subject()
    found, base = [], []
    for _ in range(rounds):
        times = []
        for function in (reference, subject):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        base.append(times[0])
        found.append(times[1] / times[0])
    low, median, high = statistics.quantiles(found, n=4)
    return median, low, high, 1e3 * statistics.median(base)


def at_most(
    name: str,
    reference_name: str,
    limit: float | None,
    subject: Callable[[], object],
    reference: Callable[[], object],
    rounds: int = 21,
    note: str = "",
) -> Row:
    median, low, high, base = ratios(subject, reference, rounds)
    target = "-" if limit is None else f"<= {limit:g}x"
    note = f"reference {base:.3g} ms{'; ' * bool(note)}{note}"
    reached = limit is None or median <= limit
    return Row(name, reference_name, target, median, low, high, reached, note)


def selection(device: str) -> Iterator[Row]:
    for num_classes, limit in ((21, 3), (150, 2)):
        probs = torch.rand(2, num_classes, 512, 512, device=device)
        threshold = torch.rand(512, 512, device=device)

        def select(p=probs, t=threshold):
            return cpseg.pseudo_labels(p, t, background=0)

        def read(p=probs):
            return p.amax(1)

        rounds = 31 if num_classes < 100 else 9
        name = f"pseudo_labels K={num_classes}"
        if device == "cpu":
            yield at_most(f"{name}, eager", "probs.amax(1)", limit, select, read, rounds)
            for background in (None, num_classes // 2):
                yield at_most(
                    f"{name}, eager, background={background}",
                    "probs.amax(1)",
                    limit,
                    lambda p=probs, t=threshold, b=background: cpseg.pseudo_labels(
                        p, t, background=b
                    ),
                    read,
                    rounds,
                )
            yield at_most(
                f"probs.max(1) K={num_classes}, for comparison",
                "probs.amax(1)",
                None,
                lambda p=probs: p.max(1),
                read,
                5,
            )
            compiled = torch.compile(select, fullgraph=True, dynamic=False)
            yield at_most(f"{name}, torch.compile", "probs.amax(1)", 1.2, compiled, read, rounds)
        else:
            target = torch.empty_like(probs)
            for kind, function in (("eager", select), ("torch.compile", torch.compile(select))):
                median, low, high, base = ratios(function, lambda p=probs, t=target: t.copy_(p))
                # A copy reads and writes; selection only reads: bandwidth in bytes per second.
                share = [0.5 / value for value in (median, high, low)]
                yield Row(
                    f"{name}, {kind}, {device}",
                    "bandwidth of a device copy",
                    ">= 0.8",
                    *share,
                    share[0] >= 0.8,
                    f"copy {base:.3g} ms",
                )


def shapes() -> Iterator[Row]:
    """Few and many classes, dtypes, layouts and threads: without targets, for the page's table."""
    threads = torch.get_num_threads()
    for num_classes, dtype in itertools.product(
        (2, 21, 150, 1000), (torch.float32, torch.bfloat16)
    ):
        side = 512 if num_classes < 1000 else 256
        for layout in (torch.contiguous_format, torch.channels_last):
            probs = torch.rand(2, num_classes, side, side).to(dtype, memory_format=layout)
            threshold = torch.rand(side, side)
            for count in (1, 2, 4):
                torch.set_num_threads(count)
                words = (f"K={num_classes}", short(dtype), short(layout), f"{count} threads")
                yield at_most(
                    f"shapes: {', '.join(words)}",
                    "probs.amax(1)",
                    None,
                    lambda p=probs, t=threshold: cpseg.pseudo_labels(
                        p, t, background=0, ignore_index=-1
                    ),
                    lambda p=probs: p.amax(1),
                    11 if num_classes < 100 else 5,
                )
    torch.set_num_threads(threads)


def short(value: object) -> str:
    """The name of a dtype or layout."""
    return str(value).removeprefix("torch.")


def compiled_sequence() -> Iterator[Row]:
    """One compiled function that sees other sizes and numbers of classes before."""
    compiled = torch.compile(lambda p, t: cpseg.pseudo_labels(p, t, background=0), fullgraph=True)
    sizes = ((21, 512, 512), (150, 512, 512), (19, 480, 360), (21, 300, 400), (150, 256, 512))
    for num_classes, height, width in sizes:
        probs = torch.rand(2, num_classes, height, width)
        threshold = torch.rand(height, width)
        yield at_most(
            f"pseudo_labels K={num_classes}, {height}x{width}, one torch.compile for all sizes",
            "probs.amax(1)",
            1.2,
            lambda p=probs, t=threshold: compiled(p, t),
            lambda p=probs: p.amax(1),
            31 if num_classes < 100 else 11,
        )
    yield from compiled_for_the_command()


_COMPILED = """
import json, time
import torch, cpseg
from run import ratios

def select(probs, threshold):
    return cpseg.pseudo_labels(probs, threshold, background=0)

torch.set_num_threads(1)
compiled = torch.compile(select, fullgraph=True)
sizes = (512, 512), (375, 500)
images = [(torch.rand(1, 21, *size), torch.rand(size)) for size in sizes]
start = time.perf_counter()
for image in images:
    compiled(*image)
seconds = time.perf_counter() - start
found = [ratios(lambda: compiled(*image), lambda: select(*image)) for image in images]
print(json.dumps([seconds, found]))
"""


def compiled_for_the_command() -> Iterator[Row]:
    """What the command would gain by a compiled function: an image at a time, on one thread."""
    import tempfile

    with tempfile.TemporaryDirectory() as cache:  # kernels that are kept know a number of threads
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, "-c", _COMPILED]
        text = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment, cwd=HERE
        ).stdout
    seconds, found = json.loads(text)
    for size, (median, low, high, base) in zip(("512x512", "375x500"), found, strict=True):
        name = f"pseudo_labels K=21, one image of {size}, one thread, torch.compile"
        note = f"reference {base:.3g} ms; {seconds:.0f} s of compilation for both sizes"
        yield Row(name, "eager", "-", median, low, high, True, note)


def lists() -> Iterator[Row]:
    """What `label` does for every line of a list besides the images."""
    import tempfile

    from cpseg.files.dataset import Source
    from cpseg.files.id_lists import Pair
    from cpseg.jobs.label import summarise

    count = 10_000
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "probs" / "train").mkdir(parents=True)
        pairs = [Pair(f"train/{number:06d}.jpg", None) for number in range(count)]
        for pair in pairs:
            (root / "probs" / pair.image).with_suffix(".npz").touch()
        facts = [{"ignored": 9.0, **{f"class_{index}": 9.0 for index in range(5)}}] * count
        masks = {pair: root / pair.image for pair in pairs}
        source = Source(root, root / "probs")
        cases: dict[str, Callable[[], object]] = {
            "finding the score files": lambda: source.locate(pairs),
            "summary.csv of 21 classes": lambda: summarise(root, masks, 21, facts),
        }
        for name, do in cases.items():
            times = []
            for _ in range(7):
                start = time.perf_counter()
                do()
                times.append(1e6 * (time.perf_counter() - start) / count)
            low, median, high = statistics.quantiles(times, n=4)
            title = f"{name}, {count:,} lines, microseconds a line"
            yield Row(title, "-", "-", median, low, high, reached=True)


def busy_cores() -> Iterator[Row]:
    """The same selection with a program on every core, against the reference on idle ones."""
    for num_classes, limit in ((2, None), (21, 6), (150, 4), (1000, None)):
        side = 512 if num_classes < 1000 else 256
        probs, threshold = torch.rand(2, num_classes, side, side), torch.rand(side, side)

        def seconds(function: Callable[[], object]) -> list[float]:
            found = []
            for _ in range(21):
                start = time.perf_counter()
                function()
                found.append(time.perf_counter() - start)
            return found

        def select(p=probs, t=threshold):
            return cpseg.pseudo_labels(p, t, background=0, ignore_index=-1)

        select()
        idle = statistics.median(seconds(lambda p=probs: p.amax(1)))
        others = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"])
            for _ in range(os.cpu_count() or 1)
        ]
        try:
            time.sleep(0.5)
            quartiles = statistics.quantiles(seconds(select), n=4)
        finally:
            for other in others:
                other.kill()
        low, median, high = (value / idle for value in quartiles)
        note = f"twice the target of idle cores; reference {1e3 * idle:.3g} ms"
        name = f"pseudo_labels K={num_classes}, eager, every core busy"
        target = "-" if limit is None else f"<= {limit}x"
        reached = limit is None or median <= limit
        yield Row(name, "probs.amax(1), idle", target, median, low, high, reached, note)


def update() -> Iterator[Row]:
    probs = torch.rand(1, 21, 512, 512)
    stripes = (torch.arange(512) // 26).reshape(1, 512, 1).expand(1, 512, 512).contiguous()
    cases = {
        "random labels": torch.randint(21, (1, 512, 512)),
        "labels in stripes": stripes,
    }
    for title, labels in cases.items():
        calibrator = cpseg.Calibrator(cpseg.groups.pixel((512, 512)), max_images=1000)
        yield at_most(
            f"Calibrator.update, pixel-wise, {title}",
            "probs.gather(1, labels)",
            2.5,
            lambda c=calibrator, y=labels: c.update(probs, y),
            lambda y=labels: probs.gather(1, y.unsqueeze(1)),
            301,
            "absorbing waiting images is not in the median: next row"
            if title == "random labels"
            else "gather reads along cache lines here",
        )
    labels = cases["random labels"]

    def many() -> None:
        calibrator = cpseg.Calibrator(cpseg.groups.pixel((512, 512)), max_images=1000)
        for _ in range(200):
            calibrator.update(probs, labels)

    yield at_most(
        "200 updates of max_images=1000, all included",
        "200 gathers",
        None,
        many,
        lambda: [probs.gather(1, labels.unsqueeze(1)) for _ in range(200)],
        5,
    )
    pooled = cpseg.Calibrator(cpseg.groups.image((512, 512)))
    yield at_most(
        "Calibrator.update, image-wise (binned)",
        "probs.gather(1, labels)",
        None,
        lambda: pooled.update(probs, labels),
        lambda: probs.gather(1, labels.unsqueeze(1)),
    )


def small_calibration() -> Iterator[Row]:
    probs = torch.rand(32, 21, 256, 256)
    labels = torch.randint(21, (32, 256, 256))

    def ours() -> object:
        calibrator = cpseg.Calibrator(cpseg.groups.pixel((256, 256)), max_images=32)
        for image, truth in zip(probs, labels, strict=True):
            calibrator.update(image, truth)
        return calibrator.compute()

    def stacked() -> torch.Tensor:
        maps = []
        for image, truth in zip(probs, labels, strict=True):
            one_hot = torch.nn.functional.one_hot(truth, 21).permute(2, 0, 1).bool()
            maps.append((1 - image).masked_fill(~one_hot, torch.nan))
        return torch.stack(maps)

    def parts(rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """nanquantile accepts at most 16 million elements."""
        return iter(rows.split(2**24 // len(rows), dim=1))

    def curves() -> object:
        """Like the Kandinsky code: each class separately, 100 levels over the images."""
        levels = torch.linspace(0, 1, 100)
        rows = stacked().flatten(1)
        return [part.nanquantile(levels, dim=0) for part in parts(rows)]

    def one_level() -> object:
        """Like the description of ConformalSAM: images and classes in one stack, one level."""
        rows = stacked().flatten(0, 1).flatten(1)
        return [part.nanquantile(0.95, dim=0) for part in parts(rows)]

    ours()
    for title, published in (("100 levels a class", curves), ("one level", one_level)):
        found = []
        for _ in range(5):
            start = time.perf_counter()
            published()
            middle = time.perf_counter()
            ours()
            found.append((middle - start) / (time.perf_counter() - middle))
        low, median, high = statistics.quantiles(found, n=4)
        yield Row(
            f"32x21x256x256 pixel-wise, times faster than {title}",
            "stack + nanquantile",
            ">= 100x",
            median,
            low,
            high,
            median >= 100,
            "5 rounds",
        )


def learned_groups() -> Iterator[Row]:
    """Seconds, not a ratio: the published annuli compare all pairs of pixels, here 3.4e10."""
    place = torch.stack(torch.meshgrid(*2 * [torch.linspace(-1, 1, 512)], indexing="ij"))
    radius = place.square().sum(0).sqrt()
    scores = (torch.rand(20, 512, 512) * (0.2 + 0.5 * radius)).clamp(max=1)
    curves = cpseg.groups.curves(scores, levels=100)
    for name, learn in (("k-means", cpseg.groups.kmeans), ("annuli", cpseg.groups.annuli)):
        seconds = []
        for seed in range(3):
            start = time.perf_counter()
            learn(curves, 10, generator=torch.Generator().manual_seed(seed))
            seconds.append(time.perf_counter() - start)
        low, median, high = sorted(seconds)
        yield Row(
            f"{name}, 512x512, 100 levels, 10 groups, seconds",
            "all pairs of pixels",
            "<= 30 s",
            median,
            low,
            high,
            median <= 30,
            "3 rounds, whatever the number of images behind the curves",
        )


def sum_training() -> Iterator[Row]:
    """Loss and prompts of SUM at the sizes of SAM's masks: 8 of 512 x 512, 64 of 1024 x 1024."""
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    logits = (3 * torch.randn(8, 1, 512, 512)).requires_grad_()
    targets = (torch.rand(8, 1, 512, 512) < 0.4).float()
    uncertainty = torch.rand(8, 1, 512, 512)

    def step(loss: Callable[[], torch.Tensor]) -> None:
        logits.grad = None
        loss().backward()

    for title, unsure in (("", None), (" with uncertainty", uncertainty)):
        yield at_most(
            f"sum_loss{title}, forward + backward, 8x1x512x512",
            "binary_cross_entropy_with_logits",
            3,
            lambda u=unsure: step(lambda: cpseg.sum_loss(logits, targets, uncertainty=u)),
            lambda: step(lambda: bce(logits, targets)),
            31,
        )
    masks, predictions = torch.rand(2, 64, 1024, 1024) < 0.3
    unsure = torch.rand(64, 1024, 1024)
    generator = torch.Generator().manual_seed(0)
    for title, other in (("first", None), ("correction", predictions)):
        seconds = []
        for _ in range(9):
            start = time.perf_counter()
            cpseg.sample_prompts(masks, other, uncertainty=unsure, generator=generator)
            seconds.append(time.perf_counter() - start)
        low, median, high = statistics.quantiles(seconds[1:], n=4)
        yield Row(
            f"sample_prompts, {title}, 64 masks of 1024x1024, seconds",
            "-",
            "<= 0.2 s",
            median,
            low,
            high,
            median <= 0.2,
            "8 rounds, uncertainty checked",
        )


def online_threshold() -> Iterator[Row]:
    """Time that a conformal threshold adds to a training step: SegFormer-B0, 4 images 240 x 180."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=21)).train()
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = torch.randn(4, 3, 180, 240), torch.randint(21, (4, 180, 240))

    def logits() -> torch.Tensor:
        small = model(images).logits
        return torch.nn.functional.interpolate(small, (180, 240), mode="bilinear")

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(logits(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    seen = logits().detach()
    for per_class in (False, True):
        cal = cpseg.OnlineThreshold(21, per_class=per_class)
        found = ratios(lambda c=cal: c.update(seen, labels).gate(seen), step, 9)
        median, low, high = (100 * ratio for ratio in found[:3])
        yield Row(
            f"OnlineThreshold update + gate{', per class' * per_class}, 4x21x180x240, percent",
            "training step of SegFormer-B0",
            "<= 2 %",
            median,
            low,
            high,
            median <= 2,
            f"reference {found[3]:.3g} ms",
        )


_MEMORY = """
import sys, time
import torch, cpseg

def highest():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

images = int(sys.argv[1])
torch.rand(1, 512, 512).topk(1)
base = highest()
calibrator = cpseg.Calibrator(cpseg.groups.pixel((512, 512)), alpha=0.05, max_images=10582)
start = time.perf_counter()
for _ in range(images):
    calibrator.update_scores(torch.rand(1, 512, 512))
seconds = time.perf_counter() - start
calibrator.compute()
print((highest() - base) * 1024 / 1e9, seconds)
"""


def memory(images: int) -> Iterator[Row]:
    text = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(images)], capture_output=True, text=True, check=True
    ).stdout
    peak, seconds = (float(value) for value in text.split())
    yield Row(
        "peak memory, max_images=10582, 512x512, alpha 0.05, GB",
        "stacked scores: 11.1 GB; with K=21: 233 GB",
        "<= 0.7 GB",
        peak,
        peak,
        peak,
        peak <= 0.7,
        f"growth of the process over {images} images and compute; {1e3 * seconds / images:.1f} ms "
        "an image, making the scores included",
    )


def importing() -> Iterator[Row]:
    def run(module: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        return time.perf_counter() - start

    run("cpseg")
    pairs = [(run("torch"), run("cpseg")) for _ in range(9)]
    low, median, high = statistics.quantiles([ours / theirs for theirs, ours in pairs], n=4)
    yield Row(
        "import cpseg",
        "import torch",
        "<= 1.1x",
        median,
        low,
        high,
        median <= 1.1,
        f"reference {statistics.median(theirs for theirs, _ in pairs):.2f} s",
    )


def starting() -> Iterator[Row]:
    """Commands that need no tensor: seconds, not a ratio."""
    for words in (["--help"], ["--version"], ["label", "--no-such-option"]):
        seconds = []
        for _ in range(9):
            start = time.perf_counter()
            command = [sys.executable, "-m", "cpseg", *words]
            subprocess.run(command, capture_output=True, check=False)
            seconds.append(time.perf_counter() - start)
        low, median, high = statistics.quantiles(seconds, n=4)
        name = f"cpseg {' '.join(words)}, seconds"
        yield Row(name, "-", "<= 0.3 s", median, low, high, median <= 0.3)


def recalibration() -> Iterator[Row]:
    """Recalibration and selection against the matrix product alone, and a complete fit."""
    for num_classes in (21, 150):
        probs = torch.rand(1, num_classes, 512, 512).softmax(1)
        generator = torch.Generator().manual_seed(0)
        recalibration = cpseg.Recalibration(
            torch.eye(num_classes)
            + 0.05 * torch.randn(num_classes, num_classes, generator=generator),
            torch.zeros(num_classes),
            torch.full((num_classes,), 1 / num_classes, dtype=torch.float64),
            method="dirichlet",
            scores="softmax",
            context=(),
            num_source=num_classes,
            num_images=1,
            strength=0.1,
        )
        logs = probs.log().flatten(2)
        yield at_most(
            f"Recalibration.evidence K={num_classes}, 512x512",
            "the product W log p, logs given",
            1.5,
            lambda r=recalibration, p=probs: r.evidence(p, background=0),
            lambda r=recalibration, f=logs: torch.matmul(r.weight, f),
            21 if num_classes < 100 else 9,
        )
        yield at_most(
            f"Recalibration.evidence K={num_classes}, 512x512",
            "one pass of log",
            3,
            lambda r=recalibration, p=probs: r.evidence(p, background=0),
            lambda p=probs: p.log(),
            21 if num_classes < 100 else 9,
        )
        yield at_most(
            f"Recalibration.evidence K={num_classes}, 512x512",
            "log, product, softmax and evidence over whole arrays",
            None,
            lambda r=recalibration, p=probs: r.evidence(p, background=0),
            lambda r=recalibration, p=probs: cpseg.evidence(
                torch.matmul(r.weight, p.clamp(min=1e-4).log().flatten(2))
                .softmax(1)
                .reshape(p.shape),
                background=0,
            ),
            21 if num_classes < 100 else 9,
        )
    for context in ("none", "auto"):
        text = subprocess.run(
            [sys.executable, "-c", _FIT, context], capture_output=True, text=True, check=True
        ).stdout
        seconds, peak = (float(value) for value in text.split())
        yield Row(
            f"Recalibrator, 100 images 21x512x512, context {context}, seconds",
            "-",
            "<= 60 s and 2 GB",
            seconds,
            seconds,
            seconds,
            seconds <= 60 and peak <= 2,
            f"updates and fit; peak of the process {peak:.2f} GB",
        )


_FIT = """
import sys, time
import torch, cpseg

generator = torch.Generator().manual_seed(0)
weight = 0.7 * torch.eye(21) + 0.2 * torch.randn(21, 21, generator=generator)
recalibrator = cpseg.Recalibrator(21, context=() if sys.argv[1] == "none" else sys.argv[1])
seconds = 0.0
for _ in range(100):
    z = 2 * torch.randn(1, 21, 16, 16, generator=generator)
    z = torch.nn.functional.interpolate(z, (512, 512), mode="bilinear")
    z += 0.7 * torch.randn(z.shape, generator=generator)
    noise = torch.empty_like(z).exponential_(generator=generator).log_()
    labels = (torch.einsum("ks,bshw->bkhw", weight, z) - noise).argmax(1)
    probs = z.softmax(1)
    start = time.perf_counter()
    recalibrator.update(probs, labels)
    seconds += time.perf_counter() - start
start = time.perf_counter()
recalibrator.fit()
seconds += time.perf_counter() - start
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(seconds, peak * 1024 / 1e9)
"""


def write_data(root: Path, images: int, classes: int, side: int) -> cpseg.Calibration:
    """Images, smooth scores in uint8, ``ids.txt``, and a calibration that keeps most pixels."""
    import numpy as np
    from PIL import Image

    (root / "images").mkdir()
    (root / "probs").mkdir()
    for number in range(images):
        coarse = 3 * torch.randn(1, classes, side // 16, side // 16)
        smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
        noisy = (smooth + 0.3 * torch.randn(1, classes, side, side))[0].softmax(0)
        stored = (255 * noisy).round().to(torch.uint8).numpy()
        np.savez_compressed(root / f"probs/{number:02d}.npz", probs=stored)
        Image.new("RGB", (side, side)).save(root / f"images/{number:02d}.png")
    lines = [f"images/{number:02d}.png\n" for number in range(images)]
    (root / "ids.txt").write_text("".join(lines))
    return cpseg.Calibration(
        torch.full((side, side), 0.9),
        torch.full((side, side), 1000),
        alpha=0.05,
        num_images=1000,
        background=0,
        num_classes=classes,
    )


def label_command() -> Iterator[Row]:
    """``cpseg label`` from files to files, beside reading and writing them without it."""
    import shutil
    import tempfile

    import numpy as np
    from PIL import Image

    from cpseg.files.dataset import Source
    from cpseg.jobs.label import label

    images, side, classes = 16, 512, 21
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        calibration = write_data(root, images, classes, side)
        names = (root / "ids.txt").read_text().split()
        label(Source(root, root / "probs"), root / "ids.txt", calibration, root / "made")
        masks = [Image.open(root / "made" / "masks" / name).copy() for name in names]

        def files_alone() -> None:
            for number, mask in enumerate(masks):
                with np.load(root / f"probs/{number:02d}.npz") as stored:
                    _ = stored["probs"]
                mask.save(root / f"{number:02d}.png")

        def labelled(workers: int) -> Callable[[], None]:
            def run() -> None:
                shutil.rmtree(root / "out", ignore_errors=True)
                source = Source(root, root / "probs", workers=workers)
                label(source, root / "ids.txt", calibration, root / "out")

            return run

        torch.set_num_threads(1)
        name = f"cpseg label, {images} maps of {classes}x{side}x{side}, uint8"
        yield at_most(name, "reading and writing alone", 1.5, labelled(1), files_alone, rounds=7)
        median, low, high, base = ratios(labelled(1), labelled(2), rounds=7)
        note = f"with two workers {base / images:.0f} ms an image"
        yield Row(name, "two workers", ">= 1.8x faster", median, low, high, median >= 1.8, note)
    torch.set_num_threads(threads)


def processor() -> str:
    """The name of the processor, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    by_name = {name.strip(): value.strip() for name, value in facts.items()}
    widest = [kind for kind in ("avx512f", "avx2") if kind in by_name.get("flags", "").split()]
    return " ".join([by_name.get("model name", platform.machine()), *widest[:1]])


def facts_of_this_run() -> dict[str, object]:
    """Commit, versions and machine."""
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "cpseg": cpseg.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": [round(load, 1) for load in os.getloadavg()],
    }


def keep(name: str, facts: dict[str, object], rows: list[Row]) -> Path:
    """Add rows to the file of a machine; those of the same name and reference are replaced."""
    path = HERE / "machines" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    by_name = {(row["name"], row["reference"]): row for row in kept}
    of_run = {key: facts[key] for key in ("commit", "date", "load")}
    by_name |= {(row.name, row.reference): asdict(row) | of_run for row in rows}
    of_machine = {key: value for key, value in facts.items() if key not in of_run}
    path.write_text(json.dumps(of_machine | {"rows": list(by_name.values())}, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("word", nargs="?", default="", help="only benchmarks named so")
    parser.add_argument("--full", action="store_true", help="memory with all 10,582 images")
    parser.add_argument("--machine", help="name of the machine whose file takes the rows")
    arguments = parser.parse_args()
    benchmarks: dict[str, Callable[[], Iterator[Row]]] = {
        "selection": lambda: selection("cpu"),
        "compiled_sequence": compiled_sequence,
        "shapes": shapes,
        "busy_cores": busy_cores,
        "update": update,
        "small_calibration": small_calibration,
        "learned_groups": learned_groups,
        "recalibration": recalibration,
        "sum": sum_training,
        "online": online_threshold,
        "label": label_command,
        "lists": lists,
        "memory": lambda: memory(10582 if arguments.full else 700),
        "import": importing,
        "starting": starting,
    }
    if torch.cuda.is_available():
        benchmarks["selection_cuda"] = lambda: selection("cuda")
    torch.manual_seed(0)
    rows = []
    print("| what | against | target | median | quartiles | |\n|---|---|---|---:|---:|---|")
    for name, benchmark in benchmarks.items():
        if arguments.word not in name:
            continue
        for row in benchmark():
            rows.append(row)
            missed = "" if row.reached else "**missed** "
            print(
                f"| {row.name} | {row.reference} | {row.target} | {row.median:.2f} | "
                f"{row.low:.2f} to {row.high:.2f} | {missed}{row.note} |",
                flush=True,
            )
    facts = facts_of_this_run()
    if arguments.machine is not None:
        print(f"\n{keep(arguments.machine, facts, rows).relative_to(HERE.parent)}")
    path = HERE / "results" / f"{time.strftime('%Y%m%d-%H%M%S')}-{facts['commit']}.json"
    path.parent.mkdir(exist_ok=True)
    everything = facts | {"rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(everything, indent=2) + "\n")
    print(f"\n{path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
