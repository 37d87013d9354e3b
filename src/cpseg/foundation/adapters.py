"""Segmentation models of ``transformers``, each as a function from images to class scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cpseg._internal.checks import message
from cpseg.foundation.hub import WHERE, Files, fingerprint, require
from cpseg.foundation.preprocessing import Preparation, preparation, resized

PROMPTED = ("clipseg", "groupvit", "sam3", "sam3_video")
QUERIES = ("mask2former", "maskformer", "oneformer")
_AT_ONCE = 32  # maps of prompts that are decoded together

Groups = Sequence[Sequence[str]]


class ScoreFunction(Protocol):
    """Images in [0, 1] ``[B, 3, H, W]`` to scores in [0, 1], float32 ``[B, K, *size]``."""

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """The scores at ``size``."""


class Loaded(NamedTuple):
    """A model ready to score.

    Attributes:
        scores: the model.
        labels: its classes, where it has a vocabulary of its own.
        fingerprint: of everything in the model that scores depend on.
        apart: whether every class has a sigmoid of its own, so that scores must not be added.
    """

    scores: ScoreFunction
    labels: tuple[str, ...] | None
    fingerprint: str
    apart: bool = False


@dataclass(frozen=True)
class Frame:
    """What every adapter needs: the model, its input, and how precisely it computes."""

    model: Any
    prepare: Preparation
    amp: torch.dtype | None

    def amped(self, images: Tensor) -> torch.autocast:
        """Mixed precision, for the model's own computations alone."""
        kind = images.device.type
        return torch.autocast(kind, dtype=self.amp or torch.bfloat16, enabled=self.amp is not None)


def _features(found: Any) -> Tensor:
    """Pooled features, which older versions of transformers return bare."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _text(model: Any, tokens: Any, prompts: Groups, device: Any, *, fill: bool = False) -> Any:
    """Features of all prompts, computed once, and the mask of their tokens."""
    most = model.config.text_config.max_position_embeddings
    ids = tokens(list(itertools.chain(*prompts)), most, fill=fill)
    parts = []
    for first in range(0, len(ids.input_ids), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        asked = {"input_ids": ids.input_ids[some], "attention_mask": ids.attention_mask[some]}
        asked = {name: tensor.to(device) for name, tensor in asked.items()}
        with torch.no_grad():
            parts.append(_features(model.get_text_features(**asked)))
    return torch.cat(parts), ids.attention_mask.to(device)


def _runs(counts: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers of prompts of consecutive classes, together at most ``most`` where one fits."""
    run: list[int] = []
    for count in counts:
        if run and sum(run) + count > most:
            yield run
            run = []
        run.append(count)
    yield run


def _averaged(maps: Tensor, counts: list[int]) -> Tensor:
    """Maps of prompts ``[B, P, h, w]`` to the mean of each class, ``[B, K, h, w]``."""
    parts = torch.split(maps, counts, dim=1)
    return torch.stack([part.mean(1) for part in parts], dim=1)


class ClipSeg:
    """CLIPSeg: a sigmoid for every prompt; image features shared by the prompts.

    Reference:
        Lüddecke & Ecker (CVPR 2022), Image Segmentation Using Text and Image Prompts.
    """

    def __init__(self, frame: Frame, tokens: Any, prompts: Groups, device: Any) -> None:
        self.frame, self.counts = frame, [len(texts) for texts in prompts]
        self.text, _ = _text(frame.model.clip, tokens, prompts, device)

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Class scores at ``size``."""
        model, batch = self.frame.model, len(images)
        pixels, first, classes = self.frame.prepare(images), 0, []
        with self.frame.amped(images):
            seen = model.clip.vision_model(pixel_values=pixels, output_hidden_states=True)
            layers = [seen.hidden_states[layer + 1] for layer in model.extract_layers]
        for run in _runs(self.counts, max(1, _AT_ONCE // batch)):
            text = self.text[first : first + sum(run)]
            first += len(text)
            # One image after the other within a prompt, as the decoder's batch.
            many = [layer.repeat(len(text), 1, 1) for layer in layers]
            with self.frame.amped(images):
                logits = model.decoder(many, text.repeat_interleave(batch, 0)).logits
            maps = logits.reshape(len(text), batch, *logits.shape[-2:]).transpose(0, 1)
            classes.append(_averaged(maps.float().sigmoid(), run))
        return resized(torch.cat(classes, dim=1), size)


class Sam3:
    """SAM 3: a sigmoid of the semantic map, one prompt a forward; image features shared.

    Reference:
        Carion et al. (2025), SAM 3: Segment Anything with Concepts.
    """

    def __init__(self, frame: Frame, tokens: Any, prompts: Groups, device: Any) -> None:
        self.frame, self.counts = frame, [len(texts) for texts in prompts]
        self.text, self.mask = _text(frame.model, tokens, prompts, device, fill=True)

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Class scores at ``size``."""
        model, number, classes = self.frame.model, itertools.count(), []
        pixels = self.frame.prepare(images)
        with self.frame.amped(images):
            seen = model.get_vision_features(pixel_values=pixels)
        for count in self.counts:
            maps = [self._ask(seen, next(number), images) for _ in range(count)]
            classes.append(torch.cat(maps, dim=1).mean(1, keepdim=True))
        return resized(torch.cat(classes, dim=1), size)

    def _ask(self, seen: Any, prompt: int, images: Tensor) -> Tensor:
        asked: Any = self.text[prompt].expand(len(images), -1, -1)
        asked.pooler_output = asked.detach()  # some versions want this, some the tensor itself
        mask = self.mask[prompt].expand(len(images), -1)
        with self.frame.amped(images):
            found = self.frame.model(vision_embeds=seen, text_embeds=asked, attention_mask=mask)
        logits: Tensor = found.semantic_seg
        return logits.float().sigmoid()


class GroupVit:
    """GroupViT: one softmax over the classes, a class's logit being the mean of its prompts'.

    Reference:
        Xu et al. (CVPR 2022), GroupViT: Semantic Segmentation Emerges from Text Supervision.
    """

    def __init__(self, frame: Frame, tokens: Any, prompts: Groups, device: Any) -> None:
        self.frame = frame
        text, _ = _text(frame.model, tokens, prompts, device)
        text = text / text.norm(dim=-1, keepdim=True)
        # The logits are linear in these: their mean gives the mean of the logits.
        counts = [len(texts) for texts in prompts]
        self.text = torch.stack([part.mean(0) for part in torch.split(text, counts)])

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Class scores at ``size``."""
        from transformers.models.groupvit.modeling_groupvit import get_grouping_from_attentions

        model, pixels = self.frame.model, self.frame.prepare(images)
        with self.frame.amped(images):
            seen = model.vision_model(pixel_values=pixels, output_attentions=True)
            groups = seen.last_hidden_state
            embedded = model.visual_projection(groups.flatten(0, 1)).float()
        embedded = embedded / embedded.norm(dim=-1, keepdim=True)
        scale = model.logit_scale.exp()
        logits = (embedded @ self.text.T * scale).unflatten(0, groups.shape[:2])
        attentions = [attention.float() for attention in seen.attentions]
        share = get_grouping_from_attentions(attentions, pixels.shape[2:])
        maps = torch.einsum("bgk,bghw->bkhw", logits, share) * scale
        return resized(maps, size).softmax(1)


class Queries:
    """Mask2Former, MaskFormer, OneFormer: queries that each have a class and a mask.

    The class map ``r_c = sum_q softmax(class)_qc * sigmoid(mask)_q`` is not bounded by 1: several
    queries may claim a pixel. It is divided by ``max(1, sum_c r_c)``: what was a share of less
    than 1 stays as it is, the order of classes at a pixel never changes (a clamp would tie those
    above 1), scores sum to at most 1, so that a class map may add them, and what is left of 1
    is the pixel's share that no query claims.

    Reference:
        Cheng et al. (NeurIPS 2021), MaskFormer, section 3.4.
    """

    def __init__(self, frame: Frame, more: dict[str, Tensor]) -> None:
        self.frame, self.more = frame, more

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Class scores at ``size``."""
        more = {name: one.expand(len(images), -1) for name, one in self.more.items()}
        pixels = self.frame.prepare(images)
        with self.frame.amped(images):
            found = self.frame.model(pixel_values=pixels, **more)
        classes = found.class_queries_logits.float().softmax(-1)[..., :-1]
        masks = found.masks_queries_logits.float().sigmoid()
        return bounded(resized(torch.einsum("bqc,bqhw->bchw", classes, masks), size))


def bounded(claims: Tensor) -> Tensor:
    """Sums over queries ``[B, K, H, W]``, not negative, brought into [0, 1]; see :class:`Queries`.

    Example:
        >>> bounded(torch.tensor([[0.2, 3.0], [0.3, 1.0]]).reshape(1, 2, 1, 2)).flatten()
        tensor([0.2000, 0.7500, 0.3000, 0.2500])
    """
    return claims / claims.sum(1, keepdim=True).clamp(min=1)


class Logits:
    """SegFormer, UPerNet, DPT, BEiT and others: the softmax of logits at the image's size.

    A model of one class, which SegFormer may be, was trained with a sigmoid.
    """

    def __init__(self, frame: Frame) -> None:
        self.frame = frame

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Class scores at ``size``."""
        pixels = self.frame.prepare(images)
        with self.frame.amped(images):
            logits = self.frame.model(pixel_values=pixels).logits
        logits = resized(logits.float(), size)
        return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def load_model(
    name: str,
    prompts: Groups | None,
    *,
    device: torch.device | str,
    amp: torch.dtype | None,
    revision: str | None,
    local_files_only: bool,
) -> Loaded:
    """Load a model from the hub or a folder, by the ``model_type`` that its config names.

    Args:
        name: on the hub, or a folder.
        prompts: for every class the texts that ask for it; needed by models without a vocabulary.
        device: where the model computes.
        amp: dtype of mixed precision, or None.
        revision: branch, tag or commit on the hub.
        local_files_only: do not ask the hub.

    Raises:
        ValueError: no such model, a kind that is not known here, files that lack weights, no
            prompts, or too long ones.
        ImportError: transformers is missing or too old for the model.
    """
    require()
    found = Files(name, revision, local_files_only)
    kind = found.kind
    if kind in PROMPTED and not prompts:
        fix = "list them: one 'name' or 'name: prompt, prompt' a line"
        raise ValueError(message(WHERE, f"classes for {kind}", "none", fix))
    model = found.model().float().eval().requires_grad_(False)
    prepare = preparation(found.processor(), where=name)
    made = f"{fingerprint(model)} {prepare}"
    frame = Frame(model.to(device), prepare, amp)
    if kind in PROMPTED:
        assert prompts is not None
        makers: dict[str, Callable[..., ScoreFunction]] = {"clipseg": ClipSeg, "groupvit": GroupVit}
        scores = makers.get(kind, Sam3)(frame, found.tokens, prompts, device)
        return Loaded(scores, None, f"{made} {found.asked}", apart=kind != "groupvit")
    labels = tuple(str(model.config.id2label[i]) for i in range(model.config.num_labels))
    if kind in QUERIES:
        task = {}
        if kind == "oneformer":
            ids = found.tokens(["the task is semantic"], model.config.task_seq_len, fill=True)
            task["task_inputs"] = (ids.input_ids * ids.attention_mask).to(device)
        return Loaded(Queries(frame, task), labels, f"{made} {found.asked}")
    if len(labels) == 1 and kind != "segformer":
        fix = "write its score maps yourself; see docs/foundation.md"
        raise ValueError(message(name, f"a {kind} of 2 classes or more", "1 class", fix))
    return Loaded(Logits(frame), labels, made)
