"""status.json: for whoever has to decide whether to start a run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastssl.run_status import write_status


def test_it_says_how_a_run_stands(tmp_path: Path) -> None:
    write_status(tmp_path, "stopped", step=3, why="a signal")
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "stopped", "step": 3, "why": "a signal"}
    with pytest.raises(ValueError, match="state='gone' is not one of"):
        write_status(tmp_path, "gone")


def test_no_run_ends_because_it_cannot_be_written(tmp_path: Path) -> None:
    write_status(tmp_path / "missing", "training", step=3)
    assert not (tmp_path / "missing").exists()
