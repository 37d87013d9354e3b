"""The files of a ``transformers`` model: configuration, weights, processor and tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cpseg._internal.checks import message

WHERE = "foundation.load"
_SAMPLE = 4096  # the fingerprint reads at least this many values of a larger weight tensor
# Entries of a configuration that describe its file and not the model.
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def require() -> None:
    """Raise an ImportError that says what to install if transformers is missing."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError("foundation models need transformers: pip install cpseg[hf]") from error


def fingerprint(model: torch.nn.Module) -> str:
    """A digest of the configuration and of evenly spaced values of each weight tensor."""
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        facts = config.to_dict()
        facts = {name: facts[name] for name in facts if name not in _NOT_OF_THE_MODEL}
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLE)].cpu().contiguous()
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


class Files:
    """A model's files, on the hub or in a folder."""

    def __init__(self, name: str, revision: str | None, local_files_only: bool) -> None:
        from transformers import PretrainedConfig

        self.name = name
        is_path = name.startswith((".", "/", "~")) or name.count("/") > 1  # not a name on the hub
        if is_path and not Path(name).is_dir():
            fix = "check the path"
            raise ValueError(message(WHERE, "a folder with a model", f"'{name}'", fix))
        self.hub = {"revision": revision, "local_files_only": local_files_only}
        with self._named("a model on the hub, or a folder with config.json"):
            config, _ = PretrainedConfig.get_config_dict(name, **self.hub)
        self.kind: str = config.get("model_type", "none")
        self.asked = ""  # a digest of all token ids so far

    @contextlib.contextmanager
    def _named(self, expected: str) -> Iterator[None]:
        try:
            with _quiet():
                yield
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            fix = "check the name, or download the model and pass its folder"
            raise ValueError(message(WHERE, expected, f"'{self.name}' ({reason})", fix)) from error

    def model(self) -> Any:
        """The model with its weights."""
        kind, kinds = self.kind, _classes_of_models()
        if kind not in kinds:
            expected = f"a model type among {', '.join(sorted(kinds))}"
            fix = "write its probability maps yourself; see docs/foundation.md"
            raise ValueError(message(WHERE, expected, kind, fix))
        import transformers

        model_class = getattr(transformers, kinds[kind], None)
        if model_class is None:
            version = transformers.__version__
            raise ImportError(f"{kind} is not in transformers {version}: install a newer one")
        with self._named("a model with its weights"):
            model, info = model_class.from_pretrained(
                self.name, output_loading_info=True, **self.hub
            )
        weights = dict(model.named_parameters())
        missing = sorted(set(info["missing_keys"]) & set(weights))
        if missing:  # transformers would initialise them at random
            got = f"none for {len(missing)} of them, for instance {missing[0]}"
            fix = "choose a checkpoint that was trained to segment"
            raise ValueError(message(self.name, f"weights of a {kinds[kind]}", got, fix))
        return model

    def processor(self) -> dict[str, Any]:
        """The settings that the image processor recorded."""
        from transformers.image_processing_utils import BaseImageProcessor

        with self._named("a model with its preprocessor_config.json"):
            recorded, _ = BaseImageProcessor.get_image_processor_dict(self.name, **self.hub)
        return dict(recorded)

    def tokens(self, texts: list[str], most: int, *, fill: bool = False) -> Any:
        """``input_ids`` and ``attention_mask``, padded to the longest text or to ``most``."""
        from transformers import AutoTokenizer

        with self._named("a model with its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.name, **self.hub)
        longest = max(texts, key=lambda text: len(tokenizer(text).input_ids))
        length = len(tokenizer(longest).input_ids)
        if length > most:
            got, fix = f"{length} for {longest[:60]!r}", "shorten the prompt"
            raise ValueError(message(WHERE, f"prompts of at most {most} tokens", got, fix))
        padding = {"padding": "max_length", "max_length": most} if fill else {"padding": True}
        tokens = tokenizer(texts, return_tensors="pt", **padding)
        asked = json.dumps([self.asked, tokens.input_ids.tolist()])
        self.asked = hashlib.sha256(asked.encode()).hexdigest()
        return tokens


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let transformers print errors only, and no progress bars in a pipe."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _classes_of_models() -> dict[str, str]:
    """The class in transformers of every supported model type."""
    from transformers.models.auto import modeling_auto

    return {
        **modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
        "clipseg": "CLIPSegForImageSegmentation",
        "groupvit": "GroupViTModel",
        "sam3": "Sam3Model",
        "sam3_video": "Sam3Model",  # the model type of SAM 3 on the hub
        "mask2former": "Mask2FormerForUniversalSegmentation",
        "maskformer": "MaskFormerForInstanceSegmentation",
        "oneformer": "OneFormerForUniversalSegmentation",
        "eomt": "EomtForUniversalSegmentation",
        "eomt_dinov3": "EomtDinov3ForUniversalSegmentation",
    }
