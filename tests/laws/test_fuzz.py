"""Random calls of everything public: see tests/support/fuzz.py. ``make fuzz`` makes more of them.

Environment: FUZZ_CALLS, how many calls in all; FUZZ_SEED, their seed.
"""

from __future__ import annotations

import os
from collections import Counter
from types import ModuleType

import pytest
import torch
from tests.support import fuzz

import cpseg
import cpseg.testing
from cpseg import groups

CALLS = int(os.environ.get("FUZZ_CALLS", "3000"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
PARTS = 10  # so that workers share them

NOT_CALLED = {
    "__version__": "a string",
    "foundation": "loads models from files",
    "groups": "a module: its names are listed apart",
    "testing.CalibrationProblem": "what a strategy draws",
    "testing.WORLDS": "a table",
    "testing.assert_certificate": "judges the caller's code, in many calls of it",
    "testing.assert_coverage": "judges the caller's code, in many calls of it",
    "testing.assert_leave_one_out": "judges the caller's code, in many calls of it",
    "testing.assert_selection_law": "judges the caller's code, in many calls of it",
    "testing.try_world": "judges the caller's code, in many calls of it",
}


def public(prefix: str, module: ModuleType) -> set[str]:
    return {prefix + name for name in module.__all__}


def test_every_public_name_is_called() -> None:
    names = public("", cpseg) | public("groups.", groups) | public("testing.", cpseg.testing)
    called = set(fuzz.GENERATORS)
    assert names - called - set(NOT_CALLED) == set(), "add a generator to tests/support/fuzz.py"
    assert called - names == set(), "these names are gone"
    assert not called & set(NOT_CALLED)


@pytest.mark.parametrize("part", range(PARTS))
def test_calls_return_what_is_right_or_say_what_is_wrong(part: int) -> None:
    counts: Counter[str] = Counter()
    for number in range(part, CALLS, PARTS):
        found = fuzz.run(SEED, number)
        again = f"python tests/support/fuzz.py {SEED} {number}"
        assert found.kind != "failed", f"{found.name}: {found.said}\nagain: {again}"
        counts[found.kind] += 1
        counts["checked"] += found.checked
    if sum(counts.values()) >= 100:
        assert min(counts["returned"], counts["refused"], counts["checked"]) > 0.15 * CALLS / PARTS


def test_a_call_is_the_same_every_time() -> None:
    for number in range(20):
        # Not what is said: it may hold an address.
        first, second = (fuzz.run(SEED, number)[:3] for _ in range(2))
        assert first == second


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(function: object, oracle: object = None) -> fuzz.Outcome:
        call = fuzz.Call(function, [], {}, oracle)  # type: ignore[arg-type]
        monkeypatch.setattr(fuzz, "GENERATORS", {"one": lambda draw: call})
        return fuzz.run(0, 0)

    def raising(error: Exception) -> object:
        def function() -> None:
            raise error

        return function

    assert one(lambda: 3).kind == "returned"
    assert one(raising(ValueError("one line"))).kind == "refused"
    assert one(raising(ValueError("two\nlines"))).kind == "failed"
    assert one(raising(RuntimeError("of another kind"))).kind == "failed"
    assert one(lambda: torch.ones(1), lambda found: fuzz.expect(found, [2.0])).kind == "failed"
    monkeypatch.setattr(fuzz, "SECONDS", -1.0)
    assert "took" in one(lambda: 3).said
