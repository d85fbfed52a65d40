"""How a run tells where it stands: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastssl.errors import duration, printable

Row = dict[str, Any]

#: The words of the live line, the most useful first: on a terminal that is too narrow for all of them the last ones go.
_WORDS: tuple[Callable[[Row], str], ...] = (
    lambda row: f"loss {row['loss']:.3f}",
    lambda row: f"{row['pair_per_s']:,.0f} pair/s",
    lambda row: f"kNN {row['knn']:.1f} %" if row.get("knn") is not None else "",
    lambda row: f"wait {100 * row['data_wait']:.0f} %",
    lambda row: f"lr {row['lr']:.3g}",
    lambda row: f"spread {row['embedding_std']:.2f}",
    lambda row: f"kl {row['kl']:.3g}",
)
_GAP = "  "
#: Columns of the bar, at least and at most.
_BAR = (6, 24)


class RunProgress:
    """Use as a context manager. ``console`` decides between the live display and plain lines, which come at most every
    ``interval`` seconds. With ``quiet`` there are neither, and of what the run says only its warnings are left.
    """

    def __init__(self, console: Console, interval: float = 15.0, quiet: bool = False):
        self.console, self.interval, self.quiet = console, interval, quiet
        self._live: Live | None = None
        self._newest: tuple[Row, int, int, float | None] | None = None  # row, done, total, when the run will be done
        self._first: tuple[float, int] | None = None  # when the first block came, and its step
        self._last_line, self._began = 0.0, time.monotonic()

    def __enter__(self) -> RunProgress:
        if self.console.is_terminal and not self.console.is_dumb_terminal and not self.quiet:
            self._live = Live(console=self.console, refresh_per_second=2, get_renderable=self._line)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def row(self, row: Row, done: int, total: int) -> None:
        """A block of steps is done. ``row["knn"]``: what the newest online probe found, if there was one."""
        now = time.monotonic()
        began, first_step = self._first = self._first or (now, done)
        # By the clock since the first block, probes and checkpoints included; until then by what its steps took.
        left: float | None = None
        if done > first_step:
            left = (now - began) / (done - first_step) * (total - done)
        elif row.get("seconds") and row.get("step"):
            left = row["seconds"] / row["step"] * (total - done)
        if self._live is not None:
            self._newest = row, done, total, None if left is None else now + left
        elif not self.quiet and (now - self._last_line >= self.interval or done == total):
            self._last_line = now
            words = ""
            if left is not None and done != total:
                words = f"  {left / 60:.0f} min left" if left >= 90 else f"  {left:.0f} s left"
            line = (
                f"step {done:,}/{total:,}  epoch {row['epoch']:.1f}  loss {row['loss']:.3f} (kl {row['kl']:.3f})  "
                f"spread {row['embedding_std']:.2f}  {row['pair_per_s']:,.0f} pair/s  "
                f"data-wait {100 * row['data_wait']:.0f} %  lr {row['lr']:.4g}{words}"
            )
            self.console.print(line, highlight=False, soft_wrap=True)

    def message(self, text: str) -> None:
        """One line above the display: a warning."""
        self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """One line that nothing depends on: it is not said where the run is to be quiet."""
        if not self.quiet:
            self.message(text)

    def _line(self) -> RenderableType:
        """``step 120/9,000 ━━━━━━━━ 1:02:03 left  loss 11.34  1,234 pair/s ...``: one line, of the words that fit."""
        if self._newest is None:
            return Text(f"starting, {duration(time.monotonic() - self._began)}", no_wrap=True, overflow="crop")
        row, done, total, ends = self._newest
        step, words = f"step {done:,}/{total:,}", "-:--:-- left"
        if ends is not None:
            seconds = max(0, round(ends - time.monotonic()))
            words = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        room = self.console.width - len(step) - len(words) - 2
        for word in filter(None, (say(row) for say in _WORDS)):
            if len(_GAP) + len(word) > room - _BAR[0]:
                break
            words, room = words + _GAP + word, room - len(_GAP) - len(word)
        line = Table.grid(padding=(0, 1, 0, 0))
        bar = ProgressBar(total, done, width=max(0, min(_BAR[1], room)))
        line.add_row(Text(step, no_wrap=True), bar, Text(words, no_wrap=True, overflow="crop"))
        return line
