"""`Calibrator.sync` over 1, 2 and 3 gloo ranks on this machine. Run as a script: one rank."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cpseg import Calibration, Calibrator, groups
from cpseg._internal import distributed as ranks
from cpseg._internal import tiling
from cpseg.calibration import score_stores as stores

GRID = (4, 3)
NUM_CLASSES = 3
STORES: dict[str, dict[str, Any]] = {
    "bounded": {"groups": groups.pixel(GRID), "max_images": 35},
    "bounded to nothing": {"groups": groups.pixel(GRID), "max_images": 35, "alpha": "0.01"},
    "unbounded": {"groups": groups.pixel(GRID)},
    "per class": {"groups": groups.pixel(GRID), "per_class": True},
    "binned": {"groups": groups.blocks(GRID, 2)},
    "binned per class": {"groups": groups.blocks(GRID, 2), "per_class": True},
}
# Which of the images each rank takes: uneven, one rank without any, all on the last.
SHARDS: dict[str, list[list[int]]] = {
    "uneven": [[*range(12)], [*range(12, 30)], [30]],
    "one empty": [[], [*range(10, 31)], [*range(10)]],
    "first alone": [[*range(31)], [], []],
}


def images() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for i in range(31):
        size = [(4, 3), (8, 6), (3, 3), (9, 4)][i % 4]
        probs = torch.rand(NUM_CLASSES, *size, generator=generator)
        probs = (probs * 4).round() / 4 if i % 2 else probs
        labels = torch.randint(NUM_CLASSES, size, generator=generator)
        void = torch.rand(size, generator=generator) < (1.0 if i % 7 == 6 else 0.2)
        result.append((probs, labels.masked_fill(void, 255)))
    return result


def build(store: str) -> Calibrator:
    return Calibrator(**{"alpha": "0.2", **STORES[store]})


def parts(calibration: Calibration) -> dict[str, Tensor]:
    images = torch.tensor([calibration.num_images, calibration.num_classes or 0])
    return {"threshold": calibration.threshold, "count": calibration.count, "images": images}


def message(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"


# --- one rank ----------------------------------------------------------------------------------


def agreed(world: int, group: Any, rank: int) -> dict[str, Any]:
    """Every store and shard over the first ``world`` ranks."""
    result = {}
    some = images()
    for store in STORES:
        for shard, indices in SHARDS.items():
            own = [*indices[rank]]
            if rank == world - 1:  # the last rank of a smaller world takes what is left
                own += [i for part in indices[world:] for i in part]
            calibrator = build(store)
            for i in own:
                calibrator.update(*some[i])
            calibrator.sync(group)
            key = f"{store}/{shard}/{world}"
            result[key] = parts(calibrator.compute())
            if store == "unbounded" and shard == "uneven":
                result[key + "/later"] = [
                    message(lambda c=calibrator: c.sync(group)),
                    message(lambda c=calibrator: c.update(*some[0])),
                    message(lambda c=calibrator: c.update_scores(torch.rand(GRID))),
                    message(lambda c=calibrator: build("unbounded").merge(c)),
                    message(lambda c=calibrator: c.merge(build("unbounded"))),
                ]
                fresh = build("unbounded")
                for probs, labels in some:
                    fresh.update(probs, labels)
                result[key + "/into"] = message(lambda c=calibrator, f=fresh: c.merge(f))
    return result


def disagreed(rank: int) -> dict[str, str]:
    """What every rank hears where one of three differs."""
    some = images()
    odd = rank == 1
    pixel = groups.pixel(GRID)
    result = {}
    cases: dict[str, dict[str, Any]] = {
        "alpha": {"groups": pixel, "alpha": 0.1 if odd else 0.2},
        "groups": {"groups": pixel.flip(0) if odd else pixel},
        "grid": {"groups": groups.pixel((3, 4)) if odd else pixel},
        "background": {"groups": pixel, "background": 1 if odd else None},
        "per_class": {"groups": pixel, "per_class": odd},
        "max_images": {"groups": pixel, "max_images": 99 if odd else None},
        "ignore_index": {"groups": pixel, "ignore_index": 254 if odd else 255},
        "too many": {"groups": pixel, "max_images": 5},
        "classes": {"groups": pixel},
        "no images": {"groups": pixel},
    }
    for name, options in cases.items():
        calibrator = Calibrator(**options)
        for probs, labels in some[:2] if name != "no images" else []:
            if name == "classes" and odd:
                probs = torch.cat([probs, probs[:1]])
            calibrator.update(probs, labels.masked_fill(labels == 255, 0))
        result[name] = message(calibrator.sync)
        if name == "no images":
            result["compute"] = message(calibrator.compute)
    return result


def reported() -> str:
    """A bad batch on one rank only (as an accelerator notes it) is said by all."""
    calibrator = build("unbounded")
    calibrator.update(*images()[0])
    if dist.get_rank() == 2:
        calibrator._without_bad(torch.rand(1, *GRID), torch.tensor(True))
    calibrator.sync()
    return message(calibrator.compute)


def one_rank(folder: str) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    assert ranks.active()
    stores._WAITING = 5  # few images here
    result: dict[str, Any] = {}
    for world in (1, 2, 3):
        group = None if world == 3 else dist.new_group([*range(world)])
        if rank < world:
            result.update(agreed(world, group, rank))
    tiling.TILE = 40  # several tiles a gather
    again = agreed(3, None, rank)
    result.update({f"{key}/tiled": value for key, value in again.items()})
    tiling.TILE = 2**20
    result["disagreed"] = disagreed(rank)
    result["reported"] = reported()
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    if not hasattr(torch.compiler, "is_compiling"):  # before PyTorch 2.3 the next line may hang
        time.sleep(1)  # the others have left the barrier by then
        os._exit(0)
    dist.destroy_process_group()


# --- what they must have said ------------------------------------------------------------------


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**os.environ, "RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        for rank, process in enumerate(running):
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, f"rank {rank}: {errors}"
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(3)]


@pytest.mark.nightly
@pytest.mark.parametrize("store", STORES)
def test_every_rank_holds_what_one_pass_gives(said: list[dict[str, Any]], store: str) -> None:
    calibrator = build(store)
    for probs, labels in images():
        calibrator.update(probs, labels)
    want = parts(calibrator.compute())
    seen = 0
    for result in said:
        for key, got in result.items():
            if key.startswith(store + "/") and isinstance(got, dict):
                seen += 1
                for name, value in want.items():
                    assert torch.equal(got[name], value), f"{key}: {name}"
    assert seen == len(SHARDS) * (1 + 2 + 3 + 3)


def test_a_second_sync_and_updates_after_it_are_refused(said: list[dict[str, Any]]) -> None:
    late = "expected updates and merges before sync, got one after it; "
    late += "sync after the last update, or start"
    for rank, result in enumerate(said):
        for world in range(rank + 1, 4):
            second, update, scores, _, nothing = result[f"unbounded/uneven/{world}/later"]
            assert second == (
                "Calibrator.sync: expected one call, got a second one; "
                "sync once, after the last update"
            )
            assert update.startswith(f"Calibrator.update: {late}")
            assert scores.startswith(f"Calibrator.update_scores: {late}")
            assert nothing == "nothing", "merging what saw nothing"
            into = result[f"unbounded/uneven/{world}/into"]
            assert into.startswith(f"Calibrator.merge: {late}")


def test_a_synced_calibrator_can_be_merged_into_a_new_one(said: list[dict[str, Any]]) -> None:
    """As the error's fix says: start a new calibrator and merge."""
    for rank, result in enumerate(said):
        assert result[f"unbounded/uneven/{rank + 1}/later"][3] == "nothing"


def test_settings_that_differ_are_refused_on_every_rank(said: list[dict[str, Any]]) -> None:
    values = {
        "alpha": "1/5 and 1/10",
        "grid": "[4, 3] and [3, 4]",
        "background": "None and 1",
        "per_class": "False and True",
        "max_images": "None and 99",
        "ignore_index": "255 and 254",
    }
    for result in said:
        heard = result["disagreed"]
        for name, got in values.items():
            assert heard[name] == (
                f"Calibrator.sync: expected the same {name} on all ranks, got {got}; "
                "build all alike"
            )
        assert heard["groups"] == said[0]["disagreed"]["groups"]
        assert heard["groups"].startswith("Calibrator.sync: expected the same groups on all ranks")
        assert heard["classes"] == (
            "Calibrator.sync: expected the same number of classes on all ranks, got [3, 4]; "
            "use one model"
        )
        assert heard["too many"] == (
            "Calibrator.sync: expected at most max_images=5 images, got 6 on all ranks; "
            "build it with a larger max_images"
        )


def test_no_image_on_any_rank(said: list[dict[str, Any]]) -> None:
    for result in said:
        assert result["disagreed"]["no images"] == "nothing"
        assert result["disagreed"]["compute"].startswith("Calibrator.compute: expected labelled im")


def test_a_bad_batch_of_one_rank_is_reported_by_all(said: list[dict[str, Any]]) -> None:
    for result in said:
        assert "got 1 batches with other values" in result["reported"]


def test_without_a_process_group_sync_does_nothing() -> None:
    assert not ranks.active()
    for store in STORES:
        calibrator = build(store)
        calibrator.sync()
        for probs, labels in images()[:20]:
            calibrator.update(probs, labels)
        before = parts(calibrator.compute())
        calibrator.sync()
        calibrator.sync()
        calibrator.update(*images()[6])  # void, and still allowed
        after = parts(calibrator.compute())
        assert torch.equal(before["count"], after["count"])
        assert after["images"].tolist() == [21, NUM_CLASSES]


def test_tiles_cover_every_cell_once() -> None:
    for cells, rows in (
        (1, 1),
        (7, 3),
        (tiling.TILE + 5, 1),
        (10, tiling.TILE),
        (10, 10**9),
        (0, 4),
    ):
        covered = [i for part in tiling.tiles(cells, rows) for i in (part.start, part.stop)]
        assert covered[::2] == [0, *covered[1:-1:2]][: len(covered) // 2]
        assert (covered[-1] if covered else 0) == cells


if __name__ == "__main__":
    one_rank(sys.argv[1])
