"""Line charts as inline SVG, written by hand: nothing to install, nothing to download, sharp at any size.

Colours are CSS variables of the page (``--series-1`` ..., ``--ink``, ``--quiet``, ``--grid``), so a chart follows the
page's light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 520, 264
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 14, 44
#: More points than pixels make a file heavy and a line no better.
_MAX_POINTS = 400
#: Of larger values, and between closer ones, the steps from tick to tick are lost in rounding. What a run measures lies
#: far inside.
_LARGEST, _SMALLEST = 1e12, 1e-9


@dataclass(frozen=True)
class Series:
    """One line: a name for the legend and (x, y) points by rising x. Values that are not finite leave a gap."""

    name: str
    points: Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Mark:
    """A dashed horizontal line with its name, for a value to compare with."""

    name: str
    y: float


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) from the first one >= low to the last one <=
    high.
    """
    if not (math.isfinite(low) and math.isfinite(high)) or high < low:
        raise ValueError(f"no ticks between {low} and {high}")
    if high == low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs((high - low) / step - count))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # An integer times the step, rounded to the step's digits: no 0.30000000000000004, and no -0.
    digits = max(0, -math.floor(math.log10(step)) + 1)
    return [round(k * step, digits) + 0.0 for k in range(first, last + 1)]


def format_number(value: float) -> str:
    """Short text of an axis label: 0.25, 1,500; very small or large numbers in powers of ten: 2e-5."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        text = f"{value:,.4f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:,.0f}"
        return text
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    y_range: tuple[float | None, float | None] = (None, None),
) -> str:
    """A chart as ``<figure>`` with a legend and one ``<svg>``; an empty string when no series has a finite point.

    Args:
        series: one to five lines; colours by position.
        marks: horizontal lines to compare with; they widen the axis if needed.
        y_range: fixed ends of the axis; None: from the data, with some room, on round numbers.
    """
    lines = [(number, item, _finite_runs(item.points)) for number, item in enumerate(series)]
    lines = [line for line in lines if line[2]]
    if not lines:
        return ""
    marks = [mark for mark in marks if _can_be_drawn(mark.y)]
    xs = [x for _, _, runs in lines for run in runs for x, _ in run]
    ys = [y for _, _, runs in lines for run in runs for _, y in run] + [mark.y for mark in marks]
    x_low, x_high = min(xs), max(xs)
    # Charts of one page are read side by side: those that begin near zero all begin at zero.
    if 0 < x_low < 0.3 * x_high:
        x_low = 0.0
    if _are_one(x_low, x_high):
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low, y_high, y_ticks = _axis(min(ys), max(ys), y_range)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_ticks:
        y = place(x_low, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{format_number(tick)}</text>'
        )
    for tick in nice_ticks(x_low, x_high, 6):
        x = place(tick, y_low)[0]
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{format_number(tick)}</text>'
        )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="label" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="label" transform="translate(13 {middle}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    parts.extend(_draw_marks(marks, [place(x_low, mark.y)[1] for mark in marks], right))
    for number, item, runs in lines:
        for run in runs:
            points = [place(x, y) for x, y in _thinned(run)]
            if len(points) == 1:
                parts.append(
                    f'<circle class="dot s{number + 1}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3.5"/>'
                )
                continue
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(
                f'<polyline class="line s{number + 1}" points="{path}"><title>{escape(item.name)}</title></polyline>'
            )
        x, y = place(*runs[-1][-1])
        parts.append(f'<circle class="dot s{number + 1}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    parts.append("</svg>")

    legend = ""
    if len(lines) > 1:
        items = "".join(f'<span><i class="s{number + 1}"></i>{escape(item.name)}</span>' for number, item, _ in lines)
        legend = f'<div class="legend">{items}</div>'
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{legend}{"".join(parts)}</figure>'


def _axis(low: float, high: float, fixed: tuple[float | None, float | None]) -> tuple[float, float, list[float]]:
    """Ends and ticks of the y axis; ends that are not fixed are moved out to the next tick."""
    room = abs(high) * 0.1 if _are_one(low, high) else (high - low) * 0.05
    room = room if room > _SMALLEST else 1.0
    bottom = fixed[0] if fixed[0] is not None else low - room
    top = fixed[1] if fixed[1] is not None else high + room
    # An axis that would begin a little below zero for a quantity that never is: begin at zero.
    if fixed[0] is None and low >= 0 > bottom:
        bottom = 0.0
    if top <= bottom:
        top = bottom + 1.0
    ticks = nice_ticks(bottom, top)
    if len(ticks) > 1:
        step = ticks[1] - ticks[0]
        if fixed[0] is None and bottom < ticks[0] - 1e-9 * step:
            ticks.insert(0, round(ticks[0] - step, 10) + 0.0)
            bottom = ticks[0]
        if fixed[1] is None and top > ticks[-1] + 1e-9 * step:
            ticks.append(round(ticks[-1] + step, 10) + 0.0)
            top = ticks[-1]
    return bottom, top, ticks


def _draw_marks(marks: Sequence[Mark], heights: list[float], right: float) -> list[str]:
    """Dashed lines with their names at the right end; a name goes under its line where one above would meet another
    name.
    """
    parts = []
    taken: list[float] = []
    for mark, y in sorted(zip(marks, heights), key=lambda pair: pair[1]):
        text_y = y - 5
        if any(abs(text_y - other) < 13 for other in taken) or text_y < _TOP:
            text_y = y + 13
        taken.append(text_y)
        parts.append(f'<line class="mark" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="markname" x="{right - 2}" y="{text_y:.1f}" text-anchor="end">{escape(mark.name)}</text>'
        )
    return parts


def _finite_runs(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Split at values that are missing, not finite, or so large that an axis has no room beside them."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is not None and _can_be_drawn(x) and _can_be_drawn(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _can_be_drawn(value: float) -> bool:
    return abs(value) < _LARGEST  # NaN fails, too


def _are_one(low: float, high: float) -> bool:
    """Whether no ticks fit between the two."""
    return high - low <= max(_SMALLEST, 1e-9 * max(abs(low), abs(high)))


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``_MAX_POINTS`` points: means of equal groups; the last point stays as it is."""
    if len(points) <= _MAX_POINTS:
        return points
    size = -(-len(points) // (_MAX_POINTS - 1))
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [*means, points[-1]]
