"""Launches, and bytes read and written, of what runs on a GPU that need not be there; counted, not measured.

An operator is one launch that reads each input and writes each output once. More are those that torch's CUDA kernels
make more of: a convolution's bias, BatchNorm (statistics, then the maps once more), a convolution's gradients (of input
and of weights), sorting, and lists of tensors, which go in chunks. Views are none. What a cache spares is not known:
the bytes are those of a memory without one, and the least for the operators as they are written.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Tensors that a launch of torch's list kernels takes, by the number of lists.
_LIST_DEPTH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_WRITE_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_"}
_NOTHING = {"detach", "lift_fresh", "lift_fresh_copy", "set_", "record_stream", "device", "empty", "new_empty"}


class Traffic(NamedTuple):
    """Kernels that run, and what they read and write."""

    launches: int
    bytes: int


def distinct_bytes(tensor: Tensor) -> int:
    """Of what is read of a tensor: an expanded one has fewer numbers than its shape says."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride()):
        count *= size if stride else min(size, 1)
    return count


def tensors_of(*values: Any) -> list[Tensor]:
    """All tensors among ``values``, and in lists and dicts among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple, dict)):
            found += tensors_of(*(value.values() if isinstance(value, dict) else value))
    return found


def traffic(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Traffic:
    """Of one call of an ATen operator."""
    name, size = func._schema.name.split("::")[1], distinct_bytes
    ins, outs = tensors_of(args, kwargs), tensors_of(result)
    if name in _NOTHING or name.startswith(("empty_", "new_empty_")):
        return Traffic(0, 0)
    match name:
        case "convolution":
            bias = 2 * size(outs[0]) + size(args[2]) if args[2] is not None else 0
            return Traffic(1 + bool(bias), size(args[0]) + size(args[1]) + size(outs[0]) + bias)
        case "convolution_backward":
            of_input, of_weight, of_bias = args[10]
            grad, whole = size(args[0]), sum(map(size, args[:3]))
            return Traffic(of_input + of_weight + of_bias, (of_input + of_weight) * whole + of_bias * grad)
    if name.startswith(("_foreach", "_fused")):
        return _of_lists(name, args, outs)
    if "batch_norm" in name and "stats" not in name:
        maps = size(args[0])
        if "backward" in name:
            return Traffic(2, 5 * maps)
        return Traffic(3, 3 * maps) if True in args[5:6] or "legit" in name else Traffic(1, 2 * maps)
    changed = _changed(func, args, kwargs)
    if outs and not changed and all(_storage(out) in map(_storage, ins) for out in outs):
        return Traffic(0, 0)
    read, written = sum(map(size, ins)), sum(map(size, changed or outs))
    if name in _WRITE_ONLY or func._overloadname in ("out", "grad_input"):
        read -= sum(map(size, changed))
    match name:
        case "index_select" | "gather":
            read = size(args[2]) + size(outs[0])
        case "index_copy_" | "scatter_":
            read, written = size(args[2]) + size(args[-1]), size(args[-1])
    return Traffic(4 if name in ("sort", "topk") else 1, read + written)


def _storage(tensor: Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number


def _changed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Inputs that are written, by the operator's schema."""
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args)} | kwargs
    writes = [one.name for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    return tensors_of([named.get(name) for name in writes])


def _of_lists(name: str, args: Sequence[Any], outs: list[Tensor]) -> Traffic:
    lists = [one for one in args if isinstance(one, (list, tuple)) and one and isinstance(one[0], Tensor)]
    sizes = [sum(map(distinct_bytes, one)) for one in lists]
    if name.startswith("_fused_sgd"):  # parameters, gradients, momentum
        moved = sum(sizes) + sum(sizes) - sizes[1]
    elif name.startswith("_fused_adam"):  # parameters, gradients, two moments, counters
        moved = sum(sizes) + sizes[0] + sum(sizes[2:])
    elif "copy" in name:
        moved = sum(sizes)
    else:
        moved = sum(sizes) + (sizes[0] if name.endswith("_") else sum(map(distinct_bytes, outs)))
    depth = _LIST_DEPTH.get(len(lists) + (not name.endswith("_")), 30)
    chunks = sum(-(-tensor.numel() // 65536) for tensor in lists[0])
    return Traffic(max(-(-len(lists[0]) // depth), -(-chunks // 320)), moved)


@dataclass
class Part:
    """What was counted of a part of a step.

    Attributes:
        launches, bytes: see `Traffic`. kept: bytes alive behind it that were not before it.
    """

    launches: int = 0
    bytes: int = 0
    kept: int = 0


class Counter(TorchDispatchMode):
    """Counts what runs on the GPU while it is entered, by part, and the memory that is alive.

    Attributes:
        parts: by name, in the order in which they began. operators: calls by name of operator.
        alive, peak: bytes of tensors on the GPU, now and at most; inside compiled functions only their results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Part] = {}
        self.operators: dict[str, int] = {}
        self.alive = self.peak = 0
        self._names, self._paused = ["rest"], 0
        self._known: set[int] = set()

    def reset(self) -> None:
        """Forget what was counted; what is alive stays known."""
        self.parts, self.operators, self.peak = {}, {}, self.alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        space, name = func._schema.name.split("::")
        if space == "prim" or self._paused:
            return result
        if any(tensor.is_cuda for tensor in tensors_of(result, args, kwargs)):
            self.operators[name] = self.operators.get(name, 0) + 1
            self.add(traffic(func, args, kwargs, result), result)
        return result

    def add(self, found: Traffic, result: Any) -> None:
        """Count something that ran, and gave ``result``."""
        part = self.parts.setdefault(self._names[-1], Part())
        part.launches += found.launches
        part.bytes += found.bytes
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known and tensor.is_cuda:
                self._known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.alive)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is counted."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def named(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, as a part of this name; within another part it is none of that."""

        @wraps(call)
        def part(*args: Any, **options: Any) -> Any:
            before = self.alive
            self._names.append(name)
            try:
                return call(*args, **options)
            finally:
                self._names.pop()
                self.parts.setdefault(name, Part()).kept += self.alive - before
                self.parts.setdefault(self._names[-1], Part()).kept -= self.alive - before

        return part
