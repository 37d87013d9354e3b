"""Class probabilities from foundation models: classes, background, whole images or tiles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cpseg._internal.checks import check_not_empty, check_unit_interval, message, shape
from cpseg.core.class_map import ClassMap
from cpseg.foundation.adapters import ScoreFunction, load_model
from cpseg.foundation.classes import Classes, as_classes, mapped
from cpseg.foundation.hub import WHERE
from cpseg.foundation.preprocessing import tiled

BACKGROUNDS = ("prompt", "complement", None)
AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Segmenter(Protocol):
    """Any callable from images to class probabilities, for instance a function."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """RGB in [0, 1], float ``[B, 3, H, W]``, to probabilities, float32 ``[B, K, H, W]``."""


@dataclass(frozen=True)
class Foundation:
    """A foundation model for the classes of a data set; :func:`load` makes one.

    Attributes:
        scores: the model: from images and a size to probabilities of its classes.
        names: the classes of the result's channels.
        background_rule: ``"prompt"``, ``"complement"`` or None.
        class_map: from the model's classes to those of the data set, or None.
        tile: side in pixels of the tiles into which larger images are cut, or None.
        overlap: number of pixels that neighbouring tiles share.
        fingerprint: of everything on which the probabilities depend.
    """

    scores: ScoreFunction
    names: tuple[str, ...]
    background_rule: str | None
    class_map: ClassMap | None = None
    tile: int | None = None
    overlap: int = 0
    fingerprint: str = ""

    @property
    def num_classes(self) -> int:
        """Number of channels of the result."""
        return len(self.names)

    @property
    def background(self) -> int | None:
        """The background's channel, for :func:`cpseg.evidence` and :class:`cpseg.Calibrator`."""
        return None if self.background_rule is None else 0

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Class probabilities at the size of the images.

        Args:
            images: RGB in [0, 1], float ``[B, 3, H, W]``, on the model's device.

        Returns:
            float32 ``[B, K, H, W]`` in [0, 1], without gradient.

        Raises:
            ValueError: the shape is another, or values are NaN or outside [0, 1].
            TypeError: not floating point.
        """
        where, fix = "Foundation", "divide 8-bit RGB by 255 and put channels first"
        if not images.is_floating_point():
            got = str(images.dtype)
            raise TypeError(message(where, "floating-point images in [0, 1]", got, fix))
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(message(where, "images [B, 3, H, W]", shape(images), fix))
        check_not_empty(where, images, name="images")
        check_unit_interval(where, images, name="images", fix=fix)
        probs = tiled(self._whole, images, tile=self.tile, overlap=self.overlap)
        if self.background_rule != "complement":
            return probs
        return torch.cat((1 - probs.amax(1, keepdim=True), probs), dim=1)

    def _whole(self, images: Tensor) -> Tensor:
        probs = self.scores(images, (images.shape[-2], images.shape[-1]))
        if self.class_map is not None:
            probs = self.class_map(probs)
        return probs.clamp(0, 1)  # only rounding errors of the interpolation lie outside


def load(
    model: str | Path,
    classes: Classes | Sequence[str] | str | Path | None = None,
    *,
    background: str | None,
    class_map: ClassMap | Mapping[str, Any] | str | Path | None = None,
    device: torch.device | str = "cpu",
    amp: torch.dtype | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Foundation:
    """A foundation model of ``transformers`` as a function from images to class probabilities.

    CLIPSeg, SAM 3 and GroupViT are asked for ``classes`` by prompts. Mask2Former, MaskFormer,
    OneFormer, SegFormer and other semantic models have a fixed vocabulary, which ``class_map``
    maps to the classes of the data set. If a class has several prompts, their probabilities are
    averaged (GroupViT: their logits). Texts are encoded once, in this function. Images are
    prepared as the model's image processor records, but never cropped. Outside the model all
    computations use float32.

    Args:
        model: name on the hub, or a folder with the model's files.
        classes: the classes of the data set, as lines ``name`` or ``name: prompt, prompt``, or a
            file of such lines. Models with a vocabulary do not need them; if given, they are the
            names of the classes that ``class_map`` maps to.
        background: ``"prompt"``: class 0 is the background and has its own prompts;
            ``"complement"``: a class 0 is added with probability 1 - max of the others; None:
            no class is a background.
        class_map: from the model's classes (its vocabulary, or the prompted ``classes``) to those
            of the data set: a map, its JSON or a file with the JSON. It may use names of classes.
        device: device of the model; images must be on the same device.
        amp: ``torch.bfloat16`` or ``torch.float16`` for mixed precision.
        tile: images with a longer side are cut into tiles of this side, and results are averaged
            where tiles overlap.
        overlap: minimal number of pixels that tiles share; a quarter of ``tile`` by default.
        revision: branch, tag or commit on the hub.
        local_files_only: do not contact the hub.

    Returns:
        A :class:`Foundation`.

    Raises:
        ValueError: settings, classes, map or model are invalid; the message says which.
        ImportError: transformers is missing: ``pip install cpseg[hf]``.

    Example:
        >>> sam3 = load("facebook/sam3", ["road", "car: car, van"],
        ...             background="complement")                            # doctest: +SKIP
        >>> sam3(images).shape, sam3.names                                  # doctest: +SKIP
        (torch.Size([2, 3, 480, 640]), ('background', 'road', 'car'))
    """
    overlap = _check_settings(background, amp, tile, overlap)
    asked = as_classes(classes)
    loaded = load_model(
        str(model),
        None if asked is None else asked.prompts,
        device=device,
        amp=amp,
        revision=revision,
        local_files_only=local_files_only,
    )
    given = None if asked is None else asked.names
    if loaded.labels is None:
        assert given is not None
        chosen, names = mapped(class_map, given, None)
        if loaded.independent and chosen is not None and chosen.adds:
            fix = "set 'reduce' to 'max': every prompt has its own sigmoid"
            raise ValueError(message("class map", "'reduce' 'max' for prompts", "'sum'", fix))
    else:
        chosen, names = mapped(class_map, loaded.labels, given)
    if background == "prompt" and len(names) < 2:
        fix = "list the other classes too"
        raise ValueError(message(WHERE, "a class besides the background", "1 class", fix))
    if background == "complement":
        if "background" in names:
            expected, got = "classes without 'background' for its complement", "one of that name"
            raise ValueError(
                message(WHERE, expected, got, "pass background='prompt', or remove it")
            )
        names = ("background", *names)
    facts = [
        loaded.fingerprint,
        None if asked is None or loaded.labels is not None else asked.prompts,
        names,
        background,
        None if chosen is None else chosen.to_json(),
        [tile, overlap] if tile else None,
        str(amp),
    ]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return Foundation(loaded.scores, names, background, chosen, tile, overlap, fingerprint)


def _check_settings(
    background: str | None, amp: torch.dtype | None, tile: int | None, overlap: int | None
) -> int:
    """The overlap, by default a quarter of a tile."""
    if background not in BACKGROUNDS:
        expected = "background 'prompt', 'complement' or None"
        fix = (
            "prompt: class 0 is the background; complement: class 0 is added as 1 - max; None: "
            "there is no background"
        )
        raise ValueError(message(WHERE, expected, repr(background), fix))
    if amp not in (None, *AMP.values()):
        fix = "pass torch.bfloat16, or None for float32"
        raise ValueError(message(WHERE, "amp as torch.bfloat16 or torch.float16", repr(amp), fix))
    if tile is None:
        if overlap:
            raise ValueError(message(WHERE, "a tile for the overlap", "none", "pass tile too"))
        return 0
    overlap = tile // 4 if overlap is None else overlap
    if not (tile > 0 and 0 <= overlap < tile):
        got, fix = f"tile {tile} and overlap {overlap}", "pass 1024 and 256, for instance"
        raise ValueError(message(WHERE, "a tile above an overlap of at least 0", got, fix))
    return overlap
