"""Memory that ends where a page begins that nobody may touch: a read or write behind the last byte ends the process."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

import numpy as np

from fastssl.pipelines.beton import reader as beton
from fastssl.pipelines.beton.reader import BetonReader

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
#: Pictures that are larger than this lie in memory without a guard: a corrupted header may speak of half a gigabyte.
_LARGEST = 1 << 20


class Guarded:
    """One block of memory that is given out again and again, always up to its end."""

    def __init__(self) -> None:
        size = _LARGEST + mmap.PAGESIZE
        self._start = _libc.mmap(
            None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
        if _libc.mprotect(self._start + _LARGEST, mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        self._all = np.frombuffer((ctypes.c_char * _LARGEST).from_address(self._start), np.uint8)

    def last(self, size: int) -> np.ndarray:
        """(size,) uint8 in front of the guard."""
        return self._all[_LARGEST - size :] if 0 < size <= _LARGEST else np.empty(size, np.uint8)

    def touch_the_guard(self) -> None:
        """What must end the process."""
        ctypes.memset(self._start + _LARGEST, 0, 1)


class GuardedReader(BetonReader):
    """The reader, whose decoder gets the stored bytes in guarded memory."""

    def _memory(self, size: int) -> np.ndarray:
        return _of_this_thread().last(size)


_blocks: dict[threading.Thread, Guarded] = {}
_lock = threading.Lock()


def _of_this_thread() -> Guarded:
    """A block for this thread; one of a thread that has ended is given out again."""
    me = threading.current_thread()
    with _lock:
        if me not in _blocks:
            ended = next((thread for thread in _blocks if not thread.is_alive()), None)
            _blocks[me] = Guarded() if ended is None else _blocks.pop(ended)
        return _blocks[me]


def watch_reads() -> None:
    """From now on in this process: a read that is asked for outside of its file is an error that no one expects."""
    real = os.preadv

    def preadv(descriptor: int, buffers: list, offset: int) -> int:
        end, size = offset + sum(map(len, buffers)), os.fstat(descriptor).st_size
        if offset < 0 or end > size:
            raise AssertionError(f"bytes {offset} to {end} of a file of {size} were asked for")
        return real(descriptor, buffers, offset)

    beton.os.preadv = preadv
