"""Short measurements that fit a budget of seconds: what `fastssl estimate` is made of.

Unlike the benchmarks beside it, which run until their medians stand still, these run while there is time; a step that
is too slow for its recipe's batch is measured at smaller ones.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.benchmarks.estimate import memory
from fastssl.benchmarks.estimate.cost import USABLE
from fastssl.benchmarks.harness.setting import default_batch
from fastssl.benchmarks.harness.timing import peak_extra_bytes, synchronize
from fastssl.benchmarks.harness.windows import stream_window
from fastssl.benchmarks.suites.loader import endless, open_loader
from fastssl.benchmarks.suites.step import Step, random_views
from fastssl.config.recipe import Recipe
from fastssl.distributed.devices import use_amp
from fastssl.errors import FastSSLError
from fastssl.evaluate.features import extract_features
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.loader import Batch, ViewLoader
from fastssl.utils.cores import available_cores

#: Batch of the first step, which says how slow the machine is.
FIRST_BATCH = 2
_MOST_ROUNDS = 5
#: What a size costs until it and half of it are measured, in steps of it: two first ones, one with memory counted, two
#: or three timed ones, each with its half.
_COST_IN_STEPS = 8
#: The same for a size alone: two first ones, one with memory counted, one timed.
_LEAST_COST_IN_STEPS = 4
#: Photos of the first batch through the backbone, and most of the second.
_FEATURES = (8, 256)
#: Source pixels a decoding thread in a batch of the loader: some tenth of a second of work.
_PIXELS = 8_000_000


@dataclass
class Gauge:
    """The step at one batch size.

    Attributes:
        step, views: what is called.
        peak_bytes: most bytes that a step adds to what is alive before it.
        overhead: see ``memory.step_overhead``; 1 where it is not known, and on a GPU, whose own allocator counts.
        seconds: of the timed steps.
    """

    step: Step
    views: list[Tensor]
    peak_bytes: int = 0
    overhead: float = 1.0
    seconds: list[float] = field(default_factory=list)

    @property
    def batch(self) -> int:
        return self.step.batch_size

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    def time_once(self) -> None:
        synchronize(self.step.device)
        started = time.perf_counter()
        self.step(self.views)
        synchronize(self.step.device)
        self.seconds.append(time.perf_counter() - started)


def scaled(recipe: Recipe, batch: int) -> Recipe:
    """The recipe with steps of ``batch`` in one pass, eager; a queue and BatchNorm groups that would not go with this
    batch are adapted to it.
    """
    train = replace(recipe.train, batch_size=batch, accumulate=1, compile=False, graph=False)
    changes: dict[str, Any] = {recipe.method: recipe.settings.scaled(batch), "train": train}
    return replace(recipe, **changes)


def gauge_step(recipe: Recipe, device: torch.device, batch: int) -> Gauge:
    """A step of ``batch`` pairs that ran twice and once more with its memory counted; not timed yet.

    Raises:
        FastSSLError: the network cannot take the recipe's pictures, or memory ran out.
    """
    recipe = scaled(recipe, batch)
    try:
        memory.forget_peak()
        before = memory.resident_bytes("VmRSS")
        step = Step(recipe, device, batch, amp=use_amp(recipe.train.amp, device))
        views = [view.to(step.inner.view_dtype) for view in random_views(recipe, batch, device)]
        gauge = Gauge(step, views)
        for _ in range(2):  # libraries choose their ways and the optimiser makes its state
            step(views)
        peak = memory.resident_bytes("VmHWM")
        gauge.peak_bytes = peak_extra_bytes(lambda: step(views), device)
        if device.type == "cpu" and before is not None and peak is not None:
            alive = memory.state_bytes(step)[0] + memory.tensor_bytes(views) + gauge.peak_bytes
            gauge.overhead = memory.step_overhead(peak - before, alive, gauge.peak_bytes)
    except (RuntimeError, AssertionError, ValueError) as error:
        # On a CPU torch has words for it, and no class.
        if isinstance(error, torch.OutOfMemoryError) or "you tried to allocate" in str(error):
            raise FastSSLError(
                f"{recipe.arch}: out of memory with {batch} pictures a step on this {device.type} device"
            ) from error
        sizes, reason = sorted({spec.size for spec in recipe.views}), " ".join(str(error).split())
        raise FastSSLError(
            f"{recipe.arch} cannot take pictures of {', '.join(map(str, sizes))} px ({reason}): change the views' sizes"
        ) from error
    return gauge


def first_gauge(recipe: Recipe, device: torch.device, most: int, seconds: float) -> Gauge:
    """A timed step of FIRST_BATCH pairs, or of four times as many as often as that takes less than ``seconds`` and
    stays within ``most``.

    A network's smallest steps say little about its larger ones, because most of their time is fixed.
    """
    batch = min(FIRST_BATCH, most)
    while True:
        gauge = gauge_step(recipe, device, batch)
        gauge.time_once()
        if 4 * batch > most or 4 * _LEAST_COST_IN_STEPS * gauge.median_s > seconds:
            return gauge
        batch *= 4


def affordable_batch(first: Gauge, most: int, groups: int, seconds: float, room: float) -> int:
    """The largest halving of ``most`` whose steps can be measured in ``seconds`` and should fit ``room`` bytes; at
    least the first gauge's batch.

    Where that would be less than a pair for each of the recipe's BatchNorm ``groups``, this many are measured in a
    hurry, if there is time for them:
    smaller steps have fewer groups and are other steps. Time and memory are taken to grow with the batch, which
    overrates them: a part is fixed.
    """

    def possible(batch: int, steps: int) -> bool:
        times = batch / first.batch
        return steps * first.median_s * times <= seconds and first.peak_bytes * times <= room

    batch = most
    while batch > first.batch:
        if possible(batch, _COST_IN_STEPS):
            break
        batch //= 2
    batch = max(batch, first.batch)
    groups = min(groups, most)
    return groups if batch < groups and possible(groups, _LEAST_COST_IN_STEPS) else batch


def gauge_steps(
    recipe: Recipe, device: torch.device, most: int, first: Gauge, deadline: float, room: float
) -> list[Gauge]:
    """The step at the largest affordable batch up to ``most``, at half of it and at the first one, timed in turns;
    smallest first.

    Args:
        first: timed once.
        deadline: of the timing, by ``time.perf_counter``.
        room: bytes that a step may take.
    """
    groups = recipe.settings.groups
    top = affordable_batch(first, most, groups, deadline - time.perf_counter(), room)
    sizes = {size for size in (top // 2, top) if size >= max(2, min(groups, most)) and size != first.batch}
    gauges = sorted([first, *(gauge_step(recipe, device, size) for size in sizes)], key=lambda gauge: gauge.batch)
    for number in range(_MOST_ROUNDS):
        for gauge in (
            reversed(gauges) if number % 2 == 0 else gauges
        ):  # the largest first: once for it there is always time
            if not gauge.seconds or time.perf_counter() + gauge.median_s + 3 * gauges[-1].median_s < deadline:
                gauge.time_once()
    return gauges


def loader_rate(
    reader: BetonReader, recipe: Recipe, device: torch.device, pipeline: str, workers: int | None, seconds: float
) -> tuple[float, int]:
    """(pairs a second that the loader delivers to a consumer who does nothing with them, decoding threads)."""
    pixels = float((reader.heights.astype(np.int64) * reader.widths).mean())
    batch = min(default_batch(recipe, device), max(2, int(_PIXELS * (workers or available_cores()) / pixels)))
    with _loader(reader, recipe, batch, device, pipeline=pipeline, workers=workers) as loader:
        window = stream_window(lambda: endless(loader), lambda _: None, loader.stats, batch, device, seconds)
        return window.samples / window.seconds, loader.engine.workers


def together_s(
    gauge: Gauge, reader: BetonReader, recipe: Recipe, pipeline: str, workers: int | None, seconds: float
) -> tuple[float, int]:
    """(seconds a step of the training loop at the gauge's batch, bytes of device memory that the loader's batches took;
    0 on a CPU).
    """
    device, batch = gauge.step.device, gauge.batch

    def train(loaded: Batch) -> None:
        gauge.step(loaded.views)

    cuda = device.type == "cuda"
    if cuda:
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    with _loader(reader, recipe, batch, device, pipeline=pipeline, workers=workers) as loader:
        window = stream_window(lambda: endless(loader), train, loader.stats, batch, device, seconds)
    held = torch.cuda.max_memory_allocated(device) - before - gauge.peak_bytes if cuda else 0
    return window.seconds * batch / window.samples, max(0, held)


def _loader(reader: BetonReader, recipe: Recipe, batch: int, device: torch.device, **options: Any) -> ViewLoader:
    dtype = torch.bfloat16 if use_amp(recipe.train.amp, device) else torch.float32
    return open_loader(reader, recipe.views, batch, device, on_bad=recipe.train.on_bad, dtype=dtype, **options)


def feature_rate(
    backbone: nn.Module, reader: BetonReader, recipe: Recipe, device: torch.device, workers: int | None, seconds: float
) -> float:
    """Photos a second through the frozen backbone at the probe's size, their decoding included; as many photos as
    ``seconds`` allow.
    """

    def extract(count: int) -> float:
        indices = np.arange(min(count, len(reader)))
        started = time.perf_counter()
        extract_features(
            backbone,
            reader,
            size=recipe.probe.size,
            crop=recipe.probe.crop,
            indices=indices,
            batch_size=min(256, len(indices)),
            device=device,
            workers=workers,
            amp=use_amp(recipe.train.amp, device),
            on_bad=recipe.train.on_bad,
        )
        return len(indices) / (time.perf_counter() - started)

    try:
        rate = extract(_FEATURES[0])
        count = min(_FEATURES[1], int(rate * seconds))
        return extract(count) if count > 2 * _FEATURES[0] else rate
    except (RuntimeError, AssertionError, ValueError) as error:
        raise FastSSLError(
            f"{recipe.arch} cannot be probed at {recipe.probe.size} px ({' '.join(str(error).split())}): "
            "change probe.size"
        ) from error


@dataclass(frozen=True)
class Measured:
    """What was measured on this machine.

    Attributes:
        available, total: bytes of memory before anything was built.
        loader: pairs a second of the loader alone, with ``workers`` threads.
        gauges: the step, smallest batch first.
        features: photos a second through the backbone.
        together: see ``cost.step_with_data_s``; None: there was no time for it.
        device_data: bytes that the loader's batches held on the GPU while ``together`` was measured.
        overhead: of the largest gauge.
    """

    available: int
    total: int
    loader: float
    workers: int
    gauges: list[Gauge]
    features: float
    together: tuple[int, float, float] | None
    device_data: int
    overhead: float


def measure(
    recipe: Recipe,
    reader: BetonReader,
    device: torch.device,
    pipeline: str,
    workers: int | None,
    started: float,
    seconds: float,
) -> Measured:
    """All of it, in about ``seconds`` from ``started`` (by ``time.perf_counter``) on.

    Raises:
        FastSSLError: what would stop a training run, too.
    """
    available, total = memory.memory_bytes(device)
    # The recipe's own step is built once, and not run, so that a batch which does not go with the queue is found as in
    # training.
    eager = replace(recipe, train=replace(recipe.train, compile=False, graph=False))
    Step(eager, device, recipe.train.batch_size, amp=use_amp(recipe.train.amp, device))
    rate, threads = loader_rate(reader, recipe, device, pipeline, workers, 0.05 * seconds)
    part = recipe.train.batch_size // recipe.train.accumulate
    first = first_gauge(recipe, device, part, 0.08 * seconds)
    features = feature_rate(first.step.method.student.backbone, reader, recipe, device, workers, 0.05 * seconds)
    gauges = gauge_steps(recipe, device, part, first, started + 0.9 * seconds, USABLE[device.type] * available)
    top, together, held = gauges[-1], None, 0
    # Two batches of warm-up and one that counts, while the loader fills its ring.
    least, left = 3 * top.median_s + 8 * top.batch / rate, started + seconds - time.perf_counter()
    if left > least:
        both, held = together_s(
            top, reader, recipe, pipeline, workers, min(0.15 * seconds, max(0.1, (left - least) / 2))
        )
        together = (top.batch, both, top.median_s)
    return Measured(available, total, rate, threads, gauges, features, together, held, top.overhead)
