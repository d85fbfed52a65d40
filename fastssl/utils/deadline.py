"""Waiting with a limit: a disk or a network file system that does not answer holds a thread inside the kernel, where
nothing can wake it. A wait ends with `Stalled`, and a program whose threads were given up leaves with ``os._exit``.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError, wait
from contextlib import closing, suppress
from functools import partial
from typing import TypeVar

from fastssl.errors import FastSSLError, Stalled
from fastssl.utils.addresses import is_remote, shown

#: From then on a wait is worth a line: no disk that works is that slow.
WARN_SECONDS = 60.0
#: How long one result is waited for unless told otherwise. Disks of a cluster come back after minutes.
STALL_MINUTES = 10.0
#: How long one who leaves waits for what its threads have begun.
LEAVE_SECONDS = 30.0

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_given_up = False


def threads_given_up() -> bool:
    """Whether threads of this process were left behind: its ordinary end would wait for them, ``os._exit`` does not."""
    return _given_up


class Deadline:
    """The waits of one consumer, each up to ``minutes`` (``math.inf``: forever). For messages: the file ``path``, and
    the ``deed`` that was not done in that time. ``given_up``: a wait was not answered, or interrupted: threads may
    still hang, and nobody may wait for them.
    """

    def __init__(self, path: str | os.PathLike, minutes: float = STALL_MINUTES, deed: str = "read"):
        if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not minutes > 0:
            raise FastSSLError(f"stall_minutes={minutes!r} is not a number of minutes above 0")
        self.path, self.minutes, self.deed, self.given_up = shown(path), minutes, deed, False

    def result(self, future: Future[_Result], what: Callable[[], str]) -> _Result:
        """``future.result()``. Raises what the future raised, or ``Stalled``, which says ``what()`` was waited for."""
        since, limit = time.time(), 60 * self.minutes
        with suppress(TimeoutError):
            return future.result(min(WARN_SECONDS, limit))
        if future.done():  # the time-out was the work's own, or it has ended since
            return future.result()
        nothing, silent = f"{self.path}: nothing was {self.deed} for", "the disk or network file system does not answer"
        if remote := is_remote(self.path):
            silent = "the server does not answer"
        if limit > WARN_SECONDS:
            end = "" if math.isinf(limit) else f"; an error in {(limit - WARN_SECONDS) / 60:.0f} min"
            warnings.warn(f"{nothing} {WARN_SECONDS:.0f} s, {what()}: {silent}{end}", stacklevel=2)
            if wait([future], min(limit - WARN_SECONDS, threading.TIMEOUT_MAX)).done:
                return future.result()
        self.give_up()
        spent = f"{self.minutes:g} min" if self.minutes >= 1 else f"{limit:g} s"
        see = (
            "the server can be reached at all"
            if remote
            else "the file can be read at all (cat FILE > /dev/null, dmesg)"
        )
        raise Stalled(
            f"{nothing} {spent}, since {time.strftime('%H:%M:%S', time.localtime(since))}, {what()}: {silent}; see "
            f"whether {see}, then give the same command again"
        )

    def map(
        self, work: Callable[[_Item], _Result], items: Iterable[_Item], workers: int, what: Callable[[_Item], str]
    ) -> Generator[_Result, None, None]:
        """``work(item)`` of each item, in order, from ``workers`` threads that are a few items ahead. Raises what the
        work raised, or ``Stalled``, which says ``what(item)``. To close the iterator ends the threads.
        """
        items, pending = iter(items), deque[tuple[_Item, Future[_Result]]]()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="fastssl-work")
        try:
            while True:
                ahead = itertools.islice(items, 4 * workers - len(pending))
                pending.extend((item, pool.submit(work, item)) for item in ahead)
                if not pending:
                    return
                item, future = pending[0]
                yield self.result(future, partial(what, item))
                pending.popleft()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self.settled([future for _, future in pending])

    def call(self, work: Callable[[], _Result], what: str) -> _Result:
        """``work()`` in a thread of its own."""
        (found,) = self.map(lambda _: work(), [None], 1, lambda _: what)
        return found

    def each(self, source: Iterator[_Item], what: Callable[[_Item | None], str]) -> Iterator[_Item]:
        """The items of ``source``, taken in a thread of its own, some at a time. ``what(item)`` says what is behind
        this item; None: what comes first.
        """
        last = None
        # 100 together: each question costs some ten microseconds.
        taken = self.map(lambda _: list(itertools.islice(source, 100)), itertools.count(), 1, lambda _: what(last))
        with closing(taken):
            while some := next(taken):
                yield from some
                last = some[-1]

    def settled(self, futures: Collection[Future]) -> bool:
        """Cancel what has not begun of ``futures``, and wait, not forever, for what has; False where some of it still
        runs: it is given up.
        """
        # One that was cancelled counts as done only when a thread comes across it.
        running = [future for future in futures if not future.cancel()]
        try:
            if not self.given_up and wait(running, LEAVE_SECONDS).not_done:
                self.give_up()
        except BaseException:  # an impatient Ctrl-C
            self.give_up()
            raise
        return not self.given_up

    def give_up(self) -> None:
        """From now on nobody waits for the threads behind this."""
        global _given_up
        self.given_up = _given_up = True
