"""DINO: a student matches the sharpened, centred output of its own moving average.

Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", arXiv 2104.14294; for small networks
SSLight, arXiv 2210.02808.

    P_g = softmax((teacher(x_g) - centre) / tau_t)        g in the two global views, no gradient
    Q_v = softmax(student(x_v) / tau_s)                   v in all views
    pair(g, v) = - mean_b sum_k P_g[k] log Q_v[k]         g != v
    after the step:  centre <- 0.9 centre + 0.1 mean of the teacher's logits;  teacher <- m teacher + (1 - m) student

With ``centering: sinkhorn`` (DINOv2, Oquab et al., arXiv 2304.07193, after SwAV) P of both global views of all photos
is made to use all K outputs evenly, in place of the centre. With ``koleo`` (DINOv2, too) the backbone's features of
each global view, at unit length, keep away from their nearest neighbours (``losses.koleo``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fastssl.distributed.collectives import all_reduce_mean, all_reduce_sum, gather_views, rank, world_size
from fastssl.losses.koleo import koleo
from fastssl.losses.pairs import reduce_pairs, split_pairs
from fastssl.losses.sinkhorn import sinkhorn
from fastssl.losses.soft_targets import soft_cross_entropy, teacher_probabilities
from fastssl.methods.base import Encoder, Method, MethodConfig, Rates, StepOutput, Views
from fastssl.models.backbones import feature_dim
from fastssl.models.heads import CosineLogits, Projector, ProjectorConfig, at_least_float32
from fastssl.optim import schedules
from fastssl.optim.schedules import MomentumSchedule, RunLength
from fastssl.utils.settings import Natural, NotNegative, Positive, Share, Switch, Whole, settings


@settings("dino")
class DINOConfig(MethodConfig):
    """The method's own numbers.

    Attributes:
        out: width K of the output; 4096 for CNNs, 65536 for vision transformers.
        student_temperature: tau_s.
        teacher_temperature: tau_t after its warm-up.
        warmup_teacher_temperature: tau_t in the first epoch.
        warmup_teacher_epochs: epochs over which it rises.
        centering: ``mean``: the centre; ``sinkhorn``: three rounds of ``losses.sinkhorn`` of the step's photos.
        center_momentum: of the centre.
        koleo: weight of ``losses.koleo``, added up over both global views (DINOv2: 0.1); 0: none. The metrics
            ``loss`` and ``kl`` are without it.
        momentum: of the teacher.
        momentum_schedule: ``constant``, or ``cosine`` up to 1.
        freeze_epochs: epochs at the start in which the last layer gets no update.
        learned_gain: train the gains of the last layer's rows (the published ViT recipe does, the CNNs' does not).
        projector: the MLP before the last layer.
    """

    out: Annotated[Whole, Field(ge=2)] = 4096
    student_temperature: Positive = 0.1
    teacher_temperature: Positive = 0.07
    warmup_teacher_temperature: Positive = 0.04
    warmup_teacher_epochs: Natural = 50
    centering: Literal["mean", "sinkhorn"] = "mean"
    center_momentum: Share = 0.9
    koleo: NotNegative = 0.0
    momentum: Share = 0.996
    momentum_schedule: MomentumSchedule = "cosine"
    freeze_epochs: Natural = 1
    learned_gain: Switch = False
    projector: ProjectorConfig = field(
        default_factory=lambda: ProjectorConfig(
            hidden=2048, out=256, layers=3, norm=True, bias=True, activation="gelu", init="truncated"
        )
    )

    EPOCH_KEYS = ("warmup_teacher_epochs", "freeze_epochs")


class DINOHead(nn.Module):
    """Projector to unit vectors, then cosines with K rows: (N, F) -> (N, out) float32; where the loss looks at them,
    too, the features of unit length stand behind: (N, out + F).
    """

    def __init__(self, in_features: int, config: DINOConfig):
        super().__init__()
        self.mlp = Projector(in_features, config.projector)
        self.last = CosineLogits(config.projector.out, config.out, learned_gain=config.learned_gain)
        self.shows_features = config.koleo > 0

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.last(self.mlp(features))
        if self.shows_features:
            return torch.cat([logits, functional.normalize(at_least_float32(features), dim=1)], 1)
        return logits


class DINOEncoder(Encoder):
    """Backbone and ``DINOHead``; the teacher gives logits alone."""

    def as_teacher(self) -> Encoder:
        teacher = super().as_teacher()
        cast(DINOHead, teacher.projector).shows_features = False
        return teacher


class DINO(Method):
    """Student, teacher, centre.

    METRICS: also ``target_entropy`` as a share of ln K: 1 is a uniform teacher, 0 one that always says the same with
    certainty. Collapse shows as a loss that stays at ln K.
    """

    METRICS = (*Method.METRICS, "target_entropy")

    center: Tensor

    def __init__(
        self, backbone: nn.Module, config: DINOConfig, *, views: Views, generator: torch.Generator | None = None
    ):
        super().__init__(DINOEncoder(backbone, DINOHead(feature_dim(backbone), config)), views)
        self.config = config
        self.register_buffer("center", torch.zeros(config.out))

    @property
    def divisible(self) -> bool:  # type: ignore[override]
        return not self.config.koleo  # nearest neighbours are of the batch

    def rates(self, step: int, run: RunLength) -> dict[str, float | bool]:
        config = self.config
        return {
            "momentum": schedules.ema_momentum(step, run, config.momentum, config.momentum_schedule),
            "teacher_temperature": schedules.teacher_temperature(
                step, run, config.warmup_teacher_temperature, config.teacher_temperature, config.warmup_teacher_epochs
            ),
            "frozen": run.epoch(step) < config.freeze_epochs,
        }

    @torch.no_grad()
    def targets(self, images: Sequence[Tensor], noise: Mapping[str, Tensor], rates: Rates) -> tuple[Tensor, ...]:
        """The teacher's logits and probabilities for the global views, (2 B, K) float32 both."""
        logits = self.teach(images[0][: self.teacher_views * self.views.batch_size])
        temperature = rates["teacher_temperature"]
        if self.config.centering == "sinkhorn":
            return logits, sinkhorn(logits, temperature, all_reduce=all_reduce_sum, ranks=world_size())
        return logits, teacher_probabilities(logits, self.center, temperature)

    def loss(self, embeddings: Tensor, targets: tuple[Tensor, ...], rates: Rates) -> StepOutput:
        logits = embeddings[:, : self.config.out].unflatten(0, (self.views.count, -1))
        probabilities = targets[1].unflatten(0, (2, -1))
        pairs = soft_cross_entropy(probabilities, logits, self.config.student_temperature)
        loss = reduce_pairs(*split_pairs(pairs), self.views.weights)
        regulariser: Tensor | float = 0.0
        if self.config.koleo:
            regulariser = self.config.koleo * self._koleo(embeddings[:, self.config.out :])
            loss = loss + regulariser
        frozen = tuple(cast(DINOHead, self.student.projector).last.parameters()) if rates["frozen"] else ()
        with torch.no_grad():
            entropy = torch.special.entr(probabilities).sum(-1).mean()
            first, second = functional.normalize(logits[:2].float(), dim=-1)
        more = (entropy / math.log(self.config.out),)
        return StepOutput(loss, entropy, (first, second), more, frozen, regulariser)

    def _koleo(self, features: Tensor) -> Tensor:
        batch = self.views.batch_size
        own = features[: 2 * batch]
        everyone = gather_views(own, 2, gradient=True).unflatten(0, (2, -1))
        return koleo(own.unflatten(0, (2, -1)), everyone, rank() * batch).sum()

    @torch.no_grad()
    def after_step(self, targets: tuple[Tensor, ...], pair: tuple[Tensor, Tensor], rates: Rates) -> None:
        """Move the centre towards the mean of the teacher's logits over both global views of all ranks."""
        if self.config.centering != "mean":
            return
        mean = all_reduce_mean(targets[0].unflatten(0, (2, -1)).mean((0, 1)))
        self.center.lerp_(mean, 1 - self.config.center_momentum)
