"""A child process for what could end the process that tries it, by a signal or by hanging."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait

#: Loaded once, in the process from which the children are forked: it has no threads, whatever the tests' own process
#: has loaded and started.
PRELOADED = [
    "fastssl.models.backbones",
    "fastssl.cli",
    "fastssl.pipelines.loader",
    "fastssl.config.recipe",
    "fastssl.report.pictures",
    "fastssl.weights.importing",
    "fastssl.training.trainer",
]


@dataclass
class Ended:
    """How a child ended: its exit status (None: it had to be killed, it took too long), the signal that ended it, and
    what it wrote.
    """

    status: int | None
    signal: str | None
    output: str


def in_child(function: Callable[..., object], *arguments: object, seconds: float = 30) -> Ended:
    """Call ``function``, of the top of a module, in a process of its own: status 0 when it returns, 70 with the
    traceback when it raises.

    ``seconds`` do not count the start: loading torch once, when this is first used.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe()
    child = context.Process(target=_run, args=(theirs, function, arguments), daemon=True)
    child.start()
    theirs.close()
    ours.recv()  # it has begun
    output = b""
    ended = True
    try:
        while True:
            if not wait([ours, child.sentinel], seconds):
                ended = False
                child.kill()
                break
            if not ours.poll():
                break
            output += ours.recv_bytes()
    except (EOFError, OSError):
        pass
    child.join(seconds)
    if child.is_alive():
        ended = False
        child.kill()
    child.join()
    text = output.decode(errors="replace")
    status = child.exitcode if ended else None
    if status is not None and status < 0:
        return Ended(None, signal.Signals(-status).name, text)
    return Ended(status, None, text)


class _Out:
    """Standard output and error over the pipe: what was written is there however the process ends."""

    encoding, errors = "utf-8", "replace"

    def __init__(self, pipe: object):
        self.pipe = pipe

    def write(self, text: str) -> int:
        self.pipe.send_bytes(text.encode(errors="replace"))
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def _run(pipe: object, function: Callable[..., object], arguments: tuple) -> None:
    pipe.send("begun")
    sys.stdout = sys.stderr = _Out(pipe)
    status = 70
    try:
        function(*arguments)
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    os._exit(status)
