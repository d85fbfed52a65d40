"""Check a ``.beton`` file: header and tables, checksums from the side file, and that its pictures decode."""

from __future__ import annotations

import base64
import binascii
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fastssl.errors import BetonError, JpegError, counted, worker_error
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.side_file import read_side_file, side_path
from fastssl.utils.cores import available_cores
from fastssl.utils.deadline import STALL_MINUTES, Patience, Step


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found.

    Attributes:
        path: the file. samples: how many it holds. checksummed, decoded: how many of them were checked in each way.
        problems: damage that concerns no single sample, such as a side file that does not fit.
        damaged: (sample, what is wrong), in order.
        side_file: whether one was there; without it there are no checksums. seconds: what the check took.
    """

    path: Path
    samples: int
    checksummed: int
    decoded: int
    problems: list[str]
    damaged: list[tuple[int, str]]
    side_file: bool
    seconds: float

    @property
    def ok(self) -> bool:
        """Nothing wrong was found."""
        return not self.problems and not self.damaged


def verify(
    path: str | os.PathLike,
    decode: int | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    stall_minutes: float = STALL_MINUTES,
) -> VerifyReport:
    """Check ``path``; every sample's checksum is compared when there is a side file.

    ``decode``: decode this many samples, evenly spaced; None: all. ``workers``: threads, None: one a CPU.
    ``progress(done, total)`` is called from one other thread. ``stall_minutes``: how long the tables, or a few dozen
    samples, are waited for; a warning comes after the first minute.

    Raises:
        BetonError: the header or a table is damaged, so that no sample can be trusted.
        WorkerError: no memory was left for a sample, or a bug of ours.
        Stalled: the disk or network file system did not answer.
    """
    return Patience(path, stall_minutes).watch(partial(_verify, path, decode, workers or available_cores(), progress))


def _verify(
    path: str | os.PathLike, decode: int | None, workers: int, progress: Callable[[int, int], None] | None, step: Step
) -> VerifyReport:
    started = time.monotonic()
    step(lambda: "at its tables")
    with BetonReader(path) as reader:
        problems: list[str] = []
        checksums: np.ndarray | None = None
        side_file = side_path(path).exists()
        try:
            side = read_side_file(path)
            if side is not None:
                problems, checksums = _check_side_file(reader, side)
        except BetonError as error:
            problems.append(str(error))
        count = reader.num_samples if decode is None else min(decode, reader.num_samples)
        to_decode = np.zeros(reader.num_samples, bool)
        to_decode[np.arange(count) * reader.num_samples // max(count, 1)] = True
        damaged = []
        for i, complaint in _check_samples(reader, checksums, to_decode, workers, progress, step):
            if complaint is not None:
                damaged.append((i, complaint))
        return VerifyReport(
            reader.path,
            reader.num_samples,
            0 if checksums is None else len(checksums),
            count,
            problems,
            damaged,
            side_file,
            time.monotonic() - started,
        )


def sample_checksums(reader: BetonReader) -> np.ndarray | None:
    """CRC-32 of every sample's bytes, (N,) uint32, from the side file; None where there is none that fits this file."""
    try:
        side = read_side_file(reader.path)
        if side is None:
            return None
        problems, checksums = _check_side_file(reader, side)
    except BetonError:
        return None
    return None if problems else checksums


def _check_side_file(reader: BetonReader, side: dict) -> tuple[list[str], np.ndarray | None]:
    """Compare file and side file as wholes; return the complaints and the samples' checksums, (N,) uint32."""
    name = side_path(reader.path)
    if side["bytes"] != reader.num_bytes:
        return [
            f"the file has {reader.num_bytes} bytes, its side file {name} says {side['bytes']}: they do not "
            "belong together"
        ], None
    try:
        expected = {key: int(side["crc32"][key]) for key in ("head", "table")}
        checksums = np.frombuffer(base64.b64decode(side["crc32"]["samples"], validate=True), "<u4")
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        return [f"{name}: unreadable checksums ({type(error).__name__}: {error})"], None
    if len(checksums) != reader.num_samples:
        return [f"{name}: {counted(len(checksums), 'checksum')} for {counted(reader.num_samples, 'sample')}"], None
    problems = [
        f"checksum of the {what} is wrong"
        for key, what in (("head", "header or metadata"), ("table", "allocation table"))
        if reader.table_checksums()[key] != expected[key]
    ]
    classes = side.get("classes")
    if classes is not None and reader.labels is not None:
        outside = np.flatnonzero((reader.labels < 0) | (reader.labels >= len(classes)))
        if len(outside):
            how_many = counted(len(classes), "class")
            problems.append(
                f"sample {outside[0]} has the label {reader.labels[outside[0]]}, but the file has {how_many}"
            )
    return problems, checksums


def _check_samples(
    reader: BetonReader,
    checksums: np.ndarray | None,
    to_decode: np.ndarray,
    workers: int,
    progress: Callable[[int, int], None] | None,
    step: Step,
) -> Iterator[tuple[int, str | None]]:
    """Yield (sample, complaint or None) in order for all samples that there is something to check about."""
    wanted = np.flatnonzero(to_decode) if checksums is None else np.arange(reader.num_samples)
    chunk = 64  # samples a task: a checksum alone takes microseconds

    def check(some: np.ndarray) -> list[tuple[int, str | None]]:
        return [
            (int(i), _check_sample(reader, int(i), None if checksums is None else int(checksums[i]), to_decode[i]))
            for i in some
        ]

    pending: deque[tuple[np.ndarray, Future]] = deque()
    done = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fastssl-verify")
    try:
        if progress is not None:
            progress(0, len(wanted))
        starts = iter(range(0, len(wanted), chunk))
        while True:
            while len(pending) < 2 * workers and (start := next(starts, None)) is not None:
                some = wanted[start : start + chunk]
                pending.append((some, pool.submit(check, some)))
            if not pending:
                return
            some, future = pending.popleft()
            step(partial(_at_samples, some))
            results = future.result()
            yield from results
            done += len(results)
            if progress is not None:
                progress(done, len(wanted))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _at_samples(some: np.ndarray) -> str:
    return f"at samples {some[0]} to {some[-1]}"


def _check_sample(reader: BetonReader, i: int, checksum: int | None, decode: bool) -> str | None:
    complaints = []
    try:
        if checksum is not None and zlib.crc32(reader.encoded(i)) != checksum:
            complaints.append("wrong checksum")
        if decode:
            reader.decode(i)
    except (JpegError, BetonError) as error:
        complaints.append(str(error).removeprefix(f"{reader.path}: sample {i}: "))
    except Exception as error:
        raise worker_error(reader.path, f"sample {i}", error) from error
    return "; ".join(complaints) or None
