"""Signals that ask a run to stop, turned into a flag that the loop looks at between two steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

_Result = TypeVar("_Result")

#: Ctrl-C, the launcher's end, Slurm's ``--signal=USR1@120``, and a terminal that was closed.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
#: Seconds between two Ctrl-C that are two: torchrun and srun pass on what the terminal has sent to all already.
_TWICE_S = 2.0


class _Stopped(BaseException):
    """Ends work that may be left in the middle; no `except Exception` on the way takes it for an error."""


class StopRequest(threading.Event):
    """Whether a signal asked for the end. A second Ctrl-C, some seconds behind the first, ends the process at once."""

    _since, _impatient, name = 0.0, False, ""

    def __bool__(self) -> bool:
        return self.is_set()

    def set(self, name: str = "asked to") -> None:
        """Ask for the end."""
        self.name, self._since = name, time.monotonic()
        super().set()

    def unless_asked(self, work: Callable[[], _Result]) -> _Result | None:
        """What ``work()`` returns; None where a signal asks for the end before it is done. For what may be left in the
        middle and is made again later: a launcher gives half a minute, and a probe may take longer than that.
        """
        try:
            try:
                self._impatient = True  # before the look: a signal that comes between the two would be waited for
                return None if self else work()
            finally:
                self._impatient = False
        except _Stopped:
            self._impatient = False
            return None

    @contextmanager
    def by_signals(self) -> Iterator[None]:
        """Listen inside the block. Signals belong to the main thread: in any other nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: object) -> None:
            if not self:
                self.set(signal.Signals(number).name)
                if self._impatient:
                    raise _Stopped
            elif number == signal.SIGINT and time.monotonic() - self._since > _TWICE_S:
                raise KeyboardInterrupt

        before = {}
        for number in _SIGNALS:
            # What is ignored stays so: nohup asked not to be told.
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)  # None: a handler that was not written in Python
