"""Several sources of scores and an encoder's features: one map over all of them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.helpers import exact, raises, same, seeded
from torch import Tensor
from torch.nn import functional

from cpseg import (
    Calibration,
    Calibrator,
    Certifier,
    FeatureProjection,
    Recalibration,
    Recalibrator,
    certainty,
    groups,
)
from cpseg.core.channels import join_channels
from cpseg.recalibration.features import FLOOR

K = 3
SIDE = 24
Example = tuple[list[Tensor], Tensor]


def world(number: int, seed: int, *, channels: int = 0) -> list[Example]:
    """Two models, each blind to one difference; features know where class 2 is, and noise."""
    generator = seeded(seed)
    examples = []
    for _ in range(number):
        coarse = torch.randint(K, (1, 1, 8, 8), generator=generator).float()
        labels = functional.interpolate(coarse, size=(SIDE, SIDE))[0, 0].long()
        first, second = labels.clamp(max=1), labels.clamp(min=1)  # 1 and 2, or 0 and 1, are one
        parts = []
        for seen in (first, second):
            noise = torch.randn(K, SIDE, SIDE, generator=generator)
            noise[:, ::1] += 2.0 * functional.one_hot(seen, K).movedim(-1, 0)
            parts.append(noise.softmax(0))
        parts[1] = functional.interpolate(parts[1][None], scale_factor=0.5, mode="area")[0]
        if channels:
            features = torch.randn(channels, 8, 8, generator=generator)
            where = functional.interpolate(
                (labels == 2).float()[None, None], size=(8, 8), mode="area"
            )[0, 0]
            features[0] += 4 * where
            parts.append(features)
        examples.append((parts, labels))
    return examples


def fitted(examples: list[Example], only: int | None = None, **options: Any) -> Recalibration:
    recalibrator = Recalibrator(K, **options)
    for number, (parts, labels) in enumerate(examples):
        probs: Any = parts if only is None else at_full(parts[only])
        recalibrator.update(probs, labels, ids=f"{number}")
    return recalibrator.fit()


def at_full(part: Tensor) -> Tensor:
    return join_channels([torch.zeros(1, SIDE, SIDE), part])[1:]


def wrong(recalibration: Recalibration, examples: list[Example], only: int | None = None) -> float:
    shares = []
    for parts, labels in examples:
        probs: Any = parts if only is None else at_full(parts[only])
        shares.append(float((recalibration(probs).argmax(0) != labels).float().mean()))
    return float(np.mean(shares))


def projected(examples: list[Example], components: int = 64) -> FeatureProjection:
    return FeatureProjection.fit([parts[-1] for parts, _ in examples], components=components)


# What it gains


def test_one_map_over_two_models_beats_each_of_them() -> None:
    train, test = world(8, 0), world(6, 1)
    both = wrong(fitted(train), test)
    alone = [wrong(fitted(train, only), test, only) for only in (0, 1)]
    assert both < 0.6 * min(alone), (both, alone)


def test_features_are_used_where_they_help_and_left_where_they_do_not() -> None:
    train, test = world(8, 0, channels=12), world(6, 1, channels=12)
    with_features = fitted(train, features=projected(train))
    without = fitted([(parts[:2], labels) for parts, labels in train])
    gain = wrong(without, [(p[:2], labels) for p, labels in test]) - wrong(with_features, test)
    assert gain > 0.01
    assert with_features.projection is not None
    assert with_features.projection.components in (8, 12)
    tried = {(row["components"], tuple(row["context"])) for row in with_features.cv}
    assert tried == {(0, ()), (8, ()), (12, ())}
    noise = [([*parts[:2], torch.randn(12, 8, 8, generator=seeded(9))], y) for parts, y in train]
    useless = fitted(noise, features=projected(noise))
    assert useless.projection is not None
    assert useless.projection.components == 0


# The map, by a loop that shares no code


def naive(recal: Recalibration, parts: list[np.ndarray], base_absent: bool = False) -> np.ndarray:
    """Channels at full size in float64: scores of every model, then components."""
    kinds = recal.scores.split(",") * (1 if "," in recal.scores else len(recal.sources))
    logs, opposite = [], []
    for part, kind in zip(parts, kinds, strict=False):
        logs.append(np.log(np.maximum(part, FLOOR)))
        if kind == "sigmoid":
            opposite.append(np.log(np.maximum(1 - part, FLOOR)))
    features = np.concatenate([*logs, *opposite, *parts[len(recal.sources) :]])
    z = np.einsum("kf,fhw->khw", exact(recal.weight), features)
    z += exact(recal.bias)[:, None, None]
    z -= recal.prior_power * np.log(exact(recal.prior))[:, None, None]
    odds = np.exp(z - z.max(0))
    return odds / odds.sum(0)


@given(
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from(["softmax", "sigmoid", "mixed"]),
    st.integers(0, 2**16),
)
def test_the_map_is_that_of_a_loop(models: int, components: int, kind: str, seed: int) -> None:
    generator = seeded(seed)
    classes = tuple(int(n) for n in torch.randint(2, 5, (models,), generator=generator))
    kinds = [("softmax", "sigmoid")[n % 2] for n in range(models)] if kind == "mixed" else [kind]
    scores = ",".join(kinds) if len(set(kinds)) > 1 else kinds[0]
    own = sum(classes)
    sigmoid = [
        c
        for c, word in zip(classes, kinds * (models if len(kinds) == 1 else 1), strict=True)
        if word == "sigmoid"
    ]
    columns = own + sum(sigmoid) + components
    projection = None
    if components:
        projection = FeatureProjection(
            torch.randn(5, generator=generator), torch.randn(5, components, generator=generator), 2
        )
    prior = torch.rand(4, generator=generator, dtype=torch.float64) + 0.1
    recal = Recalibration(
        0.4 * torch.randn(4, columns, generator=generator),
        torch.randn(4, generator=generator),
        prior / prior.sum(),
        "dirichlet",
        scores,
        (),
        own,
        3,
        0.01,
        0.3,
        sources=classes,
        projection=projection,
    )
    parts = [torch.rand(c, 5, 6, generator=generator) for c in classes]
    arrays = [exact(part) for part in parts]
    if projection is not None:
        features = torch.randn(5, 5, 6, generator=generator)
        parts.append(features)
        centred = exact(features) - exact(projection.mean)[:, None, None]
        arrays.append(np.einsum("cp,chw->phw", exact(projection.basis), centred))
    mapped = recal(parts)
    np.testing.assert_allclose(exact(mapped), naive(recal, arrays), rtol=2e-4, atol=2e-6)
    joined = recal.join(parts)
    assert same(recal(joined), mapped)
    assert same(recal(joined[None])[0], mapped)
    assert same(recal.evidence(parts, background=1).best, recal.evidence(joined, background=1).best)
    assert same(recal(recal.join([part[None] for part in parts]))[0], mapped)


def test_the_starting_map_is_the_mean_of_the_log_scores_and_of_what_a_class_keeps() -> None:
    examples = [([*parts[:1], at_full(parts[1])], labels) for parts, labels in world(3, 5)]
    recal = fitted([(p, y.masked_fill(y == 2, 255)) for p, y in examples], method="none")
    assert recal.absent == (2,)
    first, second = (exact(part) for part in examples[0][0])
    geometric = np.sqrt(np.maximum(first, FLOOR) * np.maximum(second, FLOOR))
    kept = (first[2] + second[2]) / 2
    expected = geometric[:2] / geometric[:2].sum(0) * (1 - kept)
    np.testing.assert_allclose(exact(recal(examples[0][0]))[:2], expected, rtol=1e-4)
    np.testing.assert_allclose(exact(recal(examples[0][0]))[2], kept, rtol=1e-4)


# Colours and trees


def coloured(number: int, seed: int) -> list[Example]:
    """Models as before; class 2 is where the image is neither dark nor bright."""
    generator = seeded(seed + 1000)
    examples = []
    for parts, labels in world(number, seed):
        image = torch.rand(3, SIDE, SIDE, generator=generator)
        image[0] = torch.where(labels == 2, 0.4 + 0.2 * image[0], (image[0] > 0.5).float())
        examples.append(([*parts, image], labels))
    return examples


def test_colours_are_a_source() -> None:
    train, test = coloured(8, 0), coloured(6, 1)
    with_colour = wrong(fitted(train, colour=True), test)
    without = wrong(
        fitted([(parts[:2], labels) for parts, labels in train]),
        [(parts[:2], labels) for parts, labels in test],
    )
    assert with_colour < 0.7 * without, (with_colour, without)


def test_the_map_of_colours_is_that_of_a_loop() -> None:
    examples = coloured(4, 2)
    recal = fitted(examples, colour=True)
    parts = examples[0][0]
    joined = exact(recal.join(parts))
    scores, (red, green, blue) = joined[:6], joined[6:9]
    columns = [*np.log(np.maximum(scores, FLOOR)), 4 * red, 4 * green, 4 * blue]
    columns += [8 * (c - 0.5) ** 2 for c in (red, green, blue)]
    columns += [4 * red * blue, 4 * green * red, 4 * blue * green]
    z = np.einsum("kf,fhw->khw", exact(recal.weight), np.stack(columns))
    z += exact(recal.bias)[:, None, None]
    odds = np.exp(z - z.max(0))
    np.testing.assert_allclose(exact(recal(parts)), odds / odds.sum(0), rtol=1e-4, atol=1e-6)


def test_trees_know_what_a_linear_map_cannot() -> None:
    """Class 1 where exactly one of two components is positive, whatever the scores say."""
    pytest.importorskip("sklearn")
    generator = seeded(4)

    def examples(number: int) -> list[Example]:
        made = []
        for _ in range(number):
            features = torch.randn(3, SIDE, SIDE, generator=generator)
            labels = ((features[0] > 0) ^ (features[1] > 0)).long()
            labels[features[2] > 1] = 2
            probs = torch.rand(K, SIDE, SIDE, generator=generator)
            made.append(([probs / probs.sum(0), features], labels))
        return made

    train, test = examples(12), examples(3)
    projection = projected(train)
    linear = wrong(fitted(train, features=projection), test)
    trees = wrong(fitted(train, features=projection, method="trees"), test)
    assert linear > 0.3
    assert trees < linear - 0.05, (trees, linear)


@pytest.fixture(scope="module")
def grown() -> tuple[Recalibration, list[Example]]:
    pytest.importorskip("sklearn")
    examples = [
        ([*parts[:2], torch.randn(5, 8, 8, generator=seeded(n)), image], labels)
        for n, ((parts, labels), image) in enumerate(
            zip(world(6, 3), (parts[-1] for parts, _ in coloured(6, 3)), strict=True)
        )
    ]
    projection = FeatureProjection.fit([parts[2] for parts, _ in examples])
    recal = fitted(examples, features=projection, colour=True, method="trees")
    return recal.with_prior_power(0.4), examples


def test_trees_are_those_of_scikit_learn_in_every_pixel(
    grown: tuple[Recalibration, list[Example]],
) -> None:
    """Every tree walked by hand; the mean with the map, then the prior divided out."""
    recal, examples = grown
    trees = recal.trees
    assert trees is not None
    joined = recal.join(examples[0][0])
    values = torch.cat([joined[:6].clamp(min=FLOOR).log(), joined[6:]]).flatten(1).T
    for pixel in range(0, len(values), 97):
        shares = []
        for root in trees.root.tolist():
            node, steps = root, 0
            while float(trees.threshold[node]) != float("inf"):
                right = float(values[pixel, trees.feature[node]]) > float(trees.threshold[node])
                node, steps = int(trees.child[node, int(right)]), steps + 1
            assert steps <= trees.depth
            shares.append(exact(trees.share[trees.leaf[node]]))
        np.testing.assert_allclose(
            exact(trees(values[pixel : pixel + 1]))[0], np.mean(shares, 0), rtol=1e-5
        )
    linear = replace(
        recal, trees=None, method="dirichlet", projection=recal.projection.first(0), prior_power=0.0
    )
    forest = exact(trees(values)).T.reshape(K, SIDE, SIDE)
    both = exact(linear(joined)) + forest
    both /= exact(recal.prior)[:, None, None] ** 0.4
    np.testing.assert_allclose(exact(recal(joined)), both / both.sum(0), rtol=1e-4, atol=1e-6)


def test_large_images_are_sampled_for_the_trees_alone(
    grown: tuple[Recalibration, list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recal, examples = grown
    parts = examples[0][0]
    whole = recal(parts)
    monkeypatch.setattr("cpseg.recalibration.recalibration._FOREST_PIXELS", SIDE * SIDE // 4)
    sampled = recal(parts)
    assert float((sampled - whole).abs().mean()) < 0.1
    assert not same(sampled, whole)
    np.testing.assert_allclose(sampled.sum(0), 1, rtol=1e-5)
    flat = recal([part[..., :1, :1].expand(-1, SIDE, SIDE) for part in parts])
    np.testing.assert_allclose(flat, flat[:, :1, :1].expand_as(flat), atol=1e-6)


def test_trees_are_saved_and_refused_if_damaged(
    grown: tuple[Recalibration, list[Example]], tmp_path: Path
) -> None:
    recal, examples = grown
    recal.save(tmp_path / "map.safetensors")
    loaded = Recalibration.load(tmp_path / "map.safetensors")
    assert loaded.fingerprint == recal.fingerprint
    assert loaded.metadata() == recal.metadata()
    assert same(loaded(examples[0][0]), recal(examples[0][0]))
    evidence = loaded.evidence(examples[0][0], background=0)
    best = recal(examples[0][0])[1:].max(0)
    assert same(evidence.best, best.values)
    tensors = recal.tensors()
    nodes = len(tensors["trees.threshold"])
    for name, bad, match in (
        ("trees.child", tensors["trees.child"] + nodes, "'trees.child'"),
        ("trees.leaf", tensors["trees.leaf"][:-1], "'trees.leaf'"),
        ("trees.feature", tensors["trees.feature"] - 1, "'trees.feature'"),
        ("trees.share", tensors["trees.share"][:, :-1], "'trees.share'"),
        ("trees.root", tensors["trees.root"].int(), "'trees.root'"),
    ):
        with raises(ValueError, "here", match):
            Recalibration.from_parts({**tensors, name: bad}, recal.metadata(), where="here")
    del tensors["trees.root"]
    with raises(ValueError, "here", "the trees of its method, got none of 'root'"):
        Recalibration.from_parts(tensors, recal.metadata(), where="here")


@pytest.mark.skipif(not hasattr(torch.compiler, "is_compiling"), reason="torch.compile before 2.3")
def test_maps_over_sources_trace_whole(grown: tuple[Recalibration, list[Example]]) -> None:
    recal, examples = grown
    linear = fitted([(parts[:2], labels) for parts, labels in examples])
    for made, parts in ((linear, examples[0][0][:2]), (recal, examples[0][0])):
        compiled = torch.compile(lambda p, r=made: r(p), fullgraph=True, backend="eager")
        np.testing.assert_allclose(compiled(parts), made(parts), rtol=1e-5, atol=1e-6)


def test_trees_are_the_same_in_any_order(grown: tuple[Recalibration, list[Example]]) -> None:
    recal, examples = grown
    assert recal.projection is not None
    left, right = (
        Recalibrator(K, features=recal.projection, colour=True, method="trees") for _ in range(2)
    )
    for number in (5, 3, 1, 0, 2, 4):
        (left if number % 2 else right).update(*examples[number], ids=f"{number}")
    right.merge(left)
    assert right.fit().with_prior_power(0.4).fingerprint == recal.fingerprint


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(ImportError, match=r'pip install "cpseg\[trees\]"'):
        fitted(world(3, 0), method="trees")


# Sizes


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_sources_come_to_the_size_of_the_first(h: int, w: int, h2: int, w2: int) -> None:
    first, second = torch.rand(2, h, w), torch.ones(3, h2, w2)
    joined = join_channels([first, second], 5 * torch.ones(1, h2, w2))
    assert joined.shape == (6, h, w)
    assert same(joined[:2], first)
    assert float(joined[2:5].max()) <= 1, "interpolated scores stay scores"
    np.testing.assert_allclose(joined[2:5], 1, atol=2e-6)
    np.testing.assert_allclose(joined[5], 5, rtol=1e-6)


def test_a_coarse_source_is_interpolated_between_pixel_centres() -> None:
    coarse = torch.tensor([[[0.0, 1.0]]])
    joined = join_channels([torch.zeros(1, 1, 4), coarse])
    np.testing.assert_allclose(joined[1, 0], [0, 0.25, 0.75, 1], atol=2e-6)


# Streaming, merging, files


def test_order_batches_and_merges_give_the_same_map(tmp_path: Path) -> None:
    examples = world(6, 3, channels=4)
    projection = projected(examples)
    whole = fitted(examples, features=projection)
    left, right = (Recalibrator(K, features=projection) for _ in range(2))
    for number in (4, 0, 2):
        left.update(examples[number][0], examples[number][1], ids=f"{number}")
    batch = [torch.stack(parts) for parts in zip(*(examples[n][0] for n in (5, 1, 3)), strict=True)]
    labels = torch.stack([examples[n][1] for n in (5, 1, 3)])
    right.update(batch, labels, ids=["5", "1", "3"])
    empty = Recalibrator(K, features=projection)
    empty.merge(right)
    empty.merge(left)
    merged = empty.fit()
    assert merged.fingerprint == whole.fingerprint
    assert merged.images == whole.images
    whole.save(tmp_path / "map.safetensors")
    loaded = Recalibration.load(tmp_path / "map.safetensors")
    assert loaded.fingerprint == whole.fingerprint
    assert loaded.metadata() == whole.metadata()
    assert whole.metadata()["format"] == 2
    assert (loaded.sources, loaded.num_source) == ((3, 3), 6)
    assert same(loaded(examples[0][0]), whole(examples[0][0]))


def test_joined_channels_need_the_numbers_of_classes() -> None:
    examples = world(4, 3)
    listed = fitted(examples)
    recalibrator = Recalibrator(K, sources=(3, 3))
    for number, (parts, labels) in enumerate(examples):
        recalibrator.update(join_channels(parts), labels, ids=f"{number}")
    joined = recalibrator.fit()
    assert joined.fingerprint == listed.fingerprint
    assert joined.sources == (3, 3)


def test_one_source_is_saved_as_before() -> None:
    recal = fitted([(parts[:1], labels) for parts, labels in world(3, 0)])
    plain = fitted([(parts, labels) for parts, labels in world(3, 0)], only=0)
    assert recal.fingerprint == plain.fingerprint
    assert recal.metadata()["format"] == 1
    assert not {"sources", "features"} & set(recal.metadata())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sources": [2, 3]}, "6 classes of all sources, got 2 . 3"),
        ({"sources": "3"}, "a valid sources, got '3'"),
        ({"features": "x"}, "a valid features, got 'x'"),
        ({"features": 4}, "the projection of its features, got none"),
        ({"scores": "softmax,sigmoid,softmax"}, "1 or 2 kinds of scores"),
        ({"scores": "logits"}, "scores among 'softmax', 'sigmoid', got 'logits'"),
    ],
)
def test_damaged_sources_are_refused(changes: dict[str, Any], match: str) -> None:
    recal = fitted(world(3, 0))
    with raises(ValueError, "here", match):
        Recalibration.from_parts(recal.tensors(), {**recal.metadata(), **changes}, where="here")


def test_damaged_projections_are_refused() -> None:
    examples = world(8, 0, channels=4)
    recal = fitted(examples, features=projected(examples))
    tensors = recal.tensors()
    basis = tensors["features.basis"]
    assert basis.shape == (4, 4)
    for bad in (basis.double(), basis[:-1], basis.new_full(basis.shape, torch.nan)):
        with raises(ValueError, "here", "finite float32 mean"):
            parts = {**tensors, "features.basis": bad}
            Recalibration.from_parts(parts, recal.metadata(), where="here")


def test_in_words() -> None:
    examples = world(4, 3, channels=4)
    recal = fitted(examples, features=projected(examples))
    assert "3 + 3 softmax classes to 3" in repr(recal)
    assert "map of 3 + 3 softmax scores" in recal.describe()
    first = recal.correspondence()[0][0][0]
    assert f"where {1 + first // 3}:{first % 3}" in recal.describe()
    names = [f"{model} {k}" for model in ("A", "B") for k in range(3)]
    assert "where A 0" in recal.describe(names)
    assert "3 + 3 softmax classes, 4 components" in repr(
        with_update(Recalibrator(K, features=projected(examples)), examples[0])
    )


def with_update(recalibrator: Recalibrator, example: Example) -> Recalibrator:
    recalibrator.update(*example)
    return recalibrator


# What is refused


def test_another_source_is_refused() -> None:
    examples = world(3, 0, channels=4)
    parts, labels = examples[0]
    projection = projected(examples)
    recal = fitted(examples, features=projection)
    said = "scores of 3 . 3 source classes, then features of 4 channels"
    for call, where in ((recal, "Recalibration"), (recal.evidence, "Recalibration.evidence")):
        with raises(ValueError, where, f"{said}, got 2 tensors"):
            call(parts[:2])
        with raises(ValueError, where, f"{said}, got probs"):
            call(parts[0])
        with raises(ValueError, where, r"probs\[1\] of 3 classes, got \[2, 12, 12\]"):
            call([parts[0], parts[1][:2], parts[2]])
        with raises(ValueError, where, r"probs\[1\] of as many images as probs\[0\]"):
            call([parts[0], parts[1][None], parts[2]])
    with raises(ValueError, "FeatureProjection", "features of 4 channels"):
        recal([parts[0], parts[1], parts[2][:3]])
    recalibrator = Recalibrator(K, features=projection)
    with raises(ValueError, "Recalibrator.update", "the sources' numbers of classes"):
        recalibrator.update(parts[0], labels)
    with raises(ValueError, "Recalibrator.update", r"probs\[1\] in .*, got values"):
        recalibrator.update([parts[0], 2 * parts[1], parts[2]], labels)
    with raises(ValueError, "Recalibrator.update", "scores of a model, got none"):
        Recalibrator(K).update([], labels)
    with raises(TypeError, "Recalibrator.update", "as a tensor"):
        Recalibrator(K).update([parts[0], None], labels)  # type: ignore[list-item]
    with raises(ValueError, "Recalibrator.update", "3 source classes for method 'vector', got 2"):
        Recalibrator(K, method="vector").update([parts[0], parts[1][:2]], labels)


def test_options_of_sources_are_checked() -> None:
    where = "Recalibrator"
    projection = FeatureProjection(torch.zeros(2), torch.eye(2), 1)
    with raises(ValueError, where, "no features for 'temperature'"):
        Recalibrator(K, method="temperature", features=projection)
    with raises(TypeError, where, "features as a projection"):
        Recalibrator(K, features=torch.eye(2))  # type: ignore[arg-type]
    with raises(ValueError, where, "sources as the models' numbers of classes"):
        Recalibrator(K, sources=())
    with raises(ValueError, where, "sources as a whole number >= 1, got 0"):
        Recalibrator(K, sources=(3, 0))
    with raises(ValueError, where, "1 or 3 kinds of scores, one per model, got 2"):
        Recalibrator(K, sources=(3, 3, 3), scores=["softmax", "sigmoid"])
    with raises(TypeError, where, "scores as a word or a list of words"):
        Recalibrator(K, scores=3)  # type: ignore[arg-type]


def test_other_projections_do_not_merge() -> None:
    examples = world(3, 0, channels=4)
    one = Recalibrator(K, features=projected(examples))
    other = Recalibrator(K, features=projected(examples[:2]))
    with raises(ValueError, "Recalibrator.merge", "the same features "):
        one.merge(other)
    two, three = Recalibrator(K), Recalibrator(K)
    two.update(examples[0][0][:2], examples[0][1])
    three.update([*examples[0][0][:2], examples[0][0][0]], examples[0][1])
    with raises(ValueError, "Recalibrator.merge", "the same sources "):
        two.merge(three)


# Calibrations


def calibrated(examples: list[Example], recal: Recalibration, **options: Any) -> Calibrator:
    calibrator = Calibrator(
        groups.image((SIDE, SIDE)), recalibration=recal, background=None, **options
    )
    for number, (parts, labels) in enumerate(examples):
        calibrator.update(parts, labels, ids=f"calibration {number}")
    return calibrator


def test_a_calibration_takes_the_sources_of_its_recalibration(tmp_path: Path) -> None:
    train, more, new = (world(6, seed, channels=4) for seed in range(3))
    recal = fitted(train, features=projected(train))
    calibrator = calibrated(more, recal, alpha=0.1)
    calibration = calibrator.compute()
    parts = new[0][0]
    plain = replace(calibration, recalibration=None)
    mapped = recal(parts)
    assert same(calibration.prediction_set(parts), plain.prediction_set(mapped))
    assert same(calibration.pseudo_labels(parts), plain.pseudo_labels(mapped))
    assert same(calibration.pseudo_labels(calibration.evidence(parts)), plain.pseudo_labels(mapped))
    assert same(certainty(parts, calibration), certainty(mapped, plain))
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    loaded = Calibration.load(path)
    assert same(loaded.pseudo_labels(parts), calibration.pseudo_labels(parts))
    labels = calibration.pseudo_labels(parts)
    np.testing.assert_array_equal(
        calibrator.p_values(parts, labels), calibrator.p_values(recal.join(parts), labels)
    )
    for call, where in (
        (calibration.prediction_set, "Calibration.prediction_set"),
        (calibration.pseudo_labels, "Calibration.pseudo_labels"),
        (calibration.evidence, "Calibration.evidence"),
    ):
        with raises(ValueError, where, "scores of 3 . 3 source classes, then features"):
            call(parts[:2])
    with raises(ValueError, "Calibrator.update", r"probs\[0\] in|probs in"):
        calibrator.update([2 * parts[0], *parts[1:]], new[0][1])
    certifier = Certifier(calibrator, max_error=0.2)
    certifier.update(parts, new[0][1], ids="new")
    assert certifier.num_images == 1
    with raises(ValueError, "Certifier.update", r"probs\[1\] in"):
        certifier.update([parts[0], parts[1] - 2, parts[2]], new[0][1], ids="newer")


def test_several_sources_need_a_recalibration() -> None:
    parts, labels = world(1, 0)[0]
    calibrator = Calibrator(groups.image((SIDE, SIDE)), background=None)
    with raises(ValueError, "Calibrator.update", "the scores of one model, got 2 tensors"):
        calibrator.update(parts, labels)


@pytest.mark.nightly
def test_two_sources_cover_in_their_law() -> None:
    """Map, components and thresholds from images apart: each cell covers 1 - alpha to + 1/(n+1)."""
    count, alpha = 39, 0.1
    inside = []
    for seed in range(40):
        examples = world(8 + count + 12, seed, channels=6)
        train, calibration, new = examples[:8], examples[8 : 8 + count], examples[8 + count :]
        recal = fitted(train, features=projected(train))
        calibrator = Calibrator(
            groups.pixel((SIDE, SIDE)), recalibration=recal, background=None, alpha=alpha
        )
        for parts, labels in calibration:
            calibrator.update(parts, labels)
        made = calibrator.compute()
        for parts, labels in new:
            covered = made.prediction_set(parts).gather(0, labels[None])
            inside.append(float(covered.float().mean()))
    rate, error = float(np.mean(inside)), float(np.std(inside) / np.sqrt(len(inside)))
    assert 0.9 - 3 * error <= rate <= 0.9 + 1 / (count + 1) + 3 * error, (rate, error)


# Components


@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 2**16))
def test_components_are_those_of_the_singular_value_decomposition(
    channels: int, images: int, seed: int
) -> None:
    generator = seeded(seed)
    stretch = torch.arange(1, channels + 1)[:, None, None]
    features = [
        stretch * torch.randn(channels, 9, 7, generator=generator) + 3 for _ in range(images)
    ]
    projection = FeatureProjection.fit(features, components=3)
    flat = np.concatenate([exact(each).reshape(channels, -1) for each in features], 1)
    centred = flat - flat.mean(1, keepdims=True)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    kept = min(3, channels)
    expected = left[:, :kept].T @ centred / values[:kept, None] * np.sqrt(flat.shape[1])
    found = np.concatenate([exact(projection(each)).reshape(kept, -1) for each in features], 1)
    signs = np.sign((expected * found).sum(1, keepdims=True))
    np.testing.assert_allclose(found, signs * expected, atol=2e-3)
    np.testing.assert_allclose((found**2).mean(1), 1, rtol=1e-3)
    assert same(projection.first(1)(features[0]), projection(features[0])[:1])
    batch = torch.stack([features[0], features[0]])
    np.testing.assert_allclose(projection(batch)[1], projection(features[0]), atol=1e-5)


def test_features_that_give_no_components_are_refused() -> None:
    where = "FeatureProjection.fit"
    one = torch.randn(4, 3, 3, generator=seeded(0))
    with raises(ValueError, where, "features of at least one image, got none"):
        FeatureProjection.fit([])
    with raises(ValueError, where, r"4 channels like the first image, got features \[5, 3, 3\]"):
        FeatureProjection.fit([one, torch.zeros(5, 3, 3)])
    with raises(ValueError, where, "finite features"):
        FeatureProjection.fit([one.masked_fill(one > 0, torch.inf)])
    with raises(ValueError, where, "features that differ, got the same everywhere"):
        FeatureProjection.fit([torch.full((4, 3, 3), 7.3)])
    with raises(ValueError, where, r"features \[C, h, w\]"):
        FeatureProjection.fit([one[None]])
    with raises(TypeError, where, "floating-point features"):
        FeatureProjection.fit([one.long()])
    with raises(ValueError, where, "components as a whole number >= 1, got 0"):
        FeatureProjection.fit([one], components=0)
    flat = FeatureProjection.fit([one[:1].expand(4, 3, 3)], components=4)
    assert flat.components == 1, "copies of a channel have one dimension"
