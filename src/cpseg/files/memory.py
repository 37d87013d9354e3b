"""Labelled images whose scores and masks are in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from cpseg._internal.checks import check_labels, check_probs, message, shape
from cpseg.core.channels import join_channels
from cpseg.files.dataset import LabelledImages, ScoreFolder, Source
from cpseg.files.id_lists import Pair


@dataclass(frozen=True)
class ImagesInMemory(LabelledImages):
    """Labelled images that no file holds.

    Attributes:
        held: the scores of every model ``[K, H, W]``, and the labels ``[H, W]`` with void as 255.
    """

    held: Mapping[Pair, tuple[tuple[Tensor, ...], Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        where: str,
        scores: Sequence[Sequence[Tensor]],
        masks: Sequence[Tensor],
        names: Sequence[str],
    ) -> ImagesInMemory:
        """Images from the scores of one or several models.

        Args:
            where: who asks, for messages.
            scores: for every image those of every model, float ``[K, H, W]``.
            masks: for every image its labels, integers ``[H, W]``, void as 255.
            names: of the models.

        Raises:
            ValueError: numbers of images, models or classes that differ, or no image.
        """
        if len(scores) != len(masks) or not scores:
            got = f"{len(scores)} and {len(masks)}"
            fix = "pass both for every image"
            raise ValueError(message(where, "scores and masks of the same images", got, fix))
        pairs = [Pair(f"image {number}", "") for number in range(len(scores))]
        held = dict(zip(pairs, zip(map(tuple, scores), masks, strict=True), strict=True))
        for pair, (each, _) in held.items():
            for one in each:
                if one.ndim != 3:
                    fix = "pass one tensor for each image, classes first"
                    got = shape(one)
                    raise ValueError(
                        message(f"{where}, {pair.image}", "scores [K, H, W]", got, fix)
                    )
        classes = tuple(len(each) for each in scores[0])
        for pair, (each, labels) in held.items():
            if tuple(map(len, each)) != classes or len(each) != len(names):
                expected = f"{' and '.join(map(str, classes))} classes of {len(names)} models"
                got = " and ".join(shape(one) for one in each)
                fix = "pass the scores of the same models for every image"
                raise ValueError(message(f"{where}, {pair.image}", expected, got, fix))
            for one in each:
                check_probs(f"{where}, {pair.image}", one, name="scores")
            check_labels(f"{where}, {pair.image}", labels, each[0], name="the mask")
        first, *others = (Path(name) for name in names)
        source = Source(Path(), first, others=tuple(ScoreFolder(path) for path in others))
        height, width = scores[0][0].shape[-2:]
        return cls(
            source,
            pairs,
            {pair: (Path(pair.image),) for pair in pairs},
            sum(classes),
            classes[0],
            (height, width),
            sources=classes,
            held=held,
        )

    def read(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Channels of all models, and labels."""
        scores, labels = self.held[pair]
        return (scores[0] if len(scores) == 1 else join_channels(list(scores), None, None)), labels

    def of_models(self, models: Sequence[int]) -> ImagesInMemory:
        """The same images with the scores of some of the models."""
        held = {
            pair: (tuple(scores[model] for model in models), labels)
            for pair, (scores, labels) in self.held.items()
        }
        folders = self.source.models
        first, *others = (folders[model] for model in models)
        classes = tuple(self.sources[model] for model in models)
        source = replace(self.source, probs=first.probs, others=tuple(others))
        return replace(
            self,
            source=source,
            num_source=sum(classes),
            num_classes=classes[0],
            sources=classes,
            held=held,
        )
