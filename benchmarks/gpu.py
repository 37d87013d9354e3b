"""Measure cpseg on a CUDA card: one call, one table, less than 8 minutes.

Subject and reference run in turns in one process. Times are those of the card, by CUDA events: the
card first clears a large buffer, which empties its cache and lasts longer than Python takes to
launch what is timed. A row is the median over the rounds, with its quartiles. Rows that miss their
target, fail, or find no time are shown as well.

    python benchmarks/gpu.py                  all rows, JSON to benchmarks/results/
    python benchmarks/gpu.py update           the rows whose name contains a word
    python benchmarks/gpu.py --machine h100   also keeps the rows in benchmarks/machines/h100.json
    python benchmarks/gpu.py --dry-run        every row on the CPU with tiny sizes: tests the script

Shares of bandwidth count the bytes that must move: scores and thresholds read, labels written; a
copy reads and writes all scores. The rows of the Triton kernel need the package ``triton``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cpseg
from run import HERE, Row, facts_of_this_run, keep, write_data

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
SHARE = 0.8  # of the bandwidth of a copy
MOST = 90  # seconds of a row, compiling included
BUFFER = 2**29  # bytes that the card clears before what is timed: more than its cache


@dataclass
class Found:
    """What a row measured: a value for every round."""

    values: Sequence[float]
    note: str = ""


@dataclass
class Case:
    """A row to be measured: what, against what, and the largest (or least) value wanted."""

    name: str
    reference: str
    measure: Callable[[], Found]
    most: float | None = None
    least: float | None = None
    unit: str = ""

    @property
    def target(self) -> str:
        if self.least is not None:
            return f">= {self.least:g}{self.unit}"
        return "-" if self.most is None else f"<= {self.most:g}{self.unit}"

    def reached(self, median: float) -> bool:
        if self.least is not None:
            return median >= self.least
        return self.most is None or median <= self.most


class Bench:
    """A device, the sizes to measure at, and a clock for what runs on it."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device = device
        self.cuda = device == "cuda"
        self.seconds = seconds  # of the rounds of a row, warming up left out
        self.side = 512 if self.cuda else 16
        self.least, self.most = (7, 201) if self.cuda else (3, 3)
        self._buffer = torch.empty(BUFFER if self.cuda else 1, dtype=torch.uint8, device=device)
        self._clearing = 0.0  # milliseconds that one clearing takes
        if self.cuda:
            points = [self._record()]
            for _ in range(6):
                self._buffer.zero_()
                points.append(self._record())
            self.wait()
            self._clearing = max(0.01, self._between(points[1], points[-1]) / 5)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _record(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Any, last: Any) -> float:
        return first.elapsed_time(last) if self.cuda else 1e3 * (last - first)

    def calls(self, *functions: Callable[[], object]) -> list[float]:
        """Milliseconds from a call to the end of its work, for each, with nothing else to do."""
        found = []
        for function in functions:
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            found.append(1e3 * (time.perf_counter() - start))
        return found

    def rounds(
        self, *functions: Callable[[], object], most: int | None = None
    ) -> list[list[float]]:
        """Milliseconds of the functions in turns, a list for each; no more rounds than ``most``."""
        for _ in range(2 if self.cuda else 1):
            self.calls(*functions)
        head = 1
        if self.cuda:
            head = min(40, 1 + math.ceil(2 * max(self.calls(*functions)) / self._clearing))
        found: list[list[float]] = [[] for _ in functions]
        most = self.most if most is None else min(most, self.most)
        end = time.perf_counter() + self.seconds
        while len(found[0]) < most and (len(found[0]) < self.least or time.perf_counter() < end):
            points = []
            for function in functions:
                for _ in range(head if self.cuda else 0):
                    self._buffer.zero_()
                first = self._record()
                function()
                points.append((first, self._record()))
            self.wait()
            for values, (first, last) in zip(found, points, strict=True):
                values.append(self._between(first, last))
        return found

    def ratio(self, subject: Callable[[], object], reference: Callable[[], object]) -> Found:
        """Time of the subject / time of the reference."""
        base, found = self.rounds(reference, subject)
        (call,) = self.calls(subject)
        note = f"reference {statistics.median(base):.3g} ms; a call to its end {call:.3g} ms"
        return Found([a / b for a, b in zip(found, base, strict=True)], note)

    def alone(self, subject: Callable[[], object]) -> Found:
        """Milliseconds."""
        (found,) = self.rounds(subject)
        (call,) = self.calls(subject)
        return Found(found, f"a call to its end {call:.3g} ms")


class Missing(Exception):
    """Something that a row needs is not there."""


@cache
def triton_kernel() -> Any:
    """The module of the experiment."""
    try:
        import triton_selection
    except ModuleNotFoundError as error:
        raise Missing(f"no module {error.name}") from None
    return triton_selection


def selection(bench: Bench, kinds: Sequence[str] = ("eager", "torch.compile")) -> Iterator[Case]:
    """``pseudo_labels`` as it is, compiled, and as one kernel of Triton."""

    @lru_cache(maxsize=1)
    def inputs(num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        classes = num_classes if bench.cuda else round(num_classes**0.5)  # interpreted: slow
        probs = torch.rand(2, classes, bench.side, bench.side, device=bench.device)
        stored = (255 * probs).round() if dtype == torch.uint8 else probs
        return stored.to(dtype), torch.rand(bench.side, bench.side, device=bench.device)

    def eager(probs: Tensor, threshold: Tensor) -> Tensor:
        if probs.dtype == torch.uint8:
            probs = probs.float() / 255
        return cpseg.pseudo_labels(probs, threshold, background=0)

    @lru_cache(maxsize=1)
    def compiled(num_classes: int, dtype: torch.dtype) -> Callable[..., Tensor]:
        torch._dynamo.reset()  # more than a few versions of one function are not compiled
        backend = "inductor" if bench.cuda else "eager"
        return torch.compile(eager, fullgraph=True, dynamic=False, backend=backend)

    @lru_cache(maxsize=1)
    def kernel(num_classes: int, dtype: torch.dtype) -> tuple[Callable[..., Tensor], int]:
        """The kernel with the best of some sizes of a program."""
        module = triton_kernel()
        probs, threshold = inputs(num_classes, dtype)

        def call(block: int) -> Callable[..., Tensor]:
            return lambda p, t: module.pseudo_labels(p, t, background=0, block=block)

        blocks = module.BLOCKS if bench.cuda else module.BLOCKS[:1]
        calls = {block: call(block) for block in blocks}
        tries = [lambda f=function: f(probs, threshold) for function in calls.values()]
        times = map(statistics.median, bench.rounds(*tries, most=9))
        block = min(zip(times, calls, strict=True))[1]
        return calls[block], block

    def share(kind: str, num_classes: int, dtype: torch.dtype) -> Found:
        probs, threshold = inputs(num_classes, dtype)
        block, function = "", eager
        if kind == "torch.compile":
            function = compiled(num_classes, dtype)
        elif kind == "Triton":
            function, size = kernel(num_classes, dtype)
            block = f"; {size} pixels a program"
        target = torch.empty_like(probs)
        labels = function(probs, threshold)
        same = torch.equal(labels, eager(probs, threshold))
        base, found = bench.rounds(lambda: target.copy_(probs), lambda: function(probs, threshold))
        (call,) = bench.calls(lambda: function(probs, threshold))
        scores = probs.nbytes
        needed = (scores + threshold.nbytes + labels.nbytes) / (2 * scores)
        values = [needed * copy / time for copy, time in zip(base, found, strict=True)]
        copy = statistics.median(base)
        note = (
            f"{statistics.median(found):.3g} ms, copy {copy:.3g} ms "
            f"({2 * scores / copy / 1e6:.0f} GB/s); a call to its end {call:.3g} ms{block}"
        )
        return Found(values, note if same else f"**other labels than eager**; {note}")

    def against(num_classes: int, dtype: torch.dtype) -> Found:
        probs, threshold = inputs(num_classes, dtype)
        ours, _ = kernel(num_classes, dtype)
        theirs = compiled(num_classes, dtype)
        return bench.ratio(lambda: ours(probs, threshold), lambda: theirs(probs, threshold))

    for num_classes in (21, 150):
        for dtype in DTYPES:
            name = f"selection, 2x{num_classes}x512x512, {str(dtype).removeprefix('torch.')}"
            for kind in kinds:
                yield Case(
                    f"{name}, {kind}",
                    "bandwidth of a device copy",
                    lambda k=kind, n=num_classes, d=dtype: share(k, n, d),
                    least=SHARE,
                )
            if "Triton" in kinds:
                yield Case(
                    f"{name}, time of Triton",
                    "torch.compile",
                    lambda n=num_classes, d=dtype: against(n, d),
                )


def update(bench: Bench) -> Iterator[Case]:
    """``Calibrator.update``, pixel by pixel, against reading the scores of the labels alone."""
    size, steps = (bench.side, bench.side), 96 if bench.cuda else 4

    @cache
    def inputs() -> tuple[Tensor, Tensor]:
        probs = torch.rand(1, 21, *size, device=bench.device)
        return probs, torch.randint(21, (1, *size), device=bench.device)

    def gather() -> Tensor:
        probs, labels = inputs()
        return probs.gather(1, labels.unsqueeze(1))

    def calibrator() -> cpseg.Calibrator:
        groups = cpseg.groups.pixel(size).to(bench.device)
        return cpseg.Calibrator(groups, max_images=1000)

    def one() -> Found:
        ours = calibrator()
        return bench.ratio(lambda: ours.update(*inputs()), gather)

    def many() -> None:
        ours = calibrator()
        for _ in range(steps):
            ours.update(*inputs())

    name = "Calibrator.update, pixel-wise, 1x21x512x512"
    yield Case(name, "probs.gather(1, labels)", one, most=2.5, unit="x")
    yield Case(
        f"{name}, {steps} updates of max_images=1000, all included",
        f"{steps} gathers",
        lambda: bench.ratio(many, lambda: [gather() for _ in range(steps)]),
    )


def recalibration(bench: Bench) -> Iterator[Case]:
    """``Recalibration.evidence`` against its matrix product."""

    def measure(num_classes: int) -> Found:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(num_classes, num_classes, generator=generator)
        ours = cpseg.Recalibration(
            torch.eye(num_classes) + 0.05 * noise,
            torch.zeros(num_classes),
            torch.full((num_classes,), 1 / num_classes, dtype=torch.float64),
            method="dirichlet",
            scores="softmax",
            context=(),
            num_source=num_classes,
            num_images=1,
            strength=0.1,
        ).to(bench.device)
        probs = torch.rand(1, num_classes, bench.side, bench.side, device=bench.device).softmax(1)
        logs = probs.log().flatten(2)
        return bench.ratio(
            lambda: ours.evidence(probs, background=0), lambda: torch.matmul(ours.weight, logs)
        )

    for num_classes in (21, 150):
        yield Case(
            f"Recalibration.evidence K={num_classes}, 512x512",
            "the product W log p, logs given",
            lambda n=num_classes: measure(n),
            most=1.5,
            unit="x",
        )


def sum_training(bench: Bench) -> Iterator[Case]:
    """``sum_loss`` with its gradient, at the size of eight masks of SAM."""
    bce = torch.nn.functional.binary_cross_entropy_with_logits

    def measure(unsure: bool) -> Found:
        shape = (8, 1, bench.side, bench.side)
        logits = (3 * torch.randn(shape, device=bench.device)).requires_grad_()
        targets = (torch.rand(shape, device=bench.device) < 0.4).float()
        uncertainty = torch.rand(shape, device=bench.device) if unsure else None

        def step(loss: Callable[[], Tensor]) -> None:
            logits.grad = None
            loss().backward()

        return bench.ratio(
            lambda: step(lambda: cpseg.sum_loss(logits, targets, uncertainty=uncertainty)),
            lambda: step(lambda: bce(logits, targets)),
        )

    for unsure in (False, True):
        yield Case(
            f"sum_loss{' with uncertainty' * unsure}, forward + backward, 8x1x512x512",
            "binary_cross_entropy_with_logits",
            lambda u=unsure: measure(u),
            most=3,
            unit="x",
        )


def online(bench: Bench) -> Iterator[Case]:
    """``OnlineThreshold``: milliseconds that it adds to a step."""

    def measure(per_class: bool) -> Found:
        size = (bench.side, bench.side)
        logits = torch.randn(4, 21, *size, device=bench.device)
        labels = torch.randint(21, (4, *size), device=bench.device)
        ours = cpseg.OnlineThreshold(21, per_class=per_class)
        return bench.alone(lambda: ours.update(logits, labels).gate(logits))

    for per_class in (False, True):
        yield Case(
            f"OnlineThreshold.update + gate{', per class' * per_class}, 4x21x512x512, ms",
            "-",
            lambda p=per_class: measure(p),
        )


def boundary(bench: Bench) -> Iterator[Case]:
    def measure() -> Found:
        shape = (4, bench.side, bench.side)
        coarse = torch.randn(4, 21, *2 * [bench.side // 16], device=bench.device)
        labels = torch.nn.functional.interpolate(coarse, shape[1:], mode="bilinear").argmax(1)
        noise = torch.rand(shape, device=bench.device) < 0.05
        predictions = torch.where(noise, 0, labels)
        return bench.alone(lambda: cpseg.boundary_iou(predictions, labels, num_classes=21))

    yield Case("boundary_iou, 4x512x512, 21 classes, ms", "-", measure)


def label_command(bench: Bench) -> Iterator[Case]:
    """``cpseg label`` from files to files: the CPU decodes, the device selects."""
    from cpseg.cli import main as command

    images, classes, side = (16 if bench.cuda else 3), 21, bench.side

    def write(root: Path) -> None:
        write_data(root, images, classes, side).save(root / "rule.safetensors")

    def run(root: Path, device: str, out: str) -> None:
        shutil.rmtree(root / out, ignore_errors=True)
        given = {"root": ".", "ids": "ids.txt", "probs": "probs", "calibration": "rule.safetensors"}
        parts = [(f"--{name}", str(root / value)) for name, value in given.items()]
        words = ["label", *(word for part in parts for word in part), "--device", device]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = command([*words, "-o", str(root / out)])
        if code:
            raise RuntimeError(f"cpseg label: {said.getvalue().strip()[-300:]}")

    def measure() -> Found:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write(root)
            calls = {device: (root, device, f"out-{device}") for device in ("cpu", bench.device)}
            ours, theirs = calls[bench.device], calls["cpu"]
            run(*ours)
            found: list[float] = []
            base: list[float] = []
            for _ in range(5 if bench.cuda else 2):
                both = bench.calls(lambda: run(*theirs), lambda: run(*ours))
                base.append(both[0] / images)
                found.append(both[1] / images)
            masks = [sorted((root / call[2]).rglob("*.png")) for call in (ours, theirs)]
            equal = all(a.read_bytes() == b.read_bytes() for a, b in zip(*masks, strict=True))
        note = f"--device cpu {statistics.median(base):.3g} ms, in turns; masks "
        return Found(found, note + ("are equal" if equal else "**differ**"))

    name = f"cpseg label --device {bench.device}, {images} maps of 21x512x512, uint8, ms an image"
    yield Case(name, "-", measure)


def waiting(bench: Bench) -> Iterator[Case]:
    """Whether a step waits for the device: 1 or 0, by the debug mode of PyTorch."""
    size = (bench.side, bench.side)

    @cache
    def inputs() -> dict[str, Tensor]:
        def rand(*shape: int) -> Tensor:
            return torch.rand(shape, device=bench.device)

        return {
            "probs": rand(1, 21, *size),
            "labels": torch.randint(21, (1, *size), device=bench.device),
            "threshold": rand(*size),
            "per class": rand(21, *size),
            "logits": rand(8, 1, *size).requires_grad_(),
            "targets": rand(8, 1, *size).round(),
            "uncertainty": rand(8, 1, *size),
        }

    def select(threshold: str) -> Callable[[], object]:
        data = inputs()
        return lambda: cpseg.pseudo_labels(data["probs"], data[threshold], background=0)

    def calibrate() -> Callable[[], object]:
        data = inputs()
        ours = cpseg.Calibrator(cpseg.groups.pixel(size).to(bench.device), max_images=1000)
        return lambda: ours.update(data["probs"], data["labels"])

    def step(part: str, per_class: bool) -> Callable[[], object]:
        data = inputs()
        ours = cpseg.OnlineThreshold(21, per_class=per_class)
        ours.update(data["probs"], data["labels"])
        if part == "gate":
            return lambda: ours.gate(data["probs"])
        return lambda: ours.update(data["probs"], data["labels"])

    def loss(uncertainty: str) -> Callable[[], object]:
        data = inputs()
        return lambda: cpseg.sum_loss(
            data["logits"], data["targets"], uncertainty=data.get(uncertainty)
        ).backward()

    def measure(make: Callable[[], Callable[[], object]], steps: int) -> Found:
        function = make()
        function()  # the first step may move things to the device
        bench.wait()
        if not bench.cuda:
            function()
            raise Missing("the steps ran; only a card knows whether they wait")
        waits, said = 0.0, "no"
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(steps):
                function()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            waits, said = 1.0, f"yes: {str(error).splitlines()[0]}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return Found([waits, waits], said)

    cases: list[tuple[str, Callable[[], Callable[[], object]], int]] = [
        ("pseudo_labels", lambda: select("threshold"), 3),
        ("pseudo_labels, thresholds per class", lambda: select("per class"), 3),
        # More steps than images wait to be absorbed.
        ("Calibrator.update, max_images=1000", calibrate, 100),
        ("OnlineThreshold.update", lambda: step("update", False), 3),
        ("OnlineThreshold.update, per class", lambda: step("update", True), 3),
        ("OnlineThreshold.gate", lambda: step("gate", False), 3),
        ("OnlineThreshold.gate, per class", lambda: step("gate", True), 3),
        ("sum_loss, forward + backward", lambda: loss("none"), 3),
        ("sum_loss with uncertainty, forward + backward", lambda: loss("uncertainty"), 3),
    ]
    for name, make, steps in cases:
        yield Case(
            f"{name}: waits for the device",
            "set_sync_debug_mode('error')",
            lambda m=make, s=steps: measure(m, s),
            most=0,
        )


BENCHMARKS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "waiting": waiting,
    "selection": selection,
    "update": update,
    "recalibration": recalibration,
    "sum": sum_training,
    "online": online,
    "boundary": boundary,
    "label": label_command,
    # Last: a mistake of the experiment could stop the card for every later row.
    "triton": lambda bench: selection(bench, ("Triton",)),
}


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer, where the system has such an alarm."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds:.0f} s")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(case: Case, seconds: float) -> Row:
    """The row of a case; NaN with the reason in words where it was not measured."""
    nothing = (math.nan, math.nan, math.nan, False)
    if seconds <= 0:
        return Row(case.name, case.reference, case.target, *nothing, "not measured: out of time")
    try:
        with at_most(seconds):
            found = case.measure()
    except (Missing, TimeoutError) as error:
        return Row(case.name, case.reference, case.target, *nothing, f"not measured: {error}")
    except Exception as error:
        # The other rows are wanted: a card may be there only once.
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300].replace("|", "/")
        return Row(case.name, case.reference, case.target, *nothing, f"failed: {words}")
    low, median, high = statistics.quantiles(found.values, n=4, method="inclusive")
    reached = case.reached(median)
    return Row(case.name, case.reference, case.target, median, low, high, reached, found.note)


def line(row: Row) -> str:
    """A row of the table."""
    if math.isnan(row.median):
        return f"| {row.name} | {row.reference} | {row.target} | - | - | {row.note} |"
    missed = "" if row.reached else "**missed** "
    return (
        f"| {row.name} | {row.reference} | {row.target} | {row.median:.3g} | "
        f"{row.low:.3g} to {row.high:.3g} | {missed}{row.note} |"
    )


def said_by(*words: str) -> str:
    """The first line that a command prints, or nothing."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
        return next(iter(done.stdout.splitlines()), "").strip()
    return ""


def machine(cuda: bool) -> dict[str, object]:
    """Versions, and what the table was measured on."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    facts = facts_of_this_run() | {"triton": triton}
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        driver = said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": driver or "unknown",
        }
    return facts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("word", nargs="?", default="", help="only rows named so")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--seconds", type=float, default=420, help="for all rows (default 420)")
    parser.add_argument(
        "-o", "--output", type=Path, default=HERE / "results", help="folder of the JSON"
    )
    parser.add_argument("--machine", help="name of the machine whose file takes the rows")
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        print(
            "found no CUDA card; --dry-run runs every row on the CPU with tiny sizes",
            file=sys.stderr,
        )
        return 2
    start = time.perf_counter()
    if given.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    torch.manual_seed(0)
    bench = Bench("cpu" if given.dry_run else "cuda", seconds=2)
    facts = machine(bench.cuda)
    if given.dry_run:
        print("dry run on the CPU with tiny sizes: the numbers mean nothing\n")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print("\n| what | against | target | median | quartiles | |\n|---|---|---|---:|---:|---|")
    rows = []
    for benchmark in BENCHMARKS.values():
        for case in benchmark(bench):
            if given.word in case.name:
                left = given.seconds - (time.perf_counter() - start)
                rows.append(measured(case, min(left, MOST)))
                print(line(rows[-1]), flush=True)
    seconds = time.perf_counter() - start
    written = [
        {name: None if value != value else value for name, value in asdict(row).items()}
        for row in rows
    ]
    facts |= {"dry_run": given.dry_run, "seconds": round(seconds, 1), "rows": written}
    path = given.output / f"{time.strftime('%Y%m%d-%H%M%S')}-{facts['commit']}-gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n")
    if given.machine is not None and not given.dry_run:
        kept = [row for row in rows if not math.isnan(row.median)]
        print(f"\n{keep(given.machine, machine(bench.cuda), kept)}")
    print(f"\n{len(rows)} rows in {seconds:.0f} s, {path}")
    return int(any(row.note.startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
