"""Corrupt files at random and judge what becomes of them, as many as wanted.

    python -m tests.fuzz --count 10000                          # what the tests do
    python -m tests.fuzz --minutes 20 --seed 7 --keep DIR       # until the time is over; files that go wrong are kept
    python -m tests.fuzz --photos --count 10000                 # pictures of all formats through the converter instead

Status 1 when one went wrong: anything but the right pixels, a named error or a skip that is counted; a signal; more
than five seconds.
"""

from __future__ import annotations

import argparse
import gzip
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from fuzz.corruptions import Case, Corruptor, _touched, edit_markers
from fuzz.guarded import watch_reads
from fuzz.judge import Judge, judge_photo, photos
from fuzz.pool import run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--count", type=int, default=None, help="cases; default: 10000, or without end where --minutes is given"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--photos", action="store_true")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the files that went wrong")
    parser.add_argument("--examples", action="store_true", help="also keep one file for each kind of message")
    options = parser.parse_args()
    count = options.count or (10**9 if options.minutes else 10_000)
    started = time.monotonic()
    make = photo_cases() if options.photos else Corruptor().case
    deadline = None if options.minutes is None else started + 60 * options.minutes
    # In memory where there is such a place: ten thousand files would wait for a disk otherwise.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        if not options.photos:
            Judge(Corruptor().files[:1], Path(folder) / "first.beton")  # compiles what is not compiled yet, once
        work = worker(make, options.seed, Path(folder), options.photos)
        found = run(work, count, first=options.first, workers=options.workers, deadline=deadline)
    seconds = time.monotonic() - started
    verdicts: dict[str, int] = {}
    for kind, times in found.kinds.items():
        verdict = kind.rsplit(", ", 1)[-1]
        verdicts[verdict] = verdicts.get(verdict, 0) + times
    print(
        f"seed {options.seed}: {found.done:,} cases in {seconds:.0f} s on {options.workers} processes: "
        f"{dict(sorted(verdicts.items()))}"
    )
    print(
        f"{len(found.examples)} kinds of messages; slowest case {found.slowest[1]}: {found.slowest[0]:.2f} s; "
        f"{len(found.failures)} went wrong"
    )
    for number, reason in found.failures[:50]:
        print(f"  --seed {options.seed} --first {number} --count 1: {make(options.seed, number).how}: {reason}")
    if options.keep is not None:
        wanted = [number for number, _ in found.failures] + (list(found.examples.values()) if options.examples else [])
        for number in dict.fromkeys(wanted):
            keep(options.keep, make(options.seed, number), options.seed, number)
    return 1 if found.failures else 0


def worker(make: Callable[[int, int], Case], seed: int, folder: Path, pictures: bool) -> Callable:
    """What a child calls to get its judge."""

    def begin() -> Callable[[int], tuple[str, str]]:
        # A case that asks for more is one that takes memory away from a run.
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        watch_reads()
        judge = None if pictures else Judge(Corruptor().files, folder / f"{os.getpid()}.beton")

        def one(number: int) -> tuple[str, str]:
            case = make(seed, number)
            verdict = (
                judge_photo(case.content)
                if judge is None
                else judge(case.content, "device" if number % 4 == 0 else "host")
            )
            return f"{case.how}, {verdict.kind}", verdict.message

        return one

    return begin


def photo_cases() -> Callable[[int, int], Case]:
    """As ``Corruptor.case``, for single pictures."""
    originals = list(photos().items())

    def case(seed: int, number: int) -> Case:
        rng = np.random.default_rng([seed, number, 1])
        name, data = originals[int(rng.integers(len(originals)))]
        is_jpeg = data[:3] == b"\xff\xd8\xff"
        for _ in range(int(rng.choice([1, 1, 2, 4]))):
            data = edit_markers(rng, data) if is_jpeg and rng.integers(2) else _touched(rng, data or b"\0")
        return Case(name, name.replace(", ", " "), data)

    return case


def keep(folder: Path, case: Case, seed: int, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{case.origin}-{case.how}-{seed}-{number}".replace(" ", "_").replace(",", "")
    (folder / f"{name}.gz").write_bytes(gzip.compress(case.content, 9, mtime=0))


if __name__ == "__main__":
    sys.exit(main())
