"""Interactive segmentation: the rounds of training (appendix B.1) and of evaluation (B.3)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import SamModel

from cpseg import TaskPrompt, centre_point, interactive_iou, sample_prompts, sum_loss
from sam_data import VOID, Example
from sam_model import Prompted, encode, enlarge, frame_size, pick, predict

CORRECTIONS = 5


def backward(
    model: SamModel,
    task_prompt: TaskPrompt | None,
    examples: list[Example],
    uncertainties: list[Tensor | None],
    tasks: list[int],
    generator: torch.Generator,
) -> Tensor:
    """Gradients of the mean loss of 7 rounds: a first prompt, 5 corrections, one without a prompt.

    The graph of each round is freed after it; the image encoder gets the sum of their gradients.

    Args:
        model: SAM.
        task_prompt: added to the image embedding in the first round, or None.
        examples: images; all have the same weight, whatever their number of masks.
        uncertainties: of each image's masks, ``[M, S, S]``; None for masks made by people.
        tasks: task of each image.
        generator: draws the prompts.

    Returns:
        The loss, without a graph.
    """
    size = frame_size(model)
    encoded = encode(model, torch.stack([example.pixels for example in examples]))
    embedding = encoded.detach().requires_grad_()
    first = embedding
    if task_prompt is not None:
        first = task_prompt(embedding, torch.tensor(tasks, device=embedding.device))
    image = torch.cat(
        [torch.full((len(e.masks),), k, device=embedding.device) for k, e in enumerate(examples)]
    )
    masks = torch.cat([example.masks for example in examples])
    unsure = torch.cat(
        [
            torch.zeros(example.masks.shape, device=masks.device) if u is None else u
            for example, u in zip(examples, uncertainties, strict=True)
        ]
    )
    backup = torch.cat([example.points for example in examples])
    targets, valid = masks == 1, masks != VOID
    drawn = sample_prompts(targets, uncertainty=unsure, backup_points=backup, generator=generator)
    prompts = Prompted(
        drawn.points[:, None], drawn.labels[:, None], drawn.boxes, drawn.labels == -1
    )
    total = torch.zeros((), device=masks.device)
    last = None
    for number in range(CORRECTIONS + 2):
        here = (embedding if number else first)[image]
        logits, iou = predict(model, here, prompts, last, several=number == 0)
        large = enlarge(logits, size)
        trained, predicted = large, iou
        if number == 0:  # one prompt is ambiguous: train the best of three candidates
            best = _losses(large.detach(), masks, unsure).argmin(1)
            trained, predicted = pick(large, best), pick(iou, best).squeeze(1)
        loss = sum_loss(
            trained, masks, uncertainty=unsure, predicted_iou=predicted, reduction="none"
        )
        mean = torch.stack([loss[image == k].mean() for k in range(len(examples))]).mean()
        mean = mean / (CORRECTIONS + 2)
        mean.backward()
        total += mean.detach()
        # The candidate with the highest predicted IoU is the input of the next round.
        trusted = iou.detach().argmax(1)
        last = pick(logits.detach(), trusted)
        if number < CORRECTIONS:
            now = (pick(large.detach(), trusted)[:, 0] > 0) & valid
            drawn = sample_prompts(
                targets, now, uncertainty=unsure, backup_points=backup, generator=generator
            )
            prompts = prompts.add(drawn.points, drawn.labels)
    encoded.backward(embedding.grad)
    return total


def _losses(logits: Tensor, masks: Tensor, unsure: Tensor) -> Tensor:
    """Mask loss of every candidate, ``[R, m]``."""
    losses = [
        sum_loss(candidate, masks, uncertainty=unsure, reduction="none")
        for candidate in logits.split(1, dim=1)
    ]
    return torch.stack(losses, 1)


@torch.no_grad()
def evaluate(
    model: SamModel, task_prompt: TaskPrompt | None, example: Example, task: int
) -> tuple[Tensor, Tensor]:
    """Mean IoU and mean boundary IoU of an image's masks after 1..6 point prompts, each ``[6]``.

    The first point is the one farthest from the boundary of the mask, the next ones are farthest
    from the boundary of the error. In the first round the best of three candidates is used.
    """
    embedding = encode(model, example.pixels[None])
    count, device = len(example.masks), embedding.device
    first = embedding
    if task_prompt is not None:
        first = task_prompt(embedding, torch.tensor([task], device=device))
    targets, valid = example.masks == 1, example.masks != VOID
    drawn = centre_point(targets)
    boxed = torch.zeros(count, dtype=torch.bool, device=device)
    prompts = Prompted(drawn.points[:, None], drawn.labels[:, None], None, boxed)
    rounds: list[Tensor] = []
    last = None
    for number in range(CORRECTIONS + 1):
        here = (embedding if number else first).expand(count, -1, -1, -1)
        logits, _ = predict(model, here, prompts, last, several=number == 0)
        now = (enlarge(logits, targets.shape[-1]) > 0) & valid[:, None]
        both, either = now & targets[:, None], now | targets[:, None]
        best = (both.flatten(2).sum(2) / either.flatten(2).sum(2)).argmax(1)
        last = pick(logits, best)
        rounds.append(pick(now, best)[:, 0])
        drawn = centre_point(targets, rounds[-1])
        prompts = prompts.add(drawn.points, drawn.labels)
    # Without the padding, because the width of mBIoU's band is a share of the image.
    height, width = example.size
    masks = torch.stack(rounds)[:, :, :height, :width]
    return interactive_iou(masks, targets[:, :height, :width])
