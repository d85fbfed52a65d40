"""Blocks that keep their input alone for the backward pass, and compute what is inside again when it is needed.

Activation checkpointing (Chen et al., arXiv 1604.06174): a forward pass more of the backbone, for a fraction of the
memory. The second pass computes the same bits: BatchNorm normalises by the same samples and leaves its running
statistics alone, drop path reads the same rows of its table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint


def blocks_of(backbone: nn.Module) -> list[nn.Module]:
    """The blocks in which timm counts this network's depth, in their order; empty where it names none."""
    groups: Any = getattr(backbone, "group_matcher", dict)(coarse=False).get("blocks", [])
    rules: list[str] = [rule for rule, _ in groups] if isinstance(groups, list) else [groups]
    numbered = re.compile("|".join(f"(?:{rule})" for rule in rules if "(" in rule) or "(?!)")
    found: dict[str, nn.Module] = {}
    for name, layer in backbone.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if numbered.fullmatch(name) and not inside and next(layer.children(), None) is not None:
            found[name] = layer
    return list(found.values())


def recompute_blocks(backbone: nn.Module) -> str:
    """Let the blocks of ``backbone`` compute again in the backward pass, in place; outputs, gradients and names stay
    what they are.

    Returns:
        why that cannot be; empty: it is done.
    """
    if any(isinstance(layer, _DropoutNd) and layer.p > 0 for layer in backbone.modules()):
        return "its dropout would draw other numbers the second time"
    blocks = blocks_of(backbone)
    if hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        # What a BatchNorm notes of its first pass is not to be noted of the second; else nothing is compiled.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for block in blocks:
        kind: Any = type(block)
        block.__class__ = _recomputed(kind)
    return "" if blocks else "timm names no blocks of this network"


@cache
def _recomputed(kind: Any) -> type:
    """``kind`` with a forward pass that is made twice where it trains."""

    class Recomputed(kind):
        def forward(self, *inputs: Any) -> Tensor:
            if not (self.training and torch.is_grad_enabled()):
                result: Tensor = super().forward(*inputs)
                return result
            # Nothing is drawn inside, and to keep the generators' states would make the host wait for the device.
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            if not torch.compiler.is_compiling():  # which updates statistics once by itself
                options["context_fn"] = lambda: (nullcontext(), _second_pass(self))
            result = checkpoint(super().forward, *inputs, **options)
            return result

    return Recomputed


def _second_pass(block: nn.Module) -> AbstractContextManager[None]:
    """What surrounds the second pass of ``block``, whose first one begins now."""
    layers = list(block.modules())
    norms = [layer for layer in layers if isinstance(layer, _BatchNorm)]
    # What layers share and what changes from pass to pass: drop path's table, BatchNorm's groups.
    shared = {id(one): one for layer in layers for name, one in vars(layer).items() if name in ("table", "norms")}
    first = {key: {**vars(one)} for key, one in shared.items()}

    @contextmanager
    def again() -> Iterator[None]:
        statistics = [(layer, layer.momentum, layer.num_batches_tracked) for layer in norms]
        now = {key: {**vars(one)} for key, one in shared.items()}
        try:
            for key, one in shared.items():
                vars(one).update(first[key])
            for layer in norms:
                layer.momentum, layer.num_batches_tracked = 0.0, None  # statistics stay as the first pass left them
            yield
        finally:
            for key, one in shared.items():
                vars(one).update(now[key])
            for layer, momentum, counter in statistics:
                layer.momentum, layer.num_batches_tracked = momentum, counter

    return again()
