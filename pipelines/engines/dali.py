"""The ``dali`` engine: NVIDIA DALI decodes each picture once and cuts all views of the plan from it.

The boxes are inputs of the graph, so DALI draws nothing. Colour is ours as in every engine: DALI's contrast pivots on
grey 128 and its hue is a rotation in YIQ, 8.6 grey levels from torchvision on average at MoCo-v2's strength. Without a
GPU the same graph is built from the operators' CPU versions.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl.errors import BetonError, FastSSLError, at_work_on
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.base import Engine, EngineSettings, Rendered, Request, batch_name, take_over
from fastssl.pipelines.engines.damaged import SampleCheck
from fastssl.pipelines.plan.draw import ViewSpec


class DaliEngine(Engine):
    """Decode and crop with DALI, a file of JPEGs only (`require_engine` sees to that); see the module's text."""

    name = "dali"
    ahead = 2

    def __init__(self, reader: BetonReader, specs: Sequence[ViewSpec], settings: EngineSettings):
        super().__init__(reader, specs, settings)
        # One thread draws plans in order and reads; the other ones look at samples that were not seen before.
        self._drawer = self._threads(1, "dali-plan")
        self._check = SampleCheck(reader, self.on_bad, self.stats, self._threads(self.workers, "dali-check"))
        self._copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._lent: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()
        self._pipeline: Any = None
        self._requests: Iterator[Callable[[], Request]] = iter(())
        self._drawn: deque[Future[tuple[Request, list[np.ndarray]]]] = deque()
        self._fed: deque[Request] = deque()

    # ---- the consumer's side

    def _run(self, requests: Iterator[Callable[[], Request]]) -> Generator[Rendered, None, None]:
        self._requests = requests
        self._draw_ahead()
        if self._pipeline is None:
            self._pipeline = self._build()
        finished = False
        try:
            while True:
                started = time.perf_counter()
                try:
                    # On this stream: without one the host would wait for the GPU.
                    outputs = self._pipeline.run(self._copy_stream)
                except StopIteration:
                    finished = True
                    break
                request = self._fed.popleft()
                views = self._views(outputs)
                self.stats.wait_s += time.perf_counter() - started
                self.stats.samples += len(request.index)
                yield Rendered(request, views)
        except RuntimeError as error:
            raise self._explain(error) from error
        finally:
            self._end_epoch(finished)

    def _views(self, outputs: tuple) -> list[Tensor]:
        """DALI's outputs, (B, S, S, 3) a view, as (count * B, 3, S, S) a group, on memory that DALI does not write to
        any more: batches that are kept stay whole.
        """
        if self._copy_stream is None:
            return self._groups([torch.from_dlpack(output.as_tensor()) for output in outputs])
        with torch.cuda.stream(self._copy_stream):
            views = [torch.from_dlpack(output.as_tensor()) for output in outputs]
            groups = self._groups(views, copy=True)
            copied = torch.cuda.Event(blocking=True)
            copied.record(self._copy_stream)
        # What torch lets go of is DALI's to write to at once, whatever torch's streams have yet to read.
        self._lent.append((copied, views))
        while self._lent and (len(self._lent) > self.ahead or self._lent[0][0].query()):
            self._give_back()
        take_over(groups, copied, self.device)
        return groups

    def _give_back(self) -> None:
        self._lent[0][0].synchronize()
        self._lent.popleft()

    def _groups(self, views: list[Tensor], copy: bool = False) -> list[Tensor]:
        """``copy``: also of a single view."""
        left = iter(views)
        parts = [list(itertools.islice(left, spec.count)) for spec in self.specs]
        whole = [part[0] if len(part) == 1 and not copy else torch.cat(part) for part in parts]
        return [group.permute(0, 3, 1, 2) for group in whole]

    def _end_epoch(self, finished: bool) -> None:
        """Bring the graph back to its beginning, or let go of it after an error: DALI's object is of no more use
        then.
        """
        self._requests = iter(())
        self.deadline.settled(self._drawn)
        self._drawn.clear()
        self._fed.clear()
        while self._lent:
            self._give_back()
        if finished:
            self._pipeline.reset()
        else:
            self._pipeline = None  # batches that it has begun cannot be taken back

    def _explain(self, error: RuntimeError) -> FastSSLError:
        text = " ".join(str(error).split())[:300]
        where = batch_name(self._fed[0]) if self._fed else "before its first batch"
        return FastSSLError(f"{self.reader.path}: DALI failed {where}: {text}")

    def _free(self) -> None:
        self._pipeline = None

    # ---- what DALI is fed

    def _draw_ahead(self) -> None:
        for draw in itertools.islice(self._requests, self.ahead + 1 - len(self._drawn)):
            self._drawn.append(self._drawer.submit(self._draw, draw))

    def _draw(self, draw: Callable[[], Request]) -> tuple[Request, list[np.ndarray]]:
        """A request and its samples' bytes. Read here and not where DALI asks for them: the consumer waits there, and
        must not hang.
        """
        cpu = time.thread_time()
        with at_work_on(self.reader.path, "drawing the views of a batch"):
            request = self._check(draw())
            while (encoded := self._read(request)) is None:
                request = self._check(request)
        self.stats.host_cpu_s += time.thread_time() - cpu
        return request, encoded

    def _read(self, request: Request) -> list[np.ndarray] | None:
        """The bytes of its samples; None where some can no longer be read, which the next look at the request knows."""
        encoded, lost = [], False
        for sample in request.index.tolist():
            try:
                encoded.append(self._check.encoded(sample))
            except BetonError as error:
                self._check.lost(sample, error)
                lost = True
        return None if lost else encoded

    def _feed(self) -> list:
        """DALI asks for its next batch, in the thread that called ``run``: the pictures, then each view's box."""
        if not self._drawn:
            raise StopIteration
        request, encoded = self.deadline.result(self._drawn[0], lambda: "while a batch was to begin")
        self._drawn.popleft()
        self._draw_ahead()
        self._fed.append(request)
        inputs: list = [encoded]
        for plan in request.plans:
            for view in plan:
                start = np.stack([view["top"], view["left"]], axis=1).astype(np.int32)
                size = np.stack([view["height"], view["width"]], axis=1).astype(np.int32)
                inputs += [start, start + size, view["flip"].astype(np.int32)]
        return inputs

    def _largest(self) -> list[int]:
        """(height, width) that nvJPEG is to have memory for: else it takes it anew at each picture that is larger than
        those before. It may do so for every picture of a batch: 2 GiB in all, then.
        """
        largest = np.array([lengths.max() for lengths in self.reader.shapes(self.reader.some())], np.int64)
        fits = 2**31 / (3 * self.settings.batch_size * largest.prod())
        return (largest * min(1.0, fits**0.5)).astype(np.int64).tolist()

    def _build(self) -> Any:
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.backend import GetSchema

        gpu = self.device.type == "cuda"
        filters = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
        total = sum(spec.count for spec in self.specs)

        @pipeline_def(
            batch_size=self.settings.batch_size,
            num_threads=self.workers,
            device_id=self.device.index if gpu else None,
            prefetch_queue_depth=self.ahead,
        )
        def graph() -> tuple:
            encoded, *boxes = fn.external_source(
                source=self._feed,
                num_outputs=1 + 3 * total,
                batch=True,
                dtype=[types.UINT8] + [types.INT32] * (3 * total),
                ndim=[1] + [1, 1, 0] * total,
            )
            # The slow, smooth chroma upsampling is what libjpeg does in the other engines.
            options: dict[str, Any] = {"output_type": types.RGB, "jpeg_fancy_upsampling": True}
            if GetSchema("decoders__Image").HasArgument("adjust_orientation"):
                # DALI 2 turns by EXIF unasked; the converter has done it, other engines never do.
                options["adjust_orientation"] = False
            if gpu:
                options |= dict(zip(("preallocate_height_hint", "preallocate_width_hint"), self._largest()))
            pictures = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", **options)
            outputs = []
            every_view = [spec for spec in self.specs for _ in range(spec.count)]
            for spec, start, end, flip in zip(every_view, boxes[0::3], boxes[1::3], boxes[2::3]):
                # Cut first, resize then: with `roi_start` the filter would reach for pixels outside the box.
                crop, kind = fn.slice(pictures, start=start, end=end, axes=[0, 1]), filters[spec.interpolation]
                view = fn.resize(crop, size=[spec.size, spec.size], interp_type=kind, antialias=True)
                outputs.append(fn.flip(view, horizontal=flip))
            return tuple(outputs)

        pipeline = graph()
        pipeline.build()
        return pipeline
