"""Files that change, or disks that fail, while a reader has them open: errors that name the sample, never a signal."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from children import in_child
from conftest import need_engine

from fastssl.errors import BetonError, JpegError
from fastssl.pipelines.beton import format as beton_format
from fastssl.pipelines.beton import open_file
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.verify import verify
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import ViewSpec

TWO = [ViewSpec(size=16, count=2)]


@pytest.fixture
def copy(beton: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copy.beton"
    shutil.copy(beton, path)
    return path


def cut_behind(path: Path, sample: int) -> None:
    with BetonReader(path) as reader:
        os.truncate(path, int(reader.offsets[sample]))


def touch_a_map(copy: Path) -> None:
    with open(copy, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    os.truncate(copy, 4096)
    print(sum(mapped[len(mapped) // 2 :]))


def test_a_map_would_end_the_process(copy: Path) -> None:
    """What the reader would suffer if it mapped the file: that this test sees the signal, too."""

    assert in_child(touch_a_map, copy).signal == "SIGBUS"


def read_what_was_cut(copy: Path) -> None:
    with BetonReader(copy) as reader:
        whole = [reader.decode(i) for i in range(20)]
        cut_behind(copy, 20)
        for i in range(len(reader)):
            if i < 20:
                assert np.array_equal(reader.decode(i), whole[i])
                continue
            for read in (reader.decode, reader.encoded):
                with pytest.raises(
                    BetonError, match=rf"copy.beton: sample {i}: cut off since it was opened: 0 of [\d,]+ bytes"
                ):
                    read(i)
        with pytest.raises(BetonError, match="its tables: cut off"):
            reader.table_checksums()


def test_cut_under_an_open_reader(copy: Path) -> None:
    ended = in_child(read_what_was_cut, copy)
    assert ended.status == 0, ended


def stop_at_the_first(copy: Path, engine: str, end: int) -> None:
    with (
        ViewLoader(copy, TWO, 8, pipeline=engine) as loader,
        pytest.raises(BetonError, match=r"copy.beton: sample \d+: cut off since"),
    ):
        for batch in (batch for epoch in range(9) for batch in loader.epoch(epoch)):
            os.truncate(copy, end)
            assert len(batch.index) == 8


def skip(copy: Path, engine: str, end: int) -> None:
    with ViewLoader(copy, TWO, 48, pipeline=engine, on_bad="skip") as loader:
        batches = 0
        for batch in (batch for epoch in range(9) for batch in loader.epoch(epoch)):
            os.truncate(copy, end)
            batches, last = batches + 1, batch
        # Batches that were rendered ahead are whole; the last one has what is left of the file, and all else is
        # counted.
        assert batches == 9 and set(last.index.tolist()) == set(range(20))
        assert set(loader.stats.skipped) == set(range(20, 48)) and len(loader.stats.skipped) % 28 == 0


@pytest.mark.engines
@pytest.mark.parametrize("engine", ["native", "dali", "torchcodec"])
def test_cut_under_a_running_loader(engine: str, copy: Path) -> None:
    need_engine(engine)
    with BetonReader(copy) as reader:
        end = int(reader.offsets[20])

    whole = copy.read_bytes()
    for work in (stop_at_the_first, skip):
        copy.write_bytes(whole)
        ended = in_child(work, copy, engine, end, seconds=60)
        assert ended.status == 0, ended


def test_replaced_under_a_reader(copy: Path, tmp_path: Path) -> None:
    """A new file under the same name, as a conversion puts it there, is another file: the one that was opened is read
    to the end.
    """
    with BetonReader(copy) as reader, ViewLoader(reader, TWO, 8) as loader:
        expected = [batch.views[0].clone() for batch in loader.epoch(0)]
        (tmp_path / "new").write_bytes(b"not a beton")
        os.replace(tmp_path / "new", copy)
        for batch, before in zip(loader.epoch(0), expected):
            assert torch.equal(batch.views[0], before)
        with pytest.raises(BetonError):
            BetonReader(copy)


FFCV_WORK = """
import os, sys
import numpy as np
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import ViewSpec
path, other, end = sys.argv[1], sys.argv[2], int(sys.argv[3])
with ViewLoader(path, [ViewSpec(size=16, count=2)], 8, pipeline="ffcv", on_bad="skip") as loader:
    os.replace(other, path)
    mine = os.open(loader.reader.same_file(), os.O_RDWR)
    batches = 0
    try:
        for epoch in range(20):
            for batch in loader.epoch(epoch):
                batches += 1
                if batches == 6:
                    os.truncate(mine, end)
    except Exception as error:
        print(batches, type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.engines
def test_ffcv_is_stopped_before_it_touches_what_was_cut_off(copy: Path, tmp_path: Path) -> None:
    """It maps the file, so the file's length is asked for before each batch. What it opens is the reader's file,
    whatever has its name.
    """
    need_engine("ffcv")
    (tmp_path / "other").write_bytes(b"not a beton")
    with BetonReader(copy) as reader:
        end = int(reader.offsets[20])
    command = [sys.executable, "-c", FFCV_WORK, str(copy), str(tmp_path / "other"), str(end)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    batches, kind, message = done.stdout.split(maxsplit=2)
    assert done.returncode == 0 and int(batches) >= 6 and kind == "BetonError", done
    assert "copy.beton: cut off since it was opened" in message


def write_over(copy: Path) -> None:
    rng = np.random.default_rng(0)
    with BetonReader(copy) as reader, open(copy, "r+b") as file:
        start, end = int(reader.offsets[0]), int(reader.offsets[-1] + reader.sizes[-1])
        for _ in range(20):
            for at in rng.integers(start, end, 40):
                file.seek(at)
                file.write(rng.bytes(20))
            file.flush()
            for i in range(len(reader)):
                try:
                    assert reader.decode(i).shape == (reader.heights[i], reader.widths[i], 3)
                except JpegError as error:
                    assert f"copy.beton: sample {i}: " in str(error)


def test_written_over_under_a_reader(copy: Path) -> None:
    """Another content under the same tables: pictures of the promised size or errors, sample by sample."""

    ended = in_child(write_over, copy)
    assert ended.status == 0, ended


def test_a_disk_that_fails(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with BetonReader(copy) as reader:
        bad = int(reader.offsets[7])
        real = os.preadv

        def failing(descriptor: int, buffers: list, offset: int) -> int:
            if offset == bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(descriptor, buffers, offset)

        monkeypatch.setattr(open_file.os, "preadv", failing)
        with pytest.raises(BetonError, match=r"copy.beton: sample 7: cannot be read: Input/output error"):
            reader.decode(7)
        with ViewLoader(reader, TWO, 48) as loader, pytest.raises(BetonError, match="sample 7: cannot be read"):
            list(loader.epoch(0))
        with ViewLoader(reader, TWO, 48, on_bad="skip") as loader:
            assert len(list(loader.epoch(0))) == 1 and loader.stats.skipped == [7]
        assert verify(copy).damaged == [(7, "cannot be read: Input/output error")]


def test_reads_that_come_in_pieces(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems may give less than they were asked for."""
    with BetonReader(copy) as reader:
        expected = [reader.decode(i) for i in range(48)]
    real = os.preadv
    monkeypatch.setattr(
        open_file.os,
        "preadv",
        lambda file, buffers, at: real(file, [buffers[0][: max(1, len(buffers[0]) // 3)]], at),
    )
    with BetonReader(copy) as reader:
        assert all(np.array_equal(reader.decode(i), picture) for i, picture in enumerate(expected))


def test_a_reader_that_is_closed_while_it_is_read(copy: Path) -> None:
    """The descriptor's number may be another file's by then; the thread that reads keeps its own."""
    with BetonReader(copy) as reader:
        file, expected = reader._file.open(), reader.encoded(3).tobytes()
        reader.close()
        with open("/dev/zero", "rb") as other:
            assert other.fileno() != file.descriptor
            out = np.empty(len(expected), np.uint8)
            assert file.read_into(out, int(reader.offsets[3])) == len(out) and out.tobytes() == expected
        with pytest.raises(BetonError, match="the reader is closed"):
            reader.decode(3)
        number = file.descriptor
        del file
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


@pytest.mark.parametrize("name", ["a pipe", "a device", "a folder"])
def test_what_is_no_file(name: str, tmp_path: Path) -> None:
    path = {"a pipe": tmp_path / "pipe.beton", "a device": Path("/dev/zero"), "a folder": tmp_path}[name]
    if name == "a pipe":
        os.mkfifo(path)
    with pytest.raises(BetonError, match="is not a plain file"):
        BetonReader(path)


def read_holes(path: Path) -> None:
    with pytest.raises(BetonError, match=r"holes.beton: (sample 0: height or width is zero|no memory for its tables)"):
        BetonReader(path)


def test_holes_of_a_terabyte(tmp_path: Path) -> None:
    """A file of a few bytes on the disk whose header speaks of billions of samples: refused before memory is taken for
    them.
    """
    path = tmp_path / "holes.beton"
    count = 4 << 30
    start = 24 + 1041
    header = np.array((2, 1, 2 << 20, count, start + 16 * count), beton_format.HEADER_DTYPE)
    path.write_bytes(header.tobytes() + b"\x02image")
    os.truncate(path, start + 16 * count + 24 * count)

    ended = in_child(read_holes, path, seconds=5)
    assert ended.status == 0, ended
