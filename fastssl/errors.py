"""Failures that a user can act on: every message says what is wrong, with which file, sample or key, and what to do
about it. And words that messages share.
"""

from __future__ import annotations

import importlib.util
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager


class FastSSLError(Exception):
    """Base of all failures that are the input's, the machine's or the caller's, not the program's. The command line
    prints its message as one line, unless the user has read it already (``reported``: of several processes that end
    with it together the first one speaks), and leaves with status 1.
    """

    reported = False


class BetonError(FastSSLError):
    """A ``.beton`` file is damaged, truncated, or uses a part of the format that we do not read."""


class JpegError(FastSSLError):
    """A picture cannot be decoded, or decodes to something other than its header promises."""


class Stalled(FastSSLError):
    """The disk or network file system under the photos did not answer. Threads may still hang in it: leave the process
    with ``os._exit``.
    """


class WorkerError(FastSSLError):
    """A thread met what it was not made for: no memory, or a bug of ours. Its cause is the error that it met."""


class Interrupted(FastSSLError):
    """The work was asked to stop (SIGINT, SIGTERM), and what was done is saved. The command line leaves with 130."""


class UsageError(FastSSLError):
    """What was asked for contradicts itself. The command line leaves with 2."""


@contextmanager
def at_work_on(path: str | os.PathLike, what: str) -> Iterator[None]:
    """For threads: what is raised in here and is no failure of ours becomes a ``WorkerError`` that names ``what``."""
    try:
        yield
    except FastSSLError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        why = f"unexpected {said} (run again with --debug for the traceback)"
        if is_out_of_memory(error):
            why = "no memory left; fewer --workers or a smaller batch need less"
        raise WorkerError(f"{os.fspath(path)}: {what}: {why}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator has failed: Python's, or torch's, which on a CPU has words for it and no class."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    words = "you tried to allocate|ALLOC_FAILED|CUDA error: out of memory|MPS backend out"
    return named or re.search(words, str(error)) is not None


def counted(number: int, noun: str) -> str:
    """``1 photo``, ``2,000 photos``, ``3 classes``, ``2 batches``, ``4 queries``: a number of things, for messages.
    ``noun``: its last word in the singular, as in "labelled photo"; of those alone that follow the rules of English.
    """
    if number == 1:
        return f"1 {noun}"
    if re.search("(s|x|sh|[nrt]ch)$", noun):
        return f"{number:,} {noun}es"
    return f"{number:,} {re.sub('(?<![aeiou])y$', 'ie', noun)}s"


def require_posix() -> None:
    """FastSSLError where the system lacks the locks, signals and reads of Linux and macOS."""
    if importlib.util.find_spec("fcntl") is None:
        raise FastSSLError("fastssl trains on Linux and macOS, this system lacks what it needs (fcntl): use WSL 2")


def duration(seconds: float) -> str:
    """9 s, 4 min 10 s, 25 min, 3 h 20 min."""
    whole, minutes = round(seconds), round(round(seconds) / 60)
    parts = ((minutes // 60, "h"), (minutes % 60, "min")) if whole >= 600 else ((whole // 60, "min"), (whole % 60, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"


def printable(text: str) -> str:
    r"""``text`` on one line and without what a terminal would act on: control, format and surrogate characters become
    ``\x1b`` and the like. Names of strangers' files are printed; escape sequences in them could move the cursor.
    """
    # Cc: control, Cf: also those that turn the direction of writing, Cs: bytes of a name that are no UTF-8, Zl and Zp:
    # line ends.
    for char in {char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")}:
        text = text.replace(char, char.encode("unicode_escape").decode("ascii"))
    return text


def without_folders(text: str) -> str:
    """``text`` with the names alone of files that stand in it under an absolute path: for messages of other programs
    that go into a run's records, which are passed on.
    """
    return re.sub(r"(?:(?<![\w./~-])|(?<=-[IL]))/(?:[^\s/'\"`:,;()\[\]{}<>]+/)+", "", text)
