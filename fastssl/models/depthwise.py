"""The gradient of a depth-wise convolution's weights on a CPU, for large filters and for maps that are smaller than the
filter.

There oneDNN has no kernel of its own (torch 2.15, AVX2) and falls back to one small matrix product for each channel and
photo: two thirds of a MobileNet-V3 step at 48 px. Here it is one loop over the maps as they lie in memory
(channels-last), vectorised over the channels.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl.utils.jit import fast

#: Channels that one call takes: the sums of a block (25 x 64 floats for 5 x 5) stay in the first cache.
_BLOCK = 64
#: Multiply-adds from which on several threads are worth waking.
_WORTH_THREADS = 4e6
#: From this side on it is always faster; smaller filters have good kernels in oneDNN unless the map is smaller than the
#: filter.
LARGE_FILTER = 5


@fast
def _sum_block(
    maps: np.ndarray, gradient: np.ndarray, weights: np.ndarray, stride: int, padding: int, first: int, last: int
) -> None:
    """``weights`` (C, 1, k, k) of the channels ``first`` .. ``last``: sum over photos and places of ``maps`` (N, H, W,
    C) times ``gradient`` (N, h, w, C).
    """
    side = weights.shape[2]
    sums = np.zeros((side, side, last - first), np.float32)
    for photo in range(gradient.shape[0]):
        for row in range(gradient.shape[1]):
            for column in range(gradient.shape[2]):
                here = gradient[photo, row, column, first:last]
                for i in range(side):
                    y = row * stride + i - padding
                    if y < 0 or y >= maps.shape[1]:
                        continue
                    for j in range(side):
                        x = column * stride + j - padding
                        if x < 0 or x >= maps.shape[2]:
                            continue
                        there = maps[photo, y, x, first:last]
                        total = sums[i, j]
                        for c in range(last - first):
                            total[c] += there[c] * here[c]
    for c in range(last - first):
        weights[first + c, 0] = sums[:, :, c]


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "fastssl-depthwise")


def weight_gradient(maps: Tensor, gradient: Tensor, side: int, stride: int, padding: int) -> Tensor:
    """Gradient of a loss by the weights of a depth-wise convolution. The same bits for any number of threads.

    Args:
        maps: (N, C, H, W) float32, channels-last: what the convolution was given.
        gradient: (N, C, h, w) float32: of the loss by what it returned.
        side, stride, padding: of the filter, alike in both directions.

    Returns:
        (C, 1, side, side) float32.
    """
    weights = np.empty((maps.shape[1], 1, side, side), np.float32)
    # As numpy sees a channels-last tensor: (N, H, W, C), contiguous.
    x, g = (
        tensor.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).contiguous().numpy()
        for tensor in (maps, gradient)
    )
    blocks = [(first, min(first + _BLOCK, maps.shape[1])) for first in range(0, maps.shape[1], _BLOCK)]
    threads = torch.get_num_threads()

    def block(bounds: tuple[int, int]) -> None:
        _sum_block(x, g, weights, stride, padding, *bounds)

    many = threads > 1 and gradient.numel() * side * side > _WORTH_THREADS
    list((_pool(threads).map if many else map)(block, blocks))
    return torch.from_numpy(weights)


class _Depthwise(torch.autograd.Function):
    """As torch's convolution, but for the gradient of the weights."""

    @staticmethod
    def forward(context: Any, maps: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        context.save_for_backward(maps, weight)
        context.settings = stride, padding, bias is not None
        return functional.conv2d(maps, weight, bias, stride, padding, groups=weight.shape[0])

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight = context.saved_tensors
        stride, padding, has_bias = context.settings
        of_maps = None
        if context.needs_input_grad[0]:
            geometry = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], len(weight)
            wanted = [True, False, False]
            of_maps = torch.ops.aten.convolution_backward(gradient, maps, weight, None, *geometry, wanted)[0]
        of_weight = weight_gradient(maps, gradient, weight.shape[2], stride, padding)
        of_bias = gradient.sum((0, 2, 3)) if has_bias and context.needs_input_grad[2] else None
        return of_maps, of_weight, of_bias, None, None


class _Forward:
    """In the place of a convolution's ``_conv_forward``. Numbers alone, so that a copy of the network has its copy."""

    def __init__(self, stride: int, padding: int):
        self.stride, self.padding = stride, padding

    def __call__(self, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        side = weight.shape[2]
        if (
            not torch.compiler.is_compiling()  # compiled code has no call of ours in it
            and maps.dtype == weight.dtype == torch.float32
            and not torch.is_autocast_enabled(maps.device.type)
            and weight.requires_grad
            and torch.is_grad_enabled()
            and (side >= LARGE_FILTER or min(maps.shape[2:]) < side)
        ):
            features: Tensor = _Depthwise.apply(maps, weight, bias, self.stride, self.padding)
            return features
        return functional.conv2d(maps, weight, bias, self.stride, self.padding, groups=len(weight))


def is_taken(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether this is a convolution that :func:`use_own_gradient` changes."""
    return (
        type(layer) is nn.Conv2d
        and layer.groups == layer.in_channels == layer.out_channels
        and layer.kernel_size[0] == layer.kernel_size[1] > 1
        and layer.stride[0] == layer.stride[1]
        and not isinstance(layer.padding, str)
        and layer.padding[0] == layer.padding[1]
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
    )


def use_own_gradient(network: nn.Module) -> int:
    """Let the depth-wise filters of a network on the CPU have their gradient from here where that is faster; parameters
    and outputs stay as they are. Returns how many layers that were.
    """
    layers = [layer for layer in network.modules() if is_taken(layer)]
    for layer in layers:
        vars(layer)["_conv_forward"] = _Forward(layer.stride[0], int(layer.padding[0]))
    return len(layers)
