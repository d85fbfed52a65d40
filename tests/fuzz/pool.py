"""Cases in processes that may die of them, with a clock beside each."""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait

#: Seconds for one case; they take milliseconds.
LIMIT = 5.0
#: status of a child whose judge raised before or behind its cases
_BROKEN = 71


@dataclass
class Found:
    """What a run came to.

    Attributes:
        done: cases judged. kinds: how often each (what was done, verdict). failures: (number, what went wrong).
            slowest: (seconds, number).
        examples: for each kind of message the first case that led to it.
    """

    done: int = 0
    kinds: Counter = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)
    examples: dict[str, int] = field(default_factory=dict)


class _Child:
    """A process that judges numbers ``first``, ``first + step``, ... below ``end``; it says in shared memory which one,
    and since when.
    """

    def __init__(self, work: Callable[[], Callable[[int], tuple[str, str]]], first: int, step: int, end: int):
        self.first, self.step, self.end = first, step, end
        self.now = mmap.mmap(-1, 16)
        self.now[:] = struct.pack("<qd", first, 0.0)
        self.pipe, theirs = Pipe(duplex=False)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._run(work(), theirs)
            except BaseException:
                traceback.print_exc()
                os._exit(_BROKEN)
            os._exit(0)
        theirs.close()

    def _run(self, judge: Callable[[int], tuple[str, str]], pipe: Connection) -> None:
        for number in range(self.first, self.end, self.step):
            started = time.monotonic()
            self.now[:] = struct.pack("<qd", number, started)
            try:
                kind, message = judge(number)
                failure = None
            except Exception as error:
                kind, message = "failed", ""
                where = traceback.extract_tb(error.__traceback__)[-1]
                failure = f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})"
            pipe.send_bytes(json.dumps((number, kind, message, failure, time.monotonic() - started)).encode())

    def stands_at(self) -> tuple[int, float]:
        return struct.unpack("<qd", self.now[:])


def run(
    work: Callable[[], Callable[[int], tuple[str, str]]],
    count: int,
    *,
    first: int = 0,
    workers: int = 1,
    deadline: float | None = None,
) -> Found:
    """Judge the cases ``first`` to ``first + count``.

    Args:
        work: called in each child; returns what judges a case by its number: (kind, message), or raises.
        deadline: of ``time.monotonic()``; whatever is done by then is what was asked for.
    """
    found = Found()
    children = [_Child(work, first + k, workers, first + count) for k in range(workers)]
    while children:
        ready = wait([child.pipe for child in children], 0.25)
        now = time.monotonic()
        for child in list(children):
            ended = child.pipe in ready and not _take(found, child.pipe)
            number, since = child.stands_at()
            hangs = not ended and since > 0 and now - since > LIMIT
            late = deadline is not None and now > deadline
            if not (ended or hangs or late):
                continue
            if hangs or late:
                os.kill(child.pid, signal.SIGKILL)
            _, status = os.waitpid(child.pid, 0)
            _take(found, child.pipe)
            children.remove(child)
            if late or (ended and status == 0):
                continue
            if not since or (os.WIFEXITED(status) and os.WEXITSTATUS(status) == _BROKEN):
                raise RuntimeError("the judge itself does not work; see above")
            found.failures.append(
                (number, f"took more than {LIMIT:g} s" if hangs else f"ended the process ({_named(status)})")
            )
            found.done += 1
            if number + child.step < child.end:
                children.append(_Child(work, number + child.step, child.step, child.end))
    return found


def _take(found: Found, pipe: Connection) -> bool:
    """Take what has arrived; False when nothing can come any more."""
    try:
        while pipe.poll():
            number, kind, message, failure, seconds = json.loads(pipe.recv_bytes())
            found.done += 1
            found.kinds[kind] += 1
            found.slowest = max(found.slowest, (seconds, number))
            if failure is not None:
                found.failures.append((number, failure))
            found.examples.setdefault(f"{kind}: {message}", number)
    except (EOFError, OSError):
        return False
    return True


def _named(status: int) -> str:
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
