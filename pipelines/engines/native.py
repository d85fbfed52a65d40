"""The ``native`` engine: libjpeg-turbo on threads, each picture decoded once whatever the number of views.

Two ways to crop, one interface:

* ``host``: a worker decodes into its own scratch memory and cuts every view from it in one compiled call.
  For CPU training, where host and device are the same silicon.
* ``device``: a worker decodes straight into a packed, pinned buffer; one copy moves it; all views of all samples are
  then cut by two batched matrix products on the device. The host's work does not grow with the number of views.

Threads, not processes: decoding and resizing release the GIL, and nothing is copied between address spaces. A slot of
the ring is filled again only when the consumer comes back for the next batch, so views handed out are never
overwritten under its hands.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastssl.errors import BetonError, JpegError, at_work_on
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.base import Engine, EngineSettings, Rendered, Request, batch_name, thread_initializer
from fastssl.pipelines.engines.damaged import give_places
from fastssl.pipelines.ops.crop import boxes_of, crop_resize_device, crop_resize_host
from fastssl.pipelines.ops.memory import ThreadMemory
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.utils.transfer import pinned_bytes, take_over


class _Slot:
    """One place of the ring: host buffers that grow to the largest batch seen and stay allocated.

    ``copied`` is recorded behind the copy to a GPU: whoever fills the slot again waits for it first.
    """

    def __init__(self, pin: bool):
        self.pin = pin
        self.packed = torch.empty(0, dtype=torch.uint8)
        self.views: list[Tensor] = []
        self.copied = torch.cuda.Event(blocking=True) if pin else None  # others spin: a core of the decoders' lost

    def reserve(self, numel: int) -> None:
        """Make room for ``numel`` bytes of packed source memory."""
        if self.packed.numel() < numel:
            # Slack, as batches of photos differ by a few percent, and pinning memory is slow.
            room = pinned_bytes(numel) if self.pin else numel + numel // 4
            self.packed = torch.empty(room, dtype=torch.uint8, pin_memory=self.pin)

    def reserve_views(self, specs: Sequence[ViewSpec], batch: int) -> list[Tensor]:
        """One (count * batch, S, S, 3) uint8 tensor a group, on memory that is kept for the largest batch."""
        shapes = [(spec.count * batch, spec.size, spec.size, 3) for spec in specs]
        if not self.views or self.views[0].shape[0] < shapes[0][0]:
            self.views = [torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin) for shape in shapes]
        return [whole[: shape[0]] for whole, shape in zip(self.views, shapes)]


class _Job:
    """A request on its way: what the workers were told, and what they found damaged."""

    def __init__(self, request: Request, shapes: list[tuple[int, int, int]], offsets: np.ndarray, numel: int):
        self.request, self.shapes = request, shapes
        self.offsets = offsets  # (B,) int64, first byte of each decoded picture in the packed buffer
        self.numel = numel  # bytes of the packed buffer that are used
        self.parts: list[Future[None]] = []
        # With host crops, of each group: the views, the same as (count, B, S, S, 3), and the boxes, (B, count, 5).
        self.views: list[Tensor] = []
        self.arrays: list[np.ndarray] = []
        self.boxes: list[np.ndarray] = []
        self.bad: dict[int, Exception] = {}  # by position


class NativeEngine(Engine):
    """Decode and crop on threads; see the module's text."""

    name = "native"

    def __init__(self, reader: BetonReader, specs: Sequence[ViewSpec], settings: EngineSettings):
        super().__init__(reader, specs, settings)
        pin = self.device.type == "cuda"
        self.crops = settings.crops if settings.crops != "auto" else "device" if pin else "host"
        # Two more slots than batches ahead: one is in the consumer's hands, one may still be copying.
        self._slots = [_Slot(pin) for _ in range(self.ahead + 2)]
        self._copy_stream = torch.cuda.Stream(self.device) if pin else None
        self._pool = self._threads(self.workers, "decode", thread_initializer(self.device))
        self._scratch = ThreadMemory()
        self._lock = threading.Lock()

    # ---- the consumer's side

    def _run(self, requests: Iterator[Callable[[], Request]]) -> Generator[Rendered, None, None]:
        free, pending = deque(self._slots), deque[tuple[_Slot, Future[_Job]]]()

        def fill() -> None:
            while free and (draw := next(requests, None)) is not None:
                slot = free.popleft()
                pending.append((slot, self._pool.submit(self._begin, slot, draw)))

        try:
            fill()
            while pending:
                slot, begun = pending[0]
                started = time.perf_counter()
                job = self.deadline.result(begun, lambda: "while a batch was to begin")
                for part in job.parts:
                    self.deadline.result(part, partial(batch_name, job.request))
                self.stats.wait_s += time.perf_counter() - started
                self._replace_bad(slot, job)
                yield Rendered(job.request, self._deliver(slot, job))
                free.append(pending.popleft()[0])
                fill()
        finally:
            self._drain([job for _, job in pending])

    def _drain(self, jobs: list[Future[_Job]]) -> None:
        """Nobody writes into a slot after this, unless its thread was given up."""
        if not self.deadline.settled(jobs):
            return
        # One that failed has handed nothing out; the consumer has left, or was given the first error already.
        begun = [job.result() for job in jobs if not job.cancelled() and job.exception() is None]
        self.deadline.settled([part for job in begun for part in job.parts])

    def _deliver(self, slot: _Slot, job: _Job) -> list[Tensor]:
        """Views on the device. Nothing here waits for the device."""
        host = job.views if self.crops == "host" else [slot.packed[: job.numel]]
        there = [self._to_device(slot.copied, tensor) for tensor in host] if slot.copied else host
        if self.crops == "host":
            return [view.permute(0, 3, 1, 2) for view in there]
        shapes = self.reader.shapes(job.request.index)
        return crop_resize_device(there[0], job.offsets, *shapes, job.request.plans, self.specs)

    def _to_device(self, copied: torch.cuda.Event, host: Tensor) -> Tensor:
        """Copy pinned memory on the long-lived copy stream; the current stream waits for it, the host does not."""
        with torch.cuda.stream(self._copy_stream):
            copy = host.to(self.device, non_blocking=True)
            copied.record(self._copy_stream)
        take_over([copy], copied, self.device)
        return copy

    def _replace_bad(self, slot: _Slot, job: _Job) -> None:
        """Give the place of every damaged sample to the nearest good one of the batch, which may be another
        process's.
        """
        if not job.bad:
            return
        index, bad = job.request.index, dict(sorted(job.bad.items()))
        self.stats.skipped.extend(int(index[position]) for position in bad)
        pictures: dict[int, np.ndarray] = {}

        def is_sound(sample: int) -> bool:
            if sample not in pictures:
                begun = self._pool.submit(self._decode, sample)
                with suppress(JpegError, BetonError):
                    pictures[sample] = self.deadline.result(begun, lambda: f"at sample {sample}")
            return sample in pictures

        donors = give_places(job.request, bad, next(iter(bad.values())), is_sound)
        for position, donor in donors.items():
            if donor is None:
                self._put(slot, job, position, pictures[int(index[position])])
                continue
            job.offsets[position] = job.offsets[donor]
            for views in job.arrays:
                views[:, position] = views[:, donor]

    def _put(self, slot: _Slot, job: _Job, position: int, picture: np.ndarray) -> None:
        """Make ``picture`` (H, W, 3) that of ``position``, whose view plan is there already."""
        if self.crops == "host":
            job.boxes = [boxes_of(plan) for plan in job.request.plans]
            self._cut(job, position, picture)
            return
        # Behind all others; what is spare behind the last one stays that, for the widest of them.
        old = slot.packed[: job.numel]
        job.offsets[position] = job.numel
        job.numel += picture.size + self._spare(job.request)
        slot.packed = torch.empty(job.numel, dtype=torch.uint8, pin_memory=slot.pin)
        slot.packed[: len(old)] = old
        slot.packed[len(old) : len(old) + picture.size] = torch.from_numpy(picture.reshape(-1))

    def _spare(self, request: Request) -> int:
        """Bytes behind the last picture: crop_resize_device reads rows in windows of the widest one."""
        return 3 * (int(self.reader.take("widths", request.index).max()) + 8)

    def _free(self) -> None:
        self._slots = []

    # ---- the workers' side

    def _begin(self, slot: _Slot, draw: Callable[[], Request]) -> _Job:
        """Draw the plan, make room, and hand the samples out in parts."""
        cpu = time.thread_time()
        with at_work_on(self.reader.path, "drawing the views of a batch"):
            request = draw()
        with at_work_on(self.reader.path, batch_name(request)):
            if slot.copied:
                slot.copied.synchronize()  # the slot's last content may still be on its way to the GPU
            batch = len(request.index)
            heights, widths = self.reader.shapes(request.index)
            numel = heights.astype(np.int64) * widths * 3
            ends = np.cumsum(numel)
            shapes = [(*shape, 3) for shape in zip(heights.tolist(), widths.tolist())]
            job = _Job(request, shapes, ends - numel, int(ends[-1]) + self._spare(request))
            if self.crops == "host":
                job.views = slot.reserve_views(self.specs, batch)
                job.arrays = [view.numpy().reshape(-1, batch, *view.shape[1:]) for view in job.views]
                job.boxes = [boxes_of(plan) for plan in request.plans]
            else:
                slot.reserve(job.numel)
            # A part a worker: nobody idles at the end of a batch, because the next ones are waiting already.
            part = max(1, batch // self.workers)
            job.parts = [
                self._pool.submit(self._render, slot, job, low, min(low + part, batch)) for low in range(0, batch, part)
            ]
            with self._lock:
                self.stats.host_cpu_s += time.thread_time() - cpu
            return job

    def _render(self, slot: _Slot, job: _Job, low: int, high: int) -> None:
        """Decode samples ``low:high`` of the batch and, for host crops, cut their views."""
        cpu = time.thread_time()
        for position in range(low, high):
            try:
                self._render_one(slot, job, position)
            except (JpegError, BetonError) as error:
                if self.on_bad == "fail":
                    raise
                with self._lock:
                    job.bad[position] = error
            except Exception:
                with at_work_on(self.reader.path, f"sample {job.request.index[position]}"):
                    raise
        with self._lock:
            self.stats.samples += high - low
            self.stats.host_cpu_s += time.thread_time() - cpu

    def _render_one(self, slot: _Slot, job: _Job, position: int) -> None:
        sample, shape = int(job.request.index[position]), job.shapes[position]
        numel, start = math.prod(shape), int(job.offsets[position])
        if self.crops == "device":
            self.reader.decode_into(sample, slot.packed[start : start + numel].numpy().reshape(shape))
            return
        picture = self._scratch.take(numel).reshape(shape)
        self.reader.decode_into(sample, picture)
        self._cut(job, position, picture)

    def _cut(self, job: _Job, position: int, picture: np.ndarray) -> None:
        for boxes, views, spec in zip(job.boxes, job.arrays, self.specs):
            crop_resize_host(picture, boxes[position], spec, views, position)

    def _decode(self, sample: int) -> np.ndarray:
        with at_work_on(self.reader.path, f"sample {sample}"):
            return self.reader.decode(sample)
