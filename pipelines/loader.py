"""``ViewLoader``: from a ``.beton`` file to batches of augmented views, ready for the network."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastssl.errors import FastSSLError, counted
from fastssl.pipelines.beton.dataset import Data, open_beton
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.base import EngineSettings, EngineStats, Request, checked_device
from fastssl.pipelines.engines.registry import open_engine
from fastssl.pipelines.ops.augment import augment, parameter_table
from fastssl.pipelines.ops.memory import RecycledMemory
from fastssl.pipelines.plan.draw import ViewSpec, draw_plans
from fastssl.pipelines.plan.order import batch_indices, last_batch, steps_per_epoch
from fastssl.pipelines.plan.windows import FileWindows
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
        index, label: (B,) int64 on the host, the samples' ids and labels; -1 where the file has none.
        tables: with ``colour=False`` what ``DeviceColour`` wants beside each of ``views``, (count * B, 23) float32 on
            the loader's device.
    """

    views: list[Tensor]
    index: Tensor
    label: Tensor
    tables: list[Tensor] = field(default_factory=list)


class ViewLoader:
    """Batches of views. Every random choice is a function of (seed, epoch, sample id, view): nothing else.

    Use it as a context manager: leaving it joins its threads and frees its buffers, also after an early ``break``.
    ``FastSSLError``: the file has fewer samples than one global batch, or an option a value that does not exist.

    Args:
        data: a ``.beton`` file, a pattern, a folder or list of such files (see ``open_beton``), or an open
            ``BetonReader`` (which then stays open).
        views: the view groups, for instance two global and six local views.
        indices: restrict the loader to these sample ids.
        window: files of a set that are shuffled among each other at a time, see ``FileWindows``; None: all.
        batch_size: samples a step on this rank. rank, world: which part of each global batch is ours.
        device, pipeline, workers, crops, on_bad, stall_minutes: see ``EngineSettings``.
        seed: of the order and of the views.
        shuffle: draw a new order every epoch; otherwise samples come as they are stored.
        drop_last: leave out the last, partial batch. Kept, it is as large on all ranks, see ``last_batch``; without
            ``shuffle`` it may be kept on one rank alone.
        view_epochs: the epochs share the views of that many, each in its own order; None: all have new ones.
        dtype: of the views.
        colour: apply the colour operations here. Without it the batch holds the uint8 crops and the tables that
            ``DeviceColour`` takes, for a step that does it itself.
    """

    def __init__(
        self,
        data: Data | BetonReader,
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
        stall_minutes: float = STALL_MINUTES,
        window: int | None = None,
        view_epochs: int | None = None,
    ):
        if isinstance(views, ViewSpec):
            raise FastSSLError("views is a list of ViewSpec: [ViewSpec(...)]")
        if not views:
            raise FastSSLError("a loader needs at least one view")
        place, threads = checked_device(device), available_cores() if workers is None else workers
        # For an Apple GPU the CPU does all, and the views move when they are done.
        renders = torch.device("cpu") if place.type == "mps" else place
        settings = EngineSettings(renders, batch_size, pipeline, threads, crops, on_bad, stall_minutes)
        if not (drop_last or shuffle) and world > 1:
            raise FastSSLError("drop_last=False with shuffle=False goes with one process: what is left has no parts")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise FastSSLError(f"dtype={dtype!r} is not a floating-point dtype of torch; views are normalised")
        self.seed, self.rank, self.world, self.shuffle, self._view_epochs = seed, rank, world, shuffle, view_epochs
        self.drop_last, self.dtype, self.colour = drop_last, dtype, colour
        self.device, self.views, self.batch_size = place, list(views), settings.batch_size
        self._owns_reader = not isinstance(data, BetonReader)
        self.reader = data if isinstance(data, BetonReader) else open_beton(data)
        try:
            self._indices = None if indices is None else _sample_ids(indices)
            self.num_samples = len(self.reader) if self._indices is None else len(self._indices)
            self._check_size()
            self._windows = None
            if window is not None:
                if indices is not None or not shuffle:
                    raise FastSSLError(f"window={window} shuffles a set's files: not with indices or shuffle=False")
                self._windows = FileWindows(self.reader.starts, window)
            self.engine = open_engine(self.reader, self.views, settings)
            # Samples from the consumer's batch to the last one that the engine may be asked for meanwhile.
            self._ahead = (self.engine.ahead + 3) * batch_size * world
            if indices is None:
                self.reader.require_here(window, self._ahead)
        except Exception:
            self._close_reader()
            raise
        # Threads start when they are first needed: none on a GPU.
        self._pool = ThreadPoolExecutor(settings.workers, "fastssl-colour")
        self._memory = [RecycledMemory() for _ in self.views]

    def _check_size(self) -> None:
        ids, count = self._indices, self.num_samples
        if ids is not None and count and (ids.min() < 0 or ids.max() >= len(self.reader)):
            raise FastSSLError(f"{self.reader.path}: indices reach beyond its {counted(len(self.reader), 'sample')}")
        if len(self) < 1:
            few = f"{counted(count, 'sample')}, fewer than one batch of {self.batch_size * self.world}"
            raise FastSSLError(f"{self.reader.path}: {few}; lower the batch size")

    def __len__(self) -> int:
        """Steps in an epoch."""
        return steps_per_epoch(self.num_samples, self.batch_size, self.world, self.drop_last)

    def ids_at(self, places: np.ndarray) -> np.ndarray:
        """The sample ids at these places of what the loader reads: of all samples, or of ``indices``. A new array."""
        ids: np.ndarray = places.copy() if self._indices is None else self._indices[places]
        return ids

    @property
    def stats(self) -> EngineStats:
        """Host cost and skipped samples."""
        return self.engine.stats

    def request(self, epoch: int, step: int) -> Request:
        """The ids and the view plan of one step: a pure function, the same on any machine."""
        count, total = self.num_samples, self.batch_size * self.world
        if not self.shuffle:
            everyone = np.arange(step * total, min((step + 1) * total, count))
        elif self.drop_last or (step + 1) * total <= count:
            everyone = batch_indices(count, self.seed, epoch, step, total, windows=self._windows)
        else:
            everyone = last_batch(count, self.seed, epoch, self.batch_size, self.world, self._windows)
        share = len(everyone) // self.world
        first = self.rank * share
        request = self._drawn(epoch, everyone[first : first + share])
        request.first, request.total = first, len(everyone)
        request.draw = lambda place: self._drawn(epoch, everyone[place : place + 1])
        return request

    def _drawn(self, epoch: int, chosen: np.ndarray) -> Request:
        index = self.ids_at(chosen)
        epoch = epoch % self._view_epochs if self._view_epochs else epoch
        return Request(index, draw_plans(self.views, self.seed, epoch, index, *self.reader.shapes(index)))

    def _hold(self, epoch: int, step: int) -> None:
        """Files of the groups of this step and of those begun ahead of it are to be here, and the next to come."""
        if self._windows is not None and self.reader.streamed:
            total, last = self.batch_size * self.world, self.num_samples - 1
            begin, rest = step * total, self.num_samples % total
            groups = self._windows.files_ahead(min(begin, last), self.seed, epoch)
            behind = self._windows.files_ahead(min(begin + self._ahead - 1, last), self.seed, epoch)
            wanted = max(2, 1 + len(groups) - len(behind))
            if len(groups) < wanted:
                groups += self._windows.files_ahead(0, self.seed, epoch + 1)
            filled = not self.drop_last and (rest == 1 or rest % self.world)
            if filled and len(behind) == 1:  # the epoch's first samples fill up its last batch
                groups[:0], wanted = self._windows.files_ahead(0, self.seed, epoch)[:1], wanted + 1
            self.reader.hold([file for group in groups[:wanted] for file in group])

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """The batches of one epoch, from ``start_step`` on (to go on where a run was stopped)."""
        self._hold(epoch, start_step)
        requests = (partial(self.request, epoch, step) for step in range(start_step, len(self)))
        rendered_batches, stats = self.engine.run(requests), self.stats
        cpu = time.thread_time()
        try:
            for step, rendered in enumerate(rendered_batches, start_step):
                self._hold(epoch, step)
                started = time.perf_counter()
                index, plans = rendered.request.index, [plan.reshape(-1) for plan in rendered.request.plans]
                labels = torch.from_numpy(self.reader.labels_of(index))
                batch = Batch(rendered.views, torch.from_numpy(index), labels)
                if self.colour:
                    batch.views = [
                        augment(pixels, plan, spec, self.dtype, self._pool, memory)
                        for pixels, plan, spec, memory in zip(rendered.views, plans, self.views, self._memory)
                    ]
                else:
                    # Host crops lie in the engine's ring, which the next batch writes over.
                    batch.views = [pixels if pixels.is_cuda else pixels.clone() for pixels in rendered.views]
                    batch.tables = [to_device(parameter_table(plan), self.device) for plan in plans]
                batch.views = [views.to(self.device) for views in batch.views]
                stats.colour_s += time.perf_counter() - started
                stats.consumer_cpu_s += time.thread_time() - cpu
                yield batch
                cpu = time.thread_time()
        finally:
            rendered_batches.close()

    def _close_reader(self) -> None:
        if self._owns_reader:
            self.reader.close()

    def close(self) -> None:
        """Join the threads (not those that a dead disk holds), free the buffers, close the file if opened here."""
        self.engine.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._close_reader()

    def __enter__(self) -> ViewLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _sample_ids(indices: np.ndarray) -> np.ndarray:
    """``indices`` as (n,) int64. A mask of booleans would pass as the ids 0 and 1, floats would be cut."""
    ids = np.asarray(indices)
    if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
        got = f"got {ids.dtype} of shape {ids.shape} (np.flatnonzero turns a mask into ids)"
        raise FastSSLError(f"indices must be a list of sample ids, {got}")
    return ids.astype(np.int64)
