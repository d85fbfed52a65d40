"""What a disk gives to one sequential reader and takes from one writer: its own rates, not those of the page cache in
front of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from fastssl.benchmarks.harness.timing import MIN_RUNS

#: Bytes of one request: large enough that the number of requests does not matter, and a multiple of every disk's
#: sector.
_BLOCK = 2**22
#: Below that a figure says more about single requests than about the disk.
_LEAST = 4 * _BLOCK


@dataclass(frozen=True)
class DiskRates:
    """Medians over runs, in bytes a second; None where ``problem`` says why there is no figure.

    Attributes:
        read_bytes_per_s: of one thread that reads a file from its beginning to its end, past the page cache. It is the
            most that training can read in file order on this disk; photos in random order come slower from a disk that
            has to seek. What caches lie below the operating system, in the disk or in a virtual machine's host, cannot
            be seen from here and is in the figure.
        write_bytes_per_s: of one thread that writes a new file, until ``fsync`` has returned.
    """

    read_bytes_per_s: float | None = None
    write_bytes_per_s: float | None = None
    problem: str | None = None


def measure_disk(folder: Path | None = None, runs: int = MIN_RUNS, size: int = 2**28) -> DiskRates:
    """Write and read ``runs`` temporary files, one after the other, after one that is not counted.

    A file has no name while it is there, so that nothing stays behind, not even when the process is killed.

    Args:
        folder: on the disk that is meant; default: the system's folder for temporary files.
        size: of each file in bytes; less where that would be more than a quarter of the free space.
    """
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    writes: list[float] = []
    reads: list[float] = []
    try:
        if kind := _kind_in_memory(folder):
            return DiskRates(problem=f"the folder lies in memory ({kind}), not on a disk")
        free = shutil.disk_usage(folder).free
        size = min(size, free // 4) // _BLOCK * _BLOCK
        if size < _LEAST:
            return DiskRates(problem=f"only {free / 1e6:,.0f} MB are free, {4 * _LEAST / 1e6:,.0f} MB are needed")
        # Noise, shifted a little from block to block: a file system may compress, or keep equal blocks only once.
        noise = np.random.default_rng(0).bytes(_BLOCK + size // _BLOCK * 64)
        for _ in range(runs + 1):
            write_s, read_s = _round(folder, size, memoryview(noise))
            writes.append(write_s)
            reads += [read_s] if read_s is not None else []
    except OSError as error:
        return DiskRates(problem=error.strerror or str(error))
    write = size / statistics.median(writes[1:])
    if len(reads) < len(writes):
        return DiskRates(
            None, write, "the page cache can neither be passed by (O_DIRECT) nor be emptied of the file here"
        )
    return DiskRates(size / statistics.median(reads[1:]), write)


def _round(folder: Path, size: int, noise: memoryview) -> tuple[float, float | None]:
    """Seconds to write and to read one file; None: a read would come from the page cache."""
    # Mapped memory begins at a page, as O_DIRECT wants it.
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file, mmap.mmap(-1, _BLOCK) as buffer:
        handle, started = file.fileno(), time.perf_counter()
        for start in range(0, size, _BLOCK):
            _write_all(handle, noise[start // _BLOCK * 64 :][:_BLOCK])
        os.fsync(handle)
        write_s = time.perf_counter() - started
        if not _bypass_cache(handle, size, buffer):
            return write_s, None
        started = time.perf_counter()
        position = 0
        while position < size:
            done = os.preadv(handle, [buffer], position)
            if done == 0:
                raise OSError(errno.EIO, "the file ends before its end")
            position += done
        return write_s, time.perf_counter() - started


def _write_all(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]


def _bypass_cache(handle: int, size: int, buffer: mmap.mmap) -> bool:
    """Make reads come from the disk: past the page cache, or else after it was emptied of the file. False: neither can
    be had.
    """
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "O_DIRECT"):
        return False
    # Also before direct reads: there are file systems that take O_DIRECT and answer from the page cache all the same.
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(handle, [buffer], 0)  # others take the flag and refuse the read
        return True
    except OSError:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags)
    return not any(_is_cached(handle, position) for position in (0, size // 2, size - 1))


def _is_cached(handle: int, position: int) -> bool:
    """Whether a byte can be had without waiting for the disk; also True where the file system cannot say."""
    try:
        os.preadv(handle, [bytearray(1)], position, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _kind_in_memory(folder: Path) -> str | None:
    """The name of the file system if it keeps its files in memory; None: it does not, or the system does not tell."""
    device = os.stat(folder).st_dev
    for mount in psutil.disk_partitions(all=True):
        if mount.fstype in ("tmpfs", "ramfs", "devtmpfs"):
            with contextlib.suppress(OSError):
                if os.stat(mount.mountpoint).st_dev == device:
                    return str(mount.fstype)
    return None
