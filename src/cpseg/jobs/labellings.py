"""Ways to label every pixel: a model's own classes, or those of a map over some of the sources.

They need no thresholds, so that a fold's map is fitted on all of its training images, as it is
where labels for a student are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cpseg.core.feature_projection import FeatureProjection
from cpseg.jobs.recalibrate import RecalibrationOptions
from cpseg.recalibration.recalibration import Recalibration
from cpseg.recalibration.recalibrator import Recalibrator
from cpseg.recalibration.sources import Sources, kinds_of

Map = Callable[[Tensor], Tensor]
OWN = "none"  # the method of a model's own scores


class Labelling(NamedTuple):
    """Which scores give the most probable class.

    Attributes:
        method: of the recalibration; ``"none"`` for the scores of a model as they are.
        sources: indices of the sources used; the one after the models' is the features.
        prior_power: to which the class prior is divided out.
    """

    method: str
    sources: tuple[int, ...]
    prior_power: float = 0.0

    def in_words(self, names: Sequence[str]) -> str:
        """The labelling, with the names of the sources.

        Example:
            >>> from cpseg.jobs.labellings import Labelling
            >>> Labelling("dirichlet", (0, 1), 0.25).in_words(["probs", "student"])
            'dirichlet map over probs + student, prior power 0.25'
            >>> Labelling("none", (1,)).in_words(["probs", "student"])
            'student as it is'
        """
        used = " + ".join(names[source] for source in self.sources)
        if self.method == OWN:
            return f"{used} as it is"
        power = f", prior power {self.prior_power:g}" if self.prior_power else ""
        return f"{self.method} map over {used}{power}"


def labellings_to_try(
    classes: Sequence[int],
    num_classes: int,
    *,
    features: bool,
    methods: Sequence[str],
    prior_powers: Sequence[float],
    subsets: bool = True,
) -> list[Labelling]:
    """What there is to choose from, from the simplest to the largest.

    Every model as it is; a map over all sources with every prior power; and maps over a part of
    the sources, by the first method alone: what a source gives hardly depends on the method, and
    every map costs a fit per fold.

    Args:
        classes: number of classes of every model; those with other classes than the data set have
            no labels as they are.
        num_classes: of the data set.
        features: whether there are features beside the models.
        methods: of recalibration; ``"none"`` is left out, and ``"temperature"``, which changes no
            label of a single model.
        prior_powers: to try with the map over all sources.
        subsets: with several sources, also a map over each model, and with three or more over all
            sources but one.
    """
    models = range(len(classes))
    everything = tuple(range(len(classes) + features))
    same = all(each == num_classes for each in classes)
    tried = [Labelling(OWN, (model,)) for model in models if classes[model] == num_classes]
    for method in methods:
        if method in (OWN, "temperature") or (method == "vector" and not same):
            continue
        parts: list[tuple[int, ...]] = []
        if subsets and len(everything) > 1:
            parts += [(model,) for model in models]
        if subsets and len(everything) > 2:
            parts += [
                tuple(source for source in everything if source != left)
                for left in reversed(everything)
                if any(model != left for model in models)
            ]
        tried += [Labelling(method, part) for part in parts]
        subsets = False
        tried += [Labelling(method, everything, float(power)) for power in prior_powers]
    return list(dict.fromkeys(tried))


class LabellingFit:
    """Fits the maps of some labellings on a fold's training images.

    Args:
        tried: the labellings.
        num_classes: number of classes of the data set.
        classes: number of classes of every model.
        projection: of the features, or None.
        colour: whether every map uses the images' colours too.
        options: how to recalibrate; the method is each labelling's.
        seed: of the sampled pixels.
    """

    def __init__(
        self,
        tried: Sequence[Labelling],
        *,
        num_classes: int,
        classes: Sequence[int],
        projection: FeatureProjection | None,
        colour: bool,
        options: RecalibrationOptions,
        seed: int,
    ) -> None:
        self.tried = tried
        kinds = kinds_of("labellings", options.scores, len(classes))
        sources = Sources(tuple(classes), kinds, projection, colour)
        self._models = sources.channels
        self._colour = slice(sources.num_scores, sources.before_components)
        self._components = slice(sources.before_components, sources.num_channels)
        models = range(len(classes))
        self._recalibrators: dict[tuple[str, tuple[int, ...]], Recalibrator] = {}
        for method, used, _ in tried:
            if method == OWN or (method, used) in self._recalibrators:
                continue
            own = [model for model in models if model in used]
            self._recalibrators[method, used] = RecalibrationOptions(
                method, context=options.context, scores=",".join(kinds[model] for model in own)
            ).recalibrator(
                num_classes,
                seed,
                sources=[classes[model] for model in own],
                features=projection if len(classes) in used else None,
                colour=colour,
            )

    def select(self, probs: Tensor, sources: tuple[int, ...]) -> Tensor:
        """The channels that a map over some sources takes, ``[C, H, W]``."""
        models = len(self._models)
        if len(sources) == models + (self._components.start < self._components.stop):
            return probs
        parts = [probs[self._models[source]] for source in sources if source < models]
        parts.append(probs[self._colour])
        if models in sources:
            parts.append(probs[self._components])
        return torch.cat(parts)

    def update(self, probs: Tensor, labels: Tensor) -> None:
        """Take a training image, the channels of all sources."""
        for (_, sources), recalibrator in self._recalibrators.items():
            recalibrator.update(self.select(probs, sources), labels)

    def fit(self, device: str) -> dict[Labelling, Map]:
        """From the channels of all sources to probabilities, for every labelling.

        Raises:
            ValueError: images that do not suffice for a fit.
        """
        fitted = {}
        for key, recalibrator in self._recalibrators.items():
            recalibrator.sync()
            fitted[key] = _Powers(recalibrator.fit().to(device))

        def of(labelling: Labelling) -> Map:
            if labelling.method == OWN:
                return lambda probs: probs[self._models[labelling.sources[0]]]
            powers = fitted[labelling.method, labelling.sources]
            return lambda probs: powers(
                probs, self.select(probs, labelling.sources), labelling.prior_power
            )

        return {labelling: of(labelling) for labelling in self.tried}


class _Powers:
    """A map with any prior power; an image is mapped once for all powers asked one after another.

    Args:
        chosen: the map.
    """

    def __init__(self, chosen: Recalibration) -> None:
        self._map = chosen.with_prior_power(0)
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, image: Tensor, channels: Tensor, power: float) -> Tensor:
        """Probabilities ``[K, H, W]`` of ``channels``, which were selected from ``image``."""
        if self._last is None or self._last[0] is not image:
            self._last = image, self._map(channels)
        plain = self._last[1]
        return self._map.divide_prior(plain, power) if power else plain
