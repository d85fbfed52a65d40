"""The bytes of ``.beton`` files. They are read with ``preadv``, and nothing is mapped: where a file is cut short, or a
disk fails, a map would end the process with SIGBUS, and no program can make an error of that.
"""

from __future__ import annotations

import os
import resource
import stat
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from fastssl.errors import BetonError


class OpenFile:
    """A file descriptor that is closed with the last reference to it. Closed with its reader, its number could be given
    to another file while a thread that the disk holds up is about to read from it.
    """

    def __init__(self, path: str | os.PathLike):
        self.descriptor = -1
        # A named pipe would wait here for its writer; a plain file knows nothing of the flag.
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        about = os.fstat(self.descriptor)
        self.num_bytes, self.plain = about.st_size, stat.S_ISREG(about.st_mode)
        self.identity = about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def read_into(self, out: np.ndarray, offset: int) -> int:
        """Fill ``out``, 1-D uint8, from byte ``offset`` on; how many bytes there were, fewer than wanted at the end of
        the file only.
        """
        view, done = out.data, os.preadv(self.descriptor, [out.data], offset)
        while 0 < done < len(view) and (got := os.preadv(self.descriptor, [view[done:]], offset + done)):
            done += got
        return done


class OpenFiles:
    """The files that are open, those asked for last: a process may have 1,024 where nobody raised that."""

    def __init__(self, most: int = 0):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        # A quarter: there may be a second set to judge on, and all else that a process opens.
        self.most = most or max(8, min(limit if limit > 0 else 1 << 14, 1 << 14) // 4)
        self._open, self._lock = OrderedDict[BetonFile, OpenFile](), threading.Lock()

    def open(self, file: BetonFile) -> OpenFile:
        """``file``, which stays open as long as it is in use."""
        with self._lock:
            if (found := self._open.get(file)) is not None:
                self._open.move_to_end(file)
                return found
        found = OpenFile(file.place)
        with self._lock:
            self._open[file] = found
            while len(self._open) > self.most:
                self._open.popitem(last=False)  # a thread that reads from it has its own reference
        return found

    def drop(self, file: BetonFile) -> None:
        """``file`` is not wanted any more."""
        with self._lock:
            self._open.pop(file, None)


class BetonFile:
    """One file, and what a message says when it cannot be read. It stays open until it is closed; ``among`` those of a
    set, as long as it is in use: the next read opens it again, which must give the very same file.

    ``path``, ``num_bytes``: when it was first opened. ``BetonError``: it is missing, or no plain file.
    """

    def __init__(self, path: str | os.PathLike, among: OpenFiles | None = None):
        self.path, self.place = Path(path), os.path.abspath(path)
        self._among, self._closed = among or OpenFiles(1), False
        self._identity: tuple[int, ...] | None = None
        file = self.open()
        self.num_bytes, self._identity = file.num_bytes, file.identity
        if not file.plain:
            raise self.error("is not a plain file")

    def open(self) -> OpenFile:
        """The open file, whose reader may close it meanwhile."""
        if self._closed:
            raise self.error("the reader is closed")
        try:
            file = self._among.open(self)
        except OSError as error:
            raise self.error(f"cannot open: {error.strerror or error}") from None
        if self._identity not in (None, file.identity):
            raise self.error("was replaced or written to since it was first opened; start again with whole files")
        return file

    def close(self) -> None:
        """Let go of it; a thread that is still reading from it finishes first."""
        self._closed = True
        self._among.drop(self)

    def error(self, message: str) -> BetonError:
        """To be raised."""
        return BetonError(f"{self.path}: {message}")

    def read(self, offset: int, out: np.ndarray, what: str) -> None:
        """Fill ``out``, 1-D uint8, from byte ``offset`` on; ``BetonError`` says ``what`` could not be read."""
        file = self.open()
        try:
            got = file.read_into(out, offset)
        except OSError as error:
            raise self.error(f"{what}: cannot be read: {error.strerror or error}") from None
        self.require_bytes(got, len(out), f"{what}: ")

    def require_bytes(self, there: int, wanted: int, what: str = "") -> None:
        """``BetonError`` where fewer bytes are there than wanted."""
        if there < wanted:
            found = f"{there:,} of {wanted:,} bytes are there"
            raise self.error(f"{what}cut off since it was opened: {found}; put the whole file back")

    def array(self, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
        """(count,) of ``dtype``, as they stand at byte ``offset``."""
        out = np.empty(count * dtype.itemsize, np.uint8)
        self.read(offset, out, "its tables")
        return out.view(dtype)
