"""The diagrams of a report, as data for ``<img src=...>``; matplotlib is needed here alone.

Colours are those of Okabe & Ito (2008), which colour-blind people tell apart, and never the only
difference: lines differ in dashes, points in shape.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
STYLES = (  # the first four for kinds of scores, then eq. 4 without and with suppression
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "v"),
    ("#000000", "-", "<"),
    ("#E69F00", "-", ">"),
)
_CERTIFIED = ("*", "P", "X", "D")
# Small figures with letters of a common size, so that they are read on a phone too.
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "cpseg",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
}


class Series(NamedTuple):
    """Points with standard errors, ``[n]`` each; a line where it is one."""

    name: str
    x: Array
    y: Array
    x_se: Array
    y_se: Array
    style: int
    kind: str  # "line", "points" or "stars"


def require() -> None:
    """Say what to install where matplotlib is missing.

    Raises:
        ImportError: names the extra.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("the report draws with matplotlib: pip install cpseg[report]") from error


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _data(figure: Figure) -> str:
    """As an SVG that is the same for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


@contextlib.contextmanager
def _context() -> Iterator[None]:
    """The same settings whatever the user's are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def reliability(
    confidence: Array, accuracy: Array, spread: Array, share: Array, *, style: int
) -> str:
    """A reliability diagram over the share of pixels in each bin, ``[15]`` each.

    Args:
        confidence: mean of the largest score, NaN in empty bins.
        accuracy: share of pixels whose class has it.
        spread: standard error of ``accuracy``.
        share: share of all pixels.
        style: which of the styles.
    """
    with _context():
        figure = _figure(4.2, 4.2)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        colour, dashes, marker = STYLES[style]
        above.plot([0, 1], [0, 1], color="#666666", linewidth=1, linestyle=(0, (1, 2)))
        above.text(0.98, 0.04, "dotted: as confident as right", ha="right", color="#444444")
        there = np.isfinite(confidence) & np.isfinite(accuracy)
        above.errorbar(
            confidence[there],
            accuracy[there],
            yerr=np.nan_to_num(spread[there]),
            color=colour,
            linestyle=dashes,
            marker=marker,
            markersize=4,
            capsize=2,
            linewidth=1.5,
        )
        above.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that is right")
        edges = np.linspace(0, 1, len(share) + 1)
        below.bar(
            edges[:-1],
            100 * share,
            width=np.diff(edges),
            align="edge",
            color=colour,
            edgecolor="white",
            linewidth=0.5,
        )
        below.set(xlabel="largest class score (confidence)", ylabel="% of pixels")
        return _data(figure)


def error_against_kept(series: Sequence[Series], *, highest: float) -> str:
    """Error rate of the labels kept against the share kept, both in per cent.

    Args:
        series: lines and points, shares in [0, 1].
        highest: the error rate at which the picture ends.
    """
    with _context():
        figure = _figure(4.4, 5.2)
        axes = figure.subplots()
        for one in series:
            colour, dashes, marker = STYLES[one.style]
            x, y = 100 * one.x, 100 * one.y
            xerr, yerr = (100 * np.nan_to_num(se) for se in (one.x_se, one.y_se))
            if one.kind == "line":
                axes.fill_between(x, y - yerr, y + yerr, color=colour, alpha=0.18, linewidth=0)
                axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.6, label=one.name)
                continue
            star = one.kind == "stars"
            axes.errorbar(
                x,
                y,
                xerr=xerr,
                yerr=yerr,
                linestyle="none",
                label=one.name,
                capsize=2,
                color="black" if star else colour,
                ecolor="#555555",
                elinewidth=0.8,
                marker=_CERTIFIED[one.style] if star else marker,
                markersize=9 if star else 5,
                markerfacecolor=colour if star else "white",
            )
        axes.set(
            xlim=(0, 102),
            ylim=(0, 100 * highest),
            xlabel="% of pixels that keep a label",
            ylabel="% of these that are wrong",
        )
        figure.legend(loc="outside lower left", fontsize=9)
        return _data(figure)


def grid_map(values: Array, *, label: str) -> str:
    """A map of the grid with a scale; cells that are not finite are hatched grey."""
    with _context():
        height, width = values.shape
        figure = _figure(4.2, min(4.2 * (height / width) ** 0.9 + 0.9, 6.0))
        axes = figure.subplots()
        axes.set_facecolor("#cccccc")
        axes.patch.set_hatch("////")
        axes.patch.set_edgecolor("#666666")
        shown = np.ma.masked_invalid(values.astype(np.float64))
        drawn = axes.imshow(shown, cmap="cividis", interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        figure.colorbar(drawn, ax=axes, location="bottom", label=label, shrink=0.9, aspect=30)
        return _data(figure)
