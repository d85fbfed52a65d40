"""A few kills of each kind. The long form is ``python tests/soak/kills.py``; what it found is in
benchmarks/results/soak/.
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kills import LARGE, Lab, Outcome, checkpointing, compare_runs, conversion, main, make_photos, rows, training

from fastssl.runs.checkpoint import load_checkpoint, write_state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture
def said(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is told meanwhile."""
    lines: list[str] = []
    monkeypatch.setattr(lab, "say", lines.append)
    return lines


def test_a_killed_conversion_ends_byte_for_byte(lab: Lab, said: list[str], tmp_path: Path) -> None:
    found = conversion(lab, make_photos(tmp_path / "photos", 12, bad=(7,), side=280), 3, seed=0)
    assert found.problems == [] and found.kills == 3
    assert [line.split(":")[0] for line in said if "kill" in line] == ["conversion", "  kill 1", "  kill 2", "  kill 3"]


def test_a_run_killed_at_random_steps_ends_bit_for_bit(lab: Lab, said: list[str], beton: Path, tmp_path: Path) -> None:
    found = training(lab, beton, "moco", 3, 0, epochs=2)
    assert found.problems == [] and found.difference == 0 and found.kills >= 2
    assert (
        said[0].endswith("first the run that nobody disturbs, 12 steps; then up to 3 kills")
        and said[-1] == "  started for the last time"
    )
    assert sum(line.startswith("  kill ") and " of 12, " in line for line in said) == found.kills


def test_a_run_killed_while_it_saves_ends_bit_for_bit(lab: Lab, beton: Path) -> None:
    found = checkpointing(lab, beton, 2, 0, epochs=1)
    assert found.problems == [] and found.difference == 0 and found.kills >= 2


def test_a_run_over_one_and_two_processes_is_that_of_one(lab: Lab, beton: Path) -> None:
    """In double precision: in single precision the steps of fresh networks blow rounding up (see
    test_step_over_processes).
    """
    found = training(
        lab, beton, "moco", 2, 0, epochs=2, sizes=(1, 2), float64=True, tolerance=1e-5, probe=False, arch=LARGE
    )
    assert found.problems == [] and found.difference < 1e-9 and found.kills >= 1


@pytest.fixture(scope="module")
def pair(lab: Lab, beton: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs that are equal."""
    from kills import pretrain

    folder = tmp_path_factory.mktemp("pair")
    for name in ("one", "other"):
        lab.run(pretrain("moco", beton, folder / name, 1, probe=False))
    return folder / "one", folder / "other"


def compared(pair: tuple[Path, Path], tolerance: float | None = None) -> Outcome:
    outcome = Outcome("comparison", 0)
    compare_runs(*pair, outcome, tolerance)
    return outcome


@pytest.mark.parametrize("what", ["weight", "optimiser", "row twice", "row missing", "loss", "left behind"])
def test_the_comparison_sees_one_wrong_bit(pair: tuple[Path, Path], what: str) -> None:
    """What the kill loops say is worth as much as the comparison at their end."""
    assert compared(pair).problems == [] and compared(pair).difference == 0
    other = pair[1]
    path, metrics = other / "checkpoints" / "last.pt", other / "metrics.jsonl"
    before = path.read_bytes(), metrics.read_text()
    lines = before[1].splitlines(keepends=True)
    try:
        if what in ("weight", "optimiser"):
            state = load_checkpoint(path)
            value = state["method"]["queue"] if what == "weight" else state["optimizer"]["state"][0]["momentum_buffer"]
            first = (0,) * value.dim()
            value[first] = torch.nextafter(value[first], torch.tensor(9.0))
            write_state(path, state)
        elif what == "row twice":
            metrics.write_text("".join([*lines[:3], lines[2], *lines[3:]]))
        elif what == "row missing":
            metrics.write_text("".join(lines[:2] + lines[3:]))
        elif what == "loss":
            row = json.loads(lines[1])
            metrics.write_text("".join([lines[0], json.dumps({**row, "loss": row["loss"] + 1e-6}) + "\n", *lines[2:]]))
        else:
            (other / "checkpoints" / "x.tmp").touch()
        assert len(compared(pair).problems) == 1
        if what == "weight":
            assert compared(pair, tolerance=1e-5).problems == [] and 0 < compared(pair).difference < 1e-6
    finally:
        path.write_bytes(before[0])
        metrics.write_text(before[1])
        (other / "checkpoints" / "x.tmp").unlink(missing_ok=True)
    assert len(rows(other)) == len(lines)


def test_a_command_that_fails_by_itself_is_no_success(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"convert-imagenet ended with \[1\]"):
        lab.run(["convert-imagenet", str(tmp_path / "absent"), str(tmp_path / "out.beton")])
    processes = lab.start(["recipes"])
    assert lab.finish(processes) == [0]
    from kills import kill

    processes = lab.start(["verify", str(tmp_path)])
    kill(processes, random.Random(0))
    assert lab.finish(processes)[0] in (-signal.SIGKILL, 1)


def test_the_script_writes_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import kills

    bad = Outcome("training moco", 3, kills=2, problems=["method queue differs by 1"])
    bad.where["step"] = 2
    monkeypatch.setattr(kills, "run_all", lambda what, number, seed, say: [bad])
    assert main(["--kills", "2", "--what", "training", "--seed", "3", "--json", str(tmp_path / "kills.json")]) == 1
    record = json.loads((tmp_path / "kills.json").read_text())
    assert record["command"] == "python tests/soak/kills.py --kills 2 --what training --seed 3"
    assert record["kills"] == 2 and record["series"][0]["where"] == {"step": 2} and record["host"]["cores"] >= 1
