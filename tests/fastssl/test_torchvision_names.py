"""The table of torchvision's names against the installed torchvision: every tensor, every shape, the eps, and the
features.
"""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fastssl.models.backbones import SHORT_NAMES, create_backbone, resolve_arch
from fastssl.weights.torchvision_names import TIMM_EPS, TWINS, to_torchvision, torchvision_names, with_eps


def with_statistics(network: nn.Module, seed: int = 0) -> nn.Module:
    """Scales, shifts and statistics as training leaves them in place of the ones and zeros of the beginning; in
    evaluation mode.

    The statistics are those of random images, and then moved a little: with statistics of other images than the
    network's, features explode, or become the same for every image, and a test of features finds nothing.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(tensor.shape, generator=generator) * (high - low) + low

    layers = [layer for layer in network.modules() if isinstance(layer, (nn.BatchNorm2d, nn.LayerNorm))]
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in norms]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(uniform(layer.weight, 0.5, 1.5))
            layer.bias.copy_(uniform(layer.bias, -0.2, 0.2))
        for layer in norms:
            layer.momentum = 1.0
        network.train()(torch.randn(16, 3, 64, 64, generator=generator))
        for layer, momentum in zip(norms, momenta):
            layer.momentum = momentum
            layer.running_mean += 0.1 * layer.running_var.sqrt() * uniform(layer.running_mean, -1, 1)
            layer.running_var *= uniform(layer.running_var, 0.9, 1.1)
    return network.eval()


@pytest.mark.parametrize("arch", TWINS)
def test_names_shapes_and_eps_are_the_installed_ones(arch: str) -> None:
    twin = TWINS[arch]
    with torch.device("meta"):
        ours, theirs = create_backbone(arch), getattr(torchvision.models, twin.builder)(weights=None)
    names = torchvision_names(arch)
    classifier = {f"{twin.last}.weight", f"{twin.last}.bias"}
    assert sorted(names.values()) == sorted(theirs.state_dict().keys() - classifier)
    for name, value in ours.state_dict().items():
        other = theirs.state_dict()[names[name]]
        assert other.shape == value.shape or (name == "conv_head.weight" and (*other.shape, 1, 1) == value.shape), name
    for network, eps in ((ours, TIMM_EPS), (theirs, twin.eps)):
        assert {layer.eps for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)} == {eps}


def test_the_networks_with_a_short_name_that_torchvision_has() -> None:
    assert {resolve_arch(name) for name in SHORT_NAMES} - TWINS.keys() == {
        "vit_tiny_patch16_224",
        "mobilenetv4_conv_small",
    }


@pytest.mark.parametrize(
    "arch", ["mobilenetv3_large_100", "mobilenetv3_small_100", "efficientnet_b0", "mobilenetv2_100"]
)
def test_the_features_are_the_same(arch: str) -> None:
    """In float64, where only the rounding of the scaled weights is left; without the scaling MobileNet-V3's differ by
    far more.
    """
    torch.manual_seed(0)
    ours, theirs = with_statistics(create_backbone(arch)), TWINS[arch].build().eval()
    theirs.load_state_dict(to_torchvision(arch, ours), strict=True)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        wanted = ours.double()(images)
        torch.testing.assert_close(theirs.double()(images), wanted, rtol=1e-5, atol=1e-5)
        assert float((wanted[0] - wanted[1]).abs().max()) > 0.1
        if TWINS[arch].eps != 1e-5:
            for layer in theirs.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.eps = 1e-5
            assert not torch.allclose(theirs(images), wanted, rtol=1e-2, atol=1e-2)


def test_scaling_there_and_back_is_the_identity() -> None:
    network = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).double().eval()
    network[0].running_var.copy_(torch.tensor([1.0, 0.1, 1e-3, 0.0]))
    tensors = network.state_dict()
    moved = with_eps(tensors, 1e-5, 1e-3)
    other = nn.Sequential(nn.BatchNorm2d(4, eps=1e-3), nn.Conv2d(4, 2, 1)).double().eval()
    other.load_state_dict(moved)
    images = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(other(images), network(images))
    back = with_eps(moved, 1e-3, 1e-5)
    for name, value in tensors.items():
        torch.testing.assert_close(back[name], value)
    assert not torch.equal(moved["0.weight"], tensors["0.weight"]) and torch.equal(
        moved["1.weight"], tensors["1.weight"]
    )
