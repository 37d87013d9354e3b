"""A check names the mistakes that people make, and nothing on data without them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import binom

from cpseg.core.class_map import ClassMap
from cpseg.core.colours import class_colours
from cpseg.core.palette import voc_palette
from cpseg.core.score_reading import ScoreReading
from cpseg.files import ScoreFolder, Source, palette, record_scores
from cpseg.jobs import check
from cpseg.jobs.check_agreement import (
    agreement,
    agreement_findings,
    best_shift,
    better_numbering,
    mean_iou,
)
from cpseg.jobs.check_findings import Check
from cpseg.jobs.check_picture import draw
from cpseg.jobs.check_scores import layout_of

K, SIZE, CELL = 6, (40, 56), 8
Array = np.ndarray[Any, np.dtype[Any]]


class Data:
    """Images of cells; a model of some agreement that errs by whole cells, and by pixels."""

    def __init__(self, root: Path, *, seed: int = 0, count: int = 24, agree: float = 0.8) -> None:
        rng = np.random.default_rng(seed)
        self.root, self.masks, self.probs = root, {}, {}
        confused = rng.dirichlet(np.ones(K - 1), size=K)
        confused = np.minimum(confused, 0.9 * agree / max(1e-9, 1 - agree))
        shares = rng.dirichlet(np.full(K, 5.0))
        for number in range(count):
            grid = (SIZE[0] // CELL, SIZE[1] // CELL)
            cells = rng.choice(K, p=shares, size=grid)
            found = cells.copy()
            for place in np.ndindex(*grid):
                if rng.random() > agree + 0.03:
                    others = [k for k in range(K) if k != cells[place]]
                    odds = confused[cells[place]] / confused[cells[place]].sum()
                    found[place] = rng.choice(others, p=odds)
            truth = np.kron(cells, np.ones((CELL, CELL), int)).astype(np.uint8)
            best = np.kron(found, np.ones((CELL, CELL), int))
            logits = rng.normal(size=(K, *SIZE))
            top = logits.max(0) + rng.exponential(size=SIZE)
            own = np.take_along_axis(logits, best[None], 0)[0]
            top = np.where(rng.random(SIZE) < 0.97, top, own)
            np.put_along_axis(logits, best[None], top[None], 0)
            odds = np.exp(logits)
            truth[:2] = 255
            self.masks[f"{number:02d}"] = truth
            self.probs[f"{number:02d}"] = (odds / odds.sum(0)).astype(np.float32)
        self.write()

    def write(
        self,
        mask: Callable[[Array], Array] = lambda mask: mask,
        prob: Callable[[Array], Array] = lambda prob: prob,
    ) -> Data:
        for folder in ("images", "masks", "probs"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        for name, truth in self.masks.items():
            grey = np.stack([truth] * 3, -1)
            Image.fromarray(grey).save(self.root / f"images/{name}.png")
            Image.fromarray(mask(truth)).save(self.root / f"masks/{name}.png")
            np.save(self.root / f"probs/{name}.npy", prob(self.probs[name]))
        self.ids = self.list("ids.txt", list(self.masks))
        return self

    def list(self, name: str, images: list[str]) -> Path:
        lines = [f"images/{image}.png masks/{image}.png\n" for image in images]
        (self.root / name).write_text("".join(lines))
        return self.root / name

    @property
    def names(self) -> list[str]:
        return list(self.masks)

    @property
    def source(self) -> Source:
        return Source(self.root, self.root / "probs")

    def check(self, **more: Any) -> Check:
        return check(self.source, self.ids, **more)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path)


def wrong(found: Check) -> dict[str, str]:
    """Names and texts of all findings that are not ok."""
    assert [f.level for f in found.findings] == sorted(
        (f.level for f in found.findings), key=["ok", "warning", "error"].index
    )
    return {each.name: each.text for each in found.findings if each.level != "ok"}


def on_classes(change: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Change a mask where it is not void."""
    return lambda mask: np.where(mask == 255, mask, change(mask)).astype(np.uint8)


def to_logits(prob: Array) -> Array:
    return np.log(prob) * 1.5 + 1


def swapped(a: int, b: int) -> Callable[[Array], Array]:
    table = np.arange(256)
    table[[a, b]] = b, a
    return lambda mask: table[mask].astype(np.uint8)


# --- nothing is wrong


@pytest.mark.parametrize("agree", [0.9, 0.4])
@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_said_of_data_without_a_mistake(seed: int, agree: float, tmp_path: Path) -> None:
    data = Data(tmp_path, seed=seed, agree=agree)
    more = Data(tmp_path / "more", seed=seed, count=3, agree=agree)
    for name in more.names:
        np.save(tmp_path / f"probs/u{name}.npy", more.probs[name])
        Image.new("RGB", SIZE[::-1]).save(tmp_path / f"images/u{name}.png")
    found = data.check(unlabelled=data.list("unlabelled.txt", [f"u{n}" for n in more.names]))
    assert wrong(found) == {}, found
    assert found.can_work
    assert found.agreement == pytest.approx(agree, abs=0.12)
    assert found.verdict.startswith("Nothing looks wrong: argmax and masks agree on ")


def test_figures_are_those_of_all_pixels(data: Data) -> None:
    found = data.check()
    truth = np.stack([data.masks[name] for name in data.names])
    best = np.stack([data.probs[name].argmax(0) for name in data.names])
    known = truth != 255
    assert found.agreement == pytest.approx((truth == best)[known].mean())
    for each in found.shares:
        own = truth[known] == each.index
        assert each.masks == pytest.approx(own.mean())
        assert each.argmax == pytest.approx((best[known] == each.index).mean())
        assert each.recall == pytest.approx((best[known] == each.index)[own].mean())
    ious = [
        ((truth == k) & (best == k)).sum() / (known & ((truth == k) | (best == k))).sum()
        for k in range(K)
    ]
    assert found.miou == pytest.approx(np.mean(ious))


def test_a_long_list_is_read_here_and_there(tmp_path: Path) -> None:
    data = Data(tmp_path, count=30)
    found = data.check()
    assert (found.read, found.listed) == (24, 30)
    assert "24 of 30 labelled images read; --all reads all" in str(found)
    assert repr(found).startswith("Check(24 of 30 images read: ")
    everything = data.check(everything=True)
    assert everything.read == 30
    assert "--all" not in str(everything)


# --- the six mistakes

FAULTS: dict[str, tuple[dict[str, Any], str, str, list[str]]] = {
    "shifted": (
        {"mask": on_classes(lambda mask: (mask + 1) % K)},
        "shift",
        "warning",
        ["class i of the scores looks like class i+1 of the masks", "shifted by one"],
    ),
    "shifted down": (
        {"mask": on_classes(lambda mask: (mask + K - 1) % K)},
        "shift",
        "warning",
        ["class i+1 of the scores looks like class i of the masks"],
    ),
    "last axis": (
        {"prob": lambda prob: prob.transpose(1, 2, 0)},
        "layout",
        "error",
        ["scores [40, 56, 6] for an image of 40x56", "HWC", "--layout hwc"],
    ),
    "logits": ({"prob": to_logits}, "logits", "error", ["logits", "--logits"]),
    "log": ({"prob": np.log}, "logits", "error", ["logarithms", "--logits"]),
    "from 1": (
        {"mask": on_classes(lambda mask: mask + 1)},
        "first-class",
        "error",
        ["values up to 6 for classes 0..5", "there is no 0", "--first-class 1"],
    ),
    "from 1, void 0": (
        {"mask": lambda mask: mask + np.uint8(1)},
        "first-class",
        "error",
        ["0 becomes void", "--first-class 1"],
    ),
    "void": (
        {"mask": lambda mask: np.where(mask == 255, K, mask).astype(np.uint8)},
        "void",
        "error",
        ["value 6 (5.0 % of pixels) is neither a class 0..5 nor void (255)", "--void 6"],
    ),
    "void 254": (
        {"mask": lambda mask: np.where(mask == 255, 254, mask).astype(np.uint8)},
        "void",
        "error",
        ["value 254", "--void 254"],
    ),
    "swapped": (
        {"mask": swapped(3, 5)},
        "permutation",
        "warning",
        ["classes 3 and 5 look swapped", "--class-map"],
    ),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_mistake_is_named_and_nothing_else(fault: str, seed: int, tmp_path: Path) -> None:
    change, name, level, parts = FAULTS[fault]
    found = Data(tmp_path, seed=seed).write(**change).check()
    said = wrong(found)
    assert set(said) == {name}, found
    for part in parts:
        assert part in said[name]
    assert found.can_work == (level == "warning")
    assert found.at(level)
    if level == "error":  # what the mistake hides is seen all the same
        assert found.agreement == pytest.approx(0.8, abs=0.1)


def test_several_mistakes_at_once_are_all_named(data: Data) -> None:
    data.write(swapped(0, 2), lambda prob: to_logits(prob).transpose(1, 2, 0))
    found = data.check()
    assert set(wrong(found)) == {"permutation", "layout", "logits"}
    assert "classes 0 and 2 look swapped" in wrong(found)["permutation"]
    assert found.verdict == "This cannot work yet: mend 2 errors first."


def test_three_classes_that_change_places(data: Data) -> None:
    table = np.arange(256)
    table[[0, 1, 2]] = 1, 2, 0
    text = wrong(data.write(lambda mask: table[mask].astype(np.uint8)).check())["permutation"]
    assert "of the scores, class 2 like 0, 0 like 1, 1 like 2 of the masks" in text


# --- how often a numbering is seen that is not there


def poor_model(rng: np.random.Generator, images: int, classes: int, recall: float = 0.4) -> Array:
    """Confusions of a model that is right on 40 % of a region, and confuses it with one class.

    No class is given another number more often than its own, so no other numbering is better.
    """
    shares = rng.dirichlet(np.full(classes, 0.5))
    while True:
        confused = rng.dirichlet(np.full(classes, 0.6), size=classes)
        np.fill_diagonal(confused, 0)
        confused /= confused.sum(1, keepdims=True)
        if confused.max() * (1 - recall) <= recall:
            break
    counts = np.zeros((images, classes, classes), np.int64)
    for image in counts:
        for _ in range(10):
            true, size = rng.choice(classes, p=shares), int(rng.exponential(3000)) + 50
            right = int(size * rng.beta(2 * recall, 2 * (1 - recall)))
            image[true, true] += right
            image[true, rng.choice(classes, p=confused[true])] += size - right
    return counts


@pytest.mark.parametrize(("images", "classes"), [(24, 4), (24, 21), (6, 11), (3, 4)])
def test_a_poor_model_is_rarely_told_of_another_numbering(images: int, classes: int) -> None:
    """At most 2 in 100 data sets; false alarm of this test below 1 in 1,000."""
    worlds, claims, shares = 150, 0, []
    for seed in range(worlds):
        counts = poor_model(np.random.default_rng([seed, images]), images, classes)
        shares.append(agreement(counts))
        claims += best_shift(counts) != 0 or better_numbering(counts) != tuple(range(classes))
    assert np.mean(shares) == pytest.approx(0.4, abs=0.03)
    assert claims <= binom.ppf(0.999, worlds, 0.02)


def test_a_shift_is_seen_of_a_poor_model_too() -> None:
    seen = 0
    for seed in range(40):
        counts = poor_model(np.random.default_rng([seed, 7]), 24, 11)
        seen += best_shift(np.roll(counts, 1, axis=1)) == 1
        seen += best_shift(np.roll(counts, -1, axis=1)) == -1
    assert seen >= 72  # of 80


def test_masks_of_other_images_agree_by_chance(data: Data) -> None:
    masks = list(data.masks.values())
    data.masks = dict(zip(data.names, masks[5:] + masks[:5], strict=True))
    said = wrong(data.write().check())
    assert set(said) == {"agreement"}
    assert "by chance it would be" in said["agreement"]


def test_counts_by_hand() -> None:
    counts = np.array([[[6, 2], [0, 2]]])
    assert agreement(counts) == 0.8
    assert mean_iou(counts) == pytest.approx((6 / 8 + 2 / 4) / 2)
    assert math.isnan(agreement(counts * 0))
    assert agreement_findings("", counts * 0) == []


# --- scores


@pytest.mark.parametrize(
    ("shape", "kind", "last"),
    [
        ((6, 40, 56), "same", False),
        ((40, 56, 6), "same", True),
        ((6, 10, 14), "low", False),
        ((10, 14, 6), "low", True),
        ((6, 80, 112), "high", False),
        ((6, 56, 40), "turned", False),
        ((6, 30, 56), "other", False),
        ((40, 56), "rank", False),
        ((1, 6, 40, 56), "rank", False),
        ((0, 40, 56), "rank", False),
    ],
)
def test_layouts(shape: tuple[int, ...], kind: str, last: bool) -> None:
    assert layout_of(shape, (40, 56)) == (kind, last)


@pytest.mark.parametrize(
    ("prob", "name", "part"),
    [
        (lambda p: p[:, 2::4, 2::4], "resolution", "a lower resolution; pass --upsample"),
        (lambda p: p.repeat(2, 1).repeat(2, 2), "resolution", "a higher resolution"),
        (lambda p: p.transpose(0, 2, 1), "shape", "height and width are swapped"),
        (lambda p: p[:, :30], "shape", "neither this size nor this aspect"),
        (lambda p: p.argmax(0).astype(np.uint8), "shape", "no class axis: labels?"),
        (lambda p: p[None], "shape", "4 axes"),
        (lambda p: p * 100, "values", "per cent; divide by 100"),
        (lambda p: p * 255, "values", "divide by 255"),
        (lambda p: p * 1.001 + 0.001 * (p > 0.9), "values", "rounding"),
        (lambda p: np.where(p > 0.99, np.nan, p), "finite", "NaN values in"),
        (lambda p: np.where(p > 0.99, np.inf, p), "finite", "infinite values in"),
        (lambda p: (p * 1000).astype(np.int64), "dtype", "int64 values"),
        (lambda p: np.sqrt(p), "sums", "--scores sigmoid"),
        (lambda p: np.full_like(p, 1 / K), "flat", "did the model run?"),
    ],
)
def test_what_is_wrong_with_scores(
    prob: Callable[[Array], Array], name: str, part: str, data: Data
) -> None:
    said = wrong(data.write(prob=prob).check())
    assert part in said[name], said


@pytest.mark.parametrize(
    "prob",
    [
        lambda p: (p * 255).round().astype(np.uint8),
        lambda p: p.astype(np.float16),
        lambda p: p.astype(np.float64),
    ],
)
def test_what_is_right_with_scores(prob: Callable[[Array], Array], data: Data) -> None:
    assert wrong(data.write(prob=prob).check()) == {}


def test_files_of_other_kinds(data: Data) -> None:
    for name, scores in data.probs.items():
        (data.root / f"probs/{name}.npy").unlink()
        path = data.root / f"probs/{name}"
        tensor = torch.from_numpy(scores).to(torch.bfloat16)
        if int(name) % 3 == 0:
            torch.save(tensor, f"{path}.pt")
        elif int(name) % 2:
            save_file({"probs": tensor}, f"{path}.safetensors")
        else:
            np.savez_compressed(f"{path}.npz", probs=scores, more=scores[0])
    assert wrong(data.check()) == {}
    np.savez(data.root / "probs/02.npz", a=scores, b=scores)
    (data.root / "probs/04.npz").write_bytes(b"no zip")
    said = wrong(data.check())
    assert "expected an array 'probs', got arrays a, b" in said["scores-unreadable"]
    assert "(1 other alike)" in said["scores-unreadable"]


def test_files_differ_in_their_classes(data: Data) -> None:
    np.save(data.root / "probs/03.npy", data.probs["03"][:5])
    assert "5 in images/03.png, 6 in images/00.png" in wrong(data.check())["classes"]


def test_how_scores_are_read_is_heeded(data: Data) -> None:
    def both(prob: Array) -> Array:
        return to_logits(prob)[:, 2::4, 2::4].transpose(1, 2, 0)

    cures: list[tuple[Callable[[Array], Array], ScoreReading]] = [
        (lambda prob: prob.transpose(1, 2, 0), ScoreReading("hwc")),
        (to_logits, ScoreReading(logits="softmax")),
        (lambda prob: prob[:, 2::4, 2::4], ScoreReading(upsample=True)),
        (both, ScoreReading("hwc", "softmax", upsample=True)),
    ]
    for prob, reading in cures:
        data.write(prob=prob)
        assert wrong(data.check()) != {}
        found = check(replace(data.source, reading=reading), data.ids)
        assert wrong(found) == {}, reading
        assert found.agreement == pytest.approx(0.8, abs=0.1)


def test_reading_that_is_not_needed_is_named(data: Data) -> None:
    for reading, name, part in (
        (ScoreReading("hwc"), "layout", "classes are the first axis (CHW); leave --layout hwc out"),
        (ScoreReading(logits="softmax"), "logits", "leave --logits out"),
    ):
        said = wrong(check(replace(data.source, reading=reading), data.ids))
        assert set(said) == {name}
        assert part in said[name]
    eight_bits = data.write(prob=lambda prob: (prob * 255).round().astype(np.uint8))
    reading = ScoreReading(logits="softmax")
    assert "uint8" in wrong(check(replace(eight_bits.source, reading=reading), data.ids))["logits"]


def test_one_file_with_all_images(data: Data, tmp_path: Path) -> None:
    whole = tmp_path / "all.npz"
    np.savez(whole, **{name: data.probs[name] for name in data.names})
    found = check(Source(data.root, whole), data.ids)
    assert wrong(found) == {}
    assert found.agreement == data.check().agreement
    np.savez(whole, **{name: data.probs[name] for name in data.names[1:]})
    said = wrong(check(Source(data.root, whole), data.ids))
    assert "1 of 24 labelled images have no scores in" in said["scores-missing"]


def test_a_class_map_is_applied(data: Data) -> None:
    merge = np.array([0, 1, 2, 3, 3, 3])
    data.write(on_classes(lambda mask: merge[np.minimum(mask, 5)]))
    assert wrong(data.check()) != {}
    mapped = replace(data.source, class_map=ClassMap((0, 1, 2, 3, 3, 3)))
    found = check(mapped, data.ids)
    assert wrong(found) == {}
    assert len(found.shares) == 4
    short = replace(data.source, class_map=ClassMap((0, 1, 2)))
    assert "--class-map maps 3" in wrong(check(short, data.ids))["classes"]


def test_of_several_models_each_is_named(data: Data) -> None:
    other = data.root / "others"
    other.mkdir()
    for name, scores in data.probs.items():
        np.save(other / f"{name}.npy", to_logits(scores))
    found = check(replace(data.source, others=(ScoreFolder(other),)), data.ids)
    assert set(wrong(found)) == {"logits"}
    assert wrong(found)["logits"].startswith("others: scores have values from")
    assert "probs: argmax and masks agree" in str(found)


# --- masks


def test_masks_in_colours(data: Data) -> None:
    table = np.array(palette(), np.uint8).reshape(256, 3)
    found = data.write(lambda mask: table[mask]).check()
    assert set(wrong(found)) == {"colours"}
    assert "--palette voc" in wrong(found)["colours"]
    assert found.agreement == pytest.approx(0.8, abs=0.1)
    own = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    found = data.write(lambda mask: own[mask]).check()
    assert "--palette with the colour of every class" in wrong(found)["colours"]
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    assert "photographs" in wrong(data.write(lambda mask: noise).check())["colours"]


def test_masks_of_other_modes(data: Data) -> None:
    said = wrong(data.write(lambda mask: np.stack([mask] * 3, -1)).check())
    assert set(said) == {"mode"}
    assert "grey images of mode RGB" in said["mode"]
    assert "mode I" in wrong(data.write(lambda mask: mask.astype(np.uint16)).check())["mode"]


def test_masks_of_another_size(data: Data) -> None:
    said = wrong(data.write(lambda mask: mask[::2, ::2]).check())
    assert "masks/00.png is 20x28, the image 40x56" in said["size"]
    both = data.write(lambda mask: mask[::2, ::2], lambda prob: prob[:, ::2, ::2]).check()
    assert set(wrong(both)) == {"size"}
    assert both.can_work
    assert "labels will have the size of masks and scores" in wrong(both)["size"]


def test_masks_of_another_data_set(data: Data) -> None:
    strange = np.random.default_rng(0).integers(0, 34, SIZE, dtype=np.uint8)
    said = wrong(data.write(lambda mask: strange).check())
    assert "masks of another data set?" in said["data-set"]
    assert "values 6 (" in said["data-set"]
    assert "and 24 more" in said["data-set"]


def test_a_mask_map_counts(data: Data) -> None:
    data.write(on_classes(lambda mask: mask * 2))
    assert "data-set" in wrong(data.check()) or "values" in wrong(data.check())
    doubled = ClassMap((0, None, 1, None, 2, None, 3, None, 4, None, 5))
    assert wrong(check(replace(data.source, mask_map=doubled), data.ids)) == {}
    said = wrong(check(replace(data.source, mask_map=ClassMap((0, 1))), data.ids))
    assert "--mask-map leads to 2 classes, the scores have 6" in said["classes"]
    left = ClassMap((0, None, 1, None, 2, None, 3, None, 4, 5))
    said = wrong(check(replace(data.source, mask_map=left), data.ids))
    assert "value 10 (" in said["void"]
    assert "10: null" in said["void"]


def test_a_second_void_value(data: Data) -> None:
    def two(mask: Array) -> Array:
        changed = mask.copy()
        changed[-2:] = 77
        return changed

    assert "--mask-map with 77: null" in wrong(data.write(two).check())["void"]
    assert wrong(check(replace(data.source, void=77), data.ids))["void"].count("255") == 2


def test_what_cures_a_mistake_is_heeded(data: Data) -> None:
    table = np.array(palette(), np.uint8).reshape(256, 3)
    cures: list[tuple[Callable[[Array], Array], dict[str, Any]]] = [
        (lambda mask: table[mask], {"palette": voc_palette()}),
        (on_classes(lambda mask: mask + 1), {"first_class": 1}),
        (lambda mask: mask + np.uint8(1), {"first_class": 1}),
        (lambda mask: np.where(mask == 255, K, mask).astype(np.uint8), {"void": K}),
    ]
    for mask, cure in cures:
        data.write(mask)
        assert wrong(data.check()) != {}
        found = check(replace(data.source, **cure), data.ids)
        assert wrong(found) == {}, cure
        assert found.agreement == pytest.approx(0.8, abs=0.1)
    assert "value 0 (" not in str(found)
    unknown = replace(data.source, palette=voc_palette())
    own = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    said = wrong(check(unknown, data.write(lambda mask: own[mask]).ids))
    assert "colours of --palette" in said["masks-unreadable"]
    both = replace(data.source, first_class=1, mask_map=ClassMap((0, 1)))
    with pytest.raises(ValueError, match="one of mask map and first class"):
        check(both, data.ids)


def test_a_folder_of_masks(data: Data) -> None:
    source = replace(data.source, masks=data.root / "masks")
    (data.root / "ids.txt").write_text("".join(f"images/{n}.png\n" for n in data.names))
    assert wrong(check(source, data.ids)) == {}
    assert wrong(check(source, data.root / "images")) == {}
    (data.root / "masks/03.png").unlink()
    found = check(source, data.ids)
    assert set(wrong(found)) == {"masks-folder"}
    assert "1 of 24 labelled images have no mask in --masks: " in wrong(found)["masks-folder"]
    assert found.agreement == pytest.approx(0.8, abs=0.1)


# --- bad input


def test_no_masks(data: Data) -> None:
    for path in (data.root / "masks").iterdir():
        path.unlink()
    found = data.check()
    assert set(wrong(found)) == {"masks-missing"}
    assert "none of the 24 masks listed is under" in wrong(found)["masks-missing"]
    assert math.isnan(found.agreement)
    (data.root / "ids.txt").write_text("".join(f"images/{n}.png\n" for n in data.names))
    assert "24 of 24 lines of the list name no mask" in wrong(data.check())["masks-listed"]


def test_masks_of_void_alone(data: Data) -> None:
    said = wrong(data.write(lambda mask: np.full_like(mask, 255)).check())
    assert "void alone (value 255)" in said["void-only"]
    assert set(said) == {"void-only"}
    data.masks["05"][:] = 255
    found = data.write().check()
    assert "1 of 24 masks read are void alone: masks/05.png" in wrong(found)["void-only"]
    assert found.can_work


def test_three_images(tmp_path: Path) -> None:
    said = wrong(Data(tmp_path, count=3).check())
    assert set(said) <= {"labelled", "never-labelled"}
    assert "3 labelled images listed" in said["labelled"]
    assert "need 19" in said["labelled"]


def test_scores_of_half_of_the_images(data: Data) -> None:
    for name in data.names[::2]:
        (data.root / f"probs/{name}.npy").unlink()
    found = data.check()
    assert set(wrong(found)) == {"scores-missing"}
    assert "12 of 24 labelled images have no scores in" in wrong(found)["scores-missing"]
    assert found.read == 12
    assert found.agreement == pytest.approx(0.8, abs=0.1)


def test_a_class_that_only_unlabelled_images_have(data: Data) -> None:
    data.write(on_classes(lambda mask: np.where(mask == 4, 3, mask)))
    said = wrong(data.check(unlabelled=data.list("unlabelled.txt", data.names[:8])))
    assert "class 4: " in said["only-unlabelled"]
    assert "8 labelled images are in the unlabelled list too" in said["overlap"]


def test_a_class_without_labels(data: Data) -> None:
    said = wrong(data.write(on_classes(lambda mask: np.where(mask == 4, 255, mask))).check())
    assert "class 4 of the scores: in none of the 24 masks read" in said["never-labelled"]


def test_more_masks_are_read_for_a_class_that_is_missing(tmp_path: Path) -> None:
    data = Data(tmp_path, count=30)
    for number, mask in enumerate(data.masks.values()):
        mask[mask == 4] = 255
        if number == 2:  # not among the 24 that are read first
            mask[5:9] = 4
    found = data.write().check()
    assert "never-labelled" not in wrong(found), found


def test_unlabelled_images_without_scores(data: Data) -> None:
    listed = data.list("unlabelled.txt", ["u0", "u1"])
    said = wrong(data.check(unlabelled=listed))
    assert "2 of 2 unlabelled images have no scores in" in said["unlabelled-scores"]
    assert said["images-missing"].startswith("unlabelled: none of the 2 images listed")


def test_scores_without_images(data: Data) -> None:
    labelled = data.list("some.txt", data.names[:20])
    found = check(data.source, labelled)
    assert wrong(found) == {}
    assert "probs: 4 further score files of images in neither list" in str(found)
    np.save(data.root / "probs/stray.npy", data.probs["00"])
    assert (
        "1 score file without an image of that name"
        in wrong(check(data.source, labelled))["orphans"]
    )


def test_scores_of_a_model_that_has_seen_the_images(data: Data) -> None:
    record_scores(data.root / "probs", trained_on=["images/00.png"])
    said = wrong(data.check())
    assert set(said) == {"seen"}
    assert "not trained on" in said["seen"]


def test_files_that_are_no_images(data: Data) -> None:
    (data.root / "masks/00.png").write_text("no")
    (data.root / "images/01.png").write_text("no")
    said = wrong(data.check())
    assert set(said) == {"masks-unreadable", "images-unreadable"}


def test_what_it_costs(data: Data) -> None:
    text = str(data.check())
    assert f"24 score files, {24 * (K * 40 * 56 * 4 + 128) / 1e6:.1f} MB: about " in text
    assert "label needs up to 54 KB of disk for 24 masks" in text


# --- the picture


def test_the_picture(data: Data, tmp_path: Path) -> None:
    data.write(swapped(0, 1))
    assert draw(data.check(), tmp_path / "check.png") == 3
    picture = np.array(Image.open(tmp_path / "check.png"))
    assert picture.shape[1] == 3 * 320 + 4 * 8
    seen = set((picture.reshape(-1, 3) @ np.array([65536, 256, 1])).tolist())
    for red, green, blue in class_colours(K).tolist():  # in the legend
        assert 65536 * red + 256 * green + blue in seen
    panel = picture[34:44, 8 + 328 : 648].reshape(-1, 3)  # the first rows of masks are void
    assert {tuple(each) for each in panel.tolist()} == {(95, 95, 95), (185, 185, 185)}


def test_no_picture_without_photographs(data: Data, tmp_path: Path) -> None:
    for path in (data.root / "images").iterdir():
        path.unlink()
    found = data.check()
    assert set(wrong(found)) == {"images-missing"}
    assert draw(found, tmp_path / "check.png") == 0
    assert not (tmp_path / "check.png").exists()


def test_a_real_model_on_real_images() -> None:
    root = Path(__file__).parents[3] / "shared" / "data" / "camvid"
    if not root.is_dir():
        pytest.skip("needs the class scores of a model on CamVid, which are not in the repository")
    source = Source(root, root / "probs")
    found = check(source, root / "labelled_50.txt", unlabelled=root / "unlabelled_50.txt")
    assert wrong(found) == {}
    assert found.agreement == pytest.approx(0.65, abs=0.03)
