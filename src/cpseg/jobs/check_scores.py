"""Score files as they lie on disk: layout, logits or probabilities, ranges; what a check says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cpseg.core.class_map import ClassMap
from cpseg.core.score_reading import ScoreReading
from cpseg.files.score_files import no_probabilities, read_stored
from cpseg.jobs.check_findings import Finding, counted, error, listed, ok, percent, warning

Size = tuple[int, int]
Array = npt.NDArray[Any]
MOST_PIXELS = 2**17  # of an image are looked at, evenly spaced
_ROUNDING = 0.02  # of sums of probabilities in half precision
_SLIGHTLY = 1e-2  # values this far outside [0, 1] are rounding or interpolation


def read_raw_scores(path: Path, entry: str | None = None) -> Array:
    """The array in a score file as it is stored, of any shape and dtype.

    Args:
        path: the file.
        entry: the key of the image's scores in a file with those of all images.

    Raises:
        ValueError: a damaged file, several arrays of which none is ``probs``, or evidence.
        FileNotFoundError: there is no such file.
    """
    stored = read_stored(path, entry)
    if not isinstance(stored, Tensor):
        raise no_probabilities(path)
    if str(stored.dtype) == "torch.bfloat16":
        stored = stored.float()
    array: Array = stored.detach().numpy()
    return array


# --- layout ------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How the axes of a score array belong to an image.

    Attributes:
        kind: ``same`` size, ``low`` or ``high`` resolution, ``turned`` (height and width swapped),
            or ``other``; ``rank`` where there are not three axes.
        classes_last: whether the last axis is that of the classes.
    """

    kind: str
    classes_last: bool


def layout_of(shape: Sequence[int], size: Size, *, last_first: bool = False) -> Layout:
    """How an array of this shape fits an image of this height and width.

    Args:
        shape: of the array.
        size: height and width.
        last_first: where classes may be the first axis as well as the last, they are the last.
    """
    if len(shape) != 3 or 0 in shape:
        return Layout("rank", False)
    first, last = (shape[1], shape[2]), (shape[0], shape[1])
    places = [(first, False), (last, True)]
    places = places[::-1] if last_first else places
    for sides, classes_last in places:
        if sides == size:
            return Layout("same", classes_last)
    for sides, classes_last in places:
        if min(sides) > 1 and _same_aspect(sides, size):
            return Layout("low" if sides[0] < size[0] else "high", classes_last)
    if first == size[::-1]:
        return Layout("turned", False)
    return Layout("other", shape[2] < shape[0] and shape[2] < shape[1])


def _same_aspect(sides: Size, size: Size) -> bool:
    """Whether a smaller or larger grid covers the image, up to one cell."""
    across = sides[0] * size[1] / size[0]
    down = sides[1] * size[0] / size[1]
    return abs(sides[1] - across) <= 1 or abs(sides[0] - down) <= 1


# --- values ------------------------------------------------------------------------------------


@dataclass
class ScoreFacts:
    """What the score files of one model have in common, collected file by file."""

    prefix: str  # of what is said: empty, or the folder where there are several
    class_map: ClassMap | None = None
    reading: ScoreReading = field(default_factory=ScoreReading)
    dtypes: set[str] = field(default_factory=set)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by image
    layouts: dict[str, tuple[Layout, Size]] = field(default_factory=dict)  # by image
    classes: dict[int, str] = field(default_factory=dict)  # number of classes: an image
    low: float = np.inf
    high: float = -np.inf
    not_finite: dict[str, int] = field(default_factory=dict)  # values that are NaN, inf
    files_not_finite: int = 0
    sums: list[Array] = field(default_factory=list)
    log_sums: list[Array] = field(default_factory=list)
    flat: int = 0  # files in which every pixel has the same scores for all classes

    def layout_of(self, shape: Sequence[int], size: Size) -> Layout:
        """How an array fits an image, by the reading where there is a choice."""
        return layout_of(shape, size, last_first=self.reading.layout == "hwc")

    def add(self, image: str, stored: Array, size: Size) -> Array | None:
        """Look at a file.

        Returns:
            The argmax ``[h, w]`` of evenly spaced pixels, in the classes of the data set; None
            where the scores cannot be laid on the image.

        Args:
            image: its name in the list.
            stored: the array of the file.
            size: height and width of the mask, or of the image.
        """
        layout = self.layout_of(stored.shape, size)
        self.dtypes.add(str(stored.dtype))
        self.shapes[image], self.layouts[image] = tuple(stored.shape), (layout, size)
        if layout.kind == "rank" or stored.dtype.kind not in "fiu":
            return None
        scores = np.moveaxis(stored, 2, 0) if layout.classes_last else stored
        self.classes.setdefault(len(scores), image)
        if self.class_map is not None and len(self.class_map.target) != len(scores):
            return None
        step = max(1, int(np.ceil(np.sqrt(scores[0].size / MOST_PIXELS))))
        with np.errstate(over="ignore", invalid="ignore"):
            self._add_values(stored)
            few = scores[:, step // 2 :: step, step // 2 :: step].astype(np.float32)
            if stored.dtype == np.uint8:
                few = few / np.float32(255)
            few = np.nan_to_num(few, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
            self.sums.append(few.sum(0).ravel()[::7])
            best = few.max(0)
            self.log_sums.append((best + np.log(np.exp(few - best).sum(0))).ravel()[::7])
        self.flat += len(few) > 1 and bool((few == few[:1]).all())
        if layout.kind in ("turned", "other"):
            return None
        best_class: Array = self._mapped(few).argmax(0)
        return best_class

    def _mapped(self, few: Array) -> Array:
        """The scores in the classes of the data set, close enough for the argmax."""
        if self.class_map is None:
            return few
        if self.low < 0:
            few = np.exp(few - few.max(0))
        merged = np.zeros((self.class_map.num_classes, *few.shape[1:]), np.float32)
        for number, target in enumerate(self.class_map.target):
            if target is not None and self.class_map.reduce == "sum":
                merged[target] += few[number]
            elif target is not None:
                merged[target] = np.maximum(merged[target], few[number])
        return merged

    def _add_values(self, stored: Array) -> None:
        low, high = float(stored.min()), float(stored.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            self.files_not_finite += 1
            for kind, where in (("NaN", np.isnan(stored)), ("infinite", np.isinf(stored))):
                self.not_finite[kind] = self.not_finite.get(kind, 0) + int(where.sum())
            finite = stored[np.isfinite(stored)]
            low, high = (finite.min(), finite.max()) if finite.size else (np.inf, -np.inf)
        scale = 255 if stored.dtype == np.uint8 else 1
        self.low, self.high = min(self.low, low / scale), max(self.high, high / scale)

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the data set, where all files agree."""
        if len(self.classes) != 1:
            return None
        (number,) = self.classes
        if self.class_map is None:
            return number
        return self.class_map.num_classes if len(self.class_map.target) == number else None

    def findings(self) -> list[Finding]:
        """What to say of the files."""
        if not self.shapes:
            return []
        return [*self._shape_findings(), *self._value_findings()]

    # --- shapes

    def _shape_findings(self) -> list[Finding]:
        found: list[Finding] = []
        by_kind: dict[Layout, list[str]] = {}
        for image, (layout, _) in self.layouts.items():
            by_kind.setdefault(layout, []).append(image)
        if len(self.classes) > 1:
            said = [f"{count} in {image}" for count, image in sorted(self.classes.items())]
            text = f"{self.prefix}score files differ in their number of classes: {listed(said)}; "
            found.append(error("classes", text + "use the scores of one model"))
        mapped = self.class_map and len(self.class_map.target)
        if mapped and set(self.classes) - {mapped}:
            number = min(set(self.classes) - {mapped})
            text = f"{self.prefix}scores have {number} classes, --class-map maps {mapped}; "
            found.append(error("classes", text + "list every class of the model"))
        for layout, images in by_kind.items():
            found += self._of_layout(layout, images[0], len(images))
        return found

    def _of_layout(self, layout: Layout, image: str, count: int) -> list[Finding]:
        shape, size = list(self.shapes[image]), self.layouts[image][1]
        seen = f"{self.prefix}scores {shape} for an image of {size[0]}x{size[1]}"
        of = "" if count == len(self.layouts) else f" in {count} of {len(self.layouts)} files read"
        if layout.kind == "rank":
            got = "no class axis: labels?" if len(shape) == 2 else f"{len(shape)} axes"
            text = f"{seen}{of}: {got}; write scores [classes, height, width], one file an image"
            return [error("shape", text)]
        if layout.kind == "turned":
            text = f"{seen}{of}: height and width are swapped; transpose them"
            return [error("shape", text)]
        if layout.kind == "other":
            last = f", classes last ({shape[2]})?" if layout.classes_last else ""
            text = f"{seen}{of}{last}: neither this size nor this aspect; "
            return [error("shape", f"{text}were images cropped or padded for the model?")]
        found = []
        if layout.classes_last != (self.reading.layout == "hwc"):
            axis, fix = "first", "leave --layout hwc out"
            if layout.classes_last:
                axis, fix = "last", "pass --layout hwc"
            order = "HWC" if layout.classes_last else "CHW"
            text = f"{seen}{of}: classes are the {axis} axis ({order}); {fix}"
            found.append(error("layout", text))
        if layout.kind != "same" and not (layout.kind == "low" and self.reading.upsample):
            what, fix = (
                ("a lower resolution", "pass --upsample")
                if layout.kind == "low"
                else ("a higher resolution", "bring them to the size of the masks")
            )
            found.append(error("resolution", f"{seen}{of}: {what}; {fix}"))
        if not found:
            number, place = (shape[2], "last") if layout.classes_last else (shape[0], "first")
            text = f"{self.prefix}scores {shape}: {number} classes {place}, of the masks' size"
            if layout.kind == "low":
                text += " after --upsample"
            if len(set(self.shapes.values())) > 1:
                text += " (sizes differ)"
            found.append(ok("shape", f"{text}{of}, {', '.join(sorted(self.dtypes))}"))
        return found

    # --- values

    def _value_findings(self) -> list[Finding]:
        found: list[Finding] = []
        where = f"{self.prefix}scores"
        if self.not_finite:
            said = " and ".join(f"{n:,} {kind}" for kind, n in self.not_finite.items() if n)
            text = f"{where}: {said} values in {counted(self.files_not_finite, 'file')}; "
            found.append(error("finite", text + "did the model overflow in half precision?"))
        strange = sorted(
            each for each in self.dtypes if each[:5] != "float" and each not in ("uint8",)
        )
        if strange:
            text = f"{where}: {', '.join(strange)} values; write uint8 or floating-point scores"
            return [*found, error("dtype", text)]
        if self.low > self.high:
            return found
        if self.flat:
            text = f"{where}: all classes have the same score in {counted(self.flat, 'file')}; "
            found.append(warning("flat", text + "did the model run?"))
        span = f"values from {self.low:.3g} to {self.high:.3g}"
        if self.reading.logits is not None:
            return [*found, self._of_logits(span)]
        if self.low >= 0 and self.high <= 1:
            return [*found, *self._sum_findings(span)]
        return [*found, self._outside(span)]

    def _of_logits(self, span: str) -> Finding:
        """What values are that the options call logits."""
        text = f"{self.prefix}scores have {span}"
        if "uint8" in self.dtypes:
            return error("logits", f"{text} in uint8: no logits; leave --logits out")
        if self.low >= 0 and self.high <= 1:
            return warning("logits", f"{text}: probabilities already? leave --logits out")
        return ok("values", f"{text}: logits, as --logits says")

    def _sum_findings(self, span: str) -> list[Finding]:
        sums = np.concatenate(self.sums)
        sums = sums[np.isfinite(sums)]
        if not sums.size:
            return []
        most = max(self.classes, default=0)
        slack = _ROUNDING + (most * 0.5 / 255 if self.dtypes == {"uint8"} else 0)
        low, high = (float(q) for q in np.quantile(sums, (0.005, 0.995)))
        if max(1 - low, high - 1) <= slack:
            return [
                ok(
                    "values",
                    f"{self.prefix}scores have {span}, sums of 1: probabilities of a softmax",
                )
            ]
        text = f"{self.prefix}scores have {span}, sums from {low:.2g} to {high:.2g}, not 1: "
        text += "right for sigmoids (then pass --scores sigmoid), wrong for a softmax"
        return [warning("sums", text)]

    def _outside(self, span: str) -> Finding:
        """What values outside [0, 1] are."""
        sums = np.concatenate(self.sums)
        inside = sums[np.isfinite(sums)]
        middle = float(np.median(inside)) if inside.size else np.nan
        text = f"{self.prefix}scores have {span}, not in [0, 1]"
        if self.low >= -_SLIGHTLY and self.high <= 1 + _SLIGHTLY:
            return error("values", f"{text}: rounding or interpolation? clip them to [0, 1]")
        if self.low >= 0 and self.high <= 101 and abs(middle - 100) < 2:
            return error("values", f"{text}, sums of 100: per cent; divide by 100")
        if self.low >= 0 and 2 < self.high <= 255 and abs(middle - 255) < 10:
            return error("values", f"{text}, sums of 255: divide by 255, or store them as uint8")
        logs = np.concatenate(self.log_sums)
        logs = logs[np.isfinite(logs)]
        if logs.size and self.high <= _SLIGHTLY and abs(float(np.median(logs))) < _ROUNDING:
            return error("logits", f"{text}: logarithms of probabilities; pass --logits")
        if self.low < 0:
            return error("logits", f"{text}: logits, not probabilities; pass --logits")
        share = percent(float((inside > 1 + _ROUNDING).mean()) if inside.size else np.nan)
        return error("logits", f"{text}, sums above 1 at {share} of pixels: logits? pass --logits")
