"""A GPU that is none: torch's fake tensors on ``cuda``, which have shapes and no values, beside real pictures, threads
and decoders on the host.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastssl.benchmarks.harness.fake_cuda import why_not


class FakeEvent:
    """To wait for it costs a worker time; the thread that trains must not."""

    spinning: ClassVar[list[bool]] = []

    def __init__(self, blocking: bool = False):
        self.spinning.append(not blocking)

    def record(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        assert threading.current_thread() is not threading.main_thread(), "the host waits for the GPU"


class FakeStream:
    def __init__(self, device: torch.device | None = None): ...

    def wait_event(self, event: FakeEvent) -> None: ...

    def record_event(self) -> FakeEvent:
        return FakeEvent(blocking=True)

    def synchronize(self) -> None:
        raise AssertionError("the host waits for the GPU")


class Crossings(TorchDispatchMode):
    """What goes from one device to another: ``bytes`` to the GPU. To read from it is an error, and where ``strict``
    also to copy from memory that is not pinned, or in a way that waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.bytes, self.strict = 0, True
        self.lock = threading.RLock()  # fake tensors are for one thread at a time

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned.add(tensor.untyped_storage()._cdata)
        self.kept = [*getattr(self, "kept", []), tensor]  # or its place in memory would be another's
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self.lock:
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func, args, kwargs):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if torch.device(kwargs.get("device") or "cpu").type == "cuda" and len(given) == 1:
            args = (self.fakes.from_tensor(given[0]), *args[1:])  # what is real would be moved for real
        made = func(*args, **kwargs)
        there = {leaf.device.type for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)}
        if there == {"cpu"}:
            assert all(tensor.device.type == "cpu" for tensor in given), f"{func} brings a tensor back to the host"
            if func.is_view and given[0].untyped_storage()._cdata in self.pinned:
                tree_map_only(torch.Tensor, self.pin, made)  # a fake tensor, whose storage is another
        for tensor in given if "cuda" in there else ():
            if tensor.device.type == "cpu" and tensor.dim() and self.strict:
                non_blocking = kwargs.get("non_blocking") if "_to_copy" in str(func) else args[-1] is True
                assert non_blocking, f"{func} of {tuple(tensor.shape)} waits for its copy"
                assert tensor.untyped_storage()._cdata in self.pinned, f"{func} of {tuple(tensor.shape)}: not pinned"
                self.bytes += tensor.nbytes
        return made


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch, current: int = 0) -> Iterator[Crossings]:
    """A machine whose GPU ``current`` is the current one; for other threads, what is moved to it."""
    if reason := why_not():
        pytest.skip(reason)
    torch._C._ensureCUDADeviceGuardSet()
    crossings, empty, move = Crossings(), torch.empty, torch.Tensor.to
    here = threading.current_thread()

    def pinned_empty(*shape, pin_memory: bool = False, **options):
        if not pin_memory:
            return empty(*shape, **options)
        with unset_fake_temporarily():
            return crossings.pin(empty(*shape, **options))

    def to(tensor: torch.Tensor, *args, **options) -> torch.Tensor:
        if threading.current_thread() is here or torch.device("cuda", current) not in args:
            return move(tensor, *args, **options)
        with crossings.fakes, crossings:
            return move(tensor, *args, **options)

    @contextmanager
    def stream(entered: object) -> Iterator[None]:
        yield

    FakeEvent.spinning.clear()
    monkeypatch.setattr(torch, "empty", pinned_empty)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: crossings.pin(tensor))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, reader: None)
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: current,
        "set_device": lambda device: None,
        "Event": FakeEvent,
        "Stream": FakeStream,
        "stream": stream,
        "current_stream": FakeStream,
        "get_device_capability": lambda device=None: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # a tensor made from numbers needs no context of CUDA
    try:
        with crossings.fakes, crossings:
            yield crossings
    finally:  # constants that were made here are of no use elsewhere
        torch._C._set_only_lift_cpu_tensors(lifted)
        for name, module in list(sys.modules.items()):
            for value in vars(module).values() if name.startswith("fastssl.pipelines.") else ():
                getattr(value, "cache_clear", int)()
