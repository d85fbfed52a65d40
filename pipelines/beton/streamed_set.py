"""A set of ``.beton`` files on a server that is larger than the cache: some files at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.errors import BetonError, counted
from fastssl.pipelines.beton.dataset import BetonSet
from fastssl.pipelines.beton.format import HEADER_DTYPE, VERSION
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.remote_set import at_once
from fastssl.utils.addresses import shown
from fastssl.utils.remote import About, Patience, remote_file
from fastssl.utils.remote_cache import gigabytes, local_copy, release, room

#: Files that are fetched at once.
_FETCHED = 2


class StreamedSet(BetonSet):
    """A file is fetched when it is first asked for, or ahead of that (`hold`), and makes room for others afterwards;
    but for the first, which stays: the whole is judged by it. Numbers of samples are known from the headers.

    Args:
        names: addresses, in the order of the samples. said: what servers say of the files; one that is another one when
            it comes is an error. path: what messages call the set.
    """

    streamed = True

    def __init__(self, names: Sequence[str], said: Sequence[About], path: Path):
        self._names, self._said, self._bytes = names, said, [about.size or 0 for about in said]
        self._locks = [threading.Lock() for _ in names]
        self._coming, self._closed = dict[int, Future](), threading.Event()
        self._fetcher = ThreadPoolExecutor(_FETCHED, "fastssl-fetch")
        super().__init__(names, path=path, counts=at_once(_count, names))
        self.files = [Path(shown(name)) for name in names]
        self.served = [(file.name, size) for file, size in zip(self.files, self._bytes)]

    def _reader(self, k: int) -> BetonReader:
        if (reader := self._readers.get(k)) is None:
            with self._locks[k]:  # one copy is asked for, which `hold` lets go
                reader = super()._reader(k)
        return reader

    def _open(self, k: int) -> BetonReader:
        # Not among the set's open files: who reads from one that has to go still has it open, and nobody else.
        quiet = threading.current_thread() is not threading.main_thread()
        return BetonReader(local_copy(self._names[k], quiet, self._closed, self._said[k]), lazy=True)

    def require_here(self, window: int | None, ahead: int = 1) -> None:
        size, most = sum(self._bytes), room()
        more = "FASTSSL_CACHE_GB allows more, FASTSSL_CACHE names a folder on a larger disk"
        if window is None:
            raise self._error(
                f"{gigabytes(size)}, and the cache may hold {gigabytes(most)}: {more}; or train on a few files at a "
                "time, --set train.window=FILES"
            )
        group = sum(sorted(np.diff(self._starts).tolist())[:window])
        wanted = window * max(2, 2 + (ahead - 2) // group)  # of the groups that so many samples reach into
        largest = self._bytes[0] + sum(sorted(self._bytes[1:])[-wanted:])
        if largest > most:
            files = counted(min(wanted + 1, len(self.files)), "file")
            here = f"{files} have to be here at once, {gigabytes(largest)}, and the cache may hold {gigabytes(most)}"
            raise self._error(f"train.window={window}: {here}: {more}; or give a smaller window, or a smaller batch")

    def hold(self, files: Sequence[int]) -> None:
        for k, future in self._coming.items():
            if k not in files and not future.cancel():  # of an epoch that was left: it takes others' room
                wait([future])
        self._coming = {k: future for k, future in self._coming.items() if not future.done()}
        for k in set(self._readers) - {0, *files}:
            with self._locks[k]:
                reader = self._readers.pop(k)
            self._among.drop(reader._file)  # a thread that reads from it still has it open
            release(reader.path)
        for k in files:
            if k not in self._readers and k not in self._coming:
                self._coming[k] = self._fetcher.submit(self._reader, k)

    def side_notes(self) -> list[dict[str, Any]]:
        """Of the first file."""
        return self._reader(0).side_notes()

    def close(self) -> None:
        self._closed.set()
        self._fetcher.shutdown(wait=False, cancel_futures=True)
        super().close()
        for reader in self._readers.values():
            release(reader.path)
        self._readers.clear()


def _count(name: str, stop: threading.Event) -> int:
    """Samples of one file, by its header."""
    file = remote_file(name)
    head = Patience(stop).ask(lambda: file.read(0, HEADER_DTYPE.itemsize))
    if len(head) == HEADER_DTYPE.itemsize:
        header = np.frombuffer(head, HEADER_DTYPE)[0]
        if header["version"] == VERSION and 0 < (count := int(header["num_samples"])) < 1 << 48:
            return count
    raise BetonError(f"{file.name}: not a .beton file, or one without samples")
