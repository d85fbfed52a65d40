"""ReSA: how alike the photos of a batch are to the backbone says how alike their embeddings are to become.

Source: Weng et al., "Clustering Properties of Self-Supervised Learning" (ReSA), arXiv 2501.18452. With h the backbone's
features of the first view and h' the teacher's, all of unit length, over the N photos of all processes,

    A = sinkhorn(h h'^T / epsilon)                        no gradient; rows sum to one
    S = z_v z'_g^T / tau                                  z_v of any view, z'_g of the teacher, of a global one
    pair(g, v) = - mean_i sum_j (A_ij log softmax(S)_ij + A_ji log softmax(S^T)_ij) / 2        g != v
    before the step  teacher <- m teacher + (1 - m) student

A head that only the student has, the predictor, stands behind its projector. Each view goes through a network alone:
BatchNorm does not mix them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl.distributed.collectives import gather_rows, gather_views, rank
from fastssl.losses.pairs import reduce_pairs, split_pairs
from fastssl.losses.sinkhorn import sinkhorn
from fastssl.methods.base import Encoder, Method, MethodConfig, Rates, StepOutput, Views
from fastssl.models.backbones import feature_dim
from fastssl.models.group_batchnorm import BatchNorms
from fastssl.models.heads import Projector, ProjectorConfig, at_least_float32
from fastssl.optim import schedules
from fastssl.optim.schedules import MomentumSchedule, RunLength
from fastssl.utils.settings import Count, Positive, Share, Switch, settings


@settings("resa")
class ReSAConfig(MethodConfig):
    """The method's own numbers.

    Attributes:
        temperature: tau.
        epsilon, iterations: of ``losses.sinkhorn``.
        momentum: of the teacher.
        momentum_schedule: ``constant``, or ``cosine`` up to 1.
        predictor: whether the student has one: an MLP as wide as the projector's hidden layers.
        projector: shape of the MLP to the embedding.
    """

    temperature: Positive = 0.4
    epsilon: Positive = 0.05
    iterations: Count = 3
    momentum: Share = 0.996
    momentum_schedule: MomentumSchedule = "cosine"
    predictor: Switch = True
    projector: ProjectorConfig = field(
        default_factory=lambda: ProjectorConfig(hidden=2048, out=512, layers=3, norm=True, norm_out=True, bias=True)
    )


class ReSAHead(nn.Module):
    """(N, F) -> (N, out + F): the embedding, and behind it the feature without gradient, of unit length both."""

    def __init__(self, in_features: int, config: ReSAConfig):
        super().__init__()
        out, hidden = config.projector.out, config.projector.hidden
        self.mlp = Projector(in_features, config.projector)
        shape = ProjectorConfig(hidden=hidden, out=out, norm=True, bias=True)
        self.predictor: nn.Module = Projector(out, shape) if config.predictor else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        embeddings = self.predictor(nn.Sequential.forward(self.mlp, features))
        both = (at_least_float32(embeddings), at_least_float32(features.detach()))
        return torch.cat([functional.normalize(one, dim=1) for one in both], 1)


class ReSAEncoder(Encoder):
    """Backbone and ``ReSAHead``."""

    def as_teacher(self) -> Encoder:
        teacher = super().as_teacher()
        teacher.projector.predictor = nn.Identity()
        teacher.norms = BatchNorms(teacher)
        return teacher


class ReSA(Method):
    """Student and teacher."""

    divisible = False  # the batch says what is alike

    def __init__(
        self, backbone: nn.Module, config: ReSAConfig, *, views: Views, generator: torch.Generator | None = None
    ):
        width = feature_dim(backbone)
        super().__init__(ReSAEncoder(backbone, ReSAHead(width, config)), views)
        self.config, self._widths = config, [config.projector.out, width]

    def rates(self, step: int, run: RunLength) -> dict[str, float | bool]:
        # The original moves its teacher before a step, by that step's momentum; here it moves behind the one before.
        config = self.config
        return {"momentum": schedules.ema_momentum(step + 1, run, config.momentum, config.momentum_schedule)}

    @torch.no_grad()
    def targets(self, images: Sequence[Tensor], noise: Mapping[str, Tensor], rates: Rates) -> tuple[Tensor, ...]:
        """The teacher's embeddings and features of the global views, (2 B, out + F)."""
        return (self.teach(images[0][: 2 * self.views.batch_size], groups=2),)

    def embed(self, images: Sequence[Tensor]) -> Tensor:
        return self.encode(images, groups=self.views.count, views=self.views.count)

    def loss(self, embeddings: Tensor, targets: tuple[Tensor, ...], rates: Rates) -> StepOutput:
        batch, tau = self.views.batch_size, self.config.temperature
        mine = slice(rank() * batch, (rank() + 1) * batch)
        z, h = embeddings.split(self._widths, 1)
        wanted, features = targets[0].split(self._widths, 1)
        with torch.no_grad():
            alike = gather_rows(h[:batch]) @ gather_rows(features[:batch]).T
            assigned = sinkhorn(alike, self.config.epsilon, self.config.iterations)
        # This process's share of the loss: its rows of S, and its columns.
        views, rows, columns = self.views.count, assigned[mine], assigned[:, mine].T
        everyone = gather_views(z, views, gradient=True)
        of_rows = _cross_entropy(rows, _similar(z, gather_views(wanted, 2), views, tau))
        of_columns = _cross_entropy(columns, _similar(everyone, wanted, views, tau).mT)
        loss = reduce_pairs(*split_pairs((of_rows + of_columns) / 2), self.views.weights)
        entropy = (_entropy(rows) + _entropy(columns)) / 2
        one, other = z[: 2 * batch].detach().chunk(2)
        return StepOutput(loss, entropy, (one, other))


def _similar(embeddings: Tensor, wanted: Tensor, views: int, temperature: float) -> Tensor:
    """(V N, D) and (2 M, D) -> (2, V, N, M): cosines of each view with each target, divided by the temperature."""
    with torch.autocast(embeddings.device.type, enabled=False):
        first, second = embeddings.unflatten(0, (views, -1)), wanted.unflatten(0, (2, -1))
        found: Tensor = torch.einsum("vnd,gmd->gvnm", first, second)
    return found / temperature


def _cross_entropy(assigned: Tensor, logits: Tensor) -> Tensor:
    """(N, M), whose rows need not sum to one, and (2, V, N, M) -> (2, V)."""
    losses: Tensor = torch.logsumexp(logits, -1) * assigned.sum(-1) - (logits * assigned).sum(-1)
    return losses.mean(-1)


def _entropy(assigned: Tensor) -> Tensor:
    """The least that ``_cross_entropy`` can be."""
    least: Tensor = torch.special.entr(assigned).sum(-1) - torch.special.entr(assigned.sum(-1))
    return least.mean()
