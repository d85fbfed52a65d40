"""Distillation: a student learns from a teacher that was trained before and stands still, of any width and input size.

    s_v = head(student(x_v)),  t_g = teacher(x_g), both of unit length       g in the two global views, no gradient
    pair(g, v)   similarity: cross-entropy of softmax(s_v.[t_g; queue] / tau_s) and softmax(t_g.[t_g; queue] / tau_t)
                 smoothed:   smoothed InfoNCE, t_g the positive, the queue the negatives
                 features:   |s_v - t_g|^2
    loss         reduce( mean of pair(g, g), mean over the local views v of pair(g, v) )
    after the step  the teacher's embeddings enter the queue

Sources: SEED (Fang et al., arXiv 2101.04731), ``similarity``; light-moco (arXiv 2212.07158), the smoothed target; DisCo
(Gao et al., arXiv 2104.09124), the distance of unit vectors; Beyer et al. (arXiv 2106.05237): both see the same crop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, field, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fastssl.distributed.collectives import all_reduce_mean, gather_views
from fastssl.losses import SmoothedInfoNCE
from fastssl.losses.pairs import reduce_pairs
from fastssl.losses.similarity import neighbours_mean, similarity_loss
from fastssl.methods.base import Method, Rates, SmoothedConfig, StepOutput, Views, new_encoder
from fastssl.methods.queue import Queued
from fastssl.models.backbones import feature_dim
from fastssl.models.heads import HeadConfig, ProjectorConfig, at_least_float32
from fastssl.optim.schedules import RunLength
from fastssl.pipelines.plan.draw import Normalisation
from fastssl.utils.settings import Count, Natural, Positive, Switch, Whole, settings

#: Variance of a feature that is standardised, next to which a smaller one is none; 1: of an even share of the length.
_LEAST = 1e-3


@settings("distill")
class DistillConfig(SmoothedConfig):
    """The method's own numbers.

    Attributes:
        teacher: whose weights, see ``weights.source.load_weights``; to be named.
        teacher_size: pixels to which the views are scaled for it, on the device; None: as the student sees them.
        loss: ``similarity``, ``smoothed`` or ``features``.
        temperature: tau_s. teacher_temperature: tau_t, read by ``similarity`` only.
        smoothing, weighting, neighbors, smoothing_schedule, smoothing_warm_epochs: read by ``smoothed`` only.
        standardise: the teacher's features get mean 0 and deviation 1 over a batch, as behind a BatchNorm; without it
            what they all have in common is most of them. From Miles and Mikolajczyk, arXiv 2303.11098.
        queue: how many of the teacher's embeddings are kept, a multiple of twice the batch; not read by ``features``.
        cache_epochs: epochs share the views of that many, which the teacher sees once, before the first step
            (``training.teacher``); 0: new ones every epoch, which it sees as they come.
        head: the MLP from the student's features to the embedding, which is as wide as the teacher's.
    """

    teacher: str | None = None
    teacher_size: Annotated[Whole, Field(ge=8)] | None = None
    loss: Literal["similarity", "smoothed", "features"] = "similarity"
    temperature: Positive = 0.2
    teacher_temperature: Positive = 0.01
    standardise: Switch = False
    queue: Count = 65536
    cache_epochs: Natural = 0
    head: HeadConfig = field(default_factory=HeadConfig)

    BATCH_KEY = "distill.queue"

    @property
    def view_epochs(self) -> int | None:
        return self.cache_epochs or None

    @property
    def largest_batch(self) -> int | None:
        return None if self.loss == "features" else self.queue // 2

    def allows(self, batch: int) -> bool:
        return batch >= 2 and (self.loss == "features" or self.queue % (2 * batch) == 0)

    def scaled(self, batch: int, *, photos: int | None = None, processes: int = 1) -> DistillConfig:
        keys = 2 * batch
        steps = -(-self.queue // keys)
        if photos is not None:  # random vectors would stay in a longer one for epochs
            sharing = self.sharing if self.loss == "smoothed" else 0
            steps = min(steps, max(1, photos // keys, -(-sharing // keys)))
        return self if self.loss == "features" else replace(self, queue=steps * keys)


class FrozenTeacher(nn.Module):
    """A trained backbone in evaluation mode: views as the student gets them (N, 3, S, S) -> unit vectors (N, F),
    float32.

    Args:
        backbone: images -> features. about: who it is, for the records of a run.
        size: to which the views are scaled, in pixels; None: not at all.
        given, seen: how the views are normalised; how the pictures were that it was trained on.
    """

    def __init__(
        self, backbone: nn.Module, size: int | None, *, given: Normalisation, seen: Normalisation, about: dict[str, str]
    ):
        super().__init__()
        self.backbone, self.size, self.about, self.width = backbone, size, about, feature_dim(backbone)
        mean, std, own_mean, own_std = (torch.tensor(part).view(3, 1, 1) for part in (*given, *seen))
        self.change = nn.ParameterList([std / own_std, (mean - own_mean) / own_std] if given != seen else [])
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        if self.change:
            images = images * self.change[0] + self.change[1]
        if self.size not in (None, images.shape[-1]):
            smaller = images.shape[-1] > self.size
            images = functional.interpolate(images, (self.size, self.size), mode="bilinear", antialias=smaller)
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return functional.normalize(at_least_float32(features), dim=1)


class Distill(Queued, Method):
    """Student, head, queue; beside them the teacher, which is neither trained nor saved. ``generator`` draws what is in
    the queue at first, on the CPU. Raises ValueError where the batch does not fit the queue.

    METRICS: also ``teacher_cosine``, of student and teacher for the same view: 1 where they are equal.
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
        self.config, self._frozen = config, (teacher,)  # a tuple is not registered: no part of the state
        super().__init__(new_encoder(backbone, ProjectorConfig(**asdict(config.head), out=teacher.width)), views)
        self.criterion = SmoothedInfoNCE(**config.target)
        if not config.allows(views.global_batch):
            twice = 2 * views.global_batch
            raise ValueError(f"distill.queue={config.queue} must be a multiple of twice the batch size ({twice})")
        if config.loss == "smoothed" and config.smoothing:
            self.criterion.require_negatives(config.queue)
        if config.loss != "features":
            self.begin_queue(config.queue, teacher.width, generator)

    @property
    def frozen(self) -> FrozenTeacher:
        """The teacher."""
        return self._frozen[0]

    @property
    def networks(self) -> list[nn.Module]:
        return [self.student, self.frozen]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distill:
        """``to`` and the like also move the teacher."""
        self.frozen._apply(fn)
        super()._apply(fn, recurse)
        return self

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
        if self.config.standardise:
            keys = keys - all_reduce_mean(keys.mean(0))
            spread = all_reduce_mean(keys.square().mean(0)) + _LEAST / keys.shape[1]
            keys = functional.normalize(keys * spread.rsqrt(), dim=1)
        if self.config.loss != "similarity":
            return (keys,)
        return keys, *neighbours_mean(keys, self.queue, self.config.teacher_temperature)

    def loss(self, embeddings: Tensor, targets: tuple[Tensor, ...], rates: Rates) -> StepOutput:
        own, local, smoothing = len(targets[0]), self.views.weights.local_views, rates.get("smoothing", 0.0)

        def pair(queries: Tensor, key: Tensor, mean: Tensor | None = None, *_: Tensor) -> Tensor:
            if mean is not None:
                return similarity_loss(queries, key, mean, self.queue, self.config.temperature)
            if self.config.loss == "smoothed":
                loss: Tensor = self.criterion(queries, key, self.queue, smoothing)
                return loss
            return (queries - key).square().sum(1).mean()

        gl, entropy = None, targets[2].mean() if len(targets) > 1 else 0.0
        if local:
            of_view = zip(*(rows.chunk(2) for rows in targets))
            each = [pair(embeddings[own:], *(torch.cat([rows] * local) for rows in target)) for target in of_view]
            gl = torch.stack(each).mean()
        loss = reduce_pairs(pair(embeddings[:own], *targets), gl, self.views.weights)
        if self.config.loss == "smoothed":
            entropy = self.criterion.target_entropy(smoothing, negatives=len(self.queue))
        first, second = embeddings[:own].detach().chunk(2)
        cosine = (embeddings[:own].detach() * targets[0]).sum(1).mean()
        return StepOutput(loss, entropy, (first, second), (cosine,))

    @torch.no_grad()
    def after_step(self, targets: tuple[Tensor, ...], pair: tuple[Tensor, Tensor], rates: Rates) -> None:
        if self.config.loss != "features":
            self.enqueue(gather_views(targets[0], 2))
