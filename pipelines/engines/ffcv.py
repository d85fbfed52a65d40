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

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
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

from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.ahead import AheadEngine
from fastssl.pipelines.engines.base import EngineSettings, Rendered, Request
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


class FfcvEngine(AheadEngine):
    """Decode and crop with FFCV; see the module's text."""

    name = "ffcv"
    reads = False  # FFCV maps the file

    def __init__(self, reader: BetonReader, specs: Sequence[ViewSpec], settings: EngineSettings):
        # numba starts its threads once, as many as the machine has cores, and refuses more.
        most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # made on import
        super().__init__(reader, specs, replace(settings, workers=min(settings.workers, most)))
        self._loader: Loader | None = None

    def _run(self, requests: Iterator[Callable[[], Request]]) -> Generator[Rendered, None, None]:
        if self._loader is None:
            self._loader = self._open()
        self._ffcv = _Epoch(self._loader, np.zeros(0, np.int64))
        try:
            yield from super()._run(requests)
        finally:
            if not self.deadline.given_up:
                self._ffcv.close()  # lets go of the map, which a thread may be reading
            self._ffcv.closed = True

    def _views(self, request: Request, encoded: list[np.ndarray]) -> list[Tensor]:
        # FFCV maps the file, and what is cut off of a map would end the process.
        self.reader.require_whole()
        numba.set_num_threads(self.workers)  # of this thread
        with _COMPILED_LOOP:
            views = self._ffcv.run_pipeline(0, _table(request), 0, None)[0]
        groups, left, pin = [], iter(views), self._stream is not None
        for spec in self.specs:
            # Pinned memory from torch's cache is not handed out again before a copy from it has arrived.
            shape = (spec.count, len(request.index), spec.size, spec.size, 3)
            host = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
            for own in host.numpy():
                np.copyto(own, next(left))
            groups.append(host.to(self.device, non_blocking=True).flatten(0, 1).permute(0, 3, 1, 2))
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
                batches_ahead=0,  # its memory is written to and read from in one thread
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
