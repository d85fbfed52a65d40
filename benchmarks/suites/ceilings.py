"""The machine's own limits, measured without any of our machinery: what decoding, memory, arithmetic and disk can give
at most. The disk's are what it gives to one sequential reader and takes from one writer, not those of the page cache in
front of it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import psutil
import torch

from fastssl.benchmarks.harness import timing
from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.setting import Setting
from fastssl.benchmarks.suites.loader import BareLoop

_PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Bytes of one request: large enough that the number of requests does not matter, and a multiple of every disk's
#: sector.
_BLOCK = 2**22
#: Below that a figure says more about single requests than about the disk.
_LEAST = 4 * _BLOCK


def run(setting: Setting) -> list[Record]:
    """Measure decoding (for ``seconds``), then memory and arithmetic in turns, then the disk below ``folder``, to which
    each run writes up to 256 MB.

    Returns:
        One record, without a rate of its own; ``details`` hold

        * ``decode_per_s_1_thread``, ``decode_per_s``: JPEGs a second through a bare loop of the binding that the engine
          uses, on one thread and on ``decode_threads`` that share nothing; no crops
        * ``copy_bytes_per_s`` of a large copy in the device's memory, read and written counted
        * ``product_flop_per_s`` of a large matrix product by type of its numbers, two operations for a multiplication
          with its addition. float32 is computed as torch is set to do it, which on a GPU is without TF32 unless
          somebody changed that
        * ``threads``: torch's, which copy and multiply on a CPU
        * ``disk_read_bytes_per_s``, ``disk_write_bytes_per_s``, ``disk_problem``: see `DiskRates`
    """
    device, threads, runs = setting.device, setting.threads, setting.runs
    with setting.open() as (reader, about):
        loops = {"one": BareLoop(reader, 1), "all": BareLoop(reader, threads)}
        windows = timing.measure_windows(loops, seconds=setting.seconds, runs=runs)
    limits = {name: timing.product_limit(device, dtype) for name, dtype in _PRODUCTS.items()}
    limits["copy"] = timing.copy_limit(device)
    timings = timing.measure_in_turns({name: call for name, (call, _) in limits.items()}, device=device, runs=runs)
    rates = {name: amount / timings[name].median_s for name, (_, amount) in limits.items()}
    details = {
        "decode_per_s_1_thread": timing.rate(windows["one"]),
        "decode_per_s": timing.rate(windows["all"]),
        "decode_threads": threads,
        "copy_bytes_per_s": rates.pop("copy"),
        "product_flop_per_s": rates,
        "threads": torch.get_num_threads() if setting.on_cpu else None,
        **{f"disk_{name}": value for name, value in measure_disk(setting.folder, runs)._asdict().items()},
        "data": about,
    }
    return [setting.record("ceilings", workers=threads, details=details)]


class DiskRates(NamedTuple):
    """Medians over runs, in bytes a second; None where ``problem`` says why there is no figure.

    Read by one thread from the beginning of a file to its end, past the page cache: the most that training can read in
    file order; photos in random order come slower from a disk that has to seek. Caches below the operating system, in
    the disk or in a virtual machine's host, cannot be seen from here and are in the figure. Written by one thread as a
    new file, until ``fsync`` has returned.
    """

    read_bytes_per_s: float | None = None
    write_bytes_per_s: float | None = None
    problem: str | None = None


def measure_disk(folder: Path | None = None, runs: int = timing.MIN_RUNS, size: int = 2**28) -> DiskRates:
    """Write and read ``runs`` temporary files, one after the other, after one that is not counted, each of ``size``
    bytes, or less where that would be more than a quarter of the free space, in ``folder`` (the system's for temporary
    files). A file has no name, so that nothing stays behind, not even when the process is killed.
    """
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    try:
        if kind := _kind_in_memory(folder):
            return DiskRates(problem=f"the folder lies in memory ({kind}), not on a disk")
        free = shutil.disk_usage(folder).free
        size = min(size, free // 4) // _BLOCK * _BLOCK
        if size < _LEAST:
            return DiskRates(problem=f"only {free / 1e6:,.0f} MB are free, {4 * _LEAST / 1e6:,.0f} MB are needed")
        # Noise, shifted a little from block to block: a file system may compress, or keep equal blocks only once.
        noise = np.random.default_rng(0).bytes(_BLOCK + size // _BLOCK * 64)
        rounds = [_round(folder, size, memoryview(noise)) for _ in range(runs + 1)]
    except OSError as error:
        return DiskRates(problem=error.strerror or str(error))
    write, reads = size / median(write_s for write_s, _ in rounds[1:]), [read_s for _, read_s in rounds if read_s]
    if len(reads) == len(rounds):
        return DiskRates(size / median(reads[1:]), write)
    return DiskRates(None, write, "the page cache can neither be passed by (O_DIRECT) nor be emptied of the file here")


def _round(folder: Path, size: int, noise: memoryview) -> tuple[float, float | None]:
    """Seconds to write and to read one file; None: a read would come from the page cache."""
    # Mapped memory begins at a page, as O_DIRECT wants it.
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file, mmap.mmap(-1, _BLOCK) as buffer:
        handle, started = file.fileno(), time.perf_counter()
        for start in range(0, size, _BLOCK):
            data = noise[start // _BLOCK * 64 :][:_BLOCK]
            while data:
                data = data[os.write(handle, data) :]
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


def _bypass_cache(handle: int, size: int, buffer: mmap.mmap) -> bool:
    """Make reads come from the disk: past the page cache, or after it was emptied of the file; False: neither."""
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
    for position in (0, size // 2, size - 1):
        try:
            os.preadv(handle, [bytearray(1)], position, os.RWF_NOWAIT)
            return False  # had without waiting for the disk
        except BlockingIOError:
            continue
        except OSError:
            return False  # a file system that cannot say
    return True


def _kind_in_memory(folder: Path) -> str | None:
    """The name of the file system if it keeps its files in memory; None: it does not, or the system does not tell."""
    mounts = [mount for mount in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(mount.mountpoint)]
    kind = str(sorted(mounts, key=lambda mount: len(mount.mountpoint))[-1].fstype) if mounts else None
    return kind if kind in ("tmpfs", "ramfs", "devtmpfs") else None
