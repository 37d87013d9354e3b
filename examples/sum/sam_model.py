"""SAM from transformers: loading, prompting row by row, learning rates by depth."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import SamConfig, SamModel


class Prompted(NamedTuple):
    """All prompts so far of R masks, in pixels of the frame.

    Attributes:
        points: (x, y), float ``[R, n, 2]``.
        labels: 1 inside, 0 outside, -1 no point, int64 ``[R, n]``.
        boxes: (x0, y0, x1, y1), float ``[R, 4]``, or None if no mask has one.
        boxed: bool ``[R]``: the box replaces the first point.
    """

    points: Tensor
    labels: Tensor
    boxes: Tensor | None
    boxed: Tensor

    def add(self, points: Tensor, labels: Tensor) -> Prompted:
        """Add a point to each mask."""
        longer = torch.cat([self.points, points[:, None]], 1)
        return self._replace(points=longer, labels=torch.cat([self.labels, labels[:, None]], 1))


def load(name: str, seed: int) -> SamModel:
    """A checkpoint by name or folder; for ``tiny`` a SAM of 128 pixels with random weights."""
    if name != "tiny":
        try:
            return _freeze_waves(SamModel.from_pretrained(name))
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(
                f"--model: expected a SAM model, got {name} ({reason}); "
                "pass a SAM checkpoint, its folder, or tiny"
            ) from error
    size, patch, width = 128, 8, 64
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "output_channels": width,
        "image_size": size,
        "patch_size": patch,
        "window_size": 4,
        "global_attn_indexes": [1],
        "num_pos_feats": width // 2,
        "initializer_range": 0.02,  # the default, 1e-10, is only meant to be overwritten
    }
    prompt = {
        "hidden_size": width,
        "image_size": size,
        "patch_size": patch,
        "image_embedding_size": size // patch,
        "mask_input_channels": 16,
    }
    decoder = {
        "hidden_size": width,
        "num_attention_heads": 4,
        "mlp_dim": 128,
        "iou_head_hidden_dim": 64,
    }
    config = SamConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SamModel(config)
    # The wavelengths of SAM's checkpoints; transformers would draw them 16 times shorter here.
    waves = torch.randn(2, width // 2, generator=torch.Generator().manual_seed(seed))
    for module in (model.shared_image_embedding, model.prompt_encoder.shared_embedding):
        module.positional_embedding.data.copy_(waves)
    return _freeze_waves(model)


def _freeze_waves(model: SamModel) -> SamModel:
    """Do not train the random waves that encode positions, which may be parameters here."""
    for module in (model.shared_image_embedding, model.prompt_encoder.shared_embedding):
        module.positional_embedding.requires_grad_(False)
    return model


def frame_size(model: SamModel) -> int:
    """Side of the model's square input, in pixels."""
    return int(model.config.vision_config.image_size)


def mask_size(model: SamModel) -> int:
    """Side of the masks that the model takes and returns."""
    return 4 * frame_size(model) // int(model.config.vision_config.patch_size)


def encode(model: SamModel, pixels: Tensor) -> Tensor:
    """Image embeddings ``[B, C, h, w]`` of frames ``[B, 3, S, S]``."""
    embedding: Tensor = model.vision_encoder(pixels)[0]
    return embedding


def predict(
    model: SamModel,
    embedding: Tensor,
    prompts: Prompted,
    masks: Tensor | None = None,
    *,
    several: bool = False,
    all_points: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mask logits ``[R, m, L, L]`` and predicted IoU ``[R, m]`` of R prompted masks.

    Args:
        model: SAM.
        embedding: of each mask's image, ``[R, C, h, w]``.
        prompts: all prompts so far.
        masks: logits of an earlier prediction, ``[R, 1, L, L]``.
        several: return m = 3 candidates instead of one mask.
        all_points: pass the first point together with a box, not the box alone.
    """
    boxed = prompts.boxed
    results: list[tuple[Tensor, Tensor, Tensor]] = []
    # Rows with a box have other tokens than rows without: one call for each kind.
    for kind in (True, False):
        rows = (boxed == kind).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        first = 1 if kind and not all_points else 0
        points, labels = prompts.points[rows, None, first:], prompts.labels[rows, None, first:]
        out = model(
            image_embeddings=embedding[rows],
            input_points=points if points.shape[2] > 0 else None,
            input_labels=labels if points.shape[2] > 0 else None,
            input_boxes=prompts.boxes[rows, None] if kind and prompts.boxes is not None else None,
            input_masks=None if masks is None else masks[rows],
            multimask_output=several,
        )
        results.append((rows, out.pred_masks[:, 0], out.iou_scores[:, 0]))
    order = torch.cat([rows for rows, _, _ in results]).argsort()
    logits = torch.cat([logits for _, logits, _ in results])[order]
    return logits, torch.cat([iou for _, _, iou in results])[order]


def enlarge(logits: Tensor, size: int) -> Tensor:
    """Mask logits ``[R, m, L, L]`` at ``[R, m, size, size]``."""
    return interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)


def shrink(logits: Tensor, size: int) -> Tensor:
    """Maps ``[R, S, S]`` averaged to the model's masks, ``[R, 1, size, size]``."""
    return interpolate(
        logits[:, None], size=(size, size), mode="bilinear", align_corners=False, antialias=True
    )


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Candidate ``index[r]`` of each row: ``[R, m, ...]`` to ``[R, 1, ...]``."""
    return values[torch.arange(len(values), device=values.device), index][:, None]


def train_decoder_only(model: SamModel) -> list[nn.Parameter]:
    """Freeze the image encoder; returns the parameters to train."""
    model.requires_grad_(False)
    model.prompt_encoder.requires_grad_(True)
    model.mask_decoder.requires_grad_(True)
    _freeze_waves(model)
    return [p for p in model.parameters() if p.requires_grad]


def layer_groups(
    model: SamModel, lr: float, decay: float, extra: nn.Module | None = None
) -> list[dict[str, object]]:
    """Parameter groups with the learning rate ``lr * decay ** (layers above)``.

    The last layer of the image encoder has ``lr * decay``. The parameters before its first layer
    count as one more layer. Neck, prompt encoder, mask decoder and ``extra`` have ``lr``.
    """
    layers = len(model.vision_encoder.layers)
    groups: dict[int, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(_layers_above(name, layers), []).append(parameter)
    if extra is not None:
        groups.setdefault(0, []).extend(extra.parameters())
    return [{"params": groups[above], "lr": lr * decay**above} for above in sorted(groups)]


def _layers_above(name: str, layers: int) -> int:
    parts = name.split(".")
    if parts[0] != "vision_encoder" or parts[1] == "neck":
        return 0
    return layers - int(parts[2]) if parts[1] == "layers" else layers + 1
