"""What a sweep tries and on which images, and the file of a finished fold."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cpseg._internal.checks import check_alpha, message
from cpseg._internal.hashing import digest
from cpseg._internal.safe_files import write_text
from cpseg.files.id_lists import Pair
from cpseg.jobs.recalibrate import RecalibrationOptions
from cpseg.jobs.sweep_table import ARGMAX, FIGURES, RAW
from cpseg.jobs.variants import LEARNED, VARIANTS
from cpseg.recalibration.features import CONTEXTS
from cpseg.recalibration.fit import METHODS
from cpseg.recalibration.recalibration import SCORES
from cpseg.recalibration.recalibrator import Recalibrator


class Scoring(NamedTuple):
    """How the model's scores are refitted: by which map, with which prior power."""

    recalibrate: str
    prior_power: float


PLAIN = Scoring("none", 0.0)  # the model's scores as they are


class Setting(NamedTuple):
    """What a row of the sweep tried."""

    recalibrate: str
    prior_power: float
    variant: str
    background: int | None
    alpha: float | None


class Fold(NamedTuple):
    """Images of a fold: for groups, for maps, for thresholds, and those that measure.

    What fits maps calibrates the model's own scores all the same, and what learns groups
    calibrates the variants that learn nothing.
    """

    learning: list[Pair]
    fitting: list[Pair]
    calibrating: list[Pair]
    testing: list[Pair]


class Plan(NamedTuple):
    """What is tried, alphas from the largest (strictest) to the smallest, and on which cells."""

    alphas: list[str]
    variants: list[str]
    backgrounds: list[int | None]
    block: int
    num_groups: int
    group_share: float
    folds: int
    seed: int
    size: tuple[int, int]
    num_classes: int
    recalibrate: list[str]
    prior_powers: list[float]
    recalibrate_share: float
    context: str | list[str]
    scores: str

    def scorings(self) -> list[Scoring]:
        """Every map with every prior power."""
        return [Scoring(name, tau) for name in self.recalibrate for tau in self.prior_powers]

    def settings(self) -> list[Setting]:
        """Every row: the raw argmax, then an argmax and the rules of each way to score."""
        tried = [Setting(*PLAIN, RAW, None, None)]
        for scoring in self.scorings():
            if scoring != PLAIN:
                tried.append(Setting(*scoring, ARGMAX, None, None))
            for variant in self.variants:
                for background in self.backgrounds:
                    for alpha in self.alphas:
                        exact = float(check_alpha("sweep", alpha))
                        tried.append(Setting(*scoring, variant, background, exact))
        return tried

    def recalibrators(self) -> dict[str, Recalibrator]:
        """Fresh ones, one a method, whatever the prior powers."""
        methods = dict.fromkeys(each.recalibrate for each in self.scorings() if each != PLAIN)
        made = {}
        for method in methods:
            context = self.context if method in ("vector", "dirichlet") else ()
            refit = RecalibrationOptions(method, context=context, scores=self.scores)
            made[method] = refit.recalibrator(self.num_classes, self.seed)
        return made

    def fingerprint(self, pairs: Sequence[Pair], **data: Any) -> str:
        """What must be the same for a sweep to go on in a folder."""
        settings = self._asdict()
        settings["alphas"] = [str(check_alpha("sweep", alpha)) for alpha in self.alphas]
        return digest({"sweep": settings, "images": pairs, **data})


def check(
    *,
    alphas: Sequence[float | str],
    variants: Sequence[str],
    backgrounds: Sequence[int | None],
    group_share: float,
    recalibrate: Sequence[str],
    prior_powers: Sequence[float],
    recalibrate_share: float,
    context: str | Sequence[str],
    scores: str,
) -> None:
    """Refuse what cannot be swept, before any file is read.

    Raises:
        ValueError: an unknown word, a list that is empty or says a thing twice, a number outside
            its range, a share of 0 where groups or maps need images of their own.
    """
    exact = [check_alpha("sweep", alpha) for alpha in alphas]
    parts = [context] if isinstance(context, str) else context
    words = {
        "variants": (variants, VARIANTS),
        "recalibrations": (recalibrate, METHODS),
        "context": (() if context == "auto" else parts, CONTEXTS),
        "scores": ([scores], SCORES),
    }
    for name, (given, allowed) in words.items():
        for word in given:
            if word not in allowed:
                expected = f"{name} among {', '.join(allowed)}"
                raise ValueError(message("sweep", expected, repr(word), "choose among them"))
    for tau in prior_powers:
        if not isinstance(tau, (int, float)) or not 0 <= tau <= 1:
            fix = "0 leaves the scores, 1 divides the whole prior out"
            raise ValueError(message("sweep", "prior powers in [0, 1]", repr(tau), fix))
    lists: dict[str, Sequence[object]] = {
        "alphas": exact,
        "variants": variants,
        "backgrounds": backgrounds,
        "recalibrations": recalibrate,
        "prior powers": prior_powers,
    }
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            got = "none" if not values else "one twice"
            raise ValueError(message("sweep", f"{name}, each once", got, f"list the {name} to try"))
    if group_share == 0 and set(variants) & set(LEARNED):
        expected = f"a --group-share above 0 for {' and '.join(LEARNED)}"
        fix = "0.3 learns the groups on 30 % of the images, which then do not calibrate them"
        raise ValueError(message("sweep", expected, "0", fix))
    if recalibrate_share == 0 and (set(recalibrate) != {"none"} or any(prior_powers)):
        expected = "a --recalibrate-share above 0 for recalibrated scores and prior powers"
        fix = "0.3 fits them on 30 % of the images, which then do not calibrate them"
        raise ValueError(message("sweep", expected, "0", fix))


def deal(
    pairs: list[Pair], folds: int, group_share: float, recalibrate_share: float, seed: int
) -> list[Fold]:
    """Images in a drawn order, dealt out to the folds.

    Of a fold's training images in a drawn order the first learn groups and the last fit maps, so
    that neither part depends on the other.
    """
    if len(pairs) < 2:
        fix = "label more: some calibrate and others measure"
        raise ValueError(message("sweep", "at least 2 labelled images", f"{len(pairs)}", fix))
    if not 2 <= folds <= len(pairs):
        expected = f"2 to {len(pairs)} folds for {len(pairs)} labelled images"
        raise ValueError(message("sweep", expected, f"{folds}", "pass another --folds"))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pairs), generator=generator).tolist()
    parts = []
    for number in range(folds):
        testing = set(order[number::folds])
        training = [pair for place, pair in enumerate(pairs) if place not in testing]
        learn = _count("--group-share", group_share, len(training))
        fit = _count("--recalibrate-share", recalibrate_share, len(training))
        if learn + fit >= len(training):
            expected = f"shares that leave some of {len(training)} images to calibrate"
            got = f"--group-share {group_share:g} and --recalibrate-share {recalibrate_share:g}"
            fix = "choose smaller shares, or label more images"
            raise ValueError(message("sweep", expected, got, fix))
        if learn + fit:
            drawn = torch.randperm(len(training), generator=generator).tolist()
            training = [training[place] for place in drawn]
        end = len(training) - fit
        parts.append(
            Fold(
                training[:learn],
                training[end:],
                training[learn:end],
                [pairs[place] for place in sorted(testing)],
            )
        )
    return parts


def _count(option: str, part: float, images: int) -> int:
    """How many images a share is; some are left over."""
    count = round(part * images)
    if part != 0 and not 0 < count < images:
        expected = f"a {option} that splits {images} images in two"
        raise ValueError(message("sweep", expected, f"{part:g}", "choose another share"))
    return count


def fold_file(out: Path, number: int) -> Path:
    """Where the figures of a finished fold are kept."""
    return out / f"fold-{number}.json"


def write_fold(path: Path, plan: Plan, figures: Sequence[dict[str, float]]) -> None:
    """Keep the figures of every setting of a fold."""
    rows: list[dict[str, Any]] = [
        setting._asdict()
        | {name: None if math.isnan(value) else value for name, value in values.items()}
        for setting, values in zip(plan.settings(), figures, strict=True)
    ]
    write_text(path, json.dumps(rows, indent=1) + "\n")


def read_fold(path: Path, plan: Plan) -> list[dict[str, float]]:
    """What :func:`write_fold` wrote.

    Raises:
        ValueError: the file is damaged or of other settings.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if [Setting(*(row[name] for name in Setting._fields)) for row in rows] != plan.settings():
            raise ValueError("other settings")
        return [
            {name: math.nan if row[name] is None else float(row[name]) for name in FIGURES}
            for row in rows
        ]
    except (ValueError, TypeError, KeyError) as error:
        fix = "delete it: the fold is measured again"
        raise ValueError(message(str(path), "a finished fold", "a damaged one", fix)) from error
