"""A network and batches that are small enough to compute by hand, shared by the tests of the methods."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.losses.pairs import PairWeights

#: samples a batch
B = 6
#: two global views and no local ones
TWO = PairWeights(0, 1.0, 0.0)


class TinyBackbone(nn.Module):
    """Convolution, BatchNorm, pool: enough to have statistics and a gradient."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).mean((2, 3))


def images(seed: int = 0, views: int = 2, size: int = 9) -> Tensor:
    """(views * B, 3, size, size) standard normal."""
    return torch.randn(views * B, 3, size, size, generator=torch.Generator().manual_seed(seed))
