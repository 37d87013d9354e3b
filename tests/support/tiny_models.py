"""Folders as the hub has them: real architectures, a few thousand random weights, a tokenizer."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
START, END = "<|startoftext|>", "<|endoftext|>"
LABELS = ["sky", "road", "car", "bus"]


def folder(kind: str, path: Path, *, labels: Sequence[str] = LABELS, seed: int = 0) -> Path:
    """A model of ``kind`` with all its files; promptable kinds have no ``labels``."""
    torch.manual_seed(seed)
    model, processor = _MAKERS[kind](labels)
    for name, parameter in model.named_parameters():  # fresh models say the same everywhere
        if name.endswith(("weight", "position_embeddings")) and parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    if kind == "segformer":  # else every score is 0 or 1
        with torch.no_grad():
            model.decode_head.classifier.weight *= 0.2
    if kind == "sam3":  # else what is asked for hardly shows
        with torch.no_grad():
            model.text_projection.weight *= 30
            model.mask_decoder.prompt_cross_attn.o_proj.weight *= 30
    model.eval().save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    if kind in ("clipseg", "groupvit", "sam3", "oneformer"):
        _tokenizer(path)
    return path


def _vocabulary() -> list[str]:
    letters = string.ascii_lowercase + string.digits + ",.-"
    return [*letters, *(letter + "</w>" for letter in letters), START, END]


def _tokenizer(path: Path) -> None:
    vocabulary = {token: index for index, token in enumerate(_vocabulary())}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def _text(**more: int) -> dict[str, Any]:
    size = len(_vocabulary())
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    tokens = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    return {**small, **tokens, "num_attention_heads": 2, "vocab_size": size, **more}


def _recorded(size: dict[str, int] | int, **more: Any) -> dict[str, Any]:
    basic = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2}
    return {**basic, "size": size, "image_mean": MEAN, "image_std": STD, **more}


def _clipseg(labels: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    config = CLIPSegConfig(
        text_config=_text(max_position_embeddings=77),
        vision_config={**vision, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        extract_layers=[0, 1, 2],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    return CLIPSegForImageSegmentation(config), _recorded(64)


def _groupvit(labels: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import GroupViTConfig, GroupViTModel

    config = GroupViTConfig(
        text_config=_text(max_position_embeddings=77),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "depths": [1, 1, 1],
            "num_group_tokens": [8, 4, 0],
            "num_output_groups": [8, 4, 0],
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=16,
        projection_intermediate_dim=16,
        logit_scale_init_value=0.7,
    )
    size = {"shortest_edge": 32}
    crop = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    return GroupViTModel(config), _recorded(size, **crop)


def _sam3(labels: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import Sam3Config, Sam3Model

    backbone = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "pretrain_image_size": 28,
        "patch_size": 14,
        "window_size": 2,
        "global_attn_indexes": [1],
    }
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_layers": 1}
    config = Sam3Config(
        vision_config={
            "backbone_config": {"model_type": "sam3_vit_model", **backbone},
            "fpn_hidden_size": 16,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        text_config=_text(max_position_embeddings=32, projection_dim=16),
        geometry_encoder_config=small,
        detr_encoder_config=small,
        detr_decoder_config={**small, "num_queries": 4},
        mask_decoder_config={"hidden_size": 16, "num_attention_heads": 2},
    )
    return Sam3Model(config), _recorded({"height": 56, "width": 56})


def _names(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: index for index, name in enumerate(labels)},
    }


_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 2}
_LARGE = {"shortest_edge": 64, "longest_edge": 107}
_EOMT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "num_queries": 12,
    "num_blocks": 1,
    "num_upscale_blocks": 1,
}
_PADDED = {"shortest_edge": 64, "longest_edge": 64}
_SHORTEST = {"shortest_edge": 64, "longest_edge": None}


def _mask2former(labels: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    config = Mask2FormerConfig(
        backbone_config=SwinConfig(**_SWIN, out_features=_STAGES),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=12,
        **_names(labels),
    )
    return Mask2FormerForUniversalSegmentation(config), _recorded(_LARGE, size_divisor=32)


def _eomt(labels: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import EomtConfig, EomtForUniversalSegmentation

    config = EomtConfig(**_EOMT, **_names(labels))
    return EomtForUniversalSegmentation(config), _recorded(_PADDED, do_pad=True)


def _eomt_dinov3(labels: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

    config = EomtDinov3Config(**_EOMT, intermediate_size=32, **_names(labels))
    return EomtDinov3ForUniversalSegmentation(config), _recorded(_SHORTEST, do_split_image=True)


def _maskformer(labels: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import (
        DetrConfig,
        MaskFormerConfig,
        MaskFormerForInstanceSegmentation,
        MaskFormerSwinConfig,
    )

    decoder = {"d_model": 32, "decoder_layers": 1, "encoder_layers": 1, "num_queries": 12}
    heads = {"decoder_attention_heads": 2, "encoder_attention_heads": 2}
    config = MaskFormerConfig(
        backbone_config=MaskFormerSwinConfig(**_SWIN, out_features=_STAGES),
        decoder_config=DetrConfig(**decoder, **heads, decoder_ffn_dim=16, encoder_ffn_dim=16),
        fpn_feature_size=32,
        mask_feature_size=32,
        **_names(labels),
    )
    return MaskFormerForInstanceSegmentation(config), _recorded(_LARGE, size_divisor=32)


def _oneformer(labels: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import OneFormerConfig, OneFormerForUniversalSegmentation, SwinConfig

    config = OneFormerConfig(
        backbone_config=SwinConfig(**_SWIN, out_features=_STAGES),
        num_queries=12,
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        task_seq_len=32,
        text_encoder_vocab_size=len(_vocabulary()),
        text_encoder_width=32,
        text_encoder_context_length=32,
        text_encoder_num_layers=1,
        text_encoder_proj_layers=1,
        **_names(labels),
    )
    return OneFormerForUniversalSegmentation(config), _recorded(_LARGE)


def _segformer(labels: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        **_names(labels),
    )
    return SegformerForSemanticSegmentation(config), _recorded({"height": 64, "width": 64})


_VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 4}
_VIT |= {"num_attention_heads": 2, "intermediate_size": 16}


def _beit(labels: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import BeitConfig, BeitForSemanticSegmentation

    heads = {"pool_scales": [1, 2], "auxiliary_channels": 8, "out_indices": [1, 2, 3, 4]}
    model = BeitForSemanticSegmentation(BeitConfig(**_VIT, **heads, **_names(labels)))
    return model, _recorded(32)


def _dpt(labels: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import DPTConfig, DPTForSemanticSegmentation

    neck = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "is_hybrid": False}
    config = DPTConfig(**_VIT, **neck, backbone_out_indices=[0, 1, 2, 3], **_names(labels))
    return DPTForSemanticSegmentation(config), _recorded(32)


def _upernet(labels: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import SwinConfig

    return _upernet_on(SwinConfig(**_SWIN, out_features=_STAGES), labels)


def _upernet_dinov3(labels: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import DINOv3ConvNextConfig

    sizes = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}
    return _upernet_on(DINOv3ConvNextConfig(**sizes, out_features=_STAGES), labels)


def _upernet_on(backbone: Any, labels: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    config = UperNetConfig(
        backbone_config=backbone,
        hidden_size=16,
        auxiliary_in_channels=32,
        auxiliary_channels=8,
        pool_scales=[1, 2],
        **_names(labels),
    )
    return UperNetForSemanticSegmentation(config), _recorded({"shortest_edge": 64})


def _mobilevit(labels: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import MobileViTConfig, MobileViTForSemanticSegmentation

    sizes = {"hidden_sizes": [12, 16, 20], "neck_hidden_sizes": [8, 8, 16, 16, 32, 32, 40]}
    config = MobileViTConfig(image_size=64, num_attention_heads=2, **sizes, **_names(labels))
    crop = {"do_center_crop": True, "crop_size": 64, "do_flip_channel_order": True}
    return MobileViTForSemanticSegmentation(config), _recorded({"shortest_edge": 72}, **crop)


OTHERS = ("beit", "dpt", "mobilevit", "upernet", "upernet_dinov3")  # by the same path as SegFormer
_MAKERS = {
    "clipseg": _clipseg,
    "groupvit": _groupvit,
    "sam3": _sam3,
    "mask2former": _mask2former,
    "maskformer": _maskformer,
    "eomt": _eomt,
    "eomt_dinov3": _eomt_dinov3,
    "oneformer": _oneformer,
    "segformer": _segformer,
    "beit": _beit,
    "dpt": _dpt,
    "mobilevit": _mobilevit,
    "upernet": _upernet,
    "upernet_dinov3": _upernet_dinov3,
}
KINDS = tuple(kind for kind in _MAKERS if kind not in OTHERS)
