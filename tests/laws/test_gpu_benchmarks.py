"""What can be known of the benchmark for CUDA cards, and of work on a card, without a card."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tests.support.helpers import seeded
from torch import Tensor

import cpseg

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT, KERNEL = BENCHMARKS / "gpu.py", BENCHMARKS / "triton_selection.py"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)

there = pytest.mark.skipif(not SCRIPT.exists(), reason="benchmarks are not part of this copy")
modern = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_compiling"), reason="older versions of torch.compile"
)


def run(*words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The script in a process that sees no card."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout, env=environment
    )


@there
def test_without_a_card_it_says_so_in_one_line() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA card" in done.stderr
    assert "--dry-run" in done.stderr


def expected_rows() -> Iterator[str]:
    steps = ("pseudo_labels", "pseudo_labels, thresholds per class")
    steps += ("Calibrator.update, max_images=1000",)
    steps += tuple(
        f"OnlineThreshold.{part}{which}"
        for part in ("update", "gate")
        for which in ("", ", per class")
    )
    steps += tuple(f"sum_loss{which}, forward + backward" for which in ("", " with uncertainty"))
    yield from (f"{step}: waits for the device" for step in steps)
    kinds = ("eager", "torch.compile", "Triton", "time of Triton")
    for num_classes in (21, 150):
        for dtype in ("float32", "bfloat16", "float16", "uint8"):
            for kind in kinds:
                yield f"selection, 2x{num_classes}x512x512, {dtype}, {kind}"
        yield f"Recalibration.evidence K={num_classes}, 512x512"
    update = "Calibrator.update, pixel-wise, 1x21x512x512"
    yield from (update, f"{update}, 4 updates of max_images=1000, all included")
    for which in ("", " with uncertainty"):
        yield f"sum_loss{which}, forward + backward, 8x1x512x512"
    for which in ("", ", per class"):
        yield f"OnlineThreshold.update + gate{which}, 4x21x512x512, ms"
    yield "boundary_iou, 4x512x512, 21 classes, ms"
    yield "cpseg label --device cpu, 3 maps of 21x512x512, uint8, ms an image"


@there
@modern
@pytest.mark.nightly
def test_the_dry_run_has_all_rows(tmp_path: Path) -> None:
    done = run("--dry-run", "-o", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    facts = json.loads(path.read_text())
    table = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line[:1] == "|"]
    assert sorted(table[2:]) == sorted(expected_rows())
    assert [row["name"] for row in facts["rows"]] == table[2:]
    assert facts["dry_run"] is True
    assert {"commit", "torch", "triton", "python", "device"} <= facts.keys()
    assert "other labels" not in done.stdout
    assert "differ" not in done.stdout
    assert "failed" not in done.stdout
    without = importlib.util.find_spec("triton") is None
    for row in facts["rows"]:
        missing = "waits for" in row["name"] or (without and "Triton" in row["name"])
        assert (row["median"] is None) == missing, row


@there
def test_the_dry_run_of_some_rows(tmp_path: Path) -> None:
    done = run("--dry-run", "sum_loss, forward", "-o", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rows in" in done.stdout


@there
def test_a_row_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # main sets it: taken back afterwards
    gpu = load(SCRIPT, "gpu_benchmark")
    sys.modules.pop("run", None)

    def cases(bench: object) -> Iterator[object]:
        def fail() -> None:
            raise RuntimeError("out of | memory")

        yield gpu.Case("first", "-", fail)
        yield gpu.Case("second", "-", lambda: gpu.Found([1.0, 2.0, 3.0]), most=1)

    monkeypatch.setattr(gpu, "BENCHMARKS", {"cases": cases})
    assert gpu.main(["--dry-run", "-o", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "| first | - | - | - | - | failed: RuntimeError: out of / memory |" in said
    assert "| second | - | <= 1 | 2 | 1.5 to 2.5 | **missed**  |" in said
    assert gpu.main(["--dry-run", "--seconds", "0", "-o", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("not measured: out of time") == 2


def load(path: Path, name: str) -> ModuleType:
    """A module of a script."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # data classes look there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernel of Triton, run by its interpreter."""
    if not KERNEL.exists():
        pytest.skip("benchmarks are not part of this copy")
    triton = pytest.importorskip("triton")
    if int(triton.__version__.split(".")[0]) < 3:
        pytest.skip("triton before 3 has another interpreter")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return load(KERNEL, "triton_selection_interpreted")


def case(num_classes: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with ties, NaN and pixels of nothing else; what counts as them; thresholds."""
    generator = seeded(seed)
    probs = torch.rand(2, num_classes, 5, 7, generator=generator)
    probs[0] = (4 * probs[0]).round() / 4
    threshold = torch.rand(5, 7, generator=generator)
    threshold[1] = (4 * threshold[1]).round() / 4
    threshold[0, :3] = torch.tensor([math.inf, -math.inf, math.nan])
    if dtype == torch.uint8:
        stored = (255 * probs).round().to(dtype)
        return stored, stored.float() * (1 / 255), threshold
    probs[torch.rand(probs.shape, generator=generator) < 0.2 / num_classes] = math.nan
    probs[:, :, 2, 2] = 0
    return probs.to(dtype), probs.to(dtype), threshold


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_on_a_card(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    if not KERNEL.exists():
        pytest.skip("benchmarks are not part of this copy")
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("the interpreter runs the kernel")
    # First of its kind: later Triton would be the one that the interpreter has changed.
    compiled = load(KERNEL, "triton_selection_compiled")
    for num_classes in (1, 2, 9, 21):
        stored, probs, threshold = case(num_classes, dtype, num_classes)
        for background in (None, *((0, num_classes - 1) if num_classes > 1 else ())):
            got = compiled.pseudo_labels(stored.cuda(), threshold.cuda(), background=background)
            want = cpseg.pseudo_labels(probs, threshold, background=background)
            assert torch.equal(got.cpu(), want)


def check(kernel: ModuleType, num_classes: int, background: int | None, dtype: torch.dtype) -> None:
    stored, probs, threshold = case(num_classes, dtype, 100 * num_classes + (background or 0))
    got = kernel.pseudo_labels(stored, threshold, background=background, block=64)
    want = cpseg.pseudo_labels(probs, threshold, background=background)
    assert got.dtype == want.dtype
    assert torch.equal(got, want), (num_classes, background, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_gives_the_same_labels(kernel: ModuleType, dtype: torch.dtype) -> None:
    for num_classes in (1, 2, 3, 9):
        check(kernel, num_classes, None, dtype)
        for background in sorted({0, num_classes // 2, num_classes - 1}) if num_classes > 1 else ():
            check(kernel, num_classes, background, dtype)


def test_the_kernel_takes_strides_and_other_void_labels(kernel: ModuleType) -> None:
    stored, _, threshold = case(4, torch.float32, 0)
    for probs in (stored.to(memory_format=torch.channels_last), stored[:, ::2], stored[..., 1:]):
        limit = threshold[:, : probs.shape[-1]]
        for block in (16, 64):
            got = kernel.pseudo_labels(probs, limit, background=0, ignore_index=-1, block=block)
            want = cpseg.pseudo_labels(probs, limit, background=0, ignore_index=-1)
            assert torch.equal(got, want)


@pytest.mark.nightly
@pytest.mark.parametrize("num_classes", range(1, 41))
def test_the_kernel_gives_the_same_labels_for_every_background(
    kernel: ModuleType, num_classes: int
) -> None:
    backgrounds = (None, *(range(num_classes) if num_classes > 1 else ()))
    for number, background in enumerate(backgrounds):
        check(kernel, num_classes, background, DTYPES[(num_classes + number) % len(DTYPES)])


_PTX = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton_selection

kernel = triton_selection._kernel
signature = dict.fromkeys(kernel.arg_names, "constexpr")
signature |= {"probs": "*" + sys.argv[1], "threshold": "*fp32", "labels": "*i64"}
signature |= dict.fromkeys(("pixels", "image_stride", "class_stride"), "i32")
scale = 1 / 255 if sys.argv[1] == "u8" else 1.0
constants = {"num_classes": 5, "background": 0, "ignore_index": 255, "scale": scale}
source = ASTSource(
    fn=kernel,
    signature=signature,
    constexprs=constants | {"block": 512, "together": 8},
    attrs={(place,): [["tt.divisibility", 16]] for place in range(6)},
)
options = {"num_warps": 4, "enable_fp_fusion": False}
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "u8"])
def test_the_kernel_compiles_for_a_card(kernel: ModuleType, dtype: str, tmp_path: Path) -> None:
    """One vector load for each of five classes and the thresholds; two stores of labels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(BENCHMARKS), environment.get("PYTHONPATH", "")])
    environment |= {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", _PTX, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"ld\.global", done.stdout)) == 5 + 1
    assert len(re.findall(r"st\.global\.v2", done.stdout)) == 2
    assert "fma" not in done.stdout  # 1 - p is rounded as the library rounds it


@pytest.fixture
def no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the device meta, which the library refuses, pass as those of an accelerator.

    They have shapes and no values: whatever looks at a value raises an error. On a card such a
    look waits for the device.
    """
    for name in cpseg.__all__:
        getattr(cpseg, name)  # modules are imported when they are needed
    patched = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("cpseg.") and "check_has_values" in vars(module)
    ]
    assert patched
    for module in patched:
        monkeypatch.setattr(module, "check_has_values", lambda *_, **__: None)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_tensors_without_values_are_refused() -> None:
    with pytest.raises(ValueError, match="a tensor on device meta"):
        cpseg.pseudo_labels(meta(21, 8, 16), 0.5, background=0)


@pytest.mark.usefixtures("no_values")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("background", [None, 0, 7, 20])
def test_selection_off_the_cpu_looks_at_no_value(
    background: int | None, dtype: torch.dtype
) -> None:
    probs, threshold = meta(2, 21, 8, 16, dtype=dtype), meta(8, 16)
    for limit in (threshold, meta(21, 8, 16), meta(), 0.5):
        for batch in (probs, probs[0]):
            labels = cpseg.pseudo_labels(batch, limit, background=background)
            assert labels.shape == batch[..., 0, :, :].shape
            assert labels.dtype == torch.int64
            assert labels.device.type == "meta"
            assert cpseg.prediction_set(batch, limit).shape == batch.shape
    found = cpseg.evidence(probs, background=background)
    assert found.best.shape == found.best_class.shape == (2, 8, 16)
    assert found.pseudo_labels(threshold).shape == found.argmax().shape == (2, 8, 16)
    scores = cpseg.nonconformity(probs, meta(2, 8, 16, dtype=torch.int64))
    assert scores.shape == (2, 8, 16)
    assert scores.dtype == torch.float32


@pytest.mark.usefixtures("no_values")
@pytest.mark.parametrize("per_class", [False, True])
def test_steps_off_the_cpu_look_at_no_value(per_class: bool) -> None:
    probs, labels = meta(1, 21, 8, 16), meta(1, 8, 16, dtype=torch.int64)
    threshold = cpseg.OnlineThreshold(21, per_class=per_class)
    assert threshold.update(probs, labels).gate(probs).shape == labels.shape
    calibrator = cpseg.Calibrator(cpseg.groups.pixel((8, 16)), max_images=1000)
    for _ in range(100):  # more than wait to be absorbed
        calibrator.update(probs, labels)
    logits = meta(2, 1, 8, 16).requires_grad_()
    uncertainty = meta(2, 1, 8, 16) if per_class else None
    cpseg.sum_loss(logits, meta(2, 1, 8, 16), uncertainty=uncertainty).backward()
    assert logits.grad is not None
    with pytest.raises(RuntimeError, match=r"[Mm]eta"):
        bool(probs.isnan().any())


@modern
@pytest.mark.usefixtures("no_values")
@pytest.mark.parametrize(("background", "passes"), [(None, 1), (0, 1), (20, 1), (7, 2)])
def test_reductions_of_the_selection_compiled_off_the_cpu(
    background: int | None, passes: int
) -> None:
    """One graph, and one reduction over the classes on each side of the background."""
    graphs: list[list[object]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda p, t: cpseg.pseudo_labels(p, t, background=background),
        fullgraph=True,
        dynamic=False,
        backend=backend,
    )
    assert compiled(meta(1, 21, 8, 16), meta(8, 16)).shape == (1, 8, 16)
    (graph,) = graphs
    assert sum(str(target) in ("max", "amax", "amin") for target in graph) == passes


@modern
@pytest.mark.nightly
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize(
    ("num_classes", "background", "kernels"), [(5, 0, 1), (21, 0, 2), (21, None, 3)]
)
def test_kernels_of_the_selection_compiled_for_the_cpu(
    num_classes: int, background: int | None, kernels: int
) -> None:
    """Few classes are one kernel; more, in groups, are three."""
    metrics = pytest.importorskip("torch._inductor.metrics")
    torch._dynamo.reset()
    metrics.reset()
    compiled = torch.compile(
        lambda p, t: cpseg.pseudo_labels(p, t, background=background),
        fullgraph=True,
        dynamic=False,
    )
    probs = torch.rand(1, num_classes, 8, 16, generator=seeded(0))
    threshold = torch.rand(8, 16, generator=seeded(1))
    want = cpseg.pseudo_labels(probs, threshold, background=background)
    assert torch.equal(compiled(probs, threshold), want)
    assert metrics.generated_kernel_count == kernels
