"""An NVIDIA GPU that is not there: every tensor has shape, type, layout and device, and no content.

What would make the host wait for the GPU raises (it asks for a value), and so does what mixes devices. Nothing that is
computed here can be believed but shapes, and what ran. torch's own FakeTensorMode does most of it; what it lacks where
there is no driver, and what a Hopper GPU would choose, is put in its place for as long as the mode lasts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_impls import register_op_impl
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

import fastssl.training.networks as networks_module
from fastssl.benchmarks.harness.python_backward import releasing_what_was_read, run_backward
from fastssl.errors import FastSSLError

#: What Inductor asks of a GPU: an H100's figures.
HOPPER = SimpleNamespace(
    name="a Hopper GPU that is not there",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 10**9,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=227 << 10,
    warp_size=32,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


def why_not() -> str:
    """Why this torch can have none; empty: it can."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA: a GPU can be counted with PyPI's torch"
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        return f"torch {torch.__version__} asks the driver where there is none: a GPU can be counted with torch 2.10"
    return ""


@contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """The device, for as long as the context lasts. Of one thread, and to be entered once.

    Raises:
        FastSSLError: see `why_not`.
    """
    if reason := why_not():
        raise FastSSLError(reason)
    forget_caches()
    with ExitStack() as stack:
        for owner, name, value in _replacements():
            stack.enter_context(patch.object(owner, name, value, create=True))
        stack.enter_context(releasing_what_was_read())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.callback(forget_caches)
        yield torch.device("cuda")


def forget_caches() -> None:
    """Of ours: constants and compiled functions of a device, which would outlive the fake one."""
    for name, module in list(sys.modules.items()):
        for value in list(vars(module).values()) if name.startswith("fastssl.") else ():
            if callable(clear := getattr(value, "cache_clear", None)):
                clear()


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    yield FakeTensor, "__deepcopy__", _deepcopy  # torch's copies the whole mode with each tensor
    yield nn.Module, "_apply", _apply
    yield Tensor, "pin_memory", lambda self, device=None: self
    yield torch.autograd, "_engine_run_backward", run_backward
    yield torch._C, "_current_graph_task_id", lambda: 0  # checkpointing keeps what it computes again by this number
    yield torch._C, "_select_conv_backend", lambda *args, **options: torch._C._ConvBackend.Cudnn  # type: ignore[attr-defined]
    yield torch.cuda.amp.common, "amp_definitely_not_available", lambda: False
    yield torch.cuda, "is_bf16_supported", lambda *args, **options: True
    yield torch.cuda, "_lazy_init", lambda: None
    yield torch.cuda, "_get_device_properties", lambda device: HOPPER
    for name, value in {"device_count": 1, "current_device": 0, "get_device_capability": (9, 0)}.items():
        yield torch.cuda, name, lambda *args, value=value: value
    yield torch.cuda, "get_rng_state", lambda *args: torch.zeros(16, dtype=torch.uint8)
    yield torch.cuda, "set_rng_state", lambda *args: None
    yield nn.init, "trunc_normal_", lambda tensor, *args, **options: tensor  # looks at values; there are none to draw
    for name in ("create_backbone", "load_teacher"):
        yield networks_module, name, _without_content(getattr(networks_module, name))


def _without_content(create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Values are looked at while a network is made or read: it has real numbers, which are then forgotten."""

    def made(*args: Any, **options: Any) -> nn.Module:
        with unset_fake_temporarily():
            network = create(*args, **options)
        for module in network.modules():
            kinds: tuple[dict[str, Any], ...] = module._parameters, module._buffers
            for kind in kinds:
                for name, real in kind.items():
                    if real is not None:
                        empty = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype)
                        kind[name] = nn.Parameter(empty, real.requires_grad) if kind is module._parameters else empty
        return network

    return made


def _deepcopy(self: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(self) not in memo:
        copy = self.detach().clone(memory_format=torch.preserve_format)
        memo[id(self)] = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
    found: Tensor = memo[id(self)]
    return found


def _apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module.to` and its like: as on a real device, each tensor stays the object that it is."""
    for module in self.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if isinstance(tensor, FakeTensor):
                new = function(tensor.detach())
                tensor.data, tensor.fake_device, tensor.constant = new, new.fake_device, None  # type: ignore[attr-defined]
    return self


_OPTIMISERS = torch.ops.aten._fused_sgd_, torch.ops.aten._fused_adamw_


@register_op_impl([getattr(one, how) for one in _OPTIMISERS for how in ("default", "tensor_lr")])
def _fused_optimiser(mode: FakeTensorMode, func: Any, *lists: list[Tensor], **options: Any) -> None:
    """Refuses what the CUDA kernels refuse, and a CPU's do not look at."""
    for tensors in zip(*(one for one in lists[:4] if one)):  # parameters, gradients, moments
        kinds = {(t.device, t.dtype, tuple(s for s, n in zip(t.stride(), t.shape) if n > 1)) for t in tensors}
        if len(kinds) > 1:
            raise RuntimeError(f"{func}: parameter, gradient and state differ: {sorted(map(str, kinds))}")
