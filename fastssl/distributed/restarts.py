"""Whether this start of the command is one more of the same launch: torchrun starts failed processes again, Slurm a job
that was pre-empted.

All of these starts get the same arguments. ``--resume never`` or a checkpoint's path was meant for the first: taken at
its word again it would delete what that one had trained.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Launch:
    """What the launchers say of this start.

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
