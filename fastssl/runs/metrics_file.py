"""``metrics.jsonl``: one line a block of steps, whole or absent, also on a disk that is full for a while."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastssl.utils.atomic_files import write_atomically
from fastssl.utils.json_text import to_json

#: Rows that wait for the disk to take them. A block is 50 steps as a rule: this many are some days of training.
_MOST = 100_000


class MetricsFile:
    """Rows (dicts) appended to a file of JSON lines. One that the disk does not take waits in memory for the next.

    Args:
        path: the file; it need not exist.

    Attributes:
        failure: why the last row could not be written; None where all are.
    """

    def __init__(self, path: Path):
        self.path = path
        self.failure: OSError | None = None
        self._waiting: list[str] = []

    def append(self, row: dict[str, Any]) -> bool:
        """Add one row, numbers that are not finite as null; whether it is in the file now."""
        self._waiting = [*self._waiting[-_MOST:], to_json(row) + "\n"]
        return self.flush()

    def flush(self) -> bool:
        """Try to write what waits; whether nothing is left."""
        if not self._waiting:
            return True
        try:
            self._write("".join(self._waiting).encode())
        except OSError as error:
            self.failure = error
            return False
        self._waiting, self.failure = [], None
        return True

    def _write(self, data: bytes) -> None:
        """All of ``data`` behind the last whole line, or nothing of it."""
        with self.path.open("ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                # A line that a kill cut short: it is passed over by `rows`, and must not spoil this one.
                data = b"\n" + data
            try:
                while data:
                    data = data[os.write(file.fileno(), data) :]
            except OSError:
                file.truncate(size)
                raise

    def sync(self) -> None:
        """Bring the file to the disk: the rows of a checkpoint's steps should not be younger than the checkpoint."""
        with suppress(OSError), self.path.open("rb") as file:
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows, also those that still wait; a line that a kill cut short is passed over."""
        lines = self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
        return rows_in([*lines, *self._waiting])

    def cut(self, step: int, *, probed: bool) -> None:
        """Drop the rows behind ``step``: those steps are about to be made again.

        Args:
            probed: whether the probe that follows ``step`` was made already (or there is none); otherwise its row goes
                too.

        Raises:
            OSError: the file cannot be written.
        """
        rows = [row for row in self.rows() if row.get("kind") in ("step", "probe") and isinstance(row.get("step"), int)]
        kept = [row for row in rows if row["step"] < step + (row["kind"] == "step" or probed)]
        self._waiting = []
        write_atomically(self.path, lambda path: path.write_text("".join(to_json(row) + "\n" for row in kept)))

    def clear(self) -> None:
        """Start over with an empty file."""
        self._waiting = []
        self.path.write_text("")


def rows_in(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The objects in lines of JSON; other lines are passed over."""
    found = []
    for line in lines:
        with suppress(ValueError, RecursionError):  # also numbers of thousands of digits
            if isinstance(row := json.loads(line), dict):
                found.append(row)
    return found
