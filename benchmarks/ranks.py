"""Measure what several ranks cost: time and memory of each, and the bytes that they send.

The same simulated images are dealt to 1, 2, 4 and 8 processes (gloo, one thread each), which update
and synchronise. The thresholds must be those of one rank, bit for bit, or the script fails. The
scores are made once per rank and used again under other ids and with other labels, so that the
time is the library's. On fewer cores than ranks the time that counts is that of the processor.

    python benchmarks/ranks.py                          10,582 images, JSON to benchmarks/results/
    python benchmarks/ranks.py --images 2000 --ranks 1 4
    torchrun --nproc-per-node 8 benchmarks/ranks.py     one row, for ranks on several machines

Bytes and memory are read from /proc, so this needs Linux.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import cpseg
from run import HERE

MAPS = 24  # score maps that a rank makes; image i takes map i % 24 and labels i // 24
ALPHA = 0.05
PIXEL = "Calibrator, pixel-wise"
Measured = dict[str, Any]


class Images:
    """Simulated images, the same on every rank: few score maps, many labels."""

    def __init__(self, count: int, classes: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.count, self.classes, self.size = count, classes, (size, size)
        self.probs = (2 * torch.randn(MAPS, classes, size, size, generator=generator)).softmax(1)
        shape = (-(-min(count, 2**16) // MAPS), size, size)
        self.labels = torch.randint(classes, shape, generator=generator, dtype=torch.uint8)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, str]:
        labels = self.labels[number // MAPS % len(self.labels)]
        return self.probs[number % MAPS], labels.long(), f"{number:07d}"


def of_calibrator(calibrator: cpseg.Calibrator) -> list[Tensor]:
    made = calibrator.compute()
    return [made.threshold, made.count]


def certifier(images: Images) -> cpseg.Certifier:
    """On thresholds of images that are not among those dealt."""
    calibrator = cpseg.Calibrator(cpseg.groups.image(images.size), alpha=0.9)
    for number in range(MAPS):
        probs, labels, _ = images[number]
        calibrator.update(probs, labels, ids=f"set {number}")
    return cpseg.Certifier(calibrator, max_error=0.5)


def of_certifier(made: cpseg.Certifier) -> list[Tensor]:
    return [made.compute().threshold]


def of_recalibrator(made: cpseg.Recalibrator) -> list[Tensor]:
    """The pixels that were drawn, in an order of their own; a fit takes seconds."""
    samples = sorted(made._reservoir.samples, key=lambda sample: sample.digest)
    return [part for sample in samples for part in (sample.count, sample.labels, sample.values)]


def streams(images: Images) -> dict[str, tuple[Callable[[], Any], Callable[[Any], list[Tensor]]]]:
    """What can be synchronised: how it is built, and the tensors that it comes to."""
    size, groups = images.size, cpseg.groups
    return {
        PIXEL: (
            lambda: cpseg.Calibrator(groups.pixel(size), alpha=ALPHA, max_images=images.count),
            of_calibrator,
        ),
        "Calibrator, blocks of 32": (
            lambda: cpseg.Calibrator(groups.blocks(size, 32), alpha=ALPHA),
            of_calibrator,
        ),
        "Calibrator, image-wise": (
            lambda: cpseg.Calibrator(groups.image(size), alpha=ALPHA),
            of_calibrator,
        ),
        "Certifier": (lambda: certifier(images), of_certifier),
        "Recalibrator": (lambda: cpseg.Recalibrator(images.classes), of_recalibrator),
    }


def read(path: str, name: str) -> int:
    """A number of a file like /proc/self/status, in bytes."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * (1024 if line.endswith("kB") else 1)
    raise KeyError(name)


def sent() -> int:
    """Bytes that this process has written; between two barriers, those to other ranks."""
    return read("/proc/self/io", "wchar")


def forget_peak() -> int:
    """Let the peak of the memory begin again; the memory held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return read("/proc/self/status", "VmRSS")


def peak() -> int:
    return read("/proc/self/status", "VmHWM")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock and of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def feed(target: Any, images: Images, numbers: Iterable[int]) -> None:
    for number in numbers:
        probs, labels, name = images[number]
        target.update(probs, labels, ids=name)


def digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def measure(
    name: str, images: Images, count: int, rank: int, world: int, keep: Path | None
) -> Measured:
    """This rank's part of the work, and the sync with the others; what is synced goes to a file."""
    build, result = streams(images)[name]
    mine = range(rank, count, world)
    before = forget_peak()
    target = build()
    together(world)
    wall, processor = timed(lambda: feed(target, images, mine))
    updated = peak()
    if keep is not None:
        keep.write_bytes(pickle.dumps(target))
    forget_peak()
    together(world)
    bytes_before = sent()
    sync_wall, sync_processor = timed(target.sync)
    moved = sent() - bytes_before
    highest = max(updated, peak())
    together(world)
    return {
        "images": len(mine),
        "update_ms": 1e3 * wall / len(mine),
        "update_cpu_ms": 1e3 * processor / len(mine),
        "sync_s": sync_wall,
        "sync_cpu_s": sync_processor,
        "sent_mb": moved / 1e6,
        "growth_update_mb": (updated - before) / 1e6,
        "growth_mb": (highest - before) / 1e6,
        "peak_mb": highest / 1e6,
        "digest": digest(result(target)),
    }


def together(world: int) -> None:
    if world > 1:
        dist.barrier()


def merged(paths: Sequence[Path]) -> Measured:
    """What the ranks held, in one process, merged two by two: the time of the merges alone."""
    parts = [pickle.loads(path.read_bytes()) for path in paths]

    def tree() -> None:
        step = 1
        while step < len(parts):
            for place in range(0, len(parts) - step, 2 * step):
                parts[place].merge(parts[place + step])
            step *= 2

    wall, processor = timed(tree)
    found = digest(of_calibrator(parts[0]))
    return {"merge_s": wall, "merge_cpu_s": processor, "digest": found}


def work(rank: int, world: int, options: argparse.Namespace, folder: str | None) -> None:
    """One rank: measures every stream; the first writes what all of them found."""
    torch.set_num_threads(1)
    if world > 1:
        where = "env://" if folder is None else f"file://{folder}/ranks"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
    images = Images(options.images, options.classes, options.size)
    found: Measured = {"world": world}
    for name in streams(images):
        count = options.images if name == PIXEL else min(options.images, options.others)
        keep = Path(folder, f"{rank}.pickle") if folder is not None and name == PIXEL else None
        own: Any = measure(name, images, count, rank, world, keep)
        everyone: list[Any] = [own]
        if world > 1:
            everyone = [None] * world
            dist.all_gather_object(everyone, own)
        found[name] = everyone
    if folder is None:
        if rank == 0:
            show([found])
    elif rank == 0:
        found["merge"] = merged([Path(folder, f"{each}.pickle") for each in range(world)])
        Path(folder, "found.json").write_text(json.dumps(found))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def median(found: Sequence[Measured], name: str, key: str) -> float:
    """Over rounds, of the median over ranks."""
    return statistics.median(statistics.median(r[key] for r in each[name]) for each in found)


def largest(found: Sequence[Measured], name: str, key: str) -> float:
    """Over rounds, the median of the largest rank."""
    return statistics.median(max(r[key] for r in each[name]) for each in found)


def show(everything: Sequence[Measured]) -> None:
    """The tables, a row for each number of ranks, and whether all of them agree."""
    of_world: dict[int, list[Measured]] = {}
    for each in everything:
        of_world.setdefault(each["world"], []).append(each)
    first = median(next(iter(of_world.values())), PIXEL, "update_cpu_ms")
    print(
        "| ranks | images a rank | update, ms an image: clock | processor | ratio | "
        "sync, s: clock | processor | merged in one process, s | sent by a rank, MB | "
        "growth of a rank, MB: updates | with sync | peak of a rank, MB | thresholds |\n"
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|"
    )
    bits: dict[str, str] = {}
    for world, found in of_world.items():
        processor = median(found, PIXEL, "update_cpu_ms")
        merges = [each["merge"]["merge_cpu_s"] for each in found if "merge" in each]
        print(
            f"| {world} | {largest(found, PIXEL, 'images'):,.0f} | "
            f"{median(found, PIXEL, 'update_ms'):.2f} | {processor:.2f} | "
            f"{processor / first:.2f} | {largest(found, PIXEL, 'sync_s'):.2f} | "
            f"{median(found, PIXEL, 'sync_cpu_s'):.2f} | "
            f"{f'{statistics.median(merges):.2f}' if merges else '-'} | "
            f"{largest(found, PIXEL, 'sent_mb'):.1f} | "
            f"{largest(found, PIXEL, 'growth_update_mb'):.0f} | "
            f"{largest(found, PIXEL, 'growth_mb'):.0f} | {largest(found, PIXEL, 'peak_mb'):.0f} | "
            f"{agree(bits, PIXEL, found)} |"
        )
    names = [name for name in everything[0] if name not in (PIXEL, "world", "merge")]
    print(
        "\n| what | ranks | images together | update, ms an image: processor | sync, s: clock | "
        "sent by a rank, MB | growth of a rank, MB | result |\n"
        "|---|---:|---:|---:|---:|---:|---:|---|"
    )
    for name in names:
        for world, found in of_world.items():
            print(
                f"| {name} | {world} | {sum(r['images'] for r in found[0][name]):,} | "
                f"{median(found, name, 'update_cpu_ms'):.2f} | "
                f"{largest(found, name, 'sync_s'):.3f} | {largest(found, name, 'sent_mb'):.2f} | "
                f"{largest(found, name, 'growth_mb'):.0f} | {agree(bits, name, found)} |"
            )


def agree(bits: dict[str, str], name: str, found: Sequence[Measured]) -> str:
    """Whether all ranks of all rounds came to the same bits as those of the rows before."""
    seen = {rank["digest"] for each in found for rank in each[name]}
    if name == PIXEL:
        seen |= {each["merge"]["digest"] for each in found if "merge" in each}
    known = bits.setdefault(name, min(seen))
    return "the same bits" if seen == {known} else "**differ**"


def save(name: str, rows: object) -> Path:
    """JSON with commit, versions and machine, beside those of ``run.py``."""
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    commit = found.stdout.strip() or "unknown"
    facts = {
        "commit": commit,
        "cpseg": cpseg.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "rows": rows,
    }
    path = HERE / "results" / f"{time.strftime('%Y%m%d-%H%M%S')}-{commit}-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n")
    return path.relative_to(HERE.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=10582, help="images of all ranks together")
    parser.add_argument("--others", type=int, default=500, help="images of the second table")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--size", type=int, default=128, help="side of images and grid")
    parser.add_argument("--rounds", type=int, default=1, help="each runs all numbers of ranks")
    options = parser.parse_args()
    if min(options.images, options.others) < max(options.ranks) or options.rounds < 1:
        parser.error("every rank needs an image, and there must be a round")
    if "RANK" in os.environ:  # torchrun
        work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), options, None)
        return
    everything = []
    for turn in range(options.rounds):
        for world in options.ranks:
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(work, (world, options, folder), nprocs=world)
                found = json.loads(Path(folder, "found.json").read_text())
            everything.append(found)
            print(f"round {turn + 1}, ranks {world}", file=sys.stderr, flush=True)
    cores = len(os.sched_getaffinity(0))
    print(
        f"{options.images:,} images of {options.classes}x{options.size}x{options.size}, alpha "
        f"{ALPHA}; {cores} cores, load {os.getloadavg()[0]:.1f}; medians of {options.rounds} "
        f"rounds\n"
    )
    if max(options.ranks) > cores:
        print(f"More ranks than the {cores} cores: read the processor's time, not the clock.\n")
    show(everything)
    print(f"\n{save('ranks', everything)}")
    bits: dict[str, str] = {}
    names = [name for name in everything[0] if name not in ("world", "merge")]
    if any(agree(bits, name, everything) != "the same bits" for name in names):
        sys.exit("the ranks do not agree")


if __name__ == "__main__":
    main()
