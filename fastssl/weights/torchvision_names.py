"""Networks that timm and torchvision both have: which tensor is which, and the one number in which they differ.

Facts about both libraries, held by tests against the installed ones. Export reads the table from left to right, import
from right to left.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import timm
import torch
import torchvision
from torch import Tensor, nn


@dataclass(frozen=True)
class Twin:
    """torchvision's counterpart of a timm network.

    Attributes:
        builder: ``torchvision.models.<builder>(weights=None)``.
        last: the layer that makes classes of features: with an Identity in its place the network returns what the
            backbone returns.
        eps: of its BatchNorms.
    """

    builder: str
    last: str
    eps: float = 1e-5

    @property
    def recipe(self) -> str:
        """How to build the network that takes exported tensors, as one line of Python."""
        inner = re.sub(r"\.(\d+)", r"[\1]", self.last)
        return f"net = torchvision.models.{self.builder}(weights=None); net.{inner} = torch.nn.Identity()"

    def build(self) -> nn.Module:
        """torchvision's network, freshly initialised, with an Identity where classes would be made."""
        network: nn.Module = getattr(torchvision.models, self.builder)(weights=None)
        network.set_submodule(self.last, nn.Identity())
        return network


#: of the BatchNorms of these networks in timm
TIMM_EPS = 1e-5
#: timm name -> its counterpart
TWINS: dict[str, Twin] = {
    "mobilenetv3_large_100": Twin("mobilenet_v3_large", "classifier.3", eps=1e-3),
    "mobilenetv3_small_100": Twin("mobilenet_v3_small", "classifier.3", eps=1e-3),
    "efficientnet_b0": Twin("efficientnet_b0", "classifier.1"),
    "efficientnet_b1": Twin("efficientnet_b1", "classifier.1"),
    "mobilenetv2_100": Twin("mobilenet_v2", "classifier.1"),
    **{name: Twin(name, "fc") for name in ("resnet18", "resnet34", "resnet50")},
}


@cache
def torchvision_names(arch: str) -> dict[str, str]:
    """timm tensor name -> torchvision tensor name, for a network of ``TWINS``.

    Both libraries register a network's layers in the order in which they run, whatever they call them.
    """
    with torch.device("meta"):  # names alone are wanted
        ours, theirs = timm.create_model(arch, num_classes=0).state_dict(), TWINS[arch].build().state_dict()
    return dict(zip(ours, theirs, strict=True))


def with_eps(tensors: dict[str, Tensor], have: float, want: float) -> dict[str, Tensor]:
    """The tensors of a network whose BatchNorms added ``have`` to their variances, for one that adds ``want``, such
    that it still computes the same in evaluation mode.

    BatchNorm gives ``w (x - mean) / sqrt(var + eps) + b``; a weight ``w sqrt((var + want) / (var + have))`` takes the
    difference up exactly. In training, where BatchNorm has the batch's own variance, the two definitions differ still.
    """
    result = dict(tensors)
    for name, variance in tensors.items() if have != want else ():
        if name.endswith("running_var"):
            weight = tensors[name := f"{name.removesuffix('running_var')}weight"]
            factor = torch.sqrt((variance.double() + want) / (variance.double() + have))
            result[name] = (weight.double() * factor).to(weight.dtype)
    return result


def to_torchvision(arch: str, backbone: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``backbone``, the timm network ``arch`` on the CPU, as ``TWINS[arch]`` takes them, by name."""
    tensors = with_eps(backbone.state_dict(), TIMM_EPS, TWINS[arch].eps)
    tensors = {torchvision_names(arch).get(name, name): value for name, value in tensors.items()}
    if arch.startswith("mobilenetv3"):
        tensors["classifier.0.weight"] = tensors["classifier.0.weight"].flatten(1)  # a convolution of one pixel
    return tensors
