"""The plots of a report, as PNG: rates beside their ceilings, shares of the time, and how rates and costs grow.

Each function gives the picture's bytes, or in words why there is none to draw.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullLocator, PercentFormatter

from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.table import cells, figure
from fastssl.errors import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (
    "#2563a8",
    "#d1632f",
    "#0f8a68",
    "#8b5cb8",
    "#9a7b1c",
    "#b8477d",
    "#4a93b5",
    "#7a6a5d",
    "#5f8f2f",
    "#3f3f74",
    "#a3463c",
    "#6b7785",
)
_CEILING, _INK, _QUIET, _GRID = "#b9c6d6", "#1c2430", "#5b6676", "#e3e7ec"
# Names come from files: a dollar sign in one is no formula.
_STYLE = {
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


def draw(plot: Callable[[Sequence[Record]], Figure | str], records: Sequence[Record]) -> bytes | str:
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


# Rates beside their ceilings


def measured_parts(records: Iterable[Record]) -> dict[tuple[str, str], Record]:
    """The fastest record of each recipe's loader, views, step and training: (recipe, part) -> record, by recipe and
    then in that order.

    Records of peers are left out, and of the loader and the views those of one stage alone.
    """
    wanted = {
        ("loader", "views"): "loader",
        ("views", "whole"): "views",
        ("step", None): "step",
        ("train", None): "train",
    }
    devices = {record.device for record in records}
    found: dict[tuple[str, str], Record] = {}
    networks: dict[str, str] = {}  # of each recipe the first one: others get a place of their own
    for record in records:
        details = record.details or {}
        stage = details.get("part") or details.get("stage")
        part = wanted.get((record.bench, stage and str(stage)))
        if (
            part is None
            or record.peer
            or not record.pair_per_s
            or not record.view_per_s
            or record.pair_per_s < 0
            or record.view_per_s < 0
        ):
            continue
        # More than one engine or device: each is worth its own bar.
        more = [record.pipeline if record.pipeline != "native" else None, record.device if len(devices) > 1 else None]
        name = f"{part} ({', '.join(filter(None, more))})" if any(more) else part
        recipe = record.recipe or "no recipe"
        first = networks.setdefault(recipe, record.arch) if record.arch else record.arch
        key = (recipe if record.arch == first else f"{recipe} with {record.arch}", name)
        if key not in found or record.pair_per_s > (found[key].pair_per_s or 0):
            found[key] = record
    order = list(wanted.values())
    recipes = list(dict.fromkeys(recipe for recipe, _ in found))
    return dict(
        sorted(
            found.items(),
            key=lambda item: (recipes.index(item[0][0]), order.index(item[0][1].split(" (")[0]), item[0][1]),
        )
    )


def images_per_s(records: Sequence[Record]) -> Figure | str:
    """Pairs and views a second of each part of each recipe, with its ceiling as a second bar. The axes are
    logarithmic.
    """
    parts = measured_parts(records)
    if not parts:
        return "no record of the loader, the views, the step or training has a rate"
    rows, places, names, y = list(parts.items()), [], [], 0.0
    for number, ((recipe, _), _) in enumerate(rows):
        if number and recipe != rows[number - 1][0][0]:
            y += 1.1
        places.append(y)
        y += 1.0
    canvas = Figure(figsize=(11, 1.5 + 0.46 * y), layout="constrained")
    for axes, unit, field in zip(
        canvas.subplots(1, 2, sharey=True), ("pair/s", "view/s"), ("pair_per_s", "view_per_s")
    ):
        values = [getattr(record, field) for _, record in rows]
        ceilings = [_ceiling(record, field) for _, record in rows]
        axes.set_xscale("log")
        low = min(values + [c for c in ceilings if c])
        high = max(values + [c for c in ceilings if c])
        # A bar on a logarithmic axis begins at a power of ten below all; on the right there is room for the figures.
        left, right = 10.0 ** math.floor(math.log10(low) - 0.15), high * (high / low * 10) ** 0.36
        axes.set_xlim(left, right)
        for place, (_, record), value, ceiling in zip(places, rows, values, ceilings):
            axes.barh(place - 0.17, value - left, 0.34, left=left, color=_COLOURS[0])
            share = (
                f"  ({record.fraction_of_ceiling:.0%})" if record.fraction_of_ceiling is not None and ceiling else ""
            )
            axes.annotate(
                f"{figure(value)}{share}",
                (value, place - 0.17),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
            if ceiling:
                axes.barh(place + 0.17, ceiling - left, 0.28, left=left, color=_CEILING)
                axes.annotate(
                    figure(ceiling),
                    (ceiling, place + 0.17),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    color=_QUIET,
                )
        axes.set_title(f"{unit}, logarithmic", color=_QUIET, fontsize=10)
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(LogLocator(10, numticks=12))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.10g}" if value < 1e6 else f"{value / 1e6:,.10g} M")
        )
        axes.tick_params(axis="y", length=0)
    first = canvas.axes[0]
    first.set_yticks(places, [part for (_, part), _ in rows])
    first.set_ylim(y - 0.4, -1.1)
    for number, ((recipe, _), _) in enumerate(rows):
        if not number or recipe != rows[number - 1][0][0]:
            names.append((places[number], _short(recipe, 48)))
    for axes in canvas.axes:
        for place, name in names:
            axes.text(
                0.0,
                place - 0.75,
                f" {name}",
                transform=axes.get_yaxis_transform(),
                fontsize=10,
                fontweight="bold",
                va="center",
            )
    handles = [
        Patch(color=_COLOURS[0], label="measured (share of its ceiling)"),
        Patch(color=_CEILING, label="ceiling"),
    ]
    canvas.legend(handles=handles, loc="outside lower center", ncols=2)
    return canvas


def _ceiling(record: Record, field: str) -> float | None:
    """The ceiling, which records hold in views a second, in the unit of ``field``; None when there is none."""
    if not record.ceiling or record.ceiling < 0:
        return None
    return record.ceiling * getattr(record, field) / record.view_per_s


# Shares of the time


def shares_of(record: Record) -> dict[str, float]:
    """``details["share"]`` without what is no positive number."""
    share = (record.details or {}).get("share")
    return (
        {str(name): float(part) for name, part in share.items() if _number(part) and part > 0}
        if isinstance(share, dict)
        else {}
    )


def share_of_time(records: Sequence[Record]) -> Figure | str:
    """What the time of a batch or step goes into: a bar of parts for every record that has shares."""
    rows = [(" · ".join(filter(None, _what(record))), shares) for record in records if (shares := shares_of(record))]
    if not rows:
        return "no record has the shares of its time"
    rows = rows[-_ROWS:]
    parts = list(dict.fromkeys(name for _, shares in rows for name in shares))
    looks = {
        name: {
            "facecolor": _COLOURS[number % len(_COLOURS)],
            "hatch": "//" if number >= len(_COLOURS) else None,
            "edgecolor": "white",
        }
        for number, name in enumerate(parts)
    }
    columns = 3 if max(map(len, parts)) > 24 else 4
    height = 1.0 + 0.27 * -(-len(parts) // columns) + 0.62 * len(rows)
    canvas = Figure(figsize=(11, height), layout="constrained")
    axes = canvas.subplots()
    for place, (name, shares) in enumerate(rows):
        begin = 0.0
        for part, share in shares.items():
            axes.barh(place, share, 0.42, left=begin, linewidth=0.8, **looks[part])
            if share >= 0.04:
                axes.text(begin + share / 2, place, f"{share:.0%}", ha="center", va="center", color="white", fontsize=9)
            begin += share
        axes.text(0.0, place - 0.27, _short(name, 120), va="bottom", fontsize=9)
    axes.set_ylim(len(rows) - 0.6, -0.75)
    axes.set_xlim(0, max(1.0, *(sum(shares.values()) for _, shares in rows)))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MultipleLocator(0.2))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of the time")
    handles = [Patch(**looks[part], label=_short(part, 40)) for part in parts]
    canvas.legend(handles=handles, loc="outside lower center", ncols=columns)
    return canvas


def _what(record: Record) -> tuple[str, str, str]:
    what, recipe, setting = cells(record)[:3]
    return recipe, what, setting


def _threads(record: Record) -> str:
    return counted(record.workers, "thread") if record.workers else ""


# How it grows


def scaling(records: Sequence[Record]) -> Figure | str:
    """The loader's rate by its threads, beside the ceilings, and the host's time for a picture by the number of its
    views.
    """
    groups: dict[str, list[Record]] = {}
    costs: dict[str, Record] = {}
    for record in records:
        part = (record.details or {}).get("part")
        if record.bench != "loader" or record.peer or record.pipeline != "native":
            continue
        if part in ("decode", "views") and record.recipe and record.workers and record.pair_per_s and record.view_per_s:
            groups.setdefault(_setting(record), []).append(record)
        # One line for each recipe, on the most threads: more would lie on one another.
        if (
            part == "host cost"
            and host_cost(record)
            and (costs.get(_setting(record), record).workers or 0) <= (record.workers or 0)
        ):
            costs[_setting(record)] = record
    if not groups and not costs:
        return "no record of our loader has the part decode, views or host cost"
    # Where more thread counts were measured there is more to see.
    counts = {name: len({record.workers for record in members}) for name, members in groups.items()}
    shown = sorted(groups, key=lambda name: -counts[name])[: _PANELS - bool(costs)]
    panels = len(shown) + bool(costs)
    canvas = Figure(figsize=(5.4 * max(panels, 2), 4.9), layout="constrained")
    axes = canvas.subplots(1, panels, squeeze=False)[0]
    for one, name in zip(axes, shown):
        _draw_threads(one, name, groups[name])
    if costs:
        _draw_costs(axes[-1], list(costs.values()))
    return canvas


def host_cost(record: Record) -> dict[str, float]:
    """``details["host_cpu_ms"]`` without what is no number: milliseconds of processor time for a picture, by the views
    made of it.
    """
    cost = (record.details or {}).get("host_cpu_ms")
    return {str(name): float(value) for name, value in cost.items() if _number(value)} if isinstance(cost, dict) else {}


def _setting(record: Record) -> str:
    data = (record.details or {}).get("data")
    name = data.get("name") if isinstance(data, dict) else None
    return ", ".join(
        filter(None, [record.recipe, record.device, f"batch {record.batch_size}", str(name) if name else None])
    )


def _draw_threads(axes: Axes, title: str, records: Sequence[Record]) -> None:
    counts = sorted({record.workers for record in records})
    for number, part in enumerate(("decode", "views")):
        members = {record.workers: record for record in records if record.details["part"] == part}
        points = [members[count] for count in sorted(members)]
        if not points:
            continue
        colour = _COLOURS[number]
        name = "decode" if part == "decode" else "whole loader"
        axes.plot([r.workers for r in points], [r.pair_per_s for r in points], "o-", color=colour, label=name)
        limits = [(r.workers, ceiling) for r in points if (ceiling := _ceiling(r, "pair_per_s"))]
        if limits:
            axes.plot(*zip(*limits), "o--", color=colour, alpha=0.5, markerfacecolor="white", label=f"{name}: ceiling")
    high = max(counts)
    axes.set_xlim(0, high * 1.06)
    axes.set_ylim(0, None)
    # Counts that lie too close for their labels, as 1 and 2 beside 64, get none.
    ticks: list[int] = []
    for count in reversed(counts):
        if not ticks or ticks[-1] - count >= high / 16:
            ticks.append(count)
    axes.set_xticks(ticks)
    axes.set_xlabel("decoding threads")
    axes.set_ylabel("pair/s")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_title(f"Loader: {_folded(title)}", fontsize=10)
    axes.grid()
    axes.legend(fontsize=9)


def _draw_costs(axes: Axes, records: Sequence[Record]) -> None:
    """Lines by the number of views; a bare decode loop, which makes none, stands at zero."""
    names: dict[int, str] = {}
    for number, record in enumerate(records[: len(_COLOURS)]):
        views = {key: 0 if key == "bare" else sum(map(int, re.findall(r"\d{1,6}", key))) for key in host_cost(record)}
        points = sorted((views[key], value) for key, value in host_cost(record).items())
        names.update({views[key]: "decode\nalone" if key == "bare" else str(views[key]) for key in views})
        axes.plot(*zip(*points), "o-", color=_COLOURS[number], label=_short(f"{record.recipe}, {_threads(record)}", 44))
    axes.set_xticks(list(names), list(names.values()))
    axes.margins(x=0.08)
    axes.set_ylim(0, 1.25 * max(value for record in records for value in host_cost(record).values()) or 1)
    axes.set_xlabel("views of a picture, cropped on the device")
    axes.set_ylabel("ms of processor time")
    axes.set_title("Host time for a picture", fontsize=10)
    axes.grid()
    axes.legend(fontsize=9, loc="lower right")


def _number(value: Any) -> bool:
    # Beyond this no rate or share lies, and an axis has no room for it.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and (value == 0 or 1e-30 < abs(value) < 1e30)


def _short(text: str, length: int) -> str:
    """``text`` on one line, cut to ``length`` letters. The legend leaves out names that begin with an underscore."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split()).lstrip("_")
    return line if len(line) <= length else line[: length - 1] + "…"


def _folded(text: str) -> str:
    recipe, _, rest = text.partition(", ")
    return f"{_short(recipe, 50)}\n{_short(rest, 60)}"
