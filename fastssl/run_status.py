"""``status.json``: how a run stands, for whoever has to decide whether to start it again.

    {"state": "training", "time": "2026-05-01T12:00:00Z", "step": 1200, "total_steps": 90000, "saved_step": 1000}

A launcher such as torchrun ends with status 1 whatever its processes say; this file says more. A process that is killed says nothing any more, though:
therefore ``time`` (UTC) is renewed every minute for as long as the process lives, whatever it waits for. ``training`` with a time that is some minutes old means
that it was killed, or stands still, or that the disk takes no more files. Whoever waits on the same host can also ask for the lock: ``flock`` on ``.lock``.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastssl.files import write_atomically

NAME = "status.json"
#: ``training``: at work, or killed without a word. ``stopped``: by a signal, with everything saved: the same command goes on. ``failed``: see ``why``.
#: ``trained``: all steps are made, the report is not written yet. ``finished``.
STATES = ("training", "stopped", "failed", "trained", "finished")
#: Those in which there is a process behind the file.
_AT_WORK = ("training", "trained")
#: Seconds between two signs of life.
BEAT_S = 60.0


class RunStatus:
    """status.json of one run, from its first words until ``close``. No run ends or waits because the file cannot be written.

    Args:
        folder: of the run.
        standing: what the file says besides the state, as it is now; called by several threads.
    """

    def __init__(self, folder: Path, standing: Callable[[], dict[str, Any]]):
        self._folder, self._standing = folder, standing
        self._state = ""
        self._one_writes, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew, name="fastssl-status", daemon=True)

    def tell(self, state: str, **more: Any) -> None:
        """Write how the run stands; from any thread."""
        with self._one_writes:
            self._state = state
            write_status(self._folder, state, **self._standing(), **more)
            if state in _AT_WORK and not self._thread.is_alive() and not self._closed.is_set():
                with suppress(RuntimeError):  # no room for a thread: without signs of life, then
                    self._thread.start()

    def close(self) -> None:
        """End the signs of life."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(BEAT_S)  # not for ever: it may hang at a disk that does not answer

    def _renew(self) -> None:
        while not self._closed.wait(BEAT_S):
            with self._one_writes:
                if self._state in _AT_WORK:
                    write_status(self._folder, self._state, **self._standing())


def write_status(folder: Path, state: str, **values: Any) -> None:
    """Write ``folder/status.json``; where the disk does not take it, nothing happens: no run ends for that."""
    if state not in STATES:
        raise ValueError(f"state={state!r} is not one of {', '.join(STATES)}")
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with suppress(OSError):
        write_atomically(folder / NAME, lambda path: path.write_text(json.dumps({"state": state, "time": now, **values}) + "\n"))


def read_status(folder: Path) -> dict[str, Any]:
    """What ``folder/status.json`` says; empty where there is none that can be read."""
    try:
        found = json.loads((folder / NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
