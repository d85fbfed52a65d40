"""Freed memory stays with the process, in a process of its own: the setting holds for the rest of one."""

from __future__ import annotations

import os
import subprocess
import sys

# Sixteen 64 MB blocks, taken, touched and freed again and again: what a training step does with its activations.
SCRIPT = """
import resource, sys
sys.path[:0] = {path!r}
from fastssl.utils.host_memory import keep_freed_memory
import numpy as np
kept = keep_freed_memory() if {keep} else False
def work():
    blocks = [np.ones(2**23) for _ in range(4)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    work()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool, **variables: str) -> tuple[bool, int]:
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))
    }
    script = SCRIPT.format(path=sys.path, keep=keep)
    done = subprocess.run(
        [sys.executable, "-c", script], env={**plain, **variables}, capture_output=True, text=True, check=True
    )
    kept, count = done.stdout.split()
    return kept == "True", int(count)


def test_pages_are_not_faulted_in_again() -> None:
    (_, before), (kept, after) = faults(False), faults(True)
    if not sys.platform.startswith("linux"):
        assert not kept  # another malloc, which is left alone and said to be
        return
    assert kept and after < before / 20


def test_who_has_chosen_an_allocator_keeps_it() -> None:
    assert faults(True, MALLOC_ARENA_MAX="2")[0] is False
