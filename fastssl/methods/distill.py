"""Distillation: a student learns from a teacher that was trained before and stands still, of any width and input size.

Sources: SEED (Fang et al., arXiv 2101.04731) for ``similarity``; for ``smoothed`` light-moco's target (arXiv
2212.07158), with the teacher's embedding in the place of the key; for ``features`` the squared distance of unit vectors
behind a head, as in DisCo (Gao et al., arXiv 2104.09124). That both see the same crop is from Beyer et al., "Knowledge
distillation: A good teacher is patient and consistent", arXiv 2106.05237.

    s_v = head(student(x_v)),  t_g = teacher(x_g), both of unit length       g in the two global views, no gradient
    pair(g, v)   similarity: cross-entropy of softmax(s_v.[t_g; queue] / tau_s) and softmax(t_g.[t_g; queue] / tau_t)
                 smoothed:   smoothed InfoNCE, t_g the positive, the queue the negatives
                 features:   |s_v - t_g|^2
    loss         reduce( mean of pair(g, g), mean over the local views v of pair(g, v) )
    after the step  the teacher's embeddings enter the queue
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fastssl.distributed.collectives import gather_views
from fastssl.losses import SmoothedInfoNCE
from fastssl.losses.pairs import reduce_pairs
from fastssl.losses.similarity import neighbours_mean, similarity_loss
from fastssl.methods.base import Method, Rates, SmoothedConfig, StepOutput, Views, new_encoder
from fastssl.methods.queue import Queued
from fastssl.models.backbones import feature_dim
from fastssl.models.heads import HeadConfig, ProjectorConfig, at_least_float32
from fastssl.optim.schedules import RunLength
from fastssl.pipelines.plan.draw import Normalisation
from fastssl.utils.settings import Count, Natural, Positive, Whole, settings


@settings("distill")
class DistillConfig(SmoothedConfig):
    """The method's own numbers.

    Attributes:
        teacher: whose weights: a run's folder, a file, or a timm name with its tag; it has to be named.
        teacher_size: pixels to which the views are scaled for the teacher, on the device; None: as the student sees
            them.
        loss: ``similarity``, ``smoothed`` or ``features``.
        temperature: tau_s. teacher_temperature: tau_t, read by ``similarity`` only.
        smoothing, weighting, neighbors, smoothing_schedule, smoothing_warm_epochs: read by ``smoothed`` only.
        queue: number of the teacher's embeddings that are kept, a multiple of twice the batch; not read by
            ``features``.
        cache_epochs: the epochs share the views of that many, which the teacher sees once, before the first step
            (``training.teacher_cache``); 0: new views every epoch, which the teacher sees as they come.
        head: the MLP between the student's features and the embedding, which is as wide as the teacher's.
    """

    teacher: str | None = None
    teacher_size: Annotated[Whole, Field(ge=8)] | None = None
    loss: Literal["similarity", "smoothed", "features"] = "similarity"
    temperature: Positive = 0.2
    teacher_temperature: Positive = 0.01
    queue: Count = 65536
    cache_epochs: Natural = 0
    head: HeadConfig = field(default_factory=HeadConfig)

    BATCH_KEY = "distill.queue"

    @property
    def largest_batch(self) -> int | None:
        return None if self.loss == "features" else self.queue // 2

    def allows(self, batch: int) -> bool:
        return batch >= 2 and (self.loss == "features" or self.queue % (2 * batch) == 0)

    def scaled(self, batch: int, *, photos: int | None = None, processes: int = 1) -> DistillConfig:
        return self if self.allows(batch) else replace(self, queue=-(-self.queue // (2 * batch)) * 2 * batch)


class FrozenTeacher(nn.Module):
    """A trained backbone in evaluation mode, which no ``train()`` of what holds it changes: views as the student gets
    them (N, 3, S, S) -> unit vectors (N, F), float32.

    Args:
        backbone: images -> features. about: who it is, for the records of a run.
        size: to which the views are scaled, in pixels; None: not at all.
        given, seen: how the views are normalised; how the pictures were that the teacher was trained on.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        size: int | None,
        given: Normalisation,
        seen: Normalisation,
        about: Mapping[str, str] | None = None,
    ):
        super().__init__()
        self.backbone, self.size, self.about = backbone.requires_grad_(False), size, dict(about or {})
        mean, std, own_mean, own_std = (torch.tensor(part).view(3, 1, 1) for part in (*given, *seen))
        self.normalises = given != seen
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)
        self.eval()

    @property
    def width(self) -> int:
        """F."""
        return feature_dim(self.backbone)

    def forward(self, images: Tensor) -> Tensor:
        if self.normalises:
            images = images * self.scale + self.shift
        if self.size not in (None, images.shape[-1]):
            smaller = images.shape[-1] > self.size
            images = functional.interpolate(images, (self.size, self.size), mode="bilinear", antialias=smaller)
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return functional.normalize(at_least_float32(features), dim=1)


class Distill(Queued, Method):
    """Student, head, queue; beside them the teacher, which is neither trained nor saved.

    METRICS: also ``teacher_cosine``, of student and teacher for the same view: 1 where they are equal.

    Args:
        teacher: stands still. generator: draws the queue's first content; on the CPU.

    Raises:
        ValueError: the batch does not fit the queue.
    """

    METRICS = (*Method.METRICS, "teacher_cosine")
    HAS_TEACHER = False  # no moving average

    def __init__(
        self,
        backbone: nn.Module,
        config: DistillConfig,
        *,
        views: Views,
        teacher: FrozenTeacher,
        generator: torch.Generator | None = None,
    ):
        self.config = config
        self._frozen = (teacher,)  # nn.Module does not register a tuple: it is no part of the state
        super().__init__(new_encoder(backbone, ProjectorConfig(**asdict(config.head), out=teacher.width)), views)
        self.criterion = SmoothedInfoNCE(**config.target)
        if config.loss == "features":
            return
        if config.queue % (2 * views.global_batch):
            raise ValueError(
                f"distill.queue={config.queue} must be a multiple of twice the batch size ({2 * views.global_batch})"
            )
        if config.loss == "smoothed" and config.queue < config.sharing:
            raise ValueError(
                f"distill.queue={config.queue} holds fewer embeddings than the {config.sharing} neighbours that share "
                "the smoothing"
            )
        self.begin_queue(config.queue, teacher.width, generator)

    @property
    def frozen(self) -> FrozenTeacher:
        """The teacher."""
        return self._frozen[0]

    @property
    def networks(self) -> list[nn.Module]:
        """The student, and the teacher unless all that it says is known before."""
        return [self.student] if self.config.cache_epochs else [self.student, self.frozen]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distill:
        """``to`` and the like move the teacher, too, where a step needs it."""
        for network in self.networks[1:]:
            network._apply(fn)
        found: Distill = super()._apply(fn, recurse)
        return found

    def synchronise(self, convert: Callable[[nn.Module], object]) -> None:
        convert(self.student)

    def rates(self, step: int, run: RunLength) -> dict[str, float | bool]:
        return self.config.smoothing_rates(step, run) if self.config.loss == "smoothed" else {}

    @torch.no_grad()
    def targets(self, images: Sequence[Tensor], noise: Mapping[str, Tensor], rates: Rates) -> tuple[Tensor, ...]:
        """The teacher's embeddings of the global views, (2 B, F): computed, or ``noise["teacher"]``, as cached. With
        ``similarity`` also what they say of the queue, see ``neighbours_mean``.
        """
        keys = noise.get("teacher")
        if keys is None:
            keys = self._computing[1](images[0][: self.teacher_views * self.views.batch_size])
        if self.config.loss != "similarity":
            return (keys,)
        return keys, *neighbours_mean(keys, self.queue, self.config.teacher_temperature)

    def loss(self, embeddings: Tensor, targets: tuple[Tensor, ...], rates: Rates) -> StepOutput:
        own, local = len(targets[0]), self.views.weights.local_views
        gl = None
        if local:
            of_view = [tuple(rows.chunk(2)[g] for rows in targets) for g in range(2)]
            repeated = [tuple(torch.cat([rows] * local) for rows in target) for target in of_view]
            gl = torch.stack([self.pairs(embeddings[own:], target, rates) for target in repeated]).mean()
        loss = reduce_pairs(self.pairs(embeddings[:own], targets, rates), gl, self.views.weights)
        with torch.no_grad():
            first, second = embeddings[:own].detach().chunk(2)
            cosine = (embeddings[:own] * targets[0]).sum(1).mean()
        return StepOutput(loss, self._entropy(targets, rates), (first, second), (cosine,))

    def pairs(self, queries: Tensor, target: tuple[Tensor, ...], rates: Rates) -> Tensor:
        """Mean loss of the students' embeddings (N, F) against the targets of the same N views."""
        config = self.config
        if config.loss == "features":
            return (queries - target[0]).square().sum(1).mean()
        if config.loss == "smoothed":
            return self.criterion(queries, target[0], self.queue, rates.get("smoothing", 0.0))
        return similarity_loss(queries, target[0], target[1], self.queue, config.temperature)

    def _entropy(self, targets: tuple[Tensor, ...], rates: Rates) -> Tensor | float:
        if self.config.loss == "similarity":
            return targets[2].mean()
        if self.config.loss == "features":
            return 0.0
        return self.criterion.target_entropy(rates.get("smoothing", 0.0), negatives=len(self.queue))

    @torch.no_grad()
    def after_step(self, targets: tuple[Tensor, ...], pair: tuple[Tensor, Tensor], rates: Rates) -> None:
        if self.config.loss != "features":
            self.enqueue(gather_views(targets[0], 2))
