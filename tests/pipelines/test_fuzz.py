"""Ten thousand corrupted files, those that were kept, and whether the judge would see what they must not lead to."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from children import in_child
from fuzz.corruptions import Corruptor, segments
from fuzz.files import kinds_of_jpeg, seed_files
from fuzz.guarded import Guarded, GuardedReader, watch_reads
from fuzz.judge import Judge, Wrong
from fuzz.pool import run

from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.ops import jpeg

ROOT = Path(__file__).parents[2]
CORPUS = sorted((ROOT / "tests" / "corpus").glob("*.gz"))


def fuzz(*arguments: str) -> subprocess.CompletedProcess:
    """In a fresh process: its children are forked, which the libraries of other tests' engines do not survive."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.timed
def test_ten_thousand_corruptions() -> None:
    """Each gives the right pixels, a named error or a skip that is counted: no signal, none over five seconds, no read
    outside the file.
    """
    done = fuzz("--count", "10000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10,000 cases" in done.stdout and "0 went wrong" in done.stdout


@pytest.mark.slow
def test_a_thousand_pictures_through_the_converter() -> None:
    done = fuzz("--photos", "--count", "1000")
    assert done.returncode == 0, done.stdout + done.stderr


def replay(folder: Path, names: list[str]) -> None:
    watch_reads()
    judge = Judge(seed_files(), folder / "kept.beton")
    for name in names:
        started = time.monotonic()
        print(name)
        for crops in ("host", "device"):
            judge(gzip.decompress((ROOT / "tests" / "corpus" / name).read_bytes()), crops)
        assert time.monotonic() - started < 5


@pytest.mark.timed
def test_kept_files_once_more(tmp_path: Path) -> None:
    """One for each kind of change to each kind of file, chosen by the message it leads to; and whatever went wrong
    once.
    """
    names = [path.name for path in CORPUS]
    assert len(names) > 50 and sum(path.stat().st_size for path in CORPUS) < 1 << 20
    ended = in_child(replay, tmp_path, names, seconds=60)
    assert ended.status == 0, ended


def test_files_are_what_the_writer_writes(tmp_path: Path) -> None:
    """The layout that corruption begins from, against our writer where it can write such a file, and read by the reader
    everywhere.
    """
    for file in seed_files():
        path = tmp_path / "a.beton"
        path.write_bytes(file.layout().content)
        with (
            pytest.warns(UserWarning, match="fields not read") if len(file.fields) > 2 else nullcontext(),
            BetonReader(path) as reader,
        ):
            assert [reader.encoded(i).tobytes() for i in range(len(reader))] == [sample.data for sample in file.samples]
            assert reader.labels is None or reader.labels.tolist() == [sample.label for sample in file.samples]
        if file.paged and file.stored is None:
            with BetonWriter(path, len(file.samples), page_size=file.page_size) as writer:
                for sample in file.samples:
                    writer.add(sample.data, sample.height, sample.width, sample.label, sample.mode)
            assert path.read_bytes() == file.layout().content


def test_a_seed_and_a_number_make_a_case() -> None:
    one, other = Corruptor(), Corruptor()
    cases = [one.case(3, number) for number in range(300)]
    assert cases[250] == other.case(3, 250) and cases[250] != other.case(4, 250)
    assert len({case.how for case in cases}) == 13 and len({case.origin for case in cases}) == 10
    originals = {file.name: file.layout().content for file in seed_files()}
    assert sum(case.content == originals[case.origin] for case in cases) < 30  # zeros written over zeros


def test_segments_of_a_jpeg() -> None:
    data = kinds_of_jpeg()["progressive"]
    found = segments(data)
    assert [marker for marker, _, _ in found].count(0xDA) == data.count(b"\xff\xda") > 5
    assert all(data[start] == 0xFF and data[start + 1] == marker for marker, start, _ in found)


# ---------------------------------------------------------------- whether it would be seen


def touch_the_guard() -> None:
    memory = Guarded()
    memory.last(100)[:] = 1
    print("up to the end", flush=True)
    memory.touch_the_guard()


def test_a_touch_behind_the_memory_is_a_signal() -> None:
    ended = in_child(touch_the_guard)
    assert ended.signal == "SIGSEGV" and ended.output == "up to the end\n"


def wrong_readers(folder: Path) -> None:
    """What the judge says of readers that are wrong."""
    judge = Judge(seed_files(), folder / "a.beton")
    whole = seed_files()[0].layout()
    assert judge(whole.content).kind == "exact"
    real = jpeg.decode_into

    def stale(data: np.ndarray, out: np.ndarray) -> None:
        real(data, out)
        out[0, 0] ^= 1

    def unnamed(data: np.ndarray, out: np.ndarray) -> None:
        raise RuntimeError("a bug")

    for broken, message in [(stale, "its pixels are not"), (unnamed, "a bug")]:
        jpeg.decode_into = broken
        with pytest.raises((Wrong, RuntimeError), match=message):
            judge(whole.content)
    jpeg.decode_into = real
    damaged = bytearray(whole.content)
    at, size = whole.places[1]
    damaged[at : at + size] = bytes(size)
    assert judge(bytes(damaged)).kind == "damaged"
    watch_reads()
    with GuardedReader(folder / "a.beton") as reader:
        reader.offsets[3] = reader.num_bytes - 5
        with pytest.raises(AssertionError, match="were asked for"):
            reader.decode(3)


def test_the_judge_sees_what_is_wrong(tmp_path: Path) -> None:
    ended = in_child(wrong_readers, tmp_path)
    assert ended.status == 0, ended


def hanging_and_dying() -> None:
    from fuzz import pool

    pool.LIMIT = 0.5

    def work():
        def judge(number: int) -> tuple[str, str]:
            if number == 3:
                time.sleep(60)
            if number == 6:
                os.kill(os.getpid(), 11)
            if number == 9:
                raise ValueError("wrong")
            return "fine", ""

        return judge

    found = run(work, 12, workers=2)
    assert found.done >= 12 and sorted(number for number, _ in found.failures) == [3, 6, 9], found
    reasons = dict(found.failures)
    assert "more than 0.5 s" in reasons[3] and "SIGSEGV" in reasons[6] and reasons[9].startswith("ValueError: wrong")


def test_the_pool_sees_what_hangs_and_what_dies() -> None:
    ended = in_child(hanging_and_dying)
    assert ended.status == 0, ended
