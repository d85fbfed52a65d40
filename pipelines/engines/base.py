"""What every engine promises: encoded pictures and a view plan in, uint8 views out.

An engine is a pure function of (bytes, plan). It never draws a random number, so any two engines render the same
request to the same pixels within rounding, and a run can change its engine without changing its experiment.
"""

from __future__ import annotations

import inspect
import operator
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastssl.errors import FastSSLError
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.utils.cores import available_cores
from fastssl.utils.deadline import STALL_MINUTES, Deadline

#: The engines, and who chooses one.
PIPELINES = ("auto", "native", "dali", "ffcv", "torchcodec")
_CHOICES = {"pipeline": PIPELINES, "crops": ("auto", "host", "device"), "on_bad": ("fail", "skip")}


@dataclass(frozen=True)
class EngineSettings:
    """Where and how batches are rendered; whatever it says, the pixels are the same. ``FastSSLError``: a value that
    does not exist.

    Attributes:
        device: where the views are wanted. batch_size: most samples of a request.
        pipeline: the engine, one of PIPELINES; ``auto``: see ``choose_engine``.
        workers: decoding threads; as many as this process may use cores.
        crops: ``host`` cuts views on the decoding threads, ``device`` on the device from the decoded pictures;
            ``auto`` takes the device when it is a GPU. For ``native`` only, the other engines have one way.
        on_bad: ``fail`` raises at the first damaged picture; ``skip`` puts another sample of the batch in its place and
            goes on.
        stall_minutes: how long a batch is waited for; a warning comes after the first minute, ``Stalled`` at the end.
            ``math.inf``: forever.
    """

    device: torch.device
    batch_size: int
    pipeline: str = "auto"
    workers: int = field(default_factory=available_cores)
    crops: str = "auto"
    on_bad: str = "fail"
    stall_minutes: float = STALL_MINUTES

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise FastSSLError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        for name in ("batch_size", "workers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise FastSSLError(f"{name} must be a whole number of at least 1, got {value!r}")
            object.__setattr__(self, name, operator.index(value))  # of NumPy's, too


def checked_device(device: str | torch.device) -> torch.device:
    """``device`` as torch's own, ``cuda`` as the GPU that is current now; ``FastSSLError``: it is none, or not here."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise FastSSLError(f"device={device!r} is not a device of torch (cpu, cuda, cuda:1)") from error
    if found.type != "cuda":
        return found
    if not torch.cuda.is_available():
        raise FastSSLError(f"device={device!r}: torch sees no NVIDIA GPU here; `fastssl doctor` says what is missing")
    return found if found.index is not None else torch.device("cuda", torch.cuda.current_device())


@dataclass
class Request:
    """One batch to be rendered.

    Attributes:
        index: (B,) int64 sample ids.
        plans: one ``(count, B)`` array of ``VIEW_DTYPE`` for each view group.
        first, total: where in the batch of all processes the B samples stand, and how many samples that has; None: B.
        draw: what all processes together are asked for, at one of its places; needed where ``total`` is more than B.
    """

    index: np.ndarray
    plans: list[np.ndarray]
    first: int = 0
    total: int | None = None
    draw: Callable[[int], Request] | None = None


def batch_name(request: Request) -> str:
    """What a message calls a batch."""
    return f"at the batch that begins with samples {', '.join(map(str, request.index[:3].tolist()))}"


def thread_initializer(device: torch.device) -> Callable[[], None]:
    """What a thread that will talk to ``device`` calls first; to be made in the thread that starts it.

    To CUDA a new thread is at GPU 0, whatever its parent is at: its first call makes a context there, half a gigabyte
    for every process of the machine.
    """
    if device.type != "cuda":
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device() if device.index is None else device.index)


@dataclass
class Rendered:
    """A request with its pictures. The views are valid until the next one is taken from the engine.

    Attributes:
        request: as rendered: where a damaged sample was skipped, its place names the sample that took it.
        views: one (count * B, 3, S, S) uint8 channels-last tensor for each group, view-major, on the loader's device.
    """

    request: Request
    views: list[Tensor]


@dataclass
class EngineStats:
    """What the host spent, summed since the engine was opened (or since ``reset``).

    Attributes:
        samples: pictures decoded. host_cpu_s: CPU seconds of the worker threads (decode, host crops, plan).
        wait_s: seconds for which the consumer stood waiting for a batch. colour_s: seconds that it then spent on its
            colours. consumer_cpu_s: CPU seconds of the consumer's own thread in the loader.
        skipped: ids of damaged samples that were passed over, in the order met.
    """

    samples: int = 0
    host_cpu_s: float = 0.0
    wait_s: float = 0.0
    colour_s: float = 0.0
    consumer_cpu_s: float = 0.0
    skipped: list[int] = field(default_factory=list)

    def reset(self) -> None:
        """Start counting from zero (``skipped`` is a record of the data, not of time: it stays)."""
        self.samples = 0
        self.host_cpu_s = self.wait_s = self.colour_s = self.consumer_cpu_s = 0.0


class Engine(ABC):
    """Renders requests in order, some way ahead of the consumer; one epoch at a time. Does not close ``reader``.

    Attributes:
        name: what ``--pipeline`` calls it. ahead: batches rendered ahead of the consumer.
        deadline: with which the consumer waits for batches.
    """

    name: str
    ahead = 3
    _epoch: weakref.ref[Generator[Rendered, None, None]] | None = None
    _closed = False

    def __init__(self, reader: BetonReader, specs: Sequence[ViewSpec], settings: EngineSettings):
        self.reader, self.specs, self.settings = reader, list(specs), settings
        self.device, self.workers, self.on_bad = settings.device, settings.workers, settings.on_bad
        self.stats, self.deadline = EngineStats(), Deadline(reader.path, settings.stall_minutes)
        self._pools: list[ThreadPoolExecutor] = []

    def _threads(self, number: int, name: str, begin: Callable[[], None] = lambda: None) -> ThreadPoolExecutor:
        """Threads that ``close`` joins; each calls ``begin`` first."""
        pool = ThreadPoolExecutor(number, f"fastssl-{name}", begin)
        self._pools.append(pool)
        return pool

    def run(self, requests: Iterator[Callable[[], Request]]) -> Generator[Rendered, None, None]:
        """Render one after the other. Requests come as callables, so that drawing the plan is the workers' job too;
        closing the iterator stops what was begun ahead.

        Raises:
            FastSSLError: the engine is closed, or its last epoch is still running. While iterating, also: a damaged
                picture (unless skipped), ``WorkerError`` for what went wrong in a thread, ``Stalled``.
        """
        if self._closed:
            raise FastSSLError("this loader is closed; open a new ViewLoader")
        if self.deadline.given_up:  # they may still write into buffers that a new epoch would use
            path = self.reader.path
            raise FastSSLError(f"{path}: threads of this loader still wait for the disk; open a new ViewLoader")
        # The buffers have one consumer. An epoch that was left by `break` is gone with its last reference, hence the
        # weak one here.
        if self._unfinished() is not None:
            raise FastSSLError(
                "an epoch of this loader is still running: finish it or close() its iterator first, or open a "
                "second loader"
            )
        iterator = self._run(requests)
        self._epoch = weakref.ref(iterator)
        return iterator

    def close(self) -> None:
        """Stop a running epoch, join all threads but those that were given up, free all buffers."""
        self._closed = True
        if (iterator := self._unfinished()) is not None:
            iterator.close()
        for pool in self._pools:
            pool.shutdown(wait=not self.deadline.given_up, cancel_futures=True)
        self._free()

    def _unfinished(self) -> Generator[Rendered, None, None] | None:
        iterator = self._epoch() if self._epoch else None
        return iterator if iterator is not None and inspect.getgeneratorstate(iterator) != inspect.GEN_CLOSED else None

    @abstractmethod
    def _run(self, requests: Iterator[Callable[[], Request]]) -> Generator[Rendered, None, None]: ...

    def _free(self) -> None:
        """Let go of what takes memory."""
        self._pools.clear()
