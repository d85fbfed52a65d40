"""What the published linear probes of vision transformers read: the class tokens behind the last blocks, side by side.

Caron et al., "Emerging properties in self-supervised vision transformers" (DINO), arXiv 2104.14294, appendix F.2, for
small transformers; SSLight does so too.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastssl.evaluate.features import ProbeError


class ClassTokens(nn.Module):
    """A vision transformer, read at the class tokens of its last ``blocks`` blocks, each through the final norm.

    ``module(images (B, 3, S, S)) -> (B, blocks * F)``, the deepest block's last: 768 wide for ViT-Ti and 4 blocks.

    Raises:
        ProbeError: the network is no vision transformer of timm that reads its class token, or has fewer blocks.
    """

    def __init__(self, backbone: nn.Module, blocks: int):
        super().__init__()
        name = type(backbone).__name__
        if not isinstance(backbone, VisionTransformer) or getattr(backbone, "global_pool", "") != "token":
            raise ProbeError(
                f"this protocol reads a vision transformer's class tokens, and the network ({name}) has none: "
                "choose another --protocol"
            )
        if len(backbone.blocks) < blocks:
            raise ProbeError(f"the network has {len(backbone.blocks)} blocks, this protocol reads the last {blocks}")
        self.backbone, self.blocks = backbone, blocks

    def forward(self, images: Tensor) -> Tensor:
        layers = self.backbone.get_intermediate_layers(images, n=self.blocks, return_prefix_tokens=True, norm=True)
        return torch.cat([prefix[:, 0] for _, prefix in layers], dim=1)
