"""``cpseg run``: from scores and a few labelled images to labels, by the other subcommands."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpseg._internal.words import RECALIBRATIONS
from cpseg.cli import options
from cpseg.cli.options import Commands, background, shares, whole, words
from cpseg.cli.shared import data_words, refuse_unused, say, say_paragraph, source_of

if TYPE_CHECKING:
    from cpseg.files.dataset import Source

KEPT = ("best", "every-pixel", "sets", "certified")


def add(commands: Commands) -> None:
    """The subcommand's options."""
    command = commands.add_parser(
        "run",
        parents=[
            options.data("--labelled"),
            options.masks(),
            options.class_map(),
            options.recalibration_input(),
        ],
        help="all of it: check, choose the rule, calibrate, label",
    )
    add = command.add_argument
    add("--unlabelled", type=Path, required=True, help="id list of the images to label")
    add("-o", "--output", type=Path, required=True, help="folder to write")
    add(
        "--fast",
        action="store_true",
        help="try less: 3 folds, no certificates, no trees, no maps over a part of the sources",
    )
    add("--names", type=Path, help="file of class names, one per line (default: classes.txt of P)")
    choice = command.add_argument_group("choices, which are made by cross-validation otherwise")
    choose = choice.add_argument
    choose(
        "--keep",
        choices=KEPT,
        default="best",
        help="which labels: best (default) for a student; every-pixel; sets, those of prediction "
        "sets at --alpha (eq. 4); certified, those proven to be wrong at most --max-error",
    )
    choose(
        "--recalibrate",
        type=words,
        help=f"methods to try, among {','.join(RECALIBRATIONS)} (default none,dirichlet; with "
        "several sources also trees, where scikit-learn is installed)",
    )
    choose("--prior-powers", type=shares, help="to try (default 0,0.125,0.25,0.5; --fast 0,0.25)")
    choose(
        "--colour",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let maps see the images' colours (default: with several sources)",
    )
    choose(
        "--background",
        type=background,
        default=None,
        help="index of a dominant class whose suppression is tried (default none)",
    )
    choose("--alpha", default="0.05", help="miscoverage rate of prediction sets (default 0.05)")
    choose("--max-error", default="0.05", help="bound of certified labels (default 0.05)")
    choose("--folds", type=whole(2), help="of the cross-validation (default 5; --fast 3)")
    choose("--components", type=whole(1), default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    choose("--seed", type=whole(0), default=0, help="seed of all draws (default 0)")
    command.set_defaults(run=_run, resumes=lambda arguments: True)


def _run(arguments: argparse.Namespace) -> int:
    from cpseg._internal.distributed import barrier
    from cpseg.report.choice import choose

    _complete(arguments)
    out = arguments.output
    state = _Steps(out, arguments)
    workers = _workers(arguments)
    if code := _alone([*_check(arguments), *workers]):
        return code
    page, facts = out / "report.html", out / "report.json"
    state.step("report", _report(arguments, page, facts), made=[page, facts], alone=True)
    found = json.loads(facts.read_text(encoding="utf-8"))
    rule = choose(found, arguments.keep, arguments.alpha, arguments.max_error)
    if rule is None:
        say("")
        say_paragraph(_labels_alone(found, out, arguments))
        return 0
    making, labelling, _ = found["rules"][rule]["commands"]
    making = _within(making, out)
    calibration = out / "rule.safetensors"
    code = state.step("rule", [*making[1:], *_seed(arguments)], made=[calibration])
    if code:
        return code
    labelling[labelling.index("--ids") + 1] = str(arguments.unlabelled)
    _do([*_within(labelling, out)[1:], *workers])
    barrier()
    say("")
    say_paragraph(_summary(found, rule, out))
    return 0


def _complete(arguments: argparse.Namespace) -> None:
    """Defaults that depend on the sources and on what is installed."""
    from importlib.util import find_spec

    from cpseg._internal.checks import message

    several = len(arguments.probs) > 1 or arguments.features is not None
    if arguments.colour is None:
        arguments.colour = several
    if arguments.recalibrate is None:
        trees = several and not arguments.fast and find_spec("sklearn") is not None
        arguments.recalibrate = ["none", "dirichlet", *(["trees"] if trees else [])]
    if arguments.prior_powers is None:
        arguments.prior_powers = [0.0, 0.25] if arguments.fast else [0.0, 0.125, 0.25, 0.5]
    if arguments.folds is None:
        arguments.folds = 3 if arguments.fast else 5
    if arguments.keep == "certified" and arguments.fast:
        fix = "leave one of them out"
        raise ValueError(message("run", "--keep certified or --fast", "both", fix))
    refuse_unused(arguments, set(arguments.recalibrate) != {"none"})
    _source(arguments)  # folders and maps are looked at before any work


def _source(arguments: argparse.Namespace) -> Source:
    """The labelled images; the list of the others is part of it with features alone."""
    known = vars(arguments) if arguments.features else vars(arguments) | {"unlabelled": None}
    return source_of(argparse.Namespace(**known))


def _check(arguments: argparse.Namespace) -> list[str]:
    data = data_words(_source(arguments), arguments)
    models = [word for model in data.models for word in model]
    more = ["--unlabelled", data.unlabelled, "-o", str(arguments.output / "check.png")]
    return ["check", *data.root, "--ids", data.ids, *models, *data.masks, *more]


def _report(arguments: argparse.Namespace, page: Path, facts: Path) -> list[str]:
    data = data_words(_source(arguments), arguments)
    models = [word for model in data.models for word in model]
    asked = ["report", *data.root, "--ids", data.ids, *models, *data.features, *data.masks]
    none = "none" if arguments.background is None else str(arguments.background)
    asked += ["--background", none, "--alpha", arguments.alpha, "--folds", str(arguments.folds)]
    asked += ["--recalibrate", ",".join(arguments.recalibrate)]
    asked += ["--prior-powers", ",".join(f"{power:g}" for power in arguments.prior_powers)]
    bounds = arguments.max_error if not arguments.fast else "none"
    asked += ["--max-error", bounds, *_seed(arguments)]
    for name in ("context", "scores"):
        if hasattr(arguments, name):
            value = getattr(arguments, name)
            text = value if isinstance(value, str) else ",".join(value) or "none"
            asked += [f"--{name}", text]
    asked += ["--colour"] if arguments.colour else []
    asked += ["--no-subsets"] if arguments.fast else []
    asked += [] if arguments.names is None else ["--names", str(arguments.names)]
    return [*asked, "-o", str(page), "--json", str(facts)]


def _workers(arguments: argparse.Namespace) -> list[str]:
    """Said where it is not the default; no step depends on it."""
    return [] if arguments.workers == 2 else ["--workers", str(arguments.workers)]


def _seed(arguments: argparse.Namespace) -> list[str]:
    return ["--seed", str(arguments.seed)] if arguments.seed else []


def _within(made: Sequence[str], out: Path) -> list[str]:
    """The words of a command with what it writes, or reads of that, in the folder."""
    from cpseg.report.commands import CALIBRATION, LABELS

    inside = {CALIBRATION: str(out / CALIBRATION), LABELS: str(out / LABELS)}
    after = ("--calibration", "-o")
    return [
        inside.get(word, word) if place and made[place - 1] in after else word
        for place, word in enumerate(made)
    ]


# --- steps ---------------------------------------------------------------------------------------


class _Steps:
    """The steps of a run; one that was done in the same way on the same files is not done again.

    Args:
        out: the folder, in which ``steps.json`` records them.
        arguments: those of the run.
    """

    def __init__(self, out: Path, arguments: argparse.Namespace) -> None:
        self._record = out / "steps.json"
        self._workers = _workers(arguments)
        self._inputs = _inputs(arguments)

    def step(
        self, name: str, words: list[str], *, made: Sequence[Path], alone: bool = False
    ) -> int:
        """Do a step and record it; returns the command's exit code.

        Args:
            name: of the step in the record.
            words: of the command.
            made: the files it writes.
            alone: on one process, where there are several.
        """
        from cpseg._internal.distributed import barrier, rank
        from cpseg._internal.safe_files import write_text
        from cpseg._version import __version__

        done = self._done()
        now = {"words": words, "inputs": self._inputs, "version": __version__}
        barrier()
        if done.get(name) == now and all(path.is_file() for path in made):
            say(f"$ {shlex.join(['cpseg', *words])}\n(done before)")
            return 0
        asked = [*words, *self._workers]
        code = _alone(asked) if alone else _do(asked)
        if code == 0 and rank() == 0:
            write_text(self._record, json.dumps(done | {name: now}, indent=1) + "\n")
        barrier()
        return code

    def _done(self) -> dict[str, Any]:
        try:
            found = json.loads(self._record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _inputs(arguments: argparse.Namespace) -> str:
    """A fingerprint of the files that a rule is made from, by their sizes and times."""
    from cpseg._internal.hashing import digest
    from cpseg.files.manifest import stamp

    source = _source(arguments)
    pairs = source.read_ids(arguments.ids)
    files = [path for each in source.locate(pairs).values() for path in each]
    files += [arguments.root / pair.mask for pair in pairs if pair.mask is not None]
    found = [(str(path), *stamp(path)[:2]) for path in files if path.is_file()]
    return digest([found, [*map(list, pairs)]])


def _do(words: list[str]) -> int:
    """Run a subcommand in this process; returns its exit code."""
    from cpseg.cli.command import parser

    say(f"$ {shlex.join(['cpseg', *words])}")
    arguments = parser().parse_args(words)
    return int(arguments.run(arguments) or 0)


def _alone(words: list[str]) -> int:
    """Run a subcommand that wants a single process; the other ranks wait for it.

    Raises:
        ValueError: on the other ranks, where it failed on the first.
    """
    from cpseg._internal.distributed import active, broadcast_from_rank0, rank

    if not active():
        return _do(words)
    code = 0
    if rank() == 0:
        say(f"$ {shlex.join(['cpseg', *words])}")
        single = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
        ran = subprocess.run([sys.executable, "-m", "cpseg", *words], env=single, check=False)
        code = ran.returncode
    code = broadcast_from_rank0([code])[0]
    if code not in (0, 1):
        raise ValueError(f"run: cpseg {words[0]} failed; see above")
    return code


_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# --- what came of it -----------------------------------------------------------------------------


def _labels_alone(found: dict[str, Any], out: Path, arguments: argparse.Namespace) -> str:
    """Where pseudo-labels would cost: the list for training has the labelled images alone."""
    from cpseg._internal.distributed import rank
    from cpseg.files.id_lists import write_ids

    if rank() == 0:
        pairs = _source(arguments).read_ids(arguments.ids)
        write_ids(out / "stage1.txt", [(pair.image, str(pair.mask)) for pair in pairs])
    return f"{found['advice'][0]} {out / 'stage1.txt'} lists the labelled images alone."


def _chosen(found: dict[str, Any], kind: str) -> str:
    """What the choice of the rule by the same images means for what is promised."""
    if kind == "eq4":
        return "; this does not take into account that the rule was chosen by these images"
    tried = found["certified_rules"]
    if kind != "certified" or tried == 1:
        return ""
    return (
        f"; it is one of {tried} rules and was chosen by these images, so that its delta is "
        f"{found['delta']} / {tried} and the statement holds with a confidence of "
        f"{100 * (1 - float(found['delta'])):g} % whichever was chosen"
    )


def _summary(found: dict[str, Any], rule: str, out: Path) -> str:
    """One paragraph: what was chosen and why, what it changes, what is promised, what is next."""
    from cpseg.calibration.calibration import Calibration

    chosen, base = (found["rules"][name]["figures"] for name in (rule, found["base"]))

    def percent(figures: dict[str, Any], name: str) -> str:
        return f"{100 * figures[name]['mean']:.1f} %"

    chosen_name, base_name = (found["rules"][name]["in_words"] for name in (rule, found["base"]))
    said = f"Chosen: {chosen_name}, by {found['folds']}-fold cross-validation on "
    said += f"{found['images']} labelled images."
    if rule == found["base"]:
        said += " No other rule was better by more than noise."
    said += f" On images that were not used to make it, it labels {percent(chosen, 'kept')} of the "
    said += f"pixels, of which {percent(chosen, 'wrong')} are wrong"
    if rule != found["base"]:
        said += f" ({base_name}: {percent(base, 'kept')} and {percent(base, 'wrong')})"
    said += f"; its mIoU over all pixels is {chosen['miou_all']['mean']:.3f}"
    if rule != found["base"]:
        said += f" ({base['miou_all']['mean']:.3f})"
        said += "; the rule was chosen by these figures, so that they are a little too good"
    calibration = Calibration.load(out / "rule.safetensors")
    said += f". Promised: {calibration.guarantee()}{_chosen(found, found['rules'][rule]['kind'])}. "
    if found["student"] is None:
        said += (
            "Whether a student gains by these labels is not known, since no source is a student "
        )
        said += "of these images (cpseg folds gives its scores, to be passed as one more --probs). "
    said += f"Next: train on {out / 'pseudo' / 'stage1.txt'}"
    said += ", and prove the labels by answering about some of their pixels (cpseg audit "
    said += f"{out / 'pseudo'}). {out / 'report.html'} shows what was tried, "
    return said + f"{out / 'check.png'} what the data look like."
