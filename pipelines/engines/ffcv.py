"""The ``ffcv`` engine: FFCV's loader and decoder, with an operation of ours that decodes once and cuts every view of
the plan.

FFCV decodes once per *pipeline*, so two views cost two decodes there, and its crops come from a generator that cannot
be seeded. Here its loader runs one operation whose compiled loop reads boxes that were drawn outside, and resizes with
the same antialiased filter as the other engines, where FFCV's own takes areas.

Also kept away from the user: FFCV sets torch's number of threads when a loader is made; an error in its thread leaves
the consumer waiting forever; a thread outlives an early ``break``; batches that are kept are overwritten; scratch
memory is taken for every place of a batch and of the queue at the size of the file's largest picture.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from ctypes import c_int, c_ulong, c_void_p
from dataclasses import replace
from typing import Any

import numba
import numpy as np
import torch
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
from ffcv.libffcv import lib
from ffcv.loader import Loader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from torch import Tensor

from fastssl.errors import at_work_on
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.base import Engine, EngineSettings, Rendered, Request, batch_name, thread_initializer
from fastssl.pipelines.engines.damaged import SampleCheck
from fastssl.pipelines.ops.compiled import crop_resize
from fastssl.pipelines.ops.crop import BOX, boxes_of
from fastssl.pipelines.plan.draw import ViewSpec

# libturbojpeg as FFCV has it loaded. FFCV's own call asks for the fast DCT and for chroma without smoothing, which is 1
# grey level from what every other decoder gives.
_RGB, _ACCURATE_DCT = 0, 4096
_open_decoder, _close_decoder, _decompress = lib.tjInitDecompress, lib.tjDestroy, lib.tjDecompress2
for _call, _takes, _gives in (
    (_open_decoder, [], c_void_p),
    (_close_decoder, [c_void_p], c_int),
    (_decompress, [c_void_p, c_void_p, c_ulong, c_void_p, *[c_int] * 5], c_int),
):
    _call.argtypes, _call.restype = _takes, _gives


@numba.njit(nogil=True, error_model="numpy")
def _decode(data: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8. Taken and given back for each picture: memory for the largest one at every place of the queue
    could be gigabytes.
    """
    image = np.empty((height, width, 3), np.uint8)
    decoder = _open_decoder()
    _decompress(decoder, data.ctypes.data, data.size, image.ctypes.data, width, 3 * width, height, _RGB, _ACCURATE_DCT)
    _close_decoder(decoder)
    return image


class _DecodeOnce(SimpleRGBImageDecoder):
    """FFCV operation: one decode, all views. Its "batch indices" are rows of (sample, box of view 0, box of view 1,
    ...).
    """

    def __init__(self, specs: Sequence[ViewSpec]):
        super().__init__()
        self.specs = [spec for spec in specs for _ in range(spec.count)]

    def declare_state_and_memory(self, previous_state: Any) -> tuple:
        shapes, byte = [(spec.size, spec.size, 3) for spec in self.specs], np.dtype("<u1")
        state = replace(previous_state, jit_mode=True, shape=shapes[0], dtype=byte)
        return state, tuple(AllocationQuery(shape, byte) for shape in shapes)

    def generate_code(self) -> Callable:
        read, decode_jpeg, cut, places = self.memory_read, _decode, crop_resize, Compiler.get_iterator()
        jpg, views, box = IMAGE_MODES["jpg"], len(self.specs), len(BOX)
        largest = max(spec.size for spec in self.specs)
        cubic = np.array([spec.interpolation == "bicubic" for spec in self.specs])

        def decode(rows: Any, destinations: Any, metadata: Any, storage_state: Any) -> Any:
            for place in places(len(rows)):
                row = rows[place]
                field = metadata[row[0]]
                data = read(field["data_ptr"], storage_state)
                height, width = np.int64(field["height"]), np.int64(field["width"])
                image = decode_jpeg(data, height, width) if field["mode"] == jpg else data.reshape((height, width, 3))
                scratch = np.empty((height, 3 * largest + 1), np.uint8)
                for view in range(views):
                    here = row[1 + box * view : 1 + box * (view + 1)]
                    cut(image, here, cubic[view], scratch, destinations[view][place])
            return destinations

        decode.is_parallel = True  # type: ignore[attr-defined]  # how FFCV is told
        return decode


class FfcvEngine(Engine):
    """Decode and crop with FFCV; see the module's text."""

    name = "ffcv"

    def __init__(self, reader: BetonReader, specs: Sequence[ViewSpec], settings: EngineSettings):
        super().__init__(reader, specs, settings)
        # numba starts its threads once, as many as the machine has cores, and refuses more.
        self.workers = min(self.workers, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]  # made on import
        self._check = SampleCheck(reader, self.on_bad, self.stats, self._threads(self.workers, "ffcv-check"))
        at_device = thread_initializer(self.device)

        def begin() -> None:
            numba.set_num_threads(self.workers)
            at_device()

        self._renderer = self._threads(1, "ffcv", begin)
        self._loader: Loader | None = None

    def _run(self, requests: Iterator[Callable[[], Request]]) -> Generator[Rendered, None, None]:
        if self._loader is None:
            self._loader = self._open()
        epoch, slots = _Epoch(self._loader, np.zeros(0, np.int64)), itertools.cycle(range(self.ahead + 2))
        pending: deque[Future[tuple[Request, Sequence[np.ndarray], float]]] = deque()

        def fill() -> None:
            for draw in itertools.islice(requests, self.ahead + 1 - len(pending)):
                pending.append(self._renderer.submit(self._render, epoch, draw, next(slots)))

        try:
            fill()
            while pending:
                started = time.perf_counter()
                request, views, cpu = self.deadline.result(pending[0], lambda: "while a batch was to come")
                groups = self._groups(views, len(request.index))
                self.stats.wait_s += time.perf_counter() - started
                self.stats.samples += len(request.index)
                self.stats.host_cpu_s += cpu
                pending.popleft()
                fill()
                yield Rendered(request, groups)
        finally:
            if self.deadline.settled(pending):
                epoch.close()  # lets go of the map, which a thread may be reading
            epoch.closed = True

    def _render(
        self, epoch: _Epoch, draw: Callable[[], Request], slot: int
    ) -> tuple[Request, Sequence[np.ndarray], float]:
        """A request, its views on memory of FFCV's, and the CPU seconds that they took."""
        cpu = time.thread_time()
        with at_work_on(self.reader.path, "drawing the views of a batch"):
            request = self._check(draw())
        # FFCV maps the file, and what is cut off of a map would end the process.
        self.reader.require_whole()
        with at_work_on(self.reader.path, batch_name(request)), _COMPILED_LOOP:
            views = epoch.run_pipeline(0, _table(request), slot, None)[0]
        return request, views, time.thread_time() - cpu

    def _groups(self, views: Sequence[np.ndarray], batch: int) -> list[Tensor]:
        """FFCV's buffers as (count * B, 3, S, S) tensors on memory of their own: FFCV will write over its."""
        groups, first = [], 0
        for spec in self.specs:
            # Pinned memory from torch's cache is not handed out again before a copy from it has arrived.
            shape, pin = (spec.count * batch, spec.size, spec.size, 3), self.device.type == "cuda"
            host = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
            for number, part in enumerate(host.numpy().reshape(spec.count, batch, *shape[1:]), first):
                np.copyto(part, views[number])
            first += spec.count
            groups.append(host.to(self.device, non_blocking=True).permute(0, 3, 1, 2))
        return groups

    def _open(self) -> Loader:
        threads = torch.get_num_threads()
        try:
            fields: dict = dict.fromkeys(self.reader.field_names)
            fields[self.reader.image_field] = [_DecodeOnce(self.specs)]
            loader = Loader(
                self.reader.same_file(),
                batch_size=self.settings.batch_size,
                num_workers=self.workers,
                os_cache=True,
                pipelines=fields,
                drop_last=False,
                batches_ahead=self.ahead,
            )
        finally:
            torch.set_num_threads(threads)
        # Tables for FFCV's own cache, which is not used here: 680 MB for ImageNet.
        manager = loader.memory_manager
        manager.sample_to_pages = manager.page_to_samples = manager.ptr_to_size = None
        return loader

    def _free(self) -> None:
        self._loader = None


#: numba's own thread pool, which it falls back to where neither TBB nor OpenMP loads, ends the process when two threads
#: use it at once.
_COMPILED_LOOP = threading.Lock()


class _Epoch(EpochIterator):
    """FFCV's epoch: its memory and its compiled code, without its thread."""

    def start(self) -> None:
        """FFCV's own thread would leave the consumer waiting forever at an error."""


def _table(request: Request) -> np.ndarray:
    """(B, 1 + 5 V) int64: the sample, then each view's box and flip."""
    boxes = (boxes_of(plan).reshape(len(request.index), -1) for plan in request.plans)
    return np.concatenate([request.index[:, None], *boxes], axis=1)
