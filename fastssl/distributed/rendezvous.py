"""How processes that were started together find each other: a store that one of them (or torchrun) keeps, and a roll
call in it.

    process 0     writes a call that was never there before, reads the answers, confirms each
    the others    answer the call that they find, with a word of their own, until that very answer is confirmed

torchrun's store outlives the processes: after a restart it still holds what the ended ones wrote. A confirmation that
repeats a process's own word cannot be such a leftover, so that all who are confirmed are here now, and under the call,
which is theirs alone, everything else of theirs is kept.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from fastssl.errors import FastSSLError, counted

#: Seconds between two looks at the store, at first and later on.
_OFTEN, _SELDOM = 0.05, 0.5
#: Seconds for which process 0 keeps the store when it gives up, so that the others read who is missing.
_LAST_LOOK = 3 * _SELDOM


@dataclass(frozen=True)
class Patience:
    """How long processes wait for each other.

    Attributes:
        meet_minutes: for all to be there; ``FASTSSL_MEET_MINUTES``. A queue that starts the hosts one by one may need
            more.
        silent_s: seconds without a sign of life after which a process that cannot be reached is given up; one that can
            be reached but does nothing has ten times as long; ``FASTSSL_SILENT_SECONDS``.
    """

    meet_minutes: float = 10
    silent_s: float = 60

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Patience:
        """The values of the two variables where they are set.

        Raises:
            FastSSLError: one is no positive number.
        """
        found = {}
        for name, variable in (("meet_minutes", "FASTSSL_MEET_MINUTES"), ("silent_s", "FASTSSL_SILENT_SECONDS")):
            if environ.get(variable):
                found[name] = _positive(variable, environ[variable])
        return cls(**found)


def _positive(variable: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:  # NaN fails, too
        raise FastSSLError(f"{variable}={text!r} in the environment is not a positive number")
    return value


class NotMet(FastSSLError):
    """Not all came in time; the message is half a sentence that says who is missing."""


def agent_keeps_store(address: str, port: int, environ: Mapping[str, str]) -> bool:
    """Whether torchrun serves a store there, so that no process of the run has to."""
    there = (environ.get("MASTER_ADDR"), environ.get("MASTER_PORT"))
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and there == (address, str(port))


def connect(address: str, port: int, seconds: float, *, keep: bool = False) -> dist.TCPStore:
    """A connection to the store, which one thread may use; ``keep``: serve it from this process, for as long as the
    object lives.

    Raises:
        RuntimeError, ValueError, OSError: nobody serves it in ``seconds``, or the port is taken.
    """
    return dist.TCPStore(address, port, None, keep, timedelta(seconds=seconds), wait_for_workers=False)


def read(store: dist.Store, key: str) -> str:
    """What is stored under ``key``, or the empty string; does not wait for it."""
    return store.get(key).decode() if store.check([key]) else ""


def meet(store: dist.Store, rank: int, size: int, seconds: float) -> str:
    """Wait until processes 0 to ``size`` - 1 are all here; the word that only they share.

    Raises:
        NotMet: they are not, in ``seconds``.
        RuntimeError: the store is gone.
    """
    own = secrets.token_hex(8)
    if rank == 0:
        return _call(store, own, size, _Pauses(seconds))
    return _answer(
        store, own, rank, _Pauses(seconds + _LAST_LOOK)
    )  # process 0 knows who is missing: its word is waited for


def _call(store: dist.Store, call: str, size: int, pause: _Pauses) -> str:
    store.set("call", call)
    answers: dict[int, str] = {}
    while True:
        for other in range(1, size):
            if other not in answers and (answer := _answer_to(store, call, other)):
                answers[other] = answer
        if len(answers) == size - 1:
            break
        if not pause():
            missing = _names([other for other in range(1, size) if other not in answers])
            store.set(f"{call}/given up", missing)
            time.sleep(_LAST_LOOK)
            store.set("call", "")  # whoever is started next should not read it
            raise NotMet(missing)
    for other, answer in answers.items():
        store.set(f"{call}/confirmed/{other}", answer)
    return call


def _answer(store: dist.Store, own: str, rank: int, pause: _Pauses) -> str:
    answered = ""
    while True:
        call = read(store, "call")
        if call and call != answered:
            store.set(f"{call}/answer/{rank}", own)
            answered = call
        if call and read(store, f"{call}/confirmed/{rank}") == own:
            return call
        if call and (missing := read(store, f"{call}/given up")):
            raise NotMet(missing)
        if not pause():
            # The call may be that of a process 0 that is no more: what its store says of the others is then old, too.
            raise NotMet("process 0 is missing" if not call else "process 0 does not answer")


def _answer_to(store: dist.Store, call: str, other: int) -> str:
    return read(store, f"{call}/answer/{other}")


class _Pauses:
    """Waits a little at each call, later on longer; False when the time is over."""

    def __init__(self, seconds: float):
        self._started = time.monotonic()
        self._seconds = seconds

    def __call__(self) -> bool:
        waited = time.monotonic() - self._started
        if waited >= self._seconds:
            return False
        time.sleep(min(self._seconds - waited, max(_OFTEN, min(_SELDOM, waited / 20))))
        return True


def _names(ranks: list[int]) -> str:
    """``process 3 is missing``, ``processes 1, 2 and 5 are missing``, at most eight of them by number."""
    shown = [str(rank) for rank in ranks[:8]]
    if len(ranks) > 8:
        shown.append(counted(len(ranks) - 8, "other"))
    if len(shown) == 1:
        return f"process {shown[0]} is missing"
    return f"processes {', '.join(shown[:-1])} and {shown[-1]} are missing"
