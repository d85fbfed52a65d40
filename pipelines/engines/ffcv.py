"""The ``ffcv`` engine: FFCV's loader and decoder, with an operation of ours that decodes once and cuts every view of
the plan.

FFCV decodes once per *pipeline*, so two views cost two decodes there, and its crops come from a generator that cannot
be seeded. Here its loader runs one operation whose compiled loop reads boxes that were drawn outside, and resizes with
the same antialiased filter as the other engines, where FFCV's own takes areas.

What else is kept away from the user: FFCV sets torch's number of threads when a loader is made or started; an error in
its thread leaves the consumer waiting for ever; a thread outlives an early ``break``; batches that are kept are
overwritten; scratch memory is taken for every place of a batch and of the queue at the size of the file's largest
picture.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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

from fastssl.errors import FastSSLError, worker_error
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.base import Engine, EngineStats, Rendered, Request, batch_name, thread_initializer
from fastssl.pipelines.engines.damaged import SampleCheck
from fastssl.pipelines.ops.compiled import crop_resize
from fastssl.pipelines.ops.crop import BOX, boxes_of
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.utils.cores import available_cores
from fastssl.utils.deadline import LEAVE_SECONDS, STALL_MINUTES, Patience

# ---------------------------------------------------------------------- compiled: decode, and cut all views

# libturbojpeg as FFCV has it loaded. FFCV's own call asks for the fast DCT and for chroma without smoothing, which is 1
# grey level from what every other decoder gives.
_RGB, _ACCURATE_DCT = 0, 4096
_open_decoder, _close_decoder, _decompress = lib.tjInitDecompress, lib.tjDestroy, lib.tjDecompress2
_open_decoder.argtypes, _open_decoder.restype = [], c_void_p
_close_decoder.argtypes, _close_decoder.restype = [c_void_p], c_int
_decompress.argtypes, _decompress.restype = (
    [c_void_p, c_void_p, c_ulong, c_void_p, c_int, c_int, c_int, c_int, c_int],
    c_int,
)


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
        shapes = [(spec.size, spec.size, 3) for spec in self.specs]
        byte = np.dtype("<u1")
        return replace(previous_state, jit_mode=True, shape=shapes[0], dtype=byte), tuple(
            AllocationQuery(shape, byte) for shape in shapes
        )

    def generate_code(self) -> Callable:
        read, decode_jpeg, cut, places = self.memory_read, _decode, crop_resize, Compiler.get_iterator()
        jpg, views, box = IMAGE_MODES["jpg"], len(self.specs), len(BOX)
        largest = max(spec.size for spec in self.specs)
        cubic = np.array([spec.interpolation == "bicubic" for spec in self.specs])

        def decode(rows, destinations, metadata, storage_state):
            for place in places(len(rows)):
                row = rows[place]
                field = metadata[row[0]]
                data = read(field["data_ptr"], storage_state)
                height, width = np.int64(field["height"]), np.int64(field["width"])
                image = decode_jpeg(data, height, width) if field["mode"] == jpg else data.reshape((height, width, 3))
                scratch = np.empty((height, 3 * largest + 1), np.uint8)
                for view in range(views):
                    cut(
                        image,
                        row[1 + box * view : 1 + box * (view + 1)],
                        cubic[view],
                        scratch,
                        destinations[view][place],
                    )
            return destinations

        decode.is_parallel = True
        return decode


# ---------------------------------------------------------------------- the engine


class FfcvEngine(Engine):
    """Decode and crop with FFCV; see the module's text.

    Args:
        reader: the open ``.beton`` file. Not closed here.
        specs: the view groups.
        device: where the views are wanted.
        batch_size: most samples of a request.
        workers: FFCV's threads; default: the cores that this process may use.
        on_bad: ``fail`` raises at the first damaged picture; ``skip`` puts another sample of the batch in its place,
            counts it in ``stats.skipped`` and goes on.
        prefetch: batches rendered ahead of the consumer.
        stall_minutes: how long the consumer waits for a batch before it is an error.
    """

    name = "ffcv"

    def __init__(
        self,
        reader: BetonReader,
        specs: Sequence[ViewSpec],
        *,
        device: torch.device,
        batch_size: int,
        workers: int | None = None,
        on_bad: str = "fail",
        prefetch: int = 3,
        stall_minutes: float = STALL_MINUTES,
    ):
        self.patience = Patience(reader.path, stall_minutes)
        self.reader, self.specs, self.device, self.batch_size = reader, list(specs), device, batch_size
        # numba starts its threads once, as many as the machine has cores, and refuses more.
        self.workers = min(workers or available_cores(), numba.config.NUMBA_NUM_THREADS)
        self.prefetch = prefetch
        self.stats = EngineStats()
        self._checkers = ThreadPoolExecutor(self.workers, thread_name_prefix="fastssl-ffcv-check")
        self._check = SampleCheck(reader, on_bad, self.stats, self._checkers)
        self._loader: Loader | None = None

    def _run(self, requests: Iterator[Callable[[], Request]]) -> Generator[Rendered, None, None]:
        if self._loader is None:
            self._loader = self._open()
        epoch = _Epoch(
            self._loader, requests, self._checked, self.workers, self.patience, thread_initializer(self.device)
        )
        try:
            while True:
                started = time.perf_counter()
                got = epoch.get()
                if got is None:
                    return
                request, views, cpu = got
                groups = self._groups(views, len(request.index))
                self.stats.wait_s += time.perf_counter() - started
                self.stats.samples += len(request.index)
                self.stats.host_cpu_s += cpu
                yield Rendered(request, groups)
        finally:
            epoch.stop()

    def _checked(self, draw: Callable[[], Request]) -> Request:
        """Draw, look at what was not seen before; FFCV maps the file, and what is cut off of a map would end the
        process.
        """
        try:
            request = self._check(draw())
        except FastSSLError:
            raise
        except Exception as error:
            raise worker_error(self.reader.path, "drawing the views of a batch", error) from error
        self.reader.require_whole()
        return request

    def _groups(self, views: Sequence[np.ndarray], batch: int) -> list[Tensor]:
        """FFCV's buffers as (count * B, 3, S, S) tensors on memory of their own: FFCV will write over its."""
        groups, first = [], 0
        for spec in self.specs:
            # Pinned memory from torch's cache is not handed out again before a copy from it has arrived.
            host = torch.empty(
                spec.count * batch, spec.size, spec.size, 3, dtype=torch.uint8, pin_memory=self.device.type == "cuda"
            )
            for number in range(spec.count):
                np.copyto(host[number * batch : (number + 1) * batch].numpy(), views[first + number])
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
                batch_size=self.batch_size,
                num_workers=self.workers,
                os_cache=True,
                pipelines=fields,
                drop_last=False,
                batches_ahead=self.prefetch,
            )
        finally:
            torch.set_num_threads(threads)
        # Tables for FFCV's own cache, which is not used here: 680 MB for ImageNet.
        manager = loader.memory_manager
        manager.sample_to_pages = manager.page_to_samples = manager.ptr_to_size = None
        return loader

    def _free(self) -> None:
        self._loader = None
        self._checkers.shutdown(wait=not self.patience.given_up, cancel_futures=True)


#: numba's own thread pool, which it falls back to where neither TBB nor OpenMP loads, ends the process when two threads
#: use it at once.
_COMPILED_LOOP = threading.Lock()


class _Epoch(EpochIterator):
    """FFCV's epoch, whose thread also draws the plans, hands errors on, and can be stopped and joined."""

    def __init__(
        self,
        loader: Loader,
        requests: Iterator[Callable[[], Request]],
        check: Callable,
        threads: int,
        patience: Patience,
        begin: Callable[[], None],
    ):
        self._requests, self._check, self._threads, self._patience, self._begin = (
            requests,
            check,
            threads,
            patience,
            begin,
        )
        self._wanted = threading.Event()
        super().__init__(loader, np.zeros(0, np.int64))

    def run(self) -> None:
        numba.set_num_threads(self._threads)
        slot = 0
        try:
            self._begin()
            while not self.terminate_event.is_set() and (draw := next(self._requests, None)) is not None:
                cpu = time.thread_time()
                request = self._check(draw)
                with _COMPILED_LOOP:
                    views = self._rendered(request, slot)
                slot = (slot + 1) % (self.loader.batches_ahead + 2)
                self._put((request, views, time.thread_time() - cpu))
            self._put(None)
        except BaseException as error:  # for whoever waits at the other end
            self._put(error)

    def _rendered(self, request: Request, slot: int) -> Sequence[np.ndarray]:
        try:
            return self.run_pipeline(0, _table(request), slot, None)[0]
        except Exception as error:
            raise worker_error(self._patience.path, batch_name(request), error) from error

    def _put(self, item: object) -> None:
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def get(self) -> tuple[Request, Sequence[np.ndarray], float] | None:
        """The next batch; None behind the last one."""
        item = self._patience.take(self.output_queue, lambda: "while a batch was to come")
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        """End the thread and wait for it, unless it was given up."""
        self.terminate_event.set()
        if not self._patience.given_up:
            self.join(LEAVE_SECONDS)
        if self.is_alive():
            self._patience.give_up()
        else:
            self.close()  # lets go of the map, which a thread may be reading
        self.closed = True


def _table(request: Request) -> np.ndarray:
    """(B, 1 + 5 V) int64: the sample, then each view's box and flip."""
    batch = len(request.index)
    return np.concatenate(
        [
            request.index.reshape(batch, 1),
            *(boxes_of(plan).reshape(batch, len(BOX) * len(plan)) for plan in request.plans),
        ],
        axis=1,
    )
