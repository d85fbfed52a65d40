"""Several processes that meet over gloo on this machine, and a time limit, so that one that waits forever fails."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from children import PRELOADED


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_processes(
    function: Callable[..., Any], world: int, *args: Any, join: bool = True, timeout: float = 120
) -> list[Any]:
    """Call ``function(*args)`` in ``world`` processes; what each returned, by rank.

    The environment of each is torchrun's, so that ``world_from_environment`` finds its place in it. The tests' own
    process is not one of them.

    Args:
        function: at the top of a module that can be imported.
        args: and the results: whatever can be pickled.
        join: call it inside ``joined``; otherwise it does that itself.
        timeout: seconds for all of it, the start of the processes included.

    Raises:
        RuntimeError: one of them raised; with the traceback of the first that did.
        TimeoutError: not all were done in time; with where each stood.
    """
    environment = {
        **os.environ,  # as it is now: the process that is forked from keeps what it began with
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    # Forked from a process that has loaded torch and has no threads: a start takes no seconds of imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(world)]
        processes = [
            context.Process(
                target=_child,
                args=(
                    function,
                    args,
                    {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    files[rank],
                    join,
                    timeout,
                ),
                daemon=True,
            )
            for rank in range(world)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, files, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [torch.load(file.with_suffix(".result"), weights_only=False) for file in files]


#: Seconds beyond the limit for processes that have not yet said where they stand, because a busy machine was slow to
#: start them.
_SLOW_START = 120.0


def _wait(processes: list, files: list[Path], deadline: float) -> None:
    while True:
        running = [rank for rank, process in enumerate(processes) if process.is_alive()]
        # The others fail as a consequence, or wait forever: the first to fail says why.
        if errors := sorted(
            (file.with_suffix(".error") for file in files if file.with_suffix(".error").exists()), key=os.path.getmtime
        ):
            raise RuntimeError(f"process {errors[0].stem} of {len(files)} failed:\n{errors[0].read_text()}")
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"processes left with {[process.exitcode for process in processes]} and without a word")
        if not running:
            return
        if (late := time.monotonic() - deadline) >= 0:
            stacks = [file.with_suffix(".stack") for file in files]
            if late < _SLOW_START and not all(stack.exists() and stack.stat().st_size for stack in stacks):
                time.sleep(0.1)
                continue
            where = "\n".join(f"process {stack.stem}:\n{stack.read_text()}" for stack in stacks if stack.exists())
            raise TimeoutError(f"still running: {running}\n{where}")
        wait([processes[rank].sentinel for rank in running], max(0.0, deadline - time.monotonic()))


def _child(
    function: Callable[..., Any], args: tuple, environment: dict[str, str], file: Path, join: bool, timeout: float
) -> None:
    from fastssl.distributed.group import joined
    from fastssl.distributed.world import world_from_environment

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    with file.with_suffix(".stack").open("w") as stack:
        faulthandler.dump_traceback_later(0.8 * timeout, file=stack)
        try:
            if join:
                with joined(world_from_environment(), torch.device("cpu")):
                    faulthandler.dump_traceback_later(0.8 * timeout, file=stack)  # again, from here
                    result = function(*args)
            else:
                result = function(*args)
            torch.save(result, file.with_suffix(".result"))
        except BaseException:
            draft = file.with_suffix(".draft")
            draft.write_text(traceback.format_exc())
            draft.rename(file.with_suffix(".error"))  # whole, or not there
            os._exit(1)
        finally:
            faulthandler.cancel_dump_traceback_later()


#: What ``start_processes`` puts before the code that it is given.
_PREAMBLE = """
import sys, time, torch
from fastssl.distributed.collectives import all_reduce_sum, barrier, rank, world_size
from fastssl.distributed.group import joined
from fastssl.distributed.world import world_from_environment
from fastssl.errors import FastSSLError, Interrupted
torch.set_num_threads(1)
world = world_from_environment()
"""


class Started:
    """Processes that run by themselves, each with its own standard error; for tests that kill them."""

    def __init__(self, commands: list[list[str]], folder: Path, srun: bool = False, **environ: str):
        common = {"MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        if srun:
            rank_names, size = ("SLURM_PROCID", "SLURM_LOCALID"), "SLURM_STEP_NUM_TASKS"
            common["SLURM_STEP_NODELIST"] = "localhost"
        else:
            rank_names, size = ("RANK", "LOCAL_RANK"), "WORLD_SIZE"
            common["MASTER_ADDR"] = "127.0.0.1"
        common[size] = str(len(commands))
        self.files = [folder / f"{rank}.err" for rank in range(len(commands))]
        self.processes = []
        for rank, (command, file) in enumerate(zip(commands, self.files)):
            own = {**os.environ, **common, **environ, **dict.fromkeys(rank_names, str(rank)), "OMP_NUM_THREADS": "1"}
            with file.open("w") as stderr:
                self.processes.append(
                    subprocess.Popen([sys.executable, *command], stdout=stderr, stderr=stderr, env=own)
                )

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self, rank: int) -> str:
        """What a process has written so far."""
        return self.files[rank].read_text(errors="replace")

    def wait_until_said(self, rank: int, words: str, timeout: float = 60) -> None:
        """Wait for ``words`` of a process."""
        deadline = time.monotonic() + timeout
        while words not in self.said(rank):
            if time.monotonic() > deadline or self.processes[rank].poll() is not None:
                raise TimeoutError(f"process {rank} never said {words!r}:\n{self.said(rank)}")
            time.sleep(0.05)

    def ended(self, ranks: Iterable[int], timeout: float) -> list[int]:
        """The statuses of these processes, which end within ``timeout`` seconds from now."""
        deadline = time.monotonic() + timeout
        try:
            return [self.processes[rank].wait(max(0.0, deadline - time.monotonic())) for rank in ranks]
        except subprocess.TimeoutExpired as error:
            said = "\n".join(f"process {rank}:\n{self.said(rank)}" for rank in range(len(self.files)))
            raise TimeoutError(f"still running after {timeout} s\n{said}") from error


def start_processes(code: str, world: int, folder: Path, srun: bool = False, **environ: str) -> Started:
    """``code`` in ``world`` processes, with the names of ``_PREAMBLE``; the environment is torchrun's (or srun's) and
    ``environ``.
    """
    return Started([["-c", _PREAMBLE + code]] * world, folder, srun, **environ)
