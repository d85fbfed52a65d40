"""The picture of a soak: what it shows, and what is no soak that could be drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.benchmarks.harness.records import Record, write_records
from fastssl.benchmarks.harness.report import write_report
from fastssl.benchmarks.harness.soak_plot import soak

WATCHED = {"seconds": [0.0, 60.0, 120.0], "own_mb": [1.0, 600.0, 600.0], "threads": [1, 3, 3], "open_files": [3, 5, 5]}
WINDOWS = {"window_seconds": [90.0, 120.0], "window_pair_per_s": [80.0, 70.0], "window_denied": [0.0, 0.5]}
WHOLE = Record(
    bench="soak",
    recipe="few-photos",
    arch="lcnet_035",
    device="cpu",
    details={"minutes": 2.0, "curves": {**WATCHED, **WINDOWS, "warm_from": [40.0]}},
)


def test_the_rate_is_drawn_by_the_clock_and_in_the_time_that_was_given() -> None:
    memory, counts, rate = soak([WHOLE]).axes
    assert memory.get_title() == "2 minutes of few-photos, lcnet_035, cpu" and list(memory.lines[0].get_xdata()) == [
        0,
        1,
        2,
    ]
    assert [list(line.get_ydata()) for line in counts.lines] == [[1, 3, 3], [3, 5, 5]]
    assert [list(line.get_ydata()) for line in rate.lines] == [[80.0, 140.0], [80.0, 70.0]]
    quiet = {**WHOLE.details, "curves": {**WATCHED, **WINDOWS, "window_denied": [0.0, 0.01]}}
    assert len(soak([replace(WHOLE, details=quiet)]).axes[2].lines) == 1


def test_it_is_part_of_the_report(tmp_path: Path) -> None:
    write_records(tmp_path / "soak.jsonl", [WHOLE])
    write_report([tmp_path / "soak.jsonl"], tmp_path / "out")
    assert np.asarray(Image.open(tmp_path / "out" / "soak.png").convert("L")).std() > 10
    assert "A long run, watched" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    "curves", [None, "x", WATCHED, WATCHED | WINDOWS | {"threads": [1]}, WATCHED | WINDOWS | {"own_mb": ["x"] * 3}]
)
def test_curves_that_do_not_fit_together_are_none(curves: object) -> None:
    assert soak([replace(WHOLE, details={"curves": curves})]) == "no record of a soak with curves"
