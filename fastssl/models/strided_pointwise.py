"""A strided 1x1 convolution of few channels, computed so that oneDNN's fault on a CPU is not met.

In channels-last memory, the backward pass of torch's 1x1 convolution writes past the end of a buffer on a CPU (seen
with torch 2.15, AVX2) where the convolution has 2 to 7 input channels, one group, a stride above 1, and a picture whose
side the stride divides: the process ends in a segmentation fault, or goes on with damaged memory. Photos have 3
channels, and the first layer of MobileOne, FastViT and RepVGG has such a branch.
"""

from __future__ import annotations

from torch import Tensor, nn

#: Input channels from which on the convolution is left to oneDNN: those of one vector register of AVX-512; the fault
#: needs fewer than AVX2's 8.
_ENOUGH = 16


class StridedPointwise(nn.Conv2d):
    """``nn.Conv2d`` that, on a CPU, takes every ``stride``-th pixel first: a 1x1 kernel looks at no other one, so the
    features are the same.
    """

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, F, H / stride, W / stride), rounded up; channels-last stays channels-last."""
        if images.device.type != "cpu":
            return super().forward(images)
        down, right = self.stride
        return nn.functional.conv2d(images[:, :, ::down, ::right], self.weight, self.bias)


def guard_strided_pointwise(network: nn.Module) -> int:
    """Make each convolution of ``network`` that would meet the fault a ``StridedPointwise``, in place; returns how many
    there are.

    The layer stays the same object with the same parameters and names.
    """
    found = [layer for layer in network.modules() if type(layer) is nn.Conv2d and _is_at_risk(layer)]
    for layer in found:
        layer.__class__ = StridedPointwise
    return len(found)


def _is_at_risk(layer: nn.Conv2d) -> bool:
    pointwise = layer.kernel_size == (1, 1) and layer.padding in ((0, 0), "valid") and layer.groups == 1
    return pointwise and max(layer.stride) > 1 and 1 < layer.in_channels < _ENOUGH
