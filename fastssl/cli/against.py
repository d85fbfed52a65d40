"""``fastssl recipes NAME --against``: a recipe beside what was published, on paper."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from fastssl.cli.common import PlainConsole
from fastssl.config.against import Comparison, Setting, State, in_yaml

_STYLES: dict[State, str] = {"ours": "yellow", "no source": "cyan", "as published": "green"}
_TITLE = ("", "here", "published", "source")


def print_comparison(found: Comparison, *, equal: bool) -> None:
    """Print what differs with its reasons, and how much does not; with ``equal`` that, too, setting by setting."""
    out = PlainConsole()  # standard output; 80 columns where it is no terminal
    number = f": {found.linear:g} %" if found.linear else ""
    out.print(f"{found.recipe}, beside {found.beside}{number}", style="bold")
    counts = (f"{sum(map(len, found.of(state).values()))} {state}" for state in _STYLES)
    out.print(f"{', '.join(counts)}\n")
    states = [state for state in _STYLES if equal or state != "as published"]
    shown = [_TITLE, *(_cells(setting) for setting in found.settings if setting.state in states)]
    key, here, published, _ = (max(map(len, column)) for column in zip(*shown, strict=True))
    most = max(8, (out.width - key - 24) // 2)  # of a value, which is broken where it is longer; 16 are the source's
    widths = [key, min(here, most), min(published, most)]
    widths.append(max(8, out.width - sum(widths) - 8))
    _print_row(out, _TITLE, widths, "bold")
    for state in states:
        for reason, settings in found.of(state).items():
            for setting in settings:
                _print_row(out, _cells(setting), widths, _STYLES[state])
            if state != "as published":
                wide = max(8, out.width - 6)
                why = textwrap.wrap(f"{state}: {reason or 'no reason is given'}", wide, break_on_hyphens=False)
                out.print(textwrap.indent("\n".join(why), " " * 6))


def _cells(setting: Setting) -> tuple[str, str, str, str]:
    return setting.key, in_yaml(setting.here), in_yaml(setting.published) if setting.source else "?", setting.source


def _print_row(out: PlainConsole, cells: Sequence[str], widths: Sequence[int], style: str) -> None:
    wrapped = (textwrap.wrap(cell, width) for cell, width in zip(cells, widths, strict=True))
    for line in zip_longest(*wrapped, fillvalue=""):
        padded = (f"{cell:{width}}" for cell, width in zip(line, widths, strict=True))
        out.print(f"  {'  '.join(padded)}".rstrip(), style=style)
