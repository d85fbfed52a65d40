"""Class tokens of the last blocks against hooks on the blocks; networks that have none."""

from __future__ import annotations

import pytest
import timm
import torch

from fastssl.evaluate.feature_stream import ClassTokens
from fastssl.evaluate.features import ProbeError
from fastssl.models.backbones import create_backbone


@torch.no_grad()
def test_equals_hooks_on_the_blocks() -> None:
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny").eval()
    images, seen = torch.randn(2, 3, 32, 32), []
    for block in backbone.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    last = backbone(images)
    expected = torch.cat([backbone.norm(tokens)[:, 0] for tokens in seen[-4:]], dim=1)
    found = ClassTokens(backbone, 4)(images)
    assert found.shape == (2, 768)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:, -192:], last, atol=1e-6, rtol=0)


def test_networks_without_them() -> None:
    with pytest.raises(ProbeError, match=r"class tokens, and the network \(ResNet\) has none"):
        ClassTokens(create_backbone("resnet10t"), 4)
    small = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)
    with pytest.raises(ProbeError, match="2 blocks"):
        ClassTokens(small, 4)
    # Reads the mean of its patches: its class token was never trained to say anything, nor is there a norm for it.
    averaged = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=4, global_pool="avg")
    with pytest.raises(ProbeError, match="has none"):
        ClassTokens(averaged, 4)
