"""Uncertainty-aware fine-tuning of SAM, as in SUM (NeurIPS 2024), with functions of cpseg.

python examples/sum/train.py all --data digits --model tiny --out sum_out
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import coarse as sam_masks
import digits_data
from checkpoints import digest, restore, train
from cpseg import TaskPrompt
from cpseg.files import Pair, output_path, read_tensors, write_tensors
from refinement import good_pairs, map_metadata, refinement_loss, uncertainty_of
from rounds import backward, evaluate
from sam_data import (
    Example,
    move_points,
    read_image,
    read_labelled,
    read_list,
    read_objects,
    read_unlabelled,
    take,
    with_masks,
)
from sam_model import enlarge, frame_size, layer_groups, load, train_decoder_only

COMMANDS = ("coarse", "refine", "uncertainty", "finetune", "all")
UNLABELLED = 0  # the task of pseudo-labels; 1 means salient objects, 2 entities


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out.add_argument("command", choices=COMMANDS)
    out.add_argument("--data", required=True, help="a folder (see README.md), or digits")
    out.add_argument("--out", required=True, type=Path)
    out.add_argument(
        "--model", default="facebook/sam-vit-huge", help="or tiny: small, with random weights"
    )
    kinds = ("sum", "confidence", "discrepancy", "none")
    out.add_argument("--uncertainty", choices=kinds, default="sum")
    out.add_argument("--no-task-prompt", action="store_true")
    out.add_argument(
        "--task", type=int, choices=(1, 2), default=2, help="task of the labelled images"
    )
    out.add_argument(
        "--steps", type=_positive, help="steps of fine-tuning (default 6000; tiny 400)"
    )
    out.add_argument(
        "--refine-steps", type=_positive, help="steps of the refinement module (the same)"
    )
    out.add_argument("--lr", type=float, help="default 1e-5; tiny 3e-3")
    out.add_argument("--layer-decay", type=float, default=0.8)
    out.add_argument(
        "--weight-decay", type=float, default=0.1, help="of AdamW (default 0.1, as for SAM)"
    )
    out.add_argument(
        "--masks", type=_positive, default=30, help="maximal number of masks per image and step"
    )
    out.add_argument("--every", type=_positive, default=50, help="steps between two checkpoints")
    out.add_argument("--grid", type=_positive, default=32, help="points per side of the image")
    default = sam_masks.Filters()
    names = {
        "min_iou": "smallest predicted IoU of a coarse mask, in percent",
        "min_stability": "its smallest stability, in percent",
        "max_area": "its area must be less than this, in percent of the image",
        "nms": "if the IoU of two boxes is above this, the worse mask is removed",
    }
    for name, text in names.items():
        option = f"--{name.replace('_', '-')}"
        out.add_argument(option, type=float, default=getattr(default, name), help=text)
    out.add_argument(
        "--digits", type=_positive, default=40, help="number of images in each part of digits"
    )
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return out


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


class Run:
    """The arguments, data and output paths of all commands."""

    def __init__(self, args: argparse.Namespace, say: Callable[[str], None]) -> None:
        self.args, self.say = args, say
        if not 0 < args.nms <= 1:
            raise ValueError(
                f"--nms: expected a share in (0, 1], got {args.nms}; it is an IoU, not percent"
            )
        tiny = args.model == "tiny"
        self.lr = args.lr if args.lr is not None else (3e-3 if tiny else 1e-5)
        self.steps = args.steps or (400 if tiny else 6000)
        self.refine_steps = args.refine_steps or self.steps
        self.folder = Path(args.data)
        if args.data == "digits":
            self.folder = args.out / "digits"
            parts = ("labelled", "unlabelled", "val")
            digits_data.make(self.folder, dict.fromkeys(parts, args.digits), args.seed)
        self.model = load(args.model, args.seed).to(args.device).eval()
        self.size = frame_size(self.model)

    def settings(self, *names: str) -> dict[str, Any]:
        """The arguments on which the output depends."""
        common = {"lr": self.lr}
        names = ("data", "digits", "model", "seed", "masks", "weight_decay", "grid", *names)
        names = (*sam_masks.Filters._fields, *names)
        return common | {name: getattr(self.args, name) for name in names}

    def labelled(self, pair: Pair, *, coarse: bool) -> Example:
        """A labelled image on the device."""
        return self.move(read_labelled(self.folder, pair, self.size, coarse=coarse))

    def move(self, example: Example) -> Example:
        """The tensors of an example on the device."""
        device = self.args.device
        return Example(*(x.to(device) if isinstance(x, Tensor) else x for x in example))

    def unlabelled(self) -> list[Pair]:
        """The unlabelled images that have a coarse mask."""
        return with_masks(self.folder, read_list(self.folder, "unlabelled"))

    def draw(self, step: int, stream: int) -> torch.Generator:
        """Random numbers of one step, on the CPU: every device gets the same images and masks.

        The prompts of fine-tuning are drawn on the device, so they depend on its kind.
        """
        number = (self.args.seed * 1_000_003 + step) * 2 + stream
        return torch.Generator().manual_seed(number % 2**63)

    def some(self, example: Example, generator: torch.Generator) -> Tensor:
        """Random indices of at most ``--masks`` of its masks."""
        order = torch.randperm(len(example.masks), generator=generator)
        return order[: self.args.masks].to(self.args.device)

    def coarse_file(self, pair: Pair) -> Path:
        """The file of the coarse masks of an image."""
        return output_path(self.folder / "coarse", pair.image, ".safetensors")

    def map_file(self, pair: Pair) -> Path:
        """The file of the uncertainty map of an image."""
        folder = self.args.out / f"uncertainty-{self.args.uncertainty}"
        return output_path(folder, pair.image, ".safetensors")

    def written_map(self, pair: Pair) -> Path:
        """The same file, which must exist."""
        path = self.map_file(pair)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: expected an uncertainty map, got none; "
                "run uncertainty with the same --uncertainty"
            )
        return path


def coarse(run: Run) -> None:
    """Write the coarse masks of labelled and unlabelled images, unless they exist already."""
    args = run.args
    filters = sam_masks.Filters(args.min_iou, args.min_stability, args.max_area, args.nms)
    about = {"kind": "coarse", "model": args.model, "seed": args.seed, **filters._asdict()}
    counts = {"written": 0, "masks": 0, "failed": 0}
    empty = []
    for part in ("labelled", "unlabelled"):
        pairs = read_list(run.folder, part)
        for number, pair in enumerate(pairs):
            path = run.coarse_file(pair)
            if part == "unlabelled":
                more, inputs = {"grid": args.grid}, [run.folder / pair.image]
            else:
                more = {"mask": pair.mask}
                inputs = [run.folder / pair.image, run.folder / str(pair.mask)]
            own = about | more | {"inputs": digest(inputs)}
            if path.is_file():
                tensors, made = read_tensors(path)
                if made.get("kind") != "coarse":
                    raise ValueError(
                        f"{path}: expected coarse masks of this command, or none, got others; "
                        "move that folder away"
                    )
            if not path.is_file() or made != own:
                find = _coarse_labelled if part == "labelled" else _coarse_unlabelled
                tensors = find(run, pair, filters, run.draw(number, 0))
                write_tensors(path, tensors, own)
                counts["written"] += 1
            if part == "unlabelled":
                counts["masks"] += len(tensors["logits"])
                empty += [pair.image] * (len(tensors["logits"]) == 0)
            else:
                counts["failed"] += int(
                    (tensors["logits"] == sam_masks.NOTHING).flatten(1).all(1).sum()
                )
        run.say(f"coarse: {part}, {len(pairs)} images")
    run.say(
        f"coarse: {counts['written']} files written; {counts['masks']} masks of unlabelled images, "
        f"{counts['failed']} labels without a mask that passes"
    )
    if empty:
        listed = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
        run.say(f"coarse: no mask passes in {len(empty)} unlabelled images, left out: {listed}")


def _own_coarse(folder: Path) -> bool:
    """Whether there are no coarse masks yet, or only masks of this command."""
    first = next((folder / "coarse").rglob("*.safetensors"), None)
    return first is None or read_tensors(first)[1].get("kind") == "coarse"


def _coarse_unlabelled(
    run: Run, pair: Pair, filters: sam_masks.Filters, generator: torch.Generator
) -> dict[str, Tensor]:
    bare, full = read_image(run.folder, pair, run.size)
    logits, points = sam_masks.from_grid(run.model, run.move(bare), run.args.grid, filters)
    return _stored(logits, move_points(points, bare.size, full))


def _coarse_labelled(
    run: Run, pair: Pair, filters: sam_masks.Filters, generator: torch.Generator
) -> dict[str, Tensor]:
    """Channel k - 1 for label k; a constant if no mask passes."""
    example, kept, full = read_objects(run.folder, pair, run.size)
    masks, points, good = sam_masks.from_masks(run.model, run.move(example), filters, generator)
    index = torch.tensor(kept, device=masks.device) - 1
    logits = masks.new_full((kept[-1], *masks.shape[1:]), sam_masks.NOTHING)
    logits[index[good]] = masks[good]
    origins = points.new_zeros(kept[-1], 2)
    origins[index] = move_points(points, example.size, full)
    return _stored(logits, origins)


def _stored(logits: Tensor, points: Tensor) -> dict[str, Tensor]:
    return {"logits": logits.to("cpu", torch.float16), "points": points.cpu()}


def refine(run: Run) -> None:
    """Train the mask-refinement module: prompt encoder and mask decoder, on labelled pairs."""
    parameters = train_decoder_only(run.model)
    pairs = read_list(run.folder, "labelled")
    good = [(p, k) for p in pairs if len(k := good_pairs(run.labelled(p, coarse=True))) > 0]
    if not good:
        raise ValueError(
            f"{run.folder / 'labelled.txt'}: expected a coarse mask with an IoU of at least 0.7, "
            "got none; check that channel k - 1 of the logits is label k, or lower coarse's filters"
        )
    run.say(f"refine: {sum(len(k) for _, k in good)} masks of {len(good)} images")

    def learn(step: int) -> Tensor:
        generator = run.draw(step, 0)
        pair, keep = good[int(torch.randint(len(good), (), generator=generator))]
        example = take(run.labelled(pair, coarse=True), keep)
        loss = refinement_loss(run.model, take(example, run.some(example, generator)))
        loss.backward()
        return loss

    optimizer = torch.optim.AdamW(parameters, lr=run.lr, weight_decay=run.args.weight_decay)
    train(
        "refine",
        run.args.out / "refine.pt",
        nn.ModuleDict({"sam": run.model}),
        optimizer,
        learn,
        steps=run.refine_steps,
        every=run.args.every,
        settings=run.settings() | {"refine_steps": run.refine_steps},
        say=run.say,
    )


def uncertainty(run: Run) -> None:
    """Write the uncertainty map of every unlabelled image, unless it exists already."""
    kind = run.args.uncertainty
    if kind == "none":
        return
    settings = run.settings() | {"refine_steps": run.refine_steps}
    refined = None
    if kind == "sum":
        path = run.args.out / "refine.pt"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a refinement module, got none; run refine")
        done = restore(path, nn.ModuleDict({"sam": run.model}), settings)
        if done < run.refine_steps:
            raise ValueError(
                f"{path}: expected a finished module, got {done} of {run.refine_steps} steps; "
                "run refine again"
            )
        refined = digest([path])
    written = 0
    pairs = run.unlabelled()
    for pair in pairs:
        path = run.map_file(pair)
        inputs = digest([run.coarse_file(pair), run.folder / pair.image])
        about = map_metadata(kind, settings, inputs, refined)
        if path.is_file() and read_tensors(path)[1] == about:
            continue
        example = run.move(read_unlabelled(run.folder, pair, run.size))
        values = uncertainty_of(kind, run.model, example)
        write_tensors(path, {"uncertainty": values}, about)
        written += 1
    run.say(f"uncertainty: {written} maps written, {len(pairs) - written} were there")


def finetune(run: Run) -> None:
    """Fine-tune SAM on one labelled and one unlabelled image per step, and evaluate it."""
    args = run.args
    task_prompt = None
    modules = nn.ModuleDict({"sam": run.model})
    if not args.no_task_prompt:
        channels = run.model.config.vision_config.output_channels
        task_prompt = TaskPrompt(3, channels).to(args.device)
        modules["task_prompt"] = task_prompt
    pairs_x, pairs_u = read_list(run.folder, "labelled"), run.unlabelled()
    settings = run.settings("task", "layer_decay", "uncertainty") | {"steps": run.steps}
    settings["coarse_masks"] = digest(run.coarse_file(pair) for pair in pairs_u)
    if args.uncertainty != "none":
        settings["maps"] = digest(run.written_map(pair) for pair in pairs_u)
    table("before", run, task_prompt)

    def learn(step: int) -> Tensor:
        generator = run.draw(step, 1)
        pair_x = pairs_x[int(torch.randint(len(pairs_x), (), generator=generator))]
        pair_u = pairs_u[int(torch.randint(len(pairs_u), (), generator=generator))]
        x = run.labelled(pair_x, coarse=False)
        x = take(x, run.some(x, generator))
        u = run.move(read_unlabelled(run.folder, pair_u, run.size))
        keep = run.some(u, generator)
        unsure = _map_of(run, pair_u, u)
        prompt_numbers = torch.Generator(args.device).manual_seed(generator.initial_seed() + 1)
        return backward(
            run.model,
            task_prompt,
            [x, take(u, keep)],
            [None, None if unsure is None else unsure[keep]],
            [args.task, UNLABELLED],
            prompt_numbers,
        )

    groups = layer_groups(run.model, run.lr, args.layer_decay, task_prompt)
    name = f"finetune-{args.uncertainty}{'-no-task' if args.no_task_prompt else ''}"
    train(
        name,
        args.out / f"{name}.pt",
        modules,
        torch.optim.AdamW(groups, lr=run.lr, weight_decay=args.weight_decay),
        learn,
        steps=run.steps,
        every=args.every,
        settings=settings,
        say=run.say,
    )
    table("after", run, task_prompt)
    run.model.save_pretrained(args.out / name)
    if task_prompt is not None:
        path = args.out / name / "task_prompt.safetensors"
        write_tensors(path, task_prompt.state_dict(), {"kind": "task prompt"})
    run.say(f"{name}: model in {args.out / name}")


def _map_of(run: Run, pair: Pair, example: Example) -> Tensor | None:
    """The uncertainty of an image's masks at the size of the frame."""
    if run.args.uncertainty == "none":
        return None
    path = run.written_map(pair)
    maps = read_tensors(path)[0]["uncertainty"].float().to(run.args.device)
    if len(maps) != len(example.masks):
        raise ValueError(
            f"{path}: expected {len(example.masks)} maps, got {len(maps)}; "
            "delete it and run uncertainty"
        )
    return enlarge(maps[:, None], run.size)[:, 0].clamp(0, 1)


def table(when: str, run: Run, task_prompt: TaskPrompt | None) -> None:
    """Print mIoU and mBIoU of the validation images after each round, as means over all masks."""
    sums, count = torch.zeros(2, 6, dtype=torch.float64), 0
    for pair in read_list(run.folder, "val"):
        example = run.labelled(pair, coarse=False)
        means = torch.stack(evaluate(run.model, task_prompt, example, run.args.task))
        sums += means.cpu() * len(example.masks)
        count += len(example.masks)
    for name, row in zip(("mIoU ", "mBIoU"), 100 * sums / count, strict=True):
        values = "  ".join(f"{value:5.1f}" for value in row.tolist())
        run.say(f"{when:>6}, {name} after 1..6 points: {values}")


def main(argv: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Run a command; returns 0 on success, 2 after one line on stderr for bad input."""
    args = parser().parse_args(argv)
    try:
        steps: dict[str, Callable[[Run], None]] = {
            "coarse": coarse,
            "refine": refine,
            "uncertainty": uncertainty,
            "finetune": finetune,
        }
        names = list(steps) if args.command == "all" else [args.command]
        if args.command == "all" and args.uncertainty != "sum":
            names.remove("refine")
        for name in names:
            run = Run(args, say)  # every command starts with the initial model
            if name == "coarse" and args.command == "all" and not _own_coarse(run.folder):
                continue
            steps[name](run)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
