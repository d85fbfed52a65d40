"""Rates of things that run by themselves: a loader works ahead of its consumer, so a single call of it cannot be timed.

Each contender runs for a window of time and says how many samples it finished in it; windows of all contenders come in
turns, as in ``fastssl.benchmarks.harness.timing``, and ratios are taken within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from fastssl.benchmarks.harness.timing import MIN_RUNS, in_turns, synchronize
from fastssl.pipelines.engines.base import EngineStats

#: Batches taken before a window opens: more than a loader's ring holds, so that those which were ready beforehand are
#: gone.
WARM_BATCHES = 6
_Name = TypeVar("_Name", bound=Hashable)


@dataclass(frozen=True)
class Window:
    """What one contender did in one turn.

    Attributes:
        seconds: length, from the first sample asked for to the last one finished.
        samples: source pictures finished.
        decoded, host_cpu_s: pictures decoded meanwhile (some for later), and the processor time of the threads that did
            it.
        wait_s: for which the consumer stood waiting for data.
        cpu_s: processor time of the whole process.
        colour_s: for which the consumer was busy with the colours of its batches.
        step_cpu_s: processor time of the consumer's own thread, without the loader's part in it.
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
    """``runs`` windows of each contender in turns, the order turning round, after one short round that is not counted.

    Args:
        seconds: for all counted windows together.
    """
    length, turns = seconds / (runs * len(contenders)), in_turns(contenders, runs)
    for run in contenders.values():
        run(length / 4)
    windows: dict[_Name, list[Window]] = {name: [] for name in contenders}
    for name in turns:
        windows[name].append(contenders[name](length))
    return windows


def rate(windows: Sequence[Window]) -> float:
    """Median samples a second."""
    return statistics.median(window.samples / window.seconds for window in windows)


def ratio(ours: Sequence[Window], theirs: Sequence[Window]) -> float:
    """Median over rounds of our rate over theirs: above 1, ours is faster."""
    return statistics.median((a.samples / a.seconds) / (b.samples / b.seconds) for a, b in zip(ours, theirs))


def wait_share(windows: Sequence[Window]) -> float:
    """Median share of the time for which the consumer waited."""
    return statistics.median(window.wait_s / window.seconds for window in windows)


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
    """A window over a stream of batches, in its steady state.

    Args:
        start: begins the stream; it is closed at the end, so that its threads leave the other contenders alone.
        consume: what is done with each batch.
        stats: of the engine behind the stream.
        device: waited for at both ends of the window.
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
