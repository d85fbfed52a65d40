"""Who is who, read off the launcher's environment."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from fastssl.distributed.world import World, first_host, first_of_host_speaks, world_from_environment
from fastssl.errors import FastSSLError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[03-05],x",
}
#: What a shell of sbatch sees: 16 tasks are allocated, and its own step is one.
BATCH_SHELL = {
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_JOB_NODELIST": "gpu[03-05]",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, World()),
        ({"HOME": "/root", "MASTER_ADDR": "head"}, World()),
        (TORCHRUN, World(3, 8, 1, "head", 29500)),
        ({**SRUN, **TORCHRUN}, World(3, 8, 1, "head", 29500)),  # torchrun on each node of an allocation
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, World()),
        (SRUN, World(5, 16, 1, "gpu03", 10000 + 123456 % 20000)),
        ({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}, World(5, 16, 1, "10.0.0.1", 4000)),
        ({**SRUN, "SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": "a,b"}, World(5, 16, 1, "a", 13456)),
        (
            {**SRUN, "SLURM_STEP_NODELIST": "", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.2"},
            World(5, 16, 1, "10.0.0.2", 13456),
        ),
        (BATCH_SHELL, World()),
        (
            {name: value for name, value in BATCH_SHELL.items() if name != "SLURM_STEP_NUM_TASKS"},
            World(),
        ),  # a shell of salloc
    ],
)
def test_the_environment_says_who_this_is(environ: dict[str, str], expected: World) -> None:
    assert world_from_environment(environ) == expected


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"RANK": "0"}, "RANK is set, but WORLD_SIZE and LOCAL_RANK not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK and WORLD_SIZE are set, but LOCAL_RANK not"),
        ({**TORCHRUN, "RANK": "first"}, "RANK='first'"),
        ({**TORCHRUN, "LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        ({**TORCHRUN, "WORLD_SIZE": "3"}, "RANK=3 and LOCAL_RANK=1 must lie below WORLD_SIZE=3"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "but MASTER_PORT not"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS='many'"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"}, "SLURM_LOCALID not"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "none of MASTER_ADDR"),
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu[01"}, "list of hosts 'gpu\\[01'"),
        (
            {name: value for name, value in SRUN.items() if name != "SLURM_JOB_ID"},
            "neither MASTER_PORT nor SLURM_JOB_ID",
        ),
    ],
)
def test_an_environment_that_is_half_set_is_refused_by_name(environ: dict[str, str], says: str) -> None:
    with pytest.raises(FastSSLError, match=says):
        world_from_environment(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node[01-03,07],other", "node01"),
        ("node7", "node7"),
        ("b,a[1-2]", "b"),
        ("login-1.site,x", "login-1.site"),
        ("gpu[9,11]-ib,z", "gpu9-ib"),
        ("rack[1-2]n[003-004]", "rack1n003"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", "node[01", "node]", ",a", "node[]"])
def test_what_is_no_list_of_hosts_is_refused(nodelist: str) -> None:
    with pytest.raises(FastSSLError, match="list of hosts"):
        first_host(nodelist)


def test_who_this_is_is_known_before_torch_is_loaded() -> None:
    code = "import sys; import fastssl.distributed.world, fastssl.cli.pretrain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_all_processes_of_a_host_have_wrong_the_first_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for the launcher to end them; where it does not, the error is theirs and goes on."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for environ, waits in (({}, 0), (TORCHRUN | {"LOCAL_RANK": "0"}, 0), (TORCHRUN, 1), (SRUN, 1), ({"RANK": "1"}, 0)):
        waited.clear()
        with pytest.raises(FastSSLError) as error, first_of_host_speaks(environ):
            raise FastSSLError("no such network")
        assert (len(waited), error.value.reported) == (waits, False), environ
