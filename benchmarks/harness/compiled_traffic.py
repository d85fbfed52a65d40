"""Launches and bytes of what `torch.compile` makes for a GPU that need not be there.

Inductor goes its whole way (graph, decompositions, what the backward pass keeps and what it computes again, fusion)
but for the code of the kernels. Each kernel that it would write is a launch, whose inputs and outputs Inductor itself
counts; what stays a kernel of torch (convolutions, products) is counted as `traffic` does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor import compile_fx, config, scheduler
from torch.utils._python_dispatch import _pop_mode_temporarily

from fastssl.benchmarks.harness.traffic import Counter, Traffic, traffic

#: What Inductor would run on the GPU to decide, or keep on the disk.
_NOTHING_TRIED = {"shape_padding": False, "joint_graph_constant_folding": False, "force_disable_caches": True}


class _Scheduled(BaseException):
    """The way out of Inductor before it writes kernels; no ``Exception``, as it would be taken for a failure."""

    def __init__(self, total: Traffic):
        self.total = total


def _leave(schedule: scheduler.Scheduler) -> None:
    kernels = [one for node in schedule.nodes if (one := _of_node(node)).launches]
    raise _Scheduled(Traffic(sum(one.launches for one in kernels), sum(one.bytes for one in kernels)))


@contextmanager
def counting_compile(counter: Counter) -> Iterator[None]:
    """While it is entered, what `torch.compile` makes counts for ``counter``, whatever backend it is meant for."""
    real = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: Any, *, options: Any = None) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=counted_graph, config_patches=options)

    def counted_graph(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        plain = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))  # Inductor changes its own
        total = Traffic(0, 0)
        try:
            with counter.paused(), patch.object(scheduler.Scheduler, "codegen", _leave):
                compile_fx.compile_fx_inner(graph, inputs, **options)
        except _Scheduled as scheduled:
            total = scheduled.total

        def run(args: list[Any]) -> Any:
            with counter.paused():
                result = plain(*args)
            args.clear()
            counter.add(total, result)
            return result

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    @wraps(real)
    def compiled(model: Any = None, **options: Any) -> Any:
        if model is None:
            return partial(compiled, **options)
        function = real(model, **{**options, "backend": backend, "mode": None, "dynamic": False})

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with counter.paused(), _pop_mode_temporarily():  # within its mode torch.compile would compile nothing
                return function(*args, **kwargs)

        return call

    with (
        patch.object(torch, "compile", compiled),
        patch.object(scheduler, "has_triton", lambda **_: True),
        patch.object(compile_fx, "_check_triton_bf16_support", lambda graph: None),
        config.patch(_NOTHING_TRIED),
        # Each size is counted, also of what is compiled once for all sizes.
        torch._dynamo.config.patch(cache_size_limit=1000, accumulated_cache_size_limit=10000),
    ):
        yield


def _of_node(node: Any) -> Traffic:
    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return Traffic(0, 0)
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        kernel: Any = node.node
        origin = kernel.get_origin_node()
        if type(kernel).__name__ == "MultiOutput":
            return Traffic(0, 0)
        if origin is not None and isinstance(origin.target, torch._ops.OpOverload):
            args, kwargs, result = torch.fx.node.map_arg(
                (origin.args, origin.kwargs, origin), lambda one: one.meta.get("val", one)
            )
            return traffic(origin.target, args, kwargs, result)
    return Traffic(1, node.get_read_write_buffers_sizes())
