"""What a calibration promises on new images, in words."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from cpseg.calibration.certificate import Certificate
from cpseg.calibration.provenance import Provenance
from cpseg.recalibration.recalibration import Recalibration

_ASSUMED = (
    "if new images are exchangeable with the calibration images and the model was trained on others"
)


class _Calibration(Protocol):
    """What a promise depends on: the attributes of a :class:`Calibration` read here."""

    @property
    def alpha(self) -> float: ...
    @property
    def variant(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def threshold(self) -> Tensor: ...
    @property
    def level(self) -> Tensor | None: ...
    @property
    def certificate(self) -> Certificate | None: ...
    @property
    def recalibration(self) -> Recalibration | None: ...
    @property
    def provenance(self) -> Provenance: ...


def guarantee(calibration: _Calibration) -> str:
    """What a calibration promises on new images, under which assumption, and what it does not.

    Args:
        calibration: a :class:`Calibration`.

    Returns:
        One line, without a capital letter and a full stop. It begins with ``"nothing"`` where no
        finite-sample promise holds. Where image ids or provenance are missing it assumes that the
        recalibration and learned groups come from other images than the calibration images.

    Example:
        >>> from cpseg import Calibration
        >>> calibration = Calibration(torch.tensor([[0.1, 0.2]]), torch.tensor([[9, 9]]),
        ...                           alpha=0.1, num_images=9, num_classes=3, variant="pixel")
        >>> print(guarantee(calibration).split(":")[0])
        coverage of at least 90 % at each of the 1x2 pixels that the grid samples
    """
    if calibration.certificate is not None:
        return str(calibration.certificate)
    reason = _what_voids_it(calibration)
    if reason is not None:
        return f"nothing: {reason}"
    rate = f"{100 * (1 - calibration.alpha):g} %"
    height, width = calibration.grid
    pixels = f"the {height}x{width} pixels that the grid samples"
    if calibration.variant == "pixel":
        promise = f"coverage of at least {rate} at each of {pixels}"
        means = "coverage is the probability that the prediction set contains the true class"
    else:
        whose, which = "an image's", "images"
        if calibration.threshold.ndim == 3:
            whose, which = "a class's", "images that show it"
        promise = (
            f"at least {rate} of {whose} pixels covered on average over {which}, in each group "
            f"of {pixels}"
        )
        means = "a pixel is covered where the prediction set contains its true class"
    return (
        f"{promise}{_of_fallback(calibration)}: {means}, {_ASSUMED}; "
        "nothing about the error of pseudo-labels"
    )


def _what_voids_it(calibration: _Calibration) -> str | None:
    """Why nothing is promised in finite samples, or None."""
    provenance, recalibration = calibration.provenance, calibration.recalibration
    if calibration.alpha == 0:
        return "there are no thresholds, and every pixel gets its most probable class"
    overlap = set(() if recalibration is None else recalibration.images) & {*provenance.images}
    if overlap or (provenance.recalibration and not provenance.recalibration.disjoint):
        return "the probabilities were recalibrated on the calibration images themselves"
    if provenance.groups is not None and not provenance.groups.disjoint:
        return "groups were learned on the calibration images themselves"
    if provenance.sources:
        return (
            "models behind the scores were trained on calibration images, each scored by a model "
            "that did not see it (cross-fitting), so that coverage is approximate"
        )
    if calibration.variant != "pixel" and calibration.unit != "image":
        return (
            "groups pool the pixels of several images, which are not exchangeable; "
            "unit 'image' gives a promise on average over images"
        )
    return None


def _of_fallback(calibration: _Calibration) -> str:
    """Where the promise holds, if some cells took the threshold of a coarser group."""
    level = calibration.level
    if level is None or not bool((level > 0).any()):
        return ""
    share = float(((level == 0) & calibration.threshold.isfinite()).double().mean())
    return (
        f", where thresholds are its own ({100 * share:.1f} %); nothing where they fell back to "
        "a coarser group"
    )
