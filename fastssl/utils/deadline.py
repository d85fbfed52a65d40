"""Waiting with a limit: a disk or a network file system that does not answer holds a thread inside the kernel, where
nothing can wake it.

Whoever waits for such a thread would wait for ever, and so would the end of the program, which joins all threads of its
pools. Hence two rules: a wait ends with `Stalled`, and a program whose threads were given up leaves with ``os._exit``
(`threads_given_up`).

A loader waits for its batches (``result``, ``take``). A command that reads or writes in many places does all of it in
one thread, which says at each step what it begins, and waits for that thread (``watch``).
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from fastssl.errors import FastSSLError, Stalled

#: From then on a wait is worth a line: no disk that works is that slow.
WARN_SECONDS = 60.0
#: How long a loader waits for one batch unless told otherwise. Disks of a cluster come back after minutes.
STALL_MINUTES = 10.0
#: How long one who leaves waits for what its threads have begun.
LEAVE_SECONDS = 30.0
#: Seconds between two looks at a thread that is watched.
_LOOK_SECONDS = 0.1

#: Told, in words that are asked for only where they are needed, what is begun now.
Step = Callable[[Callable[[], str]], None]
_Result = TypeVar("_Result")

_given_up = False


def threads_given_up() -> bool:
    """Whether threads of this process were left behind: its ordinary end would wait for them, ``os._exit`` does not."""
    return _given_up


class Patience:
    """The waits of one consumer.

    Args:
        path: the file that is read, for messages.
        minutes: how long one wait may take; ``math.inf``: for ever.
        deed: what was not done in that time, for messages.

    Attributes:
        given_up: a wait was not answered, or interrupted: threads may still hang, and nobody may wait for them any
            more.
    """

    def __init__(self, path: str | os.PathLike, minutes: float = STALL_MINUTES, deed: str = "read"):
        if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not minutes > 0:
            raise FastSSLError(f"stall_minutes={minutes!r} is not a number of minutes above 0")
        self.path, self.minutes, self.deed, self.given_up = Path(path), minutes, deed, False

    def result(self, future: Future, what: Callable[[], str]) -> Any:
        """``future.result()``. Raises what the future raised, or ``Stalled``, which says ``what()`` was waited for."""
        if not future.done():
            self._until(lambda seconds: bool(wait([future], seconds).done), what)
        return future.result()

    def take(self, source: queue.Queue, what: Callable[[], str]) -> Any:
        """``source.get()``, or ``Stalled``."""
        taken: list = []

        def arrived(seconds: float | None) -> bool:
            try:
                taken.append(source.get(timeout=seconds))
            except queue.Empty:
                return False
            return True

        self._until(arrived, what)
        return taken[0]

    def watch(self, work: Callable[[Step], _Result]) -> _Result:
        """``work(step)`` in a thread of its own: what it returned or raised, or ``Stalled`` where it has not called
        ``step`` for too long.

        ``step`` costs nothing, and ends the work where the caller has left: by Ctrl-C, or because a step took too long.
        """
        steps = _Steps()
        pool = ThreadPoolExecutor(1, thread_name_prefix="fastssl-work")
        future = pool.submit(work, steps)
        pool.shutdown(wait=False)

        def went_on(seconds: float | None) -> bool:
            seen, end = steps.count, math.inf if seconds is None else time.monotonic() + seconds
            while not wait([future], max(0.0, min(_LOOK_SECONDS, end - time.monotonic()))).done:
                if steps.count != seen:
                    return True
                if time.monotonic() >= end:
                    return False
            return True

        try:
            while not future.done():
                self._until(went_on, lambda: steps.what())
        except BaseException:
            steps.left = True
            self.settled([future])
            raise
        return future.result()

    def settled(self, futures: Collection[Future]) -> bool:
        """Wait, not for ever, until none of ``futures`` is running; False where some still are: they are given up."""
        if self.given_up:
            return False
        try:
            # One that was cancelled has not begun, and counts as done only when a thread comes across it.
            running = [future for future in futures if not future.cancelled()]
            if not wait(running, LEAVE_SECONDS).not_done:
                return True
        except BaseException:  # an impatient Ctrl-C
            self.give_up()
            raise
        self.give_up()
        return False

    def give_up(self) -> None:
        """From now on nobody waits for the threads behind this."""
        global _given_up
        self.given_up = _given_up = True

    def require_threads(self) -> None:
        """``FastSSLError`` where threads were given up: they may still write into buffers that a new
        epoch would use.
        """
        if self.given_up:
            raise FastSSLError(f"{self.path}: threads of this loader still wait for the disk; open a new ViewLoader")

    def _until(self, arrived: Callable[[float | None], bool], what: Callable[[], str]) -> None:
        """Call ``arrived(seconds)``, which waits that long, until it is true: twice at most, with a warning between."""
        since, limit = time.time(), 60 * self.minutes
        if arrived(min(WARN_SECONDS, limit)):
            return
        if limit > WARN_SECONDS:
            end = "" if limit > threading.TIMEOUT_MAX else f"; an error in {(limit - WARN_SECONDS) / 60:.0f} min"
            warnings.warn(
                f"{self.path}: nothing was {self.deed} for {WARN_SECONDS:.0f} s, {what()}: the disk or network "
                f"file system does not answer{end}",
                stacklevel=2,
            )
            if arrived(None if limit > threading.TIMEOUT_MAX else limit - WARN_SECONDS):
                return
        self.give_up()
        spent = f"{self.minutes:g} min" if self.minutes >= 1 else f"{limit:g} s"
        raise Stalled(
            f"{self.path}: nothing was {self.deed} for {spent}, since "
            f"{time.strftime('%H:%M:%S', time.localtime(since))}, {what()}: the disk or network "
            "file system does not answer; see whether the file can be read at all (cat FILE > /dev/null, "
            "dmesg), then give the same command again"
        )


class _Steps:
    """How far a watched thread has come: the words of its last step, and how many there were."""

    def __init__(self) -> None:
        self.count, self.left = 0, False
        self.what: Callable[[], str] = lambda: "at its beginning"

    def __call__(self, what: Callable[[], str]) -> None:
        self.what = what
        self.count += 1
        if self.left:
            raise _Left


class _Left(BaseException):
    """Nobody waits for this thread any more."""
