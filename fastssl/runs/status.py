"""``status.json``: how a run stands, for whoever has to decide whether to start it again.

    {"state": "training", "time": "2026-05-01T12:00:00Z", "step": 1200, "total_steps": 90000, "saved_step": 1000}

``time`` (UTC) is renewed every minute for as long as the process lives, whatever it waits for: ``training`` with a time
that is some minutes old means that it was killed, or stands still, or that the disk takes no more files. Whoever waits
on the same host can also ask for the lock: ``flock`` on ``.lock``.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from fastssl.utils.atomic_files import write_atomically
from fastssl.utils.json_text import to_json

NAME = "status.json"
#: ``training``: at work, or killed without a word. ``stopped``: by a signal, with everything saved: the same command
#: goes on. ``failed``: see ``why``. ``trained``: all steps are made, the report is not written yet. ``finished``.
State = Literal["training", "stopped", "failed", "trained", "finished"]
#: Those in which there is a process behind the file.
_AT_WORK = ("training", "trained")
#: Seconds between two signs of life.
BEAT_S = 60.0
#: Seconds for which whoever has something to tell waits until it is written.
_WAIT_S = 10.0


class RunStatus:
    """status.json of one run, until ``close``. No run ends because the file cannot be written, nor waits for long: one
    thread writes all of it, and at a disk that does not answer it is this thread that hangs.

    Args:
        folder: of the run.
        standing: what the file says besides the state, as it is now; called by several threads.
    """

    def __init__(self, folder: Path, standing: Callable[[], dict[str, Any]]):
        self._folder, self._standing = folder, standing
        self._words: queue.SimpleQueue[tuple[State, dict[str, Any], threading.Event] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="fastssl-status", daemon=True)
        self._thread.start()

    def tell(self, state: State, **more: Any) -> None:
        """Write how the run stands; from any thread."""
        written = threading.Event()
        self._words.put((state, {**self._standing(), **more}, written))
        written.wait(_WAIT_S)

    def close(self) -> None:
        """End the signs of life."""
        self._words.put(None)
        self._thread.join(_WAIT_S)

    def _write(self) -> None:
        state: State | None = None
        while True:
            try:
                words = self._words.get(timeout=BEAT_S)
            except queue.Empty:
                if state in _AT_WORK:
                    write_status(self._folder, state, **self._standing())
                continue
            if words is None:
                return
            state, values, written = words
            write_status(self._folder, state, **values)
            written.set()


def write_status(folder: Path, state: State, **values: Any) -> None:
    """Write ``folder/status.json``; where the disk does not take it, nothing happens: no run ends for that."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = to_json({"state": state, "time": now, **values}) + "\n"
    with suppress(OSError):
        write_atomically(folder / NAME, lambda path: path.write_text(text))


def read_status(folder: Path) -> dict[str, Any]:
    """What ``folder/status.json`` says; empty where there is none that can be read."""
    try:
        found = json.loads((folder / NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
