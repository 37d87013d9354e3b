r"""Write probabilities of GLaMM, in its own project.

Copy this file and ``prob_files.py`` into a checkout of mbzuai-oryx/groundingLMM, and run, in its
environment::

    python glamm_probs.py --version MBZUAI/GLaMM-FullScope --root VOC --ids unlabelled.txt \
        --classes voc.txt --background-from complement --out P

GLaMM is asked for one prompt at a time. If its answer has masks, the probability is the largest of
their sigmoids; if not, the probability of the class is 0 everywhere. Written for commit e74865f by
reading its code; the script has not been run there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import prob_files
import torch
from PIL import Image

QUESTION = "Can you segment the {} in this image?"


def best_map(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """From the mask logits of one answer, ``[M, H, W]``, to one map ``[H, W]``; M may be 0."""
    if len(logits) == 0:
        return np.zeros(size)
    return prob_files.sigmoid(logits).max(axis=0)


def ask(answer: Callable[[np.ndarray, str], Any], path: Path, prompts: list[str]) -> list[Any]:
    """Probabilities ``[H, W]`` of an image, one map per prompt; EXIF rotation is not applied."""
    with Image.open(path) as file:
        image = np.array(file.convert("RGB"))
    maps = []
    for prompt in prompts:
        masks = answer(image, QUESTION.format(prompt))
        maps.append(best_map(masks.float().cpu().numpy(), image.shape[:2]))
    return maps


def main() -> None:
    """Load GLaMM as its own demo does and write score files."""
    import app  # of the project: its demo
    from model.llava import conversation
    from model.llava.mm_utils import tokenizer_image_token
    from model.SAM.utils.transforms import ResizeLongestSide
    from tools.utils import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
    from transformers import CLIPImageProcessor

    parser = argparse.ArgumentParser(description="score files of GLaMM")
    parser.add_argument("--root", required=True)
    parser.add_argument("--ids", required=True)
    parser.add_argument("--classes", required=True, help="lines 'name' or 'name: prompt, prompt'")
    parser.add_argument("--background-from", choices=prob_files.BACKGROUNDS, required=True)
    parser.add_argument("--out", required=True)
    options, others = parser.parse_known_args()

    settings = app.parse_args(others)  # --version, --conv_type and the like
    made = {"question": QUESTION, **vars(settings)}
    for harmless in ("vis_save_path", "local_rank"):
        made.pop(harmless, None)
    if Path(settings.version).is_dir():
        made["version"] = str(Path(settings.version).resolve())
    tokenizer = app.setup_tokenizer_and_special_tokens(settings)
    model = app.prepare_model_for_inference(app.initialize_model(settings, tokenizer), settings)
    model.eval()
    whole = CLIPImageProcessor.from_pretrained(model.config.vision_tower)
    longest = ResizeLongestSide(settings.image_size)
    marker = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN

    def answer(image: np.ndarray, question: str) -> Any:
        talk = conversation.conv_templates[settings.conv_type].copy()
        talk.messages = []
        talk.append_message(
            talk.roles[0], f"The {marker} provides an overview of the picture.\n{question}"
        )
        talk.append_message(talk.roles[1], "")
        tokens = tokenizer_image_token(talk.get_prompt(), tokenizer, return_tensors="pt")
        seen = whole.preprocess(image, return_tensors="pt")["pixel_values"].cuda().bfloat16()
        large = longest.apply_image(image)
        pixels = torch.from_numpy(large).permute(2, 0, 1).contiguous()
        pixels = app.grounding_enc_processor(pixels)[None].cuda().bfloat16()
        sizes = [large.shape[:2]], [image.shape[:2]]
        _, masks = model.evaluate(seen, pixels, tokens[None].cuda(), *sizes, max_tokens_new=512)
        return masks[0]

    written = prob_files.write_all(
        lambda path, prompts: ask(answer, path, prompts),
        root=options.root,
        ids=options.ids,
        classes=options.classes,
        background=options.background_from,
        out=options.out,
        made=made,
    )
    print(f"{options.out}: {written} score files written")


if __name__ == "__main__":
    main()
