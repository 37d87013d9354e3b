"""`cpseg.jobs.compact`: evidence files, where it goes on, what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import folders
from tests.support.folders import DataSet, complains, files

from cpseg import Evidence, evidence
from cpseg._internal.hashing import digest
from cpseg.core.class_map import ClassMap
from cpseg.files.dataset import Source
from cpseg.files.id_lists import (
    read_ids,
)
from cpseg.files.score_files import (
    read_scores,
)
from cpseg.jobs.compact import compact

SIZES = ((12, 16), (10, 20), (24, 32))


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return folders.make(tmp_path / "data", count=12)


def source(data: DataSet, **options: Any) -> Source:
    return Source(data.root, data.probs, **options)


# Compact


def test_compact_writes_the_evidence_of_every_image(data: DataSet, tmp_path: Path) -> None:
    ids = data.list_ids("images.txt", data.images, masks=False)
    out = tmp_path / "evidence"
    assert compact(source(data), ids, out, background=0) == 12
    wanted = [str(Path(image).with_suffix(".safetensors")) for image in data.images]
    assert sorted(files(out)) == sorted([*wanted, "run.json", "manifest.jsonl"])
    for image, name in zip(data.images, wanted, strict=True):
        found = read_scores(out / name)
        made = evidence(torch.from_numpy(data.scores[image]), background=0)
        assert isinstance(found, Evidence)
        assert torch.equal(found.best, made.best)
        assert torch.equal(found.best_class, made.best_class)
        assert found.background_score is not None
        assert torch.equal(found.background_score, made.background_score)


def test_compact_goes_on_where_it_stopped(data: DataSet, tmp_path: Path) -> None:
    out = tmp_path / "evidence"
    compact(source(data), data.list_ids("some.txt", data.images[:5]), out, background=0)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    (out / "images" / ".07.safetensors.abc.part").write_bytes(b"half")
    assert compact(source(data), data.ids, out, background=0) == 7
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list(out.rglob("*.part"))
    assert compact(source(data), data.ids, out, background=0) == 0


def test_compact_makes_anew_what_was_made_from_other_scores(data: DataSet, tmp_path: Path) -> None:
    """Also where the new file has the size and the time of the old one."""
    out = tmp_path / "evidence"
    compact(source(data), data.ids, out, background=0)
    image = data.images[3]
    when = data.score_file(image).stat().st_mtime_ns
    flipped = data.scores[image][::-1].copy()
    np.save(data.score_file(image), flipped)
    os.utime(data.score_file(image), ns=(when, when))
    (out / data.images[4]).with_suffix(".safetensors").write_bytes(b"")
    assert compact(source(data), data.ids, out, background=0) == 2
    found = read_scores((out / image).with_suffix(".safetensors"))
    assert isinstance(found, Evidence)
    assert torch.equal(found.best, evidence(torch.from_numpy(flipped), background=0).best)
    assert compact(source(data), data.ids, out, background=0) == 0


def test_compact_refuses_the_folder_of_another_run(data: DataSet, tmp_path: Path) -> None:
    out = tmp_path / "evidence"
    compact(source(data), data.ids, out, background=0)
    before = files(out)
    others: list[tuple[Source, int | None]] = [
        (source(data), None),
        (source(data), 1),
        (source(data, class_map=ClassMap((0, 1, 2, 2))), 0),
    ]
    for other, background in others:
        with pytest.raises(ValueError, match="another run") as caught:
            compact(other, data.ids, out, background=background)
        complains(caught.value, out, "choose another with -o")
    assert files(out) == before


def test_compact_applies_the_class_map(data: DataSet, tmp_path: Path) -> None:
    class_map = ClassMap((1, 0, None, 1))
    compact(source(data, class_map=class_map), data.ids, tmp_path / "e", background=0)
    image = data.images[0]
    found = read_scores(tmp_path / "e" / Path(image).with_suffix(".safetensors"))
    made = evidence(class_map(torch.from_numpy(data.scores[image])), background=0)
    assert isinstance(found, Evidence)
    assert found.num_classes == 2
    assert torch.equal(found.best, made.best)


@pytest.mark.parametrize("where", ["absolute", "above"])
def test_compact_writes_nothing_outside_its_folder(
    data: DataSet, tmp_path: Path, where: str
) -> None:
    image = data.images[0]
    listed = str(data.root / image) if where == "absolute" else f"../../data/{image}"
    ids = data.root / "outside.txt"
    ids.write_text(f"{listed}\n")
    data.score_file(image).rename(data.probs / "00.npy")  # a flat folder, found by name
    before = files(tmp_path)
    with pytest.raises(ValueError, match="below the root"):
        compact(source(data), ids, tmp_path / "out" / "e", background=0)
    assert files(tmp_path) == before


def test_a_digest_depends_on_content_not_on_order() -> None:
    assert digest({"a": 1, "b": None}) == digest({"b": None, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_lists_of_the_helper_are_read_as_written(data: DataSet) -> None:
    assert [pair.image for pair in read_ids(data.ids)] == data.images
