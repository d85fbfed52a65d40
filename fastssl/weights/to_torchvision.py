"""``--format torchvision``: a state dict under torchvision's names, which gives the same features there.

It loads strictly into torchvision's network once the layer that makes classes is an Identity:

    net = torchvision.models.mobilenet_v3_large(weights=None)  # mobilenet_v3_small too
    net.classifier[3] = torch.nn.Identity()
    net = torchvision.models.efficientnet_b0(weights=None)  # efficientnet_b1 too
    net.classifier[1] = torch.nn.Identity()
    net = torchvision.models.mobilenet_v2(weights=None);       net.classifier[1] = torch.nn.Identity()
    net = torchvision.models.resnet18(weights=None);           net.fc = torch.nn.Identity()  # resnet34, resnet50 too
    net.load_state_dict(torch.load("mine.pth", weights_only=True), strict=True)
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fastssl.errors import FastSSLError
from fastssl.weights.check import check_features, check_names
from fastssl.weights.staging import save_tensors
from fastssl.weights.torchvision_names import TWINS, Twin, to_torchvision


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


def build_twin(twin: Twin) -> nn.Module:
    """torchvision's network, freshly initialised, with an Identity where classes would be made."""
    import torchvision

    network = getattr(torchvision.models, twin.builder)(weights=None)
    network.set_submodule(twin.last, nn.Identity())
    return network


def write_file(backbone: nn.Module, arch: str, path: Path, about: dict[str, str]) -> float:
    """Write the state dict to ``path`` (.pth, .pt or .safetensors) and load it back as users will; returns the largest
    difference of features.
    """
    twin = twin_of(arch)
    network = build_twin(twin)
    tensors = to_torchvision(arch, backbone)
    check_names(path, tensors, network.state_dict(), f"torchvision's {twin.builder}")
    save_tensors(tensors, path, about)
    network.load_state_dict(_load(path), strict=True)
    return check_features(path, backbone, network.eval(), size=64, tolerance=1e-5)


def _load(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(str(path))
    return torch.load(path, weights_only=True)
