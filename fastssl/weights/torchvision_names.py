"""Networks that timm and torchvision both have: which tensor is which, and the one number in which they differ.

Facts about both libraries, held by tests against the installed ones. Export reads the table from left to right, import
from right to left.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastssl.errors import FastSSLError

#: timm's sub-layers of a block in the order in which they run: (convolution, its BatchNorm); "se" stands for
#: squeeze-and-excitation.
_INVERTED = (("conv_pw", "bn1"), ("conv_dw", "bn2"), "se", ("conv_pwl", "bn3"))
_SEPARABLE = (("conv_dw", "bn1"), "se", ("conv_pw", "bn2"))
_SQUEEZE = {"conv_reduce": "fc1", "conv_expand": "fc2"}


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
        import torchvision

        network = getattr(torchvision.models, self.builder)(weights=None)
        network.set_submodule(self.last, nn.Identity())
        return network


#: timm name -> its counterpart
TWINS: dict[str, Twin] = {
    "mobilenetv3_large_100": Twin("mobilenet_v3_large", "classifier.3", eps=1e-3),
    "mobilenetv3_small_100": Twin("mobilenet_v3_small", "classifier.3", eps=1e-3),
    "efficientnet_b0": Twin("efficientnet_b0", "classifier.1"),
    "efficientnet_b1": Twin("efficientnet_b1", "classifier.1"),
    "mobilenetv2_100": Twin("mobilenet_v2", "classifier.1"),
    "resnet18": Twin("resnet18", "fc"),
    "resnet34": Twin("resnet34", "fc"),
    "resnet50": Twin("resnet50", "fc"),
}


def twin_of(arch: str) -> Twin:
    """torchvision's counterpart.

    Raises:
        FastSSLError: it has none; the message names the networks that have one.
    """
    if arch not in TWINS:
        raise FastSSLError(
            f"torchvision has no counterpart of {arch}; it has those of {', '.join(TWINS)} (--format timm "
            "takes every network)"
        )
    return TWINS[arch]


def torchvision_names(arch: str, names: Iterable[str]) -> dict[str, str]:
    """timm tensor name -> torchvision tensor name, for a network of ``TWINS``.

    Args:
        arch: timm name.
        names: of all tensors of the timm backbone without classifier.
    """
    names = list(names)
    if arch.startswith("resnet"):  # timm kept torchvision's names
        return {name: name for name in names}
    layers = _mobile_layers(arch, names)
    split = {name: name.rsplit(".", 1) for name in names}
    return {name: f"{layers[layer]}.{tensor}" for name, (layer, tensor) in split.items()}


def _mobile_layers(arch: str, names: list[str]) -> dict[str, str]:
    """timm layer -> torchvision layer of a MobileNet or an EfficientNet.

    torchvision numbers what timm names: ``features`` holds the stem as 0, then the blocks (EfficientNet: the stages,
    which hold blocks), then the last convolution; a block is a Sequential of (convolution, BatchNorm) pairs and
    squeeze-and-excitation.
    """
    blocks: dict[tuple[int, int], set[str]] = {}
    for name in names:
        if found := re.match(r"blocks\.(\d+)\.(\d+)\.(\w+)\.", name):
            blocks.setdefault((int(found[1]), int(found[2])), set()).add(found[3])
    layers = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    for number, ((stage, index), parts) in enumerate(sorted(blocks.items()), start=1):
        ours = f"blocks.{stage}.{index}"
        theirs = f"features.{stage + 1}.{index}" if arch.startswith("efficientnet") else f"features.{number}"
        if "conv" in parts:  # MobileNet-V3's last convolution, which timm counts as a block
            layers.update({f"{ours}.conv": f"{theirs}.0", f"{ours}.bn1": f"{theirs}.1"})
            continue
        kind = _INVERTED if "conv_pwl" in parts else _SEPARABLE
        steps = [step for step in kind if (step if step == "se" else step[0]) in parts]
        for slot, step in enumerate(steps):
            if step == "se":
                layers.update({f"{ours}.se.{a}": f"{theirs}.block.{slot}.{b}" for a, b in _SQUEEZE.items()})
            elif arch.startswith("mobilenetv2") and slot == len(steps) - 1:  # no activation, so no pair of its own
                layers.update(
                    {f"{ours}.{step[0]}": f"{theirs}.conv.{slot}", f"{ours}.{step[1]}": f"{theirs}.conv.{slot + 1}"}
                )
            else:
                inside = f"{theirs}.{'conv' if arch.startswith('mobilenetv2') else 'block'}.{slot}"
                layers.update({f"{ours}.{step[0]}": f"{inside}.0", f"{ours}.{step[1]}": f"{inside}.1"})
    if arch.startswith("mobilenetv3"):
        layers["conv_head"] = "classifier.0"  # a convolution of one pixel is a Linear
    else:
        last = max(stage for stage, _ in blocks) + 2 if arch.startswith("efficientnet") else len(blocks) + 1
        layers.update({"conv_head": f"features.{last}.0", "bn2": f"features.{last}.1"})
    return layers


def with_eps(
    tensors: dict[str, Tensor], backbone: nn.Module, *, have: float | None = None, want: float | None = None
) -> dict[str, Tensor]:
    """The tensors of a network that adds another eps to its variances, such that it still computes the same in
    evaluation mode.

    BatchNorm gives ``w (x - mean) / sqrt(var + eps) + b``; a weight ``w sqrt((var + want) / (var + have))`` takes the
    difference up exactly. A network that is trained on from there normalises by its batch, where eps stands beside the
    batch's own variance: there the factor is what two definitions of the same network differ in.

    Args:
        tensors: under timm's names.
        backbone: whose BatchNorms are looked up, and whose eps is meant by None.
        have: eps with which the tensors were made.
        want: eps of the network that will take them.
    """
    result = dict(tensors)
    for name, layer in backbone.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            before, after = layer.eps if have is None else have, layer.eps if want is None else want
            if before != after:
                variance, weight = tensors[f"{name}.running_var"].double(), tensors[f"{name}.weight"]
                factor = torch.sqrt((variance + after) / (variance + before))
                result[f"{name}.weight"] = (weight.double() * factor).to(weight.dtype)
    return result


def to_torchvision(arch: str, backbone: nn.Module) -> dict[str, Tensor]:
    """The backbone's tensors as ``TWINS[arch]`` takes them, by name.

    Args:
        arch: a key of ``TWINS``.
        backbone: the timm network, on the CPU.
    """
    tensors = with_eps(dict(backbone.state_dict()), backbone, want=TWINS[arch].eps)
    names = torchvision_names(arch, tensors)
    return {
        names[name]: (value.flatten(1) if names[name] == "classifier.0.weight" else value)
        for name, value in tensors.items()
    }
