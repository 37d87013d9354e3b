"""Several threads do what one does: the same results, in order, and the same errors."""

from __future__ import annotations

import ast
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.folders import DataSet, command, files, make, options, refused

from cpseg import pseudo_labels
from cpseg._internal.threads import in_order, shared
from cpseg.files.score_arrays import from_numpy, shape_from_numpy

Capture = pytest.CaptureFixture[str]


def running() -> list[str]:
    """Threads of ours, but for the helpers, which are kept."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("cpseg") and "helper" not in name]


@settings(deadline=None)  # threads wait for each other on busy cores
@given(st.lists(st.floats(0, 0.003), max_size=12), st.integers(1, 5))
def test_results_come_in_the_order_of_the_items(waits: list[float], workers: int) -> None:
    def wait(item: tuple[int, float]) -> int:
        time.sleep(item[1])
        return item[0]

    assert list(in_order(wait, enumerate(waits), workers)) == list(range(len(waits)))
    assert running() == []


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(1, 5), st.integers(0, 25))
def test_few_items_are_taken_before_their_results_are_asked_for(
    count: int, workers: int, asked: int
) -> None:
    taken = 0

    def items() -> object:
        nonlocal taken
        for number in range(count):
            taken += 1
            yield number

    with closing(in_order(lambda item: item, items(), workers)) as results:
        for number in range(min(asked, count)):
            assert next(results) == number
            assert taken <= number + 1 + workers
    assert running() == []


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_an_error_comes_where_the_result_would(workers: int) -> None:
    results = in_order(lambda item: 1 // item, [3, 2, 1, 0, 1], workers)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert running() == []
    assert list(results) == []


def test_threads_end_within_a_second_of_an_interrupt() -> None:
    began = []

    def work(item: int) -> int:
        began.append(item)
        time.sleep(0.1)
        return item

    def interrupted() -> None:
        with closing(in_order(work, range(1000), 3)) as results:
            for item in results:
                if item == 2:
                    raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert running() == []
    assert len(began) < 12
    assert time.monotonic() - start < 5


def test_threads_share_the_cores() -> None:
    before = torch.get_num_threads()
    seen = set(in_order(lambda _: torch.get_num_threads(), range(8), 2))
    assert seen == {max(1, before // 2)}
    assert torch.get_num_threads() == before


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return make(tmp_path / "data", count=7, sizes=((12, 16), (9, 20)), seed=3)


def outputs(capsys: Capture, data: DataSet, out: Path, workers: int) -> dict[str, bytes]:
    out.mkdir()
    calibration = out / "c.safetensors"
    always = data.options(workers=workers)
    said = [
        command(capsys, "calibrate", *always, *options(background=0, alpha=0.4), "-o", calibration),
        command(capsys, "evaluate", *always, *options(calibration=calibration)),
        command(capsys, "label", *always, *options(calibration=calibration), "-o", out / "L"),
        command(capsys, "compact", *always, "--background", "0", "-o", out / "E"),
    ]
    assert [result.code for result in said] == [0] * 4, said
    written = {}
    for name, content in files(out).items():
        if Path(name).suffix in (".png", ".safetensors", ".csv", ".txt"):
            written[name] = content
    order = [line.split(b'"')[1:4] for line in files(out)["L/manifest.jsonl"].splitlines()]
    return {**written, "order": repr(order).encode(), "said": said[1].out.encode()}


def test_any_number_of_workers_writes_the_same(
    data: DataSet, tmp_path: Path, capsys: Capture
) -> None:
    expected = outputs(capsys, data, tmp_path / "1", 1)
    assert len([name for name in expected if name.endswith(".png")]) == 7
    for workers in (2, 50):
        found = outputs(capsys, data, tmp_path / str(workers), workers)
        assert found.keys() == expected.keys()
        for name, content in expected.items():
            assert found[name].replace(b"/50/", b"/1/").replace(b"/2/", b"/1/") == content, name


@pytest.mark.parametrize("workers", [1, 2, 50])
def test_a_damaged_file_is_one_line_and_the_images_before_it_are_kept(
    data: DataSet, tmp_path: Path, capsys: Capture, workers: int
) -> None:
    calibration = tmp_path / "c.safetensors"
    words = data.options(background=0, alpha=0.4)
    assert command(capsys, "calibrate", *words, "-o", calibration).code == 0
    bad = next(path for path in data.probs.rglob("*") if path.stem == "04")
    whole = bad.read_bytes()
    bad.write_bytes(whole[:40])
    words = data.options(calibration=calibration, workers=workers)
    refused(command(capsys, "label", *words, "-o", tmp_path / "L"), str(bad))
    assert running() == []
    masks = sorted(path.stem for path in (tmp_path / "L" / "masks").rglob("*.png"))
    assert masks[:4] == ["00", "01", "02", "03"]
    assert "04" not in masks
    assert not list((tmp_path / "L").rglob("*.part"))
    bad.write_bytes(whole)
    assert command(capsys, "label", *words, "-o", tmp_path / "L").code == 0
    assert len(list((tmp_path / "L" / "masks").rglob("*.png"))) == 7


def test_no_workers_are_refused(data: DataSet, capsys: Capture) -> None:
    words = data.options(background=0, workers=0)
    refused(command(capsys, "calibrate", *words, "-o", "x"), "--workers", ">= 1, got '0'")


@given(st.integers(0, 30), st.integers(1, 9))
def test_every_item_is_taken_once_by_some_thread(count: int, threads: int) -> None:
    taken, settings_seen = [], set()

    def work(items: Iterator[int]) -> None:
        for item in items:
            settings_seen.add(torch.get_num_threads())
            taken.append(item)

    shared(work, range(count), threads)
    assert sorted(taken) == list(range(count))
    assert settings_seen <= {1}, "operators do not divide what the threads divide"


def test_a_helper_takes_what_the_caller_leaves() -> None:
    names, both = set(), threading.Barrier(2, timeout=60)

    def work(items: Iterator[int]) -> None:
        for _ in items:
            both.wait()  # passes just where two threads are at work
            names.add(threading.current_thread().name)

    shared(work, range(2), 2)
    assert len(names) == 2


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_of_any_thread_is_raised(bad: int) -> None:
    both = threading.Barrier(2, timeout=60)

    def work(items: Iterator[int]) -> None:
        for item in items:
            both.wait()
            if item == bad:
                raise ZeroDivisionError

    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        shared(work, range(2), 2)
    assert torch.get_num_threads() == before


def test_after_an_interrupt_nothing_more_is_begun() -> None:
    begun, both = [], threading.Barrier(2, timeout=60)

    def work(items: Iterator[int]) -> None:
        for item in items:
            begun.append(item)
            if item < 2:
                both.wait()
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        shared(work, range(1000), 2)
    assert len(begun) <= 4


def test_helpers_share_the_callers_inference_mode() -> None:
    both, seen = threading.Barrier(2, timeout=60), []

    def work(items: Iterator[int]) -> None:
        for _ in items:
            both.wait()
            seen.append(torch.is_inference_mode_enabled())

    for mode in (False, True):
        with torch.inference_mode(mode):
            shared(work, range(2), 2)
    assert seen == [False, False, True, True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_helpers_of_its_own() -> None:
    """As a data loader's workers do; with the parent's executor the child would wait for ever."""
    probs = torch.rand(1, 4, 1024, 1024)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        want = pseudo_labels(probs, 0.3, background=0)
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()

        def child() -> None:
            torch.set_num_threads(2)
            got = pseudo_labels(probs, 0.3, background=0)
            torch.set_num_threads(1)
            answers.put(bool(torch.equal(got, want)))

        process = context.Process(target=child)
        process.start()
        process.join(60)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode == 0
        assert answers.get()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_parser_that_threads_disturb_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Python 3.11 counts the depth of its parser for all threads together."""
    path, probs = tmp_path / f"x{suffix}", np.zeros((2, 3, 4), np.float32)
    np.save(path, probs) if suffix == ".npy" else np.savez(path, probs=probs)
    parse, calls = ast.literal_eval, itertools.count()

    def disturbed(text: str) -> object:
        if next(calls) % 3 < 2:
            raise SystemError("AST constructor recursion depth mismatch (before=51, after=47)")
        return parse(text)

    monkeypatch.setattr(ast, "literal_eval", disturbed)
    assert from_numpy(path, "probs").shape == (2, 3, 4)
    assert tuple(shape_from_numpy(path)) == (2, 3, 4)
    assert next(calls) > 4
    monkeypatch.setattr(ast, "literal_eval", lambda text: 1 // 0)
    with pytest.raises(ValueError, match="unreadable"):
        from_numpy(path, "probs")
