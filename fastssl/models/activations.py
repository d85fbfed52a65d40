"""Activations of the network that is trained: none in place, and ReLU6 keeps its result for the backward pass, not its
input.

Autograd copies what an in-place ReLU6, Hardswish or SiLU overwrites: a map more is read and written for each (99 of the
1,629 GB that a DINO step of MobileNetV2 moves at batch 1024, counted). Not in place they keep the map itself.

The convolution behind a ReLU6 keeps its result anyway, and that says as well where the gradient passes: of a layer's
three maps (convolution, BatchNorm, ReLU6) two are kept. Hardswish and SiLU fall and rise: theirs keep the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _ReLU6(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, maps: Tensor) -> Tensor:
        result = functional.relu6(maps)
        context.save_for_backward(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (result,) = context.saved_tensors
        # 0 < x < 6 is 0 < relu6(x) < 6: torch's own kernel, the same bits.
        passed: Tensor = torch.ops.aten.hardtanh_backward(gradient, result, 0.0, 6.0)
        return passed


class LeanReLU6(nn.ReLU6):
    """``nn.ReLU6`` with the same outputs and gradients, that keeps its result and not its input."""

    def forward(self, input: Tensor) -> Tensor:
        # A compiler joins the plain operation with its neighbours, and chooses itself what is kept.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return super().forward(input)
        result: Tensor = _ReLU6.apply(input)
        return result


def keep_less(network: nn.Module) -> int:
    """Let the activations of ``network`` keep as little as they can for the backward pass, in place; outputs, gradients
    and names stay what they are. Returns how many layers that changed.
    """
    # A ReLU keeps its result in any case: in place it copies nothing.
    layers = [layer for layer in network.modules() if getattr(layer, "inplace", False) and type(layer) is not nn.ReLU]
    for layer in layers:
        layer.inplace = False  # type: ignore[assignment]
    clipped = [layer for layer in network.modules() if type(layer) is nn.ReLU6]
    for layer in clipped:
        layer.__class__ = LeanReLU6
    return len({*layers, *clipped})
