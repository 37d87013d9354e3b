"""What a sweep tries and on which images, and the file of a finished fold."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cpseg._internal.checks import check_alpha, check_choice, check_share, message
from cpseg._internal.hashing import digest
from cpseg._internal.safe_files import write_text
from cpseg.core.feature_projection import FeatureProjection
from cpseg.files.id_lists import Pair
from cpseg.files.splits import count_of_share, drawn_order
from cpseg.jobs.cross_validation import PLAIN, Fold, Scoring, Trial
from cpseg.jobs.settings import SweepSettings
from cpseg.jobs.sweep_table import ARGMAX, FIGURES, RAW
from cpseg.jobs.variants import LEARNED, VARIANTS
from cpseg.recalibration.features import CONTEXTS
from cpseg.recalibration.fit import METHODS
from cpseg.recalibration.recalibration import SCORES


class Setting(NamedTuple):
    """What a row of the sweep tried."""

    recalibrate: str
    prior_power: float
    variant: str
    background: int | None
    alpha: float | None


@dataclass(frozen=True)
class SweepPlan:
    """What is tried on a data set: the settings, with the sizes that its files have."""

    settings: SweepSettings
    size: tuple[int, int]
    num_classes: int
    classes: tuple[int, ...] = ()
    projection: FeatureProjection | None = None
    colour: bool = False

    @property
    def alphas(self) -> list[str]:
        """As they were given, from the largest (strictest) to the smallest."""
        given = map(str, self.settings.alphas)
        return sorted(given, key=lambda alpha: check_alpha("sweep", alpha), reverse=True)

    @property
    def scorings(self) -> list[Scoring]:
        """Every method with every prior power."""
        powers = [float(tau) for tau in self.settings.prior_powers]
        return [Scoring(name, tau) for name in self.settings.recalibrate for tau in powers]

    def trial(self) -> Trial:
        """What the engine is asked for."""
        asked = self.settings
        return Trial(
            scorings=self.scorings,
            variants=asked.variants,
            backgrounds=asked.backgrounds,
            alphas=[check_alpha("sweep", alpha) for alpha in self.alphas],
            num_classes=self.num_classes,
            size=self.size,
            block=asked.block,
            num_groups=asked.num_groups,
            context=asked.context,
            scores=asked.scores,
            seed=asked.seed,
            classes=self.classes,
            projection=self.projection,
            colour=self.colour,
        )

    def rows(self) -> list[Setting]:
        """Every row: the raw argmax, then an argmax and the rules of each scoring."""
        rows = [Setting(*PLAIN, RAW, None, None)]
        for scoring in self.scorings:
            if scoring != PLAIN:
                rows.append(Setting(*scoring, ARGMAX, None, None))
            for variant in self.settings.variants:
                for background in self.settings.backgrounds:
                    for alpha in self.alphas:
                        exact = float(check_alpha("sweep", alpha))
                        rows.append(Setting(*scoring, variant, background, exact))
        return rows

    def fingerprint(self, pairs: Sequence[Pair], **data: Any) -> str:
        """What must be the same for a sweep to go on in a folder."""
        asked = self.settings
        context = asked.context if isinstance(asked.context, str) else list(asked.context)
        settings = {
            "alphas": [str(check_alpha("sweep", alpha)) for alpha in self.alphas],
            "variants": list(asked.variants),
            "backgrounds": list(asked.backgrounds),
            "block": asked.block,
            "num_groups": asked.num_groups,
            "group_share": asked.group_share,
            "folds": asked.folds,
            "seed": asked.seed,
            "size": self.size,
            "num_classes": self.num_classes,
            "recalibrate": list(asked.recalibrate),
            "prior_powers": [float(tau) for tau in asked.prior_powers],
            "recalibrate_share": asked.recalibrate_share,
            "context": context,
            "scores": asked.scores,
        }
        return digest({"sweep": settings, "images": pairs, **data})


def check(settings: SweepSettings) -> None:
    """Refuse what cannot be swept, before any file is read.

    Raises:
        ValueError: an unknown word, a list that is empty or says a thing twice, a number outside
            its range, a share of 0 where groups or recalibrations need images of their own.
    """
    where, asked = "sweep", settings
    exact = [check_alpha(where, alpha) for alpha in asked.alphas]
    context = [asked.context] if isinstance(asked.context, str) else asked.context
    words = {
        "variants": (asked.variants, VARIANTS),
        "recalibrations": (asked.recalibrate, METHODS),
        "context": (() if asked.context == "auto" else context, CONTEXTS),
        "scores": (asked.scores.split(","), SCORES),
    }
    for name, (given, allowed) in words.items():
        for word in given:
            check_choice(where, word, allowed, name=name, fix="choose among them")
    for tau in asked.prior_powers:
        fix = "0 leaves the probabilities, 1 divides the whole prior out"
        check_share(where, tau, name="prior powers", fix=fix)
    lists: dict[str, Sequence[object]] = {
        "alphas": exact,
        "variants": asked.variants,
        "backgrounds": asked.backgrounds,
        "recalibrations": asked.recalibrate,
        "prior powers": asked.prior_powers,
    }
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            got = "none" if not values else "one twice"
            raise ValueError(message(where, f"{name}, each once", got, f"list the {name} to try"))
    if asked.group_share == 0 and learns(asked):
        expected = f"a --group-share above 0 for {' and '.join(LEARNED)}"
        fix = "0.3 learns the groups on 30 % of the images, which are then not used to calibrate"
        raise ValueError(message(where, expected, "0", fix))
    if asked.recalibrate_share == 0 and recalibrates(asked):
        expected = "a --recalibrate-share above 0 for recalibrations and prior powers"
        fix = "0.3 fits them on 30 % of the images, which are then not used to calibrate"
        raise ValueError(message(where, expected, "0", fix))


def learns(settings: SweepSettings) -> bool:
    """Whether some variant learns its groups."""
    return bool(set(settings.variants) & set(LEARNED))


def recalibrates(settings: SweepSettings) -> bool:
    """Whether some row uses other probabilities than the model's own."""
    return set(settings.recalibrate) != {"none"} or any(settings.prior_powers)


def deal(pairs: list[Pair], settings: SweepSettings) -> list[Fold]:
    """Images in a drawn order, dealt out to the folds.

    Of a fold's training images in a drawn order the first learn groups and the last fit
    recalibrations, so that neither part depends on the other.
    """
    shares = {
        "--group-share": settings.group_share * learns(settings),
        "--recalibrate-share": settings.recalibrate_share * recalibrates(settings),
    }
    generator = torch.Generator().manual_seed(settings.seed)
    folds = []
    order = drawn_order("sweep", len(pairs), settings.folds, generator)
    for number in range(settings.folds):
        testing = set(order[number :: settings.folds])
        training = [pair for place, pair in enumerate(pairs) if place not in testing]
        learning, recalibrating = (
            count_of_share("sweep", option, share, len(training)) if share else 0
            for option, share in shares.items()
        )
        if learning + recalibrating >= len(training):
            expected = f"shares that leave some of {len(training)} images to calibrate"
            got = " and ".join(f"{option} {share:g}" for option, share in shares.items())
            fix = "choose smaller shares, or label more images"
            raise ValueError(message("sweep", expected, got, fix))
        if learning + recalibrating:
            drawn = torch.randperm(len(training), generator=generator).tolist()
            training = [training[place] for place in drawn]
        end = len(training) - recalibrating
        tested = [pairs[place] for place in sorted(testing)]
        folds.append(Fold(training[:learning], training[end:], training[learning:end], tested))
    return folds


def fold_file(out: Path, number: int) -> Path:
    """Where the figures of a finished fold are kept."""
    return out / f"fold-{number}.json"


def write_fold(path: Path, plan: SweepPlan, figures: Sequence[dict[str, float]]) -> None:
    """Keep the figures of every setting of a fold."""
    rows: list[dict[str, Any]] = [
        setting._asdict()
        | {name: None if math.isnan(value) else value for name, value in values.items()}
        for setting, values in zip(plan.rows(), figures, strict=True)
    ]
    write_text(path, json.dumps(rows, indent=1) + "\n")


def read_fold(path: Path, plan: SweepPlan) -> list[dict[str, float]]:
    """What :func:`write_fold` wrote.

    Raises:
        ValueError: the file is damaged or of other settings.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if [Setting(*(row[name] for name in Setting._fields)) for row in rows] != plan.rows():
            raise ValueError("other settings")
        return [
            {name: math.nan if row[name] is None else float(row[name]) for name in FIGURES}
            for row in rows
        ]
    except (ValueError, TypeError, KeyError) as error:
        fix = "delete it: the fold is measured again"
        raise ValueError(message(str(path), "a finished fold", "a damaged one", fix)) from error
