"""Heads: what stands between the backbone's feature and the loss, thrown away after pre-training."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fastssl.utils.settings import Count, Switch, settings


@settings("head")
class HeadConfig:
    """Shape of an MLP from the backbone's feature (F), but for its last width.

    Attributes:
        hidden: width of each hidden layer.
        layers: number of linear layers (2: one hidden layer, as in MoCo-v2 and light-moco).
        norm_in: LayerNorm without scale and shift on the feature. In a fresh MobileNet-V3 the longest feature of a
            batch is 19 times the median (ResNet-18: 3): the BatchNorms that follow would spend their unit of variance
            on those few photos.
        norm: BatchNorm after each hidden linear layer (MoCo-v2 and light-moco have none; SimCLR, SwAV, DINO on CNNs and
            MoCo-v3 do).
        norm_out: BatchNorm without scale and shift on the embedding (MoCo-v3). It keeps the embeddings of a fresh
            network from being all alike, which is what holds small networks at the start.
        bias: a bias also in linear layers that a BatchNorm follows. It has no effect on what is computed; published
            heads have it.
        activation: ``relu`` or ``gelu``.
        init: ``torch`` (its default for linear layers), ``truncated`` (DINO, SSLight's MoCo: weights truncated normal
            of std 0.02, biases 0) or ``normal`` (SwAV: normal of std 0.01, biases 0).
    """

    hidden: Count = 2048
    layers: Annotated[Count, Field(le=100)] = 2  # a number of a stranger's recipe, and layers are made one by one
    norm_in: Switch = False
    norm: Switch = False
    norm_out: Switch = False
    bias: Switch = False
    activation: Literal["relu", "gelu"] = "relu"
    init: Literal["torch", "truncated", "normal"] = "torch"


@settings("projector")
class ProjectorConfig(HeadConfig):
    """Shape of the MLP to the embedding. Attributes: of ``HeadConfig``, and ``out``, the width of the embedding."""

    out: Count = 128


def at_least_float32(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or as it is where it is float64 (in which tests prove what rounding would hide)."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class Projector(nn.Sequential):
    """MLP (N, F) -> (N, out) of all methods, L2-normalised rows, in float32 also under autocast: a bfloat16 norm would
    move the logits, which the loss divides by a temperature of 0.1, by percents.
    """

    def __init__(self, in_features: int, config: ProjectorConfig):
        layers: list[nn.Module] = [nn.LayerNorm(in_features, elementwise_affine=False)] if config.norm_in else []
        width = in_features
        for _ in range(config.layers - 1):
            layers.append(nn.Linear(width, config.hidden, bias=config.bias or not config.norm))
            if config.norm:
                layers.append(nn.BatchNorm1d(config.hidden))
            layers.append(nn.GELU() if config.activation == "gelu" else nn.ReLU(inplace=True))
            width = config.hidden
        layers.append(nn.Linear(width, config.out, bias=config.bias or not config.norm_out))
        if config.norm_out:
            layers.append(nn.BatchNorm1d(config.out, affine=False))
        super().__init__(*layers)
        for layer in layers if config.init != "torch" else ():
            if isinstance(layer, nn.Linear):
                draw = nn.init.trunc_normal_ if config.init == "truncated" else nn.init.normal_
                draw(layer.weight, std=0.02 if config.init == "truncated" else 0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        return functional.normalize(at_least_float32(super().forward(features)), dim=1)


class CosineLogits(nn.Module):
    """Unit vectors (N, D) -> (N, K): each row of the weight has unit length, times its gain; no bias.

    The last layer of DINO's head (Caron et al., arXiv 2104.14294). Always in float32: its results are cosines, which
    the loss divides by temperatures down to 0.04.

    Args:
        learned_gain: train the gains, which start at 1; otherwise they stay there.
    """

    def __init__(self, in_features: int, out_features: int, *, learned_gain: bool = False):
        super().__init__()
        self.direction = nn.Parameter(nn.Linear(in_features, out_features, bias=False).weight.detach().clone())
        # (K, 1), not (K,): a matrix to the optimiser, which lets it decay as the published recipe does.
        self.gain = nn.Parameter(torch.ones(out_features, 1), requires_grad=learned_gain)

    def forward(self, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            rows = functional.normalize(self.direction, dim=1) * self.gain
            return functional.linear(at_least_float32(embeddings), rows)


class Prototypes(nn.Module):
    """Unit vectors (N, D) -> scores (N, K) against K unit vectors that are learned. Source: SwAV (Caron et al., arXiv
    2006.09882).

    Always in float32: the scores are divided by 0.05 in an exponential. ``normalise_`` brings the rows back to unit
    length, in place, before each pass.
    """

    def __init__(self, in_features: int, count: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, in_features).normal_(std=0.01))
        self.normalise_()

    @torch.no_grad()
    def normalise_(self) -> None:
        """Give every prototype unit length."""
        self.weight.copy_(functional.normalize(self.weight, dim=1))

    def forward(self, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            return functional.linear(at_least_float32(embeddings), self.weight)
