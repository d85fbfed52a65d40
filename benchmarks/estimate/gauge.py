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
from fastssl.benchmarks.harness.photos import mean_pixels
from fastssl.benchmarks.harness.setting import default_batch
from fastssl.benchmarks.harness.timing import peak_extra_bytes, stream_window, time_once
from fastssl.benchmarks.suites.loader import endless, open_loader
from fastssl.benchmarks.suites.step import Step, random_views
from fastssl.config.recipe import Recipe
from fastssl.distributed.devices import use_amp
from fastssl.errors import FastSSLError, is_out_of_memory
from fastssl.evaluate.features import extract_features
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.loader import Batch, ViewLoader
from fastssl.utils.cores import available_cores

#: Batch of the first step, which says how slow the machine is.
FIRST_BATCH = 2
_MOST_ROUNDS = 5
#: What a size costs until it and half of it are measured, in steps of it: two first ones, one with memory counted, two
#: or three timed ones, each with its half. And the same for a size alone with one timed step.
_COST_IN_STEPS, _LEAST_COST_IN_STEPS = 8, 4
#: Photos of the first batch through the backbone, and most of the second.
_FEATURES = (8, 256)
#: Source pixels a decoding thread in a batch of the loader: some tenth of a second of work.
_PIXELS = 8_000_000


@dataclass
class Gauge:
    """The step at one batch size, called with ``views``, and the ``seconds`` of those that were timed.

    ``peak_bytes``: most bytes that a step adds to what is alive before it; ``overhead``: see ``memory.step_overhead``,
    1 where it is not known, and on a GPU, whose own allocator counts.
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
        self.seconds.append(time_once(lambda: self.step(self.views), self.step.device)[0])


def scaled(recipe: Recipe, batch: int) -> Recipe:
    """The recipe with eager steps of ``batch`` in one pass; its queue and BatchNorm groups are adapted to the batch."""
    train = replace(recipe.train, batch_size=batch, accumulate=1, compile=False, graph=False)
    changes: dict[str, Any] = {recipe.method: recipe.settings.scaled(batch), "train": train}
    return replace(recipe, **changes)


def gauge_step(recipe: Recipe, device: torch.device, batch: int) -> Gauge:
    """A step of ``batch`` pairs that ran twice and once more with its memory counted; not timed yet. Raises
    FastSSLError where the network cannot take the recipe's pictures, or memory ran out.
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
        reason = " ".join(str(error).split())
        if is_out_of_memory(error):
            words = f": out of memory with {batch} pictures a step on this {device.type} device"
        else:
            sizes = ", ".join(map(str, sorted({spec.size for spec in recipe.views})))
            words = f" cannot take pictures of {sizes} px ({reason}): change the views' sizes"
        raise FastSSLError(f"{recipe.arch}{words}") from error
    return gauge


def first_gauge(recipe: Recipe, device: torch.device, most: int, seconds: float) -> Gauge:
    """A timed step of FIRST_BATCH pairs, or of four times as many as often as that takes less than ``seconds`` and
    stays within ``most``: a network's smallest steps say little about its larger ones, most of their time is fixed.
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
    least the first gauge's batch. Time and memory are taken to grow with the batch, which overrates them: a part is
    fixed.

    Where that would be less than a pair for each of the recipe's BatchNorm ``groups``, this many are measured in a
    hurry, if there is time for them: smaller steps have fewer groups and are other steps.
    """

    def possible(batch: int, steps: int) -> bool:
        times = batch / first.batch
        return steps * first.median_s * times <= seconds and first.peak_bytes * times <= room

    batch = most
    while batch > first.batch and not possible(batch, _COST_IN_STEPS):
        batch //= 2
    batch, groups = max(batch, first.batch), min(groups, most)
    return groups if batch < groups and possible(groups, _LEAST_COST_IN_STEPS) else batch


def gauge_steps(
    recipe: Recipe, device: torch.device, most: int, first: Gauge, deadline: float, room: float
) -> list[Gauge]:
    """The step at the largest affordable batch up to ``most``, at half of it and at the ``first`` one, which was timed
    once, timed in turns until the ``deadline`` (by ``time.perf_counter``); smallest first. ``room``: bytes for a step.
    """
    groups = recipe.settings.groups
    top = affordable_batch(first, most, groups, deadline - time.perf_counter(), room)
    sizes = {size for size in (top // 2, top) if size >= max(2, min(groups, most)) and size != first.batch}
    gauges = sorted([first, *(gauge_step(recipe, device, size) for size in sizes)], key=lambda gauge: gauge.batch)
    for number in range(_MOST_ROUNDS):
        # The largest first: once for it there is always time.
        for gauge in reversed(gauges) if number % 2 == 0 else gauges:
            if not gauge.seconds or time.perf_counter() + gauge.median_s + 3 * gauges[-1].median_s < deadline:
                gauge.time_once()
    return gauges


@dataclass(frozen=True)
class Loading:
    """How the photos are loaded while something is measured."""

    reader: BetonReader
    recipe: Recipe
    device: torch.device
    pipeline: str
    workers: int | None

    def open(self, batch: int) -> ViewLoader:
        train = self.recipe.train
        dtype = torch.bfloat16 if use_amp(train.amp, self.device) else torch.float32
        options: dict[str, Any] = {"pipeline": self.pipeline, "workers": self.workers, "on_bad": train.on_bad}
        return open_loader(self.reader, self.recipe.views, batch, self.device, dtype=dtype, **options)


def loader_rate(loading: Loading, seconds: float) -> tuple[float, int]:
    """(pairs a second that the loader delivers to a consumer who does nothing with them, decoding threads)."""
    reader, device = loading.reader, loading.device
    pixels = mean_pixels(reader)
    most = max(2, int(_PIXELS * (loading.workers or available_cores()) / pixels))
    batch = min(default_batch(loading.recipe, device), most)
    with loading.open(batch) as loader:
        window = stream_window(lambda: endless(loader), lambda _: None, loader.stats, batch, device, seconds)
        return window.samples / window.seconds, loader.engine.workers


def together_s(gauge: Gauge, loading: Loading, seconds: float) -> tuple[float, int]:
    """(seconds a step of the training loop, bytes of GPU memory for the loader's batches) at the gauge's batch."""
    device, batch = gauge.step.device, gauge.batch

    def train(loaded: Batch) -> None:
        gauge.step(loaded.views)

    cuda = device.type == "cuda"
    if cuda:
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    with loading.open(batch) as loader:
        window = stream_window(lambda: endless(loader), train, loader.stats, batch, device, seconds)
    held = torch.cuda.max_memory_allocated(device) - before - gauge.peak_bytes if cuda else 0
    return window.seconds * batch / window.samples, max(0, held)


def feature_rate(backbone: nn.Module, loading: Loading, seconds: float) -> float:
    """Photos a second, decoding included, through the frozen backbone at the probe's size, in about ``seconds``."""
    recipe, device = loading.recipe, loading.device
    probe = {"size": recipe.probe.size, "crop": recipe.probe.crop, "amp": use_amp(recipe.train.amp, device)}
    options: dict[str, Any] = {**probe, "device": device, "workers": loading.workers, "on_bad": recipe.train.on_bad}

    def extract(count: int) -> float:
        indices = np.arange(min(count, len(loading.reader)))
        started = time.perf_counter()
        extract_features(backbone, loading.reader, indices=indices, batch_size=min(256, len(indices)), **options)
        return len(indices) / (time.perf_counter() - started)

    try:
        rate = extract(_FEATURES[0])
        count = min(_FEATURES[1], int(rate * seconds))
        return extract(count) if count > 2 * _FEATURES[0] else rate
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())
        words = f"{recipe.arch} cannot be probed at {recipe.probe.size} px ({reason}): change probe.size"
        raise FastSSLError(words) from error


@dataclass(frozen=True)
class Measured:
    """What was measured on this machine.

    Attributes:
        available, total: bytes of memory before anything was built.
        loader: pairs a second of the loader alone, with ``workers`` threads.
        gauges: the step, smallest batch first. features: photos a second through the backbone.
        together: see ``cost.step_with_data_s``; None: there was no time for it.
        device_data: bytes that the loader's batches held on the GPU while ``together`` was measured.
    """

    available: int
    total: int
    loader: float
    workers: int
    gauges: list[Gauge]
    features: float
    together: tuple[int, float, float] | None
    device_data: int


def measure(loading: Loading, started: float, seconds: float) -> Measured:
    """All of it, in about ``seconds`` from ``started`` (by ``time.perf_counter``) on. Raises FastSSLError for what
    would stop a training run, too.
    """
    recipe, device = loading.recipe, loading.device
    available, total = memory.memory_bytes(device)
    # The recipe's own step is built once, and not run, so that a batch which does not go with the queue is found as in
    # training.
    eager = replace(recipe, train=replace(recipe.train, compile=False, graph=False))
    Step(eager, device, recipe.train.batch_size, amp=use_amp(recipe.train.amp, device))
    rate, threads = loader_rate(loading, 0.05 * seconds)
    part = recipe.train.batch_size // recipe.train.parts
    first = first_gauge(recipe, device, part, 0.08 * seconds)
    features = feature_rate(first.step.method.student.backbone, loading, 0.05 * seconds)
    gauges = gauge_steps(recipe, device, part, first, started + 0.9 * seconds, USABLE[device.type] * available)
    top, together, held = gauges[-1], None, 0
    # Two batches of warm-up and one that counts, while the loader fills its ring.
    least, left = 3 * top.median_s + 8 * top.batch / rate, started + seconds - time.perf_counter()
    if left > least:
        both, held = together_s(top, loading, min(0.15 * seconds, max(0.1, (left - least) / 2)))
        together = (top.batch, both, top.median_s)
    return Measured(available, total, rate, threads, gauges, features, together, held)
