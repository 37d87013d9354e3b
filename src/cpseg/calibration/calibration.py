"""``Calibration``: the thresholds of a grid, what they were made from, and what they select."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cpseg._internal import words
from cpseg._internal.checks import (
    check_alpha,
    check_background,
    check_ignore_index,
    is_whole,
    message,
    shape,
)
from cpseg._internal.fields import Valid, among, or_none, read_fields, text, truth, whole
from cpseg._internal.safe_files import read_tensors, write_tensors
from cpseg._version import __version__
from cpseg.calibration.certificate import Certificate
from cpseg.calibration.display import as_html, plot, summary
from cpseg.calibration.guarantee import guarantee
from cpseg.calibration.provenance import Provenance
from cpseg.core.nonconformity import check_score
from cpseg.core.selection import (
    Evidence,
    evidence,
    prediction_set,
    pseudo_labels,
    threshold_of,
)
from cpseg.groups.fixed import check_size
from cpseg.groups.resampling import to_image
from cpseg.recalibration.recalibration import Recalibration, join_for
from cpseg.recalibration.sources import Probs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FIX = "run cpseg calibrate anew"
UNITS = words.UNITS

_FORMAT = 1
_RECALIBRATION = "recalibration."  # prefix of the names of its tensors in a file
_TENSORS = ("threshold", "count", "level", "class_threshold")


@dataclass(frozen=True, repr=False)
class Calibration:
    """Thresholds for every cell of a grid, and what they were made from.

    Attributes:
        threshold: float32 ``[H, W]``, or ``[K, H, W]`` per class; +inf where there were too few
            scores for this alpha, so that every class is in the set.
        count: int64, the number of scores behind each threshold; of images where those are the
            unit.
        alpha: miscoverage rate; 0 where no threshold leaves anything out, so that every pixel gets
            its most probable class.
        num_images: images behind the calibration.
        num_classes: number of classes K; None where only scores were given.
        background: index of the dominant class that selection suppresses, or None.
        score: name of the nonconformity score; labels are selected by ``"lac"`` alone.
        ignore_index: label of void and of ignored pixels.
        variant: how cells share thresholds, in a word: ``"pixel"``, ``"groups"``, or what the
            command was asked for.
        unit: what is exchangeable in a pooled group, ``"pixel"`` or ``"image"``.
        randomized: whether the scores were randomised, so that sets need a generator too.
        level: uint8, which level of a fallback gave each threshold: 0 for the groups themselves;
            None without a fallback.
        class_threshold: float32 ``[K, H, W]``, which a label must pass for its own class besides
            ``threshold``; -inf for a class whose labels are ignored. None where there is none.
        certificate: what a :class:`Certifier` proved about these labels, or None.
        recalibration: the recalibration applied to probabilities first, or None.
        extra: which images made it and how its data set was read, a :class:`Provenance`; a plain
            mapping of its JSON form becomes one.

    Guarantee:
        Pixel-wise: for each cell with n scores, P(y in C) at that cell of a new image lies in
        [1 - alpha, 1 - alpha + 1/(n + 1)] (upper end without ties), where images are exchangeable
        and the score function was fixed before calibration. Pooled groups with ``unit="image"``:
        the expected share of a new image's pixels in that group (and of that class, if per class)
        whose class is not in the set is at most alpha, among images that have such pixels. Pooled
        groups with ``unit="pixel"``: no finite-sample promise, since the pixels of an image are
        not exchangeable with those of another. With a fallback the cells of level 0 keep their
        promise; those that fell back have none, since they are not a fair sample of the coarser
        group. The chosen pseudo-label is not covered by any of these.

    Reference:
        Angelopoulos & Bates (2023), section 1; for images as units Angelopoulos et al. (2024),
        Conformal risk control, theorem 1.
    """

    threshold: Tensor
    count: Tensor
    alpha: float
    num_images: int
    num_classes: int | None
    background: int | None = None
    score: str = "lac"
    ignore_index: int = 255
    variant: str = "groups"
    unit: str = "pixel"
    randomized: bool = False
    level: Tensor | None = None
    recalibration: Recalibration | None = None
    class_threshold: Tensor | None = None
    certificate: Certificate | None = None
    extra: Mapping[str, Any] = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        if not isinstance(self.extra, Provenance):
            provenance = Provenance.from_json(self.extra, where="Calibration")
            object.__setattr__(self, "extra", provenance)

    @property
    def provenance(self) -> Provenance:
        """``extra``, typed: which images made the calibration."""
        assert isinstance(self.extra, Provenance)
        return self.extra

    def __repr__(self) -> str:
        per_class = self.threshold.ndim == 3 or self.class_threshold is not None
        parts = [
            self.variant,
            "per class" if per_class else "",
            f"score {self.score}" if self.score != "lac" else "",
            f"{self.num_classes or 'unknown'} classes",
            f"grid {self.grid[0]}x{self.grid[1]}",
            f"alpha {self.alpha:g}",
            f"{self.num_images} images",
            "no background" if self.background is None else f"background {self.background}",
            f"{100 * self.infinite_share:.1f} % infinite",
            "" if self.recalibration is None else "recalibrated",
            "" if self.certificate is None else self.certificate.verdict,
        ]
        return f"Calibration({', '.join(filter(None, parts))})"

    def summary(self, names: Sequence[str] | None = None) -> str:
        """What it is and what it promises, a fact to a line.

        Args:
            names: of the classes, in their order; by default their numbers.

        Raises:
            ValueError: another number of names than classes.

        Example:
            >>> calibration = Calibration(torch.tensor([[0.25]]), torch.tensor([[9]]), alpha=0.1,
            ...                           num_images=9, num_classes=2, background=0)
            >>> print(calibration.summary(["road", "car"]))  # doctest: +ELLIPSIS
            thresholds    groups, alpha 0.1, grid 1x1
            their values  0.250, 0.0 % infinite
            made from     9 labelled images
            classes       2: road, car
            suppressed    road, where an object is in the set too
            promised      nothing: ...
        """
        return summary(self, names)

    def plot(self, names: Sequence[str] | None = None) -> Figure:
        """The thresholds as a picture; with thresholds per class a panel for each.

        Args:
            names: of the classes, in their order; by default their numbers.

        Returns:
            A matplotlib figure, which notebooks show; ``savefig`` writes it.

        Raises:
            ImportError: matplotlib is missing; names the extra.
            ValueError: a calibration without thresholds, or another number of names than classes.
        """
        return plot(self, names)

    def _repr_html_(self) -> str:
        return as_html(self)

    def guarantee(self) -> str:
        """The promise on new images in words; see :func:`cpseg.calibration.guarantee`.

        Returns:
            One line: over which unit, under which assumption, and what is not promised.
        """
        return guarantee(self)

    @property
    def infinite_share(self) -> float:
        """Share of thresholds that are +inf: too few scores there for this alpha."""
        return float(self.threshold.isposinf().to(torch.float64).mean())

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid."""
        return self.threshold.shape[-2], self.threshold.shape[-1]

    def resize(self, size: tuple[int, int]) -> Calibration:
        """The same calibration with its maps sampled (nearest) at another size.

        Example:
            >>> calibration = Calibration(torch.tensor([[0.1, 0.2]]), torch.tensor([[9, 9]]),
            ...                           alpha=0.1, num_images=9, num_classes=3)
            >>> calibration.resize((1, 4)).threshold
            tensor([[0.1000, 0.1000, 0.2000, 0.2000]])
        """
        size = check_size("Calibration.resize", size)
        return self._each_tensor(lambda values: to_image(values, size))

    def to(self, device: torch.device | str) -> Calibration:
        """The same calibration on another device."""
        recalibration = None if self.recalibration is None else self.recalibration.to(device)
        moved = self._each_tensor(lambda values: values.to(device))
        return replace(moved, recalibration=recalibration)

    def _tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names of their fields; None is left out."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return {name: values for name, values in tensors.items() if values is not None}

    def _each_tensor(self, function: Callable[[Tensor], Tensor]) -> Calibration:
        tensors = {name: function(values) for name, values in self._tensors().items()}
        return replace(self, **tensors)  # type: ignore[arg-type]

    def prediction_set(self, probs: Probs, *, generator: torch.Generator | None = None) -> Tensor:
        """:func:`cpseg.prediction_set` with this threshold and score at the size of ``probs``.

        Args:
            probs: probabilities ``[B, K, H, W]`` or ``[K, H, W]`` of any size; of several sources
                those that its recalibration takes, here and in what follows.
            generator: draws where the calibration is randomised, and only there.
        """
        where = "Calibration.prediction_set"
        probs = self.join(probs, where=where)
        if self.randomized != (generator is not None):
            expected = "a generator: the calibration is randomised"
            if not self.randomized:
                expected = "no generator: the calibration is not randomised"
            got = "none" if generator is None else "one"
            raise ValueError(
                message(where, expected, got, "make sets with the score used in calibration")
            )
        threshold = to_image(self.threshold, (probs.shape[-2], probs.shape[-1]))
        if self.recalibration is not None:
            probs = self.recalibration(probs)
        return prediction_set(probs, threshold, score=self.score, generator=generator)

    def evidence(self, probs: Probs) -> Evidence:
        """:func:`cpseg.evidence` with this calibration's recalibration and background.

        Args:
            probs: probabilities of the model, ``[B, S, H, W]`` or ``[S, H, W]`` of any size.
        """
        probs = self.join(probs, where="Calibration.evidence")
        if self.recalibration is not None:
            return self.recalibration.evidence(probs, background=self.background)
        return evidence(probs, background=self.background)

    def pseudo_labels(self, probs: Probs | Evidence, *, dtype: torch.dtype = torch.int64) -> Tensor:
        """:func:`cpseg.pseudo_labels` with this threshold, background and ``ignore_index``.

        Args:
            probs: probabilities of the model, ``[B, K, H, W]`` or ``[K, H, W]`` of any size, or
                the :class:`Evidence` that :meth:`evidence` made from them.
            dtype: integer dtype of the labels.

        Raises:
            ValueError: another number of classes, background or recalibration, another device,
                evidence for thresholds per class, or a score other than LAC.
        """
        where = "Calibration.pseudo_labels"
        if self.score != "lac":
            expected, got = "a calibration of the lac score to select labels", repr(self.score)
            fix = "calibrate with score='lac'; other scores give prediction sets"
            raise ValueError(message(where, expected, got, fix))
        if isinstance(probs, Evidence):
            made = (probs.num_classes, probs.background)
            if made != (self.num_classes or made[0], self.background):
                expected = f"evidence of {self.num_classes} classes, background {self.background}"
                got = f"{made[0]} classes, background {made[1]}"
                raise ValueError(message(where, expected, got, "make it with this calibration's"))
            own = None if self.recalibration is None else self.recalibration.fingerprint
            if probs.recalibration != own:
                expected = f"evidence made with {_which_map(own)}"
                got = f"evidence made with {_which_map(probs.recalibration)}"
                fix = "make it by Calibration.evidence or cpseg compact --calibration"
                raise ValueError(message(where, expected, got, fix))
            threshold = to_image(self.threshold, (probs.best.shape[-2], probs.best.shape[-1]))
            labels = probs.pseudo_labels(threshold, ignore_index=self.ignore_index, dtype=dtype)
            return self._apply_class_threshold(labels, probs)
        probs = self.join(probs, where=where)
        if self.threshold.ndim == 3 and self.recalibration is not None:
            probs = self.recalibration(probs)
        elif self.class_threshold is not None or self.recalibration is not None:
            return self.pseudo_labels(self.evidence(probs), dtype=dtype)
        return pseudo_labels(
            probs,
            to_image(self.threshold, (probs.shape[-2], probs.shape[-1])),
            background=self.background,
            ignore_index=self.ignore_index,
            dtype=dtype,
        )

    def _apply_class_threshold(self, labels: Tensor, evidence: Evidence) -> Tensor:
        """The labels that pass their own class's threshold; the others are ignored."""
        if self.class_threshold is None:
            return labels
        threshold = to_image(self.class_threshold, (labels.shape[-2], labels.shape[-1]))
        threshold = threshold_of(labels, threshold, ignore_index=self.ignore_index)
        inside = evidence.score_of(labels, ignore_index=self.ignore_index) <= threshold
        return labels.masked_fill(~inside, self.ignore_index)

    def save(self, path: str | Path) -> None:
        """Write thresholds, counts and metadata as safetensors, atomically."""
        metadata = {
            "kind": "calibration",
            "format": _FORMAT,
            "cpseg": __version__,
            "alpha": self.alpha,
            "variant": self.variant,
            "score": self.score,
            "num_classes": self.num_classes,
            "num_images": self.num_images,
            "grid": list(self.grid),
            "background": self.background,
            "ignore_index": self.ignore_index,
            "unit": self.unit,
            "randomized": self.randomized,
            "extra": self.provenance.to_json(),
        }
        if self.certificate is not None:
            metadata["certificate"] = self.certificate.to_json()
        tensors = self._tensors()
        if self.recalibration is not None:
            metadata["recalibration"] = self.recalibration.metadata()
            parts = self.recalibration.tensors().items()
            tensors |= {_RECALIBRATION + name: part for name, part in parts}
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is damaged, of a later format, or not a calibration.
            FileNotFoundError: there is no such file.
        """
        tensors, metadata = read_tensors(path)
        return cls.from_parts(tensors, metadata, where=str(path))

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        *,
        where: str = "Calibration.from_parts",
    ) -> Calibration:
        """The calibration that the tensors and the metadata of a file describe.

        Args:
            tensors: thresholds, counts and what else :meth:`save` writes.
            metadata: the table; further entries are ignored.
            where: who asks, for messages: a file's name.

        Raises:
            ValueError: a part is missing, damaged, of a later format or does not fit the others.
        """
        got = f"kind {metadata.get('kind')!r} of format {metadata.get('format')}"
        if metadata.get("kind") != "calibration" or metadata.get("format") != _FORMAT:
            raise ValueError(message(where, f"a calibration of format {_FORMAT}", got, _FIX))
        for name in ("threshold", "count"):
            if name not in tensors:
                raise ValueError(message(where, f"{name!r} in it", "nothing", _FIX))
        fields = read_fields(where, {**_DEFAULTS, **metadata}, _FIELDS, fix=_FIX)
        check_score(where, fields["score"])
        if fields["alpha"] != 0 or not bool(tensors["threshold"].isposinf().all()):
            check_alpha(where, fields["alpha"])
        check_background(where, fields["background"], fields["num_classes"] or 2**15)
        check_ignore_index(where, fields["ignore_index"], fields["num_classes"] or 0)
        grid = check_size(where, fields.pop("grid"), name="grid")
        fields["extra"] = Provenance.from_json(fields["extra"], where=where)
        if "certificate" in metadata:
            fields["certificate"] = Certificate.from_json(metadata["certificate"], where=where)
        calibration = cls(
            **{name: tensors.get(name) for name in _TENSORS},  # type: ignore[arg-type]
            **fields,
            recalibration=_recalibration(where, tensors, metadata),
        )
        calibration._check_tensors(where, grid)
        return calibration

    def _check_tensors(self, where: str, grid: tuple[int, int]) -> None:
        """Tensors and metadata belong together."""
        per_class = (self.num_classes, *grid)
        threshold = self.threshold
        if tuple(threshold.shape) not in (grid, per_class) or not _is_threshold(threshold):
            expected, got = f"float32 thresholds of the grid {list(grid)}", _kind(threshold)
            raise ValueError(message(where, expected, got, _FIX))
        if self.count.shape != threshold.shape or self.count.dtype != torch.int64:
            expected, got = f"int64 counts {shape(threshold)}", _kind(self.count)
            raise ValueError(message(where, expected, got, _FIX))
        recalibration = self.recalibration
        if recalibration is not None and recalibration.num_classes != self.num_classes:
            expected = f"a recalibration to {self.num_classes} classes"
            raise ValueError(message(where, expected, f"{recalibration.num_classes}", _FIX))
        level = self.level
        if level is not None and (level.shape, level.dtype) != (threshold.shape, torch.uint8):
            expected = f"uint8 fallback levels {shape(threshold)}"
            raise ValueError(message(where, expected, _kind(level), _FIX))
        of_class = self.class_threshold
        if of_class is not None and (of_class.shape != per_class or not _is_threshold(of_class)):
            expected, got = "float32 thresholds of every class", _kind(of_class)
            raise ValueError(message(where, expected, got, _FIX))

    @property
    def num_source(self) -> int | None:
        """Number of classes of the model: K, unless a recalibration maps others onto them."""
        return self.num_classes if self.recalibration is None else self.recalibration.num_source

    def join(
        self, probs: Probs, *, check_values: bool = False, where: str = "Calibration.join"
    ) -> Tensor:
        """The scores of several sources as one tensor, see :meth:`cpseg.Recalibration.join`.

        Raises:
            ValueError: other sources or classes than those of the calibration.
            TypeError: not floating point.
        """
        joined = join_for(where, self.recalibration, probs, check_values=check_values)
        if self.recalibration is None and self.num_classes not in (None, joined.shape[-3]):
            fix = "apply a calibration to the scores of the model that it was made from"
            expected = f"{self.num_classes} classes as calibrated"
            raise ValueError(message(where, expected, f"probs {shape(joined)}", fix))
        return joined


def _which_map(fingerprint: str | None) -> str:
    return "no recalibration" if fingerprint is None else f"recalibration {fingerprint}"


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {shape(tensor)}"


def _is_threshold(values: Tensor) -> bool:
    return values.dtype == torch.float32 and not bool(values.isnan().any())


def _recalibration(
    where: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> Recalibration | None:
    """The recalibration in the file of a calibration, or None."""
    parts = {
        name.removeprefix(_RECALIBRATION): values
        for name, values in tensors.items()
        if name.startswith(_RECALIBRATION)
    }
    if not parts and "recalibration" not in metadata:
        return None
    facts = metadata.get("recalibration")
    if not isinstance(facts, dict):
        got = repr(facts)[:80]
        raise ValueError(message(where, "the facts of its recalibration", got, _FIX))
    return Recalibration.from_parts(parts, facts, where=where)


# Metadata that older files lack, and what each entry must be.
_DEFAULTS: dict[str, Any] = {"unit": "pixel", "randomized": False}
_FIELDS: dict[str, Valid] = {
    "alpha": lambda value: True,  # check_alpha says more
    "num_images": whole,
    "num_classes": or_none(whole),
    "background": lambda value: True,
    "score": text,
    "ignore_index": lambda value: is_whole(value, -(2**31)),
    "variant": text,
    "extra": lambda value: True,
    "unit": among(UNITS),
    "randomized": truth,
    "grid": lambda value: True,
}
