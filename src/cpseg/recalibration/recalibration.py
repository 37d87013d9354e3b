"""``Recalibration``: maps the model's class probabilities to those of the target domain."""

from __future__ import annotations

import hashlib
import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cpseg._internal import words
from cpseg._internal.checks import (
    SCORES_FIX,
    check_background,
    check_count,
    check_float,
    check_has_values,
    check_same_device,
    check_unit_interval,
    is_compiling,
    is_share,
    message,
    shape,
)
from cpseg._internal.fields import Valid, among, list_of, or_none, read_fields, text, truth, whole
from cpseg._internal.safe_files import read_tensors, write_tensors
from cpseg._internal.threads import shared
from cpseg.core.argmax import best_of_classes, class_dtype
from cpseg.core.feature_projection import FeatureProjection
from cpseg.core.selection import Evidence
from cpseg.recalibration.features import (
    CONTEXTS,
    Layout,
    colour_features,
    log_scores,
    places,
    radii,
    window_means,
)
from cpseg.recalibration.fit import METHODS
from cpseg.recalibration.sources import Probs, Sources, kinds_of, one_tensor
from cpseg.recalibration.trees import Trees

SCORES = words.SCORE_KINDS

_FORMATS = (1, 2)  # 2: several sources
_TENSORS = ("weight", "bias", "prior")
_TILE = 2**18  # probabilities that a step on the CPU holds in cache
_TILE_ELSEWHERE = 2**25
_FOREST_PIXELS = 2**14  # of an image that the trees look at


@dataclass(frozen=True, repr=False)
class Recalibration:
    """A fitted map from the model's class probabilities to those of the target domain.

    ``z = W f + b`` and a softmax over the present classes, where f are log scores (floored at 1e-4;
    with ``log(1 - p)`` beside ``log p`` for sigmoid scores) and, if wanted, context: the pixel's
    location x, y, x², y² in (-1, 1); log mean scores over two windows of 7/180 and 31/180 of the
    image's shorter side; log mean scores over the image. Fitted by a :class:`Recalibrator`.

    A class absent from the labelled images has prior 0. Where source and target classes are the
    same it keeps its raw mass ``p_k / max(1, sum p)`` and the present classes share the rest;
    where they differ its probability is 0.

    With several sources f has the log scores of every model, and if wanted the components of an
    encoder's features and nine features of the pixel's colour. Wherever probabilities are asked
    for, a list has those of every model in their order (each may have its own size), then the
    features and the image; one tensor has their channels. An absent class keeps its mean raw mass
    over the models that have the target's classes.

    The method ``"trees"`` gives the mean of such a map's probabilities and of a forest's over the
    log scores, components and colours. The forest looks at no more than 16,384 pixels of an image,
    on a regular grid, and its answers are interpolated between them.

    Attributes:
        weight: float32 ``[K, F]``; the columns are the own scores, then the parts of ``context``.
        bias: float32 ``[K]``.
        prior: float64 ``[K]``, class frequencies in the labelled images, each weighing the same.
        method: ``"none"``, ``"temperature"``, ``"vector"``, ``"dirichlet"`` or ``"trees"``.
        scores: ``"softmax"`` or ``"sigmoid"``, the kind of the model's probabilities; with commas
            between them where models differ.
        context: the parts of the context in use.
        num_source: number S of source classes, of all models together.
        num_images: labelled images behind the fit.
        strength: weight of the penalty, see ``recalibration/fit.py``; 0 for ``"none"``.
        prior_power: tau in [0, 1]; each present class's score is divided by ``prior_k ** tau``
            before the softmax's sum: 0 is the fit itself, more favours rare classes.
        cv: the candidates of the cross-validation, each with ``context``, ``strength``, mean
            ``loss`` over folds of images and its standard ``error``; empty where one image leaves
            nothing to validate on.
        images: ids of the images used to fit it, sorted, where they were given: a ``Certifier``
            refuses them.
        sources: number of classes of every model; one model by default.
        projection: of an encoder's features, with the components in use, or None.
        colour: whether the image itself is a source.
        trees: the forest of the method ``"trees"``, or None.
        absent: the classes that the labelled images do not have.

    Guarantee:
        None by itself. As part of the score function it must be fixed before calibration: fit it
        on other images than those that calibrate.

    Reference:
        Guo et al. (2017) for temperature and vector scaling; Kull et al. (2019), eq. 4, for
        Dirichlet calibration; Saerens et al. (2002) for dividing out a prior; Geurts et al. (2006)
        for the trees; Wolpert (1992), Stacked generalization, for a map over several models.
    """

    weight: Tensor
    bias: Tensor
    prior: Tensor
    method: str
    scores: str
    context: tuple[str, ...]
    num_source: int
    num_images: int
    strength: float
    prior_power: float = 0.0
    cv: tuple[Mapping[str, Any], ...] = ()
    images: tuple[str, ...] = ()
    sources: tuple[int, ...] = ()
    projection: FeatureProjection | None = None
    colour: bool = False
    trees: Trees | None = None
    absent: tuple[int, ...] = field(init=False)
    _sources: Sources = field(init=False, compare=False)

    def __post_init__(self) -> None:
        classes = tuple(self.sources) or (self.num_source,)
        kinds = kinds_of("Recalibration", self.scores, len(classes))
        object.__setattr__(self, "sources", classes)
        object.__setattr__(self, "_sources", Sources(classes, kinds, self.projection, self.colour))
        for name in _TENSORS:
            part = getattr(self, name)
            check_float("Recalibration", part, name=name, fix="fit one with a Recalibrator")
        check_has_values("Recalibration", self.prior, name="prior")
        missing = (self.prior == 0).nonzero().flatten().tolist()
        object.__setattr__(self, "absent", tuple(missing))

    def __repr__(self) -> str:
        parts = [
            self.method,
            f"{_sum(self.sources)} {self.scores} classes to {self.num_classes}",
            f"{self._components} components of features" if self._components else "",
            "colour" if self.colour else "",
            f"context {' + '.join(self.context) or 'none'}",
            f"{self.num_images} images",
            f"strength {self.strength:g}",
            f"prior power {self.prior_power:g}" if self.prior_power else "",
            f"{len(self.absent)} classes absent" if self.absent else "",
        ]
        return f"Recalibration({', '.join(filter(None, parts))})"

    @property
    def num_classes(self) -> int:
        """Number of target classes K."""
        return self.weight.shape[0]

    @property
    def channels(self) -> list[slice]:
        """Where the scores of every model lie in the one tensor of all sources."""
        return self._sources.channels

    @property
    def _components(self) -> int:
        return self._sources.components

    @cached_property
    def fingerprint(self) -> str:
        """A digest of everything that changes its result, prior power included."""
        parts = self.tensors().values()
        content = b"".join(part.cpu().contiguous().numpy().tobytes() for part in parts)
        facts = f"{self.scores} {self.context} {self.num_source} {self.prior_power}"
        if len(self.sources) > 1 or self.colour:
            facts += f" {self.sources} {self.colour}"
        return hashlib.sha256(content + facts.encode()).hexdigest()[:16]

    def join(
        self, probs: Probs, *, check_values: bool = False, where: str = "Recalibration.join"
    ) -> Tensor:
        """The sources as one tensor, which every method takes in their place.

        Args:
            probs: a list of tensors, ``[B, K_s, h, w]`` or ``[K_s, h, w]`` of every model and then
                the features ``[B, C, h, w]`` or ``[C, h, w]`` if there are any; or one tensor of
                their channels, which stays as it is.
            check_values: whether probabilities must lie in [0, 1]; that takes a pass over them.
            where: who asks, for messages.

        Returns:
            ``[B, C, H, W]`` or ``[C, H, W]``, at the size of the first model's.

        Raises:
            ValueError: another number of sources, classes or images, another device.
            TypeError: not floating point.
        """
        return self._sources.join(where, probs, check_values=check_values)

    def __call__(self, probs: Probs) -> Tensor:
        """Class probabilities of the target domain.

        Args:
            probs: probabilities in [0, 1], float, ``[B, S, H, W]`` or ``[S, H, W]``, or the list
                that :meth:`join` takes: whole images where context is used.

        Returns:
            float32 ``[B, K, H, W]`` or ``[K, H, W]``, summing to 1 over the classes. A pixel with
            a NaN among its scores is NaN; with context a NaN reaches further.

        Raises:
            ValueError: another number of source classes, wrong rank, another device.
            TypeError: ``probs`` is not floating point.

        Example:
            >>> recalibrator = Recalibrator(2, method="none")
            >>> probs = torch.tensor([[0.9, 0.2], [0.1, 0.8]]).reshape(2, 1, 2)
            >>> recalibrator.update(probs, torch.tensor([[0, 1]]))
            >>> recalibrator.fit()(probs)
            tensor([[[0.9000, 0.2000]],
            <BLANKLINE>
                    [[0.1000, 0.8000]]])
        """
        batch, single = self._checked("Recalibration", probs)
        size = (len(batch), self.num_classes, *batch.shape[-2:])
        if is_compiling():
            rows = slice(0, size[2])
            out = self._tile(batch, rows, self._offset(batch), self._forest(batch))
        else:
            out = torch.empty(size, device=batch.device)

            def take(image: int, rows: slice, tile: Tensor) -> None:
                out[image, :, rows] = tile

            self._for_each_tile(batch, take)
        return out[0] if single else out

    def evidence(self, probs: Probs, *, background: int | None = None) -> Evidence:
        """``evidence(recalibration(probs), background=...)`` without ever holding all of it.

        Args:
            probs: probabilities, as for the call.
            background: index of a dominant target class to suppress, or None.

        Returns:
            The same :class:`Evidence`, bit for bit, with this map's fingerprint.

        Raises:
            ValueError: as for the call, or ``background`` is not a class.
            TypeError: ``probs`` is not floating point.
        """
        where = "Recalibration.evidence"
        batch, single = self._checked(where, probs)
        check_background(where, background, self.num_classes)
        size, device = (len(batch), *batch.shape[-2:]), batch.device
        best = torch.empty(size, device=device)
        kind = class_dtype(self.num_classes)
        best_class = torch.empty(size, dtype=kind, device=device)
        back = None if background is None else torch.empty(size, device=device)

        def take(image: int, rows: slice, tile: Tensor) -> None:
            found, found_class = best_of_classes(tile.unsqueeze(0), background, None)
            best[image, rows], best_class[image, rows] = found[0], found_class[0].to(kind)
            if back is not None and background is not None:
                back[image, rows] = tile[background]

        self._for_each_tile(batch, take)
        if single:
            best, best_class = best[0], best_class[0]
            back = None if back is None else back[0]
        return Evidence(best, best_class, back, background, self.num_classes, self.fingerprint)

    def with_prior_power(self, tau: float) -> Recalibration:
        """The same map with the class prior divided out to the power ``tau``.

        The present classes' probabilities become proportional to ``p_k / prior_k ** tau``; what
        an absent class keeps does not change.

        Raises:
            ValueError: ``tau`` outside [0, 1].
        """
        _check_power("Recalibration.with_prior_power", tau)
        return replace(self, prior_power=float(tau))

    def divide_prior(self, probs: Tensor, tau: float) -> Tensor:
        """What the map with a prior power gives where this one, without any, gives ``probs``.

        Args:
            probs: ``[K, H, W]``, of this map with prior power 0.
            tau: the power in [0, 1], see :meth:`with_prior_power`.

        Returns:
            ``[K, H, W]``, equal up to rounding to the powered map's.
        """
        odds = self.with_prior_power(tau)._odds[:, None, None]
        present = odds > 0
        weighted = probs * odds
        total = torch.where(present, probs, 0).sum(0)
        weighted *= total / weighted.sum(0).clamp(min=torch.finfo(probs.dtype).tiny)
        return torch.where(present, weighted, probs)

    def to(self, device: torch.device | str) -> Recalibration:
        """The same map on another device."""
        tensors = {name: getattr(self, name).to(device) for name in _TENSORS}
        projection = None if self.projection is None else self.projection.to(device)
        trees = None if self.trees is None else self.trees.to(device)
        return replace(self, **tensors, projection=projection, trees=trees)

    def correspondence(self, top: int = 3) -> list[list[tuple[int, float]]]:
        """For every target class the source classes that support it most.

        The weights alone would mislead: a class for all other things may have no large weight.

        Args:
            top: how many to name.

        Returns:
            Per target class a list of pairs, the largest probability first: a source class, and
            the probability of the target where the model gives 0.9 to that source (the others
            share 0.1, and with context all of the image is the same). Empty for absent classes.
            With several models the others know nothing there: all of their classes are as likely;
            features and colours are 0.
        """
        fix = "pass 3"
        check_count("Recalibration.correspondence", top, name="top", fix=fix)
        total, device = self.num_source, self.weight.device
        sure = torch.zeros(total, self._sources.num_channels, device=device)
        for part in self._sources.channels:
            count = part.stop - part.start
            sure[:, part] = 1 / count
            sure[part, part] = 0.1 / max(1, count - 1)
        sure[:, :total].fill_diagonal_(0.9)
        value, source = (
            self(sure[..., None, None]).flatten(1).sort(dim=0, descending=True, stable=True)
        )
        return [
            []
            if target in self.absent
            else list(zip(source[:top, target].tolist(), value[:top, target].tolist(), strict=True))
            for target in range(self.num_classes)
        ]

    def describe(
        self, source_names: Sequence[str] | None = None, names: Sequence[str] | None = None
    ) -> str:
        """The map in words: how it was fitted, and which source classes support each class.

        Args:
            source_names: names of the S source classes, those of all models in turn.
            names: names of the K target classes.

        Raises:
            ValueError: another number of names.
        """
        where = "Recalibration.describe"
        numbers = [
            f"{number}:{k}" if len(self.sources) > 1 else f"{k}"
            for number, count in enumerate(self.sources, 1)
            for k in range(count)
        ]
        sources = _names(where, "source_names", source_names, numbers)
        targets = _names(where, "names", names, list(map(str, range(self.num_classes))))
        context = ", ".join(self.context) or "none"
        more = f", {self._components} components of features" if self._components else ""
        more += ", colours" if self.colour else ""
        lines = [
            f"{self.method} map of {_sum(self.sources)} {self.scores} scores{more} onto "
            f"{self.num_classes} classes, {self.num_images} images, strength {self.strength:g}, "
            f"context: {context}",
            "class: its probability where the model is 0.9 sure of a source class, largest first",
        ]
        wide = max(map(len, targets))
        for target, pairs in enumerate(self.correspondence()):
            said = ", ".join(f"{value:.2f} where {sources[source]}" for source, value in pairs)
            lines.append(f"{targets[target]:<{wide}}: {said or 'absent from the labelled images'}")
        return "\n".join(lines)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a file."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        parts = [part.tensors() for part in (self.projection, self.trees) if part is not None]
        return dict(ChainMap(tensors, *parts))

    def metadata(self) -> dict[str, Any]:
        """The JSON metadata of a file."""
        several = not self._sources.is_single or self.trees is not None
        features = None if self.projection is None else self.projection.num_images
        more: dict[str, Any] = {}
        if several:
            more = {"sources": list(self.sources), "features": features, "colour": self.colour}
            more["depth"] = None if self.trees is None else self.trees.depth
        return {
            "kind": "recalibration",
            "format": 1 + several,
            "method": self.method,
            "scores": self.scores,
            "context": list(self.context),
            "num_source": self.num_source,
            "num_images": self.num_images,
            "strength": self.strength,
            "prior_power": self.prior_power,
            "cv": [dict(row) for row in self.cv],
            "images": list(self.images),
            **more,
        }

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        *,
        where: str = "Recalibration.from_parts",
    ) -> Recalibration:
        """The map that :meth:`tensors` and :meth:`metadata` describe.

        Args:
            tensors: those of the map, and of the projection if it has one.
            metadata: the table; further entries are ignored.
            where: who asks, for messages: a file's name.

        Raises:
            ValueError: a part is missing, damaged, of a later format or does not fit the others.
        """
        fix = "fit it anew with this version"
        got = f"kind {metadata.get('kind')!r} of format {metadata.get('format')!r}"
        if metadata.get("kind") != "recalibration" or metadata.get("format") not in _FORMATS:
            expected = f"a recalibration of format {' or '.join(map(str, _FORMATS))}"
            raise ValueError(message(where, expected, got, fix))
        try:
            # Copied: products may round otherwise where memory is not aligned, as in a file's.
            parts = {name: tensors[name].clone() for name in _TENSORS}
        except KeyError as error:
            raise ValueError(message(where, f"{error} in it", "nothing", fix)) from error
        facts = read_fields(where, metadata, _FIELDS, fix=fix)
        context, cv = tuple(facts.pop("context")), tuple(facts.pop("cv"))
        images = tuple(facts.pop("images"))
        found = _sources_in(where, tensors, metadata, facts, fix)
        weight, prior = parts["weight"], parts["prior"]
        trees = None
        if facts["method"] == "trees":
            trees = Trees.from_parts(
                where,
                tensors,
                metadata.get("depth"),
                columns=found.num_channels + len(found.sigmoid),
                classes=int((parts["prior"] > 0).sum()),
                fix=fix,
            )
        wide = _layout(found, context, trees).width
        num_classes = len(weight) if weight.ndim else 0
        for name, size, dtype in (
            ("weight", (max(2, num_classes), wide), torch.float32),
            ("bias", (num_classes,), torch.float32),
            ("prior", (num_classes,), torch.float64),
        ):
            part = parts[name]
            if tuple(part.shape) != size or part.dtype != dtype or not bool(part.isfinite().all()):
                got = f"{part.dtype} {shape(part)}"
                if tuple(part.shape) == size and part.dtype == dtype:
                    got = "NaN or infinite values"
                raise ValueError(message(where, f"finite {dtype} '{name}' {list(size)}", got, fix))
        if bool((prior < 0).any()) or abs(float(prior.sum()) - 1) > 1e-6:
            got = f"a sum of {float(prior.sum()):.6g}"
            raise ValueError(message(where, "a 'prior' that sums to 1", got, fix))
        if facts["method"] in METHODS[:3] and set(found.classes) != {num_classes}:
            expected, got = f"{num_classes} source classes", _sum(found.classes)
            raise ValueError(message(where, expected, got, fix))
        return cls(
            weight,
            parts["bias"],
            prior,
            context=context,
            cv=cv,
            images=images,
            sources=found.classes,
            projection=found.projection,
            colour=found.colour,
            trees=trees,
            **facts,
        )

    def save(self, path: str | Path) -> None:
        """Write the map as safetensors, atomically."""
        write_tensors(path, self.tensors(), self.metadata())

    @classmethod
    def load(cls, path: str | Path) -> Recalibration:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is damaged, of a later format, or not a recalibration.
            FileNotFoundError: there is no such file.
        """
        tensors, metadata = read_tensors(path)
        return cls.from_parts(tensors, metadata, where=str(path))

    def _checked(self, where: str, probs: Probs) -> tuple[Tensor, bool]:
        """The channels of all sources as a batch, and whether a single image was given."""
        joined = self._sources.join(where, probs)
        check_same_device(where, self.weight, joined, name="the recalibration", reference="probs")
        return (joined, False) if joined.ndim == 4 else (joined.unsqueeze(0), True)

    def _for_each_tile(self, batch: Tensor, take: Callable[[int, slice, Tensor], None]) -> None:
        """Call ``take(image, rows, probabilities [K, rows, W])`` for tiles in any order.

        On the CPU several threads do at a time, each a tile that stays in its cache.
        """
        height, across = batch.shape[-2:]
        on_cpu = batch.device.type == "cpu"
        tile = _TILE if on_cpu else _TILE_ELSEWHERE
        step = max(1, tile // (max(self.num_classes, batch.shape[1]) * across))
        if "neighbourhood" in self.context:  # a tile sums over rows above and below it
            step = max(step, 2 * max(radii(height, across)))
        threads = torch.get_num_threads() if on_cpu else 1
        for index in range(len(batch)):
            image = batch[index : index + 1]
            offset, forest = self._offset(image), self._forest(image)

            def work(
                starts: Iterator[int],
                index: int = index,
                image: Tensor = image,
                offset: Tensor = offset,
                forest: Tensor | None = forest,
            ) -> None:
                for start in starts:
                    rows = slice(start, min(start + step, height))
                    take(index, rows, self._tile(image, rows, offset, forest)[0])

            shared(work, range(0, height, step), threads)

    @property
    def _layout(self) -> Layout:
        return _layout(self._sources, self.context, self.trees)

    def _weight_of(self, part: str) -> Tensor:
        """The columns of the weight that belong to a context part."""
        return self.weight[:, self._layout.columns[part]]

    def _offset(self, images: Tensor) -> Tensor:
        """What every pixel of an image adds to z: ``[B, K, 1]``, -inf for absent classes."""
        present = self.prior > 0
        power = self.prior_power if self.trees is None else 0.0  # of the mean with the trees'
        shift = power * self.prior.clamp(min=1e-300).log()
        bias = (self.bias - shift).to(torch.float32).masked_fill(~present, -torch.inf)
        if "image" not in self.context:
            return bias.reshape(1, -1, 1)
        mean = images[:, : self.num_source].mean((-2, -1), dtype=torch.float64).to(torch.float32)
        logs = log_scores(mean, self._sources.sigmoid)
        return (logs @ self._weight_of("image").T + bias).unsqueeze(-1)

    @property
    def _odds(self) -> Tensor:
        """``prior ** -tau`` of the present classes, 0 for the absent ones."""
        powered = self.prior.clamp(min=1e-300) ** -self.prior_power
        return torch.where(self.prior > 0, powered, 0).to(torch.float32)

    def _forest(self, images: Tensor) -> Tensor | None:
        """Class probabilities of the trees, ``[B, K, H, W]``, without the prior power."""
        if self.trees is None:
            return None
        height, across = images.shape[-2:]
        step = math.ceil(math.sqrt(height * across / _FOREST_PIXELS))
        places = [
            (2 * torch.arange(n, device=images.device) + 1) * size // (2 * n)
            for size in (height, across)
            for n in [math.ceil(size / step)]
        ]
        few = images[..., places[0][:, None], places[1]][:, : self._sources.num_channels]
        own = log_scores(few[:, : self.num_source], self._sources.sigmoid)
        values = torch.cat([own, few[:, self.num_source :].to(torch.float32)], 1)
        rows = values.movedim(1, -1)
        shares = torch.zeros(*rows.shape[:-1], self.num_classes, device=images.device)
        shares[..., self.prior > 0] = self.trees(rows.flatten(0, 2)).reshape(*rows.shape[:-1], -1)
        return functional.interpolate(
            shares.movedim(-1, 1), size=(height, across), mode="bilinear", align_corners=False
        )

    def _tile(self, images: Tensor, rows: slice, offset: Tensor, forest: Tensor | None) -> Tensor:
        """Class probabilities ``[B, K, rows, W]`` of some rows."""
        height, across = images.shape[-2:]
        scores, sigmoid = images[:, : self.num_source], self._sources.sigmoid
        part = scores[..., rows, :]
        own = log_scores(part, sigmoid).flatten(2)
        weight = self.weight[:, : self._layout.own].expand(len(images), -1, -1)
        z = torch.baddbmm(offset, weight, own)
        if "neighbourhood" in self.context:
            weights = self._weight_of("neighbourhood").chunk(2, 1)
            for radius, weight in zip(radii(height, across), weights, strict=True):
                means = log_scores(window_means(scores, rows, radius), sigmoid).flatten(2)
                z = torch.baddbmm(z, weight.expand(len(images), -1, -1), means)
        if self._layout.components:
            components = slice(self._sources.before_components, self._sources.num_channels)
            values = images[:, components, rows].to(torch.float32).flatten(2)
            z = torch.baddbmm(z, self._weight_of("features").expand(len(images), -1, -1), values)
        if self.colour:
            colours = images[:, self.num_source : self.num_source + 3, rows].to(torch.float32)
            values = colour_features(colours.movedim(1, -1)).flatten(1, 2).transpose(1, 2)
            z = torch.baddbmm(z, self._weight_of("colour").expand(len(images), -1, -1), values)
        z = z.reshape(*z.shape[:2], *part.shape[-2:])
        if "location" in self.context:
            x1, y1, x2, y2 = self._weight_of("location").unbind(1)
            y = places(height, rows, images.device)
            x = places(across, slice(0, across), images.device)
            z = z + (y1[:, None] * y + y2[:, None] * y * y).unsqueeze(-1)
            z = z + (x1[:, None] * x + x2[:, None] * x * x).unsqueeze(-2)
        q: Tensor = z.sub_(z.amax(1, keepdim=True)).exp_()
        q /= q.sum(1, keepdim=True)
        if forest is not None:
            q = (q + forest[..., rows, :]) * self._odds.reshape(1, -1, 1, 1)
            q /= q.sum(1, keepdim=True)
        same = [c for c in self._sources.channels if c.stop - c.start == self.num_classes]
        if self.absent and same:
            missing = list(self.absent)
            shares = [
                p[:, missing] / p.sum(1, keepdim=True).clamp(min=1)
                for p in (part[:, channels].to(torch.float32) for channels in same)
            ]
            kept = shares[0] if len(shares) == 1 else torch.stack(shares).mean(0)
            q = q * (1 - kept.sum(1, keepdim=True)).clamp(min=0)
            q[:, missing] = kept
        return q


def _layout(sources: Sources, context: tuple[str, ...], trees: Trees | None) -> Layout:
    """The columns of the linear map; with trees the components are theirs alone."""
    components = 0 if trees is not None else sources.components
    return Layout(sources.num_scores, sources.sigmoid, context, components, sources.colour)


def join_for(
    where: str, recalibration: Recalibration | None, probs: Probs, *, check_values: bool = False
) -> Tensor:
    """The channels that a recalibration takes; without one the scores of a single model.

    Raises:
        ValueError: several sources without a recalibration, or as :meth:`Recalibration.join`.
        TypeError: not floating point.
    """
    if recalibration is not None:
        return recalibration.join(probs, check_values=check_values, where=where)
    if isinstance(probs, (list, tuple)):
        fix = "fit a Recalibrator on several sources and pass its recalibration"
        raise ValueError(message(where, "the scores of one model", f"{len(probs)} tensors", fix))
    scores = one_tensor(where, probs)
    if check_values:
        check_unit_interval(where, scores, name="probs", fix=SCORES_FIX)
    return scores


def _check_power(where: str, tau: object) -> None:
    if not is_share(tau):
        fix = "0 leaves the scores, 1 divides the whole prior out"
        raise ValueError(message(where, "a prior power in [0, 1]", repr(tau), fix))


def _names(where: str, name: str, given: Sequence[str] | None, numbers: list[str]) -> list[str]:
    if given is None:
        return numbers
    if isinstance(given, str) or len(given) != len(numbers):
        got = repr(given) if isinstance(given, str) else str(len(given))
        raise ValueError(message(where, f"{len(numbers)} {name}", got, "name every class"))
    return list(given)


def _sum(classes: Sequence[int]) -> str:
    return " + ".join(map(str, classes))


def _sources_in(
    where: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    facts: Mapping[str, Any],
    fix: str,
) -> Sources:
    """The sources of a file; those of format 1 have one model and no features."""
    classes, projection = [facts["num_source"]], None
    if metadata["format"] > 1:
        more = read_fields(where, metadata, _SEVERAL, fix=fix)
        classes = more["sources"]
        if sum(classes) != facts["num_source"]:
            expected, got = f"{facts['num_source']} classes of all sources", _sum(classes)
            raise ValueError(message(where, expected, got, fix))
        if more["features"] is not None:
            projection = FeatureProjection.from_parts(where, tensors, more["features"], fix=fix)
    kinds = kinds_of(where, facts["scores"], len(classes))
    colour = metadata["format"] > 1 and more["colour"]
    return Sources(tuple(classes), kinds, projection, colour)


def _is_context(value: Any) -> bool:
    return isinstance(value, list) and value == [part for part in CONTEXTS if part in value]


# The metadata of a file, and what each entry must be.
_FIELDS: dict[str, Valid] = {
    "method": among(METHODS),
    "scores": text,  # kinds_of says more
    "context": _is_context,
    "num_source": whole,
    "num_images": whole,
    "strength": lambda value: is_share(value, math.inf),
    "prior_power": is_share,
    "cv": list_of(lambda row: isinstance(row, dict)),
    "images": list_of(text),
}
_SEVERAL: dict[str, Valid] = {
    "sources": list_of(whole),
    "features": or_none(whole),
    "colour": truth,
}
