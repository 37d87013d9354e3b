"""The tensor functions trace whole under torch.compile and give the very same bits."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.support.helpers import same, seeded
from torch import Tensor

from cpseg import (
    conformal_quantile,
    evidence,
    nonconformity,
    nonconformity_map,
    prediction_set,
    pseudo_labels,
)

BACKENDS = ("eager", "aot_eager")


modern = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_compiling"),
    reason="torch.compile before 2.3 traces neither fractions, data classes nor changing sizes",
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(
    function: Callable[..., Any], backend: str, *, dynamic: bool | None = False
) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


def scores(num_classes: int, dtype: torch.dtype = torch.float32, *, batch: int = 2) -> Tensor:
    probs = torch.rand(batch, num_classes, 5, 6, generator=seeded(num_classes))
    probs[0] = (probs[0] * 4).round() / 4  # ties
    probs[0, num_classes // 2, 1, 1] = math.nan
    probs[-1, -1, 2, 2] = math.nan
    return probs.to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scores_trace(backend: str, dtype: torch.dtype) -> None:
    probs = scores(4, dtype)
    labels = torch.randint(4, (2, 5, 6), generator=seeded(0)).to(torch.uint8)
    labels[0, 0] = 255
    assert same(whole(nonconformity, backend)(probs, labels), nonconformity(probs, labels))
    assert same(whole(nonconformity_map, backend)(probs), nonconformity_map(probs))


@modern
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["conformal", "linear"])
def test_quantiles_trace(backend: str, rule: str) -> None:
    @torch.compile(fullgraph=True, backend=backend)
    def compiled(stack: Tensor) -> Tensor:
        return conformal_quantile(stack, 0.1, rule=rule)

    for n in (9, 25, 31):  # the second size makes the axis dynamic
        stack = torch.rand(n, 4, 3, generator=seeded(n))
        stack[2, 1] = math.nan
        assert same(compiled(stack), conformal_quantile(stack, 0.1, rule=rule))


@modern
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantile_of_many_digits_traces(backend: str) -> None:
    stack = torch.rand(9, 4, generator=seeded(0))

    def many(stack: Tensor) -> Tensor:
        return conformal_quantile(stack, "0.33333333333333333333")

    assert same(whole(many, backend)(stack), many(stack))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (5, 6), (4, 5, 6)])
def test_sets_trace(backend: str, shape: tuple[int, ...]) -> None:
    probs, threshold = scores(4), torch.rand(shape, generator=seeded(1))
    assert same(whole(prediction_set, backend)(probs, threshold), prediction_set(probs, threshold))
    got = whole(lambda p: prediction_set(p, 0.75), backend)(probs)
    assert same(got, prediction_set(probs, 0.75))


@pytest.mark.parametrize(
    ("num_classes", "background"), [(1, None), (2, 0), (4, None), (4, 3), (23, 1), (40, None)]
)
def test_pseudo_labels_trace(num_classes: int, background: int | None) -> None:
    def labels(probs: Tensor, threshold: Tensor | float) -> Tensor:
        return pseudo_labels(probs, threshold, background=background)

    probs = scores(num_classes)
    compiled = whole(labels, "eager")
    for threshold in (
        torch.tensor(0.5),
        torch.rand(5, 6, generator=seeded(2)),
        torch.rand(num_classes, 5, 6, generator=seeded(3)),
    ):
        assert same(compiled(probs, threshold), labels(probs, threshold))
    assert same(compiled(probs[0], threshold), labels(probs[0], threshold))
    assert same(compiled(probs, 0.5), labels(probs, 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pseudo_labels_trace_in_other_dtypes(dtype: torch.dtype) -> None:
    def labels(probs: Tensor, threshold: Tensor) -> Tensor:
        return pseudo_labels(probs, threshold, background=1, dtype=torch.uint8)

    probs = scores(23, dtype)
    compiled = whole(labels, "aot_eager")
    for threshold in (torch.rand(5, 6, generator=seeded(2)), torch.rand(23, 5, 6)):
        assert same(compiled(probs, threshold), labels(probs, threshold))


@modern
def test_pseudo_labels_trace_at_changing_sizes() -> None:
    def labels(probs: Tensor, threshold: Tensor) -> Tensor:
        return pseudo_labels(probs, threshold, background=0)

    compiled = whole(labels, "eager", dynamic=None)
    for batch in (1, 2, 3):
        probs = scores(21, batch=batch)
        threshold = torch.rand(5, 6, generator=seeded(batch))
        assert same(compiled(probs, threshold), labels(probs, threshold))
    crop, part = probs[:, :, :3, :5], threshold[:3, :5]
    assert same(compiled(crop, part), labels(crop, part))


@modern
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("background", [None, 1])
def test_evidence_traces(backend: str, background: int | None) -> None:
    def parts(probs: Tensor) -> tuple[Tensor | None, ...]:
        found = evidence(probs, background=background)
        labels = found.pseudo_labels(0.6)
        return found.best, found.best_class, found.background_score, labels, found.argmax()

    probs = scores(4)
    some = ~parts(probs)[0].isnan()  # type: ignore[union-attr]
    for got, want in zip(whole(parts, backend)(probs), parts(probs), strict=True):
        assert (got is None) == (want is None)
        if want is not None and want.is_floating_point():
            assert same(got, want)
        elif want is not None:  # the class beside a NaN is any
            assert same(got[some], want[some])


@modern
def test_the_number_of_classes_is_a_constant_of_the_kernel() -> None:
    """As a symbol it made kernels forty times as slow; sizes may be symbols."""
    counts = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        counts.extend(node.args[0] for node in graph.graph.nodes if node.target is torch.arange)
        return graph.forward

    compiled = torch.compile(
        lambda p, t: pseudo_labels(p, t, background=0), fullgraph=True, backend=backend
    )
    for num_classes, height, width in ((21, 5, 6), (9, 5, 6), (21, 7, 6), (21, 8, 9), (9, 4, 5)):
        probs = torch.rand(2, num_classes, height, width, generator=seeded(height))
        threshold = torch.rand(height, width, generator=seeded(width))
        want = pseudo_labels(probs, threshold, background=0)
        assert torch.equal(compiled(probs, threshold), want)
    assert set(counts) == {9, 21}
    assert all(type(count) is int for count in counts)


@pytest.mark.nightly
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_inductor_gives_the_same_labels() -> None:
    def labels(probs: Tensor, threshold: Tensor) -> Tensor:
        return pseudo_labels(probs, threshold, background=0)

    probs = scores(21)
    compiled = torch.compile(labels, fullgraph=True, dynamic=False)
    for threshold in (torch.rand(5, 6, generator=seeded(2)), torch.rand(21, 5, 6)):
        assert same(compiled(probs, threshold), labels(probs, threshold))


@modern
def test_older_versions_of_torch_find_another_way_to_ask_whether_they_compile() -> None:
    code = (
        "import torch; torch._utils.is_compiling = lambda: False; del torch.compiler.is_compiling; "
        "import cpseg; p = torch.rand(3, 4, 4); "
        "print(tuple(cpseg.pseudo_labels(p, 0.5, background=0).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "(4, 4)\n", done.stderr
