"""``Recalibrator`` fits probabilities to the target domain; it makes a ``Recalibration``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpseg._internal.checks import (
    MOST_CLASSES,
    SCORES_FIX,
    check_alike,
    check_choice,
    check_count,
    check_ignore_index,
    check_image_ids,
    check_label_values,
    check_labels,
    check_other,
    check_probs,
    check_unit_interval,
    message,
    shape,
    short,
)
from cpseg._internal.streaming import begin_sync, gather_alike, refuse_after_sync
from cpseg.recalibration.features import (
    CONTEXTS,
    Layout,
    location,
    log_scores,
    places,
    radii,
    window_means,
)
from cpseg.recalibration.fit import (
    DEFAULT_STRENGTH,
    METHODS,
    STRENGTHS,
    TEMPERATURE_STRENGTH,
    Map,
    Pixels,
    fit_map,
    fold_losses,
)
from cpseg.recalibration.pixel_sample import PixelSample, Sample, digest, draw
from cpseg.recalibration.recalibration import SCORES, Recalibration

_CV_PIXELS = 30_000  # what cross-validation fits on: it compares maps, the final fit takes all
_BAND = 2**18  # probabilities whose window means are made at once


class Recalibrator:
    """Fits the model's probabilities to the target domain on labelled images.

    Images stream by; a bounded sample of their pixels is kept, balanced over images and classes and
    weighted back to true frequencies, every image weighing the same. The sample, and so the fit,
    is the same for every order, split and merge tree.

    Args:
        num_classes: number of target classes K, those of the labels.
        method: ``"none"`` (for the prior power alone), ``"temperature"`` (z = t log p),
            ``"vector"`` (z_k = a_k log p_k + b_k) or ``"dirichlet"`` (z = W log p + b). Only the
            last takes source classes that differ from the target classes. For sigmoid scores the
            first two work on log p - log(1 - p), and vector has a weight for each.
        scores: ``"softmax"``, or ``"sigmoid"`` for independent scores. The result is a softmax
            over the K classes in both cases.
        context: parts of the context for vector and dirichlet, a subset of ``("location",
            "neighbourhood", "image")``; ``"auto"`` lets cross-validation choose how many of them,
            in this order, and takes the fewest within a standard error of the best.
        budget: pixels to keep at most.
        seed: draws them.
        folds: folds of images in cross-validation; leave-one-out where there are fewer images.
        ignore_index: the label of void pixels.

    Raises:
        ValueError: a value outside its range.

    Reference:
        Kull et al. (2019), Beyond temperature scaling.

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
        scores: str = "softmax",
        context: str | Sequence[str] = (),
        budget: int = 100_000,
        seed: int = 0,
        folds: int = 5,
        ignore_index: int = 255,
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
        for name, value, allowed in (("method", method, METHODS), ("scores", scores, SCORES)):
            check_choice(where, value, allowed, name=name)
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
        self.num_classes = num_classes
        self.method = method
        self.scores = scores
        self.context: str | tuple[str, ...] = "auto"
        self._stored = tuple(part for part in CONTEXTS if part in asked)
        if context != "auto":
            self.context = self._stored
        self.seed = seed
        self.folds = folds
        self.ignore_index = ignore_index
        self.num_source: int | None = None
        self.ids: set[str] = set()
        self._reservoir = PixelSample(budget)
        self._synced = False

    def __repr__(self) -> str:
        context = self.context if isinstance(self.context, str) else " + ".join(self.context)
        return (
            f"Recalibrator({self.method}, {self.num_source or 'unknown'} {self.scores} classes to "
            f"{self.num_classes}, context {context or 'none'}, {self.num_images} images, "
            f"{self.num_pixels} pixels)"
        )

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
        self, probs: Tensor, labels: Tensor, *, ids: str | Sequence[str] | None = None
    ) -> None:
        """Draw pixels from a batch of labelled images.

        Args:
            probs: probabilities in [0, 1], float, ``[B, S, H, W]`` or ``[S, H, W]``, whole images.
            labels: true classes 0..K-1, integer, ``[B, H, W]`` or ``[H, W]``, ``ignore_index`` for
                void. An image that is all void counts for nothing.
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
        check_probs(where, probs)
        check_labels(where, labels, probs)
        num_source = probs.shape[-3]
        if self.num_source not in (None, num_source):
            expected, got = f"{self.num_source} source classes as before", f"probs {shape(probs)}"
            raise ValueError(message(where, expected, got, "use one recalibrator per model"))
        if self.method != "dirichlet" and num_source != self.num_classes:
            expected = f"{self.num_classes} source classes for method {self.method!r}"
            fix = "take method 'dirichlet', or map the classes first"
            raise ValueError(message(where, expected, str(num_source), fix))
        probs = probs.detach()
        check_unit_interval(where, probs, name="probs", fix=SCORES_FIX)
        check_label_values(where, labels, self.num_classes, self.ignore_index)
        if probs.ndim == 3:
            probs, labels = probs.unsqueeze(0), labels.unsqueeze(0)
        self.ids.update(check_image_ids(where, ids, len(probs), self.ids) or ())
        self.num_source = num_source
        for image, truth in zip(probs, labels, strict=True):
            sample = self._draw(image, truth.to("cpu", torch.int64))
            if len(sample.labels):
                self._reservoir.add([sample])

    def merge(self, other: Recalibrator) -> None:
        """Take all that another recalibrator of the same settings has seen; it stays as it is.

        Raises:
            ValueError: other settings, itself, or one after ``sync``.
            TypeError: not a recalibrator.
        """
        where = "Recalibrator.merge"
        check_other(where, self, other)
        refuse_after_sync(where, self._synced or other._synced)
        self._take(where, [(other._settings(), other._reservoir.samples, other.ids)])

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
        state = (settings, self._reservoir.samples, self.ids)
        everyone = gather_alike(where, {**settings, "num_source": None}, state, process_group)
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
            return self._result(base, (), 0.0, prior, present, ())
        pixels = self._pixels(samples, present)
        if bool((pixels.features[:, :own] == pixels.features[:1, :own]).all()):
            got = "the same scores at every labelled pixel"
            fix = "check how they were written: there is nothing to learn"
            raise ValueError(message(where, "scores that differ between pixels", got, fix))
        context, strength, table = self._choose(samples, present, base)
        kept = self._layout.indices(context)
        fitted = fit_map(
            pixels._replace(features=pixels.features[:, kept]),
            Map(base.weight[:, kept], base.bias),
            self.method,
            strength,
            own=own,
        )
        return self._result(fitted, context, strength, prior, present, table)

    @property
    def _layout(self) -> Layout:
        """The columns of the features that are kept of a pixel."""
        assert self.num_source is not None
        return Layout(self.num_source, self.scores, self._stored)

    def _draw(self, image: Tensor, labels: Tensor) -> Sample:
        """Some pixels of one image ``[S, H, W]``, with what the context needs."""
        known = labels != self.ignore_index
        count = torch.bincount(labels[known], minlength=self.num_classes)
        name = digest(labels, image, self.seed)
        flat = labels.masked_fill(~known, -1).flatten()
        chosen = draw(name, flat, count, self._reservoir.quota)
        height, across = labels.shape
        y, x = chosen // across, chosen % across
        there = (y.to(image.device), x.to(image.device))
        values = [image[:, there[0], there[1]].T.to("cpu", torch.float32)]
        if "location" in self._stored:
            places_y = places(height, slice(0, height), torch.device("cpu"))
            places_x = places(across, slice(0, across), torch.device("cpu"))
            values.append(torch.stack([places_y[y], places_x[x]], 1))
        if "neighbourhood" in self._stored:
            values += [_means_at(image, there, radius) for radius in radii(height, across)]
        if "image" in self._stored:
            mean = image.mean((-2, -1), dtype=torch.float64).to("cpu", torch.float32)
            values.append(mean.expand(len(chosen), -1))
        return Sample(name, count, flat[chosen], torch.cat(values, 1))

    def _pixels(self, samples: Sequence[Sample], present: Tensor) -> Pixels:
        """The kept pixels with their features, labels numbered among the present classes."""
        values = torch.cat([sample.values for sample in samples])
        assert self.num_source is not None
        sizes = {
            "location": [2],
            "neighbourhood": 2 * [self.num_source],
            "image": [self.num_source],
        }
        widths = [self.num_source] + [size for part in self._stored for size in sizes[part]]
        parts = list(torch.split(values, widths, 1))
        if "location" in self._stored:
            parts[1] = location(*parts[1].unbind(1))
        features = [
            part if index == 1 and "location" in self._stored else log_scores(part, self.scores)
            for index, part in enumerate(parts)
        ]
        return Pixels(
            torch.cat(features, 1),
            torch.searchsorted(present, torch.cat([sample.labels for sample in samples])),
            torch.cat([sample.weights() for sample in samples]),
            torch.cat([torch.full_like(s.labels, number) for number, s in enumerate(samples)]),
        )

    def _base(self, prior: Tensor, present: Tensor) -> Map:
        """What the fit shrinks to: the scores themselves, or the prior where classes differ."""
        assert self.num_source is not None
        weight = torch.zeros(len(present), self._layout.width, dtype=torch.float64)
        if self.num_source != self.num_classes:
            return Map(weight, prior[present].log())
        rows = torch.arange(len(present))
        weight[rows, present] = 1
        if self.scores == "sigmoid":  # log p - log(1 - p): exactly one of independent events
            weight[rows, self.num_source + present] = -1
        return Map(weight, torch.zeros(len(present), dtype=torch.float64))

    def _choose(
        self, samples: Sequence[Sample], present: Tensor, base: Map
    ) -> tuple[tuple[str, ...], float, tuple[dict[str, Any], ...]]:
        """Context and strength by cross-validation over images, and the table of candidates."""
        contexts = [self._stored]
        if self.context == "auto":
            contexts = [CONTEXTS[:number] for number in range(len(CONTEXTS) + 1)]
        strengths = (TEMPERATURE_STRENGTH,) if self.method == "temperature" else STRENGTHS
        if len(samples) == 1:
            return contexts[0], strengths[0] if len(strengths) == 1 else DEFAULT_STRENGTH, ()
        quota = self._reservoir.quota
        while sum(len(sample.labels) for sample in samples) > _CV_PIXELS and quota > 1:
            quota //= 2
            samples = [sample.trim(quota) for sample in samples]
        pixels = self._pixels(samples, present)
        folds = min(self.folds, len(samples))
        table: list[dict[str, Any]] = []
        best: list[tuple[float, Tensor, float]] = []  # of every context
        for context in contexts:
            kept = self._layout.indices(context)
            part = pixels._replace(features=pixels.features[:, kept])
            start = Map(base.weight[:, kept], base.bias)
            found: list[tuple[float, Tensor, float]] = []
            for strength, losses in fold_losses(
                part, start, self.method, strengths, own=self._layout.own, folds=folds
            ):
                found.append((float(losses.mean()), losses, strength))
                error = float(losses.std() / math.sqrt(folds))
                row = {"strength": strength, "loss": found[-1][0], "error": error}
                table.append({"context": list(context), **row})
                if len(found) > 1 and found[-1][0] > found[-2][0]:
                    break  # weaker is only worse from here
            best.append(min(found, key=lambda candidate: candidate[0]))
        lowest = min(best, key=lambda candidate: candidate[0])
        for context, (_, losses, strength) in zip(contexts, best, strict=True):
            worse = losses - lowest[1]
            if float(worse.mean()) <= float(worse.std() / math.sqrt(folds)):
                return context, strength, tuple(table)
        raise AssertionError("the lowest is within its own error")

    def _result(
        self,
        fitted: Map,
        context: tuple[str, ...],
        strength: float,
        prior: Tensor,
        present: Tensor,
        table: tuple[dict[str, Any], ...],
    ) -> Recalibration:
        """The map of the present classes, as one of all classes."""
        assert self.num_source is not None
        weight = torch.zeros(self.num_classes, fitted.weight.shape[1])
        bias = torch.zeros(self.num_classes)
        weight[present], bias[present] = fitted.weight.float(), fitted.bias.float()
        return Recalibration(
            weight,
            bias,
            prior,
            method=self.method,
            scores=self.scores,
            context=context,
            num_source=self.num_source,
            num_images=self.num_images,
            strength=strength,
            cv=table,
            images=tuple(sorted(self.ids)),
        )

    def _settings(self) -> dict[str, Any]:
        """What two recalibrators must share to be merged."""
        return {
            "num_classes": self.num_classes,
            "num_source": self.num_source,
            "method": self.method,
            "scores": self.scores,
            "context": self.context,
            "budget": self.budget,
            "seed": self.seed,
            "folds": self.folds,
            "ignore_index": self.ignore_index,
        }

    def _take(
        self, where: str, others: Sequence[tuple[dict[str, Any], list[Sample], set[str]]]
    ) -> None:
        """The samples of recalibrators of the same settings."""
        own = self._settings()
        for theirs, _, _ in others:
            if own["num_source"] is None:
                own["num_source"] = theirs["num_source"]
            if theirs["num_source"] is None:  # nothing seen yet
                theirs = {**theirs, "num_source": own["num_source"]}
            check_alike(where, own, theirs)
        self.num_source = own["num_source"]
        for _, samples, ids in others:
            self.ids.update(check_image_ids(where, sorted(ids), len(ids), self.ids) or ())
            self._reservoir.add(samples)


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
