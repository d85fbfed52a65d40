"""Who this process is among those that train together, as the launcher's environment says.

    torchrun --nproc-per-node 8 -m fastssl pretrain ...   sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    srun --ntasks 16 fastssl pretrain ...                 sets SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID,
                                                          SLURM_STEP_NODELIST
    fastssl pretrain ...                                       neither: one process

Loads no torch, which takes seconds: a command can say that it has begun before it does.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastssl.errors import FastSSLError

#: Where srun's processes meet without MASTER_PORT: 10000 + job id modulo 20000. Below the ports that Linux hands out by
#: itself (from 32768).
_FIRST_PORT, _PORTS = 10000, 20000
#: Seconds for which the other processes of a host wait with an error that all of them have.
_FIRST_SPEAKS_S = 15.0


@dataclass(frozen=True)
class World:
    """This process among all that train together.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number on this machine: the GPU to take.
        address, port: where rank 0 waits for the others; not read where ``size`` is 1.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0


def world_from_environment(environ: Mapping[str, str] = os.environ) -> World:
    """Who this process is, as torchrun says, or else srun, or else the only one.

    ``SLURM_NTASKS`` is not read: it is also set in the shell of sbatch and salloc, where a plain ``fastssl pretrain``
    is one process and would wait for others forever.

    Raises:
        FastSSLError: the variables contradict each other, or some are missing or no numbers; the message names them.
    """
    if any(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _world(environ, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "SLURM_STEP_NUM_TASKS" in environ and _number(environ, "SLURM_STEP_NUM_TASKS") > 1:
        return _world(environ, "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    return World()


@contextmanager
def first_of_host_speaks(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """For what all processes of a host find wrong alike and before they have met: a mistyped option, a file that is not
    there. The first one says it.

    The others wait with their error: if they left first, the launcher would end the first one, which may not have come
    to its words yet. As soon as it has left they are ended without a word; when none does, the error was theirs alone,
    and goes on.
    """
    try:
        yield
    except Exception as error:
        try:
            first = world_from_environment(environ).local_rank == 0
        except FastSSLError:
            first = True
        if first:
            raise
        vars(error)["reported"] = True  # where the wait is ended
        time.sleep(_FIRST_SPEAKS_S)
        vars(error)["reported"] = False
        raise


def _world(environ: Mapping[str, str], starter: str, *names: str) -> World:
    missing = [name for name in names if name not in environ]
    if missing:
        present = [name for name in names if name in environ]
        raise FastSSLError(
            f"{' and '.join(present)} {'is' if len(present) == 1 else 'are'} set, but {' and '.join(missing)} not: "
            f"start with {starter}, which sets them all, or unset all of them for a single process"
        )
    rank, size, local_rank = (_number(environ, name) for name in names)
    if not rank < size or not local_rank < size:
        raise FastSSLError(f"{names[0]}={rank} and {names[2]}={local_rank} must lie below {names[1]}={size}")
    if size == 1:
        return World()
    return World(rank, size, local_rank, *_meeting_place(environ, starter))


def _meeting_place(environ: Mapping[str, str], starter: str) -> tuple[str, int]:
    """(address, port) of rank 0."""
    if starter == "torchrun":
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]:
            raise FastSSLError(
                f"RANK, WORLD_SIZE and LOCAL_RANK are set, but {' and '.join(missing)} not: where is rank 0?"
            )
        return environ["MASTER_ADDR"], _number(environ, "MASTER_PORT")
    # Rank 0 runs on the first host of the step. The address srun was called from may be that of a login node: the last
    # resort.
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    address = environ.get("MASTER_ADDR") or (first_host(nodes) if nodes else environ.get("SLURM_LAUNCH_NODE_IPADDR"))
    if not address:
        raise FastSSLError(
            "srun started several processes, but none of MASTER_ADDR, SLURM_STEP_NODELIST, SLURM_JOB_NODELIST "
            "and SLURM_LAUNCH_NODE_IPADDR says where rank 0 is: set MASTER_ADDR to the host of the first process"
        )
    if environ.get("MASTER_PORT"):
        return address, _number(environ, "MASTER_PORT")
    if "SLURM_JOB_ID" not in environ:
        raise FastSSLError(
            "srun started several processes, but neither MASTER_PORT nor SLURM_JOB_ID is set: set MASTER_PORT "
            "to a free port"
        )
    return address, _FIRST_PORT + _number(environ, "SLURM_JOB_ID") % _PORTS


def _number(environ: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"[0-9]+", environ[name].strip()):
        raise FastSSLError(f"{name}={environ[name]!r} in the environment is not a number from 0")
    return int(environ[name])


def first_host(nodelist: str) -> str:
    """The first host of a list as Slurm writes it: ``node[01-03,07],other`` -> ``node01``.

    Raises:
        FastSSLError: this is no such list.
    """
    found = re.match(r"(?:[^,\[\]\s]|\[[^\[\]]+\])+(?=,|$)", nodelist.strip())
    if not found:
        raise FastSSLError(
            f"cannot read the list of hosts {nodelist!r}: set MASTER_ADDR to the host of the first process"
        )
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", found[0])


@dataclass(frozen=True)
class Launch:
    """What the launchers say of this start of the command: torchrun starts failed processes again, Slurm a job that was
    pre-empted, all with the same arguments. ``--resume never`` or a checkpoint's path was meant for the first start:
    taken at its word again it would delete what that one had trained.

    Attributes:
        names: of each launcher that started this process, a mark of the launch: 16 hexadecimal digits, equal in all of
            its starts and in those of no other launch. Hosts, clusters and jobs are not to be read in it.
        again: the launchers that say that this start is not the first.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    again: frozenset[str] = frozenset()

    def goes_on(self, before: object) -> bool:
        """Whether a launcher repeats the start that kept ``before``: a mapping as ``names``, or something else."""
        return isinstance(before, Mapping) and any(
            before.get(launcher) == self.names[launcher] for launcher in self.again
        )


def launch_from_environment(environ: Mapping[str, str] = os.environ) -> Launch:
    """The launch of this process: of torchrun (``TORCHELASTIC_RUN_ID``, ``TORCHELASTIC_RESTART_COUNT``), of Slurm
    (``SLURM_JOB_ID``, ``SLURM_RESTART_COUNT``, which it sets where a job was requeued), of both, or of none.
    """
    names, again = {}, set()
    if run := environ.get("TORCHELASTIC_RUN_ID"):
        # Unless it was given --rdzv-id, torchrun calls each of its launches "none": then the launcher itself is the
        # name, our parent.
        names["torchrun"] = _mark(run if run != "none" else f"{socket.gethostname()}:{os.getppid()}")
        if environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            again.add("torchrun")
    if job := environ.get("SLURM_JOB_ID"):
        names["slurm"] = _mark(f"{environ.get('SLURM_CLUSTER_NAME', '')}:{job}")
        if environ.get("SLURM_RESTART_COUNT", "0") != "0":
            again.add("slurm")
    return Launch(names, frozenset(again))


def _mark(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]
