"""EMP-SSL: many crops of each photo are drawn to their mean, and the photos of a batch kept apart by the coding rate.

Source: Tong et al., "EMP-SSL: Towards Self-Supervised Learning in One Training Epoch", arXiv 2304.03977.

    c_i   = mean over the views v of z_vi
    loss  = - similarity * mean_vi cos(z_vi, c_i)  -  expansion * mean_v R(z_v)        R: losses.coding_rate

All views count alike, the global ones too: the weights of pairs are not read. One decode serves all crops of a photo.
"""

from __future__ import annotations

from dataclasses import field

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl.distributed.collectives import gather_views
from fastssl.losses.coding_rate import coding_rate, largest_coding_rate
from fastssl.methods.base import Method, MethodConfig, Rates, StepOutput, Views, new_encoder
from fastssl.models.heads import ProjectorConfig
from fastssl.utils.settings import NotNegative, Positive, settings


@settings("empssl")
class EMPSSLConfig(MethodConfig):
    """The method's own numbers.

    Attributes:
        similarity, expansion: weights of the two terms.
        epsilon: of the coding rate: the distortion up to which two directions are one.
        projector: shape of the MLP to the embedding.
    """

    similarity: Positive = 200.0
    expansion: NotNegative = 1.0
    epsilon: Positive = 0.2
    projector: ProjectorConfig = field(
        default_factory=lambda: ProjectorConfig(hidden=4096, out=1024, layers=3, norm=True, bias=True)
    )


class EMPSSL(Method):
    """One network, and one training step's loss.

    METRICS: also ``coding_rate``, as a share of the largest that there can be: 1 where the embeddings of a batch fill
    all directions evenly, 0 where they are all one.
    """

    METRICS = (*Method.METRICS, "coding_rate")
    HAS_TEACHER = False
    divisible = False  # the batch is what fills the directions

    def __init__(
        self, backbone: nn.Module, config: EMPSSLConfig, *, views: Views, generator: torch.Generator | None = None
    ):
        super().__init__(new_encoder(backbone, config.projector), views)
        self.config = config
        self._largest = largest_coding_rate(views.global_batch, config.projector.out, config.epsilon)

    def loss(self, embeddings: Tensor, targets: tuple[Tensor, ...], rates: Rates) -> StepOutput:
        config, views = self.config, self.views.count
        mine = embeddings.unflatten(0, (views, -1))
        everyone = gather_views(embeddings, views, gradient=True).unflatten(0, (views, -1))
        similar = functional.cosine_similarity(mine, mine.mean(0, keepdim=True), dim=-1).mean()
        rate = coding_rate(everyone, config.epsilon).mean()
        loss = -config.similarity * similar - config.expansion * rate
        least = -config.similarity - config.expansion * self._largest
        first, second = mine[:2].detach()
        return StepOutput(loss, least, (first, second), (rate.detach() / self._largest,))
