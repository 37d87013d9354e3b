"""Uncertainty-aware fine-tuning of SAM, as in SUM (NeurIPS 2024), with the parts of cpseg.

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

import digits_data
from checkpoints import restore, train
from cpseg import TaskPrompt
from cpseg.checks import message
from cpseg.sources import place
from cpseg.store import Pair, read_tensors, write_tensors
from refinement import good_pairs, map_metadata, refinement_loss, uncertainty_of
from rounds import backward, evaluate
from sam_data import Example, read_labelled, read_list, read_unlabelled, take
from sam_model import enlarge, frame_size, layer_groups, load, train_decoder_only

COMMANDS = ("refine", "uncertainty", "finetune", "all")
UNLABELLED = 0  # the task of pseudo-labels; 1 is salient objects, 2 entities


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out.add_argument("command", choices=COMMANDS)
    out.add_argument("--data", required=True, help="a folder (see README.md), or digits")
    out.add_argument("--out", required=True, type=Path)
    out.add_argument("--model", default="facebook/sam-vit-huge", help="or tiny: small and random")
    kinds = ("sum", "confidence", "discrepancy", "none")
    out.add_argument("--uncertainty", choices=kinds, default="sum")
    out.add_argument("--no-task-prompt", action="store_true")
    out.add_argument("--task", type=int, choices=(1, 2), default=2, help="of the labelled images")
    out.add_argument("--steps", type=_positive, help="of fine-tuning (6000; tiny 400)")
    out.add_argument("--refine-steps", type=_positive, help="of the refinement module (the same)")
    out.add_argument("--lr", type=float, help="1e-5; tiny, which starts from nothing, 3e-3")
    out.add_argument("--layer-decay", type=float, default=0.8)
    out.add_argument("--weight-decay", type=float, default=0.1, help="of AdamW, as SAM has it")
    out.add_argument("--masks", type=_positive, default=30, help="most masks of an image a step")
    out.add_argument("--every", type=_positive, default=50, help="steps between two checkpoints")
    out.add_argument("--digits", type=_positive, default=40, help="images of each part of digits")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return out


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


class Run:
    """What the commands share: arguments, data and where things are written."""

    def __init__(self, args: argparse.Namespace, say: Callable[[str], None]) -> None:
        self.args, self.say = args, say
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
        """The arguments that what is written depends on."""
        common = {"lr": self.lr}
        names = ("data", "digits", "model", "seed", "masks", "weight_decay", *names)
        return common | {name: getattr(self.args, name) for name in names}

    def labelled(self, pair: Pair, *, coarse: bool) -> Example:
        """A labelled image on the device."""
        return self.move(read_labelled(self.folder, pair, self.size, coarse=coarse))

    def move(self, example: Example) -> Example:
        """The tensors of an example on the device."""
        device = self.args.device
        return Example(*(x.to(device) if isinstance(x, Tensor) else x for x in example))

    def draw(self, step: int, stream: int) -> torch.Generator:
        """Random numbers of one step; on the CPU, so that a device changes no draw."""
        number = (self.args.seed * 1_000_003 + step) * 2 + stream
        return torch.Generator().manual_seed(number % 2**63)

    def some(self, example: Example, generator: torch.Generator) -> Tensor:
        """At most ``--masks`` of its masks, at random."""
        order = torch.randperm(len(example.masks), generator=generator)
        return order[: self.args.masks].to(self.args.device)

    @property
    def maps(self) -> Path:
        """Folder of the uncertainty maps."""
        return self.args.out / f"uncertainty-{self.args.uncertainty}"


def refine(run: Run) -> None:
    """Train the mask-refinement module: prompt encoder and mask decoder, on labelled pairs."""
    parameters = train_decoder_only(run.model)
    pairs = read_list(run.folder, "labelled")
    good = [(p, k) for p in pairs if len(k := good_pairs(run.labelled(p, coarse=True))) > 0]
    if not good:
        fix = "check that channel k - 1 of the logits belongs to label k"
        expected = "a coarse mask with an IoU of at least 0.7"
        raise ValueError(message(str(run.folder / "labelled.txt"), expected, "none", fix))
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
    """Write the uncertainty map of every unlabelled image, unless it is there."""
    kind = run.args.uncertainty
    if kind == "none":
        return
    settings = run.settings() | {"refine_steps": run.refine_steps}
    if kind == "sum":
        path = run.args.out / "refine.pt"
        if not path.is_file():
            raise FileNotFoundError(message(str(path), "a refinement module", "none", "run refine"))
        done = restore(path, nn.ModuleDict({"sam": run.model}), settings)
        if done < run.refine_steps:
            got = f"{done} of {run.refine_steps} steps"
            raise ValueError(message(str(path), "a finished module", got, "run refine again"))
    about = map_metadata(kind, settings)
    written = 0
    pairs = read_list(run.folder, "unlabelled")
    for pair in pairs:
        path = place(run.maps, pair.image, ".safetensors")
        if path.is_file() and read_tensors(path)[1] == about:
            continue
        example = run.move(read_unlabelled(run.folder, pair, run.size))
        found = uncertainty_of(kind, run.model, example)
        write_tensors(path, {"uncertainty": found}, about)
        written += 1
    run.say(f"uncertainty: {written} maps written, {len(pairs) - written} were there")


def finetune(run: Run) -> None:
    """Fine-tune SAM on one labelled and one unlabelled image a step, and evaluate it."""
    args = run.args
    task_prompt = None
    modules = nn.ModuleDict({"sam": run.model})
    if not args.no_task_prompt:
        channels = run.model.config.vision_config.output_channels
        task_prompt = TaskPrompt(3, channels).to(args.device)
        modules["task_prompt"] = task_prompt
    table("before", run, task_prompt)
    pairs_x, pairs_u = read_list(run.folder, "labelled"), read_list(run.folder, "unlabelled")

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
        settings=run.settings("task", "layer_decay", "uncertainty") | {"steps": run.steps},
        say=run.say,
    )
    table("after", run, task_prompt)
    run.model.save_pretrained(args.out / name)
    run.say(f"{name}: model in {args.out / name}")


def _map_of(run: Run, pair: Pair, example: Example) -> Tensor | None:
    """The uncertainty of an image's masks at the size of the frame."""
    if run.args.uncertainty == "none":
        return None
    path = place(run.maps, pair.image, ".safetensors")
    if not path.is_file():
        fix = "run uncertainty with the same --uncertainty"
        raise FileNotFoundError(message(str(path), "an uncertainty map", "none", fix))
    found = read_tensors(path)[0]["uncertainty"].float().to(run.args.device)
    if len(found) != len(example.masks):
        expected, got = f"{len(example.masks)} maps", str(len(found))
        raise ValueError(message(str(path), expected, got, "delete it and run uncertainty"))
    return enlarge(found[:, None], run.size)[:, 0].clamp(0, 1)


def table(when: str, run: Run, task_prompt: TaskPrompt | None) -> None:
    """Print mIoU and mBIoU of the validation images after each round; every mask counts alike."""
    sums, count = torch.zeros(2, 6, dtype=torch.float64), 0
    for pair in read_list(run.folder, "val"):
        example = run.labelled(pair, coarse=False)
        found = torch.stack(evaluate(run.model, task_prompt, example, run.args.task))
        sums += found.cpu() * len(example.masks)
        count += len(example.masks)
    for name, row in zip(("mIoU ", "mBIoU"), 100 * sums / count, strict=True):
        values = "  ".join(f"{value:5.1f}" for value in row.tolist())
        run.say(f"{when:>6}, {name} after 1..6 points: {values}")


def main(argv: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Run a command; 0 on success, 2 with one line on bad input."""
    args = parser().parse_args(argv)
    try:
        steps: dict[str, Callable[[Run], None]] = {
            "refine": refine,
            "uncertainty": uncertainty,
            "finetune": finetune,
        }
        names = list(steps) if args.command == "all" else [args.command]
        if args.command == "all" and args.uncertainty != "sum":
            names.remove("refine")
        for name in names:
            steps[name](Run(args, say))  # each from the starting model
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
