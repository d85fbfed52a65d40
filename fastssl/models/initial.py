"""First weights other than timm's own."""

from __future__ import annotations

import torch
from timm.layers import Attention2d, ConvNormAct, LayerScale2d, MultiQueryAttention2d
from timm.models.vision_transformer import Block as VisionTransformerBlock
from torch import nn


@torch.no_grad()
def kaiming_init(backbone: nn.Module) -> None:
    """Draw all convolutions Kaiming normal by fan-out (ReLU), and let every BatchNorm begin at scale 1 and shift 0, as
    torchvision does.

    He et al., arXiv 1502.01852; SSLight's networks begin so. timm differs for depth-wise filters (its fan-out counts
    the channels of a group) and silences the last BatchNorm of each of ResNet's residual blocks.
    """
    for layer in backbone.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d) and layer.affine:
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def zero_residual_branches(backbone: nn.Module) -> tuple[int, int]:
    """Silence the last layer of each residual branch.

    Every residual block then begins as the identity (Goyal et al. 2017, arXiv 1706.02677, section 5.1, for ResNet; timm
    does it to every ResNet unasked, but not to the inverted residuals of the MobileNets and EfficientNets). In those
    the last layer is a normalisation, whose scale becomes zero, or a layer scale; in a vision transformer it is the
    linear layer behind the attention or in the MLP.

    Returns:
        (branches that are silent now, branches that were left as they are because their last layer is not known here).
    """
    silenced = left = 0
    for block in backbone.modules():
        if callable(silence := getattr(block, "zero_init_last", None)):
            silence()
            silenced += 1
            continue
        ends: list[nn.Module | None] = []
        if getattr(block, "has_skip", False):
            ends = [_end_of_branch(block)]
        elif isinstance(block, VisionTransformerBlock):
            ends = [block.get_submodule("attn.proj"), block.get_submodule("mlp.fc2")]
        for last in ends:
            for name in ("weight", "bias", "gamma"):
                if isinstance(parameter := getattr(last, name, None), nn.Parameter):
                    nn.init.zeros_(parameter)
        silenced, left = silenced + len(ends) - ends.count(None), left + ends.count(None)
    return silenced, left


def _end_of_branch(block: nn.Module) -> nn.Module | None:
    """The layer that scales what an inverted residual, universal inverted bottleneck, attention or convolution block of
    timm adds to its input.

    None if none is found, or if a ReLU follows: behind a silent layer it lets no gradient through, and the branch would
    stay silent.
    """
    for child in reversed(list(block.children())):
        if isinstance(child, LayerScale2d):
            return child
        if isinstance(child, MultiQueryAttention2d):
            return child.get_submodule("output.proj")
        if isinstance(child, Attention2d):
            return child.proj
        layer = child.bn if isinstance(child, ConvNormAct) else child
        scale = getattr(layer, "weight", None)
        if isinstance(scale, nn.Parameter) and scale.dim() == 1:  # a normalisation: one number a channel
            return None if isinstance(getattr(layer, "act", None), (nn.ReLU, nn.ReLU6)) else layer
    return None
