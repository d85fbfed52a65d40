"""How time and memory are measured, for every benchmark the same way.

Contenders run in turns, in one process, and the order turns round with every round, so that a machine that warms up,
throttles or is shared with others slows all of them alike. What is compared is the ratio within a round; medians are
taken over rounds.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

MIN_RUNS = 5
_Name = TypeVar("_Name", bound=Hashable)


def in_turns(names: Iterable[_Name], runs: int) -> list[_Name]:
    """Every name ``runs`` times.

    Raises:
        ValueError: fewer than five runs, whose median says little, or no names.
    """
    names = list(names)
    if runs < MIN_RUNS or not names:
        raise ValueError(f"{runs} runs of {len(names)} contenders: a median of fewer than {MIN_RUNS} runs says little")
    return [name for number in range(runs) for name in (names if number % 2 == 0 else reversed(names))]


@dataclass
class Timing:
    """Times of one contender, one entry a round, in seconds.

    Attributes:
        wall: on a GPU between two events on the current stream, on a CPU by the clock.
        cpu: processor time of this process, all threads together: on a shared machine it shows the work when ``wall``
            shows the waiting.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        return statistics.median(self.wall)

    @property
    def median_cpu_s(self) -> float:
        return statistics.median(self.cpu)

    def times_faster_than(self, other: Timing) -> float:
        """Median over rounds of ``other``'s time over this one's: above 1, this one is faster."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.wall, other.wall))

    def times_less_cpu_than(self, other: Timing) -> float:
        """The same ratio, of processor time."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.cpu, other.cpu))


def measure_in_turns(
    contenders: Mapping[str, Callable[[], object]], *, device: torch.device | str, runs: int = MIN_RUNS, warmup: int = 2
) -> dict[str, Timing]:
    """Time every contender ``runs`` times, in turns, after ``warmup`` runs each that are not counted."""
    device, turns = torch.device(device), in_turns(contenders, runs)
    for _ in range(warmup):
        for run in contenders.values():
            run()
    timings = {name: Timing() for name in contenders}
    for name in turns:
        wall, cpu = _time_once(contenders[name], device)
        timings[name].wall.append(wall)
        timings[name].cpu.append(cpu)
    return timings


def _time_once(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cpu = time.process_time()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, time.process_time() - cpu
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_extra_bytes(run: Callable[[], object], device: torch.device | str) -> int:
    """Most bytes of tensors alive at once during ``run``, above those alive before it.

    On a GPU what the caching allocator reports; on a CPU every allocation and release that torch's profiler saw,
    temporaries inside operators included. Memory that others hold does not count, so the figure is the same on a busy
    machine.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    events = traced(run, ProfilerActivity.CPU, profile_memory=True)
    changes = [event for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return int(np.cumsum([event["args"]["Bytes"] for event in changes]).max(initial=0))


def traced(run: Callable[[], object], activity: ProfilerActivity, **options: Any) -> list[dict[str, Any]]:
    """What torch's profiler saw of ``run``, as events of a Chrome trace."""
    with profile(activities=[activity], **options) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events: list[dict[str, Any]] = json.loads(trace.read_text())["traceEvents"]
        return events


def busy_share(run: Callable[[], object], device: torch.device) -> tuple[float, int] | None:
    """Share of a run's time for which a kernel or copy was on the GPU, and how many there were; None on a CPU, or where
    the profiler sees no kernels.

    What is left is the GPU waiting for the host. The profiler itself slows the host a little, so the share is a lower
    bound.
    """
    if device.type != "cuda":
        return None
    synchronize(device)

    def whole_run() -> None:
        run()
        synchronize(device)

    events = traced(whole_run, ProfilerActivity.CUDA)
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return (busy_of_spans(spans), len(spans)) if spans else None


def busy_of_spans(spans: list[tuple[float, float]]) -> float:
    """Length of the union of ``(begin, end)`` spans, over the time from the first begin to the last end."""
    begin, end = np.array(sorted(spans)).T
    reached = np.concatenate([begin[:1], np.maximum.accumulate(end)])
    return float(np.maximum(0, end - np.maximum(begin, reached[:-1])).sum() / (reached[-1] - begin[0]))


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
