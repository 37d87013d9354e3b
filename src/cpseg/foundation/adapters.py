"""Segmentation models of ``transformers``, each as a function from images to probabilities."""

from __future__ import annotations

import itertools
import math
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
SQUARES = ("eomt", "eomt_dinov3")  # queries too, but for square inputs alone
_AT_ONCE = 32  # prompts that are encoded or decoded together

Groups = Sequence[Sequence[str]]


class ScoreFunction(Protocol):
    """From images in [0, 1] ``[B, 3, H, W]`` to class probabilities, float32 ``[B, K, *size]``."""

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """The class probabilities at ``size``."""


class Loaded(NamedTuple):
    """A loaded model.

    Attributes:
        scores: the model as a function.
        labels: its classes, if it has a fixed vocabulary.
        fingerprint: of everything in the model on which the probabilities depend.
        independent: every class has its own sigmoid, so that probabilities must not be added.
    """

    scores: ScoreFunction
    labels: tuple[str, ...] | None
    fingerprint: str
    independent: bool = False


@dataclass(frozen=True)
class Frame:
    """The parts that every adapter needs: model, image preparation and precision."""

    model: Any
    prepare: Preparation
    amp: torch.dtype | None

    def amped(self, images: Tensor) -> torch.autocast:
        """Mixed precision, used only inside the model."""
        kind = images.device.type
        return torch.autocast(kind, dtype=self.amp or torch.bfloat16, enabled=self.amp is not None)


def _features(output: Any) -> Tensor:
    """Pooled features, which older versions of transformers return as a plain tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _text(model: Any, tokens: Any, prompts: Groups, device: Any, *, fill: bool = False) -> Any:
    """Features of all prompts, and the attention mask of their tokens."""
    most = model.config.text_config.max_position_embeddings
    ids = tokens(list(itertools.chain(*prompts)), most, fill=fill)
    features = []
    for first in range(0, len(ids.input_ids), _AT_ONCE):
        rows = slice(first, first + _AT_ONCE)
        batch = {"input_ids": ids.input_ids[rows], "attention_mask": ids.attention_mask[rows]}
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.no_grad():
            features.append(_features(model.get_text_features(**batch)))
    return torch.cat(features), ids.attention_mask.to(device)


def _runs(counts: Sequence[int], most: int) -> Iterator[list[int]]:
    """Split prompt counts of classes into runs with a sum of at most ``most``, if possible.

    A single class with more prompts is a run of its own.
    """
    run: list[int] = []
    for count in counts:
        if run and sum(run) + count > most:
            yield run
            run = []
        run.append(count)
    yield run


def _averaged(maps: Tensor, counts: list[int]) -> Tensor:
    """From maps per prompt ``[B, P, h, w]`` to their mean per class, ``[B, K, h, w]``."""
    per_class = torch.split(maps, counts, dim=1)
    return torch.stack([prompts.mean(1) for prompts in per_class], dim=1)


class ClipSeg:
    """CLIPSeg: one sigmoid per prompt; the prompts share the image features.

    Reference:
        Lüddecke & Ecker (CVPR 2022), Image Segmentation Using Text and Image Prompts.
    """

    def __init__(self, frame: Frame, tokens: Any, prompts: Groups, device: Any) -> None:
        self.frame, self.counts = frame, [len(texts) for texts in prompts]
        self.text, _ = _text(frame.model.clip, tokens, prompts, device)

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Class probabilities at ``size``."""
        model, batch = self.frame.model, len(images)
        pixels, first, classes = self.frame.prepare(images), 0, []
        with self.frame.amped(images):
            vision = model.clip.vision_model(pixel_values=pixels, output_hidden_states=True)
            layers = [vision.hidden_states[layer + 1] for layer in model.extract_layers]
        for run in _runs(self.counts, max(1, _AT_ONCE // batch)):
            text = self.text[first : first + sum(run)]
            first += len(text)
            # The decoder's batch: all images with the first prompt, then with the second, ...
            repeated = [layer.repeat(len(text), 1, 1) for layer in layers]
            with self.frame.amped(images):
                logits = model.decoder(repeated, text.repeat_interleave(batch, 0)).logits
            maps = logits.reshape(len(text), batch, *logits.shape[-2:]).transpose(0, 1)
            classes.append(_averaged(maps.float().sigmoid(), run))
        return resized(torch.cat(classes, dim=1), size)


class Sam3:
    """SAM 3: the sigmoid of the semantic map, one forward pass per prompt; image features shared.

    Reference:
        Carion et al. (2025), SAM 3: Segment Anything with Concepts.
    """

    def __init__(self, frame: Frame, tokens: Any, prompts: Groups, device: Any) -> None:
        self.frame, self.counts = frame, [len(texts) for texts in prompts]
        self.text, self.mask = _text(frame.model, tokens, prompts, device, fill=True)

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Class probabilities at ``size``."""
        model, number, classes = self.frame.model, itertools.count(), []
        pixels = self.frame.prepare(images)
        with self.frame.amped(images):
            vision = model.get_vision_features(pixel_values=pixels)
        for count in self.counts:
            maps = [self._ask(vision, next(number), images) for _ in range(count)]
            classes.append(torch.cat(maps, dim=1).mean(1, keepdim=True))
        return resized(torch.cat(classes, dim=1), size)

    def _ask(self, vision: Any, prompt: int, images: Tensor) -> Tensor:
        text: Any = self.text[prompt].expand(len(images), -1, -1)
        text.pooler_output = text.detach()  # some versions read this, some the tensor itself
        mask = self.mask[prompt].expand(len(images), -1)
        with self.frame.amped(images):
            output = self.frame.model(vision_embeds=vision, text_embeds=text, attention_mask=mask)
        logits: Tensor = output.semantic_seg
        return logits.float().sigmoid()


class GroupVit:
    """GroupViT: softmax over the classes; the logit of a class is the mean over its prompts.

    Reference:
        Xu et al. (CVPR 2022), GroupViT: Semantic Segmentation Emerges from Text Supervision.
    """

    def __init__(self, frame: Frame, tokens: Any, prompts: Groups, device: Any) -> None:
        self.frame = frame
        text, _ = _text(frame.model, tokens, prompts, device)
        text = text / text.norm(dim=-1, keepdim=True)
        # Logits are linear in these features, so the mean feature gives the mean logit.
        counts = [len(texts) for texts in prompts]
        self.text = torch.stack([part.mean(0) for part in torch.split(text, counts)])

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Class probabilities at ``size``."""
        from transformers.models.groupvit.modeling_groupvit import get_grouping_from_attentions

        model, pixels = self.frame.model, self.frame.prepare(images)
        with self.frame.amped(images):
            vision = model.vision_model(pixel_values=pixels, output_attentions=True)
            groups = vision.last_hidden_state
            embedded = model.visual_projection(groups.flatten(0, 1)).float()
        embedded = embedded / embedded.norm(dim=-1, keepdim=True)
        scale = model.logit_scale.exp()
        logits = (embedded @ self.text.T * scale).unflatten(0, groups.shape[:2])
        attentions = [attention.float() for attention in vision.attentions]
        share = get_grouping_from_attentions(attentions, pixels.shape[2:])
        maps = torch.einsum("bgk,bghw->bkhw", logits, share) * scale
        return resized(maps, size).softmax(1)


class Queries:
    """Mask2Former, MaskFormer, OneFormer: queries with a class and a mask each.

    The map of a class, ``r_c = sum_q softmax(class)_qc * sigmoid(mask)_q``, may exceed 1, because
    several queries may claim a pixel. It is therefore divided by ``max(1, sum_c r_c)``. Pixels
    with a sum of at most 1 keep their values, and the order of the classes at a pixel never
    changes (a clamp would make all values above 1 equal). The results sum to at most 1, so that
    a class map may add them; the rest is the share of the pixel that no query claims.

    Reference:
        Cheng et al. (NeurIPS 2021), MaskFormer, section 3.4.
    """

    def __init__(self, frame: Frame, more: dict[str, Tensor]) -> None:
        self.frame, self.more = frame, more

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Class probabilities at ``size``."""
        more = {name: tensor.expand(len(images), -1) for name, tensor in self.more.items()}
        pixels = self.frame.prepare(images)
        with self.frame.amped(images):
            output = self.frame.model(pixel_values=pixels, **more)
        classes = output.class_queries_logits.float().softmax(-1)[..., :-1]
        masks = output.masks_queries_logits.float().sigmoid()
        return bounded(resized(torch.einsum("bqc,bqhw->bchw", classes, masks), size))


def bounded(claims: Tensor) -> Tensor:
    """Scale non-negative sums over queries ``[B, K, H, W]`` to [0, 1]; see :class:`Queries`.

    Example:
        >>> bounded(torch.tensor([[0.2, 3.0], [0.3, 1.0]]).reshape(1, 2, 1, 2)).flatten()
        tensor([0.2000, 0.7500, 0.3000, 0.2500])
    """
    return claims / claims.sum(1, keepdim=True).clamp(min=1)


class Eomt:
    """EoMT, on DINOv2 or DINOv3: queries as in :class:`Queries`, of square inputs.

    As its image processor recorded it, an image is cut into squares along its longer side, whose
    scores are averaged where they overlap, or padded with black. Scores are those of transformers'
    ``post_process_semantic_segmentation``, scaled to sums of at most 1.

    Args:
        frame: the model.
        side: of its input, in pixels.
        splits: whether images are cut, not padded.

    Reference:
        Kerssies et al. (CVPR 2025), Your ViT is Secretly an Image Segmentation Model.
    """

    def __init__(self, frame: Frame, side: int, splits: bool) -> None:
        self.frame, self.side, self.splits = frame, side, splits

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Class probabilities at ``size``."""
        pixels = self.frame.prepare(images)
        claims = self._split(pixels) if self.splits else self._padded(pixels)
        return bounded(resized(claims, size))

    def _padded(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        black = self.frame.prepare.black(pixels)
        square = black.expand(len(pixels), -1, self.side, self.side).clone()
        square[..., :height, :width] = pixels
        return self._claims(square)[..., :height, :width]

    def _split(self, pixels: Tensor) -> Tensor:
        axis = -2 if pixels.shape[-2] > pixels.shape[-1] else -1
        length = pixels.shape[axis]
        count = math.ceil(length / self.side)
        step = (length - self.side) / (count - 1) if count > 1 else 0.0
        total: Tensor | None = None
        covered = torch.zeros(length, device=pixels.device)
        for number in range(count):
            first = int(number * step)
            part = self._claims(pixels.narrow(axis, first, self.side))
            if total is None:
                total = part.new_zeros(*part.shape[:2], *pixels.shape[-2:])
            total.narrow(axis, first, self.side).add_(part)
            covered[first : first + self.side] += 1
        assert total is not None
        return total / (covered[:, None] if axis == -2 else covered)

    def _claims(self, squares: Tensor) -> Tensor:
        """Sums over queries ``[B, K, side, side]``."""
        with self.frame.amped(squares):
            output = self.frame.model(pixel_values=squares)
        classes = output.class_queries_logits.float().softmax(-1)[..., :-1]
        logits = output.masks_queries_logits.float()
        masks = resized(logits, (self.side, self.side)).sigmoid()
        return torch.einsum("bqc,bqhw->bchw", classes, masks)


class Logits:
    """SegFormer, UPerNet, DPT, BEiT and others: softmax of the logits at the size of the image.

    For a model with one class, which only SegFormer may have, it is the sigmoid of its training.
    """

    def __init__(self, frame: Frame) -> None:
        self.frame = frame

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Class probabilities at ``size``."""
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
    """Load a model from the hub or a folder, according to ``model_type`` in its config.

    Args:
        name: on the hub, or a folder.
        prompts: the texts of every class; required by models without a vocabulary.
        device: where the model computes.
        amp: dtype of mixed precision, or None.
        revision: branch, tag or commit on the hub.
        local_files_only: do not contact the hub.

    Raises:
        ValueError: there is no such model, its type is not supported, weights are missing, or
            prompts are missing or too long.
        ImportError: transformers is missing or too old for the model.
    """
    require()
    files = Files(name, revision, local_files_only)
    kind = files.kind
    if kind in PROMPTED and not prompts:
        fix = "list one 'name' or 'name: prompt, prompt' per line"
        raise ValueError(message(WHERE, f"classes for {kind}", "none", fix))
    model = files.model().float().eval().requires_grad_(False)
    prepare = preparation(files.processor(), where=name)
    digest = f"{fingerprint(model)} {prepare}"
    frame = Frame(model.to(device), prepare, amp)
    if kind in PROMPTED:
        assert prompts is not None
        adapters: dict[str, Callable[..., ScoreFunction]] = {
            "clipseg": ClipSeg,
            "groupvit": GroupVit,
            "sam3": Sam3,
            "sam3_video": Sam3,
        }
        scores = adapters[kind](frame, files.tokens, prompts, device)
        independent = kind != "groupvit"
        return Loaded(scores, None, f"{digest} {files.asked}", independent)
    labels = tuple(str(model.config.id2label[i]) for i in range(model.config.num_labels))
    if kind in QUERIES:
        task = {}
        if kind == "oneformer":
            ids = files.tokens(["the task is semantic"], model.config.task_seq_len, fill=True)
            task["task_inputs"] = (ids.input_ids * ids.attention_mask).to(device)
        return Loaded(Queries(frame, task), labels, f"{digest} {files.asked}")
    if kind in SQUARES:
        recorded = files.processor()
        splits = bool(recorded.get("do_split_image", False))
        side = _side(name, model.config.image_size, recorded)
        return Loaded(Eomt(frame, side, splits), labels, f"{digest} splits {splits}")
    if len(labels) == 1 and kind != "segformer":
        fix = "write its probability maps yourself; see docs/foundation.md"
        raise ValueError(message(name, f"a {kind} of 2 classes or more", "1 class", fix))
    return Loaded(Logits(frame), labels, digest)


def _side(name: str, image_size: Any, recorded: dict[str, Any]) -> int:
    """The side of a model's square input, which its image processor must make."""
    sides = image_size if isinstance(image_size, (list, tuple)) else [image_size]
    size = recorded.get("size")
    made = size.get("shortest_edge") if isinstance(size, dict) else size
    if len(set(sides)) != 1 or made != sides[0]:
        fix = "correct 'size' in the model's preprocessor_config.json"
        raise ValueError(message(name, f"images of {sides[0]} pixels a side", f"{size}", fix))
    return int(sides[0])
