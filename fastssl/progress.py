"""How a run tells where it stands: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastssl.pipelines.errors import printable


def describe_row(row: dict[str, Any]) -> str:
    """One block of steps in words: ``loss 11.34 (kl 10.1)  1,234 pair/s  data-wait 3 %  lr 0.06``."""
    return (
        f"loss {row['loss']:.3f} (kl {row['kl']:.3f})  spread {row['embedding_std']:.2f}  "
        f"{row['pair_per_s']:,.0f} pair/s  data-wait {100 * row['data_wait']:.0f} %  lr {row['lr']:.4g}"
    )


class RunProgress:
    """Use as a context manager. ``console`` decides between the live display and plain lines.

    Plain lines come at most every ``interval`` seconds: a log of a day-long run should be readable.
    """

    def __init__(self, console: Console, interval: float = 15.0):
        self.console, self.interval = console, interval
        self._live: Progress | None = None
        self._started: float | None = None
        self._first_step = 0
        self._last_line = 0.0

    def __enter__(self) -> RunProgress:
        if self.console.is_terminal:
            self._live = Progress(
                TextColumn("step {task.completed:,}/{task.total:,}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._live.start()
            self._task = self._live.add_task("starting", total=1)
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def row(self, row: dict[str, Any], done: int, total: int) -> None:
        """A block of steps is done."""
        now = time.monotonic()
        if self._started is None:
            self._started, self._first_step = now, done
        text = describe_row(row)
        if self._live is not None:
            self._live.update(self._task, description=text, completed=done, total=total)
        elif now - self._last_line >= self.interval or done == total:
            self._last_line = now
            self.console.print(
                f"step {done:,}/{total:,}  epoch {row['epoch']:.1f}  {text}{self._time_left(now, done, total)}",
                highlight=False,
                soft_wrap=True,
            )

    def _time_left(self, now: float, done: int, total: int) -> str:
        made = done - self._first_step
        if made <= 0 or done == total:
            return ""
        seconds = (now - self._started) / made * (total - done)
        return f"  {seconds / 60:.0f} min left" if seconds >= 90 else f"  {seconds:.0f} s left"

    def message(self, text: str) -> None:
        """One line above the display."""
        self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)
