"""How the scores of several models, and an encoder's features, lie in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias, cast

from torch import Tensor

from cpseg._internal import words
from cpseg._internal.checks import (
    SCORES_FIX,
    check_probs,
    check_same_device,
    check_unit_interval,
    message,
    shape,
)
from cpseg.core.channels import join_channels
from cpseg.core.feature_projection import FeatureProjection

# One tensor, or one for every source: the scores of each model, an encoder's features, the image.
Probs: TypeAlias = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Sources:
    """What the channels of a tensor are: classes of every model, colours, then components.

    Attributes:
        classes: number of classes of every model.
        kinds: ``"softmax"`` or ``"sigmoid"``, the kind of every model's probabilities.
        projection: of the features, or None where there are none.
        colour: whether the image itself is a source: its colours lie after the scores.
    """

    classes: tuple[int, ...]
    kinds: tuple[str, ...]
    projection: FeatureProjection | None = None
    colour: bool = False

    @property
    def num_scores(self) -> int:
        """Number of the classes of all models."""
        return sum(self.classes)

    @property
    def components(self) -> int:
        """Number of components of the features."""
        return 0 if self.projection is None else self.projection.components

    @property
    def before_components(self) -> int:
        """Number of channels of scores and colours."""
        return self.num_scores + 3 * self.colour

    @property
    def num_channels(self) -> int:
        """Number of all channels."""
        return self.before_components + self.components

    @property
    def is_single(self) -> bool:
        """Whether there are the scores of one model alone."""
        return len(self.classes) == 1 and self.projection is None and not self.colour

    @property
    def channels(self) -> list[slice]:
        """The channels of every model."""
        ends = [0]
        for each in self.classes:
            ends.append(ends[-1] + each)
        return [slice(*pair) for pair in pairwise(ends)]

    @property
    def sigmoid(self) -> tuple[int, ...]:
        """The channels of independent scores."""
        return tuple(
            channel
            for part, kind in zip(self.channels, self.kinds, strict=True)
            if kind == "sigmoid"
            for channel in range(part.start, part.stop)
        )

    @property
    def kinds_in_words(self) -> str:
        """One word where all are of a kind, else one for each with commas between."""
        return self.kinds[0] if len(set(self.kinds)) == 1 else ",".join(self.kinds)

    def join(self, where: str, probs: Probs, *, check_values: bool = False) -> Tensor:
        """The sources as one tensor, at the size of the first; a tensor stays as it is.

        Args:
            where: who asks, for messages.
            probs: one tensor ``[B, C, H, W]`` or ``[C, H, W]`` of all channels, or a list: the
                scores of every model, then the features as the encoder gives them, then the image
                ``[B, 3, h, w]`` in [0, 1], whatever their size. All are brought to the first
                source's size by bilinear interpolation.
            check_values: whether scores must lie in [0, 1].

        Returns:
            The channels. A tensor given may have further ones: components that are not used.

        Raises:
            ValueError: another number of sources, classes, channels or images, another device.
            TypeError: not floating point.
        """
        if not isinstance(probs, (list, tuple)):
            joined = one_tensor(where, probs)
            found, need = joined.shape[-3], self.num_channels
            if found < need or (found > need and self.projection is None):
                raise self._refusal(where, f"probs {shape(joined)}")
            if check_values:
                own = joined[..., : self.num_scores, :, :]
                check_unit_interval(where, own, name="probs", fix=SCORES_FIX)
            return joined
        wanted = len(self.classes) + (self.projection is not None) + self.colour
        if len(probs) != wanted:
            raise self._refusal(where, f"{len(probs)} tensors")
        scores: list[Tensor] = []
        components = colour = None
        for number, part in enumerate(probs):
            name = _name(number)
            check_probs(where, part, name=name)
            check_same_device(where, part, probs[0], name=name, reference=_name(0))
            if part.shape[:-3] != probs[0].shape[:-3]:
                expected, got = f"{name} of as many images as {_name(0)}", shape(part)
                fix = "pass the same images of every source"
                raise ValueError(message(where, expected, got, fix))
            if number < len(self.classes):
                if part.shape[-3] != self.classes[number]:
                    expected = f"{name} of {self.classes[number]} classes"
                    raise ValueError(message(where, expected, shape(part), _FIX))
                if check_values:
                    check_unit_interval(where, part.detach(), name=name, fix=SCORES_FIX)
                scores.append(part.detach())
            elif self.projection is not None and components is None:
                components = self.projection(part)
            else:
                _check_colour(where, part, name)
                colour = part.detach()
        return join_channels(scores, components, colour)

    def _refusal(self, where: str, got: str) -> ValueError:
        expected = f"scores of {' + '.join(map(str, self.classes))} source classes"
        if self.projection is not None:
            expected += f", then features of {self.projection.channels} channels"
        expected += ", then the image" if self.colour else ""
        fix = "apply it to the model it was fitted on" if self.is_single else _FIX
        return ValueError(message(where, expected, got, fix))


_FIX = "pass the sources of the fit in their order, as a list or joined"


def _name(number: int) -> str:
    return f"probs[{number}]"


def _check_colour(where: str, image: Tensor, name: str) -> None:
    if image.shape[-3] != 3:
        expected, fix = f"{name} as an image of 3 channels", "pass RGB in [0, 1]"
        raise ValueError(message(where, expected, shape(image), fix))


def one_tensor(where: str, probs: Probs) -> Tensor:
    """Scores that must be a single tensor, without their gradient.

    Raises:
        ValueError: wrong rank, or empty.
        TypeError: not a floating-point tensor.
    """
    check_probs(where, cast(Tensor, probs))
    return cast(Tensor, probs).detach()


def sources_of(
    where: str,
    probs: Probs,
    classes: Sequence[int] | None,
    kinds: str | Sequence[str],
    projection: FeatureProjection | None,
    colour: bool = False,
) -> Sources:
    """The sources, with the numbers of classes of these scores where they were not given.

    Raises:
        ValueError: numbers of classes that one tensor does not tell, or another number of kinds
            than models.
        TypeError: scores that are no tensors.
    """
    if classes is None:
        several = isinstance(probs, (list, tuple))
        parts = list(probs) if several else [one_tensor(where, probs)]
        more = (projection is not None) + colour
        if more:
            if not several:
                got, fix = "one tensor with more in it", "pass sources, or a list of tensors"
                raise ValueError(message(where, "the sources' numbers of classes", got, fix))
            parts = parts[:-more]
        for number, part in enumerate(parts):
            check_probs(where, part, name=_name(number) if several else "probs")
        classes = [part.shape[-3] for part in parts]
    if not classes:
        fix = "pass those of one model at least"
        raise ValueError(message(where, "scores of a model", "none", fix))
    return Sources(tuple(classes), kinds_of(where, kinds, len(classes)), projection, colour)


def kinds_of(where: str, scores: str | Sequence[str], count: int) -> tuple[str, ...]:
    """The kind of every model's probabilities, from one word for all or one for each.

    Raises:
        ValueError: an unknown word, or another number of them.
    """
    said = scores.split(",") if isinstance(scores, str) else list(scores)
    if not said or not set(said) <= set(words.SCORE_KINDS):
        expected = f"scores among {', '.join(map(repr, words.SCORE_KINDS))}"
        got = repr(scores)[:80]
        raise ValueError(message(where, expected, got, "name the kind of the probabilities"))
    if len(said) not in (1, count):
        expected, got = f"1 or {count} kinds of scores, one per model", f"{len(said)}"
        raise ValueError(message(where, expected, got, "name one kind for all, or one for each"))
    return tuple(said) if len(said) == count else (said[0],) * count
