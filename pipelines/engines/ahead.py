"""Engines that render a whole batch in one call: in threads of their own, some batches ahead of the consumer."""

from __future__ import annotations

import itertools
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from fastssl.errors import BetonError, at_work_on
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.base import Engine, EngineSettings, Rendered, Request, batch_name, thread_initializer
from fastssl.pipelines.engines.damaged import SampleCheck
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.utils.transfer import take_over

_Drawn = tuple[Request, list[np.ndarray], float]
_Made = tuple[Rendered, torch.cuda.Event | None, float]


class AheadEngine(Engine):
    """One thread draws, looks at samples that were not seen before, and reads; another one renders, for a GPU on a
    stream beside the one that computes. What is left to an engine is `_views`.
    """

    #: Whether `_views` is given the encoded pictures.
    reads = True

    def __init__(self, reader: BetonReader, specs: Sequence[ViewSpec], settings: EngineSettings):
        super().__init__(reader, specs, settings)
        self._check = SampleCheck(reader, self.on_bad, self.stats, self._threads(self.workers, f"{self.name}-check"))
        self._drawer = self._threads(1, f"{self.name}-plan")
        self._renderer = self._threads(1, self.name, thread_initializer(self.device))
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @abstractmethod
    def _views(self, request: Request, encoded: list[np.ndarray]) -> list[Tensor]:
        """As in ``Rendered``, on memory that nobody writes to again. ``encoded``: the bytes of each picture."""

    def _run(self, requests: Iterator[Callable[[], Request]]) -> Generator[Rendered, None, None]:
        pending: deque[tuple[Future[_Drawn], Future[_Made]]] = deque()

        def fill() -> None:
            for draw in itertools.islice(requests, self.ahead + 1 - len(pending)):
                drawn = self._drawer.submit(self._draw, draw)
                pending.append((drawn, self._renderer.submit(self._render, drawn)))

        try:
            fill()
            while pending:
                started = time.perf_counter()
                self.deadline.result(pending[0][0], lambda: "while a batch was to begin")
                rendered, made, cpu = self.deadline.result(pending[0][1], lambda: "while a batch was to come")
                if made is not None:
                    take_over(rendered.views, made, self.device)
                self.stats.wait_s += time.perf_counter() - started
                self.stats.samples += len(rendered.request.index)
                self.stats.host_cpu_s += cpu
                pending.popleft()
                fill()
                yield rendered
        finally:
            self.deadline.settled([future for both in pending for future in both])

    def _draw(self, draw: Callable[[], Request]) -> _Drawn:
        """A request without damaged samples, its bytes, and the CPU seconds of both."""
        cpu = time.thread_time()
        with at_work_on(self.reader.path, "drawing the views of a batch"):
            request = self._check(draw())
            while (encoded := self._read(request)) is None:
                request = self._check(request)
        return request, encoded, time.thread_time() - cpu

    def _read(self, request: Request) -> list[np.ndarray] | None:
        """The bytes of its samples; None where some can no longer be read, which the next look at the request knows."""
        encoded, lost = [], False
        for sample in request.index.tolist() if self.reads else ():
            try:
                encoded.append(self._check.encoded(sample))
            except BetonError as error:
                self._check.lost(sample, error)
                lost = True
        return None if lost else encoded

    def _render(self, drawn: Future[_Drawn]) -> _Made:
        """A batch, when its views are there, and the CPU seconds of it."""
        request, encoded, drawing = drawn.result()
        cpu = time.thread_time()
        with (
            at_work_on(self.reader.path, batch_name(request)),
            torch.cuda.stream(self._stream) if self._stream else nullcontext(),
        ):
            rendered = Rendered(request, self._views(request, encoded))
            made = self._stream.record_event() if self._stream else None
        return rendered, made, drawing + time.thread_time() - cpu
