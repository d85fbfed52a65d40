"""The plots of a report: rates beside their ceilings, shares of the time, how rates and costs grow; or why none."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.table import cells, figure, positive
from fastssl.errors import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#2563a8", "#d1632f", "#0f8a68", "#8b5cb8", "#9a7b1c", "#b8477d", "#4a93b5", "#7a6a5d")
_CEILING, _INK, _QUIET, _GRID = "#b9c6d6", "#1c2430", "#5b6676", "#e3e7ec"
# Names come from files: a dollar sign in one is no formula.
_STYLE: Any = {  # matplotlib's type for it lists all names that there are
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": _QUIET,
    "axes.labelcolor": _QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "grid.color": _GRID,
    "text.color": _INK,
    "xtick.color": _QUIET,
    "ytick.color": _INK,
    "legend.frameon": False,
}
#: Panels of one picture at most; more would be too narrow to read.
_PANELS = 3
#: Rows of one picture at most, the last measured ones: the tables have them all.
_ROWS = 40


_Drawn = TypeVar("_Drawn")


def draw(plot: Callable[[_Drawn], Figure | str], records: _Drawn) -> bytes | str:
    """PNG of ``plot(records)``, or its words if it has nothing to draw."""
    # No pyplot: it would open a window where there is a display, and keep every figure.
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        drawn = plot(records)
        if isinstance(drawn, str):
            return drawn
        buffer = io.BytesIO()
        drawn.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


#: (bench, stage) -> part, in the order of drawing
_PARTS = {("loader", "views"): "loader", ("views", "whole"): "views", ("step", ""): "step", ("train", ""): "train"}


def measured_parts(records: Iterable[Record]) -> dict[tuple[str, str], Record]:
    """The fastest record of each recipe's loader, views, step and training: (recipe, part) -> record, by recipe and
    then in that order.

    Records of peers are left out, and of the loader and the views those of one stage alone.
    """
    devices = {record.device for record in records}
    found: dict[tuple[str, str], Record] = {}
    networks: dict[str, str] = {}  # of each recipe the first one: others get a place of their own
    for record in records:
        details = record.details or {}
        part = _PARTS.get((record.bench, str(details.get("part") or details.get("stage") or "")))
        if part is None or record.peer or not positive(record.pair_per_s) or not positive(record.view_per_s):
            continue
        # More than one engine or device: each is worth its own bar.
        more = [record.pipeline if record.pipeline != "native" else None, record.device if len(devices) > 1 else None]
        name = f"{part} ({', '.join(filter(None, more))})" if any(more) else part
        recipe = record.recipe or "no recipe"
        if record.arch and record.arch != networks.setdefault(recipe, record.arch):
            recipe = f"{recipe} with {record.arch}"
        if (recipe, name) not in found or record.pair_per_s > (found[recipe, name].pair_per_s or 0):
            found[recipe, name] = record
    recipes, parts = list(dict.fromkeys(recipe for recipe, _ in found)), list(_PARTS.values())
    order = sorted(found, key=lambda key: (recipes.index(key[0]), parts.index(key[1].split(" (")[0]), key[1]))
    return {key: found[key] for key in order}


def images_per_s(records: Sequence[Record]) -> Figure | str:
    """Pairs and views a second of each part of each recipe, beside its ceiling, on logarithmic axes."""
    parts = measured_parts(records)
    if not parts:
        return "no record of the loader, the views, the step or training has a rate"
    recipes = list(dict.fromkeys(recipe for recipe, _ in parts))
    # A recipe's name stands above its bars, in a gap of its own.
    places = [number + 1.1 * recipes.index(recipe) for number, (recipe, _) in enumerate(parts)]
    canvas = Figure(figsize=(11, 2.5 + 0.46 * places[-1]), layout="constrained")
    for axes, field in zip(canvas.subplots(1, 2, sharey=True), ("pair_per_s", "view_per_s")):
        _draw_rates(axes, field, places, list(parts.values()))
        axes.set_title(f"{field.replace('_per_', '/')}, logarithmic", color=_QUIET, fontsize=10)
        first = {recipe: place for (recipe, _), place in reversed(list(zip(parts, places)))}
        for recipe, place in first.items():
            options: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "fontweight": "bold", "va": "center"}
            axes.text(0.0, place - 0.75, f" {_short(recipe, 48)}", **options)
    canvas.axes[0].set_yticks(places, [part for _, part in parts])
    canvas.axes[0].set_ylim(places[-1] + 0.6, -1.1)
    canvas.legend(*canvas.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return canvas


def _draw_rates(axes: Axes, field: str, places: Sequence[float], records: Sequence[Record]) -> None:
    rates, limits = [getattr(one, field) for one in records], [_ceiling(one, field) for one in records]
    shown = [*rates, *filter(None, limits)]
    # A bar on a logarithmic axis begins at a power of ten below all; on the right there is room for the figures.
    left = 10.0 ** math.floor(math.log10(min(shown)) - 0.15)
    axes.set_xscale("log")
    axes.set_xlim(left, max(shown) * (max(shown) / min(shown) * 10) ** 0.36)
    share = [f"  ({one.fraction_of_ceiling:.0%})" if one.fraction_of_ceiling and one.ceiling else "" for one in records]
    texts = [figure(value) + of_ceiling for value, of_ceiling in zip(rates, share)]
    ceilings = [limit or left for limit in limits]  # no bar where there is none
    words = [figure(limit) for limit in limits]
    for values, labels, shift, colour, ink, name in (
        (rates, texts, -0.17, COLOURS[0], _INK, "measured (share of its ceiling)"),
        (ceilings, words, 0.17, _CEILING, _QUIET, "ceiling"),
    ):
        widths = np.array(values) - left
        bars = axes.barh(np.array(places) + shift, widths, 0.31, left=left, color=colour, label=name)
        axes.bar_label(bars, labels, padding=4, fontsize=8.5, color=ink)
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(LogLocator(10, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}" if value < 1e6 else f"{value / 1e6:,.10g} M")
    axes.tick_params(axis="y", length=0)


def _ceiling(record: Record, field: str) -> float | None:
    """The ceiling, which records hold in views a second, in the unit of ``field``; None when there is none."""
    return record.ceiling * getattr(record, field) / record.view_per_s if positive(record.ceiling) else None


def shares_of(record: Record) -> dict[str, float]:
    """``details["share"]`` without what is no positive number."""
    return _figures(record, "share")


def _figures(record: Record, key: str) -> dict[str, float]:
    values = (record.details or {}).get(key)
    found = values.items() if isinstance(values, dict) else ()
    return {str(name): float(value) for name, value in found if positive(value)}


def share_of_time(records: Sequence[Record]) -> Figure | str:
    """What the time of a batch or step goes into: a bar of parts for every record that has shares."""
    rows = [(cells(record)[:3], shares) for record in records if (shares := shares_of(record))][-_ROWS:]
    if not rows:
        return "no record has the shares of its time"
    parts = list(dict.fromkeys(name for _, shares in rows for name in shares))
    columns = 3 if max(map(len, parts)) > 24 else 4
    height = 1.0 + 0.27 * -(-len(parts) // columns) + 0.62 * len(rows)
    canvas = Figure(figsize=(11, height), layout="constrained")
    axes, places, begin = canvas.subplots(), np.arange(len(rows)), np.zeros(len(rows))
    for number, part in enumerate(parts):
        widths = np.array([shares.get(part, 0.0) for _, shares in rows])
        look: dict[str, Any] = {"facecolor": COLOURS[number % len(COLOURS)], "edgecolor": "white", "linewidth": 0.8}
        look |= {"hatch": "//" if number >= len(COLOURS) else None, "label": _short(part, 40)}
        bars = axes.barh(places, widths, 0.42, left=begin, **look)
        labels = [f"{width:.0%}" if width >= 0.04 else "" for width in widths]
        axes.bar_label(bars, labels, label_type="center", color="white", fontsize=9)
        begin += widths
    for place, ((what, recipe, setting), _) in zip(places, rows):
        name = " · ".join(filter(None, (recipe, what, setting)))
        axes.text(0.0, place - 0.27, _short(name, 120), va="bottom", fontsize=9)
    axes.set_ylim(len(rows) - 0.6, -0.75)
    axes.set_xlim(0, max(1.0, begin.max()))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of the time")
    canvas.legend(loc="outside lower center", ncols=columns)
    return canvas


def scaling(records: Sequence[Record]) -> Figure | str:
    """The loader's rate by its threads, beside the ceilings, and the host's time for a picture by its views."""
    groups: dict[str, list[Record]] = {}
    costs: dict[str, Record] = {}
    for record in records:
        part = (record.details or {}).get("part")
        if record.bench != "loader" or record.peer or record.pipeline != "native" or not record.workers:
            continue
        setting = _setting(record)
        if part in ("decode", "views") and record.recipe and record.pair_per_s and record.view_per_s:
            groups.setdefault(setting, []).append(record)
        # One line for each recipe, on the most threads: more would lie on one another.
        most = costs.get(setting, record).workers or 0
        if part == "host cost" and _figures(record, "host_cpu_ms") and most <= record.workers:
            costs[setting] = record
    if not groups and not costs:
        return "no record of our loader has the part decode, views or host cost"
    # Where more thread counts were measured there is more to see.
    shown = sorted(groups, key=lambda name: -len({record.workers for record in groups[name]}))[: _PANELS - bool(costs)]
    panels = len(shown) + bool(costs)
    canvas = Figure(figsize=(5.4 * max(panels, 2), 4.9), layout="constrained")
    axes = canvas.subplots(1, panels, squeeze=False)[0]
    for one, name in zip(axes, shown):
        _draw_threads(one, name, groups[name])
    if costs:
        _draw_costs(axes[-1], list(costs.values()))
    return canvas


def _setting(record: Record) -> str:
    data = (record.details or {}).get("data") or {}
    return ", ".join(filter(None, [record.recipe, record.device, f"batch {record.batch_size}", data.get("name")]))


def _draw_threads(axes: Axes, title: str, records: Sequence[Record]) -> None:
    for colour, part, name in zip(COLOURS, ("decode", "views"), ("decode", "whole loader")):
        by_count = {one.workers or 0: one for one in records if (one.details or {}).get("part") == part}
        found = [(count, by_count[count]) for count in sorted(by_count)]
        points = [(count, one.pair_per_s or 0.0, _ceiling(one, "pair_per_s")) for count, one in found]
        if points:
            axes.plot(*zip(*((count, rate) for count, rate, _ in points)), "o-", color=colour, label=name)
        if limits := [(count, limit) for count, _, limit in points if limit]:
            axes.plot(*zip(*limits), "o--", color=colour, alpha=0.5, markerfacecolor="white", label=f"{name}: ceiling")
    counts = sorted({record.workers or 0 for record in records}, reverse=True)
    ticks = counts[:1]
    for count in counts:
        if ticks[-1] - count >= counts[0] / 16:  # closer ones, as 1 and 2 beside 64, have no room for their labels
            ticks.append(count)
    axes.set(xlim=(0, counts[0] * 1.06), ylim=(0, None), xticks=ticks, xlabel="decoding threads", ylabel="pair/s")
    axes.yaxis.set_major_formatter("{x:,.10g}")
    recipe, _, rest = title.partition(", ")
    axes.set_title(f"Loader: {_short(recipe, 50)}\n{_short(rest, 60)}", fontsize=10)
    axes.grid()
    axes.legend(fontsize=9)


def _draw_costs(axes: Axes, records: Sequence[Record]) -> None:
    """Lines by the number of views; a bare decode loop, which makes none, stands at zero."""
    names: dict[int, str] = {}
    for colour, record in zip(COLOURS, records):
        cost = _figures(record, "host_cpu_ms")
        views = {key: 0 if key == "bare" else sum(map(int, re.findall(r"\d{1,6}", key))) for key in cost}
        names.update({views[key]: "decode\nalone" if key == "bare" else str(views[key]) for key in views})
        label = _short(f"{record.recipe}, {counted(record.workers or 0, 'thread')}", 44)
        axes.plot(*zip(*sorted((views[key], cost[key]) for key in cost)), "o-", color=colour, label=label)
    axes.set_xticks(list(names), list(names.values()))
    axes.margins(x=0.08)
    axes.set_ylim(0, 1.25 * axes.dataLim.y1)
    axes.set(xlabel="views of a picture, cropped on the device", ylabel="ms of processor time")
    axes.set_title("Host time for a picture", fontsize=10)
    axes.grid()
    axes.legend(fontsize=9, loc="lower right")


def _short(text: str, length: int) -> str:
    """``text`` on one line, cut to ``length`` letters. The legend leaves out names that begin with an underscore."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split()).lstrip("_")
    return line if len(line) <= length else line[: length - 1] + "…"
