"""How time, memory and the device's own limits are measured, for every benchmark the same way.

Contenders run in turns, in one process, and the order turns round with every round, so that a machine that warms up,
throttles or is shared with others slows all of them alike. What is compared is the ratio within a round; medians are
taken over rounds. A call is timed as it is (`Timing`). What runs by itself, as a loader that works ahead of its
consumer, runs for a while instead, and says how much it finished in it (`Window`).
"""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from fastssl.pipelines.engines.base import EngineStats

MIN_RUNS = 5
#: Batches taken before a window opens: more than a loader's ring holds, so that those which were ready are gone.
WARM_BATCHES = 6
_Name = TypeVar("_Name", bound=Hashable)
_Result = TypeVar("_Result")


def in_turns(contenders: Mapping[_Name, Callable[[], _Result]], runs: int) -> dict[_Name, list[_Result]]:
    """What every contender gave in each of ``runs`` rounds. Raises ValueError without contenders, and for fewer than
    five runs, whose median says little.
    """
    if runs < MIN_RUNS or not contenders:
        count = len(contenders)
        raise ValueError(f"{runs} runs of {count} contenders: a median of fewer than {MIN_RUNS} runs says little")
    found: dict[_Name, list[_Result]] = {name: [] for name in contenders}
    for number in range(runs):
        for name in found if number % 2 == 0 else reversed(found):
            found[name].append(contenders[name]())
    return found


@dataclass
class Timing:
    """Times of one contender, one entry a round, in seconds: ``wall`` on a GPU between two events on the current
    stream, on a CPU by the clock; ``cpu`` of this process, all threads together. On a shared machine that shows the
    work when ``wall`` shows the waiting.
    """

    wall: Sequence[float]
    cpu: Sequence[float]

    @property
    def median_s(self) -> float:
        return median(self.wall)

    @property
    def median_cpu_s(self) -> float:
        return median(self.cpu)

    def times_faster_than(self, other: Timing) -> float:
        """Median over rounds of ``other``'s time over this one's: above 1, this one is faster."""
        return median(theirs / ours for ours, theirs in zip(self.wall, other.wall))

    def times_less_cpu_than(self, other: Timing) -> float:
        """The same ratio, of processor time."""
        return median(theirs / ours for ours, theirs in zip(self.cpu, other.cpu))


def measure_in_turns(
    contenders: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str,
    runs: int = MIN_RUNS,
    warmup: int = 2,
    optional: Sequence[str] = (),
) -> dict[str, Timing]:
    """Time every contender ``runs`` times, in turns, after ``warmup`` runs each that are not counted. One of the
    ``optional`` for which memory runs out is left out of the result: the others are worth their figures.
    """
    device, gone = torch.device(device), set[str]()

    def once(name: str) -> tuple[float, float]:
        try:
            return (math.nan, math.nan) if name in gone else time_once(contenders[name], device)
        except torch.OutOfMemoryError:
            if name not in optional:
                raise
        gone.add(name)
        free_memory(device)
        return math.nan, math.nan

    for name in [*contenders] * warmup:
        once(name)
    times = in_turns({name: partial(once, name) for name in contenders}, runs)
    return {name: Timing(*zip(*pairs)) for name, pairs in times.items() if name not in gone}


def time_once(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of one call, as those in `Timing`: (wall, cpu)."""
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


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Give back what no living object holds. Not to be called where an exception is handled, whose frames live."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Window:
    """What one contender did in one turn: ``samples`` source pictures in ``seconds``, from the first one asked for to
    the last one finished.

    ``decoded`` pictures were decoded meanwhile (some for later), with ``host_cpu_s`` of the threads that did it. For
    ``wait_s`` the consumer stood waiting for data, for ``colour_s`` it was busy with the colours of its batches.
    Processor time: ``cpu_s`` of the whole process, ``step_cpu_s`` of the consumer's own thread without the loader's
    part in it.
    """

    seconds: float
    samples: int
    decoded: int = 0
    host_cpu_s: float = 0.0
    wait_s: float = 0.0
    cpu_s: float = 0.0
    colour_s: float = 0.0
    step_cpu_s: float = 0.0


#: Runs for about that many seconds, at least one sample.
Contender = Callable[[float], Window]


def measure_windows(
    contenders: Mapping[_Name, Contender], *, seconds: float, runs: int = MIN_RUNS
) -> dict[_Name, list[Window]]:
    """``runs`` windows of each contender in turns, ``seconds`` all together, after a short round not counted."""
    length = seconds / (runs * len(contenders))
    for run in contenders.values():
        run(length / 4)
    return in_turns({name: partial(run, length) for name, run in contenders.items()}, runs)


def rate(windows: Sequence[Window]) -> float:
    """Median samples a second."""
    return median(window.samples / window.seconds for window in windows)


def ratio(ours: Sequence[Window], theirs: Sequence[Window]) -> float:
    """Median over rounds of our rate over theirs: above 1, ours is faster."""
    return median((a.samples / a.seconds) / (b.samples / b.seconds) for a, b in zip(ours, theirs))


def wait_share(windows: Sequence[Window]) -> float:
    """Median share of the time for which the consumer waited."""
    return median(window.wait_s / window.seconds for window in windows)


def largest_share(shares: Mapping[str, float]) -> str:
    """A bottleneck in words."""
    largest = max(shares, key=shares.__getitem__)
    return f"{largest} ({shares[largest]:.0%} of the time)"


def stream_window(
    start: Callable[[], Generator[Any, None, None]],
    consume: Callable[[Any], object],
    stats: EngineStats,
    batch_size: int,
    device: torch.device,
    seconds: float,
) -> Window:
    """A window over a stream of batches, in its steady state. ``start`` begins the stream, which is closed at the end,
    so that its threads leave the other contenders alone; ``consume`` takes each batch; ``stats`` are those of the
    engine behind it; ``device`` is waited for at both ends of the window.
    """
    stream = start()
    try:
        # Slow consumers (a large network on a CPU) fill the ring at once: for them two batches are warm-up enough.
        warm_until = time.perf_counter() + seconds
        for number in range(WARM_BATCHES):
            if number >= 2 and time.perf_counter() > warm_until:
                break
            consume(next(stream))
        synchronize(device)
        before, thread = replace(stats), time.thread_time()
        process, started, batches = time.process_time(), time.perf_counter(), 0
        while batches == 0 or time.perf_counter() - started < seconds:
            consume(next(stream))
            batches += 1
        synchronize(device)
        elapsed, process = time.perf_counter() - started, time.process_time() - process
        thread = time.thread_time() - thread
        return Window(
            elapsed,
            batches * batch_size,
            decoded=stats.samples - before.samples,
            host_cpu_s=stats.host_cpu_s - before.host_cpu_s,
            wait_s=stats.wait_s - before.wait_s,
            cpu_s=process,
            colour_s=stats.colour_s - before.colour_s,
            step_cpu_s=thread - (stats.consumer_cpu_s - before.consumer_cpu_s),
        )
    finally:
        stream.close()


#: By the kind of device: bytes of the copy, several times any cache, and the side of the square matrices.
LIMITS = {"cpu": (2**26, 1024), "cuda": (2**29, 8192)}


def copy_limit(device: torch.device) -> tuple[Callable[[], object], int]:
    """A call that copies memory, on a CPU with all of torch's threads, and its bytes, read and written counted."""
    source = torch.zeros(LIMITS[device.type][0], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.numel()


def product_limit(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A call that multiplies square matrices, and its operations, two for a multiplication with its addition."""
    side = LIMITS[device.type][1]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: left @ right, 2 * side**3


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
    changes = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
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

    What is left is the GPU waiting for the host. The profiler slows the host a little: the share is a lower bound.
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
