"""The student: SegFormer of transformers, or a small U-Net for training on a laptop."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


class Segformer(nn.Module):
    """SegFormer of transformers, with logits at the size of the image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``[B, K, H, W]`` of normalised images ``[B, 3, H, W]``."""
        logits: Tensor = self.model(pixel_values=pixels).logits
        return _enlarge(logits, pixels)


class UNet(nn.Module):
    """Four levels from half the size down to a sixteenth; 0.44 million parameters at width 16."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        w = width
        self.down = nn.ModuleList(
            [
                _conv(3, w, stride=2),
                nn.Sequential(_conv(w, 2 * w, stride=2), _conv(2 * w, 2 * w)),
                nn.Sequential(_conv(2 * w, 4 * w, stride=2), _conv(4 * w, 4 * w)),
                nn.Sequential(_conv(4 * w, 8 * w, stride=2), _conv(8 * w, 8 * w)),
            ]
        )
        self.up = nn.ModuleList([_conv(12 * w, 4 * w), _conv(6 * w, 2 * w), _conv(3 * w, w)])
        self.head = nn.Conv2d(w, num_classes, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``[B, K, H, W]`` of normalised images ``[B, 3, H, W]``."""
        x, levels = pixels, []
        for down in self.down:
            x = down(x)
            levels.append(x)
        levels.pop()
        for up in self.up:
            skip = levels.pop()
            x = up(torch.cat([_enlarge(x, skip), skip], dim=1))
        return _enlarge(self.head(x), pixels)


def build(name: str, num_classes: int, *, seed: int = 0) -> nn.Module:
    """A student with random weights (``"tiny"``, ``"unet"``) or pretrained ones.

    Args:
        name: ``"tiny"``, a SegFormer of 0.3 million parameters without dropout; ``"unet"``, or
            ``"unet-32"`` for twice its width; or a hub name or folder of transformers, such as
            ``"nvidia/mit-b5"``, which gets a new head.
        num_classes: number of classes.
        seed: seed of the random weights.
    """
    torch.manual_seed(seed)
    if re.fullmatch(r"unet(-\d+)?", name):
        return UNet(num_classes, int(name[5:] or 16))
    try:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation
    except ImportError as error:
        raise ImportError(
            "--model: expected transformers, got none; "
            'pip install "cpseg[examples]", or --model unet'
        ) from error
    if name != "tiny":
        model = SegformerForSemanticSegmentation.from_pretrained(
            name, num_labels=num_classes, ignore_mismatched_sizes=True
        )
        return Segformer(model)
    config = SegformerConfig(
        num_labels=num_classes,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 48, 64],
        num_attention_heads=[1, 2, 4, 8],
        decoder_hidden_size=64,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )
    model = SegformerForSemanticSegmentation(config)
    # Like the U-Net, it is trained from random weights in batches of four. Batch statistics of so
    # few images are inaccurate, and they differ between ranks.
    model.decode_head.batch_norm = nn.GroupNorm(8, 64)
    return Segformer(model)


def _conv(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.GroupNorm(8, outputs),
        nn.ReLU(inplace=True),
    )


def _enlarge(maps: Tensor, like: Tensor) -> Tensor:
    return interpolate(maps, size=like.shape[-2:], mode="bilinear", align_corners=False)
