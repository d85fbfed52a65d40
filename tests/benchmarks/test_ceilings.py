"""The machine's limits, the disk's among them, and ``fastssl bench ceilings``."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from lines import to_line

from fastssl.benchmarks.harness import timing
from fastssl.benchmarks.harness.records import Record, read_records
from fastssl.benchmarks.harness.setting import Setting
from fastssl.benchmarks.harness.table import cells
from fastssl.benchmarks.suites import ceilings
from fastssl.benchmarks.suites.ceilings import DiskRates, measure_disk
from fastssl.cli import main
from fastssl.cli.bench import bench

SIZE = ceilings._LEAST


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    """A folder whose disk can be measured."""
    if kind := ceilings._kind_in_memory(tmp_path):
        pytest.skip(f"temporary files lie in memory ({kind})")
    return tmp_path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, bool]]]:
    """Every read: (position, bytes, whether past the page cache)."""
    made: list[tuple[int, int, bool]] = []
    real = os.preadv

    def spy(handle: int, buffers: list, position: int, *flags: int) -> int:
        done = real(handle, buffers, position, *flags)
        made.append((position, done, bool(ceilings.fcntl.fcntl(handle, ceilings.fcntl.F_GETFL) & os.O_DIRECT)))
        return done

    monkeypatch.setattr(os, "preadv", spy)
    yield made


# ------------------------------------------------------------------ disk


def test_the_disk_is_read_past_the_page_cache_and_left_as_it_was(
    on_disk: Path, reads: list[tuple[int, int, bool]]
) -> None:
    synced: list[int] = []
    real = os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_size), real(handle))[1])
        rates = measure_disk(on_disk, runs=2, size=SIZE + 5)
    assert rates.problem is None and rates.read_bytes_per_s > 0 and rates.write_bytes_per_s > 0
    assert list(on_disk.iterdir()) == []
    assert synced == [SIZE] * 3  # two counted runs after one that is not, in whole blocks
    if any(direct for *_, direct in reads):
        assert all(direct for *_, direct in reads)
        blocks = [position for position, _, _ in reads]
        assert blocks == [0, *range(0, SIZE, ceilings._BLOCK)] * 3  # the first tries whether this works


def test_the_files_content_differs_from_block_to_block(on_disk: Path) -> None:
    written: list[bytes] = []
    real = os.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: (written.append(bytes(data[:4096])), real(handle, data))[1])
        measure_disk(on_disk, runs=1, size=SIZE)
    assert len(written) == 2 * SIZE // ceilings._BLOCK and len(set(written)) == SIZE // ceilings._BLOCK


def without_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that takes no O_DIRECT."""
    real = ceilings.fcntl.fcntl

    def refuse(handle: int, command: int, value: int = 0) -> int:
        if command == ceilings.fcntl.F_SETFL and value & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(handle, command, value)

    monkeypatch.setattr(ceilings.fcntl, "fcntl", refuse)


def test_without_direct_reads_the_page_cache_is_emptied_first(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_direct(monkeypatch)
    rates = measure_disk(on_disk, runs=1, size=SIZE)
    assert rates.read_bytes_per_s or "page cache" in rates.problem


def test_a_file_that_stays_in_the_page_cache_gives_no_read_rate(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be memory's. The file is really there: nothing was told to let it go."""
    without_direct(monkeypatch)
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: None)
    rates = measure_disk(on_disk, runs=1, size=SIZE)
    assert rates.read_bytes_per_s is None and rates.write_bytes_per_s > 0
    assert rates.problem == "the page cache can neither be passed by (O_DIRECT) nor be emptied of the file here"
    assert list(on_disk.iterdir()) == []


def test_what_cannot_be_measured_has_a_reason(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = on_disk / "file"
    file.touch()
    assert measure_disk(file, size=SIZE) == DiskRates(problem="Not a directory")
    assert measure_disk(on_disk / "absent", size=SIZE) == DiskRates(problem="No such file or directory")

    def full(handle: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert measure_disk(on_disk, size=SIZE) == DiskRates(problem="No space left on device")
    monkeypatch.setattr(ceilings.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000_000))
    assert measure_disk(on_disk, size=SIZE) == DiskRates(problem="only 10 MB are free, 67 MB are needed")
    monkeypatch.setattr(ceilings.shutil, "disk_usage", lambda folder: SimpleNamespace(free=4 * SIZE + 4))
    sizes: list[int] = []
    monkeypatch.setattr(ceilings, "_round", lambda folder, size, noise: (sizes.append(size), (1.0, 2.0))[1])
    assert measure_disk(on_disk, runs=5) == DiskRates(SIZE / 2, SIZE) and set(sizes) == {SIZE}
    assert list(on_disk.iterdir()) == [file]


def test_a_folder_that_cannot_be_written(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk.chmod(0o500)
    if os.geteuid() == 0:  # who may write everywhere, and is told what anybody else would be

        def refuse(**options: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(ceilings.tempfile, "TemporaryFile", refuse)
    assert measure_disk(on_disk, size=SIZE) == DiskRates(problem="Permission denied")


def test_memory_is_not_taken_for_a_disk() -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or os.stat(memory).st_dev == os.stat("/").st_dev:
        pytest.skip("no file system in memory here")
    before = sorted(memory.iterdir())
    assert measure_disk(memory, size=SIZE) == DiskRates(problem="the folder lies in memory (tmpfs), not on a disk")
    assert sorted(memory.iterdir()) == before


# ------------------------------------------------------------------ all of them


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.LIMITS, "cpu", (2**20, 64))
    real = ceilings.measure_disk
    monkeypatch.setattr(ceilings, "measure_disk", lambda folder, runs: real(folder, runs, SIZE))


def test_a_machine_has_one_record(beton: Path, tmp_path: Path, small: None) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit) as stop:
        main(
            [
                *("bench", "ceilings", "--data", str(beton), "--device", "cpu", "--workers", "2", "--seconds", "0.5"),
                *("--folder", str(tmp_path), "--json", str(out)),
            ]
        )
    assert not stop.value.code
    (record,) = read_records(out)
    assert (record.bench, record.device, record.workers, record.runs) == ("ceilings", "cpu", 2, 5)
    assert record.pair_per_s is None and record.ceiling is None
    found = record.details
    assert (
        found["decode_threads"] == 2
        and found["data"]["name"] == beton.name
        and found["threads"] == torch.get_num_threads()
    )
    assert found["decode_per_s_1_thread"] > 0 and found["decode_per_s"] > 0 and found["copy_bytes_per_s"] > 0
    assert set(found["product_flop_per_s"]) == {"float32", "bfloat16"} and min(found["product_flop_per_s"].values()) > 0
    assert (found["disk_read_bytes_per_s"] is None) == (found["disk_problem"] is not None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl"]
    words = cells(record)[-1]
    assert "decoding, 1 thread" in words and "GB/s" in words and "bfloat16 product" in words and "disk" in words
    assert str(tmp_path) not in to_line(record)  # results are passed on


def test_figures_are_rates_of_what_was_done(beton: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    """The copy counts bytes twice, the product two operations for each of side cubed."""
    timed = SimpleNamespace(median_s=0.5)
    contenders: dict = {}
    monkeypatch.setattr(
        timing, "measure_in_turns", lambda calls, **options: contenders.update(calls) or dict.fromkeys(calls, timed)
    )
    monkeypatch.setattr(ceilings, "measure_disk", lambda folder, runs: DiskRates(1.0, 2.0))
    (record,) = ceilings.run(Setting(data=str(beton), workers=1, seconds=0.2))
    found = record.details
    assert found["copy_bytes_per_s"] == 2 * 2**20 / 0.5
    assert found["product_flop_per_s"] == {"float32": 2 * 64**3 / 0.5, "bfloat16": 2 * 64**3 / 0.5}
    assert {name: contenders[name]().dtype for name in ("float32", "bfloat16")} == ceilings._PRODUCTS
    assert contenders["copy"]().numel() == 2**20
    assert [found[f"disk_{name}"] for name in ("read_bytes_per_s", "write_bytes_per_s", "problem")] == [1.0, 2.0, None]


def test_a_disk_that_cannot_be_measured_leaves_the_rest(beton: Path, tmp_path: Path, small: None) -> None:
    (record,) = ceilings.run(Setting(data=str(beton), workers=1, seconds=0.2, folder=tmp_path / "absent"))
    assert record.details["disk_read_bytes_per_s"] is None and record.details["decode_per_s"] > 0
    assert "disk: No such file or directory" in cells(record)[-1]


# ------------------------------------------------------------------ the command


def test_options_are_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Setting] = []
    monkeypatch.setattr(
        ceilings,
        "run",
        lambda setting: calls.append(setting) or [Record(bench="ceilings", host={}, versions={}, git=None)],
    )
    with pytest.raises(SystemExit) as stop:
        main(
            [
                *("bench", "ceilings", "--data", "synthetic", "--data", "x.beton", "--device", "cpu", "--workers", "3"),
                *("--seconds", "2", "--runs", "6", "--photos", "9", "--folder", str(tmp_path)),
            ]
        )
    assert not stop.value.code
    options = {"workers": 3, "seconds": 2.0, "runs": 6, "photos": 9, "folder": tmp_path}
    assert calls == [Setting(data=data, **options) for data in ("synthetic", "x.beton")]


def test_help_has_an_example() -> None:
    result = CliRunner().invoke(bench, ["ceilings", "--help"])
    assert result.exit_code == 0 and "fastssl bench ceilings " in result.output and "--json FILE" in result.output


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--folder", "absent"], 2),
        (["--runs", "4"], 2),
        (["--seconds", "nan"], 2),
        (["--data", "absent.beton", "--device", "cpu"], 1),
    ],
)
def test_wrong_use(arguments: list[str], status: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "ceilings", *arguments])
    errors = capfd.readouterr().err
    assert stop.value.code == status and "Traceback" not in errors and errors.strip()
