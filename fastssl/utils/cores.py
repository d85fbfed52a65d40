"""How many cores there are to use."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Cores that this process may use (its affinity mask, which containers and SLURM set; not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
