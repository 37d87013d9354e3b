r"""Write probabilities of SEEM's grounding head, in SEEM's own project.

Copy this file and ``prob_files.py`` into a checkout of
UX-Decoder/Segment-Everything-Everywhere-All-At-Once, and run, in its environment::

    python seem_probs.py --config configs/seem/focall_unicl_lang_v1.yaml \
        --weights seem_focall_v1.pt \
        --root VOC --ids unlabelled.txt --classes voc.txt --background-from complement --out P

The grounding head gives one mask logit per text; its sigmoid is the probability of the class. The
semantic head cannot be used: its class maps are sums over queries and may exceed 1. Written for
commit 7b2e76d by reading its code; the script has not been run there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import prob_files
import torch
from PIL import Image


def ask(model: Any, path: Path, prompts: list[str], *, at_once: int, side: int) -> np.ndarray:
    """Probabilities ``[P, H, W]`` of an image, one map per prompt.

    Args:
        model: SEEM, with ``evaluate_grounding``.
        path: the image; EXIF rotation is not applied.
        prompts: the texts.
        at_once: number of texts per forward pass. They attend to each other, so use the same
            number for labelled and unlabelled images.
        side: shortest side of the image in the model.
    """
    with Image.open(path) as file:
        image = file.convert("RGB")
    scale = side / min(image.size)
    small = image.resize([max(1, round(length * scale)) for length in image.size], Image.BICUBIC)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)  # 0..255: the model normalises
    maps = []
    for first in range(0, len(prompts), at_once):
        texts = [[text] for text in prompts[first : first + at_once]]
        asked = {"image": pixels, "height": image.height, "width": image.width}
        with torch.no_grad():
            outputs = model.evaluate_grounding([{**asked, "groundings": {"texts": texts}}], None)
        maps.append(prob_files.sigmoid(outputs[0]["grounding_mask"].float().cpu().numpy()))
    return np.concatenate(maps)


def main() -> None:
    """Load SEEM and write score files."""
    from modeling import build_model
    from modeling.BaseModel import BaseModel
    from utils.arguments import load_opt_from_config_files
    from utils.constants import COCO_PANOPTIC_CLASSES
    from utils.distributed import init_distributed

    parser = argparse.ArgumentParser(description="score files of SEEM's grounding head")
    parser.add_argument("--config", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--ids", required=True)
    parser.add_argument("--classes", required=True, help="lines 'name' or 'name: prompt, prompt'")
    parser.add_argument("--background-from", choices=prob_files.BACKGROUNDS, required=True)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()

    settings = init_distributed(load_opt_from_config_files([options.config]))
    wrapped = BaseModel(settings, build_model(settings)).from_pretrained(options.weights)
    model = wrapped.eval().cuda().model
    model.task_switch["grounding"] = True
    language = model.sem_seg_head.predictor.lang_encoder
    with torch.no_grad():
        language.get_text_embeddings([*COCO_PANOPTIC_CLASSES, "background"], is_eval=True)
    written = prob_files.write_all(
        lambda path, texts: ask(model, path, texts, at_once=options.at_once, side=options.side),
        root=options.root,
        ids=options.ids,
        classes=options.classes,
        background=options.background_from,
        out=options.out,
        made={
            "config": prob_files.identity(options.config),
            "weights": prob_files.identity(options.weights),
            "at-once": options.at_once,
            "side": options.side,
        },
    )
    print(f"{options.out}: {written} score files written")


if __name__ == "__main__":
    main()
