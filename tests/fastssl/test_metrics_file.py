"""metrics.jsonl: rows are whole or absent, wait while the disk is full, and are cut where a run goes on."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from fastssl.runs.metrics_file import MetricsFile


def step(number: int, kind: str = "step") -> dict:
    return {"kind": kind, "step": number}


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    assert file.rows() == []
    assert all(file.append(step(number)) for number in (1, 2))
    file.sync()
    assert MetricsFile(tmp_path / "m.jsonl").rows() == [step(1), step(2)]


def test_a_line_that_a_kill_cut_short_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(step(1)) + '\n{"kind": "st')
    file = MetricsFile(path)
    file.append(step(2))
    assert file.rows() == [step(1), step(2)]


def test_rows_wait_for_room_and_no_half_line_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    file = MetricsFile(path)
    file.append(step(1))
    whole, original = path.read_bytes(), os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 5:
            return original(descriptor, data[:5])  # what still fits
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    assert not file.append(step(2)) and not file.append(step(3))
    assert path.read_bytes() == whole and file.failure.errno == errno.ENOSPC
    assert file.rows() == [step(1), step(2), step(3)], "what waits counts"
    monkeypatch.undo()
    assert file.append(step(4)) and file.failure is None
    assert MetricsFile(path).rows() == [step(number) for number in (1, 2, 3, 4)]


def test_cut_drops_what_will_be_made_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    rows = [step(4), step(8), step(8, "probe"), step(12)]

    def cut(at: int, probed: bool) -> list[dict]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "[1]\n{}\nnonsense")
        file = MetricsFile(path)
        file.cut(at, probed=probed)
        assert all(json.loads(line) for line in path.read_text().splitlines())
        return file.rows()

    assert cut(8, True) == rows[:3]
    assert cut(8, False) == rows[:2], "the probe behind step 8 is made again"
    assert cut(10, False) == rows[:3] and cut(3, True) == []


def test_clear(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.append(step(1))
    file.clear()
    assert file.rows() == [] and (tmp_path / "m.jsonl").read_text() == ""
