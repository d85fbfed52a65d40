"""Pyramids over every kind of backbone: the right maps, the very tensors, and gradients in all layers
that take part.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastssl.evaluate.detection.annotations import DetectionError
from fastssl.evaluate.detection.model import LEVELS, create_pyramid
from fastssl.models.backbones import create_backbone

#: network -> (channels that FPN's first convolutions read, parameters that take no part)
NETWORKS = {
    "resnet18": ([64, 128, 256, 512], ()),
    "mobilenetv2": ([24, 32, 96, 1280], ()),
    "mobilenetv3_large": ([24, 40, 112, 960], ("conv_head",)),  # its last convolution follows the pooling
    "efficientnet_b0": ([24, 40, 112, 1280], ()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_convolutional_networks(name: str) -> None:
    torch.manual_seed(0)
    widths, unused = NETWORKS[name]
    backbone = create_backbone(name)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    pyramid = create_pyramid(backbone, LEVELS, 32)
    assert pyramid.body is backbone and [block[0].in_channels for block in pyramid.fpn.inner_blocks] == widths
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items()), (
        "asking for its maps changed it"
    )
    images = torch.randn(2, 3, 64, 128).contiguous(memory_format=torch.channels_last)
    maps = pyramid(images)
    assert {key: tuple(each.shape) for key, each in maps.items()} == {
        "0": (2, 32, 16, 32),
        "1": (2, 32, 8, 16),
        "2": (2, 32, 4, 8),
        "3": (2, 32, 2, 4),
        "pool": (2, 32, 1, 2),
    }
    sum(each.square().mean() for each in maps.values()).backward()
    without = [key for key, each in backbone.named_parameters() if each.grad is None]
    assert all(key.startswith(unused) for key in without) and bool(without) == bool(unused), without


def test_the_maps_are_those_of_timm() -> None:
    """By hand: hooks on the layers that make them."""
    backbone = create_backbone("mobilenetv2").eval()
    pyramid = create_pyramid(backbone, (16, 32), 8).eval()
    seen = {}
    backbone.blocks[4].register_forward_hook(lambda module, inputs, output: seen.update(sixteen=output))
    backbone.bn2.register_forward_hook(lambda module, inputs, output: seen.update(thirty_two=output))
    read = [block[0] for block in pyramid.fpn.inner_blocks]
    for name, layer in zip(("sixteen", "thirty_two"), read):
        layer.register_forward_hook(lambda module, inputs, output, name=name: seen.update({f"read {name}": inputs[0]}))
    with torch.no_grad():
        maps = pyramid(torch.randn(1, 3, 64, 64))
    assert list(maps) == ["0", "1", "pool"] and pyramid.divisible == 32
    assert seen["sixteen"].shape == (1, 96, 4, 4) and seen["thirty_two"].shape == (1, 1280, 2, 2)
    assert torch.equal(seen["read sixteen"], seen["sixteen"]) and torch.equal(
        seen["read thirty_two"], seen["thirty_two"]
    )


def test_a_vision_transformer_takes_any_size() -> None:
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny")
    pyramid = create_pyramid(backbone, LEVELS, 32)
    for height, width in ((64, 128), (128, 64)):
        maps = pyramid(torch.randn(1, 3, height, width))
        sizes = [(height // stride, width // stride) for stride in (4, 8, 16, 32, 64)]
        assert [tuple(each.shape) for each in maps.values()] == [(1, 32, *size) for size in sizes]
    assert pyramid.divisible == 32 and create_pyramid(create_backbone("vit_tiny"), (4, 8)).divisible == 16  # a patch
    sum(each.square().mean() for each in maps.values()).backward()
    assert all(each.grad is not None for each in pyramid.parameters())
    # Where a token stands is where it is seen: one bright patch moves its own places of the finest map most.
    pyramid.eval()
    with torch.no_grad():
        dark = torch.zeros(1, 3, 64, 128)
        bright = dark.clone()
        bright[:, :, 16:32, 96:112] = 3
        moved = (pyramid(bright)["0"] - pyramid(dark)["0"]).abs().mean((0, 1))
    place = int(moved.argmax())
    assert (place // 32 // 4, place % 32 // 4) == (1, 6)


class Mapless(nn.Module):
    num_features = 3


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(DetectionError, match=r"Mapless does not show its feature maps"):
        create_pyramid(Mapless())
    backbone = create_backbone("lcnet_035")
    for levels in ((), (4, 16), (32, 16), (0, 0)):
        with pytest.raises(DetectionError, match=r"strides that double from one to the next"):
            create_pyramid(backbone, levels)
    with pytest.raises(DetectionError, match=r"has no map of stride 64, only of 2,4,8,16,32"):
        create_pyramid(backbone, (32, 64))
    with pytest.raises(DetectionError, match=r"has no map of stride 64, only of 4,8,16,32"):
        create_pyramid(create_backbone("vit_tiny"), (32, 64))
