"""A call on tensors that is recorded once and then replayed: a CUDA graph with fixed places for what changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastssl.methods.base import Rates
from fastssl.utils.transfer import to_device

#: Runs before the recording, as PyTorch asks for: libraries choose their kernels and allocate their workspaces in them.
WARM_UP_RUNS = 3

#: Takes a call without arguments; returns what replays it, and the tensor that each replay fills.
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def record_cuda_graph(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record ``call`` as a CUDA graph. The decoding threads may go on with copies of their own meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call()
    return graph.replay, result


class StepInputs(NamedTuple):
    """What a training step is called with.

    Attributes:
        views: as ``ViewLoader`` gives them.
        noise: what is drawn for the step, by name.
        rates: what the schedules say, by name: numbers and switches.
        tables: the colour tables that belong to uint8 crops; none: ``views`` are coloured and normalised.
    """

    views: Sequence[Tensor]
    noise: Mapping[str, Tensor]
    rates: Rates
    tables: Sequence[Tensor]

    def switches(self) -> dict[str, bool]:
        """Those of ``rates`` that are no numbers."""
        return {name: value for name, value in self.rates.items() if isinstance(value, bool)}


class RecordedStep:
    """A step recorded with inputs of these shapes; calling it copies new inputs into their places and replays.

    Its inputs are laid out flat here, so that the step itself reads as if nothing were recorded. What the schedules say
    is an input like any other: a recorded number would stay what it was. Switches are recorded as they are.

    Args:
        step: the step, run eagerly; returns its metrics, changes whatever it likes on the device. It must not read a
            value back.
        inputs: of its first call; all later ones have the same shapes, types and layout.
        undo: called after the warm-up runs, which change the state as any run does; puts it back as it was.
        record: how; another one than CUDA's serves tests.

    Raises:
        RuntimeError: the step cannot be recorded (by CUDA: it waits for the device, which the last warm-up run finds
            out, or allocates outside torch).
    """

    def __init__(
        self,
        step: Callable[[StepInputs], Tensor],
        inputs: StepInputs,
        *,
        undo: Callable[[], None],
        record: Recorder = record_cuda_graph,
    ):
        switches = inputs.switches()
        self._numbers = numbers = [name for name in inputs.rates if name not in switches]
        names, first, last = list(inputs.noise), len(inputs.views), len(inputs.views) + len(inputs.tables)
        # The layout stays, channels-last too.
        self._places = places = [torch.empty_like(tensor).copy_(tensor) for tensor in self._flat(inputs)]

        def call() -> Tensor:
            rates, rest = dict(zip(numbers, places[0].unbind())), places[1:]
            noise = dict(zip(names, rest[last:]))
            return step(StepInputs(rest[:first], noise, {**rates, **switches}, rest[first:last]))

        try:
            with _side_stream(places):
                for _ in range(WARM_UP_RUNS - 1):
                    call()
                with _no_waiting(places):
                    call()
        finally:
            undo()
        self._replay, self._result = record(call)

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Replay with ``inputs``. The result's memory is written again by the next replay."""
        for place, tensor in zip(self._places, self._flat(inputs), strict=True):
            if place.shape != tensor.shape or place.dtype != tensor.dtype:
                raise ValueError(
                    f"recorded with {tuple(place.shape)} {place.dtype}, called with {tuple(tensor.shape)} "
                    f"{tensor.dtype}: a graph takes one shape"
                )
            place.copy_(tensor)
        self._replay()
        return self._result

    def close(self) -> None:
        """Let go of the recording, also where a traceback still holds this object. It cannot be called any more."""
        del self._replay, self._result

    def _flat(self, inputs: StepInputs) -> list[Tensor]:
        numbers = np.array([inputs.rates[name] for name in self._numbers], np.float32)
        return [to_device(numbers, inputs.views[0].device), *inputs.views, *inputs.tables, *inputs.noise.values()]


def _on_gpu(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors)


@contextmanager
def _no_waiting(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Whatever makes the host wait for the device raises RuntimeError. Nothing on a CPU.

    A recording would fail at it, too, but in torch before 2.12 its memory would stay taken, and of all memory that two
    streams share nothing would be free again: the run without a graph would end for want of memory.
    """
    if not _on_gpu(tensors):
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once a process torch says that it may overlook some
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _side_stream(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Warm-up on a stream of its own, which both waits for and is waited for by the present one. Nothing on a CPU."""
    if not _on_gpu(tensors):
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream().wait_stream(stream)
