"""Engines that render a whole batch in one call: in a thread of their own, some batches ahead of the consumer."""

from __future__ import annotations

import itertools
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext

import torch
from torch import Tensor

from fastssl.errors import at_work_on
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.base import (
    Engine,
    EngineSettings,
    Rendered,
    Request,
    batch_name,
    take_over,
    thread_initializer,
)
from fastssl.pipelines.engines.damaged import SampleCheck
from fastssl.pipelines.plan.draw import ViewSpec


class AheadEngine(Engine):
    """What is left to an engine is `_views`. For a GPU the thread works on a stream beside the one that computes."""

    def __init__(self, reader: BetonReader, specs: Sequence[ViewSpec], settings: EngineSettings):
        super().__init__(reader, specs, settings)
        self._check = SampleCheck(reader, self.on_bad, self.stats, self._threads(self.workers, f"{self.name}-check"))
        at_device = thread_initializer(self.device)
        self._renderer = self._threads(1, self.name, lambda: (at_device(), self._begin_thread())[1])
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _begin_thread(self) -> None:
        """What the rendering thread calls first."""

    @abstractmethod
    def _views(self, request: Request) -> list[Tensor]:
        """The views of ``Rendered``, on memory that nobody writes to again; may replace lost samples of ``request``."""

    def _run(self, requests: Iterator[Callable[[], Request]]) -> Generator[Rendered, None, None]:
        pending: deque[Future[tuple[Rendered, torch.cuda.Event | None, float]]] = deque()

        def fill() -> None:
            for draw in itertools.islice(requests, self.ahead + 1 - len(pending)):
                pending.append(self._renderer.submit(self._render, draw))

        try:
            fill()
            while pending:
                started = time.perf_counter()
                rendered, made, cpu = self.deadline.result(pending[0], lambda: "while a batch was to come")
                if made is not None:
                    take_over(rendered.views, made, self.device)
                self.stats.wait_s += time.perf_counter() - started
                self.stats.samples += len(rendered.request.index)
                self.stats.host_cpu_s += cpu
                pending.popleft()
                fill()
                yield rendered
        finally:
            self.deadline.settled(pending)

    def _render(self, draw: Callable[[], Request]) -> tuple[Rendered, torch.cuda.Event | None, float]:
        """A batch, when it is there, and the CPU seconds of it."""
        cpu = time.thread_time()
        with at_work_on(self.reader.path, "drawing the views of a batch"):
            request = self._check(draw())
        with (
            at_work_on(self.reader.path, batch_name(request)),
            torch.cuda.stream(self._stream) if self._stream else nullcontext(),
        ):
            rendered = Rendered(request, self._views(request))
            made = self._stream.record_event() if self._stream else None
        return rendered, made, time.thread_time() - cpu
