"""Heads: what stands between the backbone's feature and the loss, thrown away after pre-training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class ProjectorConfig:
    """Shape of the MLP from the backbone's feature (F) to the embedding.

    Attributes:
        hidden: width of each hidden layer.
        out: width of the embedding.
        layers: number of linear layers (2: one hidden layer, as in MoCo-v2 and light-moco).
        norm_in: LayerNorm without scale and shift on the feature. MobileNet-V3's squeeze-and-excite gates multiply up to heavy tails: in
            a fresh network the longest feature of a batch is 19 times the median (ResNet-18: 3), and the BatchNorms that follow
            would spend their unit of variance on those few photos and make all others alike.
        norm: BatchNorm after each hidden linear layer (MoCo-v2 and light-moco have none; SimCLR and MoCo-v3 do).
        norm_out: BatchNorm without scale and shift on the embedding (MoCo-v3). It keeps the embeddings of a fresh
            network from being all alike, which is what holds small networks at the start.
    """

    hidden: int = 2048
    out: int = 128
    layers: int = 2
    norm_in: bool = False
    norm: bool = False
    norm_out: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden", "out", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"projector.{name} must be at least 1, got {getattr(self, name)}")


class Projector(nn.Sequential):
    """MLP (N, F) -> (N, out), L2-normalised rows in float32.

    The norm is taken in float32 also under autocast: a bfloat16 norm would move the logits, which the loss divides
    by a temperature of 0.1, by percents.
    """

    def __init__(self, in_features: int, config: ProjectorConfig):
        layers: list[nn.Module] = [nn.LayerNorm(in_features, elementwise_affine=False)] if config.norm_in else []
        width = in_features
        for _ in range(config.layers - 1):
            layers.append(nn.Linear(width, config.hidden, bias=not config.norm))
            if config.norm:
                layers.append(nn.BatchNorm1d(config.hidden))
            layers.append(nn.ReLU(inplace=True))
            width = config.hidden
        layers.append(nn.Linear(width, config.out, bias=not config.norm_out))
        if config.norm_out:
            layers.append(nn.BatchNorm1d(config.out, affine=False))
        super().__init__(*layers)

    def forward(self, features: Tensor) -> Tensor:
        return functional.normalize(super().forward(features).float(), dim=1)
