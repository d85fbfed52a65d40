"""``.beton`` files on servers: which ones an address stands for, and their copies on this machine."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from fastssl.errors import BetonError, counted
from fastssl.utils.addresses import address, is_web, shown
from fastssl.utils.patterns import expand
from fastssl.utils.remote import About, Patience, file_system, fsspec_errors, remote_file
from fastssl.utils.remote_cache import local_copy, show

#: Files that are asked for, and fetched, at once.
_ASKED, _FETCHED = 16, 4

_Found = TypeVar("_Found")


def remote_names(url: str | os.PathLike) -> list[str]:
    """The addresses of the files that an address stands for, numbers in their names in order: of itself, of a pattern,
    or of a folder of ``.beton`` files. ``FastSSLError``: there is none, or the server cannot be asked.
    """
    text = address(url) or os.fspath(url)
    if is_web(text) and "*" in text.partition("?")[0]:
        how = "give numbers in braces, train-{00000..00063}-of-00064.beton"
        raise BetonError(f"{shown(text)}: a web server has no list of its files; {how}")
    if not is_web(text) and not text.endswith(".beton"):
        text = f"{text.rstrip('/')}/*.beton"
    return expand(text)


def is_beton_address(url: str) -> bool:
    """Whether an address is one of ``.beton`` files, or of a folder of them."""
    if url.partition("?")[0].endswith(".beton"):
        return True
    if is_web(url):
        return False
    system, path = file_system(url)
    with fsspec_errors(shown(url)):
        return bool(system.glob(f"{path.rstrip('/')}/*.beton"))


def said_of_all(names: Sequence[str]) -> list[About]:
    """What the servers say of each file."""
    return at_once(lambda name, stop: Patience(stop).ask(remote_file(name).about), names)


def local_files(names: Sequence[str], size: int = 0) -> list[Path]:
    """Copies of all files, of ``size`` bytes, on this machine, which stay until the process ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # each has a lock, which stays open
    wanted = max(soft, 1024 + len(names))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    if len(names) == 1:
        return [local_copy(names[0])]
    with show(counted(len(names), "file")) as progress:
        done = list[int]()

        def fetch(name: str, stop: threading.Event) -> Path:
            path = local_copy(name, quiet=True, stop=stop)
            done.append(path.stat().st_size)
            progress(sum(done), size)
            return path

        return at_once(fetch, names, _FETCHED)


def at_once(
    work: Callable[[str, threading.Event], _Found], names: Sequence[str], threads: int = _ASKED
) -> list[_Found]:
    """``work(name, stop)`` of all names, in threads. ``stop`` is set when nobody waits any more."""
    pool, stop = ThreadPoolExecutor(threads, "fastssl-remote"), threading.Event()
    try:
        return list(pool.map(lambda name: work(name, stop), names))
    finally:  # after Ctrl-C, or a first failure: Python would wait for the others before it ends
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
