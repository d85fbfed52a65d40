"""SwAV: views predict each other's assignment to learned prototypes; the assignments share the prototypes out evenly.

Source: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", arXiv 2006.09882;
for small networks SSLight, arXiv 2210.02808.

    z_v = unit embedding of view v,   S_v = z_v C^T with unit rows C
    q_g = sinkhorn(S_g, the queue's scores beside it)     g in the two global views, no gradient
    pair(g, v) = - mean_b sum_k q_g[k] log softmax(S_v / tau)[k]        g != v

There is no teacher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from fastssl.distributed.collectives import all_reduce_sum, gather_views, rank
from fastssl.losses.pairs import reduce_pairs, split_pairs
from fastssl.losses.sinkhorn import sinkhorn
from fastssl.losses.soft_targets import soft_cross_entropy
from fastssl.methods.base import Encoder, Method, MethodConfig, Rates, StepOutput, Views
from fastssl.models.backbones import feature_dim
from fastssl.models.heads import Projector, ProjectorConfig, Prototypes
from fastssl.optim.schedules import RunLength
from fastssl.utils.settings import Count, Natural, Positive, Whole, settings


@settings("swav")
class SwAVConfig(MethodConfig):
    """The method's own numbers.

    Attributes:
        prototypes: number K of them.
        temperature: tau of the prediction.
        epsilon: entropy of the assignments; the smaller, the sharper.
        sinkhorn_iterations: rounds of sharing out.
        queue: features of earlier batches that are assigned beside the present one, for each global view; rounded down
            to whole batches; 0: none. It lets a small batch be shared out over many prototypes.
        queue_epoch: the epoch (from 0) in which the queue begins to fill; it is used from when it is full.
        freeze_epochs: epochs at the start in which the prototypes get no update.
        projector: shape of the MLP.
    """

    prototypes: Annotated[Whole, Field(ge=2)] = 3000
    temperature: Positive = 0.1
    epsilon: Positive = 0.05
    sinkhorn_iterations: Count = 3
    queue: Natural = 3840
    queue_epoch: Natural = 15
    freeze_epochs: Natural = 1
    projector: ProjectorConfig = field(
        default_factory=lambda: ProjectorConfig(hidden=4096, out=128, layers=2, norm=True, bias=True, init="normal")
    )

    BATCH_KEY = "swav.queue"
    EPOCH_KEYS = ("queue_epoch", "freeze_epochs")

    @property
    def largest_batch(self) -> int | None:
        return self.queue or None

    def allows(self, batch: int) -> bool:
        return batch >= 2 and (not self.queue or batch <= self.queue)

    def scaled(self, batch: int, *, photos: int | None = None, processes: int = 1) -> SwAVConfig:
        if not self.queue:
            return self
        most = self.queue if photos is None else min(self.queue, photos // batch * batch)
        return replace(self, queue=max(most, batch))


class SwAVHead(nn.Module):
    """Projector and prototypes: (N, F) -> (N, D + K) float32, the unit embedding and its scores side by side.

    One tensor, because both leave the network: the scores for the loss, the embedding for the queue.
    """

    def __init__(self, in_features: int, config: SwAVConfig):
        super().__init__()
        self.mlp = Projector(in_features, config.projector)
        self.prototypes = Prototypes(config.projector.out, config.prototypes)

    def forward(self, features: Tensor) -> Tensor:
        embeddings = self.mlp(features)
        return torch.cat([embeddings, self.prototypes(embeddings)], 1)


class SwAV(Method):
    """The network, its prototypes, the queue.

    METRICS: also ``target_entropy``, of the assignments, as a share of ln K: near 1 for long means that the scores do
    not tell the prototypes apart.

    The queue is the same on all ranks, and each takes its share of it into the assignment: the number of ranks changes
    nothing.
    """

    METRICS = (*Method.METRICS, "target_entropy")
    HAS_TEACHER = False
    divisible = False  # the assignment looks at the whole batch

    queue: Tensor

    def __init__(
        self, backbone: nn.Module, config: SwAVConfig, *, views: Views, generator: torch.Generator | None = None
    ):
        super().__init__(Encoder(backbone, SwAVHead(feature_dim(backbone), config)), views)
        self.config = config
        self.queue_batches = config.queue // views.global_batch
        if config.queue and not self.queue_batches:
            batch = views.global_batch
            raise ValueError(f"swav.queue={config.queue} holds no whole batch of {batch}; enlarge it, or set it to 0")
        self.register_buffer("queue", torch.zeros(2, self.queue_batches * views.global_batch, config.projector.out))

    @property
    def prototypes(self) -> Prototypes:
        """The student's."""
        return cast(SwAVHead, self.student.projector).prototypes

    def rates(self, step: int, run: RunLength) -> dict[str, float | bool]:
        """``frozen``: the prototypes stand still. ``fill``: the batch enters the queue. ``queue``: it is full and
        used.
        """
        since = step - self.config.queue_epoch * run.steps_per_epoch if self.queue_batches else -1
        frozen = run.epoch(step) < self.config.freeze_epochs
        return {"frozen": frozen, "fill": since >= 0, "queue": since >= self.queue_batches}

    def targets(self, images: Sequence[Tensor], noise: Mapping[str, Tensor], rates: Rates) -> tuple[Tensor, ...]:
        """None: assignments come of the embeddings. Prototypes get unit length here, before any pass of the step."""
        self.prototypes.normalise_()
        return ()

    def loss(self, embeddings: Tensor, targets: tuple[Tensor, ...], rates: Rates) -> StepOutput:
        width = self.config.projector.out
        scores = embeddings[:, width:].unflatten(0, (self.views.count, -1))
        first, second = embeddings[: 2 * self.views.batch_size, :width].detach().chunk(2)
        assigned = self.assign(scores[:2].detach(), use_queue=bool(rates["queue"]))
        pairs = soft_cross_entropy(assigned, scores, self.config.temperature)
        loss = reduce_pairs(*split_pairs(pairs), self.views.weights)
        frozen = (self.prototypes.weight,) if rates["frozen"] else ()
        with torch.no_grad():
            entropy = torch.special.entr(assigned).sum(-1).mean()
        return StepOutput(loss, entropy, (first, second), (entropy / math.log(self.config.prototypes),), frozen)

    @torch.no_grad()
    def assign(self, scores: Tensor, *, use_queue: bool) -> Tensor:
        """Assignments (2, B, K) float32 of this rank's global views, shared out over the samples (and the queue) of all
        ranks.
        """
        found, world = [], self.views.world
        for view, own in enumerate(scores):
            columns = own
            if use_queue:
                share = self.queue.shape[1] // world
                mine = self.queue[view, rank() * share : (rank() + 1) * share]
                columns = torch.cat([self.prototypes(mine), own])  # with the present prototypes; the batch comes last
            shared = sinkhorn(columns, self.config.epsilon, self.config.sinkhorn_iterations, all_reduce_sum, world)
            found.append(shared[-len(own) :])
        return torch.stack(found)

    @torch.no_grad()
    def after_step(self, targets: tuple[Tensor, ...], pair: tuple[Tensor, Tensor], rates: Rates) -> None:
        """Put this step's embeddings of all ranks into the queue, in the place of the oldest."""
        if not rates["fill"]:
            return
        fresh = gather_views(torch.cat(pair), 2).unflatten(0, (2, -1))  # (2, global batch, D)
        self.queue.copy_(torch.cat([self.queue[:, fresh.shape[1] :], fresh], 1))
