"""``Recalibrator`` fits probabilities to the target domain; it makes a ``Recalibration``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpseg._internal.checks import (
    MOST_CLASSES,
    check_alike,
    check_choice,
    check_count,
    check_flag,
    check_ignore_index,
    check_image_ids,
    check_label_values,
    check_labels,
    check_other,
    message,
    short,
)
from cpseg._internal.streaming import begin_sync, gather_alike, refuse_after_sync
from cpseg.core.feature_projection import FeatureProjection
from cpseg.recalibration.choice import Choice, choose, numbers_of_components
from cpseg.recalibration.features import (
    CONTEXTS,
    Layout,
    colour_features,
    location,
    log_scores,
    places,
    radii,
    window_means,
)
from cpseg.recalibration.fit import (
    DEFAULT_STRENGTH,
    FINE_STRENGTHS,
    METHODS,
    STRENGTHS,
    TEMPERATURE_STRENGTH,
    Map,
    Pixels,
    fit_map,
)
from cpseg.recalibration.pixel_sample import PixelSample, Sample, digest, draw
from cpseg.recalibration.recalibration import Recalibration
from cpseg.recalibration.sources import Probs, Sources, kinds_of, sources_of
from cpseg.recalibration.trees import MOST_PIXELS, Trees

_CV_PIXELS = 30_000  # what cross-validation fits on: it compares maps, the final fit takes all
_BAND = 2**18  # probabilities whose window means are made at once
# What another recalibrator takes: settings, samples and their quota, names of images, sources.
_State = tuple[dict[str, Any], list[Sample], int, set[str], Sources | None]


class Recalibrator:
    """Fits the model's probabilities to the target domain on labelled images.

    Images stream by; a bounded sample of their pixels is kept, balanced over images and classes and
    weighted back to true frequencies, every image weighing the same. The sample, and so the fit,
    is the same for every order, split and merge tree.

    Args:
        num_classes: number of target classes K, those of the labels.
        method: ``"none"`` (for the prior power alone), ``"temperature"`` (z = t log p),
            ``"vector"`` (z_k = a_k log p_k + b_k), ``"dirichlet"`` (z = W log p + b), or
            ``"trees"``: the mean of a dirichlet map's probabilities and of extremely randomised
            trees' (scikit-learn, the extra ``trees``). Only the last two take source classes that
            differ from the target classes. For sigmoid scores the first two work on log p -
            log(1 - p), and vector has a weight for each.
        scores: ``"softmax"``, or ``"sigmoid"`` for independent scores; a list, or a word with
            commas, where models differ. The result is a softmax over the K classes in all cases.
        context: parts of the context for vector and dirichlet, a subset of ``("location",
            "neighbourhood", "image")``; ``"auto"`` lets cross-validation choose how many of them,
            in this order, and takes the fewest within a standard error of the best.
        budget: pixels to keep at most.
        seed: draws them.
        folds: folds of images in cross-validation; leave-one-out where there are fewer images.
        ignore_index: the label of void pixels.
        sources: the number of classes of every model, where ``update`` takes the scores of several
            in one tensor; a list of tensors says it by itself.
        features: the projection of an image encoder's features, which vector and dirichlet then
            use too. Cross-validation chooses how many of its components, among 0, 8, 16, 32, ...,
            and takes the fewest within a standard error of the best; with ``"trees"`` only the
            trees use them, all of them.
        colour: whether the image itself is a source: with a list of tensors it comes last,
            ``[B, 3, h, w]`` RGB in [0, 1]. For vector, dirichlet and trees.

    Raises:
        ValueError: a value outside its range.

    Reference:
        Kull et al. (2019), Beyond temperature scaling. Several sources: stacked generalisation
        (Wolpert 1992), for which the scores of a model trained on the same labelled images must be
        those of a model that did not see the image (:func:`cpseg.cross_fit`).

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> labels = torch.randint(3, (4, 16, 16), generator=generator)
        >>> probs = 0.1 + 0.7 * torch.nn.functional.one_hot((labels + 1) % 3, 3).movedim(-1, 1)
        >>> recalibrator = Recalibrator(3)  # a model whose classes are off by one
        >>> recalibrator.update(probs, labels)
        >>> recalibration = recalibrator.fit()
        >>> bool((recalibration(probs).argmax(1) == labels).all())
        True
        >>> [pairs[0][0] for pairs in recalibration.correspondence()]
        [1, 2, 0]
    """

    def __init__(
        self,
        num_classes: int,
        *,
        method: str = "dirichlet",
        scores: str | Sequence[str] = "softmax",
        context: str | Sequence[str] = (),
        budget: int = 100_000,
        seed: int = 0,
        folds: int = 5,
        ignore_index: int = 255,
        sources: Sequence[int] | None = None,
        features: FeatureProjection | None = None,
        colour: bool = False,
    ) -> None:
        where = "Recalibrator"
        for name, number, least, most in (
            ("num_classes", num_classes, 2, MOST_CLASSES),
            ("budget", budget, 1, 2**62),
            ("folds", folds, 2, 2**62),
            ("seed", seed, 0, 2**63 - 1),
        ):
            check_count(where, number, name=name, fix="pass another", least=least, most=most)
        check_ignore_index(where, ignore_index, num_classes)
        check_choice(where, method, METHODS, name="method")
        self.sources = None if sources is None else _numbers(where, sources)
        kinds = _kinds(where, scores, self.sources)
        if features is not None and not isinstance(features, FeatureProjection):
            fix = "pass the result of FeatureProjection.fit"
            raise TypeError(message(where, "features as a projection", short(features), fix))
        if not isinstance(context, (str, list, tuple)):
            expected, fix = "context as a word or a list of words", "pass 'auto' or ()"
            raise TypeError(message(where, expected, short(context), fix))
        asked = (
            CONTEXTS if context == "auto" else (context,) if isinstance(context, str) else context
        )
        unknown = [part for part in asked if part not in CONTEXTS]
        if unknown:
            expected = f"context 'auto' or some of {', '.join(map(repr, CONTEXTS))}"
            raise ValueError(message(where, expected, repr(unknown[0]), "choose among them"))
        if asked and method in ("none", "temperature"):
            expected, fix = f"no context for {method!r}", "take method 'vector' or 'dirichlet'"
            raise ValueError(message(where, expected, repr(context), fix))
        check_flag(where, colour, name="colour")
        if (features is not None or colour) and method in ("none", "temperature"):
            what = "colour" if features is None else "features"
            expected, fix = f"no {what} for {method!r}", "take method 'dirichlet' or 'trees'"
            raise ValueError(message(where, expected, "some", fix))
        self.num_classes = num_classes
        self.method = method
        self.scores = kinds
        self.features = features
        self.colour = colour
        self.context: str | tuple[str, ...] = "auto"
        self._stored = tuple(part for part in CONTEXTS if part in asked)
        if context != "auto":
            self.context = self._stored
        self.seed = seed
        self.folds = folds
        self.ignore_index = ignore_index
        self._sources: Sources | None = None
        self.ids: set[str] = set()
        self._reservoir = PixelSample(budget)
        self._synced = False

    def __repr__(self) -> str:
        context = self.context if isinstance(self.context, str) else " + ".join(self.context)
        found = self._sources
        classes = "unknown" if found is None else " + ".join(map(str, found.classes))
        features = f", {self.features.components} components" if self.features else ""
        return (
            f"Recalibrator({self.method}, {classes} {self.scores} classes{features} to "
            f"{self.num_classes}, context {context or 'none'}, {self.num_images} images, "
            f"{self.num_pixels} pixels)"
        )

    @property
    def num_source(self) -> int | None:
        """Number of source classes of all models, None before the first update."""
        return None if self._sources is None else self._sources.num_scores

    @property
    def budget(self) -> int:
        """The most pixels to keep."""
        return self._reservoir.budget

    @property
    def num_images(self) -> int:
        """Images with labelled pixels so far."""
        return len(self._reservoir.samples)

    @property
    def num_pixels(self) -> int:
        """Pixels kept."""
        return sum(len(sample.labels) for sample in self._reservoir.samples)

    def update(
        self, probs: Probs, labels: Tensor, *, ids: str | Sequence[str] | None = None
    ) -> None:
        """Draw pixels from a batch of labelled images.

        Args:
            probs: probabilities in [0, 1], float, ``[B, S, H, W]`` or ``[S, H, W]``, whole images;
                of several sources a list: ``[B, K_s, h, w]`` of every model, then the features
                ``[B, C, h, w]``, each of its own size; or their channels in one tensor.
            labels: true classes 0..K-1, integer, ``[B, H, W]`` or ``[H, W]`` of the first model's
                size, ``ignore_index`` for void. An image that is all void counts for nothing.
            ids: a name for every image, a string for a single one, so that a ``Certifier`` can
                tell them from its own; kept in ``ids`` and as ``Recalibration.images``.

        Raises:
            ValueError: shapes or devices do not belong together, another number of source classes
                than before, a method that needs S = K, scores outside [0, 1] or NaN, labels that
                are neither class nor void, a call after ``sync``.
            TypeError: wrong dtypes.
        """
        where = "Recalibrator.update"
        refuse_after_sync(where, self._synced)
        sources = self._sources or sources_of(
            where, probs, self.sources, self.scores, self.features, self.colour
        )
        others = sorted(set(sources.classes) - {self.num_classes})
        if self.method not in ("dirichlet", "trees") and others:
            expected = f"{self.num_classes} source classes for method {self.method!r}"
            fix = "take method 'dirichlet', or map the classes first"
            raise ValueError(message(where, expected, str(others[0]), fix))
        probs = sources.join(where, probs, check_values=True)
        check_labels(where, labels, probs)
        check_label_values(where, labels, self.num_classes, self.ignore_index)
        if probs.ndim == 3:
            probs, labels = probs.unsqueeze(0), labels.unsqueeze(0)
        self.ids.update(check_image_ids(where, ids, len(probs), self.ids) or ())
        self._sources = sources
        for image, truth in zip(probs, labels, strict=True):
            sample = self._draw(image, truth.to("cpu", torch.int64))
            if len(sample.labels):
                self._reservoir.add([sample], self._reservoir.quota)

    def merge(self, other: Recalibrator) -> None:
        """Take all that another recalibrator of the same settings has seen; it stays as it is.

        Raises:
            ValueError: other settings, itself, or one after ``sync``.
            TypeError: not a recalibrator.
        """
        where = "Recalibrator.merge"
        check_other(where, self, other)
        refuse_after_sync(where, self._synced or other._synced)
        self._take(where, [other._state()])

    def sync(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Merge over the ranks of ``torch.distributed``; every rank then holds the whole.

        Call it once, after the last update. Does nothing where no process group is set up.

        Args:
            process_group: the ranks to merge over; all by default.

        Raises:
            ValueError: settings differ between ranks, or a second call.
        """
        where = "Recalibrator.sync"
        if not begin_sync(where, self._synced):
            return
        settings = self._settings()
        everyone = gather_alike(where, {**settings, "sources": None}, self._state(), process_group)
        self._reservoir, self.ids = PixelSample(self.budget), set()
        self._take(where, everyone)
        self._synced = True

    def fit(self) -> Recalibration:
        """Choose strength and context by cross-validation over images, then fit on all pixels.

        Raises:
            ValueError: no labelled pixel, a single labelled class, or scores that are the same at
                every pixel.
        """
        where = "Recalibrator.fit"
        samples = sorted(self._reservoir.samples, key=lambda sample: sample.digest)
        if not samples or self.num_source is None:
            raise ValueError(message(where, "labelled pixels", "none", "call update first"))
        frequencies = [sample.count.to(torch.float64) / sample.count.sum() for sample in samples]
        prior = torch.stack(frequencies).mean(0)
        present = (prior > 0).nonzero().flatten()
        if len(present) < 2 and self.method != "none":
            expected, got = "at least 2 labelled classes", f"class {int(present[0])} alone"
            raise ValueError(message(where, expected, got, "label images of other classes too"))
        own = self._layout.own
        base = self._base(prior, present)
        if self.method == "none":
            return self._result(base, Choice((), 0, 0.0), prior, present, ())
        pixels = self._pixels(samples, present)
        if bool((pixels.features[:, :own] == pixels.features[:1, :own]).all()):
            got = "the same scores at every labelled pixel"
            fix = "check how they were written: there is nothing to learn"
            raise ValueError(message(where, "scores that differ between pixels", got, fix))
        choice, table = self._choose(samples, present, base)
        kept = self._layout.indices(choice.context, choice.components)
        fitted = fit_map(
            pixels._replace(features=pixels.features[:, kept]),
            Map(base.weight[:, kept], base.bias),
            self._linear,
            choice.strength,
            own=own,
        )
        trees = None
        if self.method == "trees":
            trees = Trees.fit(self._tree_pixels(samples, present), len(present), seed=self.seed)
        return self._result(fitted, choice, prior, present, table, trees)

    @property
    def _linear(self) -> str:
        """The method of the linear map."""
        return "dirichlet" if self.method == "trees" else self.method

    @property
    def _layout(self) -> Layout:
        """The columns of the features that are kept of a pixel."""
        sources = self._known
        components = 0 if self.method == "trees" else sources.components
        return Layout(sources.num_scores, sources.sigmoid, self._stored, components, sources.colour)

    @property
    def _known(self) -> Sources:
        assert self._sources is not None
        return self._sources

    def _draw(self, image: Tensor, labels: Tensor) -> Sample:
        """Some pixels of one image ``[C, H, W]``, with what the context needs."""
        known = labels != self.ignore_index
        count = torch.bincount(labels[known], minlength=self.num_classes)
        name = digest(labels, image, self.seed)
        flat = labels.masked_fill(~known, -1).flatten()
        chosen = draw(name, flat, count, self._reservoir.quota)
        height, across = labels.shape
        y, x = chosen // across, chosen % across
        there = (y.to(image.device), x.to(image.device))
        sources = self._known
        channels = image[: sources.num_channels]
        scores = image[: sources.num_scores]
        there_values = channels[:, there[0], there[1]].T.to("cpu", torch.float32)
        values = [there_values[:, : sources.num_scores]]
        if "location" in self._stored:
            places_y = places(height, slice(0, height), torch.device("cpu"))
            places_x = places(across, slice(0, across), torch.device("cpu"))
            values.append(torch.stack([places_y[y], places_x[x]], 1))
        if "neighbourhood" in self._stored:
            values += [_means_at(scores, there, radius) for radius in radii(height, across)]
        if "image" in self._stored:
            mean = scores.mean((-2, -1), dtype=torch.float64).to("cpu", torch.float32)
            values.append(mean.expand(len(chosen), -1))
        values.append(there_values[:, sources.num_scores :])
        return Sample(name, count, flat[chosen], torch.cat(values, 1))

    def _pixels(self, samples: Sequence[Sample], present: Tensor) -> Pixels:
        """The kept pixels with their features, labels numbered among the present classes."""
        values = torch.cat([sample.values for sample in samples])
        sources = self._known
        classes = sources.num_scores
        sizes = {"location": [2], "neighbourhood": 2 * [classes], "image": [classes]}
        widths = [classes] + [size for part in self._stored for size in sizes[part]]
        ends = [3 * sources.colour, sources.components]
        *parts, colour, components = torch.split(values, [*widths, *ends], 1)
        if "location" in self._stored:
            parts[1] = location(*parts[1].unbind(1))
        features = [
            part if index == 1 and "location" in self._stored else log_scores(part, sources.sigmoid)
            for index, part in enumerate(parts)
        ]
        if self.method != "trees":
            features.append(components)
        if sources.colour:
            features.append(colour_features(colour))
        return Pixels(
            torch.cat(features, 1),
            torch.searchsorted(present, torch.cat([sample.labels for sample in samples])),
            torch.cat([sample.weights() for sample in samples]),
            torch.cat([torch.full_like(s.labels, number) for number, s in enumerate(samples)]),
        )

    def _tree_pixels(self, samples: Sequence[Sample], present: Tensor) -> Pixels:
        """What the trees are fitted on: own log scores, colours and components."""
        samples = _trimmed(samples, self._reservoir.quota, MOST_PIXELS)
        pixels = self._pixels(samples, present)
        values = torch.cat([sample.values for sample in samples])
        sources = self._known
        more = values[:, values.shape[1] - (sources.num_channels - sources.num_scores) :]
        own = pixels.features[:, : self._layout.own]
        return pixels._replace(features=torch.cat([own, more], 1))

    def _base(self, prior: Tensor, present: Tensor) -> Map:
        """What the fit shrinks to.

        That is the mean of the log scores of the models with the target's classes, which for a
        single one are its scores as they are; the prior where there is no such model, and for a
        dirichlet map over several models: which of them is right where they differ is to be learned
        (on LabelMeFacade this had fewer errors than shrinking to one of them or to their mean).
        """
        sources = self._known
        weight = torch.zeros(len(present), self._layout.width, dtype=torch.float64)
        same = [part for part in sources.channels if part.stop - part.start == self.num_classes]
        learns = len(sources.classes) > 1 and self._linear == "dirichlet"
        if not same or learns:
            return Map(weight, prior[present].log())
        rows = torch.arange(len(present))
        opposite = {channel: place for place, channel in enumerate(sources.sigmoid)}
        for part in same:
            weight[rows, part.start + present] = 1 / len(same)
            if part.start in opposite:  # log p - log(1 - p): exactly one of independent events
                start = sources.num_scores + opposite[part.start]
                weight[rows, start + present] = -1 / len(same)
        return Map(weight, torch.zeros(len(present), dtype=torch.float64))

    def _choose(
        self, samples: Sequence[Sample], present: Tensor, base: Map
    ) -> tuple[Choice, tuple[dict[str, Any], ...]]:
        """Context, components and strength, and all candidates."""
        contexts = [self._stored]
        if self.context == "auto":
            contexts = [CONTEXTS[:number] for number in range(len(CONTEXTS) + 1)]
        components = numbers_of_components(self._layout.components)
        strengths: Sequence[float] = STRENGTHS if self._known.is_single else FINE_STRENGTHS
        if self.method == "temperature":
            strengths = (TEMPERATURE_STRENGTH,)
        if len(samples) == 1:
            strength = strengths[0] if len(strengths) == 1 else DEFAULT_STRENGTH
            return Choice(contexts[0], components[0], strength), ()
        samples = _trimmed(samples, self._reservoir.quota, _CV_PIXELS)
        return choose(
            self._pixels(samples, present),
            base,
            self._layout,
            self._linear,
            contexts=contexts,
            components=components,
            strengths=strengths,
            folds=min(self.folds, len(samples)),
        )

    def _result(
        self,
        fitted: Map,
        choice: Choice,
        prior: Tensor,
        present: Tensor,
        table: tuple[dict[str, Any], ...],
        trees: Trees | None = None,
    ) -> Recalibration:
        """The map of the present classes, as one of all classes."""
        sources = self._known
        weight = torch.zeros(self.num_classes, fitted.weight.shape[1])
        bias = torch.zeros(self.num_classes)
        weight[present], bias[present] = fitted.weight.float(), fitted.bias.float()
        projection = sources.projection
        if projection is not None and trees is None:
            projection = projection.first(choice.components)
        return Recalibration(
            weight,
            bias,
            prior,
            method=self.method,
            scores=sources.kinds_in_words,
            context=choice.context,
            num_source=sources.num_scores,
            num_images=self.num_images,
            strength=choice.strength,
            cv=table,
            images=tuple(sorted(self.ids)),
            sources=sources.classes,
            projection=projection,
            colour=sources.colour,
            trees=trees,
        )

    def _settings(self) -> dict[str, Any]:
        """What two recalibrators must share to be merged."""
        return {
            "num_classes": self.num_classes,
            "sources": None if self._sources is None else self._sources.classes,
            "features": self.features and self.features.fingerprint,
            "colour": self.colour,
            "method": self.method,
            "scores": self.scores,
            "context": self.context,
            "budget": self.budget,
            "seed": self.seed,
            "folds": self.folds,
            "ignore_index": self.ignore_index,
        }

    def _state(self) -> _State:
        """What another recalibrator takes of this one."""
        reservoir = self._reservoir
        return self._settings(), reservoir.samples, reservoir.quota, self.ids, self._sources

    def _take(
        self,
        where: str,
        others: Sequence[_State],
    ) -> None:
        """The samples of recalibrators of the same settings."""
        own = self._settings()
        for theirs, *_ in others:
            if own["sources"] is None:
                own["sources"] = theirs["sources"]
            if theirs["sources"] is None:  # nothing seen yet
                theirs = {**theirs, "sources": own["sources"]}
            check_alike(where, own, theirs)
        self._sources = self._sources or next((each for *_, each in others if each), None)
        for _, samples, quota, ids, _ in others:
            self.ids.update(check_image_ids(where, sorted(ids), len(ids), self.ids) or ())
            self._reservoir.add(samples, quota)


def _numbers(where: str, sources: Sequence[int]) -> tuple[int, ...]:
    """Numbers of classes of models, as given."""
    if not isinstance(sources, (list, tuple)) or not sources:
        expected, fix = "sources as the models' numbers of classes", "pass (21, 21), say"
        raise ValueError(message(where, expected, short(sources), fix))
    for number in sources:
        check_count(where, number, name="sources", fix="count each model's classes")
    return tuple(sources)


def _kinds(
    where: str, scores: str | Sequence[str], sources: tuple[int, ...] | None
) -> str | tuple[str, ...]:
    """Kinds of probabilities, checked as far as the number of models is known."""
    given = (scores,) if isinstance(scores, str) else scores
    if not isinstance(given, (list, tuple)) or not all(isinstance(each, str) for each in given):
        fix = "pass 'softmax' or 'sigmoid'"
        raise TypeError(message(where, "scores as a word or a list of words", short(scores), fix))
    count = len(",".join(given).split(",")) if sources is None else len(sources)
    kinds_of(where, scores, count)
    return scores if isinstance(scores, str) else tuple(scores)


def _trimmed(samples: Sequence[Sample], quota: int, most: int) -> list[Sample]:
    """The samples that a smaller quota would have drawn, at most so many pixels together."""
    trimmed = list(samples)
    while sum(len(sample.labels) for sample in trimmed) > most and quota > 1:
        quota //= 2
        trimmed = [sample.trim(quota) for sample in trimmed]
    return trimmed


def _means_at(image: Tensor, there: tuple[Tensor, Tensor], radius: int) -> Tensor:
    """Mean scores ``[n, S]`` over the windows around some pixels, a band of rows at a time."""
    height = image.shape[-2]
    found = torch.empty(len(there[0]), len(image))
    step = max(1, 2 * radius, _BAND // (len(image) * image.shape[-1]))
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        inside = (there[0] >= rows.start) & (there[0] < rows.stop)
        means = window_means(image.unsqueeze(0), rows, radius)[0]
        values = means[:, there[0][inside] - start, there[1][inside]]
        found[inside.cpu()] = values.T.cpu()
    return found
