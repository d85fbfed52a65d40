"""Check a ``.beton`` file: header and tables, checksums from the side file, and that its pictures decode."""

from __future__ import annotations

import base64
import binascii
import os
import time
import zlib
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastssl.errors import BetonError, JpegError, at_work_on, counted
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.side_file import read_side_file, side_path
from fastssl.utils.cores import available_cores
from fastssl.utils.deadline import STALL_MINUTES, Deadline

#: Samples that one task checks: a checksum alone takes microseconds.
_PART = 64


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
    ``stall_minutes``: how long the tables, or a few dozen samples, are waited for.

    Raises:
        BetonError: the header or a table is damaged, so that no sample can be trusted.
        WorkerError: no memory was left for a sample, or a bug of ours.
        Stalled: the disk or network file system did not answer.
    """
    started, deadline, workers = time.monotonic(), Deadline(path, stall_minutes), workers or available_cores()
    reader = deadline.call(lambda: BetonReader(path), "at its tables")
    with reader:
        problems, checksums = deadline.call(lambda: _side_file_of(reader), "at its tables")
        total = len(reader)
        count = total if decode is None else min(decode, total)
        to_decode = np.zeros(total, bool)
        to_decode[np.arange(count) * total // max(count, 1)] = True
        wanted = np.flatnonzero(to_decode) if checksums is None else np.arange(total)
        parts = np.split(wanted, range(_PART, len(wanted), _PART))
        damaged: list[tuple[int, str]] = []
        done = 0
        if progress is not None:
            progress(0, len(wanted))

        def check(some: np.ndarray) -> list[tuple[int, str]]:
            found = ((i, _check_sample(reader, i, checksums, bool(to_decode[i]))) for i in some.tolist())
            return [(i, complaint) for i, complaint in found if complaint]

        with closing(deadline.map(check, parts, workers, lambda some: f"at samples {some[0]} to {some[-1]}")) as found:
            for some, bad in zip(parts, found):
                damaged += bad
                done += len(some)
                if progress is not None:
                    progress(done, len(wanted))
        compared, side_file = 0 if checksums is None else len(checksums), side_path(path).exists()
        seconds = time.monotonic() - started
        return VerifyReport(reader.path, total, compared, count, problems, damaged, side_file, seconds)


def sample_checksums(reader: BetonReader) -> np.ndarray | None:
    """CRC-32 of every sample's bytes, (N,) uint32, from the side files; None where a file has none that fits it, and of
    a lazy set, whose tables are not to be in memory either.
    """
    found: list[np.ndarray] = []
    for file in [] if reader.lazy else reader.files:
        with nullcontext(reader) if len(reader.files) == 1 else BetonReader(file, lazy=True) as one:
            problems, checksums = _side_file_of(one)
        if problems or checksums is None:
            return None
        found.append(checksums)
    return np.concatenate(found) if found else None


def _side_file_of(reader: BetonReader) -> tuple[list[str], np.ndarray | None]:
    """What is wrong with the file as a whole, and its samples' checksums if they are known."""
    try:
        side = read_side_file(reader.path)
        return ([], None) if side is None else _check_side_file(reader, side)
    except BetonError as error:
        return [str(error)], None


def _check_side_file(reader: BetonReader, side: dict) -> tuple[list[str], np.ndarray | None]:
    """Compare file and side file as wholes; return the complaints and the samples' checksums, (N,) uint32."""
    name = side_path(reader.path)
    if side["bytes"] != reader.num_bytes:
        sizes = f"the file has {reader.num_bytes} bytes, its side file {name} says {side['bytes']}"
        return [f"{sizes}: they do not belong together"], None
    try:
        expected = {key: int(side["crc32"][key]) for key in ("head", "table")}
        checksums = np.frombuffer(base64.b64decode(side["crc32"]["samples"], validate=True), "<u4")
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        return [f"{name}: unreadable checksums ({type(error).__name__}: {error})"], None
    if len(checksums) != reader.num_samples:
        return [f"{name}: {counted(len(checksums), 'checksum')} for {counted(reader.num_samples, 'sample')}"], None
    found, names = reader.table_checksums(), {"head": "header or metadata", "table": "allocation table"}
    problems = [f"checksum of the {what} is wrong" for key, what in names.items() if found[key] != expected[key]]
    classes = side.get("classes")
    if classes is not None and reader.labels is not None:
        outside = np.flatnonzero((reader.labels < 0) | (reader.labels >= len(classes)))
        if len(outside):
            label = f"sample {outside[0]} has the label {reader.labels[outside[0]]}"
            problems.append(f"{label}, but the file has {counted(len(classes), 'class')}")
    return problems, checksums


def _check_sample(reader: BetonReader, i: int, checksums: np.ndarray | None, decode: bool) -> str:
    """What is wrong with it; empty: nothing."""
    complaints = []
    try:
        with at_work_on(reader.path, f"sample {i}"):
            if checksums is not None and zlib.crc32(reader.encoded(i).data) != checksums[i]:
                complaints.append("wrong checksum")
            if decode:
                reader.decode(i)
    except (JpegError, BetonError) as error:
        complaints.append(str(error).removeprefix(f"{reader.path}: sample {i}: "))
    return "; ".join(complaints)
