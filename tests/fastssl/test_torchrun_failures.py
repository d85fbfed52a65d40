"""A process under torchrun that is killed, raises, or hangs: the run ends with the bits of an undisturbed one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from processes import free_port
from small_run import SMALL, same, state

pytestmark = pytest.mark.slow

SETTINGS = [
    *SMALL,
    "train.epochs=8",
    "train.log_every=1",
    "train.checkpoint_minutes=0",
    "probe.every_epochs=0",
    "probe.final_samples=0",
]
# The command, in which rank 1 raises at step 9 of its first start.
RAISES = """
import os
from fastssl.cli import main
from fastssl.training import trainer
make_step = trainer.make_step
def raising(run, batch):
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], run.position.step) == ("1", "0", 9):
        raise RuntimeError("a fault of this process alone")
    return make_step(run, batch)
trainer.make_step = raising
main()
"""


def launched(
    out: Path, beton: Path, log: Path, program: list[str], timeout_minutes: float, restarts: int = 1
) -> subprocess.Popen:
    """``fastssl pretrain`` as two processes under torchrun."""
    arguments = ["pretrain", "--recipe", "few-photos-moco", "--data", str(beton), "--out", str(out)]
    arguments += ["--device", "cpu", "--workers", "1", *(word for item in SETTINGS for word in ("--set", item))]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    launcher += ["--master-port", str(free_port())]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environ["FASTSSL_TIMEOUT_MINUTES"] = str(timeout_minutes)
    command = [sys.executable, *launcher, *program, *arguments]
    with log.open("w") as stderr:
        return subprocess.Popen(command, stderr=stderr, env=environ, start_new_session=True)


def rank_1_of(launcher: int) -> int:
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if b"RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("no process of rank 1")


@pytest.fixture(scope="module")
def undisturbed(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = launched(out, beton, out.parent / "stderr", ["-m", "fastssl"], 10)
    assert process.wait(timeout=300) == 0, (out.parent / "stderr").read_text()
    return out


def wait_until(process: subprocess.Popen, log: Path, condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("fault", ["killed", "raises", "hangs"])
def test_the_run_is_started_again_and_ends_in_the_same_bits(
    fault: str, undisturbed: Path, beton: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "stderr"
    (tmp_path / "raises.py").write_text(RAISES)
    program = [str(tmp_path / "raises.py")] if fault == "raises" else ["-m", "fastssl"]
    limit = 0.25 if fault == "hangs" else 10
    process = launched(out, beton, log, program, limit)
    try:
        wait_until(process, log, (out / "checkpoints" / "last.pt").is_file, 200)
        if fault != "raises":
            os.kill(rank_1_of(process.pid), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        # Six times the limit where the others wait for a checkpoint, as here after each step; 30 seconds that torchrun
        # leaves a process to end; and the start of the next two.
        documented = 6 * 60 * limit if fault == "hangs" else 0
        wait_until(process, log, lambda: log.read_text().count("2 processes start") == 2, documented + 30 + 60)
        assert process.wait(timeout=300) == 0, log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a stopped process, too
    said = log.read_text()
    assert "resumed at step" in said, said
    if fault == "hangs":
        assert "process 1 is not answering" in said, said
    else:
        first = re.search(r"failed \(exitcode: (-?\d+)\) local_rank: (\d)", said)
        assert first is not None and first.groups() == ("-9" if fault == "killed" else "1", "1"), said
    assert ("a fault of this process alone" in said) == (fault == "raises")
    assert same(state(out), state(undisturbed))
    numbers = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in numbers if row["kind"] == "step"] == list(range(1, 49))


def test_torchrun_names_what_failed_first(beton: Path, tmp_path: Path) -> None:
    log, program = tmp_path / "stderr", tmp_path / "raises.py"
    program.write_text(RAISES)
    process = launched(tmp_path / "run", beton, log, [str(program)], 10, restarts=0)
    assert process.wait(timeout=300) == 1
    cause = log.read_text().partition("Root Cause")[2]
    assert "rank      : 1" in cause and "a fault of this process alone" in cause, log.read_text()
