"""SimCLR with a smoothed target: the other photos of the batch are the negatives; no teacher, no queue.

Sources: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", arXiv 2002.05709; the
smoothing is light-moco's (arXiv 2212.07158), local views are paired as in SSLight (arXiv 2210.02808).

    pair(g, v) = nce of view v's embedding: positive is global view g of the same photo, negatives are both global
                 views of all others       g != v
"""

from __future__ import annotations

from dataclasses import field, replace

import torch
from torch import Tensor, nn

from fastssl.distributed.collectives import gather_views, rank
from fastssl.losses.nt_xent import SmoothedNTXent
from fastssl.losses.pairs import reduce_pairs, split_pairs
from fastssl.methods.base import Method, Rates, SmoothedConfig, StepOutput, Views, new_encoder
from fastssl.models.heads import ProjectorConfig
from fastssl.optim.schedules import RunLength
from fastssl.utils.settings import settings


@settings("simclr")
class SimCLRConfig(SmoothedConfig):
    """The method's own numbers.

    Attributes:
        projector: shape of the MLP.
    """

    projector: ProjectorConfig = field(
        default_factory=lambda: ProjectorConfig(hidden=2048, out=128, layers=2, norm=True)
    )

    BATCH_KEY = "simclr.neighbors"  # the batch has to give as many negatives

    def allows(self, batch: int) -> bool:
        return batch >= 2 and 2 * (batch - 1) >= (self.sharing if self.smoothing else 0)

    def scaled(self, batch: int, *, photos: int | None = None, processes: int = 1) -> SimCLRConfig:
        return self if self.allows(batch) else replace(self, weighting="nearest", neighbors=None)


class SimCLR(Method):
    """One network, and one training step's loss."""

    HAS_TEACHER = False
    divisible = False  # the batch is the negatives

    def __init__(
        self, backbone: nn.Module, config: SimCLRConfig, *, views: Views, generator: torch.Generator | None = None
    ):
        super().__init__(new_encoder(backbone, config.projector), views)
        self.config = config
        self.criterion = SmoothedNTXent(**config.target)
        if not config.allows(views.global_batch):
            raise ValueError(
                f"the batch gives {2 * (views.global_batch - 1)} negatives, fewer than the {self.criterion.neighbors} "
                "neighbours that share the smoothing"
            )

    def rates(self, step: int, run: RunLength) -> dict[str, float | bool]:
        return self.config.smoothing_rates(step, run)

    def loss(self, embeddings: Tensor, targets: tuple[Tensor, ...], rates: Rates) -> StepOutput:
        batch, smoothing = self.views.batch_size, rates.get("smoothing", 0.0)
        candidates = gather_views(embeddings[: 2 * batch], 2, gradient=True)
        pairs = self.criterion(
            embeddings.unflatten(0, (self.views.count, -1)),
            candidates.unflatten(0, (2, -1)),
            first=rank() * batch,
            smoothing=smoothing,
        )
        loss = reduce_pairs(*split_pairs(pairs), self.views.weights)
        entropy = self.criterion.target_entropy(smoothing, negatives=2 * (self.views.global_batch - 1))
        first, second = embeddings[: 2 * batch].detach().chunk(2)
        return StepOutput(loss, entropy, (first, second))
