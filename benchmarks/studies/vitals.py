"""What a process looks like from outside, once a second: memory, threads, open files, processor time; from Linux' own
files.

From outside, because a process that leaks, hangs or dies would not say so itself, and because looking must not change
what is looked at.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

#: Seconds between two questions about the GPU's memory: each starts a program.
_GPU_EVERY = 10.0


@dataclass(frozen=True)
class Sample:
    """One look at a process.

    Attributes:
        seconds: since the watch began.
        own_bytes: memory that is the process's own: resident anonymous and shared pages and what of them was swapped
            out. Pages of files (the photos, libraries) are left out: the kernel takes them back when it likes, and they
            grow until all photos were read once.
        resident_bytes: everything resident, those pages included (VmRSS).
        threads, descriptors: how many there are.
        cpu_s: processor time since the process began, all threads together.
        waiting_s: how long its first thread stood ready to run while the cores worked for others, since it began; None
            where the system does not count.
        files: how many files lie in the watched folder.
        step, probes: the run's last step and the number of its probes in ``metrics.jsonl`` of that folder; None and 0
            before there is one.
        gpu_bytes: memory in use on the GPU, by whomever; None between two questions and without a GPU.
    """

    seconds: float
    own_bytes: int
    resident_bytes: int
    threads: int
    descriptors: int
    cpu_s: float
    waiting_s: float | None
    files: int
    step: int | None = None
    probes: int = 0
    gpu_bytes: int | None = None


def look(pid: int, folder: Path, seconds: float, proc: Path = Path("/proc")) -> Sample | None:
    """One sample of process ``pid``; None when it has ended.

    Args:
        folder: whose files are counted, folders inside it included.
        seconds: for the sample.
        proc: where the kernel's files are.
    """
    here = proc / str(pid)
    try:
        status = dict(line.split(":", 1) for line in (here / "status").read_text().splitlines())
        descriptors = len(os.listdir(here / "fd"))
        # The program's name in parentheses may hold anything: count from behind it. Fields 14 and 15 of proc(5) are
        # utime and stime.
        fields = (here / "stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError, ValueError):
        return None
    if fields[0] in "ZX" or "VmRSS" not in status:  # ended, and nobody has asked for its exit status yet
        return None
    sizes = {
        name: 1024 * int(status[name].split()[0])
        for name in ("VmRSS", "RssAnon", "RssShmem", "VmSwap")
        if name in status
    }
    own = sum(sizes.get(name, 0) for name in ("RssAnon", "RssShmem", "VmSwap"))
    try:
        waiting = int((here / "schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        waiting = None
    return Sample(
        seconds=seconds,
        own_bytes=own,
        resident_bytes=sizes["VmRSS"],
        threads=int(status["Threads"]),
        descriptors=descriptors,
        cpu_s=(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        waiting_s=waiting,
        files=sum(len(names) for _, _, names in os.walk(folder)),
    )


def watch(
    process: subprocess.Popen,
    folder: Path,
    seconds: float,
    interval: float = 1.0,
    each: Callable[[Sample], None] | None = None,
) -> list[Sample]:
    """Look at ``process`` every ``interval`` seconds until ``seconds`` are over or it has ended; it is left running.

    Args:
        each: called with every sample, for a display.
    """
    samples: list[Sample] = []
    began, gpu_at = time.monotonic(), 0.0
    metrics = Metrics(folder / "metrics.jsonl")
    while process.poll() is None and (now := time.monotonic() - began) < seconds:
        found = look(process.pid, folder, now)
        if found is not None:
            metrics.read()
            found = replace(found, step=metrics.step, probes=metrics.probes)
            if now >= gpu_at:
                found, gpu_at = replace(found, gpu_bytes=gpu_bytes()), now + _GPU_EVERY
            samples.append(found)
            if each is not None:
                each(found)
        time.sleep(max(0.0, began + now + interval - time.monotonic()))
    return samples


class Metrics:
    """How far a growing ``metrics.jsonl`` has come.

    Attributes:
        step: of the last line of kind ``step``; None before there is one.
        probes: number of lines of kind ``probe``.
    """

    def __init__(self, path: Path):
        self.path, self._at, self._rest = path, 0, b""
        self.step: int | None = None
        self.probes = 0

    def read(self) -> None:
        """Take in the whole lines that were added since it was read before."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._at)
                added = file.read()
        except OSError:
            return
        self._at += len(added)
        *lines, self._rest = (self._rest + added).split(b"\n")
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and row.get("kind") == "step":
                self.step = row["step"]
            self.probes += isinstance(row, dict) and row.get("kind") == "probe"


def gpu_bytes() -> int | None:
    """Memory in use on the first GPU that processes started here see, in bytes, by whomever; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", first]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
        return int(done.stdout.split()[0]) * 2**20 if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None
