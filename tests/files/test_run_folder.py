"""The folder of a run: one run at a time, stale files found, nothing lost by a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.folders import complains, files

from cpseg.files.manifest import merge_logs
from cpseg.files.run_folder import RunFolder, open_run_folder

fcntl = pytest.importorskip("fcntl", reason="locks and signals of POSIX")

SOURCES = ("a.bin", "b.bin")


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "in" / name for name in SOURCES]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_bytes(b"content of " + path.name.encode())
    return paths


def make(folder: RunFolder, sources: list[Path], name: str = "sub/made.bin") -> Path:
    stamps = folder.stamps(*sources)
    made = folder.out / name
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_bytes(b"+".join(path.read_bytes() for path in sources))
    folder.record(made, sources, stamps)
    return made


def is_made(out: Path, made: Path, sources: list[Path], **digests: bool) -> bool:
    with open_run_folder(out, "x", **digests) as folder:  # type: ignore[arg-type]
        return folder.is_up_to_date(made, *sources)


def replace_keeping_times(path: Path, content: bytes) -> None:
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# What is up to date


@pytest.mark.parametrize("digest", [False, True])
def test_a_file_is_made_until_an_input_changes(
    tmp_path: Path, sources: list[Path], digest: bool
) -> None:
    out = tmp_path / "out"
    with open_run_folder(out, "x", digest_inputs=digest) as folder:
        made = make(folder, sources)
        assert folder.is_up_to_date(made, *sources)
    assert is_made(out, made, sources, digest_inputs=digest)
    assert not is_made(out, made, sources[:1], digest_inputs=digest), "other inputs"
    assert not is_made(out, made, sources[::-1], digest_inputs=digest)
    replace_keeping_times(sources[1], sources[1].read_bytes()[::-1])
    assert not is_made(out, made, sources, digest_inputs=digest)


def test_with_a_digest_new_times_alone_make_nothing_stale(
    tmp_path: Path, sources: list[Path]
) -> None:
    out = tmp_path / "out"
    with open_run_folder(out, "x", digest_inputs=True) as folder:
        known = make(folder, sources)
    with open_run_folder(out, "x") as folder:
        unknown = make(folder, sources, "other.bin")
    before = files(out)["manifest.jsonl"]
    os.utime(sources[0], ns=(10**18, 10**18))
    assert is_made(out, known, sources)
    assert not is_made(out, unknown, sources)
    after = files(out)["manifest.jsonl"]
    assert after != before, "the new times are recorded, so that the content is read once"
    assert is_made(out, known, sources)
    assert files(out)["manifest.jsonl"] == after


def test_an_input_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path, sources: list[Path]
) -> None:
    out = tmp_path / "out"
    with open_run_folder(out, "x") as folder:
        stamps = folder.stamps(*sources)
        replace_keeping_times(sources[0], b"another content")
        made = out / "made.bin"
        made.write_bytes(b"from the old content")
        folder.record(made, sources, stamps)
        assert not folder.is_up_to_date(made, *sources)


def test_the_file_itself_must_be_the_recorded_one(tmp_path: Path, sources: list[Path]) -> None:
    out = tmp_path / "out"
    with open_run_folder(out, "x", digest_files=True) as folder:
        made = make(folder, sources)
    with open_run_folder(out, "x") as folder:
        by_size = make(folder, sources, "by_size.bin")
    for path in (made, by_size):
        path.write_bytes(path.read_bytes()[::-1])
    assert not is_made(out, made, sources)
    assert is_made(out, by_size, sources), "only its size is recorded"
    by_size.write_bytes(b"")
    assert not is_made(out, by_size, sources)
    by_size.unlink()
    assert not is_made(out, by_size, sources)


def test_what_is_not_recorded_is_not_ours(tmp_path: Path, sources: list[Path]) -> None:
    out = tmp_path / "out"
    with open_run_folder(out, "x"):
        (out / "made.bin").write_bytes(b"copied there")
    assert not is_made(out, out / "made.bin", sources)


# Logs and the manifest


def test_logs_of_ranks_become_one_manifest(tmp_path: Path, sources: list[Path]) -> None:
    out = tmp_path / "out"
    with open_run_folder(out, "x") as folder:
        for name in ("b.bin", "a.bin"):
            make(folder, sources, name)
        lines = (out / ".manifest-0.log").read_bytes().splitlines(keepends=True)
        (out / ".manifest-0.log").write_bytes(lines[0])
        (out / ".manifest-1.log").write_bytes(lines[1])
    assert (out / "manifest.jsonl").read_bytes() == lines[1] + lines[0]
    assert sorted(files(out)) == ["a.bin", "b.bin", "manifest.jsonl", "run.json"]


def test_every_truncation_of_a_log_costs_one_file_at_most(
    tmp_path: Path, sources: list[Path]
) -> None:
    out = tmp_path / "out"
    with open_run_folder(out, "x") as folder:
        made = [make(folder, sources, name) for name in ("a.bin", "b.bin", "c.bin")]
    whole = (out / "manifest.jsonl").read_bytes()
    for length in range(len(whole) + 1):
        (out / "manifest.jsonl").unlink(missing_ok=True)
        (out / ".manifest-0.log").write_bytes(whole[:length])
        merge_logs(out)
        folder = RunFolder(out, old=False)
        found = [folder.is_up_to_date(path, *sources) for path in made]
        complete = (whole[:length] + b"\n").count(b"}\n")
        assert found == [number < complete for number in range(3)]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        "[" * 100_000,
        '{"file":"a","size":1,"sha256":null,"sources":[1]}',
    ],
)
def test_a_damaged_line_records_nothing(tmp_path: Path, sources: list[Path], line: str) -> None:
    out = tmp_path / "out"
    with open_run_folder(out, "x") as folder:
        made = make(folder, sources)
    whole = (out / "manifest.jsonl").read_text()
    (out / "manifest.jsonl").write_text(f"{line}\n{whole}")
    assert is_made(out, made, sources)
    (out / "manifest.jsonl").write_text(line)
    assert not is_made(out, made, sources)


# One run at a time

HOLD = """
import sys
from pathlib import Path
from cpseg.files.run_folder import open_run_folder
with open_run_folder(Path(sys.argv[1]), sys.argv[2]):
    print("in", flush=True)
    sys.stdin.readline()
"""


def holding(out: Path, fingerprint: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out), fingerprint],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    return process


@pytest.mark.parametrize("fingerprint", ["same", "other"])
def test_a_second_run_is_refused_and_takes_nothing_away(tmp_path: Path, fingerprint: str) -> None:
    out = tmp_path / "out"
    first = holding(out, "same")
    try:
        (out / ".x.png.abc.part").write_bytes(b"half")
        before = files(out)
        with (
            pytest.raises(ValueError, match=r"new folder|no other run") as caught,
            open_run_folder(out, fingerprint),
        ):
            pass
        complains(caught.value, out, "choose another with -o")
        assert ("in use" in str(caught.value)) == (fingerprint == "same")
        assert files(out) == before
    finally:
        first.communicate("\n", timeout=60)
    with open_run_folder(out, "same"):
        assert sorted(files(out)) == ["run.json", "run.lock"]
    assert sorted(files(out)) == ["run.json"]


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    first = holding(tmp_path / "out", "x")
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    assert (tmp_path / "out" / "run.lock").exists(), "the file is there, the lock is not"
    with open_run_folder(tmp_path / "out", "x"):
        pass
    assert sorted(files(tmp_path / "out")) == ["run.json"]


def test_an_error_lets_go_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_run_folder(tmp_path / "out", "x"):
        raise KeyboardInterrupt
    with open_run_folder(tmp_path / "out", "x"):
        pass


def test_nothing_is_written_into_a_folder_of_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "theirs.txt").write_text("text")
    out.chmod(0o500)
    with pytest.raises(ValueError, match=r"theirs\.txt"), open_run_folder(out, "x"):
        pass
    out.chmod(0o700)
    assert sorted(files(out)) == ["theirs.txt"]


def test_without_locks_a_run_goes_on_and_leaves_unfinished_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    out = tmp_path / "out"
    out.mkdir()
    (out / ".x.png.abc.part").write_bytes(b"perhaps another run's")
    with open_run_folder(out, "x"), open_run_folder(out, "x"):
        pass
    assert sorted(files(out)) == [".x.png.abc.part", "run.json"]


def test_run_json_says_what_it_was_told(tmp_path: Path) -> None:
    with open_run_folder(tmp_path, "x", facts={"root": "/r"}):
        pass
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["fingerprint"], run["manifest"], run["root"]) == ("x", 1, "/r")


def test_facts_of_a_file_are_there_for_the_next_run_and_other_ranks(
    tmp_path: Path, sources: list[Path]
) -> None:
    out = tmp_path / "out"
    with open_run_folder(out, "x") as folder:
        made, plain = out / "made.bin", make(folder, sources, "plain.bin")
        made.write_bytes(b"made")
        folder.record(made, sources, folder.stamps(*sources), {"kept": 0.5})
        other = out / "other.bin"
        line = {"file": "other.bin", "size": 1, "sha256": None, "sources": [], "facts": {"a": 1}}
        (out / ".manifest-1.log").write_text(json.dumps(line) + "\n")
        assert folder.facts([made, plain, other]) == [{"kept": 0.5}, None, {"a": 1.0}]
    assert (
        '"facts"'
        not in [
            line for line in (out / "manifest.jsonl").read_text().splitlines() if "plain" in line
        ].pop()
    )
    with open_run_folder(out, "x") as folder:
        assert folder.facts([made, plain, other]) == [{"kept": 0.5}, None, {"a": 1.0}]


def test_a_line_in_which_a_digit_changed_records_nothing(
    tmp_path: Path, sources: list[Path]
) -> None:
    out = tmp_path / "out"
    with open_run_folder(out, "x") as folder:
        made = out / "made.bin"
        made.write_bytes(b"made")
        folder.record(made, sources, folder.stamps(*sources), {"class_3": 41, "kept": 0.5})
    path = out / "manifest.jsonl"
    for before, after in (("41", "47"), ("class_3", "class_2"), ("0.5", "0.6")):
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after))
        with open_run_folder(out, "x") as folder:
            assert folder.facts([made]) == [None]
        path.write_text(text)
    entry = json.loads(text)
    del entry["crc32"]  # as older versions wrote it
    path.write_text(json.dumps(entry) + "\n")
    with open_run_folder(out, "x") as folder:
        assert folder.facts([made]) == [{"class_3": 41.0, "kept": 0.5}]
