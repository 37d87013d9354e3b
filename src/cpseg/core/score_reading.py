"""From what a score file holds to probabilities: layout, logits, resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpseg._internal.checks import check_choice, message, shape, short

LAYOUTS = ("chw", "hwc")
KINDS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class ScoreReading:
    """How the scores of a model are read. It is part of the score function that is calibrated.

    In this order: the axes are put in place, scores of a lower resolution are resized to the
    image's size, and logits become probabilities. So logits are resized and not the probabilities
    made from them, as networks do that predict at a lower resolution.

    Attributes:
        layout: ``"chw"``, or ``"hwc"`` where the classes are the last axis.
        logits: ``"softmax"`` or ``"sigmoid"``, which makes probabilities of logits, in float32;
            None where scores are probabilities.
        upsample: whether scores of a lower resolution are resized, bilinear, with
            ``align_corners=False``.
    """

    layout: str = "chw"
    logits: str | None = None
    upsample: bool = False

    def __post_init__(self) -> None:
        check_choice("score reading", self.layout, LAYOUTS, name="layout")
        if self.logits is not None:
            check_choice("score reading", self.logits, KINDS, name="logits")

    @property
    def is_plain(self) -> bool:
        """Whether scores are probabilities ``[K, H, W]`` at the image's size."""
        return self == ScoreReading()

    def shape(
        self, stored: Sequence[int], size: Sequence[int] | None = None
    ) -> tuple[int, int, int]:
        """Classes, height and width of scores of the shape ``stored``; ``size`` is the image's."""
        classes, height, width = stored if self.layout == "chw" else (stored[2], *stored[:2])
        if self.upsample and size is not None:
            height, width = size
        return classes, height, width

    def __call__(self, scores: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """The probabilities.

        Args:
            scores: as stored, float ``[K, h, w]`` or ``[h, w, K]``.
            size: the image's height and width; needed for ``upsample``.

        Returns:
            float ``[K, H, W]``: float32 where they were resized or are made of logits.

        Raises:
            ValueError: scores of a higher resolution than the image, or no size.

        Example:
            >>> logits = torch.tensor([0.0, 2.0]).reshape(1, 1, 2)
            >>> ScoreReading("hwc", "softmax", upsample=True)(logits, (1, 2))
            tensor([[[0.1192, 0.1192]],
            <BLANKLINE>
                    [[0.8808, 0.8808]]])
        """
        if self.layout == "hwc":
            scores = scores.permute(2, 0, 1).contiguous()
        if self.upsample and size is None:
            expected, got = "the image's size for scores of a lower resolution", "none"
            raise ValueError(message("score reading", expected, got, "pass size"))
        if self.upsample and size is not None and tuple(scores.shape[1:]) != tuple(size):
            if any(own > whole for own, whole in zip(scores.shape[1:], size, strict=True)):
                expected = f"scores of at most the image's size {list(size)}"
                fix = "scores of a higher resolution are not resized: write them at that size"
                raise ValueError(message("score reading", expected, shape(scores), fix))
            scores = torch.nn.functional.interpolate(
                scores[None].to(torch.float32),
                size=(size[0], size[1]),
                mode="bilinear",
                align_corners=False,
            )[0]
            if self.logits is None:
                scores.clamp_(0, 1)  # rounding
        if self.logits is None:
            return scores
        scores = scores.to(torch.float32)
        return scores.softmax(0) if self.logits == "softmax" else scores.sigmoid()

    def to_json(self) -> dict[str, Any]:
        """What :func:`parse_reading` reads."""
        return {"layout": self.layout, "logits": self.logits, "upsample": self.upsample}


def parse_reading(content: Any, *, where: str = "score reading") -> ScoreReading:
    """A :class:`ScoreReading` from parsed JSON.

    Raises:
        ValueError: anything else than :meth:`ScoreReading.to_json` gives.
    """
    names = {"layout", "logits", "upsample"}
    fit = isinstance(content, Mapping) and set(content) == names
    if not fit or not isinstance(content["upsample"], bool):
        expected = "an object with layout, logits and upsample"
        raise ValueError(message(where, expected, short(content), "run cpseg calibrate anew"))
    return ScoreReading(content["layout"], content["logits"], content["upsample"])
