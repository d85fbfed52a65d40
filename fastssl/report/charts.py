"""Line charts for a page: matplotlib draws them, the page's style sheet gives font and colours, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from functools import cache

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 520, 264
#: What matplotlib draws in, and the variable of the page that takes its place. Text stays black: it has none.
_SERIES, _GRID, _QUIET = ("#000001", "#000002"), "#00000a", "#00000b"
_VARIABLES = dict(zip((*_SERIES, _GRID, _QUIET), ("--series-1", "--series-2", "--grid", "--quiet")))
#: Matplotlib's own style with ours on top, whatever the user has set.
_STYLE = dict(matplotlib.rcParamsDefault) | {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "svg.fonttype": "none",
    "axes.autolimit_mode": "round_numbers",
    "axes.ymargin": 0,
    "axes.edgecolor": _QUIET,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "xtick.color": _QUIET,
    "xtick.labelcolor": "black",
    "xtick.major.pad": 5,
    "ytick.left": False,
}
del _STYLE["backend"]
#: More points than pixels make a file heavy; beside larger values an axis has no room.
_MAX_POINTS, _LARGEST = 400, 1e12

Points = Sequence[tuple[float, float]]


def line_chart(
    title: str,
    unit: str,
    series: Mapping[str, Points],
    reach: Sequence[float] = (),
    marks: Mapping[str, float] | None = None,
) -> tuple[str, dict[int, str], Markup] | None:
    """A chart over epochs: title, number (from 1) -> name of each series that has a finite point, ``<svg>``; None when
    no series has one.

    Args:
        series: name -> (epoch, value) by rising epoch, one or two. Values that are not finite leave a gap.
        reach, marks: values, and name -> value of dashed lines, that the axis holds in any case; else it goes from the
            data, to round numbers.
    """
    lines = {number: _thinned(points) for number, points in enumerate(series.values(), 1)}
    names = {number: name for number, name in enumerate(series, 1) if np.isfinite(lines[number][:, 1]).any()}
    if not names:
        return None
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):  # so that no two charts of a page share an id
        axes = _axes()
        for artist in (*axes.lines, *axes.texts):  # of the chart before
            artist.remove()
        axes.relim()
        axes.autoscale()
        for number in names:
            points = lines[number]
            whole = np.isfinite(points[:, 1])
            beside = np.pad(whole, 1)
            # A dot at the end, and for a value without neighbours.
            dots = {*np.flatnonzero(whole & ~beside[:-2] & ~beside[2:]).tolist(), int(np.flatnonzero(whole)[-1])}
            (line,) = axes.plot(*points.T, color=_SERIES[number - 1], linewidth=2, marker="o", clip_on=False)
            line.set(markevery=sorted(dots), gid=f"series-{number}")
        left, right = axes.dataLim.intervalx
        marks = {name: value for name, value in (marks or {}).items() if abs(value) < _LARGEST}
        axes.update_datalim([(right, value) for value in (*reach, *marks.values())])
        if 0 < left < 0.3 * right:  # charts are read side by side: those that begin near zero all begin at zero
            left = 0.0
        one = right - left <= 1e-9 * max(abs(left), abs(right), 1.0)
        axes.set_xlim(left - 0.5 * one, right + 0.5 * one)
        axes.set_ylabel(unit)
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, 0.0) if axes.dataLim.y0 >= 0 else bottom, top)
        _draw_marks(axes, marks)
        buffer = io.StringIO()
        assert isinstance(axes.figure, Figure)
        axes.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return title, names, Markup(_for_page(buffer.getvalue(), title, names))


@cache
def _axes() -> Axes:
    """The same for all charts: new ones would take as long as all that is drawn in them."""
    figure = Figure((WIDTH / 72, HEIGHT / 72), dpi=72, frameon=False)  # a point is a unit of the drawing
    axes = figure.add_axes((56 / WIDTH, 44 / HEIGHT, (WIDTH - 72) / WIDTH, (HEIGHT - 58) / HEIGHT))
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.set_xlabel("epoch")
    for axis, place in ((axes.xaxis, (0.5, -0.135)), (axes.yaxis, (-0.09, 0.5))):
        axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(lambda value, _: f"{value + 0.0:,g}")  # + 0: never -0
        axis.set_label_coords(*place)
    return axes


def _thinned(points: Points) -> np.ndarray:
    """(n, 2), values NaN where none can be drawn; of many, means of equal groups and the last as it is."""
    found = np.array(points, float).reshape(-1, 2)
    found = found[np.abs(found[:, 0]) < _LARGEST]
    found = np.ma.masked_invalid(np.where(np.abs(found) < _LARGEST, found, np.nan))
    if len(found) > _MAX_POINTS:
        groups = [group.mean(axis=0) for group in np.array_split(found, _MAX_POINTS - 1)]
        found = np.ma.stack([*groups, found[-1]])
    return found.filled(np.nan)


def _draw_marks(axes: Axes, marks: Mapping[str, float]) -> None:
    """Dashed lines, with names at their right ends; under its line goes a name that would meet another above it."""
    taken: list[float] = []
    for name, value in sorted(marks.items(), key=lambda mark: -mark[1]):
        axes.axhline(value, color=_QUIET, linewidth=1, dashes=(4, 4))
        y = axes.transData.transform((0, value))[1]
        above = y < HEIGHT - 30 and all(abs(y + 5 - other) >= 13 for other in taken)
        taken.append(y + (5 if above else -13))
        at, beside = axes.get_yaxis_transform(), (-2, taken[-1] - y)
        axes.annotate(name, (1, value), beside, xycoords=at, textcoords="offset points", ha="right", gid="mark")


def _for_page(svg: str, title: str, names: Mapping[int, str]) -> str:
    """Without what is for a file of its own: head, style, ids that other charts have, too; with colours of the page."""
    start = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    svg = start + svg.split("</defs>", 1)[1].rstrip()
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg).replace('<g id="mark">', '<g class="mark">')
    for number, name in names.items():
        svg = svg.replace(f'<g id="series-{number}">', f"<g><title>{escape(name)}</title>")
    return re.sub("|".join(_VARIABLES), lambda colour: f"var({_VARIABLES[colour[0]]})", svg)
