"""Processes that depend on each other watch over each other: one that dies, stands still or fails ends the others soon,
and they say why.

    each process    writes a sign of life into the store every two seconds, and looks at its right neighbour's (a ring:
                    four small messages a look, however many processes there are) and at the one key ``failure``
    its failure     is written there before it leaves; the first one stays
    a killed one    is noticed by its neighbour within a look: the kernel ends the connection that it holds to it
    a silent one    is given up after ``silent_s`` where nothing answers at its address; after ten times that where its
                    kernel still does: it is stopped, or waits for a disk holding the interpreter's lock, which may pass

No clocks of two machines are compared, and the time in which a watcher itself stood still does not count. A process
that learns of a failure has ``leave_s`` seconds to leave by itself (over gloo its collective fails at once). Then it is
ended from here, as it may sit in compiled code for ever.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from fastssl.distributed.rendezvous import read

#: Seconds between two looks, unless ``silent_s`` is short.
BEAT_S = 2.0
#: Times ``silent_s`` for a process that can be reached and yet says nothing.
_STANDS_STILL = 10
#: Seconds between two looks at the very beginning.
_SOON_S = 0.1
#: Seconds for a connection to answer.
_REACH_S = 5.0
#: Seconds for the last words of a process that is ended from here.
_TELL_S = 2.0
#: Looks for which the keeper of the store stays behind the others, at most.
_SEEING_OFF = 2
#: What stands in the place of the next sign of life when a process has left, in order or not.
_LEFT = "left"


class Watch:
    """Two threads of this process: one talks with the store, the other judges, also where the store does not answer.

    Args:
        connect: makes a connection to the store for the one thread; ``prefix`` is put before all its keys.
        rank, size: this process among how many.
        address, port: of the store; says by which way the others reach this process.
        keeper: who keeps the store, for the message when it is gone.
        keeps_store: whether it is this process: it then leaves last.
        silent_s, leave_s: see above.
        before_end: is told why, in a thread of its own, before this process is ended from here; it has two seconds.

    Attributes:
        failure: the first failure of this run, one line that begins with the process; None: none is known.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        rank: int,
        size: int,
        *,
        prefix: str,
        address: str,
        port: int,
        keeper: str,
        keeps_store: bool,
        silent_s: float = 60,
        leave_s: float = 10,
        before_end: Callable[[str], None] | None = None,
    ):
        self.failure: str | None = None
        self._connect, self._prefix, self._rank, self._size = connect, prefix, rank, size
        self._store_place, self._keeper, self._keeps_store = (address, port), keeper, keeps_store
        self._silent_s, self._leave_s, self._before_end = silent_s, leave_s, before_end
        self._beat_s = min(BEAT_S, silent_s / 5)
        self._listener, self._place = _listen(address, port)
        self._words: str | None = None  # the last ones of this process: "" in order, else its failure
        self._rounds = 0
        self._look_now, self._told, self._away = (threading.Event() for _ in range(3))
        self._neighbour = _Neighbour((rank + 1) % size, silent_s)
        self._threads = [
            threading.Thread(target=work, name=f"fastssl-watch{work.__name__}", daemon=True)
            for work in (self._talk, self._judge)
        ]

    def start(self) -> Watch:
        """Begin; all processes have met."""
        for thread in self._threads:
            thread.start()
        return self

    def reason(self, wait_s: float | None = None) -> str | None:
        """The failure that is known, or becomes known within ``wait_s`` seconds (default: some looks). For a process
        whose collective broke.
        """
        deadline = time.monotonic() + (3 * self._beat_s if wait_s is None else wait_s)
        while self.failure is None and time.monotonic() < deadline:
            self._look_now.set()
            time.sleep(0.05)
        return self.failure

    def leave(self, failure: str = "") -> None:
        """Tell the others that this process leaves, in order or (one line) why not; returns when that is written, or
        cannot be.
        """
        if self._words is None:
            self._words = failure and f"{self._name(self._rank, socket.gethostname())}: {failure}"
        self._look_now.set()
        self._told.wait(3 * self._beat_s)

    def close(self) -> None:
        """End the threads. The process that keeps the store first lets all others read in it."""
        self.leave()
        self._away.set()
        # Waited for, as an interpreter that ends while a thread is in compiled code may abort.
        for thread in self._threads:
            thread.join(_SEEING_OFF * self._beat_s + _REACH_S)
        if self._listener is not None:
            self._listener.close()

    # ------------------------------------------------------------------ talking

    def _talk(self) -> None:
        try:
            store = dist.PrefixStore(self._prefix, self._connect())
            store.set(f"place/{self._rank}", json.dumps(self._place))
            while True:
                words = self._words  # before the look: what was not yet said then is said in the next one
                self._look(store, words)
                self._rounds += 1
                if words is not None:
                    break
                # Until the line to the neighbour stands there is but its silence to tell of its end.
                self._look_now.wait(self._beat_s if self._neighbour.place else min(self._beat_s, _SOON_S))
                self._look_now.clear()
            self._told.set()
            if self._keeps_store:
                self._see_the_others_off(store)
        except (RuntimeError, OSError, ValueError):
            if self.failure is None and self._words != "":  # whoever leaves in order needs no store
                self.failure = self._words or f"{self._keeper} is gone"
        finally:
            self._told.set()

    def _look(self, store: dist.Store, words: str | None) -> None:
        """One sign of life, or the last words; one look at the others."""
        if words:
            store.compare_set("failure", "", words)
        store.set(f"beat/{self._rank}", str(self._rounds) if words is None else _LEFT)
        if words is not None:
            store.add("left", 1)
        elif complaint := self._complaint(store):
            store.compare_set("failure", "", complaint)
        self.failure = self.failure or read(store, "failure") or None

    def _see_the_others_off(self, store: dist.Store) -> None:
        """Wait until all have left, for some looks at most: some may never."""
        deadline = time.monotonic() + _SEEING_OFF * self._beat_s
        while store.add("left", 0) < self._size and time.monotonic() < deadline:
            time.sleep(0.05)

    def _complaint(self, store: dist.Store) -> str | None:
        """What is wrong with the neighbour, if anything is."""
        found, key = self._neighbour, f"beat/{self._neighbour.rank}"
        said = read(store, key)
        if found.place is None and (place := read(store, f"place/{found.rank}")):
            found.reach(json.loads(place))
        found.hear(said, at_most=2 * self._beat_s)
        if said != _LEFT and found.has_ended():
            said = read(store, key)  # it may have left since, and its last words stand in the store before its end
            if said != _LEFT:
                return f"{self._name(found.rank, found.host)} has ended without a word (killed, or out of memory?)"
        if said == _LEFT:
            # What it watched is this one's to watch now. The last one watches itself.
            found.forget()
            self._neighbour = _Neighbour((found.rank + 1) % self._size, self._silent_s)
        elif found.patience.is_over(found.silence.seconds, found.answers):
            how = "has stood still for" if found.patience.answered else "has not been heard of for"
            return f"{self._name(found.rank, found.host)} {how} {found.silence.seconds:.0f} s"
        return None

    def _name(self, rank: int, host: str) -> str:
        return f"process {rank} of {self._size}{f' ({host})' if host else ''}"

    # ------------------------------------------------------------------ judging

    def _judge(self) -> None:
        """End the process that does not leave by itself, and notice a store that does not answer."""
        silence, patience, rounds = _Silence(), _Patience(self._silent_s), self._rounds
        while not self._away.wait(self._beat_s):
            silence.count(self._rounds == rounds and self._words is None, at_most=2 * self._beat_s)
            rounds = self._rounds
            if self.failure is None and patience.is_over(silence.seconds, lambda: _answers(self._store_place)):
                self.failure = f"{self._keeper} has not answered for {silence.seconds:.0f} s"
            if self.failure is not None:
                if not self._away.wait(self._leave_s):
                    self._end(self.failure)
                return

    def _end(self, failure: str) -> None:
        why = self._words or ended_line(failure)
        line = f"fastssl: {why}\n"
        with suppress(OSError):
            if sys.stderr is not None and sys.stderr.isatty():
                line = f"\r\x1b[?25h{line}"  # a progress display may have hidden the cursor
            os.write(2, line.encode(errors="replace"))
        if self._before_end is not None:
            # It may want to write to the very disk at which the process hangs.
            teller = threading.Thread(target=self._before_end, args=(why,), daemon=True)
            teller.start()
            teller.join(_TELL_S)
        if self._keeps_store:
            time.sleep(2 * self._beat_s)  # the others still read in it
        os._exit(1)


def ended_line(failure: str | None) -> str:
    """What a process says that has to leave because of another one."""
    return f"the run cannot go on: {failure or 'another process has ended, and its message says why'}"


class _Silence:
    """Seconds without news, by this process's clock; a stretch in which it stood still itself counts no more than
    ``at_most``.
    """

    def __init__(self) -> None:
        self.seconds, self._looked = 0.0, time.monotonic()

    def count(self, silent: bool, at_most: float) -> None:
        now = time.monotonic()
        self.seconds = self.seconds + min(now - self._looked, at_most) if silent else 0.0
        self._looked = now


class _Patience:
    """When a silent process is given up: after ``silent_s``; while its machine says that it is there, only after ten
    times that.
    """

    def __init__(self, silent_s: float):
        self._step = self._next = silent_s
        self.answered = False

    def is_over(self, silence: float, answers: Callable[[], bool]) -> bool:
        """``answers`` is asked once in ``silent_s``: each time leaves a connection behind that the silent process does
        not take.
        """
        if silence < self._next:
            if silence < self._step:
                self._next = self._step
            return False
        self.answered = answers()
        self._next += self._step
        return not self.answered or self._next > _STANDS_STILL * self._step


class _Neighbour:
    """The process that is watched: what it said last, for how long it has been silent, and the line to it."""

    def __init__(self, rank: int, silent_s: float):
        self.rank, self.host = rank, ""
        self.place: dict | None = None
        self.line: _Line | None = None
        self.silence, self.patience = _Silence(), _Patience(silent_s)
        self._said = ""

    def hear(self, said: str, at_most: float) -> None:
        self.silence.count(said == self._said, at_most)
        self._said = said

    def answers(self) -> bool:
        """Whether its machine says that it is there, be it stopped."""
        return self.line is not None and self.line.answers()

    def reach(self, place: dict) -> None:
        """Connect; without a connection its signs of life are all there is."""
        self.forget()
        self.place, self.host = place, place["host"]
        if place["port"] and (self._is_near or not place["address"].startswith(("127.", "::1"))):
            self.line = _Line.to((place["address"], place["port"]))

    @property
    def _is_near(self) -> bool:
        return self.host == socket.gethostname()

    def has_ended(self) -> bool:
        """Whether it is certain that the process is no more."""
        if self.place is None or not self.place["port"]:
            return False
        if self.line is None:  # never reached: of another machine that may be a firewall's doing
            return self._is_near and _is_refused((self.place["address"], self.place["port"]))
        if not self.line.has_ended():
            return False
        if _is_refused((self.place["address"], self.place["port"])):
            return True
        self.reach(self.place)  # the connection alone had ended
        return False

    def forget(self) -> None:
        if self.line is not None:
            self.line.close()
        self.line = None


class _Line:
    """A connection on which nothing is ever sent. The other process never accepts it: its kernel does, and ends it with
    the process, however that ends.
    """

    def __init__(self, connection: socket.socket, place: tuple[str, int]):
        self._connection, self._place = connection, place

    @classmethod
    def to(cls, place: tuple[str, int]) -> _Line | None:
        try:
            connection = socket.create_connection(place, timeout=_REACH_S)
        except OSError:
            return None
        connection.setblocking(False)
        return cls(connection, place)

    def has_ended(self) -> bool:
        """Whether the other end is gone: the process, or something on the way."""
        try:
            return self._connection.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def answers(self) -> bool:
        """Whether the process is there, be it stopped."""
        return _answers(self._place)

    def close(self) -> None:
        self._connection.close()


def _is_refused(place: tuple[str, int]) -> bool:
    """Whether the other machine says that nobody is there any more."""
    try:
        socket.create_connection(place, timeout=_REACH_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _answers(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, timeout=_REACH_S).close()
    except OSError:
        return False
    return True


def _listen(address: str, port: int) -> tuple[socket.socket | None, dict]:
    """A socket that is never accepted from, and where it is: at the address by which this machine reaches the store.
    None where that cannot be had.
    """
    place = {"host": socket.gethostname(), "address": "", "port": 0}
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as route:  # sends nothing: only asks which way it would go
            route.connect(target)
            place["address"] = route.getsockname()[0]
        listener = socket.create_server((place["address"], 0), family=family, backlog=64)
    except OSError:
        return None, place
    place["port"] = listener.getsockname()[1]
    return listener, place
