"""A process seen from outside."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastssl.benchmarks.studies.vitals import Metrics, gpu_bytes, look, watch


def test_a_look_at_oneself_agrees_with_what_one_knows(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a").write_text("")
    (tmp_path / "b").write_text("")
    found = look(os.getpid(), tmp_path, 3.5)
    assert found.seconds == 3.5 and found.files == 2
    assert found.threads == len(os.listdir("/proc/self/task")) >= threading.active_count()
    assert abs(found.descriptors - len(os.listdir("/proc/self/fd"))) <= 2  # the look itself opens one
    assert found.cpu_s == pytest.approx(time.process_time(), abs=0.5)
    assert 2**20 < found.own_bytes <= found.resident_bytes


def test_memory_that_is_taken_shows_and_pages_of_a_file_do_not(tmp_path: Path) -> None:
    before = look(os.getpid(), tmp_path, 0)
    # Mapped, not taken from the heap: another test may have left as much room there.
    taken = mmap.mmap(-1, 64 << 20)
    taken.write(os.urandom(1 << 16) * (64 << 4))
    after = look(os.getpid(), tmp_path, 1)
    assert after.own_bytes - before.own_bytes == pytest.approx(len(taken), rel=0.1)
    path = tmp_path / "file"
    path.write_bytes(taken[:])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = look(os.getpid(), tmp_path, 2)
        assert sum(mapped[position] for position in range(0, len(mapped), 4096)) >= 0
        after = look(os.getpid(), tmp_path, 3)
    assert after.own_bytes - before.own_bytes < 4 * 2**20
    assert after.resident_bytes - before.resident_bytes > 50 * 2**20


def test_a_process_that_has_ended_is_not_looked_at(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    deadline = time.monotonic() + 20
    while (
        look(process.pid, tmp_path, 0) is not None and time.monotonic() < deadline
    ):  # a zombie, until somebody waits for it
        time.sleep(0.01)
    assert look(process.pid, tmp_path, 0) is None
    process.wait()
    assert look(process.pid, tmp_path, 0) is None


def test_the_watch_ends_with_the_time_or_with_the_process(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        seen = []
        samples = watch(process, tmp_path, 0.5, interval=0.05, each=seen.append)
        assert 3 <= len(samples) <= 11 and seen == samples and process.poll() is None
        assert [sample.seconds for sample in samples] == sorted(sample.seconds for sample in samples)
    finally:
        process.kill()
        process.wait()
    began = time.monotonic()
    watch(subprocess.Popen([sys.executable, "-c", "pass"]), tmp_path, 60, interval=0.02)
    assert time.monotonic() - began < 30


def test_metrics_are_read_as_they_grow(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.read()
    assert metrics.step is None and metrics.probes == 0
    path.write_text(
        json.dumps({"kind": "step", "step": 4}) + "\n" + json.dumps({"kind": "probe", "step": 4}) + '\n{"kind": "st'
    )
    metrics.read()
    assert (metrics.step, metrics.probes) == (4, 1)
    with path.open("a") as file:
        file.write('ep", "step": 9}\nnonsense\n[1]\n')
    metrics.read()
    metrics.read()
    assert (metrics.step, metrics.probes) == (9, 1)


def test_the_gpus_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_bytes() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$4" = 3 ] && echo 1234 && exit 0\nexit 1\n')
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert gpu_bytes() == 1234 * 2**20
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert gpu_bytes() is None
