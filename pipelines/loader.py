"""``ViewLoader``: from a ``.beton`` file to batches of augmented views, ready for the network."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastssl.errors import FastSSLError, counted
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.base import EngineStats, Request
from fastssl.pipelines.engines.registry import PIPELINES, open_engine
from fastssl.pipelines.ops.augment import augment, parameter_table
from fastssl.pipelines.ops.recycled_memory import RecycledMemory
from fastssl.pipelines.plan.draw import ViewSpec, draw_plan
from fastssl.pipelines.plan.order import batch_indices, steps_per_epoch
from fastssl.utils.cores import available_cores
from fastssl.utils.deadline import STALL_MINUTES
from fastssl.utils.transfer import to_device


@dataclass
class Batch:
    """What a training step reads.

    Attributes:
        views: one (count * B, 3, S, S) float tensor for each ``ViewSpec``, channels-last, normalised, on the loader's
            device, view-major: rows ``v * B : (v + 1) * B`` are view v of all samples. With ``colour=False`` uint8, as
            they were cropped.
        index: (B,) int64 sample ids, on the host.
        label: (B,) int64, on the host; -1 where the file has no labels.
        tables: with ``colour=False`` what ``augment_device`` wants beside each of ``views``, (count * B, 23) float32 on
            the loader's device.
    """

    views: list[Tensor]
    index: Tensor
    label: Tensor
    tables: list[Tensor] = field(default_factory=list)


class ViewLoader:
    """Batches of views. Every random choice is a function of (seed, epoch, sample id, view): nothing else.

    Use it as a context manager: leaving it joins its threads and frees its buffers, also after an early ``break``.

    Args:
        data: a ``.beton`` file, or an open ``BetonReader`` (which then stays open).
        views: the view groups, for instance two global and six local views.
        batch_size: samples a step on this rank.
        device: where the views are wanted.
        pipeline: the engine: ``native``, ``dali``, ``ffcv``, or ``auto`` (see ``engines.choose_engine``). All render
            the same plan.
        seed: of the order and of the views.
        workers: decoding threads; default: the cores that this process may use.
        rank, world: which part of each global batch is ours.
        crops: ``host`` cuts views on the decoding threads, ``device`` on the device from the decoded pictures;
            ``auto`` takes the device when it is a GPU. For ``native`` only.
        on_bad: what to do with a damaged picture: ``fail``, or ``skip`` (counted in ``stats.skipped``).
        indices: restrict the loader to these sample ids.
        shuffle: draw a new order every epoch; otherwise samples come as they are stored.
        drop_last: leave out the last, partial batch (on one rank only may it be kept).
        dtype: of the views.
        colour: apply the colour operations here. Without it the batch holds the uint8 crops and the tables that
            ``augment_device`` takes, for a step that does it itself.
        hardware_load: for ``dali`` on a GPU, the share of the pictures that its JPEG unit decodes; None: 0.65.
        stall_minutes: how long a batch is waited for; a warning comes after the first minute, ``Stalled`` at the end.
            ``math.inf``: for ever.

    Raises:
        FastSSLError: the file has fewer samples than one global batch, or an option has a value that does not exist.
    """

    def __init__(
        self,
        data: str | Path | BetonReader,
        views: Sequence[ViewSpec],
        batch_size: int,
        device: str | torch.device = "cpu",
        pipeline: str = "auto",
        seed: int = 0,
        workers: int | None = None,
        rank: int = 0,
        world: int = 1,
        crops: str = "auto",
        on_bad: str = "fail",
        indices: np.ndarray | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        dtype: torch.dtype = torch.float32,
        colour: bool = True,
        hardware_load: float | None = None,
        stall_minutes: float = STALL_MINUTES,
    ):
        _one_of("pipeline", pipeline, PIPELINES)
        _one_of("crops", crops, ("auto", "host", "device"))
        _one_of("on_bad", on_bad, ("fail", "skip"))
        if isinstance(views, ViewSpec):
            raise FastSSLError("views is a list of ViewSpec: [ViewSpec(...)]")
        if not views:
            raise FastSSLError("a loader needs at least one view")
        batch_size, workers = (
            _count("batch_size", batch_size),
            workers if workers is None else _count("workers", workers),
        )
        if not drop_last and (world > 1 or shuffle):
            raise FastSSLError(
                "drop_last=False goes with shuffle=False and one process: training steps all have one size"
            )
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise FastSSLError(f"dtype={dtype!r} is not a floating-point dtype of torch; views are normalised")
        self.device = _device(device)
        self.views, self.batch_size, self.seed, self.dtype = list(views), batch_size, seed, dtype
        self.rank, self.world, self.shuffle, self.drop_last, self.colour = rank, world, shuffle, drop_last, colour
        self._owns_reader = not isinstance(data, BetonReader)
        self.reader = BetonReader(data) if self._owns_reader else data
        self.indices = np.arange(len(self.reader)) if indices is None else _sample_ids(indices)
        try:
            self._check_size()
            self.engine = open_engine(
                pipeline,
                self.reader,
                self.views,
                device=self.device,
                batch_size=batch_size,
                workers=workers,
                crops=crops,
                on_bad=on_bad,
                hardware_load=hardware_load,
                stall_minutes=stall_minutes,
            )
        except Exception:
            self._close_reader()
            raise
        # Threads start when they are first needed: none on a GPU.
        self._pool = ThreadPoolExecutor(workers or available_cores(), "fastssl-colour")
        self._memory = [RecycledMemory() for _ in self.views]

    def _check_size(self) -> None:
        count = len(self.indices)
        if count and (self.indices.min() < 0 or self.indices.max() >= len(self.reader)):
            raise FastSSLError(f"{self.reader.path}: indices reach beyond its {counted(len(self.reader), 'sample')}")
        if len(self) < 1:
            samples = counted(count, "sample")
            raise FastSSLError(
                f"{self.reader.path}: {samples}, fewer than one batch of {self.batch_size * self.world}; lower "
                "the batch size"
            )

    def __len__(self) -> int:
        """Steps in an epoch."""
        if self.drop_last:
            return steps_per_epoch(len(self.indices), self.batch_size, self.world)
        return -(-len(self.indices) // self.batch_size)

    @property
    def stats(self) -> EngineStats:
        """Host cost and skipped samples."""
        return self.engine.stats

    def request(self, epoch: int, step: int) -> Request:
        """The ids and the view plan of one step: a pure function, the same on any machine."""
        total = self.batch_size * self.world
        if self.shuffle:
            everyone = batch_indices(len(self.indices), self.seed, epoch, step, total)
        else:
            everyone = np.arange(step * total, min((step + 1) * total, len(self.indices)))
        first = self.rank * self.batch_size
        request = self._drawn(epoch, everyone[first : first + self.batch_size])
        request.first, request.total = first, len(everyone)
        request.draw = lambda place: self._drawn(epoch, everyone[place : place + 1])
        return request

    def _drawn(self, epoch: int, chosen: np.ndarray) -> Request:
        index = self.indices[chosen]
        heights, widths = self.reader.heights[index], self.reader.widths[index]
        plans, first_view = [], 0
        for spec in self.views:
            plans.append(
                draw_plan(
                    spec,
                    first_view=first_view,
                    seed=self.seed,
                    epoch=epoch,
                    sample_ids=index,
                    heights=heights,
                    widths=widths,
                )
            )
            first_view += spec.count
        return Request(index, plans)

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """The batches of one epoch, from ``start_step`` on (to go on where a run was stopped)."""

        def drawer(step: int) -> Callable[[], Request]:
            return lambda: self.request(epoch, step)

        requests = (drawer(step) for step in range(start_step, len(self)))
        rendered_batches, stats = self.engine.run(requests), self.stats
        cpu = time.thread_time()
        try:
            for rendered in rendered_batches:
                started = time.perf_counter()
                index, plans = rendered.request.index, [plan.reshape(-1) for plan in rendered.request.plans]
                batch = Batch(rendered.views, torch.from_numpy(index), torch.from_numpy(self._labels(index)))
                if self.colour:
                    batch.views = [
                        augment(pixels, plan, spec, self.dtype, self._pool, memory)
                        for pixels, plan, spec, memory in zip(rendered.views, plans, self.views, self._memory)
                    ]
                else:
                    # Host crops lie in the engine's ring, which the next batch writes over.
                    batch.views = [pixels if pixels.is_cuda else pixels.clone() for pixels in rendered.views]
                    batch.tables = [to_device(parameter_table(plan), self.device) for plan in plans]
                stats.colour_s += time.perf_counter() - started
                stats.consumer_cpu_s += time.thread_time() - cpu
                yield batch
                cpu = time.thread_time()
        finally:
            rendered_batches.close()

    def _labels(self, index: np.ndarray) -> np.ndarray:
        if self.reader.labels is None:
            return np.full(len(index), -1, np.int64)
        return self.reader.labels[index].astype(np.int64)

    def _close_reader(self) -> None:
        if self._owns_reader:
            self.reader.close()

    def close(self) -> None:
        """Join the threads (not those that a dead disk holds) and free the buffers; also closes the file if the loader
        opened it.
        """
        self.engine.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._close_reader()

    def __enter__(self) -> ViewLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _sample_ids(indices: np.ndarray) -> np.ndarray:
    """``indices`` as (n,) int64. A mask of booleans would pass as the ids 0 and 1, floats would be cut: both are
    refused.
    """
    ids = np.asarray(indices)
    if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
        raise FastSSLError(
            f"indices must be a list of sample ids, got {ids.dtype} of shape {ids.shape} (np.flatnonzero turns "
            "a mask into ids)"
        )
    return ids.astype(np.int64)


def _count(name: str, value: object) -> int:
    """``value`` as an int of at least 1; NumPy's integers pass, True and 2.0 do not."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise FastSSLError(f"{name} must be a whole number of at least 1, got {value!r}")
    return number


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise FastSSLError(f"device={device!r} is not a device of torch (cpu, cuda, cuda:1)") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise FastSSLError(f"device={device!r}: torch sees no NVIDIA GPU here; `fastssl doctor` says what is missing")
    return found


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise FastSSLError(f"{name}={value!r} is not one of {', '.join(allowed)}")
