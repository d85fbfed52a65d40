"""1x1 convolutions on a CPU, where torch's own (2.15, oneDNN, AVX2) are slow, or wrong.

One without a stride is one matrix product over all pixels: in channels-last memory a map is a matrix of pixels by
channels already. torch's convolution takes 1.8 times as long for the 1x1 layers of a MobileNet-V3 step at 48 px as the
product does, forwards and backwards together; for the layers behind the pooling, 2 to 6 times.

One with a stride and 2 to 7 input channels, in one group, writes past the end of a buffer in its backward pass, in
channels-last memory where the stride divides the side of the picture: the process ends in a segmentation fault, or goes
on with damaged memory. Photos have 3 channels, and the first layer of MobileOne, FastViT and RepVGG has such a branch.
"""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn
from torch.nn import functional

#: Channels, in and out, from which on the product is faster; the first layers are few channels at many pixels, where
#: memory is the limit for both.
LEAST_CHANNELS = 32
#: Input channels from which on a strided convolution is left to oneDNN: those of one vector register of AVX-512; the
#: fault needs fewer than AVX2's 8.
_ENOUGH = 16


def pointwise(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``conv2d(maps, weight, bias)`` of a 1x1 filter: (N, C, H, W), channels-last, and (F, C, 1, 1) -> (N, F, H, W),
    channels-last.
    """
    return functional.linear(maps.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def is_taken(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether this is a convolution that :func:`use_matrix_products` changes."""
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == layer.stride == (1, 1)
        and layer.padding in ((0, 0), "valid", "same")
        and layer.groups == 1
        and min(layer.in_channels, layer.out_channels) >= LEAST_CHANNELS
    )


def use_matrix_products(network: nn.Module) -> int:
    """Compute the 1x1 convolutions of a network on the CPU by matrix products; parameters stay, outputs change in the
    last bits. Returns how many layers that were.
    """
    layers = [layer for layer in network.modules() if is_taken(layer)]
    for layer in layers:
        vars(layer)["_conv_forward"] = pointwise  # in the place of the class's
    return len(layers)


class StridedPointwise(nn.Conv2d):
    """``nn.Conv2d`` that, on a CPU, takes every ``stride``-th pixel first: a 1x1 kernel looks at no other one, so the
    features are the same.
    """

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, F, H / stride, W / stride), rounded up; channels-last stays channels-last."""
        if images.device.type != "cpu":
            return super().forward(images)
        down, right = self.stride
        return functional.conv2d(images[:, :, ::down, ::right], self.weight, self.bias)


def guard_strided_pointwise(network: nn.Module) -> int:
    """Make each convolution of ``network`` that would meet the fault a ``StridedPointwise``, in place, with the same
    parameters and names. Returns how many there are.
    """
    found = [
        layer
        for layer in network.modules()
        if type(layer) is nn.Conv2d
        and layer.kernel_size == (1, 1)
        and layer.padding in ((0, 0), "valid")
        and layer.groups == 1
        and max(layer.stride) > 1
        and 1 < layer.in_channels < _ENOUGH
    ]
    for layer in found:
        layer.__class__ = StridedPointwise
    return len(found)
