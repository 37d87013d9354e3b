"""A calibration for people: facts as text, as a table for notebooks, and its thresholds drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Protocol

import torch

from cpseg._internal.checks import message
from cpseg.calibration.guarantee import _Calibration, guarantee

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = 4  # in a row


class _Shown(_Calibration, Protocol):
    """The attributes of a :class:`Calibration` that are shown."""

    @property
    def num_images(self) -> int: ...
    @property
    def num_classes(self) -> int | None: ...
    @property
    def background(self) -> int | None: ...
    @property
    def infinite_share(self) -> float: ...


def facts(calibration: _Shown, names: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """Pairs of a title and what there is to say.

    Args:
        calibration: any.
        names: of the classes, in their order; by default their numbers.

    Raises:
        ValueError: another number of names than classes.
    """
    name = _names("Calibration.summary", calibration, names)
    rows, columns = calibration.grid
    made = f"{calibration.num_images} labelled images"
    found = [("thresholds", "none: every pixel gets its most probable class")]
    if calibration.alpha > 0:
        found = [
            (
                "thresholds",
                f"{calibration.variant}, alpha {calibration.alpha:g}, grid {rows}x{columns}",
            ),
            ("their values", _values(calibration)),
        ]
    found += [("made from", made), ("classes", _classes(calibration, name))]
    if calibration.background is not None:
        chosen = f"{name[calibration.background]}, where an object is in the set too"
        found.append(("suppressed", chosen))
    if calibration.recalibration is not None:
        found.append(("recalibrated", calibration.recalibration.describe().splitlines()[0]))
    if calibration.certificate is not None:
        found.append(("certificate", calibration.certificate.verdict))
    return [*found, ("promised", guarantee(calibration))]


def summary(calibration: _Shown, names: Sequence[str] | None = None) -> str:
    """The facts, one to a line."""
    found = facts(calibration, names)
    width = max(len(title) for title, _ in found)
    return "\n".join(f"{title:<{width}}  {text}" for title, text in found)


def as_html(calibration: _Shown) -> str:
    """The facts as a table, for notebooks."""
    rows = "".join(
        f'<tr><th scope="row" style="text-align:left">{escape(title)}</th>'
        f'<td style="text-align:left">{escape(text)}</td></tr>'
        for title, text in facts(calibration)
    )
    return f"<table><caption>Calibration</caption><tbody>{rows}</tbody></table>"


def plot(calibration: _Shown, names: Sequence[str] | None = None) -> Figure:
    """Its thresholds as a picture, a panel for each class where classes have their own.

    Raises:
        ImportError: matplotlib is missing; names the extra.
        ValueError: a calibration without thresholds, or another number of names than classes.
    """
    where = "Calibration.plot"
    name = _names(where, calibration, names)
    if calibration.alpha == 0:
        fix = "calibrate with an alpha"
        raise ValueError(message(where, "a calibration with thresholds", "every pixel", fix))
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        text = 'plots need matplotlib: pip install "cpseg[report]"'
        raise ImportError(text) from error

    maps = calibration.threshold.detach().cpu()
    panels = maps if maps.ndim == 3 else maps[None]
    columns = min(_PANELS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 2.8 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False).flatten()
    colours = colormaps["viridis"].with_extremes(over="#d9d9d9")
    image: Any = None
    for place, axis in enumerate(axes):
        axis.set_axis_off()
        if place < len(panels):
            values = panels[place].nan_to_num(posinf=2.0).numpy()
            image = axis.imshow(values, cmap=colours, vmin=0, vmax=1)
            if maps.ndim == 3:
                axis.set_title(name[place], fontsize=9)
    figure.colorbar(image, ax=list(axes), extend="max", label="threshold (gray: infinite)")
    figure.suptitle(f"{calibration.variant}, alpha {calibration.alpha:g}", fontsize=10)
    return figure


def _names(where: str, calibration: _Shown, names: Sequence[str] | None) -> list[str]:
    count = calibration.num_classes
    if names is None:
        return [f"class {k}" for k in range(count or 256)]
    if count is not None and len(names) != count:
        fix = "pass one for each class, in order"
        raise ValueError(message(where, f"{count} names", f"{len(names)}", fix))
    return list(names)


def _classes(calibration: _Shown, name: Sequence[str]) -> str:
    count = calibration.num_classes
    if count is None:
        return "unknown: only scores were given"
    numbers = [f"class {k}" for k in range(count)]
    return str(count) if list(name) == numbers else f"{count}: {', '.join(name)}"


def _values(calibration: _Shown) -> str:
    finite = calibration.threshold[calibration.threshold.isfinite()].double()
    if not len(finite):
        return "all infinite: every class is in every set"
    low, middle, high = torch.quantile(finite, torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
    share = f"{100 * calibration.infinite_share:.1f} % infinite"
    if low == high:
        return f"{middle:.3f}, {share}"
    return f"{middle:.3f} in the middle, {low:.3f} to {high:.3f} for nine in ten, {share}"
