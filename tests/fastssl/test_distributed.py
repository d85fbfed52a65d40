"""Processes that meet, and what the others hear of one that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import free_port, run_processes, start_processes

from fastssl.distributed import group
from fastssl.distributed.collectives import (
    all_reduce_sum,
    barrier,
    rank,
    world_size,
)
from fastssl.distributed.group import joined
from fastssl.distributed.world import World, world_from_environment
from fastssl.errors import FastSSLError

CPU = torch.device("cpu")


def test_those_who_do_not_come_are_missed_by_address_and_port(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("FASTSSL_TIMEOUT_MINUTES", "0.01")
    with (
        pytest.raises(
            FastSSLError,
            match=f"process 0 of 2 did not meet the others at 127.0.0.1:{port} in [0-9]+ s: process 1 is missing; .* "
            "FASTSSL_TIMEOUT_MINUTES",
        ),
        joined(World(0, 2, 0, "127.0.0.1", port), CPU),
    ):
        pytest.fail("nobody else was started")
    assert world_size() == 1
    with (
        pytest.raises(FastSSLError, match="not on meta"),
        joined(World(0, 2, 0, "127.0.0.1", port), torch.device("meta")),
    ):
        pytest.fail("no such device")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_that_waits_for_others_can_be_ended(number: int) -> None:
    code = (
        "from fastssl.distributed.group import joined; from fastssl.distributed.world import World\n"
        "import torch, signal, sys\n"
    )
    code += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\nprint('waiting', flush=True)\n"
    code += f"with joined(World(0, 2, 0, '127.0.0.1', {free_port()}), torch.device('cpu')): pass"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "waiting\n"
            time.sleep(1)
            os.kill(process.pid, number)
            assert process.wait(timeout=20) == -number
        finally:
            process.kill()


SUM = """
with joined(world, torch.device("cpu")):
    total = all_reduce_sum(torch.tensor([float(rank() + 1)]))
    print(rank(), world_size(), total.item(), file=sys.stderr)
"""


@pytest.mark.slow
def test_processes_that_srun_started_meet_where_the_first_host_is(tmp_path: Path) -> None:
    with start_processes(SUM, 2, tmp_path, srun=True) as started:
        assert started.ended([0, 1], timeout=90) == [0, 0]
        assert [started.said(number).splitlines()[-1] for number in (0, 1)] == ["0 2 3.0", "1 2 3.0"]


# ---------------------------------------------------------------------- when something goes wrong


def one_fails() -> None:
    world = world_from_environment()
    try:
        with joined(world, CPU):
            if world.rank == 1:
                raise KeyError("of rank 1")
            all_reduce_sum(torch.zeros(1))  # would wait forever
    except (KeyError, FastSSLError):
        if world_size() != 1:
            raise AssertionError("the group is still there") from None
        if world.rank == 0:
            time.sleep(3)  # the first failure is that of rank 1
        raise


def what_each_says() -> str:
    world = world_from_environment()
    try:
        with joined(world, CPU):
            if world.rank == 1:
                raise KeyError("of rank 1")
            all_reduce_sum(torch.zeros(1))
    except (KeyError, FastSSLError) as error:
        return str(error)
    return "nothing"


def one_comes_late() -> str:
    world, make_groups = world_from_environment(), group._make_groups
    # Only the collectives have to be quick, not the start.
    group._make_groups = lambda *given: make_groups(*given[:3], 0.2)
    try:
        with joined(world, CPU):
            if world.rank == 1:
                time.sleep(25)
            all_reduce_sum(torch.zeros(1))
    except FastSSLError as error:
        return str(error)
    return "nothing"


def one_does_not_come() -> None:
    if rank() == 0:
        barrier()
    else:
        time.sleep(60)


def test_a_failure_is_that_of_the_first_and_ends_the_others() -> None:
    with pytest.raises(RuntimeError, match=r"process 1 of 2 failed:(.|\n)*KeyError: 'of rank 1'"):
        run_processes(one_fails, 2, join=False)


def test_those_who_are_left_alone_say_what_ended_the_other() -> None:
    first, second = run_processes(what_each_says, 2, join=False)
    assert first == "the run cannot go on: another process has ended, and its message says why"
    assert second == "'of rank 1'"


@pytest.mark.slow
def test_a_collective_that_one_does_not_reach_in_time_fails_in_all_with_one_reason() -> None:
    first, second = run_processes(one_comes_late, 2, join=False)
    assert first == ("the run cannot go on: process 1 is not answering (stopped, or held up by a disk?)")
    assert second == "the run cannot go on: another process has ended, and its message says why"


@pytest.mark.slow
def test_a_hang_ends_at_the_time_limit_and_says_where() -> None:
    with pytest.raises(TimeoutError, match=r"still running: \[0, 1\](.|\n)*in barrier"):
        run_processes(one_does_not_come, 2, timeout=15)
